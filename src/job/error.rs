//! Why a job's attempt did not go on.

use std::time::Duration;

use super::record::{Outcome, State};
use super::store;
use crate::ceph::{self, ErrorKind};
use crate::decline::Decline;
use crate::openstack;
use crate::plan::PlanError;

/// Why a step, or what leads to the steps, did not go on.
#[derive(Debug)]
pub(super) enum StepError {
    /// The job ends without an image.
    End(Outcome),
    /// A transient error: the job is retried.
    Retry(String),
    /// Nothing is wrong, and the next step is due after this time.
    Later(Duration),
    /// The image cannot be published at once, for this reason: the job is done again, and publishes when copied.
    WhenCopied(String),
    /// This method of transfer cannot do the source, or it made a copy that differs. The error is the former's.
    NextMethod(Option<ceph::Error>),
    /// As many jobs as may run into this pool do.
    NoRoom {
        pool: String,
    },
    /// This daemon is not configured for the source's backend.
    OtherBackend {
        backend: String,
        reason: String,
    },
    /// Calls of other jobs hang in a pool that this job needs.
    PoolClosed(String),
    /// Stopped from outside; the watcher knows why.
    Interrupted,
    LeaseLost,
    /// The daemon stops.
    Drained,
    /// The record cannot be worked on.
    Abandon(String),
}

pub(super) type StepResult<T> = Result<T, StepError>;

pub(super) fn end<T>(state: State, reason: impl Into<String>) -> StepResult<T> {
    Err(StepError::End(Outcome::new(state, reason)))
}

pub(super) fn decline<T>(why: Decline, reason: impl Into<String>) -> StepResult<T> {
    Err(StepError::End(Outcome::declined(why, reason)))
}

/// The same sentence for the tenant, the record and the log.
pub(super) fn other_writer<T>() -> StepResult<T> {
    decline(Decline::OtherWriter, "another client has written the image meanwhile")
}

pub(super) fn image_gone<T>() -> StepResult<T> {
    end(State::Cancelled, "the image was deleted")
}

/// A call on the store of jobs, on Ceph or on a service failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum CallError {
    #[error(transparent)]
    Store(#[from] store::Error),
    #[error(transparent)]
    Ceph(#[from] ceph::Error),
    #[error(transparent)]
    OpenStack(#[from] openstack::Error),
}

impl From<ceph::Error> for StepError {
    fn from(error: ceph::Error) -> Self {
        match error.kind() {
            ErrorKind::NotLocked | ErrorKind::Fenced => Self::LeaseLost,
            ErrorKind::Cancelled => Self::Interrupted,
            ErrorKind::PoolClosed => Self::PoolClosed(error.to_string()),
            ErrorKind::NoSpace
            | ErrorKind::PermissionDenied
            | ErrorKind::Unsupported
            | ErrorKind::TooLarge
            | ErrorKind::SnapshotLimit
            | ErrorKind::Exists => Self::End(Outcome::new(State::Failed, error.to_string())),
            ErrorKind::NotFound
            | ErrorKind::Busy
            | ErrorKind::Conflict
            | ErrorKind::TimedOut
            | ErrorKind::ReadOnly
            | ErrorKind::Other => Self::Retry(error.to_string()),
        }
    }
}

impl From<openstack::Error> for StepError {
    fn from(error: openstack::Error) -> Self {
        use openstack::ErrorKind as Kind;
        match error.kind() {
            Kind::Unauthorized
            | Kind::Misconfigured
            | Kind::Unavailable
            | Kind::Protocol
            | Kind::TooLarge
            | Kind::Conflict => Self::Retry(error.to_string()),
            Kind::Forbidden | Kind::OverLimit | Kind::Refused | Kind::NoService => {
                Self::End(Outcome::new(State::Failed, error.to_string()))
            }
        }
    }
}

impl From<store::Error> for StepError {
    fn from(error: store::Error) -> Self {
        match error {
            store::Error::Ceph(error) => error.into(),
            store::Error::Contended(_) => Self::Retry(error.to_string()),
            store::Error::TooLarge { .. } => Self::End(Outcome::new(State::Failed, error.to_string())),
            store::Error::Unreadable { .. } | store::Error::Illegal(_) => Self::Abandon(error.to_string()),
        }
    }
}

impl From<PlanError> for StepError {
    fn from(none: PlanError) -> Self {
        match none {
            PlanError::Declined(why, reason) => Self::End(Outcome::declined(why, reason)),
            PlanError::OtherBackend { backend, reason } => Self::OtherBackend { backend, reason },
            PlanError::Gone => Self::End(Outcome::new(State::Cancelled, none.to_string())),
            PlanError::Ceph(error) => error.into(),
            PlanError::OpenStack(error) => error.into(),
        }
    }
}
