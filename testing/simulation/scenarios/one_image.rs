//! One exact moment: the real engine in a world without accidents, with one image, and a script that changes the world
//! right before a call of the daemon is done.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep};
use uuid::Uuid;

use super::operator;
use crate::config::Config;
use crate::job::intake::Intake;
use crate::job::record::Record;
use crate::job::simulation::actors::daemon::Daemon;
use crate::job::simulation::faults::dice::Dice;
use crate::job::simulation::faults::odds::Faults;
use crate::job::simulation::faults::world::{Shared, World};
use crate::job::simulation::state::cluster::FSID;
use crate::job::simulation::state::glance::ImageRecord;
use crate::job::store::{Store, Stored};
use crate::request::Source;
use crate::transfer::OWNERSHIP_TAG;

pub const OWNER: &str = "blue";
pub const OTHER: &str = "green";

/// A world with one image and two volumes of its owner.
pub struct OneImage {
    pub world: Shared,
    pub image: Uuid,
    pub volumes: [Uuid; 2],
    pub store: Store,
}

pub fn config(method: &str) -> Config {
    super::config(&format!("method = {method}"), "[cinder]\nintegration = true\n")
}

impl OneImage {
    pub fn new() -> Self {
        let mut dice = Dice::new(11);
        let mut state = World::new(Dice::new(7), Faults::default(), Vec::new());
        let volumes = [dice.uuid(), dice.uuid()];
        for volume in volumes {
            state.cloud.create_volume(&mut state.ceph, volume, OWNER);
        }
        let image = dice.uuid();
        let source = Source::Volume(volumes[0]);
        let record = ImageRecord::queued(image, OWNER, vec!["mine".into(), source.tag()], Some(source));
        state.cloud.images.insert(image.to_string(), record);
        let world = Shared(Arc::new(Mutex::new(state)));
        Self { image, volumes, store: operator(&world), world }
    }

    /// Before the first call whose description has these words, the world is changed.
    pub fn before(&self, words: &'static [&'static str], change: impl FnOnce(&mut World) + Send + 'static) {
        let mut change = Some(change);
        self.world.lock().script = Some(Box::new(move |world, call| {
            if words.iter().all(|word| call.contains(word))
                && let Some(change) = change.take()
            {
                world.log(|| format!("the script, before: {call}"));
                change(world);
            }
        }));
    }

    pub fn image(&self) -> ImageRecord {
        self.world.lock().cloud.images[&self.image.to_string()].clone()
    }

    pub fn change_image(id: Uuid, change: impl FnOnce(&mut ImageRecord)) -> impl FnOnce(&mut World) {
        move |world| change(world.cloud.images.get_mut(&id.to_string()).unwrap())
    }

    /// The tenant's tag becomes that of the other volume.
    pub fn other_tag(&self) -> impl FnOnce(&mut World) + Send + 'static {
        let (image, source) = (self.image, Source::Volume(self.volumes[1]));
        move |world| {
            let record = world.cloud.images.get_mut(&image.to_string()).unwrap();
            record.image.tags = vec![source.tag(), "mine".into()];
            (record.source, record.asked) = (Some(source), Instant::now());
        }
    }

    pub fn content_of(&self, volume: usize) -> u64 {
        let world = self.world.lock();
        let rbd = &world.cloud.disks[&self.volumes[volume].to_string()].rbd;
        world.ceph.by_id(rbd).unwrap().content
    }

    /// Content of the RBD image under the image's id, and whether it has the ownership tag.
    pub fn published(&self) -> Option<(u64, bool)> {
        let world = self.world.lock();
        world.ceph.named("images", &self.image.to_string()).map(|i| (i.content, i.metadata.contains_key(OWNERSHIP_TAG)))
    }

    pub fn daemon(&self, name: &str, method: &str) -> Daemon {
        Daemon::start(&self.world, name.into(), config(method))
    }

    pub async fn ask(&self) {
        let tags = self.image().image.tags;
        let storing = Intake::storing(self.store.clone(), watch::channel(Arc::new(config("auto"))).1);
        storing.image_queued(self.image, Some(OWNER.into()), &tags).await.unwrap();
    }

    pub fn stored(&self) -> Option<Stored> {
        self.world.lock().ceph.jobs().into_iter().find(|job| job.record.image_id == self.image)
    }

    pub fn job(&self) -> Option<Record> {
        self.stored().map(|stored| stored.record)
    }

    /// Waits until the job has ended, and until the daemons and services have had time for what they do afterwards.
    pub async fn end(&self) -> Record {
        let until = Instant::now() + Duration::from_secs(3600);
        loop {
            sleep(Duration::from_secs(1)).await;
            if let Some(job) = self.stored().filter(Stored::is_settled) {
                sleep(Duration::from_secs(200)).await;
                let same = |now: &Stored| now.record.request_id == job.record.request_id;
                if let Some(now) = self.stored().filter(|now| now.is_settled() && same(now)) {
                    return now.record;
                }
            }
            assert!(Instant::now() < until, "it does not end: {:#?}", self.job());
        }
    }

    /// No promise was broken, and nothing of ours is left in Ceph but the data of active images.
    pub fn is_tidy(&self) {
        let world = self.world.lock();
        assert_eq!(world.violations, BTreeSet::new());
        assert_eq!(world.ceph.at_once.orphans, BTreeSet::new());
        for image in world.ceph.images.iter().filter(|image| image.ours) {
            let name = image.name.clone().unwrap_or_default();
            let location = format!("rbd://{FSID}/images/{name}/snap");
            let serves = world.cloud.images.get(&name).is_some_and(|record| record.locations.contains(&location));
            assert!(serves, "left behind: {}/{name}", image.pool);
            assert!(!image.metadata.contains_key(OWNERSHIP_TAG), "{name} has the ownership tag");
        }
        let snapshots = world.ceph.images.iter().filter(|image| !image.ours).flat_map(|image| &image.snaps);
        assert_eq!(snapshots.filter(|snap| snap.ours).count(), 0, "a snapshot is left");
    }
}
