//! read, write, discard and their relatives: from the words of a command to the lines of its result.

use std::time::Instant;

use zbdkit_block::{CrossZone, Device, Error, Lane};
use zbdkit_io::IoBuf;

use super::command::Command;
use super::number::{number, pattern};
use super::options::Options;
use super::stats::{Transfer, dump};
use super::{Shell, Step};

/// What qemu-io transfers at most in one request.
pub const MAX_LEN: u64 = 2_147_483_136;
/// What is written unless a pattern is given.
pub const DEFAULT_PATTERN: u8 = 0xcd;

/// A transfer that was asked for, with its buffer.
pub struct Request {
    /// The command's name in messages.
    command: &'static str,
    what: What,
    offset: u64,
    len: u64,
    /// Data of a write, target of a read.
    buf: IoBuf,
    /// Bytes that a read must find: value, first and one past the last in the buffer.
    verify: Option<(u8, usize, usize)>,
    quiet: bool,
    machine: bool,
    show: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum What {
    Read,
    /// And flush.
    Write(bool),
    /// `unmap`, and flush.
    Zeroes(bool, bool),
    Discard,
}

impl Shell {
    /// read, readv, aio_read.
    pub async fn read(&mut self, command: &'static Command, words: &[&str]) -> anyhow::Result<Step> {
        let many = command.name != "read";
        let spec = if many { "CiP:qrv" } else { "abCl:pP:qrs:v" };
        let Some(options) = Options::parse(command.name, spec, words) else {
            return self.usage(command);
        };
        if options.has('b') {
            return self.wrong("-b: an image of zbdkit has no VM state");
        }
        if (options.rest.len() != 2 && !many) || options.rest.len() < 2 {
            return self.usage(command);
        }
        let request = || -> Result<Request, String> {
            let (offset, len) = range(&options.rest, &format!("cannot exceed {MAX_LEN}"))?;
            let mut request = Request::new(command, What::Read, offset, len, &options)?;
            let given = |letter| options.value(letter).map(number).transpose();
            let first = given('s')?.unwrap_or(0);
            let count = given('l')?.unwrap_or(len.saturating_sub(first));
            if let Some(byte) = options.value('P').map(pattern).transpose()? {
                let end = first.checked_add(count).filter(|end| first <= len && *end <= len);
                let end = end.ok_or("pattern verification range exceeds end of read data")?;
                request.verify = Some((byte, first as usize, end as usize));
            }
            Ok(request)
        };
        match request() {
            Ok(request) => self.submit(command, request).await,
            Err(message) => self.wrong(message),
        }
    }

    /// write, writev, aio_write.
    pub async fn write(&mut self, command: &'static Command, words: &[&str]) -> anyhow::Result<Step> {
        let many = command.name != "write";
        let spec = if many { "CfiP:qruz" } else { "bcCfnpP:qrs:uz" };
        let Some(options) = Options::parse(command.name, spec, words) else {
            return self.usage(command);
        };
        if options.has('b') || options.has('c') {
            return self.wrong("-b and -c: an image of zbdkit has neither VM state nor compression");
        }
        let sources = [
            options.has('z'),
            options.value('P').is_some(),
            options.value('s').is_some(),
        ];
        if sources.iter().filter(|given| **given).count() > 1 {
            return self.wrong(if many {
                "-z and -P cannot be specified at the same time"
            } else {
                "Only one of -z, -P, and -s can be specified at the same time"
            });
        }
        for letter in ['n', 'u'] {
            if options.has(letter) && !options.has('z') {
                return self.wrong(format_args!("-{letter} requires -z to be specified"));
            }
        }
        if (options.rest.len() != 2 && (!many || options.has('z'))) || options.rest.len() < 2 {
            return self.usage(command);
        }
        let flush = options.has('f') || self.write_through;
        match write_request(command, &options, flush) {
            Ok(request) => self.submit(command, request).await,
            Err(message) => self.wrong(message),
        }
    }

    pub async fn discard(&mut self, command: &'static Command, words: &[&str]) -> anyhow::Result<Step> {
        let Some(options) = Options::parse(command.name, "Cq", words) else {
            return self.usage(command);
        };
        if options.rest.len() != 2 {
            return self.usage(command);
        }
        let request = range(&options.rest, &format!("cannot exceed {MAX_LEN}"))
            .and_then(|(offset, len)| Request::new(command, What::Discard, offset, len, &options));
        match request {
            Ok(request) => self.submit(command, request).await,
            Err(message) => self.wrong(message),
        }
    }

    async fn submit(&mut self, command: &'static Command, request: Request) -> anyhow::Result<Step> {
        if command.name.starts_with("aio_") {
            return Ok(self.start(request).await);
        }
        let result = carry_out(&self.device, &self.lane, &request).await;
        self.tell(&request, result)
    }

