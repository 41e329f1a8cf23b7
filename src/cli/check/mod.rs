//! `check`: tests every connection and right that the configuration needs, and says how to fix what fails.
//!
//! Nothing is changed, except that tiny images and objects come and go in the pools that the daemon writes to, and an
//! image record without data in Glance.
//! One failing check does not stop the others; what depends on it is skipped.

mod broker;
mod ceph;
mod cloud;
mod end_to_end;
pub(super) mod report;

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use futures::future::join_all;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::setup::{load, store_problems};
use super::{Failure, output};
use crate::ceph::Client;
use crate::config::Config;
use crate::job::deployment::remedy;
use crate::openstack::CloudId;
use report::CheckResult;

/// For each check.
const LIMIT: Duration = Duration::from_secs(10);

/// How long `check` repeats a call that fails with a transient fault: about what a service's worker takes to start on
/// a busy host.
const RETRY_TIMEOUT: Duration = Duration::from_secs(8);
/// Between two attempts.
const PAUSE: Duration = Duration::from_secs(1);

/// How long calls may still run that were given up, before `check` ends without what they would have removed.
const CALLS_RETURN_WITHIN: Duration = Duration::from_secs(60);

const NO_ANSWER: &str = "no answer within";

#[derive(Debug, clap::Args)]
pub struct Args {
    /// An array of objects with check, result (ok, warning, fault, skipped), detail and remedy; the same exit status.
    #[arg(long)]
    json: bool,

    /// Also make a tiny image in the pool of each backend, publish it in Glance as a job does, download and delete it.
    #[arg(long)]
    probe: bool,
}

