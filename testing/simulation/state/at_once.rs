//! What the cluster knows of images that are published before they are copied.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use tokio::time::Instant;

/// Data objects of an image.
pub const OBJECTS: u64 = 3;

/// `[offload] detach_grace` of the simulated daemons.
pub const GRACE: Duration = Duration::from_secs(20);

#[derive(Debug, Default)]
pub struct AtOnce {
    /// The daemons are configured for it.
    pub is_asked_for: bool,
    /// Glance's user may not read the pools of the sources.
    pub is_refused: bool,
    /// What each image became active with, by its RBD image's id.
    pub contents: BTreeMap<String, u64>,
    /// Objects that were written into images that were gone.
    pub orphans: BTreeSet<(String, u64)>,
}

/// A parent that was cut off, and when: a client that opened the image before still reads from it.
#[derive(Debug, Clone)]
pub struct CutOff {
    pub at: Instant,
    /// Images and snapshots, the nearest first.
    pub chain: Vec<(String, u64)>,
}
