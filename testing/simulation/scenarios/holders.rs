//! What the index says of a job's holder is a hint: whatever stands there, each job is done by one daemon, and soon.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use tokio::time::{Instant, sleep};
use uuid::Uuid;

use super::one_image::OneImage;
use super::run_in_virtual_time;
use crate::job::record::{Record, State};
use crate::job::simulation::actors::daemon::epoch;
use crate::job::store::{Cancelled, Holder, Store, Summary};
use crate::request::{Source, Trigger};

/// `[jobs] lease` of the daemons here.
const LEASE: Duration = Duration::from_secs(30);

impl OneImage {
    /// What the index says of the image's job.
    fn entry(&self) -> Option<Summary> {
        let world = self.world.lock();
        let value = world.ceph.objects.get("index.live")?.omap.get(&self.image.to_string())?;
        Some(serde_json::from_slice(value).unwrap())
    }

    fn set_entry(&self, value: Option<&[u8]>) {
        let mut world = self.world.lock();
        let key = self.image.to_string();
        match value {
            Some(value) => world.ceph.set_keys("index.live", &[(key, value.to_vec())]),
            None => world.ceph.remove_keys("index.live", &[key]),
        }
    }

    /// Waits until the job is one that `is_so`. Returns how long that took.
    async fn until(&self, is_so: impl Fn(&Record) -> bool) -> Duration {
        let began = Instant::now();
        while !self.job().is_some_and(|job| is_so(&job)) {
            sleep(Duration::from_millis(20)).await;
            assert!(began.elapsed() < Duration::from_secs(600), "{:#?} {:?}", self.job(), self.entry());
        }
        began.elapsed()
    }
}

fn another_holder() -> Holder {
    Holder { instance: Uuid::new_v4(), host: "another".into(), at: Timestamp::UNIX_EPOCH }
}

/// Counts how often the lease of a job was asked for.
fn count_leases(stage: &OneImage) -> Arc<AtomicUsize> {
    let count = Arc::new(AtomicUsize::new(0));
    let (kept, asked) = (Arc::clone(&count), format!("lock {} ", Store::object(stage.image)));
    stage.world.lock().script = Some(Box::new(move |_, call| {
        kept.fetch_add(usize::from(call.starts_with(&asked)), Ordering::Relaxed);
    }));
    count
}

#[test]
fn other_daemons_leave_a_job_at_work_alone_and_take_it_over_soon_when_its_daemon_died() {
    run_in_virtual_time(async {
        let stage = OneImage::new();
        let holder = stage.daemon("holder", "copy");
        stage.ask().await;
        stage.until(|job| job.state == State::Copying).await;
        assert_eq!(stage.entry().and_then(|entry| entry.holder).map(|holder| holder.host), Some("holder".into()));
        let asked = count_leases(&stage);
        let _others = ["one", "two", "three"].map(|name| stage.daemon(name, "copy"));
        // it hangs: the lease is renewed all the while
        stage.world.lock().stuck = Some("copied".into());
        sleep(Duration::from_secs(20)).await;
        let tried = asked.load(Ordering::Relaxed);
        assert!(tried <= 3 * 3, "the three others asked {tried} times within 20 s");
        assert_eq!(stage.job().unwrap().state, State::Copying);
        stage.world.lock().stuck = None;
        let owner = stage.job().unwrap().owner;
        holder.node.kill();
        let took = stage.until(|job| job.owner.is_some() && job.owner != owner).await;
        let limit = LEASE + LEASE / 3 + Duration::from_secs(5);
        assert!(took <= limit, "it was taken over after {took:?}");
        assert_eq!(stage.end().await.state, State::Done);
        stage.is_tidy();
    });
}

#[test]
fn a_job_whose_entry_names_a_daemon_that_is_not_there_waits_for_a_lease_at_most() {
    run_in_virtual_time(async {
        let stage = OneImage::new();
        stage.ask().await;
        let stale = Summary { holder: Some(another_holder()), ..stage.entry().unwrap() };
        stage.set_entry(Some(&serde_json::to_vec(&stale).unwrap()));
        let asked = count_leases(&stage);
        let _daemon = stage.daemon("node", "clone");
        sleep(LEASE / 4).await;
        assert_eq!(asked.load(Ordering::Relaxed), 0, "it is left to the one that the entry names");
        let took = stage.until(|job| job.owner.is_some()).await;
        assert!(took <= LEASE, "it was begun after {took:?}");
        assert_eq!(stage.end().await.state, State::Done);
        stage.is_tidy();
    });
}

