//! One region: its world, its daemons, and the broker that brings notifications to them.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::{Instant, sleep};
use uuid::Uuid;

use super::daemon::Daemon;
use crate::job::simulation::faults::dice::Dice;
use crate::job::simulation::faults::world::Shared;
use crate::job::simulation::state::cloud::asks;
use crate::job::store::Store;
use crate::request::{self, TagRequest};

/// What the seed's actors have in common.
#[derive(Clone)]
pub struct Region {
    pub world: Shared,
    pub daemons: Arc<Mutex<Vec<Daemon>>>,
    /// Images whose notification was acked.
    pub acked: Arc<Mutex<BTreeSet<Uuid>>>,
    pub images: Vec<Uuid>,
    pub store: Store,
}

impl Region {
    pub fn daemons(&self) -> std::sync::MutexGuard<'_, Vec<Daemon>> {
        self.daemons.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn dice<T>(&self, roll: impl FnOnce(&mut Dice) -> T) -> T {
        roll(&mut self.world.lock().dice)
    }

    /// One message of the broker: delivered until a daemon acks it.
    async fn deliver(self, image_id: Uuid, deleted: bool, tags: Vec<String>) {
        loop {
            let pause = self.dice(|dice| if dice.percent(80) { dice.millis(0, 800) } else { dice.millis(0, 90_000) });
            sleep(pause).await;
            let chosen = {
                let index = self.dice(Dice::roll);
                let daemons = self.daemons();
                let alive: Vec<&Daemon> = daemons.iter().filter(|d| !d.stop.is_cancelled()).collect();
                if alive.is_empty() {
                    None
                } else {
                    let daemon = alive[usize::try_from(index % alive.len() as u64).unwrap()];
                    Some((daemon.intake.clone(), daemon.node.died.clone()))
                }
            };
            let Some((intake, died)) = chosen else {
                sleep(Duration::from_secs(1)).await;
                continue;
            };
            let work = async {
                if deleted {
                    intake.image_deleted(image_id).await
                } else {
                    intake.image_queued(image_id, Some("who knows".into()), &tags).await
                }
            };
            tokio::select! {
                biased;
                () = died.cancelled() => {}
                result = work => if result.is_ok() {
                    let is_request = !deleted && asks(&tags);
                    if is_request {
                        self.world.lock().log(|| format!("acked {image_id}"));
                        self.acked.lock().unwrap_or_else(PoisonError::into_inner).insert(image_id);
                    }
                    return;
                },
            }
        }
    }

    pub fn notify(&self, image_id: Uuid, deleted: bool) {
        let copies = self.dice(|dice| match dice.below(10) {
            0 | 1 => 0,
            2..=7 => 1,
            8 => 2,
            _ => dice.below(10),
        });
        // what a notification says is of the moment when it was sent
        let image = self.world.lock().cloud.images.get(&image_id.to_string()).map(|r| r.image.clone());
        let tags = image.filter(|i| i.status == "queued").map(|i| i.tags).unwrap_or_default();
        for _ in 0..copies {
            tokio::spawn(self.clone().deliver(image_id, deleted, tags.clone()));
        }
    }

    /// A tenant who asked for an image that was refused asks again.
    pub fn ask_again(&self, image_id: Uuid) -> bool {
        let mut world = self.world.lock();
        let now = Instant::now();
        // the tenant sees that it is being worked on, also when that is by the operator's `retry`
        if world.ceph.job_records().iter().any(|j| j.image_id == image_id && !j.state.is_ended() && j.outcome.is_none())
        {
            return false;
        }
        let Some(record) = world.cloud.images.get_mut(&image_id.to_string()) else { return false };
        let asked = asks(&record.image.tags);
        if record.image.status != "queued" || asked || !record.requested {
            return false;
        }
        let owner = record.image.owner.clone();
        let Some(tag) = world.cloud.tag_for(owner.as_ref()) else { return false };
        world.log(|| format!("the tenant asks again for {image_id} with {tag}"));
        if let Some(record) = world.cloud.images.get_mut(&image_id.to_string()) {
            record.image.tags.push(tag);
            record.asked = now;
            if let TagRequest::Source(source) = request::parse_request_tags(&record.image.tags) {
                record.asks_for(source, now);
            }
        }
        drop(world);
        self.notify(image_id, false);
        true
    }

    pub async fn cancel(&self, image_id: Uuid) {
        let answer = self.store.cancel(image_id).await;
        self.world.lock().log(|| format!("the operator cancels {image_id}: {answer:?}"));
    }
}
