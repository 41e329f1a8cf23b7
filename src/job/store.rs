//! The store of the jobs: one RADOS object a job, and two indexes in omap so that listing them is quick.
//!
//! Only the holder of a job's lease writes the record. All others leave [signals](super::signal) on the same object.
//! The object is the truth. `index.live` and `index.ended` are hints: a reader of an index reads the object before it
//! acts. An entry is there before its object, and again before the delivery is acked. (Listing a namespace makes the
//! OSDs walk the whole pool, which holds millions of objects.)

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::clock::Clock;
use super::record::{HandoverState, IllegalTransition, Record, State, Unreadable};
use super::signal::{self, Signal, Signals};
use crate::ceph::{self, ErrorKind, KeyedObject, LockKey, MAX_OBJECT, Objects, Page, Version};
use crate::request::{Source, Trigger};

const LIVE: &str = "index.live";
const ENDED: &str = "index.ended";

/// Lists the ended jobs whose record the reconciler reads in its next round.
const RECHECK: &str = "index.recheck";

/// Entries read from an index with one operation.
pub const INDEX_PAGE: usize = 1000;

/// How long a job that was left to another deployment is not begun again for a request that it knows.
const ELSEWHERE_PAUSE: SignedDuration = SignedDuration::from_secs(60);

/// How often a signal is tried when others write the same object; each try means that one of them got through.
const SIGNAL_TRIES: usize = 32;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Ceph(#[from] ceph::Error),
    #[error("the record of job {image_id} {reason}")]
    Unreadable { image_id: Uuid, reason: Unreadable },
    #[error(transparent)]
    Illegal(#[from] IllegalTransition),
    #[error("the record of job {image_id} would be {bytes} bytes, more than can be read back; it was not written")]
    TooLarge { image_id: Uuid, bytes: usize },
    #[error("job {0}: its record changed {SIGNAL_TRIES} times while this was tried; try again")]
    Contended(Uuid),
}

pub type Result<T> = std::result::Result<T, Error>;

/// A record and the signals beside it as they were read, with what guards the next write.
#[derive(Debug, Clone, PartialEq)]
pub struct Stored {
    pub record: Record,
    pub signals: Signals,
    pub version: Version,
}

impl Stored {
    /// Whether there is nothing left to do for any daemon.
    pub fn is_settled(&self) -> bool {
        self.record.state.is_ended() && !self.signals.has(Signal::Rerequested) && !self.signals.has(Signal::Retry)
    }

    /// Whether a daemon is to take the job up now, also if it waits for its next attempt.
    pub fn is_urgent(&self) -> bool {
        [Signal::Cancel, Signal::RecheckImage, Signal::Retry].into_iter().any(|signal| self.signals.has(signal))
    }

    /// Whether the operator wants a job to end that has not ended, or one that was requested again.
    pub fn is_to_be_cancelled(&self) -> bool {
        self.signals.has(Signal::Cancel) && !self.is_settled()
    }
}

/// A request as the intake hands it over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewJob {
    pub image_id: Uuid,
    pub trigger: Trigger,
    pub source: Option<Source>,
    /// What the notification said; the plan reads it again.
    pub project_id: Option<String>,
}

/// What became of a submitted request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Submitted {
    Created {
        request_id: Uuid,
    },
    /// A live job for that image is there: the same request, heard again.
    Running,
    /// An ended (or ending) job is there, or one for another source. It was sent [`Signal::Rerequested`].
    Rerequested,
}

