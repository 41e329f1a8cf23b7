//! From a request to a complete, inspected, sealed copy under its private name.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::{Job, Step, Stop, decline, end};
use crate::ceph::{self, Change, Compare, ErrorKind, ImageSpec, Link, Moved, Storage, TransferLimits};
use crate::config::{Config, Hash, Verify};
use crate::decline::Decline;
use crate::job::record::{self, Handover, Origin, Publication, State};
use crate::plan::{self, Plan, Question};
use crate::publish;
use crate::publish::record::Status;
use crate::request::{Source, Trigger};
use crate::transfer::{self, Method, Order};

/// How often a copy or a comparison is begun when parents of the source are cut off meanwhile. An anchor that Cinder has
/// flattened has none any more.
const CHAIN_TRIES: usize = 4;

/// How long Cinder usually takes to delete a volume once its disk is in the trash, and the pause between looks.
const DELETED_WITHIN: Duration = Duration::from_secs(5);
const DELETING_INTERVAL: Duration = Duration::from_millis(500);

impl Job {
    /// From a request to a complete, inspected, sealed copy under its private name.
    pub(super) async fn copy(&self, config: &Config) -> Step<()> {
        let plan = self.stage("plan", self.plan(config)).await?;
        match self.pools.take(&plan.dest_pool, config.offload.max_jobs_per_pool) {
            Some(slot) => *self.slot.lock().await = Some(slot),
            None => return Err(Stop::NoRoom { pool: plan.dest_pool }),
        }
        let copy = ImageSpec::named(&plan.dest_pool, record::private_name(self.id));
        self.check_names(&plan, &copy).await?;

        let private = record::private_name(self.id);
        let snapshot = plan.snapshot.clone().unwrap_or_else(|| private.clone());
        let origin = Origin {
            pool: plan.origin.pool.clone(),
            image_id: plan.origin_id.clone(),
            image: plan.origin.to_string(),
            snapshot: snapshot.clone(),
            temporary: plan.snapshot.is_none(),
        };
        let (mut methods, mut reasons) = transfer::candidates(plan.method, &plan.info);
        let before = self.snapshot().await;
        for method in before.mismatched {
            methods.retain(|other| *other != method);
            reasons.push(format!("{method}: its copy differed from the source"));
        }
        if !reasons.is_empty() {
            tracing::info!(image_id = %self.id, job_stage = "plan", reasons = reasons.join("; "), "some methods cannot do this source");
        }
        let first = methods.first().copied();
        let now = self.context.clock.now();
        self.update(|record| {
            record.source = Some(plan.source);
            record.project_id = Some(plan.project_id.clone());
            record.origin = Some(origin.clone());
            record.dest_pool = Some(plan.dest_pool.clone());
            record.publication = Publication {
                min_disk: plan.min_disk,
                min_ram: plan.min_ram,
                properties: plan.properties.clone(),
                sha512: None,
            };
            record.method = first;
            record.fallback = (!reasons.is_empty()).then(|| reasons.join("; "));
            record.bytes_total = plan.info.size;
            record.bytes_done = 0;
            record.progress = 0;
            record.reason = None;
            record.made.snapshot = origin.temporary;
            record.made.anchor = plan.anchor;
            record.made.copy = true;
            let _ = record.enter(State::Copying, now);
        })
        .await?;
        tracing::info!(image_id = %self.id, job_stage = "copying", source = %plan.source, origin = %plan.origin,
            destination = %copy, method = first.map(transfer::Method::as_str), bytes = plan.info.size, "the job goes on");

        let source = ImageSpec::with_id(&plan.origin.pool, &plan.origin_id);
        let (shown, snapped) = tokio::join!(
            self.show(plan.image.clone(), Status::Copying, "the disk is being copied inside the storage cluster"),
            self.stage("snapshot", async {
                self.ensure_snapshot(&source, &snapshot, origin.temporary).await?;
                // what was read for the plan may be minutes old, and somebody else may own the source by now
                Ok(plan::confirm(self.context.cloud.as_ref(), config, before.trigger, &plan).await?)
            })
        );
        snapped?;
        shown?;
        let mut from = CopySource { source, snapshot, anchor: None };
        let anchored = plan.anchor.then(|| ImageSpec::named(&plan.origin.pool, record::anchor_name(self.id)));
        loop {
            self.stage("transfer", self.transfer(config, &methods, &mut from, anchored.clone(), &copy)).await?;
            if self.cancel.is_cancelled() {
                return Err(Stop::Interrupted);
            }
            let extent = match config.offload.verify {
                _ if !self.snapshot().await.mismatched.is_empty() => Compare::Full,
                Verify::None => break,
                Verify::Sample => Compare::Sample,
                Verify::Full => Compare::Full,
            };
            let Some(wrong) = self.stage("verify", self.verify(&from, &copy, extent)).await? else {
                break;
            };
            methods.retain(|method| *method != wrong);
        }
        let (sealed, ()) = tokio::join!(
            self.stage("inspect", self.inspect_and_seal(&copy)),
            self.show_again(Status::Publishing, "the copy is complete and is being registered")
        );
        sealed?;
        if config.offload.hash == Hash::Sha512 {
            self.stage("hash", self.hash(&copy, plan.info.size)).await?;
        }
        self.enter(State::Publishing).await
    }

