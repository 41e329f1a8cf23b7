//! Glance: image records, locations, tasks, stores, and what a project's images take.

use std::collections::BTreeMap;

use http::{Method, StatusCode};
use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny};
use serde_json::{Value, json};

use super::error::{Error, ErrorKind, Result};
use super::session::{HttpClient, Request, Service, Session};
use super::{GlanceStore, Image, ImageChange, ImagePage, ImageTask, ListCursor, LocationAnswer, Validation, json};
use crate::config::Register;

const JSON_PATCH: &str = "application/openstack-images-v2.1-json-patch";
pub(super) const JSON: &str = "application/json";

/// Images asked for at a time where a whole list is read; Glance's default `api_limit_max`.
const PAGE: usize = 1000;

/// By how much a page of a list shrinks when its answer is too large, and grows afterwards.
const SHRINK: usize = 4;

/// Attributes of Glance's own schema; everything else in a record is a property.
const ATTRIBUTES: &[&str] = &[
    "checksum",
    "container_format",
    "created_at",
    "deleted",
    "deleted_at",
    "direct_url",
    "disk_format",
    "file",
    "id",
    "location",
    "locations",
    "min_disk",
    "min_ram",
    "name",
    "os_hash_algo",
    "os_hash_value",
    "os_hidden",
    "owner",
    "protected",
    "schema",
    "self",
    "size",
    "status",
    "stores",
    "tags",
    "updated_at",
    "virtual_size",
    "visibility",
];

/// Whether `name` is one of Glance's own attributes, or in its reserved namespace: no property that a caller may set.
/// Volume image metadata holds such names; set as an administrator, `owner` or `visibility` would give an image away.
pub fn is_reserved(name: &str) -> bool {
    ATTRIBUTES.contains(&name) || name.starts_with("os_glance_") || name.is_empty()
}

impl Session {
    pub(super) async fn get_image(&self, id: &str) -> Result<Option<Image>> {
        get(&self.wire, id).await
    }

    pub(super) async fn patch_image(&self, id: &str, changes: &[ImageChange]) -> Result<Option<Image>> {
        if changes.is_empty() {
            return self.get_image(id).await;
        }
        let what = format!("update image {id}");
        let operations = changes
            .iter()
            .map(operation)
            .collect::<std::result::Result<Vec<_>, _>>()
            .map_err(|reason| Error::new(format!("Glance: {what}"), ErrorKind::Refused, reason))?;
        let answer = self.wire.send(patch(what, &["images", id], operations)).await?;
        image_if_found(answer)
    }

    pub(super) async fn register_location(
        &self,
        id: &str,
        url: &str,
        validation: Option<&Validation>,
    ) -> Result<Option<LocationAnswer>> {
        match self.register {
            Register::Patch => self.patch_location(id, url, validation).await,
            Register::LocationsApi | Register::Auto => self.post_location(id, url, validation).await,
        }
    }

    /// The location API, Glance 29 (2024.2) and later.
    async fn post_location(
        &self,
        id: &str,
        url: &str,
        validation: Option<&Validation>,
    ) -> Result<Option<LocationAnswer>> {
        let mut body = json!({ "url": url });
        if let Some(validation) = validation {
            body["validation_data"] = validation_data(validation);
        }
        let path = ["images", id, "locations"];
        let request = Request::send(Method::POST, Service::Image, format!("add location to image {id}"), &path)
            .body(JSON, body)
            .with_service_token();
        let answer = self.wire.send(request).await?;
        match answer.status {
            StatusCode::CONFLICT => Ok(Some(LocationAnswer::Conflict)),
            // A Glance without the call, or an image that is gone: the two look alike, so ask for the image.
            StatusCode::NOT_FOUND | StatusCode::METHOD_NOT_ALLOWED => {
                if self.get_image(id).await?.is_none() {
                    return Ok(None);
                }
                if self.register == Register::Auto {
                    return self.patch_location(id, url, validation).await;
                }
                Err(Error::new(
                    answer.call,
                    ErrorKind::Refused,
                    "this Glance has no location API (it came with 2024.2); set [glance] register = patch or auto",
                ))
            }
            _ => answer.success().map(|_| Some(LocationAnswer::Accepted)),
        }
    }

