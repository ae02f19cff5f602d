//! What to paste into the command line of a virtual machine monitor.

use std::path::{Path, PathBuf};

use crate::image::shell_quoted;

/// What a door's client must be told.
pub struct Hint {
    /// `None` where it is not known.
    pub socket: Option<PathBuf>,
    pub client: Client,
}

/// What speaks to the door.
pub enum Client {
    VhostUserBlk {
        queues: u16,
        queue_size: u16,
        zoned: bool,
    },
    VfioUser,
}

/// QEMU's largest queue.
const QEMU_MAX_QUEUE: u16 = 1024;

/// QEMU's arguments for a guest's memory that others can map.
const SHARED_MEMORY: &str =
    "-machine q35,memory-backend=mem -m 2G -object memory-backend-memfd,id=mem,size=2G,share=on";

impl Hint {
    /// The socket, for people.
    pub fn socket(&self) -> String {
        self.path().display().to_string()
    }

    fn path(&self) -> &Path {
        self.socket.as_deref().unwrap_or(Path::new("SOCKET"))
    }

    /// The arguments for the door of that number.
    pub fn text(&self, index: usize, name: &str) -> String {
        match self.client {
            Client::VhostUserBlk {
                queues,
                queue_size,
                zoned,
            } => self.vhost_user_blk(index, name, (queues, queue_size), zoned),
            Client::VfioUser => self.vfio_user(name),
        }
    }

    fn vhost_user_blk(
        &self,
        index: usize,
        name: &str,
        (queues, queue_size): (u16, u16),
        zoned: bool,
    ) -> String {
        let doubled = self.path().to_string_lossy().replace(',', ",,");
        let chardev = format!("socket,id=zbd{index},path={doubled}");
        let queue_size = queue_size.min(QEMU_MAX_QUEUE);
        let device = if zoned {
            // QEMU's vhost-user-blk-pci masks the zoned feature out; this one passes every feature.
            format!(
                "vhost-user-test-device-pci,chardev=zbd{index},virtio-id=2,config_size=96,num_vqs={queues},\
                 vq_size={queue_size}"
            )
        } else {
            format!("vhost-user-blk-pci,chardev=zbd{index},num-queues={queues},queue-size={queue_size}")
        };
        let version = if zoned { "10.2 or newer" } else { "any" };
        format!(
            "{name}\n\
             QEMU ({version}; 2G is the guest's memory, which must be shared):\n  \
             {SHARED_MEMORY} \\\n  \
             -chardev {} \\\n  \
             -device {device}\n\
             crosvm:\n  \
             --vhost-user type=block,socket={}\n",
            shell_quoted(Path::new(&chardev)),
            shell_quoted(self.path())
        )
    }

    fn vfio_user(&self, name: &str) -> String {
        // QEMU takes this device's socket in no other form.
        let socket = serde_json::json!({ "type": "unix", "path": self.path().to_string_lossy() });
        let device = format!(r#"{{"driver":"vfio-user-pci","socket":{socket}}}"#);
        format!(
            "{name}\n\
             QEMU (10.1 or newer; 2G is the guest's memory, which must be shared):\n  \
             {SHARED_MEMORY} \\\n  \
             -device {}\n\
             Cloud Hypervisor:\n  \
             --memory size=2G,shared=on --user-device socket={}\n",
            shell_quoted(Path::new(&device)),
            shell_quoted(self.path())
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_zoned_device_goes_through_the_device_that_passes_the_zoned_feature() {
        let hint = Hint {
            socket: Some("/run/my disk,1.sock".into()),
            client: Client::VhostUserBlk {
                queues: 2,
                queue_size: 4096,
                zoned: true,
            },
        };
        let text = hint.text(0, "disk.raw");
        assert!(
            text.contains("-chardev 'socket,id=zbd0,path=/run/my disk,,1.sock'"),
            "{text}"
        );
        assert!(text.contains(
            "-device vhost-user-test-device-pci,chardev=zbd0,virtio-id=2,config_size=96,num_vqs=2,vq_size=1024\n"
        ));
        assert!(text.contains("share=on"));
    }

    #[test]
    fn a_controllers_socket_is_given_as_json() {
        let hint = Hint {
            socket: Some("/run/my \"nvme\".sock".into()),
            client: Client::VfioUser,
        };
        let text = hint.text(0, "disk.raw");
        let device =
            r#"'{"driver":"vfio-user-pci","socket":{"path":"/run/my \"nvme\".sock","type":"unix"}}'"#;
        assert!(text.contains(&format!("-device {device}\n")), "{text}");
        assert!(text.contains("share=on") && text.contains("shared=on"), "{text}");
    }
}
