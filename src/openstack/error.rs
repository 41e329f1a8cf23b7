//! Errors of OpenStack's services, with the call and the answer. Bodies are shortened and hold no token.

use std::fmt;

use http::StatusCode;
use serde_json::Value;

pub type Result<T> = std::result::Result<T, Error>;

/// Characters of a service's own words that an error keeps.
const DETAIL_LIMIT: usize = 200;

/// A failed call. Displays as `Glance: update image 1234: 403 Forbidden: …`.
#[derive(Debug, Clone)]
pub struct Error {
    call: String,
    kind: ErrorKind,
    detail: String,
}

/// What a caller may want to do about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// 401, also after a new login.
    Unauthorized,
    /// 403.
    Forbidden,
    /// 409.
    Conflict,
    /// 413, or 403 for a quota.
    OverLimit,
    /// Another 4xx.
    Refused,
    /// The configuration cannot work, whatever the services answer.
    Misconfigured,
    /// 5xx, 429, a timeout, or no connection.
    Unavailable,
    /// An answer that is not what the API promises.
    Protocol,
    /// An answer that is longer than the limit.
    TooLarge,
    /// The catalog has no such service.
    NoService,
}

impl Error {
    pub fn new(call: impl Into<String>, kind: ErrorKind, detail: impl Into<String>) -> Self {
        Self { call: call.into(), kind, detail: detail.into() }
    }

    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The same error under another kind, where the caller knows better than the status.
    pub(super) fn with_kind(self, kind: ErrorKind) -> Self {
        Self { kind, ..self }
    }

    /// Whether a retry may succeed.
    pub fn is_transient(&self) -> bool {
        matches!(self.kind, ErrorKind::Unavailable | ErrorKind::Unauthorized | ErrorKind::Protocol)
    }

    /// An answer of another shape than the API's; `detail` names the field.
    pub(super) fn protocol(call: impl Into<String>, detail: impl Into<String>) -> Self {
        Self::new(call, ErrorKind::Protocol, detail)
    }

    /// From an answer that is not a success: its status and what its body says to a person.
    pub(super) fn from_status(call: impl Into<String>, status: StatusCode, body: &[u8]) -> Self {
        let text = message_of(status, body);
        let kind = kind_of(status, &text);
        let line = status_line(status);
        let detail = if text.is_empty() { line } else { format!("{line}: {text}") };
        Self::new(call, kind, detail)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.call, self.detail)
    }
}

impl std::error::Error for Error {}

fn status_line(status: StatusCode) -> String {
    match status.canonical_reason() {
        Some(reason) => format!("{} {reason}", status.as_u16()),
        None => status.as_u16().to_string(),
    }
}

fn kind_of(status: StatusCode, text: &str) -> ErrorKind {
    match status.as_u16() {
        401 => ErrorKind::Unauthorized,
        403 => {
            let text = text.to_ascii_lowercase();
            if text.contains("quota") || text.contains("limit") { ErrorKind::OverLimit } else { ErrorKind::Forbidden }
        }
        409 => ErrorKind::Conflict,
        413 => ErrorKind::OverLimit,
        // 408: the server gave up waiting for the request.
        408 | 429 | 500..=599 => ErrorKind::Unavailable,
        400..=499 => ErrorKind::Refused,
        _ => ErrorKind::Protocol,
    }
}

/// The sentence in an error body: OpenStack wraps it as `{"error": {"message": …}}`, `{"itemNotFound": {"message":
/// …}}`, `{"message": …}`, or in a small HTML page; a proxy answers what it likes.
fn message_of(status: StatusCode, body: &[u8]) -> String {
    let text = match serde_json::from_slice::<Value>(body) {
        Ok(value) => json_message(&value).unwrap_or_default(),
        Err(_) => String::from_utf8_lossy(body).into_owned(),
    };
    let text = without_tags(&text);
    let line = status_line(status);
    shorten(text.strip_prefix(line.as_str()).unwrap_or(&text).trim())
}

fn json_message(value: &Value) -> Option<String> {
    let object = value.as_object()?;
    if let Some(message) = object.get("message").and_then(Value::as_str) {
        return Some(message.to_owned());
    }
    object.values().find_map(|inner| inner.get("message")?.as_str().map(str::to_owned))
}

