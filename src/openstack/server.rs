//! Nova: servers.

use std::collections::BTreeMap;

use http::StatusCode;
use serde::Deserialize;
use serde::de::{Deserializer, Error as _};
use serde_json::Value;

use super::error::Result;
use super::session::{HttpClient, Request, Service};
use super::{Server, json};

/// The newest first: from 2.98 on a server holds the properties that its image had when it was made, from 2.47 on
/// (Pike) its flavor's numbers.
const MICROVERSIONS: [&str; 2] = ["compute 2.98", "compute 2.47"];

pub(super) async fn get(wire: &HttpClient, id: &str) -> Result<Option<Server>> {
    let path = ["servers", id];
    let request =
        |microversion| Request::get(Service::Compute, format!("get server {id}"), &path).microversion(microversion);
    let [newest, oldest] = MICROVERSIONS;
    let mut answer = wire.send(request(newest)).await?;
    if answer.status == StatusCode::NOT_ACCEPTABLE {
        answer = wire.send(request(oldest)).await?;
    }
    Ok(answer.read_if_found::<Answer>()?.map(|answer| answer.server.into()))
}

#[derive(Deserialize)]
struct Answer {
    server: ServerRecord,
}

#[derive(Deserialize)]
struct ServerRecord {
    id: String,
    tenant_id: String,
    #[serde(default)]
    user_id: Option<String>,
    status: String,
    #[serde(default, rename = "OS-EXT-STS:task_state")]
    task_state: Option<String>,
    #[serde(default, rename = "OS-EXT-SRV-ATTR:host")]
    host: Option<String>,
    #[serde(default, deserialize_with = "image")]
    image: Option<ImageRecord>,
    #[serde(default, deserialize_with = "json::or_default")]
    flavor: Flavor,
}

#[derive(Deserialize)]
struct ImageRecord {
    id: String,
    #[serde(default, deserialize_with = "properties")]
    properties: Option<BTreeMap<String, String>>,
}

#[derive(Default, Deserialize)]
struct Flavor {
    #[serde(default)]
    disk: Option<u64>,
    #[serde(default, deserialize_with = "json::texts")]
    extra_specs: BTreeMap<String, String>,
}

fn properties<'de, D: Deserializer<'de>>(json: D) -> std::result::Result<Option<BTreeMap<String, String>>, D::Error> {
    json::texts(json).map(Some)
}

/// Nova writes "" for a server that boots from a volume.
fn image<'de, D: Deserializer<'de>>(json: D) -> std::result::Result<Option<ImageRecord>, D::Error> {
    match Value::deserialize(json)? {
        Value::Null => Ok(None),
        Value::String(text) if text.is_empty() => Ok(None),
        other => serde_json::from_value(other).map(Some).map_err(D::Error::custom),
    }
}

