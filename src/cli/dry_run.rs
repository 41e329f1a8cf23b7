//! `request --dry-run`: what can be told of a request before it is made, by what the tenant may see.
//!
//! The rules are those of the plan (`src/plan.rs`), so far as they need nothing but the APIs that a tenant may call.
//! What depends on the daemon's configuration or on Ceph is named as not visible, and never guessed.

use std::collections::BTreeMap;
use std::process::ExitCode;

use serde::Serialize;

use super::check::report::{self, CheckResult, Verdict};
use super::{Failure, output};
use crate::openstack::{ErrorKind, Image, ImageSizeUsage, Server, Tenant, Volume, VolumeSnapshot};
use crate::plan::{self, PlanError};
use crate::request::{Source, Trigger};

const GIB: u64 = 1 << 30;

const NOT_VISIBLE: &str = "not visible to a tenant";

/// What is known by now of how a request would end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[cfg_attr(test, derive(serde::Deserialize))]
#[serde(rename_all = "lowercase")]
pub(super) enum ForecastOutcome {
    /// Nothing that a tenant can see speaks against it.
    Taken,
    /// It depends on the daemon's configuration.
    Uncertain,
    Declined,
}

#[derive(Debug, Serialize)]
struct Forecast {
    source: Source,
    outcome: ForecastOutcome,
    /// Of `declined`: what the image record would say. Of `uncertain`: what it depends on.
    reason: Option<String>,
    checks: Vec<CheckResult>,
}

/// The source as the tenant sees it; `None`: it is not there, or not for this tenant.
enum Found {
    Volume(Option<Volume>),
    Snapshot(Option<(VolumeSnapshot, Option<Volume>)>),
    Instance(Option<Server>),
    NoNova,
}

/// Makes nothing. Exit status 0, or that of a declined request.
pub async fn dry_run(
    tenant: &Tenant,
    source: Source,
    properties: BTreeMap<String, String>,
    json: bool,
) -> Result<ExitCode, Failure> {
    let (project, found, usage) = tokio::join!(tenant.project_id(), find(tenant, source), tenant.image_size_usage());
    let forecast = forecast(source, project?.as_deref(), &found?, usage?, properties);
    let text = match json {
        true => output::json(&forecast)?,
        false => forecast.describe(output::colours()),
    };
    output::print(&text)?;
    Ok(match forecast.outcome {
        ForecastOutcome::Taken | ForecastOutcome::Uncertain => ExitCode::SUCCESS,
        ForecastOutcome::Declined => ExitCode::from(Failure::UNAVAILABLE),
    })
}

async fn find(tenant: &Tenant, source: Source) -> Result<Found, Failure> {
    let id = source.id().to_string();
    Ok(match source {
        Source::Volume(_) => Found::Volume(tenant.volume(&id).await?),
        Source::Snapshot(_) => Found::Snapshot(match tenant.snapshot(&id).await? {
            Some(snapshot) => {
                let volume = tenant.volume(&snapshot.volume_id).await?;
                Some((snapshot, volume))
            }
            None => None,
        }),
        Source::Instance(_) => match tenant.server(&id).await {
            Ok(server) => Found::Instance(server),
            Err(error) if error.kind() == ErrorKind::NoService => Found::NoNova,
            Err(error) => return Err(error.into()),
        },
    })
}

/// The properties of a source that the rules check.
struct Disk<'a> {
    status: &'a str,
    /// Bytes; `None` where the API does not tell.
    size: Option<u64>,
    /// `None`: the service does not tell.
    metadata: Option<&'a BTreeMap<String, String>>,
    /// `node@backend#pool`, which Cinder shows to administrators.
    host: Option<&'a str>,
}

