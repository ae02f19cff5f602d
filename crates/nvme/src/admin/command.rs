//! Admin commands, parsed before anything runs (Base Specification 2.1, 5). Reserved fields are ignored.

use zbdkit_spec::nvme::Status;
use zbdkit_spec::nvme::admin::{
    AbortCdw10, CreateCqCdw11, CreateQueueCdw10, CreateSqCdw11, FormatCdw10, GetFeaturesCdw10, GetLogCdw10,
    GetLogCdw11, GetLogCdw14, SetFeaturesCdw10,
};
use zbdkit_spec::nvme::base::{AdminOpcode, Cns, Csi, IdentifyCdw10, IdentifyCdw11};
use zbdkit_spec::nvme::command::SubmissionEntry;
use zbdkit_spec::nvme::feature::FeatureId;
use zbdkit_spec::nvme::log::LogId;

use crate::command::check_flags;
use crate::transport::{CreateCq, CreateSq};

/// An admin command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AdminCommand {
    /// Create I/O Completion Queue.
    CreateCq(CreateCq),
    /// Create I/O Submission Queue.
    CreateSq(CreateSq),
    /// Delete I/O Completion Queue.
    DeleteCq(u16),
    /// Delete I/O Submission Queue.
    DeleteSq(u16),
    /// Doorbell Buffer Config.
    DoorbellBuffers {
        /// Address of the shadow doorbells.
        shadow: u64,
        /// Address of the event indexes.
        event_index: u64,
    },
    /// Abort.
    Abort {
        /// The command's queue.
        sqid: u16,
        /// The command.
        cid: u16,
    },
    /// Identify.
    Identify {
        /// Which structure.
        cns: Cns,
        /// Of which namespace, or after which one.
        nsid: u32,
        /// Of which controller, or from which one on.
        cntid: u16,
        /// Of which command set.
        csi: Csi,
    },
    /// Get Log Page.
    GetLog(GetLog),
    /// Get Features.
    GetFeatures {
        /// Which.
        feature: FeatureId,
        /// Which of its values.
        select: Select,
        /// Of which namespace.
        nsid: u32,
        /// Command dword 11.
        value: u32,
    },
    /// Set Features.
    SetFeatures {
        /// Which.
        feature: FeatureId,
        /// Across power cycles.
        save: bool,
        /// Of which namespace.
        nsid: u32,
        /// Command dword 11.
        value: u32,
    },
    /// Asynchronous Event Request.
    AsyncEventRequest,
    /// Keep Alive.
    KeepAlive,
    /// Format NVM.
    Format {
        /// Which namespace, or all.
        nsid: u32,
        /// Index of the LBA format.
        format: u8,
        /// With protection information, or metadata at the end of blocks.
        protection: bool,
        /// Secure erase setting.
        erase: u8,
    },
}

/// Get Log Page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GetLog {
    /// Which.
    pub page: LogId,
    /// Of which namespace.
    pub nsid: u32,
    /// Bytes to return, at least 4.
    pub len: u64,
    /// From where on, bytes; or an index, where [`GetLog::by_index`].
    pub offset: u64,
    /// The offset is an index.
    pub by_index: bool,
    /// Of which command set.
    pub csi: Csi,
    /// Keep the asynchronous event that the page belongs to.
    pub retain_event: bool,
}

/// Which value of a feature Get Features asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Select {
    /// The one in use.
    Current,
    /// The one after a reset.
    Default,
    /// The one that is saved.
    Saved,
    /// What can be done with it.
    Capabilities,
}

