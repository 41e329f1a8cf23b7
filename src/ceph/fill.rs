//! Filling an image inside the cluster: the OSDs copy the objects of the source and its parents by RADOS `copy_from`.
//! [`server_copy`] fills an empty image; `published.rs` fills a clone that others may have open.
//!
//! The fill leaves out objects that cannot be copied exactly (another object size or striping, or an overlap that ends
//! inside the object), and objects with almost no data. librbd on this host copies those afterwards: the copy of an
//! empty image's rest, or the flatten of a clone. `copy_from` writes holes as zeros. So the fill asks the OSD for the
//! holes of sparse objects, and makes them sparse again.
//!
//! An object is taken from a parent only when every nearer layer is known not to hold it (see `layers`).
//!
//! Objects are written under an empty snapshot context, as librbd's own copy-up does, so that a snapshot which a clone
//! has already sees them too. librbd knows nothing of these writes, so the object map is off during the fill and
//! rebuilt at the end: a map that knows less than there is would make a removal of the half filled image leave objects
//! behind.
#![allow(unsafe_code)]

use std::collections::HashSet;
use std::ffi::{CString, c_int, c_void};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::ops::Range;
use std::ptr;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::time::{Duration, Instant};

use ceph::rados::{rados_ioctx_selfmanaged_snap_set_write_ctx, rados_ioctx_t};
use tokio_util::sync::CancellationToken;

use super::cluster::{Cluster, IoCtx, cancelled, check};
use super::copy::{HostPace, copy_extents};
use super::layers::{
    Chain, DataObjects, Inquiry, Layer, Layout, Listing, Missing, ObjectSet, StoredBytes, extents_of, parents,
    refuse_migrating, sources, union, within, without,
};
use super::pace::{OBJECT, QUESTION, RateLimiter};
use super::rbd::{Access, Extent, Image};
use super::{Error, ErrorKind, Features, ImageSpec, Moved, Progress, Result, TransferLimits, sys};

/// How long to wait for a completion before looking at the cancellation again.
const POLL: Duration = Duration::from_millis(100);

/// Objects of a layer that are asked how much of them is holes, before all of them are.
const SAMPLE: usize = 32;

/// Per cent of the bytes of the sampled objects that must be stored for the layer to count as full of data.
const SAMPLE_DENSE_PERCENT: u64 = 95;

/// Per cent of an object's bytes that must be stored for its holes not to matter.
const DENSE_PERCENT: u64 = 90;

/// An object that stores no more than both of these is left to librbd, which moves only its data: per cent of the
/// object, and bytes.
const SPARSE_PERCENT: u64 = 12;
const SPARSE_MAX_BYTES: u64 = 128 << 10;

/// Bytes: the unit of holes, in which BlueStore allocates.
const PAGE: u64 = 4096;

/// Objects of a flattened image that are made sparse at a time.
const SPARSIFY_CONCURRENCY: usize = 8;

/// A fault of the fill, for tests of the steps after it.
#[doc(hidden)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FillFault {
    /// Leaves out every third object without an error.
    SkipEveryThird,
    /// An error after so many objects.
    FailAfter(usize),
    /// Ends after so many objects as if it had done all.
    StopAfter(usize),
}

