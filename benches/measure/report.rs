//! The results as tables for people: `docs/reference/benchmarks.md` is written by this.

use std::fmt::Write as _;

use serde_json::{Map, Value};

use crate::transfers::METHODS;

const MIB: f64 = (1 << 20) as f64;

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or(f64::NAN)
}

/// Three digits that count.
fn digits(value: f64) -> String {
    match value {
        v if v.is_nan() => "–".into(),
        v if v >= 100.0 => format!("{v:.0}"),
        v if v >= 10.0 => format!("{v:.1}"),
        v => format!("{v:.2}"),
    }
}

fn mib(value: &Value) -> String {
    digits(number(value) / MIB)
}

/// A figure, and its ratio to stock's.
fn beside(value: f64, stock: f64) -> String {
    if value.is_nan() || stock.is_nan() || stock == 0.0 {
        return digits(value);
    }
    match value / stock {
        r if r > 0.995 && r < 1.005 => digits(value),
        r if r < 0.01 => format!("{} ({:.2} %)", digits(value), r * 100.0),
        r if r < 0.1 => format!("{} ({:.1} %)", digits(value), r * 100.0),
        r => format!("{} ({:.0} %)", digits(value), r * 100.0),
    }
}

fn table(text: &mut String, head: &[&str], rows: &[Vec<String>]) {
    let line = |cells: Vec<&str>| format!("| {} |\n", cells.join(" | "));
    text.push_str(&line(head.to_vec()));
    text.push_str(&line(head.iter().enumerate().map(|(n, _)| if n == 0 { "---" } else { "---:" }).collect()));
    for row in rows {
        text.push_str(&line(row.iter().map(String::as_str).collect()));
    }
    text.push('\n');
}

fn entries(value: &Value) -> impl Iterator<Item = (&String, &Value)> {
    static NOTHING: std::sync::LazyLock<Map<String, Value>> = std::sync::LazyLock::new(Map::new);
    value.as_object().unwrap_or(&NOTHING).iter()
}

pub fn markdown(results: &Value) -> String {
    let mut text = String::from(
        "# Benchmarks\n\nWritten by `make bench` (`benches/measure`); every figure below comes from one run of it on the lab (`lab/`), as the median of its \
         rounds. In brackets: the share of what stock Cinder needs for the same volume.\n\n",
    );
    machine(&mut text, results);
    goals(&mut text, results);
    transfers(&mut text, &results["transfers"], &results["limits"]);
    crowd(&mut text, &results["crowd"]);
    gentle(&mut text, &results["gentle"]);
    notifications(&mut text, &results["notifications"]);
    memory(&mut text, &results["memory"]);
    method(&mut text);
    text
}

fn machine(text: &mut String, results: &Value) {
    let m = &results["machine"];
    let get = |key: &str| m[key].as_str().unwrap_or("?").to_owned();
    let _ = writeln!(
        text,
        "## The machine\n\n{} × {}, {}, Linux {}; Ceph {} with {} OSDs on sparse files of one disk, size 1; all services, clients and the \
         daemon (version {}, release) on the same {} CPUs, over loopback. {} rounds. Load when it began: {}.\n\n\
         All share two scarce things here, the CPUs and the disk: what the OSDs do is taken from the services, and a network costs \
         CPU only. A real cluster has more of both, and a network that the streamed bytes must cross twice.\n",
        m["cpus"],
        get("cpu"),
        get("memory"),
        get("kernel"),
        get("ceph"),
        m["osds"],
        get("program"),
        m["cpus"],
        results["rounds"],
        m["load_before"]
    );
}

