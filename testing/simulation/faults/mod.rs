//! What breaks: the seeded source of all trouble. It decides for each call whether it is late, fails, hangs, kills its
//! daemon, or goes on after its future was dropped.

pub mod dice;
pub mod gate;
pub mod lasting;
pub mod node;
pub mod odds;
pub mod trouble;
pub mod world;
