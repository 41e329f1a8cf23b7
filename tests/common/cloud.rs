//! Keystone, Glance and Cinder over plain HTTP, as a tenant or an administrator uses them.

use std::panic::AssertUnwindSafe;
use std::sync::Mutex;
use std::time::Duration;

use futures::future::join_all;
use futures::{FutureExt, StreamExt, stream};
use reqwest::{Client, Method};
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

use super::disk::{self, Disk};
use super::{MIB, lab, seconds, unique, until};

/// How long anything may take that is not measured.
pub const PATIENCE: Duration = Duration::from_secs(300);

const TAG: &str = "rbd-offload:";

/// Images that are made or deleted at a time.
pub const AT_A_TIME: usize = 8;

/// A user's token. What it made is deleted when it is dropped, the latest first.
pub struct Account {
    http: Client,
    token: String,
    pub project_id: String,
    pub user_id: String,
    made: Mutex<Vec<Made>>,
}

#[derive(Debug, Clone)]
enum Made {
    Image(String),
    Volume(String),
    Snapshot(String),
    /// Something of Keystone's: its path.
    Identity(String),
    Instance(String),
    /// What Cinder makes in a volume that is cloned, and leaves there when the clone is deleted.
    CloneSnapshot(Disk, String),
}

/// The tag that asks for a volume.
pub fn volume_tag(id: &str) -> String {
    format!("{TAG}volume:{id}")
}

pub fn snapshot_tag(id: &str) -> String {
    format!("{TAG}snapshot:{id}")
}

pub fn instance_tag(id: &str) -> String {
    format!("{TAG}instance:{id}")
}

/// How an instance does not run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rest {
    Paused,
    Stopped,
    Suspended,
}

/// An instance: Nova's id, and its disk.
#[derive(Debug, Clone)]
pub struct Instance {
    pub id: String,
    pub disk: Disk,
}

/// A volume: Cinder's id, and its disk.
#[derive(Debug, Clone)]
pub struct Volume {
    pub id: String,
    pub disk: Disk,
}

impl Account {
    async fn login(user: &str, project: &str, password: &str) -> Self {
        Self::log_in(json!({
            "identity": {"methods": ["password"], "password": {
                "user": {"name": user, "domain": {"id": "default"}, "password": password}}},
            "scope": {"project": {"name": project, "domain": {"id": "default"}}},
        }))
        .await
    }

    async fn log_in(auth: Value) -> Self {
        let http = Client::builder().timeout(seconds(60)).no_proxy().build().unwrap();
        let body = json!({ "auth": auth });
        let url = format!("{}/auth/tokens", lab().keystone);
        let request = http.post(url).header("content-type", "application/json").body(body.to_string());
        let answer = request.send().await.expect("Keystone answers");
        let token = answer.headers()["x-subject-token"].to_str().unwrap().to_owned();
        let body: Value = serde_json::from_slice(&answer.bytes().await.unwrap()).unwrap();
        let text = |path: &str| body.pointer(path).and_then(Value::as_str).unwrap().to_owned();
        Self {
            http,
            token,
            project_id: text("/token/project/id"),
            user_id: text("/token/user/id"),
            made: Mutex::default(),
        }
    }

    pub async fn demo() -> Self {
        Self::login("demo", "demo", "secret").await
    }

    pub async fn demo2() -> Self {
        Self::login("demo2", "demo2", "secret").await
    }

    pub async fn admin() -> Self {
        Self::login("admin", "admin", "secret").await
    }

    /// The daemon's own user: role `service`, which sees locations.
    pub async fn service() -> Self {
        Self::login("offload", "service", &lab().offload_password).await
    }

    pub fn token(&self) -> &str {
        &self.token
    }

    /// Goes on with the token of another login of the same user.
    pub fn renew(&mut self, other: &Self) {
        assert_eq!((&self.user_id, &self.project_id), (&other.user_id, &other.project_id));
        self.token.clone_from(&other.token);
    }

