//! The state of an attempt that is not in the record. It is lost when the daemon dies; the next owner needs the record
//! alone.

use std::collections::VecDeque;
use std::sync::Arc;

use tokio::time::Instant;

use super::super::error::{StepError, StepResult};
use super::super::slots::PoolSlot;
use super::readable::CopySource;
use crate::ceph::{ImageSpec, TransferLimits};
use crate::config::Config;
use crate::openstack::Image;
use crate::plan::Plan;
use crate::publish::tag::OwnershipTag;
use crate::transfer::{Method, TransferRequest};

pub(in super::super) struct Attempt {
    pub config: Arc<Config>,
    /// When it began.
    pub began: Instant,
    /// Of an attempt that copies.
    pub copying: Option<Copying>,
    /// The image record as Glance answered last, once the copy is complete.
    pub image: Option<Image>,
}

/// An attempt from the plan to a complete copy.
pub(in super::super) struct Copying {
    pub plan: Plan,
    /// The methods that are left, the next one first.
    pub methods: VecDeque<Method>,
    /// Where the bytes are read from.
    pub source: CopySource,
    /// The private name.
    pub copy: ImageSpec,
    pub limits: TransferLimits,
    /// The job's place among those that write to its destination pool.
    pub slot: PoolSlot,
}

impl Copying {
    /// What is to be brought where, with this ownership tag.
    pub fn request(&self, tag: OwnershipTag) -> TransferRequest {
        TransferRequest {
            source: self.source.source.clone(),
            snapshot: self.source.snapshot.clone(),
            anchor: self.source.anchor.clone(),
            destination: self.copy.clone(),
            tag: tag.to_string(),
            limits: self.limits.clone(),
        }
    }
}

impl Attempt {
    pub fn new(config: Arc<Config>) -> Self {
        Self { config, began: Instant::now(), copying: None, image: None }
    }

    pub fn copying(&self) -> StepResult<&Copying> {
        self.copying.as_ref().ok_or_else(|| StepError::Abandon("a step of the copy was run without a plan".into()))
    }

    pub fn copying_mut(&mut self) -> StepResult<&mut Copying> {
        self.copying.as_mut().ok_or_else(|| StepError::Abandon("a step of the copy was run without a plan".into()))
    }

    /// The image record as Glance answered last.
    pub fn image(&self) -> StepResult<&Image> {
        self.image.as_ref().ok_or_else(|| StepError::Abandon("a step was run without the image record".into()))
    }

    /// Whether an earlier attempt has made the image active.
    pub fn is_active(&self) -> bool {
        self.image.as_ref().is_some_and(|image| matches!(image.status.as_str(), "active" | "deactivated"))
    }
}
