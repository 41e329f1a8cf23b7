//! The daemon's side of a hand-over: a service of the cloud waits for the image, and may do the work itself until it
//! said go. `docs/handover.md` is the protocol.

use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::{Job, Step, Stop, decline, other_writer};
use crate::decline::Decline;
use crate::job::record::Handover;
use crate::openstack::Image;
use crate::plan;
use crate::publish::record::{self as image_record, Status};
use crate::request;

/// How long the service that waits may take to say go. It looks twice a second.
const GO_WITHIN: Duration = Duration::from_secs(120);

/// Pause between looks at the image record.
const LOOK_INTERVAL: Duration = Duration::from_millis(200);

/// What the image record says while the service is waited for.
const PREPARED: &str = "the copy is complete and waits for the service that asked for it";

impl Job {
    /// While the service may take its offer back, nothing is written on a record that has none: it may be writing the
    /// image itself.
    pub(super) async fn check_offer(&self, image: &Image) -> Step<()> {
        if self.snapshot().await.handover == Some(Handover::Offered) && !request::said_go(&image.tags) {
            plan::read_offer(image)?;
        }
        Ok(())
    }

    /// Shows that everything is prepared, and waits for the word. It is stored before anything is done upon it, so that
    /// nobody who goes on with the job asks again.
    pub(super) async fn await_go(&self, mut image: Image) -> Step<Image> {
        let started = Instant::now();
        loop {
            if image.status != "queued" {
                return other_writer();
            }
            if request::said_go(&image.tags) {
                self.update(|record| record.handover = Some(Handover::Committed)).await?;
                tracing::info!(image_id = %self.id, job_stage = "handover", "the service that waits said go");
                return Ok(image);
            }
            if self.cancel.is_cancelled() {
                return Err(Stop::Interrupted);
            }
            self.check_offer(&image).await?;
            if started.elapsed() > GO_WITHIN {
                return decline(Decline::Handover, "the service that handed this over does not answer");
            }
            let told = image_record::show(&image, Status::Publishing, 95, PREPARED).is_empty();
            image = if told {
                sleep(LOOK_INTERVAL).await;
                self.read_image().await?
            } else {
                self.patch_status(image, Status::Publishing, 95, PREPARED).await?
            };
        }
    }
}