    /// The same user and project, with a token that ends after so many seconds: that of an application credential which
    /// ends then. It cannot delete anything by then, so nothing should be made with it.
    pub async fn short_lived(&self, seconds: u64) -> Self {
        let end = jiff::Timestamp::now() + Duration::from_secs(seconds);
        let credential = json!({"application_credential": {
            "name": format!("test-{}", unique()), "secret": "secret",
            "expires_at": end.strftime("%FT%T").to_string()}});
        let url = format!("{}/users/{}/application_credentials", lab().keystone, self.user_id);
        let mut answer = self.call(Method::POST, &url, Some(credential.clone())).await;
        // With admin requests beside it, Keystone 30 now and then (1 of 25) takes their roles for those of this token.
        for _ in 0..10 {
            if answer.0 == 201 || !answer.1.to_string().contains("Could not find role assignment") {
                break;
            }
            answer = self.call(Method::POST, &url, Some(credential.clone())).await;
        }
        let (status, body) = answer;
        assert_eq!(status, 201, "{body}");
        Self::log_in(json!({"identity": {"methods": ["application_credential"], "application_credential": {
            "id": body["application_credential"]["id"], "secret": "secret"}}}))
        .await
    }

    /// Revokes the token. Services that have just seen it take it for some minutes more, unless they are restarted.
    pub async fn revoke(&self) {
        let url = format!("{}/auth/tokens", lab().keystone);
        let request = self.http.delete(url).header("x-auth-token", &self.token).header("x-subject-token", &self.token);
        assert_eq!(request.send().await.unwrap().status().as_u16(), 204);
    }

    // ---- HTTP ----

    async fn try_call(&self, method: Method, url: &str, kind: &str, body: Option<String>) -> Option<(u16, Value)> {
        let mut request = self.http.request(method, url).header("x-auth-token", &self.token);
        if url.starts_with(&lab().cinder) {
            request = request.header("openstack-api-version", "volume 3.60");
        } else if std::env::var("RBDLAB_NOVA").is_ok_and(|nova| url.starts_with(&nova)) {
            request = request.header("openstack-api-version", "compute 2.79");
        }
        if let Some(body) = body {
            request = request.header("content-type", kind).body(body);
        }
        let answer = request.send().await.ok()?;
        let status = answer.status().as_u16();
        let bytes = answer.bytes().await.ok()?;
        let text = || Value::String(String::from_utf8_lossy(&bytes).chars().take(300).collect());
        Some((status, serde_json::from_slice(&bytes).unwrap_or_else(|_| text())))
    }

    /// Status and body. A service that is away for a moment is asked again.
    pub async fn call(&self, method: Method, url: &str, body: Option<Value>) -> (u16, Value) {
        self.call_as(method, url, "application/json", body.map(|body| body.to_string())).await
    }

    async fn call_as(&self, method: Method, url: &str, kind: &str, body: Option<String>) -> (u16, Value) {
        until(&format!("{method} {url}"), PATIENCE, || async {
            let again = method == Method::GET || method == Method::DELETE;
            let answer = self.try_call(method.clone(), url, kind, body.clone()).await;
            answer.filter(|(status, _)| !again || !matches!(status, 502..=504))
        })
        .await
    }

    fn glance(&self, path: &str) -> String {
        format!("{}/v2/{path}", lab().glance)
    }

    fn cinder(&self, path: &str) -> String {
        format!("{}/{}/{path}", lab().cinder, self.project_id)
    }

    fn note(&self, made: Made) {
        self.made.lock().unwrap().push(made);
    }

    // ---- images ----

    /// A queued record; `more` is laid over what a tenant would write.
    pub async fn create_image(&self, tags: &[String], more: Value) -> String {
        let mut body = json!({"name": format!("test-{}", unique()), "tags": tags, "visibility": "private"});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let (status, made) = self.call(Method::POST, &self.glance("images"), Some(body)).await;
        assert_eq!(status, 201, "{made}");
        let id = made["id"].as_str().unwrap().to_owned();
        self.note(Made::Image(id.clone()));
        id
    }

    /// Files a request for a volume, as a tenant does.
    pub async fn request(&self, volume: &Volume) -> String {
        self.create_image(&[volume_tag(&volume.id)], json!({"disk_format": "raw", "container_format": "bare"})).await
    }

    /// `null` when there is no such image, or none for this account.
    pub async fn image(&self, id: &str) -> Value {
        match self.call(Method::GET, &self.glance(&format!("images/{id}")), None).await {
            (200, image) => image,
            (404, _) => Value::Null,
            (status, body) => panic!("image {id}: {status} {body}"),
        }
    }

    pub async fn patch_image(&self, id: &str, operations: Value) -> (u16, Value) {
        let kind = "application/openstack-images-v2.1-json-patch";
        self.call_as(Method::PATCH, &self.glance(&format!("images/{id}")), kind, Some(operations.to_string())).await
    }

