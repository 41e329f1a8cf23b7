"""What the benchmarks do to RBD by hand: disk.py CONF KEYRING FUNCTION ARGUMENTS (JSON); answers in JSON."""

import json
import os
import random
import sys
import time

import rados
import rbd

MIB = 1 << 20


def spread(pool, image, bytes, piece):
    """Random data in pieces, spread evenly over the disk."""
    with rbd.Image(cluster.open_ioctx(pool), image) as disk:
        count = max(1, bytes // piece)
        step = max(piece, disk.size() // count // piece * piece)
        pending = []
        for n in range(count):
            for at in range(0, piece, MIB):
                length = min(MIB, piece - at)
                pending.append(disk.aio_write(os.urandom(length), n * step + at, lambda _: None))
                if len(pending) >= 32:
                    pending.pop(0).wait_for_complete_and_cb()
        for completion in pending:
            completion.wait_for_complete_and_cb()


def write_until_told(pool, image):
    """Writes 4 KiB at random places, one at a time, until standard input ends; when each began and how long it took."""
    import select
    samples, data = [], os.urandom(4096)
    with rbd.Image(cluster.open_ioctx(pool), image) as disk:
        blocks = disk.size() // 4096
        while not select.select([sys.stdin], [], [], 0)[0]:
            place = random.randrange(blocks) * 4096
            began, clock = time.time(), time.perf_counter()
            disk.write(data, place)
            samples.append((round(began, 4), round(time.perf_counter() - clock, 6)))
    return samples


conf, keyring, function, arguments = sys.argv[1:5]
cluster = rados.Rados(conffile=conf, name='client.admin', conf=dict(keyring=keyring, rbd_cache='false'))
cluster.connect()
json.dump(globals()[function](**json.loads(arguments)), sys.stdout)
sys.stdout.flush()
os._exit(0)
