//! `retry`: starts an ended job again. The record holds the source, so the image's id is enough.

use std::path::Path;
use std::process::ExitCode;

use uuid::Uuid;

use super::setup::{connect_store, image_id, no_such_job};
use super::{Failure, output};
use crate::job::store::Retried;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Id of the image that the job makes.
    #[arg(value_parser = image_id)]
    image: Uuid,
}

pub async fn retry(config: &Path, args: Args) -> Result<ExitCode, Failure> {
    let store = connect_store(config).await?;
    let image = args.image;
    let said = match store.retry(image).await?.ok_or_else(|| no_such_job(image))? {
        Retried::Restarted => {
            format!(
                "the job of image {image} starts again, as soon as a daemon has room for it: `rbd-offload show {image}`"
            )
        }
        Retried::StillRunning => {
            format!("the job of image {image} has not ended; if it was waiting to retry, it retries now")
        }
        Retried::AlreadyDone => {
            return Err(Failure::new(
                Failure::UNAVAILABLE,
                format!("image {image} is done: there is nothing to retry"),
            ));
        }
        Retried::OwnedByService => {
            return Err(Failure::new(
                Failure::UNAVAILABLE,
                format!(
                    "the job of image {image} was handed over by Cinder or Nova, which fell back to the native path \
                     when the job ended: it cannot be retried"
                ),
            ));
        }
    };
    output::print(&format!("{said}\n")).map(|_| ExitCode::SUCCESS)
}
