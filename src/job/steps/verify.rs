//! Compares the copy with its source. One that differs is never published.

use async_trait::async_trait;

use super::super::error::{StepError, StepResult, end};
use super::super::held::HeldJob;
use super::super::record::{Phase, Record, State};
use super::compare::{compare, extent};
use super::{Attempt, Step};
use crate::ceph::Compare;

pub struct Verify;

#[async_trait]
impl Step for Verify {
    fn name(&self) -> &'static str {
        "verify"
    }

    fn phase(&self) -> Phase {
        Phase::Prepare
    }

    fn depends_on_method(&self) -> bool {
        true
    }

    fn is_needed(&self, attempt: &Attempt, record: &Record) -> bool {
        extent(&attempt.config, record).is_some()
    }

    async fn apply(&self, job: &HeldJob, attempt: &mut Attempt) -> StepResult<()> {
        let (copying, before) = (attempt.copying()?, job.record().await);
        let extent = extent(&attempt.config, &before).unwrap_or(Compare::Full);
        let Some(offset) = compare(job, &copying.source, &copying.copy, extent).await? else { return Ok(()) };
        let Some(method) = before.method else {
            return Err(StepError::Abandon("its record names no method".into()));
        };
        metrics::counter!("rbd_offload_verify_failures_total").increment(1);
        tracing::error!(image_id = %job.id, job_stage = "verify", offset, copy = %copying.copy,
            method = method.as_str(), "the copy differs from its source");
        // before the copy is removed: another daemon that takes over must not trust this method either
        job.update(|record| {
            if !record.mismatched.contains(&method) {
                record.mismatched.push(method);
            }
            record.note_fallback(&format!("{method}: its copy differed from the source at byte {offset}"));
        })
        .await?;
        if let Some(first) = before.mismatched.first() {
            let reason = format!(
                "two copies differed from their source, by {first} and by {method} (at byte {offset}), and were \
                 removed: check the health of the Ceph cluster (ceph health detail, a deep scrub of both pools) and \
                 report this before you retry"
            );
            return end(State::Failed, reason);
        }
        Err(StepError::NextMethod(None))
    }
}