/// Copies `source@snapshot` into the empty image `destination`: the OSDs copy its objects and those of its parents, and
/// this host the rest.
pub(super) fn server_copy(
    cluster: &Arc<Cluster>,
    source: &ImageSpec,
    snapshot: &str,
    destination: &ImageSpec,
    limits: &TransferLimits,
    fault: Option<FillFault>,
    (progress, cancel): (&Progress, &CancellationToken),
) -> Result<Moved> {
    let operation = format!("fill {destination} from {source}@{snapshot}");
    let unsupported = |detail: &str| Err(Error::new(&operation, ErrorKind::Unsupported, detail));
    let from = Image::open_snapshot(cluster, source, snapshot)?;
    let snap_id = from.snapshot_id(snapshot)?;
    let to = Image::open_existing(cluster, destination, Access::ReadOnly)?;
    let (size, layout) = (to.size()?, Layout::of(&to)?);
    if from.size()? != size || Layout::of(&from)? != layout {
        return unsupported("source and destination differ in size or layout");
    }
    if to.parent()?.is_some() || to.features()?.has(Features::OBJECT_MAP) {
        return unsupported("the destination has a parent or an object map");
    }
    let chain = Chain::of(cluster, &from, snap_id)?;
    let inquiry = Inquiry { operation: &operation, rate: &limits.rates.objects, progress, cancel };

    let mut layers = vec![Layer::new(from, snap_id, size)?];
    layers.extend(parents(cluster, &layers[0].image)?);
    // (another snapshot in the source's place shows at the end, and the copy is removed then)
    let scan = ObjectScan::of(&layers, layout, layout.count(size), Versions::Any, inquiry)?;
    let (data, objects) = (open_to_fill(&to)?, DataObjects::of(&to, None)?);
    drop(to);

    let mut copier = Copier::new(&data, &objects, inquiry);
    copier.shows_rest = true;
    let copied = copy_all(&mut copier, &scan, 0, limits.concurrency, fault, || Ok(()), |_, _| {});
    let (filled, complete) = (copier.moved, std::mem::replace(&mut copier.complete, ObjectSet::none_of(0)));
    // waits for the copies in flight
    drop(copier);
    match copied {
        Err(error) if matches!(error.kind(), ErrorKind::Other | ErrorKind::ReadOnly | ErrorKind::TimedOut) => {
            tracing::warn!(image = %destination, %error, "the OSDs' copy broke off; this host copies the rest");
        }
        copied => copied?,
    }

    // librbd asks the OSDs for each object at its own pace: the rate limiter delays later questions instead
    inquiry.rate.charge(layout.count(size) as f64 * QUESTION);
    Image::open_existing(cluster, destination, Access::ReadWrite)?.rebuild_as_published(progress, cancel)?;
    let rest = copy_rest(cluster, (&scan, &complete), destination, size, limits.concurrency, || {
        // What was copied must still be the snapshot's: a snapshot of the same name could have taken its place.
        chain.check(cluster, source, snapshot, &operation)
    })?;
    progress.set_done(progress.total());
    Ok(filled + rest)
}

/// Copies through this host what the OSDs left out: what the source holds outside of the `complete` objects. `check`
/// tells whether the source is still the same. It is called at the end, and also before anything is read: a source that
/// has lost a parent is not read in vain.
fn copy_rest(
    cluster: &Arc<Cluster>,
    (scan, complete): (&ObjectScan<'_>, &ObjectSet),
    destination: &ImageSpec,
    size: u64,
    concurrency: usize,
    check: impl Fn() -> Result<()>,
) -> Result<Moved> {
    let ObjectScan { layout, count, inquiry, .. } = *scan;
    let per_byte = OBJECT / layout.object_size as f64;
    let pace = HostPace { concurrency, rate: inquiry.rate, per_byte, at_least: QUESTION };
    let (mut moved, mut to, mut next) = (Moved::default(), None, 0);
    while next < count {
        let stretch = layout.stretch(next, count);
        next = stretch.end;
        let rest = scan.rest(&stretch, complete, size)?;
        let Some(ScannedLayer { layer: source, .. }) = scan.layers.first().filter(|_| !rest.is_empty()) else {
            continue;
        };
        let to = match &mut to {
            Some(to) => to,
            None => {
                check()?;
                to.insert(Image::open_existing(cluster, destination, Access::ReadWrite)?)
            }
        };
        moved = moved + copy_extents(&source.image, to, &rest, pace, inquiry)?;
    }
    check()?;
    Ok(moved)
}

/// Whether the layer's object of that number is, byte for byte, what the image has there: both have the same layout,
/// and the overlap does not end within the object's bytes.
fn can_be_copied(object: u64, layer: &Layer) -> bool {
    layer.objects.layout.end_of_set(object) <= layer.end || layer.size <= layer.end
}

/// Which version of an object is copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Versions {
    /// The version that the OSD has at the snapshot when it copies. After the snapshot is removed, that is data that
    /// was written later.
    Any,
    /// The version that the scan saw. No other version is ever copied.
    Seen,
}

