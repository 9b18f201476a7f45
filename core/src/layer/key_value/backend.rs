//! The backends of a key–value layer, their settings, and how these are made to fit a layer's shape.

use serde::{Deserialize, Serialize};

use super::config::{Limit, OnMisfit};
use crate::error::{Error, Result};
use crate::index::{GraphType, HnswOptions};
use crate::quant::{ProductFormat, RowFormat, RowType};

/// Bits of a product code, and more connections or looks than any graph has use for.
const MAX_BITS: u32 = 8;
const MAX_CONNECTIVITY: usize = 1 << 10;
const MAX_EXPANSION: usize = 1 << 20;

/// How keys are found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum Backend {
    /// Every key scanned, kept as this type.
    Flat {
        #[serde(default)]
        keys: RowType,
    },
    /// Every key scanned in product codes (NanoPQ's way).
    Pq {
        /// Pieces that a key is cut into.
        #[serde(default = "default_subvectors")]
        subvectors: usize,
        /// Codewords of a piece, at most 256.
        #[serde(default = "default_codewords")]
        codewords: usize,
        /// Where k-means starts.
        #[serde(default)]
        seed: u64,
        /// Whether f32 keys are kept beside the codes: scores near the threshold or above are then worked out anew.
        #[serde(default)]
        store_float_keys: bool,
    },
    /// Product codes in cells, of which a query looks into a few (FAISS's way).
    IvfPq {
        /// Cells that the keys are put into.
        #[serde(default = "default_clusters")]
        clusters: usize,
        /// Cells that a query looks into.
        #[serde(default = "default_probes")]
        probes: usize,
        #[serde(default = "default_subvectors")]
        subvectors: usize,
        /// Bits of a code: 2^bits codewords a piece, at most 8.
        #[serde(default = "default_bits")]
        bits: u32,
        #[serde(default)]
        seed: u64,
        #[serde(default)]
        store_float_keys: bool,
    },
    /// A graph of keys that a query walks (usearch's).
    Hnsw {
        /// What the graph keeps keys as.
        #[serde(default)]
        vectors: GraphType,
        /// Neighbours of a key.
        #[serde(default = "default_connectivity")]
        connectivity: usize,
        /// Keys looked at while one is added.
        #[serde(default = "default_expansion_add")]
        expansion_add: usize,
        /// Keys looked at in a search, at least; a search goes on until it is past its threshold.
        #[serde(default = "default_expansion_search")]
        expansion_search: usize,
        /// Whether f32 keys are kept beside the graph, and scores come from them.
        #[serde(default)]
        store_float_keys: bool,
    },
}

fn default_subvectors() -> usize {
    ProductFormat::default().subvectors
}

fn default_codewords() -> usize {
    ProductFormat::default().codewords
}

fn default_clusters() -> usize {
    16
}

fn default_probes() -> usize {
    8
}

fn default_bits() -> u32 {
    MAX_BITS
}

fn default_connectivity() -> usize {
    16
}

fn default_expansion_add() -> usize {
    128
}

fn default_expansion_search() -> usize {
    128
}

impl Default for Backend {
    fn default() -> Self {
        Backend::Flat { keys: RowType::F32 }
    }
}

impl Backend {
    /// What scores come from.
    pub fn format(self) -> RowFormat {
        match self {
            Backend::Flat { keys } => RowFormat::Plain(keys),
            Backend::Pq { subvectors, codewords, seed, .. } => {
                RowFormat::Product(ProductFormat { subvectors, codewords, seed })
            }
            Backend::IvfPq { subvectors, bits, seed, .. } => {
                RowFormat::Product(ProductFormat { subvectors, codewords: 1 << bits.min(MAX_BITS), seed })
            }
            Backend::Hnsw { .. } => RowFormat::Plain(RowType::F32),
        }
    }

