//! What the commands have in common before they do their own work: the configuration, the store of the jobs, an image's
//! id.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;

use super::Failure;
use crate::ceph::{Client, ClientOptions};
use crate::config::Config;
use crate::job::clock::Clock;
use crate::job::store::Store;
use crate::notification::TransportUrl;
use crate::openstack;
use crate::request::parse_uuid;

/// How long calls that were given up may still run when a command ends: they remove what they made.
pub(super) const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(5);

/// Reads the configuration with every check that needs no network.
pub(super) fn load(path: &Path) -> Result<Config, Failure> {
    Ok(Config::load_with(path, &|url| TransportUrl::parse(url).map(drop).map_err(|e| e.to_string()))?)
}

/// How the configuration has us connect to Ceph.
pub(super) fn client_options(config: &Config) -> ClientOptions {
    let (keyring, data_pool) = (config.ceph.keyring.clone(), config.glance.data_pool.clone());
    ClientOptions { keyring, data_pool, ..ClientOptions::new(&config.ceph.conf, &config.ceph.user) }
}

/// The store of the jobs, by the configuration: what commands about jobs need, whether a daemon runs or not.
pub(super) async fn connect_store(path: &Path) -> Result<Store, Failure> {
    store_of(&load(path)?).await
}

pub(super) async fn store_of(config: &Config) -> Result<Store, Failure> {
    let client = Client::open(client_options(config)).await?;
    let objects = client.objects(&config.jobs.pool, &config.jobs.namespace)?;
    Ok(Store::new(Arc::new(objects), Clock::System))
}

/// An image's id on the command line.
pub(super) fn image_id(text: &str) -> Result<Uuid, String> {
    parse_uuid(text).ok_or_else(|| "an image's id is a UUID, like c99c2483-d3ea-4877-bd86-edb7c4607374".to_owned())
}

pub(super) fn no_such_job(image_id: Uuid) -> Failure {
    Failure::new(
        Failure::NO_INPUT,
        format!("there is no job for image {image_id}; `rbd-offload jobs --all` lists them"),
    )
}

/// What speaks against the destination pools of the configuration, by what Glance tells of its stores. Glance before 30
/// tells no fsid, and older ones no pool.
pub(super) fn store_problems(config: &Config, stores: &[openstack::GlanceStore], fsid: &str) -> Vec<String> {
    let known: Vec<&str> = stores.iter().filter_map(|store| store.pool.as_deref()).collect();
    if known.is_empty() {
        return Vec::new();
    }
    let mut problems = Vec::new();
    for (name, backend) in &config.backends {
        let pool = &backend.dest_pool;
        let mut same_pool = stores.iter().filter(|store| store.pool.as_deref() == Some(pool)).peekable();
        if same_pool.peek().is_none() {
            problems.push(format!(
                "[backend:{name}] dest_pool = {pool}: no Glance store lies in that pool; Glance's pools: {}",
                known.join(", ")
            ));
        } else if !same_pool.any(|store| store.may_be_in(fsid)) {
            problems.push(format!(
                "[backend:{name}] dest_pool = {pool}: Glance's store of that pool lies in another Ceph cluster than [ceph] conf ({fsid})"
            ));
        }
    }
    problems
}
