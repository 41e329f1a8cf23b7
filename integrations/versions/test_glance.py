"""The daemon's calls on a Glance of the release that this Python has (src/openstack/image.rs, tenant.rs).

The stores are files and HTTP, so a location is that of a file on a web server on loopback. RBD is not there.
"""

import http.server
import importlib.metadata
import threading
import unittest

import local_glance

NO_ID = '00000000-0000-0000-0000-000000000000'
DATA = b'what the location leads to' * 30

#: The release with the location API: Glance 29, of 2024.2.
RELEASE = int(importlib.metadata.version('glance').split('.')[0])
HAS_LOCATION_API = RELEASE >= 29


class _File(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.send_response(200)
        self.send_header('Content-Length', str(len(DATA)))
        self.send_header('Content-Type', 'application/octet-stream')
        self.end_headers()

    def do_GET(self):
        self.do_HEAD()
        self.wfile.write(DATA)

    def log_message(self, *_words):
        pass


class GlanceTest(unittest.TestCase):
    SHOW_MULTIPLE_LOCATIONS = False

    @classmethod
    def setUpClass(cls):
        if cls is GlanceTest:
            raise unittest.SkipTest('only a base')
        cls.glance = local_glance.Glance(cls.SHOW_MULTIPLE_LOCATIONS)
        cls.addClassCleanup(cls.glance.stop)
        server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), _File)
        cls.addClassCleanup(server.server_close)
        cls.addClassCleanup(server.shutdown)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        cls.location = 'http://127.0.0.1:%s/disk' % server.server_port

    def call(self, method, path, body=None, **options):
        return self.glance.call(method, '/v2/' + path, body, **options)

    def image(self):
        return self.glance.create_image(container_format='bare', disk_format='raw')

    def assert_active(self, image):
        local_glance.eventually(lambda: self.glance.image(image)['status'] == 'active', 'an active image')
        self.assertEqual(DATA, self.glance.download(image))
        self.assertEqual(len(DATA), self.glance.image(image)['size'])

    def patch_location(self, image):
        return self.glance.patch(image, [
            {'op': 'add', 'path': '/locations/-', 'value': {'url': self.location, 'metadata': {}}}])


class TestCalls(GlanceTest):

    def test_head_tells_whether_there_is_a_location_api(self):
        self.assertEqual(405 if HAS_LOCATION_API else 404, self.call('HEAD', 'images/%s/locations' % NO_ID).status)

    @unittest.skipUnless(HAS_LOCATION_API, 'this Glance has no location API')
    def test_the_location_api_makes_an_image_active(self):
        image = self.image()
        path = 'images/%s/locations' % image
        self.glance.must(202, self.call('POST', path, {'url': self.location}, as_service=True))
        self.assert_active(image)
        self.assertEqual([self.location], [one['url'] for one in self.glance.must(
            200, self.call('GET', path, as_service=True)).json])
        tasks = self.glance.must(200, self.call('GET', 'images/%s/tasks' % image)).json['tasks']
        self.assertEqual(['location_import'], [task['type'] for task in tasks])
        self.assertEqual(409, self.call('POST', path, {'url': self.location}, as_service=True).status)

    @unittest.skipUnless(HAS_LOCATION_API, 'this Glance has no location API')
    def test_the_role_service_counts_in_the_service_token_alone_with_some(self):
        path = 'images/%s/locations' % self.image()
        answer = self.call('POST', path, {'url': self.location})
        self.assertEqual(403 if RELEASE in (30, 31) else 202, answer.status)

    @unittest.skipIf(HAS_LOCATION_API, 'this Glance has the location API')
    def test_a_location_api_that_is_missing_answers_as_for_a_missing_image(self):
        self.assertEqual(404, self.call('POST', 'images/%s/locations' % self.image(), {'url': self.location}).status)
        self.assertEqual(404, self.call('GET', 'images/%s/locations' % self.image()).status)

    def test_a_location_by_patch_is_forbidden_by_default(self):
        image = self.image()
        self.assertEqual(403, self.patch_location(image).status)
        self.assertEqual('queued', self.glance.image(image)['status'])

    def test_queued_images_are_listed_of_all_projects_shown_and_hidden(self):
        shown, hidden = self.image(), self.glance.create_image(token='other-tenant', os_hidden=True)
        for is_hidden, image in ('false', shown), ('true', hidden):
            listed = self.glance.must(200, self.call(
                'GET', 'images?status=queued&visibility=all&member_status=all&os_hidden=%s'
                       '&sort=created_at:asc,id:asc&limit=100' % is_hidden)).json['images']
            self.assertIn(image, [one['id'] for one in listed])
        first = self.glance.must(200, self.call('GET', 'images?status=queued&limit=1&sort=created_at:asc,id:asc')).json
        self.assertIn('marker=' + first['images'][0]['id'], first['next'])
        self.assertEqual(400, self.call('GET', 'images?limit=1&marker=' + NO_ID).status)

    def test_a_record_takes_formats_tags_and_properties_in_one_change_while_it_is_queued(self):
        image = self.glance.create_image(tags=['mine', 'rbd-offload:volume:x'])
        self.glance.must(200, self.glance.patch(image, [
            {'op': 'replace', 'path': '/disk_format', 'value': 'raw'},
            {'op': 'replace', 'path': '/container_format', 'value': 'bare'},
            {'op': 'replace', 'path': '/min_disk', 'value': 2},
            {'op': 'add', 'path': '/rbd_offload_status', 'value': 'copying'},
            {'op': 'add', 'path': '/a~1b~0c', 'value': 'escaped'},
            {'op': 'replace', 'path': '/tags', 'value': ['mine']}]))
        record = self.glance.image(image)
        self.assertEqual(('raw', 'bare', 2, 'copying', 'escaped', ['mine']), tuple(record[name] for name in (
            'disk_format', 'container_format', 'min_disk', 'rbd_offload_status', 'a/b~c', 'tags')))
        self.glance.must(200, self.glance.patch(image, [{'op': 'remove', 'path': '/rbd_offload_status'}]))
        self.assertNotIn('rbd_offload_status', self.glance.image(image))

    def test_an_active_image_is_deactivated(self):
        image = self.image()
        self.glance.upload(image, DATA)
        self.glance.must(204, self.call('POST', 'images/%s/actions/deactivate' % image))
        self.assertEqual('deactivated', self.glance.image(image)['status'])

    def test_stores_are_told_to_an_administrator(self):
        stores = self.glance.must(200, self.call('GET', 'info/stores/detail')).json['stores']
        self.assertEqual({'files', 'web'}, {store['id'] for store in stores})

    def test_usage_and_a_missing_image_answer(self):
        self.assertIn('usage', self.glance.must(200, self.call('GET', 'info/usage')).json)
        self.assertEqual(404, self.call('GET', 'images/' + NO_ID).status)


class TestMultipleLocations(GlanceTest):
    """With what a Glance before 2024.2 needs."""
    SHOW_MULTIPLE_LOCATIONS = True

    def test_a_location_by_patch_makes_an_image_active_at_once(self):
        image = self.image()
        self.glance.must(200, self.patch_location(image))
        self.assertEqual('active', self.glance.image(image)['status'])
        self.assert_active(image)
        self.assertEqual([self.location], [one['url'] for one in self.glance.image(image)['locations']])

    def test_a_location_needs_formats(self):
        self.assertEqual(400, self.patch_location(self.glance.create_image()).status)


if __name__ == '__main__':
    unittest.main()
