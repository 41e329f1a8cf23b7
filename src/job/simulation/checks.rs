//! The promises, checked when the world is quiet.

use std::sync::PoisonError;

use tokio::time::Instant;
use uuid::Uuid;

use super::cluster::{Object, Rbd};
use super::scenario::Stage;
use super::service::Outcome;
use super::trouble::Trouble;
use super::world::World;
use crate::ceph::{Features, Version};
use crate::job::record::{Record, State};
use crate::job::signal::Signals;
use crate::job::store::Stored;
use crate::request::{COPYING_TAG, HANDOVER_PREFIX, TAG_PREFIX};
use crate::transfer::MARK;

/// The jobs' records with their signals.
pub fn stored(world: &World) -> Vec<Stored> {
    let objects = world.ceph.objects.iter().filter(|(name, _)| name.starts_with("job."));
    let read = |object: &Object| {
        let record = Record::parse(&object.data).ok()?;
        let keys = object.omap.iter().map(|(key, value)| (key.clone(), value.clone())).collect();
        Some(Stored { record, signals: Signals::read(keys), version: Version(object.version) })
    };
    objects.filter_map(|(_, object)| read(object)).collect()
}

pub fn jobs(world: &World) -> Vec<Record> {
    stored(world).into_iter().map(|stored| stored.record).collect()
}

fn leftovers(world: &World) -> Vec<String> {
    let mut left = Vec::new();
    for image in &world.ceph.images {
        let purged = |disk: &super::cloud::Disk| disk.rbd == image.id && disk.deleted.is_some() && !disk.instance;
        if image.name.is_none() && image.snaps.is_empty() && world.cloud.disks.values().any(purged) {
            left.push(format!("the deleted volume {}/{} in the trash", image.pool, image.id));
        }
        let name = image.name.clone().unwrap_or_else(|| "(trash)".into());
        let record = world.cloud.images.get(&name);
        let serves =
            record.is_some_and(|r| matches!(r.image.status.as_str(), "active" | "deactivated") && !r.elsewhere);
        if image.ours && !serves {
            left.push(format!("the image {}/{name}", image.pool));
        }
        for snapshot in image.snapshot_tags.keys().filter(|tag| !image.snaps.iter().any(|s| s.name == **tag && !s.ours))
        {
            left.push(format!("the tag of the snapshot {}/{name}@{snapshot}", image.pool));
        }
        if let Some(alias) = &image.alias {
            left.push(format!("half a rename of the image {}/{name}: {alias}", image.pool));
        }
        for snap in image.snaps.iter().filter(|s| s.ours && !(image.ours && s.name == "snap")) {
            left.push(format!("the snapshot {}/{name}@{}", image.pool, snap.name));
        }
    }
    left.extend(world.ceph.at_once.orphans.iter().map(|(id, object)| format!("object {object} of the removed {id}")));
    if let Some(index) = world.ceph.objects.get("index.live") {
        left.extend(index.omap.keys().map(|id| format!("an index entry of {id}")));
    }
    for job in stored(world).iter().filter(|job| !job.is_settled()) {
        left.push(format!("job {} in {} with {:?}", job.record.image_id, job.record.state, job.signals));
    }
    left
}

/// Whether nothing is left to do that a daemon should do.
pub fn is_quiet(stage: &Stage) -> bool {
    let world = stage.world.lock();
    let asks = |tags: &[String]| tags.iter().any(|t| t.starts_with(TAG_PREFIX));
    leftovers(&world).is_empty()
        // one that stood still ends in its own time
        && world.cloud.services.values().all(|service| service.outcome.is_some())
        && !world
            .cloud
            .images
            .values()
            .any(|r| match r.image.status.as_str() {
                "saving" | "importing" => true,
                "queued" => asks(&r.image.tags),
                // Glance may bring it back when it has hashed the image; the reconciler takes it off
                _ => r.image.tags.iter().any(|tag| tag == COPYING_TAG),
            })
}

pub fn all(stage: &Stage, foreign: &[Rbd], when: &str) {
    let mut world = stage.world.lock();
    let mut broken = Vec::new();
    let stored = stored(&world);
    let jobs = jobs(&world);
    for id in stage.acked.lock().unwrap_or_else(PoisonError::into_inner).iter() {
        match stored.iter().find(|job| job.record.image_id == *id) {
            Some(job) if job.is_settled() => {}
            Some(job) => broken.push(format!("the acked request for {id} did not end: {}", job.record.state)),
            None => broken.push(format!("the acked request for {id} was lost")),
        }
    }
    broken.extend(leftovers(&world).into_iter().map(|what| format!("left behind: {what}")));
    let now = Instant::now();
    for (name, object) in world.ceph.objects.iter().filter(|(name, _)| name.starts_with("job.")) {
        if object.locks.values().any(|(_, _, until)| *until > now) {
            broken.push(format!("left behind: a lock on {name}"));
        }
    }
    for before in foreign {
        let same = world.ceph.by_id(&before.id).is_some_and(|after| {
            after.name == before.name
                && after.content == before.content
                && after.snaps == before.snaps
                && after.metadata == before.metadata
        });
        let deleted = before.name.as_ref().is_some_and(|name| stage.images.iter().any(|i| i.to_string() == *name));
        if !same && !deleted {
            broken.push(format!("a foreign image was changed: {:?}", before.name));
        }
    }
    for (id, record) in &world.cloud.images {
        let job = jobs.iter().find(|j| j.image_id.to_string() == *id);
        broken.extend(image(&world, id, record, job));
    }
    for what in broken {
        world.violated(format!("{when}: {what}"));
    }
}

