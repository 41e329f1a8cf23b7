//! [`Storage`] over librbd: each method is one blocking closure that opens what it needs and closes it again.

use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::cluster::{Client, Cluster, IoCtx, c_string, unix_time};
use super::compare::compare;
use super::copy::copy;
use super::fill::{FillFault, flatten, server_copy};
use super::objects::{Object, header_page, omap_page, read_watches_again};
use super::pace::{OBJECT, RateLimiter};
use super::published::{check_rule, detach, fill_published, is_gone, sweep_objects};
use super::rbd::{self, Access, Image, Options, find_in_trash};
use super::{
    Changed, Compare, Error, ErrorKind, Features, FillState, ImageInfo, ImageKey, ImageSpec, Link, Moved, OWNER_KEY,
    Page, Progress, Result, SnapshotPage, Storage, TransferLimits, Trashed, is_owner_of,
};

/// How long a call on a busy image is repeated before it fails: a watch that was just given up ends within that.
const BUSY_TIMEOUT: Duration = Duration::from_secs(2);
const BUSY_INTERVAL: Duration = Duration::from_millis(250);

/// How often a fill tells its caller how far it got.
const SAVE_INTERVAL: Duration = Duration::from_secs(2);

/// What cursors of [`Storage::snapshots`] begin with: the last image was listed in the directory, or in the trash.
const IN_DIRECTORY: &str = "directory ";
const IN_TRASH: &str = "trash ";

/// A longer chain of parents is taken for a circle.
const MAX_CHAIN: usize = 64;

#[async_trait]
impl Storage for Client {
    async fn fsid(&self) -> Result<String> {
        self.run("read the cluster's fsid", |cluster| cluster.fsid()).await
    }

    async fn image(&self, image: &ImageSpec, snapshot: Option<&str>) -> Result<Option<ImageInfo>> {
        let (spec, snapshot) = (image.clone(), snapshot.map(str::to_owned));
        self.run(format!("look at {image}"), move |cluster| {
            let Some(image) = Image::open(cluster, &spec, Access::ReadOnly)? else { return Ok(None) };
            info(&image, snapshot.as_deref()).map(Some)
        })
        .await
    }

    async fn create_snapshot(&self, image: &ImageSpec, snapshot: &str) -> Result<Changed> {
        self.with_image("create snapshot", image, snapshot, |image, snapshot| {
            ok_if(image.create_snapshot(snapshot), ErrorKind::Exists)
        })
        .await
    }

    async fn protect_snapshot(&self, image: &ImageSpec, snapshot: &str) -> Result<Changed> {
        self.with_image("protect", image, snapshot, |image, snapshot| {
            if image.is_protected(snapshot)? {
                return Ok(Changed::No);
            }
            ok_if(image.protect_snapshot(snapshot), ErrorKind::Busy)
        })
        .await
    }

    async fn set_snapshot_tag(&self, image: &ImageSpec, snapshot: &str, tag: &str) -> Result<()> {
        let tag = tag.to_owned();
        self.with_header("set the tag of", image, snapshot, move |header, name| header.set_xattr(name, tag.as_bytes()))
            .await
            .map(drop)
    }

    async fn snapshot_tag(&self, image: &ImageSpec, snapshot: &str) -> Result<Option<String>> {
        let value = self.with_header("read the tag of", image, snapshot, |header, name| header.xattr(name)).await?;
        Ok(value.flatten().map(|value| String::from_utf8_lossy(&value).into_owned()))
    }

    async fn remove_snapshot_tag(&self, image: &ImageSpec, snapshot: &str) -> Result<Changed> {
        let removed =
            self.with_header("remove the tag of", image, snapshot, |header, name| header.remove_xattr(name)).await?;
        Ok(removed.unwrap_or(Changed::No))
    }

    async fn create_protected_snapshot(&self, image: &ImageSpec, snapshot: &str) -> Result<()> {
        self.with_image("create and protect snapshot", image, snapshot, create_protected_snapshot).await
    }

    async fn remove_snapshot(&self, image: &ImageSpec, snapshot: &str) -> Result<Changed> {
        let (spec, snapshot) = (image.clone(), snapshot.to_owned());
        self.run(format!("remove snapshot {image}@{snapshot}"), move |cluster| {
            let Some(image) = Image::open(cluster, &spec, Access::ReadOnly)? else { return Ok(Changed::No) };
            let there = image.snapshots()?.iter().any(|s| s.name == snapshot);
            let discarded = image.discarded_snapshots()?.into_iter().filter(|(_, name)| *name == snapshot);
            let discarded: Vec<u64> = discarded.map(|(id, _)| id).collect();
            if !there && discarded.is_empty() {
                return Ok(Changed::No);
            }
            drop(image);
            let Some(image) = Image::open(cluster, &spec, Access::ReadWrite)? else { return Ok(Changed::No) };
            let mut change = if there { remove_snapshot(&image, &snapshot)? } else { Changed::No };
            // an earlier removal was stopped half way
            for id in discarded {
                if ok_if(image.remove_snapshot_by_id(id), ErrorKind::NotFound)? == Changed::Yes {
                    change = Changed::Yes;
                }
            }
            Ok(change)
        })
        .await
    }

