//! Why a command failed, and the exit status for it.

use std::fmt;

use crate::ceph;
use crate::config;
use crate::job::store;
use crate::openstack;

/// Every exit status of a command, and what it means, as the manual page and the reference have it.
pub const STATUSES: [(u8, &str); 12] = [
    (0, "All went well."),
    (1, "check: at least one check failed or was skipped."),
    (Failure::USAGE, "The command line is wrong."),
    (Failure::DATA, "A record or a line of the input cannot be read."),
    (Failure::NO_INPUT, "A file cannot be read, or there is no such job."),
    (
        Failure::UNAVAILABLE,
        "A service does not answer, the request was declined or failed (with --dry-run: would be declined), or the job \
         has ended another way.",
    ),
    (Failure::SOFTWARE, "A fault of the program."),
    (Failure::OS, "The operating system refused something."),
    (Failure::IO, "The output cannot be written."),
    (Failure::TEMPORARY, "A transient error: try again. request --wait: the time was up."),
    (Failure::NO_PERMISSION, "Ceph, Keystone or another service refused us."),
    (Failure::CONFIG, "The configuration is wrong; of request: the OS_* variables or clouds.yaml."),
];

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
    /// EX_SOFTWARE: also what a panic ends with.
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
            openstack::ErrorKind::Misconfigured => Self::CONFIG,
            _ => Self::UNAVAILABLE,
        };
        Self::new(code, error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::telemetry::sources;

    /// The constants of this file, with their names.
    fn constants() -> Vec<(&'static str, u8)> {
        let lines = include_str!("failure.rs").lines().filter_map(|line| line.trim().strip_prefix("pub const "));
        lines
            .filter_map(|line| line.split_once(": u8 = "))
            .map(|(name, number)| (name, number.trim_end_matches(';').parse().unwrap()))
            .collect()
    }

    #[test]
    fn the_statuses_are_those_that_commands_end_with() {
        let listed: BTreeSet<u8> = STATUSES.iter().map(|(status, _)| *status).collect();
        assert!(STATUSES.is_sorted_by_key(|(status, _)| *status) && listed.len() == STATUSES.len());
        let known: BTreeSet<u8> = constants().iter().map(|(_, number)| *number).chain([0, 1]).collect();
        assert_eq!(listed, known);
        let others: Vec<String> = sources::all()
            .into_iter()
            .filter(|(path, _)| !path.ends_with("cli/failure.rs"))
            .map(|(_, text)| text)
            .collect();
        for (name, _) in constants() {
            assert!(others.iter().any(|text| text.contains(&format!("Failure::{name}"))), "nothing ends with {name}");
        }
        let is_bare = |text: &str| text.split("ExitCode::from(").skip(1).any(|rest| rest.starts_with(char::is_numeric));
        assert!(!others.iter().any(|text| is_bare(text)), "a status that has no name");
    }

    #[test]
    fn an_error_of_each_kind_has_its_status() {
        let of = |kind| Failure::from(openstack::Error::new("Glance", kind, "x")).code;
        assert_eq!(of(openstack::ErrorKind::Unauthorized), Failure::NO_PERMISSION);
        assert_eq!(of(openstack::ErrorKind::Forbidden), Failure::NO_PERMISSION);
        assert_eq!(of(openstack::ErrorKind::Misconfigured), Failure::CONFIG);
        assert_eq!(of(openstack::ErrorKind::Unavailable), Failure::UNAVAILABLE);
    }
}
