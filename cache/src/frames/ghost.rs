//! Ghosts: what was given back not long ago, so that a page that returns is known to be wanted.

/// Remembers about as many pages as there are frames, in four bytes each or less: a table of
/// fingerprints in which a newer page overwrites an older one of the same place.
#[derive(Debug)]
pub(crate) struct Ghosts {
    marks: Box<[u32]>,
}

impl Ghosts {
    pub(crate) fn new(frames: u32) -> Self {
        let places = (frames / 2 + 1).next_power_of_two();
        Self {
            marks: vec![0; places as usize].into_boxed_slice(),
        }
    }

    fn place(&self, file: u64, page: u32) -> (usize, u32) {
        // A 64-bit finaliser (multiply and fold): both halves depend on every bit of both inputs.
        let mut h = (file ^ u64::from(page).rotate_left(32)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        h ^= h >> 29;
        h = h.wrapping_mul(0xBF58_476D_1CE4_E5B9);
        h ^= h >> 32;
        (
            (h as usize) & (self.marks.len() - 1),
            ((h >> 32) as u32) | 1,
        )
    }

    pub(crate) fn remember(&mut self, file: u64, page: u32) {
        let (place, mark) = self.place(file, page);
        self.marks[place] = mark;
    }

    /// Was it given back lately? It is forgotten by being asked for.
    pub(crate) fn take(&mut self, file: u64, page: u32) -> bool {
        let (place, mark) = self.place(file, page);
        let known = self.marks[place] == mark;
        if known {
            self.marks[place] = 0;
        }
        known
    }

    pub(crate) fn bytes(&self) -> u64 {
        size_of_val(&*self.marks) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_given_back_is_known_once() {
        let mut ghosts = Ghosts::new(64);
        ghosts.remember(7, 3);
        assert!(!ghosts.take(7, 4));
        assert!(ghosts.take(7, 3));
        assert!(!ghosts.take(7, 3));
    }
}
