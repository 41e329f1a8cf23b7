//! Every key of the configuration: its section, default, what it takes, and what it is for. Defaults, errors, the
//! sample file and the manual page all come from this table.

use std::fmt;
use std::net::SocketAddr;
use std::time::Duration;

use super::{Hash, Interface, LogFormat, LogLevel, Method, QueueType, Register, Verify, values};

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

const fn key(section: &'static str, name: &'static str, default: &'static str, kind: Kind, about: &'static str) -> Key {
    Key { section, name, default, kind, need: Need::Optional, reload: false, about }
}

impl Key {
    const fn needed(self, need: Need) -> Key {
        Key { need, ..self }
    }

    const fn reloads(self) -> Key {
        Key { reload: true, ..self }
    }

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
    KEYS
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

const KEYS: &[Key] = &[
    key("DEFAULT", "log_level", "info", Kind::OneOf(LogLevel::NAMES), "How much is logged.").reloads(),
    key(
        "DEFAULT",
        "log_format",
        "text",
        Kind::OneOf(LogFormat::NAMES),
        "How the log is written: lines on standard error, as text or as JSON, or records sent to the journal.",
    )
    .reloads(),
    key(
        "messaging",
        "transport_url",
        "",
        Kind::TransportUrl,
        "The message bus that the services notify on, as in their own configuration: \
         rabbit://USER:PASSWORD@HOST:5672,USER:PASSWORD@HOST:5672/VHOST, with %-escapes in its parts, ?ssl=1 for TLS.",
    )
    .needed(Need::Required),
    key(
        "messaging",
        "queue",
        "rbd-offload",
        Kind::Word,
        "The queue that all controllers share. Never one that another service consumes, such as notifications.info.",
    ),
    key(
        "messaging",
        "queue_type",
        "quorum",
        Kind::OneOf(QueueType::NAMES),
        "The type of that queue. RabbitMQ cannot change the type of a queue that exists: delete the old one.",
    ),
    key(
        "messaging",
        "exchanges",
        "glance,openstack,cinder,nova",
        Kind::List,
        "The exchanges to listen to: the control_exchange of Glance, Cinder (openstack unless set) and Nova.",
    ),
    key(
        "messaging",
        "topics",
        "notifications,versioned_notifications",
        Kind::List,
        "The notification topics of these services.",
    ),
    key(
        "messaging",
        "prefetch",
        "128",
        Kind::Whole { min: 1, max: 65_535 },
        "Deliveries that this controller holds unacknowledged at a time.",
    ),
    key(
        "messaging",
        "ssl_ca_file",
        "",
        Kind::Text,
        "The certificate authorities that vouch for the message bus, a PEM file. Not set: those of the system.",
    ),
    key("keystone", "auth_url", "", Kind::HttpUrl, "Keystone, for example https://keystone.example:5000/v3.")
        .needed(Need::Required),
    key("keystone", "username", "", Kind::Text, "The user that the daemon logs in as.").needed(Need::Password),
    key("keystone", "password", "", Kind::Secret, "That user's password.").needed(Need::Password),
    key("keystone", "project_name", "", Kind::Text, "The project that the daemon logs in to, usually service.")
        .needed(Need::Password),
    key("keystone", "user_domain_name", "Default", Kind::Text, "The domain of the user."),
    key("keystone", "project_domain_name", "Default", Kind::Text, "The domain of the project."),
    key(
        "keystone",
        "application_credential_id",
        "",
        Kind::Word,
        "An application credential, instead of username, password and project_name.",
    )
    .needed(Need::ApplicationCredential),
    key("keystone", "application_credential_secret", "", Kind::Secret, "The secret of the application credential.")
        .needed(Need::ApplicationCredential),
    key(
        "keystone",
        "region_name",
        "",
        Kind::Text,
        "The region whose endpoints are used. Not set: the first that the catalog lists.",
    ),
    key("keystone", "interface", "internal", Kind::OneOf(Interface::NAMES), "The kind of endpoint that is used."),
    key(
        "keystone",
        "cafile",
        "",
        Kind::Text,
        "The certificate authorities that vouch for OpenStack's services, a PEM file. Not set: those of the system.",
    ),
    key(
        "keystone",
        "proxy",
        "",
        Kind::HttpUrl,
        "The HTTP proxy on the way to Keystone, Glance, Cinder and Nova. Not set: none; http_proxy and the like in the \
         environment are ignored.",
    ),
    key(
        "keystone",
        "timeout",
        "30s",
        Kind::Span { min: 1, max: 600 },
        "How long one request to Keystone, Glance, Cinder or Nova may take.",
    ),
    key("glance", "pool", "images", Kind::Pool, "The Ceph pool of Glance's RBD store."),
    key("glance", "endpoint_override", "", Kind::HttpUrl, "Glance's own URL, when the catalog's is not to be used."),
    key(
        "glance",
        "register",
        "auto",
        Kind::OneOf(Register::NAMES),
        "How Glance is told where the image lies: its location API, or PATCH on a Glance older than 2024.2. \
         auto takes the location API where Glance has it.",
    ),
    key("ceph", "conf", "/etc/ceph/ceph.conf", Kind::Text, "Ceph's configuration file."),
    key(
        "ceph",
        "user",
        "rbd-offload",
        Kind::CephUser,
        "The cephx user that the daemon is to Ceph, without \"client.\".",
    ),
    key(
        "offload",
        "method",
        "auto",
        Kind::OneOf(Method::NAMES),
        "How the bytes get to the image: server-copy lets the OSDs copy, clone flattens a clone, copy reads and writes \
         through this host. auto takes the first that can do the source.",
    )
    .reloads(),
    key("offload", "max_jobs", "4", Kind::Whole { min: 1, max: 256 }, "Jobs that run at a time on this controller.")
        .reloads(),
    key(
        "offload",
        "max_jobs_per_pool",
        "0",
        Kind::Whole { min: 0, max: 256 },
        "Jobs that run at a time into one destination pool. 0: no limit besides max_jobs.",
    )
    .reloads(),
    key(
        "offload",
        "max_jobs_per_project",
        "0",
        Kind::Whole { min: 0, max: 256 },
        "Jobs of one project that run at a time on this controller. 0: no limit besides max_jobs.",
    )
    .reloads(),
    key(
        "offload",
        "max_takeovers",
        "3",
        Kind::Whole { min: 0, max: 100 },
        "How often a job is taken over from a controller that died or stalled with it, before it fails. A copy that got \
         further than before is not counted. 0: no limit.",
    )
    .reloads(),
    key(
        "offload",
        "hang_limit",
        "30m",
        Kind::Span { min: 60, max: DAY },
        "How long a job may make no progress before it is given up and tried again. Its Ceph client is fenced first.",
    )
    .reloads(),
    key(
        "offload",
        "allow_in_use",
        "false",
        Kind::Flag,
        "Whether a volume that is attached may be the source: its image is as a disk after a power cut.",
    )
    .reloads(),
    key("offload", "concurrency", "16", Kind::Whole { min: 1, max: 256 }, "Objects in flight per job.").reloads(),
    key(
        "offload",
        "bandwidth_limit",
        "0",
        Kind::Size,
        "Bytes a second that all jobs of this controller together read for the method copy. 0: no limit.",
    )
    .reloads(),
    key(
        "offload",
        "objects_per_second",
        "0",
        Kind::Whole { min: 0, max: 1_000_000 },
        "RADOS objects a second that all jobs of this controller together have the OSDs work on. A question about an \
         object counts a tenth; a flatten is not limited. 0: no limit.",
    )
    .reloads(),
    key(
        "offload",
        "retries",
        "5",
        Kind::Whole { min: 0, max: 100 },
        "Attempts after the first when a service or Ceph is away; the pause between them grows.",
    )
    .reloads(),
    key(
        "offload",
        "hash",
        "none",
        Kind::OneOf(Hash::NAMES),
        "The hash that is registered with the image. sha512 reads every byte of it through this host.",
    )
    .reloads(),
    key(
        "offload",
        "verify",
        "sample",
        Kind::OneOf(Verify::NAMES),
        "How much of an image is read again and compared with its source before it is published.",
    )
    .reloads(),
    key(
        "offload",
        "reconcile_interval",
        "60s",
        Kind::Span { min: 1, max: DAY },
        "How often requests whose notification got lost, and leftovers, are looked for.",
    )
    .reloads(),
    key(
        "offload",
        "dry_run",
        "false",
        Kind::Flag,
        "Dry run: requests are planned, counted and logged, and nothing is written.",
    )
    .reloads(),
    key("jobs", "pool", "images", Kind::Pool, "The pool that keeps the jobs' records."),
    key("jobs", "namespace", "rbd-offload", Kind::Word, "The RADOS namespace of these records."),
    key(
        "jobs",
        "lease",
        "30s",
        Kind::Span { min: 5, max: 600 },
        "How long a controller that has stopped answering keeps a job from the others.",
    ),
    key(
        "jobs",
        "retention",
        "7d",
        Kind::Span { min: 60, max: 3_650 * DAY },
        "How long the record of an ended job is kept.",
    ),
    key(
        "cinder",
        "integration",
        "false",
        Kind::Flag,
        "Whether Cinder hands its uploads over, which takes the rbd-offload integration on the cinder-volume hosts.",
    )
    .reloads(),
    key(
        "nova",
        "integration",
        "false",
        Kind::Flag,
        "Whether Nova hands its instance snapshots over, which takes the rbd-offload integration on the compute hosts.",
    )
    .reloads(),
    key("nova", "pool", "vms", Kind::Pool, "The pool of the instances' disks (Nova's images_rbd_pool).").reloads(),
    key(
        "nova",
        "image_name",
        "{id}_disk",
        Kind::ImageName,
        "The RBD image of an instance's disk; {id} stands for the instance.",
    )
    .reloads(),
    key(
        "metrics",
        "listen",
        "127.0.0.1:9469",
        Kind::Listen,
        "Where /metrics and /healthz are served. An empty value turns them off.",
    ),
    key(BACKEND, "pool", "volumes", Kind::Pool, "The pool of the backend's volumes (Cinder's rbd_pool).").reloads(),
    key(
        BACKEND,
        "image_name",
        "volume-{id}",
        Kind::ImageName,
        "The RBD image of a volume; {id} stands for the volume.",
    )
    .reloads(),
    key(
        BACKEND,
        "dest_pool",
        "",
        Kind::Pool,
        "The pool that images of these volumes are put in; it must belong to a Glance store. Not set: [glance] pool.",
    )
    .reloads(),
    key(
        BACKEND,
        "method",
        "",
        Kind::OneOf(Method::NAMES),
        "As [offload] method, for this backend alone. Not set: [offload] method.",
    )
    .reloads(),
    key(
        BACKEND,
        "anchor",
        "true",
        Kind::Flag,
        "Clone a source through a clone in its own pool, which Cinder can flatten when the source is deleted during the \
         copy. Never false for a pool that Cinder manages.",
    )
    .reloads(),
];

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
