//! The local file system as Lance sees it: what is written is on disk before it is referred to, and what is read lies within its
//! file.
//!
//! Lance and object_store leave syncing out by default, and a power cut could then lose what a commit refers to. Lance asks for
//! memory by what stands in a file's end, and by offsets in its pages: a flipped bit there could call for more than the machine has,
//! which ends the process. So the end of every data file is looked at before Lance reads the file, and a range that leads out of a
//! file is an error before anything is read.

use std::cmp::Reverse;
use std::collections::{BTreeSet, BinaryHeap};
use std::fs::File;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use chrono::{DateTime, Utc};
use futures::stream::{self, BoxStream};
use futures::{StreamExt, TryStreamExt};
use lance_io::object_store::providers::local::FileStoreProvider;
use lance_io::object_store::{ObjectStore as LanceStore, ObjectStoreParams, ObjectStoreProvider, WrappingObjectStore};
use lru::LruCache;
use object_store::list::PaginatedListStore;
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetRange, GetResult, GetResultPayload, ListResult, MultipartUpload, ObjectMeta,
    ObjectStore, ObjectStoreExt, PutMultipartOptions, PutOptions, PutPayload, PutResult, RenameOptions,
};
use url::Url;

use super::layout::{VERSIONS, is_staged};
use super::reader::end;
use super::reader::source::read_exact_at;
use super::synced;

/// Files whose ends are known to be sound: those of large stores.
const KNOWN_FILES: NonZeroUsize = NonZeroUsize::new(1 << 14).expect("not 0");

/// Files that are deleted before their folders are synced.
const DELETED_AT_ONCE: usize = 256;

/// What Lance calls this file system: by another name than its own, which it would read past it.
const PREFIX: &str = "file$layerstore";

/// The local file system, for Lance to read and write. Cloning shares what is known of its files.
#[derive(Debug, Clone)]
pub struct Durable(Arc<Checked>);

impl Durable {
    /// Returns one for the whole file system.
    pub fn new() -> Self {
        let files = LocalFileSystem::new().with_fsync(true);
        Durable(Arc::new(Checked { files, sound: Mutex::new(LruCache::new(KNOWN_FILES)) }))
    }
}

/// For what is written, at `file-object-store://` addresses.
impl WrappingObjectStore for Durable {
    fn wrap(&self, _prefix: &str, _original: Arc<dyn ObjectStore>) -> Arc<dyn ObjectStore> {
        self.0.clone()
    }

    fn wrap_paginated(
        &self,
        _prefix: &str,
        _original: Arc<dyn PaginatedListStore>,
    ) -> Option<Arc<dyn PaginatedListStore>> {
        None
    }
}

/// For what is read, at plain paths.
#[async_trait::async_trait]
impl ObjectStoreProvider for Durable {
    async fn new_store(&self, base_path: Url, params: &ObjectStoreParams) -> lance::Result<LanceStore> {
        let mut store = FileStoreProvider.new_store(base_path, params).await?;
        store.inner = self.0.clone();
        store.store_prefix = PREFIX.into();
        // As it is here: the latest version is then the first manifest that is there, whatever the hint beside them says.
        store.list_is_lexically_ordered = true;
        Ok(store)
    }

    fn extract_path(&self, url: &Url) -> lance::Result<Path> {
        FileStoreProvider.extract_path(url)
    }

    fn calculate_object_store_prefix(
        &self,
        _url: &Url,
        _storage_options: Option<&std::collections::HashMap<String, String>>,
    ) -> lance::Result<String> {
        Ok(PREFIX.into())
    }
}

#[derive(Debug)]
struct Checked {
    files: LocalFileSystem,
    /// Data files whose ends were looked at, with their sizes and times.
    sound: Mutex<LruCache<Path, (u64, DateTime<Utc>)>>,
}

