/*
 * Holds the declarations of sys.rs against the installed headers of librbd and librados: this file compiles only if
 * every function has the declared type and every structure and constant the declared size and value.
 */
#include <stddef.h>
#include <rados/librados.h>
#include <rbd/librbd.h>

#define SAME(name, result, ...) \
  do { result (*pointer)(__VA_ARGS__) = name; (void)pointer; } while (0)
#define EQUAL(a, b) _Static_assert((a) == (b), #a " is not " #b)

EQUAL(sizeof(size_t), 8);
EQUAL(sizeof(int), 4);
EQUAL(sizeof(time_t), 8);

EQUAL(sizeof(rbd_image_spec_t), 16);
EQUAL(offsetof(rbd_image_spec_t, name), 8);
EQUAL(sizeof(rbd_linked_image_spec_t), 48);
EQUAL(offsetof(rbd_linked_image_spec_t, pool_name), 8);
EQUAL(offsetof(rbd_linked_image_spec_t, pool_namespace), 16);
EQUAL(offsetof(rbd_linked_image_spec_t, image_id), 24);
EQUAL(offsetof(rbd_linked_image_spec_t, image_name), 32);
EQUAL(offsetof(rbd_linked_image_spec_t, trash), 40);
EQUAL(sizeof(rbd_snap_spec_t), 24);
EQUAL(sizeof(rbd_snap_namespace_type_t), sizeof(int));
EQUAL(offsetof(rbd_snap_spec_t, namespace_type), 8);
EQUAL(offsetof(rbd_snap_spec_t, name), 16);
EQUAL(sizeof(rbd_snap_info_t), 24);
EQUAL(offsetof(rbd_snap_info_t, size), 8);
EQUAL(offsetof(rbd_snap_info_t, name), 16);
EQUAL(sizeof(rbd_trash_image_info_t), 40);
EQUAL(offsetof(rbd_trash_image_info_t, name), 8);
EQUAL(offsetof(rbd_trash_image_info_t, source), 16);
EQUAL(offsetof(rbd_trash_image_info_t, deletion_time), 24);
EQUAL(offsetof(rbd_trash_image_info_t, deferment_end_time), 32);
EQUAL(sizeof(rbd_image_info_t), 160);
EQUAL(offsetof(rbd_image_info_t, obj_size), 8);
EQUAL(offsetof(rbd_image_info_t, num_objs), 16);
EQUAL(offsetof(rbd_image_info_t, order), 24);
EQUAL(offsetof(rbd_image_info_t, block_name_prefix), 28);
EQUAL(offsetof(rbd_image_info_t, parent_pool), 56);

EQUAL(RBD_IMAGE_OPTION_FORMAT, 0);
EQUAL(RBD_IMAGE_OPTION_FEATURES, 1);
EQUAL(RBD_IMAGE_OPTION_ORDER, 2);
EQUAL(RBD_IMAGE_OPTION_STRIPE_UNIT, 3);
EQUAL(RBD_IMAGE_OPTION_STRIPE_COUNT, 4);
EQUAL(RBD_IMAGE_OPTION_DATA_POOL, 10);
EQUAL(RBD_SNAP_NAMESPACE_TYPE_USER, 0);
EQUAL(RBD_SNAP_NAMESPACE_TYPE_TRASH, 2);
EQUAL(RBD_TRASH_IMAGE_SOURCE_REMOVING, 3);
EQUAL(RBD_FLAG_OBJECT_MAP_INVALID, 1);
EQUAL(RBD_FEATURE_LAYERING, 1);
EQUAL(RBD_FEATURE_STRIPINGV2, 2);
EQUAL(RBD_FEATURE_EXCLUSIVE_LOCK, 4);
EQUAL(RBD_FEATURE_OBJECT_MAP, 8);
EQUAL(RBD_FEATURE_FAST_DIFF, 16);
EQUAL(RBD_FEATURE_DEEP_FLATTEN, 32);
EQUAL(RBD_FEATURE_JOURNALING, 64);
EQUAL(RBD_FEATURE_DATA_POOL, 128);
EQUAL(RBD_FEATURE_OPERATIONS, 256);
EQUAL(RBD_FEATURE_MIGRATING, 512);
EQUAL(LIBRADOS_LOCK_FLAG_MAY_RENEW, 1);
EQUAL(LIBRADOS_LOCK_FLAG_MUST_RENEW, 2);
EQUAL(LIBRADOS_CREATE_EXCLUSIVE, 1);