    pub(super) async fn plan(&self, config: &Config) -> Step<Plan> {
        let record = self.snapshot().await;
        let offered = record.handover == Some(Handover::Offered);
        let (image_id, trigger, source, retried) = (self.id, record.trigger, record.source, record.retried);
        let question = Question { image_id, trigger, source, retried, offered };
        if trigger != Trigger::Request && record.handover.is_none() {
            return decline(Decline::Handover, "no service offered this image");
        }
        let image = self.read_image().await?;
        let source = plan::read_request(&image, &question)?;
        if record.source != Some(source) {
            // also where the plan then refuses it: `retry` goes by the latest request, not by one before
            self.update(|record| {
                record.source = Some(source);
                record.mismatched.clear();
            })
            .await?;
        }
        Ok(plan::make(self.context.cloud.as_ref(), self.context.storage.as_ref(), config, &question, image, source)
            .await?)
    }

    /// The names that the job is going to use must be free: what bears them is not ours, or we would have taken it down.
    pub(super) async fn check_names(&self, plan: &Plan, copy: &ImageSpec) -> Step<()> {
        let storage = self.context.storage.as_ref();
        let published = ImageSpec::named(&plan.dest_pool, self.id.to_string());
        if storage.image(&published, None).await?.is_some() {
            return decline(
                Decline::OtherWriter,
                "another image of that id is in Glance's pool already: somebody else writes it",
            );
        }
        let anchor = ImageSpec::named(&plan.origin.pool, record::anchor_name(self.id));
        let mut names = vec![copy];
        names.extend(plan.anchor.then_some(&anchor));
        for name in names {
            if storage.image(name, None).await?.is_some() {
                return in_the_way(name);
            }
        }
        let private = record::private_name(self.id);
        if plan.snapshot.is_none() && plan.info.snapshots.iter().any(|snapshot| snapshot.name == private) {
            return end(
                State::Failed,
                format!(
                    "the snapshot {}@{private} is in the way and is not this job's: remove it, then retry",
                    plan.origin
                ),
            );
        }
        Ok(())
    }

    pub(super) async fn ensure_snapshot(&self, source: &ImageSpec, snapshot: &str, temporary: bool) -> Step<()> {
        if temporary {
            self.before_visible_step().await?;
            let tag = self.tag().await.to_string();
            self.context.storage.set_snapshot_tag(source, snapshot, &tag).await?;
            self.context.storage.create_protected_snapshot(source, snapshot).await?;
        }
        Ok(())
    }