fn image(world: &World, id: &str, record: &super::cloud::Record, job: Option<&Record>) -> Vec<String> {
    let mut broken = Vec::new();
    let image = &record.image;
    let ours = |name: &&String| name.starts_with("rbd_offload_");
    match image.status.as_str() {
        "active" if record.elsewhere => {
            let done = job.is_some_and(|job| job.state == State::Done);
            broken.extend(done.then(|| format!("image {id} is active by an import, and its job done")));
        }
        "active" => {
            if record.locations.len() != 1 {
                broken.push(format!("active image {id} has the locations {:?}", record.locations));
            }
            let Some(rbd) = world.ceph.named("images", id) else {
                broken.push(format!("active image {id} has no RBD image"));
                return broken;
            };
            if rbd.parent.is_some() || !rbd.snaps.iter().any(|s| s.name == "snap" && s.protected) {
                broken.push(format!("active image {id} has a parent or lacks its snapshot"));
            }
            if rbd.ours && rbd.features != Features::PUBLISHED.0 {
                broken.push(format!("active image {id} has the features {:#x}", rbd.features));
            }
            if rbd.metadata.contains_key(MARK) && rbd.ours {
                broken.push(format!("active image {id} bears our mark"));
            }
            if record.active_by_location {
                if let Some(property) = image.properties.keys().find(ours) {
                    broken.push(format!("active image {id} has the property {property}"));
                }
                if image.disk_format.as_deref() != Some("raw") || image.container_format.as_deref() != Some("bare") {
                    broken.push(format!("active image {id} is not raw and bare"));
                }
                if image.tags.iter().any(|tag| tag.starts_with(HANDOVER_PREFIX) || tag == COPYING_TAG) {
                    broken.push(format!("active image {id} has the tags {:?}", image.tags));
                }
                let handed_over = world.cloud.services.contains_key(id);
                if !handed_over
                    && (image.min_disk != 1 || image.properties.get("hw_disk_bus").map(String::as_str) != Some("scsi"))
                {
                    broken.push(format!("active image {id} lacks what the volume hands on"));
                }
                if !rbd.ours {
                    broken.push(format!("image {id} is active through us with another client's data"));
                }
                if job.is_none_or(|job| job.state != State::Done) {
                    broken.push(format!("active image {id}'s job is {:?}", job.map(|j| j.state)));
                }
            } else if rbd.ours || !record.uploads.contains(&rbd.content) {
                broken.push(format!("image {id} of another writer holds {}", rbd.content));
            }
        }
        "queued" if world.cloud.services.get(id).is_some_and(|service| service.outcome != Some(Outcome::Died)) => {
            let service = world.cloud.services.get(id);
            let job = job.map(|j| (j.state, j.reason.clone()));
            broken.push(format!("image {id} is queued, its service {service:?}, job {job:?}"));
        }
        "queued" if record.requested => {
            if image.tags.iter().any(|t| t.starts_with(TAG_PREFIX)) {
                broken.push(format!("image {id} is queued and still asks, job {:?}", job.map(|j| j.state)));
            }
            let status = image.properties.get("rbd_offload_status").map(String::as_str);
            if !matches!(status, Some("declined" | "failed")) || !image.properties.contains_key("rbd_offload_message") {
                let job = job.map(|j| (j.state, j.reason.clone()));
                broken.push(format!("image {id} was not told how it ended: {status:?}, job {job:?}"));
            }
            if job.is_some_and(|job| job.reason.as_deref() == Some("the image was deleted")) {
                broken.push(format!("image {id} is there, and its job says that it was deleted"));
            }
            if job.is_some_and(|job| job.state == State::Done) {
                broken.push(format!("image {id} is queued, and its job done"));
            }
        }
        _ => {}
    }
    broken
}

/// In a world without accidents, a request for what can be done is served.
pub fn all_served(stage: &Stage, asked: &[Uuid]) {
    let mut world = stage.world.lock();
    for id in asked {
        let id = id.to_string();
        let Some(record) = world.cloud.images.get(&id) else { continue };
        if record.image.status == "active" {
            continue;
        }
        let job = jobs(&world).into_iter().find(|j| j.image_id.to_string() == id);
        let reason = job.as_ref().and_then(|j| j.reason.clone()).unwrap_or_default();
        // what is ruled out stays ruled out
        const RIGHTLY: [&str; 7] = [
            "not raw",
            "header of a",
            "is in-use",
            "in the way",
            "another image of that id",
            "more than one",
            "Glance still",
        ];
        let kills = world.killer.as_ref().is_some_and(|killer| killer.image_id == id);
        let stuck = record.image.properties.contains_key("os_glance_import_task");
        // a task of the request before, which ended without it, is at work still
        let late = world.has(Trouble::SlowTasks) && reason.contains("another client has written");
        if !stuck && !kills && !late && !RIGHTLY.iter().any(|right| reason.contains(right)) {
            let state = job.map(|j| j.state);
            world.violated(format!("image {id} was asked for again in a calm world and is {state:?}: {reason}"));
        }
    }
}
