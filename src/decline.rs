//! Why a request is declined, in a word: for counts.
//!
//! The human-readable reason goes to the requester. This enum is a metric label: few values, and no tenant data.

use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Decline {
    /// The tags ask for nothing, for several things, or cannot be read.
    Request,
    /// The image is not queued, or another client writes it.
    OtherWriter,
    /// The image is active and empty: `openstack image create` uploads its standard input, also where that is empty.
    EmptyUpload,
    /// The service that handed its work over took it back, changed it, or does not answer.
    Handover,
    /// The record wants another format than raw and bare.
    Format,
    /// The record asks for signature verification.
    Signature,
    /// The source does not exist, or belongs to another project. The tenant is not told which.
    NoSource,
    /// The source is in use, at work, or on its way out.
    Busy,
    Encrypted,
    /// No backend of the configuration has the source.
    NoBackend,
    /// The disk is not in the pool that the configuration names.
    NoDisk,
    /// Source and destination are not in the same Ceph cluster, Glance has no store there, or the source is a mirror.
    OtherCluster,
    /// A kind of disk that is not done here.
    Unsupported,
    /// The project's limit for its images, Glance's for one image, or Ceph's for the snapshots of the source.
    Quota,
    /// The image would inherit more properties than it may have.
    Properties,
    /// The copy begins like a file of a container format.
    ContainerHeader,
    /// Another deployment has the disk, and does the request or has declined it.
    Elsewhere,
    /// Decided by another version of this program.
    #[serde(other)]
    Other,
}

impl Decline {
    pub const ALL: [Self; 18] = [
        Self::Request,
        Self::OtherWriter,
        Self::EmptyUpload,
        Self::Handover,
        Self::Format,
        Self::Signature,
        Self::NoSource,
        Self::Busy,
        Self::Encrypted,
        Self::NoBackend,
        Self::NoDisk,
        Self::OtherCluster,
        Self::Unsupported,
        Self::Quota,
        Self::Properties,
        Self::ContainerHeader,
        Self::Elsewhere,
        Self::Other,
    ];

    /// The label's value in the metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Request => "request",
            Self::OtherWriter => "other_writer",
            Self::EmptyUpload => "empty_upload",
            Self::Handover => "handover",
            Self::Format => "format",
            Self::Signature => "signature",
            Self::NoSource => "no_source",
            Self::Busy => "busy",
            Self::Encrypted => "encrypted",
            Self::NoBackend => "no_backend",
            Self::NoDisk => "no_disk",
            Self::OtherCluster => "other_cluster",
            Self::Unsupported => "unsupported",
            Self::Quota => "quota",
            Self::Properties => "properties",
            Self::ContainerHeader => "container_header",
            Self::Elsewhere => "elsewhere",
            Self::Other => "other",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_is_stored_under_the_name_that_is_counted() {
        for decline in Decline::ALL {
            assert_eq!(serde_json::to_value(decline).unwrap(), decline.as_str());
        }
    }

    #[test]
    fn an_unknown_reason_is_read_as_other() {
        assert_eq!(serde_json::from_str::<Decline>("\"of a later version\"").unwrap(), Decline::Other);
    }

    #[test]
    fn the_documentation_names_each_reason() {
        let text = include_str!("../docs/reference/metrics-and-logs.md");
        for decline in Decline::ALL {
            assert!(text.contains(&format!("| `{}` |", decline.as_str())), "{}", decline.as_str());
        }
    }
}
