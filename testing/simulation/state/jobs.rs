//! The jobs, as they lie in their objects.

use super::cluster::{Cluster, Object};
use crate::ceph::Version;
use crate::job::record::Record;
use crate::job::signal::Signals;
use crate::job::store::{Store, Stored, Summary};

fn read(object: &Object) -> Option<Stored> {
    let record = Record::parse(&object.data).ok()?;
    let keys = object.omap.iter().map(|(key, value)| (key.clone(), value.clone())).collect();
    Some(Stored { record, signals: Signals::read(keys), version: Version(object.version) })
}

impl Cluster {
    /// A job as daemons have left it, with its index entry.
    pub fn store_job(&mut self, record: &Record) {
        let (id, data) = (record.image_id.to_string(), record.to_bytes());
        let version = self.next();
        self.objects.insert(Store::object(record.image_id), Object { data, version, ..Object::default() });
        match record.ended_at {
            Some(ended_at) => self.set_keys("index.ended", &[(id, ended_at.to_string().into_bytes())]),
            None => self.set_keys("index.live", &[(id, serde_json::to_vec(&Summary::from(record)).unwrap())]),
        }
    }

    /// The jobs' records with their signals.
    pub fn jobs(&self) -> Vec<Stored> {
        let objects = self.objects.iter().filter(|(name, _)| name.starts_with("job."));
        objects.filter_map(|(_, object)| read(object)).collect()
    }

    pub fn job_records(&self) -> Vec<Record> {
        self.jobs().into_iter().map(|stored| stored.record).collect()
    }
}
