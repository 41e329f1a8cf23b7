//! Jobs survive everything: killed and frozen daemons, and a broker, OSDs, Glance and Keystone that go away. After each
//! fault, each requested image is there, byte for byte, with one location, and no leftover is.
//!
//! `RBD_OFFLOAD_TEST_ROUNDS=50` kills daemons in more rounds, `RBD_OFFLOAD_TEST_SEED` repeats their order of events.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use common::broker::Broker;
use common::cloud::{AT_A_TIME, Account, PATIENCE, Volume, nothing_is_left_of, volume_tag};
use common::daemon::{Daemon, Setup};
use common::disk::{self, Digest, Disk};
use common::glance;
use common::inventory::ClusterInventory;
use common::published::are_right;
use common::tcp_proxy::TcpProxy;
use common::{MIB, lab, lab_lease, pause, run, seconds, unique, until};
use futures::future::join_all;
use futures::{StreamExt, stream};
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use rbd_offload::ceph::{Client, LockKey, Objects};
use rbd_offload::job::clock::Clock;
use rbd_offload::job::store::{Error, Store};
use serde_json::json;
use tempfile::TempDir;

const METHODS: [&str; 3] = ["server-copy", "clone", "copy"];

/// What was asked for: the image, and the bytes that it must get.
struct Request {
    id: String,
    expected: Digest,
}

/// A tenant with volumes, and how the cluster was before the daemons came.
struct Tenant {
    demo: Account,
    volumes: Vec<(Volume, Digest)>,
    before: ClusterInventory,
}

impl Tenant {
    async fn new(demo: Account, volumes: Vec<Volume>) -> Self {
        let disks: Vec<_> = volumes.iter().map(|volume| (volume.disk.clone(), None)).collect();
        let volumes = volumes.into_iter().zip(disk::digests(&disks).await).collect();
        Self { demo, volumes, before: ClusterInventory::take().await }
    }

    /// With volumes that are copied at once.
    async fn with_small_volumes(count: u64) -> Self {
        let demo = Account::demo().await;
        let volumes = join_all((0..count).map(|seed| {
            let demo = &demo;
            async move {
                let volume = demo.create_volume(json!({})).await;
                volume.disk.resize(16 * MIB + 512).await;
                volume.disk.write(seed, &[(0, 2 * MIB), (5 * MIB + 777, 5000), (15 * MIB, MIB + 512)]).await;
                volume
            }
        }))
        .await;
        Self::new(demo, volumes).await
    }

    /// With one volume of so many MiB that takes a while, see [`slow`].
    async fn with_long_volume(mib: u64) -> Self {
        let demo = Account::demo().await;
        let volume = demo.long_volume(mib, 1).await;
        Self::new(demo, vec![volume]).await
    }

    async fn request(&self, count: usize) -> Vec<Request> {
        let one = |n: usize| async move {
            let (volume, expected) = &self.volumes[n % self.volumes.len()];
            Request { id: self.demo.request(volume).await, expected: expected.clone() }
        };
        stream::iter(0..count).map(one).buffered(AT_A_TIME).collect().await
    }

    /// Every request ends as an image that is right, and no job, copy, snapshot, lock or watcher is left behind it.
    /// Then the images are deleted, and the cluster is as it was.
    async fn gets(&self, daemon: &Daemon, requests: &[Request]) {
        self.await_active(daemon, requests).await;
        daemon.await_idle().await;
        self.got(daemon, requests).await;
    }

    /// The same where daemons were killed at work.
    async fn gets_after_kills(&self, daemon: &Daemon, requests: &[Request]) {
        self.await_active(daemon, requests).await;
        daemon.await_idle_after_kills().await;
        self.got(daemon, requests).await;
    }

    /// Panics with the job's record where an image does not become active.
    async fn await_active(&self, daemon: &Daemon, requests: &[Request]) {
        for Request { id, .. } in requests {
            let begun = Instant::now();
            loop {
                let image = self.demo.image(id).await;
                if image["status"] == "active" {
                    break;
                }
                let has_ended = matches!(image["rbd_offload_status"].as_str(), Some("declined" | "failed"));
                if has_ended || begun.elapsed() > PATIENCE {
                    let job = daemon.job(id).await.unwrap_or_default();
                    panic!("image {id} is {} after {} s; its job: {job}", image["status"], begun.elapsed().as_secs());
                }
                pause(Duration::from_millis(250)).await;
            }
        }
    }

    async fn got(&self, daemon: &Daemon, requests: &[Request]) {
        let states = disk::jobs(&daemon.namespace).await;
        for request in requests {
            assert_eq!(states.get(&request.id).map(String::as_str), Some("done"), "{}", request.id);
        }
        // (the ownership tag is removed when the image is active)
        let images = join_all(requests.iter().map(|request| self.demo.image(&request.id))).await;
        are_right(&images.iter().zip(requests.iter().map(|r| &r.expected)).collect::<Vec<_>>(), 1).await;
        let disks: Vec<_> = requests.iter().map(|request| Disk::of_image(&request.id)).collect();
        for facts in disk::facts(&disks).await.into_iter().flatten() {
            assert_eq!(facts.metadata, BTreeMap::new(), "the ownership tag is taken off");
        }
        let ids: Vec<_> = requests.iter().map(|request| request.id.clone()).collect();
        self.demo.delete_images(&ids).await;
        self.nothing_is_left().await;
    }

    async fn nothing_is_left(&self) {
        let difference = self.before.difference_beside_records().await;
        assert!(difference.is_nothing(), "the cluster is not as it was: {difference:#?}");
    }
}

/// A daemon with a log that tells each stage.
fn telling(method: &str) -> Setup {
    Setup::default().set("offload", "method", method).set("DEFAULT", "log_level", "debug")
}

/// One that needs some fifteen seconds for a long volume of 48 MiB, by every method. The folder holds its ceph.conf.
fn slow(method: &str) -> (Setup, TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let conf = dir.path().join("ceph.conf");
    let lab = std::fs::read_to_string(lab().ceph_conf()).unwrap();
    // ([client] is its last section): a flatten moves one object after the other
    std::fs::write(&conf, format!("{lab}\nrbd concurrent management ops = 1\n")).unwrap();
    let setup = telling(method)
        .set("ceph", "conf", conf.to_str().unwrap())
        .set("offload", "bandwidth_limit", "3MiB")
        .set("offload", "objects_per_second", "50");
    (setup, dir)
}

