//! Compares a snapshot with a copy of it, both read through librbd. The check does not rely on the code that made the
//! copy.
//!
//! A sample does not use the list of objects that the copy used, since that list may be wrong. It is drawn from the
//! whole image, holes and the parents' share included. More blocks are drawn where librbd's own enumeration, layer by
//! layer, shows data, where the copy has data and the source shows none, and where a mistake is likely: at borders of
//! objects and ends of overlaps.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;
use std::time::Duration;

use rand::RngExt;
use tokio_util::sync::CancellationToken;

use super::cluster::{Cluster, cancelled};
use super::layers::{Chain, DataObjects, Inquiry, clip, parents, total, union, without};
use super::pace::RateLimiter;
use super::rbd::{Access, Chunk, Completed, Extent, Image, Queue};
use super::{Compare, ImageSpec, Progress, Result};

/// Bytes of a block of a sample.
const BLOCK: u64 = 4096;

/// Blocks of a sample: one out of each of so many equal parts of the image.
const ANYWHERE: u64 = 16;
/// Where the source shows data.
const IN_DATA: usize = 20;
/// Where only the copy does.
const IN_COPY: usize = 8;
/// Around the ends of overlaps and of the image, and around borders of objects.
const ENDS: usize = 10;
const BORDERS: usize = 8;

/// Objects of a layer without a valid object map that are looked at, to find data for the sample.
const PROBES: u64 = 128;

/// Bytes read at once of each side in a full comparison.
const CHUNK: u64 = 4 << 20;

/// Pairs of reads in flight: of blocks, and of chunks, which this bounds the memory of.
const BLOCKS_IN_FLIGHT: usize = 16;
const CHUNKS_IN_FLIGHT: usize = 4;

/// How long to wait for a completion before looking at the cancellation again.
const POLL: Duration = Duration::from_millis(100);

/// Where `destination` first differs from `source@snapshot`, in what `extent` says is compared.
pub(super) fn compare(
    cluster: &Arc<Cluster>,
    source: &ImageSpec,
    snapshot: &str,
    destination: &ImageSpec,
    extent: Compare,
    watched: (&Progress, &CancellationToken),
) -> Result<Option<u64>> {
    let operation = format!("compare {destination} with {source}@{snapshot}");
    let from = Image::open_snapshot(cluster, source, snapshot)?;
    let snap_id = from.snapshot_id(snapshot)?;
    let to = Image::open_existing(cluster, destination, Access::ReadOnly)?;
    let (size, found) = (from.size()?, to.size()?);
    if size != found {
        return Ok(Some(size.min(found)));
    }
    let chain = Chain::of(cluster, &from, snap_id)?;
    let (no_limit, (progress, cancel)) = (RateLimiter::new(0), watched);
    let inquiry = Inquiry { operation: &operation, rate: &no_limit, progress, cancel };
    let difference = match extent {
        Compare::Sample => {
            let places = Places::find(cluster, &from, snap_id, &to, inquiry)?;
            let blocks = sample(&places, size, from.object_size()?, &mut rand::rng());
            first_difference(&operation, &from, &to, blocks.into_iter(), BLOCKS_IN_FLIGHT, watched)?
        }
        Compare::Full => {
            let chunks = (0..size.div_ceil(CHUNK)).map(|n| n * CHUNK..((n + 1) * CHUNK).min(size));
            first_difference(&operation, &from, &to, chunks, CHUNKS_IN_FLIGHT, watched)?
        }
    };
    // A snapshot that was removed while it was read reads as zeros from then on.
    chain.check(cluster, source, snapshot, &operation)?;
    Ok(difference)
}

/// Where a sample looks, besides anywhere.
#[derive(Default)]
struct Places {
    /// Ends of overlaps.
    ends: Vec<u64>,
    /// Where the source or one of its parents shows data.
    data: Vec<Extent>,
    /// Where the copy shows data and the source does not.
    only_copy: Vec<Extent>,
}

