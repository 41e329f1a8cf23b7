//! The rules of RBD images: what the operations of librbd do, and when they refuse. Where a call is several operations,
//! each is a function of its own, since a crash may come between them.

use tokio::time::Instant;

use super::at_once::CutOff;
use super::cluster::{Cluster, Rbd, Snap, missing};
use crate::ceph::{
    Changed, Error, ErrorKind, Features, ImageInfo, ImageKey, ImageSpec, Link, Parent, Result, Snapshot,
};

pub fn gone(what: &str, image: &ImageSpec) -> Error {
    Error::new(format!("{what} {image}"), ErrorKind::NotFound, "the image is gone")
}

fn name_of<'a>(what: &str, image: &'a ImageSpec) -> Result<&'a str> {
    match &image.image {
        ImageKey::Name(name) => Ok(name),
        ImageKey::Id(_) => Err(missing(what, image)),
    }
}

impl Cluster {
    pub fn info(&self, image: &ImageSpec, snapshot: Option<&str>) -> Result<Option<ImageInfo>> {
        let Some(found) = self.find(image) else { return Ok(None) };
        if let Some(snapshot) = snapshot
            && found.snapshot(snapshot).is_none()
        {
            return Err(Error::new(format!("open {image}@{snapshot}"), ErrorKind::NotFound, "no such snapshot"));
        }
        let parent = found.parent.as_ref().and_then(|(id, snap)| {
            let parent = self.by_id(id)?;
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
    }

    /// A client opens the image for writing.
    pub fn watch(&mut self, id: &str, client: &str, until: Instant) {
        if let Some(image) = self.by_id_mut(id) {
            image.watchers.insert(client.to_owned(), until);
        }
    }

    pub fn unwatch(&mut self, id: &str, client: &str) {
        if let Some(image) = self.by_id_mut(id) {
            image.watchers.remove(client);
        }
    }

    /// A client opens the image for writing that is dead by then: nothing ends its watch.
    pub fn leave_dead_watch(&mut self, id: &str, client: &str, until: Instant) {
        if let Some(image) = self.by_id_mut(id) {
            image.dead_watchers.insert(client.to_owned(), until);
        }
    }

    /// The cluster looks again at who has the image open: a fenced client has not, and any other has not in the end.
    pub fn forget_dead_watches(&mut self, id: &str) {
        let (fenced, now) = (&self.blocklist, Instant::now());
        if let Some(image) = self.images.iter_mut().find(|image| image.id == id) {
            image.dead_watchers.retain(|client, until| *until > now && !fenced.contains(client));
        }
    }

    /// Whether a client that is not fenced has the image open, a dead one's watch stayed, or it has clones.
    pub fn is_in_use(&self, id: &str) -> bool {
        let now = Instant::now();
        let is_live = |(client, until): (&String, &Instant)| *until > now && !self.blocklist.contains(client);
        let is_open = |image: &Rbd| !image.dead_watchers.is_empty() || image.watchers.iter().any(is_live);
        self.by_id(id).is_some_and(is_open) || self.has_clones(id)
    }

    /// A daemon makes a snapshot of what that project owns.
    pub fn create_snapshot(&mut self, id: &str, name: &str, owner: Option<String>) -> Changed {
        if self.by_id(id).is_some_and(|image| image.snapshot(name).is_some()) {
            return Changed::No;
        }
        self.snap(id, name, false, true);
        if let Some(made) = self.by_id_mut(id).and_then(|image| image.snaps.last_mut()) {
            made.owner = owner;
        }
        Changed::Yes
    }

    pub fn protect(&mut self, image: &ImageSpec, snapshot: &str) -> Result<Changed> {
        let id = self.find_id("protect", image)?;
        let found = self.by_id_mut(&id).into_iter().flat_map(|i| &mut i.snaps);
        let Some(snap) = found.into_iter().find(|s| s.name == snapshot && !s.discarded) else {
            return Err(missing("protect", image));
        };
        Ok(if std::mem::replace(&mut snap.protected, true) { Changed::No } else { Changed::Yes })
    }

    pub fn tag_snapshot(&mut self, image: &ImageSpec, snapshot: &str, tag: &str) {
        if let Some(id) = self.find(image).map(|i| i.id.clone())
            && let Some(found) = self.by_id_mut(&id)
        {
            found.snapshot_tags.insert(snapshot.into(), tag.into());
        }
    }

    pub fn untag_snapshot(&mut self, image: &ImageSpec, snapshot: &str) -> Changed {
        let id = self.find(image).map(|i| i.id.clone());
        let removed = id.and_then(|id| self.by_id_mut(&id)).and_then(|i| i.snapshot_tags.remove(snapshot));
        if removed.is_some() { Changed::Yes } else { Changed::No }
    }

    /// The image, and its snapshot of that name: one whose removal broke off only where there is no other.
    pub fn snapshot_to_remove(&self, image: &ImageSpec, snapshot: &str) -> Option<(String, Snap)> {
        let image = self.find(image)?;
        let snap = image.snaps.iter().filter(|s| s.name == snapshot).min_by_key(|s| s.discarded)?;
        Some((image.id.clone(), snap.clone()))
    }

    /// One operation of a snapshot's removal. Returns whether the snapshot is gone.
    pub fn remove_snapshot_step(&mut self, image: &ImageSpec, id: &str, snap: &Snap, by_halves: bool) -> Result<bool> {
        if self.images.iter().any(|i| i.parent.as_ref() == Some(&(id.to_owned(), snap.id))) {
            return Err(Error::new(format!("unprotect {image}@{}", snap.name), ErrorKind::Busy, "has clones"));
        }
        let Some(found) = self.by_id_mut(id) else { return Ok(true) };
        if let Some(this) = found.snaps.iter_mut().find(|s| s.id == snap.id) {
            if std::mem::take(&mut this.protected) {
                return Ok(false);
            }
            if by_halves && !std::mem::replace(&mut this.discarded, true) {
                return Ok(false);
            }
        }
        found.snaps.retain(|s| s.id != snap.id);
        Ok(true)
    }

    /// A daemon makes a clone of what that project owns.
    pub fn clone_image(
        &mut self,
        source: &ImageSpec,
        snapshot: &str,
        destination: &ImageSpec,
        features: Features,
        owner: Option<String>,
    ) -> Result<()> {
        let found = self.find(source).ok_or_else(|| missing("clone", source))?;
        let Some(snap) = found.snapshot(snapshot) else { return Err(missing("clone", source)) };
        let (link, metadata) = ((found.id.clone(), snap.id), found.metadata.clone());
        if found.name.is_none() {
            return Err(Error::new("clone", ErrorKind::Unsupported, "the source is in the trash"));
        }
        if !snap.protected {
            return Err(Error::new("clone", ErrorKind::Other, "the snapshot is not protected"));
        }
        if self.find(destination).is_some() {
            return Err(Error::new(format!("clone to {destination}"), ErrorKind::Exists, "exists"));
        }
        let made = self.create(&destination.pool, name_of("clone", destination)?, 0, true);
        made.parent = Some(link);
        made.owner = owner;
        // a clone inherits it
        made.metadata = metadata;
        made.features = features.0;
        Ok(())
    }

    pub fn chain(&self, image: &ImageSpec, snapshot: &str) -> Result<Vec<Link>> {
        let found = self.find(image).ok_or_else(|| missing("open", image))?;
        if !found.snaps.iter().any(|s| s.name == snapshot) {
            return Err(missing("open snapshot of", image));
        }
        let links = self.chain_of(found).into_iter();
        Ok(links.map(|(image_id, snapshot_id)| Link { pool_id: 0, image_id, snapshot_id }).collect())
    }

    pub fn rebuild_maps(&mut self, id: &str) {
        if let Some(found) = self.by_id_mut(id) {
            found.features = Features::PUBLISHED.0;
        }
    }

    /// The image of that name whose removal has moved it to the trash.
    pub fn being_removed(&self, image: &ImageSpec) -> Option<&Rbd> {
        let ImageKey::Name(name) = &image.image else { return None };
        self.images.iter().find(|i| i.pool == image.pool && i.removing.as_ref() == Some(name))
    }

    /// A daemon makes an image for the bytes of that snapshot.
    pub fn create_like(
        &mut self,
        source: &ImageSpec,
        snapshot: &str,
        destination: &ImageSpec,
        owner: Option<String>,
        features: Features,
    ) -> Result<()> {
        let found = self.find(source).ok_or_else(|| missing("open", source))?;
        if found.snapshot(snapshot).is_none() {
            return Err(missing("open snapshot of", source));
        }
        if self.find(destination).is_some() {
            return Err(Error::new(format!("create {destination}"), ErrorKind::Exists, "exists"));
        }
        let made = self.create(&destination.pool, name_of("create", destination)?, 0, true);
        (made.owner, made.features) = (owner, features.0);
        Ok(())
    }

    /// The end of a flatten.
    pub fn flatten(&mut self, id: &str, image: &ImageSpec, client: &str) -> Result<()> {
        let Some(found) = self.by_id(id) else { return Err(missing("flatten", image)) };
        let content = self.content(found);
        if let Some(found) = self.by_id_mut(id) {
            found.content = content;
            found.parent = None;
            found.watchers.remove(client);
        }
        Ok(())
    }

    /// What a call reads at a snapshot.
    pub fn content_at(&self, what: &str, source: &ImageSpec, snapshot: &str) -> Result<u64> {
        let Some(from) = self.find(source) else { return Err(missing(what, source)) };
        let snap = from.snapshot(snapshot).ok_or_else(|| missing(&format!("{what} snapshot of"), source))?;
        Ok(snap.content)
    }

    /// The end of a copy: a client has written that into the image.
    pub fn write(&mut self, id: &str, image: &ImageSpec, content: u64, client: &str) -> Result<()> {
        let Some(to) = self.by_id_mut(id) else { return Err(missing("copy", image)) };
        to.content = content;
        to.watchers.remove(client);
        Ok(())
    }

    pub fn read_header(&self, image: &ImageSpec, length: usize) -> Result<Vec<u8>> {
        let Some(found) = self.find(image) else { return Err(missing("read", image)) };
        let content = self.content(found);
        let mut bytes = vec![0; length.min(4096)];
        if self.containers.contains(&content) {
            bytes[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
        }
        Ok(bytes)
    }

    /// Whether the name is free for the image. An error: another image has it. `false`: a rename to it broke off.
    pub fn is_free_for(&self, id: &str, image: &ImageSpec, name: &str) -> Result<bool> {
        match self.named(&image.pool, name) {
            Some(other) if other.id != id => {
                Err(Error::new(format!("rename {image} to {name}"), ErrorKind::Exists, "exists"))
            }
            other => Ok(other.is_none()),
        }
    }

    /// One operation of a rename: `rbd_id.<new>`, the directory, `rbd_id.<old>`. Returns whether it is over.
    pub fn rename_step(&mut self, id: &str, name: &str, is_first: bool, by_halves: bool) -> bool {
        let Some(found) = self.by_id_mut(id) else { return true };
        if by_halves && is_first {
            found.alias = Some(name.into());
            return false;
        }
        if by_halves && found.name.as_deref() != Some(name) {
            found.alias = found.name.replace(name.into());
            return false;
        }
        found.alias = None;
        found.name = Some(name.into());
        true
    }

    /// What a removal means by that name or id.
    pub fn image_to_remove(&self, image: &ImageSpec) -> Option<String> {
        self.find(image).or_else(|| self.being_removed(image)).map(|i| i.id.clone())
    }

    /// Removes the second name of an image, which a rename left behind. `false`: it is not that.
    pub fn remove_alias(&mut self, id: &str, image: &ImageSpec) -> bool {
        let ImageKey::Name(name) = &image.image else { return false };
        let found = self.by_id_mut(id).filter(|found| found.alias.as_ref() == Some(name));
        found.is_some_and(|found| found.alias.take().is_some())
    }

    /// One operation of an image's removal: the snapshots, the move to the trash, the data, the trash. Returns whether
    /// the image is gone.
    pub fn remove_step(&mut self, id: &str, step: u8, by_halves: bool) -> bool {
        let Some(found) = self.by_id_mut(id) else { return true };
        match step {
            0 if by_halves => found.snaps.clear(),
            1 => found.removing = found.name.take().or(found.removing.take()),
            0 | 2 => {
                found.snaps.clear();
                found.content = 0;
                found.parent = None;
            }
            _ => {
                self.drop_image(id);
                return true;
            }
        }
        false
    }

    pub fn remove_metadata(&mut self, id: &str, key: &str) -> Changed {
        let removed = self.by_id_mut(id).and_then(|i| i.metadata.remove(key));
        if removed.is_some() { Changed::Yes } else { Changed::No }
    }

    /// An object of the fill is written. Returns whether the image is there: if not, the object belongs to none.
    pub fn fill_object(&mut self, id: &str, object: u64) -> bool {
        let is_there = self.by_id(id).is_some();
        if !is_there {
            self.at_once.orphans.insert((id.to_owned(), object));
        }
        is_there
    }

    /// The first half of a detach: the image has all its bytes, and no parent.
    pub fn cut_parent_off(&mut self, id: &str, image: &ImageSpec) -> Result<()> {
        let Some(found) = self.by_id(id).cloned() else { return Err(gone("detach", image)) };
        let (content, chain) = (self.content(&found), self.chain_of(&found));
        if let Some(this) = self.by_id_mut(id).filter(|this| this.parent.is_some()) {
            (this.content, this.parent) = (content, None);
            this.cut_off = Some(CutOff { at: Instant::now(), chain });
        }
        Ok(())
    }

    /// The second half: the image has the features of a published one, and its client closes it.
    pub fn switch_maps_on(&mut self, id: &str, image: &ImageSpec, client: &str) -> Result<()> {
        let Some(found) = self.by_id_mut(id) else { return Err(gone("detach", image)) };
        found.features = Features::PUBLISHED.0;
        found.watchers.remove(client);
        Ok(())
    }

    /// Removes the objects of an image that is gone. Returns how many there were.
    pub fn sweep_orphans(&mut self, id: &str) -> u64 {
        let before = self.at_once.orphans.len();
        self.at_once.orphans.retain(|(of, _)| of != id);
        (before - self.at_once.orphans.len()) as u64
    }
}
