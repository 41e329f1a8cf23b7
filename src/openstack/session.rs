//! The way to the services: a login at Keystone by the plugins of openstack_sdk, the catalog's endpoints, and bounded
//! HTTP requests.
//!
//! openstack_sdk's plugins do the login. Requests do not go through its session: that one reads answers of any length,
//! hides why a renewal failed, keeps state in the home directory, and refuses a whole catalog for one bad URL. A login
//! lasts until a service answers 401: then one new login is made, all callers share its outcome, and the request is
//! repeated once.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};
use jiff::Timestamp;
use jiff::fmt::rfc2822;
use openstack_sdk_auth_applicationcredential::ApplicationCredentialAuthenticator;
use openstack_sdk_auth_core::OpenStackAuthType;
use openstack_sdk_auth_core::authtoken_scope::AuthTokenScope;
use openstack_sdk_auth_core::{Auth, AuthError};
use openstack_sdk_auth_password::PasswordAuthenticator;
use openstack_sdk_auth_token::TokenAuthenticator;
use openstack_sdk_core::config::CloudConfig;
use secrecy::{ExposeSecret, SecretString};
use serde::de::{DeserializeOwned, IgnoredAny};
use serde_json::Value;
use tokio::sync::Mutex;
use tokio::time::Instant;
use url::Url;

use super::error::{Error, ErrorKind, Result, shorten};
use super::recent::Recent;
use super::{CloudId, GlanceStore, json};
use crate::config::{Credentials, Glance, Interface, Keystone, Register};

/// Longest answer that is read, in bytes.
const BODY_LIMIT: usize = 16 << 20;

/// Longest answer of which only the end is wanted: a Glance record of 128 properties has up to 50 MB.
const DRAIN_LIMIT: usize = 256 << 20;

/// Bytes that are kept of the end of such an answer.
const TAIL: usize = 8 << 10;

/// How long refused credentials are not tried again: Keystone may lock an account after some failures.
const REFUSED_PAUSE: Duration = Duration::from_secs(10);

/// By it an operator finds the daemon's calls in the access logs of the services.
const USER_AGENT: &str = concat!("rbd-offload/", env!("CARGO_PKG_VERSION"));

/// Shorter than what web servers keep an idle connection open for, in most set-ups.
const IDLE_CONNECTION: Duration = Duration::from_secs(15);

static X_AUTH_TOKEN: HeaderName = HeaderName::from_static("x-auth-token");
static X_SERVICE_TOKEN: HeaderName = HeaderName::from_static("x-service-token");
static X_SUBJECT_TOKEN: HeaderName = HeaderName::from_static("x-subject-token");
static REQUEST_ID: HeaderName = HeaderName::from_static("x-openstack-request-id");
static MICROVERSION: HeaderName = HeaderName::from_static("openstack-api-version");

/// OpenStack over HTTP as the daemon's user. Cheap to share behind an `Arc`; made without any traffic.
#[derive(Debug)]
pub struct Session {
    pub(super) wire: HttpClient,
    pub(super) register: Register,
    pub(super) stores: Recent<Vec<GlanceStore>>,
    pub(super) volume_type_stores: Recent<BTreeMap<String, Option<String>>>,
}

impl Session {
    pub(super) fn new(wire: HttpClient, register: Register) -> Self {
        Self { wire, register, stores: Recent::default(), volume_type_stores: Recent::default() }
    }

    /// Reads `cafile` and checks the URLs; the login is made by the first call, or by [`Session::login`], so that a
    /// daemon can start while Keystone is away.
    pub fn connect(keystone: &Keystone, glance: &Glance) -> Result<Self> {
        let mut config = CloudConfig::default();
        let auth = config.auth.get_or_insert_default();
        auth.auth_url = Some(keystone.auth_url.clone());
        match &keystone.credentials {
            Credentials::Password { username, password, project_name, user_domain_name, project_domain_name } => {
                auth.username = Some(username.clone());
                auth.password = Some(password.clone());
                auth.project_name = Some(project_name.clone());
                auth.user_domain_name = Some(user_domain_name.clone());
                auth.project_domain_name = Some(project_domain_name.clone());
                config.auth_type = Some("v3password".into());
            }
            Credentials::Application { id, secret } => {
                auth.application_credential_id = Some(id.clone());
                auth.application_credential_secret = Some(secret.clone());
                config.auth_type = Some("v3applicationcredential".into());
            }
        }
        let access = ConnectOptions {
            config,
            region: keystone.region_name.clone(),
            interface: match keystone.interface {
                Interface::Public => "public",
                Interface::Internal => "internal",
                Interface::Admin => "admin",
            }
            .into(),
            cafile: keystone.cafile.clone(),
            proxy: keystone.proxy.clone().map_or(Proxy::None, Proxy::Url),
            insecure: false,
            timeout: keystone.timeout,
            image_override: glance.endpoint_override.clone(),
            as_admin: true,
        };
        Ok(Self::new(HttpClient::new(access)?, glance.register))
    }

    /// Logs in if that has not happened yet.
    ///
    /// # Errors
    /// * [`ErrorKind::Unauthorized`]: Keystone refuses the credentials.
    /// * [`ErrorKind::Unavailable`]: it does not answer.
    /// * [`ErrorKind::Misconfigured`]: no region is configured, and the catalog has endpoints of several regions.
    pub async fn login(&self) -> Result<()> {
        let login = self.wire.login(None).await?;
        self.wire.check_region(&login)
    }

    /// Which cloud this is. Errors as of [`Self::login`].
    pub async fn cloud(&self) -> Result<CloudId> {
        let login = self.wire.login(None).await?;
        self.wire.check_region(&login)?;
        self.wire.cloud_of(&login, self.wire.region.as_deref())
    }

    /// Refuses to call the services of any other cloud than this one.
    pub fn expect_cloud(&self, cloud: CloudId) {
        // the first one stands
        let _ = self.wire.expected.set(cloud);
    }

    /// Names of the roles that our token carries.
    pub async fn roles(&self) -> Result<Vec<String>> {
        Ok(self.wire.login(None).await?.roles.clone())
    }

    /// Which of `image`, `block-storage` and `compute` the catalog has for our region and interface.
    pub async fn services(&self) -> Result<Vec<String>> {
        let login = self.wire.login(None).await?;
        Ok([Service::Image, Service::BlockStorage, Service::Compute]
            .into_iter()
            .filter(|service| self.wire.root(&login, *service, "").is_ok())
            .map(|service| service.official_type().to_owned())
            .collect())
    }

    /// Whether Keystone answers, without a login.
    pub async fn probe_identity(&self) -> Result<()> {
        self.wire.send(Request::get(Service::IdentityVersion, "version", &[])).await?.read::<IgnoredAny>().map(drop)
    }

