//! `completions`: what a shell needs to complete the command line.

use std::process::ExitCode;

use clap::CommandFactory;
use clap_complete::Shell;

use super::{Cli, Failure, output};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// The shell that is to complete.
    shell: Shell,
}

pub fn completions(args: Args) -> Result<ExitCode, Failure> {
    let mut script = Vec::new();
    let mut command = Cli::command();
    let name = command.get_name().to_owned();
    clap_complete::generate(args.shell, &mut command, name, &mut script);
    output::print(&String::from_utf8_lossy(&script)).map(|_| ExitCode::SUCCESS)
}
