//! OpenStack as the rest of the program sees it: the calls that a job makes, as plain types.
//!
//! [`Cloud`] is implemented by [`Session`] over HTTP, and by the engine's simulation in memory. Answers are outside
//! input: a field that is missing or of another type is an [`ErrorKind::Protocol`] error, never a panic.

mod error;
#[cfg(test)]
mod fake;
mod image;
mod json;
mod limits;
mod names;
mod recent;
mod server;
mod session;
mod tenant;
mod volume;

use std::collections::BTreeMap;
use std::fmt;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};

pub use error::{Error, ErrorKind, Result};
pub use image::is_reserved;
pub use session::Session;
pub use tenant::{ImageSizeUsage, Tenant};

/// A Glance image record.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct Image {
    pub id: String,
    #[serde(default)]
    pub name: Option<String>,
    /// `queued`, `saving`, `importing`, `active`, `deactivated`, `killed`, `deleted`, `pending_delete`.
    pub status: String,
    /// Project id.
    #[serde(default)]
    pub owner: Option<String>,
    /// `private`, `shared`, `community`, `public`.
    #[serde(default)]
    pub visibility: Option<String>,
    #[serde(default)]
    pub disk_format: Option<String>,
    #[serde(default)]
    pub container_format: Option<String>,
    /// GiB.
    #[serde(default, deserialize_with = "json::or_default")]
    pub min_disk: u64,
    /// MiB.
    #[serde(default, deserialize_with = "json::or_default")]
    pub min_ram: u64,
    /// Bytes.
    #[serde(default)]
    pub size: Option<u64>,
    #[serde(default, deserialize_with = "json::or_default")]
    pub tags: Vec<String>,
    /// Every property that is not one of Glance's own attributes; values that are no strings are left out.
    #[serde(flatten, deserialize_with = "image::properties")]
    pub properties: BTreeMap<String, String>,
}

/// One change of an image record; a list of them is one PATCH, all or nothing.
#[derive(Debug, Clone, PartialEq)]
pub enum ImageChange {
    /// Adds the property or replaces its value.
    Set {
        property: String,
        value: String,
    },
    /// Replaces the value of a property that is there; the whole PATCH is refused (`Conflict`) where it is not.
    Replace {
        property: String,
        value: String,
    },
    Remove {
        property: String,
    },
    DiskFormat(String),
    ContainerFormat(String),
    /// GiB.
    MinDisk(u64),
    /// MiB.
    MinRam(u64),
    Tags(Vec<String>),
}

/// What became of posting a location.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LocationAnswer {
    /// Glance works on it (202) or has done it (200).
    Accepted,
    /// 409: the image is active or saving already, or a task of it runs. Look before judging.
    Conflict,
}

/// Hash of the image's bytes, told to Glance with the location.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Validation {
    /// `sha512`.
    pub algorithm: String,
    /// Lower-case hexadecimal.
    pub value: String,
}

/// A Glance task that belongs to an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageTask {
    pub id: String,
    /// `location_import`, `api_image_import`, …; empty where Glance does not tell.
    pub kind: String,
    /// `pending`, `processing`, `success`, `failure`.
    pub status: String,
    pub message: String,
}

impl ImageTask {
    /// Whether it may be of a location that was posted.
    pub fn is_of_location(&self) -> bool {
        self.kind.is_empty() || self.kind == "location_import"
    }

    pub fn has_ended(&self) -> bool {
        matches!(self.status.as_str(), "success" | "failure")
    }
}

/// One of Glance's stores, as `GET /v2/info/stores/detail` tells it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GlanceStore {
    pub id: String,
    /// `rbd`, `file`, …
    pub kind: String,
    pub pool: Option<String>,
    pub fsid: Option<String>,
    pub default: bool,
}

impl GlanceStore {
    /// `false` where Glance says that the store is in another Ceph cluster than this one.
    pub fn may_be_in(&self, fsid: &str) -> bool {
        self.fsid.as_deref().is_none_or(|theirs| theirs.eq_ignore_ascii_case(fsid))
    }
}

