//! Where relevant events go: to the code that stores a job for them.

use std::fmt;

use async_trait::async_trait;

use super::event::{Event, EventType};

/// What is known of a notification besides the event; for logs only.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Meta {
    pub event_type: EventType,
    /// oslo.messaging's `message_id`, where it is an id.
    pub message_id: Option<String>,
    pub exchange: String,
}

/// Takes events over from the broker.
#[async_trait]
pub trait Sink: Send + Sync + 'static {
    /// Returns once the event is durable (the job is in RADOS, or there is nothing to do). The delivery is acknowledged
    /// right after. It is acknowledged after a [permanent](SinkError::permanent) error too; after any other it is tried
    /// again.
    ///
    /// Called several times at once, up to the prefetch, and more than once for the same event: after an error, a lost
    /// connection or a publisher's retry. Must be idempotent, and may be dropped half way.
    async fn accept(&self, event: Event, meta: Meta) -> Result<(), SinkError>;
}

#[async_trait]
impl<T: Sink + ?Sized> Sink for std::sync::Arc<T> {
    async fn accept(&self, event: Event, meta: Meta) -> Result<(), SinkError> {
        (**self).accept(event, meta).await
    }
}

/// The event was not stored. Its text is logged.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text}")]
pub struct SinkError {
    text: String,
    permanent: bool,
}

impl SinkError {
    /// It could not be stored now: the listener retries the delivery.
    pub fn new(error: impl fmt::Display) -> SinkError {
        SinkError { text: error.to_string(), permanent: false }
    }

    /// It can never be stored: the delivery is dropped, since the broker would hand it out without end.
    pub fn permanent(error: impl fmt::Display) -> SinkError {
        SinkError { text: error.to_string(), permanent: true }
    }

    pub fn is_permanent(&self) -> bool {
        self.permanent
    }
}
