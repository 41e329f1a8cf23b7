//! Kinds of trouble that a world may have beside the ordinary accidents. Each lives in a layer of its own, and is on or
//! off by the seed; `RBD_OFFLOAD_SIMULATION_TROUBLE=half-done,imports` turns the named ones on in every seed.

use uuid::Uuid;

use super::scenario::Stage;
use super::world::{DEPLOYMENT, Dice, Faults, Killer, World};
use crate::config::Config;
use crate::publish::tag::OwnershipTag;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trouble {
    /// A call goes on after its caller dropped the future.
    LastingCalls,
    /// A client dies in the middle of a librbd call that takes several operations.
    HalfDone,
    /// The monitors refuse to fence anybody for a while.
    RefusedFences,
    /// A job under which its daemon dies, each time at the same call.
    KillingJob,
    /// Glance saves a record whole when it has hashed the data, as it read it before.
    WholeRecordSaves,
    /// Glance's tasks take minutes.
    SlowTasks,
    /// A tenant imports other bytes to a second store.
    Imports,
    /// A tenant changes the request tag while the job runs.
    ChangedTags,
    /// A tenant changes the disk format while the job runs.
    ChangedFormats,
    /// Volumes and images change hands.
    ChangedOwners,
    /// Listing a pool takes long.
    SlowLists,
    /// One of the daemons lacks a backend.
    MixedConfigurations,
    /// A call on Ceph for one job hangs for minutes.
    HangingCalls,
    /// Things that jobs left behind, of this deployment and of another one.
    Planted,
}

impl Trouble {
    const NAMES: [(&str, Self); 14] = [
        ("lasting-calls", Self::LastingCalls),
        ("half-done", Self::HalfDone),
        ("refused-fences", Self::RefusedFences),
        ("killing-job", Self::KillingJob),
        ("whole-record-saves", Self::WholeRecordSaves),
        ("slow-tasks", Self::SlowTasks),
        ("imports", Self::Imports),
        ("changed-tags", Self::ChangedTags),
        ("changed-formats", Self::ChangedFormats),
        ("changed-owners", Self::ChangedOwners),
        ("slow-lists", Self::SlowLists),
        ("mixed-configurations", Self::MixedConfigurations),
        ("hanging-calls", Self::HangingCalls),
        ("planted", Self::Planted),
    ];

    /// What every seed may have. The daemon does not keep every promise yet with the others.
    pub const ORDINARY: &[Self] = &[
        Self::LastingCalls,
        Self::HalfDone,
        Self::RefusedFences,
        Self::KillingJob,
        Self::HangingCalls,
        Self::WholeRecordSaves,
        Self::SlowTasks,
        Self::Imports,
        Self::ChangedTags,
        Self::ChangedFormats,
        Self::ChangedOwners,
        Self::MixedConfigurations,
    ];

    pub fn named(name: &str) -> Self {
        let found = Self::NAMES.iter().find(|(known, _)| *known == name);
        found.unwrap_or_else(|| panic!("no such trouble: {name}; there are {:?}", Self::NAMES.map(|(n, _)| n))).1
    }

    /// Those of `some` that this seed's world has.
    pub fn pick(dice: &mut Dice, some: &[Self]) -> Vec<Self> {
        some.iter().copied().filter(|_| dice.percent(20)).collect()
    }
}

/// How often things go wrong in a world with this trouble.
pub fn faults(dice: &mut Dice, trouble: &[Trouble]) -> Faults {
    let faults = Faults::of(dice);
    // what one call does to a daemon is seen where nothing else befalls it
    let calm = trouble.contains(&Trouble::HangingCalls) && dice.percent(60);
    let lasting = if trouble.contains(&Trouble::LastingCalls) { faults.lasting } else { 0 };
    if calm { Faults { lasting, ..Faults::default() } } else { Faults { lasting, ..faults } }
}

/// Brings in what is there from the beginning.
pub fn plant(world: &mut World, images: &[Uuid]) {
    if world.has(Trouble::KillingJob) {
        let call = *world.dice.pick(&["create snapshot", "open for", "clone", "copied", "flattened", "protect"]);
        let image_id = world.dice.pick(images).to_string();
        world.killer = Some(Killer { image_id, call, deaths: 0 });
    }
    if world.has(Trouble::Planted) {
        plant_leftovers(world);
    }
}

/// Copies and snapshots of jobs that have no record: those of this deployment go, those of another one stay.
fn plant_leftovers(world: &mut World) {
    let another = world.dice.uuid();
    let disks: Vec<String> = world.cloud.disks.values().map(|disk| disk.rbd.clone()).collect();
    for deployment in [Some(DEPLOYMENT), None, Some(another)] {
        let (image_id, request_id) = (world.dice.uuid(), world.dice.uuid());
        let ours = deployment != Some(another);
        let tag = match deployment {
            Some(deployment) => OwnershipTag::new(image_id, request_id, deployment),
            None => OwnershipTag { image_id, maker: None },
        };
        let name = format!("rbd-offload.{image_id}");
        if world.dice.percent(70) {
            let content = world.ceph.next();
            let copy = world.ceph.create("images", &name, content, ours);
            copy.metadata.insert(crate::transfer::MARK.into(), tag.to_string());
        }
        let disk = world.dice.pick(&disks).clone();
        // nobody else writes snapshots under such a name without a tag
        if world.dice.percent(70) && !world.cloud.disks.values().any(|d| d.rbd == disk && d.instance) {
            world.ceph.snap(&disk, &name, true, ours);
            if let Some(image) = world.ceph.by_id_mut(&disk) {
                image.snapshot_tags.insert(name, tag.to_string());
            }
        }
    }
}

/// The configuration of one of the daemons.
pub fn config_of(stage: &Stage, number: usize, config: &Config) -> Config {
    let mut config = config.clone();
    let mut world = stage.world.lock();
    if number > 0 && world.has(Trouble::MixedConfigurations) {
        config.backends.remove("ssd");
        config.offload.max_jobs = usize::try_from(1 + world.dice.below(4)).unwrap();
    }
    config
}
