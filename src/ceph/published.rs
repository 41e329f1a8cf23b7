//! Images that are published before their objects are there.
//!
//! THE ONE RULE: no object map and no fast-diff on an image that others may open before every object that holds data
//! is there. A client reads the object map of an image once, when it opens it. Where that map says that an object does
//! not exist, the client reads the parent without asking the OSDs, for as long as it has the image open. Clients that
//! open an image read-only set no watch, so nothing tells them of new objects. Once the source's snapshot is removed,
//! they read zeros. Without a map every client asks the OSDs for every object, and finds it as soon as it is there.
//!
//! So such an image has no map while it has a parent, and gets one when it has none ([`check_rule`]):
//! [`fill_published`] copies, [`detach`] cuts the parent off, and only then makes the maps.
//!
//! The same clients ask the parents for each hole of the image, also after the parents have changed. A read at a
//! removed snapshot returns data that was written later. If an object of the source is gone that hid data of its own
//! parent, the read returns that data. So [`detach`] makes an empty object for each hole for which clients would ask
//! the parents. For most holes they do not ask: the parents' own object maps show that there is no object.
#![allow(unsafe_code)]

use std::sync::Arc;
use std::time::Duration;

use ceph::rados::rados_remove;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::cluster::{Cluster, IoCtx, c_string, check};
use super::fill::{Copier, ObjectScan, Versions, copy_all, flatten, open_to_fill};
use super::layers::{Chain, DataObjects, Inquiry, Layout, ObjectSet, STRETCH, asked_for, sources};
use super::objects::create_empty;
use super::pace::{OBJECT, QUESTION};
use super::rbd::{self, Access, Image, find_in_trash};
use super::{Error, ErrorKind, Features, FillState, ImageKey, ImageSpec, Moved, Progress, Result, TransferLimits};

/// How often a fill checks that the image and its parents are unchanged.
const CHECK_INTERVAL: Duration = Duration::from_secs(2);

/// Times that a fill begins again in one call because the image's parents changed: a source that is deleted changes
/// them once or twice.
const CHAIN_TRIES: usize = 5;

/// The rule: an image that others may open has a parent or an object map, never both.
pub(super) fn check_rule(image: &Image, has_parent: bool, operation: &str) -> Result<()> {
    let features = image.features()?;
    if has_parent && (features.has(Features::OBJECT_MAP) || features.has(Features::FAST_DIFF)) {
        let detail = "the image has an object map and still a parent: clients that open it may read wrong data. Remove \
                      the map with `rbd feature disable … object-map`, and close what opened the image since it has it";
        return Err(Error::new(operation, ErrorKind::Unsupported, detail));
    }
    Ok(())
}

