//! Promises that are watched while they could be broken: one end per request, no owner follows another who was
//! not fenced, and no healthy daemon is fenced.

use std::collections::{BTreeMap, BTreeSet};

use uuid::Uuid;

use super::world::{Shared, World};
use crate::job::record::{Record, State};

#[derive(Debug, Default)]
pub struct Watched {
    /// Requests that ended, and how.
    ended: BTreeMap<Uuid, State>,
    /// Daemons that met an accident: they may have lost a lease by it.
    pub stricken: BTreeSet<String>,
    /// Clients that their own daemon wanted to be fenced: what hung over them is nobody's any more.
    pub given_up: BTreeSet<String>,
}

/// An accident befell a daemon.
pub fn stricken(world: &Shared, name: &str) {
    world.lock().watched.stricken.insert(name.to_owned());
}

/// A job record was written.
pub fn written(world: &mut World, before: &[u8], data: &[u8]) {
    let Ok(record) = Record::parse(data) else { return };
    if let Some(owner) = Record::parse(before).ok().and_then(|before| before.owner_address)
        && record.owner_address.as_ref().is_some_and(|address| *address != owner)
        && !world.ceph.blocklist.contains(&owner)
    {
        world.violated(format!(
            "the job of image {} was taken over from {owner}, which was not fenced",
            record.image_id
        ));
    }
    let (image, request, state) = (record.image_id, record.request_id, record.state);
    match world.watched.ended.get(&request).copied() {
        Some(before) if before != state => {
            world.violated(format!("the request {request} for image {image} ended as {before}, then became {state}"));
        }
        None if state.is_ended() => {
            world.watched.ended.insert(request, state);
        }
        _ => {}
    }
}

/// A daemon asks for a client to be fenced: it may give up one of its own.
pub fn fenced(world: &mut World, by: &str, address: &str) {
    let name = address.split(':').next().unwrap_or_default();
    if name == by {
        world.watched.given_up.insert(address.to_owned());
    } else if !world.watched.given_up.contains(address)
        && !world.watched.stricken.contains(name)
        && !world.ceph.blocklist.contains(address)
    {
        world.violated(format!("the healthy daemon {name} was fenced"));
    }
}
