//! Asynchronous events (Base Specification 2.1, 5.1.2): requests that wait, and what they are completed with.
//!
//! An event is told once; the next of its kind waits until the host has read the log page that the first one named.

use std::collections::{BTreeSet, VecDeque};
use std::future::poll_fn;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};

use zbdkit_spec::nvme::Status;
use zbdkit_spec::nvme::feature::EventConfiguration;
use zbdkit_spec::nvme::log::{
    Event as EventDword, EventType, LogId, NOTICE_NAMESPACE_ATTRIBUTE, NOTICE_ZONE_DESCRIPTOR,
};
use zbdkit_spec::nvme::zns::MAX_CHANGED_ZONES;

use crate::status::Failure;

/// Most requests that may wait at once.
pub(crate) const MAX_REQUESTS: usize = 4;

/// Something that the host is told of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Event {
    /// Attributes of a namespace changed.
    NamespaceAttribute,
    /// Descriptors of zones of this namespace changed by themselves.
    ZoneDescriptor {
        /// The namespace.
        nsid: u32,
    },
    /// The temperature passed a threshold.
    Temperature,
}

/// Information of a SMART event: the temperature passed a threshold.
const SMART_TEMPERATURE: u8 = 1;
/// Its bit in the critical warnings.
pub(crate) const WARNING_TEMPERATURE: u8 = 1 << 1;

impl Event {
    /// Dwords 0 and 1 of the completion.
    fn dwords(self) -> u64 {
        let (kind, info, lid, nsid) = match self {
            Event::NamespaceAttribute => (
                EventType::NOTICE,
                NOTICE_NAMESPACE_ATTRIBUTE,
                LogId::CHANGED_NAMESPACES,
                0,
            ),
            Event::ZoneDescriptor { nsid } => (
                EventType::NOTICE,
                NOTICE_ZONE_DESCRIPTOR,
                LogId::CHANGED_ZONES,
                nsid,
            ),
            Event::Temperature => (EventType::SMART, SMART_TEMPERATURE, LogId::SMART, 0),
        };
        let dword = EventDword::new()
            .with_kind(kind.0)
            .with_info(info)
            .with_lid(lid.0);
        u64::from(dword.into_bits()) | u64::from(nsid) << 32
    }

    fn is_wanted(self, wanted: EventConfiguration) -> bool {
        match self {
            Event::NamespaceAttribute => wanted.namespace_attribute(),
            Event::ZoneDescriptor { .. } => wanted.zone_descriptor(),
            Event::Temperature => wanted.smart() & WARNING_TEMPERATURE != 0,
        }
    }
}

/// The events of one controller.
#[derive(Debug, Default)]
pub(crate) struct Events(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// The controller is disabled.
    closed: bool,
    wanted: EventConfiguration,
    waiting: Vec<Request>,
    pending: VecDeque<Event>,
    /// Told, and the log page not read yet.
    told: BTreeSet<Event>,
    changed_zones: Vec<ChangedZones>,
    changed_namespaces: BTreeSet<u32>,
}

/// A request that waits.
#[derive(Debug)]
struct Request {
    cid: u16,
    waker: Waker,
    outcome: Option<Result<u64, Failure>>,
}

/// Changed zones of a namespace, until the list is read.
#[derive(Debug)]
struct ChangedZones {
    nsid: u32,
    /// First bytes; more than fit the list if there are too many for it.
    zones: BTreeSet<u64>,
}

impl Events {
    /// Waits for an event: dwords 0 and 1 of the completion.
    ///
    /// # Errors
    /// Too many wait already; the request was aborted; the controller is disabled.
    pub(crate) async fn next(&self, cid: u16) -> Result<u64, Failure> {
        let mut guard = self.enter(cid)?;
        poll_fn(|cx| guard.poll(cx.waker())).await
    }

