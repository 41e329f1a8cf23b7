//! The watcher of an instance whose disk is being copied. Nova removes the disk with the instance: it tries for a minute
//! (twelve times, five seconds apart), in vain while there is a snapshot of ours, and then gives up for good. Volumes need
//! no such care, since Cinder moves theirs to the trash.

use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::time::sleep;

use super::{Job, Stop};
use crate::decline::Decline;
use crate::job::record::{Ending, State};
use crate::request::Source;

/// How often Nova is asked. The snapshot is gone well before Nova's second try.
const SERVER_INTERVAL: Duration = Duration::from_secs(3);

impl Job {
    /// Returns when the instance whose disk is being copied is deleted. A copy that is sealed needs its source no longer.
    pub(super) async fn keep_source(&self) -> Stop {
        loop {
            sleep(SERVER_INTERVAL).await;
            let Some(instance) = self.instance_in_use().await else { continue };
            let going = match self.context.cloud.server(&instance.id().to_string()).await {
                Ok(server) => server.is_none_or(|server| server.is_going()),
                Err(error) => {
                    tracing::debug!(image_id = %self.id, %error, "the watcher could not ask for the instance");
                    false
                }
            };
            // the copy may have been sealed while Nova answered
            if going && self.instance_in_use().await.is_some() {
                let reason = format!("{instance} was deleted while its disk was being copied");
                return Stop::End(Ending::declined(Decline::Busy, reason));
            }
        }
    }

    /// The instance whose disk the transfer reads.
    async fn instance_in_use(&self) -> Option<Source> {
        let record = self.snapshot().await;
        let copying = record.state == State::Copying && !self.finishing.load(Ordering::SeqCst);
        record.source.filter(|source| copying && matches!(source, Source::Instance(_)))
    }
}
