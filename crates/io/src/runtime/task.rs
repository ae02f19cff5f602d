//! Tasks: boxed ones for control work, and pools of slots for requests.

#![expect(unsafe_code, reason = "a pool keeps futures in place and polls them there")]

use std::cell::{Cell, RefCell, UnsafeCell};
use std::future::{Future, poll_fn};
use std::mem::MaybeUninit;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use super::wake::{Entry, Shared};
use super::{CURRENT, with_current};

/// Where an entry's task is.
pub(super) trait Target {
    /// Polls the task, if there still is one.
    fn run(&self, index: u32);
}

/// Runs `future` on this thread's runtime. Allocates; requests go through a [`TaskPool`].
///
/// Panics where the thread has no runtime.
pub fn spawn<F: Future<Output = ()> + 'static>(future: F) {
    let boxed = with_current(|inner| inner.boxed.clone());
    boxed.spawn(Box::pin(future));
}

type BoxFuture = Pin<Box<dyn Future<Output = ()>>>;

/// The tasks of [`spawn`].
pub(super) struct Boxed {
    shared: Arc<Shared>,
    target: u32,
    slots: RefCell<Vec<BoxedSlot>>,
    free: RefCell<Vec<u32>>,
}

struct BoxedSlot {
    /// Absent while it is polled.
    task: Option<BoxFuture>,
    waker: Waker,
}

impl Boxed {
    pub(super) fn new(shared: Arc<Shared>, target: u32) -> Boxed {
        Boxed {
            shared,
            target,
            slots: RefCell::default(),
            free: RefCell::default(),
        }
    }

    fn spawn(&self, task: BoxFuture) {
        let free = self.free.borrow_mut().pop();
        let waker = {
            let mut slots = self.slots.borrow_mut();
            let index = free.unwrap_or_else(|| {
                let index = slots.len() as u32;
                let waker = Waker::from(Entry::new(&self.shared, self.target, index));
                slots.push(BoxedSlot { task: None, waker });
                index
            });
            let slot = &mut slots[index as usize];
            slot.task = Some(task);
            slot.waker.clone()
        };
        waker.wake();
    }

    pub(super) fn clear(&self) {
        let tasks: Vec<_> = self
            .slots
            .borrow_mut()
            .iter_mut()
            .map(|slot| slot.task.take())
            .collect();
        drop(tasks);
    }
}

impl Target for Boxed {
    fn run(&self, index: u32) {
        let (task, waker) = {
            let slot = &mut self.slots.borrow_mut()[index as usize];
            (slot.task.take(), slot.waker.clone())
        };
        let Some(mut task) = task else { return };
        match task.as_mut().poll(&mut Context::from_waker(&waker)) {
            Poll::Pending => self.slots.borrow_mut()[index as usize].task = Some(task),
            Poll::Ready(()) => {
                drop(task);
                self.free.borrow_mut().push(index);
            }
        }
    }
}

/// Slots for futures of one type, made once: starting one and waking it allocates nothing.
///
/// The pool belongs to the runtime of the thread that made it. Dropping it drops the futures that are not done; the
/// I/O that they issued goes on.
pub struct TaskPool<F: Future<Output = ()> + 'static> {
    slots: Rc<Slots<F>>,
    target: u32,
    runtime: u64,
}

struct Slots<F> {
    slots: Box<[PoolSlot<F>]>,
    free: RefCell<Vec<u32>>,
    waiting: RefCell<Vec<Waker>>,
}

