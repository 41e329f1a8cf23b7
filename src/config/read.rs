//! What was written, and where: the file, `conf.d` beside it, credentials and the environment, one laid over the other.
//!
//! - A line is `key = value`, `[section]`, a comment that starts with `#` or `;`, or empty. There are no comments
//!   behind a value and no continued lines.
//! - A value is taken as it is, without the blanks around it and, as in oslo.config, without a pair of quotes around
//!   all of it. Nothing in it is an escape.
//! - An empty value resets a key that an earlier file sets: the default applies.
//! - `RBD_OFFLOAD_<SECTION>__<KEY>` in any case. For `[backend:NAME]` the section is `BACKEND_` and NAME with every
//!   character but letters and digits as `_` (`RBD_OFFLOAD_BACKEND_CEPH_SSD__POOL` for `[backend:ceph-ssd]`), which
//!   works for backends that a file describes, or `BACKEND:` and NAME as it is, where the environment can hold that.
//! - A credential is a file `<section>.<key>` in systemd's `$CREDENTIALS_DIRECTORY`: its text, without the blanks and
//!   line ends around it, is the value. A section's name may hold dots, a key's never does.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::ffi::OsString;
use std::fs;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use super::keys::{self, BACKEND, BACKEND_PREFIX, Key};
use super::report::{Error, Origin, Problem, Report, Sanitized};

/// A configuration is a few kilobytes; more than this is another file.
const MAX_BYTES: usize = 1024 * 1024;

const ENVIRONMENT_PREFIX: &str = "RBD_OFFLOAD_";

/// Where systemd puts what `LoadCredential=` and its like name.
const CREDENTIALS: &str = "CREDENTIALS_DIRECTORY";

/// A file as it lies on disk; at most one byte more than [`MAX_BYTES`] of it.
pub struct File {
    pub path: PathBuf,
    pub bytes: Vec<u8>,
}

/// A value, as written.
pub struct Value {
    pub text: String,
    pub origin: Origin,
}

/// Known keys with values that their keys accept, later ones over earlier ones.
#[derive(Default)]
pub struct RawConfig {
    sections: BTreeMap<String, BTreeMap<&'static str, Value>>,
}

/// `path` and `conf.d/*.conf` beside it, in the order in which they count.
pub fn files(path: &Path) -> Result<Vec<File>, Error> {
    let mut files = vec![file(path, fs::File::open(path))?];
    let folder = path.parent().unwrap_or(Path::new("")).join("conf.d");
    let unreadable = |cause| Error::Unreadable { path: folder.clone(), cause };
    let entries = match fs::read_dir(&folder) {
        Ok(entries) => entries,
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => return Ok(files),
        Err(cause) => return Err(unreadable(cause)),
    };
    let mut names = Vec::new();
    for entry in entries {
        let name = entry.map_err(unreadable)?.file_name();
        let bytes = name.as_encoded_bytes();
        if bytes.ends_with(b".conf") && !bytes.starts_with(b".") {
            names.push(name);
        }
    }
    names.sort();
    for name in names {
        let path = folder.join(name);
        files.push(file(&path, regular(&path))?);
    }
    Ok(files)
}

/// The files in the directory of credentials, if the environment names one; in lexical order.
pub fn credentials(environment: &[(OsString, OsString)]) -> Result<Vec<File>, Error> {
    let Some((_, folder)) = environment.iter().find(|(name, _)| name == CREDENTIALS) else { return Ok(Vec::new()) };
    let folder = Path::new(folder);
    let unreadable = |cause| Error::Unreadable { path: folder.to_path_buf(), cause };
    let mut paths = Vec::new();
    for entry in fs::read_dir(folder).map_err(unreadable)? {
        paths.push(entry.map_err(unreadable)?.path());
    }
    paths.sort();
    paths.into_iter().map(|path| file(&path, regular(&path))).collect()
}

/// Looked at before it is opened: opening a FIFO waits for its writer.
fn regular(path: &Path) -> io::Result<fs::File> {
    if fs::metadata(path)?.is_file() { fs::File::open(path) } else { Err(io::Error::other("not a regular file")) }
}

fn file(path: &Path, opened: io::Result<fs::File>) -> Result<File, Error> {
    let read = opened.and_then(|file| {
        let mut bytes = Vec::new();
        file.take(MAX_BYTES as u64 + 1).read_to_end(&mut bytes)?;
        Ok(bytes)
    });
    match read {
        Ok(bytes) => Ok(File { path: path.to_path_buf(), bytes }),
        Err(cause) => Err(Error::Unreadable { path: path.to_path_buf(), cause }),
    }
}

