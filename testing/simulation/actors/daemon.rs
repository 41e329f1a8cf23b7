//! One daemon: the real engine, intake and reconciler.

use std::sync::Arc;

use jiff::{SignedDuration, Timestamp};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::ceph;
use crate::config::Config;
use crate::job::clock::Clock;
use crate::job::context::Context;
use crate::job::engine::Engine;
use crate::job::intake::Intake;
use crate::job::lease::Identity;
use crate::job::reconcile::Reconciler;
use crate::job::simulation::faults::gate::Handle;
use crate::job::simulation::faults::lasting::Lasting;
use crate::job::simulation::faults::node::Node;
use crate::job::simulation::faults::world::Shared;
use crate::job::simulation::state::DEPLOYMENT;
use crate::job::store::Store;

/// When the world began, by a clock that is right.
pub fn epoch() -> Timestamp {
    Timestamp::UNIX_EPOCH + SignedDuration::from_hours(24 * 365 * 50)
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
            (world.dice.uuid(), if world.right_clocks { SignedDuration::ZERO } else { wrong })
        };
        let began = world.lock().began;
        let start = epoch() + wrong;
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
            deployment: DEPLOYMENT,
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
