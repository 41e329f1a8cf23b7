"""The service's side, against a record that is changed at planned moments.

python3 -m unittest discover integrations/tests
"""

import logging
import os
import sys
import unittest

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import handover  # noqa: E402

logging.getLogger('handover').setLevel(logging.CRITICAL)

OFFER = handover.volume_offer('4d0d9b4e-0000-4000-8000-000000000001', 'f51d')


class Away(Exception):
    """Glance does not answer."""


class World:
    """Glance's record of one image, a clock, and what others do at which second of it."""

    def __init__(self):
        self.now = 0.0
        self.plan = []
        self.image = {'status': 'queued', 'tags': ['mine'], 'updated_at': 0, 'hw_disk_bus': 'scsi'}
        self.reads = []
        self.away = lambda call: False
        self.tagged = []
        self.on_tag = {}
        #: when the daemons were told, and what tags the record had then
        self.announced = None

    # the clock

    def clock(self):
        return self.now

    def sleep(self, seconds):
        until = self.now + seconds
        while self.plan and self.plan[0][0] <= until:
            self.now, step = self.plan.pop(0)
            step()
        self.now = until

    def at(self, second, step):
        self.plan.append((second, step))
        self.plan.sort(key=lambda entry: entry[0])

    # the record

    def change(self, **marks):
        assert self.image is not None
        for key, value in marks.items():
            self.image['rbd_offload_' + key] = value
        self.image['updated_at'] = self.now

    def ready(self):
        """The daemon's change that makes the record ready."""
        self.image = {key: value for key, value in self.image.items() if not key.startswith('rbd_offload_')}
        self.image['tags'] = [tag for tag in self.image['tags'] if not tag.startswith(handover.TAGS)]

    def activate(self):
        self.image['status'] = 'active'

    def decline(self, says='declined', keeps_tags=False):
        if not keeps_tags:
            self.lose_tags()
        self.change(status=says, message='there is a reason')

    def delete(self):
        self.image = None

    def lose_tags(self):
        self.image['tags'] = ['mine']

    def _call(self, name):
        if self.away(name):
            raise Away(name)
        if self.image is None:
            raise handover.Gone()

    def read(self):
        self._call('read')
        self.reads.append(self.now)
        return dict(self.image, tags=list(self.image['tags']))

    def tag(self, tag):
        self._call('tag')
        self.tagged.append((self.now, tag))
        if tag not in self.image['tags']:
            self.image['tags'].append(tag)
        for step in self.on_tag.get(tag, ()):
            step()

    def untag(self, tag):
        self._call('untag')
        if tag in self.image['tags']:
            self.image['tags'].remove(tag)

    def strip(self, names):
        self._call('strip')
        if any(name not in self.image for name in names):
            raise ValueError('409')
        for name in names:
            del self.image[name]

    # a daemon that does its part

    def copies(self, begin=1, end=4):
        self.at(begin, lambda: self.change(status='accepted', progress='0'))
        self.at(begin + 1, lambda: self.change(status='copying', progress='50'))
        self.at(end, lambda: self.change(status='publishing', progress='100'))

    def publishes(self, after=0.5):
        def hear():
            self.at(self.now + after, self.ready)
            self.at(self.now + after + 0.3, self.activate)
        self.on_tag[handover.GO] = [hear]

    # what is checked

    def run(self, **limits):
        def announce():
            self.announced = (self.now, list(self.image['tags']))
        return handover.Handover(self, OFFER, handover.Limits(**limits), self.clock, self.sleep).run(announce)

    @property
    def goes(self):
        return [when for when, tag in self.tagged if tag == handover.GO]


