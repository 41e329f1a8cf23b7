//! The calls of a daemon on RBD images.

use std::collections::BTreeSet;

use async_trait::async_trait;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::ceph::{
    Changed, Compare, Error, ErrorKind, Features, FillState, ImageInfo, ImageKey, ImageSpec, Link, Moved, OWNER_KEY,
    Page, Progress, Result, SnapshotPage, Storage, TransferLimits, Trashed,
};
use crate::job::simulation::faults::gate::{Handle, Kind};
use crate::job::simulation::faults::trouble::Trouble;
use crate::job::simulation::faults::world::World;
use crate::job::simulation::invariants::{promises, readers};
use crate::job::simulation::state::at_once::OBJECTS;
use crate::job::simulation::state::cluster::{FSID, Rbd, missing};

impl Handle {
    /// The fill: an object a call. The image can be removed meanwhile.
    async fn fill_objects(
        &self,
        image: &ImageSpec,
        from: FillState,
        progress: &Progress,
        cancel: &CancellationToken,
        saved: &(dyn Fn(FillState) + Send + Sync),
    ) -> Result<Moved> {
        let found = self
            .ceph(
                Kind::Read,
                || format!("open for a fill {image}"),
                |world| {
                    let Some(found) = world.ceph.find(image).cloned() else { return Ok(None) };
                    readers::may_fill(world, image, &found);
                    let refused = world.faults.unsupported;
                    if world.dice.chance(refused) {
                        return Err(Error::new(format!("fill {image}"), ErrorKind::Unsupported, "not here"));
                    }
                    readers::must_resume(world, image, &found, from);
                    Ok(Some(found))
                },
            )
            .await?;
        let Some(found) = found else { return Err(Error::new("fill", ErrorKind::NotFound, "the image is gone")) };
        if found.parent.is_none() {
            return Ok(Moved::default());
        }
        progress.set_total(OBJECTS << 20);
        let mut state = from;
        while state.next_object < OBJECTS {
            let pause = self.world().lock().dice.millis(20, 2_000);
            tokio::select! {
                biased;
                () = cancel.cancelled() => return Err(Error::new("fill", ErrorKind::Cancelled, "stopped")),
                () = tokio::time::sleep(pause) => {}
            }
            let object = state.next_object;
            let is_there = self
                .ceph(
                    Kind::Write,
                    || format!("fill object {object} of {image}"),
                    |world| Ok(world.ceph.fill_object(&found.id, object)),
                )
                .await?;
            if !is_there && object % 2 == 1 {
                return Err(Error::new(format!("fill {image}"), ErrorKind::NotFound, "the image is gone"));
            }
            state = FillState { next_object: object + 1, copied: state.copied + 1 };
            progress.set_done(state.next_object << 20);
            saved(state);
        }
        Ok(Moved { bytes: 1 << 20, through_host: 1, objects: 1 })
    }

    /// The parent is cut off, then the maps are switched on: a crash may come between them.
    async fn detach_image(&self, image: &ImageSpec, progress: &Progress, cancel: &CancellationToken) -> Result<Moved> {
        let id = self.open("detach", image).await?;
        self.long("detach", &id, progress, cancel, false).await?;
        let address = self.node.address();
        self.ceph(Kind::Write, || format!("cut the parent off {image}"), |world| world.ceph.cut_parent_off(&id, image))
            .await?;
        self.ceph(
            Kind::Write,
            || format!("switch the maps of {image} on"),
            |world| {
                world.ceph.switch_maps_on(&id, image, &address)?;
                Ok(Moved { bytes: 1 << 20, through_host: 1, objects: 1 })
            },
        )
        .await
    }

