//! Hostile input: whatever comes from outside is read or refused, without a panic, and within its time and memory.
//!
//! Inputs are arbitrary bytes, real ones that were damaged (bytes flipped, cut, doubled, put together with tokens that
//! parsers dislike), deep nesting and huge numbers. Each test makes 1,500; `make fuzz` a million
//! (`PROPTEST_CASES`). An input that once failed goes into [`FIXED`], and is read each time.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use flate2::Compression;
use flate2::read::GzDecoder;
use flate2::write::{GzEncoder, ZlibEncoder};
use jiff::Timestamp;
use proptest::prelude::*;
use proptest::test_runner::Config as Cases;
use rbd_offload::config::Config;
use rbd_offload::job::record::{Record, State};
use rbd_offload::notification::{EnvelopeError, Notification, TransportUrl};
use rbd_offload::openstack::{Image, Volume, VolumeSnapshot};
use rbd_offload::publish::header::container_format;
use rbd_offload::publish::image_status::{self, Status};
use rbd_offload::publish::tag::OwnershipTag;
use rbd_offload::request::{Source, Trigger, parse_offer_tag, parse_request_tags};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use uuid::Uuid;

/// Inputs a test, unless `PROPTEST_CASES` says otherwise.
const CASES: u32 = 1500;

/// CPU seconds that one input may take, in a program without optimisation. None is larger than some MiB.
const SECONDS: f64 = 2.0;

/// Bytes of memory that this process may ever hold. What a bomb inflates to is more.
const MEMORY: u64 = 512 << 20;

