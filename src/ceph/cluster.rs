//! The connection to a cluster: handles that close themselves, running blocking calls off the runtime, who we are to
//! the OSDs, and fencing other clients.
//!
//! A client that was fenced (blocklisted) itself stays so until [`Client::reconnect`] is called: every call answers
//! [`ErrorKind::Fenced`] at once. That is on purpose. A fenced client has lost its leases, and everything that still
//! runs under them must be given up first; a silent new connection would let such work through to the images again.
#![allow(unsafe_code)]

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ffi::{CStr, CString, c_char, c_int};
use std::path::{Path, PathBuf};
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use ceph::rados::{
    rados_buffer_free, rados_cluster_fsid, rados_conf_get, rados_conf_read_file, rados_conf_set, rados_connect,
    rados_create, rados_ioctx_create, rados_ioctx_create2, rados_ioctx_destroy, rados_ioctx_get_id,
    rados_ioctx_locator_set_key, rados_ioctx_set_namespace, rados_ioctx_t, rados_mon_command, rados_pool_list,
    rados_pool_lookup, rados_pool_reverse_lookup, rados_shutdown, rados_stat, rados_t, rados_wait_for_latest_osdmap,
};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use super::hung::HungClients;
use super::keyring::{self, UserKey};
use super::{Changed, Error, ErrorKind, Progress, Result, sys};

/// Options of librados and librbd that differ from the operator's ceph.conf, and why.
const OPTIONS: &[(&str, &str)] = &[
    // Seconds to find the monitors when connecting.
    ("client_mount_timeout", "30"),
    // Seconds for a monitor's answer (pools, blocklist, snapshot ids): an error is better than a call that never ends.
    ("rados_mon_op_timeout", "60"),
    // None, whatever ceph.conf says, unless the client was given one: an operation that timed out may still be carried
    // out when its OSD comes back, so its outcome would be unknown. librbd is made to wait through the restart of an
    // OSD. The caller can stop waiting.
    ("rados_osd_op_timeout", "0"),
    // Images are written once, from buffers that the copy holds itself: a write-back cache would only double them.
    ("rbd_cache", "false"),
    // No caches on this host's disk either: what a call has written is in the cluster when the call returns, and
    // nothing is left in a cache when this process dies.
    ("rbd_plugins", ""),
    ("rbd_persistent_cache_mode", "disabled"),
    ("rbd_parent_cache_enabled", "false"),
    // A writer whose lock is taken away is fenced before a snapshot is made.
    ("rbd_blocklist_on_break_lock", "true"),
    // As long as the monitors say. With any other value the fence ends with EINVAL (seen with Ceph 16), and a volume
    // whose writer has died takes no snapshot.
    ("rbd_blocklist_expire_seconds", "0"),
    // Destinations are striped like their source, not like the operator's default.
    ("rbd_default_stripe_unit", "0"),
    ("rbd_default_stripe_count", "0"),
];

/// What to do where librados on this host is older than the type of the user's key.
pub const OTHER_KEY: &str =
    "install librados2 and librbd1 of the cluster's release here, or give the user a key of type aes";

/// Why images cannot have their data in a pool.
const NO_OVERWRITES: &str =
    "the pool is erasure-coded and does not allow overwrites (`ceph osd pool set … allow_ec_overwrites true`)";

/// How long a client stays fenced. Its address never comes back, so a long time costs nothing.
const FENCE_SECONDS: u32 = 24 * 3600;
const FENCE_HOLDS: Duration = Duration::from_secs(FENCE_SECONDS as u64 / 2);

/// How often the progress of a running transfer is shown to its caller.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(100);

/// How long a cancelled transfer may take to stop by itself before its caller returns. It then ends unattended.
const CANCEL_GRACE: Duration = Duration::from_secs(4);

/// Calls of one client that run at a time. A job has a few; the store's come from all jobs at once.
const CALLS_MAX: u32 = 64;

/// How long a call waits for others of its client to return.
const CALL_PATIENCE: Duration = Duration::from_secs(20);

/// A client of one cluster. Cheap to clone; all clones share one connection.
///
/// Drop all clones, and let running calls end, before the process exits: an exit cleans up OpenSSL under librados'
/// threads, and they abort the process then. Dropping the last clone shuts the connection down, which takes
/// milliseconds.
///
/// Calls have no time limit while OSDs are down (see `OPTIONS`), unless [`ClientOptions::limit`] gives
/// one: a caller that cannot wait drops the future, and the call ends on its own thread once the OSDs are back. A
/// client has a bounded number of such threads.
#[derive(Clone)]
pub struct Client {
    shared: Arc<Shared>,
}

