//! `completions`: what a shell needs to complete the command line.

use std::process::ExitCode;

use clap::Command;
use clap_complete::Shell;

use super::{Failure, output};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// The shell that is to complete.
    shell: Shell,
}

/// `command` is the whole command line.
pub fn completions(args: Args, mut command: Command) -> Result<ExitCode, Failure> {
    let mut script = Vec::new();
    let name = command.get_name().to_owned();
    clap_complete::generate(args.shell, &mut command, name, &mut script);
    output::print(&String::from_utf8_lossy(&script)).map(|_| ExitCode::SUCCESS)
}
