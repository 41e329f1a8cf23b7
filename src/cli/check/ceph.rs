//! Ceph: the connection, its release, and what our user may do in each pool.

use std::collections::BTreeSet;
use std::time::Duration;

use futures::future::join_all;
use uuid::Uuid;

use super::super::setup::client_options;
use super::report::{CheckResult, Verdict};
use super::within_once;
use crate::ceph::{Client, Error, ErrorKind, Finding, LockKey, Locked, OTHER_KEY, Objects, Probed, Storage};
use crate::config::Config;
use crate::job::deployment;
use crate::openstack::CloudId;

/// The oldest release that is supported: Pacific.
const OLDEST: u64 = 16;

/// How long the lock of the probe would be kept.
const LOCK: Duration = Duration::from_secs(10);

pub struct CephFindings {
    pub rows: Vec<CheckResult>,
    /// `None` without a connection.
    pub fsid: Option<String>,
    /// Which cloud the jobs belong to, if that was said yet; `None` when it could not be read.
    pub jobs_cloud: Option<Option<CloudId>>,
    /// A call was given up and still runs on a thread of its own.
    pub stuck: bool,
    /// What made the calls. `None` without a connection.
    pub client: Option<Client>,
}

fn is_stuck(row: &CheckResult) -> bool {
    row.detail.starts_with(super::NO_ANSWER)
}

pub async fn check(config: &Config) -> CephFindings {
    let mut client = None;
    let mut fsid = None;
    let row = within_once("Ceph", "see whether the monitors of mon_host in [ceph] conf can be reached", async || {
        match connect(config).await {
            Ok((connected, id)) => {
                let row = CheckResult::ok("Ceph", format!("client.{}, fsid {id}", config.ceph.user));
                (client, fsid) = (Some(connected), Some(id));
                row
            }
            // its text says what to do
            Err(error) if error.kind() == ErrorKind::Unsupported => {
                CheckResult::fault("Ceph", error.to_string(), OTHER_KEY)
            }
            // its text names what to look at
            Err(error) => CheckResult::fault(
                "Ceph",
                error.to_string(),
                "fix conf, user or keyring in [ceph], or the keyring itself",
            )
            .transient_if(may_pass(error.kind())),
        }
    })
    .await;
    let pools = pools(config);
    let Some(client) = client else {
        let mut names = vec!["Ceph release".to_owned(), "Ceph fencing".to_owned()];
        names.extend(pools.iter().map(|pool| pool_name(pool)));
        names.push(jobs_name(config));
        let skipped = names.into_iter().map(|name| CheckResult::skipped(name, "no connection to Ceph"));
        let stuck = is_stuck(&row);
        return CephFindings {
            rows: std::iter::once(row).chain(skipped).collect(),
            fsid: None,
            jobs_cloud: None,
            stuck,
            client: None,
        };
    };
    let probes = join_all(pools.iter().map(|pool| capabilities(config, &client, pool)));
    let (release, fencing, probed, instances, jobs) = tokio::join!(
        release(&client),
        fencing(config, &client),
        probes,
        instances(config, &client),
        jobs(config, &client)
    );
    let mut rows = vec![row, release, fencing];
    rows.extend(probed);
    rows.extend(instances);
    rows.push(jobs);
    let stuck = rows.iter().any(is_stuck);
    let jobs_cloud = match client.objects(&config.jobs.pool, &config.jobs.namespace) {
        Ok(objects) => tokio::time::timeout(super::LIMIT, deployment::cloud(&objects)).await.ok().and_then(Result::ok),
        Err(_) => None,
    };
    CephFindings { rows, fsid, jobs_cloud, stuck, client: Some(client) }
}

async fn connect(config: &Config) -> Result<(Client, String), Error> {
    let client = Client::open(client_options(config)).await?;
    let fsid = client.fsid().await?;
    Ok((client, fsid))
}

fn pool_name(pool: &str) -> String {
    format!("Ceph pool {pool}")
}

