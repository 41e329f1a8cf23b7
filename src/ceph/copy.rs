//! Copying a snapshot through this host: librbd reads at the snapshot, what is not zero is written to the destination.

use std::collections::HashSet;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::cluster::{Cluster, cancelled};
use super::layers::{Chain, Inquiry, data_extents, total};
use super::pace::RateLimiter;
use super::rbd::{Access, Chunk, Completed, Extent, Image, Queue};
use super::{Error, ErrorKind, ImageSpec, Moved, Progress, Result, TransferLimits};

/// Bytes read at once where objects are larger than that.
const MAX_CHUNK: u64 = 4 << 20;

/// Bytes: zeros are looked for in pages of this size, the unit in which BlueStore allocates.
const PAGE: usize = 4096;

/// Bytes: a shorter run of zeros between data is written along, since one write is cheaper than two.
const MIN_HOLE: usize = 64 << 10;

/// Bytes: a chunk with no more data is written without any zeros, in at most 32 pieces. It stays thin.
const LITTLE_DATA: usize = 128 << 10;

/// How long to wait for a completion before looking at the cancellation again.
const POLL: Duration = Duration::from_millis(100);

/// Copies `source@snapshot` into the empty image `destination`.
pub(super) fn copy(
    cluster: &Arc<Cluster>,
    source: &ImageSpec,
    snapshot: &str,
    destination: &ImageSpec,
    limits: &TransferLimits,
    progress: &Progress,
    cancel: &CancellationToken,
) -> Result<Moved> {
    let operation = format!("copy {source}@{snapshot} to {destination}");
    let from = Image::open_snapshot(cluster, source, snapshot)?;
    let snap_id = from.snapshot_id(snapshot)?;
    let to = Image::open_existing(cluster, destination, Access::ReadWrite)?;
    let size = from.size()?;
    if to.size()? != size {
        let detail = format!("the destination has {} bytes instead of {size}", to.size()?);
        return Err(Error::new(operation, ErrorKind::Unsupported, detail));
    }
    let chain = Chain::of(cluster, &from, snap_id)?;
    let inquiry = Inquiry { operation: &operation, rate: &limits.rates.objects, progress, cancel };
    let extents = data_extents(cluster, &from, snap_id, inquiry)?;
    progress.set_total(total(&extents));
    let pace = HostPace { concurrency: limits.concurrency, rate: &limits.rates.bytes, per_byte: 1.0, at_least: 0.0 };
    let moved = copy_extents(&from, &to, &extents, pace, inquiry)?;
    // A snapshot that was removed while it was read reads as zeros from then on.
    chain.check(cluster, source, snapshot, &operation)?;
    Ok(moved)
}

/// How fast this host copies.
#[derive(Clone, Copy)]
pub(super) struct HostPace<'a> {
    /// Chunks in flight.
    pub concurrency: usize,
    pub rate: &'a RateLimiter,
    /// What a chunk costs at that rate.
    pub per_byte: f64,
    pub at_least: f64,
}

/// Copies these bytes of one open image to another, to the disk. The images have the same layout.
pub(super) fn copy_extents(
    from: &Image,
    to: &Image,
    extents: &[Extent],
    pace: HostPace<'_>,
    Inquiry { operation, progress, cancel, .. }: Inquiry<'_>,
) -> Result<Moved> {
    let object_size = from.object_size()?;
    let mut run = Run {
        queue: Queue::new(from, to),
        free: Vec::new(),
        moved: Moved::default(),
        objects: HashSet::new(),
        object_size,
        progress,
    };
    for Extent { start, end } in chunks(extents, object_size.min(MAX_CHUNK)) {
        let length = end - start;
        loop {
            if cancel.is_cancelled() {
                // Dropping the queue waits for what is in flight.
                return Err(cancelled(operation));
            }
            if run.chunks_in_flight() >= pace.concurrency.max(1) {
                run.complete(POLL)?;
                continue;
            }
            match pace.rate.start((length as f64 * pace.per_byte).max(pace.at_least)) {
                None => break,
                Some(wait) if run.queue.in_flight() > 0 => run.complete(wait)?,
                Some(wait) => {
                    // the daemon's other jobs may have used the rate up: this one is not stuck
                    progress.wait();
                    std::thread::sleep(wait);
                }
            }
        }
        run.read(start, length as usize)?;
    }
    while run.queue.in_flight() > 0 {
        if cancel.is_cancelled() {
            return Err(cancelled(operation));
        }
        run.complete(POLL)?;
    }
    let mut moved = run.moved;
    moved.objects = run.objects.len() as u64;
    drop(run);
    to.flush()?;
    Ok(moved)
}

