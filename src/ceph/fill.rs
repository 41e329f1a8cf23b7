//! Filling a clone inside the cluster: the OSDs copy the objects of the source and its parents by RADOS `copy_from`.
//!
//! The clone keeps its parent throughout, so everything that is left out here is right all the same: it is read from
//! the parent, and the flatten copies it. Left out is what cannot be copied exactly, object by object: where a layer has
//! another object size or striping, or the overlap with it ends inside an object; and objects with next to nothing in
//! them. `copy_from` fills holes with zeros: objects with a good many are asked for on the OSD that holds them, and made
//! sparse again after the copy.
//!
//! Objects are written under an empty snapshot context, as librbd's own copy-up does, so that a snapshot which the clone
//! has already sees them too. librbd knows nothing of these writes, so the object map is off meanwhile and made anew at
//! the end: a map that knows less than there is would make a removal of the half filled clone leave objects behind.
#![allow(unsafe_code)]

use std::collections::HashSet;
use std::ffi::{CString, c_int, c_void};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::ptr;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::time::{Duration, Instant};

use ceph::rados::{rados_ioctx_selfmanaged_snap_set_write_ctx, rados_ioctx_snap_set_read, rados_ioctx_t};
use tokio_util::sync::CancellationToken;

use super::cluster::{Cluster, IoCtx, c_string, cancelled, check};
use super::copy::Pace;
use super::layers::{clip, parents};
use super::rbd::{Access, Extent, Image, ParentLink};
use super::{Error, ErrorKind, Features, ImageSpec, Moved, Progress, Result, TransferLimits, sys};

/// How long to wait for a completion before looking at the cancellation again.
const POLL: Duration = Duration::from_millis(100);

/// Objects of a layer that are asked how much of them is holes, before all of them are.
const SAMPLE: usize = 32;

/// Per cent of the bytes of the sampled objects that must be stored for the layer to count as full of data.
const FULL: u64 = 95;

/// Per cent of an object's bytes that must be stored for its holes not to matter.
const FEW_HOLES: u64 = 90;

/// An object with so little in it is left to the flatten, which moves just that: per cent of its bytes, and bytes.
const NEARLY_EMPTY: u64 = 12;
const LITTLE: u64 = 128 << 10;

/// Bytes: the unit of holes, in which BlueStore allocates.
const PAGE: u64 = 4096;

/// Questions to the OSDs in flight when a layer with holes is surveyed.
const SURVEYORS: usize = 8;

/// A way to go wrong, for tests of what comes after a fill.
#[doc(hidden)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FillFault {
    /// Leaves out every third object, and tells nobody.
    SkipEveryThird,
    /// An error after so many objects.
    FailAfter(usize),
    /// Ends after so many objects as if it had done all.
    StopAfter(usize),
}

