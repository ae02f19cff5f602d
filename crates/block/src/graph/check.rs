//! What a check opens of a graph: the files, before anybody trusts what they say.

use std::path::PathBuf;
use std::sync::Arc;

use zbdkit_qcow2::{CheckReport, Header, Repair};

use super::qcow2::{Areas, Image, OURS};
use super::{Chain, Description, Graph, OpenOptions, Opener, ZONED_OPTIONS, default_sidecar};
use crate::check::{CheckOutcome, Parts};
use crate::error::OpenError;
use crate::host::{FileOptions, Host};
use crate::lock::LockMode;
use crate::node::Node;
use crate::qcow2::{ImageFormat, Look};
use crate::raw::RawNode;
use crate::zoned::host_error;

impl Graph {
    /// The files of a raw image with a sidecar; `None` for anything else.
    pub(crate) async fn open_parts(
        &self,
        host: &Arc<dyn Host>,
        options: &OpenOptions,
    ) -> Result<Option<Parts>, OpenError> {
        let opener = Opener { host, options };
        let (data, sidecar): (Arc<dyn Node>, PathBuf) = match &self.root {
            Description::Path(path) => {
                let sidecar = default_sidecar(path);
                let exists = host
                    .exists(&sidecar)
                    .map_err(|e| OpenError::file(&sidecar, "cannot be looked for", e))?;
                if !exists {
                    let node = opener.open_file(&opener.image_at(path).file)?;
                    return match node.file().is_some_and(|file| host.image_id(file).is_some()) {
                        true => Err(OpenError::data(path, "its zone table is missing: bring it back")),
                        false => Ok(None),
                    };
                }
                let node = opener.open_file(&opener.image_at(path).file)?;
                (Arc::new(RawNode::new(Arc::new(node), 0, None)?), sidecar)
            }
            Description::Tree(tree) if tree.peek("driver") == Some("zoned") => {
                let mut tree = tree.clone();
                tree.take("driver");
                let sidecar = tree.string("sidecar")?.map(PathBuf::from);
                let child = tree.child("file")?;
                let Some(filename) = child.find_string("filename") else {
                    return Ok(None);
                };
                for other in ["run-state", "read-only"] {
                    tree.take(other);
                }
                tree.finish("zoned", &ZONED_OPTIONS)?;
                let node = opener
                    .open_node(child, options.read_only, Chain::default())
                    .await?;
                (
                    node,
                    sidecar.unwrap_or_else(|| default_sidecar(filename.as_ref())),
                )
            }
            Description::Tree(_) => return Ok(None),
        };
        let lock = match (options.force_share, options.read_only) {
            (true, _) => LockMode::None,
            (false, true) => LockMode::Read,
            (false, false) => LockMode::Write,
        };
        let opened = host.open(
            &sidecar,
            &FileOptions {
                lock,
                lock_wait: options.lock_wait,
                ..FileOptions::existing(options.read_only)
            },
        );
        let table = opened.map_err(|e| host_error(&sidecar, "cannot be opened", e))?;
        Ok(Some(Parts { sidecar, table, data }))
    }

    /// Checks the qcow2 image at the root.
    pub(crate) async fn check_qcow2(
        &self,
        host: &Arc<dyn Host>,
        options: &OpenOptions,
        repair: Repair,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<CheckOutcome, OpenError> {
        let opener = Opener { host, options };
        let image = match &self.root {
            Description::Path(path) => opener.image_at(path),
            Description::Tree(tree) => opener.image_of(tree.clone(), options.read_only)?,
        };
        let path = image.file.path.clone();
        let wrong = OpenError::image(&path);
        let file = opener.open_choice(&image.file)?;
        let read = || async {
            let header = Header::read_for_check(&file).await.map_err(&wrong)?;
            header.check_features(OURS).map_err(&wrong)?;
            Ok::<Header, OpenError>(header)
        };
        let header = read().await?;
        let look = Look::at(&file, &header).await;
        // What cannot be named is not given away; a repair of the zones comes first then.
        let areas = match (&look, repair) {
            (Some(look), Repair::Leaks) if !look.knows_areas() => Vec::new(),
            (Some(look), _) => look.areas(),
            (None, _) => Vec::new(),
        };
        let mut report = zbdkit_qcow2::check(&file, &header, None, &areas, repair, progress)
            .await
            .map_err(&wrong)?;
        let Some(look) = look else {
            return Ok(outcome(report, None));
        };
        let mut found = look.report();
        if repair == Repair::All && found.errors > 0 {
            let lenient = Image {
                areas: Areas::Known(look.areas()),
                ..opener.unlocked(image)
            };
            let mended = match opener.open_alone(lenient).await {
                Ok(node) => look.mend(host, &node, &path, &mut found).await,
                Err(error) => Err(error.to_string()),
            };
            match mended {
                Ok(()) => found.all_fixed(),
                Err(error) => found.say(format!("the zones could not be repaired: {error}")),
            }
            let header = read().await?;
            let areas = Look::at(&file, &header)
                .await
                .map_or(Vec::new(), |look| look.areas());
            let again = zbdkit_qcow2::check(&file, &header, None, &areas, repair, progress)
                .await
                .map_err(&wrong)?;
            report = joined(report, again);
        }
        Ok(outcome(report, Some(found)))
    }
}

fn outcome(report: CheckReport, zones: Option<crate::check::ZoneCheck>) -> CheckOutcome {
    CheckOutcome {
        format: ImageFormat::Qcow2,
        report: Some(report),
        zones,
    }
}

/// Two checks of one image, the second after more was repaired.
fn joined(first: CheckReport, second: CheckReport) -> CheckReport {
    CheckReport {
        corruptions_fixed: first.corruptions_fixed + second.corruptions_fixed,
        leaks_fixed: first.leaks_fixed + second.leaks_fixed,
        messages: first.messages.into_iter().chain(second.messages).collect(),
        rechecked: second.rechecked.or(first.rechecked),
        ..second
    }
}