/// What the scheduler wants to know of a waiting job before it reads it. A hint.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Summary {
    pub project: Option<String>,
    pub created: Option<Timestamp>,
    pub not_before: Option<Timestamp>,
    /// Destination pool, once a plan has found it.
    pub pool: Option<String>,
    /// A service handed it over and waits.
    pub handover: bool,
    /// Its last owner did not release it.
    pub suspect: bool,
    /// A daemon without this backend left it to another.
    pub backend: Option<String>,
    /// Since when its image is active and depends on its source.
    pub detaching: Option<Timestamp>,
    /// The daemon by whose clock the image's source is kept for a while.
    pub grace_by: Option<Uuid>,
    /// Who holds the lease. An entry that an older version wrote names none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub holder: Option<Holder>,
    /// Its requester was told that it waits; when that was last written, by its writer's clock.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub told: Option<Timestamp>,
}

/// The daemon that has a job, as its record says. It stands in the index so that others do not try the lease.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// One life of that daemon.
    pub instance: Uuid,
    /// For people.
    pub host: String,
    /// When the record had last been written by then, by the holder's clock. It tells one entry from another.
    pub at: Timestamp,
}

impl Holder {
    /// From a record that has not ended: the owner of an ended one removes what the job left.
    fn of(record: &Record) -> Option<Self> {
        let (host, instance) = record.owner_instance().filter(|_| !record.state.is_ended())?;
        Some(Self { instance, host: host.to_owned(), at: record.updated_at })
    }
}

impl From<&Stored> for Summary {
    fn from(stored: &Stored) -> Self {
        let not_before = stored.record.not_before.filter(|_| !stored.is_urgent());
        // any daemon can end a job
        let backend = stored.record.needs_backend.clone().filter(|_| !stored.is_urgent());
        Self { not_before, backend, ..Self::from(&stored.record) }
    }
}

impl From<&Record> for Summary {
    fn from(record: &Record) -> Self {
        Self {
            project: record.project_id.clone(),
            created: Some(record.created_at),
            not_before: record.not_before,
            pool: record.dest_pool.clone(),
            handover: record.handover.is_some(),
            suspect: record.takeovers > 0,
            backend: record.needs_backend.clone(),
            grace_by: record.detached.map(|detached| detached.by),
            detaching: record.detaching_since.filter(|_| record.state == State::Detaching),
            holder: Holder::of(record),
            told: record.acknowledged.then_some(record.updated_at),
        }
    }
}

#[derive(Clone)]
pub struct Store {
    objects: Arc<dyn Objects>,
    clock: Clock,
}

impl Store {
    pub fn new(objects: Arc<dyn Objects>, clock: Clock) -> Self {
        Self { objects, clock }
    }

    pub fn objects(&self) -> &Arc<dyn Objects> {
        &self.objects
    }

    /// Name of a job's object.
    pub fn object(image_id: Uuid) -> String {
        format!("job.{image_id}")
    }

    /// The stored job of an image. `None`: there is none.
    ///
    /// # Errors
    ///
    /// [`Error::Unreadable`] for a record that is broken, too large or of a newer version; [`Error::Ceph`] else.
    pub async fn load(&self, image_id: Uuid) -> Result<Option<Stored>> {
        let KeyedObject { data, keys, version } = match self.objects.read_with_keys(&Self::object(image_id)).await {
            Ok(Some(found)) => found,
            Ok(None) => return Ok(None),
            Err(error) if error.kind() == ErrorKind::TooLarge => {
                return Err(Error::Unreadable { image_id, reason: Unreadable::TooLarge });
            }
            Err(error) => return Err(error.into()),
        };
        let record = Record::parse(&data).map_err(|reason| Error::Unreadable { image_id, reason })?;
        if record.image_id != image_id {
            let reason = Unreadable::Broken(format!("it speaks of image {}", record.image_id));
            return Err(Error::Unreadable { image_id, reason });
        }
        Ok(Some(Stored { record, signals: Signals::read(keys), version }))
    }

