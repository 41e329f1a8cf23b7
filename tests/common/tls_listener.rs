//! A TLS port of the lab's broker, with certificates that do not bear its address.
#![allow(clippy::unwrap_used)]

use std::net::TcpListener;
use std::path::PathBuf;
use std::process::Command;

use rbd_offload::notification::TransportUrl;
use tempfile::TempDir;

use super::env::lab_var;

/// rabbitmqctl on the lab's broker.
pub fn rabbitmqctl(arguments: &[&str]) -> String {
    let command =
        std::env::var("RBDLAB_RABBITMQCTL").unwrap_or_else(|_| format!("{}/svc rabbitctl", lab_var("RBDLAB_HERE")));
    let mut words = command.split_whitespace();
    let output = Command::new(words.next().unwrap()).args(words).args(arguments).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Listens until it is dropped.
pub struct TlsListener {
    certificates: TempDir,
    port: u16,
}

impl TlsListener {
    /// With a certificate for `rabbit.example`, signed by `ca.pem`.
    pub fn start() -> Self {
        Self::start_with("server.pem")
    }

    /// `client.pem` is for clients, `expired.pem` was valid once.
    pub fn start_with(certificate: &str) -> Self {
        let certificates = tempfile::tempdir().unwrap();
        let make = "
            for ca in ca other-ca; do
              openssl req -x509 -newkey rsa:2048 -nodes -keyout $ca.key -out $ca.pem -days 2 -subj /CN=$ca
            done
            openssl req -newkey rsa:2048 -nodes -keyout key -out csr -subj /CN=rabbit.example
            sign() {
              printf 'subjectAltName=DNS:rabbit.example\nextendedKeyUsage=%s\n' $2 > extensions
              openssl x509 -req -in csr -CA ca.pem -CAkey ca.key -CAcreateserial -extfile extensions -out $1 -days $3
            }
            sign server.pem serverAuth 2
            sign client.pem clientAuth 2
            sign expired.pem serverAuth 0
            # valid until the end of the second in which it was signed
            sleep 1.1";
        let made = Command::new("sh").arg("-ec").arg(make).current_dir(certificates.path()).output().unwrap();
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let path = |name: &str| certificates.path().join(name).display().to_string();
        rabbitmqctl(&[
            "-q",
            "eval",
            &format!(
                "{{ok, _}} = application:ensure_all_started(ssl),
                 ok = rabbit_networking:start_ssl_listener({{\"127.0.0.1\", {port}}},
                     [{{certfile, \"{}\"}}, {{keyfile, \"{}\"}}], 2).",
                path(certificate),
                path("key"),
            ),
        ]);
        Self { certificates, port }
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.certificates.path().join(name)
    }

    /// As the lab's user, by the address that no certificate bears.
    pub fn transport_url(&self) -> String {
        let url = lab_var("RBDLAB_OFFLOAD_AMQP");
        let host = TransportUrl::parse(&url).unwrap().hosts[0].to_string();
        let url = url.replace(&host, &format!("127.0.0.1:{}", self.port));
        format!("{url}?ssl=1")
    }
}

impl Drop for TlsListener {
    fn drop(&mut self) {
        let port = self.port;
        rabbitmqctl(&["-q", "eval", &format!("ok = rabbit_networking:stop_tcp_listener({{\"127.0.0.1\", {port}}}).")]);
    }
}
