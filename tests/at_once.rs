//! Publishing at once on a real Ceph, Glance and Cinder: the image is active before it is copied, whatever happens to
//! it, its source and the daemon meanwhile.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::cloud::{Account, Volume, snapshot_tag};
use common::daemon::{Daemon, Setup};
use common::disk::{Digest, Disk};
use common::glance::{self, Reader};
use common::inventory::ClusterInventory;
use common::lab_lease;
use common::published::is_right;
use common::{MIB, PoolSetting, lab, pause, seconds, terminate, until};
use serde_json::{Value, json};

/// On an active image whose copy is not complete.
const COPYING: &str = "rbd-offload-copying";

fn at_once() -> Setup {
    Setup::default().set("offload", "publish", "at-once").set("offload", "detach_grace", "1s")
}

/// The copy behind the image takes half a minute and more.
fn slowly() -> Setup {
    at_once().set("offload", "objects_per_second", "20")
}

async fn become_active(account: &Account, image: &str, expected: &Digest) -> Value {
    let record = account.await_image(image, "active").await;
    // a client that opens it now reads what the source held
    assert_eq!(Disk::of_image(image).digest(Some("snap")).await, *expected, "an early reader");
    record
}

async fn is_done(account: &Account, daemon: &Daemon, image: &str, expected: &Digest, min_disk: u64) -> Value {
    let job = daemon.await_job(image, "done").await;
    let record = account.image(image).await;
    is_right(&record, expected, min_disk).await;
    assert!(!record["tags"].as_array().unwrap().contains(&json!(COPYING)), "{record:#}");
    assert!(Disk::of_image(image).facts().await.unwrap().metadata.is_empty(), "the ownership tag is taken off");
    job
}

async fn source_is_free(volume: &Volume, image: &str, snapshots: usize) {
    assert_eq!(volume.disk.facts().await.unwrap().snapshots.len(), snapshots);
    assert!(Disk::new("volumes", format!("rbd-offload.{image}.anchor")).facts().await.is_none(), "the anchor is left");
}

