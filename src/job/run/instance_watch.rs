//! The watcher of an instance whose disk is being copied.
//!
//! When Nova deletes, rebuilds or offloads an instance, it removes the disk. It tries for a minute (twelve times, five
//! seconds apart), in vain while our snapshot is on the disk, and then goes on without a word: the disk of a deleted
//! instance stays behind, and a rebuilt instance boots its old disk as the new image. So the copy ends as soon as Nova
//! begins, and the snapshot goes before the minute is over. A removal that our snapshot hinders takes Nova that minute,
//! so none begins and ends between two polls. Volumes need no such care: Cinder moves theirs to the trash.
//!
//! The time budget, in seconds: 3 until the next poll, 10 at most for Nova's answer, and the rest for ending
//! the transfer and for removing the snapshot. An unfinished clone of the snapshot goes before it.

use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};

use super::{JobRun, StepError};
use crate::decline::Decline;
use crate::job::record::{Outcome, State};
use crate::openstack::DiskChange;
use crate::request::Source;

/// How often Nova is asked. The snapshot is gone well before Nova's last try.
const SERVER_INTERVAL: Duration = Duration::from_secs(3);

/// How long one answer of Nova may take.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);

/// How long the copy goes on while Nova does not tell how the instance is. In all that time Nova may be at work on the
/// instance, so this and the removal of the snapshot must take less than Nova's minute.
const UNKNOWN_MAX: Duration = Duration::from_secs(25);

impl JobRun {
    /// Returns when Nova may be about to remove or replace the disk that is being copied. A copy that is sealed needs
    /// its source no longer.
    pub(super) async fn watch_instance(&self) -> StepError {
        let mut known = Instant::now();
        loop {
            sleep(SERVER_INTERVAL).await;
            let Some(instance) = self.instance_in_use().await else {
                known = Instant::now();
                continue;
            };
            let asked = Instant::now();
            let change = match self.change_of(&instance).await {
                Ok(change) => {
                    known = asked;
                    change
                }
                Err(reason) => {
                    tracing::debug!(image_id = %self.job.id, reason, "Nova did not tell how the instance is");
                    if known.elapsed() >= UNKNOWN_MAX && self.instance_in_use().await.is_some() {
                        return StepError::Retry(format!("Nova does not tell how {instance} is: {reason}"));
                    }
                    continue;
                }
            };
            // the copy may have been sealed while Nova answered
            if let Some(change) = change
                && self.instance_in_use().await.is_some()
            {
                let reason = format!("{instance} was {} while its disk was being copied", change.as_str());
                return StepError::End(Outcome::declined(Decline::Busy, reason));
            }
        }
    }

    /// What Nova does to the instance's disk; an error says why that is not known.
    async fn change_of(&self, instance: &Source) -> Result<Option<DiskChange>, String> {
        let id = instance.id().to_string();
        match timeout(ANSWER_WITHIN, self.job.context.cloud.server(&id)).await {
            Ok(Ok(Some(server))) if server.is_in_unreachable_cell() => Err("its cell does not answer".into()),
            Ok(Ok(Some(server))) => Ok(server.disk_change()),
            Ok(Ok(None)) => Ok(Some(DiskChange::Deleted)),
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err(format!("no answer within {} s", ANSWER_WITHIN.as_secs())),
        }
    }

    /// The instance whose disk the transfer reads.
    async fn instance_in_use(&self) -> Option<Source> {
        let record = self.job.record().await;
        let copying = record.state == State::Copying && !self.job.is_uncancellable();
        record.source.filter(|source| copying && matches!(source, Source::Instance(_)))
    }
}
