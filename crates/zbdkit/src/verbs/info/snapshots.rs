//! qemu-img's table of snapshots.

use std::fmt::Write;

use zbdkit_qcow2::Snapshot;

use crate::output::{printable, qemu_size};

/// The table.
pub fn table(snapshots: &[Snapshot]) -> String {
    let mut text = String::from("Snapshot list:\n");
    let mut line = |id: &str, tag: &str, size: &str, date: &str, clock: &str, icount: &str| {
        // Writing to a string cannot fail.
        let _ = writeln!(
            text,
            "{id:<7} {tag:<16} {size:>8} {date:>19} {clock:>15} {icount:>10}"
        );
    };
    line("ID", "TAG", "VM_SIZE", "DATE", "VM_CLOCK", "ICOUNT");
    for snapshot in snapshots {
        line(
            &printable(&snapshot.id),
            &printable(&snapshot.name),
            &qemu_size(snapshot.vm_state_size),
            &local_time(snapshot.date_sec),
            &clock(snapshot.vm_clock_nsec),
            &snapshot
                .icount
                .map_or_else(|| "--".to_owned(), |count| count.to_string()),
        );
    }
    text
}

/// Hours, minutes, seconds and milliseconds.
fn clock(nanoseconds: u64) -> String {
    let milliseconds = nanoseconds / 1_000_000;
    let seconds = milliseconds / 1000;
    format!(
        "{:04}:{:02}:{:02}.{:03}",
        seconds / 3600,
        seconds / 60 % 60,
        seconds % 60,
        milliseconds % 1000
    )
}

/// The user's local time, as qemu-img prints it.
fn local_time(seconds: u32) -> String {
    in_zone(seconds, jiff::tz::TimeZone::system())
}

fn in_zone(seconds: u32, zone: jiff::tz::TimeZone) -> String {
    // Every u32 is a second that jiff knows.
    jiff::Timestamp::from_second(seconds.into())
        .unwrap_or_default()
        .to_zoned(zone)
        .strftime("%Y-%m-%d %H:%M:%S")
        .to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn snapshot(id: &str, name: &str) -> Snapshot {
        Snapshot {
            id: id.to_owned(),
            name: name.to_owned(),
            l1_offset: 65536,
            l1_size: 1,
            date_sec: 0,
            date_nsec: 0,
            vm_clock_nsec: 0,
            vm_state_size: 0,
            disk_size: 1 << 30,
            icount: Some(0),
            extra: Vec::new(),
        }
    }

    #[test]
    fn the_table_is_qemu_imgs() {
        let date = local_time(0);
        let guest = Snapshot {
            vm_clock_nsec: (3 * 3600 + 25 * 60 + 45) * 1_000_000_000 + 678_999_999,
            vm_state_size: 123_456_789,
            icount: None,
            ..snapshot(
                "2",
                "a very long name of a snapshot that does not fit in the table",
            )
        };
        assert_eq!(
            table(&[snapshot("1", "snap1"), guest]),
            format!(
                "Snapshot list:\n\
                 ID      TAG               VM_SIZE                DATE        VM_CLOCK     ICOUNT\n\
                 1       snap1                 0 B {date}  0000:00:00.000          0\n\
                 2       a very long name of a snapshot that does not fit in the table  118 MiB {date}  0003:25:45.678         --\n"
            )
        );
    }

    #[test]
    fn dates_are_calendar_dates() {
        let utc = |seconds| in_zone(seconds, jiff::tz::TimeZone::UTC);
        assert_eq!(utc(0), "1970-01-01 00:00:00");
        assert_eq!(utc(1_709_210_096), "2024-02-29 12:34:56");
        assert_eq!(utc(u32::MAX), "2106-02-07 06:28:15");
    }
}
