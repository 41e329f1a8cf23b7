//! The intake: turns what a notification says into a stored job, after which the delivery may be acked.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::watch;
use tracing::Instrument;
use uuid::Uuid;

use super::engine::Engine;
use super::signal::Signal;
use super::store::{Error, NewJob, Result, Store, Stored, Submitted};
use crate::config::Config;
use crate::notification::{Event, Meta, Sink, SinkError};
use crate::request::{self, TagRequest, Trigger};

/// How long Glance may take to show a record that a service announced.
const OFFER_READ_WITHIN: Duration = Duration::from_secs(5);

/// Takes requests.
#[derive(Clone)]
pub struct Intake {
    store: Store,
    /// Woken for new jobs. Without one, a daemon finds them at its next poll.
    engine: Option<Arc<Engine>>,
    config: watch::Receiver<Arc<Config>>,
}

impl Intake {
    /// Stores jobs for this engine, and wakes it.
    pub fn new(engine: Arc<Engine>) -> Self {
        let context = engine.context();
        Self { store: context.store.clone(), config: context.config.clone(), engine: Some(engine) }
    }

    /// Only stores jobs; any running daemon takes them up.
    pub fn storing(store: Store, config: watch::Receiver<Arc<Config>>) -> Self {
        Self { store, engine: None, config }
    }

    fn wake(&self, image_id: Uuid) {
        if let Some(engine) = &self.engine {
            engine.wake(image_id);
        }
    }

    /// An image record is queued and bears these tags. Once this returned, what they ask for, or a service offers by
    /// them, is stored.
    pub async fn image_queued(&self, image_id: Uuid, owner: Option<String>, tags: &[String]) -> Result<()> {
        let source = match request::parse_request_tags(tags) {
            TagRequest::Source(source) => Some(source),
            // the plan reads the tags again, and tells the tenant
            TagRequest::Invalid(_) => None,
            TagRequest::Absent => {
                let offer = request::parse_offer_tag(tags);
                let Some((offer, trigger)) = offer.and_then(|offer| Some((offer, offer.trigger()?))) else {
                    return Ok(());
                };
                let source = Some(offer.source);
                return self.offered(NewJob { image_id, trigger, source, project_id: owner }).await;
            }
        };
        self.submit(NewJob { image_id, trigger: Trigger::Request, source, project_id: owner }).await
    }

    /// Whether these tags ask for something, or offer something that this daemon is to do.
    pub fn takes(&self, tags: &[String]) -> bool {
        let offer = || request::parse_offer_tag(tags).and_then(|offer| offer.trigger());
        request::parse_request_tags(tags) != TagRequest::Absent
            || offer().is_some_and(|trigger| self.integrates(trigger))
    }

    /// A service offers its work. Without the integration in the configuration it is left alone: stock services write
    /// these images themselves, and delete them when another client does.
    async fn offered(&self, new: NewJob) -> Result<()> {
        let image_id = new.image_id;
        let source = new.source.map(|source| source.to_string());
        if !self.integrates(new.trigger) {
            tracing::info!(%image_id, source, trigger = new.trigger.as_str(), "offer ignored: the integration is off");
            count_ignored(new.trigger);
            return Ok(());
        }
        self.submit(new).await
    }

    /// A service announces its work on an image. The notification can be forged, so the daemon reads the record, and
    /// only an offer tag there counts. If the notification comes before the tag, Glance's notification of the tag
    /// follows.
    async fn announced(&self, image_id: Uuid, trigger: Trigger) -> Result<()> {
        if !self.integrates(trigger) {
            tracing::info!(%image_id, trigger = trigger.as_str(), "offer ignored: the integration is off");
            count_ignored(trigger);
            return Ok(());
        }
        let Some(engine) = &self.engine else { return Ok(()) };
        if self.store.load(image_id).await?.is_some() {
            return Ok(());
        }
        let id = image_id.to_string();
        match tokio::time::timeout(OFFER_READ_WITHIN, engine.context().cloud.image(&id)).await {
            Ok(Ok(Some(image))) if image.status == "queued" => {
                self.image_queued(image_id, image.owner, &image.tags).await
            }
            Ok(Ok(_)) => Ok(()),
            // Glance's notification of the offer, or the reconciler, comes to it
            Ok(Err(error)) => {
                tracing::debug!(%image_id, %error, "the offer could not be read");
                Ok(())
            }
            Err(_) => Ok(()),
        }
    }

