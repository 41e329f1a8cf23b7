//! What happens in one seed's world: the tenants, the daemons' lives, the notifications, the accidents.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::{Instant, sleep};
use uuid::Uuid;

use super::at_once;
use super::checks;
use super::cloud::{self, Disk, Record};
use super::cluster::FSID;
use super::node::{Daemon, Handle, Node};
use super::service::Service;
use super::tenants;
use super::trouble::{self, Trouble};
use super::world::{Dice, Faults, Shared, World};
use crate::config::Config;
use crate::job::store::Store;
use crate::openstack::{Image, Volume, VolumeSnapshot};
use crate::request::{self, TagRequest};

const PROJECTS: [&str; 2] = ["blue", "green"];

/// How long the world may take to become quiet once nothing fails any more. A Glance task that is stuck without end is
/// given twenty-five minutes.
const QUIET_WITHIN: Duration = Duration::from_secs(60 * 60);

/// What the reconciler and the leases need to see everything once more.
const STAYS_QUIET: Duration = Duration::from_secs(150);

/// What the seed's events have in common.
#[derive(Clone)]
pub struct Stage {
    pub world: Shared,
    pub daemons: Arc<Mutex<Vec<Daemon>>>,
    /// Images whose notification was acked.
    pub acked: Arc<Mutex<BTreeSet<Uuid>>>,
    pub images: Vec<Uuid>,
    pub store: Store,
}

pub fn config(dice: &mut Dice) -> Config {
    let method = *dice.pick(&["auto", "server-copy", "clone", "copy"]);
    let in_use = dice.percent(50);
    let retries = dice.pick(&[1, 3, 5]).to_owned();
    let text = format!(
        "[messaging]\ntransport_url = rabbit://u:p@127.0.0.1:5672/\n\
         [keystone]\nauth_url = http://127.0.0.1:5000/v3\nusername = u\npassword = p\nproject_name = service\n\
         [offload]\nmethod = {method}\nallow_in_use = {in_use}\nretries = {retries}\nmax_jobs = 2\n\
         [cinder]\nintegration = true\n[backend:ceph]\npool = volumes\n[backend:ssd]\npool = ssd\n"
    );
    Config::parse(Path::new("simulation.conf"), &text).unwrap_or_else(|e| panic!("{e}"))
}

pub fn tag_of(disk: &Disk) -> String {
    let kind = if disk.instance { "instance" } else { "volume" };
    format!("rbd-offload:{kind}:{}", disk.volume.id)
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
            // the volume was made from an image whose mark it inherited
            rbd.metadata.insert(crate::transfer::MARK.into(), dice.uuid().to_string());
        }
        let rbd = rbd.id.clone();
        let status = if dice.percent(15) { "in-use" } else { "available" };
        let volume = Volume { status: status.into(), ..cloud::volume_on(backend, &id, &project) };
        let history = vec![(now, content)];
        let disk = Disk { volume, instance, rbd: rbd.clone(), history, deleted: None };
        sources.push((project.clone(), tag_of(&disk)));
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
        let requested = tags.iter().any(|t| t.starts_with("rbd-offload:"));
        let image = Image {
            id: id.to_string(),
            name: None,
            status: "queued".into(),
            owner: Some(owner),
            container_format: format.as_ref().map(|_| "bare".into()),
            disk_format: format,
            min_disk: 0,
            min_ram: 0,
            size: None,
            tags,
            properties: [("own".to_owned(), "1".to_owned())].into(),
        };
        let mut record = Record::new(image, source, now);
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
        image.metadata.insert(crate::transfer::MARK.into(), "other".into());
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

impl Stage {
    fn daemons(&self) -> std::sync::MutexGuard<'_, Vec<Daemon>> {
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
                    let is_request = !deleted && tags.iter().any(|t| t.starts_with("rbd-offload:"));
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
        if checks::jobs(&world).iter().any(|j| j.image_id == image_id && !j.state.is_ended() && j.outcome.is_none()) {
            return false;
        }
        let Some(record) = world.cloud.images.get_mut(&image_id.to_string()) else { return false };
        let asked = record.image.tags.iter().any(|t| t.starts_with("rbd-offload:"));
        if record.image.status != "queued" || asked || !record.requested {
            return false;
        }
        let owner = record.image.owner.clone();
        let tag =
            world.cloud.disks.values().find(|d| d.deleted.is_none() && Some(&d.volume.project_id) == owner.as_ref());
        let Some(tag) = tag.map(tag_of) else { return false };
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

