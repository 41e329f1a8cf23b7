//! At once: removes the objects that the fill wrote after the image was deleted. Neither Glance nor Ceph does.

use async_trait::async_trait;

use super::super::error::StepResult;
use super::super::held::HeldJob;
use super::super::record::{Phase, Record};
use super::detaching::{is_deleted, limits, published};
use super::{Attempt, Step};

pub struct Sweep;

#[async_trait]
impl Step for Sweep {
    fn name(&self) -> &'static str {
        "sweep"
    }

    fn phase(&self) -> Phase {
        Phase::Detach
    }

    fn is_needed(&self, _attempt: &Attempt, record: &Record) -> bool {
        is_deleted(record)
    }

    async fn apply(&self, job: &HeldJob, attempt: &mut Attempt) -> StepResult<()> {
        let record = job.record().await;
        let (image, Some(clone)) = (published(&record)?, &record.clone) else { return Ok(()) };
        let limits = limits(job, &attempt.config);
        let (objects, data_pool) = (clone.objects, clone.data_pool.as_deref());
        let storage = job.context.storage.as_ref();
        let swept = storage.sweep_objects(&image, objects, data_pool, &limits, &job.progress, &job.cancel).await?;
        if swept > 0 {
            tracing::info!(image_id = %job.id, job_stage = "sweep", objects = swept,
                "removed the objects of an image that was deleted during its copy");
        }
        Ok(())
    }
}
