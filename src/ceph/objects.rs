//! Small objects with guarded writes: [`Objects`] over librados and the `lock` object class.
//!
//! Every operation opens an ioctx of its own, since librados keeps the version of the last operation per ioctx. Taking
//! and renewing a lock writes to the object and so raises its version too: a holder that renewed between its read and
//! its [`replace`](Objects::replace) gets a conflict, and reads again.
#![allow(unsafe_code)]

use std::ffi::{CStr, CString, c_char, c_int};
use std::ptr;
use std::time::Duration;

use async_trait::async_trait;
use ceph::rados::{
    rados_create_read_op, rados_create_write_op, rados_get_last_version, rados_getxattr, rados_getxattrs_end,
    rados_getxattrs_next, rados_list_ctx_t, rados_list_lockers, rados_nobjects_list_close, rados_nobjects_list_open,
    rados_omap_get_end, rados_omap_get_next, rados_omap_iter_t, rados_read, rados_read_op_getxattrs,
    rados_read_op_operate, rados_read_op_read, rados_release_read_op, rados_release_write_op, rados_unlock,
    rados_write_op_assert_exists, rados_write_op_assert_version, rados_write_op_create, rados_write_op_exec,
    rados_write_op_omap_rm_keys, rados_write_op_omap_set, rados_write_op_operate, rados_write_op_remove,
    rados_write_op_rmxattr, rados_write_op_setxattr, rados_write_op_t, rados_write_op_write_full, rados_xattrs_iter_t,
};

use super::cluster::{Client, Cluster, IoCtx, c_string, check};
use super::{Changed, Error, ErrorKind, KeyedObject, LockKey, Locked, Objects, Result, Version, sys};
use std::sync::Arc;

/// The largest object that is read, in bytes. Nothing larger may be written.
pub const MAX_OBJECT: usize = 1 << 20;

/// Keys that are read with an object: a job has a handful of signals.
pub const MAX_KEYS: usize = 64;

/// The longest attribute that is read: an ownership tag has 110 bytes.
const MAX_XATTR: usize = 4096;

/// Keys that are asked for in one operation; an OSD returns at most `osd_max_omap_entries_per_request` (1,024).
const OMAP_PAGE: usize = 1024;

/// `ClsLockType::EXCLUSIVE`
const LOCK_EXCLUSIVE: u8 = 1;
/// Takes a free lock, or renews one's own.
const LOCK_MAY_RENEW: u8 = 1;
/// Renews one's own lock only.
const LOCK_MUST_RENEW: u8 = 2;

/// The objects of one namespace of a pool.
#[derive(Clone)]
pub struct Namespace {
    client: Client,
    pool: String,
    namespace: String,
}

impl Client {
    /// The objects of a namespace. That the pool exists shows at the first operation.
    pub fn objects(&self, pool: &str, namespace: &str) -> Result<Namespace> {
        let operation = format!("open {pool}/{namespace}");
        c_string(&operation, pool)?;
        c_string(&operation, namespace)?;
        Ok(Namespace { client: self.clone(), pool: pool.to_owned(), namespace: namespace.to_owned() })
    }
}

/// One object on an ioctx of its own.
pub(super) struct Object {
    io: IoCtx,
    name: CString,
    /// `replace images/rbd-offload/job.1`
    operation: String,
}

impl Object {
    /// An object outside of all namespaces. That it is there shows at the first operation.
    pub(super) fn open(cluster: &Arc<Cluster>, pool: &str, name: &str, operation: String) -> Result<Self> {
        let io = IoCtx::open(cluster, pool)?;
        let name = c_string(&operation, name)?;
        Ok(Self { io, name, operation })
    }

    /// [`ErrorKind::NotFound`] when there is no such object: it is never created.
    pub(super) fn set_xattr(&self, name: &str, value: &[u8]) -> Result<()> {
        let name = c_string(&self.operation, name)?;
        let op = WriteOp::new();
        op.assert_exists();
        // SAFETY: the op is open, the name ends in NUL, the value is given with its length; both are copied.
        unsafe { rados_write_op_setxattr(op.raw, name.as_ptr(), value.as_ptr().cast(), value.len()) };
        self.write(&op)
    }

