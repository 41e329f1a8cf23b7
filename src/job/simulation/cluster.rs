//! The simulated Ceph cluster: images whose bytes are one number, objects with versions and locks, the blocklist.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use async_trait::async_trait;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::at_once::{self, AtOnce, CutOff};
use super::lasting::Lasting;
use super::node::{Handle, Kind, Node};
use super::promises;
use super::trouble::Trouble;
use super::world::World;
use crate::ceph::{
    Change, Compare, Error, ErrorKind, Features, FillState, ImageInfo, ImageKey, ImageSpec, KeyedObject, Lent, Link,
    LockKey, Locked, Moved, OWNER_KEY, Objects, Parent, Progress, Result, Snapshot, SnapshotPage, Storage, StoragePool,
    TransferLimits, Trashed, Version,
};

pub const FSID: &str = "c0ffee00-0000-4000-8000-000000000001";

/// How long the cluster takes a client for alive that says nothing more.
const WATCH_TIMEOUT: Duration = Duration::from_secs(30);

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snap {
    pub id: u64,
    pub name: String,
    pub content: u64,
    pub protected: bool,
    /// Artifacts by a daemon.
    pub ours: bool,
    /// Its removal broke off: it lies in the trash namespace, under no name.
    pub discarded: bool,
    /// Who owned the source when it was made.
    pub owner: Option<String>,
}

/// An RBD image. Content 0 is zeros, or bytes that are not all there.
#[derive(Debug, Clone)]
pub struct Rbd {
    pub id: String,
    pub pool: String,
    /// In the pool's directory; `None` in the trash.
    pub name: Option<String>,
    /// The name of a second `rbd_id.<name>`: a rename broke off.
    pub alias: Option<String>,
    /// The name under which it is being removed by way of the trash.
    pub removing: Option<String>,
    /// Who owned what it was made from, at the moment of the snapshot.
    pub owner: Option<String>,
    pub content: u64,
    /// Image and snapshot.
    pub parent: Option<(String, u64)>,
    pub snaps: Vec<Snap>,
    pub metadata: BTreeMap<String, String>,
    /// By the snapshot's name.
    pub snapshot_tags: BTreeMap<String, String>,
    /// Artifacts by a daemon.
    pub ours: bool,
    /// Clients that have it open for writing.
    pub watchers: BTreeMap<String, Instant>,
    pub features: u64,
    /// From its parent, by a daemon.
    pub cut_off: Option<CutOff>,
}

#[derive(Debug, Clone, Default)]
pub struct Object {
    pub data: Vec<u8>,
    pub version: u64,
    pub omap: BTreeMap<String, Vec<u8>>,
    /// By name: cookie, client, until.
    pub locks: BTreeMap<String, (String, String, Instant)>,
}

#[derive(Default)]
pub struct Cluster {
    pub images: Vec<Rbd>,
    pub objects: BTreeMap<String, Object>,
    pub blocklist: BTreeSet<String>,
    pub counter: u64,
    /// Contents that start with the header of another format.
    pub containers: BTreeSet<u64>,
    /// Until when a daemon may think that it holds a lock: by its address and the object.
    pub leases: BTreeMap<(String, String), Instant>,
    pub at_once: AtOnce,
}

impl Cluster {
    pub fn next(&mut self) -> u64 {
        self.counter += 1;
        self.counter
    }

    pub fn create(&mut self, pool: &str, name: &str, content: u64, ours: bool) -> &mut Rbd {
        let id = format!("rbd{}", self.next());
        self.images.push(Rbd {
            id,
            pool: pool.into(),
            name: Some(name.into()),
            alias: None,
            removing: None,
            owner: None,
            content,
            parent: None,
            snaps: Vec::new(),
            metadata: BTreeMap::new(),
            snapshot_tags: BTreeMap::new(),
            ours,
            watchers: BTreeMap::new(),
            features: Features::PUBLISHED.0,
            cut_off: None,
        });
        self.images.last_mut().unwrap()
    }

    pub fn named(&self, pool: &str, name: &str) -> Option<&Rbd> {
        let bears = |i: &&Rbd| i.name.as_deref() == Some(name) || i.alias.as_deref() == Some(name);
        self.images.iter().filter(|i| i.pool == pool).find(bears)
    }

    pub fn by_id(&self, id: &str) -> Option<&Rbd> {
        self.images.iter().find(|i| i.id == id)
    }

    pub fn by_id_mut(&mut self, id: &str) -> Option<&mut Rbd> {
        self.images.iter_mut().find(|i| i.id == id)
    }

    pub fn find(&self, spec: &ImageSpec) -> Option<&Rbd> {
        match &spec.image {
            ImageKey::Name(name) => self.named(&spec.pool, name),
            ImageKey::Id(id) => self.by_id(id).filter(|i| i.pool == spec.pool),
        }
    }

    fn find_id(&self, what: &str, spec: &ImageSpec) -> Result<String> {
        self.find(spec).map(|i| i.id.clone()).ok_or_else(|| missing(what, spec))
    }

    pub fn snap_content(&self, image: &str, snap: u64) -> Option<u64> {
        self.by_id(image)?.snaps.iter().find(|s| s.id == snap).map(|s| s.content)
    }

    /// What a reader of the head gets.
    pub fn content(&self, image: &Rbd) -> u64 {
        match &image.parent {
            Some((parent, snap)) => self.snap_content(parent, *snap).unwrap_or(0),
            None => image.content,
        }
    }

    /// What it reads from below its own objects, the nearest first.
    pub fn chain_of(&self, image: &Rbd) -> Vec<(String, u64)> {
        let mut links = Vec::new();
        let mut next = image.parent.clone();
        while let Some(link) = next {
            next = self.by_id(&link.0).and_then(|parent| parent.parent.clone());
            links.push(link);
        }
        links
    }

    pub fn snap(&mut self, id: &str, name: &str, protected: bool, ours: bool) {
        let snap_id = self.next();
        let Some(image) = self.by_id(id) else { return };
        let content = self.content(image);
        if let Some(image) = self.by_id_mut(id) {
            let name = name.into();
            image.snaps.push(Snap { id: snap_id, name, content, protected, ours, discarded: false, owner: None });
        }
    }

