//! `clone`: clone the snapshot into the destination pool, then flatten: librbd on this host reads what the parent has
//! and writes it.

use async_trait::async_trait;
use tokio_util::sync::CancellationToken;

use super::{Order, Transfer, clone_marked, clone_obstacle};
use crate::ceph::{self, ImageInfo, Moved, Progress, Storage};

pub struct Clone;

#[async_trait]
impl Transfer for Clone {
    fn obstacle(&self, source: &ImageInfo) -> Option<String> {
        clone_obstacle(source)
    }

    async fn run(
        &self,
        storage: &dyn Storage,
        order: &Order,
        progress: &Progress,
        cancel: &CancellationToken,
    ) -> ceph::Result<Moved> {
        clone_marked(storage, order).await?;
        storage.flatten(&order.destination, progress, cancel).await
    }
}
