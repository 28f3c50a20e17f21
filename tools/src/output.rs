//! What commands print: tables for people, one JSON document for programs.

use anyhow::Result;
use serde::Serialize;
use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

/// Waiting for less than this is not worth a word.
const PATIENCE: Duration = Duration::from_secs(1);

/// Whoever read standard output went away. No error: they have seen what they wanted.
#[derive(Debug, thiserror::Error)]
#[error("standard output was closed")]
pub struct OutputClosed;

/// What was asked makes no sense as it was asked: exit code 2.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Usage(pub String);

/// Writes text and a newline to standard output.
pub fn line(text: &str) -> Result<()> {
    let mut out = io::stdout().lock();
    let written = out
        .write_all(text.as_bytes())
        .and_then(|()| out.write_all(b"\n"));
    written
        .and_then(|()| out.flush())
        .map_err(|error| match error.kind() {
            io::ErrorKind::BrokenPipe => OutputClosed.into(),
            _ => anyhow::Error::new(error).context("standard output"),
        })
}

/// Writes one JSON document to standard output, indented for a terminal.
pub fn json(value: &impl Serialize) -> Result<()> {
    line(&if io::stdout().is_terminal() {
        serde_json::to_string_pretty(value)?
    } else {
        serde_json::to_string(value)?
    })
}

/// Columns under headings. Cells that are numbers stand to the right.
#[derive(Debug)]
pub struct Table {
    heads: Vec<&'static str>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// An empty one.
    pub fn new(heads: &[&'static str]) -> Self {
        Self {
            heads: heads.to_vec(),
            rows: Vec::new(),
        }
    }

    /// Adds a row, with a cell for each heading.
    pub fn row(&mut self, cells: Vec<String>) {
        debug_assert_eq!(cells.len(), self.heads.len());
        self.rows
            .push(cells.iter().map(|cell| printable(cell)).collect());
    }

    /// The lines, without a newline at the end.
    pub fn text(&self) -> String {
        let width = |column: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(column));
            let widest = cells.map(|cell| cell.chars().count()).max().unwrap_or(0);
            widest.max(
                self.heads
                    .get(column)
                    .map_or(0, |head| head.chars().count()),
            )
        };
        let widths: Vec<usize> = (0..self.heads.len()).map(width).collect();
        let right: Vec<bool> = (0..self.heads.len())
            .map(|column| {
                let mut cells = self.rows.iter().filter_map(|row| row.get(column));
                cells.all(|cell| cell == "-" || cell.starts_with(|c: char| c.is_ascii_digit()))
            })
            .collect();
        let put = |cells: &mut dyn Iterator<Item = &str>| {
            let mut text = String::new();
            for ((cell, &width), &right) in cells.zip(&widths).zip(&right) {
                if !text.is_empty() {
                    text.push_str("  ");
                }
                text.push_str(&if right {
                    format!("{cell:>width$}")
                } else {
                    format!("{cell:width$}")
                });
            }
            text.truncate(text.trim_end().len());
            text
        };
        let mut lines = vec![put(&mut self.heads.iter().copied())];
        lines.extend(
            self.rows
                .iter()
                .map(|row| put(&mut row.iter().map(String::as_str))),
        );
        lines.join("\n")
    }

    /// Prints it.
    pub fn print(&self) -> Result<()> {
        line(&self.text())
    }
}

/// Names are others' bytes: control characters would move the cursor of whoever reads them.
pub fn printable(text: &str) -> String {
    if text.chars().any(char::is_control) {
        text.escape_debug().to_string()
    } else {
        text.to_owned()
    }
}

/// Bytes in the unit that suits them: `512 B`, `4.0 KiB`, `1.5 GiB`.
pub fn bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1023.95 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 {
        format!("{bytes} B")
    } else {
        format!("{value:.1} {}", UNITS[unit])
    }
}

