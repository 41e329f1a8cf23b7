//! Nova deletes instances.

use std::time::Duration;

use tokio::time::{Instant, sleep};

use crate::job::simulation::faults::world::Shared;
use crate::job::simulation::state::cloud::is_kept;

/// How often Nova tries to remove the disk of an instance that is deleted, and how long it waits in between.
const REMOVALS: u32 = 12;
const REMOVAL_PAUSE: Duration = Duration::from_secs(5);

/// Nova deletes the instance: its disk goes when it has no snapshot, or Nova gives up.
pub async fn delete_instance(shared: Shared, id: String) {
    let rbd = {
        let mut world = shared.lock();
        let Some(disk) = world.cloud.disks.get_mut(&id).filter(|disk| disk.deleted.is_none()) else { return };
        disk.deleted = Some(Instant::now());
        let rbd = disk.rbd.clone();
        world.log(|| format!("the tenant deletes instance {id}"));
        rbd
    };
    for _ in 0..REMOVALS {
        {
            let mut world = shared.lock();
            if !is_kept(&world.ceph, &rbd) {
                world.log(|| format!("nova removed the disk of instance {id}"));
                return world.ceph.drop_image(&rbd);
            }
        }
        sleep(REMOVAL_PAUSE).await;
    }
    shared.lock().log(|| format!("nova gave up on the disk of instance {id}"));
}
