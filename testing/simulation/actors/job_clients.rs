//! The clients of a daemon, one for each run of a job.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use async_trait::async_trait;
use uuid::Uuid;

use crate::ceph::{Changed, JobClient, JobClients, Result, Storage};
use crate::job::simulation::faults::gate::Handle;
use crate::job::simulation::faults::lasting::Lasting;
use crate::job::simulation::faults::node::Node;

#[async_trait]
impl JobClients for Handle {
    async fn connect(&self, _image_id: Uuid) -> Result<Box<dyn JobClient>> {
        self.node.pass().await;
        Ok(Box::new(HandleOfJob { handle: Handle { node: Node::of_job(&self.node) }, control: self.clone() }))
    }

    fn is_fenced(&self) -> bool {
        self.node.is_fenced()
    }

    async fn reconnect(&self) -> Result<Changed> {
        Storage::reconnect(self).await
    }
}

/// A client that one job uses.
struct HandleOfJob {
    handle: Handle,
    control: Handle,
}

#[async_trait]
impl JobClient for HandleOfJob {
    fn storage(&self) -> Arc<dyn Storage> {
        Arc::new(Lasting(self.handle.clone()))
    }

    fn is_busy(&self) -> bool {
        self.handle.node.calls.load(Ordering::SeqCst) > 0
    }

    fn is_fenced(&self) -> bool {
        self.handle.node.is_fenced()
    }

    async fn give_up(&self, _pools: &[String]) -> Result<()> {
        self.control.fence(&self.handle.node.address()).await.map(drop)
    }
}
