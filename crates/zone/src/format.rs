//! Block sizes that a device can be given while it is in use.
//!
//! Everything is counted in bytes, so a block size is only what requests are checked against. It changes while every zone
//! is held by an [`ExclusiveOp::Format`], empty. A request that was checked against the old size and comes to its zone
//! later is checked once more there, under the zone's lock.
//!
//! [`ExclusiveOp::Format`]: crate::ExclusiveOp::Format

use crate::engine::Engine;
use crate::geometry::Geometry;
use crate::permit::ExclusivePermit;
use crate::sync::Ordering;

impl Engine {
    /// With the formats that the device can have: its geometry with several block sizes, at most 256, the one that it has
    /// now among them.
    ///
    /// # Panics
    /// Where it is not among them.
    #[must_use]
    pub fn with_formats(mut self, formats: Vec<Geometry>) -> Engine {
        let now = self.geometry();
        let index = formats.iter().position(|format| format == now);
        let index = index.and_then(|index| u8::try_from(index).ok());
        self.format = index
            .expect("the device's own format is among the first 256")
            .into();
        self.formats = formats.into();
        self
    }

    /// The formats that the device can have; one, unless [`Engine::with_formats`] gave it others.
    pub fn formats(&self) -> &[Geometry] {
        &self.formats
    }

    /// The shape of the device, with the block size that it has now.
    #[inline]
    pub fn geometry(&self) -> &Geometry {
        &self.formats[self.format_index()]
    }

    /// Which of [`Engine::formats`] the device has now.
    #[inline]
    pub fn format_index(&self) -> usize {
        usize::from(self.format.load(Ordering::Acquire))
    }

    /// Gives the device another of its formats, before the permits are committed.
    ///
    /// # Panics
    /// Where there is no such format, or `held` are not as many zones as there are.
    pub fn set_format(&self, index: usize, held: &[ExclusivePermit]) {
        assert!(index < self.formats.len(), "there is no format {index}");
        assert_eq!(held.len(), self.geometry.nr_zones() as usize, "zones are in use");
        self.format.store(index as u8, Ordering::Release);
    }
}
