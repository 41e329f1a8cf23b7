//! Which objects the layers of an image hold: its own, and those of the images it was cloned from.
//!
//! An object that a layer holds hides the same bytes of all layers below it. It does so as well when nothing is stored
//! in it: librbd discards a whole object of a clone by leaving one of zero bytes. librbd's own enumeration
//! (`rbd_diff_iterate2`) does not list such an object where it goes without an object map, and it does not tell which
//! way it went. So it is not used here. A layer is asked for its object map at the very snapshot; where that one is not
//! valid, the OSDs are asked object by object, as a read would.
#![allow(unsafe_code)]

use std::ffi::{CStr, CString, c_int};
use std::ops::Range;
use std::sync::Arc;

use ceph::rados::{rados_exec, rados_get_last_version, rados_ioctx_snap_set_read, rados_stat};
use tokio_util::sync::CancellationToken;

use super::cluster::{Cluster, IoCtx, c_string, cancelled, check};
use super::pace::{QUESTION, RateLimiter};
use super::rbd::{Access, Extent, Image};
use super::{Error, ErrorKind, Features, ImageSpec, OWNER_KEY, Progress, Result, is_owner_of, sys};

/// The head of an image, where a snapshot's id is asked for (`CEPH_NOSNAP`).
const HEAD: u64 = u64::MAX - 1;

/// Chains are a few images long; a longer one than this is taken for a circle.
const MAX_LAYERS: usize = 64;

/// Questions to the OSDs in flight.
const QUESTIONS_IN_FLIGHT: usize = 8;

/// Objects that are looked at before anything is done with them. What is known of them is all that is held in memory,
/// besides the object maps: for 10 TiB 650 KiB a layer.
pub(super) const STRETCH: u64 = 1 << 10;

/// Who asks the OSDs, and what bounds it.
#[derive(Clone, Copy)]
pub(super) struct Inquiry<'a> {
    pub operation: &'a str,
    pub rate: &'a RateLimiter,
    pub progress: &'a Progress,
    pub cancel: &'a CancellationToken,
}

/// How an image's bytes lie in its objects. See "file striping" in Ceph's architecture guide.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Layout {
    pub object_size: u64,
    pub stripe_unit: u64,
    pub stripe_count: u64,
}

impl Layout {
    pub fn of(image: &Image) -> Result<Self> {
        let layout = Self {
            object_size: image.object_size()?.max(1),
            stripe_unit: image.stripe_unit()?.max(1),
            stripe_count: image.stripe_count()?.max(1),
        };
        Ok(layout)
    }

    fn units_per_object(&self) -> u64 {
        (self.object_size / self.stripe_unit).max(1)
    }

    /// The objects that hold any of these bytes; some may come twice.
    pub fn objects(&self, extent: &Extent) -> impl Iterator<Item = u64> + use<> {
        let Self { stripe_unit, stripe_count, .. } = *self;
        let units_per_object = self.units_per_object();
        let units = extent.start / stripe_unit..extent.end.div_ceil(stripe_unit);
        units.map(move |unit| {
            let (stripe, position) = (unit / stripe_count, unit % stripe_count);
            stripe / units_per_object * stripe_count + position
        })
    }

    /// The bytes of the image that an object holds, in order.
    pub fn extents(&self, object: u64) -> impl Iterator<Item = Extent> + use<> {
        let Self { stripe_unit, stripe_count, .. } = *self;
        let units_per_object = self.units_per_object();
        let (set, position) = (object / stripe_count, object % stripe_count);
        // Without striping the units of an object follow each other.
        let (units, length) =
            if stripe_count == 1 { (1, units_per_object * stripe_unit) } else { (units_per_object, stripe_unit) };
        (0..units).map(move |unit| {
            let stripe = set * units_per_object + unit;
            let start = (stripe * stripe_count + position) * stripe_unit;
            start..start + length
        })
    }

    /// How many objects an image of `size` bytes has: the number of its last one, and one.
    pub fn count(&self, size: u64) -> u64 {
        let set = self.set_size();
        let (sets, rest) = (size / set, size % set);
        sets * self.stripe_count + rest.div_ceil(self.stripe_unit).min(self.stripe_count)
    }

    /// Bytes of a set: the objects that are striped with each other.
    fn set_size(&self) -> u64 {
        self.object_size.saturating_mul(self.stripe_count)
    }

    /// The objects of the sets that hold any of these bytes.
    pub fn sets_of(&self, bytes: &Extent) -> Range<u64> {
        let sets = bytes.start / self.set_size()..bytes.end.div_ceil(self.set_size());
        sets.start * self.stripe_count..sets.end * self.stripe_count
    }

