use ndarray::{Array2, Array4, ArrayView2, Axis, s};
use proptest::prelude::*;

use super::super::{AttentionCodebook, AttentionMask, CompressedCache, RelativeBias, VqAttention};
use super::{dot, naive, off, sample, three, weighed};

/// The vectors' codewords in their place, by the definition: the first of the nearest.
pub(super) fn replaced(book: &AttentionCodebook, x: &Array4<f32>) -> Array4<f32> {
    let words = book.codewords();
    let mut all = x.clone();
    for ((_, h, _), mut vector) in
        ndarray::indices((x.dim().0, x.dim().1, x.dim().2)).into_iter().zip(all.lanes_mut(Axis(3)))
    {
        let distance = |word: ndarray::ArrayView1<f32>| {
            word.iter().zip(&vector).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2)).sum::<f64>()
        };
        let nearest = words
            .slice(s![h, .., ..])
            .rows()
            .into_iter()
            .map(distance)
            .enumerate()
            .fold((0, f64::INFINITY), |best, (i, d)| if d < best.1 { (i, d) } else { best });
        vector.assign(&words.slice(s![h, nearest.0, ..]));
    }
    all
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    /// Attention by codes is attention over the codewords, whether queries are quantised or not, and in pieces what it is
    /// as a whole.
    #[test]
    fn by_codes_is_exact_over_codewords(
        heads in prop::sample::select(vec![(1usize, 1usize), (4, 2)]),
        tokens in prop::sample::select(vec![1usize, 9, 70, 200]),
        codes in prop::sample::select(vec![1usize, 4, 24]),
        block_len in prop::sample::select(vec![1usize, 16, 300]),
        quantized in any::<bool>(),
        scale in prop::sample::select(vec![0.3f32, 30.0]),
        cut in 0.0f64..1.0,
        seed in any::<u64>(),
    ) {
        let (q, k, v) = (sample((2, heads.0, tokens, 6), seed), sample((2, heads.1, tokens, 6), seed ^ 1), sample((2, heads.1, tokens, 5), seed ^ 2));
        let of_queries = AttentionCodebook::of_codewords(three((heads.0, codes, 6), seed ^ 3)).unwrap();
        let of_keys = AttentionCodebook::of_codewords(three((heads.1, codes, 6), seed ^ 4)).unwrap();
        let attention = VqAttention::new(&of_keys, quantized.then_some(&of_queries), scale, block_len);
        let (asked, near) = (if quantized { replaced(&of_queries, &q) } else { q.clone() }, replaced(&of_keys, &k));
        let allowed = 3e-5 * (1.0 + f64::from(scale));
        let there = Array2::from_shape_fn((2, tokens), |(b, j)| j == 0 || !(j + b).is_multiple_of(3));
        let mask = AttentionMask { keys: Some(there.view()), ..AttentionMask::default() };
        let found = attention.bidirectional(q.view(), k.view(), v.view(), &mask).unwrap();
        prop_assert!(off(&found, &naive(&asked, &near, &v, scale, &mask)) <= allowed);
        let cache = || CompressedCache::new(2, heads.1, codes, 5);
        let mut whole = cache();
        let found = attention.causal(q.view(), k.view(), v.view(), &mut whole).unwrap();
        let causal = AttentionMask { causal: true, ..AttentionMask::default() };
        prop_assert!(off(&found, &naive(&asked, &near, &v, scale, &causal)) <= allowed);
        let (mut pieces, middle) = (cache(), (cut * tokens as f64) as usize);
        for range in [0..middle, middle..tokens] {
            let part = |x: &Array4<f32>| x.slice(s![.., .., range.clone(), ..]).to_owned();
            let piece = attention.causal(part(&q).view(), part(&k).view(), part(&v).view(), &mut pieces).unwrap();
            let expected = part(&found.output);
            prop_assert!(piece.output.iter().zip(&expected).all(|(a, b)| f64::from((a - b).abs()) <= allowed));
        }
        prop_assert_eq!(&pieces.counts, &whole.counts);
        prop_assert!(pieces.means.iter().zip(&whole.means).all(|(a, b)| (a - b).abs() < 1e-4));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    /// Scores of positions, within reach of any blocks and pieces; and keys behind the window left out.
    #[test]
    fn positions_count_within_reach(
        heads in prop::sample::select(vec![(1usize, 1usize), (4, 2)]),
        tokens in prop::sample::select(vec![1usize, 9, 70]),
        block_len in prop::sample::select(vec![1usize, 16, 100]),
        mem_len in prop::sample::select(vec![0usize, 1, 5, 40, 90]),
        positions in any::<bool>(),
        cuts in proptest::collection::vec(0.0f64..1.0, 0..4),
        seed in any::<u64>(),
    ) {
        let (q, k, v) = (sample((2, heads.0, tokens, 6), seed), sample((2, heads.1, tokens, 6), seed ^ 1), sample((2, heads.1, tokens, 5), seed ^ 2));
        let book = AttentionCodebook::of_codewords(three((heads.1, 8, 6), seed ^ 4)).unwrap();
        let (u, w, r) = (three((1, heads.0, 6), seed ^ 5), three((1, heads.0, 6), seed ^ 6), three((heads.0, mem_len + 1, 6), seed ^ 7));
        fn rows(x: &ndarray::Array3<f32>) -> ArrayView2<'_, f32> {
            x.index_axis(Axis(0), 0)
        }
        let bias = positions.then(|| RelativeBias { u: rows(&u), w: rows(&w), r: r.view() });
        // Without positions, what is behind the window does not count; a window goes back from its block's first token.
        let attention = VqAttention { mem_len, bias, agg_cache: positions, ..VqAttention::new(&book, None, 0.7, block_len) };
        let (near, shared) = (replaced(&book, &k), heads.0 / heads.1);
        let score = |b: usize, h: usize, i: usize, j: usize| {
            let (query, key) = (q.slice(s![b, h, i, ..]), near.slice(s![b, h / shared, j, ..]));
            let content = match bias {
                None => dot(query, key),
                Some(bias) => {
                    let at = |i: usize, j: usize| dot((&query + &bias.w.row(h)).view(), bias.r.slice(s![h, i - j, ..]));
                    let position = if j <= i && i - j <= mem_len { at(i, j) } else { 0.0 };
                    dot((&query + &bias.u.row(h)).view(), key) + position
                }
            };
            let reached = positions || j + mem_len >= i / block_len * block_len;
            (j <= i && reached).then_some(0.7 * content)
        };
        let expected = weighed(&q, &v, score);
        let mut whole = CompressedCache::new(2, heads.1, 8, 5);
        let found = attention.causal(q.view(), k.view(), v.view(), &mut whole).unwrap();
        prop_assert!(off(&found, &expected) <= 3e-5);
        prop_assert_eq!(whole.recent_codes.dim().2, mem_len.min(tokens));
        if positions {
            let mut ends: Vec<usize> = cuts.iter().map(|cut| (cut * tokens as f64) as usize).chain([tokens]).collect();
            ends.sort_unstable();
            let (mut cache, mut start) = (CompressedCache::new(2, heads.1, 8, 5), 0);
            for end in ends {
                let part = |x: &Array4<f32>| x.slice(s![.., .., start..end, ..]).to_owned();
                let piece = attention.causal(part(&q).view(), part(&k).view(), part(&v).view(), &mut cache).unwrap();
                prop_assert!(piece.output.iter().zip(&part(&found.output)).all(|(a, b)| (a - b).abs() <= 3e-5));
                start = end;
            }
            prop_assert_eq!((&cache.counts, &cache.recent_codes), (&whole.counts, &whole.recent_codes));
        }
    }
}

