//! RabbitMQ, as the services and Ceilometer use it.

use std::collections::BTreeSet;
use std::time::Duration;

use lapin::options::{
    BasicGetOptions, BasicPublishOptions, ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions,
    QueueDeleteOptions,
};
use lapin::types::FieldTable;
use lapin::{BasicProperties, Channel, Connection, ConnectionProperties, ExchangeKind};
use serde_json::Value;

use super::lab;

pub struct Broker {
    _connection: Connection,
    channel: Channel,
}

impl Broker {
    pub async fn connect() -> Self {
        let url = format!("amqp{}", lab().amqp.strip_prefix("rabbit").unwrap());
        // the vhost `/`
        let url = format!("{}/%2f", url.trim_end_matches('/'));
        let connect = Connection::connect(&url, ConnectionProperties::default());
        let connection = tokio::time::timeout(Duration::from_secs(30), connect).await.unwrap().unwrap();
        let channel = connection.create_channel().await.unwrap();
        Self { _connection: connection, channel }
    }

    /// A queue that gets what `notifications.info` gets.
    pub async fn listen(&self, queue: &str, exchanges: &[&str]) {
        let options = QueueDeclareOptions { exclusive: true, ..QueueDeclareOptions::default() };
        self.channel.queue_declare(queue.into(), options, FieldTable::default()).await.unwrap();
        for exchange in exchanges {
            let bind = self.channel.queue_bind(
                queue.into(),
                (*exchange).into(),
                "notifications.info".into(),
                QueueBindOptions::default(),
                FieldTable::default(),
            );
            bind.await.unwrap();
        }
    }

    /// An exchange as a service declares it.
    pub async fn exchange(&self, name: &str) {
        let declare = self.channel.exchange_declare(
            name.into(),
            ExchangeKind::Topic,
            ExchangeDeclareOptions::default(),
            FieldTable::default(),
        );
        declare.await.unwrap();
    }

    /// Takes everything out of a queue.
    pub async fn drain(&self, queue: &str) -> Vec<Vec<u8>> {
        let mut bodies = Vec::new();
        while let Some(message) = self.channel.basic_get(queue.into(), BasicGetOptions { no_ack: true }).await.unwrap()
        {
            bodies.push(message.delivery.data);
        }
        bodies
    }

    /// The `message_id` of every notification in a queue, which is emptied.
    pub async fn message_ids(&self, queue: &str) -> BTreeSet<String> {
        self.drain(queue)
            .await
            .iter()
            .map(|body| {
                let envelope: Value = serde_json::from_slice(body).unwrap();
                let message: Value = serde_json::from_str(envelope["oslo.message"].as_str().unwrap()).unwrap();
                message["message_id"].as_str().unwrap().to_owned()
            })
            .collect()
    }

    pub async fn publish(&self, exchange: &str, routing_key: &str, body: &[u8], encoding: Option<&str>) {
        let mut properties = BasicProperties::default().with_content_type("application/json".into());
        if let Some(encoding) = encoding {
            properties = properties.with_content_encoding(encoding.into());
        }
        let publish = self.channel.basic_publish(
            exchange.into(),
            routing_key.into(),
            BasicPublishOptions::default(),
            body,
            properties,
        );
        publish.await.unwrap();
    }

    /// Messages that wait in a queue; `None`: there is no such queue.
    pub async fn count(&self, queue: &str) -> Option<u32> {
        let channel = self._connection.create_channel().await.unwrap();
        let options = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
        channel
            .queue_declare(queue.into(), options, FieldTable::default())
            .await
            .ok()
            .map(|queue| queue.message_count())
    }

    pub async fn delete(&self, queue: &str) {
        self.channel.queue_delete(queue.into(), QueueDeleteOptions::default()).await.unwrap();
    }
}