    async fn clone_image(
        &self,
        source: &ImageSpec,
        snapshot: &str,
        destination: &ImageSpec,
        features: Features,
    ) -> Result<()> {
        let operation = format!("clone {source}@{snapshot} to {destination}");
        let (source, snapshot, destination) = (source.clone(), snapshot.to_owned(), destination.clone());
        let data_pool = self.data_pool();
        self.run(operation.clone(), move |cluster| {
            clone(cluster, &source, &snapshot, &destination, (features, data_pool.as_deref()), &operation)?;
            if features.has(Features::OBJECT_MAP) {
                return Ok(());
            }
            check_rule(&Image::open_existing(cluster, &destination, Access::ReadOnly)?, true, &operation)
        })
        .await
    }

    async fn make_anchor(
        &self,
        source: &ImageSpec,
        snapshot: &str,
        anchor: &ImageSpec,
        anchor_snapshot: &str,
        metadata: &[(String, String)],
    ) -> Result<()> {
        let operation = format!("clone {source}@{snapshot} to {anchor}");
        let (source, snapshot, anchor) = (source.clone(), snapshot.to_owned(), anchor.clone());
        let (anchor_snapshot, metadata) = (anchor_snapshot.to_owned(), metadata.to_vec());
        self.run(operation.clone(), move |cluster| {
            // Cinder flattens it, and may have no rights in the data pool of the images
            clone(cluster, &source, &snapshot, &anchor, (Features::ANCHOR, None), &operation)?;
            let image = Image::open_existing(cluster, &anchor, Access::ReadWrite)?;
            image.replace_metadata(&metadata)?;
            create_protected_snapshot(&image, &anchor_snapshot)
        })
        .await
    }

    async fn chain(&self, image: &ImageSpec, snapshot: &str) -> Result<Vec<Link>> {
        let (spec, snapshot) = (image.clone(), snapshot.to_owned());
        self.run(format!("walk the parents of {image}@{snapshot}"), move |cluster| {
            // A parent may be cut off and removed between reading the link and following it.
            let mut tries = 3;
            loop {
                let image = Image::open_snapshot(cluster, &spec, &snapshot)?;
                match chain(cluster, &image) {
                    Err(e) if e.kind() == ErrorKind::NotFound && tries > 0 => tries -= 1,
                    result => return result,
                }
            }
        })
        .await
    }

    async fn create_like(
        &self,
        source: &ImageSpec,
        snapshot: &str,
        destination: &ImageSpec,
        features: Features,
    ) -> Result<()> {
        let operation = format!("create {destination} like {source}@{snapshot}");
        let (source, snapshot, destination) = (source.clone(), snapshot.to_owned(), destination.clone());
        let data_pool = self.data_pool();
        self.run(operation, move |cluster| {
            let like = Image::open_snapshot(cluster, &source, &snapshot)?;
            let options = Options::with_features(&like, features, data_pool.as_deref())?;
            let io = IoCtx::open(cluster, &destination.pool)?;
            rbd::create(&io, &destination, like.size()?, &options)
        })
        .await
    }

    async fn flatten(
        &self,
        image: &ImageSpec,
        limits: &TransferLimits,
        progress: &Progress,
        cancel: &CancellationToken,
    ) -> Result<Moved> {
        let (spec, rates) = (image.clone(), Arc::clone(&limits.rates));
        self.run_long(format!("flatten {image}"), progress, cancel, move |cluster, progress, cancel| {
            flatten(cluster, &spec, &rates.objects, (progress, cancel))
        })
        .await
    }

    async fn copy(
        &self,
        source: &ImageSpec,
        snapshot: &str,
        destination: &ImageSpec,
        limits: &TransferLimits,
        progress: &Progress,
        cancel: &CancellationToken,
    ) -> Result<Moved> {
        let operation = format!("copy {source}@{snapshot} to {destination}");
        let limits = limits.clone();
        let (source, snapshot, destination) = (source.clone(), snapshot.to_owned(), destination.clone());
        self.run_long(operation, progress, cancel, move |cluster, progress, cancel| {
            copy(cluster, &source, &snapshot, &destination, &limits, progress, cancel)
        })
        .await
    }

