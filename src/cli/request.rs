//! `request`: what a tenant runs. Creates the image record with the tag that asks for it, and may wait for the image;
//! or only tells what can be told before that.

use std::collections::BTreeMap;
use std::io::{IsTerminal, stderr};
use std::process::ExitCode;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use tokio::time::{Instant, sleep};
use uuid::Uuid;

use super::dry_run::dry_run;
use super::{Failure, output};
use crate::config;
use crate::openstack::{Image, Tenant, is_reserved};
use crate::request::{COPYING_TAG, PROPERTY_PREFIX, Source, parse_uuid};

/// How often the record is read.
const POLL_INTERVAL: Duration = Duration::from_secs(1);

/// Reads that may fail in a row. After that the command gives up.
const MAX_FAILED_POLLS: u32 = 30;

/// After this long without a sign of a daemon, the command says so.
const NO_DAEMON_AFTER: Duration = Duration::from_secs(30);

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    source: SourceArgs,
    /// Name of the image.
    #[arg(long, required_unless_present = "dry_run", value_parser = clap::builder::NonEmptyStringValueParser::new())]
    name: Option<String>,
    /// A property of the image; may be given several times.
    #[arg(long = "property", value_name = "KEY=VALUE", value_parser = property)]
    properties: Vec<(String, String)>,
    /// Wait until the image is active, and show the progress.
    #[arg(long)]
    wait: bool,
    /// With --wait: wait also until the copy of an image that was published at once is complete.
    #[arg(long, requires = "wait")]
    detached: bool,
    /// Create nothing. Show whether the request would be accepted, as far as a tenant can see. Exit status 69 if it
    /// would be declined.
    #[arg(long, conflicts_with_all = ["wait", "detached"])]
    dry_run: bool,
    /// With --dry-run: an object with source, outcome (taken, uncertain, declined), reason and checks.
    #[arg(long, requires = "dry_run")]
    json: bool,
    /// With --wait: give up after this time (500ms, 30s, 5m, 12h, 7d); the request stays.
    #[arg(long, value_name = "DURATION", default_value = "1h", value_parser = duration)]
    timeout: Duration,
    /// A cloud of clouds.yaml; OS_CLOUD and the other OS_* variables otherwise.
    #[arg(long, value_name = "NAME")]
    os_cloud: Option<String>,
}

/// What the image is to be made from.
#[derive(Debug, clap::Args)]
#[group(required = true, multiple = false)]
struct SourceArgs {
    /// Make the image from this volume.
    #[arg(long, value_name = "ID", value_parser = uuid)]
    volume: Option<Uuid>,
    /// Make the image from this volume snapshot.
    #[arg(long, value_name = "ID", value_parser = uuid)]
    snapshot: Option<Uuid>,
    /// Make the image from this instance's disk.
    #[arg(long, value_name = "ID", value_parser = uuid)]
    instance: Option<Uuid>,
}

impl SourceArgs {
    fn source(&self) -> Option<Source> {
        None.or(self.volume.map(Source::Volume))
            .or(self.snapshot.map(Source::Snapshot))
            .or(self.instance.map(Source::Instance))
    }
}

fn uuid(text: &str) -> Result<Uuid, String> {
    parse_uuid(text).ok_or_else(|| "not a UUID, like c99c2483-d3ea-4877-bd86-edb7c4607374".to_owned())
}

fn duration(text: &str) -> Result<Duration, String> {
    config::duration(text).ok_or_else(|| "a whole number and a unit: 500ms, 30s, 5m, 12h, 7d".to_owned())
}

fn property(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or("write KEY=VALUE")?;
    if name.is_empty() {
        return Err("write KEY=VALUE".to_owned());
    }
    if name.starts_with(PROPERTY_PREFIX) {
        return Err(format!("properties that start with {PROPERTY_PREFIX} are the daemon's own"));
    }
    if is_reserved(name) {
        return Err(format!("{name:?} is one of Glance's own attributes, not a property"));
    }
    Ok((name.to_owned(), value.to_owned()))
}

pub async fn request(args: Args) -> Result<ExitCode, Failure> {
    // clap sees to it that there is one
    let source = args.source.source().ok_or_else(|| Failure::new(Failure::USAGE, "name a source"))?;
    let tenant = Tenant::from_env(args.os_cloud.as_deref())?;
    let properties: BTreeMap<String, String> = args.properties.into_iter().collect();
    if args.dry_run {
        return dry_run(&tenant, source, properties, args.json).await;
    }
    let name = args.name.unwrap_or_default();
    let image = tenant.create_image(&name, &[source.tag()], &properties).await?;
    output::print(&format!("{}\n", image.id))?;
    if !args.wait {
        return Ok(ExitCode::SUCCESS);
    }
    wait(&tenant, image, args.timeout, args.detached).await.map(|()| ExitCode::SUCCESS)
}

