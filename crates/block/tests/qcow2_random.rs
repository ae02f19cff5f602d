//! Random histories of zoned qcow2 images against a model: writes, resets, finishes, snapshots, sizes, kills, checks. QEMU
//! looks at the result too, where the rig has it. `ZBDKIT_RANDOM=N` runs N histories instead of a few, `ZBDKIT_SEED=N`
//! that one alone.

#[path = "../../qcow2/tests/support/qemu.rs"]
#[allow(dead_code, reason = "its other tests use more of it")]
mod qemu;
mod support;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::FileExt;

use qemu::Qemu;
use support::{Rig, host};
use zbdkit_block::{
    CreateOptions, Device, Graph, OpenOptions, Qcow2CreateOptions, Repair, ZoneOp, check, create_qcow2,
};
use zbdkit_qcow2::{Header, Layout, Preallocation};
use zbdkit_spec::qcow2::{INCOMPAT_ZONE_STATES, INCOMPAT_ZONED};
use zbdkit_zone::{CloseEmpty, Condition};

const NAME: &str = "disk.qcow2";
const ZONE: u64 = 256 << 10;

struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}

/// What a device holds.
#[derive(Clone)]
struct Model {
    /// The first zone, which is conventional.
    plain: Vec<u8>,
    zones: Vec<Zone>,
}

#[derive(Clone, Default)]
struct Zone {
    data: Vec<u8>,
    finished: bool,
    read_only: bool,
}

struct History {
    rig: Rig,
    rng: Rng,
    capacity: u64,
    model: Model,
    snapshots: BTreeMap<String, Model>,
    device: Option<Device>,
    /// It was killed, and no repair has taken what that leaked.
    leaky: bool,
    log: Vec<String>,
}

impl History {
    fn new(seed: u64) -> History {
        let mut rng = Rng(seed | 1);
        (0..8).for_each(|_| {
            rng.next();
        });
        let rig = Rig::new();
        let cluster_size = [512, 4096, 16384, 65536, 65536][rng.below(5) as usize];
        let layout = Layout {
            cluster_size,
            extended_l2: cluster_size >= 16384 && rng.below(4) == 0,
            refcount_bits: [4, 8, 16, 64][rng.below(4) as usize],
            ..Layout::default()
        };
        let nr_zones = 4 + rng.below(12);
        let mut zones = CreateOptions::new("", 0);
        zones.zone_size = Some(ZONE);
        zones.zone_capacity = Some(ZONE - 4096 * rng.below(3));
        zones.conventional_zones = 1;
        let capacity = zones.zone_capacity.unwrap();
        let options = Qcow2CreateOptions {
            zones: Some(zones),
            layout,
            ..Qcow2CreateOptions::new(rig.path(NAME), nr_zones * ZONE)
        };
        rig.block_on(create_qcow2(&host(), &options)).unwrap();
        History {
            device: Some(rig.open(NAME)),
            rig,
            rng,
            capacity,
            model: Model {
                plain: vec![0; ZONE as usize],
                zones: vec![Zone::default(); nr_zones as usize - 1],
            },
            snapshots: BTreeMap::new(),
            leaky: false,
            log: Vec::new(),
        }
    }

    fn device(&self) -> &Device {
        self.device.as_ref().unwrap()
    }

    fn leave(&mut self, killed: bool) {
        let device = self.device.take().unwrap();
        match killed {
            true => drop(device),
            false => self.rig.close(device),
        }
        self.leaky |= killed;
    }

    fn reopen(&mut self, killed: bool) {
        self.leave(killed);
        let device = self.rig.open(NAME);
        assert_eq!(device.notices(), [""; 0]);
        self.device = Some(device);
    }

    fn bytes(&mut self, len: u64) -> Vec<u8> {
        let tag = self.rng.next();
        if tag.is_multiple_of(8) {
            return vec![0; len as usize];
        }
        (0..len)
            .map(|i| (tag.rotate_left((i % 61) as u32) ^ i) as u8)
            .collect()
    }

