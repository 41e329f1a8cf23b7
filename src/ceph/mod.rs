//! Ceph as the rest of the program sees it: RBD images and RADOS objects behind two traits, as plain types.
//!
//! [`Storage`] holds what a job does to images, [`Objects`] what the job store needs of RADOS. [`Client`] implements
//! both over librados and librbd; the engine's simulation implements them in memory. Everything `unsafe` of the
//! program lives below this folder. Calls are asynchronous: the blocking C functions run on threads of their own.

mod cluster;
mod compare;
mod copy;
mod error;
mod fill;
mod hung;
mod job_clients;
mod keyring;
mod layers;
mod objects;
mod pace;
mod probe;
mod published;
mod rbd;
mod storage;
mod sys;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

pub use cluster::{Client, ClientOptions, OTHER_KEY, exit_now, host_name, make_undumpable};
pub use error::{Error, ErrorKind, Result};
#[doc(hidden)]
pub use fill::FillFault;
pub use job_clients::CephJobClients;
pub use objects::{MAX_KEYS, MAX_OBJECT, Namespace};
pub use pace::{RateLimiter, Rates};
pub use probe::{Finding, Probed, end_to_end_name};

/// Key in an image's metadata that says whose it is. The first word of its value is the id of the Glance image that
/// the RBD image is for; that id is part of the RBD image's name.
pub const OWNER_KEY: &str = "rbd_offload.job";

/// Whether a value of [`OWNER_KEY`] belongs to an image of this name; a clone has inherited that of its parent.
fn is_owner_of(owner: &str, name: &str) -> bool {
    owner.split_whitespace().next().is_some_and(|id| name.contains(id))
}

/// An RBD image: a pool and the image's name in it, or its internal id (an image in the trash has no name).
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ImageSpec {
    pub pool: String,
    pub image: ImageKey,
}

/// How an image is found in its pool.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum ImageKey {
    Name(String),
    /// The internal id, under which an image is found in the trash too.
    Id(String),
}

impl ImageSpec {
    pub fn named(pool: impl Into<String>, name: impl Into<String>) -> Self {
        Self { pool: pool.into(), image: ImageKey::Name(name.into()) }
    }

    pub fn with_id(pool: impl Into<String>, id: impl Into<String>) -> Self {
        Self { pool: pool.into(), image: ImageKey::Id(id.into()) }
    }
}

impl fmt::Display for ImageSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.image {
            ImageKey::Name(name) => write!(f, "{}/{}", self.pool, name),
            ImageKey::Id(id) => write!(f, "{}/(id {})", self.pool, id),
        }
    }
}

/// What librbd tells of an image, at its head or at a snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageInfo {
    /// Internal id; empty for an image of format 1.
    pub id: String,
    /// Bytes.
    pub size: u64,
    /// Bytes; a power of two.
    pub object_size: u64,
    /// Bytes.
    pub stripe_unit: u64,
    /// Objects.
    pub stripe_count: u64,
    pub features: Features,
    /// Bits of `RBD_FLAG_*`: an invalid object map or fast-diff.
    pub flags: u64,
    pub parent: Option<Parent>,
    pub snapshots: Vec<Snapshot>,
    /// Pool of the data objects where it is not the image's own (erasure-coded data pools).
    pub data_pool: Option<String>,
    pub old_format: bool,
}

/// Bits of `RBD_FEATURE_*`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Features(pub u64);

impl Features {
    pub const LAYERING: Self = Self(1);
    pub const STRIPINGV2: Self = Self(2);
    pub const EXCLUSIVE_LOCK: Self = Self(4);
    pub const OBJECT_MAP: Self = Self(8);
    pub const FAST_DIFF: Self = Self(16);
    pub const DEEP_FLATTEN: Self = Self(32);
    pub const JOURNALING: Self = Self(64);
    pub const DATA_POOL: Self = Self(128);
    pub const OPERATIONS: Self = Self(256);
    pub const MIGRATING: Self = Self(512);
    /// A mirror that is not the primary image (mirroring by snapshots).
    pub const NON_PRIMARY: Self = Self(1024);

