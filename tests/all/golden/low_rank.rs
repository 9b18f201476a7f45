//! LQER on Qwix, run; and LQER, L²QER, QERA-approx and QERA-exact by float64 formulas.

use ndarray::{Array2, ArrayView2, s};
use safetensors::Dtype;
use safetensors::tensor::TensorView;

use layerstore::layer::{
    ActivationFormat, Clipping, Group, LowRankConfig, PackedMatrix, Rank, RowType, SvdMethod, WeightFormat, WeightType,
};
use layerstore::{ImportOptions, Rules, Store, formats, import};
use layerstore_core::layer::{Correction, Transform};
use layerstore_core::quant::unpack;

use super::{Case, Tally, narrow};

#[path = "../../../examples/lqer_table/peer.rs"]
mod peer;
use peer::Peer;

/// All components of a correction, of which the first k are the one of rank k.
fn all_components(out: usize, inputs: usize) -> LowRankConfig {
    LowRankConfig {
        rank: Rank::Components(out.min(inputs)),
        svd: SvdMethod::Full,
        factors: RowType::F32,
        ..LowRankConfig::default()
    }
}

fn codes(q: &PackedMatrix) -> Array2<u8> {
    let mut all = Array2::zeros((q.nrows(), q.ncols()));
    for (row, mut codes) in all.rows_mut().into_iter().enumerate() {
        unpack(q.row_codes(row), q.format().weight_type.bits(), codes.as_slice_mut().unwrap());
    }
    all
}

#[test]
fn golden_qera() {
    let mut tally = Tally::default();
    for case in Case::of("qera") {
        let config = &case.index["config"];
        let number = |name: &str| config[name].as_u64().unwrap() as usize;
        // The peer has y = x W, we y = x Wᵀ.
        let weight = narrow(&case.matrix("in.weight").reversed_axes());
        let format = WeightFormat {
            weight_type: WeightType::Int(number("bits") as u8),
            group: Group::Size(number("group_size")),
            ..WeightFormat::default()
        };
        let packed = PackedMatrix::quantize(weight.view(), format, Clipping::Absmax, None).unwrap();
        assert_eq!(codes(&packed).mapv(f64::from).reversed_axes(), case.matrix("in.qvalue"), "{}", case.name);
        let zeros =
            Array2::from_shape_vec((packed.nrows(), packed.zeros().len() / packed.nrows()), packed.zeros().to_vec());
        assert_eq!(zeros.unwrap().mapv(f64::from).reversed_axes(), case.matrix("in.zero"), "{}", case.name);

        let dequantised = narrow(&case.matrix("in.w_dequant").reversed_axes());
        let error = &weight - &dequantised;
        let (x, second) = (case.matrix("in.x_eval"), case.matrix("in.R"));
        let exact = x.dot(&weight.t().mapv(f64::from));
        let squares = |m: &Array2<f64>| m.iter().map(|v| v * v).sum::<f64>();
        let scalar = |v: f64| ndarray::arr0(v).into_dyn();
        let lost = error.mapv(f64::from);
        let off = x.dot(&lost.t());
        case.holds("out.uncorrected.err_eval_rms", scalar((squares(&off) / off.len() as f64).sqrt()));
        case.holds("out.uncorrected.objective", scalar((lost.dot(&second) * &lost).sum()));
        let transforms = [
            ("lqer", Transform::Identity),
            ("l2qer", Transform::mean_abs(case.vector("in.abs_mean"))),
            ("qera_approx", Transform::rms(case.vector("in.sq_mean"))),
            ("qera_exact", Transform::exact(second.view()).unwrap()),
        ];
        let (out, inputs) = weight.dim();
        for (method, transform) in transforms {
            let (settings, most) = (all_components(out, inputs), out.min(inputs));
            let all = Correction::of(error.view(), weight.view(), &settings, most, &transform).unwrap();
            let sigma = case.vector(&format!("out.{method}.sigma"));
            for (found, expected) in all.singular_values.iter().zip(&sigma) {
                assert!((f64::from(*found) - expected).abs() <= 1e-4 * sigma[0], "{} {method}", case.name);
            }
            for rank in config["ranks"].as_array().unwrap() {
                let k = rank.as_u64().unwrap() as usize;
                let part = all.a.slice(s![..k, ..]).t().dot(&all.b.slice(s![..k, ..]));
                let corrected = (&dequantised + &part).mapv(f64::from);
                let name = |what: &str| format!("out.r{k}.{method}.{what}");
                case.holds(&name("w_corrected"), corrected.t().to_owned().into_dyn());
                let off = x.dot(&corrected.t()) - &exact;
                case.holds(&name("err_eval_rms"), scalar((squares(&off) / off.len() as f64).sqrt()));
                case.holds(&name("err_eval_rel"), scalar((squares(&off) / squares(&exact)).sqrt()));
                let left = weight.mapv(f64::from) - &corrected;
                case.holds(&name("objective"), scalar((left.dot(&second) * &left).sum()));
            }
        }
        tally.ran(&case, "qera", &[]);
    }
    tally.expect(&[("qera", 3)]);
}

