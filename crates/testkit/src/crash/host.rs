//! The machine that records: files in memory whose every operation is held until the driver of the run lets it go.

use std::future::poll_fn;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};

use zbdkit_block::{FileId, FileOptions, Host, HostError};
use zbdkit_io::{File, LocalBoxFuture, Storage, StorageOp, WordStore, Words};

use super::choose::{Choose, Pieces, Rng};
use super::disk::{Change, Disk, Event, FileNo};

/// What a file is to the image, by its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The image: its data, and in qcow2 its mapping, its counts and its zone table.
    Data,
    /// The zone table, `*.zones`.
    Table,
    /// The run state, `*.run`.
    RunState,
}

impl Role {
    /// The role of the file of this name.
    pub fn of(path: &Path) -> Role {
        match path.extension().and_then(|e| e.to_str()) {
            Some("zones") => Role::Table,
            Some("run") => Role::RunState,
            _ => Role::Data,
        }
    }
}

/// A machine that breaks a promise on purpose, to see whether the judge finds out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lie {
    /// Syncs of such files do nothing.
    Sync(Role),
    /// Syncs of directories do nothing.
    NameSync,
    /// Stores to the run state reach the page cache only so many ticks later.
    LateRunState(u64),
    /// The whole run state is lost with the process.
    NoRunState,
    /// A write reports success after its first sector.
    ShortWrites(Role),
    /// A crash loses the writes of the last so many ticks, though they were completed: as if what followed them had
    /// gone before.
    LateWrites(Role, u64),
    /// A sync makes durable what it covers only so many ticks after it was answered: as if it came after what
    /// followed it.
    LateSyncs(Role, u64),
}

/// What operation fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultKind {
    /// Data or table writes in flight, and the short writes of a run state.
    Write,
    /// Syncs.
    Sync,
}

/// One operation that fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// In such a file.
    pub role: Role,
    /// Such an operation.
    pub kind: FaultKind,
    /// So many of them succeed before.
    pub after: u64,
    /// With this errno.
    pub errno: i32,
}

/// How the machine behaves.
#[derive(Clone, Debug, Default)]
pub struct Behaviour {
    /// Run states are mapped, as on tmpfs.
    pub mapped: bool,
    /// What it lies about.
    pub lie: Option<Lie>,
    /// What fails.
    pub fault: Option<Fault>,
}

/// An event and when it happened, on the clock that the oracle's notes share.
#[derive(Clone, Debug)]
pub struct Recorded {
    /// When.
    pub tick: u64,
    /// What.
    pub event: Event,
}

enum Action {
    Read { file: FileNo, offset: u64, len: usize },
    Change { pieces: usize },
    Sync,
}

struct Pending {
    id: u64,
    role: Role,
    action: Action,
    waker: Option<Waker>,
}

struct State {
    disk: Disk,
    events: Vec<Recorded>,
    clock: u64,
    next_id: u64,
    pending: Vec<Pending>,
    /// Operations that are over, with what a read found.
    finished: Vec<(u64, io::Result<Vec<u8>>)>,
    rng: Rng,
    behaviour: Behaviour,
    /// How many operations that a fault is about there were.
    seen: u64,
    fault_fired: Option<u64>,
    armed: bool,
    late: Vec<(u64, FileNo, Change)>,
    probed: Option<FileNo>,
}

/// A simulated machine.
#[derive(Clone)]
pub struct Machine {
    state: Arc<Mutex<State>>,
}

