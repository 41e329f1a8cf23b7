//! RabbitMQ: each host of transport_url, the queue, the exchanges.

use std::time::Duration;

use lapin::options::ExchangeDeclareOptions;
use lapin::protocol::{AMQPHardError, AMQPSoftError};
use lapin::types::FieldTable;
use lapin::{Connection, ExchangeKind};
use secrecy::ExposeSecret;

use super::report::{CheckResult, Verdict};
use super::within;
use crate::config::{Config, Messaging};
use crate::notification::connect::{self, WRONG_NAME_REMEDY};
use crate::notification::queue::{self as own_queue, Depth};
use crate::notification::{Host, Permissions, TransportUrl, is_hard_error, is_soft_error};

/// Between two polls of a queue that a daemon consumes.
const GROWTH: Duration = Duration::from_secs(1);

/// Messages that a daemon which keeps up never leaves waiting.
const MANY: u32 = 1000;

pub async fn check(config: &Config) -> Vec<CheckResult> {
    let url = match TransportUrl::parse(config.messaging.transport_url.expose_secret()) {
        Ok(url) => url,
        Err(error) => {
            return vec![CheckResult::fault("RabbitMQ", error.to_string(), "fix transport_url in [messaging]")];
        }
    };
    let checked = url.hosts.iter().map(|host| check_host(&config.messaging, &url, host));
    let (mut rows, connections): (Vec<CheckResult>, Vec<Option<Connection>>) =
        futures::future::join_all(checked).await.into_iter().unzip();
    let connections: Vec<Connection> = connections.into_iter().flatten().collect();
    match connections.first() {
        Some(connection) => {
            let exchanges = config.messaging.exchanges.iter().map(|name| check_exchange(connection, config, name));
            let (queue, exchanges) =
                tokio::join!(check_queue(connection, config), futures::future::join_all(exchanges));
            rows.push(queue);
            rows.extend(accept_either_cinder_exchange(config, exchanges));
        }
        None => {
            const WHY: &str = "no connection to RabbitMQ";
            rows.push(CheckResult::skipped(queue_name(config), WHY));
            rows.extend(config.messaging.exchanges.iter().map(|name| CheckResult::skipped(exchange_name(name), WHY)));
        }
    }
    for connection in connections {
        let _ = tokio::time::timeout(Duration::from_secs(2), connection.close(200, "".into())).await;
    }
    rows
}

fn queue_name(config: &Config) -> String {
    format!("RabbitMQ queue {}", config.messaging.queue)
}

fn exchange_name(exchange: &str) -> String {
    format!("RabbitMQ exchange {exchange}")
}

/// Connects, authenticates and opens the virtual host.
async fn check_host(config: &Messaging, url: &TransportUrl, host: &Host) -> (CheckResult, Option<Connection>) {
    let name = format!("RabbitMQ {host}");
    let mut connected = None;
    let row = within(&name, "see whether the broker runs, and whether a firewall drops the packets", async || {
        let attempt = match connect::connect(url, host, config, "rbd-offload check".into()).await {
            Ok(attempt) => attempt,
            Err(error) => {
                return CheckResult::fault(
                    &name,
                    error.to_string(),
                    "fix ssl_ca_file in [messaging] or ssl_* in transport_url",
                );
            }
        };
        match attempt.await {
            Ok(Ok(connection)) => {
                connected = Some(connection);
                CheckResult::ok(&name, format!("user {}, virtual host {}", host.user, url.vhost))
            }
            Ok(Err(error)) => refused(&name, config, url, host, &error),
            Err(lost) => CheckResult::fault(&name, lost.to_string(), "try again").transient_if(true),
        }
    })
    .await;
    (row, connected)
}

