//! At once: the image depends on nothing of the job any more, and nothing says that it does: its ownership tag and the
//! tag on the image record come off.

use async_trait::async_trait;

use super::super::error::StepResult;
use super::super::held::HeldJob;
use super::super::record::{Phase, Record};
use super::detaching::{is_deleted, published};
use super::{Attempt, Step};
use crate::openstack;
use crate::publish::image_status;
use crate::transfer;

pub struct Unmark;

#[async_trait]
impl Step for Unmark {
    fn name(&self) -> &'static str {
        "unmark"
    }

    fn phase(&self) -> Phase {
        Phase::Detach
    }

    fn is_needed(&self, _attempt: &Attempt, record: &Record) -> bool {
        !is_deleted(record)
    }

    async fn apply(&self, job: &HeldJob, _attempt: &mut Attempt) -> StepResult<()> {
        let image = published(&job.record().await)?;
        job.context.storage.remove_metadata(&image, transfer::MARK).await?;
        // the image may be deleted, and its data in the trash
        let Some(found) = job.context.cloud.image(&job.id.to_string()).await? else { return Ok(()) };
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
