//! `run`: the daemon. Puts the parts together, tells systemd, and takes signals.

use std::fmt::Display;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::Failure;
use super::setup::{client_options, load, store_problems};
use crate::ceph::{CephJobClients, Client, ClientOptions, ErrorKind, Objects, Rates, Storage};
use crate::config::Config;
use crate::job::bindings::RememberedBindings;
use crate::job::clock::Clock;
use crate::job::context::Context;
use crate::job::deployment::{self, ClaimError};
use crate::job::engine::Engine;
use crate::job::intake::Intake;
use crate::job::lease::Identity;
use crate::job::reconcile::Reconciler;
use crate::job::store::Store;
use crate::notification::{self, Listener};
use crate::openstack::{self, Cloud, Session};
use crate::telemetry::http::{Health, serve};
use crate::telemetry::systemd::{ServicePhase, Systemd};
use crate::telemetry::{LogHandle, start_logging, start_metrics};

/// How long running jobs may go on after SIGTERM before the daemon releases them. The unit's TimeoutStopSec is longer.
const DRAIN: Duration = Duration::from_secs(30);

/// How often the daemon sends systemd its status.
const STATUS_INTERVAL: Duration = Duration::from_secs(5);

/// How often the connection to the broker is looked at.
const FOLLOW_INTERVAL: Duration = Duration::from_secs(1);

/// Within this time each part must have answered for `/healthz` to be well.
const ANSWERED_WITHIN: Duration = Duration::from_secs(30);

/// Time limit of an operation on the jobs' records.
const STORE_LIMIT_MIN: Duration = Duration::from_secs(5);
const STORE_LIMIT_MAX: Duration = Duration::from_secs(15);

/// How long an answer of a service holds for `/healthz`, and how long `/healthz` waits for one of Ceph's.
const PROBE_HOLDS: Duration = Duration::from_secs(1);
const PROBE_WITHIN: Duration = Duration::from_secs(10);

