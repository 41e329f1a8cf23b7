//! From a notification to a request: who asks for which image to be filled from what.
//!
//! Nothing here is trusted yet. A request is a **tag** on a queued image record, since Nova and Cinder hand properties
//! on to later images, but never tags.

use std::fmt;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// Tags that start like this are requests, well-formed or not.
pub const TAG_PREFIX: &str = "rbd-offload:";

/// Tags that start like this belong to a hand-over: a service of the cloud lets the daemon do its work, and waits
/// (`docs/explanation/handover.md`).
pub const HANDOVER_PREFIX: &str = "rbd-offload-handover:";

/// By this tag the waiting service says that the prepared copy is to be published.
pub const GO_TAG: &str = "rbd-offload-handover:go";

/// On an active image that was published at once: its copy is not complete. Tags are not handed on to later images.
pub const COPYING_TAG: &str = "rbd-offload-copying";

/// On an image that an empty upload made active, in place of its request tag: the request cannot be done any more.
pub const EMPTY_UPLOAD_TAG: &str = "rbd-offload-empty-upload";

/// Prefix of the properties that the daemon keeps on a queued record for the tenant.
pub const PROPERTY_PREFIX: &str = "rbd_offload_";

/// Whether a tag is one of ours, well-formed or not.
pub fn is_ours(tag: &str) -> bool {
    tag.starts_with(TAG_PREFIX) || tag.starts_with(HANDOVER_PREFIX) || tag == COPYING_TAG || tag == EMPTY_UPLOAD_TAG
}

/// Whether a tag is a request, well-formed or not.
pub fn is_request(tag: &str) -> bool {
    tag.starts_with(TAG_PREFIX)
}

/// What an image is to be made from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(tag = "kind", content = "id", rename_all = "lowercase")]
pub enum Source {
    Volume(Uuid),
    Snapshot(Uuid),
    Instance(Uuid),
}

impl Source {
    /// The tag that asks for it.
    pub fn tag(&self) -> String {
        format!("{TAG_PREFIX}{}:{}", self.kind(), self.id())
    }

    pub fn kind(&self) -> &'static str {
        match self {
            Self::Volume(_) => "volume",
            Self::Snapshot(_) => "snapshot",
            Self::Instance(_) => "instance",
        }
    }

    pub fn id(&self) -> Uuid {
        match self {
            Self::Volume(id) | Self::Snapshot(id) | Self::Instance(id) => *id,
        }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.kind(), self.id())
    }
}

/// What made the daemon take a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Trigger {
    /// A tag on a queued image record.
    Request,
    /// Cinder's volume upload, handed over by the Cinder integration.
    VolumeUpload,
    /// Nova's instance snapshot, handed over by the Nova integration.
    InstanceSnapshot,
}

impl Trigger {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Request => "request",
            Self::VolumeUpload => "volume-upload",
            Self::InstanceSnapshot => "instance-snapshot",
        }
    }
}

/// What the tags of an image ask for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TagRequest {
    Absent,
    Source(Source),
    /// There is a request tag, but no request can be read from it; the sentence says why.
    Invalid(String),
}

/// Reads the request from an image's tags: exactly one tag `rbd-offload:<kind>:<uuid>`.
pub fn parse_request_tags(tags: &[String]) -> TagRequest {
    let mut requests = tags.iter().filter(|tag| tag.starts_with(TAG_PREFIX));
    let Some(tag) = requests.next() else { return TagRequest::Absent };
    if requests.next().is_some() {
        return TagRequest::Invalid(format!("more than one tag starts with \"{TAG_PREFIX}\": set exactly one"));
    }
    match parse_tag(tag) {
        Some(source) => TagRequest::Source(source),
        None => TagRequest::Invalid(
            "the request tag cannot be read: it must be rbd-offload:volume:<uuid>, rbd-offload:snapshot:<uuid> or \
             rbd-offload:instance:<uuid>"
                .into(),
        ),
    }
}

/// What a waiting service offers, by a tag on the record that it made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Offer {
    pub source: Source,
    /// The Ceph cluster that the source's disk is in, by the service's own configuration.
    pub fsid: Uuid,
}

impl Offer {
    /// What a job of this offer is started by; `None`: no service offers such a source.
    pub fn trigger(&self) -> Option<Trigger> {
        match self.source {
            Source::Volume(_) => Some(Trigger::VolumeUpload),
            Source::Instance(_) => Some(Trigger::InstanceSnapshot),
            Source::Snapshot(_) => None,
        }
    }
}

