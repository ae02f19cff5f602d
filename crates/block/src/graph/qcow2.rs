//! Opening qcow2 images: the file, what the gate lets them open below themselves, their zones.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;
use zbdkit_io::File;
use zbdkit_qcow2::{Header, Qcow2, read_snapshots};
use zbdkit_spec::qcow2::{AUTOCLEAR_ZONE_TABLE, EXT_ZONED, INCOMPAT_ZONE_STATES, INCOMPAT_ZONED};

use super::options::Options;
use super::{Opener, run_state_of};
use crate::device::Device;
use crate::error::OpenError;
use crate::file::FileNode;
use crate::host::{FileId, FileOptions};
use crate::lock::LockMode;
use crate::node::Node;
use crate::qcow2::{
    self, BackingImage, Chain, Described, ImageFormat, NodeBacking, Qcow2Node, backing_format,
};
use crate::raw::RawNode;
use crate::zoned::{RunStateMode, host_error};

/// A file that is described, not opened yet.
#[derive(Clone, Debug)]
pub(super) struct FileChoice {
    pub path: PathBuf,
    pub direct: bool,
    pub read_only: bool,
    pub locking: Option<String>,
}

/// A qcow2 image that is described, not opened yet.
pub(super) struct Image {
    pub file: FileChoice,
    pub backing: Below,
    pub data_file: Option<FileChoice>,
    pub l2_cache: u64,
    pub run_state: RunStateMode,
    /// Only the view of an internal snapshot.
    pub snapshot: Option<String>,
    pub areas: Areas,
}

