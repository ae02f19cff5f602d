//! Clients, oracles, devices and suites for the tests and benchmarks of zbdkit.

pub mod client;
pub mod crash;
pub mod kill;