    pub async fn add_tag(&self, id: &str, tag: &str) {
        let (status, body) = self.call(Method::PUT, &self.glance(&format!("images/{id}/tags/{tag}")), None).await;
        assert_eq!(status, 204, "{body}");
    }

    pub async fn delete_image(&self, id: &str) -> u16 {
        self.call(Method::DELETE, &self.glance(&format!("images/{id}")), None).await.0
    }

    /// Uploads bytes by Glance's ordinary API.
    pub async fn upload(&self, id: &str, bytes: Vec<u8>) -> u16 {
        let url = self.glance(&format!("images/{id}/file"));
        let request = self.http.put(url).header("x-auth-token", &self.token);
        request.header("content-type", "application/octet-stream").body(bytes).send().await.unwrap().status().as_u16()
    }

    /// An upload of so many bytes whose bytes are still to be written.
    pub async fn begin_upload(&self, id: &str, bytes: u64) -> TcpStream {
        let address = lab().glance.strip_prefix("http://").unwrap();
        let mut stream = TcpStream::connect(address).await.unwrap();
        let head = format!(
            "PUT /v2/images/{id}/file HTTP/1.1\r\nHost: {address}\r\nX-Auth-Token: {}\r\n\
             Content-Type: application/octet-stream\r\nContent-Length: {bytes}\r\n\r\n",
            self.token
        );
        stream.write_all(head.as_bytes()).await.unwrap();
        stream
    }

    /// Locations, as only a service sees them.
    pub async fn locations(&self, id: &str) -> Vec<String> {
        let body = self.location_records(id).await;
        body.as_array().unwrap().iter().map(|location| location["url"].as_str().unwrap().to_owned()).collect()
    }

    /// Locations with their metadata.
    pub async fn location_records(&self, id: &str) -> Value {
        let (status, body) = self.call(Method::GET, &self.glance(&format!("images/{id}/locations")), None).await;
        assert_eq!(status, 200, "{body}");
        body
    }

    /// Ids of the images that the account sees, of its own project, sorted.
    pub async fn image_ids(&self) -> Vec<String> {
        let (status, body) = self.call(Method::GET, &self.glance("images?visibility=private&limit=1000"), None).await;
        assert_eq!(status, 200, "{body}");
        let images = body["images"].as_array().unwrap().iter();
        let mut ids: Vec<String> = images.map(|image| image["id"].as_str().unwrap().to_owned()).collect();
        ids.sort_unstable();
        ids
    }

    /// Waits until Glance's own work on the image (the hash of its bytes) is done.
    pub async fn await_tasks(&self, id: &str) {
        let url = self.glance(&format!("images/{id}/tasks"));
        until("the end of Glance's tasks", PATIENCE, || async {
            let (status, body) = self.call(Method::GET, &url, None).await;
            let over = |task: &Value| matches!(task["status"].as_str(), Some("success" | "failure"));
            (status == 404 || body["tasks"].as_array().is_some_and(|tasks| tasks.iter().all(over))).then_some(())
        })
        .await;
    }

    /// Waits for a status; panics when the request is declined or failed instead.
    pub async fn await_image(&self, id: &str, status: &str) -> Value {
        until(&format!("image {id} is {status}"), PATIENCE, || async {
            let image = self.image(id).await;
            if image["status"] == status {
                return Some(image);
            }
            let ended = matches!(image["rbd_offload_status"].as_str(), Some("declined" | "failed"));
            assert!(!ended, "image {id}: {image:#}");
            None
        })
        .await
    }

    /// Waits until the image is active; what the record says of an earlier request does not count.
    pub async fn await_another_try(&self, id: &str, limit: Duration) -> Value {
        until(&format!("image {id} is active by another try"), limit, || async {
            let image = self.image(id).await;
            (image["status"] == "active").then_some(image)
        })
        .await
    }

    /// Waits until the request was turned down, and returns the sentence that the tenant gets.
    pub async fn await_end(&self, id: &str, status: &str) -> String {
        let image = until(&format!("the request of image {id} is {status}"), PATIENCE, || async {
            let image = self.image(id).await;
            assert!(!image.is_null(), "image {id} is gone");
            assert_ne!(image["status"], "active", "image {id}: {image:#}");
            let tagged = image["tags"].as_array().unwrap().iter().any(|tag| tag.as_str().unwrap().starts_with(TAG));
            (!tagged && image["rbd_offload_status"] == status).then_some(image)
        })
        .await;
        assert_eq!(image["status"], "queued", "{image:#}");
        let message = image["rbd_offload_message"].as_str().unwrap_or_default().to_owned();
        assert!(message.len() > 20 && message.len() < 400, "no sentence that helps: {message:?}");
        message
    }

