//! What `info` says of qcow2 images and the images below them: qemu-img's words and JSON, and the zones.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use anyhow::Context;
use zbdkit_block::{FileOptions, HostError, LockMode, OpenError};
use zbdkit_io::File;
use zbdkit_qcow2::{Compression, Header, Snapshot};
use zbdkit_spec::qcow2::{CRYPT_AES, CRYPT_NONE};

use super::snapshots;
use crate::image::Session;
use crate::output::{printable, qemu_size};
use crate::shapes::qemu::{
    Child, Encryption, FileInfo, FileSpecific, ImageInfo, Qcow2Info, SnapshotInfo, Specific, Zoned,
};

/// An image as its header describes it, and its snapshots.
pub struct Described {
    pub path: PathBuf,
    pub header: Option<Header>,
    pub snapshots: Vec<Snapshot>,
    file_len: u64,
    disk_usage: Option<u64>,
}

impl Described {
    /// Reads what an image says of itself; `header` is `None` for a raw one.
    pub async fn read(path: &Path, file: &File, header: Option<Header>) -> anyhow::Result<Described> {
        let named = || path.display().to_string();
        let snapshots = match &header {
            Some(header) => zbdkit_qcow2::read_snapshots(file, header)
                .await
                .with_context(named)?,
            None => Vec::new(),
        };
        Ok(Described {
            path: path.to_owned(),
            header,
            snapshots,
            // QEMU counts files in sectors.
            file_len: file.len().with_context(named)?.next_multiple_of(512),
            disk_usage: super::disk_usage(path),
        })
    }

    /// Name and place of the image below, if there is one.
    pub fn backing(&self) -> Option<(&str, PathBuf)> {
        let name = self.header.as_ref()?.backing_file.as_deref()?;
        Some((name, beside(&self.path, name)))
    }

    /// As qemu-img's JSON has it.
    pub fn shape(&self, zoned: Option<Zoned>, notices: Vec<String>) -> ImageInfo {
        let filename = self.path.to_string_lossy().into_owned();
        let header = self.header.as_ref();
        let backing = self.backing();
        let encrypted = header.is_some_and(|header| header.crypt_method != CRYPT_NONE);
        ImageInfo {
            children: vec![Child {
                name: "file",
                info: FileInfo {
                    children: [],
                    virtual_size: self.file_len,
                    filename: filename.clone(),
                    format: "file",
                    actual_size: self.disk_usage,
                    format_specific: FileSpecific {
                        kind: "file",
                        data: Default::default(),
                    },
                    dirty_flag: false,
                },
            }],
            snapshots: self.snapshots.iter().map(SnapshotInfo::of).collect(),
            backing_filename_format: header
                .filter(|_| backing.is_some())
                .and_then(Header::backing_format)
                .map(str::to_owned),
            virtual_size: header.map_or(self.file_len, |header| header.size),
            filename,
            cluster_size: header.map(Header::cluster_size),
            format: if header.is_some() { "qcow2" } else { "raw" },
            actual_size: self.disk_usage,
            format_specific: header.map(|header| Specific::Qcow2(Box::new(specific(header, zoned)))),
            encrypted: encrypted.then_some(true),
            full_backing_filename: backing
                .as_ref()
                .map(|(_, full)| full.to_string_lossy().into_owned()),
            backing_filename: backing.map(|(name, _)| name.to_owned()),
            dirty_flag: header.is_some_and(Header::dirty),
            notices,
        }
    }
}

/// Opens a file to look at its header, as qemu-img's readers lock it.
pub fn open(session: &Session, path: &Path, force_share: bool) -> anyhow::Result<File> {
    let mut options = FileOptions::existing(true);
    if force_share {
        options.lock = LockMode::None;
    }
    let opened = session.host().open(path, &options).map_err(|error| match error {
        HostError::Io(source) => OpenError::File {
            path: path.to_owned(),
            doing: "cannot be opened",
            source,
        },
        HostError::Locked(conflict) => OpenError::Locked {
            path: path.to_owned(),
            lock: conflict.permission,
            holder: conflict.holder,
        },
    });
    Ok(opened?)
}

fn specific(header: &Header, zoned: Option<Zoned>) -> Qcow2Info {
    let v3 = header.version >= 3;
    Qcow2Info {
        compat: if v3 { "1.1" } else { "0.10" },
        compression_type: match header.compression {
            Compression::Zlib => "zlib",
            Compression::Zstd => "zstd",
        },
        lazy_refcounts: v3.then(|| header.lazy_refcounts()),
        refcount_bits: header.refcount_bits(),
        encrypt: match header.crypt_method {
            CRYPT_NONE => None,
            CRYPT_AES => Some(Encryption { format: "aes" }),
            _ => Some(Encryption { format: "luks" }),
        },
        data_file: header
            .data_file_name()
            .filter(|_| header.external_data())
            .map(str::to_owned),
        data_file_raw: header.external_data().then(|| header.data_raw()),
        zoned,
        corrupt: v3.then(|| header.corrupt()),
        extended_l2: v3.then(|| header.extended_l2()),
    }
}