    /// Both that say which objects there are.
    pub const MAPS: Self = Self(8 | 16);

    /// What every published image has.
    pub const PUBLISHED: Self = Self(1 | 4 | 8 | 16 | 32);

    /// What an image has into which the OSDs copy objects. The rule in `published.rs` says why it has no object map.
    /// [`Storage::server_copy`] and [`Storage::detach`] add what is missing of [`PUBLISHED`](Self::PUBLISHED).
    pub const WITHOUT_MAPS: Self = Self(1 | 4 | 32);

    /// What an anchor has: no object map, see [`Storage::make_anchor`].
    pub const ANCHOR: Self = Self(1 | 32);

    pub fn has(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

/// The snapshot that an image was cloned from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parent {
    pub pool: String,
    pub namespace: String,
    pub image: String,
    pub image_id: String,
    pub snapshot: String,
    /// Bytes from the start that the clone still shares with it.
    pub overlap: u64,
    /// The parent image lies in the trash.
    pub in_trash: bool,
}

/// A snapshot that an image reads from, by ids.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    pub pool_id: i64,
    pub image_id: String,
    pub snapshot_id: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    pub id: u64,
    pub name: String,
    /// Bytes of the image at the snapshot.
    pub size: u64,
    pub protected: bool,
}

/// Some of a pool's snapshots, and what else the headers of these images tell.
#[derive(Debug, Clone, Default)]
pub struct SnapshotPage {
    /// Image and snapshot; also a snapshot that is gone and left its tag ([`Storage::set_snapshot_tag`]).
    pub found: Vec<(ImageSpec, String)>,
    /// Images with a value of [`OWNER_KEY`].
    pub owned: Vec<(ImageSpec, String)>,
    /// Images that could not be looked at.
    pub failed: Vec<Error>,
    /// Images whose headers were asked for.
    pub looked_at: usize,
    /// Cursor of the next page; `None` when all images were looked at.
    pub next: Option<String>,
}

/// A page of a list, in the order of the list.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Page<T> {
    pub entries: Vec<T>,
    /// Cursor of the next page; `None` at the end of the list.
    pub next: Option<String>,
}

/// An image in the trash.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trashed {
    pub id: String,
    /// The name that it had.
    pub name: String,
}

/// Whether a call changed something. A repeated call finds its work done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Changed {
    Yes,
    No,
}

/// Progress of a transfer in bytes, shared between the thread that moves them and the readers that show them.
#[derive(Debug, Default)]
pub struct Progress {
    total: AtomicU64,
    done: AtomicU64,
    steps: Arc<AtomicU64>,
    waits: Arc<AtomicU64>,
}

impl Progress {
    /// For work whose bytes are not to be shown: it counts only its steps, in these.
    pub fn steps_only(&self) -> Self {
        Self { steps: Arc::clone(&self.steps), waits: Arc::clone(&self.waits), ..Self::default() }
    }

    /// Shows the bytes that `other` has, which shares our steps.
    pub(super) fn mirror(&self, other: &Self) {
        self.total.store(other.total(), Ordering::Relaxed);
        self.done.store(other.done(), Ordering::Relaxed);
    }

    /// Something got done that is no byte of the transfer.
    pub fn step(&self) {
        self.steps.fetch_add(1, Ordering::Relaxed);
    }

    /// The work waits for a rate that other jobs have used up: nothing got done, and nothing hangs.
    pub fn wait(&self) {
        self.waits.fetch_add(1, Ordering::Relaxed);
    }

    /// How often anything got done: as long as this number changes, the work moves.
    pub fn steps(&self) -> u64 {
        self.steps.load(Ordering::Relaxed)
    }

    /// Steps and waits: as long as this number changes, the work does not hang.
    pub fn activity(&self) -> u64 {
        self.steps().wrapping_add(self.waits.load(Ordering::Relaxed))
    }

    pub fn set_total(&self, bytes: u64) {
        self.total.store(bytes, Ordering::Relaxed);
    }

    pub fn set_done(&self, bytes: u64) {
        self.done.store(bytes, Ordering::Relaxed);
        self.step();
    }

