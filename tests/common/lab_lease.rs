//! Who may use the lab at a time. Two daemons of different configurations would both take every request, so tests
//! share a daemon with others that want the same kind of it, or have the lab for themselves. When the last one leaves,
//! the cluster must be as it was before the first came.

use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures::FutureExt;
use tokio::sync::Notify;

use super::broker::Broker;
use super::daemon::{Daemon, Setup};
use super::disk;
use super::inventory::ClusterInventory;

/// Configurations that tests share a daemon of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Clone,
    Copy,
    ServerCopy,
    /// Copies so slowly that there is time to do something meanwhile: 64 MiB take about ten seconds.
    Slow,
    /// Only the backend `ceph`, and not volumes that are attached.
    Narrow,
    /// Takes the uploads that Cinder hands over.
    HandOver,
    /// The same, as slowly as `Slow`.
    SlowHandOver,
}

impl Kind {
    pub fn setup(self) -> Setup {
        let setup = Setup::default().set("offload", "max_jobs", "6");
        match self {
            Self::Clone => setup.set("offload", "method", "clone"),
            Self::Copy => setup.set("offload", "method", "copy"),
            Self::ServerCopy => setup.set("offload", "method", "server-copy"),
            Self::Slow => setup
                .set("offload", "method", "copy")
                .set("offload", "bandwidth_limit", "4MiB")
                .set("offload", "max_jobs", "2"),
            Self::Narrow => setup.set("offload", "method", "clone").without("backend:ceph2"),
            Self::HandOver => setup.integrated(),
            Self::SlowHandOver => Self::Slow.setup().integrated(),
        }
    }
}

struct State {
    /// `None` with users: one that is alone, or the last one is leaving.
    kind: Option<Kind>,
    users: usize,
    daemon: Option<Arc<Daemon>>,
}

static STATE: Mutex<State> = Mutex::new(State { kind: None, users: 0, daemon: None });
static LEFT: Notify = Notify::const_new();
static BEFORE: tokio::sync::Mutex<Option<ClusterInventory>> = tokio::sync::Mutex::const_new(None);
/// Names of queues and namespaces that are to be removed.
static NAMES: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// A test's leave to use the lab.
pub struct LabLease(());

fn lock<T>(mutex: &'static Mutex<T>) -> MutexGuard<'static, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Notes a queue and namespace that a daemon uses.
pub fn note(name: &str) {
    lock(&NAMES).push(name.to_owned());
}

/// With the others that want a daemon of this kind.
pub async fn with(kind: Kind) -> (LabLease, Arc<Daemon>) {
    let stage = enter(Some(kind)).await;
    let daemon = Arc::clone(lock(&STATE).daemon.get_or_insert_with(|| Arc::new(kind.setup().spawn())));
    daemon.await_health(200).await;
    (stage, daemon)
}

/// Without any other; daemons are the test's own.
pub async fn alone() -> LabLease {
    enter(None).await
}

async fn enter(kind: Option<Kind>) -> LabLease {
    loop {
        let left = LEFT.notified();
        tokio::pin!(left);
        left.as_mut().enable();
        {
            let mut state = lock(&STATE);
            if state.users == 0 || (kind.is_some() && state.kind == kind) {
                state.kind = kind;
                state.users += 1;
                break;
            }
        }
        left.await;
    }
    let stage = LabLease(());
    let mut before = BEFORE.lock().await;
    if before.is_none() {
        *before = Some(ClusterInventory::take().await);
    }
    stage
}

impl Drop for LabLease {
    fn drop(&mut self) {
        let daemon = {
            let mut state = lock(&STATE);
            if state.users > 1 {
                state.users -= 1;
                return;
            }
            // no other test begins before the lab is tidy
            state.kind = None;
            state.daemon.take()
        };
        let panicking = std::thread::panicking();
        let closing = AssertUnwindSafe(close(daemon)).catch_unwind();
        let closed = tokio::task::block_in_place(|| tokio::runtime::Handle::current().block_on(closing));
        lock(&STATE).users = 0;
        LEFT.notify_waiters();
        if !panicking && let Err(panic) = closed {
            std::panic::resume_unwind(panic);
        }
    }
}

/// Stops the shared daemon, removes what tests leave on purpose (queues, records), and counts what is left.
async fn close(daemon: Option<Arc<Daemon>>) {
    let leases = match &daemon {
        Some(daemon) => {
            daemon.jobs_are_readable().await;
            daemon.stop();
            disk::leases(&daemon.namespace).await
        }
        None => Vec::new(),
    };
    let names = std::mem::take(&mut *lock(&NAMES));
    if !names.is_empty() {
        let broker = Broker::connect().await;
        for name in names {
            broker.delete(&name).await;
            disk::forget(&name).await;
        }
    }
    let mut before = BEFORE.lock().await;
    let difference = before.as_ref().unwrap().difference().await;
    // told once
    *before = Some(ClusterInventory::take().await);
    assert_eq!(leases, Vec::<String>::new(), "leases that were not given back");
    assert!(difference.is_nothing(), "the cluster is not as it was: {difference:#?}");
}
