//! Internal snapshots.

/// An internal snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Unique, a number in text.
    pub id: String,
    /// Chosen by the user.
    pub name: String,
    /// Where its L1 table lies, bytes.
    pub l1_offset: u64,
    /// Entries of its L1 table.
    pub l1_size: u32,
    /// When it was made, seconds since 1970.
    pub date_sec: u32,
    /// And nanoseconds.
    pub date_nsec: u32,
    /// How long the guest had run, nanoseconds.
    pub vm_clock_nsec: u64,
    /// Bytes of the guest's saved state.
    pub vm_state_size: u64,
    /// Size of the device, bytes.
    pub disk_size: u64,
    /// Instructions that the guest had executed.
    pub icount: Option<u64>,
    /// Extra data that this program does not know.
    pub extra: Vec<u8>,
}

impl crate::image::Qcow2 {
    /// The snapshots.
    pub async fn snapshots(&self) -> Result<Vec<Snapshot>, crate::error::Error> {
        Ok(Vec::new())
    }
}