    pub fn add(&self, bytes: u64) {
        self.done.fetch_add(bytes, Ordering::Relaxed);
        self.step();
    }

    /// Bytes done, never more than the total.
    pub fn done(&self) -> u64 {
        self.done.load(Ordering::Relaxed).min(self.total())
    }

    pub fn total(&self) -> u64 {
        self.total.load(Ordering::Relaxed)
    }
}

/// Limits of [`Storage::copy`], [`Storage::server_copy`] and [`Storage::flatten`].
#[derive(Debug, Clone)]
pub struct TransferLimits {
    /// Objects in flight.
    pub concurrency: usize,
    /// Shared by all transfers of this daemon.
    pub rates: Arc<Rates>,
}

/// How far [`Storage::fill_published`] got. The default is the beginning.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct FillState {
    /// The image's first object that may not have been copied.
    pub next_object: u64,
    /// Objects that were copied, by this call and by those before it.
    pub copied: u64,
}

/// How much [`Storage::compare`] reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compare {
    /// A few blocks at random, most of them where the source holds data.
    Sample,
    /// Every byte.
    Full,
}

/// What a transfer moved. Objects are counted whole. With holes, both byte counts are upper bounds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Moved {
    /// Bytes written to the destination.
    pub bytes: u64,
    /// Bytes that crossed this host, in and out.
    pub through_host: u64,
    /// Objects written.
    pub objects: u64,
}

impl std::ops::Add for Moved {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            bytes: self.bytes + other.bytes,
            through_host: self.through_host + other.through_host,
            objects: self.objects + other.objects,
        }
    }
}

