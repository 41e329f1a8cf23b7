//! A tenant's own client for `rbd-offload request`: credentials from `OS_*` variables or `clouds.yaml`.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use http::{Method, StatusCode};
use openstack_sdk_core::config::{CloudConfig, ConfigFile};
use secrecy::SecretString;
use serde::Deserialize;
use serde_json::{Value, json};

use super::error::{Error, ErrorKind, Result, shorten};
use super::session::{ConnectOptions, HttpClient, Proxy, Request, Service};
use super::{Image, Server, Volume, VolumeSnapshot, image, is_reserved, limits, server, volume};

/// Of one request.
const TIMEOUT: Duration = Duration::from_secs(30);

const CALL: &str = "credentials";

/// What a project's images may take, and take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ImageSizeUsage {
    /// Bytes.
    pub limit: u64,
    /// Bytes.
    pub used: u64,
}

#[derive(Deserialize)]
struct UsageAnswer {
    #[serde(default)]
    usage: BTreeMap<String, Usage>,
}

#[derive(Deserialize)]
struct Usage {
    /// -1: no limit.
    limit: i64,
    usage: i64,
}

impl UsageAnswer {
    fn image_size(&self) -> Option<ImageSizeUsage> {
        let found = self.usage.get(limits::RESOURCE)?;
        Some(ImageSizeUsage { limit: limits::bytes(found.limit)?, used: limits::bytes(found.usage).unwrap_or(0) })
    }
}

/// The cloud with the credentials of the user who runs the command.
#[derive(Debug)]
pub struct Tenant {
    wire: HttpClient,
}

impl Tenant {
    /// From the cloud `os_cloud` (or `OS_CLOUD`) of `clouds.yaml`, else from the `OS_*` variables that the `openstack`
    /// command takes too.
    pub fn from_env(os_cloud: Option<&str>) -> Result<Self> {
        Self::from_vars(os_cloud, |name| std::env::var(name).ok())
    }

    /// [`Tenant::from_env`] with the variables that `var` gives.
    pub fn from_vars(os_cloud: Option<&str>, var: impl Fn(&str) -> Option<String>) -> Result<Self> {
        let var = |name: &str| var(name).filter(|value| !value.is_empty());
        let cloud = os_cloud.map(str::to_owned).or_else(|| var("OS_CLOUD"));
        let config = match cloud {
            Some(name) => from_file(&name, var("OS_CLIENT_CONFIG_FILE").map(PathBuf::from))?,
            None => from_variables(&var)?,
        };
        let config = complete(config);
        let access = ConnectOptions {
            region: config.region_name.clone(),
            interface: plain_interface(config.interface.as_deref()),
            cafile: config.cacert.clone().map(PathBuf::from),
            insecure: config.verify == Some(false),
            // the tenant's machine may reach the cloud only through the proxy of its environment
            proxy: Proxy::Environment,
            timeout: TIMEOUT,
            image_override: config.options.get("image_endpoint_override").map(ToString::to_string),
            as_admin: false,
            config,
        };
        Ok(Self { wire: HttpClient::new(access)? })
    }

    /// Creates a queued record, raw and bare, owned by the tenant's project.
    pub async fn create_image(
        &self,
        name: &str,
        tags: &[String],
        properties: &BTreeMap<String, String>,
    ) -> Result<Image> {
        const WHAT: &str = "create image";
        let mut record = json!({
            "name": name, "tags": tags, "disk_format": "raw", "container_format": "bare", "visibility": "private",
        });
        for (property, value) in properties {
            if is_reserved(property) {
                return Err(Error::new(
                    format!("Glance: {WHAT}"),
                    ErrorKind::Refused,
                    format!("{property:?} is one of Glance's own attributes, not a property"),
                ));
            }
            record[property.as_str()] = Value::from(value.as_str());
        }
        let request = Request::send(Method::POST, Service::Image, WHAT, &["images"]).body(image::JSON, record);
        self.wire.send(request).await?.read()
    }

    /// `None` when there is no such image, or not for this tenant.
    pub async fn image(&self, id: &str) -> Result<Option<Image>> {
        image::get(&self.wire, id).await
    }

    /// Whether it was there.
    pub async fn delete_image(&self, id: &str) -> Result<bool> {
        let path = ["images", id];
        let request = Request::send(Method::DELETE, Service::Image, format!("delete image {id}"), &path);
        let answer = self.wire.send(request).await?;
        match answer.status {
            StatusCode::NOT_FOUND => Ok(false),
            _ => answer.success().map(|_| true),
        }
    }

