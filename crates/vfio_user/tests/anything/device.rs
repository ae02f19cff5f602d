//! A device that does with the client's memory what it is told by writes to its first region.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Waker};

use rustix::fs::MemfdFlags;
use rustix::io::Errno;
use zbdkit_io::IoBuf;
use zbdkit_io::mem::Access;
use zbdkit_vfio_user::{Heard, IrqKind, Line, Link, Mmap, Region, Stuck};

/// Bytes of a region.
const SIZE: u64 = 0x4000;
/// Longest access to memory.
const MOST: u64 = 0x4_0000;
/// Accesses in flight.
const ACCESSES: usize = 64;

type Task = Pin<Box<dyn Future<Output = ()>>>;

/// The device.
pub struct Device {
    regions: Vec<Region>,
    irqs: Vec<IrqKind>,
    link: Option<Link>,
    tasks: Vec<Task>,
    /// Buffers over the client's memory; where the device is stubborn, it keeps them when the memory is taken away.
    held: Vec<IoBuf>,
    stubborn: bool,
}

impl Device {
    pub fn new() -> Device {
        let plain = Region {
            size: SIZE,
            readable: true,
            writable: true,
            mmap: None,
        };
        let mut regions = vec![plain; 9];
        let file = rustix::fs::memfd_create("region", MemfdFlags::CLOEXEC).expect("a memfd");
        regions[1].mmap = Some(Mmap {
            fd: Arc::new(file),
            offset: SIZE,
            areas: vec![0..4096, 8192..12288],
        });
        regions[2].writable = false;
        regions[3] = Region::default();
        let mut irqs = vec![IrqKind::default(); 5];
        irqs[0].maskable = true;
        irqs[1].count = 1;
        irqs[2].count = 8;
        Device {
            regions,
            irqs,
            link: None,
            tasks: Vec::new(),
            held: Vec::new(),
            stubborn: false,
        }
    }

    /// What goes on goes on a little.
    fn poll(&mut self) {
        let cx = &mut Context::from_waker(Waker::noop());
        self.tasks.retain_mut(|task| task.as_mut().poll(cx).is_pending());
    }

    fn access(&mut self, how: u8, address: u64, len: u64) {
        let (Some(link), true) = (&self.link, self.tasks.len() < ACCESSES) else {
            return;
        };
        let dma = link.dma.clone();
        let len = len % MOST + 1;
        match how {
            0 => self.tasks.push(Box::pin(async move {
                let _ = dma.read(address, &mut vec![0; len as usize]).await;
            })),
            1 => self.tasks.push(Box::pin(async move {
                let _ = dma.write(address, &vec![0xa5; len as usize]).await;
            })),
            2 | 3 => {
                let access = if how == 2 { Access::Read } else { Access::Write };
                if let Ok(buf) = dma.guard().iobuf_from([(address, len)], access) {
                    if how == 3 {
                        buf.fill(0..buf.len(), 0x77);
                    } else {
                        let _ = buf.to_vec();
                    }
                    self.held.push(buf);
                }
            }
            4 => self.stubborn = !self.stubborn,
            5 => (0..8).for_each(|vector| link.interrupts.trigger(2, vector)),
            _ => self.held.clear(),
        }
    }

    /// The server promises that much.
    fn check(&self, region: u32, offset: u64, len: usize) {
        let size = self.regions[region as usize].size;
        assert!(len as u64 <= size && offset <= size - len as u64);
    }

    fn rest(&mut self) {
        self.poll();
        self.tasks.clear();
        self.held.clear();
        self.stubborn = false;
    }
}

impl zbdkit_vfio_user::Device for Device {
    fn regions(&self) -> &[Region] {
        &self.regions
    }

    fn irqs(&self) -> &[IrqKind] {
        &self.irqs
    }

    fn connected(&mut self, link: Link) -> Result<(), Stuck> {
        self.link = Some(link);
        Ok(())
    }

    fn region_read(&mut self, region: u32, offset: u64, out: &mut [u8]) -> Result<(), Errno> {
        self.poll();
        self.check(region, offset, out.len());
        if region == 4 {
            return Err(Errno::PERM);
        }
        out.fill(0x42);
        Ok(())
    }

    fn region_write(&mut self, region: u32, offset: u64, data: &[u8]) -> Result<(), Errno> {
        self.poll();
        self.check(region, offset, data.len());
        if region == 4 {
            return Err(Errno::PERM);
        }
        if let (0, [address, len, ..]) = (region, data.as_chunks().0) {
            self.access(
                offset as u8 & 7,
                u64::from_le_bytes(*address),
                u64::from_le_bytes(*len),
            );
            self.poll();
        }
        Ok(())
    }

    fn wants_line(&self) -> bool {
        self.link.is_some()
    }

    /// What is there is taken or left at once.
    fn take_line(&mut self, mut line: Line) {
        while let Heard::Write(write) = line.listen(|write| (write.region == 0).then_some(write)) {
            assert!(write.data().len() <= 8);
        }
    }

    fn reset(&mut self) -> Result<(), Stuck> {
        self.rest();
        Ok(())
    }

    fn unmapping(&mut self, _address: u64, _size: u64) {
        self.poll();
        if !self.stubborn {
            self.held.clear();
        }
    }

    fn fatal(&mut self) {
        self.poll();
    }

    fn disconnected(&mut self) -> Result<(), Stuck> {
        self.rest();
        self.link = None;
        Ok(())
    }
}
