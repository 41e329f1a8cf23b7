//! The intake: turns what a notification says into a stored job, after which the delivery may be acked.

use std::sync::Arc;

use async_trait::async_trait;
use uuid::Uuid;

use super::engine::Engine;
use super::store::{Error, NewJob, Result, Submitted};
use crate::notification::{Event, Meta, Sink, SinkError};
use crate::request::{self, Asked, Trigger};

/// Takes requests for an engine.
#[derive(Clone)]
pub struct Intake {
    engine: Arc<Engine>,
}

impl Intake {
    pub fn new(engine: Arc<Engine>) -> Self {
        Self { engine }
    }

    /// An image record is queued and bears these tags. Once this returned, what they ask for is stored.
    pub async fn image_queued(&self, image_id: Uuid, owner: Option<String>, tags: &[String]) -> Result<()> {
        let source = match request::asked_by(tags) {
            Asked::Nothing => return Ok(()),
            Asked::For(source) => Some(source),
            // the plan reads the tags again, and tells the tenant
            Asked::Unclear(_) => None,
        };
        let new = NewJob { image_id, trigger: Trigger::Request, source, project_id: owner };
        let submitted = self.engine.context().store.submit(&new).await?;
        match submitted {
            Submitted::Created => {
                tracing::info!(%image_id, job_stage = "accepted", source = source.map(|s| s.to_string()), "request stored");
                metrics::counter!("rbd_offload_jobs_accepted_total", "trigger" => "request").increment(1);
            }
            Submitted::AskedAgain => tracing::info!(%image_id, "the image was heard of again; looked at anew"),
            Submitted::Running => return Ok(()),
        }
        self.engine.wake(image_id);
        Ok(())
    }

    /// An image was deleted, says a notification. A live job of it asks Glance and ends if that is so.
    pub async fn image_deleted(&self, image_id: Uuid) -> Result<()> {
        let store = &self.engine.context().store;
        let mut live = false;
        let changed = store
            .change(image_id, |record| {
                live = !record.is_settled();
                record.not_before = None;
                live && !std::mem::replace(&mut record.check, true)
            })
            .await?;
        if let (true, Some(record)) = (live, changed) {
            store.index(&record).await?;
            self.engine.wake(image_id);
        }
        Ok(())
    }
}

#[async_trait]
impl Sink for Intake {
    async fn accept(&self, event: Event, meta: Meta) -> std::result::Result<(), SinkError> {
        let stored = match event {
            Event::ImageChanged { image_id, owner, tags, .. } => self.image_queued(image_id, owner, &tags).await,
            Event::ImageDeleted { image_id } => self.image_deleted(image_id).await,
            // stock Cinder and Nova write these images themselves, and delete them when somebody else does
            Event::VolumeUpload { image_id, .. } | Event::InstanceSnapshot { image_id, .. } => {
                tracing::debug!(%image_id, event = %meta.event_type, "observed, not acted on");
                Ok(())
            }
            Event::LegacyInstanceSnapshot { instance_id } => {
                tracing::debug!(%instance_id, event = %meta.event_type, "observed, not acted on");
                Ok(())
            }
        };
        match stored {
            // it would not become readable by delivering again
            Err(error @ Error::Unreadable { .. }) => {
                tracing::error!(%error, "a request could not be stored");
                Ok(())
            }
            other => other.map_err(SinkError::new),
        }
    }
}