fn number(name: &str) -> Option<u64> {
    Some(std::env::var(name).ok()?.parse().unwrap_or_else(|_| panic!("{name} is not a number")))
}

/// Jobs that a daemon ended, by its own count.
async fn ended_by(daemon: &Daemon) -> f64 {
    daemon.metric("rbd_offload_jobs_ended_total").await
}

#[tokio::test(flavor = "multi_thread")]
async fn twenty_requests_survive_daemons_that_are_killed_at_any_moment() {
    let _lab = lab_lease::alone().await;
    // some daemons publish at once, where Glance may read the source
    let _reader = glance::Reader::new().await;
    let rounds = number("RBD_OFFLOAD_TEST_ROUNDS").unwrap_or(2);
    let first = number("RBD_OFFLOAD_TEST_SEED").unwrap_or_else(|| rand::rng().random_range(0..1_000_000));
    let tenant = Tenant::with_small_volumes(4).await;
    let begun = Instant::now();
    let (mut kills, mut fences, mut aborts, mut at_once) = (0, 0, 0, 0);
    for seed in first..first + rounds {
        eprintln!("RBD_OFFLOAD_TEST_SEED={seed}");
        let mut random = StdRng::seed_from_u64(seed);
        // more daemons are killed here than one job may lose before it fails
        let setup = Setup::default().set("offload", "max_jobs", "4").set("offload", "max_takeovers", "20");
        let setup = setup.set("offload", "detach_grace", "1s");
        // the first of the two publishes at once, which needs a method that clones
        let any = |n: usize, random: &mut StdRng| {
            let (publish, methods) = if n == 0 { ("at-once", &METHODS[..2]) } else { ("when-copied", &METHODS[..]) };
            let method = methods[random.random_range(0..methods.len())];
            setup.clone().set("offload", "method", method).set("offload", "publish", publish)
        };
        let mut daemons = [any(0, &mut random).start().await, any(1, &mut random).start().await];
        // kept until the round is over: their logs are evidence
        let mut killed = Vec::new();
        let namespace = daemons[0].namespace.clone();
        let kill = async {
            until("a job", seconds(60), || async { (!disk::jobs(&namespace).await.is_empty()).then_some(()) }).await;
            for _ in 0..random.random_range(4..=9) {
                pause(Duration::from_millis(random.random_range(50..3500))).await;
                let both = random.random_bool(0.2);
                let victim = random.random_range(0..2);
                for n in if both { 0..2 } else { victim..victim + 1 } {
                    daemons[n].kill();
                }
                pause(Duration::from_millis(random.random_range(0..1500))).await;
                for n in if both { 0..2 } else { victim..victim + 1 } {
                    killed.push(std::mem::replace(&mut daemons[n], any(n, &mut random).spawn()));
                }
            }
        };
        let (requests, ()) = tokio::join!(tenant.request(20), kill);
        tenant.gets_after_kills(&daemons[0], &requests).await;
        assert!(daemons[0].command(&["jobs"]).await.is_empty());
        kills += killed.len();
        for request in &requests {
            at_once += usize::from(daemons[0].job(&request.id).await.unwrap()["publish"] == "at-once");
        }
        for (n, daemon) in daemons.iter_mut().enumerate() {
            if daemon.was_aborted_by_librbd() {
                daemon.kill();
                killed.push(std::mem::replace(daemon, any(n, &mut random).spawn()));
                aborts += 1;
            }
            daemon.await_health(200).await;
        }
        let logs = killed.iter().chain(&daemons).map(Daemon::log);
        fences += logs.map(|log| log.matches("fenced the previous owner").count()).sum::<usize>();
        eprintln!(
            "{} rounds, {} images, {at_once} of them at once, {kills} kills, {aborts} aborts of librbd, {fences} fences, {:.0} s",
            seed + 1 - first,
            20 * (seed + 1 - first),
            begun.elapsed().as_secs_f64()
        );
    }
    assert!(fences > 0, "no daemon was killed while it worked on a job");
    assert!(at_once > 0, "no image was published at once");
}

#[tokio::test(flavor = "multi_thread")]
async fn two_daemons_share_the_work() {
    let _lab = lab_lease::alone().await;
    let tenant = Tenant::with_small_volumes(4).await;
    let setup = Setup::default().set("offload", "max_jobs", "2");
    let daemons = [setup.start().await, setup.start().await];
    let requests = tenant.request(20).await;
    tenant.gets(&daemons[0], &requests).await;
    // a job is counted right after its record says that it ended
    let shares = until("twenty ends are counted", seconds(10), || async {
        let shares = [ended_by(&daemons[0]).await, ended_by(&daemons[1]).await];
        (shares[0] + shares[1] >= 20.0).then_some(shares)
    })
    .await;
    assert!(shares[0] >= 4.0 && shares[1] >= 4.0, "{shares:?}");
    assert_eq!(shares[0] + shares[1], 20.0, "each job ends once");
}

