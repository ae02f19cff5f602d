//! Forged zone extensions and zone tables of qcow2 images: opened, used, checked and repaired, they do no harm.
//!
//! [`run`] takes bytes for a description of what is forged in a valid image, so that a fuzzer can think of it:
//!
//! ```text
//! 0        which of the valid images
//! 1        what else: bits, see the constants
//! 2..10    decides what is done with the image
//! then     patches: where (1 byte), offset there (2, big-endian), length (1), the bytes
//! ```

mod host;

use std::path::Path;
use std::sync::{Arc, LazyLock, OnceLock};

use zbdkit_block::{
    CreateOptions, CrossZone, Device, Graph, Host, OpenOptions, Preallocation, Qcow2CreateOptions, Repair,
    RunStateMode, ZnsOptions, ZoneOp, check, create_qcow2,
};
use zbdkit_io::{IoBuf, Runtime};
use zbdkit_qcow2::{Header, Layout};
use zbdkit_spec::qcow2::{AUTOCLEAR_ZONE_TABLE, EXT_ZBDKIT, EXT_ZONED, INCOMPAT_ZONE_STATES, INCOMPAT_ZONED};
use zbdkit_spec::sidecar;
use zbdkit_zone::{CloseEmpty, Filter, Model};

use crate::kill::rng::Rng;
pub use host::MemoryHost;

const IMAGE: &str = "/image/disk.qcow2";
/// So many valid images there are.
pub const IMAGES: u8 = 4;

/// Checksums are made right again after the patches.
pub const RIGHT_CHECKSUMS: u8 = 1;
/// The bit that says that our table is true goes.
pub const STRANGER_WROTE: u8 = 2;
/// The incompatible bit of zone states changes.
pub const STATES: u8 = 4;
/// The incompatible bit of zones goes.
pub const NO_ZONES: u8 = 8;
/// The file ends early.
pub const CUT: u8 = 16;

/// A valid image, and where in it what lies.
struct Valid {
    bytes: Vec<u8>,
    table: u64,
    area: (u64, u64),
    snapshots: (u64, u64),
}

/// Forges an image as `input` says and does everything with it; says whether it could be opened for writing. Panics
/// where something goes wrong.
pub fn run(runtime: &Runtime, input: &[u8]) -> bool {
    let Some((head, patches)) = input.split_at_checked(10) else {
        return false;
    };
    let valid = valid(runtime, head[0] % IMAGES);
    let bytes = forge(valid, head[1], patches);
    let seed = u64::from_be_bytes(head[2..10].try_into().expect("eight bytes"));
    runtime.block_on(use_it(bytes, &mut Rng::new(seed)))
}

/// A forgery that a seed describes, for those who have no fuzzer.
pub fn random_input(seed: u64) -> Vec<u8> {
    let mut rng = Rng::new(seed);
    let mut input = vec![rng.below(IMAGES.into()) as u8];
    let flags = [RIGHT_CHECKSUMS, RIGHT_CHECKSUMS, RIGHT_CHECKSUMS | STATES, 0];
    let more = [0, 0, 0, STRANGER_WROTE, STRANGER_WROTE, NO_ZONES, CUT];
    input.push(flags[rng.below(4) as usize] | more[rng.below(7) as usize]);
    input.extend(rng.number().to_be_bytes());
    for _ in 0..1 + rng.below(4) {
        let region = rng.below(REGIONS) as u8;
        let most = [112, 44, 56, 64, 256, 600, 200, 300][usize::from(region)];
        let width = 1 << rng.below(4);
        let offset = rng.below(most) / width * width;
        let value = match rng.below(6) {
            0 => 0,
            1 => u64::MAX,
            2 => 1 << rng.below(64),
            3 => rng.below(64) << (8 * rng.below(8)),
            4 => rng.below(1 << 20) << 12,
            _ => rng.number(),
        };
        input.push(region);
        input.extend((offset as u16).to_be_bytes());
        input.push(width as u8);
        input.extend(&value.to_be_bytes()[8 - width as usize..]);
    }
    input
}

