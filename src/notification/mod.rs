//! Notifications: from the broker's bytes to the few events that matter.
//!
//! ```text
//! delivery → envelope (inflate, unwrap) → Event → Sink (stores a job) → ack
//! ```
//!
//! Nothing here trusts what a message says: ids are checked for their form, the rest is read again from the services. Message bodies can
//! hold live tokens, so no body, and nothing from one but ids and event types, reaches a log, an error or a record.

mod envelope;
mod event;
mod transport_url;

pub use envelope::Unreadable;
pub use event::{Event, EventType, Notification};
pub use transport_url::{Host, Tls, TransportUrl};
