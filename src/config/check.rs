//! Fragments → `Config`: puts defaults under what was written, and checks what no key can say alone.

use std::collections::BTreeMap;
use std::path::Path;

use secrecy::ExposeSecret as _;
use serde::de::DeserializeOwned;

use super::fragments::{self, Secret};
use super::keys::{self, BACKEND_PREFIX, Kind, Need};
use super::read::Written;
use super::report::{Error, Origin, Problem, Report};
use super::{
    Backend, Ceph, Cinder, Config, Credentials, Glance, Jobs, Keystone, Log, Messaging, Metrics, Nova, Offload,
    TransportUrlCheck,
};

/// oslo.messaging's priorities; publishers declare a queue `<topic>.<priority>` for each, and other services consume it.
const PRIORITIES: &[&str] = &["audit", "debug", "info", "warn", "error", "critical", "sample"];

/// Topics whose queues are others' whether we listen to them or not.
const COMMON_TOPICS: &[&str] = &["notifications", "versioned_notifications"];

/// The whole configuration, or everything in `report` and all that is found here.
pub fn check(
    written: Written,
    main: &Path,
    transport_url: TransportUrlCheck<'_>,
    report: Report,
) -> Result<Config, Error> {
    let mut checker = Checker { written, main, report };
    let log = checker.fragment::<fragments::Log>("DEFAULT");
    let messaging = checker.fragment("messaging").and_then(|fragment| checker.messaging(fragment, transport_url));
    let keystone = checker.fragment("keystone").and_then(|fragment| checker.keystone(fragment));
    let glance = checker.fragment::<fragments::Glance>("glance");
    let ceph = checker.fragment::<fragments::Ceph>("ceph");
    let offload = checker.fragment::<fragments::Offload>("offload");
    let jobs = checker.fragment::<fragments::Jobs>("jobs");
    let cinder = checker.fragment::<fragments::Cinder>("cinder");
    let nova = checker.fragment::<fragments::Nova>("nova");
    let metrics = checker.fragment::<fragments::Metrics>("metrics");
    let backends = glance.as_ref().map(|glance| checker.backends(&glance.pool));

    let complete = (log, messaging, keystone, glance, ceph, offload, jobs, cinder, nova, metrics, backends);
    let (
        Some(log),
        Some(messaging),
        Some(keystone),
        Some(glance),
        Some(ceph),
        Some(offload),
        Some(jobs),
        Some(cinder),
        Some(nova),
        Some(metrics),
        Some(backends),
    ) = complete
    else {
        return Err(Error::Wrong(checker.report));
    };
    if !checker.report.is_empty() {
        return Err(Error::Wrong(checker.report));
    }
    Ok(Config {
        log: Log { level: log.log_level, format: log.log_format },
        messaging,
        keystone,
        glance: Glance { pool: glance.pool, endpoint_override: glance.endpoint_override, register: glance.register },
        ceph: Ceph { conf: ceph.conf, user: ceph.user },
        offload: Offload {
            method: offload.method,
            max_jobs: offload.max_jobs.0,
            allow_in_use: offload.allow_in_use.0,
            concurrency: offload.concurrency.0,
            bandwidth_limit: offload.bandwidth_limit.0,
            retries: offload.retries.0,
            hash: offload.hash,
            reconcile_interval: offload.reconcile_interval.0,
            verify: offload.verify,
            objects_per_second: offload.objects_per_second.0,
            max_jobs_per_pool: offload.max_jobs_per_pool.0,
            max_jobs_per_project: offload.max_jobs_per_project.0,
            max_takeovers: offload.max_takeovers.0,
            hang_limit: offload.hang_limit.0,
            dry_run: offload.dry_run.0,
        },
        jobs: Jobs { pool: jobs.pool, namespace: jobs.namespace, lease: jobs.lease.0, retention: jobs.retention.0 },
        cinder: Cinder { integration: cinder.integration.0 },
        nova: Nova { integration: nova.integration.0, pool: nova.pool, image_name: nova.image_name },
        backends,
        metrics: Metrics { listen: metrics.listen.0 },
    })
}

