//! What jobs left behind, one case each: the real reconciler removes it, or leaves it alone.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::time::{Instant, sleep};
use uuid::Uuid;

use super::{operator, run_in_virtual_time};
use crate::config::Config;
use crate::job::clock::Clock;
use crate::job::names::private_name;
use crate::job::record::Record;
use crate::job::simulation::actors::cinder;
use crate::job::simulation::actors::daemon::Daemon;
use crate::job::simulation::faults::dice::Dice;
use crate::job::simulation::faults::odds::Faults;
use crate::job::simulation::faults::trouble::Trouble;
use crate::job::simulation::faults::world::{Killer, Shared, World};
use crate::job::simulation::state::DEPLOYMENT;
use crate::job::simulation::state::glance::ImageRecord;
use crate::job::store::Store;
use crate::publish::tag::OwnershipTag;
use crate::request::Source;
use crate::transfer::OWNERSHIP_TAG;

/// Longer than a few rounds, and than the pause between two sweeps.
const ROUNDS: Duration = Duration::from_secs(15 * 60);

/// Takeovers after which a job counts as one that kills its daemons.
const MAX_TAKEOVERS: u32 = 2;

struct Site {
    world: Shared,
    volume: Uuid,
    /// Internal id of the volume's disk.
    disk: String,
    store: Store,
}

fn config() -> Config {
    super::config(&format!("method = copy\nmax_takeovers = {MAX_TAKEOVERS}"), "")
}

fn tag(image_id: Uuid, deployment: Uuid) -> String {
    OwnershipTag::new(image_id, Uuid::new_v4(), deployment).to_string()
}

impl Site {
    fn new() -> Self {
        let mut state = World::new(Dice::new(3), Faults::default(), Vec::new());
        let volume = Uuid::new_v4();
        let disk = state.cloud.create_volume(&mut state.ceph, volume, "blue");
        let world = Shared(Arc::new(Mutex::new(state)));
        Self { volume, disk, store: operator(&world), world }
    }

    fn daemon(&self, name: &str) -> Daemon {
        Daemon::start(&self.world, name.into(), config())
    }

    fn leave_image(&self, name: &str, tag: String) -> String {
        let mut world = self.world.lock();
        let image = world.ceph.create("images", name, 1, true);
        image.metadata.insert(OWNERSHIP_TAG.into(), tag);
        image.id.clone()
    }

    fn leave_copy(&self, image_id: Uuid) -> String {
        self.leave_image(&private_name(image_id), tag(image_id, DEPLOYMENT))
    }

    /// A temporary snapshot of the volume, with its tag.
    fn leave_snapshot(&self, image_id: Uuid) {
        let mut world = self.world.lock();
        world.ceph.snap(&self.disk, &private_name(image_id), true, true);
        let tags = &mut world.ceph.by_id_mut(&self.disk).unwrap().snapshot_tags;
        tags.insert(private_name(image_id), tag(image_id, DEPLOYMENT));
    }

    /// Cinder deletes the volume, and moves its disk to the trash.
    fn delete_volume(&self) {
        cinder::delete_volume(&mut self.world.lock(), &self.volume.to_string());
        assert!(self.world.lock().ceph.by_id(&self.disk).is_some_and(|disk| disk.name.is_none()), "in the trash");
    }

    fn is_there(&self, id: &str) -> bool {
        self.world.lock().ceph.by_id(id).is_some()
    }

    fn request(&self) -> Uuid {
        let id = Uuid::new_v4();
        let source = Source::Volume(self.volume);
        let record = ImageRecord::queued(id, "blue", vec![source.tag()], Some(source));
        self.world.lock().cloud.images.insert(id.to_string(), record);
        id
    }

    fn status(&self, image_id: Uuid) -> String {
        self.world.lock().cloud.images[&image_id.to_string()].image.status.clone()
    }

    fn no_promise_is_broken(&self) {
        assert!(self.world.lock().violations.is_empty(), "{:?}", self.world.lock().violations);
    }
}

