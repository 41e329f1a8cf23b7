//! A job whose lease this daemon holds: its record, and what the steps need to work on it.
//!
//! No other daemon writes the record. Each write names the lease and the version that was read, so that the OSD refuses
//! it once the lease is lost.

mod image;

pub(super) use image::{CHANGE_TRIES, has_running_task, running_task};

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use tokio::sync::Mutex;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::Span;
use uuid::Uuid;

use super::backoff::BACKOFF_MAX;
use super::context::Context;
use super::error::{StepError, StepResult};
use super::lease::Lease;
use super::record::{Artifact, Publish, Record, Stage, State};
use super::signal::{Signal, Signals};
use super::store::{self, Stored};
use crate::ceph::{ErrorKind, FillState, Progress};
use crate::publish::tag::OwnershipTag;
use crate::telemetry::unix_time;

/// Bytes a second that Glance is trusted to hash at least (measured: 170 MiB/s and more).
pub(super) const HASHED_PER_SECOND: u64 = 20 << 20;

/// Pause before a change of the record whose outcome is unknown is retried.
const UPDATE_PAUSE: Duration = Duration::from_secs(1);

/// How long a job waits until the index says who holds it.
const INDEX_WITHIN: Duration = Duration::from_secs(5);

/// Pauses (of at most [`BACKOFF_MAX`]) that a job leaves to another service: to a Glance
/// task that seems to be at work still, or to Cinder's deletion of the source.
const SERVICE_PAUSES: u32 = 20;

pub(super) struct HeldJob {
    pub context: Context,
    pub lease: Lease,
    pub progress: Arc<Progress>,
    /// Fires when the attempt is to stop.
    pub cancel: CancellationToken,
    /// The job waits for a service, and copies nothing.
    pub waits: Arc<AtomicBool>,
    /// How far the copy behind an active image is, where the record does not say so yet.
    pub filled: std::sync::Mutex<Option<FillState>>,
    pub id: Uuid,
    pub span: Span,
    stored: Mutex<Stored>,
    /// It is on its way to an end, and stops for nothing but a lost lease.
    uncancellable: AtomicBool,
    /// Glance lets the daemon write or remove no status on the image record.
    status_refused: AtomicBool,
    /// Of the latest attempts, one of each name. Those that run have no `seconds`.
    stages: std::sync::Mutex<Vec<Stage>>,
}

/// A stage that runs. One that is broken off is in no record.
struct RunningStage<'a> {
    job: &'a HeldJob,
    name: &'static str,
}

impl Drop for RunningStage<'_> {
    fn drop(&mut self) {
        self.job.stages().retain(|stage| stage.name != self.name || stage.seconds.is_some());
    }
}

impl HeldJob {
    /// `stored` was read after the lease was taken.
    pub fn new(context: Context, lease: Lease, stored: Stored) -> Self {
        let id = stored.record.image_id;
        let (request_id, mut stages) = (stored.record.request_id, stored.record.stages.clone());
        // an owner that died was at them
        stages.retain(|stage| stage.seconds.is_some());
        Self {
            context,
            lease,
            progress: Arc::default(),
            cancel: CancellationToken::new(),
            waits: Arc::default(),
            filled: std::sync::Mutex::default(),
            id,
            // at the highest level, so that it is there whatever is logged
            span: tracing::error_span!("job", image_id = %id, %request_id),
            stored: Mutex::new(stored),
            uncancellable: AtomicBool::new(false),
            status_refused: AtomicBool::new(false),
            stages: std::sync::Mutex::new(stages),
        }
    }

    /// A copy of the record.
    pub async fn record(&self) -> Record {
        self.stored.lock().await.record.clone()
    }

    /// The signals as they were read last.
    pub async fn signals(&self) -> Signals {
        self.stored.lock().await.signals.clone()
    }

    /// What the job writes on everything that it makes in Ceph.
    pub async fn tag(&self) -> OwnershipTag {
        OwnershipTag::new(self.id, self.record().await.request_id, self.context.deployment)
    }

    /// Changes the record.
    pub async fn update(&self, change: impl Fn(&mut Record)) -> StepResult<()> {
        self.update_with_signals(|record, _| {
            change(record);
            Vec::new()
        })
        .await
    }

