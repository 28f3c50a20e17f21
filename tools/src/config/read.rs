//! Reading values out of TOML tables, noting every problem with its line instead of stopping.

use super::nearest::nearest;
use super::problem::{Problem, Severity};
use std::collections::BTreeMap;
use std::ops::{Range, RangeInclusive};
use toml::de::{DeArray, DeTable, DeValue};

/// The problems found so far in one text.
pub(super) struct Reader<'t> {
    text: &'t str,
    pub(super) problems: Vec<Problem>,
}

impl<'t> Reader<'t> {
    pub(super) fn new(text: &'t str) -> Self {
        Self {
            text,
            problems: Vec::new(),
        }
    }

    /// The line, from 1, of a place in the text.
    pub(super) fn line(&self, span: &Range<usize>) -> usize {
        let before = self.text.as_bytes().get(..span.start).unwrap_or_default();
        1 + before.iter().filter(|&&byte| byte == b'\n').count()
    }

    pub(super) fn error(&mut self, line: Option<usize>, key: impl Into<String>, text: String) {
        self.problems.push(Problem {
            severity: Severity::Error,
            line,
            key: key.into(),
            text,
        });
    }
}

/// A value and where its text begins.
pub(super) struct Found<T> {
    pub(super) value: T,
    pub(super) line: usize,
}

/// One table, from which values are taken by key. What nobody asked for is unknown.
pub(super) struct Section<'s, 'i> {
    /// How its keys begin in messages: empty, `export.`, `guest.limits.`
    prefix: &'static str,
    /// By key: where the key stands, where the value does, the value.
    left: BTreeMap<&'s str, (usize, usize, &'s DeValue<'i>)>,
    asked: Vec<&'static str>,
    /// Where the table begins.
    pub(super) line: usize,
}

impl<'s, 'i> Section<'s, 'i> {
    pub(super) fn new(
        reader: &Reader<'_>,
        prefix: &'static str,
        line: usize,
        table: &'s DeTable<'i>,
    ) -> Self {
        let lines =
            |key: &Range<usize>, value: &Range<usize>| (reader.line(key), reader.line(value));
        let left = table
            .iter()
            .map(|(key, value)| {
                let (key_line, value_line) = lines(&key.span(), &value.span());
                (
                    key.get_ref().as_ref(),
                    (key_line, value_line, value.get_ref()),
                )
            })
            .collect();
        Self {
            prefix,
            left,
            asked: Vec::new(),
            line,
        }
    }

    /// The key as messages name it.
    pub(super) fn name(&self, key: &str) -> String {
        format!("{}{key}", self.prefix)
    }

    fn take(&mut self, key: &'static str) -> Option<(usize, &'s DeValue<'i>)> {
        self.asked.push(key);
        self.left.remove(key).map(|(_, line, value)| (line, value))
    }

    fn wrong(
        &self,
        reader: &mut Reader<'_>,
        line: usize,
        key: &str,
        wanted: &str,
        got: &DeValue<'_>,
    ) {
        let got = match got {
            DeValue::String(_) => "a string".to_owned(),
            DeValue::Integer(n) => format!("the number {}", n.as_str()),
            DeValue::Float(n) => format!("the fraction {}", n.as_str()),
            DeValue::Boolean(b) => b.to_string(),
            DeValue::Datetime(_) => "a date".to_owned(),
            DeValue::Array(_) => "a list".to_owned(),
            DeValue::Table(_) => "a table".to_owned(),
        };
        reader.error(
            Some(line),
            self.name(key),
            format!("is {got}; give {wanted}"),
        );
    }

    /// A whole number in `range` of `unit`.
    pub(super) fn number(
        &mut self,
        reader: &mut Reader<'_>,
        key: &'static str,
        range: &RangeInclusive<u64>,
        unit: &str,
    ) -> Option<Found<u64>> {
        let (line, value) = self.take(key)?;
        let unit = if unit.is_empty() {
            String::new()
        } else {
            format!(" {unit}")
        };
        let wanted = format!(
            "a whole number from {} to {}{unit}",
            range.start(),
            range.end()
        );
        let DeValue::Integer(number) = value else {
            self.wrong(reader, line, key, &wanted, value);
            return None;
        };
        match u64::from_str_radix(number.as_str(), number.radix()) {
            Ok(value) if range.contains(&value) => Some(Found { value, line }),
            _ => {
                let got = number.to_string();
                reader.error(
                    Some(line),
                    self.name(key),
                    format!("is {got}{unit}; give {wanted}"),
                );
                None
            }
        }
    }

