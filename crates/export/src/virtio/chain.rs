//! Descriptor chains (virtio 1.3, 2.7.5), walked once and bounded.
//!
//! The driver can change descriptors while we look. Each is read once, into memory of our own, and everything
//! after that looks at the copy.

use vm_memory::GuestMemoryMmap;

use crate::memory::read;

const DESC_SIZE: usize = 16;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// What makes a chain unusable: nobody can say which bytes belong to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ChainError {
    #[error("descriptor {index} does not exist, the table has {size}")]
    Index { index: u16, size: u16 },
    #[error("the chain has more than {limit} descriptors, or is a loop")]
    TooLong { limit: usize },
    #[error("an indirect table, which was not negotiated")]
    NotNegotiated,
    #[error("an indirect table inside an indirect table")]
    Nested,
    #[error("an indirect table of {len} bytes")]
    IndirectLength { len: u32 },
    #[error("an indirect table with a next descriptor")]
    IndirectNext,
    #[error("a descriptor table at {addr:#x} is not in the guest's memory")]
    Table { addr: u64 },
}

#[derive(Debug, Clone, Copy)]
struct Descriptor {
    addr: u64,
    len: u32,
    flags: u16,
    next: u16,
}

impl Descriptor {
    fn parse(bytes: &[u8; DESC_SIZE]) -> Descriptor {
        let [a0, a1, a2, a3, a4, a5, a6, a7, l0, l1, l2, l3, f0, f1, n0, n1] = *bytes;
        Descriptor {
            addr: u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]),
            len: u32::from_le_bytes([l0, l1, l2, l3]),
            flags: u16::from_le_bytes([f0, f1]),
            next: u16::from_le_bytes([n0, n1]),
        }
    }
}

/// Where descriptors are, and what may be in them.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Table {
    /// Guest address of the descriptor table.
    pub(crate) addr: u64,
    /// Its entries.
    pub(crate) size: u16,
    /// Whether indirect tables were negotiated.
    pub(crate) indirect: bool,
    /// Most descriptors in a chain.
    pub(crate) limit: usize,
}

/// The pieces of guest memory that a chain is made of: (guest address, bytes), none of them empty.
///
/// Kept from chain to chain, so that walking allocates nothing once the lists have grown.
#[derive(Debug, Default)]
pub(crate) struct Chain {
    readable: Vec<(u64, u64)>,
    writable: Vec<(u64, u64)>,
    readable_len: u64,
    writable_len: u64,
    out_of_order: bool,
    scratch: Vec<u8>,
}

impl Chain {
    /// Room for chains of `limit` descriptors.
    pub(crate) fn with_limit(limit: usize) -> Chain {
        Chain {
            readable: Vec::with_capacity(limit),
            writable: Vec::with_capacity(limit),
            scratch: Vec::with_capacity(limit * DESC_SIZE),
            ..Chain::default()
        }
    }

    /// Bytes for the device.
    pub(crate) fn readable_len(&self) -> u64 {
        self.readable_len
    }

    /// Bytes from the device.
    pub(crate) fn writable_len(&self) -> u64 {
        self.writable_len
    }

    /// Whether a readable descriptor follows a writable one, which the standard forbids.
    pub(crate) fn out_of_order(&self) -> bool {
        self.out_of_order
    }

