//! How single values are written: durations, sizes, flags, lists, choices. `None`: not one of these.

use std::time::Duration;

/// A whole number of decimal digits: no sign, no space, no separator.
pub fn whole(text: &str) -> Option<u64> {
    if text.is_empty() || !text.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    text.parse().ok()
}

/// `500ms`, `30s`, `5m`, `12h` or `7d`: a whole number and its unit, without a space. `0` needs none.
pub fn duration(text: &str) -> Option<Duration> {
    let (number, unit) = number_and_unit(text)?;
    let seconds = match unit {
        "ms" => return Some(Duration::from_millis(number)),
        "" if number == 0 => 1,
        "s" => 1,
        "m" => 60,
        "h" => 60 * 60,
        "d" => 24 * 60 * 60,
        _ => return None,
    };
    number.checked_mul(seconds).map(Duration::from_secs)
}

/// Bytes, or a whole number of `KiB`, `MiB` or `GiB`, without a space.
pub fn size(text: &str) -> Option<u64> {
    let (number, unit) = number_and_unit(text)?;
    let factor: u64 = match unit {
        "" => 1,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        _ => return None,
    };
    number.checked_mul(factor)
}

/// A boolean, in any of oslo.config's spellings.
pub fn flag(text: &str) -> Option<bool> {
    match text.to_ascii_lowercase().as_str() {
        "true" | "yes" | "on" | "1" => Some(true),
        "false" | "no" | "off" | "0" => Some(false),
        _ => None,
    }
}

/// A comma-separated list; blanks around an entry do not count, no entry may be empty or hold a blank.
pub fn list(text: &str) -> Option<Vec<String>> {
    let entries: Vec<_> = text.split(',').map(|entry| entry.trim().to_owned()).collect();
    entries.iter().all(|entry| is_word(entry)).then_some(entries)
}

/// Not empty, and without blanks.
pub fn is_word(text: &str) -> bool {
    !text.is_empty() && !text.contains(char::is_whitespace)
}

fn number_and_unit(text: &str) -> Option<(u64, &str)> {
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at_checked(end)?;
    Some((whole(number)?, unit))
}

/// Gives an enum its spellings in the configuration, in the order in which a person reads them.
macro_rules! choices {
    ($name:ident { $($variant:ident = $text:literal),+ }) => {
        impl $name {
            /// How the configuration spells them.
            pub const NAMES: &'static [&'static str] = &[$($text),+];

            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $text),+ }
            }

            /// In any case of its letters.
            pub(super) fn from_name(text: &str) -> Option<Self> {
                [$(Self::$variant),+].into_iter().find(|choice| text.eq_ignore_ascii_case(choice.as_str()))
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.pad(self.as_str())
            }
        }
    };
}
pub(super) use choices;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_have_a_whole_number_and_a_unit() {
        assert_eq!(duration("500ms"), Some(Duration::from_millis(500)));
        assert_eq!(duration("30s"), Some(Duration::from_secs(30)));
        assert_eq!(duration("5m"), Some(Duration::from_secs(300)));
        assert_eq!(duration("12h"), Some(Duration::from_secs(43_200)));
        assert_eq!(duration("7d"), Some(Duration::from_secs(604_800)));
        assert_eq!(duration("0"), Some(Duration::ZERO));
        for wrong in
            ["", "30", "s", "1.5h", "-1s", "+1s", "30 s", "30S", "30sec", "1h30m", "٣s", "18446744073709551615d"]
        {
            assert_eq!(duration(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn sizes_are_bytes_or_binary_units_and_never_wrap() {
        assert_eq!(size("0"), Some(0));
        assert_eq!(size("4096"), Some(4096));
        assert_eq!(size("64KiB"), Some(65_536));
        assert_eq!(size("100MiB"), Some(104_857_600));
        assert_eq!(size("2GiB"), Some(2_147_483_648));
        for wrong in ["", "MiB", "100 MiB", "100MB", "100mib", "1.5GiB", "-1", "17179869184GiB", "99999999999999999999"]
        {
            assert_eq!(size(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn flags_take_oslo_spellings() {
        for yes in ["true", "True", "YES", "on", "1"] {
            assert_eq!(flag(yes), Some(true));
        }
        for no in ["false", "No", "OFF", "0"] {
            assert_eq!(flag(no), Some(false));
        }
        assert_eq!(flag("maybe"), None);
    }

    #[test]
    fn lists_are_trimmed_and_have_no_empty_entries() {
        assert_eq!(list("glance, nova"), Some(vec!["glance".into(), "nova".into()]));
        for wrong in ["", ",", "glance,", "glance,,nova", "glance nova"] {
            assert_eq!(list(wrong), None, "{wrong}");
        }
    }
}
