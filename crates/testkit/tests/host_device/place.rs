//! Drives that place appends themselves.

use super::*;

#[test]
fn placed_appends_are_under_way_together_and_writes_wait_for_them() {
    let drive = drive(true, 11);
    with(&drive, async |device, lane| {
        drive.hold(Some(FIRST));
        let mut appends = pin!(all((0..8)
            .map(|n| append(device, lane, FIRST, BLOCK, n))
            .collect()));
        assert!(begin(&mut appends).await.is_none());
        until(|| drive.sent().appends == 8).await;
        let mut after = pin!(write(device, lane, START + 8 * BLOCK, BLOCK, 9));
        assert!(begin(&mut after).await.is_none());
        for _ in 0..100 {
            yield_now().await;
        }
        assert_eq!(drive.sent().writes, 0, "the write waits");
        drive.hold(None);
        assert!(appends.await.iter().all(Result::is_ok));
        after.await.unwrap();
        assert_eq!(wp(device, FIRST).await, START + 9 * BLOCK);
    });
}

#[test]
fn appends_and_writes_alternate_without_end() {
    for seed in 0..8 {
        let drive = drive(true, seed);
        with(&drive, async |device, lane| {
            for n in 0..16 {
                let at = append(device, lane, FIRST, BLOCK, 1).await.unwrap();
                assert_eq!(at, START + 2 * n * BLOCK);
                write(device, lane, at + BLOCK, BLOCK, 2).await.unwrap();
            }
        });
    }
}