/// What a job does to RBD images. Every call is idempotent or tells that the thing was there already, so that a job
/// may be run again from any point. Errors name the operation and the image.
#[async_trait]
pub trait Storage: Send + Sync + 'static {
    /// The cluster's fsid, as a lower-case UUID.
    async fn fsid(&self) -> Result<String>;

    /// `None` when there is no such image. With `snapshot`, size, parent and overlap are those at the snapshot, and a
    /// missing snapshot is [`ErrorKind::NotFound`].
    async fn image(&self, image: &ImageSpec, snapshot: Option<&str>) -> Result<Option<ImageInfo>>;

    async fn create_snapshot(&self, image: &ImageSpec, snapshot: &str) -> Result<Changed>;

    async fn protect_snapshot(&self, image: &ImageSpec, snapshot: &str) -> Result<Changed>;

    /// Writes beside the image's header who makes, or made, the snapshot of that name: snapshots have no metadata, and
    /// clones do not inherit this. It goes with the image. Nothing is written for an image of format 1.
    async fn set_snapshot_tag(&self, image: &ImageSpec, snapshot: &str, tag: &str) -> Result<()>;

    /// What [`set_snapshot_tag`](Self::set_snapshot_tag) wrote; `None` when nothing was, or the image is not there.
    async fn snapshot_tag(&self, image: &ImageSpec, snapshot: &str) -> Result<Option<String>>;

    async fn remove_snapshot_tag(&self, image: &ImageSpec, snapshot: &str) -> Result<Changed>;

    /// [`create_snapshot`](Self::create_snapshot) and [`protect_snapshot`](Self::protect_snapshot), at once where that
    /// is quicker.
    async fn create_protected_snapshot(&self, image: &ImageSpec, snapshot: &str) -> Result<()> {
        self.create_snapshot(image, snapshot).await?;
        self.protect_snapshot(image, snapshot).await.map(drop)
    }

    /// Unprotects it and removes it, also one whose removal was broken off half way. `No` when there was
    /// none, or no such image. [`ErrorKind::Busy`] while it has clones.
    async fn remove_snapshot(&self, image: &ImageSpec, snapshot: &str) -> Result<Changed>;

    /// Clones `source@snapshot` to `destination` with these features: [`Features::PUBLISHED`] where no other client
    /// opens the clone before [`flatten`](Self::flatten) is done, otherwise [`Features::WITHOUT_MAPS`].
    /// [`ErrorKind::Exists`] when the name is taken.
    async fn clone_image(
        &self,
        source: &ImageSpec,
        snapshot: &str,
        destination: &ImageSpec,
        features: Features,
    ) -> Result<()>;

    /// Clones `source@snapshot` to `anchor`, replaces its metadata, and gives it a protected snapshot to clone from.
    /// Cinder may flatten an anchor while clones of it are read, so it has no object map: every reader asks the cluster
    /// for each of its objects. Otherwise as [`clone_image`](Self::clone_image). After an error the anchor stays.
    async fn make_anchor(
        &self,
        source: &ImageSpec,
        snapshot: &str,
        anchor: &ImageSpec,
        anchor_snapshot: &str,
        metadata: &[(String, String)],
    ) -> Result<()> {
        self.clone_image(source, snapshot, anchor, Features::ANCHOR).await?;
        self.replace_metadata(anchor, metadata).await?;
        self.create_protected_snapshot(anchor, anchor_snapshot).await
    }

    /// The snapshots that `image@snapshot` reads from below its own objects, the nearest first.
    async fn chain(&self, image: &ImageSpec, snapshot: &str) -> Result<Vec<Link>>;

    /// Creates an empty image with the size, object size and striping of `source@snapshot` and these features.
    /// [`ErrorKind::Exists`] when the name is taken.
    async fn create_like(
        &self,
        source: &ImageSpec,
        snapshot: &str,
        destination: &ImageSpec,
        features: Features,
    ) -> Result<()>;

    /// Copies into the clone the data that it shares with its parent, and cuts the parent off. Does nothing without a
    /// parent.
    /// [`ErrorKind::Cancelled`] soon after `cancel` fires: librbd's flatten is stopped, or its call is left to end in
    /// the background, and the image is then busy for a moment.
    /// `limits` apply to the questions about objects. librbd moves the data at its own pace.
    async fn flatten(
        &self,
        image: &ImageSpec,
        limits: &TransferLimits,
        progress: &Progress,
        cancel: &CancellationToken,
    ) -> Result<Moved>;

    /// Reads `source@snapshot` through librbd, its data only and that of its parents, and writes it into `destination`,
    /// which [`create_like`](Self::create_like) made. Chunks of zeros are left out. Memory is bounded by `limits`.
    async fn copy(
        &self,
        source: &ImageSpec,
        snapshot: &str,
        destination: &ImageSpec,
        limits: &TransferLimits,
        progress: &Progress,
        cancel: &CancellationToken,
    ) -> Result<Moved>;

    /// Lets the OSDs copy the objects of `source@snapshot` and of its parents into `destination`, which
    /// [`create_like`](Self::create_like) made without object maps. Then makes the object map, and copies the rest as
    /// [`copy`](Self::copy) does: objects that are almost entirely holes, for one. [`ErrorKind::Unsupported`] where the
    /// cluster or the shape does not allow it.
    async fn server_copy(
        &self,
        source: &ImageSpec,
        snapshot: &str,
        destination: &ImageSpec,
        limits: &TransferLimits,
        progress: &Progress,
        cancel: &CancellationToken,
    ) -> Result<Moved>;

    /// Lets the OSDs copy into `image`, a clone that others may have open, the objects that it reads from its parents:
    /// in its head and in all its snapshots. `image` is found by its id, wherever it lies: it may be renamed or in the
    /// trash. No watch is set, so others can remove it meanwhile.
    ///
    /// Goes on where `from` says; `saved` is told every few seconds how far it got, and at the end. Copying an object
    /// again is harmless. What it leaves out (including objects that are almost entirely holes) is for
    /// [`detach`](Self::detach). Nothing to do without a parent.
    ///
    /// [`ErrorKind::Unsupported`] where the image has an object map (`published.rs` has the rule), or where the OSDs
    /// cannot copy from this source: `detach` does it all then. [`ErrorKind::NotFound`] when the image is gone, at the
    /// latest after a few seconds of copying: see [`sweep_objects`](Self::sweep_objects). [`ErrorKind::Conflict`] when
    /// the image's parents change again and again; the same call goes on.
    async fn fill_published(
        &self,
        image: &ImageSpec,
        from: FillState,
        limits: &TransferLimits,
        progress: &Progress,
        cancel: &CancellationToken,
        saved: &(dyn Fn(FillState) + Send + Sync),
    ) -> Result<Moved>;

    /// Makes `image` independent of its parents while others have it, or clones of it, open. It flattens the head and
    /// all snapshots, verifies that no parent is left in any of them, makes an object of each hole in which clients
    /// would still look for the parents' data, then switches the object map and fast-diff on and rebuilds them.
    /// `image` is found by its id, in the trash too.
    ///
    /// It may be called again after it broke off anywhere; an image that is done is only verified. The image is open
    /// for changes meanwhile, so a removal by others is [`ErrorKind::Busy`] to them. [`ErrorKind::NotFound`] when the
    /// image is gone. [`ErrorKind::Conflict`] when a parent is left after the flatten: the maps stay off.
    async fn detach(
        &self,
        image: &ImageSpec,
        limits: &TransferLimits,
        progress: &Progress,
        cancel: &CancellationToken,
    ) -> Result<Moved>;

    /// Whether nothing is left of the image of this id: no header, and no entry in the directory or in the trash. An
    /// image that cannot be opened, since a parent of it is missing, is not gone.
    async fn is_gone(&self, image: &ImageSpec) -> Result<bool>;

    /// Removes the data objects that [`fill_published`](Self::fill_published) or [`detach`](Self::detach) wrote after
    /// others had removed the image. Only when neither of them runs any more.
    /// `image` is its id, `objects` is how many objects it had (`size / object_size`, rounded up; more does no harm),
    /// `data_pool` is [`ImageInfo::data_pool`]. Returns how many objects were removed; 0 when called again.
    /// [`ErrorKind::Exists`] while there is anything of the image itself: its header, or an entry in the directory or
    /// in the trash. Nothing is removed then.
    async fn sweep_objects(
        &self,
        image: &ImageSpec,
        objects: u64,
        data_pool: Option<&str>,
        limits: &TransferLimits,
        progress: &Progress,
        cancel: &CancellationToken,
    ) -> Result<u64>;

    /// The offset of a byte in which `destination` differs from `source@snapshot`: the first of those that were
    /// compared. `None` when they are alike. Both are read through librbd.
    async fn compare(
        &self,
        source: &ImageSpec,
        snapshot: &str,
        destination: &ImageSpec,
        extent: Compare,
        progress: &Progress,
        cancel: &CancellationToken,
    ) -> Result<Option<u64>>;

    /// Gives the image exactly the features of a published one, as far as they can be changed, and rebuilds the object
    /// maps of its head and of its snapshots.
    async fn rebuild_maps(&self, image: &ImageSpec, progress: &Progress, cancel: &CancellationToken) -> Result<()>;

    /// At most `length` bytes from `offset` of the image's head, fewer at its end.
    async fn read(&self, image: &ImageSpec, offset: u64, length: usize) -> Result<Vec<u8>>;

    /// Renames within the pool, and finishes a rename of the same image that broke off. [`ErrorKind::Exists`] when
    /// another image has the name, [`ErrorKind::NotFound`] when there is no source.
    async fn rename(&self, image: &ImageSpec, name: &str) -> Result<()>;

    /// Removes the image with all its snapshots, also where the pool's settings turn a removal into a move to the
    /// trash, and where an earlier removal left it there. A name that a broken-off rename left beside another is
    /// removed alone. `No` when there was none. [`ErrorKind::Busy`] while a snapshot has clones or another
    /// client has the image open.
    async fn remove_image(&self, image: &ImageSpec) -> Result<Changed>;

    /// Finishes removals of an image of that name that broke off and left it in the trash. An image that has the name
    /// now is left alone. `No` when there is nothing to finish.
    async fn finish_removal(&self, image: &ImageSpec) -> Result<Changed>;

    /// What lies in the pool's trash, at most `most` images from the cursor `after` on.
    async fn trash(&self, pool: &str, after: Option<&str>, most: usize) -> Result<Page<Trashed>>;

    /// An image that lies in the trash, given by its id. `None`: it does not.
    async fn trashed(&self, image: &ImageSpec) -> Result<Option<Trashed>>;

    /// Whether an image, given by its id, lies in the trash.
    async fn in_trash(&self, image: &ImageSpec) -> Result<bool> {
        Ok(self.trashed(image).await?.is_some())
    }

    /// Removes an image, given by its id, that a user or a service moved to the trash, if its deferment is over and it
    /// has no snapshots. `No` otherwise. [`ErrorKind::Busy`] while another client has it open.
    async fn purge(&self, image: &ImageSpec) -> Result<Changed>;

    /// Makes the OSDs look again at which clients have the image open. Without it, the watch of a client that was
    /// killed and fenced may stay, and nothing can remove the image. Clients that live keep their watches. Nothing to
    /// do when the image is gone.
    async fn forget_dead_watches(&self, image: &ImageSpec) -> Result<()>;

    /// `None` when the key (or the image) is not there.
    async fn metadata(&self, image: &ImageSpec, key: &str) -> Result<Option<String>>;

    async fn set_metadata(&self, image: &ImageSpec, key: &str, value: &str) -> Result<()>;

    /// Sets these keys, then removes every other one: a clone has all metadata of its parent, limits of its speed
    /// included.
    async fn replace_metadata(&self, image: &ImageSpec, metadata: &[(String, String)]) -> Result<()>;

    async fn remove_metadata(&self, image: &ImageSpec, key: &str) -> Result<Changed>;

    /// Names of images of the pool that start with `prefix`, at most `most`, from the cursor `after` on. Other names
    /// cost nothing, and images of format 1 are left out.
    async fn images(&self, pool: &str, prefix: &str, after: Option<&str>, most: usize) -> Result<Page<String>>;

    /// Snapshots whose name starts with `prefix`, of the pool's images, then of those in the trash (by id), and the
    /// images' owners. Read from the image headers without opening the images; `pace` bounds the headers read a second
    /// (0: not at all). One call looks at `most` images, from the cursor `after` on. Images of format 1 are left out:
    /// no job makes a snapshot of one.
    async fn snapshots(
        &self,
        pool: &str,
        prefix: &str,
        pace: u32,
        after: Option<&str>,
        most: usize,
    ) -> Result<SnapshotPage>;

    /// This client's address as the OSDs know it, which [`fence`](Self::fence) takes.
    async fn address(&self) -> Result<String>;

    /// Fences the client with that address (`osd blocklist add`). Returns once this client has the OSD map with that
    /// entry. `No` if this handle has done it before.
    async fn fence(&self, address: &str) -> Result<Changed>;

    /// Reconnects after having been fenced ([`ErrorKind::Fenced`]), under a new address. Only once all work over the
    /// old connection was given up. `No` when this client is not fenced.
    async fn reconnect(&self) -> Result<Changed>;
}