    /// What time it is by Keystone's host, to the second; `None` when it does not say.
    pub async fn identity_time(&self) -> Result<Option<Timestamp>> {
        let answer = self.wire.send(Request::get(Service::IdentityVersion, "version", &[])).await?;
        Ok(answer.date.as_deref().and_then(|date| rfc2822::parse(date).ok()).map(|date| date.timestamp()))
    }

    /// Gives our token back to Keystone; the next call logs in again.
    pub async fn revoke(&self) -> Result<()> {
        self.wire.revoke().await
    }
}

/// The services that we call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Service {
    Identity,
    /// Keystone's version document, which takes no token.
    IdentityVersion,
    Image,
    BlockStorage,
    Compute,
}

impl Service {
    /// As errors name it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Identity | Self::IdentityVersion => "Keystone",
            Self::Image => "Glance",
            Self::BlockStorage => "Cinder",
            Self::Compute => "Nova",
        }
    }

    fn official_type(self) -> &'static str {
        match self {
            Self::Identity | Self::IdentityVersion => "identity",
            Self::Image => "image",
            Self::BlockStorage => "block-storage",
            Self::Compute => "compute",
        }
    }

    /// Types in the catalog that may be this service, the best first.
    fn types(self) -> &'static [&'static str] {
        match self {
            Self::Identity | Self::IdentityVersion => &["identity"],
            Self::Image => &["image"],
            Self::BlockStorage => &["block-storage", "volumev3", "block-store", "volume"],
            Self::Compute => &["compute"],
        }
    }

    /// The version's part of the path.
    fn version(self) -> &'static str {
        match self {
            Self::Identity | Self::IdentityVersion | Self::BlockStorage => "v3",
            Self::Image => "v2",
            Self::Compute => "v2.1",
        }
    }
}

/// One request. `path` are segments, encoded here.
#[derive(Debug)]
pub(super) struct Request<'a> {
    pub(super) service: Service,
    /// What is asked, for errors: `update image 1234`.
    pub(super) what: String,
    pub(super) method: Method,
    pub(super) path: &'a [&'a str],
    pub(super) query: Vec<(&'static str, String)>,
    pub(super) body: Option<(&'static str, Value)>,
    pub(super) microversion: Option<&'static str>,
    /// Only the last bytes of the answer are kept.
    tail: bool,
    /// Our token is sent as that of a service too.
    service_token: bool,
}

impl<'a> Request<'a> {
    pub(super) fn get(service: Service, what: impl Into<String>, path: &'a [&'a str]) -> Self {
        Self {
            service,
            what: what.into(),
            method: Method::GET,
            path,
            query: Vec::new(),
            body: None,
            microversion: None,
            tail: false,
            service_token: false,
        }
    }

    pub(super) fn send(method: Method, service: Service, what: impl Into<String>, path: &'a [&'a str]) -> Self {
        Self { method, ..Self::get(service, what, path) }
    }

    pub(super) fn query(mut self, query: Vec<(&'static str, String)>) -> Self {
        self.query = query;
        self
    }

    pub(super) fn body(mut self, content_type: &'static str, body: Value) -> Self {
        self.body = Some((content_type, body));
        self
    }

    pub(super) fn microversion(mut self, microversion: &'static str) -> Self {
        self.microversion = Some(microversion);
        self
    }

    /// Keeps only the end of the answer, which may then be longer than others.
    fn tail(mut self) -> Self {
        self.tail = true;
        self
    }

    /// Sends our token as that of a service too, where it has the role `service`. Some policies ask for the role there
    /// and nowhere else. A service that gets a service token without that role refuses the request.
    pub(super) fn with_service_token(mut self) -> Self {
        self.service_token = true;
        self
    }

    fn call(&self) -> String {
        format!("{}: {}", self.service.name(), self.what)
    }
}

/// A whole answer.
#[derive(Debug)]
pub(super) struct Response {
    pub(super) call: String,
    pub(super) status: StatusCode,
    /// The header `Date`.
    date: Option<String>,
    /// Every answer of a service has one; a proxy's own has none.
    has_request_id: bool,
    body: Vec<u8>,
}

impl Response {
    /// What the JSON body of a success says.
    pub(super) fn read<T: DeserializeOwned>(self) -> Result<T> {
        let Response { call, body, .. } = self.success()?;
        json::read(&call, &mut serde_json::Deserializer::from_slice(&body))
    }

    /// Like [`Response::read`], with `None` for 404.
    pub(super) fn read_if_found<T: DeserializeOwned>(self) -> Result<Option<T>> {
        if self.status == StatusCode::NOT_FOUND {
            return Ok(None);
        }
        self.read().map(Some)
    }

    /// The answer itself when it is a success, whatever its body.
    pub(super) fn success(self) -> Result<Self> {
        if self.status.is_success() { Ok(self) } else { Err(self.error()) }
    }

    /// The body of a success, as it is.
    pub(super) fn into_body(self) -> Result<Vec<u8>> {
        self.success().map(|answer| answer.body)
    }

    pub(super) fn error(&self) -> Error {
        Error::from_status(self.call.clone(), self.status, &self.body)
    }
}

/// What stands between us and the services.
#[derive(Debug, Clone)]
pub(super) enum Proxy {
    /// Nothing, whatever the environment says: a controller's environment is written for package downloads, and a
    /// proxy would see the token.
    None,
    /// `http_proxy`, `https_proxy`, `all_proxy` and `no_proxy`, as OpenStack's own clients read them.
    Environment,
    /// This URL.
    Url(String),
}

/// Whom to log in as, and how to reach the services.
pub(super) struct ConnectOptions {
    pub(super) config: CloudConfig,
    pub(super) region: Option<String>,
    pub(super) interface: String,
    pub(super) cafile: Option<std::path::PathBuf>,
    /// Do not verify certificates (a tenant's `verify: false`).
    pub(super) insecure: bool,
    pub(super) proxy: Proxy,
    /// Of one request.
    pub(super) timeout: Duration,
    pub(super) image_override: Option<String>,
    /// A 404 counts only while the login has the role admin.
    pub(super) as_admin: bool,
}

/// The connection to all services under one login.
pub(super) struct HttpClient {
    http: reqwest::Client,
    config: CloudConfig,
    /// Ends with `/v3/`.
    identity: Url,
    image_override: Option<Url>,
    as_admin: bool,
    region: Option<String>,
    interface: String,
    timeout: Duration,
    /// The only cloud whose services are called.
    expected: OnceLock<CloudId>,
    /// Holds the lock while a login is under way, so that there is one at a time.
    state: Mutex<State>,
}

impl std::fmt::Debug for HttpClient {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HttpClient")
            .field("identity", &self.identity.as_str())
            .field("region", &self.region)
            .field("interface", &self.interface)
            .finish_non_exhaustive()
    }
}