    fn enter(&self, cid: u16) -> Result<Waiting<'_>, Failure> {
        let mut state = self.lock();
        if state.closed {
            return Err(Status::ABORTED_SQ_DELETION.into());
        }
        if state.waiting.len() == MAX_REQUESTS {
            return Err(Status::ASYNC_EVENT_REQUEST_LIMIT_EXCEEDED.into());
        }
        // One that does not wait any more, but was not yet looked at, has its identifier still.
        if state.waiting.iter().any(|request| request.cid == cid) {
            return Err(Status::COMMAND_ID_CONFLICT.into());
        }
        state.waiting.push(Request {
            cid,
            waker: Waker::noop().clone(),
            outcome: None,
        });
        state.deliver();
        Ok(Waiting { events: self, cid })
    }

    /// The host chose what it wants to be told.
    pub(crate) fn configure(&self, wanted: EventConfiguration) {
        let mut state = self.lock();
        state.wanted = wanted;
        state.pending.retain(|event| event.is_wanted(wanted));
    }

    /// What the host wants to be told.
    pub(crate) fn configuration(&self) -> EventConfiguration {
        self.lock().wanted
    }

    /// Something happened.
    pub(crate) fn raise(&self, event: Event) {
        self.lock().raise(event);
    }

    /// A zone changed by itself; `start` is its first byte.
    pub(crate) fn zone_changed(&self, nsid: u32, start: u64) {
        let mut state = self.lock();
        let zones = state.zones_of(nsid);
        if zones.len() <= MAX_CHANGED_ZONES {
            zones.insert(start);
        }
        state.raise(Event::ZoneDescriptor { nsid });
    }

    /// A namespace changed.
    pub(crate) fn namespace_changed(&self, nsid: u32) {
        let mut state = self.lock();
        state.changed_namespaces.insert(nsid);
        state.raise(Event::NamespaceAttribute);
    }

    /// The zones of a namespace that changed since the list was read, by their first bytes in order: at most one more than
    /// fit the list.
    /// Unless `keep`, the list is empty afterwards and events of its kind are told again.
    pub(crate) fn changed_zones(&self, nsid: u32, keep: bool) -> Vec<u64> {
        let mut state = self.lock();
        let zones = state.zones_of(nsid);
        let list = zones.iter().copied().collect();
        if !keep {
            zones.clear();
            state.read(Event::ZoneDescriptor { nsid });
        }
        list
    }

    /// The namespaces that changed since the list was read. `keep` as for zones.
    pub(crate) fn changed_namespaces(&self, keep: bool) -> Vec<u32> {
        let mut state = self.lock();
        let list = state.changed_namespaces.iter().copied().collect();
        if !keep {
            state.changed_namespaces.clear();
            state.read(Event::NamespaceAttribute);
        }
        list
    }

    /// The SMART log was read.
    pub(crate) fn smart_read(&self) {
        self.lock().read(Event::Temperature);
    }

    /// Aborts the request of this command, if it waits.
    pub(crate) fn abort(&self, cid: u16) -> bool {
        let mut state = self.lock();
        let aborted = state
            .waiting
            .iter_mut()
            .find(|request| request.cid == cid && request.outcome.is_none());
        let Some(request) = aborted else {
            return false;
        };
        request.end(Err(Status::ABORT_REQUESTED.into()));
        true
    }

    /// The controller is enabled.
    pub(crate) fn open(&self) {
        self.lock().closed = false;
    }

    /// The controller is disabled: ends all requests, those that are still to come too, and forgets what happened.
    pub(crate) fn close(&self) {
        let mut state = self.lock();
        for request in &mut state.waiting {
            request.end(Err(Status::ABORTED_SQ_DELETION.into()));
        }
        *state = State {
            closed: true,
            waiting: std::mem::take(&mut state.waiting),
            ..State::default()
        };
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn raise(&mut self, event: Event) {
        if event.is_wanted(self.wanted) && !self.pending.contains(&event) {
            self.pending.push_back(event);
            self.deliver();
        }
    }

    fn read(&mut self, event: Event) {
        self.told.remove(&event);
        self.pending.retain(|pending| *pending != event);
        self.deliver();
    }

    /// Completes requests that wait with events that may be told.
    fn deliver(&mut self) {
        while let Some(request) = self.waiting.iter_mut().find(|request| request.outcome.is_none())
            && let Some(at) = self.pending.iter().position(|event| !self.told.contains(event))
            && let Some(event) = self.pending.remove(at)
        {
            self.told.insert(event);
            request.end(Ok(event.dwords()));
        }
    }

    fn zones_of(&mut self, nsid: u32) -> &mut BTreeSet<u64> {
        let at = self.changed_zones.iter().position(|changed| changed.nsid == nsid);
        let at = at.unwrap_or_else(|| {
            self.changed_zones.push(ChangedZones {
                nsid,
                zones: BTreeSet::new(),
            });
            self.changed_zones.len() - 1
        });
        &mut self.changed_zones[at].zones
    }
}

impl Request {
    fn end(&mut self, outcome: Result<u64, Failure>) {
        if self.outcome.is_none() {
            self.outcome = Some(outcome);
            self.waker.wake_by_ref();
        }
    }
}

