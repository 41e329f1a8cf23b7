//! The way out: done, another attempt later, or an end without an image.
//!
//! A decision to end without an image is stored first; then everything that the job made is taken down, then the tenant is
//! told, then the record ends. Any of it may be repeated.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::atomic::Ordering;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use uuid::Uuid;

use super::publishing::{HASHED_PER_SECOND, at_work};
use super::source::holds_instance;
use super::{Job, Outcome, Step, Stop};
use crate::ceph::ImageSpec;
use crate::decline::Decline;
use crate::job::daemons;
use crate::job::record::{self, Ending, Record, State};
use crate::openstack::Image;
use crate::plan::{self, NoPlan};
use crate::publish;
use crate::publish::record as image_record;
use crate::transfer;

/// Pause before the second attempt; each further one waits twice as long.
const BACKOFF_FIRST: Duration = Duration::from_secs(2);

/// Longest pause between attempts.
pub const BACKOFF_MAX: Duration = Duration::from_secs(60);

/// The longest while an instance's disk still has our snapshot, which the next attempt removes: Nova tries for a minute
/// to remove the disk of an instance that it deletes or rebuilds, and then gives up.
const INSTANCE_PAUSE_MAX: Duration = Duration::from_secs(15);

/// Pauses (of at most [`BACKOFF_MAX`]) that a job which failed leaves to a Glance task that seems to be at work still, or
/// to Cinder's deletion of the source.
const SERVICE_PAUSES: u32 = 20;

impl Job {
    /// Brings the record to its end state and gives the job out of hand.
    pub(super) async fn conclude(&self, ending: &Ending) -> Step<()> {
        let now = self.context.clock.now();
        if let Err(illegal) = self.snapshot().await.enter(ending.state, now) {
            return Err(Stop::Abandon(illegal.to_string()));
        }
        let done = ending.state == State::Done;
        self.update(|record| {
            let _ = record.enter(ending.state, now);
            record.reason = (!done).then(|| ending.reason.clone());
            record.progress = if done { 100 } else { record.progress };
            record.owner = None;
            record.owner_address = None;
            record.made = record::Made::default();
            record.cancel = false;
            record.check = false;
        })
        .await?;
        // the job has ended; the daemon that looks at a stale entry next puts it right
        if let Err(error) = self.index().await {
            tracing::debug!(image_id = %self.id, ?error, "the index does not say yet that the job ended");
        }
        let record = self.snapshot().await;
        let why = match (ending.state, ending.decline) {
            (State::Declined, why) => why.unwrap_or(Decline::Other).as_str(),
            _ => "none",
        };
        metrics::counter!("rbd_offload_jobs_ended_total",
            "state" => ending.state.as_str(), "reason" => why, "trigger" => record.trigger.as_str(),
            "method" => record.method.map_or("none", transfer::Method::as_str))
        .increment(1);
        let seconds = now.duration_since(record.created_at).as_secs_f64();
        if done {
            metrics::histogram!("rbd_offload_job_duration_seconds").record(seconds);
        }
        tracing::info!(image_id = %self.id, job_stage = ending.state.as_str(), seconds, reason = ending.reason,
            bytes = record.bytes_total, method = record.method.map(transfer::Method::as_str), "the job ended");
        Ok(())
    }

    pub(super) async fn index(&self) -> Step<()> {
        Ok(self.context.store.index(&self.snapshot().await).await?)
    }

    /// Ends the attempt, and gives the lease back.
    pub(super) async fn settle(&self, stop: Stop) -> Outcome {
        let outcome = self.settle_now(stop).await;
        if outcome != Outcome::Abandoned {
            self.lease.release(self.context.store.objects().as_ref()).await;
        }
        outcome
    }

