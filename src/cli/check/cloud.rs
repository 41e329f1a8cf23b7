//! Keystone, Glance, Cinder and Nova.

use std::collections::BTreeSet;

use jiff::{SignedDuration, Timestamp};
use tokio::time::{Instant, sleep, timeout};
use uuid::Uuid;

use super::report::{CheckResult, Verdict};
use super::{LIMIT, NO_ANSWER, PAUSE, within};
use crate::config::{Config, Credentials, Keystone, Register};
use crate::openstack::{self, Cloud, ErrorKind, Session};

/// What the daemon's token must carry, and what for.
const ROLES: [(&str, &str); 2] = [
    ("service", "Glance takes locations only from it"),
    ("admin", "images and volumes of all projects are seen with it"),
];

/// Clocks that differ by more make logs and leases hard to read, and tokens fail.
const SKEW: SignedDuration = SignedDuration::from_secs(30);

const NO_ID: &str = "00000000-0000-0000-0000-000000000000";

pub struct CloudFindings {
    pub rows: Vec<CheckResult>,
    /// What Glance tells of its stores; `None` when it was not asked or did not answer.
    pub stores: Option<Vec<openstack::GlanceStore>>,
    /// Which cloud this is; `None` without a login.
    pub cloud: Option<openstack::CloudId>,
}

pub async fn check(config: &Config) -> CloudFindings {
    let session = match Session::connect(&config.keystone, &config.glance) {
        Ok(session) => session,
        Err(error) => {
            return without_login(config, CheckResult::fault("Keystone", error.to_string(), "fix [keystone]"));
        }
    };
    let (login, clock) = tokio::join!(login(config, &session), clock(&session));
    if !login.passed() {
        let mut findings = without_login(config, login);
        findings.rows.insert(1, clock);
        return findings;
    }
    let (roles, glance, location_api, status, (stores_row, stores), cinder, backends, nova) = tokio::join!(
        roles(config, &session),
        glance(&session),
        location_api(config, &session),
        status(&session),
        stores(&session),
        cinder(&session),
        backends(config, &session),
        nova(config, &session),
    );
    let mut rows = vec![login, clock, roles, glance, location_api, status];
    rows.extend(stores_row);
    rows.extend([cinder, backends]);
    rows.extend(nova);
    CloudFindings { rows, stores, cloud: session.cloud().await.ok() }
}

fn without_login(config: &Config, login: CheckResult) -> CloudFindings {
    let mut names =
        vec!["Keystone roles", "Glance", "Glance location API", "Glance status", "Cinder", "Cinder backends"];
    if config.nova.integration {
        names.push("Nova");
    }
    let mut rows = vec![login];
    rows.extend(names.into_iter().map(|name| CheckResult::skipped(name, "no login at Keystone")));
    CloudFindings { rows, stores: None, cloud: None }
}

/// Who we are, for commands that an operator may copy.
fn user(keystone: &Keystone) -> String {
    match &keystone.credentials {
        Credentials::Password { username, .. } => format!("user {username}"),
        Credentials::Application { id, .. } => format!("application credential {id}"),
    }
}

async fn login(config: &Config, session: &Session) -> CheckResult {
    const NAME: &str = "Keystone";
    let keystone = &config.keystone;
    let unreachable =
        format!("see whether auth_url in [keystone] is right ({}) and the service runs", keystone.auth_url);
    within(NAME, &unreachable, async || match session.login().await {
        Ok(()) => CheckResult::ok(NAME, format!("{}, {}", keystone.auth_url, user(keystone))),
        Err(error) if error.kind() == ErrorKind::Unauthorized => CheckResult::fault(
            NAME,
            format!("{} was refused: wrong password, user, project or domain ({error})", user(keystone)),
            "fix [keystone]; `openstack token issue` with the same values tries them",
        ),
        Err(error) if error.kind() == ErrorKind::Misconfigured => {
            CheckResult::fault(NAME, error.to_string(), "fix [keystone]; `openstack catalog list` shows the regions")
        }
        Err(error) => CheckResult::fault(NAME, error.to_string(), &unreachable).transient_if(may_pass(&error)),
    })
    .await
}

/// By Keystone's host, which is one of the controllers.
async fn clock(session: &Session) -> CheckResult {
    const NAME: &str = "clock";
    let time = async || {
        let before = Timestamp::now();
        let theirs = match session.identity_time().await {
            Ok(Some(theirs)) => theirs,
            Ok(None) => return CheckResult::ok(NAME, "Keystone does not tell the time"),
            Err(error) => {
                return CheckResult::skipped(NAME, format!("Keystone was not asked: {error}"))
                    .transient_if(may_pass(&error));
            }
        };
        // Their header has whole seconds, and the answer took a while.
        let skew =
            if theirs < before { theirs.duration_since(before) } else { theirs.duration_since(Timestamp::now()) };
        judge_clock(NAME, skew)
    };
    match within(NAME, "", time).await {
        // the row of Keystone has the fault
        row if row.detail.starts_with(super::NO_ANSWER) => CheckResult::skipped(NAME, "Keystone did not answer"),
        row => row,
    }
}

