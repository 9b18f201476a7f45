//! Where a store lies, and how Lance is asked to read and write there.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use lance::Dataset;
use lance::dataset::builder::DatasetBuilder;
use lance::dataset::{WriteMode, WriteParams};
use lance::session::Session;
use lance_io::object_store::{ObjectStore as LanceStore, ObjectStoreParams, ObjectStoreRegistry, WrappingObjectStore};
use object_store::path::Path as ObjectPath;
use tokio::sync::Mutex;

use super::address;
use super::durable::Durable;
use super::format::{Format, Formats};
use super::layout::{VERSIONS, version_of};
use super::limits::Limits;
use super::newest;
use super::on_wait::OnWait;
use super::place::{Place, S3, SCHEMES, bucket, elsewhere, local};
use super::s3::StorageOptions;
use super::strict::Exactly;
use super::synced;
use super::testing::Hooks;
use super::waiting::{Waiting, caught, detail, is_gone};
use crate::error::{Error, Result};

/// Lance's own caches default to 7 GiB; a store that serves layers keeps its memory for layers.
const INDEX_CACHE_BYTES: usize = 16 << 20;
const METADATA_CACHE_BYTES: usize = 64 << 20;

/// Reads that are made again where files have gone, on an object store.
const READS: u32 = 4;

/// A store's address and the settings that every table of it shares.
#[derive(Clone)]
pub struct Location {
    uri: String,
    place: Place,
    /// The symbolic link that the address is, if it is one.
    link: Option<PathBuf>,
    session: Arc<Session>,
    /// Replaces the storage that is written to.
    storage: Option<Arc<dyn WrappingObjectStore>>,
    formats: &'static Formats,
    limits: Limits,
    on_wait: Option<OnWait>,
    options: StorageOptions,
    /// How long a process that gives no sign of life is taken for alive.
    lease_life: Duration,
    own_files: Arc<Mutex<Option<OwnFiles>>>,
}

/// Files of a store that are reached by connections of their own.
#[derive(Debug, Clone)]
struct OwnFiles {
    /// The process that has the connections.
    process: u32,
    files: Arc<LanceStore>,
    root: ObjectPath,
}

impl std::fmt::Debug for Location {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Location").field("uri", &self.uri).field("place", &self.place).finish_non_exhaustive()
    }
}

impl Location {
    /// Returns the location at a local path or an object-store URI, whose storage is reached by these options. `hooks` replaces the
    /// storage that is written to, and the formats that are known.
    ///
    /// # Errors
    /// When nothing can lie at such an address, a file lies there, or the options are not of its storage.
    pub fn new(uri: &str, hooks: &Hooks, options: &StorageOptions) -> Result<Self> {
        let scheme = uri.split_once(':').map(|(scheme, rest)| (scheme.to_ascii_lowercase(), rest));
        let scheme = scheme.as_ref().map(|(scheme, rest)| (scheme.as_str(), *rest));
        let (uri, place, link) = match scheme {
            Some(("file", _)) => local(uri, address::of_file_url(uri)?)?,
            Some((scheme, rest)) if rest.starts_with("//") => {
                (format!("{scheme}:{}", rest.trim_end_matches('/')), elsewhere(scheme, &rest[2..])?, None)
            }
            Some((scheme, rest)) if SCHEMES.contains(&scheme) => {
                let reason =
                    format!("expected {scheme}://{}, or ./{uri} for a directory", rest.trim_start_matches('/'));
                return Err(Error::NotAStore { path: uri.into(), reason });
            }
            _ => local(uri, address::with_home(uri)?)?,
        };
        let registry = registry(&uri, options)?;
        if let Place::Memory(memory) = &place {
            registry.insert("memory", memory.provider());
        }
        if !uri.starts_with(S3) && !options.is_empty() {
            return Err(Error::expected(format!("storage options of {uri}"), options, "none: they are for s3://"));
        }
        let mut storage = hooks.storage.clone();
        if let Place::Local(_) = place {
            // One for the location: Lance shares connections by the wrapper's identity.
            let files = Arc::new(Durable::new());
            registry.insert("file", files.clone());
            storage = storage.or(Some(files));
        }
        let session = Arc::new(Session::new(INDEX_CACHE_BYTES, METADATA_CACHE_BYTES, Arc::new(registry)));
        Ok(Location {
            uri,
            place,
            link,
            session,
            storage,
            formats: hooks.formats,
            limits: hooks.limits,
            on_wait: None,
            options: options.clone(),
            lease_life: hooks.lease_life,
            own_files: Arc::default(),
        })
    }

    /// Returns the location with what is told of a lock that is waited for.
    pub fn with_on_wait(self, on_wait: Option<OnWait>) -> Self {
        Location { on_wait, ..self }
    }