    pub(super) async fn transfer(
        &self,
        config: &Config,
        methods: &[transfer::Method],
        from: &mut CopySource,
        anchored: Option<ImageSpec>,
        copy: &ImageSpec,
    ) -> Step<()> {
        let limits = TransferLimits { concurrency: config.offload.concurrency, rates: Arc::clone(&self.context.rates) };
        let mut refused: Option<ceph::Error> = None;
        for method in methods {
            if let Some(error) = refused.take() {
                tracing::warn!(image_id = %self.id, job_stage = "transfer", %error, next = method.as_str(),
                    "this method cannot do it; the next one is tried");
                self.context.storage.remove_image(copy).await?;
                self.update(|record| {
                    let before = record.method.map_or("", transfer::Method::as_str);
                    let note = format!("{before}: {error}");
                    record.fallback =
                        Some(record.fallback.iter().chain([&note]).cloned().collect::<Vec<_>>().join("; "));
                    record.method = Some(*method);
                })
                .await?;
            }
            self.before_visible_step().await?;
            if let (Some(anchor), None, false) = (&anchored, &from.anchor, *method == transfer::Method::Copy) {
                match self.stage("anchor", self.make_anchor(from, anchor)).await? {
                    Ok(()) => {
                        from.anchor = Some((anchor.clone(), record::private_name(self.id)));
                        self.before_visible_step().await?;
                    }
                    Err(error) => {
                        refused = Some(error);
                        continue;
                    }
                }
            }
            match self.run_method(*method, from, copy, &limits).await {
                Ok(moved) => {
                    metrics::counter!("rbd_offload_copied_bytes_total", "method" => method.as_str())
                        .increment(moved.bytes);
                    metrics::counter!("rbd_offload_local_bytes_total", "method" => method.as_str())
                        .increment(moved.through_host);
                    let method = *method;
                    return self
                        .update(|record| {
                            record.method = Some(method);
                            record.bytes_done = record.bytes_total;
                            record.progress = 95;
                        })
                        .await;
                }
                Err(error) if transfer::is_for_another_method(&error) => refused = Some(error),
                Err(error) if error.kind() == ErrorKind::Exists => {
                    // it came between our look and our making: not ours, so not to be taken down
                    self.update(|record| record.made.copy = false).await?;
                    return in_the_way(copy);
                }
                Err(error) => return Err(error.into()),
            }
        }
        match refused {
            Some(error) => Err(error.into()),
            None => match self.snapshot().await.mismatched.first() {
                Some(method) => end(
                    State::Failed,
                    format!(
                        "the copy by {method} differed from its source and was removed, and no other method can do this \
                         source: check the health of the Ceph cluster and report this"
                    ),
                ),
                None => end(State::Failed, "no method of transfer can do this source"),
            },
        }
    }

    /// Makes the anchor. The inner error is of a source that cannot be cloned now.
    async fn make_anchor(&self, from: &CopySource, anchor: &ImageSpec) -> Step<ceph::Result<()>> {
        let metadata = [(transfer::MARK.to_owned(), self.tag().await.to_string())];
        let private = record::private_name(self.id);
        let made = self.context.storage.make_anchor(&from.source, &from.snapshot, anchor, &private, &metadata).await;
        match made {
            Err(error) if transfer::is_for_another_method(&error) => {
                // what there is of it would be in the way of the next method
                self.context.storage.remove_image(anchor).await?;
                Ok(Err(error))
            }
            Err(error) if error.kind() == ErrorKind::Exists => {
                self.update(|record| record.made.anchor = false).await?;
                in_the_way(anchor)
            }
            made => Ok(Ok(made?)),
        }
    }

    /// Runs one method, and again where something that it read from was cut off meanwhile: what was read then is suspect.
    async fn run_method(
        &self,
        method: transfer::Method,
        from: &CopySource,
        copy: &ImageSpec,
        limits: &TransferLimits,
    ) -> ceph::Result<Moved> {
        let storage = self.context.storage.as_ref();
        for _ in 0..CHAIN_TRIES {
            let before = from.readable(storage).await?;
            let order = Order {
                source: before.source.clone(),
                snapshot: before.snapshot.clone(),
                anchor: from.anchor.clone(),
                destination: copy.clone(),
                mark: self.tag().await.to_string(),
                limits: limits.clone(),
            };
            let result = method.transfer().run(storage, &order, &self.progress, &self.cancel).await;
            if result.as_ref().is_err_and(|e| !may_come_of_a_cut_chain(e)) || from.readable(storage).await? == before {
                return result;
            }
            tracing::warn!(image_id = %self.id, job_stage = "transfer", source = %order.source,
                "a parent of the source was cut off during the copy; the copy is made again");
            storage.remove_image(copy).await?;
        }
        Err(chain_changes(copy))
    }

