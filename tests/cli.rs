//! The promises of the command line, with the real binary against the lab that `make test` starts.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "common/env.rs"]
mod env;
#[path = "common/python.rs"]
mod python;
#[path = "common/schemas.rs"]
mod schemas;

use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use futures::{StreamExt, stream};
use jiff::{SignedDuration, Timestamp};
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions, QueueDeleteOptions};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Connection, ConnectionProperties};
use rbd_offload::ceph::{Client, Objects};
use rbd_offload::config::Config;
use rbd_offload::job::clock::Clock;
use rbd_offload::job::record::{Record, Stage, State};
use rbd_offload::job::signal::Signal;
use rbd_offload::job::store::Store;
use rbd_offload::notification::TransportUrl;
use rbd_offload::openstack::{Cloud, ImageChange, Session, Tenant};
use rbd_offload::request::{Source, Trigger};
use rbd_offload::transfer::Method;
use serde_json::{Value, json};
use tempfile::TempDir;
use unicode_width::UnicodeWidthChar;
use uuid::Uuid;

use env::lab_var;

/// One `check` at a time: each makes snapshots in three pools, and has ten seconds for each.
static CHECKING: Mutex<()> = Mutex::new(());

/// Statuses of sysexits(3).
const USAGE: i32 = 64;
const DATA: i32 = 65;
const NO_INPUT: i32 = 66;
const UNAVAILABLE: i32 = 69;
const IO: i32 = 74;
const TEMPORARY: i32 = 75;
const CONFIG: i32 = 78;

fn block_on<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap().block_on(work)
}

/// A configuration for the lab with a namespace of its own, which is emptied at the end.
struct Setup {
    dir: TempDir,
    namespace: String,
    text: String,
}

impl Setup {
    fn new() -> Self {
        let namespace = format!("test-{}", Uuid::new_v4());
        let text = format!(
            "[messaging]\ntransport_url = {}\nqueue = rbd-offload-{namespace}\nexchanges = glance, openstack\n\
             [keystone]\nauth_url = {}\nusername = offload\npassword = {}\nproject_name = service\n\
             region_name = RegionOne\n[ceph]\nconf = {}\nuser = rbd-offload\n[jobs]\nnamespace = {namespace}\n\
             [backend:ceph]\npool = volumes\n[backend:ceph2]\npool = volumes2\n\
             [backend:ceph-offload]\npool = volumes\n",
            lab_var("RBDLAB_OFFLOAD_AMQP"),
            lab_var("RBDLAB_KEYSTONE"),
            lab_var("RBDLAB_OFFLOAD_PASSWORD"),
            PathBuf::from(lab_var("RBDLAB_DIR")).join("ceph/ceph.conf").display(),
        );
        let setup = Self { dir: tempfile::tempdir().unwrap(), namespace, text };
        setup.write();
        setup
    }

    fn write(&self) {
        std::fs::write(self.path("rbd-offload.conf"), &self.text).unwrap();
    }

    /// Changes what the configuration says.
    fn with(mut self, old: &str, new: &str) -> Self {
        assert!(self.text.contains(old), "{old:?} is not in {}", self.text);
        self.text = self.text.replacen(old, new, 1);
        self.write();
        self
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn config(&self) -> Config {
        Config::parse("test".as_ref(), &self.text).unwrap()
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_rbd-offload"));
        command.arg("--config").arg(self.path("rbd-offload.conf")).args(arguments).stdin(Stdio::null());
        command
    }

    fn run(&self, arguments: &[&str]) -> Ran {
        let ran = Ran::of(self.command(arguments).output().unwrap());
        if !ran.out.is_empty() {
            schemas::validate_output(arguments, &ran.out);
        }
        ran
    }

    async fn objects(&self) -> Arc<dyn Objects> {
        let ceph = PathBuf::from(lab_var("RBDLAB_DIR")).join("ceph/ceph.conf");
        let client = Client::connect(&ceph, "rbd-offload").await.unwrap();
        Arc::new(client.objects("images", &self.namespace).unwrap())
    }

    async fn store(&self) -> Store {
        Store::new(self.objects().await, Clock::System)
    }

    fn session(&self) -> Session {
        let config = self.config();
        Session::connect(&config.keystone, &config.glance).unwrap()
    }
}

impl Drop for Setup {
    fn drop(&mut self) {
        block_on(async {
            let objects = self.objects().await;
            for object in objects.list().await.unwrap() {
                if let Some((_, version)) = objects.read(&object).await.unwrap() {
                    let _ = objects.remove(&object, version, None).await;
                }
            }
        });
    }
}

/// How a command ended.
#[derive(Debug)]
struct Ran {
    code: Option<i32>,
    out: String,
    err: String,
}

impl Ran {
    fn of(output: Output) -> Self {
        Self {
            code: output.status.code(),
            out: String::from_utf8(output.stdout).unwrap(),
            err: String::from_utf8(output.stderr).unwrap(),
        }
    }

    fn json(&self) -> Value {
        assert_eq!(self.code, Some(0), "{self:?}");
        serde_json::from_str(&self.out).unwrap_or_else(|e| panic!("{e}: {self:?}"))
    }

    /// It failed with this status and a sentence for a person.
    fn failed(&self, code: i32, part: &str) {
        assert_eq!(self.code, Some(code), "{self:?}");
        assert!(self.err.starts_with("rbd-offload: ") && self.err.contains(part), "{part:?} is missing: {self:?}");
    }
}

/// The rows of a `check`.
struct Checked {
    code: Option<i32>,
    text: String,
    rows: Vec<Value>,
}

fn one_at_a_time() -> MutexGuard<'static, ()> {
    CHECKING.lock().unwrap_or_else(PoisonError::into_inner)
}

fn check(setup: &Setup) -> Checked {
    let _one = one_at_a_time();
    check_alone(setup)
}

/// The same, where the caller has seen to it that it is the only one.
fn check_alone(setup: &Setup) -> Checked {
    let ran = setup.run(&["check", "--json"]);
    let text = format!("{}{}", ran.out, ran.err);
    for secret in ["RBDLAB_OFFLOAD_PASSWORD", "RBDLAB_OFFLOAD_AMQP_PASSWORD"] {
        assert!(!text.contains(&lab_var(secret)), "{secret} is in {text}");
    }
    assert!(!text.contains("Wr0ng"), "{text}");
    let rows = serde_json::from_str(&ran.out).unwrap_or_else(|e| panic!("{e}: {ran:?}"));
    Checked { code: ran.code, text, rows }
}

impl Checked {
    fn row(&self, name: &str) -> (&str, &str, &str) {
        let mut rows = self.rows.iter().filter(|row| row["check"] == name);
        let row = rows.next().unwrap_or_else(|| panic!("no row {name:?}: {}", self.text));
        (row["result"].as_str().unwrap(), row["detail"].as_str().unwrap(), row["remedy"].as_str().unwrap_or_default())
    }

    fn faults(&self) -> Vec<&str> {
        let faults = self.rows.iter().filter(|row| row["result"] == "fault");
        faults.map(|row| row["check"].as_str().unwrap()).collect()
    }

    /// The row is a fault whose reason and remedy hold these words.
    fn fault(&self, name: &str, reason: &str, remedy: &str) {
        assert_eq!(self.code, Some(1), "{}", self.text);
        let (result, detail, says) = self.row(name);
        assert_eq!(result, "fault", "{name}: {}", self.text);
        assert!(detail.contains(reason), "{name}: {reason:?} is not in {detail:?}");
        assert!(says.contains(remedy), "{name}: {remedy:?} is not in {says:?}");
    }
}

