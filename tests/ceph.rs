//! The promises of `rbd_offload::ceph`, against a real cluster: the lab that `make test` starts.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rand::{RngExt, SeedableRng};
use rbd_offload::ceph::{
    CephJobClients, Changed, Client, ClientOptions, Compare, ErrorKind, Features, FillFault, FillState, ImageKey,
    ImageSpec, JobClients, LockKey, Locked, Moved, Objects, Probed, Progress, Rates, Storage, TransferLimits, Version,
};
use rbd_offload::job::bindings::RememberedBindings;
use rbd_offload::notification::{Binding, Bindings};
use rbd_offload::publish::tag::OwnershipTag;
use rbd_offload::publish::{self, RenameOutcome};
use rbd_offload::transfer::{self, OWNERSHIP_TAG};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use self::python::Script;

#[path = "common/python.rs"]
mod python;

const MIB: u64 = 1 << 20;
const METHODS: [Method; 3] = [Method::Copy, Method::Clone, Method::Fill];

/// Limits with rates of their own: bytes and objects a second; 0: none.
fn limits(concurrency: usize, bytes: u64, objects: u64) -> TransferLimits {
    TransferLimits { concurrency, rates: Arc::new(Rates::new(bytes, objects)) }
}

fn no_limits() -> TransferLimits {
    limits(8, 0, 0)
}

static SOURCES: Script = Script::new(concat!(include_str!("common/serve.py"), include_str!("common/sources.py")));

/// One test's view of the lab. What it made goes when it is dropped.
struct Lab {
    dir: PathBuf,
    name: String,
}

impl Lab {
    fn new() -> Self {
        let dir = std::env::var_os("RBDLAB_DIR")
            .expect("this test needs the lab and RBDLAB_DIR does not name one: run `make test`, which starts it");
        Self { dir: dir.into(), name: format!("test-{}", Uuid::new_v4().simple()) }
    }

    fn conf(&self) -> PathBuf {
        self.dir.join("ceph/ceph.conf")
    }

    fn keyring(&self) -> PathBuf {
        self.dir.join("ceph/client.admin.keyring")
    }

    async fn client(&self) -> Client {
        Client::connect(&self.conf(), "rbd-offload").await.expect("the lab's Ceph answers")
    }

    fn python(&self, code: &str) -> Vec<u8> {
        SOURCES.ask(&self.dir, &self.request(code)).unwrap_or_else(|error| panic!("{code}: {error}"))
    }

    fn request(&self, code: &str) -> Value {
        json!({"code": code, "name": self.name})
    }

    fn data(&self, image: &ImageSpec, snapshot: Option<&str>) -> Vec<u8> {
        let snapshot = snapshot.map_or("None".to_owned(), |s| format!("'{s}'"));
        let name = image.to_string();
        let (pool, name) = name.split_once('/').unwrap();
        self.python(&format!("data('{pool}', '{name}', {snapshot})"))
    }