    /// Waits until the request was declined, and nothing is left of it.
    pub async fn await_declined(&self, id: &str) -> String {
        let message = self.await_end(id, "declined").await;
        nothing_is_left_of(id).await;
        message
    }

    // ---- volumes ----

    /// A volume type whose uploads go to that Glance store. It stays, and is there the next time.
    pub async fn volume_type_of_store(&self, store: &str) -> String {
        let name = format!("ceph-to-{store}");
        let specs = json!({"volume_backend_name": "ceph", "image_service:store_id": store});
        let body = json!({"volume_type": {"name": name, "extra_specs": specs}});
        let (status, made) = self.call(Method::POST, &self.cinder("types"), Some(body)).await;
        assert!(status == 200 || status == 409, "{status}: {made}");
        name
    }

    pub async fn create_volume(&self, more: Value) -> Volume {
        let mut body = json!({"size": 1, "name": format!("test-{}", unique()), "volume_type": "ceph"});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let (status, made) = self.call(Method::POST, &self.cinder("volumes"), Some(json!({"volume": body}))).await;
        assert_eq!(status, 202, "{made}");
        let id = made["volume"]["id"].as_str().unwrap().to_owned();
        self.note(Made::Volume(id.clone()));
        self.await_volume(&id, "available").await;
        let pool = if body["volume_type"] == "ceph2" { "volumes2" } else { "volumes" };
        Volume { disk: Disk::new(pool, format!("volume-{id}")), id }
    }

    /// A volume made from a volume.
    pub async fn clone_volume(&self, parent: &Volume) -> Volume {
        let clone = self.create_volume(json!({"source_volid": parent.id})).await;
        let snapshot = Made::CloneSnapshot(parent.disk.clone(), format!("volume-{}.clone_snap", clone.id));
        let mut made = self.made.lock().unwrap();
        let before_the_clone = made.len() - 1;
        made.insert(before_the_clone, snapshot);
        clone
    }

    /// A volume whose disk holds this many MiB in many small objects, so that no method is done with it at once.
    pub async fn long_volume(&self, mib: u64, seed: u64) -> Volume {
        let volume = self.create_volume(json!({})).await;
        volume.disk.remove().await;
        volume.disk.create_in_small_objects((mib + 16) * MIB).await;
        volume.disk.write(seed, &[(0, mib / 2 * MIB), ((mib / 2 + 8) * MIB + 777, mib / 2 * MIB)]).await;
        volume
    }

    /// A volume whose disk is made smaller behind Cinder's back, to what a quick test needs, with some data.
    pub async fn small_volume(&self, more: Value, seed: u64) -> Volume {
        let volume = self.create_volume(more).await;
        volume.disk.resize(64 * MIB).await;
        volume.disk.write_some(seed).await;
        volume
    }

    pub async fn volume(&self, id: &str) -> Value {
        match self.call(Method::GET, &self.cinder(&format!("volumes/{id}")), None).await {
            (200, mut body) => body["volume"].take(),
            (404, _) => Value::Null,
            (status, body) => panic!("volume {id}: {status} {body}"),
        }
    }

    pub async fn await_volume(&self, id: &str, status: &str) {
        until(&format!("volume {id} is {status}"), PATIENCE, || async {
            let volume = self.volume(id).await;
            assert!(!volume["status"].as_str().unwrap_or_default().starts_with("error"), "{volume:#}");
            (volume["status"] == status).then_some(())
        })
        .await;
    }

    pub async fn volume_action(&self, id: &str, action: Value) -> Value {
        let (status, body) = self.call(Method::POST, &self.cinder(&format!("volumes/{id}/action")), Some(action)).await;
        assert!(status < 300, "{status} {body}");
        body
    }

    /// As an administrator does with a volume that Cinder has left in between.
    pub async fn reset_volume(&self, id: &str) {
        self.volume_action(id, json!({"os-reset_status": {"status": "available"}})).await;
    }

    /// Attaches the volume to a host, as Nova does to an instance.
    pub async fn attach(&self, volume: &Volume) {
        let attach = json!({"os-attach": {"host_name": "test", "mountpoint": "/dev/vdb"}});
        self.volume_action(&volume.id, attach).await;
        self.await_volume(&volume.id, "in-use").await;
    }

