//! An object store whose conditional puts come about once, or not at all, whatever becomes of the answers.
//!
//! A put whose answer is lost may have come about, may never, and may still. Repeated, it is refused because of itself. So after
//! anything but a plain success the object is read: with the bytes that were put, the put has come about. **What is put
//! conditionally must be unlike anything that another would put there**: it holds a name of its own, such as the identifier of a
//! transaction. And a key that is created is not deleted again while a put to it may still be under way: a late one would bring it back.

use std::collections::BTreeSet;
use std::fmt::{self, Display, Formatter};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::stream::{self, BoxStream};
use futures::{StreamExt, TryStreamExt};
use object_store::client::{HttpError, HttpErrorKind};
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore, ObjectStoreExt,
    PutMode, PutMultipartOptions, PutOptions, PutPayload, PutResult, RenameOptions, Result, UploadPart,
};

use super::http::Lacking;

/// How long something is tried.
const LIMIT: Duration = Duration::from_secs(30);

/// The shortest and the longest pause between two tries.
const PAUSES: Range<Duration> = Duration::from_millis(10)..Duration::from_secs(1);

/// Keys that are deleted with one request: the most that S3 takes.
const DELETED_AT_ONCE: usize = 1000;

/// Such requests at a time.
const DELETIONS: usize = 8;

/// What the errors of this file say that they are of.
const NAME: &str = "S3";

/// An object store around another.
#[derive(Debug, Clone)]
pub struct Careful {
    store: Arc<dyn ObjectStore>,
    once: Arc<dyn ObjectStore>,
    limit: Duration,
}

/// The error of a conditional put of which is not known whether it came about. Whoever put should look at what is there.
#[derive(Debug)]
pub struct Unclear {
    /// Whether the object was found changed by another, after a put whose answer was lost.
    superseded: bool,
    source: Error,
}

impl Unclear {
    /// Returns it if an error is one.
    #[cfg(test)]
    pub fn of(error: &Error) -> Option<&Unclear> {
        match error {
            Error::Generic { source, .. } => source.downcast_ref(),
            _ => None,
        }
    }

    /// Returns whether the object was found changed by another, after a put whose answer was lost: that put may have come before.
    /// Otherwise there was no answer at all in the time, and the put may come about later.
    #[cfg(test)]
    pub fn is_superseded(&self) -> bool {
        self.superseded
    }

    fn error(superseded: bool, source: Error) -> Error {
        Error::Generic { store: NAME, source: Box::new(Unclear { superseded, source }) }
    }
}

impl Display for Unclear {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let what = if self.superseded {
            "an answer was lost, and the object was changed since"
        } else {
            "no answer came that says whether it was written"
        };
        write!(f, "{what}: {}", self.source)
    }
}

impl std::error::Error for Unclear {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.source)
    }
}

/// What is found where something was put.
enum Found {
    /// What was put.
    Ours(PutResult),
    /// Something else, with this entity tag.
    Others(Option<String>),
    /// Nothing.
    Nothing,
}

impl Careful {
    /// Returns one around `store`. `once` is the same store, but makes each request once: of requests that are repeated out of sight,
    /// nobody knows whether the refused one came first.
    pub fn new(store: Arc<dyn ObjectStore>, once: Arc<dyn ObjectStore>) -> Self {
        Careful { store, once, limit: LIMIT }
    }

    /// Returns it with another limit of the time that something is tried.
    #[cfg(test)]
    pub fn with_limit(self, limit: Duration) -> Self {
        Careful { limit, ..self }
    }

    /// Puts an object under a condition.
    async fn put_once(&self, to: &Path, bytes: PutPayload, options: PutOptions) -> Result<PutResult> {
        let mut tries = Tries::new(self.limit);
        // Whether an earlier put may have come about, or may still.
        let mut unclear = false;
        loop {
            let error = match self.once.put_opts(to, bytes.clone(), options.clone()).await {
                Ok(put) => return Ok(put),
                Err(e) => e,
            };
            let refused = matches!(error, Error::Precondition { .. } | Error::AlreadyExists { .. });
            if is_final(&error) {
                return Err(if unclear { Unclear::error(false, error) } else { error });
            }
            unclear |= !refused && !was_not_sent(&error);
            let found = loop {
                match self.found(to, &bytes).await {
                    Ok(found) => break found,
                    Err(e) if is_final(&e) => return Err(Unclear::error(false, e)),
                    Err(_) if tries.again().await => {}
                    Err(_) => return Err(Unclear::error(false, error)),
                }
            };
            match (found, &options.mode) {
                (Found::Ours(put), _) => return Ok(put),
                // The condition holds still.
                (Found::Nothing, PutMode::Create) => {}
                (Found::Others(e_tag), PutMode::Update(asked)) if e_tag.is_some() && e_tag == asked.e_tag => {}
                (Found::Others(_), PutMode::Create) => return Err(already_exists(to, error)),
                _ if unclear => return Err(Unclear::error(true, error)),
                _ => return Err(precondition(to, error)),
            }
            if !tries.again().await {
                return Err(Unclear::error(false, error));
            }
        }
    }