    /// `None` when the object has no such attribute; [`ErrorKind::NotFound`] when there is no such object.
    pub(super) fn xattr(&self, name: &str) -> Result<Option<Vec<u8>>> {
        let name = c_string(&self.operation, name)?;
        let mut value = vec![0u8; MAX_XATTR];
        // SAFETY: the ioctx is open, both names end in NUL, the buffer is given with its size.
        let r = unsafe {
            rados_getxattr(self.io.raw(), self.name.as_ptr(), name.as_ptr(), value.as_mut_ptr().cast(), value.len())
        };
        if r == -libc::ENODATA {
            return Ok(None);
        }
        let length = usize::try_from(check(&self.operation, r)?).unwrap_or_default();
        value.truncate(length);
        Ok(Some(value))
    }

    /// [`ErrorKind::NotFound`] when there is no such object.
    pub(super) fn remove_xattr(&self, name: &str) -> Result<Changed> {
        if self.xattr(name)?.is_none() {
            return Ok(Changed::No);
        }
        let name = c_string(&self.operation, name)?;
        let op = WriteOp::new();
        op.assert_exists();
        // SAFETY: the op is open; the name ends in NUL and is copied.
        unsafe { rados_write_op_rmxattr(op.raw, name.as_ptr()) };
        self.write(&op).map(|()| Changed::Yes)
    }

    fn last_version(&self) -> Version {
        // SAFETY: the ioctx is open.
        Version(unsafe { rados_get_last_version(self.io.raw()) })
    }

    fn write(&self, op: &WriteOp) -> Result<()> {
        // SAFETY: op and ioctx are open, the name ends in NUL, no modification time is given.
        let r = unsafe { rados_write_op_operate(op.raw, self.io.raw(), self.name.as_ptr(), ptr::null_mut(), 0) };
        check(&self.operation, r).map(drop)
    }
}

impl Namespace {
    async fn with_object<T, F>(&self, verb: &str, object: &str, work: F) -> Result<T>
    where
        T: Send + 'static,
        F: FnOnce(&Object) -> Result<T> + Send + 'static,
    {
        let operation = format!("{verb} {}/{}/{object}", self.pool, self.namespace);
        let name = c_string(&operation, object)?;
        let (pool, namespace) = (self.pool.clone(), self.namespace.clone());
        self.client
            .run(operation.clone(), move |cluster| {
                let io = IoCtx::open(cluster, &pool)?.with_namespace(&namespace)?;
                work(&Object { io, name, operation })
            })
            .await
    }
}

#[async_trait]
impl Objects for Namespace {
    async fn read(&self, object: &str) -> Result<Option<(Vec<u8>, Version)>> {
        self.with_object("read", object, |object| {
            let mut data = vec![0u8; MAX_OBJECT + 1];
            // SAFETY: writes at most `data.len()` bytes into the buffer.
            let r =
                unsafe { rados_read(object.io.raw(), object.name.as_ptr(), data.as_mut_ptr().cast(), data.len(), 0) };
            if r == -libc::ENOENT {
                return Ok(None);
            }
            let length = check(&object.operation, r)? as usize;
            if length > MAX_OBJECT {
                return Err(Error::new(&object.operation, ErrorKind::TooLarge, "it is larger than 1 MiB"));
            }
            data.truncate(length);
            data.shrink_to_fit();
            Ok(Some((data, object.last_version())))
        })
        .await
    }

    async fn read_with_keys(&self, object: &str) -> Result<Option<KeyedObject>> {
        self.with_object("read", object, read_with_keys).await
    }

    async fn replace_and_remove_keys(
        &self,
        object: &str,
        data: &[u8],
        version: Version,
        lock: Option<&LockKey>,
        keys: &[String],
    ) -> Result<Version> {
        let (data, lock, keys) = (data.to_vec(), lock.cloned(), keys.to_vec());
        self.with_object("replace", object, move |object| {
            let op = WriteOp::new();
            op.guard(version, lock.as_ref());
            op.write_full(&data);
            op.remove_keys(&object.operation, &keys)?;
            object.write(&op).map_err(guard_error)?;
            Ok(object.last_version())
        })
        .await
    }

