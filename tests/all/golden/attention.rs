//! Attention: float64 formulas, and codebooks as Transformer-VQ learns them.

use ndarray::{Array3, Array4, ArrayView4, Axis, Ix2, Ix3, Ix4, s};

use layerstore::attention::{
    AttentionCodebook, AttentionMask, AttentionOutput, CompressedCache, HyperAttention, RelativeBias, VqAttention,
    exact,
};

use serde_json::Value;

use super::{Case, Tally, Tensor, narrow};

#[test]
fn golden_attention() {
    let mut tally = Tally::default();
    for case in Case::of("attention") {
        let family = case.index["family"].as_str().unwrap();
        match family {
            "exact" => softmax(&case),
            "vq_qk" => both_quantized(&case),
            "transformer_vq" => keys_quantized(&case),
            "codebook" => learned(&case),
            "hyper" => estimated(&case),
            "error_table" => errors(&case),
            other => panic!("{}: unknown family '{other}'", case.name),
        }
        // HyperAttention's authors count samples twice; Transformer-VQ's mean of the commitment counts padding.
        let mut unused = vec!["out.peer_o", "out.peer_lse", "out.commit_mean"];
        if case.has("in.r") {
            // With scores of positions, what is aggregated lags by the window: `out.agg_*` has it.
            unused.extend(["out.prefix_count", "out.prefix_mean"]);
        }
        tally.ran(&case, family, &unused);
    }
    tally.expect(&[
        ("codebook", 6),
        ("error_table", 1),
        ("exact", 10),
        ("hyper", 4),
        ("transformer_vq", 4),
        ("vq_qk", 12),
    ]);
}

impl Case {
    fn four(&self, tensor: &str) -> Array4<f32> {
        self.any(tensor).clone().into_dimensionality::<Ix4>().unwrap().mapv(|v| v as f32)
    }

    fn three(&self, tensor: &str) -> Array3<f32> {
        self.any(tensor).clone().into_dimensionality::<Ix3>().unwrap().mapv(|v| v as f32)
    }

    fn flag(&self, name: &str) -> bool {
        self.index["params"][name].as_bool().unwrap_or(false)
    }

    fn number(&self, name: &str) -> f64 {
        self.index["params"][name].as_f64().unwrap_or_else(|| panic!("{}: no {name}", self.name))
    }

    fn attended(&self, found: &AttentionOutput) {
        self.holds("out.o", found.output.mapv(f64::from).into_dyn());
        self.holds("out.lse", found.log_sum_exp.mapv(f64::from).into_dyn());
    }
}

fn softmax(case: &Case) {
    let [q, k, v] = ["in.q", "in.k", "in.v"].map(|name| case.four(name));
    let mask = AttentionMask { causal: case.flag("causal"), ..AttentionMask::default() };
    case.attended(&exact(q.view(), k.view(), v.view(), case.number("scale") as f32, &mask).unwrap());
}

/// Codes of vectors `[batch, heads, tokens, dim]`, `[batch, heads, tokens]`.
fn codes(book: &AttentionCodebook, x: ArrayView4<f32>) -> Tensor {
    let all: Vec<_> = x.outer_iter().map(|x| book.assign(x).unwrap().mapv(f64::from)).collect();
    let views: Vec<_> = all.iter().map(|codes| codes.view()).collect();
    ndarray::stack(Axis(0), &views).unwrap().into_dyn()
}

fn both_quantized(case: &Case) {
    let [q, k, v] = ["in.q", "in.k", "in.v"].map(|name| case.four(name));
    let [of_queries, of_keys] =
        ["in.codebook_q", "in.codebook_k"].map(|name| AttentionCodebook::of_codewords(case.three(name)).unwrap());
    case.holds("out.z_q", codes(&of_queries, q.view()));
    case.holds("out.z_k", codes(&of_keys, k.view()));
    for block_len in [1, 16, 1000] {
        let scale = case.number("scale") as f32;
        let attention = VqAttention::new(&of_keys, Some(&of_queries), scale, block_len);
        let found = if case.flag("causal") {
            let mut cache = CompressedCache::new(q.dim().0, q.dim().1, of_keys.codes(), v.dim().3);
            attention.causal(q.view(), k.view(), v.view(), &mut cache).unwrap()
        } else {
            attention.bidirectional(q.view(), k.view(), v.view(), &AttentionMask::default()).unwrap()
        };
        case.attended(&found);
    }
}

