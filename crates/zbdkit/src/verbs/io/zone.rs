//! The zone commands: zrp, zo, zc, zf, zrs, zap.

use std::ops::ControlFlow;

use zbdkit_block::{Error, ZoneOp};
use zbdkit_io::IoBuf;
use zbdkit_zone::{CloseEmpty, Condition, Filter, ZoneError, ZoneInfo, ZoneNo, ZoneType};

use super::command::Command;
use super::number::number;
use super::options::Options;
use super::transfer::{DEFAULT_PATTERN, MAX_LEN};
use super::{Shell, Step};

/// EINVAL: what a report says that begins past the end.
const INVALID: i32 = 22;

impl Shell {
    pub async fn zone_report(&mut self, words: &[&str]) -> anyhow::Result<Step> {
        let numbers = number(words[0]).and_then(|offset| number(words[1]).map(|count| (offset, count)));
        let (offset, count) = match numbers {
            Ok((_, count)) if count > u64::from(u32::MAX) => {
                return self.wrong("Number of zones must be less than 2^32");
            }
            Ok(numbers) => numbers,
            Err(message) => return self.wrong(message),
        };
        // Printed zone by zone: whatever number was asked for, nothing is allocated for it.
        let mut left = count;
        let mut printed = Ok(());
        let Shell { device, out, .. } = self;
        let result = device
            .report_to(offset, Filter::All, &mut |zone| {
                if left > 0 {
                    left -= 1;
                    printed = out.line(report_line(&zone));
                }
                if left == 0 || printed.is_err() {
                    return ControlFlow::Break(());
                }
                ControlFlow::Continue(())
            })
            .await;
        printed?;
        match result {
            Ok(()) => Ok(Step::Done),
            Err(Error::OutOfRange { offset, size, .. }) => {
                let reason = format!("offset {offset} is past the end of the device ({size} bytes)");
                self.failed_as("zone report", &reason, INVALID)
            }
            Err(error) => self.failed("zone report", &error),
        }
    }

    /// zo, zc, zf and zrs: the zones of a range.
    pub async fn zone_manage(&mut self, op: ZoneOp, what: &str, words: &[&str]) -> anyhow::Result<Step> {
        let numbers = number(words[0]).and_then(|offset| number(words[1]).map(|len| (offset, len)));
        match numbers {
            Err(message) => self.wrong(message),
            Ok((offset, len)) => match self.manage(op, offset, len).await {
                Ok(()) => Ok(Step::Done),
                Err(error) => self.failed(what, &error),
            },
        }
    }

    async fn manage(&self, op: ZoneOp, offset: u64, len: u64) -> Result<(), Error> {
        let device = &self.device;
        let Some(geometry) = &device.limits().zoned else {
            return Err(Error::NotSupported("zone management"));
        };
        let size = geometry.size();
        let end = offset
            .checked_add(len)
            .filter(|end| *end <= size && offset < size);
        let end = end.ok_or(Error::OutOfRange { offset, len, size })?;
        let first = geometry.zone_at(offset)?;
        let past = if end == size {
            ZoneNo(geometry.nr_zones())
        } else {
            geometry.zone_at(end)?
        };
        if op == ZoneOp::Reset && offset == 0 && end == size {
            return device.reset_all(&self.lane).await;
        }
        for zone in first.0..past.0 {
            let start = geometry.start(ZoneNo(zone));
            device.zone_op(&self.lane, op, start).await?;
        }
        Ok(())
    }

    pub async fn zone_append(&mut self, command: &'static Command, words: &[&str]) -> anyhow::Result<Step> {
        let Some(options) = Options::parse(command.name, "p", words) else {
            return self.usage(command);
        };
        if options.rest.len() < 2 {
            return self.usage(command);
        }
        let numbers: Result<Vec<u64>, String> = options.rest.iter().map(|word| number(word)).collect();
        let numbers = match numbers {
            Ok(numbers) => numbers,
            Err(message) => return self.wrong(message),
        };
        let (start, len) = (
            numbers[0],
            numbers[1..]
                .iter()
                .fold(0, |sum: u64, len| sum.saturating_add(*len)),
        );
        if len > MAX_LEN {
            return self.wrong(format_args!("length cannot exceed {MAX_LEN}, given {len}"));
        }
        match self.append(start, len).await {
            Ok(offset) if options.has('p') => {
                let sector = offset / 512;
                self.out
                    .line(format_args!("After zap done, the append sector is {sector:#x}"))?;
                Ok(Step::Done)
            }
            Ok(_) => Ok(Step::Done),
            Err(error) => self.failed("zone append", &error),
        }
    }

    async fn append(&self, start: u64, len: u64) -> Result<u64, Error> {
        let Some(geometry) = &self.device.limits().zoned else {
            return Err(Error::NotSupported("zone append"));
        };
        // Before a buffer of that length is made.
        let max = geometry.max_append();
        if max > 0 && len > geometry.zone_size() {
            return Err(ZoneError::AppendTooLarge { len, max }.into());
        }
        let wanted = if max > 0 { len as usize } else { 0 };
        let buf = IoBuf::try_alloc(wanted).map_err(|error| Error::io("allocating a buffer", &error))?;
        buf.fill(0..buf.len(), DEFAULT_PATTERN);
        if max == 0 || len <= max {
            return self.device.append(&self.lane, buf, start).await;
        }
        // qemu-io's append knows no limit but the zone's capacity: a longer one is a write at the write pointer.
        let zone = geometry.zone_at(start)?;
        let info = self.device.report(geometry.start(zone), Filter::All, 1).await?;
        match info.first() {
            // A write would be at home there.
            Some(info) if info.kind == ZoneType::Conventional => Err(ZoneError::Conventional { zone }.into()),
            Some(info) if info.condition == Condition::Full => Err(ZoneError::Full { zone }.into()),
            Some(info) => {
                self.device.write(&self.lane, buf, info.wp).await?;
                Ok(info.wp)
            }
            None => Err(Error::NotSupported("zone append")),
        }
    }
}

/// How each management command is carried out, and its name in messages; `flagged` if it was given the option that it has.
pub fn operation(command: &str, flagged: bool) -> Option<(ZoneOp, &'static str)> {
    match command {
        "zone_open" if flagged => Some((ZoneOp::OpenZrwa, "zone open")),
        "zone_open" => Some((ZoneOp::Open, "zone open")),
        "zone_close" => Some((ZoneOp::Close(CloseEmpty::ToEmpty), "zone close")),
        "zone_finish" => Some((ZoneOp::Finish, "zone finish")),
        "zone_reset" => Some((ZoneOp::Reset, "zone reset")),
        _ => None,
    }
}

fn report_line(zone: &ZoneInfo) -> String {
    format!(
        "start: {:#x}, len {:#x}, cap {:#x}, wptr {:#x}, zcond:{}, [type: {}]",
        zone.start / 512,
        zone.len / 512,
        zone.capacity / 512,
        zone.wp / 512,
        zone.condition as u8,
        zone.kind as u8
    )
}
