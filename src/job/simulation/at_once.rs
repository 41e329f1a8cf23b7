//! Publishing at once, as the simulated cluster knows it: what is copied behind an active image, and what a client reads
//! that opened the image at any moment.

use std::collections::BTreeSet;
use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::cluster::Rbd;
use super::node::{Handle, Kind};
use super::world::World;
use crate::ceph::{Error, ErrorKind, Features, FillState, ImageSpec, Moved, Progress, Result};
use crate::config::{Config, Publish};
use crate::job::record::Record;

/// Data objects of an image.
pub const OBJECTS: u64 = 3;

/// `[offload] detach_grace` of the simulated daemons.
pub const GRACE: Duration = Duration::from_secs(20);

/// What the world knows of images that are published before they are copied.
#[derive(Debug, Default)]
pub struct AtOnce {
    /// The daemons are configured for it.
    pub is_asked_for: bool,
    /// Glance's user may not read the pools of the sources.
    pub is_refused: bool,
    /// What each image became active with, by its RBD image's id.
    pub contents: std::collections::BTreeMap<String, u64>,
    /// Objects that were written into images that were gone.
    pub orphans: BTreeSet<(String, u64)>,
}

/// A parent that was cut off, and when: who opened the image before still reads from it.
#[derive(Debug, Clone)]
pub struct CutOff {
    pub at: Instant,
    /// Images and snapshots, the nearest first.
    pub chain: Vec<(String, u64)>,
}

pub fn configure(config: &mut Config) {
    config.offload.publish = Publish::AtOnce;
    config.offload.detach_grace = GRACE;
}

/// Whether clients may have opened it.
fn is_published(world: &World, image: &Rbd) -> bool {
    world.ceph.at_once.contents.contains_key(&image.id)
}

/// An image became active by this RBD image.
pub fn published(world: &mut World, image: &Rbd) {
    if image.parent.is_some() && !world.ceph.at_once.is_asked_for {
        let name = &image.name;
        world.violated(format!("image {name:?} became active while its RBD image has a parent"));
    }
    let content = world.ceph.content(image);
    world.ceph.at_once.contents.insert(image.id.clone(), content);
}

/// What a client reads that opens a published image now must be what it became active with. One with an object map takes
/// every object that it lacks for a hole.
pub fn watch_readers(world: &mut World) {
    let mut broken = Vec::new();
    for image in &world.ceph.images {
        let Some(right) = world.ceph.at_once.contents.get(&image.id) else { continue };
        if image.removing.is_some() {
            continue;
        }
        let read = world.ceph.content(image);
        if read != *right {
            broken.push(format!("a client that opens {:?} reads {read}, right is {right}", image.name));
        }
        if image.parent.is_some() && image.features & Features::MAPS.0 != 0 {
            broken.push(format!("{:?} has an object map before all its objects are there", image.name));
        }
    }
    for what in broken {
        world.violated(what);
    }
}

/// A daemon removes a snapshot, or an image with all of them: no client may still read from it.
pub fn must_not_be_read(world: &mut World, id: &str, snapshot: Option<u64>) {
    let reads = |image: &&Rbd| {
        image.cut_off.as_ref().is_some_and(|cut| {
            let is_in = cut.chain.iter().any(|(image, snap)| image == id && snapshot.is_none_or(|this| this == *snap));
            is_in && cut.at.elapsed() < GRACE
        })
    };
    let reader = world.ceph.images.iter().find(reads).filter(|image| is_published(world, image));
    if let Some(name) = reader.map(|image| image.name.clone()) {
        world.violated(format!("what {name:?} read from was removed before its grace was over"));
    }
}

/// How far the record of the job says that the fill is.
fn recorded(world: &World, name: &str) -> u64 {
    let object = world.ceph.objects.get(&format!("job.{name}"));
    object.and_then(|object| Record::parse(&object.data).ok()).map_or(0, |record| record.fill.next_object)
}

