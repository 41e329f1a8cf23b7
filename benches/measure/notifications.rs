//! Irrelevant notifications: what each costs the daemon, and what it costs a Python listener on the same broker. Then
//! all that was captured, with the deletions and snapshots for which the daemon looks for a job.

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use rbd_offload::notification::Notification;
use serde_json::{Value, json};

use crate::common::broker::Broker;
use crate::common::daemon::Daemon;
use crate::common::{lab, pause, unique};
use crate::lab::setup;
use crate::{median, meter};

/// Whether the listener drops it without asking for a job.
fn is_irrelevant(body: &[u8]) -> bool {
    matches!(Notification::read(body, Some("utf-8")), Ok(Notification::Irrelevant(_)))
}

/// The bodies of the captured notifications, as the broker delivers them to `notifications.info`.
fn bodies() -> Vec<Vec<u8>> {
    let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/notifications");
    let mut text = std::fs::read_to_string(format!("{dir}/info.jsonl")).unwrap();
    let packed = std::fs::File::open(format!("{dir}/nova.jsonl.gz")).unwrap();
    flate2::read::GzDecoder::new(packed).read_to_string(&mut text).unwrap();
    let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    lines
        .filter(|line| line["delivery_info"]["routing_key"].as_str().is_some_and(|key| key.ends_with(".info")))
        .map(|line| line["body_raw"].as_str().unwrap().to_owned())
        .filter(|body| !body.contains("rbd-offload:"))
        .map(String::into_bytes)
        .collect()
}

/// Publishes `count` messages while the listener is stopped, starts it again, and waits until it has seen them all.
/// Seconds by the clock and of CPU.
async fn drain(
    broker: &Broker,
    exchange: &str,
    bodies: &[Vec<u8>],
    count: usize,
    pid: u32,
    seen: impl AsyncFn() -> usize,
) -> (f64, f64) {
    let signal = |name: &str| {
        assert!(Command::new("kill").args([name, &pid.to_string()]).status().unwrap().success());
    };
    let before = seen().await;
    signal("-STOP");
    for body in bodies.iter().cycle().take(count) {
        broker.publish(exchange, "notifications.info", body, None).await;
    }
    pause(Duration::from_secs(2)).await;
    let cpu = meter::cpu(&[pid]);
    let began = Instant::now();
    signal("-CONT");
    while seen().await < before + count {
        assert!(began.elapsed() < Duration::from_secs(600), "{} of {count} seen", seen().await - before);
        pause(Duration::from_millis(50)).await;
    }
    (began.elapsed().as_secs_f64(), meter::cpu(&[pid]) - cpu)
}

fn result(kind: &str, count: usize, runs: &[(f64, f64)]) -> Value {
    let seconds = median(runs.iter().map(|run| run.0).collect());
    let cpu = median(runs.iter().map(|run| run.1).collect());
    eprintln!("{kind}: {:.0} a second, {:.1} µs of CPU each", count as f64 / seconds, cpu / count as f64 * 1e6);
    json!({"count": count, "seconds": seconds, "per_second": count as f64 / seconds, "cpu": cpu,
           "cpu_each": cpu / count as f64})
}

pub async fn measure(count: usize, rounds: usize) -> Value {
    let all = bodies();
    let bodies: Vec<_> = all.iter().filter(|body| is_irrelevant(body)).cloned().collect();
    let broker = Broker::connect().await;
    let exchange = format!("bench-{}", unique());
    broker.exchange(&exchange).await;

    let daemon = setup("auto").set("messaging", "exchanges", &exchange).start().await;
    bound(&broker, &daemon, &exchange, &bodies[0]).await;
    let seen = async || daemon.metric("rbd_offload_notifications_total").await as usize;
    let mut runs = Vec::new();
    for _ in 0..rounds {
        runs.push(drain(&broker, &exchange, &bodies, count, daemon.pid(), &seen).await);
    }
    let ours = result("daemon", count, &runs);
    let mut runs = Vec::new();
    for _ in 0..rounds {
        runs.push(drain(&broker, &exchange, &all, count, daemon.pid(), &seen).await);
    }
    let mixed = result("daemon, all that was captured", count, &runs);
    let queue = daemon.queue.clone();
    daemon.stop();
    broker.delete(&queue).await;

    let listener = Python::start(&exchange);
    let mut runs = Vec::new();
    let few = (count / 3).max(1);
    for _ in 0..rounds {
        let seen = async || listener.seen();
        runs.push(drain(&broker, &exchange, &bodies, few, listener.pid(), seen).await);
    }
    let python = result("oslo.messaging", few, &runs);
    let queue = listener.pool.clone();
    drop(listener);
    broker.delete(&queue).await;
    let ratio = ours["cpu_each"].as_f64().unwrap() / python["cpu_each"].as_f64().unwrap();
    let share = (all.len() - bodies.len()) as f64 / all.len() as f64;
    json!({"daemon": ours, "mixed": mixed, "relevant_share": share, "python": python, "cpu_ratio": ratio})
}

/// The daemon binds its queue once the exchange is there: send one until it arrives.
async fn bound(broker: &Broker, daemon: &Daemon, exchange: &str, body: &[u8]) {
    while daemon.metric("rbd_offload_notifications_total").await < 1.0 {
        broker.publish(exchange, "notifications.info", body, None).await;
        pause(Duration::from_millis(500)).await;
    }
    pause(Duration::from_secs(1)).await;
}

/// `listener.py`.
struct Python {
    child: Child,
    pool: String,
    pipes: std::sync::Mutex<(ChildStdin, BufReader<ChildStdout>)>,
}

impl Python {
    fn start(exchange: &str) -> Self {
        let pool = format!("bench-{}", unique());
        let mut child = Command::new(lab().dir.join("venv/bin/python"))
            .args(["-c", include_str!("listener.py"), &lab().amqp, exchange, &pool])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        output.read_line(&mut line).unwrap();
        assert_eq!(line.trim(), "ready");
        std::thread::sleep(Duration::from_secs(2));
        let input = child.stdin.take().unwrap();
        Self { child, pool, pipes: std::sync::Mutex::new((input, output)) }
    }

    fn pid(&self) -> u32 {
        self.child.id()
    }

    fn seen(&self) -> usize {
        let mut pipes = self.pipes.lock().unwrap();
        pipes.0.write_all(b"\n").unwrap();
        let mut line = String::new();
        pipes.1.read_line(&mut line).unwrap();
        line.trim().parse().unwrap()
    }
}

impl Drop for Python {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
