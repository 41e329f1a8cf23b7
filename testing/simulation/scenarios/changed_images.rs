//! An image, its request or its source is changed at one exact moment of a job. Each test is one row of "The publish
//! window" in `docs/explanation/jobs.md`, or what is like it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use tokio::time::{Instant, sleep};
use uuid::Uuid;

use super::one_image::{OTHER, OneImage};
use super::run_in_virtual_time;
use crate::decline::Decline;
use crate::job::record::State;
use crate::job::simulation::actors::glance;
use crate::job::simulation::faults::dice::Dice;
use crate::job::simulation::state::cluster::FSID;
use crate::job::simulation::state::glance::TASK;
use crate::openstack::ImageTask;
use crate::request::Source;

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
        run_in_virtual_time(async move {
            let stage = OneImage::new();
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

/// The first status is shown some seconds after the plan read the record.
#[test]
fn an_image_that_is_uploaded_before_the_first_status_gets_no_status() {
    run_in_virtual_time(async {
        let stage = OneImage::new();
        let (image, world) = (stage.image, stage.world.clone());
        let (written, seen) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let (uploads, writes) = (Arc::clone(&seen), Arc::clone(&written));
        stage.world.lock().script = Some(Box::new(move |_, call| {
            if call.contains("create snapshot") && !uploads.swap(true, Ordering::SeqCst) {
                tokio::spawn(glance::upload(world.clone(), image.to_string()));
            }
            if call.contains("glance patch") && call.contains("Set") && call.contains("rbd_offload_") {
                writes.store(true, Ordering::SeqCst);
            }
        }));
        let _daemon = stage.daemon("node", "clone");
        stage.ask().await;
        let job = stage.end().await;
        assert!(seen.load(Ordering::SeqCst), "nothing was uploaded");
        assert_eq!(job.state, State::Declined, "{job:#?}");
        assert!(!written.load(Ordering::SeqCst), "a status was written on another writer's image");
        assert_eq!(stage.image().image.status, "active");
        assert_eq!(stage.image().image.properties.keys().find(|key| key.starts_with("rbd_offload_")), None);
        stage.is_tidy();
    });
}

#[test]
fn a_tag_that_changes_after_the_location_was_posted_is_put_back() {
    run_in_virtual_time(async {
        let stage = OneImage::new();
        let (image, other) = (stage.image, Source::Volume(stage.volumes[1]).tag());
        stage.before(
            &["glance add location"],
            OneImage::change_image(image, move |record| {
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
        run_in_virtual_time(async move {
            let stage = OneImage::new();
            let image = stage.image;
            stage.before(moment, OneImage::change_image(image, |record| record.image.tags = vec!["mine".into()]));
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
fn owner_status_and_size_of_the_source_count_when_its_snapshot_exists() {
    for (change, said) in [("transfer", "there is no volume"), ("retype", "is retyping"), ("extend", "was extended")] {
        run_in_virtual_time(async move {
            let stage = OneImage::new();
            let volume = stage.volumes[0];
            stage.before(&["create snapshot"], move |world| {
                let disk = world.cloud.disks.get_mut(&volume.to_string()).unwrap();
                match change {
                    "transfer" => disk.volume.project_id = OTHER.into(),
                    "retype" => disk.volume.status = "retyping".into(),
                    _ => disk.volume.size += 1,
                }
            });
            let _daemon = stage.daemon("node", "clone");
            stage.ask().await;
            let job = stage.end().await;
            assert_eq!(job.state, State::Declined, "{job:#?}");
            let properties = stage.image().image.properties;
            let message = &properties["rbd_offload_message"];
            assert!(message.contains(said), "{change}: {message}");
            assert_eq!(stage.published(), None);
            stage.is_tidy();
        });
    }
}

#[test]
fn a_tag_that_is_set_while_a_declined_job_is_cleaned_up_is_a_new_request() {
    run_in_virtual_time(async {
        let stage = OneImage::new();
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
        run_in_virtual_time(async move {
            let stage = OneImage::new();
            let image = stage.image;
            stage.before(moment, OneImage::change_image(image, |record| record.image.owner = Some(OTHER.into())));
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
        run_in_virtual_time(async move {
            let stage = OneImage::new();
            let image = stage.image;
            let location = match location {
                // of a tenant's own image
                "" => format!("rbd://{FSID}/images/{}/snap", Uuid::nil()),
                other => other.to_owned(),
            };
            stage.before(
                &["glance add location"],
                OneImage::change_image(image, move |record| {
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
        run_in_virtual_time(async move {
            let stage = OneImage::new();
            let image = stage.image;
            stage.before(
                moment,
                OneImage::change_image(image, |record| {
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
    run_in_virtual_time(async {
        let stage = OneImage::new();
        let image = stage.image;
        stage.before(
            &["glance add location"],
            OneImage::change_image(image, |record| {
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
        OneImage::change_image(image, |record| record.image.status = "active".into())(&mut stage.world.lock());
        sleep(Duration::from_secs(200)).await;
        assert_eq!(stage.image().image.status, "deactivated");
        assert_eq!(stage.published(), Some((stage.content_of(0), false)), "its data are an image's");
        stage.is_tidy();
    });
}

#[test]
fn a_late_status_on_a_finished_image_is_taken_off() {
    run_in_virtual_time(async {
        let stage = OneImage::new();
        let image = stage.image;
        let daemon = stage.daemon("node", "clone");
        stage.ask().await;
        assert_eq!(stage.end().await.state, State::Done);
        OneImage::change_image(image, |record| {
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
    run_in_virtual_time(async {
        let stage = OneImage::new();
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

/// Its owner may make a record larger than an answer that the daemon reads, and smaller again.
#[test]
fn a_record_that_grows_too_large_ends_its_job_and_leaves_nothing() {
    run_in_virtual_time(async {
        let stage = OneImage::new();
        let image = stage.image;
        let fatten = OneImage::change_image(image, |record| {
            record.image.properties.insert("pad".into(), "x".repeat(17 * 1024 * 1024));
        });
        stage.before(&["flatten"], fatten);
        let _daemon = stage.daemon("node", "clone");
        stage.ask().await;
        let job = stage.end().await;
        assert_eq!(job.state, State::Failed, "{job:#?}");
        assert_eq!(stage.published(), None);
        stage.is_tidy();
        OneImage::change_image(image, |record| drop(record.image.properties.remove("pad")))(&mut stage.world.lock());
        // the record asks for it still
        stage.ask().await;
        sleep(Duration::from_secs(200)).await;
        assert_eq!(stage.end().await.state, State::Done);
        stage.is_tidy();
    });
}

/// The tenant takes its request back, with what the daemon showed, right before the daemon shows the next status.
#[test]
fn a_request_that_is_taken_back_right_before_a_status_gets_no_further_one() {
    let mut taken_back = 0;
    for seed in 0..30 {
        let refused = run_in_virtual_time(async {
            let stage = OneImage::new();
            stage.world.lock().dice = Dice::new(seed);
            let image = stage.image;
            let refused = Arc::new(AtomicUsize::new(0));
            let seen = Arc::clone(&refused);
            stage.world.lock().script = Some(Box::new(move |world, call| {
                let is_status = call.contains("glance patch") && call.contains("Replace");
                if is_status && seen.fetch_add(1, Ordering::SeqCst) == 0 {
                    OneImage::change_image(image, |record| {
                        record.image.tags = vec!["mine".into()];
                        record.image.properties.retain(|name, _| !name.starts_with("rbd_offload_"));
                    })(world);
                }
            }));
            let _daemon = stage.daemon("node", "clone");
            stage.ask().await;
            let job = stage.end().await;
            stage.is_tidy();
            let refused = refused.load(Ordering::SeqCst);
            assert_eq!(job.state == State::Done, refused == 0, "{job:#?}");
            refused
        });
        assert!(refused <= 1, "seed {seed}: {refused} statuses for a request that is gone");
        taken_back += refused;
    }
    assert!(taken_back > 0, "no copy lasted long enough");
}

#[test]
fn a_job_runs_and_ends_where_glance_protects_its_status() {
    for other_owner in [false, true] {
        run_in_virtual_time(async {
            let stage = OneImage::new();
            let image = stage.image;
            let volume = stage.volumes[0].to_string();
            {
                let mut world = stage.world.lock();
                world.cloud.protected = Some("rbd_offload_");
                if other_owner {
                    world.cloud.disks.get_mut(&volume).unwrap().volume.project_id = OTHER.into();
                }
                // from before the protection: what can be neither changed nor removed
                OneImage::change_image(image, |record| {
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