    /// The bytes of the sets that these objects belong to.
    pub fn bytes_of_sets(&self, objects: &Range<u64>) -> Extent {
        let sets = objects.start / self.stripe_count..objects.end.div_ceil(self.stripe_count);
        sets.start.saturating_mul(self.set_size())..sets.end.saturating_mul(self.set_size())
    }

    /// The next stretch of objects before `end` from `start` on, which is the first of a set: whole sets, some
    /// [`STRETCH`] objects.
    pub fn stretch(&self, start: u64, end: u64) -> Range<u64> {
        let length = STRETCH.div_ceil(self.stripe_count) * self.stripe_count;
        start..end.min(start.saturating_add(length))
    }

    /// The first object of the set that this one belongs to.
    pub fn start_of_set(&self, object: u64) -> u64 {
        object / self.stripe_count * self.stripe_count
    }

    /// Where in the image the set of objects ends that this one is striped with.
    pub fn end_of_set(&self, object: u64) -> u64 {
        (object / self.stripe_count + 1).saturating_mul(self.set_size())
    }
}

/// The data objects of an image, as they are at its head or were at a snapshot.
pub(super) struct DataObjects {
    cluster: Arc<Cluster>,
    pool: i64,
    namespace: String,
    snap_id: Option<u64>,
    prefix: String,
    old_format: bool,
    pub layout: Layout,
}

impl DataObjects {
    /// Those of the image at what it is open at: the snapshot of this id, or the head.
    pub fn of(image: &Image, snap_id: Option<u64>) -> Result<Self> {
        Ok(Self {
            cluster: Arc::clone(image.cluster()),
            pool: image.data_pool_id(),
            namespace: image.namespace().to_owned(),
            snap_id,
            prefix: image.object_prefix()?,
            old_format: image.is_old_format()?,
            layout: Layout::of(image)?,
        })
    }

    /// Those that an image of this id had, whose header is gone. `io` is the image's own pool, `data_pool` that of its
    /// data where it is another one.
    pub fn of_removed(io: &IoCtx, id: &str, data_pool: Option<i64>) -> Self {
        let own_pool = io.pool_id();
        // `CreateRequest` of librbd: the number of the image's own pool is part of the names in another one
        let (pool, prefix) = match data_pool.filter(|pool| *pool != own_pool) {
            Some(pool) => (pool, format!("rbd_data.{own_pool}.{id}")),
            None => (own_pool, format!("rbd_data.{id}")),
        };
        Self {
            cluster: Arc::clone(io.cluster()),
            pool,
            namespace: String::new(),
            snap_id: None,
            prefix,
            old_format: false,
            // it is not asked where bytes lie in these
            layout: Layout { object_size: 1, stripe_unit: 1, stripe_count: 1 },
        }
    }

    /// Opens the pool of the data, to read it at the snapshot.
    pub fn open(&self) -> Result<IoCtx> {
        let data = IoCtx::open_id(&self.cluster, self.pool)?.with_namespace(&self.namespace)?;
        if let Some(snap_id) = self.snap_id {
            // SAFETY: the ioctx is ours alone.
            unsafe { rados_ioctx_snap_set_read(data.raw(), snap_id) };
        }
        Ok(data)
    }

    pub fn name(&self, operation: &str, object: u64) -> Result<CString> {
        let prefix = &self.prefix;
        let name = if self.old_format { format!("{prefix}.{object:012x}") } else { format!("{prefix}.{object:016x}") };
        c_string(operation, &name)
    }

    /// Bytes of an object up to its end, `None` where there is none. `data` is what [`open`](Self::open) returned.
    pub fn length(&self, operation: &str, data: &IoCtx, object: u64) -> Result<Option<u64>> {
        let name = self.name(operation, object)?;
        let (mut length, mut time) = (0, 0);
        // SAFETY: the ioctx is open, the name ends in NUL; both results have a place.
        match unsafe { rados_stat(data.raw(), name.as_ptr(), &mut length, &mut time) } {
            r if r == -libc::ENOENT => Ok(None),
            r => check(operation, r).map(|_| Some(length)),
        }
    }

    /// The version of an object, which no later write leaves as it is; `None` where there is none. `data` is what
    /// [`open`](Self::open) returned to this thread: librados keeps the version of the last object that was asked for.
    pub fn version(&self, operation: &str, data: &IoCtx, object: u64) -> Result<Option<u64>> {
        let is_there = self.length(operation, data, object)?.is_some();
        // SAFETY: the ioctx is open.
        Ok(is_there.then(|| unsafe { rados_get_last_version(data.raw()) }))
    }

