//! What `--json` prints is what its schema says (`docs/reference/schemas/`). The validator is not ours: `schemas.py`.
#![allow(dead_code, clippy::unwrap_used, clippy::panic)]

use std::path::PathBuf;

use serde_json::{Value, json};

use super::env::lab_var;
use super::python::Script;

static SCRIPT: Script = Script::in_lab(concat!(include_str!("serve.py"), include_str!("schemas.py")));

/// For each of the documents, what the schema objects to.
pub fn objections(schema: &str, documents: &[Value]) -> Vec<Vec<String>> {
    let read = |text| serde_json::from_str::<Value>(text).unwrap();
    let schemas = json!({
        "job.json": read(include_str!("../../docs/reference/schemas/job.json")),
        "jobs.json": read(include_str!("../../docs/reference/schemas/jobs.json")),
        "check.json": read(include_str!("../../docs/reference/schemas/check.json")),
        "dry-run.json": read(include_str!("../../docs/reference/schemas/dry-run.json")),
    });
    let lab = PathBuf::from(lab_var("RBDLAB_DIR"));
    let answer = SCRIPT.ask(&lab, &json!({"schemas": schemas, "schema": schema, "documents": documents}));
    let objections = answer.unwrap_or_else(|error| panic!("{schema}: {error}"));
    let objections: Vec<Vec<String>> = serde_json::from_slice(&objections).unwrap();
    assert_eq!(objections.len(), documents.len());
    objections
}

/// Validates what a command with these arguments printed, where it was asked for JSON.
pub fn validate_output(arguments: &[&str], output: &str) {
    if !arguments.contains(&"--json") {
        return;
    }
    let schema = match arguments[0] {
        "show" => "job.json",
        "jobs" => "jobs.json",
        "check" => "check.json",
        "request" => "dry-run.json",
        other => panic!("{other} --json has no schema"),
    };
    let document = serde_json::from_str(output).unwrap_or_else(|error| panic!("{arguments:?}: {error}: {output}"));
    let objections = objections(schema, &[document]).remove(0);
    assert!(objections.is_empty(), "{arguments:?} is not by {schema}: {objections:#?}\n{output}");
}
