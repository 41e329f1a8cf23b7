//! The documents say what is so: each block of shell in them is run by a test, and each command, key and metric exists.
//!
//! A block of shell bears a mark in the line above it: `<!-- test: NAME -->`, and then a test of the packages runs that
//! very block, or `<!-- no test: REASON -->`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use clap::CommandFactory;
use rbd_offload::cli::Cli;
use rbd_offload::config::Config;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(name: impl AsRef<Path>) -> String {
    std::fs::read_to_string(root().join(&name)).unwrap_or_else(|e| panic!("{}: {e}", name.as_ref().display()))
}

/// What users, operators and developers read, with its text.
fn documents() -> Vec<(String, String)> {
    let mut names: Vec<PathBuf> = [
        "README.md",
        "ARCHITECTURE.md",
        "CONTRIBUTING.md",
        "SECURITY.md",
        "integrations/cinder/README.md",
        "integrations/nova/README.md",
    ]
    .map(PathBuf::from)
    .into();
    let mut folders = ["docs", "dev/adr"].map(|folder| root().join(folder)).to_vec();
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "md") {
                names.push(path.strip_prefix(root()).unwrap().to_owned());
            }
        }
    }
    assert!(names.len() > 18, "{names:?}");
    names.into_iter().map(|name| (name.display().to_string(), read(name))).collect()
}

struct Block {
    /// Document and line, for people.
    at: String,
    language: String,
    /// The line above.
    mark: String,
    lines: Vec<String>,
}

fn blocks() -> Vec<Block> {
    let mut blocks = Vec::new();
    for (name, text) in documents() {
        let mut open: Option<Block> = None;
        let mut above = "";
        for (number, line) in text.lines().enumerate() {
            match (line.trim().strip_prefix("```"), &mut open) {
                (Some(_), Some(_)) => blocks.extend(open.take()),
                (Some(language), None) => {
                    let at = format!("{name}:{}", number + 1);
                    open = Some(Block { at, language: language.into(), mark: above.into(), lines: Vec::new() });
                }
                (None, Some(block)) => block.lines.push(line.into()),
                (None, None) => {}
            }
            above = line.trim();
        }
        assert!(open.is_none(), "{name}: a block has no end");
    }
    blocks
}

/// The lines of a block of shell or of what was typed on a console, continued ones as one, without prompts and
/// comments.
fn commands(block: &Block) -> Vec<String> {
    let typed = |line: &&String| block.language == "sh" || line.starts_with("# ");
    let text: Vec<&str> = block.lines.iter().filter(typed).map(|line| line.trim_start_matches("# ").trim()).collect();
    let text = text.join("\n").replace("\\\n", " ");
    text.lines()
        .map(|line| line.split(" #").next().unwrap().trim().to_owned())
        .filter(|line| !line.is_empty())
        .collect()
}

#[test]
fn every_block_of_shell_is_run_by_a_test_or_says_why_not() {
    let tests = read("tests/packages") + &read("packaging/test");
    let makefile = read("Makefile");
    let mut names = BTreeSet::new();
    let blocks = blocks();
    for block in blocks.iter().filter(|block| block.language == "sh") {
        let at = &block.at;
        // a target is run by who makes packages and releases: that it is there is enough
        if commands(block).iter().all(|command| command.starts_with("make ")) {
            for target in commands(block).iter().flat_map(|command| command.split(' ').skip(1)) {
                assert!(makefile.contains(&format!("\n{target}:")), "{at}: make {target}");
            }
        } else if let Some(name) = block.mark.strip_prefix("<!-- test: ").and_then(|rest| rest.strip_suffix(" -->")) {
            assert!(names.insert(name), "{at}: another block is called {name}");
            let run = ["follows", "on_host"].into_iter().any(|how| {
                tests.split_whitespace().zip(tests.split_whitespace().skip(1)).any(|pair| pair == (how, name))
            });
            assert!(run, "{at}: no test runs the block {name}");
        } else {
            assert!(block.mark.starts_with("<!-- no test: "), "{at}: no mark above it");
        }
    }
    assert!(names.len() > 10, "{names:?}");
}

#[test]
fn every_command_of_ours_has_the_options_that_it_is_shown_with() {
    let mut seen = BTreeSet::new();
    for block in blocks().iter().filter(|block| ["sh", "console"].contains(&block.language.as_str())) {
        for command in commands(block) {
            seen.extend(check_command(&block.at, &command));
        }
    }
    for (name, text) in documents() {
        for code in text.split('`').skip(1).step_by(2).filter(|code| !code.contains('\n')) {
            seen.extend(check_command(&name, code));
        }
    }
    for command in ["check", "request", "show", "jobs", "retry"] {
        assert!(seen.contains(command), "no document shows {command}: {seen:?}");
    }
}

#[test]
fn every_alert_has_a_section_that_says_what_to_do() {
    let rules = read("packaging/prometheus/rbd-offload.rules.yml");
    let alerts: Vec<&str> = rules.lines().filter_map(|line| line.trim().strip_prefix("- alert: ")).collect();
    let text = read("docs/how-to/alerts.md");
    let sections: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("## ")).collect();
    assert!(alerts.len() > 10, "{alerts:?}");
    assert_eq!(sections, alerts, "in the order of the rules");
}

