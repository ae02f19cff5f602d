//! The qcow2 format by itself, without zones: disks that are written everywhere at once.
//!
//! Here requests overlap as they like, compressed clusters and a backing image come up, and nothing above the format
//! hides what it leaves behind. What each sector may hold is told by [`Log::allows`].

use std::cell::RefCell;
use std::ops::Range;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;

use zbdkit_block::{FileOptions, Host};
use zbdkit_io::{File, IoBuf, LocalBoxFuture, Runtime, spawn};
use zbdkit_qcow2::{Backing, CheckReport, Error, Header, Layout, Options, Qcow2, Repair, check, create};

use super::choose::{Choose, Rng, mix};
use super::disk::Disk;
use super::host::{Behaviour, Machine, Recorded};
use super::oracle::{Found, PIECE, look, payload};
use super::run::drive;

/// The image's name on the simulated machines, and that of its data file.
const IMAGE: &str = "/image/bare.qcow2";
const DATA: &str = "/image/bare.data";
/// Stamps of the backing image begin here.
const BACKING_ID: u32 = 1 << 30;

/// What is tried.
#[derive(Clone, Debug)]
pub struct Bare {
    /// Its name, for replays.
    pub name: &'static str,
    /// The image; its size, too.
    pub layout: Layout,
    /// Bytes of its backing image, if there is one.
    pub backing: Option<u64>,
    /// What the machine does.
    pub behaviour: Behaviour,
    /// How many clients at once.
    pub clients: u32,
    /// Requests of each.
    pub requests: u32,
    /// Which of them, by weight.
    pub mix: BareMix,
}

/// Which requests, by weight.
#[derive(Clone, Copy, Debug)]
pub struct BareMix {
    /// Writes.
    pub write: u64,
    /// Compressed clusters.
    pub packed: u64,
    /// Writes of zeros.
    pub zeros: u64,
    /// Discards.
    pub discard: u64,
    /// Ranges given space ahead.
    pub ahead: u64,
    /// Ranges emptied as a zone's reset does.
    pub release: u64,
    /// Flushes.
    pub flush: u64,
    /// Reads, which are judged at once.
    pub read: u64,
}

impl BareMix {
    /// A bit of everything.
    pub const ALL: BareMix = BareMix {
        write: 50,
        packed: 8,
        zeros: 8,
        discard: 8,
        ahead: 4,
        release: 4,
        flush: 10,
        read: 8,
    };
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Write {
        id: u32,
    },
    /// The bytes become zeros.
    Zeros,
    /// They do, or stay as they are.
    Discard,
    Flush,
}

#[derive(Clone, Debug)]
struct Op {
    kind: Kind,
    range: Range<u64>,
    submitted: u64,
    done: Option<(u64, bool)>,
}

impl Op {
    fn acknowledged(&self, tick: u64) -> Option<u64> {
        self.done.filter(|(at, ok)| *ok && *at < tick).map(|(at, _)| at)
    }
}

/// What was asked and answered, over what was there before.
#[derive(Clone, Debug)]
pub struct Log {
    before: Vec<u8>,
    ops: Vec<Op>,
    next_id: u32,
    /// The opening was over at this tick.
    pub opened: u64,
}

impl Log {
    fn submit(&mut self, tick: u64, kind: Kind, range: Range<u64>) -> usize {
        self.ops.push(Op {
            kind,
            range,
            submitted: tick,
            done: None,
        });
        self.ops.len() - 1
    }

    fn id(&mut self) -> u32 {
        self.next_id += 1;
        self.next_id - 1
    }

    /// Whether bytes that were read from `offset` on may be there at `now`, where what was acknowledged before
    /// `promised` must be.
    pub fn allows(&self, offset: u64, found: &[u8], promised: u64, now: u64) -> Result<(), String> {
        for (number, sector) in found.chunks_exact(PIECE).enumerate() {
            let at = offset + (number * PIECE) as u64;
            let here: Vec<&Op> = self
                .ops
                .iter()
                .filter(|op| op.submitted < now && op.range.contains(&at))
                .collect();
            self.allows_sector(at, sector, promised, &here).map_err(|why| {
                let old = look(&self.before[at as usize..at as usize + PIECE]);
                format!("at {at}: {why}\n  it held {old:?} when it was opened, and then {here:?}")
            })?;
        }
        Ok(())
    }

