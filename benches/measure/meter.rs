//! What a process costs, read from the kernel: CPU time and memory from `/proc`, bytes from the counters of its TCP
//! sockets.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};

use crate::common::lab;

/// Ticks a second of `/proc/PID/stat`.
const TICKS: f64 = 100.0;

/// Processes of the lab that are accounted for, by the names of their files in `run/`, and what they are called in
/// results.
const SERVICES: [(&str, &str); 14] = [
    ("glance", "glance"),
    ("cinder-volume", "cinder-volume"),
    ("nova-compute", "nova-compute"),
    ("cinder-api", "other OpenStack"),
    ("cinder-scheduler", "other OpenStack"),
    ("keystone", "other OpenStack"),
    ("mariadb", "other OpenStack"),
    ("rabbit", "other OpenStack"),
    ("osd.0", "OSDs"),
    ("osd.1", "OSDs"),
    ("osd.2", "OSDs"),
    ("mon", "mon, mgr"),
    ("mgr", "mon, mgr"),
    ("daemon", "daemon"),
];

/// Processes of a service with all that they started.
pub type Groups = BTreeMap<String, Vec<u32>>;

/// The lab's services, and the daemon where there is one.
pub fn groups(daemon: Option<u32>) -> Groups {
    let parents = parents();
    let mut groups = Groups::new();
    for (file, name) in SERVICES {
        let root = match file {
            "daemon" => daemon,
            _ => fs::read_to_string(lab().dir.join("run").join(format!("{file}.pid")))
                .ok()
                .and_then(|text| text.trim().parse().ok()),
        };
        if let Some(root) = root {
            groups.entry(name.to_owned()).or_default().extend(tree(root, &parents));
        }
    }
    groups
}

fn fields(pid: u32) -> Option<Vec<u64>> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // after "pid (name) S "; a name may hold blanks
    Some(stat.rsplit_once(") ")?.1.split(' ').skip(1).map(|field| field.parse().unwrap_or(0)).collect())
}

fn parents() -> HashMap<u32, u32> {
    let entries = fs::read_dir("/proc").unwrap().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter_map(|pid| Some((pid, fields(pid)?[0] as u32))).collect()
}

fn tree(root: u32, parents: &HashMap<u32, u32>) -> Vec<u32> {
    let mut found = vec![root];
    let mut next = 0;
    while next < found.len() {
        let parent = found[next];
        found.extend(parents.iter().filter(|(_, p)| **p == parent).map(|(pid, _)| *pid));
        next += 1;
    }
    found
}

/// Seconds of CPU that the processes have used, with those of their children that ended.
pub fn cpu(pids: &[u32]) -> f64 {
    let ticks: u64 = pids.iter().filter_map(|pid| fields(*pid)).map(|f| f[10] + f[11] + f[12] + f[13]).sum();
    ticks as f64 / TICKS
}

fn status(pid: u32, key: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
    line.and_then(|value| value.trim().trim_end_matches(" kB").parse::<u64>().ok()).unwrap_or(0) * 1024
}

/// Bytes of memory now, and at most since [`forget_peaks`].
pub fn rss(pids: &[u32]) -> u64 {
    pids.iter().map(|pid| status(*pid, "VmRSS")).sum()
}

/// Bytes of memory that no other process shares.
pub fn own_memory(pid: u32) -> u64 {
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
    let private = rollup.lines().filter(|line| line.starts_with("Private_"));
    private.filter_map(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok()).sum::<u64>() << 10
}

/// Bytes of memory that no file backs: heap and stacks.
pub fn anonymous_memory(pid: u32) -> u64 {
    status(pid, "RssAnon")
}

pub fn peak_rss(pids: &[u32]) -> u64 {
    pids.iter().map(|pid| status(*pid, "VmHWM")).sum()
}

pub fn forget_peaks(pids: &[u32]) {
    for pid in pids {
        let _ = fs::write(format!("/proc/{pid}/clear_refs"), "5");
    }
}

/// Ends of a connection.
type Key = (String, String);
/// Bytes received, and bytes sent and acknowledged.
type Counts = [u64; 2];

