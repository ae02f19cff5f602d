//! The client's memory: mapped, asked for by messages, and taken away.

mod common;

use std::os::fd::OwnedFd;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

use common::*;
use rustix::io::Errno;
use zbdkit_io::mem::Access;
use zbdkit_io::{Runtime, RuntimeOptions};
use zbdkit_spec::vfio_user::{DmaAccess, command, dma_unmap as unmap, flag};
use zbdkit_vfio_user::{DmaError, Link};
use zerocopy::{FromBytes, IntoBytes};

const EINVAL: u32 = 22;
const PAGE: u64 = 4096;

/// Reads on another thread, as a device does.
fn read(link: Link, address: u64, len: usize) -> JoinHandle<Result<Vec<u8>, DmaError>> {
    std::thread::spawn(move || {
        let runtime = Runtime::new(RuntimeOptions::default()).unwrap();
        let mut bytes = vec![0; len];
        runtime
            .block_on(link.dma.read(address, &mut bytes))
            .map(|()| bytes)
    })
}

fn write(link: Link, address: u64, bytes: Vec<u8>) -> JoinHandle<Result<(), DmaError>> {
    std::thread::spawn(move || {
        let runtime = Runtime::new(RuntimeOptions::default()).unwrap();
        runtime.block_on(link.dma.write(address, &bytes))
    })
}

fn fill(fd: &OwnedFd, at: u64, bytes: &[u8]) {
    assert_eq!(rustix::io::pwrite(fd, bytes, at), Ok(bytes.len()));
}

#[test]
fn mapped_memory_is_read_and_written_over_neighbouring_regions() {
    let rig = Rig::new();
    let mut raw = rig.qemu();
    let (first, second) = (memfd(PAGE), memfd(PAGE));
    raw.map(0x10000, PAGE, Some(&first)).unwrap();
    raw.map(0x10000 + PAGE, PAGE, Some(&second)).unwrap();
    fill(&first, PAGE - 2, &[1, 2]);
    fill(&second, 0, &[3, 4]);
    let link = rig.link();
    assert_eq!(
        read(link.clone(), 0x10000 + PAGE - 2, 4).join().unwrap(),
        Ok(vec![1, 2, 3, 4])
    );
    write(link.clone(), 0x10000 + PAGE - 1, vec![8, 9])
        .join()
        .unwrap()
        .unwrap();
    assert_eq!(
        read(link.clone(), 0x10000 + PAGE - 2, 4).join().unwrap(),
        Ok(vec![1, 8, 9, 4])
    );
    assert!(link.dma.is_mapped(0x10000, 2 * PAGE));
    assert!(!link.dma.is_mapped(0x10000, 2 * PAGE + 1));
    raw.map(0x10000 + 2 * PAGE, PAGE, None).unwrap();
    assert!(link.dma.covers(0x10000, 3 * PAGE) && !link.dma.is_mapped(0x10000, 3 * PAGE));
    assert!(!link.dma.covers(0x10000, 3 * PAGE + 1));
    raw.unmap(0x10000 + 2 * PAGE, PAGE).unwrap();
    let beyond = read(link, 0x10000 + PAGE, PAGE as usize + 1).join().unwrap();
    assert!(matches!(beyond, Err(DmaError::Outside { .. })));
}

#[test]
fn overlaps_and_ranges_that_are_none_are_refused() {
    let rig = Rig::new();
    let mut raw = rig.qemu();
    let fd = memfd(4 * PAGE);
    raw.map(PAGE, 2 * PAGE, Some(&fd)).unwrap();
    let exists = Err(Errno::EXIST.raw_os_error() as u32);
    assert_eq!(raw.map(2 * PAGE, PAGE, None), exists);
    assert_eq!(raw.map(0, 4 * PAGE, Some(&fd)), exists);
    assert_eq!(raw.map(0, 2 * PAGE, Some(&fd)), exists);
    assert_eq!(
        raw.map(0x10000, 5 * PAGE, Some(&fd)),
        Err(EINVAL),
        "past the end of the file"
    );
    assert_eq!(raw.map(0x10000, 0, None), Err(EINVAL));
    assert_eq!(raw.map(0x10001, PAGE, None), Err(EINVAL));
    assert_eq!(raw.map(u64::MAX - PAGE + 1, 2 * PAGE, None), Err(EINVAL));
    let none = dma_map(0x10000, PAGE, 0);
    assert_eq!(raw.call(command::DMA_MAP, none.as_bytes(), &[]), Err(EINVAL));
    assert_eq!(raw.unmap(PAGE, PAGE), Err(EINVAL), "cuts a region");
    raw.map(0, PAGE, None).unwrap();
    raw.map(3 * PAGE, PAGE, None).unwrap();
}

