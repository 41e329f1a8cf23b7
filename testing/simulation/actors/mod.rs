//! Who acts in the world: the daemons with their clients, the tenants, Glance, Cinder, Nova. They change the state by
//! its rules, and tell the invariants what they do. Calls of a daemon go through the faults.

pub mod cinder;
pub mod client;
pub mod daemon;
pub mod glance;
pub mod handle;
pub mod job_clients;
pub mod nova;
pub mod objects;
pub mod region;
pub mod service;
pub mod services;
pub mod storage;
pub mod tenants;
