//! What the tests against the lab share: the lab's facts, accounts, disks, the daemon, the broker and the inventory.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

pub mod broker;
pub mod cloud;
pub mod daemon;
pub mod disk;
pub mod env;
pub mod glance;
pub mod inventory;
pub mod lab_lease;
pub mod published;
pub mod python;
pub mod schemas;
pub mod tcp_proxy;

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::LazyLock;
use std::time::{Duration, Instant};

pub const MIB: u64 = 1 << 20;
pub const GIB: u64 = 1 << 30;

/// What the lab tells in the environment.
pub struct Lab {
    pub dir: PathBuf,
    /// The lab's commands.
    pub commands: PathBuf,
    pub fsid: String,
    pub keystone: String,
    pub glance: String,
    pub cinder: String,
    /// The broker, as the services reach it.
    pub amqp: String,
    /// The broker, as the daemon does.
    pub offload_amqp: String,
    pub offload_amqp_password: String,
    pub offload_password: String,
}

static LAB: LazyLock<Lab> = LazyLock::new(|| {
    let var = env::lab_var;
    Lab {
        dir: var("RBDLAB_DIR").into(),
        commands: var("RBDLAB_HERE").into(),
        fsid: var("RBDLAB_FSID"),
        keystone: var("RBDLAB_KEYSTONE"),
        glance: var("RBDLAB_GLANCE"),
        cinder: var("RBDLAB_CINDER"),
        amqp: var("RBDLAB_AMQP"),
        offload_amqp: var("RBDLAB_OFFLOAD_AMQP"),
        offload_amqp_password: var("RBDLAB_OFFLOAD_AMQP_PASSWORD"),
        offload_password: var("RBDLAB_OFFLOAD_PASSWORD"),
    }
});

pub fn lab() -> &'static Lab {
    &LAB
}

impl Lab {
    /// Nova, which not every lab has.
    pub fn nova(&self) -> String {
        std::env::var("RBDLAB_NOVA")
            .expect("RBDLAB_NOVA is not set: run `make test-nova`, which starts a lab with Nova")
    }

    pub fn ceph_conf(&self) -> PathBuf {
        self.dir.join("ceph/ceph.conf")
    }

    /// `lab/svc ACTION NAME…`.
    pub async fn service(&self, action: &str, names: &[&str]) {
        let (output, said) =
            run(Command::new(self.commands.join("svc")).arg(action).args(names).env("RBDLAB_DIR", &self.dir)).await;
        assert!(output, "lab/svc {action} {names:?}: {said}");
    }

    /// A Ceph command as the cluster's administrator; what it said.
    pub async fn ceph(&self, program: &str, arguments: &[&str]) -> String {
        let (well, said) = run(self.ceph_command(program).args(arguments)).await;
        assert!(well, "{program} {arguments:?}: {said}");
        said
    }

    /// A client that has the image `pool/name` open for writing until it is killed, or its input ends.
    pub fn watch_image(&self, image: &str) -> Child {
        self.ceph_command("rbd").args(["watch", image]).stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap()
    }

    fn ceph_command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.arg("-c").arg(self.ceph_conf());
        command.arg("--keyring").arg(self.dir.join("ceph/client.admin.keyring")).args(["--id", "admin"]);
        command
    }
}

/// A setting of a pool, for as long as this lives.
pub struct PoolSetting([&'static str; 2]);

impl PoolSetting {
    pub async fn new(pool: &'static str, key: &'static str, value: &str) -> Self {
        lab().ceph("rbd", &["config", "pool", "set", pool, key, value]).await;
        Self([pool, key])
    }
}

impl Drop for PoolSetting {
    fn drop(&mut self) {
        let [pool, key] = self.0;
        let arguments = ["config", "pool", "rm", pool, key];
        tokio::task::block_in_place(|| tokio::runtime::Handle::current().block_on(lab().ceph("rbd", &arguments)));
    }
}

/// Sends SIGTERM.
pub fn terminate(process: &Child) {
    let sent = Command::new("kill").arg(process.id().to_string()).status().unwrap();
    assert!(sent.success());
}

/// Whether the command went well, and its output (what it complained of, when it did not).
pub async fn run(command: &mut Command) -> (bool, String) {
    let mut command = std::mem::replace(command, Command::new("true"));
    tokio::task::spawn_blocking(move || {
        let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
        let said = if output.status.success() { output.stdout } else { [output.stdout, output.stderr].concat() };
        (output.status.success(), String::from_utf8_lossy(&said).into_owned())
    })
    .await
    .unwrap()
}

/// Asks until there is an answer; panics after `limit`. The longer it waits, the less often it asks: most questions
/// cost a service or the cluster more than the daemon's work does.
pub async fn until<T, F: Future<Output = Option<T>>>(what: &str, limit: Duration, mut ask: impl FnMut() -> F) -> T {
    let begun = Instant::now();
    loop {
        if let Some(answer) = ask().await {
            return answer;
        }
        assert!(begun.elapsed() < limit, "not within {} s: {what}", limit.as_secs());
        let pause = (begun.elapsed() / 10).clamp(Duration::from_millis(250), Duration::from_secs(1));
        tokio::time::sleep(pause).await;
    }
}

pub fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

pub async fn pause(time: Duration) {
    tokio::time::sleep(time).await;
}

/// Eight letters that no other test has.
pub fn unique() -> String {
    uuid::Uuid::new_v4().simple().to_string()[..8].to_owned()
}