    async fn server_copy(
        &self,
        source: &ImageSpec,
        snapshot: &str,
        destination: &ImageSpec,
        limits: &TransferLimits,
        progress: &Progress,
        cancel: &CancellationToken,
    ) -> Result<Moved> {
        self.server_copy_with_fault(source, snapshot, destination, limits, progress, cancel, None).await
    }

    async fn fill_published(
        &self,
        image: &ImageSpec,
        from: FillState,
        limits: &TransferLimits,
        progress: &Progress,
        cancel: &CancellationToken,
        saved: &(dyn Fn(FillState) + Send + Sync),
    ) -> Result<Moved> {
        let (spec, limits) = (image.clone(), limits.clone());
        let (tell, mut told) = watch::channel(from);
        let filling = self.run_long(format!("fill {image}"), progress, cancel, move |cluster, progress, cancel| {
            fill_published(cluster, &spec, from, &limits, &tell, (progress, cancel))
        });
        tokio::pin!(filling);
        let result = loop {
            tokio::select! {
                result = &mut filling => break result,
                () = tokio::time::sleep(SAVE_INTERVAL) => {
                    if told.has_changed().unwrap_or(true) {
                        saved(*told.borrow_and_update());
                    }
                }
            }
        };
        saved(*told.borrow_and_update());
        result
    }

    async fn detach(
        &self,
        image: &ImageSpec,
        limits: &TransferLimits,
        progress: &Progress,
        cancel: &CancellationToken,
    ) -> Result<Moved> {
        let (spec, limits) = (image.clone(), limits.clone());
        self.run_long(format!("detach {image}"), progress, cancel, move |cluster, progress, cancel| {
            detach(cluster, &spec, &limits, (progress, cancel))
        })
        .await
    }

    async fn is_gone(&self, image: &ImageSpec) -> Result<bool> {
        let spec = image.clone();
        self.run(format!("look whether {image} is gone"), move |cluster| is_gone(cluster, &spec)).await
    }

    async fn sweep_objects(
        &self,
        image: &ImageSpec,
        objects: u64,
        data_pool: Option<&str>,
        limits: &TransferLimits,
        progress: &Progress,
        cancel: &CancellationToken,
    ) -> Result<u64> {
        let (spec, data_pool, limits) = (image.clone(), data_pool.map(str::to_owned), limits.clone());
        self.run_long(format!("sweep the objects of {image}"), progress, cancel, move |cluster, progress, cancel| {
            sweep_objects(cluster, &spec, objects, data_pool.as_deref(), &limits, (progress, cancel))
        })
        .await
    }

    async fn compare(
        &self,
        source: &ImageSpec,
        snapshot: &str,
        destination: &ImageSpec,
        extent: Compare,
        progress: &Progress,
        cancel: &CancellationToken,
    ) -> Result<Option<u64>> {
        let operation = format!("compare {destination} with {source}@{snapshot}");
        let (source, snapshot, destination) = (source.clone(), snapshot.to_owned(), destination.clone());
        self.run_long(operation, &progress.steps_only(), cancel, move |cluster, progress, cancel| {
            compare(cluster, &source, &snapshot, &destination, extent, (progress, cancel))
        })
        .await
    }

    async fn rebuild_maps(&self, image: &ImageSpec, progress: &Progress, cancel: &CancellationToken) -> Result<()> {
        let spec = image.clone();
        self.run_long(
            format!("rebuild the object maps of {image}"),
            progress,
            cancel,
            move |cluster, progress, cancel| {
                let image = Image::open_existing(cluster, &spec, Access::ReadWrite)?;
                image.rebuild_as_published(progress, cancel)
            },
        )
        .await
    }

    async fn read(&self, image: &ImageSpec, offset: u64, length: usize) -> Result<Vec<u8>> {
        let spec = image.clone();
        self.run(format!("read {image}"), move |cluster| {
            Image::open_existing(cluster, &spec, Access::ReadOnly)?.read(offset, length)
        })
        .await
    }

    async fn rename(&self, image: &ImageSpec, name: &str) -> Result<()> {
        let operation = format!("rename {image} to {name}");
        let (spec, name) = (image.clone(), name.to_owned());
        self.run(operation.clone(), move |cluster| {
            let io = IoCtx::open(cluster, &spec.pool)?;
            let from = match &spec.image {
                ImageKey::Name(name) => name.clone(),
                ImageKey::Id(_) => Image::open_existing(cluster, &spec, Access::ReadOnly)?.name()?,
            };
            rename(&io, &from, &name, &operation)
        })
        .await
    }

    async fn remove_image(&self, image: &ImageSpec) -> Result<Changed> {
        let spec = image.clone();
        self.run(format!("remove {image}"), move |cluster| remove_image(cluster, &spec)).await
    }

