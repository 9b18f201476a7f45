//! Backends of a key–value layer: their settings, and how these are made to fit a layer's shape.

use serde::{Deserialize, Serialize};

use super::limit::Limit;
use crate::error::{Error, Result};
use crate::index::{GraphType, HnswOptions};
use crate::quant::{ProductFormat, RowFormat, RowType};

/// Largest number of bits of a product code.
const MAX_BITS: u32 = 8;

/// Largest number of a graph's neighbours, beyond any use.
const MAX_CONNECTIVITY: usize = 1 << 10;

/// Largest number of keys that a graph's walk looks at, beyond any use.
const MAX_EXPANSION: usize = 1 << 20;

/// What happens to settings that do not fit a layer's shape.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnMisfit {
    /// They become the nearest that fit, and the layer's config lists the changes.
    #[default]
    Adapt,
    /// They are an error, which names the settings that would fit.
    Error,
}

/// How keys are stored and found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(
    tag = "type",
    rename_all = "snake_case",
    deny_unknown_fields,
    expecting = "a table with a type, such as { type = \"flat\" }"
)]
pub enum Backend {
    /// A scan of every key.
    Flat {
        /// The type that keys are stored as.
        #[serde(default)]
        keys: RowType,
    },
    /// A scan of every key in product codes (as NanoPQ's).
    Pq {
        /// Number of subvectors that a key is cut into.
        #[serde(default = "default_subvectors")]
        subvectors: usize,
        /// Codewords of a subvector, at most 256.
        #[serde(default = "default_codewords")]
        codewords: usize,
        /// Seed of k-means.
        #[serde(default)]
        seed: u64,
        /// Whether f32 keys are stored beside the codes: scores near the threshold or above are then computed from them.
        #[serde(default)]
        store_float_keys: bool,
    },
    /// Product codes in clusters, of which a query searches a few (as FAISS's IVF-PQ).
    IvfPq {
        /// Number of clusters of keys.
        #[serde(default = "default_clusters")]
        clusters: usize,
        /// Number of clusters that a query searches.
        #[serde(default = "default_probes")]
        probes: usize,
        /// Number of subvectors that a key is cut into.
        #[serde(default = "default_subvectors")]
        subvectors: usize,
        /// Bits of a code: 2^bits codewords a subvector, at most 8.
        #[serde(default = "default_bits")]
        bits: u32,
        /// Seed of k-means.
        #[serde(default)]
        seed: u64,
        /// Whether f32 keys are stored beside the codes: scores near the threshold or above are then computed from them.
        #[serde(default)]
        store_float_keys: bool,
    },
    /// A hierarchical navigable small-world graph of keys (usearch's).
    Hnsw {
        /// The type that the graph keeps keys as.
        #[serde(default)]
        vectors: GraphType,
        /// Number of neighbours of a key.
        #[serde(default = "default_connectivity")]
        connectivity: usize,
        /// Number of keys that are looked at while one is added.
        #[serde(default = "default_expansion_add")]
        expansion_add: usize,
        /// Least number of keys that a search looks at; it goes on until it is past its threshold.
        #[serde(default = "default_expansion_search")]
        expansion_search: usize,
        /// Whether f32 keys are stored beside the graph, and scores are computed from them.
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
    /// Returns the format of the keys that scores are computed from.
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

    /// Returns whether f32 keys are stored: as the keys that are searched, or beside them.
    pub fn stores_float_keys(self) -> bool {
        match self {
            Backend::Flat { keys } => keys == RowType::F32,
            Backend::Pq { store_float_keys, .. }
            | Backend::IvfPq { store_float_keys, .. }
            | Backend::Hnsw { store_float_keys, .. } => store_float_keys,
        }
    }

    /// Returns whether a search scores every key: only then are the contributions of keys that are no hits known.
    pub fn scores_every_key(self) -> bool {
        matches!(self, Backend::Flat { .. } | Backend::Pq { .. })
    }

    /// Checks that searches of the backend can keep a limit.
    ///
    /// # Errors
    /// When an error is to be certified, and the backend does not score every key.
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

    /// Returns how the backend's graph is made and searched, where it has one.
    pub(super) fn graph(self) -> Option<HnswOptions> {
        match self {
            Backend::Hnsw { vectors, connectivity, expansion_add, expansion_search, .. } => {
                Some(HnswOptions { vectors, connectivity, expansion_add, expansion_search })
            }
            _ => None,
        }
    }

    /// Checks the settings by themselves.
    ///
    /// # Errors
    /// When one is out of its range.
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

    /// Returns the settings fitted to `keys` keys of `width` numbers, and a description of each change.
    ///
    /// # Errors
    /// When settings do not fit and `on_misfit` says so.
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

/// Returns a format fitted to `rows` rows of `width` numbers, and a description of each change.
///
/// # Errors
/// When it does not fit and `on_misfit` says so.
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
