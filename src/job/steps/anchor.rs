//! The anchor: a clone of the source's snapshot in the source's pool, and the only child that Cinder ever sees
//! (`docs/explanation/jobs.md`). A copy that clones nothing needs it only to keep a snapshot of Cinder's.

use async_trait::async_trait;

use super::super::error::{StepError, StepResult};
use super::super::held::HeldJob;
use super::super::names::{anchor_name, private_name};
use super::super::record::{Artifact, Phase, Publish, Record};
use super::free_name::{check_free, in_the_way};
use super::{Attempt, Copying, Step};
use crate::ceph::{ErrorKind, ImageSpec};
use crate::openstack::Image;
use crate::transfer::{self, Method};

pub struct Anchor;

#[async_trait]
impl Step for Anchor {
    fn name(&self) -> &'static str {
        "anchor"
    }

    fn phase(&self) -> Phase {
        Phase::Prepare
    }

    fn makes(&self) -> Option<Artifact> {
        Some(Artifact::Anchor)
    }

    fn is_visible(&self) -> bool {
        true
    }

    fn holds_source(&self) -> bool {
        true
    }

    fn is_needed(&self, attempt: &Attempt, record: &Record) -> bool {
        let Some(Copying { plan, methods, .. }) = &attempt.copying else { return false };
        let is_needed = match methods.front() {
            _ if record.publish == Publish::AtOnce => true,
            Some(Method::Clone) => true,
            // Cinder can delete a snapshot of its own that has no clone. The job's snapshot keeps a volume's data.
            Some(Method::ServerCopy) => plan.snapshot.is_some(),
            Some(Method::Copy) | None => false,
        };
        is_needed && plan.anchor
    }

    async fn check(&self, job: &HeldJob, attempt: &Attempt) -> StepResult<()> {
        let pool = &attempt.copying()?.plan.origin.pool;
        check_free(job, &ImageSpec::named(pool, anchor_name(job.id))).await
    }

    async fn apply(&self, job: &HeldJob, attempt: &mut Attempt) -> StepResult<()> {
        let source = &mut attempt.copying_mut()?.source;
        let storage = job.context.storage.as_ref();
        let (anchor, snapshot) = (ImageSpec::named(&source.source.pool, anchor_name(job.id)), private_name(job.id));
        let metadata = [(transfer::OWNERSHIP_TAG.to_owned(), job.tag().await.to_string())];
        if !job.record().await.has(Artifact::Anchor) {
            // the method before may not have needed it, so that nothing has looked yet
            check_free(job, &anchor).await?;
        }
        job.will_make(Artifact::Anchor).await?;
        match storage.make_anchor(&source.source, &source.snapshot, &anchor, &snapshot, &metadata).await {
            Ok(()) => {
                source.anchor = Some((anchor, snapshot));
                Ok(())
            }
            Err(error) if transfer::is_for_another_method(&error) => {
                // what there is of it would be in the way of the next method
                storage.remove_image(&anchor).await?;
                match job.record().await.publish {
                    Publish::AtOnce => Err(StepError::WhenCopied(format!("the source cannot be cloned: {error}"))),
                    Publish::WhenCopied => Err(StepError::NextMethod(Some(error))),
                }
            }
            Err(error) if error.kind() == ErrorKind::Exists => {
                job.disown(Artifact::Anchor).await?;
                in_the_way(&anchor)
            }
            Err(error) => Err(error.into()),
        }
    }

    async fn undo(&self, job: &HeldJob, record: &Record, _image: Option<&Image>) -> StepResult<()> {
        if let Some(source) = record.source_image.as_ref().filter(|_| record.has(Artifact::Anchor)) {
            job.context.storage.remove_image(&ImageSpec::named(&source.pool, anchor_name(job.id))).await?;
        }
        Ok(())
    }
}
