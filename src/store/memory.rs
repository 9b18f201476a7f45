//! Stores in this process's memory, at `memory://NAME`.
//!
//! Lance makes a new and empty memory for every session that asks for one; here all stores opened under one name share
//! one, which lasts as long as one of them, or a handle from one of them, is there.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Mutex, PoisonError, Weak};

use lance_io::object_store::providers::memory::MemoryStoreProvider;
use lance_io::object_store::{ObjectStore, ObjectStoreParams, ObjectStoreProvider};
use object_store::memory::InMemory;
use object_store::path::Path;
use url::Url;

/// The stores that are open, by name.
static OPEN: LazyLock<Mutex<HashMap<String, Weak<Memory>>>> = LazyLock::new(Mutex::default);

/// The files of one store in memory, and the locks that a local store has in files.
#[derive(Debug, Default)]
pub struct Memory {
    files: Arc<InMemory>,
    /// Shared by imports, exclusive to gc.
    pub using: Arc<tokio::sync::RwLock<()>>,
    /// Held during one commit of the catalogue.
    pub committing: Arc<tokio::sync::Mutex<()>>,
    /// Held while indices are made.
    pub indexing: Arc<tokio::sync::Mutex<()>>,
}

impl Memory {
    /// Returns the memory of that name: the one in use, or an empty one.
    pub fn named(name: &str) -> Arc<Self> {
        // A map that another thread left in the middle of a change is still a map.
        let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(memory) = open.get(name).and_then(Weak::upgrade) {
            return memory;
        }
        open.retain(|_, memory| memory.strong_count() > 0);
        let memory = Arc::new(Memory::default());
        open.insert(name.to_owned(), Arc::downgrade(&memory));
        memory
    }

    /// Returns the files as an object store.
    pub fn files(&self) -> &Arc<InMemory> {
        &self.files
    }

    /// Returns what gives a Lance session these files for every `memory://` address.
    pub fn provider(&self) -> Arc<dyn ObjectStoreProvider> {
        Arc::new(Provider { files: self.files.clone() })
    }
}

#[derive(Debug)]
struct Provider {
    files: Arc<InMemory>,
}

#[async_trait::async_trait]
impl ObjectStoreProvider for Provider {
    async fn new_store(&self, base_path: Url, params: &ObjectStoreParams) -> lance::Result<ObjectStore> {
        let mut store = MemoryStoreProvider.new_store(base_path, params).await?;
        store.inner = self.files.clone();
        Ok(store)
    }

    fn extract_path(&self, url: &Url) -> lance::Result<Path> {
        MemoryStoreProvider.extract_path(url)
    }

    fn calculate_object_store_prefix(
        &self,
        url: &Url,
        storage_options: Option<&HashMap<String, String>>,
    ) -> lance::Result<String> {
        MemoryStoreProvider.calculate_object_store_prefix(url, storage_options)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_one_memory_while_it_is_held() {
        let first = Memory::named("a_name_is_one_memory");
        assert!(Arc::ptr_eq(&first, &Memory::named("a_name_is_one_memory")));
        assert!(!Arc::ptr_eq(&first, &Memory::named("another_name")));
        let files = Arc::downgrade(first.files());
        drop(first);
        assert!(files.upgrade().is_none());
    }
}
