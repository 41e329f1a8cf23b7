//! The OpenStack client against a real Keystone, Glance and Cinder: the lab that `make test` starts.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "common/env.rs"]
mod env;

use std::collections::BTreeMap;
use std::process::Command;
use std::time::{Duration, Instant};

use rbd_offload::config::{Credentials, Glance, Interface, Keystone, Register};
use rbd_offload::openstack::{
    Cloud, ErrorKind, Image, ImageChange, ListCursor, LocationAnswer, Session, Tenant, Validation,
};
use reqwest::Method;
use serde_json::{Value, json};

use env::lab_var;

/// What the lab tells in the environment.
struct Lab {
    keystone: String,
    glance: String,
    cinder: String,
    ceph_conf: String,
    fsid: String,
    password: String,
}

impl Lab {
    fn new() -> Self {
        let var = lab_var;
        Self {
            ceph_conf: format!("{}/ceph/ceph.conf", var("RBDLAB_DIR")),
            keystone: var("RBDLAB_KEYSTONE"),
            glance: var("RBDLAB_GLANCE"),
            cinder: var("RBDLAB_CINDER"),
            fsid: var("RBDLAB_FSID"),
            password: var("RBDLAB_OFFLOAD_PASSWORD"),
        }
    }

    fn keystone(&self, username: &str, password: &str) -> Keystone {
        Keystone {
            auth_url: self.keystone.clone(),
            credentials: Credentials::Password {
                username: username.into(),
                password: password.to_owned().into(),
                project_name: "service".into(),
                user_domain_name: "Default".into(),
                project_domain_name: "Default".into(),
            },
            region_name: Some("RegionOne".into()),
            interface: Interface::Internal,
            cafile: None,
            proxy: None,
            timeout: Duration::from_secs(30),
        }
    }

    /// The daemon's session.
    fn session(&self, register: Register) -> Session {
        Session::connect(&self.keystone("offload", &self.password), &glance(register)).unwrap()
    }

    fn tenant(&self, user: &str) -> Tenant {
        Tenant::from_vars(None, |name| {
            Some(match name {
                "OS_AUTH_URL" => self.keystone.clone(),
                "OS_USERNAME" | "OS_PROJECT_NAME" => user.to_owned(),
                "OS_PASSWORD" => "secret".to_owned(),
                "OS_INTERFACE" => "internal".to_owned(),
                "OS_REGION_NAME" => "RegionOne".to_owned(),
                _ => return None,
            })
        })
        .unwrap()
    }

    /// A plain client for what the program itself never does.
    async fn raw(&self, user: &str, password: &str, project: &str) -> Raw {
        let body = json!({"auth": {
            "identity": {"methods": ["password"], "password": {
                "user": {"name": user, "domain": {"id": "default"}, "password": password}}},
            "scope": {"project": {"name": project, "domain": {"id": "default"}}},
        }});
        // a new connection for each call: a service closes an idle one at any moment
        let http = reqwest::Client::builder().no_proxy().pool_max_idle_per_host(0).build().unwrap();
        let answer = http
            .post(format!("{}/auth/tokens", self.keystone))
            .body(body.to_string())
            .header("content-type", "application/json")
            .send()
            .await
            .unwrap();
        let token = answer.headers()["x-subject-token"].to_str().unwrap().to_owned();
        let body: Value = serde_json::from_slice(&answer.bytes().await.unwrap()).unwrap();
        Raw {
            http,
            token,
            user_id: body["token"]["user"]["id"].as_str().unwrap().to_owned(),
            project_id: body["token"]["project"]["id"].as_str().unwrap().to_owned(),
        }
    }

