//! NVM Express: what is common to all of it, the NVM command set, and zoned namespaces.
//!
//! [`base`], [`command`], [`controller`], [`admin`], [`feature`] and [`log`] follow the Base Specification 2.1,
//! [`nvm`] the NVM Command Set Specification 1.1, [`zns`] the Zoned Namespace Command Set Specification 1.2; all integers are little-endian. A field whose name ends in `_z` is
//! 0-based, as the specifications call it: it holds one less than it means.

pub mod admin;
pub mod base;
pub mod command;
pub mod controller;
pub mod feature;
pub mod log;
pub mod nvm;
pub mod zns;

pub use base::Status;
