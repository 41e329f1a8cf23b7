//! The life of one daemon, or of a client that a daemon has for one job: it is frozen, cut off, fenced, it dies.

use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use super::world::Shared;

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
    pub world: Shared,
    body: Mutex<Body>,
    /// Fires when it died.
    pub died: CancellationToken,
    /// A person's command line has no accidents.
    pub steady: bool,
    /// The daemon that this client of one job belongs to.
    host: Option<Arc<Node>>,
    /// Calls that have not returned, also those whose caller was dropped.
    pub calls: AtomicUsize,
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
        })
    }

    /// A client for one job: with an address of its own, it lives and dies with its daemon.
    pub fn of_job(host: &Arc<Self>) -> Arc<Self> {
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
        })
    }

    pub fn is_fenced(&self) -> bool {
        self.body().fenced
    }

    /// Until when the daemon reaches neither the cluster nor the services.
    pub fn is_cut_off(&self) -> Option<Instant> {
        self.host().body().cut_until.filter(|until| *until > Instant::now())
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

    /// The daemon has an accident.
    fn is_stricken(&self) {
        self.world.lock().history.stricken.insert(self.name.clone());
    }

    pub fn freeze(&self, time: Duration) {
        self.is_stricken();
        self.world.lock().log(|| format!("{} FROZEN for {time:?}", self.name));
        self.host().body().frozen_until = Some(Instant::now() + time);
    }

    pub fn cut(&self, time: Duration) {
        self.is_stricken();
        self.world.lock().log(|| format!("{} CUT OFF for {time:?}", self.name));
        self.host().body().cut_until = Some(Instant::now() + time);
    }

    pub fn kill(&self) {
        self.is_stricken();
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
}
