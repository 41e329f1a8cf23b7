//! How the listener is doing, for `/healthz` and the unit's STATUS line.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// Written by the listener; read by `/healthz`, the metrics and the status line.
#[derive(Debug, Default)]
pub struct BrokerStatus(Mutex<ListenerState>);

/// The listener's state at a moment.
#[derive(Debug, Default, Clone)]
pub struct ListenerState {
    /// `host:port` of the broker that is consumed from, or was tried last.
    pub host: Option<String>,
    /// Consuming or standing by since; None: not connected.
    pub connected_since: Option<Instant>,
    /// Other daemons consume the queue, which has other arguments than the configuration asks for.
    pub standing_by: bool,
    /// Connections lost or refused since the start.
    pub reconnects: u64,
    /// The queue exists as the configuration describes it.
    pub queue_declared: bool,
    /// Exchanges that no service has declared yet.
    pub missing_exchanges: BTreeSet<String>,
    /// Why there is no connection, and the remedy.
    pub problem: Option<String>,
}

impl BrokerStatus {
    pub fn get(&self) -> ListenerState {
        self.lock().clone()
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, ListenerState> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ListenerState {
    pub fn connected(&self) -> bool {
        self.connected_since.is_some()
    }
}

impl fmt::Display for ListenerState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.host, &self.problem) {
            (Some(host), _) if self.connected() && self.standing_by => {
                write!(
                    f,
                    "standing by at {host}: others consume the queue, which has other arguments than [messaging]"
                )?;
            }
            (Some(host), _) if self.connected() => write!(f, "consuming from {host}")?,
            (_, Some(problem)) => write!(f, "not connected: {problem}")?,
            _ => write!(f, "connecting")?,
        }
        if !self.missing_exchanges.is_empty() {
            let names: Vec<&str> = self.missing_exchanges.iter().map(String::as_str).collect();
            write!(f, "; waiting for exchanges: {}", names.join(", "))?;
        }
        Ok(())
    }
}