    /// What befalls one image in the time of accidents.
    async fn tenant(self, image_id: Uuid, until: Instant) {
        self.notify(image_id, false);
        while Instant::now() < until {
            let pause = self.dice(|dice| dice.millis(500, 40_000));
            sleep(pause).await;
            if Instant::now() >= until {
                return;
            }
            let id = image_id.to_string();
            match self.dice(|dice| dice.below(40)) {
                0 => {
                    let deleted = cloud::delete_image(&mut self.world.lock(), &id);
                    if deleted {
                        self.notify(image_id, true);
                        return;
                    }
                }
                1 | 23 if self.world.lock().cloud.services.contains_key(&id) => {}
                1 => {
                    tokio::spawn(cloud::upload(self.world.clone(), id));
                }
                2..=12 => {
                    self.ask_again(image_id);
                }
                13 | 14 => self.cancel(image_id).await,
                15 | 16 => {
                    let _ = self.store.retry(image_id).await;
                }
                17..=19 => self.notify(image_id, false),
                // a forged notification says that it was deleted
                20 | 22 => self.notify(image_id, true),
                23 => foreign_data(&mut self.world.lock(), image_id),
                21 => {
                    if let Some(record) = self.world.lock().cloud.images.get_mut(&id) {
                        // the tenant changes something of its own
                        record.image.properties.insert("own".into(), "2".into());
                    }
                }
                _ => {}
            }
        }
    }

