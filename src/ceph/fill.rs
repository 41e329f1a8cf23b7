//! Filling a clone inside the cluster: the OSDs copy the objects of the source and its parents by RADOS `copy_from`.
//!
//! The clone keeps its parent throughout, so everything that is left out here is right all the same: it is read from
//! the parent, and the flatten copies it. Left out is what cannot be copied exactly, object by object: where a layer has
//! another object size or striping, or the overlap with it ends inside an object.
//!
//! Objects are written under an empty snapshot context, as librbd's own copy-up does, so that a snapshot which the clone
//! has already sees them too. librbd knows nothing of these writes, so the object map is off meanwhile and made anew at
//! the end: a map that knows less than there is would make a removal of the half filled clone leave objects behind.
#![allow(unsafe_code)]

use std::collections::HashSet;
use std::ffi::{c_int, c_void};
use std::ptr;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::time::{Duration, Instant};

use ceph::rados::{rados_ioctx_selfmanaged_snap_set_write_ctx, rados_ioctx_snap_set_read};
use tokio_util::sync::CancellationToken;

use super::cluster::{Cluster, IoCtx, c_string, cancelled, check};
use super::copy::Pace;
use super::layers::{clip, parents};
use super::rbd::{Access, Extent, Image};
use super::{Error, ErrorKind, Features, ImageSpec, Moved, Progress, Result, TransferLimits, sys};

/// How long to wait for a completion before looking at the cancellation again.
const POLL: Duration = Duration::from_millis(100);

/// Copies the objects of `source@snapshot` into its clone `destination`.
pub(super) fn fill(
    cluster: &Arc<Cluster>,
    source: &ImageSpec,
    snapshot: &str,
    destination: &ImageSpec,
    limits: TransferLimits,
    progress: &Progress,
    cancel: &CancellationToken,
) -> Result<Moved> {
    let operation = format!("fill {destination} from {source}@{snapshot}");
    let unsupported = |detail: &str| Err(Error::new(&operation, ErrorKind::Unsupported, detail));
    let from = Image::open_snapshot(cluster, source, snapshot)?;
    let snap_id = from.snapshot_id(snapshot)?;
    let to = Image::open_existing(cluster, destination, Access::ReadOnly)?;
    let Some(link) = to.parent()? else { return Ok(Moved::default()) };
    if link.pool_id != from.io().pool_id() || link.parent.image_id != from.id()? || link.snap_id != snap_id {
        return unsupported("the destination is a clone of something else");
    }
    if from.features()?.has(Features::MIGRATING) {
        return unsupported("the source is being migrated");
    }
    let size = to.size()?;
    if from.size()? != size || to.overlap()? != size {
        return unsupported("source and clone differ in size");
    }
    let layout = Layout::of(&to)?;

    let mut sources = vec![Source::new(from, snap_id, size)?];
    for layer in parents(cluster, &sources[0].image)? {
        sources.push(Source::new(layer.image, layer.snap_id, layer.end)?);
    }
    let mut plan = Vec::new();
    // Objects that a nearer layer holds, or may hold in part.
    let mut decided = HashSet::new();
    for (number, layer) in sources.iter().enumerate() {
        for extent in clip(layer.image.own_extents(layer.end)?, layer.end) {
            for object in layout.objects(&extent) {
                if decided.insert(object) && layer.holds_exactly(object, &layout) {
                    plan.push((object, number));
                }
            }
        }
    }
    let data = IoCtx::open_id(cluster, to.data_pool_id())?;
    // SAFETY: the ioctx is ours alone; no snapshots are given.
    let r = unsafe { rados_ioctx_selfmanaged_snap_set_write_ctx(data.raw(), 0, ptr::null_mut(), 0) };
    check(&operation, r)?;
    let prefix = to.object_prefix()?;
    let maps = to.features()?.has(Features::OBJECT_MAP);
    drop(to);
    if maps {
        Image::open_existing(cluster, destination, Access::ReadWrite)?.set_features(Features::MAPS, false)?;
    }

    let bytes = layout.object_size;
    progress.set_total(plan.len() as u64 * bytes);
    let mut copier = Copier::new(&operation);
    let mut moved = Moved::default();
    let mut count = |copied: Option<bool>| {
        if let Some(copied) = copied {
            progress.add(bytes);
            if copied {
                moved.objects += 1;
                moved.bytes += bytes;
            }
        }
    };
    let mut pace = Pace::new(limits.objects_per_second);
    for (object, layer) in plan {
        let ready = Instant::now() + pace.wait_for(1);
        loop {
            if cancel.is_cancelled() {
                // What is in flight is waited for when the copier goes.
                return Err(cancelled(&operation));
            }
            let wait = ready.saturating_duration_since(Instant::now());
            if copier.in_flight >= limits.concurrency.max(1) {
                count(copier.next(POLL)?);
            } else if wait.is_zero() {
                break;
            } else if copier.in_flight > 0 {
                count(copier.next(wait.min(POLL))?);
            } else {
                std::thread::sleep(wait.min(POLL));
            }
        }
        copier.start(&sources[layer], &data, &prefix, object)?;
    }
    while copier.in_flight > 0 {
        if cancel.is_cancelled() {
            return Err(cancelled(&operation));
        }
        count(copier.next(POLL)?);
    }
    drop(copier);

    // The id that was copied must still be the snapshot's: a snapshot of the same name could have taken its place.
    let again = Image::open_existing(cluster, source, Access::ReadOnly)?;
    if again.snapshot_id(snapshot)? != snap_id {
        return Err(Error::new(operation, ErrorKind::Conflict, "the snapshot was replaced meanwhile"));
    }
    drop(again);
    let to = Image::open_existing(cluster, destination, Access::ReadWrite)?;
    to.set_features(Features::MAPS, true)?;
    to.rebuild_object_map(cancel)?;
    for snapshot in to.snapshots()? {
        to.set_snapshot(&snapshot.name)?;
        to.rebuild_object_map(cancel)?;
    }
    Ok(moved)
}

