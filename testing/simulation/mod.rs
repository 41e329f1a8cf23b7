//! The engine simulated: the real engine, reconciler and intake of one to three daemons over a cluster and services in
//! memory, in a time that costs nothing. A seed decides everything: who asks for what, what fails, which daemon dies or
//! freezes at which call. When the accidents are over, the world runs on until it is quiet. Then every promise is
//! checked.
//!
//! `RBD_OFFLOAD_SIMULATION_SEEDS=20000` runs more seeds, `RBD_OFFLOAD_SIMULATION_SEED=17` runs one and prints what
//! happened. `RBD_OFFLOAD_SIMULATION_TROUBLE` names further kinds of trouble (`faults/trouble.rs`).
//!
//! In layers, each of which uses the ones before it, never the reverse (`lint/imports` checks that):
//!
//! 1. `state`: the world as plain data with its rules.
//! 2. `faults`: what breaks.
//! 3. `invariants`: the promises.
//! 4. `actors`: who acts on the state, through the faults, under the eyes of the invariants.
//! 5. `scenarios`: the tests.

mod actors;
mod faults;
mod invariants;
mod scenarios;
mod state;
