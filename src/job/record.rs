//! The record of a job, as it lies in RADOS: versioned JSON, and the legal ways from state to state.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::names::private_name;
use super::old_record;
use crate::ceph::{FillState, ImageInfo, ImageSpec};
use crate::decline::Decline;
use crate::request::{Source, Trigger};
use crate::transfer::Method;

/// Version of the record's format that this program writes. A record of a newer one is left alone.
pub const VERSION: u32 = 2;

/// Version of a record whose image is published at once. A daemon that knows only format 2 would end such a job while
/// the image still depends on its source, so it has to leave the record alone.
pub const AT_ONCE_VERSION: u32 = 3;

/// Where a job stands. The record's other fields tell how far it got inside the state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Stored, the delivery acked; nothing was checked or made.
    Accepted,
    /// Planned; the source's snapshot and the private copy are being made.
    Copying,
    /// The private copy is complete and was inspected; it takes its final name and is registered. A job that publishes
    /// at once is in this state from its plan on, and its copy is a clone.
    Publishing,
    /// Published at once: the image is active, and depends on its source until its copy is complete. There is no undo:
    /// the job only goes forward.
    Detaching,
    /// The image is active and whole. The end.
    Done,
    /// This cloud cannot serve the request, and a retry would not change that. The end, until it is requested again.
    Declined,
    /// A transient error lasted too long, or the job met a fault. The end, until it is requested again or retried.
    Failed,
    /// The image was deleted, or the operator stopped the job. The end.
    Cancelled,
}

impl State {
    pub const ALL: [State; 8] = [
        State::Accepted,
        State::Copying,
        State::Publishing,
        State::Detaching,
        State::Done,
        State::Declined,
        State::Failed,
        State::Cancelled,
    ];

    pub fn is_ended(self) -> bool {
        matches!(self, Self::Done | Self::Declined | Self::Failed | Self::Cancelled)
    }

    /// The legal transitions; `docs/explanation/jobs.md` draws them.
    pub fn may_become(self, next: State) -> bool {
        use State::*;
        match (self, next) {
            // to Publishing: at once
            (Accepted, Copying | Publishing | Declined | Failed | Cancelled) => true,
            // back to Accepted: the plan no longer holds and is made again
            (Copying, Publishing | Accepted | Declined | Failed | Cancelled) => true,
            // back to Copying: Glance removed the copy after a failed task, or it was lost. Back to Accepted: the plan
            // of a job that publishes at once no longer holds
            (Publishing, Done | Copying | Accepted | Detaching | Declined | Failed | Cancelled) => true,
            // Failed: it was deactivated, and is detached all the same. Cancelled: the image was deleted
            (Detaching, Done | Failed | Cancelled) => true,
            // a new request, or `retry`
            (Declined | Failed | Cancelled, Accepted) => true,
            // a new request for an image that is queued again cannot follow `done`: Glance never goes back
            (_, _) => false,
        }
    }

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Accepted => "accepted",
            Self::Copying => "copying",
            Self::Publishing => "publishing",
            Self::Detaching => "detaching",
            Self::Done => "done",
            Self::Declined => "declined",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The parts of a job's list of steps. Each begins with what the record says, whatever was done before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// Makes the private copy. Interrupted, it is undone and planned again.
    Prepare,
    /// Makes the image active by the copy.
    Publish,
    /// Makes an active image independent of its source.
    Detach,
}

/// When the image becomes active.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Publish {
    /// When its copy is complete.
    #[default]
    WhenCopied,
    /// When its clone is made.
    AtOnce,
}

/// When an image became independent of its source, by the clock of one daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Detached {
    pub at: Timestamp,
    /// Instance of the daemon. Another one has another clock.
    pub by: Uuid,
}

/// An end without an image. It is stored before anything is removed, so that every daemon ends the job the same way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome {
    /// `declined`, `failed` or `cancelled`.
    pub state: State,
    /// A sentence that a person can act on.
    pub reason: String,
    /// Why it was declined, to be counted; `None` for the other states.
    #[serde(default)]
    pub decline: Option<Decline>,
    #[serde(default)]
    pub report: Reporting,
}

/// How far the requester was told of an outcome.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Reporting {
    #[default]
    Due,
    /// Reporting has started: a request tag that is found on the image from now on may belong to a new request.
    Begun,
}