fn refused(name: &str, config: &Messaging, url: &TransportUrl, host: &Host, error: &lapin::Error) -> CheckResult {
    let (user, vhost) = (&host.user, &url.vhost);
    if is_soft_error(error, AMQPSoftError::ACCESSREFUSED) {
        return CheckResult::fault(
            name,
            format!("wrong user or password: RabbitMQ refused user {user}"),
            format!("fix transport_url in [messaging]; `rabbitmqctl authenticate_user {user}` tries a password"),
        );
    }
    if is_hard_error(error, AMQPHardError::NOTALLOWED) {
        return match error.to_string().contains("not found") {
            true => CheckResult::fault(
                name,
                format!("there is no virtual host {vhost}"),
                "name the virtual host of the services at the end of transport_url in [messaging]; `rabbitmqctl list_vhosts` has them",
            ),
            false => CheckResult::fault(
                name,
                format!("user {user} may not use the virtual host {vhost}"),
                Permissions::of(config).command(user, vhost),
            ),
        };
    }
    if connect::is_wrong_name(error) {
        return CheckResult::fault(name, format!("its certificate is for other names: {error}"), WRONG_NAME_REMEDY);
    }
    let remedy = match url.tls {
        Some(_) => "see whether the broker runs and takes TLS on that port, and whether ssl_ca_file holds its CA",
        None => "see whether the broker runs there (port 5672, with ssl=1 in transport_url 5671)",
    };
    CheckResult::fault(name, format!("cannot be reached: {error}"), remedy).transient_if(true)
}

async fn check_queue(connection: &Connection, config: &Config) -> CheckResult {
    let name = queue_name(config);
    let row =
        within(&name, "see `rabbitmqctl list_queues name state`: its node may be down", async || match compare_queue(
            connection, config,
        )
        .await
        {
            Ok(row) if row.verdict == Verdict::Ok => shared_by_deployments(config).unwrap_or(row),
            Ok(row) => row,
            Err(error) if is_soft_error(&error, AMQPSoftError::ACCESSREFUSED) => denied(&name, config, &error),
            Err(error) => CheckResult::fault(&name, error.to_string(), "see the broker's log").transient_if(true),
        });
    row.await
}

fn denied(name: &str, config: &Config, error: &lapin::Error) -> CheckResult {
    CheckResult::fault(
        name,
        format!("not allowed: {error}"),
        match TransportUrl::parse(config.messaging.transport_url.expose_secret()) {
            Ok(url) => format!(
                "give the user these permissions ({}): {}",
                Permissions::REPLACES,
                Permissions::of(&config.messaging)
                    .command(url.hosts.first().map_or("USER", |host| &host.user), &url.vhost)
            ),
            Err(error) => format!("fix transport_url in [messaging]: {error}"),
        },
    )
}

async fn compare_queue(connection: &Connection, config: &Config) -> lapin::Result<CheckResult> {
    let (name, queue) = (queue_name(config), &config.messaging.queue);
    let Some(depth) = depth(connection, queue).await? else {
        return Ok(CheckResult::ok(name, "not there yet; the daemon makes it when it first starts"));
    };
    // It is there: declared as configured, that changes nothing, or is refused.
    let wanted = config.messaging.queue_type.as_str();
    if let Some(error) = own_queue::declare(&connection.create_channel().await?, &config.messaging).await? {
        let remedy = match depth.consumers {
            0 => "start the daemon: it takes the messages that wait, and replaces a queue of its own",
            _ => "restart all daemons with the same [messaging]: the last restart lets one of them replace the queue",
        };
        return Ok(CheckResult::fault(
            name,
            format!("it exists with other arguments than {}: {error}", own_queue::described(&config.messaging)),
            format!(
                "{remedy}. Or set the keys to what it is, name another queue, or `rabbitmqctl delete_queue {queue}`, \
                 whose requests the reconciler finds"
            ),
        ));
    }
    if depth.consumers > 0 && depth.messages > MANY {
        tokio::time::sleep(GROWTH).await;
        let later = self::depth(connection, queue).await?.map_or(0, |depth| depth.messages);
        if later > depth.messages {
            return Ok(CheckResult::fault(
                name,
                format!("{later} messages wait and more come than its {} consumers take", depth.consumers),
                "see the daemon's log: most often Ceph does not take the jobs",
            ));
        }
    }
    Ok(classify(name, wanted, &depth))
}

