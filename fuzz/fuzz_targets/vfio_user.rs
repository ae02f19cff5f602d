//! A vfio-user client that sends any bytes and file descriptors, at a device that uses its memory. What the server sends must
//! be messages, and the next client must be served.

#![no_main]

#[path = "../../crates/vfio_user/tests/anything/mod.rs"]
mod anything;

use std::sync::OnceLock;

use anything::Target;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    static TARGET: OnceLock<Target> = OnceLock::new();
    let target = TARGET.get_or_init(|| {
        // One for the whole run; it stays behind when that ends.
        let directory = std::env::temp_dir().join(format!("zbdkit-fuzz-{}", std::process::id()));
        std::fs::create_dir_all(&directory).expect("a directory for the socket");
        Target::new(&directory)
    });
    target.play(data);
});