    fn rbd(&self, args: &[&str]) {
        let output = Command::new("rbd")
            .args(["-c", &self.ceph_conf, "--id", "glance"])
            .args(args)
            .output()
            .expect("the rbd command");
        assert!(output.status.success(), "rbd {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    }

    /// An RBD image `images/<id>` with its protected snapshot, as a publisher leaves it; its location.
    fn publish(&self, id: &str) -> String {
        let image = format!("images/{id}");
        let snap = format!("{image}@snap");
        self.rbd(&["create", "--size", "4M", &image]);
        self.rbd(&["snap", "create", "--no-progress", &snap]);
        self.rbd(&["snap", "protect", &snap]);
        format!("rbd://{}/images/{id}/snap", self.fsid)
    }
}

fn glance(register: Register) -> Glance {
    Glance {
        pool: "images".into(),
        endpoint_override: None,
        register,
        data_pool: None,
        image_size_cap: 0,
        user_storage_quota: 0,
        protected_properties: Vec::new(),
    }
}

struct Raw {
    http: reqwest::Client,
    token: String,
    user_id: String,
    project_id: String,
}

impl Raw {
    async fn call(&self, method: Method, url: String, body: Option<Value>) -> (u16, Value) {
        let mut request = self.http.request(method, url).header("x-auth-token", &self.token);
        if let Some(body) = body {
            request = request.header("content-type", "application/json").body(body.to_string());
        }
        let answer = request.send().await.unwrap();
        let status = answer.status().as_u16();
        let bytes = answer.bytes().await.unwrap();
        (status, serde_json::from_slice(&bytes).unwrap_or(Value::Null))
    }
}

async fn until<T, F: Future<Output = Option<T>>>(what: &str, mut ready: impl FnMut() -> F) -> T {
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(60) {
        if let Some(found) = ready().await {
            return found;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    panic!("not within 60 s: {what}");
}

fn set(property: &str, value: &str) -> ImageChange {
    ImageChange::Set { property: property.into(), value: value.into() }
}

fn replace(property: &str, value: &str) -> ImageChange {
    ImageChange::Replace { property: property.into(), value: value.into() }
}

async fn queued(tenant: &Tenant, name: &str) -> Image {
    tenant.create_image(name, &[], &BTreeMap::new()).await.unwrap()
}

#[tokio::test]
async fn both_ways_of_login_give_the_roles_and_services() {
    let lab = Lab::new();
    let session = lab.session(Register::Auto);
    session.probe_identity().await.unwrap();
    session.login().await.unwrap();
    let roles = session.roles().await.unwrap();
    assert!(roles.contains(&"admin".into()) && roles.contains(&"service".into()), "{roles:?}");
    let services = session.services().await.unwrap();
    assert!(services.contains(&"image".into()) && services.contains(&"block-storage".into()), "{services:?}");
    session.probe_image().await.unwrap();
    session.probe_volume().await.unwrap();
    let backends = session.volume_backends().await.unwrap();
    assert!(backends.contains(&"lab@ceph".into()), "{backends:?}");

    let raw = lab.raw("offload", &lab.password, "service").await;
    let url = format!("{}/users/{}/application_credentials", lab.keystone, raw.user_id);
    let name = format!("test-{}", std::process::id());
    let body = json!({"application_credential": {"name": name}});
    let (status, made) = raw.call(Method::POST, url.clone(), Some(body)).await;
    assert_eq!(status, 201, "{made}");
    let text = |field: &str| made["application_credential"][field].as_str().unwrap().to_owned();
    let mut keystone = lab.keystone("", "");
    keystone.credentials = Credentials::Application { id: text("id"), secret: text("secret").into() };
    let session = Session::connect(&keystone, &glance(Register::Auto)).unwrap();
    let outcome = (session.roles().await, session.probe_image().await);
    keystone.credentials = Credentials::Application { id: text("id"), secret: "wrong-secret".to_owned().into() };
    let wrong = Session::connect(&keystone, &glance(Register::Auto)).unwrap().login().await;
    let (status, _) = raw.call(Method::DELETE, format!("{url}/{}", text("id")), None).await;
    assert_eq!(status, 204);
    assert!(outcome.0.unwrap().contains(&"admin".into()));
    outcome.1.unwrap();
    assert_eq!(wrong.unwrap_err().kind(), ErrorKind::Unauthorized);
}

#[tokio::test]
async fn a_wrong_password_is_reported_without_the_password() {
    let lab = Lab::new();
    let session =
        Session::connect(&lab.keystone("offload-reader", "not-the-passw0rd"), &glance(Register::Auto)).unwrap();
    let error = session.image("1").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unauthorized);
    let shown = format!("{error} {error:?} {session:?}");
    assert!(!shown.contains("not-the-passw0rd"), "{shown}");
    assert!(error.to_string().starts_with("Keystone: login: 401 Unauthorized: "), "{error}");
}

#[tokio::test]
async fn an_unreachable_keystone_is_unavailable_within_the_timeout() {
    let lab = Lab::new();
    let mut keystone = lab.keystone("offload", &lab.password);
    keystone.timeout = Duration::from_secs(2);
    // Nothing listens on the first; the second is of a block kept for documentation, where packets get lost.
    for url in ["http://127.0.0.1:1/v3", "http://192.0.2.1:5000/v3"] {
        keystone.auth_url = url.into();
        let session = Session::connect(&keystone, &glance(Register::Auto)).unwrap();
        let begun = Instant::now();
        let error = session.login().await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
        assert!(begun.elapsed() < Duration::from_secs(15), "{:?}", begun.elapsed());
    }
}

#[tokio::test]
async fn a_revoked_token_is_renewed_without_notice() {
    let lab = Lab::new();
    let session = lab.session(Register::Auto);
    session.probe_image().await.unwrap();
    session.revoke().await.unwrap();
    // Keystone's workers keep a validated token for a moment, each its own: ask more than one.
    for _ in 0..8 {
        session.image_size_limit("none").await.unwrap();
    }
    session.revoke().await.unwrap();
    session.probe_image().await.unwrap();
}

#[tokio::test]
async fn a_service_in_another_region_is_reported_with_its_region() {
    let lab = Lab::new();
    let mut keystone = lab.keystone("offload", &lab.password);
    keystone.region_name = Some("nowhere".into());
    let session = Session::connect(&keystone, &glance(Register::Auto)).unwrap();
    let error = session.image("1").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoService);
    assert!(error.to_string().contains("internal in RegionOne"), "{error}");
    assert!(session.services().await.unwrap().is_empty());
    // The override needs no catalog.
    for url in [lab.glance.clone(), format!("{}/", lab.glance), format!("{}/v2", lab.glance)] {
        let glance = Glance { endpoint_override: Some(url), ..glance(Register::Auto) };
        let session = Session::connect(&keystone, &glance).unwrap();
        session.probe_image().await.unwrap();
    }
}

#[tokio::test]
async fn a_tenants_image_is_read_and_changed() {
    let lab = Lab::new();
    let session = lab.session(Register::Auto);
    let tenant = lab.tenant("demo");
    let tags = ["rbd-offload:volume:0b9f6d7e-0000-4000-8000-000000000000".to_owned()];
    let properties = BTreeMap::from([("hw_disk_bus".to_owned(), "scsi".to_owned())]);
    let made = tenant.create_image("test-change", &tags, &properties).await.unwrap();
    let id = made.id.as_str();

    let seen = session.image(id).await.unwrap().expect("another project's private image");
    assert_eq!(seen, made);
    assert_eq!(seen.owner, tenant.project_id().await.unwrap());
    assert_eq!((seen.status.as_str(), &seen.tags[..], &seen.properties), ("queued", &tags[..], &properties));
    assert_eq!((seen.disk_format.as_deref(), seen.container_format.as_deref()), (Some("raw"), Some("bare")));
    assert_eq!(session.update_image(id, &[]).await.unwrap(), Some(seen));

    let changes = [
        set("rbd_offload_status", "accepted"),
        set("a/b~c", "odd"),
        ImageChange::MinDisk(2),
        ImageChange::MinRam(64),
        ImageChange::DiskFormat("raw".into()),
        ImageChange::ContainerFormat("bare".into()),
        ImageChange::Tags(vec!["kept".into()]),
    ];
    let changed = session.update_image(id, &changes).await.unwrap().unwrap();
    assert_eq!(changed.properties["rbd_offload_status"], "accepted");
    assert_eq!(changed.properties["a/b~c"], "odd");
    assert_eq!((changed.min_disk, &changed.tags[..]), (2, &["kept".to_owned()][..]));

    let changed = session.update_image(id, &[replace("rbd_offload_status", "copying")]).await.unwrap().unwrap();
    assert_eq!(changed.properties["rbd_offload_status"], "copying");
    let removed = [ImageChange::Remove { property: "rbd_offload_status".into() }];
    let changed = session.update_image(id, &removed).await.unwrap().unwrap();
    assert!(!changed.properties.contains_key("rbd_offload_status"));

    // All or nothing: what does not apply takes the rest with it.
    for missing in [replace("rbd_offload_status", "x"), removed[0].clone()] {
        let error = session.update_image(id, &[set("other", "x"), missing]).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Conflict, "{error}");
    }
    assert!(!session.image(id).await.unwrap().unwrap().properties.contains_key("other"));
    let error = session.update_image(id, &[set("os_glance_x", "x")]).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Refused);

