//! What every job and the reconciler need: connections, configuration, and who this daemon is.

use std::sync::Arc;

use tokio::sync::watch;
use uuid::Uuid;

use super::clock::Clock;
use super::lease::Identity;
use super::refusals::Refusals;
use super::store::Store;
use crate::ceph::{JobClients, Rates, Storage};
use crate::config::Config;
use crate::openstack::Cloud;

#[derive(Clone)]
pub struct Context {
    /// The Ceph client: shared by all, or the job's own one while a job runs.
    pub storage: Arc<dyn Storage>,
    /// Where jobs get a client of their own.
    pub clients: Arc<dyn JobClients>,
    pub cloud: Arc<dyn Cloud>,
    pub store: Store,
    pub config: watch::Receiver<Arc<Config>>,
    /// Shared by the transfers of all jobs.
    pub rates: Arc<Rates>,
    /// Shared by all jobs.
    pub refusals: Refusals,
    pub identity: Identity,
    /// Tells what this deployment made from what another one made in the same pools.
    pub deployment: Uuid,
    pub clock: Clock,
}
