//! The lease on a job: a cls lock on its object, with a duration that the OSD counts, renewed at a third of it.
//!
//! Two things keep a daemon that lost its lease from doing harm. Before every step that others can see it renews the
//! lease and stops when that is refused. And a daemon that takes over from an owner that did not release the job fences
//! that owner's Ceph client first (`osd blocklist`), so that even an operation that was already on its way does
//! nothing.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::time::Instant;
use uuid::Uuid;

use super::record::Record;
use super::store::Store;
use crate::ceph::{self, Changed, Error, ErrorKind, LockKey, Locked, Objects, Storage};

/// Name of the cls lock.
const LOCK: &str = "lease";

/// Who holds leases: one daemon's life.
#[derive(Debug, Clone)]
pub struct Identity {
    /// A new one at each start.
    pub instance: Uuid,
    pub host: String,
    pub pid: u32,
}

impl Identity {
    pub fn of_this_process() -> Self {
        Self { instance: Uuid::new_v4(), host: ceph::host_name(), pid: std::process::id() }
    }

    /// As it stands in a job record: `host:pid:instance`.
    pub fn owner(&self) -> String {
        format!("{}:{}:{}", self.host, self.pid, self.instance)
    }
}

/// How long a take-over waits until the OSDs have forgotten the previous owner's watches on one image.
const FORGET_TIMEOUT: Duration = Duration::from_secs(10);

/// Fences the client that the record names as its owner, where that is not the client `own`: nothing that it still has
/// on its way is done any more, and it has no image open that others may want to remove. `false`: the record names no
/// other client.
///
/// # Errors
/// A daemon that cannot fence must not take over, since two would then work on one job:
/// [`ErrorKind::PermissionDenied`] without the capability, [`ErrorKind::Unsupported`] when the record names no address.
pub async fn fence_owner(storage: &dyn Storage, record: &Record, own: &str) -> ceph::Result<bool> {
    let fenced = match (&record.owner_address, &record.owner) {
        (Some(address), _) if address == own => return Ok(false),
        (Some(address), _) => storage.fence(address).await,
        (None, Some(owner)) => Err(Error::new(
            format!("fence the owner of job {}", record.image_id),
            ErrorKind::Unsupported,
            format!("its record names the owner {owner} without the address of its Ceph client"),
        )),
        (None, None) => return Ok(false),
    };
    let (image_id, client) = (record.image_id, record.owner_address.as_deref());
    match fenced {
        Ok(change) => {
            tracing::info!(%image_id, client, made = change == Changed::Yes, "fenced the previous owner");
            forget_watches_of_owner(storage, record).await;
            Ok(true)
        }
        Err(error) => {
            if matches!(error.kind(), ErrorKind::PermissionDenied | ErrorKind::Unsupported) {
                metrics::counter!("rbd_offload_fences_refused_total").increment(1);
                tracing::error!(%image_id, client, %error,
                    "the previous owner cannot be fenced: the job is left alone; give the cephx user `mon 'profile rbd'`"
                );
            }
            Err(error)
        }
    }
}

/// Cinder and Glance could not delete an image that a dead client still watches. The job's private images need no such
/// care: their removal sees to it.
async fn forget_watches_of_owner(storage: &dyn Storage, record: &Record) {
    for image in record.images_deleted_by_others() {
        // Without it the job goes on: nothing is wrong until the image is to be deleted.
        let error = match tokio::time::timeout(FORGET_TIMEOUT, storage.forget_dead_watches(&image)).await {
            Ok(Ok(())) => continue,
            Ok(Err(error)) => error.to_string(),
            Err(_) => format!("no answer within {} s", FORGET_TIMEOUT.as_secs()),
        };
        tracing::warn!(image_id = %record.image_id, image = %image, error,
            "the previous owner may still count as a client of this RBD image, which then cannot be deleted"
        );
    }
}

/// A lease that was taken. Dropping it does not give it back: it runs out.
pub struct Lease {
    object: String,
    key: LockKey,
    description: String,
    duration: Duration,
    /// Until when it holds for sure, by this host's monotonic clock: counted from before the request was sent.
    until: Mutex<Instant>,
    lost: AtomicBool,
}

/// What became of asking for a lease.
pub enum Asked {
    Taken(Lease),
    /// Another daemon holds it.
    Held,
    NoJob,
}

impl Lease {
    /// Takes the lease on a job. `None` when another daemon holds it, or there is no such job.
    pub async fn take(
        objects: &dyn Objects,
        image_id: Uuid,
        identity: &Identity,
        duration: Duration,
    ) -> ceph::Result<Option<Self>> {
        match Self::ask(objects, image_id, identity, duration).await? {
            Asked::Taken(lease) => Ok(Some(lease)),
            Asked::Held | Asked::NoJob => Ok(None),
        }
    }

