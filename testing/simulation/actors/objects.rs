//! The calls of a daemon on RADOS objects.

use std::time::Duration;

use async_trait::async_trait;
use tokio::time::Instant;

use crate::ceph::{Changed, KeyedObject, LockKey, Locked, Objects, Result, Version};
use crate::job::record::Record;
use crate::job::simulation::faults::gate::{Handle, Kind};
use crate::job::simulation::invariants::promises;

#[async_trait]
impl Objects for Handle {
    async fn read(&self, object: &str) -> Result<Option<(Vec<u8>, Version)>> {
        self.ceph(Kind::Read, || format!("read {object}"), |world| Ok(world.ceph.read_object(object))).await
    }

    async fn create(&self, object: &str, data: &[u8]) -> Result<Version> {
        self.ceph(Kind::Write, || format!("create {object}"), |world| world.ceph.create_object(object, data)).await
    }

    async fn replace(&self, object: &str, data: &[u8], version: Version, lock: Option<&LockKey>) -> Result<Version> {
        self.replace_and_remove_keys(object, data, version, lock, &[]).await
    }

    async fn read_with_keys(&self, object: &str) -> Result<Option<KeyedObject>> {
        self.ceph(Kind::Read, || format!("read {object}"), |world| Ok(world.ceph.read_object_with_keys(object))).await
    }

    async fn replace_and_remove_keys(
        &self,
        object: &str,
        data: &[u8],
        version: Version,
        lock: Option<&LockKey>,
        keys: &[String],
    ) -> Result<Version> {
        let client = self.node.address();
        self.ceph(
            Kind::Write,
            || format!("replace {object} {} -{keys:?}", brief(data)),
            |world| {
                let (next, before) = world.ceph.replace_object(object, data, version, lock, &client, keys)?;
                promises::written(world, &before, data);
                Ok(next)
            },
        )
        .await
    }

    async fn change_keys(
        &self,
        object: &str,
        set: &[(String, Vec<u8>)],
        removed: &[String],
        version: Version,
    ) -> Result<Version> {
        self.ceph(
            Kind::Write,
            || format!("change keys {object} {:?} -{removed:?}", set.iter().map(|(key, _)| key).collect::<Vec<_>>()),
            |world| world.ceph.change_keys(object, set, removed, version),
        )
        .await
    }

    async fn remove(&self, object: &str, version: Version, lock: Option<&LockKey>) -> Result<()> {
        let client = self.node.address();
        self.ceph(
            Kind::Write,
            || format!("remove {object}"),
            |world| world.ceph.remove_object(object, version, lock, &client),
        )
        .await
    }

    async fn lock(&self, object: &str, lock: &LockKey, _description: &str, duration: Duration) -> Result<Locked> {
        let client = self.node.address();
        let until = Instant::now() + duration;
        self.ceph(
            Kind::Write,
            || format!("lock {object} {}", lock.cookie),
            |world| {
                let locked = world.ceph.lock(object, lock, &client, duration);
                if locked == Locked::Acquired {
                    world.ceph.leases.insert((client, object.to_owned()), until);
                }
                Ok(locked)
            },
        )
        .await
    }

    async fn renew(&self, object: &str, lock: &LockKey, _description: &str, duration: Duration) -> Result<()> {
        let client = self.node.address();
        let until = Instant::now() + duration;
        self.ceph(
            Kind::Write,
            || format!("renew {object} {}", lock.cookie),
            |world| {
                world.ceph.renew(object, lock, &client, duration)?;
                world.ceph.leases.insert((client, object.to_owned()), until);
                Ok(())
            },
        )
        .await
    }

    async fn unlock(&self, object: &str, lock: &LockKey) -> Result<Changed> {
        let client = self.node.address();
        self.ceph(
            Kind::Write,
            || format!("unlock {object} {}", lock.cookie),
            |world| Ok(world.ceph.unlock(object, lock, &client)),
        )
        .await
    }

    async fn is_locked(&self, object: &str, lock_name: &str) -> Result<bool> {
        self.ceph(Kind::Read, || format!("is locked {object}"), |world| Ok(world.ceph.is_locked(object, lock_name)))
            .await
    }

    async fn omap(&self, object: &str, after: &str, max: usize) -> Result<Vec<(String, Vec<u8>)>> {
        let what = if max == 1 { "entry of" } else { "omap" };
        self.ceph(Kind::Read, || format!("{what} {object}"), |world| Ok(world.ceph.keys(object, after, max))).await
    }

    async fn set_omap(&self, object: &str, entries: &[(String, Vec<u8>)]) -> Result<()> {
        self.ceph(
            Kind::Write,
            || format!("set omap {object} {}", entries.len()),
            |world| {
                world.ceph.set_keys(object, entries);
                Ok(())
            },
        )
        .await
    }

    async fn remove_omap(&self, object: &str, keys: &[String]) -> Result<()> {
        self.ceph(
            Kind::Write,
            || format!("remove omap {object} {keys:?}"),
            |world| {
                world.ceph.remove_keys(object, keys);
                Ok(())
            },
        )
        .await
    }

    async fn list(&self) -> Result<Vec<String>> {
        self.ceph(Kind::Read, || "list objects".into(), |world| Ok(world.ceph.objects.keys().cloned().collect())).await
    }
}

/// A job record for the trace.
fn brief(data: &[u8]) -> String {
    let Ok(record) = Record::parse(data) else { return String::new() };
    format!(
        "{} made={:?} {:?} outcome={:?} attempts={} retried={} owner={:?}",
        record.state,
        record.artifacts,
        record.registration,
        record.outcome.map(|outcome| outcome.state),
        record.attempts,
        record.retried,
        record.owner_address
    )
}
