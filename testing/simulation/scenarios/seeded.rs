//! What happens in one seed's world: who is there, the daemons' lives, the accidents.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::{Instant, sleep};
use uuid::Uuid;

use super::{operator, planted};
use crate::config::Config;
use crate::job::simulation::actors::daemon::Daemon;
use crate::job::simulation::actors::region::Region;
use crate::job::simulation::actors::{cinder, nova, tenants};
use crate::job::simulation::faults::dice::Dice;
use crate::job::simulation::faults::odds::Faults;
use crate::job::simulation::faults::trouble::Trouble;
use crate::job::simulation::faults::world::{Shared, World};
use crate::job::simulation::invariants::quiet;
use crate::job::simulation::state::cloud::{self, Disk};
use crate::job::simulation::state::cluster::{FSID, Rbd};
use crate::job::simulation::state::glance::{ImageRecord, TASK};
use crate::job::simulation::state::services::Service;
use crate::openstack::{Volume, VolumeSnapshot};
use crate::request::{self, TagRequest};
use crate::transfer::OWNERSHIP_TAG;

const PROJECTS: [&str; 2] = ["blue", "green"];

/// How long the world may take to become quiet once nothing fails any more. A Glance task that is stuck without end is
/// given twenty-five minutes.
const QUIET_WITHIN: Duration = Duration::from_secs(60 * 60);

/// What the reconciler and the leases need to see everything once more.
const STAYS_QUIET: Duration = Duration::from_secs(150);

/// The same where lists are slow: a round takes up to ten minutes, and its sweep looks at one or two images. A daemon
/// of another configuration does its rounds between those.
const QUIET_WITHIN_SLOW_LISTS: Duration = Duration::from_secs(8 * 60 * 60);
const STAYS_QUIET_SLOW_LISTS: Duration = Duration::from_secs(15 * 60);

pub fn config(dice: &mut Dice) -> Config {
    let method = *dice.pick(&["auto", "server-copy", "clone", "copy"]);
    let in_use = dice.percent(50);
    let retries = dice.pick(&[1, 3, 5]).to_owned();
    let offload = format!("method = {method}\nallow_in_use = {in_use}\nretries = {retries}\nmax_jobs = 2");
    super::config(&offload, "[cinder]\nintegration = true\n[backend:ssd]\npool = ssd\n")
}

/// The configuration of one of the daemons.
fn config_of(region: &Region, number: usize, config: &Config) -> Config {
    let mut config = config.clone();
    let mut world = region.world.lock();
    if number > 0 && world.has(Trouble::MixedConfigurations) {
        config.backends.remove("ssd");
        config.offload.max_jobs = usize::try_from(1 + world.dice.below(4)).unwrap();
    }
    config
}

