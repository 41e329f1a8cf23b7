//! Memory of a daemon that has nothing to do, of one with many jobs that wait, and of a C program with the same
//! handles.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use rbd_offload::ceph::Client;
use rbd_offload::job::clock::Clock;
use rbd_offload::job::record::Record;
use rbd_offload::job::store::Store;
use rbd_offload::request::{Source, Trigger};
use serde_json::{Value, json};
use uuid::Uuid;

use crate::common::{disk, lab, pause};
use crate::lab::setup;
use crate::meter;

/// How the unit sets glibc's allocator.
const UNIT_ENVIRONMENT: [(&str, &str); 2] = [("MALLOC_ARENA_MAX", "2"), ("MALLOC_MMAP_THRESHOLD_", "131072")];

pub async fn measure(jobs: usize) -> Value {
    // as in the unit
    let daemon =
        UNIT_ENVIRONMENT.iter().fold(setup("auto"), |setup, (name, value)| setup.with_variable(name, Path::new(value)));
    let daemon = daemon.start().await;
    pause(Duration::from_secs(15)).await;
    let (idle, threads) = (meter::rss(&[daemon.pid()]), threads(daemon.pid()));
    let (idle_own, idle_heap) = (meter::own_memory(daemon.pid()), meter::anonymous_memory(daemon.pid()));
    let clients = clients(daemon.pid());
    let handles = handles(clients);
    let quiet = cpu_a_minute(daemon.pid()).await;

    // Jobs that wait for their next attempt, for as long as a job may.
    let client = Client::connect(&lab().ceph_conf(), "rbd-offload").await.unwrap();
    let objects = client.objects("images", &daemon.namespace).unwrap();
    let store = Store::new(Arc::new(objects), Clock::System);
    for _ in 0..jobs {
        let id = Uuid::new_v4();
        let source = Some(Source::Volume(Uuid::new_v4()));
        let now = jiff::Timestamp::now();
        let mut record = Record::new(id, Trigger::Request, source, None, now);
        record.not_before = Some(now + Duration::from_secs(115));
        store.objects().create(&Store::object(id), &record.to_bytes()).await.unwrap();
        if let Some(stored) = store.load(id).await.unwrap() {
            store.index(&stored).await.unwrap();
        }
    }
    let written = disk::jobs(&daemon.namespace).await.len();
    pause(Duration::from_secs(20)).await;
    let (queued, queued_own) = (meter::rss(&[daemon.pid()]), meter::own_memory(daemon.pid()));
    let queued_heap = meter::anonymous_memory(daemon.pid());
    let busy = cpu_a_minute(daemon.pid()).await;
    let waiting = daemon.health().await.map(|(_, body)| body["jobs_waiting"].clone());
    let namespace = daemon.namespace.clone();
    daemon.stop();
    disk::forget(&namespace).await;
    eprintln!("idle {} KiB, with {written} jobs {} KiB", idle >> 10, queued >> 10);
    json!({"idle": idle, "idle_own": idle_own, "idle_heap": idle_heap, "handles_heap": handles, "clients": clients, "queued_own": queued_own,
           "queued_heap": queued_heap, "threads": threads, "idle_cpu_a_minute": quiet, "queued": queued,
           "queued_jobs": written, "queued_cpu_a_minute": busy, "waiting": waiting})
}

/// The librados clients of a process: each has a thread of this name.
fn clients(pid: u32) -> usize {
    let names = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    names.filter(|task| std::fs::read(task.path().join("comm")).is_ok_and(|name| name == b"msgr-worker-0\n")).count()
}

/// Bytes of anonymous memory of `handles.c` with so many clients.
fn handles(clients: usize) -> u64 {
    let dir = tempfile::tempdir().unwrap();
    let (source, program) = (dir.path().join("handles.c"), dir.path().join("handles"));
    std::fs::write(&source, include_str!("handles.c")).unwrap();
    let built = Command::new("cc").arg("-O2").arg(&source).arg("-o").arg(&program).args(["-lrbd", "-lrados"]).status();
    assert!(built.unwrap().success());
    let mut child = Command::new(&program)
        .arg(lab().ceph_conf())
        .args(["rbd-offload", &clients.to_string(), "images", "volumes", "volumes2"])
        .envs(UNIT_ENVIRONMENT)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line.trim(), "ready");
    std::thread::sleep(Duration::from_secs(5));
    let bytes = meter::anonymous_memory(child.id());
    drop(child.stdin.take());
    assert!(child.wait().unwrap().success());
    bytes
}

fn threads(pid: u32) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/task")).map_or(0, Iterator::count)
}

async fn cpu_a_minute(pid: u32) -> f64 {
    let before = meter::cpu(&[pid]);
    pause(Duration::from_secs(30)).await;
    (meter::cpu(&[pid]) - before) * 2.0
}
