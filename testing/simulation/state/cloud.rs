//! What Glance, Cinder and Nova know, and what they do to Ceph when something is deleted.

use std::collections::{BTreeMap, BTreeSet};

use tokio::time::Instant;
use uuid::Uuid;

use super::cluster::Cluster;
use super::glance::ImageRecord;
use super::services::Service;
use crate::openstack::{Image, Server, Volume, VolumeSnapshot};
use crate::request::{self, Source};

/// The image that instances were made from is gone.
const NO_IMAGE: &str = "00000000-0000-4000-8000-000000000000";

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

impl Disk {
    /// The request tag that asks for an image of it.
    pub fn tag(&self) -> String {
        let kind = if self.instance { "instance" } else { "volume" };
        format!("rbd-offload:{kind}:{}", self.volume.id)
    }
}

#[derive(Default)]
pub struct CloudState {
    pub images: BTreeMap<String, ImageRecord>,
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
    /// Whose a Cinder snapshot was before, and until when.
    pub former_owners: Vec<(Uuid, String, Instant)>,
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
        volume_type: None,
        encrypted: false,
        image_metadata: [("hw_disk_bus".to_owned(), "scsi".to_owned())].into(),
    }
}
impl CloudState {
    /// Makes a volume and its disk. Returns the disk's internal id.
    pub fn create_volume(&mut self, ceph: &mut Cluster, id: Uuid, project: &str) -> String {
        let content = ceph.next();
        self.projects.insert(content, project.into());
        let rbd = ceph.create("volumes", &format!("volume-{id}"), content, false).id.clone();
        let volume = volume_on("ceph", &id.to_string(), project);
        let history = vec![(Instant::now(), content)];
        let disk = Disk { volume, instance: false, rbd: rbd.clone(), history, deleted: None };
        self.disks.insert(id.to_string(), disk);
        rbd
    }

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

    /// Whether the source is a Cinder snapshot that belonged to that project at some time since a request. Its bytes
    /// were fixed before: what they are does not depend on when the daemon asks whose they are.
    pub fn owned_snapshot(&self, source: Source, project: &str, asked: Instant) -> bool {
        let Source::Snapshot(id) = source else { return false };
        let was =
            |(snapshot, owner, until): &(Uuid, String, Instant)| *snapshot == id && owner == project && *until >= asked;
        self.snapshots.get(&id.to_string()).is_some_and(|(snapshot, _)| snapshot.project_id == project)
            || self.former_owners.iter().any(was)
    }

    /// A volume is transferred to another project, with its snapshots.
    pub fn transfer_volume(&mut self, volume: &str, project: &str) {
        if let Some(disk) = self.disks.get_mut(volume) {
            project.clone_into(&mut disk.volume.project_id);
        }
        for (snapshot, _) in self.snapshots.values_mut().filter(|(snapshot, _)| snapshot.volume_id == volume) {
            let before = std::mem::replace(&mut snapshot.project_id, project.to_owned());
            if let Some(id) = request::parse_uuid(&snapshot.id) {
                self.former_owners.push((id, before, Instant::now()));
            }
        }
    }

    /// What Cinder says of a volume.
    pub fn volume(&self, id: &str) -> Option<Volume> {
        let disk = self.disks.get(id).filter(|disk| disk.deleted.is_none() && !disk.instance);
        disk.map(|disk| disk.volume.clone())
    }

    /// What Nova says of an instance: its record goes with its disk.
    pub fn server(&self, ceph: &Cluster, id: &str) -> Option<Server> {
        let disk = self.disks.get(id).filter(|disk| disk.instance)?;
        let is_there = disk.deleted.is_none() || ceph.by_id(&disk.rbd).is_some();
        is_there.then(|| Server {
            id: id.to_owned(),
            project_id: disk.volume.project_id.clone(),
            user_id: None,
            status: "ACTIVE".into(),
            task_state: disk.deleted.map(|_| "deleting".into()),
            host: Some("node".into()),
            image_id: Some(NO_IMAGE.into()),
            image_properties: Some(disk.volume.image_metadata.clone()),
            root_disk: Some(disk.volume.size),
            encrypted: false,
        })
    }

