//! What the configuration promises to a person who writes one.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use proptest::prelude::*;
use secrecy::ExposeSecret as _;

use super::keys::{BACKEND, sections};
use super::*;

const SAMPLE: &str = include_str!("../../etc/rbd-offload.conf");

/// What there must be, and nothing more; a secret that no error and no `Debug` may show.
const LEAST: &str = "\
[messaging]
transport_url = rabbit://bus:hunter2@rabbit:5672/
[keystone]
auth_url = http://keystone:5000/v3
username = rbd-offload
password = hunter2
project_name = service
[backend:ceph]
";

fn parse(text: &str) -> Result<Config, Error> {
    Config::parse(Path::new("test.conf"), text)
}

fn good(text: &str) -> Config {
    parse(text).unwrap_or_else(|error| panic!("refused: {error}"))
}

/// The lines of the report.
fn wrong(text: &str) -> Vec<String> {
    lines_of(parse(text))
}

fn lines_of(result: Result<Config, Error>) -> Vec<String> {
    let error = result.expect_err("should be refused");
    assert_eq!(error.exit_code(), 78, "{error}");
    let text = error.to_string();
    assert!(!text.contains("hunter2"), "shows a secret: {text}");
    assert!(!format!("{error:?}").contains("hunter2"), "Debug shows a secret");
    text.lines().map(str::to_owned).collect()
}

/// `LEAST` and some more.
fn with(more: &str) -> String {
    format!("{LEAST}{more}")
}

/// A folder with files, loaded with an environment.
struct Folder(tempfile::TempDir);

impl Folder {
    fn new(files: &[(&str, &str)]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("conf.d")).unwrap();
        for (name, text) in files {
            fs::write(folder.path().join(name), text).unwrap();
        }
        Self(folder)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn load(&self, environment: &[(&str, &str)]) -> Result<Config, Error> {
        let environment = environment.iter().map(|(name, value)| (OsString::from(name), OsString::from(value)));
        Config::load_from(&self.path("main.conf"), environment, &|_| Ok(()))
    }

    /// The report, without the folder's own name.
    fn wrong(&self, environment: &[(&str, &str)]) -> Vec<String> {
        let folder = format!("{}/", self.0.path().display());
        lines_of(self.load(environment)).into_iter().map(|line| line.replace(&folder, "")).collect()
    }
}

// Values and defaults

