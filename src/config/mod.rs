//! The configuration: read from the file, `conf.d`, credentials and the environment, checked as a whole, then used as
//! plain types.
//!
//! ```text
//! files, credentials, environment → read (text with its origin, every value judged by its kind)
//!   → check (values over their defaults, and what holds between keys) → Config
//! ```
//!
//! `sections` declares every key once, `keys` says what each kind of value accepts. `report` holds everything that is
//! wrong, so that the operator can fix the file in one pass.

mod check;
mod keys;
mod read;
mod reload;
mod report;
mod sections;
#[cfg(test)]
mod tests;
mod values;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use secrecy::SecretString;

pub use keys::{Key, Kind, Need, keys};
pub use report::{Error, Origin, Problem, Report};
pub use sections::{Backend, Ceph, Cinder, Glance, Jobs, Log, Messaging, Metrics, Nova, Offload};
pub use values::duration;

/// Where the packages put the file.
pub const DEFAULT_PATH: &str = "/etc/rbd-offload/rbd-offload.conf";

/// A further check of `[messaging] transport_url`, by the module that connects with it. The sentence that it returns is
/// printed, so it must not hold any part of the URL.
pub type TransportUrlCheck<'a> = &'a dyn Fn(&str) -> Result<(), String>;

impl Config {
    /// Reads `path`, then `conf.d/*.conf` beside it in lexical order, then `$CREDENTIALS_DIRECTORY/<section>.<key>`,
    /// then the environment (`RBD_OFFLOAD_<SECTION>__<KEY>`). A later value wins. The error lists all mistakes.
    pub fn load(path: &Path) -> Result<Config, Error> {
        Self::load_with(path, &|_| Ok(()))
    }

    /// As [`Config::load`], and checks the URL of the broker with `transport_url`.
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
        let mut written = read::RawConfig::default();
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
        let mut written = read::RawConfig::default();
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

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QueueType {
    Quorum,
    Classic,
}

values::choices!(QueueType { Quorum = "quorum", Classic = "classic" });

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

/// How a location is told to Glance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Register {
    /// The location API where Glance has it, PATCH otherwise.
    Auto,
    LocationsApi,
    Patch,
}

values::choices!(Register { Auto = "auto", LocationsApi = "locations-api", Patch = "patch" });

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MethodChoice {
    Auto,
    ServerCopy,
    Copy,
    Clone,
}

values::choices!(MethodChoice { Auto = "auto", ServerCopy = "server-copy", Copy = "copy", Clone = "clone" });

/// When an image becomes active.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PublishChoice {
    /// When it depends on nothing any more.
    WhenCopied,
    /// When its clone is made; the copy follows.
    AtOnce,
}

values::choices!(PublishChoice { WhenCopied = "when-copied", AtOnce = "at-once" });

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