#[test]
fn codebooks_learn_and_do_not_die() {
    let x = three((2, 200, 4), 5);
    let mut book = AttentionCodebook::by_kmeans(x.view(), 8, 1).unwrap();
    let error = |book: &mut AttentionCodebook| book.clone().update(x.view(), None, 0.9).unwrap().commitment;
    let first = error(&mut book);
    let mut far = AttentionCodebook::of_codewords(three((2, 8, 4), 6) * 50.0).unwrap();
    let start = error(&mut far);
    for step in 0..60 {
        far.update(x.view(), None, 0.8).unwrap();
        far.revive(x.view(), 0.2, step).unwrap();
    }
    let end = error(&mut far);
    assert!(end < 0.5 * start && end < 1.6 * first, "{start} {end} {first}");
    assert_eq!(AttentionCodebook::by_kmeans(x.view(), 8, 1).unwrap(), book);
    assert!(
        AttentionCodebook::by_kmeans(x.view(), 201, 1).is_err()
            && AttentionCodebook::by_kmeans(x.view(), 0, 1).is_err()
    );
    assert!(book.assign(three((1, 3, 4), 1).view()).is_err() && book.update(x.view(), None, 1.5).is_err());
    let words = AttentionCodebook::of_codewords(ndarray::Array3::zeros((2, 0, 4)));
    assert!(words.unwrap_err().to_string().contains("at least one code"));
}

