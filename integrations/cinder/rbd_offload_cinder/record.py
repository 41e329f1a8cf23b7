"""An image's record, through Cinder's own client of Glance."""

from cinder.image import glance
from cinder import service_auth
import glanceclient.exc
from keystoneauth1 import loading
from oslo_config import cfg

from rbd_offload_cinder import glance_record


class ImageRecord(glance_record.ImageRecord):
    """Cinder's own user is that of `[glance]` or else `[service_user]`."""

    NOT_FOUND = glanceclient.exc.NotFound
    UNAUTHORIZED = glanceclient.exc.Unauthorized

    def __init__(self, context, image_id):
        super().__init__(context, image_id)
        self._glance = glance.GlanceClientWrapper()

    def _request(self, context, method, path, kwargs):
        _response, body = self._glance.call(context, method, path, controller='http_client', **kwargs)
        return body

    def _own_login(self):
        login = None
        # Cinder before 27 (2025.2) has no such section
        section = getattr(cfg.CONF, 'glance', None)
        if getattr(section, 'auth_type', None):
            login = loading.load_auth_from_conf_options(cfg.CONF, 'glance')
        return login or service_auth.get_service_auth_plugin()
