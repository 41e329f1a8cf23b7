//! Where the call of a service stands that handed its work over.

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Service {
    pub has_commit_tag: bool,
    /// It did not hear what came of its commit, and did the work itself.
    pub doubted: bool,
    pub outcome: Option<ServiceOutcome>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ServiceOutcome {
    /// It told its caller that the image is there.
    Done,
    /// It told its caller that it failed, and deleted the image.
    Raised,
    /// It died with its caller.
    Died,
}
