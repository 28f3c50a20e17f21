//! The table that a run prints: one row for each comparison.

use crate::stats::{Samples, Summary};
use serde::Serialize;
use std::fmt::Write as _;

/// What a value counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Unit {
    /// Seconds; shown in ns, us, ms or s.
    Seconds,
    /// Things per second.
    PerSecond,
    /// Bytes; shown in B, KiB or MiB.
    Bytes,
    /// Just a number.
    Count,
}

/// Which way is good.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Good {
    AtLeast,
    AtMost,
}

/// One comparison, or one number that is printed without one.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// The bench it belongs to.
    pub bench: &'static str,
    /// What was measured.
    pub what: String,
    /// Of all values in this row.
    pub unit: Unit,
    /// copage's value.
    pub copage: Option<Summary>,
    /// What it is compared with.
    pub compared_with: String,
    /// The other's value.
    pub reference: Option<Summary>,
    /// copage's median through the other's.
    pub ratio: Option<f64>,
    /// The budget as it is printed, empty where there is none.
    pub budget: String,
    /// Whether the budget is met; `None` where there is none or nothing was measured.
    pub met: Option<bool>,
    /// Faults counted while copage's value was taken, then the other's (minor, major).
    pub faults: Option<[(u64, u64); 2]>,
    /// Why there is no value here, or what must be known to read it.
    pub note: String,
    #[serde(skip)]
    limit: Option<(Good, f64)>,
    #[serde(skip)]
    limit_is_of_value: bool,
}

impl Row {
    /// An empty row.
    pub fn new(bench: &'static str, what: impl Into<String>, unit: Unit) -> Self {
        Self {
            bench,
            what: what.into(),
            unit,
            copage: None,
            compared_with: String::new(),
            reference: None,
            ratio: None,
            budget: String::new(),
            met: None,
            faults: None,
            note: String::new(),
            limit: None,
            limit_is_of_value: false,
        }
    }

    /// With copage's values.
    pub fn copage(mut self, samples: &Samples) -> Self {
        self.copage = samples.summary();
        self.judge()
    }

    /// With one value of copage's.
    pub fn value(mut self, value: f64) -> Self {
        self.copage = Some(Summary {
            median: value,
            min: value,
            max: value,
        });
        self.judge()
    }

    /// With the other's values.
    pub fn against(mut self, name: impl Into<String>, samples: &Samples) -> Self {
        self.compared_with = name.into();
        self.reference = samples.summary();
        self.judge()
    }

    /// With one value of the other's.
    pub fn against_value(mut self, name: impl Into<String>, value: f64) -> Self {
        self.compared_with = name.into();
        self.reference = Some(Summary {
            median: value,
            min: value,
            max: value,
        });
        self.judge()
    }

    /// The ratio must be at least this.
    pub fn ratio_at_least(mut self, limit: f64) -> Self {
        self.limit = Some((Good::AtLeast, limit));
        self.judge()
    }

    /// The ratio must be at most this.
    pub fn ratio_at_most(mut self, limit: f64) -> Self {
        self.limit = Some((Good::AtMost, limit));
        self.judge()
    }

    /// The value itself must be at most this.
    pub fn value_at_most(mut self, limit: f64) -> Self {
        self.limit = Some((Good::AtMost, limit));
        self.limit_is_of_value = true;
        self.judge()
    }

    /// With the faults of one repetition, copage's and the other's.
    pub fn faults(mut self, copage: (u64, u64), reference: (u64, u64)) -> Self {
        self.faults = Some([copage, reference]);
        self
    }

    /// With words.
    pub fn note(mut self, note: impl Into<String>) -> Self {
        self.note = note.into();
        self
    }

    fn judge(mut self) -> Self {
        self.ratio = match (self.copage, self.reference) {
            (Some(a), Some(b)) if b.median != 0.0 => Some(a.median / b.median),
            _ => None,
        };
        let judged = if self.limit_is_of_value {
            self.copage.map(|s| s.median)
        } else {
            self.ratio
        };
        if let Some((good, limit)) = self.limit {
            let sign = if good == Good::AtLeast { ">=" } else { "<=" };
            self.budget = if self.limit_is_of_value {
                format!("{sign} {}", show(limit, self.unit))
            } else {
                format!("{sign} {limit}")
            };
            self.met = judged.map(|v| match good {
                Good::AtLeast => v >= limit,
                Good::AtMost => v <= limit,
            });
        }
        self
    }

