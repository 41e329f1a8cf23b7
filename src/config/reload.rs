//! What a running daemon can take over from a configuration that was read again, and what needs a restart.

use super::sections::{KeystoneKeys, Section as _};
use super::{Backend, Config, Credentials, Keystone};

impl Config {
    /// The keys, as `[section] key`, whose values in `new` differ and count only after a restart. Never a value.
    pub fn restart_needed(&self, new: &Config) -> Vec<String> {
        let changed = [
            self.messaging.changed(&new.messaging),
            self.keystone.keys().changed(&new.keystone.keys()),
            self.glance.changed(&new.glance),
            self.ceph.changed(&new.ceph),
            self.jobs.changed(&new.jobs),
            self.metrics.changed(&new.metrics),
        ];
        changed.concat().into_iter().map(|key| format!("[{}] {}", key.section, key.name)).collect()
    }

    /// This configuration with what a running daemon takes over from `new`: `[DEFAULT]`, `[offload]`, `[cinder]`,
    /// `[nova]` and `[backend:…]`. A backend whose images go to Glance's pool keeps to the pool that Glance has now,
    /// until the restart that a change of `[glance] pool` needs.
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

impl Keystone {
    /// Its keys, as a file would set them. With an application credential the domains have their default, so that
    /// another way to log in is no change of theirs.
    fn keys(&self) -> KeystoneKeys {
        let mut keys = KeystoneKeys {
            auth_url: self.auth_url.clone(),
            username: None,
            password: None,
            project_name: None,
            user_domain_name: "Default".to_owned(),
            project_domain_name: "Default".to_owned(),
            application_credential_id: None,
            application_credential_secret: None,
            region_name: self.region_name.clone(),
            interface: self.interface,
            cafile: self.cafile.clone(),
            proxy: self.proxy.clone(),
            timeout: self.timeout,
        };
        match self.credentials.clone() {
            Credentials::Password { username, password, project_name, user_domain_name, project_domain_name } => {
                keys.username = Some(username);
                keys.password = Some(password);
                keys.project_name = Some(project_name);
                keys.user_domain_name = user_domain_name;
                keys.project_domain_name = project_domain_name;
            }
            Credentials::Application { id, secret } => {
                keys.application_credential_id = Some(id);
                keys.application_credential_secret = Some(secret);
            }
        }
        keys
    }
}
