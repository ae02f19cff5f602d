//! The commands: names, numbers of arguments, help; and from a line to the command that it names.

use std::time::Duration;

use zbdkit_block::format_size;

use super::number::number;
use super::stats::size;
use super::zone::operation;
use super::{Shell, Step};
use crate::output::complain_plain;

/// A command.
#[derive(Debug)]
pub struct Command {
    pub name: &'static str,
    short: &'static str,
    /// Words behind the name, at least and at most.
    min: usize,
    max: Option<usize>,
    /// An option that is not counted among them.
    flag: Option<&'static str>,
    arguments: &'static str,
    what: &'static str,
    more: &'static str,
}

const fn command(
    name: &'static str,
    short: &'static str,
    min: usize,
    max: Option<usize>,
    arguments: &'static str,
    what: &'static str,
) -> Command {
    Command {
        name,
        short,
        min,
        max,
        flag: None,
        arguments,
        what,
        more: "",
    }
}

const WRITE_OPTIONS: &str = "
 -C, -- report statistics in a machine parsable format
 -f, -- flush as well (Force Unit Access)
 -P, -- fill with this byte instead of 0xcd
 -q, -- quiet, do not show statistics
 -s, -- fill from this file, repeated (write only)
 -u, -- with -z, give the space back
 -z, -- write zeroes
 -n, -p, -r -- accepted and without effect

 Example: 'write -P 0xab 512 1k' - writes 1 kilobyte at 512 bytes";

const READ_OPTIONS: &str = "
 -C, -- report statistics in a machine parsable format
 -P, -- verify that the data is this byte
 -s, -l -- with -P, verify from this offset in the data, this length (read only)
 -q, -- quiet, do not show statistics
 -v, -- dump the data
 -a, -p, -r -- accepted and without effect

 Example: 'read -v 512 1k' - dumps 1 kilobyte read from 512 bytes";

const OPEN_MORE: &str = "
 -r, -- with a random write area (ZRWA): what is written in it, behind the write
        pointer, can be written in any order and again, until it is committed.
        Only for zones that are empty or closed; they keep it until they are full,
        reset or finished

 Example: 'zo -r 64M 64M' - opens the zone at 64 MiB with a random write area";

const COMMIT_MORE: &str = "
 The write pointer moves to the end: what lies below is written for good. It lies
 in the random write area (ZRWA) or at its end, and is a multiple of the device's
 granularity from the zone's start, or the end of the zone's capacity.

 Example: 'zcm 0x4010000' - commits the first 64 KiB of the zone at 64 MiB";

const SET_EXT_MORE: &str = "
 -f, -- the content is that of this file; what it is too short for are zeros
 -P, -- fill with this byte instead of 0xcd
 -r, -- the zone gets a random write area as well; where none is left, neither

 The zone is closed afterwards, and keeps the extension until it is reset.

 Example: 'zse -P 0x5a 64M' - attaches an extension to the zone at 64 MiB";

const GET_EXT_MORE: &str = "
 -f, -- write it to this file instead of dumping it

 Example: 'zge 64M' - dumps the extension of the zone at 64 MiB";

const UNCORRECTABLE_MORE: &str = "
 In whole blocks, and in a sequential zone a write as any other: at the write
 pointer, which moves. A reset of the zone takes it back, too.

 Example: 'wu 64M 4k' - marks the first 4 KiB of the zone at 64 MiB";

