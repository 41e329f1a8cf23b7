//! `server-copy`: clone, let the OSDs fill the clone's objects by RADOS `copy_from`, then flatten. No data passes this
//! host. The fill only speeds things up: the flatten copies whatever it left out, and cuts the parent off.

use async_trait::async_trait;
use tokio_util::sync::CancellationToken;

use super::{Transfer, TransferRequest, clone_tagged, clone_unsupported_reason};
use crate::ceph::{self, ErrorKind, Features, ImageInfo, Moved, Progress, Storage};

pub struct ServerCopy;

#[async_trait]
impl Transfer for ServerCopy {
    fn unsupported_reason(&self, source: &ImageInfo) -> Option<String> {
        if source.features.has(Features::JOURNALING) {
            return Some("the source has journaling".into());
        }
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
        let fill = storage
            .fill(&request.source, &request.snapshot, &request.destination, &request.limits, progress, cancel)
            .await;
        let filled = match fill {
            Ok(moved) => moved,
            // it broke off: what there is of it is right, and the flatten does the rest, or says what is wrong
            Err(error) if matches!(error.kind(), ErrorKind::Other | ErrorKind::ReadOnly | ErrorKind::TimedOut) => {
                tracing::warn!(image = %request.destination, %error, "the OSDs' copy broke off; this host copies the rest");
                Moved::default()
            }
            Err(error) => return Err(error),
        };
        // the fill has shown the progress up to the end, if it copied anything: do not show it a second time
        let unseen = progress.steps_only();
        let shown = if filled.objects > 0 { &unseen } else { progress };
        let flattened = storage.flatten(&request.destination, &request.limits, shown, cancel).await?;
        Ok(Moved {
            bytes: filled.bytes + flattened.bytes,
            through_host: filled.through_host + flattened.through_host,
            objects: filled.objects + flattened.objects,
        })
    }
}
