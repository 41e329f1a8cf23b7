//! One job under its lease: from wherever it stands to its end, or to the pause before its next attempt.
//!
//! Whatever is going to be made is written into the record first, so that after a crash at any point the next owner
//! knows what may be there. While the job runs, a watcher beside it keeps the lease, shows the progress and hears of a
//! cancellation.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tokio::sync::{Mutex, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::Span;
use uuid::Uuid;

mod copying;
mod ending;
mod handover;
mod publishing;
mod source;
mod tenant;
mod watcher;

pub use ending::BACKOFF_MAX;
pub(super) use tenant::{Told, last_word};

use super::clock::Clock;
use super::engine::{PoolSlot, PoolSlots};
use super::lease::{Identity, Lease, fence_owner};
use super::record::{Ending, Record, Stage, State};
use super::store::{self, Store, Stored};
use crate::ceph::{self, ErrorKind, Lent, Progress, Rates, Storage, StoragePool};
use crate::config::Config;
use crate::decline::Decline;
use crate::openstack::{self, Cloud, Image, ImageChange};
use crate::plan::NoPlan;
use crate::publish::tag::OwnershipTag;
use crate::request::{self, Asked};
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

/// Pause before a change of the record is tried again whose outcome is unknown.
const UPDATE_PAUSE: Duration = Duration::from_secs(1);

/// What every job needs.
#[derive(Clone)]
pub struct Context {
    /// Shared by all; while a job runs, its own client.
    pub storage: Arc<dyn Storage>,
    /// Where jobs get a client of their own.
    pub clients: Arc<dyn StoragePool>,
    pub cloud: Arc<dyn Cloud>,
    pub store: Store,
    pub config: watch::Receiver<Arc<Config>>,
    /// Shared by the transfers of all jobs.
    pub rates: Arc<Rates>,
    pub identity: Identity,
    /// Tells what this deployment made from what another one made in the same pools.
    pub deployment: Uuid,
    pub clock: Clock,
}

/// How a run under a lease ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The job is in one of its end states.
    Ended(State),
    /// Another attempt is due after this pause.
    Waiting(Duration),
    /// Given back for another daemon, since this one stops.
    Released,
    /// Left to another daemon, which is configured for its source.
    LeftToAnother,
    /// The lease is gone, or the record cannot be worked on: somebody else's business now.
    Abandoned,
}

/// Why an attempt did not go on.
#[derive(Debug)]
enum Stop {
    End(Ending),
    /// It may pass.
    Retry(String),
    /// As many jobs as may run into this pool do.
    NoRoom {
        pool: String,
    },
    /// This daemon is not configured for the source's backend.
    OtherBackend {
        backend: String,
        reason: String,
    },
    /// Stopped from outside; the watcher knows why.
    Interrupted,
    LeaseLost,
    /// The daemon stops.
    Drained,
    /// The record cannot be worked on.
    Abandon(String),
}

type Step<T> = Result<T, Stop>;

/// Why a job is left though its work has not returned.
#[derive(Debug)]
enum GivenUp {
    LeaseLost,
    Drained,
    /// It makes no progress, or does not stop.
    Hung(String),
    /// The attempt ended with this, and a call of it has not returned.
    Ended(Stop),
}

fn end<T>(state: State, reason: impl Into<String>) -> Step<T> {
    Err(Stop::End(Ending::new(state, reason)))
}

fn decline<T>(why: Decline, reason: impl Into<String>) -> Step<T> {
    Err(Stop::End(Ending::declined(why, reason)))
}

/// The same sentence for whoever looks: the tenant, the record, the log.
fn other_writer<T>() -> Step<T> {
    decline(Decline::OtherWriter, "somebody else has written the image meanwhile")
}

fn image_gone<T>() -> Step<T> {
    end(State::Cancelled, "the image was deleted")
}

impl From<ceph::Error> for Stop {
    fn from(error: ceph::Error) -> Self {
        match error.kind() {
            ErrorKind::NotLocked | ErrorKind::Fenced => Self::LeaseLost,
            ErrorKind::Cancelled => Self::Interrupted,
            ErrorKind::NoSpace
            | ErrorKind::PermissionDenied
            | ErrorKind::Unsupported
            | ErrorKind::TooLarge
            | ErrorKind::Exists => Self::End(Ending::new(State::Failed, error.to_string())),
            ErrorKind::NotFound | ErrorKind::Busy | ErrorKind::Conflict | ErrorKind::TimedOut | ErrorKind::Other => {
                Self::Retry(error.to_string())
            }
        }
    }
}

