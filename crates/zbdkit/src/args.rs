//! Numbers and names on the command line.

use clap::ValueEnum;
use zbdkit_block::parse_size;
use zbdkit_qcow2::Preallocation;

/// A size or offset in bytes, as in `64M`, `0x1000` or `128s` (512-byte sectors).
pub fn bytes(text: &str) -> Result<u64, String> {
    let sectors = text
        .strip_suffix('s')
        .map(|sectors| parse_size(sectors).and_then(|number| number.checked_mul(512)));
    sectors
        .unwrap_or_else(|| parse_size(text))
        .ok_or_else(|| "not a size in bytes, as in 4096, 64M, 0x1000 or 128s (512-byte sectors)".to_owned())
}

/// A count.
pub fn count(text: &str) -> Result<u32, String> {
    parse_size(text)
        .and_then(|number| u32::try_from(number).ok())
        .ok_or_else(|| "not a number below 2^32".to_owned())
}

/// How results are printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OutputArg {
    /// For people
    Human,
    /// For programs
    Json,
}

/// What gets its space at once.
pub fn preallocation(text: &str) -> Result<Preallocation, String> {
    match text {
        "off" => Ok(Preallocation::Off),
        "metadata" => Ok(Preallocation::Metadata),
        "falloc" => Ok(Preallocation::Falloc),
        "full" => Ok(Preallocation::Full),
        _ => Err("expected off, metadata, falloc or full".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sectors_can_be_pasted_from_a_report() {
        assert_eq!(bytes("0x20000s"), Ok(64 << 20));
        assert_eq!(bytes("8s"), Ok(4096));
        assert_eq!(bytes("64M"), Ok(64 << 20));
        assert!(bytes("s").is_err() && bytes("64X").is_err() && bytes("18446744073709551615s").is_err());
    }
}
