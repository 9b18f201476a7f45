//! A GGUF file for llama.cpp: codes of its types as they are, everything else as numbers.

use std::collections::BTreeMap;
use std::sync::Arc;

use layerstore_core::layer::{from_f32, to_f32};

use super::super::misfits::Misfits;
use super::content::{Content, Kept, OutlinedTensor};
use super::model::Model;
use super::options::ExportDtype;
use super::tensor::LazyTensor;
use crate::error::{Error, Result};
use crate::formats::gguf::{
    BlockType, Change, GgufNames, METADATA, MadeMetadata, Pairs, TensorToWrite, TensorType, permuted, to_q8_0,
    write_gguf,
};
use crate::layer::DType;
use crate::staged;

/// Tensors that llama.cpp does without: it computes them, or runs the model without its head.
const LEFT_OUT: [&str; 8] = [
    "rotary_emb.inv_freq",
    "embeddings.position_ids",
    "pooler.dense.weight",
    "pooler.dense.bias",
    "attention.masked_bias",
    "cls.predictions",
    "cls.seq_relationship",
    "attention.bias",
];

/// What a file says of the model, and how its tensors are called.
struct Metadata {
    pairs: Pairs,
    names: Option<GgufNames>,
    /// What was made of the model's files, where it came from no GGUF file.
    made: Option<MadeMetadata>,
}

/// A tensor of the file, and what it is written from.
struct Planned {
    to: TensorToWrite,
    /// One, but for experts that are a tensor each here and one there.
    from: Vec<LazyTensor>,
    change: Change,
    /// Whether numbers are rounded to Q8_0.
    rounds: bool,
    /// Its bytes, where no layer has them.
    made: Vec<u8>,
}

impl Model {
    /// Writes the file.
    pub(super) fn gguf(&mut self) -> Result<u64> {
        let Metadata { pairs, names, made } = self.metadata()?;
        self.check(made.as_ref())?;
        let tensors = std::mem::take(&mut self.outline.tensors);
        let mut misfits = Misfits::default();
        let mut planned: BTreeMap<String, Planned> = BTreeMap::new();
        let mut experts: BTreeMap<String, BTreeMap<usize, Planned>> = BTreeMap::new();
        for tensor in tensors {
            if LEFT_OUT.iter().any(|part| tensor.name.contains(part)) {
                self.outline.remarks.push(format!("'{}' is left out: llama.cpp has no such tensor", tensor.name));
                continue;
            }
            let name = tensor.name.clone();
            let Some(found) = misfits.keep(&name, self.planned(tensor, names.as_ref())) else { continue };
            let Some(found) = found else {
                self.outline.remarks.push(format!("'{name}' is left out: llama.cpp's architecture has no such bias"));
                continue;
            };
            match expert_of(&found.to.name) {
                Some((stem, number)) => _ = experts.entry(stem).or_default().insert(number, found),
                None => _ = planned.insert(found.to.name.clone(), found),
            }
        }
        for (stem, parts) in experts {
            let joined = together(&stem, parts).map(|joined| planned.insert(stem.clone(), joined));
            misfits.keep(&stem, joined);
        }
        if let Some(factors) = made.and_then(|made| made.frequency_factors) {
            let name = "rope_freqs.weight".to_owned();
            let (shape, tensor_type) = (vec![factors.len()], TensorType::Plain(DType::F32));
            let to = TensorToWrite { name: name.clone(), shape, tensor_type };
            let made = factors.iter().flat_map(|factor| factor.to_le_bytes()).collect();
            planned.entry(name).or_insert(Planned { to, from: vec![], change: Change::None, rounds: false, made });
        }
        misfits.result(&self.output)?;
        let planned: Vec<Planned> = planned.into_values().collect();
        let tensors: Vec<TensorToWrite> = planned.iter().map(|planned| planned.to.clone()).collect();
        let work = self.work.clone();
        work.start(planned.iter().flat_map(|planned| &planned.from));
        staged::write(&self.output, |staged| write_gguf(staged, &pairs, &tensors, |place| planned[place].bytes()))
    }

