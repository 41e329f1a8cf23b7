//! The protected snapshot `snap`, which consumers clone from. It is made only when the copy has the shape of a
//! published image, and goes with the copy.

use async_trait::async_trait;

use super::super::error::{StepError, StepResult};
use super::super::held::HeldJob;
use super::super::record::State;
use super::{Attempt, Step};
use crate::publish;

pub struct Seal;

#[async_trait]
impl Step for Seal {
    fn name(&self) -> &'static str {
        "seal"
    }

    fn state(&self) -> State {
        State::Copying
    }

    async fn apply(&self, job: &HeldJob, attempt: &mut Attempt) -> StepResult<()> {
        let (storage, copy) = (job.context.storage.as_ref(), &attempt.copying()?.copy);
        let Some(fault) = publish::seal(storage, copy, &job.progress, &job.cancel).await? else { return Ok(()) };
        tracing::error!(image_id = %job.id, job_stage = "seal", copy = %copy, fault, "the copy cannot be published");
        storage.remove_image(copy).await?;
        Err(StepError::Retry(format!("the copy cannot be published: {fault}; it was removed and is made again")))
    }
}
