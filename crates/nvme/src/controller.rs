//! A controller: its properties, its state, and what its queues share.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use zbdkit_spec::nvme::Status;
use zbdkit_spec::nvme::base::{Csi, MIN_PAGE_BYTES};
use zbdkit_spec::nvme::command::SubmissionEntry;
use zbdkit_spec::nvme::controller::{
    CSS_ADMIN_ONLY, CSS_ALL, CSS_NVM, Cap, Cc, Crto, Csts, SHST_COMPLETE, SHST_NORMAL, SHST_OCCURRING,
    VERSION_2_1,
};
use zbdkit_spec::nvme::feature::{EventConfiguration, FeatureId, NumberOfQueues};

use crate::error_log::ErrorLog;
use crate::events::Events;
use crate::features::{Traits, Values, traits};
use crate::namespace::Namespace;
use crate::stats::{QueueStats, Stats, Totals};
use crate::status::Failure;
use crate::subsystem::Subsystem;
use crate::zones::settle;

/// What a transport makes of a controller.
#[derive(Clone, Debug)]
pub struct ControllerOptions {
    /// Most I/O submission queues, and as many completion queues.
    pub io_queues: u16,
    /// Most entries of an I/O queue, 2 to 65536.
    pub queue_entries: u32,
    /// Largest memory page, as a power of two of 4096 bytes (CAP.MPSMAX).
    pub max_page: u8,
    /// Most data of a command, as a power of two of 4096 bytes (MDTS), 1 to 12.
    pub max_transfer: u8,
    /// SGL support (SGLS of Identify Controller); 0 for none.
    pub sgls: u32,
    /// The transport has Doorbell Buffer Config.
    pub doorbell_buffers: bool,
    /// PCI vendor and subsystem vendor; 0 elsewhere.
    pub pci_vendor: [u16; 2],
    /// IEEE OUI.
    pub ieee: [u8; 3],
    /// The transport watches keep alives ([`Controller::keep_alive_timeout`]); without, there are none.
    pub keep_alive: bool,
    /// The transport has commands to create and delete queues.
    pub has_queue_commands: bool,
    /// The subsystem may have several controllers, and its namespaces are shared by them.
    pub shared: bool,
}

impl Default for ControllerOptions {
    fn default() -> ControllerOptions {
        ControllerOptions {
            io_queues: 16,
            queue_entries: 1024,
            max_page: 0,
            max_transfer: 8,
            sgls: 0,
            doorbell_buffers: false,
            pci_vendor: [0; 2],
            ieee: [0; 3],
            keep_alive: false,
            has_queue_commands: true,
            shared: false,
        }
    }
}

/// What a write of CC asks the transport to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Nothing.
    Nothing,
    /// Make the admin queue, then [`Controller::set_ready`]; or [`Controller::set_fatal`] where that is impossible.
    Enable,
    /// Stop all queues and forget their commands, then [`Controller::reset`].
    Disable,
    /// Let the commands that execute end, then [`Controller::shut_down`].
    Shutdown,
}

/// A controller. It lives as long as the transport's connection; resets keep it.
pub struct Controller {
    subsystem: Arc<Subsystem>,
    id: u16,
    options: ControllerOptions,
    state: Mutex<State>,
    /// CC.CSS, as it was when the controller was enabled.
    css: AtomicU8,
    /// Whether there is a volatile write cache: else each write is durable before it completes.
    pub(crate) write_cache: AtomicBool,
    stats: Mutex<Stats>,
    errors: Mutex<ErrorLog>,
    pub(crate) events: Events,
    features: Mutex<Values>,
    keep_alives: AtomicU64,
    made: Instant,
}

#[derive(Default)]
struct State {
    cc: Cc,
    csts: Csts,
    /// What Set Features gave.
    allotted: Option<NumberOfQueues>,
    /// I/O queues were made since the controller was enabled.
    queues_made: bool,
}

