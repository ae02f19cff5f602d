//! apt with private state: resolves and downloads packages of another Debian release without root
//! and without touching the machine's own package system.
//!
//! What is taken from the machine: the mirror, the Debian key ring, and the `Acquire` settings
//! (proxies, certificates). Everything else, from the lists to the empty dpkg status, is ours.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use super::sources::{self, Source};
use crate::{proc, ui::Step};

/// The release that the guest and, with its backports, QEMU and the kernel come from.
const RELEASE: &str = "trixie";
/// Its suite of newer packages.
pub const BACKPORTS: &str = "trixie-backports";
/// A download that makes no end within this time is given up.
const DOWNLOAD_LIMIT: Duration = Duration::from_secs(3600);
/// Anything that apt does without the network.
const LOCAL_LIMIT: Duration = Duration::from_secs(120);

/// A package file that apt would download.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Archive {
    /// Its name in the archive directory.
    pub file: String,
    /// Its size in bytes.
    pub size: u64,
}

/// A private apt below one directory.
#[derive(Debug)]
pub struct Apt {
    directory: PathBuf,
}

impl Apt {
    /// Sets the directory up and gets the package lists.
    pub fn open(directory: &Path) -> Result<Apt> {
        let archive = sources::debian_archive(Path::new("/etc/apt"))
            .context("found no Debian mirror in /etc/apt/sources.list or /etc/apt/sources.list.d")?;
        for name in ["state/lists/partial", "cache/archives/partial", "empty/partial"] {
            std::fs::create_dir_all(directory.join(name))?;
        }
        std::fs::write(directory.join("status"), "")?;
        std::fs::write(
            directory.join("sources.list"),
            source_lines(&archive, &key_ring(&archive)?),
        )?;
        let dump = proc::capture(proc::command("apt-config").arg("dump"), "apt-config", LOCAL_LIMIT)?;
        let config = private_config(directory, &String::from_utf8_lossy(&dump));
        std::fs::write(directory.join("apt.conf"), config)?;
        let apt = Apt {
            directory: directory.to_owned(),
        };
        let step = Step::start(format!(
            "getting the package lists of Debian {RELEASE} from {}",
            archive.uri
        ));
        proc::capture(
            apt.get().args(["-qq", "update"]),
            "apt-get update",
            DOWNLOAD_LIMIT,
        )?;
        step.done();
        Ok(apt)
    }

    /// Downloads `packages` and everything that they depend on; returns the files.
    pub fn download(&self, why: &str, packages: &[&str]) -> Result<Vec<PathBuf>> {
        self.download_where(why, packages, |_| true)
    }

    /// Like [`Apt::download`], but only the files of the closure that `wanted` says yes to.
    pub fn download_where(
        &self,
        why: &str,
        packages: &[&str],
        wanted: fn(&str) -> bool,
    ) -> Result<Vec<PathBuf>> {
        let closure = self.closure(packages)?;
        let archives: Vec<&Archive> = closure.iter().filter(|archive| wanted(&archive.file)).collect();
        ensure!(
            !archives.is_empty(),
            "apt found nothing to download for {packages:?}"
        );
        let total: u64 = archives.iter().map(|archive| archive.size).sum();
        let step = Step::start(format!(
            "downloading {why}: {} packages, {} MB",
            archives.len(),
            total / 1_000_000
        ));
        let names: Vec<String> = archives
            .iter()
            .map(|archive| name_and_version(&archive.file))
            .collect();
        let mut get = self.get();
        let into = self.archives();
        if archives.len() == closure.len() {
            get.args(["-y", "-q", "--download-only", "-t", BACKPORTS, "install"])
                .args(packages);
        } else {
            get.args(["-q", "download"]).args(&names).current_dir(&into);
        }
        let log = self.directory.join("download.log");
        let mut running = proc::logged(&mut get, "apt-get", &log)?;
        let deadline = std::time::Instant::now() + DOWNLOAD_LIMIT;
        let status = loop {
            if let Some(status) = running.wait_for(Duration::from_millis(500))? {
                break status;
            }
            ensure!(
                std::time::Instant::now() < deadline,
                "the download did not end in time; see {}",
                log.display()
            );
            let have: u64 = archives.iter().map(|archive| present(&into, &archive.file)).sum();
            step.progress(&format!("{} of {} MB", have / 1_000_000, total / 1_000_000));
        };
        if !status.success() {
            let said = std::fs::read_to_string(&log).unwrap_or_default();
            bail!(
                "apt-get failed ({status}):\n{}see {}",
                proc::indent(&proc::tail(&said, 12)),
                log.display()
            );
        }
        step.done();
        let files: Vec<PathBuf> = archives.iter().map(|archive| into.join(&archive.file)).collect();
        for file in &files {
            ensure!(file.is_file(), "apt-get did not download {}", file.display());
        }
        Ok(files)
    }

