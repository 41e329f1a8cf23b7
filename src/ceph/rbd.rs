//! RBD images as safe types over librbd: an [`Image`] closes itself, asynchronous reads and writes own their buffers.
//!
//! Everything here blocks, and an image stays on the thread that opened it.
#![allow(unsafe_code)]

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::ops::Range;
use std::ptr;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::time::Duration;

use ceph::rados::{rados_read, rados_remove, rados_stat};
use tokio_util::sync::CancellationToken;

use super::cluster::{Cluster, IoCtx, c_string, cancelled, check, until_nul};
use super::objects::omap_page;
use super::{Error, ErrorKind, Features, ImageKey, ImageSpec, Page, Parent, Progress, Result, Snapshot, Trashed, sys};

/// The objects whose omaps list a pool's images, and what lies in its trash.
const DIRECTORY: &CStr = c"rbd_directory";
const TRASH: &CStr = c"rbd_trash";

/// Their keys that are asked for in one operation: an OSD returns no more (`osd_max_omap_entries_per_request`).
const DIRECTORY_PAGE: usize = 1024;

/// Whether an image is opened for changes. Opening read-only sets no watch and never takes the image's lock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Access {
    ReadOnly,
    ReadWrite,
}

/// Bytes of an image.
pub(super) type Extent = Range<u64>;

/// An open image, at its head or at a snapshot. `spec` and operation texts are for errors only.
pub(super) struct Image {
    raw: sys::rbd_image_t,
    spec: ImageSpec,
    namespace: String,
    io: IoCtx,
}

/// The parent as [`Image::parent`] tells it, with what is needed to open it.
pub(super) struct ParentLink {
    pub pool_id: i64,
    pub snap_id: u64,
    pub parent: Parent,
}

impl Image {
    /// Opens the image's head. `None` when there is no such image; a missing pool is an error.
    pub fn open(cluster: &Arc<Cluster>, spec: &ImageSpec, access: Access) -> Result<Option<Self>> {
        Self::open_in(IoCtx::open(cluster, &spec.pool)?, "", spec, access)
    }

    /// As [`open`](Self::open), with a missing image as an error.
    pub fn open_existing(cluster: &Arc<Cluster>, spec: &ImageSpec, access: Access) -> Result<Self> {
        Self::open(cluster, spec, access)?
            .ok_or_else(|| Error::new(format!("open {spec}"), ErrorKind::NotFound, "no such image"))
    }

    /// Opens an image to read it at a snapshot.
    pub fn open_snapshot(cluster: &Arc<Cluster>, spec: &ImageSpec, snapshot: &str) -> Result<Self> {
        let image = Self::open_existing(cluster, spec, Access::ReadOnly)?;
        image.set_snapshot(snapshot)?;
        Ok(image)
    }

    /// Opens the snapshot that an image was cloned from, wherever it lies: by ids, so in the trash too.
    pub fn open_parent(cluster: &Arc<Cluster>, link: &ParentLink) -> Result<Self> {
        let io = IoCtx::open_id(cluster, link.pool_id)?.with_namespace(&link.parent.namespace)?;
        let spec = ImageSpec::with_id(&link.parent.pool, &link.parent.image_id);
        let image = Self::open_in(io, &link.parent.namespace, &spec, Access::ReadOnly)?
            .ok_or_else(|| Error::new(format!("open {spec}"), ErrorKind::NotFound, "no such image"))?;
        image.set_snapshot_id(link.snap_id)?;
        Ok(image)
    }

    fn open_in(io: IoCtx, namespace: &str, spec: &ImageSpec, access: Access) -> Result<Option<Self>> {
        let operation = format!("open {spec}");
        let mut raw: sys::rbd_image_t = ptr::null_mut();
        let (key, open): (_, unsafe extern "C" fn(_, _, _, _) -> c_int) = match (&spec.image, access) {
            (ImageKey::Name(name), Access::ReadOnly) => (name, sys::rbd_open_read_only),
            (ImageKey::Name(name), Access::ReadWrite) => (name, sys::rbd_open),
            (ImageKey::Id(id), Access::ReadOnly) => (id, sys::rbd_open_by_id_read_only),
            (ImageKey::Id(id), Access::ReadWrite) => (id, sys::rbd_open_by_id),
        };
        let key = c_string(&operation, key)?;
        // SAFETY: the ioctx is open and lives in the image; a null snapshot means the head.
        let r = unsafe { open(io.raw(), key.as_ptr(), &mut raw, ptr::null()) };
        if r == -libc::ENOENT {
            return Ok(None);
        }
        check(operation, r)?;
        Ok(Some(Self { raw, spec: spec.clone(), namespace: namespace.to_owned(), io }))
    }

    fn check(&self, verb: &str, r: c_int) -> Result<c_int> {
        check(format!("{verb} {}", self.spec), r)
    }

    pub fn cluster(&self) -> &Arc<Cluster> {
        self.io.cluster()
    }

    pub fn io(&self) -> &IoCtx {
        &self.io
    }

