//! `jobs`: the jobs of the whole cluster, read from RADOS.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use futures::{StreamExt, TryStreamExt, stream};
use jiff::Timestamp;
use serde_json::{Value, json};
use uuid::Uuid;

use super::output::{Cell, Colour, Screen};
use super::setup::connect_store;
use super::show::{document, state_colour};
use super::{Failure, output};
use crate::job::record::State;
use crate::job::signal::Signal;
use crate::job::store::{Error, Store, Stored};

/// Records that are read at a time.
const MAX_CONCURRENT_READS: usize = 32;

/// Interval between two refreshes.
const REFRESH: Duration = Duration::from_secs(2);

/// State of a record that cannot be read, in the table and in JSON.
pub(super) const UNREADABLE: &str = "unreadable";

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Ended jobs too, and records that are in no index.
    #[arg(long)]
    all: bool,
    /// Only jobs of this project; the beginning of its id is enough.
    #[arg(long, value_name = "ID", value_parser = clap::builder::NonEmptyStringValueParser::new())]
    project: Option<String>,
    /// Only jobs in these states, separated by commas. An end state also lists ended jobs.
    #[arg(long = "state", value_name = "STATE", value_delimiter = ',', value_parser = states())]
    states: Vec<String>,
    /// The columns, separated by commas. On a terminal, the default is as many as fit.
    #[arg(long, value_name = "COLUMNS", value_delimiter = ',', value_enum, conflicts_with = "json")]
    format: Vec<Column>,
    /// An array of the documents that `show --json` prints.
    #[arg(long)]
    json: bool,
    /// Refresh it every two seconds, until Ctrl-C.
    #[arg(long)]
    watch: bool,
}

fn states() -> clap::builder::PossibleValuesParser {
    State::ALL.map(State::as_str).into_iter().chain([UNREADABLE]).collect::<Vec<_>>().into()
}

impl Args {
    /// Whether ended jobs are looked at.
    fn includes_ended(&self) -> bool {
        let ends =
            |state: &String| state == UNREADABLE || State::ALL.iter().any(|s| s.is_ended() && s.as_str() == state);
        self.all || self.states.iter().any(ends)
    }

    /// What is said where there is no job to list.
    fn nothing(&self) -> &'static str {
        match (self.states.is_empty() && self.project.is_none(), self.includes_ended()) {
            (true, true) => "no jobs",
            (true, false) => "no jobs; --all shows those that ended",
            (false, true) => "no such jobs",
            (false, false) => "no such jobs; --all looks at those that ended too",
        }
    }

    fn selects(&self, entry: &Entry) -> bool {
        let state = self.states.is_empty() || self.states.iter().any(|state| state == entry.state());
        let project = self.project.as_deref().is_none_or(|wanted| {
            matches!(entry, Entry::Job(stored)
                if stored.record.project_id.as_deref().is_some_and(|project| project.starts_with(wanted)))
        });
        state && project
    }
}

/// What the table can show of a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Column {
    Image,
    State,
    Progress,
    Source,
    Project,
    Method,
    /// Since the request.
    Age,
    /// Since the record was last written.
    Updated,
    /// What the job was started by.
    Trigger,
    /// Attempts that failed.
    Attempts,
    /// Of the disk.
    Size,
    Owner,
    Reason,
}

impl Column {
    const DEFAULT: [Self; 9] = [
        Self::Image,
        Self::State,
        Self::Progress,
        Self::Source,
        Self::Project,
        Self::Method,
        Self::Age,
        Self::Owner,
        Self::Reason,
    ];

    /// Those that a narrow terminal does without, the first first.
    const OPTIONAL: [Self; 5] = [Self::Owner, Self::Method, Self::Project, Self::Source, Self::Progress];

    fn heading(self) -> &'static str {
        match self {
            Self::Image => "IMAGE",
            Self::State => "STATE",
            Self::Progress => "PROGRESS",
            Self::Source => "SOURCE",
            Self::Project => "PROJECT",
            Self::Method => "METHOD",
            Self::Age => "AGE",
            Self::Updated => "UPDATED",
            Self::Trigger => "TRIGGER",
            Self::Attempts => "ATTEMPTS",
            Self::Size => "SIZE",
            Self::Owner => "OWNER",
            Self::Reason => "REASON",
        }
    }
}

/// A record, or why it cannot be read.
enum Entry {
    Job(Box<Stored>),
    Unreadable { image_id: Uuid, reason: String },
}

