//! Values of features (Base Specification 2.1, 5.1.25.1; NVM Command Set 1.1, 4.1.3).
//!
//! None can be saved: a controller starts, and is reset, with the defaults.

use std::time::{Duration, Instant};

use zbdkit_spec::nvme::Status;
use zbdkit_spec::nvme::feature::{FeatureId, HOST_BEHAVIOR_BYTES, TemperatureThreshold};

use crate::status::Failure;

/// What can be done with a feature.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Traits {
    /// Each namespace has a value.
    pub(crate) namespace_specific: bool,
    /// Its value comes with data of so many bytes.
    pub(crate) data: usize,
}

/// The features that there are.
pub(crate) const FEATURES: [FeatureId; 15] = [
    FeatureId::ARBITRATION,
    FeatureId::POWER_MANAGEMENT,
    FeatureId::TEMPERATURE_THRESHOLD,
    FeatureId::ERROR_RECOVERY,
    FeatureId::VOLATILE_WRITE_CACHE,
    FeatureId::NUMBER_OF_QUEUES,
    FeatureId::INTERRUPT_COALESCING,
    FeatureId::INTERRUPT_VECTOR_CONFIGURATION,
    FeatureId::WRITE_ATOMICITY_NORMAL,
    FeatureId::ASYNC_EVENT_CONFIGURATION,
    FeatureId::TIMESTAMP,
    FeatureId::KEEP_ALIVE_TIMER,
    FeatureId::HOST_BEHAVIOR_SUPPORT,
    FeatureId::COMMAND_SET_PROFILE,
    FeatureId::HOST_IDENTIFIER,
];

/// What can be done with a feature, if there is such a one. `value` is dword 11 of the command.
pub(crate) fn traits(feature: FeatureId, value: u32) -> Option<Traits> {
    FEATURES.contains(&feature).then_some(Traits {
        namespace_specific: feature == FeatureId::ERROR_RECOVERY,
        data: match feature {
            FeatureId::TIMESTAMP => 8,
            FeatureId::HOST_BEHAVIOR_SUPPORT => HOST_BEHAVIOR_BYTES,
            // Bit 0: the identifier is extended.
            FeatureId::HOST_IDENTIFIER if value & 1 != 0 => 16,
            FeatureId::HOST_IDENTIFIER => 8,
            _ => 0,
        },
    })
}

/// The composite temperature that is always reported: 40 degrees Celsius, kelvins.
pub(crate) const TEMPERATURE: u16 = 313;

/// Values of the features that nothing but the host depends on.
#[derive(Clone, Debug)]
pub(crate) struct Values {
    arbitration: u32,
    power: u32,
    over: u16,
    under: u16,
    /// Of each namespace.
    error_recovery: Vec<u32>,
    coalescing: u32,
    /// Of each interrupt vector: not coalesced.
    vectors: Vec<bool>,
    atomicity: u32,
    /// Milliseconds, and when they were set.
    timestamp: (u64, Instant),
    timestamp_set: bool,
    keep_alive: u32,
    host_behavior: [u8; HOST_BEHAVIOR_BYTES],
    host: [u8; 16],
}

impl Values {
    /// The defaults, for so many namespaces and interrupt vectors.
    pub(crate) fn new(namespaces: usize, vectors: usize, over: u16) -> Values {
        Values {
            arbitration: 0x7,
            power: 0,
            over,
            under: 0,
            error_recovery: vec![0; namespaces],
            coalescing: 0,
            vectors: vec![false; vectors],
            atomicity: 0,
            timestamp: (0, Instant::now()),
            timestamp_set: false,
            keep_alive: 0,
            host_behavior: [0; HOST_BEHAVIOR_BYTES],
            host: [0; 16],
        }
    }

    /// Whether the temperature is outside its thresholds.
    pub(crate) fn is_temperature_critical(&self) -> bool {
        TEMPERATURE >= self.over || TEMPERATURE <= self.under
    }

    /// The keep alive timeout, if the host wants one.
    pub(crate) fn keep_alive(&self) -> Option<Duration> {
        (self.keep_alive != 0).then(|| Duration::from_millis(self.keep_alive.into()))
    }

    /// A value that is a dword. `namespace` is the place of the namespace that it is asked for.
    pub(crate) fn get(&self, feature: FeatureId, value: u32, namespace: usize) -> Result<u32, Failure> {
        Ok(match feature {
            FeatureId::ARBITRATION => self.arbitration,
            FeatureId::POWER_MANAGEMENT => self.power,
            FeatureId::TEMPERATURE_THRESHOLD => self.threshold(value)?,
            FeatureId::ERROR_RECOVERY => *self
                .error_recovery
                .get(namespace)
                .ok_or(Status::INVALID_NAMESPACE_OR_FORMAT)?,
            FeatureId::INTERRUPT_COALESCING => self.coalescing,
            FeatureId::INTERRUPT_VECTOR_CONFIGURATION => {
                let vector = value & 0xffff;
                let not_coalesced = *self.vectors.get(vector as usize).ok_or(Status::INVALID_FIELD)?;
                vector | u32::from(not_coalesced) << 16
            }
            FeatureId::WRITE_ATOMICITY_NORMAL => self.atomicity,
            FeatureId::KEEP_ALIVE_TIMER => self.keep_alive,
            FeatureId::COMMAND_SET_PROFILE => 0,
            _ => 0,
        })
    }

