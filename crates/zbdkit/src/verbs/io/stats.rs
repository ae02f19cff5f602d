//! The lines that tell what a transfer did and how fast.

use std::fmt::Write;
use std::time::Duration;

/// What was transferred.
#[derive(Clone, Copy, Debug)]
pub struct Transfer {
    /// "wrote", "read" or "discard".
    pub word: &'static str,
    pub offset: u64,
    pub len: u64,
    pub time: Duration,
}

impl Transfer {
    /// The two lines for people.
    pub fn lines(&self) -> String {
        let Transfer {
            word,
            offset,
            len,
            time,
        } = *self;
        format!(
            "{word} {len}/{len} bytes at offset {offset}\n{}, 1 ops; {} ({}/sec and {:.4} ops/sec)",
            size(len as f64),
            duration(time),
            size(per_second(len as f64, time)),
            per_second(1.0, time)
        )
    }

    /// The line for programs.
    pub fn machine_line(&self) -> String {
        let seconds = self.time.as_secs();
        format!(
            "{},1,{}:{:02}:{:05.2},{:.3},{:.3}",
            self.len,
            seconds / 3600,
            seconds / 60 % 60,
            (seconds % 60) as f64 + self.time.subsec_millis() as f64 / 1000.0,
            per_second(self.len as f64, self.time),
            per_second(1.0, self.time)
        )
    }
}

fn per_second(amount: f64, time: Duration) -> f64 {
    // The clock is finer than any transfer; a zero would only print as infinity.
    amount / time.as_secs_f64().max(1e-9)
}

/// A size with up to three decimals.
pub fn size(bytes: f64) -> String {
    const UNITS: [&str; 7] = ["bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut value = bytes;
    let mut unit = 0;
    while value >= 1024.0 && unit < UNITS.len() - 1 {
        value /= 1024.0;
        unit += 1;
    }
    let text = format!("{value:.3}");
    format!("{} {}", text.strip_suffix(".000").unwrap_or(&text), UNITS[unit])
}

fn duration(time: Duration) -> String {
    let seconds = time.as_secs();
    if seconds < 60 {
        return format!("{:05.2} sec", time.as_secs_f64());
    }
    format!(
        "{}:{:02}:{:02}.{:02}",
        seconds / 3600,
        seconds / 60 % 60,
        seconds % 60,
        time.subsec_millis() / 10
    )
}

/// A hex dump of `data`, which lies at `offset` of the device.
pub fn dump(data: &[u8], offset: u64) -> String {
    let mut text = String::new();
    for (row, bytes) in data.chunks(16).enumerate() {
        let _ = write!(text, "{:08x}:  ", offset + 16 * row as u64);
        for byte in bytes {
            let _ = write!(text, "{byte:02x} ");
        }
        text.push(' ');
        text.extend(bytes.iter().map(|byte| {
            if byte.is_ascii_alphanumeric() {
                char::from(*byte)
            } else {
                '.'
            }
        }));
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_qemu_ios() {
        let transfer = Transfer {
            word: "wrote",
            offset: 8192,
            len: 1536,
            time: Duration::from_millis(500),
        };
        assert_eq!(
            transfer.lines(),
            "wrote 1536/1536 bytes at offset 8192\n1.500 KiB, 1 ops; 00.50 sec (3 KiB/sec and 2.0000 ops/sec)"
        );
        assert_eq!(transfer.machine_line(), "1536,1,0:00:00.50,3072.000,2.000");
    }

    #[test]
    fn dumps_show_letters_and_digits() {
        assert_eq!(
            dump(b"zone 3\0", 512),
            "00000200:  7a 6f 6e 65 20 33 00  zone.3.\n"
        );
    }
}
