//! Sources some of whose tensors are seen in another way than the file holds them: transposed, one by one of several matrices, as groups
//! of rows, or by a second name; and the files that lie beside the model.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use super::side_files::SideFile;
use super::source::{SourceContent, SourceLayer, TensorInfo, TensorSource, paired};
use crate::error::{Error, Result};
use crate::layer::StoredAs;

/// How the weight of a layer is to be seen, and its bias with it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Arrangement {
    /// Whether the weight is stored `[in_features, out_features]`.
    pub transpose: bool,
    /// The layers that it is divided into.
    pub split: Option<Split>,
}

/// The layers that a weight is divided into: `NAME.0`, `NAME.1` and so on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Split {
    /// The matrices of a tensor of three dimensions.
    Experts,
    /// As many groups of equally many rows.
    Parts(usize),
    /// Groups of so many rows.
    Rows(Vec<usize>),
}

/// A source, and what is seen of it in another way.
#[derive(Debug)]
pub struct ArrangedSource {
    source: Arc<dyn TensorSource>,
    tensors: BTreeMap<String, TensorInfo>,
    /// What is seen, and the tensor of the source that it is a view of.
    views: BTreeMap<String, (TensorInfo, StoredAs)>,
    /// Tensors of the source that are seen in another way alone.
    replaced: BTreeSet<String>,
    side_files: Vec<SideFile>,
    notes: Vec<String>,
}

impl ArrangedSource {
    /// Returns a source as it is.
    pub fn new(source: Arc<dyn TensorSource>) -> Self {
        let tensors = source.tensors().clone();
        let (views, replaced) = (BTreeMap::new(), BTreeSet::new());
        ArrangedSource { source, tensors, views, replaced, side_files: vec![], notes: vec![] }
    }

    /// Adds files and notes to those of the source.
    pub fn with_files(mut self, files: Vec<SideFile>, notes: Vec<String>) -> Self {
        self.side_files.extend(files);
        self.notes.extend(notes);
        self
    }

    /// Arranges the weight of a layer that is made of tensors.
    ///
    /// # Errors
    /// When its shape does not fit, or a name is taken.
    pub fn arrange(&mut self, layer: &SourceLayer, arrangement: &Arrangement) -> Result<()> {
        let SourceContent::Tensors { weight, .. } = &layer.content else {
            return Err(Error::expected("weight to be seen in another way", "packed already", "a plain tensor"));
        };
        let stem = weight.name.strip_suffix(".weight").unwrap_or(&weight.name);
        let named = |name: String| self.tensors.get(&name).cloned();
        let bias = named(format!("{stem}.bias"));
        let whole = |tensor: &TensorInfo| StoredAs::whole(&tensor.name, &tensor.shape);
        let base = StoredAs { transposed: arrangement.transpose, ..whole(weight) };
        match &arrangement.split {
            None if base.is_whole() => Ok(()),
            None => self.see(weight.name.clone(), weight, base),
            Some(Split::Experts) => {
                let [experts, rows, columns] = weight.shape[..] else { return Err(no_experts(weight)) };
                let rows = if arrangement.transpose { columns } else { rows };
                let bias = bias.or_else(|| named(format!("{stem}_bias"))).filter(|bias| bias.shape == [experts, rows]);
                for number in 0..experts {
                    let (name, expert) = (format!("{stem}.{number}"), Some(number));
                    self.see(format!("{name}.weight"), weight, StoredAs { expert, ..base.clone() })?;
                    if let Some(bias) = &bias {
                        self.see(format!("{name}.bias"), bias, StoredAs { expert, ..whole(bias) })?;
                    }
                }
                Ok(())
            }
            Some(Split::Parts(parts)) => {
                let rows = base.seen()?.first().copied().unwrap_or_default();
                if *parts == 0 || !rows.is_multiple_of(*parts) {
                    let expected = format!("a number that divides its {rows} rows");
                    return Err(Error::expected("split: parts of the weight", parts, expected));
                }
                self.see_rows(stem, weight, bias, &base, &vec![rows / parts; *parts])
            }
            Some(Split::Rows(rows)) => self.see_rows(stem, weight, bias, &base, rows),
        }
    }

