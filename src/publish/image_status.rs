//! What the tenant sees on the image record, and what is left on it.
//!
//! While the image is queued: `rbd_offload_status`, `rbd_offload_progress`, `rbd_offload_message`. Properties are
//! inherited by later images, so all of them are taken off before the location is registered.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::openstack::{Image, ImageChange};
use crate::request::PROPERTY_PREFIX;
use crate::request::{self, Source, TagRequest};

const STATUS: &str = "rbd_offload_status";
const PROGRESS: &str = "rbd_offload_progress";
const MESSAGE: &str = "rbd_offload_message";

/// A job that is over before that has shown nothing: each change of a record costs Glance more than a small copy costs
/// Ceph.
pub const SHOWN_AFTER: Duration = Duration::from_secs(2);

/// Longest message, in characters. Glance would take 65,535 bytes; a person reads a sentence or two.
const MESSAGE_MAX: usize = 500;

/// What `rbd_offload_status` may say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    Accepted,
    Copying,
    Publishing,
    Declined,
    Failed,
}

impl Status {
    fn as_str(self) -> &'static str {
        match self {
            Self::Accepted => "accepted",
            Self::Copying => "copying",
            Self::Publishing => "publishing",
            Self::Declined => "declined",
            Self::Failed => "failed",
        }
    }
}

/// Shows where the job stands. `percent` is 0 to 100.
///
/// Properties that are there already are replaced, not set: the change of a daemon that lost the job meanwhile then
/// fails, instead of bringing back what was taken off.
pub fn show(image: &Image, status: Status, percent: u8, message: &str) -> Vec<ImageChange> {
    let message: String = message.chars().take(MESSAGE_MAX).collect();
    [(STATUS, status.as_str().to_owned()), (PROGRESS, percent.min(100).to_string()), (MESSAGE, message)]
        .into_iter()
        .filter(|(property, value)| image.properties.get(*property) != Some(value))
        .map(|(property, value)| {
            let property = property.to_owned();
            if image.properties.contains_key(&property) {
                ImageChange::Replace { property, value }
            } else {
                ImageChange::Set { property, value }
            }
        })
        .collect()
}

/// The end without an image: status and message stay for the tenant, the tag goes, so that setting one asks again.
pub fn end(image: &Image, status: Status, message: &str) -> Vec<ImageChange> {
    let mut changes = show(image, status, 0, message);
    changes.extend(end_without_status(image));
    changes
}

/// The same end where Glance does not let the daemon write properties.
pub fn end_without_status(image: &Image) -> Option<ImageChange> {
    without_tags(image, request::is_ours)
}

/// Takes the tags off that are `unwanted`, where there are such.
fn without_tags(image: &Image, unwanted: impl Fn(&str) -> bool) -> Option<ImageChange> {
    let wanted: Vec<String> = image.tags.iter().filter(|tag| !unwanted(tag)).cloned().collect();
    (wanted.len() < image.tags.len()).then_some(ImageChange::Tags(wanted))
}

/// Makes the record ready for the location: formats (Glance removes the RBD image when they are unset), the smallest
/// disk (GiB) and memory (MiB), the properties of the source, and none of ours. `copying`: the image is active before
/// its copy is complete, and a tag says so.
pub fn prepare(
    image: &Image,
    min_disk: u64,
    min_ram: u64,
    inherited: &BTreeMap<String, String>,
    copying: bool,
) -> Vec<ImageChange> {
    let mut changes = Vec::new();
    if image.disk_format.as_deref() != Some("raw") {
        changes.push(ImageChange::DiskFormat("raw".into()));
    }
    if image.container_format.as_deref() != Some("bare") {
        changes.push(ImageChange::ContainerFormat("bare".into()));
    }
    if image.min_disk < min_disk {
        changes.push(ImageChange::MinDisk(min_disk));
    }
    if image.min_ram < min_ram {
        changes.push(ImageChange::MinRam(min_ram));
    }
    for (property, value) in inherited {
        if !image.properties.contains_key(property) {
            changes.push(ImageChange::Set { property: property.clone(), value: value.clone() });
        }
    }
    for property in image.properties.keys().filter(|property| property.starts_with(PROPERTY_PREFIX)) {
        changes.push(ImageChange::Remove { property: property.clone() });
    }
    // the tag of a request stays as provenance; those of a hand-over are between two services
    let is_wanted =
        |tag: &String| !tag.starts_with(request::HANDOVER_PREFIX) && (copying || tag != request::COPYING_TAG);
    let mut tags: Vec<String> = image.tags.iter().filter(|tag| is_wanted(tag)).cloned().collect();
    if copying && !tags.iter().any(|tag| tag == request::COPYING_TAG) {
        tags.push(request::COPYING_TAG.to_owned());
    }
    if tags != image.tags {
        changes.push(ImageChange::Tags(tags));
    }
    changes
}