fn broker(port: &str) -> String {
    format!("RabbitMQ 127.0.0.1:{port}")
}

#[test]
fn check_passes_where_all_holds_and_leaves_nothing() {
    let setup = Setup::new();
    let _one = one_at_a_time();
    let before = block_on(leftovers());
    let ran = setup.run(&["check"]);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert!(ran.out.ends_with("all checks passed\n") && !ran.out.contains('\x1b'), "{ran:?}");
    for row in [
        "configuration ",
        &broker(&lab_var("RBDLAB_AMQP_PORT")),
        "RabbitMQ queue rbd-offload-test-",
        "RabbitMQ exchange glance ",
        "RabbitMQ exchange openstack ",
        "Keystone ",
        "Keystone roles ",
        "clock ",
        "Glance ",
        "Glance location API ",
        "Glance status ",
        "Glance stores ",
        "Cinder ",
        "Cinder backends ",
        "Ceph ",
        "Ceph release ",
        "Ceph fencing ",
        "Ceph pool images ",
        "Ceph pool volumes ",
        "Ceph pool volumes2 ",
        "Ceph pool vms ",
        "Ceph jobs in images/test-",
    ] {
        let line =
            ran.out.lines().find(|line| line.starts_with(row)).unwrap_or_else(|| panic!("{row} is missing: {ran:?}"));
        assert!(line.contains("  ok"), "{line}");
    }
    assert_eq!(block_on(async { setup.objects().await.list().await.unwrap() }), Vec::<String>::new());
    // another check may run in this lab: its images go
    let left = |_: &u32| {
        std::thread::sleep(Duration::from_millis(500));
        block_on(leftovers()).iter().any(|image| !before.contains(image))
    };
    assert!((0..20).take_while(left).count() < 20, "left behind: {:?}", block_on(leftovers()));
}

/// Images of probes, in all pools.
async fn leftovers() -> Vec<String> {
    use rbd_offload::ceph::Storage;
    let ceph = PathBuf::from(lab_var("RBDLAB_DIR")).join("ceph/ceph.conf");
    let client = Client::connect(&ceph, "rbd-offload").await.unwrap();
    let mut images = Vec::new();
    for pool in ["images", "volumes", "volumes2", "vms"] {
        images.extend(client.images(pool, "rbd-offload.check-", None, 1000).await.unwrap().entries);
    }
    images
}

#[test]
fn check_names_faults_of_each_broker_and_a_missing_role_and_capability() {
    let port = lab_var("RBDLAB_AMQP_PORT");
    let good = lab_var("RBDLAB_OFFLOAD_AMQP");
    // localhost: another row for the same broker
    let hosts = good.replace(&format!("@127.0.0.1:{port}/"), &format!("@127.0.0.1:1,offload:Wr0ng@localhost:{port},"));
    let hosts = format!("{hosts}{}", good.strip_prefix("rabbit://").unwrap());
    let setup = Setup::new()
        .with(&good, &hosts)
        .with("username = offload", "username = offload-noservice")
        .with("user = rbd-offload", "user = rbd-offload-nocaps");
    let checked = check(&setup);
    checked.fault(&broker("1"), "cannot be reached", "whether the broker runs");
    checked.fault(&format!("RabbitMQ localhost:{port}"), "wrong user or password", "transport_url");
    assert_eq!(checked.row(&broker(&port)).0, "ok", "{}", checked.text);
    assert_eq!(checked.row("RabbitMQ exchange glance").0, "ok");
    checked.fault(
        "Keystone roles",
        "lacks the role service",
        "openstack role add --user offload-noservice --user-domain Default --project service --project-domain Default service",
    );
    checked.fault(
        "Ceph pool volumes",
        "missing: osd 'profile rbd pool=volumes'",
        "ceph auth caps client.rbd-offload-nocaps",
    );
    checked.fault("Ceph pool volumes2", "missing: osd 'profile rbd pool=volumes2'", "profile rbd pool=volumes2");
    assert_eq!(checked.row("Ceph pool images").0, "ok");
    assert_eq!(checked.faults().len(), 5, "{}", checked.text);
}

#[test]
fn check_names_a_wrong_vhost_pool_and_backend_and_all_missing_roles() {
    let good = lab_var("RBDLAB_OFFLOAD_AMQP");
    let setup = Setup::new()
        .with(&good, &format!("{good}nosuch"))
        .with("username = offload", "username = offload-reader")
        .with("pool = volumes2", "pool = volumez\ndest_pool = vms");
    let checked = check(&setup);
    checked.fault(&broker(&lab_var("RBDLAB_AMQP_PORT")), "no virtual host nosuch", "transport_url");
    assert_eq!(checked.row("RabbitMQ exchange glance").0, "skipped");
    checked.fault("Keystone roles", "service", "openstack role add");
    checked.fault("Keystone roles", "admin", "openstack role add");
    checked.fault("Ceph pool volumez", "no such pool; pools here: ", "[backend:ceph2] pool");
    assert_eq!(checked.row("Ceph pool vms").0, "ok");
}

#[test]
fn check_names_a_wrong_password_key_and_exchange() {
    let setup = Setup::new()
        .with(&format!("password = {}", lab_var("RBDLAB_OFFLOAD_PASSWORD")), "password = Wr0ng")
        .with("exchanges = glance, openstack", "exchanges = glance, nosuch, nova")
        .with("user = rbd-offload", "user = nobody");
    let checked = check(&setup);
    checked.fault("Keystone", "wrong password", "[keystone]");
    for name in ["Keystone roles", "Glance", "Cinder", "Ceph pool volumes", "Glance stores"] {
        assert_eq!(checked.row(name).0, "skipped", "{name}");
    }
    checked.fault("RabbitMQ exchange nosuch", "does not exist", "control_exchange");
    // the integration with Nova is off
    assert_eq!(checked.row("RabbitMQ exchange nova").0, "warning");
    checked.fault("Ceph", "no key for client.nobody", "[ceph]");
    assert_eq!(checked.faults(), ["RabbitMQ exchange nosuch", "Keystone", "Ceph"]);
}

#[test]
fn check_compares_sections_backends_and_stores() {
    let setup =
        Setup::new().with("[backend:ceph2]\npool = volumes2", "[backend:lvm]\npool = volumes2\ndest_pool = vms");
    let checked = check(&setup);
    checked.fault("Cinder backends", "without a section: ceph2", "[backend:ceph2]");
    checked.fault("Cinder backends", "Cinder has no backend lvm", "enabled_backends");
    checked.fault("Glance stores", "[backend:lvm] dest_pool = vms", "dest_pool");
    assert_eq!(checked.faults(), ["Cinder backends", "Glance stores"]);
}

/// A command of Ceph as its administrator.
fn ceph(program: &str, arguments: &[&str]) {
    let ceph = PathBuf::from(lab_var("RBDLAB_DIR")).join("ceph");
    let mut command = Command::new(program);
    command.arg("-c").arg(ceph.join("ceph.conf")).arg("--keyring").arg(ceph.join("client.admin.keyring"));
    let output = command.args(["--id", "admin"]).args(arguments).output().unwrap();
    assert!(output.status.success(), "{arguments:?}: {output:?}");
}

