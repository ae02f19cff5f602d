//! The header and its extensions.

use zbdkit_io::File;

use crate::error::Error;

/// How compressed clusters are compressed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Compression {
    /// Raw deflate, window of 4 KiB.
    #[default]
    Zlib,
    /// Zstandard.
    Zstd,
}

/// A header extension, as it lies in the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extension {
    /// What it is.
    pub magic: u32,
    /// Its data, without padding.
    pub data: Vec<u8>,
}

/// The decoded header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// Size of the device, bytes.
    pub size: u64,
    /// The cluster size is 1 << this.
    pub cluster_bits: u32,
    /// Refcounts are 1 << this bits wide.
    pub refcount_order: u32,
    /// 0, or how it is encrypted.
    pub crypt_method: u32,
    /// Entries of the L1 table.
    pub l1_size: u32,
    /// Where the L1 table lies, bytes.
    pub l1_offset: u64,
    /// Where the refcount table lies, bytes.
    pub refcount_table_offset: u64,
    /// Clusters of the refcount table.
    pub refcount_table_clusters: u32,
    /// Snapshots in the snapshot table.
    pub nb_snapshots: u32,
    /// Where the snapshot table lies, bytes.
    pub snapshots_offset: u64,
    /// Feature bits; who does not know one must not open the image.
    pub incompatible: u64,
    /// Feature bits that may be ignored.
    pub compatible: u64,
    /// Feature bits that a writer clears who does not know them.
    pub autoclear: u64,
    /// Of compressed clusters.
    pub compression: Compression,
    /// What lies below.
    pub backing_file: Option<String>,
    /// Extensions in the file's order, unknown ones too, without the feature name table.
    pub extensions: Vec<Extension>,
}

impl Header {
    /// Bytes of a cluster.
    pub fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Reads and checks the header of an image.
    pub async fn read(_file: &File) -> Result<Header, Error> {
        Err(Error::NotQcow2)
    }
}
