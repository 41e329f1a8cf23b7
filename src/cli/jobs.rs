//! `jobs`: the jobs of the whole cluster, read from RADOS.

use std::collections::BTreeSet;
use std::io::IsTerminal;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use futures::{StreamExt, TryStreamExt, stream};
use jiff::Timestamp;
use serde_json::{Value, json};
use uuid::Uuid;

use super::setup::connect_store;
use super::show::document;
use super::{Failure, output};
use crate::job::signal::Signal;
use crate::job::store::{Error, Store, Stored};

/// Records that are read at a time.
const AT_A_TIME: usize = 32;

/// Between two paintings.
const REFRESH: Duration = Duration::from_secs(2);

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Ended jobs too, and records that are in no index.
    #[arg(long)]
    all: bool,
    /// An array of the documents that `show --json` prints.
    #[arg(long)]
    json: bool,
    /// Paint it again every two seconds, until Ctrl-C.
    #[arg(long)]
    watch: bool,
}

/// A record, or why it cannot be read.
enum Entry {
    Job(Box<Stored>),
    Unreadable { image_id: Uuid, reason: String },
}

pub async fn jobs(config: &Path, args: Args) -> Result<ExitCode, Failure> {
    let store = connect_store(config).await?;
    if !args.watch {
        return output::print(&render(&store, &args).await?).map(|_| ExitCode::SUCCESS);
    }
    let clear = if std::io::stdout().is_terminal() { "\x1b[H\x1b[2J\x1b[3J" } else { "" };
    let watch = async {
        loop {
            let text = match render(&store, &args).await {
                Ok(text) => text,
                // a transient error
                Err(failure) => format!("{failure}\n"),
            };
            if !output::print(&format!("{clear}{text}"))? {
                return Ok(ExitCode::SUCCESS);
            }
            tokio::time::sleep(REFRESH).await;
        }
    };
    tokio::select! {
        ended = watch => ended,
        _ = tokio::signal::ctrl_c() => Ok(ExitCode::SUCCESS),
    }
}

async fn render(store: &Store, args: &Args) -> Result<String, Failure> {
    let entries = read(store, args.all).await?;
    if args.json {
        return output::json(&entries.iter().map(Entry::document).collect::<Vec<_>>());
    }
    if entries.is_empty() {
        return Ok(if args.all { "no jobs\n" } else { "no jobs; --all shows those that ended\n" }.to_owned());
    }
    Ok(table(&entries, Timestamp::now(), output::width()))
}

/// The jobs, the oldest first; what cannot be read comes last.
async fn read(store: &Store, all: bool) -> Result<Vec<Entry>, Failure> {
    let mut ids: BTreeSet<Uuid> = store.live().await?.into_iter().map(|(id, _)| id).collect();
    if all {
        ids.extend(store.ended().await?.into_iter().map(|(id, _)| id));
        ids.extend(store.scan().await?);
    }
    let mut entries: Vec<Entry> = stream::iter(ids)
        .map(|id| load(store, id))
        .buffer_unordered(AT_A_TIME)
        .try_filter_map(async |entry| Ok(entry.filter(|entry| all || entry.is_live())))
        .try_collect()
        .await?;
    entries.sort_by_key(Entry::order);
    Ok(entries)
}

async fn load(store: &Store, image_id: Uuid) -> Result<Option<Entry>, Failure> {
    match store.load(image_id).await {
        Ok(stored) => Ok(stored.map(|stored| Entry::Job(Box::new(stored)))),
        Err(Error::Unreadable { reason, .. }) => {
            Ok(Some(Entry::Unreadable { image_id, reason: format!("the record {reason}") }))
        }
        Err(error) => Err(error.into()),
    }
}

impl Entry {
    /// The index may still name a job that has just ended.
    fn is_live(&self) -> bool {
        match self {
            Self::Job(stored) => !stored.is_settled(),
            Self::Unreadable { .. } => true,
        }
    }

    fn order(&self) -> (Timestamp, Uuid) {
        match self {
            Self::Job(stored) => (stored.record.created_at, stored.record.image_id),
            Self::Unreadable { image_id, .. } => (Timestamp::MAX, *image_id),
        }
    }

    fn document(&self) -> Value {
        match self {
            Self::Job(stored) => document(&stored.record),
            Self::Unreadable { image_id, reason } => {
                json!({ "image_id": image_id, "state": "unreadable", "reason": reason })
            }
        }
    }