/// How a client connects, and where it puts the data of the images that it makes.
#[derive(Debug, Clone)]
pub struct ClientOptions {
    /// Ceph's configuration file: monitors, keyring and options.
    pub conf: PathBuf,
    /// The cephx id, without "client.".
    pub user: String,
    /// The file with that user's key. `None`: those that `conf` names.
    pub keyring: Option<PathBuf>,
    /// A time limit of operations on OSDs. One that timed out may still be carried out: only for guarded writes, whose
    /// version tells.
    pub limit: Option<Duration>,
    /// The pool of the data of images that are made by `clone_image` and `create_like`, in whichever pool they lie; it
    /// may be erasure-coded. Anchors and the sources of probes keep their data with them. `None`: what `conf`, or the
    /// settings of the image's pool, say (`rbd_default_data_pool`).
    pub data_pool: Option<String>,
}

impl ClientOptions {
    pub fn new(conf: impl Into<PathBuf>, user: impl Into<String>) -> Self {
        Self { conf: conf.into(), user: user.into(), keyring: None, limit: None, data_pool: None }
    }
}

struct Shared {
    options: ClientOptions,
    /// Closes pools to this client. `None`: all stay open to it.
    hung: Option<Arc<HungClients>>,
    current: Mutex<Arc<Cluster>>,
    reconnecting: tokio::sync::Mutex<()>,
    /// Addresses that this client has fenced, and when.
    fenced: Mutex<HashMap<String, Instant>>,
    /// One permit for each call that has not returned.
    calls: Arc<Semaphore>,
}

impl Client {
    /// Connects as `client.<user>` with the monitors, keyring and options of the file `conf`. Gives up after 30 s.
    /// The error names what to fix: the file, the keyring, the user or the monitors.
    pub async fn connect(conf: &Path, user: &str) -> Result<Self> {
        Self::open(ClientOptions::new(conf, user)).await
    }

    /// A connection of its own to the same cluster, with the same options. Pools in which too many of the `hung`
    /// clients hang are closed to it.
    pub(super) async fn another(&self, hung: Arc<HungClients>) -> Result<Self> {
        Self::open_guarded(self.shared.options.clone(), Some(hung)).await
    }

    /// [`connect`](Self::connect), with all options.
    pub async fn open(options: ClientOptions) -> Result<Self> {
        Self::open_guarded(options, None).await
    }

    async fn open_guarded(options: ClientOptions, hung: Option<Arc<HungClients>>) -> Result<Self> {
        let cluster = connect_blocking(options.clone(), hung.clone()).await?;
        Ok(Self {
            shared: Arc::new(Shared {
                options,
                hung,
                current: Mutex::new(cluster),
                reconnecting: tokio::sync::Mutex::new(()),
                fenced: Mutex::new(HashMap::new()),
                calls: Arc::new(Semaphore::new(CALLS_MAX as usize)),
            }),
        })
    }

    /// Whether a call has not returned.
    pub fn is_busy(&self) -> bool {
        self.shared.calls.available_permits() < CALLS_MAX as usize
    }

    /// Returns when no call runs.
    pub async fn quiet(&self) {
        // it is never closed
        drop(self.shared.calls.acquire_many(CALLS_MAX).await);
    }

    /// The pool of the data of new images, where that was said.
    pub(super) fn data_pool(&self) -> Option<String> {
        self.shared.options.data_pool.clone()
    }

    /// This client's address, also when it was fenced.
    pub(super) fn own_address(&self) -> Result<String> {
        self.cluster().addresses()
    }

    /// Whether this client was found to be fenced.
    pub fn is_fenced(&self) -> bool {
        self.cluster().is_fenced()
    }

    /// Replaces the connection of a client that was fenced by a new one, under a new address. Call it once all work
    /// that ran over the old one has been given up. `No` when the client is not fenced.
    pub async fn reconnect(&self) -> Result<Changed> {
        let _one = self.shared.reconnecting.lock().await;
        if !self.is_fenced() {
            return Ok(Changed::No);
        }
        let cluster = connect_blocking(self.shared.options.clone(), self.shared.hung.clone()).await?;
        // The old handle is shut down when the last call over it has ended.
        *lock(&self.shared.current) = cluster;
        Ok(Changed::Yes)
    }

    pub(super) fn cluster(&self) -> Arc<Cluster> {
        lock(&self.shared.current).clone()
    }

