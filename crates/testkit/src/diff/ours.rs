//! Our driver as one of the hands: in this process, with many requests in flight.

use std::future::{Future, poll_fn};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use zbdkit_io::{File, FileKind, IoBuf, LocalBoxFuture, Runtime, RuntimeOptions};
use zbdkit_qcow2 as qcow2;
use zbdkit_qcow2::{Backing, Error, Header, Mapping, Qcow2, Repair};

use crate::kill::rng::Rng;

use super::content::{SECTOR, Sources};
use super::hand::{Hand, SnapshotVerb};
use super::layout::{Layout, Preallocation};
use super::program::{Check, Program};
use super::shuffled::shuffled;
use super::world::{Image, Op, Outcome, World};

/// Our driver.
pub struct Ours {
    runtime: Runtime,
    rng: Rng,
    /// Whose counts are compared with ours.
    qemu: Program,
}

/// A lower image of a chain.
enum Layer {
    Raw(File, u64),
    Qcow2(Box<Qcow2>),
}

impl Backing for Layer {
    fn len(&self) -> u64 {
        match self {
            Layer::Raw(_, len) => *len,
            Layer::Qcow2(image) => image.size(),
        }
    }

    fn read<'a>(&'a self, buf: IoBuf, offset: u64) -> LocalBoxFuture<'a, Result<(), i32>> {
        match self {
            Layer::Raw(file, _) => Box::pin(async move {
                let read = file.read(buf, offset).await;
                read.map_err(|error| Error::io("reading below", &error).errno())
            }),
            Layer::Qcow2(image) => {
                Box::pin(async move { image.read(buf, offset).await.map_err(|error| error.errno()) })
            }
        }
    }
}

impl Ours {
    /// With a runtime of its own; `seed` decides in which order things happen.
    ///
    /// # Errors
    /// When there is no runtime.
    pub fn new(seed: u64, qemu: Program) -> Result<Ours> {
        Ok(Ours {
            runtime: Runtime::new(RuntimeOptions::default())?,
            rng: Rng::new(seed).fork(0x0412),
            qemu,
        })
    }

    fn file(&mut self, path: &Path, write: bool) -> Result<File> {
        let file = std::fs::OpenOptions::new().read(true).write(write).open(path);
        let file = file.with_context(|| path.display().to_string())?;
        let file = File::from_fd(OwnedFd::from(file), FileKind::default());
        let rng = self.rng.fork(self.rng.clone().number());
        self.rng.number();
        Ok(shuffled(file, rng))
    }

    /// Opens the qcow2 image `name`, which is `world.images[index]` or a copy of it.
    fn open(&mut self, world: &World, index: usize, name: &str, write: bool) -> Result<Qcow2> {
        let backing: Option<Arc<dyn Backing>> = match index.checked_sub(1) {
            Some(below) => Some(Arc::new(self.layer(world, below)?)),
            None => None,
        };
        let image = &world.images[index];
        let file = self.file(&world.path(name), write)?;
        let header = self.runtime.block_on(Header::read(&file));
        let header = header.with_context(|| format!("reading the header of {name}"))?;
        let below = index
            .checked_sub(1)
            .map(|below| world.images[below].name.as_str());
        ensure!(
            header.backing_file.as_deref() == below,
            "{name} names {:?} as its backing image, should be {below:?}",
            header.backing_file
        );
        ensure!(
            header.data_file_name() == image.data_file.as_deref(),
            "{name} names {:?} as its data file, should be {:?}",
            header.data_file_name(),
            image.data_file
        );
        let data_file = match &image.data_file {
            Some(data) => Some(self.file(&world.path(data), write)?),
            None => None,
        };
        let options = qcow2::Options {
            read_only: !write,
            // Small caches are often too small.
            l2_cache: [0, 0, 1, 4096, 65536][self.rng.below(5) as usize],
            data_file,
            backing,
            ..qcow2::Options::default()
        };
        let opened = self.runtime.block_on(Qcow2::open(file, header, options));
        opened.with_context(|| format!("opening {name}"))
    }

    fn layer(&mut self, world: &World, index: usize) -> Result<Layer> {
        let image = &world.images[index];
        if image.layout.is_some() {
            return Ok(Layer::Qcow2(Box::new(self.open(
                world,
                index,
                &image.name,
                false,
            )?)));
        }
        let file = self.file(&world.path(&image.name), false)?;
        let len = file.len()?;
        Ok(Layer::Raw(file, len))
    }

    /// Opens the top for writing, does something with it, and closes it.
    fn with_top<T>(
        &mut self,
        world: &World,
        work: impl AsyncFnOnce(&Qcow2) -> Result<T, Error>,
    ) -> Result<Result<T, Error>> {
        let index = world.images.len() - 1;
        let image = self.open(world, index, &world.top().name, true)?;
        let done = self.runtime.block_on(work(&image));
        self.runtime.block_on(image.close()).context("closing")?;
        Ok(done)
    }

