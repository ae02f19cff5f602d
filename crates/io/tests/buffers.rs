//! Buffers against plain vectors.

use proptest::prelude::*;
use zbdkit_io::{BUF_ALIGN, IoBuf};

proptest! {
    #[test]
    fn slices_and_copies_do_what_those_of_a_vector_do(
        data in proptest::collection::vec(any::<u8>(), 0..2000),
        cuts in proptest::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>()), 1..6),
        fill in any::<u8>(),
        patch in proptest::collection::vec(any::<u8>(), 0..300),
    ) {
        let mut model = data.clone();
        let whole = IoBuf::from_vec(data);
        let (mut start, mut end) = (0, model.len());
        let mut buf = whole.clone();
        for (a, b) in cuts {
            let len = end - start;
            let (a, b) = (a.index(len + 1), b.index(len + 1));
            let (a, b) = (a.min(b), a.max(b));
            buf = buf.slice(a..b);
            (start, end) = (start + a, start + b);
            prop_assert_eq!(buf.len(), end - start);
            prop_assert_eq!(buf.to_vec(), &model[start..end]);
        }
        let n = buf.copy_from(&patch);
        prop_assert_eq!(n, patch.len().min(end - start));
        model[start..start + n].copy_from_slice(&patch[..n]);
        prop_assert_eq!(&whole.to_vec(), &model);

        let middle = buf.len() / 3..buf.len() / 2;
        model[start..end][middle.clone()].fill(fill);
        buf.fill(middle, fill);
        prop_assert_eq!(&whole.to_vec(), &model);

        let mut out = vec![1; patch.len()];
        let n = buf.copy_to(&mut out);
        prop_assert_eq!(&out[..n], &model[start..start + n]);
        prop_assert!(out[n..].iter().all(|b| *b == 1));

        let copy = IoBuf::alloc(buf.len() + 5);
        prop_assert_eq!(copy.copy_from_buf(&buf), buf.len());
        prop_assert_eq!(&copy.to_vec()[..buf.len()], &model[start..end]);
        prop_assert_eq!(&copy.to_vec()[buf.len()..], [0; 5]);
    }
}

#[test]
fn a_range_outside_the_buffer_gives_nothing() {
    let buf = IoBuf::alloc(10);
    assert!(buf.get(0..11).is_none());
    #[expect(clippy::reversed_empty_ranges, reason = "that is the case")]
    let reversed = buf.get(5..4);
    assert!(reversed.is_none());
    assert_eq!(buf.get(10..10).expect("an empty range").len(), 0);
    assert!(std::panic::catch_unwind(|| IoBuf::alloc(4).slice(2..6)).is_err());
}

#[test]
fn allocated_memory_is_zeroed_and_aligned() {
    let buf = IoBuf::alloc(3 * BUF_ALIGN);
    assert!(buf.is_aligned(BUF_ALIGN));
    assert!(buf.to_vec().iter().all(|b| *b == 0));
    assert!(buf.slice(512..1024).is_aligned(512));
    assert!(!buf.slice(512..1024).is_aligned(1024));
    assert!(!buf.slice(0..100).is_aligned(512));
    assert!(IoBuf::empty().is_aligned(512));
}

#[test]
fn memory_that_nobody_has_is_an_error() {
    let error = IoBuf::try_alloc(usize::MAX / 2 - 8191).expect_err("more than there is");
    assert_eq!(error.kind(), std::io::ErrorKind::OutOfMemory);
}

#[test]
fn buffers_in_a_row_are_one_buffer_over_the_same_memory() {
    let parts = [&b"one "[..], b"", b"two "].map(|text| IoBuf::from_vec(text.to_vec()));
    let first = parts[0].clone();
    let whole = IoBuf::concat(parts.into());
    assert_eq!(whole.to_vec(), b"one two ");
    whole.slice(2..6).copy_from(b"1122");
    assert_eq!(
        (whole.to_vec(), first.to_vec()),
        (b"on1122o ".to_vec(), b"on11".to_vec())
    );
    assert!(IoBuf::concat(Vec::new()).is_empty());
}
