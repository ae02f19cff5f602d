//! What an overlay's header says of its backing image, and an overlay without anything of its own.

use std::path::{Path, PathBuf};

use zbdkit_qcow2::Qcow2;
use zbdkit_spec::qcow2::EXT_BACKING_FORMAT;

use super::ToolError;
use crate::device::Device;
use crate::error::{Error, OpenError};

/// The file that an image names as its backing image.
///
/// # Errors
/// A name that is not a plain path: other files than those are not opened.
pub fn backing_path(image: &Path, name: &str) -> Result<PathBuf, OpenError> {
    crate::qcow2::resolve(image, name, "backing image")
}

/// Writes another backing image's name and format into an overlay's header, or that it has none; durable when this
/// returns. What the overlay reads as is the caller's affair.
///
/// # Errors
/// Refused: not a qcow2 image, or the name does not fit.
pub async fn set_backing(overlay: &Device, backing: Option<(&str, Option<&str>)>) -> Result<(), ToolError> {
    let (name, format) = match backing {
        Some((name, format)) => (Some(name), format),
        None => (None, None),
    };
    let changed = image(overlay)?.update_header(|header| {
        header.backing_file = name.map(str::to_owned);
        header.set_extension(
            EXT_BACKING_FORMAT,
            format.map(|format| format.as_bytes().to_vec()),
        );
        Ok(())
    });
    changed.await.map_err(|error| match error {
        zbdkit_qcow2::Error::Invalid(why) | zbdkit_qcow2::Error::Refused(why) => ToolError::Refused(why),
        error => ToolError::request("writing the header", 0)(Error::from(error)),
    })
}

/// Takes from an overlay what it has of its own, so that its backing image shows everywhere; its zones stay as they
/// are. Durable when this returns.
///
/// # Errors
/// Refused: not a qcow2 image.
pub async fn empty(overlay: &Device) -> Result<(), ToolError> {
    let image = image(overlay)?;
    let dropped = image.drop_ahead(0..image.size()).await;
    dropped.map_err(|error| ToolError::request("emptying the image", 0)(Error::from(error)))?;
    let flushed = image.flush().await;
    flushed.map_err(|error| ToolError::request("flushing the image", 0)(Error::from(error)))
}

fn image(device: &Device) -> Result<&Qcow2, ToolError> {
    let refused = || ToolError::Refused("only a qcow2 image has a backing image".into());
    device.qcow2().ok_or_else(refused)
}
