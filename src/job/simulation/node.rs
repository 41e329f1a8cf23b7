//! One daemon of the simulation: the real engine behind a gate on every call to the outside. At the gate the call may
//! be late, fail, be done without an answer, hang; the daemon may die, or be stopped for longer than its lease.

use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until};
use tokio_util::sync::CancellationToken;

use super::at_once;
use super::lasting::Lasting;
use super::promises;
use super::trouble::Trouble;
use super::world::{Shared, World};
use crate::ceph;
use crate::config::Config;
use crate::job::clock::Clock;
use crate::job::context::Context;
use crate::job::engine::Engine;
use crate::job::intake::Intake;
use crate::job::lease::Identity;
use crate::job::reconcile::Reconciler;
use crate::job::store::Store;
use crate::openstack;

/// Whether a call changes something: then accidents happen more often.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Read,
    Write,
}

struct Body {
    address: String,
    fenced: bool,
    frozen_until: Option<Instant>,
    dead: bool,
    /// Until then this daemon reaches neither the cluster nor the services.
    cut_until: Option<Instant>,
}

pub struct Node {
    pub name: String,
    world: Shared,
    body: Mutex<Body>,
    /// Fires when it died.
    pub died: CancellationToken,
    /// A person's command line has no accidents.
    steady: bool,
    /// The daemon that this client of one job belongs to.
    host: Option<Arc<Node>>,
    /// Calls that have not returned, also those that nobody waits for.
    pub calls: AtomicUsize,
    /// Clients of jobs that none uses.
    idle: Mutex<Vec<Arc<Node>>>,
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

/// What fate has decided for one call.
struct Fate {
    before: Duration,
    on_the_way: Duration,
    after: Duration,
    fails_before: bool,
    fails_after: bool,
    hangs: bool,
    dice: u64,
}

impl Node {
    pub fn new(world: &Shared, name: String, steady: bool) -> Arc<Self> {
        let address = {
            let mut world = world.lock();
            let number = world.ceph.next();
            format!("{name}:0/{number}")
        };
        Arc::new(Self {
            name,
            world: world.clone(),
            body: Mutex::new(Body { address, fenced: false, frozen_until: None, dead: false, cut_until: None }),
            died: CancellationToken::new(),
            steady,
            host: None,
            calls: AtomicUsize::new(0),
            idle: Mutex::default(),
        })
    }

    /// A client for one job: with an address of its own, it lives and dies with its daemon.
    pub fn of_job(host: &Arc<Self>) -> Arc<Self> {
        let idle = host.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
        idle.unwrap_or_else(|| {
            let number = host.world.lock().ceph.next();
            let address = format!("{}:0/{number}", host.name);
            Arc::new(Self {
                name: host.name.clone(),
                world: host.world.clone(),
                body: Mutex::new(Body { address, fenced: false, frozen_until: None, dead: false, cut_until: None }),
                died: host.died.clone(),
                steady: host.steady,
                host: Some(Arc::clone(host)),
                calls: AtomicUsize::new(0),
                idle: Mutex::default(),
            })
        })
    }

    /// A job is over, and another may use its client.
    pub fn give_back(self: Arc<Self>) {
        if let Some(host) = self.host.clone().filter(|_| !self.is_fenced()) {
            host.idle.lock().unwrap_or_else(PoisonError::into_inner).push(self);
        }
    }

    pub fn is_fenced(&self) -> bool {
        self.body().fenced
    }

    fn host(&self) -> &Self {
        self.host.as_deref().unwrap_or(self)
    }

    fn body(&self) -> std::sync::MutexGuard<'_, Body> {
        self.body.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn address(&self) -> String {
        self.body().address.clone()
    }

    /// The cluster refused an operation of that address.
    pub fn was_fenced(&self, address: &str) {
        let mut body = self.body();
        if body.address == address {
            body.fenced = true;
        }
    }

    pub fn reconnect(&self) -> bool {
        let number = self.world.lock().ceph.next();
        let mut body = self.body();
        if !body.fenced {
            return false;
        }
        body.fenced = false;
        body.address = format!("{}:0/{number}", self.name);
        true
    }

    pub fn freeze(&self, time: Duration) {
        promises::stricken(&self.world, &self.name);
        self.world.lock().log(|| format!("{} FROZEN for {time:?}", self.name));
        self.host().body().frozen_until = Some(Instant::now() + time);
    }

    pub fn cut(&self, time: Duration) {
        promises::stricken(&self.world, &self.name);
        self.world.lock().log(|| format!("{} CUT OFF for {time:?}", self.name));
        self.host().body().cut_until = Some(Instant::now() + time);
    }

    pub fn kill(&self) {
        promises::stricken(&self.world, &self.name);
        self.world.lock().log(|| format!("{} DIED", self.name));
        self.host().body().dead = true;
        self.died.cancel();
    }

    pub fn is_dead(&self) -> bool {
        self.host().body().dead
    }

    /// Waits while the daemon is frozen, and without end when it is dead.
    pub async fn pass(&self) {
        loop {
            let until = {
                let body = self.host().body();
                if body.dead { None } else { Some(body.frozen_until) }
            };
            match until {
                None => std::future::pending().await,
                Some(Some(until)) if until > Instant::now() => {
                    sleep_until(until.min(Instant::now() + Duration::from_secs(5))).await;
                }
                Some(_) => return,
            }
        }
    }

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

