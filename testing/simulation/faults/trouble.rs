//! Kinds of trouble that a world may have beside the ordinary accidents. Each lives in a layer of its own, and is on or
//! off by the seed; `RBD_OFFLOAD_SIMULATION_TROUBLE=half-done,imports` turns the named ones on in every seed.

use super::dice::Dice;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trouble {
    /// A call goes on after its caller dropped the future.
    LastingCalls,
    /// A client dies in the middle of a librbd call that takes several operations.
    HalfDone,
    /// The monitors refuse to fence any client for a while.
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

    /// What every seed may have.
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
        Self::SlowLists,
        Self::Planted,
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
