//! `show`: one job, for a person or as the documented JSON.

use std::path::Path;
use std::process::ExitCode;

use jiff::{Timestamp, Unit};
use serde_json::{Value, json};
use uuid::Uuid;

use super::output::Colour;
use super::setup::{connect_store, image_id, no_such_job};
use super::{Failure, output};
use crate::job::record::{Publish, Record, Stage, State};
use crate::job::signal::Signal;
use crate::job::store::Stored;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Id of the image that the job makes.
    #[arg(value_parser = image_id)]
    image: Uuid,
    /// The documented fields, for programs.
    #[arg(long)]
    json: bool,
}

pub async fn show(config: &Path, args: Args) -> Result<ExitCode, Failure> {
    let store = connect_store(config).await?;
    let stored = store.load(args.image).await?.ok_or_else(|| no_such_job(args.image))?;
    let text = match args.json {
        true => output::json(&document(&stored.record))?,
        false => describe(&stored, Timestamp::now(), output::colours()),
    };
    output::print(&text).map(|_| ExitCode::SUCCESS)
}

/// A job as other programs read it. The names are a promise (`docs/reference/schemas/job.json`); the record's own other
/// fields are not shown.
pub fn document(record: &Record) -> Value {
    json!({
        "image_id": record.image_id,
        "source": record.source,
        "trigger": record.trigger,
        "project_id": record.project_id,
        "state": record.state,
        "method": record.method,
        "progress": record.progress,
        "bytes_total": record.bytes_total,
        "bytes_done": record.bytes_done,
        "attempts": record.attempts,
        "created_at": record.created_at,
        "updated_at": record.updated_at,
        "ended_at": record.ended_at,
        "owner": record.owner,
        "reason": record.reason,
        "stages": record.stages.iter().map(stage).collect::<Vec<_>>(),
    })
}

fn stage(stage: &Stage) -> Value {
    json!({ "name": stage.name, "started_at": stage.started_at, "seconds": stage.seconds })
}

/// How a state is shown on a terminal: an end catches the eye.
pub fn state_colour(state: State) -> Option<Colour> {
    match state {
        State::Done => Some(Colour::Green),
        State::Declined | State::Cancelled => Some(Colour::Yellow),
        State::Failed => Some(Colour::Red),
        State::Accepted | State::Copying | State::Publishing | State::Detaching => None,
    }
}

fn state(stored: &Stored, colours: bool) -> String {
    let name = stored.record.state.as_str();
    let state = match state_colour(stored.record.state).filter(|_| colours) {
        Some(colour) => colour.paint(name),
        None => name.to_owned(),
    };
    match stored {
        stored if stored.is_to_be_cancelled() => format!("{state}, to be cancelled"),
        stored if stored.signals.has(Signal::Retry) => format!("{state}, to be retried"),
        _ => state,
    }
}

