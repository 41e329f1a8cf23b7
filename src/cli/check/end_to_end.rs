//! `check --probe`: a tiny image from end to end, for each way in which jobs publish: from each source pool to its
//! destination pool, at once or when copied.
//!
//! The image belongs to the daemon's own project, and nothing of it stays.

use std::collections::BTreeSet;
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::super::setup::client_options;
use super::report::CheckResult;
use crate::ceph::{self, Client, Features, ImageSpec, Progress, Storage};
use crate::config::{Config, PublishChoice};
use crate::openstack::{self, Cloud, ErrorKind, LocationAnswer, Session};
use crate::publish;

/// Bytes of the image, and how many of them are written; the rest is a hole.
const SIZE: u64 = 1 << 20;
const WRITTEN: usize = 64 << 10;

/// Snapshot of the source that the image is made from.
const SNAPSHOT: &str = "check";

/// For one way from end to end, and for removing what it made.
const LIMIT: Duration = Duration::from_secs(90);

/// How long Glance's own work on the image is waited for before the image is deleted.
const TASKS_WITHIN: Duration = Duration::from_secs(30);

/// Between two looks at the image record.
const PAUSE: Duration = Duration::from_millis(500);

/// One way in which jobs publish.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Way<'a> {
    source_pool: &'a str,
    dest_pool: &'a str,
    at_once: bool,
}

impl Way<'_> {
    fn name(&self) -> String {
        let publish = if self.at_once { "at once" } else { "when copied" };
        format!("probe {} to {}, {publish}", self.source_pool, self.dest_pool)
    }
}

/// Why a way does not lead to an image.
enum Failed {
    Ceph(ceph::Error),
    Glance(openstack::Error),
    /// Glance took the location and did not make the image active, or gave other bytes.
    Image(String),
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

/// A row for each way. `is_ready`: Keystone and Ceph take our login.
pub async fn check(config: &Config, is_ready: bool) -> Vec<CheckResult> {
    let ways = ways(config);
    let connected = match is_ready {
        true => connect(config).await,
        false => Err("no login at Keystone, or no connection to Ceph".to_owned()),
    };
    let (session, client) = match connected {
        Ok(connected) => connected,
        Err(reason) => return ways.iter().map(|way| CheckResult::skipped(way.name(), &*reason)).collect(),
    };
    let mut rows = Vec::new();
    for way in &ways {
        rows.push(probe(&session, &client, way).await);
    }
    rows
}

/// Where images are published at once they may also be published when copied, when something is against it.
fn ways(config: &Config) -> BTreeSet<Way<'_>> {
    let mut ways = BTreeSet::new();
    for backend in config.backends.values() {
        let copied = Way { source_pool: &backend.pool, dest_pool: &backend.dest_pool, at_once: false };
        if backend.publish.unwrap_or(config.offload.publish) == PublishChoice::AtOnce {
            ways.insert(Way { at_once: true, ..copied.clone() });
        }
        ways.insert(copied);
    }
    ways
}

async fn connect(config: &Config) -> Result<(Session, Client), String> {
    let session = Session::connect(&config.keystone, &config.glance).map_err(|e| e.to_string())?;
    let client = Client::open(client_options(config)).await.map_err(|e| e.to_string())?;
    Ok((session, client))
}

/// Goes one way, and removes what was made on it however it ended, also by SIGINT.
async fn probe(session: &Session, client: &Client, way: &Way<'_>) -> CheckResult {
    let name = way.name();
    let source = ImageSpec::named(way.source_pool, format!("rbd-offload.check-{}", Uuid::new_v4()));
    let id = match session.create_probe_image().await {
        Ok(id) => id,
        Err(error) => {
            return CheckResult::fault(name, error.to_string(), "let the daemon's user create images in Glance");
        }
    };
    let image = ImageSpec::named(way.dest_pool, id.clone());
    let begun = Instant::now();
    let made = tokio::select! {
        made = timeout(LIMIT, publish_and_read(session, client, way, &source, &id)) => {
            made.unwrap_or_else(|_| Err(Failed::Image(format!("not done within {} s", LIMIT.as_secs()))))
        }
        _ = tokio::signal::ctrl_c() => Err(Failed::Image("interrupted".into())),
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
        Err(failed) => judge(&name, way, failed),
    };
    match timeout(LIMIT, remove(session, client, &source, &image, &id)).await {
        Ok(Ok(())) => row,
        left => {
            let reason = match left {
                Ok(Err(Failed::Ceph(error))) => error.to_string(),
                Ok(Err(Failed::Glance(error))) => error.to_string(),
                Ok(Err(Failed::Image(reason))) => reason,
                _ => format!("not done within {} s", LIMIT.as_secs()),
            };
            CheckResult::fault(
                name,
                format!("{}; and the probe was not removed: {reason}", row.detail),
                format!(
                    "remove the image {id} from Glance, then {image} and {source} with `rbd rm`, if they are there"
                ),
            )
        }
    }
}