    /// The older way, which needs `show_multiple_locations = True`. It would add a second location to an active image,
    /// so only a queued one gets there.
    async fn patch_location(
        &self,
        id: &str,
        url: &str,
        validation: Option<&Validation>,
    ) -> Result<Option<LocationAnswer>> {
        match self.get_image(id).await? {
            None => return Ok(None),
            Some(image) if image.status != "queued" => return Ok(Some(LocationAnswer::Conflict)),
            Some(_) => {}
        }
        let mut location = json!({ "url": url, "metadata": {} });
        if let Some(validation) = validation {
            location["validation_data"] = validation_data(validation);
        }
        let operation = json!({ "op": "add", "path": "/locations/-", "value": location });
        let what = format!("add location to image {id} by PATCH");
        let answer = self.wire.send(patch(what, &["images", id], vec![operation])).await?;
        match answer.status {
            StatusCode::NOT_FOUND => Ok(None),
            StatusCode::CONFLICT => Ok(Some(LocationAnswer::Conflict)),
            _ => answer.success().map(|_| Some(LocationAnswer::Accepted)),
        }
    }

    /// Glance 29 (2024.2) and later show the locations to a service. An older one shows them in the record, where it is
    /// configured so.
    pub(super) async fn list_locations(&self, id: &str) -> Result<Option<Vec<String>>> {
        let what = || format!("locations of image {id}");
        let path = ["images", id, "locations"];
        let answer = self.wire.send(Request::get(Service::Image, what(), &path).with_service_token()).await?;
        match answer.status {
            StatusCode::FORBIDDEN | StatusCode::NOT_FOUND | StatusCode::METHOD_NOT_ALLOWED => {
                let path = ["images", id];
                let answer = self.wire.send(Request::get(Service::Image, what(), &path)).await?;
                Ok(answer.read_if_found::<Locations>()?.and_then(Locations::shown))
            }
            _ => answer.read().map(urls).map(Some),
        }
    }

    pub(super) async fn deactivate(&self, id: &str) -> Result<bool> {
        let path = ["images", id, "actions", "deactivate"];
        let request = Request::send(Method::POST, Service::Image, format!("deactivate image {id}"), &path);
        let answer = self.wire.send(request).await?;
        if answer.status == StatusCode::NOT_FOUND {
            return Ok(false);
        }
        answer.success().map(|_| true)
    }

    pub(super) async fn list_tasks(&self, id: &str) -> Result<Vec<ImageTask>> {
        let path = ["images", id, "tasks"];
        let answer = self.wire.send(Request::get(Service::Image, format!("tasks of image {id}"), &path)).await?;
        Ok(answer.read_if_found()?.map(tasks).unwrap_or_default())
    }

    /// Glance lists hidden images only when asked for them, so the list is the shown ones and then the hidden ones.
    pub(super) async fn list_queued(&self, cursor: &ListCursor, limit: usize) -> Result<ImagePage> {
        const WHAT: &str = "list queued images";
        let query = [("status", "queued".to_owned())];
        let listed = match self.list_images(WHAT, &query, cursor, limit).await {
            // 400: there is no such marker
            Err(error) if error.kind() == ErrorKind::Refused && cursor.marker.is_some() => {
                let detail = format!("the image where the list was to go on may be gone ({error}); begin again");
                return Err(Error::new(format!("Glance: {WHAT}"), ErrorKind::Unavailable, detail));
            }
            listed => listed?,
        };
        let mut page = ImagePage { next: listed.next, ..ImagePage::default() };
        page.skipped.extend(listed.too_large);
        for item in &listed.items {
            match json::read(&listed.call, item) {
                Ok(image) => page.images.push(image),
                Err(error) => match json::read(&listed.call, item) {
                    Ok(Named { id }) => page.skipped.push(id),
                    Err(_) => return Err(error),
                },
            }
        }
        Ok(page)
    }

    /// As Glance counts for `image_size_total`: size times locations, of every image that is not deleted or killed.
    pub(super) async fn sum_image_sizes(&self, project_id: &str) -> Result<u64> {
        let what = format!("images of project {project_id}");
        let query = [("owner", project_id.to_owned()), ("size_min", "1".to_owned())];
        let mut total = 0u64;
        let mut next = Some(ListCursor::default());
        while let Some(cursor) = next {
            let listed = self.list_images(&what, &query, &cursor, PAGE).await?;
            // a project must not hide what it uses behind a record that cannot be read
            if let Some(id) = listed.too_large {
                let detail = format!("the record of image {id} is too large to be read: the usage cannot be counted");
                return Err(Error::new(listed.call, ErrorKind::Refused, detail));
            }
            for item in &listed.items {
                // A Glance that ignored the filter must not charge one project for another.
                if json::read::<Owned, _>(&listed.call, item)?.owner.as_deref() == Some(project_id) {
                    total = total.saturating_add(json::read::<Usage, _>(&listed.call, item)?.bytes());
                }
            }
            next = listed.next;
        }
        Ok(total)
    }