    fn integrates(&self, trigger: Trigger) -> bool {
        let config = self.config.borrow();
        match trigger {
            Trigger::Request => true,
            Trigger::VolumeUpload => config.cinder.integration,
            Trigger::InstanceSnapshot => config.nova.integration,
        }
    }

    async fn submit(&self, new: NewJob) -> Result<()> {
        let NewJob { image_id, trigger, source, .. } = new;
        match self.store.submit(&new).await? {
            Submitted::Created { request_id } => {
                tracing::info!(%image_id, %request_id, job_stage = "accepted", trigger = trigger.as_str(),
                    source = source.map(|s| s.to_string()), "request stored");
                metrics::counter!("rbd_offload_jobs_accepted_total", "trigger" => trigger.as_str()).increment(1);
            }
            Submitted::Rerequested => tracing::info!(%image_id, "request received again; rechecking the image"),
            Submitted::Running => return Ok(()),
        }
        self.wake(image_id);
        Ok(())
    }

    /// An active image still has properties that its job set while it was queued: its owner uploaded to it after the
    /// job had ended without an image, or a change reached Glance late. Later images would inherit these properties, so
    /// the reconciler is told to remove them.
    pub async fn image_active(&self, image_id: Uuid) -> Result<()> {
        let mut is_ended = false;
        let choose = |stored: &Stored| {
            let known = stored.record.needs_repair || stored.signals.has(Signal::NeedsRepair);
            is_ended = stored.record.state.is_ended() && !stored.record.is_elsewhere();
            if is_ended && !known { vec![Signal::NeedsRepair] } else { vec![] }
        };
        // also where it was known: the daemon that was told of it may be gone
        if self.store.signal(image_id, choose).await?.is_some() && is_ended {
            self.store.request_recheck(image_id).await?;
        }
        Ok(())
    }

    /// An image was deleted, says a notification. A live job of it asks Glance and ends if that is so.
    pub async fn image_deleted(&self, image_id: Uuid) -> Result<()> {
        let choose = |stored: &Stored| if stored.is_settled() { vec![] } else { vec![Signal::RecheckImage] };
        if let Some(stored) = self.store.signal(image_id, choose).await?
            && !stored.is_settled()
        {
            self.store.index(&stored).await?;
            self.wake(image_id);
        }
        Ok(())
    }
}

#[async_trait]
impl Sink for Intake {
    async fn accept(&self, event: Event, meta: Meta) -> std::result::Result<(), SinkError> {
        // the id of the message, by which it is found in the service's own log
        let span = tracing::error_span!("delivery", notification = meta.message_id.as_deref());
        self.take(event, &meta).instrument(span).await
    }
}

impl Intake {
    async fn take(&self, event: Event, meta: &Meta) -> std::result::Result<(), SinkError> {
        let stored = match event {
            Event::ImageChanged { image_id, owner, tags, .. } => self.image_queued(image_id, owner, &tags).await,
            Event::ImageDeleted { image_id } => self.image_deleted(image_id).await,
            Event::ImageActive { image_id } => self.image_active(image_id).await,
            Event::VolumeUpload { image_id, .. } => self.announced(image_id, Trigger::VolumeUpload).await,
            Event::InstanceSnapshot { image_id, .. } => self.announced(image_id, Trigger::InstanceSnapshot).await,
            // does not tell the image; where an integration waits, Glance's notification of its offer does
            Event::LegacyInstanceSnapshot { instance_id } => {
                if !self.integrates(Trigger::InstanceSnapshot) {
                    let trigger = Trigger::InstanceSnapshot.as_str();
                    tracing::info!(%instance_id, event = %meta.event_type, trigger, "offer ignored: the integration is off");
                    count_ignored(Trigger::InstanceSnapshot);
                }
                Ok(())
            }
        };
        match stored {
            // another delivery would meet the same
            Err(error @ (Error::Unreadable { .. } | Error::TooLarge { .. })) => Err(SinkError::permanent(error)),
            other => other.map_err(SinkError::new),
        }
    }
}

/// Counts an offer of a service whose integration is off.
fn count_ignored(trigger: Trigger) {
    metrics::counter!("rbd_offload_offers_ignored_total", "trigger" => trigger.as_str()).increment(1);
}
