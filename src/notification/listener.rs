//! Consumes the notifications from RabbitMQ: an own durable queue, bound to the services' exchanges, until it is
//! stopped.
//!
//! ```text
//! run      one host after the other, with growing pauses
//! └ session     connect, declare the queue (or replace an old one: `queue.rs`), consume; until the connection ends
//!   ├ maintain_bindings    binds the queue to each exchange, to a missing one once a service has declared it
//!   └ pump          delivery → drop and ack | hand to the sink, ack when it is stored or never can be | give back
//! ```
//!
//! **An exchange is never created here**, only waited for. A topic exchange is either durable or not, by
//! `amqp_durable_queues` or `rabbit_quorum_queue` of the service that owns it, and its own declaration of another kind
//! is refused with 406: tried with oslo.messaging 18 both ways round, every notification of that service is then lost.
//! So an exchange of ours could stop all notifications of the service that owns it.
//!
//! **AMQP cannot list bindings**, so each is remembered (see [`Bindings`]) before it is made, and one that is
//! remembered but no longer in the configuration is removed.
//!
//! **Only the priority `info` is bound.** All events that matter are of it; error notifications are not, and those of
//! Nova carry tokens.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use futures::{FutureExt, StreamExt};
use lapin::message::Delivery;
use lapin::options::{
    BasicAckOptions, BasicCancelOptions, BasicConsumeOptions, BasicNackOptions, BasicQosOptions,
    ExchangeDeclareOptions, QueueBindOptions,
};
use lapin::protocol::{AMQPHardError, AMQPSoftError};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{Channel, Connection, Consumer, ExchangeKind};
use metrics::{Counter, counter, gauge};
use rand::seq::SliceRandom;
use secrecy::ExposeSecret;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};
use uuid::Uuid;

use super::acks::Acks;
use super::bindings::{Binding, Bindings, BindingsError, NoMemory};
use super::connect::{self, WRONG_NAME_REMEDY};
use super::envelope::EnvelopeError;
use super::event::{Event, EventType, Notification};
use super::permissions::Permissions;
use super::queue::{self, Depth};
use super::sink::{Meta, Sink, SinkError};
use super::status::BrokerStatus;
use super::transport_url::{self, FileError, Host, TransportUrl};
use super::{is_hard_error, is_soft_error};
use crate::config::Messaging;

/// The pause after all hosts failed, its growth each time, and its maximum: oslo.messaging's own figures.
const RECONNECT_FIRST: Duration = Duration::from_secs(1);
const RECONNECT_STEP: Duration = Duration::from_secs(2);
const RECONNECT_LAST: Duration = Duration::from_secs(30);
/// A session that consumed this long counts as a success: the pause starts from the shortest again.
const SETTLED: Duration = Duration::from_secs(10);

/// For TCP, TLS and login together.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(20);
/// For a declaration or a binding.
const RPC_TIMEOUT: Duration = Duration::from_secs(30);
/// For a call to what remembers the bindings.
const MEMORY_TIMEOUT: Duration = Duration::from_secs(10);
/// Holds the lock for replacing the queue at most this long: twice the time of the calls under it.
const REPLACE_LOCK: Duration = Duration::from_secs(60);
/// For calls of the sink that still run when the session ends.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);

/// A message of the same kind is logged again after this long.
const LOG_INTERVAL: Duration = Duration::from_secs(600);
/// Acknowledgements are batched for up to this long.
const ACK_DELAY: Duration = Duration::from_millis(20);
/// What stands for the memory of the bindings among the names of exchanges that were warned of.
const UNREMEMBERED: &str = " bindings";

/// Nova's and Cinder's routing keys are `<topic>.<priority>`.
const PRIORITY: &str = "info";

/// Rounds through the broker (`x-delivery-count` of quorum queues) after which a delivery is held longer: RabbitMQ 4
/// drops a message after 20, which is then more than an hour of a sink that cannot store.
const LONG_HOLD_AFTER_REDELIVERIES: i64 = 4;

/// Waiting times, for tests to shorten.
#[derive(Debug, Clone, Copy)]
pub struct Timeouts {
    /// The sink is tried this long before a delivery is given back to the broker.
    pub hold: Duration,
    /// The same for a delivery that was given back several times; far below the broker's `consumer_timeout` (30
    /// minutes).
    pub hold_again: Duration,
    /// For one call of the sink.
    pub attempt: Duration,
    /// Pause before the listener calls the sink again. It doubles up to eight times.
    pub retry: Duration,
    /// Between two polls of the queue.
    pub poll_interval: Duration,
    /// Between two bindings of all exchanges, the missing ones included. The broker logs an error for each exchange
    /// that does not exist.
    pub bind_interval: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Timeouts {
            hold: Duration::from_secs(45),
            hold_again: Duration::from_secs(240),
            attempt: Duration::from_secs(30),
            retry: Duration::from_secs(1),
            poll_interval: Duration::from_secs(5),
            bind_interval: Duration::from_secs(60),
        }
    }
}

/// The consumer of `[messaging]`.
#[derive(Debug)]
pub struct Listener {
    config: Messaging,
    url: TransportUrl,
    timeouts: Timeouts,
    status: Arc<BrokerStatus>,
    bindings: Arc<dyn Bindings>,
}