#[test]
fn there_is_an_end_to_the_number_of_regions() {
    let rig = Rig::new();
    let mut raw = rig.qemu();
    for index in 0..512 {
        raw.map(index * PAGE, PAGE, None).unwrap();
    }
    assert_eq!(
        raw.map(512 * PAGE, PAGE, None),
        Err(Errno::NOSPC.raw_os_error() as u32)
    );
    raw.unmap(0, PAGE).unwrap();
    raw.map(512 * PAGE, PAGE, None).unwrap();
}

#[test]
fn unmapped_memory_is_out_of_reach_and_can_be_mapped_again() {
    let rig = Rig::new();
    let mut raw = rig.qemu();
    let fd = memfd(PAGE);
    raw.map(0, PAGE, Some(&fd)).unwrap();
    let reply = raw.unmap(0, PAGE).unwrap();
    assert_eq!(
        reply,
        [
            24, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 16, 0, 0, 0, 0, 0, 0
        ]
    );
    let outside = DmaError::Outside { address: 0, len: 1 };
    assert_eq!(read(rig.link(), 0, 1).join().unwrap(), Err(outside));
    raw.map(0, PAGE, Some(&fd)).unwrap();
    assert_eq!(read(rig.link(), 0, 1).join().unwrap(), Ok(vec![0]));
}

#[test]
fn unmap_all_takes_everything() {
    let rig = Rig::new();
    let mut raw = rig.qemu();
    raw.map(0, PAGE, Some(&memfd(PAGE))).unwrap();
    raw.map(0x10_0000, PAGE, None).unwrap();
    let all = dma_unmap(unmap::ALL, 0, 0);
    let reply = raw.call(command::DMA_UNMAP, all.as_bytes(), &[]).unwrap();
    assert_eq!(reply[16..18], [0, 0x20], "two pages");
    assert!(!rig.link().dma.is_mapped(0, 1));
    let wrong = dma_unmap(unmap::ALL, 0, PAGE);
    assert_eq!(raw.call(command::DMA_UNMAP, wrong.as_bytes(), &[]), Err(EINVAL));
    let dirty = dma_unmap(unmap::GET_DIRTY_BITMAP, 0, PAGE);
    assert_eq!(
        raw.call(command::DMA_UNMAP, dirty.as_bytes(), &[]),
        Err(Errno::OPNOTSUPP.raw_os_error() as u32)
    );
}

#[test]
fn an_unmap_is_answered_only_when_the_last_access_has_ended() {
    let rig = Rig::new();
    let mut raw = rig.qemu();
    raw.map(0, PAGE, Some(&memfd(PAGE))).unwrap();
    let link = rig.link();
    let buf = link.dma.guard().iobuf(&[(0, 512)], Access::Write).unwrap();
    raw.send(
        9,
        command::DMA_UNMAP,
        flag::COMMAND,
        dma_unmap(0, 0, PAGE).as_bytes(),
        &[],
    );
    // New access fails as soon as the unmap is under way, and it is under way while the old buffer lives.
    while link.dma.is_mapped(0, 1) {
        std::thread::yield_now();
    }
    raw.socket.set_nonblocking(true).unwrap();
    assert!(
        std::io::Read::read(&mut raw.socket, &mut [0]).is_err(),
        "no answer yet"
    );
    raw.socket.set_nonblocking(false).unwrap();
    drop(buf);
    let (header, _) = raw.receive();
    assert_eq!((header.message_id.get(), header.flags.get()), (9, flag::REPLY));
    assert!(!rig.seen.lock().unwrap().fatal);
}

