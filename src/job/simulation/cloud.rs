//! The simulated Glance and Cinder, as far as a job meets them.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use async_trait::async_trait;
use tokio::time::{Instant, sleep};
use uuid::Uuid;

use super::at_once;
use super::cluster::FSID;
use super::glance;
use super::node::{Handle, Kind};
use super::service::Service;
use super::trouble::Trouble;
use super::world::{Shared, World};
use crate::openstack::{
    Cloud, Error, ErrorKind, Image, ImageChange, ImagePage, ImageTask, ListCursor, LocationAnswer, Result, Server,
    Store, Validation, Volume, VolumeSnapshot,
};
use crate::request::{self, Source, TagRequest};

pub const TASK: &str = "os_glance_import_task";

/// The image that instances were made from is gone.
const NO_IMAGE: &str = "00000000-0000-4000-8000-000000000000";

/// An image record, and what the checks want to know of it.
#[derive(Debug, Clone)]
pub struct Record {
    pub image: Image,
    pub locations: Vec<String>,
    pub tasks: Vec<ImageTask>,
    /// When it was last asked for.
    pub asked: Instant,
    /// What it was last asked to be made from.
    pub source: Option<Source>,
    /// Was ever asked for, rightly or not.
    pub requested: bool,
    /// Contents that other writers uploaded.
    pub uploads: BTreeSet<u64>,
    pub active_by_location: bool,
    /// An upload is going on.
    pub uploading: bool,
    /// Active by an import to another store.
    pub elsewhere: bool,
    /// What it was ever asked to be made from, and when first.
    pub requests: Vec<(Source, Instant)>,
    /// As each daemon was last told of it.
    pub told: BTreeMap<String, Image>,
    /// As the daemon that registered the location was told of it last.
    pub posted: Option<Image>,
    /// What it was asked to be made from at that moment, and since when.
    pub posted_request: Option<(Source, Instant)>,
}

impl Record {
    /// A record that asks for `source`.
    pub fn new(image: Image, source: Option<Source>, now: Instant) -> Self {
        Self {
            image,
            locations: Vec::new(),
            tasks: Vec::new(),
            asked: now,
            source,
            requested: true,
            uploads: BTreeSet::new(),
            active_by_location: false,
            uploading: false,
            elsewhere: false,
            requests: source.map(|source| (source, now)).into_iter().collect(),
            told: BTreeMap::new(),
            posted: None,
            posted_request: None,
        }
    }

    /// The tenant asks for that from now on.
    pub fn asks_for(&mut self, source: Source, now: Instant) {
        (self.source, self.asked) = (Some(source), now);
        if !self.requests.iter().any(|(known, _)| *known == source) {
            self.requests.push((source, now));
        }
    }

    /// The request that the daemon which registered the location knew, and when it was made.
    fn posted_for(&self) -> Option<(Source, Instant)> {
        let tags = self.posted.as_ref().map(|image| image.tags.as_slice()).unwrap_or_default();
        match request::parse_request_tags(tags) {
            TagRequest::Source(source) if Some(source) != self.posted_request.map(|(source, _)| source) => {
                self.requests.iter().find(|(known, _)| *known == source).copied()
            }
            _ => self.posted_request,
        }
    }
}

/// A volume or an instance's disk, and what was on it when.
#[derive(Debug, Clone)]
pub struct Disk {
    pub volume: Volume,
    /// It is an instance's: Cinder does not know it, Nova does.
    pub instance: bool,
    pub rbd: String,
    pub history: Vec<(Instant, u64)>,
    pub deleted: Option<Instant>,
}

#[derive(Default)]
pub struct CloudState {
    pub images: BTreeMap<String, Record>,
    pub disks: BTreeMap<String, Disk>,
    pub snapshots: BTreeMap<String, (VolumeSnapshot, u64)>,
    /// Services that wait for an image, by its id.
    pub services: BTreeMap<String, Service>,
    pub glance_away_until: Option<Instant>,
    /// What the names of properties start with that the daemon may neither set nor remove.
    pub protected: Option<&'static str>,
    pub cinder_away_until: Option<Instant>,
    /// Owner of what a content was written for.
    pub projects: BTreeMap<u64, String>,
}