/// Why a session ended, with a remedy where the operator has to act.
#[derive(Debug, thiserror::Error)]
enum SessionError {
    #[error(
        "{host} refused user {user:?}: wrong user or password; check transport_url in [messaging] and `rabbitmqctl authenticate_user`"
    )]
    Login { host: String, user: String },
    #[error("{host}: user {user:?} may not use the virtual host {vhost:?}, or there is none of that name ({error})")]
    Vhost { host: String, user: String, vhost: String, error: lapin::Error },
    #[error("the certificate of {host} is not for that name: {WRONG_NAME_REMEDY} ({error})")]
    Name { host: String, error: lapin::Error },
    #[error("cannot connect to {host}: {error}")]
    Connect { host: String, error: lapin::Error },
    #[error("{host} did not answer within {} s", CONNECT_TIMEOUT.as_secs())]
    ConnectTimeout { host: String },
    #[error(transparent)]
    File(FileError),
    #[error(
        "queue {queue:?} exists with other arguments than [messaging] asks for ({wanted}), and the daemons know of no \
         binding of it: it may be another service's. Name another queue, set the keys to what it is, or delete it with \
         `rabbitmqctl delete_queue {queue}` ({error})"
    )]
    QueueDiffers { queue: String, wanted: String, error: lapin::Error },
    #[error(
        "queue {queue:?} exists with other arguments than [messaging] asks for ({wanted}), and could not be replaced; \
         delete it with `rabbitmqctl delete_queue {queue}` ({error})"
    )]
    NotReplaced { queue: String, wanted: String, error: lapin::Error },
    #[error(
        "queue {queue:?} exists with other arguments; whether it is the daemons' own cannot be read, or the lock for \
         replacing it cannot be taken: {error}"
    )]
    NotKnown { queue: String, error: BindingsError },
    #[error("the old queue is empty, and is replaced")]
    Emptied,
    #[error(
        "not allowed to {what}: give the user the permissions ({}) with `{command}` ({error})",
        Permissions::REPLACES
    )]
    Denied { what: &'static str, command: String, error: lapin::Error },
    #[error("{what} failed: {error}")]
    Call { what: &'static str, error: lapin::Error },
    #[error("{what}: no answer within {} s", RPC_TIMEOUT.as_secs())]
    CallTimeout { what: &'static str },
    #[error("the connection to {host} was lost: {error}")]
    Lost { host: String, error: lapin::Error },
    #[error(
        "the broker ended the consumer of queue {0:?} (the queue was deleted or moved to another node, or a delivery \
         was held longer than the broker's consumer_timeout)"
    )]
    Cancelled(String),
}

impl Listener {
    /// Reads the transport_url; does not connect.
    pub fn new(config: Messaging) -> Result<Listener, transport_url::Error> {
        let url = TransportUrl::parse(config.transport_url.expose_secret())?;
        Ok(Listener {
            config,
            url,
            timeouts: Timeouts::default(),
            status: Arc::default(),
            bindings: Arc::new(NoMemory),
        })
    }

    pub fn timeouts(mut self, timeouts: Timeouts) -> Listener {
        self.timeouts = timeouts;
        self
    }

    /// The store of the queue's bindings. Without one, a binding that the configuration no longer names stays.
    pub fn bindings(mut self, bindings: Arc<dyn Bindings>) -> Listener {
        self.bindings = bindings;
        self
    }

    pub fn status(&self) -> Arc<BrokerStatus> {
        self.status.clone()
    }

    /// Consumes until cancelled, and reconnects after each failure of the broker. Once cancelled, it stops consuming,
    /// waits for the sink (10 s at most), and closes the connection. Events that were not stored go back to the queue.
    pub async fn run(self, sink: impl Sink, cancel: CancellationToken) {
        for note in &self.url.notes {
            warn!("transport_url: {note}");
        }
        if self.config.ssl_ca_file.is_some() && self.url.tls.is_none() {
            warn!("ssl_ca_file in [messaging] has no effect without ssl=1 in transport_url");
        }
        if !self.config.ssl_verify_hostname && self.url.tls.is_none() {
            warn!("ssl_verify_hostname in [messaging] has no effect without ssl=1 in transport_url");
        }
        let mut hosts = self.url.hosts.clone();
        hosts.shuffle(&mut rand::rng());

        let mut run = Supervisor {
            sink: Arc::new(sink),
            connecting: HashMap::new(),
            warned: BTreeSet::new(),
            logged: LogThrottle::default(),
            counters: Counters::default(),
            listener: &self,
        };
        let mut pause = RECONNECT_FIRST;
        for attempt in 1usize.. {
            let place = (attempt - 1) % hosts.len();
            let Some(host) = hosts.get(place) else { break };
            let ended = run.session(place, host, &cancel).await;
            let consumed = {
                let mut status = self.status.lock();
                let since = status.connected_since.take();
                status.queue_declared = false;
                status.standing_by = false;
                since.map(|since| since.elapsed())
            };
            gauge!("rbd_offload_broker_connected").set(0.0);
            let Err(ended) = ended else { break };
            if matches!(ended, SessionError::Emptied) {
                debug!("{ended}");
                continue;
            }
            {
                let mut status = self.status.lock();
                status.reconnects += 1;
                status.problem = Some(ended.to_string());
            }
            counter!("rbd_offload_broker_reconnects_total").increment(1);
            let text = ended.to_string();
            match run.logged.due(&text) {
                Some(_)
                    if matches!(
                        ended,
                        SessionError::QueueDiffers { .. }
                            | SessionError::NotReplaced { .. }
                            | SessionError::Denied { .. }
                            | SessionError::Login { .. }
                            | SessionError::Name { .. }
                    ) =>
                {
                    error!(problem = %text, "no connection to the broker; retrying");
                }
                Some(_) => warn!(problem = %text, "no connection to the broker; retrying"),
                None => debug!(problem = %text, "no connection to the broker; retrying"),
            }

            let settled = consumed.is_some_and(|time| time >= SETTLED);
            if settled {
                pause = RECONNECT_FIRST;
            }
            // The other hosts are tried at once.
            if settled || attempt % hosts.len() == 0 {
                tokio::select! {
                    () = cancel.cancelled() => break,
                    () = sleep(pause) => {}
                }
                pause = (pause + RECONNECT_STEP).min(RECONNECT_LAST);
            } else if cancel.is_cancelled() {
                break;
            }
        }
        debug!("stopped consuming");
    }

