//! One sequence: images are made and changed by changing hands, and hold what they must.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};

use crate::kill::rng::Rng;

use super::content::{Content, Pattern, SECTOR};
use super::damage::Damage;
use super::hand::{Hand, SnapshotVerb};
use super::layout::{Layout, Preallocation};
use super::program::Program;
use super::requests;
use super::world::{Image, Op, Outcome, Snapshot, World};

/// A chain has at most so many images.
const DEEPEST: usize = 3;
/// An image has at most so many snapshots.
const MOST_SNAPSHOTS: usize = 4;

/// The numbers of the steps that make the first images.
const FIRST_STEPS: u64 = 1000;

/// A step of a sequence, or one request of it, that is left out.
pub type Skipped = (u64, Option<usize>);

/// What a sequence does; the same plan makes the same sequence.
#[derive(Debug, Clone, Default)]
pub struct Plan {
    /// Decides everything.
    pub seed: u64,
    /// But for what is left out.
    pub skip: BTreeSet<Skipped>,
    /// Damage that is done in the end, to be found.
    pub damage: Option<Damage>,
}

/// How often what was done, and refused, by whom.
pub type Counts = BTreeMap<(&'static str, &'static str), (u64, u64)>;

/// A sequence on its way.
pub struct Sequence<'a> {
    plan: &'a Plan,
    /// The images.
    pub world: World,
    hands: &'a mut [Box<dyn Hand>],
    qemu: Program,
    /// What was done.
    pub counts: Counts,
    /// What there was to leave out.
    pub parts: Vec<Skipped>,
}

impl<'a> Sequence<'a> {
    /// A sequence in an empty directory.
    ///
    /// # Errors
    /// Of the file system.
    pub fn new(
        plan: &'a Plan,
        directory: &Path,
        hands: &'a mut [Box<dyn Hand>],
        qemu: Program,
    ) -> Result<Self> {
        Ok(Sequence {
            plan,
            world: World::new(directory)?,
            hands,
            qemu,
            counts: Counts::new(),
            parts: Vec::new(),
        })
    }

    /// Runs it.
    ///
    /// # Errors
    /// What was found.
    pub fn run(&mut self) -> Result<()> {
        let mut rng = Rng::new(self.plan.seed);
        let depth = [1, 1, 1, 2, 2, 3][rng.below(6) as usize];
        let steps = 3 + rng.skewed(1, 16);
        for level in 0..depth {
            let mut rng = Rng::new(self.plan.seed).fork(FIRST_STEPS + level);
            self.new_image(FIRST_STEPS + level, &mut rng, depth == level + 1)
                .with_context(|| format!("making image {level}"))?;
        }
        for step in 0..steps {
            if self.part(step, None) {
                let mut rng = Rng::new(self.plan.seed).fork(step);
                self.step(step, &mut rng)
                    .with_context(|| format!("step {step}"))?;
            }
        }
        if let Some(damage) = self.plan.damage {
            damage.inflict(&mut self.world)?;
        }
        self.repaired()?;
        for index in 0..self.world.images.len() {
            self.verify(index).context("in the end")?;
        }
        Ok(())
    }

    /// Whether this part is not left out.
    fn part(&mut self, step: u64, op: Option<usize>) -> bool {
        let part = !self.plan.skip.contains(&(step, op));
        if part {
            self.parts.push((step, op));
        }
        part
    }

    fn step(&mut self, step: u64, rng: &mut Rng) -> Result<()> {
        let who = rng.below(self.hands.len() as u64) as usize;
        let has_data_file = self.world.layout().data_file;
        let snapshots = self.world.top().snapshots.len();
        match rng.below(24) {
            0..=9 => self.batch(step, rng, who),
            10..=11 if !has_data_file && snapshots < MOST_SNAPSHOTS => {
                self.snapshot(rng, who, SnapshotVerb::Create)
            }
            12 if snapshots > 0 => self.snapshot(rng, who, SnapshotVerb::Apply),
            13 if snapshots > 0 => self.snapshot(rng, who, SnapshotVerb::Delete),
            14..=15 => self.resize(rng, who),
            16 if self.world.images.len() < DEEPEST => self.new_image(step, rng, true),
            17 if self.world.has_backing() && snapshots == 0 => self.commit(rng, who),
            18 if self.world.has_backing() && snapshots == 0 => self.rebase(rng, who),
            19 if self.world.layout().lazy_refcounts => self.kill(step, rng),
            20 => self.amend(rng),
            21..=22 => {
                self.repaired()?;
                self.verify(self.world.images.len() - 1)
            }
            _ => self.batch(step, rng, who),
        }
    }

