//! Whose turn the reconciler's next round is.
//!
//! Daemons of the same release and configuration find and remove the same things, so one of them is enough. A daemon
//! that has done a round writes a new value under the key of its configuration, and goes on at its interval. The other
//! daemons of that configuration read the value, and do a round when it has not changed for longer than an interval.
//! Each daemon measures that time by itself: the daemons' clocks are not compared.

use std::sync::Arc;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use sha2::{Digest, Sha256};
use tokio::sync::watch;
use tokio::time::{Instant, sleep};

use crate::ceph::{Objects, Result};
use crate::config::Config;

/// Begins each key.
const PREFIX: &str = "round.";

/// The most configurations that one read sees.
const PAGE: usize = 256;

/// A value that is older belongs to a configuration that no daemon has any more.
const FORGET_AFTER: SignedDuration = SignedDuration::from_hours(7 * 24);

/// How the latest try of a round ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Tried {
    /// This daemon did a round.
    Done,
    /// A part of the round failed, or none was tried with this configuration.
    Failed,
    /// Another daemon, perhaps of another configuration, is doing a round.
    Locked,
    /// Another daemon of this configuration has done a round.
    ByAnother,
}

/// The daemon's view of the key of its configuration.
pub(super) struct Turn {
    key: String,
    value: Option<Vec<u8>>,
    tried: Tried,
    since: Instant,
    /// This daemon has to do the next round, even if others do some: it may be in a record, or one of its removals goes
    /// on.
    owes: bool,
}

impl Turn {
    pub fn new() -> Self {
        Self { key: String::new(), value: None, tried: Tried::Failed, since: Instant::now(), owes: false }
    }

    /// Before a try. Nothing is known of the rounds of a new configuration.
    pub fn follow(&mut self, config: &Config) {
        let key = key_of(config);
        if key != self.key {
            (self.key, self.value, self.tried) = (key, None, Tried::Failed);
        }
    }

    /// Notes how a try ended, now.
    pub fn note(&mut self, tried: Tried) {
        (self.tried, self.since) = (tried, Instant::now());
    }

    /// Whether this daemon has to do the next round.
    pub fn owe(&mut self, owes: bool) {
        self.owes = owes;
    }

    /// Tells the other daemons of this configuration of a round. `owner` is for people.
    ///
    /// # Errors
    /// Those of Ceph. The others do a round of their own then.
    pub async fn tell(&mut self, objects: &dyn Objects, object: &str, owner: &str, now: Timestamp) -> Result<()> {
        let value = format!("{now} {owner}").into_bytes();
        objects.set_omap(object, &[(self.key.clone(), value.clone())]).await?;
        self.value = Some(value);
        let is_old = |value: &[u8]| {
            let at = std::str::from_utf8(value).ok().and_then(|text| text.split(' ').next()?.parse::<Timestamp>().ok());
            at.is_none_or(|at| now.duration_since(at) > FORGET_AFTER)
        };
        let entries = objects.omap(object, PREFIX, PAGE).await?.into_iter();
        let old: Vec<_> = entries.filter(|(key, value)| key.starts_with(PREFIX) && is_old(value)).collect();
        if old.is_empty() {
            return Ok(());
        }
        objects.remove_omap(object, &old.into_iter().map(|(key, _)| key).collect::<Vec<_>>()).await
    }

    /// Returns when the next round is this daemon's to do.
    pub async fn wait(&mut self, objects: &dyn Objects, object: &str, config: &watch::Receiver<Arc<Config>>) {
        loop {
            let interval = config.borrow().offload.reconcile_interval;
            let left = self.next_round_after(interval).saturating_sub(self.since.elapsed());
            if left.is_zero() {
                return;
            }
            sleep(left.min(interval / 2)).await;
            self.follow(&config.borrow());
            match objects.omap(object, PREFIX, PAGE).await {
                Ok(entries) => {
                    let value = entries.into_iter().find(|(found, _)| *found == self.key).map(|(_, value)| value);
                    if value.is_some() && value != self.value {
                        self.value = value;
                        if !self.owes {
                            self.note(Tried::ByAnother);
                        }
                    }
                }
                Err(error) => tracing::debug!(%error, "it is not known whether another daemon did a round"),
            }
        }
    }

    /// How long after the latest try this daemon does a round.
    fn next_round_after(&self, interval: Duration) -> Duration {
        match self.tried {
            Tried::Done | Tried::Failed => interval,
            Tried::Locked => interval / 4,
            Tried::ByAnother => interval + interval / 4,
        }
    }
}

/// The same for daemons whose rounds find and remove the same things.
fn key_of(config: &Config) -> String {
    let mut hash = Sha256::new();
    for (name, backend) in &config.backends {
        hash.update(format!("{name} {} {} {}\n", backend.pool, backend.dest_pool, backend.image_name));
    }
    hash.update(format!(
        "{} {} {} {} {} {} {} {:?} {}",
        env!("CARGO_PKG_VERSION"),
        config.glance.pool,
        config.nova.pool,
        config.nova.image_name,
        config.nova.integration,
        config.cinder.integration,
        config.offload.dry_run,
        config.jobs.retention,
        config.offload.max_takeovers,
    ));
    let hex: String = hash.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect();
    format!("{PREFIX}{hex}")
}
