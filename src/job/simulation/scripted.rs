//! One exact moment: the real engine in a world without accidents, and a script that changes the world right before a
//! call of the daemon is done. Each test is one row of "The publish window" in `docs/explanation/jobs.md`, or what is
//! like it.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::time::{Instant, sleep};
use uuid::Uuid;

use super::checks;
use super::cloud::{Record as ImageRecord, TASK, create_volume};
use super::cluster::FSID;
use super::node::{Daemon, Handle, Node};
use super::world::{Dice, Faults, Shared, World};
use crate::config::Config;
use crate::decline::Decline;
use crate::job::clock::Clock;
use crate::job::record::{Record, State};
use crate::job::signal::{Signal, Signals};
use crate::job::store::{Cancelled, Store, Stored};
use crate::notification::{Event, EventType, Meta, Sink};
use crate::openstack::{Image, ImageTask};
use crate::request::Source;
use crate::transfer::{MARK, Method};

const OWNER: &str = "blue";
const OTHER: &str = "green";

/// A world with one image and two volumes of its owner.
pub(super) struct Stage {
    pub world: Shared,
    pub image: Uuid,
    pub volumes: [Uuid; 2],
    pub store: Store,
}

pub(super) fn config(method: &str) -> Config {
    let text = format!(
        "[messaging]\ntransport_url = rabbit://u:p@127.0.0.1:5672/\n\
         [keystone]\nauth_url = http://127.0.0.1:5000/v3\nusername = u\npassword = p\nproject_name = service\n\
         [offload]\nmethod = {method}\n[cinder]\nintegration = true\n[backend:ceph]\npool = volumes\n"
    );
    Config::parse(Path::new("scripted.conf"), &text).unwrap_or_else(|e| panic!("{e}"))
}

impl Stage {
    pub fn new() -> Self {
        let mut dice = Dice::new(11);
        let mut state = World::new(Dice::new(7), Faults::default(), Vec::new());
        let volumes = [dice.uuid(), dice.uuid()];
        for volume in volumes {
            create_volume(&mut state, volume, OWNER);
        }
        let image = dice.uuid();
        let record = Image {
            id: image.to_string(),
            name: None,
            status: "queued".into(),
            owner: Some(OWNER.into()),
            disk_format: None,
            container_format: None,
            min_disk: 0,
            min_ram: 0,
            size: None,
            tags: vec!["mine".into(), Source::Volume(volumes[0]).tag()],
            properties: [("own".to_owned(), "1".to_owned())].into(),
        };
        let record = ImageRecord::new(record, Some(Source::Volume(volumes[0])), Instant::now());
        state.cloud.images.insert(image.to_string(), record);
        let world = Shared(Arc::new(Mutex::new(state)));
        let command_line = Handle { node: Node::new(&world, "operator".into(), true) };
        Self { image, volumes, store: Store::new(Arc::new(command_line), Clock::System), world }
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

    fn change_image(id: Uuid, change: impl FnOnce(&mut ImageRecord)) -> impl FnOnce(&mut World) {
        move |world| change(world.cloud.images.get_mut(&id.to_string()).unwrap())
    }

    /// The tenant's tag becomes that of the other volume.
    fn other_tag(&self) -> impl FnOnce(&mut World) + Send + 'static {
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

    /// Content and mark of the RBD image under the image's id.
    pub fn published(&self) -> Option<(u64, bool)> {
        let world = self.world.lock();
        world.ceph.named("images", &self.image.to_string()).map(|i| (i.content, i.metadata.contains_key(MARK)))
    }

    fn daemon(&self, name: &str, method: &str) -> Daemon {
        Daemon::start(&self.world, name.into(), config(method))
    }

    pub async fn ask(&self) {
        let tags = self.image().image.tags;
        let storing = crate::job::intake::Intake::storing(
            self.store.clone(),
            tokio::sync::watch::channel(Arc::new(config("auto"))).1,
        );
        storing.image_queued(self.image, Some(OWNER.into()), &tags).await.unwrap();
    }

    fn stored(&self) -> Option<Stored> {
        checks::stored(&self.world.lock()).into_iter().find(|job| job.record.image_id == self.image)
    }

    pub fn job(&self) -> Option<Record> {
        self.stored().map(|stored| stored.record)
    }

    /// Waits until the job has ended, and everybody has had time to do something more.
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

    /// No promise was broken, and nothing of ours lies about but what an active image is made of.
    pub fn is_tidy(&self) {
        let world = self.world.lock();
        assert_eq!(world.violations, BTreeSet::new());
        assert_eq!(world.ceph.at_once.orphans, BTreeSet::new());
        for image in world.ceph.images.iter().filter(|image| image.ours) {
            let name = image.name.clone().unwrap_or_default();
            let location = format!("rbd://{FSID}/images/{name}/snap");
            let serves = world.cloud.images.get(&name).is_some_and(|record| record.locations.contains(&location));
            assert!(serves, "left behind: {}/{name}", image.pool);
            assert!(!image.metadata.contains_key(MARK), "{name} bears our mark");
        }
        let snapshots = world.ceph.images.iter().filter(|image| !image.ours).flat_map(|image| &image.snaps);
        assert_eq!(snapshots.filter(|snap| snap.ours).count(), 0, "a snapshot is left");
    }
}

/// Runs a test in a time that costs nothing.
pub(super) fn play<F: Future<Output = ()>>(test: impl FnOnce() -> F) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    runtime.block_on(async { test().await });
}

