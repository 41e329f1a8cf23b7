//! What runs beside a job: the renewal of its lease, and the watcher, which shows progress, hears of a cancellation or another writer.

use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use super::{Job, Step, Stop, end, other_writer};
use crate::ceph::ErrorKind;
use crate::job::record::State;
use crate::publish::record::{self as image_record, Status};
use crate::telemetry::unix_time;

/// How often the watcher looks at the record and shows progress.
const WATCH_INTERVAL: Duration = Duration::from_secs(2);

/// How often the tenant's record is read or changed while the copy runs.
const TENANT_INTERVAL: Duration = Duration::from_secs(4);

/// How often a service that waits is shown that the copy moves, where a per cent takes longer.
const SIGN_INTERVAL: Duration = Duration::from_secs(10);

const COPYING: &str = "the disk is being copied inside the storage cluster";

/// What the watcher has seen and shown.
struct Seen {
    /// When it last looked at the tenant's record.
    looked: Instant,
    /// When it last changed the record, and the job's steps by then.
    shown: Instant,
    steps: u64,
    message: String,
}

impl Job {
    /// Looks around until there is a reason to stop.
    pub(super) async fn watch(&self, drain: &CancellationToken) -> Stop {
        tokio::select! {
            biased;
            () = drain.cancelled() => Stop::Drained,
            stop = self.keep_looking() => stop,
            stop = self.keep_source() => stop,
        }
    }

    /// Renews the lease, beside anything that may have to wait for a service. Returns when it is lost.
    pub(super) async fn keep_lease(&self) -> Stop {
        let objects = self.context.store.objects().clone();
        let interval = self.lease.renewal_interval();
        loop {
            // a renewal that failed is tried again soon
            let pause = match self.lease.renew(objects.as_ref()).await {
                Ok(()) => interval,
                Err(error) if matches!(error.kind(), ErrorKind::NotLocked | ErrorKind::Fenced) => {
                    return Stop::LeaseLost;
                }
                Err(error) => {
                    tracing::warn!(image_id = %self.id, %error, "the lease was not renewed; tried again");
                    interval / 2
                }
            };
            sleep(pause).await;
        }
    }

    async fn keep_looking(&self) -> Stop {
        let (looked, shown) = (Instant::now(), Instant::now());
        let mut seen = Seen { looked, shown, steps: 0, message: COPYING.to_owned() };
        loop {
            sleep(WATCH_INTERVAL.min(self.lease.renewal_interval())).await;
            match self.look_around(&mut seen).await {
                Ok(()) => {}
                // what may pass is no reason for the watcher to stop a transfer that goes well
                Err(Stop::Retry(reason)) => tracing::debug!(image_id = %self.id, reason, "the watcher could not look"),
                Err(stop) => return stop,
            }
        }
    }

    async fn look_around(&self, seen: &mut Seen) -> Step<()> {
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
            let image = self.read_image().await?;
            self.update(|record| record.check = false).await?;
            if self.snapshot().await.state == State::Copying {
                self.check_request(&image).await?;
            }
        }
        if self.snapshot().await.state != State::Copying {
            return Ok(());
        }
        let percent = self.note_progress().await?;
        if seen.looked.elapsed() < TENANT_INTERVAL {
            return Ok(());
        }
        seen.looked = Instant::now();
        let steps = self.progress.steps();
        if steps != seen.steps && seen.shown.elapsed() >= SIGN_INTERVAL && self.is_waited_for().await {
            seen.message = format!("{COPYING}; {}", self.at_work());
        }
        let mut tenant = self.tenant.lock().await;
        if let Some(image) = tenant.take() {
            let changes = image_record::show(&image, Status::Copying, percent, &seen.message);
            let found = if changes.is_empty() {
                self.read_image().await
            } else {
                (seen.shown, seen.steps) = (Instant::now(), steps);
                self.patch_status(image.clone(), Status::Copying, percent, &seen.message).await
            };
            match found {
                Ok(found) if found.status == "queued" => {
                    self.check_request(&found).await?;
                    *tenant = Some(found);
                }
                Ok(_) => return other_writer(),
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
    pub(super) async fn note_progress(&self) -> Step<u8> {
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
            metrics::gauge!("rbd_offload_last_progress_timestamp_seconds").set(unix_time());
            self.update(|record| {
                record.progress = percent;
                record.bytes_done = bytes_done;
            })
            .await?;
        }
        Ok(percent)
    }
}
