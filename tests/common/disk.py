# What the tests do to Ceph by hand. It follows serve.py. A request is a function and its arguments; the answer is JSON.

import hashlib
import random
import struct

MIB = 1 << 20
CHUNK = 64 << 10
POOLS = ('images', 'volumes', 'volumes2', 'vms', 'ecdata')
FEATURES = (rbd.RBD_FEATURE_LAYERING | rbd.RBD_FEATURE_EXCLUSIVE_LOCK | rbd.RBD_FEATURE_OBJECT_MAP
            | rbd.RBD_FEATURE_FAST_DIFF | rbd.RBD_FEATURE_DEEP_FLATTEN)
# What a pool has once it was used, and keeps.
STANDING = {'rbd_directory', 'rbd_children', 'rbd_info', 'rbd_trash', 'rbd_task'}


def open_pool(pool, namespace=''):
    io = cluster.open_ioctx(pool)
    io.set_namespace(namespace)
    return io


def write(pool, image, extents):
    """Random bytes; an extent is [offset, length, seed]."""
    with rbd.Image(open_pool(pool), image) as disk:
        for offset, length, seed in extents:
            data = random.Random(seed).randbytes(length)
            for at in range(0, length, MIB):
                disk.write(data[at:at + MIB], offset + at)


def put(pool, image, offset, hex):
    """These very bytes."""
    with rbd.Image(open_pool(pool), image) as disk:
        disk.write(bytes.fromhex(hex), offset)


def resize(pool, image, size):
    with rbd.Image(open_pool(pool), image) as disk:
        disk.resize(size)


def create(pool, image, size, order=22):
    rbd.RBD().create(open_pool(pool), image, size, order, old_format=False, features=FEATURES)


def remove(pool, image):
    """With its snapshots; nothing if it is not there."""
    try:
        with rbd.Image(open_pool(pool), image) as disk:
            for snapshot in list(disk.list_snaps()):
                if disk.is_protected_snap(snapshot['name']):
                    disk.unprotect_snap(snapshot['name'])
                disk.remove_snap(snapshot['name'])
        rbd.RBD().remove(open_pool(pool), image)
    except rbd.ImageNotFound:
        pass


def make_snapshot(pool, image, snapshot):
    """Made and protected."""
    with rbd.Image(open_pool(pool), image) as disk:
        disk.create_snap(snapshot)
        disk.protect_snap(snapshot)


def leave(pool, image, key, tag):
    """An image that a daemon could have left, with this ownership tag if there is one."""
    create(pool, image, 8 * MIB)
    if tag is not None:
        with rbd.Image(open_pool(pool), image) as disk:
            disk.metadata_set(key, tag)


def leave_snapshot(pool, image, snapshot, tag):
    """A snapshot that a daemon could have left, with this ownership tag beside the image's header."""
    with rbd.Image(open_pool(pool), image, read_only=True) as disk:
        header = 'rbd_header.' + disk.id()
    open_pool(pool).set_xattr(header, snapshot, tag.encode())
    make_snapshot(pool, image, snapshot)


def snapshot_tags(pool, image):
    """The ownership tags beside the image's header, by snapshot."""
    with rbd.Image(open_pool(pool), image, read_only=True) as disk:
        header = 'rbd_header.' + disk.id()
    found = open_pool(pool).get_xattrs(header)
    return {name: value.decode() for name, value in found if name.startswith('rbd-offload.')}


def deployment(pool, namespace):
    """Id of the deployment that a jobs namespace belongs to."""
    return open_pool(pool, namespace).read('deployment', MIB).decode()


def put_object(pool, namespace, name, text):
    open_pool(pool, namespace).write_full(name, text.encode())


def remove_snapshot(pool, image, snapshot):
    with rbd.Image(open_pool(pool), image) as disk:
        disk.unprotect_snap(snapshot)
        disk.remove_snap(snapshot)


def digest(pool, image, snapshot=None):
    """Size and a hash of all bytes; holes and zeros are the same."""
    whole, zeros = hashlib.blake2b(), bytes(CHUNK)
    with rbd.Image(open_pool(pool), image, snapshot, read_only=True) as disk:
        size = disk.size()
        for at in range(0, size, 8 * MIB):
            data = disk.read(at, min(8 * MIB, size - at))
            if data == bytes(len(data)):
                continue
            for start in range(0, len(data), CHUNK):
                chunk = data[start:start + CHUNK]
                if chunk != zeros[:len(chunk)]:
                    whole.update((at + start).to_bytes(8, 'big'))
                    whole.update(chunk)
    return {'size': size, 'hash': whole.hexdigest()}