pub async fn jobs(config: &Path, args: Args) -> Result<ExitCode, Failure> {
    let store = connect_store(config).await?;
    if !args.watch {
        match render(&store, &args).await? {
            Some(text) => {
                output::print(&text)?;
            }
            None => output::eprint_line(args.nothing()),
        }
        return Ok(ExitCode::SUCCESS);
    }
    let mut screen = Screen::of_terminal();
    let watch = async {
        loop {
            let (text, said) = match render(&store, &args).await {
                Ok(Some(text)) => (text, None),
                Ok(None) => (String::new(), Some(args.nothing().to_owned())),
                // a transient error
                Err(failure) => (String::new(), Some(failure.to_string())),
            };
            let shown = match (&mut screen, said) {
                (Some(screen), Some(said)) => screen.replace(&said),
                (Some(screen), None) => screen.replace(&text),
                // data and messages are for different readers
                (None, Some(said)) => {
                    output::eprint_line(&said);
                    text
                }
                (None, None) => text,
            };
            if !output::print(&shown)? {
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

/// The table or the JSON. `None`: there is no job for the table.
async fn render(store: &Store, args: &Args) -> Result<Option<String>, Failure> {
    let mut entries = read(store, args.includes_ended()).await?;
    entries.retain(|entry| args.selects(entry));
    if args.json {
        return output::json(&entries.iter().map(Entry::document).collect::<Vec<_>>()).map(Some);
    }
    let style = TableStyle { now: Timestamp::now(), width: output::width(), colours: output::colours() };
    Ok((!entries.is_empty()).then(|| table(&entries, &args.format, style)))
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
        .buffer_unordered(MAX_CONCURRENT_READS)
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
                json!({ "image_id": image_id, "state": UNREADABLE, "reason": reason })
            }
        }
    }

    fn state(&self) -> &'static str {
        match self {
            Self::Job(stored) => stored.record.state.as_str(),
            Self::Unreadable { .. } => UNREADABLE,
        }
    }

    fn colour(&self) -> Option<Colour> {
        match self {
            Self::Unreadable { .. } => Some(Colour::Red),
            Self::Job(stored) => state_colour(stored.record.state),
        }
    }

    fn cell(&self, column: Column, style: &TableStyle) -> Cell {
        let text = match self {
            Self::Job(stored) => field(stored, column, style),
            Self::Unreadable { image_id, reason } => match column {
                Column::Image => Some(image_id.to_string()),
                Column::State => Some(UNREADABLE.to_owned()),
                Column::Reason => Some(output::line(reason)),
                _ => None,
            },
        };
        let colour = if style.colours && column == Column::State { self.colour() } else { None };
        Cell { text: text.unwrap_or_else(|| "-".to_owned()), colour }
    }
}

/// How a table is shown. `width`: of the terminal; without one nothing is cut, and ids are written whole.
struct TableStyle {
    now: Timestamp,
    width: Option<usize>,
    colours: bool,
}