    pub async fn detach(&self, volume: &Volume) {
        self.volume_action(&volume.id, json!({"os-detach": {}})).await;
        self.await_volume(&volume.id, "available").await;
    }

    /// Cinder's own upload of a volume; the image's id.
    pub async fn stock_upload(&self, volume: &Volume) -> String {
        let id = self.ask_for_upload(volume, json!({})).await;
        self.adopt_image(&id);
        id
    }

    /// `openstack image create --volume`; `more` is merged into its arguments. The image is not deleted with this
    /// account.
    pub async fn ask_for_upload(&self, volume: &Volume, more: Value) -> String {
        let mut upload =
            json!({"image_name": format!("test-{}", unique()), "disk_format": "raw", "container_format": "bare"});
        upload.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let answer = self.volume_action(&volume.id, json!({"os-volume_upload_image": upload})).await;
        answer["os-volume_upload_image"]["image_id"].as_str().unwrap().to_owned()
    }

    /// Deletes the image at the end.
    pub fn adopt_image(&self, id: &str) {
        self.note(Made::Image(id.to_owned()));
    }

    pub async fn create_snapshot(&self, volume: &Volume) -> String {
        let body = json!({"snapshot": {"volume_id": volume.id, "name": format!("test-{}", unique())}});
        let (status, made) = self.call(Method::POST, &self.cinder("snapshots"), Some(body)).await;
        assert_eq!(status, 202, "{made}");
        let id = made["snapshot"]["id"].as_str().unwrap().to_owned();
        self.note(Made::Snapshot(id.clone()));
        until("the snapshot", PATIENCE, || async {
            let (_, body) = self.call(Method::GET, &self.cinder(&format!("snapshots/{id}")), None).await;
            (body["snapshot"]["status"] == "available").then_some(())
        })
        .await;
        id
    }

    /// Deletes it and waits until Cinder has no such volume; a failed deletion is none.
    pub async fn delete_volume(&self, volume: &Volume) {
        self.delete_in_cinder("volume", &volume.id).await;
    }

    /// The same for a snapshot.
    pub async fn delete_snapshot(&self, id: &str) {
        self.delete_in_cinder("snapshot", id).await;
    }

    async fn delete_in_cinder(&self, kind: &str, id: &str) {
        let url = self.cinder(&format!("{kind}s/{id}"));
        let (status, body) = self.call(Method::DELETE, &url, None).await;
        assert_eq!(status, 202, "{kind} {id}: {body}");
        until(&format!("the end of {kind} {id}"), PATIENCE, || async {
            let (status, body) = self.call(Method::GET, &url, None).await;
            assert_ne!(body[kind]["status"], "error_deleting", "{kind} {id}");
            (status == 404).then_some(())
        })
        .await;
    }

    // ---- limits ----

    /// What the images take that this account sees.
    pub async fn image_bytes(&self) -> u64 {
        let (status, body) = self.call(Method::GET, &self.glance("images?limit=1000"), None).await;
        assert_eq!(status, 200, "{body}");
        body["images"].as_array().unwrap().iter().filter_map(|image| image["size"].as_u64()).sum()
    }

    /// Sets Keystone's limit of all images of a project, in MiB: for every project, or for this one.
    pub async fn limit_images(&self, project_id: Option<&str>, mib: u64) {
        let kind = if project_id.is_some() { "limits" } else { "registered_limits" };
        let (_, services) = self.call(Method::GET, &format!("{}/services?type=image", lab().keystone), None).await;
        let mut limit = json!({
            "service_id": services["services"][0]["id"], "region_id": "RegionOne", "resource_name": "image_size_total",
        });
        match project_id {
            Some(project_id) => {
                limit["project_id"] = project_id.into();
                limit["resource_limit"] = mib.into();
            }
            None => limit["default_limit"] = mib.into(),
        }
        let url = format!("{}/{kind}", lab().keystone);
        let (status, made) = self.call(Method::POST, &url, Some(json!({kind: [limit]}))).await;
        assert_eq!(status, 201, "{made}");
        self.note(Made::Identity(format!("{kind}/{}", made[kind][0]["id"].as_str().unwrap())));
    }

    // ---- instances ----

    fn nova(&self, path: &str) -> String {
        format!("{}/{path}", lab().nova())
    }

