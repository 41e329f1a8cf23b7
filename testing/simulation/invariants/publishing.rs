//! What an image may become active with, and when.

use super::readers;
use crate::job::simulation::faults::world::World;
use crate::job::simulation::state::glance::location;

/// A daemon registers that location.
pub fn location_added(world: &mut World, id: &str, url: &str) {
    let Some((pool, name, _)) = location(url) else { return };
    let Some((has_parent, ours)) = world.ceph.named(&pool, &name).map(|data| (data.parent.is_some(), data.ours)) else {
        return;
    };
    if has_parent && !world.ceph.at_once.is_asked_for {
        world.violated(format!("the location of {id} was registered while the RBD image has a parent"));
    }
    if !ours {
        world.violated(format!("the location of {id} was registered with an image that no daemon made"));
    }
}

/// The image becomes active by what lies at the location: the promises of publishing are checked here.
pub fn published(world: &mut World, id: &str, pool: &str, name: &str) {
    let Some(record) = world.cloud.images.get(id).cloned() else { return };
    let Some(rbd) = world.ceph.named(pool, name).cloned() else {
        return world.violated(format!("image {id} became active without its RBD image"));
    };
    readers::published(world, &rbd);
    let content = world.ceph.content(&rbd);
    if !rbd.snaps.iter().any(|s| s.name == "snap" && s.protected && s.content == content) {
        world.violated(format!("image {id} became active without a protected snapshot of its content"));
    }
    if world.cloud.services.get(id).is_some_and(|service| !service.has_commit_tag) {
        world.violated(format!("image {id} became active before its client service committed"));
    }
    let right =
        record.posted_for().map(|(source, asked)| world.cloud.right_contents(source, asked)).unwrap_or_default();
    if content == 0 || !right.contains(&content) {
        world.violated(format!("image {id} became active with content {content}, right is {right:?}"));
    }
    let owner = record.posted.as_ref().and_then(|image| image.owner.as_ref());
    let owned = owner.zip(record.posted_for());
    let owned = owned.is_some_and(|(owner, (source, asked))| world.cloud.owned_snapshot(source, owner, asked));
    if !owned && (rbd.owner.is_none() || rbd.owner.as_ref() != owner) {
        let whose = &rbd.owner;
        world.violated(format!("image {id} of {owner:?} became active with what {whose:?} owned at the snapshot"));
    }
    if world.ceph.containers.contains(&content) {
        world.violated(format!("image {id} became active with the header of a container format"));
    }
}

/// Another writer's upload meets an RBD image under the image's name.
pub fn upload_met(world: &mut World, id: &str, ours: bool) {
    if ours && world.cloud.services.get(id).is_some_and(|service| !service.doubted) {
        world.violated(format!("the service's upload to {id} met our image, though it was in no doubt"));
    }
}

/// Another writer's upload finds its data gone.
pub fn upload_lost(world: &mut World, id: &str) {
    world.violated(format!("the data of another writer's upload to {id} is gone"));
}
