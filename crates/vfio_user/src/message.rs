//! Messages, parsed whole before anything is done.

use std::os::fd::OwnedFd;

use rustix::io::Errno;
use serde_json::{Map, Value, json};
use zbdkit_io::mem::MAX_REGIONS;
use zbdkit_io::unix::{Framing, MAX_FDS};
use zbdkit_spec::vfio_user::{
    self as spec, DeviceInfo, DmaMap, DmaUnmap, HEADER_SIZE, Header, IrqInfo, IrqSet, RegionAccess,
    RegionInfo, RegionWriteOne, Version, capability, command, dma_map, dma_unmap, flag, irq_set,
};
use zerocopy::little_endian::U64;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Longest data of an access that we take, in bytes.
pub const MAX_DATA: usize = spec::DEFAULT_MAX_DATA_XFER_SIZE as usize;
/// Longest payload of a message: data behind the largest structure that data follows.
pub const MAX_PAYLOAD: usize = MAX_DATA + 32;
/// The page size of DMA regions, in bytes.
const PAGE: u64 = 4096;

/// A message as it came from the socket.
pub type RawMessage = zbdkit_io::unix::RawMessage<Header>;

/// Messages put together from a socket's bytes.
pub type Stream = zbdkit_io::unix::Stream<VfioUser>;

/// Why a connection ended.
pub type StreamError = zbdkit_io::unix::StreamError<Malformed>;

/// How the protocol frames its messages.
#[derive(Debug)]
pub enum VfioUser {}

impl Framing for VfioUser {
    type Header = Header;
    type Malformed = Malformed;

    fn payload_len(header: &Header) -> Result<usize, Malformed> {
        let size = header.message_size.get();
        if (size as usize) < HEADER_SIZE {
            return Err(Malformed::Short(size));
        }
        if size as usize > HEADER_SIZE + MAX_PAYLOAD {
            return Err(Malformed::Long(size));
        }
        match header.flags.get() & flag::TYPE_MASK {
            flag::COMMAND | flag::REPLY => Ok(size as usize - HEADER_SIZE),
            other => Err(Malformed::Type(other)),
        }
    }
}

/// Why bytes are no message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say what the fields are")]
pub enum Malformed {
    #[error("a message of {0} bytes is shorter than its header")]
    Short(u32),
    #[error("a message of {0} bytes is longer than the longest allowed")]
    Long(u32),
    #[error("message type {0} is neither a command nor a reply")]
    Type(u32),
    #[error("the payload of command {command} has {len} bytes")]
    Payload { command: u16, len: usize },
    #[error("command {command} comes with {fds} file descriptors")]
    Fds { command: u16, fds: usize },
    #[error("command {0} is not known here")]
    Command(u16),
    #[error("argsz {0} is too small for the answer")]
    Argsz(u32),
    #[error("the version is {0}.{1}")]
    Version(u16, u16),
    #[error("the capabilities are no JSON object in a text that ends in NUL")]
    Capabilities,
    #[error("flags {0:#x} make no sense together")]
    Flags(u32),
    #[error("data of {0} bytes is longer than {MAX_DATA}")]
    Data(u64),
    #[error("dirty page tracking is not supported")]
    Dirty,
    #[error("{size:#x} bytes at {address:#x} are no range of pages")]
    Range { address: u64, size: u64 },
}

impl Malformed {
    /// What the client is told.
    pub fn errno(self) -> Errno {
        match self {
            Malformed::Command(_) | Malformed::Dirty => Errno::OPNOTSUPP,
            Malformed::Data(_) => Errno::TOOBIG,
            _ => Errno::INVAL,
        }
    }
}
/// Whether a message is a reply to a command of ours.
pub fn is_reply(header: &Header) -> bool {
    header.flags.get() & flag::TYPE_MASK == flag::REPLY
}

/// A command of a client.
#[derive(Debug)]
#[expect(missing_docs, reason = "names of the protocol text")]
pub enum Request {
    Version(Limits),
    DmaMap {
        map: DmaMap,
        fd: Option<OwnedFd>,
    },
    DmaUnmap {
        address: u64,
        size: u64,
    },
    DmaUnmapAll,
    GetInfo,
    GetRegionInfo {
        argsz: u32,
        index: u32,
    },
    GetIrqInfo {
        index: u32,
    },
    SetIrqs(SetIrqs),
    RegionRead(RegionAccess),
    /// The data is what follows the structure in the payload.
    RegionWrite(RegionAccess, Vec<u8>),
    RegionWriteMulti(Vec<RegionWriteOne>),
    Reset,
}

