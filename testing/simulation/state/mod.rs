//! The world as plain data with its rules: what lies in Ceph, what Glance, Cinder and Nova know. Here nothing fails but
//! by a rule, nothing waits, and nothing is left to chance.

pub mod at_once;
pub mod cloud;
pub mod cluster;
pub mod glance;
pub mod jobs;
pub mod objects;
pub mod rbd;
pub mod services;

use uuid::Uuid;

/// Id of the deployment that all daemons of the world belong to.
pub const DEPLOYMENT: Uuid = Uuid::from_u128(0xdeb1_0000_0000_4000_8000_0000_0000_0001);
