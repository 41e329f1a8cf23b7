//! Cinder: volumes, snapshots, and the backends that run.

use std::collections::BTreeMap;

use serde_json::Value;

use super::error::Result;
use super::json::Fields;
use super::session::{Request, Service, Session};
use super::{Volume, VolumeSnapshot};

impl Session {
    pub(super) async fn get_volume(&self, id: &str) -> Result<Option<Volume>> {
        let path = ["volumes", id];
        let answer = self.wire.send(Request::get(Service::BlockStorage, format!("get volume {id}"), &path)).await?;
        let call = answer.call.clone();
        answer.json_if_found()?.map(|body| volume(&call, &body)).transpose()
    }

    pub(super) async fn get_snapshot(&self, id: &str) -> Result<Option<VolumeSnapshot>> {
        let path = ["snapshots", id];
        let answer = self.wire.send(Request::get(Service::BlockStorage, format!("get snapshot {id}"), &path)).await?;
        let call = answer.call.clone();
        answer.json_if_found()?.map(|body| snapshot(&call, &body)).transpose()
    }

    /// Whether Cinder answers us.
    pub async fn probe_volume(&self) -> Result<()> {
        let request =
            Request::get(Service::BlockStorage, "list one volume", &["volumes"]).query(vec![("limit", "1".to_owned())]);
        let answer = self.wire.send(request).await?;
        let call = answer.call.clone();
        Fields::new(&call, &answer.json()?)?.array("volumes").map(drop)
    }

    /// Hosts of cinder-volume as `node@backend`, those that are down or disabled too. Needs the role `admin`.
    pub async fn volume_backends(&self) -> Result<Vec<String>> {
        let request = Request::get(Service::BlockStorage, "list services", &["os-services"])
            .query(vec![("binary", "cinder-volume".to_owned())]);
        let answer = self.wire.send(request).await?;
        let call = answer.call.clone();
        backends(&call, &answer.json()?)
    }
}

impl Session {
    /// Those of the backends, as `node@backend`, that say that they are not on Ceph. Needs the role `admin`; a backend
    /// that is down says nothing.
    pub async fn other_backends(&self) -> Result<Vec<String>> {
        let request = Request::get(Service::BlockStorage, "list pools", &["scheduler-stats", "get_pools"])
            .query(vec![("detail", "true".to_owned())]);
        let answer = self.wire.send(request).await?;
        let call = answer.call.clone();
        others(&call, &answer.json()?)
    }
}

fn others(call: &str, body: &Value) -> Result<Vec<String>> {
    let mut hosts = Vec::new();
    for item in Fields::new(call, body)?.array("pools")? {
        let pool = Fields::new(call, item)?;
        let protocol = item.pointer("/capabilities/storage_protocol").and_then(Value::as_str);
        if protocol.is_some_and(|protocol| !protocol.eq_ignore_ascii_case("ceph")) {
            let name = pool.text("name")?;
            hosts.push(name.split('#').next().unwrap_or(&name).to_owned());
        }
    }
    Ok(hosts)
}

fn backends(call: &str, body: &Value) -> Result<Vec<String>> {
    let mut hosts = Vec::new();
    for item in Fields::new(call, body)?.array("services")? {
        let fields = Fields::new(call, item)?;
        if fields.text_or_none("binary")?.is_none_or(|binary| binary == "cinder-volume") {
            hosts.push(fields.text("host")?);
        }
    }
    hosts.sort();
    hosts.dedup();
    Ok(hosts)
}

fn volume(call: &str, body: &Value) -> Result<Volume> {
    let fields = Fields::new(call, body)?.object("volume")?;
    let mut image_metadata = BTreeMap::new();
    if fields.optional("volume_image_metadata").is_some() {
        let metadata = fields.object("volume_image_metadata")?;
        for (name, value) in metadata.iter() {
            match value {
                Value::String(text) => drop(image_metadata.insert(name.clone(), text.clone())),
                Value::Number(_) | Value::Bool(_) => drop(image_metadata.insert(name.clone(), value.to_string())),
                // Cinder writes what the image did not have as null.
                Value::Null => {}
                other => return Err(metadata.wrong(name, "a string", other)),
            }
        }
    }
    Ok(Volume {
        id: fields.text("id")?,
        project_id: fields.text("os-vol-tenant-attr:tenant_id")?,
        status: fields.text("status")?,
        size: fields.number("size")?,
        host: fields.text_or_none("os-vol-host-attr:host")?,
        name_id: fields.text_or_none("os-vol-mig-status-attr:name_id")?,
        encrypted: fields.flag("encrypted")?,
        image_metadata,
    })
}

fn snapshot(call: &str, body: &Value) -> Result<VolumeSnapshot> {
    let fields = Fields::new(call, body)?.object("snapshot")?;
    Ok(VolumeSnapshot {
        id: fields.text("id")?,
        volume_id: fields.text("volume_id")?,
        project_id: fields.text("os-extended-snapshot-attributes:project_id")?,
        status: fields.text("status")?,
        size: fields.number("size")?,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::super::ErrorKind;
    use super::super::json::hostile;
    use super::*;

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
        assert_eq!(others("list pools", &body).unwrap(), ["n@lvm"]);
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
            r#"Cinder: get volume v: the answer has no field "os-vol-tenant-attr:tenant_id""#
        );
    }

    #[test]
    fn backends_are_the_volume_services() {
        let body = json!({"services": [
            {"binary": "cinder-volume", "host": "b@ceph"}, {"binary": "cinder-scheduler", "host": "b"},
            {"binary": "cinder-volume", "host": "a@ceph"},
        ]});
        assert_eq!(backends("x", &body).unwrap(), ["a@ceph", "b@ceph"]);
    }

    proptest! {
        #[test]
        fn nothing_in_an_answer_breaks_it(value in hostile::value(NAMES)) {
            for body in [value.clone(), json!({"volume": value}), json!({"snapshot": value}), json!({"services": [value]})] {
                for outcome in [
                    volume("x", &body).map(drop), snapshot("x", &body).map(drop), backends("x", &body).map(drop),
                ] {
                    if let Err(error) = outcome {
                        prop_assert_eq!(error.kind(), ErrorKind::Protocol);
                    }
                }
            }
        }
    }
}
