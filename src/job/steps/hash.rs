//! The SHA-512 of the copy, where `[offload] hash` asks for it.

use async_trait::async_trait;

use super::super::error::StepResult;
use super::super::held::HeldJob;
use super::super::record::{Phase, Record};
use super::{Attempt, Step};
use crate::config;
use crate::publish;

pub struct Hash;

#[async_trait]
impl Step for Hash {
    fn name(&self) -> &'static str {
        "hash"
    }

    fn phase(&self) -> Phase {
        Phase::Prepare
    }

    fn is_needed(&self, attempt: &Attempt, _record: &Record) -> bool {
        attempt.config.offload.hash == config::Hash::Sha512
    }

    async fn apply(&self, job: &HeldJob, attempt: &mut Attempt) -> StepResult<()> {
        let copying = attempt.copying()?;
        let storage = job.context.storage.as_ref();
        let hash = publish::sha512(storage, &copying.copy, copying.plan.info.size, &job.progress, &job.cancel).await?;
        job.update(|record| record.publication.sha512 = Some(hash.clone())).await
    }
}
