//! rbd-offload turns a volume, a volume snapshot or an instance's disk into a Glance image inside the Ceph cluster.
//!
//! How a request flows through the modules, in one direction. Each stage passes a plain type to the next:
//!
//! ```text
//! AMQP delivery → notification → request → job (stored in RADOS, then acked) → claim (lease)
//!   → plan → steps (snapshot, transfer, …, register, finish) → done
//! ```
//!
//! `ceph`, `openstack` and `config` know nothing of jobs; `unsafe` lives in `ceph` only.

pub mod ceph;
pub mod cli;
pub mod config;
pub mod decline;
pub mod job;
pub mod notification;
pub mod openstack;
pub mod plan;
pub mod publish;
pub mod request;
pub mod telemetry;
pub mod text;
pub mod transfer;
