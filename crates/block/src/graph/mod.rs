//! Graphs as users write them: QEMU's dotted options, JSON, or a path; and opening them.

mod check;
mod options;
mod qcow2;
mod size;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use zbdkit_io::{IoBuf, LocalBoxFuture};
use zbdkit_spec::sidecar;
use zbdkit_zone::{Geometry, GeometrySpec, Model};

use self::qcow2::FileChoice;
use crate::device::Device;
use crate::error::OpenError;
use crate::file::FileNode;
use crate::host::{FileOptions, Host};
use crate::host_device::{HostDevice, has_zones, needs_host_device};
use crate::lock::LockMode;
use crate::node::Node;
use crate::qcow2::{Chain, ImageFormat};
use crate::raw::RawNode;
use crate::zoned::{RunStateMode, ZonedNode, ZonedOptions, default_sidecar, host_error};
use options::Options;
pub use options::did_you_mean;
pub use size::{format_size, parse_size};

/// How a graph is opened; options in the graph's own description win where there are both.
#[derive(Clone, Debug)]
pub struct OpenOptions {
    /// Open for reading only.
    pub read_only: bool,
    /// Take no locks: look at an image that somebody else writes. Only with `read_only`.
    pub force_share: bool,
    /// Bypass the page cache (as `cache.direct=on`).
    pub direct: bool,
    /// What outlives kill -9.
    pub run_state: RunStateMode,
    /// How long to wait for somebody else's locks.
    pub lock_wait: Duration,
    /// The format of an image that is named by its path; looked for if `None`.
    pub format: Option<ImageFormat>,
    /// Open a qcow2 image without its backing image, which may be gone; what it does not hold itself reads as zeros.
    pub no_backing: bool,
    /// Only the view of this internal snapshot, by id or name, with the zones that it has. Only with `read_only`.
    pub snapshot: Option<String>,
}

impl Default for OpenOptions {
    fn default() -> OpenOptions {
        OpenOptions {
            read_only: false,
            force_share: false,
            direct: false,
            run_state: RunStateMode::default(),
            lock_wait: Duration::from_secs(3),
            format: None,
            no_backing: false,
            snapshot: None,
        }
    }
}

/// A described graph, not opened yet.
#[derive(Clone, Debug)]
pub struct Graph {
    root: Description,
}

#[derive(Clone, Debug)]
enum Description {
    Tree(Options),
    /// A path, whose format is looked for at opening.
    Path(PathBuf),
}

impl Graph {
    /// Reads what a user names an image by: `json:{...}` or `{...}`, options that begin with `driver=`, or a path.
    pub fn parse(text: &str) -> Result<Graph, OpenError> {
        if let Some(json) = text.strip_prefix("json:") {
            Graph::parse_json(json)
        } else if text.starts_with('{') {
            Graph::parse_json(text)
        } else if text.starts_with("driver=") {
            Graph::parse_options(text)
        } else {
            Ok(Graph::from_path(text))
        }
    }

    /// Reads `driver=zoned,file.driver=file,file.filename=disk.raw`; a comma in a value is written twice.
    pub fn parse_options(text: &str) -> Result<Graph, OpenError> {
        Ok(Graph {
            root: Description::Tree(Options::parse(text)?),
        })
    }

    /// Reads the same tree as a JSON object.
    pub fn parse_json(text: &str) -> Result<Graph, OpenError> {
        Ok(Graph {
            root: Description::Tree(Options::parse_json(text)?),
        })
    }

    /// The image at a path.
    pub fn from_path(path: impl Into<PathBuf>) -> Graph {
        Graph {
            root: Description::Path(path.into()),
        }
    }

    /// The file at the bottom, where there is one.
    pub fn filename(&self) -> Option<PathBuf> {
        match &self.root {
            Description::Path(path) => Some(path.clone()),
            Description::Tree(tree) => tree.find_string("filename").map(PathBuf::from),
        }
    }

    /// The format that opening takes the image at the root for, found out without opening what lies below it.
    pub async fn format(
        &self,
        host: &Arc<dyn Host>,
        options: &OpenOptions,
    ) -> Result<ImageFormat, OpenError> {
        let opener = Opener { host, options };
        match &self.root {
            Description::Path(path) => opener.format_of(path).await,
            Description::Tree(tree) if tree.peek("driver") == Some("qcow2") => Ok(ImageFormat::Qcow2),
            Description::Tree(_) => Ok(ImageFormat::Raw),
        }
    }