impl Controller {
    /// Adds a controller to a subsystem.
    pub fn new(subsystem: &Arc<Subsystem>, options: ControllerOptions) -> Arc<Controller> {
        subsystem.admit(|id| Controller {
            features: Mutex::new(defaults(subsystem, &options)),
            subsystem: subsystem.clone(),
            id,
            options,
            state: Mutex::default(),
            css: AtomicU8::new(CSS_NVM),
            write_cache: AtomicBool::new(true),
            stats: Mutex::default(),
            errors: Mutex::default(),
            events: Events::default(),
            keep_alives: AtomicU64::new(0),
            made: Instant::now(),
        })
    }

    /// The subsystem that it is part of.
    pub fn subsystem(&self) -> &Arc<Subsystem> {
        &self.subsystem
    }

    /// Its identifier.
    pub fn id(&self) -> u16 {
        self.id
    }

    /// What it was made with.
    pub fn options(&self) -> &ControllerOptions {
        &self.options
    }

    /// CAP.
    pub fn capabilities(&self) -> Cap {
        let entries = self.options.queue_entries.clamp(2, 1 << 16);
        Cap::new()
            .with_mqes_z(u16::try_from(entries - 1).unwrap_or(u16::MAX))
            .with_cqr(true)
            .with_to(READY_TIMEOUT)
            .with_css_nvm(true)
            .with_css_all(true)
            .with_mpsmax(self.options.max_page.min(15))
            .with_crwms(true)
    }

    /// VS.
    pub fn version(&self) -> u32 {
        VERSION_2_1
    }

    /// CRTO.
    pub fn ready_timeouts(&self) -> Crto {
        Crto::new().with_crwmt(READY_TIMEOUT.into())
    }

    /// CC, as the host wrote it.
    pub fn configuration(&self) -> Cc {
        self.state().cc
    }

    /// CSTS.
    pub fn status(&self) -> Csts {
        self.state().csts
    }

    /// The host writes CC.
    #[must_use = "the transport has to follow"]
    pub fn configure(&self, cc: Cc) -> Change {
        let mut state = self.state();
        let old = std::mem::replace(&mut state.cc, cc);
        match (old.en(), cc.en()) {
            (false, true) if self.can_enable(cc) => {
                self.css.store(cc.css(), Ordering::Relaxed);
                self.events.open();
                Change::Enable
            }
            (false, true) => {
                state.csts.set_cfs(true);
                Change::Nothing
            }
            (true, false) => {
                self.events.close();
                Change::Disable
            }
            _ if cc.shn() != 0 && old.shn() == 0 => {
                state.csts.set_shst(SHST_OCCURRING);
                Change::Shutdown
            }
            _ => Change::Nothing,
        }
    }

    fn can_enable(&self, cc: Cc) -> bool {
        matches!(cc.css(), CSS_NVM | CSS_ALL | CSS_ADMIN_ONLY)
            && cc.mps() <= self.options.max_page
            && cc.ams() == 0
            && (cc.iosqes(), cc.iocqes()) == (6, 4)
    }

    /// The admin queue is there: CSTS.RDY.
    pub fn set_ready(&self) {
        self.state().csts.set_rdy(true);
    }

    /// Something happened that only a reset mends: CSTS.CFS.
    pub fn set_fatal(&self) {
        self.state().csts.set_cfs(true);
    }

    /// The controller is as new, but for what survives a reset: CC as the host wrote it, the SMART and error logs.
    pub fn reset(&self) {
        self.events.close();
        self.write_cache.store(true, Ordering::Relaxed);
        *self.features() = self.new_features();
        let mut state = self.state();
        *state = State {
            cc: state.cc,
            ..State::default()
        };
    }