#[test]
fn golden_lqer_kernels() {
    let cases = Case::of("lqer_qwix");
    let mut tally = Tally::default();
    for case in cases.iter().filter(|c| c.index.get("float_file").is_some()) {
        let float = float_of(&cases, case);
        let kernels = case.index["per_layer"].as_object().unwrap();
        assert_eq!(kernels.len() as u64, case.index["quantised_layers"].as_u64().unwrap(), "{}", case.name);
        for (kernel, layer) in kernels {
            let weight = narrow(&float.matrix(&format!("w.{kernel}")).reversed_axes());
            let (out, inputs) = weight.dim();
            let format = lqer_format(layer["bits"].as_u64().unwrap());
            let packed = PackedMatrix::quantize(weight.view(), format, Clipping::Absmax, None).unwrap();
            same_integers(case, kernel, &packed);
            let error = &weight - &packed.dequantize();
            let (settings, most) = (all_components(out, inputs), out.min(inputs));
            let all = Correction::of(error.view(), weight.view(), &settings, most, &Transform::Identity).unwrap();
            let sigma = case.vector(&format!("out.error_sigma/{kernel}"));
            let close = |a: f32, b: f64| (f64::from(a) - b).abs() <= 1e-4 * sigma[0];
            assert!(all.singular_values.iter().zip(&sigma).all(|(a, b)| close(*a, *b)), "{} {kernel}", case.name);
            let k = layer["rank"].as_u64().unwrap() as usize;
            let found = all.a.slice(s![..k, ..]).t().dot(&all.b.slice(s![..k, ..])).mapv(f64::from);
            let (a, b) = (case.matrix(&format!("out.error_a/{kernel}")), case.matrix(&format!("out.error_b/{kernel}")));
            let off = (found.t().to_owned() - a.dot(&b)).iter().fold(0f64, |m, v| m.max(v.abs()));
            let allowed = case.index["tolerance"]["error_a @ error_b"]["abs"].as_f64().unwrap();
            assert!(off <= allowed, "{} {kernel}: {off}", case.name);
        }
        tally.ran(case, case.index["model"].as_str().unwrap(), &["out.ptq", "out.lqer"]);
    }
    tally.expect(&[("SimpleMLP", 2), ("SimpleTransformer", 4)]);
}

/// Weights and activations as int8: each product of integers, times both scales.
#[test]
fn golden_lqer_int8_activations() {
    let mut tally = Tally::default();
    for case in Case::of("lqer_qwix").iter().filter(|c| c.has("out.act_qvalue/0")) {
        let mut x = narrow(&case.matrix("in.x"));
        let mut float = case.matrix("in.x");
        for (place, kernel) in ["Dense_0/kernel", "Dense_1/kernel"].into_iter().enumerate() {
            let weight = case.matrix(&format!("w.{kernel}"));
            float = float.dot(&weight);
            let weight = narrow(&weight.reversed_axes());
            let quantize =
                |m: ArrayView2<f32>| PackedMatrix::quantize(m, lqer_format(8), Clipping::Absmax, None).unwrap();
            let (weight, inputs) = (quantize(weight.view()), quantize(x.view()));
            same_integers(case, kernel, &weight);
            let found = codes(&inputs).mapv(|c| f64::from(c as i8));
            assert_eq!(found, case.matrix(&format!("out.act_qvalue/{place}")), "{}", case.name);
            let scales = inputs.scales().iter().map(|&scale| f64::from(scale)).collect();
            let scales = Array2::from_shape_vec((inputs.nrows(), 1), scales).unwrap();
            case.holds(&format!("out.act_scale/{place}"), scales.into_dyn());
            // The kernel on integers rounds its inputs as the peer does.
            let product = weight.products(x.view(), ActivationFormat::Int8);
            x = inputs.dequantize().dot(&weight.dequantize().t());
            let off = (&product - &x).iter().fold(0f32, |most, v| most.max(v.abs()));
            assert!(off <= 1e-5, "{} {kernel}: {off}", case.name);
            if place == 0 {
                x.mapv_inplace(|v| v.max(0.0));
                float.mapv_inplace(|v| v.max(0.0));
            }
        }
        case.holds("out.ptq", x.mapv(f64::from).into_dyn());
        case.holds("out.fp", float.into_dyn());
        tally.ran(case, case.index["model"].as_str().unwrap(), &[]);
    }
    tally.expect(&[("SimpleMLP", 1)]);
}

