//! Reads the keyring of a cephx user after librados failed to connect, since librados does not tell what is wrong with
//! it.

use std::fs::File;
use std::io::{self, Read as _};
use std::path::PathBuf;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;

/// Bytes of a keyring that are read.
const FILE_MAX: u64 = 1 << 20;

/// Key type `aes`, which every release knows (`CEPH_CRYPTO_AES`).
const AES: u16 = 1;

/// Key type `aes256k`, of Ceph 19.2.6 and 20.2.4 and later.
const AES256K: u16 = 2;

/// What stands in the files of the option `keyring` for a user.
#[derive(Debug)]
pub(super) enum UserKey {
    /// There is no file, or no readable key in it.
    Missing,
    Unreadable(PathBuf, io::Error),
    Found(PathBuf, KeyType),
}

/// The type of a key, by its number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct KeyType(pub u16);

impl KeyType {
    /// What a base64 key begins with: its type in two bytes, the lower one first.
    fn of(key: &str) -> Option<Self> {
        let start = BASE64_STANDARD.decode(key.as_bytes().get(..4)?).ok()?;
        let [low, high, _] = start.try_into().ok()?;
        Some(Self(u16::from_le_bytes([low, high])))
    }

    pub fn is_known_everywhere(self) -> bool {
        self.0 == AES
    }

    pub fn name(self) -> String {
        match self.0 {
            AES => "aes".to_owned(),
            AES256K => "aes256k".to_owned(),
            other => format!("number {other}"),
        }
    }
}

/// Looks at the first file that can be opened, as librados does. `files` is its option `keyring`.
pub(super) fn find(files: &str, user: &str) -> UserKey {
    let mut unreadable = None;
    for path in files.split([';', ',', '=', ' ', '\t']).filter(|path| !path.is_empty()).map(PathBuf::from) {
        match read(&path) {
            Ok(text) => return key_type(&text, user).map_or(UserKey::Missing, |of| UserKey::Found(path, of)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => unreadable = unreadable.or(Some((path, error))),
        }
    }
    unreadable.map_or(UserKey::Missing, |(path, error)| UserKey::Unreadable(path, error))
}

fn read(path: &PathBuf) -> io::Result<String> {
    let mut text = Vec::new();
    File::open(path)?.take(FILE_MAX).read_to_end(&mut text)?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}

/// The type of the key that stands in a keyring for a user.
fn key_type(keyring: &str, user: &str) -> Option<KeyType> {
    let section = format!("[client.{user}]");
    let mut lines = keyring.lines().map(str::trim).skip_while(|line| *line != section).skip(1);
    let key = lines
        .by_ref()
        .take_while(|line| !line.starts_with('['))
        .find_map(|line| line.strip_prefix("key")?.trim_start().strip_prefix('='))?;
    KeyType::of(key.trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of a type that came with Ceph 19.2.6 and 20.2.4: 32 bytes.
    const NEW: &str = "AgCJZYhqAAAAACAAAAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=";
    const OLD: &str = "AQB5N0JmAAAAABAAAAECAwQFBgcICQoLDA0ODw==";

    #[test]
    fn the_type_of_a_users_key_is_read_from_the_keyring() {
        let keyring = format!(
            "[client.admin]\n\tkey = {OLD}\n\tcaps mon = \"allow *\"\n\n[client.rbd-offload]\n\
             caps mon = \"profile rbd\"\n\tkey={NEW}\n[client.last]\ncaps mon = \"x\"\n"
        );
        let name = |user: &str| key_type(&keyring, user).map(|of| (of.name(), of.is_known_everywhere()));
        assert_eq!(name("admin"), Some(("aes".into(), true)));
        assert_eq!(name("rbd-offload"), Some(("aes256k".into(), false)));
        assert_eq!(name("last"), None);
        assert_eq!(name("nobody"), None);
        for broken in ["", "A", "AQ==", "????????"] {
            assert_eq!(KeyType::of(broken), None, "{broken}");
        }
        assert_eq!(KeyType::of("AAE=").map(KeyType::name), None);
        assert_eq!(KeyType::of("AAEA").map(KeyType::name), Some("number 256".into()));
    }

    #[test]
    fn the_first_file_that_can_be_opened_counts() {
        let dir = tempfile::tempdir().unwrap();
        let (none, old, new) = (dir.path().join("none"), dir.path().join("old"), dir.path().join("new"));
        std::fs::write(&old, format!("[client.x]\nkey = {OLD}\n")).unwrap();
        std::fs::write(&new, format!("[client.x]\nkey = {NEW}\n")).unwrap();
        let list =
            |paths: &[&PathBuf]| paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(",");
        let found = find(&list(&[&none, &new, &old]), "x");
        assert!(matches!(&found, UserKey::Found(path, KeyType(AES256K)) if *path == new), "{found:?}");
        assert!(matches!(find(&list(&[&old, &new]), "y"), UserKey::Missing));
        assert!(matches!(find(&list(&[&none]), "x"), UserKey::Missing));
        // a directory can be opened, and not be read
        let found = find(&list(&[&none, &dir.path().to_owned()]), "x");
        assert!(matches!(&found, UserKey::Unreadable(path, _) if path == dir.path()), "{found:?}");
    }
}