    pub fn has_clones(&self, id: &str) -> bool {
        self.images.iter().any(|i| i.parent.as_ref().is_some_and(|(parent, _)| parent == id))
    }

    pub fn drop_image(&mut self, id: &str) {
        self.images.retain(|i| i.id != id);
    }

    fn object(&mut self, what: &str, name: &str) -> Result<&mut Object> {
        self.objects.get_mut(name).ok_or_else(|| Error::new(what, ErrorKind::NotFound, format!("no object {name}")))
    }

    fn check_lock(object: &Object, lock: Option<&LockKey>, client: &str) -> Result<()> {
        let Some(lock) = lock else { return Ok(()) };
        match object.locks.get(&lock.name) {
            Some((cookie, holder, until)) if *cookie == lock.cookie && holder == client && *until > Instant::now() => {
                Ok(())
            }
            _ => Err(Error::new("write", ErrorKind::NotLocked, "the lock is not held")),
        }
    }
}

fn missing(what: &str, spec: &ImageSpec) -> Error {
    Error::new(format!("{what} {spec}"), ErrorKind::NotFound, "no such image")
}

/// A daemon touches an image: it must be one that a daemon made.
fn must_be_ours(world: &mut World, what: &str, id: &str) {
    let Some(image) = world.ceph.by_id(id) else { return };
    if !image.ours {
        let text = format!("{what} of {}/{:?}, which no daemon made", image.pool, image.name);
        world.violated(text);
    }
}

/// A daemon takes an image away, or its name: no active image may lose its data.
fn must_not_be_active(world: &mut World, what: &str, id: &str) {
    let Some(image) = world.ceph.by_id(id) else { return };
    let Some(name) = image.name.clone() else { return };
    let location = format!("rbd://{FSID}/{}/{name}/snap", image.pool);
    if world.cloud.images.get(&name).is_some_and(|i| i.image.status == "active" && i.locations.contains(&location)) {
        world.violated(format!("{what} of the data of the active image {name}"));
    }
}

/// Who owns what this image has at that snapshot, or had when the snapshot was made.
fn owner_of(world: &World, id: &str, snapshot: &str) -> Option<String> {
    let of_cinder = snapshot.strip_prefix("snapshot-").and_then(|id| world.cloud.snapshots.get(id));
    let image = world.ceph.by_id(id);
    let made = image.and_then(|i| i.snaps.iter().find(|s| s.name == snapshot)).and_then(|s| s.owner.clone());
    let disk = || world.cloud.disks.values().find(|disk| disk.rbd == id).map(|disk| disk.volume.project_id.clone());
    let passed_on = || image.and_then(|i| i.owner.clone());
    of_cinder.map(|(snapshot, _)| snapshot.project_id.clone()).or(made).or_else(disk).or_else(passed_on)
}

impl Handle {
    /// A long call: `steps` times a while, in which the client may be fenced, frozen or told to stop.
    pub async fn long(
        &self,
        what: &str,
        id: &str,
        progress: &Progress,
        cancel: &CancellationToken,
        writes_while_running: bool,
    ) -> Result<()> {
        let (steps, background) = {
            let mut world = self.world().lock();
            (1 + world.dice.below(6), world.dice.percent(40))
        };
        let address = self.node.address();
        let mut pause = {
            let mut world = self.world().lock();
            let longest = if world.dice.percent(20) { 8_000 } else { 1_500 };
            world.dice.millis(20, longest)
        };
        for step in 0..=steps {
            tokio::select! {
                biased;
                () = cancel.cancelled() => {
                    if background {
                        pause = pause.min(Duration::from_secs(3));
                        let world = self.world().clone();
                        let (id, address) = (id.to_owned(), address.clone());
                        tokio::spawn(async move {
                            tokio::time::sleep(pause).await;
                            if let Some(image) = world.lock().ceph.by_id_mut(&id) {
                                image.watchers.remove(&address);
                            }
                        });
                    } else if let Some(image) = self.world().lock().ceph.by_id_mut(id) {
                        image.watchers.remove(&address);
                    }
                    return Err(Error::new(what, ErrorKind::Cancelled, "stopped"));
                }
                () = tokio::time::sleep(pause) => {}
            }
            self.node.pass().await;
            let mut world = self.world().lock();
            if world.ceph.blocklist.contains(&address) {
                self.node.was_fenced(&address);
                return Err(Error::new(what, ErrorKind::Fenced, "fenced"));
            }
            match world.ceph.by_id_mut(id) {
                Some(image) => {
                    image.watchers.insert(address.clone(), Instant::now() + WATCH_TIMEOUT);
                }
                None => {
                    if writes_while_running {
                        world.violated(format!("{what} wrote objects of an image that had been removed"));
                    }
                    return Err(Error::new(what, ErrorKind::NotFound, "the image is gone"));
                }
            }
            progress.set_total(steps << 20);
            progress.set_done(step << 20);
        }
        Ok(())
    }

    /// Between two operations of one librbd call: the client dies, or one of them fails.
    async fn break_off(&self) -> Result<()> {
        let fate = {
            let mut world = self.world().lock();
            if !world.has(Trouble::HalfDone) || world.faults.calm {
                return Ok(());
            }
            world.dice.below(20)
        };
        match fate {
            0 | 1 => {
                self.node.kill();
                std::future::pending().await
            }
            2 => Err(Error::new("a part of a call", ErrorKind::Other, "it broke off")),
            _ => Ok(()),
        }
    }

    /// A pool of many images takes its time.
    async fn list_slowly(&self) {
        let time = {
            let mut world = self.world().lock();
            if !world.has(Trouble::SlowLists) {
                return;
            }
            world.dice.millis(20_000, 100_000)
        };
        tokio::time::sleep(time).await;
    }

    pub async fn open(&self, what: &str, image: &ImageSpec) -> Result<String> {
        let address = self.node.address();
        self.ceph(
            Kind::Write,
            || format!("open for {what} {image}"),
            |world| {
                let id = world.ceph.find_id(what, image)?;
                must_be_ours(world, what, &id);
                if let Some(image) = world.ceph.by_id_mut(&id) {
                    image.watchers.insert(address.clone(), Instant::now() + WATCH_TIMEOUT);
                }
                Ok(id)
            },
        )
        .await
    }
}