    /// Returns the metadata, as they came or as the model's files say, and how tensors are called; no names where they have llama.cpp's
    /// already.
    fn metadata(&self) -> Result<Metadata> {
        let wrong = |reason: String| Error::file(&self.output, format!("no GGUF file can be written: {reason}"));
        let has_theirs = self.outline.tensors.iter().any(|tensor| tensor.name == "token_embd.weight");
        match self.files.get(METADATA) {
            Some(file) => {
                let pairs = Pairs::of_file(file).map_err(wrong)?;
                let names = if has_theirs { None } else { Some(GgufNames::of_file(file).map_err(wrong)?) };
                Ok(Metadata { pairs, names, made: None })
            }
            None if has_theirs => {
                Err(wrong("the model has llama.cpp's names, and no metadata of the GGUF file that it came from".into()))
            }
            None => {
                let made = MadeMetadata::of(&self.files, &self.name).map_err(wrong)?;
                let names = GgufNames::new(&made.architecture, made.heads, made.key_heads);
                Ok(Metadata { pairs: made.pairs.clone(), names: Some(names), made: Some(made) })
            }
        }
    }

    /// Holds what a configuration says against the tensors, and what llama.cpp does against the configuration.
    fn check(&mut self, made: Option<&MadeMetadata>) -> Result<()> {
        let Some(made) = made else { return Ok(()) };
        let block = |name: &str| {
            let name = name.strip_prefix("bert.").unwrap_or(name);
            let rest = name.strip_prefix("model.layers.").or_else(|| name.strip_prefix("encoder.layer."))?;
            rest.split('.').next()?.parse::<usize>().ok()
        };
        let tensors = &self.outline.tensors;
        let blocks = tensors.iter().filter_map(|tensor| block(&tensor.name)).max().map_or(0, |last| last + 1);
        let embedding = tensors
            .iter()
            .find(|t| t.name == "model.embed_tokens.weight" || t.name.ends_with("embeddings.word_embeddings.weight"));
        let features = embedding.and_then(|tensor| tensor.shape.last()).copied().unwrap_or(made.features);
        if (blocks, features) != (made.blocks, made.features) {
            let found = format!("{blocks} blocks of {features} features");
            let expected = format!("{} of {}, as config.json says", made.blocks, made.features);
            return Err(Error::expected("layers of the model", found, expected));
        }
        for unsaid in &made.unsaid {
            if !self.rounds_scales {
                let expected = "what llama.cpp runs; --allow-approximate writes the file without it";
                return Err(Error::expected("what config.json asks for", unsaid, expected));
            }
            self.outline.remarks.push(format!("written without {unsaid}"));
        }
        Ok(())
    }

    /// Returns how a tensor is written.
    ///
    /// `None` where it is a bias that is left out.
    fn planned(&self, tensor: OutlinedTensor, names: Option<&GgufNames>) -> Result<Option<Planned>> {
        let (name, change) = match names {
            None => (tensor.name.clone(), Change::None),
            Some(names) => match names.of_transformers(&tensor.name) {
                Some(found) => found,
                // One that had no other name when it came.
                None if tensor.name.starts_with("blk.") || tensor.name.starts_with("rope_") => {
                    (tensor.name.clone(), Change::None)
                }
                None => {
                    let found = format!("'{}'", tensor.name);
                    let expected = format!("one that llama.cpp has for architecture '{}'", names.architecture());
                    return Err(Error::expected("name of a tensor", found, expected));
                }
            },
        };
        if names.is_some_and(|names| !names.has_place(&name)) {
            if self.rounds_scales {
                return Ok(None);
            }
            let expected = "a tensor that llama.cpp has for the architecture; --allow-approximate leaves it out";
            return Err(Error::expected("tensor for a GGUF file", "a bias", expected));
        }
        let columns = tensor.shape.last().copied().unwrap_or(1);
        let codes = match (&tensor.kept, tensor.shape.len()) {
            (Kept::Codes(format), 2) => Some(BlockType::holding(*format, columns, self.rounds_scales)),
            (Kept::Codes(_), _) => Some(Err("weights in parts".into())),
            (Kept::Otherwise(what), _) => Some(Err(what.clone())),
            (Kept::Numbers, _) => None,
        };
        let shape = tensor.shape.clone();
        let (tensor_type, tensor, rounds) = match codes {
            Some(Ok(blocks)) => {
                let content = Content::Packed(Arc::new(move |matrix| Ok(blocks.blocks(matrix))));
                let mut tensor = tensor;
                tensor.pieces.iter_mut().for_each(|piece| piece.content = content.clone());
                (TensorType::Blocks(blocks), tensor, false)
            }
            Some(Err(what)) if !self.allow_dequantize => {
                let expected = "codes that a type of GGUF's holds; --allow-dequantize writes them as numbers";
                return Err(Error::expected("weight for a GGUF file", what, expected));
            }
            _ => {
                let (tensor_type, dtype) = self.numbers(&tensor)?;
                let rounds = matches!(tensor_type, TensorType::Blocks(_));
                (tensor_type, OutlinedTensor { dtype, ..tensor }, rounds)
            }
        };
        let to = TensorToWrite { name, shape, tensor_type };
        let mut from = self.work.tensor(tensor);
        if let (TensorType::Blocks(_), false) = (tensor_type, rounds) {
            from.length = to.byte_len()?;
        }
        Ok(Some(Planned { to, from: vec![from], change, rounds, made: vec![] }))
    }

