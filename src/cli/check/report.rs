//! What `check` found, as a table or as JSON.

use std::time::Duration;

use serde::Serialize;

use crate::cli::output::{self, Colour};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[cfg_attr(test, derive(serde::Deserialize))]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    Ok,
    /// Works as configured now, but the operator should know.
    Warning,
    Fault,
    /// Could not be looked at, since another check failed.
    Skipped,
}

impl Verdict {
    fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warning => "warning",
            Self::Fault => "FAULT",
            Self::Skipped => "skipped",
        }
    }

    fn colour(self) -> Colour {
        match self {
            Self::Ok => Colour::Green,
            Self::Warning | Self::Skipped => Colour::Yellow,
            Self::Fault => Colour::Red,
        }
    }
}

/// One check.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CheckResult {
    pub check: String,
    #[serde(rename = "result")]
    pub verdict: Verdict,
    /// What was found; the reason of a fault.
    pub detail: String,
    /// What to do, where something is to be done.
    pub remedy: Option<String>,
    /// A fault that may be gone in a few seconds: a service that starts, a connection that was refused.
    #[serde(skip)]
    pub transient: bool,
}

impl CheckResult {
    pub fn ok(check: impl Into<String>, detail: impl Into<String>) -> Self {
        Self::new(check.into(), Verdict::Ok, detail.into(), None)
    }

    pub fn warning(check: impl Into<String>, detail: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::new(check.into(), Verdict::Warning, detail.into(), Some(remedy.into()))
    }

    pub fn fault(check: impl Into<String>, detail: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::new(check.into(), Verdict::Fault, detail.into(), Some(remedy.into()))
    }

    pub fn skipped(check: impl Into<String>, why: impl Into<String>) -> Self {
        Self::new(check.into(), Verdict::Skipped, why.into(), None)
    }

    fn new(check: String, verdict: Verdict, detail: String, remedy: Option<String>) -> Self {
        // services' own words end up here
        Self { check, verdict, detail: output::line(&detail), remedy, transient: false }
    }

    /// Says that the answer came at the attempt of this number, so long after the first one began.
    pub fn note_attempt(&mut self, number: u32, after: Duration) {
        let separator = if self.detail.is_empty() { "" } else { "; " };
        self.detail.push_str(&format!("{separator}attempt {number}, after {} s", after.as_secs()));
    }

    /// Says of a fault whether it is worth another attempt.
    pub fn transient_if(mut self, transient: bool) -> Self {
        self.transient = transient;
        self
    }

    pub fn passed(&self) -> bool {
        matches!(self.verdict, Verdict::Ok | Verdict::Warning)
    }
}

/// The lines, and the sum of it.
pub fn table(rows: &[CheckResult], colours: bool) -> String {
    let mut text = lines(rows, colours);
    let faults = rows.iter().filter(|row| row.verdict == Verdict::Fault).count();
    let skipped = rows.iter().filter(|row| row.verdict == Verdict::Skipped).count();
    text.push_str(&match (faults, skipped) {
        (0, 0) => "all checks passed\n".to_owned(),
        (_, 0) => format!("{faults} of {} checks failed\n", rows.len()),
        _ => format!("{faults} of {} checks failed, {skipped} skipped\n", rows.len()),
    });
    text
}

/// A line a check, and one more for its remedy. Lines are not broken: commands are copied from them.
pub fn lines(rows: &[CheckResult], colours: bool) -> String {
    const VERDICT: usize = 7;
    let name = output::widest(rows.iter().map(|row| row.check.as_str()));
    let mut text = String::new();
    for row in rows {
        let verdict = format!("{:VERDICT$}", row.verdict.as_str());
        let verdict = if colours { row.verdict.colour().paint(&verdict) } else { verdict };
        text.push_str(format!("{}  {verdict}  {}", output::padded(&row.check, name), row.detail).trim_end());
        text.push('\n');
        if let Some(remedy) = &row.remedy {
            text.push_str(&format!("{:name$}  {:VERDICT$}  → {remedy}\n", "", ""));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_remedy_is_below_the_reason() {
        let rows = [CheckResult::ok("Ceph", ""), CheckResult::fault("pool a", "no\nsnapshots", "ceph auth caps …")];
        assert_eq!(
            table(&rows, false),
            "Ceph    ok\npool a  FAULT    no snapshots\n                 → ceph auth caps …\n1 of 2 checks failed\n"
        );
        assert!(table(&rows, true).contains("\x1b[1;31mFAULT  \x1b[0m"));
        assert_eq!(table(&rows[..1], false), "Ceph  ok\nall checks passed\n");
    }

    #[test]
    fn names_of_wide_characters_are_aligned() {
        let rows = [CheckResult::ok("RabbitMQ exchange 雲", "there"), CheckResult::ok("RabbitMQ exchange a", "there")];
        assert_eq!(lines(&rows, false), "RabbitMQ exchange 雲  ok       there\nRabbitMQ exchange a   ok       there\n");
    }

    #[test]
    fn json_has_the_four_fields() {
        assert_eq!(
            serde_json::to_value(CheckResult::ok("Nova", "answers")).unwrap(),
            serde_json::json!({"check": "Nova", "result": "ok", "detail": "answers", "remedy": null})
        );
        assert!(!CheckResult::skipped("x", "y").passed() && CheckResult::warning("x", "y", "z").passed());
    }
}
