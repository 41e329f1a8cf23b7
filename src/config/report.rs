//! What is wrong with a configuration: every problem with its place and its remedy. Secrets never get in here.

use std::fmt;
use std::io;
use std::path::PathBuf;

use crate::text::Escaped;

/// sysexits(3): a configuration that is wrong.
const EX_CONFIG: u8 = 78;
/// sysexits(3): a file that cannot be read.
const EX_NOINPUT: u8 = 66;

/// Problems that one report prints; a file that is something else altogether has thousands.
const MAX_SHOWN: usize = 100;

/// Characters of a value that an error repeats.
const MAX_VALUE: usize = 80;

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file, or `conf.d`, that is there and cannot be read, or the main file that is not there.
    #[error("cannot read {}: {cause}", path.display())]
    Unreadable { path: PathBuf, cause: io::Error },
    /// What was read is wrong.
    #[error("{0}")]
    Wrong(Report),
}

impl Error {
    /// The status that the process ends with, as in sysexits(3).
    pub fn exit_code(&self) -> u8 {
        match self {
            Error::Unreadable { .. } => EX_NOINPUT,
            Error::Wrong(_) => EX_CONFIG,
        }
    }
}

/// Everything that is wrong, one line each.
#[derive(Debug, Default, Clone)]
pub struct Report {
    problems: Vec<Problem>,
}

/// One thing that is wrong. Displays as
/// `/etc/rbd-offload/rbd-offload.conf: [offload] method = clonee: one of auto, server-copy, copy, clone (line 12)`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    pub origin: Origin,
    pub section: Option<String>,
    pub key: Option<String>,
    /// As written; `None` for a secret and for what may be one.
    pub value: Option<String>,
    /// What is allowed, or what to do.
    pub says: String,
}

/// Where a value was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// Lines count from 1; 0: the file as a whole.
    File { path: PathBuf, line: usize },
    /// The name of an environment variable.
    Variable(String),
    /// The name of a file in systemd's directory of credentials.
    Credential(String),
}

impl Report {
    pub fn add(&mut self, problem: Problem) {
        self.problems.push(problem);
    }

    pub fn is_empty(&self) -> bool {
        self.problems.is_empty()
    }

    pub fn problems(&self) -> &[Problem] {
        &self.problems
    }
}

impl Problem {
    pub fn at(origin: Origin, says: impl Into<String>) -> Self {
        Self { origin, section: None, key: None, value: None, says: says.into() }
    }

    pub fn section(mut self, section: &str) -> Self {
        self.section = Some(section.to_owned());
        self
    }

    pub fn key(mut self, key: &str) -> Self {
        self.key = Some(key.to_owned());
        self
    }

    /// Not to be called for a secret. A URL with a user in it is left out all the same.
    pub fn value(mut self, value: &str) -> Self {
        self.value = (!(value.contains("://") && value.contains('@'))).then(|| value.to_owned());
        self
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, problem) in self.problems.iter().take(MAX_SHOWN).enumerate() {
            if number > 0 {
                writeln!(f)?;
            }
            write!(f, "{problem}")?;
        }
        match self.problems.len().saturating_sub(MAX_SHOWN) {
            0 => Ok(()),
            more => write!(f, "\nand {more} more"),
        }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.origin)?;
        if let Some(section) = &self.section {
            write!(f, "[{}]", Sanitized(section))?;
            if let Some(key) = &self.key {
                write!(f, " {}", Sanitized(key))?;
                if let Some(value) = &self.value {
                    write!(f, " = {}", Sanitized(value))?;
                }
            }
            f.write_str(": ")?;
        }
        f.write_str(&self.says)?;
        match self.origin {
            Origin::File { line, .. } if line > 0 => write!(f, " (line {line})"),
            _ => Ok(()),
        }
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::File { path, .. } => write!(f, "{}", path.display()),
            Origin::Variable(name) => write!(f, "environment variable {}", Sanitized(name)),
            Origin::Credential(name) => write!(f, "credential {}", Sanitized(name)),
        }
    }
}

/// Untrusted text, made safe for terminals and logs.
pub struct Sanitized<'a>(pub &'a str);

impl fmt::Display for Sanitized<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Escaped { text: self.0, limit: MAX_VALUE }.fmt(f)
    }
}
