//! The intake: turns what a notification says into a stored job, after which the delivery may be acked.

use std::sync::Arc;

use async_trait::async_trait;
use uuid::Uuid;

use super::engine::Engine;
use super::store::{Error, NewJob, Result, Store, Submitted};
use crate::notification::{Event, Meta, Sink, SinkError};
use crate::request::{self, Asked, Trigger};

/// Takes requests.
#[derive(Clone)]
pub struct Intake {
    store: Store,
    /// Is told of new jobs; without one, a daemon finds them at its next look.
    engine: Option<Arc<Engine>>,
}

impl Intake {
    /// Stores jobs for this engine, and wakes it.
    pub fn new(engine: Arc<Engine>) -> Self {
        Self { store: engine.context().store.clone(), engine: Some(engine) }
    }

    /// Only stores jobs; any running daemon takes them up.
    pub fn storing(store: Store) -> Self {
        Self { store, engine: None }
    }

    fn wake(&self, image_id: Uuid) {
        if let Some(engine) = &self.engine {
            engine.wake(image_id);
        }
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
        let submitted = self.store.submit(&new).await?;
        match submitted {
            Submitted::Created => {
                tracing::info!(%image_id, job_stage = "accepted", source = source.map(|s| s.to_string()), "request stored");
                metrics::counter!("rbd_offload_jobs_accepted_total", "trigger" => "request").increment(1);
            }
            Submitted::AskedAgain => tracing::info!(%image_id, "the image was heard of again; looked at anew"),
            Submitted::Running => return Ok(()),
        }
        self.wake(image_id);
        Ok(())
    }

    /// An image was deleted, says a notification. A live job of it asks Glance and ends if that is so.
    pub async fn image_deleted(&self, image_id: Uuid) -> Result<()> {
        let mut live = false;
        let changed = self
            .store
            .change(image_id, |record| {
                live = !record.is_settled();
                record.not_before = None;
                live && !std::mem::replace(&mut record.check, true)
            })
            .await?;
        if let (true, Some(record)) = (live, changed) {
            self.store.index(&record).await?;
            self.wake(image_id);
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