    /// Whether f32 keys are stored: as what is searched, or beside it.
    pub fn stores_float_keys(self) -> bool {
        match self {
            Backend::Flat { keys } => keys == RowType::F32,
            Backend::Pq { store_float_keys, .. }
            | Backend::IvfPq { store_float_keys, .. }
            | Backend::Hnsw { store_float_keys, .. } => store_float_keys,
        }
    }

    /// Whether a search looks at every key: only then is it known what the others would have added.
    pub fn scores_every_key(self) -> bool {
        matches!(self, Backend::Flat { .. } | Backend::Pq { .. })
    }

    /// Refuses limits that only a backend that looks at every key can keep.
    pub(super) fn check_limit(self, limit: Limit) -> Result<()> {
        match limit {
            Limit::MaxError(_) if !self.scores_every_key() => Err(Error::expected(
                "limit of a search that does not look at every key",
                "max_relative_error",
                "expected_keys_per_query or threshold, or a backend of type \"flat\" or \"pq\"",
            )),
            _ => Ok(()),
        }
    }

    /// How its graph is made and walked.
    pub(super) fn graph(self) -> Option<HnswOptions> {
        match self {
            Backend::Hnsw { vectors, connectivity, expansion_add, expansion_search, .. } => {
                Some(HnswOptions { vectors, connectivity, expansion_add, expansion_search })
            }
            _ => None,
        }
    }

    /// Checks the settings by themselves.
    pub(super) fn validate(self) -> Result<()> {
        let within = |name: &str, value: usize, most: usize| match (1..=most).contains(&value) {
            true => Ok(()),
            false => Err(Error::expected(name, value, format!("1 to {most}"))),
        };
        match self {
            Backend::Flat { .. } => Ok(()),
            Backend::Pq { subvectors, codewords, seed, .. } => ProductFormat { subvectors, codewords, seed }.validate(),
            Backend::IvfPq { clusters, probes, subvectors, bits, seed, .. } => {
                within("clusters", clusters, u32::MAX as usize)?;
                within("probes", probes, clusters)?;
                if bits > MAX_BITS {
                    return Err(Error::expected("bits", bits, format!("at most {MAX_BITS}")));
                }
                ProductFormat { subvectors, codewords: 1 << bits, seed }.validate()
            }
            Backend::Hnsw { connectivity, expansion_add, expansion_search, .. } => {
                // usearch's own floor: with one neighbour a graph falls apart.
                if connectivity < 2 {
                    return Err(Error::expected("connectivity", connectivity, format!("2 to {MAX_CONNECTIVITY}")));
                }
                within("connectivity", connectivity, MAX_CONNECTIVITY)?;
                within("expansion_add", expansion_add, MAX_EXPANSION)?;
                within("expansion_search", expansion_search, MAX_EXPANSION)
            }
        }
    }

    /// These settings for `keys` keys of `width` numbers, and what was changed to make them fit.
    pub(super) fn fitted(self, on_misfit: OnMisfit, keys: usize, width: usize) -> Result<(Self, Vec<String>)> {
        let adapted = |name: &str, asked: usize, fitted: usize, changed: &mut Vec<String>| {
            if asked == fitted {
                return Ok(());
            }
            if on_misfit == OnMisfit::Error {
                return Err(Error::expected(name, asked, format!("at most {fitted} for {keys} keys")));
            }
            changed.push(format!("backend {name}: {asked} to {fitted}"));
            Ok(())
        };
        let mut changed = vec![];
        let fitted = match self {
            Backend::Flat { .. } | Backend::Hnsw { .. } => self,
            Backend::Pq { store_float_keys, .. } => {
                let (format, more) = fitted_format(self.format(), on_misfit, "backend", keys, width)?;
                changed = more;
                match format {
                    RowFormat::Product(ProductFormat { subvectors, codewords, seed }) => {
                        Backend::Pq { subvectors, codewords, seed, store_float_keys }
                    }
                    RowFormat::Plain(_) => self,
                }
            }
            Backend::IvfPq { clusters, probes, subvectors, bits, seed, store_float_keys } => {
                // A code that is written in this many bits has a codeword for each value.
                let few_bits = bits.min(keys.max(1).ilog2());
                adapted("bits", bits as usize, few_bits as usize, &mut changed)?;
                let format = ProductFormat { subvectors, codewords: 1 << few_bits, seed };
                let (format, more) = fitted_format(RowFormat::Product(format), on_misfit, "backend", keys, width)?;
                changed.extend(more);
                let subvectors = if let RowFormat::Product(format) = format { format.subvectors } else { subvectors };
                let cells = clusters.min(keys);
                adapted("clusters", clusters, cells, &mut changed)?;
                adapted("probes", probes, probes.min(cells), &mut changed)?;
                Backend::IvfPq {
                    clusters: cells,
                    probes: probes.min(cells),
                    subvectors,
                    bits: few_bits,
                    seed,
                    store_float_keys,
                }
            }
        };
        Ok((fitted, changed))
    }
}