    /// One wave on several threads.
    fn on_threads(&mut self, image: &Qcow2, sources: &Sources, wave: &[Op]) -> Result<Vec<Outcome>> {
        let (first, second) = wave.split_at(wave.len() / 2);
        let turns = [self.rng.fork(1), self.rng.fork(2)];
        let [ours, theirs] = turns;
        std::thread::scope(|scope| {
            let other = scope.spawn(move || -> Result<Vec<Outcome>> {
                let runtime = Runtime::new(RuntimeOptions::default())?;
                Ok(runtime.block_on(in_flight(image, sources, second, theirs)))
            });
            let mut outcomes = self.runtime.block_on(in_flight(image, sources, first, ours));
            outcomes.extend(other.join().expect("the other thread lives")?);
            Ok(outcomes)
        })
    }

    /// Reads all of an open image, several pieces at a time.
    fn read_all(&mut self, image: &Qcow2) -> Result<Vec<u8>> {
        let size = image.size();
        let piece = (SECTOR * self.rng.skewed(1, 4096))
            .max(size / 256)
            .next_multiple_of(SECTOR);
        let buf = IoBuf::try_alloc(size as usize)?;
        let reads: Vec<Job<'_>> = (0..size.div_ceil(piece))
            .map(|number| {
                let range = number * piece..((number + 1) * piece).min(size);
                let part = buf.slice(range.start as usize..range.end as usize);
                let job: Job<'_> =
                    Box::pin(async move { image.read(part, range.start).await.map(|()| None) });
                job
            })
            .collect();
        let mut turns = self.rng.fork(3);
        for result in self.runtime.block_on(all(reads, &mut turns)) {
            result.context("reading")?;
        }
        Ok(buf.to_vec())
    }

    /// Compares an image's mapping with what it must hold, and with what QEMU says of it.
    fn check_map(&mut self, world: &mut World, index: usize, image: &Qcow2) -> Result<()> {
        let name = world.images[index].name.clone();
        let theirs = self.qemu.map(world, &name)?;
        let size = image.size();
        let mut at = 0;
        while at < size {
            let most = (SECTOR * self.rng.skewed(1, 1 << 16)).min(size - at);
            let extent = self.runtime.block_on(image.map(at, most)).context("map")?;
            ensure!(
                extent.len > 0 && extent.len <= most,
                "map at {at}: {} bytes of {most}",
                extent.len
            );
            for offset in (at..at + extent.len).step_by(SECTOR as usize) {
                let found = theirs
                    .iter()
                    .find(|run| run.start <= offset && offset < run.start + run.length);
                let found = found.with_context(|| format!("QEMU maps nothing at {offset}"))?;
                let same = match extent.mapping {
                    Mapping::Data { offset: place } => {
                        let there = found.offset.map(|start| start + (offset - found.start));
                        found.depth == 0 && found.data_here() && there == Some(place + (offset - at))
                    }
                    Mapping::Compressed => found.depth == 0 && found.compressed,
                    Mapping::Zero { .. } => found.depth == 0 && found.zero && found.present,
                    Mapping::Unallocated => found.depth > 0 || !found.present,
                };
                ensure!(
                    same,
                    "at {offset} we map {extent:?} (from {at} on), QEMU {found:?}"
                );
            }
            at += extent.len;
        }
        Ok(())
    }

    fn check(&mut self, world: &mut World, name: &str) -> Result<()> {
        let file = self.file(&world.path(name), false)?;
        let report = self.runtime.block_on(async {
            let header = Header::read_for_check(&file).await?;
            qcow2::check(&file, &header, None, &[], Repair::None, &mut |_, _| {}).await
        });
        let report = report.context("checking")?;
        let ours = Check {
            corruptions: report.corruptions,
            leaks: report.leaks,
            corruptions_fixed: report.corruptions_fixed,
            leaks_fixed: report.leaks_fixed,
            check_errors: report.check_errors,
            image_end_offset: report.image_end_offset,
            total_clusters: report.total_clusters,
            allocated_clusters: report.allocated_clusters,
            fragmented_clusters: report.fragmented_clusters,
            compressed_clusters: report.compressed_clusters,
        };
        let (theirs, said) = self.qemu.check(world, name, None)?;
        world.trace.pop();
        ensure!(
            ours == theirs,
            "check {name}: we find {ours:?} {:?}, QEMU finds {theirs:?} {said}",
            report.messages
        );
        ensure!(ours.is_clean(), "check {name}: {:?}", report.messages);
        Ok(())
    }
}

