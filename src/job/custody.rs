//! Custody: the reconciler as the recorded owner of a job that has ended, or of an image that no job is for.
//!
//! A daemon that removes something may freeze between its last look and the removal, and go on when a new job for the
//! same image has made something under the same name. So the reconciler does as a job does: it takes the lease, fences
//! the previous owner, and writes itself into the record. The next holder of the lease fences it. Without a record it
//! makes one, a placeholder in an end state, and removes it afterwards.

use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;

use super::context::Context;
use super::lease::{Lease, fence_owner};
use super::record::Record;
use super::store::{Error, Result, Store, Stored};
use crate::ceph::{self, ErrorKind, Storage};

/// How often the record is written when others send signals meanwhile.
const TRIES: usize = 16;

/// Pauses after each try to take the reconciler out of a record: another daemon that finds it there fences it.
const CLEAR_PAUSES: [Duration; 3] = [Duration::from_millis(200), Duration::from_secs(1), Duration::from_secs(2)];

/// Custody of one job, from [`take`](Self::take) to [`release`](Self::release). If it is dropped in between, this
/// daemon stays in the record, and the next owner fences it.
pub(super) struct Custody {
    store: Store,
    lease: Lease,
    image_id: Uuid,
    owner: String,
    address: String,
    /// Too many owners in a row have died.
    is_beyond_cleanup: bool,
}

/// Why guarded work did not end.
#[derive(Debug, thiserror::Error)]
pub(super) enum Guarded<E> {
    #[error("the lease was lost: {0}")]
    Lost(ceph::Error),
    #[error("{0}")]
    Failed(E),
}

impl Custody {
    /// `None` while the job is not over, another daemon works on it, or its record is another version's. `storage` is
    /// what the removals go through: its address is what others fence.
    ///
    /// # Errors
    /// Also those of [`fence_owner`]: an owner that cannot be fenced stays.
    pub async fn take(context: &Context, storage: &Arc<dyn Storage>, image_id: Uuid) -> Result<Option<Self>> {
        let store = &context.store;
        match store.load(image_id).await {
            Ok(Some(stored)) if !stored.is_settled() => return Ok(None),
            Ok(Some(_)) => {}
            Ok(None) => {
                let record = Record::placeholder(image_id, context.clock.now());
                if !store.create_ended(&record).await? {
                    return Ok(None);
                }
            }
            Err(Error::Unreadable { .. }) => return Ok(None),
            Err(error) => return Err(error),
        }
        let duration = context.config.borrow().jobs.lease;
        let objects = store.objects().as_ref();
        let Some(lease) = Lease::take(objects, image_id, &context.identity, duration).await? else { return Ok(None) };
        let address = storage.address().await?;
        let max_takeovers = context.config.borrow().offload.max_takeovers;
        let mut custody = Self {
            store: store.clone(),
            lease,
            image_id,
            owner: context.identity.owner(),
            address: address.clone(),
            is_beyond_cleanup: false,
        };
        let taken = async {
            let Some(stored) = custody.settled().await? else { return Ok(false) };
            let fenced = fence_owner(storage.as_ref(), &stored.record, &address).await?;
            let Some(record) = custody.own(fenced).await? else { return Ok(false) };
            custody.is_beyond_cleanup = record.is_beyond_cleanup(max_takeovers);
            Ok(true)
        };
        let taken = taken.await;
        match taken {
            Ok(true) => Ok(Some(custody)),
            Ok(false) => {
                custody.release(false).await;
                Ok(None)
            }
            // the record may have been written all the same
            Err(error) => {
                custody.release(false).await;
                Err(error)
            }
        }
    }

    /// Whether so many owners died in a row that nothing tries again to remove the leftovers: as many as may die for a
    /// job that is being made and then cleaned up.
    pub fn is_beyond_cleanup(&self) -> bool {
        self.is_beyond_cleanup
    }

    /// Does `work` while the lease is renewed, however long that takes. When the lease is lost, the work is given up.
    /// It is renewed before the work begins.
    pub async fn guard<T, E>(
        &self,
        work: impl Future<Output = std::result::Result<T, E>>,
    ) -> std::result::Result<T, Guarded<E>> {
        let objects = self.store.objects().as_ref();
        // several short pieces of work under one lease must not outlast it
        if let Err(error) = self.lease.renew(objects).await
            && self.lease.is_lost()
        {
            return Err(Guarded::Lost(error));
        }
        let renewals = async {
            loop {
                tokio::time::sleep(self.lease.renewal_interval()).await;
                match self.lease.renew(objects).await {
                    Err(error) if self.lease.is_lost() => return error,
                    // it holds still, and is renewed again
                    Ok(()) | Err(_) => {}
                }
            }
        };
        tokio::select! {
            biased;
            lost = renewals => Err(Guarded::Lost(lost)),
            done = work => done.map_err(Guarded::Failed),
        }
    }

