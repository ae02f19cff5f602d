//! Requests that take their time: draining, disconnects in mid-request, and I/O that does not end.

mod common;
mod gate;

use std::sync::atomic::Ordering;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use common::Rig;
use gate::{Gate, State, until};
use zbdkit_export::vhost_user_blk::ServeError;
use zbdkit_testkit::client::{self, Client, ClientError, Framing, Status, feature};

fn rig(drain_within: Duration) -> (Rig, Arc<State>) {
    let (device, state) = Gate::device();
    (Rig::with(device, |o| o.drain_within = drain_within), state)
}

fn start_reads(client: &mut Client, count: usize) {
    for _ in 0..count {
        client
            .queue(0)
            .submit(&client::Request::Read { sector: 0, len: 4096 })
            .unwrap();
    }
    client.queue(0).publish().unwrap();
}

const PATIENT: Duration = Duration::from_secs(30);

// The two tests below look for a while at what must not happen. However slow the machine, that cannot make
// them fail; it could only let a defect slip through once.
const A_WHILE: Duration = Duration::from_millis(500);

#[test]
fn getting_the_base_waits_for_what_is_in_flight() {
    let (rig, state) = rig(PATIENT);
    let mut client = rig.client();
    state.shut();
    start_reads(&mut client, 4);
    state.wait_for(4);
    let (sender, replies) = mpsc::channel();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let base = client.stop_queue(0).unwrap();
            sender
                .send((base, client.queue(0).ring().unwrap().used_index()))
                .unwrap();
        });
        replies
            .recv_timeout(A_WHILE)
            .expect_err("the reply came before the requests ended");
        state.open();
        assert_eq!(replies.recv(), Ok((4, 4)));
    });
}

#[test]
fn a_client_that_goes_in_mid_request_keeps_the_next_one_waiting_until_it_is_over() {
    let (rig, state) = rig(PATIENT);
    for _ in 0..2 {
        let mut client = rig.client();
        state.shut();
        start_reads(&mut client, 4);
        state.wait_for(4);
        drop(client);
        let error = rig.try_client(|o| o.patience = A_WHILE).unwrap_err();
        assert!(matches!(error, ClientError::Timeout(_)), "{error}");
        state.open();
        assert_eq!(rig.client().queue(0).read(0, 4096).unwrap(), [0x42; 4096]);
    }
}

#[test]
fn requests_that_do_not_end_refuse_clients_until_they_do() {
    let (rig, state) = rig(Duration::from_millis(20));
    let mut client = rig.client();
    state.shut();
    start_reads(&mut client, 2);
    state.wait_for(2);
    drop(client);
    rig.try_client(|_| {}).unwrap_err();
    state.open();
    until("clients are served again", || {
        rig.try_client(|_| {})
            .is_ok_and(|mut c| c.queue(0).read(0, 512).is_ok())
    });
}

#[test]
fn a_shutdown_over_requests_that_do_not_end_says_so() {
    let (mut rig, state) = rig(Duration::from_millis(20));
    let mut client = rig.client();
    state.shut();
    start_reads(&mut client, 2);
    state.wait_for(2);
    let error = rig.stop().unwrap_err();
    assert!(matches!(error, ServeError::Stuck(_)), "{error}");
    assert_eq!(
        client.queue(0).ring().unwrap().used_index(),
        0,
        "nothing is answered that is not done"
    );
}

#[test]
fn a_shutdown_after_a_client_that_went_in_mid_request_says_so_too() {
    let (mut rig, state) = rig(Duration::from_millis(20));
    let mut client = rig.client();
    state.shut();
    start_reads(&mut client, 2);
    state.wait_for(2);
    drop(client);
    // Refused, so the connection before it has been given up by now.
    rig.try_client(|_| {}).unwrap_err();
    let error = rig.stop().unwrap_err();
    assert!(matches!(error, ServeError::Stuck(_)), "{error}");
}

#[test]
fn more_requests_than_slots_wait_for_a_slot() {
    let (rig, state) = rig(PATIENT);
    let mut client = rig.client_with(|o| {
        o.queue_size = 4;
        o.slots = 4;
    });
    client.queue(0).set_framing(Framing::LINUX);
    state.shut();
    start_reads(&mut client, 4);
    state.wait_for(4);
    // The same chains once more, which no good driver does.
    let ring = client.queue(0).ring().unwrap();
    let heads: Vec<u16> = (0..4)
        .map(|n| ring.avail().load_u16(4 + 2 * n, Ordering::Relaxed))
        .collect();
    heads.into_iter().for_each(|head| ring.push_by_hand(head));
    ring.publish().unwrap();
    ring.kick().unwrap();
    state.open();
    until("all eight are used", || {
        client.queue(0).ring().unwrap().used_index() == 8
    });
}

#[test]
fn a_failure_below_is_an_io_error() {
    let (rig, state) = rig(PATIENT);
    let mut client = rig.client();
    state.broken.store(true, Ordering::SeqCst);
    let read = client
        .queue(0)
        .run(&client::Request::Read { sector: 0, len: 512 })
        .unwrap();
    let write = client
        .queue(0)
        .run(&client::Request::Write {
            sector: 0,
            data: vec![0; 512],
        })
        .unwrap();
    assert_eq!((read.status, write.status), (Status::IOERR, Status::IOERR));
    state.broken.store(false, Ordering::SeqCst);
    client.queue(0).read(0, 512).unwrap();
}

#[test]
fn in_write_through_mode_each_write_is_flushed_before_it_is_answered() {
    let (rig, state) = rig(PATIENT);
    let flushes = || state.flushes.load(Ordering::SeqCst);
    let mut client = rig.client();
    client.queue(0).write(0, &[1; 512]).unwrap();
    assert_eq!(flushes(), 0);
    client.channel().unwrap().set_config(32, &[0]).unwrap();
    client.queue(0).write(0, &[1; 512]).unwrap();
    client.queue(0).write_zeroes(0, 8, false).unwrap();
    assert_eq!(flushes(), 2);
    client.channel().unwrap().set_config(32, &[1]).unwrap();
    client.queue(0).write(0, &[1; 512]).unwrap();
    assert_eq!(flushes(), 2);
    drop(client);
    let mut client = rig.client_with(|o| o.features &= !(feature::FLUSH | feature::CONFIG_WCE));
    client.queue(0).write(0, &[1; 512]).unwrap();
    assert_eq!(flushes(), 3, "a driver that cannot flush");
    drop(client);
    let mut client = rig.client();
    client.queue(0).write(0, &[1; 512]).unwrap();
    assert_eq!(flushes(), 3);
}