/// Pages of 4 KiB as bytes.
pub fn pages(pages: u64) -> String {
    bytes(pages.saturating_mul(copage_grants::PAGE_SIZE_U64))
}

/// A time in the unit that suits it: `340 ms`, `12.5 s`, `3 h 20 min`.
pub fn duration_ms(ms: u64) -> String {
    let (seconds, minutes) = (ms / 1000, ms / 60_000);
    match minutes {
        0 if seconds == 0 => format!("{ms} ms"),
        0 => format!("{:.1} s", ms as f64 / 1000.0),
        1..60 => format!("{minutes} min {} s", seconds % 60),
        60..2880 => format!("{} h {} min", minutes / 60, minutes % 60),
        _ => format!("{} d {} h", minutes / 1440, minutes / 60 % 24),
    }
}

/// Says on standard error that something takes long, once it does and if a person looks.
pub struct Progress {
    since: Instant,
    what: &'static str,
    length: Option<u64>,
    bar: Option<indicatif::ProgressBar>,
}

impl Progress {
    /// Of something whose length is known (a bar) or not (a clock).
    pub fn new(what: &'static str, length: Option<u64>) -> Self {
        Self {
            since: Instant::now(),
            what,
            length,
            bar: None,
        }
    }

    /// It is so far; draws what there is to draw.
    pub fn at(&mut self, position: u64) {
        if self.bar.is_none() && self.since.elapsed() >= PATIENCE {
            self.bar = Some(self.draw());
        }
        if let Some(bar) = &self.bar {
            bar.set_position(position);
        }
    }

    fn draw(&self) -> indicatif::ProgressBar {
        // indicatif draws nothing where standard error is no terminal.
        let (bar, style) = match self.length {
            Some(length) => (
                indicatif::ProgressBar::new(length),
                "{msg} {wide_bar} {percent}% {eta} left",
            ),
            None => (
                indicatif::ProgressBar::new_spinner(),
                "{spinner} {msg} {elapsed}",
            ),
        };
        if let Ok(style) = indicatif::ProgressStyle::with_template(style) {
            bar.set_style(style);
        }
        bar.set_message(self.what);
        if self.length.is_none() {
            bar.enable_steady_tick(Duration::from_millis(200));
        }
        bar
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_align() {
        let mut table = Table::new(&["NAME", "DOM", "LEFT"]);
        table.row(vec!["web".into(), "1".into(), "-".into()]);
        table.row(vec!["database".into(), "12".into(), "340 ms".into()]);
        let wanted = "NAME      DOM    LEFT\nweb         1       -\ndatabase   12  340 ms";
        assert_eq!(table.text(), wanted);
        assert_eq!(Table::new(&["A", "B"]).text(), "A  B");
    }

    #[test]
    fn names_do_not_move_the_cursor() {
        let mut table = Table::new(&["NAME"]);
        table.row(vec!["a\u{1b}[2J\nb".into()]);
        assert_eq!(table.text(), "NAME\na\\u{1b}[2J\\nb");
        assert_eq!(printable("größe"), "größe");
    }

    #[test]
    fn sizes_and_times() {
        let sizes = [
            0,
            512,
            1023,
            1024,
            1536,
            1048575,
            1 << 20,
            3 << 39,
            u64::MAX,
        ]
        .map(bytes);
        assert_eq!(
            sizes,
            [
                "0 B",
                "512 B",
                "1023 B",
                "1.0 KiB",
                "1.5 KiB",
                "1.0 MiB",
                "1.0 MiB",
                "1.5 TiB",
                "16777216.0 TiB"
            ]
        );
        assert_eq!(pages(3), "12.0 KiB");
        let times = [0, 999, 1500, 61_000, 3_600_000, 200_000_000].map(duration_ms);
        assert_eq!(
            times,
            [
                "0 ms",
                "999 ms",
                "1.5 s",
                "1 min 1 s",
                "1 h 0 min",
                "2 d 7 h"
            ]
        );
    }
}
