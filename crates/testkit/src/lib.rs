//! Clients, oracles, devices and suites for the tests and benchmarks of zbdkit.

pub mod client;
pub mod conformance;
pub mod crash;
pub mod diff;
pub mod drive;
pub mod fault;
pub mod kill;
pub mod namespace;
pub mod nvme;
pub mod reported;