/// A tag that is changed at any of these moments of the copy is a request of its own.
#[test]
fn a_tag_that_changes_while_the_job_runs_is_another_request() {
    for (moment, told) in [
        (&["create snapshot"][..], false),
        (&["create snapshot"], true),
        (&["compare"], false),
        (&["rename", "images/rbd-offload."], false),
        (&["glance patch", "Remove"], false),
    ] {
        play(|| async move {
            let stage = Stage::new();
            stage.before(moment, stage.other_tag());
            let _daemon = stage.daemon("node", "clone");
            stage.ask().await;
            if told {
                sleep(Duration::from_millis(500)).await;
                stage.ask().await;
            }
            let job = stage.end().await;
            assert_eq!((job.state, job.source), (State::Done, Some(Source::Volume(stage.volumes[1]))), "{moment:?}");
            assert_eq!(stage.image().image.status, "active");
            assert_eq!(stage.image().image.tags, [Source::Volume(stage.volumes[1]).tag(), "mine".into()]);
            assert_eq!(stage.published(), Some((stage.content_of(1), false)), "{moment:?}");
            stage.is_tidy();
        });
    }
}

#[test]
fn a_tag_that_changes_after_the_location_was_posted_is_put_back() {
    play(|| async {
        let stage = Stage::new();
        let (image, other) = (stage.image, Source::Volume(stage.volumes[1]).tag());
        stage.before(
            &["glance add location"],
            Stage::change_image(image, move |record| {
                record.image.tags = vec![other, "mine".into()];
            }),
        );
        let _daemon = stage.daemon("node", "clone");
        stage.ask().await;
        let job = stage.end().await;
        assert_eq!((job.state, job.source), (State::Done, Some(Source::Volume(stage.volumes[0]))));
        assert_eq!(stage.image().image.tags, ["mine".into(), Source::Volume(stage.volumes[0]).tag()]);
        assert_eq!(stage.published(), Some((stage.content_of(0), false)));
        stage.is_tidy();
    });
}