    fn queue(&self) -> &str {
        &self.config.queue
    }

    /// Declares the queue. A queue with other arguments is replaced once it is empty and has no consumer: see
    /// `queue.rs`.
    async fn declare_queue(&self, connection: &Connection) -> Result<ConsumedQueue, SessionError> {
        let mut waited = false;
        loop {
            let Some(error) = self.try_declare(connection).await? else {
                self.status.lock().queue_declared = true;
                return Ok(ConsumedQueue::AsConfigured);
            };
            let (queue, wanted) = (self.queue().to_owned(), queue::described(&self.config));
            match remember(self.bindings.all()).await {
                Ok(all) if all.iter().any(|known| known.queue == queue && known.vhost == self.url.vhost) => {}
                Ok(_) => return Err(SessionError::QueueDiffers { queue, wanted, error }),
                Err(error) => return Err(SessionError::NotKnown { queue, error }),
            }
            let mut channel = call("open a channel", connection.create_channel()).await?;
            let Some(depth) = self.depth(&channel).await? else { continue };
            match depth {
                Depth { consumers: 0, messages: 0 } => {
                    if !self.delete_old_queue(connection, &wanted).await? {
                        self.stand_by(connection, &mut channel, 0).await?;
                    }
                }
                Depth { consumers: 0, messages } => {
                    info!(
                        "queue {queue:?} has other arguments than [messaging] asks for ({wanted}); its {messages} \
                         messages are taken first, then it is replaced ({error})"
                    );
                    return Ok(ConsumedQueue::Old);
                }
                Depth { consumers, .. } => {
                    if !waited {
                        warn!(
                            "queue {queue:?} has other arguments than [messaging] asks for ({wanted}), and {consumers} \
                             consumers read it; this daemon stands by, and replaces it when they have stopped. Give all \
                             daemons the same [messaging] and restart them ({error})"
                        );
                        waited = true;
                        let mut status = self.status.lock();
                        status.standing_by = true;
                        status.connected_since = Some(Instant::now());
                        status.problem = None;
                        gauge!("rbd_offload_broker_connected").set(1.0);
                    }
                    self.stand_by(connection, &mut channel, consumers).await?;
                }
            }
        }
    }

    /// Deletes the old queue under the lock for replacing it. False: another daemon has the lock.
    async fn delete_old_queue(&self, connection: &Connection, wanted: &str) -> Result<bool, SessionError> {
        let holder = Uuid::new_v4().to_string();
        match remember(self.bindings.lock(&holder, REPLACE_LOCK)).await {
            Ok(true) => {}
            Ok(false) => return Ok(false),
            Err(error) => return Err(SessionError::NotKnown { queue: self.queue().to_owned(), error }),
        }
        let Ok(deleted) = timeout(RPC_TIMEOUT, self.delete_if_still_old(connection, wanted)).await else {
            return Err(SessionError::CallTimeout { what: "replace the old queue" });
        };
        // The lock stays until it runs out where the broker may still carry out the deletion.
        if matches!(deleted, Ok(()) | Err(SessionError::NotReplaced { .. }))
            && let Err(error) = remember(self.bindings.unlock(&holder)).await
        {
            debug!("the lock for replacing the queue stays until it runs out: {error}");
        }
        deleted.map(|()| true)
    }

    /// Looks again before it deletes the queue: another daemon may have replaced it before this one got the lock.
    async fn delete_if_still_old(&self, connection: &Connection, wanted: &str) -> Result<(), SessionError> {
        let Some(error) = self.try_declare(connection).await? else { return Ok(()) };
        let channel = call("open a channel", connection.create_channel()).await?;
        if self.depth(&channel).await? != Some(Depth { consumers: 0, messages: 0 }) {
            return Ok(());
        }
        let queue = self.queue();
        match call("delete the old queue", queue::delete_unused(&channel, &self.config)).await {
            Ok(true) => info!("queue {queue:?} had other arguments; it is made again with {wanted} ({error})"),
            Ok(false) => {}
            Err(SessionError::Call { error, .. }) if matches!(error.kind(), lapin::ErrorKind::ProtocolError(_)) => {
                return Err(SessionError::NotReplaced { queue: queue.to_owned(), wanted: wanted.to_owned(), error });
            }
            Err(ended) => return Err(ended),
        }
        Ok(())
    }