    /// An uploaded image that instances are made from: 8 MiB, with properties that Nova hands on.
    pub async fn base_image(&self) -> String {
        let record = json!({"disk_format": "raw", "container_format": "bare", "min_ram": 64, "hw_disk_bus": "scsi",
                            "hw_scsi_model": "virtio-scsi", "os_distro": "none", "cache_in_nova": "True"});
        let id = self.create_image(&[], record).await;
        let mut bytes: Vec<u8> = (0..8 * MIB).map(|n| (n % 251) as u8).collect();
        // no boot sector
        bytes[..512].fill(0);
        assert_eq!(self.upload(&id, bytes).await, 204);
        self.await_tasks(&id).await;
        id
    }

    pub async fn flavor(&self, name: &str) -> String {
        let (status, body) = self.call(Method::GET, &self.nova("flavors"), None).await;
        assert_eq!(status, 200, "{body}");
        let flavor = body["flavors"].as_array().unwrap().iter().find(|flavor| flavor["name"] == name);
        flavor.unwrap_or_else(|| panic!("no flavor {name}"))["id"].as_str().unwrap().to_owned()
    }

    /// An instance without networks that runs; `more` says what it boots from.
    pub async fn create_instance(&self, flavor: &str, more: Value) -> Instance {
        let flavor = self.flavor(flavor).await;
        let mut body = json!({"name": format!("test-{}", unique()), "flavorRef": flavor, "networks": "none"});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let (status, made) = self.call(Method::POST, &self.nova("servers"), Some(json!({"server": body}))).await;
        assert_eq!(status, 202, "{made}");
        let id = made["server"]["id"].as_str().unwrap().to_owned();
        self.note(Made::Instance(id.clone()));
        self.await_instance(&id, "ACTIVE").await;
        Instance { disk: Disk::new("vms", format!("{id}_disk")), id }
    }

    /// An instance of an image, with some data of its own, that does not run: its disk stays as it is.
    pub async fn resting_instance(&self, image: &str, rest: Rest, seed: u64) -> Instance {
        let instance = self.create_instance("d1", json!({"imageRef": image})).await;
        let (action, status) = match rest {
            Rest::Paused => (json!({"pause": null}), "PAUSED"),
            Rest::Stopped => (json!({"os-stop": null}), "SHUTOFF"),
            Rest::Suspended => (json!({"suspend": null}), "SUSPENDED"),
        };
        assert_eq!(self.instance_action(&instance.id, action).await.0, 202);
        self.await_instance(&instance.id, status).await;
        instance.disk.write_some(seed).await;
        instance
    }

    /// `null` when there is no such instance.
    pub async fn instance(&self, id: &str) -> Value {
        match self.call(Method::GET, &self.nova(&format!("servers/{id}")), None).await {
            (200, mut body) => body["server"].take(),
            (404, _) => Value::Null,
            (status, body) => panic!("instance {id}: {status} {body}"),
        }
    }

    /// Waits until Nova has nothing to do with the instance and it is in this status.
    pub async fn await_instance(&self, id: &str, status: &str) -> Value {
        until(&format!("instance {id} is {status}"), PATIENCE, || async {
            let instance = self.instance(id).await;
            let failed = instance["status"] == "ERROR" && status != "ERROR";
            assert!(!failed, "{:#}", instance["fault"]);
            (instance["status"] == status && instance["OS-EXT-STS:task_state"].is_null()).then_some(instance)
        })
        .await
    }

    pub async fn instance_action(&self, id: &str, action: Value) -> (u16, Value) {
        self.call(Method::POST, &self.nova(&format!("servers/{id}/action")), Some(action)).await
    }

    /// Nova's own snapshot, as `openstack server image create` makes it; the image's id.
    pub async fn snapshot_instance(&self, id: &str) -> String {
        let image = self.ask_for_snapshot(id, json!({})).await;
        self.adopt_image(&image);
        image
    }

    /// `openstack server image create`; `more` is merged into its arguments. The image is not deleted with this
    /// account.
    pub async fn ask_for_snapshot(&self, id: &str, more: Value) -> String {
        let mut snapshot = json!({"name": format!("test-{}", unique())});
        snapshot.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let (status, body) = self.instance_action(id, json!({"createImage": snapshot})).await;
        assert_eq!(status, 202, "{body}");
        body["image_id"].as_str().unwrap().to_owned()
    }

