"""The integration in the cinder-volume of the release that this Python has: its volume manager, its database, its
client of Glance, and a Glance of the same release.

Ceph is not there. So the driver is told its cluster's fsid, and the stock driver's upload sends a text instead of a
disk.
"""

# first: what cinder-volume patches for eventlet, it patches as it is imported
import cinder.cmd.volume  # noqa: I100

import functools
import inspect
import os
import shutil
import tempfile
import unittest

from cinder import context as cinder_context
from cinder.db import migration
from cinder import exception
from cinder import objects
from cinder import rpc
from cinder import service
from cinder.volume.drivers import rbd
from cinder.volume import volume_types
from oslo_config import cfg
from oslo_messaging.notify import _impl_test
import rbd_offload_cinder

import local_glance

FSID = '3f0c8c1a-0000-4000-8000-000000000001'
NATIVE = b'read by the stock driver'

CONFIGURATION = """
[DEFAULT]
enabled_backends = ceph
transport_url = fake:/
state_path = {folder}
log_file = {folder}/cinder.log
debug = true
glance_api_servers = {glance}
glance_num_retries = 0
[database]
connection = sqlite:///{folder}/cinder.sqlite
[oslo_messaging_notifications]
driver = test
[oslo_concurrency]
lock_path = {folder}/locks
[service_user]
send_service_user_token = true
auth_type = admin_token
endpoint = {glance}
token = service
[ceph]
volume_driver = rbd_offload_cinder.RBDOffloadDriver
volume_backend_name = ceph
rbd_pool = volumes
rbd_user = cinder
rbd_offload_claim_timeout = 2
rbd_offload_start_timeout = 10
rbd_offload_stall_timeout = 30
"""


class StockUpload:
    """In the place of the stock driver's upload, which reads the disk. It is called with what that one takes."""

    def __init__(self, test):
        self.images = []
        stock = rbd.RBDDriver.copy_volume_to_image
        signature = inspect.signature(stock)

        @functools.wraps(stock)
        def upload(driver, *args, **kwargs):
            call = signature.bind(driver, *args, **kwargs).arguments
            image = call['image_meta']['id']
            self.images.append((image, test.glance.image(image)))
            call['image_service'].update(call['context'], image, {}, _file(NATIVE))

        rbd.RBDDriver.copy_volume_to_image = upload
        test.addCleanup(setattr, rbd.RBDDriver, 'copy_volume_to_image', stock)


def _file(data):
    file = tempfile.TemporaryFile()
    file.write(data)
    file.seek(0)
    return file