    /// `full_ids`: ids are written whole.
    fn row(&self, now: Timestamp, full_ids: bool) -> [String; 9] {
        let stored = match self {
            Self::Job(stored) => stored,
            Self::Unreadable { image_id, reason } => {
                let none = || "-".to_owned();
                let state = "unreadable".to_owned();
                let reason = output::line(reason);
                return [image_id.to_string(), state, none(), none(), none(), none(), none(), none(), reason];
            }
        };
        let record = &stored.record;
        let or_none = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
        let source = record.source.map(|source| {
            let id = if full_ids { source.id().to_string() } else { output::short(source.id()) };
            format!("{} {id}", source.kind())
        });
        let project = record.project_id.as_deref().map(|project| match full_ids {
            true => output::line(project),
            false => output::cut(&output::line(project), 9),
        });
        // host:pid:instance
        let owner = record.owner.as_deref().map(|owner| owner.rsplit_once(':').map_or(owner, |(owner, _)| owner));
        [
            record.image_id.to_string(),
            record.state.to_string(),
            format!("{:>3} %", record.progress),
            or_none(source),
            or_none(project),
            or_none(record.method.map(|method| method.as_str().to_owned())),
            output::age(record.created_at, now),
            or_none(owner.map(output::line)),
            reason(stored),
        ]
    }
}

fn reason(stored: &Stored) -> String {
    let reason = stored.record.reason.as_deref().map(output::line).unwrap_or_default();
    let wish = match stored {
        stored if stored.is_to_be_cancelled() => "to be cancelled",
        stored if stored.signals.has(Signal::Retry) => "to be retried",
        _ => return reason,
    };
    format!("{wish}; {reason}").trim_end_matches("; ").to_owned()
}

fn table(entries: &[Entry], now: Timestamp, width: Option<usize>) -> String {
    let headings = ["IMAGE", "STATE", "PROGRESS", "SOURCE", "PROJECT", "METHOD", "AGE", "OWNER", "REASON"];
    let rows: Vec<_> = entries.iter().map(|entry| entry.row(now, width.is_none())).collect();
    output::table(headings, &rows, width)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ceph::Version;
    use crate::job::record::{Record, State};
    use crate::job::signal::Signals;
    use crate::request::{Source, Trigger};
    use crate::transfer::Method;

    fn job() -> Record {
        let source = Source::Volume("11111111-2222-4333-8444-555555555555".parse().unwrap());
        let id = "c99c2483-d3ea-4877-bd86-edb7c4607374".parse().unwrap();
        let then = Timestamp::from_second(1_000_000).unwrap();
        let mut job = Record::new(id, Trigger::Request, Some(source), Some("0123456789abcdef".into()), then);
        job.state = State::Copying;
        job.method = Some(Method::ServerCopy);
        job.progress = 7;
        job.owner = Some("ctl1:77:5f0c".into());
        job.reason = Some("Glance:\n503".into());
        job
    }

    fn stored(record: Record) -> Stored {
        Stored { record, signals: Signals::default(), version: Version(1) }
    }

    #[test]
    fn the_table_is_whole_in_a_file_and_short_on_a_terminal() {
        let now = Timestamp::from_second(1_000_090).unwrap();
        let id = "00000000-0000-4000-8000-000000000001".parse().unwrap();
        let entries = [
            Entry::Job(Box::new(stored(job()))),
            Entry::Unreadable { image_id: id, reason: "the record was written by a newer version".into() },
        ];
        let whole = table(&entries, now, None);
        let lines: Vec<&str> = whole.lines().collect();
        assert_eq!(
            lines[0].split_whitespace().collect::<Vec<_>>(),
            ["IMAGE", "STATE", "PROGRESS", "SOURCE", "PROJECT", "METHOD", "AGE", "OWNER", "REASON"]
        );
        for part in [
            "c99c2483-d3ea-4877-bd86-edb7c4607374  copying",
            "  7 %",
            "volume 11111111-2222-4333-8444-555555555555  0123456789abcdef  server-copy  1m   ctl1:77  Glance: 503",
        ] {
            assert!(lines[1].contains(part), "{whole}");
        }
        assert!(lines[2].contains("unreadable") && lines[2].ends_with("by a newer version"), "{whole}");
        let narrow = table(&entries, now, Some(100));
        assert!(narrow.contains("volume 11111111  01234567…"), "{narrow}");
    }

    #[test]
    fn a_job_that_is_to_be_cancelled_says_so() {
        let mut job = stored(job());
        job.signals = Signals::of(&[Signal::Cancel]);
        assert_eq!(reason(&job), "to be cancelled; Glance: 503");
        job.record.reason = None;
        assert_eq!(reason(&job), "to be cancelled");
        job.signals = Signals::of(&[Signal::Retry]);
        assert_eq!(reason(&job), "to be retried");
    }

    #[test]
    fn an_unreadable_record_has_three_fields() {
        let image_id = "00000000-0000-4000-8000-000000000001".parse().unwrap();
        assert_eq!(
            Entry::Unreadable { image_id, reason: "r".into() }.document(),
            json!({"image_id": "00000000-0000-4000-8000-000000000001", "state": "unreadable", "reason": "r"})
        );
    }
}
