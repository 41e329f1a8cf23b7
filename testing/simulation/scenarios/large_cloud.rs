//! A large cloud without accidents: how often daemons ask Ceph and Glance. Each world is of one seed, since the numbers
//! hardly depend on it. They are printed: `cargo test --lib large_cloud -- --nocapture`.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use jiff::SignedDuration;
use tokio::time::{Instant, sleep};
use uuid::Uuid;

use super::run_in_virtual_time;
use crate::job::record::{Record, State};
use crate::job::simulation::actors::daemon::{Daemon, epoch};
use crate::job::simulation::faults::dice::Dice;
use crate::job::simulation::faults::odds::Faults;
use crate::job::simulation::faults::world::{Shared, World};
use crate::job::simulation::state::glance::ImageRecord;
use crate::request::{Source, Trigger};

/// The calls that are counted, by how their descriptions begin.
const CALLS: [(&str, &str); 17] = [
    ("lock job.", LEASES),
    ("read job.", "record reads"),
    ("read index.live", "index versions"),
    ("omap index.", PAGES),
    ("entry of index.", "index entries"),
    ("omap ", "other reads"),
    ("read ", "other reads"),
    ("is locked ", "other reads"),
    ("images of ", "lists"),
    ("trash of ", "lists"),
    ("snapshots of ", "lists"),
    ("metadata ", "tags"),
    ("tag of ", "tags"),
    ("image ", "tags"),
    ("list objects", "walks of a whole pool"),
    ("glance patch ", "Glance changes"),
    ("glance ", GLANCE),
];
const LEASES: &str = "leases asked";
const PAGES: &str = "index pages";
const GLANCE: &str = "Glance reads";

