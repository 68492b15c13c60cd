//! A slice that several tasks write at once, each its own elements.

use std::marker::PhantomData;
use std::ops::Range;

/// Tasks of a grouped matmul write rectangles of one buffer, which no safe split of a slice can express.
pub(super) struct SharedSlice<'a> {
    start: *mut f32,
    len: usize,
    owner: PhantomData<&'a mut [f32]>,
}

// SAFETY: it is a `&mut [f32]` handed out in pieces, and `f32` may be sent to other threads. The contract of
// `piece` keeps the pieces apart.
unsafe impl Send for SharedSlice<'_> {}
// SAFETY: as above.
unsafe impl Sync for SharedSlice<'_> {}

impl<'a> SharedSlice<'a> {
    pub fn new(slice: &'a mut [f32]) -> Self {
        Self { start: slice.as_mut_ptr(), len: slice.len(), owner: PhantomData }
    }

    /// The elements of `range`; panics if they are not inside the slice.
    ///
    /// # Safety
    /// No two pieces that live at the same time may share an element.
    #[expect(clippy::mut_from_ref, reason = "the caller promises that pieces do not overlap")]
    pub unsafe fn piece(&self, range: Range<usize>) -> &mut [f32] {
        assert!(range.start <= range.end && range.end <= self.len, "{range:?} is not within {}", self.len);
        // SAFETY: in bounds of one allocation that `owner` borrows, and by the contract nobody else has it.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(range.start), range.len()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_parts_of_the_slice() {
        let mut values = [0.0; 4];
        let shared = SharedSlice::new(&mut values);
        // SAFETY: the ranges do not overlap.
        let (low, high) = unsafe { (shared.piece(0..2), shared.piece(2..4)) };
        low.fill(1.0);
        high.fill(2.0);
        assert_eq!(values, [1.0, 1.0, 2.0, 2.0]);
    }

    #[test]
    #[should_panic(expected = "is not within")]
    fn a_piece_past_the_end_is_refused() {
        // SAFETY: it is the only piece.
        unsafe { SharedSlice::new(&mut [0.0; 4]).piece(3..5) };
    }
}
