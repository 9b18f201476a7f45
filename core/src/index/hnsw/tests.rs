use std::sync::LazyLock;

use proptest::prelude::*;

use super::*;

fn sample(rows: usize, columns: usize, seed: usize) -> Array2<f32> {
    let cell = |i: usize, j: usize| ((i * 7919 + j * 104_729 + seed * 31) % 1009) as f32 / 500.0 - 1.0;
    Array2::from_shape_fn((rows, columns), |(i, j)| cell(i, j))
}

fn options(vectors: GraphType) -> HnswOptions {
    HnswOptions { vectors, connectivity: 8, expansion_add: 64, expansion_search: 32 }
}

#[test]
fn finds_most_keys_of_a_range_and_comes_back() {
    let keys = sample(300, 16, 1);
    let scales: Vec<f32> = (0..300).map(|i| 3.0 / (1.0 + i as f32 * 0.05)).collect();
    let units = Array1::from_shape_fn(16, |j| 0.5 + j as f32 * 0.1);
    let queries = sample(20, 16, 5);
    for vectors in [GraphType::F32, GraphType::F16, GraphType::Bf16] {
        let fitted = || HnswIndex::fit(keys.view(), &scales, Some(units.clone()), options(vectors), false).unwrap();
        let index = fitted();
        let bytes = index.serialized();
        assert_eq!(bytes, fitted().serialized(), "the same keys give the same graph");
        let rounding = if vectors == GraphType::F32 { 1e-5 } else { 2e-2 };
        assert!((&index.reconstruct() - &keys).iter().all(|d| d.abs() < rounding));
        let back = HnswIndex::restore(&bytes, None, &scales, 16, Some(units.clone()), options(vectors)).unwrap();
        assert_eq!(back.reconstruct(), index.reconstruct());
        for two_sided in [true, false] {
            let (mut found, mut all) = (0, 0);
            for query in queries.rows() {
                let range = ContributionRange { least: 2.0, two_sided };
                let candidates = index.candidates(query, range).unwrap();
                assert_eq!(candidates, back.candidates(query, range).unwrap());
                let scores = index.scores(query.insert_axis(Axis(0)));
                assert_eq!(index.scores_of(query, &[3, 9]), [scores[[0, 3]], scores[[0, 9]]]);
                for (key, (score, scale)) in scores.iter().zip(&scales).enumerate() {
                    let contribution = score * scale;
                    if (if two_sided { contribution.abs() } else { contribution }) >= range.least {
                        all += 1;
                        found += usize::from(candidates.binary_search(&(key as u32)).is_ok());
                    }
                }
            }
            assert!(all > 100 && found as f64 >= 0.95 * f64::from(all), "{found} of {all}");
        }
    }
}

#[test]
fn graphs_of_another_kind_are_refused() {
    let (keys, scales) = (sample(10, 4, 1), vec![1.0; 10]);
    let index = HnswIndex::fit(keys.view(), &scales, None, options(GraphType::F32), true).unwrap();
    let bytes = index.serialized();
    let restored = |scales: &[f32], dimension, kind| {
        HnswIndex::restore(&bytes, Some(keys.clone()), scales, dimension, None, options(kind))
    };
    assert!(restored(&scales, 4, GraphType::F32).is_ok());
    assert!(restored(&scales[1..], 4, GraphType::F32).is_err());
    assert!(restored(&scales, 5, GraphType::F32).is_err());
    assert!(restored(&scales, 4, GraphType::F16).is_err());
    // f16 holds them in another unit, but not beside others of a millionth of their size.
    let huge = sample(3, 4, 1) * 1e6;
    let index = HnswIndex::fit(huge.view(), &scales[..3], None, options(GraphType::F16), false).unwrap();
    let kept = index.rows().rows().to_f32();
    assert!((&kept - &huge).iter().all(|difference| difference.abs() < 1e3), "{kept}");
    let mut index = index;
    index.reset().unwrap();
    assert!(index.is_empty() && index.dimension() == 4);
}

/// A small graph with several levels, and its bytes.
fn small(vectors: GraphType) -> (Vec<f32>, Vec<u8>) {
    let scales: Vec<f32> = (0..40).map(|i| 1.0 + i as f32 * 0.1).collect();
    let options = HnswOptions { connectivity: 3, expansion_add: 16, expansion_search: 16, vectors };
    let index = HnswIndex::fit(sample(40, 5, 3).view(), &scales, None, options, false).unwrap();
    (scales, index.serialized())
}

fn reopened(scales: &[f32], bytes: &[u8], vectors: GraphType) -> Result<HnswIndex> {
    let options = HnswOptions { connectivity: 3, expansion_add: 16, expansion_search: 16, vectors };
    HnswIndex::restore(bytes, None, scales, 5, None, options)
}

