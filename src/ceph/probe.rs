//! What this client may do in a pool, tried with a tiny image of its own.

use std::sync::Arc;

use super::cluster::{Client, Cluster, IoCtx};
use super::rbd::{self, Access, Image, Options};
use super::storage::remove_image;
use super::{Error, ErrorKind, ImageSpec, Result};

/// Something that this client cannot do in a pool.
#[derive(Debug)]
pub struct Finding {
    /// `create an image`
    pub what: &'static str,
    pub error: Error,
}

impl Client {
    /// Makes an image of `size` bytes that begins with `data`, and its protected snapshot. What was made before an error
    /// stays.
    pub async fn create_probe_image(&self, image: &ImageSpec, snapshot: &str, size: u64, data: Vec<u8>) -> Result<()> {
        let (spec, snapshot) = (image.clone(), snapshot.to_owned());
        self.run(format!("create {image}"), move |cluster| {
            rbd::create_default(&IoCtx::open(cluster, &spec.pool)?, &spec, size)?;
            let image = Image::open_existing(cluster, &spec, Access::ReadWrite)?;
            image.write(0, &data)?;
            image.flush()?;
            image.create_snapshot(&snapshot)?;
            image.protect_snapshot(&snapshot)
        })
        .await
    }

    /// What this client cannot do in a pool that it must be able to snapshot, write to and clean up: the first thing
    /// that fails, or `None`.
    pub async fn probe_pool(&self, pool: &str) -> Result<Option<Finding>> {
        let pool = pool.to_owned();
        self.run(format!("check pool {pool}"), move |cluster| match probe(cluster, &pool) {
            Ok(()) => Ok(None),
            // A fenced client has no missing capability.
            Err((_, error)) if error.kind() == ErrorKind::Fenced => Err(error),
            Err((what, error)) => Ok(Some(Finding { what, error })),
        })
        .await
    }
}

fn probe(cluster: &Arc<Cluster>, pool: &str) -> std::result::Result<(), (&'static str, Error)> {
    let io = IoCtx::open(cluster, pool).map_err(|e| ("open the pool", e))?;
    rbd::list(&io, &format!("list the images of {pool}")).map_err(|e| ("list images", e))?;
    let name = format!("rbd-offload.check-{}", uuid::Uuid::new_v4());
    let (clone_name, renamed_name) = (format!("{name}-clone"), format!("{name}-renamed"));
    let [spec, clone, renamed] = [&name, &clone_name, &renamed_name].map(|name| ImageSpec::named(pool, name));
    let result = rbd::create_default(&io, &spec, 1 << 20).map_err(|e| ("create an image", e)).and_then(|()| {
        let image = Image::open_existing(cluster, &spec, Access::ReadWrite).map_err(|e| ("open an image", e))?;
        image.create_snapshot("check").map_err(|e| ("create a snapshot", e))?;
        image.protect_snapshot("check").map_err(|e| ("protect a snapshot", e))?;
        drop(image);
        let parent = Image::open_snapshot(cluster, &spec, "check").map_err(|e| ("open a snapshot", e))?;
        let cloned = Options::published(&parent)
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
        image.remove_snapshot("check").map_err(|e| ("remove a snapshot", e))
    });
    let removed = remove_image(cluster, &spec).map_err(|e| ("remove an image", e));
    result.and(removed.map(drop))
}