    /// Asks for the lease on a job.
    pub async fn ask(
        objects: &dyn Objects,
        image_id: Uuid,
        identity: &Identity,
        duration: Duration,
    ) -> ceph::Result<Asked> {
        let lease = Self {
            object: Store::object(image_id),
            // a cookie for each taking: a lease that this very daemon lost is not mistaken for the one it took since
            key: LockKey { name: LOCK.to_owned(), cookie: format!("{}:{}", identity.instance, Uuid::new_v4()) },
            description: identity.owner(),
            duration,
            until: Mutex::new(Instant::now() + duration),
            lost: AtomicBool::new(false),
        };
        match objects.lock(&lease.object, &lease.key, &lease.description, duration).await? {
            Locked::Acquired => Ok(Asked::Taken(lease)),
            Locked::Held => Ok(Asked::Held),
            Locked::NoObject => Ok(Asked::NoJob),
        }
    }

    /// Whether a daemon holds the lease on a job.
    pub async fn is_held(objects: &dyn Objects, image_id: Uuid) -> ceph::Result<bool> {
        objects.is_locked(&Store::object(image_id), LOCK).await
    }

    /// Names the lock in guarded writes.
    pub fn key(&self) -> &LockKey {
        &self.key
    }

    pub fn renewal_interval(&self) -> Duration {
        self.duration / 3
    }

    /// Renews it; when this returns `Ok`, it holds.
    ///
    /// # Errors
    /// [`ErrorKind::NotLocked`] once it is lost, also when it could not be renewed in its time.
    pub async fn renew(&self, objects: &dyn Objects) -> ceph::Result<()> {
        if self.is_lost() {
            return Err(self.lost_error());
        }
        let asked = Instant::now();
        match tokio::time::timeout(
            self.duration,
            objects.renew(&self.object, &self.key, &self.description, self.duration),
        )
        .await
        {
            Ok(Ok(())) => {
                self.set_until(asked + self.duration);
                if self.remaining() > Duration::ZERO {
                    return Ok(());
                }
                // this process was frozen meanwhile
                self.lost.store(true, Ordering::SeqCst);
                Err(self.lost_error())
            }
            Ok(Err(e)) if matches!(e.kind(), ErrorKind::NotLocked | ErrorKind::NotFound | ErrorKind::Fenced) => {
                self.lost.store(true, Ordering::SeqCst);
                Err(self.lost_error())
            }
            Ok(Err(e)) if self.remaining() > Duration::ZERO => Err(e),
            Ok(Err(_)) | Err(_) => {
                self.lost.store(true, Ordering::SeqCst);
                Err(self.lost_error())
            }
        }
    }

    /// Gives it back, so that another daemon need not wait for its end.
    pub async fn release(&self, objects: &dyn Objects) {
        if self.is_lost() {
            return;
        }
        self.lost.store(true, Ordering::SeqCst);
        if let Err(error) = objects.unlock(&self.object, &self.key).await {
            tracing::debug!(object = self.object, %error, "the lease was not released; it expires by itself");
        }
    }

    pub fn is_lost(&self) -> bool {
        self.lost.load(Ordering::SeqCst)
    }

    /// Whether it was lost, or its time is over.
    pub fn is_over(&self) -> bool {
        self.is_lost() || self.remaining().is_zero()
    }

    fn remaining(&self) -> Duration {
        let until = *self.until.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        until.saturating_duration_since(Instant::now())
    }

    fn set_until(&self, until: Instant) {
        *self.until.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = until;
    }

    fn lost_error(&self) -> Error {
        Error::new(format!("keep the lease on {}", self.object), ErrorKind::NotLocked, "it was lost")
    }
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;

    use super::*;

    #[test]
    fn an_owner_is_read_from_a_record_as_it_is_written() {
        let identity = Identity { instance: Uuid::new_v4(), host: "a:b".into(), pid: 7 };
        let mut record = Record::placeholder(Uuid::new_v4(), Timestamp::UNIX_EPOCH);
        assert_eq!(record.owner_instance(), None);
        record.owner = Some(identity.owner());
        assert_eq!(record.owner_instance(), Some(("a:b", identity.instance)));
        for other in ["", "host", "host:1", "host:1:another", &format!("host:{}", identity.instance)] {
            record.owner = Some(other.to_owned());
            assert_eq!(record.owner_instance(), None, "{other}");
        }
    }
}
