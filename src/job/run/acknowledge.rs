//! Reports a job that waits for its turn: once to the requester, and periodically to a client service while this
//! daemon makes progress.

use std::time::Duration;

use jiff::SignedDuration;
use tokio_util::sync::CancellationToken;

use super::{JobRun, StepError, StepResult, TakeOverPurpose};
use crate::config::Config;
use crate::job::record::{HandoverState, Record, State};
use crate::openstack::Image;
use crate::publish::image_status::Status;
use crate::request::{self, TagRequest};

const QUEUED_MESSAGE: &str = "the request waits for its turn";

/// Minimum age of a queued job's last update before another heartbeat, so that only one of several daemons sends it.
const HEARTBEAT_MIN_AGE: SignedDuration = SignedDuration::from_secs(20);

/// How long the plan may take for which a request is acknowledged where several deployments share requests.
const PLAN_LIMIT: Duration = Duration::from_secs(20);

/// Who knows that a job waits for its turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Acknowledged {
    /// The requester. It is told once.
    Requester,
    /// The client service. It gets further heartbeats.
    Service,
    /// Not the client service: it could not be told yet.
    NotYet,
    /// Not the requester: it is told when the plan can be made.
    Later,
}

impl Acknowledged {
    /// What follows from an acknowledgement that failed. `is_shared`: other deployments must learn of the job.
    fn failed(waited_for: bool, is_shared: bool) -> Self {
        match (waited_for, is_shared) {
            (true, _) => Self::NotYet,
            (false, true) => Self::Later,
            (false, false) => Self::Requester,
        }
    }
}

/// Whether it is for this deployment to report a queued job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Answer {
    /// Reported, or there is nothing to say yet.
    Given,
    /// The disk is in the cluster of another deployment.
    Elsewhere,
}

/// Whether an ended job may have a new request: without a status on it another deployment would decline it.
fn may_be_requested_again(config: &Config, record: &Record) -> bool {
    record.state.is_ended() && !config.offload.dry_run && !config.offload.decline_after.is_zero()
}

impl JobRun {
    /// Reports a queued job, and releases it.
    pub async fn acknowledge(mut self, drain: CancellationToken) -> Acknowledged {
        let waited_for = self.has_waiting_service().await;
        if !self.may_report(waited_for).await {
            self.job.release_lease().await;
            return self.acknowledged(waited_for).await;
        }
        let client = match self.connect_client(&drain).await {
            Ok(client) => client,
            Err(stop) => {
                tracing::debug!(image_id = %self.job.id, ?stop, "the request was not acknowledged; its run does that");
                self.job.release_lease().await;
                return Acknowledged::failed(waited_for, self.others_wait_for_report().await);
            }
        };
        let acknowledged = self.acknowledge_as_owner(waited_for, &drain).await;
        // the client is last: its drop closes the connection on another thread
        drop(self);
        drop(client);
        acknowledged
    }

    async fn acknowledge_as_owner(&self, waited_for: bool, drain: &CancellationToken) -> Acknowledged {
        let stopped = async {
            tokio::select! {
                biased;
                () = drain.cancelled() => StepError::Drained,
                stop = self.keep_lease() => stop,
            }
        };
        let told = tokio::select! {
            biased;
            told = self.report_queued(waited_for) => told,
            stop = stopped => Err(stop),
        };
        let is_elsewhere = matches!(told, Ok(Answer::Elsewhere));
        let is_tried_again = told.is_err() && self.others_wait_for_report().await;
        if let Err(stop) = told {
            tracing::debug!(image_id = %self.job.id, ?stop, "the request was not acknowledged; its run does that");
            // a lease that is released with an owner in the record would get that owner fenced
            if self.release_ownership(|_| {}).await.is_err() {
                return Acknowledged::failed(waited_for, is_tried_again);
            }
        }
        self.job.release_lease().await;
        match waited_for {
            false if is_tried_again => Acknowledged::Later,
            true if is_elsewhere => Acknowledged::Requester,
            _ => self.acknowledged(waited_for).await,
        }
    }

    /// Who knows of the job now.
    async fn acknowledged(&self, waited_for: bool) -> Acknowledged {
        match waited_for {
            false => Acknowledged::Requester,
            true if self.job.record().await.acknowledged => Acknowledged::Service,
            true => Acknowledged::NotYet,
        }
    }

