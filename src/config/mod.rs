//! The configuration: read from the file, `conf.d` and the environment, checked as a whole, then used as plain types.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use secrecy::SecretString;

/// The whole configuration, complete and checked; defaults are in one place (`Default` of each section).
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

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    Text,
    Json,
    Journald,
}

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

/// `[keystone]`
#[derive(Debug, Clone)]
pub struct Keystone {
    pub auth_url: String,
    pub credentials: Credentials,
    pub region_name: Option<String>,
    pub interface: Interface,
    pub cafile: Option<PathBuf>,
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
    /// Bytes a second, only for `copy`; 0: none.
    pub bandwidth_limit: u64,
    /// Attempts after the first for what may pass.
    pub retries: u32,
    pub hash: Hash,
    pub reconcile_interval: Duration,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    Auto,
    ServerCopy,
    Copy,
    Clone,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hash {
    None,
    Sha512,
}

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
}

/// `[metrics]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Metrics {
    /// `None`: off.
    pub listen: Option<SocketAddr>,
}