    assert!(tenant.delete_image(id).await.unwrap());
    assert!(!tenant.delete_image(id).await.unwrap());
    assert_eq!(session.image(id).await.unwrap(), None);
    assert_eq!(session.update_image(id, &[set("x", "y")]).await.unwrap(), None);
    assert_eq!(tenant.image(id).await.unwrap(), None);
}

#[tokio::test]
async fn a_location_makes_the_image_active() {
    let lab = Lab::new();
    let session = lab.session(Register::Auto);
    let tenant = lab.tenant("demo");
    let project = tenant.project_id().await.unwrap().unwrap();
    let id = queued(&tenant, "test-location").await.id;
    let url = lab.publish(&id);

    assert_eq!(session.add_location(&id, &url, None).await.unwrap(), Some(LocationAnswer::Accepted));
    let image =
        until("active", || async { session.image(&id).await.unwrap().filter(|image| image.status == "active") }).await;
    assert_eq!(image.size, Some(4 << 20));
    let tasks = session.image_tasks(&id).await.unwrap();
    assert_eq!(tasks.len(), 1, "{tasks:?}");
    assert_ne!(tasks[0].status, "failure");
    assert!(session.image_usage(&project).await.unwrap() >= 4 << 20);

    assert_eq!(session.add_location(&id, &url, None).await.unwrap(), Some(LocationAnswer::Conflict));
    let by_patch = lab.session(Register::Patch);
    assert_eq!(by_patch.add_location(&id, &url, None).await.unwrap(), Some(LocationAnswer::Conflict));
    let error = session.update_image(&id, &[ImageChange::DiskFormat("qcow2".into())]).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Forbidden);
    // The hash is filled in after the activation; a deletion meanwhile would leave the task behind.
    until("the end of the task", || async {
        session.image_tasks(&id).await.unwrap().iter().all(|task| task.status == "success").then_some(())
    })
    .await;

    assert!(tenant.delete_image(&id).await.unwrap());
    assert_eq!(session.add_location(&id, &url, None).await.unwrap(), None);
    assert_eq!(by_patch.add_location(&id, &url, None).await.unwrap(), None);
    assert!(session.image_tasks(&id).await.unwrap().is_empty());
}