class Log(logging.Handler):
    """What was logged, as it would be printed."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, entry):
        self.lines.append(entry.getMessage())


class Waiter(unittest.TestCase):

    def setUp(self):
        self.world = World()

    def assert_active(self, **limits):
        self.assertTrue(self.world.run(**limits))
        self.assert_unmarked('active')

    def assert_stock(self, at=None, **limits):
        self.assertFalse(self.world.run(**limits))
        self.assert_unmarked('queued')
        if at is not None:
            # its end, plus the poll interval and the time to settle
            self.assertTrue(at <= self.world.now <= at + handover.MAX_POLL_INTERVAL + 2.5, self.world.now)

    def assert_unmarked(self, status):
        expected = {'status': status, 'tags': ['mine'], 'hw_disk_bus': 'scsi'}
        self.assertEqual(expected, {key: value for key, value in self.world.image.items() if key != 'updated_at'})

    def test_a_prepared_copy_is_published_after_go(self):
        self.world.copies()
        self.world.publishes()
        self.assert_active()
        self.assertEqual((0, ['mine', OFFER]), self.world.announced)
        self.assertEqual(1, len(self.world.goes))
        self.assertTrue(4 <= self.world.goes[0] <= 4.5)
        self.assertLess(self.world.now, 6.5)

    def test_active_at_once(self):
        self.world.at(0.1, self.world.activate)
        self.assert_active()
        self.assertEqual([], self.world.goes)

    def test_an_image_that_is_active_already_is_left_to_the_native_path_to_refuse(self):
        self.world.activate()
        self.assertFalse(self.world.run())
        self.assertEqual([], self.world.tagged)

    def test_an_image_that_another_client_uploads_is_not_offered(self):
        self.world.image['status'] = 'saving'
        self.assertFalse(self.world.run())
        self.assertEqual([], self.world.tagged)

    def test_an_upload_by_another_client_ends_the_wait(self):
        self.world.copies(end=50)
        self.world.at(5, lambda: self.world.image.update(status='saving'))
        self.assertFalse(self.world.run())
        self.assert_unmarked('saving')
        self.assertLess(self.world.now, 8)

    def logged(self, run):
        log, logger = Log(), logging.getLogger('handover')
        logger.addHandler(log)
        logger.setLevel(logging.DEBUG)
        try:
            run()
        finally:
            logger.setLevel(logging.CRITICAL)
            logger.removeHandler(log)
        return log.lines

    def assert_tidy_log(self, lines):
        for line in lines:
            self.assertTrue(line.isprintable(), repr(line[:200]))
            # an escaped character takes ten
            self.assertLess(len(line), 12 * 500)

    def test_what_the_tenant_writes_is_escaped_and_cut_in_the_log(self):
        nasty = '\nERROR forged\x1b[2J\r\x9b\u202e\u2028' + 'x' * 65536

        def decline():
            self.world.decline()
            self.world.change(message=nasty)
        self.world.at(3, decline)
        lines = self.logged(self.world.run)
        self.assert_tidy_log(lines)
        self.assertTrue(any('\\nERROR forged\\x1b[2J' in line for line in lines), lines)

    def test_a_status_that_is_the_tenants_own_is_not_logged(self):
        for second in range(1, 60):
            self.world.at(second, lambda second=second: self.world.change(status='\n%d' % second, progress='9' * 5000))
        self.world.at(60, self.world.decline)
        lines = self.logged(self.world.run)
        self.assert_tidy_log(lines)
        self.assertLess(len(lines), 4, lines)

    def test_what_cannot_be_taken_off_is_named_in_one_tidy_line(self):
        self.world.untag = lambda tag: None
        self.world.image['tags'] += [handover.TAGS + '\n' + str(number) * 200 for number in range(100)]
        lines = self.logged(self.world.run)
        self.assert_tidy_log(lines)
        self.assertTrue(any('these stay on the image' in line for line in lines), lines)

    def test_an_error_of_glance_is_tidy_in_the_log(self):
        self.world.copies(end=20)
        self.world.publishes()
        call = self.world._call

        def fail(name):
            if name == 'read' and 5 < self.world.now < 10:
                raise Away('<html>\n\x1b]0;' + 'y' * 10000)
            call(name)
        self.world._call = fail
        lines = self.logged(self.world.run)
        self.assert_tidy_log(lines)
        self.assertTrue(any('could not be looked at' in line for line in lines), lines)

    def test_nobody_there(self):
        self.assert_stock(at=10)

    def test_claim_is_not_judged_by_looks_that_failed(self):
        self.world.copies(begin=3, end=40)
        self.world.publishes()
        self.world.away = lambda call: 2 < self.world.now < 20
        self.assert_active()

    def test_a_job_that_waits_its_turn_is_claimed(self):
        self.world.copies(begin=9, end=100)
        self.world.publishes()
        self.assert_active()

    def test_what_was_inherited_is_no_answer(self):
        for says in ('declined', 'publishing', 'copying'):
            self.world = World()
            self.world.image['rbd_offload_status'] = says
            self.assert_stock(at=10)
            self.assertEqual([], self.world.goes)

    def test_declined_before_go(self):
        for says in ('declined', 'failed'):
            self.world = World()
            self.world.copies(end=100)
            self.world.at(6, lambda: self.world.decline(says))
            self.assert_stock(at=6)
            self.assertEqual([], self.world.goes)

    def test_declined_by_a_daemon_that_has_not_taken_the_tags_off_yet(self):
        self.world.copies(end=100)
        self.world.at(6, lambda: self.world.decline(keeps_tags=True))
        self.assert_stock(at=6)

    def test_declined_between_the_look_and_go(self):
        self.world.copies()
        self.world.on_tag[handover.GO] = [lambda: self.world.decline() or self.world.image['tags'].append(handover.GO)]
        self.assert_stock(at=4)
        self.assertEqual(1, len(self.world.goes))

    def test_declined_after_go(self):
        self.world.copies()
        self.world.at(30, self.world.decline)
        self.assert_stock(at=30)

    def test_a_lost_answer_to_go_counts_as_said(self):
        self.world.copies()
        self.world.publishes()

        def lost():
            raise Away('after the change')
        self.world.on_tag[handover.GO].append(lost)
        self.assert_active()

    def test_go_that_was_lost_is_said_again(self):
        self.world.copies()
        self.world.at(6, self.world.lose_tags)
        self.world.at(9, lambda: self.world.tag(OFFER))
        self.world.at(10, self.world.publishes)
        self.world.at(12, self.world.lose_tags)
        self.assert_active()
        self.assertEqual(3, len(self.world.goes))

    def test_go_that_never_reached_the_record_is_said_again(self):
        self.world.copies()
        self.world.publishes()
        self.world.away = lambda call: call == 'tag' and 1 < self.world.now < 9
        self.assert_active()
        self.assertEqual(1, len(self.world.goes))

    def test_go_is_not_said_again_when_the_daemon_has_heard_it(self):
        self.world.copies()
        self.world.publishes()
        self.world.on_tag[handover.GO].append(lambda: self.world.at(self.world.now + 60, self.world.activate))
        self.world.on_tag[handover.GO][0] = lambda: self.world.at(self.world.now + 0.1, self.world.ready)
        self.assert_active()
        self.assertEqual(1, len(self.world.goes))

    def test_go_that_came_too_late_does_not_stay_on_the_image(self):
        self.world.copies()
        self.world.publishes()
        self.world.on_tag[handover.GO].append(
            lambda: self.world.at(self.world.now + 0.85, lambda: self.world.image['tags'].append(handover.GO)))
        self.assert_active()

    def test_publishing_without_the_offer_is_not_answered(self):
        self.world.copies(end=50)
        self.world.at(4, self.world.lose_tags)
        self.world.at(4, lambda: self.world.change(status='publishing'))
        self.assert_stock(at=4)
        self.assertEqual([], self.world.goes)

    def test_an_offer_that_flickers_is_not_lost(self):
        self.world.copies(end=30)
        self.world.publishes()
        self.world.at(4, self.world.lose_tags)
        self.world.at(4.9, lambda: self.world.tag(OFFER))
        self.assert_active()

    def test_a_job_that_does_not_start_is_taken_back_whatever_its_heartbeats(self):
        self.world.at(1, lambda: self.world.change(status='accepted', progress='0'))
        for second in range(5, 200, 5):
            self.world.at(second, lambda: self.world.change(message='at work at %s' % self.world.now))
        self.assert_stock(at=30)
        self.assertEqual([], self.world.goes)

    def test_the_time_to_start_is_an_option(self):
        self.world.at(1, lambda: self.world.change(status='accepted', progress='0'))
        self.assert_stock(at=60, start=60)

    def test_a_copy_that_started_in_time_may_take_long(self):
        self.world.at(2, lambda: self.world.change(status='accepted'))
        self.world.copies(begin=28, end=100)
        self.world.publishes()
        self.assert_active()

    def test_a_started_job_that_waits_for_its_turn_again_is_given_the_time_to_start_again(self):
        self.world.copies(begin=1, end=100)
        self.world.publishes()
        self.world.at(40, lambda: self.world.change(status='accepted'))
        self.world.at(65, lambda: self.world.change(status='copying'))
        self.assert_active()
        self.world = World()
        self.world.copies(begin=1, end=100)
        self.world.at(40, lambda: self.world.change(status='accepted'))
        self.assert_stock(at=40 + 30)

    def test_the_start_is_not_judged_by_looks_that_failed(self):
        self.world.copies(begin=25, end=60)
        self.world.publishes()
        self.world.at(2, lambda: self.world.change(status='accepted'))
        self.world.away = lambda call: 20 < self.world.now < 50
        self.assert_active()

    def test_stall(self):
        self.world.copies(end=1000)
        self.assert_stock(at=2 + 120)

    def test_progress_is_no_stall(self):
        self.world.copies(end=1000)
        self.world.publishes()
        for second in range(100, 1000, 100):
            self.world.at(second, lambda: self.world.change(progress=str(self.world.now)))
        self.assert_active()

    def test_the_limit_in_all(self):
        self.world.copies(end=10000)
        for second in range(10, 10000, 100):
            self.world.at(second, lambda: self.world.change(progress=str(self.world.now)))
        self.assert_stock(at=3600, total=3600)

    def test_in_doubt(self):
        self.world.copies()
        self.assert_stock(at=4 + 300)
        self.assertEqual(1, len(self.world.goes))

    def test_in_doubt_glance_at_work_is_waited_for(self):
        for work in ({'os_glance_import_task': 'id'}, {'status': 'importing'}):
            self.world = World()
            self.world.copies()
            self.world.publishes()
            self.world.on_tag[handover.GO] = [lambda: self.world.at(20, self.world.ready)]
            self.world.at(30, lambda: self.world.image.update(work))
            self.world.at(1000, lambda: self.world.image.pop('os_glance_import_task', None))
            self.world.at(1000, self.world.activate)
            self.assert_active()

    def test_in_doubt_without_glance_nothing_is_decided(self):
        self.world.copies()
        self.world.publishes()
        self.world.away = lambda call: 5 < self.world.now < 900
        self.assert_active()

    def test_active_while_the_marks_are_taken_off(self):
        self.world.copies()
        untag = self.world.untag

        def late(tag):
            untag(tag)
            if tag == handover.GO:
                self.world.at(self.world.now + 0.5, self.world.activate)
        self.world.untag = late
        self.assert_active()
        self.assertGreater(self.world.now, 300)

    def test_deleted(self):
        for second in (0.2, 3, 5):
            self.world = World()
            self.world.copies()
            self.world.at(second, self.world.delete)
            with self.assertRaises(handover.Gone):
                self.world.run()
            self.assertLess(self.world.now, second + 2)

    def test_deleted_before_the_offer(self):
        self.world.delete()
        with self.assertRaises(handover.Gone):
            self.world.run()

    def test_deleted_while_the_marks_are_taken_off(self):
        self.world.at(10.6, self.world.delete)
        with self.assertRaises(handover.Gone):
            self.world.run()

    def test_glance_away_for_a_while(self):
        self.world.copies(end=60)
        self.world.publishes()
        self.world.away = lambda call: 10 < self.world.now < 100
        self.assert_active()

    def test_glance_away_for_good(self):
        self.world.copies(end=60)
        self.world.away = lambda call: self.world.now > 10
        with self.assertRaises(Away):
            self.world.run()
        self.assertLess(self.world.now, 120 + 10 + handover.PATIENCE + 10)

    def test_marks_that_come_back_are_taken_off_again(self):
        self.world.at(10.8, lambda: self.world.change(status='accepted'))
        self.assert_stock(at=10)

    def test_stock_begins_only_when_the_record_was_clean_for_a_second(self):
        self.world.copies(end=50)
        self.world.at(6, self.world.decline)
        taken_off = []
        strip = self.world.strip
        self.world.strip = lambda names: taken_off.append(self.world.now) or strip(names)
        self.assert_stock()
        self.assertGreaterEqual(self.world.now - taken_off[-1], 1)

    def test_a_change_on_its_way_is_waited_for_where_nothing_is_left_to_take_off(self):
        self.world.at(2, self.world.lose_tags)
        self.assert_stock(at=2)
        lost = handover.MISSING_OFFER_POLLS * handover.POLL_INTERVAL
        self.assertGreaterEqual(self.world.now, 2 + lost - handover.POLL_INTERVAL + handover.SETTLE)

    def test_the_notification_cannot_be_sent(self):
        self.world.copies()
        self.world.publishes()

        def announce():
            raise Away('the broker')
        service = handover.Handover(self.world, OFFER, handover.Limits(), self.world.clock, self.world.sleep)
        self.assertTrue(service.run(announce))
        self.assert_unmarked('active')

    def test_at_most_two_looks_a_second_and_fewer_when_it_takes_long(self):
        self.world.copies(end=600)
        self.world.publishes()
        for second in range(100, 600, 100):
            self.world.at(second, lambda: self.world.change(progress=str(self.world.now)))
        self.assert_active()
        polls = [b - a for a, b in zip(self.world.reads[1:], self.world.reads[2:]) if b < 600]
        self.assertGreaterEqual(min(polls), handover.POLL_INTERVAL)
        self.assertLess(len(polls), 200)

    def test_a_service_that_was_frozen_believes_what_it_sees_then(self):
        self.world.copies()

        def freeze():
            self.world.now += 1000
            self.world.decline()
        self.world.at(3, freeze)
        self.assert_stock()
        self.assertEqual([], self.world.goes)


if __name__ == '__main__':
    unittest.main()
