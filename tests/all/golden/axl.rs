//! AXL: its functions, and key–value layers by float64 formulas.

use ndarray::{Array1, Array2, ArrayView1, ArrayView2};

use layerstore::layer::{
    Accuracy, Decomposition, KeyValueConfig, KeyValueLayer, Layer, Limit, Ranking, SearchSettings, ThresholdMethod,
    compress, search_threshold,
};
use layerstore::{Calibration, ErrorKind};
use layerstore_core::linalg::{
    Whitening, covariance, inverse_lower, matmul_f64, normal_cdf, normal_pdf, normal_quantile, regularized_inverse,
    svd_keys_values,
};

use super::{Case, Tally, narrow};
use crate::support::refused;

/// The functions of the normal distribution, which share a case.
const NORMAL: &str = "standard_normal_pdf, standard_normal_cdf, inverse_standard_normal_cdf";

#[test]
fn golden_axl() {
    let mut tally = Tally::default();
    for case in Case::of("axl") {
        match case.function() {
            "svd_keys_values" => keys_values(&case),
            "estimate_covariance" => estimated_covariance(&case),
            "whiten_standardize_keys" => whitened_keys(&case),
            "safe_matrix_inverse" => inverse(&case),
            "compute_search_threshold" => thresholds(&case),
            "KVLinear (svd)" => layer(&case, Decomposition::Svd, Ranking::Score),
            "KVLinear (whitened_svd)" => layer(&case, Decomposition::WhitenedSvd, Ranking::Contribution),
            NORMAL => normal(&case),
            other => panic!("{}: unknown function '{other}'", case.name),
        }
        // Keys that are whitened twice, and a quantile that is an approximation.
        tally.ran(&case, case.function(), &["out.peer.", "out.quantile"]);
    }
    tally.expect(&[
        ("KVLinear (svd)", 3),
        ("KVLinear (whitened_svd)", 3),
        ("compute_search_threshold", 1),
        ("estimate_covariance", 8),
        ("safe_matrix_inverse", 5),
        (NORMAL, 1),
        ("svd_keys_values", 7),
        ("whiten_standardize_keys", 6),
    ]);
}

fn keys_values(case: &Case) {
    let weight = case.matrix("in.weight");
    let (energy, least) = (case.vector("in.energy_keep"), case.vector("in.min_sigma"));
    let mut ranks = vec![];
    for c in 0..energy.len() {
        let found = svd_keys_values(weight.view(), energy[c], least[c]).unwrap();
        ranks.push(found.singular_values.len() as f64);
        if !case.has(&format!("out.c{c}.S")) {
            assert_eq!(ranks[c], 0.0, "{} configuration {c} has no outputs", case.name);
            continue;
        }
        case.holds(&format!("out.c{c}.KtK"), matmul_f64(found.keys.t(), found.keys.view()).into_dyn());
        case.holds(&format!("out.c{c}.reconstruction"), matmul_f64(found.values.view(), found.keys.view()).into_dyn());
        case.holds(&format!("out.c{c}.S"), found.singular_values.into_dyn());
    }
    case.holds("out.rank", Array1::from(ranks).into_dyn());
}

fn estimated_covariance(case: &Case) {
    let data = case.has("in.data").then(|| narrow(&case.matrix("in.data")));
    let config = &case.index["config"];
    let features = config["feature_dim"].as_u64().unwrap() as usize;
    let found = covariance(data.as_ref().map(|d| d.view()), features, config["ridge"].as_f64().unwrap()).unwrap();
    case.holds("out.covariance", found.into_dyn());
}

fn whitened_keys(case: &Case) {
    let whitening = Whitening::new(case.matrix("in.covariance").view());
    if case.tolerance("out.L").is_none() {
        // An indefinite covariance: the peer makes one up, here it is an error that says what to do.
        refused(whitening, ErrorKind::InvalidInput, &["ridge"]);
        return;
    }
    let whitening = whitening.unwrap();
    let (keys, x) = (case.matrix("in.keys"), case.matrix("in.x"));
    let (unit, scales) = whitening.keys(keys.view()).unwrap();
    let z = whitening.queries(x.view()).unwrap();
    case.holds("out.dot_exact", (matmul_f64(z.view(), unit.t()) * &scales).into_dyn());
    case.holds("out.L", whitening.factor().to_owned().into_dyn());
    case.holds("out.peer.L_inv", inverse_lower(whitening.factor()).into_dyn());
    case.holds("out.z", z.into_dyn());
    case.holds("out.k_tilde_corrected", unit.into_dyn());
    case.holds("out.scales_corrected", scales.into_dyn());
}

fn inverse(case: &Case) {
    let matrix = case.matrix("in.matrix");
    let ridge = case.index["config"]["ridge"].as_f64().unwrap();
    let found = regularized_inverse(matrix.view(), ridge).unwrap();
    if case.has("out.inverse_exact") {
        case.holds("out.inverse_exact", found.clone().into_dyn());
        case.holds("out.inverse", found.into_dyn());
    } else {
        // For information: singular as far as float32 goes. What is given has to be an inverse of what was taken.
        let product = |m: &Array2<f64>| matmul_f64(m.view(), found.view());
        let distance = |m: Array2<f64>| {
            let eye = Array2::<f64>::eye(matrix.nrows());
            (product(&m) - eye).iter().fold(0f64, |worst, d| worst.max(d.abs()))
        };
        let eye = Array2::<f64>::eye(matrix.nrows());
        assert!(distance(matrix.clone()).min(distance(&matrix + &(eye * ridge))) < 1e-4, "{}", case.name);
    }
}