    /// The id of the image of that name, where there is one.
    pub async fn image_named(&self, name: &str) -> Option<String> {
        let (status, body) = self.call(Method::GET, &self.glance(&format!("images?name={name}")), None).await;
        assert_eq!(status, 200, "{body}");
        body["images"][0]["id"].as_str().map(str::to_owned)
    }

    pub async fn delete_instance(&self, id: &str) -> u16 {
        self.call(Method::DELETE, &self.nova(&format!("servers/{id}")), None).await.0
    }

    /// Waits until the instance is gone, and its disk with it.
    pub async fn await_instance_gone(&self, instance: &Instance) {
        until(&format!("the end of instance {}", instance.id), PATIENCE, || async {
            let now = self.instance(&instance.id).await;
            assert_ne!(now["status"], "ERROR", "{:#}", now["fault"]);
            now.is_null().then_some(())
        })
        .await;
        assert!(instance.disk.facts().await.is_none(), "the disk of {} is still there", instance.id);
    }

    // ---- the end ----

    async fn delete(&self, made: &Made) {
        let (what, url) = match made {
            Made::Image(id) => {
                self.await_tasks(id).await;
                (format!("image {id}"), self.glance(&format!("images/{id}")))
            }
            Made::Volume(id) => (format!("volume {id}"), self.cinder(&format!("volumes/{id}"))),
            Made::CloneSnapshot(disk, snapshot) => return disk.remove_snapshot(snapshot).await,
            Made::Identity(path) => (path.clone(), format!("{}/{path}", lab().keystone)),
            Made::Snapshot(id) => (format!("snapshot {id}"), self.cinder(&format!("snapshots/{id}"))),
            Made::Instance(id) => (format!("instance {id}"), self.nova(&format!("servers/{id}"))),
        };
        until(&format!("the end of {what}"), PATIENCE, || async {
            let (status, _) = self.call(Method::DELETE, &url, None).await;
            if status == 404 {
                return Some(());
            }
            super::pause(Duration::from_millis(500)).await;
            None
        })
        .await;
    }

    /// Deletes all that was made, the latest first; images that follow each other, several at a time.
    pub async fn clean(&self) {
        loop {
            let batch = self.latest();
            if batch.is_empty() {
                return;
            }
            join_all(batch.iter().map(|made| self.delete(made))).await;
        }
    }

    /// Deletes these images, several at a time.
    pub async fn delete_images(&self, ids: &[String]) {
        self.made.lock().unwrap().retain(|made| !matches!(made, Made::Image(id) if ids.contains(id)));
        let images: Vec<_> = ids.iter().cloned().map(Made::Image).collect();
        stream::iter(&images).for_each_concurrent(AT_A_TIME, |image| self.delete(image)).await;
    }

    /// Takes out what is to be deleted next.
    fn latest(&self) -> Vec<Made> {
        let mut made = self.made.lock().unwrap();
        let images = made.iter().rev().take_while(|made| matches!(made, Made::Image(_))).count();
        let rest = made.len() - images.clamp(1, AT_A_TIME).min(made.len());
        made.split_off(rest)
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        if self.made.lock().unwrap().is_empty() {
            return;
        }
        // also after a panic: the next test wants a tidy lab
        let clean = AssertUnwindSafe(tokio::time::timeout(PATIENCE, self.clean())).catch_unwind();
        let cleaned = tokio::task::block_in_place(|| tokio::runtime::Handle::current().block_on(clean));
        let left = self.made.lock().unwrap().clone();
        if !matches!(cleaned, Ok(Ok(()))) {
            eprintln!("could not be deleted, or is still there: {left:?}");
            assert!(std::thread::panicking(), "the test did not tidy up");
        }
    }
}

/// Neither a private copy nor a published image is there.
pub async fn nothing_is_left_of(image: &str) {
    for name in [image.to_owned(), format!("rbd-offload.{image}")] {
        assert!(disk::Disk::of_image(&name).facts().await.is_none(), "images/{name} is still there");
    }
}

/// Waits until a daemon has cleaned up after what it was offered went another way: no private copy is there, and no
/// snapshot on the source.
pub async fn await_tidy(image: &str, source: &Disk) {
    until("the daemon has cleaned up", seconds(60), || async {
        let copy = Disk::of_image(&format!("rbd-offload.{image}")).facts().await;
        // none: a snapshot went while they were read
        let snapshots = source.facts().await?.snapshots;
        (copy.is_none() && snapshots.is_empty()).then_some(())
    })
    .await;
}