impl Outcome {
    /// An end that is no decline.
    pub fn new(state: State, reason: impl Into<String>) -> Self {
        Self { state, reason: reason.into(), decline: None, report: Reporting::Due }
    }

    pub fn declined(why: Decline, reason: impl Into<String>) -> Self {
        Self { decline: Some(why), ..Self::new(State::Declined, reason) }
    }

    /// Another deployment deals with the request, which cannot be done here for this reason.
    pub fn elsewhere(reason: &str) -> Self {
        Self::declined(Decline::Elsewhere, format!("left to another deployment: {reason}"))
    }
}

/// How long a stage of the latest attempt took.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Stage {
    pub name: String,
    pub started_at: Timestamp,
    /// `None` while it runs.
    pub seconds: Option<f64>,
}

/// Where the copied bytes are taken from, found out by the plan.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceImage {
    pub pool: String,
    /// Internal id of the RBD image, under which it is found in the trash too.
    pub image_id: String,
    /// Name that it had, for people.
    pub image: String,
    pub snapshot: String,
    /// The snapshot is the job's own, and goes with it.
    pub temporary: bool,
}

/// What the image record gets when the copy is published, found out by the plan.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Publication {
    /// GiB.
    pub min_disk: u64,
    /// MiB.
    pub min_ram: u64,
    pub properties: BTreeMap<String, String>,
    /// SHA-512 of the bytes in hexadecimal, where `[offload] hash` asks for it.
    pub sha512: Option<String>,
}

/// Something that a job makes in Ceph. It is in the record **before** it is made: what is not named there is not the
/// job's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Artifact {
    /// The temporary snapshot of the source.
    Snapshot,
    /// `rbd-offload.<image id>.anchor` in the source's pool.
    Anchor,
    /// `rbd-offload.<image id>` in the destination pool.
    Copy,
    /// `<image id>` in the destination pool, by renaming the copy.
    Published,
}

/// The clone that is published at once. Whatever happens to its name, it is found by its id.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CloneImage {
    /// Internal id of the RBD image.
    pub id: String,
    /// Data objects of its size.
    pub objects: u64,
    /// Pool of its data, where that is not its own pool.
    pub data_pool: Option<String>,
}

impl CloneImage {
    pub fn of(info: ImageInfo) -> Self {
        // whole stripes, so that no object is left out
        let stripe = info.object_size.saturating_mul(info.stripe_count).max(1);
        let objects = info.size.div_ceil(stripe).saturating_mul(info.stripe_count);
        Self { id: info.id, objects, data_pool: info.data_pool }
    }
}

/// How far Glance knows the image's location.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Registration {
    /// This job posted nothing: a Glance task at work on the image is another writer's.
    #[default]
    Unposted,
    /// The location was posted, or is about to be: a Glance task at work on the image may be the job's.
    Posted,
    /// Glance has made the image active by the location. The ownership tag is coming off.
    Active,
}

/// How far a service that handed its work over, and waits for the image, has bound itself
/// (`docs/explanation/handover.md`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HandoverState {
    /// It may still do the work itself at any moment: nothing is published.
    Offered,
    /// It committed: the daemon publishes, or reports that it will not.
    Committed,
}