    /// Bytes of an object that are stored, and its length. [`ErrorKind::NotFound`] where there is none,
    /// [`ErrorKind::Unsupported`] where the pool does not tell (it is erasure-coded).
    pub fn stored(&self, operation: &str, data: &IoCtx, object: u64) -> Result<StoredBytes> {
        let name = self.name(operation, object)?;
        let mut stored = StoredBytes::default();
        let object_size = self.layout.object_size;
        // SAFETY: the ioctx is open, the name ends in NUL, and two numbers are written.
        let r = unsafe {
            sys::rbd_offload_stored(data.raw(), name.as_ptr(), object_size, &mut stored.bytes, &mut stored.length)
        };
        check(operation, r)?;
        Ok(stored)
    }

    /// Asks a question about each of the objects. The answers come in their order.
    pub fn ask<T: Send + Clone + Default>(
        &self,
        objects: &[u64],
        inquiry: Inquiry<'_>,
        question: impl Fn(&IoCtx, u64) -> Result<T> + Sync,
    ) -> Result<Vec<T>> {
        let mut answers = vec![T::default(); objects.len()];
        let share = objects.len().div_ceil(QUESTIONS_IN_FLIGHT).max(1);
        std::thread::scope(|scope| {
            let mut threads = Vec::new();
            for (objects, answers) in objects.chunks(share).zip(answers.chunks_mut(share)) {
                let (data, question) = (self.open()?, &question);
                threads.push(scope.spawn(move || {
                    for (object, answer) in objects.iter().zip(answers) {
                        inquiry.rate.wait(QUESTION, inquiry.operation, (inquiry.progress, inquiry.cancel))?;
                        *answer = question(&data, *object)?;
                        inquiry.progress.step();
                    }
                    Ok(())
                }));
            }
            let lost = || Err(Error::new(inquiry.operation, ErrorKind::Other, "a thread that asked the OSDs was lost"));
            threads.into_iter().try_for_each(|thread| thread.join().unwrap_or_else(|_| lost()))
        })?;
        Ok(answers)
    }

    /// Which objects below byte `end` the image itself holds. `image` is the one that these are the objects of, at the
    /// same snapshot.
    pub fn listing(&self, image: &Image, end: u64) -> Result<Listing<'_>> {
        let count = self.layout.count(end);
        Ok(Listing { objects: self, end, count, map: self.object_map(image, count)? })
    }

    /// Whether the image's header says now that the object map at the snapshot or head is valid. An open image does not
    /// see a change of that.
    fn is_map_valid_now(&self, image: &Image) -> Result<bool> {
        let operation = format!("read the flags of {}", image.spec());
        let header = c_string(&operation, &format!("rbd_header.{}", image.id()?))?;
        let snap_id = self.snap_id.unwrap_or(HEAD).to_le_bytes();
        let mut flags = [0; 8];
        let r = call_rbd_class(image.io(), &header, c"get_flags", &snap_id, &mut flags);
        let length = check(&operation, r)?;
        Ok(length == 8 && u64::from_le_bytes(flags) & sys::FLAG_OBJECT_MAP_INVALID == 0)
    }

    /// The object map at the snapshot or head. `None` unless it is valid there and knows so many objects.
    fn object_map(&self, image: &Image, count: u64) -> Result<Option<ObjectMap>> {
        if self.old_format || !image.has_valid_object_map()? {
            return Ok(None);
        }
        let operation = format!("read the object map of {}", image.spec());
        let name = match self.snap_id {
            None => format!("rbd_object_map.{}", image.id()?),
            Some(snap_id) => format!("rbd_object_map.{}.{snap_id:016x}", image.id()?),
        };
        let name = c_string(&operation, &name)?;
        // Two bits an object, four bytes of checksum for each 4 KiB of them, and a few more.
        let mut buffer = vec![0u8; usize::try_from(count / 4 + count / 4096 + 4096).unwrap_or(usize::MAX / 2)];
        loop {
            let r = call_rbd_class(image.io(), &name, c"object_map_load", &[], &mut buffer);
            if r == -libc::ERANGE && buffer.len() < 1 << 28 {
                buffer.resize(buffer.len() * 4, 0);
                continue;
            }
            // librbd goes on without a map that it cannot read, and so do we.
            let map = check(&operation, r).map(|length| ObjectMap::parse(&buffer[..length as usize]));
            return match map {
                // the image was opened a while ago, and its maps may have been made again and empty since
                Ok(Some(map)) if map.objects >= count => Ok(self.is_map_valid_now(image)?.then_some(map)),
                Ok(_) => {
                    tracing::debug!("{operation}: it is damaged or too small; the OSDs are asked instead");
                    Ok(None)
                }
                Err(error) if error.kind() == ErrorKind::Fenced => Err(error),
                Err(error) => {
                    tracing::debug!(%error, "the OSDs are asked instead");
                    Ok(None)
                }
            };
        }
    }
}

