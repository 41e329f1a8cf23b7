//! Records of format 1, which development versions wrote before 0.1.0.

use serde_json::{Map, Value, json};

use super::record::{Record, VERSION};

/// Fields that have another name now.
const RENAMED: [(&str, &str); 3] = [("ending", "outcome"), ("origin", "source_image"), ("mend", "needs_repair")]; // lint: allow words

/// Reads a record of format 1 as one of today's.
pub(super) fn convert(bytes: &[u8]) -> serde_json::Result<Record> {
    let mut fields: Map<String, Value> = serde_json::from_slice(bytes)?;
    fields.insert("version".into(), json!(VERSION));
    for (old, new) in RENAMED {
        if let Some(value) = fields.remove(old) {
            fields.insert(new.into(), value);
        }
    }
    convert_artifacts(&mut fields);
    convert_flags(&mut fields);
    serde_json::from_value(Value::Object(fields))
}

/// `made` had a flag for each thing.
fn convert_artifacts(fields: &mut Map<String, Value>) {
    let Some(made) = fields.remove("made") else { return };
    let has = |name: &str, unsaid: bool| made.get(name).and_then(Value::as_bool).unwrap_or(unsaid);
    let artifacts = ["snapshot", "anchor", "copy", "published"];
    let artifacts: Vec<&str> = artifacts.into_iter().filter(|name| has(name, false)).collect();
    // the first records did not say whether a location was posted
    let registration = match (has("active", false), has("posted", true)) {
        (true, _) => "active",
        (false, true) => "posted",
        (false, false) => "unposted",
    };
    fields.insert("artifacts".into(), json!(artifacts));
    fields.insert("registration".into(), json!(registration));
}

/// What other programs set in the record is left as a signal today. A request that was made again is found by the
/// reconciler, and an attempt reads the image in any case.
fn convert_flags(fields: &mut Map<String, Value>) {
    let mut take = |name: &str| fields.remove(name).and_then(|value| value.as_bool()).unwrap_or(false);
    let (cancel, told) = (take("cancel"), take("told"));
    let _ = (take("check"), take("again"));
    let ended = ["done", "declined", "failed", "cancelled"];
    let state = fields.get("state").cloned().unwrap_or_default();
    let has_outcome = fields.get("outcome").is_some_and(Value::is_object);
    if !has_outcome && ended[1..].iter().any(|end| state == *end) {
        let reason = fields.get("reason").cloned().filter(Value::is_string).unwrap_or_else(|| json!(""));
        fields.insert("outcome".into(), json!({"state": state, "reason": reason}));
    } else if !has_outcome && cancel && !ended.iter().any(|end| state == *end) {
        fields.insert("outcome".into(), json!({"state": "cancelled", "reason": "cancelled by the operator"}));
    }
    if told && let Some(Value::Object(outcome)) = fields.get_mut("outcome") {
        outcome.insert("report".into(), json!("begun"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::record::{Artifact, Registration, Reporting, State};

    /// A record as format 1 had it.
    fn stored(changes: Value) -> Vec<u8> {
        let mut record: Value = serde_json::from_str(include_str!("../../tests/data/job-record-1.json")).unwrap();
        for (name, value) in changes.as_object().unwrap() {
            record[name] = value.clone();
        }
        record.to_string().into_bytes()
    }

    #[test]
    fn a_record_of_format_1_is_read_whole() {
        let record = Record::parse(&stored(json!({}))).unwrap();
        assert_eq!((record.version, record.state), (VERSION, State::Publishing));
        assert_eq!(
            record.artifacts.into_iter().collect::<Vec<_>>(),
            [Artifact::Snapshot, Artifact::Anchor, Artifact::Copy, Artifact::Published]
        );
        assert_eq!(record.registration, Registration::Unposted);
        assert_eq!(record.source_image.unwrap().image, "volumes/volume-1");
        assert!(record.needs_repair && record.outcome.is_none());
        assert!(record.unknown.is_empty(), "{:?}", record.unknown);
    }

    #[test]
    fn flags_of_format_1_become_states() {
        let cancelled = Record::parse(&stored(json!({"cancel": true}))).unwrap();
        assert_eq!(cancelled.pending_outcome().unwrap().state, State::Cancelled);
        let ended = Record::parse(&stored(json!({"state": "declined", "reason": "no", "told": true}))).unwrap();
        assert_eq!((ended.outcome.as_ref().unwrap().report, ended.is_reported()), (Reporting::Begun, true));
        let first = json!({"snapshot": false, "copy": true, "published": true, "active": false});
        let first = Record::parse(&stored(json!({"made": first}))).unwrap();
        assert_eq!(first.registration, Registration::Posted, "it may have been");
    }
}