    /// Downloads the upstream source of `package`, in the version of the binary package; returns its tar ball.
    pub fn source(&self, package: &str, into: &Path) -> Result<PathBuf> {
        std::fs::create_dir_all(into)?;
        let version = self.candidate(package)?;
        let mut get = self.get();
        get.args([
            "-qq",
            "--download-only",
            "--only-source",
            "source",
            &format!("{package}={version}"),
        ])
        .current_dir(into);
        proc::capture(&mut get, "apt-get source", DOWNLOAD_LIMIT)?;
        let mut entries = std::fs::read_dir(into)?.flatten().map(|entry| entry.path());
        let prefix = format!("{package}_");
        let is_source = |path: &PathBuf| {
            let name = path
                .file_name()
                .and_then(|name| name.to_str())
                .unwrap_or_default();
            name.starts_with(&prefix) && name.contains(".orig.tar.") && !name.ends_with(".asc")
        };
        entries.find(is_source).with_context(|| {
            format!(
                "apt-get source left no tar ball of {package} in {}",
                into.display()
            )
        })
    }

    /// The version of `package` that the guest gets.
    pub fn candidate(&self, package: &str) -> Result<String> {
        let files = self.closure(&[package])?;
        let prefix = format!("{package}_");
        let file = files.iter().find(|archive| archive.file.starts_with(&prefix));
        let file = file.with_context(|| format!("Debian {RELEASE} has no package {package}"))?;
        let name = name_and_version(&file.file);
        Ok(name
            .split_once('=')
            .map(|(_, version)| version.to_owned())
            .unwrap_or_default())
    }

    fn closure(&self, packages: &[&str]) -> Result<Vec<Archive>> {
        let mut get = self.get();
        // With an archive directory that holds nothing, files that are here already are listed as well.
        get.arg("-o").arg(format!(
            "Dir::Cache::archives={}",
            self.directory.join("empty").display()
        ));
        get.args(["-y", "-qq", "--print-uris", "-t", BACKPORTS, "install"])
            .args(packages);
        let listing = proc::capture(&mut get, "apt-get --print-uris", LOCAL_LIMIT)?;
        Ok(parse_uris(&String::from_utf8_lossy(&listing)))
    }

    fn archives(&self) -> PathBuf {
        self.directory.join("cache/archives")
    }

    fn get(&self) -> std::process::Command {
        let mut command = proc::command("apt-get");
        command.env("APT_CONFIG", self.directory.join("apt.conf"));
        command
            .env("LC_ALL", "C.UTF-8")
            .env("DEBIAN_FRONTEND", "noninteractive");
        command
    }
}

/// How much of `file` is there, complete or not.
fn present(archives: &Path, file: &str) -> u64 {
    let size = |path: PathBuf| path.metadata().map(|meta| meta.len()).unwrap_or(0);
    size(archives.join(file)).max(size(archives.join("partial").join(file)))
}

/// The key ring: Debian's own, or else the one that the machine's entry names.
fn key_ring(archive: &Source) -> Result<PathBuf> {
    let usual =
        ["gpg", "pgp"].map(|end| PathBuf::from(format!("/usr/share/keyrings/debian-archive-keyring.{end}")));
    usual
        .into_iter()
        .chain(archive.signed_by.clone())
        .find(|path| path.is_file())
        .context("found no Debian key ring; install the package debian-archive-keyring")
}

fn source_lines(archive: &Source, key_ring: &Path) -> String {
    let mut lines = String::new();
    for kind in ["deb", "deb-src"] {
        for suite in [RELEASE, BACKPORTS] {
            lines += &format!(
                "{kind} [signed-by={}] {} {suite} main\n",
                key_ring.display(),
                archive.uri
            );
        }
    }
    lines
}