    fn cells(&self) -> [String; 8] {
        let summary = |s: Option<Summary>| s.map_or("-".into(), |s| show_summary(s, self.unit));
        let met = match self.met {
            Some(true) => "yes",
            Some(false) => "NO",
            None => "",
        };
        [
            self.what.clone(),
            summary(self.copage),
            self.compared_with.clone(),
            if self.reference.is_some() {
                summary(self.reference)
            } else {
                String::new()
            },
            self.ratio.map_or(String::new(), show_ratio),
            self.budget.clone(),
            met.into(),
            self.faults.map_or(String::new(), |[a, b]| {
                format!("{}+{} / {}+{}", a.0, a.1, b.0, b.1)
            }),
        ]
    }
}

/// The table's head.
const HEAD: [&str; 8] = [
    "what",
    "copage",
    "compared with",
    "its value",
    "ratio",
    "budget",
    "met?",
    "faults min+maj",
];

/// The rows as lines of text, with `HEAD`, columns aligned, notes below their rows.
pub fn render(rows: &[Row]) -> String {
    let cells: Vec<_> = rows.iter().map(Row::cells).collect();
    let mut widths = HEAD.map(str::len);
    for row in &cells {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut out = String::new();
    let line = |out: &mut String, cells: &[String; 8]| {
        let mut text = String::new();
        for (cell, width) in cells.iter().zip(widths) {
            // Writing to a String cannot fail.
            let _ = write!(text, "{cell:<width$} | ");
        }
        out.push_str(text.trim_end_matches([' ', '|']));
        out.push('\n');
    };
    line(&mut out, &HEAD.map(String::from));
    let mut bench = "";
    for (row, cells) in rows.iter().zip(&cells) {
        if row.bench != bench {
            bench = row.bench;
            let _ = writeln!(out, "-- {bench}");
        }
        line(&mut out, cells);
        if !row.note.is_empty() {
            let _ = writeln!(out, "     {}", row.note);
        }
    }
    out
}

fn show_ratio(ratio: f64) -> String {
    if ratio < 0.0995 {
        format!("{ratio:.4}")
    } else {
        format!("{ratio:.2}")
    }
}

fn show_summary(s: Summary, unit: Unit) -> String {
    if s.min == s.max {
        return show(s.median, unit);
    }
    format!(
        "{} [{} - {}]",
        show(s.median, unit),
        show(s.min, unit),
        show(s.max, unit)
    )
}

/// A value as a person reads it.
pub fn show(value: f64, unit: Unit) -> String {
    let scaled = |steps: &[(f64, &str)]| {
        let (size, name) = steps
            .iter()
            .find(|(size, _)| value.abs() >= *size)
            .or(steps.last())
            .unwrap_or(&(1.0, ""));
        let v = value / size;
        if v.abs() >= 100.0 || v == v.trunc() {
            format!("{v:.0} {name}")
        } else {
            format!("{v:.3} {name}")
        }
    };
    match unit {
        Unit::Seconds => scaled(&[(1.0, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns")]),
        Unit::PerSecond => scaled(&[(1e9, "G/s"), (1e6, "M/s"), (1e3, "k/s"), (1.0, "/s")]),
        Unit::Bytes => scaled(&[(1_048_576.0, "MiB"), (1024.0, "KiB"), (1.0, "B")]),
        Unit::Count => scaled(&[(1.0, "")]).trim_end().to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples(values: &[f64]) -> Samples {
        let mut s = Samples::default();
        s.extend(values.iter().copied());
        s
    }

    #[test]
    fn budgets_are_judged_by_the_ratio_or_by_the_value() {
        let slow = Row::new("b", "w", Unit::Seconds)
            .copage(&samples(&[2e-6]))
            .against("native", &samples(&[1e-6]));
        assert_eq!(slow.clone().ratio_at_most(1.2).met, Some(false));
        assert_eq!(slow.clone().ratio_at_least(1.2).met, Some(true));
        assert_eq!(slow.ratio, Some(2.0));
        let value = Row::new("b", "w", Unit::Bytes).value_at_most(64.0);
        assert_eq!(value.met, None, "nothing was measured");
        assert_eq!(value.value(65.0).met, Some(false));
    }

    #[test]
    fn values_are_shown_with_fitting_units() {
        assert_eq!(show(0.0000125, Unit::Seconds), "12.500 us");
        assert_eq!(show(3.0 * 1_048_576.0, Unit::Bytes), "3 MiB");
        assert_eq!(show(0.0, Unit::Bytes), "0 B");
        assert_eq!(show(7.0, Unit::Count), "7");
    }

    #[test]
    fn a_row_without_values_says_why() {
        let text = render(&[Row::new("exec", "w", Unit::Seconds).note("not here: no FUSE")]);
        assert!(text.contains("-- exec") && text.contains("not here: no FUSE"));
    }
}
