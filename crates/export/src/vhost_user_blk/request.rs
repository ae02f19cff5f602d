//! Requests as chains carry them, parsed and checked as far as the chain alone allows (virtio 1.3, 5.2.6).

use vm_memory::{GuestAddress, GuestMemoryBackend};
use zbdkit_block::ZoneOp;
use zbdkit_io::mem::Access;
use zbdkit_io::{IoBuf, MemGuard};
use zbdkit_spec::virtio_blk::{
    DiscardWriteZeroes, RequestHeader, SECTOR_SIZE, Status, ZoneAppendIn, ZoneReport, feature as f,
    request_type as t,
};
use zbdkit_zone::CloseEmpty;
use zerocopy::FromZeros;
use zerocopy::IntoBytes;

use super::model::{MAX_RANGE_SECTORS, MAX_RANGES, Model, has};
use crate::virtio::chain::Chain;

const HEADER: u64 = size_of::<RequestHeader>() as u64;
const RANGE: u64 = size_of::<DiscardWriteZeroes>() as u64;
/// The append sector, which precedes the status byte.
const APPEND_SECTOR: u64 = (size_of::<ZoneAppendIn>() - 1) as u64;

/// What the driver may ask for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Negotiated {
    /// Zones, their requests and their statuses.
    pub(super) zoned: bool,
    discard: bool,
    write_zeroes: bool,
    /// The driver's features are such that nothing works.
    refused: bool,
}

impl Negotiated {
    pub(super) fn new(features: u64, model: &Model) -> Negotiated {
        Negotiated {
            zoned: has(features, f::ZONED) && model.zones.is_some(),
            discard: has(features, f::DISCARD),
            write_zeroes: has(features, f::WRITE_ZEROES),
            refused: model.check_features(features).is_err(),
        }
    }
}

/// A request whose answer has a place to go to.
pub(super) struct Request {
    /// Guest address of the status byte.
    pub(super) status_at: u64,
    pub(super) op: Op,
}

/// What to do. Buffers are guest memory.
pub(super) enum Op {
    Read {
        buf: IoBuf,
        offset: u64,
    },
    Write {
        buf: IoBuf,
        offset: u64,
    },
    Append {
        buf: IoBuf,
        zone_start: u64,
        sector_out: IoBuf,
    },
    Flush,
    Discard(Vec<Range>),
    WriteZeroes(Vec<Range>),
    GetId(IoBuf),
    Report {
        buf: IoBuf,
        from: u64,
    },
    Zone(ZoneOp, u64),
    ResetAll,
    /// Nothing: the answer is known.
    Fail(Status),
}

/// A range of a discard or write zeroes request, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Range {
    pub(super) offset: u64,
    pub(super) len: u64,
    pub(super) unmap: bool,
}

/// There is no byte to put a status in: the chain cannot be answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a request without a status byte in the guest's memory")]
pub(super) struct NoStatus;

/// Parses the request in `chain`.
pub(super) fn parse(
    chain: &Chain,
    memory: &MemGuard,
    model: &Model,
    negotiated: Negotiated,
) -> Result<Request, NoStatus> {
    let status_at = chain.last_writable().ok_or(NoStatus)?;
    if !memory.address_in_range(GuestAddress(status_at)) {
        return Err(NoStatus);
    }
    let parser = Parser {
        chain,
        memory,
        model,
        negotiated,
    };
    Ok(Request {
        status_at,
        op: parser.op().unwrap_or_else(Op::Fail),
    })
}

struct Parser<'a> {
    chain: &'a Chain,
    memory: &'a MemGuard,
    model: &'a Model,
    negotiated: Negotiated,
}