fn jobs_name(config: &Config) -> String {
    format!("Ceph jobs in {}/{}", config.jobs.pool, config.jobs.namespace)
}

/// The pools that images are taken from and made in, without which the configuration makes no sense.
fn pools(config: &Config) -> BTreeSet<&str> {
    let backends = config.backends.values().flat_map(|backend| [backend.pool.as_str(), backend.dest_pool.as_str()]);
    let mut pools: BTreeSet<&str> = backends.collect();
    if config.nova.integration {
        pools.insert(&config.nova.pool);
    }
    pools
}

/// The command that gives our user what it needs in all pools: `auth caps` replaces what it had. `also`: a pool that
/// the configuration does not name, `rbd_default_data_pool` for one.
fn caps(config: &Config, also: Option<&str>) -> String {
    let mut pools = pools(config);
    pools.extend([&config.jobs.pool, &config.nova.pool, &config.glance.pool].map(String::as_str));
    pools.extend(config.glance.data_pool.as_deref().into_iter().chain(also));
    let osd: Vec<String> = pools.iter().map(|pool| format!("profile rbd pool={pool}")).collect();
    format!("ceph auth caps client.{} mon 'profile rbd' mgr 'profile rbd' osd '{}'", config.ceph.user, osd.join(", "))
}

fn may_pass(kind: ErrorKind) -> bool {
    matches!(kind, ErrorKind::TimedOut | ErrorKind::Busy | ErrorKind::Conflict)
}

/// What to do about an error. `pool`: where it was met, and where the configuration names that pool.
fn remedy(config: &Config, error: &Error, (pool, pool_key): (Option<&str>, &str)) -> String {
    match error.kind() {
        ErrorKind::PermissionDenied => caps(config, pool),
        ErrorKind::NotFound if pool_key.is_empty() => {
            "create the pool that rbd_default_data_pool names, or set another one".to_owned()
        }
        ErrorKind::NotFound => format!("name the right pool with {pool_key}, or create it and `rbd pool init` it"),
        ErrorKind::Unsupported => "`ceph osd pool set POOL allow_ec_overwrites true`, or name another pool".to_owned(),
        ErrorKind::NoSpace => "add space, or raise the pool's quota".to_owned(),
        ErrorKind::Fenced => "this client was fenced: see `ceph osd blocklist ls`".to_owned(),
        _ => "see `ceph status`".to_owned(),
    }
}

async fn release(client: &Client) -> CheckResult {
    const NAME: &str = "Ceph release";
    within_once(NAME, "see `ceph status`", async || match client.osd_versions().await {
        Ok(versions) => judge_release(NAME, versions),
        Err(error) => CheckResult::fault(NAME, error.to_string(), "see `ceph versions`"),
    })
    .await
}

fn judge_release(name: &str, mut versions: Vec<String>) -> CheckResult {
    let major = |version: &str| version.split('.').next().and_then(|major| major.parse::<u64>().ok());
    versions.sort_by_key(|version| major(version));
    let listed = versions.join(", ");
    match versions.first().map(|version| major(version)) {
        Some(Some(oldest)) if oldest < OLDEST => CheckResult::fault(
            name,
            format!("too old: OSDs run {listed}"),
            format!("upgrade Ceph to {OLDEST} (Pacific) or later"),
        ),
        Some(Some(_)) => CheckResult::ok(name, listed),
        // a build of one's own, or no OSD that is up
        _ => CheckResult::warning(
            name,
            format!("not known: {listed}"),
            "see `ceph versions`: 16 (Pacific) or later is supported",
        ),
    }
}

/// A daemon that takes over a job fences the one that had it.
async fn fencing(config: &Config, client: &Client) -> CheckResult {
    const NAME: &str = "Ceph fencing";
    within_once(NAME, "see `ceph status`", async || match client.may_fence().await {
        Ok(true) => CheckResult::ok(NAME, "may fence a daemon that lost its lease"),
        Ok(false) => CheckResult::fault(NAME, "missing: mon 'profile rbd' (osd blocklist add)", caps(config, None)),
        Err(error) => CheckResult::fault(NAME, error.to_string(), "see `ceph status`"),
    })
    .await
}