#[test]
fn a_request_whose_tag_is_taken_off_is_withdrawn() {
    for moment in [&["create snapshot"][..], &["glance patch", "Remove"]] {
        play(|| async move {
            let stage = Stage::new();
            let image = stage.image;
            stage.before(moment, Stage::change_image(image, |record| record.image.tags = vec!["mine".into()]));
            let _daemon = stage.daemon("node", "clone");
            stage.ask().await;
            let job = stage.end().await;
            assert_eq!(job.state, State::Cancelled, "{job:#?}");
            assert_eq!(stage.image().image.status, "queued");
            assert_eq!(stage.published(), None);
            stage.is_tidy();
        });
    }
}

#[test]
fn who_owns_the_source_counts_when_its_snapshot_exists() {
    for transferred in [true, false] {
        play(|| async move {
            let stage = Stage::new();
            let volume = stage.volumes[0];
            stage.before(&["create snapshot"], move |world| {
                let disk = world.cloud.disks.get_mut(&volume.to_string()).unwrap();
                if transferred {
                    disk.volume.project_id = OTHER.into();
                } else {
                    disk.volume.status = "retyping".into();
                }
            });
            let _daemon = stage.daemon("node", "clone");
            stage.ask().await;
            let job = stage.end().await;
            assert_eq!(job.state, State::Declined, "{job:#?}");
            let properties = stage.image().image.properties;
            let message = &properties["rbd_offload_message"];
            assert_eq!(message.contains("there is no volume"), transferred, "{message}");
            assert_eq!(stage.published(), None);
            stage.is_tidy();
        });
    }
}

#[test]
fn a_tag_that_is_set_while_a_declined_job_is_cleaned_up_is_a_new_request() {
    play(|| async {
        let stage = Stage::new();
        let volume = stage.volumes[0];
        let (mut declined, mut other) = (false, Some(stage.other_tag()));
        stage.world.lock().script = Some(Box::new(move |world, call| {
            if call.contains("create snapshot") && !std::mem::replace(&mut declined, true) {
                world.cloud.disks.get_mut(&volume.to_string()).unwrap().volume.project_id = OTHER.into();
            }
            if call.contains("remove snapshot")
                && let Some(other) = other.take()
            {
                other(world);
            }
        }));
        let _daemon = stage.daemon("node", "clone");
        stage.ask().await;
        let job = stage.end().await;
        assert_eq!((job.state, job.source), (State::Done, Some(Source::Volume(stage.volumes[1]))), "{job:#?}");
        assert_eq!(stage.published(), Some((stage.content_of(1), false)));
        stage.is_tidy();
    });
}

#[test]
fn an_image_that_is_given_away_during_the_copy_gets_nothing() {
    for moment in [&["flattened"][..], &["glance patch", "Remove"]] {
        play(|| async move {
            let stage = Stage::new();
            let image = stage.image;
            stage.before(moment, Stage::change_image(image, |record| record.image.owner = Some(OTHER.into())));
            let _daemon = stage.daemon("node", "clone");
            stage.ask().await;
            let job = stage.end().await;
            assert_eq!(job.state, State::Declined, "{job:#?}");
            assert_eq!((stage.image().image.status.as_str(), stage.published()), ("queued", None));
            stage.is_tidy();
        });
    }
}

#[test]
fn an_image_that_is_active_by_other_bytes_is_another_writers() {
    for (location, size) in [("file:///glance/x", 1 << 30), ("file:///glance/x", 5), ("", 1 << 30)] {
        play(|| async move {
            let stage = Stage::new();
            let image = stage.image;
            let location = match location {
                // of a tenant's own image
                "" => format!("rbd://{FSID}/images/{}/snap", Uuid::nil()),
                other => other.to_owned(),
            };
            stage.before(
                &["glance add location"],
                Stage::change_image(image, move |record| {
                    record.image.status = "active".into();
                    record.image.size = Some(size);
                    record.locations = vec![location];
                }),
            );
            let _daemon = stage.daemon("node", "clone");
            stage.ask().await;
            let job = stage.end().await;
            assert_eq!(job.state, State::Declined, "{job:#?}");
            assert_eq!(stage.image().image.status, "active");
            assert_eq!(stage.published(), None, "our RBD image is taken away");
            stage.is_tidy();
        });
    }
}