/// Block after block, each with what the ones before have left.
fn keys_quantized(case: &Case) {
    let [q, k, v] = ["in.q", "in.k", "in.v"].map(|name| case.four(name));
    let book = AttentionCodebook::of_codewords(case.three("in.codebook_k")).unwrap();
    case.holds("out.z_k", codes(&book, k.view()));
    let (block_len, scale) = (case.number("block_len") as usize, case.number("scale") as f32);
    let positions = case.flag("relative_bias").then(|| {
        let rows = |name: &str| narrow(&case.matrix(name));
        (rows("in.u"), rows("in.w"), case.three("in.r"), case.number("mem_len") as usize)
    });
    let bias = positions.as_ref().map(|(u, w, r, _)| RelativeBias { u: u.view(), w: w.view(), r: r.view() });
    let mem_len = positions.as_ref().map_or(0, |(_, _, _, mem_len)| *mem_len);
    let attention = VqAttention { mem_len, bias, ..VqAttention::new(&book, None, scale, block_len) };
    let cache = || CompressedCache::new(q.dim().0, q.dim().1, book.codes(), v.dim().3);
    case.attended(&attention.causal(q.view(), k.view(), v.view(), &mut cache()).unwrap());
    let mut cache = cache();
    let (mut counts, mut means, mut outputs) = (vec![], vec![], vec![]);
    for start in (0..q.dim().2).step_by(block_len) {
        let end = q.dim().2.min(start + block_len);
        let part = |x: &Array4<f32>| x.slice(s![.., .., start..end, ..]).to_owned();
        outputs.push(attention.causal(part(&q).view(), part(&k).view(), part(&v).view(), &mut cache).unwrap().output);
        counts.push(cache.counts.mapv(f64::from));
        means.push(cache.means.mapv(f64::from));
    }
    let outputs: Vec<_> = outputs.iter().map(|output| output.view()).collect();
    case.holds("out.o", ndarray::concatenate(Axis(2), &outputs).unwrap().mapv(f64::from).into_dyn());
    let (counts, means): (Vec<_>, Vec<_>) =
        (counts.iter().map(|c| c.view()).collect(), means.iter().map(|m| m.view()).collect());
    // What is behind the window lags by its length.
    let lagging = if bias.is_some() { "agg" } else { "prefix" };
    case.holds(&format!("out.{lagging}_count"), ndarray::stack(Axis(0), &counts).unwrap().into_dyn());
    case.holds(&format!("out.{lagging}_mean"), ndarray::stack(Axis(0), &means).unwrap().into_dyn());
}

fn learned(case: &Case) {
    let counts = case.any("in.count").clone().into_dimensionality::<Ix2>().unwrap().mapv(|v| v as f32);
    let mut book = AttentionCodebook::of_sums(case.three("in.sum"), counts).unwrap();
    let there = case.vector("in.mask").mapv(|v| v != 0.0);
    let steps: Vec<_> = case.four("in.x").outer_iter().map(|x| x.to_owned()).collect();
    let mut found: [Vec<Tensor>; 6] = Default::default();
    for x in &steps {
        let learned = book.update(x.view(), Some(there.view()), case.number("gamma") as f32).unwrap();
        found[0].push(learned.codes.mapv(f64::from).into_dyn());
        found[1].push(learned.squared_errors.mapv(f64::from).into_dyn());
        found[2].push(ndarray::arr0(f64::from(learned.commitment)).into_dyn());
        found[3].push(book.counts().mapv(f64::from).into_dyn());
        found[4].push(book.sums().mapv(f64::from).into_dyn());
        found[5].push(book.codewords().mapv(f64::from).into_dyn());
    }
    let names = ["out.z", "out.err2", "out.commit_heads", "out.count", "out.sum", "out.codebook"];
    for (name, steps) in names.into_iter().zip(found) {
        let views: Vec<_> = steps.iter().map(|step| step.view()).collect();
        case.holds(name, ndarray::stack(Axis(0), &views).unwrap());
    }
}

fn hyper(case: &Case, settings: &Value) -> HyperAttention {
    let size = |name: &str| settings[name].as_u64().unwrap_or_else(|| panic!("{}: no {name}", case.name)) as usize;
    HyperAttention {
        block_size: size("block_size"),
        sample_size: size("sample_size"),
        projections: size("lsh_num_projs"),
        min_seq_len: size("min_seq_len"),
        seed: 0,
    }
}