    fn see_rows(
        &mut self,
        stem: &str,
        weight: &TensorInfo,
        bias: Option<TensorInfo>,
        base: &StoredAs,
        groups: &[usize],
    ) -> Result<()> {
        let seen = base.seen()?;
        let ([rows, _], total) = (&seen[..], groups.iter().fold(0usize, |all, n| all.saturating_add(*n))) else {
            return Err(Error::expected(
                "shape of a weight to split by rows",
                format!("{:?}", weight.shape),
                "a matrix",
            ));
        };
        if total != *rows || groups.contains(&0) {
            let expected = format!("numbers of rows that are {rows} together, and none of them 0");
            return Err(Error::expected("split: rows of the weight", format!("{groups:?}"), expected));
        }
        let bias = bias.filter(|bias| bias.shape == [*rows]);
        let mut first = 0;
        for (part, rows) in groups.iter().enumerate() {
            let rows = Some((first, first + rows));
            self.see(format!("{stem}.{part}.weight"), weight, StoredAs { rows, ..base.clone() })?;
            if let Some(bias) = &bias {
                let view = StoredAs { rows, ..StoredAs::whole(&bias.name, &bias.shape) };
                self.see(format!("{stem}.{part}.bias"), bias, view)?;
            }
            first = rows.map_or(0, |(_, end)| end);
        }
        Ok(())
    }

    /// Gives a tensor a second name.
    ///
    /// # Errors
    /// When there is no such tensor, or the name is taken.
    pub fn tie(&mut self, name: &str, to: &str) -> Result<()> {
        let Some(tensor) = self.tensors.get(to).cloned() else {
            return Err(Error::expected("tensor", format!("'{to}'"), "one of the source"));
        };
        if self.views.contains_key(to) {
            return Err(Error::expected("tensor of two names", format!("'{to}', seen in another way"), "one as it is"));
        }
        self.see(name.to_owned(), &tensor, StoredAs::whole(to, &tensor.shape))?;
        self.replaced.remove(to);
        self.tensors.insert(to.to_owned(), tensor);
        Ok(())
    }

    /// Sees a tensor under this name as it was seen when a layer was made of it, where the source has the tensor that it lay in.
    ///
    /// # Errors
    /// When it is laid out in another way, or the name is taken.
    pub fn see_again(&mut self, name: &str, view: &StoredAs) -> Result<()> {
        let Some(of) = self.source.tensors().get(&view.tensor).cloned() else { return Ok(()) };
        let view = match self.source.stored_as(&of.name) {
            // Some of the rows of what the source sees so already.
            Some(inner)
                if (inner.expert, inner.transposed) == (view.expert, view.transposed) && inner.rows.is_none() =>
            {
                StoredAs { rows: view.rows, ..StoredAs::whole(&of.name, &of.shape) }
            }
            _ => view.clone(),
        };
        if view.shape != of.shape {
            let found = format!("{:?}", of.shape);
            return Err(Error::expected(format!("shape of tensor '{}'", of.name), found, format!("{:?}", view.shape)));
        }
        self.see(name.to_owned(), &of, view)
    }

    fn see(&mut self, name: String, of: &TensorInfo, view: StoredAs) -> Result<()> {
        if !of.dtype.bitsize().is_multiple_of(8) {
            let found = format!("{:?}", of.dtype);
            return Err(Error::expected(format!("dtype of tensor '{}'", of.name), found, "one of whole bytes"));
        }
        let shape = view.seen()?;
        if self.source.stored_as(&of.name).is_some_and(|inner| view.within(&inner).is_err()) {
            let found = "seen in another way already";
            return Err(Error::expected(format!("tensor '{}'", of.name), found, "one as its file holds it"));
        }
        // The tensor itself goes, unless it keeps its name.
        self.tensors.remove(&of.name);
        self.replaced.insert(of.name.clone());
        if self.tensors.contains_key(&name) || self.views.contains_key(&name) {
            return Err(Error::expected("name of a tensor", format!("'{name}', which is taken"), "another"));
        }
        self.tensors.insert(name.clone(), TensorInfo { name: name.clone(), dtype: of.dtype, shape });
        self.views.insert(name, (of.clone(), view));
        Ok(())
    }
}

fn no_experts(weight: &TensorInfo) -> Error {
    let found = format!("{:?}", weight.shape);
    Error::expected("shape of a weight to split into experts", found, "[experts, rows, columns]")
}

impl TensorSource for ArrangedSource {
    fn path(&self) -> &Path {
        self.source.path()
    }

