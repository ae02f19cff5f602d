//! The same rings through the `virtio-driver` crate: code that we did not write, so that an error of
//! ours in the ring or in the protocol cannot hide in both client and server.
//!
//! It makes plain chains only (no indirect tables), publishes each request at once, and does not show
//! used lengths. Guest addresses are this process's addresses.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::Path;
use std::sync::atomic::{Ordering, fence};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use virtio_driver::virtqueue::{Virtqueue, VirtqueueLayout};
use virtio_driver::{EventFd, QueueNotifier, VhostUser, VirtioFeatureFlags, VirtioTransport, iovec};

use super::config::BlkConfig;
use super::error::ClientError;
use super::memory::{ConfigBytes, LeakedMemory, SharedMemory};
use super::ring::{Segment, Used};

type Transport = VhostUser<ConfigBytes, ()>;

/// One queue of `virtio-driver`.
pub(super) struct ForeignRing {
    queue: Virtqueue<'static, ()>,
    notifier: Box<dyn QueueNotifier>,
    call: Arc<EventFd>,
    unpublished: bool,
    in_flight: Vec<bool>,
}

impl std::fmt::Debug for ForeignRing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ForeignRing").finish_non_exhaustive()
    }
}

impl ForeignRing {
    pub(super) fn add(&mut self, segments: &[Segment]) -> Result<u16, ClientError> {
        let added = self.queue.add_request(|(), add| {
            segments.iter().try_for_each(|s| {
                add(
                    iovec {
                        iov_base: s.guest as usize as *mut _,
                        iov_len: s.len as usize,
                    },
                    s.writable,
                )
            })
        });
        // Its only error, besides those of address translation, which this transport does not have.
        let head = added.map_err(|_| ClientError::QueueFull)?;
        self.in_flight[usize::from(head)] = true;
        self.unpublished = true;
        Ok(head)
    }

    pub(super) fn publish(&mut self) -> Result<(), ClientError> {
        if !std::mem::take(&mut self.unpublished) {
            return Ok(());
        }
        // Without EVENT_IDX the crate reads the device's flags with no barrier after its own store.
        fence(Ordering::SeqCst);
        if self.queue.avail_notif_needed() {
            self.notifier.notify()?;
        }
        Ok(())
    }

    pub(super) fn next_used(&mut self) -> Result<Option<Used>, ClientError> {
        let Some(completion) = self.queue.completions().next() else {
            return Ok(None);
        };
        let head = completion.id;
        if !std::mem::take(&mut self.in_flight[usize::from(head)]) {
            return Err(ClientError::UnexpectedUsed(head.into()));
        }
        Ok(Some(Used {
            head: head.into(),
            len: None,
        }))
    }

    pub(super) fn has_used(&mut self) -> bool {
        self.queue.completions().has_next()
    }

    pub(super) fn set_interrupts(&mut self, on: bool) {
        self.queue.set_used_notif_enabled(on);
        fence(Ordering::SeqCst);
    }

    pub(super) fn call_fd(&self) -> BorrowedFd<'_> {
        // The crate's type implements the trait of the standard library.
        self.call.as_fd()
    }
}

/// A connection of `virtio-driver`.
pub(super) struct ForeignLink {
    transport: Option<Transport>,
    patience: Duration,
}

impl std::fmt::Debug for ForeignLink {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ForeignLink").finish_non_exhaustive()
    }
}

/// What connecting gives.
pub(super) struct Connected {
    pub(super) link: ForeignLink,
    pub(super) rings: Vec<ForeignRing>,
    pub(super) features: u64,
}

impl ForeignLink {
    /// Connects, hands over `memory` and sets up `queues` rings.
    pub(super) fn connect(
        path: &Path,
        features: u64,
        queues: u16,
        queue_size: u16,
        memory: &Arc<SharedMemory>,
        patience: Duration,
    ) -> Result<Connected, ClientError> {
        let path = path
            .to_str()
            .ok_or(ClientError::Engine("socket path is not UTF-8"))?
            .to_owned();
        let memory = Arc::clone(memory);
        let (transport, rings) = with_deadline(patience, move || {
            let mut transport = Transport::new(&path, features)?;
            for region in memory.regions() {
                let user = region.user() as usize;
                transport.map_mem_region(user, region.len(), region.fd().as_raw_fd(), 0)?;
            }
            let rings = set_up(&mut transport, queues, queue_size)?;
            Ok((transport, rings))
        })?;
        let features = <Transport as VirtioTransport<ConfigBytes, ()>>::get_features(&transport);
        Ok(Connected {
            link: ForeignLink {
                transport: Some(transport),
                patience,
            },
            rings,
            features,
        })
    }

    /// Reads the configuration space.
    pub(super) fn config(&mut self) -> Result<BlkConfig, ClientError> {
        let transport = self
            .transport
            .take()
            .ok_or(ClientError::Engine("the connection is broken"))?;
        let (transport, config) = with_deadline(self.patience, move || {
            let config = transport.get_config()?;
            Ok((transport, config))
        })?;
        self.transport = Some(transport);
        Ok(BlkConfig::parse(config.0))
    }
}

fn set_up(transport: &mut Transport, queues: u16, queue_size: u16) -> std::io::Result<Vec<ForeignRing>> {
    let features = VirtioFeatureFlags::from_bits_truncate(transport.get_features());
    let layout = VirtqueueLayout::new::<()>(queues.into(), queue_size.into(), features)?;
    let each = layout.end_offset.next_multiple_of(4096);
    let LeakedMemory { fd, bytes } = LeakedMemory::new(each * usize::from(queues))?;
    transport.map_mem_region(bytes.as_ptr() as usize, bytes.len(), fd.as_raw_fd(), 0)?;
    let mut virtqueues = Vec::new();
    for part in bytes.chunks_exact_mut(each) {
        virtqueues.push(Virtqueue::new(
            transport.iova_translator(),
            part,
            queue_size,
            features,
        )?);
    }
    transport.setup_queues(&virtqueues)?;
    let mut rings = Vec::new();
    for (i, queue) in virtqueues.into_iter().enumerate() {
        let mut ring = ForeignRing {
            queue,
            notifier: transport.get_submission_notifier(i),
            call: transport.get_completion_fd(i),
            unpublished: false,
            in_flight: vec![false; queue_size.into()],
        };
        ring.set_interrupts(false);
        rings.push(ring);
    }
    Ok(rings)
}

/// Runs what may block for ever on a thread of its own, which is left behind if it does.
fn with_deadline<T: Send + 'static>(
    patience: Duration,
    work: impl FnOnce() -> std::io::Result<T> + Send + 'static,
) -> Result<T, ClientError> {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        let _ = sender.send(work());
    });
    match receiver.recv_timeout(patience) {
        Ok(result) => Ok(result?),
        Err(mpsc::RecvTimeoutError::Timeout) => Err(ClientError::Timeout("virtio-driver")),
        Err(mpsc::RecvTimeoutError::Disconnected) => {
            Err(ClientError::Protocol("virtio-driver panicked".into()))
        }
    }
}
