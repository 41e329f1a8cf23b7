"""An image's record, through Cinder's own client of Glance, for longer than the user's token lives."""

import copy
import json

from cinder.image import glance
from cinder import service_auth
import glanceclient.exc
from keystoneauth1 import loading
from oslo_config import cfg
from oslo_log import log as logging

from rbd_offload_cinder import handover

LOG = logging.getLogger(__name__)

PATCH = {'Content-Type': 'application/openstack-images-v2.1-json-patch'}


class ImageRecord:
    """What a hand-over reads and changes.

    With `[service_user] send_service_user_token` Glance takes the user's token after its end too. Where it does not (or
    the token was revoked), Cinder's own user goes on, from `[glance]` or else `[service_user]`, if it sees the image:
    that takes the role `admin`.
    """

    def __init__(self, context, image_id):
        self.id = image_id
        #: Whose token Glance takes now.
        self.context = context
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
        changes = [{'op': 'remove', 'path': '/' + name} for name in names]
        self._call('patch', headers=PATCH, data=json.dumps(changes))

    def _call(self, method, path='', **kwargs):
        try:
            return self._send(self.context, method, path, **kwargs)
        except glanceclient.exc.Unauthorized:
            if not self._own or self.context is self._own:
                raise
        LOG.info('The token of the user who uploads image %s is over: its upload goes on with that of Cinder.', self.id)
        self.context = self._own
        return self._send(self.context, method, path, **kwargs)

    def _send(self, context, method, path, **kwargs):
        try:
            _response, body = self._glance.call(context, method, '/v2/images/%s%s' % (self.id, path),
                                                controller='http_client', **kwargs)
        except glanceclient.exc.NotFound:
            raise handover.Gone()
        return body

    def _find_own(self):
        """The request's context with Cinder's own user; False when that does not see the image."""
        try:
            auth = None
            if getattr(cfg.CONF.glance, 'auth_type', None):
                auth = loading.load_auth_from_conf_options(cfg.CONF, 'glance')
            auth = auth or service_auth.get_service_auth_plugin()
            if not auth:
                return False
            own = copy.copy(self.context)
            own.user_auth_plugin = auth
            self._send(own, 'get', '')
            return own
        except Exception as error:
            LOG.debug('Cinder\'s own user does not see image %s: %s', self.id, error)
            return False
