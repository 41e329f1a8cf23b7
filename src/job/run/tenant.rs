//! What the tenant sees of a job on the image record, while it runs and at an end without an image.

use uuid::Uuid;

use super::publishing::RECORD_TRIES;
use super::{Job, Step, Stop, image_gone, other_writer};
use crate::job::record::{Ending, State};
use crate::openstack::{self, Image};
use crate::publish::record::{self as image_record, Status};
use crate::request::{self, Asked};

impl Job {
    /// Tells the tenant that the request is known, while it waits for its turn.
    pub async fn acknowledge(self) {
        let work = async {
            let record = self.snapshot().await;
            let observe = self.context.config.borrow().offload.observe;
            if observe || record.acknowledged || record.state != State::Accepted || record.ending.is_some() {
                return Ok(());
            }
            // so that whoever comes next knows of us, if this ends half way
            self.take_over().await?;
            let image = self.read_image().await?;
            let asks = !matches!(request::asked_by(&image.tags), Asked::Nothing);
            if image.status == "queued" && (asks || request::offered_by(&image.tags).is_some()) {
                self.patch_status(image, Status::Accepted, 0, "the request waits for its turn").await?;
            }
            self.let_go(|record| record.acknowledged = true).await
        };
        if let Err(stop) = work.await {
            tracing::debug!(image_id = %self.id, ?stop, "the request was not acknowledged; its run tells");
            // a lease that is given back with an owner in the record would get that owner fenced
            if self.let_go(|_| {}).await.is_err() {
                return;
            }
        }
        self.lease.release(self.context.store.objects().as_ref()).await;
    }

    /// Shows status and message on the record, and lets the watcher go on from there.
    pub(super) async fn show(&self, image: Image, status: Status, message: &str) -> Step<()> {
        self.check_cancelled()?;
        let mut tenant = self.tenant.lock().await;
        *tenant = Some(self.patch_status(image, status, 0, message).await?);
        Ok(())
    }

    /// Like [`show`](Self::show), where a failure is no reason to stop.
    pub(super) async fn show_again(&self, status: Status, message: &str) {
        // whoever waits takes it for the word that everything is prepared
        if self.snapshot().await.handover.is_some() {
            return;
        }
        let Some(image) = self.tenant.lock().await.take() else { return };
        if let Err(stop) = self.patch_status(image, status, 95, message).await {
            tracing::debug!(image_id = %self.id, ?stop, "the status was not shown");
        }
    }

    pub(super) async fn patch_status(&self, image: Image, status: Status, percent: u8, message: &str) -> Step<Image> {
        self.check_offer(&image).await?;
        let changes = image_record::show(&image, status, percent, message);
        match self.change_image(&changes).await? {
            Ok(Some(image)) if image.status == "queued" => Ok(image),
            Ok(Some(_)) => other_writer(),
            Ok(None) => image_gone(),
            // the record changed since it was read; the next look tells
            Err(error) if error.kind() == openstack::ErrorKind::Conflict => Ok(image),
            Err(error) => Err(error.into()),
        }
    }

    pub(super) async fn tell_end(&self, mut image: Image, ending: &Ending) -> Step<()> {
        let record = self.snapshot().await;
        if self.check_offer(&image).await.is_err() {
            // nobody waits for a word, and somebody else may be writing the image
            return Ok(());
        }
        let (status, message) = last_word(ending.state, &ending.reason, record.request_id);
        let asks = !matches!(request::asked_by(&image.tags), Asked::Nothing);
        if record.told && asks && image_record::show(&image, status, 0, &message).is_empty() {
            // told already, which took the tag off: the tenant has asked again since
            return self.update(|record| record.again = true).await;
        }
        self.update(|record| record.told = true).await?;
        for _ in 0..RECORD_TRIES {
            match self.change_image(&image_record::end(&image, status, &message)).await? {
                Ok(_) => return Ok(()),
                Err(error)
                    if matches!(error.kind(), openstack::ErrorKind::Conflict | openstack::ErrorKind::Forbidden) =>
                {
                    match self.context.cloud.image(&self.id.to_string()).await? {
                        Some(now) if now.status == "queued" => image = now,
                        _ => return Ok(()),
                    }
                    if error.kind() == openstack::ErrorKind::Forbidden {
                        return Err(error.into());
                    }
                }
                Err(error) => return Err(error.into()),
            }
        }
        Err(Stop::Retry("the image record changes all the time".into()))
    }
}

/// What the tenant is told at an end without an image.
pub(in crate::job) fn last_word(state: State, reason: &str, request: Uuid) -> (Status, String) {
    match state {
        State::Declined => (Status::Declined, reason.to_owned()),
        State::Cancelled => (Status::Failed, format!("{reason}; set the request tag to ask again")),
        // what broke inside is for the operator
        _ => (
            Status::Failed,
            format!(
                "the copy could not be made; set the request tag to ask again, or tell your operator the request id {request}"
            ),
        ),
    }
}