/// Finds out, a stretch at a time, which objects are to be copied into an image, and from which layer.
pub(super) struct ObjectScan<'a> {
    layers: Vec<ScannedLayer<'a>>,
    /// Of the image that is filled.
    layout: Layout,
    /// Its objects.
    count: u64,
    versions: Versions,
    inquiry: Inquiry<'a>,
}

/// What to do in a stretch of objects.
#[derive(Default)]
struct StretchPlan {
    copies: Vec<ObjectCopy>,
    /// Nothing is stored in these, so they read as zeros, whatever the layers below hold.
    zeros: Vec<u64>,
    /// How many objects are held in another way, and left to librbd.
    left: u64,
}

struct ScannedLayer<'a> {
    layer: &'a Layer,
    listing: Listing<'a>,
    /// The pool of the layer's data, set to read at its snapshot.
    data: Rc<IoCtx>,
}

impl<'a> ObjectScan<'a> {
    /// The layers are in the order in which they are read from, the nearest first.
    pub fn of(
        layers: &'a [Layer],
        layout: Layout,
        count: u64,
        versions: Versions,
        inquiry: Inquiry<'a>,
    ) -> Result<Self> {
        refuse_migrating(layers, inquiry.operation)?;
        let open = |layer: &'a Layer| {
            Ok(ScannedLayer { layer, listing: layer.listing()?, data: Rc::new(layer.objects.open()?) })
        };
        Ok(Self { layers: layers.iter().map(open).collect::<Result<_>>()?, layout, count, versions, inquiry })
    }

    /// What to do in a stretch of whole sets of objects.
    fn plan(&self, stretch: &Range<u64>) -> Result<StretchPlan> {
        let Self { layout, inquiry, .. } = *self;
        let bytes = layout.bytes_of_sets(stretch);
        // Objects that a nearer layer holds, in whole or in part. They hide the objects of the layers below.
        let mut decided = vec![false; usize::try_from(stretch.end - stretch.start).unwrap_or_default()];
        let mut decide = |object: u64| {
            let place =
                object.checked_sub(stretch.start).and_then(|place| decided.get_mut(usize::try_from(place).ok()?));
            place.is_some_and(|decided| !std::mem::replace(decided, true))
        };
        let mut plan = StretchPlan::default();
        for ScannedLayer { layer, listing, data } in &self.layers {
            let mut objects = Vec::new();
            if layer.objects.layout == layout {
                objects = listing.held(stretch, inquiry)?;
                objects.retain(|object| decide(*object) && can_be_copied(*object, layer));
            } else {
                for extent in within(listing.extents_near(&bytes, inquiry)?, &bytes) {
                    for object in layout.objects(&extent) {
                        decide(object);
                    }
                }
            }
            let holes = scan_holes(layer, &objects, inquiry)?;
            let of_holes = |wanted| objects.iter().zip(&holes).filter(move |(_, holes)| **holes == wanted);
            plan.zeros.extend(of_holes(Holes::All).map(|(object, _)| *object));
            let is_copied = |holes: &Holes| !matches!(holes, Holes::NearlyAll | Holes::All);
            let (objects, holes): (Vec<_>, Vec<_>) =
                objects.into_iter().zip(holes).filter(|(_, holes)| is_copied(holes)).unzip();
            let versions = match self.versions {
                Versions::Any => vec![Some(0); objects.len()],
                Versions::Seen => {
                    let source = &layer.objects;
                    source.ask(&objects, inquiry, |data, object| source.version(inquiry.operation, data, object))?
                }
            };
            for ((object, holes), version) in objects.into_iter().zip(holes).zip(versions) {
                // the object map has it and the OSD has not: librbd finds that out too
                let Some(version) = version else { continue };
                let from = layer.objects.name(inquiry.operation, object)?;
                plan.copies.push(ObjectCopy { object, from, version, data: Rc::clone(data), holes });
            }
        }
        let held = decided.iter().filter(|decided| **decided).count();
        plan.left = held.saturating_sub(plan.copies.len() + plan.zeros.len()) as u64;
        Ok(plan)
    }

    /// Where in an image of `size` bytes those bytes of a stretch lie that a layer holds and no `complete` object does.
    fn rest(&self, stretch: &Range<u64>, complete: &ObjectSet, size: u64) -> Result<Vec<Extent>> {
        let Self { layout, inquiry, .. } = *self;
        let bytes = layout.bytes_of_sets(stretch);
        let bytes = bytes.start..bytes.end.min(size);
        let mut held = Vec::new();
        for ScannedLayer { listing, .. } in &self.layers {
            held.extend(within(listing.extents_near(&bytes, inquiry)?, &bytes));
        }
        let complete = stretch.clone().filter(|object| complete.contains(*object));
        Ok(without(&union(held), &union(extents_of(complete, layout, size))))
    }

    /// How many objects of a range, from the first of a set on, there may be to copy, as far as that is known without
    /// asking. `with_rest`: also those that only librbd can copy, since they lie in a layer with another layout.
    fn upper_bound(&self, range: Range<u64>, with_rest: bool) -> u64 {
        let (mut sum, mut next) = (0, range.start);
        while next < range.end {
            let stretch = self.layout.stretch(next, range.end);
            next = stretch.end;
            let mut may_be_copied = vec![false; usize::try_from(stretch.end - stretch.start).unwrap_or_default()];
            let mut mark = |object: u64| {
                let place = object.checked_sub(stretch.start).and_then(|place| usize::try_from(place).ok());
                if let Some(mark) = place.and_then(|place| may_be_copied.get_mut(place)) {
                    *mark = true;
                }
            };
            for ScannedLayer { layer, listing, .. } in &self.layers {
                if layer.objects.layout == self.layout {
                    stretch.clone().filter(|object| listing.may_hold(*object)).for_each(&mut mark);
                } else if with_rest {
                    let extents = listing.extents_asked_for(&self.layout.bytes_of_sets(&stretch));
                    extents.iter().flat_map(|extent| self.layout.objects(extent)).for_each(&mut mark);
                }
            }
            sum += may_be_copied.into_iter().filter(|mark| *mark).count() as u64;
        }
        sum
    }
}

