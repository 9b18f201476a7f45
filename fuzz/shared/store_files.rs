//! A store whose files nobody wrote: the store of format 1 that is kept among the fixtures, one file of it changed.

use std::path::{Path, PathBuf};

use layerstore::layer::Accuracy;
use layerstore::{ErrorKind, Reader, Snapshot, Store, StoreOptions};
use ndarray::Array2;

use super::choices::Choices;

/// A copy of the kept store, and its files as they were.
pub struct Kept {
    folder: PathBuf,
    /// Rows, then the newest manifests and the names of snapshots, then the rest, which hardly anybody reads.
    files: Vec<(PathBuf, Vec<u8>)>,
    /// Files of rows.
    data: usize,
    /// Newest manifests, and names of snapshots.
    manifests: usize,
}

/// Puts a file back as it was.
struct PutBack<'a> {
    path: PathBuf,
    bytes: &'a [u8],
}

impl Drop for PutBack<'_> {
    fn drop(&mut self) {
        std::fs::write(&self.path, self.bytes).expect("the file as it was");
    }
}

/// What became of a store with a changed file, over both readers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Stores that could be opened, of two.
    pub opened: usize,
    /// Layers that were loaded.
    pub loaded: usize,
    /// Layers that were refused.
    pub refused: usize,
    /// Verifications that came to an end, of one.
    pub verified: usize,
    /// Artifacts and files that verification found to be damaged.
    pub corrupt: usize,
}

impl Kept {
    /// Copies the store at `from` to `folder`.
    ///
    /// # Panics
    /// When that cannot be done, or there is no file.
    pub fn copied(from: &Path, folder: &Path) -> Self {
        let mut files = vec![];
        gather(from, from, &mut files);
        assert!(!files.is_empty(), "{} is empty", from.display());
        // The newest manifest of a table has the least name.
        files.sort();
        let manifests =
            files.iter().map(|(name, _)| name).filter(|name| name.extension().is_some_and(|e| e == "manifest"));
        let mut newest: Vec<PathBuf> = manifests.cloned().collect();
        newest.dedup_by(|next, before| next.parent() == before.parent());
        let rank = |name: &Path| {
            let is_in = |folder: &str| name.components().any(|part| part.as_os_str() == folder);
            match (is_in("data"), is_in("_refs") || newest.iter().any(|of| of == name)) {
                (true, _) => 0,
                (false, true) => 1,
                _ => 2,
            }
        };
        files.sort_by_key(|(name, _)| (rank(name), name.clone()));
        let count = |wanted: u8| files.iter().filter(|(name, _)| rank(name) == wanted).count();
        let (data, manifests) = (count(0), count(1));
        assert!(data > 0 && manifests > 0, "{} is no store", from.display());
        for (name, bytes) in &files {
            let path = folder.join(name);
            std::fs::create_dir_all(path.parent().expect("a file in a folder")).expect("a folder for a copy");
            std::fs::write(path, bytes).expect("a copy");
        }
        Kept { folder: folder.to_owned(), files, data, manifests }
    }

    /// Changes a file that `choices` picks, does everything that reads the store, and puts the file back.
    ///
    /// # Panics
    /// When reading panics, an error says nothing, or one reader loads other layers than the other.
    pub async fn changed(&self, choices: &mut Choices<'_>) -> Outcome {
        let at = match choices.below(8) {
            0 => choices.below(self.files.len()),
            1 | 2 => self.data + choices.below(self.manifests),
            _ => choices.below(self.data),
        };
        let (name, bytes) = &self.files[at];
        let mut changed = bytes.clone();
        choices.mutate(&mut changed);
        let path = self.folder.join(name);
        std::fs::write(&path, &changed).expect("a changed file");
        // Also when reading panics, so that what comes next finds the store whole.
        let _guard = PutBack { path, bytes };
        self.read().await
    }

    /// Does everything that reads the store, with both readers.
    ///
    /// # Panics
    /// As [`Kept::changed`].
    pub async fn read(&self) -> Outcome {
        let mut outcome = Outcome::default();
        for reader in [Reader::Direct, Reader::Lance] {
            let options = StoreOptions { reader: Some(reader), ..StoreOptions::default() };
            let Some(store) = said(Store::open_with(&self.folder.display().to_string(), options).await) else {
                continue;
            };
            outcome.opened += 1;
            if let Some(latest) = said(store.latest().await) {
                read_layers(&latest, &mut outcome).await;
            }
            if reader == Reader::Direct {
                continue;
            }
            // The rest is read in the same way whatever the reader.
            if let Some(first) = said(store.at("first").await) {
                said(first.models().await);
            }
            said(store.log().await);
            said(store.snapshots().await);
            said(store.gc(std::time::Duration::ZERO, false).await);
            if let Some(report) = said(store.verify(|_, _| ()).await) {
                outcome.verified += 1;
                outcome.corrupt += report.corrupt.len() + report.damaged.len();
            }
        }
        outcome
    }
}

async fn read_layers(snapshot: &Snapshot, outcome: &mut Outcome) {
    said(snapshot.stats().await);
    for model in said(snapshot.models().await).unwrap_or_default() {
        for record in said(snapshot.layers(&model.model).await).unwrap_or_default() {
            let handle = snapshot.handle(record);
            match said(handle.load().await) {
                None => outcome.refused += 1,
                Some(layer) => {
                    outcome.loaded += 1;
                    let x = Array2::zeros((1, layer.in_features().min(1 << 12)));
                    said(layer.forward(x.view(), Accuracy::Approximate));
                }
            }
        }
    }
}

/// What there is, if anything; an error has to say something, and nobody has asked for the work to stop.
fn said<T>(result: layerstore::Result<T>) -> Option<T> {
    result
        .inspect_err(|error| {
            assert!(!error.to_string().is_empty());
            assert_ne!(error.kind(), ErrorKind::Cancelled, "{error}");
        })
        .ok()
}

fn gather(root: &Path, folder: &Path, files: &mut Vec<(PathBuf, Vec<u8>)>) {
    let entries = std::fs::read_dir(folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    for entry in entries {
        let path = entry.expect("an entry of a folder").path();
        match path.is_dir() {
            true => gather(root, &path, files),
            false => {
                let name = path.strip_prefix(root).expect("a path in the folder").to_owned();
                files.push((name, std::fs::read(&path).expect("a file of the fixture")));
            }
        }
    }
}