/// Calls a method of the OSD's rbd class on an object. Returns the length of the answer, or a negative errno.
fn call_rbd_class(io: &IoCtx, object: &CStr, method: &CStr, input: &[u8], answer: &mut [u8]) -> c_int {
    // SAFETY: the ioctx is open, the texts end in NUL; reads the input, writes at most the answer's length.
    unsafe {
        rados_exec(
            io.raw(),
            object.as_ptr(),
            c"rbd".as_ptr(),
            method.as_ptr(),
            input.as_ptr().cast(),
            input.len(),
            answer.as_mut_ptr().cast(),
            answer.len(),
        )
    }
}

/// What an OSD has of an object.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct StoredBytes {
    /// Without the holes.
    pub bytes: u64,
    /// Up to the object's end.
    pub length: u64,
}

/// Tells which objects an image itself holds, a stretch at a time. Exact, but for objects that a valid object map has
/// and the pool has not.
pub(super) struct Listing<'a> {
    objects: &'a DataObjects,
    /// Bytes.
    end: u64,
    count: u64,
    map: Option<ObjectMap>,
}

impl Listing<'_> {
    /// Those of a range, in order.
    pub fn held(&self, range: &Range<u64>, inquiry: Inquiry<'_>) -> Result<Vec<u64>> {
        if inquiry.cancel.is_cancelled() {
            return Err(cancelled(inquiry.operation));
        }
        let range = range.start..range.end.min(self.count);
        if let Some(map) = &self.map {
            return Ok(range.filter(|object| map.exists(*object)).collect());
        }
        let asked: Vec<u64> = range.collect();
        let objects = self.objects;
        let lengths = objects.ask(&asked, inquiry, |data, object| objects.length(inquiry.operation, data, object))?;
        Ok(asked.into_iter().zip(lengths).filter(|(_, length)| length.is_some()).map(|(object, _)| object).collect())
    }

    /// Whether a client that goes by the same object map asks the OSDs for this object.
    pub fn may_hold(&self, object: u64) -> bool {
        object < self.count && self.map.as_ref().is_none_or(|map| map.exists(object))
    }

    /// The extents of the image that are in the objects that hold any of these bytes.
    pub fn extents_near(&self, bytes: &Extent, inquiry: Inquiry<'_>) -> Result<Vec<Extent>> {
        let layout = self.objects.layout;
        let mut extents = Vec::new();
        let (mut next, end) = (layout.sets_of(bytes).start, layout.sets_of(bytes).end.min(self.count));
        while next < end {
            let stretch = layout.stretch(next, end);
            next = stretch.end;
            join(&mut extents, extents_of(self.held(&stretch, inquiry)?, layout, self.end));
        }
        Ok(extents)
    }

    /// Where in the image those lie that hold any of these bytes and that a client may ask the OSDs for.
    pub fn extents_asked_for(&self, bytes: &Extent) -> Vec<Extent> {
        if self.map.is_none() {
            return within(std::iter::once(0..self.end).collect(), bytes);
        }
        let layout = self.objects.layout;
        let asked = layout.sets_of(bytes).filter(|object| self.may_hold(*object));
        within(extents_of(asked, layout, self.end), bytes)
    }

    /// Where in the image all of them lie.
    pub fn extents(&self, inquiry: Inquiry<'_>) -> Result<Vec<Extent>> {
        self.extents_near(&(0..self.end), inquiry)
    }

    /// The first of them.
    pub fn first(&self, mut accept: impl FnMut(u64) -> Result<bool>, inquiry: Inquiry<'_>) -> Result<Option<u64>> {
        let mut next = 0;
        while next < self.count {
            let stretch = self.objects.layout.stretch(next, self.count);
            next = stretch.end;
            for object in self.held(&stretch, inquiry)? {
                if accept(object)? {
                    return Ok(Some(object));
                }
            }
        }
        Ok(None)
    }
}

/// Adds extents that come after those that there are.
fn join(extents: &mut Vec<Extent>, more: Vec<Extent>) {
    for extent in more {
        match extents.last_mut() {
            Some(last) if last.end == extent.start => last.end = extent.end,
            _ => extents.push(extent),
        }
    }
}

