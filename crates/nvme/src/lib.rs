//! NVM Express: a subsystem, its controllers and its namespaces, conventional and zoned, over devices of the block
//! graph. Base Specification 2.1, NVM Command Set 1.1, Zoned Namespace Command Set 1.2.
//!
//! Neither PCI nor TCP is here. A transport owns queues, doorbells and interrupts; it takes submission entries from
//! its queues, has them executed by [`IoQueue::execute`] and [`AdminQueue::execute`], and puts what they return into
//! its completion queues. What it knows of memory it brings as a [`Transfer`], what it knows of queues as a
//! [`QueueControl`].
//!
//! 1. A [`Subsystem`] is made of [`Namespace`]s, and [`Controller`]s of it.
//! 2. The transport shows [`Controller::capabilities`] and the like, and hands each write of CC to
//!    [`Controller::configure`], which says what is to be done with the queues.
//! 3. Each queue of the transport gets an [`IoQueue`] (or the [`AdminQueue`]) on its own thread. Any number of
//!    commands may be executing at once; none of the hot ones takes a lock or allocates.

mod admin;
mod command;
mod controller;
mod copy;
mod data;
mod error_log;
mod events;
mod features;
mod namespace;
mod queue;
mod stats;
mod status;
mod subsystem;
mod transport;
mod turn;
mod zones;

pub use admin::{AdminCommand, AdminQueue, GetLog, Select};
pub use command::{Blocks, IoCommand};
pub use controller::{Change, Controller, ControllerOptions};
pub use namespace::{Namespace, NamespaceError, NamespaceOptions, Zones};
pub use queue::IoQueue;
pub use status::{Completion, Failure};
pub use subsystem::{Subsystem, SubsystemError, SubsystemOptions, uuid_of_name};
pub use transport::{CreateCq, CreateSq, Direction, QueueControl, Transfer};
