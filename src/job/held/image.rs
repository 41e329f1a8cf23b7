//! The image record of a job: read, changed under the lease, and judged.
//!
//! **Status is a courtesy.** A Glance with property protections may forbid it (403): the job then runs without.

use std::sync::atomic::Ordering;

use super::super::error::{StepResult, decline, end, image_gone, other_writer};
use super::super::record::{Artifact, HandoverState, Registration, State};
use super::HeldJob;
use crate::ceph::ImageSpec;
use crate::decline::Decline;
use crate::openstack::{self, Image, ImageChange};
use crate::plan;
use crate::publish;
use crate::publish::image_status::{self, Status};
use crate::publish::tag::is_tagged;
use crate::request::{self, TagRequest, Trigger};

/// How often a change of the image record is tried when the record changes meanwhile.
pub const CHANGE_TRIES: usize = 5;

impl HeldJob {
    pub async fn read_image(&self) -> StepResult<Image> {
        Ok(plan::read_image(self.context.cloud.as_ref(), self.id).await?)
    }

    /// Changes the image's record. No fence keeps a former owner out of Glance, so the lease is renewed right before.
    pub async fn change_image(&self, changes: &[ImageChange]) -> StepResult<openstack::Result<Option<Image>>> {
        self.renew_lease().await?;
        Ok(self.context.cloud.update_image(&self.id.to_string(), changes).await)
    }

    /// Shows status and message on the image record, and returns the record then.
    pub async fn patch_status(&self, image: Image, status: Status, percent: u8, message: &str) -> StepResult<Image> {
        if self.is_status_refused() {
            return self.read_image().await;
        }
        self.check_offer(&image).await?;
        let changes = image_status::show(&image, status, percent, message);
        match self.change_image(&changes).await? {
            Ok(Some(image)) if image.status == "queued" => Ok(image),
            Ok(Some(_)) => other_writer(),
            Ok(None) => image_gone(),
            // the record changed since it was read: what it is now tells the caller whether to go on
            Err(error) if error.kind() == openstack::ErrorKind::Conflict => self.read_image().await,
            Err(error) if error.kind() == openstack::ErrorKind::Forbidden => {
                self.note_status_refused(&error);
                self.read_image().await
            }
            Err(error) => Err(error.into()),
        }
    }

    pub fn is_status_refused(&self) -> bool {
        self.status_refused.load(Ordering::Relaxed)
    }

    /// Status is neither written nor removed any more in this run.
    pub fn note_status_refused(&self, error: &openstack::Error) {
        self.status_refused.store(true, Ordering::Relaxed);
        tracing::warn!(image_id = %self.id, %error, "Glance refuses the status of the job; the job goes on without");
    }

    /// Fails if the client service has not committed and its offer is gone. It may be writing the image itself then, so
    /// the daemon must not change the record.
    pub async fn check_offer(&self, image: &Image) -> StepResult<()> {
        if self.record().await.handover == Some(HandoverState::Offered) && !request::has_commit_tag(&image.tags) {
            plan::read_offer(image)?;
        }
        Ok(())
    }

    /// Whether the record asks for this job as it did when the plan was made. It is asked when the record is read
    /// during the copy, before the copy takes its name, and last right before the location is posted
    /// (`docs/explanation/jobs.md`).
    pub async fn check_request(&self, image: &Image) -> StepResult<()> {
        let record = self.record().await;
        let Some(source) = record.source else { return Ok(()) };
        if record.project_id != image.owner {
            // the same sentence as for a source that was another project's from the beginning
            return Ok(plan::no_such_source(source)?);
        }
        if record.trigger != Trigger::Request {
            return self.check_offer(image).await;
        }
        match request::parse_request_tags(&image.tags) {
            TagRequest::Source(asked) if asked == source => Ok(()),
            TagRequest::Source(_) => {
                end(State::Cancelled, "the request tag was changed: the new one is a request of its own")
            }
            TagRequest::Invalid(reason) => decline(Decline::Request, reason),
            // `retry` needs no tag
            TagRequest::Absent if record.retried => Ok(()),
            TagRequest::Absent => end(State::Cancelled, "the request tag was taken off"),
        }
    }

    /// Whether this job's location made the image active. The RBD image of its name must have our ownership tag and be
    /// the location: with a second store, another client's upload or import may have been faster. If Glance does not
    /// show locations to the daemon, the size is compared. Once the tag is being removed, the job's record decides.
    pub async fn is_our_image(&self, image: &Image) -> StepResult<bool> {
        let record = self.record().await;
        let is_active = record.registration == Registration::Active;
        if !record.has(Artifact::Published) || is_active {
            return Ok(is_active);
        }
        let Some(pool) = &record.dest_pool else { return Ok(false) };
        let (storage, id) = (self.context.storage.as_ref(), self.id.to_string());
        if !is_tagged(storage, &ImageSpec::named(pool, &id), &self.tag().await).await? {
            return Ok(false);
        }
        let ours = publish::location(&storage.fsid().await?, pool, &id);
        Ok(match self.context.cloud.image_locations(&id).await? {
            Some(locations) => locations.iter().any(|url| publish::is_location(url, &ours)),
            None => image.size == Some(record.bytes_total),
        })
    }
}

/// The Glance task that works on the image.
pub fn running_task(image: &Image) -> Option<&String> {
    image.properties.get("os_glance_import_task")
}

/// Whether a Glance task works on the image.
pub fn has_running_task(image: &Image) -> bool {
    image.status == "importing" || running_task(image).is_some()
}