    /// On a channel of its own, since a refusal closes it. `Some`: the queue exists with other arguments.
    async fn try_declare(&self, connection: &Connection) -> Result<Option<lapin::Error>, SessionError> {
        let what = "declare the queue";
        let channel = call(what, connection.create_channel()).await?;
        let refusal = call(what, queue::declare(&channel, &self.config)).await.map_err(|ended| self.denied(ended))?;
        if refusal.is_none() {
            let _ = timeout(CLOSE_TIMEOUT, channel.close(200, "".into())).await;
        }
        Ok(refusal)
    }

    /// Waits until the old queue has another number of consumers, for `bind_interval` at most: the broker logs an
    /// error for each declaration that it refuses, and none for a poll.
    async fn stand_by(
        &self,
        connection: &Connection,
        channel: &mut Channel,
        consumers: u32,
    ) -> Result<(), SessionError> {
        let until = Instant::now() + self.timeouts.bind_interval;
        while Instant::now() < until {
            sleep(self.timeouts.poll_interval).await;
            if !channel.status().connected() {
                *channel = call("open a channel", connection.create_channel()).await?;
            }
            match self.depth(channel).await? {
                Some(depth) if depth.consumers == consumers => gauge!("rbd_offload_queue_messages").set(depth.messages),
                _ => break,
            }
        }
        Ok(())
    }

    async fn depth(&self, channel: &Channel) -> Result<Option<Depth>, SessionError> {
        call("look at the queue", queue::depth(channel, self.queue())).await.map_err(|ended| self.denied(ended))
    }

    fn denied(&self, ended: SessionError) -> SessionError {
        match ended {
            SessionError::Call { what, error } if is_soft_error(&error, AMQPSoftError::ACCESSREFUSED) => {
                let user = self.url.hosts.first().map_or("USER", |host| &host.user);
                let command = Permissions::of(&self.config).command(user, &self.url.vhost);
                SessionError::Denied { what, command, error }
            }
            other => other,
        }
    }

    fn binding(&self, exchange: &str, topic: &str) -> Binding {
        Binding {
            vhost: self.url.vhost.clone(),
            queue: self.queue().to_owned(),
            exchange: exchange.to_owned(),
            routing_key: format!("{topic}.{PRIORITY}"),
        }
    }

    /// Every binding that the configuration asks for.
    fn wanted(&self) -> BTreeSet<Binding> {
        let pairs = self
            .config
            .exchanges
            .iter()
            .flat_map(|exchange| self.config.topics.iter().map(move |topic| self.binding(exchange, topic)));
        pairs.collect()
    }

    /// Those of our queue that are remembered, and that the configuration no longer asks for.
    async fn unwanted(&self) -> Result<Vec<Binding>, BindingsError> {
        let (queue, vhost, wanted) = (self.queue(), self.url.vhost.as_str(), self.wanted());
        let ours = |binding: &Binding| binding.queue == queue && binding.vhost == vhost && !wanted.contains(binding);
        Ok(remember(self.bindings.all()).await?.into_iter().filter(ours).collect())
    }

    /// Removes one binding; one that is not there, or whose exchange is gone, counts as removed.
    async fn unbind(&self, channel: &Channel, binding: &Binding) -> Result<(), SessionError> {
        let unbound = channel.queue_unbind(
            binding.queue.as_str().into(),
            binding.exchange.as_str().into(),
            binding.routing_key.as_str().into(),
            FieldTable::default(),
        );
        match call("remove a binding of the queue", unbound).await {
            Err(SessionError::Call { error, .. }) if is_soft_error(&error, AMQPSoftError::NOTFOUND) => Ok(()),
            other => other,
        }
    }

    /// False: no such exchange.
    async fn bind(&self, channel: &Channel, exchange: &str) -> Result<bool, SessionError> {
        let passive = ExchangeDeclareOptions { passive: true, ..ExchangeDeclareOptions::default() };
        let declared = channel.exchange_declare(exchange.into(), ExchangeKind::Topic, passive, FieldTable::default());
        match call("look for an exchange", declared).await {
            Ok(()) => {}
            Err(SessionError::Call { error, .. }) if is_soft_error(&error, AMQPSoftError::NOTFOUND) => {
                return Ok(false);
            }
            Err(ended) => return Err(ended),
        }
        for topic in &self.config.topics {
            let key = self.binding(exchange, topic).routing_key;
            let (queue, options) = (self.queue().into(), QueueBindOptions::default());
            let bound = channel.queue_bind(queue, exchange.into(), key.into(), options, FieldTable::default());
            match call("bind the queue to an exchange", bound).await {
                Ok(()) => {}
                // Deleted in between; a queue that is gone ends the consumer.
                Err(SessionError::Call { error, .. }) if is_soft_error(&error, AMQPSoftError::NOTFOUND) => {
                    return Ok(false);
                }
                Err(ended) => return Err(ended),
            }
        }
        Ok(true)
    }
}

/// The queue that a session consumes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ConsumedQueue {
    AsConfigured,
    /// One of other arguments: the session ends when it is empty.
    Old,
}

/// What lives over the sessions.
struct Supervisor<'a> {
    listener: &'a Listener,
    sink: Arc<dyn Sink>,
    /// Attempts that did not end in time, by the host's place. lapin cannot give one up, so the listener waits for the
    /// same one again and starts no second one.
    connecting: HashMap<usize, JoinHandle<lapin::Result<Connection>>>,
    /// Exchanges whose absence was logged.
    warned: BTreeSet<String>,
    logged: LogThrottle,
    counters: Counters,
}

