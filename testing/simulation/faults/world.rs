//! The simulated world: its state, the dice of its seed and what goes wrong in it behind one mutex, with the list of
//! promises that were broken.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::time::Instant;
use uuid::Uuid;

use super::dice::Dice;
use super::odds::Faults;
use super::trouble::Trouble;
use crate::job::record::State;
use crate::job::simulation::state::cloud::CloudState;
use crate::job::simulation::state::cluster::Cluster;

pub struct World {
    pub dice: Dice,
    pub faults: Faults,
    pub began: Instant,
    /// Written only when one seed is looked at.
    pub trace: Option<Vec<String>>,
    pub violations: BTreeSet<String>,
    pub ceph: Cluster,
    pub cloud: CloudState,
    pub history: History,
    /// Until then every operation of the cluster takes long.
    pub ceph_slow_until: Option<Instant>,
    /// What happens right before a call of a daemon is done.
    pub script: Option<Script>,
    /// Calls on Ceph whose description has these words fail, or never return.
    pub broken: Option<String>,
    pub stuck: Option<String>,
    /// Until then the monitors refuse to fence any client.
    pub fences_refused_until: Option<Instant>,
    pub trouble: Vec<Trouble>,
    /// Lists come in pages of one or two, so that their cursors are followed.
    pub small_pages: bool,
    /// The daemons' clocks are right. Otherwise each is wrong by some minutes.
    pub right_clocks: bool,
    /// What kills the daemon that does it: an image's id, and the beginning of the call.
    pub killer: Option<Killer>,
}

/// What has happened, for the promises that no state shows.
#[derive(Debug, Default)]
pub struct History {
    /// Requests that ended, and how.
    pub ended: BTreeMap<Uuid, State>,
    /// Daemons that met an accident: they may have lost a lease by it.
    pub stricken: BTreeSet<String>,
    /// Clients that their own daemon wanted to be fenced: it has given up the calls that hang there.
    pub given_up: BTreeSet<String>,
    /// Image headers that sweeps have read.
    pub headers: usize,
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
            small_pages: true,
            right_clocks: false,
            killer: None,
            history: History::default(),
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
