"""A service's side of a hand-over: offer the image to rbd-offload, say go, wait; or fall back to the native path.
docs/explanation/handover.md is the protocol.

One file for Cinder and Nova, so it knows neither of them, nor how Glance is reached.
"""

import collections
import logging
import time

LOG = logging.getLogger(__name__)

#: Begins every tag of a hand-over.
TAGS = 'rbd-offload-handover:'
GO = TAGS + 'go'
#: Begins every property that the daemon shows its work with.
PROPERTIES = 'rbd_offload_'

#: Seconds between two polls: at first, and at most. In between a twentieth of the time that has passed.
POLL_INTERVAL = 0.5
MAX_POLL_INTERVAL = 5
#: Polls in a row without the offer on the record, after which it counts as taken off.
MISSING_OFFER_POLLS = 3
#: Seconds that a change which is on its way to Glance may take.
SETTLE = 1
#: Seconds to try to take our tags and properties off.
PATIENCE = 60
#: Characters of another program's text in one line of the log. The daemon's own messages are shorter.
SHOWN = 500
#: What the daemon says while it works or ends. Other texts are the tenant's own and are not logged as its progress.
STATES = ('accepted', 'copying', 'publishing', 'declined', 'failed')
PERCENTS = frozenset(str(percent) for percent in range(101))

#: Seconds: until a daemon must have taken the offer; without any change of the record; in all; after `go`; until the
#: copy must have started.
Limits = collections.namedtuple('Limits', 'claim stall total commit start')
Limits.__new__.__defaults__ = (10, 120, 21600, 300, 30)

ACTIVE = 'active'
PREPARED = 'prepared'


class Gone(Exception):
    """The image was deleted."""


class Fallback(Exception):
    """The reason why the service does the work itself."""


def printable(text):
    """`text` for a log. The image's owner may write anything on the record, so line ends and control characters are
    escaped, and the length is limited."""
    text = str(text)
    line = ''.join(c if c.isprintable() else c.encode('unicode_escape').decode('ascii') for c in text[:SHOWN])
    return line if len(text) <= SHOWN else line + '...'


def volume_offer(volume, fsid):
    return '%svolume:%s@%s' % (TAGS, volume, fsid)


def instance_offer(instance, fsid):
    return '%sinstance:%s@%s' % (TAGS, instance, fsid)


class _Observation:
    """What the record showed."""

    def __init__(self, record):
        self.status = record['status']
        self.tags = [tag for tag in record.get('tags') or () if tag.startswith(TAGS)]
        self.properties = {key: value for key, value in record.items() if key.startswith(PROPERTIES)}
        self.says = self.properties.get(PROPERTIES + 'status')
        self.message = self.properties.get(PROPERTIES + 'message') or 'no reason is given'
        self.progress = self.properties.get(PROPERTIES + 'progress')
        self.updated_at = record.get('updated_at')
        self.task = record.get('os_glance_import_task')

    @property
    def active(self):
        # an image is deactivated by an administrator only after it was active
        return self.status in ('active', 'deactivated')

    @property
    def declined(self):
        return self.says in ('declined', 'failed')

    @property
    def started(self):
        """Not while the job waits for its turn."""
        return self.says in ('copying', 'publishing')

    @property
    def glance_works(self):
        return bool(self.task) or self.status not in ('queued', 'killed')

    @property
    def has_our_tags(self):
        return bool(self.tags or self.properties)

    def progress_key(self):
        """What changes while the daemon works."""
        return self.status, self.says, self.progress, self.updated_at


