//! `make bench`: what the daemon costs beside stock Cinder and the `rbd` command, measured on a running lab in one run.
//!
//! Prints tables and one line of JSON a part; `BENCH_JSON` and `BENCH_MARKDOWN` name files to write. `benches/run`
//! starts a lab and says which variables choose what.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../../tests/common/mod.rs"]
mod common;
mod crowd;
mod gentle;
mod lab;
mod memory;
mod meter;
mod notifications;
mod report;
mod transfers;
mod uploads;

use serde_json::{Map, Value, json};

fn env(name: &str, default: &str) -> String {
    std::env::var(name).ok().filter(|value| !value.is_empty()).unwrap_or_else(|| default.to_owned())
}

fn env_number(name: &str, default: usize) -> usize {
    env(name, &default.to_string()).parse().unwrap_or_else(|_| panic!("{name} is not a number"))
}

/// The middle one, or the mean of the two in the middle.
pub fn median(mut numbers: Vec<f64>) -> f64 {
    numbers.sort_by(f64::total_cmp);
    match numbers.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => numbers[n / 2],
        n => (numbers[n / 2 - 1] + numbers[n / 2]) / 2.0,
    }
}

/// The figures of other parts, from a run before, where `BENCH_KEEP=1` asks for them.
fn earlier() -> Map<String, Value> {
    if env("BENCH_KEEP", "") != "1" {
        return Map::new();
    }
    let text = std::fs::read(env("BENCH_JSON", "")).unwrap_or_default();
    serde_json::from_slice(&text).unwrap_or_default()
}

#[tokio::main]
async fn main() {
    let rounds = env_number("BENCH_ROUNDS", 3);
    let mut results = earlier();
    results.insert("machine".into(), lab::machine().await);
    results.insert("rounds".into(), json!(rounds));
    for part in env("BENCH_PARTS", "limits,transfers,crowd,notifications,memory,gentle").split(',') {
        let result: Value = match part {
            "limits" => transfers::limits(rounds).await,
            "transfers" => {
                let shapes = env("BENCH_SIZES", "1g/300m,4g/1g,20g/64m:16k,clone:4g/1g");
                transfers::measure(&shapes, rounds).await
            }
            "crowd" => crowd::measure(env_number("BENCH_CROWD", 50)).await,
            "notifications" => notifications::measure(env_number("BENCH_NOTIFICATIONS", 30_000), rounds).await,
            "memory" => memory::measure(env_number("BENCH_QUEUED", 1000)).await,
            "gentle" => gentle::measure(&env("BENCH_GENTLE", "4g/1g"), rounds).await,
            "uploads" => uploads::measure(&env("BENCH_UPLOAD", "4g/1g"), rounds).await,
            "snapshots" => uploads::snapshots(&env("BENCH_UPLOAD", "4g/1g"), rounds).await,
            other => panic!("BENCH_PARTS: no such part: {other}"),
        };
        println!("{}", json!({ part: &result }));
        results.insert(part.to_owned(), result);
    }
    results.insert("load_after".into(), json!(lab::load()));
    let results = Value::Object(results);
    let markdown = report::markdown(&results);
    println!("{markdown}");
    for (variable, text) in [("BENCH_JSON", format!("{results:#}\n")), ("BENCH_MARKDOWN", markdown)] {
        if let Some(path) = std::env::var_os(variable).filter(|path| !path.is_empty()) {
            std::fs::write(&path, &text).unwrap();
        }
    }
}
