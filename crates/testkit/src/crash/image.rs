//! The images that cases run on: how they are made, and what is asked of their files besides the contract.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use zbdkit_block::{CreateOptions, Host, Qcow2Layout, ZnsOptions};
use zbdkit_io::Runtime;

use super::choose::mix;
use super::disk::Disk;
use super::format;
use super::host::{Behaviour, Machine};
use super::judge::View;
use super::qcow2;
use super::run::{Plan, drive, record};
use super::steps::{self, Step};
use super::workload::Mix;

/// Where images lie on the simulated machines.
const DIR: &str = "/image";

/// An image, before it is made. Paths in the options do not count.
#[derive(Clone, Debug)]
pub enum Image {
    /// The data alone, with the zones in a table beside it.
    Raw(CreateOptions),
    /// A qcow2 image with the zones inside.
    Qcow2(Box<Qcow2Image>),
}

/// A qcow2 image, before it is made.
#[derive(Clone, Debug)]
pub struct Qcow2Image {
    /// Its zones. Over a base those are inherited, so this must be the same.
    pub zones: CreateOptions,
    /// Its format; the size does not count.
    pub layout: Qcow2Layout,
    /// The image below it, which was written to before and must never change again.
    pub base: Option<Image>,
    /// It was written to before, and has two snapshots of that time.
    pub snapshots: bool,
}

impl From<CreateOptions> for Image {
    fn from(options: CreateOptions) -> Image {
        Image::Raw(options)
    }
}

impl Image {
    /// A qcow2 image with these zones.
    pub fn qcow2(zones: CreateOptions, layout: Qcow2Layout) -> Image {
        Image::Qcow2(Box::new(Qcow2Image {
            zones,
            layout,
            base: None,
            snapshots: false,
        }))
    }

    /// The same, over another image that was written to.
    pub fn over(self, base: Image) -> Image {
        self.with(|image| image.base = Some(base))
    }

    /// The same, written to, with snapshots of that time.
    pub fn with_snapshots(self) -> Image {
        self.with(|image| image.snapshots = true)
    }

    fn with(mut self, change: impl FnOnce(&mut Qcow2Image)) -> Image {
        match &mut self {
            Image::Qcow2(image) => change(image),
            Image::Raw(_) => panic!("a raw image has neither a base nor snapshots"),
        }
        self
    }

    /// What clients asked for before the image's own histories.
    fn earlier_mix(&self) -> Mix {
        let zones = match self {
            Image::Raw(zones) => zones,
            Image::Qcow2(image) => &image.zones,
        };
        // Conditions that only the operator takes back would stop the clients that come after.
        match zones.zns == ZnsOptions::default() {
            true => Mix { set: 0, ..Mix::ALL },
            false => Mix { set: 0, ..Mix::ZNS },
        }
    }

    fn is_qcow2(&self) -> bool {
        matches!(self, Image::Qcow2(_))
    }

    /// The path of an image called so.
    fn path(&self, name: &str) -> PathBuf {
        let extension = if self.is_qcow2() { "qcow2" } else { "raw" };
        Path::new(DIR).join(name).with_extension(extension)
    }

    /// Makes it, with what lies below and before it. `seed` decides what was written then.
    pub fn prepare(&self, runtime: &Runtime, seed: u64) -> Result<Prepared, String> {
        let mut disk = Disk::default();
        let mut first_id = 1;
        let mut fixed = Vec::new();
        if let Image::Qcow2(image) = self
            && let Some(base) = &image.base
        {
            let path = base.path("base");
            disk = on_machine(runtime, &disk, async |host| base.create(&host, "base").await)?;
            let mix_before = base.earlier_mix();
            (disk, first_id) = used(runtime, &disk, &path, mix_before, mix(seed, 1), first_id)?;
            fixed = disk.names().map(Path::to_owned).collect();
        }
        disk = on_machine(runtime, &disk, async |host| self.create(&host, "disk").await)?;
        let mut prepared = Prepared {
            path: self.path("disk"),
            qcow2: self.is_qcow2(),
            fixed,
            snapshots: Vec::new(),
            earlier_mix: self.earlier_mix(),
            first_id,
            disk,
        };
        if matches!(self, Image::Qcow2(image) if image.snapshots) {
            for n in 0..2 {
                prepared.write(runtime, mix(seed, 2 + n))?;
                prepared.snapshot(runtime, &format!("snapshot{n}"))?;
            }
            prepared.write(runtime, mix(seed, 4))?;
        }
        Ok(prepared)
    }

    /// Makes it, where `name` and what it needs besides may lie in any state until this has answered.
    pub async fn create(&self, host: &Arc<dyn Host>, name: &str) -> Result<PathBuf, String> {
        let path = self.path(name);
        match self {
            Image::Raw(zones) => format::create_raw(host, &path, zones).await?,
            Image::Qcow2(image) => {
                let base = image.base.as_ref().map(|base| base.path("base"));
                format::create_qcow2(host, &path, &image.zones, &image.layout, base.as_deref()).await?;
            }
        }
        Ok(path)
    }
}

