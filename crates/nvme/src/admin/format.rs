//! Format NVM (Base Specification 2.1, 5.1.10): everything is erased; the format of blocks is the image's and stays.

use zbdkit_block::Lane;
use zbdkit_spec::nvme::Status;
use zbdkit_spec::nvme::command::NSID_ALL;

use super::AdminQueue;
use crate::namespace::Namespace;
use crate::status::{Failure, Kind, failure};

impl AdminQueue {
    pub(super) async fn format(
        &self,
        nsid: u32,
        format: u8,
        protection: bool,
        erase: u8,
    ) -> Result<u64, Failure> {
        // User data erase is what no erase does, too; there is nothing to erase cryptographically.
        if erase > 1 {
            return Err(Status::INVALID_FIELD.into());
        }
        if format != 0 || protection {
            return Err(Status::INVALID_FORMAT.into());
        }
        let all = self.controller.subsystem().numbered().zip(&self.lanes);
        let chosen: Vec<(&Namespace, &Lane)> = all
            .filter(|((number, namespace), _)| {
                (nsid == NSID_ALL || nsid == *number) && self.controller.is_active(namespace)
            })
            .map(|((_, namespace), lane)| (namespace, lane))
            .collect();
        if chosen.is_empty() {
            return Err(Status::INVALID_NAMESPACE_OR_FORMAT.into());
        }
        if chosen.iter().any(|(namespace, _)| namespace.read_only()) {
            return Err(Status::NAMESPACE_WRITE_PROTECTED.into());
        }
        for (namespace, lane) in chosen {
            let _formatting = Formatting::begin(namespace)?;
            erase_all(namespace, lane).await?;
        }
        Ok(0)
    }
}

async fn erase_all(namespace: &Namespace, lane: &Lane) -> Result<(), Failure> {
    if namespace.zones().is_some() {
        let result = namespace.device.reset_all(lane).await;
        result.map_err(|error| failure(&error, Kind::Write))?;
    } else {
        namespace
            .deallocate(lane, 0, namespace.device.limits().size)
            .await?;
    }
    namespace.flush(lane).await
}

/// A namespace that takes no commands while this lives.
struct Formatting<'a>(&'a Namespace);

impl Formatting<'_> {
    fn begin(namespace: &Namespace) -> Result<Formatting<'_>, Failure> {
        if namespace.begin_format() {
            Ok(Formatting(namespace))
        } else {
            Err(Status::FORMAT_IN_PROGRESS.into())
        }
    }
}

impl Drop for Formatting<'_> {
    fn drop(&mut self) {
        self.0.end_format();
    }
}
