//! What the engine costs a request, in nanoseconds, and a million zones in milliseconds. Run with `--release`.

use std::hint::black_box;
use std::time::Instant;

use zbdkit_zone::{Completion, Engine, ExclusiveOp, Geometry, GeometrySpec, Model, Zns, ZoneNo, ZoneRecord};

const BLOCK: u64 = 4096;
const ZONE: u64 = 1 << 30;

fn engine(zones: u64, max_open: u32) -> Engine {
    let spec = GeometrySpec {
        model: Model::HostManaged,
        size: zones * ZONE,
        zone_size: ZONE,
        zone_capacity: ZONE,
        nr_conventional: 0,
        block_size: BLOCK as u32,
        max_open,
        max_active: 0,
        max_append: 1 << 20,
        zns: Zns::NONE,
    };
    Engine::new(Geometry::new(spec).expect("valid"), |_| ZoneRecord::default()).expect("valid")
}

/// Writes `n` blocks round robin to `zones` zones.
fn writes(engine: &Engine, first: u32, zones: u32, n: u64) {
    let mut pool = engine.slots(32);
    for i in 0..n {
        let zone = ZoneNo(first + (i % u64::from(zones)) as u32);
        let permit = match engine.admit_append(&mut pool, engine.geometry().start(zone), BLOCK) {
            Ok(permit) => permit,
            Err(_) => {
                let reset = engine
                    .begin(zone, ExclusiveOp::Reset)
                    .expect("full")
                    .expect("full");
                engine.commit(reset, &());
                continue;
            }
        };
        let Completion::Prefix(prefix) = engine.complete(black_box(permit), Ok(()), &()) else {
            unreachable!("alone in its zone")
        };
        engine.acknowledge(prefix, Ok(()), &());
    }
}

fn reads(engine: &Engine, n: u64) {
    for i in 0..n {
        let permit = engine
            .admit_read(black_box(i % 64 * BLOCK), BLOCK)
            .expect("valid");
        engine.end_read(permit, &());
    }
}

fn measure(what: &str, n: u64, work: impl FnOnce()) {
    let start = Instant::now();
    work();
    println!(
        "{what:44} {:8.1} ns",
        start.elapsed().as_nanos() as f64 / n as f64
    );
}

fn main() {
    const N: u64 = 10_000_000;
    let plain = engine(64, 0);
    measure("write, one zone", N, || writes(&plain, 0, 1, N));
    measure("write, 8 zones in turn", N, || writes(&plain, 0, 8, N));
    let limited = engine(64, 16);
    measure("write, one zone, open limit", N, || writes(&limited, 0, 1, N));
    measure("write, 8 zones in turn, open limit", N, || {
        writes(&limited, 0, 8, N)
    });
    measure("write, 32 zones in turn, 16 may be open", N, || {
        writes(&limited, 0, 32, N)
    });
    measure("read", N, || reads(&plain, N));
    measure("write, 2 threads, own zones, open limit", N, || {
        std::thread::scope(|s| {
            for t in 0..2 {
                let limited = &limited;
                s.spawn(move || writes(limited, 40 + 8 * t, 4, N));
            }
        });
    });
    let start = Instant::now();
    let million = engine(1 << 20, 64);
    println!("2^20 zones made in {:.1} ms", start.elapsed().as_secs_f64() * 1e3);
    let start = Instant::now();
    let mut shown = 0;
    million.report(0, zbdkit_zone::Filter::All, &mut |_| {
        shown += 1;
        std::ops::ControlFlow::Continue(())
    });
    println!(
        "2^20 zones reported in {:.1} ms ({shown})",
        start.elapsed().as_secs_f64() * 1e3
    );
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    status
        .lines()
        .filter(|line| line.starts_with("VmHWM"))
        .for_each(|line| println!("{line}"));
}