/// Where the parts of [`small`]'s bytes of f32 are.
struct Places {
    head: usize,
    header: usize,
    levels: usize,
    /// Of each node, and of the end.
    nodes: Vec<usize>,
}

const CONNECTIVITY: usize = 3;

fn places(bytes: &[u8]) -> Places {
    let head = 8 + 40 * 6 * 4;
    let (header, levels) = (head + 64, head + 64 + 40);
    let mut nodes = vec![levels + 2 * 40];
    for node in 0..40 {
        let level = u16::from_le_bytes([bytes[levels + 2 * node], bytes[levels + 2 * node + 1]]) as usize;
        nodes.push(nodes[node] + 10 + (4 + 4 * 2 * CONNECTIVITY) + level * (4 + 4 * CONNECTIVITY));
    }
    assert_eq!(nodes[40], bytes.len());
    Places { head, header, levels, nodes }
}

#[test]
fn hostile_graphs_are_refused_with_what_was_found() {
    let (scales, bytes) = small(GraphType::F32);
    let at = places(&bytes);
    let level = |node: usize| bytes[at.levels + 2 * node];
    let (low, high) = ((0..40).find(|&n| level(n) == 0).unwrap(), (0..40).find(|&n| level(n) > 0).unwrap());
    // A node's neighbours at level 1, behind those of level 0.
    let upper = at.nodes[high] + 10 + (4 + 4 * 2 * CONNECTIVITY);
    let put = |place: usize, with: &[u8]| {
        let mut bytes = bytes.clone();
        bytes[place..place + with.len()].copy_from_slice(with);
        bytes
    };
    let cases: Vec<(&str, Vec<u8>, &str)> = vec![
        ("nothing", vec![], "rows of the vectors"),
        ("rows alone", bytes[..4].to_vec(), "bytes of a vector"),
        ("more rows", put(0, &u32::MAX.to_le_bytes()), "rows of the vectors: found 4294967295, expected 40"),
        ("wider rows", put(4, &u32::MAX.to_le_bytes()), "bytes of a vector"),
        ("cut vectors", bytes[..500].to_vec(), "vectors: found 492 bytes from byte 8 on, expected 960 bytes"),
        ("infinite", put(8 + 4 * 7, &f32::INFINITY.to_le_bytes()), "length of vector 1: found inf"),
        ("no number", put(8 + 4 * 7, &f32::NAN.to_le_bytes()), "length of vector 1: found NaN"),
        ("too long", put(8 + 4 * 7, &f32::MAX.to_le_bytes()), "length of vector 1"),
        ("cut head", bytes[..at.head + 20].to_vec(), "head"),
        ("as written", bytes.clone(), "accepted"),
        ("other magic", put(at.head, b"U"), "magic"),
        ("version 3", put(at.head + 7, &3u16.to_le_bytes()), "version: found 3."),
        ("version 2.9", put(at.head + 9, &9u16.to_le_bytes()), "version: found 2.9"),
        ("cosine", put(at.head + 13, b"c"), "metric kind"),
        ("bf16", put(at.head + 14, &[4]), "scalar kind"),
        ("40-bit keys", put(at.head + 15, &[2]), "key kind"),
        ("40-bit slots", put(at.head + 16, &[2]), "slot kind"),
        ("fewer present", put(at.head + 17, &39u64.to_le_bytes()), "keys that are present: found 39"),
        ("deleted", put(at.head + 25, &1u64.to_le_bytes()), "keys that were deleted: found 1"),
        ("dimensions", put(at.head + 33, &u64::MAX.to_le_bytes()), "dimensions"),
        ("multi", put(at.head + 41, &[2]), "multi: found 2"),
        ("no nodes", put(at.header, &0u64.to_le_bytes()), "nodes: found 0, expected 40"),
        ("many nodes", put(at.header, &u64::MAX.to_le_bytes()), "nodes"),
        ("default connectivity", put(at.header + 8, &0u64.to_le_bytes()), "connectivity: found 0, expected 3"),
        ("connectivity", put(at.header + 8, &(1u64 << 62).to_le_bytes()), "connectivity"),
        ("base connectivity", put(at.header + 16, &3u64.to_le_bytes()), "connectivity of level 0: found 3, expected 6"),
        ("highest level", put(at.header + 24, &u64::MAX.to_le_bytes()), "highest level"),
        ("entry node", put(at.header + 32, &40u64.to_le_bytes()), "entry node: found 40, expected below 40"),
        ("low entry node", put(at.header + 32, &(low as u64).to_le_bytes()), "highest level"),
        ("cut levels", bytes[..at.levels + 10].to_vec(), "levels"),
        ("negative level", put(at.levels + 2 * low, &(-1i16).to_le_bytes()), "level of node"),
        ("a level more", put(at.levels + 2 * low, &1i16.to_le_bytes()), "level of node"),
        ("levels without end", put(at.levels + 2 * 39, &i16::MAX.to_le_bytes()), "level of node 39"),
        ("key", put(at.nodes[7], &8u64.to_le_bytes()), "key of node 7: found 8, expected 7"),
        ("freed key", put(at.nodes[7], &u64::MAX.to_le_bytes()), "key of node 7"),
        ("level of a node", put(at.nodes[low] + 8, &1i16.to_le_bytes()), "as in the list of levels"),
        ("many neighbours", put(at.nodes[7] + 10, &7u32.to_le_bytes()), "level 0: found 7, expected at most 6"),
        ("neighbours without end", put(at.nodes[7] + 10, &u32::MAX.to_le_bytes()), "neighbours of node 7 at level 0"),
        ("neighbour", put(at.nodes[7] + 14, &40u32.to_le_bytes()), "neighbour of node 7 at level 0: found 40"),
        ("many above", put(upper, &4u32.to_le_bytes()), "level 1: found 4, expected at most 3"),
        ("low neighbour above", put(upper, &[1, 0, 0, 0, low as u8, 0, 0, 0]), "at level 1: found"),
        ("cut nodes", bytes[..bytes.len() - 1].to_vec(), "neighbours"),
        ("more behind", [&bytes[..], &[0]].concat(), "bytes behind the last node: found 1"),
    ];
    for (name, bytes, expected) in cases {
        match reopened(&scales, &bytes, GraphType::F32) {
            Ok(_) => assert_eq!(expected, "accepted", "{name}"),
            Err(e) => assert!(e.to_string().contains(expected), "{name}: {e}"),
        }
    }
    for (keys, units) in [(Some(Array2::zeros((40, 4))), None), (None, Some(Array1::ones(4)))] {
        let options = HnswOptions { connectivity: 3, expansion_add: 16, expansion_search: 16, vectors: GraphType::F32 };
        assert!(HnswIndex::restore(&bytes, keys, &scales, 5, units, options).is_err());
    }
    let huge = sample(3, 4, 1) * f32::MAX;
    assert!(HnswIndex::fit(huge.view(), &[1.0; 3], None, options(GraphType::F32), true).is_err());
}

