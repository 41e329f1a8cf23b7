//! From a notification to a request: who asks for which image to be filled from what.
//!
//! Nothing here is trusted yet. A request is a **tag** on a queued image record, since Nova and Cinder hand properties
//! on to later images, but never tags.

use std::fmt;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// Tags that start like this are requests, well-formed or not.
pub const TAG_PREFIX: &str = "rbd-offload:";

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
pub enum Asked {
    Nothing,
    For(Source),
    /// There is a request tag, but no request can be read from it; the sentence says why.
    Unclear(String),
}

/// Reads the request from an image's tags: exactly one tag `rbd-offload:<kind>:<uuid>`.
pub fn asked_by(tags: &[String]) -> Asked {
    let mut requests = tags.iter().filter(|tag| tag.starts_with(TAG_PREFIX));
    let Some(tag) = requests.next() else { return Asked::Nothing };
    if requests.next().is_some() {
        return Asked::Unclear(format!("more than one tag starts with \"{TAG_PREFIX}\": set exactly one"));
    }
    match parse_tag(tag) {
        Some(source) => Asked::For(source),
        None => Asked::Unclear(
            "the request tag cannot be read: it must be rbd-offload:volume:<uuid>, rbd-offload:snapshot:<uuid> or \
             rbd-offload:instance:<uuid>"
                .into(),
        ),
    }
}

fn parse_tag(tag: &str) -> Option<Source> {
    let (kind, id) = tag.strip_prefix(TAG_PREFIX)?.split_once(':')?;
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
            let Asked::For(source) = asked_by(&tags(&["blue", &tag])) else { panic!("{tag} not understood") };
            assert_eq!(source.tag(), tag);
        }
    }

    #[test]
    fn other_tags_ask_for_nothing() {
        assert_eq!(asked_by(&[]), Asked::Nothing);
        assert_eq!(asked_by(&tags(&["rbd-offload", "volume:x", "Rbd-offload:volume:x"])), Asked::Nothing);
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
            assert!(matches!(asked_by(std::slice::from_ref(&bad)), Asked::Unclear(_)), "{bad}");
            assert!(matches!(asked_by(&[good.clone(), bad.clone()]), Asked::Unclear(_)), "{bad}");
        }
    }
}
