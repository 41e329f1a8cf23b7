//! What the tenant sees of a job on the image record, while it runs and at an end without an image.

use jiff::SignedDuration;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::publishing::RECORD_TRIES;
use super::{Job, Step, Stop, decline, end, image_gone, other_writer};
use crate::decline::Decline;
use crate::job::record::{Ending, Handover, State};
use crate::openstack::{self, Image};
use crate::plan;
use crate::publish::record::{self as image_record, Status};
use crate::request::{self, Asked, Trigger};

const TURN: &str = "the request waits for its turn";

/// How long nobody must have touched a job that waits, before another sign of life is given: of several daemons that
/// want to give one, the first does.
const SILENCE: SignedDuration = SignedDuration::from_secs(20);

/// Who was told that a job waits for its turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Told {
    /// The tenant, for whom once is enough.
    Tenant,
    /// A service that handed its work over.
    Service,
    /// Nobody yet: a service that cannot be told now.
    Nobody,
}

impl Job {
    /// Tells whoever waits for a job that waits for its turn: once that the request is known, and a service that handed
    /// its work over from time to time that its turn will come, as long as the daemon moves.
    pub async fn acknowledge(mut self, drain: CancellationToken) -> Told {
        let waited_for = self.is_waited_for().await;
        let client = match self.take_client(&drain).await {
            Ok(client) => client,
            Err(stop) => {
                tracing::debug!(image_id = %self.id, ?stop, "the request was not acknowledged; its run tells");
                self.lease.release(self.context.store.objects().as_ref()).await;
                return if waited_for { Told::Nobody } else { Told::Tenant };
            }
        };
        let stopped = async {
            tokio::select! {
                biased;
                () = drain.cancelled() => Stop::Drained,
                stop = self.keep_lease() => stop,
            }
        };
        let told = tokio::select! {
            biased;
            told = self.tell_turn(waited_for) => told,
            stop = stopped => Err(stop),
        };
        if let Err(stop) = told {
            tracing::debug!(image_id = %self.id, ?stop, "the request was not acknowledged; its run tells");
            // a lease that is given back with an owner in the record would get that owner fenced
            if self.let_go(|_| {}).await.is_err() {
                return if waited_for { Told::Nobody } else { Told::Tenant };
            }
        }
        self.lease.release(self.context.store.objects().as_ref()).await;
        client.give_back();
        match waited_for {
            false => Told::Tenant,
            true if self.snapshot().await.acknowledged => Told::Service,
            true => Told::Nobody,
        }
    }

    async fn tell_turn(&self, waited_for: bool) -> Step<()> {
        let record = self.snapshot().await;
        let dry_run = self.context.config.borrow().offload.dry_run;
        let waits = match record.state {
            State::Accepted => true,
            // an attempt before this one ended half way
            State::Copying => waited_for,
            _ => false,
        };
        // another daemon may have told just now
        let silent = || self.context.clock.now().duration_since(record.updated_at).abs() >= SILENCE;
        let tells = !record.acknowledged || (waited_for && silent());
        if dry_run || !waits || record.ending.is_some() || !tells {
            return Ok(());
        }
        let offered = |image: &Image| request::offered_by(&image.tags).is_some();
        if waited_for {
            let image = self.read_image().await?;
            if image.status == "queued" && !offered(&image) {
                // the service announces its work before it offers it
                return Ok(());
            }
        }
        // so that whoever comes next knows of us, if this ends half way
        self.take_over().await?;
        // it may have been taken back meanwhile
        let image = self.read_image().await?;
        let asks = !matches!(request::asked_by(&image.tags), Asked::Nothing);
        if image.status == "queued" && (asks || offered(&image)) {
            let message = if record.acknowledged { format!("{TURN}; {}", self.at_work()) } else { TURN.to_owned() };
            self.patch_status(image, Status::Accepted, 0, &message).await?;
        }
        self.let_go(|record| record.acknowledged = true).await
    }

    /// Whether a service waits that may do the work itself at any moment, and does when nothing moves.
    pub(super) async fn is_waited_for(&self) -> bool {
        self.snapshot().await.handover == Some(Handover::Offered)
    }

    /// A sign of life, which differs from the one before.
    pub(super) fn at_work(&self) -> String {
        format!("at work at {}", self.context.clock.now().strftime("%H:%M:%S UTC"))
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

    /// Whether the record asks for this job as it did when the plan was made. It is asked when the record is read during
    /// the copy, before the copy takes its name, and last right before the location is posted (`docs/jobs.md`).
    pub(super) async fn check_request(&self, image: &Image) -> Step<()> {
        let record = self.snapshot().await;
        let Some(source) = record.source else { return Ok(()) };
        if record.project_id != image.owner {
            // the same sentence as for a source that was another project's from the beginning
            return Ok(plan::no_such_source(source)?);
        }
        if record.trigger != Trigger::Request {
            return self.check_offer(image).await;
        }
        match request::asked_by(&image.tags) {
            Asked::For(asked) if asked == source => Ok(()),
            Asked::For(_) => end(State::Cancelled, "the request tag was changed: the new one is a request of its own"),
            Asked::Unclear(reason) => decline(Decline::Request, reason),
            // `retry` needs no tag
            Asked::Nothing if record.retried => Ok(()),
            Asked::Nothing => end(State::Cancelled, "the request tag was taken off"),
        }
    }

    pub(super) async fn tell_end(&self, mut image: Image, ending: &Ending) -> Step<()> {
        let record = self.snapshot().await;
        if self.check_offer(&image).await.is_err() {
            // nobody waits for a word, and somebody else may be writing the image
            return Ok(());
        }
        // `cancel` is for every request of this image that there was
        let cancelled = self.context.store.load(self.id).await?.is_some_and(|now| now.record.cancel);
        if record.trigger == Trigger::Request && !cancelled {
            match request::asked_by(&image.tags) {
                // not what this job was for, so its end is not that request's
                Asked::For(source) if Some(source) != record.source => {
                    return self.update(|record| record.again = true).await;
                }
                // a notification said so, and the record does not: it is not the daemon's to write on
                Asked::Nothing if !record.retried && !image_record::shows_work(&image) => return Ok(()),
                _ => {}
            }
        }
        if let (true, Trigger::Request, Asked::For(source)) =
            (cancelled, record.trigger, request::asked_by(&image.tags))
            && record.source != Some(source)
        {
            // `retry` goes by the latest request, and this one is taken off
            self.update(|record| {
                record.source = Some(source);
                record.mismatched.clear();
            })
            .await?;
        }
        let (status, message) = last_word(ending.state, &ending.reason, record.request_id);
        let asks = !matches!(request::asked_by(&image.tags), Asked::Nothing);
        if record.told && asks && !cancelled && image_record::show(&image, status, 0, &message).is_empty() {
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