/// A job, whole.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    pub version: u32,
    pub image_id: Uuid,
    /// A new one for each request. It follows the request through the logs, and marks what the job makes.
    pub request_id: Uuid,
    /// `None` while no request could be read from the image's tags.
    pub source: Option<Source>,
    pub trigger: Trigger,
    /// Owner of the image; until the plan has read it, what the notification said.
    pub project_id: Option<String>,
    pub state: State,
    pub method: Option<Method>,
    /// Why `method` is not the one that was to be taken.
    #[serde(default)]
    pub fallback: Option<String>,
    /// Per cent.
    pub progress: u8,
    pub bytes_total: u64,
    pub bytes_done: u64,
    /// Attempts that failed with a transient error.
    pub attempts: u32,
    pub created_at: Timestamp,
    pub updated_at: Timestamp,
    pub ended_at: Option<Timestamp>,
    /// The daemon that works on it: `host:pid:instance`.
    pub owner: Option<String>,
    /// Why it was declined, failed or was cancelled. While it waits: the error of the last attempt.
    pub reason: Option<String>,
    #[serde(default)]
    pub stages: Vec<Stage>,

    /// Address of the owner's Ceph client, which the next owner fences before it goes on.
    #[serde(default)]
    pub owner_address: Option<String>,
    #[serde(default)]
    pub source_image: Option<SourceImage>,
    #[serde(default)]
    pub dest_pool: Option<String>,
    #[serde(default)]
    pub publication: Publication,
    #[serde(default)]
    pub artifacts: BTreeSet<Artifact>,
    #[serde(default)]
    pub registration: Registration,
    /// Methods whose copy differed from its source. None of them is used again for this job, `retry` included, and each
    /// later copy is compared in full.
    #[serde(default)]
    pub mismatched: Vec<Method>,
    #[serde(default)]
    pub outcome: Option<Outcome>,
    /// `None`: no client service waits that could do the work instead.
    #[serde(default)]
    pub handover: Option<HandoverState>,
    /// No attempt before this time.
    #[serde(default)]
    pub not_before: Option<Timestamp>,
    /// Started by `retry`: needs no tag.
    #[serde(default)]
    pub retried: bool,
    /// The image had a job before this one, which ended.
    #[serde(default)]
    pub restarted: bool,
    /// The tenant was told that the request was accepted.
    #[serde(default)]
    pub acknowledged: bool,
    /// The image's properties may be stale: an owner was fenced, or another client wrote the image. The reconciler
    /// repairs them, after the job has ended too.
    #[serde(default)]
    pub needs_repair: bool,
    /// The image was deactivated, since it became active under another format than the inspected one. It stays so.
    #[serde(default)]
    pub deactivated: bool,
    /// The backend of the source, which the daemon that tried last is not configured for.
    #[serde(default)]
    pub needs_backend: Option<String>,
    /// There never was a job: the reconciler made this record to be the owner of leftovers without one, and removes it.
    #[serde(default)]
    pub placeholder: bool,
    /// Owners in a row that neither released the job nor took it further.
    #[serde(default)]
    pub takeovers: u32,
    /// The furthest that `progress` was at a take-over while copying, before the image was active or behind it.
    #[serde(default)]
    pub takeover_progress: u8,
    /// When the image becomes active, which decides the job's list of steps.
    #[serde(default)]
    pub publish: Publish,
    /// Why publishing at once did not work for this job, which publishes when copied then, whatever the configuration
    /// says.
    #[serde(default)]
    pub at_once_refused: Option<String>,
    /// At once: the clone is complete and inspected, and may be published.
    #[serde(default)]
    pub sealed: bool,
    /// At once: what is known of the clone, from the moment when it was made.
    #[serde(default)]
    pub clone: Option<CloneImage>,
    /// At once: how far the copy behind the active image is.
    #[serde(default)]
    pub fill: FillState,
    /// Since when the image is active and depends on its source.
    #[serde(default)]
    pub detaching_since: Option<Timestamp>,
    /// When it became independent.
    #[serde(default)]
    pub detached: Option<Detached>,
    /// Fields of another version of this program. They are kept as they are.
    #[serde(flatten)]
    pub unknown: serde_json::Map<String, serde_json::Value>,
}

/// Text of a record that others wrote is cut to this length, in bytes.
const TEXT_MAX: usize = 4096;

/// How the reason of a job begins that ended by a dry run.
pub const DRY_RUN: &str = "dry run ([offload] dry_run = true)";

/// Per cent that a copy must have gained since the last take-over to show that the job itself did not end its owner.
const TAKEOVER_GAIN: u8 = 5;

fn shorten(text: &mut String) {
    if text.len() > TEXT_MAX {
        let cut = (0..=TEXT_MAX - 3).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
        text.truncate(cut);
        text.push('…');
    }
}

/// A way that the states do not allow.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("job {image_id} cannot go from {from} to {to}")]
pub struct IllegalTransition {
    pub image_id: Uuid,
    pub from: State,
    pub to: State,
}

/// Why a stored record cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unreadable {
    #[error("was written by a newer version of rbd-offload (format {0}, this one knows {AT_ONCE_VERSION}); left alone")]
    Newer(u64),
    #[error("is not a job record: {0}")]
    Broken(String),
    #[error("is larger than a job record can be; left alone")]
    TooLarge,
}