    fn fate(&self, kind: Kind, is_ceph: bool) -> Fate {
        let mut world = self.world.lock();
        let faults = if self.steady { super::world::Faults::default() } else { world.faults };
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
        let fate = Fate {
            before,
            on_the_way,
            after,
            fails_before: dice.chance(faults.before),
            fails_after: dice.chance(faults.after),
            hangs: dice.chance(faults.hang),
            dice: dice.roll(),
        };
        let stricken = fate.fails_before || fate.fails_after || fate.hangs || crash || freeze.is_some();
        if stricken || slow_ceph || before + on_the_way + after > Duration::from_secs(1) {
            world.watched.stricken.insert(self.name.clone());
        }
        drop(world);
        // by the dice it has sent the call before that, or not
        if crash {
            self.kill();
        } else if let Some(time) = freeze {
            self.freeze(time);
        }
        fate
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

    pub async fn ceph<T>(
        &self,
        kind: Kind,
        what: impl Fn() -> String,
        effect: impl FnOnce(&mut World) -> ceph::Result<T>,
    ) -> ceph::Result<T> {
        let address = self.node.address();
        if self.node.body().fenced {
            tokio::task::yield_now().await;
            return Err(ceph::Error::new(what(), ceph::ErrorKind::Fenced, "fenced"));
        }
        let node = &self.node;
        let shown = &what;
        let (is_broken, is_stuck) = {
            let world = self.world().lock();
            let has = |words: &Option<String>| words.as_ref().is_some_and(|words| shown().contains(words));
            (has(&world.broken), has(&world.stuck))
        };
        if is_stuck {
            std::future::pending::<()>().await;
        }
        self.gate(kind, true, shown, |world| {
            if world.ceph.blocklist.contains(&address) {
                node.was_fenced(&address);
                return Err(ceph::Error::new(shown(), ceph::ErrorKind::Fenced, "fenced"));
            }
            if is_broken {
                return Err(ceph::Error::new(shown(), ceph::ErrorKind::Other, "this object is broken"));
            }
            effect(world)
        })
        .await
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
        let fate = node.fate(kind, is_ceph);
        if is_ceph && let Some(time) = node.hangs(&what) {
            node.world.lock().log(|| format!("{} {} HANGS for {time:?}", node.name, what()));
            sleep(time).await;
            node.pass().await;
        }
        let sent_already = fate.dice % 2 == 1;
        sleep(fate.before).await;
        if !sent_already {
            node.pass().await;
        }
        let patience = Duration::from_secs(30);
        let cut = node.host().body().cut_until.filter(|until| *until > Instant::now());
        if let Some(until) = cut {
            let longest = Instant::now() + patience;
            let gave_up = until > longest;
            sleep_until(until.min(longest)).await;
            node.pass().await;
            if gave_up {
                return Err(E::timed_out(&what()));
            }
            return self.finish(what, effect).await;
        }
        if fate.hangs && fate.dice.is_multiple_of(3) {
            sleep(patience).await;
            node.pass().await;
            return Err(E::timed_out(&what()));
        }
        if fate.fails_before {
            node.world.lock().log(|| format!("{} {} → failed, nothing done", node.name, what()));
            return Err(E::passing(&what(), fate.dice));
        }
        // from here on it is on its way, whatever becomes of the daemon
        sleep(fate.on_the_way).await;
        let result = self.apply(&what, effect);
        node.meet_killer(&what);
        if fate.hangs {
            sleep(patience).await;
            node.pass().await;
            return Err(E::timed_out(&what()));
        }
        sleep(fate.after).await;
        node.pass().await;
        if fate.fails_after {
            node.world.lock().log(|| format!("{} {} → answer lost", node.name, what()));
            return Err(E::passing(&what(), fate.dice));
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
        at_once::watch_readers(&mut world);
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

/// A running daemon.
pub struct Daemon {
    pub node: Arc<Node>,
    pub intake: Intake,
    pub stop: CancellationToken,
    pub drain: CancellationToken,
    /// Fires when the engine has ended by itself.
    pub ended: CancellationToken,
}

impl Daemon {
    /// Starts the real engine and reconciler on a node of its own, with a clock that is wrong.
    pub fn start(world: &Shared, name: String, config: Config) -> Self {
        let node = Node::new(world, name.clone(), false);
        let (instance, wrong) = {
            let mut world = world.lock();
            let wrong = SignedDuration::from_secs(i64::try_from(world.dice.below(600)).unwrap() - 300);
            (world.dice.uuid(), wrong)
        };
        let began = world.lock().began;
        let start = Timestamp::UNIX_EPOCH + SignedDuration::from_hours(24 * 365 * 50) + wrong;
        let clock = Clock::Tokio { start, origin: began };
        let handle = Handle { node: Arc::clone(&node) };
        let clients = Arc::new(handle.clone());
        let handle = Lasting(handle);
        let store = Store::new(Arc::new(handle.clone()), clock);
        // it stays as it is
        let (_, config) = watch::channel(Arc::new(config));
        let engine = Engine::new(Context {
            refusals: Default::default(),
            rates: Arc::new(ceph::Rates::new(0, 0)),
            storage: Arc::new(handle.clone()),
            clients,
            cloud: Arc::new(handle),
            store,
            config,
            identity: Identity { instance, host: name, pid: 1 },
            deployment: super::world::DEPLOYMENT,
            clock,
        });
        let (stop, drain, ended) = (CancellationToken::new(), CancellationToken::new(), CancellationToken::new());
        let intake = Intake::new(Arc::clone(&engine));
        let reconciler = Reconciler::new(Arc::clone(&engine));
        tokio::spawn(reconciler.run(stop.clone()));
        {
            let (stop, drain, ended) = (stop.clone(), drain.clone(), ended.clone());
            tokio::spawn(async move {
                engine.run(stop, drain).await;
                ended.cancel();
            });
        }
        Self { node, intake, stop, drain, ended }
    }
}