    /// All bytes of the snapshot are written to an image that a daemon made, and the object maps with them.
    async fn copied(
        &self,
        what: &str,
        source: &ImageSpec,
        snapshot: &str,
        destination: &ImageSpec,
        (progress, cancel): (&Progress, &CancellationToken),
    ) -> Result<Moved> {
        let id = self.open(what, destination).await?;
        self.long(what, &id, progress, cancel, true).await?;
        let address = self.node.address();
        self.ceph(
            Kind::Write,
            || format!("copied {source}@{snapshot} to {destination}"),
            |world| {
                let content = world.ceph.content_at(what, source, snapshot)?;
                let rate = world.faults.spoiled;
                let spoiled = world.dice.chance(rate);
                world.ceph.write(&id, destination, if spoiled { 0 } else { content }, &address)?;
                world.ceph.rebuild_maps(&id);
                Ok(Moved { bytes: 1 << 20, through_host: 2 << 20, objects: 1 })
            },
        )
        .await
    }

    async fn sweep(&self, image: &ImageSpec) -> Result<u64> {
        self.ceph(
            Kind::Write,
            || format!("sweep the objects of {image}"),
            |world| {
                if world.ceph.find(image).is_some() {
                    return Err(Error::new(format!("sweep {image}"), ErrorKind::Exists, "the image is there"));
                }
                let ImageKey::Id(id) = &image.image else { return Err(missing("sweep", image)) };
                Ok(world.ceph.sweep_orphans(id))
            },
        )
        .await
    }
}

/// The first of these. Where pages are small, a few.
fn page_of(mut rest: Vec<String>, most: usize, small: bool) -> Page<String> {
    const FEW: usize = 3;
    let most = if small { most.min(FEW) } else { most };
    rest.sort();
    let next = rest.get(most.saturating_sub(1)).filter(|_| rest.len() > most).cloned();
    rest.truncate(most);
    Page { entries: rest, next }
}

/// As the trash tells of an image. `None`: it is not there.
fn trashed_as(world: &World, image: &Rbd) -> Option<Trashed> {
    let disk = || world.cloud.disks.values().find(|disk| disk.rbd == image.id);
    let name = || image.removing.clone().or_else(|| disk().map(|disk| format!("volume-{}", disk.volume.id)));
    image.name.is_none().then(|| Trashed { id: image.id.clone(), name: name().unwrap_or_default() })
}

#[async_trait]
impl Storage for Handle {
    async fn fsid(&self) -> Result<String> {
        Ok(FSID.into())
    }

    async fn image(&self, image: &ImageSpec, snapshot: Option<&str>) -> Result<Option<ImageInfo>> {
        self.ceph(Kind::Read, || format!("image {image} {snapshot:?}"), |world| world.ceph.info(image, snapshot)).await
    }

    async fn create_snapshot(&self, image: &ImageSpec, snapshot: &str) -> Result<Changed> {
        self.ceph(
            Kind::Write,
            || format!("create snapshot {image}@{snapshot}"),
            |world| {
                let id = world.ceph.find_id("snapshot", image)?;
                self.opened(world, &id);
                let owner = world.cloud.owner_of(&world.ceph, &id, snapshot);
                Ok(world.ceph.create_snapshot(&id, snapshot, owner))
            },
        )
        .await
    }

    async fn protect_snapshot(&self, image: &ImageSpec, snapshot: &str) -> Result<Changed> {
        self.ceph(Kind::Write, || format!("protect {image}@{snapshot}"), |world| world.ceph.protect(image, snapshot))
            .await
    }

