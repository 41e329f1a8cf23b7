//! The command line of rbd-offload, and nothing else.

use std::process::ExitCode;

use clap::Parser;
use rbd_offload::cli::{Cli, Failure};

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { Failure::USAGE } else { 0 });
        }
    };
    match cli.run() {
        Ok(code) => code,
        Err(failure) => {
            eprintln!("rbd-offload: {failure}");
            ExitCode::from(failure.code)
        }
    }
}
