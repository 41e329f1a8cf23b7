//! What runs beside a job: the renewal of its lease, and the watcher, which shows progress and hears of a cancellation
//! or of another writer.

use std::time::Duration;

use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use super::{JobRun, StepError, StepResult};
use crate::ceph::ErrorKind;
use crate::job::error::{end, other_writer};
use crate::job::record::State;
use crate::job::signal::{Signal, Signals};
use crate::openstack::Image;
use crate::publish::image_status::{self, Status};
use crate::telemetry::unix_time;

/// How often the watcher polls the job's record and shows progress.
const WATCH_INTERVAL: Duration = Duration::from_secs(2);

/// How often the tenant's record is read or changed while the copy runs.
const TENANT_INTERVAL: Duration = Duration::from_secs(4);

/// Interval between checks whether an active image was deleted during its copy, in case the notification is lost.
const DELETION_INTERVAL: Duration = Duration::from_secs(10);

/// How often a service that waits is shown that the copy moves, where a per cent takes longer.
const HEARTBEAT_INTERVAL: Duration = Duration::from_secs(10);

const COPYING: &str = "the disk is being copied inside the storage cluster";

/// What the watcher has seen and shown.
struct PollState {
    /// When it last read the image record, and how long after that it reads it again.
    image_read_at: Instant,
    read_image_after: Duration,
    /// When it last changed the record, and the job's steps by then.
    shown: Instant,
    steps: u64,
    message: String,
}

impl JobRun {
    /// Watches until there is a reason to stop.
    pub(super) async fn watch(&self, drain: &CancellationToken) -> StepError {
        tokio::select! {
            biased;
            () = drain.cancelled() => StepError::Drained,
            stop = self.poll_loop() => stop,
            stop = self.watch_instance() => stop,
        }
    }

    /// Renews the lease, beside anything that may have to wait for a service. Returns when it is lost.
    pub(super) async fn keep_lease(&self) -> StepError {
        let objects = self.job.context.store.objects().clone();
        let interval = self.job.lease.renewal_interval();
        loop {
            // a failed renewal is retried soon
            let pause = match self.job.lease.renew(objects.as_ref()).await {
                Ok(()) => interval,
                Err(error) if matches!(error.kind(), ErrorKind::NotLocked | ErrorKind::Fenced) => {
                    return StepError::LeaseLost;
                }
                Err(error) => {
                    tracing::warn!(image_id = %self.job.id, %error, "the lease was not renewed; the watcher retries");
                    interval / 2
                }
            };
            sleep(pause).await;
        }
    }

    async fn poll_loop(&self) -> StepError {
        let (image_read_at, shown) = (Instant::now(), Instant::now());
        let message = COPYING.to_owned();
        let mut seen =
            PollState { image_read_at, read_image_after: image_status::SHOWN_AFTER, shown, steps: 0, message };
        loop {
            sleep(WATCH_INTERVAL.min(self.job.lease.renewal_interval())).await;
            match self.poll_once(&mut seen).await {
                Ok(()) => {}
                // a transient error is no reason for the watcher to stop a transfer that goes well
                Err(StepError::Retry(reason) | StepError::PoolClosed(reason)) => {
                    tracing::debug!(image_id = %self.job.id, reason, "a poll of the watcher failed")
                }
                Err(stop) => return stop,
            }
        }
    }

    async fn poll_once(&self, seen: &mut PollState) -> StepResult<()> {
        if self.job.is_uncancellable() {
            return Ok(());
        }
        let Some(now) = self.job.context.store.load(self.job.id).await? else {
            return Err(StepError::Abandon("its record is gone".into()));
        };
        if self.only_goes_forward().await {
            return self.poll_detaching(&now.signals, seen).await;
        }
        if now.signals.has(Signal::Cancel) {
            return end(State::Cancelled, "cancelled by the operator");
        }
        if now.signals.has(Signal::RecheckImage) {
            let image = self.job.read_image().await?;
            self.job.update_with_signals(|_, signals| signals.seen_in(&now.signals, &[Signal::RecheckImage])).await?;
            if self.job.record().await.is_preparing() {
                self.job.check_request(&image).await?;
            }
        }
        if !self.job.record().await.is_preparing() {
            return Ok(());
        }
        let percent = self.note_progress().await?;
        if seen.image_read_at.elapsed() < seen.read_image_after {
            return Ok(());
        }
        (seen.image_read_at, seen.read_image_after) = (Instant::now(), TENANT_INTERVAL);
        let steps = self.job.progress.steps();
        if steps != seen.steps && seen.shown.elapsed() >= HEARTBEAT_INTERVAL && self.has_waiting_service().await {
            seen.message = format!("{COPYING}; {}", self.heartbeat_text());
        }
        let mut tenant = self.shown.lock().await;
        if let Some(image) = tenant.take() {
            let changes = image_status::show(&image, Status::Copying, percent, &seen.message);
            let found = if changes.is_empty() {
                self.job.read_image().await
            } else {
                (seen.shown, seen.steps) = (Instant::now(), steps);
                self.show_status(image.clone(), Status::Copying, percent, &seen.message).await
            };
            match found {
                Ok(found) if found.status == "queued" => {
                    self.job.check_request(&found).await?;
                    *tenant = Some(found);
                }
                Ok(_) => return other_writer(),
                Err(stop @ StepError::Retry(_)) => {
                    *tenant = Some(image);
                    return Err(stop);
                }
                Err(stop) => return Err(stop),
            }
        }
        Ok(())
    }

