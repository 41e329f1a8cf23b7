//! Writes events: one line of text, one JSON object, or one record of the journal each.
//!
//! A thread of its own writes them: standard error or journald may not read for a while, and a job must not wait for
//! that. Lines that find no room are dropped; the log says how many.
//!
//! An event has its own fields and those of the spans around it, each once: the event's own wins. So every line of a
//! job bears the job's `image_id` and `request_id`, in whatever module it was written.

use std::fmt::{self, Write as _};
use std::io::{self, IsTerminal, Write as _};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use jiff::Timestamp;
use serde_json::{Map, Value as Json};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;
use tracing_subscriber::registry::LookupSpan;

use super::known;
use crate::config::LogFormat;
use crate::text::is_unsafe;

/// Where journald takes records, in its own protocol (systemd.io/JOURNAL_NATIVE_PROTOCOL).
const JOURNAL: &str = "/run/systemd/journal/socket";

/// Bytes of one value: some are what tenants wrote. A record of the journal must fit into one datagram (about 200 KiB).
const MAX_VALUE: usize = 16 * 1024;

/// Lines that wait for the thread that writes them.
const MAX_WAITING: usize = 4096;

/// How long the end of the program waits for the last lines.
const FLUSH_LIMIT: Duration = Duration::from_secs(2);

/// A field of an event or a span.
#[derive(Debug, Clone, PartialEq)]
enum Value {
    Text(String),
    /// As its type displays itself.
    Shown(String),
    Plain(Json),
}