/// Where the file of that name is that an image names: beside the image, but for an absolute name.
fn beside(image: &Path, name: &str) -> PathBuf {
    let name = name.strip_prefix("file:").unwrap_or(name);
    match image.parent() {
        Some(parent) => parent.join(name),
        None => name.into(),
    }
}

/// qemu-img's text for an image.
pub fn text(info: &ImageInfo, kept: &[Snapshot]) -> String {
    let mut text = String::new();
    // Writing to a string cannot fail.
    let mut line = |line: std::fmt::Arguments<'_>| {
        let _ = writeln!(text, "{line}");
    };
    let size = |bytes: u64| format!("{} ({bytes} bytes)", qemu_size(bytes));
    line(format_args!("image: {}", printable(&info.filename)));
    line(format_args!("file format: {}", info.format));
    line(format_args!("virtual size: {}", size(info.virtual_size)));
    if let Some(usage) = info.actual_size {
        line(format_args!("disk size: {}", qemu_size(usage)));
    }
    if info.encrypted == Some(true) {
        line(format_args!("encrypted: yes"));
    }
    if let Some(cluster_size) = info.cluster_size {
        line(format_args!("cluster_size: {cluster_size}"));
    }
    if info.dirty_flag {
        line(format_args!("cleanly shut down: no"));
    }
    if let (Some(name), Some(full)) = (&info.backing_filename, &info.full_backing_filename) {
        let name = printable(name);
        match printable(full) {
            full if full == name => line(format_args!("backing file: {name}")),
            full => line(format_args!("backing file: {name} (actual path: {full})")),
        }
    }
    if let Some(format) = &info.backing_filename_format {
        line(format_args!("backing file format: {}", printable(format)));
    }
    if !kept.is_empty() {
        line(format_args!("{}", snapshots::table(kept).trim_end()));
    }
    if let Some(Specific::Qcow2(specific)) = &info.format_specific {
        line(format_args!("Format specific information:"));
        for entry in specific_lines(specific) {
            line(format_args!("    {entry}"));
        }
    }
    for child in &info.children {
        line(format_args!("Child node '/{}':", child.name));
        line(format_args!("    filename: {}", printable(&child.info.filename)));
        line(format_args!("    protocol type: {}", child.info.format));
        line(format_args!("    file length: {}", size(child.info.virtual_size)));
        if let Some(usage) = child.info.actual_size {
            line(format_args!("    disk size: {}", qemu_size(usage)));
        }
    }
    text
}

fn specific_lines(info: &Qcow2Info) -> Vec<String> {
    let mut lines = vec![
        format!("compat: {}", info.compat),
        format!("compression type: {}", info.compression_type),
    ];
    let mut switch =
        |name: &str, value: Option<bool>| lines.extend(value.map(|value| format!("{name}: {value}")));
    switch("lazy refcounts", info.lazy_refcounts);
    lines.push(format!("refcount bits: {}", info.refcount_bits));
    if let Some(encryption) = &info.encrypt {
        lines.push("encrypt:".to_owned());
        lines.push(format!("    format: {}", encryption.format));
    }
    if let Some(file) = &info.data_file {
        lines.push(format!("data file: {}", printable(file)));
    }
    let mut switch =
        |name: &str, value: Option<bool>| lines.extend(value.map(|value| format!("{name}: {value}")));
    switch("data file raw", info.data_file_raw);
    if let Some(zoned) = &info.zoned {
        lines.push("zoned:".to_owned());
        lines.push(format!("    mode: {}", zoned.mode));
        for (name, value) in [
            ("nr zones", zoned.nr_zones.into()),
            ("zone size", zoned.zone_size),
            ("zone capacity", zoned.zone_capacity),
            ("conventional zones", zoned.conventional_zones.into()),
            ("max active zones", zoned.max_active_zones.into()),
            ("max open zones", zoned.max_open_zones.into()),
        ] {
            lines.push(format!("    {name}: {value}"));
        }
    }
    let mut switch =
        |name: &str, value: Option<bool>| lines.extend(value.map(|value| format!("{name}: {value}")));
    switch("corrupt", info.corrupt);
    switch("extended l2", info.extended_l2);
    lines
}
