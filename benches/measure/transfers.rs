//! One volume after the other becomes an image: stock Cinder, the daemon by each of its methods, and at once; and what
//! Ceph's own tools take for the same bytes.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};

use crate::common::cloud::{Account, Volume};
use crate::common::daemon::Daemon;
use crate::common::glance::Reader;
use crate::common::{MIB, lab};
use crate::lab::{Activations, Shape, delete, disk_limits, glance_is_done, setup, spread, stored, timed};
use crate::median;
use crate::meter::{Cost, Meter};

/// The ways that are measured, unless `BENCH_METHODS` names some of them. `at-once` is no method of the daemon: the
/// image is active before it is copied.
pub const METHODS: &str = "stock,copy,clone,server-copy,at-once";
const AT_ONCE: &str = "at-once";
const LIMIT: Duration = Duration::from_secs(1800);

/// One run of one method.
#[derive(Debug, Default)]
struct Run {
    active: f64,
    /// CPU seconds until the image was active, by process.
    cpu: BTreeMap<String, f64>,
    /// And until Glance had hashed it, which it does afterwards with a location.
    glance_in_all: f64,
    cost: Cost,
    stages: BTreeMap<String, f64>,
    method: String,
    stored: Option<u64>,
}

pub async fn measure(shapes: &str, rounds: usize) -> Value {
    let mut results = Vec::new();
    for text in shapes.split(',') {
        // a token lasts for an hour
        let account = Account::demo().await;
        let (name, shape, volume) = match text.strip_prefix("clone:") {
            Some(parent) => {
                let shape = Shape::parse(parent);
                let volume = child(&account, &shape).await;
                (format!("a clone, {} in its parent", shape.name().split_once("with ").unwrap().1), shape, volume)
            }
            None => {
                let shape = Shape::parse(text);
                let volume = shape.volume(&account).await;
                (shape.name(), shape, volume)
            }
        };
        eprintln!("== {name}");
        let mut methods = Map::new();
        for method in crate::env("BENCH_METHODS", METHODS).split(',') {
            let runs = runs(&account, &volume, method, rounds).await;
            methods.insert(method.to_owned(), summary(&runs));
        }
        let tools = tools(&volume, rounds).await;
        results.push(
            json!({"shape": name, "bytes": shape.gib << 30, "data": shape.data, "methods": methods, "tools": tools}),
        );
        account.clean().await;
    }
    json!({"shapes": results})
}

/// What the disks give at best.
pub async fn limits(rounds: usize) -> Value {
    let (mut written, mut read) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        let limits = disk_limits("images", 8).await;
        written.push(limits.0);
        read.push(limits.1);
    }
    json!({"write": median(written), "read": median(read)})
}

/// A volume that holds little itself: made from an image of that shape.
async fn child(account: &Account, shape: &Shape) -> Volume {
    let base = shape.volume(account).await;
    let daemon = setup("server-copy").start().await;
    let image = account.request(&base).await;
    Activations::listen().await;
    account.await_image(&image, "active").await;
    daemon.stop();
    glance_is_done(account, &image).await;
    let volume = account.create_volume(json!({"size": shape.gib, "imageRef": image})).await;
    assert!(volume.disk.facts().await.unwrap().parent.is_some(), "Cinder makes a clone");
    spread(&volume.disk, 64 * MIB, 4 * MIB).await;
    volume
}

async fn runs(account: &Account, volume: &Volume, method: &str, rounds: usize) -> Vec<Run> {
    // Glance reads the source's pool for an image that is not copied yet
    let _reader = if method == AT_ONCE { Some(Reader::new().await) } else { None };
    let daemon = match method {
        "stock" => None,
        AT_ONCE => {
            Some(setup("auto").set("offload", "publish", AT_ONCE).set("offload", "detach_grace", "0s").start().await)
        }
        method => Some(setup(method).start().await),
    };
    let activations = Activations::listen().await;
    let mut runs = Vec::new();
    for round in 0..rounds {
        let before = if round == 0 { Some(stored("images").await) } else { None };
        let (id, mut run) = one(account, volume, method, daemon.as_ref(), &activations).await;
        if let Some(before) = before {
            run.stored = Some(stored("images").await.saturating_sub(before));
        }
        eprintln!("{method}: {:.2} s to active, {:?}", run.active, run.stages);
        delete(account, &id).await;
        runs.push(run);
    }
    runs
}

