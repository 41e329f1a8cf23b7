//! Clients for jobs, one each: [`StoragePool`] over connections of their own.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use async_trait::async_trait;

use super::cluster::{Client, lock};
use super::{Changed, Error, ErrorKind, Lent, Result, Storage, StoragePool};

/// Clients that are kept connected while no job uses them.
const IDLE_MAX: usize = 8;

/// Clients that were given up and have calls that did not return. While there are so many, no job gets another one.
const GIVEN_UP_MAX: usize = 8;

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
    given_up: AtomicUsize,
}

impl ClientPool {
    /// Clients like `control`, which connects none of its own jobs; `store` keeps the records.
    pub fn new(control: Client, store: Client) -> Self {
        Self { control, store, shared: Arc::default() }
    }
}

#[async_trait]
impl StoragePool for ClientPool {
    async fn take(&self) -> Result<Box<dyn Lent>> {
        let idle = lock(&self.shared.idle).pop();
        let client = match idle {
            Some(client) => client,
            None if self.shared.given_up.load(Ordering::SeqCst) >= GIVEN_UP_MAX => {
                let detail = format!("calls of {GIVEN_UP_MAX} clients that were given up have not returned");
                return Err(Error::new("connect a client for a job", ErrorKind::TimedOut, detail));
            }
            None => self.control.another().await?,
        };
        Ok(Box::new(LentClient { client, control: self.control.clone(), shared: Arc::clone(&self.shared) }))
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
        self.shared.given_up.fetch_add(1, Ordering::SeqCst);
        let (client, shared) = (self.client.clone(), Arc::clone(&self.shared));
        tokio::spawn(async move {
            client.quiet().await;
            shared.given_up.fetch_sub(1, Ordering::SeqCst);
        });
        self.control.fence_address(&address).await.map(drop)
    }
}
