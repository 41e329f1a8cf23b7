//! Connects to one host of the broker, with TLS where transport_url asks for it.
//!
//! A certificate must be signed by a trusted authority, be valid now, be made for a server, and bear the host's name.
//! oslo.messaging does not look at the name unless it is told to, so clouds have brokers whose certificates lack it.
//! `[messaging] ssl_verify_hostname = false` leaves out the check of the name. The other three stay.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use lapin::tcp::{AMQPUriTcpExt, AsyncTcpStream, OwnedIdentity, OwnedTLSConfig, RustlsConnector};
use lapin::uri::{AMQPScheme, AMQPUri};
use lapin::{Connection, ConnectionProperties, ErrorKind};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{WebPkiServerVerifier, verify_server_cert_signed_by_trust_anchor};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use socket2::{SockRef, TcpKeepalive};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::transport_url::{FileError, Host, TransportUrl};
use crate::config::Messaging;

/// What an operator can do about a certificate without the host's name.
pub const WRONG_NAME_REMEDY: &str = "name the host in transport_url as its certificate does, or set \
                                     ssl_verify_hostname = false in [messaging]: the authority that signed the \
                                     certificate is verified all the same";

/// The kernel limits the TCP connection to each address of a host.
const TLS_TIMEOUT: Duration = Duration::from_secs(10);
/// lapin waits for the broker's greeting without a limit, and its heartbeats begin after the login. A broker that
/// answers late is waited for; of one whose host is gone the kernel ends the connection, within this time.
const GONE_TIMEOUT: Duration = Duration::from_secs(60);
const KEEPALIVE: TcpKeepalive =
    TcpKeepalive::new().with_time(Duration::from_secs(20)).with_interval(Duration::from_secs(10)).with_retries(4);

/// Connects, on a task of its own: lapin's attempt goes on when its future is dropped. `name` is shown by
/// `rabbitmqctl list_connections`.
///
/// # Errors
///
/// A file of the TLS options cannot be read.
pub async fn connect(
    url: &TransportUrl,
    host: &Host,
    config: &Messaging,
    name: String,
) -> Result<JoinHandle<lapin::Result<Connection>>, FileError> {
    let tls = url.read_tls(config.ssl_ca_file.as_deref()).await?;
    let uri = url.amqp_uri(host);
    let properties = ConnectionProperties::default().with_connection_name(name.into());
    let any_name = url.tls.is_some() && !config.ssl_verify_hostname;
    Ok(tokio::spawn(async move {
        let runtime = lapin::runtime::default_runtime()?;
        let tls = Arc::new(tls);
        let any_name = if any_name {
            let tls = tls.clone();
            Some(tokio::task::spawn_blocking(move || any_name_connector(&tls)).await.map_err(io::Error::other)??)
        } else {
            None
        };
        let is_tls = uri.scheme == AMQPScheme::AMQPS;
        Connection::connector(
            uri,
            runtime,
            async move |mut uri: AMQPUri, runtime| {
                uri.scheme = AMQPScheme::AMQP;
                let plain = uri.connect_async(&runtime).await?;
                if let AsyncTcpStream::Plain(stream) = &plain {
                    set_keepalive(&SockRef::from(stream.get_ref()))?;
                }
                let host = uri.authority.host.as_str();
                let secure = async {
                    match &any_name {
                        Some(connector) => plain.into_rustls(connector, host).await,
                        None if is_tls => plain.into_tls(host, (*tls).as_ref()).await,
                        None => Ok(plain),
                    }
                };
                let late = |_| io::Error::new(io::ErrorKind::TimedOut, "no answer to the TLS handshake");
                Ok(timeout(TLS_TIMEOUT, secure).await.map_err(late).flatten()?)
            },
            properties,
        )
        .await
    }))
}

fn set_keepalive(socket: &SockRef<'_>) -> io::Result<()> {
    socket.set_tcp_keepalive(&KEEPALIVE)?;
    socket.set_tcp_user_timeout(Some(GONE_TIMEOUT))
}

/// Whether the broker's certificate is for other names than the host's.
pub fn is_wrong_name(error: &lapin::Error) -> bool {
    let ErrorKind::IOError(error) = error.kind() else { return false };
    let cause = error.get_ref().and_then(|cause| cause.downcast_ref::<rustls::Error>());
    matches!(
        cause,
        Some(rustls::Error::InvalidCertificate(
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. }
        ))
    )
}

