//! The commands: one file each, which parses its arguments, calls what does the work and shows the outcome.
//!
//! Data goes to standard output, everything else to standard error; the exit status follows sysexits(3).

mod cancel;
mod check;
mod completions;
mod failure;
mod jobs;
mod man;
mod output;
mod replay;
mod request;
mod retry;
mod run;
mod show;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::{Parser, Subcommand};
use uuid::Uuid;

use crate::ceph::Client;
use crate::config::{self, Config};
use crate::job::clock::Clock;
use crate::job::store::Store;
use crate::notification::TransportUrl;
use crate::openstack;
use crate::request::parse_uuid;

pub use failure::Failure;

/// How long calls that were given up may still run when a command ends: they remove what they made.
const WIND_UP: Duration = Duration::from_secs(5);

/// Turns volumes, snapshots and instances into Glance images inside the Ceph cluster.
#[derive(Debug, Parser)]
#[command(name = "rbd-offload", version, max_term_width = 100)]
pub struct Cli {
    /// The configuration file; `conf.d/*.conf` beside it is read after it.
    #[arg(long, global = true, value_name = "FILE", default_value = config::DEFAULT_PATH)]
    config: PathBuf,

    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the daemon.
    Run,
    /// Test every connection of the configuration; exit 0 only if every check passes.
    Check(check::Args),
    /// List the jobs of the whole cluster.
    Jobs(jobs::Args),
    /// Show one job.
    Show(show::Args),
    /// Start a job again that was declined, failed or was cancelled.
    Retry(retry::Args),
    /// Stop a job and remove what it made.
    Cancel(cancel::Args),
    /// Ask for an image, as a tenant: with OS_* variables or clouds.yaml, without the configuration file.
    Request(request::Args),
    /// Feed notifications from a file, as if they had come from the broker.
    Replay(replay::Args),
    /// Print the completions of a shell.
    Completions(completions::Args),
    /// Print a manual page.
    Man(man::Args),
}

impl Cli {
    pub fn run(self) -> Result<ExitCode, Failure> {
        keep_memory_private()?;
        let config = self.config.as_path();
        match self.command {
            Command::Run => blocking(run::run(config)),
            Command::Check(args) => blocking(check::check(config, args)),
            Command::Jobs(args) => blocking(jobs::jobs(config, args)),
            Command::Show(args) => blocking(show::show(config, args)),
            Command::Retry(args) => blocking(retry::retry(config, args)),
            Command::Cancel(args) => blocking(cancel::cancel(config, args)),
            Command::Request(args) => blocking(request::request(args)),
            Command::Replay(args) => blocking(replay::replay(config, args)),
            Command::Completions(args) => completions::completions(args),
            Command::Man(args) => man::man(args),
        }
    }
}

/// Memory holds passwords and tokens: no core is written of it, and no other process of the same user may read it or
/// attach to it.
fn keep_memory_private() -> Result<(), Failure> {
    crate::ceph::make_undumpable()
        .map_err(|e| Failure::new(Failure::OS, format!("core dumps cannot be switched off: {e}")))
}

/// More than all Ceph clients of a daemon can have calls that do not return: each has a limit of its own.
const BLOCKING_THREADS: usize = 4096;

/// Runs a command that needs the runtime.
fn blocking(command: impl Future<Output = Result<ExitCode, Failure>>) -> Result<ExitCode, Failure> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .max_blocking_threads(BLOCKING_THREADS)
        .enable_all()
        .build()
        .map_err(|e| Failure::new(Failure::OS, format!("the runtime does not start: {e}")))?;
    let outcome = runtime.block_on(command);
    runtime.shutdown_timeout(WIND_UP);
    outcome
}

/// Reads the configuration with every check that needs no network.
fn load(path: &Path) -> Result<Config, Failure> {
    Ok(Config::load_with(path, &|url| TransportUrl::parse(url).map(drop).map_err(|e| e.to_string()))?)
}

/// The store of the jobs, by the configuration: what commands about jobs need, whether a daemon runs or not.
async fn connect_store(path: &Path) -> Result<Store, Failure> {
    store_of(&load(path)?).await
}

async fn store_of(config: &Config) -> Result<Store, Failure> {
    let client = Client::connect(&config.ceph.conf, &config.ceph.user).await?;
    let objects = client.objects(&config.jobs.pool, &config.jobs.namespace)?;
    Ok(Store::new(Arc::new(objects), Clock::System))
}

/// An image's id on the command line.
fn image_id(text: &str) -> Result<Uuid, String> {
    parse_uuid(text).ok_or_else(|| "an image's id is a UUID, like c99c2483-d3ea-4877-bd86-edb7c4607374".to_owned())
}

fn no_such_job(image_id: Uuid) -> Failure {
    Failure::new(
        Failure::NO_INPUT,
        format!("there is no job for image {image_id}; `rbd-offload jobs --all` lists them"),
    )
}

/// What speaks against the destination pools of the configuration, by what Glance tells of its stores. Glance before 30
/// tells no fsid, and older ones no pool.
fn store_problems(config: &Config, stores: &[openstack::Store], fsid: &str) -> Vec<String> {
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
