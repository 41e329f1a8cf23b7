//! Why a command failed, and the exit status for it.

use std::fmt;

use crate::ceph;
use crate::config;
use crate::job::store;
use crate::openstack;

/// Why a command did not do what it was asked; the text is for a person.
#[derive(Debug)]
pub struct Failure {
    pub code: u8,
    message: String,
}

impl Failure {
    /// EX_USAGE
    pub const USAGE: u8 = 64;
    /// EX_DATAERR
    pub const DATA: u8 = 65;
    /// EX_NOINPUT
    pub const NO_INPUT: u8 = 66;
    /// EX_UNAVAILABLE: a service does not answer, or the request was declined.
    pub const UNAVAILABLE: u8 = 69;
    /// EX_SOFTWARE
    pub const SOFTWARE: u8 = 70;
    /// EX_OSERR
    pub const OS: u8 = 71;
    /// EX_IOERR
    pub const IO: u8 = 74;
    /// EX_TEMPFAIL: a transient error.
    pub const TEMPORARY: u8 = 75;
    /// EX_NOPERM
    pub const NO_PERMISSION: u8 = 77;
    /// EX_CONFIG
    pub const CONFIG: u8 = 78;

    pub fn new(code: u8, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl From<config::Error> for Failure {
    fn from(error: config::Error) -> Self {
        Self::new(error.exit_code(), error.to_string())
    }
}

impl From<ceph::Error> for Failure {
    fn from(error: ceph::Error) -> Self {
        let code = match error.kind() {
            ceph::ErrorKind::PermissionDenied => Self::NO_PERMISSION,
            ceph::ErrorKind::NotFound => Self::CONFIG,
            _ => Self::UNAVAILABLE,
        };
        Self::new(code, error.to_string())
    }
}

impl From<store::Error> for Failure {
    fn from(error: store::Error) -> Self {
        match error {
            store::Error::Ceph(error) => error.into(),
            error @ (store::Error::Unreadable { .. } | store::Error::TooLarge { .. }) => {
                Self::new(Self::DATA, error.to_string())
            }
            error => Self::new(Self::UNAVAILABLE, error.to_string()),
        }
    }
}

impl From<openstack::Error> for Failure {
    fn from(error: openstack::Error) -> Self {
        let code = match error.kind() {
            openstack::ErrorKind::Unauthorized | openstack::ErrorKind::Forbidden => Self::NO_PERMISSION,
            _ => Self::UNAVAILABLE,
        };
        Self::new(code, error.to_string())
    }
}