#[async_trait]
impl Storage for Handle {
    async fn fsid(&self) -> Result<String> {
        Ok(FSID.into())
    }

    async fn image(&self, image: &ImageSpec, snapshot: Option<&str>) -> Result<Option<ImageInfo>> {
        self.ceph(
            Kind::Read,
            || format!("image {image} {snapshot:?}"),
            |world| {
                let Some(found) = world.ceph.find(image) else { return Ok(None) };
                if let Some(snapshot) = snapshot
                    && !found.snaps.iter().any(|s| s.name == snapshot && !s.discarded)
                {
                    return Err(Error::new(
                        format!("open {image}@{snapshot}"),
                        ErrorKind::NotFound,
                        "no such snapshot",
                    ));
                }
                let parent = found.parent.as_ref().and_then(|(id, snap)| {
                    let parent = world.ceph.by_id(id)?;
                    Some(Parent {
                        pool: parent.pool.clone(),
                        namespace: String::new(),
                        image: parent.name.clone().unwrap_or_default(),
                        image_id: id.clone(),
                        snapshot: parent.snaps.iter().find(|s| s.id == *snap)?.name.clone(),
                        overlap: 1 << 30,
                        in_trash: parent.name.is_none(),
                    })
                });
                Ok(Some(ImageInfo {
                    id: found.id.clone(),
                    size: 1 << 30,
                    object_size: 4 << 20,
                    stripe_unit: 4 << 20,
                    stripe_count: 1,
                    features: Features(found.features),
                    flags: 0,
                    parent,
                    snapshots: found
                        .snaps
                        .iter()
                        .filter(|s| !s.discarded)
                        .map(|s| Snapshot { id: s.id, name: s.name.clone(), size: 1 << 30, protected: s.protected })
                        .collect(),
                    data_pool: None,
                    old_format: false,
                }))
            },
        )
        .await
    }

    async fn create_snapshot(&self, image: &ImageSpec, snapshot: &str) -> Result<Change> {
        self.ceph(
            Kind::Write,
            || format!("create snapshot {image}@{snapshot}"),
            |world| {
                let id = world.ceph.find_id("snapshot", image)?;
                if world.ceph.by_id(&id).is_some_and(|i| i.snaps.iter().any(|s| s.name == snapshot && !s.discarded)) {
                    return Ok(Change::AlreadyThere);
                }
                world.ceph.snap(&id, snapshot, false, true);
                let owner = owner_of(world, &id, snapshot);
                if let Some(made) = world.ceph.by_id_mut(&id).and_then(|i| i.snaps.last_mut()) {
                    made.owner = owner;
                }
                Ok(Change::Made)
            },
        )
        .await
    }

    async fn protect_snapshot(&self, image: &ImageSpec, snapshot: &str) -> Result<Change> {
        self.ceph(
            Kind::Write,
            || format!("protect {image}@{snapshot}"),
            |world| {
                let id = world.ceph.find_id("protect", image)?;
                let found = world
                    .ceph
                    .by_id_mut(&id)
                    .and_then(|i| i.snaps.iter_mut().find(|s| s.name == snapshot && !s.discarded));
                let Some(snap) = found else { return Err(missing("protect", image)) };
                if std::mem::replace(&mut snap.protected, true) { Ok(Change::AlreadyThere) } else { Ok(Change::Made) }
            },
        )
        .await
    }

    async fn set_snapshot_tag(&self, image: &ImageSpec, snapshot: &str, tag: &str) -> Result<()> {
        self.ceph(
            Kind::Write,
            || format!("tag snapshot {image}@{snapshot}"),
            |world| {
                if let Some(id) = world.ceph.find(image).map(|i| i.id.clone())
                    && let Some(found) = world.ceph.by_id_mut(&id)
                {
                    found.snapshot_tags.insert(snapshot.into(), tag.into());
                }
                Ok(())
            },
        )
        .await
    }

    async fn snapshot_tag(&self, image: &ImageSpec, snapshot: &str) -> Result<Option<String>> {
        self.ceph(
            Kind::Read,
            || format!("tag of snapshot {image}@{snapshot}"),
            |world| Ok(world.ceph.find(image).and_then(|i| i.snapshot_tags.get(snapshot).cloned())),
        )
        .await
    }

    async fn remove_snapshot_tag(&self, image: &ImageSpec, snapshot: &str) -> Result<Change> {
        self.ceph(
            Kind::Write,
            || format!("untag snapshot {image}@{snapshot}"),
            |world| {
                let id = world.ceph.find(image).map(|i| i.id.clone());
                let removed =
                    id.and_then(|id| world.ceph.by_id_mut(&id)).and_then(|i| i.snapshot_tags.remove(snapshot));
                if removed.is_some() { Ok(Change::Made) } else { Ok(Change::AlreadyThere) }
            },
        )
        .await
    }

    async fn remove_snapshot(&self, image: &ImageSpec, snapshot: &str) -> Result<Change> {
        // several operations, as in librbd: a crash may come between them
        let mut change = Change::AlreadyThere;
        loop {
            let before = change;
            let done = self
                .ceph(
                    Kind::Write,
                    || format!("remove snapshot {image}@{snapshot}"),
                    |world| {
                        let Some(id) = world.ceph.find(image).map(|i| i.id.clone()) else { return Ok(Some(before)) };
                        let half = world.has(Trouble::HalfDone);
                        let named = |i: &Rbd| i.snaps.iter().filter(|s| s.name == snapshot).cloned().collect();
                        let named: Vec<Snap> = world.ceph.by_id(&id).map(named).unwrap_or_default();
                        let Some(snap) = named.iter().min_by_key(|s| s.discarded) else { return Ok(Some(before)) };
                        if !snap.ours {
                            world.violated(format!("removal of the snapshot {image}@{snapshot}, which no daemon made"));
                        }
                        let clones =
                            world.ceph.images.iter().any(|i| i.parent.as_ref() == Some(&(id.clone(), snap.id)));
                        if clones {
                            return Err(Error::new(
                                format!("unprotect {image}@{snapshot}"),
                                ErrorKind::Busy,
                                "has clones",
                            ));
                        }
                        let Some(found) = world.ceph.by_id_mut(&id) else { return Ok(Some(before)) };
                        let Some(this) = found.snaps.iter_mut().find(|s| s.id == snap.id) else {
                            return Ok(Some(before));
                        };
                        if std::mem::take(&mut this.protected) {
                            return Ok(None);
                        }
                        if half && !std::mem::replace(&mut this.discarded, true) {
                            return Ok(None);
                        }
                        found.snaps.retain(|s| s.id != snap.id);
                        at_once::must_not_be_read(world, &id, Some(snap.id));
                        Ok(if named.len() > 1 { None } else { Some(Change::Made) })
                    },
                )
                .await?;
            if let Some(done) = done {
                return Ok(done);
            }
            change = Change::Made;
            self.break_off().await?;
        }
    }