    /// Stores a request. Once this returned, the request is not lost whatever dies.
    pub async fn submit(&self, new: &NewJob) -> Result<Submitted> {
        if let Some(submitted) = self.resubmit(new).await? {
            return Ok(submitted);
        }
        let mut record = Record::new(new.image_id, new.trigger, new.source, new.project_id.clone(), self.clock.now());
        // a service that hands its work over waits for the image, and says when to publish
        record.handover = (new.trigger != Trigger::Request).then_some(HandoverState::Offered);
        let bytes = encode(&record)?;
        // The index entry is written first, because this future can be dropped right after the record is created. It is
        // written again afterwards, because entries without a record are removed after a while.
        let summary = Summary::from(&record);
        self.index_live(new.image_id, &summary).await?;
        match self.objects.create(&Self::object(new.image_id), &bytes).await {
            Ok(_) => {
                self.index_live(new.image_id, &summary).await?;
                Ok(Submitted::Created { request_id: record.request_id })
            }
            Err(e) if e.kind() == ErrorKind::Exists => self.resubmit(new).await?.ok_or(Error::Contended(new.image_id)),
            Err(e) => Err(e.into()),
        }
    }

    /// Whether this request was left to another deployment less than a minute ago. Each status that the other one
    /// writes arrives here as a notification of the same request.
    fn is_left_alone(&self, record: &Record, new: &NewJob) -> bool {
        let since = self.clock.now().duration_since(record.updated_at).abs();
        record.state.is_ended() && record.is_elsewhere() && record.source == new.source && since < ELSEWHERE_PAUSE
    }

    /// A request for an image that has a job. `None` when it has none.
    async fn resubmit(&self, new: &NewJob) -> Result<Option<Submitted>> {
        let image_id = new.image_id;
        let mut submitted = Submitted::Running;
        let found = self
            .signal(image_id, |stored| {
                let record = &stored.record;
                let signals = if new.trigger != Trigger::Request {
                    // a service hands an image over once; later notifications repeat that
                    vec![]
                } else if self.is_left_alone(record, new) {
                    vec![]
                } else if record.state.is_ended() || record.outcome.is_some() {
                    vec![Signal::Rerequested]
                } else if record.trigger == Trigger::Request && record.source != new.source {
                    // another request than the running one: that one ends, and the record is read again
                    vec![Signal::Rerequested, Signal::RecheckImage]
                } else {
                    vec![]
                };
                submitted = if signals.is_empty() { Submitted::Running } else { Submitted::Rerequested };
                signals
            })
            .await?;
        let Some(stored) = found else { return Ok(None) };
        if stored.record.placeholder && new.trigger != Trigger::Request {
            // the offer is stored when the reconciler has removed the placeholder, in a moment
            return Err(Error::Contended(image_id));
        }
        // also when nothing was sent: the daemon that wrote the record may have died before the index said so
        if !stored.is_settled() {
            self.index_live(image_id, &Summary::from(&stored)).await?;
        }
        Ok(Some(submitted))
    }

    /// Sends a job the signals that `choose` names for its record, and returns the stored job. Without a signal it
    /// writes nothing. A signal takes effect when the holder of the lease reads it. `None`: there is no such job.
    pub async fn signal(&self, image_id: Uuid, choose: impl FnMut(&Stored) -> Vec<Signal>) -> Result<Option<Stored>> {
        self.signal_instead(image_id, &[], choose).await
    }

    /// [`signal`](Self::signal), which withdraws the signals `withdrawn` where one is sent to a job that has not ended.
    async fn signal_instead(
        &self,
        image_id: Uuid,
        withdrawn: &[Signal],
        mut choose: impl FnMut(&Stored) -> Vec<Signal>,
    ) -> Result<Option<Stored>> {
        let object = Self::object(image_id);
        for _ in 0..SIGNAL_TRIES {
            let Some(mut stored) = self.load(image_id).await? else { return Ok(None) };
            let signals = choose(&stored);
            if signals.is_empty() {
                return Ok(Some(stored));
            }
            let entries = signal::entries(&signals);
            let removed = if stored.record.state.is_ended() { &[] } else { withdrawn };
            match self.objects.change_keys(&object, &entries, &signal::keys(removed), stored.version).await {
                Ok(version) => {
                    stored.signals.set(entries);
                    stored.signals.remove(removed);
                    return Ok(Some(Stored { version, ..stored }));
                }
                Err(error) if error.kind() == ErrorKind::Conflict => {}
                Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
                Err(error) => return Err(error.into()),
            }
        }
        Err(Error::Contended(image_id))
    }

