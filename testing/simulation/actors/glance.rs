//! Glance at work: the task behind a location, hashing, uploads and imports of other clients, deletions.

use std::time::Duration;

use tokio::time::sleep;

use crate::job::simulation::faults::trouble::Trouble;
use crate::job::simulation::faults::world::{Shared, World};
use crate::job::simulation::invariants::publishing;
use crate::job::simulation::state::cluster::FSID;
use crate::job::simulation::state::glance::{TASK, location};

/// Glance's task that looks at a location and makes the image active.
pub async fn location_task(shared: Shared, id: String, task: String, url: String) {
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
            record.finish_task(&task, status, message);
        }
    };
    {
        let mut world = shared.lock();
        if stuck {
            return world.log(|| format!("glance task of {id} is stuck without end"));
        }
        let Some(record) = world.cloud.images.get(&id).cloned() else { return };
        let data = location(&url).and_then(|(pool, name, snap)| {
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
        if let Some((pool, name, _)) = location(&url) {
            publishing::published(&mut world, &id, &pool, &name);
        }
        if let Some(record) = world.cloud.images.get_mut(&id) {
            record.image.status = "active".into();
            record.locations.push(url);
            record.active_by_location = true;
        }
    }
    // the task is over, and the record free, when the active image has its hash
    hash(&shared, &id).await;
    finish(&mut shared.lock(), "success", "");
}

/// Glance reads an active image's data to hash it, and saves the record as it had read it before: what was changed
/// meanwhile is lost.
async fn hash(shared: &Shared, id: &str) {
    let (read, time) = {
        let mut world = shared.lock();
        if !world.has(Trouble::WholeRecordSaves) {
            return;
        }
        let longest = if world.dice.percent(30) { 150_000 } else { 10_000 };
        let time = world.dice.millis(100, longest);
        let Some(record) = world.cloud.images.get(id) else { return };
        (record.image.clone(), time)
    };
    sleep(time).await;
    let mut world = shared.lock();
    world.log(|| format!("glance saves the record of {id} as it read it {time:?} ago"));
    if let Some(record) = world.cloud.images.get_mut(id) {
        record.image = read;
    }
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
        record.begin_data("saving");
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
            publishing::upload_met(&mut world, &id, found);
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
        None => publishing::upload_lost(&mut world, &id),
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

/// A tenant imports data of its own to another store than the daemon's.
pub async fn import(shared: Shared, id: String) {
    let task = {
        let mut world = shared.lock();
        let task = format!("import-{}", world.ceph.next());
        let Some(record) = world.cloud.images.get_mut(&id) else { return };
        if record.image.status != "queued" || record.image.properties.contains_key(TASK) {
            return;
        }
        record.begin_data("importing");
        record.image.properties.insert(TASK.into(), task.clone());
        world.log(|| format!("the tenant imports other data to {id}"));
        task
    };
    let (time, fails) = {
        let mut world = shared.lock();
        (world.dice.millis(200, 40_000), world.dice.percent(20))
    };
    sleep(time).await;
    let mut world = shared.lock();
    world.log(|| format!("the import to {id} is over, fails={fails}"));
    let Some(record) = world.cloud.images.get_mut(&id) else { return };
    if record.image.properties.get(TASK) != Some(&task) || record.image.status != "importing" {
        return;
    }
    record.image.properties.remove(TASK);
    if fails {
        record.image.status = "queued".into();
        return;
    }
    record.image.status = "active".into();
    record.image.size = Some(5 << 20);
    record.elsewhere = true;
    record.locations.push(format!("file:///var/lib/glance/images/{id}"));
}

/// Glance's driver removes the image's data.
fn remove_data(world: &mut World, id: &str) {
    if let Some(found) = world.ceph.named("images", id).map(|i| i.id.clone()) {
        world.log(|| format!("glance removes the data of {id}"));
        world.ceph.drop_image(&found);
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
        let found = world.ceph.named("images", id);
        if found.is_some_and(|found| !found.dead_watchers.is_empty() || world.ceph.has_clones(&found.id)) {
            return false;
        }
        remove_data(world, id);
    }
    world.cloud.images.remove(id);
    true
}