    /// Puts an object whatever is there. A store may refuse that as well while another request for the key is under way.
    async fn put_over(&self, to: &Path, bytes: PutPayload, options: PutOptions) -> Result<PutResult> {
        let mut tries = Tries::new(self.limit);
        loop {
            match self.store.put_opts(to, bytes.clone(), options.clone()).await {
                Err(Error::Precondition { .. } | Error::AlreadyExists { .. }) if tries.again().await => {}
                put => return put,
            }
        }
    }

    /// Looks whether an object is the one that was put.
    async fn found(&self, to: &Path, put: &PutPayload) -> Result<Found> {
        let found = match self.once.get(to).await {
            Err(Error::NotFound { .. }) => return Ok(Found::Nothing),
            found => found?,
        };
        let ObjectMeta { size, e_tag, version, .. } = found.meta.clone();
        if size != put.content_length() as u64 || found.bytes().await? != Bytes::from(put.clone()) {
            return Ok(Found::Others(e_tag));
        }
        Ok(Found::Ours(PutResult { e_tag, version, extensions: Default::default() }))
    }

    /// Deletes some objects. Those that are not there count as deleted.
    async fn delete_some(self, keys: Vec<Path>) -> Vec<Result<Path>> {
        let mut tries = Tries::new(self.limit);
        let mut left: BTreeSet<Path> = keys.iter().cloned().collect();
        loop {
            let mut errors = vec![];
            let asked: Vec<_> = left.iter().cloned().map(Ok).collect();
            let mut deleted = self.store.delete_stream(stream::iter(asked).boxed());
            while let Some(one) = deleted.next().await {
                let gone = match one {
                    Ok(ref path) => left.remove(path),
                    Err(Error::NotFound { ref path, .. }) => left.remove(&Path::from(path.as_str())),
                    Err(_) => false,
                };
                errors.extend(one.err().filter(|_| !gone));
            }
            let again = !left.is_empty() && errors.iter().all(was_cut);
            if !again || !tries.again().await {
                if errors.is_empty() && !left.is_empty() {
                    let source = format!("{} objects are left of {} to delete", left.len(), keys.len()).into();
                    errors.push(Error::Generic { store: NAME, source });
                }
                let deleted = keys.into_iter().filter(|key| !left.contains(key)).map(Ok);
                return deleted.chain(errors.into_iter().map(Err)).collect();
            }
        }
    }
}

/// Tries of one thing, with pauses between.
struct Tries {
    until: Instant,
    pause: Duration,
}

impl Tries {
    fn new(limit: Duration) -> Self {
        Tries { until: Instant::now() + limit, pause: PAUSES.start }
    }

    /// Waits before the next try, unless the time is over.
    async fn again(&mut self) -> bool {
        if Instant::now() >= self.until {
            return false;
        }
        // Half of it is chance, so that those who met once do not meet again. Hashers have random keys.
        let chance = RandomState::new().build_hasher().finish() as f64 / u64::MAX as f64;
        tokio::time::sleep(self.pause.mul_f64(0.5 + 0.5 * chance)).await;
        self.pause = (self.pause * 2).min(PAUSES.end);
        true
    }
}

/// Returns the first of an error's causes that is of a type.
fn cause<T: std::error::Error + 'static>(error: &Error) -> Option<&T> {
    let causes = std::iter::successors(std::error::Error::source(error), |e| e.source());
    causes.into_iter().find_map(|e| e.downcast_ref())
}

/// Returns the error in the causes of another that says how HTTP failed.
fn http_error(error: &Error) -> Option<&HttpError> {
    cause(error).filter(|_| !is_lacking(error))
}

/// Whether the server lacks what was asked for.
fn is_lacking(error: &Error) -> bool {
    cause::<Lacking>(error).is_some()
}

/// Whether a request was never sent.
fn was_not_sent(error: &Error) -> bool {
    http_error(error).is_some_and(|e| e.kind() == HttpErrorKind::Connect)
}

/// Whether a connection failed, in a request or an answer.
fn was_cut(error: &Error) -> bool {
    matches!(error, Error::Generic { .. }) && http_error(error).is_some()
}

/// Whether it helps nothing to try again.
fn is_final(error: &Error) -> bool {
    is_lacking(error)
        || !matches!(error, Error::Generic { .. } | Error::Precondition { .. } | Error::AlreadyExists { .. })
}

fn already_exists(path: &Path, source: Error) -> Error {
    match source {
        Error::AlreadyExists { .. } => source,
        _ => Error::AlreadyExists { path: path.to_string(), source: Box::new(source) },
    }
}

fn precondition(path: &Path, source: Error) -> Error {
    match source {
        Error::Precondition { .. } => source,
        _ => Error::Precondition { path: path.to_string(), source: Box::new(source) },
    }
}

