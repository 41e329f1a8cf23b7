//! A copy that differs from its source.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::time::sleep;

use super::one_image::OneImage;
use super::run_in_virtual_time;
use crate::job::record::State;
use crate::transfer::Method;

/// Spoils the copy before each of the first so many comparisons, and notes the extent of each.
fn spoil(stage: &OneImage, copies: usize) -> Arc<Mutex<Vec<String>>> {
    let seen: Arc<Mutex<Vec<String>>> = Arc::default();
    let (name, noted, count) = (format!("rbd-offload.{}", stage.image), Arc::clone(&seen), AtomicUsize::new(0));
    stage.world.lock().script = Some(Box::new(move |world, call| {
        let Some(extent) = call.strip_prefix("compare ") else { return };
        noted.lock().unwrap().push(extent.split(' ').next().unwrap().to_owned());
        if count.fetch_add(1, Ordering::SeqCst) < copies
            && let Some(copy) = world.ceph.images.iter_mut().find(|image| image.name.as_ref() == Some(&name))
        {
            copy.content = 0;
        }
    }));
    seen
}

#[test]
fn a_copy_that_differs_is_made_by_another_method_and_compared_in_full() {
    run_in_virtual_time(async {
        let stage = OneImage::new();
        let seen = spoil(&stage, 1);
        let _daemon = stage.daemon("node", "clone");
        stage.ask().await;
        let job = stage.end().await;
        assert_eq!((job.state, &job.mismatched[..]), (State::Done, &[Method::Clone][..]), "{job:#?}");
        assert_ne!(job.method, Some(Method::Clone));
        assert!(job.fallback.as_ref().unwrap().contains("differed"), "{job:#?}");
        assert_eq!(*seen.lock().unwrap(), ["Sample", "Full"]);
        assert_eq!(stage.published(), Some((stage.content_of(0), false)));
        stage.is_tidy();
    });
}

#[test]
fn a_second_copy_that_differs_fails_the_job() {
    run_in_virtual_time(async {
        let stage = OneImage::new();
        let seen = spoil(&stage, 2);
        let _daemon = stage.daemon("node", "clone");
        stage.ask().await;
        let job = stage.end().await;
        assert_eq!((job.state, job.mismatched.len()), (State::Failed, 2), "{job:#?}");
        assert!(job.reason.as_ref().unwrap().contains("two copies differed"), "{job:#?}");
        assert_eq!(*seen.lock().unwrap(), ["Sample", "Full"]);
        assert_eq!(stage.published(), None);
        stage.is_tidy();
    });
}

#[test]
fn a_daemon_that_takes_over_knows_of_the_copy_that_differed() {
    run_in_virtual_time(async {
        let stage = OneImage::new();
        let (name, dead) = (format!("rbd-offload.{}", stage.image), Arc::new(AtomicBool::new(false)));
        let first = stage.daemon("first", "clone");
        let seen: Arc<Mutex<Vec<String>>> = Arc::default();
        let (noted, node, killed) = (Arc::clone(&seen), Arc::clone(&first.node), Arc::clone(&dead));
        let mut spoiled = false;
        stage.world.lock().script = Some(Box::new(move |world, call| {
            if call.starts_with("remove images/rbd-offload.") && spoiled {
                killed.store(true, Ordering::SeqCst);
            }
            let Some(extent) = call.strip_prefix("compare ") else { return };
            noted.lock().unwrap().push(extent.split(' ').next().unwrap().to_owned());
            if !std::mem::replace(&mut spoiled, true)
                && let Some(copy) = world.ceph.images.iter_mut().find(|image| image.name.as_ref() == Some(&name))
            {
                copy.content = 0;
            }
        }));
        stage.ask().await;
        while !dead.load(Ordering::SeqCst) {
            sleep(Duration::from_millis(1)).await;
        }
        node.kill();
        let _second = stage.daemon("second", "clone");
        let job = stage.end().await;
        assert_eq!((job.state, &job.mismatched[..]), (State::Done, &[Method::Clone][..]), "{job:#?}");
        assert_ne!(job.method, Some(Method::Clone));
        assert_eq!(*seen.lock().unwrap(), ["Sample", "Full"]);
        stage.is_tidy();
    });
}
