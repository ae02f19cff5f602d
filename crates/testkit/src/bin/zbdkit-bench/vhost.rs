//! Workloads through a vhost-user-blk server, the same for every server.

use std::fs::File;
use std::path::Path;
use std::sync::Barrier;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;
use rustix::fs::{FallocateFlags, fallocate};
use zbdkit_testkit::client::{Client, Options, Queue, Slot, Status, feature, op};

use crate::workload::{
    Geometry, Kind, PAGE, RandomOffsets, SECTOR, Sample, Workload, WriteOffsets, background, check,
    sample_positions, stamp,
};

/// Largest block, and block of the filling pass.
pub const MAX_BLOCK: u32 = 128 << 10;
const MAX_DEPTH: u16 = 128;
const STUCK: Duration = Duration::from_secs(20);
const VERIFY_BLOCKS: u64 = 128;

/// How the client waits for completions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Wait {
    /// Look at the used ring all the time, with interrupts off.
    Poll,
    /// Sleep on the eventfd when the ring is empty.
    Sleep,
}

/// How the client behaves, for all servers alike.
#[derive(Debug, Clone, Copy)]
pub struct Manner {
    pub wait: Wait,
    /// Completions to wait for before submitting again, at most half the depth.
    pub batch: u32,
    pub event_idx: bool,
}

/// A server with the client's connection to it.
pub struct VhostTarget {
    client: Client,
    queues: Vec<Queue>,
    geometry: Geometry,
    zoned: bool,
    manner: Manner,
    /// Image file whose blocks are freed before each write pass, where zones cannot be reset.
    punch: Option<File>,
}

impl VhostTarget {
    pub fn connect(socket: &Path, geometry: Geometry, queues: u16, manner: Manner) -> Result<Self> {
        let mut features = feature::ALL;
        if !manner.event_idx {
            features &= !feature::EVENT_IDX;
        }
        let options = Options {
            features,
            queues,
            queue_size: 512,
            slots: MAX_DEPTH,
            max_data: MAX_BLOCK as usize,
            patience: STUCK,
            ..Options::default()
        };
        let mut client = Client::connect(socket, &options)
            .with_context(|| format!("connecting to {}", socket.display()))?;
        let capacity = client.config().capacity * SECTOR;
        ensure!(
            capacity == geometry.size,
            "the device has {capacity} bytes, not {}",
            geometry.size
        );
        let zoned = client.features() & feature::ZONED != 0;
        let zone_size = u64::from(client.config().zone_sectors) * SECTOR;
        ensure!(
            !zoned || zone_size == geometry.zone_size,
            "the device has zones of {zone_size} bytes"
        );
        let queues = client.take_queues();
        Ok(VhostTarget {
            client,
            queues,
            geometry,
            zoned,
            manner,
            punch: None,
        })
    }

    /// Frees the blocks of `file` before each write pass.
    pub fn set_punch(&mut self, file: Option<File>) {
        self.punch = file;
    }

    pub fn zoned(&self) -> bool {
        self.zoned
    }

    /// Writes the whole device with pass 0 and reads samples of it back.
    pub fn fill(&mut self) -> Result<()> {
        let workload = Workload {
            kind: Kind::SequentialWrite,
            block: MAX_BLOCK,
            depth: 8,
        };
        self.run(workload, 0, None)?;
        Ok(())
    }

    /// Empties all zones, or frees the file's blocks.
    pub fn reset(&mut self) -> Result<()> {
        if self.zoned {
            self.queues[0].zone_reset_all()?;
        }
        Ok(())
    }

    /// Measures `workload` for `duration`; `seed` marks the data written.
    pub fn measure(&mut self, workload: Workload, seed: u64, duration: Duration) -> Result<Sample> {
        if workload.kind == Kind::RandomRead {
            self.verify_reads(workload, seed)?;
        }
        self.run(workload, seed, Some(duration))
    }

