//! `openstack image create --volume` by a cinder-volume that hands its uploads over (`integrations/cinder`), on the
//! real services: whatever dies or freezes, the image is made once, and right. `docs/explanation/handover.md` is the
//! protocol.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;
use std::time::{Duration, Instant};

use common::broker::Broker;
use common::cloud::{Account, Volume, await_tidy, nothing_is_left_of};
use common::daemon::{Daemon, Setup};
use common::disk::{Digest, Disk};
use common::glance::Reader;
use common::lab_lease::{self, Kind, with};
use common::{MIB, lab, pause, run, seconds, unique, until};
use futures::future::join_all;
use serde_json::{Value, json};

/// The volume type whose driver hands uploads over.
const INTEGRATED: &str = "ceph-offload";

/// Its `rbd_offload_…_timeout` in the lab.
const CLAIM: u64 = 10;
const STALL: u64 = 45;
const DOUBT: u64 = 30;

async fn small_volume(account: &Account, seed: u64) -> Volume {
    account.small_volume(json!({"volume_type": INTEGRATED}), seed).await
}

/// A volume that a slow daemon copies for some ten seconds.
async fn long_volume(account: &Account, seed: u64) -> Volume {
    let volume = small_volume(account, seed).await;
    volume.disk.write(seed + 50, &[(0, 40 * MIB)]).await;
    volume
}

fn fast() -> Setup {
    Kind::HandOver.setup()
}

fn slow() -> Setup {
    Kind::SlowHandOver.setup()
}

/// The same jobs at full speed.
fn faster(setup: &Setup) -> Setup {
    setup.clone().set("offload", "bandwidth_limit", "0")
}

/// Waits until Cinder is done with the upload; the image, `null` when it is gone.
async fn end_of_upload(account: &Account, volume: &Volume, image: &str) -> Value {
    account.await_volume(&volume.id, "available").await;
    account.image(image).await
}

/// The daemon's properties on an image record, and its tags.
fn our_keys(image: &Value) -> Vec<String> {
    let properties = image.as_object().unwrap().keys().filter(|key| key.starts_with("rbd_offload_")).cloned();
    let tags = image["tags"].as_array().unwrap().iter().map(|tag| tag.as_str().unwrap().to_owned());
    properties.chain(tags.filter(|tag| tag.starts_with("rbd-offload"))).collect()
}

/// One active image with the source's bytes, made by the daemon or by Cinder, and no other image.
async fn is_right(image: &Value, expected: &Digest, volume: &Volume) {
    is_whole(image, expected).await;
    is_tidy(image["id"].as_str().unwrap(), volume).await;
    let trashed = volume.disk.facts().await.unwrap().trashed;
    assert_eq!(trashed, Vec::<String>::new(), "snapshots in the trash namespace");
}

async fn is_whole(image: &Value, expected: &Digest) {
    assert_eq!(image["status"], "active", "{image:#}");
    let id = image["id"].as_str().unwrap();
    let service = Account::service().await;
    // a status that reached Glance while Cinder took its offer back comes off right after the image is active
    until("no tag and no property of ours is left", seconds(60), || async {
        our_keys(&service.image(id).await).is_empty().then_some(())
    })
    .await;
    let disk = Disk::of_image(id);
    assert_eq!(disk.digest(None).await, *expected, "bytes of image {id}");
    assert_eq!(disk.digest(Some("snap")).await, *expected, "bytes of the snapshot of image {id}");
    // the daemon's own tag comes off right after the image is active
    let facts = until("nothing says whose image it is", seconds(30), || async {
        disk.facts().await.filter(|facts| facts.metadata.is_empty())
    })
    .await;
    assert_eq!(facts.parent, None);
    assert_eq!(facts.snapshots, BTreeMap::from([("snap".to_owned(), true)]));
    let location = format!("rbd://{}/images/{id}/snap", lab().fsid);
    assert_eq!(service.locations(id).await, [location], "exactly one location");
}

/// Nothing of ours is beside image and volume, once the last handle of the volume is closed.
async fn is_tidy(image: &str, volume: &Volume) {
    assert!(Disk::of_image(&format!("rbd-offload.{image}")).facts().await.is_none(), "a private copy");
    let facts = volume.disk.unlocked_facts().await;
    assert!(!facts.snapshots.keys().any(|name| name.starts_with("rbd-offload")), "{:?}", facts.snapshots);
}

