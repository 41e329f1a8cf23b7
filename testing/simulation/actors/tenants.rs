//! What tenants and operators change on records and volumes while a job runs.

use tokio::time::{Instant, sleep};
use uuid::Uuid;

use super::glance;
use super::region::Region;
use crate::job::simulation::faults::trouble::Trouble;
use crate::job::simulation::faults::world::World;
use crate::job::simulation::state::cloud::{Disk, asks};
use crate::job::simulation::state::glance::TASK;
use crate::request;

impl Region {
    /// What tenants, operators and other clients do to one image in the time of accidents.
    pub async fn tenant(self, image_id: Uuid, until: Instant) {
        self.notify(image_id, false);
        while Instant::now() < until {
            let pause = self.dice(|dice| dice.millis(500, 40_000));
            sleep(pause).await;
            if Instant::now() >= until {
                return;
            }
            let id = image_id.to_string();
            match self.dice(|dice| dice.below(40)) {
                0 => {
                    let deleted = glance::delete_image(&mut self.world.lock(), &id);
                    if deleted {
                        self.notify(image_id, true);
                        return;
                    }
                }
                1 | 23 if self.world.lock().cloud.services.contains_key(&id) => {}
                1 => {
                    tokio::spawn(glance::upload(self.world.clone(), id));
                }
                2..=12 => {
                    self.ask_again(image_id);
                }
                13 | 14 => self.cancel(image_id).await,
                15 | 16 => {
                    let _ = self.store.retry(image_id).await;
                }
                17..=19 => self.notify(image_id, false),
                // a forged notification says that it was deleted
                20 | 22 => self.notify(image_id, true),
                23 => foreign_data(&mut self.world.lock(), image_id),
                21 => {
                    if let Some(record) = self.world.lock().cloud.images.get_mut(&id) {
                        // the tenant changes something of its own
                        record.image.properties.insert("own".into(), "2".into());
                    }
                }
                _ => {}
            }
        }
    }
}

/// Changes things until the time of accidents is over.
pub async fn changes(region: Region, until: Instant) {
    let kinds = region.world.lock().trouble.clone();
    while Instant::now() < until {
        let pause = region.dice(|dice| dice.millis(200, 8_000));
        sleep(pause).await;
        for kind in &kinds {
            let image_id = region.dice(|dice| *dice.pick(&region.images));
            match kind {
                Trouble::ChangedTags if region.dice(|dice| dice.percent(15)) => change_tag(&region, image_id),
                Trouble::ChangedFormats if region.dice(|dice| dice.percent(40)) => change_format(&region, image_id),
                Trouble::ChangedOwners if region.dice(|dice| dice.percent(15)) => {
                    change_owner(&mut region.world.lock(), image_id)
                }
                Trouble::Imports if region.dice(|dice| dice.percent(5)) => {
                    tokio::spawn(glance::import(region.world.clone(), image_id.to_string()));
                }
                Trouble::RefusedFences if region.dice(|dice| dice.percent(10)) => {
                    let mut world = region.world.lock();
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
fn change_tag(region: &Region, image_id: Uuid) {
    let id = image_id.to_string();
    {
        let mut world = region.world.lock();
        let Some(record) = world.cloud.images.get(&id) else { return };
        let asks = asks(&record.image.tags);
        let free = record.image.status == "queued" && !record.image.properties.contains_key(TASK);
        if !asks || !free || world.cloud.services.contains_key(&id) {
            return;
        }
        let (owner, had) = (record.image.owner.clone(), record.image.tags.clone());
        let others = world.cloud.disks.values().filter(|disk| disk.deleted.is_none());
        let tags: Vec<String> = others
            .filter(|disk| Some(&disk.volume.project_id) == owner.as_ref())
            .map(Disk::tag)
            .filter(|tag| !had.contains(tag))
            .collect();
        if tags.is_empty() {
            return;
        }
        let tag = world.dice.pick(&tags).clone();
        world.log(|| format!("the tenant changes the tag of {id} to {tag}"));
        let now = Instant::now();
        if let Some(record) = world.cloud.images.get_mut(&id) {
            record.image.tags.retain(|tag| !request::is_request(tag));
            record.image.tags.push(tag);
            if let request::TagRequest::Source(source) = request::parse_request_tags(&record.image.tags) {
                record.asks_for(source, now);
            }
        }
    }
    region.notify(image_id, false);
}

fn change_format(region: &Region, image_id: Uuid) {
    let mut world = region.world.lock();
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
    world.cloud.transfer_volume(&volume, &project);
}

/// Another client puts an RBD image under the image's name while the copy is being made.
fn foreign_data(world: &mut World, image_id: Uuid) {
    let name = image_id.to_string();
    let copying = world.ceph.job_records().iter().any(|j| j.image_id == image_id && j.is_preparing());
    let queued = world.cloud.images.get(&name).is_some_and(|r| r.image.status == "queued");
    if !copying || !queued || world.ceph.named("images", &name).is_some() {
        return;
    }
    let content = world.ceph.next();
    world.log(|| format!("another client makes images/{name}"));
    let id = world.ceph.create("images", &name, content, false).id.clone();
    world.ceph.snap(&id, "snap", true, false);
}