impl Supervisor<'_> {
    /// Ok: cancelled.
    async fn session(&mut self, place: usize, host: &Host, cancel: &CancellationToken) -> Result<(), SessionError> {
        let listener = self.listener;
        listener.status.lock().host = Some(host.to_string());
        let setup = async {
            let connection = self.connect(place, host).await?;
            let queue = listener.declare_queue(&connection).await?;
            let what = "consume";
            let channel = call(what, connection.create_channel()).await?;
            let prefetch = listener.config.prefetch.max(1);
            call(what, channel.basic_qos(prefetch, BasicQosOptions::default())).await?;
            let options = BasicConsumeOptions::default();
            let consume = channel.basic_consume(listener.queue().into(), "".into(), options, FieldTable::default());
            let consumer = call(what, consume).await.map_err(|ended| listener.denied(ended))?;
            Ok((connection, channel, consumer, queue))
        };
        let (connection, channel, consumer, queue) = tokio::select! {
            () = cancel.cancelled() => return Ok(()),
            ready = setup => ready?,
        };
        {
            let mut status = listener.status.lock();
            status.connected_since = Some(Instant::now());
            status.standing_by = false;
            status.problem = None;
        }
        self.logged.forget();
        info!(queue = listener.queue(), %host, "connected to the broker");
        gauge!("rbd_offload_broker_connected").set(1.0);

        let held = AtomicUsize::new(0);
        let mut pump = Session {
            host,
            channel,
            sink: self.sink.clone(),
            stop: CancellationToken::new(),
            stores: JoinSet::new(),
            held: &held,
            acks: Acks::default(),
            logged: &mut self.logged,
            counters: &self.counters,
            listener,
        };
        let ended = tokio::select! {
            biased;
            () = cancel.cancelled() => Ok(()),
            ended = maintain_bindings(listener, &mut self.warned, &connection, queue, &held) => Err(ended),
            ended = pump.run(consumer.clone()) => Err(ended),
        };
        // A lost connection may first show as another error; lapin has its cause.
        pump.stop(&consumer, matches!(ended, Ok(()) | Err(SessionError::Emptied))).await;
        let _ = timeout(CLOSE_TIMEOUT, connection.close(200, "".into())).await;
        ended
    }

    async fn connect(&mut self, place: usize, host: &Host) -> Result<Connection, SessionError> {
        let listener = self.listener;
        let mut attempt = match self.connecting.remove(&place) {
            Some(attempt) => attempt,
            None => {
                let name = format!("rbd-offload:{}", listener.queue());
                let connecting = connect::connect(&listener.url, host, &listener.config, name);
                connecting.await.map_err(SessionError::File)?
            }
        };
        let text = host.to_string();
        match timeout(CONNECT_TIMEOUT, &mut attempt).await {
            Err(_) => {
                self.connecting.insert(place, attempt);
                Err(SessionError::ConnectTimeout { host: text })
            }
            Ok(Ok(Ok(connection))) => Ok(connection),
            Ok(Ok(Err(error))) if is_soft_error(&error, AMQPSoftError::ACCESSREFUSED) => {
                Err(SessionError::Login { host: text, user: host.user.clone() })
            }
            Ok(Ok(Err(error))) if is_hard_error(&error, AMQPHardError::NOTALLOWED) => Err(SessionError::Vhost {
                host: text,
                user: host.user.clone(),
                vhost: listener.url.vhost.clone(),
                error,
            }),
            Ok(Ok(Err(error))) if connect::is_wrong_name(&error) => Err(SessionError::Name { host: text, error }),
            Ok(Ok(Err(error))) => Err(SessionError::Connect { host: text, error }),
            Ok(Err(_)) => Err(SessionError::ConnectTimeout { host: text }),
        }
    }
}

/// Removes the bindings that the configuration no longer names. The next connection retries failed removals.
///
/// Once a connection, not again and again: a controller whose configuration was not changed yet binds them again, and
/// removes them itself when it is restarted with the new one.
async fn remove_unwanted(listener: &Listener, connection: &Connection) -> Result<(), SessionError> {
    let unwanted = match listener.unwanted().await {
        Ok(unwanted) => unwanted,
        Err(error) => {
            warn!("bindings that the configuration no longer names stay until the next connection: {error}");
            return Ok(());
        }
    };
    let mut scratch = None;
    for binding in unwanted {
        let channel = reuse_or_open(scratch.take(), connection).await?;
        let Binding { queue, exchange, routing_key, .. } = &binding;
        match listener.unbind(&channel, &binding).await {
            Ok(()) => {
                scratch = Some(channel);
                info!("queue {queue:?} is no longer bound to exchange {exchange:?} for {routing_key}");
                if let Err(error) = remember(listener.bindings.remove(&binding)).await {
                    debug!("a binding that is gone is still remembered: {error}");
                }
            }
            Err(SessionError::Call { error, .. }) if is_soft_error(&error, AMQPSoftError::ACCESSREFUSED) => warn!(
                "queue {queue:?} stays bound to exchange {exchange:?}, which the configuration no longer names: the user may not read that \
                 exchange any more. Allow it until the next connection, or delete the queue with `rabbitmqctl delete_queue` ({error})"
            ),
            Err(ended) => return Err(ended),
        }
    }
    Ok(())
}