impl Places {
    fn find(cluster: &Arc<Cluster>, from: &Image, snap_id: u64, to: &Image, inquiry: Inquiry<'_>) -> Result<Self> {
        let size = from.size()?;
        let mut ends = vec![from.overlap()?];
        let mut data = shown(from, &DataObjects::of(from, Some(snap_id))?, size, inquiry)?;
        for layer in parents(cluster, from)? {
            ends.extend([layer.end, layer.size]);
            data.extend(shown(&layer.image, &layer.objects, layer.end, inquiry)?);
        }
        let (data, copied) = (union(data), union(shown(to, &DataObjects::of(to, None)?, size, inquiry)?));
        ends.retain(|end| (1..size).contains(end));
        Ok(Self { ends, only_copy: without(&copied, &data), data })
    }
}

/// Where an image itself shows data below `end`, by librbd's enumeration. Without a valid object map that would ask for
/// every object: a few of them are looked at instead.
fn shown(image: &Image, objects: &DataObjects, end: u64, inquiry: Inquiry<'_>) -> Result<Vec<Extent>> {
    if image.has_valid_object_map()? {
        return Ok(clip(image.own_extents(end)?, end));
    }
    let count = objects.layout.count(end);
    let mut random = rand::rng();
    let mut probes: Vec<u64> = stretches(count, PROBES).map(|part| random.random_range(part)).collect();
    probes.dedup();
    let lengths = objects.ask(&probes, inquiry, |data, object| objects.length(inquiry.operation, data, object))?;
    let there = probes.iter().zip(lengths).filter(|(_, length)| length.is_some_and(|length| length > 0));
    Ok(clip(there.flat_map(|(object, _)| objects.layout.extents(*object)).collect(), end))
}

/// Cuts `0..length` into at most `count` parts of about the same length, none of them empty.
fn stretches(length: u64, count: u64) -> impl Iterator<Item = Extent> {
    let count = count.min(length);
    let border = move |n: u64| (u128::from(length) * u128::from(n) / u128::from(count.max(1))) as u64;
    (0..count).map(move |n| border(n)..border(n + 1))
}

/// The blocks of a sample, in order. Others each time.
fn sample(places: &Places, size: u64, object_size: u64, random: &mut impl rand::Rng) -> Vec<Extent> {
    let mut starts: Vec<u64> = Vec::new();
    let within = |at: u64| at / BLOCK * BLOCK;
    let around = |border: u64| border.saturating_sub(BLOCK / 2);
    starts.extend(stretches(size, ANYWHERE).map(|part| within(random.random_range(part))));
    for (extents, count) in [(&places.data, IN_DATA), (&places.only_copy, IN_COPY)] {
        for part in stretches(total(extents), count as u64) {
            starts.extend(nth_byte(extents, random.random_range(part)).map(within));
        }
    }
    let last = size.saturating_sub(1);
    starts.extend([0, within(last)]);
    let ends = stretches(places.ends.len() as u64, ENDS as u64);
    starts.extend(ends.map(|part| around(places.ends[random.random_range(part) as usize])));
    let borders = stretches(last / object_size, BORDERS as u64);
    starts.extend(borders.map(|part| around((random.random_range(part) + 1) * object_size)));
    starts.sort_unstable();
    starts.dedup();
    starts.into_iter().map(|start| start..(start + BLOCK).min(size)).filter(|block| !block.is_empty()).collect()
}

/// Where the byte of that number in the extents lies.
fn nth_byte(extents: &[Extent], mut number: u64) -> Option<u64> {
    for extent in extents {
        let length = extent.end - extent.start;
        if number < length {
            return Some(extent.start + number);
        }
        number -= length;
    }
    None
}