    async fn change_keys(
        &self,
        object: &str,
        set: &[(String, Vec<u8>)],
        removed: &[String],
        version: Version,
    ) -> Result<Version> {
        let (set, removed) = (set.to_vec(), removed.to_vec());
        self.with_object("write the omap of", object, move |object| {
            let op = WriteOp::new();
            op.guard(version, None);
            op.remove_keys(&object.operation, &removed)?;
            op.set_keys(&object.operation, &set)?;
            object.write(&op)?;
            Ok(object.last_version())
        })
        .await
    }

    async fn create(&self, object: &str, data: &[u8]) -> Result<Version> {
        let data = data.to_vec();
        self.with_object("create", object, move |object| {
            let op = WriteOp::new();
            op.create_exclusive();
            op.write_full(&data);
            object.write(&op)?;
            Ok(object.last_version())
        })
        .await
    }

    async fn replace(&self, object: &str, data: &[u8], version: Version, lock: Option<&LockKey>) -> Result<Version> {
        let (data, lock) = (data.to_vec(), lock.cloned());
        self.with_object("replace", object, move |object| {
            let op = WriteOp::new();
            op.guard(version, lock.as_ref());
            op.write_full(&data);
            object.write(&op).map_err(guard_error)?;
            Ok(object.last_version())
        })
        .await
    }

    async fn remove(&self, object: &str, version: Version, lock: Option<&LockKey>) -> Result<()> {
        let lock = lock.cloned();
        self.with_object("remove", object, move |object| {
            let op = WriteOp::new();
            op.guard(version, lock.as_ref());
            op.remove();
            object.write(&op).map_err(guard_error)
        })
        .await
    }

    async fn lock(&self, object: &str, lock: &LockKey, description: &str, duration: Duration) -> Result<Locked> {
        let input = encode_lock(lock, description, duration, LOCK_MAY_RENEW);
        self.with_object("lock", object, move |object| {
            let op = WriteOp::new();
            op.assert_exists();
            op.exec(c"lock", c"lock", &input);
            match object.write(&op) {
                Ok(()) => Ok(Locked::Acquired),
                Err(e) if e.kind() == ErrorKind::Busy => Ok(Locked::Held),
                Err(e) if e.kind() == ErrorKind::NotFound => Ok(Locked::NoObject),
                Err(e) => Err(e),
            }
        })
        .await
    }

    async fn renew(&self, object: &str, lock: &LockKey, description: &str, duration: Duration) -> Result<()> {
        let input = encode_lock(lock, description, duration, LOCK_MUST_RENEW);
        self.with_object("renew the lock of", object, move |object| {
            let op = WriteOp::new();
            op.assert_exists();
            op.exec(c"lock", c"lock", &input);
            // ENOENT: not the holder any more, or the object is gone. EBUSY: another client's lock.
            object.write(&op).map_err(|e| match e.kind() {
                ErrorKind::NotFound | ErrorKind::Busy => not_locked(&object.operation),
                _ => e,
            })
        })
        .await
    }

    async fn unlock(&self, object: &str, lock: &LockKey) -> Result<Changed> {
        let lock = lock.clone();
        self.with_object("unlock", object, move |object| {
            let name = c_string(&object.operation, &lock.name)?;
            let cookie = c_string(&object.operation, &lock.cookie)?;
            // SAFETY: the ioctx is open, the strings end in NUL.
            let r = unsafe { rados_unlock(object.io.raw(), object.name.as_ptr(), name.as_ptr(), cookie.as_ptr()) };
            if r == -libc::ENOENT {
                return Ok(Changed::No);
            }
            check(&object.operation, r)?;
            Ok(Changed::Yes)
        })
        .await
    }