    /// A zone whose sequential contents the model has, by its number there.
    fn some_zone(&mut self) -> (usize, u64) {
        let index = self.rng.below(self.model.zones.len() as u64) as usize;
        (index, (index as u64 + 1) * ZONE)
    }

    fn step(&mut self) {
        let what = self.rng.below(100);
        self.log.push(format!("{what}"));
        match what {
            0..40 => self.write(),
            40..48 => self.write_plain(),
            48..58 => self.reset(),
            58..64 => self.finish(),
            64..72 => self.rig.flush(self.device()),
            72..78 => self.reopen(true),
            78..83 => self.reopen(false),
            83..86 => self.zeroes(),
            86..88 => self.set_read_only(),
            88..92 => self.snapshot(),
            92..95 => self.apply(),
            95..97 => self.delete(),
            97 => self.grow(),
            98 => self.check_image(),
            _ => self.compare(),
        }
    }

    fn room(&self, zone: &Zone) -> u64 {
        match zone.finished || zone.read_only {
            true => 0,
            false => self.capacity - zone.data.len() as u64,
        }
    }

    /// Several writes in flight, in order.
    fn write(&mut self) {
        let (index, start) = self.some_zone();
        let mut at = start + self.model.zones[index].data.len() as u64;
        let mut left = self.room(&self.model.zones[index]);
        let mut writes = Vec::new();
        for _ in 0..1 + self.rng.below(6) {
            let most = if self.rng.below(8) == 0 { 40 } else { 6 };
            let len = (4096 * (1 + self.rng.below(most))).min(left);
            if len > 0 {
                let bytes = self.bytes(len);
                writes.push((at, bytes));
            }
            at += len;
            left -= len;
        }
        self.log.push(format!(
            "write {start:#x} {:?}",
            writes.iter().map(|w| w.1.len()).collect::<Vec<_>>()
        ));
        let device = self.device();
        let lane = device.lane(8);
        self.rig.block_on(async {
            let mut all: Vec<_> = writes
                .iter()
                .map(|(at, bytes)| {
                    let buf = zbdkit_io::IoBuf::from_vec(bytes.clone());
                    Box::pin(device.write(&lane, buf, *at))
                })
                .collect();
            std::future::poll_fn(|cx| {
                all.retain_mut(|write| match write.as_mut().poll(cx) {
                    std::task::Poll::Ready(result) => {
                        result.unwrap();
                        false
                    }
                    std::task::Poll::Pending => true,
                });
                match all.is_empty() {
                    true => std::task::Poll::Ready(()),
                    false => std::task::Poll::Pending,
                }
            })
            .await;
            // It would hold the image's locks, also after the device is gone.
            lane.quiet().await;
        });
        for (_, bytes) in writes {
            self.model.zones[index].data.extend(bytes);
        }
    }

    fn write_plain(&mut self) {
        let at = 4096 * self.rng.below(ZONE / 4096);
        let len = (4096 * (1 + self.rng.below(8))).min(ZONE - at);
        let bytes = self.bytes(len);
        self.rig.write(self.device(), at, &bytes);
        self.model.plain[at as usize..][..bytes.len()].copy_from_slice(&bytes);
    }

    fn reset(&mut self) {
        let (index, start) = self.some_zone();
        if !self.model.zones[index].read_only {
            self.log.push(format!("reset {start:#x}"));
            self.rig.op(self.device(), ZoneOp::Reset, start).unwrap();
            self.model.zones[index] = Zone::default();
        }
    }

    fn finish(&mut self) {
        let (index, start) = self.some_zone();
        if !self.model.zones[index].read_only {
            self.log.push(format!("finish {start:#x}"));
            self.rig.op(self.device(), ZoneOp::Finish, start).unwrap();
            let zone = &mut self.model.zones[index];
            zone.finished |= zone.data.len() as u64 != self.capacity;
        }
    }

