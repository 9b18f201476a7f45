//! Rows of data files that lie on an object store, or in memory: all that a load reads of all of them is asked for at once, in ranges.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arrow::array::RecordBatch;
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream};
use lance_io::object_store::{ObjectStore as LanceStore, ObjectStoreParams};
use lru::LruCache;
use object_store::path::Path;
use object_store::{GetOptions, GetRange, ObjectStore};
use tokio::sync::OnceCell;

use super::data_file::Description;
use super::fetched::{Fetched, Missing, joined};
use super::{FileName, FileRows, open_files};
use crate::store::disk_cache::DiskCache;
use crate::store::location::Location;
use crate::store::waiting::unfinished;

/// Bytes fetched of a file's end at first: more than the descriptions of nearly all files.
const TAIL: u64 = 64 << 10;

/// Ranges that lie closer together are fetched as one: a request takes about as long as the transfer of so many bytes.
const GAP: u64 = 128 << 10;

/// The most bytes of one request, so that long ranges come by several connections.
const PART: u64 = 8 << 20;

/// Bytes fetched beside those where rows of any lengths are taken to be, before it is known where they lie.
const MARGIN: u64 = 256 << 10;

/// Requests at a time of one load.
const REQUESTS: usize = 16;

/// How often more is fetched of what a file says that is needed: its pages say where rows begin, and once is enough for that.
const ROUNDS: usize = 4;

/// The data files of a store that is not on the local file system.
#[derive(Debug)]
pub struct RemoteFiles {
    location: Location,
    files: OnceCell<(Arc<LanceStore>, Path)>,
    described: Mutex<LruCache<FileName, Arc<Description>>>,
    cache: Option<DiskCache>,
}

/// Whether what is read may come from the local disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum From {
    /// From the store itself, and the disk keeps nothing of it.
    Store,
    /// From the disk, where it has it, or else from the store; then the disk keeps it.
    Cache,
}

impl RemoteFiles {
    /// Returns the files of a store, of which the local disk keeps copies where a `cache` is given.
    pub fn new(location: Location, cache: Option<DiskCache>) -> Self {
        let described = Mutex::new(LruCache::new(open_files()));
        RemoteFiles { location, files: OnceCell::new(), described, cache }
    }

    /// Reads rows: a batch for each of `wanted`. `None` where a file is laid out in another way than is read here.
    ///
    /// # Errors
    /// When a file is not there, contradicts itself, or the storage refuses.
    pub async fn rows(self: &Arc<Self>, from: From, wanted: &[FileRows]) -> lance::Result<Option<Vec<RecordBatch>>> {
        let described = wanted.iter().map(|some| self.described(from, (some.table.clone(), some.file.clone())));
        let described = futures::future::try_join_all(described).await?;
        let Some(described) = described.into_iter().collect::<Option<Vec<_>>>() else { return Ok(None) };
        let mut ranges: BTreeMap<FileName, Vec<Range<u64>>> = BTreeMap::new();
        for (some, description) in wanted.iter().zip(&described) {
            let Some(needed) = description.wanted(MARGIN, &some.rows) else { return Ok(None) };
            ranges.entry((some.table.clone(), some.file.clone())).or_default().extend(needed);
        }
        let mut fetched: BTreeMap<FileName, Fetched> =
            ranges.keys().map(|file| (file.clone(), Fetched::default())).collect();
        for _ in 0..ROUNDS {
            self.fetch(from, &mut fetched, ranges).await?;
            let (wanted, described) = (wanted.to_vec(), described.clone());
            let assembled = tokio::task::spawn_blocking(move || {
                let read = wanted.iter().zip(&described).map(|(some, description)| {
                    let file = (some.table.clone(), some.file.clone());
                    (description.rows(&fetched[&file], &some.rows), file)
                });
                let read: Vec<_> = read.collect();
                (read, fetched)
            });
            let read;
            (read, fetched) = assembled.await.map_err(unfinished)?;
            let (mut batches, mut missing) = (vec![], BTreeMap::<FileName, Vec<Range<u64>>>::new());
            for (batch, file) in read {
                match batch {
                    Ok(Some(batch)) => batches.push(batch),
                    Ok(None) => return Ok(None),
                    Err(e) => match Missing::of(&e) {
                        Some(range) => missing.entry(file).or_default().push(range),
                        None => return Err(self.contradicts(&file, e)),
                    },
                }
            }
            if missing.is_empty() {
                return Ok(Some(batches));
            }
            ranges = missing;
        }
        Ok(None)
    }

    /// Reads the ends of files ahead of their first use. What cannot be read is found out then.
    pub async fn describe_ahead(&self, files: impl IntoIterator<Item = FileName>) {
        let most = open_files().get() / 2;
        let described = files.into_iter().take(most).map(|file| self.described(From::Cache, file));
        futures::future::join_all(described).await;
    }