    async fn clone_image(
        &self,
        source: &ImageSpec,
        snapshot: &str,
        destination: &ImageSpec,
        features: Features,
    ) -> Result<()> {
        self.ceph(
            Kind::Write,
            || format!("clone {source}@{snapshot} to {destination}"),
            |world| {
                let id = world.ceph.find_id("clone", source)?;
                let found = world.ceph.by_id(&id).ok_or_else(|| missing("clone", source))?;
                let Some(snap) = found.snaps.iter().find(|s| s.name == snapshot && !s.discarded).cloned() else {
                    return Err(missing("clone", source));
                };
                let metadata = found.metadata.clone();
                if found.name.is_none() {
                    return Err(Error::new("clone", ErrorKind::Unsupported, "the source is in the trash"));
                }
                if !snap.protected {
                    return Err(Error::new("clone", ErrorKind::Other, "the snapshot is not protected"));
                }
                if world.ceph.find(destination).is_some() {
                    return Err(Error::new(format!("clone to {destination}"), ErrorKind::Exists, "exists"));
                }
                let ImageKey::Name(name) = &destination.image else { return Err(missing("clone", destination)) };
                let owner = owner_of(world, &id, snapshot);
                let made = world.ceph.create(&destination.pool, name, 0, true);
                made.parent = Some((id, snap.id));
                made.owner = owner;
                // a clone inherits it
                made.metadata = metadata;
                made.features = features.0;
                Ok(())
            },
        )
        .await
    }

    async fn chain(&self, image: &ImageSpec, snapshot: &str) -> Result<Vec<Link>> {
        self.ceph(
            Kind::Read,
            || format!("chain of {image}@{snapshot}"),
            |world| {
                let id = world.ceph.find_id("open", image)?;
                let found = world.ceph.by_id(&id).filter(|i| i.snaps.iter().any(|s| s.name == snapshot));
                let mut next = found.ok_or_else(|| missing("open snapshot of", image))?.parent.clone();
                let mut links = Vec::new();
                while let Some((image_id, snapshot_id)) = next {
                    next = world.ceph.by_id(&image_id).and_then(|parent| parent.parent.clone());
                    links.push(Link { pool_id: 0, image_id, snapshot_id });
                }
                Ok(links)
            },
        )
        .await
    }

    async fn rebuild_maps(&self, image: &ImageSpec, _progress: &Progress, _cancel: &CancellationToken) -> Result<()> {
        self.ceph(
            Kind::Write,
            || format!("rebuild the maps of {image}"),
            |world| {
                let id = world.ceph.find_id("rebuild the maps of", image)?;
                must_be_ours(world, "rebuilding", &id);
                if let Some(found) = world.ceph.by_id_mut(&id) {
                    found.features = Features::PUBLISHED.0;
                }
                Ok(())
            },
        )
        .await
    }

    async fn finish_removal(&self, image: &ImageSpec) -> Result<Change> {
        self.ceph(
            Kind::Write,
            || format!("finish the removal of {image}"),
            |world| {
                let ImageKey::Name(name) = &image.image else { return Ok(Change::AlreadyThere) };
                let removing = |i: &&Rbd| i.pool == image.pool && i.removing.as_ref() == Some(name);
                let Some(id) = world.ceph.images.iter().find(removing).map(|i| i.id.clone()) else {
                    return Ok(Change::AlreadyThere);
                };
                must_be_ours(world, "removal", &id);
                world.ceph.drop_image(&id);
                Ok(Change::Made)
            },
        )
        .await
    }

    async fn trash(&self, pool: &str) -> Result<Vec<Trashed>> {
        self.ceph(
            Kind::Read,
            || format!("trash of {pool}"),
            |world| {
                let name_of = |image: &Rbd| {
                    let disk = world.cloud.disks.values().find(|disk| disk.rbd == image.id);
                    image.removing.clone().or_else(|| disk.map(|disk| format!("volume-{}", disk.volume.id)))
                };
                let trashed = world.ceph.images.iter().filter(|i| i.pool == pool && i.name.is_none());
                Ok(trashed.map(|i| Trashed { id: i.id.clone(), name: name_of(i).unwrap_or_default() }).collect())
            },
        )
        .await
    }

    async fn in_trash(&self, image: &ImageSpec) -> Result<bool> {
        self.ceph(
            Kind::Read,
            || format!("is {image} in the trash"),
            |world| Ok(world.ceph.find(image).is_some_and(|found| found.name.is_none())),
        )
        .await
    }

    async fn purge(&self, image: &ImageSpec) -> Result<Change> {
        self.ceph(
            Kind::Write,
            || format!("purge {image}"),
            |world| {
                let found = world.ceph.find(image).filter(|found| found.name.is_none() && found.snaps.is_empty());
                let Some(id) = found.map(|found| found.id.clone()) else { return Ok(Change::AlreadyThere) };
                if !world.cloud.disks.values().any(|disk| disk.rbd == id && disk.deleted.is_some()) {
                    world.violated(format!("purge of {image}, which Cinder has not deleted"));
                }
                world.ceph.drop_image(&id);
                Ok(Change::Made)
            },
        )
        .await
    }

