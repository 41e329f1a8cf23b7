//! What commands print: text that a reader may stop reading, tables, and values as people write them.

use std::io::{self, IsTerminal, Write};

use jiff::{SignedDuration, Timestamp};
use uuid::Uuid;

use super::Failure;
use crate::text::is_unsafe;

/// Between two columns.
const GAP: &str = "  ";

/// A last column is not cut below this many characters, however narrow the terminal is.
const LAST_COLUMN: usize = 20;

/// Writes to standard output. `false`: nobody reads it any more (`… | head`), which is no failure.
pub fn print(text: &str) -> Result<bool, Failure> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        Err(e) => Err(Failure::new(Failure::IO, format!("cannot write to standard output: {e}"))),
    }
}

/// Writes a line to standard error; that nobody reads it changes nothing.
pub fn tell(text: &str) {
    let _ = writeln!(io::stderr(), "rbd-offload: {text}");
}

/// As indented JSON, with an end of line.
pub fn json(value: &impl serde::Serialize) -> Result<String, Failure> {
    let mut text = serde_json::to_string_pretty(value)
        .map_err(|e| Failure::new(Failure::SOFTWARE, format!("the answer cannot be written as JSON: {e}")))?;
    text.push('\n');
    Ok(text)
}

/// Columns of the terminal that standard output is; `None` when it is none, and nothing is to be cut.
pub fn width() -> Option<usize> {
    if !io::stdout().is_terminal() {
        return None;
    }
    terminal_size::terminal_size().map(|(width, _)| usize::from(width.0))
}

/// Characters of a text from outside that are printed. Our own sentences are shorter.
const LINE: usize = 2000;

/// Text from outside on one line: nothing of it moves the cursor, and it has an end.
pub fn line(text: &str) -> String {
    let text = text
        .split(|c: char| is_unsafe(c) || c.is_whitespace())
        .filter(|word| !word.is_empty())
        .collect::<Vec<_>>()
        .join(" ");
    cut(&text, LINE)
}

/// At most `length` characters, the last an ellipsis where some were left out.
pub fn cut(text: &str, length: usize) -> String {
    if text.chars().count() <= length {
        return text.to_owned();
    }
    let mut text: String = text.chars().take(length.saturating_sub(1)).collect();
    text.push('…');
    text
}

/// Rows under their headings, each column as wide as its widest cell; the last one is cut at the terminal's `width`.
pub fn table<const N: usize>(headings: [&str; N], rows: &[[String; N]], width: Option<usize>) -> String {
    let mut widths = headings.map(|heading| heading.chars().count());
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let before: usize = widths.iter().take(N.saturating_sub(1)).map(|width| width + GAP.len()).sum();
    let last = width.map(|width| width.saturating_sub(before).max(LAST_COLUMN));
    let mut text = String::new();
    let mut add = |cells: &[String]| {
        let mut line = String::new();
        for (index, (cell, width)) in cells.iter().zip(widths).enumerate() {
            if index + 1 == N {
                line.push_str(&last.map_or_else(|| cell.clone(), |last| cut(cell, last)));
            } else {
                line.push_str(&format!("{cell:width$}{GAP}"));
            }
        }
        text.push_str(line.trim_end());
        text.push('\n');
    };
    add(&headings.map(str::to_owned));
    for row in rows {
        add(row);
    }
    text
}

/// An id as people recognise it, where room is short.
pub fn short(id: Uuid) -> String {
    id.to_string().chars().take(8).collect()
}

/// How long ago: `12s`, `5m`, `3h`, `2d`. A time that a faster clock wrote is now.
pub fn age(since: Timestamp, now: Timestamp) -> String {
    let seconds = now.duration_since(since).max(SignedDuration::ZERO).as_secs();
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m", seconds / 60),
        3600..172_800 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}

/// `12.3 GiB`
pub fn bytes(count: u64) -> String {
    indicatif::BinaryBytes(count).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_needed_and_the_last_is_cut() {
        let rows = [["a".to_owned(), "x".repeat(50)], ["longer".to_owned(), String::new()]];
        assert_eq!(
            table(["ID", "REASON"], &rows, None),
            format!("ID      REASON\na       {}\nlonger\n", "x".repeat(50))
        );
        assert_eq!(
            table(["ID", "REASON"], &rows, Some(38)),
            format!("ID      REASON\na       {}…\nlonger\n", "x".repeat(29))
        );
        // a terminal that is too narrow for anything still shows the start
        assert!(table(["ID", "REASON"], &rows, Some(3)).contains(&format!("{}…", "x".repeat(19))));
    }

    #[test]
    fn text_from_outside_cannot_move_the_cursor() {
        assert_eq!(line("a\n\u{1b}[2Jb\t c\r\u{202e}\u{2028}d"), "a [2Jb c d");
        assert_eq!(line(&"x ".repeat(40_000)).chars().count(), LINE);
        assert_eq!(cut("größer", 4), "grö…");
        assert_eq!(cut("größer", 6), "größer");
    }

    #[test]
    fn ages_have_one_unit() {
        let now = Timestamp::from_second(1_000_000).unwrap();
        let ago = |seconds: i64| age(Timestamp::from_second(1_000_000 - seconds).unwrap(), now);
        assert_eq!([ago(-5), ago(59), ago(60), ago(7200), ago(200_000)], ["0s", "59s", "1m", "2h", "2d"]);
    }
}