#[test]
fn the_tag_of_a_snapshot_that_is_gone_is_removed() {
    run_in_virtual_time(async {
        let site = Site::new();
        let (ours, theirs) = (Uuid::new_v4(), Uuid::new_v4());
        {
            let mut world = site.world.lock();
            let tags = &mut world.ceph.by_id_mut(&site.disk).unwrap().snapshot_tags;
            tags.insert(private_name(ours), tag(ours, DEPLOYMENT));
            tags.insert(private_name(theirs), tag(theirs, Uuid::new_v4()));
        }
        let _daemon = site.daemon("node");
        sleep(ROUNDS).await;
        let left: Vec<_> = site.world.lock().ceph.by_id(&site.disk).unwrap().snapshot_tags.keys().cloned().collect();
        assert_eq!(left, [private_name(theirs)]);
        site.no_promise_is_broken();
    });
}

#[test]
fn the_disk_of_a_deleted_volume_goes_with_the_last_snapshot() {
    // Cinder is there, or away in the first rounds: the snapshot goes then, and the disk later
    for cinder_away in [false, true] {
        run_in_virtual_time(async {
            let site = Site::new();
            site.leave_snapshot(Uuid::new_v4());
            site.delete_volume();
            if cinder_away {
                site.world.lock().cloud.cinder_away_until = Some(Instant::now() + ROUNDS);
            }
            let _daemon = site.daemon("node");
            sleep(ROUNDS).await;
            if cinder_away {
                let snapshots = site.world.lock().ceph.by_id(&site.disk).map(|disk| disk.snaps.len());
                assert_eq!(snapshots, Some(0));
                sleep(ROUNDS).await;
            }
            assert!(!site.is_there(&site.disk), "it is in the trash");
            site.no_promise_is_broken();
        });
    }
}

#[test]
fn the_disk_of_a_volume_that_cinder_has_stays_in_the_trash() {
    run_in_virtual_time(async {
        let site = Site::new();
        site.leave_snapshot(Uuid::new_v4());
        site.world.lock().ceph.by_id_mut(&site.disk).unwrap().name = None;
        let _daemon = site.daemon("node");
        sleep(ROUNDS).await;
        assert!(site.world.lock().ceph.by_id(&site.disk).unwrap().snaps.is_empty());
        site.no_promise_is_broken();
    });
}

#[test]
fn a_removal_that_broke_off_in_the_trash_is_finished() {
    run_in_virtual_time(async {
        let site = Site::new();
        let (ours, theirs) = (Uuid::new_v4(), Uuid::new_v4());
        let own = site.leave_copy(ours);
        let foreign = site.leave_image(&private_name(theirs), tag(theirs, Uuid::new_v4()));
        for id in [&own, &foreign] {
            let mut world = site.world.lock();
            let image = world.ceph.by_id_mut(id).unwrap();
            image.removing = image.name.take();
        }
        let _daemon = site.daemon("node");
        sleep(ROUNDS).await;
        assert_eq!((site.is_there(&own), site.is_there(&foreign)), (false, true));
        site.no_promise_is_broken();
    });
}

#[test]
fn a_published_image_of_a_forgotten_job_is_removed() {
    run_in_virtual_time(async {
        let site = Site::new();
        let [gone, foreign, inherited] = [(); 3].map(|()| Uuid::new_v4());
        let active = site.request();
        let ours = site.leave_image(&gone.to_string(), tag(gone, DEPLOYMENT));
        let kept = [
            site.leave_image(&foreign.to_string(), tag(foreign, Uuid::new_v4())),
            // a clone of a published image has its tag
            site.leave_image(&inherited.to_string(), tag(gone, DEPLOYMENT)),
            site.leave_image(&active.to_string(), tag(active, DEPLOYMENT)),
        ];
        site.world.lock().cloud.images.get_mut(&active.to_string()).unwrap().image.status = "active".into();
        let _daemon = site.daemon("node");
        sleep(ROUNDS).await;
        assert!(!site.is_there(&ours));
        assert!(kept.iter().all(|id| site.is_there(id)));
        site.no_promise_is_broken();
    });
}

