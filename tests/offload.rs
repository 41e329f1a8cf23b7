//! From a request to an active image, or to a sentence that says why not, on a real Ceph, RabbitMQ, Keystone, Glance
//! and Cinder: the lab that `make test` starts.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::collections::BTreeMap;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::broker::Broker;
use common::census::Census;
use common::cloud::{Account, Volume, nothing_is_left_of, snapshot_tag, volume_tag};
use common::daemon::{Daemon, Setup, command};
use common::disk::{Digest, Disk};
use common::stage::{Kind, alone, with};
use common::{GIB, MIB, lab, pause, seconds, unique, until};
use futures::future::join_all;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// RBD features of every published image: layering, exclusive-lock, object-map, fast-diff, deep-flatten.
const FEATURES: u64 = 1 | 4 | 8 | 16 | 32;

/// What the daemon makes must be indistinguishable from what Glance's own driver leaves, and have the source's bytes.
async fn is_right(image: &Value, expected: &Digest, min_disk: u64) {
    let id = image["id"].as_str().unwrap();
    let disk = Disk::of_image(id);
    assert_eq!(disk.digest(None).await, *expected, "bytes of image {id}");
    assert_eq!(disk.digest(Some("snap")).await, *expected, "bytes of the snapshot of image {id}");

    assert_eq!(image["status"], "active");
    assert_eq!((&image["disk_format"], &image["container_format"]), (&json!("raw"), &json!("bare")));
    assert_eq!(image["min_disk"], min_disk);
    assert_eq!(image["size"], expected.size);
    let ours: Vec<_> = image.as_object().unwrap().keys().filter(|key| key.starts_with("rbd_offload_")).collect();
    assert!(ours.is_empty(), "left on the record: {ours:?}");
    let tags = image["tags"].as_array().unwrap();
    assert!(tags.iter().any(|tag| tag.as_str().unwrap().starts_with("rbd-offload:")), "provenance: {tags:?}");
    let location = format!("rbd://{}/images/{id}/snap", lab().fsid);
    assert_eq!(Account::service().await.locations(id).await, [location]);

    let facts = disk.facts().await.unwrap();
    assert_eq!(facts.features, FEATURES);
    assert_eq!(facts.flags, 0, "the object map is invalid");
    assert_eq!(facts.parent, None);
    assert_eq!(facts.snapshots, BTreeMap::from([("snap".to_owned(), true)]));
    let said = lab().ceph("rbd", &["object-map", "check", "--no-progress", &format!("images/{id}@snap")]).await;
    assert_eq!(said, "", "object map");
}

/// The source has nothing of ours left.
async fn source_is_as_before(volume: &Volume, snapshots: usize) {
    let facts = volume.disk.facts().await.unwrap();
    assert_eq!(facts.snapshots.len(), snapshots, "{:?}", facts.snapshots);
    assert_eq!(facts.lockers, 0);
}

/// Asks for the volume, and holds the image to its bytes.
async fn offloads(daemon: &Daemon, account: &Account, volume: &Volume, min_disk: u64) -> String {
    let expected = volume.disk.digest(None).await;
    let snapshots = volume.disk.facts().await.unwrap().snapshots.len();
    let id = account.request(volume).await;
    let image = account.await_image(&id, "active").await;
    is_right(&image, &expected, min_disk).await;
    let job = daemon.await_job(&id, "done").await;
    assert_eq!(job["reason"], Value::Null, "{job:#}");
    assert_eq!(Disk::of_image(&id).facts().await.unwrap().metadata, BTreeMap::new(), "our mark is taken off");
    assert!(Disk::of_image(&format!("rbd-offload.{id}")).facts().await.is_none());
    source_is_as_before(volume, snapshots).await;
    id
}

