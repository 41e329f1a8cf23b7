//! Impact of a transfer on other clients: the latency of a client that writes 4 KiB at random places of the same pool.

use std::process::Stdio;
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};

use crate::common::cloud::Account;
use crate::common::daemon::Setup;
use crate::common::disk::Disk;
use crate::common::{MIB, pause, unique};
use crate::lab::{Activations, Shape, delete, glance_is_done, script, setup, spread};

const LIMIT: Duration = Duration::from_secs(1800);

/// A writer at work, and what it saw.
struct Writer(std::process::Child);

impl Writer {
    async fn start(disk: &Disk) -> Self {
        let mut command = script("write_until_told", &json!({"pool": disk.pool, "image": disk.name}));
        let writer = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        pause(Duration::from_secs(2)).await;
        Self(writer)
    }

    /// When each write began (seconds since 1970), and the seconds that it took.
    async fn stop(mut self) -> Vec<(f64, f64)> {
        drop(self.0.stdin.take());
        let output = tokio::task::spawn_blocking(move || self.0.wait_with_output()).await.unwrap().unwrap();
        serde_json::from_slice(&output.stdout).unwrap()
    }
}

fn latencies(samples: &[(f64, f64)], from: f64, to: f64) -> Value {
    let mut within: Vec<f64> =
        samples.iter().filter(|(at, _)| (from..to).contains(at)).map(|(_, took)| *took).collect();
    within.sort_by(f64::total_cmp);
    if within.is_empty() {
        return Value::Null;
    }
    let at = |share: f64| within[((within.len() - 1) as f64 * share) as usize];
    json!({"writes": within.len(), "mean": within.iter().sum::<f64>() / within.len() as f64, "p50": at(0.5),
           "p95": at(0.95), "p99": at(0.99), "seconds": to - from})
}

fn now() -> f64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs_f64()
}

pub async fn measure(shape: &str, rounds: usize) -> Value {
    let account = Account::demo().await;
    let volume = Shape::parse(shape).volume(&account).await;
    // in the pool that the copies are read from, and on the same disks as the one that they go to
    let target = Disk::new("volumes", format!("bench-writer-{}", unique()));
    target.create(256 * MIB).await;
    spread(&target, 256 * MIB, 4 * MIB).await;

    let mut results = Map::new();
    let mut quiet = Vec::new();
    for _ in 0..rounds {
        let writer = Writer::start(&target).await;
        let from = now();
        pause(Duration::from_secs(8)).await;
        quiet.push(latencies(&writer.stop().await, from, now() - 1.0));
    }
    results.insert("no transfer".into(), middle(&quiet));
    let server = |concurrency: &str| setup("server-copy").set("offload", "concurrency", concurrency);
    let kinds: [(&str, Option<Setup>); 9] = [
        ("stock", None),
        ("copy", Some(setup("copy"))),
        ("clone", Some(setup("clone"))),
        ("server-copy, concurrency 16", Some(server("16"))),
        ("server-copy, concurrency 4", Some(server("4"))),
        ("server-copy, concurrency 2", Some(server("2"))),
        ("server-copy, concurrency 1", Some(server("1"))),
        ("server-copy, 60 objects a second", Some(server("16").set("offload", "objects_per_second", "60"))),
        ("server-copy, 20 objects a second", Some(server("16").set("offload", "objects_per_second", "20"))),
    ];
    for (name, kind) in kinds {
        let daemon = match &kind {
            Some(kind) => Some(kind.start().await),
            None => None,
        };
        let activations = Activations::listen().await;
        let mut runs = Vec::new();
        for _ in 0..rounds {
            let writer = Writer::start(&target).await;
            let (from, began) = (now(), Instant::now());
            let id = if kind.is_none() { account.stock_upload(&volume).await } else { account.request(&volume).await };
            let active = activations.wait_for(&id, LIMIT, || ()).await;
            let mut window = (from, from + (active - began).as_secs_f64());
            if let Some(daemon) = &daemon {
                let job = daemon.await_job(&id, "done").await;
                let stage = job["stages"].as_array().unwrap().iter().find(|stage| stage["name"] == "transfer").unwrap();
                let at: jiff::Timestamp = stage["started_at"].as_str().unwrap().parse().unwrap();
                let at = at.as_nanosecond() as f64 / 1e9;
                window = (at, at + stage["seconds"].as_f64().unwrap());
            }
            runs.push(latencies(&writer.stop().await, window.0, window.1));
            glance_is_done(&account, &id).await;
            account.await_volume(&volume.id, "available").await;
            delete(&account, &id).await;
        }
        let result = middle(&runs);
        eprintln!("{name}: {result}");
        results.insert(name.to_owned(), result);
    }
    target.remove().await;
    account.clean().await;
    Value::Object(results)
}

/// Medians of the rounds' figures.
fn middle(runs: &[Value]) -> Value {
    let runs: Vec<&Value> = runs.iter().filter(|run| !run.is_null()).collect();
    let of = |key: &str| crate::median(runs.iter().filter_map(|run| run[key].as_f64()).collect());
    json!({"writes": of("writes"), "mean": of("mean"), "p50": of("p50"), "p95": of("p95"), "p99": of("p99"),
           "seconds": of("seconds")})
}
