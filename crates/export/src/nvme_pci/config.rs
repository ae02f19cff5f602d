//! PCI configuration space of an NVMe controller: type 0 header, power management, PCI Express and MSI-X.
//!
//! The register names and offsets are those of PCI Local Bus 3.0 (6.1, 6.8.2) and PCI Express Base 6.0 (7.5.3).

/// Bytes of configuration space, the extended one included.
pub(super) const SIZE: usize = 4096;

/// Nobody assigned us a vendor ID; this one ("zb") is free. No driver looks at it: NVMe is found by its class.
pub(super) const VENDOR_ID: u16 = 0x7a62;
const DEVICE_ID: u16 = 0x0001;
/// Mass storage, non-volatile memory, NVM Express.
const CLASS: [u8; 3] = [0x02, 0x08, 0x01];

const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const BAR0: usize = 0x10;
const CAPABILITIES: usize = 0x34;

/// Capability list: power management at 40h, then PCI Express, then MSI-X.
const PM: usize = 0x40;
const EXPRESS: usize = 0x50;
const MSIX: usize = 0x90;

/// BAR0: 64 bits, not prefetchable.
const BAR_64BIT: u32 = 0b100;
/// Status: there is a capability list.
const STATUS_CAPABILITIES: u16 = 1 << 4;
/// Device Control: Initiate Function Level Reset.
const INITIATE_FLR: u16 = 1 << 15;

/// Where things are in BAR0.
#[derive(Clone, Copy, Debug)]
pub(super) struct Layout {
    /// Bytes of BAR0, a power of two.
    pub bar_size: u64,
    /// MSI-X table.
    pub msix_table: u32,
    /// Pending bits.
    pub msix_pba: u32,
    /// MSI-X vectors, 1 to 2048.
    pub vectors: u16,
}

/// The configuration space of one function.
#[derive(Debug)]
pub(super) struct ConfigSpace {
    bytes: Box<[u8; SIZE]>,
    /// Bits that a write changes.
    writable: Box<[u8; SIZE]>,
}

impl ConfigSpace {
    pub(super) fn new(layout: &Layout) -> ConfigSpace {
        let mut config = ConfigSpace {
            bytes: Box::new([0; SIZE]),
            writable: Box::new([0; SIZE]),
        };
        config.header(layout);
        config.power_management();
        config.express();
        config.msix(layout);
        config
    }

    fn header(&mut self, layout: &Layout) {
        self.set16(0x00, VENDOR_ID);
        self.set16(0x02, DEVICE_ID);
        // Memory space, bus master, parity and SERR, interrupt disable.
        self.allow16(COMMAND, 0b101_0100_0110);
        self.set16(STATUS, STATUS_CAPABILITIES);
        self.bytes[0x09..0x0c].copy_from_slice(&CLASS);
        // Cache line size: any, and of no effect.
        self.writable[0x0c] = 0xff;
        self.set32(BAR0, BAR_64BIT);
        // A driver finds the size of a BAR by the bits that do not take ones.
        let address = !(layout.bar_size - 1);
        self.allow32(BAR0, address as u32);
        self.allow32(BAR0 + 4, (address >> 32) as u32);
        self.set16(0x2c, VENDOR_ID);
        self.set16(0x2e, DEVICE_ID);
        self.bytes[CAPABILITIES] = PM as u8;
        // Interrupt line: the firmware's note. There is no interrupt pin.
        self.writable[0x3c] = 0xff;
    }

    fn power_management(&mut self) {
        self.set16(PM, 0x01 | (EXPRESS as u16) << 8);
        // Version 3.
        self.set16(PM + 2, 3);
        // No soft reset: the state survives D3hot. The power state can be written.
        self.set16(PM + 4, 1 << 3);
        self.allow16(PM + 4, 0b11);
    }

    fn express(&mut self) {
        self.set16(EXPRESS, 0x10 | (MSIX as u16) << 8);
        // Version 2, an endpoint.
        self.set16(EXPRESS + 0x02, 2);
        // Role-based error reporting, function level reset.
        self.set32(EXPRESS + 0x04, 1 << 15 | 1 << 28);
        // Error reporting, relaxed ordering, payload and read request sizes, no snoop. FLR is seen by `write`.
        self.allow16(EXPRESS + 0x08, 0x7fff);
        self.set16(EXPRESS + 0x08, 0x2810);
        // 2.5 GT/s, one lane, as can be and as is.
        self.set32(EXPRESS + 0x0c, 0x11);
        self.set16(EXPRESS + 0x12, 0x11);
        // Completion timeouts can be turned off.
        self.set32(EXPRESS + 0x24, 1 << 4);
        self.allow16(EXPRESS + 0x28, 0x1f);
        self.set32(EXPRESS + 0x2c, 1 << 1);
        self.set16(EXPRESS + 0x30, 1);
    }

