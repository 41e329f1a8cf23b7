//! Restores the lost record of a job whose image is active and depends on its source, from what is in Ceph. Without a
//! record, no daemon would copy what the image still reads from the source, or keep the source for it.

use uuid::Uuid;

use super::clock::Clock;
use super::names::{anchor_name, private_name};
use super::record::{Artifact, CloneImage, Publish, Record, Registration, SourceImage, State};
use crate::ceph::{self, ImageInfo, ImageSpec, Parent, Storage};
use crate::openstack::Image;
use crate::publish::tag::OwnershipTag;
use crate::request::{self, TagRequest, Trigger};
use crate::transfer::Method;

/// The record for `published`, which bears `tag`. `image` is the image record, `pools` are those where the anchor may
/// be. `None`: the RBD image is gone.
pub async fn recreate_record(
    storage: &dyn Storage,
    clock: &Clock,
    pools: &[String],
    published: &ImageSpec,
    tag: &OwnershipTag,
    image: &Image,
) -> ceph::Result<Option<Record>> {
    let Some(info) = storage.image(published, None).await? else { return Ok(None) };
    let image_id = tag.image_id;
    let asked = match request::parse_request_tags(&image.tags) {
        TagRequest::Source(source) => Some(source),
        TagRequest::Absent | TagRequest::Invalid(_) => None,
    };
    let mut record = Record::new(image_id, Trigger::Request, asked, image.owner.clone(), clock.now());
    if let Some(maker) = tag.maker {
        record.request_id = maker.request_id;
    }
    record.set_publish(Publish::AtOnce);
    record.seal();
    record.state = State::Detaching;
    record.detaching_since = Some(clock.now());
    record.registration = Registration::Active;
    record.method = Some(Method::ServerCopy);
    record.dest_pool = Some(published.pool.clone());
    record.bytes_total = info.size;
    record.artifacts.insert(Artifact::Published);
    if let Some(anchor) = find_anchor(storage, pools, &info, image_id).await? {
        record.artifacts.insert(Artifact::Anchor);
        // one that Cinder has flattened does not tell the source, whose snapshot the reconciler finds by its tag
        record.source_image = Some(match anchor.parent {
            Some(parent) => source_of(parent, image_id),
            None => SourceImage {
                pool: anchor.pool,
                image_id: String::new(),
                image: "unknown".into(),
                snapshot: private_name(image_id),
                temporary: false,
            },
        });
    } else if let Some(parent) = info.parent.clone() {
        record.source_image = Some(source_of(parent, image_id));
    }
    if record.source_image.as_ref().is_some_and(|source| source.temporary) {
        record.artifacts.insert(Artifact::Snapshot);
    }
    record.clone = Some(CloneImage::of(info));
    Ok(Some(record))
}

struct Anchor {
    pool: String,
    parent: Option<Parent>,
}

/// The anchor of the image: its parent, or one that was left when the image had become independent.
async fn find_anchor(
    storage: &dyn Storage,
    pools: &[String],
    info: &ImageInfo,
    image_id: Uuid,
) -> ceph::Result<Option<Anchor>> {
    let name = anchor_name(image_id);
    let pools = match &info.parent {
        Some(parent) if parent.image == name => std::slice::from_ref(&parent.pool),
        Some(_) => return Ok(None),
        None => pools,
    };
    for pool in pools {
        if let Some(anchor) = storage.image(&ImageSpec::named(pool, &name), None).await? {
            return Ok(Some(Anchor { pool: pool.clone(), parent: anchor.parent }));
        }
    }
    Ok(None)
}

fn source_of(parent: Parent, image_id: Uuid) -> SourceImage {
    SourceImage {
        image: ImageSpec::named(&parent.pool, &parent.image).to_string(),
        temporary: parent.snapshot == private_name(image_id),
        pool: parent.pool,
        image_id: parent.image_id,
        snapshot: parent.snapshot,
    }
}
