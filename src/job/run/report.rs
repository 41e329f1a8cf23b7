//! What the requester is told at an end without an image.

use super::{JobRun, StepError, StepResult};
use crate::job::held::CHANGE_TRIES;
use crate::job::outcome_message::outcome_message;
use crate::job::record::Outcome;
use crate::job::signal::Signal;
use crate::openstack::{self, Image};
use crate::publish::image_status;
use crate::request::{self, TagRequest, Trigger};

impl JobRun {
    /// The job is looked at again when it has ended.
    async fn signal_rerequested(&self) -> StepResult<()> {
        self.job.context.store.signal(self.job.id, |_| vec![Signal::Rerequested]).await?;
        Ok(())
    }

    pub(super) async fn report_outcome(&self, mut image: Image, ending: &Outcome) -> StepResult<()> {
        let record = self.job.record().await;
        if self.job.check_offer(&image).await.is_err() {
            // the service took its offer back, and may be writing the image
            return Ok(());
        }
        // `cancel` is for every request of this image that there was
        let cancelled =
            self.job.context.store.load(self.job.id).await?.is_some_and(|now| now.signals.has(Signal::Cancel));
        if record.trigger == Trigger::Request && !cancelled {
            let is_running = image_status::shows_running_job(&image);
            match request::parse_request_tags(&image.tags) {
                // a new request for another source, which this outcome does not concern
                TagRequest::Source(source) if Some(source) != record.source => {
                    return self.signal_rerequested().await;
                }
                // only a notification spoke of a request: the daemon writes nothing on a record that has none
                TagRequest::Absent if !record.retried && !is_running => return Ok(()),
                _ => {}
            }
        }
        if let (true, Trigger::Request, TagRequest::Source(source)) =
            (cancelled, record.trigger, request::parse_request_tags(&image.tags))
            && record.source != Some(source)
        {
            // `retry` goes by the latest request, and this one is taken off
            self.job
                .update(|record| {
                    record.source = Some(source);
                    record.mismatched.clear();
                })
                .await?;
        }
        let (status, message) = outcome_message(ending.state, &ending.reason, record.request_id);
        let asks = !matches!(request::parse_request_tags(&image.tags), TagRequest::Absent);
        if record.is_reported() && asks && !cancelled && image_status::show(&image, status, 0, &message).is_empty() {
            // told already, which took the tag off: the tenant has asked again since
            return self.signal_rerequested().await;
        }
        self.job.update(|record| record.begin_report(ending)).await?;
        for _ in 0..CHANGE_TRIES {
            let shows = !self.job.is_status_refused();
            let changes = match shows {
                true => image_status::end(&image, status, &message),
                false => image_status::end_without_status(&image).into_iter().collect(),
            };
            match self.job.change_image(&changes).await? {
                Ok(_) => return Ok(()),
                Err(error)
                    if matches!(error.kind(), openstack::ErrorKind::Conflict | openstack::ErrorKind::Forbidden) =>
                {
                    match self.job.context.cloud.image(&self.job.id.to_string()).await? {
                        Some(now) if now.status == "queued" => image = now,
                        _ => return Ok(()),
                    }
                    match error.kind() {
                        openstack::ErrorKind::Forbidden if shows => self.job.note_status_refused(&error),
                        openstack::ErrorKind::Forbidden => return Err(error.into()),
                        _ => {}
                    }
                }
                Err(error) => return Err(error.into()),
            }
        }
        Err(StepError::Retry("the image record changes all the time".into()))
    }
}
