//! The listener against a real RabbitMQ: what it declares and what it leaves alone, and that nothing is lost on the way
//! to the sink.
#![allow(clippy::unwrap_used, clippy::panic)]

#[path = "common/env.rs"]
mod env;
#[path = "common/tls_listener.rs"]
mod tls_listener;

use std::collections::BTreeSet;
use std::future::Future;
use std::io::Write;
use std::panic::{AssertUnwindSafe, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use futures::FutureExt;
use lapin::options::{
    BasicPublishOptions, ConfirmSelectOptions, ExchangeDeclareOptions, ExchangeDeleteOptions, QueueBindOptions,
    QueueDeclareOptions, QueueDeleteOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel, Connection, ConnectionProperties, ExchangeKind};
use rbd_offload::config::{Messaging, QueueType};
use rbd_offload::notification::{
    Binding, Bindings, BindingsError, BrokerStatus, Event, Listener, Meta, Permissions, Sink, SinkError, Timeouts,
    TransportUrl,
};
use serde_json::json;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use env::lab_var;
use tls_listener::{TlsListener, rabbitmqctl};

/// A broker of the lab, and names that no other test uses.
struct Broker {
    connection: Connection,
    id: String,
}

impl Broker {
    async fn connect() -> Broker {
        let url = TransportUrl::parse(&lab_var("RBDLAB_OFFLOAD_AMQP")).unwrap();
        let tls = lapin::tcp::OwnedTLSConfig {
            identity: None,
            cert_chain: url
                .tls
                .as_ref()
                .and_then(|tls| tls.ca_file.as_ref())
                .map(|path| std::fs::read_to_string(path).unwrap()),
        };
        let runtime = lapin::runtime::default_runtime().unwrap();
        let uri = url.amqp_uri(&url.hosts[0]);
        let connection =
            Connection::connect_uri_with_config(uri, ConnectionProperties::default(), tls, runtime).await.unwrap();
        Broker { connection, id: Uuid::new_v4().simple().to_string() }
    }

    fn queue(&self) -> String {
        format!("test-{}", self.id)
    }

    fn exchange(&self) -> String {
        format!("test-x-{}", self.id)
    }

    fn topic(&self) -> String {
        format!("test-notifications-{}", self.id)
    }

    fn config(&self) -> Messaging {
        Messaging {
            transport_url: lab_var("RBDLAB_OFFLOAD_AMQP").into(),
            queue: self.queue(),
            queue_type: QueueType::Quorum,
            queue_max_length: 1_000,
            queue_expires: Duration::from_secs(600),
            exchanges: vec![self.exchange()],
            topics: vec![self.topic()],
            prefetch: 128,
            ssl_ca_file: None,
            ssl_verify_hostname: true,
        }
    }

    async fn channel(&self) -> Channel {
        self.connection.create_channel().await.unwrap()
    }

    async fn declare_exchange(&self) {
        let options = ExchangeDeclareOptions::default();
        let (name, kind) = (self.exchange(), ExchangeKind::Topic);
        let channel = self.channel().await;
        channel.exchange_declare(name.as_str().into(), kind, options, FieldTable::default()).await.unwrap();
    }

    async fn exchange_exists(&self) -> bool {
        let options = ExchangeDeclareOptions { passive: true, ..ExchangeDeclareOptions::default() };
        let (name, kind) = (self.exchange(), ExchangeKind::Topic);
        let channel = self.channel().await;
        channel.exchange_declare(name.as_str().into(), kind, options, FieldTable::default()).await.is_ok()
    }

    /// Whether a declaration with these arguments is what exists.
    async fn queue_is(&self, config: &Messaging) -> bool {
        let mut arguments = FieldTable::default();
        arguments.insert("x-queue-type".into(), AMQPValue::LongString(config.queue_type.as_str().into()));
        if config.queue_max_length > 0 {
            arguments.insert("x-max-length".into(), AMQPValue::LongInt(config.queue_max_length.try_into().unwrap()));
            arguments.insert("x-overflow".into(), AMQPValue::LongString("drop-head".into()));
        }
        if !config.queue_expires.is_zero() {
            let milliseconds = config.queue_expires.as_millis().try_into().unwrap();
            arguments.insert("x-expires".into(), AMQPValue::LongInt(milliseconds));
        }
        let options = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
        let channel = self.channel().await;
        channel.queue_declare(self.queue().as_str().into(), options, arguments).await.is_ok()
    }

    /// Messages ready in a queue; not those that a consumer holds.
    async fn ready(&self, queue: &str) -> Option<u32> {
        let options = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
        let channel = self.channel().await;
        let queue = channel.queue_declare(queue.into(), options, FieldTable::default()).await.ok()?;
        Some(queue.message_count())
    }

    async fn publish_bytes(&self, channel: &Channel, body: &[u8], properties: BasicProperties) {
        let options = BasicPublishOptions::default();
        let (exchange, key) = (self.exchange(), format!("{}.info", self.topic()));
        channel
            .basic_publish(exchange.as_str().into(), key.as_str().into(), options, body, properties)
            .await
            .unwrap()
            .await
            .unwrap();
    }

    async fn publish(&self, body: &str) {
        let properties = BasicProperties::default().with_delivery_mode(2);
        self.publish_bytes(&self.confirming().await, body.as_bytes(), properties).await;
    }

    async fn confirming(&self) -> Channel {
        let channel = self.channel().await;
        channel.confirm_select(ConfirmSelectOptions::default()).await.unwrap();
        channel
    }

    async fn clean_up(&self) {
        for queue in [self.queue(), format!("{}.info", self.topic())] {
            let channel = self.channel().await;
            let _ = channel.queue_delete(queue.as_str().into(), QueueDeleteOptions::default()).await;
        }
        let channel = self.channel().await;
        let _ = channel.exchange_delete(self.exchange().as_str().into(), ExchangeDeleteOptions::default()).await;
    }
}

/// Runs a test with a broker, and deletes what it made, however it ends.
async fn with_broker<F: Future<Output = ()>>(test: impl FnOnce(Arc<Broker>) -> F) {
    let broker = Arc::new(Broker::connect().await);
    let result = AssertUnwindSafe(test(broker.clone())).catch_unwind().await;
    broker.clean_up().await;
    if let Err(panic) = result {
        resume_unwind(panic);
    }
}

/// A listener in the background; stops when dropped, without a goodbye.
struct Running {
    task: JoinHandle<()>,
    cancel: CancellationToken,
    status: Arc<BrokerStatus>,
}

impl Running {
    fn start(config: Messaging, sink: &Arc<Store>) -> Running {
        Running::with_bindings(config, sink, Arc::default())
    }

    fn with_bindings(config: Messaging, sink: &Arc<Store>, bindings: Arc<Remembered>) -> Running {
        let listener = Listener::new(config).unwrap().bindings(bindings).timeouts(Timeouts {
            hold: Duration::from_secs(2),
            hold_again: Duration::from_secs(2),
            attempt: Duration::from_secs(30),
            retry: Duration::from_millis(100),
            poll_interval: Duration::from_millis(200),
            bind_interval: Duration::from_secs(2),
        });
        let status = listener.status();
        let cancel = CancellationToken::new();
        let task = tokio::spawn(listener.run(sink.clone(), cancel.clone()));
        Running { task, cancel, status }
    }

    async fn bound(config: Messaging, sink: &Arc<Store>) -> Running {
        let running = Running::start(config, sink);
        running.consuming().await;
        // Binding follows consuming.
        tokio::time::sleep(Duration::from_millis(500)).await;
        running
    }

    async fn consuming(&self) {
        eventually("the listener consumes", async || self.status.get().connected()).await;
    }

    async fn stop(mut self) {
        self.cancel.cancel();
        tokio::time::timeout(Duration::from_secs(30), &mut self.task).await.unwrap().unwrap();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A store of events that can be told to fail or to hang.
#[derive(Default)]
struct Store {
    stored: Mutex<Vec<(Event, Meta)>>,
    calls: AtomicUsize,
    fail: AtomicBool,
    refuse: AtomicBool,
    hang: AtomicBool,
}

impl Store {
    fn images(&self) -> BTreeSet<Uuid> {
        let stored = self.stored.lock().unwrap();
        stored
            .iter()
            .map(|(event, _)| match event {
                Event::ImageDeleted { image_id } => *image_id,
                other => panic!("{other:?}"),
            })
            .collect()
    }
}

#[async_trait]
impl Sink for Store {
    async fn accept(&self, event: Event, meta: Meta) -> Result<(), SinkError> {
        self.calls.fetch_add(1, Ordering::SeqCst);
        while self.hang.load(Ordering::SeqCst) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        if self.fail.load(Ordering::SeqCst) {
            return Err(SinkError::new("the pool is away"));
        }
        if self.refuse.load(Ordering::SeqCst) {
            return Err(SinkError::permanent("the record is too large"));
        }
        self.stored.lock().unwrap().push((event, meta));
        Ok(())
    }
}

/// Bindings in memory. Can be told to be away.
#[derive(Debug, Default)]
struct Remembered {
    bindings: Mutex<BTreeSet<Binding>>,
    lock: Mutex<Option<String>>,
    away: AtomicBool,
}

impl Remembered {
    fn open(&self) -> Result<std::sync::MutexGuard<'_, BTreeSet<Binding>>, BindingsError> {
        match self.away.load(Ordering::SeqCst) {
            true => Err(BindingsError::new("the pool is away")),
            false => Ok(self.bindings.lock().unwrap()),
        }
    }

    fn exchanges(&self) -> BTreeSet<String> {
        self.bindings.lock().unwrap().iter().map(|binding| binding.exchange.clone()).collect()
    }
}

#[async_trait]
impl Bindings for Remembered {
    async fn all(&self) -> Result<BTreeSet<Binding>, BindingsError> {
        self.open().map(|bindings| bindings.clone())
    }

    async fn add(&self, new: &[Binding]) -> Result<(), BindingsError> {
        self.open().map(|mut bindings| bindings.extend(new.iter().cloned()))
    }

    async fn remove(&self, binding: &Binding) -> Result<(), BindingsError> {
        self.open().map(|mut bindings| {
            bindings.remove(binding);
        })
    }

    async fn lock(&self, holder: &str, _: Duration) -> Result<bool, BindingsError> {
        self.open().map(|_| self.lock.lock().unwrap().get_or_insert_with(|| holder.to_owned()) == holder)
    }

    async fn unlock(&self, holder: &str) -> Result<(), BindingsError> {
        self.open().map(|_| drop(self.lock.lock().unwrap().take_if(|held| held == holder)))
    }
}

async fn eventually(what: &str, check: impl AsyncFn() -> bool) {
    let until = Instant::now() + Duration::from_secs(40);
    while !check().await {
        assert!(Instant::now() < until, "not within 40 s: {what}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

fn message(event_type: &str, payload: serde_json::Value) -> String {
    let inner = json!({
        "message_id": Uuid::new_v4(), "publisher_id": "image.localhost", "event_type": event_type, "priority": "INFO",
        "payload": payload, "timestamp": "2026-11-20 17:55:03.810063", "_unique_id": Uuid::new_v4().simple().to_string(),
    });
    json!({"oslo.version": "2.0", "oslo.message": inner.to_string()}).to_string()
}

fn deletion(image: Uuid) -> String {
    message("image.delete", json!({"id": image, "status": "deleted"}))
}

/// Lines of the broker's log which say that there is no exchange of this name.
async fn complaints_about(exchange: String) -> usize {
    let locations = tokio::task::spawn_blocking(|| rabbitmqctl(&["-q", "eval", "rabbit:log_locations()."]));
    let locations = locations.await.unwrap();
    let paths = locations.split('"').filter(|path| path.starts_with('/'));
    let logs: Vec<String> =
        paths.map(|path| String::from_utf8_lossy(&std::fs::read(path).unwrap()).into_owned()).collect();
    let complaint = format!("no exchange '{exchange}'");
    logs.iter().flat_map(|log| log.lines()).filter(|line| line.contains(&complaint)).count()
}

/// Has the broker close the listener's connection, and no other.
async fn close_connection(queue: String) {
    tokio::task::spawn_blocking(move || {
        let name = format!("rbd-offload:{queue}");
        let until = Instant::now() + Duration::from_secs(30);
        loop {
            let list = rabbitmqctl(&["-q", "list_connections", "pid", "client_properties"]);
            if let Some(line) = list.lines().find(|line| line.contains(&name)) {
                rabbitmqctl(&["-q", "close_connection", line.split_whitespace().next().unwrap(), "a test"]);
                return;
            }
            assert!(Instant::now() < until, "the broker knows no connection {name}");
        }
    })
    .await
    .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_queue_has_the_configured_type_and_another_one_is_left_alone() {
    with_broker(|broker| async move {
        broker.declare_exchange().await;
        let store = Arc::new(Store::default());
        let running = Running::bound(broker.config(), &store).await;
        assert!(running.status.get().queue_declared);
        assert!(broker.queue_is(&broker.config()).await);
        let classic = Messaging { queue_type: QueueType::Classic, ..broker.config() };
        assert!(!broker.queue_is(&classic).await);
        running.stop().await;

        // Daemons that remember no binding of the queue: it may be another service's. The log says what to do, and the
        // daemon goes on once it is done.
        broker.publish(&deletion(Uuid::new_v4())).await;
        let running = Running::start(classic.clone(), &store);
        eventually("a second attempt", async || running.status.get().reconnects >= 2).await;
        let state = running.status.get();
        assert!(!state.connected() && !state.queue_declared);
        let problem = state.problem.clone().unwrap();
        assert!(problem.contains("queue_type = classic") && problem.contains("delete_queue"), "{problem}");
        assert_eq!(broker.ready(&broker.queue()).await, Some(1));
        assert!(store.images().is_empty());
        broker
            .channel()
            .await
            .queue_delete(broker.queue().as_str().into(), QueueDeleteOptions::default())
            .await
            .unwrap();
        running.consuming().await;
        assert!(broker.queue_is(&classic).await);
        running.stop().await;
    })
    .await;
}

/// Runs a test with a quorum queue and with a classic one.
async fn with_both_types<F: Future<Output = ()>>(test: impl Fn(Arc<Broker>, Messaging) -> F) {
    for queue_type in [QueueType::Quorum, QueueType::Classic] {
        with_broker(|broker| {
            let config = Messaging { queue_type, ..broker.config() };
            test(broker, config)
        })
        .await;
    }
}

/// The same queue as made before it had a limit.
fn unlimited(config: &Messaging) -> Messaging {
    Messaging { queue_max_length: 0, queue_expires: Duration::ZERO, ..config.clone() }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_queue_without_a_consumer_is_bounded_and_expires() {
    with_both_types(|broker, config| async move {
        broker.declare_exchange().await;
        let store = Arc::new(Store::default());
        let config = Messaging { queue_max_length: 5, queue_expires: Duration::from_secs(6), ..config };
        Running::bound(config.clone(), &store).await.stop().await;
        let images: Vec<Uuid> = (0..20).map(|_| Uuid::new_v4()).collect();
        for image in &images {
            broker.publish(&deletion(*image)).await;
        }
        eventually("five are kept", async || broker.ready(&broker.queue()).await == Some(5)).await;
        // the oldest are dropped
        let running = Running::start(config.clone(), &store);
        eventually("they are stored", async || store.images().len() == 5).await;
        assert_eq!(store.images(), images[15..].iter().copied().collect());
        running.stop().await;
        // not by a declaration, which counts as use
        let is_listed = async || {
            let list = tokio::task::spawn_blocking(|| rabbitmqctl(&["-q", "list_queues", "name"]));
            list.await.unwrap().contains(&broker.queue())
        };
        assert!(is_listed().await);
        eventually("the queue is gone", async || !is_listed().await).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_old_queue_is_emptied_and_then_replaced() {
    with_both_types(|broker, config| async move {
        broker.declare_exchange().await;
        let (store, remembered) = (Arc::new(Store::default()), Arc::new(Remembered::default()));
        let running = Running::with_bindings(unlimited(&config), &store, remembered.clone());
        let key = format!("{}.info", broker.topic());
        let bound = BTreeSet::from([(broker.exchange(), key)]);
        eventually("the old queue is bound", async || bindings_of(broker.queue()).await == bound).await;
        running.stop().await;
        let images: BTreeSet<Uuid> = (0..50).map(|_| Uuid::new_v4()).collect();
        for image in &images {
            broker.publish(&deletion(*image)).await;
        }

        // the sink cannot store yet: the queue stays
        store.fail.store(true, Ordering::SeqCst);
        let running = Running::with_bindings(config.clone(), &store, remembered.clone());
        eventually("they are tried", async || store.calls.load(Ordering::SeqCst) >= 50).await;
        assert!(broker.queue_is(&unlimited(&config)).await);
        store.fail.store(false, Ordering::SeqCst);
        eventually("all that waited is stored", async || store.images() == images).await;
        eventually("the queue is replaced", async || broker.queue_is(&config).await).await;
        eventually("the new queue is bound", async || bindings_of(broker.queue()).await == bound).await;
        let image = Uuid::new_v4();
        broker.publish(&deletion(image)).await;
        eventually("events come", async || store.images().contains(&image)).await;
        assert_eq!(running.status.get().reconnects, 0);
        running.stop().await;

        // with nothing in it, and back: at once
        let running = Running::with_bindings(unlimited(&config), &store, remembered);
        running.consuming().await;
        assert!(broker.queue_is(&unlimited(&config)).await);
        running.stop().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn in_a_rolling_restart_the_queue_is_replaced_when_the_last_old_daemon_stops() {
    with_both_types(|broker, config| async move {
        broker.declare_exchange().await;
        let remembered = Arc::new(Remembered::default());
        let (old_store, new_store) = (Arc::new(Store::default()), Arc::new(Store::default()));
        let old = Running::with_bindings(unlimited(&config), &old_store, remembered.clone());
        let key = format!("{}.info", broker.topic());
        let bound = BTreeSet::from([(broker.exchange(), key)]);
        eventually("the old queue is bound", async || bindings_of(broker.queue()).await == bound).await;

        // two that were restarted: the old one goes on, and they are not away
        let start = || Running::with_bindings(config.clone(), &new_store, remembered.clone());
        let new = [start(), start()];
        eventually("they stand by", async || new.iter().all(|one| one.status.get().standing_by)).await;
        assert!(new.iter().all(|one| one.status.get().connected()));
        let before: BTreeSet<Uuid> = (0..50).map(|_| Uuid::new_v4()).collect();
        for image in &before {
            broker.publish(&deletion(*image)).await;
        }
        eventually("the old one takes all", async || old_store.images() == before).await;
        assert!(broker.queue_is(&unlimited(&config)).await);

        old.stop().await;
        let consumes = |one: &Running| {
            let state = one.status.get();
            state.connected() && state.queue_declared && !state.standing_by
        };
        eventually("both consume the new queue", async || new.iter().all(consumes)).await;
        assert!(broker.queue_is(&config).await);
        eventually("the new queue is bound", async || bindings_of(broker.queue()).await == bound).await;
        let after: BTreeSet<Uuid> = (0..50).map(|_| Uuid::new_v4()).collect();
        for image in &after {
            broker.publish(&deletion(*image)).await;
        }
        eventually("they take all", async || new_store.images() == after).await;

        // one that was forgotten changes nothing
        let old = Running::with_bindings(unlimited(&config), &old_store, remembered.clone());
        eventually("it stands by", async || old.status.get().standing_by).await;
        assert!(broker.queue_is(&config).await && new.iter().all(consumes));
        old.stop().await;
        for one in new {
            one.stop().await;
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_exchange_is_not_created_and_bound_when_it_comes() {
    with_broker(|broker| async move {
        let store = Arc::new(Store::default());
        let begun = Instant::now();
        let running = Running::start(broker.config(), &store);
        let exchange = broker.exchange();
        eventually("the exchange is missed", async || running.status.get().missing_exchanges.contains(&exchange)).await;
        // every 2 s, not with each poll of the queue: each attempt to bind is an error in the broker's log
        tokio::time::sleep(Duration::from_secs(5)).await;
        let complaints = complaints_about(exchange.clone()).await;
        let most = usize::try_from(begun.elapsed().as_secs() / 2 + 1).unwrap();
        assert!((1..=most).contains(&complaints), "{complaints} of at most {most}");
        assert!(!broker.exchange_exists().await);
        let state = running.status.get();
        assert!(state.connected() && state.reconnects == 0);
        assert!(state.to_string().contains(&exchange), "{state}");

        broker.declare_exchange().await;
        eventually("the exchange is bound", async || running.status.get().missing_exchanges.is_empty()).await;
        let image = Uuid::new_v4();
        broker.publish(&deletion(image)).await;
        eventually("the event comes", async || store.images().contains(&image)).await;
        assert_eq!(running.status.get().reconnects, 0);

        // Deleted by another client and declared again: bound again, at the latest with the next binding of all.
        let channel = broker.channel().await;
        channel.exchange_delete(exchange.as_str().into(), ExchangeDeleteOptions::default()).await.unwrap();
        broker.declare_exchange().await;
        let image = Uuid::new_v4();
        eventually("the new exchange is bound", async || {
            broker.publish(&deletion(image)).await;
            store.images().contains(&image)
        })
        .await;
        running.stop().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_lost_when_the_broker_closes_the_connection() {
    with_broker(|broker| async move {
        broker.declare_exchange().await;
        let store = Arc::new(Store::default());
        let running = Running::bound(broker.config(), &store).await;
        let images: BTreeSet<Uuid> = (0..300).map(|_| Uuid::new_v4()).collect();
        let publisher = tokio::spawn({
            let (broker, images) = (broker.clone(), images.clone());
            async move {
                for image in images {
                    broker.publish(&deletion(image)).await;
                    broker.publish(&message("compute.instance.update", json!({"a": 1}))).await;
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            }
        });
        close_connection(broker.queue()).await;
        running.consuming().await;
        close_connection(broker.queue()).await;
        publisher.await.unwrap();
        eventually("all events", async || store.images() == images).await;
        assert!(running.status.get().reconnects >= 2);
        eventually("an empty queue", async || broker.ready(&broker.queue()).await == Some(0)).await;
        running.stop().await;
        assert_eq!(broker.ready(&broker.queue()).await, Some(0));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_sink_refuses_comes_again() {
    with_broker(|broker| async move {
        broker.declare_exchange().await;
        let store = Arc::new(Store::default());
        store.fail.store(true, Ordering::SeqCst);
        let running = Running::bound(broker.config(), &store).await;
        let image = Uuid::new_v4();
        broker.publish(&deletion(image)).await;
        // Longer than it is held: given back, and taken again.
        tokio::time::sleep(Duration::from_secs(4)).await;
        let calls = store.calls.load(Ordering::SeqCst);
        assert!((4..80).contains(&calls), "{calls} calls: neither once nor in a loop");
        store.fail.store(false, Ordering::SeqCst);
        eventually("the event is stored", async || store.images().contains(&image)).await;
        running.stop().await;
        assert_eq!(broker.ready(&broker.queue()).await, Some(0));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_is_acknowledged_only_when_it_is_stored() {
    with_broker(|broker| async move {
        broker.declare_exchange().await;
        let store = Arc::new(Store::default());
        store.hang.store(true, Ordering::SeqCst);
        let running = Running::bound(broker.config(), &store).await;
        let image = Uuid::new_v4();
        broker.publish(&deletion(image)).await;
        // Others pass meanwhile, and are acknowledged around it.
        for _ in 0..300 {
            broker.publish(&message("compute.instance.update", json!({}))).await;
        }
        eventually("the sink has it", async || store.calls.load(Ordering::SeqCst) == 1).await;
        eventually("the others are gone", async || broker.ready(&broker.queue()).await == Some(0)).await;
        // Gone without a word, in the middle of the store.
        tokio::time::sleep(Duration::from_millis(500)).await;
        drop(running);
        eventually("the one comes back", async || broker.ready(&broker.queue()).await == Some(1)).await;

        let store = Arc::new(Store::default());
        let running = Running::start(broker.config(), &store);
        eventually("the next listener stores it", async || store.images().contains(&image)).await;
        running.stop().await;
        assert_eq!(broker.ready(&broker.queue()).await, Some(0));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stored_event_is_acknowledged_though_nothing_follows_it() {
    with_broker(|broker| async move {
        broker.declare_exchange().await;
        let store = Arc::new(Store::default());
        let running = Running::bound(broker.config(), &store).await;
        let image = Uuid::new_v4();
        broker.publish(&deletion(image)).await;
        eventually("the event is stored", async || store.images().contains(&image)).await;
        tokio::time::sleep(Duration::from_millis(500)).await;
        // Gone without a word: what was not acknowledged comes back.
        drop(running);
        tokio::time::sleep(Duration::from_secs(2)).await;
        assert_eq!(broker.ready(&broker.queue()).await, Some(0));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_waits_for_what_is_being_stored() {
    with_broker(|broker| async move {
        broker.declare_exchange().await;
        let store = Arc::new(Store::default());
        store.hang.store(true, Ordering::SeqCst);
        let running = Running::bound(broker.config(), &store).await;
        let image = Uuid::new_v4();
        broker.publish(&deletion(image)).await;
        eventually("the sink has it", async || store.calls.load(Ordering::SeqCst) == 1).await;
        let release = tokio::spawn({
            let store = store.clone();
            async move {
                tokio::time::sleep(Duration::from_secs(1)).await;
                store.hang.store(false, Ordering::SeqCst);
            }
        });
        running.stop().await;
        release.await.unwrap();
        assert!(store.images().contains(&image));
        assert_eq!(broker.ready(&broker.queue()).await, Some(0));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_queue_of_other_consumers_is_left_alone() {
    with_broker(|broker| async move {
        broker.declare_exchange().await;
        // As a publisher of oslo.messaging declares it: named like the routing key.
        let theirs = format!("{}.info", broker.topic());
        let channel = broker.channel().await;
        let options = QueueDeclareOptions::default();
        channel.queue_declare(theirs.as_str().into(), options, FieldTable::default()).await.unwrap();
        channel
            .queue_bind(
                theirs.as_str().into(),
                broker.exchange().as_str().into(),
                theirs.as_str().into(),
                QueueBindOptions::default(),
                FieldTable::default(),
            )
            .await
            .unwrap();
        let store = Arc::new(Store::default());
        let running = Running::bound(broker.config(), &store).await;
        for _ in 0..20 {
            broker.publish(&deletion(Uuid::new_v4())).await;
        }
        eventually("all events", async || store.images().len() == 20).await;
        running.stop().await;
        assert_eq!(broker.ready(&theirs).await, Some(20));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_password_is_reported_and_retried() {
    with_broker(|broker| async move {
        let right = TransportUrl::parse(&lab_var("RBDLAB_OFFLOAD_AMQP")).unwrap();
        let (_, query) = lab_var("RBDLAB_OFFLOAD_AMQP")
            .split_once('?')
            .map(|(url, query)| (url.to_owned(), format!("?{query}")))
            .unwrap_or_default();
        let host = &right.hosts[0];
        let config = Messaging {
            transport_url: format!("rabbit://{}:hunter2@{host}/{query}", host.user).into(),
            ..broker.config()
        };
        let store = Arc::new(Store::default());
        let running = Running::start(config, &store);
        eventually("a second attempt", async || running.status.get().reconnects >= 2).await;
        let state = running.status.get();
        let problem = state.problem.clone().unwrap();
        assert!(problem.contains("wrong user or password") && problem.contains("transport_url"), "{problem}");
        assert!(!format!("{state:?} {state} {:?}", running.status).contains("hunter2"));
        assert!(!state.connected());
        running.stop().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_for_another_name_is_told_and_can_be_allowed() {
    with_broker(|broker| async move {
        let listener = tokio::task::spawn_blocking(TlsListener::start).await.unwrap();
        let store = Arc::new(Store::default());
        let config = |ca: &str, ssl_verify_hostname| Messaging {
            transport_url: listener.transport_url().into(),
            ssl_ca_file: Some(listener.file(ca)),
            ssl_verify_hostname,
            ..broker.config()
        };
        let problem = async |config: Messaging| {
            let running = Running::start(config, &store);
            eventually("a second attempt", async || running.status.get().reconnects >= 2).await;
            let state = running.status.get();
            assert!(!state.connected());
            running.stop().await;
            state.problem.unwrap()
        };
        let named = problem(config("ca.pem", true)).await;
        assert!(named.contains("not for that name") && named.contains("ssl_verify_hostname = false"), "{named}");

        let running = Running::start(config("ca.pem", false), &store);
        running.consuming().await;
        running.stop().await;

        // the authority, the purpose and the time are verified all the same
        let unknown = problem(config("other-ca.pem", false)).await;
        assert!(unknown.contains("UnknownIssuer"), "{unknown}");
        for (certificate, reason) in [("client.pem", "key usage"), ("expired.pem", "expired")] {
            let listener = tokio::task::spawn_blocking(|| TlsListener::start_with(certificate)).await.unwrap();
            let refused = problem(Messaging {
                transport_url: listener.transport_url().into(),
                ssl_ca_file: Some(listener.file("ca.pem")),
                ssl_verify_hostname: false,
                ..broker.config()
            });
            let refused = refused.await.to_lowercase();
            assert!(refused.contains(reason), "{certificate}: {refused}");
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_next_host_is_tried_when_one_is_away() {
    with_broker(|broker| async move {
        broker.declare_exchange().await;
        let url = lab_var("RBDLAB_OFFLOAD_AMQP");
        let dead = url.replacen("://", "://guest:guest@127.0.0.1:1,guest:guest@[::1]:1,", 1);
        let config = Messaging { transport_url: dead.into(), ..broker.config() };
        let store = Arc::new(Store::default());
        let started = Instant::now();
        let running = Running::start(config, &store);
        running.consuming().await;
        assert!(started.elapsed() < Duration::from_secs(15), "the others are tried without a pause");
        running.stop().await;
    })
    .await;
}

/// The broker's `consumer_timeout` of 15 s for channels that are opened from now on, until it is dropped. Other tests
/// hold a delivery for less.
struct ShortConsumerTimeout;

impl ShortConsumerTimeout {
    async fn set() -> Self {
        let settings = "application:set_env(rabbit, consumer_timeout, 15000), \
                        application:set_env(rabbit, channel_tick_interval, 1000).";
        tokio::task::spawn_blocking(|| rabbitmqctl(&["-q", "eval", settings])).await.unwrap();
        Self
    }
}

impl Drop for ShortConsumerTimeout {
    fn drop(&mut self) {
        let defaults = "application:set_env(rabbit, consumer_timeout, 1800000), \
                        application:set_env(rabbit, channel_tick_interval, 60000).";
        rabbitmqctl(&["-q", "eval", defaults]);
    }
}

async fn hold_beyond_the_consumer_timeout(queue_type: QueueType) {
    with_broker(|broker| async move {
        broker.declare_exchange().await;
        let store = Arc::new(Store::default());
        store.hang.store(true, Ordering::SeqCst);
        let running = Running::bound(Messaging { queue_type, ..broker.config() }, &store).await;
        let image = Uuid::new_v4();
        broker.publish(&deletion(image)).await;
        eventually("the sink has it", async || store.calls.load(Ordering::SeqCst) == 1).await;
        // a broker of version 4.3 or later has no such limit for classic queues
        if queue_type == QueueType::Quorum {
            eventually("the broker ends the consumer, and the sink has it again", async || {
                store.calls.load(Ordering::SeqCst) >= 2
            })
            .await;
        } else {
            tokio::time::sleep(Duration::from_secs(20)).await;
        }
        store.hang.store(false, Ordering::SeqCst);
        eventually("it is stored", async || store.images().contains(&image)).await;
        let next = Uuid::new_v4();
        broker.publish(&deletion(next)).await;
        eventually("the next one is stored", async || store.images().contains(&next)).await;
        running.stop().await;
        assert_eq!(broker.ready(&broker.queue()).await, Some(0));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_delivery_that_was_held_too_long_comes_again_and_the_listener_goes_on() {
    let _short = ShortConsumerTimeout::set().await;
    tokio::join!(
        hold_beyond_the_consumer_timeout(QueueType::Quorum),
        hold_beyond_the_consumer_timeout(QueueType::Classic)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_queue_is_declared_again() {
    with_both_types(|broker, config| async move {
        broker.declare_exchange().await;
        let store = Arc::new(Store::default());
        let running = Running::bound(config, &store).await;
        broker
            .channel()
            .await
            .queue_delete(broker.queue().as_str().into(), QueueDeleteOptions::default())
            .await
            .unwrap();
        eventually("the queue is back", async || broker.ready(&broker.queue()).await.is_some()).await;
        let image = Uuid::new_v4();
        eventually("events come", async || {
            broker.publish(&deletion(image)).await;
            store.images().contains(&image)
        })
        .await;
        running.stop().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn unreadable_bodies_are_counted_and_compressed_ones_are_read() {
    with_broker(|broker| async move {
        broker.declare_exchange().await;
        let store = Arc::new(Store::default());
        let running = Running::bound(broker.config(), &store).await;
        let channel = broker.confirming().await;
        let mut headers = FieldTable::default();
        headers.insert("compression".into(), AMQPValue::LongString("application/x-gzip".into()));
        let compressed = BasicProperties::default().with_content_encoding("utf-8".into()).with_headers(headers);

        for body in [&b""[..], b"nonsense", b"\xff\xff", b"{\"oslo.version\": \"1.0\", \"oslo.message\": \"{}\"}"] {
            broker.publish_bytes(&channel, body, BasicProperties::default()).await;
        }
        broker.publish_bytes(&channel, b"not compressed", compressed.clone()).await;
        let image = Uuid::new_v4();
        let mut zlib = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::default());
        zlib.write_all(deletion(image).as_bytes()).unwrap();
        broker.publish_bytes(&channel, &zlib.finish().unwrap(), compressed).await;

        eventually("the compressed event", async || store.images().contains(&image)).await;
        assert_eq!(running.status.get().reconnects, 0);
        running.stop().await;
        assert_eq!(broker.ready(&broker.queue()).await, Some(0));
    })
    .await;
}

/// What the broker says: exchange and routing key of each binding of the queue but its own name.
async fn bindings_of(queue: String) -> BTreeSet<(String, String)> {
    let list = tokio::task::spawn_blocking(|| {
        rabbitmqctl(&["-q", "list_bindings", "source_name", "destination_name", "routing_key", "--no-table-headers"])
    });
    let list = list.await.unwrap();
    list.lines()
        .filter_map(|line| {
            let mut words = line.split('\t');
            let (source, destination, key) = (words.next()?, words.next()?, words.next()?);
            (destination == queue && !source.is_empty()).then(|| (source.to_owned(), key.to_owned()))
        })
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_binding_that_the_configuration_no_longer_names_is_removed() {
    with_broker(|broker| async move {
        broker.declare_exchange().await;
        let store = Arc::new(Store::default());
        let remembered = Arc::new(Remembered::default());
        let key = format!("{}.info", broker.topic());
        // amq.topic is always there; an exchange that never comes is remembered too, and nothing is made of it
        let wide = Messaging {
            exchanges: vec![broker.exchange(), "amq.topic".into(), format!("never-{}", broker.exchange())],
            ..broker.config()
        };
        let running = Running::with_bindings(wide, &store, remembered.clone());
        let both = BTreeSet::from([(broker.exchange(), key.clone()), ("amq.topic".to_owned(), key.clone())]);
        eventually("both are bound", async || bindings_of(broker.queue()).await == both).await;
        running.stop().await;

        // the memory is away: nothing is lost of what is bound, and nothing is forgotten
        remembered.away.store(true, Ordering::SeqCst);
        let running = Running::with_bindings(broker.config(), &store, remembered.clone());
        running.consuming().await;
        let image = Uuid::new_v4();
        broker.publish(&deletion(image)).await;
        eventually("it is stored", async || store.images().contains(&image)).await;
        assert_eq!(bindings_of(broker.queue()).await, both);
        running.stop().await;

        remembered.away.store(false, Ordering::SeqCst);
        let running = Running::with_bindings(broker.config(), &store, remembered.clone());
        let one = BTreeSet::from([(broker.exchange(), key.clone())]);
        eventually("one is bound", async || bindings_of(broker.queue()).await == one).await;
        eventually("one is remembered", async || remembered.exchanges() == BTreeSet::from([broker.exchange()])).await;
        assert!(running.status.get().connected());
        running.stop().await;

        // another topic is another binding
        let other = Messaging { topics: vec![format!("{}-2", broker.topic())], ..broker.config() };
        let running = Running::with_bindings(other, &store, remembered.clone());
        let two = BTreeSet::from([(broker.exchange(), format!("{}-2.info", broker.topic()))]);
        eventually("the other is bound", async || bindings_of(broker.queue()).await == two).await;
        running.stop().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_can_never_be_stored_is_dropped_and_not_redelivered() {
    with_broker(|broker| async move {
        broker.declare_exchange().await;
        let store = Arc::new(Store::default());
        let running = Running::bound(broker.config(), &store).await;
        store.refuse.store(true, Ordering::SeqCst);
        broker.publish(&deletion(Uuid::new_v4())).await;
        eventually("it was tried", async || store.calls.load(Ordering::SeqCst) > 0).await;
        // what comes after it is stored, and nothing waits in the queue or comes again
        store.refuse.store(false, Ordering::SeqCst);
        let image = Uuid::new_v4();
        broker.publish(&deletion(image)).await;
        eventually("the next is stored", async || store.images().contains(&image)).await;
        running.stop().await;
        eventually("the queue is empty", async || broker.ready(&broker.queue()).await == Some(0)).await;
        assert_eq!((store.calls.load(Ordering::SeqCst), store.images().len()), (2, 1));
    })
    .await;
}

/// A user with what `check` proposes, on names that would match others as unescaped expressions.
#[tokio::test(flavor = "multi_thread")]
async fn the_least_permissions_suffice_and_allow_nothing_else() {
    with_broker(|broker| async move {
        let (user, queue) = (format!("least.{}", broker.id), format!("{}.q", broker.queue()));
        let dotted = format!("{}.x", broker.exchange());
        let declare = |name: String| {
            let broker = broker.clone();
            async move {
                let (kind, options) = (ExchangeKind::Topic, ExchangeDeclareOptions::default());
                let channel = broker.channel().await;
                channel.exchange_declare(name.as_str().into(), kind, options, FieldTable::default()).await.unwrap();
            }
        };
        declare(dotted.clone()).await;
        let config = Messaging {
            transport_url: {
                let url = TransportUrl::parse(&lab_var("RBDLAB_OFFLOAD_AMQP")).unwrap();
                format!("rabbit://{user}:least@{}:{}/", url.hosts[0].name, url.hosts[0].port).into()
            },
            queue: queue.clone(),
            exchanges: vec![dotted.clone()],
            ..broker.config()
        };
        let permissions = Permissions::of(&config);
        rabbitmqctl(&["-q", "add_user", &user, "least"]);
        let Permissions { configure, write, read } = &permissions;
        rabbitmqctl(&["-q", "set_permissions", "-p", "/", &user, configure, write, read]);

        let store = Arc::new(Store::default());
        let running = Running::start(config.clone(), &store);
        let bound = BTreeSet::from([(dotted.clone(), format!("{}.info", broker.topic()))]);
        eventually("the queue is bound", async || bindings_of(queue.clone()).await == bound).await;
        assert!(running.status.get().connected());
        running.stop().await;

        // a dot stands for a dot
        let elsewhere = Messaging { queue: queue.replace('.', "-"), ..config.clone() };
        let running = Running::start(elsewhere, &store);
        eventually("refused", async || running.status.get().problem.is_some()).await;
        let problem = running.status.get().problem.unwrap();
        assert!(problem.contains("rabbitmqctl set_permissions -p / ") && problem.contains(r"\.x)$"), "{problem}");
        running.stop().await;

        let channel = broker.channel().await;
        let _ = channel.queue_delete(queue.as_str().into(), QueueDeleteOptions::default()).await;
        let _ = channel.exchange_delete(dotted.as_str().into(), ExchangeDeleteOptions::default()).await;
        rabbitmqctl(&["-q", "delete_user", &user]);
    })
    .await;
}