impl Record {
    pub fn new(
        image_id: Uuid,
        trigger: Trigger,
        source: Option<Source>,
        project_id: Option<String>,
        now: Timestamp,
    ) -> Self {
        Self {
            version: VERSION,
            image_id,
            request_id: Uuid::new_v4(),
            source,
            trigger,
            project_id,
            state: State::Accepted,
            method: None,
            fallback: None,
            progress: 0,
            bytes_total: 0,
            bytes_done: 0,
            attempts: 0,
            created_at: now,
            updated_at: now,
            ended_at: None,
            owner: None,
            reason: None,
            stages: Vec::new(),
            owner_address: None,
            source_image: None,
            dest_pool: None,
            publication: Publication::default(),
            artifacts: BTreeSet::new(),
            registration: Registration::Unposted,
            mismatched: Vec::new(),
            outcome: None,
            handover: None,
            not_before: None,
            retried: false,
            restarted: false,
            acknowledged: false,
            needs_repair: false,
            deactivated: false,
            needs_backend: None,
            placeholder: false,
            takeovers: 0,
            takeover_progress: 0,
            publish: Publish::WhenCopied,
            at_once_refused: None,
            sealed: false,
            clone: None,
            fill: FillState::default(),
            detaching_since: None,
            detached: None,
            unknown: serde_json::Map::new(),
        }
    }

    /// An ended record for leftovers that no job is for, so that a new request for that image meets an owner.
    pub fn placeholder(image_id: Uuid, now: Timestamp) -> Self {
        Self {
            state: State::Cancelled,
            ended_at: Some(now),
            reason: Some("no job: the reconciler removes leftovers of this image".into()),
            placeholder: true,
            ..Self::new(image_id, Trigger::Request, None, None, now)
        }
    }

    /// Host and instance of the daemon that is the owner (`host:pid:instance`).
    pub fn owner_instance(&self) -> Option<(&str, Uuid)> {
        let (host, instance) = self.owner.as_deref()?.rsplit_once(':')?;
        let (host, _pid) = host.rsplit_once(':')?;
        Some((host, Uuid::try_parse(instance).ok()?))
    }

    /// Cuts the texts that a record can do with less of.
    pub fn shorten(&mut self) {
        let outcome = self.outcome.as_mut().map(|outcome| &mut outcome.reason);
        self.reason.iter_mut().chain(self.fallback.as_mut()).chain(outcome).for_each(shorten);
    }

    /// Counts an owner that did not release the job. One that had copied more than every owner before it begins the
    /// count again: what ended it was more likely something else than this job.
    pub fn count_takeover(&mut self) {
        let copies = matches!(self.state, State::Copying | State::Detaching);
        let gained = copies && self.progress >= self.takeover_progress.saturating_add(TAKEOVER_GAIN);
        self.takeovers = if gained { 1 } else { self.takeovers.saturating_add(1) };
        if copies {
            self.takeover_progress = self.takeover_progress.max(self.progress);
        }
    }

    /// The RBD images that the job opens for writing and that Cinder, Nova or Glance deletes: its source and the
    /// published image.
    pub fn images_deleted_by_others(&self) -> Vec<ImageSpec> {
        let source = self.source_image.as_ref().map(|source| ImageSpec::with_id(&source.pool, &source.image_id));
        let by_name = || Some(ImageSpec::named(self.dest_pool.as_ref()?, self.image_id.to_string()));
        let published = self.published_by_id().or_else(by_name).filter(|_| self.has(Artifact::Published));
        source.into_iter().chain(published).collect()
    }

    /// Whether more than `2 * max_takeovers + 1` owners in a row have died: enough to fail the job, and as many again
    /// over its cleanup. The leftovers then stay.
    pub fn is_beyond_cleanup(&self, max_takeovers: u32) -> bool {
        max_takeovers > 0 && self.takeovers > max_takeovers.saturating_mul(2).saturating_add(1)
    }

    /// # Errors
    /// [`Unreadable::Newer`] for a record of a later format, whatever else it holds. One of format 1 is converted.
    pub fn parse(bytes: &[u8]) -> Result<Self, Unreadable> {
        #[derive(Deserialize)]
        struct Format {
            version: u64,
        }
        let format: Format = serde_json::from_slice(bytes).map_err(|e| Unreadable::Broken(e.to_string()))?;
        if format.version > u64::from(AT_ONCE_VERSION) {
            return Err(Unreadable::Newer(format.version));
        }
        if format.version < u64::from(VERSION) {
            return old_record::convert(bytes).map_err(|e| Unreadable::Broken(e.to_string()));
        }
        serde_json::from_slice(bytes).map_err(|e| Unreadable::Broken(e.to_string()))
    }

