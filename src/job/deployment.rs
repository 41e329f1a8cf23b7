//! The deployment: all daemons that share one jobs namespace, and the cloud that they serve.
//!
//! Several deployments may share the pools of a Ceph cluster. Two objects of the jobs namespace say who this one is:
//! `deployment` holds its id, made once, which stands in every [ownership tag](crate::publish::tag); `cloud` says which
//! cloud the jobs belong to, since two clouds that share one namespace would end each other's jobs.

use uuid::Uuid;

use crate::ceph::{self, Error, ErrorKind, Objects};

/// The object that holds the deployment's id.
const DEPLOYMENT: &str = "deployment";

/// The deployment's id. The first daemon of a namespace makes it; nothing ever changes it.
///
/// # Errors
/// [`ErrorKind::Unsupported`] when the object holds no id: then it was damaged, or another program uses the namespace.
pub async fn id(objects: &dyn Objects) -> ceph::Result<Uuid> {
    let operation = format!("read the object {DEPLOYMENT} of the jobs namespace");
    let stored = match objects.read(DEPLOYMENT).await? {
        Some((stored, _)) => stored,
        None => {
            match objects.create(DEPLOYMENT, Uuid::new_v4().to_string().as_bytes()).await {
                Ok(_) => {}
                // another daemon was faster
                Err(error) if error.kind() == ErrorKind::Exists => {}
                Err(error) => return Err(error),
            }
            let read = objects.read(DEPLOYMENT).await?;
            read.ok_or_else(|| Error::new(&operation, ErrorKind::NotFound, "it was removed a moment ago"))?.0
        }
    };
    let id = std::str::from_utf8(&stored).ok().and_then(|text| Uuid::try_parse(text.trim()).ok());
    id.ok_or_else(|| Error::new(operation, ErrorKind::Unsupported, "it holds no UUID"))
}
