//! Publishing: the private copy becomes the image.
//!
//! Inspect the header, give the copy its protected snapshot, rename it to the image's id (which fails when another
//! writer has taken the name), prepare the record, register the location, wait until Glance says `active`. Each step
//! may be run again after a crash. [`image_status`] holds what the tenant sees.

pub mod header;
pub mod image_status;
pub mod tag;

use sha2::{Digest, Sha512};
use tokio_util::sync::CancellationToken;

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};

use self::tag::{OwnershipTag, is_tagged};
use crate::ceph::{self, ErrorKind, Features, ImageInfo, ImageSpec, Progress, Storage};

/// Name that Glance's driver gives to the protected snapshot which consumers clone from.
pub const SNAPSHOT: &str = "snap";

/// Bytes hashed at a time; twice as many are in memory.
const HASH_CHUNK: usize = 16 << 20;

/// Bytes read for the inspection of the header.
const HEADER_BYTES: usize = 64 << 10;

/// The container format of the copy's header. `None`: the copy is published as raw.
pub async fn inspect(storage: &dyn Storage, copy: &ImageSpec) -> ceph::Result<Option<&'static str>> {
    let header = storage.read(copy, 0, HEADER_BYTES).await?;
    Ok(header::container_format(&header))
}

/// Gives the copy the snapshot that consumers clone from, if head and snapshot are as a published image must be. A
/// missing or invalid object map is rebuilt once. `Some`: the fault that remains; the copy must not be published.
pub async fn create_snap(
    storage: &dyn Storage,
    copy: &ImageSpec,
    progress: &Progress,
    cancel: &CancellationToken,
) -> ceph::Result<Option<String>> {
    if let Some(fault) = repaired_shape(storage, copy, None, progress, cancel).await? {
        return Ok(Some(fault));
    }
    storage.create_protected_snapshot(copy, SNAPSHOT).await?;
    repaired_shape(storage, copy, Some(SNAPSHOT), progress, cancel).await
}

/// Gives a clone that is published at once the snapshot that consumers clone from. It must have no object map: a client
/// that opens it before the copy is complete would take objects that the map lacks for holes. `Some`: the fault.
pub async fn seal_clone(storage: &dyn Storage, copy: &ImageSpec) -> ceph::Result<Option<String>> {
    let Some(info) = storage.image(copy, None).await? else { return Ok(Some("it is gone".into())) };
    if info.features.0 & Features::MAPS.0 != 0 {
        return Ok(Some("it has an object map before its objects are there".into()));
    }
    storage.create_protected_snapshot(copy, SNAPSHOT).await?;
    Ok(None)
}

/// What is wrong with an image that was detached, at its head and at the snapshot that consumers clone from. Others may
/// have removed that snapshot.
pub async fn detached_fault(storage: &dyn Storage, image: &ImageSpec) -> ceph::Result<Option<String>> {
    for snapshot in [None, Some(SNAPSHOT)] {
        let info = match storage.image(image, snapshot).await {
            Err(error) if snapshot.is_some() && error.kind() == ErrorKind::NotFound => continue,
            info => info?,
        };
        let Some(info) = info else { return Ok(Some("it is gone".into())) };
        if let Some(fault) = shape_fault(&info) {
            return Ok(Some(fault));
        }
    }
    Ok(None)
}

/// What is wrong with the image, after one try to repair it.
async fn repaired_shape(
    storage: &dyn Storage,
    copy: &ImageSpec,
    snapshot: Option<&str>,
    progress: &Progress,
    cancel: &CancellationToken,
) -> ceph::Result<Option<String>> {
    let look = async || -> ceph::Result<(Option<String>, bool)> {
        let Some(info) = storage.image(copy, snapshot).await? else { return Ok((Some("it is gone".into()), false)) };
        Ok((shape_fault(&info), info.parent.is_none()))
    };
    let (Some(fault), is_whole) = look().await? else { return Ok(None) };
    tracing::warn!(image = %copy, snapshot, fault, "the copy is not as a published image must be");
    if !is_whole {
        // without a parent's data no rebuilding helps
        return Ok(Some(fault));
    }
    match storage.rebuild_maps(copy, progress, cancel).await {
        Ok(()) => Ok(look().await?.0),
        Err(error) if matches!(error.kind(), ErrorKind::Cancelled | ErrorKind::Fenced) => Err(error),
        Err(error) => Ok(Some(format!("{fault}, and its object map could not be rebuilt: {error}"))),
    }
}

