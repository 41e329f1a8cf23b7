// RADOS copy_from for fill.rs: an OSD reads an object from another OSD, of whatever pool, and writes it as its own.
//
// librados offers it in C++ only. No exception leaves this file.

#include <cerrno>
#include <cstdint>
#include <memory>
#include <new>

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

}  // namespace

// Starts to copy `source_object`, at the snapshot that is set on `source`, to `object`. Returns 0 when `done` will be
// called, once and from a thread of librados; else a negative errno, and it will not be called.
//
// The operation holds nothing but copy_from: with a step before it (create, set_alloc_hint) the OSD counts a new object
// twice, and the next deep scrub finds the placement group inconsistent.
extern "C" int rbd_offload_copy_from(rados_ioctx_t source, const char *source_object, rados_ioctx_t destination,
                                     const char *object, done_t done, void *argument)
{
  try {
    librados::IoCtx from, to;
    librados::IoCtx::from_rados_ioctx_t(source, from);
    librados::IoCtx::from_rados_ioctx_t(destination, to);
    librados::ObjectWriteOperation op;
    op.copy_from(source_object, from, 0, 0);

    auto pending = std::make_unique<Pending>(Pending{done, argument});
    librados::AioCompletion *completion = librados::Rados::aio_create_completion(pending.get(), finish);
    const int r = to.aio_operate(object, completion, &op);
    if (r == 0)
      pending.release();  // finish() has it
    completion->release();
    return r;
  } catch (const std::bad_alloc &) {
    return -ENOMEM;
  } catch (...) {
    return -EIO;
  }
}
