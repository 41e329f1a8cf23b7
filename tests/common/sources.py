# Functions for the Python code that prepares sources for tests/ceph.rs. It follows serve.py. A request holds code, and
# the name for the images that the code makes.

import random

M = 1 << 20
DEFAULT = 1 | 4 | 8 | 16 | 32
def io(pool): return cluster.open_ioctx(pool)
def create(pool, name, size, order=22, features=DEFAULT, unit=0, count=0, data_pool=None):
    rbd.RBD().create(io(pool), name, size, order, old_format=False, features=features, stripe_unit=unit,
                     stripe_count=count, data_pool=data_pool)
def write(pool, name, offset, length, seed):
    with rbd.Image(io(pool), name) as image:
        data = random.Random(seed).randbytes(length)
        for at in range(0, length, M):
            image.write(data[at:at + M], offset + at)
def discard(pool, name, offset, length):
    with rbd.Image(io(pool), name) as image: image.discard(offset, length)
def resize(pool, name, size):
    with rbd.Image(io(pool), name) as image: image.resize(size)
def snap(pool, name, snapshot):
    with rbd.Image(io(pool), name) as image:
        image.create_snap(snapshot); image.protect_snap(snapshot)
def clone(pool, name, snapshot, to_pool, to, order=None, features=DEFAULT, **options):
    rbd.RBD().clone(io(pool), name, snapshot, io(to_pool), to, features=features, order=order, **options)
def trash(pool, name): rbd.RBD().trash_move(io(pool), name)
def data(pool, name, snapshot=None):
    with rbd.Image(io(pool), name, snapshot, read_only=True) as image:
        size = image.size()
        for at in range(0, size, 4 * M):
            sys.stdout.buffer.write(image.read(at, min(4 * M, size - at)))
def clean():
    for _ in range(8):
        left = 0
        for pool in ('images', 'volumes', 'volumes2', 'vms'):
            for entry in rbd.RBD().trash_list(io(pool)):
                if NAME in entry['name']:
                    rbd.RBD().trash_restore(io(pool), entry['id'], entry['name'])
            for name in rbd.RBD().list(io(pool)):
                if NAME not in name: continue
                try:
                    with rbd.Image(io(pool), name) as image:
                        for snapshot in list(image.list_snaps()):
                            if image.is_protected_snap(snapshot['name']): image.unprotect_snap(snapshot['name'])
                            image.remove_snap(snapshot['name'])
                    rbd.RBD().remove(io(pool), name)
                except (rbd.ImageBusy, rbd.ImageHasSnapshots, rbd.OSError): left += 1
        if not left: return
    raise SystemExit('images of ' + NAME + ' could not be removed')
def run(request):
    global cluster, NAME
    cluster, NAME = connect(*sys.argv[1:3]), request['name']
    exec(request['code'], globals())