/// Whether a file is one of Lance's format: of a table's rows, or of an index.
fn is_lance_file(location: &Path) -> bool {
    let named = |end: &str| location.as_ref().ends_with(end);
    let is_in = |folder: &str| location.parts().any(|part| part.as_ref() == folder);
    (named(".lance") || named(".idx")) && (is_in("data") || is_in("_indices"))
}

/// The error of a file that is not what was written, or cannot be read.
fn failed(path: &std::path::Path, e: std::io::Error) -> object_store::Error {
    use std::io::ErrorKind::{InvalidData, UnexpectedEof};
    let source: Box<dyn std::error::Error + Send + Sync> = match e.kind() {
        InvalidData | UnexpectedEof => {
            Box::new(lance::Error::corrupt_file_named("of the table", format!("{}: {e}", path.display())))
        }
        _ => Box::new(e),
    };
    object_store::Error::Generic { store: "LocalFileSystem", source }
}

impl Checked {
    fn known(&self, meta: &ObjectMeta) -> bool {
        // A map that another thread left in the middle of a change is still a map.
        let mut sound = self.sound.lock().unwrap_or_else(PoisonError::into_inner);
        sound.get(&meta.location) == Some(&(meta.size, meta.last_modified))
    }

    /// Reads a range of a file, whose end is looked at first where it is one of Lance's and not known to be sound.
    async fn read(
        &self,
        (file, path): (File, PathBuf),
        meta: &ObjectMeta,
        range: Range<u64>,
    ) -> object_store::Result<bytes::Bytes> {
        let (size, check) = (meta.size, is_lance_file(&meta.location) && !self.known(meta));
        let read = tokio::task::spawn_blocking(move || {
            let read = || {
                if check {
                    end::check(&file, size)?;
                }
                let length = usize::try_from(range.end.saturating_sub(range.start)).map_err(std::io::Error::other)?;
                let mut bytes = vec![0; length];
                read_exact_at(&file, &mut bytes, range.start)?;
                Ok(bytes.into())
            };
            read().map_err(|e| failed(&path, e))
        });
        let bytes = read.await.map_err(object_store::Error::from)??;
        if check {
            let mut sound = self.sound.lock().unwrap_or_else(PoisonError::into_inner);
            sound.put(meta.location.clone(), (meta.size, meta.last_modified));
        }
        Ok(bytes)
    }
}

/// Lists a folder of manifests by their names, the newest first. Size and time of a file are looked up when the stream comes to it: who
/// wants the latest version takes the first, of however many.
fn manifests(files: LocalFileSystem, folder: Path) -> BoxStream<'static, object_store::Result<ObjectMeta>> {
    let named = async move {
        let at = files.path_to_filesystem(&folder)?;
        let read = move || {
            let mut names = vec![];
            let entries = match std::fs::read_dir(&at) {
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(names),
                entries => entries.map_err(|e| failed(&at, e))?,
            };
            for entry in entries {
                names.extend(entry.map_err(|e| failed(&at, e))?.file_name().into_string().ok().map(Reverse));
            }
            Ok::<_, object_store::Error>(names)
        };
        let names = tokio::task::spawn_blocking(read).await.map_err(object_store::Error::from).flatten()?;
        // A heap gives the first without sorting all.
        let mut names = BinaryHeap::from(names);
        let names = std::iter::from_fn(move || names.pop()).map(|Reverse(name)| name).filter(|name| !is_staged(name));
        let found = stream::iter(names).then(move |name| {
            let (files, path) = (files.clone(), folder.clone().join(name));
            async move { files.head(&path).await }
        });
        // What was removed meanwhile, and what is no file.
        Ok::<_, object_store::Error>(
            found.filter(|found| std::future::ready(!matches!(found, Err(object_store::Error::NotFound { .. })))),
        )
    };
    stream::once(named).try_flatten().boxed()
}

