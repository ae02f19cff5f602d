//! What a client may send, byte for byte, and what it is answered.

mod common;

use std::os::fd::AsFd;

use common::*;
use rustix::io::Errno;
use zbdkit_spec::vfio_user::{command, flag, irq_set as irq};
use zerocopy::IntoBytes;

const EINVAL: u32 = 22;

#[test]
fn qemus_version_is_answered_with_limits_it_accepts() {
    let rig = Rig::new();
    let mut raw = rig.connect();
    raw.send(
        1,
        command::VERSION,
        flag::COMMAND,
        &version(QEMU_CAPABILITIES),
        &[],
    );
    let (_, payload) = raw.receive();
    assert_eq!(payload[..4], [0; 4]);
    let text = std::str::from_utf8(&payload[4..payload.len() - 1]).unwrap();
    for part in [
        "\"max_msg_fds\":8",
        "\"max_data_xfer_size\":1048576",
        "\"pgsizes\":4096",
        "\"max_dma_maps\":512",
    ] {
        assert!(text.contains(part), "{text}");
    }
    // QEMU changes how it sends everything else where a server has this.
    assert!(!text.contains("write_multiple"), "{text}");
}

#[test]
fn a_posted_write_is_done_and_not_answered() {
    let rig = Rig::new();
    let mut raw = rig.qemu();
    let mut payload = access(BAR0, 0x1000, 4).as_bytes().to_vec();
    payload.extend([1, 2, 3, 4]);
    raw.send(
        2,
        command::REGION_WRITE,
        flag::COMMAND | flag::NO_REPLY,
        &payload,
        &[],
    );
    raw.send(
        3,
        command::REGION_READ,
        flag::COMMAND,
        access(BAR0, 0x1000, 4).as_bytes(),
        &[],
    );
    let (header, payload) = raw.receive();
    assert_eq!(
        (header.message_id.get(), header.command.get()),
        (3, command::REGION_READ)
    );
    assert_eq!(payload[16..], [1, 2, 3, 4]);
}

#[test]
fn a_posted_write_that_fails_is_not_answered_either() {
    let rig = Rig::new();
    let mut raw = rig.qemu();
    let mut payload = access(99, 0, 4).as_bytes().to_vec();
    payload.extend([1, 2, 3, 4]);
    raw.send(
        2,
        command::REGION_WRITE,
        flag::COMMAND | flag::NO_REPLY,
        &payload,
        &[],
    );
    assert!(raw.read(BAR0, 0, 4).is_ok());
}

#[test]
fn a_device_error_is_answered_with_its_errno() {
    let rig = Rig::new();
    let mut raw = rig.qemu();
    assert_eq!(raw.read(FORBIDDEN, 0, 4), Err(Errno::PERM.raw_os_error() as u32));
    assert_eq!(raw.write(FORBIDDEN, 0, &[0; 4]), Err(1));
}

#[test]
fn the_payload_of_a_refused_write_is_consumed() {
    let rig = Rig::new();
    let mut raw = rig.qemu();
    assert_eq!(raw.write(99, 0, &[1, 2, 3, 4]), Err(EINVAL));
    assert_eq!(raw.read(BAR0, 0, 4), Ok(vec![0; 4]));
}

#[test]
fn accesses_beyond_a_region_are_refused() {
    let rig = Rig::new();
    let mut raw = rig.qemu();
    assert_eq!(raw.read(BAR0, SIZE - 3, 4), Err(EINVAL));
    assert_eq!(raw.write(BAR0, u64::MAX - 1, &[0; 4]), Err(EINVAL));
    assert_eq!(
        raw.read(BAR0, 0, (1 << 20) + 1),
        Err(Errno::TOOBIG.raw_os_error() as u32)
    );
    assert_eq!(raw.read(BAR0, SIZE - 4, 4), Ok(vec![0; 4]));
}