/// Copies the objects of `source@snapshot` into its clone `destination`.
pub(super) fn fill(
    cluster: &Arc<Cluster>,
    source: &ImageSpec,
    snapshot: &str,
    destination: &ImageSpec,
    limits: TransferLimits,
    fault: Option<FillFault>,
    (progress, cancel): (&Progress, &CancellationToken),
) -> Result<Moved> {
    let operation = format!("fill {destination} from {source}@{snapshot}");
    let unsupported = |detail: &str| Err(Error::new(&operation, ErrorKind::Unsupported, detail));
    let from = Image::open_snapshot(cluster, source, snapshot)?;
    let snap_id = from.snapshot_id(snapshot)?;
    let to = Image::open_existing(cluster, destination, Access::ReadOnly)?;
    let Some(mut link) = to.parent()? else { return Ok(Moved::default()) };
    let is_source = |link: &ParentLink| -> Result<bool> {
        Ok(link.pool_id == from.io().pool_id() && link.parent.image_id == from.id()? && link.snap_id == snap_id)
    };
    let mut overlap = to.overlap()?;
    if !is_source(&link)? {
        // Through an anchor. As long as that has a parent, its objects are copies of the parent's: the source has them all.
        let anchor = Image::open_parent(cluster, &link)?;
        let Some(above) = anchor.parent()? else { return unsupported("the destination is a clone of something else") };
        overlap = overlap.min(anchor.overlap()?);
        link = above;
    }
    if !is_source(&link)? {
        return unsupported("the destination is a clone of something else");
    }
    if from.features()?.has(Features::MIGRATING) {
        return unsupported("the source is being migrated");
    }
    let size = to.size()?;
    if from.size()? != size || overlap != size {
        return unsupported("source and clone differ in size");
    }
    let layout = Layout::of(&to)?;

    let mut sources = vec![Source::new(from, snap_id, size)?];
    for layer in parents(cluster, &sources[0].image)? {
        sources.push(Source::new(layer.image, layer.snap_id, layer.end)?);
    }
    // Objects that a nearer layer holds, or may hold in part.
    let mut decided = HashSet::new();
    let mut plan = Vec::new();
    for layer in &sources {
        let mut objects = Vec::new();
        for extent in clip(layer.image.own_extents(layer.end)?, layer.end) {
            for object in layout.objects(&extent) {
                if decided.insert(object) && layer.holds_exactly(object, &layout) {
                    objects.push(object);
                }
            }
        }
        let holes = survey(&operation, layer, &objects, (progress, cancel))?;
        let copies = objects.into_iter().zip(holes).filter(|(_, holes)| *holes != Holes::NearlyAll);
        plan.extend(copies.map(|(object, holes)| Copy { object, source: layer, holes }));
    }
    if fault == Some(FillFault::SkipEveryThird) {
        plan.retain(|copy| copy.object % 3 != 0);
    }
    let data = open_to_fill(&to)?;
    let prefix = to.object_prefix()?;
    let maps = to.features()?.has(Features::OBJECT_MAP);
    drop(to);
    if maps && !plan.is_empty() {
        Image::open_existing(cluster, destination, Access::ReadWrite)?.set_features(Features::MAPS, false)?;
    }

    progress.set_total(plan.len() as u64 * layout.object_size);
    let copier = Copier::new(&operation, &data, &prefix, layout.object_size, (progress, cancel));
    let copied = copy_all(copier, &plan, limits, fault);
    if copied.as_ref().is_err_and(|e| matches!(e.kind(), ErrorKind::Cancelled | ErrorKind::Fenced)) {
        return copied;
    }
    // Also where it broke off: the clone is right as it is, and the flatten may go on from there.
    let to = Image::open_existing(cluster, destination, Access::ReadWrite)?;
    if !to.features()?.has(Features::MAPS) {
        make_maps(&to, progress, cancel)?;
    }
    let moved = copied?;

    // The id that was copied must still be the snapshot's: a snapshot of the same name could have taken its place.
    let again = Image::open_existing(cluster, source, Access::ReadOnly)?;
    if again.snapshot_id(snapshot)? != snap_id {
        return Err(Error::new(operation, ErrorKind::Conflict, "the snapshot was replaced meanwhile"));
    }
    Ok(moved)
}

/// Copies what is planned, and makes the holes that could not be foreseen.
fn copy_all(
    mut copier: Copier<'_>,
    plan: &[Copy<'_>],
    limits: TransferLimits,
    fault: Option<FillFault>,
) -> Result<Moved> {
    let mut pace = Pace::new(limits.objects_per_second);
    let mut copied_blindly = Vec::new();
    for (number, copy) in plan.iter().enumerate() {
        match fault {
            Some(FillFault::FailAfter(n)) if n == number => {
                return Err(Error::new(copier.operation, ErrorKind::Other, "a fault of a test"));
            }
            Some(FillFault::StopAfter(n)) if n == number => break,
            _ => {}
        }
        copier.make_room(limits.concurrency, Instant::now() + pace.wait_for(1))?;
        copier.copy(copy)?;
        if copy.holes == Holes::Unknown {
            copied_blindly.push(copy.object);
        }
    }
    copier.finish()?;
    punch_if_it_pays(&mut copier, &copied_blindly, limits.concurrency)?;
    Ok(copier.moved)
}

/// Makes the object maps of the image and of its snapshots from the objects that there are.
fn make_maps(image: &Image, progress: &Progress, cancel: &CancellationToken) -> Result<()> {
    image.set_features(Features::MAPS, true)?;
    image.rebuild_object_map(progress, cancel)?;
    for snapshot in image.snapshots()? {
        image.set_snapshot(&snapshot.name)?;
        image.rebuild_object_map(progress, cancel)?;
    }
    Ok(())
}

/// An object to copy.
struct Copy<'a> {
    object: u64,
    source: &'a Source,
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
    /// The pool does not tell (it is erasure-coded).
    Unknown,
}