/// The shapes of a source, for one method of transfer.
macro_rules! shapes {
    ($method:ident, $kind:ident, $name:literal) => {
        mod $method {
            use super::*;

            const KIND: Kind = Kind::$kind;

            #[tokio::test(flavor = "multi_thread")]
            async fn a_volume_becomes_an_image_that_volumes_are_made_from() {
                let (_stage, daemon) = with(KIND).await;
                let demo = Account::demo().await;
                let volume = demo.small_volume(json!({}), 1).await;
                let id = offloads(&daemon, &demo, &volume, 1).await;
                assert_eq!(daemon.job(&id).await.unwrap()["method"], $name);

                let made = demo.create_volume(json!({"imageRef": id})).await;
                let facts = made.disk.facts().await.unwrap();
                assert!(facts.parent.is_some(), "a clone of the image, not a download: {facts:?}");
                made.disk.resize(64 * MIB).await;
                assert_eq!(made.disk.digest(None).await, volume.disk.digest(None).await);
            }

            #[tokio::test(flavor = "multi_thread")]
            async fn a_clone_of_an_image_and_a_clone_of_that_hold_what_only_their_parents_have() {
                let (_stage, daemon) = with(KIND).await;
                let demo = Account::demo().await;
                // an image as everybody uploads it
                let image = demo.create_image(&[], json!({"disk_format": "raw", "container_format": "bare"})).await;
                let bytes: Vec<u8> = (0..24 * MIB).map(|n| (n % 251) as u8).collect();
                assert_eq!(demo.upload(&image, bytes).await, 204);
                demo.await_tasks(&image).await;

                let clone = demo.create_volume(json!({"imageRef": image})).await;
                assert!(clone.disk.facts().await.unwrap().parent.is_some(), "the lab's Cinder makes clones");
                clone.disk.resize(64 * MIB).await;
                clone.disk.write(2, &[(5 * MIB + 100, 4096), (40 * MIB, 2 * MIB)]).await;
                let metadata = json!({"os-set_image_metadata": {"metadata": {"hw_disk_bus": "scsi", "os_type": "linux"}}});
                demo.volume_action(&clone.id, metadata).await;
                let id = offloads(&daemon, &demo, &clone, 1).await;
                let record = demo.image(&id).await;
                assert_eq!((&record["hw_disk_bus"], &record["os_type"]), (&json!("scsi"), &json!("linux")));

                let second = demo.clone_volume(&clone).await;
                second.disk.write(3, &[(6 * MIB, 5000)]).await;
                assert!(second.disk.facts().await.unwrap().parent.is_some());
                offloads(&daemon, &demo, &second, 1).await;
            }

            #[tokio::test(flavor = "multi_thread")]
            async fn an_extended_volume_is_whole() {
                let (_stage, daemon) = with(KIND).await;
                let demo = Account::demo().await;
                let volume = demo.create_volume(json!({})).await;
                volume.disk.write(4, &[(0, MIB), (GIB - MIB, MIB)]).await;
                demo.volume_action(&volume.id, json!({"os-extend": {"new_size": 2}})).await;
                demo.await_volume(&volume.id, "available").await;
                volume.disk.write(5, &[(GIB, 5000), (2 * GIB - 10, 10)]).await;
                offloads(&daemon, &demo, &volume, 2).await;
            }

            #[tokio::test(flavor = "multi_thread")]
            async fn a_snapshot_as_source_gives_its_own_bytes_not_the_volumes() {
                let (_stage, daemon) = with(KIND).await;
                let demo = Account::demo().await;
                let volume = demo.small_volume(json!({}), 6).await;
                let snapshot = demo.create_snapshot(&volume).await;
                let expected = volume.disk.digest(None).await;
                volume.disk.write(7, &[(0, 5 * MIB), (50 * MIB, MIB)]).await;
                let id = demo.create_image(&[snapshot_tag(&snapshot)], json!({})).await;
                let image = demo.await_image(&id, "active").await;
                is_right(&image, &expected, 1).await;
                daemon.await_job(&id, "done").await;
                source_is_as_before(&volume, 1).await;
            }

            #[tokio::test(flavor = "multi_thread")]
            async fn another_backend_and_an_empty_volume() {
                let (_stage, daemon) = with(KIND).await;
                let demo = Account::demo().await;
                let other = demo.small_volume(json!({"volume_type": "ceph2"}), 8).await;
                offloads(&daemon, &demo, &other, 1).await;
                let empty = demo.create_volume(json!({})).await;
                offloads(&daemon, &demo, &empty, 1).await;
            }
        }
    };
}

shapes!(clone, Clone, "clone");
shapes!(copy, Copy, "copy");