/// Copies the objects that the scan finds from the object `first` on, a stretch at a time, and makes the holes that
/// were not known before. Calls `before_copying` after it has listed the objects of a stretch, and before it copies the
/// first one. Calls `done` after a stretch, with the number of the next object and the bytes moved so far.
pub(super) fn copy_all(
    copier: &mut Copier<'_>,
    scan: &ObjectScan<'_>,
    first: u64,
    concurrency: usize,
    fault: Option<FillFault>,
    mut before_copying: impl FnMut() -> Result<()>,
    mut done: impl FnMut(u64, Moved),
) -> Result<()> {
    let ObjectScan { layout, count, .. } = *scan;
    let (progress, mut number) = (copier.inquiry.progress, 0);
    let mut next = layout.start_of_set(first.min(count));
    // Objects that are not listed yet count with their upper bound. So the total may shrink, but the progress never
    // does.
    let mut unlisted = scan.upper_bound(next..count, copier.shows_rest);
    let mut planned = 0;
    copier.complete = ObjectSet::none_of(count);
    progress.set_total(unlisted * layout.object_size);
    while next < count {
        let stretch = layout.stretch(next, count);
        let StretchPlan { copies: mut plan, zeros, left } = scan.plan(&stretch)?;
        if fault == Some(FillFault::SkipEveryThird) {
            plan.retain(|copy| copy.object % 3 != 0);
        }
        zeros.into_iter().for_each(|object| copier.complete.insert(object));
        planned += plan.len() as u64 + if copier.shows_rest { left } else { 0 };
        unlisted -= scan.upper_bound(stretch.clone(), copier.shows_rest);
        progress.set_total((planned + unlisted) * layout.object_size);
        if !plan.is_empty() {
            before_copying()?;
        }
        let mut copied_blindly = Vec::new();
        for copy in plan {
            match fault {
                Some(FillFault::FailAfter(n)) if n == number => {
                    return Err(Error::new(copier.inquiry.operation, ErrorKind::Other, "a fault of a test"));
                }
                Some(FillFault::StopAfter(n)) if n == number => return copier.finish(),
                _ => {}
            }
            number += 1;
            copier.make_room(concurrency)?;
            if copy.holes == Holes::Unknown {
                copied_blindly.push(copy.object);
            }
            copier.copy(copy)?;
        }
        copier.finish()?;
        sparsify_if_worthwhile(copier, &copied_blindly, concurrency)?;
        next = stretch.end;
        done(next, copier.moved);
    }
    Ok(())
}

