//! One job under its lease: from wherever it stands to its end, or to the pause before its next attempt.
//!
//! Whatever is going to be made is written into the record first, so that after a crash at any point the next owner
//! knows what may be there. While the job runs, a watcher beside it keeps the lease, shows the progress and hears of a
//! cancellation.

use std::hash::{DefaultHasher, Hash as _, Hasher};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use jiff::SignedDuration;
use tokio::sync::{Mutex, watch};
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::clock::Clock;
use super::engine::{PoolSlot, PoolSlots};
use super::lease::{Identity, Lease};
use super::record::{Ending, Origin, Publication, Record, Stage, State};
use super::store::{self, Store, Stored};
use crate::ceph::{self, Compare, ErrorKind, ImageSpec, Progress, Storage, TransferLimits};
use crate::config::{Config, Hash, Verify};
use crate::openstack::{self, Cloud, Image, LocationAnswer, Validation};
use crate::plan::{self, NoPlan, Plan, Question};
use crate::publish::record::{self as tenant, Status};
use crate::publish::{self, Name};
use crate::request::{self, Asked};
use crate::transfer::{self, Order};

/// How often the watcher looks at the record and shows progress.
const WATCH_INTERVAL: Duration = Duration::from_secs(2);

/// How often the tenant's record is read or changed while the copy runs.
const TENANT_INTERVAL: Duration = Duration::from_secs(4);

/// Pause before the second attempt; each further one waits twice as long.
const BACKOFF_FIRST: Duration = Duration::from_secs(2);

/// Longest pause between attempts.
pub const BACKOFF_MAX: Duration = Duration::from_secs(60);

/// How long Glance may take to make a registered image active, beside the time for reading it where it does that first.
const ACTIVE_WITHIN: Duration = Duration::from_secs(60);

/// Bytes a second that Glance is trusted to hash at least (measured: 170 MiB/s and more).
const HASHED_PER_SECOND: u64 = 20 << 20;

/// Pauses between looks at a registered image: the first and the longest. Glance takes about 0.3 s.
const POLL_FIRST: Duration = Duration::from_millis(50);
const POLL_MAX: Duration = Duration::from_secs(1);

/// Pauses (of at most [`BACKOFF_MAX`]) that a job which failed leaves to a Glance task that seems to be at work still.
const GLANCE_TASK_PAUSES: u32 = 20;

/// How often a change of the image record is tried when the record changes meanwhile.
const RECORD_TRIES: usize = 5;

/// Wrote the same sentence for whoever looks: the tenant, the record, the log.
const OTHER_WRITER: &str = "somebody else has written the image meanwhile";

/// What every job needs.
#[derive(Clone)]
pub struct Context {
    pub storage: Arc<dyn Storage>,
    pub cloud: Arc<dyn Cloud>,
    pub store: Store,
    pub config: watch::Receiver<Arc<Config>>,
    pub identity: Identity,
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
    /// Stopped from outside; the watcher knows why.
    Interrupted,
    LeaseLost,
    /// The daemon stops.
    Drained,
    /// The record cannot be worked on.
    Abandon(String),
}

type Step<T> = Result<T, Stop>;

fn end<T>(state: State, reason: impl Into<String>) -> Step<T> {
    Err(Stop::End(Ending { state, reason: reason.into() }))
}

fn image_gone<T>() -> Step<T> {
    end(State::Cancelled, "the image was deleted")
}

impl From<ceph::Error> for Stop {
    fn from(error: ceph::Error) -> Self {
        match error.kind() {
            ErrorKind::NotLocked | ErrorKind::Fenced => Self::LeaseLost,
            ErrorKind::Cancelled => Self::Interrupted,
            ErrorKind::NoSpace | ErrorKind::PermissionDenied | ErrorKind::Unsupported | ErrorKind::Exists => {
                Self::End(Ending { state: State::Failed, reason: error.to_string() })
            }
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
            Kind::Unauthorized | Kind::Unavailable | Kind::Protocol | Kind::Conflict => Self::Retry(error.to_string()),
            Kind::Forbidden | Kind::OverLimit | Kind::Refused | Kind::NoService => {
                Self::End(Ending { state: State::Failed, reason: error.to_string() })
            }
        }
    }
}

impl From<store::Error> for Stop {
    fn from(error: store::Error) -> Self {
        match error {
            store::Error::Ceph(error) => error.into(),
            store::Error::Contended(_) => Self::Retry(error.to_string()),
            store::Error::Unreadable { .. } | store::Error::Illegal(_) => Self::Abandon(error.to_string()),
        }
    }
}

