//! New images.

use zbdkit_io::File;

use crate::error::Error;
use crate::header::{Compression, Header};

/// What of a new image gets its space at once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Preallocation {
    /// Nothing.
    #[default]
    Off,
    /// The mapping.
    Metadata,
    /// The mapping, and the data's space.
    Falloc,
    /// The mapping, and data of written zeros.
    Full,
}

/// What a new image is like.
#[derive(Clone, Debug)]
pub struct Layout {
    /// 2 or 3.
    pub version: u32,
    /// Size of the device, bytes.
    pub size: u64,
    /// Bytes.
    pub cluster_size: u64,
    /// 1 to 64.
    pub refcount_bits: u32,
    /// Clusters in 32 parts of their own.
    pub extended_l2: bool,
    /// Of compressed clusters.
    pub compression: Compression,
    /// The compatible feature: refcounts may be late.
    pub lazy_refcounts: bool,
    /// Name and format of the backing image.
    pub backing: Option<(String, Option<String>)>,
    /// Name of the external data file.
    pub data_file: Option<String>,
    /// The external data file is to be a raw image of its own.
    pub data_file_raw: bool,
    /// What gets its space at once.
    pub preallocation: Preallocation,
}

/// Makes an image in an empty file, synced.
pub async fn create(_file: &File, _data: Option<&File>, _layout: &Layout) -> Result<Header, Error> {
    Err(Error::NotQcow2)
}
