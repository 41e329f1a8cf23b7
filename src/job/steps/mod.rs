//! The steps of a job, one file each: how it is done beside how it is undone.
//!
//! A job is a list of steps, which the plan lays down. The order is data: [`list`]. The runner alone goes through it;
//! no step knows another. Each step may be applied again after a crash at any point, and ends the same. It writes into
//! the record what it is about to make before it makes it.

mod anchor;
mod attempt;
mod clone;
mod compare;
mod detach;
mod detaching;
mod fill;
mod finish;
mod free_name;
mod grace;
mod handover;
mod hash;
mod inspect;
mod purge;
mod readable;
mod register;
mod rename;
mod seal;
mod snapshot;
mod sweep;
mod transfer;
mod untag;
mod verify;

use async_trait::async_trait;

pub(super) use self::attempt::{Attempt, Copying};
pub(super) use self::readable::CopySource;
use super::error::StepResult;
use super::held::HeldJob;
use super::record::{Artifact, Phase, Publish, Record};
use crate::openstack::Image;
use crate::publish::image_status::Status;

#[async_trait]
pub(super) trait Step: Sync {
    /// Name of its stage in records, logs and metrics.
    fn name(&self) -> &'static str;

    /// The part of the job that the step belongs to.
    fn phase(&self) -> Phase;

    /// What it makes in Ceph.
    fn makes(&self) -> Option<Artifact> {
        None
    }

    /// Others can see it: the runner renews the lease right before.
    fn is_visible(&self) -> bool {
        false
    }

    /// What it makes holds the source, which is not free before this step is undone.
    fn holds_source(&self) -> bool {
        false
    }

    /// It is undone before another method of transfer is tried.
    fn depends_on_method(&self) -> bool {
        false
    }

    /// It is applied only when the source is free, and also at an end without an image.
    fn needs_free_source(&self) -> bool {
        false
    }

    /// What the tenant is shown when it begins.
    fn status(&self) -> Option<(Status, &'static str)> {
        None
    }

    /// Whether this job needs it.
    fn is_needed(&self, _attempt: &Attempt, _record: &Record) -> bool {
        true
    }

    /// What must hold before any step is applied: the name that it is going to use is free, for one.
    async fn check(&self, _job: &HeldJob, _attempt: &Attempt) -> StepResult<()> {
        Ok(())
    }

    /// Does the step, or finds it done.
    async fn apply(&self, job: &HeldJob, attempt: &mut Attempt) -> StepResult<()>;

    /// Removes what the record says that the step made or was about to make. `image` is the image record as Glance
    /// answered last, where it was asked and has one.
    async fn undo(&self, _job: &HeldJob, _record: &Record, _image: Option<&Image>) -> StepResult<()> {
        Ok(())
    }
}

/// What the lists are made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum StepName {
    Snapshot,
    Anchor,
    Transfer,
    Verify,
    Inspect,
    Seal,
    Hash,
    /// The steps that hold the source are undone, beside those that follow.
    ReleaseSource,
    Handover,
    Rename,
    Register,
    Finish,
    Clone,
    Fill,
    Detach,
    Grace,
    Sweep,
    Untag,
    Purge,
}

/// The image is made active when the copy is complete. Not every copy needs an anchor.
const WHEN_COPIED: &[StepName] = &[
    StepName::Snapshot,
    StepName::Anchor,
    StepName::Transfer,
    StepName::Verify,
    StepName::Inspect,
    StepName::Seal,
    StepName::Hash,
    StepName::ReleaseSource,
    StepName::Handover,
    StepName::Rename,
    StepName::Register,
    StepName::Finish,
    StepName::Purge,
];

/// The clone of the source is made active, and the copy is made behind it. The source is held until the image depends
/// on it no more.
const AT_ONCE: &[StepName] = &[
    StepName::Snapshot,
    StepName::Anchor,
    StepName::Clone,
    StepName::Inspect,
    StepName::Seal,
    StepName::Handover,
    StepName::Rename,
    StepName::Register,
    StepName::Finish,
    StepName::Fill,
    StepName::Detach,
    StepName::Grace,
    StepName::Sweep,
    StepName::ReleaseSource,
    StepName::Untag,
    StepName::Purge,
];