/// Tries everything that the daemon does to images with a tiny one.
async fn capabilities(config: &Config, client: &Client, pool: &str) -> CheckResult {
    let name = pool_name(pool);
    let row = within_once(
        &name,
        "see `ceph status`: placement groups that are not active keep operations waiting",
        async || {
            let data_pool = config.glance.data_pool.as_deref().filter(|_| is_destination(config, pool));
            let finding = match client.probe_pool(pool, data_pool).await {
                Ok(Probed::All { data_pool }) => return placed(config, client, pool, &data_pool).await,
                Ok(Probed::Lacks(finding)) => finding,
                Err(error) => {
                    return CheckResult::fault(
                        &name,
                        error.to_string(),
                        remedy(config, &error, (None, "pool or dest_pool")),
                    )
                    .transient_if(may_pass(error.kind()));
                }
            };
            let Finding { what, pool, error } = &finding;
            let detail = match error.kind() {
                ErrorKind::PermissionDenied => {
                    format!("missing: osd 'profile rbd pool={pool}': cannot {what} ({error})")
                }
                _ => format!("cannot {what}: {error}"),
            };
            CheckResult::fault(&name, detail, remedy(config, error, (Some(pool), &used_by(config, pool))))
                .transient_if(may_pass(error.kind()))
        },
    );
    row.await
}

/// Compares where images of the daemon would have their data with where those that are there have it.
async fn placed(config: &Config, client: &Client, pool: &str, data_pool: &str) -> CheckResult {
    let name = pool_name(pool);
    let mut can = "create, snapshot, protect, clone, rename, remove".to_owned();
    if data_pool != pool {
        can.push_str(&format!("; data in {data_pool}"));
    }
    if !is_destination(config, pool) {
        return CheckResult::ok(&name, can);
    }
    match client.data_pools(pool).await {
        Ok(others) if others.is_empty() || others.contains(data_pool) => CheckResult::ok(&name, can),
        Ok(others) => {
            let others = Vec::from_iter(others).join(", ");
            CheckResult::warning(
                &name,
                format!("images here have their data in {others}; the daemon's would have it in {data_pool}"),
                format!("[glance] data_pool = {others}, if rbd_default_data_pool is that for Glance's Ceph client"),
            )
        }
        Err(error) => {
            CheckResult::fault(&name, error.to_string(), remedy(config, &error, (Some(pool), &used_by(config, pool))))
                .transient_if(may_pass(error.kind()))
        }
    }
}

/// Whether images are published in a pool.
fn is_destination(config: &Config, pool: &str) -> bool {
    config.backends.values().any(|backend| backend.dest_pool == pool)
}

/// Nova's pool where no integration needs it: a tenant may still ask for the disk of an instance.
async fn instances(config: &Config, client: &Client) -> Option<CheckResult> {
    let pool = config.nova.pool.as_str();
    if pools(config).contains(pool) {
        return None;
    }
    let row = capabilities(config, client, pool).await;
    match row {
        CheckResult { verdict: Verdict::Fault, check, detail, remedy: Some(remedy), .. }
            if !detail.starts_with(super::NO_ANSWER) =>
        {
            Some(CheckResult::warning(check, format!("instances cannot be a source: {detail}"), remedy))
        }
        row => Some(row),
    }
}