/// Inputs that failed once, or that look as if they might, with what they are given to.
const FIXED: &[(&str, &[u8])] = &[
    ("notification", br#"{"event_type": "image.create\ud800", "payload": {"id": 1}}"#),
    ("notification", br#"{"oslo.version": "2.0", "oslo.message": "{\"oslo.version\": \"2.0\"}"}"#),
    ("transport_url", b"rabbit://u:p@[::1"),
    ("transport_url", b"rabbit://%ff:%00@h:99999/"),
    ("configuration", b"[backend:]\npool\n[offload]\nbandwidth_limit = 99999999999999999999TiB\n"),
    ("configuration", b"\xef\xbb\xbf[messaging]\ntransport_url = \xff\n"),
    ("header", b"# Disk DescriptorFile"),
    ("record", br#"{"version": 18446744073709551616}"#),
    ("record", br#"{"version": 0, "image_id": null}"#),
    ("answer", br#"{"id": "i", "status": "active", "tags": null, "min_disk": null, "size": 0}"#),
    ("tags", "rbd-offload:volume:\u{ff11}99c2483-d3ea-4877-bd86-edb7c4607374".as_bytes()),
];

fn cases() -> Cases {
    let cases = if std::env::var_os("PROPTEST_CASES").is_some() { Cases::default().cases } else { CASES };
    Cases { cases, failure_persistence: None, max_shrink_iters: 20_000, ..Cases::default() }
}

// ---- what is read ----

fn read_notification(bytes: &[u8]) {
    for compression in [None, Some("gzip"), Some("application/x-bz2")] {
        let _ = Notification::read(bytes, compression).map_err(|error| error.to_string());
    }
}

fn read_url(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    if let Ok(url) = TransportUrl::parse(&text) {
        assert!(!url.hosts.is_empty(), "{text:?}");
        for host in &url.hosts {
            let _ = url.amqp_uri(host);
        }
    }
}

fn read_configuration(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let _ = Config::parse(Path::new("fuzz"), &text).map_err(|error| error.to_string());
}

fn read_header(bytes: &[u8]) {
    let _ = container_format(bytes);
}

fn read_record(bytes: &[u8]) {
    let Ok(mut record) = Record::parse(bytes) else { return };
    let stored = record.to_bytes();
    let again = Record::parse(&stored).unwrap_or_else(|error| panic!("what was read is not read again: {error}"));
    assert_eq!((again.image_id, again.state, again.source), (record.image_id, record.state, record.source));
    let _ = (record.phase(), record.private_name(), record.is_reported(), record.pending_outcome().cloned());
    record.shorten();
    record.count_takeover();
    for state in State::ALL {
        let _ = record.clone().enter(state, Timestamp::UNIX_EPOCH);
    }
    let _ = record.restart(true, Timestamp::UNIX_EPOCH);
}

fn read_answers(bytes: &[u8]) {
    fn read<T: DeserializeOwned>(bytes: &[u8]) -> Option<T> {
        serde_json::from_slice(bytes).map_err(|error| error.to_string()).ok()
    }
    let _ = (read::<Volume>(bytes), read::<VolumeSnapshot>(bytes));
    let Some(image) = read::<Image>(bytes) else { return };
    let _ = (parse_request_tags(&image.tags), parse_offer_tag(&image.tags));
    for changes in [
        image_status::show(&image, Status::Copying, 255, &"m".repeat(2000)),
        image_status::end(&image, Status::Declined, ""),
        image_status::prepare(&image, u64::MAX, 0, &image.properties, true),
        image_status::finished(&image, Some(Source::Volume(Uuid::nil()))),
    ] {
        assert!(changes.len() <= 10 + 2 * image.properties.len(), "{changes:?}");
    }
}

fn read_tags(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let tags: Vec<String> = text.split('\n').map(str::to_owned).collect();
    let _ = (parse_request_tags(&tags), parse_offer_tag(&tags));
    if let Some(tag) = OwnershipTag::parse(&text) {
        assert_eq!(OwnershipTag::parse(&tag.to_string()), Some(tag));
    }
}

type Reader = fn(&[u8]);

const READERS: [(&str, Reader); 7] = [
    ("notification", read_notification),
    ("transport_url", read_url),
    ("configuration", read_configuration),
    ("header", read_header),
    ("record", read_record),
    ("answer", read_answers),
    ("tags", read_tags),
];

/// Reads the input, and holds it to its time and memory.
fn read(reader: Reader, input: &[u8]) {
    let before = cpu_seconds();
    reader(input);
    let took = cpu_seconds() - before;
    assert!(took < SECONDS, "{took} s for {} bytes", input.len());
}

/// Of this thread.
fn cpu_seconds() -> f64 {
    let statistics = fs::read_to_string("/proc/thread-self/schedstat").unwrap();
    statistics.split(' ').next().unwrap().parse::<f64>().unwrap() / 1e9
}

/// The most memory that this process has had.
fn peak_memory() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}

// ---- inputs ----

/// What parsers dislike.
const TOKENS: [&[u8]; 24] = [
    b"\"",
    b"\\",
    b"\\u0000",
    b"\\ud800",
    b"{",
    b"}",
    b"[",
    b"]",
    b"null",
    b"true",
    b"-",
    b"1e999999999",
    b"99999999999999999999999999999999999999",
    b"-9223372036854775809",
    b"0.00000000000000000000000000000000000000000000000001",
    b"\xff\xfe",
    b"\x00",
    b"\r\n",
    b"[backend:",
    b"%00%zz",
    b"@,@",
    b"::1]",
    "\u{202e}".as_bytes(),
    b"{\"version\":18446744073709551616}",
];

/// What a field may hold that is something else.
static VALUES: LazyLock<[Value; 16]> = LazyLock::new(|| {
    let nested = (0..100).fold(Value::Null, |inner, _| json!([inner]));
    [
        Value::Null,
        json!(true),
        json!(-1),
        json!(u64::MAX),
        json!(i64::MIN),
        json!(1e308),
        json!(0.5),
        json!(""),
        json!("0"),
        json!("-1"),
        json!("x".repeat(5000)),
        json!("\u{0}\u{202e}\n\u{1b}[2J"),
        json!("2262-04-12T00:00:00Z"),
        json!([]),
        json!({"kind": "volume"}),
        nested,
    ]
});

/// Replaces the value at that place in the order of a walk. `None`: it was replaced.
fn replace(document: &mut Value, mut place: usize, with: &Value) -> Option<usize> {
    if place == 0 {
        *document = with.clone();
        return None;
    }
    place -= 1;
    match document {
        Value::Array(items) => items.iter_mut().try_fold(place, |place, item| replace(item, place, with)),
        Value::Object(fields) => fields.values_mut().try_fold(place, |place, field| replace(field, place, with)),
        _ => Some(place),
    }
}

#[derive(Debug, Clone)]
enum Damage {
    Flip(u8),
    Cut(u16),
    Double(u16),
    Token(usize),
    /// A value of a JSON document becomes another one.
    Value(usize),
    /// So many brackets.
    Nest(u32),
    /// So many digits.
    Digits(u16),
}

fn damage() -> impl Strategy<Value = Damage> {
    prop_oneof![
        4 => any::<u8>().prop_map(Damage::Flip),
        3 => (1u16..60).prop_map(Damage::Cut),
        2 => (1u16..400).prop_map(Damage::Double),
        4 => (0..TOKENS.len()).prop_map(Damage::Token),
        12 => (0..VALUES.len()).prop_map(Damage::Value),
        1 => prop_oneof![8 => 1u32..200, 1 => 200u32..60_000].prop_map(Damage::Nest),
        1 => (1u16..400).prop_map(Damage::Digits),
    ]
}

fn apply(input: &mut Vec<u8>, at: f64, damage: &Damage) {
    if let Damage::Value(which) = damage {
        if let Ok(mut document) = serde_json::from_slice::<Value>(input) {
            // some forty values are in the smallest of them, and the first is the whole
            let _ = replace(&mut document, 1 + (at * 40.0) as usize, &VALUES[*which]);
            *input = document.to_string().into_bytes();
        }
        return;
    }
    let at = ((input.len() as f64) * at) as usize;
    let end = |length: &u16| (at + usize::from(*length)).min(input.len());
    let insert = |input: &mut Vec<u8>, bytes: Vec<u8>| drop(input.splice(at..at, bytes));
    match damage {
        Damage::Flip(with) => {
            if let Some(byte) = input.get_mut(at) {
                *byte ^= with;
            }
        }
        Damage::Cut(length) => drop(input.drain(at..end(length))),
        Damage::Double(length) => {
            let part = input[at..end(length)].to_vec();
            insert(input, part);
        }
        Damage::Value(_) => {}
        Damage::Token(which) => insert(input, TOKENS[*which].to_vec()),
        Damage::Nest(depth) => {
            let open: &[u8] = if depth % 2 == 0 { b"[" } else { b"{\"a\":" };
            insert(input, open.repeat(*depth as usize));
        }
        Damage::Digits(count) => insert(input, b"9".repeat(usize::from(*count))),
    }
}

/// Arbitrary bytes, and damaged ones of what is valid.
fn hostile(valid: Vec<Vec<u8>>) -> impl Strategy<Value = Vec<u8>> {
    let damages = prop::collection::vec((0.0..1.0f64, damage()), 1..5);
    let damaged = (prop::sample::select(valid), damages).prop_map(|(mut input, damages)| {
        for (at, damage) in &damages {
            apply(&mut input, *at, damage);
        }
        input
    });
    prop_oneof![1 => prop::collection::vec(any::<u8>(), 0..600), 5 => damaged]
}

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

fn owned(texts: &[&str]) -> Vec<Vec<u8>> {
    texts.iter().map(|text| text.as_bytes().to_vec()).collect()
}

/// Real notifications, of different sizes, and one of each compression.
static NOTIFICATIONS: LazyLock<Vec<Vec<u8>>> = LazyLock::new(|| {
    let mut text = String::new();
    GzDecoder::new(fs::File::open(data("tests/data/notifications/nova.jsonl.gz")).unwrap())
        .read_to_string(&mut text)
        .unwrap();
    text += &fs::read_to_string(data("tests/data/notifications/info.jsonl")).unwrap();
    let body = |line: &str| serde_json::from_str::<Value>(line).unwrap()["body_raw"].as_str().unwrap().to_owned();
    let mut bodies: Vec<String> = text.lines().map(body).filter(|body| body.len() < 20_000).collect();
    bodies.sort_by_key(String::len);
    let step = (bodies.len() / 16).max(1);
    let message =
        |body: &String| serde_json::from_str::<Value>(body).unwrap()["oslo.message"].as_str().map(str::to_owned);
    let mut chosen: Vec<String> = bodies.into_iter().step_by(step).collect();
    chosen.extend(chosen.clone().iter().filter_map(message));
    let mut chosen: Vec<Vec<u8>> = chosen.into_iter().map(String::into_bytes).collect();
    let id = Uuid::nil();
    let payload = format!(
        r#"{{"id": "{id}", "status": "queued", "owner": "p", "tags": ["rbd-offload:volume:{id}"], "properties": {{}}}}"#
    );
    let message = format!(r#"{{"event_type": "image.create", "priority": "INFO", "payload": {payload}}}"#);
    let enveloped = json!({"oslo.version": "2.0", "oslo.message": message}).to_string();
    let mut gzip = GzEncoder::new(Vec::new(), Compression::fast());
    gzip.write_all(enveloped.as_bytes()).unwrap();
    let mut zlib = ZlibEncoder::new(Vec::new(), Compression::fast());
    zlib.write_all(enveloped.as_bytes()).unwrap();
    chosen.extend([message.into_bytes(), enveloped.into_bytes(), gzip.finish().unwrap(), zlib.finish().unwrap()]);
    chosen
});

fn urls() -> Vec<Vec<u8>> {
    owned(&[
        "rabbit://u:p@h:5672/",
        "rabbit://u:p%40@h1:5672,u2:p2@[::1]:5671/vhost?ssl=1&heartbeat=30",
        "amqp://h//",
        "rabbit://:@/",
    ])
}

fn configurations() -> Vec<Vec<u8>> {
    let least = "[messaging]\ntransport_url = rabbit://u:p@h/\n[keystone]\nauth_url = http://k/v3\nusername = u\n\
                 password = p\nproject_name = s\n[backend:ceph]\npool = volumes\nmethod = copy\n[offload]\nretries = 3\n\
                 reconcile_interval = 5m\nbandwidth_limit = 3GiB\n";
    let sample = fs::read_to_string(data("etc/rbd-offload.conf")).unwrap();
    vec![least.into(), format!("{sample}\n{least}").into_bytes()]
}

fn headers() -> Vec<Vec<u8>> {
    let descriptor =
        "# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\ncreateType=\"monolithicSparse\"\n";
    let mut boot = vec![0; 512];
    boot[510..].copy_from_slice(&[0x55, 0xaa]);
    let magics: [&[u8]; 6] = [b"QFI\xfb\x00\x00\x00\x03", b"KDMV\x01", b"vhdxfile", b"conectix", b"QED\0", b"COWD"];
    let mut headers: Vec<Vec<u8>> = magics.iter().map(|magic| [*magic, &[0; 500]].concat()).collect();
    headers.extend([descriptor.into(), boot]);
    headers
}

fn records() -> Vec<Vec<u8>> {
    let source = Some(Source::Volume(Uuid::from_u128(7)));
    let mut record = Record::new(Uuid::from_u128(1), Trigger::Request, source, Some("p".into()), Timestamp::UNIX_EPOCH);
    let fresh = record.to_bytes();
    record.state = State::Copying;
    record.owner = Some("ctl1:7:x".into());
    record.reason = Some("503".into());
    vec![fresh, record.to_bytes(), fs::read(data("tests/data/job-record-1.json")).unwrap()]
}

fn answers() -> Vec<Vec<u8>> {
    owned(&[
        r#"{"id": "i", "name": null, "status": "queued", "owner": "p", "disk_format": "raw", "container_format": "bare",
            "min_disk": 1, "min_ram": 0, "size": null, "tags": ["rbd-offload:volume:x", "rbd-offload-copying"],
            "rbd_offload_status": "copying", "hw_disk_bus": "scsi", "os_hash_value": "x", "protected": false}"#,
        r#"{"id": "v", "status": "available", "size": 2, "encrypted": "false", "os-vol-tenant-attr:tenant_id": "p",
            "os-vol-host-attr:host": "n@b#p", "volume_image_metadata": {"min_disk": "0", "size": 5, "a": null}}"#,
        r#"{"id": "s", "volume_id": "v", "status": "available", "size": 1,
            "os-extended-snapshot-attributes:project_id": "p"}"#,
    ])
}

fn tags() -> Vec<Vec<u8>> {
    let id = "c99c2483-d3ea-4877-bd86-edb7c4607374";
    owned(&[
        &format!("blue\nrbd-offload:volume:{id}"),
        &format!("rbd-offload-handover:instance:{id}@{id}\nrbd-offload-handover:go"),
        &format!("{id} {id} {id}"),
        id,
    ])
}

proptest! {
    #![proptest_config(cases())]

    #[test]
    fn hostile_notifications_are_read_or_refused(input in hostile(NOTIFICATIONS.clone())) {
        read(read_notification, &input);
    }

    #[test]
    fn hostile_transport_urls_are_read_or_refused(input in hostile(urls())) {
        read(read_url, &input);
    }

    #[test]
    fn hostile_configuration_files_are_read_or_refused(input in hostile(configurations())) {
        read(read_configuration, &input);
    }

    #[test]
    fn hostile_disk_headers_are_read_or_refused(input in hostile(headers())) {
        read(read_header, &input);
    }

    #[test]
    fn hostile_job_records_are_read_or_refused(input in hostile(records())) {
        read(read_record, &input);
    }

    #[test]
    fn hostile_answers_of_services_are_read_or_refused(input in hostile(answers())) {
        read(read_answers, &input);
    }

    #[test]
    fn hostile_tags_of_images_and_disks_are_read_or_refused(input in hostile(tags())) {
        read(read_tags, &input);
    }
}

/// The largest ones.
#[test]
fn bombs_are_refused_within_time_and_memory() {
    let nested = |open: &str, depth: usize| open.repeat(depth).into_bytes();
    // members one after the other are read as one text, here of 1 GiB
    let mut member = GzEncoder::new(Vec::new(), Compression::best());
    member.write_all(&vec![b' '; 1 << 20]).unwrap();
    let bomb = member.finish().unwrap().repeat(1024);
    let number = format!("{{\"version\": 2, \"image_id\": {}}}", "9".repeat(1 << 20));
    for input in [
        nested("[", 1 << 20),
        nested("{\"a\":", 1 << 18),
        nested("{\"oslo.version\": \"2.0\", \"oslo.message\": \"", 1 << 15),
        nested("[x]\na = b\n", 1 << 15),
        number.into_bytes(),
        vec![b'\\'; 1 << 20],
    ] {
        for (_, reader) in READERS {
            read(reader, &input);
        }
    }
    let before = cpu_seconds();
    assert_eq!(Notification::read(&bomb, Some("gzip")), Err(EnvelopeError::TooLargeInflated), "{} bytes", bomb.len());
    assert!(cpu_seconds() - before < SECONDS);
    assert!(peak_memory() < MEMORY, "{} MiB", peak_memory() >> 20);
}

#[test]
fn the_fixed_inputs_are_read_or_refused() {
    for (name, input) in FIXED {
        let (_, reader) = READERS.iter().find(|(reader, _)| reader == name).unwrap();
        read(*reader, input);
    }
}

/// A limit that nothing can break would show nothing.
#[test]
fn the_inputs_reach_what_is_behind_the_parsers() {
    use proptest::strategy::ValueTree;
    use proptest::test_runner::TestRunner;
    let mut runner = TestRunner::deterministic();
    let mut share = |valid: Vec<Vec<u8>>, is_read: fn(&[u8]) -> bool| {
        let strategy = hostile(valid);
        (0..400).filter(|_| is_read(&strategy.new_tree(&mut runner).unwrap().current())).count()
    };
    let found = [
        share(NOTIFICATIONS.clone(), |input| Notification::read(input, None).is_ok()),
        share(urls(), |input| TransportUrl::parse(&String::from_utf8_lossy(input)).is_ok()),
        share(configurations(), |input| Config::parse(Path::new("x"), &String::from_utf8_lossy(input)).is_ok()),
        share(headers(), |input| container_format(input).is_some()),
        share(records(), |input| Record::parse(input).is_ok()),
        share(answers(), |input| serde_json::from_slice::<Image>(input).is_ok()),
    ];
    assert!(found.iter().all(|count| (4..400).contains(count)), "read of 400: {found:?}");
}