#[derive(Clone, Default)]
struct Counts(Arc<Mutex<BTreeMap<&'static str, u64>>>);

impl Counts {
    /// Counts the calls of the world's daemons from now on.
    fn of(world: &Shared) -> Self {
        let counts = Self::default();
        let kept = counts.clone();
        world.lock().script = Some(Box::new(move |_, call| {
            if let Some((_, what)) = CALLS.iter().find(|(begins, _)| call.starts_with(begins)) {
                *kept.0.lock().unwrap_or_else(PoisonError::into_inner).entry(what).or_default() += 1;
            }
        }));
        counts
    }

    fn take(&self) -> BTreeMap<&'static str, u64> {
        std::mem::take(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

fn number(counts: &BTreeMap<&'static str, u64>, what: &str) -> u64 {
    counts.get(what).copied().unwrap_or(0)
}

/// All that is read of Ceph, but for the headers of a sweep.
fn reads(counts: &BTreeMap<&'static str, u64>) -> u64 {
    let others = [LEASES, GLANCE, "Glance changes"];
    counts.iter().filter(|(what, _)| !others.contains(what)).map(|(_, number)| number).sum()
}

fn world() -> World {
    let mut state = World::new(Dice::new(5), Faults::default(), Vec::new());
    state.small_pages = false;
    state
}

/// Requests of twenty projects, each with two volumes, that are stored and wait for their turn.
fn queue_requests(state: &mut World, count: usize) -> Vec<Uuid> {
    let volumes: Vec<(String, Uuid)> = (0..40).map(|n| (format!("project{}", n / 2), state.dice.uuid())).collect();
    for (project, volume) in &volumes {
        state.cloud.create_volume(&mut state.ceph, *volume, project);
    }
    (0..count)
        .map(|number| {
            let (image_id, (project, volume)) = (state.dice.uuid(), &volumes[number % volumes.len()]);
            let source = Source::Volume(*volume);
            let record = ImageRecord::queued(image_id, project, vec![source.tag()], Some(source));
            state.cloud.images.insert(image_id.to_string(), record);
            let created = epoch() + SignedDuration::from_millis(i64::try_from(number).unwrap());
            let project = Some(project.clone());
            state.ceph.store_job(&Record::new(image_id, Trigger::Request, Some(source), project, created));
            image_id
        })
        .collect()
}

fn done(world: &Shared) -> usize {
    world.lock().history.ended.values().filter(|state| **state == State::Done).count()
}

/// Active images, volumes, and the records of jobs that ended in the last six days: one in a hundred without an image.
fn fill(state: &mut World, (images, volumes, ended): (usize, usize, usize)) {
    for number in 0..images.max(ended) {
        let image_id = state.dice.uuid();
        let is_done = number < images && number % 100 != 0;
        if number < ended {
            let age = SignedDuration::from_secs(i64::try_from(3600 + 500_000 / ended * number).unwrap());
            let mut record = Record::new(image_id, Trigger::Request, None, None, epoch() - age);
            record.dest_pool = Some("images".into());
            let states = if is_done { &[State::Copying, State::Publishing, State::Done][..] } else { &[State::Failed] };
            for next in states {
                record.enter(*next, epoch() - age).unwrap();
            }
            state.ceph.store_job(&record);
        }
        if number < images {
            let mut record = ImageRecord::queued(image_id, "blue", Vec::new(), None);
            record.image.status = "active".into();
            state.cloud.images.insert(image_id.to_string(), record);
            state.ceph.create("images", &image_id.to_string(), 1, false);
        }
    }
    for _ in 0..volumes {
        let name = format!("volume-{}", state.dice.uuid());
        state.ceph.create("volumes", &name, 1, false);
    }
}

/// What ten daemons without work ask within that time.
async fn idle(world: &Shared, counts: &Counts, time: Duration, what: &str) -> (f64, f64, f64) {
    (world.lock().history.headers, _) = (0, counts.take());
    sleep(time).await;
    let (counts, headers, seconds) = (counts.take(), world.lock().history.headers, time.as_secs_f64());
    let found = (reads(&counts) as f64 / seconds, headers as f64 / seconds, number(&counts, GLANCE) as f64 / seconds);
    let (reads, headers, glance) = (found.0, found.1, found.2 * 60.0);
    println!("{what}: {reads:.2} reads/s, {headers:.2} headers/s, Glance {glance:.2}/min: {counts:?}");
    assert_eq!(number(&counts, "walks of a whole pool"), 0);
    (reads, headers, glance)
}

fn ten_daemons(world: &Shared) -> Vec<Daemon> {
    (0..10).map(|number| Daemon::start(world, format!("node{number}"), super::config("", ""))).collect()
}

#[test]
fn ten_idle_daemons_ask_as_little_in_a_large_cloud_as_in_a_small_one() {
    run_in_virtual_time(async {
        for size in [(50_000, 50_000, 35_000), (2_000, 2_000, 1_500)] {
            let mut state = world();
            fill(&mut state, size);
            let world = Shared(Arc::new(Mutex::new(state)));
            // a daemon that walks the whole pool for a lost index would be counted
            world.lock().ceph.set_keys("index.live", &[]);
            let counts = Counts::of(&world);
            let daemons = ten_daemons(&world);
            sleep(Duration::from_secs(5 * 60)).await;
            if size.0 > 10_000 {
                let (reads, headers, _) = idle(&world, &counts, Duration::from_secs(30 * 60), "first sweep").await;
                assert!(reads < 13.0 && headers < 11.0, "{size:?}: {reads} reads and {headers} headers a second");
                // both first sweeps
                sleep(Duration::from_secs(3 * 60 * 60)).await;
            }
            sleep(Duration::from_secs(10 * 60)).await;
            let (reads, headers, glance) = idle(&world, &counts, Duration::from_secs(30 * 60), "afterwards").await;
            assert!(reads <= 2.0 && headers <= 1.1, "{size:?}: {reads} reads and {headers} headers a second");
            assert!(glance <= 2.1, "{size:?}: {glance} Glance requests a minute");
            drop(daemons);
            let world = world.lock();
            assert!(world.violations.is_empty(), "{:?}", world.violations);
            assert_eq!(world.ceph.jobs().len(), size.2, "a record was removed");
        }
    });
}

#[test]
fn a_poll_costs_by_what_changed_and_not_by_what_waits() {
    run_in_virtual_time(async {
        const WAITING: usize = 5_000;
        const DONE: usize = 48;
        let mut state = world();
        queue_requests(&mut state, WAITING);
        let world = Shared(Arc::new(Mutex::new(state)));
        let counts = Counts::of(&world);
        let daemons: Vec<Daemon> = (0..4)
            .map(|number| {
                let config = super::config("method = server-copy\nmax_jobs = 4", "");
                Daemon::start(&world, format!("node{number}"), config)
            })
            .collect();
        let began = Instant::now();
        while done(&world) < DONE {
            sleep(Duration::from_secs(1)).await;
            assert!(began.elapsed() < Duration::from_secs(600), "{} of {DONE} are done", done(&world));
        }
        let seconds = began.elapsed().as_secs();
        let counts = counts.take();
        let told = world.lock().ceph.job_records().iter().filter(|record| record.acknowledged).count();
        println!("{DONE} of {WAITING} done and {told} acknowledged in {seconds} s: {counts:?}");
        let (tried, needed) = (number(&counts, LEASES), u64::try_from(DONE + told).unwrap());
        // some are under way at the end
        assert!(tried < needed + needed / 5 + 100, "{tried} leases asked for {needed}");
        let (waited, read) = (u64::try_from(WAITING).unwrap(), number(&counts, "record reads"));
        assert!(read < needed * 4 + 200, "{read} records read for {needed} jobs, and {waited} wait");
        let pages = number(&counts, PAGES);
        // of each daemon, every 2.5 s
        assert!(pages < (seconds * 2 / 5 + 8) * 4 * 6, "{pages} index pages in {seconds} s");
        drop(daemons);
        assert!(world.lock().violations.is_empty(), "{:?}", world.lock().violations);
    });
}
