//! What a seed's world has from the beginning: a job that kills its daemons, things that jobs left behind.

use uuid::Uuid;

use crate::job::simulation::faults::trouble::Trouble;
use crate::job::simulation::faults::world::{Killer, World};
use crate::job::simulation::state::DEPLOYMENT;
use crate::publish::tag::OwnershipTag;
use crate::transfer::OWNERSHIP_TAG;

/// Brings in what is there from the beginning.
pub fn plant(world: &mut World, images: &[Uuid]) {
    if world.has(Trouble::KillingJob) {
        let call = *world.dice.pick(&["create snapshot", "open for", "clone", "copied", "flattened", "protect"]);
        let image_id = world.dice.pick(images).to_string();
        world.killer = Some(Killer { image_id, call, deaths: 0 });
    }
    if world.has(Trouble::Planted) {
        plant_leftovers(world);
    }
}

/// Copies and snapshots of jobs that have no record: those of this deployment go, those of another one stay.
fn plant_leftovers(world: &mut World) {
    let another = world.dice.uuid();
    let disks: Vec<String> = world.cloud.disks.values().map(|disk| disk.rbd.clone()).collect();
    for deployment in [Some(DEPLOYMENT), None, Some(another)] {
        let (image_id, request_id) = (world.dice.uuid(), world.dice.uuid());
        let ours = deployment != Some(another);
        let tag = match deployment {
            Some(deployment) => OwnershipTag::new(image_id, request_id, deployment),
            None => OwnershipTag { image_id, maker: None },
        };
        let name = format!("rbd-offload.{image_id}");
        if world.dice.percent(70) {
            let content = world.ceph.next();
            let copy = world.ceph.create("images", &name, content, ours);
            copy.metadata.insert(OWNERSHIP_TAG.into(), tag.to_string());
        }
        let disk = world.dice.pick(&disks).clone();
        // no other program writes snapshots under such a name without a tag
        if world.dice.percent(70) && !world.cloud.disks.values().any(|d| d.rbd == disk && d.instance) {
            world.ceph.snap(&disk, &name, true, ours);
            if let Some(image) = world.ceph.by_id_mut(&disk) {
                image.snapshot_tags.insert(name, tag.to_string());
            }
        }
    }
}
