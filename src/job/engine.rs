//! The engine: polls for waiting jobs, takes a lease on those it has room for, and runs them.
//!
//! Any number of daemons do the same over the same jobs; the lease decides. Each picks the oldest job of the project
//! that has the fewest jobs running here, so that one tenant's five hundred requests do not starve another's one.
//!
//! A poll costs by what has changed, not by what waits: it goes by a copy of the index (`index_copy.rs`). Only a daemon
//! that has a place asks for the lease of a job to run it.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::Instrument;
use uuid::Uuid;

use super::backoff::is_due;
use super::context::Context;
use super::daemons::{self, DaemonEntry, HEARTBEAT};
use super::index_copy::{IndexCopy, SINGLE_READS_MAX, ToRead};
use super::lease::{Asked, Lease};
use super::record::State;
use super::run::{Acknowledged, JobRun, RunResult};
use super::slots::PoolSlots;
use super::store::{Error, Summary};
use crate::ceph::{self, ErrorKind, Progress};
use crate::config::Config;
use crate::publish::image_status::SHOWN_AFTER;
use crate::telemetry::unix_time;

/// How often the engine looks for jobs that other daemons stored, or whose lease ran out.
const POLL_INTERVAL: Duration = Duration::from_secs(2);

/// The same while there was no job at the last poll. A job that this daemon's own intake stores wakes it; what a
/// command asks of an ended job waits so long.
const IDLE_POLL_INTERVAL: Duration = Duration::from_secs(8);

/// How long one poll may take. A job that was claimed by a poll that is given up is given up with it.
const POLL_TIMEOUT: Duration = Duration::from_secs(30);

/// How many times a daemon that was fenced waits for its jobs to notice, [`POLL_INTERVAL`] each.
const RECONNECT_DRAIN_POLLS: u32 = 15;

/// How long the claim of one job may take, and how long that job is left alone after a claim that failed.
const CLAIM_WITHIN: Duration = Duration::from_secs(10);
const CLAIM_PAUSE: Duration = Duration::from_secs(30);

/// How long a job whose record cannot be read is left alone.
const UNREADABLE_PAUSE: Duration = Duration::from_secs(600);

/// How long an index entry without a record is given: its record may be about to be written.
const ORPHAN_PAUSE: Duration = Duration::from_secs(30);

/// How long a daemon leaves a job alone that another one is to do, for lack of a backend.
const OTHER_BACKEND_PAUSE: Duration = Duration::from_secs(60);

/// How long other daemons leave a job whose grace is over to the daemon whose clock measured it. Another daemon would
/// have to start the grace again.
const GRACE_OWNER_PRIORITY: SignedDuration = SignedDuration::from_secs(30);

/// How long a daemon that stops tries to tell the others.
const LEAVE_WITHIN: Duration = Duration::from_secs(2);

/// Between two heartbeats of a queued job that a service handed over. The service falls back to its native path when
/// nothing changes on the image record for two minutes.
const HEARTBEAT_INTERVAL: Duration = Duration::from_secs(30);

/// How much later a daemon may send a heartbeat, in seconds: they do not all try at the same moment.
const HEARTBEAT_SPREAD: u64 = 10;

/// Maximum number of concurrent acknowledgements. A client service waits ten seconds for its first one, then falls back
/// to its native path.
const MAX_CONCURRENT_ACKS: usize = 8;

/// The oldest jobs to be acknowledged, in an order that is another one for each daemon: they meet rarely.
const ACK_WINDOW: usize = 512;

/// What the engine does at the moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EngineStatus {
    pub running: usize,
    pub waiting: usize,
    /// When the engine last looked for work and got an answer.
    pub last_poll: Instant,
    /// When the engine last looked, answer or not: it is not stalled.
    pub last_turn: Instant,
}

/// A job that runs here.
struct Running {
    project: String,
    progress: Arc<Progress>,
    /// It waits for a service: it takes none of the `max_jobs`.
    waits: Arc<AtomicBool>,
    /// Its previous owner died or stalled with it.
    suspect: bool,
    /// Its image is active: it takes none of the `max_jobs`, but one of the `max_detach`.
    detaches: bool,
}

/// What the jobs that run here take up.
#[derive(Debug, Default)]
struct Load {
    /// All of them.
    jobs: usize,
    /// Those that wait for no service.
    copying: usize,
    /// The same by project.
    copying_by_project: HashMap<String, usize>,
    /// All of them, by project. A job that waits for a service counts: any client may say that it is one.
    by_project: HashMap<String, usize>,
    /// A job runs whose previous owner died or stalled with it.
    suspect: bool,
    /// Jobs behind an active image. The others do not count them.
    detaching: usize,
    /// The same as `suspect`, of those.
    detaching_suspect: bool,
}

