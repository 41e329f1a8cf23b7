//! The reconciler: finds requests whose notification was lost, and leftovers of daemons that died.
//!
//! Requests whose notification was lost; records that fell out of the index; private copies, anchors, published images
//! and temporary snapshots that bear this deployment's ownership tag and belong to no live job; ended records that are
//! old enough. One daemon at a time does a round, and among daemons of the same configuration it is one that does them
//! all (`turn.rs`). Jobs whose daemon died need no reconciler: the engine takes them when their lease runs out.
//!
//! A round is a list of parts. Each stands alone: an error in one keeps no other from running. A part that can be long
//! has its time and its number of reads, and goes on in the next round where it stopped: a round costs the same in a
//! cloud of any size. What is old is told by the index, and nothing lists a whole pool. An object, a record or a
//! request that cannot be read is named and passed over. Whatever is removed is removed in custody, by tasks that a
//! round does not wait for when they take long (`cleanup.rs`).

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::cleanup::{Leftover, LeftoverKind, Removals, Removed};
use super::context::Context;
use super::custody::Custody;
use super::daemons;
use super::engine::Engine;
use super::error::CallError;
use super::intake::Intake;
use super::lost_record;
use super::names::{PRIVATE_PREFIX, Private, parse_private};
use super::outcome_message::outcome_message;
use super::record::{Record, State};
use super::signal::Signal;
use super::store::{Error, INDEX_PAGE};
use super::turn::{Tried, Turn};
use crate::ceph::{self, ErrorKind, ImageKey, ImageSpec, LockKey, Locked, Storage, Trashed};
use crate::openstack::{self, ListCursor};
use crate::publish::image_status;
use crate::publish::tag::{OwnershipTag, tag_of};
use crate::request::{self, TagRequest, Trigger};

/// Object whose lock keeps two daemons from doing the same round.
const LOCK_OBJECT: &str = "reconcile";

/// Images asked of Glance at a time.
const PAGE: usize = 200;

/// Image headers read a second when looking for snapshots.
const HEADERS_PER_SECOND: u32 = 500;

/// How much a sweep reads in a round of a minute or less; longer ones read more. The first sweep after the start is
/// quicker: what a daemon left that died is found soon.
struct Pace {
    first: usize,
    then: usize,
}

/// Image headers. The first sweep over 100,000 images takes three hours, the next ones a day.
const HEADERS: Pace = Pace { first: 600, then: 60 };

/// Records of ended jobs that no other rule reads.
const OLD_RECORDS: Pace = Pace { first: 600, then: 6 };

/// Pages of the index of ended jobs that a round of a minute or less looks through for jobs that have just ended, and
/// for old ones.
const ENDED_PAGES: usize = 2;
const EXPIRED_PAGES: usize = 1;

/// Records that such a round reads because they were read before, because their jobs have just ended, or because that
/// was asked for.
const CHECKS_PER_ROUND: usize = 600;

/// How long the sweep over old records may take when the time of its part is over.
const OLD_RECORDS_TIME: Duration = Duration::from_secs(5);

/// How long after its end a job is checked again and again.
const YOUNG: SignedDuration = SignedDuration::from_hours(1);

/// Ended jobs whose next check is kept in mind: those that need one, and others. The rest is read in its turn.
const CHECKS_MAX: usize = 10_000;
const OTHER_CHECKS_MAX: usize = 200;

/// Names that are read at a time from the list of private images, and images from the trash.
const NAMES: usize = 1_000;
const TRASHED: usize = 200;

/// Pages of each of these lists that a round reads.
const LIST_PAGES: usize = 5;

/// How often the entries of daemons that are gone are looked for.
const DEAD_DAEMONS_INTERVAL: Duration = Duration::from_secs(10 * 60);

/// Published images of jobs that ended without one, to be removed.
const PUBLISHED_MAX: usize = 1_000;

/// How often a page is read again whose leftovers were not all removed: a snapshot may be in use for a moment.
const PAGE_TRIES: u32 = 3;

/// How long a thing without a job is given before it is looked at again and removed: its job may be just beginning.
const GRACE: Duration = Duration::from_secs(5);

/// The longest that a part may take when it does not end by itself.
const PART_LIMIT: Duration = Duration::from_secs(30 * 60);

/// After this many unreadable objects in a row, the fault is not one of single objects: the part ends.
const FAILURES_MAX: usize = 10;

/// Ids of records that cannot be read, and that the log has named.
const NAMED_MAX: usize = 1_000;

type Result<T> = std::result::Result<T, CallError>;

/// What a round found.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RoundReport {
    /// Requests without a job.
    pub requests: usize,
    /// Records that were in no index.
    pub records: usize,
    /// Image records repaired.
    pub repaired: usize,
    /// RBD images removed.
    pub images: usize,
    /// Snapshots removed.
    pub snapshots: usize,
    /// Ended records removed for their age.
    pub expired: usize,
}

/// The parts of a round, in their order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    Expire,
    Index,
    Requests,
    Ended,
    Images,
    Snapshots,
}

impl Part {
    /// What makes room comes first.
    const ALL: [Self; 6] = [Self::Expire, Self::Index, Self::Requests, Self::Ended, Self::Images, Self::Snapshots];

    fn name(self) -> &'static str {
        match self {
            Self::Expire => "expire old records",
            Self::Index => "find records that are in no index",
            Self::Requests => "find requests",
            Self::Ended => "check ended jobs",
            Self::Images => "remove images that jobs left",
            Self::Snapshots => "remove snapshots that jobs left",
        }
    }
}

/// A sweep over the headers of all images, page by page.
#[derive(Clone)]
struct HeaderSweep {
    /// Pools still to be looked at, and the cursor in each.
    pools: VecDeque<(String, Option<String>)>,
    /// How often the page was read whose leftovers were not all removed.
    tries: u32,
}

impl HeaderSweep {
    fn over(pools: Vec<String>) -> Self {
        Self { pools: pools.into_iter().map(|pool| (pool, None)).collect(), tries: 0 }
    }