/// A request's place among those that wait.
struct Waiting<'a> {
    events: &'a Events,
    cid: u16,
}

impl Waiting<'_> {
    fn poll(&mut self, waker: &Waker) -> Poll<Result<u64, Failure>> {
        let mut state = self.events.lock();
        let request = state.waiting.iter_mut().find(|request| request.cid == self.cid);
        match request {
            Some(Request {
                outcome: Some(outcome),
                ..
            }) => Poll::Ready(*outcome),
            Some(request) => {
                request.waker.clone_from(waker);
                Poll::Pending
            }
            None => Poll::Ready(Err(Status::INTERNAL_ERROR.into())),
        }
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.events
            .lock()
            .waiting
            .retain(|request| request.cid != self.cid);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::pin::pin;
    use std::task::Context;

    fn wanted() -> EventConfiguration {
        EventConfiguration::new()
            .with_zone_descriptor(true)
            .with_namespace_attribute(true)
    }

    #[test]
    fn an_event_is_told_once_until_its_log_page_is_read() {
        let events = Events::default();
        events.configure(wanted());
        let cx = &mut Context::from_waker(Waker::noop());
        let mut first = pin!(events.next(1));
        assert!(first.as_mut().poll(cx).is_pending());
        events.zone_changed(2, 0x800);
        assert_eq!(first.as_mut().poll(cx), Poll::Ready(Ok(0x2_00bf_ef02)));
        let mut second = pin!(events.next(2));
        events.zone_changed(2, 0x1000);
        assert!(
            second.as_mut().poll(cx).is_pending(),
            "not before the list is read"
        );
        assert_eq!(events.changed_zones(2, true), [0x800, 0x1000]);
        assert!(
            second.as_mut().poll(cx).is_pending(),
            "it was read with the event retained"
        );
        assert_eq!(events.changed_zones(2, false), [0x800, 0x1000]);
        assert!(
            second.as_mut().poll(cx).is_pending(),
            "what was in the list needs no event"
        );
        events.zone_changed(2, 0x800);
        assert_eq!(second.as_mut().poll(cx), Poll::Ready(Ok(0x2_00bf_ef02)));
        assert_eq!(events.changed_zones(2, false), [0x800]);
    }

    #[test]
    fn a_host_is_told_only_what_it_wants() {
        let events = Events::default();
        events.configure(EventConfiguration::new().with_namespace_attribute(true));
        let cx = &mut Context::from_waker(Waker::noop());
        let mut request = pin!(events.next(1));
        events.zone_changed(1, 0);
        assert!(request.as_mut().poll(cx).is_pending());
        events.namespace_changed(1);
        assert_eq!(request.as_mut().poll(cx), Poll::Ready(Ok(0x0004_0002)));
    }

    #[test]
    fn requests_beyond_the_limit_are_refused_and_ended_ones_make_room() {
        let events = Events::default();
        let cx = &mut Context::from_waker(Waker::noop());
        let mut waiting: Vec<_> = (0..4).map(|cid| Box::pin(events.next(cid))).collect();
        for request in &mut waiting {
            assert!(request.as_mut().poll(cx).is_pending());
        }
        let limit = Failure::from(Status::ASYNC_EVENT_REQUEST_LIMIT_EXCEEDED);
        assert_eq!(pin!(events.next(9)).poll(cx), Poll::Ready(Err(limit)));
        assert!(events.abort(2) && !events.abort(9));
        let aborted = Failure::from(Status::ABORT_REQUESTED);
        assert_eq!(waiting[2].as_mut().poll(cx), Poll::Ready(Err(aborted)));
        drop(waiting);
        assert!(pin!(events.next(9)).poll(cx).is_pending());
    }

    #[test]
    fn a_disabled_controller_ends_its_requests() {
        let events = Events::default();
        let cx = &mut Context::from_waker(Waker::noop());
        let mut request = pin!(events.next(1));
        assert!(request.as_mut().poll(cx).is_pending());
        events.close();
        let ended = Failure::from(Status::ABORTED_SQ_DELETION);
        assert_eq!(request.as_mut().poll(cx), Poll::Ready(Err(ended)));
        assert_eq!(events.configuration(), EventConfiguration::new());
        assert_eq!(
            pin!(events.next(2)).poll(cx),
            Poll::Ready(Err(ended)),
            "one that comes late"
        );
        events.open();
        assert!(pin!(events.next(3)).poll(cx).is_pending());
    }
}