/// Our apt.conf: the private places, and the machine's `Acquire` settings out of `apt-config dump`.
///
/// It is read before the machine's own files, so naming `/dev/null` in their place switches them off
/// together with the hooks in them, which may run as root and clean the machine's caches.
fn private_config(directory: &Path, dump: &str) -> String {
    let mut config = String::new();
    for (name, value) in [
        ("Dir::State", "state"),
        ("Dir::State::status", "status"),
        ("Dir::Cache", "cache"),
        ("Dir::Etc::sourcelist", "sources.list"),
    ] {
        config += &format!("{name} \"{}\";\n", directory.join(value).display());
    }
    for name in ["main", "parts", "sourceparts", "preferences", "preferencesparts"] {
        config += &format!("Dir::Etc::{name} \"/dev/null\";\n");
    }
    config += "APT::Architecture \"amd64\";\nAPT::Architectures { \"amd64\"; };\n";
    config += "APT::Install-Recommends \"false\";\nAPT::Sandbox::User \"\";\nDebug::NoLocking \"true\";\n";
    config += "Acquire::Languages \"none\";\nAcquire::Retries \"3\";\nAcquire::http::Timeout \"60\";\n";
    for line in dump.lines().filter(|line| is_transport_setting(line)) {
        config += line;
        config.push('\n');
    }
    config
}

/// Whether a line of the dump says how to reach archives, as opposed to what to fetch from them.
fn is_transport_setting(line: &str) -> bool {
    let Some(rest) = line.strip_prefix("Acquire::") else {
        return false;
    };
    let what = rest.split([':', ' ']).next().unwrap_or_default();
    ![
        "IndexTargets",
        "Changelogs",
        "Languages",
        "CompressionTypes",
        "GzipIndexes",
        "cdrom",
    ]
    .contains(&what)
        && !line.trim_end().ends_with("\"\";")
}

/// Parses `'uri' file size hash` lines.
fn parse_uris(listing: &str) -> Vec<Archive> {
    let parse = |line: &str| {
        let mut words = line.strip_prefix('\'')?.split_whitespace().skip(1);
        Some(Archive {
            file: words.next()?.to_owned(),
            size: words.next()?.parse().ok()?,
        })
    };
    listing.lines().filter_map(parse).collect()
}

/// `name=version` of a package file, whose name has the colon of an epoch written as `%3a`.
fn name_and_version(file: &str) -> String {
    let mut parts = file.split('_');
    let (name, version) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    format!("{name}={}", version.replace("%3a", ":"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_listing_of_apt_is_understood_and_noise_is_skipped() {
        let listing = "Reading package lists...\n\
            'http://m.example/pool/f/fio/fio_3.39-1_amd64.deb' fio_3.39-1_amd64.deb 712 MD5Sum:00\n\
            'http://m.example/pool/q/q.deb' qemu-utils_1%3a11.1_amd64.deb 33 SHA256:11\n";
        let archives = parse_uris(listing);
        assert_eq!(archives.len(), 2);
        assert_eq!(
            archives[0],
            Archive {
                file: "fio_3.39-1_amd64.deb".into(),
                size: 712
            }
        );
        assert_eq!(name_and_version(&archives[1].file), "qemu-utils=1:11.1");
    }

    #[test]
    fn proxies_are_taken_over_and_hooks_and_index_targets_are_not() {
        let dump = "Acquire \"\";\nAcquire::http::Proxy \"http://proxy.example:3128\";\n\
            Acquire::IndexTargets::deb::DEP-11::MetaKey \"x\";\nAPT::Update::Post-Invoke:: \"rm -rf /\";\n\
            Acquire::http::Proxy::host.example \"DIRECT\";\n";
        let config = private_config(Path::new("/rig"), dump);
        assert!(config.contains("Acquire::http::Proxy \"http://proxy.example:3128\";\n"));
        assert!(config.contains("Acquire::http::Proxy::host.example \"DIRECT\";\n"));
        assert!(config.contains("Dir::Etc::parts \"/dev/null\";"));
        assert!(!config.contains("DEP-11") && !config.contains("Post-Invoke"));
    }
}
