//! What a service does itself, and what it hands over to the daemon: `openstack image create --volume` by Cinder, and
//! `openstack server image create` by Nova. Measured until the service is done with the volume or the instance.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};

use crate::common::cloud::Account;
use crate::common::daemon::Daemon;
use crate::common::lab;
use crate::lab::{Activations, Shape, delete, glance_is_done, setup, spread, stored};
use crate::median;
use crate::meter::Meter;

const LIMIT: Duration = Duration::from_secs(1800);

/// Figures of one upload, by name: seconds, CPU seconds, bytes.
type Figures = BTreeMap<String, f64>;

/// Volumes of two types: the driver of one hands its uploads over.
pub async fn measure(shape: &str, rounds: usize) -> Value {
    let shape = Shape::parse(shape);
    let account = Account::demo().await;
    let mut ways = Map::new();
    for (way, volume_type) in [("stock", "ceph"), ("handed over", "ceph-offload")] {
        let volume = account.create_volume(json!({"size": shape.gib, "volume_type": volume_type})).await;
        spread(&volume.disk, shape.data, shape.piece).await;
        let daemon = if way == "stock" { None } else { Some(setup("server-copy").integrated().start().await) };
        let ask = async || account.stock_upload(&volume).await;
        let is_done = async || account.await_volume(&volume.id, "available").await;
        ways.insert(way.to_owned(), runs(way, &account, daemon.as_ref(), rounds, ask, is_done).await);
        if let Some(daemon) = daemon {
            daemon.stop();
        }
    }
    account.clean().await;
    json!({"shape": shape.name(), "ways": ways})
}

/// A paused instance of the flavor whose disk has the shape's size. On a lab with Nova.
pub async fn snapshots(shape: &str, rounds: usize) -> Value {
    let shape = Shape::parse(shape);
    let account = Account::demo().await;
    let base = account.base_image().await;
    let instance = account.create_instance(&format!("d{}", shape.gib), json!({"imageRef": base})).await;
    assert_eq!(account.instance_action(&instance.id, json!({"pause": null})).await.0, 202);
    account.await_instance(&instance.id, "PAUSED").await;
    spread(&instance.disk, shape.data, shape.piece).await;
    let mut ways = Map::new();
    for (way, driver) in [("stock", ""), ("handed over", "[oslo_messaging_notifications]\ndriver = rbd_offload\n")] {
        std::fs::write(lab().dir.join("etc/nova/compute.d/integration.conf"), driver).unwrap();
        lab().service("restart", &["nova-compute"]).await;
        let daemon = if way == "stock" {
            None
        } else {
            Some(setup("server-copy").set("nova", "integration", "true").start().await)
        };
        let ask = async || account.snapshot_instance(&instance.id).await;
        let is_done = async || drop(account.await_instance(&instance.id, "PAUSED").await);
        ways.insert(way.to_owned(), runs(way, &account, daemon.as_ref(), rounds, ask, is_done).await);
        if let Some(daemon) = daemon {
            daemon.stop();
        }
    }
    account.clean().await;
    json!({"shape": shape.name(), "ways": ways})
}

/// Medians of the rounds. With a daemon, it and not the service has made each image.
async fn runs(
    way: &str,
    account: &Account,
    daemon: Option<&Daemon>,
    rounds: usize,
    ask: impl AsyncFn() -> String,
    is_done: impl AsyncFn(),
) -> Value {
    let activations = Activations::listen().await;
    let mut runs: Vec<Figures> = Vec::new();
    for _ in 0..rounds {
        let before = stored("images").await;
        let mut meter = Meter::start(daemon.map(Daemon::pid));
        let began = Instant::now();
        let id = ask().await;
        let active = activations.wait_for(&id, LIMIT, || meter.look()).await;
        is_done().await;
        let mut figures = Figures::new();
        figures.insert("active".into(), (active - began).as_secs_f64());
        figures.insert("done".into(), began.elapsed().as_secs_f64());
        figures.extend(meter.cpu().into_iter().map(|(name, seconds)| (format!("cpu: {name}"), seconds)));
        if let Some(daemon) = daemon {
            let job = daemon.await_job(&id, "done").await;
            assert_eq!(job["method"], "server-copy", "{job:#}");
        }
        glance_is_done(account, &id).await;
        figures.insert("cpu: glance, with the hash".into(), meter.cpu()["glance"]);
        for (name, [bytes_in, bytes_out]) in meter.finish().network {
            figures.insert(format!("in: {name}"), bytes_in as f64);
            figures.insert(format!("out: {name}"), bytes_out as f64);
        }
        figures.insert("stored".into(), stored("images").await.saturating_sub(before) as f64);
        eprintln!("{way}: {figures:.2?}");
        delete(account, &id).await;
        runs.push(figures);
    }
    let middle = |name: &str| median(runs.iter().filter_map(|run| run.get(name).copied()).collect());
    let names: Vec<String> = runs.first().map(|run| run.keys().cloned().collect()).unwrap_or_default();
    names.into_iter().map(|name| (name.clone(), json!(middle(&name)))).collect::<Map<_, _>>().into()
}
