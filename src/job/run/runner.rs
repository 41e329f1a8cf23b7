//! The runner: applies the steps of a job's list in their order, and undoes them in the reverse one. It alone decides
//! which step comes next.

use std::collections::BTreeSet;
use std::time::Duration;

use super::{JobRun, StepError, StepResult};
use crate::ceph;
use crate::job::error::{end, other_writer};
use crate::job::held::has_running_task;
use crate::job::record::{Artifact, Phase, Publish, Record, Registration, State};
use crate::job::steps::{self, Attempt, Step, StepName};
use crate::openstack::Image;
use crate::publish::image_status::{self, Status};
use crate::transfer::Method;

impl JobRun {
    /// Applies the steps from the first one of the job's state on. A method that cannot do the source is followed by
    /// the next one.
    pub(super) async fn apply_steps(&self, attempt: &mut Attempt) -> StepResult<()> {
        let mut applied = BTreeSet::new();
        loop {
            let record = self.job.record().await;
            let list = steps::list(record.publish);
            // what was made in an earlier phase stays
            let is_over = |name: &StepName| steps::step(*name).is_some_and(|step| step.phase() < record.phase());
            let names: Vec<StepName> = list.iter().copied().skip_while(is_over).collect();
            match self.apply_list(attempt, &names, &mut applied).await {
                Err(StepError::NextMethod(refused)) => self.take_next_method(attempt, refused, &mut applied).await?,
                result => return result,
            }
        }
    }

    /// Applies these steps, but for those that are `applied`. The source is released beside the steps that follow, up
    /// to the one that needs it free.
    async fn apply_list(
        &self,
        attempt: &mut Attempt,
        names: &[StepName],
        applied: &mut BTreeSet<StepName>,
    ) -> StepResult<()> {
        let Some(release) = names.iter().position(|name| *name == StepName::ReleaseSource) else {
            return self.apply(attempt, names, applied).await;
        };
        self.apply(attempt, &names[..release], applied).await?;
        let after = &names[release + 1..];
        let needs = |name: &StepName| steps::step(*name).is_some_and(Step::needs_free_source);
        let beside = after.iter().position(needs).unwrap_or(after.len());
        if self.job.record().await.phase() < Phase::Publish {
            self.job.enter(State::Publishing).await?;
        }
        let (others, released) = tokio::join!(self.apply(attempt, &after[..beside], applied), self.release_source());
        others?;
        released?;
        self.apply(attempt, &after[beside..], applied).await
    }

    /// Applies these steps in their order, but for those that are `applied`.
    async fn apply(
        &self,
        attempt: &mut Attempt,
        names: &[StepName],
        applied: &mut BTreeSet<StepName>,
    ) -> StepResult<()> {
        for name in names {
            let Some(step) = steps::step(*name).filter(|_| !applied.contains(name)) else { continue };
            self.enter_phase(attempt, step.phase()).await?;
            if !step.is_needed(attempt, &self.job.record().await) {
                // another method may need it
                continue;
            }
            self.apply_step(attempt, step).await?;
            applied.insert(*name);
        }
        Ok(())
    }

    /// Brings the job to the phase of its next step.
    async fn enter_phase(&self, attempt: &mut Attempt, phase: Phase) -> StepResult<()> {
        let now = self.job.record().await.phase();
        match phase {
            // what waits for a free source is the last step of every list
            _ if now > phase => Ok(()),
            Phase::Prepare => Ok(()),
            Phase::Publish => {
                if now < phase {
                    self.job.update(Record::seal).await?;
                }
                if attempt.image.is_none() { self.begin_publishing(attempt).await } else { Ok(()) }
            }
            Phase::Detach if now < phase => {
                self.enter_detaching().await?;
                // a new request gets this place, and a daemon with room for it goes on behind the image
                Err(StepError::Later(Duration::ZERO))
            }
            Phase::Detach => Ok(()),
        }
    }

    async fn apply_step(&self, attempt: &mut Attempt, step: &'static dyn Step) -> StepResult<()> {
        if step.is_visible() {
            self.job.before_visible_step().await?;
        }
        let status = step.status().zip(attempt.copying.as_ref().map(|copying| copying.plan.image.clone()));
        let show = async {
            match status {
                Some(((Status::Copying, message), image)) => self.show(image, Status::Copying, message).await,
                Some(((status, message), _)) => {
                    self.show_again(status, message).await;
                    Ok(())
                }
                None => Ok(()),
            }
        };
        let (applied, shown) = tokio::join!(self.job.stage(step.name(), step.apply(&self.job, attempt)), show);
        applied?;
        shown
    }