/// What Cinder says of a volume that lies on this backend.
pub fn volume_on(backend: &str, id: &str, project: &str) -> Volume {
    Volume {
        id: id.to_owned(),
        project_id: project.to_owned(),
        status: "available".into(),
        size: 1,
        host: Some(format!("node@{backend}#{backend}")),
        name_id: None,
        replication_status: None,
        encrypted: false,
        image_metadata: [("hw_disk_bus".to_owned(), "scsi".to_owned())].into(),
    }
}

/// Makes a volume and its disk. Returns the disk's internal id.
pub fn create_volume(world: &mut World, id: Uuid, project: &str) -> String {
    let content = world.ceph.next();
    world.cloud.projects.insert(content, project.into());
    let rbd = world.ceph.create("volumes", &format!("volume-{id}"), content, false).id.clone();
    let volume = volume_on("ceph", &id.to_string(), project);
    let history = vec![(Instant::now(), content)];
    let disk = Disk { volume, instance: false, rbd: rbd.clone(), history, deleted: None };
    world.cloud.disks.insert(id.to_string(), disk);
    rbd
}

impl CloudState {
    pub fn away(&self, glance: bool) -> bool {
        let until = if glance { self.glance_away_until } else { self.cinder_away_until };
        until.is_some_and(|until| until > Instant::now())
    }

    /// Contents that a request for `source` since `asked` may end with.
    pub fn right_contents(&self, source: Source, asked: Instant) -> BTreeSet<u64> {
        match source {
            Source::Volume(id) | Source::Instance(id) => {
                let Some(disk) = self.disks.get(&id.to_string()) else { return BTreeSet::new() };
                let mut right = BTreeSet::new();
                for (i, (_, content)) in disk.history.iter().enumerate() {
                    let until = disk.history.get(i + 1).map(|(from, _)| *from);
                    if until.is_none_or(|until| until >= asked) {
                        right.insert(*content);
                    }
                }
                right
            }
            Source::Snapshot(id) => {
                self.snapshots.get(&id.to_string()).map(|(_, content)| *content).into_iter().collect()
            }
        }
    }
}

fn split(url: &str) -> Option<(String, String, String)> {
    let rest = url.strip_prefix(&format!("rbd://{FSID}/"))?;
    let mut parts = rest.split('/').map(str::to_owned);
    Some((parts.next()?, parts.next()?, parts.next()?))
}

/// Glance's driver removes the image's data.
pub fn remove_data(world: &mut World, id: &str) {
    if let Some(found) = world.ceph.named("images", id).map(|i| i.id.clone()) {
        world.log(|| format!("glance removes the data of {id}"));
        world.ceph.drop_image(&found);
    }
}

/// The image becomes active by what lies at the location: the promises of publishing are checked here.
fn check_published(world: &mut World, id: &str, pool: &str, name: &str) {
    let Some(record) = world.cloud.images.get(id).cloned() else { return };
    let Some(rbd) = world.ceph.named(pool, name).cloned() else {
        return world.violated(format!("image {id} became active without its RBD image"));
    };
    at_once::published(world, &rbd);
    let content = world.ceph.content(&rbd);
    if !rbd.snaps.iter().any(|s| s.name == "snap" && s.protected && s.content == content) {
        world.violated(format!("image {id} became active without a protected snapshot of its content"));
    }
    if world.cloud.services.get(id).is_some_and(|service| !service.has_commit_tag) {
        world.violated(format!("image {id} became active before the service that waits for it said go"));
    }
    let right =
        record.posted_for().map(|(source, asked)| world.cloud.right_contents(source, asked)).unwrap_or_default();
    if content == 0 || !right.contains(&content) {
        world.violated(format!("image {id} became active with content {content}, right is {right:?}"));
    }
    let owner = record.posted.as_ref().and_then(|image| image.owner.as_ref());
    if rbd.owner.is_none() || rbd.owner.as_ref() != owner {
        let whose = &rbd.owner;
        world.violated(format!("image {id} of {owner:?} became active with what {whose:?} owned at the snapshot"));
    }
    if world.ceph.containers.contains(&content) {
        world.violated(format!("image {id} became active with the header of a container format"));
    }
}

