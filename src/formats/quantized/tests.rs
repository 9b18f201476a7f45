use std::path::{Path, PathBuf};

use layerstore_core::layer::to_f32;
use ndarray::Array2;
use proptest::prelude::*;
use safetensors::tensor::TensorView;
use serde_json::Value as Json;

use crate::formats::{SourceContent, fnv, open};
use crate::layer::{Accuracy, DType};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/formats/quantized").join(name)
}

/// Every kind gives the weights that its documentation gives, to the bit, from codes of about the size that they have in the file.
#[test]
fn weights_are_those_of_the_reference() {
    let references: Json = serde_json::from_slice(&std::fs::read(fixture("references.json")).unwrap()).unwrap();
    let mut read = 0;
    for (folder, layers) in references.as_object().unwrap() {
        let source = open(fixture(folder)).unwrap();
        assert!(source.tensors().is_empty(), "{folder}: {:?}", source.tensors().keys());
        let file = std::fs::metadata(fixture(folder).join("model.safetensors")).unwrap().len() as f64;
        let (found, mut stored) = (source.layers(), 0);
        assert_eq!(found.len(), layers.as_object().unwrap().len());
        for layer in found {
            let SourceContent::Ready { layer: ready, takes_rules: true } = &layer.content else { panic!("{folder}") };
            let loaded = ready.load().unwrap();
            assert_eq!(loaded.to_parts().stored_bytes(), ready.stored_bytes(), "{folder}");
            stored += ready.stored_bytes();
            let weight = loaded.weight().unwrap();
            let reference = &layers[&layer.name];
            assert_eq!(serde_json::json!(weight.shape()), reference["shape"]);
            // It runs as its weight says.
            let x = Array2::from_shape_fn((3, weight.ncols()), |(i, j)| ((7 * i + j) % 13) as f32 - 6.0);
            let y = loaded.forward(x.view(), Accuracy::Approximate).unwrap().y;
            let off = (&y - &x.dot(&weight.t())).mapv(f32::abs);
            assert!(off.iter().all(|off| *off < 1e-3), "{folder}: {off}");
            assert_eq!(
                fnv(weight.into_iter().flat_map(f32::to_le_bytes)),
                reference["hash"].as_str().unwrap(),
                "{folder} {}",
                layer.name
            );
            read += 1;
        }
        // Scales of scales of bitsandbytes become f32 ones.
        let most = if folder == "bnb_nf4_nested" { 1.1 } else { 1.02 };
        assert!((stored as f64) < most * file, "{folder}: {stored} of {file}");
    }
    assert_eq!(read, 13 * 2);
}

fn changed(folder: &str, change: impl FnOnce(&mut Json)) -> tempfile::TempDir {
    let place = tempfile::tempdir().unwrap();
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(fixture(folder).join(name), place.path().join(name)).unwrap();
    }
    let path = place.path().join("config.json");
    let mut config: Json = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    change(&mut config["quantization_config"]);
    std::fs::write(&path, config.to_string()).unwrap();
    place
}

#[test]
fn what_is_not_read_is_named() {
    let says = |folder: &str, change: fn(&mut Json), says: &[&str]| {
        let place = changed(folder, change);
        let message = open(place.path()).unwrap_err().to_string();
        assert!(says.iter().all(|text| message.contains(text)), "{message}");
    };
    says("awq_4_g64", |config| config["quant_method"] = "aqlm".into(), &["'aqlm'", "gptq, awq", "config.json"]);
    says("awq_4_g64", |config| config["version"] = "gemv".into(), &["gemv", "gemm"]);
    says("awq_4_g64", |config| config["backend"] = "llm-awq".into(), &["llm-awq", "autoawq"]);
    says("gptq_4_g32_sym", |config| config["bits"] = 8.into(), &["up_proj", "shapes"]);
    says("gptq_4_g32_sym", |config| config["bits"] = 3.into(), &["qweight", "whole codes of 3 bits"]);
    says("gptq_4_g32_sym", |config| config["checkpoint_format"] = "marlin".into(), &["'marlin'", "gptq_v2"]);
    // 128 inputs in four groups, the last one smaller.
    says("gptq_4_g32_sym", |config| config["group_size"] = 40.into(), &["up_proj", "group_size", "40", "128 inputs"]);
    says(
        "ct_pack_quantized_4",
        |config| config["config_groups"]["group_0"]["weights"]["group_size"] = 40.into(),
        &["128 inputs"],
    );
    says("gptq_4_g32_sym", |config| config["bits"] = 40.into(), &["40", "2 to 8"]);
    says("ct_pack_quantized_4", |config| config["config_groups"] = Json::Null, &["num_bits", "up_proj"]);
    // Without a quantisation the tensors are what they are.
    let plain = changed("awq_4_g64", |config| *config = Json::Null);
    assert_eq!(open(plain.path()).unwrap().tensors().len(), 6);
    let place = changed("awq_4_g64", |_| ());
    std::fs::write(place.path().join("config.json"), "{").unwrap();
    assert!(open(place.path()).unwrap_err().to_string().contains("not JSON"));
}