    async fn create_like(&self, source: &ImageSpec, snapshot: &str, destination: &ImageSpec) -> Result<()> {
        self.ceph(
            Kind::Write,
            || format!("create {destination} like {source}@{snapshot}"),
            |world| {
                let id = world.ceph.find_id("open", source)?;
                if !world.ceph.by_id(&id).is_some_and(|i| i.snaps.iter().any(|s| s.name == snapshot && !s.discarded)) {
                    return Err(missing("open snapshot of", source));
                }
                if world.ceph.find(destination).is_some() {
                    return Err(Error::new(format!("create {destination}"), ErrorKind::Exists, "exists"));
                }
                let ImageKey::Name(name) = &destination.image else { return Err(missing("create", destination)) };
                let owner = owner_of(world, &id, snapshot);
                world.ceph.create(&destination.pool, name, 0, true).owner = owner;
                Ok(())
            },
        )
        .await
    }

    async fn flatten(&self, image: &ImageSpec, progress: &Progress, cancel: &CancellationToken) -> Result<Moved> {
        let id = self.open("flatten", image).await?;
        self.long("flatten", &id, progress, cancel, false).await?;
        let address = self.node.address();
        self.ceph(
            Kind::Write,
            || format!("flattened {image}"),
            |world| {
                let Some(found) = world.ceph.by_id(&id) else { return Err(missing("flatten", image)) };
                let content = world.ceph.content(found);
                if let Some(found) = world.ceph.by_id_mut(&id) {
                    found.content = content;
                    found.parent = None;
                    found.watchers.remove(&address);
                }
                Ok(Moved { bytes: 1 << 20, through_host: 1 << 20, objects: 1 })
            },
        )
        .await
    }

    async fn copy(
        &self,
        source: &ImageSpec,
        snapshot: &str,
        destination: &ImageSpec,
        _limits: &TransferLimits,
        progress: &Progress,
        cancel: &CancellationToken,
    ) -> Result<Moved> {
        let id = self.open("copy", destination).await?;
        self.long("copy", &id, progress, cancel, true).await?;
        let address = self.node.address();
        self.ceph(
            Kind::Write,
            || format!("copied {source}@{snapshot} to {destination}"),
            |world| {
                let Some(from) = world.ceph.find(source) else { return Err(missing("copy", source)) };
                let Some(snap) = from.snaps.iter().find(|s| s.name == snapshot && !s.discarded) else {
                    return Err(missing("copy snapshot of", source));
                };
                let content = snap.content;
                let rate = world.faults.spoiled;
                let spoiled = world.dice.chance(rate);
                let Some(to) = world.ceph.by_id_mut(&id) else { return Err(missing("copy", destination)) };
                to.content = if spoiled { 0 } else { content };
                to.watchers.remove(&address);
                Ok(Moved { bytes: 1 << 20, through_host: 2 << 20, objects: 1 })
            },
        )
        .await
    }

    async fn fill(
        &self,
        source: &ImageSpec,
        snapshot: &str,
        destination: &ImageSpec,
        _limits: &TransferLimits,
        progress: &Progress,
        cancel: &CancellationToken,
    ) -> Result<Moved> {
        {
            let mut world = self.world().lock();
            let rate = world.faults.unsupported;
            if world.dice.chance(rate) {
                return Err(Error::new(format!("fill from {source}@{snapshot}"), ErrorKind::Unsupported, "not here"));
            }
        }
        let id = self.open("fill", destination).await?;
        self.long("fill", &id, progress, cancel, true).await?;
        Ok(Moved { bytes: 1 << 20, through_host: 1, objects: 1 })
    }

    async fn fill_published(
        &self,
        image: &ImageSpec,
        from: FillState,
        _limits: &TransferLimits,
        progress: &Progress,
        cancel: &CancellationToken,
        saved: &(dyn Fn(FillState) + Send + Sync),
    ) -> Result<Moved> {
        self.fill_objects(image, from, progress, cancel, saved).await
    }

    async fn detach(
        &self,
        image: &ImageSpec,
        _limits: &TransferLimits,
        progress: &Progress,
        cancel: &CancellationToken,
    ) -> Result<Moved> {
        self.detach_image(image, progress, cancel).await
    }

    async fn is_gone(&self, image: &ImageSpec) -> Result<bool> {
        self.ceph(Kind::Read, || format!("is {image} gone"), |world| Ok(world.ceph.find(image).is_none())).await
    }

    async fn sweep_objects(
        &self,
        image: &ImageSpec,
        _objects: u64,
        _data_pool: Option<&str>,
        _limits: &TransferLimits,
        _progress: &Progress,
        _cancel: &CancellationToken,
    ) -> Result<u64> {
        self.sweep(image).await
    }

    async fn compare(
        &self,
        source: &ImageSpec,
        snapshot: &str,
        destination: &ImageSpec,
        extent: Compare,
        _progress: &Progress,
        _cancel: &CancellationToken,
    ) -> Result<Option<u64>> {
        self.ceph(
            Kind::Read,
            || format!("compare {extent:?} {source}@{snapshot} with {destination}"),
            |world| {
                let Some(from) = world.ceph.find(source) else { return Err(missing("compare", source)) };
                let Some(snap) = from.snaps.iter().find(|s| s.name == snapshot && !s.discarded) else {
                    return Err(missing("compare snapshot of", source));
                };
                let Some(to) = world.ceph.find(destination) else { return Err(missing("compare", destination)) };
                Ok((world.ceph.content(to) != snap.content).then_some(0))
            },
        )
        .await
    }

