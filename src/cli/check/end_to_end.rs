//! `check --probe`: a tiny image from end to end, for each route in which jobs of the backends publish: from each
//! backend's pool to its destination pool, at once or when copied.
//!
//! The image belongs to the daemon's own project. It is removed however the probe ends.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::super::setup::client_options;
use super::report::CheckResult;
use crate::ceph::{self, Client, Features, ImageSpec, Progress, Rates, Storage, TransferLimits};
use crate::config::{Config, PublishChoice};
use crate::openstack::{self, Cloud, ErrorKind, ImageTask, LocationAnswer, Session};
use crate::publish;

/// Bytes of the image, and how many of them are written; the rest is a hole.
const SIZE: u64 = 1 << 20;
const WRITTEN: usize = 64 << 10;

/// Snapshot of the source that the image is made from.
const SNAPSHOT: &str = "check";

/// For one route from end to end, and for removing what it made.
const LIMIT: Duration = Duration::from_secs(90);

/// How long Glance's own work on the image is waited for before the image is deleted.
const TASKS_WITHIN: Duration = Duration::from_secs(30);

const INTERRUPTED: &str = "interrupted";

/// Between two polls of the image record.
const PAUSE: Duration = Duration::from_millis(500);

/// One route in which jobs publish.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct PublishRoute<'a> {
    source_pool: &'a str,
    dest_pool: &'a str,
    at_once: bool,
}

impl PublishRoute<'_> {
    fn name(&self) -> String {
        let publish = if self.at_once { "at once" } else { "when copied" };
        format!("probe {} to {}, {publish}", self.source_pool, self.dest_pool)
    }
}

/// Why a route does not lead to an image.
enum Failed {
    Ceph(ceph::Error),
    Glance(openstack::Error),
    /// Glance did not take the location.
    Refused(String),
    Interrupted,
    Other(String),
}

impl fmt::Display for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ceph(error) => error.fmt(f),
            Self::Glance(error) => error.fmt(f),
            Self::Refused(reason) | Self::Other(reason) => f.write_str(reason),
            Self::Interrupted => f.write_str(INTERRUPTED),
        }
    }
}

impl From<ceph::Error> for Failed {
    fn from(error: ceph::Error) -> Self {
        Self::Ceph(error)
    }
}

impl From<openstack::Error> for Failed {
    fn from(error: openstack::Error) -> Self {
        Self::Glance(error)
    }
}

pub struct ProbeFindings {
    /// One for each route.
    pub rows: Vec<CheckResult>,
    /// What made the calls on Ceph. `None` without a connection.
    pub client: Option<Client>,
}

/// `is_ready`: Keystone and Ceph take our login. Ends soon after `interrupted` fires.
pub async fn check(config: &Config, is_ready: bool, interrupted: &CancellationToken) -> ProbeFindings {
    let routes = routes(config);
    let connected = match is_ready {
        true => connect(config).await,
        false => Err("no login at Keystone, or no connection to Ceph".to_owned()),
    };
    let (session, client) = match connected {
        Ok(connected) => connected,
        Err(reason) => {
            let rows = routes.iter().map(|route| CheckResult::skipped(route.name(), &*reason)).collect();
            return ProbeFindings { rows, client: None };
        }
    };
    let mut rows = Vec::new();
    for route in &routes {
        rows.push(match interrupted.is_cancelled() {
            true => CheckResult::skipped(route.name(), INTERRUPTED),
            false => probe_again(&session, &client, route, interrupted).await,
        });
    }
    ProbeFindings { rows, client: Some(client) }
}

/// Where images are published at once they may also be published when copied, when something is against it.
fn routes(config: &Config) -> BTreeSet<PublishRoute<'_>> {
    let mut routes = BTreeSet::new();
    for backend in config.backends.values() {
        let copied = PublishRoute { source_pool: &backend.pool, dest_pool: &backend.dest_pool, at_once: false };
        if backend.publish.unwrap_or(config.offload.publish) == PublishChoice::AtOnce {
            routes.insert(PublishRoute { at_once: true, ..copied.clone() });
        }
        routes.insert(copied);
    }
    routes
}

