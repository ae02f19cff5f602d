//! The door for virtual machines: a virtio-blk device, zones included, over vhost-user.
//!
//! [`Server`] owns a listening socket and a thread for each queue. It serves one front-end at a time and outlives
//! all of them: when one goes, its requests come to rest, its memory is given up, and the next is served.
//! A second front-end that connects meanwhile waits; that is what lets a restarted virtual machine, or the
//! target of a migration on the same host, connect before the old one is gone.
//!
//! The guest is not believed: a request that makes no sense gets an error status, and one that cannot be
//! answered at all stops its queue (DEVICE_NEEDS_RESET), never the server.

mod execute;
mod model;
mod queue;
mod request;
mod server;
mod stats;
mod status;
mod thread;

pub use crate::socket::Socket;
pub use model::{Unsuitable, shown};
pub use server::{BindError, ServeError, ServeOptions, Server, ServerHandle};
pub use stats::Stats;