fn images_of(dice: &mut Dice, world: &mut World) -> Vec<Uuid> {
    let now = Instant::now();
    let mut sources = Vec::new();
    for _ in 0..1 + dice.below(3) {
        let id = dice.uuid().to_string();
        let project = (*dice.pick(&PROJECTS)).to_owned();
        let instance = dice.percent(25);
        let backend = *dice.pick(&["ceph", "ceph", "ssd"]);
        let (pool, name) = match backend {
            _ if instance => ("vms", format!("{id}_disk")),
            "ceph" => ("volumes", format!("volume-{id}")),
            _ => ("ssd", format!("volume-{id}")),
        };
        let content = world.ceph.next();
        if dice.percent(7) {
            world.ceph.containers.insert(content);
        }
        world.cloud.projects.insert(content, project.clone());
        let lacks_layering = dice.percent(10);
        let rbd = world.ceph.create(pool, &name, content, false);
        if lacks_layering {
            rbd.features &= !1;
        }
        if dice.percent(20) {
            // the volume was made from an image whose ownership tag it inherited
            rbd.metadata.insert(OWNERSHIP_TAG.into(), dice.uuid().to_string());
        }
        let rbd = rbd.id.clone();
        let status = if dice.percent(15) { "in-use" } else { "available" };
        let volume = Volume { status: status.into(), ..cloud::volume_on(backend, &id, &project) };
        let history = vec![(now, content)];
        let disk = Disk { volume, instance, rbd: rbd.clone(), history, deleted: None };
        sources.push((project.clone(), disk.tag()));
        world.cloud.disks.insert(id.clone(), disk);
        if !instance && dice.percent(30) {
            let snap = dice.uuid().to_string();
            world.ceph.snap(&rbd, &format!("snapshot-{snap}"), true, false);
            let snapshot = VolumeSnapshot {
                id: snap.clone(),
                volume_id: id,
                project_id: project.clone(),
                status: "available".into(),
                size: 1,
            };
            world.cloud.snapshots.insert(snap.clone(), (snapshot, content));
            sources.push((project, format!("rbd-offload:snapshot:{snap}")));
        }
    }
    let mut images = Vec::new();
    for _ in 0..1 + dice.below(4) {
        let id = dice.uuid();
        let (project, tag) = dice.pick(&sources).clone();
        // Cinder made the record, and waits
        let handed_over = tag.starts_with("rbd-offload:volume:") && dice.percent(25);
        let owner = if dice.percent(7) { (*dice.pick(&PROJECTS)).to_owned() } else { project };
        let tags = match dice.below(20) {
            _ if handed_over => {
                let offer = tag.replacen(request::TAG_PREFIX, request::HANDOVER_PREFIX, 1);
                vec![format!("{offer}@{FSID}"), "blue".into()]
            }
            0 => vec![tag, sources[0].1.clone(), "rbd-offload:volume:x".into()],
            1 => vec!["rbd-offload:volume:not-an-id".into()],
            2 => vec!["other".into()],
            _ => vec![tag, "blue".into()],
        };
        let format = match dice.below(10) {
            _ if handed_over => Some("raw".to_owned()),
            0 => Some("qcow2".to_owned()),
            1..=4 => Some("raw".to_owned()),
            _ => None,
        };
        let source = match request::parse_request_tags(&tags) {
            TagRequest::Source(source) => Some(source),
            _ => request::parse_offer_tag(&tags).map(|offer| offer.source),
        };
        let requested = cloud::asks(&tags);
        let mut record = ImageRecord::queued(id, &owner, tags, source);
        record.image.container_format = format.as_ref().map(|_| "bare".into());
        record.image.disk_format = format;
        record.requested = requested;
        world.cloud.images.insert(id.to_string(), record);
        if handed_over {
            world.cloud.services.insert(id.to_string(), Service::default());
        }
        images.push(id);
    }
    // what is none of our business, under names like ours
    for name in [format!("rbd-offload.{}", dice.uuid()), dice.uuid().to_string(), "rbd-offload.mine".into()] {
        let content = world.ceph.next();
        let image = world.ceph.create("images", &name, content, false);
        image.metadata.insert(OWNERSHIP_TAG.into(), "other".into());
        let id = image.id.clone();
        world.ceph.snap(&id, "snap", true, false);
    }
    if dice.percent(10) {
        let name = if dice.percent(50) { images[0].to_string() } else { format!("rbd-offload.{}", images[0]) };
        let content = world.ceph.next();
        world.ceph.create("images", &name, content, false);
    }
    images
}

impl Region {
    /// Events at the worst moment: while Glance works on a location, or just when a job ends.
    async fn inject_races(self, until: Instant) {
        while Instant::now() < until {
            let pause = self.dice(|dice| dice.millis(50, 1_500));
            sleep(pause).await;
            let at_work: Vec<Uuid> = {
                let world = self.world.lock();
                let busy = |id: &&Uuid| {
                    world.cloud.images.get(&id.to_string()).is_some_and(|r| r.image.properties.contains_key(TASK))
                };
                self.images.iter().filter(busy).copied().collect()
            };
            for image_id in at_work {
                match self.dice(|dice| dice.below(24)) {
                    0 => self.cancel(image_id).await,
                    1 => self.notify(image_id, true),
                    2 => self.notify(image_id, false),
                    3 => {
                        let index = self.dice(Dice::roll);
                        let daemons = self.daemons();
                        if !daemons.is_empty() {
                            daemons[usize::try_from(index % daemons.len() as u64).unwrap()].node.kill();
                        }
                    }
                    _ => {}
                }
            }
        }
    }

