//! Data pointers: PRP lists and SGLs, walked into segments of host memory (Base Specification 2.1, 4.3).
//!
//! The host may write lists while we read them; each is read once, and whatever it says is bounded by the
//! command's length.

use zbdkit_nvme::Failure;
use zbdkit_spec::nvme::Status;
use zbdkit_spec::nvme::command::SubmissionEntry;

/// Descriptors of an SGL, zero-length ones included, that a command may have.
const MAX_DESCRIPTORS: usize = 4096;
/// Segments of an SGL that a command may have.
const MAX_SGL_SEGMENTS: usize = 64;
/// Bytes of an SGL descriptor.
const DESCRIPTOR: usize = 16;

/// A piece of host memory: address and bytes.
pub(super) type Piece = (u64, u64);

/// Pieces in order. Two, as many as a 4 KiB command can have without a list, need no memory of their own.
#[derive(Debug, Default)]
pub(super) struct Pieces {
    first: [Piece; 2],
    count: usize,
    more: Vec<Piece>,
    len: u64,
}

impl Pieces {
    fn push(&mut self, address: u64, len: u64) {
        self.len += len;
        if let Some(slot) = self.first.get_mut(self.count) {
            *slot = (address, len);
            self.count += 1;
            return;
        }
        self.more.push((address, len));
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = Piece> + Clone {
        self.first[..self.count].iter().chain(&self.more).copied()
    }
}

/// Reads host memory.
pub(super) trait ReadHost {
    /// Fills `into` from `address`.
    fn read(&self, address: u64, into: &mut [u8]) -> impl Future<Output = Result<(), Failure>>;
}

/// The pieces of exactly `len` bytes, not 0, that an entry's PRPs name. `page` is the host's page size in bytes.
///
/// # Errors
/// Offsets that may not be, or lists that cannot be read.
pub(super) async fn prps(
    host: &impl ReadHost,
    entry: &SubmissionEntry,
    len: u64,
    page: u64,
) -> Result<Pieces, Failure> {
    let (prp1, prp2) = (entry.prp1.get(), entry.prp2.get());
    if !prp1.is_multiple_of(4) {
        return Err(Status::PRP_OFFSET_INVALID.into());
    }
    let mut pieces = Pieces::default();
    pieces.push(prp1, len.min(page - prp1 % page));
    let left = len - pieces.len;
    if left == 0 {
        return Ok(pieces);
    }
    if left <= page {
        check_page(prp2, page)?;
        pieces.push(prp2, left);
        return Ok(pieces);
    }
    prp_list(host, &mut pieces, prp2, len, page).await?;
    Ok(pieces)
}

async fn prp_list(
    host: &impl ReadHost,
    pieces: &mut Pieces,
    mut list: u64,
    len: u64,
    page: u64,
) -> Result<(), Failure> {
    if !list.is_multiple_of(8) {
        return Err(Status::PRP_OFFSET_INVALID.into());
    }
    // All but the first part of a list have at least two entries, all but one of which name data: this ends.
    while pieces.len < len {
        let wanted = (len - pieces.len).div_ceil(page);
        let room = (page - list % page) / 8;
        let mut bytes = vec![0; (wanted.min(room) * 8) as usize];
        host.read(list, &mut bytes).await?;
        let mut entries = bytes
            .chunks_exact(8)
            .map(|entry| u64::from_le_bytes(entry.try_into().expect("8 bytes")));
        // Where more entries follow than fit, the last one names the rest of the list.
        let next = if wanted > room { entries.next_back() } else { None };
        for address in entries {
            check_page(address, page)?;
            pieces.push(address, page.min(len - pieces.len));
        }
        match next {
            Some(next) => {
                check_page(next, page)?;
                list = next;
            }
            None => break,
        }
    }
    Ok(())
}

fn check_page(address: u64, page: u64) -> Result<(), Failure> {
    if !address.is_multiple_of(page) {
        return Err(Status::PRP_OFFSET_INVALID.into());
    }
    Ok(())
}

/// The pieces of exactly `len` bytes that an entry's SGL names.
///
/// # Errors
/// Descriptors that may not be, too many or too few bytes, or segments that cannot be read.
pub(super) async fn sgl(host: &impl ReadHost, entry: &SubmissionEntry, len: u64) -> Result<Pieces, Failure> {
    let mut pieces = Pieces::default();
    let mut inline = [0; DESCRIPTOR];
    inline[..8].copy_from_slice(&entry.prp1.get().to_le_bytes());
    inline[8..].copy_from_slice(&entry.prp2.get().to_le_bytes());
    let mut next = match Descriptor::parse(&inline)? {
        Descriptor::Data(address, bytes) => {
            push_data(&mut pieces, address, bytes, len)?;
            None
        }
        segment => Some(segment),
    };
    let mut segments = 0;
    let mut descriptors = 0;
    while let Some(segment) = next.take() {
        let (address, bytes, last) = match segment {
            Descriptor::Segment(address, bytes) => (address, bytes, false),
            Descriptor::LastSegment(address, bytes) => (address, bytes, true),
            Descriptor::Data(..) => return Err(Status::INVALID_SGL_SEGMENT_DESCRIPTOR.into()),
        };
        let count = bytes as usize / DESCRIPTOR;
        segments += 1;
        descriptors += count;
        if count == 0 || !(bytes as usize).is_multiple_of(DESCRIPTOR) {
            return Err(Status::INVALID_SGL_SEGMENT_DESCRIPTOR.into());
        }
        if segments > MAX_SGL_SEGMENTS || descriptors > MAX_DESCRIPTORS {
            return Err(Status::INVALID_NUMBER_OF_SGL_DESCRIPTORS.into());
        }
        let mut list = vec![0; bytes as usize];
        host.read(address, &mut list).await?;
        for (index, bytes) in list.chunks_exact(DESCRIPTOR).enumerate() {
            let descriptor = Descriptor::parse(bytes.try_into().expect("16 bytes"))?;
            match descriptor {
                Descriptor::Data(address, bytes) => push_data(&mut pieces, address, bytes, len)?,
                // Only the last descriptor of a segment that is not the last names another.
                segment if !last && index + 1 == count => next = Some(segment),
                _ => return Err(Status::INVALID_SGL_SEGMENT_DESCRIPTOR.into()),
            }
        }
        if !last && next.is_none() {
            return Err(Status::INVALID_SGL_SEGMENT_DESCRIPTOR.into());
        }
    }
    if pieces.len < len {
        return Err(Status::DATA_SGL_LENGTH_INVALID.into());
    }
    Ok(pieces)
}

fn push_data(pieces: &mut Pieces, address: u64, bytes: u32, len: u64) -> Result<(), Failure> {
    if pieces.len + u64::from(bytes) > len {
        return Err(Status::DATA_SGL_LENGTH_INVALID.into());
    }
    if bytes > 0 {
        pieces.push(address, bytes.into());
    }
    Ok(())
}

/// An SGL descriptor (4.3.2).
#[derive(Clone, Copy, Debug)]
enum Descriptor {
    Data(u64, u32),
    Segment(u64, u32),
    LastSegment(u64, u32),
}

impl Descriptor {
    fn parse(bytes: &[u8; DESCRIPTOR]) -> Result<Descriptor, Failure> {
        let (address, rest) = bytes.split_at(8);
        let address = u64::from_le_bytes(address.try_into().expect("8 bytes"));
        let len = u32::from_le_bytes(rest[..4].try_into().expect("4 bytes"));
        // Type in the high half, sub type in the low one: 0 for an address.
        match bytes[DESCRIPTOR - 1] {
            0x00 => Ok(Descriptor::Data(address, len)),
            0x20 => Ok(Descriptor::Segment(address, len)),
            0x30 => Ok(Descriptor::LastSegment(address, len)),
            _ => Err(Status::SGL_DESCRIPTOR_TYPE_INVALID.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::pin::pin;
    use std::task::{Context, Poll, Waker};
    use zerocopy::FromZeros;

    const PAGE: u64 = 4096;

    struct Memory(Vec<u8>);

    impl ReadHost for Memory {
        async fn read(&self, address: u64, into: &mut [u8]) -> Result<(), Failure> {
            let from = usize::try_from(address).unwrap_or(usize::MAX);
            let end = from.checked_add(into.len()).filter(|end| *end <= self.0.len());
            let end = end.ok_or(Status::DATA_TRANSFER_ERROR)?;
            into.copy_from_slice(&self.0[from..end]);
            Ok(())
        }
    }

    impl Memory {
        fn with(parts: &[(u64, &[u64])]) -> Memory {
            let mut memory = Memory(vec![0; 0x10000]);
            for (at, words) in parts {
                for (index, word) in words.iter().enumerate() {
                    let at = *at as usize + index * 8;
                    memory.0[at..at + 8].copy_from_slice(&word.to_le_bytes());
                }
            }
            memory
        }
    }

    fn now<T>(future: impl Future<Output = T>) -> T {
        match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(value) => value,
            Poll::Pending => panic!("nothing here waits"),
        }
    }

    fn entry(prp1: u64, prp2: u64) -> SubmissionEntry {
        let mut entry = SubmissionEntry::new_zeroed();
        entry.prp1.set(prp1);
        entry.prp2.set(prp2);
        entry
    }

    fn walk_prps(memory: &Memory, prp1: u64, prp2: u64, len: u64) -> Result<Vec<Piece>, Status> {
        let result = now(prps(memory, &entry(prp1, prp2), len, PAGE));
        result
            .map(|pieces| pieces.iter().collect())
            .map_err(|failure| failure.status)
    }

    fn walk_sgl(memory: &Memory, prp1: u64, prp2: u64, len: u64) -> Result<Vec<Piece>, Status> {
        let result = now(sgl(memory, &entry(prp1, prp2), len));
        result
            .map(|pieces| pieces.iter().collect())
            .map_err(|failure| failure.status)
    }

    const SEGMENT: u64 = 0x20 << 56;
    const LAST: u64 = 0x30 << 56;

    #[test]
    fn two_pages_need_no_list() {
        let memory = Memory::with(&[]);
        assert_eq!(walk_prps(&memory, 0x1004, 0, 100), Ok(vec![(0x1004, 100)]));
        assert_eq!(walk_prps(&memory, 0x1000, 1, 4096), Ok(vec![(0x1000, 4096)]));
        let both = vec![(0x1800, 0x800), (0x5000, 0x1000)];
        assert_eq!(walk_prps(&memory, 0x1800, 0x5000, 0x1800), Ok(both));
    }

    #[test]
    fn a_list_may_start_in_a_page_and_go_on_in_the_next() {
        // Two entries fit: data, and the rest of the list.
        let memory = Memory::with(&[(0x3ff0, &[0x8000, 0x4000]), (0x4000, &[0x9000, 0xa000, 0xbad])]);
        let pieces = walk_prps(&memory, 0x1000, 0x3ff0, 0x3800);
        assert_eq!(
            pieces,
            Ok(vec![
                (0x1000, 0x1000),
                (0x8000, 0x1000),
                (0x9000, 0x1000),
                (0xa000, 0x800)
            ])
        );
        // Where just as much fits as is needed, the last entry is data.
        let memory = Memory::with(&[(0x3ff0, &[0x8000, 0x9000])]);
        let pieces = walk_prps(&memory, 0x1000, 0x3ff0, 0x3000);
        assert_eq!(
            pieces,
            Ok(vec![(0x1000, 0x1000), (0x8000, 0x1000), (0x9000, 0x1000)])
        );
    }

    #[test]
    fn offsets_where_none_may_be_are_errors() {
        let memory = Memory::with(&[(0x3000, &[0x8000, 0x9004]), (0x3ff8, &[0x4008])]);
        let invalid = Err(Status::PRP_OFFSET_INVALID);
        assert_eq!(walk_prps(&memory, 0x1002, 0, 512), invalid);
        assert_eq!(walk_prps(&memory, 0x1000, 0x5008, 8192), invalid);
        assert_eq!(walk_prps(&memory, 0x1000, 0x3004, 12288), invalid, "the list");
        assert_eq!(walk_prps(&memory, 0x1000, 0x3000, 12288), invalid, "an entry");
        assert_eq!(
            walk_prps(&memory, 0x1000, 0x3ff8, 12288),
            invalid,
            "the rest of the list"
        );
        let gone = Err(Status::DATA_TRANSFER_ERROR);
        assert_eq!(walk_prps(&memory, 0x1000, 0x10_0000, 12288), gone);
    }

    #[test]
    fn a_list_that_names_itself_ends_with_the_commands_length() {
        let mut words = vec![0x8000; 511];
        words.push(0x3000);
        let memory = Memory::with(&[(0x3000, &words)]);
        let pieces = walk_prps(&memory, 0x1000, 0x3000, 1024 * PAGE).unwrap();
        assert_eq!(pieces.len(), 1024);
    }

    #[test]
    fn an_sgl_may_be_one_block_or_segments() {
        let memory = Memory::with(&[
            (0x3000, &[0x8000, 100, 0x4000, 32 | SEGMENT]),
            (0x4000, &[0x9000, 0, 0x5000, 16 | LAST]),
            (0x5000, &[0xa000, 412]),
        ]);
        assert_eq!(walk_sgl(&memory, 0x1003, 512, 512), Ok(vec![(0x1003, 512)]));
        let pieces = walk_sgl(&memory, 0x3000, 32 | SEGMENT, 512);
        assert_eq!(pieces, Ok(vec![(0x8000, 100), (0xa000, 412)]));
    }

    #[test]
    fn malformed_sgls_are_told_apart() {
        let memory = Memory::with(&[
            (0x3000, &[0x8000, 512, 0x8000, 512]),
            (0x4000, &[0x4000, 16 | SEGMENT]),
            (0x5000, &[0x8000, 512 | 0x10 << 56]),
        ]);
        let length = Err(Status::DATA_SGL_LENGTH_INVALID);
        assert_eq!(walk_sgl(&memory, 0x1000, 511, 512), length);
        assert_eq!(walk_sgl(&memory, 0x1000, 513, 512), length);
        assert_eq!(walk_sgl(&memory, 0x3000, 32 | LAST, 512), length);
        let segment = Err(Status::INVALID_SGL_SEGMENT_DESCRIPTOR);
        assert_eq!(
            walk_sgl(&memory, 0x3000, 32 | SEGMENT, 1024),
            segment,
            "none follows"
        );
        assert_eq!(walk_sgl(&memory, 0x3000, LAST, 512), segment);
        assert_eq!(walk_sgl(&memory, 0x3000, 17 | LAST, 512), segment);
        assert_eq!(
            walk_sgl(&memory, 0x4000, 16 | LAST, 512),
            segment,
            "not in the last segment"
        );
        let number = Err(Status::INVALID_NUMBER_OF_SGL_DESCRIPTORS);
        assert_eq!(walk_sgl(&memory, 0x4000, 16 | SEGMENT, 512), number, "a loop");
        assert_eq!(walk_sgl(&memory, 0x3000, 0xffff_fff0 | LAST, 512), number);
        let kind = Err(Status::SGL_DESCRIPTOR_TYPE_INVALID);
        assert_eq!(walk_sgl(&memory, 0x5000, 16 | LAST, 512), kind);
        assert_eq!(walk_sgl(&memory, 0, 512 | 0x01 << 56, 512), kind);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn whatever_the_lists_say_the_pieces_have_the_commands_length(
            words in proptest::collection::vec(
                prop_oneof![any::<u64>(), (0u64..16).prop_map(|page| page << 12), (0u64..64).prop_map(|n| n << 4 | SEGMENT),
                    (0u64..64).prop_map(|n| n << 4 | LAST), 0u64..8192],
                512,
            ),
            prp1 in 0u64..0x4000,
            prp2 in prop_oneof![0u64..0x2000, (0u64..64).prop_map(|n| n << 4 | SEGMENT)],
            len in 1u64..0x20_0000,
        ) {
            let memory = Memory::with(&[(0, &words)]);
            for pieces in [walk_prps(&memory, prp1, prp2, len), walk_sgl(&memory, prp1, prp2, len)].into_iter().flatten() {
                prop_assert_eq!(pieces.iter().map(|(_, len)| len).sum::<u64>(), len);
            }
        }
    }
}
