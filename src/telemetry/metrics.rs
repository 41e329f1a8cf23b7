//! The metrics: their names, and what each tells.

use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};

use crate::decline::Decline;

/// Upper bounds of the duration histograms, in seconds: from a rename to the hashing of a large image.
const SECONDS: [f64; 16] =
    [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 1200.0, 3600.0];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum MetricKind {
    Counter,
    /// A counter without labels, which is there from the start: a rate needs a zero to begin with.
    Plain,
    Gauge,
    Histogram,
}

/// Every metric, with what `# HELP` says of it.
const METRICS: &[(MetricKind, &str, &str)] = &[
    (MetricKind::Gauge, "rbd_offload_build_info", "Always 1; the label tells the version."),
    (
        MetricKind::Counter,
        "rbd_offload_notifications_total",
        "Notifications by what they tell of (event_type) and what became of them (outcome: stored, dropped, requeued, \
         refused, unreadable).",
    ),
    (
        MetricKind::Counter,
        "rbd_offload_notifications_rejected_total",
        "Notifications that could not be read, by reason.",
    ),
    (MetricKind::Plain, "rbd_offload_broker_reconnects_total", "Connections to the broker that were lost or refused."),
    (MetricKind::Gauge, "rbd_offload_broker_connected", "1 while this daemon consumes the queue or stands by, else 0."),
    (
        MetricKind::Gauge,
        "rbd_offload_queue_messages",
        "Messages that wait in the queue at the broker and were not delivered to a consumer yet.",
    ),
    (MetricKind::Counter, "rbd_offload_jobs_accepted_total", "Requests that were stored as jobs, by trigger."),
    (
        MetricKind::Counter,
        "rbd_offload_jobs_ended_total",
        "Jobs that ended here, by state, reason of a decline, trigger and method (none: before one was chosen).",
    ),
    (
        MetricKind::Counter,
        "rbd_offload_offers_ignored_total",
        "Work that a service offered while its integration is off in the configuration, by trigger.",
    ),
    (MetricKind::Plain, "rbd_offload_jobs_dry_run_total", "Jobs that were planned and, with dry_run, not done."),
    (MetricKind::Gauge, "rbd_offload_jobs_running", "Jobs that this daemon works on."),
    (MetricKind::Gauge, "rbd_offload_jobs_waiting", "Jobs of the whole cluster that wait for a daemon with room."),
    (
        MetricKind::Gauge,
        "rbd_offload_jobs_due",
        "Jobs of the whole cluster that run, or should, before their image is active.",
    ),
    (MetricKind::Gauge, "rbd_offload_jobs_detaching", "Jobs that this daemon works on behind an active image."),
    (
        MetricKind::Gauge,
        "rbd_offload_last_progress_timestamp_seconds",
        "When a job of this daemon last made progress, in Unix time: it was begun, bytes were copied, or a stage ended well.",
    ),
    (
        MetricKind::Gauge,
        "rbd_offload_last_poll_timestamp_seconds",
        "Unix time of this daemon's last successful poll for jobs.",
    ),
    (
        MetricKind::Histogram,
        "rbd_offload_job_duration_seconds",
        "From the request to the active image, of jobs that are done.",
    ),
    (
        MetricKind::Gauge,
        "rbd_offload_images_detaching",
        "Images of the whole cluster that were published at once and depend on their source still.",
    ),
    (
        MetricKind::Gauge,
        "rbd_offload_oldest_detaching_seconds",
        "How long the oldest of these images has been active; 0 without one.",
    ),
    (
        MetricKind::Histogram,
        "rbd_offload_detach_duration_seconds",
        "From the active image until it depends on its source no more, of images that were published at once.",
    ),
    (MetricKind::Histogram, "rbd_offload_stage_duration_seconds", "How long a stage of a job took, by stage."),
    (MetricKind::Counter, "rbd_offload_copied_bytes_total", "Bytes that were copied into images, by method."),
    (
        MetricKind::Counter,
        "rbd_offload_local_bytes_total",
        "Bytes that went through this host for them, in and out, by method.",
    ),
    (MetricKind::Plain, "rbd_offload_retries_total", "Attempts that met a transient error; the job is retried."),
    (MetricKind::Plain, "rbd_offload_leases_lost_total", "Jobs that were given up because their lease was lost."),
    (MetricKind::Plain, "rbd_offload_fenced_total", "Ceph clients of this daemon that another daemon fenced."),
    (
        MetricKind::Plain,
        "rbd_offload_takeovers_total",
        "Jobs that were taken over from a daemon that did not release them.",
    ),
    (
        MetricKind::Plain,
        "rbd_offload_takeover_failures_total",
        "Jobs that failed, and leftovers that stay, because each daemon that worked on them died or stalled.",
    ),
    (
        MetricKind::Plain,
        "rbd_offload_jobs_given_up_total",
        "Jobs that were left because a call did not return; their Ceph client was fenced.",
    ),
    (
        MetricKind::Plain,
        "rbd_offload_fences_refused_total",
        "Take-overs that were refused because the previous owner could not be fenced; the job is left alone.",
    ),
    (MetricKind::Plain, "rbd_offload_verify_failures_total", "Copies that differed from their source."),
    (
        MetricKind::Plain,
        "rbd_offload_images_deactivated_total",
        "Images that were deactivated because their format was changed while they were published.",
    ),
    (
        MetricKind::Counter,
        "rbd_offload_reconciler_findings_total",
        "What the reconciler found and repaired, by kind: request (its notification was lost), record, repaired, image, \
         snapshot, expired.",
    ),
];