    fn allows_sector(&self, at: u64, sector: &[u8], promised: u64, here: &[&Op]) -> Result<(), String> {
        // The promised change that came after `done` for sure.
        let later = |done: u64| {
            here.iter().find(|op| {
                op.acknowledged(promised).is_some() && op.submitted > done && op.kind != Kind::Discard
            })
        };
        let ended = |op: &Op| op.done.map_or(u64::MAX, |(at, _)| at);
        let old = &self.before[at as usize..at as usize + PIECE];
        if sector == old && later(0).is_none() {
            return Ok(());
        }
        let source = match look(sector) {
            Found::Zeros => {
                let zeroed = here
                    .iter()
                    .filter(|op| matches!(op.kind, Kind::Zeros | Kind::Discard));
                zeroed.max_by_key(|op| ended(op)).copied()
            }
            Found::Stamp { id, index } => here.iter().copied().find(|op| {
                op.kind == Kind::Write { id } && u64::from(index) == (at - op.range.start) / PIECE as u64
            }),
            Found::Garbage | Found::Unreadable => return Err("bytes that nobody wrote".into()),
        };
        let found = look(sector);
        match source {
            None => Err(format!("{found:?}, which does not belong there")),
            Some(op) => match later(ended(op)) {
                Some(later) => Err(format!("{found:?}, but {later:?} came after it")),
                None => Ok(()),
            },
        }
    }

    /// What was acknowledged before this tick is promised after a power cut at `now`.
    pub fn flushed(&self, now: u64) -> u64 {
        let flushes = self.ops.iter().filter(|op| op.kind == Kind::Flush);
        flushes
            .filter(|op| op.acknowledged(now).is_some())
            .map(|op| op.submitted)
            .max()
            .unwrap_or(0)
    }
}

/// A run that was recorded.
pub struct Story {
    /// The files it began with.
    pub start: Disk,
    /// What happened to them.
    pub events: Vec<Recorded>,
    /// The files at its end, after a clean close.
    pub end: Disk,
    /// What was asked and answered.
    pub log: Log,
    /// When the fault struck.
    pub fault: Option<u64>,
}

struct Pattern {
    bytes: Vec<u8>,
}

impl Backing for Pattern {
    fn len(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn read<'a>(&'a self, buf: IoBuf, offset: u64) -> LocalBoxFuture<'a, Result<(), i32>> {
        buf.copy_from(&self.bytes[offset as usize..offset as usize + buf.len()]);
        Box::pin(async { Ok(()) })
    }
}

impl Bare {
    /// Makes the image on an empty machine.
    pub fn make(&self, runtime: &Runtime) -> Result<Disk, String> {
        let machine = Machine::new(Disk::default(), Behaviour::default(), 1);
        let host = machine.host();
        drive(runtime, &machine, async {
            let (file, data) = self.files(&host, FileOptions::new_file())?;
            let made = create(&file, data.as_ref(), &self.layout).await;
            made.map_err(|error| format!("the image cannot be made: {error}"))?;
            for path in [IMAGE, DATA] {
                host.sync_name(Path::new(path))
                    .map_err(|error| error.to_string())?;
            }
            Ok::<_, String>(())
        })?;
        Ok(machine.disk())
    }

    fn files(&self, host: &Arc<dyn Host>, options: FileOptions) -> Result<(File, Option<File>), String> {
        let open = |path: &str| {
            let file = host.open(Path::new(path), &options);
            file.map_err(|error| format!("{path} does not open: {error:?}"))
        };
        let data = self.layout.data_file.as_ref().map(|_| open(DATA)).transpose()?;
        Ok((open(IMAGE)?, data))
    }

    async fn open(&self, host: &Arc<dyn Host>) -> Result<Qcow2, String> {
        let (file, data_file) = self.files(host, FileOptions::existing(false))?;
        let header = Header::read(&file)
            .await
            .map_err(|error| format!("its header: {error}"))?;
        let backing = self.backing.map(|len| {
            Arc::new(Pattern {
                bytes: payload(BACKING_ID, len),
            }) as Arc<dyn Backing>
        });
        let options = Options {
            data_file,
            backing,
            ..Options::default()
        };
        let image = Qcow2::open(file, header, options).await;
        image.map_err(|error| format!("the image does not open: {error}"))
    }

