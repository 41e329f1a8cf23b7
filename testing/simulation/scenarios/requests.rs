//! Requests at one exact moment: forged, made again, cancelled, left to another daemon.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::one_image::{OWNER, OneImage, config};
use super::run_in_virtual_time;
use crate::job::record::{Record, State};
use crate::job::signal::{Signal, Signals};
use crate::job::simulation::actors::daemon::Daemon;
use crate::job::simulation::state::cluster::FSID;
use crate::job::store::{Cancelled, Retried, Store};
use crate::notification::{Event, EventType, Meta, Sink};
use crate::request::Source;

#[test]
fn a_forged_notification_changes_nothing_on_a_record_without_a_tag() {
    for status in [None, Some("declined")] {
        run_in_virtual_time(async move {
            let stage = OneImage::new();
            let (image, forged) = (stage.image, stage.image().image.tags);
            OneImage::change_image(image, |record| {
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
        run_in_virtual_time(async move {
            let stage = OneImage::new();
            let (image, volume) = (stage.image, stage.volumes[0]);
            OneImage::change_image(image, |record| {
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
        run_in_virtual_time(async move {
            let stage = OneImage::new();
            let mut lacking = config("clone");
            lacking.backends.clear();
            // the image has no request tag before the daemon that lacks the backend is there
            let tags = stage.image().image.tags;
            OneImage::change_image(stage.image, |record| record.image.tags.clear())(&mut stage.world.lock());
            let other = if other_lives { Some(stage.daemon("other", "clone")) } else { None };
            sleep(Duration::from_secs(5)).await;
            // it is not there for a while, but has not been gone for long
            if let Some(other) = other {
                other.node.kill();
            }
            let _daemon = Daemon::start(&stage.world, "lacking".into(), lacking);
            OneImage::change_image(stage.image, |record| record.image.tags = tags)(&mut stage.world.lock());
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
    run_in_virtual_time(async {
        let stage = OneImage::new();
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
    run_in_virtual_time(async {
        let stage = OneImage::new();
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
        OneImage::change_image(image, |record| record.image.tags.push(tag))(&mut stage.world.lock());
        stage.ask().await;
        assert!(stage.stored().unwrap().signals.has(Signal::Rerequested));
        assert_eq!(stage.store.cancel(image).await.unwrap(), Some(Cancelled::Signalled));
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
    run_in_virtual_time(async {
        let stage = OneImage::new();
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
        stage.world.lock().ceph.set_keys("index.live", &[(image.to_string(), b"{}".to_vec())]);
        let begun = Instant::now();
        while stage.job().is_none_or(|job| job.state == State::Declined) {
            sleep(Duration::from_millis(100)).await;
            assert!(begun.elapsed() < Duration::from_secs(20), "before the reconciler's round: {:#?}", stage.stored());
        }
        assert_eq!(stage.end().await.state, State::Done);
        stage.is_tidy();
    });
}

#[test]
fn a_signal_to_a_job_that_has_just_ended_is_not_left_behind() {
    run_in_virtual_time(async {
        let stage = OneImage::new();
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
    run_in_virtual_time(async {
        let stage = OneImage::new();
        stage.ask().await;
        let stored = stage.store.load(stage.image).await.unwrap().unwrap();
        stage.store.signal(stage.image, |_| vec![Signal::Rerequested]).await.unwrap();
        assert!(stage.store.remove(&stored).await.is_err());
        assert!(stage.stored().unwrap().signals.has(Signal::Rerequested));
    });
}

#[test]
fn retry_after_a_cancel_goes_by_the_request_that_was_taken_off() {
    run_in_virtual_time(async {
        let stage = OneImage::new();
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
        assert_eq!(stage.store.cancel(image).await.unwrap(), Some(Cancelled::Signalled));
        assert_eq!(stage.end().await.state, State::Cancelled);
        assert_eq!(stage.image().image.tags, ["mine"]);
        assert_eq!(stage.store.retry(image).await.unwrap(), Some(Retried::Restarted));
        let job = stage.end().await;
        assert_eq!((job.state, job.source), (State::Done, Some(Source::Volume(stage.volumes[1]))), "{job:#?}");
        assert_eq!(stage.published(), Some((stage.content_of(1), false)));
        stage.is_tidy();
        drop(first);
    });
}

#[test]
fn a_dry_run_is_done_once_and_the_request_is_done_when_it_is_over() {
    run_in_virtual_time(async {
        let stage = OneImage::new();
        let before = stage.image().image;
        let mut dry = config("clone");
        dry.offload.dry_run = true;
        let daemon = Daemon::start(&stage.world, "dry".into(), dry);
        let found = stage.end().await;
        assert!(found.was_dry_run_of(Source::Volume(stage.volumes[0])), "{found:#?}");
        // the reconciler sees the tag in each of its rounds
        sleep(Duration::from_secs(3600)).await;
        assert_eq!((stage.job(), stage.image().image), (Some(found), before));
        stage.is_tidy();
        daemon.node.kill();
        let _daemon = stage.daemon("node", "clone");
        let until = Instant::now() + Duration::from_secs(600);
        while stage.job().is_none_or(|job| job.state != State::Done) {
            assert!(Instant::now() < until, "{:#?}", stage.job());
            sleep(Duration::from_secs(1)).await;
        }
        assert_eq!(stage.published(), Some((stage.content_of(0), false)));
    });
}
