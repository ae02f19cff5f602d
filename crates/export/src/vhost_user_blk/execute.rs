//! Requests carried out on the device.

use std::ops::ControlFlow;

use zbdkit_block::{CrossZone, Device, Error, Lane};
use zbdkit_io::{IoBuf, yield_now};
use zbdkit_spec::virtio_blk::{SECTOR_SIZE, Status, ZoneDescriptor, ZoneReport};
use zbdkit_zone::{Filter, ZoneInfo};
use zerocopy::IntoBytes;

use super::model::Model;
use super::request::{Op, Range};
use super::stats::QueueStats;
use super::status::{Kind, status_of};

/// Zones put into a report at a time, before other requests get their turn.
const REPORT_BATCH: usize = 64;

/// What requests of one queue are carried out with.
pub(super) struct Executor<'a> {
    pub(super) device: &'a Device,
    pub(super) lane: &'a Lane,
    pub(super) model: &'a Model,
    pub(super) stats: &'a QueueStats,
    /// The driver knows zones.
    pub(super) zoned: bool,
}

impl Executor<'_> {
    /// Carries out `op`. Returns its status, and the bytes written to the guest before the status byte.
    pub(super) async fn run(&self, op: Op) -> (Status, u32) {
        let (kind, result) = match op {
            Op::Read { buf, offset } => (Kind::Read, self.read(buf, offset).await),
            Op::Write { buf, offset } => (Kind::Write, self.write(buf, offset).await),
            Op::Append {
                buf,
                zone_start,
                sector_out,
            } => (Kind::Write, self.append(buf, zone_start, sector_out).await),
            Op::Fail(status) => {
                self.stats.others.add(1);
                self.stats.errors.add(1);
                return (status, 0);
            }
            // The rest is rare and large: its future lies on the heap, so that those above stay small.
            op => Box::pin(self.run_rare(op)).await,
        };
        match result {
            Ok(written) => (Status::Ok, written),
            Err(error) => {
                self.stats.errors.add(1);
                tracing::debug!("request failed: {error}");
                (status_of(&error, kind, self.zoned), 0)
            }
        }
    }

    async fn run_rare(&self, op: Op) -> (Kind, Result<u32, Error>) {
        match op {
            Op::Flush => {
                self.stats.flushes.add(1);
                (Kind::Plain, self.device.flush(self.lane).await.map(|()| 0))
            }
            Op::Discard(ranges) => (Kind::Plain, self.discard(&ranges).await),
            Op::WriteZeroes(ranges) => (Kind::Plain, self.write_zeroes(&ranges).await),
            Op::GetId(buf) => {
                self.stats.others.add(1);
                let len = buf.len().min(self.model.serial.len());
                (Kind::Plain, Ok(buf.copy_from(&self.model.serial[..len]) as u32))
            }
            Op::Report { buf, from } => {
                self.stats.zone_reports.add(1);
                (Kind::Manage, self.report(&buf, from).await)
            }
            Op::Zone(op, zone_start) => {
                self.stats.zone_management.add(1);
                (
                    Kind::Manage,
                    self.device.zone_op(self.lane, op, zone_start).await.map(|()| 0),
                )
            }
            Op::ResetAll => {
                self.stats.zone_management.add(1);
                (Kind::Manage, self.device.reset_all(self.lane).await.map(|()| 0))
            }
            Op::Read { .. } | Op::Write { .. } | Op::Append { .. } | Op::Fail(_) => {
                unreachable!("carried out by `run`")
            }
        }
    }

    async fn read(&self, buf: IoBuf, offset: u64) -> Result<u32, Error> {
        let len = buf.len() as u64;
        self.stats.reads.add(1);
        self.stats.bytes_read.add(len);
        let crosses = self
            .model
            .zones
            .as_ref()
            .is_some_and(|zones| zones.crosses(offset, len));
        let cross = if crosses {
            CrossZone::Refuse
        } else {
            CrossZone::Allow
        };
        self.device.read(self.lane, buf, offset, cross).await?;
        Ok(u32::try_from(len).unwrap_or(u32::MAX))
    }

    async fn write(&self, buf: IoBuf, offset: u64) -> Result<u32, Error> {
        self.stats.writes.add(1);
        self.stats.bytes_written.add(buf.len() as u64);
        self.device.write(self.lane, buf, offset).await?;
        self.written().await
    }

    async fn append(&self, buf: IoBuf, zone_start: u64, sector_out: IoBuf) -> Result<u32, Error> {
        self.stats.appends.add(1);
        self.stats.bytes_written.add(buf.len() as u64);
        let offset = self.device.append(self.lane, buf, zone_start).await?;
        self.written().await?;
        Ok(sector_out.copy_from(&(offset / SECTOR_SIZE).to_le_bytes()) as u32)
    }

    /// After each change of data: in write-through mode it is durable before it is answered.
    async fn written(&self) -> Result<u32, Error> {
        if self.model.write_through() {
            self.device.flush(self.lane).await?;
        }
        Ok(0)
    }

    async fn discard(&self, ranges: &[Range]) -> Result<u32, Error> {
        self.stats.discards.add(1);
        for range in ranges {
            self.device.discard(self.lane, range.offset, range.len).await?;
        }
        Ok(0)
    }

    async fn write_zeroes(&self, ranges: &[Range]) -> Result<u32, Error> {
        self.stats.write_zeroes.add(1);
        for range in ranges {
            self.device
                .write_zeroes(self.lane, range.offset, range.len, range.unmap)
                .await?;
        }
        self.written().await
    }

    /// Fills the driver's buffer with as many zones as fit it, a few at a time.
    async fn report(&self, buf: &IoBuf, from: u64) -> Result<u32, Error> {
        let header = size_of::<ZoneReport>();
        let room = (buf.len() - header) / size_of::<ZoneDescriptor>();
        let mut count = 0;
        let mut next = Some(from);
        while let Some(from) = next.filter(|_| count < room) {
            let mut batch = [ZoneDescriptor::ZERO; REPORT_BATCH];
            let want = (room - count).min(REPORT_BATCH);
            let mut got = 0;
            next = None;
            let mut sink = |zone: ZoneInfo| {
                if got == want {
                    return ControlFlow::Break(());
                }
                batch[got] = descriptor(&zone);
                got += 1;
                next = zone
                    .start
                    .checked_add(zone.len)
                    .filter(|end| *end < self.model.size);
                ControlFlow::Continue(())
            };
            self.device.report_to(from, Filter::All, &mut sink).await?;
            let at = header + count * size_of::<ZoneDescriptor>();
            let len = got * size_of::<ZoneDescriptor>();
            buf.slice(at..at + len).copy_from(batch[..got].as_bytes());
            count += got;
            yield_now().await;
        }
        buf.slice(0..header)
            .copy_from(ZoneReport::new(count as u64).as_bytes());
        Ok((header + count * size_of::<ZoneDescriptor>()) as u32)
    }
}

fn descriptor(zone: &ZoneInfo) -> ZoneDescriptor {
    ZoneDescriptor {
        z_cap: (zone.capacity / SECTOR_SIZE).into(),
        z_start: (zone.start / SECTOR_SIZE).into(),
        z_wp: (zone.wp / SECTOR_SIZE).into(),
        z_type: zone.kind as u8,
        z_state: zone.condition as u8,
        ..ZoneDescriptor::ZERO
    }
}
