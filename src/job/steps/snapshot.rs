//! The temporary snapshot of the source. A Cinder snapshot as a source needs none.

use async_trait::async_trait;

use super::super::error::{StepError, StepResult, end};
use super::super::held::HeldJob;
use super::super::names::private_name;
use super::super::record::{Artifact, Outcome, Phase, Record, State};
use super::{Attempt, Step};
use crate::ceph::{self, ErrorKind, Features, ImageSpec};
use crate::decline::Decline;
use crate::openstack::Image;
use crate::plan::{self, Plan};
use crate::publish::image_status::Status;

pub struct Snapshot;

#[async_trait]
impl Step for Snapshot {
    fn name(&self) -> &'static str {
        "snapshot"
    }

    fn phase(&self) -> Phase {
        Phase::Prepare
    }

    fn makes(&self) -> Option<Artifact> {
        Some(Artifact::Snapshot)
    }

    fn holds_source(&self) -> bool {
        true
    }

    fn status(&self) -> Option<(Status, &'static str)> {
        Some((Status::Copying, "the disk is being copied inside the storage cluster"))
    }

    async fn check(&self, job: &HeldJob, attempt: &Attempt) -> StepResult<()> {
        let (plan, name) = (&attempt.copying()?.plan, private_name(job.id));
        if plan.snapshot.is_none() && plan.info.snapshots.iter().any(|snapshot| snapshot.name == name) {
            let reason = format!(
                "the snapshot {}@{name} is in the way and is not this job's: remove it, then retry",
                plan.origin
            );
            return end(State::Failed, reason);
        }
        Ok(())
    }

    async fn apply(&self, job: &HeldJob, attempt: &mut Attempt) -> StepResult<()> {
        let copying = attempt.copying()?;
        let storage = job.context.storage.as_ref();
        if copying.plan.snapshot.is_none() {
            let (image, snapshot) = (&copying.source.source, &copying.source.snapshot);
            job.will_make(Artifact::Snapshot).await?;
            job.before_visible_step().await?;
            let tag = job.tag().await.to_string();
            let refused = |error| refused_by_source(error, &copying.plan);
            storage.set_snapshot_tag(image, snapshot, &tag).await.map_err(refused)?;
            storage.create_protected_snapshot(image, snapshot).await.map_err(refused)?;
        }
        // what was read for the plan may be minutes old, and another project may own the source by now
        let trigger = job.record().await.trigger;
        Ok(plan::confirm(job.context.cloud.as_ref(), &attempt.config, trigger, &copying.plan).await?)
    }

    async fn undo(&self, job: &HeldJob, record: &Record, _image: Option<&Image>) -> StepResult<()> {
        let Some(source) = record.source_image.as_ref().filter(|_| record.has(Artifact::Snapshot)) else {
            return Ok(());
        };
        let image = ImageSpec::with_id(&source.pool, &source.image_id);
        job.context.storage.remove_snapshot(&image, &source.snapshot).await?;
        job.context.storage.remove_snapshot_tag(&image, &source.snapshot).await?;
        Ok(())
    }
}

/// What the source's own state rules out is a decline: another attempt meets the same.
fn refused_by_source(error: ceph::Error, plan: &Plan) -> StepError {
    let declined = |why, reason| StepError::End(Outcome::declined(why, reason));
    match error.kind() {
        ErrorKind::SnapshotLimit => declined(
            Decline::Quota,
            format!(
                "no snapshot of {} can be made in Ceph: it has as many as its limit allows, or the quota of its pool \
                 is reached",
                plan.source
            ),
        ),
        // otherwise its exclusive lock may be free in a while
        ErrorKind::ReadOnly if plan.info.features.has(Features::JOURNALING) => {
            declined(Decline::OtherCluster, plan::not_primary(plan.source))
        }
        _ => error.into(),
    }
}
