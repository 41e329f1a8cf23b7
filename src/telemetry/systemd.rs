//! Messages to systemd (`sd_notify`), sent by a thread of their own.
//!
//! A send waits when systemd does not read its socket. No caller here ever waits: it leaves its message, and the newest
//! message of a kind replaces an older one that was not sent yet.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use sd_notify::NotifyState;

/// Where the daemon stands in its life, as systemd's state machine knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ServicePhase {
    Ready,
    Reloading,
    Stopping,
}

impl ServicePhase {
    fn state(self) -> NotifyState<'static> {
        match self {
            Self::Ready => NotifyState::Ready,
            Self::Reloading => NotifyState::Reloading,
            Self::Stopping => NotifyState::Stopping,
        }
    }
}

/// What is still to be sent. Bounded: one status, one watchdog ping, and each phase once.
#[derive(Debug, Default)]
struct Pending {
    /// In order. None is lost: systemd counts a service as started by `READY=1` alone.
    phases: Vec<ServicePhase>,
    status: Option<String>,
    watchdog: bool,
    closed: bool,
}

impl Pending {
    fn is_empty(&self) -> bool {
        self.phases.is_empty() && self.status.is_none() && !self.watchdog
    }
}

#[derive(Debug, Default)]
struct Mailbox {
    pending: Mutex<Pending>,
    changed: Condvar,
}

impl Mailbox {
    fn pending(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for messages and takes all of them. `None`: there will be no more.
    fn take(&self) -> Option<Pending> {
        let mut pending = self
            .changed
            .wait_while(self.pending(), |pending| pending.is_empty() && !pending.closed)
            .unwrap_or_else(PoisonError::into_inner);
        let closed = pending.closed;
        let taken = std::mem::replace(&mut *pending, Pending { closed, ..Pending::default() });
        (!taken.is_empty()).then_some(taken)
    }
}

/// Sends messages to systemd. Dropping it does not wait: its thread ends once it has sent the messages that are left.
#[derive(Debug)]
pub struct Systemd {
    mailbox: Arc<Mailbox>,
}

impl Systemd {
    /// Starts the thread. Without `NOTIFY_SOCKET` in the environment the messages go nowhere.
    ///
    /// # Errors
    /// When the thread cannot be started.
    pub fn start() -> io::Result<Self> {
        Self::sending(|state| {
            if let Err(error) = sd_notify::notify(&[state]) {
                tracing::debug!(%error, "systemd was not notified");
            }
        })
    }

    fn sending(send: impl Fn(NotifyState<'_>) + Send + 'static) -> io::Result<Self> {
        let mailbox = Arc::new(Mailbox::default());
        let inbox = Arc::clone(&mailbox);
        std::thread::Builder::new().name("systemd".into()).spawn(move || {
            while let Some(taken) = inbox.take() {
                for phase in taken.phases {
                    send(phase.state());
                }
                if let Some(status) = taken.status {
                    send(NotifyState::Status(&status));
                }
                if taken.watchdog {
                    send(NotifyState::Watchdog);
                }
            }
        })?;
        Ok(Self { mailbox })
    }

    pub fn phase(&self, phase: ServicePhase) {
        self.leave(|pending| {
            pending.phases.retain(|earlier| *earlier != phase);
            pending.phases.push(phase);
        });
    }

    /// The line that `systemctl status` shows.
    pub fn status(&self, line: &str) {
        self.leave(|pending| pending.status = Some(line.to_owned()));
    }

    /// The daemon makes progress.
    pub fn watchdog(&self) {
        self.leave(|pending| pending.watchdog = true);
    }

    fn leave(&self, message: impl FnOnce(&mut Pending)) {
        message(&mut self.mailbox.pending());
        self.mailbox.changed.notify_one();
    }
}

impl Drop for Systemd {
    fn drop(&mut self) {
        self.leave(|pending| pending.closed = true);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;

    const LONG: Duration = Duration::from_secs(10);

    /// A socket that takes one message each time it is read. Returns the reader's end too.
    fn socket() -> (Systemd, mpsc::Receiver<String>) {
        let (sent, read) = mpsc::sync_channel(0);
        let systemd = Systemd::sending(move |state| drop(sent.send(state.to_string()))).unwrap();
        (systemd, read)
    }

    #[test]
    fn nobody_waits_for_a_socket_that_is_not_read_and_the_newest_status_wins() {
        let (systemd, read) = socket();
        systemd.phase(ServicePhase::Ready);
        for number in 0..1000 {
            systemd.status(&format!("{number} running"));
            systemd.watchdog();
        }
        systemd.phase(ServicePhase::Stopping);
        drop(systemd);
        let mut sent = Vec::new();
        while let Ok(message) = read.recv_timeout(LONG) {
            sent.push(message);
        }
        assert_eq!(sent[0], "READY=1", "{sent:?}");
        let statuses: Vec<_> = sent.iter().filter(|message| message.starts_with("STATUS=")).collect();
        assert_eq!(statuses.last().map(|status| status.as_str()), Some("STATUS=999 running"));
        assert!(statuses.len() <= 2, "{sent:?}");
        assert_eq!(sent.iter().filter(|message| *message == "STOPPING=1").count(), 1);
    }

    #[test]
    fn a_reload_is_sent_before_the_daemon_is_ready_again() {
        let (systemd, read) = socket();
        systemd.phase(ServicePhase::Ready);
        assert_eq!(read.recv_timeout(LONG).as_deref(), Ok("READY=1"));
        systemd.phase(ServicePhase::Reloading);
        systemd.phase(ServicePhase::Ready);
        assert_eq!(read.recv_timeout(LONG).as_deref(), Ok("RELOADING=1"));
        assert_eq!(read.recv_timeout(LONG).as_deref(), Ok("READY=1"));
        systemd.phase(ServicePhase::Stopping);
        assert_eq!(read.recv_timeout(LONG).as_deref(), Ok("STOPPING=1"));
    }
}
