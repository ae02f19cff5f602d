//! What a qcow2 file says about its zones, read without the code under test.

use zbdkit_zone::{Condition, ZoneInfo, ZoneType};

use super::disk::Image;

/// Bytes of a header of version 3, as it is written today.
const HEADER: usize = 112;
/// The header extension of QEMU's drafts of zones.
const EXT_ZONED: u32 = 0x007a_6264;
/// Its length in the newest one.
const LAYOUT_C: usize = 44;
/// Our header extension.
const EXT_ZBDKIT: u32 = 0x7a62_646b;
/// The drafts' incompatible feature bit.
const ZONED_FORMAT: u64 = 1 << 5;
/// Our incompatible and our autoclear feature bit have the same number.
const OURS: u64 = 1 << 40;
/// In a word of the drafts' table: the zone is conventional.
const CONVENTIONAL: u64 = 1 << 63;

/// What the file says.
#[derive(Clone, Debug)]
pub struct ZoneWords {
    /// The drafts' table: a pointer for each zone, bytes from the start of the device.
    pub words: Vec<u64>,
    /// States that the drafts cannot express were announced.
    pub states: bool,
    /// Our own table is the truth.
    pub ours: bool,
}

/// Reads the drafts' extension and its table.
pub fn zone_words(file: &Image) -> Result<ZoneWords, String> {
    let mut header = [0; 4096];
    file.read(0, &mut header);
    if &header[..4] != b"QFI\xfb" {
        return Err("it is no qcow2 image".into());
    }
    let word = |at: usize| u64::from_be_bytes(header[at..at + 8].try_into().expect("eight bytes"));
    let half = |at: usize| u32::from_be_bytes(header[at..at + 4].try_into().expect("four bytes"));
    let (incompatible, autoclear) = (word(72), word(88));
    let mut at = half(100) as usize;
    if at != HEADER {
        return Err(format!("its header has {at} bytes"));
    }
    let (mut zoned, mut ours) = (None, false);
    while at + 8 <= header.len() && half(at) != 0 {
        let (magic, len) = (half(at), half(at + 4) as usize);
        match magic {
            EXT_ZONED if len == LAYOUT_C => zoned = Some(at + 8),
            EXT_ZONED => return Err(format!("its zone extension has {len} bytes")),
            EXT_ZBDKIT => ours = true,
            _ => {}
        }
        at += 8 + len.next_multiple_of(8);
    }
    let Some(zoned) = zoned.filter(|_| incompatible & ZONED_FORMAT != 0) else {
        return Err(format!(
            "it has no zones: extension {zoned:?}, incompatible features {incompatible:#x}"
        ));
    };
    let (count, offset) = (half(zoned + 4), word(zoned + 24));
    let words = (0..u64::from(count)).map(|zone| {
        let mut bytes = [0; 8];
        file.read(offset + 8 * zone, &mut bytes);
        u64::from_be_bytes(bytes)
    });
    Ok(ZoneWords {
        words: words.collect(),
        states: incompatible & OURS != 0,
        ours: ours && autoclear & OURS != 0,
    })
}

/// What was found in a crashed file against what its opening made of it. `stale` says that a zone was reset or
/// finished not long ago, so that its word in the drafts' table may be of before that.
pub fn judge(found: &ZoneWords, zones: &[ZoneInfo], stale: impl Fn(usize) -> bool) -> Result<(), String> {
    if found.words.len() != zones.len() {
        return Err(format!("the drafts' table has {} words", found.words.len()));
    }
    for (zone, (word, info)) in found.words.iter().zip(zones).enumerate() {
        let conventional = word & CONVENTIONAL != 0;
        if conventional != (info.kind == ZoneType::Conventional) {
            return Err(format!(
                "zone {zone}: the drafts' table has another type: {word:#x}"
            ));
        }
        let pointer = word & !CONVENTIONAL;
        if !(info.start..=info.start + info.capacity).contains(&pointer) {
            return Err(format!(
                "zone {zone}: the drafts' table has the pointer {pointer:#x}, which is not in the zone"
            ));
        }
        if pointer > info.wp && !hidden(info) && !stale(zone) {
            return Err(format!(
                "zone {zone}: the drafts' table is ahead: {pointer:#x}, recovered {:#x}",
                info.wp
            ));
        }
    }
    let inexpressible =
        |zone: &&ZoneInfo| hidden(zone) || zone.attributes.zrwa || zone.kind == ZoneType::SequentialPreferred;
    match zones.iter().find(inexpressible) {
        Some(zone) if found.ours && !found.states => Err(format!(
            "zone {}: it is {} ({:?}), and the header does not say that such a thing is there",
            zone.zone, zone.condition, zone.kind
        )),
        _ => Ok(()),
    }
}

/// The operator's conditions hide a zone's pointer.
fn hidden(zone: &ZoneInfo) -> bool {
    matches!(zone.condition, Condition::ReadOnly | Condition::Offline)
}
