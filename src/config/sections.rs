//! Every key of the configuration, declared once: its section, name, type, default, what it takes, whether it must be
//! there and what it is for. The structs that the program uses, the reader, the manual page, what a reload applies and
//! the tests of the sample file all come from these declarations.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use secrecy::{ExposeSecret as _, SecretString};

use super::check::Reader;
use super::keys::Kind::{
    CephUser, Flag, HttpUrl, ImageName, List, Listen, OneOf, Pool, Secret, Size, Span, Text, TransportUrl, Whole, Word,
};
use super::keys::Need::{ApplicationCredential, Password, Required};
use super::keys::{BACKEND, Key, Kind, Need};
use super::{Hash, Interface, LogFormat, LogLevel, MethodChoice, PublishChoice, QueueType, Register, Verify, values};

/// One day, in seconds.
const DAY: u64 = 24 * 60 * 60;

/// A section of the configuration.
pub trait Section: Sized {
    const KEYS: &'static [Key];

    /// The values of all keys. The reader reports a required key that is missing, and goes on.
    fn read(reader: &mut Reader<'_, '_>) -> Option<Self>;

    /// The keys whose values in `new` differ.
    fn changed(&self, new: &Self) -> Vec<&'static Key>;
}

/// The type of a key's value.
pub trait Setting: Sized {
    /// `None`: `text` is no value of this kind.
    fn from_text(kind: Kind, text: &str) -> Option<Self>;

    /// What stands for a key that is not set and has no default; `None`: keys of this type have one.
    fn unset() -> Option<Self> {
        None
    }

    fn is_same(&self, other: &Self) -> bool;
}

