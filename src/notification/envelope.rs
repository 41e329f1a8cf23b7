//! From a delivery's bytes to the inner message: inflate what kombu compressed, take off the oslo.messaging envelope.
//!
//! Also [`peek_event_type`], which finds a message's type in its first bytes, so that what does not matter is dropped
//! unread.

use std::borrow::Cow;
use std::io::Read;

use serde::Deserialize;
use serde_json::value::RawValue;

/// Bytes of a body, as it comes and inflated. Nova's largest notifications are below 100 KiB.
pub const MAX_BODY: usize = 16 * 1024 * 1024;

/// Why a message cannot be read. Holds no part of the message: bodies can hold live tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, thiserror::Error)]
pub enum EnvelopeError {
    #[error("the body is larger than 16 MiB")]
    TooLarge,
    #[error("the body is larger than 16 MiB when inflated")]
    TooLargeInflated,
    #[error("the body is compressed in a way other than zlib, gzip and bzip2")]
    UnknownCompression,
    #[error("the compressed body is damaged")]
    BadCompression,
    #[error("the body is not UTF-8")]
    NotUtf8,
    #[error("the body is not a JSON object")]
    NotJson,
    #[error("the envelope's version is not 2.x")]
    EnvelopeVersion,
    #[error("the envelope holds no text of a message")]
    NoMessage,
    #[error("the message in the envelope is not a JSON object")]
    MessageNotJson,
    #[error("the message has no event_type")]
    NoEventType,
    #[error("the payload is not an object")]
    PayloadNotObject,
    #[error("the payload lacks a field, or holds one of another type than the service sends")]
    PayloadShape,
    #[error("an id in the payload is not a UUID")]
    BadId,
}

impl EnvelopeError {
    /// For a metric's label; never changes.
    pub fn label(self) -> &'static str {
        match self {
            EnvelopeError::TooLarge => "too_large",
            EnvelopeError::TooLargeInflated => "too_large_inflated",
            EnvelopeError::UnknownCompression => "unknown_compression",
            EnvelopeError::BadCompression => "bad_compression",
            EnvelopeError::NotUtf8 => "not_utf8",
            EnvelopeError::NotJson => "not_json",
            EnvelopeError::EnvelopeVersion => "envelope_version",
            EnvelopeError::NoMessage => "no_message",
            EnvelopeError::MessageNotJson => "message_not_json",
            EnvelopeError::NoEventType => "no_event_type",
            EnvelopeError::PayloadNotObject => "payload_not_object",
            EnvelopeError::PayloadShape => "payload_shape",
            EnvelopeError::BadId => "bad_id",
        }
    }
}

/// The body's text. `compression` is kombu's header of that name, or the content encoding.
///
/// kombu calls what `zlib.compress` writes `application/x-gzip`; both framings are taken under either name.
pub fn inflate<'a>(body: &'a [u8], compression: Option<&str>) -> Result<Cow<'a, [u8]>, EnvelopeError> {
    if body.len() > MAX_BODY {
        return Err(EnvelopeError::TooLarge);
    }
    let name = compression.unwrap_or_default().trim().to_ascii_lowercase();
    match name.as_str() {
        "" | "utf-8" | "utf8" | "us-ascii" | "ascii" | "binary" | "identity" => Ok(Cow::Borrowed(body)),
        "application/x-gzip" | "application/gzip" | "gzip" | "x-gzip" | "application/zlib" | "zlib" | "deflate" => {
            if body.starts_with(&[0x1f, 0x8b]) {
                drain(flate2::read::MultiGzDecoder::new(body))
            } else {
                drain(flate2::read::ZlibDecoder::new(body))
            }
        }
        "application/x-bz2" | "application/x-bzip2" | "bzip2" | "bzip" | "bz2" => {
            drain(bzip2::read::MultiBzDecoder::new(body))
        }
        _ => Err(EnvelopeError::UnknownCompression),
    }
}

/// Stops one byte past the limit, so that a compression bomb is never inflated in memory.
fn drain<'a>(reader: impl Read) -> Result<Cow<'a, [u8]>, EnvelopeError> {
    let mut text = Vec::new();
    reader.take(MAX_BODY as u64 + 1).read_to_end(&mut text).map_err(|_| EnvelopeError::BadCompression)?;
    if text.len() > MAX_BODY {
        return Err(EnvelopeError::TooLargeInflated);
    }
    Ok(Cow::Owned(text))
}

