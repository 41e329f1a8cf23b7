//! The store of the jobs: one RADOS object a job, and two indexes in omap so that listing them is quick.
//!
//! The object is the truth. `index.live` and `index.ended` are hints: a reader of an index reads the object before it
//! acts. An entry is there before its object, and again before the delivery is acked. (Listing a namespace makes the
//! OSDs walk the whole pool, which holds millions of objects.)

use std::collections::BTreeMap;
use std::sync::Arc;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::clock::Clock;
use super::record::{Handover, IllegalTransition, Record, State, Unreadable};
use crate::ceph::{self, ErrorKind, LockKey, MAX_OBJECT, Objects, Version};
use crate::request::{Source, Trigger};

const LIVE: &str = "index.live";
const ENDED: &str = "index.ended";

/// Entries read from an index with one operation.
const PAGE: usize = 1000;

/// How often a change is tried when others write the same record; each try means that one of them got through.
const CHANGE_TRIES: usize = 32;

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
    #[error("job {0}: its record changed {CHANGE_TRIES} times while this was tried; try again")]
    Contended(Uuid),
}

pub type Result<T> = std::result::Result<T, Error>;

/// A record as it was read, with what guards its next writing.
#[derive(Debug, Clone, PartialEq)]
pub struct Stored {
    pub record: Record,
    pub version: Version,
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
    /// An ended (or ending) job is there, or one for another source; it is marked to be looked at again.
    AskedAgain,
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

    pub async fn load(&self, image_id: Uuid) -> Result<Option<Stored>> {
        let (bytes, version) = match self.objects.read(&Self::object(image_id)).await {
            Ok(Some(found)) => found,
            Ok(None) => return Ok(None),
            Err(error) if error.kind() == ErrorKind::TooLarge => {
                return Err(Error::Unreadable { image_id, reason: Unreadable::TooLarge });
            }
            Err(error) => return Err(error.into()),
        };
        let record = Record::parse(&bytes).map_err(|reason| Error::Unreadable { image_id, reason })?;
        if record.image_id != image_id {
            let reason = Unreadable::Broken(format!("it speaks of image {}", record.image_id));
            return Err(Error::Unreadable { image_id, reason });
        }
        Ok(Some(Stored { record, version }))
    }

    /// Stores a request. Once this returned, the request is not lost whatever dies.
    pub async fn submit(&self, new: &NewJob) -> Result<Submitted> {
        if let Some(submitted) = self.heard_again(new).await? {
            return Ok(submitted);
        }
        let mut record = Record::new(new.image_id, new.trigger, new.source, new.project_id.clone(), self.clock.now());
        // a service that hands its work over waits for the image, and says when to publish
        record.handover = (new.trigger != Trigger::Request).then_some(Handover::Offered);
        let bytes = encode(&record)?;
        // The index before, since this may be given up once the record is there; and after, since an entry without a
        // record is dropped after a while.
        self.index_live(&record).await?;
        match self.objects.create(&Self::object(new.image_id), &bytes).await {
            Ok(_) => {
                self.index_live(&record).await?;
                Ok(Submitted::Created { request_id: record.request_id })
            }
            Err(e) if e.kind() == ErrorKind::Exists => {
                self.heard_again(new).await?.ok_or(Error::Contended(new.image_id))
            }
            Err(e) => Err(e.into()),
        }
    }

    /// A request for an image that has a job. `None` when it has none.
    async fn heard_again(&self, new: &NewJob) -> Result<Option<Submitted>> {
        let image_id = new.image_id;
        let mut submitted = Submitted::Running;
        let mut is_placeholder = false;
        let changed = self
            .change(image_id, |record| {
                is_placeholder = record.placeholder;
                if new.trigger != Trigger::Request {
                    // a service hands an image over once; what comes later is an echo
                    submitted = Submitted::Running;
                    false
                } else if record.state.is_ended() || record.ending.is_some() {
                    submitted = Submitted::AskedAgain;
                    !std::mem::replace(&mut record.again, true)
                } else if record.trigger == Trigger::Request && record.source != new.source {
                    // another request than the one that runs: that ends, and the record is looked at again
                    submitted = Submitted::AskedAgain;
                    let before = (record.again, record.check, record.not_before);
                    (record.again, record.check, record.not_before) = (true, true, None);
                    before != (true, true, None)
                } else {
                    submitted = Submitted::Running;
                    false
                }
            })
            .await?;
        let Some(record) = changed else { return Ok(None) };
        if is_placeholder && new.trigger != Trigger::Request {
            // what a service offers is stored once the reconciler is through, in a moment
            return Err(Error::Contended(image_id));
        }
        // also when nothing was changed: the index entry may have been lost with the daemon that wrote the record
        if !record.is_settled() {
            self.index_live(&record).await?;
        }
        Ok(Some(submitted))
    }

    /// Reads the record, lets `change` alter it and writes it back if `change` says that it did; again when another
    /// writer was faster. Not under the lease: only flags are to be set this way. `None`: there is no such job.
    pub async fn change(&self, image_id: Uuid, mut change: impl FnMut(&mut Record) -> bool) -> Result<Option<Record>> {
        for _ in 0..CHANGE_TRIES {
            let Some(mut stored) = self.load(image_id).await? else { return Ok(None) };
            if !change(&mut stored.record) {
                return Ok(Some(stored.record));
            }
            stored.record.updated_at = self.clock.now();
            match self.write(&stored, None).await {
                Ok(_) => return Ok(Some(stored.record)),
                Err(Error::Ceph(e)) if e.kind() == ErrorKind::Conflict => {}
                Err(Error::Ceph(e)) if e.kind() == ErrorKind::NotFound => return Ok(None),
                Err(e) => return Err(e),
            }
        }
        Err(Error::Contended(image_id))
    }

