//! What a daemon may do: one end per request, a lease for each change, nothing but its own images; no owner follows
//! another that was not fenced, and no healthy daemon is fenced.

use tokio::time::Instant;

use crate::ceph::ImageSpec;
use crate::job::record::Record;
use crate::job::simulation::faults::world::World;
use crate::job::simulation::state::cluster::{FSID, Snap};

/// A job record was written.
pub fn written(world: &mut World, before: &[u8], data: &[u8]) {
    let Ok(record) = Record::parse(data) else { return };
    if let Some(owner) = Record::parse(before).ok().and_then(|before| before.owner_address)
        && record.owner_address.as_ref().is_some_and(|address| *address != owner)
        && !world.ceph.blocklist.contains(&owner)
    {
        world.violated(format!(
            "the job of image {} was taken over from {owner}, which was not fenced",
            record.image_id
        ));
    }
    let (image, request, state) = (record.image_id, record.request_id, record.state);
    match world.history.ended.get(&request).copied() {
        Some(before) if before != state => {
            world.violated(format!("the request {request} for image {image} ended as {before}, then became {state}"));
        }
        None if state.is_ended() => {
            world.history.ended.insert(request, state);
        }
        _ => {}
    }
}

/// A daemon asks for a client to be fenced: it may give up one of its own.
pub fn fenced(world: &mut World, by: &str, address: &str) {
    let name = address.split(':').next().unwrap_or_default();
    if name == by {
        world.history.given_up.insert(address.to_owned());
    } else if !world.history.given_up.contains(address)
        && !world.history.stricken.contains(name)
        && !world.ceph.blocklist.contains(address)
    {
        world.violated(format!("the healthy daemon {name} was fenced"));
    }
}

/// A daemon touches an image: it must be one that a daemon made.
pub fn must_be_ours(world: &mut World, what: &str, id: &str) {
    let Some(image) = world.ceph.by_id(id) else { return };
    if !image.ours {
        let text = format!("{what} of {}/{:?}, which no daemon made", image.pool, image.name);
        world.violated(text);
    }
}

/// A daemon takes an image away, or its name: no active image may lose its data.
pub fn must_not_be_active(world: &mut World, what: &str, id: &str) {
    let Some(image) = world.ceph.by_id(id) else { return };
    let Some(name) = image.name.clone() else { return };
    let location = format!("rbd://{FSID}/{}/{name}/snap", image.pool);
    if world.cloud.images.get(&name).is_some_and(|i| i.image.status == "active" && i.locations.contains(&location)) {
        world.violated(format!("{what} of the data of the active image {name}"));
    }
}

/// A daemon removes a snapshot: it must be one that a daemon made.
pub fn must_be_our_snapshot(world: &mut World, image: &ImageSpec, snap: &Snap) {
    if !snap.ours {
        world.violated(format!("removal of the snapshot {image}@{}, which no daemon made", snap.name));
    }
}

/// A daemon purges a disk from the trash: Cinder must have deleted its volume.
pub fn must_be_deleted(world: &mut World, image: &ImageSpec, id: &str) {
    if !world.cloud.disks.values().any(|disk| disk.rbd == id && disk.deleted.is_some()) {
        world.violated(format!("purge of {image}, which Cinder has not deleted"));
    }
}

/// A daemon that begins to change an image's record holds the lease on its job by all that it can know.
pub fn must_hold_lease(world: &mut World, name: &str, address: String, image_id: &str) {
    let until = world.ceph.leases.get(&(address, format!("job.{image_id}"))).copied();
    if until.is_none_or(|until| until <= Instant::now()) {
        world.violated(format!("{name} set out to change image {image_id} without a lease"));
    }
}

/// Cinder cannot delete a volume that has clones in other pools.
pub fn must_be_deletable(world: &mut World, volume: &str, clones: Vec<(String, Option<String>)>) {
    for (pool, name) in clones {
        world.violated(format!("Cinder may not flatten {pool}/{name:?}, and volume {volume} is error_deleting"));
    }
}