/// Starts collecting metrics; the handle renders them.
///
/// # Errors
/// When a recorder is there already.
pub fn start_metrics() -> Result<PrometheusHandle, BuildError> {
    let handle = PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("_seconds".into()), &SECONDS)?
        .install_recorder()?;
    for (kind, name, help) in METRICS {
        match kind {
            MetricKind::Counter => metrics::describe_counter!(*name, *help),
            MetricKind::Plain => {
                metrics::describe_counter!(*name, *help);
                metrics::counter!(*name).absolute(0);
            }
            MetricKind::Gauge => metrics::describe_gauge!(*name, *help),
            MetricKind::Histogram => metrics::describe_histogram!(*name, *help),
        }
    }
    metrics::gauge!("rbd_offload_build_info", "version" => env!("CARGO_PKG_VERSION")).set(1.0);
    metrics::gauge!("rbd_offload_broker_connected").set(0.0);
    // nothing has stalled yet
    metrics::gauge!("rbd_offload_last_progress_timestamp_seconds").set(unix_time());
    metrics::gauge!("rbd_offload_last_poll_timestamp_seconds").set(unix_time());
    // a rate of the first failure needs the zero before it
    let ends = ["done", "failed", "cancelled"].map(|state| (state, "none"));
    let declines = Decline::ALL.map(|why| ("declined", why.as_str()));
    for (state, why) in ends.into_iter().chain(declines) {
        for method in ["none", "server-copy", "clone", "copy"] {
            for trigger in ["request", "volume-upload", "instance-snapshot"] {
                let labels = [("state", state), ("reason", why), ("trigger", trigger), ("method", method)];
                metrics::counter!("rbd_offload_jobs_ended_total", &labels).absolute(0);
            }
        }
    }
    Ok(handle)
}

/// The time, for a gauge.
pub fn unix_time() -> f64 {
    jiff::Timestamp::now().as_duration().as_secs_f64()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::telemetry::sources;

    /// Names of metrics in a text, without what Prometheus adds to a histogram's.
    fn named(text: &str) -> BTreeSet<String> {
        let mut names = BTreeSet::new();
        for (at, _) in text.match_indices("rbd_offload_") {
            let rest = text.get(at..).unwrap_or_default();
            let end = rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(rest.len());
            let name = rest.get(..end).unwrap_or_default();
            let base =
                ["_bucket", "_sum", "_count"].iter().find_map(|suffix| name.strip_suffix(suffix)).unwrap_or(name);
            names.insert(base.to_owned());
        }
        names
    }

    fn table() -> BTreeSet<String> {
        METRICS.iter().map(|(_, name, _)| (*name).to_owned()).collect()
    }

    #[test]
    fn every_metric_that_is_counted_is_in_the_table_and_the_other_way_round() {
        let mut counted = BTreeSet::new();
        for (_, text) in sources::all() {
            for call in ["counter!(\"", "gauge!(\"", "histogram!(\""] {
                for (at, _) in text.match_indices(call) {
                    let name = text[at + call.len()..].split('"').next().unwrap();
                    counted.insert(name.to_owned());
                }
            }
        }
        assert_eq!(counted, table());
    }

    #[test]
    fn names_and_help_follow_the_conventions() {
        for (kind, name, help) in METRICS {
            assert!(name.starts_with("rbd_offload_") && help.ends_with('.'), "{name}");
            assert_eq!(name.ends_with("_total"), matches!(kind, MetricKind::Counter | MetricKind::Plain), "{name}");
            if *kind == MetricKind::Histogram {
                assert!(name.ends_with("_seconds"), "{name}");
            }
        }
    }

    #[test]
    fn the_documentation_the_dashboard_and_the_alerts_name_metrics_that_there_are() {
        let documented = named(include_str!("../../docs/reference/metrics-and-logs.md"));
        assert_eq!(table().difference(&documented).collect::<Vec<_>>(), Vec::<&String>::new(), "not documented");
        // properties of an image record have the same prefix
        let properties = ["status", "progress", "message"].map(|name| format!("rbd_offload_{name}"));
        for (what, text) in [
            ("docs/reference/metrics-and-logs.md", include_str!("../../docs/reference/metrics-and-logs.md")),
            ("the dashboard", include_str!("../../packaging/grafana/rbd-offload.json")),
            ("the alerts", include_str!("../../packaging/prometheus/rbd-offload.rules.yml")),
        ] {
            for name in named(text).iter().filter(|name| !properties.contains(name)) {
                assert!(table().contains(name), "{what} names {name}");
            }
        }
    }
}
