//! The commands: one file each, which parses its arguments, calls what does the work and shows the outcome.
//!
//! Data goes to standard output, everything else to standard error; the exit status follows sysexits(3).

mod run;

use std::fmt;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::ceph;
use crate::config::{self, Config};
use crate::job::store;
use crate::notification::TransportUrl;
use crate::openstack;

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
}

impl Cli {
    pub fn run(self) -> Result<ExitCode, Failure> {
        match self.command {
            Command::Run => blocking(run::run(&self.config)),
        }
    }
}

/// Reads the configuration with every check that needs no network.
fn load(path: &std::path::Path) -> Result<Config, Failure> {
    Ok(Config::load_with(path, &|url| TransportUrl::parse(url).map(drop).map_err(|e| e.to_string()))?)
}

/// Runs a command that needs the runtime.
fn blocking(command: impl Future<Output = Result<ExitCode, Failure>>) -> Result<ExitCode, Failure> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|e| Failure::new(Failure::OS, format!("the runtime does not start: {e}")))?
        .block_on(command)
}

/// Why a command did not do what it was asked; the text is for a person.
#[derive(Debug)]
pub struct Failure {
    pub code: u8,
    message: String,
}

impl Failure {
    /// EX_USAGE
    pub const USAGE: u8 = 64;
    /// EX_NOINPUT
    pub const NO_INPUT: u8 = 66;
    /// EX_UNAVAILABLE: a service does not answer, or the request was declined.
    pub const UNAVAILABLE: u8 = 69;
    /// EX_SOFTWARE
    pub const SOFTWARE: u8 = 70;
    /// EX_OSERR
    pub const OS: u8 = 71;
    /// EX_TEMPFAIL: it may pass.
    pub const TEMPORARY: u8 = 75;
    /// EX_NOPERM
    pub const NO_PERMISSION: u8 = 77;
    /// EX_CONFIG
    pub const CONFIG: u8 = 78;

    pub fn new(code: u8, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl From<config::Error> for Failure {
    fn from(error: config::Error) -> Self {
        Self::new(error.exit_code(), error.to_string())
    }
}

impl From<ceph::Error> for Failure {
    fn from(error: ceph::Error) -> Self {
        let code = match error.kind() {
            ceph::ErrorKind::PermissionDenied => Self::NO_PERMISSION,
            ceph::ErrorKind::NotFound => Self::CONFIG,
            _ => Self::UNAVAILABLE,
        };
        Self::new(code, error.to_string())
    }
}

impl From<store::Error> for Failure {
    fn from(error: store::Error) -> Self {
        match error {
            store::Error::Ceph(error) => error.into(),
            error => Self::new(Self::UNAVAILABLE, error.to_string()),
        }
    }
}

impl From<openstack::Error> for Failure {
    fn from(error: openstack::Error) -> Self {
        let code = match error.kind() {
            openstack::ErrorKind::Unauthorized | openstack::ErrorKind::Forbidden => Self::NO_PERMISSION,
            _ => Self::UNAVAILABLE,
        };
        Self::new(code, error.to_string())
    }
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
        } else if same_pool.all(|store| store.fsid.as_deref().is_some_and(|theirs| !theirs.eq_ignore_ascii_case(fsid)))
        {
            problems.push(format!(
                "[backend:{name}] dest_pool = {pool}: Glance's store of that pool lies in another Ceph cluster than [ceph] conf ({fsid})"
            ));
        }
    }
    problems
}
