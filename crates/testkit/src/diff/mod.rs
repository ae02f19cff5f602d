//! The qcow2 driver and QEMU change the same images in turn, and must agree on what they hold.
//!
//! A *sequence* comes from a seed: a chain of images with all of the format's options, and steps that change it, each
//! by one of the *hands* (QEMU's tools, or our driver). A model in memory says what every image and every snapshot
//! must hold. In between and in the end each hand reads and checks the images by itself: contents are the model's,
//! and `check` finds neither an error nor a leak. What goes wrong is made short before it is told, by leaving out
//! steps and requests as long as something still goes wrong.
//!
//! One sequence in eight is about an image with zones ([`zoned`]), which QEMU can only be asked about.

pub mod content;
pub mod damage;
pub mod forged;
pub mod hand;
pub mod layout;
pub mod ours;
pub mod program;
pub mod requests;
pub mod run;
pub mod sequence;
pub mod shuffled;
pub mod tools;
pub mod world;
pub mod zoned;