/// Reads the offer from an image's tags: exactly one tag `rbd-offload-handover:<kind>:<uuid>@<fsid>`.
pub fn parse_offer_tag(tags: &[String]) -> Option<Offer> {
    let mut offers = tags.iter().filter(|tag| tag.starts_with(HANDOVER_PREFIX) && *tag != GO_TAG);
    let offer = offers.next()?.strip_prefix(HANDOVER_PREFIX)?;
    if offers.next().is_some() {
        return None;
    }
    let (source, fsid) = offer.split_once('@')?;
    Some(Offer { source: parse_source(source)?, fsid: parse_uuid(fsid)? })
}

/// Whether the waiting service wants the prepared copy to be published.
pub fn has_commit_tag(tags: &[String]) -> bool {
    tags.iter().any(|tag| tag == GO_TAG)
}

fn parse_tag(tag: &str) -> Option<Source> {
    parse_source(tag.strip_prefix(TAG_PREFIX)?)
}

/// `<kind>:<uuid>`
fn parse_source(text: &str) -> Option<Source> {
    let (kind, id) = text.split_once(':')?;
    let id = parse_uuid(id)?;
    match kind {
        "volume" => Some(Source::Volume(id)),
        "snapshot" => Some(Source::Snapshot(id)),
        "instance" => Some(Source::Instance(id)),
        _ => None,
    }
}

/// A UUID in the form that OpenStack writes, with hyphens; the other forms that the uuid crate reads are refused.
pub fn parse_uuid(text: &str) -> Option<Uuid> {
    if text.len() != uuid::fmt::Hyphenated::LENGTH {
        return None;
    }
    Uuid::try_parse(text).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "c99c2483-d3ea-4877-bd86-edb7c4607374";

    fn tags(tags: &[&str]) -> Vec<String> {
        tags.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn one_well_formed_tag_is_a_request() {
        for kind in ["volume", "snapshot", "instance"] {
            let tag = format!("rbd-offload:{kind}:{ID}");
            let TagRequest::Source(source) = parse_request_tags(&tags(&["blue", &tag])) else {
                panic!("{tag} not understood")
            };
            assert_eq!(source.tag(), tag);
        }
    }

    #[test]
    fn other_tags_ask_for_nothing() {
        assert_eq!(parse_request_tags(&[]), TagRequest::Absent);
        assert_eq!(parse_request_tags(&tags(&["rbd-offload", "volume:x", "Rbd-offload:volume:x"])), TagRequest::Absent);
    }

    #[test]
    fn an_offer_names_source_and_cluster_and_is_no_request() {
        const FSID: &str = "0c63bdba-5a4e-4a8b-9b4c-3e8e6a8f0001";
        let offer = format!("rbd-offload-handover:volume:{ID}@{FSID}");
        let read = parse_offer_tag(&tags(&["blue", &offer, GO_TAG])).unwrap();
        assert_eq!((read.source.to_string(), read.fsid.to_string()), (format!("volume {ID}"), FSID.to_owned()));
        assert_eq!(read.trigger(), Some(Trigger::VolumeUpload));
        assert_eq!(parse_request_tags(&tags(&[&offer, GO_TAG])), TagRequest::Absent);
        assert!(has_commit_tag(&tags(&[&offer, GO_TAG])) && !has_commit_tag(&tags(&[&offer])));
        for bad in [
            vec![GO_TAG.to_owned()],
            vec![offer.clone(), format!("rbd-offload-handover:instance:{ID}@{FSID}")],
            vec![format!("rbd-offload-handover:volume:{ID}")],
            vec![format!("rbd-offload-handover:volume:{ID}@")],
            vec![format!("rbd-offload-handover:disk:{ID}@{FSID}")],
            vec![format!("rbd-offload-handover:volume:{ID}@{FSID}@{FSID}")],
        ] {
            assert_eq!(parse_offer_tag(&bad), None, "{bad:?}");
        }
    }

    #[test]
    fn two_tags_or_a_malformed_one_are_unclear() {
        let good = format!("rbd-offload:volume:{ID}");
        for bad in [
            "rbd-offload:".to_string(),
            "rbd-offload:volume".into(),
            "rbd-offload:volume:".into(),
            "rbd-offload:volume:1234".into(),
            format!("rbd-offload:disk:{ID}"),
            format!("rbd-offload:volume:{ID} "),
            format!("rbd-offload:volume:{{{}}}", &ID[..34]),
            format!("rbd-offload:volume:{}", ID.replace('-', "")),
            format!("rbd-offload:volume:../{}", &ID[3..]),
        ] {
            assert!(matches!(parse_request_tags(std::slice::from_ref(&bad)), TagRequest::Invalid(_)), "{bad}");
            assert!(matches!(parse_request_tags(&[good.clone(), bad.clone()]), TagRequest::Invalid(_)), "{bad}");
        }
    }
}