    /// Checks what is left; repairs it if so wished.
    pub fn check(
        &self,
        runtime: &Runtime,
        disk: &Disk,
        repair: Repair,
    ) -> Result<(CheckReport, Disk), String> {
        let machine = Machine::new(disk.clone(), Behaviour::default(), 1);
        let host = machine.host();
        let report = drive(runtime, &machine, async {
            let (file, data) = self.files(&host, FileOptions::existing(false))?;
            let header = Header::read(&file)
                .await
                .map_err(|error| format!("its header: {error}"))?;
            let report = check(&file, &header, data.as_ref(), &[], repair, &mut |_, _| {}).await;
            report.map_err(|error| format!("it cannot be checked: {error}"))
        })?;
        Ok((report, machine.disk()))
    }

    /// Opens the image, judges what it holds, lets clients work, closes it.
    pub fn record(
        &self,
        runtime: &Runtime,
        start: &Disk,
        behaviour: &Behaviour,
        (clients, requests): (u32, u32),
        (seed, first_id): (u64, u32),
        judge: &mut dyn FnMut(&[u8]) -> Result<(), String>,
    ) -> Result<Story, String> {
        let machine = Machine::new(start.clone(), behaviour.clone(), seed);
        let host = machine.host();
        let log = drive(runtime, &machine, async {
            let image = Arc::new(self.open(&host).await?);
            let opened = machine.tick();
            machine.arm();
            let before = read(&image, 0, image.size()).await?;
            judge(&before)?;
            let log = Rc::new(RefCell::new(Log {
                before,
                ops: Vec::new(),
                next_id: first_id,
                opened,
            }));
            let running = Rc::new(std::cell::Cell::new(clients));
            let wrong = Rc::new(RefCell::new(None));
            for number in 0..clients {
                let client = Client {
                    machine: machine.clone(),
                    image: image.clone(),
                    log: log.clone(),
                    mix: self.mix,
                    rng: RefCell::new(Rng::new(mix(seed, 1000 + u64::from(number)))),
                };
                let (running, wrong) = (running.clone(), wrong.clone());
                spawn(async move {
                    if let Err(what) = client.run(requests).await {
                        *wrong.borrow_mut() = Some(what);
                    }
                    running.set(running.get() - 1);
                });
            }
            std::future::poll_fn(|_| match running.get() {
                0 => Poll::Ready(()),
                _ => Poll::Pending,
            })
            .await;
            if let Some(what) = wrong.borrow_mut().take() {
                return Err(what);
            }
            close(&machine, &image, &log).await?;
            drop(image);
            Ok::<_, String>(log)
        })?;
        let log = Rc::try_unwrap(log)
            .map_err(|_| "a client did not end")?
            .into_inner();
        Ok(Story {
            start: start.clone(),
            events: machine.events(),
            end: machine.disk(),
            log,
            fault: machine.fault_fired(),
        })
    }
}

impl Story {
    /// The stamp of the next write.
    pub fn next_id(&self) -> u32 {
        self.log.next_id
    }
}

async fn read(image: &Qcow2, offset: u64, len: u64) -> Result<Vec<u8>, String> {
    let buf = IoBuf::alloc(len as usize);
    // What a read leaves alone must not look like zeros.
    buf.fill(0..buf.len(), 0xee);
    let done = image.read(buf.clone(), offset).await;
    done.map_err(|error| format!("{len} bytes at {offset} cannot be read: {error}"))?;
    Ok(buf.to_vec())
}

async fn close(machine: &Machine, image: &Qcow2, log: &RefCell<Log>) -> Result<(), String> {
    let op = log.borrow_mut().submit(machine.tick(), Kind::Flush, 0..0);
    let result = image.close().await;
    log.borrow_mut().ops[op].done = Some((machine.tick(), result.is_ok()));
    match result {
        Err(error) if machine.fault_fired().is_none() => Err(format!("the image does not close: {error}")),
        _ => Ok(()),
    }
}