    /// Makes everything durable; CSTS says so afterwards. With the last controller of the subsystem that is shut down, no
    /// zone stays open (ZNS 1.2, 2.1.1.3). A failure of a namespace leaves nothing to be done here: what it means is
    /// what the next flush would have said.
    pub async fn shut_down(&self) {
        let others = self.subsystem.alive();
        let last = others
            .iter()
            .filter(|other| other.id != self.id)
            .all(|other| !other.is_running());
        for namespace in self.subsystem.namespaces() {
            let lane = namespace.device.lane(1);
            let closed = match namespace.zones() {
                Some(_) if last => settle(namespace, &lane).await,
                _ => Ok(()),
            };
            if let Err(failure) = closed.and(namespace.flush(&lane).await) {
                tracing::warn!("a namespace was not shut down: {:?}", failure.status);
            }
        }
        self.state().csts.set_shst(SHST_COMPLETE);
    }

    /// Enabled and not shut down.
    fn is_running(&self) -> bool {
        let state = self.state();
        state.cc.en() && state.csts.shst() == SHST_NORMAL
    }

    /// Most data of a command, bytes.
    pub fn max_transfer(&self) -> usize {
        (MIN_PAGE_BYTES as usize) << self.max_transfer_pages()
    }

    /// The same as a power of two of pages (MDTS).
    pub(crate) fn max_transfer_pages(&self) -> u8 {
        self.options.max_transfer.clamp(1, 12)
    }

    /// How long the host's keep alives may stay out, if it wants that watched. What passes in between is counted by
    /// [`Controller::keep_alives`]; transports that watch it take silence for the loss of the host.
    pub fn keep_alive_timeout(&self) -> Option<Duration> {
        self.features().keep_alive()
    }

    /// Keep Alive commands so far.
    pub fn keep_alives(&self) -> u64 {
        self.keep_alives.load(Ordering::Relaxed)
    }