/// An object to copy.
struct ObjectCopy {
    object: u64,
    /// Its name in the layer.
    from: CString,
    /// The only version of it that is copied; 0: any.
    version: u64,
    /// The pool of the layer's data, set to read at its snapshot.
    data: Rc<IoCtx>,
    holes: Holes,
}

/// How much of an object is holes, which `copy_from` would fill with zeros.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Holes {
    Few,
    /// Worth being made again after the copy.
    Some,
    /// There is next to nothing to copy.
    NearlyAll,
    /// Nothing is stored.
    All,
    /// The pool does not tell (it is erasure-coded).
    Unknown,
}

impl Holes {
    fn of(StoredBytes { bytes, length }: StoredBytes) -> Self {
        if bytes == 0 {
            Self::All
        } else if bytes * 100 >= length * DENSE_PERCENT {
            Self::Few
        } else if bytes * 100 <= length * SPARSE_PERCENT && bytes <= SPARSE_MAX_BYTES {
            Self::NearlyAll
        } else {
            Self::Some
        }
    }
}

/// Finds out which of the layer's objects have holes: by a sample, and one by one where that says that it pays.
fn scan_holes(layer: &Layer, objects: &[u64], inquiry: Inquiry<'_>) -> Result<Vec<Holes>> {
    let source = &layer.objects;
    // `None`: the object map has it and the OSD has not. The copy finds that out too, and leaves it to librbd.
    let ask = |data: &IoCtx, object| match source.stored(inquiry.operation, data, object) {
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
        stored => stored.map(Some),
    };
    let sample: Vec<u64> = stratified_sample(objects, SAMPLE).collect();
    let stored = match source.ask(&sample, inquiry, ask) {
        Err(e) if e.kind() == ErrorKind::Unsupported => return Ok(vec![Holes::Unknown; objects.len()]),
        stored => stored?,
    };
    let (mut bytes, mut length) = (0, 0);
    for stored in stored.iter().flatten() {
        bytes += stored.bytes;
        length += stored.length;
    }
    let none_is_empty = stored.iter().flatten().all(|stored| stored.bytes > 0);
    if none_is_empty && bytes * 100 >= length * SAMPLE_DENSE_PERCENT {
        return Ok(vec![Holes::Few; objects.len()]);
    }
    let stored = source.ask(objects, inquiry, ask)?;
    Ok(stored.into_iter().map(|stored| stored.map_or(Holes::Few, Holes::of)).collect())
}

/// Of objects that were copied without knowing their holes, makes holes in a sample, and in all if that freed
/// something.
fn sparsify_if_worthwhile(copier: &mut Copier<'_>, objects: &[u64], concurrency: usize) -> Result<()> {
    let sample: HashSet<u64> = stratified_sample(objects, SAMPLE).collect();
    let Some(before) = copier.allocated(&sample)? else { return Ok(()) };
    copier.punch_all(sample.iter().copied(), concurrency)?;
    if let Some(after) = copier.allocated(&sample)?
        && after * 100 < before * SAMPLE_DENSE_PERCENT
    {
        copier.punch_all(objects.iter().copied().filter(|object| !sample.contains(object)), concurrency)?;
    }
    Ok(())
}

