//! The daemon's own queue: the arguments that it is declared with, and how an old queue of other arguments is replaced.
//!
//! RabbitMQ never changes the arguments of a queue. It refuses a declaration with other ones (406), so the old queue
//! has to be deleted first. The daemon does that by itself, without losing a message that lies in the queue:
//!
//! 1. The queue is the daemons' own if they remember a binding of it ([`Bindings`](super::bindings::Bindings)). Another
//!    one may belong to another service: it is neither consumed nor deleted.
//! 2. While a daemon consumes it, the others stand by: they poll the number of its consumers.
//! 3. It has no consumer, and messages wait: the daemon consumes the old queue until it is empty.
//! 4. It has no consumer, and it is empty: the daemon that gets the lock of the bindings deletes it and declares it
//!    again. The others stand by. Without the lock, a daemon that saw the old queue could delete the new one of another
//!    daemon, with the messages in it: RabbitMQ has no condition for the deletion of a quorum queue.
//!
//! In a rolling restart, the daemon that is restarted last leaves the queue without a consumer, and one of those that
//! stand by replaces it. Daemons whose configurations differ do not replace the queue in turns, since each leaves alone
//! what another one consumes.
//!
//! What a service sends between the deletion and the new binding reaches no queue. The reconciler looks for requests
//! with each new connection to the broker, and finds that one.

use std::time::Duration;

use lapin::Channel;
use lapin::options::{QueueDeclareOptions, QueueDeleteOptions};
use lapin::protocol::AMQPSoftError;
use lapin::types::{AMQPValue, FieldTable};

use super::is_soft_error;
use crate::config::{Messaging, QueueType};

/// What is known of a queue without changing it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Depth {
    /// Messages that were not delivered to a consumer yet.
    pub messages: u32,
    pub consumers: u32,
}

/// Declares the queue as the configuration describes it. `Some`: it exists with other arguments; the error says which,
/// and the channel is closed.
pub async fn declare(channel: &Channel, config: &Messaging) -> lapin::Result<Option<lapin::Error>> {
    let options = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
    match channel.queue_declare(config.queue.as_str().into(), options, arguments(config)).await {
        Ok(_) => Ok(None),
        Err(error) if is_soft_error(&error, AMQPSoftError::PRECONDITIONFAILED) => Ok(Some(error)),
        Err(error) => Err(error),
    }
}

/// `None`: there is no such queue, and the channel is closed.
pub async fn depth(channel: &Channel, queue: &str) -> lapin::Result<Option<Depth>> {
    let passive = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
    match channel.queue_declare(queue.into(), passive, FieldTable::default()).await {
        Ok(queue) => Ok(Some(Depth { messages: queue.message_count(), consumers: queue.consumer_count() })),
        Err(error) if is_soft_error(&error, AMQPSoftError::NOTFOUND) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Deletes a queue that was seen to be empty and without a consumer. False: that has changed, and the channel is
/// closed.
///
/// A classic queue is only deleted if it still is so. RabbitMQ does not have these conditions for a quorum queue: it
/// closes the connection with 540, "not implemented".
pub async fn delete_unused(channel: &Channel, config: &Messaging) -> lapin::Result<bool> {
    let classic = config.queue_type == QueueType::Classic;
    let options = QueueDeleteOptions { if_unused: classic, if_empty: classic, ..QueueDeleteOptions::default() };
    match channel.queue_delete(config.queue.as_str().into(), options).await {
        Ok(_) => Ok(true),
        Err(error) if is_soft_error(&error, AMQPSoftError::PRECONDITIONFAILED) => Ok(false),
        Err(error) => Err(error),
    }
}

/// As the configuration spells it: `queue_type = quorum, queue_max_length = 100000, queue_expires = 7d`.
pub fn described(config: &Messaging) -> String {
    let Messaging { queue_type, queue_max_length, queue_expires, .. } = config;
    format!(
        "queue_type = {queue_type}, queue_max_length = {queue_max_length}, queue_expires = {}",
        written(*queue_expires)
    )
}

fn arguments(config: &Messaging) -> FieldTable {
    let mut arguments = FieldTable::default();
    let text = |text: &str| AMQPValue::LongString(text.into());
    arguments.insert("x-queue-type".into(), text(config.queue_type.as_str()));
    if config.queue_max_length > 0 {
        arguments.insert("x-max-length".into(), AMQPValue::LongLongInt(config.queue_max_length.into()));
        arguments.insert("x-overflow".into(), text("drop-head"));
    }
    if !config.queue_expires.is_zero() {
        let milliseconds = i64::try_from(config.queue_expires.as_millis()).unwrap_or(i64::MAX);
        arguments.insert("x-expires".into(), AMQPValue::LongLongInt(milliseconds));
    }
    arguments
}

/// A duration as the configuration takes it, in the largest unit that is exact.
fn written(duration: Duration) -> String {
    let milliseconds = duration.as_millis();
    let units = [("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1_000)];
    match units.into_iter().find(|(_, unit)| milliseconds > 0 && milliseconds.is_multiple_of(*unit)) {
        Some((name, unit)) => format!("{}{name}", milliseconds / unit),
        None if milliseconds == 0 => "0".to_owned(),
        None => format!("{milliseconds}ms"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_duration_is_written_as_it_is_configured() {
        for (milliseconds, text) in
            [(0, "0"), (1_500, "1500ms"), (90_000, "90s"), (7_200_000, "2h"), (604_800_000, "7d")]
        {
            assert_eq!(written(Duration::from_millis(milliseconds)), text);
        }
    }
}
