//! A program as one of the hands: QEMU's tools, which are also the judge of images, or zbdkit's command line.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;

use super::content::{Pattern, Sources};
use super::hand::{Hand, SnapshotVerb};
use super::layout::Preallocation;
use super::tools::{Said, Tools};
use super::world::{Image, Op, Outcome, World};

/// What `qemu-img check` counts; zeros are left out in its output.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
#[expect(missing_docs, reason = "QEMU's names")]
pub struct Check {
    pub corruptions: u64,
    pub leaks: u64,
    pub corruptions_fixed: u64,
    pub leaks_fixed: u64,
    pub check_errors: u64,
    pub image_end_offset: u64,
    pub total_clusters: u64,
    pub allocated_clusters: u64,
    pub fragmented_clusters: u64,
    pub compressed_clusters: u64,
}

impl Check {
    /// Neither an error nor a leak.
    pub fn is_clean(&self) -> bool {
        self.corruptions == 0 && self.leaks == 0 && self.check_errors == 0
    }
}

/// A line of `qemu-img map`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[expect(missing_docs, reason = "QEMU's names")]
pub struct Run {
    pub start: u64,
    pub length: u64,
    pub depth: u32,
    pub present: bool,
    pub zero: bool,
    pub data: bool,
    pub compressed: bool,
    pub offset: Option<u64>,
}

impl Run {
    /// Bytes with a place in the file; zeros that it has room for say so too, and then are no data.
    pub fn data_here(&self) -> bool {
        self.data && !self.compressed && self.offset.is_some()
    }
}

/// Which program it is. They take the same arguments, nearly.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Qemu,
    Zbdkit,
}

/// A program that makes and changes images.
#[derive(Debug, Clone)]
pub struct Program {
    tools: Tools,
    kind: Kind,
}

impl Program {
    /// QEMU's tools.
    pub fn qemu(tools: Tools) -> Program {
        Program {
            tools,
            kind: Kind::Qemu,
        }
    }

    /// The zbdkit at this path.
    pub fn zbdkit(path: &Path) -> Program {
        Program {
            tools: Tools::at(path),
            kind: Kind::Zbdkit,
        }
    }

    /// Runs `qemu-img`, or zbdkit's verb of the same name, in the world's directory.
    ///
    /// # Errors
    /// When it does not run.
    pub fn img<I: AsRef<str>>(
        &self,
        world: &mut World,
        arguments: impl IntoIterator<Item = I>,
    ) -> Result<Said> {
        let tool = match self.kind {
            Kind::Qemu => "qemu-img",
            Kind::Zbdkit => "zbdkit",
        };
        self.run(world, tool, arguments)
    }

    fn run<I: AsRef<str>>(
        &self,
        world: &mut World,
        tool: &str,
        arguments: impl IntoIterator<Item = I>,
    ) -> Result<Said> {
        let said = self.tools.run(tool, &world.directory, arguments)?;
        ensure!(
            said.status.code().is_some(),
            "{} died ({}): {}",
            said.command,
            said.status,
            said.text
        );
        world.trace.push(said.command.clone());
        Ok(said)
    }

    /// Runs a command that may be refused, which then has changed nothing.
    fn try_img<I: AsRef<str>>(
        &self,
        world: &mut World,
        arguments: impl IntoIterator<Item = I>,
    ) -> Result<Outcome> {
        let said = self.img(world, arguments)?;
        Ok(match said.code() {
            0 => Outcome::Done,
            _ => Outcome::Refused(said.text.trim().to_owned()),
        })
    }

    /// What `check` says about a qcow2 image, with or without `-r`.
    ///
    /// # Errors
    /// When it could not check.
    pub fn check(&self, world: &mut World, name: &str, repair: Option<&str>) -> Result<(Check, String)> {
        let mut arguments = vec!["check", "-f", "qcow2", "--output=json"];
        if let Some(what) = repair {
            arguments.extend(["-r", what]);
        }
        arguments.push(name);
        let said = self.img(world, arguments)?;
        let json = said.text.find('{').zip(said.text.rfind('}'));
        let (start, end) = json.with_context(|| format!("{} says: {}", said.command, said.text))?;
        let check = serde_json::from_str(&said.text[start..=end]).context("the output of qemu-img check")?;
        Ok((check, said.text))
    }