/// The steps of a job that publishes then.
pub(super) fn list(publish: Publish) -> &'static [StepName] {
    match publish {
        Publish::AtOnce => AT_ONCE,
        Publish::WhenCopied => WHEN_COPIED,
    }
}

/// The step of that name. `None` for [`StepName::ReleaseSource`], which is the runner's.
pub(super) fn step(name: StepName) -> Option<&'static dyn Step> {
    Some(match name {
        StepName::Snapshot => &snapshot::Snapshot,
        StepName::Anchor => &anchor::Anchor,
        StepName::Transfer => &transfer::Transfer,
        StepName::Verify => &verify::Verify,
        StepName::Inspect => &inspect::Inspect,
        StepName::Seal => &seal::Seal,
        StepName::Hash => &hash::Hash,
        StepName::Handover => &handover::Handover,
        StepName::Rename => &rename::Rename,
        StepName::Register => &register::Register,
        StepName::Finish => &finish::Finish,
        StepName::Clone => &clone::CloneStep,
        StepName::Fill => &fill::Fill,
        StepName::Detach => &detach::Detach,
        StepName::Grace => &grace::Grace,
        StepName::Sweep => &sweep::Sweep,
        StepName::Untag => &untag::Untag,
        StepName::Purge => &purge::Purge,
        StepName::ReleaseSource => return None,
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// What a list must be like, whatever its order.
    #[test]
    fn every_list_makes_a_thing_once_and_goes_forward() {
        for names in [WHEN_COPIED, AT_ONCE] {
            let steps: Vec<_> = names.iter().filter_map(|name| step(*name)).collect();
            let made: Vec<Artifact> = steps.iter().filter_map(|step| step.makes()).collect();
            let mut once = made.clone();
            once.dedup();
            assert_eq!(made, once);
            // what waits for a free source comes last in every list
            let ordered = steps.iter().filter(|step| !step.needs_free_source());
            assert!(ordered.is_sorted_by_key(|step| step.phase()));
            let release = names.iter().position(|name| *name == StepName::ReleaseSource).unwrap();
            let holds = |name: &StepName| step(*name).is_some_and(Step::holds_source);
            let needs = |name: &StepName| step(*name).is_some_and(Step::needs_free_source);
            assert!(!names[release..].iter().any(holds) && !names[..release].iter().any(needs));
        }
    }

    /// What `show --json` can have as the name of a stage.
    #[test]
    fn the_schema_of_a_job_lists_every_stage() {
        let steps = WHEN_COPIED.iter().chain(AT_ONCE).filter_map(|name| step(*name));
        let mut stages: BTreeSet<String> = steps.map(|step| step.name().to_owned()).collect();
        // those that are no steps
        for (_, text) in crate::telemetry::sources::all() {
            let others = text.split(".stage(\"").skip(1).filter_map(|rest| rest.split('"').next());
            stages.extend(others.map(str::to_owned));
        }
        let schema = include_str!("../../../docs/reference/schemas/job.json");
        let schema: serde_json::Value = serde_json::from_str(schema).unwrap();
        let listed = schema.pointer("/$defs/stage/properties/name/enum").and_then(|names| names.as_array()).unwrap();
        let listed: BTreeSet<String> = listed.iter().map(|name| name.as_str().unwrap().to_owned()).collect();
        assert_eq!(listed, stages);
    }

    /// An active image cannot be undone. The snapshot and the anchor must stay until the image has no parent.
    #[test]
    fn at_once_nothing_is_made_behind_the_active_image_and_the_source_is_held_to_the_end() {
        let position = |name| AT_ONCE.iter().position(|other| *other == name).unwrap();
        let behind = &AT_ONCE[position(StepName::Finish) + 1..];
        assert!(behind.iter().filter_map(|name| step(*name)).all(|step| step.makes().is_none()));
        assert!(position(StepName::Detach) < position(StepName::Grace));
        assert!(position(StepName::Grace) < position(StepName::ReleaseSource));
    }
}