/// SET_IRQS. Its range is not checked yet.
#[derive(Debug)]
#[expect(missing_docs, reason = "names of linux/vfio.h")]
pub struct SetIrqs {
    pub index: u32,
    pub start: u32,
    pub count: u32,
    pub action: IrqAction,
    pub data: IrqData,
}

/// What is done to interrupts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "names of linux/vfio.h")]
pub enum IrqAction {
    Mask,
    Unmask,
    Trigger,
}

/// To which of them.
#[derive(Debug)]
pub enum IrqData {
    /// All in the range.
    None,
    /// Those with a byte that is not zero; as many bytes as interrupts.
    Bool(Vec<u8>),
    /// All in the range get these eventfds, as many as interrupts, or lose theirs if there are none.
    Eventfd(Vec<OwnedFd>),
}

impl Request {
    /// Parses a command.
    ///
    /// # Errors
    /// Whatever is not exactly as the protocol says. File descriptors are closed.
    pub fn parse(message: RawMessage) -> Result<Request, Malformed> {
        let RawMessage {
            header,
            payload,
            mut fds,
        } = message;
        let command = header.command.get();
        let most_fds = match command {
            command::DMA_MAP => 1,
            command::DEVICE_SET_IRQS => MAX_FDS,
            _ => 0,
        };
        if fds.len() > most_fds {
            return Err(Malformed::Fds {
                command,
                fds: fds.len(),
            });
        }
        let whole = Payload {
            command,
            bytes: &payload,
        };
        Ok(match command {
            command::VERSION => {
                let (version, text) = whole.start::<Version>()?;
                let (major, minor) = (version.major.get(), version.minor.get());
                if major != spec::MAJOR {
                    return Err(Malformed::Version(major, minor));
                }
                Request::Version(Limits::parse(text)?)
            }
            command::DMA_MAP => {
                let map = whole.exactly::<DmaMap>()?;
                check_map(&map)?;
                Request::DmaMap { map, fd: fds.pop() }
            }
            command::DMA_UNMAP => parse_unmap(&whole.exactly::<DmaUnmap>()?)?,
            command::DEVICE_GET_INFO => {
                check_argsz::<DeviceInfo>(whole.exactly::<DeviceInfo>()?.argsz.get())?;
                Request::GetInfo
            }
            command::DEVICE_GET_REGION_INFO => {
                let info = whole.exactly::<RegionInfo>()?;
                let argsz = info.argsz.get();
                check_argsz::<RegionInfo>(argsz)?;
                Request::GetRegionInfo {
                    argsz,
                    index: info.index.get(),
                }
            }
            command::DEVICE_GET_IRQ_INFO => {
                let info = whole.exactly::<IrqInfo>()?;
                check_argsz::<IrqInfo>(info.argsz.get())?;
                Request::GetIrqInfo {
                    index: info.index.get(),
                }
            }
            command::DEVICE_SET_IRQS => {
                let (set, rest) = whole.start::<IrqSet>()?;
                Request::SetIrqs(parse_set_irqs(&set, rest, fds)?)
            }
            command::REGION_READ => {
                let access = whole.exactly::<RegionAccess>()?;
                check_count(access.count.get().into())?;
                Request::RegionRead(access)
            }
            command::REGION_WRITE => {
                let (access, data) = whole.start::<RegionAccess>()?;
                check_count(access.count.get().into())?;
                if data.len() != access.count.get() as usize {
                    return Err(whole.wrong());
                }
                let data = data.to_vec();
                Request::RegionWrite(access, data)
            }
            command::REGION_WRITE_MULTI => {
                let (count, rest) = whole.start::<U64>()?;
                let writes = <[RegionWriteOne]>::ref_from_bytes(rest).map_err(|_| whole.wrong())?;
                let fit = |one: &RegionWriteOne| one.access.count.get() as usize <= one.data.len();
                if count.get() != writes.len() as u64 || !writes.iter().all(fit) {
                    return Err(whole.wrong());
                }
                Request::RegionWriteMulti(writes.to_vec())
            }
            command::DEVICE_RESET if payload.is_empty() => Request::Reset,
            command::DEVICE_RESET => return Err(whole.wrong()),
            other => return Err(Malformed::Command(other)),
        })
    }
}

