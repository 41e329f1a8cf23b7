//! Where the bytes of a copy are read from, also when Cinder deletes the source meanwhile.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::ceph::{self, ErrorKind, ImageSpec, Link, Storage};

/// How often a copy or a comparison is begun when parents of the source are cut off meanwhile. An anchor that Cinder
/// has flattened has none any more.
pub const CHAIN_TRIES: usize = 4;

/// Where a transfer takes the bytes from.
pub(in super::super) struct CopySource {
    pub source: ImageSpec,
    pub snapshot: String,
    /// The anchor and its snapshot, once it is made.
    pub anchor: Option<(ImageSpec, String)>,
    /// The source's snapshot was not found, although the anchor hangs on it: Ceph keeps a deleted snapshot under
    /// another name while it has clones of format 2.
    is_renamed: AtomicBool,
}

/// The snapshot that holds the data now, and all that it reads from. As long as this stays the same, no snapshot in it
/// can have been removed.
#[derive(PartialEq)]
pub struct Readable {
    pub source: ImageSpec,
    pub snapshot: String,
    chain: Vec<Link>,
}

impl Readable {
    /// Whether it has all the data itself.
    pub fn is_cut_off(&self) -> bool {
        self.chain.is_empty()
    }
}

impl CopySource {
    pub fn new(source: ImageSpec, snapshot: String, anchor: Option<(ImageSpec, String)>) -> Self {
        Self { source, snapshot, anchor, is_renamed: AtomicBool::new(false) }
    }

    /// The source, while the anchor depends on it. Once Cinder has flattened the anchor, the anchor has all the data,
    /// and the source may be deleted. If the source's snapshot has lost its name, the anchor is read: it finds the
    /// snapshot by id.
    pub async fn readable(&self, storage: &dyn Storage) -> ceph::Result<Readable> {
        let (source, snapshot) = (self.source.clone(), self.snapshot.clone());
        let Some((anchor, own)) = &self.anchor else {
            let chain = storage.chain(&source, &snapshot).await?;
            return Ok(Readable { source, snapshot, chain });
        };
        let chain = storage.chain(anchor, own).await?;
        if chain.is_empty() || self.is_renamed.load(Ordering::Relaxed) {
            return Ok(Readable { source: anchor.clone(), snapshot: own.clone(), chain });
        }
        Ok(Readable { source, snapshot, chain })
    }

    /// Whether a read that ended with `result` can be relied on: no link of the chain was cut off during it.
    pub async fn is_unchanged<T>(
        &self,
        storage: &dyn Storage,
        before: &Readable,
        result: &ceph::Result<T>,
    ) -> ceph::Result<bool> {
        if result.as_ref().is_err_and(|e| !may_follow_from_a_changed_chain(e)) {
            return Ok(true);
        }
        let is_unchanged = self.readable(storage).await? == *before;
        let is_missing = result.as_ref().is_err_and(|e| e.kind() == ErrorKind::NotFound);
        if is_unchanged && is_missing && self.anchor.is_some() && !self.is_renamed.swap(true, Ordering::Relaxed) {
            return Ok(false);
        }
        Ok(is_unchanged)
    }
}

/// Whether an error may come from a parent that was removed, and not from this client.
fn may_follow_from_a_changed_chain(error: &ceph::Error) -> bool {
    !matches!(
        error.kind(),
        ErrorKind::Cancelled | ErrorKind::Fenced | ErrorKind::NotLocked | ErrorKind::Exists | ErrorKind::NoSpace
    )
}

pub fn chain_changes(copy: &ImageSpec) -> ceph::Error {
    let detail = "the parents of the source changed each time during the copy";
    ceph::Error::new(format!("copy to {copy}"), ErrorKind::Conflict, detail)
}