#[test]
fn an_import_that_began_before_our_location_was_posted_is_another_writers() {
    for moment in [&["rename", "images/rbd-offload."][..], &["glance add location"]] {
        play(|| async move {
            let stage = Stage::new();
            let image = stage.image;
            stage.before(
                moment,
                Stage::change_image(image, |record| {
                    record.image.status = "importing".into();
                    record.image.properties.insert(TASK.into(), "theirs".into());
                    let task = ImageTask {
                        id: "theirs".into(),
                        kind: "api_image_import".into(),
                        status: "processing".into(),
                        message: String::new(),
                    };
                    record.tasks.insert(0, task);
                }),
            );
            let _daemon = stage.daemon("node", "clone");
            stage.ask().await;
            let began = Instant::now();
            while stage.job().is_none_or(|job| job.state != State::Declined) {
                sleep(Duration::from_secs(1)).await;
                assert!(
                    began.elapsed() < Duration::from_secs(120),
                    "nothing of ours is waited for: {:#?}",
                    stage.job()
                );
            }
            assert_eq!(stage.published(), None);
            stage.is_tidy();
        });
    }
}

#[test]
fn an_image_whose_format_changes_after_the_inspection_is_deactivated() {
    play(|| async {
        let stage = Stage::new();
        let image = stage.image;
        stage.before(
            &["glance add location"],
            Stage::change_image(image, |record| {
                record.image.disk_format = Some("vmdk".into());
            }),
        );
        let _daemon = stage.daemon("node", "clone");
        stage.ask().await;
        let job = stage.end().await;
        assert_eq!(job.state, State::Failed, "{job:#?}");
        assert!(job.reason.as_ref().unwrap().contains("vmdk/bare"), "{job:#?}");
        assert_eq!(stage.image().image.status, "deactivated");
        // a task of Glance saves what it read before
        Stage::change_image(image, |record| record.image.status = "active".into())(&mut stage.world.lock());
        sleep(Duration::from_secs(200)).await;
        assert_eq!(stage.image().image.status, "deactivated");
        assert_eq!(stage.published(), Some((stage.content_of(0), false)), "its data are an image's");
        stage.is_tidy();
    });
}

/// Spoils the copy before each of the first so many comparisons, and notes the extent of each.
fn spoil(stage: &Stage, copies: usize) -> Arc<Mutex<Vec<String>>> {
    let seen: Arc<Mutex<Vec<String>>> = Arc::default();
    let (name, noted, count) = (format!("rbd-offload.{}", stage.image), Arc::clone(&seen), AtomicUsize::new(0));
    stage.world.lock().script = Some(Box::new(move |world, call| {
        let Some(extent) = call.strip_prefix("compare ") else { return };
        noted.lock().unwrap().push(extent.split(' ').next().unwrap().to_owned());
        if count.fetch_add(1, Ordering::SeqCst) < copies
            && let Some(copy) = world.ceph.images.iter_mut().find(|image| image.name.as_ref() == Some(&name))
        {
            copy.content = 0;
        }
    }));
    seen
}

#[test]
fn a_copy_that_differs_is_made_by_another_method_and_compared_in_full() {
    play(|| async {
        let stage = Stage::new();
        let seen = spoil(&stage, 1);
        let _daemon = stage.daemon("node", "clone");
        stage.ask().await;
        let job = stage.end().await;
        assert_eq!((job.state, &job.mismatched[..]), (State::Done, &[Method::Clone][..]), "{job:#?}");
        assert_ne!(job.method, Some(Method::Clone));
        assert!(job.fallback.as_ref().unwrap().contains("differed"), "{job:#?}");
        assert_eq!(*seen.lock().unwrap(), ["Sample", "Full"]);
        assert_eq!(stage.published(), Some((stage.content_of(0), false)));
        stage.is_tidy();
    });
}

