//! Notifications: from the broker's bytes to the few events that matter.
//!
//! ```text
//! delivery → envelope (inflate, unwrap) → Event → Sink (stores a job) → ack
//! ```
//!
//! Nothing here trusts what a message says: ids are checked for their form, the rest is read again from the services.
//! Message bodies can hold live tokens, so no body, and nothing from one but ids and event types, reaches a log, an
//! error or a record.

mod acks;
mod bindings;
pub(crate) mod connect;
mod envelope;
mod event;
mod listener;
mod permissions;
pub(crate) mod queue;
mod replay;
mod sink;
mod status;
mod transport_url;

use lapin::protocol::{AMQPErrorKind, AMQPHardError, AMQPSoftError};

pub use bindings::{Binding, Bindings, BindingsError};
pub use envelope::EnvelopeError;
pub use event::{Event, EventType, Notification};
pub use listener::{Listener, Timeouts};
pub use permissions::Permissions;
pub use replay::{LineError, ReplaySummary, replay};
pub use sink::{Meta, Sink, SinkError};
pub use status::{BrokerStatus, ListenerState};
pub use transport_url::{Error as TransportUrlError, Host, Tls, TransportUrl};

/// The target to silence in the log (`lapin=off`): lapin logs every refused call as an error of its own, a look for an
/// exchange that does not exist yet included. What matters is logged here, once and with its remedy.
pub const LAPIN_TARGET: &str = "lapin";

/// Whether the broker refused a call with this error and closed the channel.
pub(crate) fn is_soft_error(error: &lapin::Error, kind: AMQPSoftError) -> bool {
    is_protocol_error(error, &AMQPErrorKind::Soft(kind))
}

/// Whether the broker refused a call with this error and closed the connection.
pub(crate) fn is_hard_error(error: &lapin::Error, kind: AMQPHardError) -> bool {
    is_protocol_error(error, &AMQPErrorKind::Hard(kind))
}

fn is_protocol_error(error: &lapin::Error, kind: &AMQPErrorKind) -> bool {
    matches!(error.kind(), lapin::ErrorKind::ProtocolError(error) if error.kind() == kind)
}