#[derive(Default)]
struct State {
    login: Option<Arc<AuthToken>>,
    failed: Option<(Instant, Error)>,
}

/// A token and what Keystone told with it.
pub(super) struct AuthToken {
    token: SecretString,
    header: HeaderValue,
    pub(super) project_id: Option<String>,
    roles: Vec<String>,
    endpoints: Vec<Endpoint>,
}

impl AuthToken {
    fn has_role(&self, name: &str) -> bool {
        self.roles.iter().any(|role| role.eq_ignore_ascii_case(name))
    }
}

/// An endpoint in the catalog.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Endpoint {
    service_type: String,
    interface: String,
    region: Option<String>,
    url: String,
}

impl HttpClient {
    pub(super) fn new(access: ConnectOptions) -> Result<Self> {
        let ConnectOptions { config, region, interface, cafile, insecure, proxy, timeout, image_override, as_admin } =
            access;
        let call = "Keystone: auth_url";
        let auth_url = config.auth.as_ref().and_then(|auth| auth.auth_url.clone());
        let auth_url = auth_url.ok_or_else(|| Error::new(call, ErrorKind::Misconfigured, "it is missing"))?;
        let identity = service_root(&auth_url, Service::Identity.version())
            .map_err(|reason| Error::new(call, ErrorKind::Misconfigured, format!("{auth_url:?} {reason}")))?;
        let image_override = image_override
            .map(|url| {
                service_root(&url, Service::Image.version()).map_err(|reason| {
                    Error::new("Glance: endpoint_override", ErrorKind::Misconfigured, format!("{url:?} {reason}"))
                })
            })
            .transpose()?;

        Ok(Self {
            http: http_client(cafile.as_deref(), insecure, &proxy, timeout)?,
            config,
            identity,
            image_override,
            as_admin,
            region,
            interface,
            timeout,
            expected: OnceLock::new(),
            state: Mutex::default(),
        })
    }

    /// The login in force; a new one where there is none or it is `stale`. Callers that wait share one attempt.
    pub(super) async fn login(&self, stale: Option<&Arc<AuthToken>>) -> Result<Arc<AuthToken>> {
        let asked = Instant::now();
        let mut state = self.state.lock().await;
        if let Some(login) = &state.login
            && !stale.is_some_and(|stale| Arc::ptr_eq(stale, login))
        {
            return Ok(login.clone());
        }
        if let Some((at, error)) = &state.failed {
            let shared = *at >= asked;
            let refused = error.kind() == ErrorKind::Unauthorized && at.elapsed() < REFUSED_PAUSE;
            if shared || refused {
                return Err(error.clone());
            }
        }
        *state = State::default();
        match self.authenticate().await {
            Ok(login) => {
                let login = Arc::new(login);
                state.login = Some(login.clone());
                Ok(login)
            }
            Err(error) => {
                state.failed = Some((Instant::now(), error.clone()));
                Err(error)
            }
        }
    }

    async fn authenticate(&self) -> Result<AuthToken> {
        const CALL: &str = "Keystone: login";
        let misconfigured = |reason: String| Error::new(CALL, ErrorKind::Misconfigured, reason);
        let plugin: &dyn OpenStackAuthType = match self.config.auth_type.as_deref() {
            Some("v3password") => &PasswordAuthenticator,
            Some("v3applicationcredential") => &ApplicationCredentialAuthenticator,
            Some("v3token") => &TokenAuthenticator,
            other => {
                return Err(misconfigured(format!(
                    "auth_type {:?} is not supported; password, application credential and token are",
                    other.unwrap_or_default()
                )));
            }
        };
        let scope = AuthTokenScope::try_from(&self.config).map_err(|error| misconfigured(error.to_string()))?;
        let auth = plugin
            .auth(&self.http, &self.identity, &credentials(&self.config), Some(&scope), None)
            .await
            .map_err(|error| self.login_error(&error))?;
        let Auth::AuthToken(auth) = auth else {
            return Err(Error::protocol(CALL, "the answer has no token"));
        };
        let token = auth.token;
        let info = auth.auth_info.ok_or_else(|| Error::protocol(CALL, "the answer tells nothing of the token"))?;
        let mut header = HeaderValue::from_str(token.expose_secret())
            .map_err(|_| Error::protocol(CALL, "the token is no header value"))?;
        header.set_sensitive(true);
        let info = info.token;
        let endpoints = info
            .catalog
            .unwrap_or_default()
            .into_iter()
            .flat_map(|service| {
                let service_type = service.service_type;
                service.endpoints.into_iter().map(move |endpoint| Endpoint {
                    service_type: service_type.clone(),
                    interface: endpoint.interface,
                    region: endpoint.region,
                    url: endpoint.url,
                })
            })
            .collect();
        tracing::debug!(expires_at = %info.expires_at, "logged in at Keystone");
        Ok(AuthToken {
            token,
            header,
            project_id: info.project.and_then(|project| project.id),
            roles: info.roles.unwrap_or_default().into_iter().map(|role| role.name).collect(),
            endpoints,
        })
    }

    fn timed_out(&self) -> String {
        format!("no answer within {} s", self.timeout.as_secs_f32())
    }