    /// Events at the worst moment: while Glance works on a location, or just when a job ends.
    async fn inject_races(self, until: Instant) {
        while Instant::now() < until {
            let pause = self.dice(|dice| dice.millis(50, 1_500));
            sleep(pause).await;
            let at_work: Vec<Uuid> = {
                let world = self.world.lock();
                let busy = |id: &&Uuid| {
                    world
                        .cloud
                        .images
                        .get(&id.to_string())
                        .is_some_and(|r| r.image.properties.contains_key(cloud::TASK))
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

    pub async fn cancel(&self, image_id: Uuid) {
        let answer = self.store.cancel(image_id).await;
        self.world.lock().log(|| format!("the operator cancels {image_id}: {answer:?}"));
    }

    /// What befalls the volumes and the services.
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
                    tokio::spawn(cloud::delete_instance(self.world.clone(), disk));
                }
                3 => cloud::delete_volume(&mut world, &disk),
                4 | 5 => cloud::purge_trash(&mut world),
                6..=9 => write_volume(&mut world, &disk),
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
            let calm = Instant::now() >= until;
            let accident = self.dice(|dice| dice.millis(20_000, 240_000));
            tokio::select! {
                biased;
                () = node.died.cancelled() => {}
                () = sleep(accident), if !calm => {
                    match self.dice(|dice| dice.below(4)) {
                        0 if Instant::now() < until => node.cut(self.dice(|dice| dice.millis(5_000, 100_000))),
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
        let until = Instant::now() + QUIET_WITHIN;
        while Instant::now() < until {
            sleep(Duration::from_secs(5)).await;
            if checks::is_quiet(self) {
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
        // a daemon that stands still goes on in its own time
    }
}

/// Another client puts an RBD image under the image's name while the copy is being made.
fn foreign_data(world: &mut World, image_id: Uuid) {
    let name = image_id.to_string();
    let copying = checks::jobs(world).iter().any(|j| j.image_id == image_id && j.is_preparing());
    let queued = world.cloud.images.get(&name).is_some_and(|r| r.image.status == "queued");
    if !copying || !queued || world.ceph.named("images", &name).is_some() {
        return;
    }
    let content = world.ceph.next();
    world.log(|| format!("another client makes images/{name}"));
    let id = world.ceph.create("images", &name, content, false).id.clone();
    world.ceph.snap(&id, "snap", true, false);
}

fn write_volume(world: &mut World, id: &str) {
    let content = world.ceph.next();
    let Some(disk) = world.cloud.disks.get_mut(id) else { return };
    if disk.deleted.is_some() {
        return;
    }
    disk.history.push((Instant::now(), content));
    let (project, rbd) = (disk.volume.project_id.clone(), disk.rbd.clone());
    world.cloud.projects.insert(content, project);
    if let Some(image) = world.ceph.by_id_mut(&rbd) {
        image.content = content;
    }
}

/// Runs one seed.
pub async fn run(seed: u64, nodes: u64, wanted: &[Trouble], trace: bool) -> (BTreeSet<String>, Vec<String>) {
    let mut dice = Dice::new(seed ^ (nodes << 48));
    let mut trouble = Trouble::pick(&mut dice, Trouble::ORDINARY);
    trouble.extend(wanted.iter().filter(|kind| !trouble.contains(kind)).copied().collect::<Vec<_>>());
    let faults = trouble::faults(&mut dice, &trouble);
    let mut config = config(&mut dice);
    let mut state = World::new(Dice::new(0), faults, trouble);
    // by dice of its own: the other worlds stay as they were
    let mut other_dice = Dice::new(seed ^ (nodes << 48) ^ 0xa7_0ce);
    if other_dice.percent(40) {
        at_once::configure(&mut config);
        state.ceph.at_once.is_asked_for = true;
        state.ceph.at_once.is_refused = other_dice.percent(15);
    }
    state.trace = trace.then(Vec::new);
    let images = images_of(&mut dice, &mut state);
    let foreign: Vec<_> = state.ceph.images.iter().filter(|i| i.pool == "images").cloned().collect();
    state.dice = dice;
    trouble::plant(&mut state, &images);
    let trouble = state.trouble.clone();
    state.log(|| format!("{faults:?} {trouble:?}"));
    let world = Shared(Arc::new(Mutex::new(state)));
    let command_line = Handle { node: Node::new(&world, "operator".into(), true) };
    let store = Store::new(Arc::new(command_line), crate::job::clock::Clock::System);
    let stage = Stage { world, daemons: Arc::default(), acked: Arc::default(), images, store };

    let length = stage.dice(|dice| dice.millis(60_000, 480_000));
    let until = Instant::now() + length;
    for number in 0..usize::try_from(nodes).unwrap() {
        let config = trouble::config_of(&stage, number, &config);
        tokio::spawn(stage.clone().controller(number, config, until));
    }
    for image_id in stage.images.clone() {
        tokio::spawn(stage.clone().tenant(image_id, until));
    }
    let services: Vec<Uuid> = {
        let world = stage.world.lock();
        stage.images.iter().copied().filter(|id| world.cloud.services.contains_key(&id.to_string())).collect()
    };
    for image_id in services {
        tokio::spawn(stage.clone().service(image_id));
    }
    tokio::spawn(stage.clone().inject_outages(until));
    tokio::spawn(stage.clone().inject_races(until));
    tokio::spawn(tenants::changes(stage.clone(), until));
    sleep(length).await;
    stage.calm();

    // every request comes to an end, and nothing stays behind
    settle(&stage, &foreign, "after the accidents").await;
    // and in a world without accidents every request is served
    let asked: Vec<Uuid> = stage.images.iter().copied().filter(|id| stage.ask_again(*id)).collect();
    if !asked.is_empty() {
        settle(&stage, &foreign, "after asking again").await;
        checks::all_served(&stage, &asked);
    }
    let mut world = stage.world.lock();
    (std::mem::take(&mut world.violations), world.trace.take().unwrap_or_default())
}

async fn settle(stage: &Stage, foreign: &[super::cluster::Rbd], when: &str) {
    // a daemon that stood still may wake up late, with an old request in its hands
    for _ in 0..5 {
        if !stage.quiet().await {
            break;
        }
        sleep(STAYS_QUIET).await;
        if checks::is_quiet(stage) {
            break;
        }
    }
    checks::all(stage, foreign, when);
}