/// Syncs the folders of files that were deleted, and returns these.
async fn lasting(
    files: LocalFileSystem,
    deleted: Vec<object_store::Result<Path>>,
) -> BoxStream<'static, object_store::Result<Path>> {
    let paths = deleted.iter().flatten().filter_map(|path| files.path_to_filesystem(path).ok());
    let folders: BTreeSet<PathBuf> = paths.filter_map(|path| path.parent().map(ToOwned::to_owned)).collect();
    let sync = move || folders.iter().try_for_each(|folder| synced::directory(folder).map_err(|e| failed(folder, e)));
    match tokio::task::spawn_blocking(sync).await.map_err(object_store::Error::from).flatten() {
        Ok(()) => stream::iter(deleted).boxed(),
        Err(e) => stream::iter([Err(e)]).boxed(),
    }
}

impl std::fmt::Display for Checked {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.files.fmt(f)
    }
}

#[async_trait::async_trait]
impl ObjectStore for Checked {
    async fn get_opts(&self, location: &Path, mut options: GetOptions) -> object_store::Result<GetResult> {
        let whole = options.range.is_none() && !options.head && is_lance_file(location);
        let range = options.range.take_if(|range| matches!(range, GetRange::Bounded(_)));
        if range.is_none() && !whole {
            return self.files.get_opts(location, options).await;
        }
        let GetResult { payload, meta, attributes, extensions, .. } = self.files.get_opts(location, options).await?;
        let range = match range {
            Some(GetRange::Bounded(range)) => range,
            _ => 0..meta.size,
        };
        let payload = match payload {
            GetResultPayload::File(_, path) if range.end > meta.size => {
                let found = format!("it has {} bytes, where those up to {} are called for", meta.size, range.end);
                return Err(failed(&path, std::io::Error::new(std::io::ErrorKind::InvalidData, found)));
            }
            GetResultPayload::File(file, path) => {
                let bytes = self.read((file, path), &meta, range.clone()).await?;
                GetResultPayload::Stream(stream::once(std::future::ready(Ok(bytes))).boxed())
            }
            streamed @ GetResultPayload::Stream(_) => streamed,
        };
        Ok(GetResult { payload, meta, range, attributes, extensions })
    }

    async fn get_ranges(&self, location: &Path, ranges: &[Range<u64>]) -> object_store::Result<Vec<bytes::Bytes>> {
        let mut read = Vec::with_capacity(ranges.len());
        for range in ranges {
            let options = GetOptions { range: Some(GetRange::Bounded(range.clone())), ..GetOptions::default() };
            read.push(self.get_opts(location, options).await?.bytes().await?);
        }
        Ok(read)
    }