impl AdminCommand {
    /// Parses an entry of the admin queue.
    ///
    /// # Errors
    /// [`Status::INVALID_OPCODE`], [`Status::INVALID_FIELD`].
    pub fn parse(entry: &SubmissionEntry) -> Result<AdminCommand, Status> {
        check_flags(entry)?;
        let nsid = entry.nsid.get();
        let cdw10 = entry.cdw10.get();
        let cdw11 = entry.cdw11.get();
        Ok(match AdminOpcode(entry.opcode) {
            AdminOpcode::CREATE_IO_CQ => AdminCommand::CreateCq(create_cq(entry)),
            AdminOpcode::CREATE_IO_SQ => AdminCommand::CreateSq(create_sq(entry)),
            AdminOpcode::DELETE_IO_CQ => AdminCommand::DeleteCq(CreateQueueCdw10::from_bits(cdw10).qid()),
            AdminOpcode::DELETE_IO_SQ => AdminCommand::DeleteSq(CreateQueueCdw10::from_bits(cdw10).qid()),
            AdminOpcode::DOORBELL_BUFFER_CONFIG => AdminCommand::DoorbellBuffers {
                shadow: entry.prp1.get(),
                event_index: entry.prp2.get(),
            },
            AdminOpcode::ABORT => {
                let abort = AbortCdw10::from_bits(cdw10);
                AdminCommand::Abort {
                    sqid: abort.sqid(),
                    cid: abort.cid(),
                }
            }
            AdminOpcode::IDENTIFY => {
                let identify = IdentifyCdw10::from_bits(cdw10);
                AdminCommand::Identify {
                    cns: Cns(identify.cns()),
                    nsid,
                    cntid: identify.cntid(),
                    csi: Csi(IdentifyCdw11::from_bits(cdw11).csi()),
                }
            }
            AdminOpcode::GET_LOG_PAGE => AdminCommand::GetLog(get_log(entry)),
            AdminOpcode::GET_FEATURES => {
                let get = GetFeaturesCdw10::from_bits(cdw10);
                AdminCommand::GetFeatures {
                    feature: FeatureId(get.fid()),
                    select: match get.sel() {
                        0 => Select::Current,
                        1 => Select::Default,
                        2 => Select::Saved,
                        3 => Select::Capabilities,
                        _ => return Err(Status::INVALID_FIELD),
                    },
                    nsid,
                    value: cdw11,
                }
            }
            AdminOpcode::SET_FEATURES => {
                let set = SetFeaturesCdw10::from_bits(cdw10);
                AdminCommand::SetFeatures {
                    feature: FeatureId(set.fid()),
                    save: set.sv(),
                    nsid,
                    value: cdw11,
                }
            }
            AdminOpcode::ASYNC_EVENT_REQUEST => AdminCommand::AsyncEventRequest,
            AdminOpcode::KEEP_ALIVE => AdminCommand::KeepAlive,
            AdminOpcode::FORMAT_NVM => {
                let format = FormatCdw10::from_bits(cdw10);
                AdminCommand::Format {
                    nsid,
                    format: format.lbafl() | format.lbafu() << 4,
                    protection: format.pi() != 0 || format.mset(),
                    erase: format.ses(),
                }
            }
            _ => return Err(Status::INVALID_OPCODE),
        })
    }
}

fn create_cq(entry: &SubmissionEntry) -> CreateCq {
    let queue = CreateQueueCdw10::from_bits(entry.cdw10.get());
    let cq = CreateCqCdw11::from_bits(entry.cdw11.get());
    CreateCq {
        qid: queue.qid(),
        entries: u32::from(queue.qsize_z()) + 1,
        prp1: entry.prp1.get(),
        contiguous: cq.pc(),
        vector: cq.ien().then_some(cq.iv()),
    }
}

fn create_sq(entry: &SubmissionEntry) -> CreateSq {
    let queue = CreateQueueCdw10::from_bits(entry.cdw10.get());
    let sq = CreateSqCdw11::from_bits(entry.cdw11.get());
    CreateSq {
        qid: queue.qid(),
        entries: u32::from(queue.qsize_z()) + 1,
        prp1: entry.prp1.get(),
        contiguous: sq.pc(),
        cqid: sq.cqid(),
    }
}

fn get_log(entry: &SubmissionEntry) -> GetLog {
    let cdw10 = GetLogCdw10::from_bits(entry.cdw10.get());
    let cdw11 = GetLogCdw11::from_bits(entry.cdw11.get());
    let cdw14 = GetLogCdw14::from_bits(entry.cdw14.get());
    let dwords_z = u64::from(cdw11.numdu()) << 16 | u64::from(cdw10.numdl_z());
    GetLog {
        page: LogId(cdw10.lid()),
        nsid: entry.nsid.get(),
        len: (dwords_z + 1) * 4,
        offset: u64::from(entry.cdw13.get()) << 32 | u64::from(entry.cdw12.get()),
        by_index: cdw14.ot(),
        csi: Csi(cdw14.csi()),
        retain_event: cdw10.rae(),
    }
}