#[test]
fn several_writes_in_a_message_are_done_in_order() {
    let rig = Rig::new();
    let mut raw = rig.qemu();
    let one = |region, offset, byte: u8| {
        let mut bytes = access(region, offset, 2).as_bytes().to_vec();
        bytes.extend([byte; 8]);
        bytes
    };
    let mut payload = 3u64.to_le_bytes().to_vec();
    payload.extend([one(BAR0, 0, 1), one(BAR0, 1, 2), one(99, 0, 3)].concat());
    let reply = raw.call(command::REGION_WRITE_MULTI, &payload, &[]).unwrap();
    assert_eq!(reply, 2u64.to_le_bytes());
    assert_eq!(raw.read(BAR0, 0, 4), Ok(vec![1, 2, 2, 0]));
}

#[test]
fn a_version_without_nul_or_too_short_is_refused_and_the_connection_closed() {
    let rig = Rig::new();
    for payload in [&b"\0\0\0\0abc"[..], b"", b"\0\0"] {
        let mut raw = rig.connect();
        assert_eq!(raw.call(command::VERSION, payload, &[]), Err(EINVAL));
        assert!(raw.is_closed());
    }
    // The other form of "too short": bytes follow that the size does not count.
    let mut raw = rig.connect();
    raw.send(1, command::VERSION, flag::COMMAND, &[], &[]);
    let _ = std::io::Write::write_all(&mut raw.socket, &[0; 4]);
    assert!(raw.is_closed());
    assert!(rig.qemu().read(BAR0, 0, 4).is_ok());
}

#[test]
fn nothing_is_done_before_version_nor_twice() {
    let rig = Rig::new();
    let mut raw = rig.connect();
    assert_eq!(raw.read(BAR0, 0, 4), Err(EINVAL));
    assert!(raw.is_closed());
    let mut raw = rig.qemu();
    assert_eq!(raw.call(command::VERSION, &version("{}"), &[]), Err(EINVAL));
    assert!(raw.read(BAR0, 0, 4).is_ok());
}

#[test]
fn commands_that_are_not_known_are_said_to_be_unsupported() {
    let rig = Rig::new();
    let mut raw = rig.qemu();
    for code in [
        0,
        command::DEVICE_GET_REGION_IO_FDS,
        command::DMA_READ,
        14,
        command::DEVICE_FEATURE,
        999,
    ] {
        assert_eq!(
            raw.call(code, &[0; 16], &[]),
            Err(Errno::OPNOTSUPP.raw_os_error() as u32),
            "{code}"
        );
    }
}

#[test]
fn the_device_is_described() {
    let rig = Rig::new();
    let mut raw = rig.qemu();
    let mut ask = [0; 16];
    ask[0] = 16;
    let info = raw.call(command::DEVICE_GET_INFO, &ask, &[]).unwrap();
    assert_eq!(info, [16, 0, 0, 0, 3, 0, 0, 0, 9, 0, 0, 0, 5, 0, 0, 0]);
    ask[8] = 2;
    let irq = raw.call(command::DEVICE_GET_IRQ_INFO, &ask, &[]).unwrap();
    assert_eq!(irq, [16, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 8, 0, 0, 0]);
    ask[8] = 5;
    assert_eq!(raw.call(command::DEVICE_GET_IRQ_INFO, &ask, &[]), Err(EINVAL));
    ask[0] = 15;
    assert_eq!(raw.call(command::DEVICE_GET_INFO, &ask, &[]), Err(EINVAL));
}