pub async fn run(path: &Path) -> Result<ExitCode, Failure> {
    let config = Arc::new(load(path)?);
    let log =
        start_logging(&config.log).map_err(|e| Failure::new(Failure::OS, format!("the log does not start: {e}")))?;
    let metrics = start_metrics().map_err(|e| Failure::new(Failure::SOFTWARE, format!("metrics do not start: {e}")))?;
    // before anything can take time, so that no signal is lost
    let mut signals = UnixSignals::new()?;
    let systemd =
        Systemd::start().map_err(|e| Failure::new(Failure::OS, format!("a thread cannot be started: {e}")))?;
    let systemd = Arc::new(systemd);
    tracing::info!(version = env!("CARGO_PKG_VERSION"), config = %path.display(), "starting");

    let client = Client::open(client_options(&config)).await?;
    // a call on the records that hangs must not outlast the leases that it is to keep
    let limit = (config.jobs.lease / 2).clamp(STORE_LIMIT_MIN, STORE_LIMIT_MAX);
    let records = Client::open(ClientOptions { limit: Some(limit), ..client_options(&config) }).await?;
    let objects = Arc::new(records.objects(&config.jobs.pool, &config.jobs.namespace)?);
    let clients = Arc::new(CephJobClients::new(client.clone(), records));
    if !client.may_fence().await? {
        let text = format!(
            "client.{} must not fence (osd blocklist add), and no job is taken over without that: give it mon 'profile rbd'",
            config.ceph.user
        );
        return Err(Failure::new(Failure::NO_PERMISSION, text));
    }
    check_data_pool(&config, &client).await?;
    let deployment = deployment::id(objects.as_ref()).await?;
    tracing::info!(%deployment, pool = config.jobs.pool, namespace = config.jobs.namespace, "the jobs' namespace");
    let storage: Arc<dyn Storage> = Arc::new(client);
    let session = Arc::new(Session::connect(&config.keystone, &config.glance)?);
    let unclaimed = match claim_jobs(&config, objects.as_ref(), session.as_ref()).await {
        Ok(()) => false,
        Err(Unclaimed::Refused(failure)) => return Err(failure),
        Err(Unclaimed::Later(error)) => {
            tracing::warn!(%error, "Keystone cannot be asked now which cloud this is; asked again until it answers");
            true
        }
    };
    check_pools(&config, storage.as_ref(), session.as_ref()).await?;
    // removals of leftovers must not get the jobs fenced
    let sweeper: Arc<dyn Storage> = Arc::new(Client::open(client_options(&config)).await?);

    let (publish_config, follow_config) = watch::channel(Arc::clone(&config));
    let rates = Arc::new(Rates::new(config.offload.bandwidth_limit, config.offload.objects_per_second));
    let clock = Clock::System;
    let cloud: Arc<dyn Cloud> = session.clone();
    let store = Store::new(Arc::clone(&objects) as Arc<dyn Objects>, clock);
    let engine = Engine::new(Context {
        refusals: Default::default(),
        storage,
        clients,
        cloud,
        store: store.clone(),
        config: follow_config,
        rates: Arc::clone(&rates),
        identity: Identity::of_this_process(),
        deployment,
        clock,
    });
    let listener = Listener::new(config.messaging.clone())
        .map_err(|e| Failure::new(Failure::CONFIG, format!("[messaging] transport_url: {e}")))?
        .bindings(Arc::new(RememberedBindings::new(Arc::clone(engine.context().store.objects()))));
    let (stop, drain) = (CancellationToken::new(), CancellationToken::new());
    let daemon = Arc::new(Daemon {
        engine: Arc::clone(&engine),
        broker: listener.status(),
        store,
        ceph: Probe::default(),
        keystone: Probe::default(),
        session: Arc::clone(&session),
    });
    if let Some(listen) = config.metrics.listen {
        serve(listen, metrics.clone(), Arc::clone(&daemon) as Arc<dyn Health>, stop.clone()).await.map_err(|e| {
            Failure::new(
                // the address may come later, or its present user may go: systemd tries again
                Failure::UNAVAILABLE,
                format!("[metrics] listen = {listen}: {e}; choose another address or leave it empty"),
            )
        })?;
    }

    let listening = tokio::spawn(listener.run(Intake::new(Arc::clone(&engine)), stop.clone()));
    let reconciler = Reconciler::new(Arc::clone(&engine)).with_storage(sweeper);
    let following = tokio::spawn(follow_broker(Arc::clone(&daemon.broker), reconciler.waker()));
    let reconciling = tokio::spawn(reconciler.run(stop.clone()));
    let mut working = tokio::spawn(Arc::clone(&engine).run(stop.clone(), drain.clone()));
    let telling = tokio::spawn({
        let (daemon, metrics, systemd) = (Arc::clone(&daemon), metrics, Arc::clone(&systemd));
        async move {
            daemon.report_to(&systemd, metrics).await;
        }
    });

    let failure = tokio::select! {
        ended = serve_signals(&mut signals, path, &log, (&publish_config, &rates), &systemd, &mut working) => {
            if ended {
                return Err(Failure::new(Failure::SOFTWARE, "the engine ended unexpectedly"));
            }
            None
        }
        failure = claim_later(&config, objects.as_ref(), session.as_ref()), if unclaimed => Some(failure),
    };
    telling.abort();
    following.abort();
    systemd.phase(ServicePhase::Stopping);
    systemd.status("draining");
    stop.cancel();
    tracing::info!(running = engine.status().running, seconds = DRAIN.as_secs(), "stopping; running jobs may finish");
    if timeout(DRAIN, &mut working).await.is_err() {
        drain.cancel();
        if timeout(DRAIN, &mut working).await.is_err() {
            tracing::warn!("a job did not stop in time; another daemon goes on when its lease has run out");
        }
    }
    for part in [listening, reconciling] {
        // they end by themselves; what they had not acked is delivered again
        let _ = timeout(Duration::from_secs(5), part).await;
    }
    tracing::info!("stopped");
    failure.map_or(Ok(ExitCode::SUCCESS), Err)
}

/// Why it is not known yet that the jobs are this cloud's.
enum Unclaimed {
    /// They are another's, or Ceph does not say.
    Refused(Failure),
    /// Keystone does not answer.
    Later(openstack::Error),
}