impl From<NoPlan> for Stop {
    fn from(none: NoPlan) -> Self {
        match none {
            NoPlan::Declined(reason) => Self::End(Ending { state: State::Declined, reason }),
            NoPlan::Gone => Self::End(Ending { state: State::Cancelled, reason: none.to_string() }),
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
    progress: Progress,
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
    id: Uuid,
}

impl Job {
    /// `stored` was read after the lease was taken.
    pub fn new(context: Context, lease: Lease, stored: Stored, pools: PoolSlots) -> Self {
        let id = stored.record.image_id;
        let stages = stored.record.stages.clone();
        Self {
            context,
            lease,
            stored: Mutex::new(stored),
            progress: Progress::default(),
            tenant: Mutex::new(None),
            cancel: CancellationToken::new(),
            finishing: AtomicBool::new(false),
            stages: std::sync::Mutex::new(stages),
            pools,
            slot: Mutex::new(None),
            removing: Mutex::new(()),
            id,
        }
    }

    /// Works on the job until it ends, must wait, or is taken away. `drain` fires when the daemon has to stop now.
    pub async fn run(self, drain: CancellationToken) -> Outcome {
        if let Err(stop) = self.take_over().await {
            return self.settle(stop).await;
        }
        let (attempt, watched) = {
            let watcher = async {
                let stop = self.watch(&drain).await;
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
                return Outcome::Ended(state);
            }
            // what the attempt decided by itself stands, unless it only felt that it was stopped
            (Err(Stop::Interrupted), Some(stop)) => stop,
            (Err(Stop::Interrupted), None) => Stop::Retry("the transfer was stopped".into()),
            (Err(stop), _) => stop,
        };
        self.settle(stop).await
    }

    /// Shuts out the owner that did not let go, and becomes the owner.
    async fn take_over(&self) -> Step<()> {
        let address = self.context.storage.address().await?;
        let before = self.snapshot().await.owner_address.filter(|before| *before != address);
        let taken = before.is_some();
        if let Some(before) = before {
            match self.context.storage.fence(&before).await {
                Ok(change) => tracing::info!(image_id = %self.id, client = before, ?change, "fenced the owner before"),
                Err(error) if error.kind() == ErrorKind::PermissionDenied => {
                    tracing::warn!(image_id = %self.id, client = before, %error,
                        "the owner before cannot be fenced: give the cephx user `mon 'profile rbd'`");
                }
                Err(error) if error.kind() == ErrorKind::Unsupported => {
                    tracing::warn!(image_id = %self.id, %error, "the record names no client that could be fenced");
                }
                Err(error) => return Err(error.into()),
            }
        }
        let owner = self.context.identity.owner();
        self.update(|record| {
            record.owner = Some(owner.clone());
            record.owner_address = Some(address.clone());
            // the attempt reads the image first of all
            record.check = false;
            // the fence keeps the owner before out of Ceph, not out of Glance
            record.mend |= taken;
        })
        .await
    }

    async fn snapshot(&self) -> Record {
        self.stored.lock().await.record.clone()
    }

    /// Changes the record under the lease. Flags that others set meanwhile are kept.
    async fn update(&self, change: impl Fn(&mut Record)) -> Step<()> {
        let mut stored = self.stored.lock().await;
        loop {
            let mut next = stored.clone();
            next.record.stages = self.stages.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone();
            change(&mut next.record);
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
        if self.cancel.is_cancelled() && !self.finishing.load(Ordering::SeqCst) {
            return Err(Stop::Interrupted);
        }
        Ok(self.lease.renew(self.context.store.objects().as_ref()).await?)
    }

    /// Runs a stage, notes how long it took.
    async fn stage<T>(&self, name: &'static str, work: impl Future<Output = Step<T>>) -> Step<T> {
        let started = Instant::now();
        let started_at = self.context.clock.now();
        let result = work.await;
        let seconds = started.elapsed().as_secs_f64();
        metrics::histogram!("rbd_offload_stage_duration_seconds", "stage" => name).record(seconds);
        tracing::debug!(image_id = %self.id, job_stage = name, seconds, ok = result.is_ok(), "stage over");
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
        if config.offload.observe && self.snapshot().await.state == State::Accepted {
            return self.observe(&config).await;
        }
        match self.snapshot().await.state {
            State::Publishing => {}
            State::Copying => {
                // begun by an attempt that did not end: start over
                self.take_down().await?;
                self.enter(State::Accepted).await?;
                self.copy(&config).await?;
            }
            _ => self.copy(&config).await?,
        }
        // the source is free of our snapshot as soon as the copy no longer needs it
        let (published, removed) = tokio::join!(self.publish(), self.remove_source_snapshot());
        published?;
        removed?;
        self.conclude(&Ending { state: State::Done, reason: String::new() }).await?;
        Ok(State::Done)
    }

    /// An ended job was asked for again, perhaps by a notification that came late: the image record knows.
    async fn asked_again(&self) -> Step<bool> {
        let image = self.context.cloud.image(&self.id.to_string()).await?;
        let asked = match image.filter(|image| image.status == "queued").map(|image| request::asked_by(&image.tags)) {
            None | Some(Asked::Nothing) => None,
            Some(Asked::For(source)) => Some(Some(source)),
            Some(Asked::Unclear(_)) => Some(None),
        };
        let now = self.context.clock.now();
        let may =
            !self.context.config.borrow().offload.observe && self.snapshot().await.state.may_become(State::Accepted);
        if let (Some(source), true) = (asked, may) {
            self.update(|record| {
                if record.restart(false, now).is_ok() {
                    record.source = source;
                }
            })
            .await?;
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

    /// Makes the plan, says what it is, and touches nothing. The request stays as it is, for the day on which the
    /// daemon does more than observe.
    async fn observe(&self, config: &Config) -> Step<State> {
        let finding = match self.stage("plan", self.plan(config)).await {
            Ok(plan) => format!("{} would be copied to pool {}", plan.origin, plan.dest_pool),
            Err(Stop::End(ending)) => format!("the request would be {}: {}", ending.state, ending.reason),
            Err(stop) => return Err(stop),
        };
        tracing::info!(image_id = %self.id, job_stage = "observed", finding, "only observed");
        metrics::counter!("rbd_offload_jobs_observed_total").increment(1);
        let reason = format!("only observed ([offload] observe = true): {finding}");
        self.conclude(&Ending { state: State::Cancelled, reason }).await?;
        Ok(State::Cancelled)
    }

    // ---- plan and copy ----

    /// From a request to a complete, inspected, sealed copy under its private name.
    async fn copy(&self, config: &Config) -> Step<()> {
        let plan = self.stage("plan", self.plan(config)).await?;
        match self.pools.take(&plan.dest_pool, config.offload.max_jobs_per_pool) {
            Some(slot) => *self.slot.lock().await = Some(slot),
            None => return Err(Stop::NoRoom { pool: plan.dest_pool }),
        }
        let copy = ImageSpec::named(&plan.dest_pool, super::record::private_name(self.id));
        self.check_names(&plan, &copy).await?;

        let private = super::record::private_name(self.id);
        let snapshot = plan.snapshot.clone().unwrap_or_else(|| private.clone());
        let origin = Origin {
            pool: plan.origin.pool.clone(),
            image_id: plan.origin_id.clone(),
            image: plan.origin.to_string(),
            snapshot: snapshot.clone(),
            temporary: plan.snapshot.is_none(),
        };
        let (methods, reasons) = transfer::candidates(plan.method, &plan.info);
        if !reasons.is_empty() {
            tracing::info!(image_id = %self.id, job_stage = "plan", reasons = reasons.join("; "), "some methods cannot do this source");
        }
        let first = methods.first().copied();
        let now = self.context.clock.now();
        self.update(|record| {
            record.source = Some(plan.source);
            record.project_id = Some(plan.project_id.clone());
            record.origin = Some(origin.clone());
            record.dest_pool = Some(plan.dest_pool.clone());
            record.publication =
                Publication { min_disk: plan.min_disk, properties: plan.properties.clone(), sha512: None };
            record.method = first;
            record.fallback = (!reasons.is_empty()).then(|| reasons.join("; "));
            record.bytes_total = plan.info.size;
            record.bytes_done = 0;
            record.progress = 0;
            record.reason = None;
            record.made.snapshot = origin.temporary;
            record.made.copy = true;
            let _ = record.enter(State::Copying, now);
        })
        .await?;
        tracing::info!(image_id = %self.id, job_stage = "copying", source = %plan.source, origin = %plan.origin,
            destination = %copy, method = first.map(transfer::Method::as_str), bytes = plan.info.size, "the job goes on");

        let source = ImageSpec::with_id(&plan.origin.pool, &plan.origin_id);
        let (shown, snapped) = tokio::join!(
            self.show(plan.image.clone(), Status::Copying, "the disk is being copied inside the storage cluster"),
            self.stage("snapshot", self.ensure_snapshot(&source, &snapshot, origin.temporary))
        );
        snapped?;
        shown?;
        self.stage("transfer", self.transfer(config, &methods, &source, &snapshot, &copy)).await?;
        if self.cancel.is_cancelled() {
            return Err(Stop::Interrupted);
        }
        let compared = match config.offload.verify {
            Verify::None => None,
            Verify::Sample => Some(Compare::Sample),
            Verify::Full => Some(Compare::Full),
        };
        if let Some(extent) = compared {
            self.stage("verify", self.verify(&source, &snapshot, &copy, extent)).await?;
        }
        let (sealed, ()) = tokio::join!(
            self.stage("inspect", self.inspect_and_seal(&copy)),
            self.show_again(Status::Publishing, "the copy is complete and is being registered")
        );
        sealed?;
        if config.offload.hash == Hash::Sha512 {
            self.stage("hash", self.hash(&copy, plan.info.size)).await?;
        }
        self.enter(State::Publishing).await
    }

    async fn plan(&self, config: &Config) -> Step<Plan> {
        let record = self.snapshot().await;
        let question =
            Question { image_id: self.id, trigger: record.trigger, source: record.source, retried: record.retried };
        let image = plan::read_image(self.context.cloud.as_ref(), self.id).await?;
        let source = plan::read_request(&image, &question)?;
        if record.source != Some(source) {
            // also where the plan then refuses it: `retry` goes by the latest request, not by one before
            self.update(|record| record.source = Some(source)).await?;
        }
        Ok(plan::make(self.context.cloud.as_ref(), self.context.storage.as_ref(), config, &question, image, source)
            .await?)
    }

    /// The names that the job is going to use must be free: what bears them is not ours, or we would have taken it down.
    async fn check_names(&self, plan: &Plan, copy: &ImageSpec) -> Step<()> {
        let storage = self.context.storage.as_ref();
        let published = ImageSpec::named(&plan.dest_pool, self.id.to_string());
        if storage.image(&published, None).await?.is_some() {
            return end(
                State::Declined,
                "another image of that id is in Glance's pool already: somebody else writes it",
            );
        }
        if storage.image(copy, None).await?.is_some() {
            return end(
                State::Failed,
                format!("{copy} is in the way and is not this job's: look what it is, remove it, then retry"),
            );
        }
        let private = super::record::private_name(self.id);
        if plan.snapshot.is_none() && plan.info.snapshots.iter().any(|snapshot| snapshot.name == private) {
            return end(
                State::Failed,
                format!(
                    "the snapshot {}@{private} is in the way and is not this job's: remove it, then retry",
                    plan.origin
                ),
            );
        }
        Ok(())
    }

    async fn ensure_snapshot(&self, source: &ImageSpec, snapshot: &str, temporary: bool) -> Step<()> {
        if temporary {
            self.before_visible_step().await?;
            self.context.storage.create_snapshot(source, snapshot).await?;
            self.context.storage.protect_snapshot(source, snapshot).await?;
        }
        Ok(())
    }

    async fn transfer(
        &self,
        config: &Config,
        methods: &[transfer::Method],
        source: &ImageSpec,
        snapshot: &str,
        copy: &ImageSpec,
    ) -> Step<()> {
        let order = Order {
            source: source.clone(),
            snapshot: snapshot.to_owned(),
            destination: copy.clone(),
            mark: self.id.to_string(),
            limits: TransferLimits {
                concurrency: config.offload.concurrency,
                bytes_per_second: config.offload.bandwidth_limit,
                objects_per_second: config.offload.objects_per_second,
            },
        };
        let mut refused: Option<ceph::Error> = None;
        for method in methods {
            if let Some(error) = refused.take() {
                tracing::warn!(image_id = %self.id, job_stage = "transfer", %error, next = method.as_str(),
                    "this method cannot do it; the next one is tried");
                self.context.storage.remove_image(copy).await?;
                self.update(|record| {
                    let before = record.method.map_or("", transfer::Method::as_str);
                    let note = format!("{before}: {error}");
                    record.fallback =
                        Some(record.fallback.iter().chain([&note]).cloned().collect::<Vec<_>>().join("; "));
                    record.method = Some(*method);
                })
                .await?;
            }
            self.before_visible_step().await?;
            let result =
                method.transfer().run(self.context.storage.as_ref(), &order, &self.progress, &self.cancel).await;
            match result {
                Ok(moved) => {
                    metrics::counter!("rbd_offload_copied_bytes_total", "method" => method.as_str())
                        .increment(moved.bytes);
                    metrics::counter!("rbd_offload_host_bytes_total", "method" => method.as_str())
                        .increment(moved.through_host);
                    let method = *method;
                    return self
                        .update(|record| {
                            record.method = Some(method);
                            record.bytes_done = record.bytes_total;
                            record.progress = 95;
                        })
                        .await;
                }
                Err(error) if transfer::is_for_another_method(&error) => refused = Some(error),
                Err(error) if error.kind() == ErrorKind::Exists => {
                    // it came between our look and our making: not ours, so not to be taken down
                    self.update(|record| record.made.copy = false).await?;
                    return end(
                        State::Failed,
                        format!("{copy} is in the way and is not this job's: look what it is, remove it, then retry"),
                    );
                }
                Err(error) => return Err(error.into()),
            }
        }
        match refused {
            Some(error) => Err(error.into()),
            None => end(State::Failed, "no method of transfer can do this source"),
        }
    }

    /// A copy that differs from its source is never published.
    async fn verify(&self, source: &ImageSpec, snapshot: &str, copy: &ImageSpec, extent: Compare) -> Step<()> {
        let Some(offset) = self.context.storage.compare(source, snapshot, copy, extent, &self.cancel).await? else {
            return Ok(());
        };
        metrics::counter!("rbd_offload_verify_failures_total").increment(1);
        tracing::error!(image_id = %self.id, job_stage = "verify", offset, copy = %copy, "the copy differs from its source");
        self.context.storage.remove_image(copy).await?;
        Err(Stop::Retry(format!("the copy differed from its source at byte {offset}; it was removed and is made anew")))
    }

    async fn inspect_and_seal(&self, copy: &ImageSpec) -> Step<()> {
        let storage = self.context.storage.as_ref();
        if let Some(format) = publish::inspect(storage, copy).await? {
            return end(
                State::Declined,
                format!(
                    "the disk starts with the header of a {format} file: such a disk is not registered as raw, upload it instead"
                ),
            );
        }
        Ok(publish::seal(storage, copy).await?)
    }

    async fn hash(&self, copy: &ImageSpec, size: u64) -> Step<()> {
        let hash = publish::sha512(self.context.storage.as_ref(), copy, size, &self.cancel).await?;
        self.update(|record| record.publication.sha512 = Some(hash.clone())).await
    }

    async fn remove_source_snapshot(&self) -> Step<()> {
        let _one = self.removing.lock().await;
        let record = self.snapshot().await;
        if let (true, Some(origin)) = (record.made.snapshot, &record.origin) {
            let source = ImageSpec::with_id(&origin.pool, &origin.image_id);
            self.context.storage.remove_snapshot(&source, &origin.snapshot).await?;
            self.update(|record| record.made.snapshot = false).await?;
        }
        Ok(())
    }

    // ---- publish ----

    /// From a sealed copy to an active image.
    async fn publish(&self) -> Step<()> {
        // from here on the watcher leaves the tenant's record alone
        *self.tenant.lock().await = None;
        let record = self.snapshot().await;
        let Some(pool) = record.dest_pool.clone() else {
            return Err(Stop::Abandon("its record names no destination pool".into()));
        };
        let copy = ImageSpec::named(&pool, record.private_name());

        let mut image = self.read_image().await?;
        match image.status.as_str() {
            "active" if self.is_our_image(&copy).await? => return self.finish(&pool, &image).await,
            "queued" | "importing" => {}
            _ => return end(State::Declined, OTHER_WRITER),
        }
        self.stage("rename", self.take_name(&copy)).await?;
        if image.status == "queued" {
            image = self.stage("record", self.prepare_record(image, &record.publication)).await?;
        }
        let image = self.stage("register", self.register(image, &pool, record.bytes_total)).await?;
        if !self.is_our_image(&copy).await? {
            return end(State::Declined, OTHER_WRITER);
        }
        self.finish(&pool, &image).await
    }

    async fn read_image(&self) -> Step<Image> {
        Ok(plan::read_image(self.context.cloud.as_ref(), self.id).await?)
    }

    /// Whether an active image is active by what we published: our mark says so, and once it is coming off, the record.
    async fn is_our_image(&self, copy: &ImageSpec) -> Step<bool> {
        let made = self.snapshot().await.made;
        if !made.published || made.active {
            return Ok(made.active);
        }
        let published = ImageSpec::named(&copy.pool, self.id.to_string());
        Ok(publish::is_marked(self.context.storage.as_ref(), &published, &self.id.to_string()).await?)
    }

    async fn take_name(&self, copy: &ImageSpec) -> Step<()> {
        self.before_visible_step().await?;
        if !self.snapshot().await.made.published {
            self.update(|record| record.made.published = true).await?;
        }
        match publish::take_name(self.context.storage.as_ref(), copy, &self.id.to_string()).await? {
            Name::Ours => Ok(()),
            Name::Taken => {
                self.update(|record| record.made.published = false).await?;
                end(State::Declined, OTHER_WRITER)
            }
            Name::Lost => {
                self.enter(State::Copying).await?;
                Err(Stop::Retry("the copy is gone, it is made anew".into()))
            }
        }
    }

    async fn prepare_record(&self, mut image: Image, publication: &Publication) -> Step<Image> {
        for _ in 0..RECORD_TRIES {
            let changes = tenant::prepare(&image, publication.min_disk, &publication.properties);
            if changes.is_empty() {
                return Ok(image);
            }
            self.before_visible_step().await?;
            match self.context.cloud.update_image(&self.id.to_string(), &changes).await {
                Ok(Some(changed)) => return Ok(changed),
                Ok(None) => return image_gone(),
                Err(error)
                    if matches!(error.kind(), openstack::ErrorKind::Conflict | openstack::ErrorKind::Forbidden) =>
                {
                    image = self.read_image().await?;
                    if image.status != "queued" {
                        return end(State::Declined, OTHER_WRITER);
                    }
                    if error.kind() == openstack::ErrorKind::Forbidden {
                        return Err(error.into());
                    }
                }
                Err(error) => return Err(error.into()),
            }
        }
        Err(Stop::Retry("the image record changes all the time".into()))
    }

    /// Tells Glance the location and waits until the image is active.
    async fn register(&self, image: Image, pool: &str, bytes: u64) -> Step<Image> {
        let cloud = self.context.cloud.as_ref();
        let id = self.id.to_string();
        let known: Vec<String> = cloud.image_tasks(&id).await?.into_iter().map(|task| task.id).collect();
        if image.status == "queued" {
            let url = publish::location(&self.context.storage.fsid().await?, pool, &id);
            self.before_visible_step().await?;
            let hash = self.snapshot().await.publication.sha512;
            let validation = hash.map(|value| Validation { algorithm: "sha512".into(), value });
            match cloud.add_location(&id, &url, validation.as_ref()).await? {
                // a conflict may be our own success, whose answer was lost: look
                Some(LocationAnswer::Accepted | LocationAnswer::Conflict) => {}
                None => return image_gone(),
            }
        }
        let started = Instant::now();
        let mut pause = POLL_FIRST;
        loop {
            sleep(pause).await;
            pause = (pause * 2).min(POLL_MAX);
            let image = self.read_image().await?;
            let at_work = at_work(&image);
            match image.status.as_str() {
                "active" => return Ok(image),
                "queued" | "importing" => {}
                _ => return end(State::Declined, OTHER_WRITER),
            }
            if !at_work && pause >= POLL_MAX / 2 {
                self.check_tasks(&known, pool).await?;
            }
            let limit =
                if at_work { ACTIVE_WITHIN + Duration::from_secs(bytes / HASHED_PER_SECOND) } else { ACTIVE_WITHIN };
            if started.elapsed() > limit {
                return Err(Stop::Retry(format!("Glance did not make the image active within {} s", limit.as_secs())));
            }
        }
    }

    /// Whether a Glance task that is not in `known` failed. Glance then may have removed the RBD image.
    async fn check_tasks(&self, known: &[String], pool: &str) -> Step<()> {
        let tasks = self.context.cloud.image_tasks(&self.id.to_string()).await?;
        let Some(failed) = tasks.iter().find(|task| task.status == "failure" && !known.contains(&task.id)) else {
            return Ok(());
        };
        let reason = format!("Glance refused the location: {}", failed.message);
        let published = ImageSpec::named(pool, self.id.to_string());
        if self.context.storage.image(&published, None).await?.is_none() {
            self.update(|record| record.made.published = false).await?;
            self.enter(State::Copying).await?;
        }
        Err(Stop::Retry(reason))
    }

    /// Tells the tenant that the request is known, while it waits for its turn.
    pub async fn acknowledge(self) {
        let work = async {
            let record = self.snapshot().await;
            let observe = self.context.config.borrow().offload.observe;
            if observe || record.acknowledged || record.state != State::Accepted || record.ending.is_some() {
                return Ok(());
            }
            // so that whoever comes next knows of us, if this ends half way
            self.take_over().await?;
            let image = self.read_image().await?;
            if image.status == "queued" && !matches!(request::asked_by(&image.tags), Asked::Nothing) {
                self.before_visible_step().await?;
                self.patch_status(image, Status::Accepted, 0, "the request waits for its turn").await?;
            }
            self.let_go(|record| record.acknowledged = true).await
        };
        if let Err(stop) = work.await {
            tracing::debug!(image_id = %self.id, ?stop, "the request was not acknowledged; its run tells");
        }
        self.lease.release(self.context.store.objects().as_ref()).await;
    }

    /// The image is active: take our mark off, and what may be left.
    async fn finish(&self, pool: &str, image: &Image) -> Step<()> {
        self.finishing.store(true, Ordering::SeqCst);
        let id = self.id.to_string();
        let published = ImageSpec::named(pool, &id);
        if !self.snapshot().await.made.active {
            self.update(|record| record.made.active = true).await?;
        }
        self.context.storage.remove_metadata(&published, transfer::MARK).await?;
        let leftovers = tenant::clear(image);
        if !leftovers.is_empty() {
            match self.context.cloud.update_image(&id, &leftovers).await {
                Ok(_) => {}
                Err(error) if error.kind() == openstack::ErrorKind::Conflict => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    // ---- the way out ----

    /// Brings the record to its end state and gives the job out of hand.
    async fn conclude(&self, ending: &Ending) -> Step<()> {
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
            record.made = super::record::Made::default();
            record.cancel = false;
            record.check = false;
        })
        .await?;
        self.index().await?;
        let record = self.snapshot().await;
        metrics::counter!("rbd_offload_jobs_ended_total",
            "state" => ending.state.as_str(), "trigger" => record.trigger.as_str(),
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

    async fn index(&self) -> Step<()> {
        Ok(self.context.store.index(&self.snapshot().await).await?)
    }

    async fn settle(&self, stop: Stop) -> Outcome {
        let objects = self.context.store.objects().clone();
        let ended = self.snapshot().await.state.is_ended();
        let outcome = match stop {
            // it only was to be seen whether it is asked for again: that can wait, and cannot end it a second time
            Stop::End(Ending { reason, .. }) | Stop::Retry(reason) if ended => self.pause(&reason, true).await,
            Stop::End(ending) => self.wind_up(ending).await,
            Stop::Retry(reason) => self.pause_or_fail(reason).await,
            // the index tells the engine not to take it before there is room
            Stop::NoRoom { pool } => match self.let_go(|record| record.dest_pool = Some(pool.clone())).await {
                Ok(()) => Outcome::Waiting(Duration::ZERO),
                Err(_) => Outcome::Abandoned,
            },
            Stop::Drained => {
                tracing::info!(image_id = %self.id, "released: this daemon stops, another goes on");
                match self.let_go(|_| {}).await {
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
        };
        if outcome != Outcome::Abandoned {
            self.lease.release(objects.as_ref()).await;
        }
        outcome
    }

    /// Gives up ownership in the record, so that nobody fences us for it.
    async fn let_go(&self, change: impl Fn(&mut Record)) -> Step<()> {
        self.update(|record| {
            record.owner = None;
            record.owner_address = None;
            change(record);
        })
        .await?;
        self.index().await
    }

    async fn pause_or_fail(&self, reason: String) -> Outcome {
        let record = self.snapshot().await;
        let retries = self.context.config.borrow().offload.retries;
        if record.attempts >= retries {
            let reason = format!("given up after {} attempts: {reason}", record.attempts.saturating_add(1));
            return self.wind_up(Ending { state: State::Failed, reason }).await;
        }
        self.pause(&reason, true).await
    }

    /// Leaves the job for a while. `counts`: this attempt counts for the limit of retries.
    async fn pause(&self, reason: &str, counts: bool) -> Outcome {
        let attempts = self.snapshot().await.attempts;
        let pause = backoff(self.id, attempts);
        let not_before =
            self.context.clock.now().checked_add(SignedDuration::try_from(pause).unwrap_or(SignedDuration::ZERO)).ok();
        metrics::counter!("rbd_offload_retries_total").increment(1);
        tracing::warn!(image_id = %self.id, reason, attempts, pause_seconds = pause.as_secs_f64(), "tried again later");
        let left = self
            .let_go(|record| {
                record.reason = Some(reason.to_owned());
                record.not_before = not_before;
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
    async fn wind_up(&self, ending: Ending) -> Outcome {
        self.finishing.store(true, Ordering::SeqCst);
        let stored = self.snapshot().await.ending;
        let ending = stored.clone().unwrap_or(ending);
        let work = async {
            if stored.is_none() {
                self.update(|record| record.ending = Some(ending.clone())).await?;
            }
            *self.tenant.lock().await = None;
            let image = match plan::read_image(self.context.cloud.as_ref(), self.id).await {
                Ok(image) => Some(image),
                Err(NoPlan::Gone) => None,
                Err(error) => return Err(error.into()),
            };
            if self.turned_active(image.as_ref()).await? {
                return Ok(State::Done);
            }
            self.let_glance_finish(image.as_ref()).await?;
            self.before_visible_step().await?;
            self.take_down().await?;
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
            Err(Stop::Interrupted | Stop::Drained | Stop::NoRoom { .. }) => {
                self.pause("stopped while it was winding up", false).await
            }
        }
    }

    /// A registration that seemed to have failed went through after all: then the image stays, and the job is done.
    async fn turned_active(&self, image: Option<&Image>) -> Step<bool> {
        let record = self.snapshot().await;
        let (Some(image), Some(pool), State::Publishing) = (image, &record.dest_pool, record.state) else {
            return Ok(false);
        };
        let copy = ImageSpec::named(pool, record.private_name());
        if image.status != "active" || !self.is_our_image(&copy).await? {
            return Ok(false);
        }
        self.update(|record| record.ending = None).await?;
        self.finish(pool, image).await?;
        self.remove_source_snapshot().await?;
        self.conclude(&Ending { state: State::Done, reason: String::new() }).await?;
        Ok(true)
    }

    /// While Glance works on a location, its image must not be taken away: it would become active without data.
    async fn let_glance_finish(&self, image: Option<&Image>) -> Step<()> {
        let record = self.snapshot().await;
        let patience = self.context.config.borrow().offload.retries.saturating_add(GLANCE_TASK_PAUSES);
        if record.state == State::Publishing && record.attempts < patience && image.is_some_and(at_work) {
            return Err(Stop::Retry("Glance still works on the image".into()));
        }
        Ok(())
    }

    /// Removes everything that the record says we made or were about to make.
    async fn take_down(&self) -> Step<()> {
        let record = self.snapshot().await;
        let storage = self.context.storage.as_ref();
        if let Some(pool) = &record.dest_pool {
            if record.made.published {
                publish::withdraw(storage, pool, &self.id.to_string()).await?;
            }
            if record.made.copy {
                storage.remove_image(&ImageSpec::named(pool, record.private_name())).await?;
            }
        }
        self.remove_source_snapshot().await?;
        self.update(|record| record.made = super::record::Made::default()).await
    }

    // ---- what the tenant sees ----

    /// Shows status and message on the record, and lets the watcher go on from there.
    async fn show(&self, image: Image, status: Status, message: &str) -> Step<()> {
        self.before_visible_step().await?;
        let mut tenant = self.tenant.lock().await;
        *tenant = Some(self.patch_status(image, status, 0, message).await?);
        Ok(())
    }

    /// Like [`show`](Self::show), where a failure is no reason to stop.
    async fn show_again(&self, status: Status, message: &str) {
        let Some(image) = self.tenant.lock().await.take() else { return };
        if let Err(stop) = self.patch_status(image, status, 95, message).await {
            tracing::debug!(image_id = %self.id, ?stop, "the status was not shown");
        }
    }

    async fn patch_status(&self, image: Image, status: Status, percent: u8, message: &str) -> Step<Image> {
        let changes = tenant::show(&image, status, percent, message);
        match self.context.cloud.update_image(&self.id.to_string(), &changes).await {
            Ok(Some(image)) if image.status == "queued" => Ok(image),
            Ok(Some(_)) => end(State::Declined, OTHER_WRITER),
            Ok(None) => image_gone(),
            // the record changed since it was read; the next look tells
            Err(error) if error.kind() == openstack::ErrorKind::Conflict => Ok(image),
            Err(error) => Err(error.into()),
        }
    }

    async fn tell_end(&self, mut image: Image, ending: &Ending) -> Step<()> {
        let record = self.snapshot().await;
        let (status, message) = last_word(ending.state, &ending.reason, record.request_id);
        let asks = !matches!(request::asked_by(&image.tags), Asked::Nothing);
        if record.told && asks && tenant::show(&image, status, 0, &message).is_empty() {
            // told already, which took the tag off: the tenant has asked again since
            return self.update(|record| record.again = true).await;
        }
        self.update(|record| record.told = true).await?;
        for _ in 0..RECORD_TRIES {
            match self.context.cloud.update_image(&self.id.to_string(), &tenant::end(&image, status, &message)).await {
                Ok(_) => return Ok(()),
                Err(error)
                    if matches!(error.kind(), openstack::ErrorKind::Conflict | openstack::ErrorKind::Forbidden) =>
                {
                    match self.context.cloud.image(&self.id.to_string()).await? {
                        Some(now) if now.status == "queued" => image = now,
                        _ => return Ok(()),
                    }
                    if error.kind() == openstack::ErrorKind::Forbidden {
                        return Err(error.into());
                    }
                }
                Err(error) => return Err(error.into()),
            }
        }
        Err(Stop::Retry("the image record changes all the time".into()))
    }

    // ---- the watcher ----

    /// Keeps the lease and looks around until there is a reason to stop.
    async fn watch(&self, drain: &CancellationToken) -> Stop {
        let objects = self.context.store.objects().clone();
        let mut renewed = Instant::now();
        let mut looked = Instant::now();
        let interval = WATCH_INTERVAL.min(self.lease.renewal_interval());
        loop {
            tokio::select! {
                () = drain.cancelled() => return Stop::Drained,
                () = sleep(interval) => {}
            }
            if renewed.elapsed() + interval > self.lease.renewal_interval() {
                match self.lease.renew(objects.as_ref()).await {
                    Ok(()) => renewed = Instant::now(),
                    Err(error) if matches!(error.kind(), ErrorKind::NotLocked | ErrorKind::Fenced) => {
                        return Stop::LeaseLost;
                    }
                    Err(error) => tracing::warn!(image_id = %self.id, %error, "the lease was not renewed; tried again"),
                }
            }
            match self.look_around(&mut looked).await {
                Ok(()) => {}
                // what may pass is no reason for the watcher to stop a transfer that goes well
                Err(Stop::Retry(reason)) => tracing::debug!(image_id = %self.id, reason, "the watcher could not look"),
                Err(stop) => return stop,
            }
        }
    }

    async fn look_around(&self, looked: &mut Instant) -> Step<()> {
        if self.finishing.load(Ordering::SeqCst) {
            return Ok(());
        }
        let Some(now) = self.context.store.load(self.id).await? else {
            return Err(Stop::Abandon("its record is gone".into()));
        };
        if now.record.cancel {
            return end(State::Cancelled, "cancelled by the operator");
        }
        if now.record.check {
            self.read_image().await?;
            self.update(|record| record.check = false).await?;
        }
        if self.snapshot().await.state != State::Copying {
            return Ok(());
        }
        let percent = self.note_progress().await?;
        if looked.elapsed() < TENANT_INTERVAL {
            return Ok(());
        }
        *looked = Instant::now();
        let mut tenant = self.tenant.lock().await;
        if let Some(image) = tenant.take() {
            let message = "the disk is being copied inside the storage cluster";
            let changes = tenant::show(&image, Status::Copying, percent, message);
            let seen = if changes.is_empty() {
                self.read_image().await
            } else {
                self.patch_status(image.clone(), Status::Copying, percent, message).await
            };
            match seen {
                Ok(seen) if seen.status == "queued" => *tenant = Some(seen),
                Ok(_) => return end(State::Declined, OTHER_WRITER),
                Err(stop @ Stop::Retry(_)) => {
                    *tenant = Some(image);
                    return Err(stop);
                }
                Err(stop) => return Err(stop),
            }
        }
        Ok(())
    }

    /// Writes the progress into the record when it moved. Returns per cent of the whole job.
    async fn note_progress(&self) -> Step<u8> {
        let (done, total) = (self.progress.done(), self.progress.total());
        if total == 0 {
            return Ok(0);
        }
        // the copy is all but the last 5 % of a job
        let percent = u8::try_from(u128::from(done) * 95 / u128::from(total)).unwrap_or(95);
        let record = self.snapshot().await;
        let bytes_done = u64::try_from(u128::from(record.bytes_total) * u128::from(done) / u128::from(total))
            .unwrap_or(record.bytes_total);
        if record.progress != percent {
            self.update(|record| {
                record.progress = percent;
                record.bytes_done = bytes_done;
            })
            .await?;
        }
        Ok(percent)
    }
}

/// What the tenant is told at an end without an image.
pub(super) fn last_word(state: State, reason: &str, request: Uuid) -> (Status, String) {
    match state {
        State::Declined => (Status::Declined, reason.to_owned()),
        State::Cancelled => (Status::Failed, format!("{reason}; set the request tag to ask again")),
        // what broke inside is for the operator
        _ => (
            Status::Failed,
            format!(
                "the copy could not be made; set the request tag to ask again, or tell your operator the request id {request}"
            ),
        ),
    }
}

/// Whether a Glance task works on the image.
fn at_work(image: &Image) -> bool {
    image.status == "importing" || image.properties.contains_key("os_glance_import_task")
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
