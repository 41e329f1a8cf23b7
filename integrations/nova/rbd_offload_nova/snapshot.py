"""Nova's snapshot of an RBD disk, with one way more: offered to rbd-offload first. What is declined, and everything
else, falls back to the native path."""

import functools
import inspect
import re
import sys
import threading

from oslo_config import cfg
from oslo_log import log as logging

from rbd_offload_nova import handover

LOG = logging.getLogger(__name__)

GROUP = 'rbd_offload'

OPTIONS = [
    cfg.IntOpt('claim_timeout', default=10, min=1,
               help='Seconds for an rbd-offload daemon to take a snapshot; then Nova takes the native path.'),
    cfg.IntOpt('start_timeout', default=30, min=1,
               help='Seconds for the copy to start, after which Nova does the snapshot itself.'),
    cfg.IntOpt('stall_timeout', default=120, min=1,
               help='Seconds without any sign of progress, after which Nova does the snapshot itself.'),
    cfg.IntOpt('timeout', default=3600, min=1,
               help='Seconds for a snapshot in all, after which Nova takes the native path.'),
    cfg.IntOpt('commit_timeout', default=300, min=1,
               help='Seconds for a copy that is ready to become an active image.'),
]

#: Where Nova's driver of RBD disks lives, and what it is called with. Another signature is another Nova.
MODULE = 'nova.virt.libvirt.imagebackend'
SIGNATURE = ('self', 'context', 'snapshot_name', 'image_format', 'image_id', 'base_image_id')

#: The driver that suspends the guest for a cold snapshot, before it calls direct_snapshot in the same thread.
DRIVER_MODULE = 'nova.virt.libvirt.driver'
DRIVER_METHODS = ('snapshot', 'suspend')

#: The name of an instance's root disk.
ROOT_DISK = re.compile(r'([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})_disk')

_LOCK = threading.Lock()
_refused = False

#: Whether the guest was suspended in the snapshot that this thread makes.
_THIS_SNAPSHOT = threading.local()


def register_options(conf):
    conf.register_opts(OPTIONS, group=GROUP)


def install(conf):
    """Wraps the native path, once, and where there is one that is known."""
    global _refused
    stock = getattr(getattr(sys.modules.get(MODULE), 'Rbd', None), 'direct_snapshot', None)
    if stock is None or _refused or hasattr(stock, 'rbd_offload'):
        return
    with _LOCK:
        rbd = sys.modules[MODULE].Rbd
        stock = rbd.direct_snapshot
        if _refused or hasattr(stock, 'rbd_offload'):
            return
        found = tuple(inspect.signature(stock).parameters)
        if found != SIGNATURE:
            _refused = True
            LOG.error('rbd-offload: this Nova is not known: %s.Rbd.direct_snapshot takes %s, not %s. It is left as it '
                      'is, and Nova does its snapshots itself.', MODULE, ', '.join(found), ', '.join(SIGNATURE))
            return
        driver = getattr(sys.modules.get(DRIVER_MODULE), 'LibvirtDriver', None)
        missing = [name for name in DRIVER_METHODS if not callable(getattr(driver, name, None))]
        if missing:
            _refused = True
            LOG.error('rbd-offload: this Nova is not known: %s.LibvirtDriver has no %s. It is left as it is, and Nova '
                      'does its snapshots itself.', DRIVER_MODULE, ', '.join(missing))
            return
        _watch_for_suspension(driver)
        rbd.direct_snapshot = _with_offer(stock, conf)
        LOG.info('rbd-offload: snapshots of RBD disks are offered to it')


def _watch_for_suspension(driver):
    """Nova tells direct_snapshot nothing of the guest, so what the driver does in the same snapshot is noted."""
    snapshot, suspend = driver.snapshot, driver.suspend

    @functools.wraps(snapshot)
    def noting_snapshot(self, *args, **kwargs):
        _THIS_SNAPSHOT.suspended = False
        try:
            return snapshot(self, *args, **kwargs)
        finally:
            _THIS_SNAPSHOT.suspended = False

    @functools.wraps(suspend)
    def noting_suspend(self, *args, **kwargs):
        _THIS_SNAPSHOT.suspended = True
        return suspend(self, *args, **kwargs)

    driver.snapshot, driver.suspend = noting_snapshot, noting_suspend


def _with_offer(stock, conf):

    @functools.wraps(stock)
    def direct_snapshot(self, context, snapshot_name, image_format, image_id, base_image_id):
        if _try_offload(self, context, image_format, image_id, conf):
            # no location: the image has one
            return None
        return stock(self, context, snapshot_name, image_format, image_id, base_image_id)

    direct_snapshot.rbd_offload = True
    return direct_snapshot


def _try_offload(disk, context, image_format, image_id, conf):
    """Offers the snapshot to the daemon. True: the image is active."""
    # only where Nova is: this file is also read by programs that list the options
    from nova import exception
    from nova import objects
    from rbd_offload_nova import record

    name = ROOT_DISK.fullmatch(disk.rbd_name)
    if not name or image_format != 'raw':
        return False
    instance_id = name.group(1)
    if getattr(_THIS_SNAPSHOT, 'suspended', False):
        LOG.info('instance:%s: the native path: the guest is suspended for this snapshot', instance_id)
        return False
    image = record.ImageRecord(context, image_id)
    try:
        instance = objects.Instance.get_by_uuid(context, instance_id, expected_attrs=['system_metadata'])
        container_format = _container_format(instance)
        if container_format != 'bare':
            return False
        fsid = disk.driver.get_fsid()
        image.prepare({'disk_format': image_format, 'container_format': container_format}, _properties(instance))
    except handover.Gone:
        raise exception.ImageNotFound(image_id=image_id)
    except exception.InstanceNotFound:
        raise
    except Exception:
        LOG.exception('rbd-offload: image %s could not be offered', image_id)
        return False

    options = conf[GROUP]
    limits = handover.Limits(claim=options.claim_timeout, stall=options.stall_timeout, total=options.timeout,
                             commit=options.commit_timeout, start=options.start_timeout)
    offer = handover.instance_offer(instance_id, fsid)
    try:
        # Nova has announced the snapshot already
        if handover.Handover(image, offer, limits).run(lambda: None):
            return True
    except handover.Gone:
        raise exception.ImageNotFound(image_id=image_id)
    # a snapshot of a disk that Nova is removing would keep it there
    instance = objects.Instance.get_by_uuid(context, instance_id)
    if instance.task_state in ('deleting', 'soft-deleting'):
        raise exception.InstanceNotFound(instance_id=instance_id)
    return False


def _properties(instance):
    """The properties that Nova itself sets on the record once a snapshot is made.

    On an image that is active already, that is too late. Nova could not change the formats any more, and would delete
    the image. Glance would drop the properties when it has hashed the image, since it restores the record as it was
    before. So they are set first, and Nova then finds all of them and changes nothing.
    """
    properties = {'image_location': 'snapshot', 'image_state': 'available', 'owner_id': instance.project_id}
    for name in ('kernel_id', 'ramdisk_id', 'os_type'):
        if getattr(instance, name):
            properties[name] = getattr(instance, name)
    return properties


def _container_format(instance):
    meta = instance.image_meta
    return meta.container_format if meta.obj_attr_is_set('container_format') else 'bare'