impl Holes {
    /// Of an object with so many bytes stored before `end`.
    fn of(allocated: u64, end: u64) -> Self {
        if allocated * 100 >= end * FEW_HOLES {
            Self::Few
        } else if allocated * 100 <= end * NEARLY_EMPTY && allocated <= LITTLE {
            Self::NearlyAll
        } else {
            Self::Some
        }
    }
}

/// Finds out which of the layer's objects have holes: by a sample, and one by one where that says that it pays.
fn survey(
    operation: &str,
    layer: &Source,
    objects: &[u64],
    (progress, cancel): (&Progress, &CancellationToken),
) -> Result<Vec<Holes>> {
    let mut stored = (0, 0);
    for object in scattered(objects, SAMPLE) {
        match allocated(operation, &layer.data, &layer.prefix, object, layer.layout.object_size) {
            Ok((allocated, end)) => stored = (stored.0 + allocated, stored.1 + end),
            Err(e) if e.kind() == ErrorKind::NotFound => {}
            Err(e) if e.kind() == ErrorKind::Unsupported => return Ok(vec![Holes::Unknown; objects.len()]),
            Err(e) => return Err(e),
        }
    }
    let (allocated_bytes, bytes) = stored;
    if allocated_bytes * 100 >= bytes * FULL {
        return Ok(vec![Holes::Few; objects.len()]);
    }
    let mut holes = vec![Holes::Few; objects.len()];
    let share = objects.len().div_ceil(SURVEYORS).max(1);
    std::thread::scope(|scope| {
        let mut surveyors = Vec::new();
        for (objects, holes) in objects.chunks(share).zip(holes.chunks_mut(share)) {
            let (data, prefix, object_size) = (layer.open_data()?, &layer.prefix, layer.layout.object_size);
            surveyors.push(scope.spawn(move || {
                for (object, holes) in objects.iter().zip(holes) {
                    if cancel.is_cancelled() {
                        return Err(cancelled(operation));
                    }
                    progress.step();
                    match allocated(operation, &data, prefix, *object, object_size) {
                        Ok((allocated, end)) => *holes = Holes::of(allocated, end),
                        // the copy will tell
                        Err(e) if e.kind() == ErrorKind::NotFound => {}
                        Err(e) => return Err(e),
                    }
                }
                Ok(())
            }));
        }
        let lost = || Err(Error::new(operation, ErrorKind::Other, "a thread of the survey was lost"));
        surveyors.into_iter().try_for_each(|surveyor| surveyor.join().unwrap_or_else(|_| lost()))
    })?;
    Ok(holes)
}

/// Of objects that were copied without knowing their holes, makes holes in a sample, and in all if that freed something.
fn punch_if_it_pays(copier: &mut Copier<'_>, objects: &[u64], concurrency: usize) -> Result<()> {
    let sample: HashSet<u64> = scattered(objects, SAMPLE).collect();
    let Some(before) = copier.allocated(&sample)? else { return Ok(()) };
    copier.punch_all(sample.iter().copied(), concurrency)?;
    if let Some(after) = copier.allocated(&sample)?
        && after * 100 < before * FULL
    {
        copier.punch_all(objects.iter().copied().filter(|object| !sample.contains(object)), concurrency)?;
    }
    Ok(())
}

