//! What real services emit: every captured notification is read, and no damage to one of them does harm.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read};
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use rbd_offload::notification::{
    EnvelopeError, Event, EventType, LineError, Meta, Notification, Sink, SinkError, replay,
};

fn file(name: &str) -> Box<dyn Read> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data/notifications").join(name);
    let file = std::fs::File::open(path).unwrap();
    if name.ends_with(".gz") { Box::new(flate2::read::GzDecoder::new(file)) } else { Box::new(file) }
}

/// The bodies as delivered.
fn bodies(name: &str) -> Vec<String> {
    BufReader::new(file(name))
        .lines()
        .map(|line| {
            let line: serde_json::Value = serde_json::from_str(&line.unwrap()).unwrap();
            line["body_raw"].as_str().unwrap().to_owned()
        })
        .collect()
}

fn all() -> Vec<String> {
    ["info.jsonl", "error.jsonl", "nova.jsonl.gz"].iter().flat_map(|name| bodies(name)).collect()
}

fn kind(event: &Event) -> &'static str {
    match event {
        Event::ImageChanged { .. } => "image changed",
        Event::ImageActive { .. } => "image active with our properties",
        Event::ImageDeleted { .. } => "image deleted",
        Event::VolumeUpload { .. } => "volume upload",
        Event::InstanceSnapshot { .. } => "instance snapshot",
        Event::LegacyInstanceSnapshot { .. } => "legacy instance snapshot",
    }
}

fn counts(bodies: &[String]) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for body in bodies {
        let what = match Notification::read(body.as_bytes(), Some("utf-8")).unwrap() {
            Notification::Irrelevant(event_type) => format!("- {event_type}"),
            Notification::Relevant { event, message_id, .. } => {
                assert!(message_id.is_some());
                kind(&event).to_owned()
            }
        };
        *counts.entry(what).or_default() += 1;
    }
    counts
}

fn expected(counts: &[(&str, usize)]) -> BTreeMap<String, usize> {
    counts.iter().map(|(what, n)| ((*what).to_owned(), *n)).collect()
}

#[test]
fn every_capture_is_read() {
    assert_eq!(
        counts(&bodies("info.jsonl")),
        expected(&[
            ("image deleted", 51),
            ("- image.activate", 13),
            ("- image.create", 58),
            ("- image.update", 160),
            ("- other", 208)
        ])
    );
    assert_eq!(counts(&bodies("error.jsonl")), expected(&[("- other", 5)]));
    assert_eq!(
        counts(&bodies("nova.jsonl.gz")),
        expected(&[
            ("image deleted", 20),
            ("instance snapshot", 16),
            ("legacy instance snapshot", 16),
            ("- image.create", 21),
            ("- image.update", 97),
            ("- image.activate", 3),
            ("- other", 632),
        ])
    );
}

/// The captures hold `gAAAAAB…` where Nova put a token, and contexts everywhere.
#[test]
fn nothing_of_a_context_is_kept() {
    let bodies = all();
    assert!(bodies.iter().filter(|body| body.contains("gAAAAAB")).count() > 0);
    for body in bodies {
        let token = body.replace("_context_auth_token\\\": null", "_context_auth_token\\\": \\\"gAAAAABfake\\\"");
        let whole = format!("{:?}", Notification::read(token.as_bytes(), None));
        let cut = Notification::read(&token.as_bytes()[..token.len() - 3], None);
        let shown = match cut {
            Err(error) => format!("{error} {error:?} {} {whole}", error.label()),
            Ok(_) => whole,
        };
        assert!(!shown.contains("gAAAA") && !shown.contains("req-"), "{shown}");
    }
}