    /// To the next page of the first pool, or to the next pool.
    fn go_on(&mut self, next: Option<String>) {
        self.tries = 0;
        match (self.pools.front_mut(), next) {
            (Some((_, after)), next @ Some(_)) => *after = next,
            _ => drop(self.pools.pop_front()),
        }
    }
}

impl Pace {
    /// What may be read in one round.
    fn of_round(&self, is_first: bool, interval: Duration) -> usize {
        per_round(if is_first { self.first } else { self.then }, interval)
    }
}

/// What is `number` for a round of a minute or less.
fn per_round(number: usize, interval: Duration) -> usize {
    number.max(usize::try_from(interval.as_secs()).unwrap_or(0).saturating_mul(number) / 60)
}

/// What the record of an ended job says.
struct EndedFindings {
    ended_at: Timestamp,
    /// Whether each round reads it.
    again: bool,
    /// Whether another writer may change the image record after the end.
    needs_repair: bool,
}

/// The latest check of an ended job.
struct EndedCheck {
    /// Of which end: a job that was begun again ends once more.
    ended_at: Option<Timestamp>,
    /// When the record is read again.
    next: Instant,
}

/// Where the lists of a pool go on.
#[derive(Default)]
struct ListCursors {
    names: Option<String>,
    trash: Option<String>,
}

/// A sweep over all records of ended jobs.
struct RecordSweep {
    after: Option<String>,
    is_first: bool,
}

pub struct Reconciler {
    wake: Arc<Notify>,
    engine: Arc<Engine>,
    intake: Intake,
    /// Removals go through this client: a daemon that takes over from the reconciler fences it.
    storage: Arc<dyn Storage>,
    has_own_client: bool,
    removals: Removals,
    /// Records that may be in no index; `None` before the pool was listed.
    unindexed: Option<Vec<Uuid>>,
    /// Where the list of queued images goes on.
    requests: ListCursor,
    /// Ended jobs that are checked again.
    ended: HashMap<Uuid, EndedCheck>,
    /// Where the index of ended jobs is looked through next, for young ones and for old ones.
    ended_after: Option<String>,
    expired_after: Option<String>,
    records: RecordSweep,
    /// Published images that jobs left which ended without one.
    published: Vec<Leftover>,
    lists: HashMap<String, ListCursors>,
    sweep: Option<HeaderSweep>,
    is_first_sweep: bool,
    dead_daemons_removed: Option<Instant>,
    turn: Turn,
    /// Whether no part of this round failed or ran out of time.
    is_complete: bool,
    /// Whether this round was in custody of something: where the release failed, the next one clears the record.
    took_custody: bool,
    /// Pools that cannot be swept, and records that cannot be read: the log names them once.
    unusable: BTreeSet<String>,
    unreadable: BTreeSet<String>,
}

/// How long an ended job is not checked again: late changes of another writer on the image record come soon, or
/// after a hash that takes hours. It is a tenth of the time since the job's end.
fn pause_after(ended_at: Timestamp, now: Timestamp) -> Duration {
    Duration::try_from(now.duration_since(ended_at) / 10).unwrap_or_default()
}

impl Reconciler {
    pub fn new(engine: Arc<Engine>) -> Self {
        let intake = Intake::new(Arc::clone(&engine));
        let storage = Arc::clone(&engine.context().storage);
        Self {
            wake: Arc::default(),
            removals: Removals::new(Arc::clone(&engine), Arc::clone(&storage)),
            engine,
            intake,
            storage,
            has_own_client: false,
            unindexed: None,
            requests: ListCursor::default(),
            ended: HashMap::new(),
            ended_after: None,
            expired_after: None,
            records: RecordSweep { after: None, is_first: true },
            published: Vec::new(),
            lists: HashMap::new(),
            sweep: None,
            is_first_sweep: true,
            dead_daemons_removed: None,
            turn: Turn::new(),
            is_complete: false,
            took_custody: false,
            unusable: BTreeSet::new(),
            unreadable: BTreeSet::new(),
        }
    }

    /// With a client of its own: when it is fenced, the daemon's jobs are not.
    pub fn with_storage(mut self, storage: Arc<dyn Storage>) -> Self {
        self.removals.set_storage(Arc::clone(&storage));
        self.storage = storage;
        self.has_own_client = true;
        self
    }

    /// What begins the next round now, where there is a reason to: notifications may have been missed.
    pub fn waker(&self) -> Arc<Notify> {
        Arc::clone(&self.wake)
    }

    /// A round at once, then one every `[offload] reconcile_interval` unless another daemon of the same configuration
    /// does them, until `stop` fires.
    pub async fn run(mut self, stop: CancellationToken) {
        while !stop.is_cancelled() {
            self.run_exclusive(&stop).await;
            let context = self.engine.context();
            tokio::select! {
                () = self.turn.wait(context.store.objects().as_ref(), LOCK_OBJECT, &context.config) => {}
                () = self.wake.notified() => {}
                () = stop.cancelled() => {}
            }
        }
    }

    fn context(&self) -> &Context {
        self.engine.context()
    }

