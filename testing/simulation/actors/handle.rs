//! How a daemon reaches the cluster and the services: every call goes through the gate, and is watched.

use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::ceph::{self, Error, ErrorKind, ImageSpec, Progress, Result};
use crate::job::simulation::faults::gate::{Handle, Kind};
use crate::job::simulation::faults::trouble::Trouble;
use crate::job::simulation::faults::world::World;
use crate::job::simulation::invariants::{promises, readers};
use crate::openstack;

/// How long the cluster takes a client for alive that says nothing more.
const WATCH_TIMEOUT: Duration = Duration::from_secs(30);

/// What a call does, and then what clients would read.
fn watched<T>(effect: impl FnOnce(&mut World) -> T) -> impl FnOnce(&mut World) -> T {
    |world: &mut World| {
        let result = effect(world);
        readers::watch(world);
        result
    }
}

impl Handle {
    pub async fn ceph<T>(
        &self,
        kind: Kind,
        what: impl Fn() -> String,
        effect: impl FnOnce(&mut World) -> ceph::Result<T>,
    ) -> ceph::Result<T> {
        let address = self.node.address();
        if self.node.is_fenced() {
            tokio::task::yield_now().await;
            return Err(ceph::Error::new(what(), ceph::ErrorKind::Fenced, "fenced"));
        }
        let node = &self.node;
        let shown = &what;
        let (is_broken, is_stuck) = {
            let world = self.world().lock();
            let has = |words: &Option<String>| words.as_ref().is_some_and(|words| shown().contains(words));
            (has(&world.broken), has(&world.stuck))
        };
        if is_stuck {
            std::future::pending::<()>().await;
        }
        self.gate(
            kind,
            true,
            shown,
            watched(|world| {
                if world.ceph.blocklist.contains(&address) {
                    node.was_fenced(&address);
                    return Err(ceph::Error::new(shown(), ceph::ErrorKind::Fenced, "fenced"));
                }
                if is_broken {
                    return Err(ceph::Error::new(shown(), ceph::ErrorKind::Other, "this object is broken"));
                }
                effect(world)
            }),
        )
        .await
    }

    /// A long call: `steps` times a while, in which the client may be fenced, frozen or told to stop.
    pub async fn long(
        &self,
        what: &str,
        id: &str,
        progress: &Progress,
        cancel: &CancellationToken,
        writes_while_running: bool,
    ) -> Result<()> {
        let (steps, background) = {
            let mut world = self.world().lock();
            (1 + world.dice.below(6), world.dice.percent(40))
        };
        let address = self.node.address();
        let mut pause = {
            let mut world = self.world().lock();
            let longest = if world.dice.percent(20) { 8_000 } else { 1_500 };
            world.dice.millis(20, longest)
        };
        for step in 0..=steps {
            tokio::select! {
                biased;
                () = cancel.cancelled() => {
                    if background {
                        pause = pause.min(Duration::from_secs(3));
                        let world = self.world().clone();
                        let (id, address) = (id.to_owned(), address.clone());
                        tokio::spawn(async move {
                            tokio::time::sleep(pause).await;
                            world.lock().ceph.unwatch(&id, &address);
                        });
                    } else {
                        self.world().lock().ceph.unwatch(id, &address);
                    }
                    return Err(Error::new(what, ErrorKind::Cancelled, "stopped"));
                }
                () = tokio::time::sleep(pause) => {}
            }
            self.node.pass().await;
            let mut world = self.world().lock();
            if world.ceph.blocklist.contains(&address) {
                self.node.was_fenced(&address);
                return Err(Error::new(what, ErrorKind::Fenced, "fenced"));
            }
            if world.ceph.by_id(id).is_none() {
                if writes_while_running {
                    readers::wrote_into_nothing(&mut world, what);
                }
                return Err(Error::new(what, ErrorKind::NotFound, "the image is gone"));
            }
            world.ceph.watch(id, &address, Instant::now() + WATCH_TIMEOUT);
            progress.set_total(steps << 20);
            progress.set_done(step << 20);
        }
        Ok(())
    }

    /// Between two operations of one librbd call: the client dies, or one of them fails.
    pub async fn break_off(&self) -> Result<()> {
        let roll = {
            let mut world = self.world().lock();
            if !world.has(Trouble::HalfDone) || world.faults.calm {
                return Ok(());
            }
            world.dice.below(20)
        };
        match roll {
            0 | 1 => {
                self.node.kill();
                std::future::pending().await
            }
            2 => Err(Error::new("a part of a call", ErrorKind::Other, "it broke off")),
            _ => Ok(()),
        }
    }

    /// A pool of many images takes its time.
    pub async fn list_slowly(&self) {
        let time = {
            let mut world = self.world().lock();
            if !world.has(Trouble::SlowLists) {
                return;
            }
            world.dice.millis(20_000, 100_000)
        };
        tokio::time::sleep(time).await;
    }

    pub async fn open(&self, what: &str, image: &ImageSpec) -> Result<String> {
        let address = self.node.address();
        self.ceph(
            Kind::Write,
            || format!("open for {what} {image}"),
            |world| {
                let id = world.ceph.find_id(what, image)?;
                promises::must_be_ours(world, what, &id);
                world.ceph.watch(&id, &address, Instant::now() + WATCH_TIMEOUT);
                self.opened(world, &id);
                Ok(id)
            },
        )
        .await
    }

    /// A call opened the image for writing. If the daemon is dead by now, its connection ended before the request was
    /// carried out.
    pub fn opened(&self, world: &mut World, id: &str) {
        if self.node.is_dead() {
            world.ceph.leave_dead_watch(id, &self.node.address(), Instant::now() + WATCH_TIMEOUT);
        }
    }

    /// The daemon is about to change an image's record.
    pub fn check_lease(&self, id: &str) {
        let address = self.node.address();
        promises::must_hold_lease(&mut self.world().lock(), &self.node.name, address, id);
    }

    pub async fn glance<T>(
        &self,
        kind: Kind,
        what: impl Fn() -> String,
        effect: impl FnOnce(&mut World) -> openstack::Result<T>,
    ) -> openstack::Result<T> {
        self.service(true, kind, what, effect).await
    }

    pub async fn service<T>(
        &self,
        glance: bool,
        kind: Kind,
        what: impl Fn() -> String,
        effect: impl FnOnce(&mut World) -> openstack::Result<T>,
    ) -> openstack::Result<T> {
        let shown = &what;
        self.gate(
            kind,
            false,
            shown,
            watched(|world| {
                if world.cloud.away(glance) {
                    return Err(openstack::Error::new(shown(), openstack::ErrorKind::Unavailable, "503"));
                }
                effect(world)
            }),
        )
        .await
    }
}
