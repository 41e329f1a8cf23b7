//! How a run ends: the image is there, another attempt comes later, or the job ends without an image.
//!
//! An outcome without an image is stored first. Then every step is undone, then the requester is told, then the record
//! ends. Any of it may be repeated.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};

use super::{JobRun, RunResult, StepError, StepResult};
use crate::decline::Decline;
use crate::job::backoff::{holds_instance, pause_of};
use crate::job::daemons;
use crate::job::record::{Outcome, Phase, Publication, Publish, Record, Registration, Reporting, State};
use crate::job::signal::Signal;
use crate::job::steps::{self, Attempt, Step, StepName};
use crate::openstack::{self, Image};
use crate::plan::{self, PlanError};
use crate::publish::image_status::is_empty_upload;
use crate::transfer::Method;

/// Why a request is declined if an empty upload made its image active.
const EMPTY_UPLOAD: &str = "the image is active and empty: a client uploaded nothing to it (`openstack image create` \
    uploads its standard input). Delete it, and ask with `rbd-offload request`";

/// How long a job waits for a pool in which the calls of other jobs hang.
const CLOSED_POOL_PAUSE: SignedDuration = SignedDuration::from_secs(30);

/// Whether an attempt counts for the limit of retries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum CountsAttempt {
    Yes,
    No,
}

impl JobRun {
    /// Moves the record to its terminal state, and takes this daemon out of it.
    pub(super) async fn finish_job(&self, outcome: &Outcome) -> StepResult<()> {
        let now = self.job.context.clock.now();
        if let Err(illegal) = self.job.record().await.enter(outcome.state, now) {
            return Err(StepError::Abandon(illegal.to_string()));
        }
        let done = outcome.state == State::Done;
        self.job
            .update_with_signals(|record, _| {
                let _ = record.enter(outcome.state, now);
                record.reason = (!done).then(|| outcome.reason.clone());
                record.progress = if done { 100 } else { record.progress };
                record.owner = None;
                record.owner_address = None;
                record.artifacts.clear();
                record.registration = Registration::Unposted;
                // they came too late, or this is what they asked for
                vec![Signal::Cancel, Signal::RecheckImage, Signal::Retry]
            })
            .await?;
        // the job has ended; the daemon that reads a stale index entry next corrects it
        if let Err(error) = self.job.index().await {
            tracing::debug!(image_id = %self.job.id, ?error, "the index does not say yet that the job ended");
        }
        let record = self.job.record().await;
        let why = match (outcome.state, outcome.decline) {
            (State::Declined, why) => why.unwrap_or(Decline::Other).as_str(),
            _ => "none",
        };
        metrics::counter!("rbd_offload_jobs_ended_total",
            "state" => outcome.state.as_str(), "reason" => why, "trigger" => record.trigger.as_str(),
            "method" => record.method.map_or("none", Method::as_str))
        .increment(1);
        let seconds = now.duration_since(record.created_at).as_secs_f64();
        // of an image that was published at once it is known since then
        if done && record.detaching_since.is_none() {
            metrics::histogram!("rbd_offload_job_duration_seconds").record(seconds);
        }
        tracing::info!(image_id = %self.job.id, job_stage = outcome.state.as_str(), seconds, reason = outcome.reason,
            bytes = record.bytes_total, method = record.method.map(Method::as_str), "the job ended");
        Ok(())
    }

