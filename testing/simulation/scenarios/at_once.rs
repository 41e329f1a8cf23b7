//! One image that is published at once, and what happens to it, its source and its daemons at each call.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::time::sleep;

use super::one_image::{OneImage, config};
use super::{publish_at_once, run_in_virtual_time};
use crate::ceph::Features;
use crate::job::record::{Publish, Record, State};
use crate::job::simulation::actors::daemon::Daemon;
use crate::job::simulation::actors::{cinder, glance};
use crate::job::simulation::faults::world::World;
use crate::job::simulation::state::cluster::FSID;
use crate::job::simulation::state::glance::ImageRecord;
use crate::job::store::Cancelled;
use crate::request::{COPYING_TAG, Source};

fn stage() -> OneImage {
    let stage = OneImage::new();
    stage.world.lock().ceph.at_once.is_asked_for = true;
    stage
}

fn daemon(stage: &OneImage, name: &str) -> Daemon {
    let mut config = config("auto");
    publish_at_once(&mut config);
    Daemon::start(&stage.world, name.into(), config)
}

/// Whether the image is active, whole, and depends on nothing.
fn is_whole(stage: &OneImage) {
    let content = stage.content_of(0);
    assert_eq!(stage.published(), Some((content, false)));
    let world = stage.world.lock();
    let rbd = world.ceph.named("images", &stage.image.to_string()).unwrap();
    assert_eq!((&rbd.parent, rbd.features), (&None, Features::PUBLISHED.0));
    let record = &world.cloud.images[&stage.image.to_string()];
    assert_eq!(record.image.status, "active");
    assert!(!record.image.tags.iter().any(|tag| tag == COPYING_TAG), "{:?}", record.image.tags);
}

/// The states that the job's record was in, one after the other.
fn watch_states(stage: &OneImage) -> Arc<Mutex<Vec<State>>> {
    let states: Arc<Mutex<Vec<State>>> = Arc::default();
    let (seen, name) = (Arc::clone(&states), format!("job.{}", stage.image));
    stage.world.lock().script = Some(Box::new(move |world, _| {
        let record = world.ceph.objects.get(&name).and_then(|object| Record::parse(&object.data).ok());
        let mut seen = seen.lock().unwrap();
        if let Some(record) = record.filter(|record| seen.last() != Some(&record.state)) {
            seen.push(record.state);
        }
    }));
    states
}

#[test]
fn a_record_that_grows_too_large_keeps_no_job_behind_its_image() {
    run_in_virtual_time(async {
        let stage = stage();
        let pad = |record: &mut ImageRecord| {
            record.image.properties.insert("pad".into(), "x".repeat(17 * 1024 * 1024));
        };
        stage.before(&["remove metadata"], OneImage::change_image(stage.image, pad));
        let _daemon = daemon(&stage, "one");
        stage.ask().await;
        let job = stage.end().await;
        assert_eq!(job.state, State::Done, "{job:#?}");
        let slim = |record: &mut ImageRecord| drop(record.image.properties.remove("pad"));
        OneImage::change_image(stage.image, slim)(&mut stage.world.lock());
        sleep(Duration::from_secs(600)).await;
        is_whole(&stage);
        stage.is_tidy();
    });
}

#[test]
fn an_image_is_active_before_it_is_copied_and_depends_on_nothing_in_the_end() {
    run_in_virtual_time(async {
        let stage = stage();
        let states = watch_states(&stage);
        let _daemon = daemon(&stage, "one");
        stage.ask().await;
        assert_eq!(stage.end().await.state, State::Done);
        is_whole(&stage);
        stage.is_tidy();
        let states = states.lock().unwrap().clone();
        assert_eq!(states, [State::Accepted, State::Publishing, State::Detaching, State::Done]);
    });
}

/// Changes the world at one call after the other, and sees that the job ends well each time.
fn at_every_call(change: fn(&mut World, &OneImage, &Daemon)) {
    for number in 0.. {
        let happened = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&happened);
        run_in_virtual_time(async move {
            let stage = Arc::new(stage());
            let (first, _second) = (Arc::new(daemon(&stage, "one")), daemon(&stage, "two"));
            stage.ask().await;
            let (count, on_stage, changed) = (AtomicUsize::new(0), Arc::clone(&stage), Arc::clone(&seen));
            let daemon = Arc::clone(&first);
            stage.world.lock().script = Some(Box::new(move |world, call| {
                // a look at the index concerns no job
                let counts = !call.starts_with("omap index") && count.fetch_add(1, Ordering::SeqCst) == number;
                if counts && !changed.swap(true, Ordering::SeqCst) {
                    world.log(|| format!("the script, before: {call}"));
                    change(world, &on_stage, &daemon);
                }
            }));
            let job = stage.end().await;
            stage.is_tidy();
            if stage.world.lock().cloud.images.get(&stage.image.to_string()).is_some_and(|i| i.image.status == "active")
            {
                assert_eq!(job.state, State::Done, "call {number}: {job:#?}");
                let world = stage.world.lock();
                let rbd = world.ceph.named("images", &stage.image.to_string()).unwrap();
                assert_eq!((&rbd.parent, rbd.features), (&None, Features::PUBLISHED.0), "call {number}");
            }
            stage.world.lock().script = None;
        });
        if !happened.load(Ordering::SeqCst) {
            assert!(number > 50, "{number}");
            return;
        }
        // the rest of the calls are those of idle daemons
        if number > 160 {
            return;
        }
    }
}

