//! Counts what is in the cluster: objects, images, snapshots, locks, watchers, trash. Before and after are compared.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use super::{disk, pause};

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Census(BTreeSet<String>);

/// What one census has and another has not.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Difference {
    pub more: Vec<String>,
    pub less: Vec<String>,
}

impl Difference {
    pub fn is_nothing(&self) -> bool {
        self.more.is_empty() && self.less.is_empty()
    }
}

impl Census {
    pub async fn take() -> Self {
        Self(disk::census().await.into_iter().collect())
    }

    pub fn since(&self, before: &Self) -> Difference {
        Difference {
            more: self.0.difference(&before.0).cloned().collect(),
            less: before.0.difference(&self.0).cloned().collect(),
        }
    }

    /// What differs now from `self`. Services that tidy up in the background are given a moment.
    pub async fn difference(&self) -> Difference {
        let begun = Instant::now();
        loop {
            let difference = Self::take().await.since(self);
            if difference.is_nothing() || begun.elapsed() > Duration::from_secs(20) {
                return difference;
            }
            pause(Duration::from_secs(1)).await;
        }
    }
}
