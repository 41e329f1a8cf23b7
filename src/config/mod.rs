//! The configuration: read from the file, `conf.d`, credentials and the environment, checked as a whole, then used as plain types.
//!
//! ```text
//! files, credentials, environment → read (text with its origin, every value judged by `keys`)
//!   → fragments (one section, as written over the defaults) → check (what holds between keys) → Config
//! ```
//!
//! `keys` is the one place that knows which keys exist, their defaults and what they take; `report` holds everything
//! that is wrong, so that a person mends a file once.

mod check;
mod fragments;
mod keys;
mod read;
mod reload;
mod report;
#[cfg(test)]
mod tests;
mod values;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use secrecy::SecretString;

pub use keys::{Key, Kind, Need, keys};
pub use report::{Error, Origin, Problem, Report};
pub use values::duration;

/// Where the packages put the file.
pub const DEFAULT_PATH: &str = "/etc/rbd-offload/rbd-offload.conf";

/// A further look at `[messaging] transport_url`, by the module that dials it. The sentence that it returns is printed,
/// so it must not hold any part of the url.
pub type TransportUrlCheck<'a> = &'a dyn Fn(&str) -> Result<(), String>;

impl Config {
    /// Reads `path`, then `conf.d/*.conf` beside it in lexical order, then `$CREDENTIALS_DIRECTORY/<section>.<key>`, then
    /// the environment (`RBD_OFFLOAD_<SECTION>__<KEY>`); what comes later wins. Everything wrong is in the one error.
    pub fn load(path: &Path) -> Result<Config, Error> {
        Self::load_with(path, &|_| Ok(()))
    }

    /// As [`Config::load`], and asks `transport_url` what it thinks of that url.
    pub fn load_with(path: &Path, transport_url: TransportUrlCheck<'_>) -> Result<Config, Error> {
        Self::load_from(path, std::env::vars_os(), transport_url)
    }

    /// As [`Config::load_with`], with an environment of the caller's.
    pub fn load_from(
        path: &Path,
        environment: impl IntoIterator<Item = (OsString, OsString)>,
        transport_url: TransportUrlCheck<'_>,
    ) -> Result<Config, Error> {
        let files = read::files(path)?;
        let environment: Vec<_> = environment.into_iter().collect();
        let credentials = read::credentials(&environment)?;
        let mut report = Report::default();
        let mut written = read::Written::default();
        for file in &files {
            written.add_file(file, &mut report);
        }
        for credential in &credentials {
            written.add_credential(credential, &mut report);
        }
        written.add_environment(environment, &mut report);
        check::check(written, path, transport_url, report)
    }

    /// One text alone, without `conf.d` and environment; `name` stands for it in errors.
    pub fn parse(name: &Path, text: &str) -> Result<Config, Error> {
        let mut report = Report::default();
        let mut written = read::Written::default();
        written.add_file(&read::File { path: name.to_path_buf(), bytes: text.as_bytes().to_vec() }, &mut report);
        check::check(written, name, &|_| Ok(()), report)
    }
}

/// The whole configuration, complete and checked. Defaults are in the table of keys.
#[derive(Debug, Clone)]
pub struct Config {
    pub log: Log,
    pub messaging: Messaging,
    pub keystone: Keystone,
    pub glance: Glance,
    pub ceph: Ceph,
    pub offload: Offload,
    pub jobs: Jobs,
    pub cinder: Cinder,
    pub nova: Nova,
    /// By the backend's name.
    pub backends: BTreeMap<String, Backend>,
    pub metrics: Metrics,
}

/// `[DEFAULT]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Log {
    pub level: LogLevel,
    pub format: LogFormat,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogLevel {
    Error,
    Warn,
    Info,
    Debug,
    Trace,
}

values::choices!(LogLevel { Error = "error", Warn = "warn", Info = "info", Debug = "debug", Trace = "trace" });

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    Text,
    Json,
    Journald,
}

values::choices!(LogFormat { Text = "text", Json = "json", Journald = "journald" });

