//! One job under its lease: from wherever it stands to its end, or to the pause before its next attempt.
//!
//! While an attempt runs, a watcher beside it keeps the lease, shows the progress and hears of a cancellation. Each
//! run connects a Ceph client of its own: a call that never returns is left with that client, which is fenced.

mod acknowledge;
mod attempt;
mod detaching;
mod elsewhere;
mod instance_watch;
mod outcome;
mod report;
mod runner;
mod watcher;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::Mutex;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::Span;

pub(super) use self::acknowledge::Acknowledged;
use self::outcome::CountsAttempt;
use super::context::Context;
use super::error::{StepError, StepResult};
use super::held::HeldJob;
use super::lease::{Lease, fence_owner};
use super::record::{Outcome, Phase, State};
use super::signal::Signal;
use super::slots::PoolSlots;
use super::store::Stored;
use crate::ceph::{self, JobClient, Progress};
use crate::openstack::Image;
use crate::telemetry::unix_time;

/// How long a job may take to notice that the daemon stops now: longer than a transfer and its last call may take.
const DRAIN_GRACE: Duration = Duration::from_secs(9);

/// How long a job may take to notice that its lease is lost.
const LOST_GRACE: Duration = Duration::from_secs(10);

/// How long a job may take to stop after it was cancelled, or its lease was lost: more than a request to a service.
const CANCEL_GRACE: Duration = Duration::from_secs(45);

/// How long a call on Ceph is given to return after its attempt has ended.
const CALL_GRACE: Duration = Duration::from_secs(3);

/// How often it is looked whether a job moves.
const HANG_INTERVAL: Duration = Duration::from_secs(1);

/// How a run under a lease ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RunResult {
    /// The job is in one of its end states.
    Ended(State),
    /// Another attempt is due after this pause.
    Waiting(Duration),
    /// Released to another daemon, because this one stops.
    Released,
    /// Left to another daemon, which is configured for its source.
    LeftToAnother,
    /// The lease is gone, or the record cannot be worked on: another daemon owns the job now.
    Abandoned,
}

/// What a daemon becomes the owner for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum TakeOverPurpose {
    Attempt,
    /// Only the requester is told that the job waits.
    Report,
}

/// Why a job is left though its work has not returned.
#[derive(Debug)]
enum GivenUp {
    LeaseLost,
    Drained,
    /// It makes no progress, or does not stop.
    Hung(String),
    /// The attempt ended with this, and a call of it has not returned.
    Ended(StepError),
}

/// A run of one job under its lease.
pub struct JobRun {
    job: HeldJob,
    pools: PoolSlots,
    /// The image record as last seen, while the watcher may change it.
    shown: Mutex<Option<Image>>,
    /// The attempt is over, and what it made is being removed.
    is_stopping: AtomicBool,
    /// Address of this job's Ceph client.
    address: Option<String>,
    /// The image was active when the run began.
    detaches: bool,
}

impl JobRun {
    /// `stored` was read after the lease was taken.
    pub fn new(context: Context, lease: Lease, stored: Stored, pools: PoolSlots) -> Self {
        Self {
            detaches: stored.record.phase() == Phase::Detach,
            job: HeldJob::new(context, lease, stored),
            pools,
            shown: Mutex::new(None),
            is_stopping: AtomicBool::new(false),
            address: None,
        }
    }

    /// Whether the job is one behind an active image.
    pub fn detaches(&self) -> bool {
        self.detaches
    }

    /// What the job gets done: it tells whether the job moves.
    pub fn progress(&self) -> Arc<Progress> {
        Arc::clone(&self.job.progress)
    }