/// The states of an image's objects, as the OSD's rbd class returns them (`BitVector<2>` in Ceph's sources).
struct ObjectMap {
    objects: u64,
    states: Vec<u8>,
}

impl ObjectMap {
    /// A header with its length before it, whose last 8 bytes are the number of objects; two bits an object, the first
    /// in the highest; checksums, which the OSD has looked at.
    fn parse(data: &[u8]) -> Option<Self> {
        let (length, rest) = data.split_first_chunk::<4>()?;
        let header = rest.get(..u32::from_le_bytes(*length) as usize)?;
        // version, compatible version, length of what follows
        let fields = header.get(6..)?;
        let objects = u64::from_le_bytes(*fields.first_chunk::<8>()?);
        let states = rest.get(header.len()..)?.get(..usize::try_from(objects.div_ceil(4)).ok()?)?;
        Some(Self { objects, states: states.to_vec() })
    }

    /// Anything but "nonexistent": an object that is about to be removed may still be there.
    fn exists(&self, object: u64) -> bool {
        let shift = 6 - 2 * (object % 4);
        let state = usize::try_from(object / 4).ok().and_then(|byte| self.states.get(byte));
        state.is_none_or(|state| state >> shift & 3 != 0)
    }
}

/// An image of a chain, open at the snapshot where the chain reads it.
pub(super) struct Layer {
    pub image: Image,
    pub snap_id: u64,
    pub objects: DataObjects,
    /// Bytes of the image.
    pub size: u64,
    /// Bytes from the start that the image at the end of the chain reads from this one.
    pub end: u64,
    /// It is being migrated: part of its data lies in another image, which is not its parent.
    pub migrating: bool,
}

impl Layer {
    pub fn new(image: Image, snap_id: u64, end: u64) -> Result<Self> {
        let objects = DataObjects::of(&image, Some(snap_id))?;
        let (size, migrating) = (image.size()?, image.features()?.has(Features::MIGRATING));
        Ok(Self { objects, size, end: end.min(size), migrating, image, snap_id })
    }

    /// The objects that the layer itself holds, among those that the chain reads from it.
    pub fn listing(&self) -> Result<Listing<'_>> {
        self.objects.listing(&self.image, self.end)
    }
}

/// The bytes below `end` of these objects, which are in order.
pub(super) fn extents_of(objects: impl IntoIterator<Item = u64>, layout: Layout, end: u64) -> Vec<Extent> {
    let mut extents: Vec<Extent> = Vec::new();
    for extent in objects.into_iter().flat_map(|object| layout.extents(object)) {
        let extent = extent.start..extent.end.min(end);
        match extents.last_mut() {
            _ if extent.is_empty() => {}
            Some(last) if last.end == extent.start => last.end = extent.end,
            _ => extents.push(extent),
        }
    }
    extents
}

/// The parents of an image as it is open, the nearest first.
pub(super) fn parents(cluster: &Arc<Cluster>, image: &Image) -> Result<Vec<Layer>> {
    let mut layers: Vec<Layer> = Vec::new();
    let mut end = image.size()?;
    let mut link = image.parent()?;
    while let Some(next) = link {
        if layers.len() == MAX_LAYERS {
            let operation = format!("walk the parents of {}", image.spec());
            return Err(Error::new(operation, ErrorKind::Unsupported, "there are too many"));
        }
        end = end.min(next.parent.overlap);
        if end == 0 {
            break;
        }
        let parent = Image::open_parent(cluster, &next)?;
        link = parent.parent()?;
        layers.push(Layer::new(parent, next.snap_id, end)?);
    }
    Ok(layers)
}

/// The parents of an image as it is open, without the anchor that it was cloned from. As long as that has a parent, its
/// objects are copies of the parent's: the source below it has them all.
pub(super) fn sources(cluster: &Arc<Cluster>, image: &Image) -> Result<Vec<Layer>> {
    let mut layers = parents(cluster, image)?;
    if let [anchor, source, ..] = layers.as_slice()
        && source.end >= anchor.end
        && let Some(owner) = anchor.image.metadata(OWNER_KEY)?
        && is_owner_of(&owner, &anchor.image.name()?)
    {
        layers.remove(0);
    }
    Ok(layers)
}

/// The links of a chain of images. The chain may change while an image is open, which does not see it: a parent is
/// flattened, migrated or removed, and later reads may be wrong.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Chain(Vec<(i64, String, u64, bool)>);

