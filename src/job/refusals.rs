//! Pools from which a Glance store takes no image that is published at once: its Ceph user cannot read them. Another
//! request would be refused too, and cost its tenant a try.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// How long a refusal is remembered.
const REMEMBERED: Duration = Duration::from_secs(60 * 60);

/// What this daemon was refused, shared by its jobs.
#[derive(Debug, Clone, Default)]
pub struct Refusals(Arc<Mutex<Refused>>);

/// The pools of the source and of the store, and when Glance refused.
type Refused = HashMap<(String, String), Instant>;

impl Refusals {
    /// Images from the pool `source` to the pool `destination` are published when copied for a while.
    pub fn note(&self, source: &str, destination: &str) {
        self.pools().insert((source.to_owned(), destination.to_owned()), Instant::now());
    }

    pub fn has(&self, source: &str, destination: &str) -> bool {
        let mut pools = self.pools();
        pools.retain(|_, refused| refused.elapsed() < REMEMBERED);
        pools.contains_key(&(source.to_owned(), destination.to_owned()))
    }

    fn pools(&self) -> std::sync::MutexGuard<'_, Refused> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_refusal_is_remembered_for_an_hour() {
        let refusals = Refusals::default();
        assert!(!refusals.has("volumes", "images"));
        refusals.note("volumes", "images");
        assert!(refusals.has("volumes", "images"));
        assert!(!refusals.has("ssd", "images") && !refusals.has("volumes", "other-images"));
        tokio::time::advance(REMEMBERED).await;
        assert!(!refusals.has("volumes", "images"));
    }
}