struct Run<'a> {
    queue: Queue<'a>,
    /// Buffers for later chunks.
    free: Vec<Vec<u8>>,
    moved: Moved,
    objects: HashSet<u64>,
    object_size: u64,
    progress: &'a Progress,
}

impl Run<'_> {
    /// Requests in flight bound the chunks in memory: each chunk has at least one.
    fn chunks_in_flight(&self) -> usize {
        self.queue.in_flight()
    }

    fn read(&mut self, offset: u64, length: usize) -> Result<()> {
        let mut data = self.free.pop().unwrap_or_default();
        data.resize(length, 0);
        self.queue.read(Chunk { offset, data })
    }

    /// Handles one completion, if one comes in time.
    fn complete(&mut self, wait: Duration) -> Result<()> {
        match self.queue.next(wait)? {
            Some(Completed::Read(chunk)) => {
                self.moved.through_host += chunk.data.len() as u64;
                let parts = data_runs(&chunk.data);
                if parts.is_empty() {
                    self.finish(chunk);
                    return Ok(());
                }
                let chunk = Arc::new(chunk);
                for part in parts {
                    self.queue.write(&chunk, part)?;
                }
            }
            Some(Completed::Written(bytes, chunk)) => {
                self.moved.bytes += bytes as u64;
                self.moved.through_host += bytes as u64;
                if let Some(chunk) = chunk {
                    self.objects.insert(chunk.offset / self.object_size);
                    self.finish(chunk);
                }
            }
            None => {}
        }
        Ok(())
    }

    fn finish(&mut self, chunk: Chunk) {
        self.progress.add(chunk.data.len() as u64);
        self.free.push(chunk.data);
    }
}

/// Cuts extents at multiples of `size`.
fn chunks(extents: &[Extent], size: u64) -> impl Iterator<Item = Extent> {
    extents.iter().flat_map(move |extent| {
        let mut next = extent.start;
        std::iter::from_fn(move || {
            let start = next;
            next = ((start / size + 1) * size).min(extent.end);
            (start < extent.end).then_some(start..next)
        })
    })
}

/// The parts of the data that are not zero, in pages. Holes shorter than [`MIN_HOLE`] are part of them, unless there is
/// little data.
fn data_runs(data: &[u8]) -> Vec<Range<usize>> {
    static ZEROS: [u8; PAGE] = [0; PAGE];
    let pages = data.chunks(PAGE).enumerate().filter(|(_, page)| *page != &ZEROS[..page.len()]);
    let exact = joined(pages.map(|(number, page)| number * PAGE..number * PAGE + page.len()), PAGE);
    if exact.iter().map(ExactSizeIterator::len).sum::<usize>() <= LITTLE_DATA {
        return exact;
    }
    joined(exact.into_iter(), MIN_HOLE)
}

/// Joins those with a hole of less than `min_hole` between them.
fn joined(runs: impl Iterator<Item = Range<usize>>, min_hole: usize) -> Vec<Range<usize>> {
    let mut joined: Vec<Range<usize>> = Vec::new();
    for run in runs {
        match joined.last_mut() {
            Some(last) if run.start - last.end < min_hole => last.end = run.end,
            _ => joined.push(run),
        }
    }
    joined
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extents_are_cut_at_object_borders() {
        let cut: Vec<_> = chunks(&[0..10, 12..13, 15..25], 8).collect();
        assert_eq!(cut, [0..8, 8..10, 12..13, 15..16, 16..24, 24..25]);
    }

    #[test]
    fn zeros_are_left_out() {
        let mut data = vec![0u8; 1 << 20];
        assert!(data_runs(&data).is_empty());
        data[5] = 1;
        data[20 << 10] = 1;
        data[(512 << 10) + 4095] = 1;
        data[(1 << 20) - 1] = 1;
        assert_eq!(data_runs(&data)[..2], [0..4 << 10, 20 << 10..24 << 10]);
        data[256 << 10..384 << 10].fill(1);
        assert_eq!(data_runs(&data)[..2], [0..24 << 10, 256 << 10..384 << 10], "one write is cheaper than two");
        assert_eq!(data_runs(&[1, 0, 0]), std::slice::from_ref(&(0..3)));
    }
}
