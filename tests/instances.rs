//! Instances as sources, on a real Nova: the lab that `make test-nova` starts.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use common::cloud::{Account, Instance, PATIENCE, Rest, await_tidy, instance_tag, nothing_is_left_of};
use common::daemon::{Daemon, Setup};
use common::disk::{self, Digest, Disk};
use common::lab_lease::{Kind, LabLease, alone, with};
use common::{MIB, lab, pause, seconds, unique, until};
use futures::future::join_all;
use serde_json::{Value, json};

/// An active image with these bytes and nothing of ours, as Glance's own driver would have left it.
async fn is_right(image: &Value, expected: &Digest) {
    let id = image["id"].as_str().unwrap();
    let disk = Disk::of_image(id);
    assert_eq!(disk.digest(None).await, *expected, "bytes of image {id}");
    assert_eq!(disk.digest(Some("snap")).await, *expected, "bytes of the snapshot of image {id}");
    assert_eq!((&image["status"], &image["size"]), (&json!("active"), &json!(expected.size)));
    assert_eq!((&image["disk_format"], &image["container_format"]), (&json!("raw"), &json!("bare")));
    // a status that reached Glance while Nova took its offer back comes off right after the image is active
    let service = Account::service().await;
    until("the image bears no word of ours", seconds(60), || async {
        let now = service.image(id).await;
        (!now.as_object().unwrap().keys().any(|key| key.starts_with("rbd_offload"))).then_some(())
    })
    .await;
    let facts = disk.facts().await.unwrap();
    assert_eq!((facts.parent, facts.flags), (None, 0));
    assert_eq!(facts.snapshots, BTreeMap::from([("snap".to_owned(), true)]));
}

/// The instance's disk is as it was: no snapshot is left on it.
async fn disk_is_free(instance: &Instance) {
    assert_eq!(instance.disk.facts().await.unwrap().snapshots, BTreeMap::new());
}

/// An instance boots from the image, as a clone of it.
async fn boots(account: &Account, image: &str) {
    let made = account.create_instance("d1", json!({"imageRef": image})).await;
    let parent = made.disk.facts().await.unwrap().parent;
    assert!(parent.as_ref().is_some_and(|parent| parent.to_string().contains(image)), "a clone: {parent:?}");
    assert_eq!(account.delete_instance(&made.id).await, 204);
    account.await_instance_gone(&made).await;
}

async fn declined_sentence(account: &Account, instance: &str) -> String {
    let id = account.create_image(&[instance_tag(instance)], json!({})).await;
    account.await_declined(&id).await.replace(instance, "ID")
}

mod requests {
    use super::*;