    /// Runs blocking calls on a thread of their own. They own all they use, so that a dropped future harms nothing.
    pub(super) async fn run<T, F>(&self, operation: impl Into<String>, work: F) -> Result<T>
    where
        T: Send + 'static,
        F: FnOnce(&Arc<Cluster>) -> Result<T> + Send + 'static,
    {
        let operation = operation.into();
        let cluster = self.cluster();
        if cluster.is_fenced() {
            return Err(fenced(operation));
        }
        let call = match tokio::time::timeout(CALL_PATIENCE, self.shared.calls.clone().acquire_owned()).await {
            Ok(Ok(call)) => call,
            Ok(Err(_)) | Err(_) => {
                let detail = format!("{CALLS_MAX} calls of this client have not returned");
                return Err(Error::new(operation, ErrorKind::TimedOut, detail));
            }
        };
        let task = tokio::task::spawn_blocking(move || {
            let result = cluster.watch_for_fence(work);
            drop(call);
            result
        });
        task.await.unwrap_or_else(|lost| Err(Error::new(operation, ErrorKind::Other, lost.to_string())))
    }

    /// Like [`run`](Self::run), for work that shows its progress and can be stopped: by `cancel`, or by dropping the
    /// future. Work that does not stop within a few seconds of `cancel` ends on its own thread; no call waits for it.
    pub(super) async fn run_long<T, F>(
        &self,
        operation: impl Into<String>,
        progress: &Progress,
        cancel: &CancellationToken,
        work: F,
    ) -> Result<T>
    where
        T: Send + 'static,
        F: FnOnce(&Arc<Cluster>, &Progress, &CancellationToken) -> Result<T> + Send + 'static,
    {
        let operation = operation.into();
        if cancel.is_cancelled() {
            return Err(cancelled(operation));
        }
        let stop = cancel.child_token();
        let _stop_when_dropped = stop.clone().drop_guard();
        let shown = Arc::new(progress.steps_only());
        let inner = shown.clone();
        let mirror = || progress.mirror(&shown);
        let running = self.run(operation.clone(), move |cluster| work(cluster, &inner, &stop));
        tokio::pin!(running);
        let give_up = async {
            cancel.cancelled().await;
            tokio::time::sleep(CANCEL_GRACE).await;
        };
        tokio::pin!(give_up);
        loop {
            tokio::select! {
                result = &mut running => {
                    mirror();
                    return result;
                }
                () = &mut give_up => return Err(cancelled(operation)),
                () = tokio::time::sleep(PROGRESS_INTERVAL) => mirror(),
            }
        }
    }