    async fn settle_now(&self, stop: Stop) -> Outcome {
        let ended = self.snapshot().await.state.is_ended();
        match stop {
            // it only was to be seen whether it is asked for again: that can wait, and cannot end it a second time
            Stop::End(Ending { reason, .. }) | Stop::Retry(reason) if ended => self.pause(&reason, true).await,
            Stop::End(ending) => self.wind_up(ending).await,
            Stop::Retry(reason) => {
                self.try_release_instance().await;
                self.pause_or_fail(reason).await
            }
            // the index tells the engine not to take it before there is room
            Stop::NoRoom { pool } => match self.let_go(|record| record.dest_pool = Some(pool.clone())).await {
                Ok(()) => Outcome::Waiting(Duration::ZERO),
                Err(_) => Outcome::Abandoned,
            },
            Stop::OtherBackend { backend, reason } => self.leave_or_decline(backend, reason).await,
            Stop::Drained => {
                // there may be no other daemon for a while
                self.try_release_instance().await;
                tracing::info!(image_id = %self.id, "released: this daemon stops, another goes on");
                match self.let_go(|record| record.takeovers = 0).await {
                    Ok(()) => Outcome::Released,
                    Err(_) => Outcome::Abandoned,
                }
            }
            Stop::LeaseLost | Stop::Interrupted => {
                metrics::counter!("rbd_offload_leases_lost_total").increment(1);
                tracing::warn!(image_id = %self.id, "the lease was lost; another daemon goes on with the job");
                Outcome::Abandoned
            }
            Stop::Abandon(reason) => {
                tracing::error!(image_id = %self.id, reason, "the job is left alone");
                Outcome::Abandoned
            }
        }
    }

    /// Leaves the job to a daemon that is configured for its source, if one lives; otherwise the request is declined.
    async fn leave_or_decline(&self, backend: String, reason: String) -> Outcome {
        let (own, now) = (self.context.identity.instance, self.context.clock.now());
        match daemons::with_backend(self.context.store.objects().as_ref(), own, &backend, now).await {
            Ok(Some(other)) => {
                tracing::info!(image_id = %self.id, backend, other, "left to a daemon that has this backend");
                self.try_release_instance().await;
                match self.let_go(|record| record.needs_backend = Some(backend.clone())).await {
                    Ok(()) => Outcome::LeftToAnother,
                    Err(_) => Outcome::Abandoned,
                }
            }
            Ok(None) => self.wind_up(Ending::declined(Decline::NoBackend, reason)).await,
            Err(error) => self.pause_or_fail(error.to_string()).await,
        }
    }

    /// Gives up ownership in the record, so that nobody fences us for it.
    pub(super) async fn let_go(&self, change: impl Fn(&mut Record)) -> Step<()> {
        let address = self.context.storage.address().await?;
        self.update(|record| {
            // another's stays: it has not been fenced yet
            let is_other = match (&record.owner_address, &record.owner) {
                (Some(owner), _) => *owner != address,
                (None, Some(owner)) => *owner != self.context.identity.owner(),
                (None, None) => false,
            };
            if !is_other {
                record.owner = None;
                record.owner_address = None;
            }
            change(record);
        })
        .await?;
        self.index().await
    }

    pub(super) async fn pause_or_fail(&self, reason: String) -> Outcome {
        let record = self.snapshot().await;
        let retries = self.context.config.borrow().offload.retries;
        if record.attempts >= retries {
            let reason = format!("given up after {} attempts: {reason}", record.attempts.saturating_add(1));
            return self.wind_up(Ending::new(State::Failed, reason)).await;
        }
        self.pause(&reason, true).await
    }

    /// When the next attempt is due.
    pub(super) fn next_attempt(&self, record: &Record) -> Option<Timestamp> {
        let pause = SignedDuration::try_from(pause_of(record)).unwrap_or(SignedDuration::ZERO);
        self.context.clock.now().checked_add(pause).ok()
    }