    async fn finish_removal(&self, image: &ImageSpec) -> Result<Changed> {
        let (operation, spec) = (format!("finish the removal of {image}"), image.clone());
        self.run(operation.clone(), move |cluster| {
            let ImageKey::Name(name) = &spec.image else { return Ok(Changed::No) };
            let io = IoCtx::open(cluster, &spec.pool)?;
            empty_trash_of(cluster, &io, &spec.pool, Some(name), None, &operation)
        })
        .await
    }

    async fn trash(&self, pool: &str, after: Option<&str>, most: usize) -> Result<Page<Trashed>> {
        let operation = format!("list the trash of {pool}");
        let (pool, after) = (pool.to_owned(), after.map(str::to_owned));
        self.run(operation.clone(), move |cluster| {
            rbd::trash_page(&IoCtx::open(cluster, &pool)?, after.as_deref(), most, &operation)
        })
        .await
    }

    async fn trashed(&self, image: &ImageSpec) -> Result<Option<Trashed>> {
        let (operation, spec) = (format!("look for {image} in the trash"), image.clone());
        self.run(operation.clone(), move |cluster| {
            let ImageKey::Id(id) = &spec.image else { return Ok(None) };
            rbd::trashed(&IoCtx::open(cluster, &spec.pool)?, id, &operation)
        })
        .await
    }

    async fn purge(&self, image: &ImageSpec) -> Result<Changed> {
        let spec = image.clone();
        self.run(format!("purge {image}"), move |cluster| purge(cluster, &spec)).await
    }

    async fn forget_dead_watches(&self, image: &ImageSpec) -> Result<()> {
        let (operation, spec) = (format!("forget the dead watches of {image}"), image.clone());
        self.run(operation.clone(), move |cluster| {
            let id = match &spec.image {
                ImageKey::Name(name) => rbd::id_of_name(&IoCtx::open(cluster, &spec.pool)?, name, &operation)?,
                ImageKey::Id(id) => Some(id.clone()),
            };
            let Some(id) = id else { return Ok(()) };
            read_watches_again(cluster, &spec.pool, &id, &operation)
        })
        .await
    }

    async fn metadata(&self, image: &ImageSpec, key: &str) -> Result<Option<String>> {
        let (spec, key) = (image.clone(), key.to_owned());
        self.run(format!("read metadata {key} of {image}"), move |cluster| {
            match Image::open(cluster, &spec, Access::ReadOnly)? {
                Some(image) => image.metadata(&key),
                None => Ok(None),
            }
        })
        .await
    }

    async fn set_metadata(&self, image: &ImageSpec, key: &str, value: &str) -> Result<()> {
        let value = value.to_owned();
        self.with_image("set metadata of", image, key, move |image, key| image.set_metadata(key, &value)).await
    }

    async fn replace_metadata(&self, image: &ImageSpec, metadata: &[(String, String)]) -> Result<()> {
        let metadata = metadata.to_vec();
        self.with_image("replace the metadata of", image, "", move |image, _| image.replace_metadata(&metadata)).await
    }

    async fn remove_metadata(&self, image: &ImageSpec, key: &str) -> Result<Changed> {
        self.with_image("remove metadata of", image, key, |image, key| {
            ok_if(image.remove_metadata(key), ErrorKind::NotFound)
        })
        .await
    }

    async fn images(&self, pool: &str, prefix: &str, after: Option<&str>, most: usize) -> Result<Page<String>> {
        let operation = format!("list the images of {pool}");
        let (pool, prefix, after) = (pool.to_owned(), prefix.to_owned(), after.map(str::to_owned));
        self.run(operation.clone(), move |cluster| {
            rbd::names(&IoCtx::open(cluster, &pool)?, &prefix, after.as_deref(), most, &operation)
        })
        .await
    }

    async fn snapshots(
        &self,
        pool: &str,
        prefix: &str,
        pace: u32,
        after: Option<&str>,
        most: usize,
    ) -> Result<SnapshotPage> {
        let operation = format!("list the snapshots of {pool}");
        let (pool, prefix, after) = (pool.to_owned(), prefix.to_owned(), after.map(str::to_owned));
        // Long work, so that dropping the future ends it.
        let (progress, never) = (Progress::default(), CancellationToken::new());
        self.run_long(operation, &progress, &never, move |cluster, _, stop| {
            snapshots(cluster, (&pool, &prefix), pace, (after.as_deref(), most), stop)
        })
        .await
    }

    async fn address(&self) -> Result<String> {
        self.run("read this client's address", |cluster| cluster.addresses()).await
    }

    async fn fence(&self, address: &str) -> Result<Changed> {
        self.fence_address(address).await
    }

    async fn reconnect(&self) -> Result<Changed> {
        Client::reconnect(self).await
    }
}