fn forecast(
    source: Source,
    project: Option<&str>,
    found: &Found,
    usage: Option<ImageSizeUsage>,
    properties: BTreeMap<String, String>,
) -> Forecast {
    let mut checks = Vec::new();
    let record = record(project, properties);
    match project {
        Some(project) => checks.push(CheckResult::ok("project", project)),
        None => checks.push(CheckResult::fault("project", "the image has no owner", "log in to a project")),
    }
    checks.push(row("image record", "raw and bare, queued", plan::check_record(&record)));
    match judge(source, project.unwrap_or_default(), found) {
        Err(error) => checks.push(row(source.kind(), "", Err(error))),
        Ok(disk) => {
            let size = disk.size.map_or_else(String::new, |size| format!(", {}", output::bytes(size)));
            let seen = format!("{}{size}", disk.status);
            checks.push(match disk.status {
                "in-use" => CheckResult::warning(
                    source.kind(),
                    format!("{seen}; taken only where the operator has set allow_in_use"),
                    "detach it, or make a snapshot of it and ask for that",
                ),
                _ => CheckResult::ok(source.kind(), seen),
            });
            // which names Glance protects, only the daemon's configuration says
            let untold = BTreeMap::new();
            let inherited = plan::inherit(disk.metadata.unwrap_or(&untold), &record, &[], source);
            let count = inherited.as_ref().map_or(0, BTreeMap::len);
            checks.push(row("properties", &format!("{count} from the source"), inherited.map(drop)));
            checks.push(limit(usage, disk.size));
            let backend = match disk.host {
                Some(host) => format!("whether the daemon is configured for the backend of {host}"),
                None => "which backend it is on, and whether the daemon is configured for it".to_owned(),
            };
            checks.push(CheckResult::skipped("disk", format!("{NOT_VISIBLE}: {backend}; what the disk starts with")));
        }
    }
    checks.push(CheckResult::skipped(
        "method",
        format!("{NOT_VISIBLE}: server-copy, clone or copy, by the daemon's configuration and the disk in Ceph"),
    ));
    checks.push(CheckResult::skipped("daemon", format!("{NOT_VISIBLE}: whether one runs, and takes requests")));
    let first = |verdict| checks.iter().find(|row: &&CheckResult| row.verdict == verdict).map(|row| row.detail.clone());
    let (outcome, reason) = match (first(Verdict::Fault), first(Verdict::Warning)) {
        (Some(reason), _) => (ForecastOutcome::Declined, Some(reason)),
        (None, Some(reason)) => (ForecastOutcome::Uncertain, Some(reason)),
        (None, None) => (ForecastOutcome::Taken, None),
    };
    Forecast { source, outcome, reason, checks }
}

/// The record that the request would make.
fn record(project: Option<&str>, properties: BTreeMap<String, String>) -> Image {
    Image {
        id: String::new(),
        name: None,
        status: "queued".to_owned(),
        owner: project.map(str::to_owned),
        visibility: None,
        disk_format: Some("raw".to_owned()),
        container_format: Some("bare".to_owned()),
        min_disk: 0,
        min_ram: 0,
        size: None,
        tags: Vec::new(),
        properties,
    }
}

/// By the rules of the plan, as if the operator allowed what an operator may allow.
fn judge<'a>(source: Source, project: &str, found: &'a Found) -> Result<Disk<'a>, PlanError> {
    let id = source.id();
    match found {
        Found::Volume(Some(volume)) if volume.project_id == project => {
            plan::check_volume(volume, Trigger::Request, true, false, id)?;
            Ok(Disk { size: Some(volume.size.saturating_mul(GIB)), ..of_volume(volume) })
        }
        Found::Snapshot(Some((snapshot, Some(volume))))
            if snapshot.project_id == project && volume.project_id == project =>
        {
            plan::check_snapshot(snapshot, volume, id)?;
            let size = Some(snapshot.size.saturating_mul(GIB));
            Ok(Disk { status: &snapshot.status, size, ..of_volume(volume) })
        }
        Found::Instance(Some(server)) if server.project_id == project => {
            plan::check_instance(server, Trigger::Request, source)?;
            // a flavor without a size of its own: the disk is as large as its image
            let size = server.root_disk.filter(|size| *size > 0).map(|size| size.saturating_mul(GIB));
            Ok(Disk { status: &server.status, size, metadata: server.image_properties.as_ref(), host: None })
        }
        Found::NoNova => plan::no_nova(),
        Found::Volume(_) | Found::Snapshot(_) | Found::Instance(_) => plan::no_such_source(source),
    }
}

fn of_volume(volume: &Volume) -> Disk<'_> {
    Disk { status: &volume.status, size: None, metadata: Some(&volume.image_metadata), host: volume.host.as_deref() }
}

fn limit(usage: Option<ImageSizeUsage>, size: Option<u64>) -> CheckResult {
    const NAME: &str = "image_size_total";
    let (Some(usage), Some(size)) = (usage, size) else {
        let why = if usage.is_none() { "Glance tells of no limit" } else { "the size of the disk is not visible" };
        return CheckResult::skipped(NAME, why);
    };
    let seen = format!("{} of {} are used", output::bytes(usage.used), output::bytes(usage.limit));
    row(NAME, &seen, plan::check_usage(usage.used, (plan::TOTAL_LIMIT, usage.limit), size))
}