    /// Makes an image, the first one or an overlay, and puts something into it.
    fn new_image(&mut self, step: u64, rng: &mut Rng, top: bool) -> Result<()> {
        self.repaired()?;
        let backing = !self.world.images.is_empty();
        if !top && !backing && rng.one_in(2) {
            return self.raw_image(rng);
        }
        let layout = Layout::random(rng, backing);
        let size = match self.world.images.last() {
            Some(below) if rng.one_in(2) => below.content.len(),
            _ => layout.random_size(rng),
        };
        let data_file = layout.data_file.then(|| self.world.name("data"));
        let mut content = Content::zeros(size);
        if let Some(below) = self.world.images.last() {
            content.take(&below.content);
        }
        let image = Image {
            name: self.world.name("qcow2"),
            layout: Some(layout),
            data_file,
            content,
            snapshots: Vec::new(),
            dirty: false,
        };
        let who = rng.below(self.hands.len() as u64) as usize;
        match self.hands[who].create(&mut self.world, &image, backing)? {
            Outcome::Done | Outcome::Read(_) => {}
            Outcome::Refused(why) => bail!("{}: create: {why}", self.hands[who].name()),
        }
        self.count(who, "create", true);
        self.world.images.push(image);
        let who = rng.below(self.hands.len() as u64) as usize;
        if rng.one_in(4) {
            return Ok(());
        }
        self.batch(step, rng, who)
    }

    fn raw_image(&mut self, rng: &mut Rng) -> Result<()> {
        let size = SECTOR * rng.skewed(1, 16 << 20 >> 9);
        let mut content = Content::zeros(size);
        for _ in 0..rng.below(6) {
            let start = SECTOR * rng.below(size / SECTOR);
            let end = (start + SECTOR * rng.skewed(1, 4096)).min(size);
            content.write(start..end, Pattern::random(rng));
        }
        let name = self.world.name("raw");
        std::fs::write(self.world.path(&name), content.render(&self.world.sources))?;
        self.world.trace.push(format!("# {name}: {size} bytes, raw"));
        self.world.images.push(Image {
            name,
            layout: None,
            data_file: None,
            content,
            snapshots: Vec::new(),
            dirty: false,
        });
        Ok(())
    }

    fn batch(&mut self, step: u64, rng: &mut Rng, who: usize) -> Result<()> {
        let waves = self.requests(step, rng);
        let outcomes = self.hands[who].batch(&mut self.world, &waves)?;
        self.world.top_mut().dirty = false;
        for (op, outcome) in waves.iter().flatten().zip(outcomes) {
            self.account(who, op, outcome)?;
        }
        Ok(())
    }

    fn requests(&mut self, step: u64, rng: &mut Rng) -> Vec<Vec<Op>> {
        let mut waves = requests::batch(rng, self.world.layout(), self.world.top().content.len());
        let mut number = 0;
        for wave in &mut waves {
            wave.retain(|_| {
                number += 1;
                self.part(step, Some(number))
            });
        }
        waves
    }

    fn account(&mut self, who: usize, op: &Op, outcome: Outcome) -> Result<()> {
        let name = match op {
            Op::Write { .. } => "write",
            Op::WriteCompressed { .. } => "write compressed",
            Op::WriteZeroes { .. } => "write zeroes",
            Op::Discard { .. } => "discard",
            Op::Read { .. } => "read",
            Op::Flush => "flush",
        };
        self.count(who, name, !matches!(outcome, Outcome::Refused(_)));
        match (op, outcome) {
            (_, Outcome::Done) => self.world.apply(op),
            (op, Outcome::Read(bytes)) => {
                let offset = op.range().map_or(0, |range| range.start);
                let World { images, sources, .. } = &mut self.world;
                let content = &mut images.last_mut().expect("there is a top").content;
                content
                    .compare(sources, &bytes, offset)
                    .with_context(|| format!("{}: {op:?}", self.hands[who].name()))?;
            }
            // Compression does not overwrite.
            (Op::WriteCompressed { .. }, Outcome::Refused(_)) => {}
            (_, Outcome::Refused(why)) => bail!("{}: {op:?}: {why}", self.hands[who].name()),
        }
        Ok(())
    }