/// Glance's task that looks at a location and makes the image active.
async fn location_task(shared: Shared, id: String, task: String, url: String) {
    let (first, second, fails, stuck, removes) = {
        let mut world = shared.lock();
        let (failure, stuck) = (world.faults.task_failure, world.faults.task_stuck);
        let slow = world.dice.percent(25);
        let very_slow = world.has(Trouble::SlowTasks) && !world.faults.calm && world.dice.percent(40);
        let first = if very_slow {
            world.dice.millis(60_000, 400_000)
        } else if slow {
            world.dice.millis(500, 20_000)
        } else {
            world.dice.millis(20, 300)
        };
        let second = if slow { world.dice.millis(100, 9_000) } else { world.dice.millis(10, 150) };
        let fails = world.dice.chance(failure);
        (first, second, fails, world.dice.chance(stuck), world.dice.percent(50))
    };
    sleep(first).await;
    let finish = |world: &mut World, status: &str, message: &str| {
        world.log(|| format!("glance task of {id}: {status} {message}"));
        if let Some(record) = world.cloud.images.get_mut(&id) {
            record.image.properties.remove(TASK);
            for t in record.tasks.iter_mut().filter(|t| t.id == task) {
                t.status = status.into();
                t.message = message.into();
            }
        }
    };
    {
        let mut world = shared.lock();
        if stuck {
            return world.log(|| format!("glance task of {id} is stuck without end"));
        }
        let Some(record) = world.cloud.images.get(&id).cloned() else { return };
        let data = split(&url).and_then(|(pool, name, snap)| {
            world.ceph.named(&pool, &name).filter(|i| i.snaps.iter().any(|s| s.name == snap)).map(|_| name)
        });
        if data.as_deref() != Some(id.as_str()) {
            return finish(&mut world, "failure", "Invalid location");
        }
        if record.image.disk_format.is_none() || record.image.container_format.is_none() {
            remove_data(&mut world, &id);
            return finish(&mut world, "failure", "formats are unset");
        }
        let depends = world.ceph.named("images", &id).is_some_and(|rbd| rbd.parent.is_some());
        if depends && world.ceph.at_once.is_refused {
            return finish(&mut world, "failure", "Permission denied");
        }
        if fails {
            if removes {
                remove_data(&mut world, &id);
            }
            return finish(&mut world, "failure", "the store had trouble");
        }
        if let Some(record) = world.cloud.images.get_mut(&id) {
            record.image.size = Some(1 << 30);
        }
    }
    sleep(second).await;
    {
        let mut world = shared.lock();
        let Some(record) = world.cloud.images.get(&id) else { return };
        if record.image.status != "queued" {
            return finish(&mut world, "failure", "the image is not queued any more");
        }
        if let Some((pool, name, _)) = split(&url) {
            check_published(&mut world, &id, &pool, &name);
        }
        if let Some(record) = world.cloud.images.get_mut(&id) {
            record.image.status = "active".into();
            record.locations.push(url);
            record.active_by_location = true;
        }
    }
    // the task is over, and the record free, when the active image has its hash
    glance::hash(&shared, &id).await;
    finish(&mut shared.lock(), "success", "");
}