impl Chain {
    /// That of the image, which is open at the snapshot of this id.
    pub fn of(cluster: &Arc<Cluster>, image: &Image, snap_id: u64) -> Result<Self> {
        let migrating = image.features()?.has(Features::MIGRATING);
        let mut chain = vec![(image.io().pool_id(), image.id()?, snap_id, migrating)];
        for layer in parents(cluster, image)? {
            chain.push((layer.image.io().pool_id(), layer.image.id()?, layer.snap_id, layer.migrating));
        }
        Ok(Self(chain))
    }

    /// An error if the chain of `source@snapshot` is another one by now.
    pub fn check(&self, cluster: &Arc<Cluster>, source: &ImageSpec, snapshot: &str, operation: &str) -> Result<()> {
        let image = Image::open_existing(cluster, source, Access::ReadOnly)?;
        let snap_id = image.snapshot_id(snapshot)?;
        image.set_snapshot(snapshot)?;
        let now = Self::of(cluster, &image, snap_id)?;
        if now == *self {
            return Ok(());
        }
        let detail = if now.0.first() == self.0.first() {
            "the source's parents changed while it was read"
        } else {
            "the snapshot was replaced while it was read"
        };
        Err(Error::new(operation, ErrorKind::Conflict, detail))
    }
}

/// All that may be other than zero in an image, in order and without overlaps; the whole image where the layers cannot
/// tell. The image is open at the snapshot of this id.
pub(super) fn data_extents(
    cluster: &Arc<Cluster>,
    image: &Image,
    snap_id: u64,
    inquiry: Inquiry<'_>,
) -> Result<Vec<Extent>> {
    let size = image.size()?;
    match try_data_extents(cluster, image, snap_id, size, inquiry) {
        Err(e) if matches!(e.kind(), ErrorKind::Cancelled | ErrorKind::Fenced) => Err(e),
        Err(e) => {
            tracing::warn!("reading all of {}, since its holes are not known: {e}", image.spec());
            Ok(clip(std::iter::once(0..size).collect(), size))
        }
        extents => extents,
    }
}

fn try_data_extents(
    cluster: &Arc<Cluster>,
    image: &Image,
    snap_id: u64,
    size: u64,
    inquiry: Inquiry<'_>,
) -> Result<Vec<Extent>> {
    if image.features()?.has(Features::MIGRATING) {
        return Err(Error::new(inquiry.operation, ErrorKind::Unsupported, "the source is being migrated"));
    }
    let shared = shared_extents(cluster, image, inquiry)?;
    let own = DataObjects::of(image, Some(snap_id))?;
    let mut extents = own.listing(image, size)?.extents(inquiry)?;
    extents.extend(shared);
    Ok(union(extents))
}

/// What an image as it is open may still read from its parents.
fn shared_extents(cluster: &Arc<Cluster>, image: &Image, inquiry: Inquiry<'_>) -> Result<Vec<Extent>> {
    let layers = parents(cluster, image)?;
    refuse_migrating(&layers, inquiry.operation)?;
    let mut extents = Vec::new();
    for layer in layers {
        extents.extend(layer.listing()?.extents(inquiry)?);
    }
    Ok(union(extents))
}

/// The objects that a flatten of an image has to copy: a parent holds them and the image itself does not.
#[derive(Debug, Default)]
pub(super) struct Missing {
    pub bytes: u64,
    /// The objects of the image that those bytes are in, in order.
    pub objects: Vec<u64>,
}

impl Missing {
    /// That of the image's head. `wanted` is whether the objects are wanted, and not just the bytes.
    pub fn of(cluster: &Arc<Cluster>, image: &Image, wanted: bool, inquiry: Inquiry<'_>) -> Result<Self> {
        let overlap = image.overlap()?;
        match Self::find(cluster, image, overlap, wanted, inquiry) {
            Err(e) if matches!(e.kind(), ErrorKind::Cancelled | ErrorKind::Fenced) => Err(e),
            Err(e) => {
                tracing::debug!("{}: taking all of it for data: {e}", inquiry.operation);
                let count = if wanted { Layout::of(image)?.count(overlap) } else { 0 };
                Ok(Self { bytes: overlap, objects: (0..count).collect() })
            }
            found => found,
        }
    }

