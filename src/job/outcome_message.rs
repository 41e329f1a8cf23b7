//! What the requester is told at an end without an image.

use uuid::Uuid;

use super::record::State;
use crate::publish::image_status::Status;

/// The status and the sentence on the image record.
pub(super) fn outcome_message(state: State, reason: &str, request: Uuid) -> (Status, String) {
    match state {
        State::Declined => (Status::Declined, reason.to_owned()),
        State::Cancelled => (Status::Failed, format!("{reason}; set the request tag to ask again")),
        // what broke inside is for the operator
        _ => (
            Status::Failed,
            format!(
                "the copy could not be made; set the request tag to ask again, or tell your operator the request id {request}"
            ),
        ),
    }
}