/// Clients for jobs, one for each run of a job. A client that hangs or is fenced stops one job alone.
#[async_trait]
pub trait JobClients: Send + Sync + 'static {
    /// Connects a client for the job of this image. No other job uses it.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::TimedOut`] while too many clients that were given up have calls that have not returned: of this
    /// job, or of all. For a pool in which too many hang, the client answers [`ErrorKind::PoolClosed`].
    async fn connect(&self, image_id: Uuid) -> Result<Box<dyn JobClient>>;

    /// Whether one of the clients that all jobs share was fenced: see [`reconnect`](Self::reconnect).
    fn is_fenced(&self) -> bool;

    /// Connects those of the shared clients again that were fenced. Only once all work over them was given up.
    async fn reconnect(&self) -> Result<Changed>;
}

/// A client of one run of a job. A dropped client closes when its last call has returned. If that takes too long, it is
/// fenced.
#[async_trait]
pub trait JobClient: Send + Sync {
    fn storage(&self) -> Arc<dyn Storage>;

    /// Whether a call has not returned yet, also one that the daemon no longer waits for.
    fn is_busy(&self) -> bool;

    /// Whether this client was found to be fenced.
    fn is_fenced(&self) -> bool;

    /// Fences this client, by another one: its calls that have not returned can do nothing any more. `pools` are those
    /// that its job uses. The client must not be used after that.
    async fn give_up(&self, pools: &[String]) -> Result<()>;
}

