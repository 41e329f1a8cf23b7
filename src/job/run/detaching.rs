//! A job whose image is active and depends on its source. It has no undo and no limit of retries: it goes on until the
//! image depends on nothing, or is deleted.

use std::time::Duration;

use jiff::SignedDuration;

use super::outcome::CountsAttempt;
use super::{JobRun, RunResult, StepResult};
use crate::ceph::Changed;
use crate::job::backoff::BACKOFF_MAX;
use crate::job::record::{Outcome, Phase, Publish, Registration, State};
use crate::job::signal::Signal;

impl JobRun {
    /// The image is active: from here on there is no undo.
    pub(super) async fn enter_detaching(&self) -> StepResult<()> {
        let now = self.job.context.clock.now();
        self.job
            .update_with_signals(|record, _| {
                let _ = record.enter(State::Detaching, now);
                // it came too late
                vec![Signal::Cancel]
            })
            .await?;
        let record = self.job.record().await;
        let seconds = now.duration_since(record.created_at).as_secs_f64();
        metrics::histogram!("rbd_offload_job_duration_seconds").record(seconds);
        tracing::info!(image_id = %self.job.id, job_stage = State::Detaching.as_str(), seconds,
            bytes = record.bytes_total, "the image is active; its copy goes on behind it");
        Ok(())
    }

    /// Whether the job only goes forward.
    pub(super) async fn only_goes_forward(&self) -> bool {
        self.job.record().await.phase() == Phase::Detach
    }

    /// Whether the published image is gone: Glance removes its data before its record. In the trash it is not gone.
    pub(super) async fn is_image_gone(&self) -> StepResult<bool> {
        let Some(image) = self.job.record().await.published_by_id() else { return Ok(false) };
        Ok(self.job.context.storage.is_gone(&image).await?)
    }

    /// Whether the image was active and was deleted before the record said so, and Glance has moved it to the trash
    /// since it has clones: they read from it, and it reads from the source.
    pub(super) async fn has_clones_in_trash(&self) -> StepResult<bool> {
        let record = self.job.record().await;
        let was_posted = record.publish == Publish::AtOnce && record.registration >= Registration::Posted;
        let Some(image) = record.published_by_id().filter(|_| was_posted && record.state == State::Publishing) else {
            return Ok(false);
        };
        let storage = self.job.context.storage.as_ref();
        if !storage.in_trash(&image).await? {
            return Ok(false);
        }
        // one without clones was being removed
        self.job.renew_lease().await?;
        Ok(storage.purge(&image).await? == Changed::No && storage.image(&image, None).await?.is_some())
    }

    pub(super) async fn is_deletion_noted(&self) -> bool {
        self.job.record().await.end_of_detaching().state == State::Cancelled
    }

    /// Writes down that the image was deleted, where it was: the job then only removes what it made.
    pub(super) async fn note_deletion(&self) -> StepResult<()> {
        let record = self.job.record().await;
        if self.is_deletion_noted().await || !self.is_image_gone().await? {
            return Ok(());
        }
        let reason = match record.detached {
            Some(_) => "the image was deleted",
            None => "the image was deleted before its copy was complete",
        };
        self.job.update(|record| record.outcome = Some(Outcome::new(State::Cancelled, reason))).await
    }

    /// Leaves the job for a while after an error. If the error came from the deletion of the image, the cleanup begins
    /// at once.
    pub(super) async fn retry_detaching(&self, reason: &str) -> RunResult {
        let was_noted = self.is_deletion_noted().await;
        if !was_noted && self.note_deletion().await.is_ok() && self.is_deletion_noted().await {
            return self.continue_later(Duration::ZERO).await;
        }
        tracing::warn!(image_id = %self.job.id, job_stage = State::Detaching.as_str(), reason,
            "the active image still depends on its source");
        self.schedule_retry(reason, CountsAttempt::Yes).await
    }

    /// Leaves the job until its next step is due. Nothing is wrong with it.
    pub(super) async fn continue_later(&self, after: Duration) -> RunResult {
        let pause = after.min(BACKOFF_MAX);
        let until = SignedDuration::try_from(pause).unwrap_or(SignedDuration::ZERO);
        let not_before = self.job.context.clock.now().checked_add(until).ok().filter(|_| !pause.is_zero());
        let left = self
            .release_ownership(|record| {
                record.not_before = not_before;
                (record.takeovers, record.attempts) = (0, 0);
                record.reason = None;
            })
            .await;
        left.map_or(RunResult::Abandoned, |()| RunResult::Waiting(pause))
    }
}
