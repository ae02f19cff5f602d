//! Zone reports as virtio-blk gives them.

use virtio_bindings::virtio_blk as vb;

use super::error::ClientError;

/// Bytes of a report's header, and of each zone in it.
pub const REPORT_ENTRY: usize = 64;

/// A zone as reported. Positions in 512-byte sectors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Zone {
    /// First sector.
    pub start: u64,
    /// Capacity in sectors.
    pub cap: u64,
    /// Write pointer, an absolute sector.
    pub wp: u64,
    /// Type.
    pub kind: ZoneKind,
    /// State.
    pub state: ZoneState,
}

/// Type of a zone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "names of the standard")]
pub enum ZoneKind {
    Conventional,
    SequentialRequired,
    SequentialPreferred,
    Unknown(u8),
}

/// State of a zone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "names of the standard")]
pub enum ZoneState {
    NotWritePointer,
    Empty,
    ImplicitlyOpen,
    ExplicitlyOpen,
    Closed,
    ReadOnly,
    Full,
    Offline,
    Unknown(u8),
}

impl ZoneKind {
    fn new(value: u8) -> Self {
        match u32::from(value) {
            vb::VIRTIO_BLK_ZT_CONV => ZoneKind::Conventional,
            vb::VIRTIO_BLK_ZT_SWR => ZoneKind::SequentialRequired,
            vb::VIRTIO_BLK_ZT_SWP => ZoneKind::SequentialPreferred,
            _ => ZoneKind::Unknown(value),
        }
    }
}

impl ZoneState {
    fn new(value: u8) -> Self {
        match u32::from(value) {
            vb::VIRTIO_BLK_ZS_NOT_WP => ZoneState::NotWritePointer,
            vb::VIRTIO_BLK_ZS_EMPTY => ZoneState::Empty,
            vb::VIRTIO_BLK_ZS_IOPEN => ZoneState::ImplicitlyOpen,
            vb::VIRTIO_BLK_ZS_EOPEN => ZoneState::ExplicitlyOpen,
            vb::VIRTIO_BLK_ZS_CLOSED => ZoneState::Closed,
            vb::VIRTIO_BLK_ZS_RDONLY => ZoneState::ReadOnly,
            vb::VIRTIO_BLK_ZS_FULL => ZoneState::Full,
            vb::VIRTIO_BLK_ZS_OFFLINE => ZoneState::Offline,
            _ => ZoneState::Unknown(value),
        }
    }
}

/// Parses a report buffer.
///
/// # Errors
/// `Report` if it names more zones than fit, or if a reserved byte is set.
pub fn parse_report(buffer: &[u8]) -> Result<Vec<Zone>, ClientError> {
    let wrong = |what: String| Err(ClientError::Report(what));
    let Some((header, entries)) = buffer.split_at_checked(REPORT_ENTRY) else {
        return wrong(format!("{} bytes are too few for a header", buffer.len()));
    };
    let count = u64_at(header, 0);
    if header[8..].iter().any(|&b| b != 0) {
        return wrong("reserved bytes are set in the header".into());
    }
    if count > (entries.len() / REPORT_ENTRY) as u64 {
        return wrong(format!("{count} zones said to be in {} bytes", buffer.len()));
    }
    let mut zones = Vec::with_capacity(count as usize);
    for entry in entries.chunks_exact(REPORT_ENTRY).take(count as usize) {
        if entry[26..].iter().any(|&b| b != 0) {
            return wrong(format!("reserved bytes are set in zone {}", zones.len()));
        }
        zones.push(Zone {
            cap: u64_at(entry, 0),
            start: u64_at(entry, 8),
            wp: u64_at(entry, 16),
            kind: ZoneKind::new(entry[24]),
            state: ZoneState::new(entry[25]),
        });
    }
    Ok(zones)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::mem::offset_of;

    #[test]
    fn layout_is_that_of_the_kernel_header() {
        use vb::virtio_blk_zone_descriptor as D;
        assert_eq!(size_of::<D>(), REPORT_ENTRY);
        assert_eq!(size_of::<vb::virtio_blk_zone_report>(), REPORT_ENTRY);
        let mut buffer = vec![0; 2 * REPORT_ENTRY];
        buffer[offset_of!(vb::virtio_blk_zone_report, nr_zones)] = 1;
        buffer[REPORT_ENTRY + offset_of!(D, z_cap)] = 10;
        buffer[REPORT_ENTRY + offset_of!(D, z_start)] = 20;
        buffer[REPORT_ENTRY + offset_of!(D, z_wp)] = 30;
        buffer[REPORT_ENTRY + offset_of!(D, z_type)] = 2;
        buffer[REPORT_ENTRY + offset_of!(D, z_state)] = 14;
        let zone = Zone {
            start: 20,
            cap: 10,
            wp: 30,
            kind: ZoneKind::SequentialRequired,
            state: ZoneState::Full,
        };
        assert_eq!(parse_report(&buffer).unwrap(), [zone]);
    }

    #[test]
    fn a_report_that_says_more_than_it_holds_is_refused() {
        let mut buffer = vec![0; 2 * REPORT_ENTRY];
        buffer[0] = 2;
        assert!(parse_report(&buffer).is_err());
        buffer[0] = 0;
        assert_eq!(parse_report(&buffer).unwrap(), []);
        buffer[9] = 1;
        assert!(parse_report(&buffer).is_err());
        assert!(parse_report(&buffer[..10]).is_err());
    }
}
