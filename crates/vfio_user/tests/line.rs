//! The socket in the hands of a thread of the device.

mod common;

use std::time::{Duration, Instant};

use common::*;
use zbdkit_io::{Runtime, RuntimeOptions};
use zbdkit_spec::vfio_user::{DmaAccess, HEADER_SIZE, Header, command, flag};
use zerocopy::IntoBytes;

/// Posts writes until one was taken by the device's thread, which waits at the socket now.
fn lend(rig: &Rig, raw: &mut Raw) {
    let before = rig.seen.lock().unwrap().taken;
    let deadline = Instant::now() + Duration::from_secs(30);
    while rig.seen.lock().unwrap().taken == before {
        assert!(Instant::now() < deadline, "nobody waits at the socket");
        raw.post(BAR0, 0, &[0; 4]);
        std::thread::yield_now();
    }
}

#[test]
fn writes_keep_their_order_with_everything_else() {
    let rig = Rig::waiting();
    let mut raw = rig.qemu();
    for round in 1..400u32 {
        for at in 0..round % 5 {
            raw.post(BAR0, 4 * u64::from(at), &(1000 * round + at).to_le_bytes());
        }
        if round % 3 == 0 {
            raw.write(BAR0, 0, &round.to_le_bytes()).unwrap();
        }
        if round % 7 == 0 {
            lend(&rig, &mut raw);
            raw.post(BAR0, 4, &7u32.to_le_bytes());
        }
        let bytes = raw.read(BAR0, 0, 8).unwrap();
        let words: Vec<_> = bytes
            .chunks(4)
            .map(|word| u32::from_le_bytes(word.try_into().unwrap()))
            .collect();
        let first = match round {
            _ if round % 7 == 0 => Some(0),
            _ if round % 3 == 0 => Some(round),
            _ => (round % 5 > 0).then_some(1000 * round),
        };
        assert!(first.is_none_or(|first| words[0] == first), "{round}: {words:?}");
        assert!(round % 7 != 0 || words[1] == 7, "{round}: {words:?}");
    }
    assert!(rig.seen.lock().unwrap().taken > 50);
}

#[test]
fn what_the_thread_does_not_take_is_answered_as_ever() {
    let rig = Rig::waiting();
    let mut raw = rig.qemu();
    lend(&rig, &mut raw);
    raw.post(BAR0, 8, &[1; 8]);
    lend(&rig, &mut raw);
    raw.post(BAR0, 16, &[2; 64]);
    lend(&rig, &mut raw);
    raw.post(77, 0, &[3; 4]);
    lend(&rig, &mut raw);
    raw.post(BAR0, SIZE, &[3; 4]);
    lend(&rig, &mut raw);
    assert_eq!(raw.read(FORBIDDEN, 0, 4), Err(1));
    assert_eq!(raw.read(BAR0, 8, 8).unwrap(), [1; 8]);
    assert_eq!(raw.read(BAR0, 16, 64).unwrap(), [2; 64]);
    let seen = rig.seen.lock().unwrap();
    assert_eq!(seen.refused.len(), 3, "{:?}", seen.refused);
}

#[test]
fn a_message_in_pieces_is_put_together_by_whoever_has_the_socket() {
    let rig = Rig::waiting();
    let mut raw = rig.qemu();
    lend(&rig, &mut raw);
    let header = Header {
        message_id: 9.into(),
        command: command::REGION_READ.into(),
        message_size: (HEADER_SIZE as u32 + 16).into(),
        flags: flag::COMMAND.into(),
        error: 0.into(),
    };
    let bytes = [header.as_bytes(), access(BAR0, 0, 4).as_bytes()].concat();
    for byte in bytes {
        raw.send_bytes(&[byte], &[]);
        std::thread::yield_now();
    }
    let (header, _) = raw.receive();
    assert_eq!((header.message_id.get(), header.flags.get()), (9, flag::REPLY));
}

#[test]
fn a_client_that_leaves_makes_room_for_the_next() {
    let rig = Rig::waiting();
    for _ in 0..20 {
        let mut raw = rig.qemu();
        lend(&rig, &mut raw);
    }
    assert!(rig.seen.lock().unwrap().closed.is_empty());
}

#[test]
fn bytes_that_are_no_message_end_the_connection() {
    let rig = Rig::waiting();
    let mut raw = rig.qemu();
    lend(&rig, &mut raw);
    raw.send_bytes(&[0; HEADER_SIZE], &[]);
    assert!(raw.is_closed());
    rig.qemu();
    assert_eq!(rig.seen.lock().unwrap().closed.len(), 1);
}

#[test]
fn the_server_takes_the_socket_back_for_what_it_has_to_send() {
    let rig = Rig::waiting();
    let mut raw = rig.qemu();
    raw.map(0, 4096, None).unwrap();
    lend(&rig, &mut raw);
    let link = rig.link();
    let reader = std::thread::spawn(move || {
        let mut bytes = [0; 4];
        let runtime = Runtime::new(RuntimeOptions::default()).unwrap();
        runtime.block_on(link.dma.read(8, &mut bytes)).map(|()| bytes)
    });
    let (header, _) = raw.receive();
    assert_eq!(header.command.get(), command::DMA_READ);
    // Nobody takes the answer for a write.
    raw.post(BAR0, 0, &[1; 4]);
    let access = DmaAccess {
        address: 8.into(),
        count: 4.into(),
    };
    let payload = [access.as_bytes(), &[5, 6, 7, 8]].concat();
    raw.send(
        header.message_id.get(),
        command::DMA_READ,
        flag::REPLY,
        &payload,
        &[],
    );
    assert_eq!(reader.join().unwrap(), Ok([5, 6, 7, 8]));
    lend(&rig, &mut raw);
}

#[test]
fn a_server_that_is_stopped_does_not_wait_for_the_client() {
    let mut rig = Rig::waiting();
    let mut raw = rig.qemu();
    lend(&rig, &mut raw);
    rig.stop().unwrap();
    assert!(raw.is_closed());
}