const REGIONS: u64 = 8;

fn valid(runtime: &Runtime, number: u8) -> &'static Valid {
    static VALID: LazyLock<[OnceLock<Valid>; IMAGES as usize]> = LazyLock::new(Default::default);
    VALID[usize::from(number)].get_or_init(|| runtime.block_on(make(number)))
}

/// Makes a valid image that was used.
async fn make(number: u8) -> Valid {
    let machine = MemoryHost::default();
    let host: Arc<dyn Host> = Arc::new(machine.clone());
    let (zones, size) = (
        [5, 70, 9, 3][usize::from(number)],
        [64 << 10, 16 << 10, 128 << 10, 32 << 10][usize::from(number)],
    );
    let options = Qcow2CreateOptions {
        layout: Layout {
            cluster_size: [4096, 512, 16384, 8192][usize::from(number)],
            extended_l2: number == 2,
            ..Layout::default()
        },
        zones: Some(CreateOptions {
            zone_size: Some(size),
            zone_capacity: Some(size - 4096 * u64::from(number % 2)),
            conventional_zones: u32::from(number % 3),
            model: if number == 3 {
                Model::HostAware
            } else {
                Model::HostManaged
            },
            max_open: Some(2),
            max_active: 3,
            block_size: 512,
            zns: match number {
                0 | 1 => ZnsOptions {
                    zrwa_size: Some(2048),
                    zrwa_granularity: Some(1024),
                    max_zrwa: Some(2),
                    extension_size: 128,
                },
                _ => ZnsOptions::default(),
            },
            ..CreateOptions::new(IMAGE, 0)
        }),
        // The last zone is shorter.
        ..Qcow2CreateOptions::new(IMAGE, zones * size - if number == 1 { 8192 } else { 0 })
    };
    create_qcow2(&host, &options).await.expect("valid options");
    let mut rng = Rng::new(number.into());
    for round in 0..2 {
        let device = open(&host, false).await.expect("a valid image opens");
        for _ in 0..20 {
            work(&device, &mut rng).await;
        }
        if round == 0 {
            device
                .snapshot_create("first")
                .await
                .expect("a valid image has room");
        }
        device.close().await.expect("a valid image closes");
    }
    let bytes = machine.get(Path::new(IMAGE)).expect("it was made");
    let header = Header::decode(&bytes, bytes.len() as u64).expect("a valid header");
    let word = |magic, at: usize| {
        let data = header.extension(magic).expect("it has zones");
        u64::from_be_bytes(data[at..at + 8].try_into().expect("eight bytes"))
    };
    Valid {
        table: word(EXT_ZONED, 24),
        area: (word(EXT_ZBDKIT, 8), word(EXT_ZBDKIT, 16)),
        snapshots: (word(EXT_ZBDKIT, 24), word(EXT_ZBDKIT, 32)),
        bytes,
    }
}