/// The targets of the project, and where it stands.
fn goals(text: &mut String, results: &Value) {
    let mut rows = Vec::new();
    let mut row = |what: String, goal: &str, is: String, reached: Option<bool>| {
        let reached = reached.map_or("–", |reached| if reached { "yes" } else { "**no**" });
        rows.push(vec![what, goal.to_owned(), is, reached.to_owned()]);
    };
    let limit = copy_limit(&results["limits"]);
    for shape in results["transfers"]["shapes"].as_array().into_iter().flatten() {
        let name = shape["shape"].as_str().unwrap_or_default();
        let (ours, stock) = (&shape["methods"]["server-copy"], &shape["methods"]["stock"]);
        let through = (number(&ours["bytes_in"]) + number(&ours["bytes_out"])) / number(&shape["data"]);
        row(
            format!("bytes through the daemon, {name}"),
            "< 0.2 % of the data",
            format!("{:.2} %", through * 100.0),
            Some(through < 0.002),
        );
        let stock_cpu = number(&stock["cpu"]["cinder-volume"]) + number(&stock["cpu"]["glance"]);
        let cpu = number(&ours["cpu"]["daemon"]) / stock_cpu;
        row(
            format!("CPU of the daemon, {name}"),
            "< 5 % of stock's",
            format!("{:.1} %", cpu * 100.0),
            Some(cpu < 0.05),
        );
        let least = number(&shape["data"]) / limit;
        let over = number(&ours["transfer"]) / least - 1.0;
        row(
            format!("transfer against the disk's limit, {name}"),
            "≤ 15 % over",
            format!("{:.2} s, limit {:.2} s ({:+.0} %)", number(&ours["transfer"]), least, over * 100.0),
            Some(over <= 0.15),
        );
        let faster = number(&stock["active"]) / number(&ours["active"]);
        let goal = if name.starts_with("4 GiB") { "≥ 6 times as fast as stock" } else { "" };
        row(
            format!("to `active`, {name}"),
            goal,
            format!("{faster:.1} times"),
            (!goal.is_empty()).then_some(faster >= 6.0),
        );
    }
    if let Some(ratio) = results["notifications"]["cpu_ratio"].as_f64() {
        row(
            "CPU of an irrelevant notification".into(),
            "≤ 10 % of Python's",
            format!("{:.1} %", ratio * 100.0),
            Some(ratio <= 0.1),
        );
    }
    let memory = &results["memory"];
    if let Some(handles) = memory["handles_heap"].as_f64() {
        let mut beside = |name: String, bytes: &Value| {
            let times = number(bytes) / handles;
            row(
                name,
                "≤ 1.5 times that of a C program with its handles",
                format!("{times:.1} times"),
                Some(times <= 1.5),
            );
        };
        beside("heap and stacks of the idle daemon".into(), &memory["idle_heap"]);
        beside(format!("the same with {} jobs that wait", memory["queued_jobs"]), &memory["queued_heap"]);
    }
    if !rows.is_empty() {
        text.push_str("## The goals\n\n");
        table(text, &["", "goal", "measured", "reached"], &rows);
    }
}

/// Bytes a second at which all that is written is read first.
fn copy_limit(limits: &Value) -> f64 {
    1.0 / (1.0 / number(&limits["write"]) + 1.0 / number(&limits["read"]))
}