    async fn is_locked(&self, object: &str, lock_name: &str) -> Result<bool> {
        let lock_name = lock_name.to_owned();
        self.with_object("look at the lock of", object, move |object| {
            let name = c_string(&object.operation, &lock_name)?;
            let mut exclusive: c_int = 0;
            let mut buffers = [[0u8; 1024]; 4];
            let mut sizes = [1024usize; 4];
            let [tag, clients, cookies, addresses] = &mut buffers;
            let [tag_size, clients_size, cookies_size, addresses_size] = &mut sizes;
            // The OSD leaves out lockers whose time has run out.
            // SAFETY: each buffer is given with its size.
            let r = unsafe {
                rados_list_lockers(
                    object.io.raw(),
                    object.name.as_ptr(),
                    name.as_ptr(),
                    &mut exclusive,
                    tag.as_mut_ptr().cast(),
                    tag_size,
                    clients.as_mut_ptr().cast(),
                    clients_size,
                    cookies.as_mut_ptr().cast(),
                    cookies_size,
                    addresses.as_mut_ptr().cast(),
                    addresses_size,
                )
            };
            match r as c_int {
                lockers if lockers >= 0 => Ok(lockers > 0),
                r if r == -libc::ENOENT => Ok(false),
                // There is more to tell of the holder than fits: it is held.
                r if r == -libc::ERANGE => Ok(true),
                r => Err(Error::from_errno(&object.operation, r)),
            }
        })
        .await
    }

    async fn omap(&self, object: &str, after: &str, max: usize) -> Result<Vec<(String, Vec<u8>)>> {
        let after = after.to_owned();
        self.with_object("read the omap of", object, move |object| {
            let mut after = c_string(&object.operation, &after)?;
            let mut entries = Vec::new();
            while entries.len() < max {
                let page = (max - entries.len()).min(OMAP_PAGE);
                let (found, more) = omap_page(&object.io, &object.name, &after, c"", page, &object.operation)?;
                let Some((last, _)) = found.last() else { break };
                after = last.clone();
                entries.extend(found.into_iter().map(|(key, value)| (key.to_string_lossy().into_owned(), value)));
                if !more {
                    break;
                }
            }
            Ok(entries)
        })
        .await
    }

    async fn set_omap(&self, object: &str, entries: &[(String, Vec<u8>)]) -> Result<()> {
        let entries = entries.to_vec();
        self.with_object("write the omap of", object, move |object| {
            let op = WriteOp::new();
            op.set_keys(&object.operation, &entries)?;
            object.write(&op)
        })
        .await
    }

    async fn remove_omap(&self, object: &str, keys: &[String]) -> Result<()> {
        let keys = keys.to_vec();
        self.with_object("remove from the omap of", object, move |object| {
            let op = WriteOp::new();
            op.assert_exists();
            op.remove_keys(&object.operation, &keys)?;
            match object.write(&op) {
                Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
                result => result,
            }
        })
        .await
    }

    async fn list(&self) -> Result<Vec<String>> {
        let operation = format!("list the objects of {}/{}", self.pool, self.namespace);
        let (pool, namespace) = (self.pool.clone(), self.namespace.clone());
        self.client
            .run(operation.clone(), move |cluster: &Arc<Cluster>| {
                let io = IoCtx::open(cluster, &pool)?.with_namespace(&namespace)?;
                list(&io, &operation)
            })
            .await
    }
}

/// An operation on one object, all of whose steps happen or none. Released when dropped.
struct WriteOp {
    raw: rados_write_op_t,
}

impl WriteOp {
    fn new() -> Self {
        // SAFETY: takes nothing; released by Drop.
        Self { raw: unsafe { rados_create_write_op() } }
    }

    /// The object exists, has this version, and the lock is held by us.
    fn guard(&self, version: Version, lock: Option<&LockKey>) {
        self.assert_exists();
        // SAFETY: the op is open.
        unsafe { rados_write_op_assert_version(self.raw, version.0) };
        if let Some(lock) = lock {
            self.exec(c"lock", c"assert_locked", &encode_assert_locked(lock));
        }
    }

