//! One section each, as written over the defaults: values have their types, and what a section must hold as a whole is
//! not looked at yet. `Option`: a key without a default.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use secrecy::SecretString;
use serde::de::{Deserialize, Deserializer, Error as _};

use super::{Hash, Interface, LogFormat, LogLevel, Method, QueueType, Register, Verify, values};

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Log {
    pub log_level: LogLevel,
    pub log_format: LogFormat,
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Messaging {
    pub transport_url: Option<Secret>,
    pub queue: String,
    pub queue_type: QueueType,
    pub exchanges: List,
    pub topics: List,
    pub prefetch: Whole<u16>,
    pub ssl_ca_file: Option<PathBuf>,
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Keystone {
    pub auth_url: Option<String>,
    pub username: Option<String>,
    pub password: Option<Secret>,
    pub project_name: Option<String>,
    pub user_domain_name: String,
    pub project_domain_name: String,
    pub application_credential_id: Option<String>,
    pub application_credential_secret: Option<Secret>,
    pub region_name: Option<String>,
    pub interface: Interface,
    pub cafile: Option<PathBuf>,
    pub proxy: Option<String>,
    pub timeout: Span,
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Glance {
    pub pool: String,
    pub endpoint_override: Option<String>,
    pub register: Register,
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ceph {
    pub conf: PathBuf,
    pub user: String,
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Offload {
    pub method: Method,
    pub max_jobs: Whole<usize>,
    pub max_jobs_per_pool: Whole<usize>,
    pub max_jobs_per_project: Whole<usize>,
    pub max_takeovers: Whole<u32>,
    pub hang_limit: Span,
    pub allow_in_use: Flag,
    pub concurrency: Whole<usize>,
    pub bandwidth_limit: Size,
    pub objects_per_second: Whole<u64>,
    pub retries: Whole<u32>,
    pub hash: Hash,
    pub verify: Verify,
    pub reconcile_interval: Span,
    pub dry_run: Flag,
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Jobs {
    pub pool: String,
    pub namespace: String,
    pub lease: Span,
    pub retention: Span,
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cinder {
    pub integration: Flag,
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Nova {
    pub integration: Flag,
    pub pool: String,
    pub image_name: String,
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Backend {
    pub pool: String,
    pub image_name: String,
    pub dest_pool: Option<String>,
    pub method: Option<Method>,
    pub anchor: Flag,
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Metrics {
    pub listen: Listen,
}

pub struct Whole<T>(pub T);
pub struct Span(pub Duration);
pub struct Size(pub u64);
pub struct Flag(pub bool);
pub struct List(pub Vec<String>);
pub struct Secret(pub SecretString);
pub struct Listen(pub Option<SocketAddr>);

/// A type that is read from a text by one function.
macro_rules! from_text {
    ($($name:ty = $read:expr;)+) => {$(
        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = String::deserialize(deserializer)?;
                let read: fn(String) -> Option<Self> = $read;
                read(text).ok_or_else(|| D::Error::custom("not a value of this kind"))
            }
        }
    )+};
}

from_text! {
    Whole<u16> = |text| values::whole(&text)?.try_into().ok().map(Whole);
    Whole<u32> = |text| values::whole(&text)?.try_into().ok().map(Whole);
    Whole<u64> = |text| values::whole(&text).map(Whole);
    Whole<usize> = |text| values::whole(&text)?.try_into().ok().map(Whole);
    Span = |text| values::duration(&text).map(Span);
    Size = |text| values::size(&text).map(Size);
    Flag = |text| values::flag(&text).map(Flag);
    List = |text| values::list(&text).map(List);
    Secret = |text| Some(Secret(text.into()));
    Listen = |text| if text.is_empty() { Some(Listen(None)) } else { text.parse().ok().map(|at| Listen(Some(at))) };
}