impl Hand for Ours {
    fn name(&self) -> &'static str {
        "zbdkit"
    }

    fn create(&mut self, world: &mut World, image: &Image, backing: bool) -> Result<Outcome> {
        let layout = image.layout.as_ref().context("raw images are made elsewhere")?;
        let below = world.images.last().filter(|_| backing);
        let layout = of_layout(
            layout,
            image,
            below.map(|below| (below.name.clone(), Some(below.format().to_owned()))),
        );
        world
            .trace
            .push(format!("# zbdkit creates {} as {layout:?}", image.name));
        for name in [Some(&image.name), image.data_file.as_ref()]
            .into_iter()
            .flatten()
        {
            std::fs::File::create(world.path(name))?;
        }
        let file = self.file(&world.path(&image.name), true)?;
        let data = match &image.data_file {
            Some(name) => Some(self.file(&world.path(name), true)?),
            None => None,
        };
        let made = self
            .runtime
            .block_on(qcow2::create(&file, data.as_ref(), &layout));
        let header = match made {
            Ok(header) => header,
            Err(error) => return Ok(Outcome::Refused(error.to_string())),
        };
        let preallocation = layout.effective_preallocation();
        if preallocation == qcow2::Preallocation::Off {
            return Ok(Outcome::Done);
        }
        let options = qcow2::Options {
            data_file: data,
            ..qcow2::Options::default()
        };
        let preallocated = self.runtime.block_on(async {
            let opened = Qcow2::open(file, header, options).await?;
            let preallocated = opened.preallocate(0..opened.size(), preallocation).await;
            opened.close().await?;
            preallocated
        });
        preallocated.context("preallocating")?;
        Ok(Outcome::Done)
    }

    fn batch(&mut self, world: &mut World, waves: &[Vec<Op>]) -> Result<Vec<Outcome>> {
        let index = world.images.len() - 1;
        let threads = self.rng.one_in(4);
        world.trace.push(format!(
            "# zbdkit opens {} and does{}",
            world.top().name,
            if threads { ", on two threads" } else { "" }
        ));
        for wave in waves {
            world.trace.push(format!("#   at once {wave:?}"));
        }
        let image = self.open(world, index, &world.top().name, true)?;
        let mut outcomes = Vec::new();
        for wave in waves {
            if threads {
                outcomes.extend(self.on_threads(&image, &world.sources, wave)?);
            } else {
                let turns = self.rng.fork(4);
                outcomes.extend(
                    self.runtime
                        .block_on(in_flight(&image, &world.sources, wave, turns)),
                );
            }
        }
        self.runtime.block_on(image.close()).context("closing")?;
        Ok(outcomes)
    }

    fn snapshot(&mut self, world: &mut World, verb: SnapshotVerb, name: &str) -> Result<Outcome> {
        world.trace.push(format!(
            "# zbdkit: snapshot {} {name} of {}",
            verb.name(),
            world.top().name
        ));
        let now = UNIX_EPOCH + Duration::from_secs(1_700_000_000);
        let done = self.with_top(world, async |image: &Qcow2| match verb {
            SnapshotVerb::Create => image.snapshot_create(name, now, |_, _| Ok(())).await.map(drop),
            SnapshotVerb::Apply => image.snapshot_apply(name, |_| Ok(())).await,
            SnapshotVerb::Delete => image.snapshot_delete(name, |_| Ok(())).await,
        });
        Ok(outcome(done?))
    }

    fn resize(&mut self, world: &mut World, size: u64, preallocation: Preallocation) -> Result<Outcome> {
        let top = world.top();
        let line = format!(
            "# zbdkit: resize {} to {size}, preallocation {}",
            top.name,
            preallocation.name()
        );
        let shrink = size < top.content.len();
        world.trace.push(line);
        let done = self.with_top(world, async |image: &Qcow2| {
            image.resize(size, shrink, of_preallocation(preallocation)).await
        });
        Ok(outcome(done?))
    }

    fn verify(&mut self, world: &mut World, index: usize) -> Result<()> {
        let model = world.images[index].clone();
        if model.layout.is_none() {
            let bytes = std::fs::read(world.path(&model.name))?;
            return world.same(index, None, &bytes);
        }
        self.check(world, &model.name)?;
        let image = self.open(world, index, &model.name, false)?;
        let bytes = self.read_all(&image)?;
        world.same(index, None, &bytes).context("as zbdkit reads it")?;
        self.check_map(world, index, &image)?;
        let snapshots = self
            .runtime
            .block_on(image.snapshots())
            .context("listing snapshots")?;
        let names: Vec<_> = snapshots.iter().map(|snapshot| &snapshot.name).collect();
        let wanted: Vec<_> = model.snapshots.iter().map(|snapshot| &snapshot.name).collect();
        ensure!(names == wanted, "snapshots {names:?}, should be {wanted:?}");
        drop(image);
        for (number, snapshot) in model.snapshots.iter().enumerate() {
            let copy = "copy.qcow2";
            std::fs::copy(world.path(&model.name), world.path(copy))?;
            let image = self.open(world, index, copy, true)?;
            let applied = self
                .runtime
                .block_on(image.snapshot_apply(&snapshot.name, |_| Ok(())));
            if let Err(Error::Refused(why)) = &applied
                && why.contains("refcount")
            {
                continue;
            }
            applied.with_context(|| format!("applying {}", snapshot.name))?;
            let bytes = self.read_all(&image)?;
            world
                .same(index, Some(number), &bytes)
                .context("as zbdkit reads it")?;
            self.runtime.block_on(image.close()).context("closing")?;
            drop(image);
            self.check(world, copy)?;
        }
        Ok(())
    }
}