/// Makes holes again in what a flatten copied from `extents` of the parents. It keeps those that it is told of; an
/// erasure-coded pool tells none.
pub(super) fn thin_flattened(
    image: &Image,
    extents: &[Extent],
    watched: (&Progress, &CancellationToken),
) -> Result<()> {
    let operation = format!("make holes in {}", image.spec());
    let (data, prefix, layout) = (open_to_fill(image)?, image.object_prefix()?, Layout::of(image)?);
    let mut objects: Vec<u64> = extents.iter().flat_map(|extent| layout.objects(extent)).collect();
    objects.sort_unstable();
    objects.dedup();
    let mut copier = Copier::new(&operation, &data, &prefix, layout.object_size, watched);
    punch_if_it_pays(&mut copier, &objects, SURVEYORS)
}

/// Whether the OSDs cannot tell the holes of any of the image's parents.
pub(super) fn has_unknown_holes(cluster: &Arc<Cluster>, image: &Image) -> Result<bool> {
    for layer in parents(cluster, image)? {
        let source = Source::new(layer.image, layer.snap_id, layer.end)?;
        for extent in source.image.own_extents(source.end)? {
            let Some(object) = source.layout.objects(&extent).next() else { continue };
            match allocated("ask for holes", &source.data, &source.prefix, object, source.layout.object_size) {
                Err(e) if e.kind() == ErrorKind::NotFound => {}
                Err(e) if e.kind() == ErrorKind::Unsupported => return Ok(true),
                Err(e) => return Err(e),
                Ok(_) => break,
            }
        }
    }
    Ok(false)
}

/// At most `count` of them, one out of each stretch of the same length: anywhere in it, since what is written at regular
/// distances would fall into step with a sample that is regular too. The same ones each time.
fn scattered(objects: &[u64], count: usize) -> impl Iterator<Item = u64> {
    let chosen = count.min(objects.len());
    (0..chosen).map(move |n| {
        let (first, end) = (n * objects.len() / chosen, (n + 1) * objects.len() / chosen);
        let mut hasher = DefaultHasher::new();
        (n, objects.len()).hash(&mut hasher);
        // (there are at least as many objects as stretches, so none is empty)
        objects[first + hasher.finish() as usize % (end - first)]
    })
}

fn object_name(operation: &str, prefix: &str, object: u64) -> Result<CString> {
    c_string(operation, &format!("{prefix}.{object:016x}"))
}

/// Bytes of an object that are stored, and where the last of them ends.
fn allocated(operation: &str, data: &IoCtx, prefix: &str, object: u64, length: u64) -> Result<(u64, u64)> {
    let name = object_name(operation, prefix, object)?;
    let (mut allocated, mut end) = (0, 0);
    // SAFETY: the ioctx is open, the name ends in NUL, and two numbers are written.
    let r = unsafe { sys::rbd_offload_allocated(data.raw(), name.as_ptr(), length, &mut allocated, &mut end) };
    check(operation, r)?;
    Ok((allocated, end))
}

/// A layer to copy from, with the pool of its data set to read at its snapshot.
struct Source {
    image: Image,
    snap_id: u64,
    data: IoCtx,
    prefix: String,
    layout: Layout,
    size: u64,
    /// Bytes from the start that count.
    end: u64,
}

impl Source {
    fn new(image: Image, snap_id: u64, end: u64) -> Result<Self> {
        let data = open_data(&image, snap_id)?;
        let (prefix, layout, size) = (image.object_prefix()?, Layout::of(&image)?, image.size()?);
        Ok(Self { data, prefix, layout, size, end: end.min(size), image, snap_id })
    }

    fn open_data(&self) -> Result<IoCtx> {
        open_data(&self.image, self.snap_id)
    }

    /// Whether the layer's object of that number is, byte for byte, what the clone reads there.
    fn holds_exactly(&self, object: u64, layout: &Layout) -> bool {
        self.layout == *layout && (layout.end_of_set(object) <= self.end || self.size <= self.end)
    }
}