    /// Changes the record. `change` gets the signals that there are, and returns those that it consumes: they are
    /// removed by the same write. It is called again when that write is refused, since a signal came or the lease was
    /// renewed.
    pub async fn update_with_signals(&self, change: impl Fn(&mut Record, &Signals) -> Vec<Signal>) -> StepResult<()> {
        let mut stored = self.stored.lock().await;
        loop {
            let mut next = stored.clone();
            next.record.stages = self.stages().clone();
            let consumed = change(&mut next.record, &stored.signals);
            next.record.shorten();
            next.record.updated_at = self.context.clock.now();
            match self.context.store.write(&next, self.lease.key(), &consumed).await {
                Ok(version) => {
                    next.signals.remove(&consumed);
                    *stored = Stored { version, ..next };
                    return Ok(());
                }
                Err(store::Error::Ceph(error)) if error.kind() == ErrorKind::Conflict => {
                    match self.context.store.load(self.id).await? {
                        Some(now) => *stored = now,
                        None => return Err(StepError::Abandon("its record is gone".into())),
                    }
                }
                // this process was frozen: another daemon may own the job by now
                Err(store::Error::Ceph(error)) if error.kind() == ErrorKind::TimedOut && self.lease.is_over() => {
                    return Err(StepError::LeaseLost);
                }
                // carried out or not: the version of the record tells
                Err(store::Error::Ceph(error)) if error.kind() == ErrorKind::TimedOut => {
                    tokio::time::sleep(UPDATE_PAUSE).await;
                    match self.context.store.load(self.id).await {
                        Ok(Some(now)) => *stored = now,
                        Ok(None) => return Err(StepError::Abandon("its record is gone".into())),
                        Err(_) => {}
                    }
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Moves the job to `state`.
    pub async fn enter(&self, state: State) -> StepResult<()> {
        let now = self.context.clock.now();
        if let Err(illegal) = self.record().await.enter(state, now) {
            return Err(StepError::Abandon(illegal.to_string()));
        }
        self.update(|record| {
            let _ = record.enter(state, now);
        })
        .await?;
        tracing::info!(image_id = %self.id, job_stage = state.as_str(), "job state changed");
        Ok(())
    }

    /// The copy is gone, and is made again from the plan on.
    pub async fn begin_again(&self) -> StepResult<()> {
        match self.record().await.publish {
            Publish::WhenCopied => self.enter(State::Copying).await,
            Publish::AtOnce => self.update(|record| record.sealed = false).await,
        }
    }

    /// Writes down how far the copy behind an active image is.
    pub async fn note_filled(&self) -> StepResult<()> {
        let filled = self.filled.lock().unwrap_or_else(PoisonError::into_inner).take();
        match filled {
            Some(filled) if filled != self.record().await.fill => self.update(|record| record.fill = filled).await,
            _ => Ok(()),
        }
    }

    /// Records an object before it is made, so that the job is known as its owner after a crash at any point.
    pub async fn will_make(&self, artifact: Artifact) -> StepResult<()> {
        if self.record().await.has(artifact) {
            return Ok(());
        }
        self.update(|record| {
            record.artifacts.insert(artifact);
        })
        .await
    }

    /// What was about to be made is not the job's, or is gone.
    pub async fn disown(&self, artifact: Artifact) -> StepResult<()> {
        self.update(|record| {
            record.artifacts.remove(&artifact);
        })
        .await
    }

    /// Brings the indexes in line with the record.
    pub async fn index(&self) -> StepResult<()> {
        let stored = self.stored.lock().await.clone();
        Ok(self.context.store.index(&stored).await?)
    }

    /// Says in the index that this daemon holds the job. Where that fails, other daemons find it out by the lease.
    pub async fn index_holder(&self) {
        let stored = self.stored.lock().await.clone();
        match tokio::time::timeout(INDEX_WITHIN, self.context.store.index_holder(&stored)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::debug!(image_id = %self.id, %error, "the index does not say who holds the job"),
            Err(_) => tracing::debug!(image_id = %self.id, "the index may not say who holds the job"),
        }
    }

    pub async fn renew_lease(&self) -> StepResult<()> {
        Ok(self.lease.renew(self.context.store.objects().as_ref()).await?)
    }

    pub async fn release_lease(&self) {
        self.lease.release(self.context.store.objects().as_ref()).await;
    }

    /// The next step is one that others can see: it needs the lease, now.
    pub async fn before_visible_step(&self) -> StepResult<()> {
        self.check_cancelled()?;
        self.renew_lease().await
    }

    pub fn check_cancelled(&self) -> StepResult<()> {
        if self.cancel.is_cancelled() && !self.is_uncancellable() {
            return Err(StepError::Interrupted);
        }
        Ok(())
    }

    /// From here on the job stops for nothing but a lost lease.
    pub fn set_uncancellable(&self) {
        self.uncancellable.store(true, Ordering::SeqCst);
    }

    pub fn is_uncancellable(&self) -> bool {
        self.uncancellable.load(Ordering::SeqCst)
    }

    /// Runs a stage, and notes that it runs and how long it took. Both go into the record with its next change.
    pub async fn stage<T>(&self, name: &'static str, work: impl Future<Output = StepResult<T>>) -> StepResult<T> {
        let started = Instant::now();
        let started_at = self.context.clock.now();
        self.note_stage(Stage { name: name.to_owned(), started_at, seconds: None });
        let running = RunningStage { job: self, name };
        let result = work.await;
        drop(running);
        let seconds = started.elapsed().as_secs_f64();
        metrics::histogram!("rbd_offload_stage_duration_seconds", "stage" => name).record(seconds);
        tracing::debug!(image_id = %self.id, job_stage = name, seconds, ok = result.is_ok(), "stage over");
        if result.is_ok() {
            metrics::gauge!("rbd_offload_last_progress_timestamp_seconds").set(unix_time());
            self.progress.step();
        }
        self.note_stage(Stage { name: name.to_owned(), started_at, seconds: Some(seconds) });
        result
    }

    fn note_stage(&self, stage: Stage) {
        let mut stages = self.stages();
        stages.retain(|other| other.name != stage.name);
        stages.push(stage);
    }

    fn stages(&self) -> std::sync::MutexGuard<'_, Vec<Stage>> {
        self.stages.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Attempts in which another service may take its time: more than the job itself has.
    pub fn service_attempts(&self) -> u32 {
        self.context.config.borrow().offload.retries.saturating_add(SERVICE_PAUSES)
    }

    /// Attempts, with pauses of at most [`BACKOFF_MAX`] between them, in which a Glance task has ended, also one that
    /// hashes the image.
    pub fn glance_attempts(&self, record: &Record) -> u32 {
        let hashes = record.bytes_total / HASHED_PER_SECOND / BACKOFF_MAX.as_secs();
        self.service_attempts().saturating_add(u32::try_from(hashes).unwrap_or(u32::MAX))
    }
}