/// Counts what goes through TCP sockets, from the kernel's own counters. Those of sockets that live are read when
/// asked; those of sockets that are closed meanwhile come from the kernel's announcement of their end.
pub struct Sockets {
    watcher: Child,
    ended: Arc<Mutex<HashMap<Key, Counts>>>,
    /// Whose they were when last looked at.
    owners: HashMap<Key, Vec<u32>>,
    first: HashMap<Key, Counts>,
}

impl Sockets {
    pub fn start() -> Self {
        let mut watcher = Command::new("stdbuf")
            .args(["-oL", "ss", "-E", "-tinOH"])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("ss (iproute2)");
        let ended: Arc<Mutex<HashMap<Key, Counts>>> = Arc::default();
        let lines = BufReader::new(watcher.stdout.take().unwrap()).lines();
        let sink = Arc::clone(&ended);
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                if let Some((key, counts, _)) = parse(&line) {
                    sink.lock().unwrap().insert(key, counts);
                }
            }
        });
        let mut sockets = Self { watcher, ended, owners: HashMap::new(), first: HashMap::new() };
        sockets.first = sockets.look();
        sockets
    }

    /// Learns whose the sockets are that live now.
    pub fn look(&mut self) -> HashMap<Key, Counts> {
        let output = Command::new("ss").args(["-tinpOH"]).output().unwrap();
        let mut now = HashMap::new();
        for (key, counts, owners) in String::from_utf8_lossy(&output.stdout).lines().filter_map(parse) {
            self.owners.insert(key.clone(), owners);
            now.insert(key, counts);
        }
        now
    }

    /// Bytes in and out of each group since the start.
    pub fn finish(mut self, groups: &Groups) -> BTreeMap<String, Counts> {
        let now = self.look();
        let _ = self.watcher.kill();
        let _ = self.watcher.wait();
        let ended = self.ended.lock().unwrap();
        let mut sums = BTreeMap::new();
        for (key, owners) in &self.owners {
            let Some(last) = now.get(key).or_else(|| ended.get(key)) else { continue };
            let first = self.first.get(key).copied().unwrap_or_default();
            for (name, pids) in groups {
                if pids.iter().any(|pid| owners.contains(pid)) {
                    let sum: &mut Counts = sums.entry(name.clone()).or_default();
                    sum[0] += last[0].saturating_sub(first[0]);
                    sum[1] += last[1].saturating_sub(first[1]);
                }
            }
        }
        sums
    }
}

/// A line of `ss -tinpOH`.
fn parse(line: &str) -> Option<(Key, Counts, Vec<u32>)> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let key = ((*words.get(3)?).to_owned(), (*words.get(4)?).to_owned());
    let number = |name: &str| words.iter().find_map(|word| word.strip_prefix(name)?.parse().ok()).unwrap_or(0);
    let owners = line
        .split("pid=")
        .skip(1)
        .filter_map(|rest| rest.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok())
        .collect();
    Some((key, [number("bytes_received:"), number("bytes_acked:")], owners))
}

/// Everything about one run: begins when it is made.
pub struct Meter {
    groups: Groups,
    cpu: BTreeMap<String, f64>,
    sockets: Sockets,
}

/// What a run cost.
#[derive(Debug, Clone, Default)]
pub struct Cost {
    /// Bytes in and out.
    pub network: BTreeMap<String, Counts>,
    pub peak: BTreeMap<String, u64>,
}

impl Meter {
    pub fn start(daemon: Option<u32>) -> Self {
        let groups = groups(daemon);
        let sockets = Sockets::start();
        groups.values().for_each(|pids| forget_peaks(pids));
        let cpu = groups.iter().map(|(name, pids)| (name.clone(), cpu(pids))).collect();
        Self { groups, cpu, sockets }
    }

    /// Now and then, so that sockets which come and go are seen.
    pub fn look(&mut self) {
        self.sockets.look();
    }

    /// CPU seconds so far.
    pub fn cpu(&self) -> BTreeMap<String, f64> {
        self.groups.iter().map(|(name, pids)| (name.clone(), cpu(pids) - self.cpu[name])).collect()
    }

    pub fn finish(self) -> Cost {
        let peak = self.groups.iter().map(|(name, pids)| (name.clone(), peak_rss(pids))).collect();
        Cost { peak, network: self.sockets.finish(&self.groups) }
    }
}