impl RawConfig {
    /// A value that is there and not empty, or the empty one of a key for which that means something.
    pub fn get(&self, section: &str, key: &str) -> Option<&Value> {
        self.sections.get(section)?.get(key)
    }

    /// Of `[backend:…]`.
    pub fn backends(&self) -> impl Iterator<Item = &str> {
        self.sections.keys().filter_map(|section| section.strip_prefix(BACKEND_PREFIX))
    }

    /// Sets the keys of a file, over earlier values.
    pub fn add_file(&mut self, file: &File, report: &mut Report) {
        let at = |line| Origin::File { path: file.path.clone(), line };
        if file.bytes.len() > MAX_BYTES {
            report.add(Problem::at(at(0), "larger than 1 MiB, so not a configuration of rbd-offload"));
            return;
        }
        let text = match str::from_utf8(&file.bytes) {
            Ok(text) => text.strip_prefix('\u{feff}').unwrap_or(text),
            Err(wrong) => {
                let before = file.bytes.iter().take(wrong.valid_up_to());
                let line = 1 + before.filter(|byte| **byte == b'\n').count();
                report.add(Problem::at(at(line), "not UTF-8 text"));
                return;
            }
        };
        for (section, lines) in scan(text, &at, report) {
            if !self.begin_section(&section, at(lines.header), report) {
                continue;
            }
            // In the order of the file, not of the alphabet.
            let mut values: Vec<_> = lines.values.into_iter().map(|(key, (line, text))| (line, key, text)).collect();
            values.sort();
            for (line, key, text) in values {
                self.add(&section, &key, text, at(line), report);
            }
        }
    }

    /// Sets a key from a credential of the key's name. A credential with the name of no key is an error, as an unknown
    /// key in a file is: a secret that is never read is a mistake.
    pub fn add_credential(&mut self, file: &File, report: &mut Report) {
        let name = file.path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let origin = Origin::Credential(name.clone());
        let Some((section, key)) = name.rsplit_once('.') else {
            report.add(Problem::at(origin, "its name is not that of a key, <section>.<key>"));
            return;
        };
        if !self.begin_section(section, origin.clone(), report) {
            return;
        }
        let problem = |says| Problem::at(origin.clone(), says).section(section).key(key);
        if file.bytes.len() > MAX_BYTES {
            report.add(problem("larger than 1 MiB, so not a value"));
            return;
        }
        match str::from_utf8(&file.bytes).map(str::trim) {
            Ok(text) if text.contains(char::is_control) => {
                report.add(problem("more than one line, or a control character"))
            }
            Ok(text) => self.add(section, key, text.to_owned(), origin, report),
            Err(_) => report.add(problem("not UTF-8 text")),
        }
    }

