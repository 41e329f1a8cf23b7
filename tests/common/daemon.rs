//! The real daemon as a child process, with a configuration of its own.

use std::fs::File;
use std::net::TcpListener;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::cloud::PATIENCE;
use super::{disk, lab, pause, run, schemas, seconds, unique, until};

/// The program under test.
const PROGRAM: &str = env!("CARGO_BIN_EXE_rbd-offload");

/// Within this time after SIGTERM the daemon must be gone: 30 s for jobs that may end, and what it takes to give back
/// the others.
const STOPS_WITHIN: Duration = Duration::from_secs(45);

/// A configuration: the lab's, and what a test lays over it.
#[derive(Debug, Clone)]
pub struct Setup {
    /// Names the queue and the namespace of the jobs: two daemons of one name work together.
    pub name: String,
    keys: Vec<(String, String, String)>,
    environment: Vec<(&'static str, PathBuf)>,
}

impl Default for Setup {
    fn default() -> Self {
        let lab = lab();
        let name = format!("test-{}", unique());
        super::lab_lease::note(&name);
        let mut setup = Self { keys: Vec::new(), environment: Vec::new(), name: name.clone() };
        for (section, key, value) in [
            ("messaging", "transport_url", lab.offload_amqp.as_str()),
            ("messaging", "queue", &name),
            ("keystone", "auth_url", &lab.keystone),
            ("keystone", "username", "offload"),
            ("keystone", "password", &lab.offload_password),
            ("keystone", "project_name", "service"),
            ("keystone", "region_name", "RegionOne"),
            ("ceph", "conf", lab.ceph_conf().to_str().unwrap()),
            ("jobs", "namespace", &name),
            ("jobs", "lease", "5s"),
            ("offload", "reconcile_interval", "5s"),
            ("backend:ceph", "pool", "volumes"),
            ("backend:ceph2", "pool", "volumes2"),
        ] {
            setup = setup.set(section, key, value);
        }
        setup
    }
}

impl Setup {
    /// Sets a key, or replaces it.
    pub fn set(mut self, section: &str, key: &str, value: &str) -> Self {
        self.keys.retain(|(s, k, _)| (s.as_str(), k.as_str()) != (section, key));
        self.keys.push((section.into(), key.into(), value.into()));
        self
    }

    /// With the queue and the jobs of another daemon: the two work together.
    pub fn named(self, name: &str) -> Self {
        Self { name: name.to_owned(), ..self.set("messaging", "queue", name).set("jobs", "namespace", name) }
    }

    /// With a variable in its environment.
    pub fn with_variable(mut self, name: &'static str, value: &Path) -> Self {
        self.environment.push((name, value.to_owned()));
        self
    }

    pub fn without(mut self, section: &str) -> Self {
        self.keys.retain(|(s, _, _)| s != section);
        self
    }

    /// With Cinder's integration, and the backend that has it.
    pub fn integrated(self) -> Self {
        self.set("cinder", "integration", "true").set("backend:ceph-offload", "pool", "volumes")
    }

    pub fn text(&self) -> String {
        let mut keys = self.keys.clone();
        keys.sort();
        let mut text = String::new();
        for (index, (section, key, value)) in keys.iter().enumerate() {
            if index == 0 || keys[index - 1].0 != *section {
                text += &format!("[{section}]\n");
            }
            text += &format!("{key} = {value}\n");
        }
        text
    }

    /// Starts a daemon and waits until it is well.
    pub async fn start(&self) -> Daemon {
        let daemon = self.spawn();
        daemon.await_health(200).await;
        daemon
    }

    /// Starts a daemon.
    pub fn spawn(&self) -> Daemon {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        // beside the lab's own logs, where a failure's evidence is looked for
        let dir = lab().dir.join("daemons").join(format!("{}-{}", self.name, unique()));
        std::fs::create_dir_all(&dir).unwrap();
        let config = dir.join("rbd-offload.conf");
        let setup = self.clone().set("metrics", "listen", &format!("127.0.0.1:{port}"));
        std::fs::write(&config, setup.text()).unwrap();
        let log = dir.join("log");
        let child = command(&config)
            .arg("run")
            // the daemon does not take its way from the environment
            .envs(["http_proxy", "https_proxy", "all_proxy"].map(|name| (name, "http://127.0.0.1:1")))
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(File::create(dir.join("stdout")).unwrap())
            .stderr(File::create(&log).unwrap())
            .spawn()
            .unwrap();
        // so that one can tidy up after tests that were killed
        std::fs::write(dir.join("pid"), child.id().to_string()).unwrap();
        Daemon {
            namespace: self.name.clone(),
            queue: self.name.clone(),
            dir,
            log,
            port,
            child: Mutex::new(Some(child)),
        }
    }
}

/// `rbd-offload --config FILE`, with nothing of the caller's environment that it would listen to.
pub fn command(config: &Path) -> Command {
    let mut command = Command::new(PROGRAM);
    for (name, _) in std::env::vars() {
        if name.starts_with("OS_") || name.starts_with("RBD_OFFLOAD_") || name == "RUST_LOG" {
            command.env_remove(name);
        }
    }
    command.arg("--config").arg(config);
    command
}

/// A daemon that runs. It is stopped when this is dropped, and must stop.
pub struct Daemon {
    pub namespace: String,
    pub queue: String,
    dir: PathBuf,
    log: PathBuf,
    port: u16,
    child: Mutex<Option<Child>>,
}

impl Daemon {
    pub fn pid(&self) -> u32 {
        self.child.lock().unwrap().as_ref().expect("the daemon runs").id()
    }