    /// The copy is complete. Reads the image record again, which may have changed meanwhile.
    async fn begin_publishing(&self, attempt: &mut Attempt) -> StepResult<()> {
        // from here on the watcher leaves the image record alone, and nothing more is copied into the pool
        let known = self.shown.lock().await.take().filter(|image| !image_status::shows_running_job(image));
        if let Some(copying) = attempt.copying.take() {
            drop(copying.slot);
        }
        let record = self.job.record().await;
        if record.dest_pool.is_none() {
            return Err(StepError::Abandon("its record names no destination pool".into()));
        }
        let is_posted = record.registration >= Registration::Posted;
        // The record that the plan read a moment ago suffices: Glance's answer to the change of the record is checked
        // again, before the location is posted. Published at once, that change replaces the tags.
        let is_recent = attempt.began.elapsed() < image_status::SHOWN_AFTER && record.publish == Publish::WhenCopied;
        let image = match known.filter(|_| is_recent && record.is_first_attempt() && record.handover.is_none()) {
            Some(image) => image,
            None => self.job.read_image().await?,
        };
        match image.status.as_str() {
            "active" | "deactivated" if self.job.is_our_image(&image).await? => {}
            // a task that is at work before we posted anything is another writer's import
            "queued" if is_posted || !has_running_task(&image) => {}
            // our own location, or that of a daemon before
            "importing" if is_posted => {}
            _ => return other_writer(),
        }
        attempt.image = Some(image);
        Ok(())
    }

    /// Undoes this method's steps and takes the next method. Without one, the job fails with the last method's error.
    async fn take_next_method(
        &self,
        attempt: &mut Attempt,
        refused: Option<ceph::Error>,
        applied: &mut BTreeSet<StepName>,
    ) -> StepResult<()> {
        let methods = &mut attempt.copying_mut()?.methods;
        let before = methods.pop_front();
        let Some(next) = methods.front().copied() else {
            return self.no_method(refused).await;
        };
        if let Some(error) = &refused {
            tracing::warn!(image_id = %self.job.id, job_stage = "transfer", %error, next = next.as_str(),
                "this method failed; trying the next one");
        }
        self.undo(None, Step::depends_on_method).await?;
        // the snapshot step asks again whose the source is: the first copy may have taken long
        let stays =
            |name: &StepName| *name != StepName::Snapshot && !steps::step(*name).is_some_and(Step::depends_on_method);
        applied.retain(stays);
        let note = refused.map(|error| format!("{}: {error}", before.map_or("", Method::as_str)));
        self.job
            .update(|record| {
                if let Some(note) = &note {
                    record.note_fallback(note);
                }
                record.method = Some(next);
            })
            .await
    }

    /// No method of transfer is left.
    pub(super) async fn no_method<T>(&self, refused: Option<ceph::Error>) -> StepResult<T> {
        if let Some(error) = refused {
            return Err(error.into());
        }
        match self.job.record().await.mismatched.first() {
            Some(method) => end(
                State::Failed,
                format!(
                    "the copy by {method} differed from its source and was removed, and no other method can do this \
                     source: check the health of the Ceph cluster and report this"
                ),
            ),
            None => end(State::Failed, "no method of transfer can do this source"),
        }
    }

    /// Undoes the steps that hold the source: the anchor, then the temporary snapshot.
    pub(super) async fn release_source(&self) -> StepResult<()> {
        self.undo(None, Step::holds_source).await
    }

    /// Undoes every step that makes something, in the reverse order, so that nothing of the job is left.
    pub(super) async fn undo_steps(&self) -> StepResult<()> {
        self.undo(None, |step| step.makes().is_some()).await?;
        self.job
            .update(|record| {
                record.artifacts.clear();
                record.registration = Registration::Unposted;
            })
            .await
    }

    /// Undoes the steps that `are_chosen`, in the reverse of their order, and takes out of the record what they made.
    pub(super) async fn undo(
        &self,
        image: Option<&Image>,
        are_chosen: impl Fn(&'static dyn Step) -> bool,
    ) -> StepResult<()> {
        let record = self.job.record().await;
        let mut removed: BTreeSet<Artifact> = BTreeSet::new();
        for name in steps::list(record.publish).iter().rev() {
            if let Some(step) = steps::step(*name).filter(|step| are_chosen(*step)) {
                step.undo(&self.job, &record, image).await?;
                removed.extend(step.makes().filter(|artifact| record.has(*artifact)));
            }
        }
        if removed.is_empty() {
            return Ok(());
        }
        self.job.update(|record| record.artifacts.retain(|artifact| !removed.contains(artifact))).await
    }

    /// What is due at every end: a source that was deleted meanwhile is purged.
    pub(super) async fn apply_at_end(&self) -> StepResult<()> {
        let mut attempt = Attempt::new(self.job.context.config.borrow().clone());
        for name in steps::list(self.job.record().await.publish) {
            if let Some(step) = steps::step(*name).filter(|step| step.needs_free_source()) {
                step.apply(&self.job, &mut attempt).await?;
            }
        }
        Ok(())
    }
}
