//! Logs and metrics: what an operator sees of the daemon.
//!
//! Logs are one line an event, as text, JSON or journald fields; only this program's own targets are let through below
//! WARN, since HTTP and AMQP libraries write headers and bodies, tokens included, at DEBUG.

pub mod http;
mod known;
mod log;
mod metrics;
#[cfg(test)]
pub(crate) mod sources;
pub mod systemd;

use std::io;
use std::sync::{Arc, PoisonError, RwLock};

use tracing::level_filters::LevelFilter;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Registry, reload};

use crate::config::{Log, LogLevel};
use crate::notification::LAPIN_TARGET;
use log::{LineSender, Output, Writer};
pub use metrics::{start_metrics, unix_time};

/// Changes the running log. Its end waits for the last lines.
pub struct LogHandle {
    level: reload::Handle<Targets, Registry>,
    output: Arc<RwLock<Output>>,
    lines: LineSender,
}

impl Drop for LogHandle {
    fn drop(&mut self) {
        self.lines.flush();
    }
}

impl LogHandle {
    /// Another level or format, from now on.
    pub fn set(&self, log: &Log) {
        match Output::open(log.log_format) {
            Ok(output) => *self.output.write().unwrap_or_else(PoisonError::into_inner) = output,
            Err(error) => tracing::warn!(%error, "the log keeps its format"),
        }
        if self.level.reload(targets(log.log_level)).is_err() {
            tracing::warn!("the log's level could not be changed");
        }
    }
}

/// Starts logging to standard error, or to journald.
///
/// # Errors
/// When journald is asked for and its socket is not there, or the thread that writes cannot be started.
pub fn start_logging(log: &Log) -> io::Result<LogHandle> {
    let (filter, level) = reload::Layer::new(targets(log.log_level));
    let writer = Writer::new(Output::open(log.log_format)?)?;
    let (output, lines) = writer.parts();
    tracing_subscriber::registry().with(filter).with(writer).try_init().map_err(io::Error::other)?;
    Ok(LogHandle { level, output, lines })
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
        .with_target(LAPIN_TARGET, LevelFilter::OFF)
}