impl From<openstack::Error> for Stop {
    fn from(error: openstack::Error) -> Self {
        use openstack::ErrorKind as Kind;
        match error.kind() {
            Kind::Unauthorized | Kind::Unavailable | Kind::Protocol | Kind::TooLarge | Kind::Conflict => {
                Self::Retry(error.to_string())
            }
            Kind::Forbidden | Kind::OverLimit | Kind::Refused | Kind::NoService => {
                Self::End(Ending::new(State::Failed, error.to_string()))
            }
        }
    }
}

impl From<store::Error> for Stop {
    fn from(error: store::Error) -> Self {
        match error {
            store::Error::Ceph(error) => error.into(),
            store::Error::Contended(_) => Self::Retry(error.to_string()),
            store::Error::TooLarge { .. } => Self::End(Ending::new(State::Failed, error.to_string())),
            store::Error::Unreadable { .. } | store::Error::Illegal(_) => Self::Abandon(error.to_string()),
        }
    }
}

impl From<NoPlan> for Stop {
    fn from(none: NoPlan) -> Self {
        match none {
            NoPlan::Declined(why, reason) => Self::End(Ending::declined(why, reason)),
            NoPlan::OtherBackend { backend, reason } => Self::OtherBackend { backend, reason },
            NoPlan::Gone => Self::End(Ending::new(State::Cancelled, none.to_string())),
            NoPlan::Ceph(error) => error.into(),
            NoPlan::OpenStack(error) => error.into(),
        }
    }
}

/// A job that this daemon holds the lease on.
pub struct Job {
    context: Context,
    lease: Lease,
    stored: Mutex<Stored>,
    progress: Arc<Progress>,
    /// The tenant's record as last seen, while the watcher may change it.
    tenant: Mutex<Option<Image>>,
    cancel: CancellationToken,
    finishing: AtomicBool,
    /// Of the latest attempts, one of each name.
    stages: std::sync::Mutex<Vec<Stage>>,
    pools: PoolSlots,
    /// The job's place among those that write to its destination pool.
    slot: Mutex<Option<PoolSlot>>,
    /// Held while the source's snapshot is being removed.
    removing: Mutex<()>,
    /// It waits for a service, and copies nothing.
    waits: Arc<AtomicBool>,
    /// The attempt is over, and what it made is being removed.
    settling: AtomicBool,
    /// Address of this job's Ceph client, once the record names it as the owner's.
    address: OnceLock<String>,
    id: Uuid,
    span: Span,
}

impl Job {
    /// `stored` was read after the lease was taken.
    pub fn new(context: Context, lease: Lease, stored: Stored, pools: PoolSlots) -> Self {
        let id = stored.record.image_id;
        let (request_id, stages) = (stored.record.request_id, stored.record.stages.clone());
        Self {
            context,
            lease,
            stored: Mutex::new(stored),
            progress: Arc::default(),
            tenant: Mutex::new(None),
            cancel: CancellationToken::new(),
            finishing: AtomicBool::new(false),
            stages: std::sync::Mutex::new(stages),
            pools,
            slot: Mutex::new(None),
            removing: Mutex::new(()),
            waits: Arc::default(),
            settling: AtomicBool::new(false),
            address: OnceLock::new(),
            id,
            // at the highest level, so that it is there whatever is logged
            span: tracing::error_span!("job", image_id = %id, %request_id),
        }
    }

    /// What the job gets done, for whoever wants to know whether it moves.
    pub fn progress(&self) -> Arc<Progress> {
        Arc::clone(&self.progress)
    }