/// Makes the image, and returns how long it took until Glance said `active`.
async fn publish_and_read(
    session: &Session,
    client: &Client,
    way: &Way<'_>,
    source: &ImageSpec,
    id: &str,
) -> Result<Duration, Failed> {
    let mut data: Vec<u8> = Uuid::new_v4().as_bytes().iter().copied().cycle().take(WRITTEN).collect();
    client.create_probe_image(source, SNAPSHOT, SIZE, data.clone()).await?;
    let image = ImageSpec::named(way.dest_pool, id);
    let begun = Instant::now();
    let (progress, cancel) = (Progress::default(), CancellationToken::new());
    let fault = if way.at_once {
        client.clone_image(source, SNAPSHOT, &image, Features::WITHOUT_MAPS).await?;
        publish::seal_clone(client, &image).await?
    } else {
        client.clone_image(source, SNAPSHOT, &image, Features::PUBLISHED).await?;
        client.flatten(&image, &progress, &cancel).await?;
        publish::create_snap(client, &image, &progress, &cancel).await?
    };
    if let Some(fault) = fault {
        return Err(Failed::Image(format!("{image} cannot be published: {fault}")));
    }
    let url = publish::location(&client.fsid().await?, way.dest_pool, id);
    match session.add_location(id, &url, None).await? {
        Some(LocationAnswer::Accepted) => {}
        Some(LocationAnswer::Conflict) => {
            return Err(Failed::Image("Glance says that it has a location already".into()));
        }
        None => return Err(Failed::Image("Glance lost the image record".into())),
    }
    let active = loop {
        let record = session.image(id).await?;
        if record.is_some_and(|record| record.status == "active") {
            break begun.elapsed();
        }
        let tasks = session.image_tasks(id).await?;
        if let Some(failed) = tasks.iter().find(|task| task.status == "failure") {
            return Err(Failed::Image(format!("Glance refused the location: {}", failed.message)));
        }
        sleep(PAUSE).await;
    };
    data.resize(SIZE as usize, 0);
    match session.probe_image_data(id).await? == data {
        true => Ok(active),
        false => Err(Failed::Image("Glance gives other bytes than were written".into())),
    }
}

fn judge(name: &str, way: &Way<'_>, failed: Failed) -> CheckResult {
    let reason = match failed {
        Failed::Ceph(error) => {
            return CheckResult::fault(name, error.to_string(), "see the rows of the Ceph pools above");
        }
        Failed::Glance(error) => error.to_string(),
        Failed::Image(reason) => reason,
    };
    if !way.at_once {
        return CheckResult::fault(
            name,
            reason,
            "see Glance's log, and what its Ceph user may do in the destination pool",
        );
    }
    CheckResult::warning(
        name,
        format!("{reason}; images from this pool are published when copied"),
        format!("give Glance's Ceph user `profile rbd-read-only pool={}` beside what it has", way.source_pool),
    )
}

/// Removes the image with its record, and the source. Glance is let end what it does with the image: a delete during
/// its hash breaks that off, and Glance may answer with an error.
async fn remove(
    session: &Session,
    client: &Client,
    source: &ImageSpec,
    image: &ImageSpec,
    id: &str,
) -> Result<(), Failed> {
    let begun = Instant::now();
    while begun.elapsed() < TASKS_WITHIN && session.image_tasks(id).await?.iter().any(|task| !task.has_ended()) {
        sleep(PAUSE).await;
    }
    loop {
        match session.delete_probe_image(id).await {
            Err(error) if matches!(error.kind(), ErrorKind::Conflict | ErrorKind::Unavailable) => sleep(PAUSE).await,
            deleted => break deleted?,
        }
    }
    client.remove_image(image).await?;
    client.remove_image(source).await?;
    Ok(())
}