/// Follows the record until the image is active; with `detached`, until it depends on its source no more.
async fn wait(tenant: &Tenant, image: Image, within: Duration, detached: bool) -> Result<(), Failure> {
    let id = image.id.clone();
    let begun = Instant::now();
    let mut shown = Display::new();
    let (mut silent, mut failed_polls) = (true, 0);
    let mut seen = RequestProgress::of(&image);
    loop {
        match seen.outcome(&id) {
            Some(Ok(())) if seen.copying && detached => {}
            Some(Ok(())) => {
                let goes_on = if seen.copying { "; the copy goes on in the background" } else { "" };
                shown.end(&format!("image {id} is active, after {:.1} s{goes_on}", begun.elapsed().as_secs_f64()));
                return Ok(());
            }
            Some(Err(failure)) => {
                shown.clear();
                return Err(failure);
            }
            None => {}
        }
        silent &= seen.status.is_none() && seen.image_status.as_deref() == Some("queued");
        let quiet = silent && begun.elapsed() >= NO_DAEMON_AFTER;
        shown.show(&seen, quiet);
        let Some(left) = within.checked_sub(begun.elapsed()).filter(|left| !left.is_zero()) else {
            shown.clear();
            return Err(Failure::new(
                Failure::TEMPORARY,
                format!(
                    "image {id} is not {} after {} s; the request stays: look at the image again later",
                    if seen.copying { "copied" } else { "active" },
                    within.as_secs_f64()
                ),
            ));
        };
        sleep(POLL_INTERVAL.min(left)).await;
        match tenant.image(&id).await {
            Ok(found) => {
                failed_polls = 0;
                seen = found.as_ref().map_or_else(RequestProgress::gone, RequestProgress::of);
            }
            Err(error) if error.is_transient() && failed_polls < MAX_FAILED_POLLS => failed_polls += 1,
            Err(error) => {
                shown.clear();
                return Err(error.into());
            }
        }
    }
}

/// What the record says of the request.
#[derive(Debug, PartialEq, Eq)]
struct RequestProgress {
    /// Glance's.
    image_status: Option<String>,
    /// `rbd_offload_status`
    status: Option<String>,
    percent: u64,
    message: String,
    /// It is active, and its copy goes on.
    copying: bool,
}

impl RequestProgress {
    fn of(image: &Image) -> Self {
        let property = |name: &str| image.properties.get(&format!("{PROPERTY_PREFIX}{name}"));
        Self {
            image_status: Some(image.status.clone()),
            status: property("status").map(|status| output::line(status)),
            percent: property("progress").and_then(|percent| percent.parse().ok()).unwrap_or(0).min(100),
            message: property("message").map(|message| output::line(message)).unwrap_or_default(),
            copying: image.tags.iter().any(|tag| tag == COPYING_TAG),
        }
    }

    fn gone() -> Self {
        Self { image_status: None, status: None, percent: 0, message: String::new(), copying: false }
    }

    /// How it ended, if it did.
    fn outcome(&self, id: &str) -> Option<Result<(), Failure>> {
        let failure = |text: String| Some(Err(Failure::new(Failure::UNAVAILABLE, text)));
        match (self.image_status.as_deref(), self.status.as_deref()) {
            (Some("active"), _) => Some(Ok(())),
            (None | Some("deleted" | "pending_delete"), _) => failure(format!("image {id} was deleted")),
            (Some(status @ ("killed" | "deactivated")), _) => failure(format!("image {id} is {status}")),
            (_, Some(status @ ("declined" | "failed"))) => failure(match self.message.is_empty() {
                true => format!("image {id}: {status}"),
                false => format!("image {id}: {status}: {}", self.message),
            }),
            _ => None,
        }
    }

    fn line(&self) -> String {
        match (self.status.as_deref(), self.image_status.as_deref()) {
            (Some(status), _) if self.message.is_empty() => status.to_owned(),
            (Some(status), _) => format!("{status}: {}", self.message),
            (None, Some("active")) if self.copying => "active; the copy goes on in the background".to_owned(),
            (None, Some("queued")) => "queued".to_owned(),
            (None, other) => other.unwrap_or("deleted").to_owned(),
        }
    }
}

