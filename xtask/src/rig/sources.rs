//! Reads the machine's own apt sources, to learn which Debian mirror it uses.
//!
//! Both formats of sources.list(5): deb822 stanzas (`*.sources`) and one-line entries (`*.list`).
//! Only what the rig needs is kept: where packages come from and which key signs them.

use std::path::{Path, PathBuf};

/// An archive that the machine is set up to use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    /// The archive's address, without a slash at the end.
    pub uri: String,
    /// Its suites, such as `bookworm` or `bookworm-updates`.
    pub suites: Vec<String>,
    /// Its components, such as `main`.
    pub components: Vec<String>,
    /// The key ring that signs it, where the entry names a file.
    pub signed_by: Option<PathBuf>,
}

impl Source {
    /// Whether this is a Debian archive as opposed to somebody's repository or the security archive.
    fn is_debian(&self) -> bool {
        const SUITES: [&str; 12] = [
            "bullseye",
            "bookworm",
            "trixie",
            "forky",
            "duke",
            "sid",
            "oldoldstable",
            "oldstable",
            "stable",
            "testing",
            "unstable",
            "experimental",
        ];
        let base = |suite: &str| suite.split(['-', '/']).next().unwrap_or_default().to_owned();
        self.components.iter().any(|component| component == "main")
            && self
                .suites
                .iter()
                .any(|suite| SUITES.contains(&base(suite).as_str()) && !suite.contains("security"))
            && !self.uri.ends_with("-security")
    }
}

/// The Debian archive among the machine's sources in `etc_apt` (normally `/etc/apt`).
pub fn debian_archive(etc_apt: &Path) -> Option<Source> {
    read_all(etc_apt).into_iter().find(Source::is_debian)
}

/// Every enabled binary source below `etc_apt`, in apt's order. Files that cannot be read count as empty.
pub fn read_all(etc_apt: &Path) -> Vec<Source> {
    let mut files = vec![etc_apt.join("sources.list")];
    if let Ok(entries) = std::fs::read_dir(etc_apt.join("sources.list.d")) {
        let mut parts: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
        parts.sort();
        files.extend(parts);
    }
    let mut sources = Vec::new();
    for file in files {
        let Ok(text) = std::fs::read_to_string(&file) else {
            continue;
        };
        match file.extension().and_then(|extension| extension.to_str()) {
            Some("list") => sources.extend(parse_one_line(&text)),
            Some("sources") => sources.extend(parse_deb822(&text)),
            _ => {}
        }
    }
    sources
}

/// Parses `deb [options] uri suite component...` lines.
pub fn parse_one_line(text: &str) -> Vec<Source> {
    text.lines().filter_map(parse_line).collect()
}

fn parse_line(line: &str) -> Option<Source> {
    let line = line.split('#').next().unwrap_or_default().trim();
    let mut rest = line.strip_prefix("deb")?;
    if !rest.starts_with(char::is_whitespace) {
        return None; // deb-src, or another word
    }
    rest = rest.trim_start();
    let mut signed_by = None;
    if let Some(options) = rest.strip_prefix('[') {
        let (options, after) = options.split_once(']')?;
        signed_by = options
            .split_whitespace()
            .find_map(|option| option.strip_prefix("signed-by="))
            .and_then(key_file);
        rest = after;
    }
    let mut words = rest.split_whitespace().map(str::to_owned);
    let uri = trim_uri(&words.next()?);
    let suites = vec![words.next()?];
    Some(Source {
        uri,
        suites,
        components: words.collect(),
        signed_by,
    })
}

/// Parses deb822 stanzas: `Field: value` lines, continued by lines that begin with a blank.
pub fn parse_deb822(text: &str) -> Vec<Source> {
    let mut sources = Vec::new();
    let mut stanza: Vec<(String, String)> = Vec::new();
    for line in text.lines().filter(|line| !line.starts_with('#')).chain([""]) {
        if line.trim().is_empty() {
            sources.extend(source_of_stanza(&stanza));
            stanza.clear();
        } else if line.starts_with(char::is_whitespace) {
            if let Some((_, value)) = stanza.last_mut() {
                value.push(' ');
                value.push_str(line.trim());
            }
        } else if let Some((field, value)) = line.split_once(':') {
            stanza.push((field.trim().to_ascii_lowercase(), value.trim().to_owned()));
        }
    }
    sources
}

