//! Forged and damaged images: the work and memory of a check follow the bytes that are there, and a cut in the middle
//! of a repair leaves an image that can be repaired to the same contents.

mod check;
mod support;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use check::damage::Map;
use check::world::{self, Areas, check_file, disk_of, set_word};
use check::{Class, Counts};
use proptest::prelude::*;
use support::crash::Disk;
use support::{Rng, block_on};
use zbdkit_io::{File, IoBuf, LocalBoxFuture, Storage, StorageOp};
use zbdkit_qcow2::{CheckReport, Header, Layout, Repair};

const COPIED: u64 = 1 << 63;
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// Counts what is read of a disk, and reads no more than that.
struct Counting {
    disk: Disk,
    read: Arc<AtomicU64>,
    most: u64,
}

impl Storage for Counting {
    fn submit(&self, op: StorageOp) -> LocalBoxFuture<'static, io::Result<()>> {
        if let StorageOp::Read { buf, .. } = &op {
            let read = self.read.fetch_add(buf.len() as u64, Ordering::Relaxed);
            if read > self.most {
                return Box::pin(async { Err(io::Error::other("enough")) });
            }
        }
        self.disk.submit(op)
    }

    fn len(&self) -> io::Result<u64> {
        self.disk.len()
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.disk.set_len(len)
    }
}

/// A forged image, written where it pleases.
struct Forged {
    disk: Disk,
    header: Header,
}

impl Forged {
    fn new(cluster_bits: u32) -> Forged {
        let mut header = Header::new(cluster_bits);
        header.size = 1 << 20;
        header.l1_offset = header.cluster_size();
        header.l1_size = header.l1_entries_for(header.size) as u32;
        header.refcount_table_offset = 1 << 30;
        header.refcount_table_clusters = 1;
        Forged {
            disk: Disk::new(),
            header,
        }
    }

    fn put(&self, offset: u64, bytes: Vec<u8>) {
        block_on(self.disk.file().write(IoBuf::from_vec(bytes), offset)).unwrap();
    }

    fn words(&self, offset: u64, words: impl Iterator<Item = u64>) {
        self.put(offset, words.flat_map(u64::to_be_bytes).collect());
    }

    /// Checks it. At most so many bytes may be read.
    fn check(&self, len: u64, most: u64) -> CheckReport {
        self.put(0, self.header.encode().unwrap());
        self.disk.set_len(len).unwrap();
        let read = Arc::new(AtomicU64::new(0));
        let file = File::custom(Arc::new(Counting {
            disk: self.disk.clone(),
            read: read.clone(),
            most,
        }));
        let report = block_on(check_file(&file, &Areas::new(), Repair::None)).unwrap();
        let read = read.load(Ordering::Relaxed);
        assert!(read <= most, "{read} bytes were read");
        assert!(report.messages.len() <= 1001);
        assert!(report.corruptions > 0);
        report
    }
}

const GIB: u64 = 1 << 30;

#[test]
fn a_table_is_read_as_often_as_it_lies_in_the_file() {
    // A large L1 table, all entries of which name one L2 table, all entries of which name one cluster.
    let mut forged = Forged::new(16);
    let (c, entries) = (1 << 16, 1 << 20);
    forged.header.l1_size = entries as u32;
    forged.words(c, (0..entries).map(|_| 100 << 20));
    forged.words(100 << 20, (0..8192).map(|_| 200 << 20 | COPIED));
    let report = forged.check(2 * GIB, 20 << 20);
    assert_eq!(report.allocated_clusters, 8192);
}

#[test]
fn snapshots_on_one_table_are_not_followed_one_by_one() {
    let mut forged = Forged::new(9);
    forged.header.nb_snapshots = 65536;
    forged.header.snapshots_offset = 1 << 29;
    let mut entry = [0; 56];
    entry[..8].copy_from_slice(&(64u64 << 20).to_be_bytes());
    entry[8..12].copy_from_slice(&(4u32 << 20).to_be_bytes());
    entry[39] = 16;
    forged.put(1 << 29, entry.repeat(65536));
    forged.check(2 * GIB, 60 << 20);
}

#[test]
fn a_refcount_block_that_is_named_often_is_read_once() {
    let mut forged = Forged::new(21);
    forged.header.refcount_table_clusters = 4;
    forged.words(GIB, (0..1 << 20).map(|_| 10 << 21));
    forged.put(10 << 21, vec![1; 1 << 21]);
    let report = forged.check(1 << 50, 80 << 20);
    assert!(report.corruptions >= (1 << 20) - 1);
}

