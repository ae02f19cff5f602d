//! Get Features and Set Features (Base Specification 2.1, 5.1.11 and 5.1.25).

use std::sync::atomic::Ordering;

use zbdkit_spec::nvme::Status;
use zbdkit_spec::nvme::command::{NSID_ALL, SubmissionEntry};
use zbdkit_spec::nvme::feature::{Capabilities, EventConfiguration, FeatureId, NumberOfQueues};

use super::{AdminQueue, Select};
use crate::controller::Controller;
use crate::events::Event;
use crate::features::{Traits, Values, traits};
use crate::status::Failure;
use crate::subsystem::index;
use crate::transport::{Direction, Transfer};

impl AdminQueue {
    pub(super) async fn get_features<T: Transfer>(
        &self,
        (entry, transfer): (&SubmissionEntry, &T),
        feature: FeatureId,
        select: Select,
        value: u32,
    ) -> Result<u64, Failure> {
        let controller = &*self.controller;
        let nsid = entry.nsid.get();
        let traits = traits(feature, value).ok_or(Status::INVALID_FIELD)?;
        let values = match select {
            Select::Capabilities => {
                let capabilities = Capabilities::new()
                    .with_namespace_specific(traits.namespace_specific)
                    .with_changeable(true);
                return Ok(capabilities.into_bits().into());
            }
            Select::Current => controller.features().clone(),
            // Nothing is saved, so what is saved is the default.
            Select::Default | Select::Saved => controller.default_features(),
        };
        if traits.data != 0 {
            let mut data = vec![0; traits.data];
            values.get_data(feature, &mut data);
            let buf = transfer
                .buffer(entry, Direction::ControllerToHost, data.len())
                .await?;
            buf.copy_from(&data);
            return Ok(0);
        }
        let current = select == Select::Current;
        let result = match feature {
            FeatureId::VOLATILE_WRITE_CACHE => {
                (!current || controller.write_cache.load(Ordering::Relaxed)).into()
            }
            FeatureId::NUMBER_OF_QUEUES if current => controller.allotted().into_bits(),
            FeatureId::NUMBER_OF_QUEUES => controller.queue_limit().into_bits(),
            FeatureId::ASYNC_EVENT_CONFIGURATION if current => controller.events.configuration().into_bits(),
            FeatureId::ASYNC_EVENT_CONFIGURATION => 0,
            _ => {
                let namespaces = controller.named(traits, nsid)?;
                let [namespace] = namespaces[..] else {
                    return Err(Status::INVALID_NAMESPACE_OR_FORMAT.into());
                };
                values.get(feature, value, namespace)?
            }
        };
        Ok(result.into())
    }

    pub(super) async fn set_features<T: Transfer>(
        &self,
        (entry, transfer): (&SubmissionEntry, &T),
        feature: FeatureId,
        save: bool,
        value: u32,
    ) -> Result<u64, Failure> {
        let controller = &*self.controller;
        let nsid = entry.nsid.get();
        let traits = traits(feature, value).ok_or(Status::INVALID_FIELD)?;
        if save {
            return Err(Status::FEATURE_IDENTIFIER_NOT_SAVEABLE.into());
        }
        if !traits.namespace_specific && nsid != 0 && nsid != NSID_ALL {
            return Err(Status::FEATURE_NOT_NAMESPACE_SPECIFIC.into());
        }
        if traits.data != 0 {
            let buf = transfer
                .buffer(entry, Direction::HostToController, traits.data)
                .await?;
            controller.features().set_data(feature, &buf.to_vec())?;
            return Ok(0);
        }
        match feature {
            FeatureId::VOLATILE_WRITE_CACHE => self.set_write_cache(value & 1 != 0).await?,
            FeatureId::NUMBER_OF_QUEUES => {
                let allotted = controller.allot(NumberOfQueues::from_bits(value))?;
                return Ok(allotted.into_bits().into());
            }
            FeatureId::ASYNC_EVENT_CONFIGURATION => {
                controller.events.configure(EventConfiguration::from_bits(value));
            }
            _ => {
                let namespaces = controller.named(traits, nsid)?;
                let mut values = controller.features();
                values.set(feature, value, &namespaces)?;
                let critical =
                    feature == FeatureId::TEMPERATURE_THRESHOLD && values.is_temperature_critical();
                drop(values);
                if critical {
                    controller.events.raise(Event::Temperature);
                }
            }
        }
        Ok(0)
    }

    /// From now on each write is durable before it completes, or not. What lies in the cache comes out of it.
    async fn set_write_cache(&self, enabled: bool) -> Result<(), Failure> {
        self.controller.write_cache.store(enabled, Ordering::Relaxed);
        if enabled {
            return Ok(());
        }
        for (namespace, lane) in self.controller.subsystem().namespaces().iter().zip(&self.lanes) {
            namespace.flush(lane).await?;
        }
        Ok(())
    }
}

impl Controller {
    /// Places of the namespaces that a feature is asked for or set for. One that has nothing to do with namespaces has
    /// one value, in place 0.
    fn named(&self, traits: Traits, nsid: u32) -> Result<Vec<usize>, Failure> {
        if !traits.namespace_specific {
            return Ok(vec![0]);
        }
        if nsid == NSID_ALL {
            return Ok((0..self.subsystem().namespaces().len()).collect());
        }
        match (self.active(nsid), index(nsid)) {
            (Some(_), Some(place)) => Ok(vec![place]),
            _ => Err(Status::INVALID_NAMESPACE_OR_FORMAT.into()),
        }
    }

    fn default_features(&self) -> Values {
        self.new_features()
    }
}
