//! What to paste into the command line of a virtual machine monitor.

use std::path::{Path, PathBuf};

use crate::image::shell_quoted;

/// What a door's client must be told.
pub struct Hint {
    /// `None` where it is not known.
    pub socket: Option<PathBuf>,
    pub queues: u16,
    pub queue_size: u16,
    pub zoned: bool,
}

/// QEMU's largest queue.
const QEMU_MAX_QUEUE: u16 = 1024;

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
        let doubled = self.path().to_string_lossy().replace(',', ",,");
        let chardev = format!("socket,id=zbd{index},path={doubled}");
        let device = if self.zoned {
            // QEMU's vhost-user-blk-pci masks the zoned feature out; this one passes every feature.
            format!(
                "vhost-user-test-device-pci,chardev=zbd{index},virtio-id=2,config_size=96,num_vqs={},vq_size={}",
                self.queues,
                self.queue_size.min(QEMU_MAX_QUEUE)
            )
        } else {
            format!(
                "vhost-user-blk-pci,chardev=zbd{index},num-queues={},queue-size={}",
                self.queues,
                self.queue_size.min(QEMU_MAX_QUEUE)
            )
        };
        let version = if self.zoned { "10.2 or newer" } else { "any" };
        format!(
            "{name}\n\
             QEMU ({version}; 2G is the guest's memory, which must be shared):\n  \
             -machine q35,memory-backend=mem -m 2G -object memory-backend-memfd,id=mem,size=2G,share=on \\\n  \
             -chardev {} \\\n  \
             -device {device}\n\
             crosvm:\n  \
             --vhost-user type=block,socket={}\n",
            shell_quoted(Path::new(&chardev)),
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
            queues: 2,
            queue_size: 4096,
            zoned: true,
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
}
