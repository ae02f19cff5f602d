//! Options of a command, as getopt takes them.

use crate::output::complain_as;

/// What a command line gave: flags, options with a value, and the rest.
#[derive(Debug, Default)]
pub struct Options {
    flags: Vec<char>,
    values: Vec<(char, String)>,
    /// What is no option.
    pub rest: Vec<String>,
}

impl Options {
    /// Reads options anywhere between the arguments; `spec` names the letters, with a colon behind those that take a
    /// value. `None` where there is one that the command does not have, after saying so as getopt does.
    pub fn parse(command: &str, spec: &str, words: &[&str]) -> Option<Options> {
        let mut options = Options::default();
        let mut words = words.iter();
        while let Some(word) = words.next() {
            match word.strip_prefix('-') {
                Some("-") => options.rest.extend(words.by_ref().map(|word| (*word).to_owned())),
                Some(letters) if !letters.is_empty() => {
                    options.letters(command, spec, letters, &mut words)?;
                }
                _ => options.rest.push((*word).to_owned()),
            }
        }
        Some(options)
    }

    fn letters<'a>(
        &mut self,
        command: &str,
        spec: &str,
        letters: &str,
        words: &mut impl Iterator<Item = &'a &'a str>,
    ) -> Option<()> {
        for (at, letter) in letters.char_indices() {
            let Some(place) = spec.find(letter).filter(|_| letter != ':') else {
                complain_as(command, format_args!("invalid option -- '{letter}'"));
                return None;
            };
            if !spec[place + letter.len_utf8()..].starts_with(':') {
                self.flags.push(letter);
                continue;
            }
            let attached = &letters[at + letter.len_utf8()..];
            let value = match attached {
                "" => words.next().copied(),
                attached => Some(attached),
            };
            let Some(value) = value else {
                complain_as(command, format_args!("option requires an argument -- '{letter}'"));
                return None;
            };
            self.values.push((letter, value.to_owned()));
            break;
        }
        Some(())
    }

    pub fn has(&self, letter: char) -> bool {
        self.flags.contains(&letter)
    }

    /// The last value given.
    pub fn value(&self, letter: char) -> Option<&str> {
        let mut values = self.values.iter().rev();
        values
            .find(|(given, _)| *given == letter)
            .map(|(_, value)| value.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_stand_anywhere_and_can_be_joined() {
        let options = Options::parse("write", "qP:z", &["0", "-qP", "0xab", "4k", "-z"]).unwrap();
        assert!(options.has('q') && options.has('z') && !options.has('P'));
        assert_eq!(options.value('P'), Some("0xab"));
        assert_eq!(options.rest, ["0", "4k"]);
        let options = Options::parse("write", "P:", &["-P7", "--", "-1"]).unwrap();
        assert_eq!(
            (options.value('P'), &*options.rest),
            (Some("7"), &["-1".to_owned()][..])
        );
    }

    #[test]
    fn unknown_options_are_refused() {
        assert!(Options::parse("write", "q", &["0", "-1"]).is_none());
        assert!(Options::parse("write", "P:", &["-P"]).is_none());
        assert!(Options::parse("write", "P:", &["-:"]).is_none());
    }
}