/// `skew`: how far Keystone's clock is ahead.
fn judge_clock(name: &str, skew: SignedDuration) -> CheckResult {
    if skew.abs() <= SKEW {
        return CheckResult::ok(name, "as Keystone's");
    }
    let direction = if skew.is_negative() { "ahead of" } else { "behind" };
    CheckResult::fault(
        name,
        format!("this host's clock is {} s {direction} Keystone's", skew.abs().as_secs()),
        "set up time synchronisation on all controllers: `timedatectl`, `chronyc tracking`",
    )
}

async fn roles(config: &Config, session: &Session) -> CheckResult {
    const NAME: &str = "Keystone roles";
    within(NAME, "try again", async || match session.roles().await {
        Ok(roles) => judge_roles(NAME, &config.keystone, &roles),
        Err(error) => CheckResult::fault(NAME, error.to_string(), "try again").transient_if(may_pass(&error)),
    })
    .await
}

fn judge_roles(name: &str, keystone: &Keystone, roles: &[String]) -> CheckResult {
    let missing: Vec<_> =
        ROLES.into_iter().filter(|(role, _)| !roles.iter().any(|have| have.eq_ignore_ascii_case(role))).collect();
    if missing.is_empty() {
        return CheckResult::ok(name, "service, admin");
    }
    let reasons: Vec<String> = missing.iter().map(|(role, why)| format!("{role} ({why})")).collect();
    let names: Vec<&str> = missing.iter().map(|(role, _)| *role).collect();
    let remedy = match &keystone.credentials {
        Credentials::Password { username, project_name, user_domain_name, project_domain_name, .. } => {
            let commands: Vec<String> = names
                .iter()
                .map(|role| {
                    format!(
                        "openstack role add --user {username} --user-domain {user_domain_name} --project {project_name} \
                         --project-domain {project_domain_name} {role}"
                    )
                })
                .collect();
            commands.join("; ")
        }
        Credentials::Application { .. } => format!(
            "give the credential's user the roles with `openstack role add … {}`, then create the application credential again \
             with --role service --role admin",
            names.join(" and ")
        ),
    };
    let roles = if names.len() == 1 { "role" } else { "roles" };
    CheckResult::fault(name, format!("{} lacks the {roles} {}", user(keystone), reasons.join(" and ")), remedy)
}

/// A service's refusal, with what an operator can do about it.
fn failed(name: &str, service: &str, error: &openstack::Error) -> CheckResult {
    let remedy = match error.kind() {
        ErrorKind::Forbidden | ErrorKind::Unauthorized => format!("see the roles above, and {service}'s policy"),
        ErrorKind::NoService => format!(
            "see `openstack catalog list`: region_name and interface in [keystone] must name an endpoint of {service}"
        ),
        ErrorKind::Unavailable => format!("see whether {service} runs, and its log"),
        _ => format!("see {service}'s log"),
    };
    CheckResult::fault(name, error.to_string(), remedy).transient_if(may_pass(error))
}

/// 5xx, 429, a refused connection, a timeout: the service may have just started. Credentials, roles and the catalog do
/// not change by waiting.
fn may_pass(error: &openstack::Error) -> bool {
    error.kind() == ErrorKind::Unavailable
}

async fn glance(session: &Session) -> CheckResult {
    const NAME: &str = "Glance";
    within(NAME, "see whether Glance runs, and its log", async || match session.probe_image().await {
        Ok(()) => CheckResult::ok(NAME, "answers"),
        Err(error) => failed(NAME, "Glance", &error),
    })
    .await
}

async fn location_api(config: &Config, session: &Session) -> CheckResult {
    const NAME: &str = "Glance location API";
    within(NAME, "see whether Glance runs, and its log", async || match session.has_location_api().await {
        Ok(there) => judge_location_api(NAME, config.glance.register, there),
        Err(error) => failed(NAME, "Glance", &error),
    })
    .await
}

