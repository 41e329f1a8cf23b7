//! What commands print: text that a reader may stop reading, tables, and values as people write them.

use std::io::{self, IsTerminal, Write};

use jiff::{SignedDuration, Timestamp};
use uuid::Uuid;

use super::Failure;
use crate::text::is_unsafe;

/// Between two columns.
const GAP: &str = "  ";

/// A last column is not cut below this many characters, however narrow the terminal is.
pub const LAST_COLUMN: usize = 14;

/// Writes to standard output. `false`: the reader of the pipe has ended (`… | head`), which is no failure.
pub fn print(text: &str) -> Result<bool, Failure> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        Err(e) => Err(Failure::new(Failure::IO, format!("cannot write to standard output: {e}"))),
    }
}

/// Writes a line to standard error. Unlike `eprintln!`, it does not panic when standard error is closed.
pub fn eprint_line(text: &str) {
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

/// Whether standard output is a terminal that is asked to be colourful (<https://no-color.org/>).
pub fn colours() -> bool {
    let is_set = |name| std::env::var_os(name).is_some_and(|value| !value.is_empty());
    io::stdout().is_terminal() && !is_set("NO_COLOR") && std::env::var_os("TERM").is_none_or(|term| term != "dumb")
}

/// A colour of text, for what a person should see first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Colour {
    Green,
    Yellow,
    Red,
}

impl Colour {
    pub fn paint(self, text: &str) -> String {
        let sequence = match self {
            Self::Green => "32",
            Self::Yellow => "33",
            Self::Red => "1;31",
        };
        format!("\x1b[{sequence}m{text}\x1b[0m")
    }
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

/// A cell of a table. Its colour is for those who see it alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cell {
    pub text: String,
    pub colour: Option<Colour>,
}

impl Cell {
    pub fn plain(text: impl Into<String>) -> Self {
        Self { text: text.into(), colour: None }
    }

    fn length(&self) -> usize {
        self.text.chars().count()
    }
}

/// Characters that each column takes.
pub fn widths(headings: &[&str], rows: &[Vec<Cell>]) -> Vec<usize> {
    let of = |(index, heading): (usize, &&str)| {
        let cells = rows.iter().filter_map(|row| row.get(index)).map(Cell::length);
        cells.max().unwrap_or(0).max(heading.chars().count())
    };
    headings.iter().enumerate().map(of).collect()
}

/// Characters before the last of the columns.
pub fn indent(widths: &[usize]) -> usize {
    widths.split_last().map_or(0, |(_, before)| before.iter().map(|width| width + GAP.len()).sum())
}

/// Rows under their headings, each column as wide as its widest cell; the last one is cut at the terminal's `width`.
pub fn table(headings: &[&str], rows: &[Vec<Cell>], width: Option<usize>) -> String {
    let widths = widths(headings, rows);
    let last = width.map(|width| width.saturating_sub(indent(&widths)).max(LAST_COLUMN));
    let mut text = String::new();
    let mut add = |cells: &[Cell]| {
        let mut line = String::new();
        for (index, (cell, width)) in cells.iter().zip(&widths).enumerate() {
            let is_last = index + 1 == widths.len();
            let shown = match last {
                Some(last) if is_last => cut(&cell.text, last),
                _ => cell.text.clone(),
            };
            let padding = if is_last { 0 } else { width.saturating_sub(cell.length()) + GAP.len() };
            line.push_str(&cell.colour.map_or_else(|| shown.clone(), |colour| colour.paint(&shown)));
            line.push_str(&" ".repeat(padding));
        }
        text.push_str(line.trim_end());
        text.push('\n');
    };
    add(&headings.iter().map(|heading| Cell::plain(*heading)).collect::<Vec<_>>());
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
        let red = Cell { text: "a".to_owned(), colour: Some(Colour::Red) };
        let mut rows =
            [vec![Cell::plain("a"), Cell::plain("x".repeat(50))], vec![Cell::plain("longer"), Cell::plain("")]];
        let columns = ["ID", "REASON"];
        assert_eq!(table(&columns, &rows, None), format!("ID      REASON\na       {}\nlonger\n", "x".repeat(50)));
        assert_eq!(table(&columns, &rows, Some(38)), format!("ID      REASON\na       {}…\nlonger\n", "x".repeat(29)));
        // a terminal that is too narrow for anything still shows the start
        assert!(table(&columns, &rows, Some(3)).contains(&format!("{}…", "x".repeat(LAST_COLUMN - 1))));
        // a colour takes no room
        rows[0][0] = red;
        assert!(table(&columns, &rows, None).contains("\n\x1b[1;31ma\x1b[0m       xxx"));
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