/// Bytes flipped, cut out, doubled and swapped for what a parser trips over; ten thousand, the same each time.
#[test]
fn ten_thousand_damaged_ones_do_no_harm() {
    const TOKENS: &[&[u8]] = &[
        b"\"",
        b"\\",
        b"\\\"",
        b"\\\\\\\"",
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b":",
        b"null",
        b"-1e999",
        b"1e-400",
        b"99999999999999999999999",
        b"\\ud800",
        b"\\\\ud800",
        b"\xff\xfe",
        b"\xed\xa0\x80",
        b"\0",
        b"\\u0000",
        b"true",
        b"[[[[[[[[",
        b"{\\\"a\\\":",
        b"image.delete",
        b"image.create",
        b"queued",
        b"rbd-offload:",
        b"oslo.version",
        b"payload",
        b"event_type",
        b"2.0",
        b"3.0",
    ];
    const COMPRESSIONS: &[&str] = &["utf-8", "application/x-gzip", "bzip2", "zstd"];
    let mut rng = StdRng::seed_from_u64(0x0ff1_0ad5);
    let bodies = all();
    let mut fates: BTreeMap<String, usize> = BTreeMap::new();
    let mut longest = Duration::ZERO;
    for i in 0..10_000 {
        let mut body = bodies[rng.random_range(0..bodies.len())].clone().into_bytes();
        for _ in 0..rng.random_range(1..6) {
            if body.is_empty() {
                break;
            }
            // Half of the damage where the structure is.
            let reach = if rng.random() { body.len() } else { body.len().min(400) };
            let at = rng.random_range(0..reach);
            let end = (at + rng.random_range(1..40)).min(body.len());
            match rng.random_range(0..6) {
                0 => body[at] ^= 1 << rng.random_range(0..8),
                1 => body.truncate(at),
                2 => drop(body.drain(at..end)),
                3 => {
                    let piece = body[at..end].to_vec();
                    let to = rng.random_range(0..=body.len());
                    body.splice(to..to, piece);
                }
                _ => {
                    let token = TOKENS[rng.random_range(0..TOKENS.len())];
                    body.splice(at..end, token.iter().copied());
                }
            }
        }
        let compression = (i % 5 == 0).then(|| COMPRESSIONS[i / 5 % COMPRESSIONS.len()]);
        let started = Instant::now();
        let fate = match Notification::read(&body, compression) {
            Ok(Notification::Irrelevant(_)) => "irrelevant".to_owned(),
            Ok(Notification::Relevant { event, .. }) => kind(&event).to_owned(),
            Err(reason) => reason.label().to_owned(),
        };
        longest = longest.max(started.elapsed());
        *fates.entry(fate).or_default() += 1;
    }
    println!("{fates:?}, longest {longest:?}");
    assert!(longest < Duration::from_secs(20), "{longest:?}");
    assert!(fates.len() > 8, "the damage is too tame: {fates:?}");
}

/// Keeps what it is given; refuses deletions when told to.
#[derive(Default)]
struct Kept {
    events: Mutex<Vec<(Event, Meta)>>,
    refuse_deletions: bool,
}

#[async_trait]
impl Sink for Kept {
    async fn accept(&self, event: Event, meta: Meta) -> Result<(), SinkError> {
        if self.refuse_deletions && meta.event_type == EventType::ImageDelete {
            return Err(SinkError::new("no room"));
        }
        self.events.lock().unwrap().push((event, meta));
        Ok(())
    }
}

#[tokio::test]
async fn a_file_of_captures_is_replayed() {
    let sink = Kept::default();
    let summary = replay(BufReader::new(file("nova.jsonl.gz")), &sink).await.unwrap();
    assert_eq!((summary.accepted, summary.irrelevant), (52, 753));
    assert!(summary.failed.is_empty());
    let events = sink.events.lock().unwrap();
    assert!(events.iter().any(|(_, meta)| meta.exchange == "nova"));
}

#[tokio::test]
async fn envelopes_bare_messages_and_bad_lines_are_replayed() {
    let envelope = &bodies("info.jsonl").into_iter().find(|body| body.contains("image.delete")).unwrap();
    let bare =
        serde_json::from_str::<serde_json::Value>(envelope).unwrap()["oslo.message"].as_str().unwrap().to_owned();
    let long = format!("{{\"body_raw\": \"{}\"}}", "x".repeat(40 << 20));
    let text = format!("{envelope}\n\nnonsense\n{bare}\n[1]\n{long}\n{{\"a\": 1}}\n  {bare}  ");
    let sink = Kept::default();
    let summary = replay(text.as_bytes(), &sink).await.unwrap();
    assert_eq!((summary.accepted, summary.irrelevant), (3, 0));
    assert_eq!(
        summary.failed,
        [
            (3, LineError::Unreadable(EnvelopeError::NotJson)),
            (5, LineError::Unreadable(EnvelopeError::NotJson)),
            (6, LineError::TooLong),
            (7, LineError::Unreadable(EnvelopeError::NoEventType)),
        ]
    );

    let sink = Kept { refuse_deletions: true, ..Kept::default() };
    let summary = replay(bare.as_bytes(), &sink).await.unwrap();
    assert_eq!(summary.failed, [(1, LineError::Sink(SinkError::new("no room")))]);
}