    async fn set_snapshot_tag(&self, image: &ImageSpec, snapshot: &str, tag: &str) -> Result<()> {
        self.ceph(
            Kind::Write,
            || format!("tag snapshot {image}@{snapshot}"),
            |world| {
                world.ceph.tag_snapshot(image, snapshot, tag);
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

    async fn remove_snapshot_tag(&self, image: &ImageSpec, snapshot: &str) -> Result<Changed> {
        self.ceph(
            Kind::Write,
            || format!("untag snapshot {image}@{snapshot}"),
            |world| Ok(world.ceph.untag_snapshot(image, snapshot)),
        )
        .await
    }

    async fn remove_snapshot(&self, image: &ImageSpec, snapshot: &str) -> Result<Changed> {
        // several operations, as in librbd: a crash may come between them
        let mut change = Changed::No;
        loop {
            let before = change;
            let done = self
                .ceph(
                    Kind::Write,
                    || format!("remove snapshot {image}@{snapshot}"),
                    |world| {
                        let half = world.has(Trouble::HalfDone);
                        let Some((id, snap)) = world.ceph.snapshot_to_remove(image, snapshot) else {
                            return Ok(Some(before));
                        };
                        promises::must_be_our_snapshot(world, image, &snap);
                        self.opened(world, &id);
                        if !world.ceph.remove_snapshot_step(image, &id, &snap, half)? {
                            return Ok(None);
                        }
                        readers::must_not_be_read(world, &id, Some(snap.id));
                        let is_another_left = world.ceph.snapshot_to_remove(image, snapshot).is_some();
                        Ok((!is_another_left).then_some(Changed::Yes))
                    },
                )
                .await?;
            if let Some(done) = done {
                return Ok(done);
            }
            change = Changed::Yes;
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
                let found = world.ceph.find(source).map(|found| found.id.clone());
                let owner = found.and_then(|id| world.cloud.owner_of(&world.ceph, &id, snapshot));
                world.ceph.clone_image(source, snapshot, destination, features, owner)
            },
        )
        .await
    }

    async fn chain(&self, image: &ImageSpec, snapshot: &str) -> Result<Vec<Link>> {
        self.ceph(Kind::Read, || format!("chain of {image}@{snapshot}"), |world| world.ceph.chain(image, snapshot))
            .await
    }

    async fn rebuild_maps(&self, image: &ImageSpec, _progress: &Progress, _cancel: &CancellationToken) -> Result<()> {
        self.ceph(
            Kind::Write,
            || format!("rebuild the maps of {image}"),
            |world| {
                let id = world.ceph.find_id("rebuild the maps of", image)?;
                promises::must_be_ours(world, "rebuilding", &id);
                world.ceph.rebuild_maps(&id);
                Ok(())
            },
        )
        .await
    }

    async fn finish_removal(&self, image: &ImageSpec) -> Result<Changed> {
        self.ceph(
            Kind::Write,
            || format!("finish the removal of {image}"),
            |world| {
                let found = world.ceph.being_removed(image).map(|image| image.id.clone());
                let Some(id) = found else { return Ok(Changed::No) };
                promises::must_be_ours(world, "removal", &id);
                world.ceph.drop_image(&id);
                Ok(Changed::Yes)
            },
        )
        .await
    }

    async fn trash(&self, pool: &str, after: Option<&str>, most: usize) -> Result<Page<Trashed>> {
        self.ceph(
            Kind::Read,
            || format!("trash of {pool}"),
            |world| {
                let trashed = world.ceph.images.iter().filter(|i| i.pool == pool && i.name.is_none());
                let rest = trashed.filter(|i| after.is_none_or(|after| i.id.as_str() > after)).map(|i| i.id.clone());
                let page = page_of(rest.collect(), most, world.small_pages);
                let entries = page.entries.iter().filter_map(|id| trashed_as(world, world.ceph.by_id(id)?));
                Ok(Page { entries: entries.collect(), next: page.next })
            },
        )
        .await
    }

    async fn trashed(&self, image: &ImageSpec) -> Result<Option<Trashed>> {
        self.ceph(
            Kind::Read,
            || format!("is {image} in the trash"),
            |world| Ok(world.ceph.find(image).and_then(|found| trashed_as(world, found))),
        )
        .await
    }

    async fn purge(&self, image: &ImageSpec) -> Result<Changed> {
        self.ceph(
            Kind::Write,
            || format!("purge {image}"),
            |world| {
                let found = world.ceph.find(image).filter(|found| found.name.is_none() && found.snaps.is_empty());
                let Some(id) = found.map(|found| found.id.clone()) else { return Ok(Changed::No) };
                promises::must_be_deleted(world, image, &id);
                world.ceph.drop_image(&id);
                Ok(Changed::Yes)
            },
        )
        .await
    }

    async fn create_like(
        &self,
        source: &ImageSpec,
        snapshot: &str,
        destination: &ImageSpec,
        features: Features,
    ) -> Result<()> {
        self.ceph(
            Kind::Write,
            || format!("create {destination} like {source}@{snapshot}"),
            |world| {
                let found = world.ceph.find(source).map(|found| found.id.clone());
                let owner = found.and_then(|id| world.cloud.owner_of(&world.ceph, &id, snapshot));
                world.ceph.create_like(source, snapshot, destination, owner, features)
            },
        )
        .await
    }

    async fn flatten(
        &self,
        image: &ImageSpec,
        _limits: &TransferLimits,
        progress: &Progress,
        cancel: &CancellationToken,
    ) -> Result<Moved> {
        let id = self.open("flatten", image).await?;
        self.long("flatten", &id, progress, cancel, false).await?;
        let address = self.node.address();
        self.ceph(
            Kind::Write,
            || format!("flattened {image}"),
            |world| {
                world.ceph.flatten(&id, image, &address)?;
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
        self.copied("copy", source, snapshot, destination, (progress, cancel)).await
    }

    async fn server_copy(
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
        self.copied("fill", source, snapshot, destination, (progress, cancel)).await
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
                let content = world.ceph.content_at("compare", source, snapshot)?;
                let Some(to) = world.ceph.find(destination) else { return Err(missing("compare", destination)) };
                Ok((world.ceph.content(to) != content).then_some(0))
            },
        )
        .await
    }

    async fn read(&self, image: &ImageSpec, _offset: u64, length: usize) -> Result<Vec<u8>> {
        self.ceph(Kind::Read, || format!("read {image}"), |world| world.ceph.read_header(image, length)).await
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
                        let first = opened.is_none();
                        let id = match opened.take() {
                            Some(id) => id,
                            None => world.ceph.find_id("rename", image)?,
                        };
                        *opened = Some(id.clone());
                        // one that broke off before is finished
                        let first = first && world.ceph.is_free_for(&id, image, name)?;
                        promises::must_be_ours(world, "rename", &id);
                        promises::must_not_be_active(world, "rename", &id);
                        if world.ceph.by_id(&id).is_none() {
                            return Err(missing("rename", image));
                        }
                        Ok(world.ceph.rename_step(&id, name, first, half))
                    },
                )
                .await?;
            if done {
                return Ok(());
            }
            self.break_off().await?;
        }
    }

    async fn remove_image(&self, image: &ImageSpec) -> Result<Changed> {
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
                        let found = match opened.clone() {
                            // librbd has it open by now
                            Some(id) => world.ceph.by_id(&id).map(|i| i.id.clone()),
                            None => world.ceph.image_to_remove(image),
                        };
                        let Some(id) = found else { return Ok(Some(Changed::No)) };
                        *opened = Some(id.clone());
                        promises::must_be_ours(world, "removal", &id);
                        if world.ceph.remove_alias(&id, image) {
                            return Ok(Some(Changed::Yes));
                        }
                        promises::must_not_be_active(world, "removal", &id);
                        world.ceph.forget_dead_watches(&id);
                        if world.ceph.is_in_use(&id) {
                            return Err(Error::new(format!("remove {image}"), ErrorKind::Busy, "is in use"));
                        }
                        if world.ceph.remove_step(&id, *step, half) {
                            readers::must_not_be_read(world, &id, None);
                            return Ok(Some(Changed::Yes));
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
        Ok(Changed::Yes)
    }

    async fn forget_dead_watches(&self, image: &ImageSpec) -> Result<()> {
        self.ceph(
            Kind::Read,
            || format!("forget the dead watches of {image}"),
            |world| {
                if let Some(id) = world.ceph.find(image).map(|found| found.id.clone()) {
                    world.ceph.forget_dead_watches(&id);
                }
                Ok(())
            },
        )
        .await
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
                promises::must_be_ours(world, "setting metadata", &id);
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
                promises::must_be_ours(world, "stripping", &id);
                if let Some(found) = world.ceph.by_id_mut(&id) {
                    found.metadata.retain(|key, _| metadata.iter().any(|(wanted, _)| wanted == key));
                }
                Ok(())
            },
        )
        .await
    }

    async fn remove_metadata(&self, image: &ImageSpec, key: &str) -> Result<Changed> {
        self.ceph(
            Kind::Write,
            || format!("remove metadata {image} {key}"),
            |world| {
                let Some(id) = world.ceph.find(image).map(|i| i.id.clone()) else { return Ok(Changed::No) };
                promises::must_be_ours(world, "removing metadata", &id);
                Ok(world.ceph.remove_metadata(&id, key))
            },
        )
        .await
    }

    async fn images(&self, pool: &str, prefix: &str, after: Option<&str>, most: usize) -> Result<Page<String>> {
        self.list_slowly().await;
        self.ceph(
            Kind::Read,
            || format!("images of {pool} after {after:?}"),
            |world| {
                let names = world.ceph.images.iter().filter(|i| i.pool == pool).filter_map(|i| i.name.as_ref());
                let rest = names.filter(|name| name.starts_with(prefix));
                let rest = rest.filter(|name| after.is_none_or(|after| name.as_str() > after)).cloned();
                Ok(page_of(rest.collect(), most, world.small_pages))
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
        most: usize,
    ) -> Result<SnapshotPage> {
        self.list_slowly().await;
        self.ceph(
            Kind::Read,
            || format!("snapshots of {pool}"),
            |world| {
                let (mut found, mut owned) = (Vec::new(), Vec::new());
                let most = if world.small_pages { 1 } else { most.max(1) };
                let images = world.ceph.images.iter().filter(|i| i.pool == pool);
                let mut rest: Vec<&Rbd> = images.filter(|i| after.is_none_or(|after| i.id.as_str() > after)).collect();
                let is_last = rest.len() < most;
                if rest.len() > most {
                    rest.select_nth_unstable_by(most, |one, other| one.id.cmp(&other.id));
                    rest.truncate(most);
                }
                rest.sort_by(|one, other| one.id.cmp(&other.id));
                let next = rest.last().filter(|_| !is_last).map(|image| image.id.clone());
                let looked_at = rest.len();
                for image in rest {
                    let spec = match &image.name {
                        Some(name) => ImageSpec::named(pool, name),
                        None => ImageSpec::with_id(pool, &image.id),
                    };
                    let names = image.snaps.iter().map(|snap| &snap.name).chain(image.snapshot_tags.keys());
                    let names: BTreeSet<&String> = names.filter(|name| name.starts_with(prefix)).collect();
                    found.extend(names.into_iter().map(|name| (spec.clone(), name.clone())));
                    owned.extend(image.metadata.get(OWNER_KEY).map(|owner| (spec, owner.clone())));
                }
                world.history.headers += looked_at;
                Ok(SnapshotPage { found, owned, failed: Vec::new(), looked_at, next })
            },
        )
        .await
    }

    async fn address(&self) -> Result<String> {
        Ok(self.node.address())
    }

    async fn fence(&self, address: &str) -> Result<Changed> {
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
                if world.ceph.blocklist.insert(address.into()) { Ok(Changed::Yes) } else { Ok(Changed::No) }
            },
        )
        .await
    }

    async fn reconnect(&self) -> Result<Changed> {
        self.node.pass().await;
        Ok(if self.node.reconnect() { Changed::Yes } else { Changed::No })
    }
}
