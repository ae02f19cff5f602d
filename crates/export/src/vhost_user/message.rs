//! Messages of the front-end, parsed whole before anything is done about them.
//!
//! A message is bytes and file descriptors from a peer that is not believed: size, number of file
//! descriptors and fields that need no knowledge of the device are checked here. Whether a queue exists or
//! a range is inside the configuration space is the session's business.

use std::os::fd::OwnedFd;

use zbdkit_io::unix::{Framing, MAX_FDS};
use zerocopy::{FromBytes, IntoBytes};

use super::wire::{self, Header, MemoryRegion, VringAddr, VringState, code};

/// A message as it came from the socket.
pub type RawMessage = zbdkit_io::unix::RawMessage<Header>;

/// Messages put together from a socket's bytes.
pub type Stream = zbdkit_io::unix::Stream<VhostUser>;

/// Why a connection ended.
pub type StreamError = zbdkit_io::unix::StreamError<Malformed>;

// A memory table has the most descriptors.
const _: () = assert!(wire::MAX_TABLE_REGIONS == MAX_FDS);

/// How the protocol frames its messages.
#[derive(Debug)]
pub enum VhostUser {}

impl Framing for VhostUser {
    type Header = Header;
    type Malformed = Malformed;

    fn payload_len(header: &Header) -> Result<usize, Malformed> {
        if header.flags & wire::VERSION_MASK != wire::VERSION {
            return Err(Malformed::Version(header.flags & wire::VERSION_MASK));
        }
        if header.size as usize > wire::MAX_PAYLOAD {
            return Err(Malformed::TooLong {
                code: header.code,
                size: header.size,
            });
        }
        Ok(header.size as usize)
    }
}

/// A request of the front-end.
#[derive(Debug)]
#[expect(missing_docs, reason = "names of the protocol text")]
pub enum Request {
    GetFeatures,
    SetFeatures(u64),
    SetOwner,
    ResetOwner,
    SetMemTable(Vec<(MemoryRegion, OwnedFd)>),
    SetVringNum(VringState),
    SetVringAddr(VringAddr),
    SetVringBase(VringState),
    GetVringBase(VringState),
    SetVringKick(VringFd),
    SetVringCall(VringFd),
    SetVringErr(VringFd),
    GetProtocolFeatures,
    SetProtocolFeatures(u64),
    GetQueueNum,
    SetVringEnable(VringState),
    GetConfig { offset: u32, size: u32, flags: u32 },
    SetConfig { offset: u32, bytes: Vec<u8> },
    ResetDevice,
    GetMaxMemSlots,
    AddMemReg(MemoryRegion, OwnedFd),
    RemMemReg(MemoryRegion),
    SetStatus(u64),
    GetStatus,
}

/// An eventfd for a queue.
#[derive(Debug)]
pub struct VringFd {
    /// Queue.
    pub index: u32,
    /// The eventfd, or `None` where the front-end polls.
    pub fd: Option<OwnedFd>,
}

/// What is wrong with a message, as far as the message alone shows it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say what the fields are")]
pub enum Malformed {
    #[error("header says protocol version {0}, not 1")]
    Version(u32),
    #[error(
        "message {code} claims a payload of {size} bytes, more than {}",
        wire::MAX_PAYLOAD
    )]
    TooLong { code: u32, size: u32 },
    #[error("message {0} comes marked as a reply")]
    IsReply(u32),
    #[error("message {0} is not supported")]
    Unsupported(u32),
    #[error("message {code} has a payload of {got} bytes instead of {expected}")]
    Size { code: u32, expected: usize, got: usize },
    #[error("message {code} carries {got} file descriptors instead of {expected}")]
    Fds { code: u32, expected: usize, got: usize },
    #[error("memory table of {regions} regions, more than {}", wire::MAX_TABLE_REGIONS)]
    TooManyRegions { regions: u32 },
    #[error("message {code} with unknown bits in {value:#x}")]
    Bits { code: u32, value: u64 },
}

impl Header {
    /// Whether the sender asks for an acknowledgement.
    pub fn wants_ack(&self) -> bool {
        self.flags & wire::FLAG_NEED_REPLY != 0
    }
}

/// Whether message `code` is answered by a payload of its own, acknowledgements or not.
pub fn has_own_reply(code: u32) -> bool {
    use code::*;
    matches!(
        code,
        GET_FEATURES
            | GET_VRING_BASE
            | GET_PROTOCOL_FEATURES
            | GET_QUEUE_NUM
            | GET_CONFIG
            | GET_MAX_MEM_SLOTS
            | GET_STATUS
    )
}