/// Declares a section's struct and its keys:
/// `name: type = "default", kind;` or `name: type = "default", kind, need;` below what the key is for.
/// SIGHUP applies changes in a section marked `reload`; changes in one marked `restart` take a restart.
macro_rules! section {
    (
        $(#[$meta:meta])*
        pub struct $struct:ident in $section:expr, $change:ident {
            $($(#[doc = $about:literal])+ $name:ident: $type:ty = $default:literal, $kind:expr $(, $need:ident)?;)+
        }
    ) => {
        $(#[$meta])*
        #[derive(Debug, Clone)]
        // what a key is for is the manual page's text too, in which `[section] key` is no link
        #[allow(rustdoc::broken_intra_doc_links)]
        pub struct $struct {
            $($(#[doc = $about])+ pub $name: $type,)+
        }

        impl Section for $struct {
            const KEYS: &'static [Key] = &[$(Key {
                section: $section,
                name: stringify!($name),
                default: $default,
                kind: $kind,
                need: section!(@need $($need)?),
                reload: section!(@reload $change),
                about: concat!($($about),+).trim_ascii_start(),
            }),+];

            fn read(reader: &mut Reader<'_, '_>) -> Option<Self> {
                let mut keys = Self::KEYS.iter();
                Some(Self { $($name: reader.value(keys.next()?)?),+ })
            }

            fn changed(&self, new: &Self) -> Vec<&'static Key> {
                let same = [$(Setting::is_same(&self.$name, &new.$name)),+];
                Self::KEYS.iter().zip(same).filter(|(_, same)| !same).map(|(key, _)| key).collect()
            }
        }
    };
    (@need) => { Need::Optional };
    (@need $need:ident) => { $need };
    (@reload reload) => { true };
    (@reload restart) => { false };
}

section! {
    /// `[DEFAULT]`
    #[derive(PartialEq, Eq)]
    pub struct Log in "DEFAULT", reload {
        /// How much is logged.
        log_level: LogLevel = "info", OneOf(LogLevel::NAMES);
        /// How the log is written: lines on standard error, as text or as JSON, or records sent to the journal.
        log_format: LogFormat = "text", OneOf(LogFormat::NAMES);
    }
}

section! {
    /// `[messaging]`
    pub struct Messaging in "messaging", restart {
        /// The message bus that the services notify on, as in their own configuration:
        /// rabbit://USER:PASSWORD@HOST:5672,USER:PASSWORD@HOST:5672/VHOST, with %-escapes in its parts, ?ssl=1 for TLS.
        transport_url: SecretString = "", TransportUrl, Required;
        /// The queue that all controllers share. Never one that another service consumes, such as notifications.info.
        queue: String = "rbd-offload", Word;
        /// The type of that queue. RabbitMQ cannot change the type of a queue, its length or its expiry: the daemon
        /// replaces an old queue of its own once it is empty and has no consumer.
        queue_type: QueueType = "quorum", OneOf(QueueType::NAMES);
        /// Messages that the queue holds; the broker drops the oldest beyond that, and the reconciler finds their
        /// requests. 0: no limit.
        queue_max_length: u32 = "100000", Whole { min: 0, max: 1_000_000_000 };
        /// How long the broker keeps the queue without a consumer before it deletes it. 0: no limit.
        queue_expires: Duration = "7d", Span { min: 0, max: 49 * DAY };
        /// The exchanges to listen to: the control_exchange of Glance, Cinder (openstack unless set) and Nova.
        exchanges: Vec<String> = "glance,openstack,cinder,nova", List;
        /// The notification topics of these services.
        topics: Vec<String> = "notifications,versioned_notifications", List;
        /// Deliveries that this controller holds unacknowledged at a time.
        prefetch: u16 = "128", Whole { min: 1, max: 65_535 };
        /// The certificate authorities that vouch for the message bus, a PEM file. Not set: those of the system.
        ssl_ca_file: Option<PathBuf> = "", Text;
        /// Whether the certificate of the message bus must bear the name of its host in transport_url. false: any name
        /// will do; the authority that signed the certificate is verified all the same.
        ssl_verify_hostname: bool = "true", Flag;
    }
}

section! {
    /// `[keystone]` as written; [`Keystone`](super::Keystone) has the one way to log in.
    pub struct KeystoneKeys in "keystone", restart {
        /// Keystone, for example https://keystone.example:5000/v3.
        auth_url: String = "", HttpUrl, Required;
        /// The user that the daemon logs in as.
        username: Option<String> = "", Text, Password;
        /// That user's password.
        password: Option<SecretString> = "", Secret, Password;
        /// The project that the daemon logs in to, usually service.
        project_name: Option<String> = "", Text, Password;
        /// The domain of the user.
        user_domain_name: String = "Default", Text;
        /// The domain of the project.
        project_domain_name: String = "Default", Text;
        /// An application credential, instead of username, password and project_name.
        application_credential_id: Option<String> = "", Word, ApplicationCredential;
        /// The secret of the application credential.
        application_credential_secret: Option<SecretString> = "", Secret, ApplicationCredential;
        /// The region whose endpoints are used. Needed when the catalog has several: the daemon does not start without.
        region_name: Option<String> = "", Text;
        /// The kind of endpoint that is used.
        interface: Interface = "internal", OneOf(Interface::NAMES);
        /// The certificate authorities that vouch for OpenStack's services, a PEM file. Not set: those of the system.
        cafile: Option<PathBuf> = "", Text;
        /// The HTTP proxy on the way to Keystone, Glance, Cinder and Nova. Not set: none; http_proxy and the like in
        /// the environment are ignored.
        proxy: Option<String> = "", HttpUrl;
        /// How long one request to Keystone, Glance, Cinder or Nova may take.
        timeout: Duration = "30s", Span { min: 1, max: 600 };
    }
}

section! {
    /// `[glance]`
    #[derive(PartialEq, Eq)]
    pub struct Glance in "glance", restart {
        /// The Ceph pool of Glance's RBD store.
        pool: String = "images", Pool;
        /// The pool of the data of Glance's images, where it is not the pool of the images themselves:
        /// rbd_default_data_pool as Glance's Ceph client has it. It may be erasure-coded. Not set: what the pool of the
        /// images or [ceph] conf say.
        data_pool: Option<String> = "", Pool;
        /// Glance's own URL, when the catalog's is not to be used.
        endpoint_override: Option<String> = "", HttpUrl;
        /// How Glance is told where the image lies: its location API, or PATCH on a Glance older than 2024.2. auto
        /// takes the location API where Glance has it.
        register: Register = "auto", OneOf(Register::NAMES);
        /// Glance's limit for the size of one image (image_size_cap in glance-api.conf), which its API does not tell.
        /// What would be larger is declined before it is copied. 0: not known.
        image_size_cap: u64 = "0", Size;
        /// Glance's limit for all images of one project (user_storage_quota in glance-api.conf), which its API does not
        /// tell. What would break it is declined before it is copied. 0: not known.
        user_storage_quota: u64 = "0", Size;
        /// Prefixes of property names that an image never inherits from its source. List here the names that Glance's
        /// property protections keep from tenants: the daemon may write them. Encryption and signature properties are
        /// never inherited.
        protected_properties: Vec<String> =
            "bittorrent,cache_in_nova,cinder_encryption_key,img_signature,signature_verified", List;
    }
}

section! {
    /// `[ceph]`
    #[derive(PartialEq, Eq)]
    pub struct Ceph in "ceph", restart {
        /// Ceph's configuration file.
        conf: PathBuf = "/etc/ceph/ceph.conf", Text;
        /// The cephx user that the daemon is to Ceph, without "client.".
        user: String = "rbd-offload", CephUser;
        /// The file with that user's key. Not set: what Ceph's configuration file says, usually
        /// /etc/ceph/ceph.client.USER.keyring.
        keyring: Option<PathBuf> = "", Word;
    }
}

section! {
    /// `[offload]`
    #[derive(PartialEq, Eq)]
    pub struct Offload in "offload", reload {
        /// How the bytes get to the image: server-copy lets the OSDs copy, clone flattens a clone, copy reads and
        /// writes through this host. auto takes the first that can do the source.
        method: MethodChoice = "auto", OneOf(MethodChoice::NAMES);
        /// When an image becomes active: when-copied waits for its copy; at-once makes it active after some three
        /// seconds, whatever its size, and copies behind it. at-once needs Glance's cephx user to be able to read the
        /// pool of the source; what cannot be published at once is published when-copied.
        publish: PublishChoice = "when-copied", OneOf(PublishChoice::NAMES);
        /// Jobs that copy at a time on this controller. Jobs that wait for a service do not count: up to twice max_jobs
        /// run in all.
        max_jobs: usize = "4", Whole { min: 1, max: 256 };
        /// Jobs of this controller that run at a time into one destination pool. 0: no limit besides max_jobs.
        max_jobs_per_pool: usize = "0", Whole { min: 0, max: 256 };
        /// Jobs on this controller that copy behind an active image at a time. They come on top of max_jobs.
        max_detach: usize = "2", Whole { min: 1, max: 256 };
        /// How long the source's snapshot is kept after an image that was published at once no longer needs it. A
        /// client that opened the image earlier may still read from it.
        detach_grace: Duration = "60s", Span { min: 0, max: DAY };
        /// Jobs of one project that copy at a time on this controller. 0: no limit besides max_jobs.
        max_jobs_per_project: usize = "0", Whole { min: 0, max: 256 };
        /// How often a job is taken over from a controller that died or stalled with it, before it fails. A copy that
        /// got further than before is not counted. 0: no limit.
        max_takeovers: u32 = "3", Whole { min: 0, max: 100 };
        /// A job without progress for this long is given up. The daemon fences its Ceph client and retries the job.
        hang_limit: Duration = "30m", Span { min: 60, max: DAY };
        /// Whether a volume that is attached may be the source: its image is as a disk after a power cut.
        allow_in_use: bool = "false", Flag;
        /// Objects in flight per job.
        concurrency: usize = "16", Whole { min: 1, max: 256 };
        /// Bytes a second that all jobs of this controller together read for the method copy. 0: no limit.
        bandwidth_limit: u64 = "0", Size;
        /// RADOS objects a second that the OSDs process for all jobs of this controller together. Asking for an object
        /// counts as a tenth. The data of a flatten is not limited. 0: no limit.
        objects_per_second: u64 = "0", Whole { min: 0, max: 1_000_000 };
        /// Attempts after the first when a service or Ceph is away; the pause between them grows.
        retries: u32 = "5", Whole { min: 0, max: 100 };
        /// How long a request is left to other deployments if its disk is not found here: several of them, one for each
        /// Ceph cluster, may share a Glance. One of them declines a request that none has taken by then. Where there
        /// are several, 5m is a good value on all. 0s: this is the only deployment.
        decline_after: Duration = "0s", Span { min: 0, max: DAY };
        /// The hash that is registered with the image. sha512 reads every byte of it through this host.
        hash: Hash = "none", OneOf(Hash::NAMES);
        /// How much of an image is read again and compared with its source before it is published.
        verify: Verify = "sample", OneOf(Verify::NAMES);
        /// How often the reconciler looks for leftovers and for requests whose notification was lost. Of the daemons
        /// with the same configuration, one does that.
        reconcile_interval: Duration = "60s", Span { min: 1, max: DAY };
        /// Dry run: the daemon plans, counts and logs each request, and stores the finding as a cancelled job. It makes
        /// no image and changes no image record.
        dry_run: bool = "false", Flag;
    }
}

section! {
    /// `[jobs]`
    #[derive(PartialEq, Eq)]
    pub struct Jobs in "jobs", restart {
        /// The pool that keeps the jobs' records.
        pool: String = "images", Pool;
        /// The RADOS namespace of these records.
        namespace: String = "rbd-offload", Word;
        /// How long a controller that has stopped answering keeps a job from the others.
        lease: Duration = "30s", Span { min: 5, max: 600 };
        /// How long the record of an ended job is kept.
        retention: Duration = "7d", Span { min: 60, max: 3_650 * DAY };
    }
}

section! {
    /// `[cinder]`
    #[derive(PartialEq, Eq)]
    pub struct Cinder in "cinder", reload {
        /// Whether Cinder hands its uploads over, which takes the rbd-offload integration on the cinder-volume hosts.
        integration: bool = "false", Flag;
    }
}

section! {
    /// `[nova]`
    #[derive(PartialEq, Eq)]
    pub struct Nova in "nova", reload {
        /// Whether Nova hands its instance snapshots over, which takes the rbd-offload integration on the compute
        /// hosts.
        integration: bool = "false", Flag;
        /// The pool of the instances' disks (Nova's images_rbd_pool).
        pool: String = "vms", Pool;
        /// The RBD image of an instance's disk; {id} stands for the instance.
        image_name: String = "{id}_disk", ImageName;
    }
}

section! {
    /// `[metrics]`
    #[derive(PartialEq, Eq)]
    pub struct Metrics in "metrics", restart {
        /// Where /metrics and /healthz are served. An empty value turns them off.
        listen: Option<SocketAddr> = "127.0.0.1:9469", Listen;
    }
}

section! {
    /// `[backend:NAME]`
    #[derive(PartialEq, Eq)]
    pub struct Backend in BACKEND, reload {
        /// The pool of the backend's volumes (Cinder's rbd_pool).
        pool: String = "volumes", Pool;
        /// The RBD image of a volume; {id} stands for the volume.
        image_name: String = "volume-{id}", ImageName;
        /// The pool that images of these volumes are put in; it must belong to a Glance store. Not set: [glance] pool.
        dest_pool: String = "", Pool;
        /// As [offload] method, for this backend alone. Not set: [offload] method.
        method: Option<MethodChoice> = "", OneOf(MethodChoice::NAMES);
        /// As [offload] publish, for this backend alone. Not set: [offload] publish.
        publish: Option<PublishChoice> = "", OneOf(PublishChoice::NAMES);
        /// As [offload] allow_in_use, for this backend alone. Not set: [offload] allow_in_use.
        allow_in_use: Option<bool> = "", Flag;
        /// Clone a source through a clone in its own pool, which Cinder can flatten when the source is deleted during
        /// the copy. Never false for a pool that Cinder manages.
        anchor: bool = "true", Flag;
    }
}

/// Types whose values are compared with `==`, and how each is read.
macro_rules! settings {
    ($($type:ty = $read:expr $(, unset $unset:expr)?;)+) => {$(
        impl Setting for $type {
            $(fn unset() -> Option<Self> {
                Some($unset)
            })?

            fn from_text(kind: Kind, text: &str) -> Option<Self> {
                let read: fn(Kind, &str) -> Option<Self> = $read;
                read(kind, text)
            }

            fn is_same(&self, other: &Self) -> bool {
                self == other
            }
        }
    )+};
}

settings! {
    String = |_, text| Some(text.to_owned()), unset String::new();
    PathBuf = |_, text| Some(text.into());
    SocketAddr = |_, text| text.parse().ok();
    bool = |_, text| values::flag(text);
    Duration = |_, text| values::duration(text);
    Vec<String> = |_, text| values::list(text);
    u16 = |_, text| values::whole(text)?.try_into().ok();
    u32 = |_, text| values::whole(text)?.try_into().ok();
    u64 = |kind, text| if matches!(kind, Kind::Size) { values::size(text) } else { values::whole(text) };
    usize = |_, text| values::whole(text)?.try_into().ok();
    LogLevel = |_, text| Self::from_name(text);
    LogFormat = |_, text| Self::from_name(text);
    QueueType = |_, text| Self::from_name(text);
    Interface = |_, text| Self::from_name(text);
    Register = |_, text| Self::from_name(text);
    MethodChoice = |_, text| Self::from_name(text);
    PublishChoice = |_, text| Self::from_name(text);
    Hash = |_, text| Self::from_name(text);
    Verify = |_, text| Self::from_name(text);
}

impl Setting for SecretString {
    fn from_text(_: Kind, text: &str) -> Option<Self> {
        Some(text.into())
    }

    fn unset() -> Option<Self> {
        Some(SecretString::default())
    }

    fn is_same(&self, other: &Self) -> bool {
        self.expose_secret() == other.expose_secret()
    }
}

impl<T: Setting> Setting for Option<T> {
    fn from_text(kind: Kind, text: &str) -> Option<Self> {
        T::from_text(kind, text).map(Some)
    }

    fn unset() -> Option<Self> {
        Some(None)
    }

    fn is_same(&self, other: &Self) -> bool {
        match (self, other) {
            (Some(one), Some(other)) => one.is_same(other),
            (None, None) => true,
            _ => false,
        }
    }
}
