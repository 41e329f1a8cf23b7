//! Comparing a snapshot with a copy of it, both read through librbd: the proof that does not trust how the copy was made.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;
use std::time::Duration;

use rand::RngExt;
use tokio_util::sync::CancellationToken;

use super::cluster::{Cluster, cancelled};
use super::layers::{data_extents, total};
use super::rbd::{Access, Chunk, Completed, Extent, Image, Queue};
use super::{Compare, Error, ErrorKind, ImageSpec, Progress, Result};

/// Bytes of a block of a sample.
const BLOCK: u64 = 4096;

/// Blocks of a sample where the source holds data, and anywhere.
const IN_DATA: usize = 32;
const ANYWHERE: usize = 8;

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
    let difference = match extent {
        Compare::Sample => {
            let blocks = sample(&data_extents(cluster, &from)?, size, &mut rand::rng());
            first_difference(&operation, &from, &to, blocks.into_iter(), BLOCKS_IN_FLIGHT, watched)?
        }
        Compare::Full => {
            let chunks = (0..size.div_ceil(CHUNK)).map(|n| n * CHUNK..((n + 1) * CHUNK).min(size));
            first_difference(&operation, &from, &to, chunks, CHUNKS_IN_FLIGHT, watched)?
        }
    };
    // A snapshot that is removed meanwhile reads as zeros from then on.
    let again = Image::open_existing(cluster, source, Access::ReadOnly)?;
    if again.snapshot_id(snapshot)? != snap_id {
        return Err(Error::new(operation, ErrorKind::Conflict, "the snapshot was replaced meanwhile"));
    }
    Ok(difference)
}

/// Blocks drawn from the extents, and from the whole image.
fn sample(extents: &[Extent], size: u64, random: &mut impl rand::Rng) -> Vec<Extent> {
    let block = |at: u64| {
        let start = at / BLOCK * BLOCK;
        start..(start + BLOCK).min(size)
    };
    let data = total(extents);
    let mut blocks = Vec::with_capacity(IN_DATA + ANYWHERE);
    if data > 0 {
        for _ in 0..IN_DATA {
            let mut at = random.random_range(0..data);
            for extent in extents {
                let length = extent.end - extent.start;
                if at < length {
                    blocks.push(block(extent.start + at));
                    break;
                }
                at -= length;
            }
        }
    }
    if size > 0 {
        blocks.extend((0..ANYWHERE).map(|_| block(random.random_range(0..size))));
    }
    blocks.sort_by_key(|block| block.start);
    blocks.dedup();
    blocks
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
            // What is in flight is waited for when the queues go.
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
    fn a_sample_lies_in_the_data_and_within_the_image() {
        let size = 100 * BLOCK + 17;
        let data = [BLOCK * 3..BLOCK * 5, size - 17..size];
        let blocks = sample(&data, size, &mut rand::rng());
        assert!(blocks.iter().all(|b| b.start % BLOCK == 0 && b.start < b.end && b.end <= size), "{blocks:?}");
        assert!(blocks.windows(2).all(|pair| pair[0].start < pair[1].start));
        assert!(blocks.iter().any(|b| data[0].contains(&b.start)), "{blocks:?}");
        assert!(blocks.len() <= IN_DATA + ANYWHERE);
        assert!(sample(&[], 0, &mut rand::rng()).is_empty());
        assert!(!sample(&[], 10, &mut rand::rng()).is_empty());
    }
}
