//! The known word that somebody most likely meant.

/// Words longer than this are no misspellings of ours.
const WORD_BYTES_MAX: usize = 64;

/// The nearest of `known` to `word`, if it is near: a third of the letters may differ, or one is
/// the beginning of the other (`frames` for `frames_mib`).
pub(super) fn nearest<'k>(word: &str, known: &[&'k str]) -> Option<&'k str> {
    if word.len() > WORD_BYTES_MAX {
        return None;
    }
    let word = word.to_ascii_lowercase().replace('-', "_");
    let near = known.iter().map(|&k| (distance(&word, k), k));
    let near = near.filter(|&(distance, k)| distance <= k.len().max(3) / 3);
    let begun = |k: &&&str| word.len() >= 3 && (k.starts_with(&word) || word.starts_with(**k));
    near.min_by_key(|&(distance, _)| distance)
        .map(|(_, k)| k)
        .or_else(|| known.iter().find(begun).copied())
}

/// Letters to insert, remove, exchange with others or with their neighbour.
fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let mut before: Vec<usize> = Vec::new();
    let mut above: Vec<usize> = (0..=b.len()).collect();
    for (i, &x) in a.iter().enumerate() {
        let mut row = vec![i + 1];
        for (j, &y) in b.iter().enumerate() {
            let mut best = (above[j] + usize::from(x != y))
                .min(above[j + 1] + 1)
                .min(row[j] + 1);
            if i > 0 && j > 0 && x == b[j - 1] && a[i - 1] == y {
                best = best.min(before[j - 1] + 1);
            }
            row.push(best);
        }
        before = std::mem::replace(&mut above, row);
    }
    above[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    const KNOWN: [&str; 4] = ["frames_mib", "fill_threads", "force", "lease_ttl_ms"];

    #[test]
    fn misspellings_are_found() {
        for (word, meant) in [
            ("frame_mib", "frames_mib"),
            ("frames-mib", "frames_mib"),
            ("frames", "frames_mib"),
            ("FORCE", "force"),
            ("focre", "force"),
            ("fill_thread", "fill_threads"),
            ("lease_ttl", "lease_ttl_ms"),
            ("lease_ttl_msec", "lease_ttl_ms"),
        ] {
            assert_eq!(nearest(word, &KNOWN), Some(meant), "{word}");
        }
    }

    #[test]
    fn other_words_are_not() {
        for word in [
            "",
            "x",
            "colour",
            "größe",
            "frame_mib_of_all_the_guests_together_please",
        ] {
            assert_eq!(nearest(word, &KNOWN), None, "{word}");
        }
        assert_eq!(nearest("force", &[]), None);
    }

    #[test]
    fn distances() {
        for (a, b, d) in [
            ("", "", 0),
            ("abc", "", 3),
            ("abc", "acb", 1),
            ("kitten", "sitting", 3),
        ] {
            assert_eq!(distance(a, b), d, "{a} {b}");
        }
    }
}
