//! The Python that Cinder and Nova load, as far as it runs without them: its own tests, counted here with the others.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::process::Command;

#[test]
fn the_python_tests_pass() {
    // -B: no compiled files in the tree
    let output = Command::new("python3")
        .args(["-B", "-m", "unittest", "discover", "-s", "integrations/tests"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("python3");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    let ran = said.lines().find_map(|line| line.strip_prefix("Ran ")?.split(' ').next()?.parse::<u32>().ok());
    assert!(ran.is_some_and(|ran| ran >= 30), "{said}");
}