#[test]
fn check_compares_the_data_pool_with_the_images_that_are_there() {
    let setup = Setup::new().with("pool = volumes2", "pool = volumes2\ndest_pool = vms");
    let with = |data_pool: &str| {
        Setup::new().with(
            "[backend:ceph2]\npool = volumes2",
            &format!("[glance]\ndata_pool = {data_pool}\n[backend:ceph2]\npool = volumes2\ndest_pool = vms"),
        )
    };
    // what else is checked meanwhile must not see the image in `vms`
    let _one = one_at_a_time();
    let image = format!("vms/{}", Uuid::new_v4());
    ceph("rbd", &["create", "--size", "1M", "--data-pool", "ecdata", &image]);
    let unset = check_alone(&setup);
    let set = check_alone(&with("ecdata"));
    ceph("rbd", &["rm", "--no-progress", &image]);
    let (result, detail, remedy) = unset.row("Ceph pool vms");
    assert_eq!(result, "warning", "{}", unset.text);
    assert!(detail.contains("have their data in ecdata") && detail.contains("would have it in vms"), "{detail}");
    assert!(remedy.contains("[glance] data_pool = ecdata"), "{remedy}");
    let (result, detail, _) = set.row("Ceph pool vms");
    assert!(result == "ok" && detail.contains("data in ecdata"), "{}", set.text);
    // volumes are none of Glance's images
    assert!(!set.row("Ceph pool volumes").1.contains("ecdata"), "{}", set.text);

    check_alone(&with("nosuch")).fault("Ceph pool vms", "no such pool; pools here: ", "[glance] data_pool");
    let ran = with("nosuch").run(&["run"]);
    assert!(ran.code == Some(CONFIG) && ran.err.contains("rbd-offload: [glance] data_pool = nosuch: "), "{ran:?}");
    let appends = format!("test-{}", Uuid::new_v4());
    ceph("ceph", &["osd", "pool", "create", &appends, "1", "1", "erasure", "ec21"]);
    let checked = check_alone(&with(&appends));
    ceph("ceph", &["osd", "pool", "rm", &appends, &appends, "--yes-i-really-really-mean-it"]);
    checked.fault("Ceph pool vms", "does not allow overwrites", "allow_ec_overwrites true");
    let poor = with("ecdata").with("user = rbd-offload", "user = rbd-offload-nocaps");
    check_alone(&poor).fault("Ceph pool images", "missing: osd 'profile rbd pool=ecdata'", "profile rbd pool=ecdata");
}

/// Monitors that take connections and say nothing.
#[test]
fn check_gives_up_on_silent_monitors_and_a_silent_keystone() {
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = silent.local_addr().unwrap();
    let setup = Setup::new();
    let ceph = PathBuf::from(lab_var("RBDLAB_DIR")).join("ceph");
    let keyring = ceph.join("client.rbd-offload.keyring").display().to_string();
    let conf = format!("[global]\nfsid = {}\nmon host = v2:{address}\nkeyring = {keyring}\n", lab_var("RBDLAB_FSID"));
    std::fs::write(setup.path("ceph.conf"), conf).unwrap();
    let own = setup.path("ceph.conf").display().to_string();
    let setup = setup
        .with(&ceph.join("ceph.conf").display().to_string(), &own)
        .with(&lab_var("RBDLAB_KEYSTONE"), &format!("http://{address}/v3"));
    let begun = Instant::now();
    let checked = check(&setup);
    // Keystone is asked twice, and no Ceph client is there to wait for
    assert!(begun.elapsed() < Duration::from_secs(60), "{:?}", begun.elapsed());
    checked.fault("Ceph", "no answer within 10 s", "mon_host");
    checked.fault("Keystone", "no answer within 10 s", "auth_url");
    assert_eq!(checked.row("Ceph pool volumes").0, "skipped");
    assert_eq!(checked.row("RabbitMQ exchange glance").0, "ok");
}

/// Answers 503 to the first requests, as a service whose worker starts, and passes on what follows.
fn starts_late(target: &str, refusals: usize) -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let target = target.strip_prefix("http://").unwrap().split('/').next().unwrap().to_owned();
    std::thread::spawn(move || {
        for (number, stream) in listener.incoming().enumerate() {
            let (mut stream, target) = (stream.unwrap(), target.clone());
            std::thread::spawn(move || {
                use std::io::Read;
                if number < refusals {
                    let _ = stream.read(&mut [0; 65536]);
                    let _ = stream.write_all(
                        b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\nconnection: close\r\n\r\n",
                    );
                    return;
                }
                let upstream = std::net::TcpStream::connect(target).unwrap();
                let (mut from, mut to) = (stream.try_clone().unwrap(), upstream.try_clone().unwrap());
                std::thread::spawn(move || {
                    let _ = std::io::copy(&mut from, &mut to);
                    let _ = to.shutdown(std::net::Shutdown::Write);
                });
                let _ = std::io::copy(&mut &upstream, &mut stream);
            });
        }
    });
    format!("http://{address}")
}

#[test]
fn check_waits_for_a_service_that_has_just_started_and_says_so() {
    let keystone = lab_var("RBDLAB_KEYSTONE");
    let path = keystone.strip_prefix("http://").and_then(|rest| rest.split_once('/')).map_or("", |(_, path)| path);
    let late = format!("{}/{path}", starts_late(&keystone, 4));
    let checked = check(&Setup::new().with(&keystone, &late));
    assert_eq!(checked.code, Some(0), "{}", checked.text);
    let (result, detail, _) = checked.row("Keystone");
    assert!(result == "ok" && detail.contains("; attempt "), "{detail}");

    let begun = Instant::now();
    let checked = check(&Setup::new().with(&keystone, &format!("{}/{path}", starts_late(&keystone, usize::MAX))));
    checked.fault("Keystone", "503 Service Unavailable; attempt ", "see whether");
    // Keystone is asked twice
    assert!(begun.elapsed() < Duration::from_secs(60), "{:?}", begun.elapsed());
}

/// A proxy that is not there, in every variable that a client may read.
const DEAD_PROXIES: [(&str, &str); 4] = [
    ("http_proxy", "http://127.0.0.1:1"),
    ("https_proxy", "http://127.0.0.1:1"),
    ("all_proxy", "http://127.0.0.1:1"),
    ("no_proxy", ""),
];

#[test]
fn proxies_of_the_environment_are_ignored_unless_the_configuration_names_one() {
    let setup = Setup::new();
    let _one = one_at_a_time();
    let ran = Ran::of(setup.command(&["check"]).envs(DEAD_PROXIES).output().unwrap());
    assert_eq!(ran.code, Some(0), "{ran:?}");

    let setup = setup.with("region_name = RegionOne", "region_name = RegionOne\nproxy = http://127.0.0.1:1");
    let ran = setup.run(&["check"]);
    assert_eq!(ran.code, Some(1), "{ran:?}");
    assert!(ran.out.lines().any(|line| line.starts_with("Keystone ") && line.contains("FAULT")), "{ran:?}");
    // with one that is there every request goes through it
    let proxy = starts_late(&lab_var("RBDLAB_KEYSTONE"), 0);
    let setup = setup.with("proxy = http://127.0.0.1:1", &format!("proxy = {proxy}"));
    let ran = setup.run(&["check"]);
    assert!(ran.out.lines().any(|line| line.starts_with("Keystone ") && line.contains("  ok")), "{ran:?}");
}

#[test]
fn a_tenants_request_goes_through_the_proxy_of_the_environment_as_openstacks_own_client_does() {
    let request = |proxies: &[(&str, &str)]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_rbd-offload"));
        command.args(["request", "--volume", &Uuid::new_v4().to_string(), "--name", "proxied"]);
        command.envs([
            ("OS_AUTH_URL", lab_var("RBDLAB_KEYSTONE").as_str()),
            ("OS_USERNAME", "nobody"),
            ("OS_PASSWORD", "secret"),
            ("OS_PROJECT_NAME", "demo"),
        ]);
        Ran::of(command.envs(proxies.iter().copied()).output().unwrap())
    };
    request(&DEAD_PROXIES).failed(UNAVAILABLE, "127.0.0.1");
    let mut without = DEAD_PROXIES;
    without[3].1 = "127.0.0.1";
    // Keystone answers, and does not know the user
    request(&without).failed(77, "401");
}