/// Two clouds that share one jobs namespace would take each other's jobs, and end them as those of deleted images.
async fn claim_jobs(config: &Config, objects: &dyn Objects, session: &Session) -> Result<(), Unclaimed> {
    let refused = |failure: Failure| Unclaimed::Refused(failure);
    // also while Keystone is away: no service of another cloud is called then
    if let Some(cloud) = deployment::cloud(objects).await.map_err(|error| refused(error.into()))? {
        session.expect_cloud(cloud);
    }
    let own = session.cloud().await.map_err(|error| match error.kind() {
        openstack::ErrorKind::Misconfigured => refused(Failure::new(Failure::CONFIG, format!("[keystone]: {error}"))),
        _ => Unclaimed::Later(error),
    })?;
    match deployment::claim(objects, &own).await {
        Ok(()) => {
            session.expect_cloud(own);
            Ok(())
        }
        Err(ClaimError::Ceph(error)) => Err(refused(error.into())),
        Err(error @ ClaimError::Another { .. }) => {
            let remedy = deployment::remedy(&config.jobs.pool, &config.jobs.namespace);
            Err(refused(Failure::new(Failure::CONFIG, format!("{error}; {remedy}"))))
        }
    }
}

/// Claims the jobs as soon as Keystone answers. Returns when they are another cloud's.
async fn claim_later(config: &Config, objects: &dyn Objects, session: &Session) -> Failure {
    loop {
        sleep(FOLLOW_INTERVAL).await;
        match claim_jobs(config, objects, session).await {
            Ok(()) => return std::future::pending().await,
            Err(Unclaimed::Refused(failure)) if failure.code == Failure::CONFIG => return failure,
            Err(Unclaimed::Refused(error)) => tracing::debug!(%error, "it is not known yet whose jobs these are"),
            Err(Unclaimed::Later(error)) => tracing::debug!(%error, "it is not known yet which cloud this is"),
        }
    }
}

/// A pool that belongs to no Glance store is a mistake in the configuration: Glance would take the location, and never
/// open it. With Glance away, each job's plan looks.
async fn check_pools(config: &Config, storage: &dyn Storage, session: &Session) -> Result<(), Failure> {
    let stores = match session.stores().await {
        Ok(stores) => stores,
        Err(error) => {
            tracing::warn!(%error, "Glance cannot be asked for its stores now; each job asks again");
            return Ok(());
        }
    };
    let fsid = storage.fsid().await?;
    let problems = store_problems(config, &stores, &fsid);
    if problems.is_empty() { Ok(()) } else { Err(Failure::new(Failure::CONFIG, problems.join("\n"))) }
}

/// A data pool that cannot hold the data of images would fail each job.
async fn check_data_pool(config: &Config, client: &Client) -> Result<(), Failure> {
    let Some(pool) = &config.glance.data_pool else { return Ok(()) };
    client.can_hold_data(pool).await.map_err(|error| match error.kind() {
        ErrorKind::NotFound | ErrorKind::Unsupported => {
            Failure::new(Failure::CONFIG, format!("[glance] data_pool = {pool}: {error}"))
        }
        _ => error.into(),
    })
}

/// What was sent while there was no connection, or before an exchange was there to bind, has not reached us: the
/// reconciler looks as soon as that may have happened.
async fn follow_broker(broker: Arc<notification::BrokerStatus>, reconcile: Arc<Notify>) {
    let seen = |state: notification::ListenerState| (state.connected_since, state.missing_exchanges);
    let mut before = seen(broker.get());
    loop {
        sleep(FOLLOW_INTERVAL).await;
        let now = seen(broker.get());
        if now.0.is_some() && now != before {
            reconcile.notify_one();
        }
        before = now;
    }
}

struct UnixSignals {
    terminate: Signal,
    interrupt: Signal,
    reload: Signal,
}

impl UnixSignals {
    fn new() -> Result<Self, Failure> {
        let on = |kind| signal(kind).map_err(|e| Failure::new(Failure::OS, format!("signals cannot be received: {e}")));
        Ok(Self {
            terminate: on(SignalKind::terminate())?,
            interrupt: on(SignalKind::interrupt())?,
            reload: on(SignalKind::hangup())?,
        })
    }
}

/// Until the daemon is to stop. `true`: the engine ended, which it never should.
async fn serve_signals(
    signals: &mut UnixSignals,
    path: &Path,
    log: &LogHandle,
    (config, rates): (&watch::Sender<Arc<Config>>, &Rates),
    systemd: &Systemd,
    engine: &mut JoinHandle<()>,
) -> bool {
    loop {
        tokio::select! {
            _ = signals.terminate.recv() => return false,
            _ = signals.interrupt.recv() => return false,
            _ = &mut *engine => return true,
            _ = signals.reload.recv() => reload(path.to_owned(), log, (config, rates), systemd),
        }
    }
}