impl Display for Careful {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        self.store.fmt(f)
    }
}

#[async_trait::async_trait]
impl ObjectStore for Careful {
    async fn put_opts(&self, to: &Path, bytes: PutPayload, options: PutOptions) -> Result<PutResult> {
        match options.mode {
            PutMode::Overwrite => self.put_over(to, bytes, options).await,
            PutMode::Create | PutMode::Update(_) => self.put_once(to, bytes, options).await,
        }
    }

    async fn put_multipart_opts(&self, to: &Path, options: PutMultipartOptions) -> Result<Box<dyn MultipartUpload>> {
        let upload = self.store.put_multipart_opts(to, options).await?;
        Ok(Box::new(Upload { upload, to: to.clone(), size: 0, careful: self.clone() }))
    }

    async fn get_opts(&self, from: &Path, options: GetOptions) -> Result<GetResult> {
        self.store.get_opts(from, options).await
    }

    async fn get_ranges(&self, from: &Path, ranges: &[Range<u64>]) -> Result<Vec<Bytes>> {
        self.store.get_ranges(from, ranges).await
    }

    fn delete_stream(&self, keys: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        let careful = self.clone();
        keys.try_chunks(DELETED_AT_ONCE)
            .map(move |keys| {
                let careful = careful.clone();
                async move {
                    match keys {
                        Ok(keys) => careful.delete_some(keys).await,
                        // What came before the error is deleted.
                        Err(stream::TryChunksError(keys, e)) => {
                            let mut deleted = careful.delete_some(keys).await;
                            deleted.push(Err(e));
                            deleted
                        }
                    }
                }
            })
            .buffered(DELETIONS)
            .flat_map(stream::iter)
            .boxed()
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        listing(self.clone(), prefix.cloned(), None)
    }

    fn list_with_offset(&self, prefix: Option<&Path>, offset: &Path) -> BoxStream<'static, Result<ObjectMeta>> {
        listing(self.clone(), prefix.cloned(), Some(offset.clone()))
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        let mut tries = Tries::new(self.limit);
        loop {
            match self.store.list_with_delimiter(prefix).await {
                Err(e) if was_cut(&e) && tries.again().await => {}
                listed => return listed,
            }
        }
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.store.copy_opts(from, to, options).await
    }

    async fn rename_opts(&self, from: &Path, to: &Path, options: RenameOptions) -> Result<()> {
        self.store.rename_opts(from, to, options).await
    }
}

/// Lists keys behind `after`. Where an answer breaks off, which object_store does not repeat, it goes on behind the last key.
fn listing(careful: Careful, prefix: Option<Path>, after: Option<Path>) -> BoxStream<'static, Result<ObjectMeta>> {
    let begin = move |careful: &Careful, after: Option<&Path>| match after {
        Some(after) => careful.store.list_with_offset(prefix.as_ref(), after),
        None => careful.store.list(prefix.as_ref()),
    };
    let listed = begin(&careful, after.as_ref());
    let tries = Tries::new(careful.limit);
    let listing =
        stream::unfold((careful, listed, after, tries), move |(careful, mut listed, mut after, mut tries)| {
            let begin = begin.clone();
            async move {
                loop {
                    let one = listed.next().await?;
                    match one {
                        Ok(meta) => {
                            after = Some(meta.location.clone());
                            tries = Tries::new(careful.limit);
                            return Some((Ok(meta), (careful, listed, after, tries)));
                        }
                        Err(e) if was_cut(&e) && tries.again().await => listed = begin(&careful, after.as_ref()),
                        Err(e) => return Some((Err(e), (careful, stream::empty().boxed(), after, tries))),
                    }
                }
            }
        });
    listing.boxed()
}

/// An upload in parts, to a key that nobody else writes.
#[derive(Debug)]
struct Upload {
    upload: Box<dyn MultipartUpload>,
    to: Path,
    /// The bytes of all parts.
    size: u64,
    careful: Careful,
}

#[async_trait::async_trait]
impl MultipartUpload for Upload {
    fn put_part(&mut self, part: PutPayload) -> UploadPart {
        self.size += part.content_length() as u64;
        self.upload.put_part(part)
    }

    /// Where the answer was lost, the upload is gone when the request is repeated: whether the object is there is what counts.
    async fn complete(&mut self) -> Result<PutResult> {
        let error = match self.upload.complete().await {
            Ok(put) => return Ok(put),
            Err(e) => e,
        };
        let mut tries = Tries::new(self.careful.limit);
        loop {
            match self.careful.store.head(&self.to).await {
                Ok(ObjectMeta { size, e_tag, version, .. }) if size == self.size => {
                    return Ok(PutResult { e_tag, version, extensions: Default::default() });
                }
                Err(e) if was_cut(&e) && tries.again().await => {}
                _ => return Err(error),
            }
        }
    }

    async fn abort(&mut self) -> Result<()> {
        self.upload.abort().await
    }
}