fn forge(valid: &Valid, flags: u8, mut patches: &[u8]) -> Vec<u8> {
    let mut bytes = valid.bytes.clone();
    let mut header = Header::decode(&bytes, bytes.len() as u64).expect("a valid header");
    let mut zoned = header.extension(EXT_ZONED).unwrap_or_default().to_vec();
    let mut ours = header.extension(EXT_ZBDKIT).unwrap_or_default().to_vec();
    let mut fields = Vec::new();
    while let Some((head, rest)) = patches.split_at_checked(4) {
        let offset = usize::from(u16::from_be_bytes([head[1], head[2]]));
        let (data, rest) = rest.split_at(usize::from(head[3]).min(rest.len()));
        patches = rest;
        match u64::from(head[0]) % REGIONS {
            // After everything else, since the header is encoded anew.
            0 => fields.push((offset % 512, data)),
            1 => patch(&mut zoned, offset % 64, data),
            2 => patch(&mut ours, offset % 64, data),
            // Other lengths are other layouts, or none.
            3 => zoned.resize(offset % 80, 0),
            4 => patch(&mut bytes, valid.table as usize + offset, data),
            5 | 6 => patch(&mut bytes, valid.area.0 as usize + offset, data),
            _ if valid.snapshots.0 != 0 => patch(&mut bytes, valid.snapshots.0 as usize + offset, data),
            _ => ours.resize(offset % 80, 0),
        }
    }
    header.set_extension(EXT_ZONED, Some(zoned));
    header.set_extension(EXT_ZBDKIT, Some(ours));
    if flags & STRANGER_WROTE != 0 {
        header.autoclear &= !AUTOCLEAR_ZONE_TABLE;
    }
    if flags & STATES != 0 {
        header.incompatible ^= INCOMPAT_ZONE_STATES;
    }
    if flags & NO_ZONES != 0 {
        header.incompatible &= !INCOMPAT_ZONED;
    }
    if let Ok(encoded) = header.encode() {
        bytes[..encoded.len()].copy_from_slice(&encoded);
    }
    for (offset, data) in fields {
        patch(&mut bytes, offset, data);
    }
    if flags & RIGHT_CHECKSUMS != 0 {
        right_checksums(&mut bytes, valid.area);
    }
    if flags & CUT != 0 {
        bytes.truncate(valid.area.0 as usize + 5000);
    }
    bytes
}

/// Overwrites bytes, as far as they are there; an extension may grow a little.
fn patch(bytes: &mut Vec<u8>, offset: usize, data: &[u8]) {
    if bytes.len() < 128 && offset + data.len() > bytes.len() {
        bytes.resize(offset + data.len(), 0);
    }
    let end = (offset + data.len()).min(bytes.len());
    if offset < end {
        bytes[offset..end].copy_from_slice(&data[..end - offset]);
    }
}

/// Gives every copy in the area the checksum of what it holds.
fn right_checksums(bytes: &mut [u8], (offset, len): (u64, u64)) {
    let Some(area) = bytes.get_mut(offset as usize..(offset + len) as usize) else {
        return;
    };
    for copy in area.chunks_exact_mut(sidecar::BLOCK) {
        let at = if copy.starts_with(&sidecar::MAGIC) {
            12
        } else if copy.starts_with(&sidecar::BLOCK_MAGIC) {
            4
        } else {
            continue;
        };
        copy[at..at + 4].fill(0);
        let sum = crc32c::crc32c(copy);
        copy[at..at + 4].copy_from_slice(&sum.to_le_bytes());
    }
}

async fn open(host: &Arc<dyn Host>, read_only: bool) -> Option<Device> {
    let options = OpenOptions {
        read_only,
        run_state: RunStateMode::None,
        ..OpenOptions::default()
    };
    Graph::from_path(IMAGE).open(host, &options).await.ok()
}

/// Everything that can be done with an image that has zones.
async fn use_it(bytes: Vec<u8>, rng: &mut Rng) -> bool {
    let machine = MemoryHost::default();
    machine.put(Path::new(IMAGE), bytes);
    let host: Arc<dyn Host> = Arc::new(machine);
    if let Some(device) = open(&host, true).await {
        look(&device, rng).await;
        let _ = device.close().await;
    }
    let graph = Graph::from_path(IMAGE);
    let options = OpenOptions::default();
    let _ = check(&host, &graph, &options, Repair::None, &mut |_, _| {}).await;
    let mut opened = false;
    for _ in 0..2 {
        let Some(device) = open(&host, false).await else {
            break;
        };
        opened = true;
        for _ in 0..12 {
            work(&device, rng).await;
        }
        look(&device, rng).await;
        offline(&device, rng).await;
        if rng.one_in(3) {
            drop(device);
        } else {
            let _ = device.close().await;
        }
    }
    for repair in [Repair::Leaks, Repair::All] {
        let _ = check(&host, &graph, &options, repair, &mut |_, _| {}).await;
    }
    if let Some(device) = open(&host, false).await {
        look(&device, rng).await;
        let _ = device.close().await;
    }
    opened
}

