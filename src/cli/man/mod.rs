//! `man`: rbd-offload(8), made from the command line's own definition, and rbd-offload.conf(5), made from the table of
//! keys.

mod conf;

use std::io;
use std::process::ExitCode;

use clap::{Arg, Command};
use clap_mangen::roff::{Inline, Roff, bold, italic, roman};

use super::failure::STATUSES;
use super::{Failure, output};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// The page: the commands, rbd-offload(8), or the configuration, rbd-offload.conf(5).
    #[arg(value_enum, default_value_t = Page::Program)]
    page: Page,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Page {
    #[value(name = "rbd-offload")]
    Program,
    #[value(name = "rbd-offload.conf", alias = "conf")]
    Configuration,
}

/// `program` is the whole command line.
pub fn man(args: Args, program: Command) -> Result<ExitCode, Failure> {
    let page = match args.page {
        Page::Program => page(program),
        Page::Configuration => conf::page(),
    };
    let page = page.map_err(|e| Failure::new(Failure::SOFTWARE, format!("the page cannot be written: {e}")))?;
    output::print(&String::from_utf8_lossy(&page)).map(|_| ExitCode::SUCCESS)
}

fn page(program: Command) -> io::Result<Vec<u8>> {
    let mut command = program.disable_help_subcommand(true);
    command.build();
    let mut page = Vec::new();
    let man = clap_mangen::Man::new(command.clone()).title("RBD-OFFLOAD").section("8").manual("System Administration");
    man.render_title(&mut page)?;
    man.render_name_section(&mut page)?;
    man.render_synopsis_section(&mut page)?;
    man.render_description_section(&mut page)?;
    man.render_options_section(&mut page)?;
    commands(&command).to_writer(&mut page)?;
    rest().to_writer(&mut page)?;
    Ok(page)
}

/// All commands on the one page, each with its options.
fn commands(command: &Command) -> Roff {
    let mut roff = Roff::new();
    roff.control("SH", ["COMMANDS"]);
    for command in command.get_subcommands() {
        roff.control("SS", [usage(command).as_str()]);
        if let Some(about) = command.get_long_about().or_else(|| command.get_about()) {
            roff.text([roman(about.to_string())]);
        }
        // the global ones stand above
        let arguments = command.get_arguments().filter(|arg| !arg.is_global_set() && !arg.is_hide_set());
        for argument in arguments.filter(|arg| arg.get_id() != "help") {
            roff.control("TP", []);
            roff.text(name(argument));
            let help = argument.get_long_help().or_else(|| argument.get_help());
            roff.text([roman(help.map(ToString::to_string).unwrap_or_default())]);
        }
    }
    roff
}

/// `jobs [OPTIONS]`
fn usage(command: &Command) -> String {
    let usage = command.clone().render_usage().to_string();
    let usage = usage.strip_prefix("Usage: ").unwrap_or(&usage).split_whitespace().collect::<Vec<_>>().join(" ");
    usage.strip_prefix("rbd-offload ").unwrap_or(&usage).to_owned()
}

fn name(argument: &Arg) -> Vec<Inline> {
    let mut name = Vec::new();
    if let Some(short) = argument.get_short() {
        name.extend([bold(format!("-{short}")), roman(", ")]);
    }
    if let Some(long) = argument.get_long() {
        name.push(bold(format!("--{long}")));
    }
    if argument.get_action().takes_values() {
        if !name.is_empty() {
            name.push(roman(" "));
        }
        let value = argument.get_value_names().and_then(|names| names.first()).map(|name| name.as_str());
        name.push(italic(value.unwrap_or_else(|| argument.get_id().as_str())));
    }
    name
}

fn rest() -> Roff {
    let mut roff = Roff::new();
    roff.control("SH", ["EXIT STATUS"]);
    for (status, meaning) in STATUSES {
        roff.control("TP", []);
        roff.text([bold(status.to_string())]);
        roff.text([roman(meaning)]);
    }
    roff.control("SH", ["FILES"]);
    for (file, meaning) in [
        (crate::config::DEFAULT_PATH, "The configuration; see rbd-offload.conf(5)."),
        ("/etc/rbd-offload/conf.d/*.conf", "Read after it, in lexical order."),
    ] {
        roff.control("TP", []);
        roff.text([italic(file)]);
        roff.text([roman(meaning)]);
    }
    roff.control("SH", ["ENVIRONMENT"]);
    for (name, meaning) in [
        ("RBD_OFFLOAD_<SECTION>__<KEY>", "Overrides a key of the configuration."),
        ("CREDENTIALS_DIRECTORY", "Where systemd puts secrets; see rbd-offload.conf(5)."),
        ("OS_*", "Credentials for request, as the openstack command takes them."),
        ("NO_COLOR", "With a value: no colours on a terminal."),
    ] {
        roff.control("TP", []);
        roff.text([bold(name)]);
        roff.text([roman(meaning)]);
    }
    roff.control("SH", ["SEE ALSO"]);
    roff.text([bold("rbd-offload.conf"), roman("(5), "), bold("rbd"), roman("(8), "), bold("openstack"), roman("(1)")]);
    roff
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;
    use crate::cli::Cli;

    #[test]
    fn the_reference_has_the_same_statuses_and_columns() {
        let reference = include_str!("../../../docs/reference/commands.md");
        for (status, meaning) in STATUSES {
            assert!(reference.contains(&format!("| `{status}` | {meaning} |\n")), "{status}");
        }
        let (_, table) = reference.split_once("\n## Exit statuses\n").unwrap();
        let (table, _) = table.split_once("\n## ").unwrap();
        assert_eq!(table.lines().filter(|line| line.starts_with("| `")).count(), STATUSES.len());
        let mut program = Cli::command();
        program.build();
        let jobs = program.find_subcommand("jobs").unwrap();
        let format = jobs.get_arguments().find(|argument| argument.get_id() == "format").unwrap();
        let (_, columns) = reference.split_once("the columns of the table: ").unwrap();
        let columns = columns.split(" |").next().unwrap().replace('`', "");
        let known: Vec<String> = format.get_possible_values().iter().map(|value| value.get_name().to_owned()).collect();
        assert_eq!(columns.split(", ").collect::<Vec<_>>(), known);
    }

    #[test]
    fn the_page_holds_every_command() {
        let page = String::from_utf8(page(Cli::command()).unwrap()).unwrap();
        assert!(page.contains(".TH RBD\\-OFFLOAD 8") || page.contains(".TH RBD-OFFLOAD 8"), "{page}");
        for command in ["run", "check", "jobs", "show", "retry", "cancel", "request", "replay", "completions", "man"] {
            let heading = page.lines().any(|line| {
                line.strip_prefix(".SS ")
                    .is_some_and(|rest| rest.trim_matches('"').split_whitespace().next() == Some(command))
            });
            assert!(heading, "{command} is missing:\n{page}");
        }
        for part in ["\\-\\-wait", "EXIT STATUS", "conf.d"] {
            assert!(page.contains(part), "{part} is missing:\n{page}");
        }
    }
}