    /// One page of the images that `filter` asks for, of all projects. When the answer is too large, fewer images are
    /// asked for, at last one; a record that is too large by itself is named and passed over.
    async fn list_images(
        &self,
        what: &str,
        filter: &[(&'static str, String)],
        cursor: &ListCursor,
        limit: usize,
    ) -> Result<Listed> {
        const PATH: &[&str] = &["images"];
        let most = limit.clamp(1, PAGE);
        let mut limit = cursor.shrunk.unwrap_or(most).clamp(1, most);
        loop {
            let mut query = filter.to_vec();
            query.extend([
                ("visibility", "all".to_owned()),
                ("member_status", "all".to_owned()),
                ("os_hidden", cursor.hidden.to_string()),
                ("sort", "created_at:asc,id:asc".to_owned()),
                ("limit", limit.to_string()),
            ]);
            query.extend(cursor.marker.clone().map(|marker| ("marker", marker)));
            let (call, items, more, too_large) = match self.page(what, PATH, &query).await {
                Ok((call, Page { images, next })) => {
                    let more = !images.is_empty() && next.is_some();
                    (call, images, more, None)
                }
                Err(error) if error.kind() == ErrorKind::TooLarge && limit > 1 => {
                    limit = (limit / SHRINK).max(1);
                    continue;
                }
                Err(error) if error.kind() == ErrorKind::TooLarge => {
                    let id = self.wire.marker_after(Service::Image, what, PATH, &query).await?;
                    (format!("Glance: {what}"), Vec::new(), true, Some(id))
                }
                Err(error) => return Err(error),
            };
            let last = match (&too_large, items.last()) {
                (Some(id), _) => Some(id.clone()),
                (None, Some(item)) => Some(json::read::<Named, _>(&call, item)?.id),
                (None, None) => None,
            };
            let next = match (last, more) {
                (Some(marker), true) => {
                    // it grows again once the large ones are behind
                    let grown = if too_large.is_some() { 1 } else { limit.saturating_mul(SHRINK) };
                    let shrunk = (grown < most).then_some(grown);
                    Some(ListCursor { hidden: cursor.hidden, marker: Some(marker), shrunk })
                }
                _ if cursor.hidden => None,
                _ => Some(ListCursor { hidden: true, ..ListCursor::default() }),
            };
            return Ok(Listed { call, items, too_large, next });
        }
    }

    /// One answer of a list of images, and the call that it answers.
    async fn page(&self, what: &str, path: &[&str], query: &[(&'static str, String)]) -> Result<(String, Page)> {
        let answer = self.wire.send(Request::get(Service::Image, what, path).query(query.to_vec())).await?;
        Ok((answer.call.clone(), answer.read()?))
    }

    pub(super) async fn list_stores(&self) -> Result<Vec<GlanceStore>> {
        let path = ["info", "stores", "detail"];
        let answer = self.wire.send(Request::get(Service::Image, "list stores", &path)).await?;
        Ok(answer.read_if_found()?.map(stores).unwrap_or_default())
    }

    /// Whether this Glance has the location API: for a path that it knows it refuses HEAD with 405, for another with
    /// 404.
    pub async fn has_location_api(&self) -> Result<bool> {
        let path = ["images", "00000000-0000-0000-0000-000000000000", "locations"];
        let request = Request::send(Method::HEAD, Service::Image, "look for the location API", &path);
        let answer = self.wire.send(request).await?;
        match answer.status {
            StatusCode::METHOD_NOT_ALLOWED => Ok(true),
            StatusCode::NOT_FOUND => Ok(false),
            _ => answer.success().map(|_| true),
        }
    }

    /// Whether Glance lets us write this property on image records and remove it again. Tried on a record of our own
    /// without data, which the caller deletes, also after an error. `None`: we may not create one.
    pub async fn may_write_property(&self, id: &str, property: &str) -> Result<Option<bool>> {
        match self.create_probe_image(id).await {
            Err(error) if error.kind() == ErrorKind::Forbidden => return Ok(None),
            // by an earlier call, whose answer did not come in time
            Err(error) if error.kind() == ErrorKind::Conflict => {}
            created => created?,
        }
        let property = property.to_owned();
        let set = ImageChange::Set { property: property.clone(), value: "1".into() };
        let mut written = self.patch_image(id, &[set]).await;
        if written.is_ok() {
            written = self.patch_image(id, &[ImageChange::Remove { property }]).await;
        }
        match written {
            Ok(_) => Ok(Some(true)),
            Err(error) if error.kind() == ErrorKind::Forbidden => Ok(Some(false)),
            Err(error) => Err(error),
        }
    }

    /// Creates a record without data in our own project. The caller chooses its id: it can delete the record also when
    /// no answer comes. [`ErrorKind::Conflict`]: there is one already.
    pub async fn create_probe_image(&self, id: &str) -> Result<()> {
        let record = json!({
            "id": id,
            "name": "rbd-offload check",
            "visibility": "private",
            "disk_format": "raw",
            "container_format": "bare",
        });
        let request = Request::send(Method::POST, Service::Image, format!("create image record {id}"), &["images"]);
        self.wire.send(request.body(JSON, record)).await?.success().map(drop)
    }

    /// The data of an image of ours, of at most 16 MiB.
    pub async fn probe_image_data(&self, id: &str) -> Result<Vec<u8>> {
        let path = ["images", id, "file"];
        let request = Request::get(Service::Image, format!("download image {id}"), &path);
        self.wire.send(request).await?.into_body()
    }

    /// Deletes an image of ours. False: there is none. [`ErrorKind::Conflict`]: Glance still uses it.
    pub async fn delete_probe_image(&self, id: &str) -> Result<bool> {
        let path = ["images", id];
        let request = Request::send(Method::DELETE, Service::Image, format!("delete image {id}"), &path);
        let answer = self.wire.send(request).await?;
        if answer.status == StatusCode::NOT_FOUND { Ok(false) } else { answer.success().map(|_| true) }
    }

    /// Whether Glance answers us: the cheapest call that takes a token.
    pub async fn probe_image(&self) -> Result<()> {
        let query = vec![("limit", "1".to_owned()), ("status", "queued".to_owned())];
        self.page("list one image", &["images"], &query).await.map(drop)
    }
}

/// A page of a list of images, as it was answered.
struct Listed {
    call: String,
    items: Vec<Value>,
    /// The image whose record is longer than what is read.
    too_large: Option<String>,
    next: Option<ListCursor>,
}

pub(super) async fn get(wire: &HttpClient, id: &str) -> Result<Option<Image>> {
    let path = ["images", id];
    image_if_found(wire.send(Request::get(Service::Image, format!("get image {id}"), &path)).await?)
}

fn image_if_found(answer: super::session::Response) -> Result<Option<Image>> {
    answer.read_if_found()
}

fn patch<'a>(what: String, path: &'a [&'a str], operations: Vec<Value>) -> Request<'a> {
    Request::send(Method::PATCH, Service::Image, what, path).body(JSON_PATCH, Value::Array(operations))
}

fn validation_data(validation: &Validation) -> Value {
    json!({ "os_hash_algo": validation.algorithm, "os_hash_value": validation.value })
}

/// One operation of Glance's JSON patch.
fn operation(change: &ImageChange) -> std::result::Result<Value, String> {
    let property = |name: &str| match is_reserved(name) {
        true => Err(format!("{name:?} is one of Glance's own attributes, not a property")),
        false => Ok(format!("/{}", name.replace('~', "~0").replace('/', "~1"))),
    };
    Ok(match change {
        ImageChange::Set { property: name, value } => {
            json!({ "op": "add", "path": property(name)?, "value": value })
        }
        ImageChange::Replace { property: name, value } => {
            json!({ "op": "replace", "path": property(name)?, "value": value })
        }
        ImageChange::Remove { property: name } => json!({ "op": "remove", "path": property(name)? }),
        ImageChange::DiskFormat(value) => json!({ "op": "replace", "path": "/disk_format", "value": value }),
        ImageChange::ContainerFormat(value) => {
            json!({ "op": "replace", "path": "/container_format", "value": value })
        }
        ImageChange::MinDisk(value) => json!({ "op": "replace", "path": "/min_disk", "value": value }),
        ImageChange::MinRam(value) => json!({ "op": "replace", "path": "/min_ram", "value": value }),
        ImageChange::Tags(value) => json!({ "op": "replace", "path": "/tags", "value": value }),
    })
}

/// What of a record is a property: every string that is not one of Glance's own attributes.
pub(super) fn properties<'de, D: Deserializer<'de>>(
    json: D,
) -> std::result::Result<BTreeMap<String, String>, D::Error> {
    let mut properties = json::texts(json)?;
    properties.retain(|name, _| !ATTRIBUTES.contains(&name.as_str()));
    Ok(properties)
}

/// A page of a list of images.
#[derive(Deserialize)]
struct Page {
    images: Vec<Value>,
    #[serde(default)]
    next: Option<String>,
}

#[derive(Deserialize)]
struct Named {
    id: String,
}

#[derive(Deserialize)]
struct Owned {
    #[serde(default)]
    owner: Option<String>,
}

/// What tells how much an image takes.
#[derive(Deserialize)]
struct Usage {
    #[serde(default)]
    size: Option<u64>,
    status: String,
    #[serde(default)]
    locations: Option<Vec<IgnoredAny>>,
    /// The names of stores, one a location, separated by commas.
    #[serde(default)]
    stores: Option<String>,
}

impl Usage {
    /// Locations are shown or not as Glance is configured.
    fn bytes(&self) -> u64 {
        let copies = match (self.status.as_str(), &self.locations, &self.stores) {
            ("killed" | "deleted" | "pending_delete", _, _) => 0,
            (_, Some(locations), _) => locations.len(),
            (_, None, Some(stores)) => stores.split(',').filter(|store| !store.trim().is_empty()).count(),
            // A queued record may keep the size of a failed try; it has no location.
            (status, None, None) => usize::from(status != "queued"),
        };
        self.size.unwrap_or(0).saturating_mul(copies as u64)
    }
}

/// The locations that an image record shows.
#[derive(Deserialize)]
struct Locations {
    #[serde(default)]
    locations: Option<Vec<Location>>,
    /// The URL of the first of them.
    #[serde(default)]
    direct_url: Option<String>,
}

#[derive(Deserialize)]
struct Location {
    url: String,
}

impl Locations {
    fn shown(self) -> Option<Vec<String>> {
        self.locations.map(urls).or_else(|| self.direct_url.map(|url| vec![url]))
    }
}

fn urls(locations: Vec<Location>) -> Vec<String> {
    locations.into_iter().map(|location| location.url).collect()
}

#[derive(Deserialize)]
struct Tasks {
    tasks: Vec<TaskRecord>,
}

#[derive(Deserialize)]
struct TaskRecord {
    id: String,
    #[serde(default, rename = "type", deserialize_with = "json::or_default")]
    kind: String,
    status: String,
    #[serde(default, deserialize_with = "json::or_default")]
    message: String,
    #[serde(default)]
    created_at: Option<String>,
}

/// The newest first.
fn tasks(mut answer: Tasks) -> Vec<ImageTask> {
    answer.tasks.sort_by(|one, other| other.created_at.cmp(&one.created_at));
    let task = |TaskRecord { id, kind, status, message, .. }| ImageTask { id, kind, status, message };
    answer.tasks.into_iter().map(task).collect()
}

#[derive(Deserialize)]
struct Stores {
    stores: Vec<StoreRecord>,
}

#[derive(Deserialize)]
struct StoreRecord {
    id: String,
    #[serde(default, rename = "type", deserialize_with = "json::or_default")]
    kind: String,
    #[serde(default, deserialize_with = "json::or_default")]
    properties: StoreProperties,
    #[serde(default, deserialize_with = "json::flag")]
    default: bool,
}

#[derive(Default, Deserialize)]
struct StoreProperties {
    #[serde(default)]
    pool: Option<String>,
    #[serde(default)]
    fsid: Option<String>,
}

fn stores(answer: Stores) -> Vec<GlanceStore> {
    let store = |StoreRecord { id, kind, properties: StoreProperties { pool, fsid }, default }| GlanceStore {
        id,
        kind,
        pool,
        fsid,
        default,
    };
    answer.stores.into_iter().map(store).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::fake::{base_of, serve, token, token_of, wire};
    use super::super::json::hostile;
    use super::*;

    fn image(call: &str, record: &Value) -> Result<Image> {
        json::read(call, record)
    }

    const NAMES: &[&str] = &[
        "id",
        "name",
        "status",
        "owner",
        "disk_format",
        "min_disk",
        "size",
        "tags",
        "tasks",
        "stores",
        "properties",
        "pool",
        "default",
        "type",
        "message",
        "locations",
        "created_at",
    ];

    fn record() -> Value {
        json!({
            "id": "1234", "name": null, "status": "queued", "owner": "p1", "visibility": "private", "protected": false,
            "disk_format": null, "container_format": "bare", "min_disk": 3, "min_ram": 0, "size": null,
            "virtual_size": null, "checksum": null, "os_hash_algo": null, "os_hash_value": null, "os_hidden": false,
            "created_at": "2025-01-01T00:00:00Z", "updated_at": "2025-01-01T00:00:00Z", "tags": ["rbd-offload:volume:1"],
            "self": "/v2/images/1234", "file": "/v2/images/1234/file", "schema": "/v2/schemas/image",
            "direct_url": "rbd://f/p/i/snap", "locations": [], "stores": "ceph",
            "os_glance_import_task": "t1", "rbd_offload_status": "accepted", "a/b~c": "x", "odd": 5,
        })
    }

    #[test]
    fn a_record_keeps_its_properties_and_loses_glances_attributes() {
        let image = image("call", &record()).unwrap();
        assert_eq!(image.name, None);
        assert_eq!(image.min_disk, 3);
        assert_eq!(image.size, None);
        assert_eq!(image.tags, ["rbd-offload:volume:1"]);
        let names: Vec<_> = image.properties.keys().map(String::as_str).collect();
        assert_eq!(names, ["a/b~c", "os_glance_import_task", "rbd_offload_status"]);
    }

    #[test]
    fn an_error_names_the_field() {
        for (field, value, says) in [
            ("status", json!(5), "invalid type: integer `5`, expected a string"),
            ("size", json!(-1), "invalid value: integer `-1`, expected u64"),
            ("min_disk", json!("3"), "invalid type: string \"3\", expected u64"),
            ("tags", json!({}), "invalid type: map, expected a sequence"),
        ] {
            let mut record = record();
            record[field] = value;
            let error = image("Glance: get image 1", &record).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Protocol);
            assert_eq!(error.to_string(), format!("Glance: get image 1: field {field:?}: {says}"));
        }
        let mut record = record();
        record["tags"] = json!(["x", 1]);
        let error = image("x", &record).unwrap_err();
        assert_eq!(error.to_string(), "x: field \"tags[1]\": invalid type: integer `1`, expected a string");
        let error = image("x", &json!({"id": "1"})).unwrap_err();
        assert_eq!(error.to_string(), "x: the answer: missing field `status`");
        assert_eq!(image("x", &json!(5)).unwrap_err().kind(), ErrorKind::Protocol);
    }

    #[test]
    fn an_error_stays_short_and_on_one_line() {
        let error = image("x", &json!({"id": "1", "status": "s", "size": "\n\u{202e}".repeat(1000)})).unwrap_err();
        let text = error.to_string();
        assert!(text.chars().count() < 300 && !text.contains(['\n', '\u{202e}']), "{text}");
    }

    #[test]
    fn image_changes_become_json_patch_operations() {
        let set = ImageChange::Set { property: "a/b~c".into(), value: "x".into() };
        assert_eq!(operation(&set).unwrap(), json!({"op": "add", "path": "/a~1b~0c", "value": "x"}));
        let replace = ImageChange::Replace { property: "p".into(), value: "y".into() };
        assert_eq!(operation(&replace).unwrap(), json!({"op": "replace", "path": "/p", "value": "y"}));
        let remove = ImageChange::Remove { property: "p".into() };
        assert_eq!(operation(&remove).unwrap(), json!({"op": "remove", "path": "/p"}));
        assert_eq!(operation(&ImageChange::MinDisk(2)).unwrap()["value"], json!(2));
    }

    #[test]
    fn a_base_attribute_cannot_be_set_as_a_property() {
        for name in ["owner", "visibility", "id", "locations", "os_glance_import_task", ""] {
            let change = ImageChange::Set { property: name.into(), value: "x".into() };
            assert!(operation(&change).is_err(), "{name}");
        }
    }

    #[test]
    fn usage_counts_locations_as_glance_does() {
        for (record, bytes) in [
            (json!({"size": 5, "status": "active", "locations": [{}, {}]}), 10),
            (json!({"size": 5, "status": "active", "stores": "a,b,c"}), 15),
            (json!({"size": 5, "status": "active"}), 5),
            (json!({"size": 5, "status": "deactivated"}), 5),
            (json!({"size": 5, "status": "queued"}), 0),
            (json!({"size": 5, "status": "killed", "stores": "a"}), 0),
            (json!({"size": null, "status": "active"}), 0),
            (json!({"size": u64::MAX, "status": "active", "stores": "a,b"}), u64::MAX),
        ] {
            assert_eq!(json::read::<Usage, _>("x", &record).unwrap().bytes(), bytes, "{record}");
        }
    }

    #[test]
    fn tasks_are_newest_first() {
        let body = json!({"tasks": [
            {"id": "a", "status": "failure", "message": "no", "created_at": "2025-01-01T00:00:01Z"},
            {"id": "b", "status": "success", "message": null, "created_at": "2025-01-01T00:00:02Z"},
        ]});
        let ids: Vec<_> = tasks(json::read("x", &body).unwrap()).into_iter().map(|task| task.id).collect();
        assert_eq!(ids, ["b", "a"]);
    }

    #[test]
    fn a_record_shows_its_locations_or_not() {
        let shown = |record: Value| json::read::<Locations, _>("x", &record).unwrap().shown();
        let url = || Some(vec!["rbd://f/p/i/snap".to_owned()]);
        assert_eq!(shown(json!({"locations": [{"url": "rbd://f/p/i/snap", "metadata": {}}]})), url());
        assert_eq!(shown(json!({"direct_url": "rbd://f/p/i/snap"})), url());
        assert_eq!(shown(json!({"locations": [], "direct_url": "rbd://f/p/i/snap"})), Some(Vec::new()));
        assert_eq!(shown(json!({"status": "active"})), None);
        assert!(json::read::<Locations, _>("x", &json!({"locations": [{"url": 5}]})).is_err());
    }

    #[test]
    fn stores_tell_pool_and_cluster() {
        let body = json!({"stores": [
            {"id": "ceph", "type": "rbd", "default": "true", "properties": {"pool": "images", "fsid": "f"}},
            {"id": "web", "type": "http"},
        ]});
        let stores = stores(json::read("x", &body).unwrap());
        assert_eq!(stores[0].pool.as_deref(), Some("images"));
        assert_eq!(stores[0].fsid.as_deref(), Some("f"));
        assert!(stores[0].default && !stores[1].default);
        assert_eq!(stores[1].pool, None);
    }

    /// The policies of Glance 30 and 31 (`service_api`) look for the role in the service token alone.
    #[tokio::test]
    async fn the_location_api_gets_the_token_as_a_services_too() {
        for (roles, answer) in
            [(["admin", "service"], Ok(Some(LocationAnswer::Accepted))), (["admin", "member"], Err(()))]
        {
            let url = serve(move |head| {
                let status = |code, body: &str| Some((code, String::new(), body.to_owned()));
                let as_service = head.contains("x-service-token: t");
                if head.starts_with("POST /v3/auth/tokens") {
                    token_of(&base_of(head), "t", &roles)
                } else if head.contains("/images/1/locations ") {
                    match (as_service, head.starts_with("POST")) {
                        (false, _) => status(403, "You are not authorized to complete add_image_location action."),
                        (true, true) => status(202, ""),
                        (true, false) => status(200, r#"[{"url": "rbd://f/p/1/snap", "metadata": {}}]"#),
                    }
                } else {
                    assert!(!as_service, "{head}");
                    status(200, r#"{"id": "1", "status": "queued"}"#)
                }
            })
            .await;
            let session = Session::new(wire(&url, std::time::Duration::from_secs(5)), Register::Auto);
            let registered = session.register_location("1", "rbd://f/p/1/snap", None).await;
            assert_eq!(registered.map_err(|error| assert_eq!(error.kind(), ErrorKind::Forbidden)), answer);
            let shown = answer.is_ok().then(|| vec!["rbd://f/p/1/snap".to_owned()]);
            assert_eq!(session.list_locations("1").await.unwrap(), shown);
        }
    }

    /// A Glance before 2024.2: no location API, and one image `1`, which is queued.
    async fn old_glance(register: Register, patched: &'static str) -> Session {
        let url = serve(move |head| {
            let status = |code, body: &str| Some((code, String::new(), body.to_owned()));
            if head.starts_with("POST /v3/auth/tokens") {
                token(&base_of(head), "t")
            } else if head.starts_with("GET /image/v2/images/1 ") {
                status(200, r#"{"id": "1", "status": "queued"}"#)
            } else if head.starts_with("GET /image/v2/images/2 ") {
                status(200, r#"{"id": "2", "status": "active"}"#)
            } else if head.starts_with("PATCH /image/v2/images/1 ") && head.contains(JSON_PATCH) {
                match patched {
                    "" => status(200, r#"{"id": "1", "status": "active"}"#),
                    why => status(403, why),
                }
            } else {
                status(404, "<html><body><h1>404 Not Found</h1>The resource could not be found.</body></html>")
            }
        })
        .await;
        Session::new(wire(&url, std::time::Duration::from_secs(5)), register)
    }

    /// A Glance whose queued images have ids from 1 on, some with records of more than a whole answer may have.
    async fn glance_with(images: u32, fat: &'static [u32], fits: usize) -> Session {
        let url = serve(move |head| {
            if head.starts_with("POST /v3/auth/tokens") {
                return token(&base_of(head), "t");
            }
            let line = head.lines().next().unwrap_or_default();
            let value = |name: &str| line.split(['?', '&', ' ']).find_map(|part| part.strip_prefix(name));
            if value("os_hidden=") == Some("true") {
                return Some((200, String::new(), json!({"images": []}).to_string()));
            }
            let limit: u32 = value("limit=").unwrap().parse().unwrap();
            let after: u32 = value("marker=").map_or(0, |marker| marker.parse().unwrap());
            let ids: Vec<u32> = (after + 1..=images).take(limit as usize).collect();
            let records: Vec<String> = ids
                .iter()
                .map(|id| {
                    let padding = if fat.contains(id) { "x".repeat(fits) } else { String::new() };
                    format!(r#"{{"p": "{padding}", "id": "{id}", "status": "queued", "tags": []}}"#)
                })
                .collect();
            let next = match ids.last() {
                Some(last) if ids.len() == limit as usize => format!(r#", "next": "/v2/images?marker={last}""#),
                _ => String::new(),
            };
            Some((200, String::new(), format!(r#"{{"images": [{}]{next}}}"#, records.join(", "))))
        })
        .await;
        Session::new(wire(&url, std::time::Duration::from_secs(60)), Register::Auto)
    }

    async fn list(session: &Session) -> (Vec<u32>, Vec<u32>) {
        let number = |id: &String| id.parse::<u32>().unwrap();
        let (mut images, mut skipped, mut next) = (Vec::new(), Vec::new(), Some(ListCursor::default()));
        while let Some(cursor) = next {
            let page = session.list_queued(&cursor, 200).await.unwrap();
            images.extend(page.images.iter().map(|image| number(&image.id)));
            skipped.extend(page.skipped.iter().map(number));
            next = page.next;
        }
        (images, skipped)
    }

    #[tokio::test]
    async fn a_page_shrinks_until_its_answer_fits() {
        // five records of 4 MiB: no four of them fit into one answer
        let session = glance_with(300, &[10, 11, 12, 13, 300], 4 << 20).await;
        let (images, skipped) = list(&session).await;
        assert_eq!(images, (1..=300).collect::<Vec<_>>());
        assert!(skipped.is_empty(), "{skipped:?}");
    }

    #[tokio::test]
    async fn a_record_that_does_not_fit_alone_is_named_and_passed_over() {
        let session = glance_with(20, &[1, 7, 8, 20], 17 << 20).await;
        let (images, skipped) = list(&session).await;
        assert_eq!(skipped, [1, 7, 8, 20]);
        assert_eq!(images.len(), 16);
        assert!(images.is_sorted());
    }

    #[tokio::test]
    async fn usage_is_not_counted_past_a_record_that_cannot_be_read() {
        let session = glance_with(3, &[2], 17 << 20).await;
        let error = session.sum_image_sizes("p").await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Refused);
        assert!(error.to_string().contains("image 2"), "{error}");
    }

    #[tokio::test]
    async fn auto_falls_back_to_patch_where_glance_has_no_location_api() {
        let session = old_glance(Register::Auto, "").await;
        assert_eq!(
            session.register_location("1", "rbd://f/p/1/snap", None).await.unwrap(),
            Some(LocationAnswer::Accepted)
        );
        assert_eq!(
            session.register_location("2", "rbd://f/p/2/snap", None).await.unwrap(),
            Some(LocationAnswer::Conflict)
        );
        assert_eq!(session.register_location("3", "rbd://f/p/3/snap", None).await.unwrap(), None);
        assert!(session.list_tasks("1").await.unwrap().is_empty());
        assert!(session.list_stores().await.unwrap().is_empty());
    }

    #[tokio::test]
    async fn without_the_location_api_the_operator_is_told() {
        let session = old_glance(Register::LocationsApi, "").await;
        let error = session.register_location("1", "rbd://f/p/1/snap", None).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Refused);
        assert!(error.to_string().contains("[glance] register"), "{error}");
        let session = old_glance(Register::Patch, "locations are invisible").await;
        let error = session.register_location("1", "rbd://f/p/1/snap", None).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Forbidden);
    }

    proptest! {
        #[test]
        fn nothing_in_an_answer_breaks_it(value in hostile::value(NAMES)) {
            for outcome in [
                image("x", &value).map(drop),
                json::read::<Tasks, _>("x", &value).map(drop),
                json::read::<Stores, _>("x", &value).map(drop),
                json::read::<Usage, _>("x", &value).map(drop),
                json::read::<Locations, _>("x", &value).map(drop),
            ] {
                if let Err(error) = outcome {
                    prop_assert_eq!(error.kind(), ErrorKind::Protocol);
                }
            }
        }

        #[test]
        fn a_property_name_never_leaves_its_segment(name in ".{1,40}") {
            let change = ImageChange::Remove { property: name.clone() };
            if let Ok(operation) = operation(&change) {
                let path = operation["path"].as_str().unwrap();
                prop_assert!(!path[1..].contains('/'));
                prop_assert_eq!(path[1..].replace("~1", "/").replace("~0", "~"), name);
            }
        }
    }
}
