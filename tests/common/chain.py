"""Random chains of images for tests/ceph.rs: chain.py CONF KEYRING.

Each line of the input is a request in JSON, each line of the output its answer.

  {"make": SEED, "name": NAME}      makes a chain of up to three layers; the last is a volume with a protected
                                    snapshot `s`
  {"check": IMAGE, "name": NAME}    compares an image with the snapshot, byte by byte, and checks its shape
  {"open": KIND, "image": IMAGE, "name": NAME}
                                    starts a reader of `images/IMAGE` and its snapshot `snap`: a `download` opens the
                                    snapshot read-only, a `child` opens a clone of it read-only, a `guest` opens a
                                    clone and writes into it too. It keeps its image open and compares what it reads
  {"hold": VOLUME}                  opens a volume for changes and keeps it open
  {"release": NAME}                 overwrites the whole volume, then removes it
  {"close": NAME}                   each reader reads every byte once more, then closes; answers what each one found
  {"clean": NAME}                   removes all images of this name

The same seed makes the same chain. A model in memory says what a snapshot must hold; the snapshot is also read through
Debian's own librbd bindings.
"""

import json
import os
import random
import sys
import threading
import time

import rados
import rbd

K, M = 1 << 10, 1 << 20
LAYERING, STRIPING, LOCK, MAP, DIFF, DEEP, OPERATIONS = 1, 2, 4, 8, 16, 32, 256
PUBLISHED = LAYERING | LOCK | MAP | DIFF | DEEP
POOLS = ('images', 'volumes', 'volumes2')

conf, keyring = sys.argv[1:3]
cluster = rados.Rados(conffile=conf, name='client.admin', conf=dict(keyring=keyring, rbd_cache='false'))
cluster.connect()
# discards are not cut to a granularity: the model is exact
cluster.conf_set('rbd_skip_partial_discard', 'false')
io = {pool: cluster.open_ioctx(pool) for pool in POOLS}
data_io = cluster.open_ioctx('ecdata')
chains = {}


