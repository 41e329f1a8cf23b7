//! A daemon's calls on the cluster and the services, each of which may go on after its caller dropped the future.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use tokio_util::sync::CancellationToken;

use crate::ceph::{
    self, Changed, Compare, Features, FillState, ImageInfo, ImageSpec, KeyedObject, Link, LockKey, Locked, Moved,
    Objects, Page, Progress, SnapshotPage, Storage, TransferLimits, Trashed, Version,
};
use crate::job::simulation::faults::lasting::Lasting;
use crate::openstack::{
    self, Cloud, GlanceStore, Image, ImageChange, ImagePage, ImageTask, ListCursor, LocationAnswer, Server, Validation,
    Volume, VolumeSnapshot,
};

#[async_trait]
impl Storage for Lasting {
    async fn fsid(&self) -> ceph::Result<String> {
        self.0.fsid().await
    }

    async fn image(&self, image: &ImageSpec, snapshot: Option<&str>) -> ceph::Result<Option<ImageInfo>> {
        let (handle, image, snapshot) = (self.0.clone(), image.clone(), snapshot.map(str::to_owned));
        self.run(async move { Storage::image(&handle, &image, snapshot.as_deref()).await }).await
    }

    async fn create_snapshot(&self, image: &ImageSpec, snapshot: &str) -> ceph::Result<Changed> {
        let (handle, image, snapshot) = (self.0.clone(), image.clone(), snapshot.to_owned());
        self.run(async move { handle.create_snapshot(&image, &snapshot).await }).await
    }

    async fn protect_snapshot(&self, image: &ImageSpec, snapshot: &str) -> ceph::Result<Changed> {
        let (handle, image, snapshot) = (self.0.clone(), image.clone(), snapshot.to_owned());
        self.run(async move { handle.protect_snapshot(&image, &snapshot).await }).await
    }

    async fn set_snapshot_tag(&self, image: &ImageSpec, snapshot: &str, tag: &str) -> ceph::Result<()> {
        let (handle, image, snapshot, tag) = (self.0.clone(), image.clone(), snapshot.to_owned(), tag.to_owned());
        self.run(async move { handle.set_snapshot_tag(&image, &snapshot, &tag).await }).await
    }

    async fn snapshot_tag(&self, image: &ImageSpec, snapshot: &str) -> ceph::Result<Option<String>> {
        self.0.snapshot_tag(image, snapshot).await
    }

    async fn remove_snapshot_tag(&self, image: &ImageSpec, snapshot: &str) -> ceph::Result<Changed> {
        let (handle, image, snapshot) = (self.0.clone(), image.clone(), snapshot.to_owned());
        self.run(async move { handle.remove_snapshot_tag(&image, &snapshot).await }).await
    }

    async fn remove_snapshot(&self, image: &ImageSpec, snapshot: &str) -> ceph::Result<Changed> {
        let (handle, image, snapshot) = (self.0.clone(), image.clone(), snapshot.to_owned());
        self.run(async move { handle.remove_snapshot(&image, &snapshot).await }).await
    }

    async fn clone_image(
        &self,
        source: &ImageSpec,
        snapshot: &str,
        destination: &ImageSpec,
        features: Features,
    ) -> ceph::Result<()> {
        let (handle, source, snapshot) = (self.0.clone(), source.clone(), snapshot.to_owned());
        let destination = destination.clone();
        self.run(async move { handle.clone_image(&source, &snapshot, &destination, features).await }).await
    }

    async fn create_like(
        &self,
        source: &ImageSpec,
        snapshot: &str,
        destination: &ImageSpec,
        features: Features,
    ) -> ceph::Result<()> {
        let (handle, source, snapshot) = (self.0.clone(), source.clone(), snapshot.to_owned());
        let destination = destination.clone();
        self.run(async move { handle.create_like(&source, &snapshot, &destination, features).await }).await
    }