impl Request {
    /// Parses a message whose header passed [`Header::check`].
    ///
    /// # Errors
    /// What is malformed; the file descriptors are closed.
    pub fn parse(message: RawMessage) -> Result<Request, Malformed> {
        let code = message.header.code;
        if message.header.flags & wire::FLAG_REPLY != 0 {
            return Err(Malformed::IsReply(code));
        }
        let body = Body {
            code,
            payload: &message.payload,
            fds: message.fds,
        };
        Ok(match code {
            code::GET_FEATURES => body.empty(Request::GetFeatures)?,
            code::SET_FEATURES => Request::SetFeatures(body.plain()?),
            code::SET_OWNER => body.empty(Request::SetOwner)?,
            code::RESET_OWNER => body.empty(Request::ResetOwner)?,
            code::SET_MEM_TABLE => body.memory_table()?,
            code::SET_VRING_NUM => Request::SetVringNum(body.plain()?),
            code::SET_VRING_ADDR => Request::SetVringAddr(body.plain()?),
            code::SET_VRING_BASE => Request::SetVringBase(body.plain()?),
            code::GET_VRING_BASE => Request::GetVringBase(body.plain()?),
            code::SET_VRING_KICK => Request::SetVringKick(body.vring_fd()?),
            code::SET_VRING_CALL => Request::SetVringCall(body.vring_fd()?),
            code::SET_VRING_ERR => Request::SetVringErr(body.vring_fd()?),
            code::GET_PROTOCOL_FEATURES => body.empty(Request::GetProtocolFeatures)?,
            code::SET_PROTOCOL_FEATURES => Request::SetProtocolFeatures(body.plain()?),
            code::GET_QUEUE_NUM => body.empty(Request::GetQueueNum)?,
            code::SET_VRING_ENABLE => Request::SetVringEnable(body.plain()?),
            code::GET_CONFIG | code::SET_CONFIG => body.config()?,
            code::RESET_DEVICE => body.empty(Request::ResetDevice)?,
            code::GET_MAX_MEM_SLOTS => body.empty(Request::GetMaxMemSlots)?,
            code::ADD_MEM_REG => body.add_region()?,
            code::REM_MEM_REG => body.remove_region()?,
            code::SET_STATUS => Request::SetStatus(body.plain()?),
            code::GET_STATUS => body.empty(Request::GetStatus)?,
            _ => return Err(Malformed::Unsupported(code)),
        })
    }
}

struct Body<'a> {
    code: u32,
    payload: &'a [u8],
    fds: Vec<OwnedFd>,
}

