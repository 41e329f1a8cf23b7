//! The few events that matter, read from a message's text; everything else is dropped as early as can be told.

use std::fmt;

use serde::Deserialize;
use serde::de::{self, Deserializer, IgnoredAny, Visitor};
use serde_json::value::RawValue;
use uuid::Uuid;

use super::envelope::{self, EnvelopeError};
use crate::request::{HANDOVER_PREFIX, PROPERTY_PREFIX, TAG_PREFIX, parse_uuid};

/// Characters of a text that is kept; Glance's and Cinder's own limit.
const MAX_TEXT: usize = 255;
/// Request tags kept of one image. More than one is declined anyway.
const MAX_TAGS: usize = 8;

/// What a notification says. Never trusted: owner, status and properties are read again from the services.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// `image.create` or `image.update`, and only of an image that is `queued` and carries a request tag or an offer.
    /// Any other image is irrelevant.
    ImageChanged {
        image_id: Uuid,
        /// Only those that start with `rbd-offload:` or `rbd-offload-handover:`, well formed or not; 8 at most.
        tags: Vec<String>,
        owner: Option<String>,
    },
    /// `image.activate` or `image.update` of an image that is active and still bears properties of ours: its owner
    /// uploaded it after a request had ended without an image.
    ImageActive { image_id: Uuid },
    /// `image.delete`
    ImageDeleted { image_id: Uuid },
    /// `volume.upload.start`, of the Cinder integration
    VolumeUpload { image_id: Uuid },
    /// `instance.snapshot.start`, versioned
    InstanceSnapshot { image_id: Uuid },
    /// `compute.instance.snapshot.start`, which does not tell the image
    LegacyInstanceSnapshot { instance_id: Uuid },
}

/// The types of [`Event`], and one for all others: the values of a metric's label.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum EventType {
    ImageCreate,
    ImageUpdate,
    ImageActivate,
    ImageDelete,
    VolumeUploadStart,
    InstanceSnapshotStart,
    ComputeInstanceSnapshotStart,
    Other,
}

impl EventType {
    fn of(text: &[u8]) -> EventType {
        match text {
            b"image.create" => EventType::ImageCreate,
            b"image.update" => EventType::ImageUpdate,
            b"image.activate" => EventType::ImageActivate,
            b"image.delete" => EventType::ImageDelete,
            b"volume.upload.start" => EventType::VolumeUploadStart,
            b"instance.snapshot.start" => EventType::InstanceSnapshotStart,
            b"compute.instance.snapshot.start" => EventType::ComputeInstanceSnapshotStart,
            _ => EventType::Other,
        }
    }

    pub fn as_str(self) -> &'static str {
        match self {
            EventType::ImageCreate => "image.create",
            EventType::ImageUpdate => "image.update",
            EventType::ImageActivate => "image.activate",
            EventType::ImageDelete => "image.delete",
            EventType::VolumeUploadStart => "volume.upload.start",
            EventType::InstanceSnapshotStart => "instance.snapshot.start",
            EventType::ComputeInstanceSnapshotStart => "compute.instance.snapshot.start",
            EventType::Other => "other",
        }
    }
}

impl fmt::Display for EventType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A message, read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Notification {
    /// Of a type that does not matter, or about an image that does not.
    Irrelevant(EventType),
    Relevant {
        event: Event,
        event_type: EventType,
        /// oslo.messaging's `message_id`, for the log.
        message_id: Option<String>,
    },
}

/// The message's own keys. The rest, `_context_*` with its tokens above all, is walked over and never kept.
#[derive(Deserialize)]
struct Message<'a> {
    #[serde(borrow)]
    event_type: Option<&'a RawValue>,
    #[serde(borrow)]
    priority: Option<&'a RawValue>,
    #[serde(borrow)]
    payload: Option<&'a RawValue>,
    #[serde(borrow)]
    message_id: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct ImagePayload {
    id: Id,
    #[serde(default)]
    status: Text,
    #[serde(default)]
    owner: Text,
    #[serde(default)]
    tags: RequestTags,
    #[serde(default)]
    properties: Properties,
}

