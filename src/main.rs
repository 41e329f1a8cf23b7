//! The command line of rbd-offload: parses it, calls the command, maps its error to an exit status.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;

use clap::Parser;
use rbd_offload::cli::{Cli, Failure, eprint_line};

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            if !error.use_stderr() {
                // --help and --version
                let _ = error.print();
                return ExitCode::SUCCESS;
            }
            let text = error.render().to_string();
            eprint_line(text.strip_prefix("error: ").unwrap_or(&text).trim_end());
            return ExitCode::from(Failure::USAGE);
        }
    };
    match catch_unwind(AssertUnwindSafe(|| cli.run())) {
        Ok(Ok(code)) => code,
        Ok(Err(failure)) => {
            eprint_line(&failure.to_string());
            ExitCode::from(failure.code)
        }
        // the message was printed when it panicked
        Err(_) => ExitCode::from(Failure::SOFTWARE),
    }
}