/// Whether head or any snapshot of an image, which was just opened, has a parent. Leaves the handle at a snapshot,
/// where there is one.
fn has_parent(image: &Image) -> Result<bool> {
    if image.parent()?.is_some() {
        return Ok(true);
    }
    for snapshot in image.all_snapshots()? {
        image.set_snapshot_id(snapshot)?;
        if image.parent()?.is_some() {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Whether the maps of head and snapshots are there and valid. Leaves the handle at a snapshot, where there is one.
fn has_maps(image: &Image) -> Result<bool> {
    if !image.features()?.has(Features::PUBLISHED) || image.flags()? != 0 {
        return Ok(false);
    }
    for snapshot in image.all_snapshots()? {
        image.set_snapshot_id(snapshot)?;
        if image.flags()? != 0 {
            return Ok(false);
        }
    }
    Ok(true)
}

/// The image by its id, which it keeps when others rename it or move it to the trash.
fn by_id(cluster: &Arc<Cluster>, spec: &ImageSpec) -> Result<ImageSpec> {
    match &spec.image {
        ImageKey::Id(_) => Ok(spec.clone()),
        ImageKey::Name(_) => {
            Ok(ImageSpec::with_id(&spec.pool, Image::open_existing(cluster, spec, Access::ReadOnly)?.id()?))
        }
    }
}

/// [`Storage::fill_published`](super::Storage::fill_published).
pub(super) fn fill_published(
    cluster: &Arc<Cluster>,
    spec: &ImageSpec,
    from: FillState,
    limits: &TransferLimits,
    saved: &watch::Sender<FillState>,
    (progress, cancel): (&Progress, &CancellationToken),
) -> Result<Moved> {
    let operation = format!("fill {spec}");
    let spec = by_id(cluster, spec)?;
    let inquiry = Inquiry { operation: &operation, rate: &limits.rates.objects, progress, cancel };
    let (mut state, mut moved) = (from, Moved::default());
    for _ in 0..CHAIN_TRIES {
        let copied = fill_from_parents(cluster, &spec, &mut state, &mut moved, limits.concurrency, saved, inquiry);
        match copied.map_err(|e| unless_gone(cluster, &spec, e)) {
            Err(e) if e.kind() == ErrorKind::Conflict => tracing::info!("{operation}: {e}; going on with the new ones"),
            copied => return copied.map(|()| moved),
        }
    }
    Err(Error::new(operation, ErrorKind::Conflict, "the image's parents changed again and again"))
}

/// [`ErrorKind::NotFound`] is for an image that is gone. Where one of its parents is, it has others by now.
fn unless_gone(cluster: &Arc<Cluster>, spec: &ImageSpec, error: Error) -> Error {
    match Image::open(cluster, spec, Access::ReadOnly) {
        Ok(Some(_)) if error.kind() == ErrorKind::NotFound => error.with_kind(ErrorKind::Conflict),
        _ => error,
    }
}

/// Fills the image from the parents that it has now. [`ErrorKind::Conflict`] as soon as it has others.
fn fill_from_parents(
    cluster: &Arc<Cluster>,
    spec: &ImageSpec,
    state: &mut FillState,
    moved: &mut Moved,
    concurrency: usize,
    saved: &watch::Sender<FillState>,
    inquiry: Inquiry<'_>,
) -> Result<()> {
    let operation = inquiry.operation;
    let to = Image::open_existing(cluster, spec, Access::ReadOnly)?;
    if to.parent()?.is_none() {
        return Ok(());
    }
    check_rule(&to, true, operation)?;
    // (the head of the image has no snapshot's id)
    let chain = Chain::of(cluster, &to, 0)?;
    let layers = sources(cluster, &to)?;
    let layout = Layout::of(&to)?;
    let scan = ObjectScan::of(&layers, layout, layout.count(to.size()?), Versions::Seen, inquiry)?;
    let (data, objects) = (open_to_fill(&to)?, DataObjects::of(&to, None)?);
    drop(to);

    // The scan takes an object from the next layer if no nearer layer is seen to hold it. A removed snapshot shows no
    // objects any more, or data that was written later. So the list of objects, and their versions, count only if the
    // snapshots are still there after the scan. From then on no other version is copied: an object that was written
    // since ends the copying with a conflict.
    let check_unchanged = || {
        let now = Image::open_existing(cluster, spec, Access::ReadOnly)?;
        check_rule(&now, now.parent()?.is_some(), operation)?;
        if Chain::of(cluster, &now, 0)? == chain {
            return Ok(());
        }
        Err(Error::new(operation, ErrorKind::Conflict, "the image has other parents by now"))
    };
    let first = state.next_object;
    let (before, already) = (*moved, state.copied);
    let mut copier = Copier::new(&data, &objects, inquiry);
    copier.check_every(CHECK_INTERVAL, &check_unchanged);
    let copied = copy_all(&mut copier, &scan, first, concurrency, None, check_unchanged, |next, copied| {
        *state = FillState { next_object: next, copied: already + copied.objects };
        saved.send_replace(*state);
    });
    let now = copier.moved;
    // waits for the copies in flight
    drop(copier);
    *moved = Moved { bytes: before.bytes + now.bytes, objects: before.objects + now.objects, ..before };
    copied
}

/// [`Storage::detach`](super::Storage::detach).
pub(super) fn detach(
    cluster: &Arc<Cluster>,
    spec: &ImageSpec,
    limits: &TransferLimits,
    (progress, cancel): (&Progress, &CancellationToken),
) -> Result<Moved> {
    let operation = format!("detach {spec}");
    let (spec, rate) = (by_id(cluster, spec)?, &limits.rates.objects);
    let image = Image::open_existing(cluster, &spec, Access::ReadOnly)?;
    let count = Layout::of(&image)?.count(image.size()?);
    let has_object_map = image.features()?.has(Features::OBJECT_MAP);
    let inquiry = Inquiry { operation: &operation, rate, progress: &progress.steps_only(), cancel };
    let mut moved = Moved::default();
    // If an earlier call did the flatten, the parents' objects are not known any more.
    let mut hidden = ObjectSet::all_of(count);
    if has_parent(&image)? {
        check_rule(&image, true, &operation)?;
        drop(image);
        let image = Image::open_existing(cluster, &spec, Access::ReadOnly)?;
        if image.parent()?.is_some() {
            hidden = asked_for(cluster, &image, inquiry).map_err(|e| unless_gone(cluster, &spec, e))?;
        }
        drop(image);
        // librbd asks for each object at its own pace; the rate limiter delays later questions instead
        rate.charge(count as f64 * QUESTION);
        let flattened = flatten(cluster, &spec, rate, (progress, cancel));
        moved = flattened.map_err(|e| unless_gone(cluster, &spec, e))?;
    }

    let image = Image::open_existing(cluster, &spec, Access::ReadOnly)?;
    if has_parent(&image)? {
        let detail = "the image or a snapshot of it still has a parent after the flatten";
        return Err(Error::new(operation, ErrorKind::Conflict, detail));
    }
    drop(image);
    // (the maps come after this)
    if !has_object_map {
        fill_holes(&Image::open_existing(cluster, &spec, Access::ReadOnly)?, &hidden, inquiry)?;
    }
    if has_maps(&Image::open_existing(cluster, &spec, Access::ReadOnly)?)? {
        return Ok(moved);
    }
    let image = Image::open_existing(cluster, &spec, Access::ReadWrite)?;
    image.set_published_features()?;
    rate.charge(count as f64 * QUESTION);
    image.rebuild_object_map(progress, cancel)?;
    for snapshot in image.all_snapshots()? {
        image.set_snapshot_id(snapshot)?;
        rate.charge(count as f64 * QUESTION);
        image.rebuild_object_map(progress, cancel)?;
    }
    drop(image);
    if has_maps(&Image::open_existing(cluster, &spec, Access::ReadOnly)?)? {
        return Ok(moved);
    }
    Err(Error::new(operation, ErrorKind::Conflict, "the object map is not valid after it was rebuilt"))
}

/// Makes an object without bytes of each of these that the image has not. It is written under an empty snapshot
/// context, so the image's snapshots have it too.
fn fill_holes(image: &Image, hidden: &ObjectSet, inquiry: Inquiry<'_>) -> Result<()> {
    let objects = DataObjects::of(image, None)?;
    let fill = |data: &IoCtx, object| {
        if objects.length(inquiry.operation, data, object)?.is_none() {
            inquiry.rate.charge(OBJECT);
            create_empty(data, &objects.name(inquiry.operation, object)?, inquiry.operation)?;
        }
        Ok(())
    };
    let mut next = 0;
    while next < hidden.count {
        let stretch = objects.layout.stretch(next, hidden.count);
        next = stretch.end;
        let stretch: Vec<u64> = stretch.filter(|object| hidden.contains(*object)).collect();
        objects.ask(&stretch, inquiry, fill)?;
    }
    Ok(())
}

/// [`Storage::is_gone`](super::Storage::is_gone).
pub(super) fn is_gone(cluster: &Arc<Cluster>, spec: &ImageSpec) -> Result<bool> {
    let operation = format!("look whether {spec} is gone");
    is_gone_from(&IoCtx::open(cluster, &spec.pool)?, spec, id_of(spec, &operation)?, &operation)
}

fn is_gone_from(io: &IoCtx, spec: &ImageSpec, id: &str, operation: &str) -> Result<bool> {
    let is_there = has_header(io, id, operation)?
        || rbd::name_in_directory(io, id, operation)?.is_some()
        || find_in_trash(io, spec)?.is_some();
    Ok(!is_there)
}

fn id_of<'a>(spec: &'a ImageSpec, operation: &str) -> Result<&'a str> {
    match &spec.image {
        ImageKey::Id(id) => Ok(id),
        ImageKey::Name(_) => Err(Error::new(operation, ErrorKind::Unsupported, "the image is not given by its id")),
    }
}

/// [`Storage::sweep_objects`](super::Storage::sweep_objects).
pub(super) fn sweep_objects(
    cluster: &Arc<Cluster>,
    spec: &ImageSpec,
    objects: u64,
    data_pool: Option<&str>,
    limits: &TransferLimits,
    (progress, cancel): (&Progress, &CancellationToken),
) -> Result<u64> {
    let operation = format!("sweep the objects of {spec}");
    let (id, io) = (id_of(spec, &operation)?, IoCtx::open(cluster, &spec.pool)?);
    if !is_gone_from(&io, spec, id, &operation)? {
        return Err(Error::new(operation, ErrorKind::Exists, "the image is there"));
    }
    let data_pool = data_pool.map(|pool| IoCtx::open(cluster, pool)).transpose()?;
    let left = DataObjects::of_removed(&io, id, data_pool.map(|data| data.pool_id()));
    let inquiry = Inquiry { operation: &operation, rate: &limits.rates.objects, progress, cancel };
    let remove = |data: &IoCtx, object| {
        if left.length(&operation, data, object)?.is_none() {
            return Ok(false);
        }
        inquiry.rate.charge(OBJECT);
        let name = left.name(&operation, object)?;
        // SAFETY: the ioctx is open, the name ends in NUL.
        match unsafe { rados_remove(data.raw(), name.as_ptr()) } {
            r if r == -libc::ENOENT => Ok(false),
            r => check(&operation, r).map(|_| true),
        }
    };
    let (mut removed, mut next) = (0, 0);
    while next < objects {
        let stretch: Vec<u64> = (next..objects.min(next + STRETCH)).collect();
        next += STRETCH;
        removed += left.ask(&stretch, inquiry, remove)?.into_iter().filter(|removed| *removed).count() as u64;
    }
    Ok(removed)
}

fn has_header(io: &IoCtx, id: &str, operation: &str) -> Result<bool> {
    rbd::exists(io, &c_string(operation, &format!("rbd_header.{id}"))?, operation)
}