impl Client {
    /// [`Storage::server_copy`] with a planted fault, for tests of the steps after it.
    #[doc(hidden)]
    #[allow(clippy::too_many_arguments)]
    pub async fn server_copy_with_fault(
        &self,
        source: &ImageSpec,
        snapshot: &str,
        destination: &ImageSpec,
        limits: &TransferLimits,
        progress: &Progress,
        cancel: &CancellationToken,
        fault: Option<FillFault>,
    ) -> Result<Moved> {
        let operation = format!("fill {destination} from {source}@{snapshot}");
        let limits = limits.clone();
        let (source, snapshot, destination) = (source.clone(), snapshot.to_owned(), destination.clone());
        self.run_long(operation, progress, cancel, move |cluster, progress, cancel| {
            server_copy(cluster, &source, &snapshot, &destination, &limits, fault, (progress, cancel))
        })
        .await
    }

    /// Runs `work` on the image's header object and the name of a snapshot. `None`: there is no such image, or it is of
    /// format 1.
    async fn with_header<T, F>(&self, verb: &str, image: &ImageSpec, snapshot: &str, work: F) -> Result<Option<T>>
    where
        T: Send + 'static,
        F: FnOnce(&Object, &str) -> Result<T> + Send + 'static,
    {
        let operation = format!("{verb} snapshot {image}@{snapshot}");
        let (spec, snapshot) = (image.clone(), snapshot.to_owned());
        self.run(operation.clone(), move |cluster| {
            let id = match &spec.image {
                ImageKey::Id(id) => id.clone(),
                ImageKey::Name(_) => match Image::open(cluster, &spec, Access::ReadOnly)? {
                    Some(image) if !image.is_old_format()? => image.id()?,
                    _ => return Ok(None),
                },
            };
            if id.is_empty() {
                return Ok(None);
            }
            let header = Object::open(cluster, &spec.pool, &format!("rbd_header.{id}"), operation)?;
            match work(&header, &snapshot) {
                Ok(done) => Ok(Some(done)),
                Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
                Err(error) => Err(error),
            }
        })
        .await
    }

    /// Runs `work` with the image open for changes, and a text that names what is changed.
    async fn with_image<T, F>(&self, verb: &str, image: &ImageSpec, what: &str, work: F) -> Result<T>
    where
        T: Send + 'static,
        F: FnOnce(&Image, &str) -> Result<T> + Send + 'static,
    {
        let (spec, what) = (image.clone(), what.to_owned());
        self.run(format!("{verb} {image}"), move |cluster| {
            work(&Image::open_existing(cluster, &spec, Access::ReadWrite)?, &what)
        })
        .await
    }
}

fn ok_if(result: Result<()>, there_already: ErrorKind) -> Result<Changed> {
    match result {
        Ok(()) => Ok(Changed::Yes),
        Err(e) if e.kind() == there_already => Ok(Changed::No),
        Err(e) => Err(e),
    }
}

fn info(image: &Image, snapshot: Option<&str>) -> Result<ImageInfo> {
    let snapshots = image.snapshots()?;
    if let Some(snapshot) = snapshot {
        image.set_snapshot(snapshot)?;
    }
    let data_pool = match image.data_pool_id() {
        pool if pool < 0 || pool == image.io().pool_id() => None,
        pool => Some(image.cluster().pool_name(pool)?),
    };
    Ok(ImageInfo {
        id: image.id()?,
        size: image.size()?,
        object_size: image.object_size()?,
        stripe_unit: image.stripe_unit()?,
        stripe_count: image.stripe_count()?,
        features: image.features()?,
        flags: image.flags()?,
        parent: image.parent()?.map(|link| link.parent),
        snapshots,
        data_pool,
        old_format: image.is_old_format()?,
    })
}

/// Unprotects and removes a snapshot that was there a moment ago.
fn remove_snapshot(image: &Image, snapshot: &str) -> Result<Changed> {
    match image.is_protected(snapshot) {
        Ok(true) => {
            if let Err(e) = image.unprotect_snapshot(snapshot)
                && e.kind() != ErrorKind::NotFound
                && image.is_protected(snapshot).unwrap_or(true)
            {
                return Err(e);
            }
        }
        Ok(false) => {}
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Changed::No),
        Err(e) => return Err(e),
    }
    ok_if(image.remove_snapshot(snapshot), ErrorKind::NotFound)
}

