//! From a request to a complete, inspected, sealed copy under its private name.

use super::{Job, Step, Stop, decline, end};
use crate::ceph::{self, Compare, ErrorKind, ImageSpec, TransferLimits};
use crate::config::{Config, Hash, Verify};
use crate::decline::Decline;
use crate::job::record::{self, Handover, Origin, Publication, State};
use crate::plan::{self, Plan, Question};
use crate::publish;
use crate::publish::record::Status;
use crate::transfer::{self, Order};

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
        let (methods, reasons) = transfer::candidates(plan.method, &plan.info);
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
            record.made.copy = true;
            let _ = record.enter(State::Copying, now);
        })
        .await?;
        tracing::info!(image_id = %self.id, job_stage = "copying", source = %plan.source, origin = %plan.origin,
            destination = %copy, method = first.map(transfer::Method::as_str), bytes = plan.info.size, "the job goes on");

        let source = ImageSpec::with_id(&plan.origin.pool, &plan.origin_id);
        let (shown, snapped) = tokio::join!(
            self.show(plan.image.clone(), Status::Copying, "the disk is being copied inside the storage cluster"),
            self.stage("snapshot", self.ensure_snapshot(&source, &snapshot, origin.temporary))
        );
        snapped?;
        shown?;
        self.stage("transfer", self.transfer(config, &methods, &source, &snapshot, &copy)).await?;
        if self.cancel.is_cancelled() {
            return Err(Stop::Interrupted);
        }
        let compared = match config.offload.verify {
            Verify::None => None,
            Verify::Sample => Some(Compare::Sample),
            Verify::Full => Some(Compare::Full),
        };
        if let Some(extent) = compared {
            self.stage("verify", self.verify(&source, &snapshot, &copy, extent)).await?;
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
        let image = if offered { self.await_offer().await? } else { self.read_image().await? };
        let source = plan::read_request(&image, &question)?;
        if record.source != Some(source) {
            // also where the plan then refuses it: `retry` goes by the latest request, not by one before
            self.update(|record| record.source = Some(source)).await?;
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
        if storage.image(copy, None).await?.is_some() {
            return end(
                State::Failed,
                format!("{copy} is in the way and is not this job's: look what it is, remove it, then retry"),
            );
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
            self.context.storage.create_snapshot(source, snapshot).await?;
            self.context.storage.protect_snapshot(source, snapshot).await?;
        }
        Ok(())
    }

    pub(super) async fn transfer(
        &self,
        config: &Config,
        methods: &[transfer::Method],
        source: &ImageSpec,
        snapshot: &str,
        copy: &ImageSpec,
    ) -> Step<()> {
        let order = Order {
            source: source.clone(),
            snapshot: snapshot.to_owned(),
            destination: copy.clone(),
            mark: self.tag().await.to_string(),
            limits: TransferLimits {
                concurrency: config.offload.concurrency,
                bytes_per_second: config.offload.bandwidth_limit,
                objects_per_second: config.offload.objects_per_second,
            },
        };
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
            let result =
                method.transfer().run(self.context.storage.as_ref(), &order, &self.progress, &self.cancel).await;
            match result {
                Ok(moved) => {
                    metrics::counter!("rbd_offload_copied_bytes_total", "method" => method.as_str())
                        .increment(moved.bytes);
                    metrics::counter!("rbd_offload_host_bytes_total", "method" => method.as_str())
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
                    return end(
                        State::Failed,
                        format!("{copy} is in the way and is not this job's: look what it is, remove it, then retry"),
                    );
                }
                Err(error) => return Err(error.into()),
            }
        }
        match refused {
            Some(error) => Err(error.into()),
            None => end(State::Failed, "no method of transfer can do this source"),
        }
    }

    /// A copy that differs from its source is never published.
    pub(super) async fn verify(
        &self,
        source: &ImageSpec,
        snapshot: &str,
        copy: &ImageSpec,
        extent: Compare,
    ) -> Step<()> {
        let Some(offset) =
            self.context.storage.compare(source, snapshot, copy, extent, &self.progress, &self.cancel).await?
        else {
            return Ok(());
        };
        metrics::counter!("rbd_offload_verify_failures_total").increment(1);
        tracing::error!(image_id = %self.id, job_stage = "verify", offset, copy = %copy, "the copy differs from its source");
        self.context.storage.remove_image(copy).await?;
        Err(Stop::Retry(format!("the copy differed from its source at byte {offset}; it was removed and is made anew")))
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
        Ok(publish::seal(storage, copy).await?)
    }

    pub(super) async fn hash(&self, copy: &ImageSpec, size: u64) -> Step<()> {
        let hash = publish::sha512(self.context.storage.as_ref(), copy, size, &self.progress, &self.cancel).await?;
        self.update(|record| record.publication.sha512 = Some(hash.clone())).await
    }

    pub(super) async fn remove_source_snapshot(&self) -> Step<()> {
        let _one = self.removing.lock().await;
        let record = self.snapshot().await;
        if let (true, Some(origin)) = (record.made.snapshot, &record.origin) {
            let source = ImageSpec::with_id(&origin.pool, &origin.image_id);
            self.context.storage.remove_snapshot(&source, &origin.snapshot).await?;
            self.context.storage.remove_snapshot_tag(&source, &origin.snapshot).await?;
            self.update(|record| record.made.snapshot = false).await?;
        }
        Ok(())
    }
}
