//! Random numbers for generated cases: the same from the same seed, on every machine.

use crate::bench::workload::mix;

/// A stream of numbers.
pub(super) struct Draw(u64);

impl Draw {
    /// The stream number `index` of a seed; `purpose` keeps streams for different things apart.
    pub fn new(seed: u64, purpose: u64, index: u64) -> Self {
        Self(mix(mix(mix(seed).wrapping_add(purpose)).wrapping_add(index)))
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        mix(self.0)
    }

    /// From 0 to `end - 1`.
    pub fn below(&mut self, end: u32) -> u32 {
        ((u128::from(self.next()) * u128::from(end)) >> 64) as u32
    }

    /// From `first` to `last`.
    pub fn between(&mut self, first: u32, last: u32) -> u32 {
        first + self.below(last - first + 1)
    }

    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u32) as usize]
    }

    /// Once in `n` times.
    pub fn once_in(&mut self, n: u32) -> bool {
        self.below(n) == 0
    }

    /// A small integer, from -`most` to `most`.
    pub fn integer(&mut self, most: u32) -> f32 {
        self.below(2 * most + 1) as f32 - most as f32
    }

    /// In another order.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below(last as u32 + 1) as usize);
        }
    }
}