    /// Writes the record over the version it was read at, while `lock` is held, and removes the signals `consumed`.
    ///
    /// # Errors
    /// [`Error::TooLarge`] for a record that could not be read back: nothing is written.
    pub async fn write(&self, stored: &Stored, lock: &LockKey, consumed: &[Signal]) -> Result<Version> {
        let (object, data, keys) =
            (Self::object(stored.record.image_id), encode(&stored.record)?, signal::keys(consumed));
        Ok(self.objects.replace_and_remove_keys(&object, &data, stored.version, Some(lock), &keys).await?)
    }

    /// Whether the cluster answers, by a read that costs almost nothing.
    pub async fn probe(&self) -> Result<()> {
        self.objects.omap(LIVE, "", 1).await?;
        Ok(())
    }

    /// Brings the indexes in line with what is stored.
    pub async fn index(&self, stored: &Stored) -> Result<()> {
        let image_id = stored.record.image_id;
        if !stored.is_settled() {
            self.index_live(image_id, &Summary::from(stored)).await?;
            return Ok(self.objects.remove_omap(ENDED, &[image_id.to_string()]).await?);
        }
        let ended_at = stored.record.ended_at.unwrap_or(stored.record.updated_at).to_string();
        self.objects.set_omap(ENDED, &[(image_id.to_string(), ended_at.into_bytes())]).await?;
        self.objects.remove_omap(LIVE, &[image_id.to_string()]).await?;
        // a request that was sent between the write of the record and this removal would lose its index entry
        match self.load(image_id).await? {
            Some(now) if !now.is_settled() => self.index_live(image_id, &Summary::from(&now)).await,
            _ => Ok(()),
        }
    }

    /// Says in the index who holds a job that has not ended.
    pub async fn index_holder(&self, stored: &Stored) -> Result<()> {
        if stored.is_settled() {
            return Ok(());
        }
        self.index_live(stored.record.image_id, &Summary::from(stored)).await
    }

    async fn index_live(&self, image_id: Uuid, summary: &Summary) -> Result<()> {
        let summary = serde_json::to_vec(summary).unwrap_or_default();
        Ok(self.objects.set_omap(LIVE, &[(image_id.to_string(), summary)]).await?)
    }

    /// The jobs that a daemon has to work on, in the order of their ids.
    pub async fn live(&self) -> Result<Vec<(Uuid, Summary)>> {
        let entries = self.entries(LIVE).await?;
        Ok(entries.into_iter().map(|(id, value)| (id, read_summary(&value))).collect())
    }

    /// The version of the index of these jobs: the same as long as no entry of it was written. `None`: there is none.
    pub async fn live_version(&self) -> Result<Option<Version>> {
        Ok(self.objects.read(LIVE).await?.map(|(_, version)| version))
    }

    /// One entry of that index.
    pub async fn live_entry(&self, image_id: Uuid) -> Result<Option<Summary>> {
        let key = image_id.to_string();
        // what begins like this is read from there: a dozen keys differ in nothing but the last digit
        let mut after = key.split_at(key.len() - 1).0.to_owned();
        loop {
            match self.objects.omap(LIVE, &after, 1).await?.pop() {
                Some((found, value)) if found == key => return Ok(Some(read_summary(&value))),
                Some((found, _)) if found < key => after = found,
                _ => return Ok(None),
            }
        }
    }