    async fn run_exclusive(&mut self, stop: &CancellationToken) {
        let objects = self.context().store.objects().clone();
        let key = LockKey { name: LOCK_OBJECT.into(), cookie: self.context().identity.instance.to_string() };
        let owner = self.context().identity.owner();
        let duration = self.context().config.borrow().jobs.lease * 4;
        let taken = async {
            match objects.lock(LOCK_OBJECT, &key, &owner, duration).await? {
                Locked::NoObject => {}
                locked => return Ok(locked),
            }
            objects.set_omap(LOCK_OBJECT, &[]).await?;
            objects.lock(LOCK_OBJECT, &key, &owner, duration).await
        };
        self.turn.follow(&self.engine.context().config.borrow());
        match taken.await {
            Ok(Locked::Acquired) => {}
            Ok(Locked::Held | Locked::NoObject) => return self.turn.note(Tried::Locked),
            Err(error) => {
                tracing::warn!(%error, "the reconciler could not begin its round; it tries again at the next");
                return self.turn.note(Tried::Failed);
            }
        }
        (self.is_complete, self.took_custody) = (true, false);
        let mut report = RoundReport::default();
        let renewals = async {
            loop {
                sleep(duration / 3).await;
                if let Err(error) = objects.renew(LOCK_OBJECT, &key, &owner, duration).await
                    && matches!(error.kind(), ErrorKind::NotLocked | ErrorKind::Fenced)
                {
                    return error;
                }
            }
        };
        tokio::select! {
            () = self.round(&mut report, duration / 2) => {}
            error = renewals => {
                self.is_complete = false;
                tracing::warn!(%error, "the reconciler lost its lock; the next round goes on");
            }
            // the lock is released, so that another daemon, or the next life of this one, need not wait for its end
            () = stop.cancelled() => self.is_complete = false,
        }
        self.turn.note(if self.is_complete { Tried::Done } else { Tried::Failed });
        self.turn.owe(self.took_custody || !self.removals.is_idle());
        if self.is_complete {
            let now = self.context().clock.now();
            if let Err(error) = self.turn.tell(objects.as_ref(), LOCK_OBJECT, &owner, now).await {
                tracing::debug!(%error, "the other daemons were not told of a round; they do their own");
            }
        }
        if report != RoundReport::default() {
            tracing::info!(findings = ?report, "the reconciler found something");
        }
        for (kind, count) in [
            ("request", report.requests),
            ("record", report.records),
            ("repaired", report.repaired),
            ("image", report.images),
            ("snapshot", report.snapshots),
            ("expired", report.expired),
        ] {
            metrics::counter!("rbd_offload_reconciler_findings_total", "kind" => kind).increment(count as u64);
        }
        if let Err(error) = objects.unlock(LOCK_OBJECT, &key).await {
            tracing::debug!(%error, "the reconciler's lock was not released; it expires by itself");
        }
    }

