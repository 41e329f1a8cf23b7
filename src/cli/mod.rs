//! The commands: one file each, which parses its arguments, calls what does the work and shows the outcome.
//!
//! Data goes to standard output, everything else to standard error; the exit status follows sysexits(3).

mod cancel;
mod check;
mod completions;
mod dry_run;
mod failure;
mod jobs;
mod man;
mod output;
mod replay;
mod request;
mod retry;
mod run;
#[cfg(test)]
mod schemas;
mod setup;
mod show;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

use crate::config;

pub use failure::Failure;
pub use output::eprint_line;
use setup::SHUTDOWN_TIMEOUT;

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
    /// Start a declined, failed or cancelled job again.
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
            Command::Completions(args) => completions::completions(args, Self::command()),
            Command::Man(args) => man::man(args, Self::command()),
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
    runtime.shutdown_timeout(SHUTDOWN_TIMEOUT);
    outcome
}
