//! Cinder: volumes, snapshots, and the backends that run.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde::de::{Deserializer, Error as _, IgnoredAny};
use serde_json::Value;

use super::error::{Error, ErrorKind, Result};
use super::json;
use super::session::{HttpClient, Request, Service, Session};
use super::{Volume, VolumeSnapshot};

/// The key in the extra specs of a volume type that names the Glance store for uploads.
const STORE_OF_TYPE: &str = "image_service:store_id";

/// Pages of volume types that are read; a page has 1,000 unless Cinder is configured for fewer.
const TYPE_PAGES_MAX: usize = 200;

impl Session {
    /// Whether Cinder answers us.
    pub async fn probe_volume(&self) -> Result<()> {
        let request =
            Request::get(Service::BlockStorage, "list one volume", &["volumes"]).query(vec![("limit", "1".to_owned())]);
        self.wire.send(request).await?.read::<Volumes>().map(drop)
    }

    /// Whether Cinder shows us the volume types.
    pub async fn probe_volume_types(&self) -> Result<()> {
        list_type_stores(&self.wire).await.map(drop)
    }

    /// Hosts of cinder-volume as `node@backend`, those that are down or disabled too. Needs the role `admin`.
    pub async fn volume_backends(&self) -> Result<Vec<String>> {
        let request = Request::get(Service::BlockStorage, "list services", &["os-services"])
            .query(vec![("binary", "cinder-volume".to_owned())]);
        self.wire.send(request).await?.read().map(backends)
    }

    /// Those of the backends, as `node@backend`, that say that they are not on Ceph. Needs the role `admin`; a backend
    /// that is down says nothing.
    pub async fn other_backends(&self) -> Result<Vec<String>> {
        let request = Request::get(Service::BlockStorage, "list pools", &["scheduler-stats", "get_pools"])
            .query(vec![("detail", "true".to_owned())]);
        self.wire.send(request).await?.read().map(others)
    }
}

pub(super) async fn get(wire: &HttpClient, id: &str) -> Result<Option<Volume>> {
    let path = ["volumes", id];
    let answer = wire.send(Request::get(Service::BlockStorage, format!("get volume {id}"), &path)).await?;
    Ok(answer.read_if_found::<VolumeAnswer>()?.map(|answer| answer.volume))
}

pub(super) async fn get_snapshot(wire: &HttpClient, id: &str) -> Result<Option<VolumeSnapshot>> {
    let path = ["snapshots", id];
    let answer = wire.send(Request::get(Service::BlockStorage, format!("get snapshot {id}"), &path)).await?;
    Ok(answer.read_if_found::<SnapshotAnswer>()?.map(|answer| answer.snapshot))
}

/// The Glance store that each volume type names for uploads, by its name and by its id: a volume may have either.
pub(super) async fn list_type_stores(wire: &HttpClient) -> Result<BTreeMap<String, Option<String>>> {
    let mut stores = BTreeMap::new();
    let mut marker = None;
    for _ in 0..TYPE_PAGES_MAX {
        // those of single projects too
        let mut query = vec![("is_public", "None".to_owned())];
        query.extend(marker.map(|marker| ("marker", marker)));
        let request = Request::get(Service::BlockStorage, "list volume types", &["types"]).query(query);
        let page = wire.send(request).await?.read::<VolumeTypes>()?;
        marker = page.volume_types.last().map(|last| last.id.clone()).filter(|_| !page.volume_type_links.is_empty());
        stores.extend(page.volume_types.into_iter().flat_map(stores_of_type));
        if marker.is_none() {
            return Ok(stores);
        }
    }
    Err(Error::new("list volume types", ErrorKind::Unavailable, format!("more than {TYPE_PAGES_MAX} pages")))
}

fn stores_of_type(mut volume_type: VolumeType) -> [(String, Option<String>); 2] {
    let store = volume_type.extra_specs.remove(STORE_OF_TYPE);
    [(volume_type.name, store.clone()), (volume_type.id, store)]
}

#[derive(Deserialize)]
struct VolumeTypes {
    volume_types: Vec<VolumeType>,
    /// Where the next page is.
    #[serde(default)]
    volume_type_links: Vec<IgnoredAny>,
}

#[derive(Deserialize)]
struct VolumeType {
    id: String,
    name: String,
    /// Cinder shows the key that is read here to administrators only.
    #[serde(default, deserialize_with = "json::texts")]
    extra_specs: BTreeMap<String, String>,
}

#[derive(Deserialize)]
struct VolumeAnswer {
    volume: Volume,
}

#[derive(Deserialize)]
struct SnapshotAnswer {
    snapshot: VolumeSnapshot,
}

#[derive(Deserialize)]
struct Volumes {
    #[serde(rename = "volumes")]
    _volumes: Vec<IgnoredAny>,
}

#[derive(Deserialize)]
struct Services {
    services: Vec<ServiceRecord>,
}

#[derive(Deserialize)]
struct ServiceRecord {
    #[serde(default)]
    binary: Option<String>,
    host: String,
}

#[derive(Deserialize)]
struct Pools {
    pools: Vec<Pool>,
}

#[derive(Deserialize)]
struct Pool {
    name: String,
    #[serde(default, deserialize_with = "json::texts")]
    capabilities: BTreeMap<String, String>,
}

fn others(answer: Pools) -> Vec<String> {
    let is_other = |pool: &Pool| {
        pool.capabilities.get("storage_protocol").is_some_and(|protocol| !protocol.eq_ignore_ascii_case("ceph"))
    };
    let host = |pool: Pool| pool.name.split('#').next().unwrap_or_default().to_owned();
    answer.pools.into_iter().filter(is_other).map(host).collect()
}