/// Capabilities are taken away one by one.
#[test]
fn check_names_each_missing_capability() {
    let setup = Setup::new();
    let user = format!("rbd-offload-{}", setup.namespace);
    let ceph = PathBuf::from(lab_var("RBDLAB_DIR")).join("ceph");
    let admin = |arguments: &[&str]| {
        let output = Command::new("ceph")
            .arg("-c")
            .arg(ceph.join("ceph.conf"))
            .args(["-n", "client.admin", "--keyring"])
            .arg(ceph.join("client.admin.keyring"))
            .args(arguments)
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        output.stdout
    };
    let entity = format!("client.{user}");
    let keyring = admin(&["auth", "get-or-create", &entity, "mon", "allow r"]);
    std::fs::write(setup.path("keyring"), keyring).unwrap();
    let own = format!("user = {user}\nkeyring = {}", setup.path("keyring").display());
    let setup = setup.with("user = rbd-offload", &own);

    let caps = |mon, osd: &str| admin(&["auth", "caps", &entity, "mon", mon, "mgr", "profile rbd", "osd", osd]);

    let sources = "profile rbd pool=volumes, profile rbd pool=volumes2";
    let lacks_vms = "missing: osd 'profile rbd pool=vms'";
    for (mon, osd, faults) in [
        ("allow r", format!("{sources}, profile rbd pool=images"), vec!["Ceph fencing"]),
        ("profile rbd", sources.to_owned(), vec!["Ceph pool images", "Ceph jobs in images/"]),
        (
            "profile rbd",
            format!("{sources}, profile rbd pool=images namespace=x"),
            vec!["Ceph pool images", "Ceph jobs in images/"],
        ),
    ] {
        caps(mon, &osd);
        if mon == "allow r" {
            let ran = setup.run(&["run"]);
            assert!(ran.code == Some(77) && ran.err.contains(&format!("{entity} must not fence")), "{ran:?}");
        }
        let checked = check(&setup);
        let found = checked.faults();
        assert_eq!(found.len(), faults.len(), "{}", checked.text);
        for (name, expected) in found.into_iter().zip(faults) {
            assert!(name.starts_with(expected), "{}", checked.text);
            checked.fault(
                name,
                "missing: ",
                &format!("ceph auth caps {entity} mon 'profile rbd' mgr 'profile rbd' osd '"),
            );
        }
        // instances can be asked for, but need not be
        let (verdict, detail, remedy) = checked.row("Ceph pool vms");
        assert_eq!(verdict, "warning", "{}", checked.text);
        assert!(detail.contains("instances cannot be a source") && detail.contains(lacks_vms), "{detail}");
        assert!(remedy.contains("profile rbd pool=vms"), "{remedy}");
    }
    caps("profile rbd", &format!("{sources}, profile rbd pool=images"));
    let elsewhere = setup.with("[jobs]", "[nova]\npool = nosuch\n[jobs]");
    let checked = check(&elsewhere);
    assert_eq!(checked.faults(), Vec::<&str>::new());
    assert!(checked.row("Ceph pool nosuch").1.contains("no such pool"), "{}", checked.text);
    let integrated = elsewhere.with("pool = nosuch", "integration = true");
    check(&integrated).fault("Ceph pool vms", lacks_vms, "profile rbd pool=vms");
    admin(&["auth", "rm", &entity]);
}

#[test]
fn check_sees_a_queue_of_other_arguments_and_one_that_grows() {
    let setup = Setup::new();
    let queue = setup.config().messaging.queue;
    let url = TransportUrl::parse(&lab_var("RBDLAB_OFFLOAD_AMQP")).unwrap();
    let declare = async |kind: &str, messages: usize| {
        let connection =
            Connection::connect_uri(url.amqp_uri(&url.hosts[0]), ConnectionProperties::default()).await.unwrap();
        let channel = connection.create_channel().await.unwrap();
        let _ = channel.queue_delete(queue.as_str().into(), QueueDeleteOptions::default()).await;
        if kind.is_empty() {
            return;
        }
        let mut arguments = FieldTable::default();
        let (kind, as_configured) = kind.split_once(' ').map_or((kind, true), |(kind, _)| (kind, false));
        arguments.insert("x-queue-type".into(), AMQPValue::LongString(kind.into()));
        if as_configured {
            arguments.insert("x-max-length".into(), AMQPValue::LongInt(100_000));
            arguments.insert("x-overflow".into(), AMQPValue::LongString("drop-head".into()));
            arguments.insert("x-expires".into(), AMQPValue::LongInt(604_800_000));
        }
        let options = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
        channel.queue_declare(queue.as_str().into(), options, arguments).await.unwrap();
        channel.confirm_select(ConfirmSelectOptions::default()).await.unwrap();
        for _ in 0..messages {
            let (to, options) = (queue.as_str().into(), BasicPublishOptions::default());
            let sent = channel.basic_publish("".into(), to, options, b"{}", BasicProperties::default()).await.unwrap();
            sent.await.unwrap();
        }
        connection.close(200, "".into()).await.unwrap();
    };
    let name = format!("RabbitMQ queue {queue}");
    block_on(declare("quorum", 0));
    assert_eq!(check(&setup).row(&name).0, "ok");
    block_on(declare("quorum", 3));
    check(&setup).fault(&name, "3 wait and no daemon consumes them", "start the daemon");
    block_on(declare("classic", 0));
    check(&setup).fault(&name, "other arguments than queue_type = quorum, queue_max_length = 100000", "delete_queue");
    block_on(declare("quorum unlimited", 2));
    let checked = check(&setup);
    checked.fault(&name, "queue_expires = 7d", "start the daemon: it takes the messages that wait");
    checked.fault(&name, "inequivalent arg", "delete_queue");
    block_on(declare("", 0));
    let shared =
        setup.with(&format!("queue = {queue}"), "queue = rbd-offload\n[offload]\ndecline_after = 5s\n[messaging]");
    let checked = check(&shared);
    let (verdict, _, remedy) = checked.row("RabbitMQ queue rbd-offload");
    assert!(verdict == "warning" && remedy.contains("a [messaging] queue of its own"), "{}", checked.text);
}

#[test]
fn a_wrong_command_line_or_configuration_has_its_own_status() {
    let setup = Setup::new().with("exchanges =", "exchangez =");
    setup.run(&["check"]).failed(CONFIG, "exchangez");
    setup.run(&["jobs"]).failed(CONFIG, "exchangez");
    let ran = Ran::of(
        Command::new(env!("CARGO_BIN_EXE_rbd-offload")).args(["--config", "/nonexistent", "jobs"]).output().unwrap(),
    );
    ran.failed(NO_INPUT, "/nonexistent");
    setup.run(&["jobz"]).failed(USAGE, "jobz");
    setup.run(&["show", "1234"]).failed(USAGE, "UUID");
    setup.run(&["request", "--name", "n"]).failed(USAGE, "--volume");
    setup.run(&["request", "--volume", &Uuid::new_v4().to_string()]).failed(USAGE, "--name");
    setup.run(&["request", "--volume", &Uuid::new_v4().to_string(), "--dry-run", "--wait"]).failed(USAGE, "--wait");
    setup.run(&["request", "--name", "n", "--volume", "1234"]).failed(USAGE, "UUID");
    let id = Uuid::new_v4().to_string();
    setup.run(&["request", "--name", "n", "--volume", &id, "--snapshot", &id]).failed(USAGE, "cannot be used with");
    setup
        .run(&["request", "--name", "n", "--volume", &id, "--property", "rbd_offload_status=x"])
        .failed(USAGE, "daemon's own");
    setup.run(&["request", "--name", "n", "--volume", &id, "--property", "os_glance_x=x"]).failed(USAGE, "os_glance_x");
}