struct Client {
    machine: Machine,
    image: Arc<Qcow2>,
    log: Rc<RefCell<Log>>,
    mix: BareMix,
    rng: RefCell<Rng>,
}

impl Client {
    fn below(&self, n: u64) -> u64 {
        self.rng.borrow_mut().below(n)
    }

    async fn run(&self, requests: u32) -> Result<(), String> {
        let mix = self.mix;
        let weights = [
            mix.write,
            mix.packed,
            mix.zeros,
            mix.discard,
            mix.ahead,
            mix.release,
            mix.flush,
            mix.read,
        ];
        for _ in 0..requests {
            let mut at = self.below(weights.iter().sum());
            let what = weights.iter().position(|weight| {
                let here = at < *weight;
                at = at.saturating_sub(*weight);
                here
            });
            match what.unwrap_or(0) {
                0 => self.write().await,
                1 => self.pack().await,
                2 => {
                    let range = self.range(3);
                    let unmap = self.below(2) == 0;
                    let zeros = self
                        .image
                        .write_zeroes(range.start, range.end - range.start, unmap);
                    self.note(Kind::Zeros, range, zeros).await;
                }
                3 => {
                    let range = self.range(3);
                    let discard = self.image.discard(range.start, range.end - range.start);
                    self.note(Kind::Discard, range, discard).await;
                }
                4 => {
                    // What has no plain cluster of its own gets one, of zeros.
                    let range = self.clusters(6);
                    self.note(Kind::Discard, range.clone(), self.image.map_ahead(range))
                        .await;
                }
                5 => {
                    let range = self.clusters(4);
                    self.note(Kind::Zeros, range.clone(), self.image.release(range))
                        .await;
                }
                6 => self.note(Kind::Flush, 0..0, self.image.flush()).await,
                _ => self.read().await?,
            }
        }
        Ok(())
    }

    /// Some sectors, over the length of at most so many clusters.
    fn range(&self, clusters: u64) -> Range<u64> {
        let sector = PIECE as u64;
        let sectors = self.image.size() / sector;
        let most = (clusters * self.image.cluster_size() / sector)
            .min(sectors)
            .min(128);
        let len = match self.below(3) {
            // Whole clusters come up often.
            0 => return self.clusters(clusters),
            _ => 1 + self.below(most),
        };
        let start = self.below(sectors - len + 1);
        start * sector..(start + len) * sector
    }

    /// Some whole clusters; the last one of the image may be cut.
    fn clusters(&self, most: u64) -> Range<u64> {
        let (size, cluster) = (self.image.size(), self.image.cluster_size());
        let count = size.div_ceil(cluster);
        let len = 1 + self.below(most.min(count));
        let start = self.below(count - len + 1);
        start * cluster..((start + len) * cluster).min(size)
    }

    async fn note(&self, kind: Kind, range: Range<u64>, request: impl Future<Output = Result<(), Error>>) {
        let op = self.log.borrow_mut().submit(self.machine.tick(), kind, range);
        let result = request.await;
        self.log.borrow_mut().ops[op].done = Some((self.machine.tick(), result.is_ok()));
    }

    async fn write(&self) {
        let range = self.range(2);
        let id = self.log.borrow_mut().id();
        let buf = IoBuf::from_vec(payload(id, range.end - range.start));
        let write = self.image.write(buf, range.start);
        self.note(Kind::Write { id }, range, write).await;
    }

    async fn pack(&self) {
        let range = self.clusters(1);
        let id = self.log.borrow_mut().id();
        let data = payload(id, range.end - range.start);
        let write = self.image.write_compressed(&data, range.start);
        self.note(Kind::Write { id }, range, write).await;
    }

    /// What is read while others write must be allowed, too.
    async fn read(&self) -> Result<(), String> {
        let range = self.range(4);
        let asked = self.machine.tick();
        let found = read(&self.image, range.start, range.end - range.start).await;
        let now = self.machine.tick();
        match found {
            // An image that has failed may refuse reads, too.
            Err(_) if self.machine.fault_fired().is_some() => Ok(()),
            Err(why) => Err(why),
            Ok(found) => self
                .log
                .borrow()
                .allows(range.start, &found, asked, now)
                .map_err(|why| format!("a read: {why}")),
        }
    }
}