    /// Renews the lease: right before a change that no fence holds up.
    pub async fn renew(&self) -> ceph::Result<()> {
        self.lease.renew(self.store.objects().as_ref()).await
    }

    /// Takes the reconciler out of the record, or removes the placeholder, and gives the lease back. `is_clean`: what
    /// the job left is removed, and the owners that died over it count no more.
    pub async fn release(self, is_clean: bool) {
        let objects = self.store.objects().as_ref();
        for pause in CLEAR_PAUSES {
            match self.clear(is_clean).await {
                Ok(()) => return self.lease.release(objects).await,
                Err(error) => {
                    tracing::debug!(image_id = %self.image_id, %error, "the reconciler is still in the record");
                    tokio::time::sleep(pause).await;
                }
            }
        }
        // the lease runs out by itself; the next round clears the record
        tracing::warn!(image_id = %self.image_id, "the reconciler stays in the record of a job until its next round");
    }

    async fn clear(&self, is_clean: bool) -> Result<()> {
        for _ in 0..TRIES {
            let Some(stored) = self.store.load(self.image_id).await? else { return Ok(()) };
            let record = &stored.record;
            // another's placeholder stays until its owner has been fenced
            let is_ours = record.owner.as_ref().is_none_or(|owner| *owner == self.owner);
            // one that counts dead owners stays until there is nothing left to remove, or it expires
            let counts = record.takeovers > 0 && !is_clean;
            let removed = if record.placeholder && stored.is_settled() && is_ours && !counts {
                self.store.remove(&stored).await
            } else {
                return self.disown(is_clean).await;
            };
            match removed {
                // asked for since, or a renewal of the lease
                Err(Error::Ceph(error)) if error.kind() == ErrorKind::Conflict => {}
                removed => return removed,
            }
        }
        Err(Error::Contended(self.image_id))
    }

    /// The record, if the job is over.
    async fn settled(&self) -> Result<Option<Stored>> {
        Ok(self.store.load(self.image_id).await?.filter(Stored::is_settled))
    }

    /// Writes the reconciler into the record as its owner. `fenced`: an owner before it had died. `None`: it is too
    /// late, the job was asked for again.
    async fn own(&self, fenced: bool) -> Result<Option<Record>> {
        for _ in 0..TRIES {
            let Some(mut stored) = self.store.load(self.image_id).await? else { return Ok(None) };
            if !stored.is_settled() {
                return Ok(None);
            }
            let record = &mut stored.record;
            // not twice, where the outcome of the first try was unknown
            let is_known = record.owner_address.as_ref() == Some(&self.address);
            // nor where this daemon comes back with another client: no daemon died
            if fenced && !is_known && record.owner.as_ref() != Some(&self.owner) {
                record.count_takeover();
            }
            record.owner = Some(self.owner.clone());
            record.owner_address = Some(self.address.clone());
            match self.store.write(&stored, self.lease.key(), &[]).await {
                Err(Error::Ceph(error)) if error.kind() == ErrorKind::Conflict => {}
                written => return written.map(|_| Some(stored.record)),
            }
        }
        Err(Error::Contended(self.image_id))
    }

    /// Takes the reconciler out of the record.
    async fn disown(&self, is_clean: bool) -> Result<()> {
        for _ in 0..TRIES {
            let Some(mut stored) = self.store.load(self.image_id).await? else { return Ok(()) };
            let is_settled = stored.is_settled();
            let record = &mut stored.record;
            if record.owner_address.as_ref() != Some(&self.address) {
                return Ok(());
            }
            record.owner = None;
            record.owner_address = None;
            if is_clean && is_settled {
                record.takeovers = 0;
            }
            match self.store.write(&stored, self.lease.key(), &[]).await {
                Err(Error::Ceph(error)) if error.kind() == ErrorKind::Conflict => {}
                written => return written.map(drop),
            }
        }
        Err(Error::Contended(self.image_id))
    }
}
