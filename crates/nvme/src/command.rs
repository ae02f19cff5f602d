//! I/O commands, parsed before anything runs (NVM Command Set 1.1, 3; Zoned Namespace Command Set 1.2, 3).
//!
//! Reserved fields are ignored, and so are those of protection information, since no namespace has any.

use zbdkit_spec::nvme::Status;
use zbdkit_spec::nvme::command::SubmissionEntry;
use zbdkit_spec::nvme::nvm::{CopyCdw12, DsmCdw11, Opcode, RwCdw12};
use zbdkit_spec::nvme::zns::{
    self, AppendCdw12, ReceiveAction, ReceiveCdw13, ReportFilter, SendAction, SendCdw13,
};

/// A range of logical blocks as a command names it, unchecked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Blocks {
    /// The first.
    pub start: u64,
    /// How many, 1 to 65536.
    pub count: u32,
}

/// An I/O command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IoCommand {
    /// Read.
    Read {
        /// What to read.
        blocks: Blocks,
        /// From where it is durable.
        fua: bool,
    },
    /// Write.
    Write {
        /// Where to.
        blocks: Blocks,
        /// Durable before it completes.
        fua: bool,
    },
    /// Zone Append.
    Append {
        /// The zone's first block, and how many to append.
        blocks: Blocks,
        /// Durable before it completes.
        fua: bool,
    },
    /// Flush.
    Flush,
    /// Compare.
    Compare {
        /// What to compare with the host's data.
        blocks: Blocks,
    },
    /// Verify.
    Verify {
        /// What to read without transferring it.
        blocks: Blocks,
    },
    /// Write Zeroes.
    WriteZeroes {
        /// Where to.
        blocks: Blocks,
        /// Their space may be given back.
        deallocate: bool,
        /// Durable before it completes.
        fua: bool,
    },
    /// Write Uncorrectable.
    WriteUncorrectable {
        /// What cannot be read any more.
        blocks: Blocks,
    },
    /// Dataset Management.
    DatasetManagement {
        /// Ranges that the data has, 1 to 256.
        ranges: u16,
        /// Give their space back; else it is all hints.
        deallocate: bool,
    },
    /// Copy.
    Copy {
        /// Where to.
        start: u64,
        /// Source ranges that the data has, 1 to 256.
        ranges: u16,
        /// Format of their descriptors.
        format: u8,
        /// Durable before it completes.
        fua: bool,
    },
    /// Zone Management Send.
    ZoneSend {
        /// First block of the zone.
        start: u64,
        /// What to do, as the host wrote it.
        action: SendAction,
        /// For all zones that it can be done to.
        all: bool,
        /// The action's option.
        option: bool,
    },
    /// Zone Management Receive.
    ZoneReceive {
        /// A block of the first zone to report.
        start: u64,
        /// Bytes of the report.
        len: u64,
        /// What to report, as the host wrote it.
        action: ReceiveAction,
        /// Which zones, as the host wrote it.
        filter: ReportFilter,
        /// The number of zones is that of the descriptors.
        partial: bool,
    },
}

impl IoCommand {
    /// Parses an entry of an I/O queue.
    ///
    /// # Errors
    /// [`Status::INVALID_OPCODE`], [`Status::INVALID_FIELD`].
    pub fn parse(entry: &SubmissionEntry) -> Result<IoCommand, Status> {
        check_flags(entry)?;
        let start = entry.slba();
        let rw = RwCdw12::from_bits(entry.cdw12.get());
        let blocks = Blocks {
            start,
            count: u32::from(rw.nlb_z()) + 1,
        };
        let fua = rw.fua();
        if let Some(command) = parse_zoned(entry, blocks) {
            return Ok(command);
        }
        Ok(match Opcode(entry.opcode) {
            Opcode::READ => IoCommand::Read { blocks, fua },
            Opcode::WRITE => IoCommand::Write { blocks, fua },
            Opcode::FLUSH => IoCommand::Flush,
            Opcode::COMPARE => IoCommand::Compare { blocks },
            Opcode::VERIFY => IoCommand::Verify { blocks },
            Opcode::WRITE_ZEROES => IoCommand::WriteZeroes {
                blocks,
                deallocate: rw.deac(),
                fua,
            },
            Opcode::WRITE_UNCORRECTABLE => IoCommand::WriteUncorrectable { blocks },
            // Dword 10, 0-based.
            Opcode::DATASET_MANAGEMENT => IoCommand::DatasetManagement {
                ranges: (entry.cdw10.get() as u8).into_count(),
                deallocate: DsmCdw11::from_bits(entry.cdw11.get()).ad(),
            },
            Opcode::COPY => {
                let copy = CopyCdw12::from_bits(entry.cdw12.get());
                IoCommand::Copy {
                    start,
                    ranges: copy.nr_z().into_count(),
                    format: copy.desfmt(),
                    fua: copy.fua(),
                }
            }
            _ => return Err(Status::INVALID_OPCODE),
        })
    }
}

fn parse_zoned(entry: &SubmissionEntry, blocks: Blocks) -> Option<IoCommand> {
    let start = blocks.start;
    Some(match zns::Opcode(entry.opcode) {
        zns::Opcode::ZONE_APPEND => IoCommand::Append {
            blocks,
            fua: AppendCdw12::from_bits(entry.cdw12.get()).fua(),
        },
        zns::Opcode::ZONE_MANAGEMENT_SEND => {
            let send = SendCdw13::from_bits(entry.cdw13.get());
            IoCommand::ZoneSend {
                start,
                action: SendAction(send.zsa()),
                all: send.select_all(),
                option: send.zsaso(),
            }
        }
        zns::Opcode::ZONE_MANAGEMENT_RECEIVE => {
            let receive = ReceiveCdw13::from_bits(entry.cdw13.get());
            IoCommand::ZoneReceive {
                start,
                len: (u64::from(entry.cdw12.get()) + 1) * 4,
                action: ReceiveAction(receive.zra()),
                filter: ReportFilter(receive.zrasf()),
                partial: receive.partial(),
            }
        }
        _ => return None,
    })
}

/// What every command has: no fused operations, and a data pointer of a kind that there is.
pub(crate) fn check_flags(entry: &SubmissionEntry) -> Result<(), Status> {
    let flags = entry.command_flags();
    if flags.fuse() != 0 || flags.psdt() == 3 {
        return Err(Status::INVALID_FIELD);
    }
    Ok(())
}

/// A 0-based count.
trait ZeroBased {
    fn into_count(self) -> u16;
}

impl ZeroBased for u8 {
    fn into_count(self) -> u16 {
        u16::from(self) + 1
    }
}