/// An image that was made, ready for histories.
#[derive(Clone, Debug)]
pub struct Prepared {
    /// The files.
    pub disk: Disk,
    /// Which of them a user names.
    pub path: PathBuf,
    /// Its format.
    pub qcow2: bool,
    /// Files that must never change.
    pub fixed: Vec<PathBuf>,
    /// The snapshots, and what the image must show when they are applied.
    pub snapshots: Vec<(String, View)>,
    /// What clients asked for before the snapshots were made.
    earlier_mix: Mix,
    /// The stamp of the first write.
    pub first_id: u32,
}

impl Prepared {
    fn write(&mut self, runtime: &Runtime, seed: u64) -> Result<(), String> {
        let (path, mix) = (&self.path, self.earlier_mix);
        (self.disk, self.first_id) = used(runtime, &self.disk, path, mix, seed, self.first_id)?;
        Ok(())
    }

    fn snapshot(&mut self, runtime: &Runtime, name: &str) -> Result<(), String> {
        let step = Step::Create(name.to_owned());
        let done = steps::record(
            runtime,
            &self.disk,
            &self.path,
            Behaviour::default(),
            1,
            &step,
            &mut |_| Ok(()),
        )?;
        self.disk = done.end;
        self.snapshots.push((name.to_owned(), done.before));
        Ok(())
    }

    /// What is asked of the files that a crash left, before anybody opens them: in qcow2 nothing is corrupt.
    pub fn inspect(&self, runtime: &Runtime, disk: &Disk) -> Result<(), String> {
        if let Some(path) = self.fixed.iter().find(|path| !disk.same(path, &self.disk)) {
            return Err(format!("{} was changed", path.display()));
        }
        if !self.qcow2 {
            return Ok(());
        }
        let (found, _) = self.check(runtime, disk, false)?;
        found.sound()
    }

    /// Checks the image, repairing all that can be; also what the repair left of the files.
    fn check(&self, runtime: &Runtime, disk: &Disk, repair: bool) -> Result<(format::Found, Disk), String> {
        let machine = Machine::new(disk.clone(), Behaviour::default(), 1);
        let host = machine.host();
        let check = format::check(&host, &self.path, repair);
        let found = drive(runtime, &machine, check)?;
        Ok((found, machine.disk()))
    }

    /// Repairs what a crash left. After that nothing is wrong, and no cluster is lost.
    pub fn repair(&self, runtime: &Runtime, disk: &Disk) -> Result<Disk, String> {
        if !self.qcow2 {
            return Ok(disk.clone());
        }
        let (_, repaired) = self.check(runtime, disk, true)?;
        self.clean(runtime, &repaired)
            .map_err(|why| format!("after a repair: {why}"))?;
        Ok(repaired)
    }

    /// Nothing is wrong, and no cluster is lost.
    pub fn clean(&self, runtime: &Runtime, disk: &Disk) -> Result<(), String> {
        if !self.qcow2 {
            return Ok(());
        }
        let (found, _) = self.check(runtime, disk, false)?;
        found.sound()?;
        match found.leaks {
            0 => Ok(()),
            leaks => Err(format!("{leaks} clusters are lost: {:?}", found.messages)),
        }
    }

    /// The drafts' table in the crashed file is not ahead of what was recovered.
    pub fn drafts(&self, disk: &Disk, view: &View, stale: impl Fn(usize) -> bool) -> Result<(), String> {
        if !self.qcow2 {
            return Ok(());
        }
        qcow2::judge(&self.words(disk)?, &view.zones, stale)
    }

    fn words(&self, disk: &Disk) -> Result<qcow2::ZoneWords, String> {
        let file = disk.find(&self.path).ok_or("the image is gone")?;
        qcow2::zone_words(disk.contents(file))
    }

    /// Each of these snapshots brings back what was there when it was made.
    pub fn snapshots_hold(
        &self,
        runtime: &Runtime,
        disk: &Disk,
        snapshots: &[(String, View)],
    ) -> Result<(), String> {
        for (name, then) in snapshots {
            let step = Step::Apply(name.clone());
            let applied = steps::record(
                runtime,
                disk,
                &self.path,
                Behaviour::default(),
                1,
                &step,
                &mut |_| Ok(()),
            )
            .map_err(|why| format!("snapshot {name} cannot be applied: {why}"))?;
            steps::same(then, &applied.after).map_err(|why| format!("snapshot {name}: {why}"))?;
        }
        Ok(())
    }
}

/// Carries something out on a machine; what it leaves.
fn on_machine<T>(
    runtime: &Runtime,
    disk: &Disk,
    action: impl AsyncFnOnce(Arc<dyn Host>) -> Result<T, String>,
) -> Result<Disk, String> {
    let machine = Machine::new(disk.clone(), Behaviour::default(), 1);
    drive(runtime, &machine, action(machine.host()))?;
    Ok(machine.disk())
}

/// The image after clients used it for a while and it was closed; and the stamp of the next write.
fn used(
    runtime: &Runtime,
    disk: &Disk,
    path: &Path,
    mix: Mix,
    seed: u64,
    first_id: u32,
) -> Result<(Disk, u32), String> {
    let plan = Plan {
        image: path.to_owned(),
        ..Plan::new(mix, 3, 25)
    };
    let history = record(runtime, disk, &plan, seed, first_id, &mut |_, _| Ok(()))?;
    Ok((history.end, history.oracle.next_id()))
}