/// Binds the queue to all exchanges that exist, again and again: a missing one may have come, and one that was there
/// may have been deleted and declared again. Ends with the connection, or when an old queue is empty and nothing of it
/// is `held`.
async fn maintain_bindings(
    listener: &Listener,
    warned: &mut BTreeSet<String>,
    connection: &Connection,
    queue: ConsumedQueue,
    held: &AtomicUsize,
) -> SessionError {
    if let Err(ended) = remove_unwanted(listener, connection).await {
        return ended;
    }
    let mut scratch: Option<Channel> = None;
    let mut bound = BTreeSet::new();
    let mut bind_at = Instant::now();
    loop {
        if Instant::now() >= bind_at && remember_wanted(listener, warned).await {
            for exchange in &listener.config.exchanges {
                if let Err(ended) = maintain(listener, warned, connection, &mut scratch, &mut bound, exchange).await {
                    return ended;
                }
            }
            bind_at = Instant::now() + listener.timeouts.bind_interval;
        }
        sleep(listener.timeouts.poll_interval).await;
        let channel = match reuse_or_open(scratch.take(), connection).await {
            Ok(channel) => channel,
            Err(ended) => return ended,
        };
        match listener.depth(&channel).await {
            Ok(Some(depth)) => {
                gauge!("rbd_offload_queue_messages").set(depth.messages);
                scratch = Some(channel);
                if queue == ConsumedQueue::Old && depth.messages == 0 && held.load(Ordering::Relaxed) == 0 {
                    return SessionError::Emptied;
                }
            }
            // the queue is gone, which ends the consumer too
            Ok(None) | Err(SessionError::Call { .. }) => {}
            Err(ended) => return ended,
        }
    }
}

/// Remembers the bindings that are about to be made. False: that is not possible now.
async fn remember_wanted(listener: &Listener, warned: &mut BTreeSet<String>) -> bool {
    let wanted: Vec<Binding> = listener.wanted().into_iter().collect();
    match remember(listener.bindings.add(&wanted)).await {
        Ok(()) => {
            warned.remove(UNREMEMBERED);
            true
        }
        Err(error) => {
            if warned.insert(UNREMEMBERED.to_owned()) {
                warn!("no new binding is made while it cannot be remembered; trying again: {error}");
            }
            false
        }
    }
}

/// Binds the queue to one exchange, if that exists.
async fn maintain(
    listener: &Listener,
    warned: &mut BTreeSet<String>,
    connection: &Connection,
    scratch: &mut Option<Channel>,
    bound: &mut BTreeSet<String>,
    exchange: &str,
) -> Result<(), SessionError> {
    let channel = reuse_or_open(scratch.take(), connection).await?;
    let found = match listener.bind(&channel, exchange).await.map_err(|ended| listener.denied(ended)) {
        Ok(found) => found,
        Err(ended @ SessionError::Denied { .. }) => {
            if warned.insert(format!("{exchange} denied")) {
                error!("exchange {exchange:?}: {ended}");
            }
            false
        }
        Err(ended) => return Err(ended),
    };
    if found {
        *scratch = Some(channel);
        if bound.insert(exchange.to_owned()) {
            info!("queue {:?} is bound to exchange {exchange:?}", listener.queue());
        }
        listener.status.lock().missing_exchanges.remove(exchange);
        warned.remove(exchange);
    } else {
        bound.remove(exchange);
        listener.status.lock().missing_exchanges.insert(exchange.to_owned());
        if warned.insert(exchange.to_owned()) {
            warn!(
                "exchange {exchange:?} does not exist yet; bound within a minute of the first notification of its \
                 service (if there is none of that name, take it out of exchanges in [messaging])"
            );
        }
    }
    Ok(())
}

/// A refusal closes a channel; then another one is opened.
async fn reuse_or_open(channel: Option<Channel>, connection: &Connection) -> Result<Channel, SessionError> {
    match channel.filter(|channel| channel.status().connected()) {
        Some(channel) => Ok(channel),
        None => call("open a channel", connection.create_channel()).await,
    }
}

/// Deliveries of one channel, to their end.
struct Session<'a> {
    listener: &'a Listener,
    host: &'a Host,
    channel: Channel,
    sink: Arc<dyn Sink>,
    /// Cuts retries short.
    stop: CancellationToken,
    stores: JoinSet<(u64, EventType, DeliveryOutcome)>,
    /// How many of them run.
    held: &'a AtomicUsize,
    acks: Acks,
    logged: &'a mut LogThrottle,
    counters: &'a Counters,
}

