//! The rules of RADOS objects: versions, `cls_lock` locks with a time limit, keys.

use std::ops::Bound;
use std::time::Duration;

use tokio::time::Instant;

use super::cluster::{Cluster, Object};
use crate::ceph::{Changed, Error, ErrorKind, KeyedObject, LockKey, Locked, Result, Version};

fn conflict(what: &str, object: &str) -> Error {
    Error::new(format!("{what} {object}"), ErrorKind::Conflict, "another version")
}

impl Object {
    fn check_lock(&self, lock: Option<&LockKey>, client: &str) -> Result<()> {
        let Some(lock) = lock else { return Ok(()) };
        match self.locks.get(&lock.name) {
            Some((cookie, holder, until)) if *cookie == lock.cookie && holder == client && *until > Instant::now() => {
                Ok(())
            }
            _ => Err(Error::new("write", ErrorKind::NotLocked, "the lock is not held")),
        }
    }
}

impl Cluster {
    fn object(&mut self, what: &str, name: &str) -> Result<&mut Object> {
        self.objects.get_mut(name).ok_or_else(|| Error::new(what, ErrorKind::NotFound, format!("no object {name}")))
    }

    pub fn read_object(&self, object: &str) -> Option<(Vec<u8>, Version)> {
        self.objects.get(object).map(|o| (o.data.clone(), Version(o.version)))
    }

    pub fn read_object_with_keys(&self, object: &str) -> Option<KeyedObject> {
        self.objects.get(object).map(|found| KeyedObject {
            data: found.data.clone(),
            keys: found.omap.iter().map(|(key, value)| (key.clone(), value.clone())).collect(),
            version: Version(found.version),
        })
    }

    pub fn create_object(&mut self, object: &str, data: &[u8]) -> Result<Version> {
        if self.objects.contains_key(object) {
            return Err(Error::new(format!("create {object}"), ErrorKind::Exists, "exists"));
        }
        let version = self.next();
        self.objects.insert(object.into(), Object { data: data.into(), version, ..Object::default() });
        Ok(Version(version))
    }

    /// Returns the new version, and the data of before.
    pub fn replace_object(
        &mut self,
        object: &str,
        data: &[u8],
        version: Version,
        lock: Option<&LockKey>,
        client: &str,
        removed: &[String],
    ) -> Result<(Version, Vec<u8>)> {
        let next = self.next();
        let found = self.object("replace", object)?;
        found.check_lock(lock, client)?;
        if found.version != version.0 {
            return Err(conflict("replace", object));
        }
        let before = std::mem::replace(&mut found.data, data.into());
        found.omap.retain(|key, _| !removed.contains(key));
        found.version = next;
        Ok((Version(next), before))
    }

    pub fn change_keys(
        &mut self,
        object: &str,
        set: &[(String, Vec<u8>)],
        removed: &[String],
        version: Version,
    ) -> Result<Version> {
        let next = self.next();
        let found = self.object("change keys", object)?;
        if found.version != version.0 {
            return Err(conflict("change keys", object));
        }
        found.omap.retain(|key, _| !removed.contains(key));
        found.omap.extend(set.iter().cloned());
        found.version = next;
        Ok(Version(next))
    }

    pub fn remove_object(
        &mut self,
        object: &str,
        version: Version,
        lock: Option<&LockKey>,
        client: &str,
    ) -> Result<()> {
        let found = self.object("remove", object)?;
        found.check_lock(lock, client)?;
        if found.version != version.0 {
            return Err(conflict("remove", object));
        }
        self.objects.remove(object);
        Ok(())
    }

    pub fn lock(&mut self, object: &str, lock: &LockKey, client: &str, duration: Duration) -> Locked {
        let next = self.next();
        let Some(found) = self.objects.get_mut(object) else { return Locked::NoObject };
        let now = Instant::now();
        if let Some((cookie, holder, until)) = found.locks.get(&lock.name)
            && *until > now
            && (*cookie != lock.cookie || *holder != client)
        {
            return Locked::Held;
        }
        found.locks.insert(lock.name.clone(), (lock.cookie.clone(), client.to_owned(), now + duration));
        found.version = next;
        Locked::Acquired
    }

    pub fn renew(&mut self, object: &str, lock: &LockKey, client: &str, duration: Duration) -> Result<()> {
        let next = self.next();
        let found = self.object("renew", object)?;
        found.check_lock(Some(lock), client)?;
        let until = Instant::now() + duration;
        found.locks.insert(lock.name.clone(), (lock.cookie.clone(), client.to_owned(), until));
        found.version = next;
        Ok(())
    }

    pub fn unlock(&mut self, object: &str, lock: &LockKey, client: &str) -> Changed {
        let next = self.next();
        let Some(found) = self.objects.get_mut(object) else { return Changed::No };
        if found.check_lock(Some(lock), client).is_err() {
            return Changed::No;
        }
        found.locks.remove(&lock.name);
        found.version = next;
        Changed::Yes
    }

    pub fn is_locked(&self, object: &str, lock_name: &str) -> bool {
        let now = Instant::now();
        let found = self.objects.get(object).and_then(|o| o.locks.get(lock_name));
        found.is_some_and(|(_, _, until)| *until > now)
    }

    /// A page of the keys after that one.
    pub fn keys(&self, object: &str, after: &str, max: usize) -> Vec<(String, Vec<u8>)> {
        let Some(found) = self.objects.get(object) else { return Vec::new() };
        let entries = found.omap.range::<str, _>((Bound::Excluded(after), Bound::Unbounded)).take(max);
        entries.map(|(key, value)| (key.clone(), value.clone())).collect()
    }

    /// Creates the object where there is none.
    pub fn set_keys(&mut self, object: &str, entries: &[(String, Vec<u8>)]) {
        let next = self.next();
        let found = self.objects.entry(object.into()).or_default();
        found.omap.extend(entries.iter().cloned());
        found.version = next;
    }

    pub fn remove_keys(&mut self, object: &str, keys: &[String]) {
        let next = self.next();
        if let Some(found) = self.objects.get_mut(object) {
            found.omap.retain(|key, _| !keys.contains(key));
            found.version = next;
        }
    }
}
