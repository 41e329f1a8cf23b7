//! Clients for jobs, one for each run of a job: [`JobClients`] over connections of their own.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use uuid::Uuid;

use super::cluster::Client;
use super::hung::{HungClient, HungClients};
use super::{Changed, Error, ErrorKind, JobClient, JobClients, Result, Storage};

/// Clients that were given up and have calls that did not return. While there are so many, none is connected: each has
/// threads and buffers. [`HungClients`] closes a sick pool long before.
const GIVEN_UP_MAX: usize = 64;

/// The same of one job: an image that does not answer does not close its pool to the other jobs.
const GIVEN_UP_MAX_OF_JOB: usize = 2;

/// How long the calls of a client may still run after its job has ended.
const CALLS_RETURN_WITHIN: Duration = Duration::from_secs(20);

/// Between two attempts to fence a client whose calls do not return.
const FENCE_INTERVAL: Duration = Duration::from_secs(5);

/// Connects a client for each run of a job.
///
/// A run's client is not used again, so that whatever a run leaves open ends with it.
pub struct CephJobClients {
    /// Fences clients that are given up.
    control: Client,
    /// What keeps the jobs' records.
    store: Client,
    hung: Arc<HungClients>,
}

impl CephJobClients {
    /// Clients like `control`, which does none of the jobs' work; `store` keeps the records.
    pub fn new(control: Client, store: Client) -> Self {
        Self { control, store, hung: Arc::default() }
    }
}

#[async_trait]
impl JobClients for CephJobClients {
    async fn connect(&self, image_id: Uuid) -> Result<Box<dyn JobClient>> {
        let refused = |detail| Err(Error::new("connect a client for a job", ErrorKind::TimedOut, detail));
        let (of_job, of_all) = (self.hung.of_job(image_id), self.hung.len());
        if of_job >= GIVEN_UP_MAX_OF_JOB {
            return refused(format!("calls of {of_job} clients of this job that were given up have not returned"));
        }
        if of_all >= GIVEN_UP_MAX {
            return refused(format!("calls of {of_all} clients that were given up have not returned"));
        }
        let client = self.control.another(Arc::clone(&self.hung)).await?;
        let (control, hung) = (self.control.clone(), Arc::clone(&self.hung));
        let connection = Connection { image_id, client, control, hung };
        Ok(Box::new(CephJobClient { connection, is_given_up: AtomicBool::new(false) }))
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

/// Closes its connection when it is dropped.
struct CephJobClient {
    connection: Connection,
    is_given_up: AtomicBool,
}

#[async_trait]
impl JobClient for CephJobClient {
    fn storage(&self) -> Arc<dyn Storage> {
        Arc::new(self.connection.client.clone())
    }

    fn is_busy(&self) -> bool {
        self.connection.client.is_busy()
    }

    fn is_fenced(&self) -> bool {
        self.connection.client.is_fenced()
    }

    async fn give_up(&self, pools: &[String]) -> Result<()> {
        if !self.is_given_up.swap(true, Ordering::SeqCst) {
            let cluster = self.connection.client.cluster();
            let mut ids = cluster.open_pools();
            ids.extend(pools.iter().filter_map(|pool| cluster.pool_id(pool)));
            self.connection.count_as_hung(ids);
        }
        self.connection.fence().await
    }
}

impl Drop for CephJobClient {
    fn drop(&mut self) {
        let connection = self.connection.clone();
        if self.is_given_up.load(Ordering::SeqCst) {
            tokio::spawn(connection.shut_down());
        } else {
            tokio::spawn(connection.close());
        }
    }
}

#[derive(Clone)]
struct Connection {
    image_id: Uuid,
    client: Client,
    control: Client,
    hung: Arc<HungClients>,
}

impl Connection {
    /// Shuts down once the calls of the client have returned. A client whose calls do not return is fenced: an image
    /// that such a call has open cannot be deleted.
    async fn close(self) {
        if tokio::time::timeout(CALLS_RETURN_WITHIN, self.client.quiet()).await.is_err() {
            let image_id = self.image_id;
            tracing::error!(%image_id, "a call of the job's Ceph client has not returned after the job; fencing it");
            self.count_as_hung(BTreeSet::new());
            while let Err(error) = self.fence().await {
                tracing::error!(%image_id, %error, "the job's Ceph client is not fenced yet");
                if tokio::time::timeout(FENCE_INTERVAL, self.client.quiet()).await.is_ok() {
                    break;
                }
            }
        }
        self.shut_down().await;
    }

    /// The last owner of a client blocks for some milliseconds when it drops it.
    async fn shut_down(self) {
        if let Err(panicked) = tokio::task::spawn_blocking(move || drop(self)).await {
            tracing::error!(%panicked, "a job's Ceph client was not closed");
        }
    }

    /// Counts the client until its last call has returned. `pools`: see [`HungClient`].
    fn count_as_hung(&self, pools: BTreeSet<i64>) {
        let client = HungClient { image_id: self.image_id, pools };
        self.hung.add(client.clone());
        let this = self.clone();
        tokio::spawn(async move {
            this.client.quiet().await;
            this.hung.remove(&client);
            this.shut_down().await;
        });
    }

    async fn fence(&self) -> Result<()> {
        self.control.fence_address(&self.client.own_address()?).await.map(drop)
    }
}
