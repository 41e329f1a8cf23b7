//! The reconciler: finds what no notification told of, and what a daemon left behind that never came back.
//!
//! Requests whose notification was lost; records that fell out of the index; private copies, published images and
//! temporary snapshots that bear our mark and belong to no live job; ended records that are old enough. One daemon at
//! a time does a round. Jobs whose daemon died need no reconciler: the engine takes them when their lease runs out.

use std::collections::{BTreeSet, HashSet};
use std::sync::Arc;
use std::time::Duration;

use jiff::SignedDuration;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::engine::Engine;
use super::intake::Intake;
use super::lease::Lease;
use super::record::{PRIVATE_PREFIX, Private, State, parse_private};
use super::run::Context;
use super::store::Error;
use crate::ceph::{self, ImageKey, ImageSpec, LockKey, Locked};
use crate::openstack;
use crate::publish::record as tenant;
use crate::publish::tag::{OwnershipTag, tag_of};
use crate::request::{self, Asked, Trigger};

/// Object whose lock keeps two daemons from doing the same round.
const ROUND: &str = "reconcile";

/// Images asked of Glance at a time.
const PAGE: usize = 200;

/// Image headers read a second when looking for snapshots.
const HEADERS_PER_SECOND: u32 = 500;

/// How long a thing without a job is given before it is looked at again and removed: its job may be just beginning.
const GRACE: Duration = Duration::from_secs(5);

/// A sweep over all headers is not begun again before this many times its own duration has passed.
const SWEEP_REST: u32 = 4;

