//! The calls of a daemon on Glance, Cinder and Nova.

use async_trait::async_trait;

use super::glance;
use crate::job::simulation::faults::gate::{Handle, Kind};
use crate::job::simulation::faults::trouble::Trouble;
use crate::job::simulation::invariants::publishing;
use crate::job::simulation::state::cluster::FSID;
use crate::job::simulation::state::glance::TASK;
use crate::openstack::{
    Cloud, Error, ErrorKind, GlanceStore, Image, ImageChange, ImagePage, ImageTask, ListCursor, LocationAnswer, Result,
    Server, Validation, Volume, VolumeSnapshot,
};

/// Bytes of an answer that a daemon reads at most.
const ANSWER_MAX: usize = 16 * 1024 * 1024;

#[async_trait]
impl Cloud for Handle {
    async fn image(&self, id: &str) -> Result<Option<Image>> {
        self.glance(
            Kind::Read,
            || format!("glance image {id}"),
            |world| {
                let Some(record) = world.cloud.images.get_mut(id) else { return Ok(None) };
                if record.image.properties.values().map(String::len).sum::<usize>() > ANSWER_MAX {
                    return Err(Error::new(format!("image {id}"), ErrorKind::TooLarge, "the answer is too large"));
                }
                record.told.insert(self.node.name.clone(), record.image.clone());
                Ok(Some(record.image.clone()))
            },
        )
        .await
    }

    async fn update_image(&self, id: &str, changes: &[ImageChange]) -> Result<Option<Image>> {
        self.check_lease(id);
        self.glance(
            Kind::Write,
            || format!("glance patch {id} {changes:?}"),
            |world| {
                let protected = world.cloud.protected;
                let Some(record) = world.cloud.images.get_mut(id) else { return Ok(None) };
                let refused = |kind| Error::new(format!("update image {id}"), kind, "refused");
                record.apply(changes, protected).map_err(refused)?;
                record.told.insert(self.node.name.clone(), record.image.clone());
                Ok(Some(record.image.clone()))
            },
        )
        .await
    }

    async fn add_location(
        &self,
        id: &str,
        url: &str,
        _validation: Option<&Validation>,
    ) -> Result<Option<LocationAnswer>> {
        self.check_lease(id);
        let shared = self.world().clone();
        self.glance(
            Kind::Write,
            || format!("glance add location {id} {url}"),
            |world| {
                let Some(record) = world.cloud.images.get(id) else { return Ok(None) };
                if record.image.status != "queued" || record.image.properties.contains_key(TASK) {
                    return Ok(Some(LocationAnswer::Conflict));
                }
                publishing::location_added(world, id, url);
                let task = format!("task-{}", world.ceph.next());
                // a tag that is changed there and back is the same request to a daemon that did not look meanwhile
                let changed = world.has(Trouble::ChangedTags);
                if let Some(record) = world.cloud.images.get_mut(id) {
                    record.take_location(&self.node.name, &task, changed);
                }
                tokio::spawn(glance::location_task(shared, id.to_owned(), task, url.to_owned()));
                Ok(Some(LocationAnswer::Accepted))
            },
        )
        .await
    }

    async fn image_locations(&self, id: &str) -> Result<Option<Vec<String>>> {
        self.glance(
            Kind::Read,
            || format!("glance locations {id}"),
            |world| Ok(world.cloud.images.get(id).map(|r| r.locations.clone())),
        )
        .await
    }

    async fn deactivate_image(&self, id: &str) -> Result<bool> {
        self.glance(
            Kind::Write,
            || format!("glance deactivate {id}"),
            |world| {
                let Some(record) = world.cloud.images.get_mut(id) else { return Ok(false) };
                if !matches!(record.image.status.as_str(), "active" | "deactivated") {
                    return Err(Error::new(format!("deactivate {id}"), ErrorKind::Forbidden, "not active"));
                }
                record.image.status = "deactivated".into();
                Ok(true)
            },
        )
        .await
    }

    async fn image_tasks(&self, id: &str) -> Result<Vec<ImageTask>> {
        self.glance(
            Kind::Read,
            || format!("glance tasks {id}"),
            |world| Ok(world.cloud.images.get(id).map(|r| r.tasks.clone()).unwrap_or_default()),
        )
        .await
    }

    async fn queued_images(&self, cursor: &ListCursor, limit: usize) -> Result<ImagePage> {
        let marker = cursor.marker.as_deref();
        if cursor.hidden {
            // none is
            return self
                .glance(Kind::Read, || "glance hidden queued images".into(), |_| Ok(ImagePage::default()))
                .await;
        }
        self.glance(
            Kind::Read,
            || format!("glance queued images after {marker:?}"),
            |world| {
                let limit = if world.small_pages { 2 } else { limit };
                let images = world.cloud.queued_images(marker, limit);
                let is_last = images.len() < limit;
                let marker = images.last().filter(|_| !is_last).map(|image| image.id.clone());
                let next = Some(ListCursor { hidden: is_last, marker, ..ListCursor::default() });
                Ok(ImagePage { images, skipped: Vec::new(), next })
            },
        )
        .await
    }

    async fn image_usage(&self, _project_id: &str) -> Result<u64> {
        Ok(0)
    }

    async fn image_size_limit(&self, _project_id: &str) -> Result<Option<u64>> {
        Ok(None)
    }

    async fn stores(&self) -> Result<Vec<GlanceStore>> {
        self.glance(
            Kind::Read,
            || "glance stores".into(),
            |_| {
                Ok(vec![GlanceStore {
                    id: "rbd".into(),
                    kind: "rbd".into(),
                    pool: Some("images".into()),
                    fsid: Some(FSID.into()),
                    default: true,
                }])
            },
        )
        .await
    }

    async fn volume(&self, id: &str) -> Result<Option<Volume>> {
        self.service(false, Kind::Read, || format!("cinder volume {id}"), |world| Ok(world.cloud.volume(id))).await
    }

    async fn store_of_volume_type(&self, _name: &str) -> Result<Option<String>> {
        Ok(None)
    }

    async fn snapshot(&self, id: &str) -> Result<Option<VolumeSnapshot>> {
        self.service(
            false,
            Kind::Read,
            || format!("cinder snapshot {id}"),
            |world| Ok(world.cloud.snapshots.get(id).map(|(s, _)| s.clone())),
        )
        .await
    }

    async fn server(&self, id: &str) -> Result<Option<Server>> {
        self.service(false, Kind::Read, || format!("nova server {id}"), |world| Ok(world.cloud.server(&world.ceph, id)))
            .await
    }

    async fn user_name(&self, _id: &str) -> Result<Option<String>> {
        Ok(None)
    }

    async fn project_name(&self, _id: &str) -> Result<Option<String>> {
        Ok(None)
    }
}
