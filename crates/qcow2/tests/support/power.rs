//! Judges what a power cut left of an image.

use std::sync::Arc;

use zbdkit_io::{IoBuf, LocalBoxFuture};
use zbdkit_qcow2::{Backing, Header, Options, Qcow2, Repair, check};

use super::crash::{Bytes, Disk};

/// A backing image in memory.
pub struct Below(pub Vec<u8>);

impl Backing for Below {
    fn len(&self) -> u64 {
        self.0.len() as u64
    }

    fn read<'a>(&'a self, buf: IoBuf, offset: u64) -> LocalBoxFuture<'a, Result<(), i32>> {
        let from = offset as usize..offset as usize + buf.len();
        buf.copy_from(&self.0[from]);
        Box::pin(async { Ok(()) })
    }
}

/// What an image holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Contents {
    /// The device.
    pub disk: Vec<u8>,
    /// Id and contents of each snapshot.
    pub snapshots: Vec<(String, Vec<u8>)>,
    /// Data of the header extension that operations set along.
    pub mark: Option<Vec<u8>>,
}

/// An extension that operations may set in their write of the header.
pub const MARK: u32 = 0x6d61_726b;

/// Opens an image; it may be written.
pub async fn open(disk: &Disk, backing: Option<Arc<dyn Backing>>) -> Result<Qcow2, String> {
    open_with(disk, None, backing).await
}

/// The same for one that may have its data in another file.
pub async fn open_with(
    disk: &Disk,
    data: Option<&Disk>,
    backing: Option<Arc<dyn Backing>>,
) -> Result<Qcow2, String> {
    let header = Header::read(&disk.file())
        .await
        .map_err(|e| format!("reading the header: {e}"))?;
    let options = Options {
        backing,
        data_file: data.map(Disk::file),
        ..Options::default()
    };
    let image = Qcow2::open(disk.file(), header, options).await;
    image.map_err(|e| format!("opening: {e}"))
}

/// All bytes of the device.
pub async fn read_all(image: &Qcow2) -> Result<Vec<u8>, String> {
    let buf = IoBuf::alloc(image.size() as usize);
    let read = image.read(buf.clone(), 0).await;
    read.map_err(|e| format!("reading: {e}"))?;
    Ok(buf.to_vec())
}

/// Checks an image: leaks are no harm.
pub async fn no_harm(disk: &Disk) -> Result<(), String> {
    let header = Header::read(&disk.file())
        .await
        .map_err(|e| format!("reading the header: {e}"))?;
    let report = check(&disk.file(), &header, None, &[], Repair::None, &mut |_, _| {})
        .await
        .map_err(|e| format!("checking: {e}"))?;
    if report.corruptions != 0 || report.check_errors != 0 {
        return Err(format!("check finds: {:#?}", report.messages));
    }
    Ok(())
}

/// What an image without a data file holds.
pub async fn take_apart(bytes: Bytes, backing: Option<Arc<dyn Backing>>) -> Result<Contents, String> {
    take_both_apart(bytes, None, backing).await
}

/// What an image holds; applying the snapshots one after the other tells what they hold. The image is not the same after
/// that.
pub async fn take_both_apart(
    bytes: Bytes,
    data: Option<Bytes>,
    backing: Option<Arc<dyn Backing>>,
) -> Result<Contents, String> {
    let (disk, data) = (Disk::of(bytes), data.map(Disk::of));
    no_harm(&disk).await?;
    let image = open_with(&disk, data.as_ref(), backing).await?;
    let mut contents = Contents {
        disk: read_all(&image).await?,
        snapshots: Vec::new(),
        mark: image.header().await.extension(MARK).map(<[u8]>::to_vec),
    };
    let snapshots = image.snapshots().await.map_err(|e| format!("listing: {e}"))?;
    // Whatever the device shares with a snapshot must not change it.
    let fill = IoBuf::from_vec(vec![0xee; image.size() as usize]);
    let written = image.write(fill, 0).await;
    written.map_err(|e| format!("writing over it: {e}"))?;
    image.flush().await.map_err(|e| format!("flush: {e}"))?;
    for snapshot in snapshots {
        let applied = image.snapshot_apply(&snapshot.id, |_| Ok(())).await;
        applied.map_err(|e| format!("applying {}: {e}", snapshot.id))?;
        let disk = read_all(&image).await?;
        if disk.len() as u64 != snapshot.disk_size {
            return Err(format!("{} is {} bytes long", snapshot.id, disk.len()));
        }
        contents.snapshots.push((snapshot.id, disk));
    }
    image.close().await.map_err(|e| format!("closing: {e}"))?;
    no_harm(&disk).await.map_err(|e| format!("afterwards: {e}"))?;
    Ok(contents)
}
