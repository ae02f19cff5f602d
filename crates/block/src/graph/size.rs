//! Sizes as QEMU's users write them.

/// Reads `64M`, `1.5G`, `0x1000`, `4096`, `2k`: bytes with a binary suffix (b, k, M, G, T, P, E; upper or lower case).
/// `None` where it is no such number or does not fit 64 bits.
pub fn parse_size(text: &str) -> Option<u64> {
    let text = text.trim();
    if let Some(hex) = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        return u64::from_str_radix(hex, 16).ok();
    }
    let (number, shift) = match text.char_indices().next_back()? {
        (at, suffix) if suffix.is_ascii_alphabetic() => {
            let shift = 10 * "bkmgtpe".find(suffix.to_ascii_lowercase())? as u32;
            (&text[..at], shift)
        }
        _ => (text, 0),
    };
    match number.split_once('.') {
        None => digits(number)?.checked_mul(1 << shift),
        // A fraction must come out as whole bytes closely enough for its digits: as QEMU, the rest is cut.
        Some((whole, fraction)) if shift > 0 && fraction.len() <= 15 => {
            let scale = 10u128.pow(fraction.len() as u32);
            let value = u128::from(digits(whole)?) * scale + u128::from(digits(fraction)?);
            u64::try_from(value.checked_mul(1 << shift)? / scale).ok()
        }
        Some(_) => None,
    }
}

fn digits(text: &str) -> Option<u64> {
    if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    text.parse().ok()
}

/// Writes a size as a person reads it: `64 MiB`, `1.5 GiB`, `512 bytes`.
pub fn format_size(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let unit = (u64::BITS - 1 - bytes.max(1).leading_zeros()) / 10;
    let name = UNITS[unit as usize];
    let (whole, rest) = (bytes >> (10 * unit), bytes & ((1 << (10 * unit)) - 1));
    if rest == 0 {
        return format!("{whole} {name}");
    }
    let value = bytes as f64 / (1u64 << (10 * unit)) as f64;
    let text = format!("{value:.3}");
    format!("{} {name}", text.trim_end_matches('0').trim_end_matches('.'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_as_qemu_reads_them() {
        for (text, bytes) in [
            ("0", 0),
            ("512", 512),
            ("2k", 2048),
            ("64M", 64 << 20),
            ("1.5G", 3 << 29),
            ("0x1000", 4096),
            ("1b", 1),
        ] {
            assert_eq!(parse_size(text), Some(bytes), "{text}");
        }
        for text in [
            "",
            "M",
            "-1",
            "1.5",
            "1x",
            "16E",
            "99999999999999999999",
            "1..5k",
            "0x",
            "1 2",
            "é",
        ] {
            assert_eq!(parse_size(text), None, "{text}");
        }
    }

    #[test]
    fn sizes_print_as_people_read_them() {
        for (bytes, text) in [
            (0, "0 bytes"),
            (512, "512 bytes"),
            (64 << 20, "64 MiB"),
            (3 << 29, "1.5 GiB"),
            (u64::MAX, "16 EiB"),
            (1 << 48, "256 TiB"),
        ] {
            assert_eq!(format_size(bytes), text);
        }
    }
}