    /// Returns what is told of a lock that is waited for.
    pub fn on_wait(&self) -> Option<&OnWait> {
        self.on_wait.as_ref()
    }

    /// Returns the address: an absolute path, or a URI.
    pub fn uri(&self) -> &str {
        &self.uri
    }

    /// Returns the symbolic link that the address was given as, if it was one.
    pub fn link(&self) -> Option<&Path> {
        self.link.as_deref()
    }

    /// Returns where the files lie.
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// Returns the directory of a store on the local file system.
    pub fn local(&self) -> Option<&Path> {
        match &self.place {
            Place::Local(path) => Some(path),
            Place::Memory(_) | Place::Remote => None,
        }
    }

    /// Returns Lance's session, whose caches all tables share.
    pub fn session(&self) -> &Arc<Session> {
        &self.session
    }

    /// Returns how long a process that gives no sign of life is taken for alive, on an object store.
    pub fn lease_life(&self) -> Duration {
        self.lease_life
    }

    /// Returns the files of an object store, by connections that no table is read or written by, and the store's place among them.
    pub async fn own_files(&self) -> lance::Result<(Arc<LanceStore>, ObjectPath)> {
        let mut own = self.own_files.lock().await;
        let process = std::process::id();
        if let Some(own) = own.as_ref().filter(|own| own.process == process) {
            return Ok((own.files.clone(), own.root.clone()));
        }
        let registry = registry(&self.uri, &self.options).map_err(|e| lance::Error::io(e.to_string()))?;
        let params = ObjectStoreParams::default();
        let (files, root) = LanceStore::from_uri_and_params(Arc::new(registry), &self.uri, &params).await?;
        *own = Some(OwnFiles { process, files: files.clone(), root: root.clone() });
        Ok((files, root))
    }

    /// Returns the format versions that can be read here.
    pub fn formats(&self) -> &'static Formats {
        self.formats
    }

    /// Returns the sizes at which tables are kept up.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Returns the format version that the store's catalogue names.
    ///
    /// # Errors
    /// As [`Formats::of`].
    pub fn format_of(&self, catalogue: &Dataset) -> Result<&'static Format> {
        self.formats.of(&self.uri, catalogue)
    }

    /// Returns the address that a table is read by.
    pub fn table_uri(&self, table: &str) -> String {
        format!("{}/{table}.lance", self.uri)
    }

    /// Returns the address that a table is written by: for local stores one that sends every byte through [`Durable`].
    fn write_uri(&self, table: &str) -> String {
        match &self.place {
            // At a plain path, tests could not replace what is written to.
            Place::Local(path) => {
                let table = path.join(format!("{table}.lance"));
                // As a URL, since a path may hold '#', '?' or '%'. An absolute path always makes one.
                let url = url::Url::from_file_path(&table)
                    .map_or_else(|()| table.display().to_string(), |u| u.path().to_owned());
                format!("file-object-store://{url}")
            }
            Place::Memory(_) | Place::Remote => self.table_uri(table),
        }
    }

    /// Returns the number of the last version of a table that was committed, as the hint beside its manifests says, on the local file
    /// system. The hint may be missing, or older than the latest version.
    pub fn last_committed(&self, table: &str) -> Option<u64> {
        newest::hinted(&self.manifests(table)?)
    }

    /// Returns the folder of a table's manifests, on the local file system.
    fn manifests(&self, table: &str) -> Option<PathBuf> {
        Some(self.local()?.join(format!("{table}.lance")).join(VERSIONS))
    }

    /// Returns the number of a table's newest version, where that can be told without listing its manifests.
    pub fn newest(&self, table: &str) -> Option<u64> {
        newest::newest(&self.manifests(table)?)
    }

    fn store_params(&self) -> ObjectStoreParams {
        ObjectStoreParams { object_store_wrapper: self.storage.clone(), ..ObjectStoreParams::default() }
    }

    /// Opens a table for reading, at `version` or the latest.
    pub async fn open_table(&self, table: &str, version: Option<u64>) -> lance::Result<Dataset> {
        let mut moves = Moves::of(self);
        let open = |version: Option<u64>| {
            let builder = DatasetBuilder::from_uri(self.table_uri(table)).with_session(self.session.clone());
            checked(at(builder, version).load())
        };
        if version.is_none()
            && let Some(newest) = self.newest(table)
            && let Ok(dataset) = open(Some(newest)).await
        {
            return Ok(dataset);
        }
        loop {
            match open(version).await {
                Err(e) if version.is_none() && is_gone(&e) && moves.again() => {}
                opened => return opened.map_err(|e| self.named(table, version, e)),
            }
        }
    }

    /// Opens a table's latest version for writing: what is written through it is on disk before it is referred to, and so is what is
    /// there already, which somebody may have begun who was killed.
    pub async fn open_for_write(&self, table: &str) -> lance::Result<Dataset> {
        // Lance goes by the hint beside the manifests where it writes, and would commit behind an older version than the newest.
        let listed = self.manifests(table).and_then(|folder| newest::listed(&folder));
        self.open_for_write_at(table, listed).await
    }

    /// Opens a version for writing as [`Location::open_for_write`] does, or the latest.
    pub async fn open_for_write_at(&self, table: &str, version: Option<u64>) -> lance::Result<Dataset> {
        synced::tables(self.local(), [table.to_owned()]).await.map_err(|e| lance::Error::io(e.to_string()))?;
        let builder = DatasetBuilder::from_uri(self.write_uri(table))
            .with_session(self.session.clone())
            .with_store_params(self.store_params());
        checked(at(builder, version).load()).await.map_err(|e| self.named(table, version, e))
    }

    /// The error of a table that could not be opened, with the name of the manifest where that can be read and is not what was
    /// written.
    fn named(&self, table: &str, version: Option<u64>, e: lance::Error) -> lance::Error {
        use lance::Error as E;
        if matches!(e, E::DatasetNotFound { .. } | E::VersionNotFound { .. } | E::NotSupported { .. }) {
            return e;
        }
        let Some(folder) = self.manifests(table) else { return e };
        let files = std::fs::read_dir(&folder)
            .into_iter()
            .flatten()
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let manifests = files.filter_map(|file| Some((version_of(&file)?, file)));
        let opened = match version {
            Some(version) => manifests.into_iter().find(|(found, _)| *found == version),
            None => manifests.max(),
        };
        match opened.map(|(_, file)| folder.join(file)) {
            // What cannot be read at all is the system's error, which says so.
            Some(path) if std::fs::read(&path).is_ok() => {
                lance::Error::corrupt_file_named("of the table", format!("{}: {}", path.display(), detail(&e)))
            }
            _ => e,
        }
    }

    /// Returns the address of a table to be made, and the parameters to make it with.
    pub fn create_params(&self, table: &str) -> (String, WriteParams) {
        let params = WriteParams {
            mode: WriteMode::Create,
            // Where another has made the table meanwhile, Lance would take this for an overwrite of it.
            commit_handler: Some(Arc::new(Exactly(1))),
            session: Some(self.session.clone()),
            store_params: Some(self.store_params()),
            ..WriteParams::default()
        };
        (self.write_uri(table), params)
    }
}

