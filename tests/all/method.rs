//! A method that the program brings itself: settings and a layer, registered at run time, and everything that a store does with
//! any other. And what a program that does not know it can do with such a store: all but run the layers.

use std::time::Duration;

use bytes::Bytes;
use layerstore::layer::parts::{Tensor, WeightRows, bytes_f32, f32_bytes};
use layerstore::layer::{
    Accuracy, ExactSource, Gradients, Layer, LayerShape, LowRankConfig, Method, MethodConfig, MethodName, Output,
    Parts, SharedLayer, check_rows, compress, layer_from_parts, read_config, register,
};
use layerstore::{
    ActivationsFile, Calibration, CalibrationFile, Error, ErrorKind, ExportOptions, ImportOptions, Result, Rules,
    Store, evaluate, exact_layer, export, formats, import, preview,
};
use layerstore_core::linalg::{matmul, matmul_nt, relative_error};
use ndarray::{Array1, Array2, ArrayView1, ArrayView2, Axis};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::support::{CHECKPOINT, INPUTS, Place, refused};

/// One scale a row and the sign of each weight (XNOR-Net): `Ŵ_ij = s_i · sign(W_ij)`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RowSign {
    /// Whether scales are those that are best for the calibration inputs, taken one by one, not for all directions alike.
    calibrated: bool,
    /// What outputs are multiplied with: how the layer runs, and no part of what is stored.
    gain: f32,
}

impl Default for RowSign {
    fn default() -> Self {
        RowSign { calibrated: true, gain: 1.0 }
    }
}

fn check_gain(gain: f32) -> Result<()> {
    match gain > 0.0 && gain.is_finite() {
        true => Ok(()),
        false => Err(Error::expected("gain", gain, "a number above 0")),
    }
}

impl Method for RowSign {
    const NAME: &'static str = "row_sign";
    type Layer = RowSignLayer;

    fn validate(&self) -> Result<()> {
        check_gain(self.gain)
    }

    fn check(&self, shape: LayerShape, _calibrated: bool) -> Result<()> {
        match shape.in_features.is_multiple_of(8) {
            true => Ok(()),
            false => Err(Error::expected("weights of a row", shape.in_features, "a multiple of 8")),
        }
    }

    fn expected_bytes(&self, shape: LayerShape) -> Result<Option<usize>> {
        Ok(Some(shape.out_features * (shape.in_features / 8 + 4) + shape.bias_bytes()))
    }

    fn compress(
        &self,
        weight: ArrayView2<f32>,
        bias: Option<ArrayView1<f32>>,
        calibration: Option<&Calibration>,
    ) -> Result<RowSignLayer> {
        let columns = weight.ncols();
        let importance = match calibration.filter(|_| self.calibrated) {
            Some(calibration) => calibration.second_diagonal(),
            None => Array1::ones(columns),
        };
        let scale = |row: ArrayView1<f32>| {
            let weighted: f64 = row.iter().zip(&importance).map(|(w, d)| f64::from(w.abs()) * d).sum();
            (weighted / importance.sum()) as f32
        };
        let signs = weight.rows().into_iter().flat_map(|row| {
            let byte = |bits: &[f32]| bits.iter().rev().fold(0u8, |byte, w| byte << 1 | u8::from(*w < 0.0));
            row.to_vec().chunks(8).map(byte).collect::<Vec<u8>>()
        });
        Ok(RowSignLayer {
            columns,
            signs: signs.collect(),
            scales: weight.rows().into_iter().map(scale).collect(),
            bias: bias.map(|b| b.to_owned()),
            gain: self.gain,
        })
    }

    fn from_parts(parts: Parts) -> Result<RowSignLayer> {
        let Stored { in_features: columns } = read_config(Self::NAME, &parts.config)?;
        let missing = || Error::expected("parts of a row_sign layer", "no weight rows", "weight rows");
        let rows = parts.weights.as_ref().ok_or_else(missing)?;
        let found = (rows.packed.len(), rows.scales.len());
        let expected = (rows.rows.saturating_mul(columns / 8), rows.rows.saturating_mul(4));
        if found != expected {
            return Err(Error::expected("bytes of signs and scales", format!("{found:?}"), format!("{expected:?}")));
        }
        let bias = parts.tensor("bias").map(Tensor::to_vector).transpose()?;
        if let Some(bias) = bias.as_ref().filter(|bias| bias.len() != rows.rows) {
            return Err(Error::expected("length of the bias", bias.len(), rows.rows));
        }
        Ok(RowSignLayer { columns, signs: rows.packed.clone(), scales: bytes_f32(&rows.scales), bias, gain: 1.0 })
    }

