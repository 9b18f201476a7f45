//! Arrays in files: `.npy`, or one tensor of a `.safetensors` (`file.safetensors:name`), f32 or f16.

use std::fs::File;
use std::io::{BufRead, BufReader, BufWriter, Seek, Write};
use std::path::Path;

use half::f16;
use layerstore_core::layer::to_f32;
use ndarray::{Array2, ArrayD, ArrayView2, ArrayViewD, IxDyn};
use npyz::{DType as NpyType, NpyFile, NpyHeader, Order, TypeChar, WriterBuilder};

use super::merged::{self, NewTensor};
use super::regular;
use super::safetensors::SafetensorsSource;
use super::source::TensorSource;
use crate::error::{Error, Result, closest, known_list};
use crate::layer::DType;
use crate::layer::parts::f32_bytes;
use crate::staged;

/// Reads an array of any number of dimensions.
///
/// # Errors
/// When the file cannot be read, is of another kind or dtype, or a value is not finite.
pub fn read_any_array(location: &str) -> Result<ArrayD<f32>> {
    let (shape, values) = match split_location(location)? {
        Location::Npy(path) => read_npy(path)?,
        Location::Safetensors(path, name) => read_tensor(path, name)?,
    };
    if let Some(index) = values.iter().position(|v| !v.is_finite()) {
        return Err(Error::NotFinite { what: location.to_owned(), value: f64::from(values[index]), index });
    }
    ArrayD::from_shape_vec(IxDyn(&shape), values).map_err(|e| Error::expected(location, e, format!("{shape:?}")))
}

/// Reads a vector (one row) or a matrix `[batch, features]`, and says which of the two it was.
///
/// # Errors
/// When the file cannot be read, is of another kind, dtype or number of dimensions, or a value is not finite.
pub fn read_array(location: &str) -> Result<(Array2<f32>, bool)> {
    let array = read_any_array(location)?;
    let shape = array.shape().to_vec();
    let (values, _) = array.into_raw_vec_and_offset();
    let (dimensions, is_vector) = match shape[..] {
        [features] => ((1, features), true),
        [batch, features] => ((batch, features), false),
        _ => {
            return Err(Error::expected(
                location,
                format!("shape {shape:?}"),
                "a vector [features] or a matrix [batch, features]",
            ));
        }
    };
    let array =
        Array2::from_shape_vec(dimensions, values).map_err(|e| Error::expected(location, e, format!("{shape:?}")))?;
    Ok((array, is_vector))
}

/// Writes a matrix as f32, or its one row as a vector, as [`write_any_array`].
///
/// # Errors
/// As [`write_any_array`].
pub fn write_array(location: &str, array: ArrayView2<f32>, as_vector: bool) -> Result<()> {
    match as_vector {
        true => write_any_array(location, array.row(0).into_dyn()),
        false => write_any_array(location, array.into_dyn()),
    }
}

/// Writes an array of any number of dimensions as f32; the file appears whole or not at all. A `.npy` file is replaced; in
/// a `.safetensors` file that is there the tensor of that name is, and others stay. Where the name is a symbolic link, the file
/// that it leads to is written; a file that is replaced keeps its mode.
///
/// # Errors
/// When the name is of another kind, the file cannot be written, or a `.safetensors` file that is there is none.
pub fn write_any_array(location: &str, array: ArrayViewD<f32>) -> Result<()> {
    let shape: Vec<usize> = array.shape().to_vec();
    let values = array.as_standard_layout();
    let values = values.as_slice().expect("standard layout");
    match split_location(location)? {
        Location::Npy(path) => staged::write(path, |staged| write_npy(staged, &shape, values)).map(drop),
        Location::Safetensors(path, name) => {
            let (name, bytes) = (name.unwrap_or(OUTPUT), f32_bytes(values));
            merged::put(path, &[NewTensor { name, dtype: DType::F32, shape: &shape, bytes: &bytes }], &[])
        }
    }
}

/// Tries whether an array could be written to a location, before the work that makes it. Nothing is left behind.
///
/// # Errors
/// As [`write_any_array`].
pub(crate) fn check_output(location: &str) -> Result<()> {
    match split_location(location)? {
        Location::Npy(path) => staged::probe(path),
        Location::Safetensors(path, _) => merged::probe(path),
    }
}

/// The name of a tensor that is given none.
const OUTPUT: &str = "output";

enum Location<'a> {
    Npy(&'a Path),
    Safetensors(&'a Path, Option<&'a str>),
}

fn split_location(location: &str) -> Result<Location<'_>> {
    const MARK: &str = ".safetensors";
    if location.ends_with(".npy") {
        return Ok(Location::Npy(Path::new(location)));
    }
    if location.ends_with(MARK) {
        return Ok(Location::Safetensors(Path::new(location), None));
    }
    if let Some(at) = location.find(&format!("{MARK}:")) {
        let (path, name) = location.split_at(at + MARK.len());
        return Ok(Location::Safetensors(Path::new(path), Some(&name[1..])));
    }
    Err(Error::expected(
        "array file",
        format!("'{location}'"),
        "a name ending in .npy or .safetensors, or FILE.safetensors:TENSOR",
    ))
}