    /// Ends the run, and releases the lease where the job is not left to another daemon.
    pub(super) async fn handle_stop(&self, stop: StepError) -> RunResult {
        let has_ended = self.job.record().await.state.is_ended();
        let only_goes_forward = self.only_goes_forward().await;
        let lease_was_lost = matches!(stop, StepError::LeaseLost | StepError::Interrupted);
        let result = match stop {
            StepError::Later(after) => self.continue_later(after).await,
            StepError::End(Outcome { reason, .. }) | StepError::Retry(reason) if only_goes_forward => {
                self.retry_detaching(&reason).await
            }
            // the run only checked whether an ended job was requested again: it retries, since a job ends only once
            StepError::End(Outcome { reason, .. }) | StepError::Retry(reason) if has_ended => {
                self.schedule_retry(&reason, CountsAttempt::Yes).await
            }
            StepError::End(outcome) => self.abort_job(outcome).await,
            StepError::Retry(reason) => {
                self.try_release_instance().await;
                self.retry_or_fail(&reason).await
            }
            // the index tells the engine not to take it before there is room
            StepError::NoRoom { pool } => {
                let released = self.release_ownership(|record| record.dest_pool = Some(pool.clone())).await;
                released.map_or(RunResult::Abandoned, |()| RunResult::Waiting(Duration::ZERO))
            }
            StepError::OtherBackend { backend, reason } => self.leave_or_decline(backend, reason).await,
            StepError::Drained => {
                // there may be no other daemon for a while
                self.try_release_instance().await;
                tracing::info!(image_id = %self.job.id, "job released: this daemon is stopping");
                let released = self.release_ownership(|record| record.takeovers = 0).await;
                released.map_or(RunResult::Abandoned, |()| RunResult::Released)
            }
            StepError::LeaseLost | StepError::Interrupted => RunResult::Abandoned,
            StepError::PoolClosed(reason) => self.wait_for_pool(&reason).await,
            // the runner takes the next one, or says what was wrong with the last
            StepError::NextMethod(_) => self.schedule_retry("no method was left", CountsAttempt::Yes).await,
            // the same, where it was met a second time
            StepError::WhenCopied(reason) => self.retry_or_fail(&reason).await,
            StepError::Abandon(reason) => self.abandon(&reason),
        };
        if result != RunResult::Abandoned {
            self.job.release_lease().await;
        } else if lease_was_lost || self.job.lease.is_over() {
            // a call that failed for the same reason may have been noticed first
            metrics::counter!("rbd_offload_leases_lost_total").increment(1);
            tracing::warn!(image_id = %self.job.id, "the lease was lost; another daemon goes on with the job");
        }
        result
    }

    async fn retry_or_fail(&self, reason: &str) -> RunResult {
        match self.failure_after_last_retry(reason).await {
            Some(outcome) => self.abort_job(outcome).await,
            None => self.schedule_retry(reason, CountsAttempt::Yes).await,
        }
    }

    /// Leaves the job to a daemon that is configured for its source, if one lives; otherwise the request is declined.
    async fn leave_or_decline(&self, backend: String, reason: String) -> RunResult {
        let context = &self.job.context;
        let (own, now) = (context.identity.instance, context.clock.now());
        match daemons::with_backend(context.store.objects().as_ref(), own, &backend, now).await {
            Ok(Some(other)) => {
                tracing::info!(image_id = %self.job.id, backend, other, "left to a daemon that has this backend");
                self.try_release_instance().await;
                let released = self.release_ownership(|record| record.needs_backend = Some(backend.clone())).await;
                released.map_or(RunResult::Abandoned, |()| RunResult::LeftToAnother)
            }
            Ok(None) => self.abort_job(Outcome::declined(Decline::NoBackend, reason)).await,
            Err(error) => self.retry_or_fail(&error.to_string()).await,
        }
    }

    /// Leaves the job until the pool may answer again. The attempt does not count: nothing is wrong with the job.
    async fn wait_for_pool(&self, reason: &str) -> RunResult {
        self.try_release_instance().await;
        let not_before = self.job.context.clock.now().checked_add(CLOSED_POOL_PAUSE).ok();
        tracing::warn!(image_id = %self.job.id, reason, "job waits for a pool that does not answer");
        let left = self
            .release_ownership(|record| {
                if !record.state.is_ended() {
                    record.reason = Some(reason.to_owned());
                }
                record.not_before = not_before;
            })
            .await;
        left.map_or(RunResult::Abandoned, |()| RunResult::Waiting(CLOSED_POOL_PAUSE.unsigned_abs()))
    }

    fn abandon(&self, reason: &str) -> RunResult {
        tracing::error!(image_id = %self.job.id, reason, "the job is left alone");
        RunResult::Abandoned
    }

    /// Gives up ownership in the record, so that no other daemon fences this one for it.
    pub(super) async fn release_ownership(&self, change: impl Fn(&mut Record)) -> StepResult<()> {
        let address = self.job.context.storage.address().await?;
        let own = self.job.context.identity.owner();
        self.job
            .update(|record| {
                // another's stays: it has not been fenced yet
                let is_other = match (&record.owner_address, &record.owner) {
                    (Some(owner), _) => *owner != address,
                    (None, Some(owner)) => *owner != own,
                    (None, None) => false,
                };
                if !is_other {
                    record.owner = None;
                    record.owner_address = None;
                }
                change(record);
            })
            .await?;
        self.job.index().await
    }

    /// The end of a job that has no retry left.
    pub(super) async fn failure_after_last_retry(&self, reason: &str) -> Option<Outcome> {
        let record = self.job.record().await;
        let attempts = record.attempts.saturating_add(1);
        // nothing undoes an active image
        (record.phase() < Phase::Detach && record.attempts >= self.job.context.config.borrow().offload.retries)
            .then(|| Outcome::new(State::Failed, format!("given up after {attempts} attempts: {reason}")))
    }