    async fn flatten(
        &self,
        image: &ImageSpec,
        limits: &TransferLimits,
        progress: &Progress,
        cancel: &CancellationToken,
    ) -> ceph::Result<Moved> {
        let (image, limits) = (image.clone(), limits.clone());
        self.run_long(progress, cancel, |handle, progress, cancel| async move {
            handle.flatten(&image, &limits, &progress, &cancel).await
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
    ) -> ceph::Result<Moved> {
        let (source, snapshot, destination) = (source.clone(), snapshot.to_owned(), destination.clone());
        let limits = limits.clone();
        self.run_long(progress, cancel, |handle, progress, cancel| async move {
            handle.copy(&source, &snapshot, &destination, &limits, &progress, &cancel).await
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
    ) -> ceph::Result<Moved> {
        let (source, snapshot, destination) = (source.clone(), snapshot.to_owned(), destination.clone());
        let limits = limits.clone();
        self.run_long(progress, cancel, |handle, progress, cancel| async move {
            handle.server_copy(&source, &snapshot, &destination, &limits, &progress, &cancel).await
        })
        .await
    }

    async fn fill_published(
        &self,
        image: &ImageSpec,
        from: FillState,
        limits: &TransferLimits,
        progress: &Progress,
        cancel: &CancellationToken,
        saved: &(dyn Fn(FillState) + Send + Sync),
    ) -> ceph::Result<Moved> {
        let (image, limits) = (image.clone(), limits.clone());
        let state = Arc::new(Mutex::new(from));
        let told = Arc::clone(&state);
        let result = self
            .run_long(progress, cancel, |handle, progress, cancel| async move {
                let saved = |state| *told.lock().unwrap_or_else(PoisonError::into_inner) = state;
                handle.fill_published(&image, from, &limits, &progress, &cancel, &saved).await
            })
            .await;
        saved(*state.lock().unwrap_or_else(PoisonError::into_inner));
        result
    }

    async fn detach(
        &self,
        image: &ImageSpec,
        limits: &TransferLimits,
        progress: &Progress,
        cancel: &CancellationToken,
    ) -> ceph::Result<Moved> {
        let (image, limits) = (image.clone(), limits.clone());
        self.run_long(progress, cancel, |handle, progress, cancel| async move {
            handle.detach(&image, &limits, &progress, &cancel).await
        })
        .await
    }

    async fn is_gone(&self, image: &ImageSpec) -> ceph::Result<bool> {
        self.0.is_gone(image).await
    }

    async fn sweep_objects(
        &self,
        image: &ImageSpec,
        objects: u64,
        data_pool: Option<&str>,
        limits: &TransferLimits,
        progress: &Progress,
        cancel: &CancellationToken,
    ) -> ceph::Result<u64> {
        let (image, data_pool, limits) = (image.clone(), data_pool.map(str::to_owned), limits.clone());
        self.run_long(progress, cancel, |handle, progress, cancel| async move {
            handle.sweep_objects(&image, objects, data_pool.as_deref(), &limits, &progress, &cancel).await
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
    ) -> ceph::Result<Option<u64>> {
        self.0.compare(source, snapshot, destination, extent, progress, cancel).await
    }

    async fn read(&self, image: &ImageSpec, offset: u64, length: usize) -> ceph::Result<Vec<u8>> {
        let (handle, image) = (self.0.clone(), image.clone());
        self.run(async move { Storage::read(&handle, &image, offset, length).await }).await
    }

    async fn forget_dead_watches(&self, image: &ImageSpec) -> ceph::Result<()> {
        let (handle, image) = (self.0.clone(), image.clone());
        self.run(async move { handle.forget_dead_watches(&image).await }).await
    }

    async fn rename(&self, image: &ImageSpec, name: &str) -> ceph::Result<()> {
        let (handle, image, name) = (self.0.clone(), image.clone(), name.to_owned());
        self.run(async move { handle.rename(&image, &name).await }).await
    }

    async fn chain(&self, image: &ImageSpec, snapshot: &str) -> ceph::Result<Vec<Link>> {
        self.0.chain(image, snapshot).await
    }

    async fn rebuild_maps(
        &self,
        image: &ImageSpec,
        progress: &Progress,
        cancel: &CancellationToken,
    ) -> ceph::Result<()> {
        let image = image.clone();
        self.run_long(progress, cancel, |handle, progress, cancel| async move {
            handle.rebuild_maps(&image, &progress, &cancel).await
        })
        .await
    }

    async fn finish_removal(&self, image: &ImageSpec) -> ceph::Result<Changed> {
        let (handle, image) = (self.0.clone(), image.clone());
        self.run(async move { handle.finish_removal(&image).await }).await
    }

    async fn trash(&self, pool: &str, after: Option<&str>, most: usize) -> ceph::Result<Page<Trashed>> {
        self.0.trash(pool, after, most).await
    }

    async fn trashed(&self, image: &ImageSpec) -> ceph::Result<Option<Trashed>> {
        self.0.trashed(image).await
    }

    async fn purge(&self, image: &ImageSpec) -> ceph::Result<Changed> {
        let (handle, image) = (self.0.clone(), image.clone());
        self.run(async move { handle.purge(&image).await }).await
    }

    async fn remove_image(&self, image: &ImageSpec) -> ceph::Result<Changed> {
        let (handle, image) = (self.0.clone(), image.clone());
        self.run(async move { handle.remove_image(&image).await }).await
    }

    async fn metadata(&self, image: &ImageSpec, key: &str) -> ceph::Result<Option<String>> {
        let (handle, image, key) = (self.0.clone(), image.clone(), key.to_owned());
        self.run(async move { handle.metadata(&image, &key).await }).await
    }

    async fn set_metadata(&self, image: &ImageSpec, key: &str, value: &str) -> ceph::Result<()> {
        let (handle, image, key, value) = (self.0.clone(), image.clone(), key.to_owned(), value.to_owned());
        self.run(async move { handle.set_metadata(&image, &key, &value).await }).await
    }

    async fn replace_metadata(&self, image: &ImageSpec, metadata: &[(String, String)]) -> ceph::Result<()> {
        let (handle, image, metadata) = (self.0.clone(), image.clone(), metadata.to_vec());
        self.run(async move { handle.replace_metadata(&image, &metadata).await }).await
    }

    async fn remove_metadata(&self, image: &ImageSpec, key: &str) -> ceph::Result<Changed> {
        let (handle, image, key) = (self.0.clone(), image.clone(), key.to_owned());
        self.run(async move { handle.remove_metadata(&image, &key).await }).await
    }

    async fn images(&self, pool: &str, prefix: &str, after: Option<&str>, most: usize) -> ceph::Result<Page<String>> {
        self.0.images(pool, prefix, after, most).await
    }

    async fn snapshots(
        &self,
        pool: &str,
        prefix: &str,
        pace: u32,
        after: Option<&str>,
        most: usize,
    ) -> ceph::Result<SnapshotPage> {
        self.0.snapshots(pool, prefix, pace, after, most).await
    }

    async fn address(&self) -> ceph::Result<String> {
        Storage::address(&self.0).await
    }

    async fn fence(&self, address: &str) -> ceph::Result<Changed> {
        let (handle, address) = (self.0.clone(), address.to_owned());
        self.run(async move { handle.fence(&address).await }).await
    }

    async fn reconnect(&self) -> ceph::Result<Changed> {
        Storage::reconnect(&self.0).await
    }
}

#[async_trait]
impl Objects for Lasting {
    async fn read(&self, object: &str) -> ceph::Result<Option<(Vec<u8>, Version)>> {
        Objects::read(&self.0, object).await
    }

    async fn create(&self, object: &str, data: &[u8]) -> ceph::Result<Version> {
        let (handle, object, data) = (self.0.clone(), object.to_owned(), data.to_vec());
        self.run(async move { handle.create(&object, &data).await }).await
    }

    async fn replace(
        &self,
        object: &str,
        data: &[u8],
        version: Version,
        lock: Option<&LockKey>,
    ) -> ceph::Result<Version> {
        let (handle, object, data, lock) = (self.0.clone(), object.to_owned(), data.to_vec(), lock.cloned());
        self.run(async move { handle.replace(&object, &data, version, lock.as_ref()).await }).await
    }

    async fn read_with_keys(&self, object: &str) -> ceph::Result<Option<KeyedObject>> {
        self.0.read_with_keys(object).await
    }

    async fn replace_and_remove_keys(
        &self,
        object: &str,
        data: &[u8],
        version: Version,
        lock: Option<&LockKey>,
        keys: &[String],
    ) -> ceph::Result<Version> {
        let (handle, object, data) = (self.0.clone(), object.to_owned(), data.to_vec());
        let (lock, keys) = (lock.cloned(), keys.to_vec());
        self.run(async move { handle.replace_and_remove_keys(&object, &data, version, lock.as_ref(), &keys).await })
            .await
    }

    async fn change_keys(
        &self,
        object: &str,
        set: &[(String, Vec<u8>)],
        removed: &[String],
        version: Version,
    ) -> ceph::Result<Version> {
        let (handle, object, set, removed) = (self.0.clone(), object.to_owned(), set.to_vec(), removed.to_vec());
        self.run(async move { handle.change_keys(&object, &set, &removed, version).await }).await
    }

    async fn remove(&self, object: &str, version: Version, lock: Option<&LockKey>) -> ceph::Result<()> {
        let (handle, object, lock) = (self.0.clone(), object.to_owned(), lock.cloned());
        self.run(async move { handle.remove(&object, version, lock.as_ref()).await }).await
    }

    async fn lock(&self, object: &str, lock: &LockKey, description: &str, duration: Duration) -> ceph::Result<Locked> {
        let (handle, object, lock) = (self.0.clone(), object.to_owned(), lock.clone());
        let description = description.to_owned();
        self.run(async move { handle.lock(&object, &lock, &description, duration).await }).await
    }

    async fn renew(&self, object: &str, lock: &LockKey, description: &str, duration: Duration) -> ceph::Result<()> {
        let (handle, object, lock) = (self.0.clone(), object.to_owned(), lock.clone());
        let description = description.to_owned();
        self.run(async move { handle.renew(&object, &lock, &description, duration).await }).await
    }

    async fn unlock(&self, object: &str, lock: &LockKey) -> ceph::Result<Changed> {
        let (handle, object, lock) = (self.0.clone(), object.to_owned(), lock.clone());
        self.run(async move { handle.unlock(&object, &lock).await }).await
    }

    async fn is_locked(&self, object: &str, lock_name: &str) -> ceph::Result<bool> {
        self.0.is_locked(object, lock_name).await
    }

    async fn omap(&self, object: &str, after: &str, max: usize) -> ceph::Result<Vec<(String, Vec<u8>)>> {
        self.0.omap(object, after, max).await
    }

    async fn set_omap(&self, object: &str, entries: &[(String, Vec<u8>)]) -> ceph::Result<()> {
        let (handle, object, entries) = (self.0.clone(), object.to_owned(), entries.to_vec());
        self.run(async move { handle.set_omap(&object, &entries).await }).await
    }

    async fn remove_omap(&self, object: &str, keys: &[String]) -> ceph::Result<()> {
        let (handle, object, keys) = (self.0.clone(), object.to_owned(), keys.to_vec());
        self.run(async move { handle.remove_omap(&object, &keys).await }).await
    }

    async fn list(&self) -> ceph::Result<Vec<String>> {
        self.0.list().await
    }
}

#[async_trait]
impl Cloud for Lasting {
    async fn image(&self, id: &str) -> openstack::Result<Option<Image>> {
        Cloud::image(&self.0, id).await
    }

    async fn update_image(&self, id: &str, changes: &[ImageChange]) -> openstack::Result<Option<Image>> {
        let (handle, id, changes) = (self.0.clone(), id.to_owned(), changes.to_vec());
        self.run(async move { handle.update_image(&id, &changes).await }).await
    }

    async fn add_location(
        &self,
        id: &str,
        url: &str,
        validation: Option<&Validation>,
    ) -> openstack::Result<Option<LocationAnswer>> {
        let (handle, id, url, validation) = (self.0.clone(), id.to_owned(), url.to_owned(), validation.cloned());
        self.run(async move { handle.add_location(&id, &url, validation.as_ref()).await }).await
    }

    async fn image_locations(&self, id: &str) -> openstack::Result<Option<Vec<String>>> {
        self.0.image_locations(id).await
    }

    async fn deactivate_image(&self, id: &str) -> openstack::Result<bool> {
        let (handle, id) = (self.0.clone(), id.to_owned());
        self.run(async move { handle.deactivate_image(&id).await }).await
    }

    async fn user_name(&self, id: &str) -> openstack::Result<Option<String>> {
        self.0.user_name(id).await
    }

    async fn project_name(&self, id: &str) -> openstack::Result<Option<String>> {
        self.0.project_name(id).await
    }

    async fn image_tasks(&self, id: &str) -> openstack::Result<Vec<ImageTask>> {
        self.0.image_tasks(id).await
    }

    async fn queued_images(&self, cursor: &ListCursor, limit: usize) -> openstack::Result<ImagePage> {
        self.0.queued_images(cursor, limit).await
    }

    async fn image_usage(&self, project_id: &str) -> openstack::Result<u64> {
        self.0.image_usage(project_id).await
    }

    async fn image_size_limit(&self, project_id: &str) -> openstack::Result<Option<u64>> {
        self.0.image_size_limit(project_id).await
    }

    async fn stores(&self) -> openstack::Result<Vec<GlanceStore>> {
        self.0.stores().await
    }

    async fn volume(&self, id: &str) -> openstack::Result<Option<Volume>> {
        self.0.volume(id).await
    }

    async fn store_of_volume_type(&self, name: &str) -> openstack::Result<Option<String>> {
        self.0.store_of_volume_type(name).await
    }

    async fn snapshot(&self, id: &str) -> openstack::Result<Option<VolumeSnapshot>> {
        self.0.snapshot(id).await
    }

    async fn server(&self, id: &str) -> openstack::Result<Option<Server>> {
        self.0.server(id).await
    }
}
