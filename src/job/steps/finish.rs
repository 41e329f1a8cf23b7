//! The image is active by our location: the ownership tag and what is left of our properties come off. An image that
//! is published at once keeps the tag.

use async_trait::async_trait;

use super::super::error::{StepError, StepResult, end, image_gone};
use super::super::held::{HeldJob, has_running_task};
use super::super::record::{Outcome, Phase, Publish, Record, Registration, State};
use super::{Attempt, Step};
use crate::ceph::ImageSpec;
use crate::openstack::{self, Image};
use crate::publish::image_status;
use crate::request::Trigger;
use crate::transfer;

pub struct Finish;

#[async_trait]
impl Step for Finish {
    fn name(&self) -> &'static str {
        "finish"
    }

    fn phase(&self) -> Phase {
        Phase::Publish
    }

    /// An image whose formats were changed after the inspection is an end without an image.
    async fn apply(&self, job: &HeldJob, attempt: &mut Attempt) -> StepResult<()> {
        let image = attempt.image()?;
        if !image_status::is_raw_and_bare(image) {
            return end(State::Failed, wrong_format(image));
        }
        job.set_uncancellable();
        become_active(job).await?;
        let record = job.record().await;
        let source = record.source.filter(|_| record.trigger == Trigger::Request);
        let leftovers = image_status::finished(image, source);
        if !leftovers.is_empty() {
            // a task that hashes the image writes the record at its end as it was at its beginning
            if !record.needs_repair {
                job.update(|record| record.needs_repair = true).await?;
            }
            match job.change_image(&leftovers).await? {
                Ok(_) => {}
                // the second: protected properties, which stay
                Err(error)
                    if matches!(error.kind(), openstack::ErrorKind::Conflict | openstack::ErrorKind::Forbidden) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Deactivates an image that is active by our location, but under another format than the inspected one, so that no
    /// client reads it as that format. Its data stay: they belong to an image.
    async fn undo(&self, job: &HeldJob, record: &Record, image: Option<&Image>) -> StepResult<()> {
        let Some(image) = image.filter(|image| matches!(image.status.as_str(), "active" | "deactivated")) else {
            return Ok(());
        };
        if image_status::is_raw_and_bare(image) || record.state != State::Publishing || !job.is_our_image(image).await?
        {
            return Ok(());
        }
        let outcome = Outcome::new(State::Failed, wrong_format(image));
        if record.outcome.as_ref() != Some(&outcome) || !record.deactivated {
            job.update(|record| {
                record.outcome = Some(outcome.clone());
                // Glance may save what it read before, long after the end
                (record.deactivated, record.needs_repair) = (true, true);
            })
            .await?;
        }
        if image.status == "active" {
            job.renew_lease().await?;
            if !job.context.cloud.deactivate_image(&job.id.to_string()).await? {
                return image_gone();
            }
            metrics::counter!("rbd_offload_images_deactivated_total").increment(1);
            tracing::error!(image_id = %job.id, job_stage = "register", disk_format = image.disk_format,
                container_format = image.container_format,
                "the image was deactivated: its format was changed while it was published");
        }
        become_active(job).await?;
        // the task that hashes the image makes it active again at its end
        let now = job.read_image().await?;
        if now.status != "deactivated" || (has_running_task(&now) && record.attempts < job.glance_attempts(record)) {
            return Err(StepError::Retry("the image is deactivated; Glance still works on it".into()));
        }
        Ok(())
    }
}

/// The ownership tag of an image that depends on its source stays until it depends on it no more.
async fn become_active(job: &HeldJob) -> StepResult<()> {
    let record = job.record().await;
    let Some(pool) = &record.dest_pool else {
        return Err(StepError::Abandon("its record names no destination pool".into()));
    };
    if record.registration != Registration::Active {
        job.update(|record| record.registration = Registration::Active).await?;
    }
    if record.publish == Publish::AtOnce {
        return Ok(());
    }
    let published = ImageSpec::named(pool, job.id.to_string());
    job.context.storage.remove_metadata(&published, transfer::OWNERSHIP_TAG).await?;
    Ok(())
}

fn wrong_format(image: &Image) -> String {
    let format = |format: &Option<String>| format.clone().unwrap_or_else(|| "unset".into());
    format!(
        "the image became active as {}/{}, not raw/bare: its format was changed after the inspection of its header. It was \
         deactivated; see who changed it, then delete it",
        format(&image.disk_format),
        format(&image.container_format)
    )
}
