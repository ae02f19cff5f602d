//! vfio-user, the server side, for any device: protocol, guest memory and interrupts, and nothing of what the device is.
//!
//! A message is put together ([`zbdkit_io::unix::Stream`]), parsed whole ([`message`]) and only then acted on ([`session`]). The device is
//! behind a trait ([`Device`]); it reaches guest memory through [`Dma`] and signals through [`Interrupts`], both from any
//! thread. Whatever a client sends costs it at most its own connection.
//!
//! What this server does not do: migration, dirty page tracking, DEVICE_GET_REGION_IO_FDS, and twin sockets. It takes
//! REGION_WRITE_MULTI but does not advertise it, since QEMU changes how it sends everything else where a server does.

mod device;
mod dma;
mod irq;
mod line;
pub mod message;
mod peer;
mod server;
pub mod session;

pub use device::{Device, Link, Mmap, Region, Stuck};
pub use dma::{Dma, DmaError};
pub use irq::{Interrupts, IrqKind};
pub use line::{Heard, Line, PostedWrite};
pub use server::{Event, ServeError, Server, ServerHandle};