/// What all daemons of one cloud see alike, and those of another cloud do not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CloudId {
    /// Of the project that the daemons log in to.
    pub project_id: String,
    /// Of the Glance that they use; `None` where the catalog does not tell it.
    pub region: Option<String>,
}

impl fmt::Display for CloudId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "service project {}", self.project_id)?;
        match &self.region {
            Some(region) => write!(f, ", region {region}"),
            None => Ok(()),
        }
    }
}

/// Where a list of images goes on. The default is its beginning.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ListCursor {
    /// The shown images are listed first, then the hidden ones.
    pub(crate) hidden: bool,
    /// Id of the last image before it.
    pub(crate) marker: Option<String>,
    /// Images asked for at a time, where that is fewer than the caller's limit: answers were too large.
    pub(crate) shrunk: Option<usize>,
}

/// One page of a list of images.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ImagePage {
    pub images: Vec<Image>,
    /// Ids of records that are too large to be read, or are not what the API promises.
    pub skipped: Vec<String>,
    /// `None`: the list has ended.
    pub next: Option<ListCursor>,
}

/// A Cinder volume.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct Volume {
    pub id: String,
    #[serde(rename = "os-vol-tenant-attr:tenant_id")]
    pub project_id: String,
    pub status: String,
    /// GiB.
    pub size: u64,
    /// `node@backend#pool`.
    #[serde(default, rename = "os-vol-host-attr:host")]
    pub host: Option<String>,
    /// The id in the RBD image's name after a migration.
    #[serde(default, rename = "os-vol-mig-status-attr:name_id")]
    pub name_id: Option<String>,
    #[serde(default, deserialize_with = "json::flag")]
    pub encrypted: bool,
    /// `failed-over` when its disk is the replica in another storage cluster.
    #[serde(default)]
    pub replication_status: Option<String>,
    /// The name of its type.
    #[serde(default)]
    pub volume_type: Option<String>,
    /// As the API gives it, Glance's own attributes (`min_disk`, `image_id`, `size`, …) included.
    #[serde(default, rename = "volume_image_metadata", deserialize_with = "volume::image_metadata")]
    pub image_metadata: BTreeMap<String, String>,
}

/// How far Cinder is with the deletion of a volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VolumeDeletion {
    /// Cinder keeps the volume.
    No,
    UnderWay,
    Done,
}

impl VolumeDeletion {
    /// By what Cinder answered; `None`: it has no such volume.
    pub fn of(volume: Option<&Volume>) -> Self {
        match volume.map(|volume| volume.status.as_str()) {
            None | Some("deleted") => Self::Done,
            Some("deleting") => Self::UnderWay,
            Some(_) => Self::No,
        }
    }
}

/// A Cinder snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct VolumeSnapshot {
    pub id: String,
    pub volume_id: String,
    #[serde(rename = "os-extended-snapshot-attributes:project_id")]
    pub project_id: String,
    pub status: String,
    /// GiB.
    pub size: u64,
}

/// A Nova server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Server {
    pub id: String,
    /// `tenant_id`.
    pub project_id: String,
    /// Who made it.
    pub user_id: Option<String>,
    pub status: String,
    /// `OS-EXT-STS:task_state`: what Nova is doing with it.
    pub task_state: Option<String>,
    /// `OS-EXT-SRV-ATTR:host`.
    pub host: Option<String>,
    /// Image that it was made from; `None` when it is volume-backed.
    pub image_id: Option<String>,
    /// Properties of that image when the server was made: those that Nova knows. `None`: an older Nova (before
    /// microversion 2.98) does not tell.
    pub image_properties: Option<BTreeMap<String, String>>,
    /// GiB of the flavor's root disk.
    pub root_disk: Option<u64>,
    /// Image or flavor ask for a disk that Nova encrypts.
    pub encrypted: bool,
}

/// What Nova does to an instance that may remove or replace its disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskChange {
    Deleted,
    /// Also evacuated, which is a rebuild on another host.
    Rebuilt,
    /// Its disk goes, and a new one is made of the image that Nova keeps of it.
    Offloaded,
    Resized,
    Migrated,
    Built,
    /// A task that this program does not know.
    Other,
}