impl Parser<'_> {
    fn op(&self) -> Result<Op, Status> {
        let mut header = RequestHeader::new_zeroed();
        if self.chain.out_of_order() || !self.chain.copy_readable(self.memory, 0, header.as_mut_bytes()) {
            return Err(Status::IoErr);
        }
        let sector = header.sector.get();
        let kind = header.kind.get();
        if self.negotiated.refused {
            return Err(if is_zone_request(kind) {
                Status::Unsupp
            } else {
                Status::IoErr
            });
        }
        match kind {
            t::IN => self.read(sector),
            t::OUT => self.write(sector),
            t::FLUSH => Ok(Op::Flush),
            t::GET_ID => Ok(Op::GetId(self.data_in()?)),
            t::DISCARD if self.negotiated.discard => Ok(Op::Discard(self.ranges(false)?)),
            t::WRITE_ZEROES if self.negotiated.write_zeroes => Ok(Op::WriteZeroes(self.ranges(true)?)),
            kind if self.negotiated.zoned && is_zone_request(kind) => self.zone_op(kind, sector),
            _ => Err(Status::Unsupp),
        }
    }

    fn read(&self, sector: u64) -> Result<Op, Status> {
        let offset = bytes(sector).ok_or(Status::IoErr)?;
        let buf = self.data_in()?;
        if !(buf.len() as u64).is_multiple_of(SECTOR_SIZE) {
            return Err(Status::IoErr);
        }
        Ok(Op::Read { buf, offset })
    }

    fn write(&self, sector: u64) -> Result<Op, Status> {
        if self.model.read_only {
            return Err(Status::IoErr);
        }
        let offset = bytes(sector).ok_or(Status::IoErr)?;
        Ok(Op::Write {
            buf: self.data_out()?,
            offset,
        })
    }

    fn zone_op(&self, kind: u32, sector: u64) -> Result<Op, Status> {
        let start = bytes(sector)
            .filter(|start| *start < self.model.size)
            .ok_or(Status::ZoneInvalidCmd);
        match kind {
            t::ZONE_APPEND => self.append(start?),
            t::ZONE_REPORT => {
                let buf = self.data_in()?;
                // Without its header there is no report.
                if buf.len() < size_of::<ZoneReport>() {
                    return Err(Status::ZoneInvalidCmd);
                }
                Ok(Op::Report { buf, from: start? })
            }
            t::ZONE_OPEN => Ok(Op::Zone(ZoneOp::Open, start?)),
            t::ZONE_CLOSE => Ok(Op::Zone(ZoneOp::Close(CloseEmpty::ToEmpty), start?)),
            t::ZONE_FINISH => Ok(Op::Zone(ZoneOp::Finish, start?)),
            t::ZONE_RESET => Ok(Op::Zone(ZoneOp::Reset, start?)),
            t::ZONE_RESET_ALL if sector == 0 => Ok(Op::ResetAll),
            _ => Err(Status::ZoneInvalidCmd),
        }
    }

    fn append(&self, zone_start: u64) -> Result<Op, Status> {
        let max = self.model.zones.as_ref().map_or(0, |zones| zones.max_append);
        let len = self.chain.readable_len() - HEADER;
        if len > max || max == 0 {
            return Err(if max == 0 {
                Status::Unsupp
            } else {
                Status::ZoneInvalidCmd
            });
        }
        // The sector comes first and the status last; Linux has padding in between, the standard none.
        if self.chain.writable_len() <= APPEND_SECTOR {
            return Err(Status::IoErr);
        }
        let sector_out = self
            .memory
            .iobuf_from(self.chain.writable(0, APPEND_SECTOR), Access::Write);
        let sector_out = sector_out.map_err(|_| Status::IoErr)?;
        Ok(Op::Append {
            buf: self.data_out()?,
            zone_start,
            sector_out,
        })
    }

    /// The data of a request that goes to the driver: all but the status byte.
    fn data_in(&self) -> Result<IoBuf, Status> {
        let pieces = self.chain.writable(0, self.chain.writable_len() - 1);
        self.memory
            .iobuf_from(pieces, Access::Write)
            .map_err(|_| Status::IoErr)
    }

    /// The data of a request that comes from the driver: all but the header, whole sectors.
    fn data_out(&self) -> Result<IoBuf, Status> {
        let len = self.chain.readable_len() - HEADER;
        if !len.is_multiple_of(SECTOR_SIZE) {
            return Err(Status::IoErr);
        }
        self.memory
            .iobuf_from(self.chain.readable(HEADER, len), Access::Read)
            .map_err(|_| Status::IoErr)
    }

    fn ranges(&self, may_unmap: bool) -> Result<Vec<Range>, Status> {
        let len = self.chain.readable_len() - HEADER;
        if len == 0 || !len.is_multiple_of(RANGE) || len / RANGE > MAX_RANGES as u64 {
            return Err(Status::IoErr);
        }
        let mut raw = [DiscardWriteZeroes::new_zeroed(); MAX_RANGES];
        let raw = &mut raw[..(len / RANGE) as usize];
        if !self.chain.copy_readable(self.memory, HEADER, raw.as_mut_bytes()) {
            return Err(Status::IoErr);
        }
        raw.iter().map(|range| parse_range(range, may_unmap)).collect()
    }
}

fn parse_range(range: &DiscardWriteZeroes, may_unmap: bool) -> Result<Range, Status> {
    let flags = range.flags.get();
    let known = if may_unmap {
        DiscardWriteZeroes::FLAG_UNMAP
    } else {
        0
    };
    if flags & !known != 0 {
        return Err(Status::Unsupp);
    }
    let sectors = range.num_sectors.get();
    if sectors > MAX_RANGE_SECTORS {
        return Err(Status::IoErr);
    }
    let offset = bytes(range.sector.get()).ok_or(Status::IoErr)?;
    Ok(Range {
        offset,
        len: u64::from(sectors) * SECTOR_SIZE,
        unmap: flags != 0,
    })
}

fn is_zone_request(kind: u32) -> bool {
    matches!(
        kind,
        t::ZONE_APPEND
            | t::ZONE_REPORT
            | t::ZONE_OPEN
            | t::ZONE_CLOSE
            | t::ZONE_FINISH
            | t::ZONE_RESET
            | t::ZONE_RESET_ALL
    )
}

/// A position in bytes, where it is one.
fn bytes(sector: u64) -> Option<u64> {
    sector.checked_mul(SECTOR_SIZE)
}
