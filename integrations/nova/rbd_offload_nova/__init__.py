"""Nova hands the snapshots of its RBD instances over to rbd-offload: a second `driver = rbd_offload` in the section
[oslo_messaging_notifications] of nova-compute's nova.conf."""
