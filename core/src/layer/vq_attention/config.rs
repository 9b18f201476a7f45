//! The settings of an attention block.

use serde::{Deserialize, Serialize};

use crate::attention::HyperAttention;
use crate::error::{Error, Result};

/// The attention mechanism of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mechanism {
    /// Queries and keys are replaced by their codewords.
    #[default]
    VqQk,
    /// Keys are replaced by their codewords, queries are taken as they are (Transformer-VQ).
    VqK,
    /// HyperAttention.
    Hyper,
    /// Exact attention.
    Exact,
}

/// Settings of an attention block, in rules, in the catalogue and in code.
///
/// Lengths that are left out follow from the projections: `d_model` is the width of the query projection's inputs, `d_k` and
/// `d_v` are its and the value projection's outputs for each head.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct VqAttentionConfig {
    /// The attention mechanism.
    pub mechanism: Mechanism,
    /// Heads of queries.
    pub n_head: usize,
    /// Heads of keys and values, which heads of queries share; as many as of queries where left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub n_kv_head: Option<usize>,
    /// Width of the block's inputs and outputs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub d_model: Option<usize>,
    /// Length of a head's queries and keys.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub d_k: Option<usize>,
    /// Length of a head's values.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub d_v: Option<usize>,
    /// Codewords of each head, of queries and of keys.
    pub n_code: usize,
    /// Codewords of queries, in place of `n_code`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub n_code_q: Option<usize>,
    /// Codewords of keys, in place of `n_code`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub n_code_k: Option<usize>,
    /// Tokens that a causal attention takes at a time.
    pub block_len: usize,
    /// Tokens before a block that a causal attention meets one by one.
    pub mem_len: usize,
    /// Whether a query sees only the keys up to its own.
    pub causal: bool,
    /// Decay of the codebooks' exponential moving averages at each training step.
    pub c_gamma: f64,
    /// Whether a causal attention meets keys before its window, by their codes.
    pub agg_cache: bool,
    /// Factor of the products of queries and keys; `1 / sqrt(d_k)` where left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scale: Option<f64>,
    /// Settings of HyperAttention, for `mechanism = "hyper"`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hyper: Option<HyperAttention>,
    /// Name of Wq, a linear layer of the same model: relative to the block's own name, or in full. Without it the block's inputs are
    /// queries already.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub query: Option<String>,
    /// Name of Wk, as `query`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    /// Name of Wv, as `query`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub value: Option<String>,
    /// Name of Wo, as `query`. Without it the heads' outputs are the block's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub output: Option<String>,
    /// Seed of the k-means that codebooks begin with.
    pub seed: u64,
    /// Whether queries and keys are rotated by their positions before they meet the codebooks, as the language model that the block is of
    /// does it: an import that calibrates by a text sets it.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub rotary: bool,
}

impl Default for VqAttentionConfig {
    fn default() -> Self {
        VqAttentionConfig {
            mechanism: Mechanism::default(),
            n_head: 8,
            n_kv_head: None,
            d_model: None,
            d_k: None,
            d_v: None,
            n_code: 512,
            n_code_q: None,
            n_code_k: None,
            block_len: 128,
            mem_len: 0,
            causal: true,
            c_gamma: 0.99,
            agg_cache: true,
            scale: None,
            hyper: None,
            query: None,
            key: None,
            value: None,
            output: None,
            seed: 0,
            rotary: false,
        }
    }
}

impl VqAttentionConfig {
    /// Returns the number of heads of keys and values.
    pub fn kv_heads(&self) -> usize {
        self.n_kv_head.unwrap_or(self.n_head)
    }

    /// Returns the number of codewords of each head of queries; `None` where queries are taken as they are.
    pub fn query_codes(&self) -> Option<usize> {
        (self.mechanism == Mechanism::VqQk).then(|| self.n_code_q.unwrap_or(self.n_code))
    }

    /// Returns the number of codewords of each head of keys; `None` where keys are taken as they are.
    pub fn key_codes(&self) -> Option<usize> {
        matches!(self.mechanism, Mechanism::VqQk | Mechanism::VqK).then(|| self.n_code_k.unwrap_or(self.n_code))
    }