    /// The pieces for the device, from byte `skip` on.
    pub(crate) fn readable(&self, skip: u64, len: u64) -> impl Iterator<Item = (u64, u64)> + '_ {
        cut(&self.readable, skip, len)
    }

    /// The pieces from the device, `len` bytes from byte `skip` on.
    pub(crate) fn writable(&self, skip: u64, len: u64) -> impl Iterator<Item = (u64, u64)> + '_ {
        cut(&self.writable, skip, len)
    }

    /// Guest address of the last byte from the device, if there is one.
    pub(crate) fn last_writable(&self) -> Option<u64> {
        // The address may be anything; whether it is in memory shows when it is written.
        self.writable.last().map(|(addr, len)| addr.wrapping_add(len - 1))
    }

    /// Copies bytes for the device, from byte `skip` on. False if there are not so many, or not in memory.
    pub(crate) fn copy_readable(&self, memory: &GuestMemoryMmap, skip: u64, into: &mut [u8]) -> bool {
        let mut done = 0;
        for (addr, len) in self.readable(skip, into.len() as u64) {
            let len = len as usize;
            if read(memory, addr, &mut into[done..done + len]).is_err() {
                return false;
            }
            done += len;
        }
        done == into.len()
    }

    /// Walks the chain that starts at descriptor `head`.
    pub(crate) fn walk(
        &mut self,
        memory: &GuestMemoryMmap,
        table: Table,
        head: u16,
    ) -> Result<(), ChainError> {
        self.readable.clear();
        self.writable.clear();
        self.readable_len = 0;
        self.writable_len = 0;
        self.out_of_order = false;
        let mut left = table.limit;
        let mut index = head;
        loop {
            let desc = read_direct(memory, table, index)?;
            if desc.flags & INDIRECT != 0 {
                if desc.flags & NEXT != 0 {
                    return Err(ChainError::IndirectNext);
                }
                if !table.indirect {
                    return Err(ChainError::NotNegotiated);
                }
                return self.walk_indirect(memory, desc, table.limit, left);
            }
            left = left
                .checked_sub(1)
                .ok_or(ChainError::TooLong { limit: table.limit })?;
            self.add(desc);
            if desc.flags & NEXT == 0 {
                return Ok(());
            }
            index = desc.next;
        }
    }

    fn walk_indirect(
        &mut self,
        memory: &GuestMemoryMmap,
        desc: Descriptor,
        limit: usize,
        mut left: usize,
    ) -> Result<(), ChainError> {
        let len = desc.len as usize;
        if len == 0 || !len.is_multiple_of(DESC_SIZE) || len / DESC_SIZE > usize::from(u16::MAX) + 1 {
            return Err(ChainError::IndirectLength { len: desc.len });
        }
        // A longer table may hold a chain that is short enough, but no driver makes such.
        if len / DESC_SIZE > limit {
            return Err(ChainError::TooLong { limit });
        }
        let mut scratch = std::mem::take(&mut self.scratch);
        scratch.resize(len, 0);
        let result = match read(memory, desc.addr, &mut scratch) {
            Ok(()) => self.walk_table(scratch.as_chunks().0, limit, &mut left),
            Err(_) => Err(ChainError::Table { addr: desc.addr }),
        };
        self.scratch = scratch;
        result
    }

    fn walk_table(
        &mut self,
        table: &[[u8; DESC_SIZE]],
        limit: usize,
        left: &mut usize,
    ) -> Result<(), ChainError> {
        let mut index = 0;
        loop {
            let entry = table.get(usize::from(index));
            let entry = entry.ok_or(ChainError::Index {
                index,
                size: table.len().min(0xffff) as u16,
            })?;
            let desc = Descriptor::parse(entry);
            if desc.flags & INDIRECT != 0 {
                return Err(ChainError::Nested);
            }
            *left = left.checked_sub(1).ok_or(ChainError::TooLong { limit })?;
            self.add(desc);
            if desc.flags & NEXT == 0 {
                return Ok(());
            }
            index = desc.next;
        }
    }

    fn add(&mut self, desc: Descriptor) {
        if desc.len == 0 {
            return;
        }
        let piece = (desc.addr, u64::from(desc.len));
        // At most `limit` descriptors of less than 4 GiB: the sums cannot overflow.
        if desc.flags & WRITE != 0 {
            self.writable_len += piece.1;
            self.writable.push(piece);
        } else {
            self.out_of_order |= !self.writable.is_empty();
            self.readable_len += piece.1;
            self.readable.push(piece);
        }
    }
}

