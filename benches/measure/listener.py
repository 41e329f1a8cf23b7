"""A listener as other projects have it: oslo.messaging, which drops what it does not want.

listener.py URL EXCHANGE POOL: says "ready", then after each line of input how many notifications it has seen.
"""

import sys

from oslo_config import cfg
import oslo_messaging


class Endpoint:
    seen = 0

    def info(self, context, publisher_id, event_type, payload, metadata):
        Endpoint.seen += 1
        if event_type == 'image.create' and 'rbd-offload' in str(payload.get('tags')):
            print(payload['id'], file=sys.stderr)

    error = warn = info


url, exchange, pool = sys.argv[1:4]
conf = cfg.ConfigOpts()
conf([])
transport = oslo_messaging.get_notification_transport(conf, url=url)
targets = [oslo_messaging.Target(topic='notifications', exchange=exchange)]
listener = oslo_messaging.get_notification_listener(transport, targets, [Endpoint()], executor='threading', pool=pool)
listener.start()
print('ready', flush=True)
for line in sys.stdin:
    print(Endpoint.seen, flush=True)
listener.stop()
