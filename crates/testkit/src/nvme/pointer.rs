//! Data pointers, as a host makes them (Base Specification 2.1, 4.3).

use super::entry::Entry;
use super::{Driver, PAGE};

/// What kind of data pointer a command gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pointers {
    /// PRPs, with a list where two do not do.
    Prps,
    /// An SGL of one data block.
    Sgl,
    /// An SGL of two segments, whose blocks are of odd lengths.
    SglSegments,
}

impl Pointers {
    /// All of them.
    pub const ALL: [Pointers; 3] = [Pointers::Prps, Pointers::Sgl, Pointers::SglSegments];
}

/// Types of SGL descriptors, in the last byte of the second word.
const SEGMENT: u64 = 0x20 << 56;
const LAST_SEGMENT: u64 = 0x30 << 56;
/// Bytes of a descriptor.
const DESCRIPTOR: u64 = 16;

impl Driver {
    /// An entry with a pointer of this kind to `len` bytes from a place in memory on. Lists are in memory that the next such
    /// pointer uses again.
    pub fn pointing(&self, entry: Entry, kind: Pointers, at: u64, len: u64) -> Entry {
        match kind {
            Pointers::Prps => entry.prps(self.prps(at, len)),
            Pointers::Sgl => entry.sgl((self.address(at), len)),
            Pointers::SglSegments => entry.sgl(self.sgl_segments(at, len)),
        }
    }

    /// PRPs for `len` bytes from a place in memory on, in pages that follow each other.
    pub fn prps(&self, at: u64, len: u64) -> (u64, u64) {
        let first = PAGE - at % PAGE;
        if len <= first {
            return (self.address(at), 0);
        }
        let rest: Vec<u64> = (at + first..at + len)
            .step_by(PAGE as usize)
            .map(|at| self.address(at))
            .collect();
        if let [one] = rest[..] {
            return (self.address(at), one);
        }
        assert!(rest.len() <= 512, "a list of one page");
        let bytes: Vec<u8> = rest.iter().flat_map(|address| address.to_le_bytes()).collect();
        self.fill(self.list(), &bytes);
        (self.address(at), self.address(self.list()))
    }

    /// The descriptor of a segment that holds one data block and names the last segment, which holds two.
    fn sgl_segments(&self, at: u64, len: u64) -> (u64, u64) {
        let first = len.min(3);
        let second = (len - first) / 2;
        let third = len - first - second;
        let block = |offset: u64, len: u64| [self.address(at + offset), len];
        let (list, last) = (self.list(), self.list() + PAGE);
        let segments = [
            (
                list,
                [
                    block(0, first),
                    [self.address(last), LAST_SEGMENT | (2 * DESCRIPTOR)],
                ],
            ),
            (last, [block(first, second), block(first + second, third)]),
        ];
        for (at, descriptors) in segments {
            let bytes: Vec<u8> = descriptors
                .as_flattened()
                .iter()
                .flat_map(|word| word.to_le_bytes())
                .collect();
            self.fill(at, &bytes);
        }
        (self.address(list), SEGMENT | (2 * DESCRIPTOR))
    }
}
