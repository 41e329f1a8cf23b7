//! The daemons of a deployment, and what each is configured for: a daemon leaves a job whose backend it lacks to one
//! that has it.
//!
//! The omap of one object names the daemons and what they serve. An entry counts as long as its daemon holds the lock
//! on an object of its own. The OSDs count that time, since controllers' clocks may differ by minutes. A daemon that
//! stops releases the lock and notes when; its entry counts for a while longer, so that the others decline nothing
//! while it restarts. There the clocks decide, and a difference makes that time longer or shorter.

use std::collections::BTreeSet;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::lease::Identity;
use crate::ceph::{ErrorKind, LockKey, Locked, Objects, Result};
use crate::config::Config;

/// The object whose omap has one entry per daemon: its instance id, and a [`DaemonEntry`].
const OBJECT: &str = "daemons";

/// Name of the lock that a daemon holds on its own object.
const LOCK: &str = "alive";

/// How often a daemon renews its entry.
pub const HEARTBEAT: Duration = Duration::from_secs(60);

/// How long an entry counts after its daemon's last heartbeat, or after its stop.
const LIFETIME: Duration = Duration::from_secs(5 * 60);

/// Entries of one read, and the most that are read: a daemon leaves one at each start, for [`LIFETIME`].
const PAGE: usize = 256;
const ENTRIES_MAX: usize = 4096;

/// What a daemon is configured for.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct DaemonEntry {
    /// For people.
    pub owner: String,
    pub backends: BTreeSet<String>,
    pub cinder: bool,
    pub nova: bool,
    /// When the daemon stopped, by its own clock. `None` while it runs.
    pub stopped_at: Option<Timestamp>,
}

impl DaemonEntry {
    pub fn of(config: &Config, identity: &Identity) -> Self {
        Self {
            owner: identity.owner(),
            backends: config.backends.keys().cloned().collect(),
            cinder: config.cinder.integration,
            nova: config.nova.integration,
            stopped_at: None,
        }
    }

    /// Whether its daemon stopped so short a time ago that it may be about to start again.
    fn may_restart(&self, now: Timestamp) -> bool {
        let lifetime = SignedDuration::try_from(LIFETIME).unwrap_or(SignedDuration::ZERO);
        self.stopped_at.is_some_and(|stopped| now.duration_since(stopped).abs() < lifetime)
    }
}

fn object_of(instance: Uuid) -> String {
    format!("daemon.{instance}")
}

/// Says that this daemon lives and what it serves.
pub async fn send_heartbeat(objects: &dyn Objects, identity: &Identity, entry: &DaemonEntry) -> Result<()> {
    let object = object_of(identity.instance);
    let key = LockKey { name: LOCK.into(), cookie: identity.instance.to_string() };
    // an entry without a lock would be removed as a dead daemon's: the lock comes first
    if objects.lock(&object, &key, &entry.owner, LIFETIME).await? == Locked::NoObject {
        match objects.create(&object, b"").await {
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::Exists => {}
            Err(error) => return Err(error),
        }
        objects.lock(&object, &key, &entry.owner, LIFETIME).await?;
    }
    write(objects, identity, entry).await
}

/// Says that this daemon stops, and releases its lock: nothing but the entry is left of it.
pub async fn leave(objects: &dyn Objects, identity: &Identity, entry: DaemonEntry, now: Timestamp) -> Result<()> {
    write(objects, identity, &DaemonEntry { stopped_at: Some(now), ..entry }).await?;
    let object = object_of(identity.instance);
    objects.unlock(&object, &LockKey { name: LOCK.into(), cookie: identity.instance.to_string() }).await?;
    let Some((_, version)) = objects.read(&object).await? else { return Ok(()) };
    objects.remove(&object, version, None).await
}

async fn write(objects: &dyn Objects, identity: &Identity, entry: &DaemonEntry) -> Result<()> {
    // a struct of texts: serialising it cannot fail
    let value = serde_json::to_vec(entry).unwrap_or_default();
    objects.set_omap(OBJECT, &[(identity.instance.to_string(), value)]).await
}

/// The owner of another daemon that has this backend, and lives or may be about to start again.
pub async fn with_backend(objects: &dyn Objects, own: Uuid, backend: &str, now: Timestamp) -> Result<Option<String>> {
    for (instance, entry) in entries(objects).await? {
        if instance == own || !entry.backends.contains(backend) {
            continue;
        }
        if entry.may_restart(now) || objects.is_locked(&object_of(instance), LOCK).await? {
            return Ok(Some(entry.owner));
        }
    }
    Ok(None)
}

/// Removes the entries of daemons that are gone.
pub async fn remove_dead(objects: &dyn Objects, now: Timestamp) -> Result<usize> {
    let mut removed = 0;
    for (instance, entry) in entries(objects).await? {
        if entry.may_restart(now) {
            continue;
        }
        let object = object_of(instance);
        // the version from before the check: a heartbeat in between changes it
        let stored = objects.read(&object).await?;
        if objects.is_locked(&object, LOCK).await? {
            continue;
        }
        if let Some((_, version)) = stored {
            match objects.remove(&object, version, None).await {
                Ok(()) => {}
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                // it lives after all
                Err(error) if error.kind() == ErrorKind::Conflict => continue,
                Err(error) => return Err(error),
            }
        }
        objects.remove_omap(OBJECT, &[instance.to_string()]).await?;
        removed += 1;
    }
    Ok(removed)
}

async fn entries(objects: &dyn Objects) -> Result<Vec<(Uuid, DaemonEntry)>> {
    let mut all = Vec::new();
    let mut after = String::new();
    while all.len() < ENTRIES_MAX {
        let page = objects.omap(OBJECT, &after, PAGE).await?;
        let Some((last, _)) = page.last() else { break };
        after.clone_from(last);
        let is_last = page.len() < PAGE;
        all.extend(page.into_iter().filter_map(|(key, value)| {
            // what another version wrote serves nothing that is known here
            Some((Uuid::try_parse(&key).ok()?, serde_json::from_slice(&value).unwrap_or_default()))
        }));
        if is_last {
            break;
        }
    }
    Ok(all)
}
