//! Compares a copy with what it was made from.

use super::super::held::HeldJob;
use super::super::record::Record;
use super::readable::{CHAIN_TRIES, CopySource, chain_changes};
use crate::ceph::{self, Compare, ImageSpec};
use crate::config::{Config, Verify};

/// How much is compared. After a copy that differed, every byte is.
pub fn extent(config: &Config, record: &Record) -> Option<Compare> {
    match config.offload.verify {
        _ if !record.mismatched.is_empty() => Some(Compare::Full),
        Verify::None => None,
        Verify::Sample => Some(Compare::Sample),
        Verify::Full => Some(Compare::Full),
    }
}

/// Compares, and again where something that the source reads from was cut off meanwhile.
pub async fn compare(job: &HeldJob, from: &CopySource, copy: &ImageSpec, extent: Compare) -> ceph::Result<Option<u64>> {
    let storage = job.context.storage.as_ref();
    for _ in 0..CHAIN_TRIES {
        let before = from.readable(storage).await?;
        let (source, snapshot) = (&before.source, &before.snapshot);
        let result = storage.compare(source, snapshot, copy, extent, &job.progress, &job.cancel).await;
        if from.is_unchanged(storage, &before, &result).await? {
            return result;
        }
    }
    Err(chain_changes(copy))
}