impl Handle {
    /// The fill: an object a call. Nobody's removal of the image is hindered.
    pub async fn fill_objects(
        &self,
        image: &ImageSpec,
        from: FillState,
        progress: &Progress,
        cancel: &CancellationToken,
        saved: &(dyn Fn(FillState) + Send + Sync),
    ) -> Result<Moved> {
        let found = self
            .ceph(
                Kind::Read,
                || format!("open for a fill {image}"),
                |world| {
                    let Some(found) = world.ceph.find(image).cloned() else { return Ok(None) };
                    if found.features & Features::MAPS.0 != 0 && found.parent.is_some() {
                        world.violated(format!("a fill of {image}, which has an object map"));
                    }
                    let refused = world.faults.unsupported;
                    if world.dice.chance(refused) {
                        return Err(Error::new(format!("fill {image}"), ErrorKind::Unsupported, "not here"));
                    }
                    let done = found.name.as_deref().map_or(0, |name| recorded(world, name));
                    if from.next_object < done {
                        world.violated(format!("the fill of {image} does not go on where it stopped"));
                    }
                    Ok(Some(found))
                },
            )
            .await?;
        let Some(found) = found else { return Err(Error::new("fill", ErrorKind::NotFound, "the image is gone")) };
        if found.parent.is_none() {
            return Ok(Moved::default());
        }
        progress.set_total(OBJECTS << 20);
        let mut state = from;
        while state.next_object < OBJECTS {
            let pause = self.world().lock().dice.millis(20, 2_000);
            tokio::select! {
                biased;
                () = cancel.cancelled() => return Err(Error::new("fill", ErrorKind::Cancelled, "stopped")),
                () = tokio::time::sleep(pause) => {}
            }
            let object = state.next_object;
            let is_there = self
                .ceph(
                    Kind::Write,
                    || format!("fill object {object} of {image}"),
                    |world| {
                        let is_there = world.ceph.by_id(&found.id).is_some();
                        if !is_there {
                            world.ceph.at_once.orphans.insert((found.id.clone(), object));
                        }
                        Ok(is_there)
                    },
                )
                .await?;
            if !is_there && object % 2 == 1 {
                return Err(Error::new(format!("fill {image}"), ErrorKind::NotFound, "the image is gone"));
            }
            state = FillState { next_object: object + 1, copied: state.copied + 1 };
            progress.set_done(state.next_object << 20);
            saved(state);
        }
        Ok(Moved { bytes: 1 << 20, through_host: 1, objects: 1 })
    }

    /// The parent is cut off, then the maps are switched on: a crash may come between them.
    pub async fn detach_image(
        &self,
        image: &ImageSpec,
        progress: &Progress,
        cancel: &CancellationToken,
    ) -> Result<Moved> {
        let id = self.open("detach", image).await?;
        self.long("detach", &id, progress, cancel, false).await?;
        let address = self.node.address();
        self.ceph(
            Kind::Write,
            || format!("cut the parent off {image}"),
            |world| {
                let Some(found) = world.ceph.by_id(&id).cloned() else { return Err(gone(image)) };
                let (content, chain) = (world.ceph.content(&found), world.ceph.chain_of(&found));
                if let Some(this) = world.ceph.by_id_mut(&id).filter(|this| this.parent.is_some()) {
                    (this.content, this.parent) = (content, None);
                    this.cut_off = Some(CutOff { at: Instant::now(), chain });
                }
                Ok(())
            },
        )
        .await?;
        self.ceph(
            Kind::Write,
            || format!("switch the maps of {image} on"),
            |world| {
                let Some(found) = world.ceph.by_id_mut(&id) else { return Err(gone(image)) };
                found.features = Features::PUBLISHED.0;
                found.watchers.remove(&address);
                Ok(Moved { bytes: 1 << 20, through_host: 1, objects: 1 })
            },
        )
        .await
    }

    pub async fn sweep(&self, image: &ImageSpec) -> Result<u64> {
        self.ceph(
            Kind::Write,
            || format!("sweep the objects of {image}"),
            |world| {
                if world.ceph.find(image).is_some() {
                    return Err(Error::new(format!("sweep {image}"), ErrorKind::Exists, "the image is there"));
                }
                let crate::ceph::ImageKey::Id(id) = &image.image else { return Err(gone(image)) };
                let before = world.ceph.at_once.orphans.len();
                world.ceph.at_once.orphans.retain(|(of, _)| of != id);
                Ok((before - world.ceph.at_once.orphans.len()) as u64)
            },
        )
        .await
    }
}

fn gone(image: &ImageSpec) -> Error {
    Error::new(format!("detach {image}"), ErrorKind::NotFound, "the image is gone")
}