    /// What `qemu-img map` says about a qcow2 image.
    ///
    /// # Errors
    /// When it does not run.
    pub fn map(&self, world: &mut World, name: &str) -> Result<Vec<Run>> {
        let said = self
            .img(world, ["map", "-f", "qcow2", "--output=json", name])?
            .success()?;
        world.trace.pop();
        serde_json::from_str(&said.text).context("the output of qemu-img map")
    }

    /// Reads an image or one of its snapshots to the end.
    ///
    /// # Errors
    /// When QEMU cannot.
    pub fn read(
        &self,
        world: &mut World,
        name: &str,
        format: &str,
        snapshot: Option<&str>,
    ) -> Result<Vec<u8>> {
        let mut arguments = vec!["convert", "-f", format, "-O", "raw"];
        if let Some(snapshot) = snapshot {
            arguments.extend(["-l", snapshot]);
        }
        arguments.extend([name, "read.raw"]);
        self.img(world, arguments)?.success()?;
        world.trace.pop();
        let path = world.path("read.raw");
        let bytes = std::fs::read(&path)?;
        std::fs::remove_file(path)?;
        Ok(bytes)
    }

    /// Reads a snapshot of another size than the active contents: they are switched in a copy. `None` where that cannot be.
    fn read_applied(&self, world: &mut World, image: &Image, snapshot: &str) -> Result<Option<Vec<u8>>> {
        let copy = "copy.qcow2";
        std::fs::copy(world.path(&image.name), world.path(copy))?;
        let applied = self.try_img(world, ["snapshot", "-q", "-a", snapshot, copy])?;
        world.trace.pop();
        if let Outcome::Refused(why) = applied {
            let full = image
                .layout
                .as_ref()
                .is_some_and(|layout| layout.refcount_bits <= 8);
            // QEMU cannot grow where the last cluster is compressed and has subclusters.
            let cannot = why.contains("Failed to zero out new clusters");
            ensure!(
                full || cannot,
                "{snapshot} of {} cannot be applied: {why}",
                image.name
            );
            return Ok(None);
        }
        let bytes = self.read(world, copy, "qcow2", None)?;
        std::fs::remove_file(world.path(copy))?;
        Ok(Some(bytes))
    }

    /// `qemu-img compare` of an image with a raw rendering of what it must hold.
    fn compare(&self, world: &mut World, index: usize) -> Result<()> {
        let (name, format) = (world.images[index].name.clone(), world.images[index].format());
        let bytes = world.images[index].content.render(&world.sources);
        std::fs::write(world.path("model.raw"), bytes)?;
        let said = self.img(world, ["compare", "-f", format, "-F", "raw", &name, "model.raw"])?;
        world.trace.pop();
        ensure!(
            said.code() == 0 && !said.text.contains("mismatch"),
            "{}: {}",
            said.command,
            said.text.trim()
        );
        Ok(())
    }

    /// The top with the writes of a process that is killed before it has written its refcounts.
    ///
    /// # Errors
    /// When QEMU does not do what it is told.
    pub fn killed(&self, world: &mut World, ops: &[Op]) -> Result<()> {
        let mut arguments = self.arguments(ops);
        arguments.extend(["-c".into(), "flush".into(), "-c".into(), "sigraise 9".into()]);
        arguments.push(world.top().name.clone());
        let said = self.tools.run("qemu-io", &world.directory, &arguments)?;
        world.trace.push(said.command.clone());
        ensure!(said.status.code().is_none(), "{} survived", said.command);
        let outcomes = self.outcomes(&said, ops)?;
        if let Some(Outcome::Refused(why)) = outcomes.iter().find(|outcome| **outcome != Outcome::Done) {
            bail!("{}: {why}", said.command);
        }
        Ok(())
    }

