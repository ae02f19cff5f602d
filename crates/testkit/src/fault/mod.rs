//! Files whose operations fail, wait or are held back, on a rule's word.
//!
//! [`Faults::wrap`] puts itself before any [`File`]; [`FaultHost`] does so for every file that a graph opens. A rule
//! says which operations it is about (kind, range, how many to let pass, how many to take) and what becomes of them.

mod host;

use std::future::poll_fn;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};
use std::time::Duration;

use zbdkit_io::{File, LocalBoxFuture, Storage, StorageOp, sleep};

pub use host::FaultHost;

/// What an operation does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpKind {
    /// Reads.
    Read,
    /// Writes.
    Write,
    /// Makes durable, wholly or data only.
    Sync,
    /// Punches a hole or zeroes.
    Zero,
    /// Allocates.
    Allocate,
}

/// What becomes of an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// It fails with this errno, and nothing is done.
    Fail(i32),
    /// It is done, and fails with this errno all the same.
    DoneButFail(i32),
    /// It is done after so long.
    Delay(Duration),
    /// It is not begun before it is released.
    Hold,
    /// It is done, but nobody hears of it before it is released.
    HoldAnswer,
}

/// Which operations something becomes of.
#[derive(Clone, Debug)]
pub struct Rule {
    /// Only of this kind.
    pub kind: Option<OpKind>,
    /// Only those that touch these bytes; syncs touch none.
    pub range: Option<Range<u64>>,
    /// So many are let pass first.
    pub skip: u64,
    /// Then so many are taken.
    pub times: u64,
    /// What becomes of them.
    pub action: Action,
}

impl Rule {
    /// All operations of a kind.
    pub fn every(kind: OpKind, action: Action) -> Rule {
        Rule {
            kind: Some(kind),
            range: None,
            skip: 0,
            times: u64::MAX,
            action,
        }
    }

    /// The operation of a kind that comes after `skip` others.
    pub fn nth(kind: OpKind, skip: u64, action: Action) -> Rule {
        Rule {
            skip,
            times: 1,
            ..Rule::every(kind, action)
        }
    }

    /// The same, in these bytes only.
    pub fn within(self, range: Range<u64>) -> Rule {
        Rule {
            range: Some(range),
            ..self
        }
    }

    fn takes(&mut self, kind: OpKind, touched: &Range<u64>) -> bool {
        let fits = self.kind.is_none_or(|wanted| wanted == kind)
            && self
                .range
                .as_ref()
                .is_none_or(|range| touched.start < range.end && range.start < touched.end);
        if !fits || self.times == 0 {
            return false;
        }
        if self.skip > 0 {
            self.skip -= 1;
            return false;
        }
        self.times -= 1;
        true
    }
}

#[derive(Default)]
struct State {
    rules: Vec<Rule>,
    /// Held operations, the oldest first, and whether each may go.
    held: Vec<(u64, bool, Option<Waker>)>,
    next: u64,
    /// Who waits until so many are held.
    waiting: Vec<(usize, Waker)>,
    taken: u64,
}

/// The rules of some files, and a hold on what they hold.
#[derive(Clone, Default)]
pub struct Faults {
    state: Arc<Mutex<State>>,
}