/// What a request gives, the bytes that it read if it read some.
type Job<'a> = Pin<Box<dyn Future<Output = Result<Option<Vec<u8>>, Error>> + 'a>>;

/// Carries the requests of a wave out, all at once.
async fn in_flight(image: &Qcow2, sources: &Sources, wave: &[Op], mut turns: Rng) -> Vec<Outcome> {
    let jobs = wave.iter().map(|op| job(image, sources, op)).collect();
    all(jobs, &mut turns)
        .await
        .into_iter()
        .map(|result| match result {
            Ok(Some(bytes)) => Outcome::Read(bytes),
            Ok(None) => Outcome::Done,
            Err(error) => Outcome::Refused(error.to_string()),
        })
        .collect()
}

fn job<'a>(image: &'a Qcow2, sources: &Sources, op: &Op) -> Job<'a> {
    let range = op.range().cloned().unwrap_or_default();
    let (offset, len) = (range.start, range.end - range.start);
    match op {
        Op::Write { pattern, .. } => {
            let buf = IoBuf::from_vec(sources.render(*pattern, len));
            Box::pin(async move { image.write(buf, offset).await.map(|()| None) })
        }
        Op::WriteCompressed { pattern, .. } => {
            let bytes = sources.render(*pattern, len);
            Box::pin(async move { image.write_compressed(&bytes, offset).await.map(|()| None) })
        }
        Op::WriteZeroes { unmap, .. } => {
            let unmap = *unmap;
            Box::pin(async move { image.write_zeroes(offset, len, unmap).await.map(|()| None) })
        }
        Op::Discard { .. } => Box::pin(async move { image.discard(offset, len).await.map(|()| None) }),
        Op::Flush => Box::pin(async move { image.flush().await.map(|()| None) }),
        Op::Read { .. } => Box::pin(async move {
            let buf = IoBuf::alloc(len as usize);
            image.read(buf.clone(), offset).await?;
            Ok(Some(buf.to_vec()))
        }),
    }
}

/// Polls all jobs, in an order that changes, until each has ended; the results in the jobs' order.
pub(super) async fn all<F: Future + Unpin>(jobs: Vec<F>, turns: &mut Rng) -> Vec<F::Output> {
    let mut results: Vec<_> = jobs.iter().map(|_| None).collect();
    let mut left: Vec<(usize, F)> = jobs.into_iter().enumerate().collect();
    poll_fn(|cx| {
        for last in (1..left.len()).rev() {
            left.swap(last, turns.below(last as u64 + 1) as usize);
        }
        left.retain_mut(|(index, job)| match Pin::new(job).poll(cx) {
            Poll::Ready(result) => {
                results[*index] = Some(result);
                false
            }
            Poll::Pending => true,
        });
        if left.is_empty() {
            Poll::Ready(())
        } else {
            Poll::Pending
        }
    })
    .await;
    results.into_iter().flatten().collect()
}

fn outcome(done: Result<(), Error>) -> Outcome {
    match done {
        Ok(()) => Outcome::Done,
        Err(error) => Outcome::Refused(error.to_string()),
    }
}

fn of_preallocation(preallocation: Preallocation) -> qcow2::Preallocation {
    match preallocation {
        Preallocation::Off => qcow2::Preallocation::Off,
        Preallocation::Metadata => qcow2::Preallocation::Metadata,
        Preallocation::Falloc => qcow2::Preallocation::Falloc,
        Preallocation::Full => qcow2::Preallocation::Full,
    }
}

fn of_layout(layout: &Layout, image: &Image, backing: Option<(String, Option<String>)>) -> qcow2::Layout {
    qcow2::Layout {
        version: layout.version,
        size: image.content.len(),
        cluster_size: layout.cluster_size,
        refcount_bits: layout.refcount_bits,
        extended_l2: layout.extended_l2,
        compression: match layout.zstd {
            true => qcow2::Compression::Zstd,
            false => qcow2::Compression::Zlib,
        },
        lazy_refcounts: layout.lazy_refcounts,
        backing,
        data_file: image.data_file.clone(),
        data_file_raw: layout.data_file_raw,
        preallocation: of_preallocation(layout.preallocation),
    }
}