/// As lapin makes one by default: trusts the system's authorities and those of the configuration, and shows the
/// configured client certificate.
fn any_name_connector(tls: &OwnedTLSConfig) -> io::Result<RustlsConnector> {
    let mut roots = RootCertStore::empty();
    if let Some(pem) = &tls.cert_chain {
        for certificate in certificates(pem.as_bytes())? {
            roots.add(certificate).map_err(invalid)?;
        }
    }
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let verifier = AnyName::new(roots, provider.clone())?;
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(invalid)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier));
    let config = match &tls.identity {
        Some(OwnedIdentity::PKCS8 { pem, key }) => {
            let key = PrivateKeyDer::from_pem_slice(key).map_err(invalid)?;
            builder.with_client_auth_cert(certificates(pem)?, key).map_err(invalid)?
        }
        // transport_url names PEM files alone
        Some(OwnedIdentity::PKCS12 { .. }) | None => builder.with_no_client_auth(),
    };
    Ok(config.into())
}

fn certificates(pem: &[u8]) -> io::Result<Vec<CertificateDer<'static>>> {
    CertificateDer::pem_slice_iter(pem).collect::<Result<_, _>>().map_err(invalid)
}

fn invalid(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

/// Verifies everything of a certificate but the name.
#[derive(Debug)]
struct AnyName {
    roots: Arc<RootCertStore>,
    provider: Arc<CryptoProvider>,
    signatures: Arc<WebPkiServerVerifier>,
}

impl AnyName {
    fn new(roots: RootCertStore, provider: Arc<CryptoProvider>) -> io::Result<Self> {
        let roots = Arc::new(roots);
        let builder = WebPkiServerVerifier::builder_with_provider(roots.clone(), provider.clone());
        Ok(Self { signatures: builder.build().map_err(invalid)?, roots, provider })
    }
}

impl ServerCertVerifier for AnyName {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let certificate = ParsedCertificate::try_from(certificate)?;
        let algorithms = self.provider.signature_verification_algorithms.all;
        verify_server_cert_signed_by_trust_anchor(&certificate, &self.roots, intermediates, now, algorithms)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.signatures.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.signatures.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.signatures.supported_verify_schemes()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::config::Config;

    /// Accepts and says nothing; with a transport_url for it.
    async fn silent_broker(query: &str) -> (tokio::net::TcpListener, TransportUrl) {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let url = TransportUrl::parse(&format!("rabbit://user:secret@{address}/{query}")).unwrap();
        (listener, url)
    }

    async fn attempt(url: &TransportUrl) -> JoinHandle<lapin::Result<Connection>> {
        let text = "[messaging]\ntransport_url = rabbit://h/\n[keystone]\nauth_url = http://k:5000/v3\nusername = u\n\
                    password = p\nproject_name = service\n[backend:a]\npool = a\n";
        let config = Config::parse("test".as_ref(), text).unwrap();
        connect(url, &url.hosts[0], &config.messaging, "test".into()).await.unwrap()
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_tls_handshake_without_an_answer_ends_in_time() {
        let (listener, url) = silent_broker("?ssl=1").await;
        let attempt = attempt(&url).await;
        let _peer = listener.accept().await.unwrap();
        let ended = timeout(3 * TLS_TIMEOUT, attempt).await.unwrap().unwrap();
        assert!(ended.unwrap_err().to_string().contains("no answer to the TLS handshake"));
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn the_kernel_looks_after_a_connection_whose_peer_says_nothing() {
        let (listener, url) = silent_broker("").await;
        let attempt = attempt(&url).await;
        let (_peer, from) = listener.accept().await.unwrap();
        // of proc(5): the local address, and the timer that runs; 02 is that of keepalive
        let local = format!("0100007F:{:04X}", from.port());
        let has_keepalive = async || {
            let table = tokio::fs::read_to_string("/proc/net/tcp").await.unwrap();
            let mut rows = table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
            rows.any(|row| row[1] == local && row[5].starts_with("02:"))
        };
        let watch = async {
            while !has_keepalive().await {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        timeout(Duration::from_secs(10), watch).await.unwrap();
        assert!(!attempt.is_finished(), "a late answer is waited for");
    }
}
