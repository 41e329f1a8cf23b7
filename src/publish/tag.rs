//! The ownership tag: for which image, by which request and by which deployment something in Ceph was made.
//!
//! It stands in the image-meta ([`OWNERSHIP_TAG`]) of what a job makes, and beside each temporary
//! snapshot ([`Storage::set_snapshot_tag`]). Several deployments (clouds, or daemons with another `[jobs] namespace`)
//! may share pools: only what bears the own deployment's tag is ever removed.

use std::fmt;

use uuid::Uuid;

use crate::ceph::{self, ImageSpec, Storage};
use crate::transfer::OWNERSHIP_TAG;

/// `<image id> <request id> <deployment id>`, or only `<image id>`: written by an older release, or by hand.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct OwnershipTag {
    pub image_id: Uuid,
    /// `None` in a tag that is only an image id.
    pub maker: Option<Maker>,
}

/// Which request of which deployment made something.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Maker {
    pub request_id: Uuid,
    pub deployment_id: Uuid,
}

impl OwnershipTag {
    pub fn new(image_id: Uuid, request_id: Uuid, deployment_id: Uuid) -> Self {
        Self { image_id, maker: Some(Maker { request_id, deployment_id }) }
    }

    /// `None` for what is no ownership tag.
    pub fn parse(text: &str) -> Option<Self> {
        let mut ids = text.split(' ').map(Uuid::try_parse);
        let image_id = ids.next()?.ok()?;
        let maker = match (ids.next(), ids.next(), ids.next()) {
            (None, ..) => None,
            (Some(Ok(request_id)), Some(Ok(deployment_id)), None) => Some(Maker { request_id, deployment_id }),
            _ => return None,
        };
        Some(Self { image_id, maker })
    }

    /// Whether a thing with this tag was made by the request that `own` names. An older tag belongs to any request of
    /// its image.
    pub fn is_of_request(&self, own: &Self) -> bool {
        self.image_id == own.image_id && (self.maker.is_none() || self.maker == own.maker)
    }

    /// Whether a thing with this tag was made for that image by any request of that deployment. An older tag names no
    /// deployment: it counts as the own one.
    pub fn is_of_deployment(&self, image_id: Uuid, deployment_id: Uuid) -> bool {
        self.image_id == image_id && self.maker.is_none_or(|maker| maker.deployment_id == deployment_id)
    }
}

impl fmt::Display for OwnershipTag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.image_id.fmt(f)?;
        match self.maker {
            Some(Maker { request_id, deployment_id }) => write!(f, " {request_id} {deployment_id}"),
            None => Ok(()),
        }
    }
}

/// The ownership tag of an RBD image; `None` without one, and without such an image. A clone inherits the metadata of
/// its parent, so a tag of another image says nothing.
pub async fn tag_of(storage: &dyn Storage, image: &ImageSpec) -> ceph::Result<Option<OwnershipTag>> {
    Ok(storage.metadata(image, OWNERSHIP_TAG).await?.as_deref().and_then(OwnershipTag::parse))
}

/// Whether the RBD image was made by the request that `own` names.
pub async fn is_tagged(storage: &dyn Storage, image: &ImageSpec, own: &OwnershipTag) -> ceph::Result<bool> {
    Ok(tag_of(storage, image).await?.is_some_and(|tag| tag.is_of_request(own)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tag_is_read_as_it_is_written() {
        let [image, request, deployment] = [1, 2, 3].map(Uuid::from_u128);
        let tag = OwnershipTag::new(image, request, deployment);
        assert_eq!(tag.to_string(), format!("{image} {request} {deployment}"));
        assert_eq!(OwnershipTag::parse(&tag.to_string()), Some(tag));
        let older = OwnershipTag { image_id: image, maker: None };
        assert_eq!(OwnershipTag::parse(&image.to_string()), Some(older));
        for text in ["", "x", "other", &format!("{image} "), &format!("{image} {request}"), &format!("{tag} {image}")] {
            assert_eq!(OwnershipTag::parse(text), None, "{text:?}");
        }
    }

    #[test]
    fn a_tag_tells_the_request_and_the_deployment() {
        let [image, request, deployment, other] = [1, 2, 3, 4].map(Uuid::from_u128);
        let own = OwnershipTag::new(image, request, deployment);
        let older = OwnershipTag { image_id: image, maker: None };
        let earlier = OwnershipTag::new(image, other, deployment);
        let foreign = OwnershipTag::new(image, request, other);
        let another = OwnershipTag::new(other, request, deployment);
        assert!(own.is_of_request(&own) && older.is_of_request(&own));
        assert!(!earlier.is_of_request(&own) && !foreign.is_of_request(&own) && !another.is_of_request(&own));
        assert!([own, older, earlier].iter().all(|tag| tag.is_of_deployment(image, deployment)));
        assert!([foreign, another].iter().all(|tag| !tag.is_of_deployment(image, deployment)));
    }
}
