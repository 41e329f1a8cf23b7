//! A service that handed its work over and waits for the image: the other side of `docs/explanation/handover.md`, as
//! Cinder's and Nova's integrations have it.

use std::time::Duration;

use tokio::time::{Instant, sleep};
use uuid::Uuid;

use super::glance;
use super::region::Region;
use crate::job::simulation::state::glance::{ImageRecord, TASK};
use crate::job::simulation::state::services::ServiceOutcome;
use crate::openstack::Image;
use crate::request::{self, GO_TAG};

const CLAIM: Duration = Duration::from_secs(10);
const START: Duration = Duration::from_secs(30);
const STALL: Duration = Duration::from_secs(120);
const DOUBT: Duration = Duration::from_secs(300);

/// What can be seen to move.
type Seen = [Option<String>; 3];

fn seen(image: &Image) -> Seen {
    let property = |name: &str| image.properties.get(name).cloned();
    ["rbd_offload_status", "rbd_offload_progress", "rbd_offload_message"].map(property)
}

impl Region {
    /// Waits for the image, or does the work itself.
    pub async fn service(self, image_id: Uuid) {
        let id = image_id.to_string();
        let outcome = self.wait(&id).await;
        let mut world = self.world.lock();
        world.log(|| format!("the service that waited for {id}: {outcome:?}"));
        if let Some(service) = world.cloud.services.get_mut(&id) {
            service.outcome = Some(outcome);
        }
        if outcome == ServiceOutcome::Raised {
            glance::delete_image(&mut world, &id);
        }
    }

    async fn wait(&self, id: &str) -> ServiceOutcome {
        let begun = Instant::now();
        let dies = self.dice(|dice| dice.percent(15).then(|| dice.millis(0, 60_000)));
        let (mut last, mut moved, mut has_commit_tag): (Seen, Instant, Option<Instant>) =
            ([None, None, None], begun, None);
        let mut waiting = begun;
        loop {
            let pause = self.dice(|dice| if dice.percent(2) { dice.millis(0, 200_000) } else { dice.millis(300, 700) });
            sleep(pause).await;
            if dies.is_some_and(|after| begun.elapsed() > after) {
                return ServiceOutcome::Died;
            }
            let image = {
                let world = self.world.lock();
                if world.cloud.away(true) { None } else { Some(world.cloud.images.get(id).map(|r| r.image.clone())) }
            };
            let Some(image) = image else { continue };
            let Some(image) = image else { return ServiceOutcome::Raised };
            let [status, ..] = seen(&image);
            if image.status == "active" {
                return ServiceOutcome::Done;
            }
            if matches!(status.as_deref(), Some("declined" | "failed")) {
                return self.do_it_itself(id).await;
            }
            if seen(&image) != last {
                (last, moved) = (seen(&image), Instant::now());
            }
            if matches!(status.as_deref(), Some("copying" | "publishing")) {
                waiting = Instant::now();
            }
            match has_commit_tag {
                Some(when) if when.elapsed() > DOUBT && !image.properties.contains_key(TASK) => {
                    if let Some(service) = self.world.lock().cloud.services.get_mut(id) {
                        service.doubted = true;
                    }
                    return self.do_it_itself(id).await;
                }
                None if status.is_none() && begun.elapsed() > CLAIM
                    || waiting.elapsed() > START
                    || moved.elapsed() > STALL =>
                {
                    return self.do_it_itself(id).await;
                }
                _ => {}
            }
            if status.as_deref() == Some("publishing") && !request::has_commit_tag(&image.tags) {
                has_commit_tag.get_or_insert_with(Instant::now);
                self.say_go(id);
            }
        }
    }

    fn say_go(&self, id: &str) {
        let mut world = self.world.lock();
        if let Some(service) = world.cloud.services.get_mut(id) {
            service.has_commit_tag = true;
        }
        // another change of the record at the same moment takes it off again
        let lost = world.dice.percent(20);
        world.log(|| format!("the service says go for {id}, lost={lost}"));
        if let Some(record) = world.cloud.images.get_mut(id).filter(|record| record.image.status == "queued" && !lost) {
            record.image.tags.push(GO_TAG.into());
        }
    }

    async fn do_it_itself(&self, id: &str) -> ServiceOutcome {
        {
            let mut world = self.world.lock();
            world.log(|| format!("the service does {id} itself"));
            if let Some(record) = world.cloud.images.get_mut(id) {
                take_tags_off(record);
            }
        }
        sleep(Duration::from_secs(1)).await;
        glance::upload(self.world.clone(), id.to_owned()).await;
        let world = self.world.lock();
        match world.cloud.images.get(id) {
            Some(record) if record.image.status == "active" => ServiceOutcome::Done,
            _ => ServiceOutcome::Raised,
        }
    }
}

fn take_tags_off(record: &mut ImageRecord) {
    record.image.properties.retain(|name, _| !name.starts_with("rbd_offload_"));
    record.image.tags.retain(|tag| !tag.starts_with(request::HANDOVER_PREFIX));
}
