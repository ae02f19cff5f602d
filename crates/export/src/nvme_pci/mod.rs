//! An NVMe controller as a PCI function, over vfio-user: the door for QEMU and Cloud Hypervisor as they are.
//!
//! The commands are `zbdkit_nvme`'s; here are configuration space, registers, queues in guest memory, doorbells, data
//! pointers and interrupts.
//!
//! Threads: the server's own takes messages; it answers register reads, and leaves what registers are written to the
//! *control* task, so that it never waits for the device. *Workers* serve the queues, one runtime each: a submission
//! queue lives on the worker of its completion queue, and nothing of either is shared but the doorbells. The control
//! task and the admin queue are on the first worker. Between two other messages, the worker that was rung last waits at the
//! client's socket (`line`), in place of the server's thread.

mod config;
mod control;
mod cq;
mod device;
mod front;
mod line;
mod oneshot;
mod pointer;
mod queues;
mod server;
mod sq;
mod transfer;
mod worker;

pub use crate::socket::Socket;
pub use server::{BindError, ServeError, ServeOptions, Server, ServerHandle};