    /// Whether another deployment may decline the request as long as this one has not reported it.
    async fn others_wait_for_report(&self) -> bool {
        let config = self.job.context.config.borrow().clone();
        self.shares_requests().await || may_be_requested_again(&config, &self.job.record().await)
    }

    /// Whether there may be something to report: a client is connected only for that.
    async fn may_report(&self, waited_for: bool) -> bool {
        let config = self.job.context.config.borrow().clone();
        let record = self.job.record().await;
        may_be_requested_again(&config, &record) || self.is_unreported(&config, &record, waited_for)
    }

    /// Whether the job waits in the queue, and neither tenant nor service was told.
    fn is_unreported(&self, config: &Config, record: &Record, waited_for: bool) -> bool {
        let waits = match record.state {
            State::Accepted => true,
            // an attempt before this one ended half way
            State::Copying | State::Publishing if record.is_preparing() => waited_for,
            _ => false,
        };
        // another daemon may have told just now
        let silent = || self.job.context.clock.now().duration_since(record.updated_at).abs() >= HEARTBEAT_MIN_AGE;
        let tells = !record.acknowledged || (waited_for && silent());
        !config.offload.dry_run && waits && record.outcome.is_none() && tells
    }

    async fn report_queued(&self, waited_for: bool) -> StepResult<Answer> {
        let config = self.job.context.config.borrow().clone();
        let mut record = self.job.record().await;
        if may_be_requested_again(&config, &record) {
            self.take_over(TakeOverPurpose::Report).await?;
            if self.restart_if_rerequested().await? {
                self.release_ownership(|_| {}).await?;
                record = self.job.record().await;
            }
        }
        if !self.is_unreported(&config, &record, waited_for) {
            return Ok(Answer::Given);
        }
        let offered = |image: &Image| request::parse_offer_tag(&image.tags).is_some();
        let mut dest_pool = record.dest_pool.clone();
        if self.shares_requests().await {
            // only the deployment that has the disk writes a status
            let planned = tokio::time::timeout(PLAN_LIMIT, self.plan(&config)).await;
            match planned.unwrap_or_else(|_| Err(StepError::Retry("the plan took too long".into()))) {
                Ok(plan) => dest_pool = Some(plan.dest_pool),
                Err(StepError::End(_) | StepError::OtherBackend { .. }) => return Ok(Answer::Given),
                Err(stop) => return Err(stop),
            }
        }
        if waited_for {
            let image = self.job.read_image().await?;
            if self.is_offered_elsewhere(&image).await? {
                return Ok(Answer::Elsewhere);
            }
            if image.status == "queued" && !offered(&image) {
                // the service announces its work before it offers it
                return Ok(Answer::Given);
            }
        }
        // so that the next owner knows of this one, if it ends half way
        self.take_over(TakeOverPurpose::Report).await?;
        if dest_pool != record.dest_pool {
            // before the status: this deployment must know it for its own
            self.job.update(|record| record.dest_pool.clone_from(&dest_pool)).await?;
        }
        // it may have been taken back meanwhile
        let image = self.job.read_image().await?;
        let asks = !matches!(request::parse_request_tags(&image.tags), TagRequest::Absent);
        if image.status == "queued" && (asks || offered(&image)) {
            let message = if record.acknowledged {
                format!("{QUEUED_MESSAGE}; {}", self.heartbeat_text())
            } else {
                QUEUED_MESSAGE.to_owned()
            };
            self.job.patch_status(image, Status::Accepted, 0, &message).await?;
        }
        self.release_ownership(|record| record.acknowledged = true).await?;
        Ok(Answer::Given)
    }

    /// Whether a client service waits that has not committed. Without heartbeats it falls back to its native path.
    pub(super) async fn has_waiting_service(&self) -> bool {
        self.job.record().await.handover == Some(HandoverState::Offered)
    }

    /// A heartbeat, which differs from the one before.
    pub(super) fn heartbeat_text(&self) -> String {
        format!("at work at {}", self.job.context.clock.now().strftime("%H:%M:%S UTC"))
    }
}
