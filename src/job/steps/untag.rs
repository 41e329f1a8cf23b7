//! At once: removes the ownership tag and the tag on the image record, when the image depends on nothing any more.
//! Before that, makes the snapshot `snap` again if a failed delete removed it.

use std::time::Duration;

use async_trait::async_trait;
use tokio::time::sleep;

use super::super::error::StepResult;
use super::super::held::HeldJob;
use super::super::record::{Phase, Record};
use super::detaching::{is_deleted, published};
use super::{Attempt, Step};
use crate::ceph::{self, ErrorKind, ImageSpec, Storage};
use crate::openstack;
use crate::publish::{self, image_status};
use crate::transfer;

/// More than a delete takes from the removal of the snapshot until the image is in the trash, where librbd removes it.
const TRASHED_WITHIN: Duration = Duration::from_secs(5);

pub struct Untag;

#[async_trait]
impl Step for Untag {
    fn name(&self) -> &'static str {
        "untag"
    }

    fn phase(&self) -> Phase {
        Phase::Detach
    }

    fn is_needed(&self, _attempt: &Attempt, record: &Record) -> bool {
        !is_deleted(record)
    }

    async fn apply(&self, job: &HeldJob, _attempt: &mut Attempt) -> StepResult<()> {
        let image = published(&job.record().await)?;
        restore_snap(job, &image).await?;
        job.context.storage.remove_metadata(&image, transfer::OWNERSHIP_TAG).await?;
        // the image may be deleted, and its data in the trash
        let found = match job.context.cloud.image(&job.id.to_string()).await {
            Ok(Some(found)) => found,
            Ok(None) => return Ok(()),
            // its owner made it so; the reconciler takes the tag off when it can be read
            Err(error) if error.kind() == openstack::ErrorKind::TooLarge => {
                return job.update(|record| record.needs_repair = true).await;
            }
            Err(error) => return Err(error.into()),
        };
        let Some(change) = image_status::without_copying_tag(&found) else { return Ok(()) };
        // a task that hashes the image writes the record at its end as it was at its beginning
        job.update(|record| record.needs_repair = true).await?;
        match job.change_image(&[change]).await? {
            Ok(_) => Ok(()),
            Err(error) if error.kind() == openstack::ErrorKind::Conflict => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

/// Glance removes the snapshot `snap` of an image, then the image. The second fails while a daemon has the image open
/// to cut off its parent: the image stays active, and no client could clone it without `snap`.
async fn restore_snap(job: &HeldJob, image: &ImageSpec) -> StepResult<()> {
    let storage = job.context.storage.as_ref();
    if !lacks_snap(storage, image).await? {
        return Ok(());
    }
    sleep(TRASHED_WITHIN).await;
    if storage.in_trash(image).await? {
        return Ok(());
    }
    let is_active = match job.context.cloud.image(&job.id.to_string()).await {
        Ok(record) => record.is_some_and(|record| matches!(record.status.as_str(), "active" | "deactivated")),
        // it was published, and Glance knows it
        Err(error) if error.kind() == openstack::ErrorKind::TooLarge => true,
        Err(error) => return Err(error.into()),
    };
    job.before_visible_step().await?;
    if is_active && lacks_snap(storage, image).await? {
        tracing::warn!(image_id = %job.id, job_stage = "untag", %image,
            "made the image's snapshot again: a delete that failed had removed it");
        storage.create_protected_snapshot(image, publish::SNAPSHOT).await?;
    }
    Ok(())
}

/// Whether the image is there without the snapshot that consumers clone from.
async fn lacks_snap(storage: &dyn Storage, image: &ImageSpec) -> ceph::Result<bool> {
    match storage.image(image, Some(publish::SNAPSHOT)).await {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(true),
        found => found.map(|_| false),
    }
}