    fn with_stored(&self, stored: &Value) -> Value {
        let mut all = stored.clone();
        all["gain"] = self.gain.into();
        all
    }
}

/// What the stored config says.
#[derive(Serialize, Deserialize)]
struct Stored {
    in_features: usize,
}

/// What the catalogue's config says of how the layer runs.
#[derive(Deserialize)]
struct Running {
    gain: f32,
}

#[derive(Debug, Clone)]
struct RowSignLayer {
    columns: usize,
    /// Eight to a byte, the first lowest; 1 is negative.
    signs: Bytes,
    scales: Vec<f32>,
    bias: Option<Array1<f32>>,
    gain: f32,
}

impl RowSignLayer {
    fn row(&self, row: usize) -> Array1<f32> {
        let signs = &self.signs[row * self.columns / 8..];
        let scale = self.scales[row] * self.gain;
        Array1::from_shape_fn(self.columns, |j| if signs[j / 8] >> (j % 8) & 1 == 1 { -scale } else { scale })
    }
}

impl Layer for RowSignLayer {
    fn method(&self) -> MethodName {
        MethodName::new(RowSign::NAME)
    }

    fn out_features(&self) -> usize {
        self.scales.len()
    }

    fn in_features(&self) -> usize {
        self.columns
    }

    fn config(&self) -> Value {
        json!({"in_features": self.columns, "gain": self.gain})
    }

    fn configured(&self, config: &Value) -> Result<Option<SharedLayer>> {
        let Running { gain } = read_config(RowSign::NAME, config)?;
        check_gain(gain)?;
        Ok(Some(RowSignLayer { gain, ..self.clone() }.shared()))
    }

    fn to_parts(&self) -> Parts {
        let mut parts = Parts::new(RowSign::NAME, json!(Stored { in_features: self.columns }));
        let (packed, scales) = (self.signs.clone(), f32_bytes(&self.scales));
        parts.weights = Some(WeightRows { rows: self.scales.len(), packed, scales, ..WeightRows::default() });
        parts.tensors.extend(self.bias.as_ref().map(|bias| Tensor::vector("bias", &bias.to_vec())));
        parts
    }

    fn memory_bytes(&self) -> usize {
        self.signs.len() + 4 * self.scales.len()
    }

    fn product(&self, x: ArrayView2<f32>, _accuracy: Accuracy) -> Result<Output> {
        Ok(Output { y: matmul_nt(x, self.weight()?.view()), relative_error_bound: None })
    }

    fn bias(&self) -> Result<Option<Array1<f32>>> {
        Ok(self.bias.clone())
    }

    fn weight(&self) -> Result<Array2<f32>> {
        let all: Vec<u32> = (0..self.scales.len() as u32).collect();
        self.rows(&all)
    }

    fn rows(&self, indices: &[u32]) -> Result<Array2<f32>> {
        check_rows(indices, self.out_features())?;
        let mut rows = Array2::zeros((indices.len(), self.columns));
        for (mut to, &index) in rows.rows_mut().into_iter().zip(indices) {
            to.assign(&self.row(index as usize));
        }
        Ok(rows)
    }

    fn gradients(&self, x: ArrayView2<f32>, grad_output: ArrayView2<f32>) -> Result<Gradients> {
        Ok(Gradients {
            input: matmul(grad_output, self.weight()?.view()),
            weight: matmul(grad_output.t(), x),
            bias: grad_output.sum_axis(Axis(0)),
        })
    }

    fn exact_source(&self) -> ExactSource {
        ExactSource::Dense
    }
}

const RULES: &str = "[[rule]]\nlayers = 'blocks\\.\\d+\\..*'\nmethod = 'row_sign'\n";

fn inputs(layer: &str, width: usize) -> Array2<f32> {
    ActivationsFile::open(INPUTS).unwrap().get(layer, width).unwrap().unwrap()
}