/// Opens the pool of the image's data to read it at the snapshot.
fn open_data(image: &Image, snap_id: u64) -> Result<IoCtx> {
    let data = IoCtx::open_id(image.cluster(), image.data_pool_id())?.with_namespace(image.namespace())?;
    // SAFETY: the ioctx is ours alone.
    unsafe { rados_ioctx_snap_set_read(data.raw(), snap_id) };
    Ok(data)
}

/// Opens the pool of the image's data to write it under an empty snapshot context.
fn open_to_fill(image: &Image) -> Result<IoCtx> {
    let data = IoCtx::open_id(image.cluster(), image.data_pool_id())?;
    // SAFETY: the ioctx is ours alone; no snapshots are given.
    let r = unsafe { rados_ioctx_selfmanaged_snap_set_write_ctx(data.raw(), 0, ptr::null_mut(), 0) };
    check(format!("fill {}", image.spec()), r)?;
    Ok(data)
}

/// How an image's bytes lie in its objects.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Layout {
    object_size: u64,
    stripe_unit: u64,
    stripe_count: u64,
}

impl Layout {
    fn of(image: &Image) -> Result<Self> {
        let layout = Self {
            object_size: image.object_size()?.max(1),
            stripe_unit: image.stripe_unit()?.max(1),
            stripe_count: image.stripe_count()?.max(1),
        };
        Ok(layout)
    }

    /// The objects that hold any of these bytes; some may come twice. See "file striping" in Ceph's architecture guide.
    fn objects(&self, extent: &Extent) -> impl Iterator<Item = u64> + use<> {
        let Self { object_size, stripe_unit, stripe_count } = *self;
        let units_per_object = object_size / stripe_unit;
        let units = extent.start / stripe_unit..extent.end.div_ceil(stripe_unit);
        units.map(move |unit| {
            let (stripe, position) = (unit / stripe_count, unit % stripe_count);
            stripe / units_per_object * stripe_count + position
        })
    }

    /// Where in the image the set of objects ends that this one is striped with.
    fn end_of_set(&self, object: u64) -> u64 {
        (object / self.stripe_count + 1).saturating_mul(self.object_size.saturating_mul(self.stripe_count))
    }
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
struct Copier<'a> {
    operation: &'a str,
    data: &'a IoCtx,
    prefix: &'a str,
    object_size: u64,
    progress: &'a Progress,
    cancel: &'a CancellationToken,
    done: Sender<(u64, Work, c_int)>,
    completed: Receiver<(u64, Work, c_int)>,
    in_flight: usize,
    moved: Moved,
}

impl<'a> Copier<'a> {
    fn new(
        operation: &'a str,
        data: &'a IoCtx,
        prefix: &'a str,
        object_size: u64,
        (progress, cancel): (&'a Progress, &'a CancellationToken),
    ) -> Self {
        let (done, completed) = mpsc::channel();
        let moved = Moved::default();
        Self { operation, data, prefix, object_size, progress, cancel, done, completed, in_flight: 0, moved }
    }

    /// Waits until fewer than `concurrency` objects are in flight and the time is `ready`.
    fn make_room(&mut self, concurrency: usize, ready: Instant) -> Result<()> {
        loop {
            if self.cancel.is_cancelled() {
                return Err(cancelled(self.operation));
            }
            let wait = ready.saturating_duration_since(Instant::now());
            if self.in_flight >= concurrency.max(1) {
                self.complete(POLL)?;
            } else if wait.is_zero() {
                return Ok(());
            } else if self.in_flight > 0 {
                self.complete(wait.min(POLL))?;
            } else {
                std::thread::sleep(wait.min(POLL));
            }
        }
    }

    /// Waits for all that is in flight.
    fn finish(&mut self) -> Result<()> {
        while self.in_flight > 0 {
            if self.cancel.is_cancelled() {
                return Err(cancelled(self.operation));
            }
            self.complete(POLL)?;
        }
        Ok(())
    }