    /// Returns the same settings with all lengths given: `d_k` and `d_v` of a head, and `d_model`, filled in where left out.
    ///
    /// # Errors
    /// When a length that is given differs from the one found.
    pub fn with_lengths(&self, d_model: usize, d_k: usize, d_v: usize) -> Result<Self> {
        let mut all = self.clone();
        for (name, said, found) in
            [("d_model", &mut all.d_model, d_model), ("d_k", &mut all.d_k, d_k), ("d_v", &mut all.d_v, d_v)]
        {
            if *said.get_or_insert(found) != found {
                return Err(Error::expected(name, said.unwrap_or_default(), format!("{found}, as its layers have")));
            }
        }
        Ok(all)
    }

    /// Returns the same settings with the lengths that follow from the shapes `[out, in]` of Wq, Wk and Wv.
    ///
    /// # Errors
    /// When heads do not divide their outputs, or a length that is given differs.
    pub fn of_projections(&self, [q, k, v]: [(usize, usize); 3]) -> Result<Self> {
        let (heads, shared) = (self.n_head, self.kv_heads());
        if !q.0.is_multiple_of(heads) || !v.0.is_multiple_of(shared) || Some(k.0) != (q.0 / heads).checked_mul(shared) {
            return Err(Error::expected(
                "outputs of the projections",
                format!("{} of queries, {} of keys, {} of values", q.0, k.0, v.0),
                format!("as many for each of {heads} heads of queries and {shared} of keys and values"),
            ));
        }
        self.with_lengths(q.1, q.0 / heads, v.0 / shared)
    }

    /// Checks the settings by themselves.
    ///
    /// # Errors
    /// When one is out of its range, or two do not go together.
    pub fn validate(&self) -> Result<()> {
        let at_least_one = [
            ("n_head", Some(self.n_head)),
            ("n_kv_head", self.n_kv_head),
            ("d_model", self.d_model),
            ("d_k", self.d_k),
            ("d_v", self.d_v),
            ("n_code", Some(self.n_code)),
            ("n_code_q", self.n_code_q),
            ("n_code_k", self.n_code_k),
            ("block_len", Some(self.block_len)),
        ];
        if let Some((name, _)) = at_least_one.iter().find(|(_, value)| *value == Some(0)) {
            return Err(Error::expected(*name, 0, "at least 1"));
        }
        if !self.n_head.is_multiple_of(self.kv_heads()) {
            return Err(Error::expected(
                "n_kv_head",
                self.kv_heads(),
                format!("a divisor of n_head = {}", self.n_head),
            ));
        }
        if !(0.0..=1.0).contains(&self.c_gamma) {
            return Err(Error::expected("c_gamma", self.c_gamma, "within 0 and 1"));
        }
        if let Some(scale) = self.scale.filter(|scale| !scale.is_finite()) {
            return Err(Error::expected("scale", scale, "a finite number"));
        }
        let unused = match self.mechanism {
            Mechanism::VqQk => self.hyper.map(|_| "hyper"),
            Mechanism::VqK => self.hyper.map(|_| "hyper").or(self.n_code_q.map(|_| "n_code_q")),
            Mechanism::Hyper | Mechanism::Exact => {
                let hyper = self.hyper.filter(|_| self.mechanism == Mechanism::Exact).map(|_| "hyper");
                hyper.or(self.n_code_q.map(|_| "n_code_q")).or(self.n_code_k.map(|_| "n_code_k"))
            }
        };
        if let Some(unused) = unused {
            let mechanism = serde_json::to_value(self.mechanism).unwrap_or_default();
            return Err(Error::expected(
                unused,
                format!("it beside mechanism = {mechanism}"),
                "a mechanism that uses it",
            ));
        }
        let projections = [&self.query, &self.key, &self.value];
        let said = projections.iter().filter(|name| name.is_some()).count();
        if said != 0 && said != 3 {
            return Err(Error::expected("query, key and value", format!("{said} of them"), "all three, or none"));
        }
        self.hyper.map_or(Ok(()), |hyper| hyper.validate())
    }
}