    async fn read(&self, image: &ImageSpec, _offset: u64, length: usize) -> Result<Vec<u8>> {
        self.ceph(
            Kind::Read,
            || format!("read {image}"),
            |world| {
                let Some(found) = world.ceph.find(image) else { return Err(missing("read", image)) };
                let content = world.ceph.content(found);
                let mut bytes = vec![0; length.min(4096)];
                if world.ceph.containers.contains(&content) {
                    bytes[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
                }
                Ok(bytes)
            },
        )
        .await
    }

    async fn rename(&self, image: &ImageSpec, name: &str) -> Result<()> {
        let mut opened: Option<String> = None;
        // `rbd_id.<new>`, the directory, `rbd_id.<old>`: a crash may come between them
        loop {
            let opened = &mut opened;
            let done = self
                .ceph(
                    Kind::Write,
                    || format!("rename {image} to {name}"),
                    |world| {
                        let half = world.has(Trouble::HalfDone);
                        let mut first = opened.is_none();
                        let id = match opened.take() {
                            Some(id) => id,
                            None => world.ceph.find_id("rename", image)?,
                        };
                        *opened = Some(id.clone());
                        if let (true, Some(other)) = (first, world.ceph.named(&image.pool, name)) {
                            if other.id != id {
                                let operation = format!("rename {image} to {name}");
                                return Err(Error::new(operation, ErrorKind::Exists, "exists"));
                            }
                            // it broke off before, and is finished
                            first = false;
                        }
                        must_be_ours(world, "rename", &id);
                        must_not_be_active(world, "rename", &id);
                        let Some(found) = world.ceph.by_id_mut(&id) else { return Err(missing("rename", image)) };
                        if half && first {
                            found.alias = Some(name.into());
                            return Ok(false);
                        }
                        if half && found.name.as_deref() != Some(name) {
                            found.alias = found.name.replace(name.into());
                            return Ok(false);
                        }
                        found.alias = None;
                        found.name = Some(name.into());
                        Ok(true)
                    },
                )
                .await?;
            if done {
                return Ok(());
            }
            self.break_off().await?;
        }
    }

    async fn remove_image(&self, image: &ImageSpec) -> Result<Change> {
        let mut opened: Option<String> = None;
        // the snapshots, the move to the trash, the data, the trash: a crash may come between them
        let half = self.world().lock().has(Trouble::HalfDone);
        let steps: &[u8] = if half { &[0, 1, 2, 3] } else { &[0, 3] };
        for step in steps {
            let opened = &mut opened;
            let done = self
                .ceph(
                    Kind::Write,
                    || format!("remove {image} step={step}"),
                    |world| {
                        let found = match (opened.clone(), &image.image) {
                            // librbd has it open by now
                            (Some(id), _) => world.ceph.by_id(&id).map(|i| i.id.clone()),
                            (None, ImageKey::Name(name)) => {
                                let removing = |i: &&Rbd| i.pool == image.pool && i.removing.as_ref() == Some(name);
                                let named = world.ceph.find(image);
                                named.or_else(|| world.ceph.images.iter().find(removing)).map(|i| i.id.clone())
                            }
                            (None, ImageKey::Id(_)) => world.ceph.find(image).map(|i| i.id.clone()),
                        };
                        let Some(id) = found else { return Ok(Some(Change::AlreadyThere)) };
                        *opened = Some(id.clone());
                        must_be_ours(world, "removal", &id);
                        if let (ImageKey::Name(name), Some(found)) = (&image.image, world.ceph.by_id_mut(&id))
                            && found.alias.as_ref() == Some(name)
                        {
                            // the second name, which a rename left behind
                            found.alias = None;
                            return Ok(Some(Change::Made));
                        }
                        must_not_be_active(world, "removal", &id);
                        let now = Instant::now();
                        let blocked = world.ceph.blocklist.clone();
                        let watched = world.ceph.by_id(&id).is_some_and(|i| {
                            i.watchers.iter().any(|(client, until)| *until > now && !blocked.contains(client))
                        });
                        if watched || world.ceph.has_clones(&id) {
                            return Err(Error::new(format!("remove {image}"), ErrorKind::Busy, "is in use"));
                        }
                        let Some(found) = world.ceph.by_id_mut(&id) else { return Ok(Some(Change::AlreadyThere)) };
                        match step {
                            0 if half => found.snaps.clear(),
                            1 => found.removing = found.name.take().or(found.removing.take()),
                            0 | 2 => {
                                found.snaps.clear();
                                found.content = 0;
                                found.parent = None;
                            }
                            _ => {
                                world.ceph.drop_image(&id);
                                at_once::must_not_be_read(world, &id, None);
                                return Ok(Some(Change::Made));
                            }
                        }
                        Ok(None)
                    },
                )
                .await?;
            if let Some(change) = done {
                return Ok(change);
            }
            self.break_off().await?;
        }
        Ok(Change::Made)
    }

    async fn metadata(&self, image: &ImageSpec, key: &str) -> Result<Option<String>> {
        self.ceph(
            Kind::Read,
            || format!("metadata {image} {key}"),
            |world| Ok(world.ceph.find(image).and_then(|i| i.metadata.get(key).cloned())),
        )
        .await
    }

    async fn set_metadata(&self, image: &ImageSpec, key: &str, value: &str) -> Result<()> {
        self.ceph(
            Kind::Write,
            || format!("set metadata {image} {key}={value}"),
            |world| {
                let id = world.ceph.find_id("set metadata of", image)?;
                must_be_ours(world, "marking", &id);
                if let Some(found) = world.ceph.by_id_mut(&id) {
                    found.metadata.insert(key.into(), value.into());
                }
                Ok(())
            },
        )
        .await
    }

    async fn replace_metadata(&self, image: &ImageSpec, metadata: &[(String, String)]) -> Result<()> {
        // the keys are set before the others go: a crash may come between them
        for (key, value) in metadata {
            self.set_metadata(image, key, value).await?;
        }
        self.ceph(
            Kind::Write,
            || format!("strip {image} to {metadata:?}"),
            |world| {
                let id = world.ceph.find_id("replace the metadata of", image)?;
                must_be_ours(world, "stripping", &id);
                if let Some(found) = world.ceph.by_id_mut(&id) {
                    found.metadata.retain(|key, _| metadata.iter().any(|(wanted, _)| wanted == key));
                }
                Ok(())
            },
        )
        .await
    }

    async fn remove_metadata(&self, image: &ImageSpec, key: &str) -> Result<Change> {
        self.ceph(
            Kind::Write,
            || format!("remove metadata {image} {key}"),
            |world| {
                let Some(id) = world.ceph.find(image).map(|i| i.id.clone()) else { return Ok(Change::AlreadyThere) };
                must_be_ours(world, "unmarking", &id);
                let removed = world.ceph.by_id_mut(&id).and_then(|i| i.metadata.remove(key));
                if removed.is_some() { Ok(Change::Made) } else { Ok(Change::AlreadyThere) }
            },
        )
        .await
    }

    async fn images(&self, pool: &str, prefix: &str) -> Result<Vec<String>> {
        self.list_slowly().await;
        self.ceph(
            Kind::Read,
            || format!("images of {pool}"),
            |world| {
                let names = world.ceph.images.iter().filter(|i| i.pool == pool).filter_map(|i| i.name.clone());
                Ok(names.filter(|name| name.starts_with(prefix)).collect())
            },
        )
        .await
    }

    async fn snapshots(
        &self,
        pool: &str,
        prefix: &str,
        _pace: u32,
        after: Option<&str>,
        _most: usize,
    ) -> Result<SnapshotPage> {
        self.list_slowly().await;
        // one image at a time, so that the cursor is followed
        self.ceph(
            Kind::Read,
            || format!("snapshots of {pool}"),
            |world| {
                let (mut found, mut owned) = (Vec::new(), Vec::new());
                let images = world.ceph.images.iter().filter(|i| i.pool == pool);
                let rest = images.filter(|i| after.is_none_or(|after| i.id.as_str() > after));
                let first = rest.min_by(|one, other| one.id.cmp(&other.id));
                let next = first.map(|image| image.id.clone());
                if let Some(image) = first {
                    let spec = match &image.name {
                        Some(name) => ImageSpec::named(pool, name),
                        None => ImageSpec::with_id(pool, &image.id),
                    };
                    let names = image.snaps.iter().map(|snap| &snap.name).chain(image.snapshot_tags.keys());
                    let names: BTreeSet<&String> = names.filter(|name| name.starts_with(prefix)).collect();
                    found.extend(names.into_iter().map(|name| (spec.clone(), name.clone())));
                    owned.extend(image.metadata.get(OWNER_KEY).map(|owner| (spec, owner.clone())));
                }
                Ok(SnapshotPage { found, owned, failed: Vec::new(), next })
            },
        )
        .await
    }

    async fn address(&self) -> Result<String> {
        Ok(self.node.address())
    }

    async fn fence(&self, address: &str) -> Result<Change> {
        self.ceph(
            Kind::Write,
            || format!("fence {address}"),
            |world| {
                let refused = world.fences_refused_until.is_some_and(|until| until > Instant::now());
                if !refused || self.node.name == address.split(':').next().unwrap_or_default() {
                    promises::fenced(world, &self.node.name, address);
                }
                if refused {
                    return Err(Error::new(format!("fence {address}"), ErrorKind::PermissionDenied, "not allowed"));
                }
                if world.ceph.blocklist.insert(address.into()) { Ok(Change::Made) } else { Ok(Change::AlreadyThere) }
            },
        )
        .await
    }

    async fn reconnect(&self) -> Result<Change> {
        self.node.pass().await;
        Ok(if self.node.reconnect() { Change::Made } else { Change::AlreadyThere })
    }
}

#[async_trait]
impl StoragePool for Handle {
    async fn take(&self) -> Result<Box<dyn Lent>> {
        self.node.pass().await;
        Ok(Box::new(LentHandle { handle: Handle { node: Node::of_job(&self.node) }, control: self.clone() }))
    }