#[test]
fn a_graph_of_no_keys_comes_back() {
    let index = HnswIndex::fit(Array2::zeros((0, 5)).view(), &[], None, options(GraphType::F16), false).unwrap();
    let back = HnswIndex::restore(&index.serialized(), None, &[], 5, None, options(GraphType::F16)).unwrap();
    let range = ContributionRange { least: 0.0, two_sided: true };
    assert_eq!(back.candidates(sample(1, 5, 1).row(0), range), Some(vec![]));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Changed and cut bytes, as beside a hash made anew: an error, or a graph that can be searched.
    #[test]
    fn changed_graphs_are_refused_or_can_be_searched(
        vectors in prop::sample::select(vec![GraphType::F32, GraphType::F16, GraphType::Bf16]),
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        in_graph in any::<bool>(),
        cut in proptest::option::weighted(0.2, any::<prop::sample::Index>()),
    ) {
        let (scales, original) = &SMALL[vectors as usize];
        let mut bytes = original.clone();
        // The graph lies behind vectors and head, and is what usearch follows.
        let first = if in_graph { 8 + 40 * 6 * if vectors == GraphType::F32 { 4 } else { 2 } + 64 } else { 0 };
        for (place, with) in &changes {
            let place = first + place.index(bytes.len() - first);
            bytes[place] = *with;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        let found = reopened(scales, &bytes, vectors);
        prop_assert_eq!(found.is_ok() || bytes != *original, true, "the bytes that were written are taken");
        prop_assert!(found.is_err() || bytes.len() == original.len(), "a graph that was cut is refused");
        if let Ok(index) = found {
            let query = sample(1, 5, 9);
            for two_sided in [true, false] {
                let keys = index.candidates(query.row(0), ContributionRange { least: -1e9, two_sided }).unwrap();
                prop_assert!(keys.iter().all(|&key| key < 40) && keys.windows(2).all(|pair| pair[0] < pair[1]));
            }
        }
    }
}

static SMALL: LazyLock<[(Vec<f32>, Vec<u8>); 3]> =
    LazyLock::new(|| [GraphType::F32, GraphType::F16, GraphType::Bf16].map(small));