struct PoolSlot<F> {
    /// Initialised while `state` is `Idle` or `Running`.
    future: UnsafeCell<MaybeUninit<F>>,
    state: Cell<SlotState>,
    waker: Waker,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum SlotState {
    Vacant,
    Idle,
    Running,
}

impl<F: Future<Output = ()> + 'static> TaskPool<F> {
    /// A pool with room for `capacity` tasks. Panics where the thread has no runtime.
    pub fn new(capacity: usize) -> TaskPool<F> {
        let capacity = u32::try_from(capacity).expect("a pool of fewer than 2^32 tasks");
        with_current(|inner| {
            let mut targets = inner.targets.borrow_mut();
            let target = match targets.iter().skip(2).position(Option::is_none) {
                Some(vacant) => vacant + 2,
                None => {
                    targets.push(None);
                    targets.len() - 1
                }
            };
            let slot = |index| PoolSlot {
                future: UnsafeCell::new(MaybeUninit::uninit()),
                state: Cell::new(SlotState::Vacant),
                waker: Waker::from(Entry::new(&inner.shared, target as u32, index)),
            };
            let slots = Rc::new(Slots {
                slots: (0..capacity).map(slot).collect(),
                free: RefCell::new((0..capacity).rev().collect()),
                waiting: RefCell::default(),
            });
            targets[target] = Some(slots.clone());
            inner.ready.borrow_mut().reserve(capacity as usize);
            TaskPool {
                slots,
                target: target as u32,
                runtime: inner.shared.id,
            }
        })
    }

    /// Starts `future`, or gives it back if every slot is taken.
    pub fn try_spawn(&self, future: F) -> Result<(), F> {
        let Some(index) = self.slots.free.borrow_mut().pop() else {
            return Err(future);
        };
        let slot = &self.slots.slots[index as usize];
        debug_assert!(slot.state.get() == SlotState::Vacant);
        // SAFETY: the slot is vacant, so nothing refers to its contents, and nothing is there to be dropped.
        unsafe { (*slot.future.get()).write(future) };
        slot.state.set(SlotState::Idle);
        slot.waker.wake_by_ref();
        Ok(())
    }

    /// How many tasks are not done.
    pub fn in_use(&self) -> usize {
        self.slots.slots.len() - self.slots.free.borrow().len()
    }

    /// How many tasks there can be.
    pub fn capacity(&self) -> usize {
        self.slots.slots.len()
    }

    /// Waits until a slot is free. Another task may take it before the caller does.
    pub async fn vacancy(&self) {
        poll_fn(|cx| {
            if self.in_use() < self.capacity() {
                return Poll::Ready(());
            }
            self.slots.waiting.borrow_mut().push(cx.waker().clone());
            Poll::Pending
        })
        .await;
    }
}

impl<F: Future<Output = ()> + 'static> Drop for TaskPool<F> {
    fn drop(&mut self) {
        // The run loop holds the slots while it polls one of them: then they go right after that.
        let target = CURRENT.try_with(|current| match &*current.borrow() {
            Some(inner) if inner.shared.id == self.runtime => inner
                .targets
                .borrow_mut()
                .get_mut(self.target as usize)
                .and_then(Option::take),
            _ => None,
        });
        drop(target);
    }
}

impl<F: Future<Output = ()> + 'static> Target for Slots<F> {
    fn run(&self, index: u32) {
        // A waker left over from an earlier, larger pool may name a slot that this one does not have.
        let Some(slot) = self.slots.get(index as usize) else {
            return;
        };
        if slot.state.get() != SlotState::Idle {
            return;
        }
        slot.state.set(SlotState::Running);
        // SAFETY: the state says that there is a future, and that nobody else refers to it: `Running` keeps a second
        // `run` away, and dropping waits until the run loop lets go of us. It never moves: it was written into
        // the boxed slot and is dropped there.
        let future = unsafe { Pin::new_unchecked((*slot.future.get()).assume_init_mut()) };
        if future.poll(&mut Context::from_waker(&slot.waker)).is_pending() {
            slot.state.set(SlotState::Idle);
            return;
        }
        // SAFETY: initialised, as above, and left for vacant below.
        unsafe { (*slot.future.get()).assume_init_drop() };
        slot.state.set(SlotState::Vacant);
        self.free.borrow_mut().push(index);
        let waiting = if self.waiting.borrow().is_empty() {
            Vec::new()
        } else {
            self.waiting.take()
        };
        for waker in waiting {
            waker.wake();
        }
    }
}

impl<F> Drop for Slots<F> {
    fn drop(&mut self) {
        for slot in &self.slots {
            if slot.state.replace(SlotState::Vacant) != SlotState::Vacant {
                // SAFETY: the state said that there is a future; nobody is left who could refer to it. One that
                // panicked while it was polled is dropped like any other.
                unsafe { (*slot.future.get()).assume_init_drop() };
            }
        }
    }
}
