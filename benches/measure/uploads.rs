//! `openstack image create --volume`: by stock Cinder, and by a Cinder that hands its uploads over to the daemon.
//! Measured until Cinder is done with the volume.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};

use crate::common::cloud::Account;
use crate::common::daemon::Daemon;
use crate::lab::{Activations, Shape, delete, glance_is_done, setup, spread, stored};
use crate::median;
use crate::meter::Meter;

/// What it is called, and the volume type whose driver does it.
const WAYS: [(&str, &str); 2] = [("stock", "ceph"), ("handed over", "ceph-offload")];
const LIMIT: Duration = Duration::from_secs(1800);

/// Figures of one upload, by name: seconds, CPU seconds, bytes.
type Figures = BTreeMap<String, f64>;

pub async fn measure(shape: &str, rounds: usize) -> Value {
    let shape = Shape::parse(shape);
    let account = Account::demo().await;
    let mut ways = Map::new();
    for (way, volume_type) in WAYS {
        let volume = account.create_volume(json!({"size": shape.gib, "volume_type": volume_type})).await;
        spread(&volume.disk, shape.data, shape.piece).await;
        let daemon = if way == "stock" { None } else { Some(setup("server-copy").integrated().start().await) };
        let activations = Activations::listen().await;
        let mut runs = Vec::new();
        for _ in 0..rounds {
            let before = stored("images").await;
            let mut meter = Meter::start(daemon.as_ref().map(Daemon::pid));
            let began = Instant::now();
            let id = account.stock_upload(&volume).await;
            let active = activations.wait_for(&id, LIMIT, || meter.look()).await;
            account.await_volume(&volume.id, "available").await;
            let mut figures = Figures::new();
            figures.insert("active".into(), (active - began).as_secs_f64());
            figures.insert("available".into(), began.elapsed().as_secs_f64());
            figures.extend(meter.cpu().into_iter().map(|(name, seconds)| (format!("cpu: {name}"), seconds)));
            if let Some(daemon) = &daemon {
                let job = daemon.await_job(&id, "done").await;
                assert_eq!(job["method"], "server-copy", "{job:#}");
            }
            glance_is_done(&account, &id).await;
            figures.insert("cpu: glance, with the hash".into(), meter.cpu()["glance"]);
            for (name, [bytes_in, bytes_out]) in meter.finish().network {
                figures.insert(format!("in: {name}"), bytes_in as f64);
                figures.insert(format!("out: {name}"), bytes_out as f64);
            }
            figures.insert("stored".into(), stored("images").await.saturating_sub(before) as f64);
            eprintln!("{way}: {figures:.2?}");
            delete(&account, &id).await;
            runs.push(figures);
        }
        let medians: Map<String, Value> = runs[0]
            .keys()
            .map(|name| (name.clone(), json!(median(runs.iter().filter_map(|run| run.get(name).copied()).collect()))))
            .collect();
        ways.insert(way.to_owned(), Value::Object(medians));
        if let Some(daemon) = daemon {
            daemon.stop();
        }
    }
    account.clean().await;
    json!({"shape": shape.name(), "ways": ways})
}