#[derive(Default)]
struct Properties {
    /// There is one that the daemon set.
    ours: bool,
}

#[derive(Deserialize)]
struct DeletedImage {
    id: Id,
}

#[derive(Deserialize)]
struct Upload {
    image_id: Id,
}

#[derive(Deserialize)]
struct Versioned {
    #[serde(rename = "nova_object.data")]
    data: SnapshotAction,
}

#[derive(Deserialize)]
struct SnapshotAction {
    snapshot_image_id: Id,
}

#[derive(Deserialize)]
struct LegacyAction {
    instance_id: Id,
}

impl Notification {
    /// Reads a body as delivered. `compression` is kombu's header of that name, or the content encoding.
    pub fn read(body: &[u8], compression: Option<&str>) -> Result<Notification, EnvelopeError> {
        let text = envelope::inflate(body, compression)?;
        if let Some(event_type) = envelope::peek_event_type(&text)
            && EventType::of(event_type) == EventType::Other
        {
            return Ok(Notification::Irrelevant(EventType::Other));
        }
        Notification::from_message(&envelope::open(&text)?)
    }

    /// Reads the inner message.
    fn from_message(text: &str) -> Result<Notification, EnvelopeError> {
        if !text.trim_start().starts_with('{') {
            return Err(EnvelopeError::MessageNotJson);
        }
        let message: Message = serde_json::from_str(text).map_err(|_| EnvelopeError::MessageNotJson)?;
        let event_type = text_of(message.event_type).ok_or(EnvelopeError::NoEventType)?;
        let event_type = EventType::of(event_type.as_bytes());
        if event_type == EventType::Other {
            return Ok(Notification::Irrelevant(event_type));
        }
        let payload = message.payload.ok_or(EnvelopeError::PayloadNotObject)?;
        if !payload.get().starts_with('{') {
            // Services put a sentence there when something failed.
            return match text_of(message.priority).as_deref() {
                Some("ERROR" | "error") => Ok(Notification::Irrelevant(event_type)),
                _ => Err(EnvelopeError::PayloadNotObject),
            };
        }
        Ok(match event(event_type, payload)? {
            None => Notification::Irrelevant(event_type),
            Some(event) => Notification::Relevant { event, event_type, message_id: message_id(message.message_id) },
        })
    }
}

/// None: about an image that does not matter.
fn event(event_type: EventType, payload: &RawValue) -> Result<Option<Event>, EnvelopeError> {
    Ok(Some(match event_type {
        EventType::ImageCreate | EventType::ImageUpdate | EventType::ImageActivate => {
            let image: ImagePayload = parse(payload)?;
            let is_asked_for = !image.tags.0.is_empty() && event_type != EventType::ImageActivate;
            match image.status.0.as_deref() {
                Some("queued") if is_asked_for => {
                    Event::ImageChanged { image_id: image.id.checked()?, tags: image.tags.0, owner: image.owner.0 }
                }
                Some("active") if image.properties.ours => Event::ImageActive { image_id: image.id.checked()? },
                _ => return Ok(None),
            }
        }
        EventType::ImageDelete => Event::ImageDeleted { image_id: parse::<DeletedImage>(payload)?.id.checked()? },
        EventType::VolumeUploadStart => Event::VolumeUpload { image_id: parse::<Upload>(payload)?.image_id.checked()? },
        EventType::InstanceSnapshotStart => {
            Event::InstanceSnapshot { image_id: parse::<Versioned>(payload)?.data.snapshot_image_id.checked()? }
        }
        EventType::ComputeInstanceSnapshotStart => {
            Event::LegacyInstanceSnapshot { instance_id: parse::<LegacyAction>(payload)?.instance_id.checked()? }
        }
        EventType::Other => return Ok(None),
    }))
}

/// serde_json's error is dropped: it can quote the text.
fn parse<'a, T: Deserialize<'a>>(payload: &'a RawValue) -> Result<T, EnvelopeError> {
    serde_json::from_str(payload.get()).map_err(|_| EnvelopeError::PayloadShape)
}

fn text_of(value: Option<&RawValue>) -> Option<String> {
    serde_json::from_str(value?.get()).ok()
}