fn transfers(text: &mut String, part: &Value, limits: &Value) {
    let Some(shapes) = part["shapes"].as_array() else { return };
    let limit = copy_limit(limits);
    let _ = writeln!(
        text,
        "## One volume becomes an image\n\n`rados bench` writes {:.0} MiB/s into the pool and reads {:.0} MiB/s (objects of 4 MiB, 16 in \
         flight). A copy has to do both: {:.0} MiB/s are the limit that the last column is a share of. *To active*: from the POST of the record (for stock: of `os-volume_upload_image`) until \
         Glance says `active`. *Network*: through the sockets of what moves the data, which is the daemon, or cinder-volume and glance-api. \
         *Memory*: peak of the same. Of `at-once`, *transfer* is the fill behind the active image.\n",
        number(&limits["write"]) / MIB,
        number(&limits["read"]) / MIB,
        limit / MIB
    );
    for shape in shapes {
        let _ = writeln!(text, "### {}\n", shape["shape"].as_str().unwrap_or_default());
        let stock = &shape["methods"]["stock"];
        let cpu = |m: &Value, names: &[&str]| names.iter().filter_map(|name| m["cpu"][*name].as_f64()).sum::<f64>();
        let services = ["cinder-volume", "glance", "other OpenStack"];
        let mut rows = Vec::new();
        for name in METHODS.split(',').filter(|name| shape["methods"][*name].is_object()) {
            let m = &shape["methods"][name];
            let ratio = |key: &str, unit: f64| beside(number(&m[key]) / unit, number(&stock[key]) / unit);
            let reached = number(&shape["data"]) / number(&m["transfer"]) / limit;
            rows.push(vec![
                name.to_owned(),
                ratio("active", 1.0),
                digits(number(&m["transfer"])),
                if name == "stock" {
                    "–".into()
                } else {
                    beside(cpu(m, &["daemon"]), cpu(stock, &["cinder-volume", "glance"]))
                },
                digits(cpu(m, &services)),
                digits(cpu(m, &["OSDs"])),
                ratio("bytes_in", MIB),
                ratio("bytes_out", MIB),
                ratio("stored", MIB),
                digits(number(&m["peak"]) / MIB),
                if reached.is_nan() { "–".into() } else { format!("{:.0} %", reached * 100.0) },
            ]);
        }
        let head = [
            "",
            "to active, s",
            "transfer, s",
            "CPU daemon, s",
            "CPU services, s",
            "CPU OSDs, s",
            "network in, MiB",
            "network out, MiB",
            "stored, MiB",
            "memory, MiB",
            "of the limit",
        ];
        table(text, &head, &rows);
        let rows: Vec<_> = entries(&shape["tools"])
            .map(|(name, tool)| {
                vec![format!("`{name}`"), digits(number(&tool["seconds"])), digits(number(&tool["cpu"]))]
            })
            .collect();
        table(text, &["Ceph's own tools", "s", "CPU client, s"], &rows);
    }
    text.push_str("### Where the time goes\n\nSeconds of each stage of a job by `server-copy`; the rest is the way of the notification and of Glance's answer.\n\n");
    const STAGES: [&str; 13] = [
        "plan", "snapshot", "anchor", "transfer", "verify", "inspect", "seal", "hash", "rename", "record", "register",
        "finish", "purge",
    ];
    let present: Vec<&str> = STAGES
        .into_iter()
        .filter(|stage| shapes.iter().any(|shape| shape["methods"]["server-copy"]["stages"][*stage].is_number()))
        .collect();
    let rows: Vec<Vec<String>> = shapes
        .iter()
        .map(|shape| {
            let m = &shape["methods"]["server-copy"];
            let stages = present.iter().map(|stage| digits(number(&m["stages"][*stage])));
            std::iter::once(shape["shape"].as_str().unwrap_or_default().to_owned())
                .chain(stages)
                .chain([digits(number(&m["active"]))])
                .collect()
        })
        .collect();
    let head: Vec<&str> = std::iter::once("").chain(present).chain(["to active"]).collect();
    table(text, &head, &rows);
}

fn crowd(text: &mut String, part: &Value) {
    let Some(stock) = part.get("stock") else { return };
    let _ = writeln!(
        text,
        "## Many small volumes at once\n\n{} volumes of 64 MiB with 16 MiB of data, all asked for at the same moment.\n",
        stock["images"]
    );
    let cpu = |m: &Value, names: &[&str]| names.iter().filter_map(|name| m["cpu"][*name].as_f64()).sum::<f64>();
    let rows: Vec<_> = ["stock", "server-copy, 1 job at a time", "server-copy, 4", "server-copy, 16"]
        .iter()
        .filter(|name| part.get(**name).is_some())
        .map(|name| {
            let m = &part[*name];
            let all = ["cinder-volume", "glance", "other OpenStack", "daemon"];
            vec![
                (*name).to_owned(),
                digits(number(&m["per_second"])),
                beside(number(&m["seconds"]), number(&stock["seconds"])),
                digits(cpu(m, &["daemon"])),
                beside(cpu(m, &all), cpu(stock, &all)),
                digits(cpu(m, &["OSDs", "mon, mgr"])),
            ]
        })
        .collect();
    table(
        text,
        &["", "images a second", "all active, s", "CPU daemon, s", "CPU daemon and services, s", "CPU Ceph, s"],
        &rows,
    );
}

