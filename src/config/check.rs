//! `RawConfig` → `Config`: puts defaults under what was written, and checks what no key can say alone.

use std::collections::BTreeMap;
use std::path::Path;

use secrecy::ExposeSecret as _;

use super::keys::{self, BACKEND_PREFIX, Key, Kind, Need};
use super::read::RawConfig;
use super::report::{Error, Origin, Problem, Report};
use super::sections::{KeystoneKeys, Section, Setting};
use super::{Backend, Config, Credentials, Glance, Keystone, Messaging, TransportUrlCheck};

/// oslo.messaging's priorities; publishers declare a queue `<topic>.<priority>` for each, and other services consume
/// it.
const PRIORITIES: &[&str] = &["audit", "debug", "info", "warn", "error", "critical", "sample"];

/// Topics whose queues are others' whether we listen to them or not.
const COMMON_TOPICS: &[&str] = &["notifications", "versioned_notifications"];

/// The whole configuration, or everything in `report` and all that is found here.
pub fn check(
    written: RawConfig,
    main: &Path,
    transport_url: TransportUrlCheck<'_>,
    report: Report,
) -> Result<Config, Error> {
    let mut checker = Checker { written, main, report };
    let config = checker.config(transport_url);
    match config {
        Some(config) if checker.report.is_empty() => Ok(config),
        _ => Err(Error::Wrong(checker.report)),
    }
}

struct Checker<'a> {
    written: RawConfig,
    /// What is missing is missing here.
    main: &'a Path,
    report: Report,
}

/// Reads the values of one section.
pub struct Reader<'a, 'c> {
    checker: &'a mut Checker<'c>,
    section: &'a str,
    /// Defaults that other sections give, by key.
    defaults: &'a [(&'a str, &'a str)],
}

impl Reader<'_, '_> {
    pub fn value<T: Setting>(&mut self, key: &'static Key) -> Option<T> {
        let default = self.defaults.iter().find(|(name, _)| *name == key.name).map_or(key.default, |(_, text)| *text);
        let written = self.checker.written.get(self.section, key.name);
        let text = match written.map(|value| value.text.as_str()) {
            Some("") if matches!(key.kind, Kind::Listen) => "",
            None | Some("") => default,
            Some(text) => text,
        };
        let value = if text.is_empty() { T::unset() } else { T::from_text(key.kind, text) };
        if value.is_none() {
            // Every text has been accepted, so the key's type does not fit its kind. The text may be a secret.
            let problem = Problem::at(self.checker.origin(self.section, key.name), "cannot be understood");
            self.checker.report.add(problem.section(self.section).key(key.name));
        } else if text.is_empty() && key.need == Need::Required {
            self.checker.missing(key);
        }
        value
    }
}

impl Checker<'_> {
    /// `None` where a section cannot be read; whether all of it is right is in the report.
    fn config(&mut self, transport_url: TransportUrlCheck<'_>) -> Option<Config> {
        let log = self.section("DEFAULT");
        let messaging = self.messaging(transport_url);
        let keystone = self.keystone();
        let glance = self.section::<Glance>("glance");
        let ceph = self.section("ceph");
        let offload = self.section("offload");
        let jobs = self.section("jobs");
        let cinder = self.section("cinder");
        let nova = self.section("nova");
        let metrics = self.section("metrics");
        let glance = glance?;
        let backends = self.backends(&glance.pool);
        Some(Config {
            log: log?,
            messaging: messaging?,
            keystone: keystone?,
            glance,
            ceph: ceph?,
            offload: offload?,
            jobs: jobs?,
            cinder: cinder?,
            nova: nova?,
            metrics: metrics?,
            backends,
        })
    }

    /// One section, with its defaults.
    fn section<T: Section>(&mut self, section: &str) -> Option<T> {
        T::read(&mut Reader { checker: self, section, defaults: &[] })
    }

    fn messaging(&mut self, transport_url: TransportUrlCheck<'_>) -> Option<Messaging> {
        let messaging: Messaging = self.section("messaging")?;
        let queue = &messaging.queue;
        let topics = messaging.topics.iter().map(String::as_str).chain(COMMON_TOPICS.iter().copied());
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
        let url = messaging.transport_url.expose_secret();
        if !url.is_empty()
            && let Err(says) = transport_url(url)
        {
            let origin = self.origin("messaging", "transport_url");
            self.report.add(Problem::at(origin, says).section("messaging").key("transport_url"));
        }
        Some(messaging)
    }

    fn keystone(&mut self) -> Option<Keystone> {
        let mut keys: KeystoneKeys = self.section("keystone")?;
        Some(Keystone {
            credentials: self.credentials(&mut keys)?,
            auth_url: keys.auth_url,
            region_name: keys.region_name,
            interface: keys.interface,
            cafile: keys.cafile,
            proxy: keys.proxy,
            timeout: keys.timeout,
        })
    }

    /// The one way to log in that is written down.
    fn credentials(&mut self, keys: &mut KeystoneKeys) -> Option<Credentials> {
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
                let username = self.required("username", keys.username.take());
                let password = self.required("password", keys.password.take());
                let project_name = self.required("project_name", keys.project_name.take());
                Some(Credentials::Password {
                    username: username?,
                    password: password?,
                    project_name: project_name?,
                    user_domain_name: keys.user_domain_name.clone(),
                    project_domain_name: keys.project_domain_name.clone(),
                })
            }
            (true, false) => {
                let id = self.required("application_credential_id", keys.application_credential_id.take());
                let secret = self.required("application_credential_secret", keys.application_credential_secret.take());
                Some(Credentials::Application { id: id?, secret: secret? })
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
            let section = format!("{BACKEND_PREFIX}{name}");
            let defaults = [("dest_pool", glance_pool)];
            let backend = Backend::read(&mut Reader { checker: self, section: &section, defaults: &defaults });
            backends.extend(backend.map(|backend| (name, backend)));
        }
        backends
    }

    /// A value of `[keystone]` that there must be; if there is none, that is a problem.
    fn required<T>(&mut self, name: &str, value: Option<T>) -> Option<T> {
        let key = KeystoneKeys::KEYS.iter().find(|key| key.name == name);
        if let (None, Some(key)) = (&value, key) {
            self.missing(key);
        }
        value
    }

    /// Reports that a key is missing, unless something was said about it.
    fn missing(&mut self, key: &Key) {
        let Key { section, name, .. } = *key;
        let said =
            |problem: &Problem| problem.section.as_deref() == Some(section) && problem.key.as_deref() == Some(name);
        if self.report.problems().iter().any(said) {
            return;
        }
        let says = match key.need {
            Need::Password => "missing: to log in with a password takes username, password and project_name".to_owned(),
            Need::ApplicationCredential => "missing: to log in with an application credential takes \
                                            application_credential_id and application_credential_secret"
                .to_owned(),
            _ => format!("required: {}", key.allowed()),
        };
        self.report.add(Problem::at(self.origin(section, name), says).section(section).key(name));
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
