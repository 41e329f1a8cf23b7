//! At once: the OSDs copy what the active image still reads from its source into it.

use std::sync::PoisonError;

use async_trait::async_trait;

use super::super::error::StepResult;
use super::super::held::HeldJob;
use super::super::record::{Phase, Record};
use super::detaching::{depends_on_source, limits, published};
use super::{Attempt, Step};
use crate::ceph::FillState;
use crate::transfer::{self, Method};

pub struct Fill;

#[async_trait]
impl Step for Fill {
    fn name(&self) -> &'static str {
        "fill"
    }

    fn phase(&self) -> Phase {
        Phase::Detach
    }

    fn is_needed(&self, _attempt: &Attempt, record: &Record) -> bool {
        depends_on_source(record) && record.method == Some(Method::ServerCopy)
    }

    /// Goes on where an attempt before this one stopped. The watcher writes down how far it got.
    async fn apply(&self, job: &HeldJob, attempt: &mut Attempt) -> StepResult<()> {
        let record = job.record().await;
        let image = published(&record)?;
        let saved = |state: FillState| {
            *job.filled.lock().unwrap_or_else(PoisonError::into_inner) = Some(state);
        };
        let limits = limits(job, &attempt.config);
        let fill = job.context.storage.fill_published(&image, record.fill, &limits, &job.progress, &job.cancel, &saved);
        let method = Method::ServerCopy.as_str();
        match fill.await {
            Ok(moved) => {
                metrics::counter!("rbd_offload_copied_bytes_total", "method" => method).increment(moved.bytes);
                metrics::counter!("rbd_offload_local_bytes_total", "method" => method).increment(moved.through_host);
                job.note_filled().await
            }
            Err(error) if transfer::is_for_another_method(&error) => {
                tracing::warn!(image_id = %job.id, job_stage = "fill", %error,
                    "the OSDs cannot copy this source; this host does it by a flatten");
                let note = format!("{method}: {error}");
                job.update(|record| {
                    record.note_fallback(&note);
                    record.method = Some(Method::Clone);
                })
                .await
            }
            Err(error) => {
                // what was copied is not copied again
                job.note_filled().await?;
                Err(error.into())
            }
        }
    }
}