    fn login_error(&self, error: &AuthError) -> Error {
        const CALL: &str = "Keystone: login";
        let from_status = |code: u16, message: &str| {
            let status = StatusCode::from_u16(code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
            let error = Error::from_status(CALL, status, self.redact(message, None).as_bytes());
            match error.kind() {
                // the login lacks a field that Keystone needs
                ErrorKind::Refused if status == StatusCode::BAD_REQUEST => error.with_kind(ErrorKind::Misconfigured),
                // Keystone itself answers a login with no other refusal: a proxy in front of it answered
                ErrorKind::Refused => error.with_kind(ErrorKind::Unavailable),
                _ => error,
            }
        };
        match error {
            AuthError::Identity(said) => from_status(u16::try_from(said.code).unwrap_or(500), &said.message),
            AuthError::UnknownAuth { code, message } => from_status(*code, message.as_deref().unwrap_or_default()),
            AuthError::Reqwest { source } => {
                let json =
                    std::error::Error::source(source).and_then(|cause| cause.downcast_ref::<serde_json::Error>());
                match json {
                    Some(error) => Error::protocol(CALL, format!("the answer is no token: {error}")),
                    None => self.transport(CALL.into(), source),
                }
            }
            AuthError::AuthReceipt(_) => Error::new(
                CALL,
                ErrorKind::Unauthorized,
                "Keystone asks for a second factor; use an application credential",
            ),
            // What the plugin misses before it asks: a user, a domain, a secret.
            AuthError::Plugin { source } => {
                Error::new(CALL, ErrorKind::Misconfigured, shorten(&self.redact(&source.to_string(), None)))
            }
            other => Error::protocol(CALL, shorten(&self.redact(&other.to_string(), None))),
        }
    }

    fn transport(&self, call: String, error: &reqwest::Error) -> Error {
        if error.is_timeout() {
            return Error::new(call, ErrorKind::Unavailable, self.timed_out());
        }
        if error.is_builder() {
            return Error::new(call, ErrorKind::Refused, error_chain(error));
        }
        Error::new(call, ErrorKind::Unavailable, error_chain(error))
    }

    /// `text` without our secrets, should a service have echoed one.
    fn redact(&self, text: &str, login: Option<&AuthToken>) -> String {
        let mut text = text.to_owned();
        let token = login.map(|login| login.token.expose_secret());
        for secret in self.config.get_sensitive_values().into_iter().chain(token) {
            if !secret.is_empty() {
                text = text.replace(secret, "***");
            }
        }
        text
    }

    /// Where `service` is; ends with `/`.
    pub(super) fn root(&self, login: &AuthToken, service: Service, call: &str) -> Result<Url> {
        match (service, &self.image_override) {
            (Service::Identity, _) => return Ok(self.identity.clone()),
            (Service::Image, Some(url)) => return Ok(url.clone()),
            _ => {}
        }
        let endpoint = select_endpoint(&login.endpoints, service, self.region(), &self.interface)
            .map_err(|reason| Error::new(call, ErrorKind::NoService, reason))?;
        service_root(&endpoint.url, service.version()).map_err(|reason| {
            Error::new(call, ErrorKind::NoService, format!("the catalog's URL {:?} {reason}", endpoint.url))
        })
    }

    /// The configured region, else that of the cloud which the jobs belong to: a second region that the catalog gets
    /// later does not stop the daemons.
    fn region(&self) -> Option<&str> {
        self.region.as_deref().or_else(|| self.expected.get().and_then(|cloud| cloud.region.as_deref()))
    }

    /// The daemon never guesses which of several regions is its own.
    fn check_region(&self, login: &AuthToken) -> Result<()> {
        if self.region.is_some() {
            return Ok(());
        }
        for service in [Service::Image, Service::BlockStorage, Service::Compute] {
            let regions = regions_of(&login.endpoints, service, &self.interface);
            if regions.len() > 1 && !(service == Service::Image && self.image_override.is_some()) {
                return Err(Error::new(
                    "Keystone: catalog",
                    ErrorKind::Misconfigured,
                    several_regions(service, &regions),
                ));
            }
        }
        Ok(())
    }

    fn cloud_of(&self, login: &AuthToken, region: Option<&str>) -> Result<CloudId> {
        let project_id = login.project_id.clone();
        let project_id = project_id.ok_or_else(|| Error::protocol("Keystone: login", "the token is for no project"))?;
        let image = select_endpoint(&login.endpoints, Service::Image, region, &self.interface);
        let found = image.ok().and_then(|endpoint| endpoint.region.clone());
        Ok(CloudId { project_id, region: found.or_else(|| self.region.clone()) })
    }

    /// A job must not be worked on with the services of a cloud that it does not belong to.
    fn check_cloud(&self, login: &AuthToken, call: &str) -> Result<()> {
        let Some(expected) = self.expected.get() else { return Ok(()) };
        let own = self.cloud_of(login, self.region())?;
        if own == *expected {
            return Ok(());
        }
        let detail = format!("the jobs belong to another cloud ({expected}; this one is {own})");
        Err(Error::new(call, ErrorKind::Unavailable, detail))
    }

    /// Region of the service's endpoint.
    pub(super) fn region_of(&self, login: &AuthToken, service: Service) -> Option<String> {
        select_endpoint(&login.endpoints, service, self.region(), &self.interface)
            .ok()
            .and_then(|endpoint| endpoint.region.clone())
            .or_else(|| self.region().map(str::to_owned))
    }

    /// Sends the request and reads the whole answer, whatever its status. A 401 leads to one new login and one
    /// repetition; a GET that met a connection closed meanwhile is repeated once too.
    pub(super) async fn send(&self, request: Request<'_>) -> Result<Response> {
        if request.service == Service::IdentityVersion {
            return self.send_once(&request, self.identity.clone(), None).await;
        }
        let mut login = self.login(None).await?;
        let mut answer = self.attempt(&request, &login).await?;
        if answer.status == StatusCode::UNAUTHORIZED {
            login = self.login(Some(&login)).await?;
            answer = self.attempt(&request, &login).await?;
        }
        match answer.status {
            StatusCode::UNAUTHORIZED => Err(answer.error()),
            StatusCode::NOT_FOUND => self.confirm_absence(answer, request.service, &login),
            _ => Ok(answer),
        }
    }

    /// Accepts a 404 only as proof that the object does not exist. The daemon removes the objects of an image that is
    /// gone, so the answer must be the service's own, and the service must hide no object from the login.
    fn confirm_absence(&self, answer: Response, service: Service, login: &AuthToken) -> Result<Response> {
        if service == Service::Identity {
            return Ok(answer);
        }
        let why = if !answer.has_request_id {
            "this answer has no request id: it is that of a proxy in front of the service"
        } else if self.as_admin && !login.has_role("admin") {
            "the login has no role admin, so the service hides objects of other projects"
        } else {
            return Ok(answer);
        };
        Err(Error::new(answer.call, ErrorKind::Unavailable, format!("404 Not Found, but {why}")))
    }

    async fn attempt(&self, request: &Request<'_>, login: &AuthToken) -> Result<Response> {
        let call = request.call();
        self.check_cloud(login, &call)?;
        let mut url = self.root(login, request.service, &call)?;
        append(&mut url, request.path).map_err(|reason| Error::new(call, ErrorKind::Refused, reason))?;
        if !request.query.is_empty() {
            url.query_pairs_mut().extend_pairs(&request.query);
        }
        self.send_once(request, url, Some(login)).await
    }

    async fn send_once(&self, request: &Request<'_>, url: Url, login: Option<&AuthToken>) -> Result<Response> {
        let mut headers = HeaderMap::new();
        headers.insert(header::ACCEPT, HeaderValue::from_static("application/json"));
        if let Some(login) = login {
            headers.insert(X_AUTH_TOKEN.clone(), login.header.clone());
            if request.service_token && login.has_role("service") {
                headers.insert(X_SERVICE_TOKEN.clone(), login.header.clone());
            }
        }
        if let Some(microversion) = request.microversion {
            headers.insert(MICROVERSION.clone(), HeaderValue::from_static(microversion));
        }
        let mut body = None;
        if let Some((content_type, value)) = &request.body {
            headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
            body = Some(value.to_string());
        }
        let send = || {
            let mut builder = self.http.request(request.method.clone(), url.clone()).headers(headers.clone());
            if let Some(body) = &body {
                builder = builder.body(body.clone());
            }
            builder.send()
        };
        let mut response = send().await;
        if let Err(error) = &response
            && request.method == Method::GET
            && !error.is_timeout()
            && !error.is_connect()
            && !error.is_builder()
        {
            response = send().await;
        }
        let response = response.map_err(|error| self.transport(request.call(), &error))?;
        self.read(request.call(), response, login, request.tail).await
    }

    async fn read(
        &self,
        call: String,
        mut response: reqwest::Response,
        login: Option<&AuthToken>,
        tail: bool,
    ) -> Result<Response> {
        let (limit, mut length) = (if tail { DRAIN_LIMIT } else { BODY_LIMIT }, 0usize);
        let status = response.status();
        let has_request_id = response.headers().contains_key(&REQUEST_ID);
        let date = response.headers().get(header::DATE).and_then(|date| date.to_str().ok()).map(str::to_owned);
        let mut body = Vec::new();
        loop {
            match response.chunk().await {
                Ok(Some(chunk)) => {
                    length = length.saturating_add(chunk.len());
                    if length > limit {
                        let detail = format!("the answer is longer than {limit} bytes");
                        return Err(Error::new(call, ErrorKind::TooLarge, detail));
                    }
                    body.extend_from_slice(&chunk);
                    if tail && body.len() > 2 * TAIL {
                        body.drain(..body.len() - TAIL);
                    }
                }
                Ok(None) => break,
                Err(error) => return Err(self.transport(call, &error)),
            }
        }
        if !status.is_success() {
            body = self.redact(&String::from_utf8_lossy(&body), login).into_bytes();
        }
        tracing::trace!(call, status = status.as_u16(), bytes = body.len(), "answer");
        Ok(Response { call, status, date, has_request_id, body })
    }

    async fn revoke(&self) -> Result<()> {
        const CALL: &str = "Keystone: revoke our token";
        let Some(login) = self.state.lock().await.login.clone() else { return Ok(()) };
        let mut url = self.identity.clone();
        append(&mut url, &["auth", "tokens"]).map_err(|reason| Error::new(CALL, ErrorKind::Refused, reason))?;
        let response = self
            .http
            .delete(url)
            .header(X_AUTH_TOKEN.clone(), login.header.clone())
            .header(X_SUBJECT_TOKEN.clone(), login.header.clone())
            .send()
            .await
            .map_err(|error| self.transport(CALL.into(), &error))?;
        let answer = self.read(CALL.into(), response, Some(&login), false).await?;
        // 404 and 401: it was no longer valid.
        match answer.status {
            StatusCode::NOT_FOUND | StatusCode::UNAUTHORIZED => Ok(()),
            _ => answer.success().map(drop),
        }
    }

    /// The marker after the first item of a list whose item is too large to be read: the service names it at the end of
    /// its answer. `query` asks for one item.
    pub(super) async fn marker_after(
        &self,
        service: Service,
        what: &str,
        path: &[&str],
        query: &[(&'static str, String)],
    ) -> Result<String> {
        let answer = self.send(Request::get(service, what, path).query(query.to_vec()).tail()).await?.success()?;
        marker_of(&answer.body).ok_or_else(|| {
            let detail = "one item of the list is too large to be read, and the answer does not name the next one";
            Error::new(answer.call, ErrorKind::TooLarge, detail)
        })
    }
}

/// Where a list goes on, as the end of an answer tells it: `"next": "/v2/images?marker=<id>&…"`.
fn marker_of(tail: &[u8]) -> Option<String> {
    let text = String::from_utf8_lossy(tail);
    let (_, next) = text.rsplit_once("\"next\":")?;
    let path = next.trim_start().strip_prefix('"')?.split('"').next()?;
    let (_, query) = path.split_once('?')?;
    let marker = url::form_urlencoded::parse(query.as_bytes()).find(|(name, _)| name == "marker")?.1;
    (!marker.is_empty() && marker.len() <= 255).then(|| marker.into_owned())
}

/// What the plugins take, by their names.
fn credentials(config: &CloudConfig) -> HashMap<String, SecretString> {
    let Some(auth) = &config.auth else { return HashMap::new() };
    let plain = |value: &Option<String>| value.clone().map(SecretString::from);
    [
        ("username", plain(&auth.username)),
        ("user_id", plain(&auth.user_id)),
        ("user_domain_name", plain(&auth.user_domain_name)),
        ("user_domain_id", plain(&auth.user_domain_id)),
        ("password", auth.password.clone()),
        ("token", auth.token.clone()),
        ("application_credential_id", plain(&auth.application_credential_id)),
        ("application_credential_secret", auth.application_credential_secret.clone()),
    ]
    .into_iter()
    .filter_map(|(name, value)| Some((name.to_owned(), value?)))
    .collect()
}

fn http_client(cafile: Option<&Path>, insecure: bool, proxy: &Proxy, timeout: Duration) -> Result<reqwest::Client> {
    let mut builder = reqwest::Client::builder()
        .timeout(timeout)
        .connect_timeout(timeout)
        .pool_idle_timeout(IDLE_CONNECTION)
        .user_agent(USER_AGENT)
        // A redirect would carry the token to another host.
        .redirect(reqwest::redirect::Policy::none())
        .tls_danger_accept_invalid_certs(insecure);
    builder = match proxy {
        Proxy::None => builder.no_proxy(),
        Proxy::Environment => builder,
        Proxy::Url(url) => {
            let misconfigured =
                |error: reqwest::Error| Error::new("proxy", ErrorKind::Misconfigured, error_chain(&error));
            builder.proxy(reqwest::Proxy::all(url).map_err(misconfigured)?)
        }
    };
    if let Some(path) = cafile {
        let call = "TLS: cafile";
        let pem = std::fs::read(path).map_err(|error| {
            Error::new(call, ErrorKind::Misconfigured, format!("{} cannot be read: {error}", path.display()))
        })?;
        let certificates = reqwest::Certificate::from_pem_bundle(&pem)
            .ok()
            .filter(|certificates| !certificates.is_empty())
            .ok_or_else(|| {
                Error::new(call, ErrorKind::Misconfigured, format!("{} holds no PEM certificate", path.display()))
            })?;
        for certificate in certificates {
            builder = builder.add_root_certificate(certificate);
        }
    }
    builder.build().map_err(|error| Error::new("TLS", ErrorKind::Misconfigured, error_chain(&error)))
}

/// The host and the causes of a failed request. reqwest's own text stops at the first cause, and has the whole URL.
fn error_chain(error: &reqwest::Error) -> String {
    let mut texts: Vec<String> = Vec::new();
    let mut next: Option<&dyn std::error::Error> = std::error::Error::source(error);
    while let Some(cause) = next {
        let text = cause.to_string();
        if !texts.iter().any(|known| known.contains(&text)) {
            texts.push(text);
        }
        next = cause.source();
    }
    match (texts.is_empty(), error.url().and_then(Url::host_str)) {
        (true, _) => "the request failed".into(),
        (false, Some(host)) => {
            let port = error.url().and_then(Url::port_or_known_default).unwrap_or_default();
            shorten(&format!("{host}:{port}: {}", texts.join(": ")))
        }
        (false, None) => shorten(&texts.join(": ")),
    }
}

/// Whether the endpoint may be one of `service`, of the version that we speak.
fn serves(endpoint: &Endpoint, service: Service) -> bool {
    // "volume" and "block-store" may still be the API before v3.
    let old = service == Service::BlockStorage && version_segment(&endpoint.url).is_some_and(|version| version != "v3");
    service.types().contains(&endpoint.service_type.as_str()) && !old
}

/// The regions in which the service has endpoints of the interface.
fn regions_of<'a>(endpoints: &'a [Endpoint], service: Service, interface: &str) -> BTreeSet<&'a str> {
    let of_service = endpoints.iter().filter(|endpoint| endpoint.interface == interface && serves(endpoint, service));
    of_service.filter_map(|endpoint| endpoint.region.as_deref()).collect()
}

fn several_regions(service: Service, regions: &BTreeSet<&str>) -> String {
    let names: Vec<&str> = regions.iter().copied().collect();
    let (service, names) = (service.official_type(), shorten(&names.join(", ")));
    format!("the catalog has endpoints of {service} in several regions ({names}): set region_name to one of them")
}

/// The service's endpoint for the interface and region; else why there is none. Without a region, all its endpoints
/// must be in one.
fn select_endpoint<'a>(
    endpoints: &'a [Endpoint],
    service: Service,
    region: Option<&str>,
    interface: &str,
) -> std::result::Result<&'a Endpoint, String> {
    let regions = regions_of(endpoints, service, interface);
    if region.is_none() && regions.len() > 1 {
        return Err(several_regions(service, &regions));
    }
    let mut seen = Vec::new();
    for service_type in service.types() {
        for endpoint in endpoints.iter().filter(|endpoint| endpoint.service_type == *service_type) {
            let fits = endpoint.interface == interface
                && region.is_none_or(|region| endpoint.region.as_deref() == Some(region));
            if fits && serves(endpoint, service) {
                return Ok(endpoint);
            }
            seen.push(format!(
                "{}{}",
                endpoint.interface,
                endpoint.region.as_ref().map(|region| format!(" in {region}")).unwrap_or_default()
            ));
        }
    }
    let wanted = format!(
        "{}, interface {interface}{}",
        service.official_type(),
        region.map(|region| format!(", region {region}")).unwrap_or_default()
    );
    seen.sort();
    seen.dedup();
    Err(match seen.is_empty() {
        true => format!("the catalog has no {wanted}"),
        false => format!("the catalog has no {wanted}; there is {}", shorten(&seen.join(", "))),
    })
}