    fn find(cluster: &Arc<Cluster>, image: &Image, end: u64, wanted: bool, inquiry: Inquiry<'_>) -> Result<Self> {
        let objects = DataObjects::of(image, None)?;
        let (layout, own) = (objects.layout, objects.listing(image, end)?);
        let layers = sources(cluster, image)?;
        refuse_migrating(&layers, inquiry.operation)?;
        let listings: Vec<Listing<'_>> = layers.iter().map(Layer::listing).collect::<Result<_>>()?;
        let (mut missing, mut next) = (Self::default(), 0);
        while next < own.count {
            let stretch = layout.stretch(next, own.count);
            next = stretch.end;
            let bytes = layout.bytes_of_sets(&stretch);
            let mut shared = Vec::new();
            for listing in &listings {
                shared.extend(within(listing.extents_near(&bytes, inquiry)?, &bytes));
            }
            if shared.is_empty() {
                continue;
            }
            let held = extents_of(own.held(&stretch, inquiry)?, layout, end);
            let extents = without(&union(shared), &union(held));
            missing.bytes += total(&extents);
            if wanted {
                let mut objects: Vec<u64> = extents.iter().flat_map(|extent| layout.objects(extent)).collect();
                objects.sort_unstable();
                objects.dedup();
                missing.objects.extend(objects);
            }
        }
        Ok(missing)
    }
}

/// The objects of an image for which clients that do not find them in the image ask the OSDs, among its parents.
pub(super) fn asked_for(cluster: &Arc<Cluster>, image: &Image, inquiry: Inquiry<'_>) -> Result<ObjectSet> {
    let layout = Layout::of(image)?;
    let layers = sources(cluster, image)?;
    refuse_migrating(&layers, inquiry.operation)?;
    let mut asked = ObjectSet::none_of(layout.count(image.overlap()?));
    for layer in &layers {
        let (listing, mut next) = (layer.listing()?, 0);
        while next < asked.count {
            let stretch = layout.stretch(next, asked.count);
            next = stretch.end;
            if layer.objects.layout == layout {
                stretch.filter(|object| listing.may_hold(*object)).for_each(|object| asked.insert(object));
            } else {
                let extents = listing.extents_asked_for(&layout.bytes_of_sets(&stretch));
                extents.iter().flat_map(|extent| layout.objects(extent)).for_each(|object| asked.insert(object));
            }
        }
    }
    Ok(asked)
}

/// Some of the first objects of an image: one bit each.
pub(super) struct ObjectSet {
    pub count: u64,
    bits: Vec<u64>,
}

impl ObjectSet {
    pub fn none_of(count: u64) -> Self {
        Self { count, bits: vec![0; usize::try_from(count.div_ceil(64)).unwrap_or_default()] }
    }

    pub fn all_of(count: u64) -> Self {
        let mut all = Self::none_of(count);
        all.bits.fill(u64::MAX);
        all
    }

    pub fn insert(&mut self, object: u64) {
        if object < self.count
            && let Some(bits) = self.bits.get_mut((object / 64) as usize)
        {
            *bits |= 1 << (object % 64);
        }
    }

    pub fn contains(&self, object: u64) -> bool {
        let bits = self.bits.get((object / 64) as usize).copied().unwrap_or_default();
        object < self.count && bits >> (object % 64) & 1 == 1
    }
}

/// What a layer holds cannot be told while it is being migrated.
pub(super) fn refuse_migrating(layers: &[Layer], operation: &str) -> Result<()> {
    match layers.iter().find(|layer| layer.migrating) {
        None => Ok(()),
        Some(layer) => {
            let detail = format!("{} is being migrated", layer.image.spec());
            Err(Error::new(operation, ErrorKind::Unsupported, detail))
        }
    }
}

pub(super) fn clip(mut extents: Vec<Extent>, end: u64) -> Vec<Extent> {
    extents.retain_mut(|extent| {
        extent.end = extent.end.min(end);
        extent.start < extent.end
    });
    extents
}

/// What of the extents lies within `bytes`.
pub(super) fn within(mut extents: Vec<Extent>, bytes: &Extent) -> Vec<Extent> {
    extents.retain_mut(|extent| {
        *extent = extent.start.max(bytes.start)..extent.end.min(bytes.end);
        extent.start < extent.end
    });
    extents
}

/// Sorts the extents and joins those that touch.
pub(super) fn union(mut extents: Vec<Extent>) -> Vec<Extent> {
    extents.sort_by_key(|extent| extent.start);
    let mut joined: Vec<Extent> = Vec::with_capacity(extents.len());
    for extent in extents {
        match joined.last_mut() {
            Some(last) if extent.start <= last.end => last.end = last.end.max(extent.end),
            _ => joined.push(extent),
        }
    }
    joined
}