    pub(super) fn boolean(&mut self, reader: &mut Reader<'_>, key: &'static str) -> Option<bool> {
        let (line, value) = self.take(key)?;
        match value {
            DeValue::Boolean(b) => Some(*b),
            other => {
                self.wrong(reader, line, key, "true or false", other);
                None
            }
        }
    }

    /// A string. `example` is what one looks like, for the message.
    pub(super) fn string(
        &mut self,
        reader: &mut Reader<'_>,
        key: &'static str,
        example: &str,
    ) -> Option<Found<String>> {
        let (line, value) = self.take(key)?;
        match value {
            DeValue::String(s) => Some(Found {
                value: s.clone().into_owned(),
                line,
            }),
            other => {
                self.wrong(
                    reader,
                    line,
                    key,
                    &format!("a string like \"{example}\""),
                    other,
                );
                None
            }
        }
    }

    /// A list of strings.
    pub(super) fn strings(
        &mut self,
        reader: &mut Reader<'_>,
        key: &'static str,
        example: &str,
    ) -> Option<Found<Vec<String>>> {
        let (line, value) = self.take(key)?;
        let wanted = format!("a list of strings like {example}");
        let DeValue::Array(array) = value else {
            self.wrong(reader, line, key, &wanted, value);
            return None;
        };
        let mut strings = Vec::new();
        for item in array.iter() {
            match item.get_ref() {
                DeValue::String(s) => strings.push(s.clone().into_owned()),
                other => self.wrong(reader, reader.line(&item.span()), key, &wanted, other),
            }
        }
        Some(Found {
            value: strings,
            line,
        })
    }

    /// A table inside this one.
    pub(super) fn section(
        &mut self,
        reader: &mut Reader<'_>,
        key: &'static str,
        prefix: &'static str,
    ) -> Option<Section<'s, 'i>> {
        let (line, value) = self.take(key)?;
        match value {
            DeValue::Table(table) => Some(Section::new(reader, prefix, line, table)),
            other => {
                let wanted = format!("a table: a line [{}] and its keys below", self.name(key));
                self.wrong(reader, line, key, &wanted, other);
                None
            }
        }
    }

    /// A list of tables (`[[key]]`).
    pub(super) fn sections(
        &mut self,
        reader: &mut Reader<'_>,
        key: &'static str,
        prefix: &'static str,
    ) -> Vec<Section<'s, 'i>> {
        let Some((line, value)) = self.take(key) else {
            return Vec::new();
        };
        let wanted = format!(
            "one or more tables, each begun by a line [[{}]]",
            self.name(key)
        );
        let DeValue::Array(array) = value else {
            self.wrong(reader, line, key, &wanted, value);
            return Vec::new();
        };
        let array: &'s DeArray<'i> = array;
        let mut sections = Vec::new();
        for item in array.iter() {
            let line = reader.line(&item.span());
            match item.get_ref() {
                DeValue::Table(table) => sections.push(Section::new(reader, prefix, line, table)),
                other => self.wrong(reader, line, key, &wanted, other),
            }
        }
        sections
    }

    /// Notes a key that has to be there and is not.
    pub(super) fn missing(&self, reader: &mut Reader<'_>, key: &str, how: &str) {
        reader.error(
            Some(self.line),
            self.name(key),
            format!("is missing; give {how}"),
        );
    }

    /// Whatever was not asked for is an unknown key.
    pub(super) fn finish(self, reader: &mut Reader<'_>) {
        for (key, (line, _, _)) in &self.left {
            let advice = match nearest(key, &self.asked) {
                Some(known) => format!("did you mean {}?", self.name(known)),
                None => format!("known here: {}", self.asked.join(", ")),
            };
            let shown: String = key.chars().take(80).collect();
            let name = self.name(&shown.escape_debug().to_string());
            reader.error(Some(*line), name, format!("unknown key; {advice}"));
        }
    }
}
