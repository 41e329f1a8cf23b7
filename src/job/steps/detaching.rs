//! What the steps behind an active image have in common: the job's record is all that they go by.

use std::sync::Arc;

use super::super::error::{StepError, StepResult};
use super::super::held::HeldJob;
use super::super::names::{anchor_name, private_name};
use super::super::record::{Artifact, Record, State};
use super::readable::CopySource;
use crate::ceph::{ImageSpec, TransferLimits};
use crate::config::Config;

/// The published image, by its id: it may have another name by now, or lie in the trash.
pub fn published(record: &Record) -> StepResult<ImageSpec> {
    record.published_by_id().ok_or_else(|| StepError::Abandon("its record does not name the published image".into()))
}

/// Whether the image was deleted while it depended on its source.
pub fn is_deleted(record: &Record) -> bool {
    record.outcome.as_ref().is_some_and(|outcome| outcome.state == State::Cancelled)
}

/// Whether there is an image that may depend on its source.
pub fn depends_on_source(record: &Record) -> bool {
    record.detached.is_none() && !is_deleted(record)
}

/// What the image was made from. `None` where a lost record was made again, and the source was not found.
pub fn source(record: &Record) -> Option<CopySource> {
    let source = record.source_image.as_ref()?;
    let anchor = ImageSpec::named(&source.pool, anchor_name(record.image_id));
    Some(CopySource::new(
        ImageSpec::with_id(&source.pool, &source.image_id),
        source.snapshot.clone(),
        record.has(Artifact::Anchor).then(|| (anchor, private_name(record.image_id))),
    ))
}

pub fn limits(job: &HeldJob, config: &Config) -> TransferLimits {
    TransferLimits { concurrency: config.offload.concurrency, rates: Arc::clone(&job.context.rates) }
}