    /// When the next attempt is due.
    pub(super) fn next_attempt(&self, record: &Record) -> Option<Timestamp> {
        let pause = SignedDuration::try_from(pause_of(record)).unwrap_or(SignedDuration::ZERO);
        self.job.context.clock.now().checked_add(pause).ok()
    }

    /// Leaves the job for a while.
    pub(super) async fn schedule_retry(&self, reason: &str, counts: CountsAttempt) -> RunResult {
        let record = self.job.record().await;
        let (attempts, pause) = (record.attempts, pause_of(&record));
        let not_before = self.next_attempt(&record);
        metrics::counter!("rbd_offload_retries_total").increment(1);
        tracing::warn!(image_id = %self.job.id, reason, attempts, pause_seconds = pause.as_secs_f64(),
            "job will be retried");
        let left = self
            .release_ownership(|record| {
                // why a job ended stays what it is
                if !record.state.is_ended() {
                    record.reason = Some(reason.to_owned());
                }
                record.not_before = not_before;
                if counts == CountsAttempt::Yes {
                    // an owner that releases the job has neither died nor stalled with it
                    record.takeovers = 0;
                }
                // also on the way to an end, where it only makes the pauses longer
                if counts == CountsAttempt::Yes || record.pending_outcome().is_some() {
                    record.attempts = record.attempts.saturating_add(1);
                }
            })
            .await;
        left.map_or(RunResult::Abandoned, |()| RunResult::Waiting(pause))
    }

    /// Ends the job without an image. May be repeated from any point.
    async fn abort_job(&self, outcome: Outcome) -> RunResult {
        let outcome = match self.leave_to_others(outcome).await {
            Ok(outcome) => outcome,
            Err(left) => return left,
        };
        self.job.set_uncancellable();
        match self.undo_and_report(outcome).await {
            Ok(state) => RunResult::Ended(state),
            Err(StepError::LeaseLost) => RunResult::Abandoned,
            Err(StepError::Abandon(reason)) => self.abandon(&reason),
            // the image is active all the same, and depends on its source
            Err(StepError::Later(after)) => self.continue_later(after).await,
            Err(StepError::Retry(reason) | StepError::PoolClosed(reason) | StepError::End(Outcome { reason, .. })) => {
                self.schedule_retry(&reason, CountsAttempt::No).await
            }
            Err(
                StepError::Interrupted
                | StepError::Drained
                | StepError::NoRoom { .. }
                | StepError::OtherBackend { .. }
                | StepError::WhenCopied(_)
                | StepError::NextMethod(_),
            ) => self.schedule_retry("stopped while it was ending", CountsAttempt::No).await,
        }
    }