    fn assert_exists(&self) {
        // SAFETY: the op is open.
        unsafe { rados_write_op_assert_exists(self.raw) };
    }

    fn create_exclusive(&self) {
        // SAFETY: the op is open; 1 is LIBRADOS_CREATE_EXCLUSIVE, the category is not used any more.
        unsafe { rados_write_op_create(self.raw, 1, ptr::null()) };
    }

    fn write_full(&self, data: &[u8]) {
        // SAFETY: the data are copied into the op.
        unsafe { rados_write_op_write_full(self.raw, data.as_ptr().cast(), data.len()) };
    }

    fn remove(&self) {
        // SAFETY: the op is open.
        unsafe { rados_write_op_remove(self.raw) };
    }

    fn set_keys(&self, operation: &str, entries: &[(String, Vec<u8>)]) -> Result<()> {
        let keys = c_strings(operation, entries.iter().map(|(key, _)| key))?;
        let keys: Vec<*const c_char> = keys.iter().map(|key| key.as_ptr()).collect();
        let values: Vec<*const c_char> = entries.iter().map(|(_, value)| value.as_ptr().cast()).collect();
        let sizes: Vec<usize> = entries.iter().map(|(_, value)| value.len()).collect();
        // SAFETY: three arrays of equal length, whose contents are copied into the op.
        unsafe { rados_write_op_omap_set(self.raw, keys.as_ptr(), values.as_ptr(), sizes.as_ptr(), sizes.len()) };
        Ok(())
    }

    fn remove_keys(&self, operation: &str, keys: &[String]) -> Result<()> {
        let keys = c_strings(operation, keys.iter())?;
        let keys: Vec<*const c_char> = keys.iter().map(|key| key.as_ptr()).collect();
        // SAFETY: an array with its length, whose contents are copied into the op.
        unsafe { rados_write_op_omap_rm_keys(self.raw, keys.as_ptr(), keys.len()) };
        Ok(())
    }

    /// Calls a method of an object class on the OSD.
    fn exec(&self, class: &CStr, method: &CStr, input: &[u8]) {
        // SAFETY: names and input are copied into the op; no place for the method's result is given.
        unsafe {
            rados_write_op_exec(
                self.raw,
                class.as_ptr(),
                method.as_ptr(),
                input.as_ptr().cast(),
                input.len(),
                ptr::null_mut(),
            );
        }
    }
}

impl Drop for WriteOp {
    fn drop(&mut self) {
        // SAFETY: ours, and not used again.
        unsafe { rados_release_write_op(self.raw) };
    }
}

/// Creates an object without bytes. `No` when there is one of that name.
pub(super) fn create_empty(io: &IoCtx, object: &CStr, operation: &str) -> Result<Changed> {
    let op = WriteOp::new();
    op.create_exclusive();
    // SAFETY: op and ioctx are open, the name ends in NUL, no modification time is given.
    let r = unsafe { rados_write_op_operate(op.raw, io.raw(), object.as_ptr(), ptr::null_mut(), 0) };
    match r {
        r if r == -libc::EEXIST => Ok(Changed::No),
        r => check(operation, r).map(|_| Changed::Yes),
    }
}

/// More objects than an OSD keeps in its cache of a placement group (osd_pg_object_context_cache_count, 64).
const MORE_THAN_CACHED: usize = 256;

/// Makes the OSD read the header and the watches of the image with this id again: it is asked for so many objects of
/// the same placement group that it drops the header from its cache. They do not exist, and are not made.
///
/// A client that is killed while its request for a watch is on the way leaves that watch in the header. The OSD ends a
/// watch with the client's connection, and that had ended before. When the OSD reads the header again, it drops the
/// watches of fenced clients, and those of others 30 s later (seen with Ceph 16: in a quiet pool the image of a killed
/// writer could not be removed). While a client that lives watches the header, the OSD does not drop it.
pub(super) fn read_watches_again(cluster: &Arc<Cluster>, pool: &str, image_id: &str, operation: &str) -> Result<()> {
    let header = c_string(operation, &format!("rbd_header.{image_id}"))?;
    let io = IoCtx::open(cluster, pool)?.beside(&header);
    for number in 0..MORE_THAN_CACHED {
        let name = c_string(operation, &format!("rbd-offload.none.{number}"))?;
        let op = WriteOp::new();
        op.assert_exists();
        op.write_full(b"");
        // SAFETY: op and ioctx are open, the name ends in NUL, no modification time is given.
        let r = unsafe { rados_write_op_operate(op.raw, io.raw(), name.as_ptr(), ptr::null_mut(), 0) };
        if r != -libc::ENOENT {
            check(operation, r)?;
        }
    }
    Ok(())
}