    /// `None` when there is no such volume, or not for this tenant.
    pub async fn volume(&self, id: &str) -> Result<Option<Volume>> {
        volume::get(&self.wire, id).await
    }

    /// `None` when there is no such snapshot, or not for this tenant.
    pub async fn snapshot(&self, id: &str) -> Result<Option<VolumeSnapshot>> {
        volume::get_snapshot(&self.wire, id).await
    }

    /// `None` when there is no such server, or not for this tenant.
    pub async fn server(&self, id: &str) -> Result<Option<Server>> {
        server::get(&self.wire, id).await
    }

    /// The limit `image_size_total` of the tenant's project. `None` where Glance has no limits, or cannot tell them
    /// (before Glance 23).
    pub async fn image_size_usage(&self) -> Result<Option<ImageSizeUsage>> {
        let request = Request::get(Service::Image, "get usage", &["info", "usage"]);
        let answer = self.wire.send(request).await?;
        Ok(answer.read_if_found::<UsageAnswer>()?.and_then(|answer| answer.image_size()))
    }

    /// Id of the project that the credentials are for.
    pub async fn project_id(&self) -> Result<Option<String>> {
        Ok(self.wire.login(None).await?.project_id.clone())
    }
}

fn from_file(name: &str, clouds: Option<PathBuf>) -> Result<CloudConfig> {
    let failed = |error: &dyn fmt::Display| {
        Error::new(CALL, ErrorKind::Misconfigured, format!("clouds.yaml: {}", shorten(&error.to_string())))
    };
    ConfigFile::new_with_user_specified_configs(clouds, None::<PathBuf>)
        .map_err(|error| failed(&error))?
        .get_cloud_config(name)
        .map_err(|error| failed(&error))?
        .ok_or_else(|| failed(&format!("there is no cloud {name:?}")))
}

fn from_variables(var: &impl Fn(&str) -> Option<String>) -> Result<CloudConfig> {
    let mut config = CloudConfig::default();
    let auth = config.auth.get_or_insert_default();
    let secret = |name: &str| var(name).map(SecretString::from);
    auth.auth_url = var("OS_AUTH_URL");
    auth.username = var("OS_USERNAME");
    auth.user_id = var("OS_USER_ID");
    auth.password = secret("OS_PASSWORD");
    auth.token = secret("OS_TOKEN");
    auth.project_id = var("OS_PROJECT_ID").or_else(|| var("OS_TENANT_ID"));
    auth.project_name = var("OS_PROJECT_NAME").or_else(|| var("OS_TENANT_NAME"));
    let domain_id = var("OS_DEFAULT_DOMAIN_ID").or_else(|| var("OS_DEFAULT_DOMAIN"));
    let domain_name = var("OS_DEFAULT_DOMAIN_NAME");
    auth.user_domain_name = var("OS_USER_DOMAIN_NAME").or_else(|| domain_name.clone());
    auth.user_domain_id = var("OS_USER_DOMAIN_ID").or_else(|| domain_id.clone());
    auth.project_domain_name = var("OS_PROJECT_DOMAIN_NAME").or(domain_name);
    auth.project_domain_id = var("OS_PROJECT_DOMAIN_ID").or(domain_id);
    auth.application_credential_id = var("OS_APPLICATION_CREDENTIAL_ID");
    auth.application_credential_secret = secret("OS_APPLICATION_CREDENTIAL_SECRET");
    if auth.auth_url.is_none() {
        return Err(Error::new(
            CALL,
            ErrorKind::Misconfigured,
            "neither OS_CLOUD nor OS_AUTH_URL is set; source an openrc file or name a cloud of clouds.yaml",
        ));
    }
    config.auth_type = var("OS_AUTH_TYPE");
    config.interface = var("OS_INTERFACE").or_else(|| var("OS_ENDPOINT_TYPE"));
    config.region_name = var("OS_REGION_NAME");
    config.cacert = var("OS_CACERT");
    if var("OS_INSECURE").is_some_and(|value| value.eq_ignore_ascii_case("true") || value == "1") {
        config.verify = Some(false);
    }
    Ok(config)
}