fn source_of_stanza(stanza: &[(String, String)]) -> Vec<Source> {
    let words = |name: &str| -> Vec<String> {
        let value = stanza
            .iter()
            .find(|(field, _)| field == name)
            .map_or("", |(_, value)| value);
        value.split_whitespace().map(str::to_owned).collect()
    };
    let disabled = words("enabled")
        .iter()
        .any(|word| word.eq_ignore_ascii_case("no"));
    if disabled || !words("types").iter().any(|word| word == "deb") {
        return Vec::new();
    }
    words("uris")
        .iter()
        .map(|uri| Source {
            uri: trim_uri(uri),
            suites: words("suites"),
            components: words("components"),
            signed_by: words("signed-by").first().and_then(|word| key_file(word)),
        })
        .collect()
}

/// A `Signed-By` that names a file; keys may also stand inline or as fingerprints, which we do not need.
fn key_file(value: &str) -> Option<PathBuf> {
    value.starts_with('/').then(|| PathBuf::from(value))
}

fn trim_uri(uri: &str) -> String {
    uri.trim_end_matches('/').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEB822: &str = "\
# a comment between
Types: deb
URIs: https://vendor.example/apt/
Suites: nodistro
Components: main

Types: deb deb-src
URIs: http://mirror.example/debian/
# a comment inside a stanza
Suites: bookworm
 bookworm-updates
Components: main contrib
Signed-By: /usr/share/keyrings/some.gpg

Types: deb
Enabled: no
URIs: http://off.example/debian
Suites: trixie
Components: main
";

    #[test]
    fn deb822_stanzas_comments_continuations_and_disabled_entries_are_understood() {
        let sources = parse_deb822(DEB822);
        assert_eq!(sources.len(), 2);
        assert_eq!(
            sources[1],
            Source {
                uri: "http://mirror.example/debian".into(),
                suites: vec!["bookworm".into(), "bookworm-updates".into()],
                components: vec!["main".into(), "contrib".into()],
                signed_by: Some("/usr/share/keyrings/some.gpg".into()),
            }
        );
    }

    #[test]
    fn one_line_entries_with_options_are_understood_and_sources_are_left_out() {
        let sources = parse_one_line(
            "# deb http://no.example/debian trixie main\n\
             deb-src http://no.example/debian trixie main\n\
             deb [arch=amd64 signed-by=/k.gpg] http://yes.example/debian/ trixie main # why\n\
             deb http://plain.example/debian bookworm-backports main\n",
        );
        let uris: Vec<&str> = sources.iter().map(|source| source.uri.as_str()).collect();
        assert_eq!(uris, ["http://yes.example/debian", "http://plain.example/debian"]);
        assert_eq!(sources[0].signed_by, Some("/k.gpg".into()));
    }

    #[test]
    fn the_debian_archive_is_told_from_vendors_and_from_the_security_archive() {
        let etc = tempfile::tempdir().unwrap();
        std::fs::create_dir(etc.path().join("sources.list.d")).unwrap();
        std::fs::write(
            etc.path().join("sources.list"),
            "deb http://s.example/debian-security bookworm-security main\n",
        )
        .unwrap();
        std::fs::write(
            etc.path().join("sources.list.d/a.list"),
            "deb http://docker.example/linux/debian bookworm stable\n",
        )
        .unwrap();
        std::fs::write(etc.path().join("sources.list.d/b.sources"), DEB822).unwrap();
        std::fs::write(
            etc.path().join("sources.list.d/c.list.disabled"),
            "deb http://x.example/debian sid main\n",
        )
        .unwrap();
        assert_eq!(
            debian_archive(etc.path()).unwrap().uri,
            "http://mirror.example/debian"
        );
        assert_eq!(debian_archive(&etc.path().join("missing")), None);
    }
}