impl Body<'_> {
    fn expect_fds(&self, expected: usize) -> Result<(), Malformed> {
        let got = self.fds.len();
        if got == expected {
            Ok(())
        } else {
            Err(Malformed::Fds {
                code: self.code,
                expected,
                got,
            })
        }
    }

    fn read<T: FromBytes>(&self) -> Result<T, Malformed> {
        T::read_from_bytes(self.payload).map_err(|_| self.size_error(size_of::<T>()))
    }

    fn size_error(&self, expected: usize) -> Malformed {
        Malformed::Size {
            code: self.code,
            expected,
            got: self.payload.len(),
        }
    }

    fn empty(self, request: Request) -> Result<Request, Malformed> {
        self.expect_fds(0)?;
        if self.payload.is_empty() {
            Ok(request)
        } else {
            Err(self.size_error(0))
        }
    }

    fn plain<T: FromBytes>(self) -> Result<T, Malformed> {
        self.expect_fds(0)?;
        self.read()
    }

    fn one_fd(mut self) -> Result<OwnedFd, Malformed> {
        self.expect_fds(1)?;
        self.fds.pop().ok_or(Malformed::Fds {
            code: self.code,
            expected: 1,
            got: 0,
        })
    }

    fn vring_fd(mut self) -> Result<VringFd, Malformed> {
        let value: u64 = self.read()?;
        if value & !(wire::VRING_INDEX_MASK | wire::VRING_NOFD) != 0 {
            return Err(Malformed::Bits {
                code: self.code,
                value,
            });
        }
        self.expect_fds(usize::from(value & wire::VRING_NOFD == 0))?;
        Ok(VringFd {
            index: (value & wire::VRING_INDEX_MASK) as u32,
            fd: self.fds.pop(),
        })
    }

    fn memory_table(self) -> Result<Request, Malformed> {
        let (header, rest) = wire::MemoryTableHeader::read_from_prefix(self.payload)
            .map_err(|_| self.size_error(size_of::<wire::MemoryTableHeader>()))?;
        let count = header.regions as usize;
        if count > wire::MAX_TABLE_REGIONS {
            return Err(Malformed::TooManyRegions {
                regions: header.regions,
            });
        }
        // QEMU sends the regions there are, crosvm always room for eight: more room than regions is fine.
        let needed = count * size_of::<MemoryRegion>();
        if rest.len() < needed || !rest.len().is_multiple_of(size_of::<MemoryRegion>()) {
            return Err(self.size_error(size_of::<wire::MemoryTableHeader>() + needed));
        }
        self.expect_fds(count)?;
        let regions = rest
            .chunks_exact(size_of::<MemoryRegion>())
            .filter_map(|b| MemoryRegion::read_from_bytes(b).ok());
        Ok(Request::SetMemTable(regions.zip(self.fds).collect()))
    }

    fn add_region(self) -> Result<Request, Malformed> {
        let single: wire::SingleRegion = self.read()?;
        Ok(Request::AddMemReg(single.region, self.one_fd()?))
    }

    fn remove_region(self) -> Result<Request, Malformed> {
        // Front-ends may send the region's file descriptor along; it has no use.
        if self.fds.len() > 1 {
            self.expect_fds(1)?;
        }
        let single: wire::SingleRegion = self.read()?;
        Ok(Request::RemMemReg(single.region))
    }

    fn config(self) -> Result<Request, Malformed> {
        self.expect_fds(0)?;
        let (header, bytes) = wire::ConfigHeader::read_from_prefix(self.payload)
            .map_err(|_| self.size_error(size_of::<wire::ConfigHeader>()))?;
        let wire::ConfigHeader { offset, size, flags } = header;
        if bytes.len() != size as usize {
            return Err(self.size_error(size_of::<wire::ConfigHeader>().saturating_add(size as usize)));
        }
        Ok(match self.code {
            code::GET_CONFIG => Request::GetConfig { offset, size, flags },
            _ => Request::SetConfig {
                offset,
                bytes: bytes.to_vec(),
            },
        })
    }
}

/// The payload of a reply.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    /// A number: features, counts, a status, or an acknowledgement (0 for success).
    U64(u64),
    /// A queue and its base.
    Vring(VringState),
    /// Configuration bytes; empty for an error.
    Config {
        /// As requested.
        offset: u32,
        /// As requested.
        flags: u32,
        /// As many as requested.
        bytes: Vec<u8>,
    },
    /// GET_CONFIG that cannot be answered: the protocol has a payload of zero bytes for it.
    ConfigError,
}