    /// The namespace of the pool that the image lies in.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    pub fn spec(&self) -> &ImageSpec {
        &self.spec
    }

    /// Moves the handle to a snapshot; a missing one is [`ErrorKind::NotFound`].
    pub fn set_snapshot(&self, snapshot: &str) -> Result<()> {
        let operation = format!("open {}@{snapshot}", self.spec);
        let name = c_string(&operation, snapshot)?;
        // SAFETY: the image is open.
        let r = unsafe { sys::rbd_snap_set(self.raw, name.as_ptr()) };
        if r == -libc::ENOENT {
            return Err(Error::new(operation, ErrorKind::NotFound, "no such snapshot"));
        }
        check(operation, r).map(drop)
    }

    pub fn snapshot_id(&self, snapshot: &str) -> Result<u64> {
        let operation = format!("look up {}@{snapshot}", self.spec);
        let name = c_string(&operation, snapshot)?;
        let mut id = 0;
        // SAFETY: the image is open.
        check(operation, unsafe { sys::rbd_snap_get_id(self.raw, name.as_ptr(), &mut id) })?;
        Ok(id)
    }

    fn stat(&self) -> Result<sys::Stat> {
        let mut stat = std::mem::MaybeUninit::<sys::Stat>::zeroed();
        // SAFETY: the structure is given with its size.
        let r = unsafe { sys::rbd_stat(self.raw, stat.as_mut_ptr(), size_of::<sys::Stat>()) };
        self.check("stat", r)?;
        // SAFETY: plain numbers, zeroed before and filled by the call.
        Ok(unsafe { stat.assume_init() })
    }

    /// Bytes, at the head or the snapshot that is set.
    pub fn size(&self) -> Result<u64> {
        Ok(self.stat()?.size)
    }

    /// Bytes; a power of two.
    pub fn object_size(&self) -> Result<u64> {
        Ok(self.stat()?.obj_size)
    }

    fn number<N: Default>(
        &self,
        what: &str,
        get: unsafe extern "C" fn(sys::rbd_image_t, *mut N) -> c_int,
    ) -> Result<N> {
        let mut value = N::default();
        // SAFETY: the image is open; the callee writes one number of this type.
        self.check(what, unsafe { get(self.raw, &mut value) })?;
        Ok(value)
    }

    pub fn features(&self) -> Result<Features> {
        self.number("read the features of", sys::rbd_get_features).map(Features)
    }

    pub fn flags(&self) -> Result<u64> {
        self.number("read the flags of", sys::rbd_get_flags)
    }

    /// Whether the object map at the head, or at the snapshot that is set, tells which objects there are.
    pub fn has_valid_object_map(&self) -> Result<bool> {
        Ok(self.features()?.has(Features::OBJECT_MAP) && self.flags()? & sys::FLAG_OBJECT_MAP_INVALID == 0)
    }

    pub fn stripe_unit(&self) -> Result<u64> {
        self.number("read the stripe unit of", sys::rbd_get_stripe_unit)
    }

    pub fn stripe_count(&self) -> Result<u64> {
        self.number("read the stripe count of", sys::rbd_get_stripe_count)
    }

    pub fn is_old_format(&self) -> Result<bool> {
        Ok(self.number("read the format of", sys::rbd_get_old_format)? != 0)
    }

    /// Bytes that the image still shares with its parent, at the head or the snapshot that is set; 0 without a parent.
    pub fn overlap(&self) -> Result<u64> {
        self.number("read the overlap of", sys::rbd_get_overlap)
    }

    /// Empty for an image of format 1.
    pub fn id(&self) -> Result<String> {
        let mut buffer = [0u8; 256];
        // SAFETY: writes at most the buffer's length.
        let r = unsafe { sys::rbd_get_id(self.raw, buffer.as_mut_ptr().cast(), buffer.len()) };
        if r == -libc::EINVAL {
            return Ok(String::new());
        }
        self.check("read the id of", r)?;
        Ok(until_nul(&buffer))
    }

    pub fn name(&self) -> Result<String> {
        let mut buffer = [0u8; 4096];
        let mut length = buffer.len();
        // SAFETY: writes at most `length` bytes.
        let r = unsafe { sys::rbd_get_name(self.raw, buffer.as_mut_ptr().cast(), &mut length) };
        self.check("read the name of", r)?;
        Ok(until_nul(&buffer))
    }

    /// What the names of the image's data objects start with.
    pub fn object_prefix(&self) -> Result<String> {
        let mut buffer = [0u8; 256];
        // SAFETY: writes at most the buffer's length.
        let r = unsafe { sys::rbd_get_block_name_prefix(self.raw, buffer.as_mut_ptr().cast(), buffer.len()) };
        self.check("read the object names of", r)?;
        Ok(until_nul(&buffer))
    }

    /// The pool of the data objects, which is not the image's own for erasure-coded data pools.
    pub fn data_pool_id(&self) -> i64 {
        // SAFETY: the image is open.
        unsafe { sys::rbd_get_data_pool_id(self.raw) }
    }

    pub fn parent(&self) -> Result<Option<ParentLink>> {
        let mut image = sys::LinkedImageSpec {
            pool_id: 0,
            pool_name: ptr::null_mut(),
            pool_namespace: ptr::null_mut(),
            image_id: ptr::null_mut(),
            image_name: ptr::null_mut(),
            trash: false,
        };
        let mut snap = sys::SnapSpec { id: 0, namespace_type: 0, name: ptr::null_mut() };
        // SAFETY: both structures are laid out as in librbd.h (abi.c).
        let r = unsafe { sys::rbd_get_parent(self.raw, &mut image, &mut snap) };
        if r == -libc::ENOENT {
            return Ok(None);
        }
        self.check("read the parent of", r)?;
        // SAFETY: the call succeeded: each string is null or ends in NUL.
        let link = unsafe {
            ParentLink {
                pool_id: image.pool_id,
                snap_id: snap.id,
                parent: Parent {
                    pool: text(image.pool_name),
                    namespace: text(image.pool_namespace),
                    image: text(image.image_name),
                    image_id: text(image.image_id),
                    snapshot: text(snap.name),
                    overlap: 0,
                    in_trash: image.trash,
                },
            }
        };
        // SAFETY: filled by librbd, not used again.
        unsafe {
            sys::rbd_linked_image_spec_cleanup(&mut image);
            sys::rbd_snap_spec_cleanup(&mut snap);
        }
        let overlap = self.overlap()?;
        Ok(Some(ParentLink { parent: Parent { overlap, ..link.parent }, ..link }))
    }

    /// Whether it has a snapshot of any kind.
    pub fn has_snapshots(&self) -> Result<bool> {
        Ok(!self.all_snapshots()?.is_empty())
    }

    /// The ids of its snapshots of every kind, also of those that were removed and stay for clones of format 2.
    pub fn all_snapshots(&self) -> Result<Vec<u64>> {
        let mut ids = Vec::new();
        for namespace in 0..=sys::SNAP_NAMESPACE_LAST {
            ids.extend(self.listed_snapshots(namespace)?.into_iter().map(|(id, _, _)| id));
        }
        Ok(ids)
    }

    /// Moves the handle to a snapshot of any kind.
    pub fn set_snapshot_id(&self, id: u64) -> Result<()> {
        // SAFETY: the image is open.
        self.check("open a snapshot of", unsafe { sys::rbd_snap_set_by_id(self.raw, id) }).map(drop)
    }

    /// The user's snapshots: without those of mirroring, of groups, or kept for clones of format 2.
    pub fn snapshots(&self) -> Result<Vec<Snapshot>> {
        let mut snapshots = Vec::new();
        for (id, size, name) in self.listed_snapshots(sys::SNAP_NAMESPACE_USER)? {
            let protected = self.is_protected(&name)?;
            snapshots.push(Snapshot { id, name, size, protected });
        }
        Ok(snapshots)
    }

    /// Snapshots that were removed but for the last step: id, and the name that each had. librbd removes by way of the
    /// trash, under another name, and one whose remover died there stays; as does one that clones of format 2 have.
    pub fn discarded_snapshots(&self) -> Result<Vec<(u64, String)>> {
        let operation = format!("look at the discarded snapshots of {}", self.spec);
        let mut discarded = Vec::new();
        for (id, _, _) in self.listed_snapshots(sys::SNAP_NAMESPACE_TRASH)? {
            let mut buffer = vec![0u8; 256];
            loop {
                // SAFETY: writes at most that many bytes, and the needed length, as its result, when it is more.
                let r = unsafe {
                    sys::rbd_snap_get_trash_namespace(self.raw, id, buffer.as_mut_ptr().cast(), buffer.len())
                };
                match r {
                    r if r == -libc::ERANGE && buffer.len() < 1 << 16 => buffer.resize(buffer.len() * 4, 0),
                    // gone meanwhile
                    r if r == -libc::ENOENT => break,
                    r => {
                        check(operation.clone(), r)?;
                        discarded.push((id, until_nul(&buffer)));
                        break;
                    }
                }
            }
        }
        Ok(discarded)
    }

    /// Id, size and name of the snapshots in a namespace.
    fn listed_snapshots(&self, namespace: c_int) -> Result<Vec<(u64, u64, String)>> {
        let mut max: c_int = 64;
        loop {
            let mut infos = Vec::with_capacity(max as usize);
            infos.resize_with(max as usize, || sys::SnapInfo { id: 0, size: 0, name: ptr::null() });
            // SAFETY: the array is given with its length, and ends with a null name only if there is room.
            let r = unsafe { sys::rbd_snap_list(self.raw, infos.as_mut_ptr(), &mut max) };
            if r == -libc::ERANGE {
                max += 16;
                continue;
            }
            let count = self.check("list the snapshots of", r)? as usize;
            let mut found = infos[..count]
                .iter()
                // SAFETY: names filled by librbd end in NUL.
                .map(|info| (info.id, info.size, unsafe { text(info.name) }))
                .collect::<Vec<_>>();
            if count > 0 {
                // SAFETY: filled by librbd; the names end at the null one that `infos` has room for, see above.
                unsafe { sys::rbd_snap_list_end(infos.as_mut_ptr()) };
            }
            found.retain(|(id, _, _)| {
                let mut kind = 0;
                // SAFETY: the image is open.
                let r = unsafe { sys::rbd_snap_get_namespace_type(self.raw, *id, &mut kind) };
                r >= 0 && kind == namespace
            });
            return Ok(found);
        }
    }

    fn snapshot_call(
        &self,
        verb: &str,
        snapshot: &str,
        call: unsafe extern "C" fn(sys::rbd_image_t, *const c_char) -> c_int,
    ) -> Result<()> {
        let operation = format!("{verb} {}@{snapshot}", self.spec);
        let name = c_string(&operation, snapshot)?;
        // SAFETY: the image is open, the name ends in NUL.
        check(operation, unsafe { call(self.raw, name.as_ptr()) }).map(drop)
    }

    pub fn is_protected(&self, snapshot: &str) -> Result<bool> {
        let operation = format!("look at {}@{snapshot}", self.spec);
        let name = c_string(&operation, snapshot)?;
        let mut protected = 0;
        // SAFETY: the image is open, the name ends in NUL.
        check(operation, unsafe { sys::rbd_snap_is_protected(self.raw, name.as_ptr(), &mut protected) })?;
        Ok(protected != 0)
    }

    pub fn create_snapshot(&self, snapshot: &str) -> Result<()> {
        let created = self.snapshot_call("create snapshot", snapshot, sys::rbd_snap_create);
        // EDQUOT, which is NoSpace elsewhere: `rbd snap limit`
        created.map_err(|e| match e.errno() {
            libc::EDQUOT => e.with_kind(ErrorKind::SnapshotLimit),
            _ => e,
        })
    }

    pub fn protect_snapshot(&self, snapshot: &str) -> Result<()> {
        self.snapshot_call("protect", snapshot, sys::rbd_snap_protect)
    }

    pub fn unprotect_snapshot(&self, snapshot: &str) -> Result<()> {
        self.snapshot_call("unprotect", snapshot, sys::rbd_snap_unprotect)
    }

    pub fn remove_snapshot(&self, snapshot: &str) -> Result<()> {
        self.snapshot_call("remove snapshot", snapshot, sys::rbd_snap_remove)
    }

    pub fn remove_snapshot_by_id(&self, id: u64) -> Result<()> {
        let operation = format!("remove snapshot {id} of {}", self.spec);
        // SAFETY: the image is open.
        check(operation, unsafe { sys::rbd_snap_remove_by_id(self.raw, id) }).map(drop)
    }

    pub fn metadata(&self, key: &str) -> Result<Option<String>> {
        let operation = format!("read metadata {key} of {}", self.spec);
        let key = c_string(&operation, key)?;
        let mut buffer = vec![0u8; 4096];
        loop {
            let mut length = buffer.len();
            // SAFETY: writes at most `length` bytes, and the needed length on ERANGE.
            let r = unsafe { sys::rbd_metadata_get(self.raw, key.as_ptr(), buffer.as_mut_ptr().cast(), &mut length) };
            match r {
                r if r == -libc::ENOENT => return Ok(None),
                r if r == -libc::ERANGE && length > buffer.len() => buffer.resize(length + 1, 0),
                r => {
                    check(operation, r)?;
                    return Ok(Some(until_nul(&buffer)));
                }
            }
        }
    }

    pub fn set_metadata(&self, key: &str, value: &str) -> Result<()> {
        let operation = format!("set metadata {key} of {}", self.spec);
        let (key, value) = (c_string(&operation, key)?, c_string(&operation, value)?);
        // SAFETY: the image is open, the strings end in NUL.
        check(operation, unsafe { sys::rbd_metadata_set(self.raw, key.as_ptr(), value.as_ptr()) }).map(drop)
    }

    pub fn remove_metadata(&self, key: &str) -> Result<()> {
        let operation = format!("remove metadata {key} of {}", self.spec);
        let key = c_string(&operation, key)?;
        // SAFETY: the image is open, the key ends in NUL.
        check(operation, unsafe { sys::rbd_metadata_remove(self.raw, key.as_ptr()) }).map(drop)
    }

    /// The keys of all image-meta, `conf_…` included.
    pub fn metadata_keys(&self) -> Result<Vec<String>> {
        let operation = format!("list the metadata of {}", self.spec);
        let (mut keys, mut values) = (vec![0u8; 4096], vec![0u8; 4096]);
        loop {
            let (mut keys_length, mut values_length) = (keys.len(), values.len());
            // SAFETY: both buffers are given with their lengths, which become the needed ones on ERANGE.
            let r = unsafe {
                sys::rbd_metadata_list(
                    self.raw,
                    c"".as_ptr(),
                    0,
                    keys.as_mut_ptr().cast(),
                    &mut keys_length,
                    values.as_mut_ptr().cast(),
                    &mut values_length,
                )
            };
            if r == -libc::ERANGE && (keys_length > keys.len() || values_length > values.len()) {
                keys.resize(keys_length.max(keys.len()), 0);
                values.resize(values_length.max(values.len()), 0);
                continue;
            }
            check(operation, r)?;
            let listed = keys[..keys_length.min(keys.len())].split(|byte| *byte == 0).filter(|key| !key.is_empty());
            return Ok(listed.map(|key| String::from_utf8_lossy(key).into_owned()).collect());
        }
    }

    /// Sets these keys, then removes every other one.
    pub fn replace_metadata(&self, metadata: &[(String, String)]) -> Result<()> {
        for (key, value) in metadata {
            self.set_metadata(key, value)?;
        }
        for key in self.metadata_keys()?.iter().filter(|key| metadata.iter().all(|(wanted, _)| wanted != *key)) {
            match self.remove_metadata(key) {
                Err(e) if e.kind() != ErrorKind::NotFound => return Err(e),
                _ => {}
            }
        }
        Ok(())
    }

    /// At most `length` bytes, fewer at the image's end.
    pub fn read(&self, offset: u64, length: usize) -> Result<Vec<u8>> {
        let length = length.min(usize::try_from(self.size()?.saturating_sub(offset)).unwrap_or(usize::MAX));
        let mut data = vec![0u8; length];
        let mut done = 0;
        while done < length {
            // SAFETY: writes at most the rest of the buffer.
            let r = unsafe {
                sys::rbd_read(self.raw, offset + done as u64, length - done, data[done..].as_mut_ptr().cast())
            };
            match self.check("read", r.clamp(c_int::MIN as isize, c_int::MAX as isize) as c_int)? {
                0 => break,
                read => done += read as usize,
            }
        }
        data.truncate(done);
        Ok(data)
    }

    /// Writes all of `data`, which must be shorter than 2 GiB and end within the image.
    pub fn write(&self, offset: u64, data: &[u8]) -> Result<()> {
        // SAFETY: reads `data`, which lives until the call returns.
        let r = unsafe { sys::rbd_write(self.raw, offset, data.len(), data.as_ptr().cast()) };
        self.check("write", r.clamp(c_int::MIN as isize, c_int::MAX as isize) as c_int).map(drop)
    }

    /// The extents below `end` whose objects exist in this image itself, at the snapshot that is set. Objects of its
    /// parents are not among them.
    pub fn own_extents(&self, end: u64) -> Result<Vec<Extent>> {
        extern "C" fn add(offset: u64, length: usize, exists: c_int, argument: *mut c_void) -> c_int {
            if exists != 0 {
                // SAFETY: the argument is the vector below; librbd makes its calls one after the other.
                let extents = unsafe { &mut *argument.cast::<Vec<Extent>>() };
                extents.push(offset..offset + length as u64);
            }
            0
        }
        let mut extents: Vec<Extent> = Vec::new();
        if end > 0 {
            // SAFETY: `add` fits the argument, which outlives the call.
            let r =
                unsafe { sys::rbd_diff_iterate2(self.raw, ptr::null(), 0, end, 0, 1, add, (&raw mut extents).cast()) };
            self.check("list the data of", r)?;
        }
        Ok(extents)
    }

    /// Copies what is shared with the parent into the image, and cuts the parent off. Stops soon after `cancel`.
    pub fn flatten(&self, progress: &Progress, cancel: &CancellationToken) -> Result<()> {
        self.long_call("flatten", sys::rbd_flatten_with_progress, progress, cancel)
    }

    /// Switches features on or off.
    pub fn set_features(&self, features: Features, on: bool) -> Result<()> {
        // SAFETY: the image is open.
        let r = unsafe { sys::rbd_update_features(self.raw, features.0, on.into()) };
        self.check(if on { "enable features of" } else { "disable features of" }, r).map(drop)
    }

    /// Enables the features of a published image, and disables all others.
    pub fn set_published_features(&self) -> Result<()> {
        let layout = Features::STRIPINGV2.0 | Features::DATA_POOL.0 | Features::OPERATIONS.0;
        let features = self.features()?;
        for (change, on) in
            [(features.0 & !(Features::PUBLISHED.0 | layout), false), (Features::PUBLISHED.0 & !features.0, true)]
        {
            if change != 0 {
                self.set_features(Features(change), on)?;
            }
        }
        Ok(())
    }

    /// Gives it the features of a published image, and rebuilds the object maps of head and snapshots. Leaves the
    /// handle at a snapshot, where there is one.
    pub fn rebuild_as_published(&self, progress: &Progress, cancel: &CancellationToken) -> Result<()> {
        self.set_published_features()?;
        self.rebuild_object_map(progress, cancel)?;
        for snapshot in self.snapshots()? {
            self.set_snapshot(&snapshot.name)?;
            self.rebuild_object_map(progress, cancel)?;
        }
        Ok(())
    }

    /// Makes the object map agree with the objects that there are.
    pub fn rebuild_object_map(&self, progress: &Progress, cancel: &CancellationToken) -> Result<()> {
        self.long_call("rebuild the object map of", sys::rbd_rebuild_object_map, &progress.steps_only(), cancel)
    }

    fn long_call(
        &self,
        verb: &str,
        call: unsafe extern "C" fn(sys::rbd_image_t, sys::ProgressFn, *mut c_void) -> c_int,
        progress: &Progress,
        cancel: &CancellationToken,
    ) -> Result<()> {
        struct Watch<'a> {
            progress: &'a Progress,
            cancel: &'a CancellationToken,
        }
        /// A negative result ends the call: librbd starts no more objects, and waits for those in flight.
        extern "C" fn step(offset: u64, total: u64, argument: *mut c_void) -> c_int {
            // SAFETY: the argument is the structure below, only read here, from whatever thread librbd calls.
            let watch = unsafe { &*argument.cast::<Watch<'_>>() };
            if total > 0 {
                let bytes = u128::from(watch.progress.total()) * u128::from(offset.min(total)) / u128::from(total);
                watch.progress.set_done(bytes as u64);
            }
            if watch.cancel.is_cancelled() { -libc::ECANCELED } else { 0 }
        }
        let watch = Watch { progress, cancel };
        // SAFETY: `step` fits the argument, which outlives the call.
        let r = unsafe { call(self.raw, step, (&raw const watch).cast_mut().cast()) };
        if r == -libc::ECANCELED && cancel.is_cancelled() {
            return Err(cancelled(format!("{verb} {}", self.spec)));
        }
        self.check(verb, r).map(drop)
    }

    pub fn flush(&self) -> Result<()> {
        // SAFETY: the image is open.
        self.check("flush", unsafe { sys::rbd_flush(self.raw) }).map(drop)
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        // SAFETY: opened by us and not used again; its ioctx is destroyed after it.
        unsafe { sys::rbd_close(self.raw) };
    }
}