/// Reads the configuration again and applies what may change while the daemon runs.
fn reload(path: PathBuf, log: &LogHandle, (config, rates): (&watch::Sender<Arc<Config>>, &Rates), systemd: &Systemd) {
    systemd.phase(ServicePhase::Reloading);
    match load(&path) {
        Ok(new) => {
            let old = config.borrow().clone();
            for what in old.restart_needed(&new) {
                tracing::warn!(what, "changed in the configuration; needs a restart");
            }
            let now = old.reloaded(&new);
            log.set(&now.log);
            rates.set(now.offload.bandwidth_limit, now.offload.objects_per_second);
            config.send_replace(Arc::new(now));
            tracing::info!(config = %path.display(), "configuration read again");
        }
        Err(error) => tracing::error!(%error, "the configuration stays as it was"),
    }
    systemd.phase(ServicePhase::Ready);
}

/// What is asked for the daemon's health.
struct Daemon {
    engine: Arc<Engine>,
    broker: Arc<notification::BrokerStatus>,
    store: Store,
    ceph: Probe,
    keystone: Probe,
    session: Arc<Session>,
}

/// Asks a service for one caller at a time. Callers that come during that, or right after it, get the same answer.
#[derive(Default)]
struct Probe(tokio::sync::Mutex<Option<(Instant, Result<(), String>)>>);

impl Probe {
    async fn ask<E: Display>(
        &self,
        limit: Duration,
        question: impl Future<Output = Result<(), E>>,
    ) -> Result<(), String> {
        let mut asked = self.0.lock().await;
        if let Some((at, answer)) = &*asked
            && at.elapsed() < PROBE_HOLDS
        {
            return answer.clone();
        }
        let answer = match timeout(limit, question).await {
            Ok(answer) => answer.map_err(|e| e.to_string()),
            Err(_) => Err(format!("no answer within {} s", limit.as_secs())),
        };
        *asked = Some((Instant::now(), answer.clone()));
        answer
    }
}

impl Daemon {
    /// READY once the daemon can take requests, then a line of status, and the watchdog.
    async fn report_to(&self, systemd: &Systemd, metrics: metrics_exporter_prometheus::PrometheusHandle) {
        let interval = sd_notify::watchdog_enabled().map_or(STATUS_INTERVAL, |w| STATUS_INTERVAL.min(w / 2));
        systemd.phase(ServicePhase::Ready);
        let mut shown = String::new();
        let mut turn = None;
        loop {
            let engine = self.engine.status();
            let status = format!("{} running, {} waiting; {}", engine.running, engine.waiting, self.broker.get());
            if status != shown {
                systemd.status(&status);
                shown = status;
            }
            // each turn of the engine is one ping: while it does not turn, systemd hears nothing
            if turn.replace(engine.last_turn) != Some(engine.last_turn) {
                systemd.watchdog();
            }
            metrics.run_upkeep();
            sleep(interval).await;
        }
    }
}

#[async_trait]
impl Health for Daemon {
    async fn health(&self) -> (bool, serde_json::Value) {
        let engine = self.engine.status();
        let broker = self.broker.get();
        let ceph = self.ceph.ask(PROBE_WITHIN, self.store.probe());
        let keystone = self.keystone.ask(ANSWERED_WITHIN, self.session.probe_identity());
        let (ceph, keystone) = tokio::join!(ceph, keystone);
        let said = |answer: Result<(), String>| answer.err().unwrap_or_else(|| "ok".to_owned());
        let parts = [
            ("broker", if broker.connected() { "ok".to_owned() } else { broker.to_string() }),
            ("ceph", said(ceph)),
            ("keystone", said(keystone)),
            ("engine", engine_health(engine.last_poll)),
        ];
        let well = parts.iter().all(|(_, state)| state == "ok");
        let mut body = serde_json::Map::new();
        body.insert("healthy".into(), well.into());
        body.extend(parts.into_iter().map(|(part, state)| (part.to_owned(), state.into())));
        body.insert("jobs_running".into(), engine.running.into());
        body.insert("jobs_waiting".into(), engine.waiting.into());
        (well, body.into())
    }
}

fn engine_health(last_poll: Instant) -> String {
    let ago = last_poll.elapsed();
    if ago < ANSWERED_WITHIN { "ok".into() } else { format!("last polled for jobs {} s ago", ago.as_secs()) }
}