#[test]
fn lists_that_take_longer_than_a_part_of_a_round_hold_nothing_up() {
    run_in_virtual_time(async {
        let site = Site::new();
        site.world.lock().trouble.push(Trouble::SlowLists);
        let (ours, theirs) = (Uuid::new_v4(), Uuid::new_v4());
        for image_id in [ours, theirs] {
            let record = Record { placeholder: false, ..Record::placeholder(image_id, Clock::System.now()) };
            assert!(site.store.create_ended(&record).await.unwrap());
        }
        // the sweep over all headers comes to these first
        for _ in 0..30 {
            site.world.lock().ceph.create("images", &Uuid::new_v4().to_string(), 1, false);
        }
        let upload = site.world.lock().ceph.create("images", &theirs.to_string(), 1, false).id.clone();
        let left = site.leave_image(&ours.to_string(), tag(ours, DEPLOYMENT));
        let _daemon = site.daemon("node");
        sleep(ROUNDS).await;
        assert_eq!((site.is_there(&left), site.is_there(&upload)), (false, true));
        let told = |world: &World| world.ceph.objects["reconcile"].omap.keys().any(|key| key.starts_with("round."));
        assert!(told(&site.world.lock()), "no round is complete, and each daemon does its own");
        site.no_promise_is_broken();
    });
}

#[test]
fn one_object_that_cannot_be_read_keeps_no_other_from_being_removed() {
    for call in ["tag of snapshot", "metadata images", "read job."] {
        run_in_virtual_time(async move {
            let site = Site::new();
            let mut ids = [Uuid::new_v4(), Uuid::new_v4()];
            ids.sort();
            let copies = ids.map(|id| site.leave_copy(id));
            ids.iter().for_each(|id| site.leave_snapshot(*id));
            site.world.lock().broken = Some(match call {
                "tag of snapshot" => format!("tag of snapshot volumes/volume-{}@{}", site.volume, private_name(ids[0])),
                "metadata images" => format!("metadata images/{}", private_name(ids[0])),
                _ => format!("read job.{}", ids[0]),
            });
            let _daemon = site.daemon("node");
            sleep(ROUNDS).await;
            assert!(!site.is_there(&copies[1]), "{call}");
            let snapshots = || site.world.lock().ceph.by_id(&site.disk).unwrap().snaps.clone();
            assert!(!snapshots().iter().any(|snap| snap.name == private_name(ids[1])), "{call}");
            site.world.lock().broken = None;
            sleep(ROUNDS).await;
            assert!(!site.is_there(&copies[0]) && snapshots().is_empty(), "{call}");
            site.no_promise_is_broken();
        });
    }
}

#[test]
fn one_request_whose_record_cannot_be_read_keeps_no_other_from_being_found() {
    run_in_virtual_time(async {
        let site = Site::new();
        let mut ids = [site.request(), site.request()];
        ids.sort();
        site.world.lock().broken = Some(format!("read job.{}", ids[0]));
        let _daemon = site.daemon("node");
        sleep(ROUNDS).await;
        assert_eq!([site.status(ids[0]), site.status(ids[1])], ["queued", "active"]);
        site.world.lock().broken = None;
        sleep(ROUNDS).await;
        assert_eq!(site.status(ids[0]), "active");
        site.no_promise_is_broken();
    });
}

#[test]
fn one_removal_that_hangs_keeps_no_other_waiting() {
    run_in_virtual_time(async {
        let site = Site::new();
        let mut ids: Vec<Uuid> = (0..12).map(|_| Uuid::new_v4()).collect();
        ids.sort();
        let copies: Vec<String> = ids.iter().map(|id| site.leave_copy(*id)).collect();
        site.world.lock().stuck = Some(format!("remove images/{}", private_name(ids[0])));
        let _daemon = site.daemon("node");
        sleep(Duration::from_secs(180)).await;
        let left: Vec<usize> = (0..ids.len()).filter(|index| site.is_there(&copies[*index])).collect();
        assert_eq!(left, [0]);
        // it counts as given up after some hours, and then goes as well
        site.world.lock().stuck = None;
        sleep(Duration::from_secs(3 * 60 * 60)).await;
        assert!(!site.is_there(&copies[0]));
    });
}