/// # Safety
/// `text` is null or ends in NUL.
unsafe fn text(text: *const c_char) -> String {
    if text.is_null() {
        return String::new();
    }
    // SAFETY: by the contract above.
    unsafe { std::ffi::CStr::from_ptr(text) }.to_string_lossy().into_owned()
}

/// Options of a new image. Destroyed when dropped.
pub(super) struct Options {
    raw: sys::rbd_image_options_t,
}

impl Options {
    /// Format 2, [`Features::PUBLISHED`], and the object size and striping of `like`.
    pub fn published(like: &Image, data_pool: Option<&str>) -> Result<Self> {
        Self::with_features(like, Features::PUBLISHED, data_pool)
    }

    /// Format 2, these features, and the object size and striping of `like`. `data_pool`: where the data goes; `None`:
    /// where the configuration of the client and of the image's pool says.
    pub fn with_features(like: &Image, features: Features, data_pool: Option<&str>) -> Result<Self> {
        let mut raw = ptr::null_mut();
        // SAFETY: writes the new options to `raw`.
        unsafe { sys::rbd_image_options_create(&mut raw) };
        let options = Self { raw };
        let (object_size, unit, count) = (like.object_size()?, like.stripe_unit()?, like.stripe_count()?);
        let mut features = features.0;
        options.set(sys::IMAGE_OPTION_FORMAT, 2)?;
        options.set(sys::IMAGE_OPTION_ORDER, u64::from(object_size.trailing_zeros()))?;
        if count > 1 || unit != object_size {
            features |= Features::STRIPINGV2.0;
            options.set(sys::IMAGE_OPTION_STRIPE_UNIT, unit)?;
            options.set(sys::IMAGE_OPTION_STRIPE_COUNT, count)?;
        }
        options.set(sys::IMAGE_OPTION_FEATURES, features)?;
        options.set_data_pool(like.cluster(), data_pool)?;
        Ok(options)
    }

