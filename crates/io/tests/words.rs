//! Shared words.

use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};

use zbdkit_io::{File, FileKind, LocalBoxFuture, Storage, StorageOp, WordStore, Words};

#[test]
fn words_are_in_the_file_at_their_place() {
    let std = tempfile::tempfile().expect("a file");
    std.set_len(4096 + 24 + 8 * 1000).expect("a length");
    let file = File::from_fd(std.try_clone().expect("a duplicate").into(), FileKind::default());
    let words = Words::map(&file, 4096 + 24, 1000).expect("a mapping");
    assert_eq!(words.count(), 1000);
    let again = words.clone();
    for i in 0..1000 {
        assert_eq!(words.load(i), 0);
        words.store(i, i as u64 * 3 + 1);
        assert_eq!(again.load(i), i as u64 * 3 + 1);
    }
    drop((words, again));
    for i in 0..1000 {
        let mut bytes = [0; 8];
        std.read_exact_at(&mut bytes, 4096 + 24 + i * 8).expect("a word");
        assert_eq!(u64::from_ne_bytes(bytes), i * 3 + 1);
    }
}

#[test]
fn words_that_cannot_be_are_refused() {
    let std = tempfile::tempfile().expect("a file");
    std.set_len(4096).expect("a length");
    for (offset, count) in [
        (0, 513),
        (4, 1),
        (4096, 1),
        (u64::MAX - 7, 1),
        (0, usize::MAX / 4),
    ] {
        let error = Words::map_fd(std.as_fd(), offset, count).expect_err("it is not there");
        assert_eq!(
            error.kind(),
            std::io::ErrorKind::InvalidInput,
            "{count} at {offset}"
        );
    }
    let words = Words::map_fd(std.as_fd(), 4088, 1).expect("the last word");
    let past = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| words.load(1)));
    assert!(past.is_err());
    let custom = File::custom(Arc::new(Nothing));
    assert!(Words::map(&custom, 0, 1).is_err());
}

struct Nothing;

impl Storage for Nothing {
    fn submit(&self, _: StorageOp) -> LocalBoxFuture<'static, std::io::Result<()>> {
        Box::pin(async { Ok(()) })
    }
    fn len(&self) -> std::io::Result<u64> {
        Ok(0)
    }
    fn set_len(&self, _: u64) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_test_may_look_at_each_store() {
    #[derive(Default)]
    struct Log(Mutex<Vec<(usize, u64)>>);
    impl WordStore for Log {
        fn count(&self) -> usize {
            4
        }
        fn load(&self, index: usize) -> u64 {
            let log = self.0.lock().expect("no panic");
            log.iter()
                .rev()
                .find(|(i, _)| *i == index)
                .map_or(0, |(_, value)| *value)
        }
        fn store(&self, index: usize, value: u64) {
            self.0.lock().expect("no panic").push((index, value));
        }
    }
    let log = Arc::new(Log::default());
    let words = Words::custom(log.clone());
    words.store(2, 7);
    words.store(2, 9);
    assert_eq!((words.count(), words.load(2), words.load(1)), (4, 9, 0));
    assert_eq!(*log.0.lock().expect("no panic"), [(2, 7), (2, 9)]);
}