#[test]
fn references_far_apart_take_little_memory() {
    let mut forged = Forged::new(9);
    let entries = (32 << 20) / 512u64;
    forged.header.size = entries * 64 * 512;
    forged.header.l1_size = entries as u32;
    forged.words(512, (0..entries).map(|n| (16 << 20) + n * 512));
    // Each in a page of its own.
    forged.words(16 << 20, (1..entries * 64 / 32).map(|n| n << 25));
    let before = peak_memory();
    forged.check(1 << 55, 100 << 20);
    let grown = peak_memory() - before;
    assert!(grown < GIB, "{grown} bytes");
}

/// Most memory that this process ever had, bytes.
fn peak_memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
}

fn layouts() -> [Layout; 5] {
    let layout = |cluster_bits: u32, refcount_bits| Layout {
        size: 100 << cluster_bits,
        cluster_size: 1 << cluster_bits,
        refcount_bits,
        ..Layout::default()
    };
    let extended = Layout {
        extended_l2: true,
        ..layout(14, 16)
    };
    let old = Layout {
        version: 2,
        ..layout(12, 16)
    };
    [layout(9, 16), layout(9, 64), layout(12, 1), extended, old]
}

/// An image, damaged in its metadata.
fn damaged(seed: u64) -> (Vec<u8>, Vec<u8>, String) {
    let mut rng = Rng(seed);
    let layouts = layouts();
    let layout = &layouts[rng.below(layouts.len() as u64) as usize];
    let whole = world::image(layout);
    let map = Map::of(&whole);
    let mut bytes = whole.clone();
    let mut said = format!("{layout:?}");
    for _ in 0..1 + rng.below(6) / 2 {
        said += &format!("\n  {}", map.damage(&mut bytes, &mut rng));
    }
    (whole, bytes, said)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn damage_neither_panics_nor_comes_back_after_a_repair(seed: u64) {
        let (_, mut bytes, said) = damaged(seed);
        let before = world::contents(&bytes);
        let Ok(found) = world::check(&mut bytes, &Areas::new(), Repair::None) else {
            return Ok(());
        };
        let untouched = bytes.clone();
        let lowered = world::check(&mut bytes, &Areas::new(), Repair::Leaks).unwrap();
        prop_assert!(Counts::from(&lowered).class() <= Counts::from(&found).class(), "{} {:?}", said, lowered);
        bytes = untouched;
        let repaired = world::check(&mut bytes, &Areas::new(), Repair::All).unwrap();
        prop_assert!(Counts::from(&repaired).class() <= Counts::from(&found).class(), "{} {:?}", said, repaired);
        let again = world::check(&mut bytes, &Areas::new(), Repair::None).unwrap();
        prop_assert_eq!(Counts::from(&again), Counts::from(&repaired), "{}", said);
        if Counts::from(&again).class() == Class::Clean && before.is_some() {
            prop_assert!(world::contents(&bytes) == before, "{said} {repaired:?}");
        }
    }

    #[test]
    fn bytes_that_only_begin_like_an_image_do_not_panic(seed: u64, bits in 9u32..15) {
        let mut rng = Rng(seed);
        let mut header = Header::new(bits);
        let c = header.cluster_size();
        let clusters = 40;
        header.size = c * 20;
        header.refcount_order = rng.below(7) as u32;
        header.l1_offset = rng.below(clusters) * c;
        header.l1_size = 1 + rng.below(40) as u32;
        header.refcount_table_offset = rng.below(clusters) * c;
        header.refcount_table_clusters = rng.below(3) as u32;
        header.nb_snapshots = rng.below(3) as u32;
        header.snapshots_offset = rng.below(clusters) * c;
        header.incompatible = (rng.below(2) * 16) * u64::from(bits >= 14);
        let mut bytes = header.encode().unwrap();
        for _ in 0..clusters * c / 8 {
            // Words that look like entries more often than not.
            let word = match rng.below(8) {
                0 => rng.word(),
                1 => (rng.below(clusters) * c) | COPIED,
                2 => rng.below(clusters) * c,
                3 => (rng.below(clusters) * c) | (1 << 62),
                4 => 0x0001_0001_0001_0001,
                _ => 0,
            };
            bytes.extend(word.to_be_bytes());
        }
        for repair in [Repair::None, Repair::Leaks, Repair::All] {
            let _ = world::check(&mut bytes.clone(), &Areas::new(), repair);
        }
    }
}

/// Findings that are worse than a leak.
fn serious(report: &CheckReport) -> usize {
    let messages = report.messages.iter();
    messages.filter(|line| !line.starts_with("Leaked")).count()
}

