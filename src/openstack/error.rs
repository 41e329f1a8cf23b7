//! Errors of OpenStack's services: what was asked, what came back. Bodies are shortened and hold no token.

use std::fmt;

pub type Result<T> = std::result::Result<T, Error>;

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
    /// 5xx, 429, a timeout, or nobody there.
    Unavailable,
    /// An answer that is not what the API promises.
    Protocol,
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

    /// Whether it may pass by itself.
    pub fn is_transient(&self) -> bool {
        matches!(self.kind, ErrorKind::Unavailable | ErrorKind::Unauthorized | ErrorKind::Protocol)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.call, self.detail)
    }
}

impl std::error::Error for Error {}
