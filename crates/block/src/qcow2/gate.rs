//! What an image may have opened: its backing images and its external data file.
//!
//! An image names other files, and whoever wrote it need not be trusted by whoever opens it. So such a name is a plain
//! path and nothing else (no `json:`, no protocol), relative to the image's directory or absolute; it is opened for reading
//! only (the data file excepted), as the format that image or user state; and a chain ends before it is absurd, or
//! comes back to itself.

use std::path::{Path, PathBuf};

use crate::error::OpenError;
use crate::host::FileId;

/// Most images in a chain.
pub const MAX_DEPTH: usize = 200;

/// The formats that a backing image can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageFormat {
    /// The bytes as they are.
    Raw,
    /// qcow2.
    Qcow2,
}

impl ImageFormat {
    /// The format of that name.
    pub fn of_name(name: &str) -> Option<ImageFormat> {
        match name {
            "raw" | "file" | "host_device" => Some(ImageFormat::Raw),
            "qcow2" => Some(ImageFormat::Qcow2),
            _ => None,
        }
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            ImageFormat::Raw => "raw",
            ImageFormat::Qcow2 => "qcow2",
        }
    }
}

/// The file that an image names, as `what`.
pub fn resolve(image: &Path, name: &str, what: &str) -> Result<PathBuf, OpenError> {
    let refuse = |problem: String| Err(OpenError::data(image, problem));
    if name.is_empty() || name.contains('\0') {
        return refuse(format!("the name of its {what} is no file name"));
    }
    if let Some(protocol) = protocol_of(name) {
        return refuse(format!(
            "its {what} is {name:?}, by the protocol {protocol:?}: only files are opened (a file of that name is written \
             ./{name})"
        ));
    }
    let directory = image.parent().unwrap_or(Path::new(""));
    Ok(directory.join(name))
}

/// What QEMU would take for a protocol: what stands before a colon, with no slash before it.
fn protocol_of(name: &str) -> Option<&str> {
    let (protocol, _) = name.split_once(':')?;
    (!protocol.contains('/')).then_some(protocol)
}

/// The format of an image's backing image, as the image states it. It is never guessed: a guest that writes to a raw
/// image can make it look like any other.
pub fn backing_format(image: &Path, name: &str, stated: Option<&str>) -> Result<ImageFormat, OpenError> {
    let fix = |format: &str| format!("zbdkit rebase -u -b {name} -F {format} {}", image.display());
    match stated {
        Some(format) => ImageFormat::of_name(format).ok_or_else(|| {
            OpenError::data(
                image,
                format!("its backing image {name:?} has the format {format:?}, which zbdkit does not know: raw and qcow2 it does"),
            )
        }),
        None => Err(OpenError::data(
            image,
            format!(
                "it does not say what format its backing image {name:?} has, and guessing is not safe, since a guest that \
                 writes to a raw image can make it look like another; say it once: {} (or qcow2)",
                fix("raw")
            ),
        )),
    }
}

/// The images that are being opened, from the top on.
#[derive(Clone, Debug, Default)]
pub struct Chain {
    ids: Vec<FileId>,
}

impl Chain {
    /// Adds a file; fails where it is among them already, or where there are too many.
    pub fn add(&mut self, path: &Path, id: FileId) -> Result<(), OpenError> {
        if self.ids.contains(&id) {
            return Err(OpenError::data(
                path,
                "it is its own backing image or data file, over some images or none: the chain has no end",
            ));
        }
        if self.ids.len() > MAX_DEPTH {
            return Err(OpenError::data(
                path,
                format!(
                    "more than {MAX_DEPTH} images lie below each other: `zbdkit convert` makes one of them"
                ),
            ));
        }
        self.ids.push(id);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_plain_paths_beside_the_image() {
        let image = Path::new("/images/top.qcow2");
        let resolved = |name| resolve(image, name, "backing image").map_err(|e| e.to_string());
        assert_eq!(resolved("base.raw"), Ok("/images/base.raw".into()));
        assert_eq!(resolved("../x/base:1.raw"), Ok("/images/../x/base:1.raw".into()));
        assert_eq!(resolved("/dev/vdb"), Ok("/dev/vdb".into()));
        assert_eq!(resolved("./a:b"), Ok("/images/./a:b".into()));
        for name in [
            "",
            "json:{\"driver\":\"file\",\"filename\":\"/etc/passwd\"}",
            "nbd://host/x",
            "nbd:unix:/run/x",
            "file:base.raw",
            "fat:/etc",
            "a\0b",
        ] {
            assert!(resolved(name).is_err(), "{name}");
        }
        assert_eq!(
            resolve(Path::new("top.qcow2"), "base", "backing image").unwrap(),
            Path::new("base")
        );
    }

    #[test]
    fn a_format_is_stated_and_never_guessed() {
        let image = Path::new("top.qcow2");
        let format = |stated| backing_format(image, "base", stated);
        assert_eq!(format(Some("raw")).unwrap(), ImageFormat::Raw);
        assert_eq!(format(Some("qcow2")).unwrap(), ImageFormat::Qcow2);
        assert!(format(Some("vmdk")).is_err());
        let message = format(None).unwrap_err().to_string();
        assert!(
            message.contains("zbdkit rebase -u -b base -F raw top.qcow2"),
            "{message}"
        );
    }

    #[test]
    fn chains_end() {
        let mut chain = Chain::default();
        let id = |ino| FileId {
            dev: 1,
            ino,
            btime: 0,
        };
        for ino in 0..=MAX_DEPTH as u64 {
            chain.add(Path::new("x"), id(ino)).unwrap();
        }
        assert!(
            chain
                .add(Path::new("x"), id(5))
                .unwrap_err()
                .to_string()
                .contains("own backing")
        );
        assert!(
            chain
                .add(Path::new("x"), id(1 << 40))
                .unwrap_err()
                .to_string()
                .contains("200")
        );
    }
}