/// Finds out what is to be moved before it opens the image for changes: an image that is open cannot be removed.
pub(super) fn flatten(
    cluster: &Arc<Cluster>,
    spec: &ImageSpec,
    rate: &RateLimiter,
    (progress, cancel): (&Progress, &CancellationToken),
) -> Result<Moved> {
    let image = Image::open_existing(cluster, spec, Access::ReadOnly)?;
    if image.parent()?.is_none() {
        return Ok(Moved::default());
    }
    // librbd does not report how much it moves: it moves the objects that a parent holds and the clone does not.
    let operation = format!("flatten {spec}");
    let inquiry = Inquiry { operation: &operation, rate, progress, cancel };
    let unknown_holes = has_unknown_holes(cluster, &image, inquiry)?;
    let Missing { bytes, objects } = Missing::of(cluster, &image, unknown_holes, inquiry)?;
    let object_size = image.object_size()?;
    drop(image);
    let image = Image::open_existing(cluster, spec, Access::ReadWrite)?;
    progress.set_total(bytes);
    image.flatten(progress, cancel)?;
    progress.set_done(bytes);
    if unknown_holes && bytes > 0 {
        sparsify_flattened(&image, &objects, Inquiry { progress: &progress.steps_only(), ..inquiry })?;
    }
    Ok(Moved { bytes, through_host: 2 * bytes, objects: bytes.div_ceil(object_size.max(1)) })
}

/// Makes holes again in the objects that a flatten copied. The flatten keeps the holes that the pool reports; an
/// erasure-coded pool reports none.
fn sparsify_flattened(image: &Image, objects: &[u64], inquiry: Inquiry<'_>) -> Result<()> {
    let (data, destination) = (open_to_fill(image)?, DataObjects::of(image, None)?);
    let mut copier = Copier::new(&data, &destination, inquiry);
    sparsify_if_worthwhile(&mut copier, objects, SPARSIFY_CONCURRENCY)
}

/// Whether the OSDs cannot tell the holes of any of the image's parents.
fn has_unknown_holes(cluster: &Arc<Cluster>, image: &Image, inquiry: Inquiry<'_>) -> Result<bool> {
    for layer in sources(cluster, image)? {
        let data = layer.objects.open()?;
        let mut unknown = false;
        let tells = |object| match layer.objects.stored(inquiry.operation, &data, object) {
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(false),
            Err(e) if e.kind() == ErrorKind::Unsupported => {
                unknown = true;
                Ok(true)
            }
            stored => stored.map(|_| true),
        };
        layer.listing()?.first(tells, inquiry)?;
        if unknown {
            return Ok(true);
        }
    }
    Ok(false)
}

/// A stratified sample of at most `count` objects: one of each stretch of equal length. Its place in the stretch is
/// pseudo-random, so that data at regular distances do not alias with the sample. Deterministic.
fn stratified_sample(objects: &[u64], count: usize) -> impl Iterator<Item = u64> {
    let chosen = count.min(objects.len());
    (0..chosen).map(move |n| {
        let (first, end) = (n * objects.len() / chosen, (n + 1) * objects.len() / chosen);
        let mut hasher = DefaultHasher::new();
        (n, objects.len()).hash(&mut hasher);
        // (there are at least as many objects as stretches, so none is empty)
        objects[first + hasher.finish() as usize % (end - first)]
    })
}

/// Opens the pool of the image's data to write it under an empty snapshot context.
pub(super) fn open_to_fill(image: &Image) -> Result<IoCtx> {
    let data = IoCtx::open_id(image.cluster(), image.data_pool_id())?;
    // SAFETY: the ioctx is ours alone; no snapshots are given.
    let r = unsafe { rados_ioctx_selfmanaged_snap_set_write_ctx(data.raw(), 0, ptr::null_mut(), 0) };
    check(format!("fill {}", image.spec()), r)?;
    Ok(data)
}

/// What is being done to an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Work {
    Copy { then_punch: bool },
    Punch,
}

/// Work in flight: librados holds it, and sends its outcome.
struct InFlight {
    object: u64,
    work: Work,
    done: Sender<(u64, Work, c_int)>,
}

extern "C" fn finish(argument: *mut c_void, result: c_int) {
    // SAFETY: the argument is the box that `launch` gave away, and this is called once.
    let flight = unsafe { Box::from_raw(argument.cast::<InFlight>()) };
    // The copier waits for all work, so there is a receiver.
    let _ = flight.done.send((flight.object, flight.work, result));
}

