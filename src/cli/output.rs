//! What commands print: text that a reader may stop reading, tables, and values as people write them.

use std::io::{self, IsTerminal, Write};

use jiff::{SignedDuration, Timestamp};
use unicode_width::UnicodeWidthChar;
use uuid::Uuid;

use super::Failure;
use crate::text::is_unsafe;

/// Between two columns.
const GAP: &str = "  ";

/// A last cell is not cut below this width, however narrow the terminal is.
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
    size().map(|(width, _)| width)
}

/// Columns and lines of the terminal that standard output is.
fn size() -> Option<(usize, usize)> {
    if !io::stdout().is_terminal() {
        return None;
    }
    terminal_size::terminal_size().map(|(width, height)| (usize::from(width.0), usize::from(height.0)))
}

/// Whether standard output is a terminal that acts upon escape sequences.
fn takes_sequences() -> bool {
    io::stdout().is_terminal() && std::env::var_os("TERM").is_none_or(|term| term != "dumb")
}

/// Whether standard output is a terminal that is asked to be colourful (<https://no-color.org/>).
pub fn colours() -> bool {
    takes_sequences() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

/// A terminal on which a text is replaced by a newer one. What was on it before can still be scrolled to.
pub struct Screen {
    is_new: bool,
}

impl Screen {
    /// `None`: standard output is not such a terminal, and one text follows the other.
    pub fn of_terminal() -> Option<Self> {
        takes_sequences().then_some(Self { is_new: true })
    }

    /// What shows `text` in place of the one before.
    pub fn replace(&mut self, text: &str) -> String {
        let clear = if std::mem::take(&mut self.is_new) { "\x1b[2J" } else { "" };
        format!("{clear}{}", frame(text, size().map_or(usize::MAX, |(_, height)| height)))
    }
}

/// `text` from the first line of a terminal on, without what was there. Of a text that is higher than the terminal, the
/// first lines: else it would scroll away.
fn frame(text: &str, height: usize) -> String {
    let lines = text.lines().count();
    // the cursor stands on the line after the last one
    let room = height.saturating_sub(1).max(1);
    let mut shown: Vec<String> =
        text.lines().take(if lines > room { room - 1 } else { room }).map(str::to_owned).collect();
    if lines > shown.len() {
        shown.push(format!("… {} more lines", lines - shown.len()));
    }
    let lines: String = shown.iter().map(|line| format!("{line}\x1b[K\n")).collect();
    format!("\x1b[H{lines}\x1b[J")
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

/// Width of a text from outside that is printed. Our own sentences are shorter.
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

/// Columns of a terminal that a text takes: a Chinese character takes two, an accent that is added to a letter none.
fn width_of(text: &str) -> usize {
    text.chars().filter_map(UnicodeWidthChar::width).sum()
}

/// At most `width` columns, the last an ellipsis where some were left out.
pub fn cut(text: &str, width: usize) -> String {
    if width_of(text) <= width {
        return text.to_owned();
    }
    let mut left = width.saturating_sub(1);
    let fits = |c: &char| match left.checked_sub(c.width().unwrap_or(0)) {
        Some(rest) => {
            left = rest;
            true
        }
        None => false,
    };
    let mut text: String = text.chars().take_while(fits).collect();
    text.push('…');
    text
}

/// With as many spaces after it as it needs to take `width` columns.
pub fn padded(text: &str, width: usize) -> String {
    format!("{text}{}", " ".repeat(width.saturating_sub(width_of(text))))
}

/// The width of the widest text.
pub fn widest<'a>(texts: impl Iterator<Item = &'a str>) -> usize {
    texts.map(width_of).max().unwrap_or(0)
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
}

/// Width of each column.
pub fn widths(headings: &[&str], rows: &[Vec<Cell>]) -> Vec<usize> {
    let of = |(index, heading): (usize, &&str)| {
        let cells = rows.iter().filter_map(|row| row.get(index)).map(|cell| cell.text.as_str());
        widest(cells.chain([*heading]))
    };
    headings.iter().enumerate().map(of).collect()
}

/// Width of what is before the last of the columns.
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
            line.push_str(&cell.colour.map_or_else(|| shown.clone(), |colour| colour.paint(&shown)));
            if !is_last {
                line.push_str(&padded("", width.saturating_sub(width_of(&cell.text)) + GAP.len()));
            }
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
    fn wide_characters_take_two_columns() {
        let rows = [
            vec![Cell::plain("映像"), Cell::plain("日本語の理由がここに")],
            vec![Cell::plain("e\u{301}te\u{301}"), Cell::plain("x")],
        ];
        assert_eq!(
            table(&["ID", "REASON"], &rows, Some(20)),
            "ID    REASON\n映像  日本語の理由…\ne\u{301}te\u{301}   x\n"
        );
        assert_eq!(cut("日本語", 4), "日…");
        assert_eq!(cut("日本語", 6), "日本語");
        assert_eq!(padded("日", 3), "日 ");
    }

    #[test]
    fn a_text_is_replaced_and_fits_into_the_terminal() {
        assert_eq!(frame("a\nb\n", 3), "\x1b[Ha\x1b[K\nb\x1b[K\n\x1b[J");
        assert_eq!(frame("a\nb\nc\n", 3), "\x1b[Ha\x1b[K\n… 2 more lines\x1b[K\n\x1b[J");
        let mut screen = Screen { is_new: true };
        assert!(screen.replace("a\n").starts_with("\x1b[2J\x1b[Ha") && screen.replace("a\n").starts_with("\x1b[Ha"));
        // this one empties what can be scrolled to
        assert!(!frame("a\n", 3).contains("\x1b[3J"));
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
