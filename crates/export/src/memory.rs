//! Small accesses to guest memory.
//!
//! Same checks as vm-memory's accessors of whole guest memory, which go through an iterator over regions; that is
//! a tenth of the time of a 4 KiB request. Here an access that lies in one region, as practically all do, is a
//! look-up and a copy.

use std::sync::atomic::Ordering;

use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap, GuestMemoryRegion,
};

type Result<T> = std::result::Result<T, GuestMemoryError>;

/// Loads a little-endian integer, which must be naturally aligned.
pub(crate) fn load_u16(memory: &GuestMemoryMmap, addr: u64, order: Ordering) -> Result<u16> {
    let (region, at) = region_of(memory, addr)?;
    Ok(u16::from_le(region.load(at, order)?))
}

/// Stores a little-endian integer, which must be naturally aligned.
pub(crate) fn store_u16(memory: &GuestMemoryMmap, addr: u64, value: u16, order: Ordering) -> Result<()> {
    let (region, at) = region_of(memory, addr)?;
    region.store(value.to_le(), at, order)
}

/// Loads a little-endian integer, which must be naturally aligned.
pub(crate) fn load_u32(memory: &GuestMemoryMmap, addr: u64, order: Ordering) -> Result<u32> {
    let (region, at) = region_of(memory, addr)?;
    Ok(u32::from_le(region.load(at, order)?))
}

/// Stores a little-endian integer, which must be naturally aligned.
pub(crate) fn store_u32(memory: &GuestMemoryMmap, addr: u64, value: u32, order: Ordering) -> Result<()> {
    let (region, at) = region_of(memory, addr)?;
    region.store(value.to_le(), at, order)
}

/// Copies bytes out of guest memory.
pub(crate) fn read(memory: &GuestMemoryMmap, addr: u64, into: &mut [u8]) -> Result<()> {
    let (region, at) = region_of(memory, addr)?;
    if region.len() - at.0 >= into.len() as u64 {
        region.read_slice(into, at)
    } else {
        memory.read_slice(into, GuestAddress(addr))
    }
}

/// Copies bytes into guest memory.
pub(crate) fn write(memory: &GuestMemoryMmap, addr: u64, from: &[u8]) -> Result<()> {
    let (region, at) = region_of(memory, addr)?;
    if region.len() - at.0 >= from.len() as u64 {
        region.write_slice(from, at)
    } else {
        memory.write_slice(from, GuestAddress(addr))
    }
}

type Place<'a> = (
    &'a <GuestMemoryMmap as GuestMemoryBackend>::R,
    vm_memory::MemoryRegionAddress,
);

fn region_of(memory: &GuestMemoryMmap, addr: u64) -> Result<Place<'_>> {
    let addr = GuestAddress(addr);
    memory
        .to_region_addr(addr)
        .ok_or(GuestMemoryError::InvalidGuestAddress(addr))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accesses_within_across_and_outside_of_regions() {
        let ranges = [(GuestAddress(0x1000), 0x1000), (GuestAddress(0x2000), 0x1000)];
        let memory = GuestMemoryMmap::from_ranges(&ranges).unwrap();
        for addr in [0x1000, 0x1ffe, 0x1ffd, 0x2ffc] {
            write(&memory, addr, &[1, 2, 3, 4]).unwrap();
            let mut bytes = [0; 4];
            read(&memory, addr, &mut bytes).unwrap();
            assert_eq!(bytes, [1, 2, 3, 4], "{addr:#x}");
        }
        for addr in [0xffe, 0x2ffd, 0x3000, u64::MAX - 1] {
            assert!(write(&memory, addr, &[1, 2, 3, 4]).is_err(), "{addr:#x}");
            assert!(read(&memory, addr, &mut [0; 4]).is_err(), "{addr:#x}");
        }
        store_u16(&memory, 0x1002, 0x0201, Ordering::Relaxed).unwrap();
        let mut bytes = [0; 2];
        read(&memory, 0x1002, &mut bytes).unwrap();
        assert_eq!(bytes, [1, 2]);
        assert_eq!(load_u16(&memory, 0x1002, Ordering::Acquire).unwrap(), 0x0201);
        assert!(load_u16(&memory, 0x1fff, Ordering::Acquire).is_err());
        assert!(load_u16(&memory, 0x3000, Ordering::Acquire).is_err());
    }
}