/// Clones `source@snapshot` to `destination` with these features, and its data in this pool.
fn clone(
    cluster: &Arc<Cluster>,
    source: &ImageSpec,
    snapshot: &str,
    destination: &ImageSpec,
    (features, data_pool): (Features, Option<&str>),
    operation: &str,
) -> Result<()> {
    let parent = Image::open_snapshot(cluster, source, snapshot)?;
    if parent.is_old_format()? || !parent.features()?.has(Features::LAYERING) {
        return Err(Error::new(operation, ErrorKind::Unsupported, "the source has no layering"));
    }
    if parent.size()? == 0 {
        return Err(Error::new(operation, ErrorKind::Unsupported, "librbd does not clone an image of 0 bytes"));
    }
    // librbd takes the parent by name only.
    let name = parent.name()?;
    if matches!(source.image, ImageKey::Id(_)) && find_in_trash(parent.io(), source)?.is_some() {
        return Err(Error::new(operation, ErrorKind::Unsupported, "the source is in the trash"));
    }
    let options = Options::with_features(&parent, features, data_pool)?;
    let io = IoCtx::open(cluster, &destination.pool)?;
    rbd::clone(parent.io(), &name, snapshot, &io, destination, &options, operation)
}

fn create_protected_snapshot(image: &Image, snapshot: &str) -> Result<()> {
    ok_if(image.create_snapshot(snapshot), ErrorKind::Exists)?;
    if !image.is_protected(snapshot)? {
        ok_if(image.protect_snapshot(snapshot), ErrorKind::Busy)?;
    }
    Ok(())
}

fn chain(cluster: &Arc<Cluster>, image: &Image) -> Result<Vec<Link>> {
    let mut links = Vec::new();
    let mut next = image.parent()?;
    while let Some(link) = next {
        if links.len() == MAX_CHAIN {
            let operation = format!("walk the parents of {}", image.spec());
            return Err(Error::new(operation, ErrorKind::Unsupported, "there are too many"));
        }
        next = Image::open_parent(cluster, &link)?.parent()?;
        links.push(Link { pool_id: link.pool_id, image_id: link.parent.image_id, snapshot_id: link.snap_id });
    }
    Ok(links)
}

/// Removes an image from the trash. librbd itself refuses the removal of an image with snapshots, and any removal
/// before the end of the deferment.
fn purge(cluster: &Arc<Cluster>, spec: &ImageSpec) -> Result<Changed> {
    let io = IoCtx::open(cluster, &spec.pool)?;
    let now = unix_time().as_secs();
    let Some(trashed) = find_in_trash(&io, spec)? else { return Ok(Changed::No) };
    if !trashed.by_user || trashed.deferred_until > i64::try_from(now).unwrap_or(i64::MAX) {
        return Ok(Changed::No);
    }
    if let Some(image) = Image::open(cluster, spec, Access::ReadOnly)?
        && image.has_snapshots()?
    {
        return Ok(Changed::No);
    }
    let operation = format!("purge {spec}");
    remove_while_busy(cluster, &spec.pool, Some(&trashed.id), &operation, || {
        ok_if(rbd::remove_from_trash(&io, &trashed.id, false, &operation), ErrorKind::NotFound)
    })
}

/// Renames an image. librbd writes `rbd_id.<to>`, then the directory, then removes `rbd_id.<from>`; a rename that died
/// in between is finished here.
fn rename(io: &IoCtx, from: &str, to: &str, operation: &str) -> Result<()> {
    let taken = match rbd::rename(io, from, to, operation) {
        Err(e) if e.kind() == ErrorKind::Exists => e,
        result => return result,
    };
    let id = match (rbd::id_of_name(io, from, operation)?, rbd::id_of_name(io, to, operation)?) {
        (Some(id), Some(other)) if id == other => id,
        _ => return Err(taken),
    };
    match rbd::name_in_directory(io, &id, operation)? {
        Some(name) if name == to => rbd::remove_name(io, from, operation),
        Some(name) if name == from => {
            rbd::remove_name(io, to, operation)?;
            rbd::rename(io, from, to, operation)
        }
        _ => Err(taken),
    }
}