fn field(stored: &Stored, column: Column, style: &TableStyle) -> Option<String> {
    let record = &stored.record;
    let is_whole = style.width.is_none();
    match column {
        Column::Image => Some(record.image_id.to_string()),
        Column::State => Some(record.state.to_string()),
        Column::Progress => Some(format!("{:>3} %", record.progress)),
        Column::Source => record.source.map(|source| {
            let id = if is_whole { source.id().to_string() } else { output::short(source.id()) };
            format!("{} {id}", source.kind())
        }),
        Column::Project => record.project_id.as_deref().map(|project| match is_whole {
            true => output::line(project),
            false => output::cut(&output::line(project), 9),
        }),
        Column::Method => record.method.map(|method| method.as_str().to_owned()),
        Column::Age => Some(output::age(record.created_at, style.now)),
        Column::Updated => Some(output::age(record.updated_at, style.now)),
        Column::Trigger => Some(record.trigger.as_str().to_owned()),
        Column::Attempts => Some(record.attempts.to_string()),
        Column::Size => (record.bytes_total > 0).then(|| output::bytes(record.bytes_total)),
        // host:pid:instance
        Column::Owner => {
            record.owner.as_deref().map(|owner| output::line(owner.rsplit_once(':').map_or(owner, |(owner, _)| owner)))
        }
        Column::Reason => Some(reason(stored)),
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

/// `format` empty: the default columns, without the optional ones that do not fit.
fn table(entries: &[Entry], format: &[Column], style: TableStyle) -> String {
    let mut columns = if format.is_empty() { Column::DEFAULT.to_vec() } else { format.to_vec() };
    let mut optional = if format.is_empty() { &Column::OPTIONAL[..] } else { &[] };
    loop {
        let headings: Vec<&str> = columns.iter().map(|column| column.heading()).collect();
        let row = |entry: &Entry| columns.iter().map(|column| entry.cell(*column, &style)).collect::<Vec<_>>();
        let rows: Vec<Vec<Cell>> = entries.iter().map(row).collect();
        let widths = output::widths(&headings, &rows);
        let last = widths.last().map_or(0, |last| (*last).min(output::LAST_COLUMN));
        let fits = style.width.is_none_or(|width| output::indent(&widths) + last <= width);
        match optional.split_first() {
            Some((unimportant, rest)) if !fits => {
                columns.retain(|column| column != unimportant);
                optional = rest;
            }
            _ => return output::table(&headings, &rows, style.width),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ceph::Version;
    use crate::job::record::Record;
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
        let style = |width| TableStyle { now, width, colours: false };
        let whole = table(&entries, &[], style(None));
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
        let narrow = table(&entries, &[], style(Some(160)));
        assert!(narrow.contains("volume 11111111  01234567…"), "{narrow}");
        assert!(!narrow.contains('\x1b'), "{narrow}");
    }

    #[test]
    fn no_line_is_wider_than_the_terminal_and_the_id_is_whole() {
        let now = Timestamp::from_second(1_000_090).unwrap();
        let entries = [Entry::Job(Box::new(stored(job())))];
        let shown = |width| table(&entries, &[], TableStyle { now, width: Some(width), colours: false });
        for width in [70, 80, 100, 120, 160] {
            let table = shown(width);
            assert!(table.lines().all(|line| line.chars().count() <= width), "{width}:\n{table}");
            assert!(table.contains("c99c2483-d3ea-4877-bd86-edb7c4607374  copying"), "{table}");
            assert!(table.contains("Glance: 503"), "{table}");
        }
        assert!(shown(80).starts_with("IMAGE                                 STATE    PROGRESS  AGE  REASON\n"));
        assert!(shown(160).contains("OWNER"));
    }

    #[test]
    fn the_columns_that_are_asked_for_are_shown_and_states_have_a_colour() {
        let now = Timestamp::from_second(1_000_090).unwrap();
        let mut failed = job();
        failed.state = State::Failed;
        failed.bytes_total = 4 << 30;
        let entries = [Entry::Job(Box::new(stored(failed)))];
        let columns = [Column::State, Column::Size, Column::Updated];
        let table = |colours| table(&entries, &columns, TableStyle { now, width: Some(10), colours });
        assert_eq!(table(false), "STATE   SIZE      UPDATED\nfailed  4.00 GiB  1m\n");
        assert_eq!(table(true), "STATE   SIZE      UPDATED\n\x1b[1;31mfailed\x1b[0m  4.00 GiB  1m\n");
    }

    #[test]
    fn jobs_are_chosen_by_state_and_project() {
        use clap::Parser;
        #[derive(clap::Parser)]
        struct Line {
            #[command(flatten)]
            args: Args,
        }
        let args = |line: &str| Line::try_parse_from(["jobs"].into_iter().chain(line.split(' '))).map(|line| line.args);
        let entry = Entry::Job(Box::new(stored(job())));
        let unreadable = Entry::Unreadable { image_id: Uuid::nil(), reason: String::new() };
        let chosen = |line: &str| {
            let args = args(line).unwrap();
            (args.includes_ended(), args.selects(&entry), args.selects(&unreadable))
        };
        assert_eq!(chosen("--json"), (false, true, true));
        assert_eq!(chosen("--state copying,accepted"), (false, true, false));
        assert_eq!(chosen("--state failed"), (true, false, false));
        assert_eq!(chosen("--state unreadable --state copying"), (true, true, true));
        assert_eq!(chosen("--project 0123456789abcdef"), (false, true, false));
        assert_eq!(chosen("--project 0123 --all"), (true, true, false));
        assert_eq!(chosen("--project 123"), (false, false, false));
        assert!(args("--state broken").is_err() && args("--format image,nosuch").is_err());
        assert!(args("--format image --json").is_err(), "JSON has all fields");
        assert_eq!(args("--watch").unwrap().nothing(), "no jobs; --all shows those that ended");
        assert_eq!(args("--all").unwrap().nothing(), "no jobs");
        assert!(args("--project 1").unwrap().nothing().starts_with("no such jobs; --all"));
        assert_eq!(args("--state failed").unwrap().nothing(), "no such jobs");
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