    /// Writes the record over the version it was read at; with `lock`, only while that lock is held.
    ///
    /// # Errors
    /// [`Error::TooLarge`] for a record that could not be read back: nothing is written.
    pub async fn write(&self, stored: &Stored, lock: Option<&LockKey>) -> Result<Version> {
        let object = Self::object(stored.record.image_id);
        Ok(self.objects.replace(&object, &encode(&stored.record)?, stored.version, lock).await?)
    }

    /// Asks the cluster for next to nothing: whether it answers.
    pub async fn probe(&self) -> Result<()> {
        self.objects.omap(LIVE, "", 1).await?;
        Ok(())
    }

    /// Brings the indexes in line with the record.
    pub async fn index(&self, record: &Record) -> Result<()> {
        if !record.is_settled() {
            self.index_live(record).await?;
            return Ok(self.objects.remove_omap(ENDED, &[record.image_id.to_string()]).await?);
        }
        let ended_at = record.ended_at.unwrap_or(record.updated_at).to_string();
        self.objects.set_omap(ENDED, &[(record.image_id.to_string(), ended_at.into_bytes())]).await?;
        self.objects.remove_omap(LIVE, &[record.image_id.to_string()]).await?;
        // a request that came between the record's writing and this removal put its entry there in vain
        match self.load(record.image_id).await? {
            Some(now) if !now.record.is_settled() => self.index_live(&now.record).await,
            _ => Ok(()),
        }
    }

    async fn index_live(&self, record: &Record) -> Result<()> {
        let summary = serde_json::to_vec(&Summary::from(record)).unwrap_or_default();
        Ok(self.objects.set_omap(LIVE, &[(record.image_id.to_string(), summary)]).await?)
    }

    /// The jobs that a daemon has to work on, in the order of their ids.
    pub async fn live(&self) -> Result<Vec<(Uuid, Summary)>> {
        let entries = self.entries(LIVE).await?;
        Ok(entries.into_iter().map(|(id, value)| (id, serde_json::from_slice(&value).unwrap_or_default())).collect())
    }

    /// The ended jobs whose records are kept, and when each ended.
    pub async fn ended(&self) -> Result<Vec<(Uuid, Option<Timestamp>)>> {
        let entries = self.entries(ENDED).await?;
        Ok(entries
            .into_iter()
            .map(|(id, value)| (id, std::str::from_utf8(&value).ok().and_then(|text| text.parse().ok())))
            .collect())
    }

    async fn entries(&self, index: &str) -> Result<BTreeMap<Uuid, Vec<u8>>> {
        let mut all = BTreeMap::new();
        let mut after = String::new();
        loop {
            let page = self.objects.omap(index, &after, PAGE).await?;
            let Some((last, _)) = page.last() else { return Ok(all) };
            after.clone_from(last);
            all.extend(page.into_iter().filter_map(|(key, value)| Some((Uuid::try_parse(&key).ok()?, value))));
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

    /// Starts an ended job again without a tag.
    pub async fn retry(&self, image_id: Uuid) -> Result<Option<Retried>> {
        let now = self.clock.now();
        let mut outcome = Retried::Restarted;
        let mut illegal = None;
        let changed = self
            .change(image_id, |record| {
                if record.state == State::Done {
                    outcome = Retried::AlreadyDone;
                    return false;
                }
                if !record.state.is_ended() {
                    outcome = Retried::StillRunning;
                    // a waiting job goes at once
                    return record.not_before.take().is_some();
                }
                if record.trigger != Trigger::Request {
                    outcome = Retried::HandedBack;
                    return false;
                }
                outcome = Retried::Restarted;
                match record.restart(true, now) {
                    Ok(()) => true,
                    Err(e) => {
                        illegal = Some(e);
                        false
                    }
                }
            })
            .await?;
        if let Some(e) = illegal {
            return Err(e.into());
        }
        match changed {
            Some(record) => {
                self.index(&record).await?;
                Ok(Some(outcome))
            }
            None => Ok(None),
        }
    }

    /// Asks the daemon that works on the job to end it and take everything down; one that waits is taken up for that at
    /// once. `None`: there is no such job.
    pub async fn cancel(&self, image_id: Uuid) -> Result<Option<Cancelled>> {
        let mut outcome = Cancelled::Asked;
        let changed = self
            .change(image_id, |record| {
                if record.is_settled() || record.state == State::Done {
                    outcome = Cancelled::Ended(record.state);
                    return false;
                }
                outcome = Cancelled::Asked;
                // any daemon can end it
                let left = record.needs_backend.take().is_some();
                let waited = record.not_before.take().is_some() || left;
                // a request that was made again after the end is looked for, and taken off
                let again = !record.state.is_ended() && std::mem::take(&mut record.again);
                !std::mem::replace(&mut record.cancel, true) || waited || again
            })
            .await?;
        let Some(record) = changed else { return Ok(None) };
        self.index(&record).await?;
        Ok(Some(outcome))
    }
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
    /// A daemon ends it at its next look.
    Asked,
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
    HandedBack,
}