/// A job as a daemon has left it.
async fn put(store: &Store, change: impl FnOnce(&mut Record)) -> Record {
    let source = Some(Source::Volume(Uuid::new_v4()));
    let mut record = Record::new(Uuid::new_v4(), Trigger::Request, source, Some("p1".into()), Timestamp::now());
    change(&mut record);
    store.objects().create(&Store::object(record.image_id), &record.to_bytes()).await.unwrap();
    let stored = store.load(record.image_id).await.unwrap().unwrap();
    store.index(&stored).await.unwrap();
    record
}

fn ended(state: State) -> impl FnOnce(&mut Record) {
    move |record| {
        record.state = state;
        record.ended_at = Some(Timestamp::now());
        record.reason = Some("no \x1b[31mreason".into());
    }
}

#[test]
fn jobs_and_show_print_what_is_stored() {
    let setup = Setup::new();
    let (copying, declined, newer, broken) = block_on(async {
        let store = setup.store().await;
        let copying = put(&store, |record| {
            record.state = State::Copying;
            record.method = Some(Method::ServerCopy);
            record.progress = 42;
            (record.bytes_total, record.bytes_done) = (1000, 420);
            record.owner = Some("ctl1:7:x".into());
            record.stages = vec![Stage { name: "plan".into(), started_at: Timestamp::now(), seconds: Some(0.5) }];
        })
        .await;
        let declined = put(&store, ended(State::Declined)).await;
        let (newer, broken) = (Uuid::new_v4(), Uuid::new_v4());
        let newer_record = json!({"version": 99, "image_id": newer, "what": "ever"}).to_string();
        store.objects().create(&Store::object(newer), newer_record.as_bytes()).await.unwrap();
        store.objects().set_omap("index.live", &[(newer.to_string(), b"{}".to_vec())]).await.unwrap();
        store.objects().create(&Store::object(broken), b"not a record").await.unwrap();
        (copying, declined, newer, broken)
    });

    let ids = |value: &Value| -> Vec<String> {
        value.as_array().unwrap().iter().map(|job| job["image_id"].as_str().unwrap().to_owned()).collect()
    };
    let live = setup.run(&["jobs", "--json"]).json();
    assert_eq!(ids(&live), [copying.image_id.to_string(), newer.to_string()]);
    let all = setup.run(&["jobs", "--all", "--json"]).json();
    let mut unreadable = [newer.to_string(), broken.to_string()];
    unreadable.sort();
    let [first, second] = unreadable;
    assert_eq!(ids(&all), [copying.image_id.to_string(), declined.image_id.to_string(), first, second]);
    let newer_row = all.as_array().unwrap().iter().find(|job| job["image_id"] == newer.to_string()).unwrap();
    assert_eq!(newer_row["state"], "unreadable");
    assert!(newer_row["reason"].as_str().unwrap().contains("newer version"), "{newer_row}");

    let table = setup.run(&["jobs", "--all"]);
    assert_eq!(table.code, Some(0));
    let heading = "IMAGE STATE PROGRESS SOURCE PROJECT METHOD AGE OWNER REASON";
    let mut lines = table.out.lines();
    assert_eq!(lines.next().unwrap().split_whitespace().collect::<Vec<_>>().join(" "), heading);
    let row = lines.next().unwrap().split_whitespace().collect::<Vec<_>>().join(" ");
    let volume = copying.source.unwrap().id();
    assert!(row.starts_with(&format!("{} copying 42 % volume {volume} p1 server-copy", copying.image_id)), "{row}");
    assert!(row.ends_with("ctl1:7"), "{row}");
    assert_eq!(table.out.lines().filter(|line| line.contains("unreadable")).count(), 2, "{table:?}");
    assert!(!table.out.contains('\x1b'), "{table:?}");

    // a state that jobs end in needs no --all
    assert_eq!(ids(&setup.run(&["jobs", "--json", "--state", "declined"]).json()), [declined.image_id.to_string()]);
    let of_p1 = setup.run(&["jobs", "--json", "--project", "p1"]).json();
    assert_eq!(ids(&of_p1), [copying.image_id.to_string()]);
    assert_eq!(setup.run(&["jobs", "--json", "--project", "p2"]).json(), json!([]));
    let none = setup.run(&["jobs", "--project", "p2"]);
    assert_eq!((none.code, none.out.as_str()), (Some(0), ""), "{none:?}");
    assert!(none.err.contains("no such jobs; --all"), "{none:?}");
    let columns = setup.run(&["jobs", "--state", "copying", "--format", "image,state,size,reason"]);
    assert_eq!(
        columns.out.lines().next().unwrap().split_whitespace().collect::<Vec<_>>().join(" "),
        "IMAGE STATE SIZE REASON"
    );
    assert_eq!(columns.out.lines().count(), 2, "{columns:?}");
    setup.run(&["jobs", "--state", "broken"]).failed(USAGE, "detaching");
    setup.run(&["jobs", "--format", "image,nosuch"]).failed(USAGE, "attempts");

    let id = copying.image_id.to_string();
    let shown = setup.run(&["show", &id, "--json"]).json();
    assert_eq!(shown, live[0]);
    assert_eq!(shown["source"], json!({"kind": "volume", "id": volume}));
    assert_eq!(shown["stages"][0]["seconds"], 0.5);
    let text = setup.run(&["show", &id]);
    assert!(text.out.contains("state         copying\n") && text.out.contains("progress      42 %"), "{text:?}");

    setup.run(&["show", &Uuid::new_v4().to_string()]).failed(NO_INPUT, "there is no job");
    setup.run(&["show", &newer.to_string()]).failed(DATA, "newer version");
    setup.run(&["retry", &broken.to_string()]).failed(DATA, "not a job record");
}

/// The same document, once without each of its fields, once with each of them of another type, and with a field more
/// in each of its objects.
fn changed(document: &Value) -> Vec<Value> {
    let mut pointers = vec![String::new()];
    let mut seen = 0;
    while let Some(at) = pointers.get(seen).cloned() {
        seen += 1;
        match document.pointer(&at).unwrap() {
            Value::Object(fields) => pointers.extend(fields.keys().map(|name| format!("{at}/{name}"))),
            Value::Array(items) => pointers.extend((0..items.len()).map(|index| format!("{at}/{index}"))),
            _ => {}
        }
    }
    let mut all = Vec::new();
    for at in &pointers {
        let with = |change: &dyn Fn(&mut Value)| {
            let mut document = document.clone();
            change(document.pointer_mut(at).unwrap());
            document
        };
        all.push(with(&|value| *value = json!({"other": [1.5]})));
        for name in document.pointer(at).unwrap().as_object().into_iter().flat_map(|fields| fields.keys()) {
            all.push(with(&|value| drop(value.as_object_mut().unwrap().remove(name))));
        }
        if document.pointer(at).unwrap().is_object() {
            all.push(with(&|value| value["other"] = Value::Null));
        }
    }
    all
}

