//! The configuration file: several devices and doors in one process.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use serde::Deserialize;
use uuid::Uuid;
use zbdkit_block::{Graph, did_you_mean};

use super::namespace::Shown;
use super::{
    DEFAULT_POLL_US, DEFAULT_QUEUE_SIZE, DevicePlan, DoorKind, DoorPlan, MaxTransfer, Plan, max_transfer,
    open_options,
};

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct File {
    control: Option<PathBuf>,
    #[serde(default)]
    device: Vec<DeviceEntry>,
    #[serde(default)]
    nvme: Vec<NvmeEntry>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct DeviceEntry {
    image: String,
    #[serde(default)]
    read_only: bool,
    #[serde(default)]
    direct: bool,
    #[serde(default = "beside")]
    run_state: String,
    #[serde(default)]
    vhost_user_blk: Vec<DoorEntry>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct DoorEntry {
    socket: PathBuf,
    queues: Option<u16>,
    #[serde(default = "queue_size")]
    queue_size: u16,
    serial: Option<String>,
    #[serde(default = "poll_us")]
    poll_us: u32,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct NvmeEntry {
    socket: PathBuf,
    queues: Option<u16>,
    serial: Option<String>,
    #[serde(default = "poll_us")]
    poll_us: u32,
    #[serde(default)]
    poll: bool,
    max_transfer: Option<String>,
    #[serde(default)]
    namespace: Vec<NamespaceEntry>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct NamespaceEntry {
    image: String,
    #[serde(default)]
    read_only: bool,
    #[serde(default)]
    direct: bool,
    #[serde(default = "beside")]
    run_state: String,
    uuid: Option<String>,
    #[serde(default)]
    read_across_zones: bool,
}

fn beside() -> String {
    "beside".to_owned()
}

fn queue_size() -> u16 {
    DEFAULT_QUEUE_SIZE
}

fn poll_us() -> u32 {
    DEFAULT_POLL_US
}

/// Reads what is to be served.
pub fn read(path: &Path) -> anyhow::Result<Plan> {
    let context = || path.display().to_string();
    let text = std::fs::read_to_string(path).with_context(context)?;
    plan(&text).with_context(context)
}

fn plan(text: &str) -> anyhow::Result<Plan> {
    let file: File = toml::from_str(text).map_err(|error| anyhow::anyhow!(explain(&error)))?;
    anyhow::ensure!(
        !file.device.is_empty() || !file.nvme.is_empty(),
        "it names no [[device]] and no [[nvme]]"
    );
    let mut plan = Plan {
        devices: Vec::new(),
        doors: Vec::new(),
        control: file.control,
    };
    for entry in file.device {
        add_device(&mut plan, entry)?;
    }
    for entry in file.nvme {
        add_controller(&mut plan, entry)?;
    }
    distinct_sockets(&plan)?;
    Ok(plan)
}

fn add_device(plan: &mut Plan, entry: DeviceEntry) -> anyhow::Result<()> {
    anyhow::ensure!(
        !entry.vhost_user_blk.is_empty(),
        "device {:?} has no door, as in [[device.vhost-user-blk]]",
        entry.image
    );
    let index = plan.devices.len();
    plan.devices.push(DevicePlan {
        graph: Graph::parse(&entry.image)?,
        options: open_options(entry.read_only, entry.direct, &entry.run_state)?,
        name: entry.image,
        shown: Shown::default(),
    });
    plan.doors
        .extend(entry.vhost_user_blk.into_iter().map(|door| DoorPlan {
            socket: door.socket,
            devices: vec![index],
            kind: DoorKind::VhostUserBlk {
                queue_size: door.queue_size,
            },
            queues: door.queues,
            serial: door.serial,
            poll: Duration::from_micros(door.poll_us.into()),
        }));
    Ok(())
}

fn add_controller(plan: &mut Plan, entry: NvmeEntry) -> anyhow::Result<()> {
    anyhow::ensure!(
        !entry.namespace.is_empty(),
        "the controller at {} has no namespace, as in [[nvme.namespace]]",
        entry.socket.display()
    );
    let max_transfer = match &entry.max_transfer {
        Some(text) => max_transfer(text).map_err(|why| anyhow::anyhow!("max-transfer {text:?}: {why}"))?,
        None => MaxTransfer::default(),
    };
    let first = plan.devices.len();
    for namespace in entry.namespace {
        plan.devices.push(DevicePlan {
            graph: Graph::parse(&namespace.image)?,
            options: open_options(namespace.read_only, namespace.direct, &namespace.run_state)?,
            name: namespace.image,
            shown: Shown {
                uuid: namespace
                    .uuid
                    .as_deref()
                    .map(Uuid::parse_str)
                    .transpose()
                    .context("uuid")?,
                read_across_zones: namespace.read_across_zones,
            },
        });
    }
    plan.doors.push(DoorPlan {
        socket: entry.socket,
        devices: (first..plan.devices.len()).collect(),
        kind: DoorKind::Nvme {
            max_transfer,
            polls: entry.poll,
        },
        queues: entry.queues,
        serial: entry.serial,
        poll: Duration::from_micros(entry.poll_us.into()),
    });
    Ok(())
}

fn distinct_sockets(plan: &Plan) -> anyhow::Result<()> {
    let mut seen: Vec<&Path> = plan.control.iter().map(PathBuf::as_path).collect();
    for door in &plan.doors {
        let socket = door.socket.as_path();
        anyhow::ensure!(
            socket == Path::new(super::SYSTEMD) || !seen.contains(&socket),
            "socket {} is named twice",
            socket.display()
        );
        seen.push(socket);
    }
    Ok(())
}

/// The parser's message, with the near name where a key is unknown.
fn explain(error: &toml::de::Error) -> String {
    let message = error.message();
    let mut quoted = message.split('`').skip(1).step_by(2);
    let near = match quoted.next() {
        Some(given) if message.starts_with("unknown field") => {
            did_you_mean(given, &quoted.collect::<Vec<_>>())
        }
        _ => String::new(),
    };
    format!("{}{near}", error.to_string().trim_end())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error_of(text: &str) -> String {
        match plan(text) {
            Ok(_) => panic!("accepted: {text}"),
            Err(error) => format!("{error:#}"),
        }
    }

    #[test]
    fn the_example_in_the_help_is_a_configuration() {
        let (_, example) = super::super::AFTER_HELP.split_once("Configuration:\n").unwrap();
        let plan = plan(example).unwrap();
        assert_eq!(plan.devices.len(), 2);
        assert_eq!((plan.doors[0].queues, plan.doors[1].queues), (Some(2), Some(16)));
        assert_eq!(
            (plan.doors[1].kind, &plan.doors[1].devices[..]),
            (
                DoorKind::Nvme {
                    max_transfer: MaxTransfer::default(),
                    polls: false
                },
                &[1][..]
            )
        );
    }

    #[test]
    fn unknown_keys_are_refused_with_the_near_one() {
        let error = error_of("[[device]]\nimage = \"a\"\n[[device.vhost-user-blk]]\nsockett = \"s\"\n");
        assert!(
            error.contains("unknown field `sockett`") && error.contains("line 4"),
            "{error}"
        );
        assert!(error.contains("(did you mean \"socket\"?)"), "{error}");
        let error = error_of("[[device]]\nimage = \"a\"\n[[device.vhost-usr-blk]]\nsocket = \"s\"\n");
        assert!(error.contains("(did you mean \"vhost-user-blk\"?)"), "{error}");
    }

    #[test]
    fn a_namespace_is_shown_as_it_says() {
        let text = "[[nvme]]\nsocket = \"s\"\nmax-transfer = \"8K\"\npoll = true\n[[nvme.namespace]]\nimage = \"a\"\n";
        let uuid = "uuid = \"6ba7b810-9dad-11d1-80b4-00c04fd430c8\"\nread-across-zones = true\n";
        let plan = plan(&format!("{text}{uuid}")).unwrap();
        assert_eq!(
            plan.doors[0].kind,
            DoorKind::Nvme {
                max_transfer: MaxTransfer(1),
                polls: true
            }
        );
        let shown = plan.devices[0].shown;
        assert!(shown.uuid.is_some() && shown.read_across_zones);
        assert!(error_of(&format!("{text}uuid = \"1\"\n")).starts_with("uuid: "));
        assert!(error_of(&text.replace("8K", "12K")).contains("a power of two from 8K to 16M"));
    }

    #[test]
    fn a_configuration_that_serves_nothing_is_refused() {
        assert_eq!(error_of(""), "it names no [[device]] and no [[nvme]]");
        assert!(error_of("[[nvme]]\nsocket = \"s\"\n").contains("has no namespace"));
        assert!(error_of("[[device]]\nimage = \"a\"\n").contains("has no door"));
        let door = "[[device.vhost-user-blk]]\nsocket = \"s\"\n";
        let twice = error_of(&format!("[[device]]\nimage = \"a\"\n{door}{door}"));
        assert_eq!(twice, "socket s is named twice");
    }
}
