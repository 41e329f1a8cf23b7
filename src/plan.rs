//! The plan: from a request to what is to be done, or why it cannot be done here.
//!
//! Nothing of the notification is believed: the image, its owner and its tags are read from Glance, the source from
//! Cinder or Nova, the disk from Ceph. A refusal is a sentence for the tenant, so a source that does not exist and one
//! of another project read the same.

use std::collections::BTreeMap;
use std::time::Duration;

use uuid::Uuid;

use crate::ceph::{self, ErrorKind, Features, ImageInfo, ImageSpec, Storage};
use crate::config::{Config, MethodChoice, PublishChoice};
use crate::decline::Decline;
use crate::openstack::{self, Cloud, GlanceStore, Image, Server, Volume, VolumeSnapshot};
use crate::request::{self, Offer, PROPERTY_PREFIX, Source, TagRequest, Trigger};

/// Image attributes that Cinder keeps among a volume's image metadata; they are no properties of the new image.
const CORE_ATTRIBUTES: [&str; 9] =
    ["checksum", "container_format", "disk_format", "image_id", "image_name", "min_disk", "min_ram", "name", "size"];

/// Prefixes of properties that never go from a volume to an image: Glance's own, ours, signatures of other bytes, and
/// the encryption key, which dies with the volume that it belongs to.
const RESERVED: [&str; 5] =
    ["os_glance", PROPERTY_PREFIX, "img_signature", "signature_verified", "cinder_encryption_key"];

/// Property by which Cinder tells the key that it has cloned for an image.
const ENCRYPTION_KEY: &str = "cinder_encryption_key_id";

/// Properties of an instance's image that Nova does not hand on to a snapshot: its default for
/// `non_inheritable_image_properties`, and descriptions of disks that the snapshot has not.
const NOT_FOR_SNAPSHOTS: [&str; 6] =
    ["bittorrent", "block_device_mapping", "cache_in_nova", "img_block_device_mapping", "img_mappings", "mappings"];

/// Properties of an instance's image that tell of the instance which that image is a snapshot of.
const OF_ANOTHER_INSTANCE: [&str; 4] = ["boot_roles", "owner_project_name", "owner_user_name", "user_id"];

/// Most properties that an image inherits from its source; Glance's own default limit for an image.
const INHERITED_MAX: usize = 128;

/// Most bytes of names and values, as the job's record holds them.
const INHERITED_BYTES_MAX: usize = 256 << 10;

/// After this time a disk that was not found is looked for once more.
const REOPEN_PAUSE: Duration = Duration::from_millis(500);

/// What is asked of the plan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlanRequest {
    pub image_id: Uuid,
    pub trigger: Trigger,
    /// The source that the job's record names; for a request with a tag, the tag decides.
    pub source: Option<Source>,
    /// Started by `retry`, which needs no tag.
    pub retried: bool,
    /// A service handed its work over and may still take it back: its offer must stand on the record.
    pub offered: bool,
}

/// What is to be done for a job.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// The record as it was read.
    pub image: Image,
    /// Owner of image and source.
    pub project_id: String,
    pub source: Source,
    pub origin: ImageSpec,
    /// Internal id of the origin.
    pub origin_id: String,
    /// A snapshot of Cinder's, where that is the source; otherwise the job makes one.
    pub snapshot: Option<String>,
    /// The origin at its head or at that snapshot.
    pub info: ImageInfo,
    /// The size of the volume or volume snapshot that Cinder told, GiB.
    pub source_gib: u64,
    pub dest_pool: String,
    pub method: MethodChoice,
    /// As the configuration asks; the source may not allow it.
    pub publish: PublishChoice,
    /// Clones are made through an anchor, see [`Backend`](crate::config::Backend).
    pub anchor: bool,
    /// GiB.
    pub min_disk: u64,
    /// MiB.
    pub min_ram: u64,
    /// Properties that the image gets from its source.
    pub properties: BTreeMap<String, String>,
}

