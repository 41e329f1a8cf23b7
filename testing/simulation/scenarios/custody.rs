//! The reconciler's custody, step by step: who may remove what a job left, and when.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::sleep;
use uuid::Uuid;

use super::{run_in_virtual_time, seeded};
use crate::ceph::{self, ErrorKind, ImageSpec, Storage};
use crate::job::clock::Clock;
use crate::job::context::Context;
use crate::job::custody::{Custody, Guarded};
use crate::job::daemons::{self, DaemonEntry, HEARTBEAT};
use crate::job::lease::{Identity, Lease, fence_owner};
use crate::job::names::private_name;
use crate::job::record::{Record, State};
use crate::job::signal::Signal;
use crate::job::simulation::faults::dice::Dice;
use crate::job::simulation::faults::gate::Handle;
use crate::job::simulation::faults::node::Node;
use crate::job::simulation::faults::odds::Faults;
use crate::job::simulation::faults::world::{Shared, World};
use crate::job::simulation::state::DEPLOYMENT;
use crate::job::store::{NewJob, Store, Submitted};
use crate::publish::tag::OwnershipTag;
use crate::request::Trigger;
use crate::transfer::OWNERSHIP_TAG;

fn world() -> Shared {
    Shared(Arc::new(Mutex::new(World::new(Dice::new(1), Faults::default(), Vec::new()))))
}

/// A daemon of the world that does nothing by itself.
fn daemon(world: &Shared, name: &str) -> (Context, Arc<dyn Storage>) {
    let handle = Handle { node: Node::new(world, name.into(), true) };
    let storage: Arc<dyn Storage> = Arc::new(handle.clone());
    let clock = Clock::System;
    let (_, config) = watch::channel(Arc::new(seeded::config(&mut Dice::new(1))));
    let identity = Identity { instance: Uuid::new_v4(), host: name.into(), pid: 1 };
    let context = Context {
        refusals: Default::default(),
        storage: Arc::clone(&storage),
        clients: Arc::new(handle.clone()),
        cloud: Arc::new(handle.clone()),
        store: Store::new(Arc::new(handle), clock),
        config,
        identity,
        deployment: DEPLOYMENT,
        clock,
        rates: Arc::new(ceph::Rates::new(0, 0)),
    };
    (context, storage)
}

fn request(image_id: Uuid) -> NewJob {
    NewJob { image_id, trigger: Trigger::Request, source: None, project_id: None }
}

/// The holder of the lease ends a job.
async fn end(context: &Context, image_id: Uuid) {
    let objects = context.store.objects().as_ref();
    let duration = context.config.borrow().jobs.lease;
    let lease = Lease::take(objects, image_id, &context.identity, duration).await.unwrap().unwrap();
    let mut stored = context.store.load(image_id).await.unwrap().unwrap();
    stored.record.enter(State::Failed, context.clock.now()).unwrap();
    context.store.write(&stored, lease.key(), &[]).await.unwrap();
    lease.release(objects).await;
}

/// A private copy as a daemon could have left it.
fn leave_copy(world: &Shared, image_id: Uuid) -> ImageSpec {
    let name = private_name(image_id);
    let tag = OwnershipTag::new(image_id, Uuid::new_v4(), DEPLOYMENT).to_string();
    let mut world = world.lock();
    world.ceph.create("images", &name, 1, true).metadata.insert(OWNERSHIP_TAG.into(), tag);
    ImageSpec::named("images", name)
}

#[test]
fn a_frozen_reconciler_is_fenced_by_the_job_that_comes_after_it() {
    run_in_virtual_time(async {
        let (world, image_id) = (world(), Uuid::new_v4());
        let copy = leave_copy(&world, image_id);
        let ((frozen, storage), (other, other_storage)) = (daemon(&world, "frozen"), daemon(&world, "other"));
        let custody = Custody::take(&frozen, &storage, image_id).await.unwrap().expect("no daemon works on it");

        // a new request meets the placeholder, and waits for the lease
        assert_eq!(other.store.submit(&request(image_id)).await.unwrap(), Submitted::Rerequested);
        let lease = other.config.borrow().jobs.lease;
        let objects = other.store.objects().as_ref();
        assert!(Lease::take(objects, image_id, &other.identity, lease).await.unwrap().is_none());
        sleep(lease + Duration::from_secs(1)).await;
        Lease::take(objects, image_id, &other.identity, lease).await.unwrap().expect("it ran out");
        let record = other.store.load(image_id).await.unwrap().unwrap().record;
        let own = other_storage.address().await.unwrap();
        assert!(fence_owner(other_storage.as_ref(), &record, &own).await.unwrap());

        // the reconciler goes on where it stood
        assert_eq!(storage.remove_image(&copy).await.unwrap_err().kind(), ErrorKind::Fenced);
        custody.release(false).await;
        assert!(other_storage.image(&copy, None).await.unwrap().is_some());
    });
}

#[test]
fn nothing_is_begun_under_a_lease_that_has_run_out() {
    run_in_virtual_time(async {
        let (world, image_id) = (world(), Uuid::new_v4());
        let (context, storage) = daemon(&world, "one");
        let custody = Custody::take(&context, &storage, image_id).await.unwrap().unwrap();
        let lease = context.config.borrow().jobs.lease;
        sleep(lease + Duration::from_secs(1)).await;
        let mut begun = false;
        let work = async {
            begun = true;
            Ok::<_, ceph::Error>(())
        };
        assert!(matches!(custody.guard(work).await, Err(Guarded::Lost(_))));
        assert!(!begun);
    });
}

