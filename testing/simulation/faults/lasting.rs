//! Calls that go on after their caller dropped the future. A blocking librbd call keeps its thread, and an HTTP request
//! that was sent is worked on: what they do takes effect later, unless the client's address was fenced meanwhile.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::task::AbortHandle;
use tokio_util::sync::CancellationToken;

use super::gate::Handle;
use super::node::Node;
use crate::ceph::Progress;

/// How often the progress of a long call is shown to its caller.
const SHOWN_EVERY: Duration = Duration::from_millis(500);

/// A daemon's way to the world, each call in a task of its own.
#[derive(Clone)]
pub struct Lasting(pub Handle);

/// A call that is under way; dropped before its end, it goes on or not.
struct Call {
    handle: Handle,
    task: AbortHandle,
    /// Ends a long call at its next step.
    stop: Option<CancellationToken>,
}

impl Drop for Call {
    fn drop(&mut self) {
        if self.task.is_finished() {
            return;
        }
        let goes_on = {
            let mut world = self.handle.world().lock();
            let odds = world.faults.lasting;
            let goes_on = world.dice.chance(odds);
            if goes_on {
                let name = self.handle.node.name.clone();
                world.log(|| format!("{name}: a call goes on after its caller was dropped"));
            }
            goes_on
        };
        match &self.stop {
            _ if !goes_on => self.task.abort(),
            Some(stop) => stop.cancel(),
            None => {}
        }
    }
}

/// Counts among its client's calls until it has returned or was aborted.
struct Counted(Arc<Node>);

impl Counted {
    fn call<T, F: Future<Output = T>>(handle: &Handle, call: F) -> impl Future<Output = T> + use<T, F> {
        handle.node.calls.fetch_add(1, Ordering::SeqCst);
        let counted = Self(Arc::clone(&handle.node));
        async move {
            let _counted = counted;
            call.await
        }
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.calls.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Lasting {
    pub async fn run<T: Send + 'static>(&self, call: impl Future<Output = T> + Send + 'static) -> T {
        let task = tokio::spawn(Counted::call(&self.0, call));
        let _call = Call { handle: self.0.clone(), task: task.abort_handle(), stop: None };
        match task.await {
            Ok(answer) => answer,
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        }
    }

    /// A long call, whose progress is shown as long as its caller waits for it.
    pub async fn run_long<T, F>(
        &self,
        progress: &Progress,
        cancel: &CancellationToken,
        call: impl FnOnce(Handle, Arc<Progress>, CancellationToken) -> F,
    ) -> T
    where
        T: Send + 'static,
        F: Future<Output = T> + Send + 'static,
    {
        let (own, stop) = (Arc::new(Progress::default()), cancel.child_token());
        let mut task = tokio::spawn(Counted::call(&self.0, call(self.0.clone(), Arc::clone(&own), stop.clone())));
        let _call = Call { handle: self.0.clone(), task: task.abort_handle(), stop: Some(stop) };
        let mut steps = 0;
        loop {
            let ended = tokio::time::timeout(SHOWN_EVERY, &mut task).await;
            if own.steps() != steps {
                steps = own.steps();
                progress.set_total(own.total());
                progress.set_done(own.done());
            }
            match ended {
                Ok(Ok(answer)) => return answer,
                Ok(Err(error)) => std::panic::resume_unwind(error.into_panic()),
                Err(_) => {}
            }
        }
    }
}