#[test]
fn codes_that_do_not_fit_are_refused() {
    let book = AttentionCodebook::of_codewords(three((2, 3, 4), 1)).unwrap();
    let attention = VqAttention::new(&book, None, 1.0, 8);
    let x = |heads: usize, tokens: usize, dim: usize| sample((1, heads, tokens, dim), 2);
    let mut cache = CompressedCache::new(1, 2, 3, 4);
    let mut refuse = |attention: &VqAttention, q: Array4<f32>, k: Array4<f32>, expected: &str| {
        let message = attention.causal(q.view(), k.view(), k.view(), &mut cache).unwrap_err().to_string();
        assert!(message.contains(expected), "{message}");
    };
    refuse(&attention, x(1, 5, 4), x(1, 5, 4), "codewords of keys");
    refuse(&attention, x(2, 6, 4), x(2, 5, 4), "6 for 5 keys");
    refuse(&VqAttention { block_len: 0, ..attention }, x(2, 5, 4), x(2, 5, 4), "at least 1");
    let mut small = CompressedCache::new(1, 2, 2, 4);
    let found = attention.causal(x(2, 5, 4).view(), x(2, 5, 4).view(), x(2, 5, 4).view(), &mut small);
    assert!(found.unwrap_err().to_string().contains("shapes of the cache"));
    let causal = AttentionMask { causal: true, ..AttentionMask::default() };
    assert!(attention.bidirectional(x(2, 5, 4).view(), x(2, 5, 4).view(), x(2, 5, 4).view(), &causal).is_err());
}

/// Codewords that no vector is nearest to stay where they are, however long the others are trained; of a small count, the mean.
#[test]
fn codewords_without_hits_stay() {
    let words = ndarray::Array3::from_shape_fn((2, 4, 3), |(h, c, d)| (1 + h + 2 * c + d) as f32 * 10.0);
    let mut book = AttentionCodebook::of_codewords(words.clone()).unwrap();
    let x = ndarray::Array3::from_elem((2, 5, 3), 1.0);
    for _ in 0..700 {
        book.learn(x.view(), 0.99).unwrap();
    }
    assert!(book.counts()[[0, 3]] < 0.01);
    assert_eq!(book.codewords().slice(s![.., 1.., ..]), words.slice(s![.., 1.., ..]));
    assert!(book.codewords().slice(s![.., 0, ..]).iter().all(|v| (v - 1.0).abs() < 0.1));
    // What a codeword of next to no count stood for counts next to nothing.
    let mut faint =
        AttentionCodebook::new(words.slice(s![..1, ..1, ..]).to_owned(), Array2::from_elem((1, 1), 1e-6)).unwrap();
    faint.learn(x.slice(s![..1, ..1, ..]), 0.999).unwrap();
    assert!(faint.codewords().iter().all(|v| (v - 1.0).abs() < 0.1), "{:?}", faint.codewords());
    // With counts of any size, as `update` has it.
    let (mut a, b) = (AttentionCodebook::of_codewords(words).unwrap(), three((2, 40, 3), 3) * 50.0);
    let mut other = a.clone();
    let (learned, updated) = (a.learn(b.view(), 0.9).unwrap(), other.update(b.view(), None, 0.9).unwrap());
    assert_eq!(learned.codes, updated.codes);
    for code in learned.codes.row(0) {
        assert_eq!(a.codewords().slice(s![0, *code as usize, ..]), other.codewords().slice(s![0, *code as usize, ..]));
    }
}