    fn tensors(&self) -> &BTreeMap<String, TensorInfo> {
        &self.tensors
    }

    fn bytes(&self, tensor: &TensorInfo) -> Result<Cow<'_, [u8]>> {
        let Some((of, view)) = self.views.get(&tensor.name) else { return self.source.bytes(tensor) };
        if view.is_whole() {
            return self.source.bytes(of);
        }
        let element = of.dtype.bitsize() / 8;
        let read = self.source.part(of, view.bytes(element)?)?;
        Ok(view.taken(element, read)?.into())
    }

    fn part(&self, tensor: &TensorInfo, range: Range<usize>) -> Result<Vec<u8>> {
        if !self.views.contains_key(&tensor.name) {
            return self.source.part(tensor, range);
        }
        let bytes = self.bytes(tensor)?;
        let part = bytes.get(range.clone());
        part.map(<[u8]>::to_vec).ok_or_else(|| {
            Error::expected(
                format!("bytes of tensor '{}'", tensor.name),
                bytes.len(),
                format!("at least {}", range.end),
            )
        })
    }

    fn stored_as(&self, tensor: &str) -> Option<StoredAs> {
        let Some((of, view)) = self.views.get(tensor) else { return self.source.stored_as(tensor) };
        match self.source.stored_as(&of.name) {
            // It was tried when the view was made.
            Some(inner) => view.within(&inner).ok(),
            None => Some(view.clone()),
        }
    }

    fn side_files(&self) -> Vec<SideFile> {
        let mut files = self.source.side_files();
        let own = self.side_files.iter().filter(|own| !files.iter().any(|file| file.name == own.name)).cloned();
        let own: Vec<SideFile> = own.collect();
        files.extend(own);
        files
    }

    fn file_name(&self, tensor: &str) -> String {
        match self.views.get(tensor).or_else(|| self.views.get(&format!("{tensor}.weight"))) {
            Some((of, _)) => self.source.file_name(&of.name),
            None => self.source.file_name(tensor),
        }
    }

    fn metadata(&self) -> BTreeMap<String, String> {
        self.source.metadata()
    }

    fn notes(&self) -> Vec<String> {
        [self.source.notes(), self.notes.clone()].concat()
    }

    fn layers(&self) -> Vec<SourceLayer> {
        let layers = self.source.layers();
        if self.views.is_empty() {
            return layers;
        }
        // Tensors are paired again, with the names that are seen.
        let (mut ready, mut plain) = (vec![], BTreeMap::new());
        for layer in layers {
            match layer.content {
                SourceContent::Tensors { weight, bias } => {
                    let kept = std::iter::once(weight).chain(bias).filter(|t| !self.replaced.contains(&t.name));
                    plain.extend(kept.map(|tensor| (tensor.name.clone(), tensor)));
                }
                SourceContent::Ready { .. } => ready.push(layer),
            }
        }
        let seen = self.views.keys().filter_map(|name| self.tensors.get(name));
        plain.extend(seen.map(|tensor| (tensor.name.clone(), tensor.clone())));
        ready.extend(paired(&plain));
        ready.sort_by(|a, b| a.name.cmp(&b.name));
        ready
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::SafetensorsSource;
    use crate::layer::DType;
    use safetensors::tensor::TensorView;

    fn source(tensors: &[(&str, &[usize])]) -> (tempfile::TempDir, ArrangedSource) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m.safetensors");
        let bytes = |shape: &[usize]| -> Vec<u8> {
            (0..shape.iter().product::<usize>()).flat_map(|i| (i as f32).to_le_bytes()).collect()
        };
        let bytes: Vec<Vec<u8>> = tensors.iter().map(|(_, shape)| bytes(shape)).collect();
        let views = tensors.iter().zip(&bytes);
        let views = views.map(|((n, s), b)| (*n, TensorView::new(DType::F32, s.to_vec(), b).unwrap()));
        safetensors::serialize_to_file(views, None, &path).unwrap();
        let source = ArrangedSource::new(Arc::new(SafetensorsSource::open(&path).unwrap()));
        (folder, source)
    }

    fn names(source: &ArrangedSource) -> Vec<String> {
        source.layers().into_iter().map(|layer| layer.name).collect()
    }

    fn arrange(source: &mut ArrangedSource, layer: &str, transpose: bool, split: Option<Split>) -> Result<()> {
        let layer = source.layers().into_iter().find(|l| l.name == layer).unwrap();
        source.arrange(&layer, &Arrangement { transpose, split })
    }

    fn matrix(source: &ArrangedSource, name: &str) -> ndarray::Array2<f32> {
        let source: &dyn TensorSource = source;
        source.matrix(source.tensor(name).unwrap()).unwrap()
    }

    #[test]
    fn a_transposed_weight_has_its_bias_again() {
        let (_folder, mut source) = source(&[("c.weight", &[2, 3]), ("c.bias", &[3]), ("d.weight", &[2, 2])]);
        assert_eq!(names(&source), ["c.bias", "c", "d"]);
        arrange(&mut source, "c", true, None).unwrap();
        assert_eq!(names(&source), ["c", "d"]);
        assert_eq!(matrix(&source, "c.weight"), ndarray::arr2(&[[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]));
        let stored = source.stored_as("c.weight").unwrap();
        assert!(stored.transposed && stored.shape == [2, 3] && source.stored_as("d.weight").is_none());
        assert!(arrange(&mut source, "c", true, None).is_err());
    }

    #[test]
    fn splits_have_their_rows() {
        let tensors =
            [("q.weight", &[6, 2][..]), ("q.bias", &[6]), ("e", &[2, 2, 3]), ("e_bias", &[2, 3]), ("x", &[2])];
        let (_folder, mut one) = source(&tensors);
        arrange(&mut one, "q", false, Some(Split::Rows(vec![3, 1, 2]))).unwrap();
        arrange(&mut one, "e", true, Some(Split::Experts)).unwrap();
        assert_eq!(names(&one), ["e.0", "e.1", "q.0", "q.1", "q.2", "x"]);
        assert_eq!(matrix(&one, "q.1.weight"), ndarray::arr2(&[[6.0, 7.0]]));
        assert_eq!(one.stored_as("q.2.bias").unwrap().rows, Some((4, 6)));
        let bias = one.stored_as("e.1.bias").unwrap();
        assert_eq!((bias.tensor.as_str(), bias.expert), ("e_bias", Some(1)));
        assert_eq!(matrix(&one, "e.1.weight"), ndarray::arr2(&[[6.0, 9.0], [7.0, 10.0], [8.0, 11.0]]));
        // A source of a source: rows of what is transposed.
        let (_folder, mut inner) = source(&[("c.weight", &[2, 6]), ("c.bias", &[6])]);
        arrange(&mut inner, "c", true, None).unwrap();
        let mut outer = ArrangedSource::new(Arc::new(inner));
        arrange(&mut outer, "c", false, Some(Split::Parts(3))).unwrap();
        assert_eq!(names(&outer), ["c.0", "c.1", "c.2"]);
        assert_eq!(matrix(&outer, "c.1.weight"), ndarray::arr2(&[[2.0, 8.0], [3.0, 9.0]]));
        let stored = outer.stored_as("c.1.weight").unwrap();
        assert_eq!((stored.shape, stored.transposed, stored.rows), (vec![2, 6], true, Some((2, 4))));
        for (name, split) in [
            ("q.0", Split::Parts(2)),
            ("q.0", Split::Rows(vec![2, 2])),
            ("q.0", Split::Rows(vec![3, 0])),
            ("q.0", Split::Experts),
            ("x", Split::Parts(2)),
        ] {
            let mut outer = ArrangedSource::new(Arc::new(source(&[("q.0.weight", &[3, 2]), ("x", &[2])]).1));
            assert!(arrange(&mut outer, name, false, Some(split.clone())).is_err(), "{name} {split:?}");
        }
    }

    #[test]
    fn a_second_name_is_a_layer_of_the_same_tensor() {
        let (_folder, mut source) = source(&[("embed.weight", &[3, 2]), ("norm.weight", &[2])]);
        source.tie("lm_head.weight", "embed.weight").unwrap();
        assert_eq!(names(&source), ["embed", "lm_head", "norm"]);
        assert_eq!(matrix(&source, "lm_head.weight"), matrix(&source, "embed.weight"));
        assert!(source.stored_as("lm_head.weight").unwrap().is_whole());
        assert!(source.stored_as("embed.weight").is_none());
        assert!(source.tie("norm.weight", "embed.weight").is_err() && source.tie("x", "none").is_err());
    }
}
