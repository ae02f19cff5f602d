//! The images of a sequence, and what they must hold.

use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::Context;

use super::content::{Content, Pattern, Sources};
use super::layout::Layout;

/// A request.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(
    missing_docs,
    reason = "the fields are what they are called, ranges are bytes"
)]
pub enum Op {
    Write {
        range: Range<u64>,
        pattern: Pattern,
    },
    /// At most one cluster, from its start.
    WriteCompressed {
        range: Range<u64>,
        pattern: Pattern,
    },
    WriteZeroes {
        range: Range<u64>,
        unmap: bool,
    },
    Discard {
        range: Range<u64>,
    },
    /// Reads and compares; who cannot leaves it out.
    Read {
        range: Range<u64>,
    },
    Flush,
}

impl Op {
    /// The bytes that it is about.
    pub fn range(&self) -> Option<&Range<u64>> {
        match self {
            Op::Write { range, .. }
            | Op::WriteCompressed { range, .. }
            | Op::WriteZeroes { range, .. }
            | Op::Discard { range }
            | Op::Read { range } => Some(range),
            Op::Flush => None,
        }
    }
}

/// What became of something that was tried.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// It was done.
    Done,
    /// It read these bytes.
    Read(Vec<u8>),
    /// It was refused with these words, and nothing has changed.
    Refused(String),
}

/// An internal snapshot.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// Unique in the image.
    pub name: String,
    /// What it must hold.
    pub content: Content,
}

/// One image of a chain.
#[derive(Debug, Clone)]
pub struct Image {
    /// Its file's name.
    pub name: String,
    /// `None` is a raw image.
    pub layout: Option<Layout>,
    /// The file with its data, if that is another.
    pub data_file: Option<String>,
    /// What it must hold, with what lies below.
    pub content: Content,
    /// Oldest first.
    pub snapshots: Vec<Snapshot>,
    /// Refcounts may be late since somebody was killed; the next opening repairs that.
    pub dirty: bool,
}

impl Image {
    /// QEMU's name of its format.
    pub fn format(&self) -> &'static str {
        if self.layout.is_some() { "qcow2" } else { "raw" }
    }
}

/// A chain of images in a directory, the lowest first.
#[derive(Debug)]
pub struct World {
    /// Where they lie; they name each other by file name.
    pub directory: PathBuf,
    /// What is written.
    pub sources: Sources,
    /// Never empty once the first image is made.
    pub images: Vec<Image>,
    /// So many names were given.
    names: u32,
    /// Everything that was done, for people.
    pub trace: Vec<String>,
}

impl World {
    /// An empty one; the sources' files are put into the directory.
    ///
    /// # Errors
    /// Of the file system.
    pub fn new(directory: &Path) -> anyhow::Result<World> {
        let sources = Sources::default();
        sources.save(directory)?;
        Ok(World {
            directory: directory.to_owned(),
            sources,
            images: Vec::new(),
            names: 0,
            trace: Vec::new(),
        })
    }

    /// A new file name.
    pub fn name(&mut self, ending: &str) -> String {
        self.names += 1;
        format!("i{}.{ending}", self.names)
    }

    /// The image that requests go to.
    pub fn top(&self) -> &Image {
        self.images.last().expect("the first step makes an image")
    }

    /// The image that requests go to.
    pub fn top_mut(&mut self) -> &mut Image {
        self.images.last_mut().expect("the first step makes an image")
    }

    /// The layout of the image that requests go to, which is always qcow2.
    pub fn layout(&self) -> &Layout {
        self.top().layout.as_ref().expect("the top is qcow2")
    }

    /// The path of a file of ours.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// Whether the top lies on another image.
    pub fn has_backing(&self) -> bool {
        self.images.len() > 1
    }

    /// What a request that was done changes.
    pub fn apply(&mut self, op: &Op) {
        let cluster = self.layout().cluster_size;
        // Version 2 has no zero clusters: over a backing image it cannot discard.
        let discards = self.layout().version == 3 || !self.has_backing();
        let content = &mut self.top_mut().content;
        match op {
            Op::Write { range, pattern } | Op::WriteCompressed { range, pattern } => {
                content.write(range.clone(), *pattern);
            }
            Op::WriteZeroes { range, .. } => content.zero(range.clone()),
            Op::Discard { range } if discards => {
                let end = if range.end == content.len() {
                    range.end
                } else {
                    range.end / cluster * cluster
                };
                let whole = range.start.next_multiple_of(cluster)..end;
                if whole.is_empty() {
                    content.perhaps_zero(range.clone());
                } else {
                    content.zero(whole.clone());
                    content.perhaps_zero(range.start..whole.start);
                    content.perhaps_zero(whole.end..range.end);
                }
            }
            Op::Discard { range } => content.perhaps_zero(range.clone()),
            Op::Read { .. } | Op::Flush => {}
        }
    }

    /// Compares all bytes of an image, or of a snapshot of it, with what it must hold.
    ///
    /// # Errors
    /// Where they differ.
    pub fn same(&mut self, index: usize, snapshot: Option<usize>, bytes: &[u8]) -> anyhow::Result<()> {
        let image = &mut self.images[index];
        let (content, what) = match snapshot {
            Some(number) => {
                let snapshot = &mut image.snapshots[number];
                (
                    &mut snapshot.content,
                    format!("snapshot {} of {}", snapshot.name, image.name),
                )
            }
            None => (&mut image.content, image.name.clone()),
        };
        if bytes.len() as u64 != content.len() {
            anyhow::bail!("{what} has {} bytes, should have {}", bytes.len(), content.len());
        }
        content.compare(&self.sources, bytes, 0).with_context(|| what)
    }

    /// The top's contents went into the image below.
    pub fn committed(&mut self) {
        let top = self.top().content.clone();
        let below = self.images.len() - 2;
        let below = &mut self.images[below].content;
        if below.len() < top.len() {
            below.resize(top.len());
        }
        below.take(&top);
    }
}
