//! What every published image must be: indistinguishable from what Glance's own driver leaves, with the source's bytes.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::cloud::Account;
use super::disk::{self, Digest, Disk};
use super::lab;

/// RBD features: layering, exclusive-lock, object-map, fast-diff, deep-flatten.
const FEATURES: u64 = 1 | 4 | 8 | 16 | 32;

/// Of an image whose data lies in another pool.
const DATA_POOL: u64 = 128;

/// This image is active, whole, and as it should be.
pub async fn is_right(image: &Value, expected: &Digest, min_disk: u64) {
    are_right(&[(image, expected)], min_disk).await;
}

/// Each of these images is.
pub async fn are_right(images: &[(&Value, &Digest)], min_disk: u64) {
    let ids: Vec<&str> = images.iter().map(|(image, _)| image["id"].as_str().unwrap()).collect();
    let disks: Vec<Disk> = ids.iter().map(|id| Disk::of_image(id)).collect();
    let places: Vec<_> = disks.iter().flat_map(|disk| [(disk.clone(), None), (disk.clone(), Some("snap"))]).collect();
    let (digests, facts) = (disk::digests(&places).await, disk::facts(&disks).await);
    let service = Account::service().await;
    for (n, (image, expected)) in images.iter().enumerate() {
        let id = ids[n];
        assert_eq!(digests[2 * n], **expected, "bytes of image {id}");
        assert_eq!(digests[2 * n + 1], **expected, "bytes of the snapshot of image {id}");

        assert_eq!(image["status"], "active", "{image:#}");
        assert_eq!((&image["disk_format"], &image["container_format"]), (&json!("raw"), &json!("bare")));
        assert_eq!(image["min_disk"], min_disk);
        assert_eq!(image["size"], expected.size);
        let ours: Vec<_> = image.as_object().unwrap().keys().filter(|key| key.starts_with("rbd_offload_")).collect();
        assert!(ours.is_empty(), "left on the record: {ours:?}");
        let tags = image["tags"].as_array().unwrap();
        assert!(tags.iter().any(|tag| tag.as_str().unwrap().starts_with("rbd-offload:")), "provenance: {tags:?}");
        assert_eq!(service.locations(id).await, [format!("rbd://{}/images/{id}/snap", lab().fsid)]);

        let facts = facts[n].as_ref().unwrap();
        assert_eq!(facts.features, FEATURES | facts.data_pool.as_ref().map_or(0, |_| DATA_POOL));
        assert_eq!(facts.flags, 0, "the object map is invalid");
        assert_eq!(facts.parent, None);
        assert_eq!(facts.snapshots, BTreeMap::from([("snap".to_owned(), true)]));
        let said = lab().ceph("rbd", &["object-map", "check", "--no-progress", &format!("images/{id}@snap")]).await;
        assert_eq!(said, "", "object map");
    }
}