    fn copy(&mut self, copy: &Copy<'_>) -> Result<()> {
        let from = object_name(self.operation, &copy.source.prefix, copy.object)?;
        let source = copy.source.data.raw();
        let work = Work::Copy { then_punch: copy.holes == Holes::Some };
        self.launch(copy.object, work, |to, data, argument| {
            // SAFETY: both ioctxs are open, the names are copied, and `finish` fits the argument.
            unsafe { sys::rbd_offload_copy_from(source, from.as_ptr(), data, to.as_ptr(), finish, argument) }
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
            self.make_room(concurrency, Instant::now())?;
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
        let name = object_name(self.operation, self.prefix, object)?;
        let flight = Box::into_raw(Box::new(InFlight { object, work, done: self.done.clone() }));
        let r = start(&name, self.data.raw(), flight.cast());
        if r < 0 {
            // SAFETY: what was refused is never completed: the box is ours again.
            drop(unsafe { Box::from_raw(flight) });
            return Err(Error::from_errno(self.operation, r));
        }
        self.in_flight += 1;
        Ok(())
    }

    /// Handles the next outcome, if one comes in time. An object that the object map knows and the OSD does not is left
    /// to the flatten.
    fn complete(&mut self, wait: Duration) -> Result<()> {
        let Ok((object, work, result)) = self.completed.recv_timeout(wait) else { return Ok(()) };
        self.in_flight -= 1;
        if result != -libc::ENOENT {
            check(format!("{}: object {object}", self.operation), result)?;
        }
        if let Work::Copy { then_punch } = work {
            self.progress.add(self.object_size);
            if result >= 0 {
                self.moved.objects += 1;
                self.moved.bytes += self.object_size;
                if then_punch {
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
            match allocated(self.operation, self.data, self.prefix, *object, self.object_size) {
                Ok((allocated, _)) => sum += allocated,
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
    fn objects_follow_the_offset() {
        let layout = Layout { object_size: 8, stripe_unit: 8, stripe_count: 1 };
        assert_eq!(layout.objects(&(0..8)).collect::<Vec<_>>(), [0]);
        assert_eq!(layout.objects(&(7..25)).collect::<Vec<_>>(), [0, 1, 2, 3]);
        assert_eq!(layout.end_of_set(2), 24);
    }

    #[test]
    fn striped_objects_take_turns() {
        // Two units an object, three objects a set: 0 3 | 1 4 | 2 5, then the next set.
        let layout = Layout { object_size: 8, stripe_unit: 4, stripe_count: 3 };
        assert_eq!(layout.objects(&(0..32)).collect::<Vec<_>>(), [0, 1, 2, 0, 1, 2, 3, 4]);
        assert_eq!((layout.end_of_set(2), layout.end_of_set(3)), (24, 48));
    }

    #[test]
    fn holes_are_judged_by_what_is_stored() {
        assert_eq!(Holes::of(0, 0), Holes::Few);
        assert_eq!(Holes::of(4096, 4096), Holes::Few);
        assert_eq!(Holes::of(4096, 4 << 20), Holes::NearlyAll);
        assert_eq!(Holes::of(2 << 20, 4 << 20), Holes::Some);
        assert_eq!(Holes::of(4 << 20, 4 << 20), Holes::Few);
    }

    #[test]
    fn a_sample_does_not_fall_into_step() {
        let objects: Vec<u64> = (0..4096).collect();
        let sample: Vec<u64> = scattered(&objects, 32).collect();
        assert_eq!((sample.len(), scattered(&objects, 32).collect::<Vec<_>>()), (32, sample.clone()));
        assert!(sample.iter().zip(0..).all(|(object, n)| object / 128 == n), "one out of each stretch");
        for period in [2, 4, 8] {
            let phases: HashSet<u64> = sample.iter().map(|object| object % period).collect();
            assert!(phases.len() as u64 * 2 > period, "{period}: {phases:?}");
        }
        assert_eq!(scattered(&[1, 2], 3).collect::<Vec<_>>(), [1, 2]);
        assert_eq!(scattered(&[], 3).count(), 0);
    }
}
