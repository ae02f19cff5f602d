//! I/O for one thread: an executor and reactor over io_uring (or worker threads), buffers, files, guest memory.
//!
//! A thread makes its [`Runtime`] and runs futures on it with [`Runtime::block_on`]. Futures and buffers stay on
//! their thread; [`File`], [`Words`], [`mem::GuestMemory`], [`Remote`] and wakers may go anywhere.
//!
//! ```
//! use zbdkit_io::{File, FileKind, IoBuf, Runtime, RuntimeOptions};
//!
//! let runtime = Runtime::new(RuntimeOptions::default())?;
//! let file = File::from_fd(tempfile::tempfile()?.into(), FileKind::default());
//! runtime.block_on(async {
//!     file.write(IoBuf::from_vec(b"zone".to_vec()), 4096).await?;
//!     file.datasync().await?;
//!     let buf = IoBuf::alloc(8);
//!     file.read(buf.clone(), 4096).await?;
//!     assert_eq!(buf.to_vec(), b"zone\0\0\0\0");
//!     Ok::<(), std::io::Error>(())
//! })?;
//! # Ok::<(), std::io::Error>(())
//! ```
//!
//! All the project's `unsafe` code is in this crate (and in modules of tests and tools that map memory). Each module
//! that has some says why.

mod buf;
mod file;
mod inplace;
pub mod mem;
mod nvme;
mod runtime;
mod sys;
mod unblock;
pub mod unix;
mod words;

pub use buf::{BUF_ALIGN, IoBuf, Segment};
pub use file::{File, FileKind, LocalBoxFuture, Storage, StorageOp};
pub use mem::{GuestMemory, MemGuard};
pub use nvme::{NvmeCommand, NvmeCompletion, NvmeQueue};
pub use runtime::{
    Backend, BackendKind, OnPanic, PollRegistration, PollSource, Remote, Runtime, RuntimeOptions, Sleep,
    TaskPool, add_poll_source, readable, sleep, spawn, submit, yield_now,
};
pub use unblock::unblock;
pub use words::{SharedDwords, WordStore, Words};
