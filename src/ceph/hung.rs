//! Which pools do not answer: [`HungClients`] keeps the clients that were given up, with the pools that they used.

use std::collections::BTreeSet;
use std::sync::Mutex;

use uuid::Uuid;

use super::cluster::lock;
use super::{Error, ErrorKind, Result};

/// Jobs whose clients have hung calls in the same pools. With so many, no other client opens these pools.
const HUNG_MAX_OF_POOLS: usize = 4;

/// Clients that were given up and have calls that have not returned.
///
/// A call that hangs in one pool keeps its client for as long as that pool is sick. The pools of a job without a plan
/// are not known when its client connects. So the limit is kept where a pool is opened: a job in the sick pool fails at
/// once.
#[derive(Default)]
pub(super) struct HungClients {
    clients: Mutex<Vec<HungClient>>,
}

/// A client that was given up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct HungClient {
    /// The image of its job.
    pub image_id: Uuid,
    /// Ids of the pools that it had open, and of those that its job uses: librbd opens the pools of parents itself.
    /// Empty: these are not known, and the client closes no pool.
    pub pools: BTreeSet<i64>,
}

impl HungClients {
    pub fn add(&self, client: HungClient) {
        let mut clients = lock(&self.clients);
        let pools = client.pools.clone();
        let before = jobs_within(&clients, &pools);
        clients.push(client);
        if before < HUNG_MAX_OF_POOLS && jobs_within(&clients, &pools) >= HUNG_MAX_OF_POOLS {
            tracing::error!(?pools, "calls of too many jobs hang in these pools (ids): no job opens them together now");
        }
    }

    /// The calls of a client that was added have returned.
    pub fn remove(&self, client: &HungClient) {
        let mut clients = lock(&self.clients);
        let before = jobs_within(&clients, &client.pools);
        if let Some(at) = clients.iter().position(|other| other == client) {
            clients.swap_remove(at);
        }
        if before >= HUNG_MAX_OF_POOLS && jobs_within(&clients, &client.pools) < HUNG_MAX_OF_POOLS {
            tracing::info!(pools = ?client.pools, "calls in these pools (ids) have returned: jobs open them again");
        }
    }

    pub fn len(&self) -> usize {
        lock(&self.clients).len()
    }

    /// How many clients of this job hang.
    pub fn of_job(&self, image_id: Uuid) -> usize {
        lock(&self.clients).iter().filter(|client| client.image_id == image_id).count()
    }

    /// Whether a client may have all of `pools` open at once. A client that hung with more pools open says nothing
    /// about these: the sick one may be among the others.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::PoolClosed`] while clients of [`HUNG_MAX_OF_POOLS`] jobs hang whose open pools are all among these.
    pub fn allow(&self, pools: &BTreeSet<i64>, operation: &str) -> Result<()> {
        let hung = jobs_within(&lock(&self.clients), pools);
        if hung < HUNG_MAX_OF_POOLS {
            return Ok(());
        }
        let detail = format!(
            "the calls of {hung} jobs on this pool have not returned: see `ceph health detail` for its placement groups"
        );
        Err(Error::new(operation, ErrorKind::PoolClosed, detail))
    }
}

/// How many jobs have clients that hang and whose pools are all among these. Two clients of one job may have met the
/// same object.
fn jobs_within(clients: &[HungClient], pools: &BTreeSet<i64>) -> usize {
    let within = clients.iter().filter(|client| !client.pools.is_empty() && client.pools.is_subset(pools));
    within.map(|client| client.image_id).collect::<BTreeSet<_>>().len()
}

#[cfg(test)]
mod tests {
    use super::*;

    const IMAGES: i64 = 1;
    const VOLUMES: i64 = 2;
    const VMS: i64 = 3;

    fn of_jobs(jobs: u128, pools: &[i64]) -> (HungClients, Vec<HungClient>) {
        let client = |job| HungClient { image_id: Uuid::from_u128(job), pools: pools.iter().copied().collect() };
        let clients: Vec<_> = (0..jobs).map(client).collect();
        let hung = HungClients::default();
        clients.iter().for_each(|client| hung.add(client.clone()));
        (hung, clients)
    }

    fn allows(hung: &HungClients, pools: &[i64]) -> bool {
        hung.allow(&pools.iter().copied().collect(), "open pool").is_ok()
    }

    #[test]
    fn a_sick_pool_is_closed_to_clients_and_no_other_pool_is() {
        let (hung, clients) = of_jobs(4, &[VOLUMES]);
        assert!(!allows(&hung, &[VOLUMES]) && !allows(&hung, &[IMAGES, VOLUMES]));
        assert!(allows(&hung, &[IMAGES]) && allows(&hung, &[VMS]) && allows(&hung, &[IMAGES, VMS]));
        hung.remove(&clients[0]);
        assert!(allows(&hung, &[VOLUMES]));
        assert_eq!((hung.len(), hung.of_job(clients[0].image_id), hung.of_job(clients[1].image_id)), (3, 0, 1));
    }

    #[test]
    fn clients_that_hung_with_two_pools_open_close_neither_alone() {
        let (hung, _) = of_jobs(4, &[VMS, IMAGES]);
        assert!(!allows(&hung, &[VMS, IMAGES]));
        assert!(allows(&hung, &[IMAGES]) && allows(&hung, &[VMS]) && allows(&hung, &[VOLUMES, IMAGES]));
    }

    #[test]
    fn clients_of_one_job_count_once() {
        let (hung, clients) = of_jobs(3, &[VOLUMES]);
        hung.add(clients[0].clone());
        assert!(allows(&hung, &[VOLUMES]));
        hung.remove(&clients[0]);
        assert_eq!(hung.of_job(clients[0].image_id), 1);
    }

    #[test]
    fn clients_whose_pools_are_not_known_close_none() {
        let (hung, _) = of_jobs(4, &[]);
        assert!(allows(&hung, &[IMAGES]) && allows(&hung, &[VOLUMES, IMAGES]));
        assert_eq!(hung.len(), 4);
    }
}
