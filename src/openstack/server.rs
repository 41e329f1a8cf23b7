//! Nova: servers.

use serde_json::Value;

use super::Server;
use super::error::Result;
use super::json::Fields;
use super::session::{Request, Service, Session};

/// From here on a server holds its flavor's numbers (Pike).
const MICROVERSION: &str = "compute 2.47";

impl Session {
    pub(super) async fn get_server(&self, id: &str) -> Result<Option<Server>> {
        let path = ["servers", id];
        let request = Request::get(Service::Compute, format!("get server {id}"), &path).microversion(MICROVERSION);
        let answer = self.wire.send(request).await?;
        let call = answer.call.clone();
        answer.json_if_found()?.map(|body| server(&call, &body)).transpose()
    }

    /// Whether Nova answers us.
    pub async fn probe_compute(&self) -> Result<()> {
        let request =
            Request::get(Service::Compute, "list one server", &["servers"]).query(vec![("limit", "1".to_owned())]);
        let answer = self.wire.send(request).await?;
        let call = answer.call.clone();
        Fields::new(&call, &answer.json()?)?.array("servers").map(drop)
    }
}

fn server(call: &str, body: &Value) -> Result<Server> {
    let fields = Fields::new(call, body)?.object("server")?;
    // Nova writes "" for a server that boots from a volume.
    let image_id = match fields.optional("image") {
        None => None,
        Some(Value::String(text)) if text.is_empty() => None,
        Some(_) => Some(fields.object("image")?.text("id")?),
    };
    let root_disk = match fields.optional("flavor") {
        None => None,
        Some(_) => fields.object("flavor")?.number_or_none("disk")?,
    };
    Ok(Server {
        id: fields.text("id")?,
        project_id: fields.text("tenant_id")?,
        status: fields.text("status")?,
        host: fields.text_or_none("OS-EXT-SRV-ATTR:host")?,
        image_id,
        root_disk,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::super::ErrorKind;
    use super::super::json::hostile;
    use super::*;

    const NAMES: &[&str] = &["id", "tenant_id", "status", "OS-EXT-SRV-ATTR:host", "image", "flavor", "disk", "server"];

    #[test]
    fn an_empty_image_means_a_volume() {
        let mut body = json!({"server": {
            "id": "s", "tenant_id": "p", "status": "ACTIVE", "OS-EXT-SRV-ATTR:host": "node",
            "image": {"id": "i", "links": []}, "flavor": {"disk": 4, "vcpus": 1, "original_name": "d4"},
        }});
        let from_image = server("x", &body).unwrap();
        assert_eq!(from_image.image_id.as_deref(), Some("i"));
        assert_eq!(from_image.root_disk, Some(4));
        body["server"]["image"] = json!("");
        assert_eq!(server("x", &body).unwrap().image_id, None);
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
