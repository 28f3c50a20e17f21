//! The demo's screen: a line for each thing shown, with the time since the start, and whether it was so.

use serde::Serialize;
use std::io::Write;
use std::time::Instant;

/// One line.
#[derive(Clone, Debug, Serialize)]
pub struct Line {
    /// Seconds since the start.
    pub at_s: f64,
    /// What is shown, in a word or two.
    pub topic: &'static str,
    /// What was seen, with its figures.
    pub text: String,
    /// `false`: this was to be shown and is not so.
    pub ok: bool,
}

/// Collects lines and prints each at once.
pub struct Report {
    begin: Instant,
    json: bool,
    lines: Vec<Line>,
}

impl Report {
    /// Starts the clock.
    pub fn new(json: bool) -> Self {
        Self {
            begin: Instant::now(),
            json,
            lines: Vec::new(),
        }
    }

    /// Shows a line. `ok` false marks it and makes the demo fail.
    pub fn line(&mut self, topic: &'static str, ok: bool, text: impl Into<String>) {
        let line = Line {
            at_s: self.begin.elapsed().as_secs_f64(),
            topic,
            text: text.into(),
            ok,
        };
        if !self.json {
            let mark = if line.ok { ' ' } else { '!' };
            // A closed pipe ends the display, not the checks.
            let _ = writeln!(
                std::io::stdout(),
                "{:5.1}s {mark}{:<9} {}",
                line.at_s,
                line.topic,
                line.text
            );
        }
        self.lines.push(line);
    }

    /// Shows text that is no check, below the lines.
    pub fn note(&self, text: &str) {
        if !self.json {
            let _ = writeln!(std::io::stdout(), "{text}");
        }
    }

    /// Everything that was to be shown is so.
    pub fn all_ok(&self) -> bool {
        self.lines.iter().all(|line| line.ok)
    }

    /// The lines as one JSON document, when that was asked for.
    pub fn finish(&self) -> anyhow::Result<()> {
        if self.json {
            let document = serde_json::json!({
                "ok": self.all_ok(),
                "seconds": self.begin.elapsed().as_secs_f64(),
                "lines": self.lines,
            });
            println!("{}", serde_json::to_string_pretty(&document)?);
        }
        Ok(())
    }
}

/// Bytes as a person reads them.
pub fn mib(bytes: u64) -> String {
    let mib = bytes as f64 / f64::from(1 << 20);
    if mib < 10.0 {
        format!("{mib:.1} MiB")
    } else {
        format!("{mib:.0} MiB")
    }
}