/// Fields in the order in which they came, each once.
#[derive(Debug, Default, Clone)]
struct Fields(Vec<(&'static str, Value)>);

impl Fields {
    /// The later value counts.
    fn set(&mut self, name: &'static str, value: Value) {
        match self.0.iter_mut().find(|(known, _)| *known == name) {
            Some((_, old)) => *old = value,
            // what the `log` crate's bridge adds about itself
            None if name.starts_with("log.") => {}
            None => self.0.push((name, value)),
        }
    }

    /// Adds those that are not there.
    fn inherit(&mut self, outer: &Fields) {
        for (name, value) in &outer.0 {
            if !self.0.iter().any(|(known, _)| known == name) {
                self.0.push((name, value.clone()));
            }
        }
    }

    fn take(&mut self, name: &str) -> Option<Value> {
        let at = self.0.iter().position(|(known, _)| *known == name)?;
        Some(self.0.remove(at).1)
    }

    fn text(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(known, _)| *known == name).and_then(|(_, value)| match value {
            Value::Text(text) | Value::Shown(text) => Some(text.as_str()),
            Value::Plain(_) => None,
        })
    }
}

impl Visit for Fields {
    fn record_f64(&mut self, field: &Field, value: f64) {
        self.set(field.name(), Value::Plain(value.into()));
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.set(field.name(), Value::Plain(value.into()));
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.set(field.name(), Value::Plain(value.into()));
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.set(field.name(), Value::Plain(value.into()));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.set(field.name(), Value::Text(shorten(value).to_owned()));
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let mut text = format!("{value:?}");
        text.truncate(shorten(&text).len());
        self.set(field.name(), Value::Shown(text));
    }
}

/// At most [`MAX_VALUE`] bytes.
fn shorten(text: &str) -> &str {
    text.get(..text.floor_char_boundary(MAX_VALUE)).unwrap_or(text)
}

/// An event, ready to be written.
struct Entry {
    at: Timestamp,
    level: Level,
    message: String,
    /// Of a known event.
    id: Option<&'static str>,
    fields: Fields,
}

/// Where events go, and as what.
pub enum Output {
    Text { colours: bool },
    Json,
    Journal(Arc<Journal>),
}

pub struct Journal {
    socket: UnixDatagram,
    path: PathBuf,
}

impl Output {
    /// # Errors
    /// When the journal is asked for and is not there.
    pub fn open(format: LogFormat) -> io::Result<Self> {
        Ok(match format {
            LogFormat::Text => Self::Text { colours: io::stderr().is_terminal() },
            LogFormat::Json => Self::Json,
            LogFormat::Journald => Self::journal(Path::new(JOURNAL))?,
        })
    }

    fn journal(path: &Path) -> io::Result<Self> {
        let socket = UnixDatagram::unbound()?;
        // an empty record is dropped; it tells whether there is a listener
        socket.send_to(&[], path).map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", path.display())))?;
        Ok(Self::Journal(Arc::new(Journal { socket, path: path.to_owned() })))
    }

    fn line(&self, entry: &Entry, metadata: &Metadata<'_>) -> Line {
        match self {
            Self::Text { colours } => Line::Stderr(text(entry, *colours)),
            Self::Json => Line::Stderr(json(entry)),
            Self::Journal(journal) => Line::Journal(Arc::clone(journal), record(entry, metadata)),
        }
    }
}

/// What the thread is given.
enum Line {
    Stderr(String),
    Journal(Arc<Journal>, Vec<u8>),
    /// Answered when all lines before it are written.
    Flush(SyncSender<()>),
}

impl Line {
    /// An error is ignored: the daemon does not stop for its log, and has no other place to report the error.
    fn write(self) {
        match self {
            Self::Stderr(line) => {
                let _ = io::stderr().lock().write_all(line.as_bytes());
            }
            Self::Journal(journal, record) => {
                let _ = journal.socket.send_to(&record, &journal.path);
            }
            Self::Flush(done) => {
                let _ = done.try_send(());
            }
        }
    }
}

/// The way to the thread that writes.
#[derive(Clone)]
pub struct LineSender {
    lines: SyncSender<Line>,
    dropped: Arc<AtomicU64>,
}

impl LineSender {
    /// # Errors
    /// When the thread cannot be started.
    fn start() -> io::Result<Self> {
        let (lines, waiting) = sync_channel(MAX_WAITING);
        let dropped = Arc::new(AtomicU64::new(0));
        let counted = Arc::clone(&dropped);
        std::thread::Builder::new().name("log".into()).spawn(move || write_lines(&waiting, &counted))?;
        Ok(Self { lines, dropped })
    }

    fn send(&self, line: Line) {
        if self.lines.try_send(line).is_err() {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Waits until the lines so far are written, for at most [`FLUSH_LIMIT`]. It blocks.
    pub fn flush(&self) {
        let (done, written) = sync_channel(1);
        if self.lines.try_send(Line::Flush(done)).is_ok() {
            let _ = written.recv_timeout(FLUSH_LIMIT);
        }
    }
}

fn write_lines(waiting: &Receiver<Line>, dropped: &AtomicU64) {
    for line in waiting {
        line.write();
        let lines = dropped.swap(0, Ordering::Relaxed);
        if lines > 0 {
            tracing::warn!(lines, "log lines were dropped: standard error or journald did not take them in time");
        }
    }
}

/// The layer that takes the events.
pub struct Writer {
    output: Arc<RwLock<Output>>,
    lines: LineSender,
}

impl Writer {
    /// # Errors
    /// When its thread cannot be started.
    pub fn new(output: Output) -> io::Result<Self> {
        Ok(Self { output: Arc::new(RwLock::new(output)), lines: LineSender::start()? })
    }

    /// Where the output can be replaced, and how the last lines are waited for.
    pub fn parts(&self) -> (Arc<RwLock<Output>>, LineSender) {
        (Arc::clone(&self.output), self.lines.clone())
    }
}

impl<S: Subscriber + for<'span> LookupSpan<'span>> Layer<S> for Writer {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let Some(span) = context.span(id) else { return };
        let mut fields = Fields::default();
        attributes.record(&mut fields);
        span.extensions_mut().replace(fields);
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, context: Context<'_, S>) {
        let Some(span) = context.span(id) else { return };
        if let Some(fields) = span.extensions_mut().get_mut::<Fields>() {
            values.record(fields);
        }
    }

    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        let mut fields = Fields::default();
        event.record(&mut fields);
        for span in context.event_span(event).into_iter().flat_map(|span| span.scope()) {
            if let Some(outer) = span.extensions().get::<Fields>() {
                fields.inherit(outer);
            }
        }
        let message = match fields.take("message") {
            Some(Value::Text(text) | Value::Shown(text)) => text,
            Some(Value::Plain(value)) => value.to_string(),
            None => String::new(),
        };
        let id = known::id_of(&message, fields.text("job_stage"));
        let entry = Entry { at: Timestamp::now(), level: *event.metadata().level(), message, id, fields };
        let line = self.output.read().unwrap_or_else(PoisonError::into_inner).line(&entry, event.metadata());
        self.lines.send(line);
    }
}

/// `2026-01-02T03:04:05.678901Z  INFO job state changed image_id=… job_stage="copying"`
fn text(entry: &Entry, colours: bool) -> String {
    let (on, off) = match entry.level {
        _ if !colours => ("", ""),
        Level::ERROR => ("\x1b[31m", "\x1b[0m"),
        Level::WARN => ("\x1b[33m", "\x1b[0m"),
        Level::INFO => ("\x1b[32m", "\x1b[0m"),
        _ => ("\x1b[34m", "\x1b[0m"),
    };
    let mut line = format!("{:.6} {on}{:>5}{off} ", entry.at, entry.level.as_str());
    push_escaped(&mut line, &entry.message);
    for (name, value) in &entry.fields.0 {
        // writing to a String does not fail
        let _ = write!(line, " {name}=");
        match value {
            Value::Text(text) => {
                let _ = write!(line, "{text:?}");
            }
            Value::Shown(text) => push_escaped(&mut line, text),
            Value::Plain(value) => {
                let _ = write!(line, "{value}");
            }
        }
    }
    line.push('\n');
    line
}

/// Without line ends and what else a terminal would act on: one event stays one line, whatever others put into it.
fn push_escaped(line: &mut String, text: &str) {
    for c in text.chars() {
        if is_unsafe(c) { line.extend(c.escape_default()) } else { line.push(c) }
    }
}

fn json(entry: &Entry) -> String {
    let mut object = Map::new();
    object.insert("timestamp".into(), format!("{:.6}", entry.at).into());
    object.insert("level".into(), entry.level.as_str().into());
    object.insert("message".into(), entry.message.as_str().into());
    if let Some(id) = entry.id {
        object.insert("message_id".into(), id.into());
    }
    for (name, value) in &entry.fields.0 {
        let value = match value {
            Value::Text(text) | Value::Shown(text) => text.as_str().into(),
            Value::Plain(value) => value.clone(),
        };
        // the event's own head is not overwritten
        object.entry(*name).or_insert(value);
    }
    format!("{}\n", Json::Object(object))
}

/// A record in journald's own protocol.
fn record(entry: &Entry, metadata: &Metadata<'_>) -> Vec<u8> {
    let priority = match entry.level {
        Level::ERROR => "3",
        Level::WARN => "4",
        Level::INFO => "6",
        _ => "7",
    };
    let mut record = Vec::with_capacity(512);
    put(&mut record, "PRIORITY", priority);
    put(&mut record, "SYSLOG_IDENTIFIER", "rbd-offload");
    put(&mut record, "MESSAGE", &entry.message);
    put(&mut record, "TARGET", metadata.target());
    if let Some(id) = entry.id {
        put(&mut record, "MESSAGE_ID", id);
    }
    if let (Some(file), Some(line)) = (metadata.file(), metadata.line()) {
        put(&mut record, "CODE_FILE", file);
        put(&mut record, "CODE_LINE", &line.to_string());
    }
    for (name, value) in &entry.fields.0 {
        let name = journal_name(name);
        match value {
            Value::Text(text) | Value::Shown(text) => put(&mut record, &name, text),
            Value::Plain(value) => put(&mut record, &name, &value.to_string()),
        }
    }
    record
}

/// Capitals, digits and `_`, not beginning with the latter two: journald drops a field of another name.
fn journal_name(name: &str) -> String {
    let name: String =
        name.chars().map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_uppercase() } else { '_' }).collect();
    name.trim_start_matches(|c: char| !c.is_ascii_uppercase()).to_owned()
}

