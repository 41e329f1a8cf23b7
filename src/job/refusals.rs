//! Pools from which Glance takes no image that is published at once: its user cannot read them. Another request would
//! be refused too, and cost its tenant a try.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// How long a pool is remembered.
const REMEMBERED: Duration = Duration::from_secs(60 * 60);

/// What this daemon was refused, shared by its jobs.
#[derive(Debug, Clone, Default)]
pub struct Refusals(Arc<Mutex<HashMap<String, Instant>>>);

impl Refusals {
    /// Images from that pool are published when copied for a while.
    pub fn note(&self, pool: &str) {
        self.pools().insert(pool.to_owned(), Instant::now());
    }

    pub fn has(&self, pool: &str) -> bool {
        let mut pools = self.pools();
        pools.retain(|_, refused| refused.elapsed() < REMEMBERED);
        pools.contains_key(pool)
    }

    fn pools(&self) -> std::sync::MutexGuard<'_, HashMap<String, Instant>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_refusal_is_remembered_for_an_hour() {
        let refusals = Refusals::default();
        assert!(!refusals.has("volumes"));
        refusals.note("volumes");
        assert!(refusals.has("volumes") && !refusals.has("ssd"));
        tokio::time::advance(REMEMBERED).await;
        assert!(!refusals.has("volumes"));
    }
}