class Handover:
    """One image. `record` is its Glance record:

    read()         the record as Glance gives it (a dict); raises Gone when there is none
    tag(tag)       adds a tag; untag(tag) takes it off
    strip(names)   takes properties off

    Every other exception of theirs means that it is not known what became of the call.
    """

    def __init__(self, record, offer, limits=Limits(), clock=time.monotonic, sleep=time.sleep):
        self._record = record
        self._offer = offer
        self._limits = limits
        self._clock = clock
        self._sleep = sleep
        self._failures = 0
        self._told = None

    def run(self, announce):
        """Hands the image over. Calls `announce`, which tells the daemons, once the offer is on the record. True: the
        image is active. False: use the native path, which also reports an image that another client writes. Raises
        Gone."""
        self._began = self._clock()
        try:
            if not self._make_offer():
                return False
            self._tell_daemons(announce)
            if self._await_prepared() == PREPARED:
                self._await_active()
        except Fallback as reason:
            LOG.info('%s: the native path: %s', self._offer, printable(reason))
            return self._retract_offer()
        LOG.info('%s: the image is active after %.1f s', self._offer, self._clock() - self._began)
        self._remove_late_changes()
        return True

    def _make_offer(self):
        """False: another client has begun to write the image, and the native path will say so."""
        try:
            seen = _Observation(self._record.read())
            if seen.status != 'queued':
                return False
            # inherited from another image, so no answer to this offer
            if seen.properties:
                self._record.strip(sorted(seen.properties))
            self._record.tag(self._offer)
        except Gone:
            raise
        except Exception as error:
            raise Fallback('the offer could not be made: %s' % error)
        return True

    def _tell_daemons(self, announce):
        try:
            announce()
        except Exception as error:
            # the daemon hears of the tag from Glance too, and its reconciler looks for it
            LOG.warning('%s: the notification was not sent: %s', self._offer, printable(error))

    def _await_prepared(self):
        # waiting: since when no copy runs; a job that was started may have to wait for its turn again
        offered = changed = waiting = self._clock()
        progress, lost = None, 0
        while True:
            seen = self._poll()
            now = self._clock()
            if seen is not None:
                if seen.active:
                    return ACTIVE
                if seen.declined:
                    raise Fallback('%s: %s' % (seen.says, seen.message))
                if seen.status != 'queued':
                    raise Fallback('another client writes the image: it is %s' % seen.status)
                if seen.says is None and now - offered >= self._limits.claim:
                    raise Fallback('no daemon took it within %s s' % self._limits.claim)
                lost = 0 if self._offer in seen.tags else lost + 1
                if lost >= MISSING_OFFER_POLLS:
                    raise Fallback('the offer was taken off the image')
                if seen.says == 'publishing' and not lost:
                    return PREPARED
                if seen.started:
                    waiting = now
                elif now - waiting >= self._limits.start:
                    raise Fallback('the copy has not started for %s s' % self._limits.start)
                if seen.progress_key() != progress:
                    progress, changed = seen.progress_key(), now
            if now - changed >= self._limits.stall:
                raise Fallback('no progress for %s s' % self._limits.stall)
            if now - self._began >= self._limits.total:
                raise Fallback('not done within %s s' % self._limits.total)
            self._pause(now - offered)

    def _await_active(self):
        said = self._clock()
        self._say_go()
        while True:
            seen = self._poll()
            now = self._clock()
            late = now - said >= self._limits.commit
            if seen is not None:
                if seen.active:
                    return
                if seen.declined:
                    raise Fallback('%s: %s' % (seen.says, seen.message))
                if late and not seen.glance_works:
                    raise Fallback('no answer for %s s after go' % self._limits.commit)
                if seen.says == 'publishing' and GO not in seen.tags:
                    # a concurrent change of the record lost it: a daemon that saw it took `publishing` off with it
                    self._say_go()
            if late and now - self._began >= self._limits.total:
                raise Fallback('not done within %s s' % self._limits.total)
            self._pause(now - said)

    def _say_go(self):
        # a lost answer counts as said, so only the polls that follow can tell
        try:
            self._record.tag(GO)
        except Gone:
            raise
        except Exception as error:
            LOG.warning('%s: go may not have been heard: %s', self._offer, printable(error))

    def _poll(self):
        """None: nothing was seen."""
        try:
            seen = _Observation(self._record.read())
        except Gone:
            raise
        except Exception as error:
            self._failures += 1
            LOG.warning('%s: the image could not be looked at: %s', self._offer, printable(error))
            return None
        self._failures = 0
        self._tell(seen)
        if seen.status in ('deleted', 'pending_delete'):
            raise Gone()
        return seen

    def _tell(self, seen):
        """Every tenth of the way is worth a line."""
        percent = int(seen.progress) if seen.progress in PERCENTS else 0
        if seen.says in STATES and self._told != (seen.says, percent // 10):
            self._told = (seen.says, percent // 10)
            LOG.info('%s: %s, %s %%', self._offer, seen.says, percent)

    def _pause(self, elapsed):
        failing = POLL_INTERVAL * 2 ** min(self._failures, 4)
        self._sleep(min(max(POLL_INTERVAL, failing, elapsed / 20), MAX_POLL_INTERVAL))

    def _take_off(self, seen):
        for tag in seen.tags:
            self._record.untag(tag)
        if seen.properties:
            self._record.strip(sorted(seen.properties))

    def _retract_offer(self):
        """Takes our tags and properties off, and sees that they stay off. True: the image has become active."""
        began, settled = self._clock(), False
        while True:
            late = self._clock() - began >= PATIENCE
            try:
                seen = _Observation(self._record.read())
                if seen.active:
                    self._remove_late_changes()
                    return True
                if settled and not seen.has_our_tags:
                    return False
                if late:
                    LOG.warning('%s: these stay on the image: %s', self._offer,
                                printable(', '.join(seen.tags + sorted(seen.properties))))
                    return False
                self._take_off(seen)
                settled = True
            except Gone:
                raise
            except Exception as error:
                if late:
                    raise
                LOG.warning('%s: our tags and properties are not off yet: %s', self._offer, printable(error))
            self._sleep(SETTLE)

    def _remove_late_changes(self):
        """Takes off what a late change has put on an active image."""
        for _ in range(3):
            try:
                seen = _Observation(self._record.read())
                if not seen.has_our_tags:
                    return
                self._take_off(seen)
            except Gone:
                # it was active; what its owner does then is no failure of ours
                return
            except Exception as error:
                LOG.warning('%s: our tags and properties are not off yet: %s', self._offer, printable(error))
                self._sleep(SETTLE)