    /// Returns the type of numbers that a tensor is written as, and the dtype that it is read in.
    fn numbers(&self, tensor: &OutlinedTensor) -> Result<(TensorType, DType)> {
        let own = match tensor.dtype {
            DType::F64 => DType::F32,
            DType::F8_E4M3 | DType::F8_E5M2 => DType::BF16,
            own @ (DType::F32 | DType::F16 | DType::BF16 | DType::I8 | DType::I16 | DType::I32 | DType::I64) => own,
            other => {
                let found = format!("{other:?}");
                return Err(Error::expected("dtype of a tensor for a GGUF file", found, "floats, or I8 to I64"));
            }
        };
        let is_float = matches!(own, DType::F32 | DType::F16 | DType::BF16);
        let own = self.dtype.and_then(ExportDtype::plain).filter(|_| is_float).unwrap_or(own);
        // Norms and biases are f32 there.
        let plain = if is_float && tensor.shape.len() < 2 { DType::F32 } else { own };
        let columns = tensor.shape.last().copied().unwrap_or(1);
        match self.dtype {
            Some(ExportDtype::Q8_0) if is_float && tensor.shape.len() == 2 && columns.is_multiple_of(32) => {
                Ok((TensorType::Blocks(BlockType::Q8_0), DType::F32))
            }
            _ => Ok((TensorType::Plain(plain), plain)),
        }
    }
}

/// Returns the tensor that an expert's is a part of, and which, by llama.cpp's names of them.
fn expert_of(name: &str) -> Option<(String, usize)> {
    let (stem, kind) = name.rsplit_once('.')?;
    let (stem, number) = stem.rsplit_once('.')?;
    let number = number.parse().ok().filter(|_| stem.ends_with("_exps"))?;
    Some((format!("{stem}.{kind}"), number))
}

/// Joins experts into the tensor that they are there.
fn together(stem: &str, parts: BTreeMap<usize, Planned>) -> Result<Planned> {
    let count = parts.len();
    let complete = parts.keys().copied().eq(0..count);
    let mut parts = parts.into_values();
    let Some(mut whole) = parts.next() else { return Err(Error::expected("experts", "none", "some")) };
    for part in parts {
        if part.to.tensor_type != whole.to.tensor_type || part.to.shape != whole.to.shape {
            let found = format!("{:?} and {:?}", whole.to.tensor_type, part.to.tensor_type);
            return Err(Error::expected(format!("experts of '{stem}'"), found, "one type and shape"));
        }
        whole.from.extend(part.from);
    }
    if !complete {
        return Err(Error::expected(format!("experts of '{stem}'"), format!("{count}, not in order"), "all of them"));
    }
    whole.to.name = stem.to_owned();
    whole.to.shape.insert(0, count);
    Ok(whole)
}

impl Planned {
    /// Reads the bytes that are written.
    fn bytes(&self) -> Result<Vec<u8>> {
        let mut all = self.made.clone();
        for from in &self.from {
            let mut bytes = from.read()?;
            if self.rounds {
                bytes = to_q8_0(&to_f32(DType::F32, &bytes)?);
            }
            all.extend(bytes);
        }
        match self.change {
            Change::None => Ok(all),
            Change::Unpermute(heads) => permuted(&all, &self.to.shape, heads)
                .map_err(|reason| Error::expected(format!("tensor '{}'", self.to.name), reason, "rows of its heads")),
            Change::LessOne => {
                let numbers: Vec<f32> = to_f32(DType::F32, &all)?.into_iter().map(|v| v + 1.0).collect();
                Ok(from_f32(DType::F32, &numbers)?.to_vec())
            }
        }
    }
}
