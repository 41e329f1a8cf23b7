//! Keystone's unified limits: how much a project's images may take.

use serde::Deserialize;

use super::error::Result;
use super::session::{Request, Service, Session};

/// The limit's name in Keystone. Only Glance registers a limit of that name.
pub(super) const RESOURCE: &str = "image_size_total";

/// Glance counts this limit in MiB.
const UNIT: u64 = 1 << 20;

impl Session {
    /// Every user can read registered limits. Only `admin` can read the limits of another project.
    pub(super) async fn read_image_size_limit(&self, project_id: &str) -> Result<Option<u64>> {
        let login = self.wire.login(None).await?;
        let region = self.wire.region_of(&login, Service::Image);
        let registered = Request::get(Service::Identity, "list registered limits", &["registered_limits"])
            .query(vec![("resource_name", RESOURCE.to_owned())]);
        let answer = self.wire.send(registered).await?;
        let Some(default) = choose(&answer.read::<Limits>()?.limits, region.as_deref(), None) else {
            return Ok(None);
        };
        let own = Request::get(Service::Identity, format!("list limits of project {project_id}"), &["limits"])
            .query(vec![("resource_name", RESOURCE.to_owned()), ("project_id", project_id.to_owned())]);
        let answer = self.wire.send(own).await?;
        let own = choose(&answer.read::<Limits>()?.limits, region.as_deref(), Some(project_id));
        Ok(bytes(own.unwrap_or(default)))
    }
}

/// -1 stands for "no limit".
pub(super) fn bytes(limit: i64) -> Option<u64> {
    u64::try_from(limit).ok().map(|limit| limit.saturating_mul(UNIT))
}

#[derive(Deserialize)]
struct Limits {
    #[serde(alias = "registered_limits")]
    limits: Vec<Limit>,
}

#[derive(Deserialize)]
struct Limit {
    resource_name: String,
    #[serde(default)]
    region_id: Option<String>,
    #[serde(default)]
    project_id: Option<String>,
    #[serde(alias = "default_limit")]
    resource_limit: i64,
}

/// The limit of our region, else the one of no region.
fn choose(limits: &[Limit], region: Option<&str>, project: Option<&str>) -> Option<i64> {
    let mut everywhere = None;
    for limit in limits {
        if limit.resource_name != RESOURCE || (project.is_some() && limit.project_id.as_deref() != project) {
            continue;
        }
        match limit.region_id.as_deref() {
            None => everywhere = Some(limit.resource_limit),
            Some(here) if region.is_none_or(|region| region == here) => return Some(limit.resource_limit),
            Some(_) => {}
        }
    }
    everywhere
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::super::ErrorKind;
    use super::super::json::{self, hostile};
    use super::*;

    fn chosen(body: &Value, region: Option<&str>, project: Option<&str>) -> Result<Option<i64>> {
        json::read::<Limits, _>("x", body).map(|limits| choose(&limits.limits, region, project))
    }

    fn limit(region: Option<&str>, project: Option<&str>, value: i64) -> Value {
        json!({"resource_name": RESOURCE, "region_id": region, "project_id": project, "resource_limit": value})
    }

    #[test]
    fn the_region_wins_over_no_region() {
        let body = json!({"limits": [limit(None, Some("p"), 1), limit(Some("other"), Some("p"), 2), limit(Some("here"), Some("p"), 3)]});
        assert_eq!(chosen(&body, Some("here"), Some("p")).unwrap(), Some(3));
        assert_eq!(chosen(&body, Some("nowhere"), Some("p")).unwrap(), Some(1));
    }

    #[test]
    fn another_projects_limit_does_not_count() {
        let body = json!({"limits": [limit(None, Some("q"), 1)]});
        assert_eq!(chosen(&body, None, Some("p")).unwrap(), None);
    }

    #[test]
    fn a_limit_in_mebibytes_becomes_bytes() {
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
                if let Err(error) = chosen(&body, None, None) {
                    prop_assert_eq!(error.kind(), ErrorKind::Protocol);
                }
            }
        }
    }
}
