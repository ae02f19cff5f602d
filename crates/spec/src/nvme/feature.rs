//! Features (NVM Express Base Specification 2.1, 5.1.25.1): their identifiers and values.

use bitfield_struct::bitfield;

open_enum! {
    /// Feature identifiers (figure 385).
    pub struct FeatureId(u8) {
        ARBITRATION = 0x01,
        POWER_MANAGEMENT = 0x02,
        TEMPERATURE_THRESHOLD = 0x04,
        ERROR_RECOVERY = 0x05,
        VOLATILE_WRITE_CACHE = 0x06,
        NUMBER_OF_QUEUES = 0x07,
        INTERRUPT_COALESCING = 0x08,
        INTERRUPT_VECTOR_CONFIGURATION = 0x09,
        WRITE_ATOMICITY_NORMAL = 0x0a,
        ASYNC_EVENT_CONFIGURATION = 0x0b,
        TIMESTAMP = 0x0e,
        KEEP_ALIVE_TIMER = 0x0f,
        HOST_BEHAVIOR_SUPPORT = 0x16,
        COMMAND_SET_PROFILE = 0x19,
        HOST_IDENTIFIER = 0x81,
    }
}

/// Number of Queues: dword 11 of Set Features, dword 0 of both completions.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct NumberOfQueues {
    /// I/O submission queues, 0-based.
    pub nsq_z: u16,
    /// I/O completion queues, 0-based.
    pub ncq_z: u16,
}

/// Asynchronous Event Configuration: which events are reported. OAES of Identify Controller has the same bits.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct EventConfiguration {
    /// Critical warnings of the SMART log.
    pub smart: u8,
    /// Namespace attributes changed.
    pub namespace_attribute: bool,
    /// Firmware activation.
    pub firmware: bool,
    #[bits(17)]
    __: u32,
    /// Zone descriptors changed (Zoned Namespace Command Set 4.1.1).
    pub zone_descriptor: bool,
    #[bits(4)]
    __: u8,
}

/// Dword 11 of Temperature Threshold.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct TemperatureThreshold {
    /// Kelvins.
    pub tmpth: u16,
    /// Which sensor: 0 the composite temperature, 1 to 8 a sensor, 15 all (Set Features only).
    #[bits(4)]
    pub tmpsel: u8,
    /// 0 over, 1 under temperature.
    #[bits(2)]
    pub thsel: u8,
    #[bits(10)]
    __: u16,
}

/// Dword 0 of Get Features that asks for supported capabilities (figure 193).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct Capabilities {
    /// The value can be saved.
    pub saveable: bool,
    /// Each namespace has a value.
    pub namespace_specific: bool,
    /// The value can be changed.
    pub changeable: bool,
    #[bits(29)]
    __: u32,
}

/// Bytes of the Timestamp data structure.
pub const TIMESTAMP_BYTES: usize = 8;
/// Bytes of the Host Behavior Support data structure.
pub const HOST_BEHAVIOR_BYTES: usize = 512;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_have_their_bits_where_the_specification_has_them() {
        let queues = NumberOfQueues::new().with_nsq_z(3).with_ncq_z(7);
        assert_eq!(queues.into_bits(), 0x0007_0003);
        let events = EventConfiguration::new()
            .with_namespace_attribute(true)
            .with_zone_descriptor(true);
        assert_eq!(events.into_bits(), 1 << 8 | 1 << 27);
        let threshold = TemperatureThreshold::new().with_tmpsel(15).with_thsel(1);
        assert_eq!(threshold.into_bits(), 0x001f_0000);
        assert_eq!(Capabilities::new().with_changeable(true).into_bits(), 4);
    }
}
