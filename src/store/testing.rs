//! What the tests replace of a store. No part of the public interface: it changes without notice.

use std::sync::Arc;
use std::time::Duration;

use lance_io::object_store::WrappingObjectStore;
use object_store::ObjectStore;
use object_store::list::PaginatedListStore;

use super::format::{FORMATS, Formats};
use super::limits::Limits;

/// How long a process that gives no sign of life is taken for alive, on an object store.
const LEASE_LIFE: Duration = Duration::from_secs(60);

/// What is replaced of a store; nothing by default.
#[derive(Clone)]
pub struct Hooks {
    pub(super) storage: Option<Arc<dyn WrappingObjectStore>>,
    pub(super) formats: &'static Formats,
    pub(super) limits: Limits,
    /// How long a process that gives no sign of life is taken for alive, on an object store.
    pub(super) lease_life: Duration,
}

impl Default for Hooks {
    fn default() -> Self {
        Hooks { storage: None, formats: &FORMATS, limits: Limits::DEFAULT, lease_life: LEASE_LIFE }
    }
}

impl std::fmt::Debug for Hooks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Hooks").field("storage", &self.storage).finish_non_exhaustive()
    }
}

impl Hooks {
    /// Returns hooks that send what is written through `files`, such as one that fails, in place of the storage at the
    /// store's address. Paths are those of the whole file system.
    pub fn writing_to(files: Arc<dyn ObjectStore>) -> Self {
        Hooks { storage: Some(Arc::new(Replaced(files))), ..Hooks::default() }
    }

    /// Returns hooks by which a process that gives no sign of life is taken for dead after another time.
    pub fn with_lease_life(lease_life: Duration) -> Self {
        Hooks { lease_life, ..Hooks::default() }
    }
}

/// A storage in the place of another.
#[derive(Debug)]
struct Replaced(Arc<dyn ObjectStore>);

impl WrappingObjectStore for Replaced {
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