/// Empty lines are left out.
fn describe(stored: &Stored, now: Timestamp, colours: bool) -> String {
    let record = &stored.record;
    let time = |at: Timestamp| {
        let seconds = at.round(Unit::Second).unwrap_or(at);
        format!("{seconds} ({} ago)", output::age(at, now))
    };
    let next = |at: Timestamp| format!("{} (in {})", at.round(Unit::Second).unwrap_or(at), output::age(now, at));
    let line = |text: &Option<String>| text.as_deref().map(output::line).unwrap_or_default();
    let mut progress = format!("{} %", record.progress);
    if record.bytes_total > 0 {
        let (done, total) = (output::bytes(record.bytes_done), output::bytes(record.bytes_total));
        progress.push_str(&format!(", {done} of {total}"));
    }
    let mut lines: Vec<(&str, String)> = vec![
        ("image", record.image_id.to_string()),
        ("source", record.source.map(|source| source.to_string()).unwrap_or_else(|| "not understood".to_owned())),
        ("trigger", record.trigger.as_str().to_owned()),
        ("project", line(&record.project_id)),
        ("state", state(stored, colours)),
        ("reason", line(&record.reason)),
        ("progress", progress),
        ("method", record.method.map(|method| method.as_str().to_owned()).unwrap_or_default()),
        ("published", if record.publish == Publish::AtOnce { "at once".to_owned() } else { String::new() }),
        ("fallback", line(&record.fallback)),
        ("attempts", if record.attempts == 0 { String::new() } else { format!("{} failed", record.attempts) }),
        ("next attempt", record.not_before.filter(|at| *at > now).map(next).unwrap_or_default()),
        ("owner", line(&record.owner)),
        ("created", time(record.created_at)),
        ("updated", time(record.updated_at)),
        ("ended", record.ended_at.map(time).unwrap_or_default()),
        ("request", record.request_id.to_string()),
    ];
    for (index, stage) in record.stages.iter().enumerate() {
        let took = match stage.seconds {
            Some(seconds) => format!("{seconds:.2} s"),
            None => format!("for {}", output::age(stage.started_at, now)),
        };
        lines.push((if index == 0 { "stages" } else { "" }, format!("{:<12}{took}", output::line(&stage.name))));
    }
    let shown = lines.into_iter().filter(|(_, text)| !text.is_empty());
    shown.map(|(name, text)| format!("{name:<14}{text}\n")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ceph::Version;
    use crate::cli::schemas;
    use crate::job::signal::Signals;
    use crate::request::{Source, Trigger};
    use crate::transfer::Method;

    fn job() -> Record {
        let source = Source::Snapshot("11111111-2222-4333-8444-555555555555".parse().unwrap());
        let id = "c99c2483-d3ea-4877-bd86-edb7c4607374".parse().unwrap();
        let then = Timestamp::from_second(1_000_000).unwrap();
        let mut job = Record::new(id, Trigger::VolumeUpload, Some(source), Some("p".into()), then);
        job.state = State::Copying;
        job.method = Some(Method::Clone);
        job.progress = 50;
        (job.bytes_total, job.bytes_done) = (4 << 30, 2 << 30);
        job.stages = vec![
            Stage { name: "plan".into(), started_at: then, seconds: Some(0.25) },
            Stage { name: "transfer".into(), started_at: then, seconds: None },
        ];
        job
    }

    #[test]
    fn the_document_has_the_promised_names_and_no_others() {
        let document = document(&job());
        let names = schemas::names_in(&document);
        assert_eq!(
            names,
            [
                "attempts",
                "bytes_done",
                "bytes_total",
                "created_at",
                "ended_at",
                "image_id",
                "method",
                "owner",
                "progress",
                "project_id",
                "reason",
                "source",
                "stages",
                "state",
                "trigger",
                "updated_at"
            ]
        );
        assert_eq!(schemas::names_of(&schemas::job()), names);
        let reference = include_str!("../../docs/reference/json.md");
        let (_, documented) = reference.split_once("## A job\n").unwrap();
        let (documented, _) = documented.split_once("\n## ").unwrap();
        for name in names {
            assert!(documented.contains(&format!("`{name}`")), "{name} is not in the reference");
        }
        for state in State::ALL {
            assert!(documented.contains(&format!("`{state}`")), "{state} is not in the reference");
        }
        assert_eq!(document["source"], json!({"kind": "snapshot", "id": "11111111-2222-4333-8444-555555555555"}));
        assert_eq!(document["trigger"], "volume-upload");
        assert_eq!(document["created_at"], "1970-01-12T13:46:40Z");
        assert_eq!(
            document["stages"][0],
            json!({"name": "plan", "started_at": "1970-01-12T13:46:40Z", "seconds": 0.25})
        );
        assert_eq!(document["stages"][1]["seconds"], Value::Null);
    }

    #[test]
    fn the_text_shows_the_fields_that_have_a_value() {
        let mut stored = Stored { record: job(), signals: Signals::default(), version: Version(1) };
        stored.record.not_before = Some(Timestamp::from_second(1_000_150).unwrap());
        let now = Timestamp::from_second(1_000_030).unwrap();
        let text = describe(&stored, now, true);
        for part in [
            "source        snapshot 11111111-2222-4333-8444-555555555555\n",
            "progress      50 %, 2.00 GiB of 4.00 GiB\n",
            "created       1970-01-12T13:46:40Z (30s ago)\n",
            "next attempt  1970-01-12T13:49:10Z (in 2m)\n",
            "stages        plan        0.25 s\n              transfer    for 30s\n",
        ] {
            assert!(text.contains(part), "{text}");
        }
        assert!(!text.contains("ended") && !text.contains("reason"), "{text}");
        stored.record.state = State::Failed;
        assert!(describe(&stored, now, true).contains("\nstate         \x1b[1;31mfailed\x1b[0m\n"));
        assert!(describe(&stored, now, false).contains("\nstate         failed\n"));
    }
}
