//! The promises. Most are watched while they could be broken: an actor says here what it is about to do. The rest is
//! checked when the world is quiet.

pub mod promises;
pub mod publishing;
pub mod quiet;
pub mod readers;
