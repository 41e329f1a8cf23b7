//! The engine's copy of `index.live`: which jobs there are, and who holds them.
//!
//! The copy costs by what changes. The version of the index object tells whether anything has changed; one small read
//! asks for it. A changed index of some thousand entries is read again only every few seconds. What a daemon wants to
//! know sooner of one job, it reads from that job's entry.
//!
//! An entry names the daemon that holds the job. Others leave such a job alone until its entry has not changed for
//! longer than a lease, by their own clock. Of each daemon they try one job more often, so that the jobs of one that
//! died wait for little longer than their leases. An entry is a hint: the lease decides.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::Duration;

use tokio::time::Instant;
use uuid::Uuid;

use super::store::{Holder, INDEX_PAGE, Summary};
use crate::ceph::Version;

/// How long an index is not read again for each page that it had beyond the first.
const PAUSE_PER_PAGE: Duration = Duration::from_millis(500);

/// The longest of these pauses.
const PAUSE_MAX: Duration = Duration::from_secs(10);

/// The shortest pause while this daemon has no place for another job.
const PAUSE_WITHOUT_ROOM: Duration = Duration::from_secs(5);

/// Entries that are read one by one before the whole index is read instead.
pub const SINGLE_READS_MAX: usize = 32;

/// What is to be read of the index.
#[derive(Debug, PartialEq, Eq)]
pub enum ToRead {
    /// The copy is what the index is.
    Nothing,
    /// All of it.
    All,
    /// The entries of the jobs that something happened to. The rest may have changed, and is read later.
    Single,
}

/// A holder as it stands in an entry, since when by this daemon's clock.
struct Seen {
    holder: Holder,
    since: Instant,
}

#[derive(Default)]
pub struct IndexCopy {
    entries: BTreeMap<Uuid, Summary>,
    /// Of the object, before it was read. `None`: there is none, or it was not read yet.
    version: Option<Version>,
    read_at: Option<Instant>,
    is_current: bool,
    holders: HashMap<Uuid, Seen>,
    /// Daemons that had died or stalled when one of their jobs was taken over.
    gone: HashSet<Uuid>,
    /// When a job of a daemon was tried last, by the daemon.
    probed: HashMap<Uuid, Instant>,
}

impl IndexCopy {
    /// What is to be read, as the index object has this version now. `touched` are the jobs whose entries are wanted.
    pub fn plan_read(&mut self, version: Option<Version>, has_room: bool, touched: usize) -> ToRead {
        self.is_current = self.read_at.is_some() && self.version == version;
        if self.is_current {
            return ToRead::Nothing;
        }
        let pages = u32::try_from(self.entries.len() / INDEX_PAGE).unwrap_or(u32::MAX);
        let pause = PAUSE_PER_PAGE.saturating_mul(pages).min(PAUSE_MAX);
        let pause = if has_room || touched > 0 && pages == 0 { pause } else { pause.max(PAUSE_WITHOUT_ROOM) };
        match self.read_at {
            Some(read_at) if read_at.elapsed() < pause => ToRead::Single,
            _ => ToRead::All,
        }
    }

    /// The whole index, which had that version before it was read.
    pub fn replace(&mut self, entries: Vec<(Uuid, Summary)>, version: Option<Version>) {
        self.entries = entries.into_iter().collect();
        (self.version, self.read_at, self.is_current) = (version, Some(Instant::now()), true);
        let entries = &self.entries;
        self.holders.retain(|id, seen| entries.get(id).is_some_and(|now| now.holder.as_ref() == Some(&seen.holder)));
        for (id, summary) in entries {
            if let Some(holder) = &summary.holder {
                let seen = || Seen { holder: holder.clone(), since: Instant::now() };
                self.holders.entry(*id).or_insert_with(seen);
            }
        }
        let holders: HashSet<Uuid> = self.holders.values().map(|seen| seen.holder.instance).collect();
        self.gone.retain(|instance| holders.contains(instance));
        self.probed.retain(|instance, _| holders.contains(instance));
    }

    /// One entry as it is now.
    pub fn set(&mut self, id: Uuid, entry: Option<Summary>) {
        let holder = entry.as_ref().and_then(|summary| summary.holder.clone());
        match holder {
            Some(holder) if self.holders.get(&id).is_some_and(|seen| seen.holder == holder) => {}
            Some(holder) => drop(self.holders.insert(id, Seen { holder, since: Instant::now() })),
            None => drop(self.holders.remove(&id)),
        }
        match entry {
            Some(summary) => self.entries.insert(id, summary),
            None => self.entries.remove(&id),
        };
    }

    /// Whether nothing had changed since the copy was read, when the version was last asked for.
    pub fn is_current(&self) -> bool {
        self.is_current
    }

    pub fn entries(&self) -> &BTreeMap<Uuid, Summary> {
        &self.entries
    }

    /// Whether the daemon `own` may try the lease of this job, by what its entry says of the holder.
    pub fn may_try(&self, id: &Uuid, own: Uuid, lease: Duration) -> bool {
        self.holders.get(id).is_none_or(|seen| {
            let holder = seen.holder.instance;
            // what is left of a run of our own that broke off
            holder == own || self.gone.contains(&holder) || seen.since.elapsed() >= lease
        })
    }

