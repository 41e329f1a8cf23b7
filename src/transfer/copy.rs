//! `copy`: read at the snapshot through librbd, only what holds data, many requests in flight, and write. It can
//! throttle and stops at any chunk. Never `rbd_copy`: on a clone's snapshot that loses what only the parent holds.

use async_trait::async_trait;
use tokio_util::sync::CancellationToken;

use super::{Transfer, TransferRequest, create_tagged};
use crate::ceph::{self, Features, ImageInfo, Moved, Progress, Storage};

pub struct RbdCopy;

#[async_trait]
impl Transfer for RbdCopy {
    fn unsupported_reason(&self, _source: &ImageInfo) -> Option<String> {
        None
    }

    async fn run(
        &self,
        storage: &dyn Storage,
        request: &TransferRequest,
        progress: &Progress,
        cancel: &CancellationToken,
    ) -> ceph::Result<Moved> {
        create_tagged(storage, request, Features::PUBLISHED).await?;
        storage.copy(&request.source, &request.snapshot, &request.destination, &request.limits, progress, cancel).await
    }
}
