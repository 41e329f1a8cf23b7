//! The deployment: all daemons that share one jobs namespace, and the cloud that they serve.
//!
//! Several deployments may share the pools of a Ceph cluster. Two objects of the jobs namespace say who this one is:
//! `deployment` holds its id, made once, which stands in every [ownership tag](crate::publish::tag); `cloud` says which
//! cloud the jobs belong to, since two clouds that share one namespace would end each other's jobs.

use uuid::Uuid;

use crate::ceph::{self, Error, ErrorKind, Objects};
use crate::openstack::CloudId;

/// The object that holds the deployment's id.
const DEPLOYMENT: &str = "deployment";

/// The object that says which cloud the jobs belong to.
const CLOUD: &str = "cloud";

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

/// The cloud that the jobs of the namespace belong to; `None` before the first daemon of it has logged in.
///
/// # Errors
/// [`ErrorKind::Unsupported`] when the object cannot be read.
pub async fn cloud(objects: &dyn Objects) -> ceph::Result<Option<CloudId>> {
    let Some((stored, _)) = objects.read(CLOUD).await? else { return Ok(None) };
    serde_json::from_slice(&stored).map(Some).map_err(|error| {
        let operation = format!("read the object {CLOUD} of the jobs namespace");
        Error::new(operation, ErrorKind::Unsupported, error.to_string())
    })
}

/// Says that the jobs belong to `own`, if nothing was said yet.
///
/// # Errors
/// [`ClaimError::Another`] when they belong to another cloud.
pub async fn claim(objects: &dyn Objects, own: &CloudId) -> Result<(), ClaimError> {
    let stored = match cloud(objects).await? {
        Some(stored) => stored,
        None => {
            // a struct of two texts: serialising it cannot fail
            match objects.create(CLOUD, &serde_json::to_vec(own).unwrap_or_default()).await {
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::Exists => {}
                Err(error) => return Err(error.into()),
            }
            cloud(objects).await?.unwrap_or_else(|| own.clone())
        }
    };
    if stored == *own { Ok(()) } else { Err(ClaimError::Another { stored, own: own.clone() }) }
}

/// Why a namespace's jobs are not this cloud's.
#[derive(Debug, thiserror::Error)]
pub enum ClaimError {
    #[error(transparent)]
    Ceph(#[from] ceph::Error),
    #[error("the jobs belong to another cloud ({stored}; this one is {own})")]
    Another { stored: CloudId, own: CloudId },
}

/// What to do when a namespace belongs to another cloud.
pub fn remedy(pool: &str, namespace: &str) -> String {
    format!(
        "give each cloud a [jobs] namespace of its own, the same for all its daemons. If it is this cloud, and its \
         service project or region was made again: stop its daemons, `rados -p {pool} -N {namespace} rm {CLOUD}`, and \
         start them"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stored_cloud_is_read_again() {
        let cloud = CloudId { project_id: "p".into(), region: Some("r".into()) };
        let stored = serde_json::to_vec(&cloud).unwrap();
        assert_eq!(serde_json::from_slice::<CloudId>(&stored).unwrap(), cloud);
        assert_eq!(cloud.to_string(), "service project p, region r");
        assert!(serde_json::from_slice::<CloudId>(b"{}").is_err());
    }
}
