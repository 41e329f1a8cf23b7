//! Requests for other deployments: where several of them, one for each Ceph cluster, share a Glance, each hears of
//! every request, and only one has the disk.
//!
//! A deployment that has not found the disk writes nothing on the image record. It waits for `[offload] decline_after`
//! and looks once more: a status shows that another deployment has taken the request, a missing request tag that
//! another one has declined it. Otherwise it declines the request itself. Each deployment waits a little longer or
//! shorter than the others, so that one of them is the first.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use uuid::Uuid;

use super::outcome::CountsAttempt;
use super::{JobRun, RunResult};
use crate::decline::Decline;
use crate::job::record::{Outcome, State};
use crate::plan::{self, PlanError};
use crate::publish::image_status;
use crate::request::{self, TagRequest};

impl JobRun {
    /// The outcome with which the job ends now, or how the run ends because the request is left to others for a while.
    pub(super) async fn leave_to_others(&self, outcome: Outcome) -> Result<Outcome, RunResult> {
        let record = self.job.record().await;
        let context = &self.job.context;
        let wait = context.config.borrow().offload.decline_after;
        let may_be_elsewhere = !wait.is_zero()
            && record.dest_pool.is_none()
            && record.handover.is_none()
            && !record.retried
            && outcome.state != State::Cancelled
            && outcome.decline != Some(Decline::Elsewhere);
        if !may_be_elsewhere {
            return Ok(outcome);
        }
        let due = due(record.created_at, wait, context.deployment);
        if context.clock.now() < due {
            tracing::info!(image_id = %self.job.id, reason = outcome.reason, until = %due,
                "the disk was not found here: the request is left to other deployments");
            let left = self
                .release_ownership(|record| {
                    record.reason = Some(outcome.reason.clone());
                    record.not_before = Some(due);
                    // it is looked at again when the time is over
                    record.outcome = None;
                })
                .await;
            return Err(left.map_or(RunResult::Abandoned, |()| RunResult::Waiting(wait)));
        }
        match plan::read_image(context.cloud.as_ref(), self.job.id).await {
            Ok(image) => {
                let is_asked = request::parse_request_tags(&image.tags) != TagRequest::Absent;
                match is_asked && !image_status::shows_running_job(&image) {
                    true => Ok(outcome),
                    false => Ok(Outcome::elsewhere(&outcome.reason)),
                }
            }
            // what ends a job tells apart the image that is gone and the one that cannot be read
            Err(PlanError::Gone) => Ok(outcome),
            Err(error) => Err(self.schedule_retry(&error.to_string(), CountsAttempt::No).await),
        }
    }
}

/// When a deployment no longer leaves a request to others: 75 to 124 hundredths of `wait` after it came.
fn due(came: Timestamp, wait: Duration, deployment: Uuid) -> Timestamp {
    let share = 75 + u32::try_from(deployment.as_u128() % 50).unwrap_or_default();
    let wait = SignedDuration::try_from(wait * share / 100).unwrap_or(SignedDuration::ZERO);
    came.checked_add(wait).unwrap_or(came)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deployments_decline_one_after_the_other() {
        let (came, wait) = (Timestamp::UNIX_EPOCH, Duration::from_secs(60));
        let seconds = |id: u128| due(came, wait, Uuid::from_u128(id)).as_second();
        assert_eq!((seconds(0), seconds(25), seconds(49)), (45, 60, 74));
        assert_eq!(due(came, Duration::ZERO, Uuid::nil()), came);
    }
}
