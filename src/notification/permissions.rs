//! What the daemon's user must be allowed to do in RabbitMQ: the least that suffices.

use std::collections::BTreeSet;

use crate::config::Messaging;

/// The three regular expressions of `rabbitmqctl set_permissions`.
///
/// Declaring and deleting the queue takes `configure` on it, binding and unbinding it `write` on it and `read` on the
/// exchange, consuming it `read` on it. Nothing is published, and no exchange is declared.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Permissions {
    pub configure: String,
    pub write: String,
    pub read: String,
}

impl Permissions {
    /// What an operator has to know before running the command.
    pub const REPLACES: &str = "the command replaces the user's permissions: only for a user of rbd-offload's own";

    pub fn of(config: &Messaging) -> Self {
        let queue = format!("^{}$", escape(&config.queue));
        let exchanges: BTreeSet<&str> = config.exchanges.iter().map(String::as_str).collect();
        let readable: Vec<String> = std::iter::once(config.queue.as_str()).chain(exchanges).map(escape).collect();
        Self { configure: queue.clone(), write: queue, read: format!("^({})$", readable.join("|")) }
    }

    /// The command that grants them, ready for a shell.
    pub fn command(&self, user: &str, vhost: &str) -> String {
        let quoted = [vhost, user, &self.configure, &self.write, &self.read].map(quote).join(" ");
        format!("rabbitmqctl set_permissions -p {quoted}")
    }
}

/// `name` as a regular expression that matches that name alone. RabbitMQ's are those of PCRE.
fn escape(name: &str) -> String {
    let mut pattern = String::with_capacity(name.len());
    for c in name.chars() {
        if matches!(c, '.' | '+' | '*' | '?' | '(' | ')' | '[' | ']' | '{' | '}' | '|' | '^' | '$' | '\\') {
            pattern.push('\\');
        }
        pattern.push(c);
    }
    pattern
}

/// One word of a shell's command.
fn quote(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '/' | '-' | '_' | '.' | ':' | '@');
    match !word.is_empty() && word.chars().all(plain) {
        true => word.to_owned(),
        false => format!("'{}'", word.replace('\'', r"'\''")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::QueueType;

    fn of(queue: &str, exchanges: &[&str]) -> Permissions {
        Permissions::of(&Messaging {
            transport_url: "rabbit://h/".to_owned().into(),
            queue: queue.into(),
            queue_type: QueueType::Quorum,
            queue_max_length: 0,
            queue_expires: std::time::Duration::ZERO,
            exchanges: exchanges.iter().map(ToString::to_string).collect(),
            topics: vec!["notifications".into()],
            prefetch: 1,
            ssl_ca_file: None,
            ssl_verify_hostname: true,
        })
    }

    #[test]
    fn the_own_queue_and_reading_the_exchanges_is_all() {
        assert_eq!(
            of("rbd-offload", &["glance", "openstack", "glance"]).command("rbd-offload", "/"),
            "rabbitmqctl set_permissions -p / rbd-offload '^rbd-offload$' '^rbd-offload$' \
             '^(rbd-offload|glance|openstack)$'"
        );
    }

    #[test]
    fn names_are_escaped_for_the_expression_and_for_the_shell() {
        let odd = of("rbd.offload+1", &["a.b(c)|d"]);
        assert_eq!(odd.configure, r"^rbd\.offload\+1$");
        assert_eq!(odd.read, r"^(rbd\.offload\+1|a\.b\(c\)\|d)$");
        assert!(odd.command("it's", "v h").starts_with(r"rabbitmqctl set_permissions -p 'v h' 'it'\''s' "));
    }
}