    /// Sets the keys of the variables `RBD_OFFLOAD_<SECTION>__<KEY>`, over earlier values. Ignores all other variables.
    pub fn add_environment(&mut self, variables: impl IntoIterator<Item = (OsString, OsString)>, report: &mut Report) {
        let mut ours: Vec<(String, OsString)> = variables
            .into_iter()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value)))
            .filter(|(name, _)| strip_prefix_in_any_case(name, ENVIRONMENT_PREFIX).is_some())
            .collect();
        ours.sort();
        let mut seen: BTreeMap<(String, String), String> = BTreeMap::new();
        for (name, value) in ours {
            let Some(rest) = strip_prefix_in_any_case(&name, ENVIRONMENT_PREFIX) else { continue };
            let origin = Origin::Variable(name.clone());
            let Some((section, key)) = rest.rsplit_once("__") else {
                if let Some(key) = meant_by_one_underscore(rest) {
                    let meant = format!("{ENVIRONMENT_PREFIX}{}__{}", key.section, key.name).to_ascii_uppercase();
                    report.add(Problem::at(origin, format!("unknown; did you mean {meant}, with two underscores?")));
                }
                continue;
            };
            let section = match self.section_of_variable(section) {
                Ok(section) => section,
                Err(says) => {
                    report.add(Problem::at(origin, says));
                    continue;
                }
            };
            let key = key.to_ascii_lowercase();
            if let Some(other) = seen.insert((section.clone(), key.clone()), name) {
                report.add(
                    Problem::at(origin, format!("set twice, also by {}", Sanitized(&other)))
                        .section(&section)
                        .key(&key),
                );
                continue;
            }
            if !self.begin_section(&section, origin.clone(), report) {
                continue;
            }
            match value.into_string() {
                Ok(text) => self.add(&section, &key, text.trim().to_owned(), origin, report),
                Err(_) => report.add(Problem::at(origin, "not UTF-8 text").section(&section).key(&key)),
            }
        }
    }

    /// The section that a variable's name means.
    fn section_of_variable(&self, written: &str) -> Result<String, String> {
        if let Some(name) = strip_prefix_in_any_case(written, "BACKEND:") {
            return Ok(format!("{BACKEND_PREFIX}{name}"));
        }
        if let Some(wanted) = strip_prefix_in_any_case(written, "BACKEND_") {
            let found: Vec<_> = self.backends().filter(|name| env_name(name).eq_ignore_ascii_case(wanted)).collect();
            return match found[..] {
                [name] => Ok(format!("{BACKEND_PREFIX}{name}")),
                [] => Err(format!(
                    "no file has a [backend:…] of that name; backends there: {}",
                    or_none(&self.backends().map(|name| Sanitized(name).to_string()).collect::<Vec<_>>().join(", "))
                )),
                _ => Err(format!(
                    "means more than one backend: {}; write BACKEND:NAME in the variable, with the name as it is",
                    found.iter().map(|name| Sanitized(name).to_string()).collect::<Vec<_>>().join(", ")
                )),
            };
        }
        keys::sections()
            .into_iter()
            .find(|section| section.eq_ignore_ascii_case(written))
            .map(str::to_owned)
            .ok_or_else(|| format!("no such section; sections: {}", keys::sections().join(", ")))
    }

    /// Makes room for a section; says what is wrong with its name and answers `false` if something is.
    fn begin_section(&mut self, section: &str, origin: Origin, report: &mut Report) -> bool {
        let says = match section.strip_prefix(BACKEND_PREFIX) {
            Some("") => Some("a backend needs a name, as in Cinder's enabled_backends".to_owned()),
            Some(name) if name.contains(|c: char| c.is_whitespace() || c.is_control() || matches!(c, '@' | '#')) => {
                Some("the name of a backend, as in Cinder's enabled_backends, has no blanks, @ and #".to_owned())
            }
            Some(_) => None,
            None if section != BACKEND && keys::sections().contains(&section) => None,
            None => {
                let known = keys::sections();
                Some(match nearest(section, known.iter().copied()) {
                    Some(near) => format!("unknown section; did you mean [{near}]?"),
                    None => format!("unknown section; sections: {}", known.join(", ")),
                })
            }
        };
        match says {
            None => {
                self.sections.entry(section.to_owned()).or_default();
                true
            }
            Some(says) => {
                report.add(Problem::at(origin, says).section(section));
                false
            }
        }
    }

    /// Takes a value whose section has begun, if there is such a key and it accepts the value.
    fn add(&mut self, section: &str, key: &str, text: String, origin: Origin, report: &mut Report) {
        let Some(known) = keys::of_section(section).find(|known| known.name == key) else {
            // Its value may be a secret in the wrong place.
            report.add(Problem::at(origin, unknown_key(section, key)).section(section).key(key));
            return;
        };
        if !text.is_empty() && !known.kind.accepts(&text) {
            let problem = Problem::at(origin, refusal(known, &text)).section(section).key(key);
            report.add(if known.is_secret() { problem } else { problem.value(&text) });
            return;
        }
        if let Some(values) = self.sections.get_mut(section) {
            values.insert(known.name, Value { text, origin });
        }
    }
}

/// The lines of one section of one file.
struct Lines {
    /// Where it begins first.
    header: usize,
    /// A key's line and value.
    values: BTreeMap<String, (usize, String)>,
}