class TestCinder(unittest.TestCase):

    @classmethod
    def setUpClass(cls):
        cls.glance = local_glance.Glance()
        cls.addClassCleanup(cls.glance.stop)
        cls.folder = tempfile.mkdtemp(prefix='cinder-')
        cls.addClassCleanup(shutil.rmtree, cls.folder)
        path = os.path.join(cls.folder, 'cinder.conf')
        with open(path, 'w') as file:
            file.write(CONFIGURATION.format(folder=cls.folder, glance=cls.glance.url))
        objects.register_all()
        cfg.CONF(['--config-file', path], project='cinder')
        cinder.cmd.volume.logging.setup(cfg.CONF, 'cinder')
        migration.db_sync()
        rpc.init(cfg.CONF)
        # as cinder-volume does for each backend
        host = 'here@ceph'
        cls.manager = service.Service.create(host=host, service_name='ceph', binary='cinder-volume').manager
        cls.driver = cls.manager.driver
        cls.driver.set_initialized()
        cls.driver._get_fsid = lambda: FSID
        admin = cinder_context.get_admin_context()
        cls.stock_type = volume_types.get_volume_type_by_name(admin, '__DEFAULT__')['id']
        cls.typed = volume_types.create(admin, 'with a store', {'image_service:store_id': 'files'})['id']

    def setUp(self):
        self.glance.renew_tokens()
        self.stock = StockUpload(self)
        self.context = cinder_context.RequestContext(user_id='tenant', project_id='project', is_admin=False,
                                                     auth_token=local_glance.TENANT, overwrite=False)
        del _impl_test.NOTIFICATIONS[:]

    def volume(self, volume_type=None):
        volume = objects.Volume(self.context, host='here@ceph#ceph', size=1, status='uploading', user_id='tenant',
                                project_id='project', display_name='a volume',
                                volume_type_id=volume_type or self.stock_type)
        volume.create()
        return volume

    def upload(self, volume, image, container_format='bare'):
        """What the API of Cinder asks cinder-volume for."""
        self.manager.copy_volume_to_image(self.context, volume.id, {
            'id': image, 'container_format': container_format, 'disk_format': 'raw'})

    def image(self, container_format='bare'):
        return self.glance.create_image(container_format=container_format, disk_format='raw')

    def assert_uploaded(self, volume, image, data):
        record = self.glance.image(image)
        self.assertEqual('active', record['status'])
        self.assertEqual(data, self.glance.download(image))
        self.assertEqual([], record['tags'])
        self.assertEqual([], [name for name in record if name.startswith('rbd_offload')])
        # the manager gives the volume back
        self.assertEqual('available', objects.Volume.get_by_id(self.context, volume.id).status)

    def assert_native(self, volume, image):
        self.assert_uploaded(volume, image, NATIVE)
        (called, record), = self.stock.images
        self.assertEqual(image, called)
        # no offer stands while the stock driver writes
        self.assertEqual([], record['tags'])
        self.assertEqual([], [name for name in record if name.startswith('rbd_offload')])

    def test_cinder_volume_loads_it(self):
        self.assertIs(rbd_offload_cinder.RBDOffloadDriver, type(self.driver))
        self.assertIsInstance(self.driver, rbd.RBDDriver)
        self.assertEqual(2, self.driver.configuration.rbd_offload_claim_timeout)
        self.assertEqual(300, self.driver.configuration.rbd_offload_commit_timeout)
        self.assertLess({option.name for option in rbd.RBDDriver.get_driver_options()},
                        {option.name for option in self.driver.get_driver_options()})

    def test_what_it_overrides_takes_what_the_stock_driver_takes(self):
        overridden = [name for name, value in vars(rbd_offload_cinder.RBDOffloadDriver).items()
                      if callable(value) and hasattr(rbd.RBDDriver, name) and name != '__init__'
                      and not name.startswith('__')]
        self.assertEqual(['copy_volume_to_image'], overridden)
        for name in overridden:
            ours, stock = (inspect.signature(getattr(kind, name)) for kind in (type(self.driver), rbd.RBDDriver))
            self.assertEqual(list(stock.parameters), list(ours.parameters))

    def test_the_stock_driver_tells_the_fsid(self):
        self.assertEqual(['self'], list(inspect.signature(rbd.RBDDriver._get_fsid).parameters))

    def test_the_daemon_makes_the_image(self):
        volume, image = self.volume(), self.image()
        daemon = local_glance.Daemon(self.glance, image, local_glance.Daemon.publish)
        self.upload(volume, image)
        daemon.done()
        self.assertEqual('rbd-offload-handover:volume:%s@%s' % (volume.id, FSID), daemon.offer)
        self.assert_uploaded(volume, image, daemon.DATA)
        self.assertEqual([], self.stock.images)
        (_context, message, _priority, _retry), = [
            note for note in _impl_test.NOTIFICATIONS if note[1]['event_type'] == 'volume.upload.start']
        payload = message['payload']
        self.assertEqual('volume.here@ceph', message['publisher_id'])
        self.assertEqual((volume.id, image, FSID, 'volumes', volume.name, True), tuple(
            payload[name] for name in ('volume_id', 'image_id', 'fsid', 'pool', 'rbd_image', 'handover')))

    def test_the_native_path_follows_a_decline(self):
        volume, image = self.volume(), self.image()
        daemon = local_glance.Daemon(self.glance, image, local_glance.Daemon.decline)
        self.upload(volume, image)
        daemon.done()
        self.assert_native(volume, image)

    def test_the_native_path_follows_where_no_daemon_answers(self):
        volume, image = self.volume(), self.image()
        self.upload(volume, image)
        self.assert_native(volume, image)

    def test_it_goes_on_with_its_own_token_after_the_users_has_ended(self):
        volume, image = self.volume(), self.image()
        daemon = local_glance.Daemon(self.glance, image, local_glance.Daemon.publish_after_the_token_has_ended,
                                     local_glance.TENANT)
        self.upload(volume, image)
        daemon.done()
        self.assert_uploaded(volume, image, daemon.DATA)
        self.assertEqual([], self.stock.images)

    def test_an_image_that_is_deleted_ends_it_as_an_upload(self):
        volume, image = self.volume(), self.image()
        daemon = local_glance.Daemon(self.glance, image, local_glance.Daemon.delete_the_image)
        self.assertRaises(exception.ImageNotFound, self.upload, volume, image)
        daemon.done()
        self.assertEqual([], self.stock.images)
        self.assertEqual('available', objects.Volume.get_by_id(self.context, volume.id).status)

    def test_another_format_is_not_offered(self):
        # a container, since Glance looks into what is uploaded as another format of disks
        volume, image = self.volume(), self.image('ovf')
        self.upload(volume, image, 'ovf')
        self.assertEqual([image], [called for called, _record in self.stock.images])
        self.assertEqual([], _impl_test.NOTIFICATIONS)

    def test_a_volume_type_with_a_store_is_not_offered(self):
        volume, image = self.volume(self.typed), self.image()
        self.upload(volume, image)
        self.assertEqual([image], [called for called, _record in self.stock.images])
        self.assertEqual([], _impl_test.NOTIFICATIONS)


if __name__ == '__main__':
    unittest.main()
