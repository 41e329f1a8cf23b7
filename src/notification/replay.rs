//! Feeds notifications from a JSONL file to the sink, as if they had come from the broker.

use std::borrow::Cow;
use std::io::{self, BufRead, Read};

use serde::Deserialize;

use super::envelope::{EnvelopeError, MAX_BODY};
use super::event::Notification;
use super::sink::{Meta, Sink, SinkError};

/// Bytes of a line: a body at its most, and what escaping and the delivery's facts add.
const MAX_LINE: u64 = 2 * MAX_BODY as u64 + 64 * 1024;

/// What became of the lines.
#[derive(Debug, Default)]
pub struct ReplaySummary {
    pub accepted: u64,
    pub irrelevant: u64,
    /// Lines that went wrong, by number from 1; the rest of the file was read all the same.
    pub failed: Vec<(u64, LineError)>,
}

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum LineError {
    #[error("the line is longer than a notification can be")]
    TooLong,
    #[error(transparent)]
    Unreadable(#[from] EnvelopeError),
    #[error("not stored: {0}")]
    Sink(#[from] SinkError),
}

/// A line as captured: the delivery's facts and the body's text.
#[derive(Deserialize)]
struct Captured<'a> {
    #[serde(borrow)]
    body_raw: Cow<'a, str>,
    #[serde(default)]
    delivery_info: DeliveryInfo,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct DeliveryInfo {
    exchange: String,
}

/// Reads to the end. Each line is a captured delivery (`body_raw`, `delivery_info`), an envelope or a bare message;
/// empty lines are passed over. Errors come from reading only.
pub async fn replay(mut reader: impl BufRead, sink: &dyn Sink) -> io::Result<ReplaySummary> {
    let mut summary = ReplaySummary::default();
    let mut line = Vec::new();
    for number in 1u64.. {
        line.clear();
        if (&mut reader).take(MAX_LINE).read_until(b'\n', &mut line)? == 0 {
            break;
        }
        if line.len() as u64 == MAX_LINE && !line.ends_with(b"\n") {
            reader.skip_until(b'\n')?;
            summary.failed.push((number, LineError::TooLong));
            continue;
        }
        let text = line.trim_ascii();
        if text.is_empty() {
            continue;
        }
        match feed(text, sink).await {
            Ok(true) => summary.accepted += 1,
            Ok(false) => summary.irrelevant += 1,
            Err(error) => summary.failed.push((number, error)),
        }
    }
    Ok(summary)
}

/// False: irrelevant.
async fn feed(text: &[u8], sink: &dyn Sink) -> Result<bool, LineError> {
    let (body, delivery) = match serde_json::from_slice::<Captured>(text) {
        Ok(captured) => (Cow::Owned(captured.body_raw.into_owned().into_bytes()), captured.delivery_info),
        Err(_) => (Cow::Borrowed(text), DeliveryInfo::default()),
    };
    match Notification::read(&body, None)? {
        Notification::Irrelevant(_) => Ok(false),
        Notification::Relevant { event, event_type, message_id } => {
            let meta = Meta { event_type, message_id, exchange: delivery.exchange };
            sink.accept(event, meta).await?;
            Ok(true)
        }
    }
}
