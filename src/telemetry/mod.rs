//! Logs and metrics: what an operator sees of the daemon.
//!
//! Logs are one line an event, as text, JSON or journald fields; only this program's own targets are let through below
//! WARN, since HTTP and AMQP libraries write headers and bodies, tokens included, at DEBUG.

pub mod http;

use std::io::{self, IsTerminal};

use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};
use tracing::level_filters::LevelFilter;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, Registry, fmt, reload};

use crate::config::{Log, LogFormat, LogLevel};
use crate::notification::QUIET_TARGET;

/// Upper bounds of the duration histograms, in seconds: from a rename to the hashing of a large image.
const SECONDS: [f64; 16] =
    [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 1200.0, 3600.0];

/// Changes the level of the running log.
pub struct LogHandle(reload::Handle<Targets, Registry>);

impl LogHandle {
    pub fn set_level(&self, level: LogLevel) {
        if self.0.reload(targets(level)).is_err() {
            tracing::warn!("the log's level could not be changed");
        }
    }
}

/// Starts logging to standard error, or to journald.
///
/// # Errors
/// When journald is asked for and its socket is not there.
pub fn start_logging(log: &Log) -> io::Result<LogHandle> {
    let (filter, handle) = reload::Layer::new(targets(log.level));
    let layer: Box<dyn Layer<_> + Send + Sync> = match log.format {
        LogFormat::Text => {
            fmt::layer().with_writer(io::stderr).with_ansi(io::stderr().is_terminal()).with_target(false).boxed()
        }
        LogFormat::Json => fmt::layer().json().flatten_event(true).with_writer(io::stderr).with_target(false).boxed(),
        LogFormat::Journald => tracing_journald::layer()?.with_field_prefix(None).boxed(),
    };
    tracing_subscriber::registry().with(filter).with(layer).try_init().map_err(io::Error::other)?;
    Ok(LogHandle(handle))
}

fn targets(level: LogLevel) -> Targets {
    let level = match level {
        LogLevel::Error => LevelFilter::ERROR,
        LogLevel::Warn => LevelFilter::WARN,
        LogLevel::Info => LevelFilter::INFO,
        LogLevel::Debug => LevelFilter::DEBUG,
        LogLevel::Trace => LevelFilter::TRACE,
    };
    Targets::new()
        .with_default(LevelFilter::WARN.min(level))
        .with_target("rbd_offload", level)
        // the SDK repeats what services answer; its callers here say what matters
        .with_target("openstack_sdk", LevelFilter::OFF)
        // a failed passive declaration is an ERROR there, and how the listener asks whether an exchange exists
        .with_target(QUIET_TARGET, LevelFilter::OFF)
}

/// Starts collecting metrics; the handle renders them.
pub fn start_metrics() -> Result<PrometheusHandle, BuildError> {
    PrometheusBuilder::new().set_buckets_for_metric(Matcher::Suffix("_seconds".into()), &SECONDS)?.install_recorder()
}
