//! What every command needs: the store that it is about, and how that is opened.

use super::output::Output;
use crate::error::{Error, Result};
use crate::store::{DiskCacheOptions, OnWait, Snapshot, StorageOptions, Store, StoreOptions};

/// The commands that --at is for.
const READ_A_VERSION: [&str; 16] = [
    "models",
    "layers",
    "show",
    "compare",
    "forward",
    "generate",
    "perplexity",
    "attend",
    "search",
    "nearest",
    "shared",
    "copy",
    "evaluate",
    "export",
    "stats",
    "snapshot create",
];

/// What every command needs.
pub struct Context {
    pub store: String,
    pub at: Option<String>,
    pub verify_loads: bool,
    pub storage_options: StorageOptions,
    pub disk_cache: Option<DiskCacheOptions>,
    pub output: Output,
}

impl Context {
    /// Opens the store.
    pub async fn open(&self) -> Result<Store> {
        Store::open_with(&self.store, self.options()).await
    }

    /// Opens the store, also where its latest version is damaged.
    pub async fn open_for_repair(&self) -> Result<Store> {
        Store::open_for_repair(&self.store, self.options()).await
    }

    /// Opens the store, or makes an empty one.
    pub async fn create(&self) -> Result<Store> {
        Store::create_with(&self.store, self.options()).await
    }

    /// How the store is opened.
    pub fn options(&self) -> StoreOptions {
        let output = self.output;
        let on_wait = OnWait::new(move |what| output.note(format!("{what} (Ctrl-C gives up)")));
        StoreOptions {
            on_wait: Some(on_wait),
            verify_loads: self.verify_loads,
            storage_options: self.storage_options.clone(),
            disk_cache: self.disk_cache.clone(),
            ..StoreOptions::default()
        }
    }

    /// How a store beside the one at `--store` is opened: storage options are for both, where both are on S3.
    pub fn options_of(&self, store: &str) -> StoreOptions {
        match store.starts_with("s3://") {
            true => self.options(),
            false => StoreOptions { storage_options: StorageOptions::new(), ..self.options() },
        }
    }

    /// The version that a reading command reads.
    pub async fn snapshot(&self) -> Result<Snapshot> {
        self.snapshot_of(&self.open().await?).await
    }

    /// The same, for a command that runs a whole model, beside whose weights there should be little else in memory.
    pub async fn snapshot_to_run(&self) -> Result<Snapshot> {
        give_memory_back();
        self.snapshot().await
    }

    /// That of a store that is open.
    pub async fn snapshot_of(&self, store: &Store) -> Result<Snapshot> {
        match &self.at {
            Some(name) => store.at(name).await,
            // The one that opening the store has just found.
            None => Ok(store.seen()),
        }
    }

    /// Refuses --at for a command that it means nothing to.
    pub fn refuse_at(&self, command: &str) -> Result<()> {
        match &self.at {
            Some(at) => Err(Error::Usage {
                option: "--at".into(),
                found: format!("'{at}' with {command}"),
                expected: format!("a command that reads a version ({})", READ_A_VERSION.join(", ")),
            }),
            None => Ok(()),
        }
    }
}

/// Refuses a store in the memory of a process that ends with the command.
pub fn refuse_memory(option: &str, store: &str) -> Result<()> {
    match store.split_once("://") {
        Some((scheme, _)) if scheme.eq_ignore_ascii_case("memory") => Err(Error::Usage {
            option: option.into(),
            found: store.to_owned(),
            expected: "a directory or an object-store URI: a store in memory ends with the command".into(),
        }),
        _ => Ok(()),
    }
}

/// Has glibc give back at once what a command needs for a while only, such as what Lance reads of a table: it would keep it for later,
/// a tenth of a model's weights or more. Compressing, which needs much memory again and again, is slower so.
fn give_memory_back() {
    /// Bytes from which on a piece of memory is the kernel's again when it is freed.
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    const FROM: i32 = 512 << 10;
    // SAFETY: it sets a number of the allocator, under the allocator's own lock.
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, FROM)
    };
}