/// Where the configuration names a pool.
fn used_by(config: &Config, pool: &str) -> String {
    let mut places = Vec::new();
    if config.glance.pool == pool {
        places.push("[glance] pool".to_owned());
    }
    if config.glance.data_pool.as_deref() == Some(pool) {
        places.push("[glance] data_pool".to_owned());
    }
    for (name, backend) in &config.backends {
        if backend.pool == pool {
            places.push(format!("[backend:{name}] pool"));
        }
        if backend.dest_pool == pool && config.glance.pool != pool {
            places.push(format!("[backend:{name}] dest_pool"));
        }
    }
    if config.nova.pool == pool {
        places.push("[nova] pool".to_owned());
    }
    places.join(", ")
}

/// Tries everything that the daemon does to job records with an object of its own.
async fn jobs(config: &Config, client: &Client) -> CheckResult {
    let name = jobs_name(config);
    let row = within_once(
        &name,
        "see `ceph status`: placement groups that are not active keep operations waiting",
        async || {
            let objects = match client.objects(&config.jobs.pool, &config.jobs.namespace) {
                Ok(objects) => objects,
                Err(error) => return CheckResult::fault(&name, error.to_string(), "fix pool or namespace in [jobs]"),
            };
            let object = format!("check.{}", Uuid::new_v4());
            let probed = probe(&objects, &object).await;
            let removed = remove(&objects, &object).await.map_err(|error| ("remove an object", error));
            match probed.and(removed) {
                Ok(()) => CheckResult::ok(&name, "write, lock, omap, remove"),
                Err((what, error)) if error.kind() == ErrorKind::PermissionDenied => {
                    let pool = &config.jobs.pool;
                    CheckResult::fault(
                        &name,
                        format!("missing: osd 'profile rbd pool={pool}': cannot {what} ({error})"),
                        caps(config, None),
                    )
                }
                Err((what, error)) => CheckResult::fault(
                    &name,
                    format!("cannot {what}: {error}"),
                    remedy(config, &error, (None, "pool in [jobs]")),
                )
                .transient_if(may_pass(error.kind())),
            }
        },
    );
    row.await
}

async fn probe(objects: &dyn Objects, object: &str) -> Result<(), (&'static str, Error)> {
    let key = LockKey { name: "check".into(), cookie: Uuid::new_v4().to_string() };
    objects.create(object, b"{}").await.map_err(|e| ("write an object", e))?;
    match objects.lock(object, &key, "check", LOCK).await.map_err(|e| ("lock an object", e))? {
        Locked::Acquired => {}
        Locked::Held | Locked::NoObject => {
            return Err(("lock an object", Error::new("lock", ErrorKind::Conflict, "another client took it")));
        }
    }
    let (_, version) = objects
        .read(object)
        .await
        .map_err(|e| ("read an object", e))?
        .ok_or_else(|| ("read an object", Error::new("read", ErrorKind::NotFound, "it is gone")))?;
    objects.replace(object, b"{}", version, Some(&key)).await.map_err(|e| ("write under a lock", e))?;
    objects.unlock(object, &key).await.map_err(|e| ("unlock an object", e))?;
    objects.set_omap(object, &[("check".into(), Vec::new())]).await.map_err(|e| ("write an omap", e))?;
    objects.omap(object, "", 1).await.map_err(|e| ("read an omap", e))?;
    objects.remove_omap(object, &["check".into()]).await.map_err(|e| ("write an omap", e))
}

async fn remove(objects: &dyn Objects, object: &str) -> Result<(), Error> {
    match objects.read(object).await? {
        Some((_, version)) => objects.remove(object, version, None).await,
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_release_is_that_of_the_oldest_osd() {
        let judge = |versions: &[&str]| judge_release("r", versions.iter().map(ToString::to_string).collect());
        assert_eq!(judge(&["18.2.4", "16.2.15"]).verdict, Verdict::Ok);
        let row = judge(&["16.2.15", "9.2.1"]);
        assert_eq!((row.verdict, row.detail.as_str()), (Verdict::Fault, "too old: OSDs run 9.2.1, 16.2.15"));
        assert_eq!(judge(&[]).verdict, Verdict::Warning);
        assert_eq!(judge(&["mine"]).verdict, Verdict::Warning);
    }
}
