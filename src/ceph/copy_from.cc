// RADOS copy_from for fill.rs: an OSD reads an object from another OSD, of any pool, and writes it as its own. Beside
// it, the calls that keep holes.
//
// librados offers it in C++ only. No exception leaves this file.

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <ctime>
#include <map>
#include <memory>
#include <new>
#include <string>

#include <rados/librados.hpp>

namespace {

using done_t = void (*)(void *argument, int result);

struct Pending {
  done_t done;
  void *argument;
};

extern "C" void finish(rados_completion_t completion, void *argument)
{
  std::unique_ptr<Pending> pending(static_cast<Pending *>(argument));
  pending->done(pending->argument, rados_aio_get_return_value(completion));
}

// Starts a write. Returns 0 when `done` will be called, once and from a thread of librados; else a negative errno, and
// it will not be called.
int start(librados::IoCtx &io, const char *object, librados::ObjectWriteOperation &op, done_t done, void *argument)
{
  auto pending = std::make_unique<Pending>(Pending{done, argument});
  librados::AioCompletion *completion = librados::Rados::aio_create_completion(pending.get(), finish);
  const int r = io.aio_operate(object, completion, &op);
  if (r == 0)
    pending.release();  // finish() has it
  completion->release();
  return r;
}

}  // namespace

// Starts to copy `source_object`, at the snapshot that is set on `source`, to `object`; returns as start() does. Where
// the source object has another version than `version` by then, nothing is copied, and the result is -ERANGE or
// -EOVERFLOW. 0: any version.
//
// The operation holds nothing but copy_from: with a step before it (create, set_alloc_hint) the OSD counts a new object
// twice, and the next deep scrub finds the placement group inconsistent.
extern "C" int rbd_offload_copy_from(rados_ioctx_t source, const char *source_object, rados_ioctx_t destination,
                                     const char *object, uint64_t version, done_t done, void *argument)
{
  try {
    librados::IoCtx from, to;
    librados::IoCtx::from_rados_ioctx_t(source, from);
    librados::IoCtx::from_rados_ioctx_t(destination, to);
    librados::ObjectWriteOperation op;
    op.copy_from(source_object, from, version, 0);
    return start(to, object, op, done, argument);
  } catch (const std::bad_alloc &) {
    return -ENOMEM;
  } catch (...) {
    return -EIO;
  }
}

// Starts to turn zeros of the object into holes, in units of `granularity` bytes, by the method of the OSD's rbd class
// that rbd_sparsify uses too; returns as start() does. The object stays even when nothing is left of it: while the
// image has a parent, a missing object would show the parent's data.
extern "C" int rbd_offload_sparsify(rados_ioctx_t ioctx, const char *object, uint64_t granularity, done_t done,
                                    void *argument)
{
  try {
    librados::IoCtx io;
    librados::IoCtx::from_rados_ioctx_t(ioctx, io);
    char request[9] = {};  // granularity in little-endian, then "remove what is empty": no
    for (int n = 0; n < 8; n++)
      request[n] = static_cast<char>(granularity >> (8 * n));
    librados::bufferlist in;
    in.append(request, sizeof request);
    librados::ObjectWriteOperation op;
    op.exec("rbd", "sparsify", in);
    return start(io, object, op, done, argument);
  } catch (const std::bad_alloc &) {
    return -ENOMEM;
  } catch (...) {
    return -EIO;
  }
}

// Asks how many of the first `size` bytes the OSD has stored, at the snapshot that is set, and where the object ends
// (not beyond `size`). Waits for the answers. -EOPNOTSUPP in an erasure-coded pool.
extern "C" int rbd_offload_stored(rados_ioctx_t ioctx, const char *object, uint64_t size, uint64_t *stored,
                                  uint64_t *length)
{
  try {
    librados::IoCtx io;
    librados::IoCtx::from_rados_ioctx_t(ioctx, io);
    std::map<uint64_t, uint64_t> extents;
    int r = io.mapext(object, 0, size, extents);
    if (r < 0)
      return r;
    *stored = *length = 0;
    for (const auto &[start, bytes] : extents) {
      *stored += bytes;
      *length = start + bytes;
    }
    if (*length >= size)
      return 0;
    // What follows the last extent may be a hole.
    uint64_t end = 0;
    time_t time;
    r = io.stat(object, &end, &time);
    if (r < 0)
      return r;
    *length = std::min(end, size);
    return 0;
  } catch (const std::bad_alloc &) {
    return -ENOMEM;
  } catch (...) {
    return -EIO;
  }
}