/// Why there is no plan.
#[derive(Debug, Clone, thiserror::Error)]
pub enum PlanError {
    /// Final: this cannot be done here.
    #[error("{1}")]
    Declined(Decline, String),
    /// This daemon is not configured for the source's backend; another one of the deployment may be.
    #[error("{reason}")]
    OtherBackend { backend: String, reason: String },
    /// The image was deleted, so the job has no purpose any more.
    #[error("the image was deleted")]
    Gone,
    #[error(transparent)]
    Ceph(#[from] ceph::Error),
    #[error(transparent)]
    OpenStack(#[from] openstack::Error),
}

type Result<T> = std::result::Result<T, PlanError>;

fn declined<T>(why: Decline, reason: impl Into<String>) -> Result<T> {
    Err(PlanError::Declined(why, reason.into()))
}

/// Reads the image of a request.
///
/// # Errors
/// [`PlanError::Gone`] when there is none.
pub async fn read_image(cloud: &dyn Cloud, image_id: Uuid) -> Result<Image> {
    match cloud.image(&image_id.to_string()).await? {
        Some(image) if image.status != "deleted" && image.status != "pending_delete" => Ok(image),
        Some(_) | None => Err(PlanError::Gone),
    }
}

/// Whether the service that handed its work over still wants it done here.
///
/// # Errors
/// [`PlanError::Declined`] when there is no offer (any more).
pub fn read_offer(image: &Image) -> Result<Offer> {
    request::parse_offer_tag(&image.tags)
        .map_or_else(|| declined(Decline::Handover, "the service that handed this over took it back"), Ok)
}

/// Which source the record asks for.
///
/// # Errors
/// [`PlanError::Declined`] when the record or its tags do not ask for one.
pub fn read_request(image: &Image, request: &PlanRequest) -> Result<Source> {
    if image.status != "queued" {
        return declined(
            Decline::OtherWriter,
            format!("the image is {}, not queued: another client writes it or has written it", image.status),
        );
    }
    if request.offered {
        let offer = read_offer(image)?;
        return match request.source {
            Some(source) if source != offer.source => {
                declined(Decline::Handover, "the service that handed this over offers another source")
            }
            _ => Ok(offer.source),
        };
    }
    if request.trigger != Trigger::Request {
        return request.source.map_or_else(|| declined(Decline::Request, "the notification named no source"), Ok);
    }
    if image.tags.iter().any(|tag| tag.starts_with(request::HANDOVER_PREFIX)) {
        return declined(
            Decline::OtherWriter,
            "Cinder or Nova is writing this image: a request needs an image record of its own",
        );
    }
    let tagged = match request::parse_request_tags(&image.tags) {
        TagRequest::Source(source) => Some(source),
        TagRequest::Invalid(reason) => return declined(Decline::Request, reason),
        TagRequest::Absent => None,
    };
    let source = if request.retried { tagged.or(request.source) } else { tagged };
    source.map_or_else(|| declined(Decline::Request, "the image has no request tag any more"), Ok)
}

/// Makes the plan for `source`, which [`read_request`] found on `image`.
pub async fn build(
    cloud: &dyn Cloud,
    storage: &dyn Storage,
    config: &Config,
    request: &PlanRequest,
    image: Image,
    source: Source,
) -> Result<Plan> {
    check_record(&image)?;
    let Some(owner) = image.owner.clone() else { return declined(Decline::NoSource, "the image has no owner") };
    if request.offered && read_offer(&image)?.fsid.to_string() != storage.fsid().await?.to_ascii_lowercase() {
        // the deployment of that cluster hears of the offer too
        let why = match config.offload.decline_after.is_zero() {
            true => Decline::OtherCluster,
            false => Decline::Elsewhere,
        };
        return declined(why, "the disk is in another Ceph cluster than this service");
    }

    let find = async {
        match source {
            Source::Volume(id) => resolve_volume(cloud, config, request.trigger, &image, &owner, id).await,
            Source::Snapshot(id) => resolve_snapshot(cloud, config, &owner, id).await,
            Source::Instance(id) => resolve_instance(cloud, config, request.trigger, &owner, id).await,
        }
    };
    let (found, stores, limit) = tokio::join!(find, cloud.stores(), cloud.image_size_limit(&owner));
    let found = found?;
    let origin = ImageSpec::named(&found.pool, &found.image);
    let mut info = storage.image(&origin, found.snapshot.as_deref()).await;
    if matches!(info, Ok(None)) {
        // librbd says so too where a parent goes while the image is opened: a service may be flattening it
        tokio::time::sleep(REOPEN_PAUSE).await;
        info = storage.image(&origin, found.snapshot.as_deref()).await;
    }
    let info = match info {
        Ok(Some(info)) => info,
        Ok(None) => return declined(Decline::NoDisk, no_disk(source)),
        Err(e) if e.kind() == ErrorKind::NotFound => {
            return declined(Decline::NoDisk, format!("the disk of {source} has no such snapshot in Ceph"));
        }
        Err(e) => return Err(e.into()),
    };
    if info.old_format {
        return declined(
            Decline::Unsupported,
            format!("the disk of {source} is an RBD image of format 1, which cannot be cloned or copied safely"),
        );
    }
    if info.features.has(Features::NON_PRIMARY) {
        return declined(Decline::OtherCluster, not_primary(source));
    }
    check_cap(config.glance.image_size_cap, info.size)?;
    let (stores, fsid) = (stores?, storage.fsid().await?);
    // a Glance without several stores has none to choose from
    let store = match &found.volume_type {
        Some(name) if !stores.is_empty() => cloud.store_of_volume_type(name).await?,
        _ => None,
    };
    let dest_pool = match store {
        Some(store) => pool_of_store(config, &stores, &fsid, &store)?,
        None => found.dest_pool,
    };
    check_destination(&stores, &fsid, &dest_pool)?;
    let quota = Some(config.glance.user_storage_quota).filter(|quota| *quota > 0);
    check_limits(cloud, [(TOTAL_LIMIT, limit?), ("user_storage_quota", quota)], &owner, info.size).await?;

    // a service that hands over has made the record as it wants it
    let (min_disk, min_ram, properties) = match request.trigger {
        Trigger::Request => {
            let protected = &config.glance.protected_properties;
            let properties = inherit(&found.image_metadata, &image, protected, source)?;
            (found.min_disk.max(image.min_disk), found.min_ram.max(image.min_ram), properties)
        }
        Trigger::VolumeUpload | Trigger::InstanceSnapshot => (image.min_disk, image.min_ram, BTreeMap::new()),
    };
    Ok(Plan {
        source_gib: found.min_disk,
        min_disk,
        min_ram,
        properties,
        image,
        project_id: owner,
        source,
        origin,
        origin_id: info.id.clone(),
        snapshot: found.snapshot,
        info,
        dest_pool,
        method: found.method,
        publish: found.publish,
        anchor: found.anchor,
    })
}

/// Reads the source again once its snapshot exists: owner, status and place must be those of the plan. Another project
/// may own the source by now, and the data in the snapshot with it.
///
/// # Errors
/// [`PlanError::Declined`] where the plan would be declined now.
pub async fn confirm(cloud: &dyn Cloud, config: &Config, trigger: Trigger, plan: &Plan) -> Result<()> {
    let owner = &plan.project_id;
    let found = match plan.source {
        Source::Volume(id) => resolve_volume(cloud, config, trigger, &plan.image, owner, id).await?,
        Source::Snapshot(id) => resolve_snapshot(cloud, config, owner, id).await?,
        Source::Instance(id) => {
            return check_instance(&owned_server(cloud, owner, id).await?, trigger, plan.source);
        }
    };
    let changed = if ImageSpec::named(&found.pool, &found.image) != plan.origin || found.snapshot != plan.snapshot {
        "moved"
    } else if found.min_disk != plan.source_gib {
        // the limits of Glance were checked for the size before
        "extended"
    } else {
        return Ok(());
    };
    let reason = format!("the disk of {} was {changed} while its snapshot was made: ask again", plan.source);
    declined(Decline::Busy, reason)
}

/// What the image record itself rules out.
///
/// # Errors
/// [`PlanError::Declined`] where the daemon does not publish under such a record.
pub fn check_record(image: &Image) -> Result<()> {
    if image.disk_format.as_deref().is_some_and(|format| format != "raw") {
        return declined(
            Decline::Format,
            "the image's disk_format is not raw: only raw images can be made inside Ceph",
        );
    }
    if image.container_format.as_deref().is_some_and(|format| format != "bare") {
        return declined(
            Decline::Format,
            "the image's container_format is not bare: only bare images can be made inside Ceph",
        );
    }
    if image.properties.keys().any(|property| property.starts_with("img_signature")) {
        return declined(
            Decline::Signature,
            "the image asks for signature verification, which only an upload goes through",
        );
    }
    Ok(())
}

/// Where a source lies and what the image inherits from it.
struct SourceDisk {
    pool: String,
    image: String,
    snapshot: Option<String>,
    /// Where the image goes, unless the volume's type names a Glance store.
    dest_pool: String,
    volume_type: Option<String>,
    method: MethodChoice,
    publish: PublishChoice,
    anchor: bool,
    min_disk: u64,
    min_ram: u64,
    image_metadata: BTreeMap<String, String>,
}

async fn resolve_volume(
    cloud: &dyn Cloud,
    config: &Config,
    trigger: Trigger,
    image: &Image,
    owner: &str,
    id: Uuid,
) -> Result<SourceDisk> {
    let volume = match cloud.volume(&id.to_string()).await? {
        Some(volume) if volume.project_id == owner => volume,
        Some(_) | None => return no_such_source(Source::Volume(id)),
    };
    // Cinder has cloned the key for this image, and the copied bytes are encrypted as they are
    let with_key = trigger == Trigger::VolumeUpload && image.properties.contains_key(ENCRYPTION_KEY);
    // first, since a daemon without the backend does not know whether it allows volumes in use
    let found = locate(config, &volume, Source::Volume(id), None)?;
    check_volume(&volume, trigger, allows_in_use(config, &volume), with_key, id)?;
    Ok(found)
}

/// Whether the volume may be the source while it is attached: by its backend's section, else by `[offload]`.
fn allows_in_use(config: &Config, volume: &Volume) -> bool {
    let backend = volume.host.as_deref().and_then(backend_of).and_then(|name| config.backends.get(name));
    backend.and_then(|backend| backend.allow_in_use).unwrap_or(config.offload.allow_in_use)
}

/// Whether a copy of the volume makes sense now. `with_key`: the image has a key of its own for the encrypted bytes.
///
/// # Errors
/// [`PlanError::Declined`] where it does not.
pub fn check_volume(volume: &Volume, trigger: Trigger, allow_in_use: bool, with_key: bool, id: Uuid) -> Result<()> {
    let allowed = match volume.status.as_str() {
        "available" => true,
        "in-use" => allow_in_use,
        "uploading" => trigger == Trigger::VolumeUpload,
        _ => false,
    };
    if !allowed {
        let others = if allow_in_use { "available or in-use" } else { "available" };
        return declined(Decline::Busy, format!("volume {id} is {}: it must be {others}", volume.status));
    }
    if volume.encrypted && !with_key {
        return encrypted(Source::Volume(id));
    }
    Ok(())
}

async fn resolve_snapshot(cloud: &dyn Cloud, config: &Config, owner: &str, id: Uuid) -> Result<SourceDisk> {
    let snapshot = match cloud.snapshot(&id.to_string()).await? {
        Some(snapshot) if snapshot.project_id == owner => snapshot,
        Some(_) | None => return no_such_source(Source::Snapshot(id)),
    };
    let volume = match cloud.volume(&snapshot.volume_id).await? {
        Some(volume) if volume.project_id == owner => volume,
        Some(_) | None => return no_such_source(Source::Snapshot(id)),
    };
    check_snapshot(&snapshot, &volume, id)?;
    let mut found = locate(config, &volume, Source::Snapshot(id), Some(format!("snapshot-{id}")))?;
    // the volume may have been extended since
    found.min_disk = snapshot.size;
    Ok(found)
}

/// Whether a copy of the snapshot makes sense now.
///
/// # Errors
/// [`PlanError::Declined`] where it does not.
pub fn check_snapshot(snapshot: &VolumeSnapshot, volume: &Volume, id: Uuid) -> Result<()> {
    if snapshot.status != "available" {
        return declined(Decline::Busy, format!("snapshot {id} is {}: it must be available", snapshot.status));
    }
    match volume.encrypted {
        true => encrypted(Source::Snapshot(id)),
        false => Ok(()),
    }
}

fn encrypted<T>(source: Source) -> Result<T> {
    declined(
        Decline::Encrypted,
        format!("{source} is encrypted: its key can be copied only by an upload through Cinder"),
    )
}

async fn resolve_instance(
    cloud: &dyn Cloud,
    config: &Config,
    trigger: Trigger,
    owner: &str,
    id: Uuid,
) -> Result<SourceDisk> {
    let source = Source::Instance(id);
    let server = owned_server(cloud, owner, id).await?;
    check_instance(&server, trigger, source)?;
    let mut found = SourceDisk {
        pool: config.nova.pool.clone(),
        image: config.nova.image_name.replace("{id}", &id.to_string()),
        snapshot: None,
        dest_pool: config.glance.pool.clone(),
        volume_type: None,
        method: config.offload.method,
        publish: config.offload.publish,
        // Nova flattens nothing when it removes a disk, and a job ends when its instance goes
        anchor: false,
        min_disk: 0,
        min_ram: 0,
        image_metadata: BTreeMap::new(),
    };
    // Nova has filled in the record of its own snapshot
    if trigger != Trigger::InstanceSnapshot {
        let base = async {
            match &server.image_id {
                Some(id) => read_base(cloud, id, owner).await,
                None => Ok(None),
            }
        };
        let user_name = async {
            match &server.user_id {
                Some(id) => cloud.user_name(id).await,
                None => Ok(None),
            }
        };
        let (base, user_name, project_name) = tokio::join!(base, user_name, cloud.project_name(owner));
        let (base, names) = (base?, OwnerNames { user: user_name?, project: project_name? });
        found.min_disk = server.root_disk.unwrap_or(0).max(base.as_ref().map_or(0, |base| base.min_disk));
        found.min_ram = base.as_ref().map_or(0, |base| base.min_ram);
        found.image_metadata = snapshot_properties(&server, base, &names);
    }
    Ok(found)
}

/// The instance, if the project owns it.
async fn owned_server(cloud: &dyn Cloud, owner: &str, id: Uuid) -> Result<Server> {
    match cloud.server(&id.to_string()).await {
        Ok(Some(server)) if server.project_id == owner => Ok(server),
        Ok(_) => no_such_source(Source::Instance(id)),
        Err(error) if error.kind() == openstack::ErrorKind::NoService => no_nova(),
        Err(error) => Err(error.into()),
    }
}

/// An instance is asked for, and the cloud has none.
///
/// # Errors
/// Always: [`PlanError::Declined`].
pub fn no_nova<T>() -> Result<T> {
    declined(Decline::Unsupported, "the catalog of this cloud has no Nova: instances cannot be a source")
}

/// Whether a copy of the instance's disk makes sense now.
///
/// # Errors
/// [`PlanError::Declined`] where it does not.
pub fn check_instance(server: &Server, trigger: Trigger, source: Source) -> Result<()> {
    if let Some(change) = server.disk_change() {
        let what = change.as_str();
        return declined(Decline::Busy, format!("{source} is being {what}: Nova may remove or replace its disk"));
    }
    if server.encrypted {
        return declined(
            Decline::Encrypted,
            format!("the disk of {source} is encrypted by Nova: its key cannot be handed on to an image"),
        );
    }
    // a snapshot of Nova's own: Nova has judged the state already
    if trigger == Trigger::InstanceSnapshot {
        return Ok(());
    }
    if server.image_id.is_none() {
        return declined(
            Decline::Unsupported,
            format!(
                "{source} boots from a volume: ask for an image of that volume, with the tag rbd-offload:volume:<uuid>"
            ),
        );
    }
    match server.status.as_str() {
        "ACTIVE" | "SHUTOFF" | "PAUSED" | "SUSPENDED" => {}
        // Nova's word where the cell with the instance is away
        "UNKNOWN" => {
            let call = format!("Nova: get server {}", server.id);
            let reason = "the cell of the instance does not answer";
            return Err(openstack::Error::new(call, openstack::ErrorKind::Unavailable, reason).into());
        }
        other => {
            return declined(
                Decline::Busy,
                format!("{source} is {other}: it must be ACTIVE, SHUTOFF, PAUSED or SUSPENDED"),
            );
        }
    }
    match server.task_state.as_deref() {
        None => Ok(()),
        Some(task) if task.starts_with("image_") => Ok(()),
        Some(task) => {
            declined(Decline::Busy, format!("Nova is at work on {source} ({task}): ask again when that is over"))
        }
    }
}

/// How Keystone calls the instance's user and project.
#[derive(Debug, Default)]
struct OwnerNames {
    user: Option<String>,
    project: Option<String>,
}

/// The image that an instance was made from, if the instance's project may read it itself today. Otherwise it is
/// another project's secret. A record that cannot be read counts as none: it must not keep others from their images.
async fn read_base(cloud: &dyn Cloud, id: &str, owner: &str) -> Result<Option<Image>> {
    use openstack::ErrorKind::{Protocol, TooLarge};
    let image = match cloud.image(id).await {
        Err(error) if matches!(error.kind(), Protocol | TooLarge) => None,
        image => image?,
    };
    Ok(image.filter(|image| is_readable_by(image, owner)))
}

/// Whether members of the project may read the image for sure. Who an image is shared with is not asked.
fn is_readable_by(image: &Image, project: &str) -> bool {
    image.owner.as_deref() == Some(project) || matches!(image.visibility.as_deref(), Some("public" | "community"))
}

/// The properties that Nova would give a snapshot of the instance: those that its image had when the instance was made.
/// An older Nova does not tell them; then they are those of today.
///
/// Nova's `user_id` is who asks for the snapshot; a tag does not tell who set it, so it is the instance's user here.
/// Nova's `boot_roles`, the roles that this user had when the instance was made, are known to Nova alone.
fn snapshot_properties(server: &Server, base: Option<Image>, names: &OwnerNames) -> BTreeMap<String, String> {
    let of_today = || base.map(|base| base.properties).unwrap_or_default();
    let mut properties = server.image_properties.clone().unwrap_or_else(of_today);
    properties
        .retain(|name, _| !NOT_FOR_SNAPSHOTS.contains(&name.as_str()) && !OF_ANOTHER_INSTANCE.contains(&name.as_str()));
    for (name, value) in
        [("user_id", &server.user_id), ("owner_user_name", &names.user), ("owner_project_name", &names.project)]
    {
        if let Some(value) = value {
            properties.insert(name.to_owned(), value.clone());
        }
    }
    for (name, value) in [
        ("base_image_ref", server.image_id.as_deref().unwrap_or_default()),
        ("image_location", "snapshot"),
        ("image_state", "available"),
        ("image_type", "snapshot"),
        ("instance_uuid", &server.id),
        ("owner_id", &server.project_id),
    ] {
        properties.insert(name.to_owned(), value.to_owned());
    }
    properties
}

/// The sentence for a source whose disk is not where this service looks.
fn no_disk(source: Source) -> String {
    match source {
        Source::Instance(_) => format!(
            "{source} has no disk in the Ceph pool that this service knows: it boots from a volume, or Nova keeps its \
             disk elsewhere"
        ),
        _ => format!("the disk of {source} is not in the Ceph cluster that this service works in"),
    }
}

/// The sentence for a mirror: what is written in the cluster of the primary may be missing in it.
pub fn not_primary(source: Source) -> String {
    format!(
        "the disk of {source} cannot be written in this Ceph cluster: it is a mirror, whose primary is in another \
         cluster (demoted, or failed over)"
    )
}

/// The same sentence whether it is not there or another project's.
///
/// # Errors
/// Always: [`PlanError::Declined`].
pub fn no_such_source<T>(source: Source) -> Result<T> {
    declined(Decline::NoSource, format!("there is no {source} in the project that owns the image"))
}

/// Finds a volume's disk by its backend.
fn locate(config: &Config, volume: &Volume, source: Source, snapshot: Option<String>) -> Result<SourceDisk> {
    if volume.replication_status.as_deref().is_some_and(|status| status.starts_with("failed-over")) {
        let reason = format!("{source} was failed over: its disk is in another storage cluster than this service's");
        return declined(Decline::OtherCluster, reason);
    }
    let Some(host) = volume.host.as_deref().filter(|host| !host.is_empty()) else {
        return declined(Decline::NoBackend, format!("{source} lies on no backend yet"));
    };
    let Some(name) = backend_of(host) else {
        return declined(Decline::NoBackend, format!("{source} lies on no backend that this service knows"));
    };
    let Some(backend) = config.backends.get(name) else {
        let reason = format!("{source} lies on the backend \"{name}\", for which this service is not configured");
        return Err(PlanError::OtherBackend { backend: name.to_owned(), reason });
    };
    // after a migration, the disk keeps the name of the volume that it was migrated to
    let disk_id = volume.name_id.as_deref().filter(|id| !id.is_empty()).unwrap_or(&volume.id);
    let Some(disk_id) = request::parse_uuid(disk_id) else {
        return declined(Decline::Unsupported, format!("the disk of {source} has a name that is no id"));
    };
    Ok(SourceDisk {
        pool: backend.pool.clone(),
        image: backend.image_name.replace("{id}", &disk_id.to_string()),
        snapshot,
        dest_pool: backend.dest_pool.clone(),
        volume_type: volume.volume_type.clone(),
        method: backend.method.unwrap_or(config.offload.method),
        publish: backend.publish.unwrap_or(config.offload.publish),
        anchor: backend.anchor,
        min_disk: volume.size,
        min_ram: 0,
        image_metadata: volume.image_metadata.clone(),
    })
}

/// The backend's name in `node@backend#pool`.
fn backend_of(host: &str) -> Option<&str> {
    let (_, backend) = host.split_once('@')?;
    Some(backend.split_once('#').map_or(backend, |(backend, _)| backend))
}

/// Glance must have a store over that pool in this cluster: it would accept the location, and never open it.
fn check_destination(stores: &[GlanceStore], fsid: &str, pool: &str) -> Result<()> {
    // Glance before 30 tells neither; the location's outcome tells then
    let silent = stores.iter().all(|store| store.pool.is_none());
    let fits = stores.iter().any(|store| store.pool.as_deref() == Some(pool) && store.may_be_in(fsid));
    if silent || fits {
        return Ok(());
    }
    declined(Decline::OtherCluster, "Glance has no store in the pool and Ceph cluster that the disk's copy would go to")
}

/// The pool of the Glance store that the volume's type asks for. Only pools of the configuration are used: the daemon's
/// Ceph user should have rights there, and the reconciler sweeps them.
fn pool_of_store(config: &Config, stores: &[GlanceStore], fsid: &str, id: &str) -> Result<String> {
    if stores.iter().all(|store| store.pool.is_none()) {
        return declined(
            Decline::Unsupported,
            format!("the volume's type asks for the Glance store \"{id}\", and Glance does not tell its pool"),
        );
    }
    let store = stores.iter().find(|store| store.id == id && store.may_be_in(fsid));
    let pool = store.and_then(|store| store.pool.as_ref()).filter(|pool| {
        config.glance.pool == **pool || config.backends.values().any(|backend| backend.dest_pool == **pool)
    });
    match pool {
        Some(pool) => Ok(pool.clone()),
        None => declined(
            Decline::Unsupported,
            format!("the volume's type asks for the Glance store \"{id}\", into which this service makes no images"),
        ),
    }
}

/// Keystone's limit for all images of a project.
pub const TOTAL_LIMIT: &str = "image_size_total";

/// Glance's limit for one image, where the configuration names it: an upload would be held to it. 0: none is known.
fn check_cap(cap: u64, bytes: u64) -> Result<()> {
    if cap == 0 || bytes <= cap {
        return Ok(());
    }
    declined(
        Decline::Quota,
        format!("the image of {} would be larger than Glance allows: {} (image_size_cap)", in_mib(bytes), in_mib(cap)),
    )
}

/// The limits for all images of the project, by their names, where the cloud has them: an upload would be held to them.
async fn check_limits(cloud: &dyn Cloud, limits: [(&str, Option<u64>); 2], project_id: &str, bytes: u64) -> Result<()> {
    if limits.iter().all(|(_, limit)| limit.is_none()) {
        return Ok(());
    }
    let used = cloud.image_usage(project_id).await?;
    let mut known = limits.into_iter().filter_map(|(name, limit)| Some((name, limit?)));
    known.try_for_each(|limit| check_usage(used, limit, bytes))
}

/// Whether `bytes` more than `used` are within the limit, which is given with its name.
///
/// # Errors
/// [`PlanError::Declined`] where they are not.
pub fn check_usage(used: u64, (name, limit): (&str, u64), bytes: u64) -> Result<()> {
    if used.saturating_add(bytes) > limit {
        return declined(
            Decline::Quota,
            format!(
                "the image of {} would break the project's limit {name}: {} of {} are used",
                in_mib(bytes),
                in_mib(used),
                in_mib(limit)
            ),
        );
    }
    Ok(())
}

fn in_mib(bytes: u64) -> String {
    format!("{} MiB", bytes.div_ceil(1 << 20))
}

/// The properties that the image gets from its source. Names that start with one of `protected` are left out.
///
/// # Errors
/// [`PlanError::Declined`] where they are more than an image takes.
pub fn inherit(
    metadata: &BTreeMap<String, String>,
    image: &Image,
    protected: &[String],
    source: Source,
) -> Result<BTreeMap<String, String>> {
    let properties = inherited(metadata, image, protected);
    check_inherited(&properties, source)?;
    Ok(properties)
}

/// The part of the volume's image metadata that Cinder's own upload would copy to the image. Properties that the record
/// has already stay. Names that start with one of `protected` are left out: the daemon may write properties that Glance
/// forbids the tenant.
fn inherited(metadata: &BTreeMap<String, String>, image: &Image, protected: &[String]) -> BTreeMap<String, String> {
    metadata
        .iter()
        .filter(|(name, _)| !CORE_ATTRIBUTES.contains(&name.as_str()) && !openstack::is_reserved(name))
        .filter(|(name, _)| !RESERVED.iter().any(|prefix| name.starts_with(prefix)))
        .filter(|(name, _)| !protected.iter().any(|prefix| name.starts_with(prefix)))
        .filter(|(name, _)| !image.properties.contains_key(*name))
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect()
}

/// An image record may be of several MB, and the job's record holds the inherited properties.
fn check_inherited(properties: &BTreeMap<String, String>, source: Source) -> Result<()> {
    let bytes = serde_json::to_string(properties).map_or(usize::MAX, |text| text.len());
    if properties.len() <= INHERITED_MAX && bytes <= INHERITED_BYTES_MAX {
        return Ok(());
    }
    declined(
        Decline::Properties,
        format!(
            "{source} would hand on {} properties of {} KiB to the image: {INHERITED_MAX} properties and {} KiB are the \
             limit, so take some off its image metadata",
            properties.len(),
            bytes.div_ceil(1024),
            INHERITED_BYTES_MAX / 1024,
        ),
    )
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn image(status: &str, tags: &[&str]) -> Image {
        let record = json!({"id": Uuid::nil().to_string(), "status": status, "owner": "p", "tags": tags});
        serde_json::from_value(record).unwrap()
    }

    fn plan_request(trigger: Trigger, source: Option<Source>, retried: bool) -> PlanRequest {
        PlanRequest { image_id: Uuid::nil(), trigger, source, retried, offered: false }
    }

    #[test]
    fn an_image_is_no_larger_than_glance_allows() {
        assert!(check_cap(0, u64::MAX).is_ok());
        assert!(check_cap(1 << 30, 1 << 30).is_ok());
        let declined = check_cap(1 << 30, (1 << 30) + 1).unwrap_err().to_string();
        assert!(declined.contains("1025 MiB") && declined.contains("1024 MiB (image_size_cap)"), "{declined}");
    }

    #[test]
    fn the_store_of_a_volume_type_is_one_whose_pool_is_configured() {
        let text = "[messaging]\ntransport_url = rabbit://h/\n[keystone]\nauth_url = http://k:5000/v3\nusername = u\n\
                    password = p\nproject_name = s\n[glance]\npool = images\n[backend:a]\ndest_pool = fast\n";
        let config = Config::parse("test".as_ref(), text).unwrap();
        let store = |id: &str, pool: Option<&str>, fsid: &str| GlanceStore {
            id: id.into(),
            kind: "rbd".into(),
            pool: pool.map(str::to_owned),
            fsid: Some(fsid.into()),
            default: false,
        };
        let stores = [
            store("default", Some("images"), "f"),
            store("quick", Some("fast"), "f"),
            store("other", Some("unknown"), "f"),
            store("far", Some("images"), "g"),
            store("file", None, "f"),
        ];
        let pool = |id: &str| pool_of_store(&config, &stores, "f", id);
        assert_eq!((pool("default").unwrap().as_str(), pool("quick").unwrap().as_str()), ("images", "fast"));
        for id in ["other", "far", "file", "none"] {
            assert!(matches!(pool(id), Err(PlanError::Declined(Decline::Unsupported, _))), "{id}");
        }
        let silent = pool_of_store(&config, &[store("default", None, "f")], "f", "default").unwrap_err().to_string();
        assert!(silent.contains("does not tell its pool"), "{silent}");
    }

    #[test]
    fn a_volume_that_was_failed_over_is_declined() {
        let text = "[messaging]\ntransport_url = rabbit://h/\n[keystone]\nauth_url = http://k:5000/v3\nusername = u\n\
                    password = p\nproject_name = s\n[backend:a]\n";
        let config = Config::parse("test".as_ref(), text).unwrap();
        let of = |status: serde_json::Value| {
            let volume: Volume = serde_json::from_value(json!({
                "id": Uuid::nil(), "os-vol-tenant-attr:tenant_id": "p", "status": "available", "size": 1,
                "os-vol-host-attr:host": "n@a#a", "replication_status": status,
            }))
            .unwrap();
            locate(&config, &volume, Source::Volume(Uuid::nil()), None)
        };
        for status in [json!(null), json!("disabled"), json!("enabled"), json!("not-capable")] {
            assert!(of(status.clone()).is_ok(), "{status}");
        }
        let declined = of(json!("failed-over"));
        assert!(matches!(declined, Err(PlanError::Declined(Decline::OtherCluster, _))));
    }

    #[test]
    fn a_backend_decides_on_its_own_volumes_in_use() {
        let text = "[messaging]\ntransport_url = rabbit://h/\n[keystone]\nauth_url = http://k:5000/v3\nusername = u\n\
                    password = p\nproject_name = s\n[offload]\nallow_in_use = true\n[backend:a]\n\
                    [backend:b]\nallow_in_use = false\n";
        let config = Config::parse("test".as_ref(), text).unwrap();
        let allowed = |host: &str| {
            let volume = json!({
                "id": Uuid::nil(), "os-vol-tenant-attr:tenant_id": "p", "status": "in-use", "size": 1,
                "os-vol-host-attr:host": host,
            });
            allows_in_use(&config, &serde_json::from_value(volume).unwrap())
        };
        assert!(allowed("n@a#a"));
        assert!(!allowed("n@b#b"));
    }

    #[test]
    fn the_backend_is_what_stands_between_at_and_hash() {
        assert_eq!(backend_of("node@ceph#ceph"), Some("ceph"));
        assert_eq!(backend_of("node@fast-ssd"), Some("fast-ssd"));
        assert_eq!(backend_of("cluster@b#p#q"), Some("b"));
        assert_eq!(backend_of("node"), None);
    }

    #[test]
    fn the_tag_decides_not_the_notification() {
        let told = Source::Volume(Uuid::new_v4());
        let tagged = Source::Volume(Uuid::new_v4());
        let image = image("queued", &[&tagged.tag()]);
        assert_eq!(read_request(&image, &plan_request(Trigger::Request, Some(told), false)).unwrap(), tagged);
    }

    #[test]
    fn without_its_tag_an_image_is_planned_only_for_a_retry() {
        let source = Source::Volume(Uuid::new_v4());
        let image = image("queued", &["other"]);
        assert!(read_request(&image, &plan_request(Trigger::Request, Some(source), false)).is_err());
        assert_eq!(read_request(&image, &plan_request(Trigger::Request, Some(source), true)).unwrap(), source);
    }

    fn offer_tag(source: Source) -> String {
        format!("rbd-offload-handover:{}:{}@{}", source.kind(), source.id(), Uuid::new_v4())
    }

    #[test]
    fn a_hand_over_is_planned_by_its_offer_alone() {
        let source = Source::Volume(Uuid::new_v4());
        let offer = offer_tag(source);
        let offered = PlanRequest { offered: true, ..plan_request(Trigger::VolumeUpload, Some(source), false) };
        assert_eq!(read_request(&image("queued", &[&offer]), &offered).unwrap(), source);
        assert!(read_request(&image("queued", &[]), &offered).is_err(), "taken back");
        let other = PlanRequest { source: Some(Source::Volume(Uuid::new_v4())), ..offered };
        assert!(read_request(&image("queued", &[&offer]), &other).is_err());
    }

    #[test]
    fn a_request_on_an_offered_image_is_declined() {
        let source = Source::Volume(Uuid::new_v4());
        let offer = offer_tag(source);
        let request = plan_request(Trigger::Request, Some(source), false);
        assert!(read_request(&image("queued", &[&offer, &source.tag()]), &request).is_err());
    }

    #[test]
    fn an_image_that_another_client_writes_is_left_alone() {
        let tag = Source::Volume(Uuid::new_v4()).tag();
        for status in ["saving", "active", "importing", "deactivated", "killed"] {
            let declined = read_request(&image(status, &[&tag]), &plan_request(Trigger::Request, None, false));
            assert!(matches!(declined, Err(PlanError::Declined(..))), "{status}");
        }
    }

    #[test]
    fn only_raw_and_bare_and_unsigned_records_are_taken() {
        let mut record = image("queued", &[]);
        assert!(check_record(&record).is_ok());
        record.disk_format = Some("qcow2".into());
        assert!(check_record(&record).is_err());
        record.disk_format = Some("raw".into());
        record.container_format = Some("ovf".into());
        assert!(check_record(&record).is_err());
        record.container_format = Some("bare".into());
        assert!(check_record(&record).is_ok());
        record.properties.insert("img_signature_uuid".into(), "1".into());
        assert!(check_record(&record).is_err());
    }

    fn server(status: &str, task: Option<&str>) -> Server {
        Server {
            id: "s".into(),
            project_id: "p".into(),
            user_id: Some("u".into()),
            status: status.into(),
            task_state: task.map(str::to_owned),
            host: None,
            image_id: Some("base".into()),
            image_properties: Some(BTreeMap::from([("hw_disk_bus".into(), "scsi".into())])),
            root_disk: Some(4),
            encrypted: false,
        }
    }

    #[test]
    fn an_instance_is_taken_where_nova_would_take_a_snapshot() {
        let source = Source::Instance(Uuid::nil());
        let judge = |server: &Server, trigger| match check_instance(server, trigger, source) {
            Ok(()) => "taken",
            Err(PlanError::Declined(..)) => "declined",
            Err(_) => "later",
        };
        let asked = |server: &Server| judge(server, Trigger::Request);
        let handed_over = |server: &Server| judge(server, Trigger::InstanceSnapshot);
        for status in ["ACTIVE", "SHUTOFF", "PAUSED", "SUSPENDED"] {
            assert_eq!(asked(&server(status, None)), "taken");
            assert_eq!(asked(&server(status, Some("image_uploading"))), "taken");
            for task in ["rebuilding", "resize_prep", "deleting", "soft-deleting", "shelving"] {
                assert_eq!(asked(&server(status, Some(task))), "declined", "{task}");
            }
        }
        for status in ["BUILD", "ERROR", "DELETED", "SOFT_DELETED", "SHELVED", "SHELVED_OFFLOADED", "RESCUE", "new"] {
            assert_eq!(asked(&server(status, None)), "declined", "{status}");
        }
        assert_eq!(asked(&server("UNKNOWN", None)), "later");
        assert_eq!(handed_over(&server("SHELVED", Some("shelving_image_uploading"))), "taken");
        let rebuilt = server("REBUILD", Some("rebuild_spawning"));
        for going in [server("DELETED", None), server("ACTIVE", Some("deleting")), rebuilt] {
            assert_eq!(handed_over(&going), "declined");
        }
        let from_volume = Server { image_id: None, ..server("ACTIVE", None) };
        assert_eq!(asked(&from_volume), "declined");
        let encrypted = Server { encrypted: true, ..server("ACTIVE", None) };
        assert_eq!((asked(&encrypted), handed_over(&encrypted)), ("declined", "declined"));
    }

    #[test]
    fn an_instances_image_gets_what_nova_would_give_a_snapshot() {
        let mut base = image("active", &[]);
        for (name, value) in [
            ("os_type", "linux"),
            ("cache_in_nova", "True"),
            ("instance_uuid", "another"),
            ("user_id", "another-user"),
            ("owner_user_name", "another-user"),
            ("boot_roles", "member"),
            ("img_signature", "x"),
        ] {
            base.properties.insert(name.into(), value.into());
        }
        let names = OwnerNames { user: Some("ada".into()), project: None };
        let old_nova = Server { image_properties: None, ..server("ACTIVE", None) };
        // what Nova says, or what the image says today where Nova says nothing; never both
        for (server, of_image) in [(server("ACTIVE", None), ("hw_disk_bus", "scsi")), (old_nova, ("os_type", "linux"))]
        {
            let of_nova = snapshot_properties(&server, Some(base.clone()), &names);
            let given = inherited(&of_nova, &image("queued", &[]), &[]);
            let expected = [
                ("base_image_ref", "base"),
                of_image,
                ("image_location", "snapshot"),
                ("image_state", "available"),
                ("image_type", "snapshot"),
                ("instance_uuid", "s"),
                ("owner_id", "p"),
                ("owner_user_name", "ada"),
                ("user_id", "u"),
            ];
            let expected = expected.map(|(name, value)| (name.to_owned(), value.to_owned()));
            assert_eq!(given, BTreeMap::from(expected));
        }
    }

    #[test]
    fn an_image_of_another_project_is_not_read_unless_everybody_may() {
        let base = |owner: &str, visibility: &str| Image {
            owner: Some(owner.into()),
            visibility: Some(visibility.into()),
            ..image("active", &[])
        };
        for visibility in ["private", "shared", "community", "public", "of a later Glance"] {
            assert!(is_readable_by(&base("p", visibility), "p"), "{visibility}");
            let is_public = matches!(visibility, "community" | "public");
            assert_eq!(is_readable_by(&base("q", visibility), "p"), is_public, "{visibility}");
        }
        assert!(!is_readable_by(&Image { owner: None, visibility: None, ..image("active", &[]) }, "p"));
    }

    #[test]
    fn more_properties_than_an_image_takes_are_declined() {
        let source = Source::Volume(Uuid::nil());
        let of = |count: usize, bytes: usize| -> BTreeMap<String, String> {
            (0..count).map(|n| (format!("pad{n}"), "x".repeat(bytes))).collect()
        };
        assert!(check_inherited(&of(128, 1000), source).is_ok());
        for fat in [of(129, 1), of(20, 60_000), BTreeMap::from([("a".to_owned(), "\u{1}".repeat(60_000))])] {
            let declined = check_inherited(&fat, source);
            assert!(matches!(declined, Err(PlanError::Declined(Decline::Properties, _))), "{}", fat.len());
        }
    }

    #[test]
    fn keys_reserved_names_and_ours_are_not_inherited() {
        let metadata: BTreeMap<String, String> = [
            "os_type",
            "hw_disk_bus",
            "min_disk",
            "image_id",
            "checksum",
            "os_glance_import_task",
            "rbd_offload_status",
            "img_signature",
            "signature_verified",
            "cinder_encryption_key_id",
            "cinder_encryption_key_deletion_policy",
        ]
        .map(|name| (name.to_string(), "v".to_string()))
        .into();
        let mut record = image("queued", &[]);
        record.properties.insert("os_type".into(), "windows".into());
        assert_eq!(inherited(&metadata, &record, &[]).into_keys().collect::<Vec<_>>(), ["hw_disk_bus"]);
    }

    #[test]
    fn what_glance_protects_is_not_inherited() {
        let of = |names: &[&str]| -> BTreeMap<String, String> {
            names.iter().map(|name| (name.to_string(), "v".to_string())).collect()
        };
        let metadata = of(&["x_billing_code", "x_bill", "xx_billing", "cache_in_nova", "bittorrent", "os_type"]);
        let left = |protected: &[String]| {
            inherited(&metadata, &image("queued", &[]), protected).into_keys().collect::<Vec<_>>()
        };
        assert_eq!(left(&["x_billing".into(), "os_".into()]), ["bittorrent", "cache_in_nova", "x_bill", "xx_billing"]);
        let text = "[messaging]\ntransport_url = rabbit://h/\n[keystone]\nauth_url = http://k:5000/v3\nusername = u\n\
                    password = p\nproject_name = s\n[backend:a]\n";
        let by_default = Config::parse("test".as_ref(), text).unwrap().glance.protected_properties;
        assert_eq!(left(&by_default), ["os_type", "x_bill", "x_billing_code", "xx_billing"]);
    }
}