impl Reply {
    /// The reply to message `code` as it goes over the socket.
    pub fn to_bytes(&self, code: u32) -> Vec<u8> {
        let mut bytes = vec![0; wire::HEADER_SIZE];
        match self {
            Reply::U64(value) => bytes.extend(value.as_bytes()),
            Reply::Vring(state) => bytes.extend(state.as_bytes()),
            Reply::Config {
                offset,
                flags,
                bytes: config,
            } => {
                let size = config.len() as u32;
                bytes.extend(
                    wire::ConfigHeader {
                        offset: *offset,
                        size,
                        flags: *flags,
                    }
                    .as_bytes(),
                );
                bytes.extend(config);
            }
            Reply::ConfigError => {}
        }
        let size = (bytes.len() - wire::HEADER_SIZE) as u32;
        let header = Header {
            code,
            flags: wire::VERSION | wire::FLAG_REPLY,
            size,
        };
        bytes[..wire::HEADER_SIZE].copy_from_slice(header.as_bytes());
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn raw(code: u32, payload: &[u8], fds: usize) -> RawMessage {
        let header = Header {
            code,
            flags: wire::VERSION,
            size: payload.len() as u32,
        };
        let fds = (0..fds)
            .map(|_| std::fs::File::open("/dev/null").unwrap().into())
            .collect();
        RawMessage {
            header,
            payload: payload.to_vec(),
            fds,
        }
    }

    fn region(n: u64) -> MemoryRegion {
        MemoryRegion {
            guest_addr: n << 20,
            size: 1 << 20,
            user_addr: n << 32,
            mmap_offset: 0,
        }
    }

    #[test]
    fn a_header_of_another_version_or_an_endless_payload_is_refused() {
        let good = Header {
            code: 1,
            flags: 1,
            size: 8,
        };
        assert_eq!(VhostUser::payload_len(&good), Ok(good.size as usize));
        assert_eq!(
            VhostUser::payload_len(&Header { flags: 2, ..good }),
            Err(Malformed::Version(2))
        );
        assert_eq!(
            VhostUser::payload_len(&Header { flags: 0, ..good }),
            Err(Malformed::Version(0))
        );
        let size = wire::MAX_PAYLOAD as u32 + 1;
        assert_eq!(
            VhostUser::payload_len(&Header { size, ..good }),
            Err(Malformed::TooLong { code: 1, size })
        );
    }

    #[test]
    fn payloads_of_another_size_are_refused() {
        for code in 0..64 {
            if matches!(code, code::GET_CONFIG | code::SET_CONFIG) {
                continue;
            }
            assert!(Request::parse(raw(code, &[0; 7], 0)).is_err(), "{code}");
        }
        let error = Request::parse(raw(code::SET_FEATURES, &[0; 16], 0)).unwrap_err();
        assert_eq!(
            error,
            Malformed::Size {
                code: 2,
                expected: 8,
                got: 16
            }
        );
    }

    #[test]
    fn file_descriptors_must_be_as_many_as_the_message_has() {
        let parse = |code, payload: &[u8], fds| Request::parse(raw(code, payload, fds));
        assert!(parse(code::SET_FEATURES, &[0; 8], 1).is_err());
        assert!(parse(code::GET_FEATURES, &[], 1).is_err());
        assert!(parse(code::SET_VRING_KICK, &0u64.to_ne_bytes(), 1).is_ok());
        assert!(parse(code::SET_VRING_KICK, &0u64.to_ne_bytes(), 0).is_err());
        assert!(parse(code::SET_VRING_KICK, &0u64.to_ne_bytes(), 2).is_err());
        assert!(parse(code::SET_VRING_CALL, &wire::VRING_NOFD.to_ne_bytes(), 0).is_ok());
        assert!(parse(code::SET_VRING_CALL, &wire::VRING_NOFD.to_ne_bytes(), 1).is_err());
        assert!(parse(code::SET_VRING_CALL, &0x200u64.to_ne_bytes(), 1).is_err());
        assert!(parse(code::ADD_MEM_REG, &[0; 40], 0).is_err());
        assert!(parse(code::ADD_MEM_REG, &[0; 40], 1).is_ok());
        assert!(parse(code::REM_MEM_REG, &[0; 40], 0).is_ok());
        assert!(parse(code::REM_MEM_REG, &[0; 40], 1).is_ok());
        assert!(parse(code::REM_MEM_REG, &[0; 40], 2).is_err());
    }

    #[test]
    fn a_memory_table_pairs_regions_with_their_file_descriptors() {
        let mut payload = vec![2, 0, 0, 0, 0, 0, 0, 0];
        payload.extend(region(1).as_bytes());
        payload.extend(region(2).as_bytes());
        let Request::SetMemTable(table) = Request::parse(raw(code::SET_MEM_TABLE, &payload, 2)).unwrap()
        else {
            panic!("not a memory table");
        };
        assert_eq!(
            table.iter().map(|r| r.0).collect::<Vec<_>>(),
            [region(1), region(2)]
        );
        assert!(Request::parse(raw(code::SET_MEM_TABLE, &payload, 1)).is_err());
        assert!(Request::parse(raw(code::SET_MEM_TABLE, &payload[..70], 2)).is_err());
        payload[0] = 200;
        let error = Request::parse(raw(code::SET_MEM_TABLE, &payload, 2)).unwrap_err();
        assert_eq!(error, Malformed::TooManyRegions { regions: 200 });
    }

    #[test]
    fn a_config_message_has_as_many_bytes_as_it_says() {
        let mut payload = vec![0; 12 + 4];
        payload[4] = 4;
        assert!(Request::parse(raw(code::GET_CONFIG, &payload, 0)).is_ok());
        assert!(Request::parse(raw(code::GET_CONFIG, &payload[..14], 0)).is_err());
        payload[4..8].fill(0xff);
        assert!(Request::parse(raw(code::SET_CONFIG, &payload, 0)).is_err());
    }

    #[test]
    fn replies_have_a_header_that_says_so() {
        let bytes = Reply::U64(5).to_bytes(code::GET_STATUS);
        assert_eq!(
            bytes,
            [40, 0, 0, 0, 5, 0, 0, 0, 8, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0]
        );
        assert_eq!(Reply::ConfigError.to_bytes(code::GET_CONFIG).len(), 12);
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_parser_panic(code in 0u32..64, payload in proptest::collection::vec(any::<u8>(), 0..300),
                                          fds in 0usize..9) {
            let _ = Request::parse(raw(code, &payload, fds));
        }
    }
}
