//! A client that we did not write: the one that Cloud Hypervisor runs.

mod common;

use std::os::fd::AsRawFd;

use common::*;
use vfio_user::Client;
use zbdkit_io::mem::Access;
use zbdkit_spec::vfio_user::{irq_info, irq_set as irq, pci_irq};

#[test]
fn cloud_hypervisors_client_uses_the_device() {
    let rig = Rig::new();
    let mut client = Client::new(&rig.socket()).unwrap();

    // It looked at all regions when it connected.
    let region = client.region(MAPPABLE).unwrap();
    assert_eq!(region.size, SIZE);
    let areas: Vec<_> = region
        .sparse_areas
        .iter()
        .map(|area| (area.offset, area.size))
        .collect();
    assert_eq!(areas, [(0, 4096), (8192, 4096)]);
    assert_eq!(region.file_offset.as_ref().map(|file| file.start()), Some(SIZE));
    assert!(client.region(9).is_none());

    client.region_write(BAR0, 0x100, &[1, 2, 3, 4]).unwrap();
    let mut data = [0; 4];
    client.region_read(BAR0, 0x100, &mut data).unwrap();
    assert_eq!(data, [1, 2, 3, 4]);

    let memory = memfd(8192);
    client.dma_map(0, 0x10_0000, 8192, memory.as_raw_fd()).unwrap();
    let buf = rig
        .link()
        .dma
        .guard()
        .iobuf(&[(0x10_0000 + 4096, 4)], Access::Write)
        .unwrap();
    buf.copy_from(&[5; 4]);
    drop(buf);
    let mut seen = [0; 4];
    rustix::io::pread(&memory, &mut seen, 4096).unwrap();
    assert_eq!(seen, [5; 4]);
    client.dma_unmap(0x10_0000, 8192).unwrap();
    assert!(!rig.link().dma.is_mapped(0x10_0000, 1));

    let info = client.get_irq_info(pci_irq::MSIX).unwrap();
    assert_eq!((info.count, info.flags), (8, irq_info::EVENTFD));
    let events = [eventfd(), eventfd()];
    let fds = events.each_ref().map(|fd| fd.as_raw_fd());
    client
        .set_irqs(pci_irq::MSIX, irq::DATA_EVENTFD | irq::ACTION_TRIGGER, 0, 2, &fds)
        .unwrap();
    rig.link().interrupts.trigger(pci_irq::MSIX, 1);
    assert_eq!(events.each_ref().map(count), [0, 1]);
    client
        .set_irqs(pci_irq::MSIX, irq::DATA_NONE | irq::ACTION_TRIGGER, 0, 0, &[])
        .unwrap();

    client.reset().unwrap();
    client.region_read(BAR0, 0x100, &mut data).unwrap();
    assert_eq!(data, [0; 4]);
    client.shutdown().unwrap();

    // And another comes.
    let mut again = Client::new(&rig.socket()).unwrap();
    again.region_read(BAR0, 0, &mut data).unwrap();
}