/// Whole models from a store: the checkpoint imported under rules, its layers opened from the snapshot, and run.
#[tokio::test(flavor = "multi_thread")]
async fn golden_lqer_models() {
    let cases = Case::of("lqer_qwix");
    let mut tally = Tally::default();
    for case in cases.iter().filter(|c| c.index.get("float_file").is_some()) {
        let float = float_of(&cases, case);
        let folder = tempfile::tempdir().unwrap();
        let checkpoint = folder.path().join("model.safetensors");
        write(float, &checkpoint);
        let store = Store::create(folder.path().join("layers").to_str().unwrap()).await.unwrap();
        let config = &case.index["config"];
        let rule = |rank: usize, layers: &str| {
            let kind = config["weight_qtype"].as_str().unwrap();
            format!(
                "[[rule]]\nlayers = '{layers}'\nmethod = 'low_rank'\nrank = {rank}\nsvd = 'full'\nfactors = 'f32'\n\
                 clipping = 'absmax'\nweight = {{ type = '{kind}', group = 'channel', symmetric = true }}\n"
            )
        };
        let rank = config["rank"].as_u64().unwrap() as usize;
        // A rank above a layer's is the layer's for the peer, and refused here.
        let narrowest = case.index["per_layer"]["Dense_1/kernel"]["rank"].as_u64();
        let last = narrowest.map_or(String::new(), |rank| rule(rank as usize, r"Dense_1"));
        let kernels = r"block_\d+\..*|output|Dense_\d";
        for (model, rules) in
            [("float", String::new()), ("ptq", rule(0, kernels)), ("lqer", format!("{last}{}", rule(rank, kernels)))]
        {
            let rules = Rules::parse(&rules, "rules.toml").unwrap();
            let source = formats::open(&checkpoint).unwrap();
            import(&store, source, model, ImportOptions { rules, ..ImportOptions::default() }).await.unwrap();
        }
        store.create_snapshot("golden").await.unwrap();
        let snapshot = store.at("golden").await.unwrap();
        let transformer = case.index["model"] == "SimpleTransformer";
        for (model, expected) in
            [("float", if transformer { "out.logits" } else { "out.y" }), ("ptq", "out.ptq"), ("lqer", "out.lqer")]
        {
            let model = Peer::open(&snapshot, model).await.unwrap();
            let of = if model.name() == "float" { float } else { case };
            let quantised = model.layers().values().filter(|l| l.method() == "low_rank").count();
            let counted = case.index["quantised_layers"].as_u64().unwrap() as usize;
            assert_eq!(quantised, if model.name() == "float" { 0 } else { counted }, "{}", case.name);
            let found = match transformer {
                true => model
                    .transformer(&float.any("in.tokens").clone().into_dimensionality().unwrap())
                    .unwrap()
                    .into_dyn(),
                false => model.perceptron(&narrow(&float.matrix("in.x"))).unwrap().into_dyn(),
            };
            of.holds(expected, found.mapv(f64::from));
        }
        // The integers, their scales and the correction are the kernels' test's.
        let of_kernels = ["out.qvalue/", "out.scale/", "out.error_sigma/", "out.error_a/", "out.error_b/"];
        tally.ran(case, case.index["model"].as_str().unwrap(), &of_kernels);
    }
    tally.expect(&[("SimpleMLP", 2), ("SimpleTransformer", 4)]);
}

fn float_of<'a>(cases: &'a [Case], case: &Case) -> &'a Case {
    let file = case.index["float_file"].as_str().unwrap();
    cases.iter().find(|c| c.index["file"] == file).unwrap()
}

fn lqer_format(bits: u64) -> WeightFormat {
    let weight_type = WeightType::Int(bits as u8);
    WeightFormat { weight_type, group: Group::Channel, symmetric: true, ..WeightFormat::default() }
}

fn same_integers(case: &Case, kernel: &str, packed: &PackedMatrix) {
    let unused = 8 - packed.format().weight_type.bits();
    let found = codes(packed).mapv(|c| f64::from((c << unused) as i8 >> unused));
    assert_eq!(found.t(), case.matrix(&format!("out.qvalue/{kernel}")), "{} {kernel}", case.name);
    let scales = Array2::from_shape_vec((1, packed.nrows()), packed.scales().iter().map(|&v| f64::from(v)).collect());
    case.holds(&format!("out.scale/{kernel}"), scales.unwrap().into_dyn());
}

/// The peer's parameters as a checkpoint: kernels as `[out, in]` weights of layers, the rest as it is.
fn write(float: &Case, path: &std::path::Path) {
    let mut tensors: Vec<(String, Vec<usize>, Vec<u8>)> = vec![];
    for (name, tensor) in &float.tensors {
        let Some(name) = name.strip_prefix("w.") else { continue };
        let (name, tensor) = match name.strip_suffix("/kernel") {
            Some(layer) => (format!("{layer}.weight"), tensor.clone().reversed_axes()),
            None => (name.to_owned(), tensor.clone()),
        };
        let bytes = tensor.iter().flat_map(|&v| (v as f32).to_le_bytes()).collect();
        tensors.push((name.replace('/', "."), tensor.shape().to_vec(), bytes));
    }
    let views =
        tensors.iter().map(|(name, shape, bytes)| (name, TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap()));
    std::fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}
