//! What a running daemon can take over from a configuration that was read again, and what needs a restart.

use secrecy::{ExposeSecret as _, SecretString};

use super::{Backend, Config, Credentials};

impl Config {
    /// The keys, as `[section] key`, whose values in `new` differ and count only after a restart. Never a value.
    pub fn restart_needed(&self, new: &Config) -> Vec<String> {
        let mut needed = Vec::new();
        let mut look = |section: &str, key: &str, same: bool| {
            if !same {
                needed.push(format!("[{section}] {key}"));
            }
        };

        let (a, b) = (&self.messaging, &new.messaging);
        look("messaging", "transport_url", is_same(&a.transport_url, &b.transport_url));
        look("messaging", "queue", a.queue == b.queue);
        look("messaging", "queue_type", a.queue_type == b.queue_type);
        look("messaging", "exchanges", a.exchanges == b.exchanges);
        look("messaging", "topics", a.topics == b.topics);
        look("messaging", "prefetch", a.prefetch == b.prefetch);
        look("messaging", "ssl_ca_file", a.ssl_ca_file == b.ssl_ca_file);

        let (a, b) = (&self.keystone, &new.keystone);
        look("keystone", "auth_url", a.auth_url == b.auth_url);
        for (before, after) in login(&a.credentials).into_iter().zip(login(&b.credentials)) {
            // The domains have defaults: with the other way to log in they are not a change of anybody's.
            let only_default = before.0.ends_with("_domain_name") && (before.1.is_none() || after.1.is_none());
            look("keystone", before.0, only_default || before.1 == after.1);
        }
        look("keystone", "region_name", a.region_name == b.region_name);
        look("keystone", "interface", a.interface == b.interface);
        look("keystone", "cafile", a.cafile == b.cafile);
        look("keystone", "proxy", a.proxy == b.proxy);
        look("keystone", "timeout", a.timeout == b.timeout);

        let (a, b) = (&self.glance, &new.glance);
        look("glance", "pool", a.pool == b.pool);
        look("glance", "endpoint_override", a.endpoint_override == b.endpoint_override);
        look("glance", "register", a.register == b.register);

        look("ceph", "conf", self.ceph.conf == new.ceph.conf);
        look("ceph", "user", self.ceph.user == new.ceph.user);

        let (a, b) = (&self.jobs, &new.jobs);
        look("jobs", "pool", a.pool == b.pool);
        look("jobs", "namespace", a.namespace == b.namespace);
        look("jobs", "lease", a.lease == b.lease);
        look("jobs", "retention", a.retention == b.retention);

        look("metrics", "listen", self.metrics.listen == new.metrics.listen);
        needed
    }

    /// This configuration with what a running daemon takes over from `new`: `[DEFAULT]`, `[offload]`, `[cinder]`,
    /// `[nova]` and `[backend:…]`. A backend whose images go to Glance's pool keeps to the pool that Glance has now, until
    /// the restart that a change of `[glance] pool` needs.
    pub fn reloaded(&self, new: &Config) -> Config {
        let backends = new.backends.iter().map(|(name, backend)| {
            let dest_pool = if backend.dest_pool == new.glance.pool { &self.glance.pool } else { &backend.dest_pool };
            (name.clone(), Backend { dest_pool: dest_pool.clone(), ..backend.clone() })
        });
        Config {
            log: new.log.clone(),
            offload: new.offload.clone(),
            cinder: new.cinder.clone(),
            nova: new.nova.clone(),
            backends: backends.collect(),
            ..self.clone()
        }
    }
}

fn is_same(a: &SecretString, b: &SecretString) -> bool {
    a.expose_secret() == b.expose_secret()
}

/// The keys of both ways to log in, always in this order, with the values of the one that is used.
fn login(credentials: &Credentials) -> [(&'static str, Option<&str>); 7] {
    let mut keys = [
        ("username", None),
        ("password", None),
        ("project_name", None),
        ("user_domain_name", None),
        ("project_domain_name", None),
        ("application_credential_id", None),
        ("application_credential_secret", None),
    ];
    let values = match credentials {
        Credentials::Password { username, password, project_name, user_domain_name, project_domain_name } => [
            Some(username.as_str()),
            Some(password.expose_secret()),
            Some(project_name.as_str()),
            Some(user_domain_name.as_str()),
            Some(project_domain_name.as_str()),
            None,
            None,
        ],
        Credentials::Application { id, secret } => {
            [None, None, None, None, None, Some(id.as_str()), Some(secret.expose_secret())]
        }
    };
    for (key, value) in keys.iter_mut().zip(values) {
        key.1 = value;
    }
    keys
}
