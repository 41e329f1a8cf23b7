"""An image's record, through Nova's own client of Glance."""

import glanceclient.exc
from nova import service_auth
from nova.image import glance

from rbd_offload_nova import glance_record


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
        return service_auth.get_service_auth_plugin('service_user')