    /// What happens to the volumes and the services.
    async fn inject_outages(self, until: Instant) {
        while Instant::now() < until {
            let pause = self.dice(|dice| dice.millis(500, 30_000));
            sleep(pause).await;
            if Instant::now() >= until {
                return;
            }
            let mut world = self.world.lock();
            let now = Instant::now();
            let long = world.dice.millis(5_000, 100_000);
            let disks: Vec<String> = world.cloud.disks.keys().cloned().collect();
            let disk = world.dice.pick(&disks).clone();
            match world.dice.below(16) {
                0 => world.cloud.glance_away_until = Some(now + long),
                1 => world.cloud.cinder_away_until = Some(now + long),
                2 => world.ceph_slow_until = Some(now + long),
                3 if world.cloud.disks.get(&disk).is_some_and(|disk| disk.instance) => {
                    tokio::spawn(nova::delete_instance(self.world.clone(), disk));
                }
                3 => cinder::delete_volume(&mut world, &disk),
                4 | 5 => cloud::purge_trash(&mut world.ceph),
                6..=9 => {
                    let world = &mut *world;
                    world.cloud.write_volume(&mut world.ceph, &disk);
                }
                _ => {}
            }
        }
    }

    /// The life of one controller's daemon: it starts, dies, is cut off, is drained, starts again.
    async fn controller(self, number: usize, config: Config, until: Instant) {
        let mut life = 0;
        loop {
            life += 1;
            let daemon = Daemon::start(&self.world, format!("node{number}.{life}"), config.clone());
            let (node, stop, drain, ended) =
                (Arc::clone(&daemon.node), daemon.stop.clone(), daemon.drain.clone(), daemon.ended.clone());
            self.daemons().push(daemon);
            let accident = self.dice(|dice| dice.millis(20_000, 240_000));
            // one that would come later does not happen: others decline what only a daemon that starts again can do
            let calm = Instant::now() + accident >= until;
            tokio::select! {
                biased;
                () = node.died.cancelled() => {}
                () = sleep(accident), if !calm => {
                    match self.dice(|dice| dice.below(4)) {
                        0 => node.cut(self.dice(|dice| dice.millis(5_000, 100_000))),
                        1 => {}
                        _ => {
                            let (patience, killed) = self.dice(|dice| (dice.millis(0, 10_000), dice.percent(30)));
                            self.world.lock().log(|| format!("node{number} is told to stop"));
                            stop.cancel();
                            sleep(patience).await;
                            drain.cancel();
                            if !killed {
                                tokio::select! {
                                    biased;
                                    () = node.died.cancelled() => {}
                                    () = ended.cancelled() => {}
                                    () = sleep(Duration::from_secs(60)) => {}
                                }
                            }
                            node.kill();
                        }
                    }
                    node.died.cancelled().await;
                }
            }
            self.daemons().retain(|d| !d.node.is_dead());
            let pause = self.dice(|dice| dice.millis(500, 60_000));
            sleep(pause).await;
        }
    }

    /// Waits until nothing is left to do. `false`: it never was.
    async fn quiet(&self) -> bool {
        let slow = self.world.lock().has(Trouble::SlowLists);
        let until = Instant::now() + if slow { QUIET_WITHIN_SLOW_LISTS } else { QUIET_WITHIN };
        while Instant::now() < until {
            sleep(Duration::from_secs(5)).await;
            if quiet::is_quiet(&self.world.lock()) {
                return true;
            }
        }
        false
    }