fn is_version(segment: &str) -> bool {
    let Some(number) = segment.strip_prefix('v') else { return false };
    number.starts_with(|c: char| c.is_ascii_digit()) && number.chars().all(|c| c.is_ascii_digit() || c == '.')
}

fn version_segment(url: &str) -> Option<String> {
    let url = Url::parse(url).ok()?;
    url.path_segments()?.rfind(|segment| is_version(segment)).map(str::to_owned)
}

/// The service's root for `version` out of an endpoint's URL: with or without a version, with a path before it and a
/// project id after it. Ends with `/`.
fn service_root(url: &str, version: &str) -> std::result::Result<Url, String> {
    let mut parsed = Url::parse(url.trim()).map_err(|error| format!("is no URL: {error}"))?;
    if !matches!(parsed.scheme(), "http" | "https") || parsed.host_str().is_none() {
        return Err("is no http URL".into());
    }
    parsed.set_query(None);
    parsed.set_fragment(None);
    let mut segments: Vec<String> = parsed
        .path_segments()
        .map(|segments| segments.filter(|segment| !segment.is_empty()).map(str::to_owned).collect())
        .unwrap_or_default();
    match segments.iter_mut().rfind(|segment| is_version(segment)) {
        Some(segment) => *segment = version.to_owned(),
        None => segments.push(version.to_owned()),
    }
    // The segments are encoded already.
    parsed.set_path(&format!("/{}/", segments.join("/")));
    Ok(parsed)
}