/// Values stay text: serde_json walks over them without recursion, so that no nesting overflows the stack.
#[derive(Deserialize)]
struct Envelope<'a> {
    #[serde(borrow, rename = "oslo.version")]
    version: Option<&'a RawValue>,
    #[serde(borrow, rename = "oslo.message")]
    message: Option<&'a RawValue>,
}

/// The text of the inner message: out of an envelope 2.x (driver `messagingv2`), or the whole text (driver
/// `messaging`).
pub fn open(text: &[u8]) -> Result<Cow<'_, str>, EnvelopeError> {
    let text = std::str::from_utf8(text).map_err(|_| EnvelopeError::NotUtf8)?;
    // A derived struct would read an array too.
    if !text.trim_start().starts_with('{') {
        return Err(EnvelopeError::NotJson);
    }
    let envelope: Envelope = serde_json::from_str(text).map_err(|_| EnvelopeError::NotJson)?;
    let version = match (envelope.version, envelope.message) {
        (None, None) => return Ok(Cow::Borrowed(text)),
        (None, Some(_)) => return Err(EnvelopeError::EnvelopeVersion),
        (Some(version), _) => version,
    };
    let version: String = serde_json::from_str(version.get()).map_err(|_| EnvelopeError::EnvelopeVersion)?;
    if version.split('.').next() != Some("2") {
        return Err(EnvelopeError::EnvelopeVersion);
    }
    let message = envelope.message.ok_or(EnvelopeError::NoMessage)?;
    serde_json::from_str(message.get()).map(Cow::Owned).map_err(|_| EnvelopeError::NoMessage)
}

/// The message's `event_type`, if it can be told from the first bytes: publishers write it third, after two short
/// strings. None: read the whole.
///
/// Walks the outermost keys only, inside the envelope's escaped text as it is (each `"` is `\"` there), and gives up at
/// the first thing that is not a plain string. It never mistakes a key inside the payload for the message's own.
pub fn peek_event_type(text: &[u8]) -> Option<&[u8]> {
    let mut outer = Scan { rest: text, quote: b"\"" };
    let mut version_2 = false;
    outer.skip(b"{")?;
    loop {
        let key = outer.string()?;
        outer.skip(b":")?;
        match key {
            b"oslo.message" if version_2 => {
                outer.space();
                let inner = outer.rest.strip_prefix(b"\"")?;
                let mut inner = Scan { rest: inner, quote: b"\\\"" };
                inner.skip(b"{")?;
                loop {
                    let key = inner.string()?;
                    inner.skip(b":")?;
                    let value = inner.string()?;
                    if key == b"event_type" {
                        return Some(value);
                    }
                    inner.skip(b",")?;
                }
            }
            b"oslo.message" => return None,
            b"oslo.version" => version_2 = outer.string()?.starts_with(b"2."),
            b"event_type" => return outer.string(),
            _ => {
                outer.string()?;
            }
        }
        outer.skip(b",")?;
    }
}

struct Scan<'a> {
    rest: &'a [u8],
    quote: &'static [u8],
}

impl<'a> Scan<'a> {
    fn space(&mut self) {
        while let Some(rest) = self.rest.strip_prefix(b" ") {
            self.rest = rest;
        }
    }

    fn skip(&mut self, token: &[u8]) -> Option<()> {
        self.space();
        self.rest = self.rest.strip_prefix(token)?;
        Some(())
    }

    /// A string without escapes.
    fn string(&mut self) -> Option<&'a [u8]> {
        self.skip(self.quote)?;
        let end = self.rest.iter().position(|byte| matches!(byte, b'"' | b'\\'))?;
        let (text, rest) = self.rest.split_at(end);
        self.rest = rest.strip_prefix(self.quote)?;
        Some(text)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic)]
mod tests {
    use std::io::Write;

    use super::*;

    const INNER: &str = r#"{"message_id": "1", "event_type": "image.create", "payload": {"event_type": "no"}}"#;

    fn wrapped(version: &str) -> String {
        serde_json::json!({"oslo.version": version, "oslo.message": INNER}).to_string()
    }

