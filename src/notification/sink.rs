//! Where relevant events go: whoever stores a job for them.

use std::fmt;

use async_trait::async_trait;

use super::event::{Event, EventType};

/// What is known of a notification besides the event; for logs only.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Meta {
    pub event_type: EventType,
    /// oslo.messaging's `message_id` and `_unique_id`, where they are ids.
    pub message_id: Option<String>,
    pub unique_id: Option<String>,
    pub exchange: String,
    pub routing_key: String,
    /// The broker has handed it out before, to us or to another controller.
    pub redelivered: bool,
}

/// Takes events over from the broker.
#[async_trait]
pub trait Sink: Send + Sync + 'static {
    /// Returns when nothing of the event can be lost any more, since the delivery is acknowledged then: the job is in RADOS, or there is
    /// nothing to do.
    ///
    /// Called several times at once, up to the prefetch, and more than once for the same event: after an error, a lost connection or a
    /// publisher's retry. Must be idempotent, and may be dropped half way.
    async fn accept(&self, event: Event, meta: Meta) -> Result<(), SinkError>;
}

#[async_trait]
impl<T: Sink + ?Sized> Sink for std::sync::Arc<T> {
    async fn accept(&self, event: Event, meta: Meta) -> Result<(), SinkError> {
        (**self).accept(event, meta).await
    }
}

/// The event could not be stored now; it is tried again. Its text is logged.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct SinkError(String);

impl SinkError {
    pub fn new(error: impl fmt::Display) -> SinkError {
        SinkError(error.to_string())
    }
}
