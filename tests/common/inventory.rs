//! Counts what is in the cluster: objects, images, snapshots, locks, watchers, trash. Before and after are compared.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use super::{disk, pause};

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClusterInventory(BTreeSet<String>);

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

impl ClusterInventory {
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
        self.difference_within(Duration::from_secs(60), |_| false).await
    }

    /// What differs now from `self`, beside the records of jobs, which lie in namespaces of the tests' own. What a
    /// killed process watched stays watched for half a minute.
    pub async fn difference_beside_records(&self) -> Difference {
        self.difference_within(Duration::from_secs(60), |what| what.starts_with("object images/test-")).await
    }

    async fn difference_within(&self, limit: Duration, is_known: impl Fn(&str) -> bool) -> Difference {
        let begun = Instant::now();
        loop {
            let mut difference = Self::take().await.since(self);
            difference.more.retain(|what| !is_known(what));
            if difference.is_nothing() || begun.elapsed() > limit {
                return difference;
            }
            pause(Duration::from_secs(1)).await;
        }
    }
}
