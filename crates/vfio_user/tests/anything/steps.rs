//! Steps of an input that a client could mean.

use zbdkit_spec::vfio_user::{DmaMap, DmaUnmap, IrqSet, RegionAccess, command};
use zerocopy::IntoBytes;

/// A command that wants an answer, with this payload of at most 254 bytes and so many of the memory's descriptors.
pub fn command(command: u16, payload: &[u8], files: u8) -> Vec<u8> {
    let mut step = vec![files << 5 | 0xf, command as u8, 0xff, payload.len() as u8];
    step.extend(payload);
    step
}

/// An event descriptor each for `files` vectors from `start` on.
pub fn set_irqs(flags: u32, index: u32, start: u32, files: u8) -> Vec<u8> {
    let set = IrqSet {
        argsz: 20.into(),
        flags: flags.into(),
        index: index.into(),
        start: start.into(),
        count: u32::from(files).into(),
    };
    let mut step = command(command::DEVICE_SET_IRQS, set.as_bytes(), files);
    step[0] |= 1 << 4;
    step
}

/// Maps memory, that of the descriptor if there is one.
pub fn map(flags: u32, offset: u64, address: u64, size: u64, file: bool) -> Vec<u8> {
    let map = DmaMap {
        argsz: 32.into(),
        flags: flags.into(),
        offset: offset.into(),
        address: address.into(),
        size: size.into(),
    };
    command(command::DMA_MAP, map.as_bytes(), file.into())
}

/// Takes memory away.
pub fn unmap(flags: u32, address: u64, size: u64) -> Vec<u8> {
    let unmap = DmaUnmap {
        argsz: 24.into(),
        flags: flags.into(),
        address: address.into(),
        size: size.into(),
    };
    command(command::DMA_UNMAP, unmap.as_bytes(), 0)
}

/// What the device or a part of it is.
pub fn ask(what: u16, index: u32) -> Vec<u8> {
    let words = [32, 0, index, 0, 0, 0, 0, 0];
    let len = match what {
        command::DEVICE_GET_REGION_INFO => 8,
        _ => 4,
    };
    command(what, words[..len].as_bytes(), 0)
}

/// Reads a region.
pub fn read(region: u32, offset: u64, count: u32) -> Vec<u8> {
    command(command::REGION_READ, access(region, offset, count).as_bytes(), 0)
}

/// Has the device do something (see `device.rs`) with the client's memory.
pub fn tell(how: u8, address: u64, len: u64) -> Vec<u8> {
    let mut payload = access(0, how.into(), 16).as_bytes().to_vec();
    payload.extend([address, len].as_bytes());
    command(command::REGION_WRITE, &payload, 0)
}

/// A good answer to what the server asked first.
pub fn answer() -> Vec<u8> {
    vec![1, 0, 0]
}

/// A bad one.
pub fn refuse(error: u8, data: &[u8]) -> Vec<u8> {
    let mut step = vec![2, error, data.len() as u8];
    step.extend(data);
    step
}

fn access(region: u32, offset: u64, count: u32) -> RegionAccess {
    RegionAccess {
        offset: offset.into(),
        region: region.into(),
        count: count.into(),
    }
}