    async fn undo_and_report(&self, outcome: Outcome) -> StepResult<State> {
        let stored = self.job.record().await.outcome;
        let is_elsewhere = outcome.decline == Some(Decline::Elsewhere);
        // another deployment took the request after an outcome was stored that nobody was told of
        let replaces = |stored: &Outcome| is_elsewhere && stored.report == Reporting::Due;
        let outcome = stored.clone().filter(|stored| !replaces(stored)).unwrap_or(outcome);
        if stored.as_ref() != Some(&outcome) {
            self.job
                .update(|record| {
                    record.outcome = Some(outcome.clone());
                    // there will be no image for it, and it may be what makes the record too large
                    record.publication = Publication::default();
                })
                .await?;
        }
        *self.shown.lock().await = None;
        // Nova may be waiting for the disk; Glance, which is asked next, may be away
        self.release_instance().await?;
        let is_unposted = self.job.record().await.registration == Registration::Unposted;
        let (image, is_too_large) = match plan::read_image(self.job.context.cloud.as_ref(), self.job.id).await {
            Ok(image) => (Some(image), false),
            Err(PlanError::Gone) => (None, false),
            // its owner made it so. Glance knows no location of this job, so nothing of it can be active
            Err(PlanError::OpenStack(error)) if error.kind() == openstack::ErrorKind::TooLarge && is_unposted => {
                tracing::warn!(image_id = %self.job.id, %error, "the outcome of the job is not written to the image record");
                self.job.update(|record| record.needs_repair = true).await?;
                (None, true)
            }
            Err(error) => return Err(error.into()),
        };
        if let Some(state) = self.became_active_anyway(image.as_ref()).await? {
            return Ok(state);
        }
        if image.is_none() && !is_too_large && self.has_clones_in_trash().await? {
            self.job.update(|record| record.outcome = None).await?;
            self.enter_detaching().await?;
            return Err(StepError::Later(Duration::ZERO));
        }
        // first the steps that make nothing: their undo may have to wait for Glance
        self.undo(image.as_ref(), |step| step.makes().is_none()).await?;
        self.job.before_visible_step().await?;
        if self.is_beyond_cleanup().await {
            tracing::error!(image_id = %self.job.id, "daemons died while they removed the objects of this job; the objects stay");
        } else {
            self.undo_steps().await?;
            self.apply_at_end().await?;
        }
        // read again: the removal may have taken long, and what its owner wrote meanwhile must not be undone
        let image = match image {
            Some(_) => self.job.context.cloud.image(&self.job.id.to_string()).await?,
            None => None,
        };
        let mut outcome = outcome;
        match image {
            Some(_) if outcome.decline == Some(Decline::Elsewhere) => {}
            Some(image) if self.is_taken_by_another(&image, &outcome).await => {
                outcome = Outcome::elsewhere(&outcome.reason);
                self.job.update(|record| record.outcome = Some(outcome.clone())).await?;
            }
            Some(image) if image.status == "queued" => self.report_outcome(image, &outcome).await?,
            // another writer's; while it uploads, Glance would bring back what is taken off
            Some(image) => {
                if outcome.decline == Some(Decline::OtherWriter) && is_empty_upload(&image) {
                    outcome = Outcome::declined(Decline::EmptyUpload, EMPTY_UPLOAD);
                }
                self.job.update(|record| record.needs_repair = true).await?;
            }
            None => {}
        }
        self.finish_job(&outcome).await?;
        Ok(outcome.state)
    }

    /// Whether as many daemons died in the cleanup of the job as had died in its steps.
    async fn is_beyond_cleanup(&self) -> bool {
        let limit = self.job.context.config.borrow().offload.max_takeovers;
        self.job.record().await.is_beyond_cleanup(limit)
    }

    /// A registration that seemed to have failed went through after all: then the image stays, and the job is done. An
    /// image that is active under another format than the inspected one is deactivated, and the job failed.
    async fn became_active_anyway(&self, image: Option<&Image>) -> StepResult<Option<State>> {
        let record = self.job.record().await;
        let (Some(image), Some(_), State::Publishing) = (image, &record.dest_pool, record.state) else {
            return Ok(None);
        };
        let mut attempt = Attempt::new(self.job.context.config.borrow().clone());
        attempt.image = Some(image.clone());
        if !attempt.is_active() || !self.job.is_our_image(image).await? {
            return Ok(None);
        }
        let Some(finish) = steps::step(StepName::Finish) else { return Ok(None) };
        let outcome = match finish.apply(&self.job, &mut attempt).await {
            Ok(()) => {
                self.job.update(|record| record.outcome = None).await?;
                Outcome::new(State::Done, "")
            }
            Err(StepError::End(outcome)) => {
                finish.undo(&self.job, &record, Some(image)).await?;
                outcome
            }
            Err(error) => return Err(error),
        };
        if record.publish == Publish::AtOnce {
            self.enter_detaching().await?;
            return Err(StepError::Later(Duration::ZERO));
        }
        self.release_source().await?;
        if outcome.state == State::Done {
            self.apply_at_end().await?;
        }
        self.finish_job(&outcome).await?;
        Ok(Some(outcome.state))
    }

    /// Ends the hold on an instance's disk between two attempts, and before anything that may have to wait for a
    /// service. The next attempt begins from scratch in any case.
    async fn release_instance(&self) -> StepResult<()> {
        let record = self.job.record().await;
        if record.state != State::Copying || !holds_instance(&record) {
            return Ok(());
        }
        self.job.renew_lease().await?;
        // nothing is cloned from the snapshot: the disk first, since a large copy takes its time to go
        if record.method != Some(Method::Clone)
            && let Err(stop) = self.undo(None, Step::holds_source).await
        {
            // the copy of a daemon before this one may be a clone
            tracing::debug!(image_id = %self.job.id, ?stop, "the snapshot goes after the copy");
        }
        self.undo_steps().await
    }

    /// Like [`release_instance`](Self::release_instance), where the next attempt does it if this fails.
    async fn try_release_instance(&self) {
        if let Err(stop) = self.release_instance().await {
            tracing::warn!(image_id = %self.job.id, ?stop, "the snapshot on the instance's disk is not removed yet");
        }
    }
}