/// Text of an HTML fragment on one line, without the page's title.
pub(super) fn without_tags(html: &str) -> String {
    let mut text = String::with_capacity(html.len().min(4096));
    let mut rest = html;
    while let Some(open) = rest.find('<') {
        text.push_str(&rest[..open]);
        let tag = &rest[open..];
        let is_tag = tag[1..].starts_with(|c: char| c.is_ascii_alphabetic() || c == '/' || c == '!');
        if !is_tag {
            text.push('<');
            rest = &tag[1..];
            continue;
        }
        let Some(close) = tag.find('>') else {
            rest = "";
            break;
        };
        let head = tag.get(..7).is_some_and(|name| name.eq_ignore_ascii_case("<title>"));
        rest = match (head, tag.find("</")) {
            (true, Some(end)) => &tag[end..],
            _ => &tag[close + 1..],
        };
        text.push(' ');
    }
    text.push_str(rest);
    let text = text
        .replace("&lt;", "<")
        .replace("&gt;", ">")
        .replace("&quot;", "\"")
        .replace("&#x27;", "'")
        .replace("&#39;", "'")
        .replace("&nbsp;", " ")
        .replace("&amp;", "&");
    text.split(|c: char| c.is_whitespace() || crate::text::is_unsafe(c))
        .filter(|word| !word.is_empty())
        .collect::<Vec<_>>()
        .join(" ")
}

/// At most [`DETAIL_LIMIT`] characters.
pub(super) fn shorten(text: &str) -> String {
    match text.char_indices().nth(DETAIL_LIMIT) {
        Some((end, _)) => format!("{}…", text[..end].trim_end()),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn of(status: u16, body: &str) -> Error {
        Error::from_status("Glance: update image 1234", StatusCode::from_u16(status).unwrap(), body.as_bytes())
    }

    #[test]
    fn a_glance_page_becomes_a_sentence() {
        let page = "<html>\n <head>\n  <title>403 Forbidden</title>\n </head>\n <body>\n  <h1>403 Forbidden</h1>\n  \
                    Attribute &#x27;disk_format&#x27; is read-only.<br /><br />\n\n\n </body>\n</html>";
        let error = of(403, page);
        assert_eq!(
            error.to_string(),
            "Glance: update image 1234: 403 Forbidden: Attribute 'disk_format' is read-only."
        );
        assert_eq!(error.kind(), ErrorKind::Forbidden);
    }

    #[test]
    fn every_service_wraps_its_message_in_its_own_way() {
        for (body, said) in [
            (r#"{"error": {"code": 401, "message": "expired", "title": "Unauthorized"}}"#, "expired"),
            (r#"{"itemNotFound": {"code": 404, "message": "no volume"}}"#, "no volume"),
            (r#"{"message": "no image<br /><br />\n\n", "code": "404 Not Found"}"#, "no image"),
            (r#"[1, 2]"#, ""),
            ("", ""),
            ("upstream connect error", "upstream connect error"),
        ] {
            assert_eq!(message_of(StatusCode::NOT_FOUND, body.as_bytes()), said, "{body}");
        }
    }

    #[test]
    fn the_kind_follows_the_status() {
        for (status, body, kind) in [
            (401, "", ErrorKind::Unauthorized),
            (403, "You are not authorized", ErrorKind::Forbidden),
            (403, "Image storage Quota exceeded", ErrorKind::OverLimit),
            (409, "", ErrorKind::Conflict),
            (413, "", ErrorKind::OverLimit),
            (429, "", ErrorKind::Unavailable),
            (400, "", ErrorKind::Refused),
            (415, "", ErrorKind::Refused),
            (500, "", ErrorKind::Unavailable),
            (503, "", ErrorKind::Unavailable),
            (302, "", ErrorKind::Protocol),
        ] {
            assert_eq!(of(status, body).kind(), kind, "{status} {body}");
        }
    }

    #[test]
    fn long_bodies_are_cut_at_a_character() {
        let error = of(500, &"ä".repeat(5000));
        assert_eq!(error.detail.chars().filter(|c| *c == 'ä').count(), DETAIL_LIMIT);
        assert!(error.detail.ends_with('…'));
    }

    proptest! {
        #[test]
        fn no_body_breaks_it(status in 100u16..1000, body in proptest::collection::vec(any::<u8>(), 0..600)) {
            let error = Error::from_status("x", StatusCode::from_u16(status).unwrap(), &body);
            prop_assert!(error.to_string().chars().count() < 300);
        }

        #[test]
        fn no_markup_breaks_it(html in "[<>/!&;#a-zA-Z€ \n]{0,200}") {
            prop_assert!(!without_tags(&html).contains('\n'));
        }
    }
}
