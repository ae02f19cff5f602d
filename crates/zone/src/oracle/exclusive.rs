//! Operations that have a zone for themselves.

use super::*;

impl Oracle {
    /// Begins an exclusive operation; whether there is something to do.
    pub fn begin(&mut self, zone: ZoneNo, op: ExclusiveOp) -> Result<bool, Refused> {
        use ExclusiveOp as X;
        match op {
            X::Format if self.geometry.is_conventional(zone) => {
                return Err(E::Conventional { zone }.into());
            }
            X::Format | X::SetReadOnly | X::SetOffline | X::SetNormal => {}
            _ => drop(self.managed(zone)?),
        }
        let condition = self.zone(zone).condition;
        if self.zone(zone).busy {
            return Err(Refused::Busy(zone));
        }
        match (op, condition) {
            (X::Reset, C::Empty) => return Ok(false),
            (op, C::Full) if op.is_finish() => return Ok(false),
            (X::Recommend(what), _) if self.zone(zone).record.recommended == what => return Ok(false),
            (X::Recommend(Some(Recommendation::Finish)), C::Empty | C::Full)
            | (X::Recommend(Some(Recommendation::Reset)), C::Empty) => {
                return Err(E::InvalidTransition { zone, condition }.into());
            }
            (X::OpenZrwa, _) if self.zone(zone).record.zrwa => {
                self.make_open(zone, C::ExplicitlyOpen)?;
                return Ok(false);
            }
            (X::OpenZrwa, _) if self.geometry.zrwa().is_none() => {
                return Err(E::NoRandomWriteArea { zone }.into());
            }
            (X::OpenZrwa, C::Full) => return Err(E::InvalidTransition { zone, condition }.into()),
            (X::OpenZrwa, _) => {
                if !condition.is_open() {
                    self.resources_for(condition)?;
                }
                self.area_for(zone)?;
                self.make_open(zone, C::ExplicitlyOpen)?;
                self.zone(zone).reserved = Some((condition, true));
            }
            (X::SetExtension { zrwa, .. }, C::Empty) if self.geometry.extension_size() != 0 => {
                if zrwa && self.geometry.zrwa().is_none() {
                    return Err(E::NoRandomWriteArea { zone }.into());
                }
                self.active_resource_for(condition)?;
                if zrwa {
                    self.area_for(zone)?;
                }
                self.zone(zone).condition = C::Closed;
                self.zone(zone).reserved = Some((condition, zrwa));
            }
            (X::SetExtension { .. }, _) => return Err(E::InvalidTransition { zone, condition }.into()),
            (X::SetReadOnly, C::ReadOnly) | (X::SetOffline, C::Offline) => return Ok(false),
            (X::SetNormal, C::ReadOnly | C::Offline) => {}
            (X::SetNormal, _) => return Ok(false),
            (X::Finish, C::Empty) => self.resources_for(C::Empty)?,
            _ => {}
        }
        self.zone(zone).busy = true;
        Ok(true)
    }

    /// Whether an operation on a drained zone can be committed.
    pub fn confirm(&self, zone: ZoneNo, op: ExclusiveOp) -> Result<(), E> {
        let z = &self.zones[zone.0 as usize];
        match (op, z.condition) {
            (ExclusiveOp::Recommend(Some(Recommendation::Finish)), condition @ (C::Empty | C::Full))
            | (ExclusiveOp::Recommend(Some(Recommendation::Reset)), condition @ C::Empty) => {
                return Err(E::InvalidTransition { zone, condition });
            }
            (ExclusiveOp::OpenZrwa, _) => {}
            _ => return Ok(()),
        }
        let granularity = self.area().granularity;
        if z.condition == C::Full {
            let condition = C::Full;
            return Err(E::InvalidTransition { zone, condition });
        }
        if !z.record.written.is_multiple_of(granularity) {
            return Err(E::Unaligned {
                offset: self.geometry.start(zone) + z.record.written,
                len: 0,
                granularity: granularity as u32,
            });
        }
        Ok(())
    }

    /// Ends an exclusive operation, done or not.
    pub fn end(&mut self, zone: ZoneNo, op: ExclusiveOp, commit: bool) {
        let geometry = self.geometry;
        let data_end = self.data_end(zone) - geometry.start(zone);
        let z = self.zone(zone);
        z.busy = false;
        let reserved = z.reserved.take();
        if !commit {
            match reserved {
                Some((before, _)) if matches!(op, ExclusiveOp::SetExtension { .. }) => z.condition = before,
                Some((C::ImplicitlyOpen, true))
                    if z.condition == C::ExplicitlyOpen && z.record.written == 0 && is_plain(&z.record) =>
                {
                    z.condition = C::Empty;
                }
                Some((before, true)) if z.condition == C::ExplicitlyOpen => z.condition = before,
                _ => {}
            }
            return;
        }
        let r = &mut z.record;
        match op {
            ExclusiveOp::Reset => {
                let counters = r.counters;
                *r = ZoneRecord::default();
                r.counters = counters;
                r.counters.resets += 1;
            }
            ExclusiveOp::Format => {
                let before = *r;
                *r = ZoneRecord::default();
                r.offline = before.offline || before.read_only;
                r.counters = before.counters;
                if *r != before {
                    r.counters.resets += 1;
                }
            }
            ExclusiveOp::Finish | ExclusiveOp::FinishUnlimited | ExclusiveOp::FinishByDevice => {
                (r.written, r.finished, r.zrwa) = (data_end, true, false);
                r.finished_by_device |= op == ExclusiveOp::FinishByDevice;
                if r.recommended == Some(Recommendation::Finish) {
                    r.recommended = None;
                }
                r.counters.finishes += 1;
            }
            ExclusiveOp::OpenZrwa => r.zrwa = true,
            ExclusiveOp::SetExtension { checksum, zrwa } => {
                (r.extension, r.zrwa) = (Some(checksum), r.zrwa || zrwa);
            }
            ExclusiveOp::Recommend(what) => r.recommended = what,
            ExclusiveOp::SetReadOnly => (r.read_only, r.offline) = (true, false),
            ExclusiveOp::SetOffline => (r.read_only, r.offline) = (false, true),
            ExclusiveOp::SetNormal => (r.read_only, r.offline) = (false, false),
        }
        z.high = r.written;
        z.pointer = r.written;
        if !matches!(op, ExclusiveOp::OpenZrwa | ExclusiveOp::Recommend(_)) {
            z.condition = at_rest(&geometry, zone, &z.record);
        }
    }
}
