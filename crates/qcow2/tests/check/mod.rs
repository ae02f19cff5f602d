//! Images that QEMU made, and what both checks say of them.

#![allow(dead_code, reason = "each test uses its part")]

pub mod damage;
pub mod world;

use std::path::{Path, PathBuf};

use zbdkit_qcow2::{CheckReport, Header, Repair};

use crate::support::qemu::Qemu;
use crate::support::{block_on, open_file};

/// How an image is made.
#[derive(Clone, Copy, Debug)]
pub struct Kind {
    pub cluster_size: u64,
    pub refcount_bits: u32,
    pub feature: Feature,
}

/// What an image has besides data, zeros and holes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Feature {
    Plain,
    Version2,
    Snapshots,
    Backing,
    Zlib,
    Zstd,
    ExtendedL2,
    DataFile,
    Bitmaps,
    Preallocated,
    Lazy,
    /// Snapshots, compressed clusters and bitmaps.
    Mixed,
}

pub const FEATURES: [Feature; 12] = [
    Feature::Plain,
    Feature::Version2,
    Feature::Snapshots,
    Feature::Backing,
    Feature::Zlib,
    Feature::Zstd,
    Feature::ExtendedL2,
    Feature::DataFile,
    Feature::Bitmaps,
    Feature::Preallocated,
    Feature::Lazy,
    Feature::Mixed,
];

impl Kind {
    /// Whether there can be such an image.
    pub fn is_possible(&self) -> bool {
        match self.feature {
            Feature::Version2 => self.refcount_bits == 16,
            Feature::ExtendedL2 => self.cluster_size >= 16 << 10,
            // Shared clusters need counts over 1.
            Feature::Snapshots | Feature::Mixed => self.refcount_bits > 1,
            // Several compressed clusters share one.
            Feature::Zlib | Feature::Zstd => self.refcount_bits > 4,
            _ => true,
        }
    }

    /// Bytes of the device: several L2 tables where they are small.
    fn size(&self) -> u64 {
        (self.cluster_size * 300).max(3 << 20) + 512
    }

    fn options(&self, directory: &Path) -> String {
        let mut options = vec![format!("cluster_size={}", self.cluster_size)];
        if self.feature == Feature::Version2 {
            options.push("compat=0.10".to_owned());
        } else {
            options.push(format!("refcount_bits={}", self.refcount_bits));
        }
        match self.feature {
            Feature::Zstd => options.push("compression_type=zstd".to_owned()),
            Feature::ExtendedL2 => options.push("extended_l2=on".to_owned()),
            Feature::Preallocated => options.push("preallocation=metadata".to_owned()),
            Feature::Lazy => options.push("lazy_refcounts=on".to_owned()),
            Feature::DataFile => options.push(format!("data_file={}", text(&directory.join("data.raw")))),
            _ => {}
        }
        options.join(",")
    }

    /// Makes the image `image.qcow2` in a directory of its own.
    pub fn make(&self, qemu: &Qemu, directory: &Path) -> PathBuf {
        let image = directory.join("image.qcow2");
        let path = text(&image);
        let (size, options) = (self.size().to_string(), self.options(directory));
        let mut create = vec!["create", "-q", "-f", "qcow2", "-o", &options];
        let backing = directory.join("base.raw");
        if self.feature == Feature::Backing {
            std::fs::write(&backing, vec![0x5b; self.size() as usize / 2]).unwrap();
            create.extend(["-b", text(&backing), "-F", "raw"]);
        }
        create.push(path);
        create.push(&size);
        qemu.img(&create);
        self.fill(qemu, &image);
        image
    }

    fn fill(&self, qemu: &Qemu, image: &Path) {
        let path = text(image);
        let c = self.cluster_size;
        qemu.io(image, &self.writes(1));
        match self.feature {
            Feature::Snapshots | Feature::Mixed => {
                qemu.img(&["snapshot", "-c", "first", path]);
                qemu.io(image, &self.writes(2));
                qemu.img(&["snapshot", "-c", "second", path]);
                qemu.io(image, &[format!("write -P 77 {} {}", c * 9, c * 3)]);
            }
            _ => {}
        }
        if matches!(self.feature, Feature::Zlib | Feature::Zstd | Feature::Mixed) {
            let compressed = |n: u64| format!("write -c -P {} {} {c}", n + 1, (60 + n) * c);
            qemu.io(image, &(0..10).map(compressed).collect::<Vec<_>>());
        }
        if matches!(self.feature, Feature::Bitmaps | Feature::Mixed) {
            qemu.img(&["bitmap", "--add", "--enable", "-g", "512", path, "one"]);
            qemu.img(&["bitmap", "--add", "--disable", "-g", "64k", path, "two"]);
            qemu.io(image, &[format!("write -P 9 {} {}", c * 100, c * 2)]);
        }
    }