    /// Leaves the job for a while. `counts`: this attempt counts for the limit of retries.
    pub(super) async fn pause(&self, reason: &str, counts: bool) -> Outcome {
        let record = self.snapshot().await;
        let (attempts, pause) = (record.attempts, pause_of(&record));
        let not_before = self.next_attempt(&record);
        metrics::counter!("rbd_offload_retries_total").increment(1);
        tracing::warn!(image_id = %self.id, reason, attempts, pause_seconds = pause.as_secs_f64(), "tried again later");
        let left = self
            .let_go(|record| {
                // why a job ended stays what it is
                if !record.state.is_ended() {
                    record.reason = Some(reason.to_owned());
                }
                record.not_before = not_before;
                if counts {
                    // an owner that releases the job has neither died nor stalled with it
                    record.takeovers = 0;
                }
                // also when winding up, where it only makes the pauses longer
                if counts || record.ending.is_some() {
                    record.attempts = record.attempts.saturating_add(1);
                }
            })
            .await;
        match left {
            Ok(()) => Outcome::Waiting(pause),
            Err(_) => Outcome::Abandoned,
        }
    }

    /// Ends the job without an image: the decision is stored, then everything we made is taken down, then the tenant is
    /// told, then the record ends. May be repeated from any point.
    pub(super) async fn wind_up(&self, ending: Ending) -> Outcome {
        self.finishing.store(true, Ordering::SeqCst);
        let stored = self.snapshot().await.ending;
        let ending = stored.clone().unwrap_or(ending);
        let work = async {
            if stored.is_none() {
                self.update(|record| {
                    record.ending = Some(ending.clone());
                    // there will be no image for it, and it may be what makes the record too large
                    record.publication = record::Publication::default();
                })
                .await?;
            }
            *self.tenant.lock().await = None;
            // Nova may be waiting for the disk; Glance, which is asked next, may be away
            self.release_instance().await?;
            let image = match plan::read_image(self.context.cloud.as_ref(), self.id).await {
                Ok(image) => Some(image),
                Err(NoPlan::Gone) => None,
                Err(error) => return Err(error.into()),
            };
            if let Some(state) = self.turned_active(image.as_ref()).await? {
                return Ok(state);
            }
            self.let_glance_finish(image.as_ref()).await?;
            self.before_visible_step().await?;
            if self.is_beyond_cleanup().await {
                tracing::error!(image_id = %self.id, "daemons died while they removed what this job made; it stays");
            } else {
                self.take_down().await?;
                self.purge_source().await?;
            }
            // read again: the removal may have taken long, and what its owner wrote meanwhile must not be undone
            let image = match image {
                Some(_) => self.context.cloud.image(&self.id.to_string()).await?,
                None => None,
            };
            match image {
                Some(image) if image.status == "queued" => self.tell_end(image, &ending).await?,
                // another writer's; while it uploads, Glance would bring back what is taken off
                Some(_) => self.update(|record| record.mend = true).await?,
                None => {}
            }
            self.conclude(&ending).await?;
            Ok(ending.state)
        };
        match work.await {
            Ok(state) => Outcome::Ended(state),
            Err(Stop::LeaseLost) => Outcome::Abandoned,
            Err(Stop::Abandon(reason)) => {
                tracing::error!(image_id = %self.id, reason, "the job is left alone");
                Outcome::Abandoned
            }
            Err(Stop::Retry(reason) | Stop::End(Ending { reason, .. })) => self.pause(&reason, false).await,
            Err(Stop::Interrupted | Stop::Drained | Stop::NoRoom { .. } | Stop::OtherBackend { .. }) => {
                self.pause("stopped while it was winding up", false).await
            }
        }
    }

    /// Whether as many daemons died removing what the job made as had died making it.
    async fn is_beyond_cleanup(&self) -> bool {
        let limit = self.context.config.borrow().offload.max_takeovers;
        self.snapshot().await.is_beyond_cleanup(limit)
    }

