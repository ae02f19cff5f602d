//! An NVM subsystem: namespaces, and what its controllers have in common.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use uuid::{Builder, Uuid};

use crate::controller::Controller;
use crate::namespace::Namespace;

/// What a subsystem is known by.
#[derive(Clone, Debug)]
pub struct SubsystemOptions {
    /// NVMe qualified name, at most 223 bytes.
    pub nqn: String,
    /// Serial number, at most 20 printable ASCII characters.
    pub serial: String,
    /// Model number, at most 40 printable ASCII characters.
    pub model: String,
    /// Firmware revision, at most 8 printable ASCII characters.
    pub firmware: String,
}

/// A subsystem that cannot be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SubsystemError {
    /// One of the names has no place in Identify Controller.
    #[error("{what} \"{value}\" is not 1 to {max} printable ASCII characters")]
    Name {
        /// Which.
        what: &'static str,
        /// As given.
        value: String,
        /// Its place in bytes.
        max: usize,
    },
    /// There is nothing in it, or too much.
    #[error("{0} namespaces: a subsystem has 1 to {MAX_NAMESPACES}")]
    Namespaces(usize),
    /// Hosts would take two namespaces for one.
    #[error("namespaces {first} and {second} have the same UUID, {uuid}: one of them needs another")]
    SameUuid {
        /// The identifier of one.
        first: u32,
        /// And of the other.
        second: u32,
        /// What both are known by.
        uuid: Uuid,
    },
}

/// Most namespaces of a subsystem: as many as a Changed Namespace List or an Identify list can tell.
pub const MAX_NAMESPACES: usize = 1024;

/// An NVM subsystem. Its namespaces are numbered from 1 as they were given.
pub struct Subsystem {
    pub(crate) options: SubsystemOptions,
    namespaces: Box<[Namespace]>,
    controllers: Mutex<Vec<Weak<Controller>>>,
}

impl Subsystem {
    /// Makes a subsystem.
    ///
    /// # Errors
    /// Names that do not fit, no namespaces or too many, two with the same UUID.
    pub fn new(
        options: SubsystemOptions,
        namespaces: Vec<Namespace>,
    ) -> Result<Arc<Subsystem>, SubsystemError> {
        check_name("NQN", &options.nqn, 223)?;
        check_name("serial number", &options.serial, 20)?;
        check_name("model number", &options.model, 40)?;
        check_name("firmware revision", &options.firmware, 8)?;
        if namespaces.is_empty() || namespaces.len() > MAX_NAMESPACES {
            return Err(SubsystemError::Namespaces(namespaces.len()));
        }
        let subsystem = Arc::new(Subsystem {
            options,
            namespaces: namespaces.into(),
            controllers: Mutex::default(),
        });
        subsystem.check_uuids()?;
        subsystem.watch();
        Ok(subsystem)
    }

    fn check_uuids(&self) -> Result<(), SubsystemError> {
        let mut known = BTreeMap::new();
        for (second, namespace) in self.numbered() {
            let uuid = self.uuid(second, namespace);
            if let Some(first) = known.insert(uuid, second) {
                return Err(SubsystemError::SameUuid { first, second, uuid });
            }
        }
        Ok(())
    }

    /// Has hosts told of what an operator does to zones.
    fn watch(self: &Arc<Subsystem>) {
        for (nsid, namespace) in self.numbered() {
            let Some(zones) = namespace.zones() else {
                continue;
            };
            let (subsystem, size) = (Arc::downgrade(self), zones.size);
            namespace.device.watch(Arc::new(move |zone| {
                let start = u64::from(zone.0) * size;
                if let Some(subsystem) = subsystem.upgrade()
                    && !subsystem.does_itself(nsid, start)
                {
                    subsystem.zone_changed(nsid, start);
                }
            }));
        }
    }

    /// Whether a command of a host is what changes a zone.
    fn does_itself(&self, nsid: u32, start: u64) -> bool {
        self.namespace(nsid)
            .is_some_and(|namespace| namespace.changes_itself(start))
    }

    /// A namespace by its identifier.
    pub fn namespace(&self, nsid: u32) -> Option<&Namespace> {
        self.namespaces.get(index(nsid)?)
    }

    /// Its namespaces; the first has identifier 1.
    pub fn namespaces(&self) -> &[Namespace] {
        &self.namespaces
    }

    /// What a namespace is known by wherever it is: its own UUID, or one made of the subsystem's name and its number.
    pub(crate) fn uuid(&self, nsid: u32, namespace: &Namespace) -> Uuid {
        namespace
            .uuid()
            .unwrap_or_else(|| uuid_of_name(self.options.nqn.bytes().chain(nsid.to_le_bytes())))
    }

    /// A zone of a namespace became read-only or offline, or got attributes, without the host's doing: all controllers
    /// tell their hosts. `start` is the zone's first byte.
    pub fn zone_changed(&self, nsid: u32, start: u64) {
        if self.namespace(nsid).is_none() {
            return;
        }
        for controller in self.alive() {
            controller.events.zone_changed(nsid, start);
        }
    }

    /// Attributes of a namespace changed without the host's doing: all controllers tell their hosts.
    pub fn namespace_changed(&self, nsid: u32) {
        for controller in self.alive() {
            controller.events.namespace_changed(nsid);
        }
    }

    /// The namespaces with their identifiers.
    pub(crate) fn numbered(&self) -> impl Iterator<Item = (u32, &Namespace)> {
        (1..).zip(&self.namespaces)
    }

    /// Takes a controller in, made with the least identifier that is free.
    pub(crate) fn admit(&self, make: impl FnOnce(u16) -> Controller) -> Arc<Controller> {
        let mut controllers = self.controllers();
        controllers.retain(|controller| controller.strong_count() > 0);
        let taken: BTreeSet<u16> = controllers
            .iter()
            .filter_map(Weak::upgrade)
            .map(|other| other.id())
            .collect();
        let id = (0..u16::MAX).find(|id| !taken.contains(id)).unwrap_or(u16::MAX);
        let controller = Arc::new(make(id));
        controllers.push(Arc::downgrade(&controller));
        controller
    }

    /// The controllers that there are.
    pub(crate) fn alive(&self) -> Vec<Arc<Controller>> {
        self.controllers().iter().filter_map(Weak::upgrade).collect()
    }

    fn controllers(&self) -> MutexGuard<'_, Vec<Weak<Controller>>> {
        self.controllers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A UUID (version 8) for what has a name and no UUID: always the same one for the same name.
pub fn uuid_of_name(name: impl IntoIterator<Item = u8>) -> Uuid {
    Builder::from_custom_bytes(fnv1a(name.into_iter()).to_be_bytes()).into_uuid()
}

/// FNV-1a, 128 bits.
fn fnv1a(bytes: impl Iterator<Item = u8>) -> u128 {
    bytes.fold(0x6c62_272e_07bb_0142_62b8_2175_6295_c58d, |hash, byte| {
        (hash ^ u128::from(byte)).wrapping_mul(0x0000_0000_0100_0000_0000_0000_0000_013b)
    })
}

/// Place of a namespace in the list.
pub(crate) fn index(nsid: u32) -> Option<usize> {
    usize::try_from(nsid.checked_sub(1)?).ok()
}

fn check_name(what: &'static str, value: &str, max: usize) -> Result<(), SubsystemError> {
    let printable = value.bytes().all(|byte| (b' '..=b'~').contains(&byte));
    if value.is_empty() || value.len() > max || !printable {
        return Err(SubsystemError::Name {
            what,
            value: value.to_owned(),
            max,
        });
    }
    Ok(())
}