#[test]
fn the_areas_of_a_mappable_region_come_when_there_is_room() {
    let rig = Rig::new();
    let mut raw = rig.qemu();
    let mut ask = [0; 32];
    (ask[0], ask[8]) = (32, MAPPABLE as u8);
    let short = raw.call(command::DEVICE_GET_REGION_INFO, &ask, &[]).unwrap();
    assert_eq!((short.len(), short[0], short[12]), (32, 80, 32));
    ask[0] = 80;
    let whole = raw.call(command::DEVICE_GET_REGION_INFO, &ask, &[]).unwrap();
    assert_eq!((whole.len(), whole[0], whole[4], whole[12]), (80, 80, 15, 32));
    assert_eq!(whole[32..48], [1, 0, 1, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
    ask[8] = 9;
    assert_eq!(raw.call(command::DEVICE_GET_REGION_INFO, &ask, &[]), Err(EINVAL));
}

#[test]
fn interrupts_come_in_chunks_and_go_without_descriptors() {
    let rig = Rig::new();
    let mut raw = rig.qemu();
    let events: Vec<_> = (0..8).map(|_| eventfd()).collect();
    let fds: Vec<_> = events.iter().map(|fd| fd.as_fd()).collect();
    let set = irq::DATA_EVENTFD | irq::ACTION_TRIGGER;
    raw.set_irqs(set, 2, 0, 5, &fds[..5]).unwrap();
    raw.set_irqs(set, 2, 5, 3, &fds[5..]).unwrap();
    let interrupts = rig.link().interrupts;
    (0..9).for_each(|vector| interrupts.trigger(2, vector));
    interrupts.trigger(7, 0);
    assert!(events.iter().all(|event| count(event) == 1));
    // QEMU's form of "no eventfd": as many interrupts, and no descriptors.
    raw.set_irqs(set, 2, 1, 4, &[]).unwrap();
    (0..8).for_each(|vector| interrupts.trigger(2, vector));
    let counts: Vec<_> = events.iter().map(count).collect();
    assert_eq!(counts, [1, 0, 0, 0, 0, 1, 1, 1]);
    raw.set_irqs(irq::DATA_NONE | irq::ACTION_TRIGGER, 2, 0, 0, &[])
        .unwrap();
    (0..8).for_each(|vector| interrupts.trigger(2, vector));
    assert!(events.iter().all(|event| count(event) == 0));
}

#[test]
fn a_masked_interrupt_comes_when_it_is_unmasked() {
    let rig = Rig::new();
    let mut raw = rig.qemu();
    let event = eventfd();
    raw.set_irqs(irq::DATA_EVENTFD | irq::ACTION_TRIGGER, 0, 0, 1, &[event.as_fd()])
        .unwrap();
    raw.set_irqs(irq::DATA_NONE | irq::ACTION_MASK, 0, 0, 1, &[])
        .unwrap();
    rig.link().interrupts.trigger(0, 0);
    assert_eq!(count(&event), 0);
    raw.set_irqs(irq::DATA_NONE | irq::ACTION_UNMASK, 0, 0, 1, &[])
        .unwrap();
    assert_eq!(count(&event), 1);
    raw.set_irqs(irq::DATA_NONE | irq::ACTION_TRIGGER, 0, 0, 1, &[])
        .unwrap();
    assert_eq!(count(&event), 1);
    let unsupported = Err(Errno::OPNOTSUPP.raw_os_error() as u32);
    assert_eq!(
        raw.set_irqs(irq::DATA_NONE | irq::ACTION_MASK, 2, 0, 1, &[]),
        unsupported
    );
}

#[test]
fn interrupts_that_do_not_exist_or_contradict_themselves_are_refused() {
    let rig = Rig::new();
    let mut raw = rig.qemu();
    let event = eventfd();
    let set = irq::DATA_EVENTFD | irq::ACTION_TRIGGER;
    assert_eq!(raw.set_irqs(set, 5, 0, 1, &[event.as_fd()]), Err(EINVAL));
    assert_eq!(raw.set_irqs(set, 2, 8, 1, &[event.as_fd()]), Err(EINVAL));
    assert_eq!(raw.set_irqs(set, 2, u32::MAX, 2, &[]), Err(EINVAL));
    assert_eq!(raw.set_irqs(set, 2, 0, 2, &[event.as_fd()]), Err(EINVAL));
    assert_eq!(raw.set_irqs(set | irq::DATA_NONE, 2, 0, 1, &[]), Err(EINVAL));
    assert_eq!(raw.set_irqs(irq::DATA_NONE, 2, 0, 1, &[]), Err(EINVAL));
    assert_eq!(
        raw.set_irqs(irq::DATA_BOOL | irq::ACTION_TRIGGER, 2, 0, 8, &[]),
        Err(EINVAL)
    );
    raw.set_irqs(set, 2, 0, 1, &[event.as_fd()]).unwrap();
}

#[test]
fn file_descriptors_that_do_not_belong_are_refused_and_too_many_end_the_connection() {
    let rig = Rig::new();
    let mut raw = rig.qemu();
    let event = eventfd();
    assert_eq!(
        raw.call(command::DEVICE_RESET, &[], &[event.as_fd()]),
        Err(EINVAL)
    );
    let payload = dma_map(0, 4096, 3);
    assert_eq!(
        raw.call(command::DMA_MAP, payload.as_bytes(), &[event.as_fd(); 2]),
        Err(EINVAL)
    );
    raw.send(9, command::DEVICE_RESET, flag::COMMAND, &[], &[event.as_fd(); 20]);
    assert!(raw.is_closed());
    assert!(rig.qemu().read(BAR0, 0, 4).is_ok());
}

#[test]
fn a_reset_reaches_the_device() {
    let rig = Rig::new();
    let mut raw = rig.qemu();
    raw.write(BAR0, 0, &[7]).unwrap();
    raw.call(command::DEVICE_RESET, &[], &[]).unwrap();
    assert_eq!(raw.read(BAR0, 0, 1), Ok(vec![0]));
    assert_eq!(rig.seen.lock().unwrap().resets, 1);
}

#[test]
fn clients_come_one_after_the_other() {
    let rig = Rig::new();
    let mut first = rig.qemu();
    let mut second = rig.connect();
    second.send(1, command::VERSION, flag::COMMAND, &version("{}"), &[]);
    assert!(first.read(BAR0, 0, 4).is_ok());
    drop(first);
    let (header, _) = second.receive();
    assert_eq!(header.flags.get(), flag::REPLY);
    assert_eq!(rig.seen.lock().unwrap().disconnects, 1);
}

#[test]
fn the_server_ends_while_a_client_is_connected() {
    let mut rig = Rig::new();
    let mut raw = rig.qemu();
    rig.stop().unwrap();
    assert!(raw.is_closed());
    assert_eq!(rig.seen.lock().unwrap().disconnects, 1);
}

mod hostile {
    use super::*;
    use proptest::prelude::*;
    use std::sync::LazyLock;

    static RIG: LazyLock<Rig> = LazyLock::new(Rig::new);

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn any_bytes_cost_a_client_at_most_its_connection(
            greets in any::<bool>(),
            messages in proptest::collection::vec(
                (0u16..18, 0u32..64, proptest::collection::vec(prop_oneof![Just(0u8), Just(1), any::<u8>()], 0..64), any::<u32>(), 0u8..8),
                1..12,
            ),
        ) {
            let mut raw = if greets { RIG.qemu() } else { RIG.connect() };
            for (code, flags, payload, size, kind) in messages {
                let mut bytes = vec![9, 0];
                bytes.extend(code.to_le_bytes());
                let right = 16 + payload.len() as u32;
                bytes.extend(if kind == 0 { size } else { right }.to_le_bytes());
                bytes.extend(flags.to_le_bytes());
                bytes.extend([0; 4]);
                bytes.extend(payload);
                if std::io::Write::write_all(&mut raw.socket, &bytes).is_err() {
                    break;
                }
            }
            raw.socket.shutdown(std::net::Shutdown::Write).unwrap();
            prop_assert!(raw.is_closed());
            // And it still works for the next.
            prop_assert!(RIG.qemu().read(BAR0, 0, 4).is_ok());
        }
    }
}