#[test]
fn a_second_copy_that_differs_fails_the_job() {
    play(|| async {
        let stage = Stage::new();
        let seen = spoil(&stage, 2);
        let _daemon = stage.daemon("node", "clone");
        stage.ask().await;
        let job = stage.end().await;
        assert_eq!((job.state, job.mismatched.len()), (State::Failed, 2), "{job:#?}");
        assert!(job.reason.as_ref().unwrap().contains("two copies differed"), "{job:#?}");
        assert_eq!(*seen.lock().unwrap(), ["Sample", "Full"]);
        assert_eq!(stage.published(), None);
        stage.is_tidy();
    });
}

#[test]
fn a_daemon_that_takes_over_knows_of_the_copy_that_differed() {
    play(|| async {
        let stage = Stage::new();
        let (name, dead) = (format!("rbd-offload.{}", stage.image), Arc::new(AtomicBool::new(false)));
        let first = stage.daemon("first", "clone");
        let seen: Arc<Mutex<Vec<String>>> = Arc::default();
        let (noted, node, killed) = (Arc::clone(&seen), Arc::clone(&first.node), Arc::clone(&dead));
        let mut spoiled = false;
        stage.world.lock().script = Some(Box::new(move |world, call| {
            if call.starts_with("remove images/rbd-offload.") && spoiled {
                killed.store(true, Ordering::SeqCst);
            }
            let Some(extent) = call.strip_prefix("compare ") else { return };
            noted.lock().unwrap().push(extent.split(' ').next().unwrap().to_owned());
            if !std::mem::replace(&mut spoiled, true)
                && let Some(copy) = world.ceph.images.iter_mut().find(|image| image.name.as_ref() == Some(&name))
            {
                copy.content = 0;
            }
        }));
        stage.ask().await;
        while !dead.load(Ordering::SeqCst) {
            sleep(Duration::from_millis(1)).await;
        }
        node.kill();
        let _second = stage.daemon("second", "clone");
        let job = stage.end().await;
        assert_eq!((job.state, &job.mismatched[..]), (State::Done, &[Method::Clone][..]), "{job:#?}");
        assert_ne!(job.method, Some(Method::Clone));
        assert_eq!(*seen.lock().unwrap(), ["Sample", "Full"]);
        stage.is_tidy();
    });
}

#[test]
fn a_forged_notification_changes_nothing_on_a_record_without_a_tag() {
    for status in [None, Some("declined")] {
        play(|| async move {
            let stage = Stage::new();
            let (image, forged) = (stage.image, stage.image().image.tags);
            Stage::change_image(image, |record| {
                record.image.tags = vec!["mine".into()];
                if let Some(status) = status {
                    record.image.properties.insert("rbd_offload_status".into(), status.into());
                    record.image.properties.insert("rbd_offload_message".into(), "an earlier request".into());
                }
            })(&mut stage.world.lock());
            let before = stage.image().image;
            let daemon = stage.daemon("node", "clone");
            daemon.intake.image_queued(image, Some(OWNER.into()), &forged).await.unwrap();
            let job = stage.end().await;
            assert!(job.state.is_ended() && job.state != State::Done, "{job:#?}");
            assert_eq!(stage.image().image, before);
            stage.is_tidy();
        });
    }
}

#[test]
fn an_announced_upload_counts_by_the_offer_on_the_record_alone() {
    for offered in [false, true] {
        play(|| async move {
            let stage = Stage::new();
            let (image, volume) = (stage.image, stage.volumes[0]);
            Stage::change_image(image, |record| {
                record.image.tags = match offered {
                    true => vec![format!("rbd-offload-handover:volume:{volume}@{FSID}")],
                    false => vec!["mine".into()],
                };
            })(&mut stage.world.lock());
            let before = stage.image().image;
            let daemon = stage.daemon("node", "clone");
            let event = Event::VolumeUpload { image_id: image };
            let meta =
                Meta { event_type: EventType::VolumeUploadStart, message_id: None, exchange: "openstack".into() };
            daemon.intake.accept(event, meta).await.unwrap();
            assert_eq!(stage.job().is_some(), offered);
            if !offered {
                sleep(Duration::from_secs(200)).await;
                assert_eq!((stage.job(), stage.image().image), (None, before));
            }
        });
    }
}