fn read_npy(path: &Path) -> Result<(Vec<usize>, Vec<f32>)> {
    let wrong = |reason: String| Error::file(path, format!("not an .npy array that can be read: {reason}"));
    let file = regular::open(path)?;
    let size = file.metadata().map_err(|e| Error::io(path, e))?.len();
    let mut file = BufReader::new(file);
    let start = file.fill_buf().map_err(|e| Error::io(path, e))?;
    if !start.starts_with(regular::NPY) {
        let unknown = if start.is_empty() { "empty" } else { "of another kind" };
        let found = regular::kind_of_content(start).unwrap_or(unknown);
        return Err(Error::file(path, format!("the file is {found}; expected an .npy array")));
    }
    let header = NpyHeader::from_reader(&mut file).map_err(|e| wrong(e.to_string()))?;
    let data = size.saturating_sub(file.stream_position().map_err(|e| Error::io(path, e))?);
    let npy = NpyFile::with_header(header, file);
    let shape = npy.shape().to_vec();
    if npy.order() != Order::C && shape.len() > 1 {
        return Err(wrong("it is in Fortran order; save it with numpy.ascontiguousarray".into()));
    }
    let elements = shape.iter().try_fold(1u64, |n, &d| n.checked_mul(d));
    let kind = match npy.dtype() {
        NpyType::Plain(kind) => kind,
        other => return Err(wrong(format!("its dtype is {}, expected <f4 or <f2", other.descr()))),
    };
    let width = kind.size_field();
    // Before anything is allocated: the header may claim any shape.
    let claimed = elements.and_then(|n| n.checked_mul(width));
    if claimed != Some(data) {
        let expected = claimed.map_or("more than there can be".to_owned(), |n| n.to_string());
        return Err(wrong(format!(
            "found {data} bytes after its header, which claims shape {shape:?}, expected {expected}"
        )));
    }
    let values = match (kind.type_char(), width) {
        (TypeChar::Float, 4) => npy.into_vec::<f32>().map_err(|e| wrong(e.to_string()))?,
        (TypeChar::Float, 2) => {
            npy.into_vec::<f16>().map_err(|e| wrong(e.to_string()))?.into_iter().map(f16::to_f32).collect()
        }
        _ => return Err(wrong(format!("its dtype is {kind}, expected <f4 or <f2"))),
    };
    Ok((shape.into_iter().map(|n| n as usize).collect(), values))
}

fn read_tensor(path: &Path, name: Option<&str>) -> Result<(Vec<usize>, Vec<f32>)> {
    let file = SafetensorsSource::open(path)?;
    let tensors = file.tensors();
    let entry = match name {
        Some(name) => tensors.get(name),
        None if tensors.len() == 1 => tensors.values().next(),
        None => None,
    };
    let Some(entry) = entry else {
        let what = format!("tensor of {}", path.display());
        let names = closest(name.unwrap_or_default(), tensors.keys().map(String::as_str), tensors.len());
        return Err(match name {
            Some(name) => {
                let expected = format!("one that is there; {}", known_list("closest names", &names));
                Error::expected(what, format!("no '{name}'"), expected)
            }
            None if names.is_empty() => Error::expected(what, "none", "a file with a tensor"),
            None => {
                let expected = format!("{}:TENSOR; {}", path.display(), known_list("tensors", &names));
                Error::expected(what, format!("{} and no name", names.len()), expected)
            }
        });
    };
    if !matches!(entry.dtype, DType::F32 | DType::F16) {
        return Err(Error::expected(
            format!("dtype of tensor '{}'", entry.name),
            format!("{:?}", entry.dtype),
            "F32 or F16",
        ));
    }
    Ok((entry.shape.clone(), to_f32(entry.dtype, &file.bytes(entry)?)?))
}