/// Allows only the characters of ids, so that a forged id cannot write to the log.
fn message_id(value: Option<&RawValue>) -> Option<String> {
    text_of(value).filter(|id| id.len() <= 64 && id.bytes().all(|b| b.is_ascii_hexdigit() || b == b'-'))
}

/// An id that is a text; whether it is a UUID comes out in [`Id::checked`].
struct Id(Option<Uuid>);

impl Id {
    fn checked(self) -> Result<Uuid, EnvelopeError> {
        self.0.ok_or(EnvelopeError::BadId)
    }
}

impl<'de> Deserialize<'de> for Id {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(Id(Text::deserialize(deserializer)?.0.as_deref().and_then(parse_uuid)))
    }
}

/// A text of at most 255 characters without control characters; None for anything else, which is walked over.
#[derive(Default)]
struct Text(Option<String>);

impl<'de> Deserialize<'de> for Text {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct AnyValue;

        impl<'de> Visitor<'de> for AnyValue {
            type Value = Text;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("any value")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Text, E> {
                let fits = text.chars().take(MAX_TEXT + 1).count() <= MAX_TEXT && !text.contains(char::is_control);
                Ok(Text(fits.then(|| text.to_owned())))
            }

            fn visit_unit<E: de::Error>(self) -> Result<Text, E> {
                Ok(Text(None))
            }

            fn visit_bool<E: de::Error>(self, _: bool) -> Result<Text, E> {
                Ok(Text(None))
            }

            fn visit_i64<E: de::Error>(self, _: i64) -> Result<Text, E> {
                Ok(Text(None))
            }

            fn visit_u64<E: de::Error>(self, _: u64) -> Result<Text, E> {
                Ok(Text(None))
            }

            fn visit_f64<E: de::Error>(self, _: f64) -> Result<Text, E> {
                Ok(Text(None))
            }

            fn visit_seq<A: de::SeqAccess<'de>>(self, mut seq: A) -> Result<Text, A::Error> {
                while seq.next_element::<IgnoredAny>()?.is_some() {}
                Ok(Text(None))
            }

            fn visit_map<A: de::MapAccess<'de>>(self, mut map: A) -> Result<Text, A::Error> {
                while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
                Ok(Text(None))
            }
        }

        deserializer.deserialize_any(AnyValue)
    }
}

/// The tags that start as ours do. One that is too long, or has control characters, is cut to the prefix: malformed in
/// any case.
#[derive(Default)]
struct RequestTags(Vec<String>);

impl<'de> Deserialize<'de> for RequestTags {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let all: Option<Vec<std::borrow::Cow<'de, str>>> = Option::deserialize(deserializer)?;
        let requests = all.unwrap_or_default().into_iter();
        Ok(RequestTags(
            requests
                .filter_map(|tag| {
                    [TAG_PREFIX, HANDOVER_PREFIX].into_iter().find(|ours| tag.starts_with(ours)).map(|ours| (ours, tag))
                })
                .take(MAX_TAGS)
                .map(|(ours, tag)| {
                    if tag.len() > MAX_TEXT || tag.contains(char::is_control) {
                        ours.to_owned()
                    } else {
                        tag.into_owned()
                    }
                })
                .collect(),
        ))
    }
}

/// Only their names count. A tenant names and fills properties as they like, so nothing here fails but broken JSON.
impl<'de> Deserialize<'de> for Properties {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Pairs;

        impl<'de> Visitor<'de> for Pairs {
            type Value = Properties;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("properties")
            }

            fn visit_unit<E: de::Error>(self) -> Result<Properties, E> {
                Ok(Properties::default())
            }

