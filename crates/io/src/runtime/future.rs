//! Futures of operations.

use std::future::{Future, poll_fn};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

use super::ops::{Kind, Request};
use super::{Inner, with_current};
use crate::file::File;

/// An operation: started by the first poll, and not stopped by dropping this.
pub(crate) struct Operation<'a> {
    state: State,
    /// Whose descriptor it is; kept open for a dropped operation.
    file: Option<&'a File>,
}

enum State {
    New(Request),
    Waiting(Rc<Inner>, u32),
    Over,
}

impl<'a> Operation<'a> {
    pub(crate) fn new(request: Request, file: Option<&'a File>) -> Operation<'a> {
        Operation {
            state: State::New(request),
            file,
        }
    }
}

impl Operation<'_> {
    /// The outcome as the reactor has it: zero, a status or a negative errno, and a result.
    pub(crate) async fn outcome(mut self) -> (i32, u64) {
        poll_fn(|cx| self.advance(cx)).await
    }

    fn advance(&mut self, cx: &mut Context<'_>) -> Poll<(i32, u64)> {
        match std::mem::replace(&mut self.state, State::Over) {
            State::New(request) => {
                let inner = with_current(Rc::clone);
                let index = inner.reactor.borrow_mut().start(request, cx.waker().clone());
                self.state = State::Waiting(inner, index);
                Poll::Pending
            }
            State::Waiting(inner, index) => {
                let outcome = inner.reactor.borrow_mut().poll(index, cx);
                if outcome.is_pending() {
                    self.state = State::Waiting(inner, index);
                }
                outcome
            }
            State::Over => panic!("an operation was polled after its end"),
        }
    }
}

impl Future for Operation<'_> {
    type Output = io::Result<()>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.advance(cx).map(|(result, _)| match result {
            0 => Ok(()),
            error => Err(io::Error::from_raw_os_error(-error)),
        })
    }
}

impl Drop for Operation<'_> {
    fn drop(&mut self) {
        if let State::Waiting(inner, index) = &self.state {
            let file = self.file.cloned();
            let waker = inner.reactor.borrow_mut().abandon(*index, file);
            drop(waker);
        }
    }
}

/// Waits until the descriptor is readable (or has an error or a hang-up, which a read then tells).
pub async fn readable(fd: BorrowedFd<'_>) -> io::Result<()> {
    let fd = fd.as_raw_fd();
    Operation::new(
        Request {
            kind: Kind::Poll,
            fd,
            offset: 0,
            len: 0,
            align: 1,
            buf: None,
        },
        None,
    )
    .await
}

/// Lets every other ready task run and the I/O go on before this task continues.
pub async fn yield_now() {
    struct YieldNow(bool);

    impl Future for YieldNow {
        type Output = ();

        fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
            if std::mem::replace(&mut self.0, true) {
                return Poll::Ready(());
            }
            with_current(|inner| inner.deferred.borrow_mut().push(cx.waker().clone()));
            Poll::Pending
        }
    }

    YieldNow(false).await;
}
