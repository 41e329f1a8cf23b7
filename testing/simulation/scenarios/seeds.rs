//! Every promise is kept in each world that a seed makes up.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use super::{run_in_virtual_time, seeded};
use crate::job::simulation::faults::trouble::Trouble;

/// Seeds of an ordinary test run, shared by all the tests below.
const SEEDS: u64 = 300;

/// Runs one seed to its end; returns the promises that it broke, and what happened if that was asked for.
fn run(seed: u64, nodes: u64, trouble: &[Trouble], trace: bool) -> (BTreeSet<String>, Vec<String>) {
    run_in_virtual_time(seeded::run(seed, nodes, trouble, trace))
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// The kinds of trouble that every seed is to have.
fn wanted() -> Option<Vec<Trouble>> {
    let names = std::env::var("RBD_OFFLOAD_SIMULATION_TROUBLE").ok()?;
    Some(names.split(',').filter(|name| !name.is_empty()).map(Trouble::named).collect())
}

/// Runs this share of the seeds with so many daemons.
fn hold(nodes: u64) {
    let trouble = wanted().unwrap_or_default();
    if let Some(seed) = number("RBD_OFFLOAD_SIMULATION_SEED") {
        let (violations, trace) = run(seed, nodes, &trouble, true);
        for line in trace {
            println!("{line}");
        }
        assert!(violations.is_empty(), "seed {seed}, {nodes} daemons: {violations:#?}");
        return;
    }
    let seeds = number("RBD_OFFLOAD_SIMULATION_SEEDS").unwrap_or(SEEDS).div_ceil(3);
    let first = number("RBD_OFFLOAD_SIMULATION_FIRST").unwrap_or(0);
    let mut broken = String::new();
    let mut count = 0;
    for seed in first..first + seeds {
        let (violations, _) = run(seed, nodes, &trouble, false);
        if !violations.is_empty() {
            let _ = writeln!(broken, "seed {seed}, {nodes} daemons: {violations:#?}");
            count += 1;
            if count >= 5 {
                break;
            }
        }
    }
    assert!(broken.is_empty(), "{broken}run one with RBD_OFFLOAD_SIMULATION_SEED=<seed>");
}

#[test]
fn one_daemon_keeps_every_promise_whatever_fails() {
    hold(1);
}

#[test]
fn two_daemons_keep_every_promise_whatever_fails() {
    hold(2);
}

#[test]
fn three_daemons_keep_every_promise_whatever_fails() {
    hold(3);
}