/// Another writer uploads data to the image, as glance-api does it.
pub async fn upload(shared: Shared, id: String) {
    let (content, time) = {
        let mut world = shared.lock();
        let content = world.ceph.next() + 1_000_000;
        let time = world.dice.millis(500, 20_000);
        let Some(record) = world.cloud.images.get_mut(&id) else { return };
        if record.image.status != "queued" {
            return;
        }
        record.image.disk_format.get_or_insert("raw".into());
        record.image.container_format.get_or_insert("bare".into());
        record.image.status = "saving".into();
        record.uploading = true;
        let owner = record.image.owner.clone().unwrap_or_default();
        world.cloud.projects.insert(content, owner);
        world.log(|| format!("another writer uploads {content} to {id}"));
        (content, time)
    };
    sleep(Duration::from_millis(50)).await;
    let rbd = {
        let mut world = shared.lock();
        if let Some(found) = world.ceph.named("images", &id).map(|found| found.ours) {
            if found && world.cloud.services.get(&id).is_some_and(|service| !service.doubted) {
                world.violated(format!("the service's upload to {id} met our image, though it was in no doubt"));
            }
            world.log(|| format!("glance: duplicate data of {id}, back to queued"));
            if let Some(record) = world.cloud.images.get_mut(&id) {
                record.uploading = false;
                if record.image.status == "saving" {
                    record.image.status = "queued".into();
                }
            }
            return;
        }
        world.ceph.create("images", &id, 0, false).id.clone()
    };
    sleep(time).await;
    let mut world = shared.lock();
    let gone = match world.cloud.images.get_mut(&id) {
        Some(record) => {
            record.uploading = false;
            record.image.status != "saving"
        }
        None => true,
    };
    if gone {
        world.ceph.drop_image(&rbd);
        return;
    }
    match world.ceph.by_id_mut(&rbd) {
        Some(found) => found.content = content,
        None => world.violated(format!("the data of another writer's upload to {id} is gone")),
    }
    world.ceph.snap(&rbd, "snap", true, false);
    world.log(|| format!("the upload to {id} is active"));
    if let Some(record) = world.cloud.images.get_mut(&id) {
        record.image.status = "active".into();
        record.image.size = Some(1 << 30);
        record.uploads.insert(content);
        record.locations.push(format!("rbd://{FSID}/images/{id}/snap"));
    }
}

/// The tenant deletes the image. Data of a queued one stays behind, as in Glance.
pub fn delete_image(world: &mut World, id: &str) -> bool {
    let Some(record) = world.cloud.images.get(id) else { return false };
    if record.uploading {
        return false;
    }
    let active = matches!(record.image.status.as_str(), "active" | "deactivated");
    world.log(|| format!("the tenant deletes image {id}, active={active}"));
    if active {
        let clones = world.ceph.named("images", id).map(|i| i.id.clone()).is_some_and(|i| world.ceph.has_clones(&i));
        if clones {
            return false;
        }
        remove_data(world, id);
    }
    world.cloud.images.remove(id);
    true
}

/// Cinder deletes the volume: it flattens the clones, which it may do in the volume's own pool alone, and what has
/// snapshots goes to the trash.
pub fn delete_volume(world: &mut World, id: &str) {
    let used = world.cloud.snapshots.values().any(|(s, _)| s.volume_id == id);
    let Some(disk) = world.cloud.disks.get_mut(id) else { return };
    if disk.deleted.is_some() || used {
        return;
    }
    disk.deleted = Some(Instant::now());
    let rbd = disk.rbd.clone();
    world.log(|| format!("the tenant deletes volume {id}"));
    let pool = world.ceph.by_id(&rbd).map(|i| i.pool.clone());
    let clones: Vec<(String, u64)> = world
        .ceph
        .images
        .iter()
        .filter(|i| i.parent.as_ref().is_some_and(|(parent, _)| *parent == rbd))
        .map(|i| (i.id.clone(), world.ceph.content(i)))
        .collect();
    for (clone, content) in clones {
        let Some(image) = world.ceph.by_id_mut(&clone) else { continue };
        if Some(&image.pool) == pool.as_ref() {
            (image.content, image.parent) = (content, None);
        } else {
            let text =
                format!("Cinder may not flatten {}/{:?}, and volume {id} is error_deleting", image.pool, image.name);
            world.violated(text);
        }
    }
    let kept = world.ceph.by_id(&rbd).is_some_and(|i| !i.snaps.is_empty()) || world.ceph.has_clones(&rbd);
    if kept {
        if let Some(image) = world.ceph.by_id_mut(&rbd) {
            image.name = None;
        }
    } else {
        world.ceph.drop_image(&rbd);
    }
}

/// How often Nova tries to remove the disk of an instance that is deleted, and how long it waits in between.
const REMOVALS: u32 = 12;
const REMOVAL_PAUSE: Duration = Duration::from_secs(5);

