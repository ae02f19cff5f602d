//! vhost-user, the back-end side, for any virtio device.
//!
//! Our own, not the `vhost` crate's handler, which knows neither SET_STATUS nor GET_STATUS. A message is put
//! together ([`zbdkit_io::unix::Stream`]), parsed whole ([`message`]) and only then acted on ([`session`]); the device is
//! behind a trait ([`backend`]). Whatever a front-end sends costs it at most its own connection.

pub mod backend;
pub mod message;
pub mod session;
pub mod wire;