    /// A page of the ended jobs whose records are kept, and when each ended: at most `most` from the cursor `after` on.
    pub async fn ended_page(&self, after: Option<&str>, most: usize) -> Result<Page<(Uuid, Option<Timestamp>)>> {
        let entries = self.objects.omap(ENDED, after.unwrap_or_default(), most).await?;
        let next = entries.last().filter(|_| entries.len() >= most).map(|(key, _)| key.clone());
        let read = |(key, value): (String, Vec<u8>)| Some((Uuid::try_parse(&key).ok()?, read_time(&value)));
        Ok(Page { entries: entries.into_iter().filter_map(read).collect(), next })
    }

    /// The ended jobs whose records are kept, and when each ended.
    pub async fn ended(&self) -> Result<Vec<(Uuid, Option<Timestamp>)>> {
        let entries = self.entries(ENDED).await?;
        Ok(entries.into_iter().map(|(id, value)| (id, read_time(&value))).collect())
    }

    /// Asks the reconciler to read the record of an ended job in its next round. Without that it reads old ones rarely.
    pub async fn request_recheck(&self, image_id: Uuid) -> Result<()> {
        Ok(self.objects.set_omap(RECHECK, &[(image_id.to_string(), Vec::new())]).await?)
    }

    /// Jobs that [`request_recheck`](Self::request_recheck) was called for: the first page of them.
    pub async fn requested_rechecks(&self) -> Result<BTreeSet<Uuid>> {
        let page = self.objects.omap(RECHECK, "", INDEX_PAGE).await?;
        Ok(page.into_iter().filter_map(|(key, _)| Uuid::try_parse(&key).ok()).collect())
    }

    pub async fn remove_recheck(&self, image_id: Uuid) -> Result<()> {
        Ok(self.objects.remove_omap(RECHECK, &[image_id.to_string()]).await?)
    }

