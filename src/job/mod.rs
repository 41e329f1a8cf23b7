//! Jobs: the record of each, its store in RADOS, the lease on it, and the engine that brings it to an end.
//!
//! A job is one object in RADOS. The daemon that holds the lease (a lock on that object, with a time limit that the OSD
//! keeps) may advance it. Any daemon may run a step again, after a crash at any point, with the same result.
//! `docs/explanation/jobs.md` draws the states.

pub mod backoff;
pub mod bindings;
mod cleanup;
pub mod clock;
pub mod context;
mod custody;
pub mod daemons;
pub mod deployment;
pub mod engine;
mod error;
mod held;
mod index_copy;
pub mod intake;
pub mod lease;
mod lost_record;
pub mod names;
mod old_record;
mod outcome_message;
pub mod reconcile;
pub mod record;
pub mod refusals;
pub mod run;
pub mod signal;
mod slots;
mod steps;
pub mod store;
mod turn;

#[cfg(test)]
#[path = "../../testing/simulation/mod.rs"]
mod simulation;