impl Faults {
    /// No rules.
    pub fn new() -> Faults {
        Faults::default()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The file with these rules before it.
    pub fn wrap(&self, inner: File) -> File {
        File::custom(Arc::new(FaultFile {
            inner,
            faults: self.clone(),
        }))
    }

    /// Adds a rule. The first one that takes an operation decides.
    pub fn add(&self, rule: Rule) {
        self.lock().rules.push(rule);
    }

    /// Forgets all rules. What is held stays held.
    pub fn clear(&self) {
        self.lock().rules.clear();
    }

    /// How many operations rules have taken.
    pub fn taken(&self) -> u64 {
        self.lock().taken
    }

    /// How many operations are held now.
    pub fn held(&self) -> usize {
        self.lock().held.iter().filter(|(_, free, _)| !free).count()
    }

    /// Waits until at least `count` operations are held.
    pub async fn until_held(&self, count: usize) {
        poll_fn(|cx| {
            if self.held() >= count {
                return Poll::Ready(());
            }
            self.lock().waiting.push((count, cx.waker().clone()));
            Poll::Pending
        })
        .await;
    }

    /// Lets the held operation number `index` (0 the oldest) go. False where there is none.
    pub fn release(&self, index: usize) -> bool {
        let mut state = self.lock();
        let held = state.held.iter_mut().filter(|(_, free, _)| !free).nth(index);
        let Some((_, free, waker)) = held else {
            return false;
        };
        *free = true;
        let waker = waker.take();
        drop(state);
        if let Some(waker) = waker {
            waker.wake();
        }
        true
    }

    /// Lets all held operations go.
    pub fn release_all(&self) {
        while self.release(0) {}
    }

    fn action(&self, kind: OpKind, touched: &Range<u64>) -> Option<Action> {
        let mut state = self.lock();
        let rule = state
            .rules
            .iter_mut()
            .find_map(|rule| rule.takes(kind, touched).then_some(rule.action));
        state.taken += u64::from(rule.is_some());
        rule
    }

    async fn hold(&self) {
        let (id, wakers) = {
            let mut state = self.lock();
            let id = state.next;
            state.next += 1;
            state.held.push((id, false, None));
            (id, std::mem::take(&mut state.waiting))
        };
        wakers.into_iter().for_each(|(_, waker)| waker.wake());
        poll_fn(|cx| {
            let mut state = self.lock();
            let at = state.held.iter().position(|(own, ..)| *own == id);
            match at {
                Some(at) if state.held[at].1 => {
                    state.held.remove(at);
                    Poll::Ready(())
                }
                Some(at) => {
                    state.held[at].2 = Some(cx.waker().clone());
                    Poll::Pending
                }
                None => Poll::Ready(()),
            }
        })
        .await;
    }
}

struct FaultFile {
    inner: File,
    faults: Faults,
}

impl Storage for FaultFile {
    fn submit(&self, op: StorageOp) -> LocalBoxFuture<'static, io::Result<()>> {
        let (inner, faults) = (self.inner.clone(), self.faults.clone());
        let (kind, touched) = shape(&op);
        let action = faults.action(kind, &touched);
        Box::pin(async move {
            match action {
                None => carry_out(&inner, op).await,
                Some(Action::Fail(errno)) => Err(io::Error::from_raw_os_error(errno)),
                Some(Action::DoneButFail(errno)) => {
                    carry_out(&inner, op).await?;
                    Err(io::Error::from_raw_os_error(errno))
                }
                Some(Action::Delay(time)) => {
                    sleep(time).await;
                    carry_out(&inner, op).await
                }
                Some(Action::Hold) => {
                    faults.hold().await;
                    carry_out(&inner, op).await
                }
                Some(Action::HoldAnswer) => {
                    let result = carry_out(&inner, op).await;
                    faults.hold().await;
                    result
                }
            }
        })
    }

    fn len(&self) -> io::Result<u64> {
        host::note(&self.inner);
        self.inner.len()
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.inner.set_len(len)
    }
}

fn shape(op: &StorageOp) -> (OpKind, Range<u64>) {
    match op {
        StorageOp::Read { buf, offset } => (OpKind::Read, *offset..*offset + buf.len() as u64),
        StorageOp::Write { buf, offset } => (OpKind::Write, *offset..*offset + buf.len() as u64),
        StorageOp::DataSync | StorageOp::Sync => (OpKind::Sync, 0..0),
        StorageOp::PunchHole { offset, len } | StorageOp::ZeroRange { offset, len } => {
            (OpKind::Zero, *offset..*offset + *len)
        }
        StorageOp::Allocate { offset, len } => (OpKind::Allocate, *offset..*offset + *len),
    }
}

async fn carry_out(file: &File, op: StorageOp) -> io::Result<()> {
    match op {
        StorageOp::Read { buf, offset } => file.read(buf, offset).await,
        StorageOp::Write { buf, offset } => file.write(buf, offset).await,
        StorageOp::DataSync => file.datasync().await,
        StorageOp::Sync => file.sync().await,
        StorageOp::PunchHole { offset, len } => file.punch_hole(offset, len).await,
        StorageOp::ZeroRange { offset, len } => file.zero_range(offset, len).await,
        StorageOp::Allocate { offset, len } => file.allocate(offset, len).await,
    }
}
