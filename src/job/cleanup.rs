//! Removal of what jobs left behind: one task per Glance image, each in [custody](Custody).
//!
//! A removal may take long (a large image), or hang. It only occupies one of [`MAX_REMOVALS`] places: the reconciler's
//! round goes on, and a later round collects the result.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::{Instant, timeout, timeout_at};
use uuid::Uuid;

use super::context::Context;
use super::custody::{Custody, Guarded};
use super::engine::Engine;
use super::error::CallError;
use super::names::private_name;
use super::record::Record;
use crate::ceph::{Changed, ErrorKind, ImageKey, ImageSpec, Storage};
use crate::openstack::VolumeDeletion;
use crate::publish::tag::{OwnershipTag, tag_of};
use crate::request::{self, Source};

/// Glance images whose leftovers are removed at a time.
const MAX_REMOVALS: usize = 4;

/// How long a round waits for the removals that it began.
const WAIT: Duration = Duration::from_secs(10);

/// How long the removal of one image's leftovers may take before it counts as hung.
const LIMIT: Duration = Duration::from_secs(2 * 60 * 60);

/// Something that a job may have left. In the order in which it can be removed: a copy may be a clone of the anchor,
/// and the anchor of the temporary snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum LeftoverKind {
    Copy,
    Published,
    Anchor,
    Snapshot,
}

#[derive(Debug, Clone)]
pub(super) struct Leftover {
    pub image_id: Uuid,
    pub kind: LeftoverKind,
    /// The image, or the one that has the snapshot.
    pub image: ImageSpec,
    /// The tag that was found. An object that has another tag by the time of its removal is left alone.
    pub tag: Option<OwnershipTag>,
}

/// What one task removed.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Removed {
    pub images: usize,
    pub snapshots: usize,
}

/// How a task ended.
#[derive(Debug, Default)]
struct Ended {
    removed: Removed,
    is_fenced: bool,
    is_hung: bool,
    is_beyond_cleanup: bool,
}

/// The removals that run. Dropping this aborts them: this daemon stays in their records as the owner, and the next
/// owner fences it.
pub(super) struct Removals {
    cleaner: Cleaner,
    tasks: JoinSet<(Uuid, Ended)>,
    running: HashSet<Uuid>,
    /// Leftovers that are left alone, and that the log has named.
    beyond_cleanup: HashSet<Uuid>,
    /// The client of the removals is of no use any more.
    is_fenced: bool,
}

impl Removals {
    pub fn new(engine: Arc<Engine>, storage: Arc<dyn Storage>) -> Self {
        Self {
            cleaner: Cleaner { engine, storage },
            tasks: JoinSet::new(),
            running: HashSet::new(),
            beyond_cleanup: HashSet::new(),
            is_fenced: false,
        }
    }

    pub fn set_storage(&mut self, storage: Arc<dyn Storage>) {
        self.cleaner.storage = storage;
    }

    /// Aborts the removals whose client was fenced. Returns whether no removal uses the client now, so that it may
    /// reconnect.
    pub fn may_reconnect(&mut self) -> bool {
        if std::mem::take(&mut self.is_fenced) {
            self.tasks.abort_all();
            self.tasks = JoinSet::new();
            self.running.clear();
        }
        self.is_idle()
    }

    /// Those that ended since.
    pub fn reap(&mut self) -> Removed {
        let mut removed = Removed::default();
        while let Some(ended) = self.tasks.try_join_next() {
            self.note(ended, &mut removed);
        }
        removed
    }

    pub fn is_idle(&self) -> bool {
        self.running.is_empty()
    }

    pub fn is_running(&self, image_id: Uuid) -> bool {
        self.running.contains(&image_id)
    }

    /// Begins a removal as soon as there is room. `false`: there was none until then.
    pub async fn begin(
        &mut self,
        image_id: Uuid,
        mut leftovers: Vec<Leftover>,
        until: Instant,
        removed: &mut Removed,
    ) -> bool {
        while self.running.len() >= MAX_REMOVALS {
            match timeout_at(until, self.tasks.join_next()).await {
                Ok(Some(ended)) => self.note(ended, removed),
                Ok(None) | Err(_) => return false,
            }
        }
        leftovers.sort_by_key(|leftover| leftover.kind);
        self.running.insert(image_id);
        let cleaner = self.cleaner.clone();
        self.tasks.spawn(async move {
            let ended = match timeout(LIMIT, cleaner.remove_all(image_id, leftovers)).await {
                Ok(ended) => ended,
                Err(_) => Ended { is_hung: true, ..Ended::default() },
            };
            (image_id, ended)
        });
        true
    }

