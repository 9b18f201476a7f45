//! Attention: float64 formulas, and codebooks as Transformer-VQ learns them.

use ndarray::{Array3, Array4, ArrayView4, Axis, Ix2, Ix3, Ix4, s};

use layerstore::attention::{Attended, Codebook, Past, Quantized, Visible, exact};

use super::{Case, Tensor};

#[test]
fn golden_attention() {
    for case in Case::of("attention") {
        match case.index["family"].as_str().unwrap() {
            "exact" => softmax(&case),
            "vq_qk" => both_quantized(&case),
            "transformer_vq" => keys_quantized(&case),
            "codebook" => learned(&case),
            // Not here yet.
            "hyper" | "error_table" => {}
            other => panic!("{}: unknown family '{other}'", case.name),
        }
    }
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

    fn attended(&self, found: &Attended) {
        self.holds("out.o", found.output.mapv(f64::from).into_dyn());
        self.holds("out.lse", found.log_sum_exp.mapv(f64::from).into_dyn());
    }
}

fn softmax(case: &Case) {
    let [q, k, v] = ["in.q", "in.k", "in.v"].map(|name| case.four(name));
    let visible = Visible { causal: case.flag("causal"), ..Visible::default() };
    case.attended(&exact(q.view(), k.view(), v.view(), case.number("scale") as f32, &visible).unwrap());
}

/// Codes of vectors `[batch, heads, tokens, dim]`, `[batch, heads, tokens]`.
fn codes(book: &Codebook, x: ArrayView4<f32>) -> Tensor {
    let all: Vec<_> = x.outer_iter().map(|x| book.assign(x).unwrap().mapv(f64::from)).collect();
    let views: Vec<_> = all.iter().map(|codes| codes.view()).collect();
    ndarray::stack(Axis(0), &views).unwrap().into_dyn()
}

fn both_quantized(case: &Case) {
    let [q, k, v] = ["in.q", "in.k", "in.v"].map(|name| case.four(name));
    let [of_queries, of_keys] =
        ["in.codebook_q", "in.codebook_k"].map(|name| Codebook::of_codewords(case.three(name)).unwrap());
    case.holds("out.z_q", codes(&of_queries, q.view()));
    case.holds("out.z_k", codes(&of_keys, k.view()));
    for block_len in [1, 16, 1000] {
        let scale = case.number("scale") as f32;
        let attention = Quantized { keys: &of_keys, queries: Some(&of_queries), scale, block_len };
        let found = if case.flag("causal") {
            let mut past = Past::new(q.dim().0, q.dim().1, of_keys.codes(), v.dim().3);
            attention.causal(q.view(), k.view(), v.view(), &mut past).unwrap()
        } else {
            attention.all(q.view(), k.view(), v.view(), &Visible::default()).unwrap()
        };
        case.attended(&found);
    }
}

/// Block after block, each with what the ones before have left.
fn keys_quantized(case: &Case) {
    if case.flag("relative_bias") {
        // Not here yet.
        return;
    }
    let [q, k, v] = ["in.q", "in.k", "in.v"].map(|name| case.four(name));
    let book = Codebook::of_codewords(case.three("in.codebook_k")).unwrap();
    case.holds("out.z_k", codes(&book, k.view()));
    let block_len = case.number("block_len") as usize;
    let attention = Quantized { keys: &book, queries: None, scale: case.number("scale") as f32, block_len };
    let past = || Past::new(q.dim().0, q.dim().1, book.codes(), v.dim().3);
    case.attended(&attention.causal(q.view(), k.view(), v.view(), &mut past()).unwrap());
    let mut past = past();
    let (mut counts, mut means, mut outputs) = (vec![], vec![], vec![]);
    for start in (0..q.dim().2).step_by(block_len) {
        let end = q.dim().2.min(start + block_len);
        let part = |x: &Array4<f32>| x.slice(s![.., .., start..end, ..]).to_owned();
        outputs.push(attention.causal(part(&q).view(), part(&k).view(), part(&v).view(), &mut past).unwrap().output);
        counts.push(past.counts.mapv(f64::from));
        means.push(past.means.mapv(f64::from));
    }
    let outputs: Vec<_> = outputs.iter().map(|output| output.view()).collect();
    case.holds("out.o", ndarray::concatenate(Axis(2), &outputs).unwrap().mapv(f64::from).into_dyn());
    let (counts, means): (Vec<_>, Vec<_>) =
        (counts.iter().map(|c| c.view()).collect(), means.iter().map(|m| m.view()).collect());
    case.holds("out.prefix_count", ndarray::stack(Axis(0), &counts).unwrap().into_dyn());
    case.holds("out.prefix_mean", ndarray::stack(Axis(0), &means).unwrap().into_dyn());
}

fn learned(case: &Case) {
    let counts = case.any("in.count").clone().into_dimensionality::<Ix2>().unwrap().mapv(|v| v as f32);
    let mut book = Codebook::new(case.three("in.sum"), counts).unwrap();
    let there = case.vector("in.mask").mapv(|v| v != 0.0);
    let steps: Vec<_> = case.four("in.x").outer_iter().map(|x| x.to_owned()).collect();
    let mut found: [Vec<Tensor>; 6] = Default::default();
    for x in &steps {
        let learned = book.learn(x.view(), Some(there.view()), case.number("gamma") as f32).unwrap();
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
