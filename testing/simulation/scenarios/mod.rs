//! The tests: worlds that a seed makes up, and worlds in which one thing happens at one moment.

mod at_once;
mod changed_images;
mod copies;
mod custody;
mod holders;
mod large_cloud;
mod leftovers;
mod one_image;
mod planted;
mod requests;
mod seeded;
mod seeds;

use std::path::Path;
use std::sync::Arc;

use crate::config::{Config, PublishChoice};
use crate::job::clock::Clock;
use crate::job::simulation::faults::gate::Handle;
use crate::job::simulation::faults::node::Node;
use crate::job::simulation::faults::world::Shared;
use crate::job::simulation::state::at_once::GRACE;
use crate::job::store::Store;

/// Runs a test in a time that costs nothing.
fn run_in_virtual_time<T>(test: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap().block_on(test)
}

/// A daemon's configuration with this in `[offload]`, and with the backend `ceph`.
fn config(offload: &str, sections: &str) -> Config {
    let text = format!(
        "[messaging]\ntransport_url = rabbit://u:p@127.0.0.1:5672/\n\
         [keystone]\nauth_url = http://127.0.0.1:5000/v3\nusername = u\npassword = p\nproject_name = service\n\
         [offload]\n{offload}\n[backend:ceph]\npool = volumes\n{sections}"
    );
    Config::parse(Path::new("simulation.conf"), &text).unwrap_or_else(|e| panic!("{e}"))
}

/// The jobs as an operator's command line reaches them, which has no accidents.
fn operator(world: &Shared) -> Store {
    Store::new(Arc::new(Handle { node: Node::new(world, "operator".into(), true) }), Clock::System)
}

fn publish_at_once(config: &mut Config) {
    config.offload.publish = PublishChoice::AtOnce;
    config.offload.detach_grace = GRACE;
}