impl Session<'_> {
    async fn run(&mut self, mut consumer: Consumer) -> SessionError {
        let batch = usize::from(self.listener.config.prefetch / 2).max(1);
        let mut flush_at = tokio::time::Instant::now();
        loop {
            let was_waiting = self.acks.waiting() > 0;
            let result = tokio::select! {
                biased;
                Some(stored) = self.stores.join_next(), if !self.stores.is_empty() => {
                    match stored {
                        Ok(stored) => self.settle(stored).await,
                        // Not reached: the task neither panics nor is aborted here.
                        Err(_) => Ok(()),
                    }
                }
                delivery = consumer.next() => {
                    let mut next = Some(delivery);
                    // What has come in the meantime, without going to sleep.
                    while let Some(delivery) = next {
                        match delivery {
                            None => return SessionError::Cancelled(self.listener.queue().to_owned()),
                            Some(Err(error)) => return self.lost(error),
                            Some(Ok(delivery)) => self.take(&delivery),
                        }
                        if self.acks.waiting() >= batch {
                            break;
                        }
                        next = consumer.next().now_or_never();
                    }
                    Ok(())
                }
                () = sleep_until(flush_at), if was_waiting => self.flush().await,
            };
            let result = match result {
                Ok(()) if self.acks.waiting() >= batch => self.flush().await,
                other => other,
            };
            if let Err(error) = result {
                return self.lost(error);
            }
            if !was_waiting {
                flush_at = tokio::time::Instant::now() + ACK_DELAY;
            }
        }
    }

    fn lost(&self, error: lapin::Error) -> SessionError {
        SessionError::Lost { host: self.host.to_string(), error }
    }

    fn take(&mut self, delivery: &Delivery) {
        let tag = delivery.delivery_tag;
        let (event, meta) = match Notification::read(&delivery.data, compression(delivery)) {
            Ok(Notification::Irrelevant(event_type)) => {
                self.counters.dropped(event_type);
                return self.acks.done(tag);
            }
            Err(reason) => {
                self.counters.unreadable(reason);
                if let Some(more) = self.logged.due(reason.label()) {
                    warn!(
                        exchange = delivery.exchange.as_str(),
                        bytes = delivery.data.len(),
                        "a notification cannot be read and is dropped: {reason}{more}"
                    );
                }
                return self.acks.done(tag);
            }
            Ok(Notification::Relevant { event, event_type, message_id }) => {
                (event, Meta { event_type, message_id, exchange: delivery.exchange.as_str().to_owned() })
            }
        };
        self.acks.hold(tag);
        self.held.fetch_add(1, Ordering::Relaxed);
        let timeouts = self.listener.timeouts;
        let hold = if rounds(delivery) >= LONG_HOLD_AFTER_REDELIVERIES { timeouts.hold_again } else { timeouts.hold };
        let (sink, stop, event_type) = (self.sink.clone(), self.stop.clone(), meta.event_type);
        self.stores.spawn(async move { (tag, event_type, store(sink, event, meta, hold, timeouts, stop).await) });
    }

    async fn settle(&mut self, (tag, event_type, outcome): (u64, EventType, DeliveryOutcome)) -> lapin::Result<()> {
        self.held.fetch_sub(1, Ordering::Relaxed);
        match outcome {
            DeliveryOutcome::Stored => self.counters.stored(event_type),
            DeliveryOutcome::Refused => self.counters.refused(event_type),
            DeliveryOutcome::GivenBack => {
                self.counters.requeued(event_type);
                self.acks.returned(tag);
                let options = BasicNackOptions { requeue: true, multiple: false };
                return self.channel.basic_nack(tag, options).await;
            }
        }
        // Together with others: each frame wakes lapin's thread, and makes the broker send one message by itself.
        self.acks.done(tag);
        Ok(())
    }

    async fn flush(&mut self) -> lapin::Result<()> {
        for ack in self.acks.take() {
            let options = BasicAckOptions { multiple: ack.multiple };
            self.channel.basic_ack(ack.tag, options).await?;
        }
        Ok(())
    }

    /// `open`: the channel still works, so what is stored meanwhile is acknowledged, and the rest goes back when the
    /// channel closes.
    async fn stop(&mut self, consumer: &Consumer, open: bool) {
        self.stop.cancel();
        if open {
            let cancel = self.channel.basic_cancel(consumer.tag(), BasicCancelOptions::default());
            let _ = timeout(CLOSE_TIMEOUT, cancel).await;
        }
        let drain = async {
            while let Some(stored) = self.stores.join_next().await {
                // Acknowledged one by one: the next may not be done in time.
                if let Ok(stored) = stored
                    && open
                    && (self.settle(stored).await.is_err() || self.flush().await.is_err())
                {
                    break;
                }
            }
            if open {
                let _ = self.flush().await;
            }
        };
        if timeout(DRAIN_TIMEOUT, drain).await.is_err() {
            warn!("jobs were still being stored; their notifications go back to the queue");
        }
        self.stores.abort_all();
    }
}

/// What became of a delivery.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum DeliveryOutcome {
    Stored,
    /// It can never be stored.
    Refused,
    /// Not stored yet: for another attempt, by us or another controller.
    GivenBack,
}

/// Hands an event to the sink until it is stored, `hold` is over or `stop` is called. Never panics, whatever the sink
/// does.
async fn store(
    sink: Arc<dyn Sink>,
    event: Event,
    meta: Meta,
    hold: Duration,
    timeouts: Timeouts,
    stop: CancellationToken,
) -> DeliveryOutcome {
    let until = Instant::now() + hold;
    let mut pause = timeouts.retry;
    for attempt in 1u32.. {
        let (sink, event, about) = (sink.clone(), event.clone(), meta.clone());
        let mut running = tokio::spawn(async move { sink.accept(event, about).await });
        let error = match timeout(timeouts.attempt, &mut running).await {
            Ok(Ok(Ok(()))) => return DeliveryOutcome::Stored,
            Ok(Ok(Err(error))) => error,
            Ok(Err(error)) => SinkError::new(error),
            Err(_) => {
                running.abort();
                SinkError::new(format!("not done within {} s", timeouts.attempt.as_secs()))
            }
        };
        let id = meta_id(&meta);
        if error.is_permanent() {
            error!(
                event_type = meta.event_type.as_str(),
                exchange = meta.exchange.as_str(),
                "notification {id} can never be stored and is dropped: {error}"
            );
            return DeliveryOutcome::Refused;
        }
        if stop.is_cancelled() {
            break;
        }
        if attempt == 1 {
            warn!(
                event_type = meta.event_type.as_str(),
                "notification {id} could not be stored, trying again: {error}"
            );
        }
        // The pause comes before giving it back too, or the broker would hand it out again at once.
        tokio::select! {
            () = stop.cancelled() => break,
            () = sleep(pause) => {}
        }
        if Instant::now() >= until {
            warn!(event_type = meta.event_type.as_str(), "notification {id} goes back to the queue: {error}");
            break;
        }
        pause = (pause * 2).min(timeouts.retry * 8);
    }
    DeliveryOutcome::GivenBack
}

