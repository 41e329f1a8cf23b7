//! The names of what a job makes in Ceph before its image is published.

use uuid::Uuid;

/// Prefix of everything that a job makes before the image is published.
pub const PRIVATE_PREFIX: &str = "rbd-offload.";

/// What follows the image's id in the name of its anchor.
const ANCHOR_SUFFIX: &str = ".anchor";

/// Name of the private copy in the destination pool, of the temporary snapshot on the source, and of the anchor's
/// protected snapshot.
pub fn private_name(image_id: Uuid) -> String {
    format!("{PRIVATE_PREFIX}{image_id}")
}

/// Name of the anchor in the source's pool: the clone of the temporary snapshot that the copy is cloned from.
pub fn anchor_name(image_id: Uuid) -> String {
    format!("{PRIVATE_PREFIX}{image_id}{ANCHOR_SUFFIX}")
}

/// What a job's private name stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Private {
    /// The copy, or a snapshot of that name.
    Copy,
    Anchor,
}

/// Reads a private name: what it stands for, and which image it is for. `None` for every other name. Whatever looks for
/// a job's private images and snapshots goes by this.
pub fn parse_private(name: &str) -> Option<(Private, Uuid)> {
    let rest = name.strip_prefix(PRIVATE_PREFIX)?;
    let (kind, id) = match rest.strip_suffix(ANCHOR_SUFFIX) {
        Some(id) => (Private::Anchor, id),
        None => (Private::Copy, rest),
    };
    // an id that is written in another way names nothing of ours
    let image_id = Uuid::try_parse(id).ok().filter(|image_id| image_id.to_string() == id)?;
    Some((kind, image_id))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn private_names_are_read_as_they_are_made() {
        let id = Uuid::new_v4();
        assert_eq!(parse_private(&private_name(id)), Some((Private::Copy, id)));
        assert_eq!(parse_private(&anchor_name(id)), Some((Private::Anchor, id)));
        let upper = private_name(id).to_uppercase();
        for name in
            ["", "rbd-offload.", "rbd-offload.mine", &id.to_string(), &format!("{}.x", private_name(id)), &upper]
        {
            assert_eq!(parse_private(name), None, "{name}");
        }
    }
}