    /// An error that names the pool is better than what librbd answers where data cannot be kept in it.
    fn set_data_pool(&self, cluster: &Arc<Cluster>, data_pool: Option<&str>) -> Result<()> {
        let Some(pool) = data_pool else { return Ok(()) };
        let operation = format!("keep the data of an image in pool \"{pool}\"");
        IoCtx::open(cluster, pool)?.must_hold_data(&operation)?;
        let name = c_string(&operation, pool)?;
        // SAFETY: the options are open, the name ends in NUL and is copied.
        let r = unsafe { sys::rbd_image_options_set_string(self.raw, sys::IMAGE_OPTION_DATA_POOL, name.as_ptr()) };
        check(operation, r).map(drop)
    }

    fn set(&self, name: c_int, value: u64) -> Result<()> {
        // SAFETY: the options are open.
        check("set an option of a new image", unsafe { sys::rbd_image_options_set_uint64(self.raw, name, value) })
            .map(drop)
    }
}

impl Drop for Options {
    fn drop(&mut self) {
        // SAFETY: created by us, not used again.
        unsafe { sys::rbd_image_options_destroy(self.raw) };
    }
}

pub(super) fn create(io: &IoCtx, spec: &ImageSpec, size: u64, options: &Options) -> Result<()> {
    let operation = format!("create {spec}");
    let name = name_of(&operation, spec)?;
    // SAFETY: ioctx and options are open, the name ends in NUL.
    check(operation, unsafe { sys::rbd_create4(io.raw(), name.as_ptr(), size, options.raw) }).map(drop)
}

