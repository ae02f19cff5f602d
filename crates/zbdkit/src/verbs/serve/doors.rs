//! The one place that knows how each kind of door is made.

use anyhow::{Context, ensure};
use uuid::Uuid;
use zbdkit_block::{Device, format_size};
use zbdkit_export::{Socket, nvme_pci, vhost_user_blk};
use zbdkit_io::BackendKind;
use zbdkit_nvme::{Namespace, NamespaceOptions, Subsystem, SubsystemOptions};

use super::hints::{Client, Hint};
use super::identity::{Identity, Image};
use super::service::Handed;
use super::{DevicePlan, DoorKind, DoorPlan, MaxTransfer, SYSTEMD};

/// A bound socket with what is behind it.
pub(super) struct Door {
    pub(super) server: Server,
    pub(super) hint: Hint,
}

/// A server of any kind.
pub(super) enum Server {
    VhostUserBlk(vhost_user_blk::Server),
    Nvme(nvme_pci::Server),
}

/// Ends a server.
pub(super) enum Handle {
    VhostUserBlk(vhost_user_blk::ServerHandle),
    Nvme(nvme_pci::ServerHandle),
}

impl Server {
    pub(super) fn io_backend(&self) -> &BackendKind {
        match self {
            Server::VhostUserBlk(server) => server.io_backend(),
            Server::Nvme(server) => server.io_backend(),
        }
    }

    pub(super) fn handle(&self) -> Handle {
        match self {
            Server::VhostUserBlk(server) => Handle::VhostUserBlk(server.handle()),
            Server::Nvme(server) => Handle::Nvme(server.handle()),
        }
    }

    pub(super) fn run(self) -> anyhow::Result<()> {
        match self {
            Server::VhostUserBlk(server) => Ok(server.run()?),
            Server::Nvme(server) => Ok(server.run()?),
        }
    }
}

impl Handle {
    pub(super) fn shutdown(&self) {
        match self {
            Handle::VhostUserBlk(handle) => handle.shutdown(),
            Handle::Nvme(handle) => handle.shutdown(),
        }
    }
}

impl Door {
    pub(super) fn bind(
        plan: &DoorPlan,
        devices: Vec<(Device, &DevicePlan)>,
        handed: &mut Handed,
    ) -> anyhow::Result<Door> {
        let (handed, socket) = if plan.socket.as_os_str() == SYSTEMD {
            let (fd, path) = handed.next()?;
            (Some(fd), path)
        } else {
            (None, Some(crate::image::absolute(&plan.socket)))
        };
        let listening = match handed {
            Some(fd) => Socket::Listening(fd),
            None => Socket::Path(plan.socket.clone()),
        };
        let (server, client) = match plan.kind {
            DoorKind::VhostUserBlk { queue_size } => {
                let (device, _) = devices.into_iter().next().context("there is no image")?;
                vhost_user_blk(plan, device, queue_size, listening)?
            }
            DoorKind::Nvme { max_transfer, polls } => (
                nvme(plan, devices, max_transfer, polls, listening)?,
                Client::VfioUser,
            ),
        };
        Ok(Door {
            server,
            hint: Hint { socket, client },
        })
    }
}

fn vhost_user_blk(
    plan: &DoorPlan,
    device: Device,
    queue_size: u16,
    socket: Socket,
) -> anyhow::Result<(Server, Client)> {
    let queues = plan.queues.unwrap_or_else(threads);
    let client = Client::VhostUserBlk {
        queues,
        queue_size,
        zoned: device.limits().zoned.is_some(),
    };
    let options = vhost_user_blk::ServeOptions {
        queues,
        queue_size,
        serial: serial(plan, &device),
        busy_poll: plan.poll,
        ..vhost_user_blk::ServeOptions::new(socket)
    };
    let server = vhost_user_blk::Server::bind(device, options)?;
    Ok((Server::VhostUserBlk(server), client))
}

fn nvme(
    plan: &DoorPlan,
    devices: Vec<(Device, &DevicePlan)>,
    max_transfer: MaxTransfer,
    polls: bool,
    socket: Socket,
) -> anyhow::Result<Server> {
    let files: Vec<_> = devices.iter().map(|(_, image)| image.graph.filename()).collect();
    let images = devices.iter().zip(&files).map(|((device, image), file)| Image {
        own: uuid_of(device),
        given: image.shown.uuid,
        name: &image.name,
        file: file.as_deref(),
    });
    let Identity {
        subsystem,
        namespaces,
    } = Identity::of(&images.collect::<Vec<_>>());
    let names = SubsystemOptions {
        nqn: format!("nqn.2014-08.org.nvmexpress:uuid:{subsystem}"),
        serial: plan.serial.clone().unwrap_or_else(|| serial_of(subsystem)),
        model: "zbdkit".to_owned(),
        firmware: env!("CARGO_PKG_VERSION").to_owned(),
    };
    let namespace = |(index, ((device, image), uuid)): (usize, ((Device, &DevicePlan), Uuid))| {
        let options = NamespaceOptions {
            uuid: Some(uuid),
            read_across_zones: image.shown.read_across_zones,
        };
        let namespace = Namespace::new(device, &options);
        let namespace = namespace.with_context(|| format!("namespace {}", index + 1))?;
        let least = namespace.least_transfer();
        ensure!(
            least <= max_transfer.bytes(),
            "namespace {}: a report of one zone with its descriptor extension has {least} bytes, and commands of this \
             controller transfer {}: let them transfer {} (--max-transfer, or max-transfer in a configuration file)",
            index + 1,
            format_size(max_transfer.bytes()),
            format_size(least.next_power_of_two())
        );
        Ok(namespace)
    };
    let namespaces = devices
        .into_iter()
        .zip(namespaces)
        .enumerate()
        .map(namespace)
        .collect::<anyhow::Result<_>>()?;
    let options = nvme_pci::ServeOptions::new(socket);
    let io_queues = plan.queues.unwrap_or(options.io_queues);
    let options = nvme_pci::ServeOptions {
        io_queues,
        // One that never sleeps is enough.
        threads: if polls { 1 } else { threads().min(io_queues) },
        busy_poll: plan.poll,
        polls,
        max_transfer: max_transfer.0,
        ..options
    };
    let subsystem = Subsystem::new(names, namespaces)?;
    Ok(Server::Nvme(nvme_pci::Server::bind(subsystem, options)?))
}

/// As the user says, or of the image's UUID.
fn serial(plan: &DoorPlan, device: &Device) -> String {
    match (&plan.serial, uuid_of(device)) {
        (Some(serial), _) => serial.clone(),
        (None, Some(uuid)) => serial_of(uuid),
        (None, None) => "zbdkit".to_owned(),
    }
}

/// As much of a UUID as a serial number has room for.
fn serial_of(uuid: Uuid) -> String {
    uuid.simple().to_string()[..20].to_owned()
}

fn uuid_of(device: &Device) -> Option<Uuid> {
    device.status().map(|status| status.uuid)
}

fn threads() -> u16 {
    std::thread::available_parallelism().map_or(1, |n| n.get().min(4) as u16)
}
