//! The names that a job is going to use must be free. What has such a name is not the job's: it would have been
//! removed.

use super::super::error::{StepResult, end};
use super::super::held::HeldJob;
use super::super::record::State;
use crate::ceph::ImageSpec;

/// Whether there is no image of that name.
pub async fn check_free(job: &HeldJob, image: &ImageSpec) -> StepResult<()> {
    match job.context.storage.image(image, None).await? {
        Some(_) => in_the_way(image),
        None => Ok(()),
    }
}

pub fn in_the_way<T>(image: &ImageSpec) -> StepResult<T> {
    end(State::Failed, format!("{image} is in the way and is not this job's: inspect it, remove it, then retry"))
}