    fn writes(&self, seed: u64) -> Vec<String> {
        let c = self.cluster_size;
        let mut commands = vec![
            format!("write -P {} 0 {}", seed, c * 4),
            format!("write -P {} {} {}", seed + 10, c * (20 + seed), c * 7),
            format!("write -P {} {} 512", seed + 20, c * 40 + 512),
            format!("write -z {} {}", c * 22, c * 2),
            format!("discard {} {}", c * (24 + seed), c),
            format!("write -P {} {} {}", seed + 30, c * 290, c * 2),
        ];
        if self.feature != Feature::Version2 {
            commands.push(format!("write -z -u {} {c}", c * 21));
        }
        commands
    }
}

/// A path as text.
pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Class {
    Clean,
    Leaks,
    Corruptions,
    CannotCheck,
}

/// What a check counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub corruptions: u64,
    pub leaks: u64,
    pub check_errors: u64,
    pub image_end: u64,
    pub total: u64,
    pub allocated: u64,
    pub fragmented: u64,
    pub compressed: u64,
}

impl Counts {
    pub fn class(&self) -> Class {
        match self {
            counts if counts.check_errors > 0 => Class::CannotCheck,
            counts if counts.corruptions > 0 => Class::Corruptions,
            counts if counts.leaks > 0 => Class::Leaks,
            _ => Class::Clean,
        }
    }
}

impl From<&CheckReport> for Counts {
    fn from(report: &CheckReport) -> Counts {
        Counts {
            corruptions: report.corruptions,
            leaks: report.leaks,
            check_errors: report.check_errors,
            image_end: report.image_end_offset,
            total: report.total_clusters,
            allocated: report.allocated_clusters,
            fragmented: report.fragmented_clusters,
            compressed: report.compressed_clusters,
        }
    }
}

/// What QEMU's check says; `None` where it says nothing but an error. And its own words.
pub fn ask(qemu: &Qemu, image: &Path, repair: Option<&str>) -> (Option<Counts>, String) {
    let mut args = vec!["check", "-f", "qcow2", "--output=json"];
    args.extend(repair.iter().flat_map(|what| ["-r", what]));
    args.push(text(image));
    let output = qemu.try_img(&args);
    let number = |name: &str| {
        let (_, rest) = output.stdout.split_once(&format!("\"{name}\": "))?;
        let digits = rest.split(|c: char| !c.is_ascii_digit()).next()?;
        digits.parse().ok()
    };
    let counts = number("check-errors").map(|check_errors| Counts {
        corruptions: number("corruptions").unwrap_or(0),
        leaks: number("leaks").unwrap_or(0),
        check_errors,
        image_end: number("image-end-offset").unwrap_or(0),
        total: number("total-clusters").unwrap_or(0),
        allocated: number("allocated-clusters").unwrap_or(0),
        fragmented: number("fragmented-clusters").unwrap_or(0),
        compressed: number("compressed-clusters").unwrap_or(0),
    });
    (counts, output.text)
}

/// What QEMU's check makes of an image.
pub fn class_by_qemu(qemu: &Qemu, image: &Path, repair: Option<&str>) -> (Class, String) {
    let (counts, words) = ask(qemu, image, repair);
    (counts.map_or(Class::CannotCheck, |counts| counts.class()), words)
}

/// What our check says; an error where the header is none.
pub fn check(image: &Path, repair: Repair) -> Result<CheckReport, zbdkit_qcow2::Error> {
    let file = open_file(image);
    block_on(async {
        let header = Header::read_for_check(&file).await?;
        zbdkit_qcow2::check(&file, &header, None, &[], repair, &mut |_, _| {}).await
    })
}

/// What our check makes of an image.
pub fn class_by_us(image: &Path) -> (Class, String) {
    match check(image, Repair::None) {
        Ok(report) => (Counts::from(&report).class(), report.messages.join("\n")),
        Err(e) => (Class::CannotCheck, e.to_string()),
    }
}