/// A format that fits `rows` rows of `width` numbers, and what was changed to make it fit.
pub fn fitted_format(
    format: RowFormat,
    on_misfit: OnMisfit,
    what: &str,
    rows: usize,
    width: usize,
) -> Result<(RowFormat, Vec<String>)> {
    let RowFormat::Product(asked) = format else { return Ok((format, vec![])) };
    if on_misfit == OnMisfit::Error {
        asked.check(rows, width)?;
    }
    let fitted = asked.fitted(rows, width);
    let mut changed = vec![];
    for (name, asked, fitted) in
        [("subvectors", asked.subvectors, fitted.subvectors), ("codewords", asked.codewords, fitted.codewords)]
    {
        if asked != fitted {
            changed.push(format!("{what} {name}: {asked} to {fitted}"));
        }
    }
    Ok((RowFormat::Product(fitted), changed))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Backend {
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn settings_are_made_to_fit_or_refused() {
        let ivf = read(r#"{"type": "ivf_pq", "clusters": 64, "probes": 40}"#);
        let (fitted, changed) = ivf.fitted(OnMisfit::Adapt, 30, 1023).unwrap();
        let expected = r#"{"type": "ivf_pq", "clusters": 30, "probes": 30, "subvectors": 11, "bits": 4}"#;
        assert_eq!((fitted, changed.len()), (read(expected), 4));
        assert_eq!(fitted.fitted(OnMisfit::Error, 30, 1023).unwrap(), (fitted, vec![]));
        assert!(ivf.fitted(OnMisfit::Error, 30, 1023).unwrap_err().to_string().contains("at most 4 for 30 keys"));
        let one = ivf.fitted(OnMisfit::Adapt, 1, 3).unwrap().0;
        one.validate().unwrap();
        assert_eq!(one.format(), RowFormat::Product(ProductFormat { subvectors: 3, codewords: 1, seed: 0 }));
    }

    #[test]
    fn settings_out_of_range_are_refused() {
        for bad in [
            r#"{"type": "ivf_pq", "clusters": 0}"#,
            r#"{"type": "ivf_pq", "clusters": 4, "probes": 5}"#,
            r#"{"type": "ivf_pq", "bits": 9}"#,
            r#"{"type": "hnsw", "connectivity": 1}"#,
            r#"{"type": "hnsw", "expansion_search": 0}"#,
        ] {
            assert!(read(bad).validate().is_err(), "{bad}");
        }
        assert!(serde_json::from_str::<Backend>(r#"{"type": "hnsw", "vectors": "f8"}"#).is_err());
        for good in [r#"{"type": "hnsw", "vectors": "bf16"}"#, r#"{"type": "ivf_pq"}"#] {
            read(good).validate().unwrap();
            assert!(read(good).check_limit(Limit::MaxError(0.1)).is_err());
            assert!(read(good).check_limit(Limit::Keys(3.0)).is_ok());
        }
    }
}
