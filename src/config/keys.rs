//! The keys of all sections as one table, and the kinds of values: what each accepts, and how an error says that.

use std::fmt;
use std::net::SocketAddr;
use std::sync::LazyLock;
use std::time::Duration;

use super::sections::{
    Backend, Ceph, Cinder, Glance, Jobs, KeystoneKeys, Log, Messaging, Metrics, Nova, Offload, Section as _,
};
use super::values;

/// The section that stands for every `[backend:…]`.
pub const BACKEND: &str = "backend:NAME";

/// What a section's name starts with when it describes a backend.
pub const BACKEND_PREFIX: &str = "backend:";

/// One key of the configuration.
#[derive(Debug, Clone, Copy)]
pub struct Key {
    /// `backend:NAME` stands for every backend.
    pub section: &'static str,
    pub name: &'static str,
    /// As it would be written; empty: none.
    pub default: &'static str,
    pub kind: Kind,
    pub need: Need,
    /// SIGHUP applies a change; otherwise it takes a restart.
    pub reload: bool,
    /// What it is for, a sentence or two.
    pub about: &'static str,
}

/// Whether a configuration can do without a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    Optional,
    Required,
    /// To log in with a password: these, or those of an application credential.
    Password,
    /// To log in with an application credential: these, or those of a password.
    ApplicationCredential,
}

/// What a key takes.
#[derive(Debug, Clone, Copy)]
pub enum Kind {
    OneOf(&'static [&'static str]),
    Flag,
    Whole {
        min: u64,
        max: u64,
    },
    /// A duration; the limits are in seconds.
    Span {
        min: u64,
        max: u64,
    },
    /// Bytes.
    Size,
    List,
    /// Anything at all.
    Text,
    /// Anything without blanks.
    Word,
    /// Anything at all, never shown.
    Secret,
    /// Never shown.
    TransportUrl,
    HttpUrl,
    Pool,
    /// Of an RBD image, with `{id}` in it.
    ImageName,
    CephUser,
    /// An address and a port; an empty value is a value here: off.
    Listen,
}

/// One day, in seconds.
const DAY: u64 = 24 * 60 * 60;

impl Key {
    /// What it takes, in words: `one of auto, server-copy, copy, clone`.
    pub fn allowed(&self) -> String {
        self.kind.to_string()
    }

    /// Its value is never shown.
    pub fn is_secret(&self) -> bool {
        matches!(self.kind, Kind::Secret | Kind::TransportUrl)
    }
}

/// All keys, in the order of the sample file.
pub fn keys() -> &'static [Key] {
    &KEYS
}

/// The keys of one section, as a file names it.
pub fn of_section(section: &str) -> impl Iterator<Item = &'static Key> {
    let section = if section.starts_with(BACKEND_PREFIX) { BACKEND } else { section };
    KEYS.iter().filter(move |key| key.section == section)
}

/// Every section once, in the order of the sample file.
pub fn sections() -> Vec<&'static str> {
    let mut sections: Vec<_> = KEYS.iter().map(|key| key.section).collect();
    sections.dedup();
    sections
}

static KEYS: LazyLock<Vec<Key>> = LazyLock::new(|| {
    [
        Log::KEYS,
        Messaging::KEYS,
        KeystoneKeys::KEYS,
        Glance::KEYS,
        Ceph::KEYS,
        Offload::KEYS,
        Jobs::KEYS,
        Cinder::KEYS,
        Nova::KEYS,
        Metrics::KEYS,
        Backend::KEYS,
    ]
    .concat()
});

impl Kind {
    /// Whether `text`, trimmed and not empty, is a value of this kind.
    pub fn accepts(&self, text: &str) -> bool {
        match *self {
            Kind::OneOf(names) => names.iter().any(|name| text.eq_ignore_ascii_case(name)),
            Kind::Flag => values::flag(text).is_some(),
            Kind::Whole { min, max } => values::whole(text).is_some_and(|number| (min..=max).contains(&number)),
            Kind::Span { min, max } => values::duration(text)
                .is_some_and(|span| (Duration::from_secs(min)..=Duration::from_secs(max)).contains(&span)),
            Kind::Size => values::size(text).is_some(),
            Kind::List => values::list(text).is_some(),
            Kind::Text | Kind::Secret => !text.is_empty(),
            Kind::Word => values::is_word(text),
            Kind::TransportUrl => is_transport_url(text),
            Kind::HttpUrl => is_http_url(text),
            Kind::Pool => values::is_word(text) && !text.contains(['/', '@']),
            Kind::ImageName => {
                values::is_word(text) && !text.contains(['/', '@']) && text.matches("{id}").count() == 1 && {
                    !text.replace("{id}", "").contains(['{', '}'])
                }
            }
            Kind::CephUser => values::is_word(text) && !text.starts_with("client."),
            Kind::Listen => text.parse::<SocketAddr>().is_ok(),
        }
    }

    /// Blanks followed by `;` or `#` may be part of a value of this kind.
    pub fn is_free_text(&self) -> bool {
        matches!(self, Kind::Text | Kind::Secret)
    }
}

/// oslo.messaging's scheme: the driver, perhaps with `+` and the client's name behind it.
fn is_transport_url(text: &str) -> bool {
    let Some((scheme, rest)) = text.split_once("://") else { return false };
    let driver = scheme.split('+').next().unwrap_or_default();
    matches!(driver, "rabbit" | "kombu") && !rest.is_empty() && values::is_word(text)
}

fn is_http_url(text: &str) -> bool {
    values::is_word(text)
        && url::Url::parse(text).is_ok_and(|url| {
            matches!(url.scheme(), "http" | "https")
                && url.has_host()
                && url.username().is_empty()
                && url.password().is_none()
                && url.query().is_none()
                && url.fragment().is_none()
        })
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Kind::OneOf(names) => write!(f, "one of {}", names.join(", ")),
            Kind::Flag => f.write_str("true or false"),
            Kind::Whole { min, max } => write!(f, "a whole number from {min} to {max}"),
            Kind::Span { min, max } => write!(
                f,
                "a duration from {} to {}, such as 500ms, 30s, 5m, 12h, 7d, without a space",
                Span(min),
                Span(max)
            ),
            Kind::Size => f.write_str("a size in bytes, or in KiB, MiB or GiB without a space, such as 100MiB"),
            Kind::List => f.write_str("names separated by commas, none of them empty"),
            Kind::Text => f.write_str("text"),
            Kind::Word => f.write_str("text without blanks"),
            Kind::Secret => f.write_str("text, never shown"),
            Kind::TransportUrl => f.write_str("rabbit://USER:PASSWORD@HOST:PORT/VHOST"),
            Kind::HttpUrl => f.write_str("a URL that starts with http:// or https://, without user and password"),
            Kind::Pool => f.write_str("the name of a pool, without blanks, / and @"),
            Kind::ImageName => {
                f.write_str("the name of an RBD image with {id} in it exactly once, without blanks, / and @")
            }
            Kind::CephUser => f.write_str("the name of a cephx user, without \"client.\""),
            Kind::Listen => f.write_str("an address and a port, such as 127.0.0.1:9469 or [::1]:9469; empty: off"),
        }
    }
}

/// Seconds, as a person would write them.
struct Span(u64);

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (unit, seconds) in [("d", DAY), ("h", 3_600), ("m", 60)] {
            if self.0 > 0 && self.0.is_multiple_of(seconds) {
                return write!(f, "{}{unit}", self.0 / seconds);
            }
        }
        write!(f, "{}s", self.0)
    }
}