/// A failed guard's errno: EBUSY comes from `assert_locked` alone.
fn guard_error(error: Error) -> Error {
    match error.kind() {
        ErrorKind::Busy => error.with_kind(ErrorKind::NotLocked),
        _ => error,
    }
}

fn not_locked(operation: &str) -> Error {
    Error::new(operation, ErrorKind::NotLocked, "the lock is not held any more")
}

fn c_strings<'a>(operation: &str, texts: impl Iterator<Item = &'a String>) -> Result<Vec<CString>> {
    texts.map(|text| c_string(operation, text)).collect()
}

/// The object and its keys by one operation, so that both are of one version.
fn read_with_keys(object: &Object) -> Result<Option<KeyedObject>> {
    let mut data = vec![0u8; MAX_OBJECT + 1];
    let mut iter: rados_omap_iter_t = ptr::null_mut();
    let (mut length, mut more): (usize, u8) = (0, 0);
    let (mut data_result, mut keys_result): (c_int, c_int) = (0, 0);
    // SAFETY: takes nothing; released below.
    let op = unsafe { rados_create_read_op() };
    // SAFETY: the op is open; the buffer is given with its size, and it and the places for the results outlive the op.
    let r = unsafe {
        rados_read_op_read(op, 0, data.len(), data.as_mut_ptr().cast(), &mut length, &mut data_result);
        sys::rados_read_op_omap_get_vals2(
            op,
            c"".as_ptr(),
            c"".as_ptr(),
            MAX_KEYS as u64,
            &mut iter,
            &mut more,
            &mut keys_result,
        );
        let r = rados_read_op_operate(op, object.io.raw(), object.name.as_ptr(), 0);
        rados_release_read_op(op);
        r
    };
    let keys = entries_of(iter, r >= 0 && keys_result >= 0);
    if r == -libc::ENOENT {
        return Ok(None);
    }
    check(&object.operation, if r < 0 { r } else { data_result.min(keys_result).min(0) })?;
    if length > MAX_OBJECT {
        return Err(Error::new(&object.operation, ErrorKind::TooLarge, "it is larger than 1 MiB"));
    }
    data.truncate(length);
    data.shrink_to_fit();
    let keys = keys.into_iter().map(|(key, value)| (key.to_string_lossy().into_owned(), value)).collect();
    Ok(Some(KeyedObject { data, keys, version: object.last_version() }))
}

/// Keys of an omap and their values.
pub(super) type OmapEntries = Vec<(CString, Vec<u8>)>;

/// One page of an object's omap, and whether there is more: keys after `after` that start with `prefix`, at most `max`.
/// Nothing when there is no object.
pub(super) fn omap_page(
    io: &IoCtx,
    object: &CStr,
    after: &CStr,
    prefix: &CStr,
    max: usize,
    operation: &str,
) -> Result<(OmapEntries, bool)> {
    let mut iter: rados_omap_iter_t = ptr::null_mut();
    let (mut more, mut step): (u8, c_int) = (0, 0);
    // SAFETY: takes nothing; released below.
    let op = unsafe { rados_create_read_op() };
    // SAFETY: the op is open, and the places for its results outlive it.
    let r = unsafe {
        sys::rados_read_op_omap_get_vals2(
            op,
            after.as_ptr(),
            prefix.as_ptr(),
            max as u64,
            &mut iter,
            &mut more,
            &mut step,
        );
        let r = rados_read_op_operate(op, io.raw(), object.as_ptr(), 0);
        rados_release_read_op(op);
        r
    };
    let entries = entries_of(iter, r >= 0 && step >= 0);
    let r = if r < 0 { r } else { step.min(0) };
    if r == -libc::ENOENT {
        return Ok((Vec::new(), false));
    }
    check(operation, r)?;
    Ok((entries, more != 0))
}

