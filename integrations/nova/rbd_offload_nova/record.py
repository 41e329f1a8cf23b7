"""An image's record, through Nova's own client of Glance."""

import functools

import glanceclient.exc
from keystoneauth1 import loading
from nova.image import glance
from oslo_config import cfg

from rbd_offload_nova import glance_record


@functools.lru_cache(maxsize=None)
def _service_user():
    """One login, which keeps its token from one snapshot to the next. Nova has a function for it since 33 (2026.1)."""
    return loading.load_auth_from_conf_options(cfg.CONF, 'service_user')


class ImageRecord(glance_record.ImageRecord):
    """Nova's own user is that of `[service_user]`."""

    NOT_FOUND = glanceclient.exc.NotFound
    UNAUTHORIZED = glanceclient.exc.Unauthorized

    def __init__(self, context, image_id):
        super().__init__(context, image_id)
        self._glance = glance.GlanceClientWrapper()

    def prepare(self, attributes, properties):
        """Sets Glance's own attributes and properties."""
        def change(op, values):
            return [{'op': op, 'path': glance_record.pointer(name), 'value': value} for name, value in values.items()]

        self._patch(change('replace', attributes) + change('add', properties))

    def _go_on_as(self, login):
        # for the rest of the snapshot too, which would fail otherwise
        self.context.user_auth_plugin = login

    def _request(self, context, method, path, kwargs):
        _response, body = self._glance.call(context, 2, method, controller='http_client', args=(path,), kwargs=kwargs)
        return body

    def _own_login(self):
        return _service_user()
