//! A zoned namespace of an NVMe drive, talked to by commands of our own through its character device (`/dev/ng0n1`):
//! what the block device does not give, appends that the drive places, zone random write areas and descriptor
//! extensions. The block layer of the kernel is not asked, and does not notice.

mod facts;
mod namespace;
mod open;
mod report;
mod status;
mod storage;

use std::path::PathBuf;
use std::sync::Arc;

use zbdkit_io::{File, IoBuf};
use zbdkit_spec::nvme::zns::SendAction;
use zbdkit_zone::{Model, ZoneInfo};

pub use facts::{KernelLimits, NamespaceFacts, ZrwaFacts};
use namespace::Namespace;
use storage::NamespaceStorage;

pub(crate) use open::is_nvme_namespace;

use super::drive::{Drive, DriveFacts};
use super::sysfs::ZoneFacts;
use crate::error::{Error, OpenError};
use crate::node::{Request, ZoneOp};

/// A zoned namespace.
pub struct NvmeDrive {
    facts: DriveFacts,
    namespace: Arc<Namespace>,
    /// The namespace as a file.
    file: File,
    /// The namespace's block device, held so that nobody else takes it meanwhile.
    _claim: Option<std::fs::File>,
}

impl NvmeDrive {
    /// The drive behind namespace `nsid` of `device`, a character device of NVMe.
    ///
    /// # Errors
    /// The drive does not answer, has no such namespace, or one without zones or that is formatted in a way that
    /// is not supported: metadata, protection information.
    pub async fn new(
        path: PathBuf,
        device: File,
        nsid: u32,
        read_only: bool,
        kernel: KernelLimits,
    ) -> Result<NvmeDrive, OpenError> {
        let namespace = match Namespace::identify(device, nsid, kernel).await? {
            Ok(namespace) => Arc::new(namespace),
            Err(problem) => return Err(OpenError::data(&path, problem.to_string())),
        };
        let about = &namespace.facts;
        let facts = DriveFacts {
            path,
            size: about.size,
            block_size: about.block_size,
            read_only: read_only || about.write_protected,
            zones: ZoneFacts {
                model: Model::HostManaged,
                zone_size: about.zone_size,
                nr_zones: about.nr_zones,
                max_open: about.max_open,
                max_active: about.max_active,
                max_append: about.max_append,
                write_granularity: about.block_size,
            },
            zns: about.zns(),
        };
        Ok(NvmeDrive {
            facts,
            file: File::custom(Arc::new(NamespaceStorage::new(namespace.clone()))),
            namespace,
            _claim: None,
        })
    }

    /// What the namespace says of itself.
    pub fn namespace(&self) -> &NamespaceFacts {
        &self.namespace.facts
    }

    /// Opens the zone explicitly with a zone random write area, which takes one of the namespace's
    /// ([`ZrwaFacts::areas`]) until the zone is full or reset. Only from empty, or closed with a write pointer that is a
    /// multiple of [`ZrwaFacts::granularity`] from its start (ZNS 1.2, 5.7).
    async fn open_with_zrwa(&self, zone_start: u64) -> Result<(), Error> {
        if self.namespace.facts.zrwa.is_none() {
            return Err(Error::NotSupported("a zone random write area"));
        }
        self.namespace.open_with_zrwa(zone_start).await
    }

    async fn attach_extension(&self, zone_start: u64, extension: &[u8], zrwa: bool) -> Result<(), Error> {
        let size = self.namespace.facts.extension_size;
        if size == 0 {
            return Err(Error::NotSupported("zone descriptor extensions"));
        }
        if extension.len() > size {
            return Err(Error::Io {
                op: "setting a zone descriptor extension",
                errno: libc::EINVAL,
            });
        }
        if zrwa && self.namespace.facts.zrwa.is_none() {
            return Err(Error::NotSupported("a zone random write area"));
        }
        self.namespace.set_extension(zone_start, extension, zrwa).await
    }
}

impl Drive for NvmeDrive {
    fn facts(&self) -> &DriveFacts {
        &self.facts
    }

    fn file(&self) -> &File {
        &self.file
    }

    fn report<'a>(&'a self, from: u64, max: usize) -> Request<'a, Vec<ZoneInfo>> {
        Box::pin(self.namespace.report(from, max))
    }

    fn zone_op<'a>(&'a self, op: ZoneOp, zone_start: u64, _len: u64) -> Request<'a, ()> {
        let (name, action) = match op {
            ZoneOp::Open => ("zone open", SendAction::OPEN),
            // An opened zone without data becomes closed, whatever is asked: the drive knows nothing else.
            ZoneOp::Close(_) => ("zone close", SendAction::CLOSE),
            ZoneOp::Finish | ZoneOp::FinishUnlimited => ("zone finish", SendAction::FINISH),
            ZoneOp::Reset => ("zone reset", SendAction::RESET),
            // The drive does it to read-only zones.
            ZoneOp::SetOffline => ("zone offline", SendAction::OFFLINE),
            ZoneOp::OpenZrwa => return Box::pin(self.open_with_zrwa(zone_start)),
            ZoneOp::SetReadOnly | ZoneOp::SetNormal => {
                return Box::pin(async { Err(Error::NotSupported("setting a zone's condition")) });
            }
            ZoneOp::FinishByDevice | ZoneOp::Recommend(_) => {
                return Box::pin(async { Err(Error::NotSupported("setting a zone's attributes")) });
            }
        };
        Box::pin(self.namespace.manage(name, action, zone_start))
    }

    fn reset_all<'a>(&'a self) -> Request<'a, ()> {
        Box::pin(self.namespace.reset_all())
    }

    fn has_append(&self) -> bool {
        true
    }

    fn append<'a>(&'a self, buf: IoBuf, zone_start: u64) -> Request<'a, u64> {
        Box::pin(self.namespace.append(buf, zone_start))
    }

    fn commit_zrwa<'a>(&'a self, end: u64) -> Request<'a, ()> {
        match self.namespace.facts.zrwa {
            Some(zrwa) if zrwa.explicit_flush => Box::pin(self.namespace.flush_zrwa(end)),
            _ => Box::pin(async { Err(Error::NotSupported("committing a zone random write area")) }),
        }
    }

    fn set_extension<'a>(&'a self, zone_start: u64, extension: &'a [u8], zrwa: bool) -> Request<'a, ()> {
        Box::pin(self.attach_extension(zone_start, extension, zrwa))
    }

    fn extension<'a>(&'a self, zone_start: u64) -> Request<'a, Option<Vec<u8>>> {
        match self.namespace.facts.extension_size {
            0 => Box::pin(async { Err(Error::NotSupported("zone descriptor extensions")) }),
            _ => Box::pin(self.namespace.extension(zone_start)),
        }
    }
}