fn write_npy(path: &Path, shape: &[usize], values: &[f32]) -> Result<()> {
    let write = || -> std::io::Result<()> {
        let mut file = BufWriter::new(File::create(path)?);
        let shape: Vec<u64> = shape.iter().map(|&n| n as u64).collect();
        let mut npy = npyz::WriteOptions::new().default_dtype().shape(&shape).writer(&mut file).begin_nd()?;
        npy.extend(values.iter().copied())?;
        npy.finish()?;
        file.flush()
    };
    write().map_err(|e| Error::io(path, e))
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::array;
    use proptest::prelude::*;

    #[test]
    fn both_kinds_round_trip() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name).display().to_string();
        let matrix = array![[1.0, -2.5], [0.0, 1e-8]];
        for name in ["x.npy", "x.safetensors", "x.safetensors:q"] {
            write_array(&at(name), matrix.view(), false).unwrap();
            assert_eq!(read_array(&at(name)).unwrap(), (matrix.clone(), false), "{name}");
        }
        let row = array![[1.0, 2.0, 3.0]];
        write_array(&at("v.npy"), row.view(), true).unwrap();
        assert_eq!(read_array(&at("v.npy")).unwrap(), (row, true));
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 3);
    }

    /// Tensors that a file holds already stay, with its metadata.
    #[test]
    fn tensors_are_put_into_a_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.safetensors");
        let at = |name: &str| format!("{}:{name}", path.display());
        let half = [f16::from_f32(0.5).to_le_bytes(), f16::from_f32(-2.0).to_le_bytes()].concat();
        let view = safetensors::tensor::TensorView::new(DType::F16, vec![2], &half).unwrap();
        let metadata = std::collections::HashMap::from([("note".to_owned(), "mine".to_owned())]);
        safetensors::serialize_to_file([("x", view)], Some(metadata), &path).unwrap();
        for y in [array![[1.0, 2.0]], array![[3.0, 4.0], [5.0, 6.0]]] {
            check_output(&at("y")).unwrap();
            write_array(&at("y"), y.view(), false).unwrap();
            assert_eq!(read_array(&at("y")).unwrap().0, y);
        }
        assert_eq!(read_array(&at("x")).unwrap().0, array![[0.5, -2.0]]);
        let file = SafetensorsSource::open(&path).unwrap();
        assert_eq!(file.metadata()["note"], "mine");
        assert_eq!((file.tensors().len(), file.tensors()["x"].dtype), (2, DType::F16));
        // What is no safetensors file is not replaced; an empty file is.
        for (content, fits) in [("text", false), ("", true)] {
            std::fs::write(&path, content).unwrap();
            assert_eq!(check_output(&at("y")).is_ok(), fits);
            let written = write_array(&at("y"), array![[1.0]].view(), true);
            assert_eq!(written.is_ok(), fits, "{written:?}");
        }
        let message = check_output("x.csv").unwrap_err().to_string();
        assert!(message.contains(".npy"), "{message}");
    }

    #[test]
    fn half_precision_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("h.npy");
        let mut file = File::create(&path).unwrap();
        let mut npy = npyz::WriteOptions::new().default_dtype().shape(&[2]).writer(&mut file).begin_nd().unwrap();
        npy.extend([f16::from_f32(0.5), f16::from_f32(-2.0)]).unwrap();
        npy.finish().unwrap();
        assert_eq!(read_array(&path.display().to_string()).unwrap(), (array![[0.5, -2.0]], true));
    }

    #[test]
    fn what_cannot_be_used_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name).display().to_string();
        write_array(&at("x.safetensors:q"), array![[f32::NAN]].view(), false).unwrap();
        let refuse = |location: &str, expected: &str| {
            let message = read_array(location).unwrap_err().to_string();
            assert!(message.contains(expected), "{message}");
        };
        refuse(&at("x.safetensors:q"), "NaN");
        refuse(&at("x.safetensors:k"), "found no 'k', expected one that is there; closest names: q");
        write_array(&at("x.safetensors:r"), array![[1.0]].view(), false).unwrap();
        refuse(&at("x.safetensors"), "found 2 and no name");
        refuse(&at("x.safetensors"), "x.safetensors:TENSOR; tensors: q, r");
        refuse(&at("missing.npy"), "missing.npy");
        refuse("x.csv", ".npy");
        std::fs::write(folder.path().join("bad.npy"), b"\x93NUMPY\x01\x00garbage").unwrap();
        refuse(&at("bad.npy"), "not an .npy array");
        std::fs::copy(at("x.safetensors"), at("x.npy")).unwrap();
        refuse(&at("x.npy"), "the file is a safetensors file; expected an .npy array");
        std::fs::copy(at("bad.npy"), at("bad.safetensors")).unwrap();
        refuse(&at("bad.safetensors:q"), "the file is an .npy array; expected safetensors");
        let header = "{'descr': '<f4', 'fortran_order': False, 'shape': (4000000000000, 4), }\n";
        let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
        bytes.extend((header.len() as u16).to_le_bytes());
        bytes.extend(header.as_bytes());
        std::fs::write(folder.path().join("huge.npy"), &bytes).unwrap();
        refuse(&at("huge.npy"), "found 0 bytes after its header, which claims shape [4000000000000, 4], expected 64");
        // What is cut off, or goes on.
        write_array(&at("x.npy"), array![[1.0, 2.0]].view(), false).unwrap();
        let whole = std::fs::read(at("x.npy")).unwrap();
        for (bytes, found) in [(&whole[..whole.len() - 1], 7), (&[&whole[..], b"junk"].concat()[..], 12)] {
            std::fs::write(at("x.npy"), bytes).unwrap();
            refuse(
                &at("x.npy"),
                &format!("found {found} bytes after its header, which claims shape [1, 2], expected 8"),
            );
        }
    }

    proptest! {
        #[test]
        fn any_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..120)) {
            let file = tempfile::Builder::new().suffix(".npy").tempfile().unwrap();
            let mut all = b"\x93NUMPY\x01\x00".to_vec();
            all.extend(bytes);
            std::fs::write(file.path(), all).unwrap();
            let _ = read_array(&file.path().display().to_string());
        }
    }
}