impl DiskChange {
    /// As a participle: "the instance was rebuilt".
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Deleted => "deleted",
            Self::Rebuilt => "rebuilt",
            Self::Offloaded => "shelved",
            Self::Resized => "resized",
            Self::Migrated => "migrated",
            Self::Built => "built",
            Self::Other => "changed by Nova",
        }
    }
}

impl Server {
    /// Whether Nova may be about to remove or replace the instance's disk, or has done it. Nova cannot remove a disk
    /// that has a snapshot: it tries for a minute, then goes on without a word, and a rebuild boots the old disk as
    /// the new image.
    ///
    /// The states are those of Nova 34 (`nova/compute/task_states.py`). A task that is not known to leave the disk
    /// alone counts as one that does not. A resize or a migration on the same Ceph cluster keeps the disk, one to
    /// another cell does not, and Nova does not tell which it is.
    pub fn disk_change(&self) -> Option<DiskChange> {
        match self.task_state.as_deref().unwrap_or_default() {
            "deleting" | "soft-deleting" => return Some(DiskChange::Deleted),
            "rebuilding" | "rebuild_block_device_mapping" | "rebuild_spawning" => return Some(DiskChange::Rebuilt),
            "shelving_offloading" | "unshelving" => return Some(DiskChange::Offloaded),
            "resize_prep" | "resize_migrating" | "resize_migrated" | "resize_finish" | "resize_reverting"
            | "resize_confirming" => return Some(DiskChange::Resized),
            "migrating" => return Some(DiskChange::Migrated),
            "scheduling" | "block_device_mapping" | "networking" | "spawning" => return Some(DiskChange::Built),
            // a shelved instance keeps its disk until it is offloaded
            "shelving" | "shelving_image_pending_upload" | "shelving_image_uploading" => {}
            ""
            | "pausing"
            | "unpausing"
            | "suspending"
            | "resuming"
            | "powering-off"
            | "powering-on"
            | "rebooting"
            | "reboot_pending"
            | "reboot_started"
            | "rebooting_hard"
            | "reboot_pending_hard"
            | "reboot_started_hard"
            | "rescuing"
            | "unrescuing"
            | "updating_password"
            | "restoring" => {}
            task if task.starts_with("image_") => {}
            _ => return Some(DiskChange::Other),
        }
        match self.status.as_str() {
            "DELETED" | "SOFT_DELETED" => Some(DiskChange::Deleted),
            "REBUILD" => Some(DiskChange::Rebuilt),
            "SHELVED_OFFLOADED" => Some(DiskChange::Offloaded),
            "RESIZE" | "VERIFY_RESIZE" | "REVERT_RESIZE" => Some(DiskChange::Resized),
            "MIGRATING" => Some(DiskChange::Migrated),
            "BUILD" => Some(DiskChange::Built),
            _ => None,
        }
    }

    /// Nova does not know how the instance is, since the cell that it is in does not answer.
    pub fn is_in_unreachable_cell(&self) -> bool {
        self.status == "UNKNOWN"
    }
}