/// The first difference of an image, at its head or a snapshot, from the published shape: no parent, the five features
/// and those of its layout, a valid object map.
fn shape_fault(info: &ImageInfo) -> Option<String> {
    if let Some(parent) = &info.parent {
        return Some(format!("it still has the parent {}/{}@{}", parent.pool, parent.image, parent.snapshot));
    }
    let mut expected = Features::PUBLISHED.0;
    if info.stripe_count > 1 || info.stripe_unit != info.object_size {
        expected |= Features::STRIPINGV2.0;
    }
    if info.data_pool.is_some() {
        expected |= Features::DATA_POOL.0;
    }
    // any client with access may have made a clone of format 2 from an active image; that sets this bit on the parent
    let found = info.features.0 & !Features::OPERATIONS.0;
    if found != expected {
        return Some(format!("it has the features {found:#x} instead of {expected:#x}"));
    }
    (info.flags != 0).then(|| format!("its object map is invalid (flags {:#x})", info.flags))
}

/// SHA-512 of the copy's `size` bytes, holes included, in hexadecimal; reads the next chunk while it hashes one.
/// [`ErrorKind::Cancelled`] soon after `cancel` fires.
pub async fn sha512(
    storage: &dyn Storage,
    copy: &ImageSpec,
    size: u64,
    progress: &Progress,
    cancel: &CancellationToken,
) -> ceph::Result<String> {
    let mut hasher = Sha512::new();
    let mut offset = 0;
    let mut chunk = storage.read(copy, 0, HASH_CHUNK).await?;
    while !chunk.is_empty() {
        if cancel.is_cancelled() {
            return Err(ceph::Error::new(format!("hash {copy}"), ErrorKind::Cancelled, "stopped"));
        }
        offset += chunk.len() as u64;
        let next = storage.read(copy, offset, if offset < size { HASH_CHUNK } else { 0 });
        let hash = tokio::task::spawn_blocking(move || {
            hasher.update(&chunk);
            hasher
        });
        let (next, hashed) = tokio::join!(next, hash);
        hasher = hashed.map_err(|e| ceph::Error::new(format!("hash {copy}"), ErrorKind::Other, e.to_string()))?;
        chunk = next?;
        progress.step();
    }
    if offset != size {
        let what = format!("{offset} bytes read of {size}");
        return Err(ceph::Error::new(format!("hash {copy}"), ErrorKind::Other, what));
    }
    Ok(hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

/// What became of taking the image's name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RenameOutcome {
    /// The copy has it now, or had it since an earlier attempt.
    Renamed,
    /// An image that is not ours has it.
    Taken,
    /// Neither the copy nor an image of that name is there.
    Missing,
}

/// Renames the copy to the image's id, if that name is free. `own` is the tag of the job that does so.
pub async fn rename_to_final(
    storage: &dyn Storage,
    copy: &ImageSpec,
    own: &OwnershipTag,
) -> ceph::Result<RenameOutcome> {
    let image_id = own.image_id.to_string();
    let target = ImageSpec::named(&copy.pool, image_id.as_str());
    match storage.rename(copy, &image_id).await {
        Ok(()) => return Ok(RenameOutcome::Renamed),
        // the copy is there, and an image of another internal id has the name
        Err(e) if e.kind() == ErrorKind::Exists => return Ok(RenameOutcome::Taken),
        Err(e) if e.kind() == ErrorKind::NotFound => {}
        Err(e) => return Err(e),
    }
    if storage.image(&target, None).await?.is_none() {
        return Ok(RenameOutcome::Missing);
    }
    if is_tagged(storage, &target, own).await? { Ok(RenameOutcome::Renamed) } else { Ok(RenameOutcome::Taken) }
}

/// Removes the published image if it has the tag `own`. Another writer's image stays.
pub async fn unpublish(storage: &dyn Storage, pool: &str, own: &OwnershipTag) -> ceph::Result<()> {
    let published = ImageSpec::named(pool, own.image_id.to_string());
    if is_tagged(storage, &published, own).await? {
        storage.remove_image(&published).await?;
    } else {
        // a removal that broke off left it in the trash, under no name
        storage.finish_removal(&published).await?;
    }
    Ok(())
}

/// The location as Glance wants it: `rbd://<fsid>/<pool>/<image>/<snapshot>`, each part percent-encoded.
pub fn location(fsid: &str, pool: &str, image_id: &str) -> String {
    const UNRESERVED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'~');
    let part = |text| utf8_percent_encode(text, UNRESERVED).to_string();
    format!("rbd://{}/{}/{}/{}", part(fsid), part(pool), part(image_id), SNAPSHOT)
}