    /// Returns whether the ends of files are known.
    pub fn are_described<'f>(&self, files: impl IntoIterator<Item = &'f FileName>) -> bool {
        let known = self.known();
        files.into_iter().all(|file| known.contains(file))
    }

    /// Forgets a file that has gone.
    pub fn forget(&self, file: &FileName) {
        self.known().pop(file);
    }

    fn known(&self) -> MutexGuard<'_, LruCache<FileName, Arc<Description>>> {
        // A map that another thread left in the middle of a change is still a map.
        self.described.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads the end of a file; `None` where it is laid out in another way than is read here.
    async fn described(&self, from: From, file: FileName) -> lance::Result<Option<Arc<Description>>> {
        let formats = self.location.formats();
        // Only the name of a file: what a path holds otherwise is encoded by the object store.
        let plain = |name: &str| !name.contains(['/', '\\']);
        let schema = formats.schema(&file.0, formats.newest().version);
        let Some(schema) = schema.filter(|_| plain(&file.0) && plain(&file.1)) else { return Ok(None) };
        if let Some(known) = self.known().get(&file) {
            return Ok(Some(known.clone()));
        }
        let (size, tail) = self.tail(from, &file).await?;
        let mut fetched = BTreeMap::from([(file.clone(), Fetched::default())]);
        fetched.values_mut().for_each(|pieces| pieces.add(size - tail.len() as u64, tail.clone()));
        for _ in 0..ROUNDS {
            match Description::read(&fetched[&file], size, &schema) {
                Ok(description) => {
                    let description = Arc::new(description);
                    self.known().put(file, description.clone());
                    return Ok(Some(description));
                }
                Err(e) if e.kind() == io::ErrorKind::Unsupported => return Ok(None),
                Err(e) => match Missing::of(&e) {
                    Some(range) => {
                        self.fetch(from, &mut fetched, BTreeMap::from([(file.clone(), vec![range])])).await?;
                    }
                    None => return Err(self.contradicts(&file, e)),
                },
            }
        }
        Ok(None)
    }

    /// Reads the last bytes of a file, and returns its size.
    async fn tail(&self, from: From, file: &FileName) -> lance::Result<(u64, Bytes)> {
        let key = format!("{}/{} tail", file.0, file.1);
        if let Some(kept) = self.kept(from, &key).await
            && let Some((size, tail)) = kept.split_first_chunk()
        {
            let tail = kept.slice_ref(tail);
            return Ok((u64::from_le_bytes(*size), tail));
        }
        let (store, path) = self.path(file).await?;
        let range = Some(GetRange::Suffix(TAIL));
        let found = store.inner.get_opts(&path, GetOptions { range, ..GetOptions::default() }).await?;
        let size = found.meta.size;
        let tail = found.bytes().await?;
        if tail.len() as u64 > size {
            return Err(lance::Error::corrupt_file_named("of the table", format!("{path} is longer than its size")));
        }
        self.keep(from, key, vec![Bytes::copy_from_slice(&size.to_le_bytes()), tail.clone()]).await;
        Ok((size, tail))
    }

    /// Fetches what files lack of some ranges.
    async fn fetch(
        &self,
        from: From,
        fetched: &mut BTreeMap<FileName, Fetched>,
        ranges: BTreeMap<FileName, Vec<Range<u64>>>,
    ) -> lance::Result<()> {
        let mut parts = vec![];
        for (file, ranges) in ranges {
            let Some(has) = fetched.get(&file) else { continue };
            // What lies between ranges is fetched with them, and may be there already.
            let together = joined(ranges.into_iter().flat_map(|range| has.lacking(range)).collect(), GAP, PART);
            let lacking: Vec<_> = together.into_iter().flat_map(|range| has.lacking(range)).collect();
            parts.extend(lacking.into_iter().map(|range| (file.clone(), range)));
        }
        let parts = stream::iter(parts.into_iter().map(|(file, range)| async move {
            let pieces = self.part(from, &file, range.clone()).await?;
            Ok::<_, lance::Error>((file, range.start, pieces))
        }));
        let mut parts = parts.buffer_unordered(REQUESTS);
        while let Some((file, mut at, pieces)) = parts.try_next().await? {
            let Some(has) = fetched.get_mut(&file) else { continue };
            for piece in pieces {
                let length = piece.len() as u64;
                has.add(at, piece);
                at += length;
            }
        }
        Ok(())
    }

    /// Fetches a range of a file, as it comes.
    async fn part(&self, from: From, file: &FileName, range: Range<u64>) -> lance::Result<Vec<Bytes>> {
        let key = format!("{}/{} {}-{}", file.0, file.1, range.start, range.end);
        if let Some(kept) = self.kept(from, &key).await {
            return Ok(vec![kept]);
        }
        let (store, path) = self.path(file).await?;
        let asked = Some(GetRange::Bounded(range.clone()));
        let found = store.inner.get_opts(&path, GetOptions { range: asked, ..GetOptions::default() }).await?;
        let pieces: Vec<Bytes> = found.into_stream().try_collect().await?;
        let length: u64 = pieces.iter().map(|piece| piece.len() as u64).sum();
        if length != range.end - range.start {
            let found = format!("{path} ends before byte {}: {length} bytes of {range:?}", range.end);
            return Err(lance::Error::corrupt_file_named("of the table", found));
        }
        self.keep(from, key, pieces.clone()).await;
        Ok(pieces)
    }

    /// Looks for what the disk keeps.
    async fn kept(&self, from: From, key: &str) -> Option<Bytes> {
        match (&self.cache, from) {
            (Some(cache), From::Cache) => cache.get(key).await,
            _ => None,
        }
    }

    /// Gives the disk something to keep.
    async fn keep(&self, from: From, key: String, pieces: Vec<Bytes>) {
        if let (Some(cache), From::Cache) = (&self.cache, from) {
            cache.put(key, pieces).await;
        }
    }

    async fn path(&self, (table, name): &FileName) -> lance::Result<(&Arc<LanceStore>, Path)> {
        let opened = async {
            let registry = self.location.session().store_registry();
            LanceStore::from_uri_and_params(registry, self.location.uri(), &ObjectStoreParams::default()).await
        };
        let (store, root) = self.files.get_or_try_init(|| opened).await?;
        Ok((store, root.clone().join(format!("{table}.lance")).join("data").join(name.as_str())))
    }

    fn contradicts(&self, (table, name): &FileName, e: io::Error) -> lance::Error {
        lance::Error::corrupt_file_named("of the table", format!("{}/data/{name}: {e}", self.location.table_uri(table)))
    }
}