/// Creates an image of format 2 with [`Features::PUBLISHED`] and the cluster's default object size.
pub(super) fn create_default(io: &IoCtx, spec: &ImageSpec, size: u64, data_pool: Option<&str>) -> Result<()> {
    let mut raw = ptr::null_mut();
    // SAFETY: writes the new options to `raw`.
    unsafe { sys::rbd_image_options_create(&mut raw) };
    let options = Options { raw };
    options.set(sys::IMAGE_OPTION_FORMAT, 2)?;
    options.set(sys::IMAGE_OPTION_FEATURES, Features::PUBLISHED.0)?;
    options.set_data_pool(io.cluster(), data_pool)?;
    create(io, spec, size, &options)
}

/// Clones `source@snapshot`; `parent` is the source's name.
pub(super) fn clone(
    parent_io: &IoCtx,
    parent: &str,
    snapshot: &str,
    io: &IoCtx,
    destination: &ImageSpec,
    options: &Options,
    operation: &str,
) -> Result<()> {
    let (parent, snapshot) = (c_string(operation, parent)?, c_string(operation, snapshot)?);
    let name = name_of(operation, destination)?;
    // SAFETY: both ioctxs and the options are open, the strings end in NUL.
    let r = unsafe {
        sys::rbd_clone3(parent_io.raw(), parent.as_ptr(), snapshot.as_ptr(), io.raw(), name.as_ptr(), options.raw)
    };
    check(operation, r).map(drop)
}

