"""An image's record in Glance, for longer than the user's token lives.

One file for Cinder and Nova, which reach Glance each through a client of their own.
"""

import copy
import json
import logging
from urllib import parse

from . import handover

LOG = logging.getLogger(__name__)

PATCH = {'Content-Type': 'application/openstack-images-v2.1-json-patch'}


def pointer(name):
    """The JSON pointer (RFC 6901) of a property. Its name is whatever the image's owner chose."""
    return '/' + name.replace('~', '~0').replace('/', '~1')


class ImageRecord:
    """What a hand-over reads and changes.

    With `[service_user] send_service_user_token` Glance takes the user's token after its end too. Where it does not (or
    the token was revoked), the service's own user goes on, if it sees the image: that takes the role `admin`.

    A service says how it does it:

    _request(context, method, path, kwargs)   Glance's answer
    _own_login()                              the login of the service's own user; None where there is none
    """

    #: What `_request` raises when there is no such image, and when Glance does not take the token.
    NOT_FOUND = UNAUTHORIZED = ()

    def __init__(self, context, image_id):
        self.id = image_id
        #: Whose token Glance takes now.
        self.context = context
        self._own = None

    def read(self):
        record = self._call('get')
        if self._own is None:
            self._own = self._find_own()
        return record

    def tag(self, tag):
        self._call('put', self._tag_path(tag))

    def untag(self, tag):
        try:
            self._call('delete', self._tag_path(tag))
        except handover.Gone:
            # the tag is; the image tells when it is read again
            pass

    def strip(self, names):
        self._patch([{'op': 'remove', 'path': pointer(name)} for name in names])

    @staticmethod
    def _tag_path(tag):
        # The image's owner can plant any tag. One with `/../` in it would make this call another one, and it may be
        # made with the service's own token.
        return '/tags/' + parse.quote(tag, safe=':@')

    def _patch(self, changes):
        self._call('patch', headers=PATCH, data=json.dumps(changes))

    def _call(self, method, path='', **kwargs):
        try:
            return self._send(self.context, method, path, **kwargs)
        except self.UNAUTHORIZED:
            if not self._own or self.context.user_auth_plugin is self._own:
                raise
        LOG.info('image %s: the token of the user who makes it is over, the service goes on with its own', self.id)
        self._go_on_as(self._own)
        return self._send(self.context, method, path, **kwargs)

    def _go_on_as(self, login):
        self.context = self._as(login)

    def _as(self, login):
        context = copy.copy(self.context)
        context.user_auth_plugin = login
        return context

    def _send(self, context, method, path, **kwargs):
        try:
            return self._request(context, method, '/v2/images/%s%s' % (self.id, path), kwargs)
        except self.NOT_FOUND:
            raise handover.Gone()

    def _find_own(self):
        """The login of the service's own user; False when there is none, or it does not see the image."""
        try:
            login = self._own_login()
            if not login:
                return False
            self._send(self._as(login), 'get', '')
            return login
        except Exception as error:
            LOG.debug('image %s: the service\'s own user does not see it: %s', self.id, handover.printable(error))
            return False