impl Machine {
    /// The machine that has these files. `seed` decides in which order operations end.
    pub fn new(disk: Disk, behaviour: Behaviour, seed: u64) -> Machine {
        Machine {
            state: Arc::new(Mutex::new(State {
                disk,
                events: Vec::new(),
                clock: 0,
                next_id: 0,
                pending: Vec::new(),
                finished: Vec::new(),
                rng: Rng::new(seed),
                behaviour,
                seen: 0,
                fault_fired: None,
                armed: false,
                late: Vec::new(),
                probed: None,
            })),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The machine as the block layer takes it.
    pub fn host(&self) -> Arc<dyn Host> {
        Arc::new(self.clone())
    }

    /// A moment for a note of the oracle.
    pub fn tick(&self) -> u64 {
        let mut state = self.lock();
        state.clock += 1;
        state.clock
    }

    /// The files as they are now.
    pub fn disk(&self) -> Disk {
        self.lock().disk.clone()
    }

    /// All that happened.
    pub fn events(&self) -> Vec<Recorded> {
        self.lock().events.clone()
    }

    /// From now on operations may fail, if one is to.
    pub fn arm(&self) {
        self.lock().armed = true;
    }

    /// When the fault struck.
    pub fn fault_fired(&self) -> Option<u64> {
        self.lock().fault_fired
    }

    /// Ends one pending operation, any of them. False where there is none.
    pub fn step(&self) -> bool {
        let waker = {
            let mut state = self.lock();
            state.release_late(false);
            if state.pending.is_empty() {
                return false;
            }
            let n = state.pending.len() as u64;
            let index = state.rng.below(n) as usize;
            let pending = state.pending.swap_remove(index);
            state.finish(pending)
        };
        if let Some(waker) = waker {
            waker.wake();
        }
        true
    }

    /// Ends the run: what was late has arrived.
    pub fn settle(&self) {
        self.lock().release_late(true);
    }

    fn open_file(&self, file: FileNo, role: Role) -> File {
        File::custom(Arc::new(SimFile {
            machine: self.clone(),
            file,
            role,
        }))
    }

    /// Which of our files a handle is.
    fn file_no(&self, file: &File) -> io::Result<FileNo> {
        self.lock().probed = None;
        file.len()?;
        self.lock()
            .probed
            .ok_or_else(|| io::Error::other("not a file of this machine"))
    }

    fn change_now(&self, file: FileNo, change: Change) {
        let mut state = self.lock();
        let run_state = state
            .disk
            .path_of(file)
            .is_some_and(|path| Role::of(path) == Role::RunState);
        match state.behaviour.lie {
            Some(Lie::LateRunState(ticks)) if run_state => {
                let due = state.clock + ticks;
                state.late.push((due, file, change));
            }
            Some(Lie::NoRunState) if run_state => {}
            _ => state.record(Event::Changed { file, change }),
        }
    }
}

impl State {
    fn record(&mut self, event: Event) {
        self.clock += 1;
        self.disk.apply(&event);
        self.events.push(Recorded {
            tick: self.clock,
            event,
        });
    }

    fn release_late(&mut self, all: bool) {
        let now = self.clock;
        let (due, late) = std::mem::take(&mut self.late)
            .into_iter()
            .partition(|(at, ..)| all || *at <= now);
        self.late = late;
        for (_, file, change) in Vec::from_iter::<Vec<_>>(due) {
            self.record(Event::Changed { file, change });
        }
    }

    /// Whether this operation is the one that fails, and how.
    fn fails(&mut self, role: Role, kind: FaultKind) -> Option<io::Error> {
        let fault = self
            .behaviour
            .fault
            .filter(|f| f.role == role && f.kind == kind)?;
        self.seen += u64::from(self.armed);
        if !self.armed || self.seen != fault.after + 1 {
            return None;
        }
        self.clock += 1;
        self.fault_fired = Some(self.clock);
        Some(io::Error::from_raw_os_error(fault.errno))
    }

    fn finish(&mut self, pending: Pending) -> Option<Waker> {
        let Pending {
            id,
            role,
            action,
            waker,
        } = pending;
        let result = match action {
            Action::Read { file, offset, len } => {
                let mut bytes = vec![0; len];
                self.disk.contents(file).read(offset, &mut bytes);
                Ok(bytes)
            }
            Action::Change { pieces } => match self.fails(role, FaultKind::Write) {
                Some(error) => {
                    // It may have written any part.
                    let pieces = self.rng.pieces(pieces);
                    self.record(Event::Completed { id, pieces });
                    Err(error)
                }
                None => {
                    let pieces = match self.behaviour.lie {
                        Some(Lie::ShortWrites(liar)) if liar == role => {
                            Pieces::Some((0..pieces).map(|i| i == 0).collect())
                        }
                        _ => Pieces::All,
                    };
                    self.record(Event::Completed { id, pieces });
                    Ok(Vec::new())
                }
            },
            Action::Sync => match self.fails(role, FaultKind::Sync) {
                Some(error) => {
                    self.record(Event::SyncFailed { id });
                    Err(error)
                }
                None => {
                    if self.behaviour.lie != Some(Lie::Sync(role)) {
                        self.record(Event::Synced { id });
                    }
                    Ok(Vec::new())
                }
            },
        };
        self.finished.push((id, result));
        waker
    }

    fn submit(&mut self, file: FileNo, role: Role, op: &StorageOp) -> u64 {
        self.next_id += 1;
        let id = self.next_id;
        let change = match op {
            StorageOp::Read { buf, offset } => {
                let (offset, len) = (*offset, buf.len());
                self.hold(id, role, Action::Read { file, offset, len });
                return id;
            }
            StorageOp::DataSync | StorageOp::Sync => {
                self.record(Event::SyncSubmitted { id, file });
                self.hold(id, role, Action::Sync);
                return id;
            }
            StorageOp::Write { buf, offset } => Change::Write {
                offset: *offset,
                data: buf.to_vec().into(),
            },
            StorageOp::PunchHole { offset, len } | StorageOp::ZeroRange { offset, len } => Change::Zero {
                offset: *offset,
                len: *len,
            },
            // Space without contents: only the length shows.
            StorageOp::Allocate { offset, len } => {
                Change::Length(self.disk.contents(file).len().max(offset + len))
            }
        };
        let pieces = change.pieces();
        self.record(Event::Submitted { id, file, change });
        self.hold(id, role, Action::Change { pieces });
        id
    }

    fn hold(&mut self, id: u64, role: Role, action: Action) {
        let waker = None;
        self.pending.push(Pending {
            id,
            role,
            action,
            waker,
        });
    }

    fn poll(&mut self, id: u64, waker: &Waker) -> Poll<io::Result<Vec<u8>>> {
        if let Some(at) = self.finished.iter().position(|(other, _)| *other == id) {
            return Poll::Ready(self.finished.swap_remove(at).1);
        }
        if let Some(pending) = self.pending.iter_mut().find(|pending| pending.id == id) {
            pending.waker = Some(waker.clone());
        }
        Poll::Pending
    }
}

struct SimFile {
    machine: Machine,
    file: FileNo,
    role: Role,
}

impl Storage for SimFile {
    fn submit(&self, op: StorageOp) -> LocalBoxFuture<'static, io::Result<()>> {
        let machine = self.machine.clone();
        let id = machine.lock().submit(self.file, self.role, &op);
        Box::pin(async move {
            let found = poll_fn(|cx| machine.lock().poll(id, cx.waker())).await?;
            if let StorageOp::Read { buf, .. } = op {
                buf.copy_from(&found);
            }
            Ok(())
        })
    }

    fn len(&self) -> io::Result<u64> {
        let mut state = self.machine.lock();
        state.probed = Some(self.file);
        Ok(state.disk.contents(self.file).len())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.machine.change_now(self.file, Change::Length(len));
        Ok(())
    }
}

struct SimWords {
    machine: Machine,
    file: FileNo,
    offset: u64,
    count: usize,
}

impl WordStore for SimWords {
    fn count(&self) -> usize {
        self.count
    }