/// Reads the entries, and ends the iterator.
fn entries_of(iter: rados_omap_iter_t, filled: bool) -> OmapEntries {
    let mut entries = Vec::new();
    if filled && !iter.is_null() {
        loop {
            let (mut key, mut value, mut length): (*mut c_char, *mut c_char, usize) =
                (ptr::null_mut(), ptr::null_mut(), 0);
            // SAFETY: the iterator is open; key and value stay valid until it ends.
            let r = unsafe { rados_omap_get_next(iter, &mut key, &mut value, &mut length) };
            if r < 0 || key.is_null() {
                break;
            }
            let value = if value.is_null() || length == 0 {
                Vec::new()
            } else {
                // SAFETY: the value has `length` bytes.
                unsafe { std::slice::from_raw_parts(value.cast::<u8>(), length) }.to_vec()
            };
            // SAFETY: not null, ends in NUL.
            entries.push((unsafe { CStr::from_ptr(key) }.to_owned(), value));
        }
    }
    if !iter.is_null() {
        // SAFETY: ours, and not used again.
        unsafe { rados_omap_get_end(iter) };
    }
    entries
}

/// What [`header_page`] reads.
#[derive(Default)]
pub(super) struct HeaderPage {
    /// Entries with the prefix, and whether there are more.
    pub records: OmapEntries,
    pub more: bool,
    /// The first entry whose key begins with that of the owner.
    pub owner: OmapEntries,
    /// Names of the attributes.
    pub xattrs: Vec<String>,
}

/// The first page of an object's omap entries with a prefix, the entry of the owner and the attributes' names, in one
/// operation. Nothing when there is no such object.
pub(super) fn header_page(
    io: &IoCtx,
    object: &CStr,
    prefix: &CStr,
    owner: &CStr,
    max: usize,
    operation: &str,
) -> Result<HeaderPage> {
    let (mut records, mut owned): (rados_omap_iter_t, rados_omap_iter_t) = (ptr::null_mut(), ptr::null_mut());
    let mut xattrs: rados_xattrs_iter_t = ptr::null_mut();
    let (mut more, mut more_owned) = (0u8, 0u8);
    let mut steps: [c_int; 3] = [0; 3];
    let [records_step, owned_step, xattrs_step] = &mut steps;
    // SAFETY: takes nothing; released below.
    let op = unsafe { rados_create_read_op() };
    // SAFETY: the op is open, and the places for its results outlive it.
    let r = unsafe {
        let start = c"".as_ptr();
        sys::rados_read_op_omap_get_vals2(
            op,
            start,
            prefix.as_ptr(),
            max as u64,
            &mut records,
            &mut more,
            records_step,
        );
        sys::rados_read_op_omap_get_vals2(op, start, owner.as_ptr(), 1, &mut owned, &mut more_owned, owned_step);
        rados_read_op_getxattrs(op, &mut xattrs, xattrs_step);
        let r = rados_read_op_operate(op, io.raw(), object.as_ptr(), 0);
        rados_release_read_op(op);
        r
    };
    let filled = r >= 0 && steps.iter().all(|step| *step >= 0);
    let (records, owner) = (entries_of(records, filled), entries_of(owned, filled));
    let mut names = Vec::new();
    while filled && !xattrs.is_null() {
        let (mut name, mut value, mut length): (*const c_char, *const c_char, usize) = (ptr::null(), ptr::null(), 0);
        // SAFETY: the iterator is open; the name stays valid until it ends.
        let r = unsafe { rados_getxattrs_next(xattrs, &mut name, &mut value, &mut length) };
        if r < 0 || name.is_null() {
            break;
        }
        // SAFETY: not null, ends in NUL.
        names.push(unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned());
    }
    if !xattrs.is_null() {
        // SAFETY: ours, and not used again.
        unsafe { rados_getxattrs_end(xattrs) };
    }
    let r = if r < 0 { r } else { steps.into_iter().min().unwrap_or_default().min(0) };
    if r == -libc::ENOENT {
        return Ok(HeaderPage::default());
    }
    check(operation, r)?;
    Ok(HeaderPage { records, more: more != 0, owner, xattrs: names })
}