/// HyperAttention with the directions and samples that its authors' code drew.
fn estimated(case: &Case) {
    let [q, k, v] = ["in.q", "in.k", "in.v"].map(|name| case.four(name));
    let (hyper, causal) = (hyper(case, &case.index["params"]), case.flag("causal"));
    let mut sample = hyper.sample(q.view(), k.view(), causal).unwrap();
    sample.directions = narrow(&case.matrix("in.proj"));
    for draw in case.index["params"]["draws"].as_array().unwrap() {
        let samples = case.three(draw["tensor"].as_str().unwrap()).mapv(|place| place as u32);
        sample.keys[draw["level"].as_u64().unwrap() as usize] = samples;
    }
    case.holds("out.hash_q", sample.hashes(q.view()).mapv(f64::from).into_dyn());
    case.holds("out.hash_k", sample.hashes(k.view()).mapv(f64::from).into_dyn());
    let scale = case.number("scale") as f32;
    case.attended(&hyper.attend_with(q.view(), k.view(), v.view(), scale, causal, &sample).unwrap());
}

/// What estimates and codes are off, beside the reference implementations' errors on the same inputs.
fn errors(case: &Case) {
    let [q, k, v] = ["in.q", "in.k", "in.v"].map(|name| case.four(name));
    let scale = case.number("scale") as f32;
    let square = |x: &Array4<f32>| x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>();
    let relative = |found: &AttentionOutput, reference: &AttentionOutput| {
        (square(&(&found.output - &reference.output)) / square(&reference.output)).sqrt()
    };
    let references = [false, true].map(|causal| {
        exact(q.view(), k.view(), v.view(), scale, &AttentionMask { causal, ..AttentionMask::default() }).unwrap()
    });
    let (mut estimates, mut by_codes) = (0, 0);
    let table = &case.folder["error_table"]["results"][case.index["name"].as_str().unwrap()]["rows"];
    for row in table.as_array().unwrap() {
        let (method, causal) = (row["method"].as_str().unwrap(), row["causal"].as_bool().unwrap());
        let reference = &references[usize::from(causal)];
        let what = format!("{}: {method}, causal {causal}, {}", case.name, row["settings"]);
        let intended = method.starts_with("hyper-attention, own-block samples masked");
        // Where queries find no keys of their kind, nobody's estimate means anything.
        if intended || method.starts_with("hyper-attn peer") && case.index["name"] == "clustered" {
            let hyper = hyper(case, &row["settings"]);
            let of_seed = |seed| {
                let found =
                    HyperAttention { seed, ..hyper }.attend(q.view(), k.view(), v.view(), scale, causal).unwrap();
                relative(&found, reference)
            };
            let found = (0..5).map(of_seed).sum::<f64>() / 5.0;
            let [mean, std] = ["mean", "std"].map(|name| row["rel_err"][name].as_f64().unwrap());
            // Two means of five draws each.
            assert!(found <= mean + 3.0 * std * (2.0f64 / 5.0).sqrt(), "{what}: {found} for {mean} ± {std}");
            estimates += 1;
        } else if let Some(codes) = row["settings"]["codes"].as_u64() {
            let [of_queries, of_keys] = ["q", "k"]
                .map(|of| AttentionCodebook::of_codewords(case.three(&format!("in.codebook_{of}_{codes}"))).unwrap());
            let queries = match method {
                "vq_qk reference (q and k quantised)" => Some(&of_queries),
                "keys-only quantisation reference" => None,
                _ => continue,
            };
            let attention = VqAttention::new(&of_keys, queries, scale, 64);
            let found = match causal {
                true => {
                    let mut cache = CompressedCache::new(1, 1, of_keys.codes(), v.dim().3);
                    attention.causal(q.view(), k.view(), v.view(), &mut cache).unwrap()
                }
                false => attention.bidirectional(q.view(), k.view(), v.view(), &AttentionMask::default()).unwrap(),
            };
            let (found, expected) = (relative(&found, reference), row["rel_err"].as_f64().unwrap());
            // It is given to four digits.
            assert!((found / expected - 1.0).abs() < 1e-3, "{what}: {found} for {expected}");
            by_codes += 1;
        }
    }
    assert!(estimates > 0 && by_codes > 0, "{}: nothing compared", case.name);
}