    /// Writes the top's contents into the image below it.
    ///
    /// # Errors
    /// When it does not run.
    pub fn commit(&self, world: &mut World, keep: bool) -> Result<Outcome> {
        let name = world.top().name.clone();
        let mut arguments = vec!["commit", "-q", "-f", "qcow2"];
        if keep {
            arguments.push("-d");
        }
        arguments.push(&name);
        self.try_img(world, arguments)
    }

    /// Gives the top another backing image; without `unsafe` its contents stay what they are.
    ///
    /// # Errors
    /// When it does not run.
    pub fn rebase(&self, world: &mut World, to: Option<(&str, &str)>, only_name: bool) -> Result<Outcome> {
        let name = world.top().name.clone();
        let mut arguments = vec!["rebase", "-q", "-f", "qcow2"];
        if only_name {
            arguments.push("-u");
        }
        match to {
            Some((backing, format)) => arguments.extend(["-b", backing, "-B", format]),
            None => arguments.extend(["-b", ""]),
        }
        arguments.push(&name);
        self.try_img(world, arguments)
    }

    /// Changes options of the top.
    ///
    /// # Errors
    /// When it does not run.
    pub fn amend(&self, world: &mut World, options: &str) -> Result<Outcome> {
        let name = world.top().name.clone();
        self.try_img(world, ["amend", "-q", "-f", "qcow2", "-o", options, &name])
    }
}

impl Hand for Program {
    fn name(&self) -> &'static str {
        match self.kind {
            Kind::Qemu => "qemu",
            Kind::Zbdkit => "cli",
        }
    }

    fn program(&self) -> Option<&Program> {
        Some(self)
    }

    fn create(&mut self, world: &mut World, image: &Image, backing: bool) -> Result<Outcome> {
        let size = image.content.len().to_string();
        let Some(layout) = &image.layout else {
            return self.try_img(world, ["create", "-q", "-f", "raw", &image.name, &size]);
        };
        let options = layout.options(image.data_file.as_deref());
        let mut arguments = vec!["create", "-q", "-f", "qcow2", "-o", &options];
        let below;
        if backing {
            below = world.top().clone();
            arguments.extend(["-b", &below.name, "-F", below.format()]);
        }
        arguments.extend([image.name.as_str(), &size]);
        self.try_img(world, arguments)
    }

    fn batch(&mut self, world: &mut World, waves: &[Vec<Op>]) -> Result<Vec<Outcome>> {
        let ops: Vec<Op> = waves.iter().flatten().cloned().collect();
        if self.kind == Kind::Zbdkit {
            let mut arguments = vec!["io".to_owned()];
            arguments.extend(self.arguments(&ops));
            arguments.push(world.top().name.clone());
            let said = self.run(world, "zbdkit", &arguments)?;
            return self.outcomes(&said, &ops);
        }
        let mut all = Vec::new();
        for ops in ops.chunk_by(|before, after| is_compressed(before) || !is_compressed(after)) {
            let mut arguments = self.arguments(ops);
            arguments.push(world.top().name.clone());
            let said = self.run(world, "qemu-io", &arguments)?;
            all.extend(self.outcomes(&said, ops)?);
        }
        Ok(all)
    }

    fn snapshot(&mut self, world: &mut World, verb: SnapshotVerb, name: &str) -> Result<Outcome> {
        let verb = match verb {
            SnapshotVerb::Create => "-c",
            SnapshotVerb::Apply => "-a",
            SnapshotVerb::Delete => "-d",
        };
        let top = world.top().name.clone();
        self.try_img(world, ["snapshot", "-q", verb, name, &top])
    }

    fn resize(&mut self, world: &mut World, size: u64, preallocation: Preallocation) -> Result<Outcome> {
        let (top, old) = (world.top().name.clone(), world.top().content.len());
        let option = format!("--preallocation={}", preallocation.name());
        let mut arguments = vec!["resize", "-q", "-f", "qcow2"];
        if size < old {
            arguments.push("--shrink");
        } else if preallocation != Preallocation::Off {
            arguments.push(&option);
        }
        let size = size.to_string();
        arguments.extend([top.as_str(), &size]);
        self.try_img(world, arguments)
    }

    fn verify(&mut self, world: &mut World, index: usize) -> Result<()> {
        let image = world.images[index].clone();
        if image.layout.is_some() {
            let (check, said) = self.check(world, &image.name, None)?;
            world.trace.pop();
            ensure!(check.is_clean(), "qemu-img check {}: {said}", image.name);
        }
        let bytes = self.read(world, &image.name, image.format(), None)?;
        world.same(index, None, &bytes).context("as QEMU reads it")?;
        for (number, snapshot) in image.snapshots.iter().enumerate() {
            // QEMU reads a snapshot with the size of the active contents.
            let bytes = if snapshot.content.len() == image.content.len() {
                self.read(world, &image.name, "qcow2", Some(&snapshot.name))?
            } else {
                match self.read_applied(world, &image, &snapshot.name)? {
                    Some(bytes) => bytes,
                    None => continue,
                }
            };
            world
                .same(index, Some(number), &bytes)
                .context("as QEMU reads it")?;
        }
        self.compare(world, index)
    }
}

