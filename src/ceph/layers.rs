//! Where an image holds data: its own objects and those of the images it was cloned from.
//!
//! librbd's own enumeration over all layers loses the parent's data when the source has fast-diff, so the layers are
//! walked here, and each is asked for its own objects only.

use super::cluster::Cluster;
use super::rbd::{Extent, Image};
use super::{Error, ErrorKind, Features, Result};
use std::sync::Arc;

/// Chains are a few images long; a longer one than this is taken for a circle.
const MAX_LAYERS: usize = 64;

/// An image that a clone was made from, open at the snapshot.
pub(super) struct Layer {
    pub image: Image,
    pub snap_id: u64,
    /// Bytes from the start that the clone at the end of the chain still shares with it.
    pub end: u64,
}

/// The parents of an image as it is open, the nearest first.
pub(super) fn parents(cluster: &Arc<Cluster>, image: &Image) -> Result<Vec<Layer>> {
    let mut layers: Vec<Layer> = Vec::new();
    let mut end = image.size()?;
    let mut link = image.parent()?;
    while let Some(next) = link {
        if layers.len() == MAX_LAYERS {
            let operation = format!("walk the parents of {}", image.spec());
            return Err(Error::new(operation, ErrorKind::Unsupported, "there are too many"));
        }
        end = end.min(next.parent.overlap);
        if end == 0 {
            break;
        }
        let parent = Image::open_parent(cluster, &next)?;
        link = parent.parent()?;
        layers.push(Layer { image: parent, snap_id: next.snap_id, end });
    }
    Ok(layers)
}

/// All that may be other than zero in an image as it is open, in order and without overlaps; the whole image where the
/// layers cannot tell.
pub(super) fn data_extents(cluster: &Arc<Cluster>, image: &Image) -> Result<Vec<Extent>> {
    let size = image.size()?;
    match try_data_extents(cluster, image, size) {
        Ok(extents) => Ok(extents),
        Err(e) => {
            tracing::warn!("reading all of {}: its data cannot be told from holes: {e}", image.spec());
            Ok(clip(std::iter::once(0..size).collect(), size))
        }
    }
}

fn try_data_extents(cluster: &Arc<Cluster>, image: &Image, size: u64) -> Result<Vec<Extent>> {
    // While an image migrates, part of its data lies in another one that is not its parent.
    if image.features()?.has(Features::MIGRATING) {
        let operation = format!("list the data of {}", image.spec());
        return Err(Error::new(operation, ErrorKind::Unsupported, "it is being migrated"));
    }
    let mut extents = clip(image.own_extents(size)?, size);
    extents.extend(shared_extents(cluster, image)?);
    Ok(union(extents))
}

/// What an image as it is open may still read from its parents.
pub(super) fn shared_extents(cluster: &Arc<Cluster>, image: &Image) -> Result<Vec<Extent>> {
    let mut extents = Vec::new();
    for layer in parents(cluster, image)? {
        let end = layer.end.min(layer.image.size()?);
        extents.extend(clip(layer.image.own_extents(end)?, end));
    }
    Ok(union(extents))
}

pub(super) fn clip(mut extents: Vec<Extent>, end: u64) -> Vec<Extent> {
    extents.retain_mut(|extent| {
        extent.end = extent.end.min(end);
        extent.start < extent.end
    });
    extents
}

/// Sorts the extents and joins those that touch.
pub(super) fn union(mut extents: Vec<Extent>) -> Vec<Extent> {
    extents.sort_by_key(|extent| extent.start);
    let mut joined: Vec<Extent> = Vec::with_capacity(extents.len());
    for extent in extents {
        match joined.last_mut() {
            Some(last) if extent.start <= last.end => last.end = last.end.max(extent.end),
            _ => joined.push(extent),
        }
    }
    joined
}

/// What of `extents` is not in `others`; both as [`union`] returns them.
pub(super) fn without(extents: &[Extent], others: &[Extent]) -> Vec<Extent> {
    let mut rest = Vec::new();
    let mut others = others.iter().peekable();
    for extent in extents {
        let mut start = extent.start;
        while let Some(other) = others.peek() {
            if other.end <= start {
                others.next();
                continue;
            }
            if other.start >= extent.end {
                break;
            }
            if other.start > start {
                rest.push(start..other.start);
            }
            start = other.end;
            if start >= extent.end {
                break;
            }
        }
        if start < extent.end {
            rest.push(start..extent.end);
        }
    }
    rest
}

/// Bytes in all of them.
pub(super) fn total(extents: &[Extent]) -> u64 {
    extents.iter().map(|extent| extent.end - extent.start).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn touching_extents_are_joined() {
        assert_eq!(union(vec![8..12, 0..4, 4..6, 9..10]), [0..6, 8..12]);
        assert_eq!(union(vec![]), []);
        assert_eq!(clip(vec![0..4, 4..8, 8..12], 6), [0..4, 4..6]);
    }

    #[test]
    fn the_rest_is_what_the_others_leave() {
        assert_eq!(without(std::slice::from_ref(&(0..10)), &[2..4, 6..8]), [0..2, 4..6, 8..10]);
        assert_eq!(without(&[0..4, 6..10], std::slice::from_ref(&(0..20))), []);
        assert_eq!(without(&[0..4, 6..8], &[]), [0..4, 6..8]);
    }

    fn extents() -> impl Strategy<Value = Vec<Extent>> {
        prop::collection::vec((0u64..60, 1u64..10).prop_map(|(start, length)| start..start + length), 0..12)
    }

    proptest! {
        #[test]
        fn every_byte_is_where_it_belongs(a in extents(), b in extents()) {
            let rest = without(&union(a.clone()), &union(b.clone()));
            let joined = union(a.clone());
            for byte in 0..80u64 {
                let within = |extents: &[Extent]| extents.iter().any(|e| e.contains(&byte));
                prop_assert_eq!(within(&joined), within(&a));
                prop_assert_eq!(within(&rest), within(&a) && !within(&b));
            }
            prop_assert!(joined.windows(2).all(|pair| pair[0].end < pair[1].start));
        }
    }
}
