//! Waits until the service that handed its work over commits: it may do the work itself until then.
//! `docs/explanation/handover.md` is the protocol.

use std::sync::atomic::Ordering;
use std::time::Duration;

use async_trait::async_trait;
use tokio::time::{Instant, sleep};

use super::super::error::{StepError, StepResult, decline, other_writer};
use super::super::held::HeldJob;
use super::super::record::{HandoverState, Phase, Record};
use super::{Attempt, Step};
use crate::decline::Decline;
use crate::openstack::Image;
use crate::publish::image_status::{self, Status};
use crate::request;

/// How long the client service may take to commit. It polls the image record every 0.5 to 5 s.
const COMMIT_WITHIN: Duration = Duration::from_secs(120);

/// Pause between polls of the image record.
const POLL_INTERVAL: Duration = Duration::from_millis(200);

/// What the image record says while the daemon waits for the service.
const PREPARED: &str = "the copy is complete and waits for the service that asked for it";

pub struct Handover;

#[async_trait]
impl Step for Handover {
    fn name(&self) -> &'static str {
        "handover"
    }

    fn phase(&self) -> Phase {
        Phase::Publish
    }

    fn is_needed(&self, attempt: &Attempt, record: &Record) -> bool {
        record.handover == Some(HandoverState::Offered) && !attempt.is_active()
    }

    async fn apply(&self, job: &HeldJob, attempt: &mut Attempt) -> StepResult<()> {
        job.waits.store(true, Ordering::SeqCst);
        attempt.image = Some(await_go(job, attempt.image()?.clone()).await?);
        job.waits.store(false, Ordering::SeqCst);
        Ok(())
    }
}

/// Reports `publishing` and waits for the *go* tag. The commit is stored before the daemon acts on it, so a daemon that
/// takes over does not wait for *go* again.
async fn await_go(job: &HeldJob, mut image: Image) -> StepResult<Image> {
    let started = Instant::now();
    loop {
        if image.status != "queued" {
            return other_writer();
        }
        if request::has_commit_tag(&image.tags) {
            job.update(|record| record.handover = Some(HandoverState::Committed)).await?;
            tracing::info!(image_id = %job.id, job_stage = "handover", "the client service committed");
            return Ok(image);
        }
        if job.cancel.is_cancelled() {
            return Err(StepError::Interrupted);
        }
        job.check_offer(&image).await?;
        if started.elapsed() > COMMIT_WITHIN {
            return decline(Decline::Handover, "the service that handed this over does not answer");
        }
        let told = image_status::show(&image, Status::Publishing, 95, PREPARED).is_empty();
        image = if told {
            job.read_image().await?
        } else {
            job.patch_status(image, Status::Publishing, 95, PREPARED).await?
        };
        if !request::has_commit_tag(&image.tags) {
            sleep(POLL_INTERVAL).await;
        }
    }
}