/// The kind of login by what is there, in the SDK's words, and the default domain where none is named.
fn complete(mut config: CloudConfig) -> CloudConfig {
    let kind = config.auth_type.as_deref().unwrap_or_default().replace('_', "");
    let auth = config.auth.get_or_insert_default();
    let kind = match kind.as_str() {
        "" | "password" | "v3password" | "token" | "v3token" | "applicationcredential" | "v3applicationcredential" => {
            if auth.application_credential_id.is_some() {
                "v3applicationcredential"
            } else if auth.token.is_some() && auth.password.is_none() {
                "v3token"
            } else {
                "v3password"
            }
        }
        _ => return config,
    };
    match kind {
        // Bound to its project: Keystone refuses a scope.
        "v3applicationcredential" => {
            auth.project_id = None;
            auth.project_name = None;
        }
        _ => {
            if auth.user_id.is_none() && auth.user_domain_id.is_none() && auth.user_domain_name.is_none() {
                auth.user_domain_id = Some("default".into());
            }
            if auth.project_name.is_some() && auth.project_domain_id.is_none() && auth.project_domain_name.is_none() {
                auth.project_domain_id = Some("default".into());
            }
        }
    }
    config.auth_type = Some(kind.into());
    config
}

/// `internalURL` is the old spelling of `internal`.
fn plain_interface(name: Option<&str>) -> String {
    let name = name.unwrap_or("public");
    name.strip_suffix("URL").unwrap_or(name).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(pairs: &[(&str, &str)]) -> CloudConfig {
        let var = |name: &str| pairs.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned());
        complete(from_variables(&var).unwrap())
    }

    #[test]
    fn the_kind_of_login_follows_from_what_is_set() {
        let url = ("OS_AUTH_URL", "http://k:5000/v3");
        let password = config(&[url, ("OS_USERNAME", "u"), ("OS_PASSWORD", "p"), ("OS_PROJECT_NAME", "x")]);
        assert_eq!(password.auth_type.as_deref(), Some("v3password"));
        assert_eq!(password.auth.unwrap().user_domain_id.as_deref(), Some("default"));
        let credential = config(&[
            url,
            ("OS_AUTH_TYPE", "v3applicationcredential"),
            ("OS_APPLICATION_CREDENTIAL_ID", "i"),
            ("OS_APPLICATION_CREDENTIAL_SECRET", "s"),
            ("OS_PROJECT_NAME", "x"),
        ]);
        assert_eq!(credential.auth_type.as_deref(), Some("v3applicationcredential"));
        assert_eq!(credential.auth.unwrap().project_name, None);
        let token = config(&[url, ("OS_TOKEN", "t"), ("OS_PROJECT_ID", "x")]);
        assert_eq!(token.auth_type.as_deref(), Some("v3token"));
    }

    #[test]
    fn glances_usage_is_in_mebibytes_and_may_have_no_limit() {
        let usage = |limit: i64| {
            let body = json!({ "usage": {
                "image_size_total": { "limit": limit, "usage": 3 }, "image_count_total": { "limit": 10, "usage": 1 },
            } });
            serde_json::from_value::<UsageAnswer>(body).unwrap().image_size()
        };
        assert_eq!(usage(5), Some(ImageSizeUsage { limit: 5 << 20, used: 3 << 20 }));
        assert_eq!(usage(-1), None);
        assert_eq!(serde_json::from_str::<UsageAnswer>(r#"{"usage": {}}"#).unwrap().image_size(), None);
    }

    #[test]
    fn without_credentials_it_says_what_to_do() {
        let error = Tenant::from_vars(None, |_| None).unwrap_err();
        assert!(error.to_string().contains("OS_AUTH_URL"), "{error}");
    }

    #[test]
    fn a_cloud_of_clouds_yaml_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("clouds.yaml");
        std::fs::write(
            &file,
            "clouds:\n  mine:\n    auth:\n      auth_url: http://k.example/identity\n      username: u\n      \
             password: very-secret\n      project_name: p\n    interface: internalURL\n    region_name: r\n",
        )
        .unwrap();
        let var = |name: &str| (name == "OS_CLIENT_CONFIG_FILE").then(|| file.display().to_string());
        let tenant = Tenant::from_vars(Some("mine"), var).unwrap();
        let shown = format!("{tenant:?}");
        assert!(shown.contains("http://k.example/identity/v3/"), "{shown}");
        assert!(shown.contains("\"internal\"") && !shown.contains("very-secret"), "{shown}");
        assert!(Tenant::from_vars(Some("other"), var).is_err());
    }

    #[test]
    fn old_interface_names_are_known() {
        assert_eq!(plain_interface(Some("internalURL")), "internal");
        assert_eq!(plain_interface(Some("admin")), "admin");
        assert_eq!(plain_interface(None), "public");
    }
}
