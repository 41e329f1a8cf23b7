//! RBD images, seen and changed by Debian's own bindings (`disk.py`).

use std::collections::BTreeMap;

use rbd_offload::transfer::OWNERSHIP_TAG;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::python::Script;
use super::{MIB, lab, seconds, until};

static SCRIPT: Script = Script::new(concat!(include_str!("serve.py"), include_str!("disk.py")));

/// What image, pool and function say.
async fn ask<T: DeserializeOwned>(function: &str, arguments: Value) -> T {
    let request = json!({"function": function, "arguments": arguments});
    let asked = request.clone();
    let answer = tokio::task::spawn_blocking(move || SCRIPT.ask(&lab().dir, &asked)).await.unwrap();
    let said = answer.unwrap_or_else(|error| panic!("{request}: {error}"));
    serde_json::from_slice(&said).unwrap_or_else(|e| panic!("{request}: {e}: {}", String::from_utf8_lossy(&said)))
}

/// What many images say, for the price of one process.
async fn ask_each<T: DeserializeOwned>(function: &str, arguments: Vec<Value>) -> Vec<T> {
    ask("each", json!({"function": function, "arguments": arguments})).await
}

/// Size and bytes of an image.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Digest {
    pub size: u64,
    hash: String,
}

#[derive(Debug, Clone, Deserialize)]
pub struct Facts {
    pub id: String,
    pub size: u64,
    pub features: u64,
    pub flags: u64,
    pub parent: Option<Value>,
    pub metadata: BTreeMap<String, String>,
    /// Name, and whether it is protected.
    pub snapshots: BTreeMap<String, bool>,
    /// Former names of snapshots whose removal has begun.
    pub trashed: Vec<String>,
    pub lockers: usize,
    /// The pool of its data, where that is not its own.
    pub data_pool: Option<String>,
}

/// An RBD image `pool/name`.
#[derive(Debug, Clone)]
pub struct Disk {
    pub pool: String,
    pub name: String,
}

impl Disk {
    pub fn new(pool: &str, name: impl Into<String>) -> Self {
        Self { pool: pool.into(), name: name.into() }
    }

    /// What Glance has, or is to have, of an image.
    pub fn of_image(id: &str) -> Self {
        Self::new("images", id)
    }

    fn arguments(&self, more: Value) -> Value {
        let mut arguments = json!({"pool": self.pool, "image": self.name});
        arguments.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        arguments
    }

    /// Random bytes of a seed, at these places (offset and length).
    pub async fn write(&self, seed: u64, places: &[(u64, u64)]) {
        let extents: Vec<_> =
            places.iter().zip(0u64..).map(|((at, length), n)| json!([at, length, seed * 1000 + n])).collect();
        ask::<()>("write", self.arguments(json!({"extents": extents}))).await;
    }

    /// A few MiB here and there, at the very beginning and the very end too, for a disk of 64 MiB and more.
    pub async fn write_some(&self, seed: u64) {
        let end = self.facts().await.unwrap().size;
        let places = [(0, 3 * MIB), (9 * MIB + 777, 5000), (24 * MIB, 8 * MIB), (end - 2 * MIB - 100, 2 * MIB + 100)];
        self.write(seed, &places).await;
    }

    pub async fn put(&self, offset: u64, bytes: &[u8]) {
        let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        ask::<()>("put", self.arguments(json!({"offset": offset, "hex": hex}))).await;
    }

    pub async fn resize(&self, size: u64) {
        ask::<()>("resize", self.arguments(json!({"size": size}))).await;
    }

    pub async fn create(&self, size: u64) {
        ask::<()>("create", self.arguments(json!({"size": size}))).await;
    }

    /// In objects of 64 KiB: a transfer has many more steps for the same bytes.
    pub async fn create_in_small_objects(&self, size: u64) {
        ask::<()>("create", self.arguments(json!({"size": size, "order": 16}))).await;
    }

    pub async fn remove(&self) {
        ask::<()>("remove", self.arguments(json!({}))).await;
    }