fn read_direct(memory: &GuestMemoryMmap, table: Table, index: u16) -> Result<Descriptor, ChainError> {
    if index >= table.size {
        return Err(ChainError::Index {
            index,
            size: table.size,
        });
    }
    let addr = table.addr + u64::from(index) * DESC_SIZE as u64;
    let mut bytes = [0; DESC_SIZE];
    read(memory, addr, &mut bytes).map_err(|_| ChainError::Table { addr })?;
    Ok(Descriptor::parse(&bytes))
}

/// The parts of `pieces` that hold the `len` bytes from byte `skip` on.
fn cut(pieces: &[(u64, u64)], mut skip: u64, mut left: u64) -> impl Iterator<Item = (u64, u64)> + '_ {
    pieces.iter().filter_map(move |&(addr, len)| {
        let skipped = skip.min(len);
        skip -= skipped;
        let taken = (len - skipped).min(left);
        left -= taken;
        (taken > 0).then(|| (addr.wrapping_add(skipped), taken))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use vm_memory::{Bytes, GuestAddress};

    const SIZE: u16 = 8;
    const TABLE: u64 = 0x1000;
    const INDIRECT_TABLE: u64 = 0x3000;

    fn memory() -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap()
    }

    fn put(memory: &GuestMemoryMmap, table: u64, index: u64, (addr, len, flags, next): (u64, u32, u16, u16)) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        memory
            .write_slice(&bytes, GuestAddress(table + index * 16))
            .unwrap();
    }

    fn table() -> Table {
        Table {
            addr: TABLE,
            size: SIZE,
            indirect: true,
            limit: SIZE.into(),
        }
    }

    fn walk(memory: &GuestMemoryMmap, head: u16) -> Result<Chain, ChainError> {
        let mut chain = Chain::with_limit(SIZE.into());
        chain.walk(memory, table(), head).map(|()| chain)
    }

    #[test]
    fn a_chain_is_its_pieces_in_order() {
        let memory = memory();
        put(&memory, TABLE, 3, (0x100, 16, NEXT, 1));
        put(&memory, TABLE, 1, (0x200, 0, NEXT, 2));
        put(&memory, TABLE, 2, (0x300, 512, NEXT | WRITE, 0));
        put(&memory, TABLE, 0, (0x400, 1, WRITE, 77));
        let chain = walk(&memory, 3).unwrap();
        assert_eq!(
            (chain.readable_len(), chain.writable_len(), chain.out_of_order()),
            (16, 513, false)
        );
        assert_eq!(chain.readable(4, 100).collect::<Vec<_>>(), [(0x104, 12)]);
        assert_eq!(
            chain.writable(10, 503).collect::<Vec<_>>(),
            [(0x30a, 502), (0x400, 1)]
        );
        assert_eq!(chain.last_writable(), Some(0x400));
    }

    #[test]
    fn a_chain_goes_on_in_an_indirect_table() {
        let memory = memory();
        put(&memory, TABLE, 0, (0x100, 16, NEXT, 1));
        put(&memory, TABLE, 1, (INDIRECT_TABLE, 32, INDIRECT | WRITE, 0));
        put(&memory, INDIRECT_TABLE, 0, (0x200, 512, NEXT | WRITE, 1));
        put(&memory, INDIRECT_TABLE, 1, (0x300, 1, WRITE, 0));
        let chain = walk(&memory, 0).unwrap();
        assert_eq!((chain.readable_len(), chain.writable_len()), (16, 513));
    }

    #[test]
    fn each_way_to_break_a_chain_is_an_error() {
        let memory = memory();
        put(&memory, TABLE, 0, (0x100, 16, NEXT, 1));
        put(&memory, TABLE, 1, (0x100, 16, NEXT, 0));
        assert_eq!(walk(&memory, 0).unwrap_err(), ChainError::TooLong { limit: 8 });
        put(&memory, TABLE, 1, (0x100, 16, NEXT, 8));
        assert_eq!(
            walk(&memory, 0).unwrap_err(),
            ChainError::Index { index: 8, size: 8 }
        );
        assert_eq!(
            walk(&memory, 9).unwrap_err(),
            ChainError::Index { index: 9, size: 8 }
        );
        put(&memory, TABLE, 1, (INDIRECT_TABLE, 32, INDIRECT | NEXT, 0));
        assert_eq!(walk(&memory, 0).unwrap_err(), ChainError::IndirectNext);
        for len in [0, 8, 24, 0xffff_fff0] {
            put(&memory, TABLE, 1, (INDIRECT_TABLE, len, INDIRECT, 0));
            let error = walk(&memory, 0).unwrap_err();
            assert_eq!(error, ChainError::IndirectLength { len }, "{len}");
        }
        put(&memory, TABLE, 1, (INDIRECT_TABLE, 16 * 9, INDIRECT, 0));
        assert_eq!(walk(&memory, 0).unwrap_err(), ChainError::TooLong { limit: 8 });
        put(&memory, TABLE, 1, (0xfff8, 16, INDIRECT, 0));
        assert_eq!(walk(&memory, 0).unwrap_err(), ChainError::Table { addr: 0xfff8 });
        put(&memory, TABLE, 1, (INDIRECT_TABLE, 32, INDIRECT, 0));
        put(&memory, INDIRECT_TABLE, 0, (0, 16, INDIRECT, 0));
        assert_eq!(walk(&memory, 0).unwrap_err(), ChainError::Nested);
        put(&memory, INDIRECT_TABLE, 0, (0, 16, NEXT, 0));
        assert_eq!(walk(&memory, 0).unwrap_err(), ChainError::TooLong { limit: 8 });
        put(&memory, INDIRECT_TABLE, 0, (0, 16, NEXT, 2));
        assert_eq!(
            walk(&memory, 0).unwrap_err(),
            ChainError::Index { index: 2, size: 2 }
        );
        let mut chain = Chain::default();
        let direct_only = Table {
            indirect: false,
            ..table()
        };
        assert_eq!(
            chain.walk(&memory, direct_only, 0),
            Err(ChainError::NotNegotiated)
        );
    }

    #[test]
    fn a_readable_piece_behind_a_writable_one_is_noticed() {
        let memory = memory();
        put(&memory, TABLE, 0, (0x100, 16, NEXT | WRITE, 1));
        put(&memory, TABLE, 1, (0x100, 16, 0, 0));
        assert!(walk(&memory, 0).unwrap().out_of_order());
    }

    proptest! {
        #[test]
        fn any_bytes_in_the_tables_end_in_a_bounded_chain_or_an_error(
            bytes in proptest::collection::vec(any::<u8>(), 16 * 8), head in 0u16..10, small in any::<bool>()
        ) {
            let memory = memory();
            memory.write_slice(&bytes, GuestAddress(TABLE)).unwrap();
            if small {
                // Mostly valid links, so that long chains, loops and indirect tables do occur.
                for index in 0..8 {
                    let at = index * 16;
                    let flags = u16::from(bytes[at + 12]) & 7;
                    let next = u16::from(bytes[at + 14]) % 9;
                    let desc = (TABLE + u64::from(bytes[at]), u32::from(bytes[at + 8] & 0xf) * 16, flags, next);
                    put(&memory, TABLE, index as u64, desc);
                }
            }
            if let Ok(chain) = walk(&memory, head) {
                prop_assert!(chain.readable.len() + chain.writable.len() <= SIZE.into());
                prop_assert_eq!(chain.readable(0, u64::MAX).map(|p| p.1).sum::<u64>(), chain.readable_len());
                let mut byte = [0; 40];
                let _ = chain.copy_readable(&memory, 3, &mut byte);
            }
        }
    }
}
