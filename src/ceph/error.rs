//! Errors of Ceph: which operation failed on which object, and errno.

use std::{fmt, io};

pub type Result<T> = std::result::Result<T, Error>;

/// A failed operation. Displays as `clone volumes/volume-1@s to images/2: no space left (ENOSPC)`.
#[derive(Debug, Clone)]
pub struct Error {
    operation: String,
    kind: ErrorKind,
    detail: String,
    /// Positive; 0 where there was none.
    errno: i32,
}

/// What a caller may want to do about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    NotFound,
    Exists,
    /// Watchers, clones or a lock stand in the way.
    Busy,
    /// The object has another version than expected.
    Conflict,
    /// The lock that the write names is not held.
    NotLocked,
    /// The cephx user's capabilities do not allow it.
    PermissionDenied,
    NoSpace,
    /// The image has as many snapshots as its limit allows (or the quota of its pool is reached).
    SnapshotLimit,
    /// The image cannot be written here: it is a mirror whose primary is in another cluster, or its exclusive lock is
    /// not to be had.
    ReadOnly,
    /// This client was fenced (blocklisted).
    Fenced,
    /// Stopped by its caller.
    Cancelled,
    /// This image or cluster cannot do it.
    Unsupported,
    /// The object is larger than what is read or written.
    TooLarge,
    TimedOut,
    /// The pool is closed to this client, because the calls of other clients hang there.
    PoolClosed,
    Other,
}

impl Error {
    pub fn new(operation: impl Into<String>, kind: ErrorKind, detail: impl Into<String>) -> Self {
        Self { operation: operation.into(), kind, detail: detail.into(), errno: 0 }
    }

    /// From a C function's result: `errno` may carry either sign.
    pub fn from_errno(operation: impl Into<String>, errno: i32) -> Self {
        let errno = errno.abs();
        let kind = match errno {
            libc::ENOENT => ErrorKind::NotFound,
            libc::EEXIST => ErrorKind::Exists,
            libc::EBUSY | libc::ENOTEMPTY => ErrorKind::Busy,
            libc::ERANGE | libc::EOVERFLOW | libc::ECANCELED => ErrorKind::Conflict,
            libc::EPERM | libc::EACCES => ErrorKind::PermissionDenied,
            libc::ENOSPC | libc::EDQUOT => ErrorKind::NoSpace,
            libc::EROFS => ErrorKind::ReadOnly,
            libc::ESHUTDOWN => ErrorKind::Fenced,
            libc::EOPNOTSUPP | libc::ENOSYS => ErrorKind::Unsupported,
            libc::ETIMEDOUT => ErrorKind::TimedOut,
            _ => ErrorKind::Other,
        };
        Self { errno, ..Self::new(operation, kind, io::Error::from_raw_os_error(errno).to_string()) }
    }

    /// What a C function answered, positive; 0 where none did.
    pub fn errno(&self) -> i32 {
        self.errno
    }

    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The same error under another kind, where the caller knows better than errno.
    pub fn with_kind(mut self, kind: ErrorKind) -> Self {
        self.kind = kind;
        self
    }
}

/// What to do when a pool is full.
pub const MORE_SPACE: &str = "add space, or raise the pool's quota";

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.operation, self.detail)?;
        match self.kind {
            ErrorKind::NoSpace => write!(f, ": {MORE_SPACE}"),
            _ => Ok(()),
        }
    }
}

impl std::error::Error for Error {}