/// `[messaging]`
#[derive(Debug, Clone)]
pub struct Messaging {
    /// In oslo.messaging's grammar; holds the password.
    pub transport_url: SecretString,
    pub queue: String,
    pub queue_type: QueueType,
    pub exchanges: Vec<String>,
    pub topics: Vec<String>,
    /// Deliveries unacknowledged at a time.
    pub prefetch: u16,
    pub ssl_ca_file: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QueueType {
    Quorum,
    Classic,
}

values::choices!(QueueType { Quorum = "quorum", Classic = "classic" });

/// `[keystone]`
#[derive(Debug, Clone)]
pub struct Keystone {
    pub auth_url: String,
    pub credentials: Credentials,
    pub region_name: Option<String>,
    pub interface: Interface,
    pub cafile: Option<PathBuf>,
    /// A URL.
    pub proxy: Option<String>,
    /// Of one request.
    pub timeout: Duration,
}

#[derive(Debug, Clone)]
pub enum Credentials {
    Password {
        username: String,
        password: SecretString,
        project_name: String,
        user_domain_name: String,
        project_domain_name: String,
    },
    Application {
        id: String,
        secret: SecretString,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Interface {
    Public,
    Internal,
    Admin,
}

values::choices!(Interface { Public = "public", Internal = "internal", Admin = "admin" });

/// `[glance]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Glance {
    pub pool: String,
    pub endpoint_override: Option<String>,
    pub register: Register,
}

/// How a location is told to Glance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Register {
    /// The location API where Glance has it, PATCH otherwise.
    Auto,
    LocationsApi,
    Patch,
}

values::choices!(Register { Auto = "auto", LocationsApi = "locations-api", Patch = "patch" });

/// `[ceph]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ceph {
    pub conf: PathBuf,
    /// The cephx id, without `client.`.
    pub user: String,
}

/// `[offload]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Offload {
    pub method: Method,
    /// Jobs that run at a time on this controller.
    pub max_jobs: usize,
    pub allow_in_use: bool,
    /// Objects in flight per job.
    pub concurrency: usize,
    /// Bytes a second, only for `copy`, all jobs of this controller together; 0: no limit.
    pub bandwidth_limit: u64,
    /// Attempts after the first for what may pass.
    pub retries: u32,
    pub hash: Hash,
    pub reconcile_interval: Duration,
    pub verify: Verify,
    /// RADOS objects a second, all jobs of this controller together; 0: no limit.
    pub objects_per_second: u64,
    /// Jobs that run at a time into one destination pool; 0: only `max_jobs` counts.
    pub max_jobs_per_pool: usize,
    /// Jobs of one project that run at a time here; 0: only `max_jobs` counts.
    pub max_jobs_per_project: usize,
    /// Take-overs in a row from owners that did not release the job; 0: no limit.
    pub max_takeovers: u32,
    /// How long a job may make no progress before it is given up and tried again.
    pub hang_limit: Duration,
    /// Only look: requests are planned, counted and logged, nothing is written.
    pub dry_run: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    Auto,
    ServerCopy,
    Copy,
    Clone,
}

values::choices!(Method { Auto = "auto", ServerCopy = "server-copy", Copy = "copy", Clone = "clone" });

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hash {
    None,
    Sha512,
}

values::choices!(Hash { None = "none", Sha512 = "sha512" });

/// What is read again before an image is published.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verify {
    None,
    /// Some of the objects.
    Sample,
    /// Every byte.
    Full,
}

values::choices!(Verify { None = "none", Sample = "sample", Full = "full" });

/// `[jobs]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Jobs {
    pub pool: String,
    pub namespace: String,
    pub lease: Duration,
    /// How long the record of an ended job is kept.
    pub retention: Duration,
}

/// `[cinder]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cinder {
    pub integration: bool,
}

/// `[nova]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Nova {
    pub integration: bool,
    pub pool: String,
    /// `{id}` stands for the instance's uuid.
    pub image_name: String,
}

/// `[backend:NAME]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backend {
    pub pool: String,
    /// `{id}` stands for the volume's id.
    pub image_name: String,
    /// `[glance] pool` when not given.
    pub dest_pool: String,
    pub method: Option<Method>,
    /// Clones are made from a clone in the backend's own pool, so that Cinder can delete the source meanwhile.
    pub anchor: bool,
}

/// `[metrics]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Metrics {
    /// `None`: off.
    pub listen: Option<SocketAddr>,
}