    /// Whether both indexes are there.
    pub async fn has_indexes(&self) -> Result<bool> {
        for index in [LIVE, ENDED] {
            if self.objects.read(index).await?.is_none() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    async fn entries(&self, index: &str) -> Result<BTreeMap<Uuid, Vec<u8>>> {
        let mut all = BTreeMap::new();
        let mut after = String::new();
        loop {
            let page = self.objects.omap(index, &after, INDEX_PAGE).await?;
            let is_last = page.len() < INDEX_PAGE;
            let Some((last, _)) = page.last() else { return Ok(all) };
            after.clone_from(last);
            all.extend(page.into_iter().filter_map(|(key, value)| Some((Uuid::try_parse(&key).ok()?, value))));
            if is_last {
                return Ok(all);
            }
        }
    }

    /// Drops the index entries of a job that has no record.
    pub async fn forget(&self, image_id: Uuid) -> Result<()> {
        self.objects.remove_omap(LIVE, &[image_id.to_string()]).await?;
        Ok(self.objects.remove_omap(ENDED, &[image_id.to_string()]).await?)
    }

    /// Stores an ended record for an image that has none. `false`: it has one.
    pub async fn create_ended(&self, record: &Record) -> Result<bool> {
        let ended_at = record.ended_at.unwrap_or(record.updated_at).to_string();
        self.objects.set_omap(ENDED, &[(record.image_id.to_string(), ended_at.into_bytes())]).await?;
        match self.objects.create(&Self::object(record.image_id), &record.to_bytes()).await {
            Ok(_) => Ok(true),
            Err(e) if e.kind() == ErrorKind::Exists => Ok(false),
            Err(e) => Err(e.into()),
        }
    }

    /// Stores a job that has not ended for an image that has no record. `false`: it has one.
    pub async fn create_live(&self, record: &Record) -> Result<bool> {
        let (image_id, summary) = (record.image_id, Summary::from(record));
        self.index_live(image_id, &summary).await?;
        match self.objects.create(&Self::object(image_id), &encode(record)?).await {
            Ok(_) => self.index_live(image_id, &summary).await.map(|()| true),
            Err(e) if e.kind() == ErrorKind::Exists => Ok(false),
            Err(e) => Err(e.into()),
        }
    }

    /// Removes an ended job's record, unless it changed since it was read.
    pub async fn remove(&self, stored: &Stored) -> Result<()> {
        match self.objects.remove(&Self::object(stored.record.image_id), stored.version, None).await {
            Ok(()) => {}
            Err(e) if e.kind() == ErrorKind::NotFound => {}
            Err(e) => return Err(e.into()),
        }
        self.forget(stored.record.image_id).await
    }

    /// Ids of all job objects, indexed or not. Slow in a large pool.
    pub async fn scan(&self) -> Result<Vec<Uuid>> {
        let names = self.objects.list().await?;
        Ok(names.iter().filter_map(|name| Uuid::try_parse(name.strip_prefix("job.")?).ok()).collect())
    }

    /// Asks for another attempt: of an ended job as of a new one without a tag, of a job that waits at once. `None`:
    /// there is no such job.
    pub async fn retry(&self, image_id: Uuid) -> Result<Option<Retried>> {
        let mut outcome = Retried::Restarted;
        let found = self
            .signal(image_id, |stored| {
                let record = &stored.record;
                outcome = match record.state {
                    State::Done => Retried::AlreadyDone,
                    state if !state.is_ended() => Retried::StillRunning,
                    _ if record.trigger != Trigger::Request => Retried::OwnedByService,
                    _ => Retried::Restarted,
                };
                match outcome {
                    Retried::Restarted => vec![Signal::Retry],
                    // a job that waits goes at once
                    Retried::StillRunning if record.not_before.is_some() => vec![Signal::Retry],
                    _ => vec![],
                }
            })
            .await?;
        let Some(stored) = found else { return Ok(None) };
        self.index(&stored).await?;
        Ok(Some(outcome))
    }

    /// Asks the holder of the lease to end the job and to remove what it made. A job that waits is taken up for that at
    /// once. `None`: there is no such job.
    pub async fn cancel(&self, image_id: Uuid) -> Result<Option<Cancelled>> {
        let mut outcome = Cancelled::Signalled;
        let found = self
            // a request that was made again before this is cancelled too: its tag is taken off with the job's
            .signal_instead(image_id, &[Signal::Rerequested], |stored| {
                if stored.record.state == State::Detaching {
                    outcome = Cancelled::Active;
                    return vec![];
                }
                if stored.is_settled() || stored.record.state == State::Done {
                    outcome = Cancelled::Ended(stored.record.state);
                    return vec![];
                }
                outcome = Cancelled::Signalled;
                vec![Signal::Cancel]
            })
            .await?;
        let Some(stored) = found else { return Ok(None) };
        self.index(&stored).await?;
        Ok(Some(outcome))
    }
}

fn read_time(value: &[u8]) -> Option<Timestamp> {
    std::str::from_utf8(value).ok().and_then(|text| text.parse().ok())
}

/// An entry that is not what it should be tells nothing: its record does.
fn read_summary(value: &[u8]) -> Summary {
    serde_json::from_slice(value).unwrap_or_default()
}

fn encode(record: &Record) -> Result<Vec<u8>> {
    let bytes = record.to_bytes();
    match bytes.len() {
        length if length > MAX_OBJECT => Err(Error::TooLarge { image_id: record.image_id, bytes: length }),
        _ => Ok(bytes),
    }
}

/// What became of `cancel`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cancelled {
    /// A daemon ends it when it next polls the jobs.
    Signalled,
    /// Its image is active, and depends on its source until the job has ended.
    Active,
    /// It had ended before.
    Ended(State),
}

/// What became of `retry`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Retried {
    Restarted,
    /// It had not ended; if it waited for its next attempt, it goes at once.
    StillRunning,
    AlreadyDone,
    /// The service that had handed it over has done it itself by now.
    OwnedByService,
}