    pub fn to_bytes(&self) -> Vec<u8> {
        // a plain struct with string keys: serialising it cannot fail
        serde_json::to_vec(self).unwrap_or_default()
    }

    /// Moves to `next`, where that is legal. A state may be entered again (a step that is repeated).
    pub fn enter(&mut self, next: State, now: Timestamp) -> Result<(), IllegalTransition> {
        if self.state == next {
            return Ok(());
        }
        if !self.state.may_become(next) {
            return Err(IllegalTransition { image_id: self.image_id, from: self.state, to: next });
        }
        self.state = next;
        // the copy is complete, and stays
        if next == State::Publishing && self.publish == Publish::WhenCopied {
            (self.takeovers, self.takeover_progress) = (0, 0);
        }
        if next == State::Detaching {
            self.detaching_since.get_or_insert(now);
            (self.takeovers, self.takeover_progress) = (0, 0);
            (self.attempts, self.progress, self.reason) = (0, 0, None);
        }
        if next.is_ended() {
            self.ended_at = Some(now);
            self.not_before = None;
        }
        Ok(())
    }

    /// Makes an ended job a new one for the same image: a new request, or `retry`. A hand-over is not among them: the
    /// service has done the work itself by now, so only its image's owner can ask, by a tag.
    pub fn restart(&mut self, retried: bool, now: Timestamp) -> Result<(), IllegalTransition> {
        self.enter(State::Accepted, now)?;
        let fresh = Self::new(self.image_id, Trigger::Request, self.source, self.project_id.clone(), now);
        *self = Self {
            retried,
            restarted: true,
            owner: self.owner.take(),
            owner_address: self.owner_address.take(),
            needs_repair: self.needs_repair,
            mismatched: if retried { std::mem::take(&mut self.mismatched) } else { Vec::new() },
            unknown: std::mem::take(&mut self.unknown),
            ..fresh
        };
        Ok(())
    }

    /// Whether no attempt before this one, of this job or of one before it, can have posted a location.
    pub fn is_first_attempt(&self) -> bool {
        self.registration == Registration::Unposted && self.attempts == 0 && self.takeovers == 0 && !self.restarted
    }

    /// The part of its list of steps that the job is in.
    pub fn phase(&self) -> Phase {
        match self.state {
            State::Publishing if self.publish == Publish::WhenCopied || self.sealed => Phase::Publish,
            State::Detaching => Phase::Detach,
            _ => Phase::Prepare,
        }
    }

    /// Whether the job has begun to make its private copy, which is not complete.
    pub fn is_preparing(&self) -> bool {
        matches!(self.state, State::Copying | State::Publishing) && self.phase() == Phase::Prepare
    }

    /// Lays down when the image becomes active.
    pub fn set_publish(&mut self, publish: Publish) {
        self.publish = publish;
        self.version = match publish {
            Publish::WhenCopied => VERSION,
            Publish::AtOnce => AT_ONCE_VERSION,
        };
        (self.sealed, self.clone, self.fill) = (false, None, FillState::default());
    }

    /// Gives publishing at once up. What was made for it is undone as what any broken-off attempt made.
    pub fn switch_to_when_copied(&mut self, reason: &str) {
        self.at_once_refused = Some(reason.to_owned());
        self.sealed = false;
    }

    /// At once: the clone is complete and inspected, and stays.
    pub fn seal(&mut self) {
        self.sealed = true;
        (self.takeovers, self.takeover_progress) = (0, 0);
    }

    /// At once: Glance has the location, and may make the image active, so the published image stays.
    pub fn keep_published(&mut self) {
        self.sealed = true;
        self.registration = self.registration.max(Registration::Posted);
    }

    /// The published image, by its id: its name may change, or be gone.
    pub fn published_by_id(&self) -> Option<ImageSpec> {
        Some(ImageSpec::with_id(self.dest_pool.as_ref()?, &self.clone.as_ref()?.id))
    }

    /// The end without an image that decides how a job in `detaching` ends; otherwise it is `done`.
    pub fn end_of_detaching(&self) -> Outcome {
        self.outcome.clone().unwrap_or_else(|| Outcome::new(State::Done, ""))
    }