/// A queue that several deployments consume: each takes notifications that are for another one.
fn shared_by_deployments(config: &Config) -> Option<CheckResult> {
    let is_default = config.messaging.queue == "rbd-offload";
    (is_default && !config.offload.decline_after.is_zero()).then(|| {
        CheckResult::warning(
            queue_name(config),
            "other deployments may consume this queue too, and then a request waits for a reconciler \
             ([offload] decline_after says that there are others)",
            "give each deployment a [messaging] queue of its own, such as rbd-offload-<name of the Ceph cluster>",
        )
    })
}

fn classify(name: String, wanted: &str, depth: &Depth) -> CheckResult {
    let Depth { messages, consumers } = depth;
    match (consumers, messages) {
        (0, 0) => CheckResult::ok(name, format!("{wanted}, empty; no daemon consumes it")),
        (0, _) => CheckResult::fault(
            name,
            format!("its messages grow: {messages} wait and no daemon consumes them"),
            "start the daemon (systemctl start rbd-offload), or delete the queue where none is to run any more",
        ),
        _ => CheckResult::ok(name, format!("{wanted}; {messages} messages, {consumers} consumers")),
    }
}

/// `None`: there is no such queue. On a channel of its own, since a refusal closes it.
async fn depth(connection: &Connection, queue: &str) -> lapin::Result<Option<Depth>> {
    own_queue::depth(&connection.create_channel().await?, queue).await
}

async fn check_exchange(connection: &Connection, config: &Config, exchange: &str) -> CheckResult {
    let name = exchange_name(exchange);
    within(&name, "see the broker's log", async || {
        let passive = ExchangeDeclareOptions { passive: true, ..ExchangeDeclareOptions::default() };
        let declared = async {
            let channel = connection.create_channel().await?;
            channel.exchange_declare(exchange.into(), ExchangeKind::Topic, passive, FieldTable::default()).await
        };
        match declared.await {
            Ok(()) => CheckResult::ok(&name, ""),
            Err(error) if is_soft_error(&error, AMQPSoftError::NOTFOUND) => missing(&name, exchange, config),
            Err(error) if is_soft_error(&error, AMQPSoftError::ACCESSREFUSED) => denied(&name, config, &error),
            Err(error) => CheckResult::fault(&name, error.to_string(), "see the broker's log").transient_if(true),
        }
    })
    .await
}

/// Nothing is lost by an exchange that only an integration which is off would need.
fn missing(name: &str, exchange: &str, config: &Config) -> CheckResult {
    let (service, needed) = match exchange {
        "glance" => ("Glance", true),
        "cinder" | "openstack" => ("Cinder (control_exchange, openstack by default)", config.cinder.integration),
        "nova" => ("Nova", config.nova.integration),
        _ => ("the service with control_exchange = that name", true),
    };
    let remedy = format!(
        "{service} creates it with its first notification: set driver = messagingv2 in its [oslo_messaging_notifications] \
         and restart it; if there is none of that name, take it out of exchanges in [messaging]"
    );
    match needed {
        true => CheckResult::fault(name, "does not exist: no notification of it can come", remedy),
        false => CheckResult::warning(name, "does not exist; not needed now", remedy),
    }
}

/// Cinder uses one of two names: with its exchange there, the other one is not missed.
fn accept_either_cinder_exchange(config: &Config, mut rows: Vec<CheckResult>) -> Vec<CheckResult> {
    let cinders: Vec<usize> = (0..rows.len())
        .filter(|index| {
            matches!(config.messaging.exchanges.get(*index).map(String::as_str), Some("cinder" | "openstack"))
        })
        .collect();
    if cinders.iter().any(|index| rows[*index].verdict == Verdict::Ok) {
        for index in cinders {
            if rows[index].verdict == Verdict::Fault && rows[index].detail.starts_with("does not exist") {
                rows[index].verdict = Verdict::Warning;
            }
        }
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_queue_without_a_consumer_is_a_fault_once_messages_wait() {
        let classify = |messages, consumers| classify("q".into(), "quorum", &Depth { messages, consumers });
        assert_eq!(classify(0, 0).verdict, Verdict::Ok);
        assert_eq!(classify(5, 1).verdict, Verdict::Ok);
        let row = classify(5, 0);
        assert_eq!(row.verdict, Verdict::Fault);
        assert!(row.detail.contains("5 wait"), "{row:?}");
    }
}
