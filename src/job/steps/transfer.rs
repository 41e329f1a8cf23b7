//! The private copy, filled by a method of transfer.

use async_trait::async_trait;

use super::super::error::{StepError, StepResult};
use super::super::held::HeldJob;
use super::super::record::{Artifact, Phase, Record};
use super::attempt::Copying;
use super::free_name::{check_free, in_the_way};
use super::readable::{CHAIN_TRIES, chain_changes};
use super::{Attempt, Step};
use crate::ceph::{self, ErrorKind, ImageSpec, Moved};
use crate::openstack::Image;
use crate::transfer::{self, Method, TransferRequest};

pub struct Transfer;

#[async_trait]
impl Step for Transfer {
    fn name(&self) -> &'static str {
        "transfer"
    }

    fn phase(&self) -> Phase {
        Phase::Prepare
    }

    fn makes(&self) -> Option<Artifact> {
        Some(Artifact::Copy)
    }

    fn is_visible(&self) -> bool {
        true
    }

    fn depends_on_method(&self) -> bool {
        true
    }

    async fn check(&self, job: &HeldJob, attempt: &Attempt) -> StepResult<()> {
        check_free(job, &attempt.copying()?.copy).await
    }

    async fn apply(&self, job: &HeldJob, attempt: &mut Attempt) -> StepResult<()> {
        let copying = attempt.copying()?;
        let Some(method) = copying.methods.front().copied() else {
            return Err(StepError::Abandon("no method of transfer is left".into()));
        };
        job.will_make(Artifact::Copy).await?;
        match run(job, method, copying).await {
            Ok(moved) => {
                metrics::counter!("rbd_offload_copied_bytes_total", "method" => method.as_str()).increment(moved.bytes);
                metrics::counter!("rbd_offload_local_bytes_total", "method" => method.as_str())
                    .increment(moved.through_host);
                job.update(|record| {
                    record.method = Some(method);
                    record.bytes_done = record.bytes_total;
                    record.progress = 95;
                })
                .await?;
                job.check_cancelled()
            }
            Err(error) if transfer::is_for_another_method(&error) => Err(StepError::NextMethod(Some(error))),
            Err(error) if error.kind() == ErrorKind::Exists => {
                // it came between our look and our making: not ours, so not to be removed
                job.disown(Artifact::Copy).await?;
                in_the_way(&copying.copy)
            }
            Err(error) => Err(error.into()),
        }
    }

    async fn undo(&self, job: &HeldJob, record: &Record, _image: Option<&Image>) -> StepResult<()> {
        if let Some(pool) = record.dest_pool.as_ref().filter(|_| record.has(Artifact::Copy)) {
            job.context.storage.remove_image(&ImageSpec::named(pool, record.private_name())).await?;
        }
        Ok(())
    }
}

/// Runs one method, and runs it again if a parent of the source was cut off meanwhile, since it may have read wrong
/// data.
async fn run(job: &HeldJob, method: Method, copying: &Copying) -> ceph::Result<Moved> {
    let (storage, from, copy) = (job.context.storage.as_ref(), &copying.source, &copying.copy);
    for _ in 0..CHAIN_TRIES {
        let before = from.readable(storage).await?;
        let request = TransferRequest {
            source: before.source.clone(),
            snapshot: before.snapshot.clone(),
            ..copying.request(job.tag().await)
        };
        let result = method.transfer().run(storage, &request, &job.progress, &job.cancel).await;
        if from.is_unchanged(storage, &before, &result).await? {
            return result;
        }
        tracing::warn!(image_id = %job.id, job_stage = "transfer", source = %request.source,
            "a parent of the source was cut off during the copy; the copy is made again");
        storage.remove_image(copy).await?;
    }
    Err(chain_changes(copy))
}