    /// Measures one pass of writes over the whole device, however long it takes.
    pub fn measure_pass(&mut self, workload: Workload, seed: u64) -> Result<Sample> {
        self.run(workload, seed, None)
    }

    /// As `measure`, without looking at any data.
    pub fn measure_unverified(&mut self, workload: Workload, duration: Duration) -> Result<Sample> {
        self.run(workload, 1, Some(duration))
    }

    /// Runs `workload` on all queues, for `duration` or for one pass.
    fn run(&mut self, workload: Workload, seed: u64, duration: Option<Duration>) -> Result<Sample> {
        let threads = self.queues.len();
        let barrier = Barrier::new(threads);
        let (geometry, zoned, manner, punch) = (self.geometry, self.zoned, self.manner, self.punch.as_ref());
        let results = std::thread::scope(|scope| {
            let workers: Vec<_> = self
                .queues
                .iter_mut()
                .enumerate()
                .map(|(thread, queue)| {
                    let barrier = &barrier;
                    let worker = Worker {
                        queue,
                        workload,
                        geometry,
                        zoned,
                        manner,
                        punch,
                        thread,
                        threads,
                        seed,
                    };
                    scope.spawn(move || worker.run(barrier, duration))
                })
                .collect();
            workers
                .into_iter()
                .map(|w| w.join().expect("a worker panicked"))
                .collect::<Result<Vec<_>>>()
        })?;
        Ok(Sample {
            iops: results.iter().sum(),
        })
    }

    /// Reads some random blocks of the filled device and looks at each byte.
    fn verify_reads(&mut self, workload: Workload, seed: u64) -> Result<()> {
        let mut offsets = RandomOffsets::new(self.geometry, workload.block, seed ^ 0xabcd);
        for _ in 0..VERIFY_BLOCKS {
            let at = offsets.next();
            let data = self.queues[0].read(at / SECTOR, workload.block)?;
            ensure!(check(&data, 0, at / PAGE as u64), "wrong data at byte {at}");
        }
        Ok(())
    }

    /// Feature bits in use.
    pub fn features(&self) -> u64 {
        self.client.features()
    }
}

/// One queue's share of a run.
struct Worker<'a> {
    queue: &'a mut Queue,
    workload: Workload,
    geometry: Geometry,
    zoned: bool,
    manner: Manner,
    punch: Option<&'a File>,
    thread: usize,
    threads: usize,
    seed: u64,
}