/// Copies objects to the destination, many at a time. Dropping it waits for all that is in flight.
pub(super) struct Copier<'a> {
    data: &'a IoCtx,
    /// Of the destination.
    objects: &'a DataObjects,
    inquiry: Inquiry<'a>,
    done: Sender<(u64, Work, c_int)>,
    completed: Receiver<(u64, Work, c_int)>,
    in_flight: usize,
    pub moved: Moved,
    /// The objects that need nothing more.
    complete: ObjectSet,
    /// What the fill leaves out is part of the same progress.
    shows_rest: bool,
    periodic: Option<PeriodicCheck<'a>>,
    /// The destination's pool is erasure-coded and makes no holes in objects. A hole takes its space there, whichever
    /// method writes the object.
    keeps_no_holes: bool,
}

/// What is looked at from time to time while objects are copied.
struct PeriodicCheck<'a> {
    every: Duration,
    last: Instant,
    check: &'a dyn Fn() -> Result<()>,
}

impl<'a> Copier<'a> {
    pub fn new(data: &'a IoCtx, objects: &'a DataObjects, inquiry: Inquiry<'a>) -> Self {
        let (done, completed) = mpsc::channel();
        Self {
            data,
            objects,
            inquiry,
            done,
            completed,
            in_flight: 0,
            moved: Moved::default(),
            complete: ObjectSet::none_of(0),
            shows_rest: false,
            periodic: None,
            keeps_no_holes: false,
        }
    }

    /// Calls `check` so often, between two copies; its error ends the copying.
    pub fn check_every(&mut self, every: Duration, check: &'a dyn Fn() -> Result<()>) {
        self.periodic = Some(PeriodicCheck { every, last: Instant::now(), check });
    }

    /// Waits until fewer than `concurrency` objects are in flight and the rate allows another one.
    fn make_room(&mut self, concurrency: usize) -> Result<()> {
        loop {
            if self.inquiry.cancel.is_cancelled() {
                return Err(cancelled(self.inquiry.operation));
            }
            if let Some(PeriodicCheck { last, check, .. }) =
                self.periodic.as_mut().filter(|periodic| periodic.last.elapsed() >= periodic.every)
            {
                check()?;
                *last = Instant::now();
            }
            if self.in_flight >= concurrency.max(1) {
                self.complete(POLL)?;
                continue;
            }
            let rate: &RateLimiter = self.inquiry.rate;
            let wait = rate.start(OBJECT);
            if wait.is_some() {
                // the daemon's other jobs may have used the rate up: this one is not stuck
                self.inquiry.progress.wait();
            }
            match wait {
                None => return Ok(()),
                Some(wait) if self.in_flight > 0 => self.complete(wait)?,
                Some(wait) => std::thread::sleep(wait),
            }
        }
    }

    /// Waits for all that is in flight.
    fn finish(&mut self) -> Result<()> {
        while self.in_flight > 0 {
            if self.inquiry.cancel.is_cancelled() {
                return Err(cancelled(self.inquiry.operation));
            }
            self.complete(POLL)?;
        }
        Ok(())
    }

    fn copy(&mut self, copy: ObjectCopy) -> Result<()> {
        let ObjectCopy { from, version, data, .. } = &copy;
        let source = data.raw();
        let work = Work::Copy { then_punch: copy.holes == Holes::Some };
        self.launch(copy.object, work, |to, data, argument| {
            // SAFETY: both ioctxs are open, the names are copied, and `finish` fits the argument.
            unsafe { sys::rbd_offload_copy_from(source, from.as_ptr(), data, to.as_ptr(), *version, finish, argument) }
        })
    }

    fn punch(&mut self, object: u64) -> Result<()> {
        self.launch(object, Work::Punch, |name, data, argument| {
            // SAFETY: the ioctx is open, the name is copied, and `finish` fits the argument.
            unsafe { sys::rbd_offload_sparsify(data, name.as_ptr(), PAGE, finish, argument) }
        })
    }

