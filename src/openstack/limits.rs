//! Keystone's unified limits: how much a project's images may take.

use serde_json::Value;

use super::error::Result;
use super::json::Fields;
use super::session::{Request, Service, Session};

/// Glance's name of the limit; nobody else's.
const RESOURCE: &str = "image_size_total";

/// Glance counts this limit in MiB.
const UNIT: u64 = 1 << 20;

impl Session {
    /// Registered limits can be read by everybody, another project's limits by `admin`.
    pub(super) async fn read_image_size_limit(&self, project_id: &str) -> Result<Option<u64>> {
        let login = self.wire.login(None).await?;
        let region = self.wire.region_of(&login, Service::Image);
        let registered = Request::get(Service::Identity, "list registered limits", &["registered_limits"])
            .query(vec![("resource_name", RESOURCE.to_owned())]);
        let answer = self.wire.send(registered).await?;
        let call = answer.call.clone();
        let Some(default) =
            choose(&call, &answer.json()?, "registered_limits", "default_limit", region.as_deref(), None)?
        else {
            return Ok(None);
        };
        let own = Request::get(Service::Identity, format!("list limits of project {project_id}"), &["limits"])
            .query(vec![("resource_name", RESOURCE.to_owned()), ("project_id", project_id.to_owned())]);
        let answer = self.wire.send(own).await?;
        let call = answer.call.clone();
        let own = choose(&call, &answer.json()?, "limits", "resource_limit", region.as_deref(), Some(project_id))?;
        Ok(bytes(own.unwrap_or(default)))
    }
}

/// -1 stands for "no limit".
fn bytes(limit: i64) -> Option<u64> {
    u64::try_from(limit).ok().map(|limit| limit.saturating_mul(UNIT))
}

/// The limit of our region, else the one of no region.
fn choose(
    call: &str,
    body: &Value,
    list: &str,
    field: &str,
    region: Option<&str>,
    project: Option<&str>,
) -> Result<Option<i64>> {
    let mut everywhere = None;
    for item in Fields::new(call, body)?.array(list)? {
        let fields = Fields::new(call, item)?;
        if fields.text("resource_name")? != RESOURCE {
            continue;
        }
        if project.is_some() && fields.text_or_none("project_id")?.as_deref() != project {
            continue;
        }
        let limit = fields.integer(field)?;
        match fields.text_or_none("region_id")? {
            None => everywhere = Some(limit),
            Some(here) if region.is_none_or(|region| region == here) => return Ok(Some(limit)),
            Some(_) => {}
        }
    }
    Ok(everywhere)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::super::ErrorKind;
    use super::super::json::hostile;
    use super::*;

    fn limit(region: Option<&str>, project: Option<&str>, value: i64) -> Value {
        json!({"resource_name": RESOURCE, "region_id": region, "project_id": project, "resource_limit": value})
    }

    #[test]
    fn the_region_wins_over_no_region() {
        let body = json!({"limits": [limit(None, Some("p"), 1), limit(Some("other"), Some("p"), 2), limit(Some("here"), Some("p"), 3)]});
        let chosen = |region| choose("x", &body, "limits", "resource_limit", region, Some("p")).unwrap();
        assert_eq!(chosen(Some("here")), Some(3));
        assert_eq!(chosen(Some("nowhere")), Some(1));
    }

    #[test]
    fn another_projects_limit_does_not_count() {
        let body = json!({"limits": [limit(None, Some("q"), 1)]});
        assert_eq!(choose("x", &body, "limits", "resource_limit", None, Some("p")).unwrap(), None);
    }

    #[test]
    fn limits_are_mebibytes() {
        assert_eq!(bytes(1000), Some(1_048_576_000));
        assert_eq!(bytes(0), Some(0));
        assert_eq!(bytes(-1), None);
        assert_eq!(bytes(i64::MAX), Some(u64::MAX));
    }

    proptest! {
        #[test]
        fn nothing_in_an_answer_breaks_it(
            value in hostile::value(&["limits", "resource_name", "region_id", "project_id", "resource_limit"]),
        ) {
            for body in [value.clone(), json!({"limits": value}), json!({"limits": [value]})] {
                if let Err(error) = choose("x", &body, "limits", "resource_limit", None, None) {
                    prop_assert_eq!(error.kind(), ErrorKind::Protocol);
                }
            }
        }
    }
}
