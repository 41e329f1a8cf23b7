//! What this client may do in a pool, tried with a tiny image of its own, and where the data of images lies.
#![allow(unsafe_code)]

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use ceph::rados::rados_remove;

use super::cluster::{Client, Cluster, IoCtx, c_string, check, unix_time};
use super::objects::create_empty;
use super::rbd::{self, Access, Image, Options};
use super::storage::remove_image;
use super::{Error, ErrorKind, ImageSpec, Result};

/// Something that this client cannot do in a pool.
#[derive(Debug)]
pub struct Finding {
    /// `create an image`
    pub what: &'static str,
    /// Where: the pool that was probed, or that of the data.
    pub pool: String,
    pub error: Error,
}

/// What became of probing a pool.
#[derive(Debug)]
pub enum Probed {
    /// Everything can be done. The data of the image lay in this pool.
    All {
        data_pool: String,
    },
    Lacks(Finding),
}

/// Images whose data is looked for, of a pool.
const IMAGES_MAX: usize = 32;

/// How the names of the images begin that are made to probe a pool.
const PREFIX: &str = "rbd-offload.check-";

/// The same, of those that are made to be published.
const END_TO_END_PREFIX: &str = "rbd-offload.probe-";

/// A probe whose images are older was killed. Clocks of hosts differ by less.
const LEFT_AFTER: Duration = Duration::from_secs(3600);

/// A smaller number in a name is the beginning of a UUID.
const SECONDS_MIN: u64 = 1_000_000_000;

impl Client {
    /// Makes an image of `size` bytes that begins with `data`, and its protected snapshot. What was made before an
    /// error stays.
    pub async fn create_probe_image(&self, image: &ImageSpec, snapshot: &str, size: u64, data: Vec<u8>) -> Result<()> {
        let (spec, snapshot) = (image.clone(), snapshot.to_owned());
        self.run(format!("create {image}"), move |cluster| {
            rbd::create_default(&IoCtx::open(cluster, &spec.pool)?, &spec, size, None)?;
            let image = Image::open_existing(cluster, &spec, Access::ReadWrite)?;
            image.write(0, &data)?;
            image.flush()?;
            image.create_snapshot(&snapshot)?;
            image.protect_snapshot(&snapshot)
        })
        .await
    }

    /// Whether this client can do in a pool what it must be able to: make images with their data in `data_pool`
    /// (`None`: where the configuration of the client and the pool say), snapshot, clone, rename and remove them. The
    /// first thing that fails ends it. Images that a killed probe left an hour ago are removed.
    pub async fn probe_pool(&self, pool: &str, data_pool: Option<&str>) -> Result<Probed> {
        let (pool, data_pool) = (pool.to_owned(), data_pool.map(str::to_owned));
        self.run(format!("check pool {pool}"), move |cluster| {
            let probed = match data_pool.as_deref() {
                Some(data_pool) => probe_data_pool(cluster, data_pool),
                None => Ok(()),
            };
            match probed.and_then(|()| probe(cluster, &pool, data_pool.as_deref())) {
                Ok(data_pool) => Ok(Probed::All { data_pool }),
                // A fenced client has no missing capability.
                Err(Finding { error, .. }) if error.kind() == ErrorKind::Fenced => Err(error),
                Err(finding) => Ok(Probed::Lacks(finding)),
            }
        })
        .await
    }

    /// Whether images can have their data in a pool. [`ErrorKind::NotFound`] where there is no such pool,
    /// [`ErrorKind::Unsupported`] where it is erasure-coded and allows no overwrites.
    pub async fn can_hold_data(&self, pool: &str) -> Result<()> {
        let operation = format!("look at pool {pool}");
        let pool = pool.to_owned();
        self.run(operation.clone(), move |cluster| IoCtx::open(cluster, &pool)?.must_hold_data(&operation)).await
    }

    /// The pools in which images of a pool have their data, without the daemon's private ones. Some of the images are
    /// looked at, none of them for long.
    pub async fn data_pools(&self, pool: &str) -> Result<BTreeSet<String>> {
        let operation = format!("look where images of {pool} have their data");
        let pool = pool.to_owned();
        self.run(operation.clone(), move |cluster| {
            let listed = rbd::list(&IoCtx::open(cluster, &pool)?, &operation)?;
            let images = listed.into_iter().filter(|image| !image.name.starts_with("rbd-offload."));
            let mut pools = BTreeSet::new();
            for image in images.take(IMAGES_MAX) {
                // one that cannot be opened tells nothing
                if let Ok(Some(image)) = Image::open(cluster, &ImageSpec::named(&pool, image.name), Access::ReadOnly) {
                    pools.insert(cluster.pool_name(image.data_pool_id())?);
                }
            }
            Ok(pools)
        })
        .await
    }
}

