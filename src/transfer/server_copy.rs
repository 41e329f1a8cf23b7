//! `server-copy`: clone, let the OSDs fill the clone's objects by RADOS `copy_from`, then flatten. No data passes this
//! host. The fill only speeds things up: the flatten copies whatever it left out, and cuts the parent off.

use async_trait::async_trait;
use tokio_util::sync::CancellationToken;

use super::{Order, Transfer, clone_marked, clone_obstacle};
use crate::ceph::{self, ErrorKind, Features, ImageInfo, Moved, Progress, Storage};

pub struct ServerCopy;

#[async_trait]
impl Transfer for ServerCopy {
    fn obstacle(&self, source: &ImageInfo) -> Option<String> {
        if source.features.has(Features::JOURNALING) {
            return Some("the source has journaling".into());
        }
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
        let fill =
            storage.fill(&order.source, &order.snapshot, &order.destination, order.limits, progress, cancel).await;
        let filled = match fill {
            Ok(moved) => moved,
            // the flatten does all of it then, as it would after `clone`
            Err(error) if error.kind() == ErrorKind::Unsupported => {
                tracing::info!(image = %order.destination, %error, "the OSDs cannot fill the copy; flatten does it");
                Moved::default()
            }
            Err(error) => return Err(error),
        };
        let flattened = storage.flatten(&order.destination, progress, cancel).await?;
        Ok(Moved {
            bytes: filled.bytes + flattened.bytes,
            through_host: filled.through_host + flattened.through_host,
            objects: filled.objects + flattened.objects,
        })
    }
}
