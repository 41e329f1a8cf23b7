//! From a sealed copy to an active image.

use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::{Job, Step, Stop, image_gone, other_writer};
use crate::ceph::ImageSpec;
use crate::job::record::{Handover, Publication, State};
use crate::openstack::{self, Image, LocationAnswer, Validation};
use crate::plan;
use crate::publish::record as image_record;
use crate::publish::tag::is_tagged;
use crate::publish::{self, Name};
use crate::transfer;

/// How long Glance may take to make a registered image active, beside the time for reading it where it does that first.
const ACTIVE_WITHIN: Duration = Duration::from_secs(60);

/// Bytes a second that Glance is trusted to hash at least (measured: 170 MiB/s and more).
const HASHED_PER_SECOND: u64 = 20 << 20;

/// Pauses between looks at a registered image: the first and the longest. Glance takes about 0.3 s.
const POLL_FIRST: Duration = Duration::from_millis(50);
const POLL_MAX: Duration = Duration::from_secs(1);

/// How often a change of the image record is tried when the record changes meanwhile.
pub(super) const RECORD_TRIES: usize = 5;

impl Job {
    /// From a sealed copy to an active image.
    pub(super) async fn publish(&self) -> Step<()> {
        // from here on the watcher leaves the tenant's record alone
        *self.tenant.lock().await = None;
        let record = self.snapshot().await;
        let Some(pool) = record.dest_pool.clone() else {
            return Err(Stop::Abandon("its record names no destination pool".into()));
        };
        let copy = ImageSpec::named(&pool, record.private_name());

        let mut image = self.read_image().await?;
        match image.status.as_str() {
            "active" if self.is_our_image(&copy).await? => return self.finish(&pool, &image).await,
            "queued" | "importing" => {}
            _ => return other_writer(),
        }
        if record.handover == Some(Handover::Offered) {
            image = self.stage("handover", self.await_go(image)).await?;
        }
        self.stage("rename", self.take_name(&copy)).await?;
        if image.status == "queued" {
            image = self.stage("record", self.prepare_record(image, &record.publication)).await?;
        }
        let image = self.stage("register", self.register(image, &pool, record.bytes_total)).await?;
        if !self.is_our_image(&copy).await? {
            return other_writer();
        }
        self.finish(&pool, &image).await
    }

    pub(super) async fn read_image(&self) -> Step<Image> {
        Ok(plan::read_image(self.context.cloud.as_ref(), self.id).await?)
    }

    /// Whether an active image is active by what we published: our mark says so, and once it is coming off, the record.
    pub(super) async fn is_our_image(&self, copy: &ImageSpec) -> Step<bool> {
        let made = self.snapshot().await.made;
        if !made.published || made.active {
            return Ok(made.active);
        }
        let published = ImageSpec::named(&copy.pool, self.id.to_string());
        Ok(is_tagged(self.context.storage.as_ref(), &published, &self.tag().await).await?)
    }

    pub(super) async fn take_name(&self, copy: &ImageSpec) -> Step<()> {
        self.before_visible_step().await?;
        if !self.snapshot().await.made.published {
            self.update(|record| record.made.published = true).await?;
        }
        match publish::take_name(self.context.storage.as_ref(), copy, &self.tag().await).await? {
            Name::Ours => Ok(()),
            Name::Taken => {
                self.update(|record| record.made.published = false).await?;
                other_writer()
            }
            Name::Lost => {
                self.enter(State::Copying).await?;
                Err(Stop::Retry("the copy is gone, it is made anew".into()))
            }
        }
    }