    /// Sets a value that is a dword.
    pub(crate) fn set(
        &mut self,
        feature: FeatureId,
        value: u32,
        namespaces: &[usize],
    ) -> Result<(), Failure> {
        match feature {
            FeatureId::ARBITRATION => self.arbitration = value,
            // There is one power state, 0; the rest is a hint.
            FeatureId::POWER_MANAGEMENT if value & 0x1f == 0 => self.power = value & 0xff,
            FeatureId::TEMPERATURE_THRESHOLD => self.set_threshold(value)?,
            // Bit 16: errors for deallocated blocks, which no namespace offers.
            FeatureId::ERROR_RECOVERY if value & 1 << 16 == 0 => {
                for namespace in namespaces {
                    self.error_recovery[*namespace] = value & 0xffff;
                }
            }
            FeatureId::INTERRUPT_COALESCING => self.coalescing = value & 0xffff,
            FeatureId::INTERRUPT_VECTOR_CONFIGURATION => {
                let vector = self.vectors.get_mut((value & 0xffff) as usize);
                *vector.ok_or(Status::INVALID_FIELD)? = value & 1 << 16 != 0;
            }
            FeatureId::WRITE_ATOMICITY_NORMAL => self.atomicity = value & 1,
            FeatureId::KEEP_ALIVE_TIMER => self.keep_alive = value,
            FeatureId::COMMAND_SET_PROFILE if value & 0x1ff == 0 => {}
            FeatureId::COMMAND_SET_PROFILE => return Err(Status::COMMAND_SET_COMBINATION_REJECTED.into()),
            _ => return Err(Status::INVALID_FIELD.into()),
        }
        Ok(())
    }

    /// The composite temperature's threshold that `select` names; there are no other sensors.
    fn threshold(&self, select: u32) -> Result<u32, Failure> {
        let select = TemperatureThreshold::from_bits(select);
        match (select.tmpsel(), select.thsel()) {
            (0, 0) => Ok(self.over.into()),
            (0, 1) => Ok(self.under.into()),
            _ => Err(Status::INVALID_FIELD.into()),
        }
    }

    fn set_threshold(&mut self, value: u32) -> Result<(), Failure> {
        let value = TemperatureThreshold::from_bits(value);
        // 15: all sensors.
        match (value.tmpsel(), value.thsel()) {
            (0 | 15, 0) => self.over = value.tmpth(),
            (0 | 15, 1) => self.under = value.tmpth(),
            _ => return Err(Status::INVALID_FIELD.into()),
        }
        Ok(())
    }

    /// A value that is data, into the first bytes of `data`.
    pub(crate) fn get_data(&self, feature: FeatureId, data: &mut [u8]) {
        match feature {
            FeatureId::TIMESTAMP => {
                let (milliseconds, since) = self.timestamp;
                let now = milliseconds.wrapping_add(since.elapsed().as_millis() as u64);
                data[..6].copy_from_slice(&now.to_le_bytes()[..6]);
                // Bits 3:1, origin: 0 the last reset, 1 the host.
                data[6] = u8::from(self.timestamp_set) << 1;
            }
            FeatureId::HOST_BEHAVIOR_SUPPORT => data.copy_from_slice(&self.host_behavior),
            FeatureId::HOST_IDENTIFIER => data.copy_from_slice(&self.host[..data.len()]),
            _ => {}
        }
    }

    /// Sets a value that is data, as long as [`Traits::data`] says.
    pub(crate) fn set_data(&mut self, feature: FeatureId, data: &[u8]) -> Result<(), Failure> {
        match feature {
            FeatureId::TIMESTAMP => {
                let mut milliseconds = [0; 8];
                milliseconds[..6].copy_from_slice(&data[..6]);
                self.timestamp = (u64::from_le_bytes(milliseconds), Instant::now());
                self.timestamp_set = true;
            }
            FeatureId::HOST_BEHAVIOR_SUPPORT => {
                // ACRE, ETDAS, LBAFEE and HDISNS are booleans; of the copy formats, those that need to be enabled are
                // not offered.
                if data[..4].iter().any(|byte| *byte > 1) {
                    return Err(Status::INVALID_FIELD.into());
                }
                self.host_behavior.copy_from_slice(data);
            }
            FeatureId::HOST_IDENTIFIER => {
                self.host = [0; 16];
                self.host[..data.len()].copy_from_slice(data);
            }
            _ => {}
        }
        Ok(())
    }
}
