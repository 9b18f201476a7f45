use ndarray::{Array2, Array4, s};
use proptest::prelude::*;

use super::*;

fn sample(shape: (usize, usize, usize, usize), seed: u64) -> Array4<f32> {
    let mut state = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
    Array4::from_shape_simple_fn(shape, || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u32 << 23) as f32 - 1.0
    })
}

/// By the definition, in f64.
fn naive(
    q: &Array4<f32>,
    k: &Array4<f32>,
    v: &Array4<f32>,
    scale: f32,
    visible: &Visible,
) -> (Array4<f64>, Array3<f64>) {
    let (batch, heads, queries, _) = q.dim();
    let shared = heads / k.dim().1;
    let mut output = Array4::zeros((batch, heads, queries, v.dim().3));
    let mut lse = Array3::from_elem((batch, heads, queries), f64::NEG_INFINITY);
    for ((b, h, i), lse) in lse.indexed_iter_mut() {
        let sees = |j: usize| {
            (!visible.causal || j <= i)
                && visible.keys.is_none_or(|there| there[[b, j]])
                && visible.segments.is_none_or(|(q, k)| q[[b, i]] == k[[b, j]])
        };
        let seen: Vec<(usize, f64)> = (0..k.dim().2)
            .filter(|&j| sees(j))
            .map(|j| {
                let (q, k) = (q.slice(s![b, h, i, ..]), k.slice(s![b, h / shared, j, ..]));
                (j, f64::from(scale) * q.iter().zip(k).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>())
            })
            .collect();
        let most = seen.iter().fold(f64::NEG_INFINITY, |most, (_, score)| most.max(*score));
        let sum: f64 = seen.iter().map(|(_, score)| (score - most).exp()).sum();
        if seen.is_empty() {
            continue;
        }
        *lse = most + sum.ln();
        for (j, score) in seen {
            let weight = (score - most).exp() / sum;
            let value = v.slice(s![b, h / shared, j, ..]);
            output.slice_mut(s![b, h, i, ..]).zip_mut_with(&value, |o, v| *o += weight * f64::from(*v));
        }
    }
    (output, lse)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    /// Several tiles and parts of one, grouped heads, padding and documents; queries that see nothing.
    #[test]
    fn exact_is_the_definition(
        heads in prop::sample::select(vec![(1usize, 1usize), (4, 2), (3, 1)]),
        queries in prop::sample::select(vec![1usize, 5, 128, 131, 300]),
        keys in prop::sample::select(vec![1usize, 7, 256, 257, 530]),
        dims in prop::sample::select(vec![(1usize, 3usize), (16, 16), (20, 8)]),
        causal in any::<bool>(),
        masked in any::<bool>(),
        documents in any::<bool>(),
        scale in prop::sample::select(vec![0.0f32, 0.25, 40.0]),
        seed in any::<u64>(),
    ) {
        let batch = 2;
        let q = sample((batch, heads.0, queries, dims.0), seed);
        let k = sample((batch, heads.1, keys, dims.0), seed ^ 1);
        let v = sample((batch, heads.1, keys, dims.1), seed ^ 2);
        let there = Array2::from_shape_fn((batch, keys), |(b, j)| !(j + b + seed as usize).is_multiple_of(3));
        let of = |tokens: usize| Array2::from_shape_fn((batch, tokens), |(b, j)| ((j + 40 * b) / 90) as u32);
        let (of_queries, of_keys) = (of(queries), of(keys));
        let visible = Visible {
            causal,
            keys: masked.then(|| there.view()),
            segments: documents.then(|| (of_queries.view(), of_keys.view())),
        };
        let found = exact(q.view(), k.view(), v.view(), scale, &visible).unwrap();
        let (output, lse) = naive(&q, &k, &v, scale, &visible);
        let allowed = 2e-5 * (1.0 + f64::from(scale));
        for (found, expected) in found.output.iter().zip(&output) {
            prop_assert!((f64::from(*found) - expected).abs() <= allowed, "{} for {}", found, expected);
        }
        for (found, expected) in found.log_sum_exp.iter().zip(&lse) {
            let same = f64::from(*found) == *expected;
            prop_assert!(same || (f64::from(*found) - expected).abs() <= allowed, "{} for {}", found, expected);
        }
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let zeros = |shape: (usize, usize, usize, usize)| Array4::<f32>::zeros(shape);
    let q = zeros((1, 4, 3, 8));
    let refuse = |k: Array4<f32>, v: Array4<f32>, visible: &Visible, expected: &str| {
        let message = exact(q.view(), k.view(), v.view(), 1.0, visible).unwrap_err().to_string();
        assert!(message.contains(expected), "{message}");
    };
    let all = Visible::default();
    refuse(zeros((1, 3, 5, 8)), zeros((1, 3, 5, 8)), &all, "divisor of 4");
    refuse(zeros((1, 4, 5, 7)), zeros((1, 4, 5, 8)), &all, "shape of the keys");
    refuse(zeros((1, 2, 5, 8)), zeros((1, 2, 6, 8)), &all, "shape of the values");
    refuse(zeros((1, 2, 5, 8)), Array4::from_elem((1, 2, 5, 8), f32::NAN), &all, "the values");
    let short = Array2::from_elem((1, 4), true);
    let masked = Visible { keys: Some(short.view()), ..all };
    refuse(zeros((1, 2, 5, 8)), zeros((1, 2, 5, 8)), &masked, "mask");
    let huge = Array4::from_elem((1, 1, 2, 4), 1e30f32);
    let found = exact(huge.view(), huge.view(), huge.view(), 1e9, &all).unwrap_err().to_string();
    assert!(found.contains("beyond"), "{found}");
    assert!(
        exact(q.view(), zeros((1, 4, 0, 8)).view(), zeros((1, 4, 0, 2)).view(), 1.0, &all)
            .unwrap()
            .output
            .iter()
            .all(|o| *o == 0.0)
    );
}

fn three(shape: (usize, usize, usize), seed: u64) -> ndarray::Array3<f32> {
    let all = sample((1, shape.0, shape.1, shape.2), seed);
    all.index_axis_move(ndarray::Axis(0), 0)
}

/// The vectors' codewords in their place, by the definition: the first of the nearest.
fn replaced(book: &Codebook, x: &Array4<f32>) -> Array4<f32> {
    let words = book.codewords();
    let mut all = x.clone();
    for ((_, h, _), mut vector) in
        ndarray::indices((x.dim().0, x.dim().1, x.dim().2)).into_iter().zip(all.lanes_mut(ndarray::Axis(3)))
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
        let of_queries = Codebook::of_codewords(three((heads.0, codes, 6), seed ^ 3)).unwrap();
        let of_keys = Codebook::of_codewords(three((heads.1, codes, 6), seed ^ 4)).unwrap();
        let attention = Quantized { keys: &of_keys, queries: quantized.then_some(&of_queries), scale, block_len };
        let (asked, near) = (if quantized { replaced(&of_queries, &q) } else { q.clone() }, replaced(&of_keys, &k));
        let allowed = 3e-5 * (1.0 + f64::from(scale));
        let close = |found: &Attended, expected: &(Array4<f64>, Array3<f64>)| {
            let pairs = found.output.iter().zip(&expected.0).chain(found.log_sum_exp.iter().zip(&expected.1));
            pairs.map(|(f, e)| (f64::from(*f) - e).abs()).all(|off| off <= allowed)
        };
        let there = Array2::from_shape_fn((2, tokens), |(b, j)| j == 0 || !(j + b).is_multiple_of(3));
        let visible = Visible { keys: Some(there.view()), ..Visible::default() };
        let found = attention.all(q.view(), k.view(), v.view(), &visible).unwrap();
        prop_assert!(close(&found, &naive(&asked, &near, &v, scale, &visible)));
        let past = || Past::new(2, heads.1, codes, 5);
        let mut whole = past();
        let found = attention.causal(q.view(), k.view(), v.view(), &mut whole).unwrap();
        let causal = Visible { causal: true, ..Visible::default() };
        prop_assert!(close(&found, &naive(&asked, &near, &v, scale, &causal)));
        let (mut pieces, middle) = (past(), (cut * tokens as f64) as usize);
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

#[test]
fn codebooks_learn_and_do_not_die() {
    let x = three((2, 200, 4), 5);
    let mut book = Codebook::by_kmeans(x.view(), 8, 1).unwrap();
    let error = |book: &mut Codebook| book.clone().learn(x.view(), None, 0.9).unwrap().commitment;
    let first = error(&mut book);
    let mut far = Codebook::of_codewords(three((2, 8, 4), 6) * 50.0).unwrap();
    let start = error(&mut far);
    for step in 0..60 {
        far.learn(x.view(), None, 0.8).unwrap();
        far.revive(x.view(), 0.2, step).unwrap();
    }
    let end = error(&mut far);
    assert!(end < 0.5 * start && end < 1.6 * first, "{start} {end} {first}");
    assert_eq!(Codebook::by_kmeans(x.view(), 8, 1).unwrap(), book);
    assert!(Codebook::by_kmeans(x.view(), 201, 1).is_err() && Codebook::by_kmeans(x.view(), 0, 1).is_err());
    assert!(book.assign(three((1, 3, 4), 1).view()).is_err() && book.learn(x.view(), None, 1.5).is_err());
    let words = Codebook::of_codewords(ndarray::Array3::zeros((2, 0, 4)));
    assert!(words.unwrap_err().to_string().contains("at least one code"));
}

#[test]
fn codes_that_do_not_fit_are_refused() {
    let book = Codebook::of_codewords(three((2, 3, 4), 1)).unwrap();
    let attention = Quantized { keys: &book, queries: None, scale: 1.0, block_len: 8 };
    let x = |heads: usize, tokens: usize, dim: usize| sample((1, heads, tokens, dim), 2);
    let mut past = Past::new(1, 2, 3, 4);
    let mut refuse = |attention: &Quantized, q: Array4<f32>, k: Array4<f32>, expected: &str| {
        let message = attention.causal(q.view(), k.view(), k.view(), &mut past).unwrap_err().to_string();
        assert!(message.contains(expected), "{message}");
    };
    refuse(&attention, x(1, 5, 4), x(1, 5, 4), "codewords of keys");
    refuse(&attention, x(2, 4, 4), x(2, 5, 4), "a key for each query");
    refuse(&Quantized { block_len: 0, ..attention }, x(2, 5, 4), x(2, 5, 4), "at least 1");
    let mut small = Past::new(1, 2, 2, 4);
    let found = attention.causal(x(2, 5, 4).view(), x(2, 5, 4).view(), x(2, 5, 4).view(), &mut small);
    assert!(found.unwrap_err().to_string().contains("sizes of the past"));
    let causal = Visible { causal: true, ..Visible::default() };
    assert!(attention.all(x(2, 5, 4).view(), x(2, 5, 4).view(), x(2, 5, 4).view(), &causal).is_err());
}
