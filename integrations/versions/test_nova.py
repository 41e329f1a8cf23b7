"""The integration in the nova-compute of the release that this Python has: its notifications, its libvirt driver, its
objects in a database, its client of Glance, and a Glance of the same release.

libvirt and Ceph are not there. So the guest is one that only tells of itself, the driver of RBD is told its cluster's
fsid, and the stock direct snapshot sends a text instead of a disk.
"""

# first: what nova-compute patches for eventlet, it patches as it is imported
import nova.cmd.compute  # noqa: I100

import functools
import inspect
import os
import shutil
import sys
import tempfile
import threading
import unittest
import uuid

import libvirt
from nova.compute import task_states
from nova.compute import utils as compute_utils
from nova import config
from nova import context as nova_context
from nova.db import migration
from nova import exception
from nova import objects
from nova import rpc
from nova.virt import driver as virt_driver
from oslo_config import cfg

import local_glance

FSID = '3f0c8c1a-0000-4000-8000-000000000001'
#: What Nova calls a direct snapshot with.
SIGNATURE = ('self', 'context', 'snapshot_name', 'image_format', 'image_id', 'base_image_id')

NATIVE = b'cloned by the stock driver'
BASE_IMAGE = 'b0c8c1a0-0000-4000-8000-00000000000b'

CONFIGURATION = """
[DEFAULT]
transport_url = fake:/
state_path = {folder}
log_file = {folder}/nova.log
debug = true
host = here
[database]
connection = sqlite:///{folder}/nova.sqlite
[api_database]
connection = sqlite:///{folder}/api.sqlite
[glance]
api_servers = {glance}
num_retries = 0
[notifications]
notify_on_state_change = vm_and_task_state
[oslo_messaging_notifications]
driver = noop
driver = rbd_offload
[oslo_concurrency]
lock_path = {folder}/locks
[libvirt]
images_type = rbd
images_rbd_pool = vms
rbd_user = nova
virt_type = qemu
[service_user]
send_service_user_token = true
auth_type = admin_token
endpoint = {glance}
token = service
[rbd_offload]
claim_timeout = 2
start_timeout = 10
stall_timeout = 30
"""

DOMAIN = """
<domain type="qemu"><name>instance-1</name><devices>
  <disk type="network" device="disk"><driver name="qemu" type="raw"/>
    <source protocol="rbd" name="vms/{instance}_disk"/><target dev="vda" bus="virtio"/></disk>
</devices></domain>
"""


class Domain:
    """In the place of libvirt's: a guest that runs."""

    def __init__(self, instance):
        self._xml = DOMAIN.format(instance=instance.uuid)
        self.suspended = self.resumed = False

    def XMLDesc(self, _flags=0):
        return self._xml

    def ID(self):
        return 1

    def info(self):
        return [libvirt.VIR_DOMAIN_RUNNING, 65536, 65536, 1, 0]

    def blockJobAbort(self, _disk, flags=0):
        pass

    def managedSave(self, _flags):
        self.suspended = True

    def createWithFlags(self, _flags):
        self.resumed = True


class StockSnapshot:
    """In the place of the stock direct snapshot. It is called with what that one takes. It stands there before the
    integration is loaded, which wraps it."""

    def __init__(self, glance):
        from nova.virt.libvirt import imagebackend
        self.images = []
        stock = imagebackend.Rbd.direct_snapshot
        signature = inspect.signature(stock)

        @functools.wraps(stock)
        def direct_snapshot(disk, *args, **kwargs):
            image = signature.bind(disk, *args, **kwargs).arguments['image_id']
            self.images.append((image, glance.image(image)))
            operations = [{'op': 'add', 'path': '/' + name, 'value': value} for name, value in (
                ('disk_format', 'raw'), ('container_format', 'bare'))]
            glance.must(200, glance.patch(image, operations))
            glance.upload(image, NATIVE)

        imagebackend.Rbd.direct_snapshot = direct_snapshot


