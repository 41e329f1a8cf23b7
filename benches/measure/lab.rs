//! The lab as the benchmarks use it: disks, commands, daemons of a kind, and when an image became active.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::common::broker::Broker;
use crate::common::cloud::{Account, Volume};
use crate::common::daemon::Setup;
use crate::common::disk::Disk;
use crate::common::{GIB, MIB, lab, pause, run, unique};

const SCRIPT: &str = include_str!("disk.py");

pub fn script(function: &str, arguments: &Value) -> Command {
    let mut command = Command::new("/usr/bin/python3");
    command
        .args(["-c", SCRIPT])
        .arg(lab().ceph_conf())
        .arg(lab().dir.join("ceph/client.admin.keyring"))
        .args([function, &arguments.to_string()]);
    command
}

/// Random data in pieces, evenly spread.
pub async fn spread(disk: &Disk, bytes: u64, piece: u64) {
    let arguments = json!({"pool": disk.pool, "image": disk.name, "bytes": bytes, "piece": piece});
    let (well, said) = run(&mut script("spread", &arguments)).await;
    assert!(well, "{said}");
}

/// Seconds by the clock and of CPU that a shell line takes, with `$CEPH` for the options of a Ceph command.
pub async fn timed(line: &str) -> (f64, f64) {
    let options = format!(
        "-c {} --keyring {} --id admin",
        lab().ceph_conf().display(),
        lab().dir.join("ceph/client.admin.keyring").display()
    );
    let script = format!("TIMEFORMAT='%R %U %S'; time ( {line} )");
    let mut command = Command::new("bash");
    command.args(["-o", "pipefail", "-c", &script]).env("CEPH", options).stdin(Stdio::null());
    let output = tokio::task::spawn_blocking(move || command.output()).await.unwrap().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{line}: {said}");
    let last = said.trim().lines().last().unwrap_or_default();
    let times: Vec<f64> = last.split(' ').map(|word| word.parse().unwrap()).collect();
    (times[0], times[1] + times[2])
}

/// `4g/1g` or `20g/64m:16k`: GiB of a disk, bytes of data on it, bytes of a piece.
#[derive(Debug, Clone)]
pub struct Shape {
    pub gib: u64,
    pub data: u64,
    pub piece: u64,
}

impl Shape {
    pub fn parse(text: &str) -> Self {
        let (size, data) = text.split_once('/').unwrap_or_else(|| panic!("not a size: {text}"));
        let (data, piece) = data.split_once(':').unwrap_or((data, "8m"));
        Self { gib: bytes(size) / GIB, data: bytes(data), piece: bytes(piece) }
    }

    pub fn name(&self) -> String {
        let small = if self.piece < MIB { format!(" in pieces of {} KiB", self.piece >> 10) } else { String::new() };
        let data = if self.data.is_multiple_of(GIB) {
            format!("{} GiB", self.data / GIB)
        } else {
            format!("{} MiB", self.data / MIB)
        };
        format!("{} GiB with {data}{small}", self.gib)
    }

    /// A volume of this shape.
    pub async fn volume(&self, account: &Account) -> Volume {
        let volume = account.create_volume(json!({"size": self.gib})).await;
        spread(&volume.disk, self.data, self.piece).await;
        volume
    }
}

fn bytes(text: &str) -> u64 {
    let split = text.len() - 1;
    let number: u64 = text[..split].parse().unwrap_or_else(|_| panic!("not a size: {text}"));
    number
        * match &text[split..] {
            "g" => GIB,
            "m" => MIB,
            "k" => 1024,
            other => panic!("not a unit: {other}"),
        }
}

/// A daemon as operators run it; `method` forces a way to transfer.
pub fn setup(method: &str) -> Setup {
    Setup::default().set("offload", "method", method).set("jobs", "lease", "30s").set("DEFAULT", "log_level", "info")
}

/// Hears from Glance when images become active: asking again and again would cost the CPU that is measured.
pub struct Activations {
    broker: Broker,
    queue: String,
}

impl Activations {
    pub async fn listen() -> Self {
        let (broker, queue) = (Broker::connect().await, format!("bench-{}", unique()));
        broker.listen(&queue, &["glance"]).await;
        Self { broker, queue }
    }

    /// Ids of the images that became active since the last call.
    pub async fn news(&self) -> Vec<String> {
        let message = |body: &Vec<u8>| -> Option<String> {
            let envelope: Value = serde_json::from_slice(body).ok()?;
            let message: Value = serde_json::from_str(envelope["oslo.message"].as_str()?).ok()?;
            let active = message["payload"]["status"] == "active";
            active.then(|| message["payload"]["id"].as_str().map(str::to_owned)).flatten()
        };
        self.broker.drain(&self.queue).await.iter().filter_map(message).collect()
    }

