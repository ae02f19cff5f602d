//! Submission entries to be, and completions.

use zbdkit_spec::nvme::Status;
use zbdkit_spec::nvme::base::{AdminOpcode, Cns, Csi, IdentifyCdw10, IdentifyCdw11, StatusField};
use zbdkit_spec::nvme::command::{CommandFlags, CompletionEntry, SubmissionEntry};
use zbdkit_spec::nvme::nvm::{Opcode, RwCdw12};
use zbdkit_spec::nvme::zns::{
    Opcode as ZonedOpcode, ReceiveAction, ReceiveCdw13, ReportFilter, SendAction, SendCdw13,
};
use zerocopy::FromZeros;

/// A submission queue entry to be.
#[derive(Clone, Copy, Debug)]
pub struct Entry(pub SubmissionEntry);

impl Entry {
    /// With this opcode of any command set, for this namespace.
    pub fn new(opcode: u8, nsid: u32) -> Entry {
        let mut entry = SubmissionEntry::new_zeroed();
        entry.opcode = opcode;
        entry.nsid.set(nsid);
        Entry(entry)
    }

    /// An admin command.
    pub fn admin(opcode: AdminOpcode) -> Entry {
        Entry::new(opcode.0, 0)
    }

    /// Identify.
    pub fn identify(cns: Cns, nsid: u32, csi: Csi) -> Entry {
        let mut entry = Entry::new(AdminOpcode::IDENTIFY.0, nsid);
        entry
            .0
            .cdw10
            .set(IdentifyCdw10::new().with_cns(cns.0).into_bits());
        entry
            .0
            .cdw11
            .set(IdentifyCdw11::new().with_csi(csi.0).into_bits());
        entry
    }

    /// A command on `blocks` logical blocks of namespace 1, from `block` on.
    pub fn rw(opcode: Opcode, block: u64, blocks: u32) -> Entry {
        let mut entry = Entry::new(opcode.0, 1).slba(block);
        let nlb_z = u16::try_from(blocks - 1).expect("1 to 65536 blocks");
        entry.0.cdw12.set(RwCdw12::new().with_nlb_z(nlb_z).into_bits());
        entry
    }

    /// Zone Append to the zone of namespace 1 that starts at `block`.
    pub fn append(block: u64, blocks: u32) -> Entry {
        let mut entry = Entry::rw(Opcode::WRITE, block, blocks);
        entry.0.opcode = ZonedOpcode::ZONE_APPEND.0;
        entry
    }

    /// Zone Management Send to the zone of namespace 1 that starts at `block`. The action goes into the dword.
    pub fn zone_send(action: SendAction, block: u64, cdw13: SendCdw13) -> Entry {
        let mut entry = Entry::new(ZonedOpcode::ZONE_MANAGEMENT_SEND.0, 1).slba(block);
        entry.0.cdw13.set(cdw13.with_zsa(action.0).into_bits());
        entry
    }

    /// Zone Management Receive of `len` bytes from the zone of namespace 1 that holds `block` on; a partial report.
    pub fn zone_receive(action: ReceiveAction, filter: ReportFilter, block: u64, len: usize) -> Entry {
        let mut entry = Entry::new(ZonedOpcode::ZONE_MANAGEMENT_RECEIVE.0, 1).slba(block);
        entry.0.cdw12.set((len / 4 - 1) as u32);
        let cdw13 = ReceiveCdw13::new()
            .with_zra(action.0)
            .with_zrasf(filter.0)
            .with_partial(true);
        entry.0.cdw13.set(cdw13.into_bits());
        entry
    }

    /// With this starting block in dwords 10 and 11.
    pub fn slba(mut self, block: u64) -> Entry {
        self.0.cdw10.set(block as u32);
        self.0.cdw11.set((block >> 32) as u32);
        self
    }

    /// For this namespace.
    pub fn nsid(mut self, nsid: u32) -> Entry {
        self.0.nsid.set(nsid);
        self
    }

    /// With this data pointer of PRPs.
    pub fn prps(mut self, (prp1, prp2): (u64, u64)) -> Entry {
        self.0.prp1.set(prp1);
        self.0.prp2.set(prp2);
        self
    }

    /// With this SGL descriptor as its data pointer.
    pub fn sgl(mut self, descriptor: (u64, u64)) -> Entry {
        self.0.flags = CommandFlags::new().with_psdt(1).into_bits();
        self.prps(descriptor)
    }

    /// With this command identifier.
    pub fn cid(mut self, cid: u16) -> Entry {
        self.0.cid.set(cid);
        self
    }

    /// With this command dword 10.
    pub fn cdw10(mut self, value: u32) -> Entry {
        self.0.cdw10.set(value);
        self
    }
}

/// A completion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Done {
    /// The command.
    pub cid: u16,
    /// What became of it.
    pub status: Status,
    /// The same command would fail again.
    pub dnr: bool,
    /// Dwords 0 (low) and 1.
    pub result: u64,
}

impl From<CompletionEntry> for Done {
    fn from(entry: CompletionEntry) -> Done {
        let field = StatusField::from_bits(entry.status.get() >> 1);
        Done {
            cid: entry.cid.get(),
            status: field.status(),
            dnr: field.dnr(),
            result: entry.result.get(),
        }
    }
}
