//! What only NVMe has: wu, zcm, zse, zge, and zo with -r. qemu-io has no such commands.

use std::io::Read;

use zbdkit_block::Error;

use super::command::Command;
use super::number::{number, pattern};
use super::options::Options;
use super::stats::dump;
use super::transfer::DEFAULT_PATTERN;
use super::{Shell, Step};

impl Shell {
    /// wu: blocks are marked uncorrectable.
    pub async fn write_uncorrectable(&mut self, words: &[&str]) -> anyhow::Result<Step> {
        let range = number(words[0]).and_then(|offset| Ok((offset, number(words[1])?)));
        let (offset, len) = match range {
            Ok(range) => range,
            Err(message) => return self.wrong(message),
        };
        match self.device.mark_uncorrectable(&self.lane, offset, len).await {
            Ok(()) => Ok(Step::Done),
            Err(error) => self.failed("write uncorrectable", &error),
        }
    }

    /// zcm: the write pointer of a zone with a random write area moves.
    pub async fn zone_commit(&mut self, words: &[&str]) -> anyhow::Result<Step> {
        let end = match number(words[0]) {
            // No area ends before the first byte.
            Ok(0) => return self.wrong("A commit ends behind the start of its zone: END is not 0"),
            Ok(end) => end,
            Err(message) => return self.wrong(message),
        };
        match self.device.commit_zrwa(&self.lane, end).await {
            Ok(()) => Ok(Step::Done),
            Err(error) => self.failed("zone commit", &error),
        }
    }

    /// zse: attaches a descriptor extension to an empty zone.
    pub async fn zone_set_ext(&mut self, command: &'static Command, words: &[&str]) -> anyhow::Result<Step> {
        let Some(options) = Options::parse(command.name, "f:P:r", words) else {
            return self.usage(command);
        };
        if options.rest.len() != 1 {
            return self.usage(command);
        }
        if options.value('f').is_some() && options.value('P').is_some() {
            return self.wrong("Only one of -f and -P can be specified at the same time");
        }
        let size = self.extension_size();
        let content = || -> Result<(u64, Vec<u8>), String> {
            let start = number(&options.rest[0])?;
            let content = match options.value('f') {
                Some(path) => {
                    let content = read_at_most(path, size as u64 + 1);
                    let content = content.map_err(|error| format!("{path}: {error}"))?;
                    if size > 0 && content.len() > size {
                        return Err(format!(
                            "{path} does not fit into an extension, which has {size} bytes"
                        ));
                    }
                    content
                }
                None => {
                    let byte = options.value('P').map(pattern).transpose()?;
                    vec![byte.unwrap_or(DEFAULT_PATTERN); size]
                }
            };
            Ok((start, content))
        };
        let (start, content) = match content() {
            Ok(content) => content,
            Err(message) => return self.wrong(message),
        };
        let zrwa = options.has('r');
        match self.device.set_extension(&self.lane, start, &content, zrwa).await {
            Ok(()) => Ok(Step::Done),
            Err(error) => self.failed("zone set extension", &error),
        }
    }

    /// zge: shows a zone's descriptor extension, or writes it to a file.
    pub async fn zone_get_ext(&mut self, command: &'static Command, words: &[&str]) -> anyhow::Result<Step> {
        let Some(options) = Options::parse(command.name, "f:", words) else {
            return self.usage(command);
        };
        let [start] = options.rest.as_slice() else {
            return self.usage(command);
        };
        let start = match number(start) {
            Ok(start) => start,
            Err(message) => return self.wrong(message),
        };
        let extension = match self.device.extension(start).await {
            Ok(Some(extension)) => extension,
            Ok(None) => {
                self.out.line("The zone has no descriptor extension")?;
                // There is nothing to fill the file with.
                return Ok(match options.value('f') {
                    Some(_) => Step::Failed,
                    None => Step::Done,
                });
            }
            Err(error) => return self.failed("zone get extension", &error),
        };
        match options.value('f') {
            None => self.out.text(dump(&extension, 0))?,
            Some(path) => {
                if let Err(error) = std::fs::write(path, extension) {
                    return self.failed(path, &Error::io("writing the file", &error));
                }
            }
        }
        Ok(Step::Done)
    }

    /// Bytes of the device's descriptor extensions; 0 where it has none.
    fn extension_size(&self) -> usize {
        let zones = &self.device.limits().zoned;
        zones
            .as_ref()
            .map_or(0, |geometry| geometry.extension_size() as usize)
    }
}

/// The file, or its first bytes: it may be one without an end.
fn read_at_most(path: &str, bytes: u64) -> std::io::Result<Vec<u8>> {
    let mut content = Vec::new();
    std::fs::File::open(path)?.take(bytes).read_to_end(&mut content)?;
    Ok(content)
}
