//! `cancel`: asks the daemon that works on a job to stop it and to remove what it made.

use std::path::Path;
use std::process::ExitCode;

use uuid::Uuid;

use super::setup::{connect_store, image_id, no_such_job};
use super::{Failure, output};
use crate::job::record::State;
use crate::job::store::Cancelled;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Id of the image that the job makes.
    #[arg(value_parser = image_id)]
    image: Uuid,
}

pub async fn cancel(config: &Path, args: Args) -> Result<ExitCode, Failure> {
    let store = connect_store(config).await?;
    let image = args.image;
    let said = match store.cancel(image).await?.ok_or_else(|| no_such_job(image))? {
        Cancelled::Signalled => format!(
            "the job of image {image} is to be cancelled: a daemon stops it within seconds and removes what it made; the \
             image record stays queued"
        ),
        Cancelled::Active => {
            let text = format!(
                "image {image} is active, and depends on its source until the job has ended: the job only goes forward. \
                 Delete the image to end both"
            );
            return Err(Failure::new(Failure::UNAVAILABLE, text));
        }
        Cancelled::Ended(State::Done) => {
            let text = format!("the job of image {image} has ended: the image is done; delete it to undo that");
            return Err(Failure::new(Failure::UNAVAILABLE, text));
        }
        Cancelled::Ended(state) => format!("the job of image {image} had ended before: {state}; nothing was changed"),
    };
    output::print(&format!("{said}\n")).map(|_| ExitCode::SUCCESS)
}