/// Repairs, cuts the power at each moment and each way that chance finds, and repairs what is left.
fn cut(bytes: &[u8], repair: Repair, said: &str) {
    let contents = world::contents(bytes).expect("readable");
    let disk = disk_of(bytes);
    let before = serious(&world::check(&mut bytes.to_vec(), &Areas::new(), Repair::None).unwrap());
    let report = block_on(check_file(&disk.file(), &Areas::new(), repair)).unwrap();
    assert_eq!(Counts::from(&report).class(), Class::Clean, "{said} {report:?}");
    for moment in 0..=disk.moment() {
        for seed in 0..8 {
            let left = disk.power_cut(moment, &mut Rng(seed)).to_vec();
            let said = format!("{said}, cut at {moment} of {} by {seed}", disk.moment());
            let mut left = left;
            let found = world::check(&mut left, &Areas::new(), Repair::None).expect(&said);
            assert!(serious(&found) <= before, "{said}: {found:?}");
            assert!(
                world::contents(&left) == Some(contents.clone()),
                "{said}: read before"
            );
            let report = world::check(&mut left, &Areas::new(), Repair::All).expect(&said);
            assert_eq!(Counts::from(&report).class(), Class::Clean, "{said} {report:?}");
            assert!(
                world::contents(&left) == Some(contents.clone()),
                "{said}: read after"
            );
        }
    }
}

fn set_count(block: &mut [u8], order: u32, cluster: u64, count: u8) {
    match order {
        0 => block[cluster as usize / 8] |= count << (cluster % 8),
        _ => block[(((cluster + 1) << order) / 8 - 1) as usize] = count,
    }
}

#[test]
fn a_cut_in_a_repair_of_leaks_leaves_leaks_at_most() {
    for layout in layouts() {
        let mut bytes = world::image(&layout);
        let map = Map::of(&bytes);
        let header = &map.header;
        let at = world::word(&bytes, header.refcount_table_offset) as usize;
        // Clusters that are not there, and one that is: it must not be written in place while it is counted twice.
        let used = bytes.len() as u64 / header.cluster_size();
        for cluster in [used, used + 1, used + 3] {
            set_count(&mut bytes[at..], header.refcount_order, cluster, 1);
        }
        let entry = (world::word(&bytes, header.l1_offset) & OFFSET) + 3 * header.l2_entry_size();
        let data = world::word(&bytes, entry);
        if header.refcount_order > 0 && data & COPIED != 0 {
            let cluster = (data & OFFSET) / header.cluster_size();
            set_count(&mut bytes[at..], header.refcount_order, cluster, 2);
            set_word(&mut bytes, entry, data & !COPIED);
        }
        cut(&bytes, Repair::Leaks, &format!("{layout:?}"));
        cut(&bytes, Repair::All, &format!("{layout:?}"));
    }
}

#[test]
fn a_cut_in_a_full_repair_leaves_what_can_be_repaired() {
    for layout in layouts() {
        let whole = world::image(&layout);
        let map = Map::of(&whole);
        let (table, len) = (map.header.refcount_table_offset, map.header.cluster_size());
        // Counts all wrong.
        let mut bytes = whole.clone();
        let block = world::word(&bytes, table) as usize;
        let mut rng = Rng(7);
        for byte in &mut bytes[block..block + 24] {
            *byte = rng.word() as u8;
        }
        cut(&bytes, Repair::All, &format!("counts {layout:?}"));
        // No block at all.
        let mut bytes = whole.clone();
        set_word(&mut bytes, table, 0);
        cut(&bytes, Repair::All, &format!("block {layout:?}"));
        // Table all wrong.
        let mut bytes = whole.clone();
        for byte in &mut bytes[table as usize..(table + len.min(64)) as usize] {
            *byte = rng.word() as u8;
        }
        cut(&bytes, Repair::All, &format!("table {layout:?}"));
        // A snapshot table to be written anew, the counts right.
        let mut bytes = whole.clone();
        if map.header.nb_snapshots > 0 && map.header.version > 2 {
            let at = map.header.snapshots_offset as usize;
            let extra = bytes[at + 39];
            bytes[at + 39] = 0;
            bytes.copy_within(at + 40 + usize::from(extra)..at + 200, at + 40);
            cut(&bytes, Repair::All, &format!("snapshots {layout:?}"));
        }
        // Flags all wrong.
        let mut bytes = whole.clone();
        let l2 = world::word(&bytes, map.header.l1_offset) & OFFSET;
        for at in (l2..l2 + len).step_by(if layout.extended_l2 { 16 } else { 8 }) {
            let entry = world::word(&bytes, at);
            if entry & OFFSET != 0 && entry & 1 << 62 == 0 {
                set_word(&mut bytes, at, entry ^ COPIED);
            }
        }
        cut(&bytes, Repair::All, &format!("flags {layout:?}"));
    }
}