#[test]
fn a_job_is_left_to_the_daemon_that_has_its_backend() {
    for other_lives in [true, false] {
        play(|| async move {
            let stage = Stage::new();
            let mut lacking = config("clone");
            lacking.backends.clear();
            // nobody asks for it before the daemon that lacks the backend is there
            let tags = stage.image().image.tags;
            Stage::change_image(stage.image, |record| record.image.tags.clear())(&mut stage.world.lock());
            let other = if other_lives { Some(stage.daemon("other", "clone")) } else { None };
            sleep(Duration::from_secs(5)).await;
            // it is not there for a while, but has not been gone for long
            if let Some(other) = other {
                other.node.kill();
            }
            let _daemon = Daemon::start(&stage.world, "lacking".into(), lacking);
            Stage::change_image(stage.image, |record| record.image.tags = tags)(&mut stage.world.lock());
            stage.ask().await;
            sleep(Duration::from_secs(120)).await;
            if other_lives {
                let job = stage.job().unwrap();
                assert_eq!((job.state, job.needs_backend.as_deref()), (State::Accepted, Some("ceph")), "{job:#?}");
                let _other = stage.daemon("other again", "clone");
                sleep(Duration::from_secs(20)).await;
                let job = stage.job().unwrap();
                assert_ne!(job.state, State::Accepted, "begun at once, though the other waits: {job:#?}");
            }
            let job = stage.end().await;
            let expected = if other_lives { (State::Done, None) } else { (State::Declined, Some(())) };
            assert_eq!((job.state, job.reason.as_ref().map(drop)), expected, "{job:#?}");
            stage.is_tidy();
        });
    }
}

#[test]
fn an_error_of_the_index_after_the_end_leaves_the_reason() {
    play(|| async {
        let stage = Stage::new();
        let (world, volume) = (stage.world.clone(), stage.volumes[0]);
        stage.world.lock().cloud.disks.get_mut(&volume.to_string()).unwrap().volume.status = "error".into();
        stage.before(&["set omap index.ended"], move |now| {
            // the index stays out of reach for a while
            now.faults.before = 10_000;
            tokio::spawn(async move {
                sleep(Duration::from_secs(20)).await;
                world.lock().faults.before = 0;
            });
            now.ceph.objects.remove("index.ended");
        });
        let _daemon = stage.daemon("node", "clone");
        stage.ask().await;
        let job = stage.end().await;
        assert_eq!(job.state, State::Declined);
        assert!(job.reason.as_ref().unwrap().contains("is error: it must be available"), "{job:#?}");
        stage.is_tidy();
    });
}

#[test]
fn a_cancelled_request_that_was_made_again_stays_cancelled() {
    play(|| async {
        let stage = Stage::new();
        let (image, volume) = (stage.image, stage.volumes[0].to_string());
        let busy = |status: &str| {
            stage.world.lock().cloud.disks.get_mut(&volume).unwrap().volume.status = status.into();
        };
        busy("error");
        let first = stage.daemon("first", "clone");
        stage.ask().await;
        assert_eq!(stage.end().await.state, State::Declined);
        first.node.kill();
        // the tenant asks again, no daemon is there, and the operator cancels that
        busy("available");
        let tag = Source::Volume(stage.volumes[0]).tag();
        Stage::change_image(image, |record| record.image.tags.push(tag))(&mut stage.world.lock());
        stage.ask().await;
        assert!(stage.stored().unwrap().signals.has(Signal::Rerequested));
        assert_eq!(stage.store.cancel(image).await.unwrap(), Some(Cancelled::TagRequest));
        let _second = stage.daemon("second", "clone");
        let job = stage.end().await;
        assert_eq!((job.state, stage.stored().unwrap().signals), (State::Declined, Signals::default()), "{job:#?}");
        let record = stage.image().image;
        assert_eq!((record.status.as_str(), &record.tags[..]), ("queued", &["mine".to_owned()][..]));
        assert!(record.properties["rbd_offload_message"].contains("cancelled by the operator"), "{record:#?}");
        assert_eq!(stage.published(), None);
        stage.is_tidy();
    });
}

