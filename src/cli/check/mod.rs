//! `check`: dials everything with the configuration, and names what does not hold and its mend.
//!
//! Nothing is changed, except that a tiny image and a tiny object come and go in the pools that the daemon writes to.
//! One failing check does not stop the others; what depends on it is skipped.

mod broker;
mod ceph;
mod cloud;
mod report;

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use super::{Failure, load, output, store_problems};
use crate::config::Config;
use report::Row;

/// For each check.
const LIMIT: Duration = Duration::from_secs(10);

const NO_ANSWER: &str = "no answer within";

#[derive(Debug, clap::Args)]
pub struct Args {
    /// An array of objects with check, result (ok, warning, fault, skipped), detail and mend.
    #[arg(long)]
    json: bool,
}

pub async fn check(path: &Path, args: Args) -> Result<ExitCode, Failure> {
    let config = load(path)?;
    let (broker, cloud, ceph) = tokio::join!(broker::check(&config), cloud::check(&config), ceph::check(&config));
    let mut rows = vec![configuration(path, &config)];
    rows.extend(broker);
    rows.extend(cloud.rows);
    rows.extend(ceph.rows);
    rows.push(stores(&config, cloud.stores.as_deref(), ceph.fsid.as_deref()));
    let text = if args.json { output::json(&rows)? } else { report::table(&rows, report::colours()) };
    output::print(&text)?;
    if ceph.stuck {
        // what still runs removes what it made, if Ceph answers it after all
        tokio::time::sleep(super::WIND_UP).await;
        crate::ceph::leave(1);
    }
    Ok(if rows.iter().all(Row::holds) { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn configuration(path: &Path, config: &Config) -> Row {
    let backends: Vec<&str> = config.backends.keys().map(String::as_str).collect();
    Row::ok("configuration", format!("{}; backends: {}", path.display(), backends.join(", ")))
}

/// Whether Glance finds what we put into the destination pools.
fn stores(config: &Config, stores: Option<&[crate::openstack::Store]>, fsid: Option<&str>) -> Row {
    const NAME: &str = "Glance stores";
    let (stores, fsid) = match (stores, fsid) {
        (Some(stores), Some(fsid)) => (stores, fsid),
        (None, _) => return Row::skipped(NAME, "Glance did not tell its stores"),
        (_, None) => return Row::skipped(NAME, "no connection to Ceph"),
    };
    let problems = store_problems(config, stores, fsid);
    if !problems.is_empty() {
        return Row::fault(
            NAME,
            problems.join("; "),
            "set dest_pool ([glance] pool is its default) to the pool of a Glance store in the cluster of [ceph] conf",
        );
    }
    let mut pools: Vec<&str> = stores.iter().filter_map(|store| store.pool.as_deref()).collect();
    pools.sort_unstable();
    match pools.is_empty() {
        false => Row::ok(NAME, format!("pools {}; fsid {fsid}", pools.join(", "))),
        true => Row::warning(
            NAME,
            "this Glance does not tell the pools of its stores",
            "make sure that each dest_pool is the rbd_store_pool of a Glance store, and its cluster that of [ceph] conf",
        ),
    }
}

/// A check that is given up when its time is over.
async fn within(name: &str, mend: &str, check: impl Future<Output = Row>) -> Row {
    match tokio::time::timeout(LIMIT, check).await {
        Ok(row) => row,
        Err(_) => Row::fault(name, format!("{NO_ANSWER} {} s", LIMIT.as_secs()), mend),
    }
}