    /// Waits a moment for those of these images.
    pub async fn wait(&mut self, begun: &[Uuid], removed: &mut Removed) {
        let until = Instant::now() + WAIT;
        while begun.iter().any(|image_id| self.running.contains(image_id)) {
            match timeout_at(until, self.tasks.join_next()).await {
                Ok(Some(ended)) => self.note(ended, removed),
                Ok(None) | Err(_) => return,
            }
        }
    }

    fn note(&mut self, ended: Result<(Uuid, Ended), tokio::task::JoinError>, removed: &mut Removed) {
        let (image_id, ended) = match ended {
            Ok(ended) => ended,
            Err(error) => {
                // which one is not known: what still runs holds its lease
                tracing::error!(%error, "a removal of leftovers broke off");
                if self.tasks.is_empty() {
                    self.running.clear();
                }
                return;
            }
        };
        self.running.remove(&image_id);
        removed.images += ended.removed.images;
        removed.snapshots += ended.removed.snapshots;
        self.is_fenced |= ended.is_fenced;
        if ended.is_hung {
            tracing::error!(%image_id, hours = LIMIT.as_secs() / 3600,
                "the removal of leftovers stalled and was given up");
            let cleaner = self.cleaner.clone();
            self.is_fenced = true;
            tokio::spawn(async move { cleaner.fence_own_client().await });
        }
        if ended.is_beyond_cleanup && self.beyond_cleanup.insert(image_id) {
            metrics::counter!("rbd_offload_takeover_failures_total").increment(1);
            tracing::error!(%image_id,
                "daemons died while they removed the leftovers of this image; they stay until the job is retried");
        }
    }
}

#[derive(Clone)]
struct Cleaner {
    engine: Arc<Engine>,
    storage: Arc<dyn Storage>,
}

impl Cleaner {
    fn context(&self) -> &Context {
        self.engine.context()
    }

    /// A call that hangs goes on when its future is dropped. With a client of its own, which is fenced, it can do
    /// nothing any more.
    async fn fence_own_client(&self) {
        if Arc::ptr_eq(&self.storage, &self.context().storage) {
            return;
        }
        let fenced = async {
            let address = self.storage.address().await?;
            self.context().storage.fence(&address).await
        };
        if let Err(error) = fenced.await {
            tracing::warn!(%error, "the client of a removal that hangs was not fenced");
        }
    }

    /// Removes what is left for one image.
    async fn remove_all(&self, image_id: Uuid, leftovers: Vec<Leftover>) -> Ended {
        let mut ended = Ended::default();
        let custody = match Custody::take(self.context(), &self.storage, image_id).await {
            Ok(Some(custody)) => custody,
            Ok(None) => return ended,
            Err(error) => {
                ended.is_fenced = matches!(&error, super::store::Error::Ceph(e) if e.kind() == ErrorKind::Fenced);
                tracing::warn!(%image_id, %error, "leftovers of a job stay; the next round tries again");
                return ended;
            }
        };
        if custody.is_beyond_cleanup() {
            custody.release(false).await;
            return Ended { is_beyond_cleanup: true, ..ended };
        }
        let mut all = true;
        for leftover in leftovers {
            match custody.guard(self.remove(&leftover)).await {
                Ok(true) if leftover.kind == LeftoverKind::Snapshot => ended.removed.snapshots += 1,
                Ok(true) => ended.removed.images += 1,
                Ok(false) => {}
                Err(error) => {
                    ended.is_fenced =
                        matches!(&error, Guarded::Failed(CallError::Ceph(e)) if e.kind() == ErrorKind::Fenced);
                    tracing::warn!(%image_id, image = %leftover.image, %error,
                        "a leftover was not removed; a later round tries again");
                    // what it depends on is not free either
                    all = false;
                    break;
                }
            }
        }
        custody.release(all).await;
        ended
    }

