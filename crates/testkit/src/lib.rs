//! Clients, oracles, devices and suites for the tests and benchmarks of zbdkit.

pub mod client;
