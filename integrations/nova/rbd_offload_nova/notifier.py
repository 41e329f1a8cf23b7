"""The way into nova-compute: a driver of notifications that sends none.

oslo.messaging makes it wherever this nova.conf is read, and calls it for each notification. One comes before each
snapshot (`snapshot.start`, or `shelve.start`), at which time nova-compute has imported what there is to wrap; other
processes never do.
"""

from oslo_messaging.notify import notifier

from rbd_offload_nova import snapshot


class Notifier(notifier.Driver):

    def __init__(self, conf, *args, **kwargs):
        super().__init__(conf, *args, **kwargs)
        snapshot.register_options(conf)
        snapshot.install(conf)

    def notify(self, ctxt, msg, priority, retry=None):
        snapshot.install(self.conf)
