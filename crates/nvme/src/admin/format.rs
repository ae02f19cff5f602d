//! Format NVM (Base Specification 2.1, 5.1.10): everything is erased, and zoned namespaces may get blocks of another size.
//!
//! From its start on the namespace refuses commands. Those that it has taken before are not waited for: each is held against
//! what it finds in its zone, so it is carried out before the format, or after it as if it had come then, or refused. The
//! specification leaves that to the controller, and hosts let none be under way.

use zbdkit_block::Lane;
use zbdkit_spec::nvme::Status;
use zbdkit_spec::nvme::command::NSID_ALL;

use super::AdminQueue;
use crate::namespace::Namespace;
use crate::status::Failure;
use crate::zones;

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
        if protection {
            return Err(Status::INVALID_FORMAT.into());
        }
        let all = self.controller.subsystem().numbered().zip(&self.lanes);
        let chosen: Vec<Chosen<'_>> = all
            .filter(|((number, namespace), _)| {
                (nsid == NSID_ALL || nsid == *number) && self.controller.is_active(namespace)
            })
            .map(|((nsid, namespace), lane)| {
                let block_size = namespace.formats().0.get(usize::from(format)).copied();
                Ok(Chosen {
                    nsid,
                    namespace,
                    lane,
                    block_size: block_size.ok_or(Status::INVALID_FORMAT)?,
                })
            })
            .collect::<Result<_, Status>>()?;
        if chosen.is_empty() {
            return Err(Status::INVALID_NAMESPACE_OR_FORMAT.into());
        }
        if chosen.iter().any(|chosen| chosen.namespace.read_only()) {
            return Err(Status::NAMESPACE_WRITE_PROTECTED.into());
        }
        for chosen in &chosen {
            self.format_one(chosen).await?;
        }
        Ok(0)
    }

    async fn format_one(&self, chosen: &Chosen<'_>) -> Result<(), Failure> {
        let Chosen {
            nsid,
            namespace,
            lane,
            block_size,
        } = *chosen;
        let _formatting = Formatting::begin(namespace)?;
        let before = namespace.device.block_size();
        erase_all(namespace, lane, block_size).await?;
        if block_size != before {
            self.controller.tell_others(nsid);
        }
        Ok(())
    }
}

/// A namespace to be formatted.
struct Chosen<'a> {
    nsid: u32,
    namespace: &'a Namespace,
    lane: &'a Lane,
    /// What its blocks will have, bytes.
    block_size: u32,
}

async fn erase_all(namespace: &Namespace, lane: &Lane, block_size: u32) -> Result<(), Failure> {
    if namespace.zones().is_some() {
        zones::format(namespace, lane, block_size).await?;
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