    fn zeroes(&mut self) {
        let (index, start) = self.some_zone();
        let zone = &self.model.zones[index];
        let len = self.room(zone).min(4096 * (1 + self.rng.below(40)));
        if len > 0 {
            let at = start + zone.data.len() as u64;
            let unmap = self.rng.below(2) == 0;
            self.log.push(format!("zeroes {at:#x} {len} {unmap}"));
            let device = self.device();
            let lane = device.lane(2);
            self.rig
                .block_on(device.write_zeroes(&lane, at, len, unmap))
                .unwrap();
            let zone = &mut self.model.zones[index];
            zone.data.resize(zone.data.len() + len as usize, 0);
        }
    }

    fn set_read_only(&mut self) {
        let (index, start) = self.some_zone();
        let read_only = !self.model.zones[index].read_only;
        let op = match read_only {
            true => ZoneOp::SetReadOnly,
            false => ZoneOp::SetNormal,
        };
        self.rig.op(self.device(), op, start).unwrap();
        self.model.zones[index].read_only = read_only;
        if self.rng.below(2) == 0 {
            // A zone that is open only for a moment.
            let (index, start) = self.some_zone();
            let zone = &self.model.zones[index];
            if self.room(zone) > 0 {
                self.rig.op(self.device(), ZoneOp::Open, start).unwrap();
                self.rig
                    .op(self.device(), ZoneOp::Close(CloseEmpty::ToEmpty), start)
                    .unwrap();
            }
        }
    }

    fn snapshot(&mut self) {
        if self.snapshots.len() < 4 {
            let name = format!("s{}", self.rng.below(1000));
            self.log.push(format!("snapshot {name}"));
            let made = self.rig.block_on(self.device().snapshot_create(&name)).unwrap();
            self.snapshots.insert(made.id, self.model.clone());
        }
    }

    fn some_snapshot(&mut self) -> Option<String> {
        let all: Vec<_> = self.snapshots.keys().cloned().collect();
        match all.len() {
            0 => None,
            n => Some(all[self.rng.below(n as u64) as usize].clone()),
        }
    }

    fn apply(&mut self) {
        if let Some(id) = self.some_snapshot() {
            self.log.push(format!("apply {id}"));
            self.rig.block_on(self.device().snapshot_apply(&id)).unwrap();
            self.model = self.snapshots[&id].clone();
            let killed = self.rng.below(2) == 0;
            self.reopen(killed);
            self.compare();
        }
    }

    fn delete(&mut self) {
        if let Some(id) = self.some_snapshot() {
            self.log.push(format!("delete {id}"));
            self.rig.block_on(self.device().snapshot_delete(&id)).unwrap();
            self.snapshots.remove(&id);
        }
    }

    fn grow(&mut self) {
        let more = 1 + self.rng.below(80);
        let size = (self.model.zones.len() as u64 + 1 + more) * ZONE;
        if size > 200 * ZONE {
            return;
        }
        self.log.push(format!("grow {size}"));
        self.rig
            .block_on(self.device().resize(size, false, Preallocation::Off))
            .unwrap();
        let zones = self.model.zones.len() + more as usize;
        self.model.zones.resize(zones, Zone::default());
        self.reopen(false);
    }

    /// Closed or killed, the image is whole; a kill may leave leaks, which a repair takes.
    fn check_image(&mut self) {
        let killed = self.rng.below(2) == 0;
        self.leave(killed);
        let repair = match self.rng.below(3) {
            0 => Repair::None,
            1 => Repair::Leaks,
            _ => Repair::All,
        };
        let graph = Graph::from_path(self.rig.path(NAME));
        let options = OpenOptions::default();
        let outcome = self
            .rig
            .block_on(check(&host(), &graph, &options, repair, &mut |_, _| {}))
            .unwrap();
        let (report, zones) = (outcome.report.unwrap(), outcome.zones.unwrap());
        assert_eq!(
            (report.corruptions, report.check_errors, zones.errors, zones.fixed),
            (0, 0, 0, 0),
            "{:?} {:?}",
            &report.messages[..report.messages.len().min(20)],
            zones.messages
        );
        let leaks = report.leaks + report.leaks_fixed;
        assert!(self.leaky || leaks == 0, "{leaks} leaks");
        self.leaky &= repair == Repair::None;
        self.device = Some(self.rig.open(NAME));
    }