/// What of `extents` is not in `others`; both as [`union`] returns them.
pub(super) fn without(extents: &[Extent], others: &[Extent]) -> Vec<Extent> {
    let mut rest = Vec::new();
    let mut others = others.iter().peekable();
    for extent in extents {
        let mut start = extent.start;
        while let Some(other) = others.peek() {
            if other.end <= start {
                others.next();
                continue;
            }
            if other.start >= extent.end {
                break;
            }
            if other.start > start {
                rest.push(start..other.start);
            }
            start = other.end;
            if start >= extent.end {
                break;
            }
        }
        if start < extent.end {
            rest.push(start..extent.end);
        }
    }
    rest
}

/// Bytes in all of them.
pub(super) fn total(extents: &[Extent]) -> u64 {
    extents.iter().map(|extent| extent.end - extent.start).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn touching_extents_are_joined() {
        assert_eq!(union(vec![8..12, 0..4, 4..6, 9..10]), [0..6, 8..12]);
        assert_eq!(union(vec![]), []);
        assert_eq!(clip(vec![0..4, 4..8, 8..12], 6), [0..4, 4..6]);
    }

    #[test]
    fn ranges_are_subtracted() {
        assert_eq!(without(std::slice::from_ref(&(0..10)), &[2..4, 6..8]), [0..2, 4..6, 8..10]);
        assert_eq!(without(&[0..4, 6..10], std::slice::from_ref(&(0..20))), []);
        assert_eq!(without(&[0..4, 6..8], &[]), [0..4, 6..8]);
    }

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
        assert_eq!(layout.extents(1).collect::<Vec<_>>(), [4..8, 16..20]);
        assert_eq!(layout.extents(3).collect::<Vec<_>>(), [24..28, 36..40]);
    }

    fn layouts() -> impl Strategy<Value = Layout> {
        (0u32..4, 0u32..3, 1u64..5).prop_map(|(unit, units, stripe_count)| Layout {
            object_size: 1 << (unit + units),
            stripe_unit: 1 << unit,
            stripe_count,
        })
    }

    #[test]
    fn objects_are_one_bit_each() {
        let mut some = ObjectSet::none_of(130);
        [0, 63, 64, 129, 130, 1 << 40].into_iter().for_each(|object| some.insert(object));
        assert_eq!((0..200).filter(|object| some.contains(*object)).collect::<Vec<_>>(), [0, 63, 64, 129]);
        assert_eq!((0..200).filter(|object| ObjectSet::all_of(70).contains(*object)).count(), 70);
        assert_eq!(ObjectSet::none_of(10 << 18).bits.len() * 8, 320 << 10, "bytes for 10 TiB");
    }

    #[test]
    fn an_object_map_is_two_bits_an_object() {
        let mut data = vec![14, 0, 0, 0, 1, 1, 8, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, 0b01_00_10_11, 0b00_11_11_11];
        data.extend([4, 0, 0, 0, 1, 2, 3, 4]);
        let map = ObjectMap::parse(&data).unwrap();
        assert_eq!((0..6).map(|object| map.exists(object)).collect::<Vec<_>>(), [true, false, true, true, false, true]);
        assert_eq!(map.objects, 5);
        for length in 0..20 {
            assert!(ObjectMap::parse(&data[..length]).is_none(), "{length}");
        }
    }

    fn extents() -> impl Strategy<Value = Vec<Extent>> {
        prop::collection::vec((0u64..60, 1u64..10).prop_map(|(start, length)| start..start + length), 0..12)
    }

    proptest! {
        #[test]
        fn objects_and_extents_agree(layout in layouts(), size in 0u64..300) {
            let count = layout.count(size);
            prop_assert_eq!(union(extents_of(0..count, layout, size)), clip(std::iter::once(0..size).collect(), size));
            for byte in 0..size {
                let object = layout.objects(&(byte..byte + 1)).next().unwrap();
                prop_assert!(object < count && layout.extents(object).any(|extent| extent.contains(&byte)));
                prop_assert!(byte < layout.end_of_set(object));
            }
            for object in 0..count {
                prop_assert!(layout.extents(object).any(|extent| extent.start < size), "{}", object);
                prop_assert_eq!(layout.extents(object).map(|e| e.end - e.start).sum::<u64>(), layout.object_size);
            }
        }

        #[test]
        fn unions_and_differences_hold_the_right_bytes(a in extents(), b in extents()) {
            let rest = without(&union(a.clone()), &union(b.clone()));
            let joined = union(a.clone());
            for byte in 0..80u64 {
                let within = |extents: &[Extent]| extents.iter().any(|e| e.contains(&byte));
                prop_assert_eq!(within(&joined), within(&a));
                prop_assert_eq!(within(&rest), within(&a) && !within(&b));
            }
            prop_assert!(joined.windows(2).all(|pair| pair[0].end < pair[1].start));
        }
    }
}