/// A version of an object, as RADOS counts them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(pub u64);

/// An object with the keys of its omap, as they were at one version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyedObject {
    pub data: Vec<u8>,
    /// In their order; [`MAX_KEYS`] at most.
    pub keys: Vec<(String, Vec<u8>)>,
    pub version: Version,
}

/// A cls lock that its holder names when it writes, so that a write without the lock is refused by the OSD.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LockKey {
    /// Name of the lock.
    pub name: String,
    /// Tells this holder from others of the same client.
    pub cookie: String,
}

/// What became of asking for a lock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Locked {
    Acquired,
    /// Another client holds it, and its time has not run out by the OSD's clock.
    Held,
    /// There is no such object.
    NoObject,
}

/// What the job store needs of RADOS: small objects with guarded writes in one pool and namespace.
#[async_trait]
pub trait Objects: Send + Sync + 'static {
    /// The whole object and its version. [`ErrorKind::TooLarge`] beyond [`MAX_OBJECT`] bytes. `None` when it is not
    /// there.
    async fn read(&self, object: &str) -> Result<Option<(Vec<u8>, Version)>>;

    /// [`ErrorKind::Exists`] when it is there.
    async fn create(&self, object: &str, data: &[u8]) -> Result<Version>;

    /// Replaces the whole object if it still has that version, and, with `lock`, if that lock is still held: otherwise
    /// [`ErrorKind::Conflict`] (version) or [`ErrorKind::NotLocked`]. [`ErrorKind::NotFound`] when it is gone.
    async fn replace(&self, object: &str, data: &[u8], version: Version, lock: Option<&LockKey>) -> Result<Version>;

    /// The whole object with its first keys, all as of one version. Otherwise as [`read`](Self::read).
    async fn read_with_keys(&self, object: &str) -> Result<Option<KeyedObject>>;

    /// [`replace`](Self::replace) that also removes keys, in one step.
    async fn replace_and_remove_keys(
        &self,
        object: &str,
        data: &[u8],
        version: Version,
        lock: Option<&LockKey>,
        keys: &[String],
    ) -> Result<Version>;

    /// Sets and removes keys of an object that still has that version: otherwise [`ErrorKind::Conflict`], and
    /// [`ErrorKind::NotFound`] when it is gone. Never creates the object.
    async fn change_keys(
        &self,
        object: &str,
        set: &[(String, Vec<u8>)],
        removed: &[String],
        version: Version,
    ) -> Result<Version>;

    /// Removes it if it still has that version; errors as of [`replace`](Self::replace).
    async fn remove(&self, object: &str, version: Version, lock: Option<&LockKey>) -> Result<()>;

    /// Takes the exclusive lock for `duration` (by the OSD's clock). Never creates the object. Taking it again with the
    /// same key renews it.
    async fn lock(&self, object: &str, lock: &LockKey, description: &str, duration: Duration) -> Result<Locked>;

    /// Prolongs a lock that is still held: [`ErrorKind::NotLocked`] once it ran out or another client has it.
    async fn renew(&self, object: &str, lock: &LockKey, description: &str, duration: Duration) -> Result<()>;

    /// `No` when it was not held any more.
    async fn unlock(&self, object: &str, lock: &LockKey) -> Result<Changed>;

    /// Whether a client holds the lock now.
    async fn is_locked(&self, object: &str, lock_name: &str) -> Result<bool>;

    /// Keys and values of the object's omap in order, at most `max`, after the key `after`. Empty when there is no
    /// object.
    async fn omap(&self, object: &str, after: &str, max: usize) -> Result<Vec<(String, Vec<u8>)>>;

    /// Sets keys; creates the object where needed.
    async fn set_omap(&self, object: &str, entries: &[(String, Vec<u8>)]) -> Result<()>;

    async fn remove_omap(&self, object: &str, keys: &[String]) -> Result<()>;

    /// Names of all objects of the namespace. Slow in a large pool: it walks every placement group.
    async fn list(&self) -> Result<Vec<String>>;
}