/// Sorted by name, as the help shows them.
static COMMANDS: [Command; 24] = [
    command(
        "aio_flush",
        "",
        0,
        Some(0),
        "",
        "completes all outstanding aio requests and tells their results",
    ),
    Command {
        more: READ_OPTIONS,
        ..command(
            "aio_read",
            "",
            2,
            None,
            "[-Ciqrv] [-P pattern] off len [len..]",
            "asynchronously reads a number of bytes",
        )
    },
    Command {
        more: WRITE_OPTIONS,
        ..command(
            "aio_write",
            "",
            2,
            None,
            "[-Cfiqruz] [-P pattern] off len [len..]",
            "asynchronously writes a number of bytes",
        )
    },
    command(
        "discard",
        "d",
        2,
        None,
        "[-Cq] off len",
        "discards a number of bytes at a specified offset",
    ),
    command(
        "flush",
        "f",
        0,
        Some(0),
        "",
        "flush all in-core file state to disk",
    ),
    command(
        "help",
        "?",
        0,
        Some(1),
        "[command]",
        "help for one or all commands",
    ),
    command(
        "info",
        "i",
        0,
        Some(0),
        "",
        "prints information about the current file",
    ),
    command(
        "length",
        "l",
        0,
        Some(0),
        "",
        "gets the length of the current file",
    ),
    command("quit", "q", 0, Some(0), "", "exit the program"),
    Command {
        more: READ_OPTIONS,
        ..command(
            "read",
            "r",
            2,
            None,
            "[-abCqrv] [-P pattern [-s off] [-l len]] off len",
            "reads a number of bytes at a specified offset",
        )
    },
    Command {
        more: READ_OPTIONS,
        ..command(
            "readv",
            "rv",
            2,
            None,
            "[-Cqrv] [-P pattern] off len [len..]",
            "reads a number of bytes at a specified offset",
        )
    },
    command(
        "sleep",
        "",
        1,
        Some(1),
        "",
        "waits for the given value in milliseconds",
    ),
    Command {
        more: WRITE_OPTIONS,
        ..command(
            "write",
            "w",
            2,
            None,
            "[-bcCfnqruz] [-P pattern | -s source_file] off len",
            "writes a number of bytes at a specified offset",
        )
    },
    Command {
        more: UNCORRECTABLE_MORE,
        ..command(
            "write_uncor",
            "wu",
            2,
            Some(2),
            "off len",
            "makes reads of a range fail until it is written again",
        )
    },
    Command {
        more: WRITE_OPTIONS,
        ..command(
            "writev",
            "wv",
            2,
            None,
            "[-Cfqr] [-P pattern] off len [len..]",
            "writes a number of bytes at a specified offset",
        )
    },
    Command {
        more: "\n -p, -- print where the data went, in 512-byte sectors\n\n Example: 'zap -p 64M 4k' - appends to the zone at 64 MiB",
        ..command(
            "zone_append",
            "zap",
            2,
            None,
            "offset len [len..]",
            "append write a number of bytes at a specified offset",
        )
    },
    command(
        "zone_close",
        "zc",
        2,
        Some(2),
        "offset len",
        "close a range of zones in zone block device",
    ),
    Command {
        more: COMMIT_MORE,
        ..command(
            "zone_commit",
            "zcm",
            1,
            Some(1),
            "end",
            "commit the random write area of a zone up to an offset",
        )
    },
    command(
        "zone_finish",
        "zf",
        2,
        Some(2),
        "offset len",
        "finish a range of zones in zone block device",
    ),
    Command {
        more: GET_EXT_MORE,
        ..command(
            "zone_get_ext",
            "zge",
            1,
            None,
            "[-f file] start",
            "show the descriptor extension of a zone",
        )
    },
    Command {
        flag: Some("-r"),
        more: OPEN_MORE,
        ..command(
            "zone_open",
            "zo",
            2,
            Some(2),
            "[-r] offset len",
            "explicit open a range of zones in zone block device",
        )
    },
    command(
        "zone_report",
        "zrp",
        2,
        Some(2),
        "offset number",
        "report zone information",
    ),
    command(
        "zone_reset",
        "zrs",
        2,
        Some(2),
        "offset len",
        "reset a zone write pointer in zone block device",
    ),
    Command {
        more: SET_EXT_MORE,
        ..command(
            "zone_set_ext",
            "zse",
            1,
            None,
            "[-f file | -P pattern] [-r] start",
            "attach a descriptor extension to an empty zone",
        )
    },
];

fn find(name: &str) -> Option<&'static Command> {
    let called = |command: &&Command| command.name == name || (command.short == name && !name.is_empty());
    COMMANDS.iter().find(called)
}

impl Command {
    fn usage(&self, called: &str) -> String {
        format!("{called} {} -- {}", self.arguments, self.what)
    }

    /// What is wrong with a number of words, as qemu-io says it.
    fn wrong_count(&self, called: &str, words: usize) -> Option<String> {
        let expected = match (self.min, self.max) {
            (min, None) if words < min => format!("at least {min} arguments"),
            (min, Some(max)) if min == max && words != min => format!("{min} arguments"),
            (min, Some(max)) if words < min || words > max => format!("between {min} and {max} arguments"),
            _ => return None,
        };
        Some(format!(
            "bad argument count {words} to {called}, expected {expected}"
        ))
    }
}

impl Shell {
    /// Runs one line, and hands over what it printed.
    pub async fn command(&mut self, line: &str) -> anyhow::Result<Step> {
        let step = self.dispatch(line).await?;
        self.out.flush()?;
        Ok(step)
    }

