//! The gate on every call to the outside. A call may be late, fail, be done without an answer, hang; the daemon may die
//! by it, or be frozen for longer than its lease.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep, sleep_until};

use super::node::Node;
use super::odds::Faults;
use super::trouble::Trouble;
use super::world::{Shared, World};
use crate::ceph;
use crate::openstack;

/// Whether a call changes something: then accidents happen more often.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Read,
    Write,
}

/// What both error types of the traits can say.
pub trait Failure: Sized {
    fn passing(what: &str, dice: u64) -> Self;
    fn timed_out(what: &str) -> Self;
}

impl Failure for ceph::Error {
    fn passing(what: &str, dice: u64) -> Self {
        let kind = if dice.is_multiple_of(2) { ceph::ErrorKind::Other } else { ceph::ErrorKind::TimedOut };
        Self::new(what, kind, "it failed")
    }

    fn timed_out(what: &str) -> Self {
        Self::new(what, ceph::ErrorKind::TimedOut, "no answer")
    }
}

impl Failure for openstack::Error {
    fn passing(what: &str, dice: u64) -> Self {
        let kind = match dice % 4 {
            0 => openstack::ErrorKind::Unauthorized,
            1 => openstack::ErrorKind::Protocol,
            _ => openstack::ErrorKind::Unavailable,
        };
        Self::new(what, kind, "it failed")
    }

    fn timed_out(what: &str) -> Self {
        Self::new(what, openstack::ErrorKind::Unavailable, "no answer")
    }
}

/// What goes wrong with one call.
struct FaultDecision {
    before: Duration,
    on_the_way: Duration,
    after: Duration,
    fails_before: bool,
    fails_after: bool,
    hangs: bool,
    dice: u64,
}

impl Node {
    /// How long this call for one job hangs, whatever becomes of its caller.
    fn hangs(&self, what: &impl Fn() -> String) -> Option<Duration> {
        const SOME: [&str; 6] = ["create snapshot", "protect", "clone", "open for", "flattened", "copied"];
        let mut world = self.world.lock();
        if self.steady || !world.has(Trouble::HangingCalls) || world.faults.calm {
            return None;
        }
        let what = what();
        let may = SOME.iter().any(|call| what.starts_with(call));
        (may && world.dice.percent(8)).then(|| world.dice.millis(60_000, 600_000))
    }

    /// Some jobs kill their daemon at one call.
    fn meet_killer(&self, what: &impl Fn() -> String) {
        let mut world = self.world.lock();
        let Some(killer) = world.killer.as_mut().filter(|_| !self.steady) else { return };
        let what = what();
        if what.starts_with(killer.call) && what.contains(&killer.image_id) && !self.is_dead() {
            killer.deaths += 1;
            drop(world);
            self.kill();
        }
    }

    fn decide(&self, kind: Kind, is_ceph: bool) -> FaultDecision {
        let mut world = self.world.lock();
        let faults = if self.steady { Faults::default() } else { world.faults };
        let slow_ceph = is_ceph && world.ceph_slow_until.is_some_and(|until| until > Instant::now());
        let dice = &mut world.dice;
        let mut delay = |odds: u32| match dice.below(10_000) {
            n if n < u64::from(odds) => dice.millis(200, 12_000),
            n if n < 2_000 => dice.millis(10, 120),
            _ => dice.millis(0, 4),
        };
        let (before, mut on_the_way, after) = (delay(faults.slow / 3), delay(faults.slow / 3), delay(faults.slow / 3));
        if slow_ceph {
            on_the_way += dice.millis(100, 15_000);
        }
        // what no fence holds up is looked at most
        let weight = match (kind, is_ceph) {
            (Kind::Write, false) => 8,
            (Kind::Write, true) => 2,
            (Kind::Read, _) => 1,
        };
        let crash = dice.chance(faults.crash * weight / 2);
        let freeze = dice.chance(faults.freeze * weight / 2).then(|| dice.millis(5_000, 180_000));
        let decision = FaultDecision {
            before,
            on_the_way,
            after,
            fails_before: dice.chance(faults.before),
            fails_after: dice.chance(faults.after),
            hangs: dice.chance(faults.hang),
            dice: dice.roll(),
        };
        let stricken = decision.fails_before || decision.fails_after || decision.hangs || crash || freeze.is_some();
        if stricken || slow_ceph || before + on_the_way + after > Duration::from_secs(1) {
            world.history.stricken.insert(self.name.clone());
        }
        drop(world);
        // by the dice it has sent the call before that, or not
        if crash {
            self.kill();
        } else if let Some(time) = freeze {
            self.freeze(time);
        }
        decision
    }
}