#[tokio::test(flavor = "multi_thread")]
async fn running_jobs_go_on_while_the_broker_is_dead() {
    let _lab = lab_lease::alone().await;
    let tenant = Tenant::with_long_volume(32).await;
    let (setup, _conf) = slow("copy");
    let daemon = setup.start().await;
    let requests = tenant.request(2).await;
    for request in &requests {
        daemon.await_stage(&request.id, "snapshot").await;
    }
    lab().service("kill", &["rabbit"]).await;
    let log = daemon.log();
    for request in &requests {
        assert!(!log.contains(&format!("stage over image_id={} job_stage=\"transfer\"", request.id)), "too quick");
        // up to Glance, which waits for the broker itself before it answers to a change
        daemon.await_stage(&request.id, "transfer").await;
    }
    daemon.await_health(503).await;
    lab().service("start", &["rabbit"]).await;
    tenant.gets(&daemon, &requests).await;
    daemon.await_health(200).await;
    // and it hears again
    let requests = tenant.request(1).await;
    tenant.gets(&daemon, &requests).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn notifications_sent_while_the_daemon_was_cut_off_arrive() {
    let _lab = lab_lease::alone().await;
    let tenant = Tenant::with_small_volumes(2).await;
    let broker = Broker::connect().await;
    let url = &lab().offload_amqp;
    let port = url.trim_end_matches('/').rsplit(':').next().unwrap();
    let gate = TcpProxy::to(port.parse().unwrap()).await;
    let url = url.replace(&format!(":{port}/"), &format!(":{}/", gate.port));
    let setup = Setup::default().set("messaging", "transport_url", &url).set("offload", "reconcile_interval", "1h");
    let daemon = setup.start().await;
    gate.shut();
    daemon.await_health(503).await;
    let requests = tenant.request(4).await;
    until("the messages in the queue", seconds(20), || async {
        broker.count(&daemon.queue).await.filter(|count| *count >= 4)
    })
    .await;
    assert!(disk::jobs(&daemon.namespace).await.is_empty());
    gate.open();
    tenant.gets(&daemon, &requests).await;
    assert_eq!(broker.count(&daemon.queue).await, Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_osd_is_killed_during_the_transfer_by_every_method() {
    let _lab = lab_lease::alone().await;
    let tenant = Tenant::with_long_volume(32).await;
    for (n, method) in METHODS.into_iter().enumerate() {
        let (setup, _conf) = slow(method);
        let daemon = setup.start().await;
        let requests = tenant.request(1).await;
        daemon.await_stage(&requests[0].id, "snapshot").await;
        pause(Duration::from_millis(500)).await;
        let osd = format!("osd.{n}");
        lab().service("kill", &[&osd]).await;
        let said = daemon.log();
        assert!(!said.contains("job_stage=\"transfer\""), "the transfer was over before the OSD was dead: {said}");
        pause(seconds(3)).await;
        lab().service("start", &[&osd]).await;
        tenant.gets(&daemon, &requests).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn glance_and_keystone_are_away_for_half_a_minute() {
    let _lab = lab_lease::alone().await;
    let tenant = Tenant::with_long_volume(32).await;
    let (setup, _conf) = slow("copy");
    // the rate is the daemon's, and three jobs share it
    let daemon = setup.set("offload", "bandwidth_limit", "9MiB").start().await;
    let requests = tenant.request(3).await;
    for request in &requests {
        daemon.await_stage(&request.id, "snapshot").await;
    }
    lab().service("kill", &["glance", "keystone"]).await;
    // the copies end meanwhile, and cannot be registered
    pause(seconds(30)).await;
    let (log, health) = (daemon.log(), daemon.health().await);
    // before anything is asserted: other tests need them
    lab().service("start", &["keystone", "glance"]).await;
    for request in &requests {
        assert!(log.contains(&format!("stage over image_id={} job_stage=\"transfer\"", request.id)), "{log}");
    }
    assert_eq!(health.unwrap().0, 503);
    tenant.gets(&daemon, &requests).await;
    daemon.await_health(200).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_became_invalid_leads_to_a_new_login() {
    let _lab = lab_lease::alone().await;
    let mut tenant = Tenant::with_long_volume(32).await;
    let (setup, _conf) = slow("copy");
    let daemon = setup.start().await;
    let service = Account::service().await;
    let requests = tenant.request(1).await;
    daemon.await_stage(&requests[0].id, "snapshot").await;
    // until the key is gone that all tokens of before were made with
    let owner = run(std::process::Command::new("id").arg("-un")).await.1;
    let group = run(std::process::Command::new("id").arg("-gn")).await.1;
    for _ in 0..4 {
        let mut rotate = std::process::Command::new(lab().dir.join("venv/bin/keystone-manage"));
        rotate.arg("--config-file").arg(lab().dir.join("etc/keystone/keystone.conf")).arg("fernet_rotate");
        rotate.args(["--keystone-user", owner.trim(), "--keystone-group", group.trim()]);
        let (well, said) = run(&mut rotate).await;
        assert!(well, "{said}");
    }
    // the daemon's own user had a token of the same age
    let url = format!("{}/v2/images?limit=1", lab().glance);
    until("an old token is refused", seconds(30), || async {
        (service.call(reqwest::Method::GET, &url, None).await.0 == 401).then_some(())
    })
    .await;
    tenant.demo.renew(&Account::demo().await);
    tenant.gets(&daemon, &requests).await;
    let requests = tenant.request(1).await;
    tenant.gets(&daemon, &requests).await;
    daemon.await_health(200).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_that_is_frozen_past_its_lease_does_no_harm_when_it_wakes() {
    let _lab = lab_lease::alone().await;
    let tenant = Tenant::with_long_volume(16).await;
    // the stage that was just over when it froze
    for (method, stage) in [
        ("server-copy", "snapshot"),
        ("copy", "snapshot"),
        ("clone", "transfer"),
        ("server-copy", "rename"),
        ("copy", "record"),
    ] {
        eprintln!("{method}, frozen after {stage}");
        let (setup, _conf) = slow(method);
        let frozen = setup.start().await;
        let mut tries = 0;
        let requests = loop {
            let requests = tenant.request(1).await;
            frozen.await_stage(&requests[0].id, stage).await;
            frozen.signal("STOP");
            // only half a second is left after the last of these stages: the job may be over on a busy machine
            if tenant.demo.image(&requests[0].id).await["status"] != "active" {
                break requests;
            }
            tries += 1;
            assert!(tries < 5, "{method} was never frozen in time after {stage}");
            frozen.signal("CONT");
            tenant.gets(&frozen, &requests).await;
        };
        // (the frozen daemon was the only one, so that it got the job)
        let other = telling(method).named(&setup.name).start().await;
        tenant.demo.await_image(&requests[0].id, "active").await;
        other.await_job(&requests[0].id, "done").await;
        let image = Disk::of_image(&requests[0].id).facts().await.unwrap();
        frozen.signal("CONT");
        frozen.await_log(&["the lease was lost"], seconds(60)).await;
        frozen.await_health(200).await;
        assert_eq!(Disk::of_image(&requests[0].id).facts().await.unwrap().id, image.id);
        assert_eq!(ended_by(&other).await, 1.0);
        tenant.gets(&other, &requests).await;
        // it is of use again
        other.stop();
        let requests = tenant.request(1).await;
        tenant.gets(&frozen, &requests).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_is_delivered_ten_times_is_done_once() {
    let _lab = lab_lease::alone().await;
    let tenant = Tenant::with_small_volumes(2).await;
    let broker = Broker::connect().await;
    let ours = format!("test-{}", unique());
    broker.listen(&ours, &["glance", "openstack"]).await;
    let daemon = Setup::default().set("offload", "max_jobs", "3").start().await;
    let repeat = async |bodies: &[Vec<u8>]| {
        for body in bodies {
            for _ in 0..10 {
                broker.publish("", &daemon.queue, body, None).await;
            }
        }
    };

    let requests = tenant.request(6).await;
    // nothing to be had, and gone again: these must not come back either
    let missing = tenant.demo.create_image(&[volume_tag(&uuid::Uuid::new_v4().to_string())], json!({})).await;
    let deleted = tenant.request(1).await.remove(0).id;
    assert_eq!(tenant.demo.delete_image(&deleted).await, 204);
    let mut heard = Vec::new();
    // while they run
    let mut active = 0;
    while active < requests.len() {
        let new = broker.drain(&ours).await;
        repeat(&new).await;
        heard.extend(new);
        active += usize::from(tenant.demo.image(&requests[active].id).await["status"] == "active");
        pause(Duration::from_millis(100)).await;
    }
    tenant.demo.await_declined(&missing).await;
    daemon.await_idle().await;
    let (records, ended) = (disk::jobs(&daemon.namespace).await, ended_by(&daemon).await);
    // and all of it again, in any order
    let mut all: Vec<_> = heard.into_iter().chain(broker.drain(&ours).await).collect();
    assert!(all.len() >= 3 * requests.len(), "{}", all.len());
    all.shuffle(&mut StdRng::seed_from_u64(7));
    repeat(&all).await;
    until("an empty queue", seconds(60), || async { (broker.count(&daemon.queue).await == Some(0)).then_some(()) })
        .await;
    pause(seconds(1)).await;
    daemon.await_idle().await;
    assert_eq!(disk::jobs(&daemon.namespace).await, records);
    assert_eq!(ended_by(&daemon).await, ended, "an ended job was done again");
    nothing_is_left_of(&missing).await;
    nothing_is_left_of(&deleted).await;
    tenant.gets(&daemon, &requests).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_transfer_stops_within_seconds_by_every_method() {
    let _lab = lab_lease::alone().await;
    let tenant = Tenant::with_long_volume(112).await;
    for method in METHODS {
        let (setup, _conf) = slow(method);
        // it outlasts the time for which the daemon stands still
        let setup = setup.set("jobs", "lease", "60s");
        let daemon = setup.start().await;
        let requests = tenant.request(3).await;
        let [deleted, cancelled, uploaded] = [0, 1, 2].map(|n| requests[n].id.as_str());
        for request in &requests {
            let copy = Disk::of_image(&format!("rbd-offload.{}", request.id));
            until("the transfer", seconds(60), || async { copy.facts().await.map(drop) }).await;
        }
        // a flatten has no limit of bytes: it could be done before a busy machine has asked for all three ends
        daemon.signal("STOP");
        tokio::join!(
            async { assert_eq!(tenant.demo.delete_image(deleted).await, 204) },
            async {
                let said = daemon.command(&["cancel", cancelled]).await;
                assert!(said.contains("is to be cancelled"), "{said}");
            },
            async { assert_eq!(tenant.demo.upload(uploaded, vec![7; 1 << 20]).await, 204) },
        );
        daemon.signal("CONT");
        let begun = Instant::now();
        let ends = async |id: &str, state: &str| {
            let over = ["stage over", id, "job_stage=\"transfer\""];
            let is_over = || daemon.log().lines().any(|line| over.iter().all(|word| line.contains(word)));
            // at once, on an idle machine
            until("the end of the transfer", seconds(40), || async { is_over().then_some(()) }).await;
            eprintln!("{method}: {state}: the transfer ended after {:.1} s", begun.elapsed().as_secs_f64());
            daemon.await_job(id, state).await;
            eprintln!("{method}: {state} after {:.1} s", begun.elapsed().as_secs_f64());
        };
        tokio::join!(ends(deleted, "cancelled"), ends(cancelled, "cancelled"), ends(uploaded, "declined"));
        let log = daemon.log();
        for id in [deleted, cancelled, uploaded] {
            let whole = log.lines().any(|line| {
                ["stage over", id, "job_stage=\"transfer\"", "ok=true"].iter().all(|word| line.contains(word))
            });
            assert!(!whole, "the copy of {id} was complete before it was cancelled");
        }
        let sentence = tenant.demo.await_end(cancelled, "failed").await;
        assert!(sentence.contains("cancelled by the operator"), "{sentence}");
        nothing_is_left_of(deleted).await;
        nothing_is_left_of(cancelled).await;
        // theirs stays
        assert_eq!(tenant.demo.image(uploaded).await["status"], "active");
        assert_eq!(Disk::of_image(uploaded).facts().await.unwrap().size, MIB);
        assert_eq!(Account::service().await.locations(uploaded).await.len(), 1);
        tenant.demo.delete_images(&[uploaded.to_owned()]).await;
        daemon.await_idle().await;
        tenant.nothing_is_left().await;
        daemon.stop();

        let quick = telling(method).named(&setup.name).start().await;
        quick.command(&["retry", cancelled]).await;
        let image = tenant.demo.await_another_try(cancelled, seconds(60)).await;
        quick.await_job(cancelled, "done").await;
        assert!(image.as_object().unwrap().keys().all(|key| !key.starts_with("rbd_offload_")), "{image:#}");
        assert_eq!(Disk::of_image(cancelled).digest(Some("snap")).await, requests[1].expected);
        tenant.demo.delete_images(&[cancelled.to_owned()]).await;
        tenant.nothing_is_left().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn five_hundred_requests_of_one_tenant_do_not_hold_up_another() {
    let _lab = lab_lease::alone().await;
    let (many, one) = tokio::join!(Account::demo(), Account::demo2());
    let volume = one.small_volume(json!({}), 1).await;
    let one = Tenant::new(one, vec![volume]).await;
    // declined, which is quick; the daemon is not there yet
    let record = json!({"disk_format": "qcow2", "container_format": "bare"});
    let tag = [volume_tag(&one.volumes[0].0.id)];
    let begun = Instant::now();
    let made = stream::iter(0..500).map(|_| many.create_image(&tag, record.clone())).buffer_unordered(AT_A_TIME);
    assert_eq!(made.count().await, 500);
    eprintln!("five hundred records after {:?}", begun.elapsed());
    let daemon = Setup::default().set("offload", "max_jobs", "2").start().await;
    let ended = async || {
        let states = disk::jobs(&daemon.namespace).await;
        (states.values().filter(|state| *state == "declined").count(), states.len())
    };
    until("all five hundred are jobs, and some have ended", seconds(60), || async {
        let (declined, all) = ended().await;
        (all == 500 && declined > 5).then_some(())
    })
    .await;
    let before = ended().await.0;
    let request = one.request(1).await;
    one.demo.await_image(&request[0].id, "active").await;
    let after = ended().await.0;
    eprintln!("{before} of the five hundred had ended when the one was asked for, {after} when it was active");
    assert!(after < 400, "{after} of 500 went first");
    daemon.await_job(&request[0].id, "done").await;
    daemon.stop();
    many.clean().await;
    disk::forget(&daemon.namespace).await;
    let image = one.demo.image(&request[0].id).await;
    are_right(&[(&image, &request[0].expected)], 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_limit_of_all_images_of_a_project_holds() {
    let _lab = lab_lease::alone().await;
    let tenant = Tenant::with_small_volumes(1).await;
    let admin = Account::admin().await;
    let daemon = Setup::default().start().await;
    let used = tenant.demo.image_bytes().await.div_ceil(MIB);
    let first = tenant.request(1).await;
    tenant.demo.await_image(&first[0].id, "active").await;
    // the disk is a little larger than 16 MiB: there is room for one
    admin.limit_images(None, used + 24).await;
    let second = tenant.request(1).await.remove(0);
    let sentence = tenant.demo.await_declined(&second.id).await;
    assert!(sentence.contains("image_size_total") && sentence.contains(&format!("of {} MiB", used + 24)), "{sentence}");
    // this project may have more than the others
    admin.limit_images(Some(&tenant.demo.project_id), used + 40).await;
    tenant.demo.add_tag(&second.id, &volume_tag(&tenant.volumes[0].0.id)).await;
    tenant.demo.await_another_try(&second.id, seconds(60)).await;
    let third = tenant.request(1).await.remove(0);
    let sentence = tenant.demo.await_declined(&third.id).await;
    assert!(sentence.contains("image_size_total") && sentence.contains(&format!("of {} MiB", used + 40)), "{sentence}");
    tenant.gets(&daemon, &[first.into_iter().next().unwrap(), second]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn leftovers_with_our_tag_are_removed_and_everything_else_stays() {
    let _lab = lab_lease::alone().await;
    // its copy takes 48 s, and the removals up to 20
    let tenant = Tenant::with_long_volume(144).await;
    let volume = &tenant.volumes[0].0;
    let (setup, _conf) = slow("copy");
    let daemon = setup.set("offload", "reconcile_interval", "2s").start().await;
    // two requests that ended without an image
    let [first, second] = [(); 2].map(|()| volume_tag(&uuid::Uuid::new_v4().to_string()));
    let declined =
        [tenant.demo.create_image(&[first], json!({})).await, tenant.demo.create_image(&[second], json!({})).await];
    for id in &declined {
        tenant.demo.await_declined(id).await;
    }
    // one that runs meanwhile
    let live = tenant.request(1).await;
    daemon.await_stage(&live[0].id, "snapshot").await;

    let ids: [String; 4] = std::array::from_fn(|_| uuid::Uuid::new_v4().to_string());
    let private = |id: &str| Disk::of_image(&format!("rbd-offload.{id}"));
    let (copy, published) = (private(&ids[0]), Disk::of_image(&declined[0]));
    copy.leave(Some(&ids[0])).await;
    published.leave(Some(&declined[0])).await;
    volume.disk.snapshot(&format!("rbd-offload.{}", ids[1])).await;
    let instance = Disk::new("vms", format!("{}_disk", uuid::Uuid::new_v4()));
    instance.create(MIB).await;
    instance.snapshot(&format!("rbd-offload.{}", ids[2])).await;
    // with our name and no ownership tag, with the tag that a clone inherited, and another writer's image
    let stay = [private(&ids[2]), private(&ids[3]), Disk::of_image(&declined[1])];
    stay[0].leave(None).await;
    stay[1].leave(Some(&ids[0])).await;
    stay[2].leave(None).await;

    until("the leftovers are gone", seconds(60), || async {
        let gone = disk::facts(&[copy.clone(), published.clone()]).await.iter().all(Option::is_none);
        let sources = disk::facts(&[volume.disk.clone(), instance.clone()]).await;
        let snapshots: Vec<_> = sources.iter().flatten().flat_map(|facts| facts.snapshots.keys()).collect();
        let left = ids.iter().any(|id| snapshots.contains(&&format!("rbd-offload.{id}")));
        (gone && !left).then_some(())
    })
    .await;
    assert_eq!(daemon.job(&live[0].id).await.unwrap()["state"], "copying", "it was there all the time");
    let begun = Instant::now();
    tenant.demo.await_image(&live[0].id, "active").await;
    pause(seconds(10).saturating_sub(begun.elapsed())).await;
    assert!(disk::facts(&stay).await.iter().all(Option::is_some), "what is not ours was touched");
    for disk in stay.iter().chain([&instance]) {
        disk.remove().await;
    }
    tenant.gets(&daemon, &live).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_notify_socket_that_is_not_read_does_not_stop_the_daemon() {
    let _lab = lab_lease::alone().await;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("notify");
    let socket = std::os::unix::net::UnixDatagram::bind(&path).unwrap();
    // more than the socket holds, whose queue is `net.unix.max_dgram_qlen` long
    let setup = Setup::default().with_variable("NOTIFY_SOCKET", &path);
    let daemon = setup.start().await;
    for reload in 0..40 {
        daemon.signal("HUP");
        let read = |log: &str| log.matches("configuration read again").count();
        until("the signal is acted on", seconds(20), || async { (read(&daemon.log()) > reload).then_some(()) }).await;
    }
    assert_eq!(daemon.health().await.map(|(status, _)| status), Some(200));
    // it had been told that the daemon is ready, before anything else
    let mut message = [0; 256];
    let length = socket.recv(&mut message).unwrap();
    assert_eq!(&message[..length], b"READY=1\n");
    let (status, took) = daemon.terminate();
    assert!(status.success(), "{status}");
    assert!(took < seconds(20), "{took:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_record_that_is_too_large_holds_up_no_other_job() {
    let _lab = lab_lease::alone().await;
    let tenant = Tenant::with_small_volumes(1).await;
    let setup = Setup::default();
    let client = Client::connect(&lab().ceph_conf(), "rbd-offload").await.unwrap();
    let objects = client.objects("images", &setup.name).unwrap();
    // it is the first to be looked at: nothing is known of its age
    let planted = uuid::Uuid::new_v4();
    let mut record = br#"{"version": 1, "state": "declined"}"#.to_vec();
    record.resize(2 << 20, b' ');
    objects.create(&format!("job.{planted}"), &record).await.unwrap();
    objects.set_omap("index.live", &[(planted.to_string(), b"{}".to_vec())]).await.unwrap();
    let daemon = setup.start().await;
    let requests = tenant.request(2).await;
    tenant.await_active(&daemon, &requests).await;
    daemon.await_log(&["cannot process job record", &planted.to_string()], seconds(30)).await;

    // nor is one written that could not be read
    daemon.await_idle().await;
    let store = Store::new(std::sync::Arc::new(objects.clone()), Clock::System);
    let image = requests[0].id.parse().unwrap();
    let mut stored = store.load(image).await.unwrap().unwrap();
    let before = stored.clone();
    stored.record.publication.properties.insert("os_type".into(), "x".repeat(2 << 20));
    let lease = LockKey { name: "lease".into(), cookie: "no-owner".into() };
    let refused = store.write(&stored, &lease, &[]).await;
    assert!(matches!(refused, Err(Error::TooLarge { .. })), "{refused:?}");
    assert_eq!(store.load(image).await.unwrap(), Some(before));
    tenant.gets(&daemon, &requests).await;
}

/// A daemon that reaches Glance through the gate.
fn through(gate: &TcpProxy, setup: Setup) -> Setup {
    setup.set("glance", "endpoint_override", &format!("http://127.0.0.1:{}", gate.port))
}

async fn gate_to_glance() -> TcpProxy {
    let port = lab().glance.trim_end_matches('/').rsplit(':').next().unwrap();
    TcpProxy::to(port.parse().unwrap()).await
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_ends_a_daemon_that_waits_for_a_glance_that_says_nothing() {
    let _lab = lab_lease::alone().await;
    let tenant = Tenant::with_small_volumes(1).await;
    let gate = gate_to_glance().await;
    let setup = through(&gate, telling("clone"));
    let daemon = setup.start().await;
    let requests = tenant.request(1).await;
    daemon.await_stage(&requests[0].id, "inspect").await;
    gate.freeze();
    let (status, took) = daemon.terminate();
    assert!(status.success(), "{status}");
    eprintln!("ended after {took:?}");
    let next = telling("clone").named(&setup.name).start().await;
    tenant.gets(&next, &requests).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_check_leaves_no_record_where_glance_answers_late() {
    let _lab = lab_lease::alone().await;
    let service = Account::service().await;
    let before = service.image_ids().await;
    let gate = gate_to_glance().await;
    let daemon = through(&gate, telling("clone")).start().await;
    gate.hold_answers();
    let mut checking = daemon.spawn_command(&["check"]);
    // check gives its first calls up after 10 s, and Glance has carried them out
    pause(seconds(12)).await;
    gate.open();
    tokio::task::block_in_place(|| checking.wait()).unwrap();
    pause(seconds(2)).await;
    assert_eq!(service.image_ids().await, before);
    daemon.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn cancelling_a_job_while_glance_is_silent_fences_no_daemon() {
    let _lab = lab_lease::alone().await;
    let tenant = Tenant::with_small_volumes(2).await;
    let gate = gate_to_glance().await;
    // a request to Glance takes longer than the lease holds
    let setup = through(&gate, telling("clone")).set("keystone", "timeout", "20s");
    let daemon = setup.start().await;
    let requests = tenant.request(1).await;
    daemon.await_stage(&requests[0].id, "inspect").await;
    gate.freeze();
    let neighbour = telling("clone").named(&setup.name).start().await;
    daemon.command(&["cancel", &requests[0].id]).await;
    // four times the lease
    pause(seconds(20)).await;
    gate.open();
    daemon.await_idle().await;
    for log in [daemon.log(), neighbour.log()] {
        assert!(!log.contains("fenced"), "{log}");
    }
    assert_eq!(
        daemon.metric("rbd_offload_fenced_total").await + neighbour.metric("rbd_offload_fenced_total").await,
        0.0
    );
    neighbour.stop();
    let more = tenant.request(1).await;
    let ended = daemon.job(&requests[0].id).await.unwrap();
    assert!(["cancelled", "done"].contains(&ended["state"].as_str().unwrap()), "{ended:#}");
    tenant.demo.delete_images(&[requests[0].id.clone()]).await;
    tenant.gets(&daemon, &more).await;
}

/// Two deployments over the same pools: each sees the other's live copy, snapshot and leftovers, and touches none.
#[tokio::test(flavor = "multi_thread")]
async fn objects_of_another_deployment_are_left_alone() {
    let _lab = lab_lease::alone().await;
    let tenant = Tenant::with_long_volume(288).await;
    let volume = &tenant.volumes[0].0;
    // the copy would take 288 s, longer than all that follows
    let setup = telling("copy").set("offload", "bandwidth_limit", "1MiB").set("offload", "verify", "none");
    let daemon = setup.set("offload", "reconcile_interval", "2s").start().await;
    // the daemon of another cloud: it hears nothing of this one, and its own Glance is away
    let other = telling("copy")
        .set("offload", "reconcile_interval", "2s")
        .set("messaging", "topics", "nothing")
        .set("glance", "endpoint_override", "http://127.0.0.1:9/")
        .start()
        .await;
    let live = tenant.request(1).await;
    daemon.await_stage(&live[0].id, "snapshot").await;
    let (ours, theirs) = (disk::deployment(&daemon.namespace).await, disk::deployment(&other.namespace).await);
    assert_ne!(ours, theirs);
    let private = format!("rbd-offload.{}", live[0].id);
    let tags = volume.disk.snapshot_tags().await;
    assert!(tags[&private].starts_with(&live[0].id) && tags[&private].ends_with(&ours), "{tags:?}");
    // leftovers of an unknown deployment
    let stranger = uuid::Uuid::new_v4().to_string();
    let [copy_id, snapshot_id] = [(); 2].map(|()| uuid::Uuid::new_v4().to_string());
    let tag = |id: &str, deployment: &str| format!("{id} {} {deployment}", uuid::Uuid::new_v4());
    let foreign = Disk::of_image(&format!("rbd-offload.{copy_id}"));
    foreign.leave(Some(&tag(&copy_id, &stranger))).await;
    let foreign_snapshot = format!("rbd-offload.{snapshot_id}");
    volume.disk.leave_snapshot(&foreign_snapshot, &tag(&snapshot_id, &stranger)).await;

    // each removes what it left itself, in several rounds
    for _ in 0..2 {
        join_all([&ours, &theirs].map(|deployment| async move {
            let [copy_id, snapshot_id, anchor_id] = [(); 3].map(|()| uuid::Uuid::new_v4().to_string());
            let copy = Disk::of_image(&format!("rbd-offload.{copy_id}"));
            let anchor = Disk::new("volumes", format!("rbd-offload.{anchor_id}.anchor"));
            let snapshot = format!("rbd-offload.{snapshot_id}");
            copy.leave(Some(&tag(&copy_id, deployment))).await;
            anchor.leave(Some(&tag(&anchor_id, deployment))).await;
            anchor.snapshot(&format!("rbd-offload.{anchor_id}")).await;
            volume.disk.leave_snapshot(&snapshot, &tag(&snapshot_id, deployment)).await;
            until("the leftovers of a deployment are gone", seconds(120), || async {
                let gone = disk::facts(&[copy.clone(), anchor.clone()]).await.iter().all(Option::is_none);
                let left = volume.disk.facts().await.unwrap().snapshots.contains_key(&snapshot);
                (gone && !left && !volume.disk.snapshot_tags().await.contains_key(&snapshot)).then_some(())
            })
            .await;
        }))
        .await;
    }
    assert_eq!(daemon.job(&live[0].id).await.unwrap()["state"], "copying", "it was there all the time");
    assert!(Disk::of_image(&private).facts().await.is_some());
    let snapshots = volume.disk.facts().await.unwrap().snapshots;
    assert!(snapshots.contains_key(&private) && snapshots.contains_key(&foreign_snapshot), "{snapshots:?}");
    assert!(foreign.facts().await.is_some(), "what an unknown deployment made was touched");
    assert!(other.log().contains("find requests"), "its Glance is away, and the other parts of its rounds run");
    assert!(!other.log().contains(&live[0].id), "the other daemon dealt with this one's image");

    daemon.copy_at_full_speed().await;
    foreign.remove().await;
    volume.disk.remove_snapshot(&foreign_snapshot).await;
    tenant.gets(&daemon, &live).await;
    assert!(!volume.disk.snapshot_tags().await.contains_key(&private), "the tag goes with the snapshot");
}

/// A daemon without the source's backend leaves the job to one that has it, also while that one restarts.
#[tokio::test(flavor = "multi_thread")]
async fn a_job_is_left_to_the_daemon_that_has_its_backend() {
    let _lab = lab_lease::alone().await;
    let demo = Account::demo().await;
    let volume = demo.create_volume(json!({"volume_type": "ceph2"})).await;
    volume.disk.resize(16 * MIB).await;
    volume.disk.write(1, &[(0, 2 * MIB), (15 * MIB, MIB)]).await;
    let tenant = Tenant::new(demo, vec![volume]).await;
    let setup = telling("clone");
    let whole = setup.start().await;
    let lacking = telling("clone").named(&setup.name).without("backend:ceph2").start().await;
    let backend = "left to a daemon that has this backend";
    pause(seconds(3)).await;
    whole.stop();
    let requests = tenant.request(1).await;
    lacking.await_log(&[backend, &requests[0].id], seconds(60)).await;
    until("the job has no owner", seconds(20), || async {
        let job = lacking.job(&requests[0].id).await.unwrap();
        (job["state"] == "accepted" && job["owner"].is_null()).then_some(())
    })
    .await;
    let whole = setup.start().await;
    tenant.gets(&whole, &requests).await;
    assert!(whole.log().contains("the job ended") && !lacking.log().contains("the job ended"));
}

/// Two Ceph clusters under one Glance, each with a deployment. The lab has one cluster: a deployment without the
/// backend of a volume does not find its disk, as in another cluster.
#[tokio::test(flavor = "multi_thread")]
async fn a_request_is_left_to_the_deployment_that_has_its_disk() {
    let _lab = lab_lease::alone().await;
    let tenant = Tenant::with_long_volume(288).await;
    // the copy would take 288 s, and the second request waits for its turn
    let east = telling("copy").set("offload", "bandwidth_limit", "1MiB").set("offload", "verify", "none");
    let east = east.set("offload", "max_jobs", "1").set("offload", "decline_after", "6s").without("backend:ceph2");
    let east = east.start().await;
    let west = telling("clone").without("backend:ceph").set("offload", "decline_after", "20s").start().await;
    let elsewhere = |job: &serde_json::Value| {
        job["reason"].as_str().unwrap_or_default().starts_with("left to another deployment: ")
    };

    let mut requests = tenant.request(3).await;
    let ids: Vec<String> = requests.iter().map(|request| request.id.clone()).collect();
    let mut left = Vec::new();
    for id in &ids {
        let job = west.await_job(id, "declined").await;
        assert!(elsewhere(&job), "{job:#}");
        left.push(job["request_id"].clone());
    }
    // the reconciler of the west meets the requests again, and leaves them alone
    pause(seconds(12)).await;
    let mut shown = Vec::new();
    for (id, request_id) in ids.iter().zip(&left) {
        assert_eq!(west.job(id).await.unwrap()["request_id"], *request_id, "it was begun again");
        let image = tenant.demo.image(id).await;
        assert!(image["status"] == "queued" && image["tags"].to_string().contains("rbd-offload:volume:"), "{image:#}");
        shown.push(image["rbd_offload_status"].as_str().unwrap_or_default().to_owned());
    }
    shown.sort();
    assert_eq!(shown, ["accepted", "accepted", "copying"]);

    // the one that waits is asked to become an image of a disk that the west has
    let mut waiting = Vec::new();
    for (at, id) in ids.iter().enumerate() {
        if east.job(id).await.unwrap()["state"] == "accepted" {
            waiting.push(at);
        }
    }
    let (waiting, mistaken) = (waiting[0], waiting[1]);
    let other = tenant.demo.create_volume(json!({"volume_type": "ceph2"})).await;
    other.disk.resize(16 * MIB).await;
    other.disk.write(1, &[(0, 2 * MIB), (15 * MIB, MIB)]).await;
    let expected = other.disk.digest(None).await;
    let tags = json!([{"op": "replace", "path": "/tags", "value": [volume_tag(&other.id)]}]);
    assert_eq!(tenant.demo.patch_image(&ids[waiting], tags).await.0, 200);
    // and another one of a volume that there is not
    let tags = volume_tag(&uuid::Uuid::new_v4().to_string());
    let tags = json!([{"op": "replace", "path": "/tags", "value": [tags]}]);
    assert_eq!(tenant.demo.patch_image(&ids[mistaken], tags).await.0, 200);
    tenant.demo.await_declined(&ids[mistaken]).await;
    tenant.demo.await_image(&ids[waiting], "active").await;
    assert_eq!(Disk::of_image(&ids[waiting]).digest(Some("snap")).await, expected);
    east.copy_at_full_speed().await;
    tenant.demo.await_image(&ids[3 - waiting - mistaken], "active").await;
    east.await_idle().await;
    assert!(!tenant.demo.image(&ids[waiting]).await.to_string().contains("rbd_offload_"), "a status was left");
    tenant.demo.delete_images(&[ids[waiting].clone(), ids[mistaken].clone()]).await;
    tenant.demo.delete_volume(&other).await;
    requests.retain(|request| request.id == ids[3 - waiting - mistaken]);

    // neither has this one
    let third = tenant.demo.create_volume(json!({"volume_type": "ceph-offload"})).await;
    let missing = tenant.demo.create_image(&[volume_tag(&third.id)], json!({})).await;
    tenant.demo.await_declined(&missing).await;
    let declined = east.await_job(&missing, "declined").await;
    let left = west.await_job(&missing, "declined").await;
    assert!(declined["reason"].as_str().unwrap().contains("ceph-offload"), "{declined:#}");
    assert_eq!(left["reason"], "the image has no request tag any more", "one of them declines it");
    let image = tenant.demo.image(&missing).await;
    assert_eq!((&image["rbd_offload_message"], &image["tags"]), (&declined["reason"], &json!([])), "{image:#}");
    tenant.demo.delete_images(&[missing]).await;
    tenant.demo.delete_volume(&third).await;
    tenant.gets(&east, &requests).await;
}

/// A request is found also when the list of queued images is too large for one answer.
#[tokio::test(flavor = "multi_thread")]
async fn records_that_are_too_large_are_passed_over() {
    let _lab = lab_lease::alone().await;
    let tenant = Tenant::with_small_volumes(1).await;
    let record = |count: usize, value: String| {
        let mut record = json!({"disk_format": "raw", "container_format": "bare"});
        for number in 0..count {
            record[format!("p{number}")] = json!(value);
        }
        record
    };
    // 7.7 MB each: three pass the limit of an answer, one does not
    let wide = record(120, "\u{e9}".repeat(32_000));
    // Glance escapes a control character in six bytes: 18 MB, which is too much for one answer
    let fat = record(50, "\u{1}".repeat(60_000));
    let (mut wide_ids, mut fat_ids) = (Vec::new(), Vec::new());
    for _ in 0..2 {
        fat_ids.push(tenant.demo.create_image(&[], fat.clone()).await);
        for _ in 0..2 {
            wide_ids.push(tenant.demo.create_image(&[], wide.clone()).await);
        }
    }
    // the daemon hears nothing: only its reconciler finds the request
    let requests = tenant.request(1).await;
    let daemon = telling("auto").set("messaging", "topics", "nothing").start().await;
    tenant.await_active(&daemon, &requests).await;
    for id in &fat_ids {
        daemon.await_log(&["passed over", id], seconds(60)).await;
    }
    for id in &wide_ids {
        assert!(!daemon.log().contains(id), "{id} was read");
    }
    tenant.demo.delete_images(&[fat_ids, wide_ids].concat()).await;
    tenant.gets(&daemon, &requests).await;
}

/// Two clouds with one jobs namespace would end each other's jobs.
#[tokio::test(flavor = "multi_thread")]
async fn a_namespace_of_another_cloud_is_refused() {
    let _lab = lab_lease::alone().await;
    let setup = Setup::default();
    disk::put_object(&setup.name, "cloud", r#"{"project_id": "0a", "region": "Elsewhere"}"#).await;
    let daemon = setup.spawn();
    let (status, said) = daemon.await_exit(seconds(60)).await;
    assert_eq!(status.code(), Some(78), "{said}");
    for word in ["another cloud", "Elsewhere", "[jobs] namespace", "rm cloud"] {
        assert!(said.contains(word), "{word}: {said}");
    }
}
