//! Who is told that an operation waits.

use std::sync::Arc;
use std::time::Duration;

/// How long a lock is waited for before somebody is told.
pub const UNTOLD: Duration = Duration::from_millis(300);

/// What is told when an operation has to wait for a lock that another holds: which one, and who it may be.
#[derive(Clone)]
pub struct OnWait(Arc<dyn Fn(&str) + Send + Sync>);

impl OnWait {
    /// Returns a listener that `tell` is called for.
    pub fn new(tell: impl Fn(&str) + Send + Sync + 'static) -> Self {
        OnWait(Arc::new(tell))
    }

    /// Tells a listener, if there is one.
    pub(super) fn tell(listener: Option<&Self>, what: &str) {
        if let Some(OnWait(tell)) = listener {
            tell(what);
        }
    }

    /// Waits for a lock; tells where that takes a while.
    pub(super) async fn told<T>(
        listener: Option<&Self>,
        what: impl Fn() -> String,
        lock: impl Future<Output = T>,
    ) -> T {
        let mut lock = std::pin::pin!(lock);
        if let Ok(lock) = tokio::time::timeout(UNTOLD, lock.as_mut()).await {
            return lock;
        }
        Self::tell(listener, &what());
        lock.await
    }
}

impl std::fmt::Debug for OnWait {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("OnWait")
    }
}
