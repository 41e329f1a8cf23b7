//! At once: the private copy as a clone that has no data of its own yet. It is what is published.

use async_trait::async_trait;

use super::super::error::{StepError, StepResult};
use super::super::held::HeldJob;
use super::super::record::{Artifact, CloneImage, Phase, Record};
use super::free_name::{check_free, in_the_way};
use super::{Attempt, Step};
use crate::ceph::{ErrorKind, Features, ImageSpec};
use crate::openstack::Image;
use crate::transfer;

pub struct CloneStep;

#[async_trait]
impl Step for CloneStep {
    fn name(&self) -> &'static str {
        "clone"
    }

    fn phase(&self) -> Phase {
        Phase::Prepare
    }

    fn makes(&self) -> Option<Artifact> {
        Some(Artifact::Copy)
    }

    fn is_visible(&self) -> bool {
        true
    }

    async fn check(&self, job: &HeldJob, attempt: &Attempt) -> StepResult<()> {
        check_free(job, &attempt.copying()?.copy).await
    }

    async fn apply(&self, job: &HeldJob, attempt: &mut Attempt) -> StepResult<()> {
        let copying = attempt.copying()?;
        let (storage, copy) = (job.context.storage.as_ref(), &copying.copy);
        job.will_make(Artifact::Copy).await?;
        let request = copying.request(job.tag().await);
        // a client that opens the image before its objects are there must find no object map
        match transfer::clone_tagged(storage, &request, Features::WITHOUT_MAPS).await {
            Ok(()) => {}
            Err(error) if transfer::is_for_another_method(&error) => {
                return Err(StepError::WhenCopied(format!("the source cannot be cloned: {error}")));
            }
            Err(error) if error.kind() == ErrorKind::Exists => {
                job.disown(Artifact::Copy).await?;
                return in_the_way(copy);
            }
            Err(error) => return Err(error.into()),
        }
        let Some(info) = storage.image(copy, None).await? else {
            return Err(StepError::Retry(format!("{copy} is gone right after it was made")));
        };
        let clone = CloneImage::of(info);
        job.update(|record| record.clone = Some(clone.clone())).await?;
        job.check_cancelled()
    }

    async fn undo(&self, job: &HeldJob, record: &Record, _image: Option<&Image>) -> StepResult<()> {
        if let Some(pool) = record.dest_pool.as_ref().filter(|_| record.has(Artifact::Copy)) {
            job.context.storage.remove_image(&ImageSpec::named(pool, record.private_name())).await?;
        }
        Ok(())
    }
}