/// Removes an image with its snapshots. The pool's settings may turn librbd's removal into a move to the trash, and a
/// removal may have broken off there, so that the trash is looked through each time.
pub(super) fn remove_image(cluster: &Arc<Cluster>, spec: &ImageSpec) -> Result<Changed> {
    let operation = format!("remove {spec}");
    let io = IoCtx::open(cluster, &spec.pool)?;
    let (name, id) = match &spec.image {
        ImageKey::Name(name) => (Some(name.clone()), rbd::id_of_name(&io, name, &operation)?),
        ImageKey::Id(id) => (rbd::name_in_directory(&io, id, &operation)?, Some(id.clone())),
    };
    if let (Some(name), Some(id)) = (&name, &id) {
        // A rename that broke off: the image is whole under the name that the directory has, this one is a second name.
        let listed = rbd::name_in_directory(&io, id, &operation)?.filter(|listed| listed != name);
        if let Some(listed) = listed
            && rbd::id_of_name(&io, &listed, &operation)?.as_ref() == Some(id)
        {
            rbd::remove_name(&io, name, &operation)?;
            return Ok(Changed::Yes);
        }
    }
    let mut change = Changed::No;
    prepare_removal(cluster, spec, name.as_deref())?;
    // An image that cannot be opened may still have a name or an id: a creation or a removal broke off.
    let gone = |result: Result<()>| ok_if(result, ErrorKind::NotFound);
    if let Some(name) = &name
        && remove_while_busy(cluster, &spec.pool, id.as_deref(), &operation, || {
            gone(rbd::remove(&io, name, &operation))
        })? == Changed::Yes
    {
        change = Changed::Yes;
    }
    if empty_trash_of(cluster, &io, &spec.pool, name.as_deref(), id.as_deref(), &operation)? == Changed::Yes {
        change = Changed::Yes;
    }
    // A name that leads nowhere would never be free again.
    if let (Some(name), Some(id)) = (&name, &id)
        && rbd::id_of_name(&io, name, &operation)?.as_ref() == Some(id)
        && rbd::name_in_directory(&io, id, &operation)?.is_none()
        && Image::open(cluster, &ImageSpec::with_id(&spec.pool, id), Access::ReadOnly)?.is_none()
    {
        rbd::remove_name(&io, name, &operation)?;
    }
    Ok(change)
}

/// Removes from the trash the image of that id, and those that were being removed here under that name.
fn empty_trash_of(
    cluster: &Arc<Cluster>,
    io: &IoCtx,
    pool: &str,
    name: Option<&str>,
    id: Option<&str>,
    operation: &str,
) -> Result<Changed> {
    let mut change = Changed::No;
    for left in rbd::trash(io, operation)? {
        let in_trash = ImageSpec::with_id(pool, &left.id);
        let ours = id == Some(left.id.as_str())
            || (name == Some(left.name.as_str())
                && (left.removing || is_own_leftover(cluster, &in_trash, &left.name)?));
        if ours {
            prepare_removal(cluster, &in_trash, Some(&left.name))?;
            remove_while_busy(cluster, pool, Some(&left.id), operation, || {
                ok_if(rbd::remove_from_trash(io, &left.id, true, operation), ErrorKind::NotFound)
            })?;
            change = Changed::Yes;
        }
    }
    Ok(change)
}

/// Removes the image's snapshots, and writes into the image whose it is: it may be left in the trash, where it is known
/// by that alone.
fn prepare_removal(cluster: &Arc<Cluster>, spec: &ImageSpec, name: Option<&str>) -> Result<()> {
    let Some(image) = Image::open(cluster, spec, Access::ReadOnly)? else { return Ok(()) };
    let snapshots = image.snapshots()?;
    let owner = image.metadata(OWNER_KEY)?;
    let unknown = name.filter(|name| !owner.as_deref().is_some_and(|owner| is_owner_of(owner, name)));
    drop(image);
    if snapshots.is_empty() && unknown.is_none() {
        return Ok(());
    }
    let Some(image) = Image::open(cluster, spec, Access::ReadWrite)? else { return Ok(()) };
    if let Some(name) = unknown {
        image.set_metadata(OWNER_KEY, name)?;
    }
    for snapshot in snapshots {
        remove_snapshot(&image, &snapshot.name)?;
    }
    Ok(())
}

/// Whether an image that lies in the trash under this former name is one that was being removed here: it says so, or
/// nothing of it is left that could say anything.
fn is_own_leftover(cluster: &Arc<Cluster>, in_trash: &ImageSpec, name: &str) -> Result<bool> {
    match Image::open(cluster, in_trash, Access::ReadOnly)? {
        Some(image) => Ok(image.metadata(OWNER_KEY)?.is_some_and(|owner| is_owner_of(&owner, name))),
        None => Ok(true),
    }
}

/// Repeats a removal that finds the image with that id busy, for a short time. Then the watches are read again, since
/// that of a client that is dead may be left, and the removal is tried a last time.
fn remove_while_busy<T>(
    cluster: &Arc<Cluster>,
    pool: &str,
    id: Option<&str>,
    operation: &str,
    mut work: impl FnMut() -> Result<T>,
) -> Result<T> {
    match (retry_while_busy(&mut work), id) {
        (Err(e), Some(id)) if e.kind() == ErrorKind::Busy => {
            read_watches_again(cluster, pool, id, operation)?;
            work()
        }
        (result, _) => result,
    }
}

/// Repeats what finds an image busy, for a short time.
fn retry_while_busy<T>(mut work: impl FnMut() -> Result<T>) -> Result<T> {
    let until = Instant::now() + BUSY_TIMEOUT;
    loop {
        match work() {
            Err(e) if e.kind() == ErrorKind::Busy && Instant::now() < until => std::thread::sleep(BUSY_INTERVAL),
            result => return result,
        }
    }
}

