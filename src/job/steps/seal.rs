//! The protected snapshot `snap`, which consumers clone from. It is made only when the copy has the shape of a
//! published image, and goes with the copy. A clone that is published at once gets its shape when it is detached.

use async_trait::async_trait;

use super::super::error::{StepError, StepResult};
use super::super::held::HeldJob;
use super::super::record::{Phase, Publish};
use super::{Attempt, Step};
use crate::publish;

pub struct Seal;

#[async_trait]
impl Step for Seal {
    fn name(&self) -> &'static str {
        "seal"
    }

    fn phase(&self) -> Phase {
        Phase::Prepare
    }

    async fn apply(&self, job: &HeldJob, attempt: &mut Attempt) -> StepResult<()> {
        let (storage, copy) = (job.context.storage.as_ref(), &attempt.copying()?.copy);
        let fault = match job.record().await.publish {
            Publish::WhenCopied => publish::create_snap(storage, copy, &job.progress, &job.cancel).await?,
            Publish::AtOnce => publish::seal_clone(storage, copy).await?,
        };
        let Some(fault) = fault else { return Ok(()) };
        tracing::error!(image_id = %job.id, job_stage = "seal", copy = %copy, fault, "the copy cannot be published");
        storage.remove_image(copy).await?;
        Err(StepError::Retry(format!("the copy cannot be published: {fault}; it was removed and is made again")))
    }
}