    /// Tells the result of a transfer.
    pub fn tell(&mut self, request: &Request, result: Result<Transfer, Error>) -> anyhow::Result<Step> {
        let transfer = match result {
            Ok(transfer) => transfer,
            Err(error) => return self.failed(request.command, &error),
        };
        let mut step = Step::Done;
        if let Some((byte, first, end)) = request.verify
            && request
                .buf
                .slice(first..end)
                .to_vec()
                .iter()
                .any(|found| *found != byte)
        {
            self.out.line(format_args!(
                "Pattern verification failed at offset {}, {} bytes",
                request.offset + first as u64,
                end - first
            ))?;
            step = Step::Failed;
        }
        if request.quiet {
            return Ok(step);
        }
        if request.show {
            self.out.text(dump(&request.buf.to_vec(), request.offset))?;
        }
        if request.machine {
            self.out.line(transfer.machine_line())?;
        } else {
            self.out.line(transfer.lines())?;
        }
        Ok(step)
    }
}

impl Request {
    fn new(
        command: &Command,
        what: What,
        offset: u64,
        len: u64,
        options: &Options,
    ) -> Result<Request, String> {
        let buf = match what {
            What::Read | What::Write(_) => {
                IoBuf::try_alloc(len as usize).map_err(|error| format!("{}: {error}", command.name))?
            }
            What::Zeroes(..) | What::Discard => IoBuf::empty(),
        };
        Ok(Request {
            command: command.name,
            what,
            offset,
            len,
            buf,
            verify: None,
            quiet: options.has('q'),
            machine: options.has('C'),
            show: options.has('v'),
        })
    }
}

fn write_request(command: &Command, options: &Options, flush: bool) -> Result<Request, String> {
    let zeroes = options.has('z');
    let limit = format!("cannot exceed {MAX_LEN} without -n");
    let (offset, len) = if options.has('n') {
        (number(&options.rest[0])?, number(&options.rest[1])?)
    } else {
        range(&options.rest, &limit)?
    };
    let what = if zeroes {
        What::Zeroes(options.has('u'), flush)
    } else {
        What::Write(flush)
    };
    let request = Request::new(command, what, offset, len, options)?;
    if let Some(path) = options.value('s') {
        let data = std::fs::read(path).map_err(|error| format!("{path}: {error}"))?;
        if data.is_empty() {
            return Err(format!("{path}: file is empty"));
        }
        let repeated: Vec<u8> = data.iter().copied().cycle().take(len as usize).collect();
        request.buf.copy_from(&repeated);
    } else {
        let byte = options.value('P').map(pattern).transpose()?;
        let all = 0..request.buf.len();
        request.buf.fill(all, byte.unwrap_or(DEFAULT_PATTERN));
    }
    Ok(request)
}

/// An offset and the sum of the lengths behind it.
fn range(words: &[String], limit: &str) -> Result<(u64, u64), String> {
    let offset = number(&words[0])?;
    let mut sum = 0u64;
    for word in &words[1..] {
        sum = sum.saturating_add(number(word)?);
        if sum > MAX_LEN {
            return Err(format!("length {limit}, given {word}"));
        }
    }
    Ok((offset, sum))
}

/// Does the transfer.
pub async fn carry_out(device: &Device, lane: &Lane, request: &Request) -> Result<Transfer, Error> {
    let Request { offset, len, .. } = *request;
    let started = Instant::now();
    let (word, flush) = match request.what {
        What::Read => {
            read(device, lane, request).await?;
            ("read", false)
        }
        What::Write(flush) => {
            write(device, lane, request).await?;
            ("wrote", flush)
        }
        What::Zeroes(unmap, flush) => {
            device.write_zeroes(lane, offset, len, unmap).await?;
            ("wrote", flush)
        }
        What::Discard => {
            device.discard(lane, offset, len).await?;
            ("discard", false)
        }
    };
    if flush {
        device.flush(lane).await?;
    }
    Ok(Transfer {
        word,
        offset,
        len,
        time: started.elapsed(),
    })
}

/// Whole blocks around a range that is not whole blocks, within the device; `None` where the range is aligned, or wrong
/// anyway.
fn padded(device: &Device, offset: u64, len: u64) -> Option<(u64, u64)> {
    let limits = device.limits();
    let block = u64::from(limits.block_size);
    let end = offset.checked_add(len).filter(|end| *end <= limits.size)?;
    if (offset | len).is_multiple_of(block) || len == 0 {
        return None;
    }
    let (start, end) = (offset / block * block, end.next_multiple_of(block));
    (end <= limits.size).then_some((start, end - start))
}

async fn read(device: &Device, lane: &Lane, request: &Request) -> Result<(), Error> {
    let Request {
        offset, len, ref buf, ..
    } = *request;
    let Some((start, whole)) = padded(device, offset, len) else {
        return device.read(lane, buf.clone(), offset, CrossZone::Allow).await;
    };
    let blocks = IoBuf::alloc(whole as usize);
    device.read(lane, blocks.clone(), start, CrossZone::Allow).await?;
    let skip = (offset - start) as usize;
    buf.copy_from_buf(&blocks.slice(skip..skip + len as usize));
    Ok(())
}

/// Writes; parts of blocks only where there are no zones to forbid a read, modify, write.
async fn write(device: &Device, lane: &Lane, request: &Request) -> Result<(), Error> {
    let Request {
        offset, len, ref buf, ..
    } = *request;
    let zoned = device.limits().zoned.is_some();
    let Some((start, whole)) = padded(device, offset, len).filter(|_| !zoned) else {
        return device.write(lane, buf.clone(), offset).await;
    };
    let blocks = IoBuf::alloc(whole as usize);
    device.read(lane, blocks.clone(), start, CrossZone::Allow).await?;
    let skip = (offset - start) as usize;
    blocks.slice(skip..skip + len as usize).copy_from_buf(buf);
    device.write(lane, blocks, start).await
}
