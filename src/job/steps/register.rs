//! Makes the image record ready, gives Glance the location, and waits until the image is active.

use std::sync::atomic::Ordering;
use std::time::Duration;

use async_trait::async_trait;
use tokio::time::{Instant, sleep};

use super::super::error::{StepError, StepResult, image_gone, other_writer};
use super::super::held::{CHANGE_TRIES, HASHED_PER_SECOND, HeldJob, has_running_task, running_task};
use super::super::record::{Artifact, Outcome, Phase, Publication, Publish, Record, Registration, State};
use super::{Attempt, Step};
use crate::ceph::ImageSpec;
use crate::openstack::{self, Image, ImageChange, LocationAnswer, Validation};
use crate::plan;
use crate::publish;
use crate::publish::image_status;

/// How long Glance may take to make a registered image active, beside the time for reading it where it does that first.
const ACTIVE_WITHIN: Duration = Duration::from_secs(60);

/// The pause before the first poll of a registered image. Glance takes 0.2 to 0.4 s for it, and a poll costs Glance as
/// much as any call.
const POLL_FIRST: Duration = Duration::from_millis(200);
/// Shortest and longest pause between two polls.
const POLL_MIN: Duration = Duration::from_millis(100);
const POLL_MAX: Duration = Duration::from_secs(1);

pub struct Register;

#[async_trait]
impl Step for Register {
    fn name(&self) -> &'static str {
        "register"
    }

    fn phase(&self) -> Phase {
        Phase::Publish
    }

    fn is_needed(&self, attempt: &Attempt, _record: &Record) -> bool {
        !attempt.is_active()
    }

    async fn apply(&self, job: &HeldJob, attempt: &mut Attempt) -> StepResult<()> {
        let mut image = attempt.image()?.clone();
        let record = job.record().await;
        let Some(pool) = record.dest_pool.clone() else {
            return Err(StepError::Abandon("its record names no destination pool".into()));
        };
        let is_posted = record.registration >= Registration::Posted;
        let known = tasks_before(job, &image, &record).await?;
        let posts = image.status == "queued" && !(is_posted && has_running_task(&image));
        if posts {
            image = job.stage("record", prepare_image_properties(job, image, &record)).await?;
        }
        job.waits.store(true, Ordering::SeqCst);
        if posts {
            post_location(job, &image, &pool).await?;
        }
        // a task that was there before our first POST is another writer's
        let foreign = if is_posted { &[][..] } else { &known[..] };
        let image = await_active(job, &known, foreign, &pool, record.bytes_total).await?;
        job.waits.store(false, Ordering::SeqCst);
        if !job.is_our_image(&image).await? {
            return other_writer();
        }
        attempt.image = Some(image);
        Ok(())
    }

    /// A location cannot be taken back. While Glance works on it, its RBD image must not be removed: the image would
    /// become active without data.
    async fn undo(&self, job: &HeldJob, record: &Record, image: Option<&Image>) -> StepResult<()> {
        let is_posted = record.state == State::Publishing && record.registration >= Registration::Posted;
        if is_posted && record.attempts < job.glance_attempts(record) && image.is_some_and(has_running_task) {
            return Err(StepError::Retry("Glance still works on the image".into()));
        }
        Ok(())
    }
}

async fn tasks(job: &HeldJob) -> StepResult<Vec<openstack::ImageTask>> {
    Ok(job.context.cloud.image_tasks(&job.id.to_string()).await?)
}

/// The image's tasks before the location is posted. A job that tries for the first time has posted none that failed, so
/// only the one that runs counts, which the image record names.
async fn tasks_before(job: &HeldJob, image: &Image, record: &Record) -> StepResult<Vec<String>> {
    if record.is_first_attempt() {
        return Ok(running_task(image).into_iter().cloned().collect());
    }
    Ok(tasks(job).await?.into_iter().map(|task| task.id).collect())
}

async fn prepare_image_properties(job: &HeldJob, mut image: Image, record: &Record) -> StepResult<Image> {
    let Publication { min_disk, min_ram, properties, .. } = &record.publication;
    let copying = record.publish == Publish::AtOnce;
    for _ in 0..CHANGE_TRIES {
        let needed = |image: &Image| {
            let mut changes = image_status::prepare(image, *min_disk, *min_ram, properties, copying);
            if job.is_status_refused() {
                changes.retain(|change| !matches!(change, ImageChange::Remove { .. }));
            }
            changes
        };
        let mut changes = needed(&image);
        if changes.is_empty() {
            // what is judged before the location is posted must be of now
            image = job.read_image().await?;
            changes = needed(&image);
        }
        if image.status != "queued" || changes.is_empty() {
            return Ok(image);
        }
        job.check_cancelled()?;
        match job.change_image(&changes).await? {
            Ok(Some(changed)) => return Ok(changed),
            Ok(None) => return image_gone(),
            Err(error) if matches!(error.kind(), openstack::ErrorKind::Conflict | openstack::ErrorKind::Forbidden) => {
                image = job.read_image().await?;
                if image.status != "queued" {
                    return other_writer();
                }
                let removes = changes.iter().any(|change| matches!(change, ImageChange::Remove { .. }));
                match error.kind() {
                    openstack::ErrorKind::Forbidden if removes => job.note_status_refused(&error),
                    openstack::ErrorKind::Forbidden => return Err(refused_record(&error, properties.len())),
                    _ => {}
                }
            }
            Err(error) => return Err(error.into()),
        }
    }
    Err(StepError::Retry("the image record changes all the time".into()))
}