fn judge_location_api(name: &str, register: Register, there: bool) -> CheckResult {
    const PATCH: &str = "set show_multiple_locations = True in the [DEFAULT] of a glance-api that only services reach";
    match (register, there) {
        (Register::Auto | Register::LocationsApi, true) => CheckResult::ok(name, "there, and used"),
        (Register::Auto, false) => CheckResult::warning(
            name,
            "off: this Glance has none (it came with 2024.2); locations are set by PATCH",
            PATCH,
        ),
        (Register::LocationsApi, false) => CheckResult::fault(
            name,
            "off: this Glance has none (it came with 2024.2), and register = locations-api asks for it",
            "set register = auto or patch in [glance], or upgrade Glance",
        ),
        (Register::Patch, true) => CheckResult::warning(
            name,
            "there, but not used: register = patch, which works only with show_multiple_locations = True",
            "set register = auto in [glance]",
        ),
        (Register::Patch, false) => CheckResult::warning(name, "not used: register = patch", PATCH),
    }
}

/// Whether property protections leave tenants without the status of their requests.
async fn status(session: &Session) -> CheckResult {
    const NAME: &str = "Glance status";
    let id = Uuid::new_v4().to_string();
    let row = within(NAME, "see whether Glance runs, and its log", async || {
        match session.may_write_property(&id, "rbd_offload_status").await {
            Ok(Some(true)) => CheckResult::ok(NAME, "can be written on image records"),
            Ok(Some(false)) => CheckResult::warning(
                NAME,
                "cannot be written: Glance protects rbd_offload_status; requests are done, and tenants see no status",
                "let the roles of the daemon's user create, update and delete ^rbd_offload_.* in the file that \
                 property_protection_file in glance-api.conf names",
            ),
            Ok(None) => CheckResult::skipped(NAME, "this user may not create an image record to try it on"),
            Err(error) => failed(NAME, "Glance", &error),
        }
    })
    .await;
    // a request whose answer did not come may still be carried out
    let may_come_late = row.verdict == Verdict::Fault;
    let why = match timeout(LIMIT, delete_record(session, &id, may_come_late)).await {
        Ok(Ok(())) => return row,
        Ok(Err(error)) => error.to_string(),
        Err(_) => format!("{NO_ANSWER} {} s", LIMIT.as_secs()),
    };
    CheckResult::fault(
        NAME,
        format!("{}; and the record that it was tried on was not deleted: {why}", row.detail),
        format!("if there is one, delete it: `openstack image delete {id}`"),
    )
}

/// Deletes a record that a check has created or may have. `may_come_late`: one that is not there yet is waited for.
async fn delete_record(session: &Session, id: &str, may_come_late: bool) -> openstack::Result<()> {
    let begun = Instant::now();
    while !session.delete_probe_image(id).await? && may_come_late && begun.elapsed() + PAUSE < LIMIT {
        sleep(PAUSE).await;
    }
    Ok(())
}

/// The stores of Glance, which are compared with Ceph's fsid later. A row only if Glance did not answer.
async fn stores(session: &Session) -> (Option<CheckResult>, Option<Vec<openstack::GlanceStore>>) {
    const NAME: &str = "Glance stores asked";
    let mut stores = None;
    let row = within(NAME, "see whether Glance runs, and its log", async || match session.stores().await {
        Ok(found) => {
            stores = Some(found);
            CheckResult::ok(NAME, "")
        }
        Err(error) => failed(NAME, "Glance", &error),
    })
    .await;
    (stores.is_none().then_some(row), stores)
}

async fn cinder(session: &Session) -> CheckResult {
    const NAME: &str = "Cinder";
    within(NAME, "see whether cinder-api runs, and its log", async || {
        match tokio::try_join!(session.probe_volume(), session.probe_volume_types()) {
            Ok(_) => CheckResult::ok(NAME, "answers"),
            Err(error) => failed(NAME, "Cinder", &error),
        }
    })
    .await
}

async fn backends(config: &Config, session: &Session) -> CheckResult {
    const NAME: &str = "Cinder backends";
    within(NAME, "see whether cinder-api runs, and its log", async || {
        match tokio::try_join!(session.volume_backends(), session.other_backends()) {
            // backends that are not on Ceph need no section
            Ok((mut hosts, others)) => {
                hosts.retain(|host| !others.contains(host));
                judge_backends(NAME, config, &hosts)
            }
            Err(error) => failed(NAME, "Cinder", &error),
        }
    })
    .await
}