#[test]
fn the_least_configuration_gets_every_default() {
    let config = good(LEAST);
    assert_eq!(config.log, Log { log_level: LogLevel::Info, log_format: LogFormat::Text });
    assert_eq!(config.messaging.queue, "rbd-offload");
    assert_eq!(config.messaging.queue_type, QueueType::Quorum);
    assert_eq!(config.messaging.queue_max_length, 100_000);
    assert_eq!(config.messaging.queue_expires, Duration::from_secs(604_800));
    assert_eq!(config.messaging.exchanges, ["glance", "openstack", "cinder", "nova"]);
    assert_eq!(config.messaging.topics, ["notifications", "versioned_notifications"]);
    assert_eq!(config.messaging.prefetch, 128);
    assert_eq!(config.messaging.ssl_ca_file, None);
    assert!(config.messaging.ssl_verify_hostname);
    assert_eq!(config.keystone.interface, Interface::Internal);
    assert_eq!(config.keystone.timeout, Duration::from_secs(30));
    let protected = ["bittorrent", "cache_in_nova", "cinder_encryption_key", "img_signature", "signature_verified"];
    assert_eq!(
        config.glance,
        Glance {
            pool: "images".into(),
            endpoint_override: None,
            register: Register::Auto,
            data_pool: None,
            image_size_cap: 0,
            user_storage_quota: 0,
            protected_properties: protected.map(str::to_owned).into(),
        }
    );
    let ceph = Ceph { conf: "/etc/ceph/ceph.conf".into(), user: "rbd-offload".into(), keyring: None };
    assert_eq!(config.ceph, ceph);
    assert_eq!(
        config.offload,
        Offload {
            method: MethodChoice::Auto,
            publish: PublishChoice::WhenCopied,
            max_detach: 2,
            detach_grace: Duration::from_secs(60),
            max_jobs: 4,
            allow_in_use: false,
            concurrency: 16,
            bandwidth_limit: 0,
            retries: 5,
            decline_after: Duration::ZERO,
            hash: Hash::None,
            reconcile_interval: Duration::from_secs(60),
            verify: Verify::Sample,
            objects_per_second: 0,
            max_jobs_per_pool: 0,
            max_jobs_per_project: 0,
            max_takeovers: 3,
            hang_limit: Duration::from_secs(1800),
            dry_run: false,
        }
    );
    assert_eq!(
        config.jobs,
        Jobs {
            pool: "images".into(),
            namespace: "rbd-offload".into(),
            lease: Duration::from_secs(30),
            retention: Duration::from_secs(7 * 86_400),
        }
    );
    assert!(!config.cinder.integration);
    assert_eq!(config.nova, Nova { integration: false, pool: "vms".into(), image_name: "{id}_disk".into() });
    assert_eq!(
        config.backends["ceph"],
        Backend {
            pool: "volumes".into(),
            image_name: "volume-{id}".into(),
            dest_pool: "images".into(),
            method: None,
            publish: None,
            allow_in_use: None,
            anchor: true
        }
    );
    assert_eq!(config.metrics.listen, Some("127.0.0.1:9469".parse().unwrap()));
    match config.keystone.credentials {
        Credentials::Password { user_domain_name, project_domain_name, .. } => {
            assert_eq!((user_domain_name.as_str(), project_domain_name.as_str()), ("Default", "Default"));
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_password_comes_out_as_it_was_written() {
    for password in [
        r#"a\nb"c'd#e=f;g"#,
        r"\",
        r"C:\x41\\",
        r#"it's"#,
        r#""half"#,
        r"half'",
        "100%",
        "%(log_level)s",
        "${HOME}",
        "a ; b # c",
        "; not a comment",
        "# nor this",
        "[brackets]",
        "ключ🔑",
        "tab\tinside",
    ] {
        let text = LEAST.replace("password = hunter2", &format!("password = {password}"));
        match good(&text).keystone.credentials {
            Credentials::Password { password: read, .. } => assert_eq!(read.expose_secret(), password),
            other => panic!("{other:?}"),
        }
        let folder = Folder::new(&[("main.conf", LEAST)]);
        match folder.load(&[("RBD_OFFLOAD_KEYSTONE__PASSWORD", password)]).unwrap().keystone.credentials {
            Credentials::Password { password: read, .. } => assert_eq!(read.expose_secret(), password),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_pair_of_quotes_around_a_value_does_not_count() {
    for (written, read) in [("\"a b\"", "a b"), ("' a '", " a "), ("\"a\"b\"", "a\"b"), ("\"", "\""), ("\"a'", "\"a'")]
    {
        let text = LEAST.replace("password = hunter2", &format!("password = {written}"));
        match good(&text).keystone.credentials {
            Credentials::Password { password, .. } => assert_eq!(password.expose_secret(), read),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn comments_blanks_line_ends_and_a_byte_order_mark_do_not_matter() {
    let text = format!("\u{feff}; one\r\n# two\r\n\r\n{}", LEAST.replace('\n', "\r\n"))
        + "\r\n  # indented\r\n[ offload ]\r\n\t max_jobs=7 \r\n   concurrency   =   3";
    let config = good(&text);
    assert_eq!((config.offload.max_jobs, config.offload.concurrency), (7, 3));
}

#[test]
fn an_empty_value_is_as_if_it_was_not_set() {
    let config = good(&with("method =\ndest_pool = \"\"\n[offload]\nmax_jobs =\nmethod=\n"));
    assert_eq!((config.offload.max_jobs, config.offload.method), (4, MethodChoice::Auto));
    assert_eq!((config.backends["ceph"].method, config.backends["ceph"].dest_pool.as_str()), (None, "images"));
}

#[test]
fn an_empty_listen_turns_the_metrics_off() {
    assert_eq!(good(&with("[metrics]\nlisten =\n")).metrics.listen, None);
    assert_eq!(good(&with("[metrics]\nlisten = [::1]:80\n")).metrics.listen, Some("[::1]:80".parse().unwrap()));
}

#[test]
fn a_backend_has_its_own_method_and_pools() {
    let config = good(&with(
        "pool = ssd\ndest_pool = images-ssd\nmethod = copy\nimage_name = v-{id}.img\n[backend:hdd]\n[glance]\npool=gl\n",
    ));
    let ceph = &config.backends["ceph"];
    assert_eq!(
        (ceph.pool.as_str(), ceph.dest_pool.as_str(), ceph.method),
        ("ssd", "images-ssd", Some(MethodChoice::Copy))
    );
    assert_eq!(ceph.image_name, "v-{id}.img");
    assert_eq!(config.backends["hdd"].dest_pool, "gl");
}

#[test]
fn a_section_may_come_twice_and_both_halves_count() {
    let config = good(&with("[offload]\nmax_jobs = 9\n[nova]\n[offload]\nretries = 2\n"));
    assert_eq!((config.offload.max_jobs, config.offload.retries), (9, 2));
}

#[test]
fn names_with_dots_are_names() {
    let config = good(&with("[backend:ceph.ssd-1_A]\npool = vol.ssd\n"));
    assert_eq!(config.backends["ceph.ssd-1_A"].pool, "vol.ssd");
}

// Errors

#[test]
fn an_error_names_file_section_key_value_and_what_is_allowed() {
    assert_eq!(
        wrong(&with("[offload]\nmethod = clonee\n")),
        ["test.conf: [offload] method = clonee: one of auto, server-copy, copy, clone (line 10)"]
    );
}

#[test]
fn all_mistakes_are_reported_at_once() {
    let told = wrong(
        "[DEFAULT]\nlog_level = loud\n[ofload]\nx = 1\n[offload]\nmax_jobs = 0\nretrys = 3\nmax_jobs = 2\n\
         what is this\n[metrics]\nlisten = here\n[nova]\nimage_name = disk\n[backend:]\n[keystone]\nusername = x\n",
    );
    assert_eq!(
        told,
        [
            "test.conf: [offload] max_jobs: set twice, first in line 6 (line 8)",
            "test.conf: neither \"key = value\", \"[section]\" nor a comment (line 9)",
            "test.conf: [DEFAULT] log_level = loud: one of error, warn, info, debug, trace (line 2)",
            "test.conf: [backend:]: a backend needs a name, as in Cinder's enabled_backends (line 14)",
            "test.conf: [metrics] listen = here: an address and a port, such as 127.0.0.1:9469 or [::1]:9469; empty: off \
             (line 11)",
            "test.conf: [nova] image_name = disk: the name of an RBD image with {id} in it exactly once, without blanks, \
             / and @ (line 13)",
            "test.conf: [offload] max_jobs = 0: a whole number from 1 to 256 (line 6)",
            "test.conf: [offload] retrys: unknown key; did you mean retries? (line 7)",
            "test.conf: [ofload]: unknown section; did you mean [offload]? (line 3)",
            "test.conf: [messaging] transport_url: required: rabbit://USER:PASSWORD@HOST:PORT/VHOST",
            "test.conf: [keystone] auth_url: required: a URL that starts with http:// or https://, without user and \
             password",
            "test.conf: [keystone] password: missing: to log in with a password takes username, password and project_name",
            "test.conf: [keystone] project_name: missing: to log in with a password takes username, password and \
             project_name",
        ]
    );
}

#[test]
fn an_empty_file_tells_all_that_is_required() {
    let told = wrong("");
    assert_eq!(told.len(), 4, "{told:#?}");
    for needed in ["transport_url", "auth_url", "application_credential_id", "[backend:NAME]"] {
        assert!(told.iter().any(|line| line.contains(needed)), "{needed}: {told:#?}");
    }
}

#[test]
fn a_comment_behind_a_value_is_named_as_the_cause() {
    for line in
        ["method = clone ; comment", "max_jobs = 4 # comment", "allow_in_use = true\t;x", "bandwidth_limit = 1 #"]
    {
        let told = wrong(&with(&format!("[offload]\n{line}\n")));
        assert!(told[0].contains("a comment needs a line of its own"), "{told:?}");
    }
    assert!(wrong(&with("[offload] ; the rest\n"))[0].contains("a comment needs a line of its own"));
    assert!(wrong(&with("pool = volumes ; ssd\n"))[0].contains("a comment needs a line of its own"));
}

#[test]
fn a_key_in_the_wrong_section_names_the_right_one() {
    assert!(
        wrong(&with("[DEFAULT]\ntransport_url = rabbit://u:hunter2@h/\n"))[0].contains("it belongs to [messaging]")
    );
    assert!(wrong("log_level = info\n")[0].contains("a key before any [section]"));
    assert!(wrong(&with("[default]\n"))[0].contains("did you mean [DEFAULT]?"));
    assert!(wrong(&with("[backend:NAMES]\n[backend]\n"))[0].contains("unknown section"));
}

#[test]
fn secrets_are_never_shown() {
    // `wrong` looks for the secret itself.
    wrong(&LEAST.replace("rabbit://", "amq://"));
    wrong(&LEAST.replace("transport_url = ", "transport_url: "));
    wrong(&LEAST.replace("transport_url =", "transport_url"));
    wrong(&LEAST.replace("password =", "passwort ="));
    wrong(&LEAST.replace("password =", "the_secret_token ="));
    wrong(&LEAST.replace("password =", "password"));
    wrong(&LEAST.replace("password = hunter2", "password = a\npassword = hunter2"));
    wrong(&LEAST.replace("http://keystone", "http://admin:hunter2@keystone"));
    wrong(&with("[messaging]\nqueue = rabbit://u:hunter2@h/ x\n"));
    wrong(&with("[keystone]\napplication_credential_secret = hunter2\n"));
    wrong(&with("hunter2\n= hunter2\nhunter 2 = hunter2\n\u{1}hunter2 = hunter2\n"));
    let folder = Folder::new(&[("main.conf", LEAST)]);
    folder.wrong(&[("RBD_OFFLOAD_MESSAGING__TRANSPORT_URL", "hunter2"), ("RBD_OFFLOAD_KEYSTONE__PASWORD", "hunter2")]);
    assert!(!format!("{:?}", good(LEAST)).contains("hunter2"));
}

#[test]
fn a_value_cannot_write_on_the_terminal() {
    let folder = Folder::new(&[("main.conf", LEAST)]);
    let told = folder.wrong(&[("RBD_OFFLOAD_OFFLOAD__METHOD", "\u{1b}[2Jx\ny")]);
    assert_eq!(told.len(), 1);
    assert!(!told[0].contains('\u{1b}'));
    assert!(wrong(&with(&format!("[offload]\nmethod = {}\n", "x".repeat(10_000))))[0].len() < 300);
}

#[test]
fn limits_hold_at_both_ends() {
    for (section, key, inside, outside) in [
        ("offload", "max_jobs", ["1", "256"], ["0", "257"]),
        ("offload", "max_jobs_per_pool", ["0", "256"], ["-1", "257"]),
        ("offload", "max_jobs_per_project", ["0", "256"], ["-1", "257"]),
        ("offload", "max_takeovers", ["0", "100"], ["-1", "101"]),
        ("offload", "hang_limit", ["1m", "1d"], ["59s", "25h"]),
        ("offload", "decline_after", ["0s", "1d"], ["25h", "-1s"]),
        ("offload", "concurrency", ["1", "256"], ["0", "257"]),
        ("offload", "retries", ["0", "100"], ["+1", "101"]),
        ("offload", "reconcile_interval", ["1s", "1d"], ["999ms", "25h"]),
        ("glance", "image_size_cap", ["0", "1024GiB"], ["1 TiB", "-1"]),
        ("glance", "user_storage_quota", ["0", "1024GiB"], ["1 TiB", "-1"]),
        ("offload", "bandwidth_limit", ["0", "16777215GiB"], ["1 GiB", "17179869184GiB"]),
        ("offload", "objects_per_second", ["0", "1000000"], ["0.5", "1000001"]),
        ("messaging", "prefetch", ["1", "65535"], ["0", "65536"]),
        ("messaging", "queue_max_length", ["0", "1000000000"], ["-1", "1000000001"]),
        // RabbitMQ's own limit is 2^32 ms
        ("messaging", "queue_expires", ["0", "49d"], ["7", "50d"]),
        ("jobs", "lease", ["5s", "10m"], ["4999ms", "601s"]),
        ("jobs", "retention", ["1m", "3650d"], ["59s", "99999999999999999d"]),
        ("keystone", "timeout", ["1s", "600000ms"], ["0s", "11m"]),
    ] {
        for value in inside {
            good(&with(&format!("[{section}]\n{key} = {value}\n")));
        }
        for value in outside {
            let told = wrong(&with(&format!("[{section}]\n{key} = {value}\n")));
            assert!(told[0].starts_with(&format!("test.conf: [{section}] {key} = {value}: ")), "{told:?}");
        }
    }
}

#[test]
fn names_that_cannot_be_are_refused() {
    for line in [
        "pool = a/b",
        "pool = a@b",
        "pool = a b",
        "dest_pool = images/x",
        "image_name = volume",
        "image_name = {id}-{id}",
        "image_name = {id}-{name}",
        "image_name = a/{id}",
        "image_name = {id}@snap",
        "[ceph]\nuser = client.rbd-offload",
        "[messaging]\nexchanges = glance,,nova",
        "[messaging]\ntopics = ,",
        "[backend: x]",
        "[backend:a b]",
        "[backend:host@ceph]",
        "[backend:ceph#pool]",
        "[glance]\nendpoint_override = glance:9292",
        "[glance]\nendpoint_override = http://",
        "[keystone]\ninterface = private",
    ] {
        assert_eq!(wrong(&with(&format!("{line}\n"))).len(), 1, "{line}");
    }
}

#[test]
fn a_queue_that_other_services_consume_is_refused() {
    for queue in ["notifications.info", "versioned_notifications.error", "mine.audit"] {
        let told = wrong(&with(&format!("[messaging]\ntopics = mine\nqueue = {queue}\n")));
        assert!(told[0].contains("other services consume this queue"), "{told:?}");
    }
    good(&with("[messaging]\nqueue = notifications.rbd-offload\n"));
    good(&with("[messaging]\nqueue = other.info\n"));
}

#[test]
fn the_url_of_the_bus_is_rabbits_and_its_reader_is_asked() {
    let other = |url: &str| LEAST.replace("rabbit://bus:hunter2@rabbit:5672/", url);
    good(&other("rabbit://a:p@[::1]:5672,b:p@h2:5672//?ssl=1"));
    good(&other("kombu+rabbit://a:p@h/"));
    for url in ["amqp://a:p@h/", "rabbit:/h", "rabbit://", "://h", "h", "rabbit://a:p@h /"] {
        let told = wrong(&other(url));
        assert!(told[0].starts_with("test.conf: [messaging] transport_url: rabbit://USER"), "{told:?}");
    }
    let folder = Folder::new(&[("main.conf", LEAST)]);
    let result = Config::load_from(&folder.path("main.conf"), [], &|url| Err(format!("{} letters", url.len())));
    assert!(lines_of(result)[0].contains("[messaging] transport_url: 33 letters"));
}

#[test]
fn there_is_exactly_one_way_to_log_in() {
    let login = |lines: &str| {
        format!("[messaging]\ntransport_url = rabbit://h/\n[backend:b]\n[keystone]\nauth_url = https://k/v3\n{lines}")
    };
    assert!(wrong(&login(""))[0].contains("no way to log in"));
    let told = wrong(&login("username = u\n"));
    assert_eq!(told.len(), 2);
    assert!(told[0].contains("[keystone] password: missing") && told[1].contains("[keystone] project_name: missing"));
    assert!(wrong(&login("application_credential_id = i\n"))[0].contains("application_credential_secret: missing"));
    assert!(
        wrong(&login("application_credential_secret = hunter2\n"))[0].contains("application_credential_id: missing")
    );
    let told = wrong(&login("username = u\npassword = hunter2\napplication_credential_id = i\n"));
    assert_eq!(told.len(), 1);
    assert!(told[0].contains("two ways to log in: take out username, password, or application_credential_id"));
    match good(&login("application_credential_id = i\napplication_credential_secret = s\n")).keystone.credentials {
        Credentials::Application { id, secret } => assert_eq!((id.as_str(), secret.expose_secret()), ("i", "s")),
        other => panic!("{other:?}"),
    }
}

#[test]
fn files_that_are_no_configuration_are_refused() {
    let folder = Folder::new(&[("main.conf", LEAST)]);
    fs::write(folder.path("conf.d/a.conf"), b"[offload]\nmax_jobs = 3\nmethod = \xff\n").unwrap();
    assert_eq!(folder.wrong(&[]), ["conf.d/a.conf: not UTF-8 text (line 3)"]);
    fs::write(folder.path("conf.d/a.conf"), "#".repeat(1024 * 1024 + 1)).unwrap();
    assert_eq!(folder.wrong(&[]), ["conf.d/a.conf: larger than 1 MiB, so not a configuration of rbd-offload"]);
    fs::write(folder.path("conf.d/a.conf"), "#".repeat(1024 * 1024)).unwrap();
    folder.load(&[]).unwrap();
}

#[test]
fn a_thousand_errors_are_not_all_printed() {
    let told = wrong(&with(&"nonsense\n".repeat(1000)));
    assert_eq!(told.len(), 101);
    assert_eq!(told[100], "and 900 more");
}

#[test]
fn a_file_that_cannot_be_read_is_another_exit_status() {
    let folder = Folder::new(&[("main.conf", LEAST)]);
    let missing = Config::load_from(&folder.path("none.conf"), [], &|_| Ok(())).unwrap_err();
    assert_eq!(missing.exit_code(), 66);
    assert!(missing.to_string().contains("none.conf: No such file or directory"), "{missing}");
    assert_eq!(Config::load_from(folder.0.path(), [], &|_| Ok(())).unwrap_err().exit_code(), 66);
    fs::create_dir(folder.path("conf.d/folder.conf")).unwrap();
    assert_eq!(folder.load(&[]).unwrap_err().exit_code(), 66);
    let folder = Folder::new(&[("main.conf", LEAST)]);
    std::os::unix::fs::symlink("nowhere", folder.path("conf.d/dangling.conf")).unwrap();
    assert_eq!(folder.load(&[]).unwrap_err().exit_code(), 66);
}

// Layers

#[test]
fn later_files_win_in_lexical_order_and_the_environment_wins_over_all() {
    let folder = Folder::new(&[
        ("main.conf", &with("[offload]\nmax_jobs = 1\nretries = 1\nconcurrency = 1\nmethod = copy\n")),
        ("conf.d/20-b.conf", "[offload]\nmax_jobs = 3\nretries = 3\nmethod =\n"),
        ("conf.d/10-a.conf", "[offload]\nmax_jobs = 2\nretries = 2\n[backend:second]\n"),
        ("conf.d/30-c.conf.rpmsave", "nonsense"),
        ("conf.d/.30-c.conf", "nonsense"),
        ("conf.d/README", "nonsense"),
    ]);
    let config =
        folder.load(&[("rbd_offload_offload__max_jobs", "4"), ("PATH", "x"), ("RBD_OFFLOAD_CONFIG", "x")]).unwrap();
    assert_eq!((config.offload.max_jobs, config.offload.retries, config.offload.concurrency), (4, 3, 1));
    assert_eq!(config.offload.method, MethodChoice::Auto);
    assert_eq!(config.backends.len(), 2);
}

#[test]
fn an_error_names_the_layer_that_it_comes_from() {
    let folder = Folder::new(&[
        ("main.conf", LEAST),
        ("conf.d/10-a.conf", "[offload]\nhash = md5\n[messaging]\nqueue = notifications.info\n"),
    ]);
    let told = folder.wrong(&[("RBD_OFFLOAD_OFFLOAD__MAX_JOBS", "many"), ("RBD_OFFLOAD_JOBS__POOL", "a/b")]);
    assert_eq!(
        told,
        [
            "conf.d/10-a.conf: [offload] hash = md5: one of none, sha512 (line 2)",
            "environment variable RBD_OFFLOAD_JOBS__POOL: [jobs] pool = a/b: the name of a pool, without blanks, / and @",
            "environment variable RBD_OFFLOAD_OFFLOAD__MAX_JOBS: [offload] max_jobs = many: a whole number from 1 to 256",
            "conf.d/10-a.conf: [messaging] queue = notifications.info: other services consume this queue, and would lose \
             what rbd-offload takes from it: name one of its own, such as rbd-offload (line 4)",
        ]
    );
}

#[test]
fn the_environment_reaches_every_backend_of_the_files() {
    let folder =
        Folder::new(&[("main.conf", &with("[backend:Ceph-SSD]\n[backend:a.b]\n[backend:a_b]\n[backend:x_]\n"))]);
    let config = folder
        .load(&[
            ("RBD_OFFLOAD_BACKEND_CEPH__POOL", "one"),
            ("RBD_OFFLOAD_BACKEND_CEPH_SSD__POOL", "two"),
            ("RBD_OFFLOAD_BACKEND_X___POOL", "three"),
            ("RBD_OFFLOAD_BACKEND:a.b__POOL", "four"),
            ("RBD_OFFLOAD_BACKEND:new__POOL", "five"),
        ])
        .unwrap();
    let pools: BTreeMap<_, _> = config.backends.iter().map(|(name, b)| (name.as_str(), b.pool.as_str())).collect();
    let expected =
        [("Ceph-SSD", "two"), ("a.b", "four"), ("a_b", "volumes"), ("ceph", "one"), ("new", "five"), ("x_", "three")];
    assert_eq!(pools, BTreeMap::from(expected));

    let told = folder.wrong(&[("RBD_OFFLOAD_BACKEND_A_B__POOL", "p"), ("RBD_OFFLOAD_BACKEND_NONE__POOL", "p")]);
    assert!(told[0].contains("means more than one backend: a.b, a_b"), "{told:?}");
    assert!(told[1].contains("no file has a [backend:…] of that name; backends there: "), "{told:?}");
}

#[test]
fn a_variable_for_an_unknown_key_is_reported() {
    let folder = Folder::new(&[("main.conf", LEAST)]);
    let told = folder.wrong(&[
        ("RBD_OFFLOAD_OFFLOAD_MAX_JOBS", "1"),
        ("RBD_OFFLOAD_NOPE__X", "1"),
        ("RBD_OFFLOAD_OFFLOAD__NOPE", "1"),
        ("RBD_OFFLOAD_JOBS__POOL", "x"),
        ("rbd_offload_jobs__pool", "y"),
    ]);
    assert_eq!(told.len(), 4, "{told:#?}");
    assert!(told.iter().any(|line| line.contains("unknown key; keys of this section")));
    assert!(told.iter().any(|line| line.contains("did you mean RBD_OFFLOAD_OFFLOAD__MAX_JOBS, with two underscores?")));
    assert!(told.iter().any(|line| line.contains("no such section; sections: DEFAULT, messaging")));
    assert!(told.iter().any(|line| line.contains("set twice, also by RBD_OFFLOAD_JOBS__POOL")));
}

#[cfg(unix)]
#[test]
fn a_variable_that_is_not_text_is_reported() {
    use std::os::unix::ffi::OsStringExt as _;
    let folder = Folder::new(&[("main.conf", LEAST)]);
    let environment = [("RBD_OFFLOAD_JOBS__POOL".into(), OsString::from_vec(vec![0xff]))];
    let told = lines_of(Config::load_from(&folder.path("main.conf"), environment, &|_| Ok(())));
    assert_eq!(told, ["environment variable RBD_OFFLOAD_JOBS__POOL: [jobs] pool: not UTF-8 text"]);
}

// Credentials

/// A configuration without its secrets, and a directory of credentials beside it.
fn with_credentials(credentials: &[(&str, &[u8])]) -> Folder {
    let without: String =
        LEAST.lines().filter(|line| !line.contains("hunter2")).map(|line| format!("{line}\n")).collect();
    let folder = Folder::new(&[("main.conf", &without)]);
    fs::create_dir(folder.path("credentials")).unwrap();
    for (name, text) in credentials {
        fs::write(folder.path("credentials").join(name), text).unwrap();
    }
    folder
}

fn named_in_the_environment(folder: &Folder) -> (&'static str, String) {
    ("CREDENTIALS_DIRECTORY", folder.path("credentials").to_str().unwrap().to_owned())
}

#[test]
fn a_credential_is_the_value_of_the_key_that_it_is_named_after() {
    let folder = with_credentials(&[
        ("keystone.password", b"hunter2 # \"x\"\n"),
        ("messaging.transport_url", b"rabbit://bus:hunter2@rabbit:5672/\r\n"),
        ("backend:ceph.ssd.pool", b"ssd"),
        ("offload.max_jobs", b"7\n"),
    ]);
    let (name, value) = named_in_the_environment(&folder);
    let config = folder.load(&[(name, &value)]).unwrap();
    match config.keystone.credentials {
        Credentials::Password { password, .. } => assert_eq!(password.expose_secret(), "hunter2 # \"x\""),
        other => panic!("{other:?}"),
    }
    assert_eq!(config.messaging.transport_url.expose_secret(), "rabbit://bus:hunter2@rabbit:5672/");
    assert_eq!((config.backends["ceph.ssd"].pool.as_str(), config.offload.max_jobs), ("ssd", 7));
    // over the files, under the environment
    let config = folder.load(&[(name, &value), ("RBD_OFFLOAD_OFFLOAD__MAX_JOBS", "9")]).unwrap();
    assert_eq!(config.offload.max_jobs, 9);
    // and without the variable, the files alone count
    assert_eq!(folder.wrong(&[]).len(), 2);
}

#[test]
fn an_unknown_credential_is_reported_without_its_text() {
    let folder = with_credentials(&[
        ("keystone.password", b"hunter2\nhunter2"),
        ("keystone.pasword", b"hunter2"),
        ("keyston.password", b"hunter2"),
        ("password", b"hunter2"),
        ("messaging.transport_url", b"hunter2"),
        ("keystone.username", b"\xff"),
    ]);
    let (name, value) = named_in_the_environment(&folder);
    let told = folder.wrong(&[(name, &value)]);
    for line in [
        "credential keystone.password: [keystone] password: more than one line, or a control character",
        "credential keystone.pasword: [keystone] pasword: unknown key; did you mean password?",
        "credential keyston.password: [keyston]: unknown section; did you mean [keystone]?",
        "credential password: its name is not that of a key, <section>.<key>",
        "credential keystone.username: [keystone] username: not UTF-8 text",
    ] {
        assert!(told.iter().any(|told| told == line), "{line}\n{told:#?}");
    }
    assert!(told.iter().any(|line| line.starts_with("credential messaging.transport_url: [messaging]")), "{told:#?}");
}

#[test]
fn a_directory_of_credentials_that_cannot_be_read_is_an_error() {
    let folder = Folder::new(&[("main.conf", LEAST)]);
    let error = folder.load(&[("CREDENTIALS_DIRECTORY", folder.path("none").to_str().unwrap())]).unwrap_err();
    assert_eq!(error.exit_code(), 66);
    assert!(error.to_string().contains("/none: "), "{error}");
}

// The table, the sample, the reload

/// A key's value other than its default, and other than `LEAST` has it.
fn another(key: &Key) -> String {
    match key.kind {
        Kind::OneOf(names) => names.iter().rev().find(|name| **name != key.default).unwrap().to_string(),
        Kind::Flag => (key.default != "true").to_string(),
        Kind::Whole { max, .. } => max.to_string(),
        Kind::Span { max, .. } => format!("{max}s"),
        Kind::Size => "1MiB".into(),
        Kind::TransportUrl => "rabbit://other/".into(),
        Kind::HttpUrl => "https://other:1".into(),
        Kind::ImageName => "other-{id}".into(),
        Kind::Listen => "[::1]:1".into(),
        Kind::List | Kind::Text | Kind::Word | Kind::Secret | Kind::Pool | Kind::CephUser => "other".into(),
    }
}

/// `LEAST`, as a table, with one key changed.
fn least_with(key: &Key, value: &str) -> String {
    let section = if key.section == BACKEND { "backend:ceph" } else { key.section };
    let mut text = String::new();
    for line in LEAST.lines().filter(|line| !line.starts_with(&format!("{} =", key.name)) || section.contains(':')) {
        text.push_str(&format!("{line}\n"));
    }
    text + &format!("[{section}]\n{} = {value}\n", key.name)
}

#[test]
fn every_key_accepts_its_own_default_and_says_what_it_takes() {
    let mut seen = BTreeSet::new();
    for key in keys() {
        assert!(seen.insert((key.section, key.name)), "twice: {key:?}");
        assert!(key.default.is_empty() || key.kind.accepts(key.default), "{key:?}");
        assert!(key.need == Need::Optional || key.default.is_empty(), "{key:?}");
        assert!(key.about.ends_with('.') && !key.allowed().is_empty(), "{key:?}");
    }
    assert_eq!(sections().len(), sections().iter().collect::<BTreeSet<_>>().len(), "sections lie together");
}

#[test]
fn a_restart_is_needed_for_the_keys_that_say_so_and_no_others() {
    let before = good(LEAST);
    assert!(before.restart_needed(&before).is_empty());
    for key in keys().iter().filter(|key| key.need != Need::ApplicationCredential) {
        let after = good(&least_with(key, &another(key)));
        let named = format!("[{}] {}", key.section, key.name);
        let expected = if key.reload { vec![] } else { vec![named] };
        assert_eq!(before.restart_needed(&after), expected);
        if !key.is_secret() {
            assert_ne!(format!("{before:?}"), format!("{after:?}"), "{key:?} has no effect");
            let taken_over = format!("{:?}", before.reloaded(&after)) != format!("{before:?}");
            assert_eq!(taken_over, key.reload, "{key:?}");
        }
    }
    let application = LEAST.replace(
        "username = rbd-offload\npassword = hunter2\nproject_name = service",
        "application_credential_id = i\napplication_credential_secret = s",
    );
    assert_eq!(
        before.restart_needed(&good(&application)),
        ["username", "password", "project_name", "application_credential_id", "application_credential_secret"]
            .map(|key| format!("[keystone] {key}"))
    );
}

/// The keys of the sample: section, key, default.
fn sample_keys() -> Vec<(String, String, String)> {
    let mut section = String::new();
    let mut found = Vec::new();
    for line in SAMPLE.lines() {
        let uncommented = line.strip_prefix('#').unwrap_or(line);
        if uncommented.starts_with(' ') || uncommented.is_empty() {
            continue;
        }
        if let Some(name) = uncommented.strip_prefix('[') {
            section = name.trim_end_matches(']').to_owned();
        } else {
            let (key, default) = uncommented.split_once('=').expect(line);
            found.push((section.clone(), key.trim().to_owned(), default.trim().to_owned()));
        }
    }
    found
}

#[test]
fn the_sample_has_every_key_with_its_default_and_no_other() {
    let table: Vec<_> =
        keys().iter().map(|k| (k.section.to_owned(), k.name.to_owned(), k.default.to_owned())).collect();
    assert_eq!(sample_keys(), table);
}

#[test]
fn the_sample_explains_every_key_as_the_table_does() {
    let comments: String = SAMPLE.lines().filter_map(|line| line.strip_prefix("# ")).collect::<Vec<_>>().join(" ");
    for key in keys() {
        assert!(comments.contains(key.about), "{}: {}", key.name, key.about);
        if let Kind::OneOf(_) | Kind::Whole { .. } = key.kind {
            let allowed = key.allowed();
            assert!(comments.contains(allowed.get(1..).unwrap()), "{}: {allowed}", key.name);
        }
    }
    assert!(SAMPLE.lines().all(|line| line.len() <= 120));
}

#[test]
fn the_sample_loads_once_what_is_required_is_filled_in() {
    assert_eq!(wrong(SAMPLE).len(), 4, "as it is, it lacks the four required values");
    let filled = SAMPLE
        .replace("#transport_url =", "transport_url = rabbit://u:hunter2@h:5672/")
        .replace("#auth_url =", "auth_url = https://k:5000/v3")
        .replace("#username =", "username = rbd-offload")
        .replace("#password =", "password = hunter2")
        .replace("#project_name =", "project_name = service")
        .replace("#[backend:NAME]", "[backend:ceph]");
    assert!(good(LEAST).restart_needed(&good(&filled)).iter().all(|key| !key.contains("jobs")));
    // And with every default written out.
    let spelled_out: String = filled
        .lines()
        .map(|line| if line.starts_with("# ") { line } else { line.trim_start_matches('#') }.to_owned() + "\n")
        .collect();
    assert_eq!(good(&spelled_out).offload, good(LEAST).offload);
    assert_eq!(good(&spelled_out).backends, good(LEAST).backends);
}

// Hostile input

/// Lines that are nearly right.
fn nearly() -> impl Strategy<Value = String> {
    let line = prop_oneof![
        "\\PC{0,40}",
        "\\[[a-zA-Z:\\]\\[ .@\\\\]{0,12}\\]?",
        (0..keys().len(), "\\PC{0,20}").prop_map(|(at, value)| format!("{} = {value}", keys()[at].name)),
        (0..sections().len()).prop_map(|at| format!("[{}]", sections()[at])),
    ];
    prop::collection::vec(line, 0..30).prop_map(|lines| lines.join("\n"))
}

proptest! {
    #[test]
    fn any_bytes_are_a_configuration_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..2000)) {
        let folder = Folder::new(&[]);
        fs::write(folder.path("main.conf"), bytes).unwrap();
        let _ = folder.load(&[]).map_err(|error| error.to_string());
    }

    #[test]
    fn lines_that_are_nearly_right_are_a_configuration_or_an_error(text in nearly()) {
        let _ = parse(&with(&text)).map_err(|error| error.to_string());
    }

    #[test]
    fn any_variable_is_a_configuration_or_an_error(name in "[A-Za-z:_é]{0,30}", value in "\\PC{0,30}") {
        let folder = Folder::new(&[("main.conf", LEAST)]);
        let _ = folder.load(&[(&format!("RBD_OFFLOAD_{name}"), &value)]).map_err(|error| error.to_string());
    }

    #[test]
    fn any_password_without_control_characters_survives(password in "[^\\p{C}\\s\"']\\PC{0,30}[^\\p{C}\\s\"']") {
        let text = LEAST.replace("password = hunter2", &format!("password = {password}"));
        match good(&text).keystone.credentials {
            Credentials::Password { password: read, .. } => prop_assert_eq!(read.expose_secret(), &password),
            other => panic!("{other:?}"),
        }
    }

    /// What the table accepts, the types take.
    #[test]
    fn a_value_that_its_key_accepts_is_understood(at in 0..keys().len(), text in "[0-9]{1,20}(ms|s|d|GiB)?|\\PC{1,12}") {
        let key = &keys()[at];
        let text = text.trim();
        if !key.kind.accepts(text) || key.need == Need::ApplicationCredential {
            return Ok(());
        }
        if let Err(error) = parse(&least_with(key, text)) {
            prop_assert!(!error.to_string().contains("cannot be understood"), "{error}");
        }
    }
}

#[test]
fn every_key_can_be_set() {
    for key in keys().iter().filter(|key| key.need != Need::ApplicationCredential) {
        good(&least_with(key, &another(key)));
    }
}