/// Takes off the tag of an image that was active before its copy was complete.
pub fn without_copying_tag(image: &Image) -> Option<ImageChange> {
    without_tags(image, |tag| tag == request::COPYING_TAG)
}

/// Whether a client made the image active by uploading nothing. No image of ours is empty.
pub fn is_empty_upload(image: &Image) -> bool {
    image.status == "active" && image.size == Some(0)
}

/// Says on an image that was uploaded empty that its request will not be done: by a tag in place of the request's,
/// since what is made from an active image inherits its properties, and never its tags.
pub fn tag_empty_upload(image: &Image) -> Option<ImageChange> {
    if !is_empty_upload(image) || request::parse_request_tags(&image.tags) == TagRequest::Absent {
        return None;
    }
    let mut tags: Vec<String> = image.tags.iter().filter(|tag| !request::is_ours(tag)).cloned().collect();
    tags.push(request::EMPTY_UPLOAD_TAG.to_owned());
    Some(ImageChange::Tags(tags))
}

/// Takes off what is ours from a record that turned active all the same.
pub fn clear(image: &Image) -> Vec<ImageChange> {
    image
        .properties
        .keys()
        .filter(|property| property.starts_with(PROPERTY_PREFIX))
        .map(|property| ImageChange::Remove { property: property.clone() })
        .collect()
}

/// What an image that was made from `source` is to keep: nothing of ours but the tag that names the source. `None`: the
/// image's tags are not the daemon's business.
pub fn finished(image: &Image, source: Option<Source>) -> Vec<ImageChange> {
    let mut changes = clear(image);
    let asked = request::parse_request_tags(&image.tags);
    if let Some(source) = source
        && asked != TagRequest::Absent
        && asked != TagRequest::Source(source)
    {
        let mut tags: Vec<String> = image.tags.iter().filter(|tag| !request::is_request(tag)).cloned().collect();
        tags.push(source.tag());
        changes.push(ImageChange::Tags(tags));
    }
    changes
}

/// Whether the record is what the daemon publishes. The header of the copy was inspected for these formats alone.
pub fn is_raw_and_bare(image: &Image) -> bool {
    image.disk_format.as_deref() == Some("raw") && image.container_format.as_deref() == Some("bare")
}

