//! The copy takes the image's id as its name, which fails when another writer was faster.

use async_trait::async_trait;

use super::super::error::{StepError, StepResult, decline, other_writer};
use super::super::held::{HeldJob, has_running_task};
use super::super::record::{Artifact, Phase, Record};
use super::{Attempt, Step};
use crate::ceph::ImageSpec;
use crate::decline::Decline;
use crate::openstack::Image;
use crate::publish::{self, RenameOutcome};

pub struct Rename;

#[async_trait]
impl Step for Rename {
    fn name(&self) -> &'static str {
        "rename"
    }

    fn phase(&self) -> Phase {
        Phase::Publish
    }

    fn makes(&self) -> Option<Artifact> {
        Some(Artifact::Published)
    }

    fn is_needed(&self, attempt: &Attempt, _record: &Record) -> bool {
        !attempt.is_active()
    }

    async fn check(&self, job: &HeldJob, attempt: &Attempt) -> StepResult<()> {
        let published = ImageSpec::named(&attempt.copying()?.plan.dest_pool, job.id.to_string());
        if job.context.storage.image(&published, None).await?.is_some() {
            return decline(
                Decline::OtherWriter,
                "another image of that id is in Glance's pool already: another client writes it",
            );
        }
        Ok(())
    }

    async fn apply(&self, job: &HeldJob, attempt: &mut Attempt) -> StepResult<()> {
        let image = attempt.image()?;
        if image.status == "queued" && !has_running_task(image) {
            job.check_request(image).await?;
        }
        let record = job.record().await;
        let Some(pool) = &record.dest_pool else {
            return Err(StepError::Abandon("its record names no destination pool".into()));
        };
        let copy = ImageSpec::named(pool, record.private_name());
        job.before_visible_step().await?;
        job.will_make(Artifact::Published).await?;
        match publish::rename_to_final(job.context.storage.as_ref(), &copy, &job.tag().await).await? {
            RenameOutcome::Renamed => Ok(()),
            RenameOutcome::Taken => {
                job.disown(Artifact::Published).await?;
                other_writer()
            }
            RenameOutcome::Missing => {
                job.begin_again().await?;
                Err(StepError::Retry("the copy is gone, it is made again".into()))
            }
        }
    }

    async fn undo(&self, job: &HeldJob, record: &Record, _image: Option<&Image>) -> StepResult<()> {
        if let Some(pool) = record.dest_pool.as_ref().filter(|_| record.has(Artifact::Published)) {
            publish::unpublish(job.context.storage.as_ref(), pool, &job.tag().await).await?;
        }
        Ok(())
    }
}