#[test]
fn the_schemas_take_what_is_printed_and_nothing_else() {
    let setup = Setup::new();
    let (job, unreadable) = block_on(async {
        let store = setup.store().await;
        let stage = Stage { name: "transfer".into(), started_at: Timestamp::now(), seconds: None };
        let job = put(&store, |record| record.stages = vec![stage]).await;
        let unreadable = Uuid::new_v4();
        store.objects().create(&Store::object(unreadable), b"not a record").await.unwrap();
        (job, unreadable)
    });
    let shown = setup.run(&["show", &job.image_id.to_string(), "--json"]).json();
    let listed = setup.run(&["jobs", "--all", "--json"]).json();
    assert_eq!((&listed[0], &listed[1]["image_id"]), (&shown, &json!(unreadable.to_string())));
    let checks = json!([
        {"check": "Nova", "result": "ok", "detail": "", "remedy": null},
        {"check": "Nova", "result": "warning", "detail": "is old", "remedy": "renew it"},
    ]);
    let source = json!({"kind": "volume", "id": unreadable});
    let forecast = json!({"source": source, "outcome": "taken", "reason": null, "checks": checks});
    for (schema, document) in
        [("job.json", &shown), ("jobs.json", &listed), ("check.json", &checks), ("dry-run.json", &forecast)]
    {
        assert_eq!(schemas::objections(schema, std::slice::from_ref(document)), [Vec::<String>::new()], "{document:#}");
        let changed = changed(document);
        assert!(changed.len() > 10);
        for (document, objections) in changed.iter().zip(schemas::objections(schema, &changed)) {
            assert!(!objections.is_empty(), "{schema} takes this too: {document:#}");
        }
    }

    let refused = |schema: &str, document: &Value, changes: &[(&str, Value)]| {
        let with = |(pointer, value): &(&str, Value)| {
            let mut document = document.clone();
            *document.pointer_mut(pointer).unwrap() = value.clone();
            document
        };
        let changed: Vec<Value> = changes.iter().map(with).collect();
        for (change, objections) in changes.iter().zip(schemas::objections(schema, &changed)) {
            assert!(!objections.is_empty(), "{schema} takes this too: {change:?}");
        }
    };
    let changes = [
        ("/state", json!("other")),
        ("/state", json!("unreadable")),
        ("/state", json!("done")),
        ("/ended_at", shown["created_at"].clone()),
        ("/created_at", json!("2026-01-01 00:00:00")),
        ("/created_at", json!("2026-01-01T00:00:00+01:00")),
        ("/image_id", json!("1234")),
        ("/progress", json!(101)),
        ("/progress", json!(-1)),
        ("/bytes_done", json!(0.5)),
        ("/owner", json!("ctl1")),
        ("/stages/0/name", json!("other")),
        ("/stages/0/seconds", json!(-0.5)),
        ("/source/kind", json!("image")),
    ];
    refused("job.json", &shown, &changes);
    let mut declined = shown.clone();
    (declined["state"], declined["ended_at"]) = (json!("declined"), shown["created_at"].clone());
    declined["reason"] = json!("there is no volume");
    assert_eq!(schemas::objections("job.json", std::slice::from_ref(&declined)), [Vec::<String>::new()]);
    refused("job.json", &declined, &[("/reason", Value::Null), ("/ended_at", Value::Null)]);
    let changes =
        [("/0/remedy", json!("renew it")), ("/1/remedy", Value::Null), ("/1/detail", json!("")), ("", json!([]))];
    refused("check.json", &checks, &changes);
    refused("dry-run.json", &forecast, &[("/reason", json!("no")), ("/outcome", json!("declined"))]);
}

/// Each example under a heading of the reference is by the schema that is linked there.
#[test]
fn the_examples_in_the_reference_are_by_the_schemas() {
    let reference = include_str!("../docs/reference/json.md");
    let mut seen = Vec::new();
    for section in reference.split("\n## ").skip(1) {
        let Some((_, example)) = section.split_once("```json\n") else { continue };
        let (_, schema) = section.split_once("](schemas/").unwrap();
        let schema = schema.split(')').next().unwrap();
        let example: Value = serde_json::from_str(example.split_once("\n```").unwrap().0).unwrap();
        assert_eq!(schemas::objections(schema, &[example]), [Vec::<String>::new()], "{schema}");
        seen.push(schema);
    }
    assert_eq!(seen, ["job.json", "jobs.json", "check.json", "dry-run.json"]);
}

/// What a terminal of this size gets from a command.
fn on_a_terminal(setup: &Setup, (columns, rows): (u16, u16), environment: &[(&str, &str)], command: &str) -> String {
    let program = env!("CARGO_BIN_EXE_rbd-offload");
    let config = setup.path("rbd-offload.conf");
    let line = format!(
        "stty cols {columns} rows {rows}; {}",
        command.replace("rbd-offload", &format!("{program} --config {}", config.display()))
    );
    let mut script = Command::new("script");
    script.args(["-qec", &line, "/dev/null"]).env_remove("NO_COLOR").env("TERM", "xterm").stdin(Stdio::null());
    let ran = Ran::of(script.envs(environment.iter().copied()).output().unwrap());
    assert!(!ran.out.contains("stty"), "{ran:?}");
    ran.out.replace('\r', "")
}

#[test]
fn a_terminal_gets_colours_and_lines_that_fit_and_a_pipe_gets_neither() {
    let setup = Setup::new();
    let failed = block_on(async {
        let store = setup.store().await;
        for _ in 0..8 {
            put(&store, |_| {}).await;
        }
        put(&store, |record| {
            ended(State::Failed)(record);
            record.reason = Some("日本語の理由".repeat(20));
        })
        .await
    });
    let width = |line: &str| line.chars().filter_map(UnicodeWidthChar::width).sum::<usize>();
    let plain = [("NO_COLOR", "1")];
    let shown = on_a_terminal(&setup, (90, 24), &plain, "rbd-offload jobs --all");
    assert_eq!(shown.lines().count(), 10, "{shown}");
    assert!(shown.lines().all(|line| width(line) <= 90) && shown.contains("日本") && shown.contains('…'), "{shown}");
    let image = failed.image_id.to_string();
    for command in ["rbd-offload jobs --state failed".to_owned(), format!("rbd-offload show {image}")] {
        let coloured = on_a_terminal(&setup, (90, 24), &[("NO_COLOR", "")], &command);
        assert!(coloured.contains("\x1b[1;31mfailed\x1b[0m"), "{coloured:?}");
        for environment in [plain, [("TERM", "dumb")]] {
            let shown = on_a_terminal(&setup, (90, 24), &environment, &command);
            assert!(shown.contains("failed") && !shown.contains('\x1b'), "{shown:?}");
        }
    }
    let piped = setup.run(&["jobs", "--state", "failed"]);
    assert!(piped.out.contains(&"日本語の理由".repeat(20)) && !piped.out.contains('\x1b'), "{piped:?}");

    let watched = on_a_terminal(&setup, (90, 5), &plain, "timeout --foreground -s INT 8 rbd-offload jobs --watch");
    assert!(watched.matches("\x1b[HIMAGE").count() >= 2 && watched.contains("… 6 more lines"), "{watched:?}");
    assert!(watched.matches("\x1b[2J").count() == 1 && !watched.contains("\x1b[3J"), "{watched:?}");
    let dumb =
        on_a_terminal(&setup, (90, 5), &[("TERM", "dumb")], "timeout --foreground -s INT 8 rbd-offload jobs --watch");
    assert!(dumb.matches("IMAGE").count() >= 2 && !dumb.contains('\x1b'), "{dumb:?}");
}

#[test]
fn output_that_cannot_be_written_is_an_error() {
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_rbd-offload"));
    Ran::of(command.arg("man").stdout(full).output().unwrap()).failed(IO, "No space left");
}