/// Reads the extents, which are in order and differ, of both images.
fn first_difference(
    operation: &str,
    from: &Image,
    to: &Image,
    mut extents: impl Iterator<Item = Extent>,
    in_flight: usize,
    (progress, cancel): (&Progress, &CancellationToken),
) -> Result<Option<u64>> {
    let mut sides = [Queue::new(from, from), Queue::new(to, to)];
    // One side of a pair, while the other is being read.
    let mut halves: HashMap<u64, Vec<u8>> = HashMap::new();
    let mut free: Vec<Vec<u8>> = Vec::new();
    let mut pairs = 0;
    let mut first: Option<u64> = None;
    loop {
        if cancel.is_cancelled() {
            // Dropping the queues waits for what is in flight.
            return Err(cancelled(operation));
        }
        // After a difference only what is in flight can hold an earlier one.
        while pairs < in_flight && first.is_none() {
            let Some(extent) = extents.next() else { break };
            for side in &mut sides {
                let mut data = free.pop().unwrap_or_default();
                data.resize((extent.end - extent.start) as usize, 0);
                side.read(Chunk { offset: extent.start, data })?;
            }
            pairs += 1;
        }
        if pairs == 0 {
            return Ok(first);
        }
        let [a, b] = &mut sides;
        let side = if a.in_flight() >= b.in_flight() { a } else { b };
        let Some(Completed::Read(chunk)) = side.next(POLL)? else { continue };
        match halves.entry(chunk.offset) {
            Entry::Vacant(place) => {
                place.insert(chunk.data);
            }
            Entry::Occupied(place) => {
                progress.step();
                let other = place.remove();
                if other != chunk.data {
                    let at = other.iter().zip(&chunk.data).position(|(a, b)| a != b).unwrap_or(0);
                    let at = chunk.offset + at as u64;
                    first = Some(first.map_or(at, |before| before.min(at)));
                }
                free.extend([other, chunk.data]);
                pairs -= 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sample_covers_the_image_its_data_and_its_borders() {
        let (size, object_size) = (1000 * BLOCK + 17, 10 * BLOCK);
        let places = Places {
            ends: vec![333 * BLOCK + 5],
            data: vec![BLOCK * 3..BLOCK * 5, size - 17..size],
            only_copy: std::iter::once(BLOCK * 7..BLOCK * 8).collect(),
        };
        let blocks = sample(&places, size, object_size, &mut rand::rng());
        assert!(blocks.iter().all(|b| b.start < b.end && b.end <= size), "{blocks:?}");
        assert!(blocks.windows(2).all(|pair| pair[0].start < pair[1].start));
        assert!(blocks.len() <= ANYWHERE as usize + IN_DATA + IN_COPY + ENDS + BORDERS + 2, "{}", blocks.len());
        let has = |at: u64| blocks.iter().any(|block| block.contains(&at));
        for at in [0, 3 * BLOCK, 4 * BLOCK, 7 * BLOCK, 333 * BLOCK + 4, 333 * BLOCK + 5, size - 1] {
            assert!(has(at), "{at} in {blocks:?}");
        }
        for part in stretches(size, ANYWHERE) {
            assert!(blocks.iter().any(|b| b.start < part.end && b.end > part.start), "{part:?}");
        }
        let at_borders = (1..=100).filter(|n| has(n * object_size - 1) && has(n * object_size)).count();
        assert!(at_borders >= BORDERS, "{at_borders}");
    }

    #[test]
    fn samples_differ_from_each_other() {
        let draw = || sample(&Places::default(), 1 << 40, 4 << 20, &mut rand::rng());
        assert_ne!(draw(), draw());
    }

    #[test]
    fn small_images_have_samples() {
        for (size, blocks) in [(0, 0), (10, 1), (BLOCK, 1), (BLOCK + 1, 2)] {
            assert_eq!(sample(&Places::default(), size, 4 << 20, &mut rand::rng()).len(), blocks, "{size}");
        }
        let cut: Vec<_> = stretches(7, 3).collect();
        assert_eq!(cut, [0..2, 2..4, 4..7]);
        assert_eq!(stretches(2, 5).collect::<Vec<_>>(), [0..1, 1..2]);
    }
}