/// QEMU 11.1.3 keeps a place for its next compressed data in a cluster that an ordinary write may free and use for
/// something else, up to and with an L2 table (`write -c 8M 64k`, `write 8M 512`, `write -c 0 64k` on a new image over a
/// backing image): compressed writes after others go to a new process.
fn is_compressed(op: &Op) -> bool {
    matches!(op, Op::WriteCompressed { .. })
}

impl Program {
    /// Neither could compare what it reads with more than a single byte; and zbdkit compresses whole images only.
    fn leaves_out(&self, op: &Op) -> bool {
        matches!(op, Op::Read { .. }) || self.kind == Kind::Zbdkit && is_compressed(op)
    }

    /// The commands of `qemu-io` for these requests.
    fn arguments(&self, ops: &[Op]) -> Vec<String> {
        let mut arguments: Vec<String> = ["-f", "qcow2"].map(str::to_owned).to_vec();
        if self.kind == Kind::Qemu {
            arguments.extend(["-d", "unmap"].map(str::to_owned));
        }
        for op in ops.iter().filter(|op| !self.leaves_out(op)) {
            let mut command = match op {
                Op::Write { .. } => "write".to_owned(),
                Op::WriteCompressed { .. } => "write -c".to_owned(),
                Op::WriteZeroes { unmap: true, .. } => "write -z -u".to_owned(),
                Op::WriteZeroes { .. } => "write -z".to_owned(),
                Op::Discard { .. } => "discard".to_owned(),
                Op::Flush => "flush".to_owned(),
                Op::Read { .. } => continue,
            };
            if let Op::Write { pattern, .. } | Op::WriteCompressed { pattern, .. } = op {
                match pattern {
                    Pattern::Byte(byte) => write!(command, " -P {byte}"),
                    Pattern::Source(source) => write!(command, " -s {}", Sources::name(*source)),
                }
                .expect("a string takes everything");
            }
            if let Some(range) = op.range() {
                write!(command, " {} {}", range.start, range.end - range.start)
                    .expect("a string takes everything");
            }
            arguments.extend(["-c".to_owned(), command]);
        }
        arguments
    }

    /// What `qemu-io` said about each request.
    fn outcomes(&self, said: &Said, ops: &[Op]) -> Result<Vec<Outcome>> {
        let mut lines = said.text.lines().filter_map(|line| {
            if line.starts_with("wrote ") || line.starts_with("discard ") && !line.contains("failed") {
                Some(Outcome::Done)
            } else if line.contains(" failed: ") {
                Some(Outcome::Refused(line.to_owned()))
            } else {
                None
            }
        });
        let outcomes: Option<Vec<Outcome>> = ops
            .iter()
            .map(|op| match op {
                Op::Read { .. } | Op::Flush => Some(Outcome::Done),
                op if self.leaves_out(op) => Some(Outcome::Refused("it has no command for this".into())),
                _ => lines.next(),
            })
            .collect();
        match outcomes {
            Some(outcomes) if lines.next().is_none() => Ok(outcomes),
            _ => bail!("{} says: {}", said.command, said.text),
        }
    }
}