    /// Compares the copy with its source. One that differs is removed and never published: `Some` is the method that made
    /// it, and another one is to be tried. After a second one the job fails.
    pub(super) async fn verify(&self, from: &CopySource, copy: &ImageSpec, extent: Compare) -> Step<Option<Method>> {
        let Some(offset) = self.compare(from, copy, extent).await? else { return Ok(None) };
        let before = self.snapshot().await;
        let Some(method) = before.method else { return Err(Stop::Abandon("its record names no method".into())) };
        metrics::counter!("rbd_offload_verify_failures_total").increment(1);
        tracing::error!(image_id = %self.id, job_stage = "verify", offset, copy = %copy, method = method.as_str(),
            "the copy differs from its source");
        // before the copy is removed: another daemon that takes over must not trust this method either
        self.update(|record| {
            if !record.mismatched.contains(&method) {
                record.mismatched.push(method);
            }
            let note = format!("{method}: its copy differed from the source at byte {offset}");
            record.fallback = Some(record.fallback.iter().chain([&note]).cloned().collect::<Vec<_>>().join("; "));
        })
        .await?;
        if let Some(first) = before.mismatched.first() {
            return end(
                State::Failed,
                format!(
                    "two copies differed from their source, by {first} and by {method} (at byte {offset}), and were \
                     removed: check the health of the Ceph cluster (ceph health detail, a deep scrub of both pools) and \
                     report this before you retry"
                ),
            );
        }
        self.context.storage.remove_image(copy).await?;
        Ok(Some(method))
    }

    /// Compares, and again where something that the source reads from was cut off meanwhile.
    async fn compare(&self, from: &CopySource, copy: &ImageSpec, extent: Compare) -> ceph::Result<Option<u64>> {
        let storage = self.context.storage.as_ref();
        for _ in 0..CHAIN_TRIES {
            let before = from.readable(storage).await?;
            let (source, snapshot) = (&before.source, &before.snapshot);
            let result = storage.compare(source, snapshot, copy, extent, &self.progress, &self.cancel).await;
            if result.as_ref().is_err_and(|e| !may_come_of_a_cut_chain(e)) || from.readable(storage).await? == before {
                return result;
            }
        }
        Err(chain_changes(copy))
    }

    pub(super) async fn inspect_and_seal(&self, copy: &ImageSpec) -> Step<()> {
        let storage = self.context.storage.as_ref();
        if let Some(format) = publish::inspect(storage, copy).await? {
            return decline(
                Decline::ContainerHeader,
                format!(
                    "the disk starts with the header of a {format} file: such a disk is not registered as raw, upload it instead"
                ),
            );
        }
        let Some(fault) = publish::seal(storage, copy, &self.progress, &self.cancel).await? else { return Ok(()) };
        tracing::error!(image_id = %self.id, job_stage = "inspect", copy = %copy, fault, "the copy cannot be published");
        storage.remove_image(copy).await?;
        Err(Stop::Retry(format!("the copy cannot be published: {fault}; it was removed and is made again")))
    }

    pub(super) async fn hash(&self, copy: &ImageSpec, size: u64) -> Step<()> {
        let hash = publish::sha512(self.context.storage.as_ref(), copy, size, &self.progress, &self.cancel).await?;
        self.update(|record| record.publication.sha512 = Some(hash.clone())).await
    }

    /// Removes what holds the source: the anchor, then the temporary snapshot.
    pub(super) async fn release_source(&self) -> Step<()> {
        let _one = self.removing.lock().await;
        let record = self.snapshot().await;
        let Some(origin) = &record.origin else { return Ok(()) };
        if !record.made.anchor && !record.made.snapshot {
            return Ok(());
        }
        let storage = self.context.storage.as_ref();
        if record.made.anchor {
            storage.remove_image(&ImageSpec::named(&origin.pool, record::anchor_name(self.id))).await?;
        }
        if record.made.snapshot {
            let source = ImageSpec::with_id(&origin.pool, &origin.image_id);
            storage.remove_snapshot(&source, &origin.snapshot).await?;
            storage.remove_snapshot_tag(&source, &origin.snapshot).await?;
        }
        self.update(|record| (record.made.anchor, record.made.snapshot) = (false, false)).await
    }

