//! One attempt, from where the record stands: what the job is to do, and the plan for it.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use tokio::time::Instant;

use super::{JobRun, StepError, StepResult};
use crate::ceph::{ImageSpec, TransferLimits};
use crate::config::{self, Config};
use crate::decline::Decline;
use crate::job::error::{decline, end};
use crate::job::held::has_running_task;
use crate::job::names::private_name;
use crate::job::record::{
    Artifact, DRY_RUN, HandoverState, Outcome, Phase, Publication, Publish, Record, SourceImage, State,
};
use crate::job::signal::{Signal, Signals};
use crate::job::steps::{self, Attempt, CopySource, Copying};
use crate::openstack::{self, Image};
use crate::plan::{self, Plan, PlanRequest};
use crate::publish::image_status;
use crate::request::{self, Source, TagRequest, Trigger};
use crate::transfer::{self, Method};

impl JobRun {
    /// One attempt, from where the record stands.
    pub(super) async fn attempt(&self) -> StepResult<State> {
        let record = self.job.record().await;
        if let Some(outcome) = record.pending_outcome() {
            return Err(StepError::End(outcome.clone()));
        }
        if self.job.signals().await.has(Signal::Cancel) && !record.state.is_ended() && record.phase() < Phase::Detach {
            return end(State::Cancelled, "cancelled by the operator");
        }
        if record.state.is_ended() {
            if !self.restart_if_rerequested().await? {
                return Ok(self.job.record().await.state);
            }
            self.job.index_holder().await;
        }
        let config = self.job.context.config.borrow().clone();
        let record = self.job.record().await;
        if record.phase() == Phase::Detach {
            return self.detach(config).await;
        }
        let mut attempt = match record.state {
            State::Publishing if record.phase() == Phase::Publish => Attempt::new(config),
            State::Accepted if config.offload.dry_run => return self.dry_run(&config).await,
            // begun by an attempt that did not end
            State::Copying | State::Publishing => self.start_over(config).await?,
            _ => self.plan_job(config).await?,
        };
        let applied = match self.apply_steps(&mut attempt).await {
            Err(StepError::WhenCopied(reason)) => {
                // places among the jobs of the pool are taken again
                drop(attempt);
                self.switch_to_when_copied(&reason).await?
            }
            applied => applied,
        };
        applied?;
        self.finish_job(&Outcome::new(State::Done, "")).await?;
        Ok(State::Done)
    }

    /// Undoes the steps of an earlier attempt, and plans the job again.
    async fn start_over(&self, config: Arc<Config>) -> StepResult<Attempt> {
        let record = self.job.record().await;
        if record.publish == Publish::AtOnce && record.has(Artifact::Published) {
            let image = self.job.read_image().await?;
            if image.status != "queued" || has_running_task(&image) {
                // Glance makes the image active all the same, or has done so: the published image stays
                self.job.update(Record::keep_published).await?;
                return Err(StepError::Retry("Glance still works on the image".into()));
            }
        }
        self.undo_steps().await?;
        // the next plan may find another source, and nothing tells of this one then
        self.apply_at_end().await?;
        self.job.update(|record| record.source_image = None).await?;
        self.job.enter(State::Accepted).await?;
        self.plan_job(config).await
    }

    /// The image cannot be published at once: does the job again, and publishes when copied. The inner result is of
    /// the steps.
    async fn switch_to_when_copied(&self, reason: &str) -> StepResult<StepResult<()>> {
        tracing::warn!(image_id = %self.job.id, job_stage = "publish", reason,
            "the image is not published at once, but when it is copied");
        // stored first: another daemon that takes over does not try again
        self.job.update(|record| record.switch_to_when_copied(reason)).await?;
        // a copy is to be made: it takes a place again
        self.job.waits.store(false, Ordering::SeqCst);
        let config = self.job.context.config.borrow().clone();
        let mut attempt = self.start_over(config).await?;
        Ok(self.apply_steps(&mut attempt).await)
    }

    /// One attempt behind the active image.
    async fn detach(&self, config: Arc<Config>) -> StepResult<State> {
        self.note_deletion().await?;
        let mut attempt = Attempt::new(config);
        self.apply_steps(&mut attempt).await?;
        let outcome = self.job.record().await.end_of_detaching();
        self.finish_job(&outcome).await?;
        Ok(outcome.state)
    }