/// What a layer of the checkpoint comes to, straight from the formula.
fn expected(layer: &str, gain: f32) -> Array2<f32> {
    let checkpoint = formats::open(CHECKPOINT).unwrap();
    let weight = checkpoint.matrix(checkpoint.tensor(&format!("{layer}.weight")).unwrap()).unwrap();
    let x = inputs(layer, weight.ncols());
    let squares: Array1<f64> = x.columns().into_iter().map(|c| c.iter().map(|&v| f64::from(v).powi(2)).sum()).collect();
    let mut result = weight.clone();
    for (mut row, w) in result.rows_mut().into_iter().zip(weight.rows()) {
        let scale = w.iter().zip(&squares).map(|(w, d)| f64::from(w.abs()) * d).sum::<f64>() / squares.sum();
        row.assign(&w.mapv(|w| if w < 0.0 { -scale as f32 * gain } else { scale as f32 * gain }));
    }
    result
}

fn options(rules: &str) -> ImportOptions {
    let rules = Rules::parse(rules, "rules.toml").unwrap();
    let calibration = Some(CalibrationFile::open(INPUTS).unwrap());
    ImportOptions { rules, calibration, ..ImportOptions::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_method_of_the_programs_own() {
    register::<RowSign>().unwrap();
    let place = Place::new();
    let store = Store::create(&place.store()).await.unwrap();
    let checkpoint = || formats::open(CHECKPOINT).unwrap();

    // Imported as planned, by rules that ask for it; the same stored arrays run with another gain.
    let plan = preview(checkpoint(), &options(RULES).rules, options(RULES).calibration.as_ref(), true).unwrap();
    let report = import(&store, checkpoint(), "signs", options(RULES)).await.unwrap();
    assert_eq!(plan.layers.len(), report.layers.len());
    let made: Vec<_> = report.layers.iter().filter(|l| l.method == "row_sign").collect();
    assert_eq!(made.len(), 6);
    for layer in &made {
        let planned = plan.layers.iter().find(|l| l.layer == layer.layer).unwrap();
        assert_eq!((planned.expected_bytes, planned.calibrated), (Some(layer.stored_bytes), true), "{}", layer.layer);
        assert!(layer.relative_error.is_some_and(|e| e > 0.1 && e < 1.0), "{layer:?}");
    }
    let louder = import(&store, checkpoint(), "louder", options(&format!("{RULES}gain = 2.0\n"))).await.unwrap();
    assert_eq!(louder.written_bytes, 0);
    import(&store, checkpoint(), "f32", ImportOptions::default()).await.unwrap();

    // Listed, shown, and run as the formula says.
    store.create_snapshot("kept").await.unwrap();
    let latest = store.latest().await.unwrap();
    let models = latest.models().await.unwrap();
    assert_eq!(models.iter().find(|m| m.model == "signs").unwrap().methods["row_sign"], 6);
    let mut outputs = vec![];
    for (model, gain) in [("signs", 1.0), ("louder", 2.0)] {
        let names: Vec<String> = latest.layers(model).await.unwrap().into_iter().map(|r| r.layer).collect();
        let ours: Vec<&String> = names.iter().filter(|name| made.iter().any(|l| l.layer == **name)).collect();
        assert_eq!(ours.len(), 6);
        for name in ours {
            let handle = latest.layer(model, name).await.unwrap();
            assert_eq!(handle.record().config["gain"], gain);
            let layer = handle.load().await.unwrap();
            assert_eq!(layer.downcast_ref::<RowSignLayer>().unwrap().gain, gain);
            let weight = expected(name, gain);
            assert!(relative_error(layer.weight().unwrap().view(), weight.view()) < 1e-6, "{model} {name}");
            let x = inputs(name, layer.in_features());
            let mut exact = x.dot(&weight.t());
            if let Some(bias) = layer.bias().unwrap() {
                exact += &bias;
            }
            let y = handle.forward(x.view(), Accuracy::Approximate).await.unwrap().y;
            assert!(relative_error(y.view(), exact.view()) < 1e-5, "{model} {name}");
            assert_eq!(layer.rows(&[3, 0]).unwrap(), layer.weight().unwrap().select(Axis(0), &[3, 0]));
            let gradients = layer.backward(x.view(), y.view()).unwrap();
            assert!(relative_error(gradients.input.view(), y.dot(&weight).view()) < 1e-5);
            outputs.push((model, name.clone(), y));
        }
    }
    // Exactly: by the dense layer of the same tensors.
    let handle = latest.layer("signs", "blocks.1.up").await.unwrap();
    assert_eq!(exact_layer(&latest, &handle).await.unwrap().method(), "dense");

    // Measured and exported.
    let activations = ActivationsFile::open(INPUTS).unwrap();
    let evaluation = evaluate(&latest, "signs", activations, Some(checkpoint())).await.unwrap();
    assert_eq!(evaluation.layers.len(), 6);
    for layer in &evaluation.layers {
        let imported = made.iter().find(|l| l.layer == layer.layer).unwrap();
        assert_eq!(layer.method, imported.method);
        let apart = layer.relative_error.unwrap() - imported.relative_error.unwrap();
        assert!(apart.abs() < 1e-9, "{}: {apart}", layer.layer);
    }
    let file = place.path("signs.safetensors");
    export(&latest, "signs", &file, ExportOptions::default()).await.unwrap();
    let exported = formats::open(&file).unwrap();
    assert_eq!(exported.tensors().len(), checkpoint().tensors().len());
    for layer in &made {
        let found = exported.matrix(exported.tensor(&format!("{}.weight", layer.layer)).unwrap()).unwrap();
        // Some of them are rounded to bfloat16.
        assert!(relative_error(found.view(), expected(&layer.layer, 1.0).view()) < 4e-3, "{}", layer.layer);
    }

    // Kept by the snapshot through gc, and collected without it; read again by a store that is opened anew.
    for model in ["signs", "louder"] {
        import(&store, checkpoint(), model, ImportOptions::default()).await.unwrap();
    }
    assert_eq!(store.gc(Duration::ZERO, true).await.unwrap().artifacts, 0);
    let opened = Store::open(&place.store()).await.unwrap();
    assert_eq!(opened.verify(|_, _| ()).await.unwrap().corrupt, []);
    let kept = opened.at("kept").await.unwrap();
    assert_eq!(outputs.len(), 12);
    for (model, name, expected) in &outputs {
        let x = inputs(name, if name.ends_with("down") { 96 } else { 48 });
        let y = kept.layer(model, name).await.unwrap().forward(x.view(), Accuracy::Full).await.unwrap().y;
        assert_eq!(&y, expected, "{model} {name}");
    }
    store.delete_snapshot("kept").await.unwrap();
    assert_eq!(store.gc(Duration::ZERO, true).await.unwrap().artifacts, 6);

    // Layers that were made in memory are saved like any other.
    let layer = compress(&RowSign::default(), Array2::<f32>::eye(8).view(), None, None).unwrap().shared();
    store.save_layers("made", "net", &[("net".to_owned(), layer.clone())], None).await.unwrap();
    let saved = store.latest().await.unwrap().layer("made", "net").await.unwrap().load().await.unwrap();
    assert_eq!((saved.to_parts(), saved.config()), (layer.to_parts(), layer.config()));
    assert_eq!(store.verify(|_, _| ()).await.unwrap().corrupt, []);
}

/// A second method of a name that is taken.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
struct Impostor {}

macro_rules! impostor {
    ($type:ident, $name:literal) => {
        impl Method for $type {
            const NAME: &'static str = $name;
            type Layer = RowSignLayer;
            fn check(&self, _shape: LayerShape, _calibrated: bool) -> Result<()> {
                Ok(())
            }
            fn compress(
                &self,
                weight: ArrayView2<f32>,
                bias: Option<ArrayView1<f32>>,
                calibration: Option<&Calibration>,
            ) -> Result<RowSignLayer> {
                compress(&RowSign::default(), weight, bias, calibration)
            }
            fn from_parts(parts: Parts) -> Result<RowSignLayer> {
                RowSign::from_parts(parts)
            }
        }
    };
}

impostor!(Impostor, "row_sign");

/// A method of the name of a built-in one.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
struct OtherLowRank {}

impostor!(OtherLowRank, "low_rank");

#[test]
fn names_are_taken_once_and_settings_checked() {
    register::<RowSign>().unwrap();
    // A second call does no harm.
    register::<RowSign>().unwrap();
    refused(register::<Impostor>(), ErrorKind::InvalidInput, &["'row_sign'", "taken"]);
    refused(register::<OtherLowRank>(), ErrorKind::InvalidInput, &["'low_rank'", "taken"]);
    let rule = |more: &str| Rules::parse(&format!("{RULES}{more}\n"), "rules.toml");
    for (more, says) in [
        ("gain = 0.0", "above 0"),
        ("gain = 'loud'", "gain"),
        ("grain = 1.0", "grain"),
        ("calibrated = 3", "calibrated"),
    ] {
        refused(rule(more), ErrorKind::InvalidInput, &["rules.toml, line 4", says]);
    }
    let rules = rule("calibrated = false\ngain = 0.5").unwrap();
    let method = &rules.find("blocks.0.up").unwrap().1.method;
    assert_eq!(method.downcast_ref::<RowSign>(), Some(&RowSign { calibrated: false, gain: 0.5 }));
    assert!(method.downcast_ref::<LowRankConfig>().is_none());
    let narrow = MethodConfig::from(RowSign::default());
    refused(narrow.compress(Array2::ones((2, 7)).view(), None, None), ErrorKind::InvalidInput, &["7", "multiple of 8"]);
    let mut parts = compress(&RowSign::default(), Array2::<f32>::eye(8).view(), None, None).unwrap().to_parts();
    assert_eq!(layer_from_parts(parts.clone()).unwrap().to_parts().id(), parts.id());
    parts.weights.as_mut().unwrap().rows = 9;
    refused(layer_from_parts(parts), ErrorKind::InvalidInput, &["(8, 32)", "(9, 36)"]);
    let unknown = Parts::new("unheard_of".to_owned(), Value::Object(Map::new()));
    refused(layer_from_parts(unknown), ErrorKind::Incompatible, &["'unheard_of'", "low_rank", "ternary"]);
}

/// The binary does not know the method: it lists, verifies and collects, and says what it lacks where a layer is to run.
#[tokio::test(flavor = "multi_thread")]
async fn a_program_that_does_not_know_the_method() {
    register::<RowSign>().unwrap();
    let place = Place::new();
    let store = Store::create(&place.store()).await.unwrap();
    let checkpoint = formats::open(CHECKPOINT).unwrap();
    import(&store, checkpoint, "signs", options(RULES)).await.unwrap();
    let models = place.json(&["models"]);
    assert_eq!(models[0]["methods"], json!({"dense": 4, "row_sign": 6}));
    let layers = place.json(&["layers", "signs"]);
    assert_eq!(layers.as_array().unwrap().iter().filter(|l| l["method"] == "row_sign").count(), 6);
    assert!(place.run(&["layers", "signs"]).out.contains("row_sign"));
    let shown = place.json(&["show", "signs", "blocks.0.up"]);
    assert_eq!((&shown["method"], &shown["config"]["gain"]), (&json!("row_sign"), &json!(1.0)));
    let verified = place.json(&["verify"]);
    assert_eq!((&verified["corrupt"], &verified["unknown_methods"]), (&json!([]), &json!({"row_sign": 6})));
    assert!(place.run(&["verify"]).out.contains("not built: 6 artifacts of method 'row_sign'"));
    assert_eq!(place.json(&["stats"])["models"], 1);
    let x = place.path("x.npy").display().to_string();
    formats::write_array(&x, Array2::ones((1, 48)).view(), false).unwrap();
    let output = place.path("signs.safetensors").display().to_string();
    let unknown = ["found 'row_sign'", "expected dense, key_value, low_rank, ternary, vq_attention, module"];
    place.fails(1, &unknown, &["forward", "signs", "blocks.0.up", "--input", &x]);
    place.fails(1, &unknown, &["evaluate", "signs", "--activations", INPUTS, "--checkpoint", CHECKPOINT]);
    place.fails(1, &unknown, &["export", "signs", "--output", &output]);
    assert!(!std::path::Path::new(&output).exists());
    place.fails(1, &unknown, &["copy", "signs", "blocks.0.up", &place.path("copy").display().to_string()]);
    // Its dense layers run, and rules of a method that it does not know are refused.
    place.json(&["forward", "signs", "embedding", "--input", &x]);
    let rules = place.path("rules.toml");
    std::fs::write(&rules, RULES).unwrap();
    let rules = rules.display().to_string();
    place.fails(1, &["line 3", "'row_sign'"], &["import", CHECKPOINT, "--model", "m", "--rules", &rules]);
    // What it cannot run it keeps, and collects when nothing reaches it.
    place.json(&["snapshot", "create", "kept"]);
    place.import("signs", None);
    assert_eq!(place.json(&["gc", "--older-than", "0s", "--apply"])["artifacts"], 0);
    place.json(&["snapshot", "delete", "kept"]);
    assert_eq!(place.json(&["gc", "--older-than", "0s", "--apply"])["artifacts"], 6);
    assert_eq!(place.json(&["verify"])["corrupt"], json!([]));
}