#[test]
fn a_request_that_comes_while_the_daemon_looks_for_one_is_not_lost() {
    play(|| async {
        let stage = Stage::new();
        let (image, tag) = (stage.image, Source::Volume(stage.volumes[0]).tag());
        stage.world.lock().cloud.disks.get_mut(&stage.volumes[0].to_string()).unwrap().volume.status = "error".into();
        let _daemon = stage.daemon("node", "clone");
        stage.ask().await;
        assert_eq!(stage.end().await.state, State::Declined);
        // the daemon has read a record without a tag, and is about to write that nothing was asked for
        let volume = stage.volumes[0].to_string();
        stage.before(&["replace job.", "signal.rerequested"], move |world| {
            world.cloud.disks.get_mut(&volume).unwrap().volume.status = "available".into();
            world.cloud.images.get_mut(&image.to_string()).unwrap().image.tags.push(tag);
            let version = world.ceph.next();
            let object = world.ceph.objects.get_mut(&Store::object(image)).unwrap();
            object.omap.insert("signal.rerequested".into(), b"sent again".to_vec());
            object.version = version;
        });
        stage.store.signal(image, |_| vec![Signal::Rerequested]).await.unwrap();
        stage.world.lock().ceph.objects.get_mut("index.live").unwrap().omap.insert(image.to_string(), b"{}".to_vec());
        let begun = Instant::now();
        while stage.job().is_none_or(|job| job.state != State::Done) {
            sleep(Duration::from_millis(100)).await;
            assert!(begun.elapsed() < Duration::from_secs(30), "before the reconciler's round: {:#?}", stage.stored());
        }
        stage.is_tidy();
    });
}

#[test]
fn a_signal_to_a_job_that_has_just_ended_is_not_left_behind() {
    play(|| async {
        let stage = Stage::new();
        let image = stage.image;
        stage.ask().await;
        stage.before(&["change keys job."], move |world| {
            let version = world.ceph.next();
            let object = world.ceph.objects.get_mut(&Store::object(image)).unwrap();
            let mut record = Record::parse(&object.data).unwrap();
            record.enter(State::Failed, jiff::Timestamp::now()).unwrap();
            (object.data, object.version) = (record.to_bytes(), version);
        });
        assert_eq!(stage.store.cancel(image).await.unwrap(), Some(Cancelled::Ended(State::Failed)));
        assert_eq!(stage.stored().unwrap().signals, Signals::default());
    });
}

#[test]
fn a_record_with_a_signal_is_not_removed_unread() {
    play(|| async {
        let stage = Stage::new();
        stage.ask().await;
        let stored = stage.store.load(stage.image).await.unwrap().unwrap();
        stage.store.signal(stage.image, |_| vec![Signal::Rerequested]).await.unwrap();
        assert!(stage.store.remove(&stored).await.is_err());
        assert!(stage.stored().unwrap().signals.has(Signal::Rerequested));
    });
}