    /// One round. A part that can be long stops after `time` and goes on in the next round.
    async fn round(&mut self, report: &mut RoundReport, time: Duration) {
        let removed = self.removals.reap();
        note(report, removed);
        // nothing goes on over that client now; the jobs' client is the engine's to connect again
        if self.removals.may_reconnect()
            && self.has_own_client
            && let Err(error) = self.storage.reconnect().await
        {
            tracing::debug!(%error, "the reconciler's client was fenced, and does not connect again");
        }
        for part in Part::ALL {
            let until = Instant::now() + time;
            let work = async {
                match part {
                    Part::Expire => self.expire(report, until).await,
                    Part::Index => self.index_missing(report).await,
                    Part::Requests => self.find_requests(report, until).await,
                    Part::Ended => self.check_ended_jobs(report, until).await,
                    Part::Images => self.remove_images(report, until).await,
                    Part::Snapshots => self.remove_snapshots(report, until).await,
                }
            };
            match timeout(PART_LIMIT, work).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => {
                    self.is_complete = false;
                    tracing::warn!(part = part.name(), %error,
                        "a part of the reconciler's round failed; the next round tries again");
                }
                Err(_) => {
                    self.is_complete = false;
                    tracing::warn!(part = part.name(), "a part of the reconciler's round took too long");
                }
            }
        }
    }

    /// Records whose index was lost: each record has an entry before it is stored. Walks the whole pool, so only where
    /// an index is not there when the daemon starts, and once.
    async fn index_missing(&mut self, report: &mut RoundReport) -> Result<()> {
        let store = self.context().store.clone();
        let mut unindexed = match self.unindexed.take() {
            Some(unindexed) => unindexed,
            None => {
                if store.has_indexes().await? {
                    Vec::new()
                } else {
                    let mut known: HashSet<Uuid> = store.live().await?.into_iter().map(|(id, _)| id).collect();
                    known.extend(store.ended().await?.into_iter().map(|(id, _)| id));
                    store.scan().await?.into_iter().filter(|id| !known.contains(id)).collect()
                }
            }
        };
        let (mut failures, mut retry) = (Failures::default(), Vec::new());
        while let Some(image_id) = unindexed.pop() {
            let adopted = match store.load(image_id).await {
                Ok(Some(stored)) => store.index(&stored).await.map(|()| report.records += 1),
                Ok(None) => Ok(()),
                Err(error @ Error::Unreadable { .. }) => {
                    tracing::error!(%image_id, %error, "a job record cannot be read and is not indexed");
                    Ok(())
                }
                Err(error) => Err(error),
            };
            let Err(error) = adopted else {
                failures.end();
                continue;
            };
            // the next round begins with those that were not adopted
            retry.push(image_id);
            if let Err(error) = failures.pass_over(error.into()) {
                unindexed.append(&mut retry);
                self.unindexed = Some(unindexed);
                return Err(error);
            }
        }
        self.unindexed = Some(retry);
        Ok(())
    }

    /// Queued images that ask for something, and that no live job is for.
    async fn find_requests(&mut self, report: &mut RoundReport, until: Instant) -> Result<()> {
        let mut failures = Failures::default();
        loop {
            // on an error the list begins again: the image where it was to go on may be gone
            let cursor = std::mem::take(&mut self.requests);
            let page = self.context().cloud.queued_images(&cursor, PAGE).await?;
            for id in page.skipped {
                if self.unreadable.len() < NAMED_MAX && self.unreadable.insert(id.clone()) {
                    tracing::warn!(image_id = %id,
                        "the record of a queued image cannot be read, or is too large: passed over");
                }
            }
            for image in page.images {
                let Some(image_id) = request::parse_uuid(&image.id) else { continue };
                // what has a job that waits or runs is not read: thousands may wait
                if !self.intake.takes(&image.tags) || self.engine.knows(&image_id) {
                    continue;
                }
                match self.find_request(&image, image_id, report).await {
                    Ok(()) => failures.end(),
                    Err(error) => {
                        tracing::warn!(%image_id, %error, "a request was not taken up; the next round tries again");
                        failures.pass_over(error)?;
                    }
                }
            }
            let Some(next) = page.next else { return Ok(()) };
            self.requests = next;
            if Instant::now() >= until {
                return Ok(());
            }
        }
    }

    async fn find_request(&self, image: &openstack::Image, image_id: Uuid, report: &mut RoundReport) -> Result<()> {
        let tags = request::parse_request_tags(&image.tags);
        let asks = !matches!(tags, TagRequest::Absent);
        let asked = if let TagRequest::Source(source) = tags { Some(source) } else { None };
        let dry_run = self.context().config.borrow().offload.dry_run;
        let known = match self.context().store.load(image_id).await {
            Ok(Some(stored)) if !stored.record.state.is_ended() => {
                if self.context().store.live_entry(image_id).await?.is_none() {
                    // stored, and the daemon that did it died or was not answered before the index said so
                    self.context().store.index(&stored).await?;
                    report.records += 1;
                }
                true
            }
            // a request may be made again, an offer is made once
            Ok(Some(stored)) => !asks || (dry_run && asked.is_some_and(|source| stored.record.was_dry_run_of(source))),
            Ok(None) => false,
            Err(Error::Unreadable { .. }) => true,
            Err(error) => return Err(error.into()),
        };
        if !known {
            self.intake.image_queued(image_id, image.owner.clone(), &image.tags).await?;
            report.requests += 1;
        }
        Ok(())
    }

    /// Reads records of ended jobs: those that were asked for, those that are to be checked again, those of jobs that
    /// have just ended, and a few others in their turn. Indexes those that were begun again, repairs image records, and
    /// finds published images of jobs that ended without one.
    async fn check_ended_jobs(&mut self, report: &mut RoundReport, until: Instant) -> Result<()> {
        let own = self.storage.address().await?;
        let interval = self.context().config.borrow().offload.reconcile_interval;
        self.check_known_jobs(&own, interval, report, until).await?;
        // however many others there are
        self.check_old_records(&own, report, until.max(Instant::now() + OLD_RECORDS_TIME)).await
    }

    /// Those that were asked for, those that are to be checked again, and those that have just ended.
    async fn check_known_jobs(
        &mut self,
        own: &str,
        interval: Duration,
        report: &mut RoundReport,
        until: Instant,
    ) -> Result<()> {
        let store = self.context().store.clone();
        let mut left = per_round(CHECKS_PER_ROUND, interval);
        for image_id in store.requested_rechecks().await? {
            if !self.has_time(until) || left == 0 {
                return Ok(());
            }
            left -= 1;
            // before the record is read: a request that comes meanwhile is not lost
            store.remove_recheck(image_id).await?;
            self.check(image_id, own, report).await;
        }
        let now = Instant::now();
        let mut due: Vec<_> = self.ended.iter().filter(|(_, check)| check.next <= now).collect();
        // a few that are slow do not keep the others waiting, and many do not keep those that have just ended waiting
        due.sort_by_key(|(id, check)| (check.next, **id));
        let due: Vec<Uuid> = due.into_iter().map(|(id, _)| *id).take(left.div_ceil(2)).collect();
        for image_id in due {
            if !self.has_time(until) {
                return Ok(());
            }
            left -= 1;
            self.check(image_id, own, report).await;
        }
        for _ in 0..per_round(ENDED_PAGES, interval) {
            let page = store.ended_page(self.ended_after.as_deref(), INDEX_PAGE).await?;
            let now = self.context().clock.now();
            let is_young = |ended_at: &Option<Timestamp>| ended_at.is_none_or(|at| now.duration_since(at) < YOUNG);
            for (image_id, ended_at) in page.entries.into_iter().filter(|(_, ended_at)| is_young(ended_at)) {
                if self.ended.get(&image_id).is_some_and(|check| check.ended_at == ended_at) {
                    continue;
                }
                if !self.has_time(until) || left == 0 {
                    return Ok(());
                }
                left -= 1;
                self.check(image_id, own, report).await;
                // where this breaks off, the next round goes on behind it
                self.ended_after = Some(image_id.to_string());
            }
            self.ended_after = page.next;
            if self.ended_after.is_none() {
                break;
            }
        }
        Ok(())
    }

    /// The next records of the sweep over all of them. Those whose next check is known are left out.
    async fn check_old_records(&mut self, own: &str, report: &mut RoundReport, until: Instant) -> Result<()> {
        let interval = self.context().config.borrow().offload.reconcile_interval;
        let most = OLD_RECORDS.of_round(self.records.is_first, interval).min(INDEX_PAGE);
        let page = self.context().store.ended_page(self.records.after.as_deref(), most).await?;
        for (image_id, ended_at) in page.entries {
            if self.ended.get(&image_id).is_some_and(|check| check.ended_at == ended_at) {
                continue;
            }
            if !self.has_time(until) {
                return Ok(());
            }
            self.check(image_id, own, report).await;
            self.records.after = Some(image_id.to_string());
        }
        self.records.is_first &= page.next.is_some();
        self.records.after = page.next;
        Ok(())
    }

    /// `false`: a part's time is over, so this round is not complete.
    fn has_time(&mut self, until: Instant) -> bool {
        let has_time = Instant::now() < until;
        self.is_complete &= has_time;
        has_time
    }

    /// Checks an ended job, and notes when to do so again.
    async fn check(&mut self, image_id: Uuid, own: &str, report: &mut RoundReport) {
        let begun = Instant::now();
        let now = self.context().clock.now();
        match self.check_ended(image_id, own, report).await {
            Ok(Some(EndedFindings { ended_at, again, needs_repair })) => {
                let is_needed = again || needs_repair || now.duration_since(ended_at) < YOUNG;
                let most = if is_needed { CHECKS_MAX } else { OTHER_CHECKS_MAX };
                self.ended.remove(&image_id);
                if self.ended.len() < most {
                    let pause = if again { Duration::ZERO } else { pause_after(ended_at, now) };
                    self.ended.insert(image_id, EndedCheck { ended_at: Some(ended_at), next: begun + pause });
                }
            }
            Ok(None) => drop(self.ended.remove(&image_id)),
            Err(error) => {
                self.is_complete = false;
                self.check_soon(image_id);
                tracing::warn!(%image_id, %error, "an ended job could not be checked; the next round tries again");
            }
        }
    }

    /// The next round reads the record of this ended job.
    fn check_soon(&mut self, image_id: Uuid) {
        let next = Instant::now();
        if let Some(check) = self.ended.get_mut(&image_id) {
            check.next = next;
        } else if self.ended.len() < CHECKS_MAX {
            self.ended.insert(image_id, EndedCheck { ended_at: None, next });
        }
    }

    /// `None`: there is no ended job that can be read.
    async fn check_ended(
        &mut self,
        image_id: Uuid,
        own: &str,
        report: &mut RoundReport,
    ) -> Result<Option<EndedFindings>> {
        let stored = match self.context().store.load(image_id).await {
            Ok(Some(stored)) => stored,
            Ok(None) | Err(Error::Unreadable { .. }) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let record = &stored.record;
        if !stored.is_settled() {
            // the daemon that made it live again died before the index said so
            self.context().store.index(&stored).await?;
            report.records += 1;
            return Ok(None);
        }
        let mut again = record.deactivated;
        let is_own = record.owner_address.as_deref() == Some(own);
        let needs_repair = record.needs_repair || stored.signals.has(Signal::NeedsRepair);
        if !is_own && !record.is_elsewhere() && needs_repair {
            match self.repair(image_id, record, report).await {
                Err(CallError::OpenStack(error)) if error.kind() == openstack::ErrorKind::TooLarge => {
                    tracing::debug!(%image_id, %error, "the image record is not repaired");
                }
                repaired => repaired?,
            }
        } else if is_own || record.placeholder && (record.owner.is_some() || record.takeovers == 0) {
            again = true;
            // from a removal that broke off: the next owner would fence this daemon
            if let Some(custody) = self.custody(image_id).await? {
                custody.release(false).await;
            }
        }
        let ended_at = record.ended_at.unwrap_or(record.updated_at);
        if record.state != State::Done {
            let pool = record.dest_pool.clone();
            self.find_published(image_id, pool).await?;
        }
        Ok(Some(EndedFindings { ended_at, again, needs_repair }))
    }

    /// The published image of a job that ended without one. It lay in that pool, if that is known.
    async fn find_published(&mut self, image_id: Uuid, pool: Option<String>) -> Result<()> {
        let pools = {
            let config = self.context().config.borrow();
            let destinations = config.backends.values().map(|backend| backend.dest_pool.clone());
            match pool {
                Some(pool) => BTreeSet::from([pool]),
                None => destinations.chain([config.glance.pool.clone()]).collect(),
            }
        };
        for pool in pools {
            if self.published.len() >= PUBLISHED_MAX {
                return Ok(());
            }
            if self.unusable.contains(&pool) {
                continue;
            }
            let image = ImageSpec::named(&pool, image_id.to_string());
            let tag = match tag_of(self.storage.as_ref(), &image).await {
                Err(error) if error.kind() == ErrorKind::Fenced => return Err(error.into()),
                read => self.of_pool(&pool, read).flatten(),
            };
            let is_ours = |tag: &OwnershipTag| tag.is_of_deployment(image_id, self.context().deployment);
            let is_known = self.published.iter().any(|other| other.image == image);
            if let Some(tag) = tag.filter(|tag| is_ours(tag) && !is_known) {
                let tag = Some(tag);
                self.published.push(Leftover { image_id, kind: LeftoverKind::Published, image, tag });
            }
        }
        Ok(())
    }

    /// Repairs the image record of an ended job. A daemon that was frozen, or another client's upload, can restore what
    /// was removed or repaired: Glance has no conditional updates, so this cannot be prevented.
    async fn repair(&mut self, image_id: Uuid, record: &Record, report: &mut RoundReport) -> Result<()> {
        let id = image_id.to_string();
        let Some(image) = self.context().cloud.image(&id).await? else { return Ok(()) };
        let deactivate = record.deactivated && image.status == "active" && !image_status::is_raw_and_bare(&image);
        let changes = match image.status.as_str() {
            "active" | "deactivated" => {
                let ours = record.state == State::Done && record.trigger == Trigger::Request;
                let mut changes = image_status::finished(&image, record.source.filter(|_| ours));
                if changes.is_empty() {
                    changes.extend(image_status::without_copying_tag(&image));
                }
                if record.trigger == Trigger::Request
                    && record.state != State::Done
                    && let Some(tagged) = image_status::tag_empty_upload(&image)
                {
                    tracing::info!(%image_id, tag = request::EMPTY_UPLOAD_TAG,
                        "an empty upload made the image active; a tag in place of its request says so");
                    changes.retain(|change| !matches!(change, openstack::ImageChange::Tags(_)));
                    changes.push(tagged);
                }
                changes
            }
            // what was handed over is about to be written by the service that did
            "queued"
                if record.trigger == Trigger::Request
                    && record.is_reported()
                    && record.state != State::Done
                    && request::parse_request_tags(&image.tags) == TagRequest::Absent =>
            {
                let reason = record.reason.clone().unwrap_or_default();
                let (status, message) = outcome_message(record.state, &reason, record.request_id);
                image_status::show(&image, status, 0, &message)
            }
            _ => return Ok(()),
        };
        if changes.is_empty() && !deactivate {
            return Ok(());
        }
        // in custody, so that no daemon begins the job again meanwhile
        let Some(custody) = self.custody(image_id).await? else { return Ok(()) };
        let repaired = async {
            // no fence holds up a change in Glance
            custody.renew().await?;
            if deactivate {
                self.context().cloud.deactivate_image(&id).await?;
                tracing::error!(%image_id, "the image was active again under a format that was not inspected; \
                    it was deactivated again");
            }
            if !changes.is_empty() {
                match self.context().cloud.update_image(&id, &changes).await {
                    Ok(_) => {}
                    Err(error) if error.kind() == openstack::ErrorKind::Forbidden => {
                        tracing::debug!(%image_id, %error, "the image record is not repaired");
                    }
                    Err(error) => return Err(error.into()),
                }
            }
            Ok::<_, CallError>(())
        };
        let repaired = repaired.await;
        custody.release(false).await;
        repaired?;
        report.repaired += 1;
        Ok(())
    }

    /// Where the release fails, this daemon's next round clears the record: it does not leave it to another one.
    async fn custody(&mut self, image_id: Uuid) -> Result<Option<Custody>> {
        self.took_custody = true;
        Ok(Custody::take(self.context(), &self.storage, image_id).await?)
    }

    /// Where jobs of this configuration, or of one before it, may have left something: the pools of all backends,
    /// Glance's and Nova's.
    fn pools(&self) -> Vec<String> {
        let config = self.context().config.borrow();
        let backends = config.backends.values().flat_map(|backend| [&backend.pool, &backend.dest_pool]);
        let pools: BTreeSet<&String> = backends.chain([&config.glance.pool, &config.nova.pool]).collect();
        pools.into_iter().cloned().collect()
    }

    /// What was read of a pool. `None`: it cannot be swept, because it does not exist or is not permitted, or was not
    /// read this time. One pool keeps no other from being swept.
    fn of_pool<T>(&mut self, pool: &str, read: ceph::Result<T>) -> Option<T> {
        match read {
            Ok(read) => {
                self.unusable.remove(pool);
                Some(read)
            }
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::PermissionDenied) => {
                if self.unusable.insert(pool.to_owned()) {
                    tracing::info!(pool, %error, "this pool is not searched for leftovers of jobs");
                }
                None
            }
            Err(error) => {
                self.is_complete = false;
                tracing::warn!(pool, %error, "this pool was not swept; the next round tries again");
                None
            }
        }
    }

    /// Private copies and anchors, and published images that bear our tag, of jobs that ended or are not there. Also
    /// those in the trash, where a removal that broke off leaves them.
    async fn remove_images(&mut self, report: &mut RoundReport, until: Instant) -> Result<()> {
        let time = until.saturating_duration_since(Instant::now());
        let mut found = Vec::new();
        for pool in self.pools() {
            for _ in 0..LIST_PAGES {
                let after = self.lists.entry(pool.clone()).or_default().names.take();
                let names = self.storage.images(&pool, PRIVATE_PREFIX, after.as_deref(), NAMES).await;
                let Some(names) = self.of_pool(&pool, names) else { break };
                for name in names.entries {
                    let Some((image_id, kind)) = named_as(&name) else { continue };
                    let image = ImageSpec::named(&pool, &name);
                    found.extend(self.tagged_as_ours(image_id, kind, image).await?.flatten());
                }
                let is_last = names.next.is_none();
                self.lists.entry(pool.clone()).or_default().names = names.next;
                if is_last {
                    break;
                }
            }
            if self.unusable.contains(&pool) {
                continue;
            }
            let after = self.lists.entry(pool.clone()).or_default().trash.take();
            let trash = self.storage.trash(&pool, after.as_deref(), TRASHED).await;
            let Some(trash) = self.of_pool(&pool, trash) else { continue };
            for trashed in trash.entries {
                found.extend(self.leftover_in_trash(&pool, &trashed).await?);
            }
            self.lists.entry(pool).or_default().trash = trash.next;
        }
        // the lists may have taken longer than that time, and the next round reads them again
        let now = Instant::now();
        let (half, until) = (now + time / 2, now + time);
        self.remove_orphans(found, report, half).await?;
        let published = std::mem::take(&mut self.published);
        // those that stay are found by their records again
        published.iter().for_each(|leftover| self.check_soon(leftover.image_id));
        self.remove_orphans(published, report, until).await.map(drop)
    }

    /// The image as a leftover where it bears this deployment's tag. `None`: its tag could not be read now.
    #[allow(clippy::option_option)]
    async fn tagged_as_ours(
        &self,
        image_id: Uuid,
        kind: LeftoverKind,
        image: ImageSpec,
    ) -> Result<Option<Option<Leftover>>> {
        let Some(tag) = self.tag_of(&image).await? else { return Ok(None) };
        let is_ours = tag.is_some_and(|tag| tag.is_of_deployment(image_id, self.context().deployment));
        Ok(Some(is_ours.then_some(Leftover { image_id, kind, image, tag })))
    }

    /// What the removal of one of our images left in the trash.
    async fn leftover_in_trash(&self, pool: &str, trashed: &Trashed) -> Result<Option<Leftover>> {
        let Some((image_id, kind)) = named_as(&trashed.name) else { return Ok(None) };
        let image = ImageSpec::with_id(pool, &trashed.id);
        let Some(tag) = self.tag_of(&image).await? else { return Ok(None) };
        let is_ours = match tag {
            Some(tag) => tag.is_of_deployment(image_id, self.context().deployment),
            // no header is left that could name the owner, and only daemons use a private name
            None if kind != LeftoverKind::Published => {
                self.storage.image(&image, None).await.is_ok_and(|info| info.is_none())
            }
            None => false,
        };
        Ok(is_ours.then_some(Leftover { image_id, kind, image, tag }))
    }

    /// The ownership tag of an image. `None`: it could not be read now, and the image is passed over.
    #[allow(clippy::option_option)]
    async fn tag_of(&self, image: &ImageSpec) -> Result<Option<Option<OwnershipTag>>> {
        match tag_of(self.storage.as_ref(), image).await {
            Ok(tag) => Ok(Some(tag)),
            Err(error) if error.kind() == ErrorKind::Fenced => Err(error.into()),
            Err(error) => {
                tracing::warn!(%image, %error, "an image could not be checked; the next round tries again");
                Ok(None)
            }
        }
    }

    /// Looks through the headers of all images for temporary snapshots and their tags, and for images under a Glance
    /// image's id that bear our tag: a record that would tell of them may have expired.
    async fn remove_snapshots(&mut self, report: &mut RoundReport, until: Instant) -> Result<()> {
        let interval = self.context().config.borrow().offload.reconcile_interval;
        let mut left = HEADERS.of_round(self.is_first_sweep, interval);
        let mut sweep = self.sweep.clone().unwrap_or_else(|| HeaderSweep::over(self.pools()));
        while let Some((pool, after)) = sweep.pools.front().cloned() {
            // where this part breaks off, the next round goes on from here
            self.sweep = Some(sweep.clone());
            if Instant::now() >= until || left == 0 {
                return Ok(());
            }
            let page = self.storage.snapshots(&pool, PRIVATE_PREFIX, HEADERS_PER_SECOND, after.as_deref(), left).await;
            let Some(page) = self.of_pool(&pool, page) else {
                if self.unusable.contains(&pool) {
                    sweep.go_on(None);
                    continue;
                }
                // the other pools first; where there is none, the next sweep tries this one again
                sweep.pools.rotate_left(1);
                self.sweep = Some(sweep).filter(|sweep| sweep.pools.len() > 1);
                return Ok(());
            };
            for error in page.failed {
                tracing::warn!(pool, %error, "an image could not be checked; the next sweep tries again");
            }
            let mut found = Vec::new();
            for (image, snapshot) in page.found {
                let Some((Private::Copy, image_id)) = parse_private(&snapshot) else { continue };
                // an anchor's snapshot goes with the anchor
                if matches!(&image.image, ImageKey::Name(name) if parse_private(name).is_some()) {
                    continue;
                }
                match self.snapshot_tag(image_id, &image, &snapshot).await {
                    Ok(Some(tag)) => found.push(Leftover { image_id, kind: LeftoverKind::Snapshot, image, tag }),
                    Ok(None) => {}
                    Err(error) if error.kind() == ErrorKind::Fenced => return Err(error.into()),
                    Err(error) => {
                        tracing::warn!(%image, snapshot, %error,
                            "a snapshot could not be checked; the next sweep tries again");
                    }
                }
            }
            for (image, tag) in page.owned {
                let ImageKey::Name(name) = &image.image else { continue };
                let (Some(image_id), tag) = (request::parse_uuid(name), OwnershipTag::parse(&tag)) else { continue };
                let Some(tag) = tag.filter(|tag| tag.is_of_deployment(image_id, self.context().deployment)) else {
                    continue;
                };
                if !self.is_done(image_id).await && !self.is_adopted(&image, &tag, report).await {
                    let tag = Some(tag);
                    found.push(Leftover { image_id, kind: LeftoverKind::Published, image, tag });
                }
            }
            left = left.saturating_sub(page.looked_at);
            if !self.remove_orphans(found, report, until).await? && sweep.tries < PAGE_TRIES {
                sweep.tries += 1;
                self.sweep = Some(sweep);
                return Ok(());
            }
            sweep.go_on(page.next);
        }
        (self.sweep, self.is_first_sweep) = (None, false);
        Ok(())
    }

    /// Whether the RBD image holds the data of an active image, and is no leftover. If this cannot be read, it counts
    /// as one that does, and is left alone.
    async fn is_adopted(&self, image: &ImageSpec, tag: &OwnershipTag, report: &mut RoundReport) -> bool {
        match self.adopt_active(image, tag, report).await {
            Ok(is_active) => is_active,
            Err(error) => {
                tracing::warn!(image_id = %tag.image_id, %image, %error,
                    "cannot tell whether this is an active image's data; left alone until the next sweep");
                true
            }
        }
    }

    /// An image that bears our tag and is active depends on its source. Where its record was lost, it is made again.
    /// `false`: it is not active.
    async fn adopt_active(&self, image: &ImageSpec, tag: &OwnershipTag, report: &mut RoundReport) -> Result<bool> {
        let (context, image_id) = (self.context(), tag.image_id);
        let found = context.cloud.image(&image_id.to_string()).await?;
        let Some(found) = found.filter(|found| matches!(found.status.as_str(), "active" | "deactivated")) else {
            return Ok(false);
        };
        match context.store.load(image_id).await {
            Ok(None) => {}
            // its job is at work, or ended without knowing of the image: that is not removed
            Ok(Some(stored)) => {
                if !stored.is_settled() {
                    // where the index was lost, the job is found again
                    context.store.index(&stored).await?;
                }
                return Ok(true);
            }
            Err(Error::Unreadable { .. }) => return Ok(true),
            Err(error) => return Err(error.into()),
        }
        let (storage, pools) = (self.storage.as_ref(), self.pools());
        let record = lost_record::recreate_record(storage, &context.clock, &pools, image, tag, &found).await?;
        let Some(record) = record else { return Ok(true) };
        if context.store.create_live(&record).await? {
            tracing::error!(%image_id, %image,
                "the record of an active image that depends on its source was lost; it was made again");
            report.records += 1;
            self.engine.wake(image_id);
        }
        Ok(true)
    }

    /// Whether the job made an image, which may bear our tag a moment longer.
    async fn is_done(&self, image_id: Uuid) -> bool {
        match self.context().store.load(image_id).await {
            Ok(stored) => stored.is_some_and(|stored| stored.record.state == State::Done),
            Err(_) => true,
        }
    }

    /// The tag of a temporary snapshot that is this deployment's; `None` for another's. One without a tag is: an older
    /// release made it, or a person.
    #[allow(clippy::option_option)]
    async fn snapshot_tag(
        &self,
        image_id: Uuid,
        image: &ImageSpec,
        snapshot: &str,
    ) -> ceph::Result<Option<Option<OwnershipTag>>> {
        let Some(text) = self.storage.snapshot_tag(image, snapshot).await? else { return Ok(Some(None)) };
        let tag = OwnershipTag::parse(&text);
        Ok(tag.filter(|tag| tag.is_of_deployment(image_id, self.context().deployment)).map(Some))
    }

    /// Removes those of the leftovers that no live job owns, now and after a moment. `false`: some are still there.
    async fn remove_orphans(&mut self, found: Vec<Leftover>, report: &mut RoundReport, until: Instant) -> Result<bool> {
        let mut orphans: BTreeMap<Uuid, Vec<Leftover>> = BTreeMap::new();
        let mut failures = Failures::default();
        for leftover in found {
            let image_id = leftover.image_id;
            if self.removals.is_running(image_id) {
                continue;
            }
            match self.is_orphaned(image_id).await {
                Ok(true) => orphans.entry(image_id).or_default().push(leftover),
                Ok(false) => failures.end(),
                Err(error) => {
                    tracing::warn!(%image_id, %error, "leftovers of a job stay; the next round tries again");
                    failures.pass_over(error)?;
                }
            }
        }
        if orphans.is_empty() {
            return Ok(true);
        }
        let count = orphans.values().map(Vec::len).sum();
        sleep(GRACE).await;
        let (mut begun, mut removed) = (Vec::new(), Removed::default());
        for (image_id, leftovers) in orphans {
            // at least one, however long it took to find them
            let is_late = Instant::now() >= until && !begun.is_empty();
            if is_late || !self.removals.begin(image_id, leftovers, until, &mut removed).await {
                break;
            }
            // the next round sees whether this daemon is still in the record
            self.check_soon(image_id);
            self.took_custody = true;
            begun.push(image_id);
        }
        self.removals.wait(&begun, &mut removed).await;
        note(report, removed);
        Ok(removed.images + removed.snapshots >= count)
    }

    async fn is_orphaned(&self, image_id: Uuid) -> Result<bool> {
        match self.context().store.load(image_id).await {
            Ok(stored) => Ok(stored.is_none_or(|stored| stored.record.state.is_ended())),
            // a newer version's job, or a broken record: not ours to judge
            Err(Error::Unreadable { .. }) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Removes ended records that are older than `[jobs] retention`.
    async fn expire(&mut self, report: &mut RoundReport, until: Instant) -> Result<()> {
        let store = self.context().store.clone();
        if self.dead_daemons_removed.is_none_or(|at| at.elapsed() >= DEAD_DAEMONS_INTERVAL) {
            match daemons::remove_dead(store.objects().as_ref(), self.context().clock.now()).await {
                Ok(_) => self.dead_daemons_removed = Some(Instant::now()),
                Err(error) => {
                    tracing::debug!(%error, "entries of daemons that are gone stay; the next round tries again");
                }
            }
        }
        let retention =
            SignedDuration::try_from(self.context().config.borrow().jobs.retention).unwrap_or(SignedDuration::MAX);
        let now = self.context().clock.now();
        let interval = self.context().config.borrow().offload.reconcile_interval;
        for _ in 0..per_round(EXPIRED_PAGES, interval) {
            let page = store.ended_page(self.expired_after.as_deref(), INDEX_PAGE).await?;
            let is_old = |at: &Option<Timestamp>| at.is_none_or(|at| now.duration_since(at) >= retention);
            for (image_id, _) in page.entries.into_iter().filter(|(_, ended_at)| is_old(ended_at)) {
                // the cursor stays: the next round goes on with the same page
                if Instant::now() >= until {
                    return Ok(());
                }
                self.expire_one(image_id, report).await;
            }
            self.expired_after = page.next;
            if self.expired_after.is_none() {
                break;
            }
        }
        Ok(())
    }

    /// Removes the record of a job that ended long ago.
    async fn expire_one(&mut self, image_id: Uuid, report: &mut RoundReport) {
        let store = self.context().store.clone();
        let expired = match store.load(image_id).await {
            // it removes what the job left, or froze over that: the record names the client that is to be fenced
            Ok(Some(stored)) if stored.is_settled() && stored.record.owner_address.is_some() => {
                match self.custody(image_id).await {
                    Ok(Some(custody)) => custody.release(false).await,
                    Ok(None) => {}
                    Err(error) => {
                        tracing::warn!(%image_id, %error, "an old record stays; the next round tries again")
                    }
                }
                Ok(0)
            }
            Ok(Some(stored)) if stored.is_settled() => store.remove(&stored).await.map(|()| 1),
            // it lives again; its index entry is stale
            Ok(Some(stored)) => store.index(&stored).await.map(|()| 0),
            Ok(None) => store.forget(image_id).await.map(|()| 0),
            Err(Error::Unreadable { .. }) => Ok(0),
            Err(error) => Err(error),
        };
        match expired {
            Ok(count) => report.expired += count,
            Err(error) => tracing::warn!(%image_id, %error, "an old record stays; the next round tries again"),
        }
    }
}

/// The Glance image whose job may have made an RBD image of this name, and which of its objects that is.
fn named_as(name: &str) -> Option<(Uuid, LeftoverKind)> {
    match parse_private(name) {
        Some((Private::Copy, image_id)) => Some((image_id, LeftoverKind::Copy)),
        Some((Private::Anchor, image_id)) => Some((image_id, LeftoverKind::Anchor)),
        None => Some((request::parse_uuid(name)?, LeftoverKind::Published)),
    }
}

/// Objects that cannot be read are passed over one by one; when it is all of them, the part ends.
#[derive(Default)]
struct Failures {
    in_a_row: usize,
}

impl Failures {
    fn end(&mut self) {
        self.in_a_row = 0;
    }

    /// # Errors
    /// Errors that every object would meet.
    fn pass_over(&mut self, error: CallError) -> Result<()> {
        let kind = match &error {
            CallError::Ceph(error) | CallError::Store(Error::Ceph(error)) => Some(error.kind()),
            CallError::Store(_) | CallError::OpenStack(_) => None,
        };
        self.in_a_row += 1;
        if kind == Some(ErrorKind::Fenced) || self.in_a_row >= FAILURES_MAX { Err(error) } else { Ok(()) }
    }
}

fn note(report: &mut RoundReport, removed: Removed) {
    report.images += removed.images;
    report.snapshots += removed.snapshots;
}
