//! What the notifications' queue is bound to, remembered beside the jobs: the keys of an object's omap. The daemon
//! that replaces the queue holds the lock of that object.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;

use crate::ceph::{LockKey, Locked, Objects};
use crate::notification::{Binding, Bindings, BindingsError};

/// The object, in the jobs' namespace.
const OBJECT: &str = "bindings";

/// Name of the object's lock.
const LOCK: &str = "replace_queue";

/// Entries of one read.
const PAGE: usize = 256;

/// Bindings that are read at most. A configuration names a few; more is not ours.
const LIMIT: usize = 4096;

/// The memory of all controllers with the same `[jobs]` pool and namespace.
pub struct RememberedBindings(Arc<dyn Objects>);

impl RememberedBindings {
    pub fn new(objects: Arc<dyn Objects>) -> Self {
        Self(objects)
    }
}

impl std::fmt::Debug for RememberedBindings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RememberedBindings").finish_non_exhaustive()
    }
}

fn key(binding: &Binding) -> Result<String, BindingsError> {
    let Binding { vhost, queue, exchange, routing_key } = binding;
    serde_json::to_string(&[vhost, queue, exchange, routing_key]).map_err(BindingsError::new)
}

/// `None` for a key that a later version may have written.
fn binding(key: &str) -> Option<Binding> {
    let [vhost, queue, exchange, routing_key] = serde_json::from_str(key).ok()?;
    Some(Binding { vhost, queue, exchange, routing_key })
}

fn lock_key(holder: &str) -> LockKey {
    LockKey { name: LOCK.to_owned(), cookie: holder.to_owned() }
}

#[async_trait]
impl Bindings for RememberedBindings {
    async fn all(&self) -> Result<BTreeSet<Binding>, BindingsError> {
        let mut all = BTreeSet::new();
        let mut after = String::new();
        for _ in 0..LIMIT / PAGE {
            let page = self.0.omap(OBJECT, &after, PAGE).await.map_err(BindingsError::new)?;
            all.extend(page.iter().filter_map(|(key, _)| binding(key)));
            match page.last() {
                Some((last, _)) if page.len() == PAGE => after.clone_from(last),
                _ => break,
            }
        }
        Ok(all)
    }

    async fn add(&self, bindings: &[Binding]) -> Result<(), BindingsError> {
        let entries: Vec<(String, Vec<u8>)> =
            bindings.iter().map(|binding| Ok((key(binding)?, Vec::new()))).collect::<Result<_, BindingsError>>()?;
        self.0.set_omap(OBJECT, &entries).await.map_err(BindingsError::new)
    }

    async fn remove(&self, binding: &Binding) -> Result<(), BindingsError> {
        self.0.remove_omap(OBJECT, &[key(binding)?]).await.map(drop).map_err(BindingsError::new)
    }

    async fn lock(&self, holder: &str, duration: Duration) -> Result<bool, BindingsError> {
        let locked = self.0.lock(OBJECT, &lock_key(holder), holder, duration).await.map_err(BindingsError::new)?;
        Ok(locked == Locked::Acquired)
    }

    async fn unlock(&self, holder: &str) -> Result<(), BindingsError> {
        self.0.unlock(OBJECT, &lock_key(holder)).await.map(drop).map_err(BindingsError::new)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_read_as_it_was_written() {
        let one = Binding {
            vhost: "/".into(),
            queue: "rbd-offload".into(),
            exchange: "a\"b\tc".into(),
            routing_key: "notifications.info".into(),
        };
        assert_eq!(binding(&key(&one).unwrap()), Some(one));
        assert_eq!(binding("[\"/\"]"), None);
        assert_eq!(binding("job.1"), None);
    }
}
