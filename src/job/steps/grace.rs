//! At once: the source's snapshot is kept for a while after the image has become independent of it. A client that
//! opened the image before may have been stopped between "not in the image" and "read the parent".

use async_trait::async_trait;
use jiff::SignedDuration;

use super::super::error::{StepError, StepResult};
use super::super::held::HeldJob;
use super::super::record::{Detached, Phase, Record};
use super::detaching::is_deleted;
use super::{Attempt, Step};

pub struct Grace;

#[async_trait]
impl Step for Grace {
    fn name(&self) -> &'static str {
        "grace"
    }

    fn phase(&self) -> Phase {
        Phase::Detach
    }

    fn is_needed(&self, _attempt: &Attempt, record: &Record) -> bool {
        !is_deleted(record)
    }

    /// The time is taken by one daemon's clock: for another one that finds it over, it begins again.
    async fn apply(&self, job: &HeldJob, attempt: &mut Attempt) -> StepResult<()> {
        let (now, own) = (job.context.clock.now(), job.context.identity.instance);
        let grace = SignedDuration::try_from(attempt.config.offload.detach_grace).unwrap_or(SignedDuration::MAX);
        let Some(Detached { at, by }) = job.record().await.detached else {
            return Err(StepError::Retry("the image was not found independent of its source".into()));
        };
        let elapsed = now.duration_since(at.min(now));
        let left = match elapsed < grace {
            true => grace - elapsed,
            false if by == own => return Ok(()),
            false => {
                job.update(|record| record.detached = Some(Detached { at: now, by: own })).await?;
                grace
            }
        };
        Err(StepError::Later(left.try_into().unwrap_or_default()))
    }
}