def facts(pool, image):
    """What RBD tells of an image; null if it is not there."""
    try:
        with rbd.Image(open_pool(pool), image, read_only=True) as disk:
            try:
                parent = list(disk.parent_info())
            except rbd.ImageNotFound:
                parent = None
            lockers, snapshots = disk.list_lockers(), list(disk.list_snaps())
            data_pool = cluster.pool_reverse_lookup(disk.data_pool_id())
            return {
                'id': disk.id(), 'size': disk.size(), 'features': disk.features(), 'flags': disk.flags(),
                'parent': parent, 'metadata': dict(disk.metadata_list()),
                'snapshots': {s['name']: disk.is_protected_snap(s['name']) for s in snapshots if 'trash' not in s},
                'trashed': [s['trash']['original_name'] for s in snapshots if 'trash' in s],
                'lockers': len(lockers['lockers']) if lockers else 0,
                'data_pool': data_pool if data_pool != pool else None,
            }
    except rbd.ImageNotFound:
        return None


def job(pool, namespace, image):
    """The job's record; null if there is none."""
    try:
        return json.loads(open_pool(pool, namespace).read('job.' + image, MIB))
    except rados.ObjectNotFound:
        return None


def jobs(pool, namespace):
    """All records of a namespace: what state each image's job is in."""
    io, states = open_pool(pool, namespace), {}
    for entry in io.list_objects():
        if entry.key.startswith('job.'):
            states[entry.key[4:]] = json.loads(io.read(entry.key, MIB)).get('state')
    return states


def leases(pool, namespace, expired):
    """Objects of a namespace on which a client holds a cls lock; those too, if asked for, of which the time ran out."""
    io, held = open_pool(pool, namespace), []
    for entry in io.list_objects():
        for name, value in io.get_xattrs(entry.key):
            if not name.startswith('lock.'):
                continue
            if not expired:
                # cls_lock leaves out expired holders
                name = name[len('lock.'):].encode()
                request = struct.pack('<BBII', 1, 1, 4 + len(name), len(name)) + name
                value = io.execute(entry.key, 'lock', 'get_info', request)[1]
            # the lock and the answer begin with version, compatible version, length (4 bytes) and the number of holders
            if int.from_bytes(value[6:10], 'little'):
                held.append(entry.key)
    return held


def forget(pool, namespace):
    """Removes all objects of a namespace."""
    io = open_pool(pool, namespace)
    for entry in list(io.list_objects()):
        io.remove_object(entry.key)


def each(function, arguments):
    """One function for many arguments."""
    return [globals()[function](**one) for one in arguments]


def omap_keys(io, name):
    try:
        with rados.ReadOpCtx() as op:
            entries, _ = io.get_omap_vals(op, '', '', 100000)
            io.operate_read_op(op, name)
            return [key for key, _ in entries]
    except rados.ObjectNotFound:
        return []


def census():
    """Everything that could be left behind, as a flat set of sentences."""
    found = []
    for pool in POOLS:
        io = open_pool(pool, rados.LIBRADOS_ALL_NSPACES)
        for entry in io.list_objects():
            if entry.key not in STANDING:
                found.append('object %s/%s/%s' % (pool, entry.nspace, entry.key))
        if pool == 'ecdata':
            continue
        io = open_pool(pool)
        for name in ('rbd_children', 'rbd_trash'):
            found += ['%s/%s has %r' % (pool, name, key) for key in omap_keys(io, name)]
        for image in rbd.RBD().list(io):
            found.append('image %s/%s' % (pool, image))
            try:
                with rbd.Image(io, image, read_only=True) as disk:
                    for snapshot in disk.list_snaps():
                        found.append('snapshot %s/%s@%s' % (pool, image, snapshot['name']))
                    locked = disk.list_lockers()
                    if locked and locked['lockers']:
                        found.append('lock on %s/%s' % (pool, image))
                    # this handle does not watch: it reads only
                    found += ['watcher of %s/%s: %s' % (pool, image, w['addr']) for w in disk.watchers_list()]
            except rbd.ImageNotFound:
                pass
    return sorted(found)


def run(request):
    global cluster
    cluster = connect(*sys.argv[1:3])
    json.dump(globals()[request['function']](**request['arguments']), sys.stdout)