    /// A page of queued images after that one.
    pub fn queued_images(&self, after: Option<&str>, limit: usize) -> Vec<Image> {
        let queued = self.images.values().filter(|r| r.image.status == "queued").map(|r| &r.image);
        queued.filter(|i| after.is_none_or(|after| i.id.as_str() > after)).take(limit).cloned().collect()
    }

    /// Who owns what the image has at that snapshot, or had when the snapshot was made.
    pub fn owner_of(&self, ceph: &Cluster, id: &str, snapshot: &str) -> Option<String> {
        let of_cinder = snapshot.strip_prefix("snapshot-").and_then(|id| self.snapshots.get(id));
        let image = ceph.by_id(id);
        let made = image.and_then(|i| i.snaps.iter().find(|s| s.name == snapshot)).and_then(|s| s.owner.clone());
        let disk = || self.disks.values().find(|disk| disk.rbd == id).map(|disk| disk.volume.project_id.clone());
        let passed_on = || image.and_then(|i| i.owner.clone());
        of_cinder.map(|(snapshot, _)| snapshot.project_id.clone()).or(made).or_else(disk).or_else(passed_on)
    }

    /// Another version of the volume's bytes.
    pub fn write_volume(&mut self, ceph: &mut Cluster, id: &str) {
        let content = ceph.next();
        let Some(disk) = self.disks.get_mut(id).filter(|disk| disk.deleted.is_none()) else { return };
        disk.history.push((Instant::now(), content));
        self.projects.insert(content, disk.volume.project_id.clone());
        if let Some(image) = ceph.by_id_mut(&disk.rbd) {
            image.content = content;
        }
    }

    /// A tag that asks for a source of that project.
    pub fn tag_for(&self, project: Option<&String>) -> Option<String> {
        let mut own = self.disks.values().filter(|d| d.deleted.is_none() && Some(&d.volume.project_id) == project);
        own.next().map(Disk::tag)
    }

    /// Whether Cinder deletes the volume now. It does not while the volume has snapshots.
    pub fn begin_volume_deletion(&mut self, id: &str) -> bool {
        let has_snapshots = self.snapshots.values().any(|(s, _)| s.volume_id == id);
        let Some(disk) = self.disks.get_mut(id).filter(|disk| disk.deleted.is_none() && !has_snapshots) else {
            return false;
        };
        disk.deleted = Some(Instant::now());
        true
    }

    /// Cinder flattens the clones, which it may do in the volume's own pool alone, and moves a disk that has snapshots
    /// to the trash. Returns the clones in other pools.
    pub fn delete_disk(&self, ceph: &mut Cluster, id: &str) -> Vec<(String, Option<String>)> {
        let Some(rbd) = self.disks.get(id).map(|disk| disk.rbd.clone()) else { return Vec::new() };
        let pool = ceph.by_id(&rbd).map(|i| i.pool.clone());
        let is_clone = |i: &&super::cluster::Rbd| i.parent.as_ref().is_some_and(|(parent, _)| *parent == rbd);
        let clones: Vec<(String, u64)> =
            ceph.images.iter().filter(is_clone).map(|i| (i.id.clone(), ceph.content(i))).collect();
        let mut elsewhere = Vec::new();
        for (clone, content) in clones {
            let Some(image) = ceph.by_id_mut(&clone) else { continue };
            if Some(&image.pool) == pool.as_ref() {
                (image.content, image.parent) = (content, None);
            } else {
                elsewhere.push((image.pool.clone(), image.name.clone()));
            }
        }
        if is_kept(ceph, &rbd) {
            if let Some(image) = ceph.by_id_mut(&rbd) {
                image.name = None;
            }
        } else {
            ceph.drop_image(&rbd);
        }
        elsewhere
    }
}

/// Whether snapshots or clones keep a disk.
pub fn is_kept(ceph: &Cluster, id: &str) -> bool {
    ceph.by_id(id).is_some_and(|i| !i.snaps.is_empty()) || ceph.has_clones(id)
}

/// Cinder's periodic purge: disks in the trash that have no snapshots.
pub fn purge_trash(ceph: &mut Cluster) {
    ceph.images.retain(|i| i.name.is_some() || !i.snaps.is_empty() || i.ours);
}

/// Whether the tags ask for an image.
pub fn asks(tags: &[String]) -> bool {
    tags.iter().any(|tag| request::is_request(tag))
}