/// Adds path segments. One that is empty or would climb is refused: ids come from outside.
fn append(url: &mut Url, path: &[&str]) -> std::result::Result<(), String> {
    if let Some(bad) = path.iter().find(|segment| matches!(**segment, "" | "." | "..") || segment.len() > 255) {
        return Err(format!("{:?} is no id", shorten(bad)));
    }
    let mut segments = url.path_segments_mut().map_err(|()| "the URL has no path".to_owned())?;
    segments.pop_if_empty().extend(path);
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

    use proptest::prelude::*;
    use serde_json::json;

    use super::super::fake::{base_of, serve, token, wire};
    use super::*;

    #[test]
    fn a_marker_is_read_from_the_end_of_an_answer() {
        let body = br#"\u00e9"}], "first": "/v2/images?limit=1", "next": "/v2/images?marker=a-1&limit=1"}"#;
        assert_eq!(marker_of(body).as_deref(), Some("a-1"));
        for body in [&b"{}"[..], b"", br#""next": null}"#, br#""next": "/v2/images?limit=1""#, br#""next": "?marker=""#]
        {
            assert_eq!(marker_of(body), None);
        }
    }

    fn endpoint(service_type: &str, interface: &str, region: &str, url: &str) -> Endpoint {
        Endpoint {
            service_type: service_type.into(),
            interface: interface.into(),
            region: Some(region.into()),
            url: url.into(),
        }
    }

    #[test]
    fn the_service_root_is_found_in_any_endpoint() {
        for (url, version, root) in [
            ("http://k:5000", "v3", "http://k:5000/v3/"),
            ("http://k:5000/v3", "v3", "http://k:5000/v3/"),
            ("http://k:5000/v3/", "v3", "http://k:5000/v3/"),
            ("https://host/identity", "v3", "https://host/identity/v3/"),
            ("http://k:5000/v2.0", "v3", "http://k:5000/v3/"),
            ("https://host/image", "v2", "https://host/image/v2/"),
            ("https://host/image/v2", "v2", "https://host/image/v2/"),
            ("http://g:9292/v1", "v2", "http://g:9292/v2/"),
            ("http://c:8776/v3/0123abcd", "v3", "http://c:8776/v3/0123abcd/"),
            ("http://c:8776/v3", "v3", "http://c:8776/v3/"),
            ("http://n:8774/v2/0123abcd", "v2.1", "http://n:8774/v2.1/0123abcd/"),
            ("https://host/compute/v2.1", "v2.1", "https://host/compute/v2.1/"),
            ("http://[::1]:9292//", "v2", "http://[::1]:9292/v2/"),
        ] {
            assert_eq!(service_root(url, version).unwrap().as_str(), root, "{url}");
        }
        for url in ["", "image", "ftp://host/", "http://", "mailto:x@y"] {
            assert!(service_root(url, "v2").is_err(), "{url}");
        }
    }

    fn find<'a>(
        catalog: &'a [Endpoint],
        service: Service,
        region: Option<&str>,
        interface: &str,
    ) -> std::result::Result<&'a str, String> {
        select_endpoint(catalog, service, region, interface).map(|found| found.url.as_str())
    }

    #[test]
    fn the_catalog_is_searched_by_type_region_and_interface() {
        let catalog = [
            endpoint("volumev2", "public", "one", "http://c/v2/p"),
            endpoint("volume", "public", "one", "http://c/v2/p"),
            endpoint("volumev3", "public", "one", "http://c/v3/p"),
            endpoint("image", "public", "one", "http://g1"),
            endpoint("image", "internal", "two", "http://g2"),
        ];
        assert_eq!(find(&catalog, Service::BlockStorage, None, "public"), Ok("http://c/v3/p"));
        assert_eq!(find(&catalog, Service::Image, Some("two"), "internal"), Ok("http://g2"));
        assert_eq!(
            find(&catalog, Service::Image, Some("two"), "public").unwrap_err(),
            "the catalog has no image, interface public, region two; there is internal in two, public in one"
        );
        assert_eq!(
            find(&catalog, Service::Compute, None, "public").unwrap_err(),
            "the catalog has no compute, interface public"
        );

        let catalog = [
            endpoint("image", "public", "two", "http://g2"),
            endpoint("image", "public", "one", "http://g1"),
            endpoint("image", "internal", "one", "http://g1:1"),
            endpoint("volume", "public", "two", "http://c/v2/p"),
            endpoint("volumev3", "public", "one", "http://c/v3/p"),
        ];
        assert_eq!(
            find(&catalog, Service::Image, None, "public").unwrap_err(),
            "the catalog has endpoints of image in several regions (one, two): set region_name to one of them"
        );
        assert_eq!(find(&catalog, Service::Image, Some("one"), "public"), Ok("http://g1"));
        assert_eq!(find(&catalog, Service::Image, None, "internal"), Ok("http://g1:1"));
        assert_eq!(
            find(&catalog, Service::BlockStorage, None, "public"),
            Ok("http://c/v3/p"),
            "of the version that we speak"
        );
    }

    #[tokio::test]
    async fn of_several_regions_none_is_guessed() {
        let second = Arc::new(AtomicBool::new(true));
        let seen = second.clone();
        let url = serve(move |head| match head.starts_with("POST /v3/auth/tokens") {
            true => {
                let (status, headers, body) = token(&base_of(head), "t")?;
                let mut body: serde_json::Value = serde_json::from_str(&body).unwrap();
                if seen.load(Ordering::SeqCst) {
                    let other = json!({"id": "g", "interface": "internal", "region": "Q", "url": "http://127.0.0.1:1"});
                    body["token"]["catalog"][0]["endpoints"].as_array_mut().unwrap().insert(0, other);
                }
                Some((status, headers, body.to_string()))
            }
            false => Some((200, String::new(), "{}".into())),
        })
        .await;
        let session = |region: Option<&str>| {
            let mut wire = wire(&url, 5 * SECOND);
            wire.region = region.map(str::to_owned);
            Session::new(wire, Register::Auto)
        };
        let unclear = session(None);
        for error in [unclear.login().await.unwrap_err(), unclear.cloud().await.unwrap_err()] {
            assert_eq!(error.kind(), ErrorKind::Misconfigured);
            assert!(error.to_string().contains("(Q, R): set region_name"), "{error}");
        }
        assert_eq!(crate::openstack::Cloud::image(&unclear, "1").await.unwrap_err().kind(), ErrorKind::NoService);
        assert_eq!(session(Some("R")).cloud().await.unwrap().region.as_deref(), Some("R"));

        // the region of the cloud that the jobs belong to, once that is known
        second.store(false, Ordering::SeqCst);
        let known = session(None);
        let cloud = known.cloud().await.unwrap();
        assert_eq!(cloud.region.as_deref(), Some("R"));
        known.expect_cloud(cloud);
        second.store(true, Ordering::SeqCst);
        let login = known.wire.login(None).await.unwrap();
        let login = known.wire.login(Some(&login)).await.unwrap();
        known.wire.check_cloud(&login, "get image 1").unwrap();
        assert!(known.wire.root(&login, Service::Image, "get image 1").unwrap().as_str().starts_with(&url));
        assert_eq!(known.login().await.unwrap_err().kind(), ErrorKind::Misconfigured, "the next start refuses");
    }

    #[test]
    fn an_id_cannot_leave_its_path_segment() {
        let mut url = Url::parse("http://g/v2/").unwrap();
        for bad in ["", ".", ".."] {
            assert!(append(&mut url, &["images", bad]).is_err(), "{bad:?}");
        }
        append(&mut url, &["images", "../a b?x#y"]).unwrap();
        assert_eq!(url.as_str(), "http://g/v2/images/..%2Fa%20b%3Fx%23y");
    }

    proptest! {
        #[test]
        fn any_id_stays_one_path_segment(id in ".{1,60}") {
            let mut url = Url::parse("http://g/v2/").unwrap();
            if append(&mut url, &["images", &id]).is_ok() {
                prop_assert_eq!(url.path_segments().unwrap().count(), 3);
                prop_assert!(url.query().is_none() && url.fragment().is_none());
            }
        }

        #[test]
        fn no_catalog_breaks_it(url in ".{0,60}") {
            if let Ok(root) = service_root(&url, "v2") {
                prop_assert!(root.path().ends_with("/v2/") || root.path().contains("/v2/"));
            }
        }
    }

    const SECOND: Duration = Duration::from_secs(1);

    fn get_image(path: &'static [&'static str]) -> Request<'static> {
        Request::get(Service::Image, "get image 1", path)
    }

    #[tokio::test]
    async fn a_401_leads_to_one_new_login() {
        let logins = Arc::new(AtomicUsize::new(0));
        let count = logins.clone();
        let url = serve(move |head| {
            if head.starts_with("POST /v3/auth/tokens") {
                let number = count.fetch_add(1, Ordering::SeqCst);
                token(&base_of(head), &format!("token-{number}"))
            } else if head.contains("x-auth-token: token-0") {
                Some((401, String::new(), "{}".into()))
            } else {
                assert!(head.starts_with("GET /image/v2/images/1 "), "{head}");
                Some((200, String::new(), r#"{"id": "1"}"#.into()))
            }
        })
        .await;
        let wire = wire(&url, SECOND * 5);
        let asked = futures::future::join_all((0..4).map(|_| wire.send(get_image(&["images", "1"])))).await;
        for answer in asked {
            assert_eq!(answer.unwrap().read::<Value>().unwrap(), json!({"id": "1"}));
        }
        assert_eq!(logins.load(Ordering::SeqCst), 2);
    }

    #[tokio::test]
    async fn every_way_of_login_works() {
        let url = serve(|head| token(&base_of(head), "t")).await;
        for kind in ["v3password", "v3applicationcredential", "v3token"] {
            let mut wire = wire(&url, SECOND * 5);
            wire.config.auth_type = Some(kind.to_owned());
            let auth = wire.config.auth.get_or_insert_default();
            auth.application_credential_id = Some("i".into());
            auth.application_credential_secret = Some("s".into());
            auth.token = Some("t".into());
            let login = wire.login(None).await.map(drop);
            assert!(login.is_ok(), "{kind}: {login:?}");
        }
    }

    #[tokio::test]
    async fn a_404_counts_only_from_the_service_itself_and_for_an_administrator() {
        let role = Arc::new(std::sync::Mutex::new("admin"));
        let (by_proxy, given) = (Arc::new(AtomicBool::new(true)), role.clone());
        let behind = by_proxy.clone();
        let url = serve(move |head| match head.starts_with("POST /v3/auth/tokens") {
            true => {
                let (status, headers, body) = token(&base_of(head), "t")?;
                Some((status, headers, body.replace("\"admin\"", &format!("\"{}\"", given.lock().unwrap()))))
            }
            false if behind.load(Ordering::SeqCst) => {
                Some((404, "via: 1.1 ingress\r\n".into(), "default backend".into()))
            }
            false => Some((404, String::new(), "no image".into())),
        })
        .await;
        let session = || Session::new(wire(&url, 5 * SECOND), Register::Auto);
        let image = async |session: &Session| crate::openstack::Cloud::image(session, "1").await;
        let kind = |found: Result<Option<crate::openstack::Image>>| found.map_err(|error| error.kind());

        assert_eq!(kind(image(&session()).await), Err(ErrorKind::Unavailable));
        by_proxy.store(false, Ordering::SeqCst);
        assert_eq!(kind(image(&session()).await), Ok(None));
        // Glance hides other projects' images from such a login
        *role.lock().unwrap() = "member";
        let error = image(&session()).await.unwrap_err();
        assert!(error.kind() == ErrorKind::Unavailable && error.to_string().contains("no role admin"), "{error}");
        // a tenant's own login sees what is the tenant's
        let mut tenant = wire(&url, 5 * SECOND);
        tenant.as_admin = false;
        assert_eq!(kind(image(&Session::new(tenant, Register::Auto)).await), Ok(None));
    }

    #[tokio::test]
    async fn a_login_that_a_proxy_answers_says_nothing_of_the_configuration() {
        for (status, kind) in [
            (404, ErrorKind::Unavailable),
            (405, ErrorKind::Unavailable),
            (400, ErrorKind::Misconfigured),
            (401, ErrorKind::Unauthorized),
        ] {
            let url = serve(move |_| Some((status, String::new(), "default backend".into()))).await;
            let error = wire(&url, SECOND * 5).login(None).await.map(drop).unwrap_err();
            assert_eq!(error.kind(), kind, "{status}: {error}");
        }
    }

    #[tokio::test]
    async fn a_malformed_login_response_is_reported() {
        let url = serve(|_| Some((201, "x-subject-token: t\r\n".into(), r#"{"token": []}"#.into()))).await;
        let error = wire(&url, SECOND * 5).login(None).await.map(drop).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Protocol, "{error}");
        let mut other = wire(&url, SECOND * 5);
        other.config.auth_type = Some("v3websso".to_owned());
        let error = other.login(None).await.map(drop).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Misconfigured, "{error}");
    }

    #[tokio::test]
    async fn refused_credentials_are_not_tried_at_once_again() {
        let logins = Arc::new(AtomicUsize::new(0));
        let count = logins.clone();
        let url = serve(move |_| {
            count.fetch_add(1, Ordering::SeqCst);
            let body = json!({"error": {"code": 401, "message": "no, not pass-word-1", "title": "Unauthorized"}});
            Some((401, String::new(), body.to_string()))
        })
        .await;
        let wire = wire(&url, SECOND * 5);
        for _ in 0..3 {
            let error = wire.send(get_image(&["images", "1"])).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Unauthorized);
            assert_eq!(error.to_string(), "Keystone: login: 401 Unauthorized: no, not ***");
            assert!(!format!("{error:?} {wire:?}").contains("pass-word-1"));
        }
        assert_eq!(logins.load(Ordering::SeqCst), 1);
    }

    #[tokio::test]
    async fn a_silent_keystone_costs_all_callers_one_timeout() {
        let url = serve(|_| None).await;
        let wire = wire(&url, SECOND);
        let begun = Instant::now();
        let asked = futures::future::join_all((0..5).map(|_| wire.login(None))).await;
        assert!(asked.iter().all(|login| login.as_ref().is_err_and(|error| error.kind() == ErrorKind::Unavailable)));
        assert!(begun.elapsed() < SECOND * 2, "{:?}", begun.elapsed());
    }

    #[tokio::test]
    async fn a_keystone_behind_a_proxy_that_is_down_is_unavailable() {
        let url = serve(|_| {
            Some((503, String::new(), "<html><body><h1>503 Service Unavailable</h1>No server</body></html>".into()))
        })
        .await;
        let error = wire(&url, SECOND).login(None).await.map(drop).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unavailable);
        assert_eq!(error.to_string(), "Keystone: login: 503 Service Unavailable: No server");
    }

    #[tokio::test]
    async fn answers_are_bounded_and_echo_no_token() {
        let url = serve(|head| {
            if head.starts_with("POST /v3/auth/tokens") {
                token(&base_of(head), "the-token")
            } else if head.contains("/images/long") {
                Some((200, String::new(), " ".repeat(BODY_LIMIT + 1)))
            } else if head.contains("/images/moved") {
                Some((302, "location: http://127.0.0.1:1/\r\n".into(), String::new()))
            } else {
                Some((500, String::new(), "failed for the-token".into()))
            }
        })
        .await;
        let wire = wire(&url, SECOND * 20);
        let error = wire.send(get_image(&["images", "long"])).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TooLarge);
        let error = wire.send(get_image(&["images", "1"])).await.unwrap().read::<Value>().unwrap_err();
        assert_eq!(error.to_string(), "Glance: get image 1: 500 Internal Server Error: failed for ***");
        let error = wire.send(get_image(&["images", "moved"])).await.unwrap().read::<Value>().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Protocol);
    }
}