#[test]
fn a_leftover_whose_removal_kills_each_daemon_is_left_after_some() {
    // of a job that ended, or of none
    for has_record in [true, false] {
        run_in_virtual_time(async {
            let site = Site::new();
            let (image_id, other) = (Uuid::new_v4(), Uuid::new_v4());
            if has_record {
                let record = Record { placeholder: false, ..Record::placeholder(image_id, Clock::System.now()) };
                assert!(site.store.create_ended(&record).await.unwrap());
            }
            let killing = site.leave_copy(image_id);
            let killer = Killer { image_id: image_id.to_string(), call: "remove images", deaths: 0 };
            site.world.lock().killer = Some(killer);
            for life in 0..10 {
                let daemon = site.daemon(&format!("life{life}"));
                tokio::select! {
                    () = daemon.node.died.cancelled() => {}
                    () = sleep(ROUNDS) => {}
                }
                daemon.node.kill();
                sleep(Duration::from_secs(60)).await;
            }
            let deaths = site.world.lock().killer.as_ref().unwrap().deaths;
            assert!((1..=2 * MAX_TAKEOVERS + 2).contains(&deaths), "{deaths} daemons died");
            assert!(site.is_there(&killing));
            // it is this one leftover's trouble
            let copy = site.leave_copy(other);
            let _daemon = site.daemon("last");
            sleep(ROUNDS).await;
            assert!(!site.is_there(&copy));
            site.no_promise_is_broken();
        });
    }
}

#[test]
fn one_daemon_of_a_configuration_does_the_rounds_and_another_goes_on() {
    run_in_virtual_time(async {
        let site = Site::new();
        let rounds = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&rounds);
        site.world.lock().script = Some(Box::new(move |_, call| {
            counted.fetch_add(usize::from(call == "glance queued images after None"), Ordering::Relaxed);
        }));
        let daemons = [site.daemon("one"), site.daemon("two"), site.daemon("three")];
        let other = Daemon::start(&site.world, "other".into(), super::config("dry_run = true", ""));
        sleep(Duration::from_secs(60 * 60)).await;
        let done = rounds.load(Ordering::Relaxed);
        // one a minute for each configuration, and the first one of each daemon
        assert!((100..=130).contains(&done), "{done} rounds in an hour");
        other.node.kill();
        for daemon in &daemons[..2] {
            daemon.node.kill();
            let left = site.leave_copy(Uuid::new_v4());
            sleep(Duration::from_secs(5 * 60)).await;
            assert!(!site.is_there(&left), "no other daemon goes on");
        }
        site.no_promise_is_broken();
    });
}

#[test]
fn an_old_record_stays_while_a_daemon_removes_what_its_job_left() {
    run_in_virtual_time(async {
        let site = Site::new();
        site.leave_copy(Uuid::new_v4());
        let start = |name: &str| {
            let config = super::config("method = copy", "[jobs]\nretention = 1m");
            Daemon::start(&site.world, name.into(), config)
        };
        // its removal hangs, and then the whole daemon, for longer than the record is kept
        site.world.lock().stuck = Some("remove images/".into());
        let frozen = start("frozen");
        sleep(Duration::from_secs(60)).await;
        frozen.node.freeze(Duration::from_secs(3 * 60 * 60));
        site.world.lock().stuck = None;
        sleep(ROUNDS).await;
        let _other = start("other");
        sleep(ROUNDS).await;
        let fenced = site.world.lock().ceph.blocklist.len();
        assert_eq!(fenced, 1, "the record names the client that has to be fenced");
        site.no_promise_is_broken();
    });
}