/// The sections of a text. A line that is none of the things a line may be is reported, and never shown: it may be half
/// of a password.
fn scan(text: &str, at: &dyn Fn(usize) -> Origin, report: &mut Report) -> BTreeMap<String, Lines> {
    let mut sections: BTreeMap<String, Lines> = BTreeMap::new();
    // `None` before the first section and after a header that cannot be read; `told`: no need to say it again.
    let mut current: Option<String> = None;
    let mut told = false;
    for (number, line) in text.lines().enumerate() {
        let number = number + 1;
        let line = line.trim();
        if line.is_empty() || line.starts_with(['#', ';']) {
            continue;
        }
        if line.contains(|c: char| c.is_control() && c != '\t') {
            report.add(Problem::at(at(number), "a control character"));
            continue;
        }
        if let Some(header) = line.strip_prefix('[') {
            match header.strip_suffix(']').map(str::trim) {
                Some(name) if !name.is_empty() && !name.contains(['[', ']', '\\']) => {
                    sections
                        .entry(name.to_owned())
                        .or_insert_with(|| Lines { header: number, values: BTreeMap::new() });
                    current = Some(name.to_owned());
                }
                _ => {
                    report.add(Problem::at(at(number), "not a [section]; a comment needs a line of its own"));
                    current = None;
                    told = true;
                }
            }
            continue;
        }
        let Some((key, value)) = line.split_once('=').map(|(key, value)| (key.trim_end(), value.trim_start())) else {
            report.add(Problem::at(at(number), "neither \"key = value\", \"[section]\" nor a comment"));
            continue;
        };
        if !is_key(key) {
            report.add(Problem::at(at(number), "no key before the \"=\": letters, digits, \"_\" and \"-\""));
            continue;
        }
        let Some((name, lines)) = current.as_ref().and_then(|name| Some((name, sections.get_mut(name)?))) else {
            if !told {
                report.add(Problem::at(at(number), "a key before any [section]"));
                told = true;
            }
            continue;
        };
        match lines.values.entry(key.to_owned()) {
            Entry::Vacant(free) => {
                free.insert((number, without_quotes(value).to_owned()));
            }
            Entry::Occupied(first) => {
                let says = format!("set twice, first in line {}", first.get().0);
                report.add(Problem::at(at(number), says).section(name).key(key));
            }
        }
    }
    sections
}

fn is_key(text: &str) -> bool {
    !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '-'))
}

/// A value without the pair of quotes around it, as oslo.config reads it.
fn without_quotes(value: &str) -> &str {
    ['"', '\''].into_iter().find_map(|quote| value.strip_prefix(quote)?.strip_suffix(quote)).unwrap_or(value)
}

/// Why a key does not take a value.
fn refusal(key: &Key, text: &str) -> String {
    let allowed = key.allowed();
    let comment = text.char_indices().find(|(start, c)| {
        let blank_before = text.get(..*start).is_some_and(|before| before.ends_with(char::is_whitespace));
        matches!(c, ';' | '#') && blank_before
    });
    match comment {
        Some(_) if !key.kind.is_free_text() => format!("{allowed}; a comment needs a line of its own"),
        _ => allowed,
    }
}

fn unknown_key(section: &str, key: &str) -> String {
    let here: Vec<_> = keys::of_section(section).map(|known| known.name).collect();
    if let Some(near) = nearest(key, here.iter().copied()) {
        return format!("unknown key; did you mean {near}?");
    }
    let elsewhere: Vec<_> =
        keys::keys().iter().filter(|known| known.name == key).map(|known| format!("[{}]", known.section)).collect();
    if elsewhere.is_empty() {
        format!("unknown key; keys of this section: {}", here.join(", "))
    } else {
        format!("unknown key here; it belongs to {}", elsewhere.join(", "))
    }
}

/// A backend's name as it stands in a variable's.
fn env_name(name: &str) -> String {
    name.chars().map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_uppercase() } else { '_' }).collect()
}

/// The key that a variable with one underscore too few means.
fn meant_by_one_underscore(rest: &str) -> Option<&'static Key> {
    keys::keys().iter().find(|key| rest.eq_ignore_ascii_case(&format!("{}_{}", key.section, key.name)))
}

fn strip_prefix_in_any_case<'a>(text: &'a str, prefix: &str) -> Option<&'a str> {
    let (start, rest) = text.split_at_checked(prefix.len())?;
    start.eq_ignore_ascii_case(prefix).then_some(rest)
}

fn or_none(text: &str) -> &str {
    if text.is_empty() { "none" } else { text }
}

/// The known name that a person who wrote `text` may have meant: the same but for case, `-` and two letters.
fn nearest<'a>(text: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    /// Longer names are no slips of the keyboard.
    const MAX_LENGTH: usize = 64;
    if text.len() > MAX_LENGTH {
        return None;
    }
    let text = text.to_ascii_lowercase().replace('-', "_");
    known
        .map(|name| (distance(&text, &name.to_ascii_lowercase()), name))
        .filter(|(distance, name)| *distance <= 2 && *distance < name.len().div_ceil(2))
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, name)| name)
}

/// Levenshtein's: letters to insert, remove or replace.
fn distance(left: &str, right: &str) -> usize {
    let mut row: Vec<usize> = (0..=right.chars().count()).collect();
    for (down, a) in left.chars().enumerate() {
        let mut next = vec![down + 1];
        for ((b, above), diagonal) in right.chars().zip(row.iter().skip(1)).zip(&row) {
            let beside = next.last().copied().unwrap_or_default();
            next.push((diagonal + usize::from(a != b)).min(above + 1).min(beside + 1));
        }
        row = next;
    }
    row.last().copied().unwrap_or_default()
}
