//! Removes the source volume from the RBD trash, where Cinder has deleted it while the temporary snapshot was on it.

use std::time::Duration;

use async_trait::async_trait;
use tokio::time::{Instant, sleep};

use super::super::error::{StepError, StepResult};
use super::super::held::HeldJob;
use super::super::record::Phase;
use super::{Attempt, Step};
use crate::ceph::{Changed, ImageSpec};
use crate::openstack::VolumeDeletion;
use crate::request::Source;

/// How long Cinder usually takes to delete a volume once its disk is in the trash, and the pause between polls.
const DELETED_WITHIN: Duration = Duration::from_secs(5);
const DELETING_INTERVAL: Duration = Duration::from_millis(500);

pub struct Purge;

#[async_trait]
impl Step for Purge {
    fn name(&self) -> &'static str {
        "purge"
    }

    fn phase(&self) -> Phase {
        Phase::Publish
    }

    fn needs_free_source(&self) -> bool {
        true
    }

    /// Cinder moves a volume that it deletes to the trash when a snapshot of ours is in its way, and leaves it there.
    /// Once the snapshot is gone and Cinder has no such volume, it is removed; not before the end of a deferment that
    /// Cinder gave it, and not while another snapshot needs it.
    async fn apply(&self, job: &HeldJob, _attempt: &mut Attempt) -> StepResult<()> {
        let record = job.record().await;
        let (Some(Source::Volume(id)), Some(disk)) = (record.source, &record.source_image) else { return Ok(()) };
        let storage = job.context.storage.as_ref();
        let source = ImageSpec::with_id(&disk.pool, &disk.image_id);
        if !disk.temporary || !storage.in_trash(&source).await? {
            return Ok(());
        }
        let started = Instant::now();
        loop {
            let volume = job.context.cloud.volume(&id.to_string()).await?;
            match VolumeDeletion::of(volume.as_ref()) {
                VolumeDeletion::Done => break,
                // between the move to the trash and the end of the volume
                VolumeDeletion::UnderWay if started.elapsed() < DELETED_WITHIN => sleep(DELETING_INTERVAL).await,
                VolumeDeletion::UnderWay if record.attempts < job.service_attempts() => {
                    return Err(StepError::Retry(format!("Cinder is still deleting volume {id}")));
                }
                VolumeDeletion::UnderWay | VolumeDeletion::No => {
                    let status = volume.map(|volume| volume.status);
                    tracing::warn!(image_id = %job.id, volume = %id, status, source = %source,
                        "the volume's disk stays in the trash: Cinder still has the volume");
                    return Ok(());
                }
            }
        }
        job.before_visible_step().await?;
        if storage.purge(&source).await? == Changed::Yes {
            tracing::info!(image_id = %job.id, volume = %id, source = %source,
                "removed the deleted volume's disk from the trash");
        }
        Ok(())
    }
}
