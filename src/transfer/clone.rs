//! `clone`: clone the snapshot into the destination pool, then flatten: librbd on this host reads what the parent has
//! and writes it.

use async_trait::async_trait;
use tokio_util::sync::CancellationToken;

use super::{Transfer, TransferRequest, clone_tagged, clone_unsupported_reason};
use crate::ceph::{self, Features, ImageInfo, Moved, Progress, Storage};

pub struct CloneFlatten;

#[async_trait]
impl Transfer for CloneFlatten {
    fn unsupported_reason(&self, source: &ImageInfo) -> Option<String> {
        clone_unsupported_reason(source)
    }

    async fn run(
        &self,
        storage: &dyn Storage,
        request: &TransferRequest,
        progress: &Progress,
        cancel: &CancellationToken,
    ) -> ceph::Result<Moved> {
        clone_tagged(storage, request, Features::PUBLISHED).await?;
        storage.flatten(&request.destination, &request.limits, progress, cancel).await
    }
}
