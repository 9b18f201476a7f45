//! Stores on S3, and on what speaks its protocol, at `s3://BUCKET/PREFIX`.
//!
//! Lance's own provider brings the AWS SDK, a second HTTP client and a library of cryptography in C. This one uses object_store's client
//! over the HTTP client that the build has, and makes conditional puts safe.

mod careful;
mod http;
mod options;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use lance_io::object_store::{ObjectStore as LanceStore, ObjectStoreParams, ObjectStoreProvider};
use object_store::ObjectStore;
use url::Url;

use self::careful::Careful;
pub use self::options::StorageOptions;

/// Bytes that Lance reads of a file whose size it does not know, and below which it reads a file whole: a request takes as long as the
/// transfer of about as many.
const BLOCK_BYTES: usize = 1 << 20;

/// Requests at a time.
const PARALLEL: usize = 64;

/// How often Lance begins a read anew that object_store has given up.
const RETRIES: usize = 3;

/// A bucket, as Lance sees it.
#[derive(Debug)]
pub struct Bucket {
    files: Arc<Careful>,
}

impl Bucket {
    /// Returns a bucket by options, and by the environment where they say nothing. No request is made.
    ///
    /// # Errors
    /// When an option is unknown or does not fit, or nothing says which credentials to take: as a text that holds no option's value.
    pub fn new(bucket: &str, options: &StorageOptions) -> Result<Self, String> {
        let (repeating, once) = options::s3_and_once(bucket, options)?;
        Ok(Bucket { files: Arc::new(Careful::new(Arc::new(repeating), Arc::new(once))) })
    }
}

#[async_trait::async_trait]
impl ObjectStoreProvider for Bucket {
    async fn new_store(&self, base_path: Url, _: &ObjectStoreParams) -> lance::Result<LanceStore> {
        let files: Arc<dyn ObjectStore> = self.files.clone();
        let mut store =
            LanceStore::new(files.clone(), base_path, Some(BLOCK_BYTES), None, false, true, PARALLEL, RETRIES, None);
        // Without the tracking that `new` puts around it: whoever asked for the store adds its own.
        store.inner = files;
        Ok(store)
    }
}