pub(super) fn rename(io: &IoCtx, from: &str, to: &str, operation: &str) -> Result<()> {
    let (from, to) = (c_string(operation, from)?, c_string(operation, to)?);
    // SAFETY: the ioctx is open, the strings end in NUL.
    check(operation, unsafe { sys::rbd_rename(io.raw(), from.as_ptr(), to.as_ptr()) }).map(drop)
}

/// Removes an image without snapshots.
pub(super) fn remove(io: &IoCtx, name: &str, operation: &str) -> Result<()> {
    let name = c_string(operation, name)?;
    // SAFETY: the ioctx is open, the name ends in NUL.
    check(operation, unsafe { sys::rbd_remove(io.raw(), name.as_ptr()) }).map(drop)
}

/// Removes an image without snapshots from the trash; with `force` whatever its deferment.
pub(super) fn remove_from_trash(io: &IoCtx, id: &str, force: bool, operation: &str) -> Result<()> {
    let id = c_string(operation, id)?;
    // SAFETY: the ioctx is open, the id ends in NUL.
    check(operation, unsafe { sys::rbd_trash_remove(io.raw(), id.as_ptr(), force) }).map(drop)
}

/// The internal id that a name leads to, by the object `rbd_id.<name>`. It is what librbd opens an image by.
pub(super) fn id_of_name(io: &IoCtx, name: &str, operation: &str) -> Result<Option<String>> {
    let object = c_string(operation, &format!("rbd_id.{name}"))?;
    let mut buffer = [0u8; 512];
    // SAFETY: writes at most the buffer's length.
    let r = unsafe { rados_read(io.raw(), object.as_ptr(), buffer.as_mut_ptr().cast(), buffer.len(), 0) };
    if r == -libc::ENOENT {
        return Ok(None);
    }
    let read = check(operation, r)? as usize;
    decode_text(&buffer[..read.min(buffer.len())])
        .map(Some)
        .ok_or_else(|| Error::new(operation, ErrorKind::Other, format!("rbd_id.{name} holds no id")))
}

/// The name that the pool's directory lists an internal id under.
pub(super) fn name_in_directory(io: &IoCtx, id: &str, operation: &str) -> Result<Option<String>> {
    let key = c_string(operation, &format!("id_{id}"))?;
    let (entries, _) = omap_page(io, DIRECTORY, c"", &key, 1, operation)?;
    Ok(entries.into_iter().find(|(found, _)| *found == key).and_then(|(_, value)| decode_text(&value)))
}

/// Whether the pool has an object of this name.
pub(super) fn exists(io: &IoCtx, object: &CStr, operation: &str) -> Result<bool> {
    let (mut length, mut time) = (0, 0);
    // SAFETY: the ioctx is open, the name ends in NUL; both results have a place.
    match unsafe { rados_stat(io.raw(), object.as_ptr(), &mut length, &mut time) } {
        r if r == -libc::ENOENT => Ok(false),
        r => check(operation, r).map(|_| true),
    }
}

/// Removes the object `rbd_id.<name>`. The rest of the image stays.
pub(super) fn remove_name(io: &IoCtx, name: &str, operation: &str) -> Result<()> {
    let object = c_string(operation, &format!("rbd_id.{name}"))?;
    // SAFETY: the ioctx is open, the name ends in NUL.
    let r = unsafe { rados_remove(io.raw(), object.as_ptr()) };
    if r == -libc::ENOENT {
        return Ok(());
    }
    check(operation, r).map(drop)
}

/// Ceph's encoding of a string: its length in four bytes, then its bytes.
fn decode_text(data: &[u8]) -> Option<String> {
    let (length, rest) = data.split_first_chunk::<4>()?;
    let text = rest.get(..u32::from_le_bytes(*length) as usize)?;
    String::from_utf8(text.to_vec()).ok()
}

