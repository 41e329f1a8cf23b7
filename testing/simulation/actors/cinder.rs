//! Cinder deletes volumes.

use crate::job::simulation::faults::world::World;
use crate::job::simulation::invariants::promises;

/// A tenant deletes the volume.
pub fn delete_volume(world: &mut World, id: &str) {
    if !world.cloud.begin_volume_deletion(id) {
        return;
    }
    world.log(|| format!("the tenant deletes volume {id}"));
    let unflattened = world.cloud.delete_disk(&mut world.ceph, id);
    promises::must_be_deletable(world, id, unflattened);
}
