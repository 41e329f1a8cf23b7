//! What Glance does beside the registering of a location: hashing, imports.

use tokio::time::sleep;

use super::cloud::TASK;
use super::trouble::Trouble;
use super::world::Shared;

/// Glance reads an active image's data to hash it, and saves the record as it had read it before: what was changed
/// meanwhile is lost.
pub async fn hash(shared: &Shared, id: &str) {
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

/// A tenant imports data of its own to another store than the daemon's.
pub async fn import(shared: Shared, id: String) {
    let task = {
        let mut world = shared.lock();
        let task = format!("import-{}", world.ceph.next());
        let Some(record) = world.cloud.images.get_mut(&id) else { return };
        if record.image.status != "queued" || record.image.properties.contains_key(TASK) {
            return;
        }
        record.image.disk_format.get_or_insert("raw".into());
        record.image.container_format.get_or_insert("bare".into());
        record.image.status = "importing".into();
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
