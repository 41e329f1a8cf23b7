//! Untrusted text, sanitized for terminals and logs: control characters are escaped, the length is capped.

use std::fmt;

/// A character that a terminal acts upon, that ends a line, or that changes the order in which a line is read
/// (Unicode's bidirectional marks): untrusted text could otherwise look like our own words.
pub fn is_unsafe(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// Displays `text` with every unsafe character escaped, and at most `limit` characters of it.
pub struct Escaped<'a> {
    pub text: &'a str,
    pub limit: usize,
}

impl fmt::Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, c) in self.text.chars().enumerate() {
            if number == self.limit {
                return f.write_str("…");
            }
            if is_unsafe(c) { write!(f, "{}", c.escape_default())? } else { write!(f, "{c}")? }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_moves_the_cursor_ends_the_line_or_turns_it_round() {
        let nasty = "a\n\r\x1b[2J\u{9b}1m\u{202e}b\u{2028}c\u{2066}\u{200f}";
        let shown = Escaped { text: nasty, limit: 100 }.to_string();
        assert_eq!(shown, r"a\n\r\u{1b}[2J\u{9b}1m\u{202e}b\u{2028}c\u{2066}\u{200f}");
    }

    #[test]
    fn what_people_write_stays_and_has_an_end() {
        assert_eq!(Escaped { text: "größer, 日本語", limit: 100 }.to_string(), "größer, 日本語");
        assert_eq!(Escaped { text: &"ä".repeat(1000), limit: 3 }.to_string(), "äää…");
    }
}
