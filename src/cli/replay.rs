//! `replay`: stores the jobs that notifications in a file ask for; a running daemon takes them up.

use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use tokio::sync::watch;

use super::setup::{load, store_of};
use super::{Failure, output};
use crate::job::intake::Intake;
use crate::notification::{self, LineError};

/// Lines that went wrong which are named.
const NAMED: usize = 20;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// One notification a line, as captured from the broker; `-`: standard input.
    file: PathBuf,
}

pub async fn replay(config: &Path, args: Args) -> Result<ExitCode, Failure> {
    let reader: Box<dyn BufRead> = match args.file.as_os_str() == "-" {
        true => Box::new(BufReader::new(io::stdin())),
        false => Box::new(BufReader::new(File::open(&args.file).map_err(|e| unreadable(&args.file, &e))?)),
    };
    let config = load(config)?;
    let store = store_of(&config).await?;
    let intake = Intake::storing(store, watch::channel(Arc::new(config)).1);
    let summary = notification::replay(reader, &intake).await.map_err(|e| unreadable(&args.file, &e))?;
    for (number, error) in summary.failed.iter().take(NAMED) {
        output::eprint_line(&format!("line {number}: {error}"));
    }
    if summary.failed.len() > NAMED {
        output::eprint_line(&format!("and {} lines more", summary.failed.len() - NAMED));
    }
    let failed = summary.failed.len();
    output::print(&format!("{} taken over, {} irrelevant, {failed} failed\n", summary.accepted, summary.irrelevant))?;
    if summary.failed.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    // a store that did not answer may do so later; a line that cannot be read stays so
    let store_failed = summary.failed.iter().any(|(_, error)| matches!(error, LineError::Sink(_)));
    let code = if store_failed { Failure::TEMPORARY } else { Failure::DATA };
    Err(Failure::new(code, format!("{failed} lines of {} were not taken over", args.file.display())))
}

fn unreadable(path: &Path, error: &io::Error) -> Failure {
    Failure::new(Failure::NO_INPUT, format!("cannot read {}: {error}", path.display()))
}