/// A daemon's way to the world.
#[derive(Clone)]
pub struct Handle {
    pub node: Arc<Node>,
}

impl Handle {
    pub fn world(&self) -> &Shared {
        &self.node.world
    }

    pub async fn gate<T, E: Failure + std::fmt::Display>(
        &self,
        kind: Kind,
        is_ceph: bool,
        what: impl Fn() -> String,
        effect: impl FnOnce(&mut World) -> Result<T, E>,
    ) -> Result<T, E> {
        let node = &self.node;
        node.pass().await;
        let decision = node.decide(kind, is_ceph);
        if is_ceph && let Some(time) = node.hangs(&what) {
            node.world.lock().log(|| format!("{} {} HANGS for {time:?}", node.name, what()));
            sleep(time).await;
            node.pass().await;
        }
        let sent_already = decision.dice % 2 == 1;
        sleep(decision.before).await;
        if !sent_already {
            node.pass().await;
        }
        let patience = Duration::from_secs(30);
        if let Some(until) = node.is_cut_off() {
            let longest = Instant::now() + patience;
            let gave_up = until > longest;
            sleep_until(until.min(longest)).await;
            node.pass().await;
            if gave_up {
                return Err(E::timed_out(&what()));
            }
            return self.finish(what, effect).await;
        }
        if decision.hangs && decision.dice.is_multiple_of(3) {
            sleep(patience).await;
            node.pass().await;
            return Err(E::timed_out(&what()));
        }
        if decision.fails_before {
            node.world.lock().log(|| format!("{} {} → failed, nothing done", node.name, what()));
            return Err(E::passing(&what(), decision.dice));
        }
        // from here on it is on its way, whatever becomes of the daemon
        sleep(decision.on_the_way).await;
        let result = self.apply(&what, effect);
        node.meet_killer(&what);
        if decision.hangs {
            sleep(patience).await;
            node.pass().await;
            return Err(E::timed_out(&what()));
        }
        sleep(decision.after).await;
        node.pass().await;
        if decision.fails_after {
            node.world.lock().log(|| format!("{} {} → answer lost", node.name, what()));
            return Err(E::passing(&what(), decision.dice));
        }
        result
    }

    async fn finish<T, E: std::fmt::Display>(
        &self,
        what: impl Fn() -> String,
        effect: impl FnOnce(&mut World) -> Result<T, E>,
    ) -> Result<T, E> {
        let result = self.apply(&what, effect);
        self.node.pass().await;
        result
    }

    fn apply<T, E: std::fmt::Display>(
        &self,
        what: &impl Fn() -> String,
        effect: impl FnOnce(&mut World) -> Result<T, E>,
    ) -> Result<T, E> {
        let mut world = self.node.world.lock();
        if let Some(mut script) = world.script.take() {
            script(&mut world, &what());
            world.script = Some(script);
        }
        let result = effect(&mut world);
        if world.trace.is_some() {
            let answer = match &result {
                Ok(_) => "ok".to_owned(),
                Err(e) => e.to_string(),
            };
            world.log(|| format!("{} {} → {answer}", self.node.name, what()));
        }
        result
    }
}
