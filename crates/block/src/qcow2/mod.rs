//! The format `qcow2` in the graph: the node, what an image may open below itself, and zones inside the image.

mod ahead;
mod create;
mod directory;
mod extension;
mod gate;
mod look;
mod node;
mod offline;
mod ours;
mod words;
mod zones;

pub use create::{Qcow2CreateOptions, Qcow2Created, create_qcow2};
pub use gate::ImageFormat;
pub(crate) use gate::{Chain, backing_format, resolve};
pub(crate) use look::{Look, zones_make_sense};
pub(crate) use node::NodeBacking;
pub use node::{BackingImage, Qcow2Node};
pub(crate) use zones::{Described, open, open_snapshot};