fn list(io: &IoCtx, operation: &str) -> Result<Vec<String>> {
    let mut listing: rados_list_ctx_t = ptr::null_mut();
    // SAFETY: the ioctx is open; the listing is closed below.
    check(operation, unsafe { rados_nobjects_list_open(io.raw(), &mut listing) })?;
    let mut names = Vec::new();
    let end = loop {
        let (mut entry, mut size): (*const c_char, usize) = (ptr::null(), 0);
        // SAFETY: the listing is open; key and namespace are not asked for.
        let r = unsafe {
            sys::rados_nobjects_list_next2(
                listing,
                &mut entry,
                ptr::null_mut(),
                ptr::null_mut(),
                &mut size,
                ptr::null_mut(),
                ptr::null_mut(),
            )
        };
        if r < 0 {
            break r;
        }
        // SAFETY: the entry has `size` bytes and is valid until the next call.
        let name = unsafe { std::slice::from_raw_parts(entry.cast::<u8>(), size) };
        names.push(String::from_utf8_lossy(name).into_owned());
    };
    // SAFETY: opened above, not used again.
    unsafe { rados_nobjects_list_close(listing) };
    if end != -libc::ENOENT {
        check(operation, end)?;
    }
    Ok(names)
}

/// `cls_lock_lock_op` of Ceph's src/cls/lock/cls_lock_ops.h.
fn encode_lock(lock: &LockKey, description: &str, duration: Duration, flags: u8) -> Vec<u8> {
    let mut body = Vec::new();
    encode_text(&mut body, &lock.name);
    body.push(LOCK_EXCLUSIVE);
    encode_text(&mut body, &lock.cookie);
    encode_text(&mut body, ""); // tag
    encode_text(&mut body, description);
    body.extend(u32::try_from(duration.as_secs()).unwrap_or(u32::MAX).to_le_bytes());
    body.extend(duration.subsec_nanos().to_le_bytes());
    body.push(flags);
    versioned(&body)
}

/// `cls_lock_assert_op`.
fn encode_assert_locked(lock: &LockKey) -> Vec<u8> {
    let mut body = Vec::new();
    encode_text(&mut body, &lock.name);
    body.push(LOCK_EXCLUSIVE);
    encode_text(&mut body, &lock.cookie);
    encode_text(&mut body, ""); // tag
    versioned(&body)
}

fn encode_text(body: &mut Vec<u8>, text: &str) {
    body.extend((text.len() as u32).to_le_bytes());
    body.extend(text.as_bytes());
}

/// `ENCODE_START(1, 1, bl)`: version, oldest version that can read it, length.
fn versioned(body: &[u8]) -> Vec<u8> {
    let mut all = vec![1, 1];
    all.extend((body.len() as u32).to_le_bytes());
    all.extend(body);
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locks_are_encoded_as_the_object_class_reads_them() {
        let lock = LockKey { name: "ab".into(), cookie: "c".into() };
        assert_eq!(
            encode_assert_locked(&lock),
            [1, 1, 16, 0, 0, 0, 2, 0, 0, 0, b'a', b'b', 1, 1, 0, 0, 0, b'c', 0, 0, 0, 0]
        );
        let op = encode_lock(&lock, "d", Duration::from_millis(2500), LOCK_MUST_RENEW);
        assert_eq!(op[..6], [1, 1, 30, 0, 0, 0]);
        assert_eq!(op[22..], [1, 0, 0, 0, b'd', 2, 0, 0, 0, 0, 0x65, 0xcd, 0x1d, 2]);
    }
}
