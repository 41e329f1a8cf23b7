//! What time it is: the system's clock, or tokio's in a simulation that lets days pass in a moment.

use jiff::{SignedDuration, Timestamp};

/// Controllers' clocks may differ by minutes; nothing that must be right depends on them. Times are for people, for
/// the pause before a retry and for retention.
#[derive(Debug, Clone, Copy, Default)]
pub enum Clock {
    #[default]
    System,
    /// Counts tokio's time from its start on; a controller whose clock is wrong has a start that is.
    Tokio { start: Timestamp, origin: tokio::time::Instant },
}

impl Clock {
    pub fn now(&self) -> Timestamp {
        match self {
            Self::System => Timestamp::now(),
            Self::Tokio { start, origin } => {
                let passed = SignedDuration::try_from(origin.elapsed()).unwrap_or(SignedDuration::MAX);
                start.checked_add(passed).unwrap_or(Timestamp::MAX)
            }
        }
    }
}
