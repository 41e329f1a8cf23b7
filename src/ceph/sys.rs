//! The functions of librbd that this program calls, and the few of librados that the `ceph` crate does not declare.
//!
//! Declarations only. `abi.c` holds each of them, and each size and constant, against `rbd/librbd.h` and
//! `rados/librados.h` when the crate is built.
#![allow(unsafe_code)]

use std::ffi::{c_char, c_int, c_uchar, c_void};

use ceph::rados::{rados_ioctx_t, rados_list_ctx_t, rados_omap_iter_t, rados_read_op_t, rados_t};

#[allow(non_camel_case_types)]
pub type rbd_image_t = *mut c_void;
#[allow(non_camel_case_types)]
pub type rbd_image_options_t = *mut c_void;
#[allow(non_camel_case_types)]
pub type rbd_completion_t = *mut c_void;
pub type Callback = extern "C" fn(completion: rbd_completion_t, argument: *mut c_void);
pub type ProgressFn = extern "C" fn(offset: u64, total: u64, argument: *mut c_void) -> c_int;
pub type DiffFn = extern "C" fn(offset: u64, length: usize, exists: c_int, argument: *mut c_void) -> c_int;

pub const IMAGE_OPTION_FORMAT: c_int = 0;
pub const IMAGE_OPTION_FEATURES: c_int = 1;
pub const IMAGE_OPTION_ORDER: c_int = 2;
pub const IMAGE_OPTION_STRIPE_UNIT: c_int = 3;
pub const IMAGE_OPTION_STRIPE_COUNT: c_int = 4;
pub const IMAGE_OPTION_DATA_POOL: c_int = 10;

pub const FLAG_OBJECT_MAP_INVALID: u64 = 1;
pub const SNAP_NAMESPACE_USER: c_int = 0;
pub const SNAP_NAMESPACE_TRASH: c_int = 2;
/// User, group, trash, mirror; a newer Ceph may have more.
pub const SNAP_NAMESPACE_LAST: c_int = 7;
pub const TRASH_SOURCE_USER: c_int = 0;
pub const TRASH_SOURCE_REMOVING: c_int = 3;

/// `rbd_image_spec_t`
#[repr(C)]
pub struct ImageSpec {
    pub id: *mut c_char,
    pub name: *mut c_char,
}

/// `rbd_linked_image_spec_t`
#[repr(C)]
pub struct LinkedImageSpec {
    pub pool_id: i64,
    pub pool_name: *mut c_char,
    pub pool_namespace: *mut c_char,
    pub image_id: *mut c_char,
    pub image_name: *mut c_char,
    pub trash: bool,
}

/// `rbd_snap_spec_t`
#[repr(C)]
pub struct SnapSpec {
    pub id: u64,
    pub namespace_type: c_int,
    pub name: *mut c_char,
}

/// `rbd_snap_info_t`
#[repr(C)]
pub struct SnapInfo {
    pub id: u64,
    pub size: u64,
    pub name: *const c_char,
}

/// `rbd_trash_image_info_t`
#[repr(C)]
pub struct TrashInfo {
    pub id: *mut c_char,
    pub name: *mut c_char,
    pub source: c_int,
    pub deletion_time: libc::time_t,
    pub deferment_end_time: libc::time_t,
}

/// `rbd_image_info_t`
#[repr(C)]
pub struct Stat {
    pub size: u64,
    pub obj_size: u64,
    pub num_objs: u64,
    pub order: c_int,
    pub block_name_prefix: [c_char; 24],
    pub parent_pool: i64,
    pub parent_name: [c_char; 96],
}

// The same numbers stand in abi.c.
const _: () = assert!(size_of::<ImageSpec>() == 16);
const _: () = assert!(size_of::<LinkedImageSpec>() == 48);
const _: () = assert!(size_of::<SnapSpec>() == 24);
const _: () = assert!(size_of::<SnapInfo>() == 24);
const _: () = assert!(size_of::<TrashInfo>() == 40);
const _: () = assert!(size_of::<Stat>() == 160);