    fn calm(&self) {
        let mut world = self.world.lock();
        world.log(|| "---- no more accidents".into());
        world.faults = Faults { calm: true, ..Faults::default() };
        world.cloud.glance_away_until = None;
        world.cloud.cinder_away_until = None;
        world.ceph_slow_until = None;
        world.fences_refused_until = None;
        drop(world);
        // a frozen daemon goes on in its own time
    }
}

/// Runs one seed.
pub async fn run(seed: u64, nodes: u64, wanted: &[Trouble], trace: bool) -> (BTreeSet<String>, Vec<String>) {
    let mut dice = Dice::new(seed ^ (nodes << 48));
    let mut trouble = Trouble::pick(&mut dice, Trouble::ORDINARY);
    trouble.extend(wanted.iter().filter(|kind| !trouble.contains(kind)).copied().collect::<Vec<_>>());
    let faults = Faults::with(&mut dice, &trouble);
    let mut config = config(&mut dice);
    let mut state = World::new(Dice::new(0), faults, trouble);
    // by dice of its own: the other worlds stay as they were
    let mut other_dice = Dice::new(seed ^ (nodes << 48) ^ 0xa7_0ce);
    if other_dice.percent(40) {
        super::publish_at_once(&mut config);
        state.ceph.at_once.is_asked_for = true;
        state.ceph.at_once.is_refused = other_dice.percent(15);
    }
    state.trace = trace.then(Vec::new);
    let images = images_of(&mut dice, &mut state);
    let foreign: Vec<_> = state.ceph.images.iter().filter(|i| i.pool == "images").cloned().collect();
    state.dice = dice;
    planted::plant(&mut state, &images);
    let trouble = state.trouble.clone();
    state.log(|| format!("{faults:?} {trouble:?}"));
    let world = Shared(Arc::new(Mutex::new(state)));
    let store = operator(&world);
    let region = Region { world, daemons: Arc::default(), acked: Arc::default(), images, store };

    let length = region.dice(|dice| dice.millis(60_000, 480_000));
    let until = Instant::now() + length;
    for number in 0..usize::try_from(nodes).unwrap() {
        let config = config_of(&region, number, &config);
        tokio::spawn(region.clone().controller(number, config, until));
    }
    for image_id in region.images.clone() {
        tokio::spawn(region.clone().tenant(image_id, until));
    }
    let services: Vec<Uuid> = {
        let world = region.world.lock();
        region.images.iter().copied().filter(|id| world.cloud.services.contains_key(&id.to_string())).collect()
    };
    for image_id in services {
        tokio::spawn(region.clone().service(image_id));
    }
    tokio::spawn(region.clone().inject_outages(until));
    tokio::spawn(region.clone().inject_races(until));
    tokio::spawn(tenants::changes(region.clone(), until));
    sleep(length).await;
    region.calm();

    // every request comes to an end, and nothing stays behind
    settle(&region, &foreign, "after the accidents").await;
    // and in a world without accidents every request is served
    let asked: Vec<Uuid> = region.images.iter().copied().filter(|id| region.ask_again(*id)).collect();
    if !asked.is_empty() {
        settle(&region, &foreign, "after asking again").await;
        quiet::all_served(&mut region.world.lock(), &asked);
    }
    let mut world = region.world.lock();
    (std::mem::take(&mut world.violations), world.trace.take().unwrap_or_default())
}

async fn settle(region: &Region, foreign: &[Rbd], when: &str) {
    let slow = region.world.lock().has(Trouble::SlowLists);
    // a daemon that was frozen may wake up late, with an old request in its hands
    for _ in 0..5 {
        if !region.quiet().await {
            break;
        }
        sleep(if slow { STAYS_QUIET_SLOW_LISTS } else { STAYS_QUIET }).await;
        if quiet::is_quiet(&region.world.lock()) {
            break;
        }
    }
    let acked = region.acked.lock().unwrap_or_else(PoisonError::into_inner).clone();
    quiet::check(&mut region.world.lock(), &acked, &region.images, foreign, when);
}