/// Nova deletes the instance: its disk goes when it has no snapshot, or Nova gives up.
pub async fn delete_instance(shared: Shared, id: String) {
    let rbd = {
        let mut world = shared.lock();
        let Some(disk) = world.cloud.disks.get_mut(&id).filter(|disk| disk.deleted.is_none()) else { return };
        disk.deleted = Some(Instant::now());
        let rbd = disk.rbd.clone();
        world.log(|| format!("the tenant deletes instance {id}"));
        rbd
    };
    for _ in 0..REMOVALS {
        {
            let mut world = shared.lock();
            let kept = world.ceph.by_id(&rbd).is_some_and(|i| !i.snaps.is_empty()) || world.ceph.has_clones(&rbd);
            if !kept {
                world.log(|| format!("nova removed the disk of instance {id}"));
                return world.ceph.drop_image(&rbd);
            }
        }
        sleep(REMOVAL_PAUSE).await;
    }
    shared.lock().log(|| format!("nova gave up on the disk of instance {id}"));
}

/// What the trash holds without snapshots goes.
pub fn purge_trash(world: &mut World) {
    world.ceph.images.retain(|i| i.name.is_some() || !i.snaps.is_empty() || i.ours);
}

impl Handle {
    /// A daemon that begins to change an image's record holds the lease on its job by all that it can know.
    fn check_lease(&self, id: &str) {
        let mut world = self.world().lock();
        let until = world.ceph.leases.get(&(self.node.address(), format!("job.{id}"))).copied();
        if until.is_none_or(|until| until <= Instant::now()) {
            let name = &self.node.name;
            world.violated(format!("{name} set out to change image {id} without a lease"));
        }
    }

    async fn glance<T>(
        &self,
        kind: Kind,
        what: impl Fn() -> String,
        effect: impl FnOnce(&mut World) -> Result<T>,
    ) -> Result<T> {
        self.service(true, kind, what, effect).await
    }

    async fn service<T>(
        &self,
        glance: bool,
        kind: Kind,
        what: impl Fn() -> String,
        effect: impl FnOnce(&mut World) -> Result<T>,
    ) -> Result<T> {
        let shown = &what;
        self.gate(kind, false, shown, |world| {
            if world.cloud.away(glance) {
                return Err(Error::new(shown(), ErrorKind::Unavailable, "503"));
            }
            effect(world)
        })
        .await
    }
}

fn apply(record: &Record, changes: &[ImageChange], protected: Option<&str>) -> std::result::Result<Image, ErrorKind> {
    let mut image = record.image.clone();
    let changeable = image.status == "queued";
    for change in changes {
        if let ImageChange::Set { property, .. }
        | ImageChange::Replace { property, .. }
        | ImageChange::Remove { property } = change
            && protected.is_some_and(|prefix| property.starts_with(prefix))
        {
            return Err(ErrorKind::Forbidden);
        }
        match change {
            ImageChange::Set { property, value } => {
                image.properties.insert(property.clone(), value.clone());
            }
            ImageChange::Replace { property, value } => match image.properties.get_mut(property) {
                Some(old) => old.clone_from(value),
                None => return Err(ErrorKind::Conflict),
            },
            ImageChange::Remove { property } => {
                if image.properties.remove(property).is_none() {
                    return Err(ErrorKind::Conflict);
                }
            }
            ImageChange::DiskFormat(format) => {
                if !changeable && image.disk_format.as_ref() != Some(format) {
                    return Err(ErrorKind::Forbidden);
                }
                image.disk_format = Some(format.clone());
            }
            ImageChange::ContainerFormat(format) => {
                if !changeable && image.container_format.as_ref() != Some(format) {
                    return Err(ErrorKind::Forbidden);
                }
                image.container_format = Some(format.clone());
            }
            ImageChange::MinDisk(gib) => image.min_disk = *gib,
            ImageChange::MinRam(_) => {}
            ImageChange::Tags(tags) => image.tags.clone_from(tags),
        }
    }
    Ok(image)
}

