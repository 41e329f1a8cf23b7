//! What Glance's cephx user may do. By the manual's capabilities it may not read the pools of the volumes.

use super::lab;

/// What the lab gives it, and what publishing at once needs beside that.
const USUAL: &str = "profile rbd pool=images, profile rbd pool=ecdata";
const READS_VOLUMES: &str = "profile rbd-read-only pool=volumes, profile rbd-read-only pool=volumes2";

/// While it lives, Glance's user may read the pools of the volumes. Glance connects to Ceph for each image.
pub struct Reader(());

impl Reader {
    pub async fn new() -> Self {
        set(&format!("{USUAL}, {READS_VOLUMES}")).await;
        Self(())
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        tokio::task::block_in_place(|| tokio::runtime::Handle::current().block_on(set(USUAL)));
    }
}

/// By the manual's capabilities, whatever a test before has left.
pub async fn may_not_read_volumes() {
    set(USUAL).await;
}

async fn set(osd: &str) {
    let caps = ["auth", "caps", "client.glance", "mon", "profile rbd", "mgr", "profile rbd", "osd", osd];
    lab().ceph("ceph", &caps).await;
}
