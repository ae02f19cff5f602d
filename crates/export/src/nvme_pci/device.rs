//! The PCI function as the vfio-user server sees it: regions, interrupts, and the life of a connection.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use rustix::io::Errno;
use zbdkit_io::SharedDwords;
use zbdkit_nvme::{Controller, ControllerOptions, Subsystem};
use zbdkit_spec::nvme::controller::{Cc, offset};
use zbdkit_spec::vfio_user::{pci_irq, pci_region};
use zbdkit_vfio_user::{Device, IrqKind, Line, Link, Mmap, Region, Stuck};

use super::config::{self, ConfigSpace, Layout, VENDOR_ID};
use super::control::follow;
use super::front::Front;
use super::line::wait_at;
use super::worker::{WorkerHandle, WorkerThread};

/// Most I/O queues: their doorbells fit a page, and so do their shadows.
pub(super) const MAX_IO_QUEUES: u16 = 511;

pub(super) const PAGE: u64 = 4096;

/// The function.
pub(super) struct Function {
    subsystem: Arc<Subsystem>,
    options: ControllerOptions,
    regions: Vec<Region>,
    irqs: Vec<IrqKind>,
    layout: Layout,
    config: ConfigSpace,
    /// BAR0 up to the doorbells' end, of which only they are used.
    doorbells: SharedDwords,
    workers: Vec<WorkerThread>,
    handles: Arc<[WorkerHandle]>,
    drain_within: Duration,
    front: Option<Arc<Front>>,
    /// The worker that the client's last message has woken.
    rung: Option<usize>,
    /// Of a connection that did not come to rest.
    left_behind: Option<Arc<Front>>,
}

impl Function {
    /// `controller` has what its user chooses; what is this transport's is added here. `polls`: the workers look at the
    /// doorbells all the time, so clients may map them.
    ///
    /// # Errors
    /// Out of file descriptors or memory.
    pub(super) fn new(
        subsystem: Arc<Subsystem>,
        controller: ControllerOptions,
        workers: Vec<WorkerThread>,
        drain_within: Duration,
        polls: bool,
    ) -> io::Result<Function> {
        let doorbells = SharedDwords::new(2 * PAGE as usize / 4)?;
        // Registers, doorbells, MSI-X table and pending bits, each with pages of its own.
        let vectors = controller.io_queues + 1;
        let table = (u64::from(vectors) * 16).next_multiple_of(PAGE);
        let layout = Layout {
            bar_size: (2 * PAGE + table + PAGE).next_power_of_two(),
            msix_table: 2 * PAGE as u32,
            msix_pba: (2 * PAGE + table) as u32,
            vectors,
        };
        let mut regions = vec![Region::default(); pci_region::COUNT];
        for (index, size) in [
            (pci_region::BAR0, layout.bar_size),
            (pci_region::CONFIG, config::SIZE as u64),
        ] {
            regions[index as usize] = Region {
                size,
                readable: true,
                writable: true,
                mmap: None,
            };
        }
        let rung = offset::DOORBELLS..offset::DOORBELLS + PAGE;
        regions[pci_region::BAR0 as usize].mmap = polls.then(|| Mmap {
            fd: doorbells.fd().clone(),
            offset: 0,
            areas: vec![rung],
        });
        let mut irqs = vec![IrqKind::default(); pci_irq::COUNT];
        irqs[pci_irq::MSIX as usize].count = vectors.into();
        let handles = workers.iter().map(|worker| worker.handle().clone()).collect();
        Ok(Function {
            subsystem,
            options: ControllerOptions {
                queue_entries: 4096,
                max_page: 4,
                // SGLs of any alignment.
                sgls: 1,
                // Who writes the registers' memory needs no other.
                doorbell_buffers: !polls,
                pci_vendor: [VENDOR_ID; 2],
                ..controller
            },
            regions,
            irqs,
            config: ConfigSpace::new(&layout),
            layout,
            doorbells,
            workers,
            handles,
            drain_within,
            front: None,
            rung: None,
            left_behind: None,
        })
    }

    /// The register that a dword of BAR0 is part of, shifted into place.
    fn register(&self, front: &Front, at: u64) -> u32 {
        let controller = &front.controller;
        let half = |value: u64, base: u64| (value >> ((at - base) * 8)) as u32;
        match at {
            offset::CAP | 0x04 => half(controller.capabilities().into_bits(), offset::CAP),
            offset::VS => controller.version(),
            offset::CC => front.cc().into_bits(),
            offset::CSTS => controller.status().into_bits(),
            offset::AQA => front.admin_registers().aqa,
            offset::ASQ | 0x2c => half(front.admin_registers().asq, offset::ASQ),
            offset::ACQ | 0x34 => half(front.admin_registers().acq, offset::ACQ),
            offset::CRTO => controller.ready_timeouts().into_bits(),
            // Interrupt masks are those of MSI-X. Everything else is reserved, optional, or can only be written.
            _ => 0,
        }
    }