async fn one(
    account: &Account,
    volume: &Volume,
    method: &str,
    daemon: Option<&Daemon>,
    activations: &Activations,
) -> (String, Run) {
    let mut meter = Meter::start(daemon.map(Daemon::pid));
    let began = Instant::now();
    let id = if method == "stock" { account.stock_upload(volume).await } else { account.request(volume).await };
    let active = activations.wait_for(&id, LIMIT, || meter.look()).await;
    let cpu = meter.cpu();
    let mut run = Run { active: (active - began).as_secs_f64(), cpu, method: method.to_owned(), ..Run::default() };
    if let Some(daemon) = daemon {
        let job = daemon.await_job(&id, "done").await;
        run.method = job["method"].as_str().unwrap_or_default().to_owned();
        for stage in job["stages"].as_array().unwrap() {
            run.stages.insert(stage["name"].as_str().unwrap().to_owned(), stage["seconds"].as_f64().unwrap_or(0.0));
        }
        assert!(run.method == method || method == AT_ONCE, "{job:#}");
    }
    glance_is_done(account, &id).await;
    account.await_volume(&volume.id, "available").await;
    run.glance_in_all = meter.cpu()["glance"];
    run.cost = meter.finish();
    (id, run)
}

fn summary(runs: &[Run]) -> Value {
    let of = |number: &dyn Fn(&Run) -> f64| median(runs.iter().map(number).collect());
    let cpu: BTreeMap<&str, f64> = runs[0].cpu.keys().map(|name| (name.as_str(), of(&|run| run.cpu[name]))).collect();
    let stages: BTreeMap<&str, f64> = runs[0]
        .stages
        .keys()
        .map(|name| (name.as_str(), of(&|run| run.stages.get(name).copied().unwrap_or(0.0))))
        .collect();
    // what carries the data: the daemon, or the services that stream it
    let movers: &[&str] = if runs[0].method == "stock" { &["cinder-volume", "glance"] } else { &["daemon"] };
    let network = |direction: usize| {
        of(&|run| movers.iter().filter_map(|name| run.cost.network.get(*name)).map(|c| c[direction] as f64).sum())
    };
    let peak = of(&|run| movers.iter().filter_map(|name| run.cost.peak.get(*name)).map(|p| *p as f64).sum());
    json!({
        "rounds": runs.len(),
        "active": of(&|run| run.active),
        "active_all": runs.iter().map(|run| run.active).collect::<Vec<_>>(),
        // behind an image that was published at once, the fill moves the bytes
        "transfer": stages.get("transfer").or_else(|| stages.get("fill")),
        "stages": stages,
        "cpu": cpu,
        "glance_cpu_with_hash": of(&|run| run.glance_in_all),
        "bytes_in": network(0),
        "bytes_out": network(1),
        "peak": peak,
        "stored": runs.iter().find_map(|run| run.stored),
    })
}

/// What Ceph's own tools take for the same snapshot.
async fn tools(volume: &Volume, rounds: usize) -> Value {
    let source = format!("{}/{}", volume.disk.pool, volume.disk.name);
    let snapshot = format!("{source}@bench");
    lab().ceph("rbd", &["snap", "create", "--no-progress", &snapshot]).await;
    let mut tools = Map::new();
    for (name, line) in [
        ("rbd cp", format!("rbd $CEPH cp --no-progress {snapshot} images/bench-copy")),
        ("rbd deep cp", format!("rbd $CEPH deep cp --no-progress {source} images/bench-copy")),
        (
            "rbd export | rbd import",
            format!("rbd $CEPH export --no-progress {snapshot} - | rbd $CEPH import --no-progress - images/bench-copy"),
        ),
    ] {
        let (mut seconds, mut cpu) = (Vec::new(), Vec::new());
        for _ in 0..rounds {
            let (wall, used) = timed(&line).await;
            seconds.push(wall);
            cpu.push(used);
            timed("rbd $CEPH snap purge --no-progress images/bench-copy; rbd $CEPH rm --no-progress images/bench-copy")
                .await;
        }
        eprintln!("{name}: {seconds:.2?} s");
        tools.insert(name.to_owned(), json!({"seconds": median(seconds), "cpu": median(cpu)}));
    }
    lab().ceph("rbd", &["snap", "rm", "--no-progress", &snapshot]).await;
    Value::Object(tools)
}