    fn punch_all(&mut self, objects: impl Iterator<Item = u64>, concurrency: usize) -> Result<()> {
        for object in objects {
            self.make_room(concurrency)?;
            self.punch(object)?;
        }
        self.finish()
    }

    fn launch(
        &mut self,
        object: u64,
        work: Work,
        start: impl FnOnce(&CString, rados_ioctx_t, *mut c_void) -> c_int,
    ) -> Result<()> {
        let name = self.objects.name(self.inquiry.operation, object)?;
        let flight = Box::into_raw(Box::new(InFlight { object, work, done: self.done.clone() }));
        let r = start(&name, self.data.raw(), flight.cast());
        if r < 0 {
            // SAFETY: what was refused is never completed: the box is ours again.
            drop(unsafe { Box::from_raw(flight) });
            return Err(Error::from_errno(self.inquiry.operation, r));
        }
        self.in_flight += 1;
        Ok(())
    }

    /// Handles the next outcome, if one comes in time. An object that the object map knows and the OSD does not is left
    /// to librbd.
    fn complete(&mut self, wait: Duration) -> Result<()> {
        let Ok((object, work, result)) = self.completed.recv_timeout(wait) else { return Ok(()) };
        self.in_flight -= 1;
        self.inquiry.progress.step();
        if work == Work::Punch && result == -libc::EOPNOTSUPP {
            self.keeps_no_holes = true;
        } else if result != -libc::ENOENT {
            check(format!("{}: object {object}", self.inquiry.operation), result)?;
        }
        if let Work::Copy { then_punch } = work {
            let object_size = self.objects.layout.object_size;
            self.inquiry.progress.add(object_size);
            if result >= 0 {
                self.moved.objects += 1;
                self.moved.bytes += object_size;
                self.complete.insert(object);
                if then_punch && !self.keeps_no_holes {
                    self.inquiry.rate.charge(OBJECT);
                    self.punch(object)?;
                }
            }
        }
        Ok(())
    }

    /// Bytes stored of objects of the destination; `None` where there are none, or its pool does not tell.
    fn allocated(&self, objects: &HashSet<u64>) -> Result<Option<u64>> {
        let mut sum = 0;
        for object in objects {
            match self.objects.stored(self.inquiry.operation, self.data, *object) {
                Ok(stored) => sum += stored.bytes,
                Err(e) if e.kind() == ErrorKind::NotFound => {}
                Err(e) if e.kind() == ErrorKind::Unsupported => return Ok(None),
                Err(e) => return Err(e),
            }
        }
        Ok((sum > 0).then_some(sum))
    }
}

impl Drop for Copier<'_> {
    fn drop(&mut self) {
        while self.in_flight > 0 && self.completed.recv().is_ok() {
            self.in_flight -= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_are_judged_by_what_is_stored() {
        let of = |bytes, length| Holes::of(StoredBytes { bytes, length });
        assert_eq!(of(0, 0), Holes::All);
        assert_eq!(of(0, 2 << 20), Holes::All, "an object of nothing but a hole");
        assert_eq!(of(4096, 4096), Holes::Few);
        assert_eq!(of(4096, 4 << 20), Holes::NearlyAll);
        assert_eq!(of(2 << 20, 4 << 20), Holes::Some);
        assert_eq!(of(4 << 20, 4 << 20), Holes::Few);
    }

    #[test]
    fn a_sample_does_not_alias_with_periodic_data() {
        let objects: Vec<u64> = (0..4096).collect();
        let sample: Vec<u64> = stratified_sample(&objects, 32).collect();
        assert_eq!((sample.len(), stratified_sample(&objects, 32).collect::<Vec<_>>()), (32, sample.clone()));
        assert!(sample.iter().zip(0..).all(|(object, n)| object / 128 == n), "one out of each stretch");
        for period in [2, 4, 8] {
            let phases: HashSet<u64> = sample.iter().map(|object| object % period).collect();
            assert!(phases.len() as u64 * 2 > period, "{period}: {phases:?}");
        }
        assert_eq!(stratified_sample(&[1, 2], 3).collect::<Vec<_>>(), [1, 2]);
        assert_eq!(stratified_sample(&[], 3).count(), 0);
    }
}