/// 8-bit floats are what their scales make of them, whatever the scales are for; without scales they are numbers.
#[test]
fn eight_bit_floats_have_their_scales() {
    let (rows, columns) = (130usize, 256usize);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.safetensors");
    // None of them NaN.
    let codes: Vec<u8> =
        (0..rows * columns).map(|i| (i * 37 % 251) as u8).map(|c| if c & 0x7f == 0x7f { 1 } else { c }).collect();
    let scale = |i: usize| 0.5 + i as f32 / 8.0;
    let scales = |count: usize| -> Vec<u8> { (0..count).flat_map(|i| scale(i).to_le_bytes()).collect() };
    let layers: [(&str, &str, Vec<usize>); 5] = [
        ("one", "weight_scale", vec![]),
        ("comfy", "scale_weight", vec![1]),
        ("rows", "weight_scale", vec![rows, 1]),
        ("blocks", "weight_scale_inv", vec![2, 2]),
        ("bare", "", vec![0]),
    ];
    let mut tensors = vec![];
    for (name, suffix, shape) in &layers {
        tensors.push((format!("{name}.weight"), DType::F8_E4M3, vec![rows, columns], codes.clone()));
        if !suffix.is_empty() {
            tensors.push((format!("{name}.{suffix}"), DType::F32, shape.clone(), scales(shape.iter().product())));
        }
    }
    let views = tensors.iter().map(|(n, d, s, b)| (n.as_str(), TensorView::new(*d, s.clone(), b).unwrap()));
    safetensors::serialize_to_file(views.collect::<Vec<_>>(), None, &path).unwrap();
    let source = open(&path).unwrap();
    let numbers = to_f32(DType::F8_E4M3, &codes).unwrap();
    for layer in source.layers() {
        match layer.content {
            SourceContent::Ready { layer: ready, .. } => {
                let weight = ready.load().unwrap().weight().unwrap();
                for ((i, j), found) in weight.indexed_iter() {
                    let of = match layer.name.as_str() {
                        "rows" => i,
                        "blocks" => i / 128 * 2 + j / 128,
                        _ => 0,
                    };
                    assert_eq!(*found, numbers[i * columns + j] * scale(of), "{} {i} {j}", layer.name);
                }
            }
            SourceContent::Tensors { weight, bias: None } => {
                assert_eq!((layer.name.as_str(), weight.dtype), ("bare", DType::F8_E4M3));
                assert!(weight.is_float_matrix());
                assert_eq!(source.matrix(&weight).unwrap().into_raw_vec_and_offset().0, numbers);
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(source.layers().len(), 5);
    // Scales of another number.
    tensors[1].2 = vec![3];
    tensors[1].3 = scales(3);
    let views = tensors.iter().map(|(n, d, s, b)| (n.as_str(), TensorView::new(*d, s.clone(), b).unwrap()));
    safetensors::serialize_to_file(views.collect::<Vec<_>>(), None, &path).unwrap();
    let message = open(&path).unwrap_err().to_string();
    assert!(message.contains("'one.weight_scale'") && message.contains("each of 130 rows"), "{message}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Changed bytes of any kind of checkpoint are errors, or other weights: nothing panics.
    #[test]
    fn damaged_checkpoints_are_refused_or_read(
        folder in prop::sample::select(vec!["gptq_4_g32_act", "awq_4_g64", "bnb_nf4_nested", "ct_pack_quantized_4_asym", "ct_float_quantized_8"]),
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        header in any::<bool>(),
    ) {
        let place = changed(folder, |_| ());
        let path = place.path().join("model.safetensors");
        let mut file = std::fs::read(&path).unwrap();
        let length = if header { 1500 } else { file.len() };
        changes.iter().for_each(|(at, byte)| file[at.index(length)] = *byte);
        std::fs::write(&path, file).unwrap();
        if let Ok(source) = open(place.path()) {
            for layer in source.layers() {
                if let SourceContent::Ready { layer, .. } = layer.content {
                    drop(layer.load());
                }
            }
        }
    }
}