/// The form with a length, which may hold any text.
fn put(record: &mut Vec<u8>, name: &str, value: &str) {
    if name.is_empty() {
        return;
    }
    let value = shorten(value).as_bytes();
    record.extend_from_slice(name.as_bytes());
    record.push(b'\n');
    record.extend_from_slice(&(value.len() as u64).to_le_bytes());
    record.extend_from_slice(value);
    record.push(b'\n');
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use tracing_subscriber::layer::SubscriberExt;

    use super::*;

    /// One event as text, as JSON, and as the journal's fields.
    type Written = (String, String, BTreeMap<String, String>);

    /// Keeps what the writer would write.
    #[derive(Clone, Default)]
    struct Kept(Arc<std::sync::Mutex<Vec<Written>>>);

    impl<S: Subscriber + for<'span> LookupSpan<'span>> Layer<S> for Kept {
        fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
            let mut fields = Fields::default();
            event.record(&mut fields);
            for span in context.event_span(event).into_iter().flat_map(|span| span.scope()) {
                fields.inherit(span.extensions().get::<Fields>().unwrap());
            }
            let message = match fields.take("message") {
                Some(Value::Shown(text) | Value::Text(text)) => text,
                other => panic!("{other:?}"),
            };
            let id = known::id_of(&message, fields.text("job_stage"));
            let at = "2026-01-02T03:04:05.678901Z".parse().unwrap();
            let entry = Entry { at, level: *event.metadata().level(), message, id, fields };
            let record = read_record(&record(&entry, event.metadata()));
            self.0.lock().unwrap().push((text(&entry, false), json(&entry), record));
        }
    }

    /// Takes a record apart as journald does.
    fn read_record(mut record: &[u8]) -> BTreeMap<String, String> {
        let mut fields = BTreeMap::new();
        while !record.is_empty() {
            let end = record.iter().position(|byte| *byte == b'\n').unwrap();
            let name = String::from_utf8(record[..end].to_vec()).unwrap();
            let length = u64::from_le_bytes(record[end + 1..end + 9].try_into().unwrap()) as usize;
            let value = String::from_utf8(record[end + 9..end + 9 + length].to_vec()).unwrap();
            assert_eq!(record[end + 9 + length], b'\n');
            assert!(fields.insert(name.clone(), value).is_none(), "{name} twice");
            record = &record[end + 10 + length..];
        }
        fields
    }

    fn written(work: impl FnOnce()) -> Vec<Written> {
        let kept = Kept::default();
        // the writer keeps the fields of the spans, and is to write nothing
        let writer = Writer::new(Output::Text { colours: false }).unwrap();
        let writer = writer.with_filter(tracing_subscriber::filter::filter_fn(|metadata| metadata.is_span()));
        let subscriber = tracing_subscriber::registry().with(writer).with(kept.clone());
        tracing::subscriber::with_default(subscriber, work);
        let written = kept.0.lock().unwrap();
        written.clone()
    }

    #[test]
    fn a_line_of_a_job_bears_the_ids_of_the_job_once() {
        let written = written(|| {
            let span = tracing::error_span!("job", image_id = %"i-1", request_id = %"r-1");
            let _in = span.enter();
            tracing::info!(image_id = %"i-1", job_stage = "done", seconds = 1.5, "the job ended");
            span.record("request_id", "r-2");
            tracing::warn!("something deep below");
        });
        let (text, json, record) = &written[0];
        assert_eq!(
            text,
            "2026-01-02T03:04:05.678901Z  INFO the job ended image_id=i-1 job_stage=\"done\" seconds=1.5 request_id=r-1\n"
        );
        let json: Json = serde_json::from_str(json).unwrap();
        assert_eq!(json["request_id"], "r-1");
        assert_eq!(json["seconds"], 1.5);
        assert_eq!(json["message_id"], "6a36fee497a84b48ad7d5abcc040c849");
        for (name, value) in [
            ("MESSAGE", "the job ended"),
            ("MESSAGE_ID", "6a36fee497a84b48ad7d5abcc040c849"),
            ("IMAGE_ID", "i-1"),
            ("REQUEST_ID", "r-1"),
            ("JOB_STAGE", "done"),
            ("PRIORITY", "6"),
            ("SYSLOG_IDENTIFIER", "rbd-offload"),
        ] {
            assert_eq!(record.get(name).map(String::as_str), Some(value), "{name}");
        }
        let (_, json, record) = &written[1];
        assert!(json.contains("\"request_id\":\"r-2\"") && json.contains("\"image_id\":\"i-1\""), "{json}");
        assert_eq!((record["REQUEST_ID"].as_str(), record.get("MESSAGE_ID")), ("r-2", None));
    }

    #[test]
    fn one_event_is_one_line_whatever_is_in_it() {
        let hostile = "a\nb\r\x1b[2J\u{85}\u{202e}\u{2028}";
        let written = written(|| {
            tracing::error!(error = %hostile, quoted = hostile, "said: {hostile}");
        });
        let (text, json, record) = &written[0];
        for line in [text, json] {
            assert!(!line.trim_end_matches('\n').contains(|c: char| c.is_control() && c != '\u{85}'), "{line:?}");
            assert_eq!(line.matches('\n').count(), 1);
        }
        assert!(!text.trim_end_matches('\n').contains(is_unsafe), "{text:?}");
        assert_eq!(record["ERROR"], hostile);
    }

    #[test]
    fn a_value_that_is_too_long_is_cut_between_characters() {
        let long = "ü".repeat(MAX_VALUE);
        let written = written(|| tracing::info!(long, "long"));
        assert_eq!(written[0].2["LONG"], "ü".repeat(MAX_VALUE / 2));
        assert!(written[0].0.len() < MAX_VALUE + 100 && written[0].1.len() < MAX_VALUE + 200);
    }

    #[test]
    fn names_are_such_as_the_journal_takes() {
        for (name, wanted) in [("image_id", "IMAGE_ID"), ("_x", "X"), ("1st", "ST"), ("a.b-c", "A_B_C"), ("__", "")] {
            assert_eq!(journal_name(name), wanted);
        }
    }

    #[test]
    fn a_journal_that_does_not_read_holds_up_no_event() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        let journal = UnixDatagram::bind(&path).unwrap();
        let writer = Writer::new(Output::journal(&path).unwrap()).unwrap();
        let (_, lines) = writer.parts();
        // the empty record, by which the listener was found
        assert_eq!(journal.recv(&mut [0; 16]).unwrap(), 0);
        // the journal never reads these: an event that waited for it would wait for good
        let sent = MAX_WAITING + 1000;
        let subscriber = tracing_subscriber::registry().with(writer);
        tracing::subscriber::with_default(subscriber, || {
            for number in 0..sent {
                tracing::info!(number, "said");
            }
        });
        let dropped = usize::try_from(lines.dropped.load(Ordering::Relaxed)).unwrap();
        assert!((1..sent).contains(&dropped), "{dropped}");
        // it reads again, and gets the others in their order
        journal.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let mut heard = vec![0; 1 << 16];
        for number in 0..sent - dropped {
            let length = journal.recv(&mut heard).unwrap();
            assert_eq!(read_record(&heard[..length])["NUMBER"], number.to_string());
        }
        lines.flush();
    }

    #[test]
    fn a_journal_record_arrives_as_it_was_sent() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        let journal = UnixDatagram::bind(&path).unwrap();
        journal.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let mut record = Vec::new();
        for number in 0..10 {
            put(&mut record, &format!("F{number}"), &"x".repeat(2 * MAX_VALUE));
        }
        UnixDatagram::unbound().unwrap().send_to(&record, &path).unwrap();
        let mut heard = vec![0; 1 << 20];
        let length = journal.recv(&mut heard).unwrap();
        assert_eq!(read_record(&heard[..length]).len(), 10);
    }
}
