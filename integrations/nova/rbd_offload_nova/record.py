"""An image's record, through Nova's own client of Glance, for longer than the user's token lives."""

import copy
import json

import glanceclient.exc
from nova import service_auth
from nova.image import glance
from oslo_log import log as logging

from rbd_offload_nova import handover

LOG = logging.getLogger(__name__)

PATCH = {'Content-Type': 'application/openstack-images-v2.1-json-patch'}


class ImageRecord:
    """What a hand-over reads and changes.

    With `[service_user] send_service_user_token` Glance takes the user's token after its end too. Where it does not (or
    the token was revoked), Nova's own user of `[service_user]` goes on, if it sees the image: that takes the role
    `admin`. It then goes on for the rest of the snapshot too, which would fail otherwise.
    """

    def __init__(self, context, image_id):
        self.id = image_id
        self._context = context
        self._glance = glance.GlanceClientWrapper()
        self._own = None

    def read(self):
        record = self._call('get')
        if self._own is None:
            self._own = self._find_own()
        return record

    def tag(self, tag):
        self._call('put', '/tags/' + tag)

    def untag(self, tag):
        try:
            self._call('delete', '/tags/' + tag)
        except handover.Gone:
            # the tag is; the image tells when it is read again
            pass

    def strip(self, names):
        self._patch([{'op': 'remove', 'path': '/' + name} for name in names])

    def prepare(self, attributes, properties):
        """Sets Glance's own attributes and properties."""
        self._patch([{'op': 'replace', 'path': '/' + name, 'value': value} for name, value in attributes.items()] +
                    [{'op': 'add', 'path': '/' + name, 'value': value} for name, value in properties.items()])

    def _patch(self, changes):
        self._call('patch', headers=PATCH, data=json.dumps(changes))

    def _call(self, method, path='', **kwargs):
        try:
            return self._send(self._context, method, path, **kwargs)
        except glanceclient.exc.HTTPUnauthorized:
            if not self._own or self._context.user_auth_plugin is self._own:
                raise
        LOG.info('rbd-offload: the token of the user who makes image %s is over: it goes on with that of Nova', self.id)
        self._context.user_auth_plugin = self._own
        return self._send(self._context, method, path, **kwargs)

    def _send(self, context, method, path, **kwargs):
        try:
            _response, body = self._glance.call(context, 2, method, controller='http_client',
                                                args=('/v2/images/%s%s' % (self.id, path),), kwargs=kwargs)
        except glanceclient.exc.HTTPNotFound:
            raise handover.Gone()
        return body

    def _find_own(self):
        """Nova's own login; False when there is none, or it does not see the image."""
        try:
            auth = service_auth.get_service_auth_plugin('service_user')
            if not auth:
                return False
            own = copy.copy(self._context)
            own.user_auth_plugin = auth
            self._send(own, 'get', '')
            return auth
        except Exception as error:
            LOG.debug('rbd-offload: Nova\'s own user does not see image %s: %s', self.id, error)
            return False
