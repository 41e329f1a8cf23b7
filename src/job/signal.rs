//! Signals: what others ask of a job.
//!
//! Only the holder of a job's lease writes its record. All others leave a signal: a key in the omap of the job's
//! object. A signal is set only on the version of the object that its sender has read, so it cannot reach a job that
//! has ended since then, or an object that was removed. The holder removes it in the same write that stores its effect,
//! and that write names the version too. So either the signal is there, or its effect is stored.

use std::collections::BTreeMap;

use uuid::Uuid;

/// What others ask of a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Signal {
    /// The operator wants it to end. It is removed when the job has ended.
    Cancel,
    /// A notification spoke of the image, perhaps of its deletion: read the image record now.
    RecheckImage,
    /// A notification spoke of a request while the job was ending, or after it had ended: see whether there is one.
    Rerequested,
    /// The operator wants another attempt now, of a job that has ended too.
    Retry,
    /// A notification showed properties of the daemon on an active image. It stays with an ended job.
    NeedsRepair,
}

impl Signal {
    pub const ALL: [Self; 5] = [Self::Cancel, Self::RecheckImage, Self::Rerequested, Self::Retry, Self::NeedsRepair];

    /// The omap key.
    fn key(self) -> &'static str {
        match self {
            Self::Cancel => "signal.cancel",
            Self::RecheckImage => "signal.recheck_image",
            Self::Rerequested => "signal.rerequested",
            Self::Retry => "signal.retry",
            Self::NeedsRepair => "signal.needs_repair",
        }
    }
}

/// The signals of a job, as they were at one version of its object.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Signals(BTreeMap<Signal, Vec<u8>>);

impl Signals {
    /// From the keys of a job's object. Keys of another version of this program are passed over.
    pub fn read(keys: Vec<(String, Vec<u8>)>) -> Self {
        let known = |key: &str| Signal::ALL.into_iter().find(|signal| signal.key() == key);
        Self(keys.into_iter().filter_map(|(key, value)| Some((known(&key)?, value))).collect())
    }

    /// These, sent now.
    pub fn of(signals: &[Signal]) -> Self {
        Self::read(entries(signals))
    }

    pub fn has(&self, signal: Signal) -> bool {
        self.0.contains_key(&signal)
    }

    pub(super) fn set(&mut self, entries: Vec<(String, Vec<u8>)>) {
        self.0.extend(Self::read(entries).0);
    }

    pub(super) fn remove(&mut self, signals: &[Signal]) {
        self.0.retain(|signal, _| !signals.contains(signal));
    }

    /// Whether this signal is the one that `seen` has: it was not set again since.
    pub fn is_as_in(&self, seen: &Self, signal: Signal) -> bool {
        self.0.get(&signal).is_some_and(|value| seen.0.get(&signal) == Some(value))
    }

    /// Those of `signals` that were not set again since they were `seen`.
    pub fn seen_in(&self, seen: &Self, signals: &[Signal]) -> Vec<Signal> {
        signals.iter().copied().filter(|signal| self.is_as_in(seen, *signal)).collect()
    }
}

/// What is written for signals. The value tells a signal from the same one that is set again.
pub(super) fn entries(signals: &[Signal]) -> Vec<(String, Vec<u8>)> {
    signals.iter().map(|signal| (signal.key().to_owned(), Uuid::new_v4().to_string().into_bytes())).collect()
}

pub(super) fn keys(signals: &[Signal]) -> Vec<String> {
    signals.iter().map(|signal| signal.key().to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_that_was_set_again_is_another_one() {
        let first = Signals::read(entries(&[Signal::Cancel, Signal::Rerequested]));
        assert!(first.has(Signal::Cancel) && !first.has(Signal::Retry));
        let mut again = first.clone();
        again.set(entries(&[Signal::Rerequested]));
        assert_eq!(again.seen_in(&first, &[Signal::Cancel, Signal::Rerequested, Signal::Retry]), [Signal::Cancel]);
    }

    #[test]
    fn keys_of_another_version_are_passed_over() {
        let read = Signals::read(vec![("signal.later".into(), Vec::new()), ("other".into(), Vec::new())]);
        assert_eq!(read, Signals::default());
        for signal in Signal::ALL {
            assert!(Signals::read(entries(&[signal])).has(signal));
        }
    }
}
