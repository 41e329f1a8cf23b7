//! Clients for jobs, one each: [`StoragePool`] over connections of their own.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use uuid::Uuid;

use super::cluster::{Client, lock};
use super::hung::{HungClient, HungClients};
use super::{Changed, Error, ErrorKind, Lent, Result, Storage, StoragePool};

/// Clients that are kept connected while no job uses them.
const IDLE_MAX: usize = 8;

/// Clients that were given up and have calls that did not return. While there are so many, none is connected: each has
/// threads and buffers. [`HungClients`] closes a sick pool long before.
const GIVEN_UP_MAX: usize = 64;

/// The same of one job: an image that does not answer does not close its pool to the other jobs.
const GIVEN_UP_MAX_OF_JOB: usize = 2;

/// How long the calls of a client may still run after its job has ended.
const CALLS_RETURN_WITHIN: Duration = Duration::from_secs(20);

/// Connects a client when a job wants one and none is idle.
pub struct ClientPool {
    /// Fences clients that are given up.
    control: Client,
    /// What keeps the jobs' records.
    store: Client,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    idle: Mutex<Vec<Client>>,
    hung: Arc<HungClients>,
}

impl ClientPool {
    /// Clients like `control`, which connects none of its own jobs; `store` keeps the records.
    pub fn new(control: Client, store: Client) -> Self {
        Self { control, store, shared: Arc::default() }
    }
}

#[async_trait]
impl StoragePool for ClientPool {
    async fn take(&self, image_id: Uuid) -> Result<Box<dyn Lent>> {
        let refused = |detail| Err(Error::new("connect a client for a job", ErrorKind::TimedOut, detail));
        let (of_job, of_all) = (self.shared.hung.of_job(image_id), self.shared.hung.len());
        if of_job >= GIVEN_UP_MAX_OF_JOB {
            return refused(format!("calls of {of_job} clients of this job that were given up have not returned"));
        }
        let idle = lock(&self.shared.idle).pop();
        let client = match idle {
            Some(client) => client,
            None if of_all >= GIVEN_UP_MAX => {
                return refused(format!("calls of {of_all} clients that were given up have not returned"));
            }
            None => self.control.another(Arc::clone(&self.shared.hung)).await?,
        };
        let (control, shared) = (self.control.clone(), Arc::clone(&self.shared));
        Ok(Box::new(LentClient { image_id, client, control, shared }))
    }

    fn is_fenced(&self) -> bool {
        self.control.is_fenced() || self.store.is_fenced()
    }

    async fn reconnect(&self) -> Result<Changed> {
        let control = self.control.reconnect().await?;
        let store = self.store.reconnect().await?;
        Ok(if [control, store].contains(&Changed::Yes) { Changed::Yes } else { Changed::No })
    }
}

struct LentClient {
    image_id: Uuid,
    client: Client,
    control: Client,
    shared: Arc<Shared>,
}

impl LentClient {
    /// Gives up a client whose job has ended, if its calls do not return.
    async fn give_up_unless_quiet(self: Box<Self>) {
        if tokio::time::timeout(CALLS_RETURN_WITHIN, self.client.quiet()).await.is_ok() {
            return;
        }
        let image_id = self.image_id;
        tracing::error!(%image_id, "a call of the job's Ceph client has not returned after the job ended; fencing it");
        if let Err(error) = self.give_up(&[]).await {
            tracing::error!(%image_id, %error, "the job's Ceph client was not fenced");
        }
    }
}

#[async_trait]
impl Lent for LentClient {
    fn storage(&self) -> Arc<dyn Storage> {
        Arc::new(self.client.clone())
    }

    fn is_busy(&self) -> bool {
        self.client.is_busy()
    }

    fn is_fenced(&self) -> bool {
        self.client.is_fenced()
    }

    fn return_to_pool(self: Box<Self>) {
        if self.client.is_busy() {
            // an image that such a call has open cannot be deleted
            tokio::spawn(self.give_up_unless_quiet());
            return;
        }
        let open = self.client.cluster().open_pools();
        if !open.is_empty() {
            tracing::error!(image_id = %self.image_id, pools = ?open,
                "the job's Ceph client has pools open after its job: it is not used again");
            return;
        }
        let mut idle = lock(&self.shared.idle);
        if idle.len() < IDLE_MAX && !self.client.is_fenced() {
            idle.push(self.client.clone());
        }
    }

    async fn give_up(self: Box<Self>, pools: &[String]) -> Result<()> {
        let address = self.client.own_address()?;
        let mut ids = self.client.cluster().open_pools();
        ids.extend(pools.iter().filter_map(|pool| self.client.cluster().pool_id(pool)));
        // counted until its last call has returned
        let hung = HungClient { image_id: self.image_id, pools: ids };
        self.shared.hung.add(hung.clone());
        let (client, shared) = (self.client.clone(), Arc::clone(&self.shared));
        tokio::spawn(async move {
            client.quiet().await;
            shared.hung.remove(&hung);
        });
        self.control.fence_address(&address).await.map(drop)
    }
}