/// Whether `url` is the location `ours`. Glance may encode its parts in another way.
pub fn is_location(url: &str, ours: &str) -> bool {
    fn decoded(url: &str) -> Vec<Vec<u8>> {
        url.split('/').map(|part| percent_decode_str(part).collect()).collect()
    }
    decoded(url) == decoded(ours)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_whole_image_with_valid_maps_is_fit_to_be_published() {
        let right = ImageInfo {
            id: "1".into(),
            size: 1 << 30,
            object_size: 4 << 20,
            stripe_unit: 4 << 20,
            stripe_count: 1,
            features: Features::PUBLISHED,
            flags: 0,
            parent: None,
            snapshots: Vec::new(),
            data_pool: None,
            old_format: false,
        };
        assert_eq!(shape_fault(&right), None);
        let erasure_coded = ImageInfo {
            data_pool: Some("ec".into()),
            features: Features(Features::PUBLISHED.0 | Features::DATA_POOL.0),
            ..right.clone()
        };
        assert_eq!(shape_fault(&erasure_coded), None);
        let striped = ImageInfo {
            stripe_count: 4,
            features: Features(Features::PUBLISHED.0 | Features::STRIPINGV2.0),
            ..right.clone()
        };
        assert_eq!(shape_fault(&striped), None);
        let cloned = ImageInfo { features: Features(Features::PUBLISHED.0 | Features::OPERATIONS.0), ..right.clone() };
        assert_eq!(shape_fault(&cloned), None, "a clone of format 2 hangs on it");
        let parent = ceph::Parent {
            pool: "volumes".into(),
            namespace: String::new(),
            image: "v".into(),
            image_id: "2".into(),
            snapshot: "s".into(),
            overlap: 0,
            in_trash: false,
        };
        for wrong in [
            ImageInfo { parent: Some(parent), ..right.clone() },
            ImageInfo { features: Features(Features::PUBLISHED.0 & !Features::MAPS.0), ..right.clone() },
            ImageInfo { features: Features(Features::PUBLISHED.0 | Features::JOURNALING.0), ..right.clone() },
            ImageInfo { features: striped.features, ..right.clone() },
            ImageInfo { flags: 1, ..right.clone() },
        ] {
            assert!(shape_fault(&wrong).is_some(), "{wrong:?}");
        }
    }

    #[test]
    fn a_location_is_known_however_it_is_encoded() {
        let ours = location("f-1", "glance~images 1", "a-b");
        assert!(is_location("rbd://f-1/glance%7eimages%201/a-b/snap", &ours));
        assert!(!is_location("rbd://f-1/glance~images%201/a-c/snap", &ours));
        assert!(!is_location("rbd://f-1/glance~images 1%2fa-b/snap", &ours));
        assert!(!is_location("file:///var/lib/glance/a-b", &ours));
    }

    #[test]
    fn every_part_of_a_location_is_encoded() {
        assert_eq!(location("f-1", "glance/images 1", "a-b"), "rbd://f-1/glance%2Fimages%201/a-b/snap");
    }
}
