//! The simulated Ceph cluster: images whose bytes are one number, objects with versions and locks, the blocklist.

use std::collections::{BTreeMap, BTreeSet};

use tokio::time::Instant;

use super::at_once::{AtOnce, CutOff};
use crate::ceph::{Error, ErrorKind, Features, ImageKey, ImageSpec, Result};

pub const FSID: &str = "c0ffee00-0000-4000-8000-000000000001";

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snap {
    pub id: u64,
    pub name: String,
    pub content: u64,
    pub protected: bool,
    /// A daemon made it.
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
    /// A daemon made it.
    pub ours: bool,
    /// Clients that have it open for writing.
    pub watchers: BTreeMap<String, Instant>,
    /// Clients that died while they had it open, and whose watch stayed: until when it would have lasted.
    pub dead_watchers: BTreeMap<String, Instant>,
    pub features: u64,
    /// From its parent, by a daemon.
    pub cut_off: Option<CutOff>,
}

/// A RADOS object.
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

impl Rbd {
    pub fn snapshot(&self, name: &str) -> Option<&Snap> {
        self.snaps.iter().find(|s| s.name == name && !s.discarded)
    }
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
            dead_watchers: BTreeMap::new(),
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

    pub fn find_id(&self, what: &str, spec: &ImageSpec) -> Result<String> {
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
}

pub fn missing(what: &str, spec: &ImageSpec) -> Error {
    Error::new(format!("{what} {spec}"), ErrorKind::NotFound, "no such image")
}