    /// Adds why another method than the one that was to be taken is taken.
    pub fn note_fallback(&mut self, note: &str) {
        self.fallback = Some(self.fallback.iter().map(String::as_str).chain([note]).collect::<Vec<_>>().join("; "));
    }

    /// Whether the record says that this was made, or was about to be.
    pub fn has(&self, artifact: Artifact) -> bool {
        self.artifacts.contains(&artifact)
    }

    /// Notes that the requester is being told of `outcome`.
    pub fn begin_report(&mut self, outcome: &Outcome) {
        self.outcome.get_or_insert_with(|| outcome.clone()).report = Reporting::Begun;
    }

    /// Whether the requester was told of an outcome, or is being told.
    pub fn is_reported(&self) -> bool {
        self.outcome.as_ref().is_some_and(|outcome| outcome.report == Reporting::Begun)
    }

    /// The end without an image that a job which has not ended is to come to.
    pub fn pending_outcome(&self) -> Option<&Outcome> {
        self.outcome.as_ref().filter(|_| !self.state.is_ended() && self.state != State::Detaching)
    }

    /// Whether the job was left to another deployment: nothing of it is on the image record.
    pub fn is_elsewhere(&self) -> bool {
        self.outcome.as_ref().is_some_and(|outcome| outcome.decline == Some(Decline::Elsewhere))
    }

    /// Whether the job ended by a dry run of this source.
    pub fn was_dry_run_of(&self, source: Source) -> bool {
        let is_dry = self.reason.as_ref().is_some_and(|reason| reason.starts_with(DRY_RUN));
        self.state == State::Cancelled && is_dry && self.source == Some(source)
    }