    fn command(&self, program: &str, arguments: &[&str]) -> String {
        let output = Command::new(program)
            .arg("-c")
            .arg(self.conf())
            .arg("--keyring")
            .arg(self.keyring())
            .args(["--id", "admin"])
            .args(arguments)
            .output()
            .unwrap();
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    fn volume(&self) -> ImageSpec {
        ImageSpec::named("volumes", format!("{}-volume", self.name))
    }

    fn image(&self) -> ImageSpec {
        ImageSpec::named("images", format!("{}-image", self.name))
    }
}

impl Lab {
    /// Removes all that the test made.
    fn clean(&self) {
        if let Err(error) = SOURCES.ask(&self.dir, &self.request("clean()")) {
            eprintln!("cleaning up: {error}");
        }
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        self.clean();
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Method {
    Copy,
    Clone,
    Fill,
}

/// Moves `source@s` to `destination` and returns what was moved.
async fn transfer(client: &Client, method: Method, source: &ImageSpec, destination: &ImageSpec) -> Moved {
    let (progress, cancel) = (Progress::default(), CancellationToken::new());
    if method == Method::Copy {
        client.create_like(source, "s", destination, Features::PUBLISHED).await.unwrap();
        let moved = client.copy(source, "s", destination, &no_limits(), &progress, &cancel).await.unwrap();
        assert_eq!(progress.done(), progress.total());
        return moved;
    }
    if method == Method::Fill {
        return server_copy(client, source, destination).await;
    }
    client.clone_image(source, "s", destination, Features::PUBLISHED).await.unwrap();
    client.flatten(destination, &no_limits(), &progress, &cancel).await.unwrap()
}

async fn server_copy(client: &Client, source: &ImageSpec, destination: &ImageSpec) -> Moved {
    let (progress, never) = (Progress::default(), CancellationToken::new());
    client.create_like(source, "s", destination, Features::WITHOUT_MAPS).await.unwrap();
    let moved = client.server_copy(source, "s", destination, &no_limits(), &progress, &never).await.unwrap();
    assert_eq!(progress.done(), progress.total());
    moved
}

/// Prepares a source by Python, which makes the image `volumes/NAME-volume`, and holds every method to the same bytes.
async fn every_method_is_right(prepare: &str) {
    let lab = Lab::new();
    let client = lab.client().await;
    every_method_of(&lab, &client, prepare).await;
}

async fn every_method_of(lab: &Lab, client: &Client, prepare: &str) {
    lab.python(prepare);
    let source = lab.volume();
    assert_eq!(client.create_snapshot(&source, "s").await.unwrap(), Changed::Yes);
    assert_eq!(client.protect_snapshot(&source, "s").await.unwrap(), Changed::Yes);
    // Later writes must not show.
    if client.image(&source, Some("s")).await.unwrap().unwrap().size > MIB {
        lab.python("write('volumes', NAME + '-volume', 12345, 200000, 99)");
    }
    let expected = lab.data(&source, Some("s"));
    for method in METHODS {
        let destination = ImageSpec::named("images", format!("{}-{method:?}", lab.name));
        let moved = transfer(client, method, &source, &destination).await;
        eprintln!("{method:?}: {moved:?}");
        let found = lab.data(&destination, None);
        assert_eq!(found.len(), expected.len(), "{method:?}");
        let first = found.iter().zip(&expected).position(|(a, b)| a != b);
        assert_eq!(first, None, "{method:?}: first byte that differs");
        is_published_shape(lab, client, &source, &destination).await;
        assert_eq!(client.remove_image(&destination).await.unwrap(), Changed::Yes);
    }
    assert_eq!(client.remove_snapshot(&source, "s").await.unwrap(), Changed::Yes);
}

async fn is_published_shape(lab: &Lab, client: &Client, source: &ImageSpec, destination: &ImageSpec) {
    let from = client.image(source, Some("s")).await.unwrap().unwrap();
    lab.command("rbd", &["object-map", "check", &destination.to_string()]);
    let to = client.image(destination, None).await.unwrap().unwrap();
    assert_eq!(to.flags, 0, "object map");
    assert!(to.features.has(Features::PUBLISHED), "{:?}", to.features);
    assert_eq!(to.features.0 & !(Features::PUBLISHED.0 | Features::STRIPINGV2.0), 0, "{:?}", to.features);
    assert_eq!(to.parent, None);
    assert_eq!(to.snapshots, []);
    assert_eq!(to.data_pool, None);
    assert_eq!(to.object_size, from.object_size);
    assert_eq!((to.stripe_unit, to.stripe_count), (from.stripe_unit, from.stripe_count));
    assert_eq!(to.size, from.size);
}

#[tokio::test(flavor = "multi_thread")]
async fn plain_volumes_are_copied_exactly() {
    every_method_is_right(
        "
v = NAME + '-volume'
create('volumes', v, 40 * M)
write('volumes', v, 0, 3 * M, 1); write('volumes', v, 9 * M + 777, 5000, 2); write('volumes', v, 31 * M, 9 * M, 3)",
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clone_is_transferred_whole() {
    every_method_is_right(
        "
v = NAME + '-volume'
create('volumes2', NAME + '-base', 40 * M)
write('volumes2', NAME + '-base', 0, 10 * M, 1); write('volumes2', NAME + '-base', 30 * M, 2 * M, 2)
snap('volumes2', NAME + '-base', 'b')
clone('volumes2', NAME + '-base', 'b', 'volumes', v)
write('volumes', v, 5 * M, 4096, 3); write('volumes', v, 20 * M, 2 * M, 4); discard('volumes', v, 0, 4 * M)",
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clone_of_a_clone_is_transferred_whole() {
    every_method_is_right(
        "
v = NAME + '-volume'
create('images', NAME + '-a', 40 * M)
write('images', NAME + '-a', 0, 12 * M, 1); write('images', NAME + '-a', 36 * M, 4 * M, 5)
snap('images', NAME + '-a', 'x')
clone('images', NAME + '-a', 'x', 'volumes2', NAME + '-b')
write('volumes2', NAME + '-b', 4 * M, 1 * M, 2); write('volumes2', NAME + '-b', 16 * M, 1 * M, 6)
snap('volumes2', NAME + '-b', 'y')
clone('volumes2', NAME + '-b', 'y', 'volumes', v)
write('volumes', v, 8 * M + 100, 100, 3)
trash('volumes2', NAME + '-b')",
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn clones_that_grew_are_copied_exactly() {
    every_method_is_right(
        "
v = NAME + '-volume'
create('images', NAME + '-a', 10 * M + 5000); write('images', NAME + '-a', 0, 10 * M + 5000, 1)
snap('images', NAME + '-a', 'x'); clone('images', NAME + '-a', 'x', 'volumes', v)
resize('volumes', v, 40 * M); write('volumes', v, 33 * M, 3 * M, 2); write('volumes', v, 11 * M, 3000, 3)",
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn clones_that_shrank_and_grew_again() {
    every_method_is_right(
        "
v = NAME + '-volume'
create('images', NAME + '-a', 40 * M); write('images', NAME + '-a', 0, 40 * M, 1)
snap('images', NAME + '-a', 'x'); clone('images', NAME + '-a', 'x', 'volumes', v)
write('volumes', v, 20 * M, 8 * M, 2)
snap('volumes', v, 'before')
resize('volumes', v, 13 * M + 512); resize('volumes', v, 36 * M); write('volumes', v, 25 * M, 1 * M, 3)",
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn volumes_without_fast_diff_are_copied_exactly() {
    every_method_is_right(
        "
v = NAME + '-volume'
create('images', NAME + '-a', 24 * M, features=1); write('images', NAME + '-a', 0, 9 * M, 1)
snap('images', NAME + '-a', 'x'); clone('images', NAME + '-a', 'x', 'volumes', v, features=1)
write('volumes', v, 13 * M, 2 * M, 2); write('volumes', v, M, 10, 2)",
    )
    .await;
}

/// A parent full of data, and a clone of which two whole objects are discarded: it holds them at zero bytes.
async fn discards_in_a_clone(clone: &str) {
    every_method_is_right(&format!(
        "
v = NAME + '-volume'
create('images', NAME + '-a', 48 * M); write('images', NAME + '-a', 0, 48 * M, 1)
snap('images', NAME + '-a', 'x')
{clone}
discard('volumes', v, 4 * M, 4 * M); discard('volumes', v, 20 * M, 4 * M)"
    ))
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn discards_in_a_clone_with_layering_only() {
    discards_in_a_clone("clone('images', NAME + '-a', 'x', 'volumes', v, features=1)").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn discards_in_a_clone_with_exclusive_lock() {
    discards_in_a_clone("clone('images', NAME + '-a', 'x', 'volumes', v, features=1 | 4)").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn discards_in_a_clone_whose_maps_were_never_built() {
    discards_in_a_clone(
        "clone('images', NAME + '-a', 'x', 'volumes', v, features=1)
with rbd.Image(io('volumes'), v) as image:
    image.update_features(4, True); image.update_features(8 | 16, True)
    assert image.flags() == 3, image.flags()",
    )
    .await;
}

/// The map of the head is valid, that of the clone's snapshot in the middle of the chain is not.
#[tokio::test(flavor = "multi_thread")]
async fn discards_in_the_middle_of_a_chain() {
    every_method_is_right(
        "
v = NAME + '-volume'
create('images', NAME + '-a', 32 * M); write('images', NAME + '-a', 0, 32 * M, 1)
snap('images', NAME + '-a', 'x')
clone('images', NAME + '-a', 'x', 'volumes2', NAME + '-b', features=1)
discard('volumes2', NAME + '-b', 4 * M, 8 * M); write('volumes2', NAME + '-b', 8 * M, 4096, 2)
snap('volumes2', NAME + '-b', 'y')
with rbd.Image(io('volumes2'), NAME + '-b') as image:
    image.update_features(4, True); image.update_features(8 | 16, True); image.rebuild_object_map()
clone('volumes2', NAME + '-b', 'y', 'volumes', v)
discard('volumes', v, 16 * M, 4 * M); discard('volumes', v, 21 * M, M)",
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn odd_sizes_are_copied_exactly() {
    every_method_is_right(
        "
v = NAME + '-volume'
create('volumes', v, 13 * M + 1537); write('volumes', v, 12 * M, M + 1537, 1); write('volumes', v, 1, 1, 1)",
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn volumes_without_data_are_copied_exactly() {
    every_method_is_right("create('volumes', NAME + '-volume', 20 * M)").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn volumes_of_no_bytes_can_only_be_copied() {
    let lab = Lab::new();
    lab.python("create('volumes', NAME + '-volume', 0)");
    let client = lab.client().await;
    client.create_snapshot(&lab.volume(), "s").await.unwrap();
    client.protect_snapshot(&lab.volume(), "s").await.unwrap();
    let refused = client.clone_image(&lab.volume(), "s", &lab.image(), Features::PUBLISHED).await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Unsupported, "{refused}");
    assert_eq!(transfer(&client, Method::Copy, &lab.volume(), &lab.image()).await, Moved::default());
    is_published_shape(&lab, &client, &lab.volume(), &lab.image()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn small_objects_are_copied_exactly() {
    every_method_is_right(
        "
v = NAME + '-volume'
create('volumes', v, 20 * M, order=20); write('volumes', v, 3 * M + 5, 3 * M, 1); write('volumes', v, 19 * M, M, 2)",
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn large_objects_are_copied_exactly() {
    every_method_is_right(
        "
v = NAME + '-volume'
create('volumes', v, 80 * M, order=25); write('volumes', v, 30 * M, 5 * M, 1); write('volumes', v, 79 * M, M, 2)",
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clone_with_another_object_size_than_its_parent_is_copied_exactly() {
    every_method_is_right(
        "
v = NAME + '-volume'
create('images', NAME + '-a', 40 * M, order=23); write('images', NAME + '-a', 3 * M, 20 * M, 1)
snap('images', NAME + '-a', 'x'); clone('images', NAME + '-a', 'x', 'volumes', v, order=20, stripe_unit=M, stripe_count=1)
write('volumes', v, 5 * M, M, 2); write('volumes', v, 30 * M, M, 3)",
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn striped_volumes_are_copied_exactly() {
    every_method_is_right(
        "
v = NAME + '-volume'
create('images', NAME + '-a', 40 * M, features=DEFAULT | 2, unit=65536, count=4)
write('images', NAME + '-a', 0, 7 * M, 1); write('images', NAME + '-a', 22 * M + 10, M, 4)
snap('images', NAME + '-a', 'x')
clone('images', NAME + '-a', 'x', 'volumes', v, features=DEFAULT | 2, stripe_unit=32768, stripe_count=3)
write('volumes', v, 5 * M + 1, 2 * M, 2); write('volumes', v, 30 * M, 10 * M, 3)",
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn erasure_coded_data_is_copied_exactly() {
    every_method_is_right(
        "
v = NAME + '-volume'
create('images', NAME + '-a', 40 * M, data_pool='ecdata'); write('images', NAME + '-a', 0, 9 * M, 1)
snap('images', NAME + '-a', 'x'); clone('images', NAME + '-a', 'x', 'volumes', v, data_pool='ecdata')
write('volumes', v, 13 * M, 4 * M, 2); write('volumes', v, M, 3000, 2)",
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_in_the_trash_is_read_by_its_id() {
    let lab = Lab::new();
    lab.python("create('volumes', NAME + '-volume', 12 * M); write('volumes', NAME + '-volume', 0, 5 * M, 1)");
    let client = lab.client().await;
    let source = lab.volume();
    client.create_snapshot(&source, "s").await.unwrap();
    client.protect_snapshot(&source, "s").await.unwrap();
    let expected = lab.data(&source, Some("s"));
    let id = client.image(&source, None).await.unwrap().unwrap().id;
    let by_id = ImageSpec::with_id("volumes", id.as_str());
    // Cloned before and flattened after.
    let cloned = ImageSpec::named("images", format!("{}-cloned", lab.name));
    client.clone_image(&by_id, "s", &cloned, Features::PUBLISHED).await.unwrap();
    lab.python("trash('volumes', NAME + '-volume')");
    assert_eq!(client.image(&source, None).await.unwrap(), None);
    let info = client.image(&by_id, Some("s")).await.unwrap().unwrap();
    assert_eq!(info.id, id);
    assert!(client.image(&cloned, None).await.unwrap().unwrap().parent.unwrap().in_trash);
    for method in [Method::Copy, Method::Fill] {
        transfer(&client, method, &by_id, &lab.image()).await;
        assert_eq!(lab.data(&lab.image(), None), expected, "{method:?}");
        assert_eq!(client.remove_image(&lab.image()).await.unwrap(), Changed::Yes);
    }
    let (progress, cancel) = (Progress::default(), CancellationToken::new());
    client.flatten(&cloned, &no_limits(), &progress, &cancel).await.unwrap();
    assert_eq!(lab.data(&cloned, None), expected);
    let again = ImageSpec::named("images", format!("{}-again", lab.name));
    let refused = client.clone_image(&by_id, "s", &again, Features::PUBLISHED).await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Unsupported, "{refused}");
    assert!(
        client
            .snapshots("volumes", "s", 0, None, usize::MAX)
            .await
            .unwrap()
            .found
            .contains(&(by_id.clone(), "s".to_owned()))
    );
    assert_eq!(client.remove_snapshot(&by_id, "s").await.unwrap(), Changed::Yes);
    assert_eq!(client.remove_snapshot(&by_id, "s").await.unwrap(), Changed::No);
    assert_eq!(client.remove_image(&by_id).await.unwrap(), Changed::Yes);
    assert_eq!(client.remove_image(&by_id).await.unwrap(), Changed::No);
}

/// What operators set for their other clients in the ceph.conf that the daemon reads too.
#[tokio::test(flavor = "multi_thread")]
async fn the_operators_options_change_neither_bytes_nor_shape() {
    let lab = Lab::new();
    let conf = std::env::temp_dir().join(format!("{}.conf", lab.name));
    let options = "
[client]
rbd_cache = true
rbd_cache_writethrough_until_flush = false
rbd_cache_max_dirty_age = 30
rbd_parent_cache_enabled = true
rbd_plugins = pwl_cache
rbd_persistent_cache_mode = ssd
rbd_default_features = 1
rbd_default_order = 24
rbd_default_stripe_unit = 65536
rbd_default_stripe_count = 3
rbd_default_clone_format = 2
rbd_skip_partial_discard = true
rbd_discard_granularity_bytes = 4194304
rbd_concurrent_management_ops = 1
rbd_move_to_trash_on_remove = true
rbd_move_to_trash_on_remove_expire_seconds = 3600
";
    std::fs::write(&conf, std::fs::read_to_string(lab.conf()).unwrap() + options).unwrap();
    let client = Client::connect(&conf, "rbd-offload").await;
    std::fs::remove_file(&conf).unwrap();
    let client = client.unwrap();
    let prepare = "
v = NAME + '-volume'
create('images', NAME + '-a', 24 * M); write('images', NAME + '-a', 0, 20 * M, 1)
snap('images', NAME + '-a', 'x'); clone('images', NAME + '-a', 'x', 'volumes', v)
write('volumes', v, 5 * M + 1, 2 * M, 2); discard('volumes', v, 9 * M + 4096, 2 * M); discard('volumes', v, 12 * M, 4 * M)";
    every_method_of(&lab, &client, prepare).await;
    for pool in ["images", "volumes"] {
        let trash = lab.command("rbd", &["trash", "ls", "--all", pool]);
        assert!(!trash.contains(&lab.name), "{trash}");
    }
}

/// A process that has written into a new volume, and has it open.
fn writer_of_a_volume(lab: &Lab) -> std::process::Child {
    lab.python("create('volumes', NAME + '-volume', 16 * M)");
    let code = "
image = rbd.Image(io('volumes'), NAME + '-volume')
image.write(random.Random(1).randbytes(6 * M), M); image.flush()
print('written', flush=True)
sys.stdin.read()";
    let mut writer = SOURCES
        .command(&lab.dir, &format!("run({})", lab.request(code)))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(writer.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "written\n");
    writer
}

/// The watch of a writer that lives stays, however often the OSD reads the object again. That of one that was killed
/// is gone after its 30 s.
#[tokio::test(flavor = "multi_thread")]
async fn an_image_is_removed_once_its_writer_is_dead_and_not_before() {
    let lab = Lab::new();
    let mut writer = writer_of_a_volume(&lab);
    let (client, image) = (lab.client().await, lab.volume());
    let busy = client.remove_image(&image).await.unwrap_err();
    assert_eq!(busy.kind(), ErrorKind::Busy, "{busy}");
    let id = ImageSpec::with_id("volumes", client.image(&image, None).await.unwrap().unwrap().id);
    for same in [&image, &id] {
        client.forget_dead_watches(same).await.unwrap();
        let watchers = lab.command("rbd", &["status", "--format", "json", &image.to_string()]);
        assert!(watchers.contains("\"watchers\":[{"), "{watchers}");
    }
    assert!(!lab.command("rados", &["-p", "volumes", "ls"]).contains("rbd-offload.none."), "an object was made");
    writer.kill().unwrap();
    writer.wait().unwrap();
    let since = Instant::now();
    while let Err(error) = client.remove_image(&image).await {
        assert!(error.kind() == ErrorKind::Busy && since.elapsed() < Duration::from_secs(90), "{error}");
    }
    assert!(client.image(&image, None).await.unwrap().is_none());
    client.forget_dead_watches(&image).await.unwrap();
}

/// A writer was killed while it held the volume's exclusive lock. Its host is gone, so the lock is never released.
#[tokio::test(flavor = "multi_thread")]
async fn a_dead_writers_lock_does_not_block_the_daemon() {
    takes_a_dead_writers_lock("").await;
}

/// librbd of Ceph 16 then fails to fence the dead writer: the monitors refuse its argument (EINVAL).
#[tokio::test(flavor = "multi_thread")]
async fn a_dead_writers_lock_is_taken_where_the_operator_lets_blocklist_entries_expire() {
    takes_a_dead_writers_lock("[client]\nrbd_blocklist_expire_seconds = 3600\n").await;
}

async fn takes_a_dead_writers_lock(options: &str) {
    let lab = Lab::new();
    let dir = tempfile::tempdir().unwrap();
    let conf = dir.path().join("ceph.conf");
    std::fs::write(&conf, format!("{}\n{options}", std::fs::read_to_string(lab.conf()).unwrap())).unwrap();
    let mut writer = writer_of_a_volume(&lab);
    writer.kill().unwrap();
    writer.wait().unwrap();

    let (client, source) = (Client::connect(&conf, "rbd-offload").await.unwrap(), lab.volume());
    let began = Instant::now();
    assert_eq!(client.create_snapshot(&source, "s").await.unwrap(), Changed::Yes);
    eprintln!("snapshot after {:.1?}", began.elapsed());
    assert_eq!(client.protect_snapshot(&source, "s").await.unwrap(), Changed::Yes);
    let written = lab.python("sys.stdout.buffer.write(bytes(M) + random.Random(1).randbytes(6 * M) + bytes(9 * M))");
    for method in METHODS {
        let destination = ImageSpec::named("images", format!("{}-{method:?}", lab.name));
        transfer(&client, method, &source, &destination).await;
        assert!(lab.data(&destination, None) == written, "{method:?}");
        assert_eq!(client.remove_image(&destination).await.unwrap(), Changed::Yes);
    }
    assert_eq!(client.remove_snapshot(&source, "s").await.unwrap(), Changed::Yes);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_during_writes_equals_the_snapshot() {
    let lab = Lab::new();
    lab.python("create('volumes', NAME + '-volume', 64 * M); write('volumes', NAME + '-volume', 0, 64 * M, 1)");
    let client = lab.client().await;
    let source = lab.volume();
    client.create_snapshot(&source, "s").await.unwrap();
    let expected = lab.data(&source, Some("s"));
    client.create_like(&source, "s", &lab.image(), Features::PUBLISHED).await.unwrap();
    let (progress, cancel) = (Progress::default(), CancellationToken::new());
    let slow = limits(8, 16 * MIB, 0);
    let began = Instant::now();
    let image = lab.image();
    let copy = client.copy(&source, "s", &image, &slow, &progress, &cancel);
    let writer = async {
        tokio::task::block_in_place(|| {
            lab.python("for n in range(8): write('volumes', NAME + '-volume', n * 8 * M + 4096, 3 * M, n)")
        })
    };
    let (moved, _) = tokio::join!(copy, writer);
    let moved = moved.unwrap();
    let took = began.elapsed();
    assert!(took > Duration::from_secs(3), "64 MiB at 16 MiB/s took {took:?}");
    assert_eq!((moved.bytes, moved.through_host, moved.objects), (64 * MIB, 128 * MIB, 16));
    assert!(lab.data(&image, None) == expected);
    assert!(lab.data(&source, None) != expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_stops_when_cancelled_or_dropped() {
    let lab = Lab::new();
    lab.python("create('volumes', NAME + '-volume', 64 * M); write('volumes', NAME + '-volume', 0, 64 * M, 1)");
    let client = lab.client().await;
    let (source, image) = (lab.volume(), lab.image());
    client.create_snapshot(&source, "s").await.unwrap();
    client.create_like(&source, "s", &image, Features::PUBLISHED).await.unwrap();
    let slow = limits(8, 8 * MIB, 0);
    let (progress, cancel) = (Progress::default(), CancellationToken::new());
    let stopper = async {
        tokio::time::sleep(Duration::from_secs(2)).await;
        cancel.cancel();
        Instant::now()
    };
    let (stopped, at) = tokio::join!(client.copy(&source, "s", &image, &slow, &progress, &cancel), stopper);
    assert_eq!(stopped.unwrap_err().kind(), ErrorKind::Cancelled);
    assert!(at.elapsed() < Duration::from_secs(5));
    assert!(progress.done() > 0 && progress.done() < progress.total());
    assert_eq!(client.remove_image(&image).await.unwrap(), Changed::Yes);

    client.create_like(&source, "s", &image, Features::PUBLISHED).await.unwrap();
    let never = CancellationToken::new();
    let copy = client.copy(&source, "s", &image, &slow, &progress, &never);
    tokio::time::timeout(Duration::from_secs(1), copy).await.unwrap_err();
    // The dropped copy closes the image.
    assert_eq!(client.remove_image(&image).await.unwrap(), Changed::Yes);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flatten_stops_when_cancelled() {
    let lab = Lab::new();
    lab.python(
        "create('volumes', NAME + '-volume', 512 * M)
for n in range(512): write('volumes', NAME + '-volume', n * M, 4096, n)",
    );
    let client = lab.client().await;
    let (source, image) = (lab.volume(), lab.image());
    client.create_snapshot(&source, "s").await.unwrap();
    client.protect_snapshot(&source, "s").await.unwrap();
    client.clone_image(&source, "s", &image, Features::PUBLISHED).await.unwrap();
    let (progress, cancel) = (Progress::default(), CancellationToken::new());
    let stopper = async {
        while progress.done() == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        cancel.cancel();
        Instant::now()
    };
    let unlimited = no_limits();
    let (stopped, at) = tokio::join!(client.flatten(&image, &unlimited, &progress, &cancel), stopper);
    assert_eq!(stopped.unwrap_err().kind(), ErrorKind::Cancelled);
    eprintln!("stopped {:?} after the cancel, {} of {} done", at.elapsed(), progress.done(), progress.total());
    assert!(at.elapsed() < Duration::from_secs(20));
    assert!(client.image(&image, None).await.unwrap().unwrap().parent.is_some());
    // It can go on, and be removed in between.
    let busy = client.remove_snapshot(&source, "s").await.unwrap_err();
    assert_eq!(busy.kind(), ErrorKind::Busy, "{busy}");
    client.flatten(&image, &no_limits(), &progress, &CancellationToken::new()).await.unwrap();
    assert_eq!(
        client.flatten(&image, &no_limits(), &progress, &CancellationToken::new()).await.unwrap(),
        Moved::default()
    );
    assert!(lab.data(&image, None) == lab.data(&source, Some("s")));
    client.remove_image(&image).await.unwrap();

    client.clone_image(&source, "s", &image, Features::PUBLISHED).await.unwrap();
    let (progress, cancel) = (Progress::default(), CancellationToken::new());
    cancel.cancel();
    client.flatten(&image, &no_limits(), &progress, &cancel).await.unwrap_err();
    assert_eq!(client.remove_image(&image).await.unwrap(), Changed::Yes);
    assert_eq!(client.remove_snapshot(&source, "s").await.unwrap(), Changed::Yes);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fill_that_stopped_half_way_leaves_nothing_when_its_image_is_removed() {
    let lab = Lab::new();
    lab.python(
        "create('volumes', NAME + '-volume', 256 * M)
for n in range(64): write('volumes', NAME + '-volume', 4 * n * M, 4096, n)",
    );
    let client = lab.client().await;
    let (source, image) = (lab.volume(), lab.image());
    client.create_snapshot(&source, "s").await.unwrap();
    client.protect_snapshot(&source, "s").await.unwrap();
    client.create_like(&source, "s", &image, Features::WITHOUT_MAPS).await.unwrap();
    let id = client.image(&image, None).await.unwrap().unwrap().id;
    let slow = limits(8, 0, 20);
    let (progress, cancel) = (Progress::default(), CancellationToken::new());
    let stopper = async {
        while progress.done() < 8 * 4 * MIB {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        cancel.cancel();
    };
    let (stopped, ()) = tokio::join!(client.server_copy(&source, "s", &image, &slow, &progress, &cancel), stopper);
    assert_eq!(stopped.unwrap_err().kind(), ErrorKind::Cancelled);
    let objects = |lab: &Lab| lab.command("rados", &["-p", "images", "ls"]).lines().filter(|o| o.contains(&id)).count();
    assert!(objects(&lab) > 8);
    client.remove_image(&image).await.unwrap();
    assert_eq!(objects(&lab), 0);

    // One that goes on after having been stopped is whole.
    client.create_like(&source, "s", &image, Features::WITHOUT_MAPS).await.unwrap();
    let (progress, cancel) = (Progress::default(), CancellationToken::new());
    cancel.cancel();
    client.server_copy(&source, "s", &image, &no_limits(), &progress, &cancel).await.unwrap_err();
    client.server_copy(&source, "s", &image, &no_limits(), &progress, &CancellationToken::new()).await.unwrap();
    let info = client.image(&image, None).await.unwrap().unwrap();
    assert!(info.features.has(Features::PUBLISHED) && info.flags == 0 && info.parent.is_none());
    assert!(lab.data(&image, None) == lab.data(&source, Some("s")));
}

#[tokio::test(flavor = "multi_thread")]
async fn repeated_steps_find_nothing_to_do() {
    let lab = Lab::new();
    lab.python("create('volumes', NAME + '-volume', 4 * M); write('volumes', NAME + '-volume', 0, 5000, 1)");
    let client = lab.client().await;
    let (source, image) = (lab.volume(), lab.image());
    for expected in [Changed::Yes, Changed::No] {
        assert_eq!(client.create_snapshot(&source, "s").await.unwrap(), expected);
        assert_eq!(client.protect_snapshot(&source, "s").await.unwrap(), expected);
    }
    let info = client.image(&source, Some("s")).await.unwrap().unwrap();
    assert!(info.snapshots.iter().any(|s| s.name == "s" && s.protected && s.size == 4 * MIB));
    assert!(!info.old_format);
    let missing = client.image(&source, Some("other")).await.unwrap_err();
    assert_eq!(missing.kind(), ErrorKind::NotFound, "{missing}");
    assert_eq!(client.image(&image, None).await.unwrap(), None);
    let missing = client.image(&ImageSpec::named("imges", "x"), None).await.unwrap_err();
    assert_eq!(missing.kind(), ErrorKind::NotFound);
    assert!(missing.to_string().contains("\"imges\"") && missing.to_string().contains("volumes2"), "{missing}");
    for missing in [client.create_snapshot(&image, "s").await, client.protect_snapshot(&source, "other").await] {
        assert_eq!(missing.unwrap_err().kind(), ErrorKind::NotFound);
    }

    client.clone_image(&source, "s", &image, Features::PUBLISHED).await.unwrap();
    for taken in [
        client.clone_image(&source, "s", &image, Features::PUBLISHED).await,
        client.create_like(&source, "s", &image, Features::PUBLISHED).await,
    ] {
        assert_eq!(taken.unwrap_err().kind(), ErrorKind::Exists);
    }
    let parent = client.image(&image, None).await.unwrap().unwrap().parent.unwrap();
    assert_eq!((parent.pool.as_str(), parent.snapshot.as_str(), parent.overlap), ("volumes", "s", 4 * MIB));
    let busy = client.remove_snapshot(&source, "s").await.unwrap_err();
    assert_eq!(busy.kind(), ErrorKind::Busy, "{busy}");
    let busy = client.remove_image(&source).await.unwrap_err();
    assert_eq!(busy.kind(), ErrorKind::Busy, "{busy}");

    assert_eq!(client.metadata(&image, "rbd_offload.job").await.unwrap(), None);
    client.set_metadata(&image, "rbd_offload.job", "ä 1").await.unwrap();
    client.set_metadata(&image, "rbd_offload.job", &"x".repeat(10_000)).await.unwrap();
    assert_eq!(client.metadata(&image, "rbd_offload.job").await.unwrap(), Some("x".repeat(10_000)));
    assert_eq!(client.remove_metadata(&image, "rbd_offload.job").await.unwrap(), Changed::Yes);
    assert_eq!(client.remove_metadata(&image, "rbd_offload.job").await.unwrap(), Changed::No);

    assert_eq!(client.read(&image, 0, 100).await.unwrap(), lab.data(&source, Some("s"))[..100]);
    assert_eq!(client.read(&image, 4 * MIB - 10, 100).await.unwrap(), [0; 10]);
    assert!(client.read(&image, 5 * MIB, 100).await.unwrap().is_empty());

    let other = format!("{}-other", lab.name);
    client.rename(&image, &other).await.unwrap();
    assert_eq!(client.rename(&image, &other).await.unwrap_err().kind(), ErrorKind::NotFound);
    client.create_like(&source, "s", &image, Features::PUBLISHED).await.unwrap();
    assert_eq!(client.rename(&image, &other).await.unwrap_err().kind(), ErrorKind::Exists);
    let mut names = client.images("images", &lab.name, None, 10).await.unwrap().entries;
    names.sort();
    assert_eq!(names, [format!("{}-image", lab.name), other.clone()]);

    // An image with protected snapshots of its own.
    client.create_snapshot(&image, "snap").await.unwrap();
    client.protect_snapshot(&image, "snap").await.unwrap();
    for image in [image, ImageSpec::named("images", other)] {
        assert_eq!(client.remove_image(&image).await.unwrap(), Changed::Yes);
        assert_eq!(client.remove_image(&image).await.unwrap(), Changed::No);
    }
    for expected in [Changed::Yes, Changed::No] {
        assert_eq!(client.remove_snapshot(&source, "s").await.unwrap(), expected);
    }
    assert_eq!(client.remove_image(&source).await.unwrap(), Changed::Yes);
    assert_eq!(client.remove_snapshot(&source, "s").await.unwrap(), Changed::No);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_removal_that_broke_off_is_finished() {
    let lab = Lab::new();
    lab.python(
        "create('images', NAME + '-image', 4 * M)
rbd.RBD().trash_move(io('images'), NAME + '-image')
# As librbd marks an image that it is removing: the second byte after the header of the entry is the source.
entry = [e for e in rbd.RBD().trash_list(io('images')) if e['name'] == NAME + '-image'][0]
with rados.ReadOpCtx() as op:
    keys, _ = io('images').get_omap_vals_by_keys(op, ('id_' + entry['id'],))
    i = io('images'); i.operate_read_op(op, 'rbd_trash'); value = bytearray(dict(keys)['id_' + entry['id']])
value[6] = 3
with rados.WriteOpCtx() as op:
    i.set_omap(op, ('id_' + entry['id'],), (bytes(value),)); i.operate_write_op(op, 'rbd_trash')",
    );
    let client = lab.client().await;
    assert_eq!(client.remove_image(&lab.image()).await.unwrap(), Changed::Yes);
    assert_eq!(client.remove_image(&lab.image()).await.unwrap(), Changed::No);
}

/// A setting of a pool, for as long as it lives.
struct PoolSetting<'a>(&'a Lab, &'static str, &'static str);

impl<'a> PoolSetting<'a> {
    fn new(lab: &'a Lab, pool: &'static str, key: &'static str, value: &str) -> Self {
        lab.command("rbd", &["config", "pool", "set", pool, key, value]);
        Self(lab, pool, key)
    }
}

impl Drop for PoolSetting<'_> {
    fn drop(&mut self) {
        self.0.command("rbd", &["config", "pool", "remove", self.1, self.2]);
    }
}

/// Ids and names of what lies in the trash of `vms`.
fn trashed(lab: &Lab) -> String {
    lab.command("rbd", &["trash", "ls", "--all", "vms"])
}

#[tokio::test(flavor = "multi_thread")]
async fn a_removal_is_final_where_the_pool_moves_to_the_trash() {
    let lab = Lab::new();
    let client = lab.client().await;
    lab.python("create('volumes', NAME + '-volume', 8 * M); write('volumes', NAME + '-volume', 0, 8 * M, 1)");
    let source = lab.volume();
    snapshotted(&client, &source).await;
    let copy = |n: &str| ImageSpec::named("vms", format!("{}-{n}", lab.name));
    let _setting = PoolSetting::new(&lab, "vms", "rbd_move_to_trash_on_remove", "true");
    let _deferred = PoolSetting::new(&lab, "vms", "rbd_move_to_trash_on_remove_expire_seconds", "3600");

    // a half copy, with and without its tag
    for tagged in [true, false] {
        client.clone_image(&source, "s", &copy("a"), Features::PUBLISHED).await.unwrap();
        if tagged {
            client.set_metadata(&copy("a"), OWNERSHIP_TAG, &format!("{}-a request", lab.name)).await.unwrap();
        }
        assert_eq!(client.remove_image(&copy("a")).await.unwrap(), Changed::Yes);
        assert_eq!(client.remove_image(&copy("a")).await.unwrap(), Changed::No);
        assert!(!trashed(&lab).contains(&lab.name), "{}", trashed(&lab));
    }

    // a removal that died between the move and the end is known by the tag; what another has put there is not ours
    client.clone_image(&source, "s", &copy("b"), Features::PUBLISHED).await.unwrap();
    client.set_metadata(&copy("b"), OWNERSHIP_TAG, &format!("{}-b", lab.name)).await.unwrap();
    client.create_like(&source, "s", &copy("c"), Features::PUBLISHED).await.unwrap();
    client.set_metadata(&copy("c"), OWNERSHIP_TAG, "inherited").await.unwrap();
    lab.python("rbd.RBD().remove(io('vms'), NAME + '-b'); rbd.RBD().remove(io('vms'), NAME + '-c')");
    assert!(trashed(&lab).contains(&format!("{}-b", lab.name)), "the pool's setting holds");
    assert_eq!(client.remove_image(&copy("b")).await.unwrap(), Changed::Yes);
    assert_eq!(client.remove_image(&copy("c")).await.unwrap(), Changed::No);
    let left = trashed(&lab);
    assert!(!left.contains(&format!("{}-b", lab.name)) && left.contains(&format!("{}-c", lab.name)), "{left}");

    // the check of the pool's capabilities leaves nothing either
    assert!(matches!(client.probe_pool("vms", None).await.unwrap(), Probed::All { .. }));
    assert!(!trashed(&lab).contains("rbd-offload.check"), "{}", trashed(&lab));
    assert_eq!(client.remove_snapshot(&source, "s").await.unwrap(), Changed::Yes);
    lab.python(
        "for e in rbd.RBD().trash_list(io('vms')):
    if NAME in e['name']: rbd.RBD().trash_remove(io('vms'), e['id'], True)",
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_has_no_metadata_but_the_tag() {
    let lab = Lab::new();
    let client = lab.client().await;
    lab.python(
        "create('volumes', NAME + '-volume', 8 * M); write('volumes', NAME + '-volume', 0, 8 * M, 1)
with rbd.Image(io('volumes'), NAME + '-volume') as image:
    image.metadata_set('conf_rbd_qos_bps_limit', '20971520')
    image.metadata_set('rbd_offload.job', 'of another image')
    for n in range(200): image.metadata_set('key%d' % n, 'x' * 100)",
    );
    let source = lab.volume();
    snapshotted(&client, &source).await;
    for method in [transfer::Method::ServerCopy, transfer::Method::Clone, transfer::Method::Copy] {
        let order = transfer::TransferRequest {
            source: source.clone(),
            snapshot: "s".into(),
            anchor: None,
            destination: lab.image(),
            tag: lab.name.clone(),
            limits: no_limits(),
        };
        let (progress, never) = (Progress::default(), CancellationToken::new());
        method.transfer().run(&client, &order, &progress, &never).await.unwrap();
        let metadata = lab.command("rbd", &["image-meta", "list", "--format", "json", &lab.image().to_string()]);
        assert_eq!(metadata.trim(), format!("{{\"{OWNERSHIP_TAG}\":\"{}\"}}", lab.name), "{method}");
        assert_eq!(client.remove_image(&lab.image()).await.unwrap(), Changed::Yes);
    }
    assert_eq!(client.remove_snapshot(&source, "s").await.unwrap(), Changed::Yes);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rename_that_died_half_way_is_finished() {
    let lab = Lab::new();
    let client = lab.client().await;
    let name = |n: &str| format!("{}-{n}", lab.name);
    let copy_object = |from: &str, to: &str| {
        lab.command("rados", &["-p", "images", "cp", &format!("rbd_id.{from}"), &format!("rbd_id.{to}")]);
    };
    let objects = || lab.command("rados", &["-p", "images", "ls"]);
    let listed = || lab.command("rbd", &["ls", "images"]);

    // only the new name's object was written, or the directory too
    for directory_too in [false, true] {
        let own = OwnershipTag::new(Uuid::new_v4(), Uuid::new_v4(), Uuid::new_v4());
        let (private, id) = (name("private"), own.image_id.to_string());
        let copy = ImageSpec::named("images", &private);
        lab.python("create('images', NAME + '-private', M)");
        client.set_metadata(&copy, OWNERSHIP_TAG, &own.to_string()).await.unwrap();
        if directory_too {
            client.rename(&copy, &id).await.unwrap();
            copy_object(&id, &private);
        } else {
            copy_object(&private, &id);
        }
        assert_eq!(publish::rename_to_final(&client, &copy, &own).await.unwrap(), RenameOutcome::Renamed);
        assert!(listed().lines().any(|line| line == id) && !listed().contains(&private), "{}", listed());
        assert!(!objects().contains(&format!("rbd_id.{private}")), "the old name is gone");
        assert_eq!(
            publish::rename_to_final(&client, &copy, &own).await.unwrap(),
            RenameOutcome::Renamed,
            "done before"
        );
        assert_eq!(client.remove_image(&ImageSpec::named("images", &id)).await.unwrap(), Changed::Yes);
        assert!(!objects().contains(&id), "nothing is left");
    }

    // a second name goes alone, and the image under its first
    lab.python("create('images', NAME + '-a', M)");
    let (first, second) = (ImageSpec::named("images", name("a")), ImageSpec::named("images", name("b")));
    copy_object(&name("a"), &name("b"));
    assert_eq!(client.remove_image(&second).await.unwrap(), Changed::Yes);
    assert_eq!(client.remove_image(&second).await.unwrap(), Changed::No);
    assert!(client.image(&first, None).await.unwrap().is_some());

    // another writer's image is never taken for ours, not even with our tag
    let own = OwnershipTag::new(Uuid::new_v4(), Uuid::new_v4(), Uuid::new_v4());
    let second = ImageSpec::named("images", own.image_id.to_string());
    lab.python(&format!("create('images', '{}', M)", own.image_id));
    client.set_metadata(&second, OWNERSHIP_TAG, &own.to_string()).await.unwrap();
    assert_eq!(publish::rename_to_final(&client, &first, &own).await.unwrap(), RenameOutcome::Taken);
    assert!(client.image(&first, None).await.unwrap().is_some());
    for image in [&first, &second] {
        assert_eq!(client.remove_image(image).await.unwrap(), Changed::Yes);
    }
    assert!(!objects().contains(&lab.name), "nothing is left");
}

/// What Cinder does to a snapshot that it deletes, and to the volume behind it: flattens the clones, removes the
/// snapshot, overwrites and removes the image.
const DELETE_SOURCE: &str = "
v = NAME + '-volume'
with rbd.Image(io('volumes'), v, 's') as image: children = list(image.list_children())
for pool, child in children:
    with rbd.Image(io(pool), child) as image: image.flatten()
with rbd.Image(io('volumes'), v) as image:
    image.unprotect_snap('s'); image.remove_snap('s')
    for at in range(0, image.size(), M): image.write(bytes([255]) * M, at)
rbd.RBD().remove(io('volumes'), v)";

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_is_deleted_during_a_flatten_through_an_anchor_is_copied_whole() {
    let lab = Lab::new();
    let client = lab.client().await;
    // many small objects, half of them in a parent: a flatten takes a while
    lab.python(
        "create('volumes2', NAME + '-base', 96 * M, order=16); write('volumes2', NAME + '-base', 0, 96 * M, 1)
snap('volumes2', NAME + '-base', 'b')
clone('volumes2', NAME + '-base', 'b', 'volumes', NAME + '-volume', order=16)
write('volumes', NAME + '-volume', 8 * M, 40 * M, 2); discard('volumes', NAME + '-volume', 60 * M, 4 * M)
with rbd.Image(io('volumes'), NAME + '-volume') as image: image.metadata_set('conf_rbd_qos_bps_limit', '20971520')",
    );
    let (source, image) = (lab.volume(), lab.image());
    snapshotted(&client, &source).await;
    let expected = lab.data(&source, Some("s"));
    let anchor = ImageSpec::named("volumes", format!("{}-anchor", lab.name));
    let tag = [(OWNERSHIP_TAG.to_owned(), format!("{}-anchor", lab.name))];
    client.make_anchor(&source, "s", &anchor, "a", &tag).await.unwrap();

    let info = client.image(&anchor, None).await.unwrap().unwrap();
    assert!(!info.features.has(Features::OBJECT_MAP) && !info.features.has(Features::FAST_DIFF), "{info:?}");
    assert!(info.features.has(Features::DEEP_FLATTEN) && info.snapshots.iter().any(|s| s.name == "a" && s.protected));
    let metadata = lab.command("rbd", &["image-meta", "list", "--format", "json", &anchor.to_string()]);
    assert!(metadata.contains(OWNERSHIP_TAG) && !metadata.contains("qos"), "{metadata}");
    assert_eq!(client.chain(&anchor, "a").await.unwrap().len(), 2);
    assert!(lab.data(&anchor, Some("a")) == expected);

    client.clone_image(&anchor, "a", &image, Features::PUBLISHED).await.unwrap();
    let (progress, never) = (Progress::default(), CancellationToken::new());
    let deletion = async {
        let until = Instant::now() + Duration::from_secs(60);
        while progress.done() * 20 < progress.total().max(1) && Instant::now() < until {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let before = progress.done();
        tokio::task::block_in_place(|| lab.python(DELETE_SOURCE));
        eprintln!("deleted while {before} to {} of {} bytes were copied", progress.done(), progress.total());
    };
    let unlimited = no_limits();
    let (flattened, ()) = tokio::join!(client.flatten(&image, &unlimited, &progress, &never), deletion);
    flattened.unwrap();
    assert_eq!(client.chain(&anchor, "a").await.unwrap(), []);
    assert!(lab.data(&image, None) == expected, "the copy");
    assert!(lab.data(&anchor, Some("a")) == expected, "the anchor");
    for image in [&image, &anchor] {
        assert_eq!(client.remove_image(image).await.unwrap(), Changed::Yes);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_is_deleted_is_copied_from_its_anchor() {
    let lab = Lab::new();
    let client = lab.client().await;
    lab.python(
        "create('volumes2', NAME + '-base', 40 * M); write('volumes2', NAME + '-base', 0, 24 * M, 1)
snap('volumes2', NAME + '-base', 'b'); clone('volumes2', NAME + '-base', 'b', 'volumes', NAME + '-volume')
write('volumes', NAME + '-volume', 8 * M, 4 * M, 2); discard('volumes', NAME + '-volume', 16 * M, 4 * M)",
    );
    let (source, image) = (lab.volume(), lab.image());
    snapshotted(&client, &source).await;
    let expected = lab.data(&source, Some("s"));
    let anchor = ImageSpec::named("volumes", format!("{}-anchor", lab.name));
    client.make_anchor(&source, "s", &anchor, "a", &[]).await.unwrap();
    let (progress, never) = (Progress::default(), CancellationToken::new());
    // from the source while the anchor hangs on it, from the anchor itself once Cinder has flattened it
    for flattened in [false, true] {
        if flattened {
            lab.python(DELETE_SOURCE);
        }
        let (from, snapshot) = if flattened { (&anchor, "a") } else { (&source, "s") };
        client.create_like(from, snapshot, &image, Features::WITHOUT_MAPS).await.unwrap();
        let filled = client.server_copy(from, snapshot, &image, &no_limits(), &progress, &never).await.unwrap();
        eprintln!("{filled:?}");
        assert!(filled.objects >= 5 && filled.through_host == 0, "{filled:?}");
        assert!(lab.data(&image, None) == expected, "flattened: {flattened}");
        assert_eq!(client.remove_image(&image).await.unwrap(), Changed::Yes);
    }
    assert_eq!(client.remove_image(&anchor).await.unwrap(), Changed::Yes);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_another_needs_is_not_purged_from_the_trash() {
    let lab = Lab::new();
    let client = lab.client().await;
    let id_of = |spec: ImageSpec| {
        let client = &client;
        async move { ImageSpec::with_id("volumes", client.image(&spec, None).await.unwrap().unwrap().id) }
    };
    lab.python("create('volumes', NAME + '-volume', M); snap('volumes', NAME + '-volume', 'other')");
    let volume = id_of(lab.volume()).await;
    assert!(!client.in_trash(&volume).await.unwrap());
    assert_eq!(client.purge(&volume).await.unwrap(), Changed::No, "it is in use");
    lab.python("trash('volumes', NAME + '-volume')");
    assert!(client.in_trash(&volume).await.unwrap());
    assert_eq!(client.purge(&volume).await.unwrap(), Changed::No, "it has a snapshot");
    assert_eq!(client.remove_snapshot(&volume, "other").await.unwrap(), Changed::Yes);
    assert_eq!(client.purge(&volume).await.unwrap(), Changed::Yes);
    assert!(!client.in_trash(&volume).await.unwrap());

    lab.python("create('volumes', NAME + '-later', M)");
    let later = id_of(ImageSpec::named("volumes", format!("{}-later", lab.name))).await;
    lab.python("rbd.RBD().trash_move(io('volumes'), NAME + '-later', 3600)");
    assert_eq!(client.purge(&later).await.unwrap(), Changed::No, "Cinder deferred it");
    assert!(client.in_trash(&later).await.unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn only_what_has_the_published_shape_is_sealed() {
    let lab = Lab::new();
    let client = lab.client().await;
    lab.python("create('volumes', NAME + '-volume', 8 * M); write('volumes', NAME + '-volume', 0, 8 * M, 1)");
    let (source, image) = (lab.volume(), lab.image());
    snapshotted(&client, &source).await;
    let (progress, never) = (Progress::default(), CancellationToken::new());

    // a parent cannot be repaired
    client.clone_image(&source, "s", &image, Features::PUBLISHED).await.unwrap();
    let fault = publish::create_snap(&client, &image, &progress, &never).await.unwrap().unwrap();
    assert!(fault.contains("parent"), "{fault}");
    assert_eq!(client.image(&image, None).await.unwrap().unwrap().snapshots, [], "it got no snapshot");

    // maps can: those that are off, and one that was never rebuilt
    client.flatten(&image, &no_limits(), &progress, &never).await.unwrap();
    let features = |what: &[&str]| {
        lab.command("rbd", &[&["feature", what[0], &image.to_string()], &what[1..]].concat());
    };
    features(&["disable", "object-map", "fast-diff"]);
    assert_eq!(publish::create_snap(&client, &image, &progress, &never).await.unwrap(), None);
    is_sealed(&lab, &client, &image).await;
    features(&["disable", "object-map", "fast-diff"]);
    features(&["enable", "object-map", "fast-diff"]);
    assert_ne!(client.image(&image, None).await.unwrap().unwrap().flags, 0, "the map is invalid");
    assert_eq!(publish::create_snap(&client, &image, &progress, &never).await.unwrap(), None);
    is_sealed(&lab, &client, &image).await;

    // a feature that no published image has is disabled
    features(&["enable", "journaling"]);
    assert_eq!(publish::create_snap(&client, &image, &progress, &never).await.unwrap(), None);
    is_sealed(&lab, &client, &image).await;
    assert_eq!(client.remove_image(&image).await.unwrap(), Changed::Yes);
}

async fn is_sealed(lab: &Lab, client: &Client, image: &ImageSpec) {
    for snapshot in [None, Some("snap")] {
        let info = client.image(image, snapshot).await.unwrap().unwrap();
        assert_eq!((info.features, info.flags, &info.parent), (Features::PUBLISHED, 0, &None), "{snapshot:?}");
        assert!(info.snapshots.iter().any(|s| s.name == "snap" && s.protected));
        let name = format!("{image}{}", snapshot.map_or(String::new(), |s| format!("@{s}")));
        lab.command("rbd", &["object-map", "check", &name]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_whose_removal_broke_off_is_found_and_removed() {
    let lab = Lab::new();
    // The first step of a removal by librbd: the snapshot is in the trash under another name.
    lab.python(
        "create('volumes', NAME, M)
with rbd.Image(io('volumes'), NAME) as image:
    image.create_snap(NAME + '-s'); image.create_snap('other')
    id, snap = image.id(), image.snap_get_id(NAME + '-s')
io('volumes').execute('rbd_header.' + id, 'rbd', 'snapshot_trash_add', snap.to_bytes(8, 'little'))",
    );
    let names = || lab.python("print(sorted(s['name'] for s in rbd.Image(io('volumes'), NAME).list_snaps()), end='')");
    let client = lab.client().await;
    let image = ImageSpec::named("volumes", &lab.name);
    let snapshot = format!("{}-s", lab.name);
    let found = client.snapshots("volumes", &snapshot, 0, None, usize::MAX).await.unwrap().found;
    assert_eq!(found, [(image.clone(), snapshot.clone())]);
    assert_eq!(client.remove_snapshot(&image, &snapshot).await.unwrap(), Changed::Yes);
    assert_eq!(names(), b"['other']");
    assert_eq!(client.remove_snapshot(&image, &snapshot).await.unwrap(), Changed::No);
}

#[tokio::test(flavor = "multi_thread")]
async fn snapshots_are_found_by_their_prefix() {
    let lab = Lab::new();
    lab.python(
        "for n in 'abc':
    create('vms', NAME + '-' + n, M)
    with rbd.Image(io('vms'), NAME + '-' + n) as image:
        image.create_snap('other'); image.create_snap(NAME + '-s'); image.create_snap('x' + NAME)
trash('vms', NAME + '-c')",
    );
    let client = lab.client().await;
    let trashed =
        lab.python("print([e['id'] for e in rbd.RBD().trash_list(io('vms')) if e['name'] == NAME + '-c'][0], end='')");
    let snapshot = format!("{}-s", lab.name);
    let mut expected = vec![
        (ImageSpec::named("vms", format!("{}-a", lab.name)), snapshot.clone()),
        (ImageSpec::named("vms", format!("{}-b", lab.name)), snapshot.clone()),
        (ImageSpec::with_id("vms", String::from_utf8(trashed).unwrap()), snapshot),
    ];
    let mut found = client.snapshots("vms", &lab.name, 0, None, usize::MAX).await.unwrap().found;
    let key = |(image, _): &(ImageSpec, String)| image.to_string();
    found.sort_by_key(key);
    expected.sort_by_key(key);
    assert_eq!(found, expected);
    let began = Instant::now();
    client.snapshots("vms", &lab.name, 2, None, usize::MAX).await.unwrap();
    assert!(began.elapsed() > Duration::from_millis(900), "three headers, two a second");
}

#[tokio::test(flavor = "multi_thread")]
async fn lists_go_on_where_the_page_before_ended() {
    let lab = Lab::new();
    lab.python(
        "for n in 'abcde':
    create('vms', NAME + '-' + n, M)
    with rbd.Image(io('vms'), NAME + '-' + n) as image: image.create_snap(NAME + '-s')
for n in 'de': trash('vms', NAME + '-' + n)",
    );
    let client = lab.client().await;
    let (mut names, mut after) = (Vec::new(), None);
    loop {
        let page = client.images("vms", &lab.name, after.as_deref(), 2).await.unwrap();
        assert!(page.entries.len() <= 2, "{page:?}");
        names.extend(page.entries);
        after = page.next;
        if after.is_none() {
            break;
        }
    }
    assert_eq!(names, ["a", "b", "c"].map(|n| format!("{}-{n}", lab.name)));
    let mut trashed = Vec::new();
    loop {
        let page = client.trash("vms", after.as_deref(), 1).await.unwrap();
        assert!(page.entries.len() <= 1, "{page:?}");
        trashed.extend(page.entries.into_iter().filter(|trashed| trashed.name.starts_with(&lab.name)));
        after = page.next;
        if after.is_none() {
            break;
        }
    }
    for image in &trashed {
        let found = client.trashed(&ImageSpec::with_id("vms", image.id.as_str())).await.unwrap();
        assert_eq!(found.as_ref(), Some(image));
    }
    let mut names: Vec<String> = trashed.into_iter().map(|trashed| trashed.name).collect();
    names.sort();
    assert_eq!(names, ["d", "e"].map(|n| format!("{}-{n}", lab.name)));
    let mut found = Vec::new();
    loop {
        let page = client.snapshots("vms", &lab.name, 0, after.as_deref(), 2).await.unwrap();
        assert!(page.looked_at <= 2, "{page:?}");
        found.extend(page.found);
        after = page.next;
        if after.is_none() {
            break;
        }
    }
    assert_eq!(found.len(), 5, "{found:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_version_of_an_object_changes_with_its_keys_and_stays_when_they_are_read() {
    let lab = Lab::new();
    let objects = lab.client().await.objects("images", &lab.name).unwrap();
    let version = async || objects.read("index").await.unwrap().map(|(_, version)| version);
    assert_eq!(version().await, None);
    let mut seen = Vec::new();
    for value in ["1", "1", "2"] {
        objects.set_omap("index", &[("key".into(), value.into())]).await.unwrap();
        seen.push(version().await);
        objects.omap("index", "", 10).await.unwrap();
        assert_eq!(version().await, seen.last().copied().flatten());
    }
    objects.remove_omap("index", &["key".into()]).await.unwrap();
    seen.push(version().await);
    assert!(seen.windows(2).all(|pair| pair[0].is_some() && pair[0] != pair[1]), "{seen:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn headers_tell_the_tags_of_snapshots_that_are_gone_and_the_owners_of_images() {
    let lab = Lab::new();
    lab.python("for n in 'abc': create('vms', NAME + '-' + n, M)");
    let client = lab.client().await;
    let [plain, tagged, trashed] = ["a", "b", "c"].map(|n| ImageSpec::named("vms", format!("{}-{n}", lab.name)));
    // other metadata, before the owner's key and behind it
    for number in 0..4 {
        client.set_metadata(&plain, &format!("a{number}"), "x").await.unwrap();
        client.set_metadata(&tagged, &format!("z{number}"), "x").await.unwrap();
    }
    let snapshot = format!("{}-s", lab.name);
    for image in [&tagged, &trashed] {
        client.set_metadata(image, OWNERSHIP_TAG, &format!("owner of {image}")).await.unwrap();
        client.set_snapshot_tag(image, &snapshot, "tag").await.unwrap();
    }
    // one that is there is told of once
    client.create_snapshot(&tagged, &snapshot).await.unwrap();
    let id = client.image(&trashed, None).await.unwrap().unwrap().id;
    lab.python("trash('vms', NAME + '-c')");
    let in_trash = client.trash("vms", None, usize::MAX).await.unwrap().entries;
    let name = in_trash.iter().find(|trashed| trashed.id == id).map(|trashed| trashed.name.clone());
    assert_eq!(name, Some(format!("{}-c", lab.name)));

    let by_id = ImageSpec::with_id("vms", id);
    let page = client.snapshots("vms", &lab.name, 0, None, usize::MAX).await.unwrap();
    let mine = |found: Vec<(ImageSpec, String)>| {
        let mine = found.into_iter().filter(|(image, _)| [&plain, &tagged, &by_id].contains(&image));
        let mut mine: Vec<_> = mine.map(|(image, text)| (image.to_string(), text)).collect();
        mine.sort();
        mine
    };
    let both = |text: &dyn Fn(&ImageSpec) -> String| {
        let mut both = vec![(by_id.to_string(), text(&trashed)), (tagged.to_string(), text(&tagged))];
        both.sort();
        both
    };
    assert_eq!(mine(page.found), both(&|_| snapshot.clone()));
    assert_eq!(mine(page.owned), both(&|image| format!("owner of {image}")));
    assert_eq!(page.failed.len(), 0);

    assert_eq!(client.remove_snapshot_tag(&by_id, &snapshot).await.unwrap(), Changed::Yes);
    let page = client.snapshots("vms", &lab.name, 0, None, usize::MAX).await.unwrap();
    assert_eq!(mine(page.found), [(tagged.to_string(), snapshot.clone())]);
    assert_eq!(client.remove_image(&by_id).await.unwrap(), Changed::Yes);
    assert!(!client.in_trash(&by_id).await.unwrap());
}

fn key(cookie: &str) -> LockKey {
    LockKey { name: "rbd_offload.lease".into(), cookie: cookie.into() }
}

#[tokio::test(flavor = "multi_thread")]
async fn objects_are_written_only_at_the_version_that_was_read() {
    let lab = Lab::new();
    let client = lab.client().await;
    let objects = client.objects("images", &lab.name).unwrap();
    assert_eq!(objects.read("job.1").await.unwrap(), None);
    let gone = objects.replace("job.1", b"x", Version(1), None).await.unwrap_err();
    assert_eq!(gone.kind(), ErrorKind::NotFound, "{gone}");
    let first = objects.create("job.1", b"one").await.unwrap();
    assert_eq!(objects.create("job.1", b"two").await.unwrap_err().kind(), ErrorKind::Exists);
    assert_eq!(objects.read("job.1").await.unwrap(), Some((b"one".to_vec(), first)));
    let second = objects.replace("job.1", b"three", first, None).await.unwrap();
    assert!(second > first);
    assert_eq!(objects.read("job.1").await.unwrap(), Some((b"three".to_vec(), second)));
    for wrong in [first, Version(second.0 + 5)] {
        let conflict = objects.replace("job.1", b"four", wrong, None).await.unwrap_err();
        assert_eq!(conflict.kind(), ErrorKind::Conflict, "{conflict}");
        assert_eq!(objects.remove("job.1", wrong, None).await.unwrap_err().kind(), ErrorKind::Conflict);
    }
    assert_eq!(objects.list().await.unwrap(), ["job.1"]);
    assert_eq!(client.objects("images", "").unwrap().list().await.unwrap().iter().find(|o| *o == "job.1"), None);
    objects.remove("job.1", second, None).await.unwrap();
    assert_eq!(objects.read("job.1").await.unwrap(), None);
    assert_eq!(objects.remove("job.1", second, None).await.unwrap_err().kind(), ErrorKind::NotFound);

    let large = objects.create("large", &vec![7; 1 << 20]).await.unwrap();
    assert_eq!(objects.read("large").await.unwrap().unwrap().0.len(), 1 << 20);
    let large = objects.replace("large", &vec![7; (1 << 20) + 1], large, None).await.unwrap();
    assert!(objects.read("large").await.is_err());
    objects.remove("large", large, None).await.unwrap();
    assert!(objects.list().await.unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lock_belongs_to_one_and_runs_out() {
    let lab = Lab::new();
    let (one, two) = (lab.client().await, lab.client().await);
    let (one, two) = (one.objects("images", &lab.name).unwrap(), two.objects("images", &lab.name).unwrap());
    let minute = Duration::from_secs(60);
    assert_eq!(one.lock("job", &key("a"), "", minute).await.unwrap(), Locked::NoObject);
    assert_eq!(one.read("job").await.unwrap(), None, "locking creates nothing");
    assert_eq!(one.renew("job", &key("a"), "", minute).await.unwrap_err().kind(), ErrorKind::NotLocked);
    assert_eq!(one.unlock("job", &key("a")).await.unwrap(), Changed::No);
    assert!(!one.is_locked("job", "rbd_offload.lease").await.unwrap());

    let version = one.create("job", b"1").await.unwrap();
    let refused = one.replace("job", b"2", version, Some(&key("a"))).await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::NotLocked, "never locked: {refused}");
    assert_eq!(one.renew("job", &key("a"), "", minute).await.unwrap_err().kind(), ErrorKind::NotLocked);
    assert_eq!(one.lock("job", &key("a"), "host one", minute).await.unwrap(), Locked::Acquired);
    assert_eq!(one.lock("job", &key("a"), "host one", minute).await.unwrap(), Locked::Acquired, "again is a renewal");
    assert_eq!(two.lock("job", &key("a"), "host two", minute).await.unwrap(), Locked::Held, "another client");
    assert_eq!(one.lock("job", &key("b"), "host one", minute).await.unwrap(), Locked::Held, "another cookie");
    assert!(two.is_locked("job", "rbd_offload.lease").await.unwrap());
    assert!(!two.is_locked("job", "another").await.unwrap());
    let stale = one.replace("job", b"2", version, Some(&key("a"))).await.unwrap_err();
    assert_eq!(stale.kind(), ErrorKind::Conflict, "taking the lock raised the version: {stale}");
    let version = one.read("job").await.unwrap().unwrap().1;
    one.renew("job", &key("a"), "host one", Duration::from_millis(2500)).await.unwrap();
    let version_renewed = one.read("job").await.unwrap().unwrap().1;
    assert!(version_renewed > version, "so does renewing it");
    assert_eq!(
        two.replace("job", b"3", version_renewed, Some(&key("a"))).await.unwrap_err().kind(),
        ErrorKind::NotLocked
    );
    assert_eq!(two.renew("job", &key("a"), "", minute).await.unwrap_err().kind(), ErrorKind::NotLocked);
    assert_eq!(two.unlock("job", &key("a")).await.unwrap(), Changed::No);
    let version = one.replace("job", b"2", version_renewed, Some(&key("a"))).await.unwrap();

    tokio::time::sleep(Duration::from_secs(3)).await;
    assert!(!two.is_locked("job", "rbd_offload.lease").await.unwrap(), "its time ran out");
    let late = one.replace("job", b"3", version, Some(&key("a"))).await.unwrap_err();
    assert_eq!(late.kind(), ErrorKind::NotLocked, "{late}");
    assert_eq!(one.renew("job", &key("a"), "", minute).await.unwrap_err().kind(), ErrorKind::NotLocked);
    assert_eq!(two.lock("job", &key("c"), "host two", minute).await.unwrap(), Locked::Acquired);
    let version = two.read("job").await.unwrap().unwrap().1;
    assert_eq!(one.remove("job", version, Some(&key("a"))).await.unwrap_err().kind(), ErrorKind::NotLocked);
    assert_eq!(two.unlock("job", &key("c")).await.unwrap(), Changed::Yes);
    assert_eq!(two.unlock("job", &key("c")).await.unwrap(), Changed::No);
    let version = two.read("job").await.unwrap().unwrap().1;
    two.remove("job", version, None).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn one_daemon_at_a_time_replaces_the_queue() {
    let lab = Lab::new();
    let (one, two) = (lab.client().await, lab.client().await);
    let [one, two] =
        [one, two].map(|client| RememberedBindings::new(Arc::new(client.objects("images", &lab.name).unwrap())));
    let minute = Duration::from_secs(60);
    assert!(!one.lock("a", minute).await.unwrap(), "a queue of which no binding is remembered is not replaced");
    let [vhost, queue, exchange, routing_key] = ["/", "rbd-offload", "nova", "notifications.info"].map(str::to_owned);
    let binding = Binding { vhost, queue, exchange, routing_key };
    one.add(std::slice::from_ref(&binding)).await.unwrap();
    assert!(one.lock("a", minute).await.unwrap());
    assert!(!two.lock("b", minute).await.unwrap());
    two.unlock("b").await.unwrap();
    assert!(!two.lock("b", minute).await.unwrap(), "it is the other one's");
    one.unlock("a").await.unwrap();
    assert!(two.lock("b", Duration::from_secs(2)).await.unwrap());
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert!(one.lock("a", minute).await.unwrap(), "the other one's time ran out");
    assert_eq!(one.all().await.unwrap(), [binding].into());
    one.unlock("a").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_of_an_object_change_together_with_its_version() {
    let lab = Lab::new();
    let objects = lab.client().await.objects("images", &lab.name).unwrap();
    let minute = Duration::from_secs(60);
    let entry = |key: &str, value: &str| (key.to_owned(), value.as_bytes().to_vec());
    assert_eq!(objects.read_with_keys("job").await.unwrap(), None);
    let gone = objects.change_keys("job", &[entry("a", "1")], &[], Version(1)).await.unwrap_err();
    assert_eq!(gone.kind(), ErrorKind::NotFound, "it is never created: {gone}");

    let created = objects.create("job", b"one").await.unwrap();
    let read = objects.read_with_keys("job").await.unwrap().unwrap();
    assert_eq!((&read.data[..], read.keys.len(), read.version), (&b"one"[..], 0, created));
    let set = objects.change_keys("job", &[entry("a", "1"), entry("b", "")], &[], created).await.unwrap();
    let late = objects.change_keys("job", &[entry("c", "1")], &[], created).await.unwrap_err();
    assert_eq!(late.kind(), ErrorKind::Conflict, "{late}");
    let read = objects.read_with_keys("job").await.unwrap().unwrap();
    assert_eq!((read.keys, read.version), (vec![entry("a", "1"), entry("b", "")], set));

    // a write that does not know of the keys is refused, and so is the removal of the object
    let refused = objects.replace_and_remove_keys("job", b"two", created, None, &["a".into()]).await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Conflict, "{refused}");
    assert_eq!(objects.remove("job", created, None).await.unwrap_err().kind(), ErrorKind::Conflict);
    let unlocked = objects.replace_and_remove_keys("job", b"two", set, Some(&key("a")), &["a".into()]).await;
    assert_eq!(unlocked.unwrap_err().kind(), ErrorKind::NotLocked);
    assert_eq!(objects.read_with_keys("job").await.unwrap().unwrap().keys.len(), 2, "nothing was done");

    objects.lock("job", &key("a"), "", minute).await.unwrap();
    let locked = objects.read_with_keys("job").await.unwrap().unwrap().version;
    let removed = ["a".to_owned(), "none".to_owned()];
    let version = objects.replace_and_remove_keys("job", b"two", locked, Some(&key("a")), &removed).await.unwrap();
    let read = objects.read_with_keys("job").await.unwrap().unwrap();
    assert_eq!((&read.data[..], read.keys, read.version), (&b"two"[..], vec![entry("b", "")], version));
    let version = objects.change_keys("job", &[entry("c", "1")], &["b".into()], version).await.unwrap();
    assert_eq!(objects.read_with_keys("job").await.unwrap().unwrap().keys, [entry("c", "1")]);
    objects.remove("job", version, None).await.unwrap();
    assert_eq!(objects.read_with_keys("job").await.unwrap(), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_omap_is_read_in_pages() {
    let lab = Lab::new();
    let objects = lab.client().await.objects("images", &lab.name).unwrap();
    assert!(objects.omap("index", "", 10).await.unwrap().is_empty());
    let entries: Vec<_> = (0..2500).map(|n| (format!("k{n:04}"), format!("v{n}\0").into_bytes())).collect();
    objects.set_omap("index", &entries).await.unwrap();
    assert!(objects.omap("index", "", 10_000).await.unwrap() == entries);
    assert!(objects.omap("index", "k0009", 1500).await.unwrap() == entries[10..1510]);
    assert!(objects.omap("index", "k2499", 10).await.unwrap().is_empty());
    let keys: Vec<_> = entries.iter().map(|(key, _)| key.clone()).collect();
    objects.remove_omap("index", &keys[1..]).await.unwrap();
    objects.remove_omap("index", &keys[1..]).await.unwrap();
    objects.remove_omap("none", &keys).await.unwrap();
    assert!(objects.omap("index", "", 10).await.unwrap() == entries[..1]);
    assert_eq!(objects.list().await.unwrap(), ["index"]);
    let (_, version) = objects.read("index").await.unwrap().unwrap();
    objects.remove("index", version, None).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fenced_client_is_refused_until_it_reconnects() {
    let lab = Lab::new();
    lab.python("create('volumes', NAME + '-volume', 64 * M); write('volumes', NAME + '-volume', 0, 64 * M, 1)");
    let (one, two) = (lab.client().await, lab.client().await);
    let (source, image) = (lab.volume(), lab.image());
    two.create_snapshot(&source, "s").await.unwrap();
    two.create_like(&source, "s", &image, Features::PUBLISHED).await.unwrap();
    let address = two.address().await.unwrap();
    eprintln!("address: {address}");
    assert_ne!(address, one.address().await.unwrap());

    // It is fenced in the middle of a copy.
    let (progress, never) = (Progress::default(), CancellationToken::new());
    let slow = limits(8, 8 * MIB, 0);
    let fence = async {
        tokio::time::sleep(Duration::from_secs(2)).await;
        let began = Instant::now();
        assert_eq!(one.fence(&address).await.unwrap(), Changed::Yes);
        eprintln!("fenced in {:?}", began.elapsed());
        assert_eq!(one.fence(&address).await.unwrap(), Changed::No);
    };
    let (copied, ()) = tokio::join!(two.copy(&source, "s", &image, &slow, &progress, &never), fence);
    let refused = copied.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Fenced, "{refused}");
    assert!(two.is_fenced());
    let objects = two.objects("images", &lab.name).unwrap();
    for kind in [
        two.image(&source, None).await.unwrap_err().kind(),
        two.address().await.unwrap_err().kind(),
        objects.create("x", b"").await.unwrap_err().kind(),
    ] {
        assert_eq!(kind, ErrorKind::Fenced);
    }

    assert_eq!(two.reconnect().await.unwrap(), Changed::Yes);
    assert_eq!(two.reconnect().await.unwrap(), Changed::No);
    assert_ne!(two.address().await.unwrap(), address);
    let version = objects.create("x", b"").await.unwrap();
    objects.remove("x", version, None).await.unwrap();
    assert!(two.image(&source, None).await.unwrap().is_some());
    let began = Instant::now();
    while let Err(e) = one.remove_image(&image).await {
        assert_eq!(e.kind(), ErrorKind::Busy, "{e}");
        assert!(began.elapsed() < Duration::from_secs(60));
    }
    eprintln!("its image could be removed after {:?}", began.elapsed());

    let own = one.address().await.unwrap();
    assert_eq!(one.fence(&own).await.unwrap_err().kind(), ErrorKind::Unsupported);
    assert_eq!(one.fence("nonsense").await.unwrap_err().kind(), ErrorKind::Unsupported);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_kind_of_call_tells_a_fenced_client_so() {
    let lab = Lab::new();
    lab.python("create('volumes', NAME + '-volume', 4 * M); snap('volumes', NAME + '-volume', 's')");
    let one = lab.client().await;
    let (source, image) = (lab.volume(), lab.image());
    let mut fenced = Vec::new();
    for call in 0..7 {
        let two = lab.client().await;
        // A connection that has seen its pool: the first call then meets the OSD, not the monitor.
        two.image(&source, None).await.unwrap();
        one.fence(&two.address().await.unwrap()).await.unwrap();
        fenced.push((call, two));
    }
    // An OSD that `one` has not spoken to since learns of the new map a moment later.
    tokio::time::sleep(Duration::from_secs(5)).await;
    for (call, two) in fenced {
        let result = match call {
            0 => two.image(&source, Some("s")).await.map(drop),
            1 => two.create_snapshot(&source, "t").await.map(drop),
            2 => two.clone_image(&source, "s", &image, Features::PUBLISHED).await,
            3 => two.images("volumes", "", None, 1).await.map(drop),
            4 => two.rename(&source, "x").await,
            5 => two.remove_image(&source).await.map(drop),
            _ => two.objects("images", &lab.name).unwrap().create("x", b"").await.map(drop),
        };
        match result {
            Ok(()) => panic!("call {call} was let through"),
            Err(error) => assert_eq!(error.kind(), ErrorKind::Fenced, "call {call}: {error}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_tells_who_it_is() {
    let lab = Lab::new();
    let client = lab.client().await;
    let fsid = client.fsid().await.unwrap();
    assert_eq!(fsid, lab.command("ceph", &["fsid"]).trim());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_connection_says_what_to_fix() {
    let lab = Lab::new();
    let Err(e) = Client::connect(&lab.dir.join("none.conf"), "rbd-offload").await else { panic!() };
    assert_eq!(e.kind(), ErrorKind::NotFound);
    assert!(e.to_string().contains("none.conf"), "{e}");
    let Err(e) = Client::connect(&lab.conf(), "nobody").await else { panic!() };
    assert!(e.to_string().contains("client.nobody") && e.to_string().contains("keyring"), "{e}");

    let dir = tempfile::tempdir().unwrap();
    let elsewhere = Some(dir.path().join("elsewhere"));
    let options = ClientOptions { keyring: elsewhere, ..ClientOptions::new(lab.conf(), "rbd-offload") };
    let Err(e) = Client::open(options.clone()).await else { panic!() };
    let says = e.to_string();
    assert!(says.contains("no key for client.rbd-offload in ") && says.contains("/elsewhere: "), "{e}");
    std::fs::copy(lab.dir.join("ceph/client.rbd-offload.keyring"), dir.path().join("elsewhere")).unwrap();
    assert!(Client::open(options).await.is_ok());

    let conf = dir.path().join("ceph.conf");
    let text = std::fs::read_to_string(lab.conf()).unwrap();
    let keyring = dir.path().join("keyring");
    std::fs::write(&keyring, "[client.rbd-offload]\n\tkey = AQAAAAAAAAAAEAAAAAAAAAAAAAAAAAAAAAAAAA==\n").unwrap();
    std::fs::write(&conf, format!("{text}\n[client.rbd-offload]\nkeyring = {}\n", keyring.display())).unwrap();
    let Err(e) = Client::connect(&conf, "rbd-offload").await else { panic!() };
    assert_eq!(e.kind(), ErrorKind::PermissionDenied, "{e}");
    assert!(e.to_string().contains("ceph auth get client.rbd-offload"), "{e}");
    // of a type that librados knows since 19.2.6 and 20.2.4: an older one cannot read it, a newer one is refused
    let aes256k = "AgCJZYhqAAAAACAAAAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=";
    std::fs::write(&keyring, format!("[client.rbd-offload]\n\tkey = {aes256k}\n")).unwrap();
    let Err(e) = Client::connect(&conf, "rbd-offload").await else { panic!() };
    eprintln!("{e}");
    let says = e.to_string();
    assert!(says.contains(&keyring.display().to_string()), "{e}");
    assert!(
        (e.kind() == ErrorKind::Unsupported && says.contains("aes256k") && says.contains("install librados2"))
            || (e.kind() == ErrorKind::PermissionDenied && says.contains("the monitors refused")),
        "{:?}: {e}",
        e.kind()
    );
    std::fs::write(&conf, "[global\nnonsense").unwrap();
    let Err(e) = Client::connect(&conf, "rbd-offload").await else { panic!() };
    assert!(e.to_string().contains("ceph.conf"), "{e}");
}

#[tokio::test(flavor = "multi_thread")]
async fn images_of_a_killed_probe_are_removed_an_hour_later() {
    let lab = Lab::new();
    let client = lab.client().await;
    let now = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap().as_secs();
    let name = |seconds: u64| format!("rbd-offload.check-{seconds}-{}", Uuid::new_v4());
    let (old, young, foreign) = (name(now - 3700), name(now - 3500), format!("rbd-offload.check-{}", lab.name));
    // (another test probes pools beside this one, but not this pool)
    for image in [&old, &young, &foreign].map(|name| ImageSpec::named("vms", name)) {
        client.create_probe_image(&image, "check", 1 << 20, b"data".to_vec()).await.unwrap();
    }
    let clone = format!("{old}-renamed");
    let (parent, child) = (format!("vms/{old}@check"), format!("vms/{clone}"));
    lab.command("rbd", &["clone", "--rbd-default-clone-format", "1", &parent, &child]);
    assert!(matches!(client.probe_pool("vms", None).await.unwrap(), Probed::All { .. }));
    let left = client.images("vms", "rbd-offload.check-", None, 1000).await.unwrap().entries;
    for image in [&young, &foreign] {
        client.remove_image(&ImageSpec::named("vms", image)).await.unwrap();
    }
    assert!(!left.contains(&old) && !left.contains(&clone), "{left:?}");
    assert!(left.contains(&young) && left.contains(&foreign), "{left:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn missing_capabilities_are_found() {
    let lab = Lab::new();
    let client = lab.client().await;
    for pool in ["images", "volumes"] {
        assert!(matches!(client.probe_pool(pool, None).await.unwrap(), Probed::All { data_pool } if data_pool == pool));
    }
    assert!(client.images("volumes", "rbd-offload.check-", None, 1).await.unwrap().entries.is_empty());
    let lacks = async |client: &Client, pool: &str, data_pool| match client.probe_pool(pool, data_pool).await.unwrap() {
        Probed::Lacks(finding) => finding,
        all => panic!("{all:?}"),
    };
    let found = lacks(&client, "nothing", None).await;
    assert!(found.error.to_string().contains("nothing"), "{found:?}");
    let made = client.probe_pool("images", Some("ecdata")).await.unwrap();
    assert!(matches!(&made, Probed::All { data_pool } if data_pool == "ecdata"), "{made:?}");
    let client = Client::connect(&lab.conf(), "rbd-offload-nocaps").await.unwrap();
    for (pool, data_pool, lacking) in [("volumes", None, "volumes"), ("images", Some("ecdata"), "ecdata")] {
        let found = lacks(&client, pool, data_pool).await;
        assert_eq!(found.error.kind(), ErrorKind::PermissionDenied, "{found:?}");
        assert_eq!(found.pool, lacking, "{found:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fill_that_was_stopped_is_made_whole_by_the_next() {
    let lab = Lab::new();
    lab.python(
        "
v = NAME + '-volume'
create('images', NAME + '-a', 30 * M); write('images', NAME + '-a', 0, 30 * M, 1)
snap('images', NAME + '-a', 'x'); clone('images', NAME + '-a', 'x', 'volumes', v)
write('volumes', v, 9 * M, 2 * M, 2)",
    );
    let client = lab.client().await;
    let (source, image) = (lab.volume(), lab.image());
    let (progress, never) = (Progress::default(), CancellationToken::new());
    snapshotted(&client, &source).await;
    let expected = lab.data(&source, Some("s"));
    client.create_like(&source, "s", &image, Features::WITHOUT_MAPS).await.unwrap();

    let slow = limits(1, 0, 4);
    let cancel = CancellationToken::new();
    let stopper = async {
        tokio::time::sleep(Duration::from_secs(1)).await;
        cancel.cancel();
        Instant::now()
    };
    let (stopped, at) = tokio::join!(client.server_copy(&source, "s", &image, &slow, &progress, &cancel), stopper);
    assert_eq!(stopped.unwrap_err().kind(), ErrorKind::Cancelled);
    assert!(at.elapsed() < Duration::from_secs(5));
    assert!(progress.done() > 0 && progress.done() < progress.total());

    let moved = client.server_copy(&source, "s", &image, &no_limits(), &progress, &never).await.unwrap();
    assert_eq!((moved.objects, moved.through_host), (8, 0));
    client.remove_snapshot(&source, "s").await.unwrap();
    client.remove_image(&source).await.unwrap();
    assert!(lab.data(&image, None) == expected);
    lab.command("rbd", &["object-map", "check", &image.to_string()]);
    let info = client.image(&image, None).await.unwrap().unwrap();
    assert!(info.features.has(Features::PUBLISHED) && info.flags == 0, "{info:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn only_an_image_like_the_source_without_maps_or_parent_is_filled() {
    let lab = Lab::new();
    lab.python(
        "create('volumes', NAME + '-volume', 8 * M); write('volumes', NAME + '-volume', 0, 8 * M, 1)
create('images', NAME + '-small', 4 * M, features=61 - 24); create('images', NAME + '-maps', 8 * M)
create('images', NAME + '-order', 8 * M, features=61 - 24, order=20)",
    );
    let client = lab.client().await;
    let (source, clone) = (lab.volume(), ImageSpec::named("images", format!("{}-clone", lab.name)));
    snapshotted(&client, &source).await;
    client.clone_image(&source, "s", &clone, Features::WITHOUT_MAPS).await.unwrap();
    let (progress, never) = (Progress::default(), CancellationToken::new());
    for name in ["small", "maps", "order", "clone"] {
        let image = ImageSpec::named("images", format!("{}-{name}", lab.name));
        let refused = client.server_copy(&source, "s", &image, &no_limits(), &progress, &never).await.unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Unsupported, "{name}: {refused}");
    }
}

/// Clones of format 2 keep a removed snapshot of their parent aside until they are flattened.
#[tokio::test(flavor = "multi_thread")]
async fn clones_of_format_2_are_copied_exactly() {
    every_method_is_right(
        "
v = NAME + '-volume'
create('images', NAME + '-a', 24 * M); write('images', NAME + '-a', 0, 10 * M, 1)
with rbd.Image(io('images'), NAME + '-a') as image: image.create_snap('x')
cluster.conf_set('rbd_default_clone_format', '2')
clone('images', NAME + '-a', 'x', 'volumes', v)
with rbd.Image(io('images'), NAME + '-a') as image: image.remove_snap('x')
write('images', NAME + '-a', 0, 10 * M, 5)
write('volumes', v, 13 * M, 2 * M, 2); write('volumes', v, M, 10, 2)",
    )
    .await;
}

/// The first byte of a difference, if there is one.
async fn compared(client: &Client, source: &ImageSpec, image: &ImageSpec, extent: Compare) -> Option<u64> {
    client.compare(source, "s", image, extent, &Progress::default(), &CancellationToken::new()).await.unwrap()
}

async fn snapshotted(client: &Client, source: &ImageSpec) {
    client.create_snapshot(source, "s").await.unwrap();
    client.protect_snapshot(source, "s").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fill_that_goes_wrong_harms_nothing() {
    let lab = Lab::new();
    lab.python(
        "
v = NAME + '-volume'
create('images', NAME + '-a', 60 * M); write('images', NAME + '-a', 0, 50 * M, 1)
snap('images', NAME + '-a', 'x'); clone('images', NAME + '-a', 'x', 'volumes', v)
write('volumes', v, 9 * M, 2 * M, 2); write('volumes', v, 56 * M, 100, 3)",
    );
    let client = lab.client().await;
    let (source, image) = (lab.volume(), lab.image());
    snapshotted(&client, &source).await;
    let expected = lab.data(&source, Some("s"));
    for fault in [FillFault::SkipEveryThird, FillFault::FailAfter(7), FillFault::StopAfter(7)] {
        let (progress, never) = (Progress::default(), CancellationToken::new());
        client.create_like(&source, "s", &image, Features::WITHOUT_MAPS).await.unwrap();
        let unlimited = no_limits();
        let copy = client.server_copy_with_fault(&source, "s", &image, &unlimited, &progress, &never, Some(fault));
        let moved = copy.await.unwrap();
        assert!(moved.through_host > 0 && moved.through_host < 2 * expected.len() as u64, "{fault:?}: {moved:?}");
        assert!(lab.data(&image, None) == expected, "{fault:?}");
        assert_eq!(compared(&client, &source, &image, Compare::Full).await, None);
        is_published_shape(&lab, &client, &source, &image).await;
        client.remove_image(&image).await.unwrap();
    }
}

/// What keeps a snapshot with clones from being removed is taken away by force, behind Ceph's back.
const REMOVE_BY_FORCE: &str = "
import struct
with rbd.Image(io('volumes'), NAME + '-volume') as image:
    header, snap_id = 'rbd_header.' + image.id(), image.snap_get_id('s')
io('volumes').execute(header, 'rbd', 'set_protection_status', struct.pack('<QB', snap_id, 0))
with rbd.Image(io('volumes'), NAME + '-volume') as image: image.remove_snap('s')";

#[tokio::test(flavor = "multi_thread")]
async fn a_source_snapshot_that_is_removed_meanwhile_fails_the_transfer() {
    let lab = Lab::new();
    lab.python("create('volumes', NAME + '-volume', 64 * M); write('volumes', NAME + '-volume', 0, 64 * M, 1)");
    let client = lab.client().await;
    let (source, image) = (lab.volume(), lab.image());
    let slow = limits(1, 16 * MIB, 4);
    let (progress, never) = (Progress::default(), CancellationToken::new());
    let removal = async {
        tokio::time::sleep(Duration::from_millis(1500)).await;
        tokio::task::block_in_place(|| lab.python(REMOVE_BY_FORCE));
    };
    snapshotted(&client, &source).await;
    client.create_like(&source, "s", &image, Features::WITHOUT_MAPS).await.unwrap();
    let (filled, ()) = tokio::join!(client.server_copy(&source, "s", &image, &slow, &progress, &never), removal);
    let error = filled.unwrap_err();
    eprintln!("server-copy: {error}");
    assert!(!rbd_offload::transfer::is_for_another_method(&error), "{error}");
    assert_eq!(client.remove_image(&image).await.unwrap(), Changed::Yes);

    let removal = async {
        tokio::time::sleep(Duration::from_millis(1500)).await;
        tokio::task::block_in_place(|| lab.python(REMOVE_BY_FORCE));
    };
    snapshotted(&client, &source).await;
    client.create_like(&source, "s", &image, Features::PUBLISHED).await.unwrap();
    let (copied, ()) = tokio::join!(client.copy(&source, "s", &image, &slow, &progress, &never), removal);
    eprintln!("copy: {}", copied.unwrap_err());
    assert_eq!(client.remove_image(&image).await.unwrap(), Changed::Yes);
    assert_eq!(client.remove_snapshot(&source, "s").await.unwrap(), Changed::No);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_planted_difference_is_found() {
    let lab = Lab::new();
    lab.python(
        "
v = NAME + '-volume'
create('volumes', v, 41 * M + 100); write('volumes', v, 0, 9 * M, 1); write('volumes', v, 30 * M, 4 * M, 2)",
    );
    let client = lab.client().await;
    let (source, image) = (lab.volume(), lab.image());
    snapshotted(&client, &source).await;
    transfer(&client, Method::Fill, &source, &image).await;
    for extent in [Compare::Sample, Compare::Full] {
        assert_eq!(compared(&client, &source, &image, extent).await, None);
    }
    // One byte, in the data, where there was a hole, and at the very end.
    for at in [5 * MIB + 4321, 20 * MIB + 1, 41 * MIB + 99] {
        let change = format!(
            "
with rbd.Image(io('images'), NAME + '-image') as image:
    image.write(bytes([image.read({at}, 1)[0] ^ 1]), {at})"
        );
        lab.python(&change);
        assert_eq!(compared(&client, &source, &image, Compare::Full).await, Some(at));
        lab.python(&change);
    }
    assert_eq!(compared(&client, &source, &image, Compare::Full).await, None);
    // Other data everywhere.
    lab.python("write('images', NAME + '-image', 0, 9 * M, 7); write('images', NAME + '-image', 30 * M, 4 * M, 8)");
    assert!(compared(&client, &source, &image, Compare::Sample).await.is_some());
    assert_eq!(compared(&client, &source, &image, Compare::Full).await, Some(0));
    lab.python("resize('images', NAME + '-image', 40 * M)");
    assert_eq!(compared(&client, &source, &image, Compare::Sample).await, Some(40 * MIB));

    let cancel = CancellationToken::new();
    cancel.cancel();
    let stopped = client.compare(&source, "s", &image, Compare::Full, &Progress::default(), &cancel).await.unwrap_err();
    assert_eq!(stopped.kind(), ErrorKind::Cancelled);
    let missing = client
        .compare(&source, "t", &image, Compare::Sample, &Progress::default(), &CancellationToken::new())
        .await
        .unwrap_err();
    assert_eq!(missing.kind(), ErrorKind::NotFound);
}

/// Pools of one test, in which no other test stores an object.
struct Pools<'a> {
    lab: &'a Lab,
    names: Vec<String>,
}

impl<'a> Pools<'a> {
    fn new(lab: &'a Lab, names: &[&str]) -> Self {
        let names: Vec<_> = names.iter().map(|name| format!("{}-{name}", lab.name)).collect();
        for name in &names {
            lab.command("ceph", &["osd", "pool", "create", name, "4"]);
            lab.command("rbd", &["pool", "init", name]);
        }
        Self { lab, names }
    }

    /// Bytes stored in each, once the OSDs' reports have settled.
    async fn stored(&self) -> Vec<u64> {
        let mut last = (Vec::new(), Instant::now());
        loop {
            let df: serde_json::Value =
                serde_json::from_str(&self.lab.command("ceph", &["df", "--format", "json"])).unwrap();
            let pools = df["pools"].as_array().unwrap();
            let used = |name: &String| {
                let pool = pools.iter().find(|pool| pool["name"] == name.as_str()).unwrap();
                pool["stats"]["bytes_used"].as_u64().unwrap()
            };
            let now: Vec<u64> = self.names.iter().map(used).collect();
            if now != last.0 {
                last = (now, Instant::now());
            } else if last.1.elapsed() > Duration::from_secs(12) {
                return last.0;
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    }
}

impl Drop for Pools<'_> {
    fn drop(&mut self) {
        for name in &self.names {
            self.lab.command("ceph", &["osd", "pool", "delete", name, name, "--yes-i-really-really-mean-it"]);
        }
    }
}

/// Copies `volumes/NAME-volume`, which the Python makes in a pool `SOURCE`, by every method, and holds what is stored
/// of the copies to what is stored of the source.
async fn stays_thin(prepare: &str) {
    let lab = Lab::new();
    let pools = Pools::new(&lab, &["source", "Copy", "Clone", "Fill"]);
    lab.python(&format!("SOURCE = NAME + '-source'\nv = NAME + '-volume'\n{prepare}"));
    // The daemon's user has no business in these pools.
    let client = Client::connect(&lab.conf(), "admin").await.unwrap();
    let source = ImageSpec::named(&pools.names[0], format!("{}-volume", lab.name));
    snapshotted(&client, &source).await;
    let expected = lab.data(&source, Some("s"));
    let used = |image: &ImageSpec| {
        let du = lab.command("rbd", &["du", "--format", "json", &image.to_string()]);
        let du: serde_json::Value = serde_json::from_str(&du).unwrap();
        du["images"].as_array().unwrap().iter().map(|image| image["used_size"].as_u64().unwrap()).max().unwrap()
    };
    for method in METHODS {
        let destination = ImageSpec::named(format!("{}-{method:?}", lab.name), "image");
        let began = Instant::now();
        transfer(&client, method, &source, &destination).await;
        eprintln!("{method:?}: {:?}", began.elapsed());
        assert!(lab.data(&destination, None) == expected, "{method:?}");
        lab.command("rbd", &["object-map", "check", &destination.to_string()]);
        assert!(used(&destination) <= used(&source), "{method:?}: {} of {}", used(&destination), used(&source));
    }
    let stored = pools.stored().await;
    eprintln!("stored: {stored:?}, rbd du {}", used(&source));
    for (name, copy) in pools.names.iter().zip(&stored).skip(1) {
        assert!(*copy as f64 <= stored[0] as f64 * 1.1, "{name}: {copy} of {}", stored[0]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn objects_of_holes_stay_thin() {
    stays_thin(
        "
create(SOURCE, v, 1024 * M)
for n in range(256): write(SOURCE, v, n * 4 * M + (n * 37 % 1024) * 4096, 4096, n)",
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn objects_of_small_pieces_stay_thin() {
    stays_thin(
        "
create(SOURCE, v, 256 * M)
for n in range(64):
    for piece in range(24): write(SOURCE, v, n * 4 * M + piece * 60 * 1024, 4096, n)",
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn half_full_objects_stay_thin() {
    stays_thin(
        "
create(SOURCE, v, 128 * M)
for n in range(32): write(SOURCE, v, n * 4 * M + 3 * M, M // 2, n); write(SOURCE, v, n * 4 * M, M, n)",
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn erasure_coded_objects_of_holes_stay_thin() {
    stays_thin(
        "
create(SOURCE, v, 128 * M, data_pool='ecdata')
for n in range(32): write(SOURCE, v, n * 4 * M + 3 * M, M // 2, n)
create(SOURCE, 'ballast', 128 * M)
for n in range(32): write(SOURCE, 'ballast', n * 4 * M, M // 2, n)",
    )
    .await;
}

/// Objects of which every part was discarded have nothing stored, and those cut short store no zeros beyond the cut.
#[tokio::test(flavor = "multi_thread")]
async fn objects_discarded_in_parts_stay_thin() {
    stays_thin(
        "
create('images', NAME + '-a', 128 * M); write('images', NAME + '-a', 0, 128 * M, 1); snap('images', NAME + '-a', 'x')
clone('images', NAME + '-a', 'x', SOURCE, v); write(SOURCE, v, 0, 128 * M, 2)
for n in range(1, 32, 2): discard(SOURCE, v, n * 4 * M, 2 * M); discard(SOURCE, v, n * 4 * M + 2 * M, 2 * M)
for n in range(0, 32, 8): discard(SOURCE, v, n * 4 * M + M, 2 * M); discard(SOURCE, v, n * 4 * M + 3 * M, M)",
    )
    .await;
}

/// What the transfers wrote is right to the OSDs too: a deep scrub compares data, sizes and statistics.
#[tokio::test(flavor = "multi_thread")]
async fn a_deep_scrub_finds_nothing() {
    let lab = Lab::new();
    lab.python(
        "
v = NAME + '-volume'
create('images', NAME + '-a', 64 * M, data_pool='ecdata'); write('images', NAME + '-a', 0, 30 * M + 7, 1)
snap('images', NAME + '-a', 'x'); clone('images', NAME + '-a', 'x', 'volumes', v)
write('volumes', v, 20 * M, 30 * M, 2)
for n in (52, 56, 60): write('volumes', v, n * M, M, n); write('volumes', v, (n + 3) * M, 4096, n)",
    );
    let client = lab.client().await;
    let source = lab.volume();
    snapshotted(&client, &source).await;
    for method in METHODS {
        let destination = ImageSpec::named("images", format!("{}-{method:?}", lab.name));
        transfer(&client, method, &source, &destination).await;
        client.create_snapshot(&destination, "snap").await.unwrap();
    }
    const POOLS: [&str; 3] = ["images", "volumes", "ecdata"];
    let stamps = || -> Vec<(String, String, String)> {
        POOLS
            .iter()
            .flat_map(|pool| {
                let dump = lab.command("ceph", &["pg", "ls-by-pool", pool, "--format", "json"]);
                let dump: serde_json::Value = serde_json::from_str(&dump).unwrap();
                let text = |pg: &serde_json::Value, key: &str| pg[key].as_str().unwrap().to_owned();
                dump["pg_stats"]
                    .as_array()
                    .unwrap()
                    .iter()
                    .map(|pg| (text(pg, "pgid"), text(pg, "last_deep_scrub_stamp"), text(pg, "state")))
                    .collect::<Vec<_>>()
            })
            .collect()
    };
    let before = stamps();
    for pool in POOLS {
        lab.command("ceph", &["osd", "pool", "deep-scrub", pool]);
    }
    let began = Instant::now();
    loop {
        tokio::time::sleep(Duration::from_secs(2)).await;
        let now = stamps();
        for (pg, _, state) in &now {
            assert!(!state.contains("inconsistent"), "{pg} is {state}");
        }
        let waiting: Vec<_> = now.iter().zip(&before).filter(|(a, b)| a.1 == b.1).map(|(a, _)| a.0.clone()).collect();
        if waiting.is_empty() {
            break;
        }
        assert!(began.elapsed() < Duration::from_secs(300), "not scrubbed: {waiting:?}");
        for pg in waiting.iter().filter(|_| began.elapsed().as_secs().is_multiple_of(20)) {
            lab.command("ceph", &["pg", "deep-scrub", pg]);
        }
    }
    let health = lab.command("ceph", &["health", "detail"]);
    assert!(!health.contains("PG_DAMAGED") && !health.contains("OSD_SCRUB_ERRORS"), "{health}");
}

/// A pool for images under migration: the bindings cannot list a trash with such an image. The clean-up of its clones
/// comes first.
struct MigrationPool<'a> {
    client: Client,
    name: String,
    lab: &'a Lab,
    _pools: Pools<'a>,
}

impl<'a> MigrationPool<'a> {
    async fn new(lab: &'a Lab) -> Self {
        let pools = Pools::new(lab, &["migration"]);
        // The daemon's user has no business in this pool.
        let client = Client::connect(&lab.conf(), "admin").await.unwrap();
        Self { client, name: pools.names[0].clone(), lab, _pools: pools }
    }

    fn python(&self, code: &str) {
        self.lab.python(&format!("P = '{}'\nv = NAME + '-volume'\n{code}", self.name));
    }
}

impl Drop for MigrationPool<'_> {
    fn drop(&mut self) {
        self.lab.clean();
    }
}

/// `rbd migration prepare` moves the clones of an image to a new one, which is empty at first and shows no parent.
#[tokio::test(flavor = "multi_thread")]
async fn a_parent_under_live_migration_is_read_through_librbd() {
    let lab = Lab::new();
    let pool = MigrationPool::new(&lab).await;
    pool.python(
        "
create(P, NAME + '-a', 32 * M); write(P, NAME + '-a', 0, 20 * M, 1); snap(P, NAME + '-a', 'x')
clone(P, NAME + '-a', 'x', P, NAME + '-b'); write(P, NAME + '-b', 8 * M, M, 2)
snap(P, NAME + '-b', 'y'); clone(P, NAME + '-b', 'y', 'volumes', v)
discard('volumes', v, 4 * M, 4 * M); write('volumes', v, 25 * M, M, 2)
snap('volumes', v, 's')",
    );
    let client = &pool.client;
    let (source, image) = (lab.volume(), lab.image());
    let expected = lab.data(&source, Some("s"));
    for parent in ["b", "a"] {
        pool.python(&format!("rbd.RBD().migration_prepare(io(P), NAME + '-{parent}', io(P), NAME + '-new')"));
        for method in [Method::Copy, Method::Clone] {
            transfer(client, method, &source, &image).await;
            assert!(lab.data(&image, None) == expected, "{parent}, {method:?}");
            is_published_shape(&lab, client, &source, &image).await;
            for extent in [Compare::Sample, Compare::Full] {
                assert_eq!(compared(client, &source, &image, extent).await, None);
            }
            client.remove_image(&image).await.unwrap();
        }
        client.create_like(&source, "s", &image, Features::WITHOUT_MAPS).await.unwrap();
        let (progress, never) = (Progress::default(), CancellationToken::new());
        let refused = client.server_copy(&source, "s", &image, &no_limits(), &progress, &never).await.unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Unsupported, "{refused}");
        client.remove_image(&image).await.unwrap();
        pool.python("rbd.RBD().migration_abort(io(P), NAME + '-new')");
    }
    assert!(lab.data(&source, Some("s")) == expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_under_live_migration_is_copied_right() {
    let lab = Lab::new();
    let pool = MigrationPool::new(&lab).await;
    pool.python(
        "
create('images', NAME + '-a', 24 * M); write('images', NAME + '-a', 0, 24 * M, 1); snap('images', NAME + '-a', 'x')
clone('images', NAME + '-a', 'x', P, NAME + '-old'); discard(P, NAME + '-old', 4 * M, 4 * M)
write(P, NAME + '-old', 13 * M, M, 2)
rbd.RBD().migration_prepare(io(P), NAME + '-old', io('volumes'), v)
write('volumes', v, 9 * M, M, 3); discard('volumes', v, 16 * M, 4 * M)",
    );
    let client = &pool.client;
    let (source, image) = (lab.volume(), lab.image());
    client.create_snapshot(&source, "s").await.unwrap();
    let expected = lab.data(&source, Some("s"));
    pool.python("write('volumes', v, 20 * M, M, 99)");
    let info = client.image(&source, Some("s")).await.unwrap().unwrap();
    let (methods, _) = rbd_offload::transfer::candidates(rbd_offload::config::MethodChoice::Auto, &info);
    assert_eq!(methods, [rbd_offload::transfer::Method::Copy]);
    transfer(client, Method::Copy, &source, &image).await;
    assert!(lab.data(&image, None) == expected);
    for extent in [Compare::Sample, Compare::Full] {
        assert_eq!(compared(client, &source, &image, extent).await, None);
    }
    client.remove_snapshot(&source, "s").await.unwrap();
    pool.python("rbd.RBD().migration_execute(io('volumes'), v); rbd.RBD().migration_commit(io('volumes'), v)");
}

/// A client that has an image open does not see that its parents change. What it read after that may be zeros.
#[tokio::test(flavor = "multi_thread")]
async fn a_parent_that_is_migrated_while_it_is_read_fails_the_copy() {
    let lab = Lab::new();
    let pool = MigrationPool::new(&lab).await;
    pool.python(
        "
create(P, NAME + '-a', 64 * M); write(P, NAME + '-a', 0, 64 * M, 1); snap(P, NAME + '-a', 'x')
clone(P, NAME + '-a', 'x', 'volumes', v); snap('volumes', v, 's')",
    );
    let (client, source, image) = (&pool.client, lab.volume(), lab.image());
    client.create_like(&source, "s", &image, Features::PUBLISHED).await.unwrap();
    let (progress, never, slow) = (Progress::default(), CancellationToken::new(), limits(1, 4 * MIB, 0));
    let migration = async {
        while progress.done() == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        slow.rates.set(1, 0);
        tokio::task::block_in_place(|| {
            pool.python(
                "rbd.RBD().migration_prepare(io(P), NAME + '-a', io(P), NAME + '-b')
rbd.RBD().migration_execute(io(P), NAME + '-b'); rbd.RBD().migration_commit(io(P), NAME + '-b')",
            )
        });
        slow.rates.set(0, 0);
    };
    let (copied, _) = tokio::join!(client.copy(&source, "s", &image, &slow, &progress, &never), migration);
    assert_eq!(copied.unwrap_err().kind(), ErrorKind::Conflict);
}

/// The rate belongs to all transfers together, and a new one holds for those that run.
#[tokio::test(flavor = "multi_thread")]
async fn transfers_share_a_rate() {
    let lab = Lab::new();
    lab.python("create('volumes', NAME + '-volume', 96 * M); write('volumes', NAME + '-volume', 0, 96 * M, 1)");
    let client = lab.client().await;
    let source = lab.volume();
    snapshotted(&client, &source).await;
    let images = ["one", "two"].map(|name| ImageSpec::named("images", format!("{}-{name}", lab.name)));
    for image in &images {
        client.create_like(&source, "s", image, Features::WITHOUT_MAPS).await.unwrap();
    }
    let shared = limits(8, 0, 16);
    let (progress, never) = (Progress::default(), CancellationToken::new());
    let began = Instant::now();
    let fill = |image| client.server_copy(&source, "s", image, &shared, &progress, &never);
    let (one, two) = tokio::join!(fill(&images[0]), fill(&images[1]));
    assert_eq!((one.unwrap().objects, two.unwrap().objects), (24, 24));
    // 48 objects at 16 a second; each fill alone would have taken half the time.
    assert!(began.elapsed() > Duration::from_millis(2700), "{:?}", began.elapsed());

    // One chunk in 49 days, until the rate is another one.
    let (crawling, began) = (limits(8, 1, 0), Instant::now());
    let image = lab.image();
    client.create_like(&source, "s", &image, Features::PUBLISHED).await.unwrap();
    let copy = client.copy(&source, "s", &image, &crawling, &progress, &never);
    let reload = async {
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert!(progress.done() < 96 * MIB);
        crawling.rates.set(0, 0);
    };
    let (copied, ()) = tokio::join!(copy, reload);
    assert_eq!(copied.unwrap().objects, 24);
    assert!(began.elapsed() < Duration::from_secs(300));
}

/// A source without a map of its objects: the OSDs are asked for each of them, at the rate too.
#[tokio::test(flavor = "multi_thread")]
async fn the_questions_of_a_flatten_keep_the_rate() {
    let lab = Lab::new();
    lab.python("create('volumes', NAME + '-volume', 240 * M, features=1); write('volumes', NAME + '-volume', 0, M, 1)");
    let client = lab.client().await;
    let (source, image) = (lab.volume(), lab.image());
    snapshotted(&client, &source).await;
    client.clone_image(&source, "s", &image, Features::PUBLISHED).await.unwrap();
    let (progress, never, began) = (Progress::default(), CancellationToken::new(), Instant::now());
    let moved = client.flatten(&image, &limits(8, 0, 2), &progress, &never).await.unwrap();
    assert_eq!(moved.objects, 1);
    // 60 questions at 20 a second
    assert!(began.elapsed() > Duration::from_millis(2500), "{:?}", began.elapsed());
}

/// Random chains of images (tests/common/chain.py), made and judged by Debian's librbd bindings in a process of their
/// own.
struct Chains {
    process: std::process::Child,
    answers: std::io::Lines<std::io::BufReader<std::process::ChildStdout>>,
}

impl Chains {
    fn new(lab: &Lab) -> Self {
        let script = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/common/chain.py");
        let mut process = Command::new("/usr/bin/python3")
            .args([script, lab.conf(), lab.keyring()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let answers = BufReader::new(process.stdout.take().unwrap()).lines();
        Self { process, answers }
    }

    /// The answer, and what was done to make the chain.
    fn ask(&mut self, question: &serde_json::Value) -> (serde_json::Value, serde_json::Value) {
        tokio::task::block_in_place(|| {
            writeln!(self.process.stdin.as_ref().unwrap(), "{question}").unwrap();
            let answer = self.answers.next().unwrap_or_else(|| panic!("{question}: chain.py has died")).unwrap();
            let mut answer: serde_json::Value = serde_json::from_str(&answer).unwrap();
            (answer["answer"].take(), answer["log"].take())
        })
    }
}

impl Drop for Chains {
    fn drop(&mut self) {
        drop(self.process.stdin.take());
        let _ = self.process.wait();
    }
}

/// Makes the chain of the seed, transfers it by every method, and returns what is wrong with the results.
async fn judge_chain(client: &Client, chains: &mut Chains, lab: &Lab, seed: u64) -> Vec<String> {
    let name = format!("{}-chain{seed}", lab.name);
    let (made, log) = chains.ask(&json!({"make": seed, "name": name}));
    let mut wrong = Vec::new();
    if let Some(difference) = made["difference"].as_str() {
        wrong.push(format!("seed {seed}: librbd reads other than the model, {difference}: {log:#}"));
    }
    let source = ImageSpec::named(made["pool"].as_str().unwrap(), made["image"].as_str().unwrap());
    for method in METHODS {
        let destination = ImageSpec::named("images", format!("{name}-z{method:?}"));
        transfer(client, method, &source, &destination).await;
        for extent in [Compare::Sample, Compare::Full] {
            if let Some(byte) = compared(client, &source, &destination, extent).await {
                wrong.push(format!("seed {seed}, {method:?}: compare ({extent:?}) finds byte {byte}: {log:#}"));
            }
        }
        let (found, _) = chains.ask(&json!({"check": format!("{name}-z{method:?}"), "name": name}));
        let found = found.as_array().unwrap();
        wrong.extend(found.iter().map(|what| format!("seed {seed}, {method:?}: {what}: {log:#}")));
        client.remove_image(&destination).await.unwrap();
    }
    chains.ask(&json!({"clean": name}));
    wrong
}

/// The promise of all transfers: whatever the layers of a source are, the copy holds what the snapshot holds. So many
/// chains (`RBD_OFFLOAD_TEST_CHAINS`; as many as a minute allows) from that seed on (`RBD_OFFLOAD_TEST_SEED`; another
/// one each time).
#[tokio::test(flavor = "multi_thread", worker_threads = 8)]
async fn every_byte_of_random_chains_is_right() {
    const AT_A_TIME: u64 = 4;
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().unwrap());
    let chains = number("RBD_OFFLOAD_TEST_CHAINS");
    let first = number("RBD_OFFLOAD_TEST_SEED").unwrap_or_else(|| u64::from(Uuid::new_v4().as_fields().0));
    let (began, next) = (Instant::now(), Arc::new(AtomicU64::new(0)));
    let mut workers = Vec::new();
    for _ in 0..AT_A_TIME {
        let next = Arc::clone(&next);
        workers.push(tokio::spawn(async move {
            let lab = Lab::new();
            let client = lab.client().await;
            let mut python = Chains::new(&lab);
            let (mut count, mut wrong) = (0, Vec::new());
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                let enough = chains.map_or(began.elapsed() > Duration::from_secs(50), |chains| number >= chains);
                if enough {
                    return (count, wrong);
                }
                let found = judge_chain(&client, &mut python, &lab, first + number).await;
                // at once, since a long run may be stopped
                found.iter().for_each(|what| eprintln!("{what}"));
                wrong.extend(found);
                count += 1;
                if count % 10 == 0 {
                    eprintln!("{count} chains of this worker, in {:?}", began.elapsed());
                }
            }
        }));
    }
    let (mut count, mut wrong) = (0, Vec::new());
    for worker in workers {
        let (judged, found) = worker.await.unwrap();
        count += judged;
        wrong.extend(found);
    }
    eprintln!("{count} chains from seed {first} on, in {:?}", began.elapsed());
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(count > 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_jobs_client_that_is_given_up_is_fenced_alone() {
    let lab = Lab::new();
    let control = lab.client().await;
    let records = Client::open(ClientOptions {
        limit: Some(Duration::from_secs(5)),
        ..ClientOptions::new(lab.conf(), "rbd-offload")
    })
    .await
    .unwrap();
    let clients = CephJobClients::new(control.clone(), records.clone());
    let (hung, well) = (clients.connect(Uuid::new_v4()).await.unwrap(), clients.connect(Uuid::new_v4()).await.unwrap());
    let (storage, other) = (hung.storage(), well.storage());
    let addresses =
        [storage.address().await.unwrap(), other.address().await.unwrap(), control.address().await.unwrap()];
    assert_eq!(addresses.iter().collect::<std::collections::BTreeSet<_>>().len(), 3, "{addresses:?}");
    assert!(!hung.is_busy());
    lab.python("create('volumes', NAME, 40*M)");
    let image = ImageSpec::named("volumes", lab.name.clone());
    // a call is always on its way
    let running = tokio::spawn({
        let (storage, image) = (storage.clone(), image.clone());
        async move {
            loop {
                if let Err(error) = storage.image(&image, None).await {
                    return error.kind();
                }
            }
        }
    });
    while !hung.is_busy() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    hung.give_up(&[]).await.unwrap();
    assert_eq!(running.await.unwrap(), ErrorKind::Fenced);
    assert_eq!(storage.create_snapshot(&image, "s").await.unwrap_err().kind(), ErrorKind::Fenced);
    // the others go on, and the next job gets another client
    other.create_snapshot(&image, "s").await.unwrap();
    control.remove_snapshot(&image, "s").await.unwrap();
    records.objects("images", &lab.name).unwrap().omap("none", "", 1).await.unwrap();
    assert!(!clients.is_fenced());
    drop(well);
    // a client that was used before may have something open
    let next = clients.connect(Uuid::new_v4()).await.unwrap().storage().address().await.unwrap();
    assert!(!addresses.contains(&next), "{next} in {addresses:?}");
}

/// A pool whose placement groups take no operation hangs each job that uses it. Jobs in other pools go on, jobs there
/// fail at once, and go on when the pool answers.
#[tokio::test(flavor = "multi_thread")]
async fn a_pool_that_hangs_takes_no_client_from_the_jobs_of_other_pools() {
    // the lab has three OSDs
    const HANGS: [&str; 2] = ["min_size", "4"];
    const JOBS: usize = 12;
    let lab = Lab::new();
    let pools = Pools::new(&lab, &["sick"]);
    let sick = pools.names[0].clone();
    let set = |[key, value]: [&str; 2]| lab.command("ceph", &["osd", "pool", "set", &sick, key, value]);
    let options = ClientOptions { keyring: Some(lab.keyring()), ..ClientOptions::new(lab.conf(), "admin") };
    let control = Client::open(options).await.unwrap();
    lab.python(&format!("create('{sick}', NAME, 8*M); create('volumes', NAME, 8*M)"));
    let (there, elsewhere) = (ImageSpec::named(&sick, &lab.name), ImageSpec::named("volumes", &lab.name));
    let clients = CephJobClients::new(control.clone(), control.clone());
    lab.command("ceph", &["osd", "pool", "set", &sick, "size", "4"]);
    set(HANGS);
    let since = Instant::now();
    while lab.command("ceph", &["pg", "ls-by-pool", &sick]).contains("active") {
        assert!(since.elapsed() < Duration::from_secs(60), "the pool still takes operations");
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    let patience = Duration::from_secs(4);

    // a job that ended while a call of it hung
    let ended = clients.connect(Uuid::new_v4()).await.unwrap();
    let (storage, image, began) = (ended.storage(), there.clone(), Instant::now());
    let left = tokio::spawn(async move { storage.image(&image, None).await });
    while !ended.is_busy() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    drop(ended);

    let (mut hung, mut refused) = (Vec::new(), 0);
    for _ in 0..JOBS {
        let client = clients.connect(Uuid::new_v4()).await.unwrap();
        let (storage, image) = (client.storage(), there.clone());
        let mut call = tokio::spawn(async move { storage.image(&image, None).await.map(|found| found.is_some()) });
        match tokio::time::timeout(patience, &mut call).await {
            Ok(ended) => {
                let error = ended.unwrap().unwrap_err();
                assert_eq!(error.kind(), ErrorKind::PoolClosed, "{error}");
                assert!(error.to_string().contains(&sick), "{error}");
                refused += 1;
            }
            Err(_) => {
                client.give_up(&[]).await.unwrap();
                hung.push(call);
            }
        }
        let well = clients.connect(Uuid::new_v4()).await.unwrap();
        assert!(well.storage().image(&elsewhere, None).await.unwrap().is_some(), "the pool of others answers");
    }
    assert_eq!((hung.len(), refused), (4, JOBS - 4));

    tokio::time::sleep(Duration::from_secs(24).saturating_sub(began.elapsed())).await;
    set(["min_size", "1"]);
    lab.command("ceph", &["osd", "pool", "set", &sick, "size", "1", "--yes-i-really-mean-it"]);
    let error = tokio::time::timeout(Duration::from_secs(60), left).await.expect("the call returns").unwrap();
    assert_eq!(error.unwrap_err().kind(), ErrorKind::Fenced, "it may do nothing after its job");
    for call in hung {
        let ended = tokio::time::timeout(Duration::from_secs(60), call).await.expect("the call returns");
        assert_eq!(ended.unwrap().unwrap_err().kind(), ErrorKind::Fenced);
    }
    let client = clients.connect(Uuid::new_v4()).await.unwrap();
    let since = Instant::now();
    while let Err(error) = client.storage().image(&there, None).await {
        assert!(error.kind() == ErrorKind::PoolClosed && since.elapsed() < Duration::from_secs(30), "{error}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// An image that is published at once: a clone of an anchor of the source's `s`, with the snapshot `snap`.
struct Early {
    anchor: ImageSpec,
    image: ImageSpec,
    id: ImageSpec,
}

impl Early {
    async fn publish(client: &Client, source: &ImageSpec, name: &str, features: Features) -> Self {
        let anchor = ImageSpec::named(&source.pool, format!("{name}-zanchor"));
        let image = ImageSpec::named("images", format!("{name}-zimage"));
        let tag = [(OWNERSHIP_TAG.to_owned(), name.to_owned())];
        client.make_anchor(source, "s", &anchor, "a", &tag).await.unwrap();
        client.clone_image(&anchor, "a", &image, features).await.unwrap();
        client.replace_metadata(&image, &[]).await.unwrap();
        client.create_protected_snapshot(&image, "snap").await.unwrap();
        let id = client.image(&image, None).await.unwrap().unwrap().id;
        Self { anchor, id: ImageSpec::with_id("images", id), image }
    }

    /// Fills it from where it stood.
    async fn fill(
        &self,
        client: &Client,
        state: &Mutex<FillState>,
        limits: &TransferLimits,
        cancel: &CancellationToken,
    ) -> rbd_offload::ceph::Result<Moved> {
        let from = *state.lock().unwrap();
        let saved = |now: FillState| {
            let before = std::mem::replace(&mut *state.lock().unwrap(), now);
            assert!(now.next_object >= before.next_object && now.copied >= before.copied, "{before:?} {now:?}");
        };
        client.fill_published(&self.id, from, limits, &Progress::default(), cancel, &saved).await
    }

    async fn detach(&self, client: &Client) -> Moved {
        client.detach(&self.id, &no_limits(), &Progress::default(), &CancellationToken::new()).await.unwrap()
    }

    /// The rule: a parent or an object map, never both; in head and snapshot.
    async fn keeps_the_rule(&self, client: &Client) {
        for snapshot in [None, Some("snap")] {
            let now = client.image(&self.id, snapshot).await.unwrap().unwrap();
            let maps = now.features.has(Features::OBJECT_MAP) || now.features.has(Features::FAST_DIFF);
            assert!(!(maps && now.parent.is_some()), "{snapshot:?}: {now:?}");
        }
    }

    /// The source's overwriting and removal right after the last thing that kept it.
    async fn release(&self, client: &Client, source: &ImageSpec) {
        assert_eq!(client.remove_image(&self.anchor).await.unwrap(), Changed::Yes);
        assert_eq!(client.remove_snapshot(source, "s").await.unwrap(), Changed::Yes);
    }
}

/// One that fires after a time, unless it is dropped before.
fn cancelled_after(time: Duration) -> (CancellationToken, tokio_util::sync::DropGuard) {
    let (cancel, guard) = (CancellationToken::new(), CancellationToken::new());
    let (fires, ends) = (cancel.clone(), guard.clone());
    tokio::spawn(async move {
        tokio::select! {
            () = tokio::time::sleep(time) => fires.cancel(),
            () = ends.cancelled() => {}
        }
    });
    (cancel, guard.drop_guard())
}

/// What one round of early readers found.
#[derive(Debug, Default)]
struct Round {
    readers: u64,
    reads: u64,
    writes: u64,
    resumed: u64,
    wrong: Vec<String>,
}

/// Publishes an image of a random chain, has it read before, during and after the fill and after the source was
/// overwritten and removed. `features` are those of the image while it is published early.
async fn early_readers(client: &Client, chains: &mut Chains, lab: &Lab, seed: u64, features: Features) -> Round {
    let mut random = rand::rngs::StdRng::seed_from_u64(seed);
    let (name, mut round) = (format!("{}-early{seed}", lab.name), Round::default());
    let (made, log) = chains.ask(&json!({"make": seed, "name": name}));
    let source = ImageSpec::named(made["pool"].as_str().unwrap(), made["image"].as_str().unwrap());
    let early = Early::publish(client, &source, &name, features).await;
    let image_name = format!("{name}-zimage");
    let mut open = |chains: &mut Chains, kind: &str| {
        chains.ask(&json!({"open": kind, "image": image_name, "name": name}));
        round.readers += 1;
    };
    open(chains, "download");
    open(chains, "child");
    open(chains, "guest");

    let state = Mutex::new(FillState::default());
    let pace = limits(random.random_range(1..9), 0, random.random_range(40..400));
    let during = async {
        tokio::time::sleep(Duration::from_millis(random.random_range(0..400))).await;
        open(chains, ["download", "child", "guest"][random.random_range(0..3)]);
    };
    if features.has(Features::OBJECT_MAP) {
        // the planted fault: a copy by the way that is only right if no other client has the image open
        let (progress, never) = (Progress::default(), CancellationToken::new());
        let (flattened, ()) = tokio::join!(client.flatten(&early.image, &pace, &progress, &never), during);
        flattened.unwrap();
    } else {
        let (first, _guard) = cancelled_after(Duration::from_millis(seed % 7 * 100));
        let (filled, ()) = tokio::join!(early.fill(client, &state, &pace, &first), during);
        if let Err(stopped) = filled {
            assert_eq!(stopped.kind(), ErrorKind::Cancelled, "seed {seed}: {stopped}");
            round.resumed += 1;
            early.fill(client, &state, &no_limits(), &CancellationToken::new()).await.unwrap();
        }
        early.keeps_the_rule(client).await;
        let (first, _guard) = cancelled_after(Duration::from_millis(seed % 5 * 50));
        if client.detach(&early.id, &no_limits(), &Progress::default(), &first).await.is_err() {
            round.resumed += 1;
            early.keeps_the_rule(client).await;
        }
        early.detach(client).await;
    }
    chains.ask(&json!({"open": "download", "image": image_name, "name": name}));
    chains.ask(&json!({"open": "child", "image": image_name, "name": name}));
    round.readers += 2;

    early.release(client, &source).await;
    chains.ask(&json!({"release": name}));
    let (closed, _) = chains.ask(&json!({"close": name}));
    for reader in closed.as_array().unwrap() {
        round.reads += reader["reads"].as_u64().unwrap();
        round.writes += reader["writes"].as_u64().unwrap();
        let wrong = reader["wrong"].as_array().unwrap().iter();
        round.wrong.extend(wrong.map(|what| format!("seed {seed}: {what}: {log}")));
    }
    let (found, _) = chains.ask(&json!({"check": image_name, "name": name, "snapshots": ["snap"]}));
    let found = found.as_array().unwrap().iter();
    round.wrong.extend(found.map(|what| format!("seed {seed}: the image: {what}: {log}")));
    chains.ask(&json!({"clean": name}));
    round
}

/// Rounds of early readers, some at a time: what all of them found together, and how many there were.
async fn rounds_of_early_readers(rounds: u64, first: u64, features: Features) -> Round {
    const AT_A_TIME: u64 = 3;
    let next = Arc::new(AtomicU64::new(0));
    let mut workers = Vec::new();
    for _ in 0..AT_A_TIME.min(rounds) {
        let next = Arc::clone(&next);
        workers.push(tokio::spawn(async move {
            let lab = Lab::new();
            let client = lab.client().await;
            let mut python = Chains::new(&lab);
            let mut all = Round::default();
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                if number >= rounds {
                    return all;
                }
                let round = early_readers(&client, &mut python, &lab, first + number, features).await;
                round.wrong.iter().for_each(|what| eprintln!("{what}"));
                if number % 10 == 9 {
                    eprintln!("round {number}");
                }
                all.readers += round.readers;
                all.reads += round.reads;
                all.writes += round.writes;
                all.resumed += round.resumed;
                all.wrong.extend(round.wrong);
            }
        }));
    }
    let mut all = Round::default();
    for worker in workers {
        let found = worker.await.unwrap();
        all.readers += found.readers;
        all.reads += found.reads;
        all.writes += found.writes;
        all.resumed += found.resumed;
        all.wrong.extend(found.wrong);
    }
    all
}

fn number_from(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|text| text.parse().unwrap())
}

/// The promise of publishing at once: every client that opens the image, at any time, reads the source's snapshot,
/// whatever becomes of the source afterwards. So many rounds (`RBD_OFFLOAD_TEST_ROUNDS`, 10) from that seed on
/// (`RBD_OFFLOAD_TEST_SEED`; another one each time).
#[tokio::test(flavor = "multi_thread", worker_threads = 8)]
async fn early_readers_never_read_a_wrong_byte() {
    let rounds = number_from("RBD_OFFLOAD_TEST_ROUNDS").unwrap_or(10);
    let first = number_from("RBD_OFFLOAD_TEST_SEED").unwrap_or_else(|| u64::from(Uuid::new_v4().as_fields().0));
    let (began, found) = (Instant::now(), rounds_of_early_readers(rounds, first, Features::WITHOUT_MAPS).await);
    let Round { readers, reads, writes, resumed, wrong } = found;
    eprintln!(
        "{rounds} rounds from seed {first} on, in {:?}: {readers} readers, {reads} reads, {writes} writes, resumed \
         {resumed} times, {} wrong",
        began.elapsed(),
        wrong.len()
    );
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(reads > 0 && writes > 0);
}

/// The same readers find it when the rule is broken: the image has an object map while objects are still to come.
#[tokio::test(flavor = "multi_thread", worker_threads = 8)]
async fn early_readers_of_an_image_with_an_object_map_read_wrong_bytes() {
    let found = rounds_of_early_readers(3, 1, Features::PUBLISHED).await;
    eprintln!("{} readers, {} reads, {} wrong", found.readers, found.reads, found.wrong.len());
    assert!(!found.wrong.is_empty(), "the readers would not find a wrong byte");
}

/// A volume of many small objects, most of them in a parent, with a hole and a discard.
const MANY_OBJECTS: &str = "create('volumes2', NAME + '-base', 12 * M, order=16)
write('volumes2', NAME + '-base', 0, 10 * M, 1)
snap('volumes2', NAME + '-base', 'b')
clone('volumes2', NAME + '-base', 'b', 'volumes', NAME + '-volume', order=16)
write('volumes', NAME + '-volume', 2 * M, 3 * M, 2); discard('volumes', NAME + '-volume', 6 * M, M)";

/// That volume with the snapshot `s`, which is protected.
async fn with_many_objects(lab: &Lab) -> (Client, ImageSpec) {
    let client = lab.client().await;
    lab.python(MANY_OBJECTS);
    let source = lab.volume();
    snapshotted(&client, &source).await;
    (client, source)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_with_an_object_map_is_neither_filled_nor_detached() {
    let lab = Lab::new();
    let (client, source) = with_many_objects(&lab).await;
    let early = Early::publish(&client, &source, &lab.name, Features::PUBLISHED).await;
    let never = CancellationToken::new();
    let filled = early.fill(&client, &Mutex::new(FillState::default()), &no_limits(), &never).await.unwrap_err();
    let detached = client.detach(&early.id, &no_limits(), &Progress::default(), &never).await.unwrap_err();
    for refused in [filled, detached] {
        assert_eq!(refused.kind(), ErrorKind::Unsupported, "{refused}");
        assert!(refused.to_string().contains("object map"), "{refused}");
    }
    assert!(client.image(&early.id, None).await.unwrap().unwrap().parent.is_some());

    // also when an operator switches it on in the middle of a fill
    client.remove_image(&early.image).await.unwrap();
    client.remove_image(&early.anchor).await.unwrap();
    let early = Early::publish(&client, &source, &lab.name, Features::WITHOUT_MAPS).await;
    let (state, slow) = (Mutex::new(FillState::default()), limits(1, 0, 20));
    let switch_on = async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        tokio::task::block_in_place(|| {
            lab.command("rbd", &["feature", "enable", &early.image.to_string(), "object-map", "fast-diff"])
        });
    };
    let (filled, _) = tokio::join!(early.fill(&client, &state, &slow, &never), switch_on);
    assert_eq!(filled.unwrap_err().kind(), ErrorKind::Unsupported);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_detach_that_broke_off_anywhere_is_finished() {
    let lab = Lab::new();
    let (client, source) = with_many_objects(&lab).await;
    let expected = lab.data(&source, Some("s"));
    let early = Early::publish(&client, &source, &lab.name, Features::WITHOUT_MAPS).await;
    // a guest has a child open throughout: the image is never alone
    lab.python("clone('images', NAME + '-zimage', 'snap', 'volumes', NAME + '-zzguest')");
    let mut chains = Chains::new(&lab);
    let watch = chains.ask(&json!({"hold": format!("{}-zzguest", lab.name)}));
    assert!(watch.0.is_null());

    // later and later in the detach; most of it is the flatten, since nothing was filled
    let (mut stopped, mut allowed) = (0, 0);
    loop {
        let (progress, cancel) = (Progress::default(), CancellationToken::new());
        let stop = async {
            while progress.steps() < allowed && !cancel.is_cancelled() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            cancel.cancel();
        };
        let detach = async {
            let result = client.detach(&early.id, &no_limits(), &progress, &cancel).await;
            cancel.cancel();
            result
        };
        let (detached, ()) = tokio::join!(detach, stop);
        early.keeps_the_rule(&client).await;
        match detached {
            Ok(moved) => break eprintln!("stopped {stopped} times, up to {allowed} steps; then {moved:?}"),
            Err(error) => assert_eq!(error.kind(), ErrorKind::Cancelled, "{error}"),
        }
        stopped += 1;
        allowed = 2 * allowed + 1;
    }
    assert!(stopped > 3, "{stopped}");
    is_detached(&lab, &client, &early).await;

    // Each state in which a daemon may have died after that: the features are switched off or half on again, and the
    // maps are marked as invalid.
    for features in [8 | 16, 16] {
        lab.python(&format!(
            "with rbd.Image(io('images'), NAME + '-zimage') as image:
    image.update_features({features}, False); image.update_features({features}, True)
    assert image.flags() != 0"
        ));
        early.detach(&client).await;
        is_detached(&lab, &client, &early).await;
    }
    lab.python("with rbd.Image(io('images'), NAME + '-zimage') as image: image.update_features(8 | 16, False)");
    early.detach(&client).await;
    is_detached(&lab, &client, &early).await;
    assert_eq!(early.detach(&client).await, Moved::default(), "nothing is left to do");

    early.release(&client, &source).await;
    lab.python("rbd.RBD().remove(io('volumes'), NAME + '-volume')");
    assert!(lab.data(&early.image, None) == expected && lab.data(&early.image, Some("snap")) == expected);
}

async fn is_detached(lab: &Lab, client: &Client, early: &Early) {
    for snapshot in [None, Some("snap")] {
        let now = client.image(&early.id, snapshot).await.unwrap().unwrap();
        assert_eq!((now.parent, now.flags, now.features), (None, 0, Features::PUBLISHED), "{snapshot:?}");
        let place = snapshot.map_or(early.image.to_string(), |snapshot| format!("{}@{snapshot}", early.image));
        lab.command("rbd", &["object-map", "check", &place]);
    }
}

/// Names of the objects of a pool that have this in their names.
fn objects_with(lab: &Lab, pool: &str, part: &str) -> Vec<String> {
    let listed = lab.command("rados", &["-p", pool, "ls"]);
    listed.lines().filter(|name| name.contains(part)).map(str::to_owned).collect()
}

/// How many data objects the image has.
fn objects_of(lab: &Lab, early: &Early) -> usize {
    let ImageKey::Id(id) = &early.id.image else { unreachable!() };
    objects_with(lab, "images", &format!("rbd_data.{id}.")).len()
}

/// A hole of the image in which an early reader would look for the parents' data has an object; others have none.
#[tokio::test(flavor = "multi_thread")]
async fn only_holes_that_hide_something_get_an_object() {
    // what is discarded in the clone hides the base; and so may anything where a volume has no map
    for (features, objects) in [("DEFAULT", 160), ("1", 192)] {
        let lab = Lab::new();
        let client = lab.client().await;
        lab.python(&format!(
            "create('volumes2', NAME + '-base', 12 * M, order=16)
write('volumes2', NAME + '-base', 0, 10 * M, 1)
snap('volumes2', NAME + '-base', 'b')
clone('volumes2', NAME + '-base', 'b', 'volumes', NAME + '-volume', order=16, features={features})
discard('volumes', NAME + '-volume', 6 * M, M)"
        ));
        let source = lab.volume();
        snapshotted(&client, &source).await;
        let early = Early::publish(&client, &source, &lab.name, Features::WITHOUT_MAPS).await;
        let filled =
            early.fill(&client, &Mutex::new(FillState::default()), &no_limits(), &CancellationToken::new()).await;
        assert_eq!((filled.unwrap().objects, objects_of(&lab, &early)), (144, 144));
        early.detach(&client).await;
        assert_eq!(objects_of(&lab, &early), objects, "{features}");
        is_detached(&lab, &client, &early).await;
        early.release(&client, &source).await;
    }
}

/// What Glance does when a user deletes an image: the snapshot goes, then the image; one with clones goes to the trash.
const GLANCE_DELETES: &str = "
with rbd.Image(io('images'), NAME + '-zimage') as image:
    image.unprotect_snap('snap'); image.remove_snap('snap')
rbd.RBD().remove(io('images'), NAME + '-zimage')";

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_is_deleted_during_the_fill_leaves_no_object() {
    let lab = Lab::new();
    let (client, source) = with_many_objects(&lab).await;
    let early = Early::publish(&client, &source, &lab.name, Features::WITHOUT_MAPS).await;
    let (progress, never) = (Progress::default(), CancellationToken::new());
    let unlimited = no_limits();
    let sweep = || client.sweep_objects(&early.id, 192, None, &unlimited, &progress, &never);
    assert_eq!(sweep().await.unwrap_err().kind(), ErrorKind::Exists);

    let (state, slow) = (Mutex::new(FillState::default()), limits(4, 0, 30));
    let began = Instant::now();
    let delete = async {
        tokio::time::sleep(Duration::from_millis(500)).await;
        tokio::task::block_in_place(|| lab.python(GLANCE_DELETES));
        Instant::now()
    };
    let (filled, deleted) = tokio::join!(early.fill(&client, &state, &slow, &never), delete);
    assert_eq!(filled.unwrap_err().kind(), ErrorKind::NotFound);
    assert!(deleted.elapsed() < Duration::from_secs(60), "{:?}", deleted.elapsed());
    let ImageKey::Id(id) = &early.id.image else { unreachable!() };
    let left = objects_with(&lab, "images", id);
    eprintln!("{} objects were left, {:?} after the beginning", left.len(), began.elapsed());
    assert_eq!(sweep().await.unwrap(), left.len() as u64, "{left:?}");
    assert_eq!(objects_with(&lab, "images", id), Vec::<String>::new());
    assert_eq!(sweep().await.unwrap(), 0);
    early.release(&client, &source).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sweep_removes_what_belongs_to_no_image_and_nothing_else() {
    let lab = Lab::new();
    let client = lab.client().await;
    let (progress, never) = (Progress::default(), CancellationToken::new());
    for data_pool in [None, Some("ecdata")] {
        let argument = data_pool.map_or("None".to_owned(), |pool| format!("'{pool}'"));
        let id = |name: &str| {
            let code = format!(
                "create('images', NAME + '-{name}', 4 * M, order=16, data_pool={argument})
with rbd.Image(io('images'), NAME + '-{name}') as image: print(image.id(), image.stat()['block_name_prefix'])"
            );
            let answer = String::from_utf8(lab.python(&code)).unwrap();
            let (id, prefix) = answer.trim().split_once(' ').unwrap();
            (ImageSpec::with_id("images", id), prefix.to_owned())
        };
        let (gone, prefix) = id("gone");
        let (other, other_prefix) = id("other");
        let pool = data_pool.unwrap_or("images");
        let plant = |prefix: &str, numbers: &str| {
            format!("for n in {numbers}: io('{pool}').write_full('{prefix}.%016x' % n, b'x' * 5000)")
        };
        lab.python(&plant(&other_prefix, "range(0, 64, 3)"));
        let sweep = |image: &ImageSpec| {
            let image = image.clone();
            let (client, progress, never) = (&client, &progress, &never);
            async move { client.sweep_objects(&image, 64, data_pool, &no_limits(), progress, never).await }
        };
        // in the trash it is not gone
        lab.python("trash('images', NAME + '-gone')");
        assert_eq!(sweep(&gone).await.unwrap_err().kind(), ErrorKind::Exists);
        lab.python(
            "for e in rbd.RBD().trash_list(io('images')):
    if e['name'] == NAME + '-gone': rbd.RBD().trash_remove(io('images'), e['id'], True)",
        );
        lab.python(&plant(&prefix, "range(0, 64, 5)"));
        assert_eq!(sweep(&gone).await.unwrap(), 13, "{data_pool:?}");
        assert_eq!(sweep(&gone).await.unwrap(), 0);
        assert_eq!(sweep(&other).await.unwrap_err().kind(), ErrorKind::Exists);
        assert_eq!(objects_with(&lab, pool, &other_prefix).len(), 22);
        lab.python("rbd.RBD().remove(io('images'), NAME + '-other')");
    }
}

/// Glance moves an image to the trash whose snapshot a clone of format 2 still needs.
#[tokio::test(flavor = "multi_thread")]
async fn an_image_in_the_trash_is_filled_and_detached_by_its_id() {
    let lab = Lab::new();
    let (client, source) = with_many_objects(&lab).await;
    let expected = lab.data(&source, Some("s"));
    let early = Early::publish(&client, &source, &lab.name, Features::WITHOUT_MAPS).await;
    lab.python(
        "cluster.conf_set('rbd_default_clone_format', '2')
clone('images', NAME + '-zimage', 'snap', 'volumes', NAME + '-zzchild')",
    );
    let (state, never) = (Mutex::new(FillState::default()), CancellationToken::new());
    let delete = async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        tokio::task::block_in_place(|| {
            lab.python(
                "with rbd.Image(io('images'), NAME + '-zimage') as image:
    image.unprotect_snap('snap'); image.remove_snap('snap')
trash('images', NAME + '-zimage')",
            )
        });
    };
    let pace = limits(2, 0, 60);
    let (filled, ()) = tokio::join!(early.fill(&client, &state, &pace, &never), delete);
    let filled = filled.unwrap();
    assert!(client.in_trash(&early.id).await.unwrap() && filled.objects > 100, "{filled:?}");
    early.detach(&client).await;
    let now = client.image(&early.id, None).await.unwrap().unwrap();
    // (a clone of format 2 sets a feature bit on its parent)
    assert_eq!((now.parent, now.flags), (None, 0));
    assert_eq!(now.features.0 & !Features::OPERATIONS.0, Features::PUBLISHED.0);
    assert!(client.in_trash(&early.id).await.unwrap());

    let ImageKey::Id(id) = &early.id.image else { unreachable!() };
    lab.python(&format!(
        "import struct
i = io('images'); image = rbd.Image(i, image_id='{id}', read_only=True)
snapshot, = list(image.list_snaps())
assert snapshot['namespace'] == rbd.RBD_SNAP_NAMESPACE_TYPE_TRASH, snapshot
image.set_snap_by_id(snapshot['id'])
assert image.flags() == 0
try: image.parent_info(); raise SystemExit('the snapshot has a parent')
except rbd.ImageNotFound: pass
prefix = image.stat()['block_name_prefix']
_, answer = i.execute('rbd_object_map.{id}.%016x' % snapshot['id'], 'rbd', 'object_map_load', b'')
states = answer[4 + int.from_bytes(answer[:4], 'little'):]
for number in range(image.stat()['num_objs']):
    try: i.stat('%s.%016x' % (prefix, number)); there = True
    except rados.ObjectNotFound: there = False
    assert there == (states[number // 4] >> (6 - 2 * (number % 4)) & 3 != 0), number"
    ));
    early.release(&client, &source).await;
    lab.python(DELETE_SOURCE_WITHOUT_SNAPSHOT);
    let child = ImageSpec::named("volumes", format!("{}-zzchild", lab.name));
    assert!(lab.data(&child, None) == expected);
    lab.python(&format!(
        "rbd.RBD().remove(io('volumes'), NAME + '-zzchild'); rbd.RBD().trash_remove(io('images'), '{id}', True)"
    ));
    assert_eq!(objects_with(&lab, "images", id), Vec::<String>::new());
}

const DELETE_SOURCE_WITHOUT_SNAPSHOT: &str = "
with rbd.Image(io('volumes'), NAME + '-volume') as image:
    for at in range(0, image.size(), M): image.write(bytes([255]) * M, at)
rbd.RBD().remove(io('volumes'), NAME + '-volume')";

/// Cinder deletes the snapshot that the fill copies from, and the guest goes on writing: all that between two looks at
/// the image's parents. What is at the snapshot's id then is what was written since.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_written_after_the_snapshot_is_not_copied() {
    const OVERWRITE: &str = "
with rbd.Image(io('volumes'), NAME + '-zanchor') as image: image.flatten()
with rbd.Image(io('volumes'), NAME + '-volume') as image:
    image.unprotect_snap('s'); image.remove_snap('s')
    for at in range(0, image.size(), M): image.write(bytes([255]) * M, at)";
    let lab = Lab::new();
    let client = lab.client().await;
    lab.python("v = NAME + '-volume'; create('volumes', v, 12 * M, order=16); write('volumes', v, 0, 12 * M, 1)");
    let source = lab.volume();
    snapshotted(&client, &source).await;
    let expected = lab.data(&source, Some("s"));
    let early = Early::publish(&client, &source, &lab.name, Features::WITHOUT_MAPS).await;
    let (state, never) = (Mutex::new(FillState::default()), CancellationToken::new());
    let overwrite = async {
        // the fill looks after 2 s, and is over before it looks again
        tokio::time::sleep(Duration::from_millis(2100)).await;
        let began = Instant::now();
        tokio::task::block_in_place(|| lab.python(OVERWRITE));
        eprintln!("overwritten within {:.1?}", began.elapsed());
    };
    let began = Instant::now();
    let pace = limits(2, 0, 60);
    let (filled, ()) = tokio::join!(early.fill(&client, &state, &pace, &never), overwrite);
    eprintln!("filled within {:.1?}: {filled:?}", began.elapsed());
    filled.unwrap();
    early.detach(&client).await;
    is_detached(&lab, &client, &early).await;
    assert_eq!(client.remove_image(&early.anchor).await.unwrap(), Changed::Yes);
    for snapshot in [None, Some("snap")] {
        let found = lab.data(&early.image, snapshot);
        let wrong = found.iter().zip(&expected).position(|(found, expected)| found != expected);
        assert_eq!(wrong, None, "{snapshot:?}: first byte that differs");
    }
}

/// Cinder deletes the source: it flattens the anchor, and the snapshot that the fill copies from goes.
#[tokio::test(flavor = "multi_thread")]
async fn a_fill_goes_on_from_the_anchor_when_the_source_is_deleted() {
    let lab = Lab::new();
    let (client, source) = with_many_objects(&lab).await;
    let expected = lab.data(&source, Some("s"));
    let early = Early::publish(&client, &source, &lab.name, Features::WITHOUT_MAPS).await;
    let (state, never) = (Mutex::new(FillState::default()), CancellationToken::new());
    let delete = async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        tokio::task::block_in_place(|| {
            lab.python(&format!(
                "with rbd.Image(io('volumes'), NAME + '-zanchor') as image: image.flatten()\n{DELETE_SOURCE}"
            ))
        });
    };
    let pace = limits(2, 0, 25);
    let (filled, ()) = tokio::join!(early.fill(&client, &state, &pace, &never), delete);
    filled.unwrap();
    assert_eq!(client.chain(&early.anchor, "a").await.unwrap(), []);
    // the objects that the map of the removed snapshot knew are copied from the anchor
    assert_eq!(state.lock().unwrap().next_object, 192);
    early.detach(&client).await;
    is_detached(&lab, &client, &early).await;
    // an anchor has no object map: clients ask for all of its objects
    assert_eq!(objects_of(&lab, &early), 192);
    assert_eq!(client.remove_image(&early.anchor).await.unwrap(), Changed::Yes);
    assert!(lab.data(&early.image, None) == expected && lab.data(&early.image, Some("snap")) == expected);
}
