//! An import of many layers in a few lines: its layers by kind, and those with the largest errors.

use std::collections::{BTreeMap, BTreeSet};

use super::output::{basis, bytes, error, ratio, table};
use crate::compress::LayerReport;
use crate::store::ErrorBasis;

/// Layers up to which a table of all of them is short enough.
pub const FEW_LAYERS: usize = 20;

/// Kinds of layers that a summary lists at most; of more, it tells of methods alone.
const MOST_KINDS: usize = 24;

/// Layers that are named for their errors, of each thing that errors are measured over.
const WORST: usize = 5;

/// Returns the layers by kind and the worst of them, as two tables.
pub fn summary(layers: &[LayerReport]) -> String {
    let kinds: BTreeSet<String> = layers.iter().map(|l| kind(&l.layer)).collect();
    let by_kind = kinds.len() <= MOST_KINDS;
    let mut groups: BTreeMap<(String, &str, &str), Group> = BTreeMap::new();
    for layer in layers {
        let kind = if by_kind { kind(&layer.layer) } else { "all".to_owned() };
        groups.entry((kind, layer.method.as_str(), basis(layer.error_basis))).or_default().add(layer);
    }
    let rows = groups.into_iter().map(|((kind, method, over), group)| {
        vec![
            kind,
            method.to_owned(),
            group.layers.to_string(),
            bytes(group.stored_bytes),
            ratio(group.dense_bytes, group.stored_bytes),
            error(group.mean_error()),
            if group.errors > 0 { over.to_owned() } else { String::new() },
        ]
    });
    let mut text = table(&["layers", "method", "count", "stored", "ratio", "mean error", "over"], rows);
    let worst = worst(layers);
    if !worst.is_empty() {
        let rows = worst.into_iter().map(|l| {
            vec![
                l.layer.clone(),
                l.method.to_string(),
                error(l.relative_error),
                basis(l.error_basis).to_owned(),
                bytes(l.stored_bytes),
                ratio(l.dense_bytes, l.stored_bytes),
            ]
        });
        text += "\n";
        text += &table(&["worst layers", "method", "error", "over", "stored", "ratio"], rows);
    }
    text
}

/// Layers that are alike.
#[derive(Default)]
struct Group {
    layers: usize,
    dense_bytes: u64,
    stored_bytes: u64,
    /// How many of the layers have an error, and the sum of these.
    errors: usize,
    sum: f64,
}

impl Group {
    fn add(&mut self, layer: &LayerReport) {
        self.layers += 1;
        self.dense_bytes += layer.dense_bytes;
        self.stored_bytes += layer.stored_bytes;
        if let Some(error) = layer.relative_error {
            self.errors += 1;
            self.sum += error;
        }
    }

    fn mean_error(&self) -> Option<f64> {
        (self.errors > 0).then(|| self.sum / self.errors as f64)
    }
}

/// A layer's name with `*` for the numbers in it: layers of one kind differ in nothing else.
fn kind(layer: &str) -> String {
    let part = |part| if is_number(part) { "*" } else { part };
    layer.split('.').map(part).collect::<Vec<_>>().join(".")
}

fn is_number(part: &str) -> bool {
    !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit())
}

/// The layers with the largest errors, those over calibration inputs first: the two are different quantities. Exact layers are none.
fn worst(layers: &[LayerReport]) -> Vec<&LayerReport> {
    let of = |basis: ErrorBasis| {
        let lossy = layers.iter().filter(move |l| l.error_basis == basis);
        let mut lossy: Vec<_> = lossy.filter_map(|l| Some((l.relative_error.filter(|e| *e > 0.0)?, l))).collect();
        lossy.sort_by(|(a, _), (b, _)| b.total_cmp(a));
        lossy.into_iter().take(WORST).map(|(_, layer)| layer)
    };
    of(ErrorBasis::Activations).chain(of(ErrorBasis::Weights)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layer::{CorrectionReport, MethodName, SearchReport};

    fn layer(name: &str, method: &'static str, error: Option<f64>, basis: ErrorBasis) -> LayerReport {
        LayerReport {
            layer: name.to_owned(),
            method: MethodName::new(method),
            in_features: 8,
            out_features: 8,
            artifact: String::new(),
            relative_error: error,
            error_basis: basis,
            dense_bytes: 2048,
            stored_bytes: 1024,
            bits_per_weight: Some(8.0),
            correction: CorrectionReport::default(),
            search: SearchReport::default(),
            notes: vec![],
            reused: false,
            seconds: 0.0,
        }
    }

    /// Lines of words, since columns are as wide as what is in them.
    fn lines(text: &str) -> Vec<String> {
        text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect()
    }

    #[test]
    fn layers_are_counted_by_kind() {
        let (over, weights) = (ErrorBasis::Activations, ErrorBasis::Weights);
        let mut layers: Vec<_> = (0..12)
            .map(|i| layer(&format!("h.{i}.up"), "low_rank", Some(f64::from(i) / 100.0), over))
            .chain((0..12).map(|i| layer(&format!("h.{i}.norm"), "dense", Some(0.0), weights)))
            .collect();
        layers.push(layer("h.12.up", "low_rank", Some(0.5), weights));
        layers.push(layer("gru", "module", None, weights));
        assert_eq!(
            lines(&summary(&layers)),
            [
                "layers method count stored ratio mean error over",
                "gru module 1 1.00 KiB 2.00× -",
                "h.*.norm dense 12 12.00 KiB 2.00× 0.0000 weights",
                "h.*.up low_rank 12 12.00 KiB 2.00× 0.0550 calibration",
                "h.*.up low_rank 1 1.00 KiB 2.00× 0.5000 weights",
                "",
                "worst layers method error over stored ratio",
                "h.11.up low_rank 0.1100 calibration 1.00 KiB 2.00×",
                "h.10.up low_rank 0.1000 calibration 1.00 KiB 2.00×",
                "h.9.up low_rank 0.0900 calibration 1.00 KiB 2.00×",
                "h.8.up low_rank 0.0800 calibration 1.00 KiB 2.00×",
                "h.7.up low_rank 0.0700 calibration 1.00 KiB 2.00×",
                "h.12.up low_rank 0.5000 weights 1.00 KiB 2.00×",
            ]
        );
    }

    /// A checkpoint that gives every layer a name of its own is told of by its methods.
    #[test]
    fn many_kinds_are_one() {
        let named = |n: u8| format!("layer_{}", char::from(b'a' + n));
        let layers: Vec<_> = (0..25).map(|n| layer(&named(n), "dense", Some(0.0), ErrorBasis::Weights)).collect();
        let found = lines(&summary(&layers));
        assert_eq!(
            found,
            ["layers method count stored ratio mean error over", "all dense 25 25.00 KiB 2.00× 0.0000 weights"]
        );
        assert!(summary(&layers[..24]).contains("layer_x"));
    }
}