/// Whether the record shows a job that has not ended.
pub fn shows_running_job(image: &Image) -> bool {
    let running = [Status::Accepted, Status::Copying, Status::Publishing];
    image.properties.get(STATUS).is_some_and(|status| running.iter().any(|running| running.as_str() == status))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn image() -> Image {
        serde_json::from_value(json!({
            "id": "i", "status": "queued", "tags": ["blue", "rbd-offload:volume:x"],
            "rbd_offload_status": "copying", "os": "l",
        }))
        .unwrap()
    }

    #[test]
    fn a_changed_property_is_replaced_and_an_equal_one_is_not_sent() {
        let changes = show(&image(), Status::Copying, 40, "m");
        assert_eq!(
            changes,
            [
                ImageChange::Set { property: PROGRESS.into(), value: "40".into() },
                ImageChange::Set { property: MESSAGE.into(), value: "m".into() }
            ]
        );
        assert!(matches!(&show(&image(), Status::Failed, 0, "m")[0], ImageChange::Replace { .. }));
    }

    #[test]
    fn an_end_takes_the_request_tag_off_and_only_that() {
        assert!(end(&image(), Status::Declined, "no").contains(&ImageChange::Tags(vec!["blue".into()])));
        let mut untagged = image();
        untagged.tags = vec!["blue".into()];
        assert!(!end(&untagged, Status::Declined, "no").iter().any(|c| matches!(c, ImageChange::Tags(_))));
    }

    #[test]
    fn an_empty_upload_is_told_by_a_tag_and_by_no_property() {
        let empty = Image { status: "active".into(), size: Some(0), ..image() };
        let tagged = ImageChange::Tags(vec!["blue".into(), request::EMPTY_UPLOAD_TAG.into()]);
        assert_eq!(tag_empty_upload(&empty), Some(tagged));
        assert!(finished(&empty, None).iter().all(|change| matches!(change, ImageChange::Remove { .. })));
        let told = Image { tags: vec![request::EMPTY_UPLOAD_TAG.into()], ..empty.clone() };
        assert_eq!(tag_empty_upload(&told), None);
        // what is uploaded, and what still is to be, is not ours to judge
        for (status, size) in [("active", Some(1)), ("active", None), ("queued", Some(0)), ("saving", Some(0))] {
            let other = Image { status: status.into(), size, ..empty.clone() };
            assert_eq!(tag_empty_upload(&other), None, "{status} {size:?}");
        }
    }

    #[test]
    fn a_hand_over_leaves_no_tag_either_way() {
        let mut offered = image();
        offered.tags = vec!["blue".into(), "rbd-offload-handover:volume:x@y".into(), request::GO_TAG.into()];
        let only_theirs = ImageChange::Tags(vec!["blue".into()]);
        assert!(end(&offered, Status::Declined, "no").contains(&only_theirs));
        assert!(prepare(&offered, 0, 0, &BTreeMap::new(), false).contains(&only_theirs));
    }

    #[test]
    fn a_tag_tells_that_the_copy_goes_on_and_comes_off() {
        let tags = |image: &Image, copying| {
            prepare(image, 0, 0, &BTreeMap::new(), copying).into_iter().find_map(|change| match change {
                ImageChange::Tags(tags) => Some(tags),
                _ => None,
            })
        };
        let Some(tagged) = tags(&image(), true) else { panic!("no tag was set") };
        assert_eq!(tagged, ["blue", "rbd-offload:volume:x", request::COPYING_TAG]);
        let copying = Image { tags: tagged, ..image() };
        assert_eq!(tags(&copying, true), None);
        assert_eq!(tags(&copying, false), Some(image().tags));
        assert_eq!(without_copying_tag(&copying), Some(ImageChange::Tags(image().tags)));
        assert_eq!(without_copying_tag(&image()), None);
        assert!(end(&copying, Status::Failed, "no").contains(&ImageChange::Tags(vec!["blue".into()])));
    }

    #[test]
    fn a_finished_image_names_its_source() {
        let (source, other) = (Source::Volume(uuid::Uuid::from_u128(1)), Source::Volume(uuid::Uuid::from_u128(2)));
        let tagged = |tags: &[String]| {
            let mut image = image();
            image.tags = tags.to_vec();
            image.properties.clear();
            finished(&image, Some(source))
        };
        let right = vec![ImageChange::Tags(vec!["blue".into(), source.tag()])];
        assert_eq!(tagged(&["blue".into(), source.tag()]), []);
        assert_eq!(tagged(&["blue".into()]), [], "taken off by its owner");
        assert_eq!(tagged(&[other.tag(), "blue".into()]), right);
        assert_eq!(tagged(&[source.tag(), "blue".into(), other.tag()]), right);
        assert_eq!(finished(&image(), None), [ImageChange::Remove { property: STATUS.into() }]);
    }

    #[test]
    fn a_prepared_record_keeps_nothing_of_ours() {
        let inherited = BTreeMap::from([("hw".into(), "1".into()), ("os".into(), "other".into())]);
        let changes = prepare(&image(), 2, 64, &inherited, false);
        assert_eq!(
            changes,
            [
                ImageChange::DiskFormat("raw".into()),
                ImageChange::ContainerFormat("bare".into()),
                ImageChange::MinDisk(2),
                ImageChange::MinRam(64),
                ImageChange::Set { property: "hw".into(), value: "1".into() },
                ImageChange::Remove { property: "rbd_offload_status".into() },
            ]
        );
    }
}
