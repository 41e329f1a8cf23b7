//! Events that an operator may want to wait for or look up: each has an id that stays when its wording changes.
//!
//! The journal gets it as `MESSAGE_ID`, JSON as `message_id`. `packaging/rbd-offload.catalog` says for each what it
//! means and what to do; `journalctl -x` shows that. An id that was released is never given to anything else.

/// An event, by its text and, where one text stands for several, the stage in it.
#[derive(Debug, Clone, Copy)]
pub struct EventId {
    /// 128 bits, as systemd writes them.
    pub id: &'static str,
    pub message: &'static str,
    pub stage: Option<&'static str>,
}

const fn known(id: &'static str, message: &'static str) -> EventId {
    EventId { id, message, stage: None }
}

const fn ended(id: &'static str, state: &'static str) -> EventId {
    EventId { id, message: "the job ended", stage: Some(state) }
}

pub const EVENTS: &[EventId] = &[
    known("49cba790656e4521ba8a4424c3789c37", "request stored"),
    ended("6a36fee497a84b48ad7d5abcc040c849", "done"),
    ended("46f0dcae29e349a48708cdd5026ef7b5", "declined"),
    ended("bb4feea67b4545c08f981e0ec29789e6", "failed"),
    ended("cdbfcde32c6c4f5596eada6d05f9bfb7", "cancelled"),
    known("e90e8a3ed2eb4b1fb0ad4f2983f6b2a1", "job will be retried"),
    known("67d0ab58479841e79ecab0e42f9e8c18", "the lease was lost; another daemon goes on with the job"),
    known("e73017bcd9584ebdb267103bca0fcd86", "fenced the previous owner"),
    known("fbb684d67ad6456aba573c4b4501a0ed", "fenced by another daemon (Ceph blocklist); reconnecting"),
    known("40a31218b5d74bb792e82c20c94ac6e7", "no connection to the broker; retrying"),
    known("66a45d4d86ba46e6bcf792d8b4590fd3", "connected to the broker"),
    known("b7ffac8559b448b8b7dbb4cff4ee7f6b", "the reconciler found something"),
    known("0441005ab5e740488dd5a6c801b0dd42", "the copy differs from its source"),
    known("67e697d18c8349a7afe3273d154cd3d4", "the configuration stays as it was"),
    known("46a11d7250dc4730ae537d7f5a829d91", "cannot process job record"),
    known("13cbeb4a4bfc4d8e941f3d7a4639fb42", "dry run"),
    known(
        "5b1d9c8e0f6a4c27b6f3d2a9471e80c5",
        "the image was deactivated: its format was changed while it was published",
    ),
];

/// The id of an event, if it has one.
pub fn id_of(message: &str, stage: Option<&str>) -> Option<&'static str> {
    EVENTS.iter().find(|known| known.message == message && known.stage.is_none_or(|s| Some(s) == stage)).map(|k| k.id)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::telemetry::sources;

    #[test]
    fn every_known_event_is_logged_somewhere_and_its_id_is_its_own() {
        let sources = sources::all();
        let mut ids = BTreeSet::new();
        for known in EVENTS {
            assert!(known.id.len() == 32 && known.id.bytes().all(|b| b.is_ascii_hexdigit()), "{known:?}");
            assert!(ids.insert(known.id), "twice: {known:?}");
            let text = format!("\"{}\")", known.message);
            let logged = sources.iter().any(|(path, source)| !path.ends_with("known.rs") && source.contains(&text));
            assert!(logged, "nothing logs {text}");
        }
    }

    #[test]
    fn the_catalog_explains_every_known_event_and_no_other() {
        let catalog = include_str!("../../packaging/rbd-offload.catalog");
        let explained: BTreeSet<&str> = catalog.lines().filter_map(|line| line.strip_prefix("-- ")).collect();
        assert_eq!(explained, EVENTS.iter().map(|known| known.id).collect());
    }

    #[test]
    fn how_a_job_ended_tells_which_event_it_is() {
        let id = |stage| id_of("the job ended", stage);
        assert_ne!(id(Some("done")), id(Some("declined")));
        assert_eq!(id(Some("done")), Some("6a36fee497a84b48ad7d5abcc040c849"));
        assert_eq!(id(None), None);
        assert_eq!(id_of("request stored", Some("accepted")), Some("49cba790656e4521ba8a4424c3789c37"));
        assert_eq!(id_of("anything else", None), None);
    }
}
