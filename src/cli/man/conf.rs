//! rbd-offload.conf(5), from the table of keys that the configuration is read by.

use std::io;

use clap_mangen::roff::{Inline, Roff, bold, italic, roman};

use crate::config::{Key, Kind, Need, keys};

/// What stands above the keys.
const DESCRIPTION: &[&str] = &[
    "The file is read first, then conf.d/*.conf beside it in lexical order, then credentials, then the environment; what \
     comes later wins. Unknown sections and keys, bad values and missing keys are all reported at once, and nothing runs.",
    "A line is [section], key = value, a comment that starts with # or ;, or empty. There are no comments behind a \
     value. A value is taken as it is: nothing in it is an escape, and a pair of quotes around all of it does not count. \
     An empty value is as if it was not set, unless its key says otherwise.",
    "Durations are a whole number with ms, s, m, h or d; sizes are bytes, or a whole number with KiB, MiB or GiB; both \
     without a space. Flags are true or false.",
    "SIGHUP (systemctl reload rbd-offload) reads all of it again. Of the keys that are marked so below, the rates and the \
     log's apply at once, the others at the daemon's next check or to the next attempt of each job. Changes of all other keys are named in the log \
     and take a restart. A configuration with mistakes changes nothing.",
];

pub fn page() -> io::Result<Vec<u8>> {
    let mut roff = Roff::new();
    let version = concat!("rbd-offload ", env!("CARGO_PKG_VERSION"));
    roff.control("TH", ["RBD-OFFLOAD.CONF", "5", "\"\"", version, "File Formats"]);
    roff.control("SH", ["NAME"]);
    roff.text([roman("rbd-offload.conf - configuration of rbd-offload")]);
    roff.control("SH", ["SYNOPSIS"]);
    for (index, place) in [
        crate::config::DEFAULT_PATH,
        "/etc/rbd-offload/conf.d/*.conf",
        "$CREDENTIALS_DIRECTORY/<section>.<key>",
        "RBD_OFFLOAD_<SECTION>__<KEY>=",
    ]
    .into_iter()
    .enumerate()
    {
        if index > 0 {
            roff.control("br", []);
        }
        roff.text([italic(place)]);
    }
    roff.control("SH", ["DESCRIPTION"]);
    paragraphs(&mut roff, DESCRIPTION);

    let mut section = "";
    for key in keys() {
        if key.section != section {
            section = key.section;
            roff.control("SH", [format!("[{section}]").as_str()]);
            if section.starts_with("backend:") {
                paragraphs(
                    &mut roff,
                    &[
                        "One such section for each of Cinder's RBD backends, with NAME as in Cinder's enabled_backends; at \
                     least one is required. A volume on any other backend is declined.",
                    ],
                );
            }
        }
        roff.control("TP", []);
        roff.text(heading(key));
        roff.text([roman(key.about)]);
        roff.control("br", []);
        roff.text([roman(facts(key))]);
    }

    roff.control("SH", ["CREDENTIALS"]);
    paragraphs(
        &mut roff,
        &[
            "Secrets need not stand in a file that the daemon's user can read. Each file in the directory that systemd names \
         in CREDENTIALS_DIRECTORY is the value of the key that it is named after, without the blanks and line ends \
         around it. With LoadCredential= in a drop-in of the unit:",
        ],
    );
    example(
        &mut roff,
        &[
            "[Service]",
            "LoadCredential=keystone.password:/etc/rbd-offload.secrets/keystone",
            "LoadCredential=messaging.transport_url:/etc/rbd-offload.secrets/rabbitmq",
        ],
    );
    paragraphs(
        &mut roff,
        &[
            "A file there whose name is no section and key is an error, as an unknown key is. Commands other than the service \
         do not get its credentials; systemd-run(1) with the same properties gives them.",
        ],
    );
    roff.control("SH", ["ENVIRONMENT"]);
    paragraphs(
        &mut roff,
        &[
            "RBD_OFFLOAD_KEYSTONE__PASSWORD stands for [keystone] password, and so on, in any case. For [backend:NAME] it is \
         RBD_OFFLOAD_BACKEND_<NAME>__<KEY>, where NAME has every character but letters and digits as _, for backends \
         that stand in a file.",
        ],
    );
    roff.control("SH", ["EXAMPLE"]);
    example(
        &mut roff,
        &[
            "[messaging]",
            "transport_url = rabbit://rbd-offload:PASSWORD@controller:5672/",
            "[keystone]",
            "auth_url = http://controller:5000/v3",
            "username = rbd-offload",
            "password = PASSWORD",
            "project_name = service",
            "[backend:ceph]",
            "pool = volumes",
        ],
    );
    roff.control("SH", ["SEE ALSO"]);
    roff.text([bold("rbd-offload"), roman("(8), "), bold("systemd.exec"), roman("(5)")]);
    let mut page = Vec::new();
    roff.to_writer(&mut page)?;
    Ok(page)
}

fn paragraphs(roff: &mut Roff, texts: &[&str]) {
    for text in texts {
        roff.control("PP", []);
        roff.text([roman(*text)]);
    }
}

fn example(roff: &mut Roff, lines: &[&str]) {
    roff.control("PP", []);
    roff.control("RS", ["4"]);
    roff.control("nf", []);
    for line in lines {
        roff.text([roman(*line)]);
    }
    roff.control("fi", []);
    roff.control("RE", []);
}

/// `key = default`
fn heading(key: &Key) -> Vec<Inline> {
    let mut heading = vec![bold(key.name)];
    if !key.default.is_empty() {
        heading.extend([roman(" = "), italic(key.default)]);
    }
    heading
}

/// What it takes, whether it is required, whether a reload applies it.
fn facts(key: &Key) -> String {
    let mut facts = match key.kind {
        // said by the sentence about the key, or by anything being allowed
        Kind::Text | Kind::Secret => String::new(),
        _ => {
            let allowed = key.allowed();
            let mut letters = allowed.chars();
            letters.next().map(|first| format!("{}{}. ", first.to_uppercase(), letters.as_str())).unwrap_or_default()
        }
    };
    facts.push_str(match key.need {
        Need::Optional => "",
        Need::Required => "Required. ",
        Need::Password => "Required with a password. ",
        Need::ApplicationCredential => "Required without a password. ",
    });
    facts.push_str(if key.reload { "Applied by a reload." } else { "Takes a restart." });
    facts
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As a reader sees it: without the marks of the format.
    fn plain() -> String {
        String::from_utf8(page().unwrap())
            .unwrap()
            .replace("\\-", "-")
            .replace("\\.", ".")
            .replace("\\fB", "")
            .replace("\\fI", "")
            .replace("\\fR", "")
            .replace("\\*(Aq", "'")
            .replace("\\(aq", "'")
            .replace("\\&", "")
    }

    #[test]
    fn the_page_has_every_key_with_its_default_and_description() {
        let page = plain();
        let mut lines = page.lines();
        let mut section = "";
        for key in keys() {
            if key.section != section {
                section = key.section;
                let wanted = format!("[{section}]");
                assert!(lines.any(|line| line.starts_with(".SH") && line.contains(&wanted)), "{wanted}\n{page}");
            }
            let wanted =
                if key.default.is_empty() { key.name.to_owned() } else { format!("{} = {}", key.name, key.default) };
            assert!(lines.any(|line| line == wanted), "[{section}] {wanted}\n{page}");
            assert_eq!(lines.next(), Some(key.about), "{wanted}");
        }
    }
}