class TestNova(unittest.TestCase):

    @classmethod
    def setUpClass(cls):
        cls.glance = local_glance.Glance()
        cls.addClassCleanup(cls.glance.stop)
        cls.folder = tempfile.mkdtemp(prefix='nova-')
        cls.addClassCleanup(shutil.rmtree, cls.folder)
        path = os.path.join(cls.folder, 'nova.conf')
        with open(path, 'w') as file:
            file.write(CONFIGURATION.format(folder=cls.folder, glance=cls.glance.url))
        # in the order of nova-compute's main(): the notifications are set up before the driver is loaded
        config.parse_args(['nova-compute', '--config-file', path])
        nova.cmd.compute.logging.setup(cfg.CONF, 'nova')
        objects.register_all()
        migration.db_sync(database='main')
        migration.db_sync(database='api')
        assert 'nova.virt.libvirt.imagebackend' not in sys.modules
        cls.driver = virt_driver.load_compute_driver(None, 'libvirt.LibvirtDriver')
        # not before: it imports the driver
        from nova.virt.libvirt import guest
        cls.stock = StockSnapshot(cls.glance)
        cls.host, cls.domains = cls.driver._host, {}
        cls.host.get_guest = lambda instance: guest.Guest(cls.domains[instance.uuid])
        cls.host.has_min_version = lambda *args, **kwargs: True
        sys.modules['nova.virt.libvirt.imagebackend'].rbd_utils.RBDDriver.get_fsid = lambda driver: FSID

        cls.notifier = rpc.get_notifier('compute', 'here')

    def setUp(self):
        self.glance.renew_tokens()
        del self.stock.images[:]
        self.context = nova_context.RequestContext(user_id='tenant', project_id='project', is_admin=False,
                                                   auth_token=local_glance.TENANT, overwrite=False)

    def instance(self, **attributes):
        flavor = objects.Flavor(self.context, id=1, name='small', flavorid='1', memory_mb=64, vcpus=1, root_gb=1,
                                ephemeral_gb=0, swap=0, rxtx_factor=1.0, vcpu_weight=0, extra_specs={})
        instance = objects.Instance(
            self.context, uuid=str(uuid.uuid4()), user_id='tenant', project_id='project', host='here',
            image_ref=BASE_IMAGE, display_name='an instance', vm_state='active', flavor=flavor,
            task_state=task_states.IMAGE_SNAPSHOT, launch_index=0, reservation_id='r-1', os_type=None, kernel_id='',
            ramdisk_id='',
            system_metadata={'image_base_image_ref': BASE_IMAGE, 'image_container_format': 'bare',
                             'image_disk_format': 'raw'})
        instance.update(attributes)
        instance.create()
        self.domains[instance.uuid] = Domain(instance)
        return objects.Instance.get_by_uuid(self.context, instance.uuid)

    def image(self, instance):
        """As the API of Nova makes it."""
        return self.glance.create_image(instance_uuid=instance.uuid, image_type='snapshot', user_id='tenant',
                                        base_image_ref=BASE_IMAGE)

    def snapshot(self, instance, image):
        """What nova-compute's manager does: tells of the snapshot, and calls the driver."""
        self.announce(instance)
        self.driver.snapshot(self.context, instance, image, lambda task_state, expected_state=None: None)

    def announce(self, instance):
        compute_utils.notify_about_instance_usage(self.notifier, self.context, instance, 'snapshot.start')

    def daemon(self, image, part, *arguments):
        return local_glance.Daemon(self.glance, image, part, *arguments)

    def assert_made(self, instance, image, data):
        record = self.glance.image(image)
        self.assertEqual('active', record['status'])
        self.assertEqual(data, self.glance.download(image))
        self.assertEqual([], record['tags'])
        self.assertEqual([], [name for name in record if name.startswith('rbd_offload')])
        names = 'disk_format', 'container_format', 'image_location', 'image_state', 'owner_id', 'instance_uuid'
        self.assertEqual(('raw', 'bare', 'snapshot', 'available', 'project', instance.uuid),
                         tuple(record.get(name) for name in names))

    def assert_native(self, instance, image):
        self.assert_made(instance, image, NATIVE)
        (called, record), = self.stock.images
        self.assertEqual(image, called)
        # no offer stands while the stock driver writes
        self.assertEqual([], record['tags'])
        self.assertEqual([], [name for name in record if name.startswith('rbd_offload')])

    def test_the_first_notification_wraps_the_driver(self):
        from nova.virt.libvirt import driver
        from nova.virt.libvirt import imagebackend
        self.announce(self.instance())
        self.assertTrue(imagebackend.Rbd.direct_snapshot.rbd_offload)
        self.assertEqual(SIGNATURE, tuple(inspect.signature(imagebackend.Rbd.direct_snapshot).parameters))
        for method in driver.LibvirtDriver.snapshot, driver.LibvirtDriver.suspend:
            self.assertEqual('rbd_offload_nova.snapshot', method.__globals__['__name__'])

    def test_the_options_are_nova_confs(self):
        self.assertEqual((2, 10, 30, 3600, 300), tuple(cfg.CONF.rbd_offload[name + 'timeout'] for name in (
            'claim_', 'start_', 'stall_', '', 'commit_')))

    def test_eventlet_patches_as_the_variable_says(self):
        wanted = os.environ['OS_NOVA_DISABLE_EVENTLET_PATCHING'] == '0'
        patcher = sys.modules.get('eventlet.patcher')
        self.assertEqual(wanted, bool(patcher and patcher.is_monkey_patched('socket')))

    def test_the_daemon_makes_the_image(self):
        instance = self.instance()
        image = self.image(instance)
        daemon = self.daemon(image, local_glance.Daemon.publish)
        self.snapshot(instance, image)
        daemon.done()
        self.assertEqual('rbd-offload-handover:instance:%s@%s' % (instance.uuid, FSID), daemon.offer)
        self.assert_made(instance, image, daemon.DATA)
        self.assertEqual([], self.stock.images)
        self.assertFalse(self.domains[instance.uuid].suspended)

    def test_two_snapshots_do_not_wait_for_each_other(self):
        instances = self.instance(), self.instance()
        first, last = (self.image(instance) for instance in instances)
        daemons = [self.daemon(last, local_glance.Daemon.publish)]
        daemons.insert(0, self.daemon(first, local_glance.Daemon.publish_after, daemons[0]))
        works = [threading.Thread(target=self.snapshot, args=work) for work in zip(instances, (first, last))]
        for work in works:
            work.start()
        for work, daemon in zip(works, daemons):
            work.join(local_glance.PATIENCE)
            daemon.done()
        for instance, image in zip(instances, (first, last)):
            self.assert_made(instance, image, local_glance.Daemon.DATA)
        self.assertEqual([], self.stock.images)

    def test_the_native_path_follows_a_decline(self):
        instance = self.instance()
        image = self.image(instance)
        daemon = self.daemon(image, local_glance.Daemon.decline)
        self.snapshot(instance, image)
        daemon.done()
        self.assert_native(instance, image)

    def test_the_native_path_follows_where_no_daemon_answers(self):
        instance = self.instance()
        image = self.image(instance)
        self.snapshot(instance, image)
        self.assert_native(instance, image)

    def test_it_goes_on_with_its_own_token_after_the_users_has_ended(self):
        instance = self.instance()
        image = self.image(instance)
        daemon = self.daemon(image, local_glance.Daemon.publish_after_the_token_has_ended, local_glance.TENANT)
        self.snapshot(instance, image)
        daemon.done()
        self.assert_made(instance, image, daemon.DATA)
        self.assertEqual([], self.stock.images)

    def test_an_image_that_is_deleted_ends_it_as_a_snapshot(self):
        instance = self.instance()
        image = self.image(instance)
        daemon = self.daemon(image, local_glance.Daemon.delete_the_image)
        self.assertRaises(exception.ImageNotFound, self.snapshot, instance, image)
        daemon.done()
        self.assertEqual([], self.stock.images)

    def test_an_instance_that_is_being_deleted_gets_no_native_snapshot(self):
        instance = self.instance(task_state='deleting')
        image = self.image(instance)
        daemon = self.daemon(image, local_glance.Daemon.decline)
        self.assertRaises(exception.InstanceNotFound, self.snapshot, instance, image)
        daemon.done()
        self.assertEqual([], self.stock.images)

    def test_a_cold_snapshot_is_not_offered(self):
        cfg.CONF.set_override('disable_libvirt_livesnapshot', True, 'workarounds')
        self.addCleanup(cfg.CONF.clear_override, 'disable_libvirt_livesnapshot', 'workarounds')
        instance = self.instance()
        image = self.image(instance)
        self.snapshot(instance, image)
        domain = self.domains[instance.uuid]
        self.assertEqual((True, True), (domain.suspended, domain.resumed))
        self.assert_native(instance, image)

    def test_an_instance_of_an_image_in_a_container_is_not_offered(self):
        instance = self.instance(system_metadata={'image_container_format': 'ami', 'image_disk_format': 'ami'})
        image = self.image(instance)
        self.announce(instance)
        rbd = self.driver.image_backend.by_libvirt_path(instance, 'rbd:vms/%s_disk' % instance.uuid, image_type='rbd')
        rbd.direct_snapshot(self.context, 'name', 'raw', image, BASE_IMAGE)
        self.assertEqual([image], [called for called, _record in self.stock.images])


if __name__ == '__main__':
    unittest.main()