#[link(name = "rbd")]
unsafe extern "C" {
    // Options
    pub fn rbd_image_options_create(options: *mut rbd_image_options_t);
    pub fn rbd_image_options_destroy(options: rbd_image_options_t);
    pub fn rbd_image_options_set_uint64(options: rbd_image_options_t, name: c_int, value: u64) -> c_int;
    pub fn rbd_image_options_set_string(options: rbd_image_options_t, name: c_int, value: *const c_char) -> c_int;

    // Images of a pool
    pub fn rbd_list2(io: rados_ioctx_t, images: *mut ImageSpec, max: *mut usize) -> c_int;
    pub fn rbd_image_spec_list_cleanup(images: *mut ImageSpec, count: usize);
    pub fn rbd_create4(io: rados_ioctx_t, name: *const c_char, size: u64, options: rbd_image_options_t) -> c_int;
    pub fn rbd_clone3(
        parent_io: rados_ioctx_t,
        parent: *const c_char,
        snapshot: *const c_char,
        io: rados_ioctx_t,
        name: *const c_char,
        options: rbd_image_options_t,
    ) -> c_int;
    pub fn rbd_remove(io: rados_ioctx_t, name: *const c_char) -> c_int;
    pub fn rbd_rename(io: rados_ioctx_t, source: *const c_char, destination: *const c_char) -> c_int;
    pub fn rbd_trash_list(io: rados_ioctx_t, entries: *mut TrashInfo, count: *mut usize) -> c_int;
    pub fn rbd_trash_list_cleanup(entries: *mut TrashInfo, count: usize);
    pub fn rbd_trash_remove(io: rados_ioctx_t, id: *const c_char, force: bool) -> c_int;

    // An open image
    pub fn rbd_open(io: rados_ioctx_t, name: *const c_char, image: *mut rbd_image_t, snap: *const c_char) -> c_int;
    pub fn rbd_open_by_id(io: rados_ioctx_t, id: *const c_char, image: *mut rbd_image_t, snap: *const c_char) -> c_int;
    pub fn rbd_open_read_only(
        io: rados_ioctx_t,
        name: *const c_char,
        image: *mut rbd_image_t,
        snap: *const c_char,
    ) -> c_int;
    pub fn rbd_open_by_id_read_only(
        io: rados_ioctx_t,
        id: *const c_char,
        image: *mut rbd_image_t,
        snap: *const c_char,
    ) -> c_int;
    pub fn rbd_close(image: rbd_image_t) -> c_int;
    pub fn rbd_stat(image: rbd_image_t, info: *mut Stat, size: usize) -> c_int;
    pub fn rbd_get_old_format(image: rbd_image_t, old: *mut u8) -> c_int;
    pub fn rbd_get_features(image: rbd_image_t, features: *mut u64) -> c_int;
    pub fn rbd_get_stripe_unit(image: rbd_image_t, unit: *mut u64) -> c_int;
    pub fn rbd_get_stripe_count(image: rbd_image_t, count: *mut u64) -> c_int;
    pub fn rbd_get_overlap(image: rbd_image_t, overlap: *mut u64) -> c_int;
    pub fn rbd_get_flags(image: rbd_image_t, flags: *mut u64) -> c_int;
    pub fn rbd_get_name(image: rbd_image_t, name: *mut c_char, length: *mut usize) -> c_int;
    pub fn rbd_get_id(image: rbd_image_t, id: *mut c_char, length: usize) -> c_int;
    pub fn rbd_get_block_name_prefix(image: rbd_image_t, prefix: *mut c_char, length: usize) -> c_int;
    pub fn rbd_get_data_pool_id(image: rbd_image_t) -> i64;
    pub fn rbd_get_parent(image: rbd_image_t, parent: *mut LinkedImageSpec, snap: *mut SnapSpec) -> c_int;
    pub fn rbd_linked_image_spec_cleanup(image: *mut LinkedImageSpec);
    pub fn rbd_snap_spec_cleanup(snap: *mut SnapSpec);
    pub fn rbd_flatten_with_progress(image: rbd_image_t, progress: ProgressFn, argument: *mut c_void) -> c_int;
    pub fn rbd_update_features(image: rbd_image_t, features: u64, enabled: u8) -> c_int;
    pub fn rbd_rebuild_object_map(image: rbd_image_t, progress: ProgressFn, argument: *mut c_void) -> c_int;

    // Its snapshots
    pub fn rbd_snap_list(image: rbd_image_t, snaps: *mut SnapInfo, max: *mut c_int) -> c_int;
    pub fn rbd_snap_list_end(snaps: *mut SnapInfo);
    pub fn rbd_snap_create(image: rbd_image_t, name: *const c_char) -> c_int;
    pub fn rbd_snap_remove(image: rbd_image_t, name: *const c_char) -> c_int;
    pub fn rbd_snap_remove_by_id(image: rbd_image_t, id: u64) -> c_int;
    pub fn rbd_snap_protect(image: rbd_image_t, name: *const c_char) -> c_int;
    pub fn rbd_snap_unprotect(image: rbd_image_t, name: *const c_char) -> c_int;
    pub fn rbd_snap_is_protected(image: rbd_image_t, name: *const c_char, protected: *mut c_int) -> c_int;
    pub fn rbd_snap_set(image: rbd_image_t, name: *const c_char) -> c_int;
    pub fn rbd_snap_set_by_id(image: rbd_image_t, id: u64) -> c_int;
    pub fn rbd_snap_get_id(image: rbd_image_t, name: *const c_char, id: *mut u64) -> c_int;
    pub fn rbd_snap_get_namespace_type(image: rbd_image_t, id: u64, kind: *mut c_int) -> c_int;
    pub fn rbd_snap_get_trash_namespace(image: rbd_image_t, id: u64, name: *mut c_char, length: usize) -> c_int;

    // Its data
    pub fn rbd_read(image: rbd_image_t, offset: u64, length: usize, buffer: *mut c_char) -> isize;
    pub fn rbd_write(image: rbd_image_t, offset: u64, length: usize, buffer: *const c_char) -> isize;
    pub fn rbd_diff_iterate2(
        image: rbd_image_t,
        from_snap: *const c_char,
        offset: u64,
        length: u64,
        include_parent: u8,
        whole_object: u8,
        callback: DiffFn,
        argument: *mut c_void,
    ) -> c_int;
    pub fn rbd_aio_create_completion(
        argument: *mut c_void,
        callback: Callback,
        completion: *mut rbd_completion_t,
    ) -> c_int;
    pub fn rbd_aio_get_return_value(completion: rbd_completion_t) -> isize;
    pub fn rbd_aio_release(completion: rbd_completion_t);
    pub fn rbd_aio_read(
        image: rbd_image_t,
        offset: u64,
        length: usize,
        buffer: *mut c_char,
        completion: rbd_completion_t,
    ) -> c_int;
    pub fn rbd_aio_write(
        image: rbd_image_t,
        offset: u64,
        length: usize,
        buffer: *const c_char,
        completion: rbd_completion_t,
    ) -> c_int;
    pub fn rbd_flush(image: rbd_image_t) -> c_int;

    // Its metadata
    pub fn rbd_metadata_get(image: rbd_image_t, key: *const c_char, value: *mut c_char, length: *mut usize) -> c_int;
    pub fn rbd_metadata_set(image: rbd_image_t, key: *const c_char, value: *const c_char) -> c_int;
    pub fn rbd_metadata_remove(image: rbd_image_t, key: *const c_char) -> c_int;
    pub fn rbd_metadata_list(
        image: rbd_image_t,
        start: *const c_char,
        max: u64,
        keys: *mut c_char,
        keys_length: *mut usize,
        values: *mut c_char,
        values_length: *mut usize,
    ) -> c_int;
}