/// The bytes behind a header.
struct Payload<'a> {
    command: u16,
    bytes: &'a [u8],
}

impl<'a> Payload<'a> {
    fn wrong(&self) -> Malformed {
        Malformed::Payload {
            command: self.command,
            len: self.bytes.len(),
        }
    }

    fn start<T: FromBytes + KnownLayout + Immutable + Unaligned + Copy>(
        &self,
    ) -> Result<(T, &'a [u8]), Malformed> {
        T::read_from_prefix(self.bytes).map_err(|_| self.wrong())
    }

    fn exactly<T: FromBytes + KnownLayout + Immutable + Unaligned + Copy>(&self) -> Result<T, Malformed> {
        T::read_from_bytes(self.bytes).map_err(|_| self.wrong())
    }
}

fn check_argsz<T>(argsz: u32) -> Result<(), Malformed> {
    if (argsz as usize) < size_of::<T>() {
        return Err(Malformed::Argsz(argsz));
    }
    Ok(())
}

fn check_count(count: u64) -> Result<(), Malformed> {
    if count > MAX_DATA as u64 {
        return Err(Malformed::Data(count));
    }
    Ok(())
}

fn check_range(address: u64, size: u64) -> Result<(), Malformed> {
    let pages = address.is_multiple_of(PAGE) && size.is_multiple_of(PAGE) && size > 0;
    if !pages || address.checked_add(size).is_none() {
        return Err(Malformed::Range { address, size });
    }
    Ok(())
}

fn check_map(map: &DmaMap) -> Result<(), Malformed> {
    check_argsz::<DmaMap>(map.argsz.get())?;
    let flags = map.flags.get();
    if flags == 0 || flags & !(dma_map::READABLE | dma_map::WRITEABLE) != 0 {
        return Err(Malformed::Flags(flags));
    }
    check_range(map.address.get(), map.size.get())
}

fn parse_unmap(unmap: &DmaUnmap) -> Result<Request, Malformed> {
    check_argsz::<DmaUnmap>(unmap.argsz.get())?;
    let (address, size) = (unmap.address.get(), unmap.size.get());
    match unmap.flags.get() {
        0 => {
            check_range(address, size)?;
            Ok(Request::DmaUnmap { address, size })
        }
        dma_unmap::ALL if address == 0 && size == 0 => Ok(Request::DmaUnmapAll),
        dma_unmap::ALL => Err(Malformed::Range { address, size }),
        flags if flags & dma_unmap::GET_DIRTY_BITMAP != 0 => Err(Malformed::Dirty),
        flags => Err(Malformed::Flags(flags)),
    }
}

fn parse_set_irqs(set: &IrqSet, rest: &[u8], fds: Vec<OwnedFd>) -> Result<SetIrqs, Malformed> {
    let flags = set.flags.get();
    let count = set.count.get();
    let wrong = Malformed::Payload {
        command: command::DEVICE_SET_IRQS,
        len: size_of::<IrqSet>() + rest.len(),
    };
    if flags & !(irq_set::DATA_MASK | irq_set::ACTION_TYPE_MASK) != 0 {
        return Err(Malformed::Flags(flags));
    }
    check_argsz::<IrqSet>(set.argsz.get())?;
    let action = match flags & irq_set::ACTION_TYPE_MASK {
        irq_set::ACTION_MASK => IrqAction::Mask,
        irq_set::ACTION_UNMASK => IrqAction::Unmask,
        irq_set::ACTION_TRIGGER => IrqAction::Trigger,
        _ => return Err(Malformed::Flags(flags)),
    };
    let data = match flags & irq_set::DATA_MASK {
        irq_set::DATA_NONE if rest.is_empty() && fds.is_empty() => IrqData::None,
        irq_set::DATA_BOOL if rest.len() == count as usize && fds.is_empty() => IrqData::Bool(rest.to_vec()),
        irq_set::DATA_EVENTFD if rest.is_empty() && (fds.is_empty() || fds.len() == count as usize) => {
            IrqData::Eventfd(fds)
        }
        irq_set::DATA_NONE | irq_set::DATA_BOOL | irq_set::DATA_EVENTFD => return Err(wrong),
        _ => return Err(Malformed::Flags(flags)),
    };
    Ok(SetIrqs {
        index: set.index.get(),
        start: set.start.get(),
        count,
        action,
        data,
    })
}

