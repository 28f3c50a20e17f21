//! Numbers that look random and are the same each time for the same seed.

/// A linear congruential generator (Knuth's MMIX), its upper half.
#[derive(Clone, Debug)]
pub struct Numbers(u64);

impl Numbers {
    /// The numbers of a seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next, any.
    pub fn any(&mut self) -> u32 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 32) as u32
    }

    /// The next, from 0 to below `below`.
    pub fn below(&mut self, below: usize) -> usize {
        // Two, because a length may be more than 32 bits.
        let wide = (u64::from(self.any()) << 32) | u64::from(self.any());
        (wide % below.max(1) as u64) as usize
    }

    /// True once in so many times.
    pub fn once_in(&mut self, times: usize) -> bool {
        self.below(times) == 0
    }
}