impl Worker<'_> {
    /// Runs, and gives the operations in a second.
    fn run(mut self, barrier: &Barrier, duration: Option<Duration>) -> Result<f64> {
        let slots: Vec<Slot> = (0..self.workload.depth)
            .filter_map(|_| self.queue.acquire())
            .collect();
        ensure!(
            slots.len() == self.workload.depth as usize,
            "a depth of over {MAX_DEPTH}"
        );
        let background = background(MAX_BLOCK as usize);
        for &slot in &slots {
            self.queue.write_data(slot, 0, &background);
        }
        barrier.wait();
        let result = self.passes(&slots, duration);
        for slot in slots {
            self.queue.release(slot);
        }
        let (ops, elapsed) = result?;
        Ok(ops as f64 / elapsed.as_secs_f64())
    }

    fn passes(&mut self, slots: &[Slot], duration: Option<Duration>) -> Result<(u64, Duration)> {
        let (mut ops, mut elapsed) = (0, Duration::ZERO);
        loop {
            let left = duration.map(|d| d.saturating_sub(elapsed));
            if left.is_some_and(|left| left.is_zero()) {
                return Ok((ops, elapsed));
            }
            let (pass_ops, pass_time) = if self.workload.kind == Kind::RandomRead {
                self.read_pass(slots, left.unwrap_or(Duration::MAX))?
            } else {
                self.empty_zones()?;
                let mut pass = WritePass::new(self);
                let result = self.write_pass(slots, left.unwrap_or(Duration::MAX), &mut pass)?;
                self.verify_writes(&pass)?;
                result
            };
            ops += pass_ops;
            elapsed += pass_time;
            self.seed += 1;
            if duration.is_none() {
                return Ok((ops, elapsed));
            }
        }
    }

    fn read_pass(&mut self, slots: &[Slot], time: Duration) -> Result<(u64, Duration)> {
        let block = self.workload.block;
        let mut offsets = RandomOffsets::new(self.geometry, block, self.seed ^ (self.thread as u64) << 32);
        self.pump(slots, time, |queue, slot| {
            queue.start(slot, op::READ, offsets.next() / SECTOR, 0, block)?;
            Ok(true)
        })
    }

    fn write_pass(
        &mut self,
        slots: &[Slot],
        time: Duration,
        pass: &mut WritePass,
    ) -> Result<(u64, Duration)> {
        let block = self.workload.block;
        let pages = u64::from(block) / PAGE as u64;
        let seed = self.seed;
        let append = pass.append;
        let pass = std::cell::RefCell::new(pass);
        let submit = |queue: &mut Queue, slot: Slot| {
            let pass = &mut *pass.borrow_mut();
            let Some((zone, at)) = pass.offsets.next() else {
                return Ok(false);
            };
            // An append does not know its place, so it is marked with its number.
            let first = if append {
                pass.started * pages
            } else {
                at / PAGE as u64
            };
            for page in 0..pages {
                queue.write_data(slot, page as usize * PAGE, &stamp(seed, first + page));
            }
            let (op, sector) = if append {
                (op::ZONE_APPEND, zone)
            } else {
                (op::WRITE, at)
            };
            queue.start(slot, op, sector / SECTOR, block, 0)?;
            pass.of_slot[slot.index()] = (pass.started, zone);
            pass.started += 1;
            Ok(true)
        };
        let place = |queue: &Queue, slot: Slot| {
            if !append {
                return Ok(());
            }
            let at = queue.append_sector(slot) * SECTOR;
            pass.borrow_mut().place(slot, at)
        };
        self.pump_with(slots, time, submit, place)
    }

    fn pump(
        &mut self,
        slots: &[Slot],
        time: Duration,
        submit: impl FnMut(&mut Queue, Slot) -> Result<bool>,
    ) -> Result<(u64, Duration)> {
        self.pump_with(slots, time, submit, |_, _| Ok(()))
    }

    /// Keeps all `slots` in flight until `time` is over or `submit` has no more, then drains.
    fn pump_with(
        &mut self,
        slots: &[Slot],
        time: Duration,
        mut submit: impl FnMut(&mut Queue, Slot) -> Result<bool>,
        mut completed: impl FnMut(&Queue, Slot) -> Result<()>,
    ) -> Result<(u64, Duration)> {
        let batch = self.manner.batch.clamp(1, (self.workload.depth / 2).max(1)) as usize;
        let mut idle: Vec<Slot> = slots.to_vec();
        let (mut in_flight, mut ops, mut more) = (0, 0, true);
        let start = Instant::now();
        loop {
            if more {
                while let Some(&slot) = idle.last() {
                    if !submit(self.queue, slot)? {
                        more = false;
                        break;
                    }
                    idle.pop();
                    in_flight += 1;
                }
                self.queue.publish()?;
            }
            if in_flight == 0 {
                return Ok((ops, start.elapsed()));
            }
            let mut reaped = 0;
            let enough = if more { batch } else { 1 };
            while reaped < enough {
                while let Some(done) = self.queue.reap()? {
                    if done.status != Status::OK {
                        bail!("a request failed: {}", done.status);
                    }
                    completed(self.queue, done.slot)?;
                    idle.push(done.slot);
                    reaped += 1;
                }
                if reaped < enough {
                    self.wait()?;
                }
            }
            in_flight -= reaped;
            ops += reaped as u64;
            if start.elapsed() >= time {
                more = false;
            }
        }
    }

    /// Returns when the used ring has something.
    #[inline]
    fn wait(&mut self) -> Result<()> {
        let mut spins = 0u32;
        let mut since = None;
        loop {
            if self.queue.has_used() {
                return Ok(());
            }
            if self.manner.wait == Wait::Sleep {
                let ready = self.queue.wait_used(Instant::now() + STUCK)?;
                ensure!(ready, "no completion for {STUCK:?}");
                continue;
            }
            std::hint::spin_loop();
            spins = spins.wrapping_add(1);
            if spins.is_multiple_of(1 << 20) {
                let since = since.get_or_insert_with(Instant::now);
                ensure!(since.elapsed() < STUCK, "no completion for {STUCK:?}");
            }
        }
    }

    fn empty_zones(&mut self) -> Result<()> {
        let offsets = WriteOffsets::new(self.geometry, self.workload, self.thread, self.threads);
        for zone in offsets.zones() {
            if self.zoned {
                self.queue.zone_reset(zone / SECTOR)?;
            } else if let Some(file) = self.punch {
                let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                fallocate(file, flags, zone, self.geometry.zone_size)?;
            }
        }
        Ok(())
    }

    /// Reads samples of what a pass wrote, the last blocks among them.
    fn verify_writes(&mut self, pass: &WritePass) -> Result<()> {
        let block = self.workload.block;
        let pages = u64::from(block) / PAGE as u64;
        let written: Vec<(u64, u64)> = if pass.append {
            let placed = pass
                .placed
                .iter()
                .enumerate()
                .filter(|(_, number)| **number != u64::MAX);
            let written: Vec<_> = placed
                .map(|(i, &n)| (i as u64 * u64::from(block), n * pages))
                .collect();
            ensure!(written.len() as u64 == pass.started, "appends were lost");
            written
        } else {
            let mut offsets = WriteOffsets::new(self.geometry, self.workload, self.thread, self.threads);
            let all = std::iter::from_fn(|| offsets.next()).take(pass.started as usize);
            all.map(|(_, at)| (at, at / PAGE as u64)).collect()
        };
        for i in sample_positions(written.len() as u64, VERIFY_BLOCKS) {
            let (at, first) = written[i as usize];
            let data = self.queue.read(at / SECTOR, block)?;
            ensure!(
                check(&data, self.seed, first),
                "wrong data at byte {at} after writing it"
            );
        }
        Ok(())
    }
}