#[test]
fn an_access_that_does_not_end_makes_unmap_an_error_and_the_device_fatal() {
    let rig = Rig::with(Duration::from_millis(20));
    let mut raw = rig.qemu();
    raw.map(0, PAGE, Some(&memfd(PAGE))).unwrap();
    let link = rig.link();
    let buf = link.dma.guard().iobuf(&[(0, 512)], Access::Write).unwrap();
    let busy = Err(Errno::BUSY.raw_os_error() as u32);
    assert_eq!(raw.unmap(0, PAGE), busy);
    assert!(rig.seen.lock().unwrap().fatal);
    // The memory is still there for what is in flight, and for nothing else, and its place is still taken.
    assert_eq!(buf.copy_from(&[1; 512]), 512);
    assert!(!link.dma.is_mapped(0, 1));
    assert_eq!(raw.map(0, PAGE, None), Err(Errno::EXIST.raw_os_error() as u32));
    assert_eq!(raw.unmap(0, PAGE), busy);
    drop(buf);
    raw.unmap(0, PAGE).unwrap();
    raw.map(0, PAGE, None).unwrap();
}

#[test]
fn memory_that_may_only_be_read_is_not_written() {
    let rig = Rig::new();
    let mut raw = rig.qemu();
    let fd = memfd(PAGE);
    let fds = [std::os::fd::AsFd::as_fd(&fd)];
    raw.call(command::DMA_MAP, dma_map(0, PAGE, 1).as_bytes(), &fds)
        .unwrap();
    raw.call(command::DMA_MAP, dma_map(PAGE, PAGE, 1).as_bytes(), &[])
        .unwrap();
    for address in [0, PAGE] {
        assert_eq!(
            write(rig.link(), address, vec![1]).join().unwrap(),
            Err(DmaError::Denied { address })
        );
    }
}

/// Takes a DMA command of the server.
fn asked(raw: &mut Raw) -> (u16, u16, u64, u64, Vec<u8>) {
    let (header, payload) = raw.receive();
    assert_eq!(header.flags.get(), flag::COMMAND);
    let (access, data) = DmaAccess::read_from_prefix(&payload).unwrap();
    let (address, count) = (access.address.get(), access.count.get());
    (
        header.message_id.get(),
        header.command.get(),
        address,
        count,
        data.to_vec(),
    )
}

fn answer(raw: &mut Raw, id: u16, address: u64, data: &[u8]) {
    let access = DmaAccess {
        address: address.into(),
        count: (data.len() as u64).into(),
    };
    let payload = [access.as_bytes(), data].concat();
    raw.send(id, command::DMA_READ, flag::REPLY, &payload, &[]);
}

#[test]
fn memory_without_a_descriptor_is_asked_for() {
    let rig = Rig::new();
    let mut raw = rig.qemu();
    raw.map(0, 64 * PAGE, None).unwrap();
    assert!(!rig.link().dma.is_mapped(0, 1));
    let reader = read(rig.link(), 8, 4);
    let (id, code, address, count, _) = asked(&mut raw);
    assert_eq!((code, address, count), (command::DMA_READ, 8, 4));
    // Other commands go on meanwhile.
    assert!(raw.read(BAR0, 0, 4).is_ok());
    answer(&mut raw, id, 8, &[5, 6, 7, 8]);
    assert_eq!(reader.join().unwrap(), Ok(vec![5, 6, 7, 8]));
    let writer = write(rig.link(), 100, vec![9; 70000]);
    let mut got = Vec::<u8>::new();
    while got.len() < 70000 {
        let (id, code, address, _, data) = asked(&mut raw);
        assert_eq!((code, address), (command::DMA_WRITE, 100 + got.len() as u64));
        got.extend(&data);
        raw.send(id, command::DMA_WRITE, flag::REPLY, &[0; 12], &[]);
    }
    assert_eq!(got, vec![9; 70000]);
    writer.join().unwrap().unwrap();
}