    fn msix(&mut self, layout: &Layout) {
        self.set16(MSIX, 0x11);
        self.set16(MSIX + 2, layout.vectors - 1);
        // Enable, and mask all. Whoever has the vectors keeps to them, which is the client.
        self.allow16(MSIX + 2, 0xc000);
        self.set32(MSIX + 4, layout.msix_table);
        self.set32(MSIX + 8, layout.msix_pba);
    }

    /// Fills `out` from `offset`, zeros beyond the end.
    pub(super) fn read(&self, offset: u64, out: &mut [u8]) {
        out.fill(0);
        let from = usize::try_from(offset).unwrap_or(SIZE).min(SIZE);
        let len = out.len().min(SIZE - from);
        out[..len].copy_from_slice(&self.bytes[from..from + len]);
    }

    /// Takes a write. Returns whether it asks for a function level reset.
    pub(super) fn write(&mut self, offset: u64, data: &[u8]) -> bool {
        let from = usize::try_from(offset).unwrap_or(SIZE).min(SIZE);
        let mut flr = false;
        for (at, byte) in (from..SIZE).zip(data) {
            let mask = self.writable[at];
            self.bytes[at] = self.bytes[at] & !mask | byte & mask;
            // The bit always reads as zero.
            flr |= at == EXPRESS + 0x09 && byte & (INITIATE_FLR >> 8) as u8 != 0;
        }
        flr
    }

    fn set16(&mut self, at: usize, value: u16) {
        self.bytes[at..at + 2].copy_from_slice(&value.to_le_bytes());
    }

    fn set32(&mut self, at: usize, value: u32) {
        self.bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }

    fn allow16(&mut self, at: usize, mask: u16) {
        self.writable[at..at + 2].copy_from_slice(&mask.to_le_bytes());
    }

    fn allow32(&mut self, at: usize, mask: u32) {
        self.writable[at..at + 4].copy_from_slice(&mask.to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LAYOUT: Layout = Layout {
        bar_size: 0x4000,
        msix_table: 0x2000,
        msix_pba: 0x3000,
        vectors: 17,
    };

    fn read32(config: &ConfigSpace, at: u64) -> u32 {
        let mut bytes = [0; 4];
        config.read(at, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    #[test]
    fn a_driver_finds_an_nvme_controller_and_its_capabilities() {
        let config = ConfigSpace::new(&LAYOUT);
        assert_eq!(read32(&config, 0x08) >> 8, 0x01_0802);
        let mut found = Vec::new();
        let mut at = read32(&config, 0x34) & 0xff;
        while at != 0 {
            let header = read32(&config, at.into());
            found.push(header & 0xff);
            at = header >> 8 & 0xff;
        }
        assert_eq!(found, [0x01, 0x10, 0x11]);
        assert_eq!(read32(&config, MSIX as u64) >> 16, 16, "17 vectors, 0-based");
    }

    #[test]
    fn the_size_of_the_bar_is_found_by_writing_ones() {
        let mut config = ConfigSpace::new(&LAYOUT);
        config.write(0x10, &[0xff; 8]);
        assert_eq!(
            (read32(&config, 0x10), read32(&config, 0x14)),
            (0xffff_c004, 0xffff_ffff)
        );
        config.write(0x10, &0x1_2345_c000u64.to_le_bytes());
        assert_eq!((read32(&config, 0x10), read32(&config, 0x14)), (0x2345_c004, 1));
        // The other BARs do not exist.
        config.write(0x18, &[0xff; 16]);
        assert_eq!(read32(&config, 0x18), 0);
    }

    #[test]
    fn what_may_not_be_written_stays() {
        let mut config = ConfigSpace::new(&LAYOUT);
        let before = read32(&config, 0);
        config.write(0, &[0xff; 4]);
        assert_eq!(read32(&config, 0), before);
        config.write(4090, &[0xff; 100]);
        config.write(u64::MAX, &[0xff]);
        assert_eq!(read32(&config, 4092), 0);
        let mut beyond = [7; 8];
        config.read(4092, &mut beyond);
        assert_eq!(beyond, [0; 8]);
    }

    #[test]
    fn a_function_level_reset_is_seen_in_writes_of_any_width_and_reads_as_zero() {
        let control = (EXPRESS + 8) as u64;
        let mut config = ConfigSpace::new(&LAYOUT);
        assert!(config.write(control, &[0, 0x80]));
        assert!(config.write(control + 1, &[0x80]));
        assert!(config.write(control - 4, &[0, 0, 0, 0, 0, 0x80, 0, 0]));
        assert!(!config.write(control, &[0xff, 0x7f]));
        assert_eq!(read32(&config, control) & 0x8000, 0);
    }
}