    /// Name of the private copy and of the temporary snapshot.
    pub fn private_name(&self) -> String {
        private_name(self.image_id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> Record {
        Record::new(Uuid::new_v4(), Trigger::Request, Some(Source::Volume(Uuid::new_v4())), None, Timestamp::now())
    }

    #[test]
    fn a_record_survives_storing() {
        let mut record = record();
        record.stages.push(Stage { name: "plan".into(), started_at: Timestamp::now(), seconds: Some(0.25) });
        assert_eq!(Record::parse(&record.to_bytes()).unwrap(), record);
    }

    #[test]
    fn the_json_has_the_names_that_show_promises() {
        let value: serde_json::Value = serde_json::from_slice(&record().to_bytes()).unwrap();
        for name in [
            "version",
            "image_id",
            "source",
            "trigger",
            "project_id",
            "state",
            "method",
            "progress",
            "bytes_total",
            "bytes_done",
            "attempts",
            "created_at",
            "updated_at",
            "ended_at",
            "owner",
            "reason",
            "stages",
        ] {
            assert!(value.get(name).is_some(), "{name} is missing");
        }
    }

    #[test]
    fn fields_of_another_version_are_kept() {
        let mut value: serde_json::Value = serde_json::from_slice(&record().to_bytes()).unwrap();
        value["later"] = serde_json::json!({"any": [1, 2.5, "x"]});
        let mut read = Record::parse(value.to_string().as_bytes()).unwrap();
        read.enter(State::Failed, Timestamp::now()).unwrap();
        read.restart(true, Timestamp::now()).unwrap();
        let written: serde_json::Value = serde_json::from_slice(&read.to_bytes()).unwrap();
        assert_eq!(written["later"], value["later"]);
    }

    #[test]
    fn a_method_that_made_a_wrong_copy_is_remembered_by_retry() {
        let mut job = record();
        job.mismatched.push(Method::Clone);
        job.enter(State::Failed, Timestamp::now()).unwrap();
        job.restart(true, Timestamp::now()).unwrap();
        assert_eq!(job.mismatched, [Method::Clone]);
        job.enter(State::Failed, Timestamp::now()).unwrap();
        job.restart(false, Timestamp::now()).unwrap();
        assert_eq!(job.mismatched, [], "a new request is a new job");
    }

    #[test]
    fn a_newer_record_is_told_from_a_broken_one() {
        assert_eq!(Record::parse(br#"{"version": 99, "what": "ever"}"#), Err(Unreadable::Newer(99)));
        assert!(matches!(Record::parse(b""), Err(Unreadable::Broken(_))));
        assert!(matches!(Record::parse(b"[]"), Err(Unreadable::Broken(_))));
        assert!(matches!(Record::parse(br#"{"version":1}"#), Err(Unreadable::Broken(_))));
    }

    #[test]
    fn texts_of_a_record_are_cut_and_stay_texts() {
        let mut record = record();
        record.reason = Some("ü".repeat(1 << 20));
        record.outcome = Some(Outcome::new(State::Failed, "x".repeat(1 << 20)));
        record.fallback = Some("short".into());
        record.shorten();
        assert!(record.to_bytes().len() < 10_000, "{}", record.to_bytes().len());
        assert_eq!(record.fallback.as_deref(), Some("short"));
    }

    #[test]
    fn owners_that_die_are_counted_until_one_gets_further() {
        let now = Timestamp::now();
        let mut record = record();
        record.enter(State::Copying, now).unwrap();
        for count in 1..=3 {
            record.count_takeover();
            assert_eq!(record.takeovers, count);
        }
        // a copy of ten hours, and daemons that die every now and then
        record.progress = 40;
        record.count_takeover();
        assert_eq!(record.takeovers, 1);
        // where one before was as far, it is no gain
        for (progress, count) in [(3, 2), (42, 3), (41, 4)] {
            record.progress = progress;
            record.count_takeover();
            assert_eq!(record.takeovers, count, "at {progress} %");
        }
        record.enter(State::Publishing, now).unwrap();
        assert_eq!(record.takeovers, 0);
        record.progress = 95;
        for count in 1..=5 {
            record.count_takeover();
            assert_eq!(record.takeovers, count, "while publishing");
        }
    }

    #[test]
    fn every_live_state_can_end_and_done_is_final() {
        let undone = |state: &State| !state.is_ended() && *state != State::Detaching;
        for state in State::ALL.into_iter().filter(undone) {
            for end in [State::Declined, State::Failed, State::Cancelled] {
                assert!(state.may_become(end), "{state} → {end}");
            }
        }
        assert!(State::ALL.into_iter().all(|next| !State::Done.may_become(next)));
        assert!(!State::Accepted.may_become(State::Done));
        assert!(!State::Copying.may_become(State::Done));
    }

    #[test]
    fn an_active_image_is_never_declined_nor_begun_again() {
        let ways: Vec<State> = State::ALL.into_iter().filter(|next| State::Detaching.may_become(*next)).collect();
        assert_eq!(ways, [State::Done, State::Failed, State::Cancelled]);
    }

    #[test]
    fn a_daemon_that_cannot_publish_at_once_leaves_such_a_record_alone() {
        let mut record = record();
        assert_eq!(record.version, VERSION);
        record.set_publish(Publish::AtOnce);
        // what a daemon that knows format 2 alone reads of it
        let value: serde_json::Value = serde_json::from_slice(&record.to_bytes()).unwrap();
        assert!(value["version"].as_u64() > Some(u64::from(VERSION)));
        assert_eq!(Record::parse(&record.to_bytes()).unwrap(), record);
        record.set_publish(Publish::WhenCopied);
        assert_eq!(record.version, VERSION);
    }

    #[test]
    fn phases_follow_what_was_done_not_the_name_of_the_state() {
        let now = Timestamp::now();
        let mut job = record();
        assert_eq!(job.phase(), Phase::Prepare);
        job.set_publish(Publish::AtOnce);
        job.enter(State::Publishing, now).unwrap();
        assert!(job.phase() == Phase::Prepare && job.is_preparing());
        job.seal();
        assert_eq!(job.phase(), Phase::Publish);
        job.enter(State::Detaching, now).unwrap();
        assert_eq!(job.phase(), Phase::Detach);
        let mut copied = record();
        copied.enter(State::Copying, now).unwrap();
        copied.enter(State::Publishing, now).unwrap();
        assert_eq!(copied.phase(), Phase::Publish);
    }

    #[test]
    fn a_restarted_job_forgets_its_end_and_keeps_its_source() {
        let mut job = record();
        let first = job.clone();
        job.enter(State::Failed, Timestamp::now()).unwrap();
        job.restart(true, Timestamp::now()).unwrap();
        assert_eq!(job.state, State::Accepted);
        assert_eq!(job.ended_at, None);
        assert_eq!(job.source, first.source);
        assert_ne!(job.request_id, first.request_id);
        assert!(job.retried);
    }
}