    /// Cinder moves a volume that it deletes to the trash when a snapshot of ours is in its way, and leaves it there. Once
    /// the snapshot is gone and Cinder has no such volume, it is removed; not before the end of a deferment that Cinder
    /// gave it, and not while another snapshot needs it.
    pub(super) async fn purge_source(&self) -> Step<()> {
        let record = self.snapshot().await;
        let (Some(Source::Volume(id)), Some(origin)) = (record.source, &record.origin) else { return Ok(()) };
        let storage = self.context.storage.as_ref();
        let source = ImageSpec::with_id(&origin.pool, &origin.image_id);
        if !origin.temporary || !storage.in_trash(&source).await? {
            return Ok(());
        }
        let started = Instant::now();
        loop {
            let status = self.context.cloud.volume(&id.to_string()).await?.map(|volume| volume.status);
            match status.as_deref() {
                None | Some("deleted") => break,
                // between the move to the trash and the end of the volume
                Some("deleting") if started.elapsed() < DELETED_WITHIN => sleep(DELETING_INTERVAL).await,
                Some("deleting") if self.may_wait_for_others(&record) => {
                    return Err(Stop::Retry(format!("Cinder is still deleting volume {id}")));
                }
                Some(status) => {
                    tracing::warn!(image_id = %self.id, volume = %id, status, source = %source,
                        "the volume's disk is in the trash, and Cinder still has the volume; the disk is left there");
                    return Ok(());
                }
            }
        }
        self.before_visible_step().await?;
        if storage.purge(&source).await? == Change::Made {
            tracing::info!(image_id = %self.id, volume = %id, source = %source,
                "removed the deleted volume's disk from the trash");
        }
        Ok(())
    }
}

/// Where a transfer takes the bytes from.
pub(super) struct CopySource {
    source: ImageSpec,
    snapshot: String,
    /// The anchor and its snapshot.
    anchor: Option<(ImageSpec, String)>,
}

/// The snapshot that holds the data now, and all that it reads from. As long as this stays the same, no snapshot in it
/// can have been removed.
#[derive(PartialEq)]
struct Readable {
    source: ImageSpec,
    snapshot: String,
    chain: Vec<Link>,
}

impl CopySource {
    /// The source, while the anchor hangs on it. Once Cinder has flattened the anchor, the source may go, and the anchor
    /// has all the data itself.
    async fn readable(&self, storage: &dyn Storage) -> ceph::Result<Readable> {
        let (source, snapshot) = (self.source.clone(), self.snapshot.clone());
        let Some((anchor, own)) = &self.anchor else {
            let chain = storage.chain(&source, &snapshot).await?;
            return Ok(Readable { source, snapshot, chain });
        };
        let chain = storage.chain(anchor, own).await?;
        if chain.is_empty() {
            return Ok(Readable { source: anchor.clone(), snapshot: own.clone(), chain });
        }
        Ok(Readable { source, snapshot, chain })
    }
}

/// Whether an error may be of a parent that went away, and not of our own doing or lot.
fn may_come_of_a_cut_chain(error: &ceph::Error) -> bool {
    !matches!(
        error.kind(),
        ErrorKind::Cancelled | ErrorKind::Fenced | ErrorKind::NotLocked | ErrorKind::Exists | ErrorKind::NoSpace
    )
}

fn chain_changes(copy: &ImageSpec) -> ceph::Error {
    let detail = "the parents of the source changed each time during the copy";
    ceph::Error::new(format!("copy to {copy}"), ErrorKind::Conflict, detail)
}

fn in_the_way<T>(image: &ImageSpec) -> Step<T> {
    end(State::Failed, format!("{image} is in the way and is not this job's: look what it is, remove it, then retry"))
}
