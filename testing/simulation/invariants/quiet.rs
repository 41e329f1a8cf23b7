//! The promises that are checked when the world is quiet: every request has come to an end, nothing is left behind, and
//! every image is what it should be.

use std::collections::BTreeSet;

use tokio::time::Instant;
use uuid::Uuid;

use crate::ceph::Features;
use crate::job::record::{Record, State};
use crate::job::simulation::faults::trouble::Trouble;
use crate::job::simulation::faults::world::World;
use crate::job::simulation::state::cloud::{self, Disk};
use crate::job::simulation::state::cluster::Rbd;
use crate::job::simulation::state::glance::{ImageRecord, TASK};
use crate::job::simulation::state::services::ServiceOutcome;
use crate::request::{COPYING_TAG, HANDOVER_PREFIX};
use crate::transfer::OWNERSHIP_TAG;

fn leftovers(world: &World) -> Vec<String> {
    let mut left = Vec::new();
    for image in &world.ceph.images {
        let purged = |disk: &Disk| disk.rbd == image.id && disk.deleted.is_some() && !disk.instance;
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
        for client in image.dead_watchers.keys() {
            left.push(format!("the watch of {client} on {}/{name}", image.pool));
        }
        for snap in image.snaps.iter().filter(|s| s.ours && !(image.ours && s.name == "snap")) {
            left.push(format!("the snapshot {}/{name}@{}", image.pool, snap.name));
        }
    }
    left.extend(world.ceph.at_once.orphans.iter().map(|(id, object)| format!("object {object} of the removed {id}")));
    if let Some(index) = world.ceph.objects.get("index.live") {
        left.extend(index.omap.keys().map(|id| format!("an index entry of {id}")));
    }
    for job in world.ceph.jobs().iter().filter(|job| !job.is_settled()) {
        left.push(format!("job {} in {} with {:?}", job.record.image_id, job.record.state, job.signals));
    }
    left
}

/// Jobs whose lease is held.
fn locked(world: &World) -> Vec<&String> {
    let now = Instant::now();
    let jobs = world.ceph.objects.iter().filter(|(name, _)| name.starts_with("job."));
    jobs.filter(|(_, object)| object.locks.values().any(|(_, _, until)| *until > now)).map(|(name, _)| name).collect()
}

/// Whether nothing is left to do that a daemon should do.
pub fn is_quiet(world: &World) -> bool {
    leftovers(world).is_empty()
        // the reconciler takes a lease also where it then finds nothing to remove
        && locked(world).is_empty()
        // one that was frozen ends in its own time
        && world.cloud.services.values().all(|service| service.outcome.is_some())
        && !world
            .cloud
            .images
            .values()
            .any(|r| match r.image.status.as_str() {
                "saving" | "importing" => true,
                "queued" => cloud::asks(&r.image.tags),
                // Glance may bring it back when it has hashed the image; the reconciler takes it off
                _ => r.image.tags.iter().any(|tag| tag == COPYING_TAG),
            })
}

/// Checks everything. `acked` are the images whose notification was acked, `images` those of the tenants, `foreign`
/// what lay in Ceph before.
pub fn check(world: &mut World, acked: &BTreeSet<Uuid>, images: &[Uuid], foreign: &[Rbd], when: &str) {
    let mut broken = Vec::new();
    let stored = world.ceph.jobs();
    let jobs = world.ceph.job_records();
    for id in acked {
        match stored.iter().find(|job| job.record.image_id == *id) {
            Some(job) if job.is_settled() => {}
            Some(job) => broken.push(format!("the acked request for {id} did not end: {}", job.record.state)),
            None => broken.push(format!("the acked request for {id} was lost")),
        }
    }
    broken.extend(leftovers(world).into_iter().map(|what| format!("left behind: {what}")));
    broken.extend(locked(world).into_iter().map(|name| format!("left behind: a lock on {name}")));
    for before in foreign {
        let same = world.ceph.by_id(&before.id).is_some_and(|after| {
            after.name == before.name
                && after.content == before.content
                && after.snaps == before.snaps
                && after.metadata == before.metadata
        });
        let deleted = before.name.as_ref().is_some_and(|name| images.iter().any(|i| i.to_string() == *name));
        if !same && !deleted {
            broken.push(format!("a foreign image was changed: {:?}", before.name));
        }
    }
    for (id, record) in &world.cloud.images {
        let job = jobs.iter().find(|j| j.image_id.to_string() == *id);
        broken.extend(image(world, id, record, job));
    }
    for what in broken {
        world.violated(format!("{when}: {what}"));
    }
}

fn image(world: &World, id: &str, record: &ImageRecord, job: Option<&Record>) -> Vec<String> {
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
            if rbd.metadata.contains_key(OWNERSHIP_TAG) && rbd.ours {
                broken.push(format!("active image {id} has the ownership tag"));
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
        "queued"
            if world.cloud.services.get(id).is_some_and(|service| service.outcome != Some(ServiceOutcome::Died)) =>
        {
            let service = world.cloud.services.get(id);
            let job = job.map(|j| (j.state, j.reason.clone()));
            broken.push(format!("image {id} is queued, its service {service:?}, job {job:?}"));
        }
        "queued" if record.requested => {
            if cloud::asks(&image.tags) {
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
pub fn all_served(world: &mut World, asked: &[Uuid]) {
    for id in asked {
        let id = id.to_string();
        let Some(record) = world.cloud.images.get(&id) else { continue };
        if record.image.status == "active" {
            continue;
        }
        let job = world.ceph.job_records().into_iter().find(|j| j.image_id.to_string() == id);
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
        let stuck = record.image.properties.contains_key(TASK);
        // a task of the request before, which ended without it, is at work still
        let late = world.has(Trouble::SlowTasks) && reason.contains("another client has written");
        if !stuck && !kills && !late && !RIGHTLY.iter().any(|right| reason.contains(right)) {
            let state = job.map(|j| j.state);
            world.violated(format!("image {id} was asked for again in a calm world and is {state:?}: {reason}"));
        }
    }
}
