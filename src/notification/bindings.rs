//! What the daemons share about the queue outside of the broker.
//!
//! * What the queue is bound to: AMQP can make and remove a binding, but not list them.
//! * Which daemon replaces an old queue: RabbitMQ deletes a quorum queue whether or not it is in use.

use std::collections::BTreeSet;
use std::fmt;
use std::time::Duration;

use async_trait::async_trait;

/// One binding of a queue.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
pub struct Binding {
    pub vhost: String,
    pub queue: String,
    pub exchange: String,
    pub routing_key: String,
}

/// Remembers bindings over restarts, for all controllers together. A binding is added before it is made and removed
/// after it was, so that none exists which is not remembered.
#[async_trait]
pub trait Bindings: fmt::Debug + Send + Sync + 'static {
    async fn all(&self) -> Result<BTreeSet<Binding>, BindingsError>;

    async fn add(&self, bindings: &[Binding]) -> Result<(), BindingsError>;

    async fn remove(&self, binding: &Binding) -> Result<(), BindingsError>;

    /// Takes the lock for replacing a queue, for `duration` at most. False: another holder has it, or no binding is
    /// remembered.
    async fn lock(&self, holder: &str, duration: Duration) -> Result<bool, BindingsError>;

    /// Gives back the lock of [`Self::lock`]. A lock that has run out is no error.
    async fn unlock(&self, holder: &str) -> Result<(), BindingsError>;
}

/// What is remembered cannot be read or written now.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct BindingsError(String);

impl BindingsError {
    pub fn new(error: impl fmt::Display) -> Self {
        Self(error.to_string())
    }
}

/// Remembers nothing.
#[derive(Debug)]
pub(super) struct NoMemory;

#[async_trait]
impl Bindings for NoMemory {
    async fn all(&self) -> Result<BTreeSet<Binding>, BindingsError> {
        Ok(BTreeSet::new())
    }

    async fn add(&self, _: &[Binding]) -> Result<(), BindingsError> {
        Ok(())
    }

    async fn remove(&self, _: &Binding) -> Result<(), BindingsError> {
        Ok(())
    }

    async fn lock(&self, _: &str, _: Duration) -> Result<bool, BindingsError> {
        Ok(false)
    }

    async fn unlock(&self, _: &str) -> Result<(), BindingsError> {
        Ok(())
    }
}