fn seconds_of(job: &Value, stage: &str) -> f64 {
    let stages = job["stages"].as_array().unwrap();
    stages.iter().find(|found| found["name"] == stage).and_then(|found| found["seconds"].as_f64()).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_is_an_image_before_it_is_copied_and_the_image_depends_on_nothing_in_the_end() {
    let _lab = lab_lease::alone().await;
    let (_reader, demo) = (Reader::new().await, Account::demo().await);
    let volume = demo.long_volume(48, 1).await;
    let expected = volume.disk.digest(None).await;
    let daemon = slowly().start().await;
    let id = demo.request(&volume).await;
    let record = become_active(&demo, &id, &expected).await;
    assert!(record["tags"].as_array().unwrap().contains(&json!(COPYING)), "{record:#}");
    assert!(Disk::of_image(&id).facts().await.unwrap().parent.is_some(), "it is copied already");
    daemon.await_job(&id, "detaching").await;

    // a volume is made from it meanwhile, and the source is overwritten
    let made = demo.create_volume(json!({"imageRef": id})).await;
    assert!(made.disk.facts().await.unwrap().parent.is_some(), "a clone of the image, not a download");
    volume.disk.write(9, &[(0, 48 * MIB)]).await;
    let refused = daemon.refused(&["cancel", &id]).await;
    assert!(refused.contains("only goes forward"), "{refused}");
    assert_eq!(daemon.metric("rbd_offload_images_detaching").await, 1.0);
    daemon.copy_at_full_speed().await;

    let job = is_done(&demo, &daemon, &id, &expected, 1).await;
    assert_eq!(job["method"], "server-copy");
    eprintln!("fill {:.1} s, detach {:.1} s", seconds_of(&job, "fill"), seconds_of(&job, "detach"));
    source_is_free(&volume, &id, 0).await;
    until("nothing depends on a source", seconds(20), || async {
        (daemon.metric("rbd_offload_images_detaching").await == 0.0).then_some(())
    })
    .await;
    daemon.await_idle().await;
    daemon.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_snapshot_as_source_gives_its_own_bytes() {
    let _lab = lab_lease::alone().await;
    let (_reader, demo) = (Reader::new().await, Account::demo().await);
    let volume = demo.small_volume(json!({}), 6).await;
    let snapshot = demo.create_snapshot(&volume).await;
    let expected = volume.disk.digest(None).await;
    volume.disk.write(7, &[(0, 5 * MIB), (50 * MIB, MIB)]).await;
    let daemon = at_once().start().await;
    let id = demo.create_image(&[snapshot_tag(&snapshot)], json!({})).await;
    become_active(&demo, &id, &expected).await;
    is_done(&demo, &daemon, &id, &expected, 1).await;
    source_is_free(&volume, &id, 1).await;
    daemon.await_idle().await;
    daemon.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn where_glance_may_not_read_the_volumes_the_job_publishes_when_copied() {
    let _lab = lab_lease::alone().await;
    let demo = Account::demo().await;
    glance::may_not_read_volumes().await;
    let daemon = at_once().start().await;
    for attempt in ["tried", "known"] {
        let volume = demo.small_volume(json!({}), 3).await;
        let expected = volume.disk.digest(None).await;
        let id = demo.request(&volume).await;
        demo.await_image(&id, "active").await;
        let job = is_done(&demo, &daemon, &id, &expected, 1).await;
        let note = job["fallback"].as_str().unwrap_or_default().to_owned();
        eprintln!("{attempt}: {note}");
        assert!(note.contains("at-once: "), "{job:#}");
        assert_eq!(note.contains("in the last hour"), attempt == "known", "{note}");
        source_is_free(&volume, &id, 0).await;
    }
    let log = daemon.log();
    assert!(log.contains("profile rbd-read-only pool=volumes"), "the capability is not named");
    daemon.await_idle().await;
    daemon.stop();
}

/// Rows of `check --probe`: name and result.
async fn probed(daemon: &Daemon) -> Vec<(String, String)> {
    let text = daemon.command(&["check", "--probe", "--json"]).await;
    let rows: Vec<Value> = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"));
    let told = |row: &Value, key: &str| row[key].as_str().unwrap_or_default().to_owned();
    let probes = rows.iter().filter(|row| told(row, "check").starts_with("probe "));
    probes.map(|row| (told(row, "check"), told(row, "result") + " " + &told(row, "detail"))).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn check_probes_from_end_to_end_whether_glance_takes_an_image_at_once() {
    let _lab = lab_lease::alone().await;
    let service = Account::service().await;
    let (images, cluster) = (service.image_ids().await, ClusterInventory::take().await);
    glance::may_not_read_volumes().await;
    let daemon = at_once().set("backend:ceph-offload", "pool", "volumes").start().await;
    let plain: Value = serde_json::from_str(&daemon.command(&["check", "--json"]).await).unwrap();
    let untried = |pool: &str| {
        let row = plain.as_array().unwrap().iter().find(|row| row["check"] == format!("at once from {pool}")).unwrap();
        (row["result"] == "warning", row["remedy"].as_str().unwrap().contains(&format!("rbd-read-only pool={pool}")))
    };
    assert_eq!((untried("volumes"), untried("volumes2")), ((true, true), (true, true)), "{plain:#}");
    let refused = probed(&daemon).await;
    let reader = glance::Reader::new().await;
    // Glance's own delete then leaves the image in the trash
    let trash = PoolSetting::new("images", "rbd_move_to_trash_on_remove", "true").await;
    let taken = probed(&daemon).await;
    drop(trash);
    assert_eq!((refused.len(), taken.len()), (4, 4), "two backends, at once and when copied: {refused:?} {taken:?}");
    for ((name, before), (_, after)) in refused.iter().zip(&taken) {
        let expected =
            if name.ends_with("at once") { "warning Glance refused the location" } else { "ok active after " };
        assert!(before.starts_with(expected), "{name}: {before}");
        assert!(after.starts_with("ok active after "), "{name}: {after}");
    }

    // one that is told to stop removes what it made
    let mut stopped = daemon.spawn_command(&["check", "--probe"]);
    until("the image of a probe", seconds(60), || async {
        lab().ceph("rbd", &["ls", "volumes"]).await.contains("rbd-offload.probe-").then_some(())
    })
    .await;
    pause(seconds(1)).await;
    terminate(&stopped);
    let output = tokio::task::block_in_place(|| stopped.wait()).unwrap();
    assert_eq!(output.code(), Some(1), "it says what it did not look at");
    let tries_pools = async || {
        let checking = daemon.spawn_command(&["check"]);
        until("the image of a pool's check", seconds(60), || async {
            lab().ceph("rbd", &["ls", "volumes"]).await.contains("rbd-offload.check-").then_some(())
        })
        .await;
        checking
    };
    // another one is told to stop while it tries the pools
    let mut stopped = tries_pools().await;
    terminate(&stopped);
    tokio::task::block_in_place(|| stopped.wait()).unwrap();
    // the OSDs answer the next one too late, unless it is through with the pools already
    for _ in 0..5 {
        let mut late = tries_pools().await;
        lab().ceph("ceph", &["osd", "set", "pause"]).await;
        pause(seconds(15)).await;
        lab().ceph("ceph", &["osd", "unset", "pause"]).await;
        if tokio::task::block_in_place(|| late.wait()).unwrap().code() == Some(1) {
            break;
        }
    }
    daemon.stop();
    assert_eq!(service.image_ids().await, images);
    let left = cluster.difference_beside_records().await;
    assert!(left.is_nothing(), "{left:?}");
    drop(reader);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_is_deleted_while_it_is_copied_leaves_no_object() {
    let _lab = lab_lease::alone().await;
    leaves_no_object_when_it_is_deleted(slowly()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_whose_data_lies_in_another_pool_is_whole_or_leaves_no_object_there() {
    let _lab = lab_lease::alone().await;
    leaves_no_object_when_it_is_deleted(slowly().set("glance", "data_pool", "ecdata")).await;

    let (_reader, demo) = (Reader::new().await, Account::demo().await);
    let volume = demo.small_volume(json!({}), 1).await;
    let expected = volume.disk.digest(None).await;
    let daemon = at_once().set("glance", "data_pool", "ecdata").start().await;
    let id = demo.request(&volume).await;
    become_active(&demo, &id, &expected).await;
    let job = is_done(&demo, &daemon, &id, &expected, 1).await;
    assert_eq!(job["method"], "server-copy");
    assert_eq!(Disk::of_image(&id).facts().await.unwrap().data_pool.as_deref(), Some("ecdata"));
    source_is_free(&volume, &id, 0).await;
    daemon.await_idle().await;
    daemon.stop();
}

async fn leaves_no_object_when_it_is_deleted(setup: Setup) {
    let (_reader, demo) = (Reader::new().await, Account::demo().await);
    let volume = demo.long_volume(48, 1).await;
    let daemon = setup.start().await;
    let before = ClusterInventory::take().await;
    let id = demo.request(&volume).await;
    demo.await_image(&id, "active").await;
    until("the first objects", seconds(60), || async {
        let job = daemon.job(&id).await?;
        (job["state"] == "detaching" && job["progress"].as_u64() > Some(0)).then_some(())
    })
    .await;
    // (Glance answers 500 while another of its workers hashes the image)
    until("Glance deletes the image", seconds(30), || async { (demo.delete_image(&id).await == 204).then_some(()) })
        .await;
    let job = daemon.await_job(&id, "cancelled").await;
    assert!(job["reason"].as_str().unwrap().contains("deleted before its copy was complete"), "{job:#}");
    source_is_free(&volume, &id, 0).await;
    daemon.await_idle().await;
    let difference = before.difference_beside_records().await;
    assert!(difference.is_nothing(), "{difference:#?}");
    daemon.stop();
}

/// Glance removes the snapshot first. The image stays while a client has it open for writing, as a daemon has that cuts
/// off its parent.
#[tokio::test(flavor = "multi_thread")]
async fn an_image_whose_delete_failed_meanwhile_can_be_cloned_in_the_end() {
    let _lab = lab_lease::alone().await;
    let (_reader, demo) = (Reader::new().await, Account::demo().await);
    let volume = demo.long_volume(48, 1).await;
    let expected = volume.disk.digest(None).await;
    let daemon = slowly().start().await;
    let id = demo.request(&volume).await;
    demo.await_image(&id, "active").await;
    daemon.await_job(&id, "detaching").await;
    // until Glance's hash is made, a delete breaks that off
    demo.await_tasks(&id).await;
    let mut watcher = lab().watch_image(&format!("images/{id}"));
    let has_watcher = || async {
        let said = lab().ceph("rbd", &["status", &format!("images/{id}")]).await;
        said.contains("watcher=").then_some(())
    };
    until("the watcher", seconds(20), has_watcher).await;
    let refused = demo.delete_image(&id).await;
    watcher.kill().unwrap();
    watcher.wait().unwrap();
    assert_eq!(refused, 409, "it is in use");
    assert_eq!(Disk::of_image(&id).facts().await.unwrap().snapshots.len(), 0, "this Glance keeps the snapshot");
    daemon.copy_at_full_speed().await;
    is_done(&demo, &daemon, &id, &expected, 1).await;
    daemon.await_idle().await;
    daemon.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_that_is_deleted_while_its_image_is_copied_goes_and_the_image_is_whole() {
    let _lab = lab_lease::alone().await;
    let (_reader, demo) = (Reader::new().await, Account::demo().await);
    let volume = demo.long_volume(48, 1).await;
    let expected = volume.disk.digest(None).await;
    let daemon = slowly().start().await;
    let id = demo.request(&volume).await;
    become_active(&demo, &id, &expected).await;
    daemon.await_job(&id, "detaching").await;
    demo.delete_volume(&volume).await;
    assert_eq!(Disk::of_image(&id).digest(Some("snap")).await, expected);
    daemon.copy_at_full_speed().await;
    is_done(&demo, &daemon, &id, &expected, 1).await;
    daemon.await_idle().await;
    assert!(volume.disk.facts().await.is_none());
    let trash = lab().ceph("rbd", &["trash", "ls", "--all", "volumes"]).await;
    assert!(!trash.contains(&volume.id), "{trash}");
    daemon.stop();
}

/// In a cluster whose clients are all new enough, clones keep the snapshot of their parent alive when it is deleted,
/// but not its name. A clone also sets a feature bit on the image that it is made from.
#[tokio::test(flavor = "multi_thread")]
async fn with_clones_of_format_2_a_source_snapshot_may_be_deleted_and_the_image_cloned_meanwhile() {
    let _lab = lab_lease::alone().await;
    let (_reader, demo) = (Reader::new().await, Account::demo().await);
    let _formats = (
        PoolSetting::new("volumes", "rbd_default_clone_format", "2").await,
        PoolSetting::new("images", "rbd_default_clone_format", "2").await,
    );
    let volume = demo.long_volume(48, 1).await;
    for (publish, method) in [("at-once", "server-copy"), ("when-copied", "server-copy"), ("when-copied", "clone")] {
        let expected = volume.disk.digest(None).await;
        let snapshot = demo.create_snapshot(&volume).await;
        volume.disk.write(9, &[(0, 48 * MIB)]).await;
        let setup = slowly().set("offload", "publish", publish).set("offload", "method", method);
        let daemon = setup.set("offload", "bandwidth_limit", "3MiB").start().await;
        let id = demo.create_image(&[snapshot_tag(&snapshot)], json!({})).await;
        if publish == "at-once" {
            become_active(&demo, &id, &expected).await;
        } else {
            let copy = Disk::of_image(&format!("rbd-offload.{id}"));
            until("the transfer", seconds(60), || async { copy.facts().await.map(drop) }).await;
        }
        demo.delete_snapshot(&snapshot).await;
        let child = if publish == "at-once" {
            let child = demo.create_volume(json!({"imageRef": id})).await;
            assert!(child.disk.facts().await.unwrap().parent.is_some(), "a clone of the image, not a download");
            Some(child)
        } else {
            None
        };
        daemon.copy_at_full_speed().await;
        let job = daemon.await_job(&id, "done").await;
        if let Some(child) = &child {
            demo.delete_volume(child).await;
        }
        is_done(&demo, &daemon, &id, &expected, 1).await;
        eprintln!("{publish}, {method}: {}", job["fallback"]);
        source_is_free(&volume, &id, 0).await;
        daemon.await_idle().await;
        daemon.stop();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_that_is_killed_behind_an_active_image_is_followed_by_another() {
    let _lab = lab_lease::alone().await;
    let (_reader, demo) = (Reader::new().await, Account::demo().await);
    let volume = demo.long_volume(48, 1).await;
    let expected = volume.disk.digest(None).await;
    let setup = slowly();
    let first = setup.start().await;
    let id = demo.request(&volume).await;
    become_active(&demo, &id, &expected).await;
    let copied = until("some objects are copied, and the record says so", seconds(60), || async {
        first.job(&id).await.and_then(|job| job["fill"]["next_object"].as_u64()).filter(|next| *next > 4)
    })
    .await;
    first.kill();
    assert_eq!(Disk::of_image(&id).digest(Some("snap")).await, expected);
    let next = setup.set("offload", "objects_per_second", "0").start().await;
    let job = is_done(&demo, &next, &id, &expected, 1).await;
    assert!(job["fill"]["next_object"].as_u64() >= Some(copied), "{job:#}");
    next.await_idle_after_kills().await;
    source_is_free(&volume, &id, 0).await;
    next.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_behind_an_active_image_ends_in_time_and_the_next_daemon_goes_on() {
    let _lab = lab_lease::alone().await;
    let (_reader, demo) = (Reader::new().await, Account::demo().await);
    let volume = demo.long_volume(48, 1).await;
    let expected = volume.disk.digest(None).await;
    let setup = slowly();
    let first = setup.start().await;
    let id = demo.request(&volume).await;
    become_active(&demo, &id, &expected).await;
    daemon_copies(&first, &id).await;
    let (status, took) = first.terminate();
    assert!(status.success(), "{status}");
    assert!(took < seconds(40), "{took:?}");
    let job = first.job(&id).await.unwrap();
    assert_eq!((&job["state"], &job["owner"]), (&json!("detaching"), &Value::Null), "given back: {job:#}");
    let next = setup.set("offload", "objects_per_second", "0").start().await;
    is_done(&demo, &next, &id, &expected, 1).await;
    next.await_idle().await;
    source_is_free(&volume, &id, 0).await;
    next.stop();
}

async fn daemon_copies(daemon: &Daemon, id: &str) {
    until("the copy behind the image", seconds(60), || async {
        let job = daemon.job(id).await?;
        (job["state"] == "detaching" && job["owner"] != Value::Null).then_some(())
    })
    .await;
}