/// `<prefix><seconds since 1970>-<uuid>`
fn new_name(prefix: &str) -> String {
    format!("{prefix}{}-{}", unix_time().as_secs(), uuid::Uuid::new_v4())
}

/// A name for an image that is published to try that.
pub fn end_to_end_name() -> String {
    new_name(END_TO_END_PREFIX)
}

/// Whether an image was made by a probe that has ended long ago.
fn is_left(name: &str) -> bool {
    let rest = [PREFIX, END_TO_END_PREFIX].iter().find_map(|prefix| name.strip_prefix(prefix));
    let made = rest.and_then(|rest| rest.split('-').next()?.parse().ok());
    made.is_some_and(|made| made >= SECONDS_MIN && unix_time().saturating_sub(Duration::from_secs(made)) > LEFT_AFTER)
}

/// Whether images can have their data in a pool, and this client can write it.
fn probe_data_pool(cluster: &Arc<Cluster>, pool: &str) -> std::result::Result<(), Finding> {
    let finding = |what: &'static str| move |error| Finding { what, pool: pool.to_owned(), error };
    let operation = "write into the data pool";
    let io = IoCtx::open(cluster, pool).map_err(finding("open the data pool"))?;
    io.must_hold_data(operation).map_err(finding("keep the data of images"))?;
    let try_it = || {
        let object = c_string(operation, &new_name(PREFIX))?;
        create_empty(&io, &object, operation)?;
        // SAFETY: the ioctx is open, the name ends in NUL.
        check(operation, unsafe { rados_remove(io.raw(), object.as_ptr()) })
    };
    try_it().map(drop).map_err(finding("write the data of images"))
}

/// Does everything that the daemon does to images; the pool of the data of the image that was made.
fn probe(cluster: &Arc<Cluster>, pool: &str, data_pool: Option<&str>) -> std::result::Result<String, Finding> {
    let place =
        try_images(cluster, pool, data_pool).map_err(|(what, error)| Finding { what, pool: pool.to_owned(), error })?;
    if data_pool.is_none() && place != pool {
        probe_data_pool(cluster, &place)?;
    }
    Ok(place)
}

fn try_images(
    cluster: &Arc<Cluster>,
    pool: &str,
    data_pool: Option<&str>,
) -> std::result::Result<String, (&'static str, Error)> {
    let io = IoCtx::open(cluster, pool).map_err(|e| ("open the pool", e))?;
    let images = rbd::list(&io, &format!("list the images of {pool}")).map_err(|e| ("list images", e))?;
    let name = new_name(PREFIX);
    let (clone_name, renamed_name) = (format!("{name}-clone"), format!("{name}-renamed"));
    let [spec, clone, renamed] = [&name, &clone_name, &renamed_name].map(|name| ImageSpec::named(pool, name));
    let created = rbd::create_default(&io, &spec, 1 << 20, data_pool).map_err(|e| ("create an image", e));
    let result = created.and_then(|()| {
        let image = Image::open_existing(cluster, &spec, Access::ReadWrite).map_err(|e| ("open an image", e))?;
        let place = cluster.pool_name(image.data_pool_id()).map_err(|e| ("look at an image", e))?;
        image.create_snapshot("check").map_err(|e| ("create a snapshot", e))?;
        image.protect_snapshot("check").map_err(|e| ("protect a snapshot", e))?;
        drop(image);
        let parent = Image::open_snapshot(cluster, &spec, "check").map_err(|e| ("open a snapshot", e))?;
        let cloned = Options::published(&parent, data_pool)
            .and_then(|options| rbd::clone(parent.io(), &name, "check", &io, &clone, &options, "clone a snapshot"))
            .map_err(|e| ("clone a snapshot", e))
            .and_then(|()| {
                rbd::rename(&io, &clone_name, &renamed_name, "rename an image").map_err(|e| ("rename an image", e))
            });
        drop(parent);
        let removed = [&renamed, &clone].map(|spec| remove_image(cluster, spec).map_err(|e| ("remove an image", e)));
        cloned?;
        for removed in removed {
            removed?;
        }
        let image = Image::open_existing(cluster, &spec, Access::ReadWrite).map_err(|e| ("open an image", e))?;
        image.unprotect_snapshot("check").map_err(|e| ("unprotect a snapshot", e))?;
        image.remove_snapshot("check").map_err(|e| ("remove a snapshot", e))?;
        Ok(place)
    });
    let removed = remove_image(cluster, &spec).map_err(|e| ("remove an image", e));
    let place = result.and_then(|place| removed.map(|_| place))?;
    let mut left: Vec<String> = images.into_iter().map(|image| image.name).filter(|name| is_left(name)).collect();
    // the clone of an image has the longer name
    left.sort_by_key(|name| std::cmp::Reverse(name.len()));
    for name in left {
        // what cannot be removed now says nothing about the pool: another check may be removing it
        let _ = remove_image(cluster, &ImageSpec::named(pool, name));
    }
    Ok(place)
}
