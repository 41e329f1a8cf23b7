//! The pauses between the attempts of a job.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use uuid::Uuid;

use super::record::{Artifact, Record, State};
use crate::request::Source;

/// Pause before the second attempt; each further one waits twice as long.
const FIRST: Duration = Duration::from_secs(2);

/// Longest pause between attempts.
pub const BACKOFF_MAX: Duration = Duration::from_secs(60);

/// Longest pause between attempts to make an active image independent of its source: it can be used all the while.
const DETACH_MAX: Duration = Duration::from_secs(10 * 60);

/// Longest pause while our snapshot is on an instance's disk. Nova retries the removal of a disk for one minute only.
const INSTANCE_MAX: Duration = Duration::from_secs(15);

/// The pause before the job's next attempt.
pub fn pause_of(record: &Record) -> Duration {
    let longest = if record.state == State::Detaching { DETACH_MAX } else { BACKOFF_MAX };
    let pause = backoff(record.image_id, record.attempts, longest);
    if holds_instance(record) { pause.min(INSTANCE_MAX) } else { pause }
}

/// Whether a pause is over. A time that lies further ahead than any pause was written by a clock that is wrong.
pub fn is_due(not_before: Option<Timestamp>, now: Timestamp, is_detaching: bool) -> bool {
    let longest = if is_detaching { DETACH_MAX } else { BACKOFF_MAX };
    let longest = SignedDuration::try_from(longest * 2).unwrap_or(SignedDuration::MAX);
    not_before.is_none_or(|time| time <= now || time.duration_since(now) > longest)
}

/// Whether our snapshot may be on an instance's disk.
pub fn holds_instance(record: &Record) -> bool {
    record.has(Artifact::Snapshot) && matches!(record.source, Some(Source::Instance(_)))
}

/// The pause after so many attempts, a quarter longer or shorter by the job's id: jobs that failed together come back
/// one by one.
fn backoff(id: Uuid, attempts: u32, longest: Duration) -> Duration {
    let pause = FIRST.saturating_mul(1u32.checked_shl(attempts.min(16)).unwrap_or(u32::MAX)).min(longest);
    let mut hasher = DefaultHasher::new();
    (id, attempts).hash(&mut hasher);
    // 75 to 124 hundredths
    pause * u32::try_from(75 + hasher.finish() % 50).unwrap_or(100) / 100
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::Trigger;

    #[test]
    fn a_snapshot_on_an_instances_disk_is_gone_before_nova_gives_its_deletion_up() {
        let (image, instance) = (Uuid::new_v4(), Source::Instance(Uuid::new_v4()));
        let mut record = Record::new(image, Trigger::InstanceSnapshot, Some(instance), None, Timestamp::now());
        for attempts in 0..20 {
            record.attempts = attempts;
            record.artifacts.insert(Artifact::Snapshot);
            assert!(pause_of(&record) <= Duration::from_secs(15), "after {attempts} attempts");
        }
        record.artifacts.clear();
        assert!(pause_of(&record) > Duration::from_secs(40), "no snapshot is left on the disk");
    }

    #[test]
    fn far_future_not_before_is_ignored() {
        let now = Timestamp::now();
        let ahead = |seconds| now.checked_add(SignedDuration::from_secs(seconds)).ok();
        assert!(is_due(None, now, false));
        assert!(is_due(ahead(-1), now, false));
        assert!(!is_due(ahead(30), now, false));
        assert!(is_due(ahead(3600), now, false));
    }
}