fn thresholds(case: &Case) {
    let (expected, total) = (case.vector("in.expected"), case.vector("in.total"));
    let all = |method: ThresholdMethod| {
        let one = |(&e, &t): (&f64, &f64)| search_threshold(method, e, t as usize).unwrap();
        expected.iter().zip(&total).map(one).collect::<Array1<f64>>().into_dyn()
    };
    case.holds("out.quantile_exact", all(ThresholdMethod::Quantile));
    case.holds("out.fixed", all(ThresholdMethod::Fixed));
    case.holds("out.adaptive", all(ThresholdMethod::Adaptive));
}

fn normal(case: &Case) {
    let map = |tensor: &str, f: fn(f64) -> f64| case.vector(tensor).mapv(f).into_dyn();
    case.holds("out.pdf", map("in.x", normal_pdf));
    case.holds("out.cdf", map("in.x", normal_cdf));
    case.holds("out.cdf_exact", map("in.x", normal_cdf));
    case.holds("out.inverse_exact", map("in.p", normal_quantile));
    let (extreme, exact) = (map("in.p_extreme", normal_quantile), case.any("out.inverse_extreme_exact"));
    assert!(extreme.iter().zip(exact).all(|(f, e)| (f - e).abs() < 1e-5 * e.abs()), "{extreme} for {exact}");
}

/// A layer from a weight and a covariance: its hits, outputs and certified errors at every threshold.
fn layer(case: &Case, decomposition: Decomposition, ranking: Ranking) {
    let weight = narrow(&case.matrix("in.weight"));
    let bias = case.has("in.bias").then(|| case.vector("in.bias").mapv(|v| v as f32));
    let statistics = Calibration::from_covariance(Array1::zeros(weight.ncols()), case.matrix("in.covariance")).unwrap();
    let config = KeyValueConfig {
        decomposition,
        ranking,
        ridge_regularization: 0.0,
        ridge_relative: 0.0,
        ..KeyValueConfig::default()
    };
    let layer = compress(&config, weight.view(), bias.as_ref().map(|b| b.view()), Some(&statistics)).unwrap();
    let scale: Array1<f64> = layer.scales().iter().map(|&s| f64::from(s)).collect();
    case.holds("out.scale", scale.into_dyn());

    let x = narrow(&case.matrix("in.x"));
    let exact = case.matrix("out.y_exact");
    case.holds("out.y_exact", forward(&layer, x.view(), Accuracy::Full).into_dyn());
    let everything = layer.search(x.view(), Some(Limit::Threshold(0.0))).unwrap();
    let mut scores = Array2::zeros((x.nrows(), layer.rank()));
    for (query, answer) in everything.iter().enumerate() {
        for hit in &answer.hits {
            let value = if ranking == Ranking::Score { hit.score } else { hit.contribution };
            scores[[query, hit.key as usize]] = f64::from(value.abs());
        }
    }
    case.holds("out.abs_score", scores.into_dyn());

    let thresholds = case.vector("in.thresholds");
    let shape = (thresholds.len(), x.nrows());
    let mut hits = ndarray::Array3::zeros((shape.0, shape.1, layer.rank()));
    let mut counts = Array2::zeros(shape);
    let mut certified = Array2::zeros(shape);
    let mut y = ndarray::Array3::zeros((shape.0, shape.1, weight.nrows()));
    for (t, &threshold) in thresholds.iter().enumerate() {
        let settings = SearchSettings { ranking, threshold: Some(threshold as f32), ..SearchSettings::default() };
        let limited = layer.with_search(settings).unwrap();
        for (query, answer) in limited.search(x.view(), None).unwrap().iter().enumerate() {
            answer.hits.iter().for_each(|h| hits[[t, query, h.key as usize]] = 1.0);
            counts[[t, query]] = answer.hits.len() as f64;
            let bare = exact.row(query).to_owned() - &bias_or_zero(bias.as_ref().map(|b| b.view()), weight.nrows());
            certified[[t, query]] = answer.certified_error.unwrap() * bare.dot(&bare).sqrt();
        }
        y.index_axis_mut(ndarray::Axis(0), t).assign(&forward(&limited, x.view(), Accuracy::Approximate));
        // A batch goes through one product, a few queries through a gather.
        let twice = ndarray::concatenate![ndarray::Axis(0), x, x];
        let both = forward(&limited, twice.view(), Accuracy::Approximate);
        let half = both.slice(ndarray::s![..x.nrows(), ..]).to_owned();
        assert!((&half - &y.index_axis(ndarray::Axis(0), t)).iter().all(|d| d.abs() < 1e-4), "{}", case.name);
    }
    case.holds("out.hits", hits.into_dyn());
    if case.tolerance("out.hit_count").is_some() {
        case.holds("out.hit_count", counts.into_dyn());
    }
    case.holds("out.certified_error", certified.into_dyn());
    case.holds("out.y", y.into_dyn());
}

fn forward(layer: &KeyValueLayer, x: ArrayView2<f32>, accuracy: Accuracy) -> Array2<f64> {
    layer.clone().shared().forward(x, accuracy).unwrap().y.mapv(f64::from)
}

fn bias_or_zero(bias: Option<ArrayView1<f32>>, outputs: usize) -> Array1<f64> {
    bias.map_or_else(|| Array1::zeros(outputs), |b| b.mapv(f64::from))
}