    /// A protected snapshot.
    pub async fn snapshot(&self, snapshot: &str) {
        ask::<()>("make_snapshot", self.arguments(json!({"snapshot": snapshot}))).await;
    }

    /// An image as a daemon could have left it, with this ownership tag or without one.
    pub async fn leave(&self, tag: Option<&str>) {
        ask::<()>("leave", self.arguments(json!({"key": OWNERSHIP_TAG, "tag": tag}))).await;
    }

    /// A snapshot as a daemon could have left it, with an ownership tag.
    pub async fn leave_snapshot(&self, snapshot: &str, tag: &str) {
        ask::<()>("leave_snapshot", self.arguments(json!({"snapshot": snapshot, "tag": tag}))).await;
    }

    /// The ownership tags of the image's temporary snapshots.
    pub async fn snapshot_tags(&self) -> BTreeMap<String, String> {
        ask("snapshot_tags", self.arguments(json!({}))).await
    }

    pub async fn remove_snapshot(&self, snapshot: &str) {
        ask::<()>("remove_snapshot", self.arguments(json!({"snapshot": snapshot}))).await;
    }

    pub async fn digest(&self, snapshot: Option<&str>) -> Digest {
        ask("digest", self.arguments(json!({"snapshot": snapshot}))).await
    }

    /// `None`: there is no such image.
    pub async fn facts(&self) -> Option<Facts> {
        ask("facts", self.arguments(json!({}))).await
    }

    /// The facts once no client holds the image's lock: the lock goes with its client's last handle.
    pub async fn unlocked_facts(&self) -> Facts {
        until("no lock is on the image", seconds(30), || async {
            self.facts().await.filter(|facts| facts.lockers == 0)
        })
        .await
    }
}

/// The digests of many, at the head or at a snapshot.
pub async fn digests(disks: &[(Disk, Option<&str>)]) -> Vec<Digest> {
    let arguments = disks.iter().map(|(disk, snapshot)| disk.arguments(json!({"snapshot": snapshot}))).collect();
    ask_each("digest", arguments).await
}

/// The facts of many.
pub async fn facts(disks: &[Disk]) -> Vec<Option<Facts>> {
    ask_each("facts", disks.iter().map(|disk| disk.arguments(json!({}))).collect()).await
}

/// Id of the deployment that a jobs namespace belongs to.
pub async fn deployment(namespace: &str) -> String {
    ask("deployment", json!({"pool": "images", "namespace": namespace})).await
}

/// Writes an object of a jobs namespace.
pub async fn put_object(namespace: &str, name: &str, text: &str) {
    let arguments = json!({"pool": "images", "namespace": namespace, "name": name, "text": text});
    ask::<()>("put_object", arguments).await;
}

/// The record of a job.
pub async fn job(namespace: &str, image: &str) -> Option<Value> {
    job_in("images", namespace, image).await
}

pub async fn job_in(pool: &str, namespace: &str, image: &str) -> Option<Value> {
    ask("job", json!({"pool": pool, "namespace": namespace, "image": image})).await
}

/// The state of every job in the namespace, by image.
pub async fn jobs(namespace: &str) -> BTreeMap<String, String> {
    ask("jobs", json!({"pool": "images", "namespace": namespace})).await
}

/// Objects of the namespace that a client holds a lock on.
pub async fn leases(namespace: &str) -> Vec<String> {
    ask("leases", json!({"pool": "images", "namespace": namespace, "expired": true})).await
}

/// The same, without the locks of which the time ran out.
pub async fn valid_leases(namespace: &str) -> Vec<String> {
    ask("leases", json!({"pool": "images", "namespace": namespace, "expired": false})).await
}

/// Removes all records of the namespace.
pub async fn forget(namespace: &str) {
    forget_in("images", namespace).await;
}

pub async fn forget_in(pool: &str, namespace: &str) {
    ask::<()>("forget", json!({"pool": pool, "namespace": namespace})).await;
}

pub async fn census() -> Vec<String> {
    ask("census", json!({})).await
}