    async fn dispatch(&mut self, line: &str) -> anyhow::Result<Step> {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        let Some((&called, words)) = words.split_first() else {
            return Ok(Step::Done);
        };
        let Some(command) = find(called) else {
            complain_plain(format_args!("command \"{called}\" not found"));
            return Ok(Step::Failed);
        };
        let is_flag = |word: &&str| command.flag == Some(*word);
        let flagged = words.iter().any(is_flag);
        let words: Vec<&str> = words.iter().copied().filter(|word| !is_flag(word)).collect();
        let words = words.as_slice();
        if let Some(message) = command.wrong_count(called, words.len()) {
            complain_plain(message);
            return Ok(Step::Failed);
        }
        if let Some((op, what)) = operation(command.name, flagged) {
            return self.zone_manage(op, what, words).await;
        }
        match command.name {
            "read" | "readv" | "aio_read" => self.read(command, words).await,
            "write" | "writev" | "aio_write" => self.write(command, words).await,
            "discard" => self.discard(command, words).await,
            "zone_report" => self.zone_report(words).await,
            "zone_append" => self.zone_append(command, words).await,
            "zone_commit" => self.zone_commit(words).await,
            "write_uncor" => self.write_uncorrectable(words).await,
            "zone_set_ext" => self.zone_set_ext(command, words).await,
            "zone_get_ext" => self.zone_get_ext(command, words).await,
            "aio_flush" => self.aio_flush().await,
            "flush" => match self.device.flush(&self.lane).await {
                Ok(()) => Ok(Step::Done),
                Err(error) => self.failed("flush", &error),
            },
            "length" => {
                let text = size(self.device.limits().size as f64);
                self.out.line(text)?;
                Ok(Step::Done)
            }
            "info" => self.show_info(),
            "sleep" => match number(words[0]) {
                Ok(milliseconds) => {
                    self.out.flush()?;
                    zbdkit_io::sleep(Duration::from_millis(milliseconds)).await;
                    Ok(Step::Done)
                }
                Err(message) => self.wrong(message),
            },
            "help" => self.help(words.first().copied()),
            _ => Ok(Step::Quit),
        }
    }

    /// The command was called wrongly.
    pub fn usage(&mut self, command: &Command) -> anyhow::Result<Step> {
        self.wrong(command.usage(command.name))
    }

    fn help(&mut self, about: Option<&str>) -> anyhow::Result<Step> {
        let Some(name) = about else {
            for command in COMMANDS.iter() {
                self.out.line(command.usage(command.name))?;
            }
            self.out.line("\nUse 'help commandname' for extended help.")?;
            return Ok(Step::Done);
        };
        match find(name) {
            Some(command) => {
                self.out.line(command.usage(name))?;
                if !command.more.is_empty() {
                    self.out.line(command.more)?;
                }
                Ok(Step::Done)
            }
            None => self.wrong(format_args!("command {name} not found")),
        }
    }

    fn show_info(&mut self) -> anyhow::Result<Step> {
        let limits = self.device.limits();
        self.out
            .line(format_args!("format name: {}", self.device.driver()))?;
        self.out
            .line(format_args!("block size: {} bytes", limits.block_size))?;
        if let Some(geometry) = &limits.zoned {
            self.out.line(format_args!(
                "zones: {} of {}",
                geometry.nr_zones(),
                format_size(geometry.zone_size())
            ))?;
        }
        Ok(Step::Done)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_found_by_either_name() {
        assert_eq!(find("zap").map(|c| c.name), Some("zone_append"));
        assert_eq!(find("zone_append").map(|c| c.name), Some("zone_append"));
        assert!(find("").is_none() && find("zone").is_none());
        assert!(COMMANDS.is_sorted_by_key(|command| command.name));
    }

    #[test]
    fn wrong_numbers_of_arguments_are_named_as_qemu_io_does() {
        let wrong = |name, words| find(name).unwrap().wrong_count(name, words);
        assert_eq!(
            wrong("zrp", 1).as_deref(),
            Some("bad argument count 1 to zrp, expected 2 arguments")
        );
        assert_eq!(
            wrong("write", 0).as_deref(),
            Some("bad argument count 0 to write, expected at least 2 arguments")
        );
        assert_eq!(wrong("zap", 5), None);
        assert_eq!(
            wrong("zo", 3).as_deref(),
            Some("bad argument count 3 to zo, expected 2 arguments")
        );
    }
}