/// What both sides of a connection keep to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Most file descriptors with a message to the client.
    pub max_msg_fds: u32,
    /// Longest data of a message to the client, in bytes.
    pub max_data: u32,
    /// Whether the client named its limits of DMA maps, so that ours may be told.
    named_maps: bool,
    named_pgsizes: bool,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            max_msg_fds: spec::DEFAULT_MAX_MSG_FDS,
            max_data: spec::DEFAULT_MAX_DATA_XFER_SIZE,
            named_maps: false,
            named_pgsizes: false,
        }
    }
}

impl Limits {
    /// Takes the client's capabilities. What is not known is ignored, as the protocol says.
    fn parse(text: &[u8]) -> Result<Limits, Malformed> {
        let mut limits = Limits::default();
        if text.is_empty() {
            return Ok(limits);
        }
        let Some((0, text)) = text.split_last() else {
            return Err(Malformed::Capabilities);
        };
        let value: Value = serde_json::from_slice(text).map_err(|_| Malformed::Capabilities)?;
        let named = match value.get(capability::CAPABILITIES) {
            None if value.is_object() => return Ok(limits),
            Some(Value::Object(named)) => named,
            _ => return Err(Malformed::Capabilities),
        };
        limits.max_msg_fds = number(named, capability::MAX_MSG_FDS, limits.max_msg_fds)?;
        limits.max_data =
            number(named, capability::MAX_DATA_XFER_SIZE, limits.max_data)?.min(MAX_DATA as u32);
        limits.named_maps = named.contains_key(capability::MAX_DMA_MAPS);
        limits.named_pgsizes = named.contains_key(capability::PGSIZES);
        Ok(limits)
    }

    /// The answer to VERSION: our limits, of those that the client knows.
    pub fn reply(&self) -> Vec<u8> {
        let mut named = Map::new();
        named.insert(capability::MAX_MSG_FDS.into(), json!(MAX_FDS));
        named.insert(capability::MAX_DATA_XFER_SIZE.into(), json!(self.max_data));
        if self.named_maps {
            named.insert(capability::MAX_DMA_MAPS.into(), json!(MAX_REGIONS));
        }
        if self.named_pgsizes {
            named.insert(capability::PGSIZES.into(), json!(PAGE));
        }
        let version = Version {
            major: spec::MAJOR.into(),
            minor: spec::MINOR.into(),
        };
        let mut bytes = version.as_bytes().to_vec();
        bytes.extend(json!({ capability::CAPABILITIES: named }).to_string().bytes());
        bytes.push(0);
        bytes
    }
}

/// A positive number, `default` where it is not named, and what fits where it is larger.
fn number(named: &Map<String, Value>, key: &str, default: u32) -> Result<u32, Malformed> {
    match named.get(key) {
        None => Ok(default),
        Some(value) => match value.as_u64() {
            None | Some(0) => Err(Malformed::Capabilities),
            Some(value) => Ok(u32::try_from(value).unwrap_or(u32::MAX)),
        },
    }
}

/// The bytes of a reply: to the command with this header, with this payload.
pub fn reply(to: &Header, payload: &[u8]) -> Vec<u8> {
    message(to.message_id.get(), to.command.get(), flag::REPLY, 0, payload)
}

/// The bytes of a reply that says that the command failed.
pub fn error_reply(to: &Header, errno: Errno) -> Vec<u8> {
    // An `Errno` is never 0, which clients would take for success.
    let error = errno.raw_os_error().unsigned_abs();
    message(
        to.message_id.get(),
        to.command.get(),
        flag::REPLY | flag::ERROR,
        error,
        &[],
    )
}