#[test]
fn retry_and_cancel_leave_signals_and_the_record_to_the_daemon() {
    let setup = Setup::new();
    let later = Timestamp::now().checked_add(SignedDuration::from_secs(60)).unwrap();
    let (failed, done, waiting) = block_on(async {
        let store = setup.store().await;
        let waiting = put(&store, |record| record.not_before = Some(later)).await;
        (put(&store, ended(State::Failed)).await, put(&store, ended(State::Done)).await, waiting)
    });
    let now = |record: &Record| block_on(async { setup.store().await.load(record.image_id).await.unwrap().unwrap() });
    let id = |record: &Record| record.image_id.to_string();

    let ran = setup.run(&["cancel", &id(&failed)]);
    assert!(ran.code == Some(0) && ran.out.contains("had ended before: failed"), "{ran:?}");
    let ran = setup.run(&["retry", &id(&failed)]);
    assert!(ran.code == Some(0) && ran.out.contains("starts again"), "{ran:?}");
    let retried = now(&failed);
    assert!(retried.record == failed && retried.signals.has(Signal::Retry), "{retried:?}");
    assert_eq!(setup.run(&["jobs", "--json"]).json().as_array().unwrap().len(), 2);

    setup.run(&["retry", &id(&done)]).failed(UNAVAILABLE, "nothing to retry");
    setup.run(&["cancel", &id(&done)]).failed(UNAVAILABLE, "has ended");

    let ran = setup.run(&["cancel", &id(&waiting)]);
    assert!(ran.code == Some(0) && ran.out.contains("within seconds"), "{ran:?}");
    let cancelled = now(&waiting);
    assert!(cancelled.record == waiting && cancelled.signals.has(Signal::Cancel), "{cancelled:?}");
    let index = block_on(async { setup.store().await.live().await.unwrap() });
    let (_, summary) = index.iter().find(|(id, _)| *id == waiting.image_id).unwrap();
    assert_eq!(summary.not_before, None);
    // again: nothing new
    assert_eq!(setup.run(&["cancel", &id(&waiting)]).code, Some(0));
    let listed = setup.run(&["jobs"]).out;
    assert!(listed.contains("to be cancelled") && listed.contains("to be retried"), "{listed}");

    for command in ["retry", "cancel"] {
        setup.run(&[command, &Uuid::new_v4().to_string()]).failed(NO_INPUT, "there is no job");
    }
}