class Layer:
    """An image, with what it must hold."""

    def __init__(self, random, pool, name, parent=None):
        self.random, self.pool, self.name = random, pool, name
        self.features = random.choice((LAYERING, LAYERING, LAYERING | LOCK, LAYERING | DEEP, LAYERING | LOCK | MAP,
                                       PUBLISHED & ~DEEP, PUBLISHED, PUBLISHED))
        self.order = random.choice((16, 18, 20))
        unit = count = 0
        if parent is not None and random.random() < 0.75:
            self.order = parent.order
            self.striping = parent.striping
        else:
            is_striped = random.random() < 0.15
            self.striping = (1 << random.choice((12, 14, 16)), random.choice((2, 3))) if is_striped else (0, 0)
        unit, count = self.striping
        features = self.features | (STRIPING if count else 0)
        data_pool = 'ecdata' if random.random() < 0.12 else None
        self.log = ['%s/%s features %d order %d striping %s data pool %s' % (
            pool, name, features, self.order, self.striping, data_pool)]
        if parent is None:
            size = random.randrange(1, 8 * M) if random.random() < 0.3 else random.randrange(1, 129) * 64 * K
            rbd.RBD().create(io[pool], name, size, self.order, old_format=False, features=features, stripe_unit=unit,
                             stripe_count=count, data_pool=data_pool)
            self.bytes = bytearray(size)
        else:
            cluster.conf_set('rbd_default_clone_format', str(random.choice((1, 1, 2))))
            rbd.RBD().clone(io[parent.pool], parent.name, 's', io[pool], name, features=features, order=self.order,
                            stripe_unit=unit, stripe_count=count, data_pool=data_pool)
            self.bytes = bytearray(parent.at_snapshot)
        self.snapshots = 0

    def open(self):
        return rbd.Image(io[self.pool], self.name)

    def say(self, *what):
        self.log.append(' '.join(str(part) for part in what))

    def place(self):
        """Where something happens: objects, parts of objects, anything."""
        size, object_size = len(self.bytes), 1 << self.order
        kind = self.random.random()
        if kind < 0.45:
            start = self.random.randrange(0, size // object_size + 1) * object_size
            length = self.random.randrange(1, 5) * object_size
        elif kind < 0.7:
            start = self.random.randrange(0, size // 4096 + 1) * 4096
            length = self.random.randrange(1, 33) * 4096
        else:
            start, length = self.random.randrange(0, size), self.random.randrange(1, 2 * object_size)
        start = min(start, size - 1)
        return start, min(length, size - start)

    def change(self, image):
        """One random change. The model follows."""
        random, size = self.random, len(self.bytes)
        kinds = ('write', 'fill', 'discard', 'zero', 'halves', 'resize', 'snapshot', 'unsnapshot', 'maps', 'rebuild')
        kind = random.choices(kinds, (28, 5, 24, 8, 6, 12, 6, 4, 9, 4))[0]
        if kind == 'resize':
            to = random.choice((random.randrange(1, size + 1), random.randrange(size, size + 2 * M),
                                random.randrange(1, 129) * 64 * K))
            self.say('resize', size, to)
            image.resize(to)
            del self.bytes[to:]
            self.bytes.extend(bytes(to - len(self.bytes)))
        elif kind == 'snapshot':
            self.snapshots += 1
            self.say('snapshot', self.snapshots)
            image.create_snap('x%d' % self.snapshots)
        elif kind == 'unsnapshot':
            names = [s['name'] for s in image.list_snaps() if s['name'].startswith('x')]
            if names:
                name = random.choice(names)
                self.say('remove snapshot', name)
                image.remove_snap(name)
        elif kind == 'maps':
            if image.features() & MAP:
                if image.features() & DIFF and random.random() < 0.5:
                    self.say('disable fast-diff')
                    image.update_features(DIFF, False)
                else:
                    self.say('disable maps')
                    image.update_features(image.features() & (MAP | DIFF), False)
            else:
                both = random.random() < 0.8
                self.say('enable maps' if both else 'enable object-map')
                if not image.features() & LOCK:
                    image.update_features(LOCK, True)
                image.update_features(MAP | (DIFF if both else 0), True)
        elif kind == 'rebuild':
            if image.features() & MAP:
                self.say('rebuild')
                image.rebuild_object_map()
        else:
            start, length = (0, size) if kind == 'fill' else self.place()
            self.say(kind, start, length)
            if kind in ('write', 'fill'):
                data = random.randbytes(length)
                image.write(data, start)
                self.bytes[start:start + length] = data
            elif kind == 'halves':
                half = max(length // 2, 1)
                image.discard(start, half)
                if length > half:
                    image.discard(start + half, length - half)
                self.bytes[start:start + length] = bytes(length)
            elif kind == 'zero' and hasattr(image, 'write_zeroes'):
                image.write_zeroes(start, length)
                self.bytes[start:start + length] = bytes(length)
            else:
                image.discard(start, length)
                self.bytes[start:start + length] = bytes(length)

    def work(self, changes):
        with self.open() as image:
            for _ in range(changes):
                # a client that opens the image again reads its maps again
                self.change(image)


def make(make, name):
    choice = random.Random(make)
    layers = []
    for depth in range(choice.choices((1, 2, 3), (1, 4, 5))[0]):
        pool = choice.choice(POOLS)
        layer = Layer(choice, pool, '%s-%d' % (name, depth), layers[-1] if layers else None)
        layers.append(layer)
        if depth == 0 or choice.random() < 0.3:
            with layer.open() as image:
                start, length = (0, len(layer.bytes)) if depth == 0 and choice.random() < 0.7 else layer.place()
                layer.say('write', start, length)
                data = choice.randbytes(length)
                image.write(data, start)
                layer.bytes[start:start + length] = data
        layer.work(choice.randrange(0, 4) if depth == 0 else choice.randrange(1, 8))
        with layer.open() as image:
            image.create_snap('s')
            image.protect_snap('s')
        layer.at_snapshot = bytes(layer.bytes)
        # what comes later must not show
        if choice.random() < 0.3:
            layer.say('after the snapshot:')
            layer.work(choice.randrange(1, 4))
    top = layers[-1]
    chains[name] = (top, [line for layer in layers for line in layer.log])
    with rbd.Image(io[top.pool], top.name, 's', read_only=True) as image:
        wrong = difference(read(image), top.at_snapshot)
    return {'pool': top.pool, 'image': top.name, 'layers': len(layers), 'difference': wrong}


def read(image):
    size, parts = image.size(), []
    for at in range(0, size, 4 * M):
        parts.append(image.read(at, min(4 * M, size - at)))
    return b''.join(parts)


def difference(found, expected):
    if found == expected:
        return None
    if len(found) != len(expected):
        return '%d bytes instead of %d' % (len(found), len(expected))
    return 'byte %d' % next(n for n, (a, b) in enumerate(zip(found, expected)) if a != b)


def map_states(image, object_name):
    """The object map: four bytes length, header (the last 8 bytes are the number of objects), two bits an object."""
    _, answer = io['images'].execute(object_name, 'rbd', 'object_map_load', b'')
    states = answer[4 + int.from_bytes(answer[:4], 'little'):]
    return [states[number // 4] >> (6 - 2 * (number % 4)) & 3 for number in range(image.stat()['num_objs'])]


def check(check, name, snapshots=()):
    """What is wrong with `images/CHECK`, which has these snapshots, as a copy of the chain's: a list of sentences."""
    top, wrong = chains[name][0], []
    with rbd.Image(io['images'], check, read_only=True) as image:
        first = difference(read(image), top.at_snapshot)
        if first:
            wrong.append('other than the model: ' + first)
        if name not in released:
            with rbd.Image(io[top.pool], top.name, 's', read_only=True) as source:
                first = difference(read(image), read(source))
            if first:
                wrong.append('other than the source: ' + first)
        try:
            image.parent_info()
            wrong.append('it has a parent')
        except rbd.ImageNotFound:
            pass
        # (a clone of format 2 sets a feature bit on its parent)
        if image.features() & ~(STRIPING | OPERATIONS) != PUBLISHED:
            wrong.append('features %d' % image.features())
        if image.flags():
            wrong.append('flags %d' % image.flags())
        listed = list(image.list_snaps())
        if [snapshot['name'] for snapshot in listed] != list(snapshots):
            wrong.append('its snapshots are %s' % [snapshot['name'] for snapshot in listed])
        prefix = image.stat()['block_name_prefix']
        maps = ['rbd_object_map.' + image.id()]
        maps += ['rbd_object_map.%s.%016x' % (image.id(), snapshot['id']) for snapshot in listed]
        for object_name in maps:
            for number, state in enumerate(map_states(image, object_name)):
                try:
                    io['images'].stat('%s.%016x' % (prefix, number))
                    there = True
                except rados.ObjectNotFound:
                    there = False
                if (state != 0) != there:
                    wrong.append('object %d: %s says %d' % (number, object_name, state))
                    break
    for snapshot in listed:
        with rbd.Image(io['images'], check, snapshot['name'], read_only=True) as image:
            first = difference(read(image), top.at_snapshot)
            if first:
                wrong.append('%s is other than the model: %s' % (snapshot['name'], first))
            if image.flags():
                wrong.append('%s has flags %d' % (snapshot['name'], image.flags()))
            try:
                image.parent_info()
                wrong.append('%s has a parent' % snapshot['name'])
            except rbd.ImageNotFound:
                pass
    return wrong


class Reader(threading.Thread):
    """A client that opens an image early and keeps it open."""

    def __init__(self, kind, image, name, number):
        super().__init__(daemon=True)
        self.kind, self.opened_at, self.random = kind, time.monotonic(), random.Random('%s %d' % (name, number))
        self.expected = bytearray(chains[name][0].at_snapshot)
        self.reads, self.writes, self.wrong, self.stop = 0, 0, [], threading.Event()
        if kind == 'download':
            self.image = rbd.Image(io['images'], image, 'snap', read_only=True)
        else:
            child = '%s-zz%d' % (name, number)
            cluster.conf_set('rbd_default_clone_format', str(self.random.choice((1, 2))))
            rbd.RBD().clone(io['images'], image, 'snap', io['volumes'], child,
                            features=self.random.choice((PUBLISHED, LAYERING)))
            self.image = rbd.Image(io['volumes'], child, read_only=kind == 'child')

    def compare(self, start, length):
        found, expected = self.image.read(start, length), self.expected[start:start + length]
        self.reads += 1
        if found != expected:
            first = start + next((n for n, (a, b) in enumerate(zip(found, expected)) if a != b), len(found))
            self.wrong.append('%s: read %d of %d bytes: byte %d' % (self.kind, self.reads, length, first))

    def run(self):
        try:
            self.work()
        except Exception as error:
            self.wrong.append('%s: %r' % (self.kind, error))

    def work(self):
        size = len(self.expected)
        while not self.stop.is_set() and len(self.wrong) < 10:
            start = self.random.randrange(0, size)
            length = min(size - start, self.random.choice((1, 512, 4096, self.random.randrange(1, 128 * K))))
            if self.kind == 'guest' and self.random.random() < 0.2:
                data = self.random.randbytes(min(length, 8192))
                self.image.write(data, start)
                self.expected[start:start + len(data)] = data
                self.writes += 1
            self.compare(start, length)
            # reads at a low rate, since the other tests need the cores too
            self.stop.wait(0.02)
        for start in range(0, size, 256 * K):
            if len(self.wrong) < 10:
                self.compare(start, min(256 * K, size - start))
        self.image.close()


readers, released, held = {}, set(), []


def hold(hold):
    held.append(rbd.Image(io['volumes'], hold))
    return None


def start_reader(open, image, name):
    reader = Reader(open, image, name, len(readers.setdefault(name, [])))
    readers[name].append(reader)
    reader.start()
    return None


def release(release):
    top = chains[release][0]
    with top.open() as image:
        for snapshot in list(image.list_snaps()):
            if snapshot['namespace'] == rbd.RBD_SNAP_NAMESPACE_TYPE_USER:
                if image.is_protected_snap(snapshot['name']):
                    image.unprotect_snap(snapshot['name'])
                image.remove_snap(snapshot['name'])
        for at in range(0, image.size(), M):
            image.write(bytes((255,)) * min(M, image.size() - at), at)
    rbd.RBD().remove(io[top.pool], top.name)
    released.add(release)
    return None


def close(close):
    found = readers.pop(close, [])
    for reader in found:
        reader.stop.set()
    for reader in found:
        reader.join()
    return [{'kind': r.kind, 'reads': r.reads, 'writes': r.writes, 'wrong': r.wrong} for r in found]


def clean(clean):
    released.discard(clean)
    chains.pop(clean, None)
    for _ in range(8):
        left = 0
        for pool in POOLS:
            for name in sorted((name for name in rbd.RBD().list(io[pool]) if clean in name), reverse=True):
                try:
                    with rbd.Image(io[pool], name) as image:
                        for snapshot in list(image.list_snaps()):
                            if snapshot['namespace'] == rbd.RBD_SNAP_NAMESPACE_TYPE_TRASH:
                                continue
                            if image.is_protected_snap(snapshot['name']):
                                image.unprotect_snap(snapshot['name'])
                            image.remove_snap(snapshot['name'])
                    rbd.RBD().remove(io[pool], name)
                except (rbd.ImageBusy, rbd.ImageHasSnapshots, rbd.OSError):
                    left += 1
        if not left:
            return None
    raise SystemExit('images of %s could not be removed' % clean)


for line in sys.stdin:
    request = json.loads(line)
    functions = {'make': make, 'check': check, 'open': start_reader, 'hold': hold, 'release': release, 'close': close,
                 'clean': clean}
    function = next(functions[name] for name in functions if name in request)
    answer = function(**request)
    log = chains[request['name']][1] if request.get('name') in chains else []
    sys.stdout.write(json.dumps({'answer': answer, 'log': log}) + '\n')
    sys.stdout.flush()
# without the end of the interpreter, in which librados may still be at work
os._exit(0)
