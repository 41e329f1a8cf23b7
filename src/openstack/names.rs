//! Keystone: what users and projects are called.

use serde::Deserialize;

use super::error::{ErrorKind, Result};
use super::session::{Request, Service, Session};

impl Session {
    /// `kind` is `user` or `project`, `collection` the first part of its path.
    pub(super) async fn read_name(&self, kind: &str, collection: &str, id: &str) -> Result<Option<String>> {
        let path = [collection, id];
        let answer = self.wire.send(Request::get(Service::Identity, format!("get {kind} {id}"), &path)).await?;
        match answer.read_if_found::<Answer>() {
            Ok(answer) => Ok(answer.map(|answer| answer.named.name)),
            // the policy of this cloud keeps users' names from us
            Err(error) if error.kind() == ErrorKind::Forbidden => Ok(None),
            Err(error) => Err(error),
        }
    }
}

#[derive(Deserialize)]
struct Answer {
    #[serde(rename = "user", alias = "project")]
    named: Named,
}

#[derive(Deserialize)]
struct Named {
    name: String,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::super::json::{self, hostile};
    use super::*;

    fn name(body: &serde_json::Value) -> Result<String> {
        json::read::<Answer, _>("x", body).map(|answer| answer.named.name)
    }

    #[test]
    fn the_name_is_read_from_the_object_of_its_kind() {
        for kind in ["user", "project"] {
            assert_eq!(name(&json!({kind: {"id": "u", "name": "ada"}})).unwrap(), "ada");
        }
        assert_eq!(name(&json!({"group": {"name": "ada"}})).unwrap_err().kind(), ErrorKind::Protocol);
    }

    proptest! {
        #[test]
        fn nothing_in_an_answer_breaks_it(value in hostile::value(&["user", "name", "id"])) {
            for body in [value.clone(), json!({"user": value})] {
                if let Err(error) = name(&body) {
                    prop_assert_eq!(error.kind(), ErrorKind::Protocol);
                }
            }
        }
    }
}
