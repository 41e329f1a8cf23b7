//! From a sealed copy to an active image.

use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::{Job, Step, Stop, end, image_gone, other_writer};
use crate::ceph::ImageSpec;
use crate::job::record::{Ending, Handover, Publication, State};
use crate::openstack::{self, Image, LocationAnswer, Validation};
use crate::plan;
use crate::publish::record as image_record;
use crate::publish::tag::is_tagged;
use crate::publish::{self, Name};
use crate::request::Trigger;
use crate::transfer;

/// How long Glance may take to make a registered image active, beside the time for reading it where it does that first.
const ACTIVE_WITHIN: Duration = Duration::from_secs(60);

/// Bytes a second that Glance is trusted to hash at least (measured: 170 MiB/s and more).
pub(super) const HASHED_PER_SECOND: u64 = 20 << 20;

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
        // nothing more is copied into the pool
        self.slot.lock().await.take();
        let record = self.snapshot().await;
        let Some(pool) = record.dest_pool.clone() else {
            return Err(Stop::Abandon("its record names no destination pool".into()));
        };
        let copy = ImageSpec::named(&pool, record.private_name());

        let mut image = self.read_image().await?;
        match image.status.as_str() {
            "active" | "deactivated" if self.is_our_image(&image).await? => return self.finish(&pool, &image).await,
            // a task that is at work before we posted anything is another writer's import
            "queued" if record.made.posted || !at_work(&image) => {}
            // our own location, or that of a daemon before
            "importing" if record.made.posted => {}
            _ => return other_writer(),
        }
        if record.handover == Some(Handover::Offered) {
            self.waits.store(true, Ordering::SeqCst);
            image = self.stage("handover", self.await_go(image)).await?;
            self.waits.store(false, Ordering::SeqCst);
        }
        if image.status == "queued" && !at_work(&image) {
            self.check_request(&image).await?;
        }
        self.stage("rename", self.take_name(&copy)).await?;
        let known: Vec<String> = self.tasks().await?.into_iter().map(|task| task.id).collect();
        let posts = image.status == "queued" && !(record.made.posted && at_work(&image));
        if posts {
            image = self.stage("record", self.prepare_record(image, &record.publication)).await?;
        }
        let registered = async {
            // a task that was there before our first POST is another writer's
            let foreign = if record.made.posted { &[][..] } else { &known[..] };
            if posts {
                self.post_location(&image, &pool).await?;
            }
            self.await_active(&known, foreign, &pool, record.bytes_total).await
        };
        self.waits.store(true, Ordering::SeqCst);
        let image = self.stage("register", registered).await?;
        self.waits.store(false, Ordering::SeqCst);
        if !self.is_our_image(&image).await? {
            return other_writer();
        }
        self.finish(&pool, &image).await
    }

    pub(super) async fn read_image(&self) -> Step<Image> {
        Ok(plan::read_image(self.context.cloud.as_ref(), self.id).await?)
    }

    async fn tasks(&self) -> Step<Vec<openstack::ImageTask>> {
        Ok(self.context.cloud.image_tasks(&self.id.to_string()).await?)
    }

    /// Whether an active image is active by what we published. The RBD image of its name bears our mark, and is the
    /// location: with a second store, an upload or an import may have been faster. Where Glance shows the locations to
    /// nobody here, the size has to do. Once the mark is coming off, the job's record knows.
    pub(super) async fn is_our_image(&self, image: &Image) -> Step<bool> {
        let record = self.snapshot().await;
        if !record.made.published || record.made.active {
            return Ok(record.made.active);
        }
        let Some(pool) = &record.dest_pool else { return Ok(false) };
        let (storage, id) = (self.context.storage.as_ref(), self.id.to_string());
        if !is_tagged(storage, &ImageSpec::named(pool, &id), &self.tag().await).await? {
            return Ok(false);
        }
        let ours = publish::location(&storage.fsid().await?, pool, &id);
        Ok(match self.context.cloud.image_locations(&id).await? {
            Some(locations) => locations.iter().any(|url| publish::is_location(url, &ours)),
            None => image.size == Some(record.bytes_total),
        })
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
            let mut changes = image_record::prepare(&image, *min_disk, *min_ram, properties);
            if changes.is_empty() {
                // what is judged before the location is posted must be of now
                image = self.read_image().await?;
                changes = image_record::prepare(&image, *min_disk, *min_ram, properties);
            }
            if image.status != "queued" || changes.is_empty() {
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

    /// Tells Glance the location. `image` is the record as Glance answered it last: whatever was changed since the plan
    /// shows there.
    async fn post_location(&self, image: &Image, pool: &str) -> Step<()> {
        if image.status != "queued" {
            return other_writer();
        }
        self.check_request(image).await?;
        plan::check_record(image)?;
        let id = self.id.to_string();
        let url = publish::location(&self.context.storage.fsid().await?, pool, &id);
        self.before_visible_step().await?;
        let before = self.snapshot().await;
        if !before.made.posted {
            self.update(|record| record.made.posted = true).await?;
        }
        let validation = before.publication.sha512.map(|value| Validation { algorithm: "sha512".into(), value });
        match self.context.cloud.add_location(&id, &url, validation.as_ref()).await? {
            Some(LocationAnswer::Accepted) => Ok(()),
            // it may be our own success, whose answer was lost: look
            Some(LocationAnswer::Conflict) if before.made.posted => Ok(()),
            Some(LocationAnswer::Conflict) => {
                self.update(|record| record.made.posted = false).await?;
                other_writer()
            }
            None => image_gone(),
        }
    }

    /// Waits until the image is active. `foreign`: tasks that cannot be ours.
    async fn await_active(&self, known: &[String], foreign: &[String], pool: &str, bytes: u64) -> Step<Image> {
        let started = Instant::now();
        let mut pause = POLL_FIRST;
        loop {
            tokio::select! {
                () = sleep(pause) => {}
                () = self.cancel.cancelled() => {}
            }
            self.check_cancelled()?;
            pause = (pause * 2).min(POLL_MAX);
            let image = self.read_image().await?;
            let at_work = at_work(&image);
            if at_work {
                self.progress.step();
            }
            match image.status.as_str() {
                "active" | "deactivated" => return Ok(image),
                "queued" | "importing" if !task_of(&image).is_some_and(|task| foreign.contains(task)) => {}
                _ => return other_writer(),
            }
            if !at_work && pause >= POLL_MAX / 2 {
                self.check_tasks(known, pool).await?;
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
        let tasks = self.tasks().await?;
        let Some(failed) = tasks.iter().find(|task| task.status == "failure" && !known.contains(&task.id)) else {
            return Ok(());
        };
        let reason = format!("Glance refused the location: {}", failed.message);
        let published = ImageSpec::named(pool, self.id.to_string());
        if self.context.storage.image(&published, None).await?.is_none() {
            self.update(|record| record.made.published = false).await?;
            self.enter(State::Copying).await?;
        }
        self.update(|record| record.made.posted = false).await?;
        Err(Stop::Retry(reason))
    }

    /// The image is active by our location: take our mark off, and what may be left. An image whose formats were changed
    /// after the inspection is an end of another kind.
    pub(super) async fn finish(&self, pool: &str, image: &Image) -> Step<()> {
        if !image_record::is_raw_and_bare(image) {
            return end(State::Failed, wrong_format(image));
        }
        self.finishing.store(true, Ordering::SeqCst);
        self.take_mark_off(pool).await?;
        let record = self.snapshot().await;
        let source = record.source.filter(|_| record.trigger == Trigger::Request);
        let leftovers = image_record::finished(image, source);
        if !leftovers.is_empty() {
            // a task that hashes the image writes the record at its end as it was at its beginning
            if !record.mend {
                self.update(|record| record.mend = true).await?;
            }
            match self.change_image(&leftovers).await? {
                Ok(_) => {}
                Err(error) if error.kind() == openstack::ErrorKind::Conflict => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    async fn take_mark_off(&self, pool: &str) -> Step<()> {
        if !self.snapshot().await.made.active {
            self.update(|record| record.made.active = true).await?;
        }
        let published = ImageSpec::named(pool, self.id.to_string());
        self.context.storage.remove_metadata(&published, transfer::MARK).await?;
        Ok(())
    }

    /// The image is active by our location under a format that nobody inspected it for. Nobody is to read it. Its data
    /// stay, since they are an image's.
    pub(super) async fn deactivate(&self, pool: &str, image: &Image) -> Step<Ending> {
        let ending = Ending::new(State::Failed, wrong_format(image));
        let id = self.id.to_string();
        let before = self.snapshot().await;
        if before.ending.as_ref() != Some(&ending) || !before.deactivated {
            self.update(|record| {
                record.ending = Some(ending.clone());
                // Glance may save what it read before, long after the end
                (record.deactivated, record.mend) = (true, true);
            })
            .await?;
        }
        if image.status == "active" {
            self.lease.renew(self.context.store.objects().as_ref()).await?;
            if !self.context.cloud.deactivate_image(&id).await? {
                return image_gone();
            }
            metrics::counter!("rbd_offload_images_deactivated_total").increment(1);
            tracing::error!(image_id = %self.id, job_stage = "register", disk_format = image.disk_format,
                container_format = image.container_format,
                "the image was deactivated: its format was changed while it was published");
        }
        self.take_mark_off(pool).await?;
        // the task that hashes the image makes it active again at its end
        let now = self.read_image().await?;
        if now.status != "deactivated" || (at_work(&now) && before.attempts < self.glance_patience(&before)) {
            return Err(Stop::Retry("the image is deactivated; Glance still works on it".into()));
        }
        Ok(ending)
    }
}

fn wrong_format(image: &Image) -> String {
    let format = |format: &Option<String>| format.clone().unwrap_or_else(|| "unset".into());
    format!(
        "the image became active as {}/{}, not raw/bare: its format was changed after the inspection of its header. It was \
         deactivated; see who changed it, then delete it",
        format(&image.disk_format),
        format(&image.container_format)
    )
}

/// The Glance task that works on the image.
fn task_of(image: &Image) -> Option<&String> {
    image.properties.get("os_glance_import_task")
}

/// Whether a Glance task works on the image.
pub(super) fn at_work(image: &Image) -> bool {
    image.status == "importing" || task_of(image).is_some()
}