    pub fn log(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.log).unwrap()).into_owned()
    }

    /// Status and body of a page; `None` while the daemon does not answer.
    pub async fn page(&self, path: &str) -> Option<(u16, String)> {
        let client = reqwest::Client::builder().no_proxy().timeout(seconds(70)).build().unwrap();
        let answer = client.get(format!("http://127.0.0.1:{}{path}", self.port)).send().await.ok()?;
        Some((answer.status().as_u16(), answer.text().await.ok()?))
    }

    /// What `/healthz` says.
    pub async fn health(&self) -> Option<(u16, Value)> {
        let (status, body) = self.page("/healthz").await?;
        Some((status, serde_json::from_str(&body).unwrap()))
    }

    /// A number of `/metrics`, summed over its labels.
    pub async fn metric(&self, name: &str) -> f64 {
        let (_, body) = self.page("/metrics").await.expect("metrics");
        let lines = body
            .lines()
            .filter(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with(' ') || rest.starts_with('{')));
        lines.map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap()).sum()
    }

    pub async fn await_health(&self, wanted: u16) {
        until(&format!("/healthz answers {wanted}\n{}", self.log()), seconds(60), || async {
            let ended = self.child.lock().unwrap().as_mut().and_then(|child| child.try_wait().unwrap());
            assert!(ended.is_none(), "the daemon ended ({ended:?}):\n{}", self.log());
            self.health().await.filter(|(status, _)| *status == wanted).map(drop)
        })
        .await;
    }

    /// The job's record.
    pub async fn job(&self, image: &str) -> Option<Value> {
        disk::job(&self.namespace, image).await
    }

    /// Waits until the job's record is in this state.
    pub async fn await_job(&self, image: &str, state: &str) -> Value {
        until(&format!("the job of {image} is {state}"), PATIENCE, || async {
            self.job(image).await.filter(|job| job["state"] == state)
        })
        .await
    }

    /// `TERM`, `KILL`, `STOP`, `CONT`, `HUP`.
    pub fn signal(&self, signal: &str) {
        let sent = Command::new("kill").arg(format!("-{signal}")).arg(self.pid().to_string()).status().unwrap();
        assert!(sent.success(), "kill -{signal}");
    }

    /// Whether librbd ended the process: versions that close an image while a notification of its is on the way may
    /// fail an assertion of their own, and abort. To the jobs that is one more killed daemon.
    pub fn was_aborted_by_librbd(&self) -> bool {
        let ended = self.child.lock().unwrap().as_mut().and_then(|child| child.try_wait().unwrap());
        ended.is_some_and(|status| status.signal() == Some(libc::SIGABRT))
            && self.log().contains("AsyncOpTracker.cc: 13: FAILED ceph_assert(m_pending_ops == 0)")
    }

    /// SIGKILL.
    pub fn kill(&self) {
        let child = self.child.lock().unwrap().take();
        if let Some(mut child) = child {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    /// Waits until a daemon that must not run has ended by itself; how, and what it said.
    pub async fn await_exit(&self, limit: Duration) -> (ExitStatus, String) {
        let status = until("the daemon has ended", limit, || async {
            self.child.lock().unwrap().as_mut().and_then(|child| child.try_wait().unwrap())
        })
        .await;
        self.child.lock().unwrap().take();
        (status, self.log())
    }

    /// SIGTERM; how it ended and how long that took.
    pub fn terminate(&self) -> (ExitStatus, Duration) {
        self.signal("TERM");
        let begun = Instant::now();
        let mut child = self.child.lock().unwrap().take().unwrap();
        loop {
            if let Some(status) = child.try_wait().unwrap() {
                return (status, begun.elapsed());
            }
            if begun.elapsed() > STOPS_WITHIN {
                child.kill().unwrap();
                child.wait().unwrap();
                panic!("the daemon did not stop within {} s:\n{}", STOPS_WITHIN.as_secs(), self.log());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// SIGTERM, and what holds for every daemon's life: it stops, it did not panic, its log holds no secret.
    pub fn stop(&self) {
        if self.child.lock().unwrap().is_some() {
            let (status, _) = self.terminate();
            assert!(status.success(), "the daemon ended with {status}:\n{}", self.log());
        }
        self.check_log();
    }

    pub fn check_log(&self) {
        let (log, lab) = (self.log(), lab());
        assert!(!log.contains("panicked"), "{log}");
        let encoded = lab.offload_amqp.split(':').nth(2).unwrap().split('@').next().unwrap();
        for secret in [&lab.offload_password, &lab.offload_amqp_password, encoded, "gAAAAA"] {
            let line = log.lines().find(|line| line.contains(secret));
            assert_eq!(line, None, "a secret or a token in the log");
        }
    }

    /// Waits for a line in the log that holds all these words, and reacts to it within milliseconds.
    pub async fn await_log(&self, words: &[&str], limit: Duration) {
        let begun = Instant::now();
        while !self.log().lines().any(|line| words.iter().all(|word| line.contains(word))) {
            assert!(begun.elapsed() < limit, "not within {} s in the log: {words:?}", limit.as_secs());
            pause(Duration::from_millis(5)).await;
        }
    }

    /// Waits until a job is through with a stage; needs the log level `debug`.
    pub async fn await_stage(&self, image: &str, stage: &str) {
        self.await_log(&["stage over", image, &format!("job_stage=\"{stage}\"")], PATIENCE).await;
    }

    /// Runs a command with the daemon's configuration; what it said. It must be a success, and JSON by its schema.
    pub async fn command(&self, arguments: &[&str]) -> String {
        let (well, said) = run(command(&self.dir.join("rbd-offload.conf")).args(arguments)).await;
        assert!(well, "rbd-offload {arguments:?}: {said}");
        tokio::task::block_in_place(|| schemas::validate_output(arguments, &said));
        said
    }

    /// Whatever became of its jobs, programs can read them.
    pub async fn jobs_are_readable(&self) {
        self.command(&["jobs", "--all", "--json"]).await;
    }

    /// Starts a command; its output is discarded.
    pub fn spawn_command(&self, arguments: &[&str]) -> Child {
        let mut command = command(&self.dir.join("rbd-offload.conf"));
        command.args(arguments).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
    }

    /// Takes the limit of a slow copy away, while it runs.
    pub async fn copy_at_full_speed(&self) {
        let path = self.dir.join("rbd-offload.conf");
        let text = std::fs::read_to_string(&path).unwrap();
        let limited = |line: &&str| !["objects_per_second", "bandwidth_limit"].iter().any(|key| line.starts_with(key));
        std::fs::write(&path, text.lines().filter(limited).collect::<Vec<_>>().join("\n") + "\n").unwrap();
        self.signal("HUP");
        self.await_log(&["configuration read again"], seconds(20)).await;
    }

    /// Runs a command that must be refused; what it said.
    pub async fn refused(&self, arguments: &[&str]) -> String {
        let (well, said) = run(command(&self.dir.join("rbd-offload.conf")).args(arguments)).await;
        assert!(!well, "rbd-offload {arguments:?}: {said}");
        said
    }

    /// Waits until no job of its namespace is alive, and all leases are given back.
    pub async fn await_idle(&self) {
        self.await_ended().await;
        self.await_no_lease(async || disk::leases(&self.namespace).await).await;
    }

    /// The same where daemons were killed: their leases are not released, so it waits until they run out.
    pub async fn await_idle_after_kills(&self) {
        self.await_ended().await;
        self.await_no_lease(async || disk::valid_leases(&self.namespace).await).await;
    }

    async fn await_ended(&self) {
        until("all jobs ended", PATIENCE, || async {
            let states = disk::jobs(&self.namespace).await;
            let alive = |state: &String| matches!(state.as_str(), "accepted" | "copying" | "publishing" | "detaching");
            (!states.values().any(alive)).then_some(())
        })
        .await;
        self.jobs_are_readable().await;
    }

    /// The record ends a moment before the lease is given back. The reconciler's own comes and goes.
    async fn await_no_lease(&self, leases: impl AsyncFn() -> Vec<String>) {
        until("no lease of a job", seconds(10), || async {
            (!leases().await.iter().any(|object| object.starts_with("job."))).then_some(())
        })
        .await;
        pause(Duration::from_millis(100)).await;
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let child = self.child.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
            if let Some(mut child) = child {
                let _ = child.kill();
                let _ = child.wait();
            }
            eprintln!("the daemon's log: {}", self.log.display());
            return;
        }
        self.stop();
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}