/// Reads that are made again, since gc may have moved rows meanwhile and taken their files away. On the local file system a file that is
/// open stays.
#[derive(Debug)]
pub struct Moves {
    left: u32,
}

impl Moves {
    /// Returns how often a store's reads are made again.
    pub fn of(location: &Location) -> Self {
        Moves { left: if matches!(location.place, Place::Remote) { READS } else { 0 } }
    }

    /// Returns whether to read again.
    pub fn again(&mut self) -> bool {
        let again = self.left > 0;
        self.left = self.left.saturating_sub(1);
        again
    }
}

/// Tries whether a store could be made, or written to, at an address, before the work that goes there. Nothing is made.
///
/// # Errors
/// When nothing can lie at such an address, or its directory cannot be written to.
pub(crate) fn check_place(uri: &str, options: &StorageOptions) -> Result<()> {
    let location = Location::new(uri, &Hooks::default(), options)?;
    location.local().map_or(Ok(()), address::check_writable)
}

/// The storages that tables may lie on, with this bucket where an address is on S3.
fn registry(uri: &str, options: &StorageOptions) -> Result<ObjectStoreRegistry> {
    let registry = ObjectStoreRegistry::default();
    if uri.starts_with(S3) {
        registry.insert("s3", Arc::new(bucket(uri, options)?));
    }
    Ok(registry)
}

/// A table at a version, or the one that Lance finds to be the newest.
fn at(builder: DatasetBuilder, version: Option<u64>) -> DatasetBuilder {
    match version {
        Some(version) => builder.with_version(version),
        None => builder,
    }
}