/// Reports and reads.
async fn look(device: &Device, rng: &mut Rng) {
    let limits = device.limits().clone();
    let Ok(zones) = device.report(0, Filter::All, 100).await else {
        return;
    };
    for zone in &zones {
        assert!(zone.start + zone.len <= limits.size, "{zone:?} is past the end");
        assert!(zone.capacity <= zone.len, "{zone:?} has more capacity than bytes");
        assert!(
            zone.written_end <= zone.start + zone.capacity,
            "{zone:?} has more bytes than capacity"
        );
    }
    for zone in &zones {
        let _ = device.extension(zone.start).await;
    }
    let lane = device.lane(4);
    for _ in 0..8 {
        let offset = rng.below(limits.size / 512 + 1) * 512;
        let len = (512 * rng.below(64)).min(limits.size.saturating_sub(offset));
        let cross = if rng.one_in(2) {
            CrossZone::Allow
        } else {
            CrossZone::Refuse
        };
        let _ = device
            .read(&lane, IoBuf::alloc(len as usize), offset, cross)
            .await;
        let _ = device.map(offset, len).await;
    }
}

/// One request of a guest, or of the operator.
async fn work(device: &Device, rng: &mut Rng) {
    let limits = device.limits().clone();
    let lane = device.lane(4);
    let buf = IoBuf::alloc(limits.block_size as usize * (1 + rng.below(8) as usize));
    buf.fill(0..buf.len(), 0xa5);
    let first = rng.below(limits.size);
    let Ok(zones) = device.report(first, Filter::All, 1).await else {
        let _ = device.write(&lane, buf, first / 4096 * 4096).await;
        return;
    };
    let Some(zone) = zones.first() else { return };
    match rng.below(14) {
        0..=4 => drop(device.write(&lane, buf, zone.wp).await),
        5..=6 => drop(device.append(&lane, buf, zone.start).await),
        7 => drop(device.write(&lane, buf, zone.start).await),
        8 => drop(device.flush(&lane).await),
        9 => {
            let ops = [
                ZoneOp::Open,
                ZoneOp::Close(CloseEmpty::ToEmpty),
                ZoneOp::Finish,
                ZoneOp::Reset,
                ZoneOp::SetReadOnly,
                ZoneOp::SetOffline,
                ZoneOp::SetNormal,
            ];
            let op = ops[rng.below(ops.len() as u64) as usize];
            let _ = device.zone_op(&lane, op, zone.start).await;
        }
        10 => drop(device.zone_op(&lane, ZoneOp::Reset, zone.start).await),
        11 if zone.attributes.zrwa => drop(device.commit_zrwa(&lane, zone.wp + 1024).await),
        11 => drop(device.zone_op(&lane, ZoneOp::OpenZrwa, zone.start).await),
        12 => drop(
            device
                .set_extension(&lane, zone.start, &[0x5a; 128], rng.below(2) == 0)
                .await,
        ),
        _ => drop(device.write_zeroes(&lane, zone.wp, 4096, true).await),
    }
}

/// What needs the device for itself; it is only closed afterwards.
async fn offline(device: &Device, rng: &mut Rng) {
    let names: Vec<String> = match device.snapshots().await {
        Ok(all) => all.into_iter().map(|snapshot| snapshot.id).collect(),
        Err(_) => Vec::new(),
    };
    let some = names.get(rng.below(names.len() as u64 + 1) as usize);
    match (rng.below(5), some) {
        (0, _) => drop(device.snapshot_create("new").await),
        (1, Some(id)) => drop(device.snapshot_apply(id).await),
        (2, Some(id)) => drop(device.snapshot_delete(id).await),
        (3, _) => {
            let zone = device
                .limits()
                .zoned
                .as_ref()
                .map_or(4096, |zones| zones.zone_size());
            let size = device
                .limits()
                .size
                .saturating_add(zone.saturating_mul(rng.below(3)));
            let _ = device.resize(size, rng.one_in(2), Preallocation::Off).await;
        }
        _ => {}
    }
}
