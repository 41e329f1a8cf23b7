//! At once: makes the active image independent of its source. The rest of its data is copied, its parent is cut off,
//! its object maps are switched on, and it is compared with its source.

use async_trait::async_trait;

use super::super::error::{StepError, StepResult};
use super::super::held::HeldJob;
use super::super::record::{Detached, Phase, Record};
use super::compare::{compare, extent};
use super::detaching::{depends_on_source, limits, published, source};
use super::readable::{CopySource, Readable};
use super::{Attempt, Step};
use crate::ceph::{Compare, ErrorKind, ImageSpec};
use crate::publish;
use crate::transfer::Method;

pub struct Detach;

#[async_trait]
impl Step for Detach {
    fn name(&self) -> &'static str {
        "detach"
    }

    fn phase(&self) -> Phase {
        Phase::Detach
    }

    fn is_needed(&self, _attempt: &Attempt, record: &Record) -> bool {
        depends_on_source(record)
    }

    async fn apply(&self, job: &HeldJob, attempt: &mut Attempt) -> StepResult<()> {
        let (storage, record) = (job.context.storage.as_ref(), job.record().await);
        let image = published(&record)?;
        let method = record.method.unwrap_or(Method::Clone);
        // the fill has shown the progress up to the end, where there was one: do not show it a second time
        let unseen = job.progress.steps_only();
        let shown = if method == Method::ServerCopy { &unseen } else { job.progress.as_ref() };
        let reads_from = Dependence::of(job, &record, &image).await?;
        let moved = storage.detach(&image, &limits(job, &attempt.config), shown, &job.cancel).await?;
        metrics::counter!("rbd_offload_copied_bytes_total", "method" => method.as_str()).increment(moved.bytes);
        metrics::counter!("rbd_offload_local_bytes_total", "method" => method.as_str()).increment(moved.through_host);
        if let Some(fault) = publish::detached_fault(storage, &image).await? {
            return Err(StepError::Retry(format!("{image} is not as a published image must be: {fault}")));
        }
        verify(job, attempt, &record, method, reads_from.has_changed(job).await?).await?;
        let detached = Detached { at: job.context.clock.now(), by: job.context.identity.instance };
        job.update(|record| {
            record.detached = Some(detached);
            record.bytes_done = record.bytes_total;
            record.progress = 99;
        })
        .await?;
        if let Some(since) = record.detaching_since {
            let seconds = detached.at.duration_since(since).as_secs_f64();
            metrics::histogram!("rbd_offload_detach_duration_seconds").record(seconds);
            tracing::info!(image_id = %job.id, job_stage = "detach", seconds, bytes = record.bytes_total,
                "the image depends on its source no more");
        }
        Ok(())
    }
}

/// The parents that the image reads from before they are cut off.
///
/// librbd reads the parents of an image when it opens the image. If a snapshot among them is removed during the
/// flatten, librbd may read data that was written later.
struct Dependence {
    source: Option<CopySource>,
    before: Option<Readable>,
}

impl Dependence {
    /// An earlier attempt may have cut the parent off already. Its parents are then not known.
    async fn of(job: &HeldJob, record: &Record, image: &ImageSpec) -> StepResult<Self> {
        let (storage, source) = (job.context.storage.as_ref(), source(record));
        let has_parent = storage.image(image, None).await?.is_some_and(|info| info.parent.is_some());
        let before = match source.as_ref().filter(|_| has_parent) {
            // an error: the source is gone, and was flattened into the image
            Some(source) => source.readable(storage).await.ok(),
            None => None,
        };
        Ok(Self { source, before })
    }

    /// Whether a snapshot was removed meanwhile, or may have been.
    async fn has_changed(&self, job: &HeldJob) -> StepResult<bool> {
        let Some(source) = &self.source else { return Ok(false) };
        let Ok(now) = source.readable(job.context.storage.as_ref()).await else { return Ok(true) };
        Ok(match &self.before {
            Some(before) => *before != now,
            None => source.anchor.is_some() && now.is_cut_off(),
        })
    }
}

/// The image is active, so one that differs can only be named: its source is kept until an operator has looked.
/// `in_full`: every byte is compared, whatever is configured.
async fn verify(job: &HeldJob, attempt: &Attempt, record: &Record, method: Method, in_full: bool) -> StepResult<()> {
    let configured = extent(&attempt.config, record);
    let extent = if in_full { Some(Compare::Full) } else { configured };
    let (Some(from), Some(extent)) = (source(record), extent) else { return Ok(()) };
    let image = published(record)?;
    let offset = match compare(job, &from, &image, extent).await {
        // without an anchor Cinder flattens the image itself, and deletes the snapshot that it was made from
        Err(error) if error.kind() == ErrorKind::NotFound && from.anchor.is_none() => {
            tracing::warn!(image_id = %job.id, job_stage = "verify", %error,
                "the source was deleted: the copy cannot be compared with it");
            return Ok(());
        }
        offset => offset?,
    };
    let Some(offset) = offset else { return Ok(()) };
    metrics::counter!("rbd_offload_verify_failures_total").increment(1);
    tracing::error!(image_id = %job.id, job_stage = "verify", offset, copy = %image, method = method.as_str(),
        "the copy differs from its source");
    job.update(|record| {
        if !record.mismatched.contains(&method) {
            record.mismatched.push(method);
        }
    })
    .await?;
    Err(StepError::Retry(format!(
        "the active image differs from its source at byte {offset}: check the health of the Ceph cluster, and tell the \
         image's owner. The source's snapshot is kept"
    )))
}