    fn is_fenced(&self) -> bool {
        self.node.is_fenced()
    }

    async fn reconnect(&self) -> Result<Change> {
        Storage::reconnect(self).await
    }
}

/// A client that one job uses.
struct LentHandle {
    handle: Handle,
    control: Handle,
}

#[async_trait]
impl Lent for LentHandle {
    fn storage(&self) -> Arc<dyn Storage> {
        Arc::new(Lasting(self.handle.clone()))
    }

    fn is_busy(&self) -> bool {
        self.handle.node.calls.load(Ordering::SeqCst) > 0
    }

    fn is_fenced(&self) -> bool {
        self.handle.node.is_fenced()
    }

    fn give_back(self: Box<Self>) {
        self.handle.node.give_back();
    }

    async fn give_up(self: Box<Self>) -> Result<()> {
        self.control.fence(&self.handle.node.address()).await.map(drop)
    }
}

#[async_trait]
impl Objects for Handle {
    async fn read(&self, object: &str) -> Result<Option<(Vec<u8>, Version)>> {
        self.ceph(
            Kind::Read,
            || format!("read {object}"),
            |world| Ok(world.ceph.objects.get(object).map(|o| (o.data.clone(), Version(o.version)))),
        )
        .await
    }

    async fn create(&self, object: &str, data: &[u8]) -> Result<Version> {
        self.ceph(
            Kind::Write,
            || format!("create {object}"),
            |world| {
                if world.ceph.objects.contains_key(object) {
                    return Err(Error::new(format!("create {object}"), ErrorKind::Exists, "exists"));
                }
                let version = world.ceph.next();
                world.ceph.objects.insert(object.into(), Object { data: data.into(), version, ..Object::default() });
                Ok(Version(version))
            },
        )
        .await
    }

    async fn replace(&self, object: &str, data: &[u8], version: Version, lock: Option<&LockKey>) -> Result<Version> {
        self.replace_and_remove_keys(object, data, version, lock, &[]).await
    }

    async fn read_with_keys(&self, object: &str) -> Result<Option<KeyedObject>> {
        self.ceph(
            Kind::Read,
            || format!("read {object}"),
            |world| {
                Ok(world.ceph.objects.get(object).map(|found| KeyedObject {
                    data: found.data.clone(),
                    keys: found.omap.iter().map(|(key, value)| (key.clone(), value.clone())).collect(),
                    version: Version(found.version),
                }))
            },
        )
        .await
    }

    async fn replace_and_remove_keys(
        &self,
        object: &str,
        data: &[u8],
        version: Version,
        lock: Option<&LockKey>,
        keys: &[String],
    ) -> Result<Version> {
        let client = self.node.address();
        self.ceph(
            Kind::Write,
            || format!("replace {object} {} -{keys:?}", brief(data)),
            |world| {
                let next = world.ceph.next();
                let found = world.ceph.object("replace", object)?;
                Cluster::check_lock(found, lock, &client)?;
                let before = found.data.clone();
                if found.version != version.0 {
                    return Err(Error::new(format!("replace {object}"), ErrorKind::Conflict, "another version"));
                }
                found.data = data.into();
                found.omap.retain(|key, _| !keys.contains(key));
                found.version = next;
                promises::written(world, &before, data);
                Ok(Version(next))
            },
        )
        .await
    }

