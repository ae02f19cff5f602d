//! What can go wrong between a client and its server.

use std::io;

use super::request::Status;

/// An error of the client or of its server.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClientError {
    /// The server did not do it before the deadline.
    #[error("timed out waiting for {0}")]
    Timeout(&'static str),
    /// The server closed the connection.
    #[error("the server closed the connection while {0}")]
    Closed(&'static str),
    /// The server broke the vhost-user protocol.
    #[error("vhost-user protocol: {0}")]
    Protocol(String),
    /// A message that was acknowledged with an error.
    #[error("the server refused {message} with {value}")]
    Refused {
        /// Name of the message.
        message: &'static str,
        /// The number in the acknowledgement, not zero.
        value: u64,
    },
    /// FEATURES_OK was withheld.
    #[error("the server did not accept features {features:#x}: device status {status:#x}")]
    FeaturesNotOk {
        /// Features that were set.
        features: u64,
        /// Device status read back.
        status: u64,
    },
    /// The used ring named a chain that was not in flight.
    #[error("the used ring names descriptor {0}, which is not in flight")]
    UnexpectedUsed(u32),
    /// A request completed with another status than OK.
    #[error("request failed: {0}")]
    Status(Status),
    /// The request does not fit the client's slots or descriptors.
    #[error("request too large for this client: {0}")]
    TooLarge(String),
    /// The client cannot do this with the engine in use.
    #[error("not possible with this engine: {0}")]
    Engine(&'static str),
    /// Every slot, or every descriptor, is in flight.
    #[error("queue full")]
    QueueFull,
    /// A zone report that does not hold what it says.
    #[error("zone report: {0}")]
    Report(String),
    /// A system call failed.
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl From<rustix::io::Errno> for ClientError {
    fn from(errno: rustix::io::Errno) -> Self {
        ClientError::Io(errno.into())
    }
}