    /// When the image becomes active, and why it cannot be at once where that is asked for.
    async fn when_to_publish(&self, plan: &Plan, methods: &[Method], config: &Config) -> (Publish, Option<String>) {
        if plan.publish == config::PublishChoice::WhenCopied {
            return (Publish::WhenCopied, None);
        }
        let record = self.job.record().await;
        let pool = &plan.origin.pool;
        let unsupported_reason = if let Some(reason) = record.at_once_refused {
            // it has been said
            return (Publish::WhenCopied, Some(reason));
        } else if matches!(plan.source, Source::Instance(_)) {
            "Nova cannot remove the disk of an instance while an image depends on it".to_owned()
        } else if !matches!(methods.first(), Some(Method::ServerCopy | Method::Clone)) {
            "the method copy makes no clone".to_owned()
        } else if plan.info.size == 0 {
            "the source is empty".to_owned()
        } else if config.offload.hash == config::Hash::Sha512 {
            "[offload] hash = sha512 takes the whole copy before the image is active".to_owned()
        } else if !record.mismatched.is_empty() {
            "an earlier copy differed from its source".to_owned()
        } else if self.job.context.refusals.has(pool, &plan.dest_pool) {
            format!(
                "Glance refused an image from pool {pool} in the last hour: its Ceph user may lack the \
                     capability profile rbd-read-only pool={pool}"
            )
        } else {
            return (Publish::AtOnce, None);
        };
        tracing::info!(image_id = %self.job.id, job_stage = "plan", reason = unsupported_reason,
            "the image is not published at once, but when it is copied");
        (Publish::WhenCopied, Some(unsupported_reason))
    }

    /// Plans the job, and writes down what is to be done.
    async fn plan_job(&self, config: Arc<Config>) -> StepResult<Attempt> {
        let began = Instant::now();
        let plan = self.job.stage("plan", self.plan(&config)).await?;
        let Some(slot) = self.pools.take(&plan.dest_pool, config.offload.max_jobs_per_pool) else {
            return Err(StepError::NoRoom { pool: plan.dest_pool });
        };
        let snapshot = plan.snapshot.clone().unwrap_or_else(|| private_name(self.job.id));
        let (mut methods, mut reasons) = transfer::candidates(plan.method, &plan.info);
        for method in self.job.record().await.mismatched {
            methods.retain(|other| *other != method);
            reasons.push(format!("{method}: its copy differed from the source"));
        }
        if !reasons.is_empty() {
            tracing::info!(image_id = %self.job.id, job_stage = "plan", reasons = reasons.join("; "),
                "some methods cannot do this source");
        }
        let Some(first) = methods.first().copied() else { return self.no_method(None).await };
        let (publish, not_at_once) = self.when_to_publish(&plan, &methods, &config).await;
        reasons.extend(not_at_once.map(|reason| format!("at-once: {reason}")));
        let mut attempt = Attempt { began, ..Attempt::new(Arc::clone(&config)) };
        let copying = attempt.copying.insert(Copying {
            source: CopySource::new(ImageSpec::with_id(&plan.origin.pool, &plan.origin_id), snapshot.clone(), None),
            copy: ImageSpec::named(&plan.dest_pool, private_name(self.job.id)),
            methods: methods.into(),
            limits: TransferLimits {
                concurrency: config.offload.concurrency,
                rates: Arc::clone(&self.job.context.rates),
            },
            slot,
            plan,
        });
        let (plan, copy) = (copying.plan.clone(), copying.copy.clone());
        let record = Record { publish, ..self.job.record().await };
        for step in steps::list(publish).iter().rev().filter_map(|name| steps::step(*name)) {
            if step.is_needed(&attempt, &record) {
                step.check(&self.job, &attempt).await?;
            }
        }
        let source_image = SourceImage {
            pool: plan.origin.pool.clone(),
            image_id: plan.origin_id.clone(),
            image: plan.origin.to_string(),
            snapshot,
            temporary: plan.snapshot.is_none(),
        };
        let now = self.job.context.clock.now();
        let state = match publish {
            Publish::WhenCopied => State::Copying,
            Publish::AtOnce => State::Publishing,
        };
        self.job
            .update(|record| {
                record.source = Some(plan.source);
                record.project_id = Some(plan.project_id.clone());
                record.source_image = Some(source_image.clone());
                record.dest_pool = Some(plan.dest_pool.clone());
                record.publication = Publication {
                    min_disk: plan.min_disk,
                    min_ram: plan.min_ram,
                    properties: plan.properties.clone(),
                    sha512: None,
                };
                record.method = Some(first);
                record.fallback = (!reasons.is_empty()).then(|| reasons.join("; "));
                record.bytes_total = plan.info.size;
                record.bytes_done = 0;
                record.progress = 0;
                record.reason = None;
                record.set_publish(publish);
                let _ = record.enter(state, now);
            })
            .await?;
        tracing::info!(image_id = %self.job.id, job_stage = state.as_str(), source = %plan.source, origin = %plan.origin,
            destination = %copy, method = first.as_str(), bytes = plan.info.size, "job state changed");
        Ok(attempt)
    }

    pub(super) async fn plan(&self, config: &Config) -> StepResult<Plan> {
        let record = self.job.record().await;
        let offered = record.handover == Some(HandoverState::Offered);
        let (image_id, trigger, source, retried) = (self.job.id, record.trigger, record.source, record.retried);
        let request = PlanRequest { image_id, trigger, source, retried, offered };
        if trigger != Trigger::Request && record.handover.is_none() {
            return decline(Decline::Handover, "no service offered this image");
        }
        let image = self.job.read_image().await?;
        let source = plan::read_request(&image, &request)?;
        if record.source != Some(source) {
            let is_shared = !config.offload.decline_after.is_zero();
            // also where the plan then refuses it: `retry` goes by the latest request, not by one before
            self.job
                .update(|record| {
                    if record.source.replace(source).is_some() && is_shared {
                        // another deployment may have this one's disk
                        (record.dest_pool, record.acknowledged) = (None, false);
                    }
                    record.mismatched.clear();
                })
                .await?;
        }
        let context = &self.job.context;
        Ok(plan::build(context.cloud.as_ref(), context.storage.as_ref(), config, &request, image, source).await?)
    }