    async fn change_keys(
        &self,
        object: &str,
        set: &[(String, Vec<u8>)],
        removed: &[String],
        version: Version,
    ) -> Result<Version> {
        self.ceph(
            Kind::Write,
            || format!("change keys {object} {:?} -{removed:?}", set.iter().map(|(key, _)| key).collect::<Vec<_>>()),
            |world| {
                let next = world.ceph.next();
                let found = world.ceph.object("change keys", object)?;
                if found.version != version.0 {
                    return Err(Error::new(format!("change keys {object}"), ErrorKind::Conflict, "another version"));
                }
                found.omap.retain(|key, _| !removed.contains(key));
                found.omap.extend(set.iter().cloned());
                found.version = next;
                Ok(Version(next))
            },
        )
        .await
    }

    async fn remove(&self, object: &str, version: Version, lock: Option<&LockKey>) -> Result<()> {
        let client = self.node.address();
        self.ceph(
            Kind::Write,
            || format!("remove {object}"),
            |world| {
                let found = world.ceph.object("remove", object)?;
                Cluster::check_lock(found, lock, &client)?;
                if found.version != version.0 {
                    return Err(Error::new(format!("remove {object}"), ErrorKind::Conflict, "another version"));
                }
                world.ceph.objects.remove(object);
                Ok(())
            },
        )
        .await
    }

    async fn lock(&self, object: &str, lock: &LockKey, _description: &str, duration: Duration) -> Result<Locked> {
        let client = self.node.address();
        let until = Instant::now() + duration;
        self.ceph(
            Kind::Write,
            || format!("lock {object} {}", lock.cookie),
            |world| {
                let next = world.ceph.next();
                let Some(found) = world.ceph.objects.get_mut(object) else { return Ok(Locked::NoObject) };
                let now = Instant::now();
                if let Some((cookie, holder, until)) = found.locks.get(&lock.name)
                    && *until > now
                    && (*cookie != lock.cookie || *holder != client)
                {
                    return Ok(Locked::Held);
                }
                found.locks.insert(lock.name.clone(), (lock.cookie.clone(), client.clone(), now + duration));
                found.version = next;
                world.ceph.leases.insert((client, object.to_owned()), until);
                Ok(Locked::Acquired)
            },
        )
        .await
    }

    async fn renew(&self, object: &str, lock: &LockKey, _description: &str, duration: Duration) -> Result<()> {
        let client = self.node.address();
        let until = Instant::now() + duration;
        self.ceph(
            Kind::Write,
            || format!("renew {object} {}", lock.cookie),
            |world| {
                let next = world.ceph.next();
                let found = world.ceph.object("renew", object)?;
                Cluster::check_lock(found, Some(lock), &client)?;
                found.locks.insert(lock.name.clone(), (lock.cookie.clone(), client.clone(), Instant::now() + duration));
                found.version = next;
                world.ceph.leases.insert((client, object.to_owned()), until);
                Ok(())
            },
        )
        .await
    }

    async fn unlock(&self, object: &str, lock: &LockKey) -> Result<Change> {
        let client = self.node.address();
        self.ceph(
            Kind::Write,
            || format!("unlock {object} {}", lock.cookie),
            |world| {
                let next = world.ceph.next();
                let Some(found) = world.ceph.objects.get_mut(object) else { return Ok(Change::AlreadyThere) };
                if Cluster::check_lock(found, Some(lock), &client).is_err() {
                    return Ok(Change::AlreadyThere);
                }
                found.locks.remove(&lock.name);
                found.version = next;
                Ok(Change::Made)
            },
        )
        .await
    }

    async fn is_locked(&self, object: &str, lock_name: &str) -> Result<bool> {
        self.ceph(
            Kind::Read,
            || format!("is locked {object}"),
            |world| {
                let now = Instant::now();
                let found = world.ceph.objects.get(object).and_then(|o| o.locks.get(lock_name));
                Ok(found.is_some_and(|(_, _, until)| *until > now))
            },
        )
        .await
    }

    async fn omap(&self, object: &str, after: &str, max: usize) -> Result<Vec<(String, Vec<u8>)>> {
        self.ceph(
            Kind::Read,
            || format!("omap {object}"),
            |world| {
                let Some(found) = world.ceph.objects.get(object) else { return Ok(Vec::new()) };
                let entries = found.omap.iter().filter(|(key, _)| key.as_str() > after).take(max);
                Ok(entries.map(|(key, value)| (key.clone(), value.clone())).collect())
            },
        )
        .await
    }

    async fn set_omap(&self, object: &str, entries: &[(String, Vec<u8>)]) -> Result<()> {
        self.ceph(
            Kind::Write,
            || format!("set omap {object} {}", entries.len()),
            |world| {
                let next = world.ceph.next();
                let found = world.ceph.objects.entry(object.into()).or_default();
                found.omap.extend(entries.iter().cloned());
                found.version = next;
                Ok(())
            },
        )
        .await
    }

    async fn remove_omap(&self, object: &str, keys: &[String]) -> Result<()> {
        self.ceph(
            Kind::Write,
            || format!("remove omap {object} {keys:?}"),
            |world| {
                let next = world.ceph.next();
                if let Some(found) = world.ceph.objects.get_mut(object) {
                    found.omap.retain(|key, _| !keys.contains(key));
                    found.version = next;
                }
                Ok(())
            },
        )
        .await
    }

    async fn list(&self) -> Result<Vec<String>> {
        self.ceph(Kind::Read, || "list objects".into(), |world| Ok(world.ceph.objects.keys().cloned().collect())).await
    }
}

/// A job record for the trace.
fn brief(data: &[u8]) -> String {
    let Ok(record) = crate::job::record::Record::parse(data) else { return String::new() };
    format!(
        "{} made={:?} {:?} outcome={:?} attempts={} retried={} owner={:?}",
        record.state,
        record.artifacts,
        record.registration,
        record.outcome.map(|outcome| outcome.state),
        record.attempts,
        record.retried,
        record.owner_address
    )
}
