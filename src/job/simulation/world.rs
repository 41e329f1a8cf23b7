//! The simulated world: one state behind one mutex, the dice of its seed, and the list of promises that were broken.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;
use uuid::Uuid;

use super::cloud::CloudState;
use super::cluster::Cluster;
use super::promises::Watched;
use super::trouble::Trouble;

/// Id of the deployment that all daemons of the world belong to.
pub const DEPLOYMENT: Uuid = Uuid::from_u128(0xdeb1_0000_0000_4000_8000_0000_0000_0001);

/// Random numbers that depend on the seed alone (SplitMix64).
#[derive(Debug, Clone)]
pub struct Dice(u64);

impl Dice {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x5eed)
    }

    pub fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, n: u64) -> u64 {
        self.roll() % n.max(1)
    }

    /// So many in ten thousand.
    pub fn chance(&mut self, in_ten_thousand: u32) -> bool {
        self.below(10_000) < u64::from(in_ten_thousand)
    }

    pub fn percent(&mut self, percent: u32) -> bool {
        self.chance(percent * 100)
    }

    pub fn millis(&mut self, from: u64, to: u64) -> Duration {
        Duration::from_millis(from + self.below(to - from + 1))
    }

    pub fn pick<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        &of[usize::try_from(self.below(of.len() as u64)).unwrap()]
    }

    pub fn uuid(&mut self) -> Uuid {
        Uuid::from_u64_pair(self.roll(), self.roll())
    }
}

/// How often things go wrong, in ten thousand calls. Each seed has its own mixture.
#[derive(Debug, Clone, Copy, Default)]
pub struct Faults {
    /// An error, and nothing was done.
    pub before: u32,
    /// An error, though it was done.
    pub after: u32,
    /// No answer until the caller's patience ends; done or not.
    pub hang: u32,
    pub crash: u32,
    pub freeze: u32,
    /// A call that takes seconds.
    pub slow: u32,
    /// Of Glance's tasks.
    pub task_failure: u32,
    /// Of Glance's tasks: never goes on.
    pub task_stuck: u32,
    /// Of the OSDs' fill.
    pub unsupported: u32,
    /// A copy that went wrong and says nothing.
    pub spoiled: u32,
    /// A call whose caller gave it up: it goes on.
    pub lasting: u32,
    /// The time of accidents is over.
    pub calm: bool,
}

impl Faults {
    pub fn of(dice: &mut Dice) -> Self {
        let mut some = |small: u32, large: u32| match dice.below(4) {
            0 | 1 => 0,
            2 => small,
            _ => large,
        };
        Self {
            before: some(50, 400),
            after: some(50, 400),
            hang: some(10, 60),
            crash: some(40, 250),
            freeze: some(30, 200),
            slow: some(50, 300),
            task_failure: some(500, 2500),
            task_stuck: some(0, 800),
            unsupported: some(0, 4000),
            spoiled: some(0, 1000),
            lasting: some(3000, 9000),
            calm: false,
        }
    }
}

pub struct World {
    pub dice: Dice,
    pub faults: Faults,
    pub began: Instant,
    /// Written only when one seed is looked at.
    pub trace: Option<Vec<String>>,
    pub violations: BTreeSet<String>,
    pub ceph: Cluster,
    pub cloud: CloudState,
    /// Until then every operation of the cluster takes long.
    pub ceph_slow_until: Option<Instant>,
    /// What happens right before a call of a daemon is done.
    pub script: Option<Script>,
    /// Calls on Ceph whose description has these words fail, or never return.
    pub broken: Option<String>,
    pub stuck: Option<String>,
    /// Until then the monitors refuse to fence anybody.
    pub fences_refused_until: Option<Instant>,
    pub trouble: Vec<Trouble>,
    /// What kills the daemon that does it: an image's id, and the beginning of the call.
    pub killer: Option<Killer>,
    pub watched: Watched,
}

/// A call for one image that kills its daemon each time.
#[derive(Debug, Clone)]
pub struct Killer {
    pub image_id: String,
    pub call: &'static str,
    pub deaths: u32,
}

/// Gets the call's description.
pub type Script = Box<dyn FnMut(&mut World, &str) + Send>;

impl World {
    pub fn new(dice: Dice, faults: Faults, trouble: Vec<Trouble>) -> Self {
        Self {
            dice,
            faults,
            began: Instant::now(),
            trace: None,
            violations: BTreeSet::new(),
            ceph: Cluster::default(),
            cloud: CloudState::default(),
            ceph_slow_until: None,
            fences_refused_until: None,
            trouble,
            killer: None,
            watched: Watched::default(),
            script: None,
            broken: None,
            stuck: None,
        }
    }

    pub fn has(&self, trouble: Trouble) -> bool {
        self.trouble.contains(&trouble)
    }

    pub fn log(&mut self, text: impl FnOnce() -> String) {
        let at = self.began.elapsed().as_secs_f64();
        if let Some(trace) = &mut self.trace {
            trace.push(format!("{at:9.3} {}", text()));
        }
    }

    /// A promise was broken.
    pub fn violated(&mut self, what: String) {
        self.log(|| format!("!!! {what}"));
        self.violations.insert(what);
    }
}

#[derive(Clone)]
pub struct Shared(pub Arc<Mutex<World>>);

impl Shared {
    pub fn lock(&self) -> MutexGuard<'_, World> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