    /// Opens the graph's nodes, leaves first.
    pub async fn open(&self, host: &Arc<dyn Host>, options: &OpenOptions) -> Result<Device, OpenError> {
        let opener = Opener { host, options };
        match &self.root {
            Description::Path(path) => opener.open_path(path).await,
            Description::Tree(tree) => opener.open_tree(tree.clone()).await,
        }
    }
}

struct Opener<'a> {
    host: &'a Arc<dyn Host>,
    options: &'a OpenOptions,
}

const DRIVERS: [&str; 6] = ["file", "host_device", "memory", "qcow2", "raw", "zoned"];

impl Opener<'_> {
    async fn open_path(&self, path: &Path) -> Result<Device, OpenError> {
        let sidecar = default_sidecar(path);
        let has_sidecar = |path: &Path| {
            self.host
                .exists(path)
                .map_err(|e| OpenError::file(path, "cannot be looked for", e))
        };
        // A guest chooses what a raw image begins with, so an image with a sidecar is raw, and one that has lost it is
        // not taken for anything else.
        let has_sidecar = has_sidecar(&sidecar)?;
        let image = self.image_at(path);
        if self.options.format == Some(ImageFormat::Qcow2) {
            return self.open_image(image).await;
        }
        if !has_sidecar && self.is_device(path)? {
            return self.open_device(path).await;
        }
        let node = self.open_file(&image.file)?;
        if !has_sidecar {
            let is_ours = node.file().is_some_and(|file| self.host.image_id(file).is_some());
            let magic = self.magic(&node).await;
            if self.options.format.is_none() && !is_ours && magic.starts_with(&QCOW2_MAGIC) {
                // Its locks go before they are taken again.
                drop(node);
                return self.open_image(image).await;
            }
            if self.options.format.is_some() && !is_ours && magic != sidecar::MAGIC {
                return Ok(Device::new(Arc::new(RawNode::new(Arc::new(node), 0, None)?)));
            }
            return Err(self.no_zones(path, &sidecar, is_ours, magic));
        }
        let child = Arc::new(RawNode::new(Arc::new(node), 0, None)?);
        self.open_zoned(
            child,
            sidecar,
            self.options.run_state.clone(),
            self.options.direct,
            self.options.read_only,
        )
        .await
    }

    fn is_device(&self, path: &Path) -> Result<bool, OpenError> {
        if self.host.is_nvme_namespace(path) {
            return Ok(true);
        }
        let number = self.host.block_device(path);
        Ok(number
            .map_err(|e| OpenError::file(path, "cannot be opened", e))?
            .is_some())
    }

    /// A device of this machine that is named by its path alone.
    async fn open_device(&self, path: &Path) -> Result<Device, OpenError> {
        let zoned = has_zones(&**self.host, path);
        let node = self
            .open_host_device(&FileChoice {
                path: path.to_owned(),
                // Nobody has said otherwise.
                direct: zoned || self.options.direct,
                read_only: self.options.read_only,
                locking: None,
            })
            .await?;
        // A guest chooses what its disk begins with, so that is not taken for a format; nor is an image taken for a disk.
        if !zoned && self.options.format.is_none() && self.magic(&*node).await.starts_with(&QCOW2_MAGIC) {
            return Err(OpenError::data(
                path,
                format!(
                    "begins like a qcow2 image: say driver=qcow2,file.filename={0} for the image or \
                     driver=host_device,filename={0} for the disk",
                    path.display()
                ),
            ));
        }
        Ok(Device::new(node))
    }

    async fn open_host_device(&self, choice: &FileChoice) -> Result<Arc<dyn Node>, OpenError> {
        self.check_share(choice.read_only)?;
        let device = HostDevice {
            path: choice.path.clone(),
            direct: choice.direct,
            read_only: choice.read_only,
            lock: self.lock_of("host_device", choice)?,
            lock_wait: self.options.lock_wait,
        };
        device.open(&**self.host).await
    }

    /// As [`Opener::open_path`] decides.
    async fn format_of(&self, path: &Path) -> Result<ImageFormat, OpenError> {
        if let Some(format) = self.options.format {
            return Ok(format);
        }
        if self.is_device(path)? {
            return Ok(ImageFormat::Raw);
        }
        let sidecar = self.host.exists(&default_sidecar(path));
        let node = self.open_file(&self.image_at(path).file)?;
        let is_ours = node.file().is_some_and(|file| self.host.image_id(file).is_some());
        if sidecar.map_err(|e| OpenError::file(path, "cannot be looked for", e))? || is_ours {
            return Ok(ImageFormat::Raw);
        }
        match self.magic(&node).await.starts_with(&QCOW2_MAGIC) {
            true => Ok(ImageFormat::Qcow2),
            false => Ok(ImageFormat::Raw),
        }
    }

    /// Why a file without a sidecar is not opened by its name alone.
    fn no_zones(&self, path: &Path, sidecar: &Path, is_ours: bool, magic: [u8; 8]) -> OpenError {
        let problem = match magic {
            sidecar::MAGIC => "is a zone table; name the image that it belongs to".to_owned(),
            _ if is_ours => format!(
                "its zone table {} is missing: the image's zones cannot be known without it; bring it back, or name it \
                 with driver=zoned,file.filename={},sidecar=FILE",
                sidecar.display(),
                path.display()
            ),
            _ => format!(
                "has no zone table ({} does not exist); for a disk without zones say driver=raw,file.filename={}",
                sidecar.display(),
                path.display()
            ),
        };
        OpenError::Data {
            path: path.to_owned(),
            problem,
        }
    }

    async fn magic(&self, node: &dyn Node) -> [u8; 8] {
        let buf = IoBuf::alloc(sidecar::BLOCK);
        let mut magic = [0; 8];
        let Some(file) = node.file() else { return magic };
        if file.read(buf.clone(), 0).await.is_ok() {
            buf.slice(0..8).copy_to(&mut magic);
        }
        magic
    }

    async fn open_tree(&self, mut tree: Options) -> Result<Device, OpenError> {
        if tree.peek("driver") == Some("zoned") {
            return self.open_zoned_tree(tree).await;
        }
        if tree.peek("driver") == Some("qcow2") {
            let image = self.image_of(tree, self.options.read_only)?;
            return self.open_image(image).await;
        }
        let read_only = tree.bool("read-only")?.unwrap_or(self.options.read_only);
        let node = self.open_node(tree, read_only, Chain::default()).await?;
        Ok(Device::new(node))
    }

    async fn open_zoned_tree(&self, mut tree: Options) -> Result<Device, OpenError> {
        tree.take("driver");
        let read_only = tree.bool("read-only")?.unwrap_or(self.options.read_only);
        let sidecar = tree.string("sidecar")?.map(PathBuf::from);
        let run_state = match tree.string("run-state")? {
            None => self.options.run_state.clone(),
            Some(text) => run_state_of(&text),
        };
        let child = tree.child("file")?;
        let filename = child.find_string("filename");
        let direct = child
            .find_string("cache.direct")
            .map_or(self.options.direct, |text| text == "on" || text == "true");
        let child = self.open_node(child, read_only, Chain::default()).await?;
        if child.limits().zoned.is_some() {
            return Err(OpenError::Graph(
                "zoned: what is below has zones of its own: name it without driver=zoned".into(),
            ));
        }
        if child.driver() == "qcow2" {
            return Err(OpenError::Graph(
                "zoned: a qcow2 image keeps its zones itself: create it with zones, and name it with driver=qcow2".into(),
            ));
        }
        match filename {
            Some(filename) => {
                tree.finish("zoned", &ZONED_OPTIONS)?;
                let sidecar = sidecar.unwrap_or_else(|| default_sidecar(Path::new(&filename)));
                self.open_zoned(child, sidecar, run_state, direct, read_only)
                    .await
            }
            None => {
                let geometry = geometry_of(&mut tree, child.limits().size)?;
                tree.finish("zoned", &ZONE_OPTIONS)?;
                Ok(Device::zoned(ZonedNode::volatile(child, geometry)?, Vec::new()))
            }
        }
    }

    async fn open_zoned(
        &self,
        child: Arc<dyn Node>,
        sidecar: PathBuf,
        run_state: RunStateMode,
        direct: bool,
        read_only: bool,
    ) -> Result<Device, OpenError> {
        let read_only = read_only || child.limits().read_only;
        self.check_share(read_only)?;
        let options = ZonedOptions {
            sidecar,
            run_state,
            read_only,
            direct,
            force_share: self.options.force_share,
            lock_wait: self.options.lock_wait,
        };
        let (node, notices) = ZonedNode::open(self.host, child, &options).await?;
        notices.iter().for_each(|notice| tracing::warn!("{notice}"));
        Ok(Device::zoned(node, notices))
    }

    /// Without locks nothing keeps two writers of an image apart, and the second would end the first one's epoch.
    fn check_share(&self, read_only: bool) -> Result<(), OpenError> {
        if self.options.force_share && !read_only {
            return Err(OpenError::Graph(
                "force-share can only be used with read-only images: open it read-only too".into(),
            ));
        }
        Ok(())
    }

    fn open_node<'a>(
        &'a self,
        tree: Options,
        read_only: bool,
        chain: Chain,
    ) -> LocalBoxFuture<'a, Result<Arc<dyn Node>, OpenError>> {
        Box::pin(self.open_any(tree, read_only, chain))
    }

    async fn open_any(
        &self,
        mut tree: Options,
        read_only: bool,
        chain: Chain,
    ) -> Result<Arc<dyn Node>, OpenError> {
        let read_only = tree.bool("read-only")?.unwrap_or(read_only);
        let driver = match tree.string("driver")? {
            Some(driver) => driver,
            None if tree.has("filename") => "file".to_owned(),
            None => return Err(OpenError::Graph(format!("{}driver is missing", tree.place()))),
        };
        match driver.as_str() {
            "file" => {
                let choice = self.file_choice("file", tree, read_only)?;
                Ok(Arc::new(self.open_file(&choice)?))
            }
            "host_device" => {
                let choice = self.file_choice("host_device", tree, read_only)?;
                self.open_host_device(&choice).await
            }
            "qcow2" => {
                let image = self.image_of(tree, read_only)?;
                self.open_image_below(image, chain).await
            }
            "memory" => {
                let size = tree
                    .size("size")?
                    .ok_or_else(|| OpenError::Graph("memory: size is missing, as in size=1G".into()))?;
                tree.finish("memory", &["driver", "size", "read-only"])?;
                let node = FileNode::memory(&**self.host, size, read_only);
                Ok(Arc::new(
                    node.map_err(|e| OpenError::file("memory", "cannot be made", e))?,
                ))
            }
            "raw" => {
                let child = tree.child("file")?;
                let (offset, size) = (tree.size("offset")?, tree.size("size")?);
                tree.finish("raw", &["driver", "file", "offset", "size", "read-only"])?;
                let child = self.open_node(child, read_only, chain).await?;
                Ok(Arc::new(RawNode::new(child, offset.unwrap_or(0), size)?))
            }
            "zoned" => Err(OpenError::Graph("zoned can only be the root of a graph".into())),
            unknown => Err(OpenError::Graph(format!(
                "{}driver {unknown:?} is not known{}; drivers are {}",
                tree.place(),
                options::did_you_mean(unknown, &DRIVERS),
                DRIVERS.join(", ")
            ))),
        }
    }

    /// The file or block device that a tree of options describes.
    fn file_choice(&self, driver: &str, mut tree: Options, read_only: bool) -> Result<FileChoice, OpenError> {
        let choice = FileChoice {
            path: tree.required("filename")?.into(),
            direct: tree.bool("cache.direct")?.unwrap_or(self.options.direct),
            read_only: tree.bool("read-only")?.unwrap_or(read_only),
            locking: tree.string("locking")?,
        };
        tree.finish(
            driver,
            &["driver", "filename", "cache.direct", "locking", "read-only"],
        )?;
        Ok(choice)
    }

    fn open_file(&self, choice: &FileChoice) -> Result<FileNode, OpenError> {
        let &FileChoice {
            ref path,
            direct,
            read_only,
            ..
        } = choice;
        self.check_share(read_only)?;
        let lock = self.lock_of("file", choice)?;
        if let Some(problem) = needs_host_device(&**self.host, path) {
            return Err(OpenError::data(path, problem));
        }
        let options = FileOptions {
            direct,
            lock,
            lock_wait: self.options.lock_wait,
            ..FileOptions::existing(read_only)
        };
        let file = self
            .host
            .open(path, &options)
            .map_err(|e| host_error(path, "cannot be opened", e))?;
        let node =
            FileNode::new(file, read_only).map_err(|e| OpenError::file(path, "cannot be looked at", e))?;
        Ok(node.named(path))
    }
}