    fn zlib(text: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::best());
        encoder.write_all(text).unwrap();
        encoder.finish().unwrap()
    }

    fn gzip(text: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
        encoder.write_all(text).unwrap();
        encoder.finish().unwrap()
    }

    fn bz2(text: &[u8]) -> Vec<u8> {
        let mut encoder = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::best());
        encoder.write_all(text).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn every_envelope_version_is_opened_or_refused() {
        for version in ["2.0", "2.1", "2"] {
            assert_eq!(open(wrapped(version).as_bytes()).unwrap(), INNER);
        }
        for version in ["1.0", "3.0", "20.0", "", "x"] {
            assert_eq!(open(wrapped(version).as_bytes()), Err(EnvelopeError::EnvelopeVersion), "{version}");
        }
        assert_eq!(open(INNER.as_bytes()).unwrap(), INNER);
        for (text, reason) in [
            (r#"{"oslo.version": 2.0, "oslo.message": "{}"}"#, EnvelopeError::EnvelopeVersion),
            (r#"{"oslo.message": "{}"}"#, EnvelopeError::EnvelopeVersion),
            (r#"{"oslo.version": "2.0"}"#, EnvelopeError::NoMessage),
            (r#"{"oslo.version": "2.0", "oslo.message": {}}"#, EnvelopeError::NoMessage),
            (r#"["2.0", "{}"]"#, EnvelopeError::NotJson),
            ("", EnvelopeError::NotJson),
            ("{", EnvelopeError::NotJson),
        ] {
            assert_eq!(open(text.as_bytes()), Err(reason), "{text}");
        }
        assert_eq!(open(b"{\"a\": \"\xff\"}"), Err(EnvelopeError::NotUtf8));
    }

    #[test]
    fn every_compression_of_kombu_is_inflated() {
        let text = wrapped("2.0");
        let text = text.as_bytes();
        for (body, name) in [
            (zlib(text), "application/x-gzip"),
            (gzip(text), "application/x-gzip"),
            (gzip(text), "gzip"),
            (zlib(text), "zlib"),
            (bz2(text), "application/x-bz2"),
            (bz2(text), "bzip2"),
            (text.to_vec(), "utf-8"),
        ] {
            assert_eq!(inflate(&body, Some(name)).unwrap(), text, "{name}");
        }
        assert_eq!(inflate(text, None).unwrap(), text);
        for name in ["application/x-lzma", "application/x-brotli", "application/zstd", "rot13"] {
            assert_eq!(inflate(text, Some(name)), Err(EnvelopeError::UnknownCompression));
        }
        for name in ["gzip", "bzip2"] {
            assert_eq!(inflate(text, Some(name)), Err(EnvelopeError::BadCompression));
        }
        let cut = &zlib(text)[..20];
        assert_eq!(inflate(cut, Some("gzip")), Err(EnvelopeError::BadCompression));
    }

    #[test]
    fn compression_bombs_are_rejected() {
        let zeros = vec![b' '; 64 * 1024 * 1024];
        for (bomb, name) in [(zlib(&zeros), "gzip"), (gzip(&zeros), "gzip"), (bz2(&zeros), "bzip2")] {
            assert!(bomb.len() < 256 * 1024);
            assert_eq!(inflate(&bomb, Some(name)), Err(EnvelopeError::TooLargeInflated));
        }
        assert_eq!(inflate(&zeros, None), Err(EnvelopeError::TooLarge));
        let most = zlib(&zeros[..MAX_BODY]);
        assert_eq!(inflate(&most, Some("zlib")).unwrap().len(), MAX_BODY);
    }

    #[test]
    fn deep_nesting_does_not_overflow_the_stack() {
        let deep = "[".repeat(2_000_000);
        assert_eq!(open(format!("{{\"a\": {deep}").as_bytes()), Err(EnvelopeError::NotJson));
        let closed = format!("{{\"a\": {deep}{}}}", "]".repeat(2_000_000));
        assert!(open(closed.as_bytes()).is_ok());
    }

    #[test]
    fn the_event_type_is_found_without_parsing() {
        assert_eq!(peek_event_type(wrapped("2.0").as_bytes()), None, "serde_json sorts the keys");
        let body = format!(r#"{{"oslo.version": "2.0", "oslo.message": {}}}"#, serde_json::to_string(INNER).unwrap());
        assert_eq!(peek_event_type(body.as_bytes()), Some(&b"image.create"[..]));
        assert_eq!(peek_event_type(INNER.as_bytes()), Some(&b"image.create"[..]));
        for unsure in [
            r#"{"payload": {"event_type": "x"}, "event_type": "y"}"#,
            r#"{"message_id": "a\"b", "event_type": "y"}"#,
            r#"{"message_id": null, "event_type": "y"}"#,
            r#"{"oslo.version": "1.0", "oslo.message": "{\"event_type\": \"y\"}"}"#,
            r#"{"oslo.version": "2.0", "oslo.message": "{\"event_type\": \"\\u0079\"}"}"#,
            r#"{"event_type": "y"#,
            "",
        ] {
            assert_eq!(peek_event_type(unsure.as_bytes()), None, "{unsure}");
        }
    }
}