    fn snapshot(&mut self, rng: &mut Rng, who: usize, verb: SnapshotVerb) -> Result<()> {
        self.repaired()?;
        let taken = self.world.top().snapshots.len() as u64;
        let (index, name) = if verb == SnapshotVerb::Create {
            (0, self.world.name("snapshot"))
        } else {
            let index = rng.below(taken) as usize;
            (index, self.world.top().snapshots[index].name.clone())
        };
        let outcome = self.hands[who].snapshot(&mut self.world, verb, &name)?;
        let what = ["snapshot", "apply", "delete"][verb as usize];
        self.count(who, what, outcome == Outcome::Done);
        if let Outcome::Refused(why) = outcome {
            // A cluster of compressed data has a reference for each piece in it.
            let full = self.world.layout().refcount_bits <= 8;
            ensure!(
                full && verb != SnapshotVerb::Delete,
                "{}: {} {name}: {why}",
                self.hands[who].name(),
                verb.name()
            );
            return self.refused(who);
        }
        let top = self.world.top_mut();
        match verb {
            SnapshotVerb::Create => {
                let content = top.content.clone();
                top.snapshots.push(Snapshot { name, content });
            }
            SnapshotVerb::Apply => top.content = top.snapshots[index].content.clone(),
            SnapshotVerb::Delete => drop(top.snapshots.remove(index)),
        }
        Ok(())
    }

    /// QEMU leaves leaks where it gives up half-way; nobody else may.
    fn refused(&mut self, who: usize) -> Result<()> {
        if self.hands[who].name() != self.qemu.name() {
            return Ok(());
        }
        let name = self.world.top().name.clone();
        let (check, said) = self.qemu.check(&mut self.world, &name, Some("leaks"))?;
        ensure!(
            check.corruptions == 0 && check.check_errors == 0,
            "after QEMU gave up: {said}"
        );
        Ok(())
    }

    fn resize(&mut self, rng: &mut Rng, who: usize) -> Result<()> {
        self.repaired()?;
        let mut preallocation = Preallocation::random(rng);
        let size = self.world.layout().random_size(rng);
        let old = self.world.top().content.len();
        let by_qemu = self.hands[who].name() == self.qemu.name();
        // QEMU 11.1.3 preallocates data over its own freed tables, or finds the file too long for that.
        let spoils = by_qemu && !matches!(preallocation, Preallocation::Off | Preallocation::Metadata);
        if self.world.has_backing() || size <= old || spoils {
            preallocation = Preallocation::Off;
        }
        let outcome = self.hands[who].resize(&mut self.world, size, preallocation)?;
        self.count(
            who,
            if size < old { "shrink" } else { "grow" },
            outcome == Outcome::Done,
        );
        if let Outcome::Refused(why) = outcome {
            // It has no sizes of snapshots, and no zero clusters to hide what lies below.
            let top = self.world.top();
            let cannot = !top.snapshots.is_empty() || self.world.has_backing();
            ensure!(
                self.world.layout().version == 2 && cannot,
                "{}: resize to {size}: {why}",
                self.hands[who].name()
            );
            return Ok(());
        }
        self.world.top_mut().content.resize(size);
        let cluster = self.world.layout().cluster_size;
        let tail = old..old.next_multiple_of(cluster).min(size);
        if by_qemu && !tail.is_empty() {
            // What QEMU's shrinking left in the last cluster shows again after its growing.
            let zeroes = Op::WriteZeroes {
                range: tail,
                unmap: false,
            };
            self.hands[who].batch(&mut self.world, &[vec![zeroes]])?;
        }
        Ok(())
    }

    fn commit(&mut self, rng: &mut Rng, who: usize) -> Result<()> {
        self.repaired()?;
        let keep = rng.one_in(2);
        let program = self.hands[who].program().unwrap_or(&self.qemu).clone();
        let outcome = program.commit(&mut self.world, keep)?;
        self.count_of(program.name(), "commit", outcome == Outcome::Done);
        if let Outcome::Refused(why) = outcome {
            // What lies below would have to grow, and version 2 cannot hide what lies further below.
            let below = &self.world.images[self.world.images.len() - 2];
            let old_format = below.layout.as_ref().is_some_and(|layout| layout.version == 2);
            let grows = below.content.len() < self.world.top().content.len();
            ensure!(old_format && grows, "commit: {why}");
            return Ok(());
        }
        self.world.committed();
        if keep || rng.one_in(2) {
            return Ok(());
        }
        // What lies below may be the top now.
        let below = &self.world.images[self.world.images.len() - 2];
        if below.layout.is_some() {
            self.world.trace.push(format!("# {} goes", self.world.top().name));
            self.world.images.pop();
        }
        Ok(())
    }