            fn visit_map<A: de::MapAccess<'de>>(self, mut map: A) -> Result<Properties, A::Error> {
                let mut properties = Properties::default();
                while let Some(name) = map.next_key::<String>()? {
                    properties.ours |= name.starts_with(PROPERTY_PREFIX);
                    map.next_value::<IgnoredAny>()?;
                }
                Ok(properties)
            }
        }

        deserializer.deserialize_any(Pairs)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    const IMAGE: &str = "300f0219-bf3e-4bb3-af73-da280706b309";
    const OTHER: &str = "63b4d3f9-b103-4908-884c-8036e4e940b8";
    const TOKEN: &str = "gAAAAABfaketoken";

    fn read(event_type: &str, payload: Value) -> Result<Notification, EnvelopeError> {
        let message = json!({
            "message_id": IMAGE, "event_type": event_type, "priority": "INFO", "payload": payload,
            "_unique_id": "26682d52d9c94e5683d8635bcdc68797", "_context_auth_token": TOKEN,
        });
        let envelope = json!({"oslo.version": "2.0", "oslo.message": message.to_string()});
        let wrapped = Notification::read(envelope.to_string().as_bytes(), Some("utf-8"));
        let bare = Notification::read(message.to_string().as_bytes(), None);
        assert_eq!(wrapped, bare);
        assert!(!format!("{wrapped:?}").contains(TOKEN));
        wrapped
    }

    fn event(event_type: &str, payload: Value) -> Option<Event> {
        match read(event_type, payload).unwrap() {
            Notification::Relevant { event, message_id, .. } => {
                assert_eq!(message_id.as_deref(), Some(IMAGE));
                Some(event)
            }
            Notification::Irrelevant(_) => None,
        }
    }

    #[test]
    fn a_request_tag_on_a_queued_image_is_an_event() {
        let tag = format!("rbd-offload:volume:{OTHER}");
        for event_type in ["image.create", "image.update"] {
            let image = |status: &str, tags: Value| json!({"id": IMAGE, "status": status, "owner": "p", "tags": tags, "properties": {"a": 1}});
            assert_eq!(
                event(event_type, image("queued", json!(["x", tag]))),
                Some(Event::ImageChanged {
                    image_id: IMAGE.parse().unwrap(),
                    tags: vec![tag.clone()],
                    owner: Some("p".to_owned()),
                })
            );
            assert_eq!(event(event_type, image("active", json!([tag]))), None);
            assert_eq!(event(event_type, image("queued", json!(["rbd-offloaded", "volume"]))), None);
            assert_eq!(event(event_type, image("queued", Value::Null)), None);
        }
        assert_eq!(event("image.activate", json!({"id": IMAGE, "status": "queued", "tags": [tag]})), None);
    }

    #[test]
    fn an_offer_is_kept_and_so_is_what_we_left_on_an_active_image() {
        let tag = format!("rbd-offload-handover:volume:{OTHER}@{IMAGE}");
        let offered = json!({"id": IMAGE, "status": "queued", "tags": ["x", tag], "properties": {}});
        let Some(Event::ImageChanged { tags, .. }) = event("image.update", offered) else { panic!("dropped") };
        assert_eq!(tags, [tag]);
        let active =
            |property: &str| json!({"id": IMAGE, "status": "active", "tags": [], "properties": {property: "x"}});
        for event_type in ["image.activate", "image.update"] {
            let image_id = IMAGE.parse().unwrap();
            assert_eq!(event(event_type, active("rbd_offload_status")), Some(Event::ImageActive { image_id }));
            assert_eq!(event(event_type, active("os_type")), None);
        }
    }

    #[test]
    fn an_image_without_a_tag_is_irrelevant_whatever_its_properties_are() {
        for value in
            [json!(OTHER), json!(1), json!(null), json!({"a": [1, {}]}), json!([OTHER]), json!(1.5), json!(true)]
        {
            let properties = json!({"instance_uuid": value, "image_type": "backup"});
            let image = json!({"id": IMAGE, "status": "queued", "owner": null, "tags": [], "properties": properties});
            assert_eq!(event("image.create", image), None);
        }
    }

    #[test]
    fn deletions_uploads_and_snapshots_name_their_image() {
        let image_id: Uuid = IMAGE.parse().unwrap();
        let instance_id: Uuid = OTHER.parse().unwrap();
        assert_eq!(event("image.delete", json!({"id": IMAGE})), Some(Event::ImageDeleted { image_id }));
        assert_eq!(
            event("volume.upload.start", json!({"image_id": IMAGE, "volume_id": OTHER, "host": {"a": 1}})),
            Some(Event::VolumeUpload { image_id })
        );
        assert_eq!(
            event(
                "instance.snapshot.start",
                json!({"nova_object.data": {"uuid": OTHER, "snapshot_image_id": IMAGE, "x": {}}})
            ),
            Some(Event::InstanceSnapshot { image_id })
        );
        assert_eq!(
            event("compute.instance.snapshot.start", json!({"instance_id": OTHER})),
            Some(Event::LegacyInstanceSnapshot { instance_id })
        );
    }

    #[test]
    fn hostile_ids_are_refused() {
        for id in [
            json!("../../etc/passwd"),
            json!(""),
            json!("300f0219bf3e4bb3af73da280706b309"),
            json!("{300f0219-bf3e-4bb3-af73-da280706b309}"),
            json!("urn:uuid:300f0219-bf3e-4bb3-af73-da280706b309"),
            json!("300f0219-bf3e-4bb3-af73-da280706b30\n"),
            json!("é00f0219-bf3e-4bb3-af73-da280706b30"),
            json!(1),
            json!(null),
            json!({"a": "b"}),
        ] {
            assert_eq!(read("image.delete", json!({"id": id})), Err(EnvelopeError::BadId), "{id}");
        }
        assert_eq!(read("image.delete", json!({})), Err(EnvelopeError::PayloadShape));
        let tagged = json!({"id": "x", "status": "queued", "tags": ["rbd-offload:volume:x"]});
        assert_eq!(read("image.create", tagged), Err(EnvelopeError::BadId));
    }

    #[test]
    fn payloads_of_another_shape_are_rejected_or_ignored() {
        for payload in [json!("Failed to upload"), json!([]), json!(1), json!(null)] {
            assert_eq!(read("image.update", payload.clone()), Err(EnvelopeError::PayloadNotObject));
            assert_eq!(read("image.upload", payload), Ok(Notification::Irrelevant(EventType::Other)));
        }
        for tags in [json!("rbd-offload:"), json!({"a": 1}), json!([1])] {
            assert_eq!(read("image.update", json!({"id": IMAGE, "tags": tags})), Err(EnvelopeError::PayloadShape));
        }
        let error = r#"{"event_type": "image.update", "priority": "ERROR", "payload": "sentence"}"#;
        assert_eq!(Notification::read(error.as_bytes(), None), Ok(Notification::Irrelevant(EventType::ImageUpdate)));
        for (text, reason) in [
            (r#"{"payload": {}}"#, EnvelopeError::NoEventType),
            (r#"{"event_type": ["image.update"], "payload": {}}"#, EnvelopeError::NoEventType),
            (r#"{"event_type": "image.update"}"#, EnvelopeError::PayloadNotObject),
            (r#"{"oslo.version": "2.0", "oslo.message": "[]"}"#, EnvelopeError::MessageNotJson),
            (r#"{"oslo.version": "2.0", "oslo.message": "{"}"#, EnvelopeError::MessageNotJson),
        ] {
            assert_eq!(Notification::read(text.as_bytes(), None), Err(reason), "{text}");
        }
    }

    #[test]
    fn deep_payloads_do_not_overflow() {
        let deep = format!("{}{}", "{\"a\":".repeat(1_000_000), "1".to_owned() + &"}".repeat(1_000_000));
        for place in ["properties", "x", "id", "owner"] {
            let text = format!(r#"{{"event_type": "image.update", "payload": {{"{place}": {deep}}}}}"#);
            let _ = Notification::read(text.as_bytes(), None);
        }
    }

    #[test]
    fn long_texts_are_not_kept() {
        let image = json!({"id": IMAGE, "status": "queued", "owner": "o".repeat(256), "tags": vec![format!("rbd-offload:{}", "é\n".repeat(200)); 100]});
        let Some(Event::ImageChanged { tags, owner, .. }) = event("image.create", image) else {
            panic!("dropped");
        };
        assert_eq!((tags, owner), (vec![TAG_PREFIX.to_owned(); MAX_TAGS], None));
    }
}
