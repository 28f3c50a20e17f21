//! Medians, spreads and percentiles of repeated measurements.

use anyhow::Result;

/// What some repetitions of one measurement gave, in the unit of the row they go to.
#[derive(Clone, Debug, Default)]
pub struct Samples {
    values: Vec<f64>,
}

/// A median with the smallest and the largest value.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Summary {
    /// The value in the middle (the mean of the two, when their number is even).
    pub median: f64,
    /// The smallest.
    pub min: f64,
    /// The largest.
    pub max: f64,
}

impl Samples {
    /// Adds one.
    pub fn push(&mut self, value: f64) {
        self.values.push(value);
    }

    /// Median, smallest and largest; `None` without values.
    pub fn summary(&self) -> Option<Summary> {
        let mut sorted = self.values.clone();
        sorted.sort_by(f64::total_cmp);
        let (min, max) = (*sorted.first()?, *sorted.last()?);
        let upper = sorted.len() / 2;
        let lower = (sorted.len() - 1) / 2;
        Some(Summary {
            median: (sorted[lower] + sorted[upper]) / 2.0,
            min,
            max,
        })
    }

    /// The value below which `share` (0 to 1) of all lie; `None` without values.
    pub fn percentile(&self, share: f64) -> Option<f64> {
        let mut sorted = self.values.clone();
        sorted.sort_by(f64::total_cmp);
        let last = sorted.len().checked_sub(1)?;
        Some(sorted[((last as f64) * share).round() as usize])
    }
}

impl Extend<f64> for Samples {
    fn extend<I: IntoIterator<Item = f64>>(&mut self, values: I) {
        self.values.extend(values);
    }
}

/// Measures several sides in turn, `reps` times, so that whatever drifts on the machine drifts for
/// all of them; every second round runs backwards, so that none always comes after the same other.
/// `measure` gets (side, repetition).
pub fn interleaved<const N: usize>(
    reps: usize,
    mut measure: impl FnMut(usize, usize) -> Result<f64>,
) -> Result<[Samples; N]> {
    let mut samples = std::array::from_fn(|_| Samples::default());
    for rep in 0..reps {
        for i in 0..N {
            let side = if rep % 2 == 0 { i } else { N - 1 - i };
            samples[side].push(measure(side, rep)?);
        }
    }
    Ok(samples)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_and_percentiles() {
        let mut s = Samples::default();
        assert!(s.summary().is_none() && s.percentile(0.5).is_none());
        s.extend([3.0, 1.0, 2.0, 10.0]);
        assert_eq!(
            s.summary(),
            Some(Summary {
                median: 2.5,
                min: 1.0,
                max: 10.0
            })
        );
        assert_eq!(s.percentile(0.99), Some(10.0));
        assert_eq!(s.percentile(0.0), Some(1.0));
    }

    #[test]
    fn sides_take_turns_forwards_and_backwards() {
        let mut order = Vec::new();
        let [a, b] = interleaved(2, |side, rep| {
            order.push((side, rep));
            Ok(side as f64)
        })
        .unwrap();
        assert_eq!(order, [(0, 0), (1, 0), (1, 1), (0, 1)]);
        assert_eq!(a.summary().unwrap().max, 0.0);
        assert_eq!(b.summary().unwrap().min, 1.0);
    }
}