    /// When the image became active; `meanwhile` is called about once a second.
    pub async fn wait_for(&self, id: &str, limit: Duration, mut meanwhile: impl FnMut()) -> Instant {
        let began = Instant::now();
        let mut looked = Instant::now();
        loop {
            if self.news().await.iter().any(|active| active == id) {
                return Instant::now();
            }
            assert!(began.elapsed() < limit, "image {id} is not active within {} s", limit.as_secs());
            if looked.elapsed() > Duration::from_secs(1) {
                meanwhile();
                looked = Instant::now();
            }
            pause(Duration::from_millis(20)).await;
        }
    }
}

/// Waits for Glance's own work on an image, which hashes all of it, however long that takes.
pub async fn glance_is_done(account: &Account, id: &str) {
    let url = format!("{}/v2/images/{id}/tasks", crate::common::lab().glance);
    loop {
        let (status, body) = account.call(reqwest::Method::GET, &url, None).await;
        let over = |task: &Value| matches!(task["status"].as_str(), Some("success" | "failure"));
        if status == 404 || body["tasks"].as_array().is_some_and(|tasks| tasks.iter().all(over)) {
            return;
        }
        pause(Duration::from_millis(500)).await;
    }
}

/// Deletes an image and waits until its bytes are gone from the pool.
pub async fn delete(account: &Account, id: &str) {
    loop {
        match account.delete_image(id).await {
            404 => return,
            _ => pause(Duration::from_millis(300)).await,
        }
    }
}

/// Bytes stored in a pool, once the OSDs' reports have settled.
pub async fn stored(pool: &str) -> u64 {
    let mut last = (0, Instant::now());
    loop {
        let df: Value = serde_json::from_str(&lab().ceph("ceph", &["df", "--format", "json"]).await).unwrap();
        let pool = df["pools"].as_array().unwrap().iter().find(|p| p["name"] == pool).unwrap();
        let now = pool["stats"]["bytes_used"].as_u64().unwrap();
        if now != last.0 {
            last = (now, Instant::now());
        } else if last.1.elapsed() > Duration::from_secs(11) {
            return now;
        }
        pause(Duration::from_secs(1)).await;
    }
}

/// Bytes a second that `rados bench` writes into the pool and reads from it, objects of 4 MiB, 16 in flight.
pub async fn disk_limits(pool: &str, seconds: u32) -> (f64, f64) {
    let seconds = seconds.to_string();
    let bandwidth = |said: String| {
        let line = said.lines().find_map(|line| line.strip_prefix("Bandwidth (MB/sec):")).unwrap();
        line.trim().parse::<f64>().unwrap() * MIB as f64
    };
    let bench = ["bench", "-p", pool, seconds.as_str()];
    let write = ["write", "-b", "4194304", "-t", "16", "--run-name", "bench", "--no-cleanup"];
    let written = bandwidth(lab().ceph("rados", &[&bench[..], &write[..]].concat()).await);
    let read =
        bandwidth(lab().ceph("rados", &[&bench[..], &["seq", "-t", "16", "--run-name", "bench"][..]].concat()).await);
    lab().ceph("rados", &["-p", pool, "cleanup", "--run-name", "bench"]).await;
    (written, read)
}

/// Load averages.
pub fn load() -> Vec<f64> {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap();
    text.split(' ').take(3).map(|word| word.parse().unwrap()).collect()
}

pub async fn machine() -> Value {
    let first = |path: &str, key: &str| -> String {
        let text = std::fs::read_to_string(path).unwrap_or_default();
        let line = text.lines().find(|line| line.starts_with(key)).unwrap_or_default();
        line.split_once(':').map_or("", |(_, value)| value).trim().to_owned()
    };
    let command = |program: &str, arguments: &[&str]| {
        let output = Command::new(program).args(arguments).output();
        output.map(|o| String::from_utf8_lossy(&o.stdout).trim().to_owned()).unwrap_or_default()
    };
    let ceph = command("ceph", &["--version"]);
    json!({
        "cpu": first("/proc/cpuinfo", "model name"),
        "cpus": std::thread::available_parallelism().map_or(0, |n| n.get()),
        "memory": first("/proc/meminfo", "MemTotal"),
        "kernel": command("uname", &["-r"]),
        "ceph": ceph.split(' ').nth(2).unwrap_or(&ceph),
        "osds": lab().ceph("ceph", &["osd", "ls"]).await.lines().count(),
        "program": env!("CARGO_PKG_VERSION"),
        "load_before": load(),
    })
}