/// The subcommand of a command line of ours, which must have the options that are in it.
fn check_command(at: &str, line: &str) -> Option<String> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let ours = words.iter().rposition(|word| *word == "rbd-offload")?;
    let after = &words[ours + 1..];
    // it may stand before the command
    let (name, options) =
        after.strip_prefix(&["--config"]).map_or(after, |rest| rest.get(1..).unwrap_or(&[])).split_first()?;
    // `rbd-offload` as a name: of a user, a service, a package
    if ours > 0
        && !["sudo", "--"].contains(&words[0])
        && !line.contains(" rbd-offload rbd-offload ")
        && !line.contains("systemd-run")
    {
        return None;
    }
    let program = Cli::command();
    let command = program.find_subcommand(name).unwrap_or_else(|| panic!("{at}: there is no {name}: {line}"));
    for option in
        options.iter().filter_map(|word| word.trim_matches(['[', ']', '(', ')', ',', '.', '…']).strip_prefix("--"))
    {
        let known = command.get_arguments().chain(program.get_arguments()).any(|a| a.get_long() == Some(option));
        assert!(known, "{at}: {name} has no --{option}: {line}");
    }
    Some((*name).to_owned())
}

#[test]
fn every_configuration_of_ours_that_is_shown_is_valid() {
    // what is required and not what the block is about
    let rest = [
        ("messaging", "transport_url", "rabbit://u:p@h/"),
        ("keystone", "auth_url", "http://h/v3"),
        ("keystone", "username", "u"),
        ("keystone", "password", "p"),
        ("keystone", "project_name", "service"),
        ("backend:ceph", "pool", "volumes"),
    ];
    let mut shown = 0;
    for block in blocks().iter().filter(|block| block.language == "ini") {
        let text = block.lines.join("\n");
        let others = ["glance-api.conf", "cinder.conf", "[Service]", "volume_driver", "driver = rbd_offload"];
        if others.iter().any(|sign| text.contains(sign)) {
            continue;
        }
        let mut whole = text.clone();
        for (section, key, value) in rest {
            if section.starts_with("backend:") && text.contains("[backend:") {
                continue;
            }
            if section.starts_with("backend:") || !text.contains(&format!("{key} =")) {
                whole += &format!("\n[{section}]\n{key} = {value}\n");
            }
        }
        shown += 1;
        if let Err(error) = Config::parse(Path::new(&block.at), &whole) {
            panic!("{}: {error}\n{whole}", block.at);
        }
    }
    assert!(shown >= 4, "{shown}");
}

/// Sections of the services' own files.
const OF_SERVICES: [&str; 5] =
    ["ephemeral_storage_encryption", "libvirt", "oslo_messaging_notifications", "service_user", "workarounds"];

#[test]
fn every_key_that_is_named_is_in_the_sample() {
    let sample = read("etc/rbd-offload.conf");
    let mut keys = BTreeSet::new();
    let mut section = "";
    for line in sample.lines().map(|line| line.trim_start_matches(['#', ' '])) {
        if let Some(name) = line.strip_prefix('[').and_then(|rest| rest.split(']').next()) {
            section = name.split(':').next().unwrap();
        } else if let Some((key, _)) = line.split_once(" =") {
            keys.insert((section.to_owned(), key.to_owned()));
        }
    }
    let mut seen = 0;
    for (name, text) in documents() {
        for code in text.split('`').skip(1).step_by(2) {
            let Some((section, key)) = code.strip_prefix('[').and_then(|rest| rest.split_once("] ")) else { continue };
            let section = section.split(':').next().unwrap();
            let key = key.split([' ', '=', ':']).next().unwrap();
            if OF_SERVICES.contains(&section) || (section, key) == ("DEFAULT", "transport_url") {
                continue;
            }
            seen += 1;
            assert!(keys.contains(&(section.to_owned(), key.to_owned())), "{name}: `{code}`");
        }
    }
    assert!(seen > 10, "{seen}");
}

/// The anchor of a heading, as the hosts of repositories make it.
fn anchor(heading: &str) -> String {
    let kept = |c: &char| c.is_alphanumeric() || [' ', '-', '_'].contains(c);
    heading.trim_start_matches('#').trim().to_lowercase().chars().filter(kept).collect::<String>().replace(' ', "-")
}

#[test]
fn every_link_to_a_document_leads_somewhere() {
    let mut followed = 0;
    for (name, text) in documents() {
        let folder = Path::new(&name).parent().unwrap();
        for target in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            if target.contains("://") {
                continue;
            }
            followed += 1;
            let (file, heading) = target.split_once('#').unwrap_or((target, ""));
            let path = if file.is_empty() { PathBuf::from(&name) } else { folder.join(file) };
            assert!(root().join(&path).exists(), "{name}: there is no {target}");
            let found = || read(&path).lines().any(|line| line.starts_with('#') && anchor(line) == heading);
            assert!(heading.is_empty() || found(), "{name}: {target} has no such heading");
        }
    }
    assert!(followed > 80, "{followed}");
}

#[test]
fn every_file_of_ours_that_is_named_is_there() {
    let folders =
        ["benches", "dev", "docs", "etc", "integrations", "lab", "lint", "packaging", "src", "systemd", "tests"];
    let mut seen = BTreeSet::new();
    for (name, text) in documents() {
        for code in text.split('`').skip(1).step_by(2).filter_map(|code| code.split_whitespace().next()) {
            let is_ours = code.split_once('/').is_some_and(|(folder, _)| folders.contains(&folder));
            // a place for a name, or several
            if is_ours && !code.contains(['*', '<', '{', '…']) && !code.contains("NAME") {
                assert!(root().join(code).exists(), "{name}: there is no {code}");
                seen.insert(code.to_owned());
            }
        }
    }
    assert!(seen.len() > 60, "{seen:?}");
}