impl Load {
    /// Jobs that wait for a service come on top of `max_jobs`, as many again at most.
    fn has_room(&self, max_jobs: usize) -> bool {
        self.copying < max_jobs && self.jobs < max_jobs.saturating_mul(2)
    }

    /// Takes out the next job, if one may start: one that a service handed over and waits for goes first, then the
    /// oldest of the project that has the fewest jobs running here. A project with `max_jobs` running here has no such
    /// precedence: any client may say that it is a service. One suspect runs at a time: when the daemon dies,
    /// it is known with which.
    fn take_fairest(
        &self,
        waiting: &mut Vec<(Uuid, Summary)>,
        per_project: usize,
        max_jobs: usize,
    ) -> Option<(Uuid, Summary)> {
        let of_project = |jobs: &HashMap<String, usize>, summary: &Summary| {
            jobs.get(summary.project.as_deref().unwrap_or_default()).copied().unwrap_or(0)
        };
        let busy = |summary: &Summary| of_project(&self.by_project, summary);
        let fairest = waiting
            .iter()
            .enumerate()
            .filter(|(_, (_, summary))| per_project == 0 || of_project(&self.copying_by_project, summary) < per_project)
            .filter(|(_, (_, summary))| !(self.suspect && summary.suspect))
            .min_by_key(|(_, (id, summary))| {
                let is_urgent = summary.handover && busy(summary) < max_jobs;
                (!is_urgent, busy(summary), summary.created, *id)
            })
            .map(|(index, _)| index)?;
        Some(waiting.swap_remove(fairest))
    }

    /// Takes out the next job behind an active image, if one may start: the oldest.
    fn take_detaching(&self, detaching: &mut Vec<(Uuid, Summary)>, max_detach: usize) -> Option<(Uuid, Summary)> {
        let oldest = detaching
            .iter()
            .enumerate()
            .filter(|_| self.detaching < max_detach)
            .filter(|(_, (_, summary))| !(self.detaching_suspect && summary.suspect))
            .min_by_key(|(_, (id, summary))| (summary.detaching, *id))
            .map(|(index, _)| index)?;
        Some(detaching.swap_remove(oldest))
    }
}

/// Whether the jobs here get anything done.
#[derive(Debug, Default)]
struct ProgressTracker {
    /// Jobs that came to an end.
    ended: u64,
    /// What was counted when it last had changed, and when that was.
    seen: u64,
    at: Option<Instant>,
}

/// What is known of an acknowledgement.
#[derive(Debug)]
struct Told {
    /// What the index said of it.
    at: Option<Timestamp>,
    /// When a client service is to be told again. `None`: the requester was told, once.
    again: Option<Instant>,
}