/// Where a write pass is, and for appends, where each went.
struct WritePass {
    offsets: WriteOffsets,
    append: bool,
    block: u64,
    zone_size: u64,
    started: u64,
    /// Number of the append and its zone, by slot.
    of_slot: Vec<(u64, u64)>,
    /// Number of the append by block of the device.
    placed: Vec<u64>,
}

impl WritePass {
    fn new(worker: &Worker<'_>) -> Self {
        let append = worker.workload.kind == Kind::Append && worker.zoned;
        let Geometry { size, zone_size } = worker.geometry;
        let block = worker.workload.block;
        let blocks = if append { size / u64::from(block) } else { 0 };
        WritePass {
            offsets: WriteOffsets::new(worker.geometry, worker.workload, worker.thread, worker.threads),
            append,
            block: block.into(),
            zone_size,
            started: 0,
            of_slot: vec![(0, 0); MAX_DEPTH.into()],
            placed: vec![u64::MAX; blocks as usize],
        }
    }

    /// Records that the append of `slot` went to byte `at`.
    #[inline]
    fn place(&mut self, slot: Slot, at: u64) -> Result<()> {
        let (number, zone) = self.of_slot[slot.index()];
        let inside = at >= zone && at - zone <= self.zone_size - self.block && at.is_multiple_of(self.block);
        ensure!(inside, "an append to the zone at {zone} went to {at}");
        let place = &mut self.placed[(at / self.block) as usize];
        ensure!(*place == u64::MAX, "two appends went to {at}");
        *place = number;
        Ok(())
    }
}