async fn await_says(account: &Account, image: &str, status: &str) {
    await_says_within(account, image, status, seconds(60)).await;
}

async fn await_says_within(account: &Account, image: &str, status: &str, limit: Duration) {
    until(&format!("the daemon says {status}"), limit, || async {
        (account.image(image).await["rbd_offload_status"] == status).then_some(())
    })
    .await;
}

async fn await_half_way(account: &Account, daemon: &Daemon, image: &str) {
    await_says(account, image, "copying").await;
    until("some of it is copied", seconds(60), || async {
        daemon.job(image).await.filter(|job| job["progress"].as_u64() > Some(10))
    })
    .await;
}

/// What cinder-volume wrote about the hand-over of a volume.
fn cinder_log(volume: &Volume) -> String {
    let log = std::fs::read(lab().dir.join("log/cinder-volume.log")).unwrap();
    let about = format!("volume:{}@", volume.id);
    let lines: Vec<_> =
        String::from_utf8_lossy(&log).lines().filter(|l| l.contains(&about)).map(str::to_owned).collect();
    lines.join("\n")
}

/// Cinder made the image itself, for this reason.
fn took_the_native_path(volume: &Volume, reason: &str) {
    let log = cinder_log(volume);
    let told = log.lines().any(|line| line.contains("the native path") && line.contains(reason));
    assert!(told, "no {reason:?}:\n{log}");
}

/// A daemon made the image.
async fn was_handed_over(daemon: &Daemon, volume: &Volume, image: &str) {
    let job = daemon.await_job(image, "done").await;
    assert_eq!(job["source"]["id"], volume.id.as_str(), "{job:#}");
    let log = cinder_log(volume);
    assert!(log.contains("the image is active after") && !log.contains("the native path"), "{log}");
}

mod together {
    use super::*;

    #[tokio::test(flavor = "multi_thread")]
    async fn an_upload_is_made_by_the_daemon_and_a_volume_from_it() {
        let (_lab, daemon) = with(Kind::HandOver).await;
        let demo = Account::demo().await;
        let volume = small_volume(&demo, 1).await;
        let before = demo.volume(&volume.id).await;
        let expected = volume.disk.digest(None).await;
        let id = demo.stock_upload(&volume).await;
        let image = end_of_upload(&demo, &volume, &id).await;
        is_right(&image, &expected, &volume).await;
        was_handed_over(&daemon, &volume, &id).await;

        let mut after = demo.volume(&volume.id).await;
        after["updated_at"] = before["updated_at"].clone();
        assert_eq!(after, before, "the volume as Cinder shows it");
        let made = demo.create_volume(json!({"imageRef": id})).await;
        assert!(made.disk.facts().await.unwrap().parent.is_some(), "a clone of the image, not a download");
        made.disk.resize(64 * MIB).await;
        assert_eq!(made.disk.digest(None).await, expected);
    }

    /// Fields that differ between any two images; and `virtual_size`, which Glance finds out from an upload only, and
    /// which no client can set.
    const OF_ITS_OWN: [&str; 7] = ["id", "name", "created_at", "updated_at", "file", "self", "virtual_size"];

