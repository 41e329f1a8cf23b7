//! `server-copy`: create an empty image and let the OSDs copy the source's objects into it by RADOS `copy_from`. What
//! they cannot copy exactly, or not thinly, this host copies as `copy` does.

use async_trait::async_trait;
use tokio_util::sync::CancellationToken;

use super::{Transfer, TransferRequest, clone_unsupported_reason, create_tagged};
use crate::ceph::{self, Features, ImageInfo, Moved, Progress, Storage};

pub struct ServerCopy;

#[async_trait]
impl Transfer for ServerCopy {
    fn unsupported_reason(&self, source: &ImageInfo) -> Option<String> {
        if source.features.has(Features::JOURNALING) {
            return Some("the source has journaling".into());
        }
        // it can be published at once
        clone_unsupported_reason(source)
    }

    async fn run(
        &self,
        storage: &dyn Storage,
        request: &TransferRequest,
        progress: &Progress,
        cancel: &CancellationToken,
    ) -> ceph::Result<Moved> {
        // librbd does not see what the OSDs copy, so no object map would know it
        create_tagged(storage, request, Features::WITHOUT_MAPS).await?;
        let TransferRequest { source, snapshot, destination, limits, .. } = request;
        storage.server_copy(source, snapshot, destination, limits, progress, cancel).await
    }
}
