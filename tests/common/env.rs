//! The lab's facts, which `make test` and `lab/env` put into the environment.
#![allow(clippy::panic)]

/// The value of a variable that the lab sets.
pub fn lab_var(name: &str) -> String {
    std::env::var(name)
        .unwrap_or_else(|_| panic!("{name} is not set: run `make test`, which starts the lab that this needs"))
}
