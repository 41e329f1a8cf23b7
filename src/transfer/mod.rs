//! Transfers: the ways to bring the bytes of `source@snapshot` into a private image of the destination pool.
//!
//! Each is a [`Transfer`]; all end with the same image: every byte as at the snapshot, no parent, none of the source's
//! snapshots, our ownership tag in its metadata. Which one is taken is [`candidates`]' business.

mod clone;
mod copy;
mod server_copy;

use std::fmt;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use crate::ceph::{self, ErrorKind, Features, ImageInfo, ImageSpec, Moved, Progress, Storage, TransferLimits};
use crate::config;

/// Key of the ownership tag in an image's metadata; its value is an
/// [`OwnershipTag`](crate::publish::tag::OwnershipTag).
pub const OWNERSHIP_TAG: &str = ceph::OWNER_KEY;

/// A way to transfer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    /// Let the OSDs copy the objects; this host copies what they leave out.
    ServerCopy,
    /// Clone and flatten: librbd on this host reads and writes.
    Clone,
    /// Read at the snapshot and write, hole-aware, in chunks.
    Copy,
}

impl Method {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::ServerCopy => "server-copy",
            Self::Clone => "clone",
            Self::Copy => "copy",
        }
    }

    /// The transfer of that name.
    pub fn transfer(self) -> &'static dyn Transfer {
        match self {
            Self::ServerCopy => &server_copy::ServerCopy,
            Self::Clone => &clone::CloneFlatten,
            Self::Copy => &copy::RbdCopy,
        }
    }
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What to bring where.
#[derive(Debug, Clone)]
pub struct TransferRequest {
    pub source: ImageSpec,
    pub snapshot: String,
    /// The anchor's snapshot, a clone of `source@snapshot`, for what clones; `None`: `source@snapshot` itself.
    pub anchor: Option<(ImageSpec, String)>,
    /// The private name, which must be free.
    pub destination: ImageSpec,
    /// Value of the ownership tag.
    pub tag: String,
    pub limits: TransferLimits,
}

#[async_trait]
pub trait Transfer: Send + Sync {
    /// Why this source cannot be transferred this way; `None` when it can.
    fn unsupported_reason(&self, source: &ImageInfo) -> Option<String>;

    /// Makes the destination and fills it. [`ErrorKind::Cancelled`] soon after `cancel` fires. On an error the
    /// destination may be left half made: the caller removes it.
    async fn run(
        &self,
        storage: &dyn Storage,
        request: &TransferRequest,
        progress: &Progress,
        cancel: &CancellationToken,
    ) -> ceph::Result<Moved>;
}

/// The methods to try on this source in order, and for each that the configuration asked for and the source rules out,
/// why. Correctness wins over configuration: if the configured method does not support a source, the others are tried.
pub fn candidates(wanted: config::MethodChoice, source: &ImageInfo) -> (Vec<Method>, Vec<String>) {
    const AUTO: [Method; 3] = [Method::ServerCopy, Method::Clone, Method::Copy];
    let first = match wanted {
        config::MethodChoice::Auto => None,
        config::MethodChoice::ServerCopy => Some(Method::ServerCopy),
        config::MethodChoice::Clone => Some(Method::Clone),
        config::MethodChoice::Copy => Some(Method::Copy),
    };
    let mut reasons = Vec::new();
    let mut methods = Vec::new();
    for method in first.into_iter().chain(AUTO.into_iter().filter(|method| Some(*method) != first)) {
        match method.transfer().unsupported_reason(source) {
            None => methods.push(method),
            Some(reason) => reasons.push(format!("{method}: {reason}")),
        }
    }
    (methods, reasons)
}

/// Whether another method may succeed where one ended with this error: the cluster or the shape does not allow it, or
/// the user's capabilities do not.
pub fn is_for_another_method(error: &ceph::Error) -> bool {
    matches!(error.kind(), ErrorKind::Unsupported | ErrorKind::PermissionDenied)
}

/// Why no clone can be made of this source.
fn clone_unsupported_reason(source: &ImageInfo) -> Option<String> {
    if source.old_format {
        return Some("the source is an image of format 1, which cannot be cloned".into());
    }
    if !source.features.has(Features::LAYERING) {
        return Some("the source lacks the feature layering, so it cannot be cloned".into());
    }
    if source.features.has(Features::MIGRATING) {
        return Some("the source is being migrated".into());
    }
    None
}

/// Creates an empty image like the source's snapshot, with these features and the ownership tag.
async fn create_tagged(storage: &dyn Storage, request: &TransferRequest, features: Features) -> ceph::Result<()> {
    storage.create_like(&request.source, &request.snapshot, &request.destination, features).await?;
    storage.set_metadata(&request.destination, OWNERSHIP_TAG, &request.tag).await
}

/// Clones the anchor, or the source where there is none, with these features. The clone has the ownership tag and no
/// other metadata.
pub async fn clone_tagged(storage: &dyn Storage, request: &TransferRequest, features: Features) -> ceph::Result<()> {
    let (parent, snapshot) =
        request.anchor.as_ref().map_or((&request.source, &request.snapshot), |(image, snapshot)| (image, snapshot));
    storage.clone_image(parent, snapshot, &request.destination, features).await?;
    storage.replace_metadata(&request.destination, &[(OWNERSHIP_TAG.to_owned(), request.tag.clone())]).await
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(features: u64) -> ImageInfo {
        ImageInfo {
            id: "1".into(),
            size: 1 << 30,
            object_size: 4 << 20,
            stripe_unit: 4 << 20,
            stripe_count: 1,
            features: Features(features),
            flags: 0,
            parent: None,
            snapshots: Vec::new(),
            data_pool: None,
            old_format: false,
        }
    }

    #[test]
    fn a_forced_method_comes_first_and_others_stand_by() {
        let (methods, reasons) = candidates(config::MethodChoice::Copy, &source(Features::PUBLISHED.0));
        assert_eq!(methods.first(), Some(&Method::Copy));
        assert!(methods.contains(&Method::Clone));
        assert!(reasons.is_empty(), "{reasons:?}");
    }

    #[test]
    fn what_the_osds_must_not_copy_goes_to_the_next_method() {
        for (features, rest) in [
            (Features::PUBLISHED.0 | Features::JOURNALING.0, &[Method::Clone, Method::Copy][..]),
            (Features::PUBLISHED.0 | Features::MIGRATING.0, &[Method::Copy]),
        ] {
            for wanted in [config::MethodChoice::Auto, config::MethodChoice::ServerCopy] {
                assert_eq!(candidates(wanted, &source(features)).0, rest);
            }
        }
        let old = ImageInfo { old_format: true, ..source(Features::LAYERING.0) };
        assert_eq!(candidates(config::MethodChoice::Auto, &old).0, [Method::Copy]);
        for (kind, other) in [
            (ErrorKind::Unsupported, true),
            (ErrorKind::PermissionDenied, true),
            (ErrorKind::NoSpace, false),
            (ErrorKind::Other, false),
            (ErrorKind::Cancelled, false),
        ] {
            assert_eq!(is_for_another_method(&ceph::Error::new("fill", kind, "")), other, "{kind:?}");
        }
    }

    #[test]
    fn a_source_without_layering_is_copied_whatever_was_asked() {
        for wanted in [config::MethodChoice::Auto, config::MethodChoice::Clone, config::MethodChoice::ServerCopy] {
            let (methods, reasons) = candidates(wanted, &source(0));
            assert_eq!(methods, [Method::Copy]);
            assert_eq!(reasons.len(), 2);
        }
    }
}