fn backends(answer: Services) -> Vec<String> {
    let is_volume = |service: &ServiceRecord| service.binary.as_deref().is_none_or(|binary| binary == "cinder-volume");
    let mut hosts: Vec<String> = answer.services.into_iter().filter(is_volume).map(|service| service.host).collect();
    hosts.sort();
    hosts.dedup();
    hosts
}

/// Image metadata of a volume, as texts. Cinder writes what the image did not have as null.
pub(super) fn image_metadata<'de, D: Deserializer<'de>>(
    json: D,
) -> std::result::Result<BTreeMap<String, String>, D::Error> {
    let mut metadata = BTreeMap::new();
    for (name, value) in json::or_default::<_, BTreeMap<String, Value>>(json)? {
        match value {
            Value::String(text) => drop(metadata.insert(name, text)),
            Value::Number(_) | Value::Bool(_) => drop(metadata.insert(name, value.to_string())),
            Value::Null => {}
            _ => return Err(D::Error::custom(format!("{name:?}: expected a string"))),
        }
    }
    Ok(metadata)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::super::ErrorKind;
    use super::super::json::hostile;
    use super::*;

    fn volume(call: &str, body: &Value) -> Result<Volume> {
        json::read::<VolumeAnswer, _>(call, body).map(|answer| answer.volume)
    }

    const NAMES: &[&str] = &[
        "volume",
        "snapshot",
        "services",
        "id",
        "status",
        "size",
        "host",
        "binary",
        "volume_id",
        "encrypted",
        "volume_image_metadata",
        "os-vol-tenant-attr:tenant_id",
        "os-extended-snapshot-attributes:project_id",
    ];

    #[test]
    fn a_backend_that_is_not_ceph_is_told_by_its_protocol() {
        let body = json!({ "pools": [
            { "name": "n@ceph#ceph", "capabilities": { "storage_protocol": "ceph" } },
            { "name": "n@lvm#lvm", "capabilities": { "storage_protocol": "iSCSI" } },
            { "name": "n@silent#silent", "capabilities": {} },
            { "name": "n@older#older" },
        ] });
        assert_eq!(others(json::read("list pools", &body).unwrap()), ["n@lvm"]);
    }

    #[test]
    fn a_volume_type_tells_the_store_of_its_uploads() {
        let body = json!({"volume_types": [
            {"id": "1", "name": "plain", "extra_specs": {"volume_backend_name": "ceph"}},
            {"id": "2", "name": "quick", "extra_specs": {"image_service:store_id": "fast", "size": 5}},
            {"id": "3", "name": "hidden"},
        ]});
        let answer: VolumeTypes = json::read("list volume types", &body).unwrap();
        assert!(answer.volume_type_links.is_empty());
        let stores: BTreeMap<_, _> = answer.volume_types.into_iter().flat_map(stores_of_type).collect();
        assert_eq!(stores.len(), 6);
        for (name, store) in [("plain", None), ("hidden", None), ("quick", Some("fast")), ("2", Some("fast"))] {
            assert_eq!(stores[name].as_deref(), store, "{name}");
        }
        let more = json!({"volume_types": [], "volume_type_links": [{"rel": "next", "href": "http://c/types"}]});
        assert_eq!(json::read::<VolumeTypes, _>("list volume types", &more).unwrap().volume_type_links.len(), 1);
    }

    #[test]
    fn a_volume_tells_where_it_lies() {
        let body = json!({"volume": {
            "id": "v", "status": "available", "size": 2, "encrypted": false,
            "os-vol-tenant-attr:tenant_id": "p", "os-vol-host-attr:host": "node@ceph#volumes",
            "os-vol-mig-status-attr:name_id": null,
            "volume_image_metadata": {"min_disk": "0", "size": 5, "kernel_id": null, "hw_disk_bus": "scsi"},
        }});
        let volume = volume("x", &body).unwrap();
        assert_eq!(volume.host.as_deref(), Some("node@ceph#volumes"));
        assert_eq!(volume.name_id, None);
        assert_eq!(volume.image_metadata.get("size").map(String::as_str), Some("5"));
        assert_eq!(volume.image_metadata.len(), 3);
    }

    #[test]
    fn without_the_project_there_is_no_answer() {
        let body = json!({"volume": {"id": "v", "status": "available", "size": 2}});
        let error = volume("Cinder: get volume v", &body).unwrap_err();
        assert_eq!(
            error.to_string(),
            r#"Cinder: get volume v: field "volume": missing field `os-vol-tenant-attr:tenant_id`"#
        );
    }

    #[test]
    fn backends_are_the_volume_services() {
        let body = json!({"services": [
            {"binary": "cinder-volume", "host": "b@ceph"}, {"binary": "cinder-scheduler", "host": "b"},
            {"binary": "cinder-volume", "host": "a@ceph"},
        ]});
        assert_eq!(backends(json::read("x", &body).unwrap()), ["a@ceph", "b@ceph"]);
    }

    proptest! {
        #[test]
        fn nothing_in_an_answer_breaks_it(value in hostile::value(NAMES)) {
            for body in [value.clone(), json!({"volume": value}), json!({"snapshot": value}), json!({"services": [value]})] {
                for outcome in [
                    volume("x", &body).map(drop),
                    json::read::<SnapshotAnswer, _>("x", &body).map(drop),
                    json::read("x", &body).map(backends).map(drop),
                    json::read("x", &body).map(others).map(drop),
                ] {
                    if let Err(error) = outcome {
                        prop_assert_eq!(error.kind(), ErrorKind::Protocol);
                    }
                }
            }
        }
    }
}