#[test]
fn custody_leaves_no_record_and_no_owner() {
    run_in_virtual_time(async {
        let (world, without, ended) = (world(), Uuid::new_v4(), Uuid::new_v4());
        let (context, storage) = daemon(&world, "one");
        let store = &context.store;
        store.submit(&request(ended)).await.unwrap();
        assert!(Custody::take(&context, &storage, ended).await.unwrap().is_none(), "a live job is left alone");
        end(&context, ended).await;
        let own = storage.address().await.unwrap();
        for image_id in [without, ended] {
            let custody = Custody::take(&context, &storage, image_id).await.unwrap().unwrap();
            let record = store.load(image_id).await.unwrap().unwrap().record;
            assert_eq!(record.owner_address.as_ref(), Some(&own));
            assert!(Custody::take(&context, &storage, image_id).await.unwrap().is_none(), "one at a time");
            custody.release(false).await;
            assert!(!Lease::is_held(store.objects().as_ref(), image_id).await.unwrap());
        }
        assert_eq!(store.load(without).await.unwrap(), None);
        assert!(!store.ended().await.unwrap().iter().any(|(id, _)| *id == without));
        let record = store.load(ended).await.unwrap().unwrap().record;
        assert_eq!((record.state, record.owner, record.owner_address), (State::Failed, None, None));
        assert!(world.lock().ceph.blocklist.is_empty(), "no daemon was fenced");
    });
}

#[test]
fn a_request_that_comes_meanwhile_keeps_its_record() {
    run_in_virtual_time(async {
        let (world, image_id) = (world(), Uuid::new_v4());
        let (context, storage) = daemon(&world, "one");
        let custody = Custody::take(&context, &storage, image_id).await.unwrap().unwrap();
        assert_eq!(context.store.submit(&request(image_id)).await.unwrap(), Submitted::Rerequested);
        let offer = NewJob { trigger: Trigger::VolumeUpload, ..request(image_id) };
        assert!(context.store.submit(&offer).await.is_err(), "an offer is delivered again");
        custody.release(false).await;
        let stored = context.store.load(image_id).await.unwrap().unwrap();
        assert!(stored.signals.has(Signal::Rerequested) && stored.record.owner_address.is_none());
        assert!(context.store.live().await.unwrap().iter().any(|(id, _)| *id == image_id));
    });
}

#[test]
fn an_owner_that_cannot_be_fenced_stays() {
    run_in_virtual_time(async {
        let (world, image_id) = (world(), Uuid::new_v4());
        let (context, storage) = daemon(&world, "one");
        let mut record = Record::placeholder(image_id, context.clock.now());
        record.owner = Some("host:1:another".into());
        context.store.create_ended(&record).await.unwrap();
        let error = Custody::take(&context, &storage, image_id).await.err().expect("its address is not known");
        assert!(error.to_string().contains("host:1:another"), "{error}");
        assert_eq!(context.store.load(image_id).await.unwrap().unwrap().record.owner, record.owner);
        assert!(!Lease::is_held(context.store.objects().as_ref(), image_id).await.unwrap());
    });
}

#[test]
fn a_dead_daemons_entry_expires_and_is_removed() {
    run_in_virtual_time(async {
        let world = world();
        let ((one, _), (other, _)) = (daemon(&world, "one"), daemon(&world, "other"));
        let objects = one.store.objects().as_ref();
        let beat = async |context: &Context, backends: &[&str]| {
            let mut entry = DaemonEntry::of(&context.config.borrow().clone(), &context.identity);
            entry.backends = backends.iter().map(|name| (*name).to_owned()).collect();
            daemons::send_heartbeat(context.store.objects().as_ref(), &context.identity, &entry).await.unwrap();
        };
        let now = || one.clock.now();
        let found_at =
            async |backend, now| daemons::with_backend(objects, one.identity.instance, backend, now).await.unwrap();
        let found = async |backend| found_at(backend, now()).await;
        assert_eq!(found("ssd").await, None, "no daemon has written its backends yet");
        beat(&one, &["ceph", "ssd"]).await;
        beat(&other, &["hdd"]).await;
        assert_eq!((found("ssd").await, found("hdd").await), (None, Some(other.identity.owner())));
        // a configuration that was read again
        beat(&other, &["ssd"]).await;
        assert_eq!((found("ssd").await, found("hdd").await), (Some(other.identity.owner()), None));
        for _ in 0..6 {
            sleep(HEARTBEAT).await;
            beat(&one, &["ceph"]).await;
        }
        assert_eq!(found("ssd").await, None, "it has said nothing for six heartbeats");
        assert_eq!(daemons::remove_dead(objects, now()).await.unwrap(), 1);
        assert_eq!(daemons::remove_dead(objects, now()).await.unwrap(), 0, "the one that lives stays");
        let left = |name: &str| world.lock().ceph.objects.keys().filter(|object| object.starts_with(name)).count();
        assert_eq!((left("daemon."), left("daemons")), (1, 1));
        // it only was frozen
        beat(&other, &["ssd"]).await;
        assert_eq!(found("ssd").await, Some(other.identity.owner()));
        // it stops, and may be about to start again
        let mut entry = DaemonEntry::of(&other.config.borrow().clone(), &other.identity);
        entry.backends = ["ssd".to_owned()].into();
        daemons::leave(other.store.objects().as_ref(), &other.identity, entry, now()).await.unwrap();
        assert_eq!(left("daemon."), 1, "nothing but the entry is left of it");
        assert_eq!(daemons::remove_dead(objects, now()).await.unwrap(), 0);
        assert_eq!(found("ssd").await, Some(other.identity.owner()));
        beat(&one, &["ceph"]).await;
        let later = now().checked_add(6 * HEARTBEAT).unwrap();
        assert_eq!(found_at("ssd", later).await, None);
        assert_eq!(daemons::remove_dead(objects, later).await.unwrap(), 1);
    });
}
