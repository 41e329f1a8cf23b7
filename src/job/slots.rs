//! How many jobs of this daemon write to one pool at a time.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

/// Jobs that run here, counted by the pool that they write to.
#[derive(Debug, Clone, Default)]
pub struct PoolSlots(Arc<Mutex<HashMap<String, usize>>>);

impl PoolSlots {
    /// A place among the `limit` jobs of that pool; 0: no limit. It is free again when the slot is dropped.
    pub fn take(&self, pool: &str, limit: usize) -> Option<PoolSlot> {
        let mut counts = self.counts();
        let count = counts.entry(pool.to_owned()).or_default();
        if limit > 0 && *count >= limit {
            return None;
        }
        *count += 1;
        Some(PoolSlot { slots: self.clone(), pool: pool.to_owned() })
    }

    pub fn is_full(&self, pool: &str, limit: usize) -> bool {
        limit > 0 && self.counts().get(pool).is_some_and(|count| *count >= limit)
    }

    fn counts(&self) -> std::sync::MutexGuard<'_, HashMap<String, usize>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// See [`PoolSlots::take`].
#[derive(Debug)]
pub struct PoolSlot {
    slots: PoolSlots,
    pool: String,
}

impl Drop for PoolSlot {
    fn drop(&mut self) {
        let mut counts = self.slots.counts();
        if let Some(count) = counts.get_mut(&self.pool) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.pool);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pool_takes_no_more_jobs_than_its_limit() {
        let pools = PoolSlots::default();
        let first = pools.take("images", 1);
        assert!(first.is_some());
        assert!(pools.take("images", 1).is_none());
        assert!(pools.take("other", 1).is_some());
        assert!(pools.take("images", 0).is_some());
        drop(first);
        assert!(pools.take("images", 1).is_some());
    }
}
