//! Many small volumes at once.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use futures::future::join_all;
use futures::{StreamExt, stream};
use serde_json::{Map, Value, json};

use crate::common::cloud::{Account, Volume};
use crate::common::{MIB, pause};
use crate::lab::{Activations, delete, glance_is_done, setup, spread};
use crate::meter::Meter;

/// Disks are made smaller behind Cinder's back, so that stock is not measured for hours.
const DISK: u64 = 64 * MIB;
const DATA: u64 = 16 * MIB;
const LIMIT: Duration = Duration::from_secs(1800);

pub async fn measure(count: usize) -> Value {
    let account = Account::demo().await;
    let volumes: Vec<Volume> = stream::iter(0..count)
        .map(|_| async {
            let volume = account.create_volume(json!({})).await;
            volume.disk.resize(DISK).await;
            spread(&volume.disk, DATA, 4 * MIB).await;
            volume
        })
        .buffer_unordered(4)
        .collect()
        .await;
    let mut results = Map::new();
    for (name, max_jobs) in
        [("stock", 0), ("server-copy, 1 job at a time", 1), ("server-copy, 4", 4), ("server-copy, 16", 16)]
    {
        let max_jobs_text = max_jobs.to_string();
        let daemon = match max_jobs {
            0 => None,
            _ => Some(setup("auto").set("offload", "max_jobs", &max_jobs_text).start().await),
        };
        let activations = Activations::listen().await;
        let meter = Meter::start(daemon.as_ref().map(crate::common::daemon::Daemon::pid));
        let began = Instant::now();
        let asked = volumes.iter().map(|volume| async {
            if max_jobs == 0 { account.stock_upload(volume).await } else { account.request(volume).await }
        });
        let images = join_all(asked).await;
        let filed = began.elapsed().as_secs_f64();
        let mut waiting: HashSet<&String> = images.iter().collect();
        let mut seconds = Vec::new();
        while !waiting.is_empty() {
            for active in activations.news().await {
                if waiting.remove(&active) {
                    seconds.push(began.elapsed().as_secs_f64());
                }
            }
            assert!(began.elapsed() < LIMIT, "{} images are not active", waiting.len());
            pause(Duration::from_millis(20)).await;
        }
        let all = began.elapsed().as_secs_f64();
        let cpu = meter.cpu();
        meter.finish();
        eprintln!("{name}: {count} images in {all:.1} s");
        results.insert(
            name.to_owned(),
            json!({"images": count, "filed": filed, "seconds": all, "per_second": count as f64 / all,
                   "first": seconds.first(), "cpu": cpu}),
        );
        for (image, volume) in images.iter().zip(&volumes) {
            glance_is_done(&account, image).await;
            account.await_volume(&volume.id, "available").await;
            delete(&account, image).await;
        }
    }
    account.clean().await;
    Value::Object(results)
}