fn meta_id(meta: &Meta) -> &str {
    meta.message_id.as_deref().unwrap_or("without an id")
}

/// kombu's header of that name, or the content encoding.
fn compression(delivery: &Delivery) -> Option<&str> {
    let headers = delivery.properties.headers().as_ref();
    match headers.and_then(|headers| headers.inner().get("compression")) {
        Some(AMQPValue::LongString(name)) => std::str::from_utf8(name.as_bytes()).ok().or(Some("?")),
        Some(AMQPValue::ShortString(name)) => Some(name.as_str()),
        Some(AMQPValue::Void) | None => delivery.properties.content_encoding().as_ref().map(|name| name.as_str()),
        Some(_) => Some("?"),
    }
}

/// How often a quorum queue has handed it out before.
fn rounds(delivery: &Delivery) -> i64 {
    let headers = delivery.properties.headers().as_ref();
    match headers.and_then(|headers| headers.inner().get("x-delivery-count")) {
        Some(AMQPValue::LongLongInt(count)) => *count,
        Some(AMQPValue::LongInt(count)) => i64::from(*count),
        _ => 0,
    }
}

async fn remember<T>(call: impl Future<Output = Result<T, BindingsError>>) -> Result<T, BindingsError> {
    match timeout(MEMORY_TIMEOUT, call).await {
        Ok(result) => result,
        Err(_) => Err(BindingsError::new(format!("no answer within {} s", MEMORY_TIMEOUT.as_secs()))),
    }
}

async fn call<T>(what: &'static str, call: impl Future<Output = lapin::Result<T>>) -> Result<T, SessionError> {
    match timeout(RPC_TIMEOUT, call).await {
        Ok(result) => result.map_err(|error| SessionError::Call { what, error }),
        Err(_) => Err(SessionError::CallTimeout { what }),
    }
}

/// What was logged when, so that the same thing does not fill the log.
#[derive(Default)]
struct LogThrottle(HashMap<String, (Instant, u64)>);

impl LogThrottle {
    /// Whether this is to be logged now, and then how many of the kind were not.
    fn due(&mut self, what: &str) -> Option<String> {
        if self.0.len() > 64 {
            self.0.clear();
        }
        match self.0.get_mut(what) {
            Some((since, kept)) if since.elapsed() < LOG_INTERVAL => {
                *kept += 1;
                None
            }
            Some((since, kept)) => {
                let more = std::mem::take(kept);
                *since = Instant::now();
                Some(format!(" (and {more} more for this reason)"))
            }
            None => {
                self.0.insert(what.to_owned(), (Instant::now(), 0));
                Some(String::new())
            }
        }
    }

    /// Connected: what stopped us before is worth a line when it comes again.
    fn forget(&mut self) {
        self.0.retain(|what, _| !what.contains(' '));
    }
}

/// `rbd_offload_notifications_total{outcome, event_type}` and `rbd_offload_notifications_rejected_total{reason}`.
struct Counters {
    /// Nearly all that comes, so looked up once.
    others_dropped: Counter,
}

impl Default for Counters {
    fn default() -> Self {
        // There from the start: an alert sees a counter grow from 0, not one that appears with 1.
        for event_type in [
            EventType::ImageCreate,
            EventType::ImageUpdate,
            EventType::ImageActivate,
            EventType::ImageDelete,
            EventType::VolumeUploadStart,
            EventType::InstanceSnapshotStart,
        ] {
            notifications("refused", event_type).increment(0);
        }
        Counters { others_dropped: notifications("dropped", EventType::Other) }
    }
}

fn notifications(outcome: &'static str, event_type: EventType) -> Counter {
    counter!("rbd_offload_notifications_total", "outcome" => outcome, "event_type" => event_type.as_str())
}

impl Counters {
    fn dropped(&self, event_type: EventType) {
        match event_type {
            EventType::Other => self.others_dropped.increment(1),
            _ => notifications("dropped", event_type).increment(1),
        }
    }

    fn stored(&self, event_type: EventType) {
        notifications("stored", event_type).increment(1);
    }

    fn refused(&self, event_type: EventType) {
        notifications("refused", event_type).increment(1);
    }

    fn requeued(&self, event_type: EventType) {
        notifications("requeued", event_type).increment(1);
    }

    fn unreadable(&self, reason: EnvelopeError) {
        notifications("unreadable", EventType::Other).increment(1);
        counter!("rbd_offload_notifications_rejected_total", "reason" => reason.label()).increment(1);
    }
}