#[test]
fn a_thousand_jobs_are_listed_quickly_and_a_closed_pipe_is_no_error() {
    let setup = Setup::new();
    block_on(async {
        let store = setup.store().await;
        let jobs = (0..1000).map(|_| put(&store, |_| {}));
        stream::iter(jobs).buffer_unordered(64).for_each(async |_| {}).await;
    });
    let begun = Instant::now();
    let listed = setup.run(&["jobs", "--json"]).json();
    assert_eq!(listed.as_array().unwrap().len(), 1000);
    assert!(begun.elapsed() < Duration::from_secs(60), "{:?}", begun.elapsed());

    let mut child = setup.command(&["jobs"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let ran = Ran::of(child.wait_with_output().unwrap());
    assert_eq!((ran.code, ran.err.as_str()), (Some(0), ""), "{ran:?}");
}

#[test]
fn jobs_are_watched_until_interrupted() {
    let setup = Setup::new();
    let child = setup.command(&["jobs", "--watch"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    std::thread::sleep(Duration::from_secs(5));
    let pid = child.id().to_string();
    assert!(Command::new("kill").args(["-INT", &pid]).status().unwrap().success());
    let ran = Ran::of(child.wait_with_output().unwrap());
    assert_eq!(ran.code, Some(0), "{ran:?}");
    // no data: a reader of the pipe gets nothing
    assert!(ran.out.is_empty() && ran.err.matches("rbd-offload: no jobs; --all").count() >= 2, "{ran:?}");
}

/// A record of a test, deleted at its end.
struct Requested {
    tenant: Tenant,
    id: String,
}

impl Requested {
    fn new(id: &str) -> Self {
        Self { tenant: Tenant::from_env(None).unwrap(), id: id.trim().to_owned() }
    }
}

impl Drop for Requested {
    fn drop(&mut self) {
        block_on(async {
            let _ = self.tenant.delete_image(&self.id).await;
        });
    }
}

/// Without a configuration file.
fn request(arguments: &[&str]) -> Command {
    lab_var("RBDLAB_DIR");
    let mut command = Command::new(env!("CARGO_BIN_EXE_rbd-offload"));
    command.arg("request").args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

#[test]
fn request_creates_a_tagged_record_for_the_tenant() {
    for kind in ["volume", "snapshot", "instance"] {
        let source = Uuid::new_v4();
        let option = format!("--{kind}");
        let arguments = [
            "--name",
            "cli test",
            &option,
            &source.to_string(),
            "--property",
            "hw_disk_bus=scsi",
            "--property",
            "a=b=c",
        ];
        let ran = Ran::of(request(&arguments).output().unwrap());
        assert_eq!((ran.code, ran.err.as_str()), (Some(0), ""), "{ran:?}");
        let requested = Requested::new(&ran.out);
        let (image, project) = block_on(async {
            (
                requested.tenant.image(&requested.id).await.unwrap().unwrap(),
                requested.tenant.project_id().await.unwrap(),
            )
        });
        assert_eq!(image.status, "queued");
        assert_eq!(image.owner, project);
        assert_eq!(image.name.as_deref(), Some("cli test"));
        assert_eq!((image.disk_format.as_deref(), image.container_format.as_deref()), (Some("raw"), Some("bare")));
        // a daemon that works in this lab has seen by now that there is no such source, and takes the tag off
        let declined = image.properties.contains_key("rbd_offload_status");
        assert!(image.tags == [format!("rbd-offload:{kind}:{source}")] || declined, "{image:?}");
        assert_eq!(image.properties.get("hw_disk_bus").map(String::as_str), Some("scsi"));
        assert_eq!(image.properties.get("a").map(String::as_str), Some("b=c"));
    }
}

/// What `openstack` prints, as the tenant of the lab.
fn openstack(arguments: &[&str]) -> String {
    let mut command = Command::new(PathBuf::from(lab_var("RBDLAB_DIR")).join("venv/bin/openstack"));
    let ran = Ran::of(command.args(arguments).stdin(Stdio::null()).output().unwrap());
    assert_eq!(ran.code, Some(0), "{ran:?}");
    ran.out.trim().to_owned()
}

#[test]
fn a_dry_run_judges_the_source_and_creates_nothing() {
    struct Removed(String);
    impl Drop for Removed {
        fn drop(&mut self) {
            openstack(&["volume", "delete", &self.0]);
        }
    }
    let name = format!("dry-run-{}", Uuid::new_v4());
    let create = ["volume", "create", "--size", "1", "--type", "ceph", "-f", "value", "-c", "id", &name];
    let volume = Removed(openstack(&create));
    let volume = &volume.0;
    let within = Instant::now() + Duration::from_secs(60);
    while openstack(&["volume", "show", "-f", "value", "-c", "status", volume]) != "available" {
        assert!(Instant::now() < within, "the volume is not made");
    }
    let dry_run = |id: &str, more: &[&str]| {
        let arguments = ["--dry-run", "--name", &name, "--volume", id];
        let ran = Ran::of(request(&arguments).args(more).output().unwrap());
        schemas::validate_output(&[&["request"][..], more].concat(), &ran.out);
        ran
    };

    let taken = dry_run(volume, &["--json"]).json();
    assert_eq!((&taken["outcome"], &taken["reason"]), (&json!("taken"), &Value::Null), "{taken:#}");
    assert_eq!(taken["source"], json!({"kind": "volume", "id": volume}));
    let row =
        |name: &str| taken["checks"].as_array().unwrap().iter().find(|row| row["check"] == name).cloned().unwrap();
    assert_eq!(row("volume")["detail"], "available, 1.00 GiB");
    for hidden in ["disk", "method", "daemon"] {
        assert_eq!(row(hidden)["result"], "skipped", "{taken:#}");
    }
    let text = dry_run(volume, &[]);
    assert!(text.code == Some(0) && text.out.ends_with("; nothing was created\n"), "{text:?}");

    let declined = dry_run(&Uuid::new_v4().to_string(), &[]);
    assert_eq!(declined.code, Some(UNAVAILABLE), "{declined:?}");
    assert!(declined.out.contains("it would be declined: there is no volume"), "{declined:?}");
    let declined = dry_run(volume, &["--property", "img_signature=x", "--json"]);
    let document: Value = serde_json::from_str(&declined.out).unwrap();
    assert_eq!((declined.code, &document["outcome"]), (Some(UNAVAILABLE), &json!("declined")), "{document:#}");

    assert_eq!(openstack(&["image", "list", "--name", &name, "-f", "value"]), "");
}

#[test]
fn request_waits_for_the_outcome_and_reports_it() {
    let setup = Setup::new();
    let source = Uuid::new_v4().to_string();
    let arguments = ["--name", "cli test", "--volume", &source, "--wait"];
    let spawn = |more: &[&str]| {
        let mut child = request(&arguments).args(more).spawn().unwrap();
        let mut id = String::new();
        let mut out = std::io::BufReader::new(child.stdout.take().unwrap());
        std::io::BufRead::read_line(&mut out, &mut id).unwrap();
        (child, Requested::new(&id))
    };

    let (child, requested) = spawn(&["--timeout", "1ms"]);
    let ran = Ran::of(child.wait_with_output().unwrap());
    assert_eq!(ran.code, Some(TEMPORARY), "{ran:?}");
    assert!(ran.err.contains("rbd-offload: queued\n") && ran.err.contains("is not active after 0.001 s"), "{ran:?}");
    drop(requested);

    let (child, requested) = spawn(&[]);
    let set = |status: &str, progress: &str, message: &str| {
        let changes: Vec<ImageChange> = [("status", status), ("progress", progress), ("message", message)]
            .into_iter()
            .map(|(name, value)| ImageChange::Set { property: format!("rbd_offload_{name}"), value: value.into() })
            .collect();
        block_on(setup.session().update_image(&requested.id, &changes)).unwrap();
    };
    set("copying", "40", "copied");
    std::thread::sleep(Duration::from_secs(3));
    set("declined", "0", "the volume does not exist");
    let ran = Ran::of(child.wait_with_output().unwrap());
    assert_eq!(ran.code, Some(UNAVAILABLE), "{ran:?}");
    // a daemon that works in this lab may be faster, with the same end in its own words
    if !ran.err.contains(": declined: there is no volume") {
        assert!(ran.err.contains("rbd-offload:  40 % copying: copied\n"), "{ran:?}");
        assert!(ran.err.ends_with(": declined: the volume does not exist\n"), "{ran:?}");
    }
    drop(requested);

    let (child, requested) = spawn(&[]);
    assert!(block_on(requested.tenant.delete_image(&requested.id)).unwrap());
    let ran = Ran::of(child.wait_with_output().unwrap());
    if !ran.err.contains(": declined: there is no volume") {
        ran.failed(UNAVAILABLE, "was deleted");
    }
}

#[test]
fn request_without_credentials_says_what_to_set() {
    let id = Uuid::new_v4().to_string();
    let mut command = request(&["--name", "n", "--volume", &id]);
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("OS_")) {
        command.env_remove(name);
    }
    Ran::of(command.output().unwrap()).failed(CONFIG, "OS_CLOUD");
    let mut command = request(&["--name", "n", "--volume", &id, "--os-cloud", "nosuch"]);
    Ran::of(command.output().unwrap()).failed(CONFIG, "clouds.yaml");
    let mut command = request(&["--name", "n", "--volume", &id]);
    let ran = Ran::of(command.env("OS_PASSWORD", "Wr0ng").output().unwrap());
    ran.failed(77, "401");
    assert!(!ran.err.contains("Wr0ng"), "{ran:?}");
}

#[test]
fn replay_stores_jobs_for_a_daemon_to_take_up() {
    let setup = Setup::new();
    let (image, volume) = (Uuid::new_v4(), Uuid::new_v4());
    let message = |status: &str, tags: &[String]| {
        let payload = json!({
            "id": image, "status": status, "owner": "p1", "tags": tags, "properties": {}, "name": "n",
            "disk_format": null, "container_format": null,
        });
        json!({
            "event_type": "image.create", "priority": "INFO", "publisher_id": "image.localhost", "payload": payload,
            "message_id": Uuid::new_v4(), "_unique_id": Uuid::new_v4().simple().to_string(), "timestamp": "2026-01-01 00:00:00",
        })
    };
    let tag = [format!("rbd-offload:volume:{volume}")];
    let asked = message("queued", &tag);
    let enveloped = json!({"oslo.version": "2.0", "oslo.message": asked.to_string()});
    let lines = format!("{asked}\n\n{enveloped}\n{}\n", message("active", &tag));
    std::fs::write(setup.path("captured.jsonl"), &lines).unwrap();
    let path = setup.path("captured.jsonl").display().to_string();

    let ran = setup.run(&["replay", &path]);
    assert_eq!((ran.code, ran.out.as_str()), (Some(0), "2 taken over, 1 irrelevant, 0 failed\n"), "{ran:?}");
    let jobs = setup.run(&["jobs", "--json"]).json();
    assert_eq!(jobs.as_array().unwrap().len(), 1);
    assert_eq!(jobs[0]["image_id"], image.to_string());
    assert_eq!((&jobs[0]["state"], &jobs[0]["trigger"]), (&json!("accepted"), &json!("request")));
    assert_eq!(jobs[0]["source"], json!({"kind": "volume", "id": volume}));

    let mut child = setup.command(&["replay", "-"]);
    let mut child = child.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(format!("garbage\n{lines}").as_bytes()).unwrap();
    let ran = Ran::of(child.wait_with_output().unwrap());
    assert_eq!(ran.code, Some(DATA), "{ran:?}");
    assert!(ran.err.contains("line 1: ") && ran.out.starts_with("2 taken over"), "{ran:?}");
    setup.run(&["replay", "/nonexistent"]).failed(NO_INPUT, "/nonexistent");
}

#[test]
fn completions_and_the_manual_page_come_out() {
    let run =
        |arguments: &[&str]| Ran::of(Command::new(env!("CARGO_BIN_EXE_rbd-offload")).args(arguments).output().unwrap());
    for shell in ["bash", "zsh", "fish"] {
        let ran = run(&["completions", shell]);
        assert!(ran.code == Some(0) && ran.out.contains("request") && ran.err.is_empty(), "{ran:?}");
    }
    let page = run(&["man", "rbd-offload.conf"]);
    assert!(page.code == Some(0) && page.out.contains("[messaging]") && page.out.contains(".TH"), "{page:?}");
    let page = run(&["man"]);
    assert!(page.code == Some(0) && page.out.contains(".TH") && page.out.contains("EXIT STATUS"), "{page:?}");
    let help = run(&["--help"]);
    assert!(help.code == Some(0) && help.out.contains("check"), "{help:?}");
}
