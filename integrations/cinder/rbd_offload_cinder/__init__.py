"""Cinder hands the upload of its RBD volumes over to rbd-offload.

`volume_driver = rbd_offload_cinder.RBDOffloadDriver` in the section of a backend.
"""

from rbd_offload_cinder.driver import RBDOffloadDriver

__all__ = ('RBDOffloadDriver',)