// copy_from.cc
unsafe extern "C" {
    pub fn rbd_offload_copy_from(
        source: rados_ioctx_t,
        source_object: *const c_char,
        destination: rados_ioctx_t,
        object: *const c_char,
        version: u64,
        done: extern "C" fn(argument: *mut c_void, result: c_int),
        argument: *mut c_void,
    ) -> c_int;
    pub fn rbd_offload_sparsify(
        io: rados_ioctx_t,
        object: *const c_char,
        granularity: u64,
        done: extern "C" fn(argument: *mut c_void, result: c_int),
        argument: *mut c_void,
    ) -> c_int;
    pub fn rbd_offload_stored(
        io: rados_ioctx_t,
        object: *const c_char,
        size: u64,
        stored: *mut u64,
        length: *mut u64,
    ) -> c_int;
}

#[link(name = "rados")]
unsafe extern "C" {
    pub fn rados_set_pool_full_try(io: rados_ioctx_t);
    pub fn rados_ioctx_pool_requires_alignment2(io: rados_ioctx_t, required: *mut c_int) -> c_int;
    pub fn rados_getaddrs(cluster: rados_t, addresses: *mut *mut c_char) -> c_int;
    pub fn rados_blocklist_add(cluster: rados_t, address: *mut c_char, expire_seconds: u32) -> c_int;
    pub fn rados_nobjects_list_next2(
        list: rados_list_ctx_t,
        entry: *mut *const c_char,
        key: *mut *const c_char,
        namespace: *mut *const c_char,
        entry_size: *mut usize,
        key_size: *mut usize,
        namespace_size: *mut usize,
    ) -> c_int;
    pub fn rados_read_op_omap_get_vals2(
        op: rados_read_op_t,
        start_after: *const c_char,
        filter_prefix: *const c_char,
        max: u64,
        iter: *mut rados_omap_iter_t,
        more: *mut c_uchar,
        result: *mut c_int,
    );
}
