"""Reads and changes of an image record by a user whose token ends: python3 -m unittest discover integrations/tests"""

import json
import logging
import os
import sys
import unittest
from urllib import parse

sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), 'nova'))
from rbd_offload_nova import glance_record  # noqa: E402
from rbd_offload_nova import handover  # noqa: E402

logging.getLogger('rbd_offload_nova').setLevel(logging.CRITICAL)

USER, OWN = 'the user', 'the service'


class NotFound(Exception):
    pass


class Unauthorized(Exception):
    pass


class Context:
    def __init__(self):
        self.user_auth_plugin = USER


class Record(glance_record.ImageRecord):
    """With a Glance that takes some tokens, and notes what it is asked."""

    NOT_FOUND = NotFound
    UNAUTHORIZED = Unauthorized

    def __init__(self, own=OWN):
        super().__init__(Context(), 'i')
        self.own = own
        self.takes = {USER, OWN}
        self.there = True
        self.asked = []

    def _own_login(self):
        if isinstance(self.own, Exception):
            raise self.own
        return self.own

    def _request(self, context, method, path, kwargs):
        if context.user_auth_plugin not in self.takes:
            raise Unauthorized()
        if not self.there:
            raise NotFound()
        self.asked.append((context.user_auth_plugin, method, path, kwargs))
        return {'status': 'queued'}


class GlanceRecord(unittest.TestCase):

    def test_calls(self):
        record = Record(own=None)
        self.assertEqual({'status': 'queued'}, record.read())
        record.tag('t')
        record.untag('t')
        record.strip(['a', 'b'])
        self.assertEqual([(USER, 'get', '/v2/images/i', {}), (USER, 'put', '/v2/images/i/tags/t', {}),
                          (USER, 'delete', '/v2/images/i/tags/t', {})], record.asked[:3])
        user, method, path, kwargs = record.asked[3]
        self.assertEqual((USER, 'patch', '/v2/images/i'), (user, method, path))
        self.assertEqual([{'op': 'remove', 'path': '/a'}, {'op': 'remove', 'path': '/b'}], json.loads(kwargs['data']))
        self.assertEqual('application/openstack-images-v2.1-json-patch', kwargs['headers']['Content-Type'])

    def test_names_with_the_characters_of_a_json_pointer(self):
        record = Record(own=None)
        record.strip(['rbd_offload_a/b', 'rbd_offload_~c', 'rbd_offload_~1'])
        paths = [change['path'] for change in json.loads(record.asked[0][3]['data'])]
        self.assertEqual(['/rbd_offload_a~1b', '/rbd_offload_~0c', '/rbd_offload_~01'], paths)

    def test_a_planted_tag_cannot_lead_the_call_elsewhere(self):
        record = Record(own=None)
        for suffix in ('/../../../other', '?x#y', '%2e%2e/z'):
            tag = 'rbd-offload-handover:' + suffix
            record.untag(tag)
            path = record.asked[-1][2]
            self.assertTrue(path.startswith('/v2/images/i/tags/rbd-offload-handover:'), path)
            rest = path[len('/v2/images/i/tags/'):]
            self.assertFalse(set(rest) & set('/?#'), path)
            self.assertEqual(tag, parse.unquote(rest))

    def test_the_tags_of_a_hand_over_are_sent_as_they_are(self):
        record = Record(own=None)
        record.tag(handover.volume_offer('4d0d9b4e-0000-4000-8000-000000000001', 'f51d'))
        self.assertEqual('/v2/images/i/tags/rbd-offload-handover:volume:4d0d9b4e-0000-4000-8000-000000000001@f51d',
                         record.asked[-1][2])

    def test_gone(self):
        record = Record()
        record.there = False
        for call in (record.read, lambda: record.tag('t'), lambda: record.strip(['a'])):
            self.assertRaises(handover.Gone, call)
        # the tag may be what is not there
        record.untag('t')

    def test_the_services_own_user_goes_on(self):
        record = Record()
        context = record.context
        record.read()
        record.takes = {OWN}
        record.tag('t')
        record.strip(['a'])
        self.assertEqual([OWN, OWN], [user for user, method, _path, _kwargs in record.asked if method != 'get'])
        self.assertEqual((USER, OWN), (context.user_auth_plugin, record.context.user_auth_plugin))
        # which may be refused itself
        record.takes = set()
        self.assertRaises(Unauthorized, record.read)

    def test_where_there_is_no_own_user_or_it_does_not_see_the_image(self):
        for own in (None, 'a stranger', ValueError('no such section')):
            record = Record(own)
            record.read()
            record.takes = set()
            self.assertRaises(Unauthorized, record.read)
            self.assertEqual(USER, record.context.user_auth_plugin)

    def test_the_own_user_is_looked_for_once(self):
        record = Record()
        for _ in range(3):
            record.read()
        self.assertEqual(1, sum(user == OWN for user, *_rest in record.asked))


if __name__ == '__main__':
    unittest.main()
