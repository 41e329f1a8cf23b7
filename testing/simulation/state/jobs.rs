//! The jobs, as they lie in their objects.

use super::cluster::{Cluster, Object};
use crate::ceph::Version;
use crate::job::record::Record;
use crate::job::signal::Signals;
use crate::job::store::Stored;

fn read(object: &Object) -> Option<Stored> {
    let record = Record::parse(&object.data).ok()?;
    let keys = object.omap.iter().map(|(key, value)| (key.clone(), value.clone())).collect();
    Some(Stored { record, signals: Signals::read(keys), version: Version(object.version) })
}

impl Cluster {
    /// The jobs' records with their signals.
    pub fn jobs(&self) -> Vec<Stored> {
        let objects = self.objects.iter().filter(|(name, _)| name.starts_with("job."));
        objects.filter_map(|(_, object)| read(object)).collect()
    }

    pub fn job_records(&self) -> Vec<Record> {
        self.jobs().into_iter().map(|stored| stored.record).collect()
    }
}
