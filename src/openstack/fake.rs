//! A small HTTP server that plays Keystone and the services, for what a lab cannot be made to do.

use std::sync::Arc;
use std::time::Duration;

use openstack_sdk_core::config::{Auth as ConfigAuth, CloudConfig};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use super::session::{ConnectOptions, HttpClient};

/// What the fake server answers: status line, extra headers, body. `None`: nothing, ever. The answer has a request id,
/// as that of a service, unless the headers begin with `via:`, as those of a proxy.
pub(super) type Reply = Option<(u16, String, String)>;

/// An HTTP server that gives `reply` the request's first line and its headers.
pub(super) async fn serve(reply: impl Fn(&str) -> Reply + Send + Sync + 'static) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let reply = Arc::new(reply);
    tokio::spawn(async move {
        while let Ok((mut socket, _)) = listener.accept().await {
            let reply = reply.clone();
            tokio::spawn(async move {
                let mut head = Vec::new();
                let mut byte = [0u8; 1];
                while !head.ends_with(b"\r\n\r\n") {
                    match socket.read(&mut byte).await {
                        Ok(1) => head.push(byte[0]),
                        _ => return,
                    }
                }
                match reply(&String::from_utf8_lossy(&head)) {
                    None => tokio::time::sleep(Duration::from_secs(60)).await,
                    Some((status, headers, body)) => {
                        let id = if headers.starts_with("via:") { "" } else { "x-openstack-request-id: req-1\r\n" };
                        // The request's body is left unread only when it is short.
                        let answer = format!(
                            "HTTP/1.1 {status} X\r\nconnection: close\r\ncontent-length: {}\r\n{id}{headers}\r\n{body}",
                            body.len()
                        );
                        let mut rest = [0u8; 4096];
                        let _ = tokio::time::timeout(Duration::from_millis(50), socket.read(&mut rest)).await;
                        let _ = socket.write_all(answer.as_bytes()).await;
                    }
                }
            });
        }
    });
    address
}

pub(super) fn token(base: &str, name: &str) -> Reply {
    token_of(base, name, &["admin"])
}

pub(super) fn token_of(base: &str, name: &str, roles: &[&str]) -> Reply {
    let roles: Vec<_> = roles.iter().map(|role| json!({"id": role, "name": role})).collect();
    let body = json!({"token": {
        "expires_at": "2999-01-01T00:00:00.000000Z", "user": {"id": "u", "name": "u"},
        "project": {"id": "p", "name": "p"}, "roles": roles,
        "catalog": [
            {"type": "image", "name": "glance", "endpoints":
                [{"id": "e", "interface": "internal", "region": "R", "url": format!("{base}/image")}]},
            // Another service's mistake, which must not keep us out.
            {"type": "dns", "name": "d", "endpoints":
                [{"id": "f", "interface": "internal", "region": "R", "url": "//nothing"}]},
        ],
    }});
    Some((201, format!("x-subject-token: {name}\r\n"), body.to_string()))
}

pub(super) fn wire(auth_url: &str, timeout: Duration) -> HttpClient {
    let config = CloudConfig {
        auth: Some(ConfigAuth {
            auth_url: Some(auth_url.into()),
            username: Some("u".into()),
            password: Some("pass-word-1".into()),
            user_domain_name: Some("Default".into()),
            project_name: Some("p".into()),
            project_domain_name: Some("Default".into()),
            ..Default::default()
        }),
        auth_type: Some("v3password".into()),
        ..Default::default()
    };
    HttpClient::new(ConnectOptions {
        config,
        region: None,
        interface: "internal".into(),
        cafile: None,
        insecure: false,
        proxy: super::session::Proxy::None,
        timeout,
        image_override: None,
        as_admin: true,
    })
    .unwrap()
}

pub(super) fn base_of(head: &str) -> String {
    let host = head.lines().find_map(|line| line.strip_prefix("host: ")).unwrap_or_default();
    format!("http://{host}")
}