fn snapshots(
    cluster: &Arc<Cluster>,
    (pool, prefix): (&str, &str),
    pace: u32,
    (after, most): (Option<&str>, usize),
    stop: &CancellationToken,
) -> Result<SnapshotPage> {
    let operation = format!("list the snapshots of {pool}");
    let io = IoCtx::open(cluster, pool)?;
    let most = most.max(1);
    // the trash comes last: an image is moved there, and seldom back
    let (mut candidates, mut next) = (Vec::new(), None);
    let mut in_trash = after.map_or(Some(None), |after| after.strip_prefix(IN_TRASH).map(Some));
    if let Some(after) = after.map_or(Some(None), |after| after.strip_prefix(IN_DIRECTORY).map(Some)) {
        let listed = rbd::list_page(&io, after, most, &operation)?;
        candidates.extend(listed.entries.into_iter().map(|image| (ImageSpec::named(pool, image.name), image.id)));
        next = listed.next.map(|id| format!("{IN_DIRECTORY}{id}"));
        in_trash = Some(None);
    }
    if let (None, Some(after)) = (&next, in_trash) {
        let left = most.saturating_sub(candidates.len());
        if left == 0 {
            next = Some(IN_TRASH.to_owned());
        } else {
            let trash = rbd::trash_page(&io, after.filter(|after| !after.is_empty()), left, &operation)?;
            let trashed = trash.entries.into_iter();
            candidates.extend(trashed.map(|trashed| (ImageSpec::with_id(pool, trashed.id.as_str()), trashed.id)));
            next = trash.next.map(|id| format!("{IN_TRASH}{id}"));
        }
    }
    let pace = RateLimiter::new(u64::from(pace));
    let mut page = SnapshotPage { next, ..SnapshotPage::default() };
    for (spec, id) in candidates {
        pace.wait(OBJECT, &operation, (&Progress::default(), stop))?;
        page.looked_at += 1;
        match read_header_tags(cluster, &io, (&spec, &id), prefix, &mut page, &operation) {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::Fenced => return Err(error),
            // one image keeps no other from being looked at: its parent may be in a pool that is not ours to read
            Err(error) => page.failed.push(error),
        }
    }
    Ok(page)
}

/// Adds the tags and owners in one image's header to the page.
fn read_header_tags(
    cluster: &Arc<Cluster>,
    io: &IoCtx,
    (spec, id): (&ImageSpec, &str),
    prefix: &str,
    page: &mut SnapshotPage,
    operation: &str,
) -> Result<()> {
    const RECORDS: usize = 512;
    let header = c_string(operation, &format!("rbd_header.{id}"))?;
    let owner_key = c_string(operation, &format!("metadata_{OWNER_KEY}"))?;
    let first = header_page(io, &header, c"snapshot_", &owner_key, RECORDS, operation)?;
    let mut tags: Vec<String> = first.xattrs.into_iter().filter(|name| name.starts_with(prefix)).collect();
    let owner = first.owner.into_iter().find(|(key, _)| *key == owner_key);
    page.owned.extend(owner.map(|(_, owner)| (spec.clone(), String::from_utf8_lossy(&owner).into_owned())));
    let (mut records, mut more) = (first.records, first.more);
    let mentioned = loop {
        if records.iter().any(|(_, value)| contains(value, prefix.as_bytes())) {
            break true;
        }
        let Some((last, _)) = records.last().filter(|_| more) else { break false };
        (records, more) = omap_page(io, &header, last, c"snapshot_", RECORDS, operation)?;
    };
    if mentioned && let Some(image) = Image::open(cluster, spec, Access::ReadOnly)? {
        let discarded = image.discarded_snapshots()?.into_iter().map(|(_, name)| name);
        let names = image.snapshots()?.into_iter().map(|snapshot| snapshot.name).chain(discarded);
        let names: Vec<String> = names.filter(|name| name.starts_with(prefix)).collect();
        tags.retain(|tag| !names.contains(tag));
        page.found.extend(names.into_iter().map(|name| (spec.clone(), name)));
    }
    page.found.extend(tags.into_iter().map(|name| (spec.clone(), name)));
    Ok(())
}

fn contains(data: &[u8], text: &[u8]) -> bool {
    text.is_empty() || data.windows(text.len()).any(|window| window == text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contains_finds_a_substring() {
        assert!(contains(b"\x08\0\0\0rbd-offload.1\0", b"rbd-offload."));
        assert!(!contains(b"rbd-offloa", b"rbd-offload."));
        assert!(contains(b"", b""));
    }
}