    /// Whether the job waits for a service, and copies nothing.
    pub fn waits(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.waits)
    }

    /// What is done for the job is done in here: each line of the log then bears the image's id and the request's.
    pub fn span(&self) -> Span {
        self.span.clone()
    }

    /// Works on the job until it ends, must wait, or is taken away. `drain` fires when the daemon has to stop now.
    ///
    /// The lease is renewed until the work has really ended, so that a call that takes long gets nobody fenced. The job
    /// has a Ceph client of its own: a call that never returns is left with that client, which is fenced.
    pub async fn run(mut self, drain: CancellationToken) -> Outcome {
        let client = match self.take_client(&drain).await {
            Ok(client) => client,
            Err(stop) => return self.not_begun(stop).await,
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
                    self.cancel.cancel();
                    // what it does next is refused; a call that hangs does not keep it here
                    let ended = tokio::time::timeout(LOST_GRACE, &mut work).await;
                    ended.unwrap_or(Err(GivenUp::LeaseLost))
                }
                why = &mut hung => Err(why),
            }
        };
        if client.is_fenced() {
            metrics::counter!("rbd_offload_fenced_total").increment(1);
            tracing::warn!(image_id = %self.id, "another daemon took the job over and fenced its Ceph client");
        }
        match ended {
            // the record may name it still, and then its next owner fences it
            Ok(Outcome::Abandoned) => Outcome::Abandoned,
            Ok(outcome) => {
                client.give_back();
                outcome
            }
            Err(why) => self.give_up(client, why).await,
        }
    }

    /// Takes a client for this job, and makes it the one that the job's steps use.
    async fn take_client(&mut self, drain: &CancellationToken) -> Step<Box<dyn Lent>> {
        let clients = Arc::clone(&self.context.clients);
        let client = tokio::select! {
            biased;
            client = clients.take() => client?,
            stop = self.keep_lease() => return Err(stop),
            () = drain.cancelled() => return Err(Stop::Drained),
        };
        self.context.storage = client.storage();
        Ok(client)
    }

    /// Returns when the job makes no progress for too long, or does not stop when it should.
    async fn until_hung(&self, drain: &CancellationToken) -> GivenUp {
        let mut alive = (self.progress.signs_of_life(), Instant::now());
        let (mut drained, mut cancelled): (Option<Instant>, Option<Instant>) = (None, None);
        let over = |since: Option<Instant>, grace| since.is_some_and(|since| since.elapsed() >= grace);
        loop {
            tokio::time::sleep(HANG_INTERVAL).await;
            let signs = self.progress.signs_of_life();
            if signs != alive.0 {
                alive = (signs, Instant::now());
                metrics::gauge!("rbd_offload_last_progress_timestamp_seconds").set(unix_time());
            }
            if drain.is_cancelled() {
                drained.get_or_insert_with(Instant::now);
            }
            if self.cancel.is_cancelled() && !self.settling.load(Ordering::SeqCst) {
                cancelled.get_or_insert_with(Instant::now);
            } else {
                cancelled = None;
            }
            let limit = self.context.config.borrow().offload.hang_limit;
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
    async fn give_up(&self, client: Box<dyn Lent>, why: GivenUp) -> Outcome {
        metrics::counter!("rbd_offload_jobs_given_up_total").increment(1);
        tracing::error!(image_id = %self.id, ?why, "the job was given up: a call of it has not returned");
        let (reason, ending) = match why {
            // the record still names this client, which the next owner fences
            GivenUp::LeaseLost => {
                metrics::counter!("rbd_offload_leases_lost_total").increment(1);
                return Outcome::Abandoned;
            }
            GivenUp::Drained => (None, None),
            GivenUp::Hung(reason) => (Some(reason), None),
            GivenUp::Ended(Stop::End(ending)) => (None, Some(ending)),
            GivenUp::Ended(Stop::Retry(reason)) => (Some(reason), None),
            GivenUp::Ended(_) => (None, None),
        };
        // nobody renews the lease any more: what follows must be over before it ends
        let fenced = self.lease.renew(self.context.store.objects().as_ref()).await.is_ok()
            && (!client.is_busy()
                || matches!(tokio::time::timeout(self.lease.renewal_interval(), client.give_up()).await, Ok(Ok(()))));
        let outcome = if fenced && self.release_given_up(reason, ending).await.is_ok() {
            Outcome::Waiting(Duration::ZERO)
        } else {
            Outcome::Abandoned
        };
        self.lease.release(self.context.store.objects().as_ref()).await;
        outcome
    }

    /// Releases a job whose client can do nothing any more. With `reason`, the attempt counts.
    async fn release_given_up(&self, reason: Option<String>, ending: Option<Ending>) -> Step<()> {
        let retries = self.context.config.borrow().offload.retries;
        let record = self.snapshot().await;
        let spent = reason.as_ref().filter(|_| record.attempts >= retries && !record.state.is_ended()).map(|reason| {
            let attempts = record.attempts.saturating_add(1);
            Ending::new(State::Failed, format!("given up after {attempts} attempts: {reason}"))
        });
        let ending = ending.or(spent).filter(|_| !record.state.is_ended());
        let not_before = reason.as_ref().and_then(|_| self.next_attempt(&record));
        self.update(|record| {
            // another's stays: it has not been fenced yet
            if record.owner_address.as_ref() == self.address.get() {
                record.owner = None;
                record.owner_address = None;
            }
            // a request to Glance may have been on its way
            record.mend = true;
            record.ending = record.ending.take().or_else(|| ending.clone());
            if let Some(reason) = &reason {
                record.reason = Some(reason.clone());
                record.attempts = record.attempts.saturating_add(1);
                record.not_before = not_before;
            }
        })
        .await?;
        self.index().await
    }

    async fn work(&self, drain: &CancellationToken, client: &dyn Lent) -> Result<Outcome, GivenUp> {
        match self.take_over().await {
            Ok(()) => metrics::gauge!("rbd_offload_last_progress_timestamp_seconds").set(unix_time()),
            Err(stop) => return Ok(self.not_begun(stop).await),
        }
        if let Some(ending) = self.ends_its_owners().await {
            return Ok(self.settle(Stop::End(ending)).await);
        }
        let (attempt, watched) = {
            let watcher = async {
                let stop = self.watch(drain).await;
                self.cancel.cancel();
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
                self.lease.release(self.context.store.objects().as_ref()).await;
                return Ok(Outcome::Ended(state));
            }
            // what the attempt decided by itself stands, unless it only felt that it was stopped
            (Err(Stop::Interrupted), _) if self.lease.is_lost() => Stop::LeaseLost,
            (Err(Stop::Interrupted), Some(stop)) => stop,
            (Err(Stop::Interrupted), None) => Stop::Retry("the transfer was stopped".into()),
            (Err(stop), _) => stop,
        };
        if !self.calls_returned(client).await {
            return Err(if self.lease.is_lost() { GivenUp::LeaseLost } else { GivenUp::Ended(stop) });
        }
        self.settling.store(true, Ordering::SeqCst);
        Ok(self.settle(stop).await)
    }

    /// Whether every call on Ceph has returned, now or in a moment: what one still does would meet what comes next.
    async fn calls_returned(&self, client: &dyn Lent) -> bool {
        let until = Instant::now() + CALL_GRACE;
        while client.is_busy() {
            if Instant::now() >= until {
                return false;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        true
    }

    /// Leaves a job that this daemon is not the owner of yet. The owner before may still be at work: nothing may be made
    /// or taken down, and its address must stay.
    async fn not_begun(&self, stop: Stop) -> Outcome {
        match stop {
            Stop::Retry(reason) | Stop::End(Ending { reason, .. }) => {
                let outcome = self.pause(&reason, false).await;
                if outcome != Outcome::Abandoned {
                    self.lease.release(self.context.store.objects().as_ref()).await;
                }
                outcome
            }
            stop => self.settle(stop).await,
        }
    }

    /// Whether too many owners in a row have died or stalled with this job.
    async fn ends_its_owners(&self) -> Option<Ending> {
        let record = self.snapshot().await;
        let limit = self.context.config.borrow().offload.max_takeovers;
        if limit == 0 || record.takeovers <= limit || record.ending.is_some() || record.state.is_ended() {
            return None;
        }
        metrics::counter!("rbd_offload_takeover_failures_total").increment(1);
        tracing::error!(image_id = %self.id, takeovers = record.takeovers, job_state = record.state.as_str(),
            "each daemon that worked on this job died or stalled");
        Some(Ending::new(
            State::Failed,
            format!(
                "{} daemons in a row died or stalled while they worked on this job ({}); look into their logs before \
                 you retry it",
                record.takeovers, record.state
            ),
        ))
    }

    /// Shuts out the owner that did not let go, and becomes the owner.
    async fn take_over(&self) -> Step<()> {
        let address = self.context.storage.address().await?;
        let taken = fence_owner(self.context.storage.as_ref(), &self.snapshot().await, &address).await?;
        let owner = self.context.identity.owner();
        self.update(|record| {
            // not twice, where the outcome of the first try was unknown
            let is_known = record.owner_address.as_ref() == Some(&address);
            // nor where this daemon itself comes back after it lost its lease: nobody died
            if taken && !is_known && record.owner.as_ref() != Some(&owner) {
                record.count_takeover();
            }
            record.owner = Some(owner.clone());
            record.owner_address = Some(address.clone());
            // the attempt reads the image first of all
            record.check = false;
            // the fence keeps the owner before out of Ceph, not out of Glance
            record.mend |= taken;
        })
        .await?;
        let _ = self.address.set(address);
        if taken {
            metrics::counter!("rbd_offload_takeovers_total").increment(1);
            // the index tells every engine that this job is a suspect
            self.index().await?;
        }
        Ok(())
    }

    async fn snapshot(&self) -> Record {
        self.stored.lock().await.record.clone()
    }

    /// What the job writes on everything that it makes in Ceph.
    async fn tag(&self) -> OwnershipTag {
        OwnershipTag::new(self.id, self.snapshot().await.request_id, self.context.deployment)
    }

    /// Changes the record under the lease. Flags that others set meanwhile are kept.
    async fn update(&self, change: impl Fn(&mut Record)) -> Step<()> {
        let mut stored = self.stored.lock().await;
        loop {
            let mut next = stored.clone();
            next.record.stages = self.stages.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone();
            change(&mut next.record);
            next.record.shorten();
            next.record.updated_at = self.context.clock.now();
            match self.context.store.write(&next, Some(self.lease.key())).await {
                Ok(version) => {
                    *stored = Stored { version, ..next };
                    return Ok(());
                }
                Err(store::Error::Ceph(error)) if error.kind() == ErrorKind::Conflict => {
                    // a renewal of the lease, or a flag: the holder of the lease writes everything else
                    match self.context.store.load(self.id).await? {
                        Some(now) => *stored = now,
                        None => return Err(Stop::Abandon("its record is gone".into())),
                    }
                }
                // carried out or not: the version of the record tells
                Err(store::Error::Ceph(error)) if error.kind() == ErrorKind::TimedOut && !self.lease.is_over() => {
                    tokio::time::sleep(UPDATE_PAUSE).await;
                    match self.context.store.load(self.id).await {
                        Ok(Some(now)) => *stored = now,
                        Ok(None) => return Err(Stop::Abandon("its record is gone".into())),
                        Err(_) => {}
                    }
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    async fn enter(&self, state: State) -> Step<()> {
        if let Err(illegal) = self.snapshot().await.enter(state, self.context.clock.now()) {
            return Err(Stop::Abandon(illegal.to_string()));
        }
        let now = self.context.clock.now();
        self.update(|record| {
            let _ = record.enter(state, now);
        })
        .await?;
        tracing::info!(image_id = %self.id, job_stage = state.as_str(), "the job goes on");
        Ok(())
    }

    /// The next step is one that others can see: it needs the lease, now.
    async fn before_visible_step(&self) -> Step<()> {
        self.check_cancelled()?;
        Ok(self.lease.renew(self.context.store.objects().as_ref()).await?)
    }

    fn check_cancelled(&self) -> Step<()> {
        if self.cancel.is_cancelled() && !self.finishing.load(Ordering::SeqCst) {
            return Err(Stop::Interrupted);
        }
        Ok(())
    }

    /// Changes the image's record. No fence keeps a former owner out of Glance, so the lease is renewed right before.
    async fn change_image(&self, changes: &[ImageChange]) -> Step<openstack::Result<Option<Image>>> {
        self.lease.renew(self.context.store.objects().as_ref()).await?;
        Ok(self.context.cloud.update_image(&self.id.to_string(), changes).await)
    }

    /// Runs a stage, notes how long it took.
    async fn stage<T>(&self, name: &'static str, work: impl Future<Output = Step<T>>) -> Step<T> {
        let started = Instant::now();
        let started_at = self.context.clock.now();
        let result = work.await;
        let seconds = started.elapsed().as_secs_f64();
        metrics::histogram!("rbd_offload_stage_duration_seconds", "stage" => name).record(seconds);
        tracing::debug!(image_id = %self.id, job_stage = name, seconds, ok = result.is_ok(), "stage over");
        if result.is_ok() {
            metrics::gauge!("rbd_offload_last_progress_timestamp_seconds").set(unix_time());
            self.progress.step();
        }
        // goes into the record with its next change
        let mut stages = self.stages.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        stages.retain(|stage| stage.name != name);
        stages.push(Stage { name: name.to_owned(), started_at, seconds: Some(seconds) });
        result
    }

    /// One attempt, from where the record stands.
    async fn attempt(&self) -> Step<State> {
        let record = self.snapshot().await;
        if let (Some(ending), false) = (record.ending, record.state.is_ended()) {
            return Err(Stop::End(ending));
        }
        if record.cancel && !record.state.is_ended() {
            return end(State::Cancelled, "cancelled by the operator");
        }
        if record.state.is_ended() && !self.asked_again().await? {
            return Ok(self.snapshot().await.state);
        }
        let config = self.context.config.borrow().clone();
        if config.offload.dry_run && self.snapshot().await.state == State::Accepted {
            return self.dry_run(&config).await;
        }
        match self.snapshot().await.state {
            State::Publishing => {}
            State::Copying => {
                // begun by an attempt that did not end: start over
                self.take_down().await?;
                // the next plan may find another source, and nothing tells of this one then
                self.purge_source().await?;
                self.enter(State::Accepted).await?;
                self.copy(&config).await?;
            }
            _ => self.copy(&config).await?,
        }
        // the source is free of our snapshot as soon as the copy no longer needs it
        let (published, removed) = tokio::join!(self.publish(), self.release_source());
        published?;
        removed?;
        // last, so that a deletion which met the snapshot has come as far as the trash
        self.purge_source().await?;
        self.conclude(&Ending::new(State::Done, "")).await?;
        Ok(State::Done)
    }

    /// An ended job was asked for again, perhaps by a notification that came late: the image record knows.
    async fn asked_again(&self) -> Step<bool> {
        let image = self.context.cloud.image(&self.id.to_string()).await?.filter(|image| image.status == "queued");
        if self.snapshot().await.cancel {
            self.withdraw_request(image).await?;
            return Ok(false);
        }
        let asked = match image.map(|image| request::asked_by(&image.tags)) {
            None | Some(Asked::Nothing) => None,
            Some(Asked::For(source)) => Some(Some(source)),
            Some(Asked::Unclear(_)) => Some(None),
        };
        let now = self.context.clock.now();
        let may =
            !self.context.config.borrow().offload.dry_run && self.snapshot().await.state.may_become(State::Accepted);
        if let (Some(source), true) = (asked, may) {
            self.update(|record| {
                if !record.cancel && record.restart(false, now).is_ok() {
                    record.source = source;
                }
            })
            .await?;
            if self.snapshot().await.state.is_ended() {
                return Err(Stop::Retry("the request that was made again is cancelled".into()));
            }
            // a new request, which has an id of its own
            self.span.record("request_id", tracing::field::display(self.snapshot().await.request_id));
            return Ok(true);
        }
        self.update(|record| {
            record.again = false;
            record.owner = None;
            record.owner_address = None;
        })
        .await?;
        self.index().await?;
        Ok(false)
    }

    /// The operator cancelled a request that was made after the job's end, before the job began again.
    async fn withdraw_request(&self, image: Option<Image>) -> Step<()> {
        if let Some(image) = image.filter(|image| request::asked_by(&image.tags) != Asked::Nothing) {
            // stored before the tag goes: `retry` goes by the latest request
            if let Asked::For(source) = request::asked_by(&image.tags) {
                self.update(|record| record.source = Some(source)).await?;
            }
            let ending = Ending::new(State::Cancelled, "cancelled by the operator");
            self.tell_end(image, &ending).await?;
        }
        self.update(|record| {
            record.again = false;
            record.cancel = false;
            record.owner = None;
            record.owner_address = None;
        })
        .await?;
        self.index().await
    }

    /// Dry run: builds the plan and reports it without changing anything. The request stays in place and is executed once
    /// `dry_run` is off.
    async fn dry_run(&self, config: &Config) -> Step<State> {
        let finding = match self.stage("plan", self.plan(config)).await {
            Ok(plan) => format!("{} would be copied to pool {}", plan.origin, plan.dest_pool),
            Err(Stop::End(ending)) => format!("the request would be {}: {}", ending.state, ending.reason),
            Err(Stop::OtherBackend { reason, .. }) => format!("this daemon cannot do the request: {reason}"),
            Err(stop) => return Err(stop),
        };
        tracing::info!(image_id = %self.id, job_stage = "dry_run", finding, "dry run");
        metrics::counter!("rbd_offload_jobs_dry_run_total").increment(1);
        let reason = format!("dry run ([offload] dry_run = true): {finding}");
        self.conclude(&Ending::new(State::Cancelled, reason)).await?;
        Ok(State::Cancelled)
    }
}