    pub(crate) fn kept_alive(&self) -> Result<(), Failure> {
        if !self.options.keep_alive {
            return Err(Status::INVALID_OPCODE.into());
        }
        self.keep_alives.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// I/O queues that the host may make: what it was given by Set Features, or the most that there can be.
    pub fn allotted(&self) -> NumberOfQueues {
        self.state().allotted.unwrap_or(self.queue_limit())
    }

    pub(crate) fn queue_limit(&self) -> NumberOfQueues {
        let most_z = self.options.io_queues.max(1) - 1;
        NumberOfQueues::new().with_nsq_z(most_z).with_ncq_z(most_z)
    }

    /// The host asks for so many I/O queues: what it gets.
    pub(crate) fn allot(&self, wanted: NumberOfQueues) -> Result<NumberOfQueues, Failure> {
        // 65536 queues are one too many.
        if wanted.nsq_z() == u16::MAX || wanted.ncq_z() == u16::MAX {
            return Err(Status::INVALID_FIELD.into());
        }
        let limit = self.queue_limit();
        let mut state = self.state();
        if state.queues_made {
            return Err(Status::COMMAND_SEQUENCE_ERROR.into());
        }
        let allotted = NumberOfQueues::new()
            .with_nsq_z(wanted.nsq_z().min(limit.nsq_z()))
            .with_ncq_z(wanted.ncq_z().min(limit.ncq_z()));
        state.allotted = Some(allotted);
        Ok(allotted)
    }

    pub(crate) fn set_queues_made(&self) {
        self.state().queues_made = true;
    }

    /// The events that the controller can tell of.
    pub(crate) fn offered_events(&self) -> EventConfiguration {
        EventConfiguration::new()
            .with_namespace_attribute(true)
            .with_zone_descriptor(true)
    }

    pub(crate) fn features(&self) -> MutexGuard<'_, Values> {
        self.features.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What can be done with a feature, if there is such a one. `value` is dword 11 of the command.
    pub(crate) fn feature_traits(&self, feature: FeatureId, value: u32) -> Option<Traits> {
        if feature == FeatureId::KEEP_ALIVE_TIMER && !self.options.keep_alive {
            return None;
        }
        traits(feature, value)
    }

    pub(crate) fn new_features(&self) -> Values {
        defaults(&self.subsystem, &self.options)
    }

    /// How long the controller has been there.
    pub(crate) fn age(&self) -> Duration {
        self.made.elapsed()
    }

    /// Longest Zone Append, bytes: the least of the zoned namespaces' limits, as a power of two of pages (ZASL).
    pub fn max_append(&self) -> u64 {
        let namespaces = self.subsystem.namespaces().iter();
        let limits = namespaces.filter_map(|namespace| Some(namespace.zones()?.max_append));
        let least = limits.chain([self.max_transfer() as u64]).min().unwrap_or(0);
        1 << least.max(1).ilog2()
    }

    /// A command of this controller's host has changed attributes of a namespace: the hosts of the others are told (5.1.2).
    pub(crate) fn tell_others(&self, nsid: u32) {
        let others = self.subsystem.alive().into_iter();
        for other in others.filter(|other| other.id != self.id) {
            other.events.namespace_changed(nsid);
        }
    }

    pub(crate) fn log_error(&self, sqid: u16, entry: &SubmissionEntry, failure: &Failure) {
        let namespace = self.subsystem.namespace(entry.nsid.get());
        let csi = namespace.map_or(0, |namespace| namespace.csi().0);
        let lba = match (namespace, failure.offset) {
            (Some(namespace), Some(offset)) => offset >> namespace.block_shift(),
            _ => entry.slba(),
        };
        self.errors().add(sqid, entry, csi, lba, failure);
    }

    pub(crate) fn errors(&self) -> MutexGuard<'_, ErrorLog> {
        self.errors.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The namespace that an I/O command names.
    pub(crate) fn io_namespace(&self, nsid: u32) -> Result<(usize, &Namespace), Failure> {
        let namespace = self.active(nsid).ok_or(Status::INVALID_NAMESPACE_OR_FORMAT)?;
        namespace.check_ready()?;
        Ok((nsid as usize - 1, namespace))
    }

    /// A namespace that is active: attached, and of a command set that is enabled.
    pub(crate) fn active(&self, nsid: u32) -> Option<&Namespace> {
        self.subsystem
            .namespace(nsid)
            .filter(|namespace| self.is_active(namespace))
    }

    /// Whether blocks of some namespace can be marked uncorrectable, of that command set alone if one is given.
    pub(crate) fn marks_blocks(&self, csi: Option<Csi>) -> bool {
        self.subsystem
            .namespaces()
            .iter()
            .any(|namespace| csi.is_none_or(|csi| csi == namespace.csi()) && namespace.device.keeps_marks())
    }

    /// Whether a namespace's command set is enabled.
    pub(crate) fn is_active(&self, namespace: &Namespace) -> bool {
        namespace.zones().is_none() || self.css.load(Ordering::Relaxed) == CSS_ALL
    }

    /// Whether only admin commands are enabled.
    pub(crate) fn admin_only(&self) -> bool {
        self.css.load(Ordering::Relaxed) == CSS_ADMIN_ONLY
    }

    /// Counters for a queue.
    pub(crate) fn new_stats(&self) -> Arc<QueueStats> {
        self.stats.lock().unwrap_or_else(PoisonError::into_inner).queue()
    }

    /// What all queues have counted, those included that are gone.
    pub(crate) fn totals(&self) -> Totals {
        self.stats.lock().unwrap_or_else(PoisonError::into_inner).totals()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn defaults(subsystem: &Subsystem, options: &ControllerOptions) -> Values {
    // One vector for the admin queue, one for each I/O queue.
    let vectors = usize::from(options.io_queues) + 1;
    Values::new(subsystem.namespaces().len(), vectors, WARNING_TEMPERATURE)
}

/// Longest time until ready, units of 500 ms.
const READY_TIMEOUT: u8 = 20;

/// Longest time that a shutdown should take, microseconds (RTD3E): a flush of everything.
pub(crate) const SHUTDOWN_MICROSECONDS: u32 = 30_000_000;

/// Composite temperature from which on the device warns, kelvins (WCTEMP).
pub(crate) const WARNING_TEMPERATURE: u16 = 343;