    /// Shows a status on the image record, and returns the record then. The first status goes onto the record as it is
    /// now: since it was read for the plan, a client may have begun an upload, or a service may have taken its offer
    /// back, and an image that another writer makes must not get properties of ours.
    async fn show_status(&self, image: Image, status: Status, percent: u8, message: &str) -> StepResult<Image> {
        let image = if image_status::shows_running_job(&image) {
            image
        } else {
            let now = self.job.read_image().await?;
            if now.status != "queued" || self.job.is_status_refused() {
                return Ok(now);
            }
            self.job.check_request(&now).await?;
            now
        };
        self.job.patch_status(image, status, percent, message).await
    }

    /// Behind an active image: how far the copy is goes into the record, and the deletion of the image ends the
    /// attempt.
    async fn poll_detaching(&self, signals: &Signals, seen: &mut PollState) -> StepResult<()> {
        self.job.note_filled().await?;
        self.note_progress().await?;
        let told = signals.has(Signal::RecheckImage);
        if told {
            self.job.update_with_signals(|_, now| now.seen_in(signals, &[Signal::RecheckImage])).await?;
        }
        // what is left of a deleted image is being removed already
        if self.is_deletion_noted().await || !told && seen.image_read_at.elapsed() < DELETION_INTERVAL {
            return Ok(());
        }
        seen.image_read_at = Instant::now();
        self.note_deletion().await?;
        if self.is_deletion_noted().await { Err(StepError::Later(Duration::ZERO)) } else { Ok(()) }
    }

    /// Writes the progress into the record when it moved. Returns per cent of the whole job.
    pub(super) async fn note_progress(&self) -> StepResult<u8> {
        let (done, total) = (self.job.progress.done(), self.job.progress.total());
        if total == 0 {
            return Ok(0);
        }
        // the copy is all but the last 5 % of a job
        let percent = u8::try_from(u128::from(done) * 95 / u128::from(total)).unwrap_or(95);
        let record = self.job.record().await;
        let bytes_done = u64::try_from(u128::from(record.bytes_total) * u128::from(done) / u128::from(total))
            .unwrap_or(record.bytes_total);
        if record.progress != percent {
            metrics::gauge!("rbd_offload_last_progress_timestamp_seconds").set(unix_time());
            self.job
                .update(|record| {
                    record.progress = percent;
                    record.bytes_done = bytes_done;
                })
                .await?;
        }
        Ok(percent)
    }

    /// Shows status and message on the record where there is a status already, or a service waits for it. Otherwise
    /// the watcher shows the first one, if the job lasts.
    pub(super) async fn show(&self, image: Image, status: Status, message: &str) -> StepResult<()> {
        self.job.check_cancelled()?;
        let mut shown = self.shown.lock().await;
        let is_awaited = image_status::shows_running_job(&image) || self.job.record().await.handover.is_some();
        let image = if is_awaited { self.show_status(image, status, 0, message).await? } else { image };
        if image.status != "queued" {
            return other_writer();
        }
        *shown = Some(image);
        Ok(())
    }

    /// Replaces what the record shows. A failure is no reason to stop.
    pub(super) async fn show_again(&self, status: Status, message: &str) {
        // the client service reads `publishing` as "prepared"
        if self.job.record().await.handover.is_some() {
            return;
        }
        let Some(image) = self.shown.lock().await.take_if(|image| image_status::shows_running_job(image)) else {
            return;
        };
        if let Err(stop) = self.job.patch_status(image, status, 95, message).await {
            tracing::debug!(image_id = %self.job.id, ?stop, "the status was not shown");
        }
    }
}
