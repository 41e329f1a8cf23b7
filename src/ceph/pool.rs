//! Clients for jobs, one each: [`StoragePool`] over connections of their own.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use uuid::Uuid;

use super::cluster::{Client, lock};
use super::hung::HungClients;
use super::{Changed, Error, ErrorKind, Lent, Result, Storage, StoragePool};

/// Clients that are kept connected while no job uses them.
const IDLE_MAX: usize = 8;

/// Clients that were given up and have calls that did not return. While there are so many, none is connected: each has
/// threads and buffers. [`HungClients`] closes a sick pool long before.
const GIVEN_UP_MAX: usize = 64;

/// The same of one job: an image that does not answer does not close its pool to the other jobs.
const GIVEN_UP_MAX_OF_JOB: usize = 2;

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
    /// By the image of the job.
    given_up: Mutex<HashMap<Uuid, usize>>,
    /// The same clients, by their pools.
    hung: Arc<HungClients>,
}

impl Shared {
    fn count_given_up(&self, image_id: Uuid, pools: &BTreeSet<i64>) {
        *lock(&self.given_up).entry(image_id).or_default() += 1;
        self.hung.add(pools.clone());
    }

    fn forget_given_up(&self, image_id: Uuid, pools: &BTreeSet<i64>) {
        self.hung.remove(pools);
        let mut given_up = lock(&self.given_up);
        if let Some(count) = given_up.get_mut(&image_id) {
            *count -= 1;
            if *count == 0 {
                given_up.remove(&image_id);
            }
        }
    }
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
        let of_job = lock(&self.shared.given_up).get(&image_id).copied().unwrap_or_default();
        let of_all = self.shared.hung.len();
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
        let mut idle = lock(&self.shared.idle);
        if idle.len() < IDLE_MAX && !self.client.is_busy() && !self.client.is_fenced() {
            idle.push(self.client.clone());
        }
    }

    async fn give_up(self: Box<Self>) -> Result<()> {
        let address = self.client.own_address()?;
        // counted until its last call has returned
        let pools = self.client.cluster().open_pools();
        self.shared.count_given_up(self.image_id, &pools);
        let (image_id, client, shared) = (self.image_id, self.client.clone(), Arc::clone(&self.shared));
        tokio::spawn(async move {
            client.quiet().await;
            shared.forget_given_up(image_id, &pools);
        });
        self.control.fence_address(&address).await.map(drop)
    }
}
