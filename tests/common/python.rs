//! Python with Debian's own bindings of Ceph, or with what the lab's services need, so that what the daemon made is
//! judged by other code than the daemon's.
#![allow(dead_code, clippy::unwrap_used)]

use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Mutex, PoisonError};

use serde_json::Value;

/// A script that begins with `serve.py` and defines `run(request)`. Its processes are kept for the next request.
pub struct Script {
    text: &'static str,
    /// In the Python environment of the lab's services.
    in_lab: bool,
    idle: Mutex<Vec<Server>>,
}

/// A process that serves one request at a time. It ends when its input does.
struct Server {
    _process: Child,
    requests: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Script {
    pub const fn new(text: &'static str) -> Self {
        Self { text, in_lab: false, idle: Mutex::new(Vec::new()) }
    }

    /// One that imports what the lab's services need.
    pub const fn in_lab(text: &'static str) -> Self {
        Self { text, in_lab: true, idle: Mutex::new(Vec::new()) }
    }

    /// A command that runs the script, and then `code`, as the administrator of the lab in this folder.
    pub fn command(&self, lab: &Path, code: &str) -> Command {
        let python = if self.in_lab { lab.join("venv/bin/python") } else { PathBuf::from("/usr/bin/python3") };
        let mut command = Command::new(python);
        command.args(["-c", &format!("{}\n{code}", self.text)]);
        command.args([lab.join("ceph/ceph.conf"), lab.join("ceph/client.admin.keyring")]);
        command
    }

    /// What the script wrote for this request. It blocks.
    ///
    /// # Errors
    /// What the script complained of.
    pub fn ask(&self, lab: &Path, request: &Value) -> Result<Vec<u8>, String> {
        let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let mut server = idle.unwrap_or_else(|| self.start(lab));
        // one that does not answer is not used again
        let (status, said) = server.ask(request).map_err(|error| format!("the Python process is gone: {error}"))?;
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).push(server);
        if status == 0 { Ok(said) } else { Err(format!("exit status {status}: {}", String::from_utf8_lossy(&said))) }
    }

    fn start(&self, lab: &Path) -> Server {
        let mut command = self.command(lab, "serve(run)");
        let mut process = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let (requests, answers) = (process.stdin.take().unwrap(), process.stdout.take().unwrap());
        Server { _process: process, requests, answers: BufReader::new(answers) }
    }
}

impl Server {
    fn ask(&mut self, request: &Value) -> std::io::Result<(i32, Vec<u8>)> {
        self.requests.write_all(format!("{request}\n").as_bytes())?;
        let mut line = String::new();
        self.answers.read_line(&mut line)?;
        let numbers =
            line.trim().split_once(' ').and_then(|(status, length)| Some((status.parse().ok()?, length.parse().ok()?)));
        let Some((status, length)) = numbers else { return Err(std::io::ErrorKind::UnexpectedEof.into()) };
        let mut said = vec![0; length];
        self.answers.read_exact(&mut said)?;
        Ok((status, said))
    }
}
