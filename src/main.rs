//! The command line of rbd-offload, and nothing else.

fn main() {}