    /// Whether the job waits for a service, and copies nothing.
    pub fn waits(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.job.waits)
    }

    /// The span of all work for the job. It puts the ids of the image and of the request on each log line.
    pub fn span(&self) -> Span {
        self.job.span.clone()
    }

    /// Works on the job until it ends, must wait, or is taken away. `drain` fires when the daemon has to stop now.
    ///
    /// The lease is renewed until the work has really ended, so that a call that takes long gets no daemon fenced.
    pub async fn run(mut self, drain: CancellationToken) -> RunResult {
        let client = match self.connect_client(&drain).await {
            Ok(client) => client,
            Err(stop) => return self.handle_failed_take_over(stop).await,
        };
        let ended = {
            let work = self.work(&drain, client.as_ref());
            let lease = self.keep_lease();
            let hung = self.until_hung(&drain);
            tokio::pin!(work, lease, hung);
            tokio::select! {
                biased;
                ended = &mut work => ended,
                _ = &mut lease => {
                    self.job.cancel.cancel();
                    // what it does next is refused; a call that hangs does not keep it here
                    let ended = tokio::time::timeout(LOST_GRACE, &mut work).await;
                    ended.unwrap_or(Err(GivenUp::LeaseLost))
                }
                why = &mut hung => Err(why),
            }
        };
        if client.is_fenced() {
            metrics::counter!("rbd_offload_fenced_total").increment(1);
            tracing::warn!(image_id = %self.job.id, "another daemon took the job over and fenced its Ceph client");
        }
        let result = match ended {
            Ok(outcome) => outcome,
            Err(why) => self.give_up(client.as_ref(), why).await,
        };
        // the client is last: its drop closes the connection on another thread
        drop(self);
        drop(client);
        result
    }

    /// Connects a client for this run, and makes it the one that the job's steps use.
    async fn connect_client(&mut self, drain: &CancellationToken) -> StepResult<Box<dyn JobClient>> {
        let (clients, image_id) = (Arc::clone(&self.job.context.clients), self.job.id);
        let connect = async {
            let client = clients.connect(image_id).await?;
            let address = client.storage().address().await?;
            Ok::<_, ceph::Error>((client, address))
        };
        let (client, address) = tokio::select! {
            biased;
            connected = connect => connected?,
            stop = self.keep_lease() => return Err(stop),
            () = drain.cancelled() => return Err(StepError::Drained),
        };
        self.job.context.storage = client.storage();
        self.address = Some(address);
        Ok(client)
    }

    /// Returns when the job makes no progress for too long, or does not stop when it should.
    async fn until_hung(&self, drain: &CancellationToken) -> GivenUp {
        let mut alive = (self.job.progress.activity(), Instant::now());
        let (mut drained, mut cancelled): (Option<Instant>, Option<Instant>) = (None, None);
        let over = |since: Option<Instant>, grace| since.is_some_and(|since| since.elapsed() >= grace);
        loop {
            tokio::time::sleep(HANG_INTERVAL).await;
            let signs = self.job.progress.activity();
            if signs != alive.0 {
                alive = (signs, Instant::now());
                metrics::gauge!("rbd_offload_last_progress_timestamp_seconds").set(unix_time());
            }
            if drain.is_cancelled() {
                drained.get_or_insert_with(Instant::now);
            }
            if self.job.cancel.is_cancelled() && !self.is_stopping.load(Ordering::SeqCst) {
                cancelled.get_or_insert_with(Instant::now);
            } else {
                cancelled = None;
            }
            let limit = self.job.context.config.borrow().offload.hang_limit;
            if over(drained, DRAIN_GRACE) {
                return GivenUp::Drained;
            }
            if over(cancelled, CANCEL_GRACE) {
                return GivenUp::Hung(format!("it did not stop within {} s", CANCEL_GRACE.as_secs()));
            }
            if alive.1.elapsed() >= limit {
                return GivenUp::Hung(format!("it made no progress for {} s", limit.as_secs()));
            }
        }
    }

    /// Leaves the job, whose work was dropped. Calls on Ceph that have not returned go on until their client is fenced.
    async fn give_up(&self, client: &dyn JobClient, why: GivenUp) -> RunResult {
        metrics::counter!("rbd_offload_jobs_given_up_total").increment(1);
        tracing::error!(image_id = %self.job.id, ?why, "job given up: one of its Ceph calls did not return");
        let (reason, ending) = match why {
            // the record still names this client, which the next owner fences
            GivenUp::LeaseLost => {
                metrics::counter!("rbd_offload_leases_lost_total").increment(1);
                return RunResult::Abandoned;
            }
            GivenUp::Drained => (None, None),
            GivenUp::Hung(reason) => (Some(reason), None),
            GivenUp::Ended(StepError::End(ending)) => (None, Some(ending)),
            GivenUp::Ended(StepError::Retry(reason) | StepError::WhenCopied(reason)) => (Some(reason), None),
            GivenUp::Ended(_) => (None, None),
        };
        // the renewal has stopped: the rest must be done before the lease runs out
        let record = self.job.record().await;
        let pools: Vec<String> =
            record.source_image.map(|source| source.pool).into_iter().chain(record.dest_pool).collect();
        let fenced = self.job.lease.renew(self.job.context.store.objects().as_ref()).await.is_ok()
            && (!client.is_busy()
                || matches!(
                    tokio::time::timeout(self.job.lease.renewal_interval(), client.give_up(&pools)).await,
                    Ok(Ok(()))
                ));
        let outcome = if fenced && self.release_given_up(reason, ending).await.is_ok() {
            RunResult::Waiting(Duration::ZERO)
        } else {
            RunResult::Abandoned
        };
        self.job.release_lease().await;
        outcome
    }

    /// Releases a job whose client can do nothing any more. With `reason`, the attempt counts.
    async fn release_given_up(&self, reason: Option<String>, ending: Option<Outcome>) -> StepResult<()> {
        let record = self.job.record().await;
        let spent = match &reason {
            Some(reason) => self.failure_after_last_retry(reason).await,
            None => None,
        };
        let ending = ending.or(spent).filter(|_| !record.state.is_ended() && record.phase() < Phase::Detach);
        let not_before = reason.as_ref().and_then(|_| self.next_attempt(&record));
        self.job
            .update(|record| {
                // another's stays: it has not been fenced yet
                if record.owner_address == self.address {
                    record.owner = None;
                    record.owner_address = None;
                }
                // a request to Glance may have been on its way
                record.needs_repair = true;
                record.outcome = record.outcome.take().or_else(|| ending.clone());
                if let Some(reason) = &reason {
                    record.reason = Some(reason.clone());
                    record.attempts = record.attempts.saturating_add(1);
                    record.not_before = not_before;
                }
            })
            .await?;
        self.job.index().await
    }

    async fn work(&self, drain: &CancellationToken, client: &dyn JobClient) -> Result<RunResult, GivenUp> {
        match self.take_over(TakeOverPurpose::Attempt).await {
            Ok(()) => metrics::gauge!("rbd_offload_last_progress_timestamp_seconds").set(unix_time()),
            Err(stop) => return Ok(self.handle_failed_take_over(stop).await),
        }
        if let Some(ending) = self.exceeds_takeover_limit().await {
            return Ok(self.handle_stop(StepError::End(ending)).await);
        }
        let (attempt, watched) = {
            let watcher = async {
                let stop = self.watch(drain).await;
                self.job.cancel.cancel();
                stop
            };
            tokio::pin!(watcher);
            let attempt = self.attempt();
            tokio::pin!(attempt);
            tokio::select! {
                biased;
                attempt = &mut attempt => (attempt, None),
                stop = &mut watcher => (attempt.await, Some(stop)),
            }
        };
        let stop = match (attempt, watched) {
            (Ok(state), _) => {
                self.job.release_lease().await;
                return Ok(RunResult::Ended(state));
            }
            // the attempt's own result wins, unless it stopped only because the watcher cancelled it
            (Err(StepError::Interrupted), _) if self.job.lease.is_lost() => StepError::LeaseLost,
            (Err(StepError::Interrupted), Some(stop)) => stop,
            (Err(StepError::Interrupted), None) => StepError::Retry("the transfer was stopped".into()),
            (Err(stop), _) => stop,
        };
        if !self.calls_returned(client).await {
            return Err(if self.job.lease.is_lost() { GivenUp::LeaseLost } else { GivenUp::Ended(stop) });
        }
        self.is_stopping.store(true, Ordering::SeqCst);
        Ok(self.handle_stop(stop).await)
    }

    /// Waits for all calls on Ceph, for at most [`CALL_GRACE`]. Returns whether they have returned: one that still runs
    /// could interfere with the cleanup.
    async fn calls_returned(&self, client: &dyn JobClient) -> bool {
        let until = Instant::now() + CALL_GRACE;
        while client.is_busy() {
            if Instant::now() >= until {
                return false;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        true
    }

    /// Leaves a job that this daemon is not the owner of yet. The previous owner may still be at work: nothing may be
    /// made or removed, and its address must stay.
    async fn handle_failed_take_over(&self, stop: StepError) -> RunResult {
        match stop {
            StepError::Retry(reason) | StepError::End(Outcome { reason, .. }) => {
                let outcome = self.schedule_retry(&reason, CountsAttempt::No).await;
                if outcome != RunResult::Abandoned {
                    self.job.release_lease().await;
                }
                outcome
            }
            StepError::Drained => {
                self.job.release_lease().await;
                RunResult::Released
            }
            stop => self.handle_stop(stop).await,
        }
    }

    /// Whether too many owners in a row have died or stalled with this job.
    async fn exceeds_takeover_limit(&self) -> Option<Outcome> {
        let record = self.job.record().await;
        let limit = self.job.context.config.borrow().offload.max_takeovers;
        if limit == 0 || record.takeovers <= limit || record.outcome.is_some() || record.state.is_ended() {
            return None;
        }
        // an active image is not given up: the next daemon comes after a pause, and counts from the beginning
        if record.phase() == Phase::Detach {
            let reason = format!("{} daemons in a row died or stalled while they worked on it", record.takeovers);
            return Some(Outcome::new(State::Failed, reason));
        }
        metrics::counter!("rbd_offload_takeover_failures_total").increment(1);
        tracing::error!(image_id = %self.job.id, takeovers = record.takeovers, job_state = record.state.as_str(),
            "each daemon that worked on this job died or stalled");
        Some(Outcome::new(
            State::Failed,
            format!(
                "{} daemons in a row died or stalled while they worked on this job ({}); look into their logs before \
                 you retry it",
                record.takeovers, record.state
            ),
        ))
    }

    /// Fences the owner that did not release the job, and becomes the owner.
    async fn take_over(&self, purpose: TakeOverPurpose) -> StepResult<()> {
        let address = self.job.context.storage.address().await?;
        let taken = fence_owner(self.job.context.storage.as_ref(), &self.job.record().await, &address).await?;
        let owner = self.job.context.identity.owner();
        self.job
            .update_with_signals(|record, signals| {
                // count it once, where the outcome of the first write was unknown
                let is_known = record.owner_address.as_ref() == Some(&address);
                // nor where the owner is this daemon, which lost its lease before: no daemon died
                if taken && !is_known && record.owner.as_ref() != Some(&owner) {
                    record.count_takeover();
                }
                record.owner = Some(owner.clone());
                record.owner_address = Some(address.clone());
                // the fence keeps the previous owner out of Ceph, not out of Glance
                record.needs_repair |= taken || signals.has(Signal::NeedsRepair);
                let mut consumed = vec![Signal::NeedsRepair];
                if purpose == TakeOverPurpose::Attempt {
                    record.not_before = None;
                    // the attempt reads the image first of all
                    consumed.push(Signal::RecheckImage);
                    consumed.extend((!record.state.is_ended()).then_some(Signal::Retry));
                }
                consumed
            })
            .await?;
        if taken {
            metrics::counter!("rbd_offload_takeovers_total").increment(1);
            // the index tells every engine that this job is a suspect
            self.job.index().await?;
        } else if purpose == TakeOverPurpose::Attempt {
            // a report is over before another daemon has read who holds the job
            self.job.index_holder().await;
        }
        Ok(())
    }
}
