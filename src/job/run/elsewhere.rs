//! Requests for other deployments: where several of them, one for each Ceph cluster, share a Glance, each hears of
//! every request, and only one has the disk.
//!
//! A deployment that has not found the disk writes nothing on the image record. It plans the job again once a minute
//! until `[offload] decline_after` is over, and looks at the record then. A status shows that another deployment has
//! taken the request. A missing request tag shows that another one has declined it. If neither is so, the deployment
//! declines the request itself. Each deployment waits a little longer or shorter than the others, so that one of them
//! is the first.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use uuid::Uuid;

use super::outcome::CountsAttempt;
use super::{JobRun, RunResult, StepResult};
use crate::decline::Decline;
use crate::job::backoff::BACKOFF_MAX;
use crate::job::held::has_running_task;
use crate::job::record::{Outcome, State};
use crate::openstack::{self, Image};
use crate::plan::{self, PlanError};
use crate::publish::image_status;
use crate::request::{self, TagRequest, Trigger};

impl JobRun {
    /// The outcome with which the job ends now, or how the run ends because the request is left to others for a while.
    pub(super) async fn leave_to_others(&self, outcome: Outcome) -> Result<Outcome, RunResult> {
        let decline = outcome.decline;
        let is_other_writer = decline == Some(Decline::OtherWriter);
        let may_be_elsewhere = match (outcome.state, decline) {
            (State::Failed, _) => true,
            (_, why) => is_other_writer || why.is_some_and(is_of_the_source),
        };
        if !may_be_elsewhere || !self.shares_requests().await {
            return Ok(outcome);
        }
        let record = self.job.record().await;
        if record.is_reported() {
            // the requester may have been told
            return Ok(outcome);
        }
        let context = &self.job.context;
        let wait = context.config.borrow().offload.decline_after;
        let now = context.clock.now();
        let due = due(record.created_at, wait, context.deployment);
        // an image that another client writes needs no wait, and the operator who asks for a retry wants an answer.
        // A time that lies further ahead than any wait was written by a clock that is wrong.
        let is_due = is_other_writer || record.retried || now >= due || due.duration_since(now) > signed(wait * 2);
        if !is_due {
            tracing::info!(image_id = %self.job.id, reason = outcome.reason, until = %due,
                "the disk was not found here: the request is left to other deployments");
            let next = now.checked_add(signed(BACKOFF_MAX)).map_or(due, |latest| due.min(latest));
            let left = self
                .release_ownership(|record| {
                    record.reason = Some(outcome.reason.clone());
                    record.not_before = Some(next);
                    // the next attempt finds it again
                    record.outcome = None;
                })
                .await;
            return Err(left.map_or(RunResult::Abandoned, |()| RunResult::Waiting(wait.min(BACKOFF_MAX))));
        }
        match plan::read_image(context.cloud.as_ref(), self.job.id).await {
            Ok(image) => match is_open(&image, record.retried) {
                true => Ok(outcome),
                false => Ok(Outcome::elsewhere(&outcome.reason)),
            },
            // the end of a job knows what to do about both
            Err(PlanError::Gone) => Ok(outcome),
            Err(PlanError::OpenStack(error)) if error.kind() == openstack::ErrorKind::TooLarge => Ok(outcome),
            Err(error) => Err(self.schedule_retry(&error.to_string(), CountsAttempt::No).await),
        }
    }

    /// Whether another deployment has taken the request meanwhile. `image` was read last.
    pub(super) async fn is_taken_by_another(&self, image: &Image, outcome: &Outcome) -> bool {
        // no deployment works on a request that cannot be read, or for a source that the project does not own: the
        // status is one that this deployment has left
        let holds_everywhere = matches!(outcome.decline, Some(Decline::NoSource | Decline::Request));
        image_status::shows_running_job(image)
            && outcome.state != State::Cancelled
            && !holds_everywhere
            && !self.job.record().await.is_reported()
            && self.shares_requests().await
    }

    /// Whether a service offers the image to the deployment of another cluster.
    pub(super) async fn is_offered_elsewhere(&self, image: &Image) -> StepResult<bool> {
        if self.job.context.config.borrow().offload.decline_after.is_zero() {
            return Ok(false);
        }
        let Some(offer) = request::parse_offer_tag(&image.tags) else { return Ok(false) };
        Ok(!offer.fsid.to_string().eq_ignore_ascii_case(&self.job.context.storage.fsid().await?))
    }

    /// Whether another deployment may be the one that has the disk of this request.
    pub(super) async fn shares_requests(&self) -> bool {
        let record = self.job.record().await;
        let is_alone = self.job.context.config.borrow().offload.decline_after.is_zero();
        // the plan has found the disk, or this deployment has written a status before the others were configured
        let is_ours = record.dest_pool.is_some() || record.acknowledged;
        !is_alone && !is_ours && record.trigger == Trigger::Request
    }
}

/// Whether the reason is the place of the source, which another deployment may serve. All other reasons hold for every
/// deployment.
fn is_of_the_source(why: Decline) -> bool {
    matches!(why, Decline::NoBackend | Decline::NoDisk | Decline::OtherCluster)
}

/// Whether the request is still to be dealt with. A `retried` one needs no tag.
fn is_open(image: &Image, retried: bool) -> bool {
    let is_asked = retried || request::parse_request_tags(&image.tags) != TagRequest::Absent;
    let is_idle = !image_status::shows_running_job(image) && !has_running_task(image);
    image_status::is_empty_upload(image) || (image.status == "queued" && is_asked && is_idle)
}

/// When a deployment no longer leaves a request to others: 75 to 124 hundredths of `wait` after it came.
fn due(came: Timestamp, wait: Duration, deployment: Uuid) -> Timestamp {
    let share = 75 + u32::try_from(deployment.as_u128() % 50).unwrap_or_default();
    came.checked_add(signed(wait * share / 100)).unwrap_or(came)
}

fn signed(time: Duration) -> SignedDuration {
    SignedDuration::try_from(time).unwrap_or(SignedDuration::ZERO)
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