/// Without the probe: what Glance must be able to read so that images can be published at once. Only an image shows
/// whether it can.
pub fn unprobed(config: &Config) -> Vec<CheckResult> {
    let pools: BTreeSet<&str> =
        routes(config).into_iter().filter(|route| route.at_once).map(|route| route.source_pool).collect();
    let row = |pool: &&str| {
        let detail = format!("whether Glance can read {pool} is not tried; if it cannot, jobs publish when copied");
        let remedy = format!(
            "`check --probe` tries it. Glance's cephx user needs profile rbd-read-only pool={pool} besides its own"
        );
        CheckResult::warning(format!("at once from {pool}"), detail, remedy)
    };
    pools.iter().map(row).collect()
}

async fn connect(config: &Config) -> Result<(Session, Client), String> {
    let session = Session::connect(&config.keystone, &config.glance).map_err(|e| e.to_string())?;
    let client = Client::open(client_options(config)).await.map_err(|e| e.to_string())?;
    Ok((session, client))
}

/// Goes one route, and once more after a transient fault of Glance.
async fn probe_again(
    session: &Session,
    client: &Client,
    route: &PublishRoute<'_>,
    interrupted: &CancellationToken,
) -> CheckResult {
    let begun = Instant::now();
    let row = probe(session, client, route, interrupted).await;
    if !row.transient {
        return row;
    }
    let mut row = probe(session, client, route, interrupted).await;
    row.note_attempt(2, begun.elapsed());
    row
}

/// Goes one route, and removes what was made on it however it ended.
async fn probe(
    session: &Session,
    client: &Client,
    route: &PublishRoute<'_>,
    interrupted: &CancellationToken,
) -> CheckResult {
    let name = route.name();
    let source = ImageSpec::named(route.source_pool, ceph::end_to_end_name());
    let id = Uuid::new_v4().to_string();
    if let Err(error) = session.create_probe_image(&id).await {
        // Glance may have created it all the same
        let _ = timeout(LIMIT, session.delete_probe_image(&id)).await;
        return CheckResult::fault(name, error.to_string(), "let the daemon's user create images in Glance");
    }
    let image = ImageSpec::named(route.dest_pool, id.clone());
    let begun = Instant::now();
    let made = tokio::select! {
        made = timeout(LIMIT, publish_and_read(session, client, route, &source, &id)) => {
            made.unwrap_or_else(|_| Err(Failed::Other(not_within(LIMIT))))
        }
        () = interrupted.cancelled() => Err(Failed::Interrupted),
    };
    let row = match made {
        Ok(active) => CheckResult::ok(
            &name,
            format!(
                "active after {:.1} s, read back after {:.1} s",
                active.as_secs_f64(),
                begun.elapsed().as_secs_f64()
            ),
        ),
        Err(failed) => judge(&name, route, failed),
    };
    let removed = timeout(LIMIT, remove(session, client, &source, &image, &id)).await;
    match removed.unwrap_or_else(|_| Err(Failed::Other(not_within(LIMIT)))) {
        Ok(()) => row,
        Err(left) => CheckResult::fault(
            name,
            format!("{}; and the probe was not removed: {left}", row.detail),
            format!(
                "remove the image {id} from Glance; then, of {image} and {source}, what is there: `rbd snap unprotect` \
                 and `rbd snap rm` its snapshot, `rbd rm` it"
            ),
        ),
    }
}

fn not_within(limit: Duration) -> String {
    format!("not done within {} s", limit.as_secs())
}