    fn compare(&self) {
        let device = self.device();
        let zones = self.rig.zones(device);
        assert_eq!(zones.len(), self.model.zones.len() + 1);
        assert!(
            self.rig.read(device, 0, ZONE as usize) == self.model.plain,
            "zone 0"
        );
        for (zone, info) in self.model.zones.iter().zip(&zones[1..]) {
            let written = zone.data.len() as u64;
            assert_eq!(info.written_end, info.start + written, "{}", info.zone);
            let full = zone.finished || written == self.capacity;
            let condition = match (zone.read_only, full, written) {
                (true, _, _) => Condition::ReadOnly,
                (_, true, _) => Condition::Full,
                (_, _, 0) => Condition::Empty,
                _ => info.condition,
            };
            assert_eq!(info.condition, condition, "{}", info.zone);
            let mut expected = zone.data.clone();
            expected.resize(ZONE as usize, 0);
            assert!(
                self.rig.read(device, info.start, ZONE as usize) == expected,
                "zone {}",
                info.zone
            );
        }
    }

    /// QEMU finds the mapping right and reads the same below the write pointers; our tables it takes for leaks.
    fn ask_qemu(mut self, qemu: &Qemu) {
        self.rig.close(self.device.take().unwrap());
        let copy = self.rig.path("copy.qcow2");
        fs::copy(self.rig.path(NAME), &copy).unwrap();
        let bytes = fs::read(&copy).unwrap();
        let cluster = 1
            << Header::decode(&bytes[..], bytes.len() as u64)
                .unwrap()
                .cluster_bits;
        let mut header = Header::decode(&bytes[..cluster], bytes.len() as u64).unwrap();
        header.incompatible &= !(INCOMPAT_ZONED | INCOMPAT_ZONE_STATES);
        let file = fs::OpenOptions::new().write(true).open(&copy).unwrap();
        file.write_all_at(&header.encode().unwrap(), 0).unwrap();
        let output = qemu.try_img(&["check", "-f", "qcow2", copy.to_str().unwrap()]);
        // 3: leaks and nothing else.
        assert_eq!(output.code, Some(3), "{}", output.text);
        let contents = qemu.contents(&copy, None);
        assert!(contents[..ZONE as usize] == self.model.plain, "zone 0, says QEMU");
        for (index, zone) in self.model.zones.iter().enumerate() {
            let start = (index + 1) * ZONE as usize;
            assert!(
                contents[start..][..zone.data.len()] == zone.data,
                "zone {}, says QEMU",
                index + 1
            );
        }
    }
}

fn run(seed: u64, steps: u32, qemu: Option<&Qemu>) {
    let mut history = History::new(seed);
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        for _ in 0..steps {
            history.step();
        }
        history.reopen(false);
        history.compare();
    }));
    if let Err(panic) = result {
        eprintln!("ZBDKIT_SEED={seed}: {}", history.log.join("; "));
        std::panic::resume_unwind(panic);
    }
    if let Some(qemu) = qemu {
        history.ask_qemu(qemu);
    }
}

#[test]
fn random_histories_end_as_the_model_does() {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let qemu = Qemu::find();
    if let Some(seed) = number("ZBDKIT_SEED") {
        return run(seed, 150, qemu.as_ref());
    }
    for history in 0..number("ZBDKIT_RANDOM").unwrap_or(4) {
        run(
            history.wrapping_mul(0x9e37_79b9_7f4a_7c15) + 1,
            150,
            qemu.as_ref(),
        );
    }
}
