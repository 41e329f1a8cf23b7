//! From a request to an active image, or to a sentence that says why not, on a real Ceph, RabbitMQ, Keystone, Glance
//! and Cinder: the lab that `make test` starts.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::collections::BTreeMap;
use std::process::Command;
use std::sync::Mutex;
use std::time::Instant;

use common::broker::Broker;
use common::cloud::{Account, Volume, nothing_is_left_of, snapshot_tag, volume_tag};
use common::daemon::{Daemon, Setup};
use common::disk::{self, Disk};
use common::inventory::ClusterInventory;
use common::lab_lease::{self, Kind, with};
use common::published::is_right;
use common::{GIB, MIB, PoolSetting, lab, pause, seconds, unique, until};
use futures::future::join_all;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;

/// Ways of transfer.
const METHODS: [&str; 3] = ["server-copy", "clone", "copy"];

/// The source has nothing of ours left, once its last handle is closed.
async fn source_is_as_before(volume: &Volume, snapshots: usize) {
    let facts = volume.disk.unlocked_facts().await;
    assert_eq!(facts.snapshots.len(), snapshots, "{:?}", facts.snapshots);
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
    assert_eq!(Disk::of_image(&id).facts().await.unwrap().metadata, BTreeMap::new(), "the ownership tag is taken off");
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
                let (_lab, daemon) = with(KIND).await;
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
                let (_lab, daemon) = with(KIND).await;
                let demo = Account::demo().await;
                // an image that was uploaded
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
            async fn the_image_of_an_extended_volume_is_whole() {
                let (_lab, daemon) = with(KIND).await;
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
                let (_lab, daemon) = with(KIND).await;
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
            async fn volumes_of_another_backend_and_empty_volumes_become_images() {
                let (_lab, daemon) = with(KIND).await;
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
shapes!(server_copy, ServerCopy, "server-copy");

/// Glance's images have their data in a pool of its own where the pool has `rbd_default_data_pool`, or Glance's client
/// alone has it, which no other client sees.
#[tokio::test(flavor = "multi_thread")]
async fn the_data_of_an_image_lies_where_that_of_glances_own_images_does() {
    let _lab = lab_lease::alone().await;
    let demo = Account::demo().await;
    let volume = demo.small_volume(json!({}), 1).await;
    let of_pool = PoolSetting::new("images", "rbd_default_data_pool", "ecdata").await;
    for method in METHODS {
        let daemon = Setup::default().set("offload", "method", method).start().await;
        has_its_data_in_ecdata(&daemon, &demo, &volume, method).await;
        daemon.stop();
    }
    drop(of_pool);
    for method in METHODS {
        let setup = Setup::default().set("offload", "method", method).set("glance", "data_pool", "ecdata");
        let daemon = setup.start().await;
        has_its_data_in_ecdata(&daemon, &demo, &volume, method).await;
        daemon.stop();
    }
}

async fn has_its_data_in_ecdata(daemon: &Daemon, account: &Account, volume: &Volume, method: &str) {
    let id = offloads(daemon, account, volume, 1).await;
    assert_eq!(daemon.job(&id).await.unwrap()["method"], method);
    let facts = Disk::of_image(&id).facts().await.unwrap();
    assert_eq!(facts.data_pool.as_deref(), Some("ecdata"), "{method}");
    account.await_tasks(&id).await;
    // nothing of it is left in either pool, which is looked at when the test ends
    assert_eq!(account.delete_image(&id).await, 204);
}

/// An image for this tag was declined; the sentence, with the source's id taken out.
async fn declined_sentence(account: &Account, tag: String) -> String {
    let id = account.create_image(std::slice::from_ref(&tag), json!({})).await;
    let message = account.await_declined(&id).await;
    message.replace(tag.rsplit(':').next().unwrap(), "ID")
}

/// What a disk image program writes at the start of a file of that format.
async fn container_header(format: &str, options: &[&str]) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("disk");
    let mut create = Command::new("qemu-img");
    create.args(["create", "-q", "-f", format]).args(options).arg(&file).arg("16M");
    let (well, said) = common::run(&mut create).await;
    assert!(well, "qemu-img: {said}");
    let mut bytes = std::fs::read(&file).unwrap();
    bytes.truncate(32 << 10);
    bytes
}

/// What cannot be done is declined with a sentence that helps; nothing is written, and nothing left.
mod declined {
    use super::*;

    const KIND: Kind = Kind::Narrow;

    #[tokio::test(flavor = "multi_thread")]
    async fn another_tenants_source_reads_the_same_as_a_missing_one() {
        let (_lab, _daemon) = with(KIND).await;
        let (demo, demo2) = (Account::demo().await, Account::demo2().await);
        let theirs = demo2.small_volume(json!({}), 1).await;
        let snapshot = demo2.create_snapshot(&theirs).await;
        let missing = uuid::Uuid::new_v4().to_string();
        let (volume, no_volume, snap, no_snap) = tokio::join!(
            declined_sentence(&demo, volume_tag(&theirs.id)),
            declined_sentence(&demo, volume_tag(&missing)),
            declined_sentence(&demo, snapshot_tag(&snapshot)),
            declined_sentence(&demo, snapshot_tag(&missing)),
        );
        assert_eq!(volume, no_volume);
        assert_eq!(snap, no_snap);
        assert_eq!(theirs.disk.facts().await.unwrap().snapshots.len(), 1);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_volume_in_use_or_encrypted_or_on_another_backend_is_not_taken() {
        let (_lab, daemon) = with(KIND).await;
        let demo = Account::demo().await;
        let declines = ["busy", "encrypted", "no_backend"].map(|reason| {
            format!(
                "rbd_offload_jobs_ended_total{{state=\"declined\",reason=\"{reason}\",trigger=\"request\",method=\"none\"}}"
            )
        });
        let before = join_all(declines.iter().map(|series| daemon.metric(series))).await;
        let (used, encrypted, elsewhere) = tokio::join!(
            demo.small_volume(json!({}), 1),
            demo.create_volume(json!({"volume_type": "luks"})),
            demo.create_volume(json!({"volume_type": "ceph2"})),
        );
        demo.attach(&used).await;
        let sentence = declined_sentence(&demo, volume_tag(&used.id)).await;
        demo.detach(&used).await;
        assert!(sentence.contains("in-use") && sentence.contains("available"), "{sentence}");
        let sentence = declined_sentence(&demo, volume_tag(&encrypted.id)).await;
        assert!(sentence.contains("encrypted"), "{sentence}");
        let sentence = declined_sentence(&demo, volume_tag(&elsewhere.id)).await;
        assert!(sentence.contains("ceph2"), "{sentence}");
        for volume in [&used, &encrypted, &elsewhere] {
            source_is_as_before(volume, 0).await;
        }
        for (series, before) in declines.iter().zip(before) {
            until(series, seconds(10), || async { (daemon.metric(series).await > before).then_some(()) }).await;
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_source_that_takes_no_snapshot_or_is_no_primary_is_not_copied() {
        let _lab = lab_lease::alone().await;
        let demo = Account::demo().await;
        let (limited, mirror) = tokio::join!(demo.small_volume(json!({}), 1), demo.small_volume(json!({}), 1));
        let of = |volume: &Volume| format!("volumes/volume-{}", volume.id);
        let (limited_disk, mirror_disk) = (of(&limited), of(&mirror));
        let daemon = Setup::default().start().await;

        let theirs = format!("{limited_disk}@theirs");
        lab().ceph("rbd", &["snap", "create", &theirs]).await;
        lab().ceph("rbd", &["snap", "limit", "set", "--limit", "1", &limited_disk]).await;
        let sentence = declined_sentence(&demo, volume_tag(&limited.id)).await;
        assert!(sentence.contains("as many as its limit allows"), "{sentence}");
        source_is_as_before(&limited, 1).await;
        lab().ceph("rbd", &["snap", "limit", "clear", &limited_disk]).await;
        lab().ceph("rbd", &["snap", "rm", &theirs]).await;
        offloads(&daemon, &demo, &limited, 1).await;

        // by snapshots and by a journal: the one is seen in the features, the other when the snapshot is made
        lab().ceph("rbd", &["mirror", "pool", "enable", "volumes", "image"]).await;
        for mode in ["snapshot", "journal"] {
            lab().ceph("rbd", &["mirror", "image", "enable", &mirror_disk, mode]).await;
            lab().ceph("rbd", &["mirror", "image", "demote", &mirror_disk]).await;
            let sentence = declined_sentence(&demo, volume_tag(&mirror.id)).await;
            assert!(sentence.contains("primary is in another cluster"), "{mode}: {sentence}");
            lab().ceph("rbd", &["mirror", "image", "promote", &mirror_disk]).await;
            lab().ceph("rbd", &["mirror", "image", "disable", &mirror_disk]).await;
        }
        lab().ceph("rbd", &["mirror", "pool", "disable", "volumes"]).await;
        lab().ceph("rados", &["-p", "volumes", "rm", "rbd_mirroring"]).await;
        source_is_as_before(&mirror, 0).await;

        drop(daemon);
        // limits of Glance that its API does not tell
        for (key, limit) in [("image_size_cap", "32MiB"), ("user_storage_quota", "1MiB")] {
            let daemon = Setup::default().set("glance", key, limit).start().await;
            let sentence = declined_sentence(&demo, volume_tag(&limited.id)).await;
            assert!(sentence.contains(key), "{sentence}");
            drop(daemon);
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_disk_that_begins_like_a_container_format_is_not_registered_as_raw() {
        let (_lab, daemon) = with(KIND).await;
        let demo = Account::demo().await;
        let flat = ["-o", "subformat=monolithicFlat"];
        let formats: [(&str, &str, &[&str]); 9] = [
            ("qcow", "qcow", &[]),
            ("qcow2", "qcow2", &[]),
            ("qed", "qed", &[]),
            ("vmdk", "vmdk", &[]),
            ("vmdk", "vmdk", &flat),
            ("vhd", "vpc", &["-o", "subformat=dynamic"]),
            ("vhdx", "vhdx", &[]),
            ("vdi", "vdi", &[]),
            ("parallels", "parallels", &[]),
        ];
        let tries = formats.map(|(name, format, options)| {
            let demo = &demo;
            async move {
                let volume = demo.small_volume(json!({}), 1).await;
                volume.disk.put(0, &container_header(format, options).await).await;
                let sentence = declined_sentence(demo, volume_tag(&volume.id)).await;
                assert!(sentence.to_lowercase().contains(name), "{name}: {sentence}");
                source_is_as_before(&volume, 0).await;
            }
        });
        join_all(tries).await;
        // what partitions a disk is no container: gpt and mbr are raw
        let volume = demo.small_volume(json!({}), 1).await;
        let mut mbr = vec![0; 512];
        mbr[446..462].copy_from_slice(&[0x80, 0, 2, 0, 0x83, 0, 3, 0, 0, 8, 0, 0, 0, 8, 1, 0]);
        mbr[510..].copy_from_slice(&[0x55, 0xaa]);
        volume.disk.put(0, &mbr).await;
        offloads(&daemon, &demo, &volume, 1).await;
    }

    /// As stock Cinder's upload: the volume's type names the store. The lab's `file` is none of Ceph's.
    #[tokio::test(flavor = "multi_thread")]
    async fn a_volume_whose_type_asks_for_another_glance_store() {
        let (_lab, daemon) = with(KIND).await;
        let (demo, service) = (Account::demo().await, Account::service().await);
        let of = async |store: &str| {
            let name = service.volume_type_of_store(store).await;
            demo.small_volume(json!({"volume_type": name}), 1).await
        };
        let (ceph, file) = (of("ceph").await, of("file").await);
        let sentence = declined_sentence(&demo, volume_tag(&file.id)).await;
        assert!(sentence.contains("Glance store \"file\""), "{sentence}");
        source_is_as_before(&file, 0).await;
        offloads(&daemon, &demo, &ceph, 1).await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_record_that_is_not_raw_and_bare_or_wants_a_signature_checked() {
        let (_lab, _daemon) = with(KIND).await;
        let demo = Account::demo().await;
        let volume = demo.small_volume(json!({}), 1).await;
        for (record, word) in [
            (json!({"disk_format": "qcow2", "container_format": "bare"}), "disk_format"),
            (json!({"disk_format": "raw", "container_format": "ovf"}), "container_format"),
            (json!({"img_signature": "c2ln", "img_signature_uuid": unique()}), "signature"),
        ] {
            let id = demo.create_image(&[volume_tag(&volume.id)], record.clone()).await;
            let sentence = demo.await_declined(&id).await;
            assert!(sentence.contains(word), "{sentence}");
            let now = demo.image(&id).await;
            for (key, value) in record.as_object().unwrap() {
                assert_eq!(&now[key], value, "the record is the tenant's");
            }
        }
        source_is_as_before(&volume, 0).await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_thousand_garbage_tags_are_taken_off_in_bounded_time() {
        let (_lab, daemon) = with(KIND).await;
        let demo = Account::demo().await;
        let id = uuid::Uuid::new_v4();
        let kinds = [
            "volume",
            "snapshot",
            "instance",
            "disk",
            "Volume",
            "",
            "volume:volume",
            "\u{202e}volume",
            "%s",
            "../volume",
        ];
        let tails = [
            String::new(),
            id.simple().to_string(),
            format!("{id} "),
            format!("{id}0"),
            format!("{{{}}}", &id.to_string()[..34]),
            "0".repeat(36),
            "-".repeat(36),
            "\u{e9}".repeat(18),
            "../../etc/passwd".into(),
            "x".repeat(200),
        ];
        let mut garbage: Vec<String> = Vec::new();
        for kind in kinds {
            garbage.extend(tails.iter().map(|tail| format!("rbd-offload:{kind}:{tail}")));
        }
        let begun = Instant::now();
        // one a record, and then many
        let single =
            join_all(garbage.iter().take(60).map(|tag| demo.create_image(std::slice::from_ref(tag), json!({})))).await;
        let mut many = Vec::new();
        for n in 0..9 {
            let tags: Vec<_> = (0..104).map(|m| format!("rbd-offload:{}:{n}-{m}", kinds[m % kinds.len()])).collect();
            many.push(demo.create_image(&tags, json!({})).await);
        }
        for id in single.iter().chain(&many) {
            demo.await_end(id, "declined").await;
        }
        let took = begun.elapsed();
        eprintln!("a thousand garbage tags: {took:?}");
        assert!(took < seconds(180), "{took:?}");
        daemon.await_health(200).await;
        for id in many {
            nothing_is_left_of(&id).await;
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn two_request_tags_are_declined_and_other_tags_stay() {
        let (_lab, daemon) = with(KIND).await;
        let demo = Account::demo().await;
        let volume = demo.small_volume(json!({}), 1).await;
        let tags = [volume_tag(&volume.id), volume_tag(&uuid::Uuid::new_v4().to_string()), "blue".into()];
        let id = demo.create_image(&tags, json!({})).await;
        let sentence = demo.await_declined(&id).await;
        assert!(sentence.contains("exactly one"), "{sentence}");
        assert_eq!(demo.image(&id).await["tags"], json!(["blue"]));

        // it stays the tenant's: a new tag is a new request
        let expected = volume.disk.digest(None).await;
        demo.add_tag(&id, &volume_tag(&volume.id)).await;
        let image = demo.await_another_try(&id, seconds(120)).await;
        is_right(&image, &expected, 1).await;
        daemon.await_job(&id, "done").await;
        source_is_as_before(&volume, 0).await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn after_a_decline_a_plain_upload_works() {
        let (_lab, _daemon) = with(KIND).await;
        let demo = Account::demo().await;
        let record = json!({"disk_format": "raw", "container_format": "bare"});
        let id = demo.create_image(&[volume_tag(&uuid::Uuid::new_v4().to_string())], record).await;
        demo.await_declined(&id).await;
        assert_eq!(demo.upload(&id, vec![7; 1 << 20]).await, 204);
        assert_eq!(demo.await_image(&id, "active").await["size"], MIB);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn an_image_that_is_active_or_being_uploaded_is_not_touched() {
        let (_lab, daemon) = with(KIND).await;
        let demo = Account::demo().await;
        let volume = demo.small_volume(json!({}), 1).await;
        let record = json!({"disk_format": "raw", "container_format": "bare"});

        let active = demo.create_image(&[], record.clone()).await;
        assert_eq!(demo.upload(&active, vec![7; 1 << 20]).await, 204);
        let bytes = Disk::of_image(&active).digest(Some("snap")).await;
        demo.add_tag(&active, &volume_tag(&volume.id)).await;

        let saving = demo.create_image(&[], record).await;
        let mut upload = demo.begin_upload(&saving, 2 << 20).await;
        upload.write_all(&vec![8; 1 << 20]).await.unwrap();
        demo.await_image(&saving, "saving").await;
        demo.add_tag(&saving, &volume_tag(&volume.id)).await;

        // a later request is done: the daemon has seen these two
        let later = demo.request(&volume).await;
        demo.await_image(&later, "active").await;
        daemon.await_idle().await;
        pause(seconds(2)).await;
        upload.write_all(&vec![8; 1 << 20]).await.unwrap();
        demo.await_image(&saving, "active").await;
        assert_eq!(Disk::of_image(&active).digest(Some("snap")).await, bytes);
        assert_eq!(Disk::of_image(&saving).facts().await.unwrap().size, 2 * MIB);
        // (at the end of an upload Glance writes the tags of its beginning)
        assert_eq!(demo.image(&active).await["tags"], json!([volume_tag(&volume.id)]));
        for id in [&active, &saving] {
            let image = demo.image(id).await;
            assert!(image.as_object().unwrap().keys().all(|key| !key.starts_with("rbd_offload_")), "{image:#}");
            assert_eq!(Account::service().await.locations(id).await.len(), 1);
        }
        source_is_as_before(&volume, 0).await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_writer_that_was_there_first_keeps_the_name() {
        let (_lab, daemon) = with(KIND).await;
        let demo = Account::demo().await;
        let volume = demo.small_volume(json!({}), 1).await;
        let id = demo.create_image(&[], json!({})).await;
        let theirs = Disk::of_image(&id);
        theirs.create(8 * MIB).await;
        theirs.write(9, &[(0, MIB)]).await;
        let before = theirs.digest(None).await;
        demo.add_tag(&id, &volume_tag(&volume.id)).await;
        demo.await_end(&id, "declined").await;
        assert_eq!(theirs.digest(None).await, before);
        assert!(Disk::of_image(&format!("rbd-offload.{id}")).facts().await.is_none());
        source_is_as_before(&volume, 0).await;
        daemon.await_job(&id, "declined").await;
        // not even the reconciler touches it
        pause(seconds(12)).await;
        assert_eq!(theirs.digest(None).await, before);
        theirs.remove().await;
    }
}

/// What happens while the bytes are on their way.
mod meanwhile {
    use super::*;

    const KIND: Kind = Kind::Slow;

    async fn await_copying(daemon: &Daemon, id: &str) {
        daemon.await_job(id, "copying").await;
        until("its private copy", seconds(60), || async {
            Disk::of_image(&format!("rbd-offload.{id}")).facts().await.map(drop)
        })
        .await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn an_image_deleted_while_it_waits_or_is_copied_leaves_nothing() {
        let (_lab, daemon) = with(KIND).await;
        let demo = Account::demo().await;
        let volume = demo.small_volume(json!({}), 1).await;
        volume.disk.write(2, &[(0, 60 * MIB)]).await;
        let copied = [demo.request(&volume).await, demo.request(&volume).await];
        await_copying(&daemon, &copied[0]).await;
        // there is room for two
        let waiting = [demo.request(&volume).await, demo.request(&volume).await, demo.request(&volume).await];
        for id in copied.iter().chain(&waiting) {
            assert_eq!(demo.delete_image(id).await, 204);
        }
        let begun = Instant::now();
        for id in copied.iter().chain(&waiting) {
            until("the end of the job", seconds(60), || async {
                let job = daemon.job(id).await;
                job.is_none_or(|job| job["state"] == "cancelled").then_some(())
            })
            .await;
            nothing_is_left_of(id).await;
        }
        assert!(begun.elapsed() < seconds(20), "{:?}", begun.elapsed());
        source_is_as_before(&volume, 0).await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn the_tenant_sees_the_progress_and_the_image_equals_the_moment_of_the_request() {
        let (_lab, daemon) = with(KIND).await;
        let demo = Account::demo().await;
        let volume = demo.small_volume(json!({}), 1).await;
        volume.disk.write(2, &[(0, 60 * MIB)]).await;
        let expected = volume.disk.digest(None).await;
        let id = demo.request(&volume).await;
        await_copying(&daemon, &id).await;
        // the operator sees which stage runs
        let running = until("the stage that runs", seconds(20), || async {
            let job: Value = serde_json::from_str(&daemon.command(&["show", &id, "--json"]).await).unwrap();
            let stages = job["stages"].as_array().unwrap();
            stages.iter().find(|stage| stage["seconds"].is_null()).map(|stage| stage["name"].clone())
        })
        .await;
        assert_eq!(running, "transfer");
        // the guest goes on writing
        volume.disk.write(3, &[(0, 2 * MIB), (30 * MIB, MIB), (62 * MIB, MIB)]).await;
        let seen = Mutex::new(Vec::new());
        let image = until("active", seconds(120), || async {
            let image = demo.image(&id).await;
            if let Some(progress) = image["rbd_offload_progress"].as_str() {
                let status = image["rbd_offload_status"].as_str().unwrap().to_owned();
                seen.lock().unwrap().push((status, progress.parse::<u8>().unwrap()));
            }
            (image["status"] == "active").then_some(image)
        })
        .await;
        let mut seen = seen.into_inner().unwrap();
        is_right(&image, &expected, 1).await;
        let job = daemon.await_job(&id, "done").await;
        assert!(job["stages"].as_array().unwrap().iter().all(|stage| stage["seconds"].is_number()), "{job:#}");
        seen.dedup();
        assert!(seen.iter().any(|(status, progress)| status == "copying" && (1..100).contains(progress)), "{seen:?}");
        assert!(seen.is_sorted_by_key(|(_, progress)| *progress), "{seen:?}");
        source_is_as_before(&volume, 0).await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_writer_that_takes_the_name_first_wins() {
        let (_lab, daemon) = with(KIND).await;
        let demo = Account::demo().await;
        let volume = demo.small_volume(json!({}), 1).await;
        volume.disk.write(2, &[(0, 40 * MIB)]).await;
        let id = demo.request(&volume).await;
        await_copying(&daemon, &id).await;
        let theirs = Disk::of_image(&id);
        theirs.create(8 * MIB).await;
        theirs.write(9, &[(0, MIB)]).await;
        let before = theirs.digest(None).await;
        demo.await_end(&id, "declined").await;
        daemon.await_job(&id, "declined").await;
        assert_eq!(theirs.digest(None).await, before);
        assert!(Disk::of_image(&format!("rbd-offload.{id}")).facts().await.is_none());
        source_is_as_before(&volume, 0).await;
        pause(seconds(12)).await;
        assert_eq!(theirs.digest(None).await, before, "the reconciler leaves it alone");
        theirs.remove().await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_tenant_that_uploads_meanwhile_wins() {
        let (_lab, daemon) = with(KIND).await;
        let demo = Account::demo().await;
        let volume = demo.small_volume(json!({}), 1).await;
        volume.disk.write(2, &[(0, 40 * MIB)]).await;
        let id = demo.request(&volume).await;
        await_copying(&daemon, &id).await;
        assert_eq!(demo.upload(&id, vec![7; 3 << 20]).await, 204);
        daemon.await_job(&id, "declined").await;
        assert_eq!(demo.image(&id).await["status"], "active");
        assert_eq!(Disk::of_image(&id).facts().await.unwrap().size, 3 * MIB);
        assert_eq!(Account::service().await.locations(&id).await.len(), 1);
        assert!(Disk::of_image(&format!("rbd-offload.{id}")).facts().await.is_none());
        source_is_as_before(&volume, 0).await;
    }
}

/// Cinder deletes the source while it is copied, with the capabilities that Ceph's manual gives it.
mod deleted {
    use super::*;

    /// A daemon that copies so slowly that the source is gone before the copy is there.
    fn slowly(method: &str) -> Setup {
        Setup::default().set("offload", "method", method).set("offload", "bandwidth_limit", "4MiB").set(
            "offload",
            "objects_per_second",
            "80",
        )
    }

    async fn anchor_of(id: &str) -> Option<()> {
        Disk::new("volumes", format!("rbd-offload.{id}.anchor")).facts().await.map(drop)
    }

    /// What Cinder calls gone leaves nothing behind, the RBD trash included; and so does the job.
    async fn nothing_is_left(daemon: &Daemon, id: &str, volume: &Volume) {
        daemon.await_idle().await;
        assert!(volume.disk.facts().await.is_none());
        assert!(anchor_of(id).await.is_none(), "the anchor is still there");
        let trash = lab().ceph("rbd", &["trash", "ls", "--all", "volumes"]).await;
        assert!(!trash.contains(&volume.id), "{trash}");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_volume_deleted_during_its_copy_goes_and_its_image_is_whole() {
        let _lab = lab_lease::alone().await;
        for method in METHODS {
            let demo = Account::demo().await;
            let volume = demo.long_volume(48, 1).await;
            let expected = volume.disk.digest(None).await;
            let daemon = slowly(method).start().await;
            let id = demo.request(&volume).await;
            until("its private copy", seconds(60), || async {
                Disk::of_image(&format!("rbd-offload.{id}")).facts().await.map(drop)
            })
            .await;
            assert_eq!(anchor_of(&id).await.is_some(), method == "clone", "{method}");
            demo.delete_volume(&volume).await;
            eprintln!("{method}: the volume is gone, the image {}", demo.image(&id).await["status"]);
            let image = demo.await_image(&id, "active").await;
            is_right(&image, &expected, 1).await;
            let job = daemon.await_job(&id, "done").await;
            assert_eq!(job["method"], method);
            nothing_is_left(&daemon, &id, &volume).await;
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_volume_snapshot_deleted_during_its_copy_goes_and_its_image_is_whole() {
        let _lab = lab_lease::alone().await;
        for method in ["server-copy", "clone"] {
            let demo = Account::demo().await;
            let volume = demo.long_volume(48, 1).await;
            let snapshot = demo.create_snapshot(&volume).await;
            let expected = volume.disk.digest(None).await;
            volume.disk.write(2, &[(0, 10 * MIB)]).await;
            let daemon = slowly(method).start().await;
            let id = demo.create_image(&[snapshot_tag(&snapshot)], json!({})).await;
            until("its private copy", seconds(60), || async {
                Disk::of_image(&format!("rbd-offload.{id}")).facts().await.map(drop)
            })
            .await;
            demo.delete_snapshot(&snapshot).await;
            demo.delete_volume(&volume).await;
            eprintln!("{method}: snapshot and volume are gone, the image {}", demo.image(&id).await["status"]);
            let image = demo.await_image(&id, "active").await;
            is_right(&image, &expected, 1).await;
            daemon.await_job(&id, "done").await;
            nothing_is_left(&daemon, &id, &volume).await;
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_volume_deleted_during_a_copy_that_is_cancelled_leaves_nothing() {
        let _lab = lab_lease::alone().await;
        let demo = Account::demo().await;
        let volume = demo.long_volume(48, 1).await;
        // the copy must outlast Cinder's deletion, which takes ten seconds and more
        let daemon = slowly("server-copy").set("offload", "objects_per_second", "15").start().await;
        let id = demo.request(&volume).await;
        until("its private copy", seconds(60), || async {
            Disk::of_image(&format!("rbd-offload.{id}")).facts().await.map(drop)
        })
        .await;
        demo.delete_volume(&volume).await;
        daemon.command(&["cancel", &id]).await;
        daemon.await_job(&id, "cancelled").await;
        nothing_is_left_of(&id).await;
        nothing_is_left(&daemon, &id, &volume).await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_daemon_killed_with_an_anchor_is_followed_by_another() {
        let _lab = lab_lease::alone().await;
        let demo = Account::demo().await;
        let volume = demo.long_volume(48, 1).await;
        let snapshot = demo.create_snapshot(&volume).await;
        let expected = volume.disk.digest(None).await;
        let setup = slowly("server-copy");
        let first = setup.start().await;
        let id = demo.create_image(&[snapshot_tag(&snapshot)], json!({})).await;
        until("its anchor", seconds(60), || anchor_of(&id)).await;
        first.kill();
        let next = setup.start().await;
        let image = demo.await_image(&id, "active").await;
        is_right(&image, &expected, 1).await;
        next.await_job(&id, "done").await;
        next.await_idle_after_kills().await;
        source_is_as_before(&volume, 1).await;
        assert!(anchor_of(&id).await.is_none(), "the anchor is still there");
    }
}

/// A pool without space.
mod full {
    use super::*;

    /// Makes Glance's pool full, or gives it space again, and waits until the OSDs know.
    async fn set_full(full: bool) {
        let quota = if full { "1" } else { "0" };
        lab().ceph("ceph", &["osd", "pool", "set-quota", "images", "max_bytes", quota]).await;
        until("the pool's new state", seconds(60), || async {
            let dump = lab().ceph("ceph", &["osd", "dump"]).await;
            let pool = dump.lines().find(|line| line.contains("'images'")).unwrap();
            (pool.contains("full_quota") == full).then_some(())
        })
        .await;
        pause(seconds(2)).await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_full_pool_fails_the_request_cleanly_by_every_method() {
        let _lab = lab_lease::alone().await;
        let demo = Account::demo().await;
        let volume = demo.small_volume(json!({}), 1).await;
        for method in ["clone", "copy", "server-copy"] {
            // the records of the jobs lie elsewhere
            let setup = Setup::default()
                .set("jobs", "pool", "vms")
                .set("offload", "method", method)
                .set("offload", "retries", "1");
            let daemon = setup.start().await;
            // something must be there that fills it
            let filler = Disk::new("images", format!("filler-{}", unique()));
            filler.create(8 * MIB).await;
            filler.write(1, &[(0, MIB)]).await;
            set_full(true).await;
            let id = demo.request(&volume).await;
            let message = demo.await_end(&id, "failed").await;
            assert!(message.contains("tell your operator"), "{message}");
            let reason = disk::job_in("vms", &daemon.namespace, &id).await.unwrap()["reason"].to_string();
            assert!(reason.contains("space"), "{method}: {reason}");
            nothing_is_left_of(&id).await;
            source_is_as_before(&volume, 0).await;
            set_full(false).await;
            filler.remove().await;
            daemon.stop();
            disk::forget_in("vms", &daemon.namespace).await;
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_request_that_no_record_can_be_stored_for_waits_for_space() {
        let _lab = lab_lease::alone().await;
        let demo = Account::demo().await;
        let volume = demo.small_volume(json!({}), 1).await;
        let daemon = Setup::default().start().await;
        let filler = Disk::new("images", format!("filler-{}", unique()));
        filler.create(8 * MIB).await;
        filler.write(1, &[(0, MIB)]).await;
        set_full(true).await;
        let id = demo.request(&volume).await;
        pause(seconds(10)).await;
        assert_eq!(daemon.job(&id).await, None);
        set_full(false).await;
        filler.remove().await;
        let expected = volume.disk.digest(None).await;
        let image = demo.await_image(&id, "active").await;
        is_right(&image, &expected, 1).await;
        daemon.await_idle().await;
    }
}

/// What a tenant does after a decline.
mod afterwards {
    use super::*;

    #[tokio::test(flavor = "multi_thread")]
    async fn an_empty_upload_of_the_openstack_command_is_declined_and_told_on_the_record() {
        let (_lab, daemon) = with(Kind::Clone).await;
        let demo = Account::demo().await;
        let volume = demo.small_volume(json!({}), 71).await;
        // of either reason and any method: the upload may end before the plan, or after it, or after the job
        let count = async || {
            let (_, body) = daemon.page("/metrics").await.unwrap();
            let ended = body.lines().filter(|line| line.starts_with("rbd_offload_jobs_ended_total{"));
            let reasons = [r#"reason="empty_upload""#, r#"reason="other_writer""#];
            let ours = ended.filter(|line| reasons.iter().any(|reason| line.contains(reason)));
            ours.map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap()).sum::<f64>()
        };
        let before = count().await;
        let mut create = Command::new(lab().dir.join("venv/bin/openstack"));
        create.args(["image", "create", "--tag", "blue", "--tag", &volume_tag(&volume.id), "-f", "value", "-c", "id"]);
        create.arg("empty").stdin(std::process::Stdio::null());
        let created = tokio::task::spawn_blocking(move || create.output().unwrap()).await.unwrap();
        assert!(created.status.success(), "{created:?}");
        let id = String::from_utf8(created.stdout).unwrap().trim().to_owned();
        demo.adopt_image(&id);

        daemon.await_job(&id, "declined").await;
        until("the job is counted", seconds(10), || async { (count().await == before + 1.0).then_some(()) }).await;
        let image = until("a tag tells what happened", seconds(60), || async {
            let image = demo.image(&id).await;
            image["tags"].as_array().unwrap().contains(&json!("rbd-offload-empty-upload")).then_some(image)
        })
        .await;
        assert_eq!((&image["status"], &image["size"]), (&json!("active"), &json!(0)), "{image:#}");
        let mut tags: Vec<&str> = image["tags"].as_array().unwrap().iter().map(|tag| tag.as_str().unwrap()).collect();
        tags.sort_unstable();
        assert_eq!(tags, ["blue", "rbd-offload-empty-upload"], "the request is gone, the tenant's own tag is not");
        let ours = image.as_object().unwrap().keys().find(|name| name.starts_with("rbd_offload_"));
        assert_eq!(ours, None, "what is made from it would inherit it: {image:#}");
        source_is_as_before(&volume, 0).await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn an_upload_after_a_decline_keeps_none_of_our_words() {
        let (_lab, _daemon) = with(Kind::Clone).await;
        let demo = Account::demo().await;
        let formats = json!({"disk_format": "raw", "container_format": "bare"});
        let id = demo.create_image(&[volume_tag(&uuid::Uuid::new_v4().to_string())], formats).await;
        demo.await_declined(&id).await;
        assert_eq!(demo.upload(&id, vec![7; 3 << 20]).await, 204);
        until("our properties are taken off the active image", seconds(60), || async {
            let image = demo.image(&id).await;
            assert_eq!(image["status"], "active");
            let ours = image.as_object().unwrap().keys().any(|key| key.starts_with("rbd_offload_"));
            (!ours).then_some(())
        })
        .await;
        assert_eq!(Disk::of_image(&id).facts().await.unwrap().size, 3 * MIB);
    }
}

/// The daemon beside the services that do as they always did.
mod beside {
    use super::*;

    const KIND: Kind = Kind::Clone;

    #[tokio::test(flavor = "multi_thread")]
    async fn twenty_stock_uploads_pass_untouched_and_no_notification_is_lost() {
        let (_lab, daemon) = with(KIND).await;
        let demo = Account::demo().await;
        let broker = Broker::connect().await;
        // what Ceilometer would consume; the services declare it themselves
        let ours = format!("test-{}", unique());
        broker.listen(&ours, &["glance", "openstack"]).await;
        broker.drain("notifications.info").await;
        broker.drain(&ours).await;
        let volumes = join_all((0..4).map(|seed| demo.small_volume(json!({}), 10 + seed))).await;
        let uploads = volumes.iter().map(|volume| {
            let (demo, daemon) = (&demo, &daemon);
            async move {
                let expected = volume.disk.digest(None).await;
                for _ in 0..5 {
                    let id = demo.stock_upload(volume).await;
                    demo.await_volume(&volume.id, "available").await;
                    let image = demo.await_image(&id, "active").await;
                    assert!(image.as_object().unwrap().keys().all(|key| !key.starts_with("rbd_offload_")), "{image:#}");
                    assert_eq!(image["size"], expected.size);
                    assert_eq!(Disk::of_image(&id).digest(Some("snap")).await, expected);
                    assert_eq!(daemon.job(&id).await, None);
                    demo.await_tasks(&id).await;
                    demo.delete_image(&id).await;
                }
            }
        });
        join_all(uploads).await;
        // quiet: nothing is published between the two looks
        pause(seconds(1)).await;
        let (reference, theirs) = (broker.message_ids(&ours).await, broker.message_ids("notifications.info").await);
        let lost: Vec<_> = reference.difference(&theirs).collect();
        assert!(reference.len() > 100, "{}", reference.len());
        assert!(lost.is_empty(), "{} of {} are missing in notifications.info", lost.len(), reference.len());
    }
}

/// What takes a daemon of the test's own, and the cluster for itself.
mod alone {
    use std::io::{BufRead, BufReader, Read};

    use super::*;

    /// Whether the object belongs to the RBD image of that id.
    fn is_part_of(object: &str, image: &str, rbd_id: &str) -> bool {
        [format!("/rbd_id.{image}"), format!("image images/{image}"), format!("snapshot images/{image}@snap")]
            .iter()
            .any(|end| object.ends_with(end.as_str()))
            || ["rbd_header", "rbd_object_map", "rbd_data"]
                .iter()
                .any(|kind| object.contains(&format!("/{kind}.{rbd_id}")))
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn the_cluster_is_as_before_plus_exactly_the_image() {
        let _lab = lab_lease::alone().await;
        for method in METHODS {
            let demo = Account::demo().await;
            let image = demo.create_image(&[], json!({"disk_format": "raw", "container_format": "bare"})).await;
            assert_eq!(demo.upload(&image, (0..12 * MIB).map(|n| (n % 253) as u8).collect()).await, 204);
            demo.await_tasks(&image).await;
            let volume = demo.create_volume(json!({"imageRef": image})).await;
            volume.disk.resize(64 * MIB).await;
            volume.disk.write(1, &[(20 * MIB, 10 * MIB)]).await;
            let before = ClusterInventory::take().await;

            let daemon = Setup::default().set("offload", "method", method).start().await;
            let id = offloads(&daemon, &demo, &volume, 1).await;
            demo.await_tasks(&id).await;
            daemon.await_idle().await;
            let namespace = daemon.namespace.clone();
            daemon.stop();
            common::disk::forget(&namespace).await;

            let rbd_id = Disk::of_image(&id).facts().await.unwrap().id;
            let mut added = ClusterInventory::take().await.since(&before);
            if !added.less.is_empty() || added.more.iter().any(|object| object.starts_with("watcher")) {
                // Glance may still have open what it hashed
                pause(seconds(5)).await;
                added = ClusterInventory::take().await.since(&before);
            }
            assert_eq!(added.less, Vec::<String>::new(), "{method}");
            let strange: Vec<_> = added.more.iter().filter(|object| !is_part_of(object, &id, &rbd_id)).collect();
            assert!(strange.is_empty(), "{method}: {strange:#?}");
            assert_eq!(demo.delete_image(&id).await, 204);
            let left = before.difference().await;
            assert!(left.is_nothing(), "{method}: {left:#?}");
        }
        assert_eq!(scrub().await, "", "a deep scrub of all pools");
    }

    /// Deep-scrubs every placement group; what it found.
    async fn scrub() -> String {
        let ceph = lab();
        let stamps = || async {
            let dump: Value =
                serde_json::from_str(&ceph.ceph("ceph", &["pg", "dump", "pgs", "-f", "json"]).await).unwrap();
            dump["pg_stats"]
                .as_array()
                .unwrap()
                .iter()
                .map(|pg| {
                    let text = |key: &str| pg[key].as_str().unwrap().to_owned();
                    (text("pgid"), (text("last_deep_scrub_stamp"), text("state")))
                })
                .collect::<BTreeMap<_, _>>()
        };
        let before = stamps().await;
        for osd in ["0", "1", "2"] {
            ceph.ceph("ceph", &["osd", "deep-scrub", osd]).await;
        }
        until("the deep scrub of every placement group", seconds(240), || async {
            let now = stamps().await;
            let scrubbed = before.iter().filter(|(pg, (stamp, _))| now.get(*pg).is_none_or(|(now, _)| now != stamp));
            (scrubbed.count() == before.len()).then_some(())
        })
        .await;
        let health = ceph.ceph("ceph", &["health", "detail"]).await;
        health.lines().filter(|line| line.contains("nconsistent") || line.contains("SCRUB_ERRORS")).collect()
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_request_whose_notification_was_lost_is_found_within_the_interval() {
        let _lab = lab_lease::alone().await;
        let demo = Account::demo().await;
        let volume = demo.small_volume(json!({}), 1).await;
        let expected = volume.disk.digest(None).await;
        // the daemon is off, and its queue is not even there
        let early = demo.request(&volume).await;
        // and it gets no notification: no service publishes to its exchange
        let setup = Setup::default().set("messaging", "exchanges", "silent").set("offload", "reconcile_interval", "8s");
        let broker = Broker::connect().await;
        broker.exchange("silent").await;
        let daemon = setup.start().await;
        is_right(&demo.await_image(&early, "active").await, &expected, 1).await;
        let late = demo.request(&volume).await;
        let begun = Instant::now();
        until("a job for the request", seconds(12), || async { daemon.job(&late).await.map(drop) }).await;
        eprintln!("found after {:?}", begun.elapsed());
        is_right(&demo.await_image(&late, "active").await, &expected, 1).await;
        daemon.await_idle().await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_small_request_costs_few_calls_on_the_services() {
        let _lab = lab_lease::alone().await;
        let demo = Account::demo().await;
        // the services' access logs name the caller
        let calls = |log: &str, object: &str| -> Vec<String> {
            let log = std::fs::read_to_string(lab().dir.join("log").join(log)).unwrap();
            let ours = log.lines().filter(|line| line.contains("\"rbd-offload/") && line.contains(object));
            ours.map(|line| line.split('"').nth(1).unwrap().to_owned()).collect()
        };
        let daemon = Setup::default().start().await;
        let mut counts = Vec::new();
        for _ in 0..4 {
            let volume = demo.small_volume(json!({}), 1).await;
            let image = demo.request(&volume).await;
            demo.await_image(&image, "active").await;
            daemon.await_idle().await;
            let (mut glance, cinder) = (calls("glance-access.log", &image), calls("cinder-api-access.log", &volume.id));
            eprintln!("{glance:#?} {cinder:#?}");
            // Glance decides how long it takes to make the image active, and so how often it is asked
            let posted = glance.iter().position(|call| call.starts_with("POST")).unwrap();
            let polls = glance.split_off(posted + 1);
            let poll = format!("GET /v2/images/{image} HTTP/1.1");
            let others = polls.iter().filter(|call| **call != poll).count();
            counts.push((glance.len() + others, cinder.len()));
        }
        // five and two; a job that takes longer than two seconds shows its status too
        let least = counts.iter().min().unwrap();
        assert!(least.0 <= 7 && least.1 == 2, "{counts:?}");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn sigterm_while_copying_ends_in_time_and_the_next_daemon_finishes() {
        let _lab = lab_lease::alone().await;
        let demo = Account::demo().await;
        let volume = demo.small_volume(json!({}), 1).await;
        volume.disk.write(2, &[(0, 62 * MIB)]).await;
        let expected = volume.disk.digest(None).await;
        let setup = Setup::default().set("offload", "method", "copy").set("offload", "bandwidth_limit", "1MiB");
        let daemon = setup.start().await;
        let id = demo.request(&volume).await;
        daemon.await_job(&id, "copying").await;
        let (status, took) = daemon.terminate();
        assert!(status.success(), "{status}");
        assert!(took < seconds(40), "{took:?}");
        let job = daemon.job(&id).await.unwrap();
        assert_eq!((&job["state"], &job["owner"]), (&json!("copying"), &Value::Null), "given back: {job:#}");

        let next = setup.set("offload", "bandwidth_limit", "0").start().await;
        is_right(&demo.await_image(&id, "active").await, &expected, 1).await;
        next.await_job(&id, "done").await;
        next.await_idle().await;
        source_is_as_before(&volume, 0).await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn no_secret_and_no_token_reaches_the_log_even_at_trace() {
        let _lab = lab_lease::alone().await;
        let demo = Account::demo().await;
        let volume = demo.small_volume(json!({}), 1).await;
        for format in ["text", "json"] {
            let setup = Setup::default().set("DEFAULT", "log_level", "trace").set("DEFAULT", "log_format", format);
            let daemon = setup.start().await;
            let id = demo.request(&volume).await;
            demo.await_image(&id, "active").await;
            daemon.await_idle().await;
            // a message with a token in it, as Nova's error notifications have
            let broker = Broker::connect().await;
            let token = demo.token().to_owned();
            for body in [
                json!({"event_type": "image.update", "payload": {"id": id, "tags": [token]}, "_context_auth_token": token}).to_string(),
                format!("{{\"oslo.version\": \"2.0\", \"oslo.message\": \"{token}\"}}"),
                token.clone(),
            ] {
                broker.publish("", &daemon.queue, body.as_bytes(), None).await;
            }
            pause(seconds(1)).await;
            let log = daemon.log();
            assert!(log.contains("the job ended"), "{log}");
            assert!(!log.contains(&token), "a token in the log");
            // stop() looks for the rest
        }
    }

    fn captures() -> Vec<Value> {
        let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/notifications");
        let mut lines = Vec::new();
        for name in ["info.jsonl", "error.jsonl", "nova.jsonl.gz"] {
            let file = std::fs::File::open(dir.join(name)).unwrap();
            let reader: Box<dyn Read> =
                if name.ends_with("gz") { Box::new(flate2::read::GzDecoder::new(file)) } else { Box::new(file) };
            lines.extend(BufReader::new(reader).lines().map(|line| serde_json::from_str(&line.unwrap()).unwrap()));
        }
        lines
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn captured_and_damaged_notifications_do_no_harm() {
        let _lab = lab_lease::alone().await;
        let demo = Account::demo().await;
        let volume = demo.small_volume(json!({}), 1).await;
        let expected = volume.disk.digest(None).await;
        let broker = Broker::connect().await;
        broker.exchange("nova").await;
        let daemon = Setup::default().set("offload", "max_jobs", "8").start().await;
        let log = || daemon.log();
        until("the binding to nova", seconds(60), || async { log().contains("exchange \"nova\"").then_some(()) }).await;
        let mut random = StdRng::seed_from_u64(7);
        let messages = captures();
        assert!(messages.len() > 500, "{}", messages.len());
        for message in &messages {
            let body = message["body_raw"].as_str().unwrap().as_bytes();
            let route = &message["delivery_info"];
            let (exchange, key) = (route["exchange"].as_str().unwrap(), route["routing_key"].as_str().unwrap());
            broker.publish(exchange, key, body, Some("utf-8")).await;
        }
        for n in 0..600 {
            let mut body =
                messages[random.random_range(0..messages.len())]["body_raw"].as_str().unwrap().as_bytes().to_vec();
            for _ in 0..random.random_range(1..8) {
                let at = random.random_range(0..body.len());
                match random.random_range(0..4) {
                    0 => body[at] = random.random_range(0..=255),
                    1 => body.truncate(at.max(1)),
                    2 => drop(body.splice(at..at, b"\\\"[]{}".iter().copied())),
                    // a request for an image that is not there
                    _ => {
                        let text = String::from_utf8_lossy(&body).replace(
                            "tags\\\": []",
                            &format!("tags\\\": [\\\"rbd-offload:volume:{}\\\"]", uuid::Uuid::new_v4()),
                        );
                        body = text.into_bytes();
                    }
                }
            }
            let encoding = ["utf-8", "gzip", "bzip2", "deflate", "nonsense"][n % 5];
            broker.publish("", &daemon.queue, &body, Some(if n % 3 == 0 { encoding } else { "utf-8" })).await;
        }
        let id = demo.request(&volume).await;
        is_right(&demo.await_image(&id, "active").await, &expected, 1).await;
        until("an empty queue", seconds(60), || async { (broker.count(&daemon.queue).await == Some(0)).then_some(()) })
            .await;
        daemon.await_health(200).await;
        daemon.await_idle().await;
        assert!(log().len() < 2 << 20, "a log of {} bytes", log().len());
    }
}