    /// Restarts an ended job if the image record has a request again, or if the operator retries it. A notification
    /// about it may be late, so the record decides. Returns whether the job was restarted.
    pub(super) async fn restart_if_rerequested(&self) -> StepResult<bool> {
        const RESTART_SIGNALS: [Signal; 2] = [Signal::Rerequested, Signal::Retry];
        let seen = self.job.signals().await;
        let image = match self.job.context.cloud.image(&self.job.id.to_string()).await {
            Ok(image) => image.filter(|image| image.status == "queued"),
            // its owner made it so, and asks for nothing until it can be read
            Err(error) if error.kind() == openstack::ErrorKind::TooLarge => None,
            Err(error) => return Err(error.into()),
        };
        if self.job.signals().await.has(Signal::Cancel) {
            self.cancel_request(image, &seen).await?;
            return Ok(false);
        }
        let record = self.job.record().await;
        let is_elsewhere = |image: &Image| {
            let is_same = request::parse_request_tags(&image.tags)
                == record.source.map_or(TagRequest::Absent, TagRequest::Source);
            // another deployment works on it, and writes the status
            record.is_elsewhere() && is_same && image_status::shows_running_job(image)
        };
        let image = image.filter(|image| !is_elsewhere(image));
        let asked = match image.map(|image| request::parse_request_tags(&image.tags)) {
            None | Some(TagRequest::Absent) => None,
            Some(TagRequest::Source(source)) => Some(Some(source)),
            Some(TagRequest::Invalid(_)) => Some(None),
        };
        let asked = asked.filter(|_| !self.job.context.config.borrow().offload.dry_run);
        let retried = seen.has(Signal::Retry) && record.trigger == Trigger::Request;
        let now = self.job.context.clock.now();
        if record.state.may_become(State::Accepted) && (retried || asked.is_some()) {
            self.job
                .update_with_signals(|record, signals| {
                    if signals.has(Signal::Cancel) || record.restart(retried, now).is_err() {
                        return Vec::new();
                    }
                    if let (Some(source), false) = (asked, retried) {
                        record.source = source;
                    }
                    signals.seen_in(&seen, &RESTART_SIGNALS)
                })
                .await?;
            if self.job.record().await.state.is_ended() {
                return Err(StepError::Retry("the request that was made again is cancelled".into()));
            }
            // a new request, which has an id of its own
            self.job.span.record("request_id", tracing::field::display(self.job.record().await.request_id));
            return Ok(true);
        }
        self.job
            .update_with_signals(|record, signals| {
                record.owner = None;
                record.owner_address = None;
                signals.seen_in(&seen, &RESTART_SIGNALS)
            })
            .await?;
        self.job.index().await?;
        Ok(false)
    }

    /// The operator cancelled a request that was made after the job's end, before the job began again.
    async fn cancel_request(&self, image: Option<Image>, seen: &Signals) -> StepResult<()> {
        if let Some(image) = image.filter(|image| request::parse_request_tags(&image.tags) != TagRequest::Absent) {
            // stored before the tag goes: `retry` goes by the latest request
            if let TagRequest::Source(source) = request::parse_request_tags(&image.tags) {
                self.job.update(|record| record.source = Some(source)).await?;
            }
            let outcome = Outcome::new(State::Cancelled, "cancelled by the operator");
            self.report_outcome(image, &outcome).await?;
        }
        self.job
            .update_with_signals(|record, signals| {
                record.owner = None;
                record.owner_address = None;
                let mut consumed = signals.seen_in(seen, &[Signal::Rerequested, Signal::Retry]);
                consumed.push(Signal::Cancel);
                consumed
            })
            .await?;
        self.job.index().await
    }

    /// Dry run: builds the plan and reports it without changing anything. The request stays in place and is executed
    /// once `dry_run` is off.
    async fn dry_run(&self, config: &Config) -> StepResult<State> {
        let finding = match self.job.stage("plan", self.plan(config)).await {
            Ok(plan) => format!("{} would be copied to pool {}", plan.origin, plan.dest_pool),
            Err(StepError::End(ending)) => format!("the request would be {}: {}", ending.state, ending.reason),
            Err(StepError::OtherBackend { reason, .. }) => format!("this daemon cannot do the request: {reason}"),
            Err(stop) => return Err(stop),
        };
        tracing::info!(image_id = %self.job.id, job_stage = "dry_run", finding, "dry run");
        metrics::counter!("rbd_offload_jobs_dry_run_total").increment(1);
        let reason = format!("{DRY_RUN}: {finding}");
        self.finish_job(&Outcome::new(State::Cancelled, reason)).await?;
        Ok(State::Cancelled)
    }
}