#[tokio::test]
async fn a_wrong_hash_ends_in_a_failed_task() {
    let lab = Lab::new();
    let session = lab.session(Register::LocationsApi);
    let tenant = lab.tenant("demo");
    let id = queued(&tenant, "test-hash").await.id;
    let url = lab.publish(&id);
    let wrong = Validation { algorithm: "sha512".into(), value: "0".repeat(128) };
    assert_eq!(session.add_location(&id, &url, Some(&wrong)).await.unwrap(), Some(LocationAnswer::Accepted));
    let task = until("the failed task", || async {
        session.image_tasks(&id).await.unwrap().into_iter().next().filter(|task| task.status == "failure")
    })
    .await;
    assert!(!task.message.is_empty(), "{task}");
    assert_ne!(session.image(&id).await.unwrap().unwrap().status, "active");
    assert!(tenant.delete_image(&id).await.unwrap());
}

#[tokio::test]
async fn patching_a_location_needs_an_internal_glance() {
    let lab = Lab::new();
    let session = lab.session(Register::Patch);
    let tenant = lab.tenant("demo");
    let id = queued(&tenant, "test-patch").await.id;
    let url = format!("rbd://{}/images/{id}/snap", lab.fsid);
    let error = session.add_location(&id, &url, None).await.unwrap_err();
    assert!(tenant.delete_image(&id).await.unwrap());
    assert_eq!(error.kind(), ErrorKind::Forbidden, "{error}");
}

#[tokio::test]
async fn without_the_role_service_or_admin_it_does_not_work() {
    let lab = Lab::new();
    let tenant = lab.tenant("demo");
    let id = queued(&tenant, "test-roles").await.id;
    let url = format!("rbd://{}/images/{id}/snap", lab.fsid);
    let connect = |user| Session::connect(&lab.keystone(user, &lab.password), &glance(Register::LocationsApi)).unwrap();
    let admin = connect("offload-noservice").add_location(&id, &url, None).await;
    let reader = connect("offload-reader").image(&id).await;
    assert!(tenant.delete_image(&id).await.unwrap());
    assert_eq!(admin.unwrap_err().kind(), ErrorKind::Forbidden);
    // Glance hides the image from such a login: it must not count as deleted
    let error = reader.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(error.to_string().contains("no role admin"), "{error}");
}