    async fn becomes_an_image(daemon: &Daemon, demo: &Account, rest: Rest) {
        let base = demo.base_image().await;
        let instance = demo.resting_instance(&base, rest, 1).await;
        let expected = instance.disk.digest(None).await;
        let id = demo.create_image(&[instance_tag(&instance.id)], json!({"os_distro": "mine"})).await;
        let image = demo.await_image(&id, "active").await;
        is_right(&image, &expected).await;
        for (property, value) in [
            ("base_image_ref", base.as_str()),
            ("owner_project_name", "demo"),
            ("owner_user_name", "demo"),
            ("user_id", &demo.user_id),
            ("hw_disk_bus", "scsi"),
            ("hw_scsi_model", "virtio-scsi"),
            ("image_type", "snapshot"),
            ("instance_uuid", &instance.id),
            ("os_distro", "mine"),
            ("owner_id", &demo.project_id),
        ] {
            assert_eq!(image[property], value, "{property}");
        }
        assert_eq!(image["cache_in_nova"], Value::Null, "Nova does not hand it on");
        assert_eq!((&image["min_disk"], &image["min_ram"]), (&json!(1), &json!(64)));
        assert_eq!(image["tags"], json!([instance_tag(&instance.id)]), "provenance");
        daemon.await_job(&id, "done").await;
        disk_is_free(&instance).await;
        boots(demo, &id).await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_paused_and_a_stopped_instance_become_images_that_instances_boot_from() {
        let (_lab, daemon) = with(Kind::ServerCopy).await;
        let demo = Account::demo().await;
        becomes_an_image(&daemon, &demo, Rest::Paused).await;
        becomes_an_image(&daemon, &demo, Rest::Stopped).await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn another_tenants_instance_reads_the_same_as_a_missing_one() {
        let (_lab, _daemon) = with(Kind::ServerCopy).await;
        let (demo, demo2) = (Account::demo().await, Account::demo2().await);
        let base = demo2.base_image().await;
        let theirs = demo2.create_instance("d1", json!({"imageRef": base})).await;
        let sentence = declined_sentence(&demo, &theirs.id).await;
        assert_eq!(sentence, declined_sentence(&demo, &uuid::Uuid::new_v4().to_string()).await);
        disk_is_free(&theirs).await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn an_instance_that_boots_from_a_volume_is_declined_with_the_way_out() {
        let (_lab, _daemon) = with(Kind::ServerCopy).await;
        let demo = Account::demo().await;
        let volume = demo.create_volume(json!({})).await;
        demo.volume_action(&volume.id, json!({"os-set_bootable": {"bootable": true}})).await;
        let disks =
            json!([{"boot_index": 0, "uuid": volume.id, "source_type": "volume", "destination_type": "volume"}]);
        let instance = demo.create_instance("d1", json!({"block_device_mapping_v2": disks})).await;
        let sentence = declined_sentence(&demo, &instance.id).await;
        assert!(sentence.contains("boots from a volume") && sentence.contains("rbd-offload:volume:"), "{sentence}");
        assert_eq!(volume.disk.facts().await.unwrap().snapshots, BTreeMap::new());
        assert_eq!(demo.delete_instance(&instance.id).await, 204);
        demo.await_volume(&volume.id, "available").await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn an_instance_can_be_deleted_while_its_disk_is_copied() {
        let (_lab, daemon) = with(Kind::Slow).await;
        let demo = Account::demo().await;
        let base = demo.base_image().await;
        let instance = demo.resting_instance(&base, Rest::Paused, 2).await;
        // at 4 MiB a second there is time
        instance.disk.write(3, &[(64 * MIB, 200 * MIB)]).await;
        let id = demo.create_image(&[instance_tag(&instance.id)], json!({})).await;
        daemon.await_job(&id, "copying").await;
        until("the snapshot for the copy", seconds(20), || async {
            (!instance.disk.facts().await.unwrap().snapshots.is_empty()).then_some(())
        })
        .await;
        assert_eq!(demo.delete_instance(&instance.id).await, 204);
        let sentence = demo.await_declined(&id).await;
        assert!(sentence.contains("deleted"), "{sentence}");
        demo.await_instance_gone(&instance).await;
    }
}

/// Nova cannot remove a disk that has a snapshot of ours: it tries for a minute, and then goes on without a word.
mod disks_that_nova_takes {
    use super::*;

    /// How a copy is made so slowly that Nova has time. The OSDs copy into a clone, which must go before the snapshot
    /// that it was made from.
    const METHODS: [(&str, &str, &str); 2] =
        [("copy", "bandwidth_limit", "3MiB"), ("server-copy", "objects_per_second", "1")];

    fn slowly((method, key, value): (&str, &str, &str)) -> Setup {
        Setup::default().set("offload", "method", method).set("offload", key, value)
    }

    /// A stopped instance whose disk is being copied, for more than a minute: of a shelved one Nova makes its own
    /// snapshot first. The image's id.
    async fn being_copied(demo: &Account, daemon: &Daemon, base: &str) -> (Instance, String) {
        let instance = demo.resting_instance(base, Rest::Stopped, 3).await;
        instance.disk.write(4, &[(64 * MIB, 200 * MIB), (300 * MIB, 200 * MIB)]).await;
        let id = demo.create_image(&[instance_tag(&instance.id)], json!({})).await;
        daemon.await_job(&id, "copying").await;
        until("the snapshot for the copy", seconds(20), || async {
            (!instance.disk.facts().await.unwrap().snapshots.is_empty()).then_some(())
        })
        .await;
        (instance, id)
    }

    async fn act(demo: &Account, instance: &Instance, action: Value) {
        let (status, body) = demo.instance_action(&instance.id, action).await;
        assert_eq!(status, 202, "{body}");
    }

    async fn ends_the_copy(demo: &Account, image: &str, word: &str, began: Instant) {
        let sentence = demo.await_declined(image).await;
        eprintln!("after {:?}: {sentence}", began.elapsed());
        assert!(sentence.contains(word), "{sentence}");
        assert!(began.elapsed() < seconds(45), "Nova gives up after a minute");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_rebuilt_instance_boots_the_new_image() {
        let _lab = alone().await;
        let demo = Account::demo().await;
        let (base, other) = (demo.base_image().await, demo.base_image().await);
        let fresh = demo.create_instance("d1", json!({"imageRef": other})).await;
        let expected = fresh.disk.digest(None).await;
        for method in METHODS {
            let daemon = slowly(method).start().await;
            let (instance, id) = being_copied(&demo, &daemon, &base).await;
            let began = Instant::now();
            act(&demo, &instance, json!({"rebuild": {"imageRef": other}})).await;
            ends_the_copy(&demo, &id, "rebuilt", began).await;
            demo.await_instance(&instance.id, "SHUTOFF").await;
            eprintln!("{}: rebuilt after {:?}", method.0, began.elapsed());
            assert_eq!(instance.disk.digest(None).await, expected, "{}: the old disk", method.0);
            let parent = instance.disk.facts().await.unwrap().parent;
            assert!(parent.as_ref().is_some_and(|parent| parent.to_string().contains(&other)), "{parent:?}");
            daemon.stop();
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_shelved_and_a_resized_and_a_deleted_instance_get_their_disk_back() {
        let _lab = alone().await;
        let demo = Account::demo().await;
        let base = demo.base_image().await;
        let daemon = slowly(METHODS[1]).start().await;

        let (instance, id) = being_copied(&demo, &daemon, &base).await;
        let began = Instant::now();
        act(&demo, &instance, json!({"resize": {"flavorRef": demo.flavor("d4").await}})).await;
        ends_the_copy(&demo, &id, "resized", began).await;
        demo.await_instance(&instance.id, "VERIFY_RESIZE").await;
        assert_eq!(demo.instance_action(&instance.id, json!({"confirmResize": null})).await.0, 204);
        demo.await_instance(&instance.id, "SHUTOFF").await;
        disk_is_free(&instance).await;

        let (instance, id) = being_copied(&demo, &daemon, &base).await;
        let began = Instant::now();
        assert_eq!(demo.delete_instance(&instance.id).await, 204);
        ends_the_copy(&demo, &id, "deleted", began).await;
        demo.await_instance_gone(&instance).await;

        // Nova's own snapshot comes first, beside the copy
        let (instance, id) = being_copied(&demo, &daemon, &base).await;
        let name = format!("{}-shelved", demo.instance(&instance.id).await["name"].as_str().unwrap());
        act(&demo, &instance, json!({"shelve": null})).await;
        let shelved = until("Nova's image", seconds(60), || demo.image_named(&name)).await;
        demo.adopt_image(&shelved);
        let sentence = demo.await_declined(&id).await;
        assert!(sentence.contains("shelved"), "{sentence}");
        demo.await_instance(&instance.id, "SHELVED_OFFLOADED").await;
        assert!(instance.disk.facts().await.is_none(), "the old disk would be the unshelved instance's");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_daemon_that_stops_and_one_that_nova_does_not_answer_leave_the_disk() {
        let _lab = alone().await;
        let demo = Account::demo().await;
        let base = demo.base_image().await;
        let setup = slowly(METHODS[1]);

        let daemon = setup.start().await;
        let (instance, id) = being_copied(&demo, &daemon, &base).await;
        daemon.stop();
        disk_is_free(&instance).await;

        let daemon = setup.start().await;
        daemon.await_job(&id, "copying").await;
        until("the snapshot for the copy", seconds(20), || async {
            (!instance.disk.facts().await.unwrap().snapshots.is_empty()).then_some(())
        })
        .await;
        lab().service("stop", &["nova-api"]).await;
        let began = Instant::now();
        until("the disk is free", seconds(50), || async {
            instance.disk.facts().await.unwrap().snapshots.is_empty().then_some(())
        })
        .await;
        eprintln!("without Nova for {:?}", began.elapsed());
        lab().service("start", &["nova-api"]).await;
        daemon.command(&["cancel", &id]).await;
        demo.await_end(&id, "failed").await;
        nothing_is_left_of(&id).await;
        disk_is_free(&instance).await;
    }
}

/// `openstack server image create` with the integration in nova-compute.
mod handed_over {
    use super::*;

    /// Its `commit_timeout`, in seconds.
    const DOUBT: u64 = 30;

    /// nova-compute as it is without us, or with the integration and some patience.
    enum Compute {
        Stock,
        Integrated,
        /// Suspends a guest that runs for its snapshot.
        Cold,
    }

    impl Compute {
        fn text(&self) -> &'static str {
            match self {
                Self::Stock => "",
                Self::Cold => {
                    "[oslo_messaging_notifications]\ndriver = rbd_offload\n\
                     [workarounds]\ndisable_libvirt_livesnapshot = true\n"
                }
                Self::Integrated => {
                    "[oslo_messaging_notifications]\ndriver = rbd_offload\n\
                     [rbd_offload]\nclaim_timeout = 15\nstall_timeout = 45\ncommit_timeout = 30\n"
                }
            }
        }

        /// Restarts nova-compute where it is another.
        async fn ready(&self) {
            let file = lab().dir.join("etc/nova/compute.d/integration.conf");
            if std::fs::read_to_string(&file).unwrap_or_default() != self.text() {
                std::fs::write(&file, self.text()).unwrap();
                lab().service("restart", &["nova-compute"]).await;
            }
        }
    }

    fn setup() -> Setup {
        Setup::default().set("nova", "integration", "true")
    }

    /// Copies 4 MiB a second.
    fn slow() -> Setup {
        setup().set("offload", "method", "copy").set("offload", "bandwidth_limit", "4MiB")
    }

    /// The lab for oneself with such a nova-compute, and an image to make instances from.
    async fn begin(compute: Compute) -> (LabLease, Account, String) {
        let stage = alone().await;
        compute.ready().await;
        let demo = Account::demo().await;
        let base = demo.base_image().await;
        (stage, demo, base)
    }

    /// A paused instance with some data.
    async fn little(compute: Compute) -> (LabLease, Account, Instance) {
        let (stage, demo, base) = begin(compute).await;
        let instance = demo.resting_instance(&base, Rest::Paused, 1).await;
        (stage, demo, instance)
    }

    /// A paused instance with enough for half a minute.
    async fn much() -> (LabLease, Account, Instance) {
        let (stage, demo, instance) = little(Compute::Integrated).await;
        instance.disk.write(9, &[(64 * MIB, 120 * MIB)]).await;
        (stage, demo, instance)
    }

    /// The image, once Nova has nothing to do any more.
    async fn await_snapshot(account: &Account, image: &str, instance: &Instance, status: &str) -> Value {
        // it may say that the daemon declined, for a moment
        until(&format!("image {image} is active"), PATIENCE, || async {
            let image = account.image(image).await;
            assert!(!image.is_null(), "Nova has deleted the image");
            (image["status"] == "active").then_some(())
        })
        .await;
        account.await_instance(&instance.id, status).await;
        // the task that hashes writes the record at its end as it was at its beginning: the reconciler repairs that
        until("Glance has hashed the image, and no tag of ours is left", PATIENCE, || async {
            let image = account.image(image).await;
            let is_hashed = !image["os_hash_value"].is_null() && image["os_glance_import_task"].is_null();
            (is_hashed && image["tags"] == json!([])).then_some(image)
        })
        .await
    }

    /// The job of the image, which the daemon made.
    async fn is_ours(daemon: &Daemon, image: &str) {
        let job = daemon.await_job(image, "done").await;
        assert_eq!(job["trigger"], "instance-snapshot", "{job:#}");
    }

    async fn await_copying(daemon: &Daemon, image: &str) {
        let job = daemon.await_job(image, "copying").await;
        assert_eq!(job["handover"], "offered", "{job:#}");
        pause(seconds(2)).await;
    }

    fn compute_log() -> String {
        String::from_utf8_lossy(&std::fs::read(lab().dir.join("log/nova-compute.log")).unwrap()).into_owned()
    }

    /// Nova made an image of the instance itself, for this reason.
    fn took_the_native_path(instance: &Instance, reason: &str) {
        let (log, about) = (compute_log(), format!("instance:{}", instance.id));
        let lines: Vec<_> = log.lines().filter(|line| line.contains(&about)).collect();
        let told = lines.iter().any(|line| line.contains("the native path") && line.contains(reason));
        assert!(told, "no {reason:?}: {lines:#?}");
    }

    fn novas_user_went_on(image: &str) {
        let told = format!("image {image}: the token of the user who makes it is over");
        assert!(compute_log().contains(&told), "Nova's own user was not needed");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn the_record_is_as_after_novas_own_snapshot() {
        let (_lab, demo, instance) = little(Compute::Stock).await;
        let expected = instance.disk.digest(None).await;
        let id = demo.snapshot_instance(&instance.id).await;
        let stock = await_snapshot(&demo, &id, &instance, "PAUSED").await;
        is_right(&stock, &expected).await;

        Compute::Integrated.ready().await;
        let daemon = setup().start().await;
        let id = demo.snapshot_instance(&instance.id).await;
        let ours = await_snapshot(&demo, &id, &instance, "PAUSED").await;
        is_right(&ours, &expected).await;
        is_ours(&daemon, &id).await;
        disk_is_free(&instance).await;

        assert_eq!(differing(&ours, &stock), ["created_at", "file", "id", "name", "self", "updated_at"]);
        boots(&demo, &id).await;

        // asked for by a tag, which stays; only Nova knows boot_roles
        let id = demo.create_image(&[instance_tag(&instance.id)], json!({})).await;
        demo.await_image(&id, "active").await;
        let asked = until("Glance has hashed the image", PATIENCE, || async {
            let image = demo.image(&id).await;
            (!image["os_hash_value"].is_null() && image["os_glance_import_task"].is_null()).then_some(image)
        })
        .await;
        let expected = ["boot_roles", "created_at", "file", "id", "name", "self", "tags", "updated_at"];
        assert_eq!(differing(&asked, &stock), expected, "{asked:#} {stock:#}");
        assert_eq!((&asked["boot_roles"], stock["boot_roles"].is_string()), (&Value::Null, true));
    }

    /// Names of the fields in which two records differ.
    fn differing(one: &Value, other: &Value) -> Vec<String> {
        let names = |record: &Value| record.as_object().unwrap().keys().cloned().collect::<BTreeSet<_>>();
        let all = names(one).into_iter().chain(names(other)).collect::<BTreeSet<_>>();
        all.into_iter().filter(|name| one[name] != other[name]).collect()
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_stopped_instance_and_a_running_one_and_a_second_snapshot_meanwhile() {
        let (_lab, demo, base) = begin(Compute::Integrated).await;
        let daemon = slow().start().await;
        let stopped = demo.resting_instance(&base, Rest::Stopped, 1).await;
        let expected = stopped.disk.digest(None).await;
        let id = demo.snapshot_instance(&stopped.id).await;
        await_copying(&daemon, &id).await;
        let again = json!({"createImage": {"name": "second"}});
        let (status, body) = demo.instance_action(&stopped.id, again).await;
        assert_eq!(status, 409, "Nova makes one snapshot of an instance at a time: {body}");

        let running = demo.create_instance("d1", json!({"imageRef": base})).await;
        let other = demo.snapshot_instance(&running.id).await;
        for (id, instance, status) in [(&id, &stopped, "SHUTOFF"), (&other, &running, "ACTIVE")] {
            await_snapshot(&demo, id, instance, status).await;
            is_ours(&daemon, id).await;
            disk_is_free(instance).await;
        }
        is_right(&demo.image(&id).await, &expected).await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn without_a_daemon_and_after_a_decline_nova_does_it() {
        let (_lab, demo, instance) = little(Compute::Integrated).await;
        let expected = instance.disk.digest(None).await;
        let id = demo.snapshot_instance(&instance.id).await;
        is_right(&await_snapshot(&demo, &id, &instance, "PAUSED").await, &expected).await;

        // no instance's disk is there
        let daemon = setup().set("nova", "pool", "volumes2").start().await;
        let id = demo.snapshot_instance(&instance.id).await;
        is_right(&await_snapshot(&demo, &id, &instance, "PAUSED").await, &expected).await;
        let job = daemon.await_job(&id, "declined").await;
        assert!(job["reason"].as_str().unwrap().contains("no disk"), "{job:#}");
        disk_is_free(&instance).await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_snapshot_that_waits_too_long_for_its_turn_is_made_by_nova() {
        let (_lab, demo, other) = much().await;
        let instance = demo.resting_instance(&demo.base_image().await, Rest::Paused, 4).await;
        let expected = instance.disk.digest(None).await;
        // so slow that the only place is taken
        let daemon = setup().set("offload", "method", "copy").set("offload", "bandwidth_limit", "128KiB");
        let daemon = daemon.set("offload", "max_jobs", "1").start().await;
        let first = demo.create_image(&[instance_tag(&other.id)], json!({})).await;
        daemon.await_job(&first, "copying").await;
        let began = Instant::now();
        let id = demo.snapshot_instance(&instance.id).await;
        let image = await_snapshot(&demo, &id, &instance, "PAUSED").await;
        eprintln!("over after {:?}", began.elapsed());
        took_the_native_path(&instance, "the copy has not started for 30 s");
        is_right(&image, &expected).await;
        assert_eq!(demo.delete_image(&first).await, 204);
        daemon.await_job(&first, "cancelled").await;
        daemon.await_job(&id, "declined").await;
        is_right(&demo.image(&id).await, &expected).await;
        disk_is_free(&instance).await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_snapshot_for_which_the_guest_is_suspended_is_not_offered() {
        let (_lab, demo, base) = begin(Compute::Cold).await;
        let daemon = setup().start().await;
        let stopped = demo.resting_instance(&base, Rest::Stopped, 1).await;
        let running = demo.create_instance("d1", json!({"imageRef": base})).await;
        let id = demo.snapshot_instance(&running.id).await;
        await_snapshot(&demo, &id, &running, "ACTIVE").await;
        took_the_native_path(&running, "the guest is suspended");
        // Nova announces every snapshot, so there may be a job; without an offer it plans nothing
        if daemon.job(&id).await.is_some() {
            let job = daemon.await_job(&id, "declined").await;
            assert!(job["source_image"].is_null(), "it was offered: {job:#}");
        }

        // a guest that does not run is not suspended, so Nova offers the snapshot
        let id = demo.snapshot_instance(&stopped.id).await;
        await_snapshot(&demo, &id, &stopped, "SHUTOFF").await;
        is_ours(&daemon, &id).await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_daemon_that_dies_is_replaced_by_another_or_by_nova() {
        let (_lab, demo, instance) = much().await;
        let expected = instance.disk.digest(None).await;

        let setup = slow();
        let first = setup.start().await;
        let id = demo.snapshot_instance(&instance.id).await;
        await_copying(&first, &id).await;
        first.kill();
        let second = setup.start().await;
        is_right(&await_snapshot(&demo, &id, &instance, "PAUSED").await, &expected).await;
        is_ours(&second, &id).await;

        let id = demo.snapshot_instance(&instance.id).await;
        await_copying(&second, &id).await;
        second.kill();
        is_right(&await_snapshot(&demo, &id, &instance, "PAUSED").await, &expected).await;
        // the next daemon removes what the dead one left
        let third = setup.start().await;
        third.await_job(&id, "declined").await;
        disk_is_free(&instance).await;
        is_right(&demo.image(&id).await, &expected).await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn an_image_that_is_deleted_meanwhile_ends_both() {
        let (_lab, demo, instance) = much().await;
        let daemon = slow().start().await;
        let id = demo.snapshot_instance(&instance.id).await;
        await_copying(&daemon, &id).await;
        assert_eq!(demo.delete_image(&id).await, 204);
        daemon.await_job(&id, "cancelled").await;
        demo.await_instance(&instance.id, "PAUSED").await;
        disk_is_free(&instance).await;
        nothing_is_left_of(&id).await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn an_instance_that_is_deleted_meanwhile_goes_with_its_disk() {
        let (_lab, demo, instance) = much().await;
        let daemon = slow().start().await;
        let id = demo.snapshot_instance(&instance.id).await;
        await_copying(&daemon, &id).await;
        assert_eq!(demo.delete_instance(&instance.id).await, 204);
        let job = daemon.await_job(&id, "declined").await;
        assert!(job["reason"].as_str().unwrap().contains("deleted"), "{job:#}");
        demo.await_instance_gone(&instance).await;
        until("Nova deletes the image of the deleted instance", seconds(60), || async {
            demo.image(&id).await.is_null().then_some(())
        })
        .await;
        nothing_is_left_of(&id).await;
    }

    /// Ends nova-compute and starts it again, while the daemon copies.
    async fn is_cut_off_by(end: &str) {
        let (_lab, demo, instance) = much().await;
        let daemon = slow().start().await;
        let id = demo.snapshot_instance(&instance.id).await;
        await_copying(&daemon, &id).await;
        lab().service(end, &["nova-compute"]).await;
        lab().service("start", &["nova-compute"]).await;
        // two minutes without a word
        let job = until("the hand-over ends", seconds(240), || async {
            daemon.job(&id).await.filter(|job| job["state"] == "declined")
        })
        .await;
        assert!(job["reason"].as_str().unwrap().contains("does not answer"), "{job:#}");
        demo.await_instance(&instance.id, "PAUSED").await;
        disk_is_free(&instance).await;
        nothing_is_left_of(&id).await;
        let image = demo.image(&id).await;
        assert_eq!((&image["status"], &image["tags"]), (&json!("queued"), &json!([])));
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn when_nova_compute_is_killed_nothing_is_published_and_nothing_left() {
        is_cut_off_by("kill").await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn when_nova_compute_is_stopped_nothing_is_published_and_nothing_left() {
        is_cut_off_by("stop").await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn when_nova_compute_dies_after_go_the_image_becomes_active() {
        let (_lab, demo, instance) = little(Compute::Integrated).await;
        let expected = instance.disk.digest(None).await;
        let daemon = setup().start().await;
        let id = demo.snapshot_instance(&instance.id).await;
        until("go", seconds(60), || async {
            let image = demo.image(&id).await;
            let said = image["tags"].as_array().unwrap().contains(&json!("rbd-offload-handover:go"));
            (said || image["status"] == "active").then_some(())
        })
        .await;
        lab().service("kill", &["nova-compute"]).await;
        lab().service("start", &["nova-compute"]).await;
        is_right(&await_snapshot(&demo, &id, &instance, "PAUSED").await, &expected).await;
        is_ours(&daemon, &id).await;
        disk_is_free(&instance).await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn ten_concurrent_snapshots_with_one_daemon_and_with_two_become_active() {
        let (_lab, demo, base) = begin(Compute::Integrated).await;
        let instances = join_all((0..10).map(|seed| demo.resting_instance(&base, Rest::Stopped, seed))).await;
        // Glance hashes every byte
        join_all(instances.iter().map(|instance| instance.disk.resize(64 * MIB))).await;
        let disks: Vec<_> = instances.iter().map(|instance| (instance.disk.clone(), None)).collect();
        let expected = disk::digests(&disks).await;
        let setup = setup().set("offload", "max_jobs", "2");
        let mut daemons = Vec::new();
        for _ in 0..2 {
            daemons.push(setup.start().await);
            let ids = join_all(instances.iter().map(|instance| demo.snapshot_instance(&instance.id))).await;
            let mut done = 0;
            for ((id, instance), expected) in ids.iter().zip(&instances).zip(&expected) {
                is_right(&await_snapshot(&demo, id, instance, "SHUTOFF").await, expected).await;
                let job = daemons[0].job(id).await.unwrap_or_default();
                done += u32::from(job["state"] == "done");
            }
            eprintln!("{done} of 10 were made by {} daemons", daemons.len());
            assert!(done > 0);
            for daemon in &daemons {
                daemon.await_idle().await;
            }
            for instance in &instances {
                disk_is_free(instance).await;
            }
        }
        for daemon in &daemons {
            assert!(daemon.metric("rbd_offload_jobs_ended_total").await > 0.0, "a daemon that did nothing");
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_daemon_that_freezes_half_way_and_wakes_when_all_is_over() {
        let (_lab, demo, instance) = much().await;
        let expected = instance.disk.digest(None).await;
        let daemon = slow().start().await;
        let id = demo.snapshot_instance(&instance.id).await;
        await_copying(&daemon, &id).await;
        daemon.signal("STOP");
        let image = await_snapshot(&demo, &id, &instance, "PAUSED").await;
        took_the_native_path(&instance, "no progress");
        is_right(&image, &expected).await;

        daemon.signal("CONT");
        await_tidy(&id, &instance.disk).await;
        daemon.await_idle().await;
        pause(seconds(6)).await;
        is_right(&demo.image(&id).await, &expected).await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_daemon_that_freezes_when_all_is_prepared_leaves_no_doubt_behind() {
        let (_lab, demo, instance) = little(Compute::Integrated).await;
        let expected = instance.disk.digest(None).await;
        let daemon = setup().start().await;
        let id = demo.snapshot_instance(&instance.id).await;
        until("the copy is prepared", seconds(60), || async {
            (demo.image(&id).await["rbd_offload_status"] == "publishing").then_some(())
        })
        .await;
        daemon.signal("STOP");
        let job = daemon.job(&id).await.unwrap();
        let began = Instant::now();
        demo.await_instance(&instance.id, "PAUSED").await;
        let image = until("an end", PATIENCE, || async {
            let image = demo.image(&id).await;
            (image.is_null() || image["status"] == "active").then_some(image)
        })
        .await;
        eprintln!("frozen as {}, {}; over after {:?}", job["state"], job["handover"], began.elapsed());
        daemon.signal("CONT");
        if job["handover"] == "offered" {
            took_the_native_path(&instance, "after go");
            assert!(began.elapsed() > seconds(DOUBT - 1));
            assert_eq!((&image["status"], &image["tags"]), (&json!("active"), &json!([])), "{image:#}");
        }
        await_tidy(&id, &instance.disk).await;
        daemon.await_idle().await;
        pause(seconds(6)).await;
        // frozen after its rename it keeps the name: then the native path fails, and Nova deletes the record
        match demo.image(&id).await {
            Value::Null => {
                assert_ne!(job["handover"], "offered", "{job:#}");
                nothing_is_left_of(&id).await;
            }
            image => is_right(&image, &expected).await,
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_handover_survives_the_expiry_of_the_users_token() {
        let (_lab, demo, instance) = much().await;
        let expected = instance.disk.digest(None).await;
        let daemon = slow().start().await;
        let short = demo.short_lived(10).await;
        let id = short.ask_for_snapshot(&instance.id, json!({})).await;
        demo.adopt_image(&id);
        pause(seconds(11)).await;
        let state = &demo.instance(&instance.id).await["OS-EXT-STS:task_state"];
        assert!(state.is_string(), "the token ends before the snapshot does");
        is_right(&await_snapshot(&demo, &id, &instance, "PAUSED").await, &expected).await;
        is_ours(&daemon, &id).await;
        disk_is_free(&instance).await;
    }

    /// Nova's Glance is away for a while too: it remembers tokens that it has seen, and forgets them with a restart.
    async fn revoke(theirs: &Account) {
        lab().service("stop", &["glance-direct"]).await;
        theirs.revoke().await;
        lab().service("start", &["glance-direct"]).await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn the_users_token_is_revoked_meanwhile_and_novas_own_user_goes_on() {
        let (_lab, demo, instance) = much().await;
        let expected = instance.disk.digest(None).await;
        let daemon = slow().start().await;
        let theirs = Account::demo().await;
        let id = theirs.ask_for_snapshot(&instance.id, json!({})).await;
        demo.adopt_image(&id);
        await_copying(&daemon, &id).await;
        revoke(&theirs).await;
        let image = await_snapshot(&demo, &id, &instance, "PAUSED").await;
        novas_user_went_on(&id);
        is_right(&image, &expected).await;
        is_ours(&daemon, &id).await;
        disk_is_free(&instance).await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn the_users_token_is_revoked_and_novas_own_user_makes_the_image() {
        let (_lab, demo, instance) = little(Compute::Integrated).await;
        let expected = instance.disk.digest(None).await;
        let theirs = Account::demo().await;
        let id = theirs.ask_for_snapshot(&instance.id, json!({})).await;
        demo.adopt_image(&id);
        until("the offer", seconds(30), || async { (demo.image(&id).await["tags"] != json!([])).then_some(()) }).await;
        revoke(&theirs).await;
        let image = await_snapshot(&demo, &id, &instance, "PAUSED").await;
        novas_user_went_on(&id);
        took_the_native_path(&instance, "no daemon took it");
        is_right(&image, &expected).await;
        assert_eq!(image["owner"], demo.project_id.as_str(), "the image is the tenant's all the same");
    }

    /// The record and the offer as a nova-compute of another cluster would write them.
    #[tokio::test(flavor = "multi_thread")]
    async fn an_offer_from_another_cluster_is_declined() {
        let (_lab, demo, instance) = little(Compute::Integrated).await;
        let daemon = setup().start().await;
        let offer = format!("rbd-offload-handover:instance:{}@{}", instance.id, uuid::Uuid::new_v4());
        let id = demo.create_image(&[offer], json!({"disk_format": "raw", "container_format": "bare"})).await;
        daemon.await_job(&id, "declined").await;
        let image = demo.image(&id).await;
        assert_eq!((&image["status"], &image["rbd_offload_status"]), (&json!("queued"), &json!("declined")));
        assert_eq!(image["tags"], json!([]));
        nothing_is_left_of(&id).await;
        disk_is_free(&instance).await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_shelved_instance_comes_back_from_the_image() {
        let (_lab, demo, base) = begin(Compute::Integrated).await;
        let daemon = setup().start().await;
        let instance = demo.resting_instance(&base, Rest::Stopped, 1).await;
        let expected = instance.disk.digest(None).await;
        let name = format!("{}-shelved", demo.instance(&instance.id).await["name"].as_str().unwrap());
        let (status, body) = demo.instance_action(&instance.id, json!({"shelve": null})).await;
        assert_eq!(status, 202, "{body}");
        let id = until("the image", seconds(60), || demo.image_named(&name)).await;
        demo.adopt_image(&id);
        is_right(&await_snapshot(&demo, &id, &instance, "SHELVED_OFFLOADED").await, &expected).await;
        is_ours(&daemon, &id).await;
        assert!(instance.disk.facts().await.is_none(), "the disk is in the image only");

        let (status, body) = demo.instance_action(&instance.id, json!({"unshelve": null})).await;
        assert_eq!(status, 202, "{body}");
        demo.await_instance(&instance.id, "ACTIVE").await;
        assert_eq!(instance.disk.digest(None).await, expected, "the disk is back");
        until("Nova deletes the image", seconds(60), || async { demo.image(&id).await.is_null().then_some(()) }).await;
        nothing_is_left_of(&id).await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_backup_takes_the_place_of_the_one_before() {
        let (_lab, demo, instance) = little(Compute::Integrated).await;
        let daemon = setup().start().await;
        let mut ids = Vec::new();
        for seed in 2..4 {
            instance.disk.write(seed, &[(40 * MIB, 5 * MIB)]).await;
            let expected = instance.disk.digest(None).await;
            let backup = json!({"name": format!("test-{}", unique()), "backup_type": "daily", "rotation": 1});
            let (status, body) = demo.instance_action(&instance.id, json!({"createBackup": backup})).await;
            assert_eq!(status, 202, "{body}");
            let id = body["image_id"].as_str().unwrap().to_owned();
            demo.adopt_image(&id);
            let image = await_snapshot(&demo, &id, &instance, "PAUSED").await;
            is_right(&image, &expected).await;
            assert_eq!((&image["image_type"], &image["backup_type"]), (&json!("backup"), &json!("daily")));
            is_ours(&daemon, &id).await;
            ids.push(id);
        }
        until("the first is deleted", seconds(60), || async { demo.image(&ids[0]).await.is_null().then_some(()) })
            .await;
        nothing_is_left_of(&ids[0]).await;
        disk_is_free(&instance).await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_suspended_instance_a_name_of_many_bytes_and_properties_of_the_users() {
        let (_lab, demo, base) = begin(Compute::Integrated).await;
        let daemon = setup().start().await;
        let instance = demo.resting_instance(&base, Rest::Suspended, 1).await;
        let expected = instance.disk.digest(None).await;
        let name = format!("\u{30ea}\u{30f3}\u{30af}-{}", unique());
        let more = json!({"name": name, "metadata": {"image_type": "test", "mine": "yes"}});
        let id = demo.ask_for_snapshot(&instance.id, more).await;
        demo.adopt_image(&id);
        let image = await_snapshot(&demo, &id, &instance, "SUSPENDED").await;
        is_right(&image, &expected).await;
        is_ours(&daemon, &id).await;
        disk_is_free(&instance).await;
        assert_eq!((&image["name"], &image["mine"]), (&json!(name), &json!("yes")));
        assert_eq!(demo.delete_image(&id).await, 204);
        nothing_is_left_of(&id).await;
    }
}