struct Checker<'a> {
    written: Written,
    /// What is missing is missing here.
    main: &'a Path,
    report: Report,
}

impl Checker<'_> {
    /// One section, with its defaults.
    fn fragment<T: DeserializeOwned>(&mut self, section: &str) -> Option<T> {
        let mut table = config::Map::new();
        for key in keys::of_section(section) {
            let written = self.written.get(section, key.name);
            let text = match written {
                Some(value) if !value.text.is_empty() || matches!(key.kind, Kind::Listen) => value.text.as_str(),
                _ if key.default.is_empty() => continue,
                _ => key.default,
            };
            let origin = written.map(|value| value.origin.to_string());
            table.insert(key.name.to_owned(), config::Value::new(origin.as_ref(), text));
        }
        let table = config::Value::new(None, table);
        match serde_path_to_error::deserialize(table) {
            Ok(fragment) => Some(fragment),
            // Every value has been accepted, so this is the table of keys against the fragment. The cause is left out:
            // it may hold the value.
            Err(wrong) => {
                let key = wrong.path().to_string();
                let problem = Problem::at(self.origin(section, &key), "cannot be understood");
                self.report.add(problem.section(section).key(&key));
                None
            }
        }
    }

    fn messaging(&mut self, fragment: fragments::Messaging, transport_url: TransportUrlCheck<'_>) -> Option<Messaging> {
        let queue = &fragment.queue;
        let topics = fragment.topics.0.iter().map(String::as_str).chain(COMMON_TOPICS.iter().copied());
        for topic in topics {
            let priority = queue.strip_prefix(topic).and_then(|rest| rest.strip_prefix('.'));
            if priority.is_some_and(|priority| PRIORITIES.contains(&priority)) {
                let says = "other services consume this queue, and would lose what rbd-offload takes from it: \
                            name one of its own, such as rbd-offload";
                let origin = self.origin("messaging", "queue");
                self.report.add(Problem::at(origin, says).section("messaging").key("queue").value(queue));
                break;
            }
        }
        let url = self.required("messaging", "transport_url", fragment.transport_url)?.0;
        if let Err(says) = transport_url(url.expose_secret()) {
            let origin = self.origin("messaging", "transport_url");
            self.report.add(Problem::at(origin, says).section("messaging").key("transport_url"));
        }
        Some(Messaging {
            transport_url: url,
            queue: fragment.queue,
            queue_type: fragment.queue_type,
            exchanges: fragment.exchanges.0,
            topics: fragment.topics.0,
            prefetch: fragment.prefetch.0,
            ssl_ca_file: fragment.ssl_ca_file,
        })
    }

    fn keystone(&mut self, mut fragment: fragments::Keystone) -> Option<Keystone> {
        let credentials = self.credentials(&mut fragment);
        let auth_url = self.required("keystone", "auth_url", fragment.auth_url);
        Some(Keystone {
            auth_url: auth_url?,
            credentials: credentials?,
            region_name: fragment.region_name,
            interface: fragment.interface,
            cafile: fragment.cafile,
            proxy: fragment.proxy,
            timeout: fragment.timeout.0,
        })
    }

    /// The one way to log in that is written down.
    fn credentials(&mut self, fragment: &mut fragments::Keystone) -> Option<Credentials> {
        let password = self.given(Need::Password);
        let application = self.given(Need::ApplicationCredential);
        // Something is written down and was refused: that has been said.
        let refused = self.report.problems().iter().any(|problem| {
            let key = problem.key.as_deref().unwrap_or_default();
            problem.section.as_deref() == Some("keystone")
                && keys::of_section("keystone").any(|known| {
                    known.name == key && matches!(known.need, Need::Password | Need::ApplicationCredential)
                })
        });
        match (password.is_empty(), application.is_empty()) {
            (true, true) => {
                if !refused {
                    let says = "no way to log in: needs username, password and project_name, \
                                or application_credential_id and application_credential_secret";
                    let origin = Origin::File { path: self.main.to_path_buf(), line: 0 };
                    self.report.add(Problem::at(origin, says).section("keystone"));
                }
                None
            }
            (false, false) => {
                let says =
                    format!("two ways to log in: take out {}, or {}", password.join(", "), application.join(", "));
                let origin = self.origin("keystone", application.first().copied().unwrap_or_default());
                self.report.add(Problem::at(origin, says).section("keystone"));
                None
            }
            (false, true) => {
                let username = self.required("keystone", "username", fragment.username.take());
                let password = self.required("keystone", "password", fragment.password.take());
                let project_name = self.required("keystone", "project_name", fragment.project_name.take());
                Some(Credentials::Password {
                    username: username?,
                    password: password?.0,
                    project_name: project_name?,
                    user_domain_name: fragment.user_domain_name.clone(),
                    project_domain_name: fragment.project_domain_name.clone(),
                })
            }
            (true, false) => {
                let id = fragment.application_credential_id.take();
                let id = self.required("keystone", "application_credential_id", id);
                let secret: Option<Secret> = fragment.application_credential_secret.take();
                let secret = self.required("keystone", "application_credential_secret", secret);
                Some(Credentials::Application { id: id?, secret: secret?.0 })
            }
        }
    }

    fn backends(&mut self, glance_pool: &str) -> BTreeMap<String, Backend> {
        let names: Vec<String> = self.written.backends().map(str::to_owned).collect();
        // One whose name was refused has been reported.
        let begun = self.report.problems().iter().filter_map(|problem| problem.section.as_deref());
        if names.is_empty() && !begun.into_iter().any(|section| section.starts_with(BACKEND_PREFIX)) {
            let says = "needs at least one [backend:NAME], with NAME as in Cinder's enabled_backends";
            self.report.add(Problem::at(Origin::File { path: self.main.to_path_buf(), line: 0 }, says));
        }
        let mut backends = BTreeMap::new();
        for name in names {
            if let Some(fragment) = self.fragment::<fragments::Backend>(&format!("{BACKEND_PREFIX}{name}")) {
                let backend = Backend {
                    pool: fragment.pool,
                    image_name: fragment.image_name,
                    dest_pool: fragment.dest_pool.unwrap_or_else(|| glance_pool.to_owned()),
                    method: fragment.method,
                    anchor: fragment.anchor.0,
                };
                backends.insert(name, backend);
            }
        }
        backends
    }

    /// A value that there must be; if there is none and nothing else was said about it, that is a problem.
    fn required<T>(&mut self, section: &str, name: &str, value: Option<T>) -> Option<T> {
        let said =
            |problem: &Problem| problem.section.as_deref() == Some(section) && problem.key.as_deref() == Some(name);
        if value.is_none() && !self.report.problems().iter().any(said) {
            let key = keys::of_section(section).find(|key| key.name == name);
            let allowed = key.map(|key| key.allowed()).unwrap_or_default();
            let says = match key.map(|key| key.need) {
                Some(Need::Password) => {
                    "missing: to log in with a password takes username, password and project_name".to_owned()
                }
                Some(Need::ApplicationCredential) => "missing: to log in with an application credential takes \
                                                      application_credential_id and application_credential_secret"
                    .to_owned(),
                _ => format!("required: {allowed}"),
            };
            let origin = self.origin(section, name);
            self.report.add(Problem::at(origin, says).section(section).key(name));
        }
        value
    }

    /// The keys of one way to log in that have a value.
    fn given(&self, need: Need) -> Vec<&'static str> {
        keys::of_section("keystone")
            .filter(|key| key.need == need)
            .filter(|key| self.written.get("keystone", key.name).is_some_and(|value| !value.text.is_empty()))
            .map(|key| key.name)
            .collect()
    }

    /// Where a key was written; the main file when it was not.
    fn origin(&self, section: &str, key: &str) -> Origin {
        match self.written.get(section, key) {
            Some(value) => value.origin.clone(),
            None => Origin::File { path: self.main.to_path_buf(), line: 0 },
        }
    }
}