pub struct Engine {
    context: Context,
    pools: PoolSlots,
    running: Mutex<HashMap<Uuid, Running>>,
    progress: Mutex<ProgressTracker>,
    /// Jobs that are left alone until then.
    backoff_until: Mutex<HashMap<Uuid, Instant>>,
    /// Queued jobs that were acknowledged, by this daemon or another one.
    acknowledged: Mutex<HashMap<Uuid, Told>>,
    /// Queued jobs to be acknowledged next.
    to_acknowledge: Mutex<VecDeque<Uuid>>,
    /// Queued jobs that are being acknowledged.
    acknowledging: Mutex<HashSet<Uuid>>,
    index: Mutex<IndexCopy>,
    /// Jobs that something happened to here, and how often: their index entries are wanted soon.
    touched: Mutex<BTreeMap<Uuid, u64>>,
    /// Index entries whose record was not there.
    orphans: Mutex<HashSet<Uuid>>,
    /// The entry that this daemon last sent to the others, and when.
    told: Mutex<Option<(Instant, DaemonEntry)>>,
    status: Mutex<EngineStatus>,
    wake: Notify,
    tasks: TaskTracker,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Engine {
    pub fn new(context: Context) -> Arc<Self> {
        Arc::new(Self {
            context,
            pools: PoolSlots::default(),
            running: Mutex::default(),
            progress: Mutex::default(),
            backoff_until: Mutex::default(),
            acknowledged: Mutex::default(),
            to_acknowledge: Mutex::default(),
            acknowledging: Mutex::default(),
            index: Mutex::default(),
            touched: Mutex::default(),
            orphans: Mutex::default(),
            told: Mutex::default(),
            status: Mutex::new(EngineStatus {
                running: 0,
                waiting: 0,
                last_poll: Instant::now(),
                last_turn: Instant::now(),
            }),
            wake: Notify::new(),
            tasks: TaskTracker::new(),
        })
    }

    pub fn context(&self) -> &Context {
        &self.context
    }

    pub fn status(&self) -> EngineStatus {
        let mut status = lock(&self.status).clone();
        status.running = lock(&self.running).len();
        status
    }

    /// There may be something new for this job: look now, also if it was left alone.
    pub fn wake(&self, image_id: Uuid) {
        lock(&self.backoff_until).remove(&image_id);
        self.touch(image_id);
        self.wake.notify_one();
    }

    /// The index entry of this job is wanted at the next poll.
    fn touch(&self, image_id: Uuid) {
        let mut touched = lock(&self.touched);
        // of more than that the next read of the whole index tells
        if touched.len() < SINGLE_READS_MAX || touched.contains_key(&image_id) {
            *touched.entry(image_id).or_default() += 1;
        }
    }

    /// Whether the index had a job of this image that had not ended, at the latest look.
    pub fn knows(&self, image_id: &Uuid) -> bool {
        lock(&self.index).entries().contains_key(image_id)
    }

    /// Runs jobs until `stop` fires; those that run then may end until `drain` fires, and are released after that.
    pub async fn run(self: Arc<Self>, stop: CancellationToken, drain: CancellationToken) {
        while !stop.is_cancelled() {
            self.send_heartbeat();
            self.report_load();
            let mut pause = POLL_INTERVAL;
            match tokio::time::timeout(POLL_TIMEOUT, self.poll_jobs(&drain)).await {
                Ok(Ok(are_jobs)) if !self.context.clients.is_fenced() => {
                    if !are_jobs {
                        pause = IDLE_POLL_INTERVAL;
                    }
                    lock(&self.status).last_poll = Instant::now();
                    metrics::gauge!("rbd_offload_last_poll_timestamp_seconds").set(unix_time());
                }
                Ok(Err(Error::Ceph(error))) if error.kind() == ErrorKind::Fenced => self.reconnect_after_fence().await,
                _ if self.context.clients.is_fenced() => self.reconnect_after_fence().await,
                Ok(Ok(_)) => {}
                Ok(Err(error)) => {
                    // what this daemon knew of the cluster's jobs may have changed
                    metrics::gauge!("rbd_offload_jobs_due").set(0.0);
                    tracing::warn!(%error, "could not poll for jobs; the engine retries");
                }
                Err(_) => tracing::warn!(seconds = POLL_TIMEOUT.as_secs(), "Ceph does not answer; the engine retries"),
            }
            lock(&self.status).last_turn = Instant::now();
            tokio::select! {
                () = stop.cancelled() => {}
                () = self.wake.notified() => {}
                () = tokio::time::sleep(pause) => {}
            }
        }
        lock(&self.to_acknowledge).clear();
        self.tasks.close();
        self.tasks.wait().await;
        self.leave().await;
    }

    /// Tells the other daemons that this one stops.
    async fn leave(&self) {
        let context = &self.context;
        let entry = DaemonEntry::of(&context.config.borrow(), &context.identity);
        let leave = daemons::leave(context.store.objects().as_ref(), &context.identity, entry, context.clock.now());
        if let Err(error) = within(LEAVE_WITHIN, leave).await {
            tracing::debug!(error, "the other daemons were not told that this one stops; its entry expires");
        }
    }

    /// Sends this daemon's entry (it runs, and serves these backends) to the others, in the background: every
    /// [`HEARTBEAT`], and at once when the configuration has changed.
    fn send_heartbeat(self: &Arc<Self>) {
        let entry = DaemonEntry::of(&self.context.config.borrow(), &self.context.identity);
        let mut told = lock(&self.told);
        if told.as_ref().is_some_and(|(at, before)| at.elapsed() < HEARTBEAT && *before == entry) {
            return;
        }
        *told = Some((Instant::now(), entry.clone()));
        drop(told);
        let engine = Arc::clone(self);
        self.tasks.spawn(async move {
            let context = &engine.context;
            let sent = daemons::send_heartbeat(context.store.objects().as_ref(), &context.identity, &entry);
            if let Err(error) = within(POLL_TIMEOUT, sent).await {
                tracing::debug!(error, "the other daemons were not told that this one lives; the engine retries");
                lock(&engine.told).take();
            }
        });
    }

    /// Another daemon fenced this one. Every job here has lost its lease; once they have all noticed, the daemon
    /// connects again.
    async fn reconnect_after_fence(&self) {
        tracing::error!("fenced by another daemon (Ceph blocklist); reconnecting");
        metrics::counter!("rbd_offload_fenced_total").increment(1);
        for _ in 0..RECONNECT_DRAIN_POLLS {
            if lock(&self.running).is_empty() {
                break;
            }
            tokio::time::sleep(POLL_INTERVAL).await;
        }
        if let Err(error) = self.context.clients.reconnect().await {
            tracing::warn!(%error, "could not reconnect; the engine retries");
        }
    }

    /// Polls once: starts as many of the waiting jobs as there is room for. `false`: there is no job at all.
    async fn poll_jobs(self: &Arc<Self>, drain: &CancellationToken) -> Result<bool, Error> {
        let config = self.context.config.borrow().clone();
        let (max_jobs, max_detach) = (config.offload.max_jobs, config.offload.max_detach);
        let (per_project, per_pool) = (config.offload.max_jobs_per_project, config.offload.max_jobs_per_pool);
        self.record_progress();
        self.refresh_index(&config).await?;
        let (are_jobs, to_try) = {
            let index = lock(&self.index);
            self.report_detaching(&index);
            self.report_due(&index);
            (!index.entries().is_empty(), index.to_try(self.context.identity.instance, config.jobs.lease))
        };
        // those that are acknowledged now are left out; the next ones are chosen below
        lock(&self.to_acknowledge).clear();
        let has_room = |(_, summary): &(Uuid, Summary)| {
            summary.pool.as_deref().is_none_or(|pool| !self.pools.is_full(pool, per_pool))
        };
        let (mut detaching, due): (Vec<_>, Vec<_>) =
            self.due(to_try).into_iter().partition(|(_, summary)| summary.detaching.is_some());
        let (mut waiting, without_room): (Vec<_>, Vec<_>) = due.into_iter().partition(has_room);
        lock(&self.status).waiting = waiting.len();
        metrics::gauge!("rbd_offload_jobs_waiting").set(waiting.len() as f64);
        let mut single_reads = 0;
        loop {
            let load = self.load();
            if !load.has_room(max_jobs) {
                break;
            }
            let Some((image_id, summary)) = load.take_fairest(&mut waiting, per_project, max_jobs) else { break };
            if !self.try_start(image_id, summary, &mut single_reads, drain).await? {
                break;
            }
        }
        while let Some((image_id, summary)) = self.load().take_detaching(&mut detaching, max_detach) {
            if !self.try_start(image_id, summary, &mut single_reads, drain).await? {
                break;
            }
        }
        self.report_load();
        self.queue_acknowledgements(waiting.into_iter().chain(without_room));
        self.acknowledge_next(drain);
        Ok(are_jobs)
    }

    /// Brings the copy of the index up to date, as far as that is worth its reads.
    async fn refresh_index(&self, config: &Config) -> Result<(), Error> {
        let store = &self.context.store;
        // before the version: what happened to them is in it
        let touched = lock(&self.touched).clone();
        let version = store.live_version().await?;
        let load = self.load();
        let detaches = |index: &IndexCopy| index.entries().values().any(|summary| summary.detaching.is_some());
        let has_room = load.has_room(config.offload.max_jobs)
            || load.detaching < config.offload.max_detach && detaches(&lock(&self.index));
        let to_read = lock(&self.index).plan_read(version, has_room, touched.len());
        match to_read {
            ToRead::Nothing => {}
            ToRead::All => {
                let live = store.live().await?;
                self.prune_state(&live);
                lock(&self.index).replace(live, version);
            }
            ToRead::Single => {
                for image_id in touched.keys() {
                    let entry = store.live_entry(*image_id).await?;
                    lock(&self.index).set(*image_id, entry);
                }
            }
        }
        // those that came meanwhile stay
        lock(&self.touched).retain(|image_id, times| touched.get(image_id) != Some(times));
        Ok(())
    }

    /// Claims a job and starts it. `false`: the copy of the index is too old to go on by it.
    async fn try_start(
        self: &Arc<Self>,
        image_id: Uuid,
        summary: Summary,
        single_reads: &mut usize,
        drain: &CancellationToken,
    ) -> Result<bool, Error> {
        if lock(&self.acknowledging).contains(&image_id) {
            return Ok(true);
        }
        let Some(summary) = self.confirm(image_id, summary, single_reads).await? else {
            return Ok(*single_reads <= SINGLE_READS_MAX);
        };
        if let Some(job) = self.try_claim(image_id).await? {
            self.start(image_id, summary, job, drain.clone());
        }
        Ok(true)
    }

    /// The entry of a job that is about to be claimed, as it is now. `None`: another daemon was quicker, or the job is
    /// not due any more.
    async fn confirm(
        &self,
        image_id: Uuid,
        summary: Summary,
        single_reads: &mut usize,
    ) -> Result<Option<Summary>, Error> {
        if lock(&self.index).is_current() {
            return Ok(Some(summary));
        }
        *single_reads += 1;
        if *single_reads > SINGLE_READS_MAX {
            return Ok(None);
        }
        let entry = self.context.store.live_entry(image_id).await?;
        lock(&self.index).set(image_id, entry.clone());
        if entry.as_ref() == Some(&summary) {
            return Ok(Some(summary));
        }
        let lease = self.context.config.borrow().jobs.lease;
        let may_try = lock(&self.index).may_try(&image_id, self.context.identity.instance, lease);
        let entry = entry.filter(|entry| may_try && entry.detaching.is_some() == summary.detaching.is_some());
        Ok(self.due(entry.into_iter().map(|entry| (image_id, entry)).collect()).pop().map(|(_, entry)| entry))
    }

    /// Shows how many jobs run here.
    fn report_load(&self) {
        let load = self.load();
        metrics::gauge!("rbd_offload_jobs_running").set((load.jobs + load.detaching) as f64);
        metrics::gauge!("rbd_offload_jobs_detaching").set(load.detaching as f64);
    }

    /// Shows how many images of the whole cluster are active and depend on their source, and since when the oldest
    /// does.
    fn report_detaching(&self, index: &IndexCopy) {
        let since: Vec<_> = index.entries().values().filter_map(|summary| summary.detaching).collect();
        let age =
            since.iter().min().map_or(0.0, |oldest| self.context.clock.now().duration_since(*oldest).as_secs_f64());
        metrics::gauge!("rbd_offload_images_detaching").set(since.len() as f64);
        metrics::gauge!("rbd_offload_oldest_detaching_seconds").set(age.max(0.0));
    }

    /// Shows how many jobs of the whole cluster run, or should, before their image is active. Those count too that this
    /// daemon has just failed to claim: an alert goes by it.
    fn report_due(&self, index: &IndexCopy) {
        let now = self.context.clock.now();
        let is_due = |summary: &&Summary| summary.detaching.is_none() && is_due(summary.not_before, now, false);
        let due = index.entries().values().filter(is_due).count();
        metrics::gauge!("rbd_offload_jobs_due").set(due as f64);
    }

    /// The jobs that the index shows as due. They start as soon as there is room.
    fn due(&self, live: Vec<(Uuid, Summary)>) -> Vec<(Uuid, Summary)> {
        let now = self.context.clock.now();
        let running = lock(&self.running);
        let acknowledging = lock(&self.acknowledging);
        let mut held = lock(&self.backoff_until);
        let config = self.context.config.borrow();
        live.into_iter()
            .filter(|(id, _)| !running.contains_key(id) && !acknowledging.contains(id))
            .filter(|(id, summary)| {
                if summary.backend.as_ref().is_some_and(|backend| !config.backends.contains_key(backend)) {
                    // for another daemon; this one looks again when that has had time
                    held.entry(*id).or_insert_with(|| Instant::now() + OTHER_BACKEND_PAUSE);
                }
                held.get(id).is_none_or(|until| *until <= Instant::now())
            })
            .filter(|(_, summary)| {
                let is_others = summary.grace_by.is_some_and(|by| by != self.context.identity.instance);
                let patience = if is_others { GRACE_OWNER_PRIORITY } else { SignedDuration::ZERO };
                is_due(
                    summary.not_before.and_then(|time| time.checked_add(patience).ok()),
                    now,
                    summary.detaching.is_some(),
                )
            })
            .collect()
    }

    fn load(&self) -> Load {
        let mut load = Load::default();
        for job in lock(&self.running).values() {
            if job.detaches {
                load.detaching += 1;
                load.detaching_suspect |= job.suspect;
                continue;
            }
            load.suspect |= job.suspect;
            load.jobs += 1;
            *load.by_project.entry(job.project.clone()).or_default() += 1;
            if !job.waits.load(Ordering::SeqCst) {
                load.copying += 1;
                *load.copying_by_project.entry(job.project.clone()).or_default() += 1;
            }
        }
        load
    }

    /// Claims a job. What goes wrong with one job holds that job alone.
    ///
    /// # Errors
    /// Those of the connection, which are the same for every job.
    async fn try_claim(&self, image_id: Uuid) -> Result<Option<JobRun>, Error> {
        let error = match tokio::time::timeout(CLAIM_WITHIN, self.claim(image_id)).await {
            Ok(Ok(claimed)) => return Ok(claimed),
            Ok(Err(Error::Ceph(error))) if error.kind() == ErrorKind::Fenced => return Err(error.into()),
            Ok(Err(error)) => error.to_string(),
            Err(_) => format!("no answer within {} s", CLAIM_WITHIN.as_secs()),
        };
        tracing::warn!(%image_id, error, "a job could not be claimed; the others go on");
        self.defer(image_id, CLAIM_PAUSE);
        Ok(None)
    }

    /// Takes the lease and reads the record. `None`: not ours to run now.
    async fn claim(&self, image_id: Uuid) -> Result<Option<JobRun>, Error> {
        let objects = self.context.store.objects().clone();
        let duration = self.context.config.borrow().jobs.lease;
        lock(&self.index).note_try(&image_id);
        let lease = match Lease::ask(objects.as_ref(), image_id, &self.context.identity, duration).await? {
            Asked::Taken(lease) => lease,
            Asked::Held => {
                if !lock(&self.index).note_held(&image_id) {
                    // look again when it may have run out
                    self.defer(image_id, (duration / 3).max(POLL_INTERVAL));
                }
                return Ok(None);
            }
            Asked::NoJob => return self.forget_orphan(image_id).await.map(|()| None),
        };
        let stored = match self.context.store.load(image_id).await {
            Ok(Some(stored)) => stored,
            Ok(None) => return Ok(None),
            Err(error @ Error::Unreadable { .. }) => {
                lease.release(objects.as_ref()).await;
                tracing::error!(%image_id, %error, "cannot process job record");
                self.defer(image_id, UNREADABLE_PAUSE);
                return Ok(None);
            }
            Err(error) => {
                lease.release(objects.as_ref()).await;
                return Err(error);
            }
        };
        if let Some((_, owner)) = stored.record.owner_instance() {
            // it did not release this one: its other jobs wait as well
            lock(&self.index).note_gone(owner);
        }
        if stored.is_settled() {
            lease.release(objects.as_ref()).await;
            self.context.store.index(&stored).await?;
            lock(&self.index).set(image_id, None);
            return Ok(None);
        }
        if !stored.is_urgent()
            && !is_due(stored.record.not_before, self.context.clock.now(), stored.record.state == State::Detaching)
        {
            lease.release(objects.as_ref()).await;
            self.context.store.index(&stored).await?;
            lock(&self.index).set(image_id, Some(Summary::from(&stored)));
            return Ok(None);
        }
        Ok(Some(JobRun::new(self.context.clone(), lease, stored, self.pools.clone())))
    }

    /// An index entry without a record: it may be about to be written, or the entry goes.
    async fn forget_orphan(&self, image_id: Uuid) -> Result<(), Error> {
        if lock(&self.orphans).insert(image_id) {
            self.defer(image_id, ORPHAN_PAUSE);
            return Ok(());
        }
        lock(&self.orphans).remove(&image_id);
        self.context.store.forget(image_id).await?;
        lock(&self.index).set(image_id, None);
        Ok(())
    }

    fn defer(&self, image_id: Uuid, pause: Duration) {
        lock(&self.backoff_until).insert(image_id, Instant::now() + pause);
    }

    fn start(self: &Arc<Self>, image_id: Uuid, summary: Summary, job: JobRun, drain: CancellationToken) {
        let Summary { project, suspect, .. } = summary;
        // the index may be of the moment before the image was active
        let detaches = job.detaches();
        let (progress, waits) = (job.progress(), job.waits());
        let running = Running { project: project.unwrap_or_default(), progress, waits, suspect, detaches };
        lock(&self.running).insert(image_id, running);
        let engine = Arc::clone(self);
        let span = job.span();
        let work = async move {
            let outcome = job.run(drain).await;
            match outcome {
                // how long it waits stands in the index, where `retry` and `cancel` may end it
                RunResult::Waiting(pause) => engine.defer(image_id, pause.min(POLL_INTERVAL)),
                RunResult::LeftToAnother => engine.defer(image_id, OTHER_BACKEND_PAUSE),
                RunResult::Abandoned => engine.defer(image_id, POLL_INTERVAL),
                RunResult::Ended(_) => lock(&engine.progress).ended += 1,
                RunResult::Released => {}
            }
            // the run has written another entry, or removed it
            engine.touch(image_id);
            lock(&engine.running).remove(&image_id);
            engine.wake.notify_one();
        };
        self.tasks.spawn(work.instrument(span));
    }

    /// Looks whether the jobs here have got anything done.
    fn record_progress(&self) {
        let steps = lock(&self.running).values().fold(0u64, |sum, job| sum.wrapping_add(job.progress.steps()));
        let mut progress = lock(&self.progress);
        let now = progress.ended.wrapping_add(steps);
        if now != progress.seen {
            (progress.seen, progress.at) = (now, Some(Instant::now()));
        }
    }

    fn is_progressing(&self) -> bool {
        lock(&self.progress).at.is_some_and(|at| at.elapsed() < HEARTBEAT_INTERVAL)
    }

    /// Chooses the queued jobs to be acknowledged next: once to the requester, and as a periodic heartbeat to a client
    /// service. An acknowledgement stands in the index, so that the other daemons leave that job out.
    fn queue_acknowledgements(&self, waiting: impl Iterator<Item = (Uuid, Summary)>) {
        let now = self.context.clock.now();
        let is_to_be_told = |summary: &Summary| {
            let age = summary.created.map(|created| now.duration_since(created).unsigned_abs());
            summary.handover || age.is_none_or(|age| age >= SHOWN_AFTER)
        };
        let is_progressing = self.is_progressing();
        let mut queue: Vec<(Uuid, Summary)> = waiting
            .filter(|(_, summary)| is_to_be_told(summary))
            .filter(|(id, summary)| self.is_unacknowledged(id, summary, is_progressing))
            .collect();
        // a service waits ten seconds for its first one
        let order = |(id, summary): &(Uuid, Summary)| (!summary.handover, summary.created, *id);
        if queue.len() > ACK_WINDOW {
            queue.select_nth_unstable_by_key(ACK_WINDOW, order);
            queue.truncate(ACK_WINDOW);
        }
        queue.sort_by_key(|(id, summary)| (!summary.handover, self.own_hash(id)));
        *lock(&self.to_acknowledge) = queue.into_iter().map(|(id, _)| id).collect();
    }

    /// Another number for each daemon and job.
    fn own_hash(&self, image_id: &Uuid) -> u64 {
        let mut hasher = DefaultHasher::new();
        (self.context.identity.instance, image_id).hash(&mut hasher);
        hasher.finish()
    }

    fn is_unacknowledged(&self, image_id: &Uuid, summary: &Summary, is_progressing: bool) -> bool {
        let now = Instant::now();
        let next = || now + HEARTBEAT_INTERVAL + Duration::from_secs(self.own_hash(image_id) % HEARTBEAT_SPREAD);
        let mut acknowledged = lock(&self.acknowledged);
        match acknowledged.get_mut(image_id) {
            None if summary.told.is_none() => true,
            None => {
                let again = summary.handover.then(next);
                acknowledged.insert(*image_id, Told { at: summary.told, again });
                false
            }
            // begun again since
            Some(told) if summary.told.is_none() && told.at.is_some() => {
                (told.at, told.again) = (None, None);
                true
            }
            // a daemon has told, perhaps this one
            Some(told) if summary.told.is_some() && summary.told != told.at => {
                (told.at, told.again) = (summary.told, summary.handover.then(next));
                false
            }
            Some(told) => is_progressing && told.again.is_some_and(|again| again <= now),
        }
    }

    /// Acknowledges in the background the jobs that were chosen, at most [`MAX_CONCURRENT_ACKS`] at a time.
    fn acknowledge_next(self: &Arc<Self>, drain: &CancellationToken) {
        loop {
            let Some(image_id) = lock(&self.to_acknowledge).pop_front() else { return };
            let is_running = lock(&self.running).contains_key(&image_id);
            let mut acknowledging = lock(&self.acknowledging);
            if acknowledging.len() >= MAX_CONCURRENT_ACKS {
                drop(acknowledging);
                return lock(&self.to_acknowledge).push_front(image_id);
            }
            if is_running || !acknowledging.insert(image_id) {
                continue;
            }
            drop(acknowledging);
            let (engine, drain) = (Arc::clone(self), drain.clone());
            self.tasks.spawn(async move {
                engine.acknowledge(image_id, &drain).await;
                lock(&engine.acknowledging).remove(&image_id);
                engine.acknowledge_next(&drain);
            });
        }
    }

    async fn acknowledge(&self, image_id: Uuid, drain: &CancellationToken) {
        // another daemon may have done it since the index was read
        let read = tokio::time::timeout(CLAIM_WITHIN, self.context.store.live_entry(image_id));
        let Ok(Ok(entry)) = read.await else { return };
        let lease = self.context.config.borrow().jobs.lease;
        let may_try = {
            let mut index = lock(&self.index);
            index.set(image_id, entry.clone());
            let may_try = index.may_try(&image_id, self.context.identity.instance, lease);
            if !may_try {
                // its holder is at work: not again at the next poll
                index.note_try(&image_id);
            }
            may_try
        };
        // that of a daemon that died too: its client service waits for a sign
        let is_due = |entry: &Summary| self.is_unacknowledged(&image_id, entry, self.is_progressing());
        if !entry.is_some_and(|entry| may_try && is_due(&entry)) {
            return;
        }
        lock(&self.acknowledged)
            .entry(image_id)
            .or_insert(Told { at: None, again: None })
            .again
            .replace(Instant::now() + HEARTBEAT_INTERVAL);
        let job = match self.try_claim(image_id).await {
            Ok(Some(job)) => job,
            Ok(None) | Err(_) => {
                // its record may be about to be written
                lock(&self.acknowledged).remove(&image_id);
                return;
            }
        };
        let span = job.span();
        match job.acknowledge(drain.clone()).instrument(span).await {
            Acknowledged::Requester => {
                if let Some(told) = lock(&self.acknowledged).get_mut(&image_id) {
                    told.again = None;
                }
            }
            // again after the interval that was set above
            Acknowledged::Service | Acknowledged::Later => {}
            Acknowledged::NotYet => {
                lock(&self.acknowledged).remove(&image_id);
                self.defer(image_id, POLL_INTERVAL);
            }
        }
        if self.load().has_room(self.context.config.borrow().offload.max_jobs) {
            // there is room for this one by now
            self.wake.notify_one();
        }
    }

    /// Forgets jobs that are over.
    fn prune_state(&self, live: &[(Uuid, Summary)]) {
        let live: HashSet<Uuid> = live.iter().map(|(id, _)| *id).collect();
        lock(&self.backoff_until).retain(|id, _| live.contains(id));
        lock(&self.acknowledged).retain(|id, _| live.contains(id));
        lock(&self.orphans).retain(|id| live.contains(id));
    }
}

/// A call that is given up after `limit`. The error is for the log.
async fn within(limit: Duration, call: impl Future<Output = ceph::Result<()>>) -> Result<(), String> {
    match tokio::time::timeout(limit, call).await {
        Ok(done) => done.map_err(|error| error.to_string()),
        Err(_) => Err(format!("no answer within {} s", limit.as_secs())),
    }
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;

    use super::*;

    fn waiting(project: &str, second: i64) -> (Uuid, Summary) {
        let created = Some(Timestamp::UNIX_EPOCH + SignedDuration::from_secs(second));
        (Uuid::new_v4(), Summary { project: Some(project.into()), created, ..Summary::default() })
    }

    #[test]
    fn a_project_runs_no_more_jobs_than_its_limit_and_the_others_go_on() {
        let mut queue = vec![waiting("a", 1), waiting("a", 2), waiting("b", 3)];
        let (first, third) = (queue[0].0, queue[2].0);
        let mut load = Load::default();
        assert_eq!(load.take_fairest(&mut queue, 1, 4).map(|(id, _)| id), Some(first));
        load.copying_by_project.insert("a".into(), 1);
        assert_eq!(load.take_fairest(&mut queue, 1, 4).map(|(id, _)| id), Some(third));
        load.copying_by_project.insert("b".into(), 1);
        assert_eq!(load.take_fairest(&mut queue, 1, 4), None);
        assert!(load.take_fairest(&mut queue, 0, 4).is_some());
    }

    #[test]
    fn a_service_that_waits_goes_before_plain_requests() {
        let mut queue = vec![waiting("a", 1), waiting("b", 2)];
        queue[1].1.handover = true;
        let handed_over = queue[1].0;
        let load = Load { by_project: HashMap::from([("b".to_owned(), 3)]), ..Load::default() };
        assert_eq!(load.take_fairest(&mut queue, 0, 4).map(|(id, _)| id), Some(handed_over));
    }

    #[test]
    fn a_project_that_says_it_is_a_service_takes_no_more_than_the_places_of_one_project() {
        let mut queue = vec![waiting("a", 2), waiting("b", 1)];
        queue[1].1.handover = true;
        let plain = queue[0].0;
        let load = Load { jobs: 4, by_project: HashMap::from([("b".to_owned(), 4)]), ..Load::default() };
        assert!(load.has_room(4), "its jobs wait, and leave the places of jobs that copy");
        assert_eq!(load.take_fairest(&mut queue, 0, 4).map(|(id, _)| id), Some(plain));
    }

    #[test]
    fn jobs_behind_active_images_have_places_of_their_own() {
        let mut detaching = vec![waiting("a", 2), waiting("a", 1)];
        for (_, summary) in &mut detaching {
            summary.detaching = summary.created;
        }
        let older = detaching[1].0;
        let mut load = Load::default();
        assert_eq!(load.take_detaching(&mut detaching, 2).map(|(id, _)| id), Some(older));
        load.detaching = 2;
        assert_eq!(load.take_detaching(&mut detaching, 2), None);
        assert!(load.has_room(1), "new requests do not wait for old copies");
    }

    #[test]
    fn one_suspect_runs_at_a_time() {
        let mut queue = vec![waiting("a", 1), waiting("a", 2)];
        queue[0].1.suspect = true;
        let (suspect, other) = (queue[0].0, queue[1].0);
        let mut load = Load { suspect: true, ..Load::default() };
        assert_eq!(load.take_fairest(&mut queue, 0, 4).map(|(id, _)| id), Some(other));
        assert_eq!(load.take_fairest(&mut queue, 0, 4), None);
        load.suspect = false;
        assert_eq!(load.take_fairest(&mut queue, 0, 4).map(|(id, _)| id), Some(suspect));
    }

    #[test]
    fn jobs_that_wait_for_a_service_take_no_slot_and_are_bounded() {
        let load = |jobs, copying| Load { jobs, copying, ..Load::default() };
        assert!(load(7, 3).has_room(4));
        assert!(!load(4, 4).has_room(4));
        assert!(!load(8, 0).has_room(4));
    }
}