fn row(check: &str, seen: &str, judged: Result<(), PlanError>) -> CheckResult {
    match judged {
        Ok(()) => CheckResult::ok(check, seen),
        Err(PlanError::Declined(_, reason)) => CheckResult { remedy: None, ..CheckResult::fault(check, reason, "") },
        // the cell of the instance is away: what is so today may pass
        Err(error) => CheckResult::warning(check, error.to_string(), "ask again later"),
    }
}

impl Forecast {
    fn describe(&self, colours: bool) -> String {
        let reason = self.reason.as_deref().unwrap_or_default();
        let sum = match self.outcome {
            ForecastOutcome::Taken => "nothing that a tenant can see speaks against it; nothing was created".to_owned(),
            ForecastOutcome::Uncertain => format!("it depends: {reason}; nothing was created"),
            ForecastOutcome::Declined => format!("it would be declined: {reason}; nothing was created"),
        };
        format!("{}{sum}\n", report::lines(&self.checks, colours))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};
    use uuid::Uuid;

    use super::*;
    use crate::cli::schemas;

    const SOURCE: Source = Source::Volume(Uuid::nil());

    fn volume(change: Value) -> Found {
        let mut volume = json!({
            "id": "v", "status": "available", "size": 4, "encrypted": false, "os-vol-tenant-attr:tenant_id": "p",
            "volume_image_metadata": {"hw_disk_bus": "scsi"},
        });
        volume.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
        Found::Volume(Some(serde_json::from_value(volume).unwrap()))
    }

    fn of(found: &Found) -> Forecast {
        forecast(SOURCE, Some("p"), found, None, BTreeMap::new())
    }

    #[test]
    fn what_a_tenant_cannot_see_is_named_and_not_guessed() {
        let forecast = of(&volume(json!({})));
        assert_eq!((forecast.outcome, &forecast.reason), (ForecastOutcome::Taken, &None));
        let row = |name: &str| forecast.checks.iter().find(|row| row.check == name).unwrap();
        assert_eq!(row("volume").detail, "available, 4.00 GiB");
        assert_eq!(row("properties").detail, "1 from the source");
        for name in ["image_size_total", "disk", "method", "daemon"] {
            assert_eq!(row(name).verdict, Verdict::Skipped, "{name}");
        }
        assert!(forecast.describe(false).ends_with("nothing was created\n"));
    }

    #[test]
    fn it_is_declined_for_the_reasons_of_the_plan() {
        for (found, reason) in [
            (Found::Volume(None), "there is no volume"),
            (volume(json!({"os-vol-tenant-attr:tenant_id": "q"})), "there is no volume"),
            (volume(json!({"encrypted": true})), "is encrypted"),
            (volume(json!({"status": "error"})), "is error: it must be available"),
            (Found::NoNova, "no Nova"),
        ] {
            let forecast = of(&found);
            assert_eq!(forecast.outcome, ForecastOutcome::Declined, "{reason}");
            assert!(forecast.reason.as_deref().unwrap().contains(reason), "{forecast:?}");
        }
        let signed = BTreeMap::from([("img_signature".to_owned(), "x".to_owned())]);
        assert_eq!(forecast(SOURCE, Some("p"), &volume(json!({})), None, signed).outcome, ForecastOutcome::Declined);
        assert_eq!(
            forecast(SOURCE, None, &volume(json!({})), None, BTreeMap::new()).outcome,
            ForecastOutcome::Declined
        );
    }

    #[test]
    fn a_volume_in_use_depends_on_the_operator() {
        let forecast = of(&volume(json!({"status": "in-use"})));
        assert_eq!(forecast.outcome, ForecastOutcome::Uncertain);
        assert!(forecast.reason.unwrap().contains("allow_in_use"));
    }

    #[test]
    fn the_projects_limit_counts() {
        let within = |limit, used| {
            let usage = Some(ImageSizeUsage { limit: limit * GIB, used: used * GIB });
            forecast(SOURCE, Some("p"), &volume(json!({})), usage, BTreeMap::new()).outcome
        };
        assert_eq!((within(10, 6), within(10, 7)), (ForecastOutcome::Taken, ForecastOutcome::Declined));
    }

    #[test]
    fn the_document_has_the_promised_names_and_no_others() {
        let document = serde_json::to_value(of(&volume(json!({})))).unwrap();
        assert_eq!(schemas::names_in(&document), ["checks", "outcome", "reason", "source"]);
        assert_eq!(schemas::names_of(&schemas::dry_run()), ["checks", "outcome", "reason", "source"]);
        assert_eq!(document["outcome"], "taken");
    }
}