/// An image of a pool, as its directory tells.
pub(super) struct Listed {
    /// Empty for format 1.
    pub id: String,
    pub name: String,
}

pub(super) fn list(io: &IoCtx, operation: &str) -> Result<Vec<Listed>> {
    let mut max = 1024usize;
    loop {
        let mut specs = Vec::with_capacity(max);
        specs.resize_with(max, || sys::ImageSpec { id: ptr::null_mut(), name: ptr::null_mut() });
        // SAFETY: the array is given with its length; on ERANGE nothing is filled but the needed length.
        let r = unsafe { sys::rbd_list2(io.raw(), specs.as_mut_ptr(), &mut max) };
        if r == -libc::ERANGE {
            max += 64;
            continue;
        }
        check(operation, r)?;
        let count = max.min(specs.len());
        let listed = specs[..count]
            .iter()
            // SAFETY: filled by librbd: null or ending in NUL.
            .map(|spec| unsafe { Listed { id: text(spec.id), name: text(spec.name) } })
            .collect();
        // SAFETY: filled by librbd, not used again.
        unsafe { sys::rbd_image_spec_list_cleanup(specs.as_mut_ptr(), count) };
        return Ok(listed);
    }
}

/// Keys of an object's omap that start with this and with `prefix`, without `start`: at most `most`, after the one that
/// is `start` and `after`. Nothing when there is no object.
fn keyed_page<T>(
    (io, object): (&IoCtx, &CStr),
    (start, prefix): (&str, &str),
    after: Option<&str>,
    most: usize,
    read: impl Fn(&str, &[u8]) -> Option<T>,
    operation: &str,
) -> Result<Page<T>> {
    let prefix = c_string(operation, &format!("{start}{prefix}"))?;
    let mut last = c_string(operation, &after.map(|after| format!("{start}{after}")).unwrap_or_default())?;
    let mut page = Page { entries: Vec::new(), next: None };
    let mut left = most.max(1);
    loop {
        let (found, more) = omap_page(io, object, &last, &prefix, left.min(DIRECTORY_PAGE), operation)?;
        left = left.saturating_sub(found.len());
        for (key, value) in &found {
            let key = key.to_string_lossy();
            page.entries.extend(key.strip_prefix(start).and_then(|key| read(key, value)));
        }
        let Some((key, _)) = found.into_iter().next_back().filter(|_| more) else { return Ok(page) };
        if left == 0 {
            page.next = key.to_string_lossy().strip_prefix(start).map(str::to_owned);
            return Ok(page);
        }
        last = key;
    }
}

/// Images of format 2 whose names start with `prefix`, in the order of their names.
pub(super) fn names(
    io: &IoCtx,
    prefix: &str,
    after: Option<&str>,
    most: usize,
    operation: &str,
) -> Result<Page<String>> {
    keyed_page((io, DIRECTORY), ("name_", prefix), after, most, |name, _| Some(name.to_owned()), operation)
}

/// Images of format 2, in the order of their internal ids.
pub(super) fn list_page(io: &IoCtx, after: Option<&str>, most: usize, operation: &str) -> Result<Page<Listed>> {
    let listed = |id: &str, value: &[u8]| Some(Listed { id: id.to_owned(), name: decode_text(value)? });
    keyed_page((io, DIRECTORY), ("id_", ""), after, most, listed, operation)
}

/// Images in the trash, in the order of their internal ids.
pub(super) fn trash_page(io: &IoCtx, after: Option<&str>, most: usize, operation: &str) -> Result<Page<Trashed>> {
    keyed_page((io, TRASH), ("id_", ""), after, most, decode_trashed, operation)
}

/// The image of this internal id, if it lies in the trash.
pub(super) fn trashed(io: &IoCtx, id: &str, operation: &str) -> Result<Option<Trashed>> {
    let page = keyed_page((io, TRASH), ("id_", id), None, 1, decode_trashed, operation)?;
    Ok(page.entries.into_iter().find(|trashed| trashed.id == id))
}

/// An image from its id and its `cls::rbd::TrashImageSpec` of Ceph's src/cls/rbd/cls_rbd_types.h: version, oldest
/// version that can read it, and length; the source in one byte; the name.
fn decode_trashed(id: &str, data: &[u8]) -> Option<Trashed> {
    Some(Trashed { id: id.to_owned(), name: decode_text(data.get(2 + 4 + 1..)?)? })
}

/// An image in the trash.
pub(super) struct TrashEntry {
    pub id: String,
    pub name: String,
    /// It lies there because librbd is removing it.
    pub removing: bool,
    /// A user, or a service, moved it there.
    pub by_user: bool,
    /// Unix time in seconds before which librbd removes it only by force.
    pub deferred_until: i64,
}

pub(super) fn trash(io: &IoCtx, operation: &str) -> Result<Vec<TrashEntry>> {
    let mut max = 256usize;
    loop {
        let mut infos = Vec::with_capacity(max);
        infos.resize_with(max, || sys::TrashInfo {
            id: ptr::null_mut(),
            name: ptr::null_mut(),
            source: 0,
            deletion_time: 0,
            deferment_end_time: 0,
        });
        // SAFETY: the array is given with its length; on ERANGE nothing is filled but the needed length.
        let r = unsafe { sys::rbd_trash_list(io.raw(), infos.as_mut_ptr(), &mut max) };
        if r == -libc::ERANGE {
            max += 64;
            continue;
        }
        check(operation, r)?;
        let count = max.min(infos.len());
        let trashed = infos[..count]
            .iter()
            // SAFETY: filled by librbd: null or ending in NUL.
            .map(|info| unsafe {
                TrashEntry {
                    id: text(info.id),
                    name: text(info.name),
                    removing: info.source == sys::TRASH_SOURCE_REMOVING,
                    by_user: info.source == sys::TRASH_SOURCE_USER,
                    deferred_until: info.deferment_end_time,
                }
            })
            .collect();
        // SAFETY: filled by librbd, not used again.
        unsafe { sys::rbd_trash_list_cleanup(infos.as_mut_ptr(), count) };
        return Ok(trashed);
    }
}