    /// The releases that the cluster's OSDs run, as `ceph versions` tells them: `16.2.15`.
    pub async fn osd_versions(&self) -> Result<Vec<String>> {
        const OPERATION: &str = "ask for the OSDs' versions";
        let answer = self
            .run(OPERATION, |cluster| cluster.ask_monitors(OPERATION, r#"{"prefix": "versions", "format": "json"}"#))
            .await?;
        let told: serde_json::Value = serde_json::from_slice(&answer)
            .map_err(|e| Error::new(OPERATION, ErrorKind::Other, format!("the answer is no JSON: {e}")))?;
        // {"osd": {"ceph version 16.2.15 (618f…) pacific (stable)": 3}, …}
        let names = told.get("osd").and_then(serde_json::Value::as_object).into_iter().flat_map(serde_json::Map::keys);
        Ok(names.filter_map(|name| Some(name.strip_prefix("ceph version ")?.split(' ').next()?.to_owned())).collect())
    }

    /// Whether the monitors let this client fence others, without doing so: they look at the capabilities before
    /// they read the address, which is none.
    pub async fn may_fence(&self) -> Result<bool> {
        const OPERATION: &str = "ask whether `osd blocklist add` is allowed";
        let command = r#"{"prefix": "osd blocklist", "blocklistop": "add", "addr": "rbd-offload-check/0"}"#;
        match self.run(OPERATION, move |cluster| cluster.ask_monitors(OPERATION, command)).await {
            Err(e) if e.kind() == ErrorKind::PermissionDenied => Ok(false),
            Err(e) if matches!(e.kind(), ErrorKind::TimedOut | ErrorKind::Fenced) => Err(e),
            _ => Ok(true),
        }
    }

    /// Fences all addresses of another client, and waits for the map that says so.
    pub(super) async fn fence_address(&self, address: &str) -> Result<Changed> {
        let operation = format!("fence client {address}");
        // it is fenced again long before the fence ends
        if lock(&self.shared.fenced).get(address).is_some_and(|at| at.elapsed() < FENCE_HOLDS) {
            return Ok(Changed::No);
        }
        let shared = self.shared.clone();
        let address = address.to_owned();
        self.run(operation.clone(), move |cluster| {
            let own = cluster.addresses()?;
            let others = entity_addresses(&address);
            if others.is_empty() {
                return Err(Error::new(operation, ErrorKind::Unsupported, "that is no client's address"));
            }
            if others.iter().any(|other| entity_addresses(&own).contains(other)) {
                return Err(Error::new(operation, ErrorKind::Unsupported, "that is this client itself"));
            }
            for other in &others {
                let text = c_string(&operation, other)?;
                // SAFETY: a connected handle; the string is copied by the callee, which does not write to it.
                let r = unsafe { sys::rados_blocklist_add(cluster.raw, text.as_ptr().cast_mut(), FENCE_SECONDS) };
                check(&operation, r)?;
            }
            // SAFETY: a connected handle.
            check(&operation, unsafe { rados_wait_for_latest_osdmap(cluster.raw) })?;
            lock(&shared.fenced).insert(address, Instant::now());
            Ok(Changed::Yes)
        })
        .await
    }
}

async fn connect_blocking(options: ClientOptions, hung: Option<Arc<HungClients>>) -> Result<Arc<Cluster>> {
    let operation = format!("connect to Ceph as client.{} with {}", options.user, options.conf.display());
    let task = tokio::task::spawn_blocking(move || Cluster::connect(&options, hung));
    match task.await {
        Ok(result) => result.map(Arc::new),
        Err(lost) => Err(Error::new(operation, ErrorKind::Other, lost.to_string())),
    }
}

/// Ends the process as it is, without the clean-up of an exit: for a command that gave up waiting for a call, which
/// would abort the process then (see [`Client`]). What is to be printed must have been.
pub fn exit_now(status: u8) -> ! {
    // SAFETY: takes a number and does not return.
    unsafe { libc::_exit(status.into()) }
}

/// Keeps what is in memory out of core dumps, and from other processes of the same user (prctl(2), PR_SET_DUMPABLE).
pub fn make_undumpable() -> std::io::Result<()> {
    // SAFETY: takes numbers only; the kernel wants those that are not used to be 0.
    match unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

/// This host's name (gethostname(2)): `/proc/sys` is hidden from a service with `ProcSubset=pid`.
pub fn host_name() -> String {
    let mut name = [0u8; 256];
    // SAFETY: at most so many bytes are written.
    let r = unsafe { libc::gethostname(name.as_mut_ptr().cast(), name.len()) };
    let end = name.iter().position(|byte| *byte == 0).unwrap_or(name.len());
    match String::from_utf8_lossy(name.get(..end).unwrap_or_default()) {
        name if r == 0 && !name.is_empty() => name.into_owned(),
        _ => "localhost".to_owned(),
    }
}

/// A connected handle of librados, shut down when its last user is gone: every [`IoCtx`] holds one.
pub(super) struct Cluster {
    raw: rados_t,
    fenced: AtomicBool,
    /// A pool that was used, to ask an OSD whether we are fenced.
    pool: Mutex<Option<String>>,
    /// By its id, how many [`IoCtx`] have a pool open.
    open_pools: Mutex<BTreeMap<i64, usize>>,
    hung: Option<Arc<HungClients>>,
}

// SAFETY: librados handles may be used from any thread, and from several at once.
unsafe impl Send for Cluster {}
// SAFETY: as above.
unsafe impl Sync for Cluster {}

impl Cluster {
    fn connect(options: &ClientOptions, hung: Option<Arc<HungClients>>) -> Result<Self> {
        let ClientOptions { conf, user, keyring, limit, .. } = options;
        let operation = format!("connect to Ceph as client.{user} with {}", conf.display());
        if let Err(e) = std::fs::File::open(conf) {
            let kind = match e.kind() {
                std::io::ErrorKind::NotFound => ErrorKind::NotFound,
                std::io::ErrorKind::PermissionDenied => ErrorKind::PermissionDenied,
                _ => ErrorKind::Other,
            };
            return Err(Error::new(operation, kind, format!("cannot read {}: {e} ([ceph] conf)", conf.display())));
        }
        let id = c_string(&operation, user)?;
        let path = c_string(&operation, &conf.to_string_lossy())?;
        let mut raw: rados_t = ptr::null_mut();
        // SAFETY: writes the new handle to `raw`.
        check(&operation, unsafe { rados_create(&mut raw, id.as_ptr()) })?;
        // From here on the handle is shut down on every way out.
        let cluster =
            Self { raw, fenced: AtomicBool::new(false), pool: Mutex::default(), open_pools: Mutex::default(), hung };
        // SAFETY: the handle is open, the path ends in NUL.
        let r = unsafe { rados_conf_read_file(raw, path.as_ptr()) };
        if r < 0 {
            let detail = format!("{} is not a valid Ceph configuration", conf.display());
            return Err(Error::new(operation, Error::from_errno("", r).kind(), detail));
        }
        let limit = limit.map(|limit| limit.as_secs().max(1).to_string());
        let limited = limit.iter().map(|seconds| ("rados_osd_op_timeout", seconds.as_str()));
        for (name, value) in OPTIONS.iter().copied().chain(limited) {
            let (name, value) = (c_string(&operation, name)?, c_string(&operation, value)?);
            // SAFETY: the handle is open, both strings end in NUL. An option that this librados lacks is no loss.
            unsafe { rados_conf_set(raw, name.as_ptr(), value.as_ptr()) };
        }
        if let Some(keyring) = keyring {
            let path = c_string(&operation, &keyring.to_string_lossy())?;
            // SAFETY: the handle is open, the path ends in NUL.
            check(&operation, unsafe { rados_conf_set(raw, c"keyring".as_ptr(), path.as_ptr()) })?;
        }
        // SAFETY: the handle is configured and not connected yet.
        let r = unsafe { rados_connect(raw) };
        if r < 0 {
            let keyring = cluster.option("keyring").unwrap_or_default();
            let hosts = cluster.option("mon_host").unwrap_or_default();
            let error = Error::from_errno(operation.clone(), r);
            let key = keyring::find(&keyring, user);
            let detail = match (-r, key) {
                (libc::ENOENT | libc::EPERM | libc::EACCES, UserKey::Unreadable(path, e)) => {
                    format!("cannot read {}: {e}; the key of client.{user} is looked for there", path.display())
                }
                // librados refuses the whole file
                (libc::EIO | libc::EINVAL, UserKey::Found(path, of)) if !of.is_known_everywhere() => {
                    let detail = format!(
                        "the key of client.{user} in {} is of type {}, which librados on this host cannot use: \
                         {OTHER_KEY}",
                        path.display(),
                        of.name()
                    );
                    return Err(Error::new(operation, ErrorKind::Unsupported, detail));
                }
                (libc::ENOENT, _) => {
                    format!(
                        "no key for client.{user} in {keyring}: put its keyring there, or name the file with `keyring` \
                         in [ceph], or in {}",
                        conf.display()
                    )
                }
                (libc::EPERM | libc::EACCES, _) => format!(
                    "the monitors refused client.{user}: compare `ceph auth get client.{user}` with the key in \
                     {keyring}"
                ),
                (libc::ETIMEDOUT, _) => {
                    format!("no monitor answered within 30 s; mon_host in {} is {hosts}", conf.display())
                }
                _ => return Err(error),
            };
            return Err(Error::new(operation, error.kind(), detail));
        }
        Ok(cluster)
    }

    fn option(&self, name: &str) -> Option<String> {
        let name = CString::new(name).ok()?;
        let mut buffer = vec![0u8; 4096];
        // SAFETY: writes at most `buffer.len()` bytes, NUL included.
        let r = unsafe { rados_conf_get(self.raw, name.as_ptr(), buffer.as_mut_ptr().cast(), buffer.len()) };
        (r >= 0).then(|| until_nul(&buffer))
    }

    pub fn is_fenced(&self) -> bool {
        self.fenced.load(Ordering::Acquire)
    }

    /// The ids of the pools that are open now: the calls that run use some of them.
    pub fn open_pools(&self) -> BTreeSet<i64> {
        lock(&self.open_pools).keys().copied().collect()
    }

    /// Counts a pool as open, unless calls hang there.
    fn count_open(&self, pool: i64, operation: &str) -> Result<()> {
        let mut open = lock(&self.open_pools);
        // a client that has the pool open goes on with what it began
        if let Some(hung) = self.hung.as_ref().filter(|_| !open.contains_key(&pool)) {
            hung.allow(&open.keys().copied().chain([pool]).collect(), operation)?;
        }
        *open.entry(pool).or_default() += 1;
        Ok(())
    }

    fn count_closed(&self, pool: i64) {
        let mut open = lock(&self.open_pools);
        if let Some(count) = open.get_mut(&pool) {
            *count -= 1;
            if *count == 0 {
                open.remove(&pool);
            }
        }
    }

    /// Runs `work`, and remembers when its failure shows that this client was fenced. librbd hides that behind other
    /// errors at times (EROFS, EIO), so a failure without a name is checked against an OSD.
    fn watch_for_fence<T>(self: Arc<Self>, work: impl FnOnce(&Arc<Self>) -> Result<T>) -> Result<T> {
        let result = work(&self);
        let Err(error) = &result else { return result };
        let is_fenced = match error.kind() {
            ErrorKind::Fenced => true,
            ErrorKind::Other | ErrorKind::TimedOut | ErrorKind::PermissionDenied | ErrorKind::ReadOnly => {
                self.ask_whether_fenced()
            }
            _ => false,
        };
        if is_fenced {
            self.fenced.store(true, Ordering::Release);
            return result.map_err(|e| e.with_kind(ErrorKind::Fenced));
        }
        result
    }

    fn ask_whether_fenced(self: &Arc<Self>) -> bool {
        let Some(pool) = lock(&self.pool).clone() else { return false };
        let Ok(io) = IoCtx::open(self, &pool) else { return false };
        let (mut size, mut time) = (0, 0);
        // SAFETY: the ioctx is open; both results have a place.
        let r = unsafe { rados_stat(io.raw(), c"rbd_directory".as_ptr(), &mut size, &mut time) };
        r == -libc::ESHUTDOWN
    }

    pub fn fsid(&self) -> Result<String> {
        let mut buffer = [0u8; 64];
        // SAFETY: writes at most the buffer's length.
        let r = unsafe { rados_cluster_fsid(self.raw, buffer.as_mut_ptr().cast(), buffer.len()) };
        check("read the cluster's fsid", r)?;
        Ok(until_nul(&buffer).to_lowercase())
    }

    pub fn pools(&self) -> Result<Vec<String>> {
        let mut buffer = vec![0u8; 4096];
        loop {
            // SAFETY: writes at most the buffer's length and returns the length that is needed.
            let r = unsafe { rados_pool_list(self.raw, buffer.as_mut_ptr().cast(), buffer.len()) };
            let needed = check("list the pools", r)? as usize;
            if needed <= buffer.len() {
                return Ok(split_names(&buffer[..needed]));
            }
            buffer.resize(needed + 1024, 0);
        }
    }

    /// By the map of pools that this client has: no OSD is asked. `None` for a pool that is not there.
    pub fn pool_id(&self, pool: &str) -> Option<i64> {
        let name = CString::new(pool).ok()?;
        // SAFETY: a connected handle, the name ends in NUL.
        let id = unsafe { rados_pool_lookup(self.raw, name.as_ptr()) };
        (id >= 0).then_some(id)
    }

    pub fn pool_name(&self, id: i64) -> Result<String> {
        let mut buffer = vec![0u8; 1024];
        // SAFETY: writes at most the buffer's length.
        let r = unsafe { rados_pool_reverse_lookup(self.raw, id, buffer.as_mut_ptr().cast(), buffer.len()) };
        check(format!("look up pool {id}"), r)?;
        Ok(until_nul(&buffer))
    }

    /// Sends a command to the monitors and returns its output.
    fn ask_monitors(&self, operation: &str, command: &str) -> Result<Vec<u8>> {
        let command = c_string(operation, command)?;
        let mut commands = [command.as_ptr()];
        let (mut output, mut status): (*mut c_char, *mut c_char) = (ptr::null_mut(), ptr::null_mut());
        let (mut length, mut status_length) = (0usize, 0usize);
        // SAFETY: a connected handle, one command that ends in NUL, no input; both outputs have a place.
        let r = unsafe {
            rados_mon_command(
                self.raw,
                commands.as_mut_ptr(),
                commands.len(),
                ptr::null(),
                0,
                &mut output,
                &mut length,
                &mut status,
                &mut status_length,
            )
        };
        let mut answer = Vec::new();
        if !output.is_null() {
            // SAFETY: librados says that there are so many bytes.
            answer.extend_from_slice(unsafe { std::slice::from_raw_parts(output.cast::<u8>(), length) });
        }
        for buffer in [output, status] {
            if !buffer.is_null() {
                // SAFETY: allocated by librados, not used again.
                unsafe { rados_buffer_free(buffer) };
            }
        }
        check(operation, r)?;
        Ok(answer)
    }

    /// This client's addresses, as librados prints them.
    pub fn addresses(&self) -> Result<String> {
        let mut text: *mut c_char = ptr::null_mut();
        // SAFETY: on success `text` is a string of librados' own allocator, freed below.
        let r = unsafe { sys::rados_getaddrs(self.raw, &mut text) };
        check("read this client's address", r)?;
        if text.is_null() {
            return Err(Error::new("read this client's address", ErrorKind::Other, "librados knows none"));
        }
        // SAFETY: not null, ends in NUL.
        let address = unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned();
        // SAFETY: allocated by librados, not used again.
        unsafe { rados_buffer_free(text) };
        Ok(address)
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        // SAFETY: no owner of the handle is left. Every ioctx was one, so all of them are destroyed.
        unsafe { rados_shutdown(self.raw) };
    }
}

/// An open pool (and namespace). Destroys itself, then drops its reference to the cluster handle.
pub(super) struct IoCtx {
    raw: rados_ioctx_t,
    cluster: Arc<Cluster>,
    pool_id: i64,
}

// SAFETY: an ioctx may be used from any thread. It is not Sync here: its last version belongs to one user at a time.
unsafe impl Send for IoCtx {}

impl IoCtx {
    /// Opens a pool by name. A missing one is [`ErrorKind::NotFound`], and the error lists those that there are.
    pub fn open(cluster: &Arc<Cluster>, pool: &str) -> Result<Self> {
        let operation = format!("open pool \"{pool}\"");
        let name = c_string(&operation, pool)?;
        let mut raw: rados_ioctx_t = ptr::null_mut();
        // SAFETY: a connected handle; writes the new ioctx to `raw`.
        let r = unsafe { rados_ioctx_create(cluster.raw, name.as_ptr(), &mut raw) };
        if r == -libc::ENOENT {
            let pools = cluster.pools().unwrap_or_default().join(", ");
            return Err(Error::new(operation, ErrorKind::NotFound, format!("no such pool; pools here: {pools}")));
        }
        check(&operation, r)?;
        let io = Self::opened(raw, cluster, &operation)?;
        lock(&cluster.pool).get_or_insert_with(|| pool.to_owned());
        Ok(io)
    }

    /// A pool without space refuses what would need some, instead of making it wait until there is some again. What
    /// frees space goes through.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::PoolClosed`] where the calls of too many jobs hang (see [`HungClients`]).
    fn opened(raw: rados_ioctx_t, cluster: &Arc<Cluster>, operation: &str) -> Result<Self> {
        // SAFETY: the ioctx was opened a moment ago, and is not in use yet.
        unsafe { sys::rados_set_pool_full_try(raw) };
        // SAFETY: as above.
        let pool_id = unsafe { rados_ioctx_get_id(raw) };
        if let Err(error) = cluster.count_open(pool_id, operation) {
            // SAFETY: opened by us, and not used again.
            unsafe { rados_ioctx_destroy(raw) };
            return Err(error);
        }
        Ok(Self { raw, cluster: cluster.clone(), pool_id })
    }

    pub fn open_id(cluster: &Arc<Cluster>, pool: i64) -> Result<Self> {
        let mut raw: rados_ioctx_t = ptr::null_mut();
        // SAFETY: a connected handle; writes the new ioctx to `raw`.
        let r = unsafe { rados_ioctx_create2(cluster.raw, pool, &mut raw) };
        let operation = format!("open pool {pool}");
        check(&operation, r)?;
        Self::opened(raw, cluster, &operation)
    }

    pub fn with_namespace(self, namespace: &str) -> Result<Self> {
        let name = c_string(&format!("open namespace \"{namespace}\""), namespace)?;
        // SAFETY: the ioctx is open and not in use yet; the string is copied.
        unsafe { rados_ioctx_set_namespace(self.raw, name.as_ptr()) };
        Ok(self)
    }

    /// Objects are in the placement group of the object `key`, whatever their own names.
    pub fn beside(self, key: &CStr) -> Self {
        // SAFETY: the ioctx is open and not in use yet; the string is copied.
        unsafe { rados_ioctx_locator_set_key(self.raw, key.as_ptr()) };
        self
    }

    pub fn raw(&self) -> rados_ioctx_t {
        self.raw
    }

    pub fn cluster(&self) -> &Arc<Cluster> {
        &self.cluster
    }

    /// Fails with [`ErrorKind::Unsupported`] where images cannot have their data here: an erasure-coded pool must allow
    /// that objects are overwritten.
    pub fn must_hold_data(&self, operation: &str) -> Result<()> {
        let mut appends_only = 0;
        // SAFETY: the ioctx is open; the result has a place.
        check(operation, unsafe { sys::rados_ioctx_pool_requires_alignment2(self.raw, &mut appends_only) })?;
        match appends_only {
            0 => Ok(()),
            _ => Err(Error::new(operation, ErrorKind::Unsupported, NO_OVERWRITES)),
        }
    }

    pub fn pool_id(&self) -> i64 {
        self.pool_id
    }
}

impl Drop for IoCtx {
    fn drop(&mut self) {
        // SAFETY: opened by us, and not used again; the cluster handle is still held.
        unsafe { rados_ioctx_destroy(self.raw) };
        self.cluster.count_closed(self.pool_id);
    }
}

/// The addresses in an address or address vector, in the form that `osd blocklist add` takes and `profile rbd` allows:
/// `[v2:10.0.0.1:0/7,v1:10.0.0.1:0/7]` → `10.0.0.1:0/7`. A client's addresses differ in nothing but the protocol, and a
/// blocklist entry holds for any.
fn entity_addresses(text: &str) -> Vec<String> {
    // An address vector stands in brackets, but so does the host of an IPv6 address.
    let vector = text.strip_prefix('[').and_then(|t| t.strip_suffix(']')).unwrap_or(text);
    let mut addresses: Vec<String> = Vec::new();
    for part in vector.split(',') {
        let part = part.trim();
        let part = ["v1:", "v2:", "any:"].iter().find_map(|protocol| part.strip_prefix(protocol)).unwrap_or(part);
        let is_address = part.rsplit_once('/').is_some_and(|(host, nonce)| {
            host.contains(':') && !host.contains('/') && !nonce.is_empty() && nonce.bytes().all(|b| b.is_ascii_digit())
        });
        if is_address && !addresses.iter().any(|a| a == part) {
            addresses.push(part.to_owned());
        }
    }
    addresses
}

pub(super) fn fenced(operation: impl Into<String>) -> Error {
    Error::new(operation, ErrorKind::Fenced, "this client was fenced (blocklisted)")
}

pub(super) fn cancelled(operation: impl Into<String>) -> Error {
    Error::new(operation, ErrorKind::Cancelled, "cancelled")
}

/// The result of a C function, or its errno as an error.
pub(super) fn check(operation: impl Into<String>, result: c_int) -> Result<c_int> {
    if result < 0 { Err(Error::from_errno(operation, result)) } else { Ok(result) }
}

pub(super) fn c_string(operation: &str, text: &str) -> Result<CString> {
    CString::new(text)
        .map_err(|_| Error::new(operation, ErrorKind::Unsupported, format!("{text:?} contains a NUL character")))
}

/// A text in a buffer that a C function filled.
pub(super) fn until_nul(buffer: &[u8]) -> String {
    let end = buffer.iter().position(|&byte| byte == 0).unwrap_or(buffer.len());
    String::from_utf8_lossy(&buffer[..end]).into_owned()
}

/// The time since 1970, by this host's clock.
pub(super) fn unix_time() -> Duration {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default()
}

/// Names that each end in NUL; an empty one ends the list.
fn split_names(buffer: &[u8]) -> Vec<String> {
    buffer
        .split(|&byte| byte == 0)
        .take_while(|name| !name.is_empty())
        .map(|name| String::from_utf8_lossy(name).into_owned())
        .collect()
}

/// Locks a mutex whose data stays whole whatever a holder's panic interrupted.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_taken_from_all_forms() {
        assert_eq!(entity_addresses("10.0.0.1:0/7"), ["10.0.0.1:0/7"]);
        assert_eq!(entity_addresses("v1:10.0.0.1:0/7"), ["10.0.0.1:0/7"]);
        assert_eq!(entity_addresses("[v2:10.0.0.1:0/7,v1:10.0.0.1:0/7]"), ["10.0.0.1:0/7"]);
        assert_eq!(entity_addresses("[v2:10.0.0.1:0/7,v1:10.0.0.2:0/7]"), ["10.0.0.1:0/7", "10.0.0.2:0/7"]);
        assert_eq!(entity_addresses("[fd00::1]:0/7"), ["[fd00::1]:0/7"]);
        assert_eq!(entity_addresses("v2:[fd00::1]:0/7"), ["[fd00::1]:0/7"]);
        assert_eq!(entity_addresses("[v2:[fd00::1]:0/7,v1:[fd00::1]:0/7]"), ["[fd00::1]:0/7"]);
    }

    #[test]
    fn invalid_addresses_are_ignored() {
        for text in ["", "-", "10.0.0.1", "10.0.0.1:0", "10.0.0.1:0/", "10.0.0.1:0/x", "10.0.0.1:0/1/2"] {
            assert!(entity_addresses(text).is_empty(), "{text}");
        }
    }

    #[test]
    fn the_empty_name_ends_a_list_of_names() {
        assert_eq!(split_names(b"images\0volumes\0\0rest"), ["images", "volumes"]);
        assert!(split_names(b"\0").is_empty());
        assert_eq!(until_nul(b"abc\0def"), "abc");
    }
}