    fn rebase(&mut self, rng: &mut Rng, who: usize) -> Result<()> {
        self.repaired()?;
        let below = self.world.images.len() - 2;
        let program = self.hands[who].program().unwrap_or(&self.qemu).clone();
        let outcome = match rng.below(3) {
            0 => {
                let outcome = program.rebase(&mut self.world, None, false)?;
                if outcome == Outcome::Done {
                    self.world.images.drain(..=below);
                }
                outcome
            }
            1 if below > 0 => {
                let lowest = &self.world.images[below - 1];
                let (name, format) = (lowest.name.clone(), lowest.format());
                let outcome = program.rebase(&mut self.world, Some((&name, format)), false)?;
                if outcome == Outcome::Done {
                    self.world.images.remove(below);
                }
                outcome
            }
            _ => {
                // The same image under another name.
                let old = self.world.images[below].clone();
                let name = self.world.name(old.format());
                std::fs::rename(self.world.path(&old.name), self.world.path(&name))?;
                self.world.trace.push(format!("mv {} {name}", old.name));
                let outcome = program.rebase(&mut self.world, Some((&name, old.format())), true)?;
                self.world.images[below].name = name;
                outcome
            }
        };
        self.count_of(program.name(), "rebase", outcome == Outcome::Done);
        if let Outcome::Refused(why) = outcome {
            bail!("rebase: {why}");
        }
        Ok(())
    }

    /// A process is killed with refcounts that are late.
    fn kill(&mut self, step: u64, rng: &mut Rng) -> Result<()> {
        let ops: Vec<Op> = self
            .requests(step, rng)
            .into_iter()
            .flatten()
            .filter(|op| !matches!(op, Op::WriteCompressed { .. } | Op::Read { .. }))
            .collect();
        if ops.is_empty() {
            return Ok(());
        }
        self.repaired()?;
        self.qemu.killed(&mut self.world, &ops)?;
        self.count_of(self.qemu.name(), "killed", true);
        for op in &ops {
            self.world.apply(op);
        }
        self.world.top_mut().dirty = true;
        Ok(())
    }

    fn amend(&mut self, rng: &mut Rng) -> Result<()> {
        self.repaired()?;
        let mut layout = self.world.layout().clone();
        if layout.version == 2 {
            layout.version = 3;
        } else if rng.one_in(3) {
            layout.lazy_refcounts = !layout.lazy_refcounts;
        } else if layout.most_snapshots() > 254 && (4096..=65536).contains(&layout.cluster_size) {
            // With other clusters, or to 64 bits, QEMU takes minutes for this.
            layout.refcount_bits = 1 << (4 + rng.below(2));
        } else {
            return Ok(());
        }
        let options = if self.world.layout().version == 2 {
            "compat=1.1".to_owned()
        } else {
            format!(
                "refcount_bits={},lazy_refcounts={}",
                layout.refcount_bits,
                if layout.lazy_refcounts { "on" } else { "off" }
            )
        };
        let outcome = self.qemu.amend(&mut self.world, &options)?;
        self.count_of(self.qemu.name(), "amend", outcome == Outcome::Done);
        if let Outcome::Refused(why) = outcome {
            bail!("amend {options}: {why}");
        }
        self.world.top_mut().layout = Some(layout);
        Ok(())
    }

    /// Refcounts that are late are put right by an opening; anybody must be able to.
    fn repaired(&mut self) -> Result<()> {
        let Some(top) = self.world.images.last_mut() else {
            return Ok(());
        };
        if std::mem::take(&mut top.dirty) {
            let who = self.world.trace.len() % self.hands.len();
            self.hands[who].batch(&mut self.world, &[vec![Op::Flush]])?;
            self.count(who, "repair", true);
        }
        Ok(())
    }

    fn verify(&mut self, index: usize) -> Result<()> {
        self.world
            .trace
            .push(format!("# {} is compared", self.world.images[index].name));
        for who in 0..self.hands.len() {
            let name = self.hands[who].name();
            self.hands[who]
                .verify(&mut self.world, index)
                .with_context(|| format!("{name} verifies"))?;
            self.count(who, "verify", true);
        }
        let image = &self.world.images[index];
        let raw = image.layout.as_ref().is_some_and(|layout| layout.data_file_raw);
        if let (true, Some(data)) = (raw, &image.data_file) {
            // It may go on to the end of a cluster.
            let bytes = std::fs::read(self.world.path(data))?;
            let end = bytes.len().min(image.content.len() as usize);
            self.world
                .same(index, None, &bytes[..end])
                .context("the data file, which is to be a raw image")?;
        }
        Ok(())
    }

    fn count(&mut self, who: usize, what: &'static str, done: bool) {
        self.count_of(self.hands[who].name(), what, done);
    }

    fn count_of(&mut self, who: &'static str, what: &'static str, done: bool) {
        let (successes, refusals) = self.counts.entry((who, what)).or_default();
        *if done { successes } else { refusals } += 1;
    }
}
