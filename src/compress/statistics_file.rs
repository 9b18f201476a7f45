//! Writes statistics files, a layer at a time.
//!
//! The header of a safetensors file comes first and says where all tensors are. Room is left for it, and it is written when all are
//! there, with spaces behind it, as the format allows: so a file larger than the memory is written once.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use safetensors::tensor::{Metadata, TensorInfo};

use super::calibration::{MARK, PARTS, SHARED, VERSION};
use crate::Calibration;
use crate::error::{Error, Result};
use crate::layer::DType;
use crate::layer::parts::f32_bytes;
use crate::staged;

/// Bytes of a tensor's entry in the header beside its name, at most.
const ENTRY: usize = 160;

/// A statistics file that is being written.
pub(super) struct StatisticsWriter {
    file: BufWriter<File>,
    /// Where it is to be, for messages.
    path: PathBuf,
    /// Bytes that are left for the header.
    room: usize,
    at: usize,
    tensors: Vec<(String, TensorInfo)>,
    shared: BTreeMap<String, String>,
    names: BTreeSet<String>,
}

impl StatisticsWriter {
    /// Begins a file at `staged`, which is to be at `path`, of statistics of layers of these names.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn new<'a>(staged: &Path, path: &Path, names: impl Iterator<Item = &'a str>) -> Result<Self> {
        // Names are written with escapes: six bytes for one at most, in each part's entry, and twice where they are shared.
        let room = names.map(|name| PARTS.len() * (6 * name.len() + ENTRY) + 12 * name.len() + 16).sum::<usize>();
        let room = (room + 1024).next_multiple_of(8);
        let io = |e| Error::io(path, e);
        let mut file = File::create(staged).map_err(io)?;
        file.seek(SeekFrom::Start(8 + room as u64)).map_err(io)?;
        Ok(StatisticsWriter {
            file: BufWriter::new(file),
            path: path.to_owned(),
            room,
            at: 0,
            tensors: vec![],
            shared: BTreeMap::new(),
            names: BTreeSet::new(),
        })
    }

    fn tensor(&mut self, name: String, dtype: DType, shape: Vec<usize>, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(|e| Error::io(&self.path, e))?;
        let data_offsets = (self.at, self.at + bytes.len());
        self.at = data_offsets.1;
        self.tensors.push((name, TensorInfo { dtype, shape, data_offsets }));
        Ok(())
    }

    /// Adds the statistics of the layers of these names, which share them.
    ///
    /// # Errors
    /// When there are statistics of one of the names already, or the file cannot be written.
    pub fn add(&mut self, layers: &[String], calibration: &Calibration) -> Result<()> {
        let Some((layer, others)) = layers.split_first() else { return Ok(()) };
        if let Some(twice) = layers.iter().find(|name| !self.names.insert((*name).clone())) {
            return Err(Error::expected("layers of a statistics file", format!("two named '{twice}'"), "one"));
        }
        let n = calibration.features();
        let wide = |values: &mut dyn Iterator<Item = f64>| values.flat_map(f64::to_le_bytes).collect::<Vec<u8>>();
        let count = i64::try_from(calibration.tokens()).unwrap_or(i64::MAX);
        let [of_count, of_mean, of_abs, of_second, of_sample] = PARTS.map(|part| format!("{layer}.{part}"));
        self.tensor(of_count, DType::I64, vec![], &count.to_le_bytes())?;
        self.tensor(of_mean, DType::F64, vec![n], &wide(&mut calibration.mean().iter().copied()))?;
        self.tensor(of_abs, DType::F64, vec![n], &wide(&mut calibration.mean_abs().iter().copied()))?;
        match calibration.has_full_moment() {
            true => {
                let second = wide(&mut calibration.second_moment()?.iter().copied());
                self.tensor(of_second, DType::F64, vec![n, n], &second)?;
            }
            false => {
                let second = wide(&mut calibration.second_diagonal().into_iter());
                self.tensor(of_second, DType::F64, vec![n], &second)?;
            }
        }
        let sample = calibration.sample();
        let sample = sample.as_standard_layout();
        let bytes = f32_bytes(sample.as_slice().unwrap_or_default()).to_vec();
        self.tensor(of_sample, DType::F32, vec![sample.nrows(), n], &bytes)?;
        self.shared.extend(others.iter().map(|other| (other.clone(), layer.clone())));
        Ok(())
    }

    /// Writes the header. Returns the bytes of the file.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn finish(mut self) -> Result<u64> {
        let mut about = HashMap::from([(MARK.to_owned(), VERSION.to_owned())]);
        let refused = |e: &dyn std::fmt::Display| Error::file(&self.path, e.to_string());
        if !self.shared.is_empty() {
            let shared = serde_json::to_string(&self.shared).map_err(|e| refused(&e))?;
            about.insert(SHARED.to_owned(), shared);
        }
        let header = Metadata::new(Some(about), self.tensors).map_err(|e| refused(&e))?;
        let mut header = serde_json::to_vec(&header).map_err(|e| refused(&e))?;
        if header.len() > self.room {
            return Err(refused(&format!("a header of {} bytes, expected at most {}", header.len(), self.room)));
        }
        header.resize(self.room, b' ');
        let io = |e| Error::io(&self.path, e);
        self.file.seek(SeekFrom::Start(0)).map_err(io)?;
        self.file.write_all(&(self.room as u64).to_le_bytes()).map_err(io)?;
        self.file.write_all(&header).map_err(io)?;
        self.file.flush().map_err(io)?;
        Ok((8 + self.room + self.at) as u64)
    }
}

/// Writes statistics by layer as a statistics file; the file appears whole or not at all.
///
/// # Errors
/// When two have one name, or the file cannot be written.
pub fn write_statistics(path: &Path, layers: &[(String, Calibration)]) -> Result<()> {
    staged::write(path, |staged| {
        let names = layers.iter().map(|(name, _)| name.as_str());
        let mut writer = StatisticsWriter::new(staged, path, names)?;
        for (name, calibration) in layers {
            writer.add(std::slice::from_ref(name), calibration)?;
        }
        writer.finish().map(drop)
    })?;
    Ok(())
}