#[tokio::test]
async fn queued_images_of_all_projects_are_listed_page_by_page() {
    let lab = Lab::new();
    let session = lab.session(Register::Auto);
    let (demo, demo2) = (lab.tenant("demo"), lab.tenant("demo2"));
    let raw = lab.raw("demo", "secret", "demo").await;
    let mut mine = Vec::new();
    for number in 0..2 {
        mine.push(queued(&demo, &format!("test-list-{number}")).await.id);
        mine.push(queued(&demo2, &format!("test-list-{number}")).await.id);
    }
    for visibility in ["community", "shared"] {
        let body = json!({"name": "test-list-hidden", "os_hidden": true, "visibility": visibility});
        let (status, made) = raw.call(Method::POST, format!("{}/v2/images", lab.glance), Some(body)).await;
        assert_eq!(status, 201, "{made}");
        mine.push(made["id"].as_str().unwrap().to_owned());
    }

    for limit in [1, 2, 1000] {
        let mut seen: Vec<String> = Vec::new();
        let mut next = Some(ListCursor::default());
        while let Some(cursor) = next {
            // Another test may delete the image where a page ended; then the list begins again.
            let page = match session.queued_images(&cursor, limit).await {
                Err(error) if error.is_transient() => {
                    seen.clear();
                    next = Some(ListCursor::default());
                    continue;
                }
                page => page.unwrap(),
            };
            assert!(page.images.len() <= limit);
            assert!(page.images.iter().all(|image| image.status == "queued"));
            seen.extend(page.images.into_iter().map(|image| image.id));
            next = page.next;
        }
        // Nothing twice, nothing left out, the hidden ones last.
        let mut found: Vec<_> = seen.into_iter().filter(|id| mine.contains(id)).collect();
        assert_eq!(found.len(), mine.len(), "limit {limit}");
        assert!(found[4..].iter().all(|id| mine[4..].contains(id)), "limit {limit}");
        found.sort();
        found.dedup();
        assert_eq!(found.len(), mine.len(), "limit {limit}");
    }
    for id in &mine {
        let deleted = (demo.delete_image(id).await, demo2.delete_image(id).await);
        assert!(deleted.0.is_ok_and(|done| done) || deleted.1.is_ok_and(|done| done));
    }
}

#[tokio::test]
async fn a_store_has_its_pool_and_cluster() {
    let lab = Lab::new();
    let stores = lab.session(Register::Auto).stores().await.unwrap();
    let store = stores.iter().find(|store| store.kind == "rbd").expect("an rbd store");
    assert_eq!(store.pool.as_deref(), Some("images"));
    assert_eq!(store.fsid.as_deref(), Some(lab.fsid.as_str()));
    assert!(store.default);
}

