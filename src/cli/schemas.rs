//! The schemas of what `--json` prints, for tests: they list the values that the code knows, and no others. Tests
//! against the lab validate whole documents (`tests/common/schemas.rs`).

use std::collections::BTreeSet;

use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use uuid::Uuid;

use super::check::report::{CheckResult, Verdict};
use super::dry_run::ForecastOutcome;
use super::jobs::UNREADABLE;
use crate::job::record::State;
use crate::request::{Source, Trigger};
use crate::transfer::Method;

pub fn job() -> Value {
    serde_json::from_str(include_str!("../../docs/reference/schemas/job.json")).unwrap()
}

fn jobs() -> Value {
    serde_json::from_str(include_str!("../../docs/reference/schemas/jobs.json")).unwrap()
}

fn check() -> Value {
    serde_json::from_str(include_str!("../../docs/reference/schemas/check.json")).unwrap()
}

pub fn dry_run() -> Value {
    serde_json::from_str(include_str!("../../docs/reference/schemas/dry-run.json")).unwrap()
}

/// The names in an object, sorted.
pub fn names_in(document: &Value) -> Vec<&str> {
    let mut names: Vec<&str> = document.as_object().unwrap().keys().map(String::as_str).collect();
    names.sort_unstable();
    names
}

/// The names that the schema of an object demands, sorted. It allows no others.
pub fn names_of(schema: &Value) -> Vec<&str> {
    assert_eq!((&schema["type"], &schema["additionalProperties"]), (&json!("object"), &json!(false)), "{schema:#}");
    let mut required: Vec<&str> =
        schema["required"].as_array().unwrap().iter().map(|name| name.as_str().unwrap()).collect();
    required.sort_unstable();
    assert_eq!(names_in(&schema["properties"]), required);
    required
}

/// The values that an `enum` of a schema lists, but for `null`.
fn listed(schema: &Value, pointer: &str) -> BTreeSet<String> {
    let values = schema.pointer(pointer).and_then(Value::as_array).unwrap_or_else(|| panic!("there is no {pointer}"));
    values.iter().filter_map(Value::as_str).map(str::to_owned).collect()
}

/// The values of an enum, which its deserializer names when it is given another one: no list of ours can lack one.
fn known<T: DeserializeOwned>(other: Value) -> BTreeSet<String> {
    let error = serde_json::from_value::<T>(other).err().unwrap().to_string();
    let (_, expected) = error.split_once("expected ").unwrap();
    expected.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

#[test]
fn the_schemas_list_the_values_that_the_code_knows() {
    let (job, other) = (job(), json!("other"));
    assert_eq!(listed(&job, "/properties/state/enum"), known::<State>(other.clone()));
    assert_eq!(listed(&job, "/properties/method/enum"), known::<Method>(other.clone()));
    assert_eq!(listed(&job, "/properties/trigger/enum"), known::<Trigger>(other.clone()));
    let source = json!({"kind": "other", "id": Uuid::nil()});
    assert_eq!(listed(&job, "/$defs/source/properties/kind/enum"), known::<Source>(source));
    assert_eq!(listed(&check(), "/$defs/result/properties/result/enum"), known::<Verdict>(other.clone()));
    assert_eq!(listed(&dry_run(), "/properties/outcome/enum"), known::<ForecastOutcome>(other));
    assert_eq!(jobs()["$defs"]["unreadable"]["properties"]["state"]["const"], UNREADABLE);
}

#[test]
fn the_schema_of_a_job_tells_its_ends_as_the_code_does() {
    let ends: BTreeSet<String> =
        State::ALL.iter().filter(|state| state.is_ended()).map(|state| state.as_str().to_owned()).collect();
    let of = |rule: &str| listed(&job(), &format!("/allOf/{rule}/if/properties/state/enum"));
    assert_eq!(of("0"), ends);
    assert_eq!(of("1"), ends.into_iter().filter(|state| state != State::Done.as_str()).collect());
}

#[test]
fn the_schema_of_a_check_has_its_fields() {
    let row = serde_json::to_value(CheckResult::ok("Nova", "answers")).unwrap();
    assert_eq!(names_of(&check()["$defs"]["result"]), names_in(&row));
    assert_eq!(names_of(&jobs()["$defs"]["unreadable"]), ["image_id", "reason", "state"]);
}