/// A bar on a terminal, otherwise a line whenever something changed.
struct Display {
    bar: Option<ProgressBar>,
    last: String,
    percent: u64,
    /// The record has had a status.
    was_at_work: bool,
}

impl Display {
    fn new() -> Self {
        let bar = stderr().is_terminal().then(|| {
            let bar = ProgressBar::new(100);
            if let Ok(style) = ProgressStyle::with_template("{bar:40} {pos:>3} %  {elapsed}  {wide_msg}") {
                bar.set_style(style);
            }
            bar.enable_steady_tick(Duration::from_millis(500));
            bar
        });
        Self { bar, last: String::new(), percent: 0, was_at_work: false }
    }

    fn show(&mut self, seen: &RequestProgress, quiet: bool) {
        // the properties are taken off before the end: the bar does not fall back
        self.percent = self.percent.max(seen.percent);
        self.was_at_work |= seen.status.is_some();
        let mut line = match seen.image_status.as_deref() {
            // they are taken off right before the location is registered
            Some("queued") if self.was_at_work && seen.status.is_none() => "the image is being registered".to_owned(),
            _ => seen.line(),
        };
        if quiet {
            line.push_str(": no daemon has taken the request up yet");
        }
        match &self.bar {
            Some(bar) => {
                bar.set_position(self.percent);
                bar.set_message(line);
            }
            None => {
                let line = if self.was_at_work { format!("{:>3} % {line}", self.percent) } else { line };
                if line != self.last {
                    output::eprint_line(&line);
                    self.last = line;
                }
            }
        }
    }

    fn clear(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }

    fn end(&self, text: &str) {
        self.clear();
        output::eprint_line(text);
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn image(status: &str, properties: &[(&str, &str)]) -> Image {
        let properties: BTreeMap<&str, &str> = properties.iter().copied().collect();
        let mut record = json!(properties);
        record["id"] = "i".into();
        record["status"] = status.into();
        serde_json::from_value(record).unwrap()
    }

    fn outcome(status: &str, properties: &[(&str, &str)]) -> Option<Result<(), String>> {
        let outcome = RequestProgress::of(&image(status, properties)).outcome("i");
        outcome.map(|ended| ended.map_err(|failure| failure.to_string()))
    }

    #[test]
    fn the_record_tells_how_it_ends() {
        assert_eq!(outcome("queued", &[]), None);
        assert_eq!(outcome("queued", &[("rbd_offload_status", "copying")]), None);
        assert_eq!(outcome("importing", &[]), None);
        assert_eq!(outcome("active", &[]), Some(Ok(())));
        assert_eq!(
            outcome("queued", &[("rbd_offload_status", "declined"), ("rbd_offload_message", "no such\nvolume")]),
            Some(Err("image i: declined: no such volume".into()))
        );
        assert_eq!(outcome("killed", &[]), Some(Err("image i is killed".into())));
        assert!(RequestProgress::gone().outcome("i").is_some_and(|ended| ended.is_err()));
    }

    #[test]
    fn an_active_image_tells_whether_its_copy_goes_on() {
        let mut record = image("active", &[]);
        assert!(!RequestProgress::of(&record).copying);
        record.tags = vec![COPYING_TAG.to_owned()];
        let seen = RequestProgress::of(&record);
        assert!(seen.copying && seen.outcome("i").is_some_and(|ended| ended.is_ok()));
        assert_eq!(seen.line(), "active; the copy goes on in the background");
    }

    #[test]
    fn progress_that_is_no_number_is_none() {
        assert_eq!(RequestProgress::of(&image("queued", &[("rbd_offload_progress", "45")])).percent, 45);
        assert_eq!(RequestProgress::of(&image("queued", &[("rbd_offload_progress", "999")])).percent, 100);
        assert_eq!(RequestProgress::of(&image("queued", &[("rbd_offload_progress", "x")])).percent, 0);
    }

    #[test]
    fn reserved_properties_are_refused() {
        assert_eq!(property("hw_disk_bus=scsi=x"), Ok(("hw_disk_bus".into(), "scsi=x".into())));
        for bad in ["a", "=b", "rbd_offload_status=done", "os_glance_x=1", "owner=me", "visibility=public"] {
            assert!(property(bad).is_err(), "{bad}");
        }
    }
}