#[test]
fn retry_after_a_cancel_goes_by_the_request_that_was_taken_off() {
    play(|| async {
        let stage = Stage::new();
        let image = stage.image;
        let first = stage.daemon("first", "clone");
        let changed = Arc::new(AtomicBool::new(false));
        let (other, seen) = (stage.other_tag(), Arc::clone(&changed));
        stage.before(&["create snapshot"], move |world| {
            other(world);
            seen.store(true, Ordering::SeqCst);
        });
        stage.ask().await;
        while !changed.load(Ordering::SeqCst) {
            sleep(Duration::from_millis(1)).await;
        }
        assert_eq!(stage.store.cancel(image).await.unwrap(), Some(Cancelled::TagRequest));
        assert_eq!(stage.end().await.state, State::Cancelled);
        assert_eq!(stage.image().image.tags, ["mine"]);
        assert_eq!(stage.store.retry(image).await.unwrap(), Some(crate::job::store::Retried::Restarted));
        let job = stage.end().await;
        assert_eq!((job.state, job.source), (State::Done, Some(Source::Volume(stage.volumes[1]))), "{job:#?}");
        assert_eq!(stage.published(), Some((stage.content_of(1), false)));
        stage.is_tidy();
        drop(first);
    });
}

#[test]
fn a_late_status_on_a_finished_image_is_taken_off() {
    play(|| async {
        let stage = Stage::new();
        let image = stage.image;
        let daemon = stage.daemon("node", "clone");
        stage.ask().await;
        assert_eq!(stage.end().await.state, State::Done);
        Stage::change_image(image, |record| {
            record.image.properties.insert("rbd_offload_status".into(), "copying".into());
        })(&mut stage.world.lock());
        // what Glance's notification of that change says
        daemon.intake.image_active(image).await.unwrap();
        sleep(Duration::from_secs(200)).await;
        assert_eq!(stage.image().image.properties.get("rbd_offload_status"), None);
        stage.is_tidy();
    });
}

#[test]
fn what_is_too_much_to_inherit_is_declined_before_anything_is_made() {
    play(|| async {
        let stage = Stage::new();
        let volume = stage.volumes[0].to_string();
        let fat = (0..20).map(|n| (format!("pad{n}"), "x".repeat(60_000))).collect();
        stage.world.lock().cloud.disks.get_mut(&volume).unwrap().volume.image_metadata = fat;
        let made = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&made);
        stage.before(&["create snapshot"], move |_| seen.store(true, Ordering::SeqCst));
        let _daemon = stage.daemon("node", "clone");
        stage.ask().await;
        let job = stage.end().await;
        assert_eq!(job.state, State::Declined, "{job:#?}");
        assert!(job.reason.as_ref().unwrap().contains("image metadata"), "{:?}", Decline::Properties);
        assert!(!made.load(Ordering::SeqCst), "nothing is made for it");
        stage.is_tidy();
    });
}

#[test]
fn a_job_runs_and_ends_where_glance_protects_its_status() {
    for other_owner in [false, true] {
        play(|| async {
            let stage = Stage::new();
            let image = stage.image;
            let volume = stage.volumes[0].to_string();
            {
                let mut world = stage.world.lock();
                world.cloud.protected = Some("rbd_offload_");
                if other_owner {
                    world.cloud.disks.get_mut(&volume).unwrap().volume.project_id = OTHER.into();
                }
                // from before the protection: what can be neither changed nor removed
                Stage::change_image(image, |record| {
                    record.image.properties.insert("rbd_offload_progress".into(), "7".into());
                })(&mut world);
            }
            let _daemon = stage.daemon("node", "clone");
            stage.ask().await;
            let job = stage.end().await;
            let record = stage.image();
            assert_eq!(record.image.properties.get("rbd_offload_status"), None);
            if other_owner {
                assert_eq!(job.state, State::Declined, "{job:#?}");
                assert_eq!(record.image.tags, ["mine"], "it can be asked again");
            } else {
                assert_eq!(job.state, State::Done, "{job:#?}");
                assert_eq!(stage.published(), Some((stage.content_of(0), false)));
            }
            stage.is_tidy();
        });
    }
}
