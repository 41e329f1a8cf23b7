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
