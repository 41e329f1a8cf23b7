//! Which pools do not answer: [`HungClients`] counts the clients that were given up, by the pools that they had open.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;

use super::cluster::lock;
use super::{Error, ErrorKind, Result};

/// Clients with hung calls in the same pools. With so many, no other client opens these pools.
const HUNG_MAX_OF_POOLS: usize = 4;

/// Clients that were given up and have calls that have not returned.
///
/// A call that hangs in one pool keeps its client for as long as that pool is sick. The pool of a job without a plan is
/// not known when the job takes a client, so the limit is kept where a pool is opened: the job in the sick pool fails
/// at once, and its client goes to the next job.
#[derive(Default)]
pub(super) struct HungClients {
    /// By the ids of the pools that the client had open.
    counts: Mutex<BTreeMap<BTreeSet<i64>, usize>>,
}

impl HungClients {
    pub fn add(&self, pools: BTreeSet<i64>) {
        *lock(&self.counts).entry(pools).or_default() += 1;
    }

    /// The calls of a client that was added with these pools have returned.
    pub fn remove(&self, pools: &BTreeSet<i64>) {
        let mut counts = lock(&self.counts);
        if let Some(count) = counts.get_mut(pools) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                counts.remove(pools);
            }
        }
    }

    pub fn len(&self) -> usize {
        lock(&self.counts).values().sum()
    }

    /// Whether a client may have all of `pools` open at once. A client that hung with more pools open says nothing
    /// about these: the sick one may be among the others.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::TimedOut`] while [`HUNG_MAX_OF_POOLS`] clients hang that had nothing but some of these pools open.
    pub fn allow(&self, pools: &BTreeSet<i64>, operation: &str) -> Result<()> {
        let counts = lock(&self.counts);
        let hung: usize = counts.iter().filter(|(open, _)| open.is_subset(pools)).map(|(_, count)| count).sum();
        if hung < HUNG_MAX_OF_POOLS {
            return Ok(());
        }
        let detail = format!(
            "the calls of {hung} clients on this pool have not returned: see `ceph health detail` for its placement \
             groups"
        );
        Err(Error::new(operation, ErrorKind::TimedOut, detail))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sick_pool_is_closed_to_clients_and_no_other_pool_is() {
        let (volumes, images, vms) = (1, 2, 3);
        let hung = HungClients::default();
        let refused = |pools: &[i64]| hung.allow(&pools.iter().copied().collect(), "open pool").is_err();
        for _ in 0..HUNG_MAX_OF_POOLS {
            assert!(!refused(&[volumes]));
            hung.add(BTreeSet::from([volumes]));
        }
        assert!(refused(&[volumes]) && refused(&[images, volumes]));
        assert!(!refused(&[images]) && !refused(&[vms]) && !refused(&[images, vms]));
        hung.remove(&BTreeSet::from([volumes]));
        assert!(!refused(&[volumes]));
        assert_eq!(hung.len(), HUNG_MAX_OF_POOLS - 1);
    }

    #[test]
    fn clients_that_hung_with_two_pools_open_close_neither_alone() {
        let (vms, images, volumes) = (3, 2, 1);
        let hung = HungClients::default();
        for _ in 0..HUNG_MAX_OF_POOLS {
            hung.add(BTreeSet::from([vms, images]));
        }
        let allowed = |pools: &[i64]| hung.allow(&pools.iter().copied().collect(), "open pool").is_ok();
        assert!(!allowed(&[vms, images]));
        assert!(allowed(&[images]) && allowed(&[vms]) && allowed(&[volumes, images]));
    }

    #[test]
    fn clients_that_hang_with_no_pool_open_close_all() {
        let hung = HungClients::default();
        for _ in 0..HUNG_MAX_OF_POOLS {
            hung.add(BTreeSet::new());
        }
        assert!(hung.allow(&BTreeSet::from([1]), "open pool").is_err());
    }
}