    /// The jobs whose lease the daemon `own` may try: those that no daemon holds, those whose entry has not changed for
    /// a lease, and one of each holder now and then.
    pub fn to_try(&self, own: Uuid, lease: Duration) -> Vec<(Uuid, Summary)> {
        let mut probes: HashMap<Uuid, (Instant, Uuid)> = HashMap::new();
        for (id, Seen { holder, since }) in &self.holders {
            let is_rested = |at: &Instant| at.elapsed() >= lease / 3;
            if is_rested(since) && self.probed.get(&holder.instance).is_none_or(is_rested) {
                let probe = probes.entry(holder.instance).or_insert((*since, *id));
                *probe = (*probe).min((*since, *id));
            }
        }
        let probes: HashSet<Uuid> = probes.into_values().map(|(_, id)| id).collect();
        let may_try = |id: &Uuid| probes.contains(id) || self.may_try(id, own, lease);
        self.entries.iter().filter(|(id, _)| may_try(id)).map(|(id, summary)| (*id, summary.clone())).collect()
    }

    /// The lease of this job is about to be tried.
    pub fn note_try(&mut self, id: &Uuid) {
        if let Some(seen) = self.holders.get(id) {
            self.probed.insert(seen.holder.instance, Instant::now());
        }
    }

    /// A daemon holds the lease of this job: its holder is at work. `false`: the entry names none.
    pub fn note_held(&mut self, id: &Uuid) -> bool {
        let Some(seen) = self.holders.get_mut(id) else { return false };
        seen.since = Instant::now();
        self.gone.remove(&seen.holder.instance);
        true
    }

    /// The lease of a job was free that this daemon had not released.
    pub fn note_gone(&mut self, instance: Uuid) {
        self.gone.insert(instance);
    }
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;
    use tokio::time::advance;

    use super::*;

    const LEASE: Duration = Duration::from_secs(30);

    fn held_by(instance: Uuid) -> Summary {
        let holder = Holder { instance, host: "node".into(), at: Timestamp::UNIX_EPOCH };
        Summary { holder: Some(holder), ..Summary::default() }
    }

    fn tried(copy: &IndexCopy, own: Uuid) -> Vec<Uuid> {
        copy.to_try(own, LEASE).into_iter().map(|(id, _)| id).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn a_held_job_is_left_alone_for_a_lease_and_one_of_each_holder_is_tried_sooner() {
        let [own, one, other] = [(); 3].map(|()| Uuid::new_v4());
        let mut ids = [(); 4].map(|()| Uuid::new_v4());
        ids.sort();
        let mut copy = IndexCopy::default();
        let entries = || vec![(ids[0], held_by(one)), (ids[1], held_by(one)), (ids[2], held_by(other))];
        copy.replace(entries(), Some(Version(1)));
        copy.set(ids[3], Some(Summary::default()));
        assert_eq!(tried(&copy, own), [ids[3]]);
        assert_eq!(tried(&copy, other), [ids[2], ids[3]], "what is left of a run of its own");
        advance(LEASE / 3).await;
        assert_eq!(tried(&copy, own), [ids[0], ids[2], ids[3]]);
        copy.note_try(&ids[0]);
        assert!(copy.note_held(&ids[0]) && !copy.note_held(&ids[3]));
        assert_eq!(tried(&copy, own), [ids[2], ids[3]]);
        // the same entries again say nothing new
        copy.replace(entries(), Some(Version(2)));
        advance(LEASE / 3).await;
        assert_eq!(tried(&copy, own), [ids[1], ids[2]], "the one that was tried the longest time ago");
        advance(LEASE / 3).await;
        assert_eq!(tried(&copy, own), [ids[1], ids[2]], "a lease, without a probe");
        copy.note_gone(one);
        assert_eq!(tried(&copy, own), [ids[0], ids[1], ids[2]]);
        copy.note_held(&ids[0]);
        copy.note_held(&ids[1]);
        copy.note_try(&ids[1]);
        assert_eq!(tried(&copy, own), [ids[2]], "it lives after all");
    }

    #[tokio::test(start_paused = true)]
    async fn an_index_is_read_when_it_has_changed_and_a_large_one_rarely() {
        let mut copy = IndexCopy::default();
        let entries = |count: usize| (0..count).map(|_| (Uuid::new_v4(), Summary::default())).collect::<Vec<_>>();
        assert_eq!(copy.plan_read(None, true, 0), ToRead::All, "it was not read yet");
        copy.replace(Vec::new(), None);
        assert_eq!(copy.plan_read(None, true, 9), ToRead::Nothing, "there is none");
        assert_eq!(copy.plan_read(Some(Version(1)), true, 0), ToRead::All);
        copy.replace(entries(INDEX_PAGE * 5), Some(Version(1)));
        assert_eq!(copy.plan_read(Some(Version(1)), true, 9), ToRead::Nothing);
        assert_eq!(copy.plan_read(Some(Version(2)), true, 0), ToRead::Single);
        assert!(!copy.is_current());
        advance(5 * PAUSE_PER_PAGE).await;
        assert_eq!(copy.plan_read(Some(Version(2)), false, 1), ToRead::Single, "there is no place");
        assert_eq!(copy.plan_read(Some(Version(2)), true, 0), ToRead::All);
        advance(PAUSE_WITHOUT_ROOM).await;
        assert_eq!(copy.plan_read(Some(Version(2)), false, 0), ToRead::All);
        // an older version is another one: the object was made again
        copy.replace(entries(1), Some(Version(2)));
        assert_eq!(copy.plan_read(Some(Version(1)), true, 0), ToRead::All);
    }
}
