//! Images that are published before their objects are there.
//!
//! THE ONE RULE: no object map and no fast-diff on an image that others may open before every object that holds data
//! is there. A client reads the object map of an image once, when it opens it. Where that map says that an object does
//! not exist, the client reads the parent without asking the OSDs, for as long as it has the image open. Clients that
//! open an image read-only set no watch, so nothing tells them of new objects. Once the source's snapshot is removed,
//! they read zeros. Without a map every client asks the OSDs for every object, and finds it as soon as it is there.

use std::sync::Arc;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::cluster::Cluster;
use super::rbd::{Access, Image};
use super::storage::flatten;
use super::{Error, ErrorKind, Features, FillState, ImageSpec, Moved, Progress, Result, TransferLimits};

/// The rule's first half: an error where the image has an object map.
fn refuse_maps(image: &Image, operation: &str) -> Result<()> {
    let features = image.features()?;
    if features.has(Features::OBJECT_MAP) || features.has(Features::FAST_DIFF) {
        let detail = "the image has an object map, which its readers would go by";
        return Err(Error::new(operation, ErrorKind::Unsupported, detail));
    }
    Ok(())
}

/// [`Storage::fill_published`](super::Storage::fill_published).
pub(super) fn fill_published(
    cluster: &Arc<Cluster>,
    spec: &ImageSpec,
    _from: FillState,
    _limits: &TransferLimits,
    _saved: &watch::Sender<FillState>,
    (_progress, _cancel): (&Progress, &CancellationToken),
) -> Result<Moved> {
    let operation = format!("fill {spec}");
    let image = Image::open_existing(cluster, spec, Access::ReadOnly)?;
    refuse_maps(&image, &operation)?;
    Err(Error::new(operation, ErrorKind::Unsupported, "it is left to the flatten"))
}

/// [`Storage::detach`](super::Storage::detach).
pub(super) fn detach(
    cluster: &Arc<Cluster>,
    spec: &ImageSpec,
    _limits: &TransferLimits,
    (progress, cancel): (&Progress, &CancellationToken),
) -> Result<Moved> {
    let moved = flatten(cluster, spec, progress, cancel)?;
    Image::open_existing(cluster, spec, Access::ReadWrite)?.rebuild_as_published(progress, cancel)?;
    Ok(moved)
}

/// [`Storage::sweep_objects`](super::Storage::sweep_objects).
pub(super) fn sweep_objects(
    cluster: &Arc<Cluster>,
    spec: &ImageSpec,
    _objects: u64,
    _data_pool: Option<&str>,
    _limits: &TransferLimits,
    _: (&Progress, &CancellationToken),
) -> Result<u64> {
    match Image::open(cluster, spec, Access::ReadOnly)? {
        Some(_) => Err(Error::new(format!("sweep the objects of {spec}"), ErrorKind::Exists, "the image is there")),
        None => Ok(0),
    }
}