/// What a job asks of Glance, Cinder, Nova and Keystone. `None` stands for "there is no such thing" (404).
#[async_trait]
pub trait Cloud: Send + Sync + 'static {
    async fn image(&self, id: &str) -> Result<Option<Image>>;

    /// `None` when the image is gone. [`ErrorKind::Conflict`] where a change does not apply,
    /// [`ErrorKind::Forbidden`] where the record's state forbids it.
    async fn update_image(&self, id: &str, changes: &[ImageChange]) -> Result<Option<Image>>;

    /// Registers `url` the way `[glance] register` says. `None` when the image is gone.
    async fn add_location(
        &self,
        id: &str,
        url: &str,
        validation: Option<&Validation>,
    ) -> Result<Option<LocationAnswer>>;

    /// URLs of the image's locations; `None` where Glance does not show them to this user.
    async fn image_locations(&self, id: &str) -> Result<Option<Vec<String>>>;

    /// Only an administrator can read the image's data from then on. `false` when the image is gone. An image that is
    /// deactivated already stays so.
    async fn deactivate_image(&self, id: &str) -> Result<bool>;

    /// The image's tasks, newest first; empty where Glance does not know the call.
    async fn image_tasks(&self, id: &str) -> Result<Vec<ImageTask>>;

    /// One page (of at most `limit`) of the images in status `queued`, of all projects. A page whose answer would be
    /// too large is a smaller one. [`ErrorKind::Unavailable`] also when the image at the cursor is gone: begin again.
    async fn queued_images(&self, cursor: &ListCursor, limit: usize) -> Result<ImagePage>;

    /// Bytes that the project's images take by Glance's count, all statuses that count included.
    async fn image_usage(&self, project_id: &str) -> Result<u64>;

    /// The project's limit `image_size_total` of the service glance in Keystone, in bytes; `None` where the cloud has
    /// none.
    async fn image_size_limit(&self, project_id: &str) -> Result<Option<u64>>;

    /// As they were within the last minute.
    async fn stores(&self) -> Result<Vec<GlanceStore>>;

    async fn volume(&self, id: &str) -> Result<Option<Volume>>;

    /// The id of the Glance store that Cinder uploads volumes of this type to, as it was within the last minute.
    /// `None`: the type names none.
    async fn store_of_volume_type(&self, name: &str) -> Result<Option<String>>;

    async fn snapshot(&self, id: &str) -> Result<Option<VolumeSnapshot>>;

    async fn server(&self, id: &str) -> Result<Option<Server>>;

    /// The user's name; `None` also where Keystone does not tell us.
    async fn user_name(&self, id: &str) -> Result<Option<String>>;

    /// The project's name; `None` also where Keystone does not tell us.
    async fn project_name(&self, id: &str) -> Result<Option<String>>;
}

#[async_trait]
impl Cloud for Session {
    async fn image(&self, id: &str) -> Result<Option<Image>> {
        self.get_image(id).await
    }

    async fn update_image(&self, id: &str, changes: &[ImageChange]) -> Result<Option<Image>> {
        self.patch_image(id, changes).await
    }

    async fn add_location(
        &self,
        id: &str,
        url: &str,
        validation: Option<&Validation>,
    ) -> Result<Option<LocationAnswer>> {
        self.register_location(id, url, validation).await
    }

    async fn image_locations(&self, id: &str) -> Result<Option<Vec<String>>> {
        self.list_locations(id).await
    }

    async fn deactivate_image(&self, id: &str) -> Result<bool> {
        self.deactivate(id).await
    }

    async fn image_tasks(&self, id: &str) -> Result<Vec<ImageTask>> {
        self.list_tasks(id).await
    }

    async fn queued_images(&self, cursor: &ListCursor, limit: usize) -> Result<ImagePage> {
        self.list_queued(cursor, limit).await
    }

    async fn image_usage(&self, project_id: &str) -> Result<u64> {
        self.sum_image_sizes(project_id).await
    }

    async fn image_size_limit(&self, project_id: &str) -> Result<Option<u64>> {
        self.read_image_size_limit(project_id).await
    }

    async fn stores(&self) -> Result<Vec<GlanceStore>> {
        self.stores.or(self.list_stores()).await
    }

    async fn volume(&self, id: &str) -> Result<Option<Volume>> {
        volume::get(&self.wire, id).await
    }

    async fn store_of_volume_type(&self, name: &str) -> Result<Option<String>> {
        let stores = self.volume_type_stores.or(volume::list_type_stores(&self.wire)).await?;
        if let Some(store) = stores.get(name) {
            return Ok(store.clone());
        }
        // the type is new, or has another name now
        let stores = self.volume_type_stores.renew(volume::list_type_stores(&self.wire)).await?;
        Ok(stores.get(name).cloned().flatten())
    }

    async fn snapshot(&self, id: &str) -> Result<Option<VolumeSnapshot>> {
        volume::get_snapshot(&self.wire, id).await
    }

    async fn server(&self, id: &str) -> Result<Option<Server>> {
        server::get(&self.wire, id).await
    }

    async fn user_name(&self, id: &str) -> Result<Option<String>> {
        self.read_name("user", "users", id).await
    }

    async fn project_name(&self, id: &str) -> Result<Option<String>> {
        self.read_name("project", "projects", id).await
    }
}

impl fmt::Display for ImageTask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "task {} {}: {}", self.id, self.status, self.message)
    }
}
