//! qemu-io's numbers and what it says about wrong ones.

use zbdkit_block::parse_size;

/// Reads a number of bytes; the error is qemu-io's message.
pub fn number(text: &str) -> Result<u64, String> {
    let too_large = || format!("Parsing error: argument too large -- {text}");
    match parse_size(text) {
        Some(number) if i64::try_from(number).is_ok() => Ok(number),
        Some(_) => Err(too_large()),
        None if is_numeric(text) => Err(too_large()),
        None => Err(format!(
            "Parsing error: non-numeric argument, or extraneous/unrecognized suffix -- {text}"
        )),
    }
}

/// A number by its looks, which only does not fit.
fn is_numeric(text: &str) -> bool {
    if let Some(positive) = text.strip_prefix('-') {
        return parse_size(positive).is_some();
    }
    if let Some(hex) = text.strip_prefix("0x") {
        return !hex.is_empty() && hex.bytes().all(|b| b.is_ascii_hexdigit());
    }
    let digits = text
        .strip_suffix(|c: char| "bBkKmMgGtTpPeE".contains(c))
        .unwrap_or(text);
    !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit())
}

/// Reads a pattern byte (C's number prefixes); the error is qemu-io's message.
pub fn pattern(text: &str) -> Result<u8, String> {
    let (digits, radix) = match text.as_bytes() {
        [b'0', b'x' | b'X', ..] => (&text[2..], 16),
        [b'0', _, ..] => (&text[1..], 8),
        _ => (text, 10),
    };
    u8::from_str_radix(digits, radix)
        .ok()
        .filter(|_| !digits.starts_with('+'))
        .ok_or_else(|| format!("{text} is not a valid pattern byte"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_their_errors_are_qemu_ios() {
        assert_eq!(number("64M"), Ok(64 << 20));
        assert_eq!(number("0x1ffd000"), Ok(0x1ff_d000));
        for text in ["foo", "", "1x", "1.5", "0x"] {
            let expected =
                format!("Parsing error: non-numeric argument, or extraneous/unrecognized suffix -- {text}");
            assert_eq!(number(text), Err(expected));
        }
        for text in [
            "-1",
            "99999999999999999999",
            "16E",
            "9223372036854775808",
            "0x11111111111111111",
        ] {
            assert_eq!(
                number(text),
                Err(format!("Parsing error: argument too large -- {text}"))
            );
        }
    }

    #[test]
    fn patterns_are_bytes() {
        assert_eq!(pattern("0xab"), Ok(0xab));
        assert_eq!(pattern("17"), Ok(17));
        assert_eq!(pattern("0"), Ok(0));
        assert_eq!(pattern("010"), Ok(8));
        for text in ["300", "foo", "-1", "", "0x", "+1"] {
            assert!(pattern(text).is_err(), "{text}");
        }
    }
}