fn gentle(text: &mut String, part: &Value) {
    let Some(quiet) = part.get("no transfer") else { return };
    text.push_str(
        "## Impact on other clients\n\nLatency of one client that writes 4 KiB at random places of another image of the source's pool, one write after the \
         other, while a volume is transferred (for stock: until it is active). In brackets: times that of the quiet cluster.\n\n",
    );
    let order = [
        "no transfer",
        "stock",
        "copy",
        "clone",
        "server-copy, concurrency 32",
        "server-copy, concurrency 16",
        "server-copy, concurrency 8",
        "server-copy, concurrency 2",
        "server-copy, 20 objects a second",
    ];
    let rows: Vec<_> = order
        .iter()
        .filter(|name| part.get(**name).is_some())
        .map(|name| {
            let m = &part[*name];
            let cell =
                |key: &str| format!("{} ({:.1})", digits(number(&m[key]) * 1e3), number(&m[key]) / number(&quiet[key]));
            vec![
                (*name).to_owned(),
                digits(number(&m["seconds"])),
                cell("p50"),
                cell("p95"),
                cell("p99"),
                digits(number(&m["writes"]) / number(&m["seconds"])),
            ]
        })
        .collect();
    table(text, &["", "transfer, s", "median, ms", "95 %, ms", "99 %, ms", "writes a second"], &rows);
}

fn notifications(text: &mut String, part: &Value) {
    if part.is_null() {
        return;
    }
    let _ = writeln!(
        text,
        "## Irrelevant notifications\n\nReal notifications of Glance, Cinder and Nova (`tests/data/notifications`), {} of them waiting in the \
         queue, beside a listener of oslo.messaging with one endpoint that looks at the event type. *All*: with the {:.0} % \
         that are deletions of images and starts of snapshots, for which the daemon looks for a job.\n",
        part["daemon"]["count"],
        number(&part["relevant_share"]) * 100.0
    );
    let rows: Vec<_> = [("the daemon", "daemon"), ("the daemon, all", "mixed"), ("oslo.messaging", "python")]
        .iter()
        .map(|(name, key)| {
            let m = &part[*key];
            vec![(*name).to_owned(), digits(number(&m["per_second"])), digits(number(&m["cpu_each"]) * 1e6)]
        })
        .collect();
    table(text, &["", "a second", "CPU each, µs"], &rows);
}

fn memory(text: &mut String, part: &Value) {
    if part.is_null() {
        return;
    }
    text.push_str("## Memory\n\n");
    let daemon = |name: String, of: [&str; 4]| {
        let [resident, own, heap, cpu] = of.map(|key| &part[key]);
        vec![name, mib(resident), mib(own), mib(heap), digits(number(cpu))]
    };
    let rows = vec![
        daemon("the daemon, idle".into(), ["idle", "idle_own", "idle_heap", "idle_cpu_a_minute"]),
        daemon(
            format!("with {} jobs that wait", part["queued_jobs"]),
            ["queued", "queued_own", "queued_heap", "queued_cpu_a_minute"],
        ),
        vec!["a C program with its handles".into(), "–".into(), "–".into(), mib(&part["handles_heap"]), "–".into()],
    ];
    table(text, &["", "resident, MiB", "its own, MiB", "heap and stacks, MiB", "CPU a minute, s"], &rows);
}

fn method(text: &mut String) {
    text.push_str(
        "## How it is measured\n\n\
         - CPU: `utime + stime` of `/proc/PID/stat`, children included, from the request until the image is active. Glance hashes a \
         registered image afterwards (`do_secure_hash`): that is not in the table, and nothing is measured while it does.\n\
         - Network: the kernel's counters of each TCP socket of the process (`bytes_received`, `bytes_acked`). `ss` reads \
         those of open sockets; the kernel announces those of a socket that closes. AMQP, HTTP and RADOS of the control \
         path count too.\n\
         - Active: Glance's own notification. Polling would cost CPU.\n\
         - Stored: what the pool's `bytes_used` grew by. Memory: `VmHWM`, reset before each run; *its own*: \
         memory that no other process shares (`Private_*`), without librados and librbd if other programs use them; *heap and \
         stacks*: memory that no file backs (`RssAnon`). The C program (`benches/measure/handles.c`) opens as many \
         librados clients as the idle daemon has, and the pools with each, with the unit's settings of the allocator.\n\
         - `rbd cp` of a clone's snapshot is not a correct copy (it loses what only the parent has); its time is shown all the same.\n",
    );
}