#[async_trait]
impl Cloud for Handle {
    async fn image(&self, id: &str) -> Result<Option<Image>> {
        self.glance(
            Kind::Read,
            || format!("glance image {id}"),
            |world| {
                Ok(world.cloud.images.get_mut(id).map(|record| {
                    record.told.insert(self.node.name.clone(), record.image.clone());
                    record.image.clone()
                }))
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
                let Some(record) = world.cloud.images.get_mut(id) else { return Ok(None) };
                match apply(record, changes, world.cloud.protected) {
                    Ok(image) => {
                        record.image = image;
                        record.told.insert(self.node.name.clone(), record.image.clone());
                        Ok(Some(record.image.clone()))
                    }
                    Err(kind) => Err(Error::new(format!("update image {id}"), kind, "refused")),
                }
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
                let data = split(url).and_then(|(pool, name, _)| world.ceph.named(&pool, &name).cloned());
                if let Some(data) = data {
                    if data.parent.is_some() && !world.ceph.at_once.is_asked_for {
                        world.violated(format!("the location of {id} was registered while the RBD image has a parent"));
                    }
                    if !data.ours {
                        world
                            .violated(format!("the location of {id} was registered with an image that no daemon made"));
                    }
                }
                let task = format!("task-{}", world.ceph.next());
                // a tag that is changed there and back is the same request to a daemon that did not look meanwhile
                let changed = world.has(Trouble::ChangedTags);
                if let Some(record) = world.cloud.images.get_mut(id) {
                    record.image.properties.insert(TASK.into(), task.clone());
                    record.posted = record.told.get(&self.node.name).cloned();
                    let first = |source| record.requests.iter().find(|(known, _)| changed && *known == source).copied();
                    record.posted_request = record.source.map(|source| first(source).unwrap_or((source, record.asked)));
                    let queued = ImageTask {
                        id: task.clone(),
                        kind: String::new(),
                        status: "processing".into(),
                        message: String::new(),
                    };
                    record.tasks.insert(0, queued);
                }
                tokio::spawn(location_task(shared, id.to_owned(), task, url.to_owned()));
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
        // small pages, so that the marker is followed
        let limit = limit.min(2);
        let marker = cursor.marker.as_deref();
        self.glance(
            Kind::Read,
            || format!("glance queued images after {marker:?}"),
            |world| {
                let queued = world.cloud.images.values().filter(|r| r.image.status == "queued").map(|r| &r.image);
                let images: Vec<Image> =
                    queued.filter(|i| marker.is_none_or(|m| i.id.as_str() > m)).take(limit).cloned().collect();
                let marker = images.last().map(|image| image.id.clone());
                let next = marker.map(|marker| ListCursor { marker: Some(marker), ..ListCursor::default() });
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

    async fn stores(&self) -> Result<Vec<Store>> {
        self.glance(
            Kind::Read,
            || "glance stores".into(),
            |_| {
                Ok(vec![Store {
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
        self.service(
            false,
            Kind::Read,
            || format!("cinder volume {id}"),
            |world| {
                let disk = world.cloud.disks.get(id).filter(|disk| disk.deleted.is_none() && !disk.instance);
                Ok(disk.map(|disk| disk.volume.clone()))
            },
        )
        .await
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
        self.service(
            false,
            Kind::Read,
            || format!("nova server {id}"),
            |world| {
                let disk = world.cloud.disks.get(id).filter(|disk| disk.instance);
                // its record goes with its disk
                let disk = disk.filter(|disk| disk.deleted.is_none() || world.ceph.by_id(&disk.rbd).is_some());
                Ok(disk.map(|disk| Server {
                    id: id.to_owned(),
                    project_id: disk.volume.project_id.clone(),
                    user_id: None,
                    status: "ACTIVE".into(),
                    task_state: disk.deleted.map(|_| "deleting".into()),
                    host: Some("node".into()),
                    image_id: Some(NO_IMAGE.into()),
                    image_properties: disk.volume.image_metadata.clone(),
                    root_disk: Some(disk.volume.size),
                    encrypted: false,
                }))
            },
        )
        .await
    }

    async fn user_name(&self, _id: &str) -> Result<Option<String>> {
        Ok(None)
    }

    async fn project_name(&self, _id: &str) -> Result<Option<String>> {
        Ok(None)
    }
}
