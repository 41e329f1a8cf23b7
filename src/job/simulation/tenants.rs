//! What tenants and operators change on records and volumes while a job runs.

use tokio::time::{Instant, sleep};
use uuid::Uuid;

use super::cloud::TASK;
use super::glance;
use super::scenario::{Stage, tag_of};
use super::trouble::Trouble;
use super::world::World;
use crate::request;

/// Changes things until the time of accidents is over.
pub async fn changes(stage: Stage, until: Instant) {
    let kinds = stage.world.lock().trouble.clone();
    while Instant::now() < until {
        let pause = stage.dice(|dice| dice.millis(200, 8_000));
        sleep(pause).await;
        for kind in &kinds {
            let image_id = stage.dice(|dice| *dice.pick(&stage.images));
            match kind {
                Trouble::ChangedTags if stage.dice(|dice| dice.percent(15)) => change_tag(&stage, image_id),
                Trouble::ChangedFormats if stage.dice(|dice| dice.percent(40)) => change_format(&stage, image_id),
                Trouble::ChangedOwners if stage.dice(|dice| dice.percent(15)) => {
                    change_owner(&mut stage.world.lock(), image_id)
                }
                Trouble::Imports if stage.dice(|dice| dice.percent(5)) => {
                    tokio::spawn(glance::import(stage.world.clone(), image_id.to_string()));
                }
                Trouble::RefusedFences if stage.dice(|dice| dice.percent(10)) => {
                    let mut world = stage.world.lock();
                    let long = world.dice.millis(10_000, 200_000);
                    world.log(|| format!("fences are refused for {long:?}"));
                    world.fences_refused_until = Some(Instant::now() + long);
                }
                _ => {}
            }
        }
    }
}

/// The tenant wants another source, while the request for the one before is being worked on.
fn change_tag(stage: &Stage, image_id: Uuid) {
    let id = image_id.to_string();
    {
        let mut world = stage.world.lock();
        let Some(record) = world.cloud.images.get(&id) else { return };
        let asks = record.image.tags.iter().any(|tag| tag.starts_with(request::TAG_PREFIX));
        let free = record.image.status == "queued" && !record.image.properties.contains_key(TASK);
        if !asks || !free || world.cloud.services.contains_key(&id) {
            return;
        }
        let (owner, had) = (record.image.owner.clone(), record.image.tags.clone());
        let others = world.cloud.disks.values().filter(|disk| disk.deleted.is_none());
        let tags: Vec<String> = others
            .filter(|disk| Some(&disk.volume.project_id) == owner.as_ref())
            .map(tag_of)
            .filter(|tag| !had.contains(tag))
            .collect();
        if tags.is_empty() {
            return;
        }
        let tag = world.dice.pick(&tags).clone();
        world.log(|| format!("the tenant changes the tag of {id} to {tag}"));
        let now = Instant::now();
        if let Some(record) = world.cloud.images.get_mut(&id) {
            record.image.tags.retain(|tag| !tag.starts_with(request::TAG_PREFIX));
            record.image.tags.push(tag);
            if let request::TagRequest::Source(source) = request::parse_request_tags(&record.image.tags) {
                record.asks_for(source, now);
            }
        }
    }
    stage.notify(image_id, false);
}

fn change_format(stage: &Stage, image_id: Uuid) {
    let mut world = stage.world.lock();
    let id = image_id.to_string();
    if world.cloud.services.contains_key(&id) {
        return;
    }
    let format = (*world.dice.pick(&["vmdk", "qcow2", "raw"])).to_owned();
    if let Some(record) = world.cloud.images.get_mut(&id).filter(|r| r.image.status == "queued") {
        record.image.disk_format = Some(format.clone());
        world.log(|| format!("the tenant sets disk_format {format} on {id}"));
    }
}

/// A volume is transferred to another project, or an operator gives an image away.
fn change_owner(world: &mut World, image_id: Uuid) {
    let id = image_id.to_string();
    let project = (*world.dice.pick(&["blue", "green"])).to_owned();
    if world.dice.percent(50) {
        let free = |image: &crate::openstack::Image| image.status == "queued" && !image.properties.contains_key(TASK);
        if world.cloud.services.contains_key(&id) {
            return;
        }
        if let Some(record) = world.cloud.images.get_mut(&id).filter(|record| free(&record.image)) {
            record.image.owner = Some(project.clone());
            world.log(|| format!("image {id} goes to project {project}"));
        }
        return;
    }
    let volumes: Vec<String> =
        world.cloud.disks.values().filter(|d| !d.instance).map(|d| d.volume.id.clone()).collect();
    if volumes.is_empty() {
        return;
    }
    let volume = world.dice.pick(&volumes).clone();
    world.log(|| format!("volume {volume} goes to project {project}"));
    if let Some(disk) = world.cloud.disks.get_mut(&volume) {
        disk.volume.project_id.clone_from(&project);
    }
    for (snapshot, _) in world.cloud.snapshots.values_mut().filter(|(snapshot, _)| snapshot.volume_id == volume) {
        snapshot.project_id.clone_from(&project);
    }
}
