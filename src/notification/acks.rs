//! Which deliveries of a channel may be acknowledged, in as few frames as is safe.

use std::collections::BTreeSet;

/// Delivery tags of one channel, in the two states that matter: with the sink, or done and not acknowledged yet.
#[derive(Debug, Default)]
pub struct Acks {
    held: BTreeSet<u64>,
    done: Vec<u64>,
}

/// One `basic.ack`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ack {
    pub tag: u64,
    /// Acknowledges every lower tag of the channel as well.
    pub multiple: bool,
}

impl Acks {
    /// The sink is still storing this delivery. It must not be acknowledged, not even through a lower `multiple` ack.
    pub fn hold(&mut self, tag: u64) {
        self.held.insert(tag);
    }

    /// Stored or dropped.
    pub fn done(&mut self, tag: u64) {
        self.held.remove(&tag);
        self.done.push(tag);
    }

    /// Given back to the broker.
    pub fn returned(&mut self, tag: u64) {
        self.held.remove(&tag);
    }

    pub fn waiting(&self) -> usize {
        self.done.len()
    }

    /// What to send for everything done. Tags come in order, so one multiple ack covers all below the lowest that is
    /// held.
    pub fn take(&mut self) -> Vec<Ack> {
        let lowest_held = self.held.first().copied().unwrap_or(u64::MAX);
        let (below, above): (Vec<u64>, Vec<u64>) = self.done.drain(..).partition(|tag| *tag < lowest_held);
        let multiple = below.into_iter().max().map(|tag| Ack { tag, multiple: true });
        let single = above.into_iter().map(|tag| Ack { tag, multiple: false });
        multiple.into_iter().chain(single).collect()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn consecutive_acks_share_one_frame() {
        let mut acks = Acks::default();
        (1..=50).for_each(|tag| acks.done(tag));
        assert_eq!(acks.take(), [Ack { tag: 50, multiple: true }]);
        assert_eq!(acks.take(), []);
    }

    #[test]
    fn an_ack_never_passes_a_delivery_that_is_held() {
        let mut acks = Acks::default();
        acks.done(1);
        acks.hold(2);
        acks.done(3);
        assert_eq!(acks.take(), [Ack { tag: 1, multiple: true }, Ack { tag: 3, multiple: false }]);
        acks.done(4);
        acks.done(2);
        assert_eq!(acks.take(), [Ack { tag: 4, multiple: true }]);
    }

    proptest! {
        /// Against a model of the broker: what is acknowledged was done, and in the end everything done is.
        #[test]
        fn what_is_acknowledged_was_done_and_all_that_was_done_is_acknowledged(steps in prop::collection::vec(0u8..5, 1..200)) {
            let mut acks = Acks::default();
            let (mut next, mut unacked, mut held, mut returned) = (1u64, BTreeSet::new(), Vec::new(), 0usize);
            let mut done = BTreeSet::new();
            let broker = |acks: &mut Acks, unacked: &mut BTreeSet<u64>, done: &BTreeSet<u64>| {
                for ack in acks.take() {
                    let covered: Vec<u64> = unacked.iter().copied()
                        .filter(|tag| if ack.multiple { *tag <= ack.tag } else { *tag == ack.tag }).collect();
                    prop_assert!(covered.contains(&ack.tag), "unknown delivery tag");
                    for tag in covered {
                        prop_assert!(done.contains(&tag), "acked while held");
                        unacked.remove(&tag);
                    }
                }
                Ok(())
            };
            for (i, step) in steps.iter().enumerate() {
                match step {
                    0 => { acks.done(next); unacked.insert(next); done.insert(next); next += 1; }
                    1 => { acks.hold(next); unacked.insert(next); held.push(next); next += 1; }
                    2 if !held.is_empty() => { let tag = held.swap_remove(i % held.len()); done.insert(tag); acks.done(tag); }
                    3 if !held.is_empty() => { let tag = held.swap_remove(i % held.len()); unacked.remove(&tag); acks.returned(tag); returned += 1; }
                    _ => broker(&mut acks, &mut unacked, &done)?,
                }
            }
            broker(&mut acks, &mut unacked, &done)?;
            prop_assert_eq!(unacked.len(), held.len());
            prop_assert_eq!(done.len() + held.len() + returned, next as usize - 1);
        }
    }
}
