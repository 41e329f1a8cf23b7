//! An image record of Glance, and what the promises want to know of it.

use std::collections::{BTreeMap, BTreeSet};

use tokio::time::Instant;
use uuid::Uuid;

use super::cluster::FSID;
use crate::openstack::{ErrorKind, Image, ImageChange, ImageTask};
use crate::request::{self, Source, TagRequest};

/// The property that names the task which Glance runs on an image.
pub const TASK: &str = "os_glance_import_task";

/// An image record, and what the checks want to know of it.
#[derive(Debug, Clone)]
pub struct ImageRecord {
    pub image: Image,
    pub locations: Vec<String>,
    pub tasks: Vec<ImageTask>,
    /// When it was last asked for.
    pub asked: Instant,
    /// What it was last asked to be made from.
    pub source: Option<Source>,
    /// Was ever asked for, rightly or not.
    pub requested: bool,
    /// Contents that other writers uploaded.
    pub uploads: BTreeSet<u64>,
    pub active_by_location: bool,
    /// An upload is going on.
    pub uploading: bool,
    /// Active by an import to another store.
    pub elsewhere: bool,
    /// What it was ever asked to be made from, and when first.
    pub requests: Vec<(Source, Instant)>,
    /// As each daemon was last told of it.
    pub told: BTreeMap<String, Image>,
    /// As the daemon that registered the location was told of it last.
    pub posted: Option<Image>,
    /// What it was asked to be made from at that moment, and since when.
    pub posted_request: Option<(Source, Instant)>,
}

impl ImageRecord {
    /// A queued record that asks for `source`, with a property that its tenant set.
    pub fn queued(id: Uuid, owner: &str, tags: Vec<String>, source: Option<Source>) -> Self {
        let now = Instant::now();
        Self {
            image: Image {
                id: id.to_string(),
                name: None,
                status: "queued".into(),
                owner: Some(owner.to_owned()),
                visibility: Some("shared".into()),
                disk_format: None,
                container_format: None,
                min_disk: 0,
                min_ram: 0,
                size: None,
                tags,
                properties: [("own".to_owned(), "1".to_owned())].into(),
            },
            locations: Vec::new(),
            tasks: Vec::new(),
            asked: now,
            source,
            requested: true,
            uploads: BTreeSet::new(),
            active_by_location: false,
            uploading: false,
            elsewhere: false,
            requests: source.map(|source| (source, now)).into_iter().collect(),
            told: BTreeMap::new(),
            posted: None,
            posted_request: None,
        }
    }

    /// The tenant asks for that from now on.
    pub fn asks_for(&mut self, source: Source, now: Instant) {
        (self.source, self.asked) = (Some(source), now);
        if !self.requests.iter().any(|(known, _)| *known == source) {
            self.requests.push((source, now));
        }
    }

    /// The request that the daemon which registered the location knew, and when it was made.
    pub fn posted_for(&self) -> Option<(Source, Instant)> {
        let tags = self.posted.as_ref().map(|image| image.tags.as_slice()).unwrap_or_default();
        match request::parse_request_tags(tags) {
            TagRequest::Source(source) if Some(source) != self.posted_request.map(|(source, _)| source) => {
                self.requests.iter().find(|(known, _)| *known == source).copied()
            }
            _ => self.posted_request,
        }
    }

    /// Changes the record as a PATCH does, all of it or nothing. Properties whose names start with `protected` may be
    /// neither set nor removed.
    pub fn apply(&mut self, changes: &[ImageChange], protected: Option<&str>) -> Result<(), ErrorKind> {
        let mut image = self.image.clone();
        let changeable = image.status == "queued";
        for change in changes {
            if let ImageChange::Set { property, .. }
            | ImageChange::Replace { property, .. }
            | ImageChange::Remove { property } = change
                && protected.is_some_and(|prefix| property.starts_with(prefix))
            {
                return Err(ErrorKind::Forbidden);
            }
            match change {
                ImageChange::Set { property, value } => {
                    image.properties.insert(property.clone(), value.clone());
                }
                ImageChange::Replace { property, value } => match image.properties.get_mut(property) {
                    Some(old) => old.clone_from(value),
                    None => return Err(ErrorKind::Conflict),
                },
                ImageChange::Remove { property } => {
                    if image.properties.remove(property).is_none() {
                        return Err(ErrorKind::Conflict);
                    }
                }
                ImageChange::DiskFormat(format) => {
                    if !changeable && image.disk_format.as_ref() != Some(format) {
                        return Err(ErrorKind::Forbidden);
                    }
                    image.disk_format = Some(format.clone());
                }
                ImageChange::ContainerFormat(format) => {
                    if !changeable && image.container_format.as_ref() != Some(format) {
                        return Err(ErrorKind::Forbidden);
                    }
                    image.container_format = Some(format.clone());
                }
                ImageChange::MinDisk(gib) => image.min_disk = *gib,
                ImageChange::MinRam(_) => {}
                ImageChange::Tags(tags) => image.tags.clone_from(tags),
            }
        }
        self.image = image;
        Ok(())
    }

    /// Glance takes a location from a daemon: a task is to look at it.
    pub fn take_location(&mut self, daemon: &str, task: &str, is_same_when_changed_back: bool) {
        self.image.properties.insert(TASK.into(), task.to_owned());
        self.posted = self.told.get(daemon).cloned();
        let first =
            |source| self.requests.iter().find(|(known, _)| is_same_when_changed_back && *known == source).copied();
        self.posted_request = self.source.map(|source| first(source).unwrap_or((source, self.asked)));
        let queued =
            ImageTask { id: task.to_owned(), kind: String::new(), status: "processing".into(), message: String::new() };
        self.tasks.insert(0, queued);
    }

    pub fn finish_task(&mut self, task: &str, status: &str, message: &str) {
        self.image.properties.remove(TASK);
        for t in self.tasks.iter_mut().filter(|t| t.id == task) {
            t.status = status.into();
            t.message = message.into();
        }
    }

    /// Data of another client are about to come, with that status meanwhile.
    pub fn begin_data(&mut self, status: &str) {
        self.image.disk_format.get_or_insert("raw".into());
        self.image.container_format.get_or_insert("bare".into());
        self.image.status = status.into();
    }
}

/// Pool, image and snapshot of a location.
pub fn location(url: &str) -> Option<(String, String, String)> {
    let rest = url.strip_prefix(&format!("rbd://{FSID}/"))?;
    let mut parts = rest.split('/').map(str::to_owned);
    Some((parts.next()?, parts.next()?, parts.next()?))
}