/// Opens a table, and looks at the types of its columns, which the manifest holds as text that Lance believes.
async fn checked(opening: impl Future<Output = lance::Result<Dataset>> + Send) -> lance::Result<Dataset> {
    let dataset = opening.caught().await?;
    caught(|| {
        dataset.schema().fields_pre_order().for_each(|field| _ = field.data_type());
        Ok(())
    })?;
    Ok(dataset)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::place::OBJECT_STORES;

    #[test]
    fn versions_of_manifests() {
        assert_eq!(version_of("18446744073709551614.manifest"), Some(1));
        assert_eq!(version_of("7.manifest"), Some(7));
        assert_eq!(version_of("d7.manifest"), None);
        assert_eq!(version_of("latest_version_hint.json"), None);
    }

    #[test]
    fn one_directory_has_one_address() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().canonicalize().unwrap();
        let at = |uri: &str| {
            let location = Location::new(uri, &Hooks::default(), &StorageOptions::new()).unwrap();
            assert_eq!(location.local().unwrap(), Path::new(location.uri()), "tables and locks are in one place");
            location.uri().to_owned()
        };
        let expected = root.join("a b").display().to_string();
        let path = root.display();
        for uri in [
            format!("{path}/a b"),
            format!("{path}//x/.././a b/"),
            format!("file://{path}/a%20b"),
            format!("file:{path}/a b/"),
            format!("FILE://localhost{path}/a%20b"),
        ] {
            assert_eq!(at(&uri), expected, "{uri}");
        }
        #[cfg(unix)]
        {
            std::fs::create_dir_all(root.join("real/deep")).unwrap();
            std::os::unix::fs::symlink("real/deep", root.join("link")).unwrap();
            assert_eq!(at(&format!("{path}/link/../st")), root.join("real/st").display().to_string());
            assert_eq!(at(&format!("{path}/link")), root.join("real/deep").display().to_string());
        }
    }

    fn keys() -> StorageOptions {
        StorageOptions::new().with("access_key_id", "id").with("secret_access_key", "hidden")
    }

    #[test]
    fn addresses_that_no_store_lies_at() {
        let tab = "a\tb";
        for bad in ["", "ftp://a", "s3://", "memory://", "memory:///a", "file://", "file:a", "file://host/a", tab] {
            let error = Location::new(bad, &Hooks::default(), &StorageOptions::new()).unwrap_err();
            assert!(matches!(error, Error::NotAStore { .. }), "{bad}: {error}");
        }
        for bad in ["s3://bucket/a ", "s3://bucket/a\tb", "memory://a "] {
            let error = Location::new(bad, &Hooks::default(), &keys()).unwrap_err();
            assert!(error.to_string().contains("space at its end"), "{bad}: {error}");
        }
        for bad in ["s3://bucket//a", "s3://bucket/a//b//", "gs://bucket//a"] {
            let error = Location::new(bad, &Hooks::default(), &keys()).unwrap_err();
            assert!(error.to_string().contains("one '/' between"), "{bad}: {error}");
        }
        for bad in ["s3://My Bucket/x", "memory://my name", "s3:///a"] {
            let error = Location::new(bad, &Hooks::default(), &keys()).unwrap_err();
            assert!(error.to_string().contains("letters, digits"), "{bad}: {error}");
        }
        for bad in ["s3:/bucket", "memory:a", "file:///a?b", "file:///a#b", "file:///a%00", "~nobody/s"] {
            let error = Location::new(bad, &Hooks::default(), &StorageOptions::new()).unwrap_err();
            assert!(matches!(error, Error::NotAStore { .. }), "{bad}: {error}");
        }
        let place = |uri: &str| Location::new(uri, &Hooks::default(), &StorageOptions::new()).unwrap().place().clone();
        assert!(matches!(place("memory://addresses/sub"), Place::Memory(_)));
        for (scheme, feature, built) in OBJECT_STORES {
            match Location::new(&format!("{scheme}://bucket/models"), &Hooks::default(), &StorageOptions::new()) {
                Ok(location) => assert!(built && matches!(location.place(), Place::Remote)),
                Err(error) => {
                    assert!(!built && matches!(error, Error::NotAStore { .. }), "{error}");
                    assert!(error.to_string().contains(&format!("--features {feature}")), "{error}");
                }
            }
        }
        assert!(matches!(place("models"), Place::Local(path) if path.is_absolute()));
        let keys = keys();
        let on_s3 = |uri: &str, options: &StorageOptions| Location::new(uri, &Hooks::default(), options);
        assert!(matches!(on_s3("s3://bucket/models/", &keys).unwrap().place(), Place::Remote));
        assert_eq!(on_s3("S3://bucket/Models//", &keys).unwrap().uri(), "s3://bucket/Models");
        let escaped = on_s3("s3://bucket/my%20models", &keys).unwrap_err().to_string();
        assert!(escaped.contains("'%'") && escaped.contains("without escapes"), "{escaped}");
        for bad in ["s3://id:hidden@bucket/a", "s3://bucket/a?key=hidden", "s3://bucket/a#hidden"] {
            let error = on_s3(bad, &keys).unwrap_err().to_string();
            assert!(!error.contains("hidden") && error.contains("s3://BUCKET/PREFIX"), "{error}");
        }
        let unknown = on_s3("s3://bucket/a", &keys.clone().with("acces_key", "hidden")).unwrap_err().to_string();
        assert!(unknown.contains("\"acces_key\"") && !unknown.contains("hidden"), "{unknown}");
        let local = on_s3("models", &keys).unwrap_err().to_string();
        assert!(local.contains("access_key_id") && !local.contains("hidden"), "{local}");
    }
}
