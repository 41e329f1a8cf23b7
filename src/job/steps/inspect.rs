//! Reads the header of the copy. A container format is declined: it is not registered as raw.

use async_trait::async_trait;

use super::super::error::{StepResult, decline};
use super::super::held::HeldJob;
use super::super::record::Phase;
use super::{Attempt, Step};
use crate::decline::Decline;
use crate::publish;
use crate::publish::image_status::Status;

pub struct Inspect;

#[async_trait]
impl Step for Inspect {
    fn name(&self) -> &'static str {
        "inspect"
    }

    fn phase(&self) -> Phase {
        Phase::Prepare
    }

    fn status(&self) -> Option<(Status, &'static str)> {
        Some((Status::Publishing, "the copy is complete and is being registered"))
    }

    async fn apply(&self, job: &HeldJob, attempt: &mut Attempt) -> StepResult<()> {
        let Some(format) = publish::inspect(job.context.storage.as_ref(), &attempt.copying()?.copy).await? else {
            return Ok(());
        };
        decline(
            Decline::ContainerHeader,
            format!(
                "the disk starts with the header of a {format} file: such a disk is not registered as raw, upload it \
                 instead"
            ),
        )
    }
}