#[tokio::test]
async fn volumes_and_snapshots_have_their_backend() {
    let lab = Lab::new();
    let session = lab.session(Register::Auto);
    let raw = lab.raw("demo", "secret", "demo").await;
    let project = format!("{}/{}", lab.cinder, raw.project_id);
    let body = json!({"volume": {"size": 1, "volume_type": "ceph", "name": "test-facts"}});
    let (status, made) = raw.call(Method::POST, format!("{project}/volumes"), Some(body)).await;
    assert_eq!(status, 202, "{made}");
    let volume_id = made["volume"]["id"].as_str().unwrap().to_owned();
    let volume = until("the volume", || async {
        session.volume(&volume_id).await.unwrap().filter(|volume| volume.status == "available")
    })
    .await;
    assert_eq!(volume.project_id, raw.project_id);
    assert_eq!((volume.size, volume.encrypted, volume.name_id), (1, false, None));
    assert!(volume.host.as_deref().is_some_and(|host| host.starts_with("lab@ceph#")), "{:?}", volume.host);
    let metadata = json!({"os-set_image_metadata": {"metadata": {"hw_disk_bus": "scsi", "min_disk": "1"}}});
    raw.call(Method::POST, format!("{project}/volumes/{volume_id}/action"), Some(metadata)).await;
    let volume = session.volume(&volume_id).await.unwrap().unwrap();
    assert_eq!(volume.image_metadata["hw_disk_bus"], "scsi");
    assert_eq!(volume.image_metadata["min_disk"], "1");

    let body = json!({"snapshot": {"volume_id": volume_id, "name": "test-facts"}});
    let (status, made) = raw.call(Method::POST, format!("{project}/snapshots"), Some(body)).await;
    assert_eq!(status, 202, "{made}");
    let snapshot_id = made["snapshot"]["id"].as_str().unwrap().to_owned();
    let snapshot = until("the snapshot", || async {
        session.snapshot(&snapshot_id).await.unwrap().filter(|snapshot| snapshot.status == "available")
    })
    .await;
    assert_eq!((&snapshot.volume_id, &snapshot.project_id, snapshot.size), (&volume_id, &raw.project_id, 1));

    raw.call(Method::DELETE, format!("{project}/snapshots/{snapshot_id}"), None).await;
    until("the snapshot's end", || async { session.snapshot(&snapshot_id).await.unwrap().is_none().then_some(()) })
        .await;
    raw.call(Method::DELETE, format!("{project}/volumes/{volume_id}"), None).await;
    until("the volume's end", || async { session.volume(&volume_id).await.unwrap().is_none().then_some(()) }).await;
}

#[tokio::test]
async fn a_projects_limit_wins_over_the_registered_one() {
    let lab = Lab::new();
    let session = lab.session(Register::Auto);
    let raw = lab.raw("admin", "secret", "admin").await;
    let (demo, demo2) = (lab.tenant("demo"), lab.tenant("demo2"));
    let (demo, demo2) = (demo.project_id().await.unwrap().unwrap(), demo2.project_id().await.unwrap().unwrap());
    assert_eq!(session.image_size_limit(&demo).await.unwrap(), None);

    let (_, services) = raw.call(Method::GET, format!("{}/services?type=image", lab.keystone), None).await;
    let service = services["services"][0]["id"].as_str().unwrap();
    let limit = json!({"service_id": service, "region_id": "RegionOne", "resource_name": "image_size_total"});
    let mut registered = limit.clone();
    registered["default_limit"] = 100_000.into();
    let (status, made) = raw
        .call(
            Method::POST,
            format!("{}/registered_limits", lab.keystone),
            Some(json!({"registered_limits": [registered]})),
        )
        .await;
    assert_eq!(status, 201, "{made}");
    let registered_id = made["registered_limits"][0]["id"].as_str().unwrap().to_owned();
    let mut own = limit;
    own["resource_limit"] = 90_000.into();
    own["project_id"] = demo2.as_str().into();
    let (status, made) =
        raw.call(Method::POST, format!("{}/limits", lab.keystone), Some(json!({"limits": [own]}))).await;
    let limits = (session.image_size_limit(&demo).await, session.image_size_limit(&demo2).await);
    let own_id = made["limits"][0]["id"].as_str().unwrap_or_default().to_owned();
    let (deleted_own, _) = raw.call(Method::DELETE, format!("{}/limits/{own_id}", lab.keystone), None).await;
    let (deleted, _) =
        raw.call(Method::DELETE, format!("{}/registered_limits/{registered_id}", lab.keystone), None).await;
    assert_eq!((status, deleted_own, deleted), (201, 204, 204), "{made}");
    assert_eq!(limits.0.unwrap(), Some(100_000 << 20));
    assert_eq!(limits.1.unwrap(), Some(90_000 << 20));
}

#[tokio::test]
async fn an_unknown_id_is_reported_as_absent() {
    let lab = Lab::new();
    let session = lab.session(Register::Auto);
    let id = "0b9f6d7e-0000-4000-8000-000000000000";
    assert_eq!(session.image(id).await.unwrap(), None);
    assert_eq!(session.volume(id).await.unwrap(), None);
    assert_eq!(session.snapshot(id).await.unwrap(), None);
    assert_eq!(session.image("../images").await.unwrap(), None);
    assert_eq!(session.image("..").await.unwrap_err().kind(), ErrorKind::Refused);
    assert_eq!(session.image_usage("no-such-project").await.unwrap(), 0);
}