/// Glance does not let the daemon make the record ready.
fn refused_record(error: &openstack::Error, inherited: usize) -> StepError {
    let hint = match inherited {
        0 => "",
        _ => "; a property that Glance protects and the image would inherit belongs into [glance] protected_properties",
    };
    StepError::End(Outcome::new(State::Failed, format!("{error}{hint}")))
}

/// Tells Glance the location. `image` is the record as Glance answered it last: whatever was changed since the plan
/// shows there.
async fn post_location(job: &HeldJob, image: &Image, pool: &str) -> StepResult<()> {
    if image.status != "queued" {
        return other_writer();
    }
    job.check_request(image).await?;
    plan::check_record(image)?;
    let id = job.id.to_string();
    let url = publish::location(&job.context.storage.fsid().await?, pool, &id);
    let before = job.record().await;
    let was_posted = before.registration >= Registration::Posted;
    if !was_posted {
        job.update(|record| record.registration = Registration::Posted).await?;
    }
    // after that write, which may have taken long
    job.before_visible_step().await?;
    let validation = before.publication.sha512.map(|value| Validation { algorithm: "sha512".into(), value });
    let added = match job.context.cloud.add_location(&id, &url, validation.as_ref()).await {
        // an older Glance opens the image before it answers
        Err(error) if before.publish == Publish::AtOnce && error.kind() == openstack::ErrorKind::Refused => {
            job.update(|record| record.registration = Registration::Unposted).await?;
            return refused_at_once(job, &error.to_string()).await;
        }
        added => added?,
    };
    match added {
        Some(LocationAnswer::Accepted) => Ok(()),
        // it may be our own success, whose answer was lost: look
        Some(LocationAnswer::Conflict) if was_posted => Ok(()),
        Some(LocationAnswer::Conflict) => {
            job.update(|record| record.registration = Registration::Unposted).await?;
            other_writer()
        }
        None => image_gone(),
    }
}

/// Glance does not take an image that depends on the source's pool. It is published when copied, and so are the others
/// from that pool for a while.
async fn refused_at_once<T>(job: &HeldJob, reason: &str) -> StepResult<T> {
    let record = job.record().await;
    let image = job.read_image().await?;
    // the tenant's own change of the format is refused too, and says nothing about the pool
    let is_unchanged = image_status::is_raw_and_bare(&image);
    if let (Some(source), Some(dest_pool), true) = (&record.source_image, &record.dest_pool, is_unchanged) {
        let pool = &source.pool;
        job.context.refusals.note(pool, dest_pool);
        tracing::error!(image_id = %job.id, job_stage = "register", reason,
            capability = format!("profile rbd-read-only pool={pool}"),
            "Glance refused an image that was to be published at once: does its Ceph user lack a capability?");
    }
    Err(StepError::WhenCopied(reason.to_owned()))
}

/// Waits until the image is active. `foreign`: tasks that cannot be ours.
async fn await_active(
    job: &HeldJob,
    known: &[String],
    foreign: &[String],
    pool: &str,
    bytes: u64,
) -> StepResult<Image> {
    let started = Instant::now();
    let (mut pause, mut next) = (POLL_FIRST, POLL_MIN);
    loop {
        tokio::select! {
            () = sleep(pause) => {}
            () = job.cancel.cancelled() => {}
        }
        job.check_cancelled()?;
        (pause, next) = (next, (next * 3 / 2).min(POLL_MAX));
        let image = job.read_image().await?;
        let is_at_work = has_running_task(&image);
        if is_at_work {
            job.progress.step();
        }
        match image.status.as_str() {
            "active" | "deactivated" => return Ok(image),
            "queued" | "importing" if !running_task(&image).is_some_and(|task| foreign.contains(task)) => {}
            _ => return other_writer(),
        }
        if !is_at_work && pause >= POLL_MAX / 2 {
            check_tasks(job, known, pool).await?;
        }
        let reading = if is_at_work { Duration::from_secs(bytes / HASHED_PER_SECOND) } else { Duration::ZERO };
        let limit = ACTIVE_WITHIN + reading;
        if started.elapsed() > limit {
            return Err(StepError::Retry(format!("Glance did not make the image active within {} s", limit.as_secs())));
        }
    }
}

/// Whether a Glance task that is not in `known` failed. Glance then may have removed the RBD image.
async fn check_tasks(job: &HeldJob, known: &[String], pool: &str) -> StepResult<()> {
    let tasks = tasks(job).await?;
    // the tenant's own imports may have failed before
    let is_ours = |task: &&openstack::ImageTask| task.is_of_location() && !known.contains(&task.id);
    let Some(failed) = tasks.iter().filter(is_ours).find(|task| task.status == "failure") else {
        return Ok(());
    };
    let reason = format!("Glance refused the location: {}", failed.message);
    let published = ImageSpec::named(pool, job.id.to_string());
    if job.context.storage.image(&published, None).await?.is_none() {
        job.disown(Artifact::Published).await?;
        job.begin_again().await?;
    }
    job.update(|record| record.registration = Registration::Unposted).await?;
    if job.record().await.publish == Publish::AtOnce {
        return refused_at_once(job, &reason).await;
    }
    Err(StepError::Retry(reason))
}