#[test]
fn an_entry_of_an_older_version_or_one_that_cannot_be_read_holds_no_job_up() {
    for entry in [r#"{"project":"blue","created":"2020-01-01T00:00:00Z","handover":false}"#, "{}", "not JSON"] {
        run_in_virtual_time(async move {
            let stage = OneImage::new();
            stage.ask().await;
            stage.set_entry(Some(entry.as_bytes()));
            let _daemon = stage.daemon("node", "clone");
            let took = stage.until(|job| job.owner.is_some()).await;
            assert!(took < Duration::from_secs(5), "{entry}: it was begun after {took:?}");
            assert_eq!(stage.end().await.state, State::Done);
            stage.is_tidy();
        });
    }
}

#[test]
fn a_job_at_work_is_done_once_whatever_becomes_of_its_entry() {
    for entry in [None, Some("{}"), Some("stale")] {
        run_in_virtual_time(async move {
            let stage = OneImage::new();
            let _daemons = ["one", "two", "three"].map(|name| stage.daemon(name, "copy"));
            stage.ask().await;
            stage.until(|job| job.state == State::Copying).await;
            let stale = Summary { holder: Some(another_holder()), ..stage.entry().unwrap() };
            let stale = serde_json::to_vec(&stale).unwrap();
            stage.set_entry(entry.map(|entry| if entry == "stale" { &stale } else { entry.as_bytes() }));
            let job = stage.end().await;
            assert_eq!((job.state, job.attempts, job.takeovers), (State::Done, 0, 0), "{job:#?}");
            assert_eq!(stage.entry(), None);
            assert!(stage.world.lock().ceph.blocklist.is_empty(), "no daemon was fenced");
            stage.is_tidy();
        });
    }
}

#[test]
fn an_old_entry_of_a_job_that_has_ended_is_removed() {
    run_in_virtual_time(async {
        let stage = OneImage::new();
        stage.ask().await;
        let stale = Summary { holder: Some(another_holder()), ..stage.entry().unwrap() };
        let _daemons = ["one", "two"].map(|name| stage.daemon(name, "clone"));
        assert_eq!(stage.end().await.state, State::Done);
        stage.set_entry(Some(&serde_json::to_vec(&stale).unwrap()));
        sleep(LEASE + Duration::from_secs(20)).await;
        assert_eq!(stage.entry(), None);
        assert_eq!(stage.job().unwrap().state, State::Done);
        stage.is_tidy();
    });
}

#[test]
fn a_job_that_waits_among_thousands_is_cancelled_within_seconds() {
    run_in_virtual_time(async {
        let stage = OneImage::new();
        let source = Some(Source::Volume(stage.volumes[0]));
        // each waits for its next attempt
        let waiting = |image_id| Record {
            not_before: Some(epoch() + SignedDuration::from_secs(100)),
            ..Record::new(image_id, Trigger::Request, source, Some("blue".into()), epoch())
        };
        {
            let mut world = stage.world.lock();
            world.right_clocks = true;
            for _ in 0..3_000 {
                let other = world.dice.uuid();
                world.ceph.store_job(&waiting(other));
            }
            world.ceph.store_job(&waiting(stage.image));
        }
        let _daemons = ["one", "two"].map(|name| stage.daemon(name, "clone"));
        sleep(Duration::from_secs(30)).await;
        let job = stage.job().unwrap();
        assert_eq!((job.state, job.attempts, job.owner), (State::Accepted, 0, None), "it waits");
        assert_eq!(stage.store.cancel(stage.image).await.unwrap(), Some(Cancelled::Signalled));
        let took = stage.until(|job| job.state == State::Cancelled).await;
        assert!(took < Duration::from_secs(10), "it was cancelled after {took:?}");
    });
}