    /// In the order of their names.
    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, object_store::Result<ObjectMeta>> {
        if let Some(folder) = prefix.filter(|folder| folder.filename() == Some(VERSIONS)) {
            return manifests(self.files.clone(), folder.clone());
        }
        let listing = self.files.list(prefix);
        let sorted = async move {
            let mut all: Vec<ObjectMeta> = listing.try_collect().await?;
            all.sort_by(|a, b| a.location.cmp(&b.location));
            Ok::<_, object_store::Error>(stream::iter(all.into_iter().map(Ok)))
        };
        stream::once(sorted).try_flatten().boxed()
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> object_store::Result<ListResult> {
        self.files.list_with_delimiter(prefix).await
    }

    async fn put_opts(&self, to: &Path, bytes: PutPayload, options: PutOptions) -> object_store::Result<PutResult> {
        self.files.put_opts(to, bytes, options).await
    }

    async fn put_multipart_opts(
        &self,
        to: &Path,
        options: PutMultipartOptions,
    ) -> object_store::Result<Box<dyn MultipartUpload>> {
        self.files.put_multipart_opts(to, options).await
    }

    fn delete_stream(
        &self,
        locations: BoxStream<'static, object_store::Result<Path>>,
    ) -> BoxStream<'static, object_store::Result<Path>> {
        let files = self.files.clone();
        // What was deleted may not come back: each folder is synced behind a batch of its files.
        self.files
            .delete_stream(locations)
            .ready_chunks(DELETED_AT_ONCE)
            .then(move |deleted| lasting(files.clone(), deleted))
            .flatten()
            .boxed()
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> object_store::Result<()> {
        self.files.copy_opts(from, to, options).await
    }

    async fn rename_opts(&self, from: &Path, to: &Path, options: RenameOptions) -> object_store::Result<()> {
        self.files.rename_opts(from, to, options).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// No memory is asked for where a range leads out of its file, and the error says which file it is.
    #[tokio::test]
    async fn reads_stay_within_their_files() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| Path::from_absolute_path(folder.path().join(name)).unwrap();
        let files = Durable::new().0;
        files.put(&at("t.lance/_versions/1.manifest"), vec![5; 100].into()).await.unwrap();
        files.put(&at("t.lance/data/a.lance"), vec![5; 100].into()).await.unwrap();
        let manifest = at("t.lance/_versions/1.manifest");
        assert_eq!(files.get_range(&manifest, 90..100).await.unwrap(), vec![5; 10]);
        assert_eq!(files.get_ranges(&manifest, &[1..3, 90..100]).await.unwrap()[1].len(), 10);
        assert_eq!(files.get(&manifest).await.unwrap().bytes().await.unwrap().len(), 100);
        for range in [90..101, 0..1 << 45] {
            let error = files.get_range(&manifest, range).await.unwrap_err();
            let source = std::error::Error::source(&error).unwrap().downcast_ref::<lance::Error>();
            assert!(matches!(source, Some(lance::Error::CorruptFile { .. })), "{error}");
        }
        // The head of a data file says nothing of its end; any byte does.
        assert_eq!(files.head(&at("t.lance/data/a.lance")).await.unwrap().size, 100);
        let error = files.get_range(&at("t.lance/data/a.lance"), 0..1).await.unwrap_err();
        assert!(error.to_string().contains("t.lance/data/a.lance: the file contradicts itself"), "{error}");
        assert!(files.get(&at("t.lance/data/a.lance")).await.is_err());
    }

    /// Of manifests, only those that are asked for are looked at.
    #[tokio::test]
    async fn manifests_are_listed_as_they_are_asked_for() {
        let folder = tempfile::tempdir().unwrap();
        let under = folder.path().join("t.lance/_versions");
        std::fs::create_dir_all(&under).unwrap();
        let files = Durable::new().0;
        let at = Path::from_absolute_path(&under).unwrap();
        assert_eq!(files.list(Some(&at)).count().await, 0);
        for name in ["3.manifest", "1.manifest", "2.manifest", "4.manifest#1"] {
            std::fs::write(under.join(name), name).unwrap();
        }
        let names = async || -> Vec<String> {
            let all: Vec<ObjectMeta> = files.list(Some(&at)).try_collect().await.unwrap();
            all.iter().map(|meta| meta.location.filename().unwrap().to_owned()).collect()
        };
        assert_eq!(names().await, ["1.manifest", "2.manifest", "3.manifest"]);
        let mut listed = files.list(Some(&at));
        assert_eq!(listed.next().await.unwrap().unwrap().size, 10);
        std::fs::remove_file(under.join("2.manifest")).unwrap();
        assert_eq!(listed.next().await.unwrap().unwrap().location.filename(), Some("3.manifest"));
        assert_eq!(files.list(Some(&at.join("none"))).count().await, 0);
    }

    #[tokio::test]
    async fn names_are_listed_in_their_order() {
        let folder = tempfile::tempdir().unwrap();
        let files = Durable::new().0;
        for name in ["b", "c", "a", "ab"] {
            files.put(&Path::from_absolute_path(folder.path().join(name)).unwrap(), "x".into()).await.unwrap();
        }
        let under = Path::from_absolute_path(folder.path()).unwrap();
        let names: Vec<ObjectMeta> = files.list(Some(&under)).try_collect().await.unwrap();
        let names: Vec<_> = names.iter().filter_map(|meta| meta.location.filename()).collect();
        assert_eq!(names, ["a", "ab", "b", "c"]);
    }
}
