//! Comparisons for the integration tests, and the tests that they can fail.

/// Every `got[i]` is within `bound(i)` of `want[i]`. Panics with the worst element, measured in bounds.
pub fn assert_close(name: &str, got: &[f32], want: &[f64], bound: impl Fn(usize) -> f64) {
    assert_eq!(got.len(), want.len(), "{name}: {} elements, expected {}", got.len(), want.len());
    let mut worst = (0.0, 0);
    let mut failed = 0;
    for (i, (&got, &want)) in got.iter().zip(want).enumerate() {
        let difference = (f64::from(got) - want).abs();
        // Written so that NaN on either side, or as a bound, counts as a failure.
        if difference <= bound(i) {
            continue;
        }
        failed += 1;
        let bounds = difference / bound(i);
        let bounds = if bounds.is_nan() { f64::INFINITY } else { bounds };
        if failed == 1 || bounds > worst.0 {
            worst = (bounds, i);
        }
    }
    let (bounds, i) = worst;
    assert!(
        failed == 0,
        "{name}: {failed} of {} elements are out of bounds; the worst is element {i}: {} instead of {} ({bounds:.1} \
         times the bound {:e})",
        got.len(),
        got[i],
        want[i],
        bound(i),
    );
}

mod tests {
    use super::assert_close;

    const WANT: [f64; 3] = [1.0, -2.0, 3.0];

    fn check(got: &[f32]) {
        assert_close("test", got, &WANT, |_| 1e-6);
    }

    #[test]
    fn equal_values_pass() {
        check(&[1.0, -2.0, 3.0]);
    }

    #[test]
    #[should_panic(expected = "1 of 3 elements are out of bounds; the worst is element 1: 2 instead of -2")]
    fn a_flipped_element_fails() {
        check(&[1.0, 2.0, 3.0]);
    }

    #[test]
    #[should_panic(expected = "the worst is element 2")]
    fn a_value_just_past_the_bound_fails() {
        check(&[1.0, -2.0, 3.000_002]);
    }

    #[test]
    #[should_panic(expected = "the worst is element 0: NaN")]
    fn nan_fails() {
        check(&[f32::NAN, -2.0, 3.0]);
    }

    #[test]
    #[should_panic(expected = "the worst is element 0")]
    fn nan_in_the_expectation_fails() {
        assert_close("test", &[1.0], &[f64::NAN], |_| 1.0);
    }

    #[test]
    #[should_panic(expected = "2 elements, expected 3")]
    fn a_short_buffer_fails() {
        check(&[1.0, -2.0]);
    }
}