impl From<ServerRecord> for Server {
    fn from(record: ServerRecord) -> Self {
        let is_set = |value: Option<&String>| value.is_some_and(|value| value.eq_ignore_ascii_case("true"));
        let (image_id, image_properties) = record.image.map(|image| (image.id, image.properties)).unzip();
        let image_properties = image_properties.flatten();
        let of_image = |name: &str| image_properties.as_ref().and_then(|properties| properties.get(name));
        Self {
            id: record.id,
            project_id: record.tenant_id,
            user_id: record.user_id,
            status: record.status,
            task_state: record.task_state,
            host: record.host,
            image_id,
            root_disk: record.flavor.disk,
            encrypted: is_set(of_image("hw_ephemeral_encryption"))
                || is_set(record.flavor.extra_specs.get("hw:ephemeral_encryption")),
            image_properties,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::super::json::hostile;
    use super::super::{DiskChange, ErrorKind};
    use super::*;

    fn server(call: &str, body: &Value) -> Result<Server> {
        json::read::<Answer, _>(call, body).map(|answer| answer.server.into())
    }

    const NAMES: &[&str] = &[
        "id",
        "tenant_id",
        "user_id",
        "status",
        "OS-EXT-STS:task_state",
        "OS-EXT-SRV-ATTR:host",
        "image",
        "properties",
        "flavor",
        "disk",
        "extra_specs",
        "server",
    ];

    #[test]
    fn an_empty_image_means_a_volume() {
        let mut body = json!({"server": {
            "id": "s", "tenant_id": "p", "status": "ACTIVE", "OS-EXT-SRV-ATTR:host": "node",
            "image": {"id": "i", "links": []}, "flavor": {"disk": 4, "vcpus": 1, "original_name": "d4"},
        }});
        let from_image = server("x", &body).unwrap();
        assert_eq!(from_image.image_id.as_deref(), Some("i"));
        assert_eq!((from_image.root_disk, from_image.image_properties), (Some(4), None));
        body["server"]["image"] = json!("");
        assert_eq!(server("x", &body).unwrap().image_id, None);
    }

    #[test]
    fn what_the_image_was_like_and_what_nova_does_is_read() {
        let mut body = json!({"server": {
            "id": "s", "tenant_id": "p", "status": "ACTIVE", "OS-EXT-STS:task_state": "image_uploading",
            "image": {"id": "i", "properties": {"hw_disk_bus": "scsi", "hw_odd": 1}},
            "flavor": {"disk": 4, "extra_specs": {"hw:ephemeral_encryption": "True"}},
        }});
        let read = server("x", &body).unwrap();
        assert_eq!(read.task_state.as_deref(), Some("image_uploading"));
        assert_eq!(read.image_properties, Some(BTreeMap::from([("hw_disk_bus".into(), "scsi".into())])));
        assert!(read.encrypted && read.disk_change().is_none());
        body["server"]["OS-EXT-STS:task_state"] = json!("deleting");
        body["server"]["flavor"]["extra_specs"] = json!({});
        let read = server("x", &body).unwrap();
        assert!(!read.encrypted && read.disk_change() == Some(DiskChange::Deleted));
    }

    /// Every task state of Nova 34 beside a status that says nothing, and every status without a task.
    #[test]
    fn what_may_remove_or_replace_the_disk_is_told_from_what_does_not() {
        use DiskChange::{Built, Deleted, Migrated, Offloaded, Other, Rebuilt, Resized};
        let change = |status: &str, task: Option<&str>| {
            let body =
                json!({"server": {"id": "s", "tenant_id": "p", "status": status, "OS-EXT-STS:task_state": task}});
            server("x", &body).unwrap().disk_change()
        };
        let tasks = [
            (Some(Deleted), "deleting soft-deleting"),
            (Some(Rebuilt), "rebuilding rebuild_block_device_mapping rebuild_spawning"),
            (Some(Offloaded), "shelving_offloading unshelving"),
            (
                Some(Resized),
                "resize_prep resize_migrating resize_migrated resize_finish resize_reverting resize_confirming",
            ),
            (Some(Migrated), "migrating"),
            (Some(Built), "scheduling block_device_mapping networking spawning"),
            (Some(Other), "a_task_of_a_later_nova"),
            (None, "image_snapshot image_snapshot_pending image_pending_upload image_uploading image_backup"),
            (None, "updating_password pausing unpausing suspending resuming powering-off powering-on restoring"),
            (None, "rebooting reboot_pending reboot_started rebooting_hard reboot_pending_hard reboot_started_hard"),
            (None, "rescuing unrescuing shelving shelving_image_pending_upload shelving_image_uploading"),
        ];
        for (expected, names) in tasks {
            for task in names.split(' ') {
                assert_eq!(change("ACTIVE", Some(task)), expected, "{task}");
            }
        }
        let statuses = [
            (Some(Deleted), "DELETED SOFT_DELETED"),
            (Some(Rebuilt), "REBUILD"),
            (Some(Offloaded), "SHELVED_OFFLOADED"),
            (Some(Resized), "RESIZE VERIFY_RESIZE REVERT_RESIZE"),
            (Some(Migrated), "MIGRATING"),
            (Some(Built), "BUILD"),
            (None, "ACTIVE SHUTOFF PAUSED SUSPENDED RESCUE SHELVED ERROR REBOOT HARD_REBOOT PASSWORD UNKNOWN"),
        ];
        for (expected, names) in statuses {
            for status in names.split(' ') {
                assert_eq!(change(status, None), expected, "{status}");
            }
        }
    }

    proptest! {
        #[test]
        fn nothing_in_an_answer_breaks_it(value in hostile::value(NAMES)) {
            for body in [value.clone(), json!({"server": value})] {
                if let Err(error) = server("x", &body) {
                    prop_assert_eq!(error.kind(), ErrorKind::Protocol);
                }
            }
        }
    }
}