    fn write_register(&mut self, front: &Arc<Front>, at: u64, value: u32) {
        let low = |old: u64| old & !0xffff_ffff | u64::from(value & !0xfff);
        let high = |old: u64| old & 0xffff_ffff | u64::from(value) << 32;
        match at {
            offset::CC => front.write_cc(Cc::from_bits(value)),
            offset::AQA => front.write_admin_registers(|admin| admin.aqa = value & 0x0fff_0fff),
            offset::ASQ => front.write_admin_registers(|admin| admin.asq = low(admin.asq)),
            0x2c => front.write_admin_registers(|admin| admin.asq = high(admin.asq)),
            offset::ACQ => front.write_admin_registers(|admin| admin.acq = low(admin.acq)),
            0x34 => front.write_admin_registers(|admin| admin.acq = high(admin.acq)),
            offset::DOORBELLS.. if at < u64::from(self.layout.msix_table) => {
                self.rung = front.doorbells.ring(at, value);
                if let Some(worker) = self.rung {
                    self.handles[worker].wake();
                }
            }
            _ => {}
        }
    }
}

impl Device for Function {
    fn regions(&self) -> &[Region] {
        &self.regions
    }

    fn irqs(&self) -> &[IrqKind] {
        &self.irqs
    }

    fn connected(&mut self, link: Link) -> Result<(), Stuck> {
        if let Some(front) = self.left_behind.take()
            && !front.wait_end(Duration::ZERO)
        {
            self.left_behind = Some(front);
            return Err(Stuck(Duration::ZERO));
        }
        self.config = ConfigSpace::new(&self.layout);
        let controller = Controller::new(&self.subsystem, self.options.clone());
        let front = Arc::new(Front::new(link, controller, self.doorbells.clone()));
        self.front = Some(front.clone());
        let workers = self.handles.clone();
        self.handles[0].spawn(move |worker| follow(worker, front, workers));
        Ok(())
    }

    fn region_read(&mut self, region: u32, at: u64, out: &mut [u8]) -> Result<(), Errno> {
        self.rung = None;
        out.fill(0);
        if region == pci_region::CONFIG {
            self.config.read(at, out);
            return Ok(());
        }
        let Some(front) = &self.front else {
            return Err(Errno::NODEV);
        };
        // Accesses of any width; those that are not dwords see their part. What lies behind the registers reads as zero.
        for (at, byte) in (at..offset::DOORBELLS).zip(out) {
            *byte = self.register(front, at & !3).to_le_bytes()[(at & 3) as usize];
        }
        Ok(())
    }

    fn region_write(&mut self, region: u32, at: u64, data: &[u8]) -> Result<(), Errno> {
        self.rung = None;
        let Some(front) = self.front.clone() else {
            return Err(Errno::NODEV);
        };
        if region == pci_region::CONFIG {
            if self.config.write(at, data) {
                front.begin_reset();
                self.config = ConfigSpace::new(&self.layout);
            }
            return Ok(());
        }
        // Registers are written in dwords (3.1): anything else is ignored, as the specification allows.
        if at.is_multiple_of(4) {
            for (at, dword) in (at..).step_by(4).zip(data.chunks_exact(4)) {
                let value = u32::from_le_bytes(dword.try_into().expect("4 bytes"));
                self.write_register(&front, at, value);
            }
        }
        Ok(())
    }

    fn wants_line(&self) -> bool {
        self.rung.is_some() && self.regions[pci_region::BAR0 as usize].mmap.is_none()
    }

    fn take_line(&mut self, line: Line) {
        if let (Some(worker), Some(front)) = (self.rung.take(), self.front.clone()) {
            wait_at(line, front, self.handles.clone(), worker);
        }
    }

    fn reset(&mut self) -> Result<(), Stuck> {
        self.config = ConfigSpace::new(&self.layout);
        if let Some(front) = &self.front {
            let number = front.begin_reset();
            if !front.wait_reset(number, self.drain_within) {
                return Err(Stuck(self.drain_within));
            }
        }
        Ok(())
    }

    fn unmapping(&mut self, _address: u64, _size: u64) {
        // Workers that are awake let go of the old map when they look.
        self.workers.iter().for_each(|worker| worker.handle().wake());
    }

    fn fatal(&mut self) {
        if let Some(front) = &self.front {
            front.halt();
        }
    }

    fn disconnected(&mut self) -> Result<(), Stuck> {
        let Some(front) = self.front.take() else {
            return Ok(());
        };
        front.begin_end();
        if front.wait_end(self.drain_within) {
            return Ok(());
        }
        self.left_behind = Some(front);
        Err(Stuck(self.drain_within))
    }
}