void rbd_offload_abi(void);

void rbd_offload_abi(void)
{
  SAME(rados_set_pool_full_try, void, rados_ioctx_t);
  SAME(rados_ioctx_pool_requires_alignment2, int, rados_ioctx_t, int *);
  SAME(rbd_image_options_create, void, rbd_image_options_t *);
  SAME(rbd_image_options_destroy, void, rbd_image_options_t);
  SAME(rbd_image_options_set_uint64, int, rbd_image_options_t, int, uint64_t);
  SAME(rbd_image_options_set_string, int, rbd_image_options_t, int, const char *);

  SAME(rbd_list2, int, rados_ioctx_t, rbd_image_spec_t *, size_t *);
  SAME(rbd_image_spec_list_cleanup, void, rbd_image_spec_t *, size_t);
  SAME(rbd_create4, int, rados_ioctx_t, const char *, uint64_t, rbd_image_options_t);
  SAME(rbd_clone3, int, rados_ioctx_t, const char *, const char *, rados_ioctx_t, const char *, rbd_image_options_t);
  SAME(rbd_remove, int, rados_ioctx_t, const char *);
  SAME(rbd_rename, int, rados_ioctx_t, const char *, const char *);
  SAME(rbd_trash_list, int, rados_ioctx_t, rbd_trash_image_info_t *, size_t *);
  SAME(rbd_trash_list_cleanup, void, rbd_trash_image_info_t *, size_t);
  SAME(rbd_trash_remove, int, rados_ioctx_t, const char *, bool);

  SAME(rbd_open, int, rados_ioctx_t, const char *, rbd_image_t *, const char *);
  SAME(rbd_open_by_id, int, rados_ioctx_t, const char *, rbd_image_t *, const char *);
  SAME(rbd_open_read_only, int, rados_ioctx_t, const char *, rbd_image_t *, const char *);
  SAME(rbd_open_by_id_read_only, int, rados_ioctx_t, const char *, rbd_image_t *, const char *);
  SAME(rbd_close, int, rbd_image_t);
  SAME(rbd_stat, int, rbd_image_t, rbd_image_info_t *, size_t);
  SAME(rbd_get_old_format, int, rbd_image_t, uint8_t *);
  SAME(rbd_get_features, int, rbd_image_t, uint64_t *);
  SAME(rbd_get_stripe_unit, int, rbd_image_t, uint64_t *);
  SAME(rbd_get_stripe_count, int, rbd_image_t, uint64_t *);
  SAME(rbd_get_overlap, int, rbd_image_t, uint64_t *);
  SAME(rbd_get_flags, int, rbd_image_t, uint64_t *);
  SAME(rbd_get_name, int, rbd_image_t, char *, size_t *);
  SAME(rbd_get_id, int, rbd_image_t, char *, size_t);
  SAME(rbd_get_block_name_prefix, int, rbd_image_t, char *, size_t);
  SAME(rbd_get_data_pool_id, int64_t, rbd_image_t);
  SAME(rbd_get_parent, int, rbd_image_t, rbd_linked_image_spec_t *, rbd_snap_spec_t *);
  SAME(rbd_linked_image_spec_cleanup, void, rbd_linked_image_spec_t *);
  SAME(rbd_snap_spec_cleanup, void, rbd_snap_spec_t *);
  SAME(rbd_flatten_with_progress, int, rbd_image_t, int (*)(uint64_t, uint64_t, void *), void *);
  SAME(rbd_update_features, int, rbd_image_t, uint64_t, uint8_t);
  SAME(rbd_rebuild_object_map, int, rbd_image_t, int (*)(uint64_t, uint64_t, void *), void *);

  SAME(rbd_snap_list, int, rbd_image_t, rbd_snap_info_t *, int *);
  SAME(rbd_snap_list_end, void, rbd_snap_info_t *);
  SAME(rbd_snap_create, int, rbd_image_t, const char *);
  SAME(rbd_snap_remove, int, rbd_image_t, const char *);
  SAME(rbd_snap_remove_by_id, int, rbd_image_t, uint64_t);
  SAME(rbd_snap_protect, int, rbd_image_t, const char *);
  SAME(rbd_snap_unprotect, int, rbd_image_t, const char *);
  SAME(rbd_snap_is_protected, int, rbd_image_t, const char *, int *);
  SAME(rbd_snap_set, int, rbd_image_t, const char *);
  SAME(rbd_snap_set_by_id, int, rbd_image_t, uint64_t);
  SAME(rbd_snap_get_id, int, rbd_image_t, const char *, uint64_t *);
  SAME(rbd_snap_get_namespace_type, int, rbd_image_t, uint64_t, rbd_snap_namespace_type_t *);
  SAME(rbd_snap_get_trash_namespace, int, rbd_image_t, uint64_t, char *, size_t);

  SAME(rbd_read, ssize_t, rbd_image_t, uint64_t, size_t, char *);
  SAME(rbd_diff_iterate2, int, rbd_image_t, const char *, uint64_t, uint64_t, uint8_t, uint8_t,
       int (*)(uint64_t, size_t, int, void *), void *);
  SAME(rbd_aio_create_completion, int, void *, void (*)(rbd_completion_t, void *), rbd_completion_t *);
  SAME(rbd_aio_get_return_value, ssize_t, rbd_completion_t);
  SAME(rbd_aio_release, void, rbd_completion_t);
  SAME(rbd_aio_read, int, rbd_image_t, uint64_t, size_t, char *, rbd_completion_t);
  SAME(rbd_aio_write, int, rbd_image_t, uint64_t, size_t, const char *, rbd_completion_t);
  SAME(rbd_flush, int, rbd_image_t);

  SAME(rbd_metadata_get, int, rbd_image_t, const char *, char *, size_t *);
  SAME(rbd_metadata_set, int, rbd_image_t, const char *, const char *);
  SAME(rbd_metadata_remove, int, rbd_image_t, const char *);
  SAME(rbd_metadata_list, int, rbd_image_t, const char *, uint64_t, char *, size_t *, char *, size_t *);

  SAME(rados_getaddrs, int, rados_t, char **);
  SAME(rados_blocklist_add, int, rados_t, char *, uint32_t);
  SAME(rados_nobjects_list_next2, int, rados_list_ctx_t, const char **, const char **, const char **, size_t *,
       size_t *, size_t *);
  SAME(rados_read_op_omap_get_vals2, void, rados_read_op_t, const char *, const char *, uint64_t, rados_omap_iter_t *,
       unsigned char *, int *);

  /* Of the ceph crate's declarations, those that this program uses with more than handles and strings. */
  SAME(rados_write_op_exec, void, rados_write_op_t, const char *, const char *, const char *, size_t, int *);
  SAME(rados_write_op_assert_version, void, rados_write_op_t, uint64_t);
  SAME(rados_write_op_create, void, rados_write_op_t, int, const char *);
  SAME(rados_write_op_write_full, void, rados_write_op_t, const char *, size_t);
  SAME(rados_write_op_omap_set, void, rados_write_op_t, char const *const *, char const *const *, const size_t *, size_t);
  SAME(rados_write_op_omap_rm_keys, void, rados_write_op_t, char const *const *, size_t);
  SAME(rados_write_op_operate, int, rados_write_op_t, rados_ioctx_t, const char *, time_t *, int);
  SAME(rados_read_op_operate, int, rados_read_op_t, rados_ioctx_t, const char *, int);
  SAME(rados_omap_get_next, int, rados_omap_iter_t, char **, char **, size_t *);
  SAME(rados_list_lockers, ssize_t, rados_ioctx_t, const char *, const char *, int *, char *, size_t *, char *, size_t *,
       char *, size_t *, char *, size_t *);
  SAME(rados_read, int, rados_ioctx_t, const char *, char *, size_t, uint64_t);
}