impl Opener<'_> {
    /// The locks that a file or device is opened with.
    fn lock_of(&self, driver: &str, choice: &FileChoice) -> Result<LockMode, OpenError> {
        match (
            choice.locking.as_deref(),
            self.options.force_share,
            choice.read_only,
        ) {
            (Some("off"), ..) | (_, true, _) => Ok(LockMode::None),
            (Some("on" | "auto") | None, _, true) => Ok(LockMode::Read),
            (Some("on" | "auto") | None, _, false) => Ok(LockMode::Write),
            (Some(other), ..) => Err(OpenError::Graph(format!(
                "{driver}: locking={other} is not one of on, off, auto"
            ))),
        }
    }
}

/// The meaning of `run-state=` and `--run-state`: a mode's name, or a directory.
pub fn run_state_of(text: &str) -> RunStateMode {
    match text {
        "beside" => RunStateMode::Beside,
        "sync" => RunStateMode::Sync,
        "none" => RunStateMode::None,
        directory => RunStateMode::In(directory.into()),
    }
}

/// First bytes of a qcow2 image.
const QCOW2_MAGIC: [u8; 4] = zbdkit_spec::qcow2::MAGIC.to_be_bytes();

const ZONED_OPTIONS: [&str; 5] = ["driver", "file", "read-only", "sidecar", "run-state"];

