//! A sparse file in memory that panics where an image makes its user write out of bounds or work without end.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use zbdkit_io::{File, IoBuf, LocalBoxFuture, Storage, StorageOp, yield_now};

const BLOCK: u64 = 4096;
/// A file grows by at most this much at once: the space that is taken ahead, and a table or two.
const GROWTH: u64 = 128 << 20;
/// More operations than any request on a small image can need.
const MOST_OPERATIONS: u64 = 400_000;
/// More bytes than that, too.
const MOST_BYTES: u64 = 8 << 30;

/// A file.
#[derive(Clone)]
pub struct Memory(Arc<Mutex<State>>);

struct State {
    blocks: BTreeMap<u64, Box<[u8; BLOCK as usize]>>,
    len: u64,
    /// Any change is wrong.
    frozen: bool,
    /// Offsets are those of a device, which may be anywhere.
    anywhere: bool,
    operations: u64,
    bytes: u64,
}

impl Memory {
    /// A file with these bytes.
    pub fn new(bytes: &[u8]) -> Memory {
        let mut state = State {
            blocks: BTreeMap::new(),
            len: 0,
            frozen: false,
            anywhere: false,
            operations: 0,
            bytes: 0,
        };
        state.write(0, bytes);
        Memory(Arc::new(Mutex::new(state)))
    }

    /// An external data file, to which a device's offsets go.
    pub fn device(bytes: &[u8]) -> Memory {
        let memory = Memory::new(bytes);
        memory.with(|state| state.anywhere = true);
        memory
    }

    /// The same bytes in a file of its own.
    pub fn copy(&self) -> Memory {
        self.with(|state| {
            Memory(Arc::new(Mutex::new(State {
                blocks: state.blocks.clone(),
                len: state.len,
                frozen: false,
                anywhere: state.anywhere,
                operations: 0,
                bytes: 0,
            })))
        })
    }

    /// Nothing may be changed any more.
    pub fn freeze(self) -> Memory {
        self.with(|state| state.frozen = true);
        self
    }

    /// The file for the code under test.
    pub fn file(&self) -> File {
        File::custom(Arc::new(self.clone()))
    }

    /// Bytes; zeros past the end.
    pub fn read(&self, offset: u64, len: usize) -> Vec<u8> {
        self.with(|state| state.read(offset, len))
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.with(|state| state.len)
    }

    /// Changes bytes.
    pub fn write(&self, offset: u64, bytes: &[u8]) {
        self.with(|state| state.write(offset, bytes));
    }

    /// Cuts or lengthens the file.
    pub fn resize(&self, len: u64) {
        self.with(|state| state.set_len(len));
    }

    fn with<T>(&self, work: impl FnOnce(&mut State) -> T) -> T {
        work(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl State {
    fn read(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let mut at = 0;
        while at < len {
            let place = offset.saturating_add(at as u64);
            let within = (place % BLOCK) as usize;
            let n = (BLOCK as usize - within).min(len - at);
            if let Some(block) = self.blocks.get(&(place / BLOCK)) {
                bytes[at..at + n].copy_from_slice(&block[within..within + n]);
            }
            at += n;
        }
        bytes
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) {
        let mut at = 0;
        while at < bytes.len() {
            let place = offset + at as u64;
            let within = (place % BLOCK) as usize;
            let n = (BLOCK as usize - within).min(bytes.len() - at);
            let block = self
                .blocks
                .entry(place / BLOCK)
                .or_insert_with(|| Box::new([0; BLOCK as usize]));
            block[within..within + n].copy_from_slice(&bytes[at..at + n]);
            at += n;
        }
        self.len = self.len.max(offset + bytes.len() as u64);
    }

    fn zero(&mut self, offset: u64, len: u64) {
        let end = offset.saturating_add(len);
        let blocks: Vec<u64> = self
            .blocks
            .range(offset / BLOCK..end.div_ceil(BLOCK))
            .map(|(block, _)| *block)
            .collect();
        for number in blocks {
            let start = offset.max(number * BLOCK) - number * BLOCK;
            let stop = end.min((number + 1) * BLOCK) - number * BLOCK;
            if stop - start == BLOCK {
                self.blocks.remove(&number);
            } else if let Some(block) = self.blocks.get_mut(&number) {
                block[start as usize..stop as usize].fill(0);
            }
        }
    }

    fn set_len(&mut self, len: u64) {
        if len < self.len {
            self.zero(len, self.len - len);
        }
        self.len = len;
    }

    /// Judges an operation before it is done.
    fn judge(&mut self, change: Option<(u64, u64)>, bytes: u64) {
        self.operations += 1;
        self.bytes += bytes;
        assert!(self.operations < MOST_OPERATIONS, "work without end");
        assert!(self.bytes < MOST_BYTES, "reading or writing without end");
        let Some((offset, len)) = change else { return };
        assert!(!self.frozen, "an image that is open read-only is changed");
        let end = offset.saturating_add(len);
        assert!(
            self.anywhere || end <= self.len + GROWTH,
            "{len} bytes at {offset} are written far past the end at {}",
            self.len
        );
    }

    fn carry_out(&mut self, op: StorageOp) -> io::Result<()> {
        match op {
            StorageOp::Read { buf, offset } => {
                self.judge(None, buf.len() as u64);
                buf.copy_from(&self.read(offset, buf.len()));
            }
            StorageOp::Write { buf, offset } => {
                self.judge(Some((offset, buf.len() as u64)), buf.len() as u64);
                fits(offset, buf.len() as u64)?;
                let bytes = buf.to_vec();
                self.write(offset, &bytes);
            }
            StorageOp::DataSync | StorageOp::Sync => self.judge(None, 0),
            StorageOp::PunchHole { offset, len } | StorageOp::ZeroRange { offset, len } => {
                self.judge(Some((offset.min(self.len), 0)), 0);
                fits(offset, len)?;
                self.zero(offset, len);
            }
            StorageOp::Allocate { offset, len } => {
                self.judge(Some((offset, len)), 0);
                fits(offset, len)?;
                self.len = self.len.max(offset + len);
            }
        }
        Ok(())
    }
}

/// As a file system refuses what no file can hold.
fn fits(offset: u64, len: u64) -> io::Result<()> {
    match offset.checked_add(len) {
        Some(end) if end <= i64::MAX as u64 => Ok(()),
        _ => Err(io::Error::from_raw_os_error(libc::EFBIG)),
    }
}

impl Storage for Memory {
    fn submit(&self, op: StorageOp) -> LocalBoxFuture<'static, io::Result<()>> {
        let memory = self.clone();
        Box::pin(async move {
            // Others get their turn while it is in flight.
            yield_now().await;
            memory.with(|state| state.carry_out(op))
        })
    }

    fn len(&self) -> io::Result<u64> {
        Ok(Memory::len(self))
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.with(|state| {
            let grown = len.saturating_sub(state.len);
            state.judge(Some((len - grown, grown)), 0);
            state.set_len(len);
            Ok(())
        })
    }
}

/// A backing image: every sector says where it is.
pub struct Below(pub u64);

impl zbdkit_qcow2::Backing for Below {
    fn len(&self) -> u64 {
        self.0
    }

    fn read<'a>(&'a self, buf: IoBuf, offset: u64) -> LocalBoxFuture<'a, Result<(), i32>> {
        Box::pin(async move {
            yield_now().await;
            let end = offset.checked_add(buf.len() as u64);
            assert!(
                end.is_some_and(|end| end <= self.0),
                "the backing image is read past its end"
            );
            buf.fill(0..buf.len(), 0xb1);
            Ok(())
        })
    }
}
