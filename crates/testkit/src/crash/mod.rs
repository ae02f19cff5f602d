//! What may be left after a crash, and whether that is allowed: the proof of the promises about data.
//!
//! - [`disk`]: files, what of them is durable, and what a kill or a power cut may leave.
//! - [`host`]: a machine (`zbdkit_block::Host`) over such files that records every event and ends operations in any
//!   order that a seed says. It can fail operations, and lie.
//! - [`image`]: raw and qcow2 images there, with what lies below and before them.
//! - [`run`]: opens an image there by the real way, lets clients work ([`workload`]), closes it; [`steps`] are what is
//!   done to it between such runs.
//! - [`oracle`]: what was asked and answered, and stamps that tell whose every sector is.
//! - [`judge`]: whether what a reopened image shows is allowed after that.
//! - [`suite`]: campaigns of many histories and crashes; replays of one state.
//!
//! A history is recorded once, to its end, and then crashed many times: at event `n` of it the disk is what the first
//! `n` events make of the one it began with, and the requests and answers that count are those noted before. So no
//! task is ever dropped half-way, and a state is named by the history's seed and its number.

pub mod bare;
pub mod choose;
pub mod disk;
mod format;
pub mod host;
pub mod image;
pub mod judge;
pub mod oracle;
mod qcow2;
pub mod run;
pub mod steps;
pub mod suite;
pub mod workload;