    pub(super) async fn prepare_record(&self, mut image: Image, publication: &Publication) -> Step<Image> {
        for _ in 0..RECORD_TRIES {
            let Publication { min_disk, min_ram, properties, .. } = publication;
            let changes = image_record::prepare(&image, *min_disk, *min_ram, properties);
            if changes.is_empty() {
                return Ok(image);
            }
            self.check_cancelled()?;
            match self.change_image(&changes).await? {
                Ok(Some(changed)) => return Ok(changed),
                Ok(None) => return image_gone(),
                Err(error)
                    if matches!(error.kind(), openstack::ErrorKind::Conflict | openstack::ErrorKind::Forbidden) =>
                {
                    image = self.read_image().await?;
                    if image.status != "queued" {
                        return other_writer();
                    }
                    if error.kind() == openstack::ErrorKind::Forbidden {
                        return Err(error.into());
                    }
                }
                Err(error) => return Err(error.into()),
            }
        }
        Err(Stop::Retry("the image record changes all the time".into()))
    }

    /// Tells Glance the location and waits until the image is active.
    pub(super) async fn register(&self, image: Image, pool: &str, bytes: u64) -> Step<Image> {
        let cloud = self.context.cloud.as_ref();
        let id = self.id.to_string();
        let known: Vec<String> = cloud.image_tasks(&id).await?.into_iter().map(|task| task.id).collect();
        if image.status == "queued" {
            let url = publish::location(&self.context.storage.fsid().await?, pool, &id);
            self.before_visible_step().await?;
            let hash = self.snapshot().await.publication.sha512;
            let validation = hash.map(|value| Validation { algorithm: "sha512".into(), value });
            match cloud.add_location(&id, &url, validation.as_ref()).await? {
                // a conflict may be our own success, whose answer was lost: look
                Some(LocationAnswer::Accepted | LocationAnswer::Conflict) => {}
                None => return image_gone(),
            }
        }
        let started = Instant::now();
        let mut pause = POLL_FIRST;
        loop {
            sleep(pause).await;
            pause = (pause * 2).min(POLL_MAX);
            let image = self.read_image().await?;
            let at_work = at_work(&image);
            if at_work {
                self.progress.step();
            }
            match image.status.as_str() {
                "active" => return Ok(image),
                "queued" | "importing" => {}
                _ => return other_writer(),
            }
            if !at_work && pause >= POLL_MAX / 2 {
                self.check_tasks(&known, pool).await?;
            }
            let limit =
                if at_work { ACTIVE_WITHIN + Duration::from_secs(bytes / HASHED_PER_SECOND) } else { ACTIVE_WITHIN };
            if started.elapsed() > limit {
                return Err(Stop::Retry(format!("Glance did not make the image active within {} s", limit.as_secs())));
            }
        }
    }

    /// Whether a Glance task that is not in `known` failed. Glance then may have removed the RBD image.
    pub(super) async fn check_tasks(&self, known: &[String], pool: &str) -> Step<()> {
        let tasks = self.context.cloud.image_tasks(&self.id.to_string()).await?;
        let Some(failed) = tasks.iter().find(|task| task.status == "failure" && !known.contains(&task.id)) else {
            return Ok(());
        };
        let reason = format!("Glance refused the location: {}", failed.message);
        let published = ImageSpec::named(pool, self.id.to_string());
        if self.context.storage.image(&published, None).await?.is_none() {
            self.update(|record| record.made.published = false).await?;
            self.enter(State::Copying).await?;
        }
        Err(Stop::Retry(reason))
    }

    /// The image is active: take our mark off, and what may be left.
    pub(super) async fn finish(&self, pool: &str, image: &Image) -> Step<()> {
        self.finishing.store(true, Ordering::SeqCst);
        let id = self.id.to_string();
        let published = ImageSpec::named(pool, &id);
        if !self.snapshot().await.made.active {
            self.update(|record| record.made.active = true).await?;
        }
        self.context.storage.remove_metadata(&published, transfer::MARK).await?;
        let leftovers = image_record::clear(image);
        if !leftovers.is_empty() {
            match self.change_image(&leftovers).await? {
                Ok(_) => {}
                Err(error) if error.kind() == openstack::ErrorKind::Conflict => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

/// Whether a Glance task works on the image.
pub(super) fn at_work(image: &Image) -> bool {
    image.status == "importing" || image.properties.contains_key("os_glance_import_task")
}
