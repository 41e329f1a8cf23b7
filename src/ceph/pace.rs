//! Rates that all jobs of this daemon keep together: a [`RateLimiter`] is shared by every transfer, never made for one.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use super::cluster::{cancelled, lock};
use super::{Progress, Result};

/// How long to wait at most before looking at the cancellation and the rate again.
const POLL: Duration = Duration::from_millis(100);

/// How much unused time counts. It makes up for late wake-ups, not for pauses.
const SLACK: Duration = Duration::from_millis(100);

/// What an operation on one object counts against a rate of objects.
pub(super) const OBJECT: f64 = 1.0;

/// What a question about one object counts (does it exist, where are its holes): it moves no data.
pub(super) const QUESTION: f64 = 0.1;

/// Spaces out work to a rate that its users share. Work of a large amount starts at once and delays what comes after
/// it.
#[derive(Debug)]
pub struct RateLimiter {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// 0: no limit.
    per_second: u64,
    /// When the next work may start.
    next: Instant,
}

impl State {
    fn time_of(&self, amount: f64) -> Duration {
        Duration::try_from_secs_f64(amount / self.per_second as f64).unwrap_or(Duration::MAX)
    }

    fn add(&mut self, amount: f64, now: Instant) {
        if self.per_second > 0 {
            let start = self.next.max(now.checked_sub(SLACK).unwrap_or(now));
            // (a time that no clock reaches stays where it is)
            self.next = start.checked_add(self.time_of(amount)).unwrap_or(start);
        }
    }

    /// `None`: the work may start. Else how long to wait before asking again.
    fn start(&mut self, amount: f64, now: Instant) -> Option<Duration> {
        let wait = self.next.saturating_duration_since(now);
        if self.per_second > 0 && !wait.is_zero() {
            return Some(wait);
        }
        self.add(amount, now);
        None
    }

    /// What is owed at the old rate is owed at the new one.
    fn set(&mut self, per_second: u64, now: Instant) {
        let owed = self.next.saturating_duration_since(now).as_secs_f64() * self.per_second as f64;
        self.per_second = per_second;
        self.next = now;
        if owed > 0.0 && per_second > 0 {
            self.next = now.checked_add(self.time_of(owed)).unwrap_or(now);
        }
    }
}

impl RateLimiter {
    /// 0: no limit.
    pub fn new(per_second: u64) -> Self {
        Self { state: Mutex::new(State { per_second, next: Instant::now() }) }
    }

    /// Changes the rate, for work that already waits as well.
    pub fn set(&self, per_second: u64) {
        let mut state = lock(&self.state);
        if state.per_second != per_second {
            state.set(per_second, Instant::now());
        }
    }

    /// `None`: the work may start, and is counted. Else how long to wait before asking again.
    pub(super) fn start(&self, amount: f64) -> Option<Duration> {
        lock(&self.state).start(amount, Instant::now()).map(|wait| wait.min(POLL))
    }

    /// Counts work that cannot be held back. What comes after it waits.
    pub(super) fn charge(&self, amount: f64) {
        lock(&self.state).add(amount, Instant::now());
    }

    /// Blocks until the work may start. Waiting counts as activity, and not as a step: other jobs may have used the
    /// rate up.
    pub(super) fn wait(
        &self,
        amount: f64,
        operation: &str,
        (progress, cancel): (&Progress, &CancellationToken),
    ) -> Result<()> {
        loop {
            if cancel.is_cancelled() {
                return Err(cancelled(operation));
            }
            let Some(wait) = self.start(amount) else { return Ok(()) };
            progress.wait();
            std::thread::sleep(wait);
        }
    }
}

/// The rates of this daemon, all its jobs together.
#[derive(Debug)]
pub struct Rates {
    /// Bytes a second that this host reads to copy them.
    pub bytes: RateLimiter,
    /// Objects a second that the OSDs are asked to work on.
    pub objects: RateLimiter,
}

impl Rates {
    /// Both a second; 0: no limit.
    pub fn new(bytes: u64, objects: u64) -> Self {
        Self { bytes: RateLimiter::new(bytes), objects: RateLimiter::new(objects) }
    }

    /// Changes the rates, for transfers that already run as well.
    pub fn set(&self, bytes: u64, objects: u64) {
        self.bytes.set(bytes);
        self.objects.set(objects);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(per_second: u64) -> (State, Instant) {
        let now = Instant::now();
        (State { per_second, next: now }, now)
    }

    /// How many of `users`, who ask in turn every millisecond, start something within `time`.
    fn started(state: &mut State, begin: Instant, time: Duration, users: u64) -> u64 {
        let turns = (0..time.as_millis() as u64).flat_map(|ms| (0..users).map(move |_| Duration::from_millis(ms)));
        turns.filter(|at| state.start(1.0, begin + *at).is_none()).count() as u64
    }

    #[test]
    fn users_share_the_rate() {
        for users in [1, 2, 7] {
            let (mut state, now) = state(50);
            let count = started(&mut state, now, Duration::from_secs(10), users);
            assert!((500..=506).contains(&count), "{users} users: {count}");
        }
    }

    #[test]
    fn a_pause_is_not_made_up_for() {
        let (mut state, now) = state(50);
        let count = started(&mut state, now + Duration::from_secs(60), Duration::from_secs(1), 1);
        assert!(count <= 50 + 6, "{count}");
    }

    #[test]
    fn large_work_delays_what_comes_after_it() {
        let (mut state, now) = state(10);
        state.add(20.0, now);
        let wait = state.start(1.0, now).unwrap();
        assert!(wait > Duration::from_millis(1800) && wait <= Duration::from_secs(2), "{wait:?}");
        assert_eq!(state.start(1.0, now + Duration::from_secs(2)), None);
    }

    #[test]
    fn a_new_rate_holds_for_what_waits() {
        let (mut state, now) = state(1);
        state.add(60.0, now);
        state.set(1000, now);
        assert_eq!(state.start(1.0, now + Duration::from_millis(61)), None, "60 at 1000 a second");
        let (mut state, now) = self::state(1);
        state.add(1e9, now);
        state.set(0, now);
        assert_eq!(state.start(1e18, now), None, "no limit any more");
        state.set(1, now);
        assert_eq!(state.start(1.0, now), None, "what was done without a limit is not owed");
    }

    #[test]
    fn an_amount_beyond_all_time_stops_nothing_for_good() {
        let (mut state, now) = state(1);
        state.add(f64::MAX, now);
        state.set(10, now);
        assert_eq!(state.start(1.0, now + Duration::from_secs(1)), None);
    }

    #[test]
    fn a_wait_ends_when_cancelled() {
        let (limiter, cancel) = (RateLimiter::new(1), CancellationToken::new());
        limiter.charge(1e6);
        cancel.cancel();
        assert!(limiter.wait(1.0, "wait", (&Progress::default(), &cancel)).is_err());
    }
}
