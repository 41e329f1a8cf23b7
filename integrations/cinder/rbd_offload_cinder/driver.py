"""Cinder's RBD driver, with one way more to upload a volume."""

from cinder import exception
from cinder.volume import configuration
from cinder.volume.drivers import rbd
from cinder.volume import volume_utils
from oslo_config import cfg
from oslo_log import log as logging

from rbd_offload_cinder import handover
from rbd_offload_cinder import record

LOG = logging.getLogger(__name__)

OFFLOAD_OPTS = [
    cfg.IntOpt('rbd_offload_claim_timeout', default=10, min=1,
               help='Seconds for an rbd-offload daemon to take an upload; then Cinder takes the native path.'),
    cfg.IntOpt('rbd_offload_start_timeout', default=30, min=1,
               help='Seconds for the copy to start, after which Cinder does the upload itself.'),
    cfg.IntOpt('rbd_offload_stall_timeout', default=120, min=1,
               help='Seconds without any sign of progress, after which Cinder does the upload itself.'),
    cfg.IntOpt('rbd_offload_timeout', default=21600, min=1,
               help='Seconds for an upload in all, after which Cinder takes the native path.'),
    cfg.IntOpt('rbd_offload_commit_timeout', default=300, min=1,
               help='Seconds for a copy that is ready to become an active image.'),
]

cfg.CONF.register_opts(OFFLOAD_OPTS, group=configuration.SHARED_CONF_GROUP)


class RBDOffloadDriver(rbd.RBDDriver):
    """Offers each upload as raw and bare to rbd-offload. All others, and those that the daemon declines, take the
    native path."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.configuration.append_config_values(OFFLOAD_OPTS)

    @classmethod
    def get_driver_options(cls):
        return super().get_driver_options() + OFFLOAD_OPTS

    def copy_volume_to_image(self, context, volume, image_service, image_meta):
        if self._is_offered(volume, image_meta):
            image = record.ImageRecord(context, image_meta['id'])
            try:
                if self._hand_over(context, volume, image):
                    return
            except handover.Gone:
                raise exception.ImageNotFound(image_id=image_meta['id']) from None
            # the user's token may have expired meanwhile
            context = image.context
        super().copy_volume_to_image(context, volume, image_service, image_meta)

    @staticmethod
    def _is_offered(volume, image_meta):
        if (image_meta.get('disk_format'), image_meta.get('container_format')) != ('raw', 'bare'):
            return False
        # the volume's type asks for a Glance store, which may not be in Ceph: Cinder uploads it itself
        return not (volume.volume_type and 'image_service:store_id' in (volume.volume_type.extra_specs or {}))

    def _hand_over(self, context, volume, image):
        """Whether the image is active."""
        try:
            fsid = self._get_fsid()
        except Exception:
            LOG.exception('rbd-offload: the Ceph cluster does not tell its fsid', resource=volume)
            return False
        facts = {'image_id': image.id, 'fsid': fsid, 'pool': self.configuration.rbd_pool, 'rbd_image': volume.name,
                 'handover': True}

        def announce():
            volume_utils.notify_about_volume_usage(context, volume, 'upload.start', extra_usage_info=facts,
                                                   host=self.host)

        limits = handover.Limits(claim=self.configuration.rbd_offload_claim_timeout,
                                 stall=self.configuration.rbd_offload_stall_timeout,
                                 total=self.configuration.rbd_offload_timeout,
                                 commit=self.configuration.rbd_offload_commit_timeout,
                                 start=self.configuration.rbd_offload_start_timeout)
        return handover.Handover(image, handover.volume_offer(volume.id, fsid), limits).run(announce)
