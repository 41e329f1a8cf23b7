//! A client may open an image at any moment. It never reads a wrong byte.

use crate::ceph::{Features, FillState, ImageSpec};
use crate::job::record::Record;
use crate::job::simulation::faults::world::World;
use crate::job::simulation::state::at_once::GRACE;
use crate::job::simulation::state::cluster::Rbd;

/// Whether clients may have opened it.
fn is_published(world: &World, image: &Rbd) -> bool {
    world.ceph.at_once.contents.contains_key(&image.id)
}

/// An image became active by this RBD image.
pub fn published(world: &mut World, image: &Rbd) {
    if image.parent.is_some() && !world.ceph.at_once.is_asked_for {
        let name = &image.name;
        world.violated(format!("image {name:?} became active while its RBD image has a parent"));
    }
    let content = world.ceph.content(image);
    world.ceph.at_once.contents.insert(image.id.clone(), content);
}

/// What a client reads that opens a published image now must be what it became active with. With an object map, every
/// object that the image lacks is read as a hole.
pub fn watch(world: &mut World) {
    let mut broken = Vec::new();
    if world.ceph.at_once.contents.is_empty() {
        return;
    }
    for image in &world.ceph.images {
        let Some(right) = world.ceph.at_once.contents.get(&image.id) else { continue };
        if image.removing.is_some() {
            continue;
        }
        let read = world.ceph.content(image);
        if read != *right {
            broken.push(format!("a client that opens {:?} reads {read}, right is {right}", image.name));
        }
        if image.parent.is_some() && image.features & Features::MAPS.0 != 0 {
            broken.push(format!("{:?} has an object map before all its objects are there", image.name));
        }
    }
    for what in broken {
        world.violated(what);
    }
}

/// A daemon removes a snapshot, or an image with all of them: no client may still read from it.
pub fn must_not_be_read(world: &mut World, id: &str, snapshot: Option<u64>) {
    let reads = |image: &&Rbd| {
        image.cut_off.as_ref().is_some_and(|cut| {
            let is_in = cut.chain.iter().any(|(image, snap)| image == id && snapshot.is_none_or(|this| this == *snap));
            is_in && cut.at.elapsed() < GRACE
        })
    };
    let reader = world.ceph.images.iter().find(reads).filter(|image| is_published(world, image));
    if let Some(name) = reader.map(|image| image.name.clone()) {
        world.violated(format!("what {name:?} read from was removed before its grace was over"));
    }
}

/// How far the record of the job says that the fill is.
fn recorded(world: &World, name: &str) -> u64 {
    let object = world.ceph.objects.get(&format!("job.{name}"));
    object.and_then(|object| Record::parse(&object.data).ok()).map_or(0, |record| record.fill.next_object)
}

/// A daemon begins to fill an image, from there.
pub fn may_fill(world: &mut World, image: &ImageSpec, found: &Rbd) {
    if found.features & Features::MAPS.0 != 0 && found.parent.is_some() {
        world.violated(format!("a fill of {image}, which has an object map"));
    }
}

/// The fill goes on from there.
pub fn must_resume(world: &mut World, image: &ImageSpec, found: &Rbd, from: FillState) {
    let done = found.name.as_deref().map_or(0, |name| recorded(world, name));
    if from.next_object < done {
        world.violated(format!("the fill of {image} does not go on where it stopped"));
    }
}

/// A long call wrote objects of an image that is not there any more.
pub fn wrote_into_nothing(world: &mut World, what: &str) {
    world.violated(format!("{what} wrote objects of an image that had been removed"));
}