#[test]
fn an_image_may_be_deleted_at_any_call() {
    at_every_call(|world, stage, _| {
        glance::delete_image(world, &stage.image.to_string());
    });
}

#[test]
fn the_source_may_be_deleted_at_any_call() {
    at_every_call(|world, stage, _| cinder::delete_volume(world, &stage.volumes[0].to_string()));
}

#[test]
fn a_daemon_may_die_at_any_call() {
    at_every_call(|_, _, daemon| {
        let node = Arc::clone(&daemon.node);
        tokio::spawn(async move { node.kill() });
    });
}

#[test]
fn a_job_behind_an_active_image_is_not_cancelled() {
    run_in_virtual_time(async {
        let stage = stage();
        let store = stage.store.clone();
        let image = stage.image;
        let answer = Arc::new(Mutex::new(None));
        let said = Arc::clone(&answer);
        stage.before(&["fill object 1"], move |_| {
            tokio::spawn(async move {
                let cancelled = store.cancel(image).await;
                *said.lock().unwrap() = Some(cancelled.unwrap());
            });
        });
        let _daemon = daemon(&stage, "one");
        stage.ask().await;
        assert_eq!(stage.end().await.state, State::Done);
        assert_eq!(*answer.lock().unwrap(), Some(Some(Cancelled::Active)));
        is_whole(&stage);
        stage.is_tidy();
    });
}

#[test]
fn the_record_of_an_active_image_is_made_again_when_it_is_lost() {
    for call in ["fill object 0", "cut the parent off", "switch the maps", "compare"] {
        run_in_virtual_time(async move {
            let stage = stage();
            let name = format!("job.{}", stage.image);
            let gone = name.clone();
            let words: &'static [&'static str] = Box::leak(Box::new([call]));
            stage.before(words, move |world| {
                world.ceph.objects.remove(&gone);
                let image = gone.trim_start_matches("job.");
                world.ceph.objects.get_mut("index.live").unwrap().omap.remove(image);
            });
            let _daemon = daemon(&stage, "one");
            stage.ask().await;
            let job = stage.end().await;
            assert_eq!(job.state, State::Done, "{call}");
            assert_eq!(job.source, Some(Source::Volume(stage.volumes[0])));
            is_whole(&stage);
            stage.is_tidy();
        });
    }
}

#[test]
fn where_glance_cannot_read_the_source_the_job_publishes_when_copied() {
    run_in_virtual_time(async {
        let stage = stage();
        stage.world.lock().ceph.at_once.is_refused = true;
        let posted = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&posted);
        stage.world.lock().script = Some(Box::new(move |_, call| {
            if call.starts_with("glance add location") {
                count.fetch_add(1, Ordering::SeqCst);
            }
        }));
        let _daemon = daemon(&stage, "one");
        stage.ask().await;
        let job = stage.end().await;
        assert_eq!((job.state, job.publish), (State::Done, Publish::WhenCopied));
        assert!(job.fallback.is_some_and(|note| note.contains("at-once: Glance refused the location")));
        assert_eq!(posted.load(Ordering::SeqCst), 2);
        is_whole(&stage);
        stage.is_tidy();
    });
}

/// Glance may fail a task after it has made the image active. What is published is then an active image's data.
#[test]
fn an_image_that_is_active_though_its_task_failed_keeps_its_data() {
    run_in_virtual_time(async {
        let stage = stage();
        stage.world.lock().ceph.at_once.is_refused = true;
        let id = stage.image.to_string();
        stage.world.lock().script = Some(Box::new(move |world, call| {
            let Some(record) = world.cloud.images.get_mut(&id) else { return };
            let has_failed = record.tasks.iter().any(|task| task.status == "failure");
            if has_failed && record.image.status == "queued" && call.starts_with("glance tasks") {
                record.image.status = "active".into();
                record.locations.push(format!("rbd://{FSID}/images/{id}/snap"));
            }
        }));
        let _daemon = daemon(&stage, "one");
        stage.ask().await;
        let job = stage.end().await;
        assert_eq!((job.state, job.publish), (State::Done, Publish::AtOnce));
        is_whole(&stage);
        stage.is_tidy();
    });
}