    fn load(&self, index: usize) -> u64 {
        let mut bytes = [0; 8];
        let state = self.machine.lock();
        state
            .disk
            .contents(self.file)
            .read(self.offset + 8 * index as u64, &mut bytes);
        u64::from_ne_bytes(bytes)
    }

    fn store(&self, index: usize, value: u64) {
        let change = Change::Write {
            offset: self.offset + 8 * index as u64,
            data: value.to_ne_bytes().as_slice().into(),
        };
        self.machine.change_now(self.file, change);
    }
}

impl Host for Machine {
    fn open(&self, path: &Path, options: &FileOptions) -> Result<File, HostError> {
        let mut state = self.lock();
        let role = Role::of(path);
        let file = match (state.disk.find(path), options.create_new) {
            (Some(_), true) => return Err(HostError::Io(io::ErrorKind::AlreadyExists.into())),
            (None, false) => return Err(HostError::Io(io::ErrorKind::NotFound.into())),
            (Some(file), false) => file,
            (None, true) => {
                let file = state.disk.new_file_no();
                let path = path.to_owned();
                state.record(Event::Named {
                    path,
                    file: Some(file),
                });
                file
            }
        };
        drop(state);
        Ok(self.open_file(file, role))
    }

    fn memory(&self, _size: u64) -> io::Result<File> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn exists(&self, path: &Path) -> io::Result<bool> {
        Ok(self.lock().disk.find(path).is_some())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let mut state = self.lock();
        if state.disk.find(path).is_none() {
            return Err(io::ErrorKind::NotFound.into());
        }
        let path = path.to_owned();
        state.record(Event::Named { path, file: None });
        Ok(())
    }

    fn sync_name(&self, path: &Path) -> io::Result<()> {
        let mut state = self.lock();
        if state.behaviour.lie != Some(Lie::NameSync) {
            let path = path.to_owned();
            state.record(Event::NamesSynced { path });
        }
        Ok(())
    }

    fn identity(&self, file: &File) -> io::Result<FileId> {
        let ino = self.file_no(file)?;
        Ok(FileId {
            dev: 8,
            ino,
            btime: 1_000_000 + ino,
        })
    }

    fn boot_id(&self) -> io::Result<[u8; 16]> {
        let boot = self.lock().disk.boot;
        Ok(u128::from(boot).to_le_bytes())
    }

    fn map_words(&self, file: &File, offset: u64, count: usize) -> io::Result<Option<Words>> {
        let machine = self.clone();
        let file = self.file_no(file)?;
        let mapped = self.lock().behaviour.mapped;
        Ok(mapped.then(|| {
            Words::custom(Arc::new(SimWords {
                machine,
                file,
                offset,
                count,
            }))
        }))
    }

    fn write_now(&self, file: &File, data: &[u8], offset: u64) -> io::Result<()> {
        let file = self.file_no(file)?;
        let failure = self.lock().fails(Role::RunState, FaultKind::Write);
        if let Some(error) = failure {
            return Err(error);
        }
        let data = data.into();
        self.change_now(file, Change::Write { offset, data });
        Ok(())
    }

    fn image_id(&self, file: &File) -> Option<[u8; 16]> {
        let file = self.file_no(file).ok()?;
        self.lock().disk.contents(file).id
    }

    fn set_image_id(&self, file: &File, id: [u8; 16]) -> bool {
        let Ok(file) = self.file_no(file) else {
            return false;
        };
        self.change_now(file, Change::Id(id));
        true
    }
}