pub(super) fn find_in_trash(io: &IoCtx, spec: &ImageSpec) -> Result<Option<TrashEntry>> {
    let ImageKey::Id(id) = &spec.image else { return Ok(None) };
    let trash = self::trash(io, &format!("look for {spec} in the trash"))?;
    Ok(trash.into_iter().find(|trashed| trashed.id == *id))
}

fn name_of(operation: &str, spec: &ImageSpec) -> Result<CString> {
    match &spec.image {
        ImageKey::Name(name) => c_string(operation, name),
        ImageKey::Id(_) => Err(Error::new(operation, ErrorKind::Unsupported, "a new image needs a name")),
    }
}

/// A piece of an image in memory. Its writes share it.
pub(super) struct Chunk {
    pub offset: u64,
    pub data: Vec<u8>,
}

/// What became of an asynchronous read or write.
pub(super) enum Completed {
    Read(Chunk),
    /// Bytes; the chunk is handed back with its last write.
    Written(usize, Option<Chunk>),
}

enum Request {
    Read(Chunk),
    Write(Arc<Chunk>, Range<usize>),
}

/// A request in flight: librbd's completion holds it, and sends it back.
struct InFlight {
    request: Request,
    result: isize,
    done: Sender<Box<InFlight>>,
}

/// Asynchronous reads of one image and writes to another. Dropping it waits for all that are in flight, so buffers and
/// images outlive them.
pub(super) struct Queue<'a> {
    source: &'a Image,
    destination: &'a Image,
    done: Sender<Box<InFlight>>,
    completed: Receiver<Box<InFlight>>,
    in_flight: usize,
}

impl<'a> Queue<'a> {
    pub fn new(source: &'a Image, destination: &'a Image) -> Self {
        let (done, completed) = mpsc::channel();
        Self { source, destination, done, completed, in_flight: 0 }
    }

    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Fills the chunk's data from the source.
    pub fn read(&mut self, chunk: Chunk) -> Result<()> {
        self.submit(Request::Read(chunk))
    }

    /// Writes a part of the chunk to the destination, at the same place.
    pub fn write(&mut self, chunk: &Arc<Chunk>, part: Range<usize>) -> Result<()> {
        self.submit(Request::Write(chunk.clone(), part))
    }

    fn submit(&mut self, request: Request) -> Result<()> {
        extern "C" fn finish(completion: sys::rbd_completion_t, argument: *mut c_void) {
            // SAFETY: the argument is the box that `submit` gave away, and librbd calls once.
            let mut flight = unsafe { Box::from_raw(argument.cast::<InFlight>()) };
            // SAFETY: the completion is finished; it is released once, here.
            unsafe {
                flight.result = sys::rbd_aio_get_return_value(completion);
                sys::rbd_aio_release(completion);
            }
            let done = flight.done.clone();
            // The queue waits for all requests, so there is a receiver.
            let _ = done.send(flight);
        }
        let flight = Box::into_raw(Box::new(InFlight { request, result: 0, done: self.done.clone() }));
        let mut completion = ptr::null_mut();
        // SAFETY: `finish` fits the argument, which lives until it is called.
        let mut r = unsafe { sys::rbd_aio_create_completion(flight.cast(), finish, &mut completion) };
        let mut verb = "start a request to";
        let mut spec = &self.source.spec;
        if r >= 0 {
            // SAFETY: this function alone has the box until the request is submitted; the buffers lie in the box or in
            // an Arc that it holds, and stay where they are until the completion; both images outlive the queue.
            r = unsafe {
                match &mut (*flight).request {
                    Request::Read(chunk) => {
                        verb = "read";
                        let buffer = chunk.data.as_mut_ptr().cast();
                        sys::rbd_aio_read(self.source.raw, chunk.offset, chunk.data.len(), buffer, completion)
                    }
                    Request::Write(chunk, part) => {
                        verb = "write";
                        spec = &self.destination.spec;
                        let data = &chunk.data[part.clone()];
                        let offset = chunk.offset + part.start as u64;
                        sys::rbd_aio_write(self.destination.raw, offset, data.len(), data.as_ptr().cast(), completion)
                    }
                }
            };
            if r < 0 {
                // SAFETY: a refused request is never completed: its completion and box are ours again.
                unsafe { sys::rbd_aio_release(completion) };
            }
        }
        if r < 0 {
            // SAFETY: as above.
            drop(unsafe { Box::from_raw(flight) });
            return Err(Error::from_errno(format!("{verb} {spec}"), r));
        }
        self.in_flight += 1;
        Ok(())
    }

    /// The next completion, or `None` when none comes within `wait`. Call it only while something is in flight.
    pub fn next(&mut self, wait: Duration) -> Result<Option<Completed>> {
        let flight = match self.completed.recv_timeout(wait) {
            Ok(flight) => flight,
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => return Ok(None),
        };
        self.in_flight -= 1;
        let result = c_int::try_from(flight.result).unwrap_or(c_int::MAX);
        match flight.request {
            Request::Read(chunk) => {
                check(format!("read {} at {}", self.source.spec, chunk.offset), result)?;
                if flight.result as usize != chunk.data.len() {
                    let detail = format!("{} bytes instead of {}", flight.result, chunk.data.len());
                    let operation = format!("read {} at {}", self.source.spec, chunk.offset);
                    return Err(Error::new(operation, ErrorKind::Other, detail));
                }
                Ok(Some(Completed::Read(chunk)))
            }
            Request::Write(chunk, part) => {
                check(format!("write {} at {}", self.destination.spec, chunk.offset + part.start as u64), result)?;
                Ok(Some(Completed::Written(part.len(), Arc::into_inner(chunk))))
            }
        }
    }
}

impl Drop for Queue<'_> {
    fn drop(&mut self) {
        while self.in_flight > 0 && self.completed.recv().is_ok() {
            self.in_flight -= 1;
        }
    }
}
