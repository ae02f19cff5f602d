//! Zone extensions and zone tables of any bytes in a valid qcow2 image, through the block layer's opening. What the input
//! means and what is done is in `zbdkit_testkit::diff::forged`.

#![no_main]

use libfuzzer_sys::fuzz_target;
use zbdkit_io::{Runtime, RuntimeOptions};
use zbdkit_testkit::diff::forged;

thread_local! {
    static RUNTIME: Runtime = Runtime::new(RuntimeOptions::default()).expect("a runtime");
}

fuzz_target!(|data: &[u8]| {
    RUNTIME.with(|runtime| forged::run(runtime, data));
});