    #[tokio::test(flavor = "multi_thread")]
    async fn the_record_is_that_of_a_stock_upload_field_by_field() {
        let (_lab, daemon) = with(Kind::HandOver).await;
        let demo = Account::demo().await;
        let base = json!({"disk_format": "raw", "container_format": "bare", "min_ram": 64, "os_distro": "debian"});
        let base = demo.create_image(&["theirs".to_owned()], base).await;
        assert_eq!(demo.upload(&base, (0..24 * MIB).map(|n| (n % 251) as u8).collect()).await, 204);
        demo.await_tasks(&base).await;
        let mut records = Vec::new();
        for kind in ["ceph", INTEGRATED] {
            let volume = demo.create_volume(json!({"imageRef": base, "volume_type": kind})).await;
            let metadata = json!({"os-set_image_metadata": {"metadata": {
                "hw_disk_bus": "scsi", "rbd_offload_status": "declined"}}});
            demo.volume_action(&volume.id, metadata).await;
            volume.disk.resize(64 * MIB).await;
            let id = demo.stock_upload(&volume).await;
            let image = end_of_upload(&demo, &volume, &id).await;
            assert_eq!(image["status"], "active", "{image:#}");
            demo.await_tasks(&id).await;
            let mut image = until("Glance's hash", seconds(60), || async {
                let image = demo.image(&id).await;
                (!image["os_hash_value"].is_null() && image["os_glance_import_task"].is_null()).then_some(image)
            })
            .await;
            if kind == INTEGRATED {
                was_handed_over(&daemon, &volume, &id).await;
            } else {
                assert_eq!(daemon.job(&id).await, None, "a stock driver's upload is not ours");
                // inherited in a stock cloud too; ours takes it off, as it must not stay on an active image
                image.as_object_mut().unwrap().remove("rbd_offload_status");
            }
            for key in OF_ITS_OWN {
                image.as_object_mut().unwrap().remove(key);
            }
            let locations = Account::service().await.location_records(&id).await;
            image["locations"] = serde_json::from_str(&locations.to_string().replace(&id, "ID")).unwrap();
            records.push(image);
        }
        let keys = |record: &Value| record.as_object().unwrap().keys().cloned().collect::<BTreeSet<_>>();
        let differs: Vec<_> = keys(&records[0])
            .union(&keys(&records[1]))
            .filter(|key| records[0].get(key) != records[1].get(key))
            .map(|key| format!("{key}: stock {:?}, handed over {:?}", records[0].get(key), records[1].get(key)))
            .collect();
        assert!(differs.is_empty(), "{differs:#?}");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn an_encrypted_volume_is_copied_as_it_is_and_keeps_its_key() {
        let (_lab, daemon) = with(Kind::HandOver).await;
        let demo = Account::demo().await;
        let volume = demo.create_volume(json!({"volume_type": "luks-offload"})).await;
        volume.disk.write(3, &[(32 * MIB, 5 * MIB)]).await;
        let expected = volume.disk.digest(None).await;
        let id = demo.stock_upload(&volume).await;
        let image = end_of_upload(&demo, &volume, &id).await;
        is_right(&image, &expected, &volume).await;
        assert!(image["cinder_encryption_key_id"].is_string(), "{image:#}");
        assert_eq!(image["cinder_encryption_key_deletion_policy"], "on_image_deletion");
        was_handed_over(&daemon, &volume, &id).await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn another_format_is_made_by_cinder_without_an_offer() {
        let (_lab, daemon) = with(Kind::HandOver).await;
        let demo = Account::demo().await;
        let volume = small_volume(&demo, 4).await;
        let id = demo.ask_for_upload(&volume, json!({"disk_format": "qcow2"})).await;
        demo.adopt_image(&id);
        let image = end_of_upload(&demo, &volume, &id).await;
        assert_eq!((&image["status"], &image["disk_format"]), (&json!("active"), &json!("qcow2")));
        assert_eq!(daemon.job(&id).await, None);
        assert_eq!(cinder_log(&volume), "");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_disk_that_begins_like_a_container_format_ends_as_with_stock_cinder() {
        let (_lab, daemon) = with(Kind::HandOver).await;
        let demo = Account::demo().await;
        let mut ends = Vec::new();
        for kind in ["ceph", INTEGRATED] {
            let volume = demo.small_volume(json!({"volume_type": kind}), 5).await;
            volume.disk.put(0, &qcow2_header().await).await;
            let id = demo.stock_upload(&volume).await;
            let image = end_of_upload(&demo, &volume, &id).await;
            if kind == INTEGRATED {
                daemon.await_job(&id, "declined").await;
                took_the_native_path(&volume, "declined");
            }
            ends.push(image["status"].clone());
            is_tidy(&id, &volume).await;
        }
        assert_eq!(ends[0], ends[1]);
    }

    async fn qcow2_header() -> Vec<u8> {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("disk");
        let (well, said) =
            run(Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&file).arg("16M")).await;
        assert!(well, "qemu-img: {said}");
        std::fs::read(&file).unwrap()[..32 << 10].to_vec()
    }

    /// The record and the offer as a cinder-volume of another cluster would write them.
    #[tokio::test(flavor = "multi_thread")]
    async fn an_offer_from_another_cluster_is_declined() {
        let (_lab, daemon) = with(Kind::HandOver).await;
        let demo = Account::demo().await;
        let volume = small_volume(&demo, 6).await;
        let offer = format!("rbd-offload-handover:volume:{}@{}", volume.id, uuid::Uuid::new_v4());
        let id = demo.create_image(&[offer], json!({"disk_format": "raw", "container_format": "bare"})).await;
        daemon.await_job(&id, "declined").await;
        let image = demo.image(&id).await;
        assert_eq!((&image["status"], &image["rbd_offload_status"]), (&json!("queued"), &json!("declined")));
        assert_eq!(image["tags"], json!([]));
        nothing_is_left_of(&id).await;
        is_tidy(&id, &volume).await;
    }
}

mod slowly {
    use super::*;

    #[tokio::test(flavor = "multi_thread")]
    async fn an_image_that_is_deleted_meanwhile_ends_the_upload() {
        let (_lab, daemon) = with(Kind::SlowHandOver).await;
        let demo = Account::demo().await;
        let volume = long_volume(&demo, 1).await;
        let id = demo.stock_upload(&volume).await;
        await_half_way(&demo, &daemon, &id).await;
        assert_eq!(demo.delete_image(&id).await, 204);
        assert_eq!(end_of_upload(&demo, &volume, &id).await, Value::Null);
        daemon.await_job(&id, "cancelled").await;
        await_tidy(&id, &volume.disk).await;
        nothing_is_left_of(&id).await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_handover_survives_the_expiry_of_the_users_token() {
        let (_lab, daemon) = with(Kind::SlowHandOver).await;
        let demo = Account::demo().await;
        let volume = long_volume(&demo, 2).await;
        // for nearly half a minute of copying
        volume.disk.resize(112 * MIB).await;
        volume.disk.write(3, &[(0, 108 * MIB)]).await;
        let expected = volume.disk.digest(None).await;
        // long enough for a busy Cinder to take the upload
        let short = demo.short_lived(15).await;
        let id = short.ask_for_upload(&volume, json!({})).await;
        demo.adopt_image(&id);
        pause(seconds(16)).await;
        assert_eq!(demo.volume(&volume.id).await["status"], "uploading", "the token ends before the upload does");
        let image = end_of_upload(&demo, &volume, &id).await;
        is_right(&image, &expected, &volume).await;
        was_handed_over(&daemon, &volume, &id).await;
    }
}

mod alone {
    use super::*;

    #[tokio::test(flavor = "multi_thread")]
    async fn published_at_once_the_image_depends_on_nothing_in_the_end() {
        let _lab = lab_lease::alone().await;
        let (_reader, demo) = (Reader::new().await, Account::demo().await);
        let daemon = fast().set("offload", "publish", "at-once").set("offload", "detach_grace", "1s").start().await;
        let volume = small_volume(&demo, 1).await;
        let expected = volume.disk.digest(None).await;
        let id = demo.stock_upload(&volume).await;
        let image = end_of_upload(&demo, &volume, &id).await;
        assert_eq!(image["status"], "active", "{image:#}");
        was_handed_over(&daemon, &volume, &id).await;
        assert_eq!(daemon.job(&id).await.unwrap()["publish"], "at-once");
        is_right(&demo.image(&id).await, &expected, &volume).await;
        daemon.await_idle().await;
        daemon.stop();
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn without_a_daemon_cinder_does_it_after_the_claim_time() {
        let _lab = lab_lease::alone().await;
        let demo = Account::demo().await;
        let volume = small_volume(&demo, 1).await;
        let expected = volume.disk.digest(None).await;
        let (broker, queue) = (Broker::connect().await, format!("test-{}", unique()));
        broker.listen(&queue, &["openstack"]).await;
        let began = Instant::now();
        let id = demo.stock_upload(&volume).await;
        let image = end_of_upload(&demo, &volume, &id).await;
        let took = began.elapsed();
        is_right(&image, &expected, &volume).await;
        took_the_native_path(&volume, "no daemon took it");
        assert!(took > seconds(CLAIM) && took < seconds(CLAIM + 30), "{took:?}");

        let told = broker.drain(&queue).await.into_iter().find_map(|body| {
            let envelope: Value = serde_json::from_slice(&body).unwrap();
            let message: Value = serde_json::from_str(envelope["oslo.message"].as_str().unwrap()).unwrap();
            (message["event_type"] == "volume.upload.start").then(|| message["payload"].clone())
        });
        let told = told.expect("volume.upload.start");
        for (key, value) in [
            ("volume_id", json!(volume.id)),
            ("image_id", json!(id)),
            ("tenant_id", json!(demo.project_id)),
            ("user_id", json!(demo.user_id)),
            ("host", json!("lab@ceph-offload#ceph-offload")),
            ("status", json!("uploading")),
            ("fsid", json!(lab().fsid)),
            ("pool", json!("volumes")),
            ("rbd_image", json!(volume.disk.name)),
            ("handover", json!(true)),
        ] {
            assert_eq!(told[key], value, "{key} of {told:#}");
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn without_the_integration_a_daemon_leaves_the_offer_alone() {
        let _lab = lab_lease::alone().await;
        let demo = Account::demo().await;
        let volume = small_volume(&demo, 2).await;
        let expected = volume.disk.digest(None).await;
        let daemon = Setup::default().set("backend:ceph-offload", "pool", "volumes").start().await;
        let id = demo.stock_upload(&volume).await;
        let image = end_of_upload(&demo, &volume, &id).await;
        is_right(&image, &expected, &volume).await;
        took_the_native_path(&volume, "no daemon took it");
        assert_eq!(daemon.job(&id).await, None);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn what_the_daemon_declines_is_uploaded_at_once() {
        let _lab = lab_lease::alone().await;
        let demo = Account::demo().await;
        let volume = small_volume(&demo, 3).await;
        let expected = volume.disk.digest(None).await;
        let daemon = fast().without("backend:ceph-offload").start().await;
        let began = Instant::now();
        let id = demo.stock_upload(&volume).await;
        let image = end_of_upload(&demo, &volume, &id).await;
        let took = began.elapsed();
        is_right(&image, &expected, &volume).await;
        took_the_native_path(&volume, "declined");
        daemon.await_job(&id, "declined").await;
        assert!(took < seconds(25), "{took:?}");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_daemon_that_is_killed_half_way_is_followed_by_another() {
        let _lab = lab_lease::alone().await;
        let demo = Account::demo().await;
        let volume = long_volume(&demo, 4).await;
        let expected = volume.disk.digest(None).await;
        let setup = slow();
        let first = setup.start().await;
        let second = faster(&setup);
        let id = demo.stock_upload(&volume).await;
        await_half_way(&demo, &first, &id).await;
        first.kill();
        let second = second.start().await;
        let image = end_of_upload(&demo, &volume, &id).await;
        is_right(&image, &expected, &volume).await;
        was_handed_over(&second, &volume, &id).await;
        second.await_idle().await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_daemon_that_is_killed_half_way_for_good_and_one_that_comes_late() {
        let _lab = lab_lease::alone().await;
        let demo = Account::demo().await;
        let volume = long_volume(&demo, 5).await;
        let expected = volume.disk.digest(None).await;
        let setup = slow();
        let first = setup.start().await;
        let id = demo.stock_upload(&volume).await;
        await_half_way(&demo, &first, &id).await;
        first.kill();
        let began = Instant::now();
        let image = end_of_upload(&demo, &volume, &id).await;
        assert!(began.elapsed() > seconds(STALL - 5), "{:?}", began.elapsed());
        took_the_native_path(&volume, "no progress");
        assert_eq!((&image["status"], our_keys(&image)), (&json!("active"), vec![]), "{image:#}");

        let late = faster(&setup).start().await;
        await_tidy(&id, &volume.disk).await;
        late.await_idle().await;
        is_right(&demo.image(&id).await, &expected, &volume).await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_daemon_that_freezes_half_way_and_wakes_when_all_is_over() {
        let _lab = lab_lease::alone().await;
        let demo = Account::demo().await;
        let volume = long_volume(&demo, 6).await;
        let expected = volume.disk.digest(None).await;
        let daemon = slow().start().await;
        let id = demo.stock_upload(&volume).await;
        await_half_way(&demo, &daemon, &id).await;
        daemon.signal("STOP");
        let image = end_of_upload(&demo, &volume, &id).await;
        took_the_native_path(&volume, "no progress");
        assert_eq!((&image["status"], our_keys(&image)), (&json!("active"), vec![]), "{image:#}");

        daemon.signal("CONT");
        await_tidy(&id, &volume.disk).await;
        daemon.await_idle().await;
        pause(seconds(6)).await;
        is_right(&demo.image(&id).await, &expected, &volume).await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_daemon_that_freezes_when_all_is_prepared_leaves_no_doubt_behind() {
        let _lab = lab_lease::alone().await;
        let demo = Account::demo().await;
        let volume = small_volume(&demo, 7).await;
        let expected = volume.disk.digest(None).await;
        let daemon = fast().start().await;
        let id = demo.stock_upload(&volume).await;
        await_says(&demo, &id, "publishing").await;
        daemon.signal("STOP");
        let job = daemon.job(&id).await.unwrap();
        let began = Instant::now();
        let image = end_of_upload(&demo, &volume, &id).await;
        eprintln!("frozen as {}, {}; over after {:?}", job["state"], job["handover"], began.elapsed());
        daemon.signal("CONT");
        if job["handover"] == "offered" {
            took_the_native_path(&volume, "after go");
            assert!(began.elapsed() > seconds(DOUBT - 1));
            assert_eq!((&image["status"], our_keys(&image)), (&json!("active"), vec![]), "{image:#}");
        }
        await_tidy(&id, &volume.disk).await;
        daemon.await_idle().await;
        pause(seconds(6)).await;
        // frozen after its rename it keeps the name: then the stock upload fails, and Cinder deletes the record
        match demo.image(&id).await {
            Value::Null => {
                assert_ne!(job["handover"], "offered", "{job:#}");
                nothing_is_left_of(&id).await;
            }
            image => is_right(&image, &expected, &volume).await,
        }
    }

    /// Crashes it. Like a stock upload that is cut off, this leaves the volume `uploading` until an administrator
    /// resets it: when Cinder starts, it looks after creations and deletions only.
    async fn restart_cinder_volume(account: &Account, volume: &Volume) {
        lab().service("kill", &["cinder-volume"]).await;
        lab().service("start", &["cinder-volume"]).await;
        if account.volume(&volume.id).await["status"] != "available" {
            Account::admin().await.reset_volume(&volume.id).await;
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn cinder_volume_dies_before_it_says_go() {
        let _lab = lab_lease::alone().await;
        let demo = Account::demo().await;
        let volume = long_volume(&demo, 8).await;
        let daemon = slow().start().await;
        let id = demo.stock_upload(&volume).await;
        await_half_way(&demo, &daemon, &id).await;
        restart_cinder_volume(&demo, &volume).await;
        assert_eq!(demo.image(&id).await["status"], "queued");
        // it waits for go, for two minutes
        until("the daemon gives up", seconds(180), || async {
            daemon.job(&id).await.filter(|job| job["state"] == "declined")
        })
        .await;
        let image = demo.image(&id).await;
        assert_eq!((&image["status"], &image["tags"]), (&json!("queued"), &json!([])), "{image:#}");
        nothing_is_left_of(&id).await;
        is_tidy(&id, &volume).await;
        daemon.await_idle().await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn cinder_volume_dies_when_it_has_said_go() {
        let _lab = lab_lease::alone().await;
        let demo = Account::demo().await;
        let volume = small_volume(&demo, 9).await;
        let expected = volume.disk.digest(None).await;
        let daemon = fast().start().await;
        let id = demo.stock_upload(&volume).await;
        until("go", seconds(60), || async {
            let image = demo.image(&id).await;
            let said = our_keys(&image).iter().any(|key| key == "rbd-offload-handover:go");
            (said || image["status"] == "active").then_some(())
        })
        .await;
        restart_cinder_volume(&demo, &volume).await;
        let image = demo.await_image(&id, "active").await;
        is_right(&image, &expected, &volume).await;
        daemon.await_job(&id, "done").await;
        daemon.await_idle().await;
    }

    /// As an upgrade of Cinder does: what is at work may end.
    #[tokio::test(flavor = "multi_thread")]
    async fn cinder_volume_that_is_told_to_stop_ends_the_upload_first() {
        let _lab = lab_lease::alone().await;
        let demo = Account::demo().await;
        let volume = long_volume(&demo, 12).await;
        let expected = volume.disk.digest(None).await;
        let daemon = slow().start().await;
        let id = demo.stock_upload(&volume).await;
        await_half_way(&demo, &daemon, &id).await;
        lab().service("restart", &["cinder-volume"]).await;
        let image = end_of_upload(&demo, &volume, &id).await;
        is_right(&image, &expected, &volume).await;
        was_handed_over(&daemon, &volume, &id).await;
        daemon.await_idle().await;
    }

    /// A job may wait longer for its turn than Cinder waits without a sign.
    #[tokio::test(flavor = "multi_thread")]
    async fn cinder_waits_for_a_queued_job_while_other_jobs_make_progress() {
        let _lab = lab_lease::alone().await;
        let demo = Account::demo().await;
        let (first, second) = (long_volume(&demo, 13).await, small_volume(&demo, 14).await);
        let expected = [first.disk.digest(None).await, second.disk.digest(None).await];
        let setup = slow().set("offload", "bandwidth_limit", "512KiB").set("offload", "max_jobs", "1");
        let daemon = setup.start().await;
        let ids = [demo.stock_upload(&first).await, String::new()];
        await_says(&demo, &ids[0], "copying").await;
        let ids = [ids[0].clone(), demo.stock_upload(&second).await];
        await_says(&demo, &ids[1], "accepted").await;
        let began = Instant::now();
        await_says_within(&demo, &ids[1], "copying", seconds(150)).await;
        assert!(began.elapsed() > seconds(STALL + 10), "it had to wait only {:?}", began.elapsed());
        for ((id, volume), expected) in ids.iter().zip([&first, &second]).zip(&expected) {
            let image = end_of_upload(&demo, volume, id).await;
            is_right(&image, expected, volume).await;
            was_handed_over(&daemon, volume, id).await;
        }
        daemon.await_idle().await;
    }

    /// So slowly that nothing moves for hours.
    fn stuck() -> Setup {
        slow().set("offload", "bandwidth_limit", "1").set("offload", "max_jobs", "1")
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn cinder_takes_a_queued_job_back_when_no_job_makes_progress() {
        let _lab = lab_lease::alone().await;
        let demo = Account::demo().await;
        let (first, second) = (demo.long_volume(16, 15).await, small_volume(&demo, 16).await);
        let expected = second.disk.digest(None).await;
        let daemon = stuck().start().await;
        let stuck = demo.request(&first).await;
        await_says(&demo, &stuck, "copying").await;
        let id = demo.stock_upload(&second).await;
        let began = Instant::now();
        let image = end_of_upload(&demo, &second, &id).await;
        assert!(began.elapsed() > seconds(STALL), "{:?}", began.elapsed());
        took_the_native_path(&second, "no progress");
        is_whole(&image, &expected).await;
        assert_eq!(demo.delete_image(&stuck).await, 204);
        daemon.await_job(&stuck, "cancelled").await;
        daemon.await_job(&id, "declined").await;
        is_right(&demo.image(&id).await, &expected, &second).await;
        daemon.await_idle().await;
    }

    /// Of a large volume a per cent may take longer than Cinder waits without a sign.
    #[tokio::test(flavor = "multi_thread")]
    async fn cinder_waits_for_a_slow_copy_that_makes_progress() {
        let _lab = lab_lease::alone().await;
        let demo = Account::demo().await;
        let volume = demo.create_volume(json!({"volume_type": INTEGRATED})).await;
        volume.disk.remove().await;
        volume.disk.create_in_small_objects(80 * MIB).await;
        volume.disk.write(17, &[(0, 72 * MIB)]).await;
        // 8 s for an object, a minute and a half for a per cent
        let daemon = slow().set("offload", "bandwidth_limit", "8KiB").start().await;
        let id = demo.stock_upload(&volume).await;
        await_says(&demo, &id, "copying").await;
        let mut says = BTreeSet::new();
        let began = Instant::now();
        while began.elapsed() < seconds(STALL + 30) {
            let image = demo.image(&id).await;
            assert!(!our_keys(&image).is_empty() && image["status"] == "queued", "Cinder does it itself: {image:#}");
            assert!(matches!(image["rbd_offload_progress"].as_str(), Some("0" | "1" | "2")), "{image:#}");
            says.insert(image["rbd_offload_message"].as_str().unwrap().to_owned());
            pause(seconds(2)).await;
        }
        assert!(says.len() > 2, "{says:?}");
        assert_eq!(cinder_log(&volume).lines().filter(|line| line.contains("the native path")).count(), 0);
        assert_eq!(demo.delete_image(&id).await, 204);
        assert_eq!(end_of_upload(&demo, &volume, &id).await, Value::Null);
        daemon.await_job(&id, "cancelled").await;
        await_tidy(&id, &volume.disk).await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn ten_concurrent_uploads_with_two_daemons_become_active() {
        let _lab = lab_lease::alone().await;
        let demo = Account::demo().await;
        let volumes = join_all((0..10).map(|seed| small_volume(&demo, 20 + seed))).await;
        let setup = fast().set("offload", "max_jobs", "2");
        let daemons = [setup.start().await, setup.start().await];
        let uploads = volumes.iter().map(|volume| {
            let (demo, daemons) = (&demo, &daemons);
            async move {
                let expected = volume.disk.digest(None).await;
                let id = demo.stock_upload(volume).await;
                let image = end_of_upload(demo, volume, &id).await;
                is_right(&image, &expected, volume).await;
                let job = daemons[0].job(&id).await.unwrap_or_default();
                (job["state"] == "done").then_some(())
            }
        });
        let done = join_all(uploads).await.into_iter().flatten().count();
        eprintln!("{done} of 10 were made by the daemons");
        assert!(done > 0);
        for daemon in &daemons {
            daemon.await_idle().await;
        }
    }

    /// Glance is away for a while too: it remembers tokens that it has seen, and forgets them with a restart.
    #[tokio::test(flavor = "multi_thread")]
    async fn the_users_token_is_revoked_meanwhile_and_cinders_own_user_goes_on() {
        let _lab = lab_lease::alone().await;
        let demo = Account::demo().await;
        let volume = long_volume(&demo, 10).await;
        let expected = volume.disk.digest(None).await;
        let daemon = slow().start().await;
        let theirs = Account::demo().await;
        let id = theirs.ask_for_upload(&volume, json!({})).await;
        demo.adopt_image(&id);
        await_half_way(&demo, &daemon, &id).await;
        theirs.revoke().await;
        lab().service("restart", &["glance"]).await;
        let image = end_of_upload(&demo, &volume, &id).await;
        cinders_user_went_on(&id);
        was_handed_over(&daemon, &volume, &id).await;
        daemon.await_idle().await;
        is_right(&image, &expected, &volume).await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn the_users_token_is_revoked_and_cinders_own_user_uploads() {
        let _lab = lab_lease::alone().await;
        let demo = Account::demo().await;
        let volume = small_volume(&demo, 11).await;
        let expected = volume.disk.digest(None).await;
        let theirs = Account::demo().await;
        let id = theirs.ask_for_upload(&volume, json!({})).await;
        demo.adopt_image(&id);
        until("the offer", seconds(20), || async { (!our_keys(&demo.image(&id).await).is_empty()).then_some(()) })
            .await;
        theirs.revoke().await;
        lab().service("restart", &["glance"]).await;
        let image = end_of_upload(&demo, &volume, &id).await;
        cinders_user_went_on(&id);
        took_the_native_path(&volume, "no daemon took it");
        is_right(&image, &expected, &volume).await;
        assert_eq!(image["owner"], demo.project_id.as_str(), "the image is the tenant's all the same");
    }

    fn cinders_user_went_on(image: &str) {
        let log = std::fs::read(lab().dir.join("log/cinder-volume.log")).unwrap();
        let told = format!("image {image}: the token of the user who makes it is over");
        assert!(String::from_utf8_lossy(&log).contains(&told), "Cinder's own user was not needed");
    }

    /// The tags of a hand-over are not requests, and request tags are no offer.
    #[tokio::test(flavor = "multi_thread")]
    async fn a_commit_without_an_offer_does_nothing() {
        let _lab = lab_lease::alone().await;
        let demo = Account::demo().await;
        let daemon = fast().start().await;
        let tags = ["rbd-offload-handover:go".to_owned(), format!("theirs-{}", unique())];
        let id = demo.create_image(&tags, json!({"disk_format": "raw", "container_format": "bare"})).await;
        pause(seconds(8)).await;
        assert_eq!(daemon.job(&id).await, None);
        assert_eq!(demo.image(&id).await["status"], "queued");
    }
}
