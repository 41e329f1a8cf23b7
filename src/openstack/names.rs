//! Keystone: what users and projects are called.

use serde_json::Value;

use super::error::{ErrorKind, Result};
use super::json::Fields;
use super::session::{Request, Service, Session};

impl Session {
    /// `kind` is `user` or `project`, `collection` the first part of its path.
    pub(super) async fn read_name(&self, kind: &str, collection: &str, id: &str) -> Result<Option<String>> {
        let path = [collection, id];
        let answer = self.wire.send(Request::get(Service::Identity, format!("get {kind} {id}"), &path)).await?;
        let call = answer.call.clone();
        match answer.json_if_found() {
            Ok(body) => body.map(|body| name(&call, &body, kind)).transpose(),
            // the policy of this cloud keeps users' names from us
            Err(error) if error.kind() == ErrorKind::Forbidden => Ok(None),
            Err(error) => Err(error),
        }
    }
}

fn name(call: &str, body: &Value, kind: &str) -> Result<String> {
    Fields::new(call, body)?.object(kind)?.text("name")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::super::json::hostile;
    use super::*;

    #[test]
    fn the_name_is_read_from_the_object_of_its_kind() {
        let body = json!({"user": {"id": "u", "name": "ada"}});
        assert_eq!(name("x", &body, "user").unwrap(), "ada");
        assert_eq!(name("x", &body, "project").unwrap_err().kind(), ErrorKind::Protocol);
    }

    proptest! {
        #[test]
        fn nothing_in_an_answer_breaks_it(value in hostile::value(&["user", "name", "id"])) {
            for body in [value.clone(), json!({"user": value})] {
                if let Err(error) = name("x", &body, "user") {
                    prop_assert_eq!(error.kind(), ErrorKind::Protocol);
                }
            }
        }
    }
}