/// The clusters that our extension leads to.
pub(super) enum Areas {
    /// Look for them.
    LookedFor,
    /// They are these; the zones of the image are not looked at.
    Known(Vec<(Range<u64>, &'static str)>),
}

/// What is to be below an image.
pub(super) enum Below {
    /// What it names.
    AsNamed,
    /// Nothing, whatever it names.
    Nothing,
    /// What the user describes.
    Given(Options),
}

pub(super) const QCOW2_OPTIONS: [&str; 7] = [
    "driver",
    "file",
    "backing",
    "data-file",
    "l2-cache-size",
    "run-state",
    "read-only",
];

/// What lies below an image, not opened yet.
enum Next {
    Nothing,
    Image(Image),
    Raw(FileChoice),
    Described(Options),
}

/// An image whose own files are open.
struct Begun {
    image: Image,
    file: File,
    header: Header,
    described: Option<Described>,
    data: Option<(PathBuf, File)>,
    /// Id of the snapshot that is looked at.
    snapshot: Option<String>,
}

/// The incompatible features that the block layer looks after.
pub(super) const OURS: u64 = INCOMPAT_ZONED | INCOMPAT_ZONE_STATES;

/// An opened image, its zones not looked after yet.
struct Opened {
    node: Qcow2Node,
    described: Option<Described>,
    snapshot: Option<String>,
}

impl Opener<'_> {
    /// The image at a path, as it describes itself.
    pub(super) fn image_at(&self, path: &Path) -> Image {
        Image {
            file: FileChoice {
                path: path.to_owned(),
                direct: self.options.direct,
                read_only: self.options.read_only,
                locking: None,
            },
            backing: match self.options.no_backing {
                true => Below::Nothing,
                false => Below::AsNamed,
            },
            data_file: None,
            l2_cache: 0,
            run_state: self.options.run_state.clone(),
            snapshot: self.options.snapshot.clone(),
            areas: Areas::LookedFor,
        }
    }

    /// The same without locks, for who holds them already.
    pub(super) fn unlocked(&self, image: Image) -> Image {
        Image {
            file: FileChoice {
                locking: Some("off".into()),
                ..image.file
            },
            snapshot: None,
            ..image
        }
    }

    /// Opens an image without its zones.
    pub(super) async fn open_alone(&self, image: Image) -> Result<Qcow2Node, OpenError> {
        Ok(self.open_qcow2(image, Chain::default()).await?.node)
    }

    /// The image that a tree of options describes.
    pub(super) fn image_of(&self, mut tree: Options, read_only: bool) -> Result<Image, OpenError> {
        tree.take("driver");
        let read_only = tree.bool("read-only")?.unwrap_or(read_only);
        let file = self.file_of(tree.child("file")?, read_only)?;
        let backing = match tree.node("backing")? {
            _ if self.options.no_backing => Below::Nothing,
            None => Below::AsNamed,
            Some(None) => Below::Nothing,
            Some(Some(tree)) => Below::Given(tree),
        };
        let data_file = match tree.has("data-file") {
            true => Some(self.file_of(tree.child("data-file")?, read_only)?),
            false => None,
        };
        let l2_cache = tree.size("l2-cache-size")?.unwrap_or(0);
        let run_state = match tree.string("run-state")? {
            None => self.options.run_state.clone(),
            Some(text) => run_state_of(&text),
        };
        tree.finish("qcow2", &QCOW2_OPTIONS)?;
        Ok(Image {
            file,
            backing,
            data_file,
            l2_cache,
            run_state,
            snapshot: self.options.snapshot.clone(),
            areas: Areas::LookedFor,
        })
    }

    /// The file below a format.
    pub(super) fn file_of(&self, mut tree: Options, read_only: bool) -> Result<FileChoice, OpenError> {
        let place = tree.place().to_owned();
        match tree.string("driver")?.as_deref() {
            None | Some("file") => {}
            Some(other) => {
                return Err(OpenError::Graph(format!(
                    "{place}driver={other}: a qcow2 image lies in a file, so this can only be driver=file"
                )));
            }
        }
        self.file_choice("file", tree, read_only)
    }

    /// Opens an image with its zones, as the root of the graph.
    pub(super) async fn open_image(&self, image: Image) -> Result<Device, OpenError> {
        let path = image.file.path.clone();
        let run_state = image.run_state.clone();
        let chain = Chain::default();
        let opened = self.open_qcow2(image, chain).await?;
        let Some(described) = opened.described else {
            let node = Arc::new(opened.node);
            return Ok(Device::new(node.clone()).with_qcow2(node));
        };
        if let Some(id) = opened.snapshot {
            return qcow2::open_snapshot(opened.node, &described, &id, &path).await;
        }
        let (zoned, node, notices) =
            qcow2::open(self.host, opened.node, described, &path, &run_state).await?;
        notices.iter().for_each(|notice| tracing::warn!("{notice}"));
        Ok(Device::zoned(zoned, notices).with_qcow2(node))
    }

    /// Opens an image below another one: its bytes, whatever zones it has.
    pub(super) async fn open_image_below(
        &self,
        mut image: Image,
        chain: Chain,
    ) -> Result<Arc<dyn Node>, OpenError> {
        // Snapshots and their zones are the root's.
        image.snapshot = None;
        let opened = self.open_qcow2(image, chain).await?;
        Ok(Arc::new(opened.node))
    }

    /// Opens the images of a chain: from the top down as far as each names the next, then from the bottom up, since each
    /// needs the one below it. Not by recursion: a chain may be long, and a stack is not.
    async fn open_qcow2(&self, image: Image, mut chain: Chain) -> Result<Opened, OpenError> {
        let mut found = vec![self.begin(image, &mut chain).await?];
        let mut below = loop {
            let Some(top) = found.last() else { break None };
            match self.next_below(top)? {
                Next::Nothing => break None,
                Next::Image(image) => {
                    let next = self.begin(image, &mut chain).await?;
                    found.push(next);
                }
                Next::Raw(file) => {
                    self.identify(&file.path, &mut chain)?;
                    let node = Arc::new(self.open_file(&file)?);
                    break Some(Arc::new(RawNode::new(node, 0, None)?) as Arc<dyn Node>);
                }
                Next::Described(tree) => break Some(self.open_node(tree, true, chain).await?),
            }
        };
        let top = found.remove(0);
        for begun in found.into_iter().rev() {
            let opened = self.end(begun, below).await?;
            below = Some(Arc::new(opened.node));
        }
        self.end(top, below).await
    }

    /// Opens an image's own files and reads its header.
    async fn begin(&self, image: Image, chain: &mut Chain) -> Result<Begun, OpenError> {
        let path = image.file.path.clone();
        let wrong = OpenError::image(&path);
        self.identify(&path, chain)?;
        let file = self.open_choice(&image.file)?;
        let mut header = Header::read(&file).await.map_err(&wrong)?;
        header.check_features(OURS).map_err(&wrong)?;
        let described = match &image.areas {
            Areas::LookedFor => {
                let described = Described::of(&file, &header).await;
                described.map_err(|problem| OpenError::data(&path, problem))?
            }
            Areas::Known(_) => {
                // What makes no sense names no clusters; it will be replaced.
                if !qcow2::zones_make_sense(&header, &file) {
                    header.set_extension(EXT_ZONED, None);
                }
                None
            }
        };
        let data = self.open_data_file(&image, &header, chain)?;
        let snapshot = match &image.snapshot {
            Some(wanted) => Some(view(&image, &file, &mut header, wanted).await?),
            None => None,
        };
        Ok(Begun {
            image,
            file,
            header,
            described,
            data,
            snapshot,
        })
    }

    /// Opens an image over what lies below it.
    async fn end(&self, begun: Begun, below: Option<Arc<dyn Node>>) -> Result<Opened, OpenError> {
        let Begun {
            image,
            file,
            header,
            described,
            data,
            snapshot,
        } = begun;
        let options = zbdkit_qcow2::Options {
            read_only: image.file.read_only,
            l2_cache: image.l2_cache,
            data_file: data.as_ref().map(|(_, file)| file.clone()),
            backing: below.clone().map(|node| Arc::new(NodeBacking(node)) as _),
            known_incompatible: OURS,
            known_autoclear: match (&described, &image.areas) {
                (Some(Described { ours: Some(_), .. }), _) | (None, Areas::Known(_)) => AUTOCLEAR_ZONE_TABLE,
                _ => 0,
            },
            areas: match image.areas {
                Areas::LookedFor => described.as_ref().map_or(Vec::new(), Described::areas),
                Areas::Known(areas) => areas,
            },
        };
        let backing = match (&header.backing_file, below) {
            (None, None) => None,
            (name, node) => Some(BackingImage {
                name: name.clone().unwrap_or_default(),
                format: header.backing_format().map(str::to_owned),
                node,
            }),
        };
        let path = &image.file.path;
        let opened = Qcow2::open(file, header, options).await;
        let opened = opened.map_err(OpenError::image(path))?;
        let named = data.as_ref().map_or(path, |(path, _)| path);
        Ok(Opened {
            node: Qcow2Node::new(opened, &named.to_string_lossy(), backing),
            described,
            snapshot,
        })
    }

    fn open_data_file(
        &self,
        image: &Image,
        header: &Header,
        chain: &mut Chain,
    ) -> Result<Option<(PathBuf, File)>, OpenError> {
        let path = &image.file.path;
        let choice = match (&image.data_file, header.external_data()) {
            (None, false) => return Ok(None),
            (Some(_), false) => {
                return Err(OpenError::data(
                    path,
                    "data-file is given, but the image keeps its data itself",
                ));
            }
            (Some(choice), true) => choice.clone(),
            (None, true) => {
                let name = header.data_file_name().ok_or_else(|| {
                    OpenError::data(
                        path,
                        "it keeps its data in a file of its own and does not say in which: name it with \
                         data-file.filename=FILE",
                    )
                })?;
                FileChoice {
                    path: qcow2::resolve(path, name, "data file")?,
                    ..image.file.clone()
                }
            }
        };
        self.identify(&choice.path, chain)?;
        let file = self.open_choice(&choice)?;
        Ok(Some((choice.path, file)))
    }

    /// What is to be opened below an image.
    fn next_below(&self, begun: &Begun) -> Result<Next, OpenError> {
        let (image, header) = (&begun.image, &begun.header);
        match (&image.backing, &header.backing_file) {
            (Below::Nothing, _) | (Below::AsNamed, None) => Ok(Next::Nothing),
            (Below::AsNamed, Some(name)) => {
                let path = qcow2::resolve(&image.file.path, name, "backing image")?;
                let format = backing_format(&image.file.path, name, header.backing_format())?;
                let file = FileChoice {
                    path,
                    read_only: true,
                    ..image.file.clone()
                };
                Ok(match format {
                    ImageFormat::Raw => Next::Raw(file),
                    ImageFormat::Qcow2 => Next::Image(Image {
                        file,
                        backing: Below::AsNamed,
                        data_file: None,
                        l2_cache: 0,
                        run_state: RunStateMode::None,
                        snapshot: None,
                        areas: Areas::LookedFor,
                    }),
                })
            }
            (Below::Given(tree), name) => {
                let mut tree = tree.clone();
                if tree.peek("driver").is_none() && !tree.has("filename") {
                    let name = name.as_deref().unwrap_or("FILE");
                    let format = backing_format(&image.file.path, name, header.backing_format())?;
                    tree.set("driver", format.name());
                }
                Ok(match tree.peek("driver") {
                    Some("qcow2") => Next::Image(self.image_of(tree, true)?),
                    _ => Next::Described(tree),
                })
            }
        }
    }

    pub(super) fn open_choice(&self, choice: &FileChoice) -> Result<File, OpenError> {
        let node = self.open_file(choice)?;
        Ok(FileNode::into_file(node))
    }

    /// Adds a file to the chain, before its locks are taken: a chain that comes back to itself would wait for them.
    fn identify(&self, path: &Path, chain: &mut Chain) -> Result<(), OpenError> {
        let options = FileOptions {
            lock: LockMode::None,
            ..FileOptions::existing(true)
        };
        let file = self
            .host
            .open(path, &options)
            .map_err(|e| host_error(path, "cannot be opened", e))?;
        let id: FileId = self
            .host
            .identity(&file)
            .map_err(|e| OpenError::file(path, "cannot be identified", e))?;
        chain.add(path, id)
    }
}

/// Changes a header to show a snapshot, by id or name; the answer is its id.
async fn view(image: &Image, file: &File, header: &mut Header, wanted: &str) -> Result<String, OpenError> {
    if !image.file.read_only {
        return Err(OpenError::Graph(
            "an internal snapshot can only be read: open it read-only, or apply it first".into(),
        ));
    }
    let path = &image.file.path;
    let all = read_snapshots(file, header).await;
    let all = all.map_err(OpenError::image(path))?;
    let found = all
        .iter()
        .find(|snapshot| snapshot.id == wanted)
        .or_else(|| all.iter().find(|snapshot| snapshot.name == wanted));
    let Some(snapshot) = found else {
        return Err(OpenError::data(path, format!("it has no snapshot {wanted:?}")));
    };
    header.l1_offset = snapshot.l1_offset;
    header.l1_size = snapshot.l1_size;
    header.size = snapshot.disk_size;
    Ok(snapshot.id.clone())
}

/// What stands for "no node" in a description.
pub(super) fn is_nothing(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::String(text) => matches!(text.as_str(), "" | "null" | "none"),
        _ => false,
    }
}