pub async fn check(path: &Path, args: Args) -> Result<ExitCode, Failure> {
    let config = load(path)?;
    let interrupted = CancellationToken::new();
    let listener = tokio::spawn(listen(interrupted.clone()));
    let (broker, cloud, ceph) = tokio::join!(broker::check(&config), cloud::check(&config), ceph::check(&config));
    let mut rows = vec![configuration(path, &config)];
    rows.extend(broker);
    rows.extend(cloud.rows);
    rows.extend(ceph.rows);
    rows.push(stores(&config, cloud.stores.as_deref(), ceph.fsid.as_deref()));
    rows.push(jobs_cloud(&config, cloud.cloud.as_ref(), ceph.jobs_cloud.as_ref()));
    let mut clients = Vec::from_iter(ceph.client);
    if args.probe {
        let is_ready = cloud.cloud.is_some() && ceph.fsid.is_some();
        let probed = end_to_end::check(&config, is_ready, &interrupted).await;
        rows.extend(probed.rows);
        clients.extend(probed.client);
    } else {
        rows.extend(end_to_end::unprobed(&config));
    }
    listener.abort();
    let text = if args.json { output::json(&rows)? } else { report::table(&rows, output::colours()) };
    output::print(&text)?;
    if ceph.stuck || clients.iter().any(Client::is_busy) {
        await_calls(&clients).await;
        crate::ceph::exit_now(1);
    }
    Ok(if rows.iter().all(CheckResult::passed) { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Waits for calls that were given up: they remove what they made, if Ceph answers them after all.
async fn await_calls(clients: &[Client]) {
    if clients.iter().any(Client::is_busy) {
        let within = CALLS_RETURN_WITHIN.as_secs();
        output::eprint_line(&format!("check waits up to {within} s for Ceph, to remove its test images"));
    }
    let are_back = tokio::select! {
        waited = timeout(CALLS_RETURN_WITHIN, join_all(clients.iter().map(Client::quiet))) => waited.is_ok(),
        () = signalled() => false,
    };
    if !are_back {
        output::eprint_line(
            "images rbd-offload.check-… and rbd-offload.probe-… may be left; a check an hour from now removes them",
        );
    }
}

/// Fires at the first SIGINT or SIGTERM. What `check` made is removed before it ends.
async fn listen(interrupted: CancellationToken) {
    signalled().await;
    output::eprint_line("interrupted; ends when its test objects are removed");
    interrupted.cancel();
}

/// Returns at the next SIGINT or SIGTERM.
async fn signalled() {
    let (Ok(mut interrupt), Ok(mut terminate)) = (signal(SignalKind::interrupt()), signal(SignalKind::terminate()))
    else {
        return std::future::pending().await;
    };
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
}

fn configuration(path: &Path, config: &Config) -> CheckResult {
    let backends: Vec<&str> = config.backends.keys().map(String::as_str).collect();
    CheckResult::ok("configuration", format!("{}; backends: {}", path.display(), backends.join(", ")))
}

/// Whether the jobs of the namespace are this cloud's.
fn jobs_cloud(config: &Config, own: Option<&CloudId>, stored: Option<&Option<CloudId>>) -> CheckResult {
    const NAME: &str = "cloud of the jobs";
    match (own, stored) {
        (None, _) => CheckResult::skipped(NAME, "no login at Keystone"),
        (_, None) => CheckResult::skipped(NAME, "the jobs namespace cannot be read"),
        (Some(own), Some(None)) => {
            CheckResult::ok(NAME, format!("none yet; the first daemon makes it this one: {own}"))
        }
        (Some(own), Some(Some(stored))) if own == stored => CheckResult::ok(NAME, own.to_string()),
        (Some(own), Some(Some(stored))) => CheckResult::fault(
            NAME,
            format!("the jobs belong to another cloud ({stored}; this one is {own})"),
            remedy(&config.jobs.pool, &config.jobs.namespace),
        ),
    }
}

/// Whether Glance finds what we put into the destination pools.
fn stores(config: &Config, stores: Option<&[crate::openstack::GlanceStore]>, fsid: Option<&str>) -> CheckResult {
    const NAME: &str = "Glance stores";
    let (stores, fsid) = match (stores, fsid) {
        (Some(stores), Some(fsid)) => (stores, fsid),
        (None, _) => return CheckResult::skipped(NAME, "Glance did not tell its stores"),
        (_, None) => return CheckResult::skipped(NAME, "no connection to Ceph"),
    };
    let problems = store_problems(config, stores, fsid);
    if !problems.is_empty() {
        return CheckResult::fault(
            NAME,
            problems.join("; "),
            "set dest_pool ([glance] pool is its default) to the pool of a Glance store in the cluster of [ceph] conf",
        );
    }
    let mut pools: Vec<&str> = stores.iter().filter_map(|store| store.pool.as_deref()).collect();
    pools.sort_unstable();
    match pools.is_empty() {
        false => CheckResult::ok(NAME, format!("pools {}; fsid {fsid}", pools.join(", "))),
        true => CheckResult::warning(
            NAME,
            "this Glance does not tell the pools of its stores",
            "make sure that each dest_pool is the rbd_store_pool of a Glance store, and its cluster that of [ceph] conf",
        ),
    }
}

/// One check. It repeats a call with a transient fault for [`RETRY_TIMEOUT`], and the row says so: a service that has
/// just started, or that is busy for a moment, is no fault. A check without an answer within [`LIMIT`] is tried once
/// more: the services remember a token that they have validated, so a slow first answer is followed by a quick one.
async fn within(name: &str, remedy: &str, check: impl AsyncFnMut() -> CheckResult) -> CheckResult {
    attempts(name, remedy, 2, check).await
}

/// [`within`], for a call that goes on when it is given up: a second one would hang beside it.
async fn within_once(name: &str, remedy: &str, check: impl AsyncFnMut() -> CheckResult) -> CheckResult {
    attempts(name, remedy, 1, check).await
}

/// `silences`: attempts that may end without an answer.
async fn attempts(
    name: &str,
    remedy: &str,
    mut silences: u32,
    mut check: impl AsyncFnMut() -> CheckResult,
) -> CheckResult {
    let begun = Instant::now();
    let mut attempts = 1;
    let mut row = loop {
        match timeout(LIMIT, check()).await {
            Ok(row) if !row.transient || begun.elapsed() + PAUSE > RETRY_TIMEOUT => break row,
            Ok(_) => {}
            Err(_) => {
                silences = silences.saturating_sub(1);
                if silences == 0 {
                    break CheckResult::fault(name, format!("{NO_ANSWER} {} s", LIMIT.as_secs()), remedy);
                }
            }
        }
        sleep(PAUSE).await;
        attempts += 1;
    };
    if attempts > 1 {
        row.note_attempt(attempts, begun.elapsed());
    }
    row
}

#[cfg(test)]
mod tests {
    use super::report::Verdict;
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_transient_fault_is_tried_again_and_the_row_says_so() {
        let mut left = 3;
        let row = within("Cinder", "", async || {
            left -= 1;
            match left {
                0 => CheckResult::ok("Cinder", "answers"),
                _ => CheckResult::fault("Cinder", "503", "wait").transient_if(true),
            }
        })
        .await;
        assert_eq!((row.verdict, row.detail.as_str()), (Verdict::Ok, "answers; attempt 3, after 2 s"));
    }

    #[tokio::test(start_paused = true)]
    async fn a_transient_fault_that_stays_is_a_fault_after_a_few_seconds() {
        let begun = Instant::now();
        let row = within("Cinder", "", async || CheckResult::fault("Cinder", "503", "wait").transient_if(true)).await;
        assert_eq!(row.verdict, Verdict::Fault);
        assert!(row.detail.starts_with("503; attempt ") && begun.elapsed() <= RETRY_TIMEOUT, "{row:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_service_is_asked_twice_and_a_silent_ceph_once() {
        let begun = Instant::now();
        let row = within("Glance", "", async || std::future::pending().await).await;
        assert!(row.detail.starts_with(NO_ANSWER) && row.detail.contains("; attempt 2"), "{row:?}");
        assert!(begun.elapsed() <= 2 * LIMIT + PAUSE, "{:?}", begun.elapsed());
        let begun = Instant::now();
        let row = within_once("Ceph", "", async || std::future::pending().await).await;
        assert_eq!((row.detail.as_str(), begun.elapsed()), ("no answer within 10 s", LIMIT));
    }

    #[tokio::test(start_paused = true)]
    async fn a_permanent_fault_is_not_retried() {
        let begun = Instant::now();
        let mut attempts = 0;
        let row = within("Keystone", "", async || {
            attempts += 1;
            CheckResult::fault("Keystone", "401", "fix the password")
        })
        .await;
        assert_eq!((row.detail.as_str(), attempts, begun.elapsed()), ("401", 1, Duration::ZERO));
    }
}