#[test]
fn what_the_client_cannot_read_is_an_error() {
    let rig = Rig::new();
    let mut raw = rig.qemu();
    raw.map(0, PAGE, None).unwrap();
    // 0 and what is no errno must not pass for success, nor for anything worse.
    for (number, errno) in [(14u32, Errno::FAULT), (0, Errno::IO), (u32::MAX, Errno::IO)] {
        let reader = read(rig.link(), 0, 4);
        let (id, ..) = asked(&mut raw);
        let mut error = [0, 0, 11, 0, 16, 0, 0, 0, 0x21, 0, 0, 0, 0, 0, 0, 0];
        error[..2].copy_from_slice(&id.to_le_bytes());
        error[12..].copy_from_slice(&number.to_le_bytes());
        raw.send_bytes(&error, &[]);
        assert_eq!(reader.join().unwrap(), Err(DmaError::Refused(errno)));
    }
}

#[test]
fn a_reply_that_was_not_asked_for_or_is_too_short_ends_the_connection() {
    let rig = Rig::new();
    let mut raw = rig.qemu();
    answer(&mut raw, 5, 0, &[0; 4]);
    assert!(raw.is_closed());
    let mut raw = rig.qemu();
    raw.map(0, PAGE, None).unwrap();
    let reader = read(rig.link(), 0, 4);
    let (id, ..) = asked(&mut raw);
    answer(&mut raw, id, 0, &[0; 3]);
    assert_eq!(reader.join().unwrap(), Err(DmaError::Disconnected));
    assert!(raw.is_closed());
}

#[test]
fn unmap_reset_and_hang_up_end_accesses_that_the_client_did_not_answer() {
    let rig = Rig::new();
    let mut raw = rig.qemu();
    raw.map(0, PAGE, None).unwrap();
    raw.map(PAGE, PAGE, None).unwrap();
    let (near, far) = (read(rig.link(), 0, 4), read(rig.link(), PAGE, 4));
    let ids = [asked(&mut raw), asked(&mut raw)];
    raw.unmap(0, PAGE).unwrap();
    assert_eq!(near.join().unwrap(), Err(DmaError::Cancelled));
    assert!(!far.is_finished());
    raw.call(command::DEVICE_RESET, &[], &[]).unwrap();
    assert_eq!(far.join().unwrap(), Err(DmaError::Cancelled));
    // Late answers are known and ignored.
    for (id, _, address, ..) in ids {
        answer(&mut raw, id, address, &[0; 4]);
    }
    let last = read(rig.link(), PAGE, 4);
    asked(&mut raw);
    drop(raw);
    assert_eq!(last.join().unwrap(), Err(DmaError::Disconnected));
}

#[test]
fn replies_are_taken_while_an_unmap_waits() {
    let rig = Rig::new();
    let mut raw = rig.qemu();
    raw.map(0, PAGE, Some(&memfd(PAGE))).unwrap();
    raw.map(0x10000, PAGE, None).unwrap();
    let link = rig.link();
    // A buffer over the one, held until an answer about the other: the client sees an unmap that waits for its own answer.
    let (held, is_held) = mpsc::channel();
    let holder = std::thread::spawn({
        let link = link.clone();
        move || {
            let runtime = Runtime::new(RuntimeOptions::default()).unwrap();
            let buf = link.dma.guard().iobuf(&[(0, 512)], Access::Read).unwrap();
            held.send(()).unwrap();
            let mut byte = [0];
            let result = runtime.block_on(link.dma.read(0x10000, &mut byte));
            drop(buf);
            result.map(|()| byte[0])
        }
    });
    is_held.recv().unwrap();
    let (id, _, address, ..) = asked(&mut raw);
    raw.send(
        9,
        command::DMA_UNMAP,
        flag::COMMAND,
        dma_unmap(0, 0, PAGE).as_bytes(),
        &[],
    );
    while link.dma.is_mapped(0, 1) {
        std::thread::yield_now();
    }
    raw.send(10, command::DEVICE_RESET, flag::COMMAND, &[], &[]);
    answer(&mut raw, id, address, &[42]);
    let replies = [raw.receive().0, raw.receive().0];
    assert_eq!(replies.map(|header| header.message_id.get()), [9, 10], "in order");
    assert_eq!(holder.join().unwrap(), Ok(42));
}