#[derive(Debug, thiserror::Error)]
enum Trouble {
    #[error(transparent)]
    Store(#[from] Error),
    #[error(transparent)]
    Ceph(#[from] ceph::Error),
    #[error(transparent)]
    OpenStack(#[from] openstack::Error),
}

type Result<T> = std::result::Result<T, Trouble>;

/// What a round found.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Findings {
    /// Requests without a job.
    pub requests: usize,
    /// Records that were in no index.
    pub records: usize,
    /// Image records put right.
    pub mended: usize,
    /// RBD images removed.
    pub images: usize,
    /// Snapshots removed.
    pub snapshots: usize,
    /// Ended records removed for their age.
    pub expired: usize,
}

pub struct Reconciler {
    wake: Arc<Notify>,
    engine: Arc<Engine>,
    intake: Intake,
    scanned: bool,
    next_sweep: Instant,
}

impl Reconciler {
    pub fn new(engine: Arc<Engine>) -> Self {
        let intake = Intake::new(Arc::clone(&engine));
        Self { wake: Arc::default(), engine, intake, scanned: false, next_sweep: Instant::now() }
    }

    /// What begins the next round now, where there is a reason to: notifications may have been missed.
    pub fn waker(&self) -> Arc<Notify> {
        Arc::clone(&self.wake)
    }

    /// A round at once, then one every `[offload] reconcile_interval`, until `stop` fires.
    pub async fn run(mut self, stop: CancellationToken) {
        while !stop.is_cancelled() {
            self.guarded_round(&stop).await;
            let interval = self.context().config.borrow().offload.reconcile_interval;
            tokio::select! {
                () = sleep(interval) => {}
                () = self.wake.notified() => {}
                () = stop.cancelled() => {}
            }
        }
    }

    fn context(&self) -> &Context {
        self.engine.context()
    }

    async fn guarded_round(&mut self, stop: &CancellationToken) {
        let objects = self.context().store.objects().clone();
        let key = LockKey { name: ROUND.into(), cookie: self.context().identity.instance.to_string() };
        let duration = self.context().config.borrow().jobs.lease * 4;
        let taken = async {
            // the lock never creates its object
            objects.set_omap(ROUND, &[]).await?;
            objects.lock(ROUND, &key, &self.context().identity.owner(), duration).await
        };
        match taken.await {
            Ok(Locked::Acquired) => {}
            Ok(Locked::Held | Locked::NoObject) => return,
            Err(error) => {
                tracing::warn!(%error, "the reconciler could not begin its round; tried again at the next");
                return;
            }
        }
        let mut findings = Findings::default();
        let ended = tokio::select! {
            ended = tokio::time::timeout(duration, self.round(&mut findings)) => Some(ended),
            // the lock is given back, so that another daemon, or the next life of this one, need not wait for its end
            () = stop.cancelled() => None,
        };
        match ended {
            Some(Ok(Ok(()))) | None => {}
            Some(Ok(Err(error))) => tracing::warn!(%error, "the reconciler did not end its round; the next goes on"),
            Some(Err(_)) => {
                tracing::warn!(seconds = duration.as_secs(), "the reconciler's round took too long; the next goes on")
            }
        }
        if findings != Findings::default() {
            tracing::info!(?findings, "the reconciler found something");
        }
        for (kind, count) in [
            ("request", findings.requests),
            ("record", findings.records),
            ("repaired", findings.mended),
            ("image", findings.images),
            ("snapshot", findings.snapshots),
            ("expired", findings.expired),
        ] {
            metrics::counter!("rbd_offload_reconciler_findings_total", "kind" => kind).increment(count as u64);
        }
        if let Err(error) = objects.unlock(ROUND, &key).await {
            tracing::debug!(%error, "the reconciler's lock was not given back; it runs out by itself");
        }
    }

    /// One round. What it found stands in `findings` also when it fails half way.
    async fn round(&mut self, findings: &mut Findings) -> Result<()> {
        if !self.scanned {
            self.adopt_unindexed(findings).await?;
            self.scanned = true;
        }
        self.find_requests(findings).await?;
        self.mend_records(findings).await?;
        self.remove_images(findings).await?;
        if Instant::now() >= self.next_sweep {
            let started = Instant::now();
            self.remove_snapshots(findings).await?;
            self.next_sweep = Instant::now() + started.elapsed() * SWEEP_REST;
        }
        self.expire(findings).await
    }

    /// Records that were stored by hand, or whose writer died before the index was written and whose request was not
    /// delivered again. Walks the whole pool, so only once.
    async fn adopt_unindexed(&self, findings: &mut Findings) -> Result<()> {
        let store = &self.context().store;
        let mut known: HashSet<Uuid> = store.live().await?.into_iter().map(|(id, _)| id).collect();
        known.extend(store.ended().await?.into_iter().map(|(id, _)| id));
        for image_id in store.scan().await?.into_iter().filter(|id| !known.contains(id)) {
            match store.load(image_id).await {
                Ok(Some(stored)) => {
                    store.index(&stored.record).await?;
                    findings.records += 1;
                }
                Ok(None) => {}
                Err(error @ Error::Unreadable { .. }) => tracing::error!(%image_id, %error, "left alone"),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Queued images that ask for something, and that no live job is for.
    async fn find_requests(&self, findings: &mut Findings) -> Result<()> {
        let live: HashSet<Uuid> = self.context().store.live().await?.into_iter().map(|(id, _)| id).collect();
        let mut marker: Option<String> = None;
        loop {
            let page = self.context().cloud.queued_images(marker.as_deref(), PAGE).await?;
            let Some(last) = page.last() else { return Ok(()) };
            marker = Some(last.id.clone());
            for image in page {
                let Some(image_id) = request::parse_uuid(&image.id) else { continue };
                if !self.intake.takes(&image.tags) {
                    continue;
                }
                let asks = !matches!(request::asked_by(&image.tags), Asked::Nothing);
                let known = match self.context().store.load(image_id).await {
                    Ok(Some(stored)) if !stored.record.state.is_ended() => {
                        if !live.contains(&image_id) {
                            // stored, and whoever did it died or was not answered before the index said so
                            self.context().store.index(&stored.record).await?;
                            findings.records += 1;
                        }
                        true
                    }
                    // a request may be made again, an offer is made once
                    Ok(Some(_)) => !asks,
                    Ok(None) => false,
                    Err(Error::Unreadable { .. }) => true,
                    Err(error) => return Err(error.into()),
                };
                if !known {
                    self.intake.image_queued(image_id, image.owner.clone(), &image.tags).await?;
                    findings.requests += 1;
                }
            }
        }
    }

    /// Jobs that live again though the index says that they ended. And image records of ended jobs on which a daemon that stood still, or another writer's upload, may have brought back
    /// what was taken off or put right: Glance takes no condition with a change, so it cannot be kept from happening.
    async fn mend_records(&self, findings: &mut Findings) -> Result<()> {
        for (image_id, _) in self.context().store.ended().await? {
            let Ok(Some(stored)) = self.context().store.load(image_id).await else { continue };
            let record = stored.record;
            if !record.is_settled() {
                // whoever made it live again died before the index said so
                self.context().store.index(&record).await?;
                findings.records += 1;
                continue;
            }
            if !record.mend {
                continue;
            }
            let id = image_id.to_string();
            let Some(image) = self.context().cloud.image(&id).await? else { continue };
            let changes = match image.status.as_str() {
                "active" | "deactivated" => {
                    let ours = record.state == State::Done && record.trigger == Trigger::Request;
                    tenant::finished(&image, record.source.filter(|_| ours))
                }
                // what was handed over is about to be written by the service that did
                "queued"
                    if record.trigger == Trigger::Request
                        && record.told
                        && record.state != State::Done
                        && request::asked_by(&image.tags) == Asked::Nothing =>
                {
                    let reason = record.reason.unwrap_or_default();
                    let (status, message) = super::run::last_word(record.state, &reason, record.request_id);
                    tenant::show(&image, status, 0, &message)
                }
                _ => continue,
            };
            if changes.is_empty() {
                continue;
            }
            // with the lease of an ended job nobody begins it anew meanwhile
            let Some(guard) = self.guard(image_id).await? else { continue };
            let objects = self.context().store.objects().as_ref();
            let mend = async {
                if self.is_orphaned(image_id).await? {
                    if let Some(lease) = &guard.0 {
                        lease.renew(objects).await?;
                    }
                    self.context().cloud.update_image(&id, &changes).await?;
                }
                Ok::<_, Trouble>(())
            };
            let mended = mend.await;
            if let Some(lease) = guard.0 {
                lease.release(objects).await;
            }
            match mended {
                Ok(()) => findings.mended += 1,
                Err(error) => tracing::warn!(%image_id, %error, "an image record could not be put right; tried again"),
            }
        }
        Ok(())
    }

    /// Private copies, and published images that bear our mark, of jobs that ended or are not there.
    async fn remove_images(&self, findings: &mut Findings) -> Result<()> {
        let config = self.context().config.borrow().clone();
        let pools: BTreeSet<&String> = config.backends.values().map(|backend| &backend.dest_pool).collect();
        let mut suspects = Vec::new();
        for pool in pools {
            let unfinished = self.unfinished().await?;
            for name in self.context().storage.images(pool, "").await? {
                let image_id = match parse_private(&name) {
                    Some((_, image_id)) => image_id,
                    None => match request::parse_uuid(&name) {
                        Some(image_id) if unfinished.contains(&image_id) => image_id,
                        _ => continue,
                    },
                };
                let image = ImageSpec::named(pool, &name);
                if is_ours(self.context(), image_id, &image).await? {
                    suspects.push((image_id, image));
                }
            }
        }
        // after the copies, which are clones of them
        for pool in config.backends.values().map(|backend| &backend.pool).collect::<BTreeSet<_>>() {
            for name in self.context().storage.images(pool, PRIVATE_PREFIX).await? {
                let Some((Private::Anchor, image_id)) = parse_private(&name) else { continue };
                let image = ImageSpec::named(pool, &name);
                if is_ours(self.context(), image_id, &image).await? {
                    suspects.push((image_id, image));
                }
            }
        }
        self.remove_orphans(suspects, &mut findings.images, |context, image_id, image| async move {
            if !is_ours(&context, image_id, &image).await? {
                tracing::debug!(%image, "bears our name, not our ownership tag: left alone");
                return Ok(false);
            }
            context.storage.remove_image(&image).await?;
            tracing::warn!(%image_id, %image, "removed an image that its job had left behind");
            Ok(true)
        })
        .await
    }

    /// Jobs that ended, and not with an image.
    async fn unfinished(&self) -> Result<HashSet<Uuid>> {
        let mut unfinished = HashSet::new();
        for (image_id, _) in self.context().store.ended().await? {
            if let Ok(Some(stored)) = self.context().store.load(image_id).await
                && stored.record.state.is_ended()
                && stored.record.state != State::Done
            {
                unfinished.insert(image_id);
            }
        }
        Ok(unfinished)
    }

    async fn remove_snapshots(&self, findings: &mut Findings) -> Result<()> {
        let config = self.context().config.borrow().clone();
        let mut pools: BTreeSet<&String> = config.backends.values().map(|backend| &backend.pool).collect();
        if config.nova.integration {
            pools.insert(&config.nova.pool);
        }
        let mut suspects = Vec::new();
        for pool in pools {
            for (image, snapshot) in self.context().storage.snapshots(pool, PRIVATE_PREFIX, HEADERS_PER_SECOND).await? {
                let Some((Private::Copy, image_id)) = parse_private(&snapshot) else { continue };
                // an anchor's snapshot goes with the anchor, which has an ownership tag
                if let ImageKey::Name(name) = &image.image
                    && parse_private(name).is_some()
                {
                    continue;
                }
                if is_our_snapshot(self.context(), image_id, &image, &snapshot).await? {
                    suspects.push((image_id, image));
                }
            }
        }
        self.remove_orphans(suspects, &mut findings.snapshots, |context, image_id, image| async move {
            let snapshot = super::record::private_name(image_id);
            if !is_our_snapshot(&context, image_id, &image, &snapshot).await? {
                return Ok(false);
            }
            context.storage.remove_snapshot(&image, &snapshot).await?;
            context.storage.remove_snapshot_tag(&image, &snapshot).await?;
            tracing::warn!(%image_id, %image, snapshot, "removed a snapshot that its job had left behind");
            Ok(true)
        })
        .await
    }

    /// Removes those of the suspects that no live job owns, now and after a moment.
    async fn remove_orphans<F, W>(&self, suspects: Vec<(Uuid, ImageSpec)>, removed: &mut usize, remove: F) -> Result<()>
    where
        F: Fn(Context, Uuid, ImageSpec) -> W,
        W: Future<Output = ceph::Result<bool>>,
    {
        let mut orphans = Vec::new();
        for (image_id, image) in suspects {
            if self.is_orphaned(image_id).await? {
                orphans.push((image_id, image));
            }
        }
        if orphans.is_empty() {
            return Ok(());
        }
        sleep(GRACE).await;
        for (image_id, image) in orphans {
            // with the lease of an ended job nobody begins it anew meanwhile
            let Some(guard) = self.guard(image_id).await? else { continue };
            let still = self.is_orphaned(image_id).await;
            let done = match still {
                Ok(true) => remove(self.context().clone(), image_id, image.clone()).await.map_err(Trouble::from),
                Ok(false) => Ok(false),
                Err(error) => Err(error),
            };
            if let Some(lease) = guard.0 {
                lease.release(self.context().store.objects().as_ref()).await;
            }
            match done {
                Ok(true) => *removed += 1,
                Ok(false) => {}
                Err(error) => tracing::warn!(%image_id, %image, %error, "a leftover could not be removed; tried again"),
            }
        }
        Ok(())
    }

    async fn is_orphaned(&self, image_id: Uuid) -> Result<bool> {
        match self.context().store.load(image_id).await {
            Ok(stored) => Ok(stored.is_none_or(|stored| stored.record.state.is_ended())),
            // a newer version's job, or a broken record: not ours to judge
            Err(Error::Unreadable { .. }) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// The lease on the job, where there is one. `None`: somebody works on it.
    async fn guard(&self, image_id: Uuid) -> Result<Option<Guard>> {
        let objects = self.context().store.objects().clone();
        let duration = self.context().config.borrow().jobs.lease;
        match Lease::take(objects.as_ref(), image_id, &self.context().identity, duration).await? {
            Some(lease) => Ok(Some(Guard(Some(lease)))),
            None if Lease::is_held(objects.as_ref(), image_id).await? => Ok(None),
            None => Ok(Some(Guard(None))),
        }
    }

    /// Removes ended records that are older than `[jobs] retention`.
    async fn expire(&self, findings: &mut Findings) -> Result<()> {
        let store = &self.context().store;
        let retention =
            SignedDuration::try_from(self.context().config.borrow().jobs.retention).unwrap_or(SignedDuration::MAX);
        let now = self.context().clock.now();
        for (image_id, ended_at) in store.ended().await? {
            if ended_at.is_some_and(|ended_at| now.duration_since(ended_at) < retention) {
                continue;
            }
            match store.load(image_id).await {
                Ok(Some(stored)) if stored.record.is_settled() => {
                    store.remove(&stored).await?;
                    findings.expired += 1;
                }
                // it lives again; its index entry is stale
                Ok(Some(stored)) => store.index(&stored.record).await?,
                Ok(None) => store.forget(image_id).await?,
                Err(Error::Unreadable { .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

/// Whether an RBD image bears this deployment's ownership tag for that image id.
async fn is_ours(context: &Context, image_id: Uuid, image: &ImageSpec) -> ceph::Result<bool> {
    let tag = tag_of(context.storage.as_ref(), image).await?;
    Ok(tag.is_some_and(|tag| tag.is_of_deployment(image_id, context.deployment)))
}

/// Whether a temporary snapshot is this deployment's. One without a tag is: an older release made it, or a person.
async fn is_our_snapshot(context: &Context, image_id: Uuid, image: &ImageSpec, snapshot: &str) -> ceph::Result<bool> {
    let Some(text) = context.storage.snapshot_tag(image, snapshot).await? else { return Ok(true) };
    Ok(OwnershipTag::parse(&text).is_some_and(|tag| tag.is_of_deployment(image_id, context.deployment)))
}

/// Holds the lease of an ended job, or stands for a job that has no record.
struct Guard(Option<Lease>);