/// A layer to copy from, with the pool of its data set to read at its snapshot.
struct Source {
    image: Image,
    data: IoCtx,
    prefix: String,
    layout: Layout,
    size: u64,
    /// Bytes from the start that count.
    end: u64,
}

impl Source {
    fn new(image: Image, snap_id: u64, end: u64) -> Result<Self> {
        let data = IoCtx::open_id(image.cluster(), image.data_pool_id())?.with_namespace(image.namespace())?;
        // SAFETY: the ioctx is ours alone.
        unsafe { rados_ioctx_snap_set_read(data.raw(), snap_id) };
        let (prefix, layout, size) = (image.object_prefix()?, Layout::of(&image)?, image.size()?);
        Ok(Self { data, prefix, layout, size, end: end.min(size), image })
    }

    /// Whether the layer's object of that number is, byte for byte, what the clone reads there.
    fn holds_exactly(&self, object: u64, layout: &Layout) -> bool {
        self.layout == *layout && (layout.end_of_set(object) <= self.end || self.size <= self.end)
    }
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

/// A copy in flight: librados holds it, and sends its outcome.
struct InFlight {
    object: u64,
    done: Sender<(u64, c_int)>,
}

/// Copies of objects in flight. Dropping it waits for all of them.
struct Copier<'a> {
    operation: &'a str,
    done: Sender<(u64, c_int)>,
    completed: Receiver<(u64, c_int)>,
    in_flight: usize,
}

impl<'a> Copier<'a> {
    fn new(operation: &'a str) -> Self {
        let (done, completed) = mpsc::channel();
        Self { operation, done, completed, in_flight: 0 }
    }

    fn start(&mut self, source: &Source, data: &IoCtx, prefix: &str, object: u64) -> Result<()> {
        extern "C" fn finish(argument: *mut c_void, result: c_int) {
            // SAFETY: the argument is the box that `start` gave away, and this is called once.
            let flight = unsafe { Box::from_raw(argument.cast::<InFlight>()) };
            // The copier waits for all copies, so there is a receiver.
            let _ = flight.done.send((flight.object, result));
        }
        let from = c_string(self.operation, &format!("{}.{object:016x}", source.prefix))?;
        let to = c_string(self.operation, &format!("{prefix}.{object:016x}"))?;
        let flight = Box::into_raw(Box::new(InFlight { object, done: self.done.clone() }));
        // SAFETY: both ioctxs are open, the names are copied, and `finish` fits the argument.
        let r = unsafe {
            sys::rbd_offload_copy_from(source.data.raw(), from.as_ptr(), data.raw(), to.as_ptr(), finish, flight.cast())
        };
        if r < 0 {
            // SAFETY: a refused copy is never completed: the box is ours again.
            drop(unsafe { Box::from_raw(flight) });
            return Err(Error::from_errno(self.operation, r));
        }
        self.in_flight += 1;
        Ok(())
    }

    /// The next outcome, or `None` when none comes in time: whether the object was there to be copied. One that the
    /// object map knows and the OSD does not is left to the flatten.
    fn next(&mut self, wait: Duration) -> Result<Option<bool>> {
        let Ok((object, result)) = self.completed.recv_timeout(wait) else { return Ok(None) };
        self.in_flight -= 1;
        if result == -libc::ENOENT {
            return Ok(Some(false));
        }
        check(format!("{}: object {object}", self.operation), result)?;
        Ok(Some(true))
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
}