/// `hosts`: `node@backend`.
fn judge_backends(name: &str, config: &Config, hosts: &[String]) -> CheckResult {
    let running: BTreeSet<&str> = hosts.iter().filter_map(|host| Some(host.rsplit_once('@')?.1)).collect();
    let configured: BTreeSet<&str> = config.backends.keys().map(String::as_str).collect();
    let listed = |names: Vec<&str>| names.join(", ");
    let unknown: Vec<&str> = configured.difference(&running).copied().collect();
    let unserved: Vec<&str> = running.difference(&configured).copied().collect();
    let (mut reasons, mut remedies) = (Vec::new(), Vec::new());
    let is_each_section_known = unknown.is_empty();
    if !unserved.is_empty() {
        reasons.push(format!("Cinder has backends without a section: {}", listed(unserved.clone())));
        let sections: Vec<String> = unserved.iter().map(|name| format!("[backend:{name}]")).collect();
        remedies.push(format!("add {} with its pool (rbd_pool in cinder.conf)", sections.join(", ")));
    }
    if !unknown.is_empty() {
        reasons.push(format!("Cinder has no backend {}", listed(unknown)));
        remedies.push(match running.is_empty() {
            true => "see `openstack volume service list`".to_owned(),
            false => format!(
                "name the sections like enabled_backends in cinder.conf; it has {}",
                listed(running.into_iter().collect())
            ),
        });
    }
    if reasons.is_empty() {
        return CheckResult::ok(name, listed(configured.into_iter().collect()));
    }
    let (reasons, remedies) = (reasons.join("; "), remedies.join("; "));
    // another deployment may have the others, in its own cluster
    if is_each_section_known && !config.offload.decline_after.is_zero() {
        return CheckResult::warning(name, reasons, format!("{remedies}; or leave them to another deployment"));
    }
    CheckResult::fault(name, reasons, remedies)
}

/// Only asked where something depends on it.
async fn nova(config: &Config, session: &Session) -> Option<CheckResult> {
    const NAME: &str = "Nova";
    if !config.nova.integration {
        return None;
    }
    let row = within(NAME, "see whether nova-api runs, and its log", async || match session.server(NO_ID).await {
        Ok(_) => CheckResult::ok(NAME, "answers"),
        Err(error) => failed(NAME, "Nova", &error),
    });
    Some(row.await)
}

#[cfg(test)]
mod tests {
    use super::super::report::Verdict;
    use super::*;

    fn config() -> Config {
        let text = "[messaging]\ntransport_url = rabbit://h/\n[keystone]\nauth_url = http://k:5000/v3\nusername = offload\n\
                    password = p\nproject_name = service\n[backend:a]\npool = a\n[backend:b]\npool = b\n";
        Config::parse("test".as_ref(), text).unwrap()
    }

    #[test]
    fn a_missing_role_is_named_with_the_command_that_adds_it() {
        let keystone = config().keystone;
        let classify = |roles: &[&str]| {
            judge_roles("roles", &keystone, &roles.iter().map(ToString::to_string).collect::<Vec<_>>())
        };
        assert_eq!(classify(&["admin", "Service", "x"]).verdict, Verdict::Ok);
        let row = classify(&["admin"]);
        assert!(row.detail.starts_with("user offload lacks the role service ("), "{row:?}");
        assert_eq!(
            row.remedy.as_deref(),
            Some(
                "openstack role add --user offload --user-domain Default --project service --project-domain Default service"
            )
        );
        assert!(classify(&[]).detail.contains("the roles service"), "{row:?}");
    }

    #[test]
    fn sections_and_backends_are_compared() {
        let mut config = config();
        let classify =
            |hosts: &[&str]| judge_backends("b", &config, &hosts.iter().map(ToString::to_string).collect::<Vec<_>>());
        assert_eq!(classify(&["n1@a", "n1@b", "n2@a"]).verdict, Verdict::Ok);
        let row = classify(&["n1@a", "n1@b", "n1@lvm"]);
        assert_eq!(row.detail, "Cinder has backends without a section: lvm");
        assert!(row.remedy.unwrap().contains("[backend:lvm]"));
        assert_eq!(classify(&["n1@a"]).detail, "Cinder has no backend b");
        config.offload.decline_after = std::time::Duration::from_secs(300);
        let row = judge_backends("b", &config, &["n1@a".into(), "n1@b".into(), "east@x".into()]);
        assert_eq!((row.verdict, row.detail.as_str()), (Verdict::Warning, "Cinder has backends without a section: x"));
        assert_eq!(judge_backends("b", &config, &["n1@a".into(), "n1@x".into()]).verdict, Verdict::Fault);
    }

    #[test]
    fn a_small_clock_skew_is_no_fault() {
        assert_eq!(judge_clock("c", SignedDuration::from_secs(-30)).verdict, Verdict::Ok);
        assert_eq!(
            judge_clock("c", SignedDuration::from_secs(-95)).detail,
            "this host's clock is 95 s ahead of Keystone's"
        );
        assert_eq!(
            judge_clock("c", SignedDuration::from_secs(95)).detail,
            "this host's clock is 95 s behind Keystone's"
        );
    }

    #[test]
    fn the_way_to_register_a_location_is_reported() {
        assert_eq!(judge_location_api("l", Register::Auto, true).verdict, Verdict::Ok);
        assert_eq!(judge_location_api("l", Register::Auto, false).verdict, Verdict::Warning);
        assert_eq!(judge_location_api("l", Register::LocationsApi, false).verdict, Verdict::Fault);
    }
}