/// Makes the image, and returns how long it took until Glance said `active`.
async fn publish_and_read(
    session: &Session,
    client: &Client,
    route: &PublishRoute<'_>,
    source: &ImageSpec,
    id: &str,
) -> Result<Duration, Failed> {
    let mut data: Vec<u8> = Uuid::new_v4().as_bytes().iter().copied().cycle().take(WRITTEN).collect();
    client.create_probe_image(source, SNAPSHOT, SIZE, data.clone()).await?;
    let image = ImageSpec::named(route.dest_pool, id);
    let begun = Instant::now();
    let (progress, cancel) = (Progress::default(), CancellationToken::new());
    let fault = if route.at_once {
        client.clone_image(source, SNAPSHOT, &image, Features::WITHOUT_MAPS).await?;
        publish::seal_clone(client, &image).await?
    } else {
        client.clone_image(source, SNAPSHOT, &image, Features::PUBLISHED).await?;
        let limits = TransferLimits { concurrency: 1, rates: Arc::new(Rates::new(0, 0)) };
        client.flatten(&image, &limits, &progress, &cancel).await?;
        publish::create_snap(client, &image, &progress, &cancel).await?
    };
    if let Some(fault) = fault {
        return Err(Failed::Other(format!("{image} cannot be published: {fault}")));
    }
    let url = publish::location(&client.fsid().await?, route.dest_pool, id);
    let added = session.add_location(id, &url, None).await.map_err(|error| match error.kind() {
        // an older Glance opens the image before it answers
        ErrorKind::Refused => Failed::Refused(error.to_string()),
        _ => Failed::Glance(error),
    });
    match added? {
        Some(LocationAnswer::Accepted) => {}
        Some(LocationAnswer::Conflict) => {
            return Err(Failed::Other("Glance says that it has a location already".into()));
        }
        None => return Err(Failed::Other("Glance lost the image record".into())),
    }
    let active = loop {
        let record = session.image(id).await?;
        if record.is_some_and(|record| record.status == "active") {
            break begun.elapsed();
        }
        let tasks = session.image_tasks(id).await?;
        if let Some(failed) = tasks.iter().find(|task| task.status == "failure") {
            return Err(Failed::Refused(format!("Glance refused the location: {}", failed.message)));
        }
        sleep(PAUSE).await;
    };
    data.resize(SIZE as usize, 0);
    match session.probe_image_data(id).await? == data {
        true => Ok(active),
        false => Err(Failed::Other("Glance gives other bytes than were written".into())),
    }
}

fn judge(name: &str, route: &PublishRoute<'_>, failed: Failed) -> CheckResult {
    match failed {
        Failed::Refused(reason) if route.at_once => CheckResult::warning(
            name,
            format!("{reason}; images from this pool are published when copied"),
            format!("add `profile rbd-read-only pool={}` to the capabilities of Glance's Ceph user", route.source_pool),
        ),
        Failed::Refused(reason) => CheckResult::fault(
            name,
            reason,
            "see Glance's log, and the capabilities of its Ceph user for the destination pool",
        ),
        Failed::Interrupted => CheckResult::skipped(name, INTERRUPTED),
        Failed::Ceph(error) => CheckResult::fault(name, error.to_string(), "see the rows of the Ceph pools above"),
        failed => {
            let transient = matches!(&failed, Failed::Glance(error) if error.kind() == ErrorKind::Unavailable);
            CheckResult::fault(name, failed.to_string(), "see Glance's log").transient_if(transient)
        }
    }
}

/// Removes the image with its record, and the source. It first waits for Glance's task on the image: a delete during
/// the hash breaks the hash off, and Glance may answer with an error.
async fn remove(
    session: &Session,
    client: &Client,
    source: &ImageSpec,
    image: &ImageSpec,
    id: &str,
) -> Result<(), Failed> {
    // a call that was given up goes on, and makes what is to be removed
    client.quiet().await;
    // a pool may move what is removed to its trash, where it is known by its id
    let made = client.image(image, None).await?;
    let begun = Instant::now();
    while begun.elapsed() < TASKS_WITHIN {
        match session.image_tasks(id).await {
            Ok(tasks) if tasks.iter().all(ImageTask::has_ended) => break,
            _ => sleep(PAUSE).await,
        }
    }
    loop {
        match session.delete_probe_image(id).await {
            Err(error) if matches!(error.kind(), ErrorKind::Conflict | ErrorKind::Unavailable) => sleep(PAUSE).await,
            deleted => break deleted.map(drop)?,
        }
    }
    client.remove_image(image).await?;
    if let Some(made) = made {
        client.remove_image(&ImageSpec::with_id(&image.pool, made.id)).await?;
    }
    client.remove_image(source).await?;
    Ok(())
}