    /// Removes a leftover, in custody. `false`: it is not what it was, or it is needed.
    async fn remove(&self, leftover: &Leftover) -> Result<bool, CallError> {
        let Leftover { image_id, kind, image, tag } = leftover;
        let storage = self.storage.as_ref();
        if *kind == LeftoverKind::Snapshot {
            return self.remove_snapshot(leftover).await;
        }
        if tag_of(storage, image).await? != *tag {
            tracing::debug!(%image, "bears another ownership tag by now: left alone");
            return Ok(false);
        }
        if *kind == LeftoverKind::Published
            && let Some(record) = self.context().cloud.image(&image_id.to_string()).await?
            && record.status != "queued"
        {
            tracing::warn!(%image_id, %image, status = record.status,
                "the job ended without an image, and Glance's record is not queued: its data are left alone");
            return Ok(false);
        }
        if storage.remove_image(image).await? == Changed::No {
            return Ok(false);
        }
        tracing::warn!(%image_id, %image, "removed an image that its job had left behind");
        Ok(true)
    }

    /// Removes the snapshot, then the disk of a volume that Cinder has deleted, then the snapshot's tag. The tag goes
    /// last, so that a later sweep finds an unfinished removal.
    async fn remove_snapshot(&self, leftover: &Leftover) -> Result<bool, CallError> {
        let Leftover { image_id, image, tag, .. } = leftover;
        let storage = self.storage.as_ref();
        let snapshot = private_name(*image_id);
        let found = storage.snapshot_tag(image, &snapshot).await?;
        if found.as_deref().map(OwnershipTag::parse) != tag.map(Some) {
            return Ok(false);
        }
        let removed = storage.remove_snapshot(image, &snapshot).await? == Changed::Yes;
        if removed {
            tracing::warn!(%image_id, %image, snapshot, "removed a snapshot that its job had left behind");
        }
        if self.purge(*image_id, image).await? {
            storage.remove_snapshot_tag(image, &snapshot).await?;
        }
        Ok(removed)
    }

    /// Removes from the trash the disk of a volume that Cinder has deleted, as a running job does: not while Cinder has
    /// the volume, not before the end of a deferment, and not while another snapshot needs it. `false`: Cinder is still
    /// at work on the volume.
    async fn purge(&self, image_id: Uuid, image: &ImageSpec) -> Result<bool, CallError> {
        let Some(trashed) = self.storage.trashed(image).await? else { return Ok(true) };
        let Some(volume) = self.volume_of(image_id, image, &trashed.name).await? else { return Ok(true) };
        let found = self.context().cloud.volume(&volume.to_string()).await?;
        match VolumeDeletion::of(found.as_ref()) {
            VolumeDeletion::Done => {}
            VolumeDeletion::UnderWay => return Ok(false),
            VolumeDeletion::No => {
                let status = found.map(|volume| volume.status);
                tracing::warn!(%image_id, %volume, status, source = %image,
                    "the volume's disk stays in the trash: Cinder still has the volume");
                return Ok(true);
            }
        }
        if self.storage.purge(image).await? == Changed::Yes {
            tracing::info!(%image_id, %volume, source = %image, "removed the deleted volume's disk from the trash");
        }
        Ok(true)
    }

    /// The volume that this image in the trash was the disk of: by the job's record, or by the name that it had.
    async fn volume_of(&self, image_id: Uuid, image: &ImageSpec, name: &str) -> Result<Option<Uuid>, CallError> {
        let stored = self.context().store.load(image_id).await?;
        if let Some(Record { source: Some(Source::Volume(volume)), source_image: Some(origin), .. }) =
            stored.map(|stored| stored.record)
            && ImageKey::Id(origin.image_id) == image.image
            && origin.temporary
        {
            return Ok(Some(volume));
        }
        let config = self.context().config.borrow();
        let backends = config.backends.values().filter(|backend| backend.pool == image.pool);
        Ok(backends.filter_map(|backend| disk_id(&backend.image_name, name)).next())
    }
}

/// The id in an image's name by `[backend:…] image_name`.
fn disk_id(pattern: &str, name: &str) -> Option<Uuid> {
    let (before, after) = pattern.split_once("{id}")?;
    request::parse_uuid(name.strip_prefix(before)?.strip_suffix(after)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_volumes_id_is_read_from_the_name_of_its_disk() {
        let id = Uuid::new_v4();
        assert_eq!(disk_id("volume-{id}", &format!("volume-{id}")), Some(id));
        assert_eq!(disk_id("{id}_disk", &format!("{id}_disk")), Some(id));
        for name in [id.to_string(), format!("volume-{id}.deleted"), "volume-".into(), String::new()] {
            assert_eq!(disk_id("volume-{id}", &name), None, "{name}");
        }
    }
}
