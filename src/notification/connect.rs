//! Connects to one host of the broker, with TLS where transport_url asks for it.
//!
//! A certificate must be signed by a trusted authority, be valid now, be made for a server, and bear the host's name.
//! oslo.messaging does not look at the name unless it is told to, so clouds have brokers whose certificates lack it.
//! `[messaging] ssl_verify_hostname = false` leaves out the last of the four and nothing else.

use std::io;
use std::sync::Arc;

use lapin::tcp::{AMQPUriTcpExt, OwnedIdentity, OwnedTLSConfig, RustlsConnector};
use lapin::uri::{AMQPScheme, AMQPUri};
use lapin::{Connection, ConnectionProperties, ErrorKind};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{WebPkiServerVerifier, verify_server_cert_signed_by_trust_anchor};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use tokio::task::JoinHandle;

use super::transport_url::{FileError, Host, TransportUrl};
use crate::config::Messaging;

/// What an operator can do about a certificate without the host's name.
pub const WRONG_NAME_REMEDY: &str = "name the host in transport_url as its certificate does, or set \
                                     ssl_verify_hostname = false in [messaging]: the authority that signed the \
                                     certificate is verified all the same";

/// Connects, on a task of its own: lapin's attempt does not end when nobody waits for it. `name` is shown by
/// `rabbitmqctl list_connections`.
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
        if !any_name {
            return Connection::connect_uri_with_config(uri, properties, tls, runtime).await;
        }
        let connector =
            tokio::task::spawn_blocking(move || any_name_connector(&tls)).await.map_err(io::Error::other)??;
        let connect = async move |mut uri: AMQPUri, runtime| {
            uri.scheme = AMQPScheme::AMQP;
            let plain = uri.connect_async(&runtime).await?;
            Ok(plain.into_rustls(&connector, &uri.authority.host).await?)
        };
        Connection::connector(uri, runtime, connect, properties).await
    }))
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