const ZONE_OPTIONS: [&str; 16] = [
    "driver",
    "file",
    "read-only",
    "block_size",
    "run-state",
    "zone.mode",
    "zone.size",
    "zone.capacity",
    "zone.conventional_zones",
    "zone.max_open_zones",
    "zone.max_active_zones",
    "zone.max_append_bytes",
    "zone.zrwa_size",
    "zone.zrwa_granularity",
    "zone.max_zrwa",
    "zone.descr_ext_size",
];

fn geometry_of(tree: &mut Options, size: u64) -> Result<Geometry, OpenError> {
    let model = match tree.string("zone.mode")?.as_deref() {
        None | Some("host-managed") => Model::HostManaged,
        Some("host-aware") => Model::HostAware,
        Some(other) => {
            return Err(OpenError::Graph(format!(
                "zone.mode={other} is not one of host-managed, host-aware"
            )));
        }
    };
    let zone_size = tree.size("zone.size")?.ok_or_else(|| {
        OpenError::Graph(
            "zoned: over memory the zones are described here; zone.size is missing, as in zone.size=64M"
                .into(),
        )
    })?;
    let zone_capacity = tree.size("zone.capacity")?.unwrap_or(zone_size);
    let block_size = tree
        .number("block_size")?
        .unwrap_or(crate::create::DEFAULT_BLOCK_SIZE);
    let asked = crate::create::ZnsOptions {
        zrwa_size: tree.size("zone.zrwa_size")?,
        zrwa_granularity: tree.size("zone.zrwa_granularity")?,
        max_zrwa: tree.number("zone.max_zrwa")?,
        extension_size: tree.number("zone.descr_ext_size")?.unwrap_or(0),
    };
    Ok(Geometry::new(GeometrySpec {
        model,
        size,
        zone_size,
        zone_capacity,
        nr_conventional: tree.number("zone.conventional_zones")?.unwrap_or(0),
        block_size,
        max_open: tree.number("zone.max_open_zones")?.unwrap_or(0),
        max_active: tree.number("zone.max_active_zones")?.unwrap_or(0),
        max_append: tree
            .size("zone.max_append_bytes")?
            .unwrap_or(crate::create::default_append(zone_capacity)),
        zns: asked.zns(block_size),
    })?)
}