    /// A registration that seemed to have failed went through after all: then the image stays, and the job is done. An
    /// image that is active under another format than the inspected one is deactivated, and the job failed.
    pub(super) async fn turned_active(&self, image: Option<&Image>) -> Step<Option<State>> {
        let record = self.snapshot().await;
        let (Some(image), Some(pool), State::Publishing) = (image, &record.dest_pool, record.state) else {
            return Ok(None);
        };
        if !matches!(image.status.as_str(), "active" | "deactivated") || !self.is_our_image(image).await? {
            return Ok(None);
        }
        let ending = if image_record::is_raw_and_bare(image) {
            self.update(|record| record.ending = None).await?;
            self.finish(pool, image).await?;
            Ending::new(State::Done, "")
        } else {
            self.deactivate(pool, image).await?
        };
        self.release_source().await?;
        if ending.state == State::Done {
            self.purge_source().await?;
        }
        self.conclude(&ending).await?;
        Ok(Some(ending.state))
    }

    /// Whether the job has not waited for Glance or Cinder too long already.
    pub(super) fn may_wait_for_others(&self, record: &Record) -> bool {
        record.attempts < self.context.config.borrow().offload.retries.saturating_add(SERVICE_PAUSES)
    }

    /// While Glance works on our location, its image must not be taken away: it would become active without data.
    pub(super) async fn let_glance_finish(&self, image: Option<&Image>) -> Step<()> {
        let record = self.snapshot().await;
        let waits = record.state == State::Publishing && record.made.posted;
        if waits && record.attempts < self.glance_patience(&record) && image.is_some_and(at_work) {
            return Err(Stop::Retry("Glance still works on the image".into()));
        }
        Ok(())
    }

    /// Attempts, with pauses of at most [`BACKOFF_MAX`] between them, in which a Glance task has ended, also one that
    /// hashes the image.
    pub(super) fn glance_patience(&self, record: &Record) -> u32 {
        let hashes = record.bytes_total / HASHED_PER_SECOND / BACKOFF_MAX.as_secs();
        let hashes = u32::try_from(hashes).unwrap_or(u32::MAX);
        self.context.config.borrow().offload.retries.saturating_add(SERVICE_PAUSES).saturating_add(hashes)
    }

    /// Removes everything that the record says we made or were about to make.
    pub(super) async fn take_down(&self) -> Step<()> {
        let record = self.snapshot().await;
        let storage = self.context.storage.as_ref();
        if let Some(pool) = &record.dest_pool {
            if record.made.published {
                publish::withdraw(storage, pool, &self.tag().await).await?;
            }
            if record.made.copy {
                storage.remove_image(&ImageSpec::named(pool, record.private_name())).await?;
            }
        }
        self.release_source().await?;
        self.update(|record| record.made = record::Made::default()).await
    }
}

/// The pause before the job's next attempt.
fn pause_of(record: &Record) -> Duration {
    let pause = backoff(record.image_id, record.attempts);
    if holds_instance(record) { pause.min(INSTANCE_PAUSE_MAX) } else { pause }
}

/// The pause after so many attempts, a quarter longer or shorter by the job's id: jobs that failed together come back
/// one by one.
fn backoff(id: Uuid, attempts: u32) -> Duration {
    let pause = BACKOFF_FIRST.saturating_mul(1u32.checked_shl(attempts.min(16)).unwrap_or(u32::MAX)).min(BACKOFF_MAX);
    let mut hasher = DefaultHasher::new();
    (id, attempts).hash(&mut hasher);
    // 75 to 124 hundredths
    pause * u32::try_from(75 + hasher.finish() % 50).unwrap_or(100) / 100
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::{Source, Trigger};

    #[test]
    fn a_snapshot_on_an_instances_disk_is_gone_before_nova_gives_its_deletion_up() {
        let (image, instance) = (Uuid::new_v4(), Source::Instance(Uuid::new_v4()));
        let mut record = Record::new(image, Trigger::InstanceSnapshot, Some(instance), None, Timestamp::now());
        for attempts in 0..20 {
            record.attempts = attempts;
            record.made.snapshot = true;
            assert!(pause_of(&record) <= Duration::from_secs(15), "after {attempts} attempts");
        }
        record.made.snapshot = false;
        assert!(pause_of(&record) > Duration::from_secs(40), "nobody waits for it");
    }
}