pub(crate) fn message(id: u16, command: u16, flags: u32, error: u32, payload: &[u8]) -> Vec<u8> {
    let header = Header {
        message_id: id.into(),
        command: command.into(),
        message_size: ((HEADER_SIZE + payload.len()) as u32).into(),
        flags: flags.into(),
        error: error.into(),
    };
    let mut bytes = Vec::with_capacity(HEADER_SIZE + payload.len());
    bytes.extend(header.as_bytes());
    bytes.extend(payload);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn command(code: u16, payload: &[u8]) -> RawMessage {
        let bytes = message(1, code, flag::COMMAND, 0, payload);
        RawMessage {
            header: Header::read_from_prefix(&bytes).unwrap().0,
            payload: payload.to_vec(),
            fds: Vec::new(),
        }
    }

    #[test]
    fn sizes_and_types_that_no_message_has_are_refused() {
        let header = |size: u32, kind: u32| {
            let mut header = Header::read_from_prefix(&message(7, 9, kind, 0, &[])).unwrap().0;
            header.message_size = size.into();
            header
        };
        let longest = (HEADER_SIZE + MAX_PAYLOAD) as u32;
        for size in [HEADER_SIZE as u32, longest] {
            let payload = VfioUser::payload_len(&header(size, flag::COMMAND));
            assert_eq!(payload, Ok(size as usize - HEADER_SIZE));
        }
        for size in [0, HEADER_SIZE as u32 - 1] {
            assert_eq!(
                VfioUser::payload_len(&header(size, flag::COMMAND)),
                Err(Malformed::Short(size))
            );
        }
        for size in [longest + 1, u32::MAX] {
            assert_eq!(
                VfioUser::payload_len(&header(size, flag::REPLY)),
                Err(Malformed::Long(size))
            );
        }
        let typed = VfioUser::payload_len(&header(longest, 7));
        assert_eq!(typed, Err(Malformed::Type(7)));
    }

    fn version(text: &[u8]) -> Result<Request, Malformed> {
        let mut payload = vec![0; 4];
        payload.extend(text);
        Request::parse(command(command::VERSION, &payload))
    }

    #[test]
    fn limits_are_the_lower_of_both_and_only_known_ones_are_answered() {
        let text = b"{\"capabilities\":{\"max_msg_fds\":3,\"max_data_xfer_size\":65536,\"pgsizes\":4096,\"new\":{}}}\0";
        let Ok(Request::Version(limits)) = version(text) else {
            panic!("not parsed")
        };
        assert_eq!((limits.max_msg_fds, limits.max_data), (3, 65536));
        let reply = limits.reply();
        let (text, nul) = reply[4..].split_at(reply.len() - 5);
        assert_eq!(nul, [0]);
        let value: Value = serde_json::from_slice(text).unwrap();
        let expected =
            json!({"capabilities": {"max_msg_fds": 8, "max_data_xfer_size": 65536, "pgsizes": 4096}});
        assert_eq!(value, expected);
    }

    #[test]
    fn a_version_without_text_has_the_protocols_defaults() {
        let Ok(Request::Version(limits)) = version(b"") else {
            panic!("not parsed")
        };
        assert_eq!(limits, Limits::default());
    }

    #[test]
    fn capabilities_must_be_an_object_that_ends_in_nul() {
        for text in [
            "abc",
            "{}",
            "[]\0",
            "{\"capabilities\":7}\0",
            "{\"capabilities\":{\"max_msg_fds\":-1}}\0",
        ] {
            assert_eq!(
                version(text.as_bytes()).unwrap_err(),
                Malformed::Capabilities,
                "{text}"
            );
        }
    }

    #[test]
    fn counts_that_do_not_match_the_payload_are_refused() {
        let access = RegionAccess {
            count: 5.into(),
            ..RegionAccess::default()
        };
        let mut payload = access.as_bytes().to_vec();
        payload.extend([1, 2, 3, 4]);
        let error = Request::parse(command(command::REGION_WRITE, &payload)).unwrap_err();
        assert!(matches!(error, Malformed::Payload { len: 20, .. }));
        let mut payload = 2u64.to_le_bytes().to_vec();
        payload.extend(RegionWriteOne::default().as_bytes());
        assert!(Request::parse(command(command::REGION_WRITE_MULTI, &payload)).is_err());
    }

    #[test]
    fn an_error_reply_has_the_errno_and_no_payload() {
        let header = Header::default();
        assert_eq!(
            error_reply(&header, Errno::PERM)[8..],
            [0x21, 0, 0, 0, 1, 0, 0, 0]
        );
    }

    proptest! {
        #[test]
        fn any_payload_of_any_command_is_parsed_or_refused(
            code in 0u16..20,
            payload in proptest::collection::vec(prop_oneof![Just(0u8), Just(1), any::<u8>()], 0..96),
        ) {
            let _ = Request::parse(command(code, &payload));
        }
    }
}
