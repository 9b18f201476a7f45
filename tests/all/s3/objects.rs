//! The objects of the server, and S3's requests to them.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::ops::Range;
use std::sync::{Arc, Mutex};

use chrono::{DateTime, Utc};

use super::http::{Answer, Request, decoded};

/// One object.
#[derive(Debug, Clone)]
pub struct Object {
    /// The content.
    pub bytes: Arc<Vec<u8>>,
    /// The entity tag, with its quotes: as on S3, the same for the same content.
    pub e_tag: String,
    /// When it was written.
    pub modified: DateTime<Utc>,
}

/// All objects by bucket and key (`bucket/key`), and the unfinished uploads.
#[derive(Debug, Default)]
pub struct Objects {
    /// The objects.
    pub all: BTreeMap<String, Object>,
    /// The parts of unfinished uploads, by the uploads' names.
    pub uploads: BTreeMap<String, (String, BTreeMap<u32, Object>)>,
    begun: u64,
}

/// Returns the object of some content, as of now.
pub fn object(bytes: Arc<Vec<u8>>) -> Object {
    let mut hash = DefaultHasher::new();
    bytes.hash(&mut hash);
    Object { e_tag: format!("\"{:016x}{:x}\"", hash.finish(), bytes.len()), bytes, modified: Utc::now() }
}

/// Carries a request out. Each one is a single step: conditions are looked at and fulfilled under one lock.
pub fn apply(objects: &Mutex<Objects>, request: &Request, page: usize) -> Answer {
    let full = format!("{}/{}", request.bucket, request.key);
    let upload = request.parameter("uploadId");
    // Whatever takes long is done before the lock is taken.
    let new = (request.method == "PUT").then(|| object(request.body.clone()));
    let mut objects = objects.lock().unwrap();
    match (request.method.as_str(), request.key.is_empty(), upload) {
        ("GET", true, _) if request.parameter("list-type") == Some("2") => objects.list(request, page),
        ("POST", true, _) if request.parameter("delete").is_some() => objects.delete(request),
        ("GET" | "HEAD", false, None) => objects.get(&full, request),
        ("PUT", false, Some(upload)) => objects.put_part(&full, upload, request, new.expect("made for a PUT")),
        ("PUT", false, None) => objects.put(full, request, new.expect("made for a PUT")),
        ("POST", false, None) if request.parameter("uploads").is_some() => {
            objects.begun += 1;
            let upload = format!("upload-{}", objects.begun);
            objects.uploads.insert(upload.clone(), (full, BTreeMap::new()));
            let name = format!("<UploadId>{upload}</UploadId>");
            Answer::xml(200, &format!("<InitiateMultipartUploadResult>{name}</InitiateMultipartUploadResult>"))
        }
        ("POST", false, Some(upload)) => objects.complete(full, upload, request),
        ("DELETE", false, Some(upload)) => match objects.uploads.remove(upload) {
            Some(_) => Answer::empty(204),
            None => Answer::error(404),
        },
        ("DELETE", false, None) => {
            objects.all.remove(&full);
            Answer::empty(204)
        }
        _ => Answer::error(501),
    }
}

impl Objects {
    /// Returns the answer to a request whose conditions for writing are not met.
    fn refusal(&self, full: &str, request: &Request) -> Option<Answer> {
        let found = self.all.get(full).map(|object| object.e_tag.as_str());
        if request.header("if-none-match").is_some() && found.is_some() {
            return Some(Answer::error(412));
        }
        match (request.header("if-match"), found) {
            (Some(_), None) => Some(Answer::error(404)),
            (Some(asked), Some(found)) if asked != found => Some(Answer::error(412)),
            _ => None,
        }
    }

    /// Returns the object that a request for a copy names.
    fn source(&self, request: &Request) -> Option<Result<Object, Answer>> {
        let from = decoded(request.header("x-amz-copy-source")?);
        Some(self.all.get(from.trim_start_matches('/')).cloned().ok_or_else(|| Answer::error(404)))
    }

    fn put(&mut self, full: String, request: &Request, new: Object) -> Answer {
        if let Some(refusal) = self.refusal(&full, request) {
            return refusal;
        }
        let copied = self.source(request);
        let is_copy = copied.is_some();
        let new = match copied {
            Some(Err(answer)) => return answer,
            Some(Ok(source)) => Object { modified: new.modified, ..source },
            None => new,
        };
        let e_tag = new.e_tag.clone();
        self.all.insert(full, new);
        if is_copy {
            let e_tag = escaped(&e_tag);
            return Answer::xml(200, &format!("<CopyObjectResult><ETag>{e_tag}</ETag></CopyObjectResult>"));
        }
        Answer::empty(200).with("etag", e_tag)
    }

    fn put_part(&mut self, full: &str, upload: &str, request: &Request, new: Object) -> Answer {
        let copied = self.source(request);
        let is_copy = copied.is_some();
        let new = match copied {
            Some(Err(answer)) => return answer,
            Some(Ok(source)) => source,
            None => new,
        };
        let number = request.parameter("partNumber").and_then(|number| number.parse().ok());
        let (Some(number), Some((key, parts))) = (number, self.uploads.get_mut(upload)) else {
            return Answer::error(404);
        };
        if key != full {
            return Answer::error(404);
        }
        let e_tag = new.e_tag.clone();
        parts.insert(number, new);
        if is_copy {
            let e_tag = escaped(&e_tag);
            return Answer::xml(200, &format!("<CopyPartResult><ETag>{e_tag}</ETag></CopyPartResult>"));
        }
        Answer::empty(200).with("etag", e_tag)
    }

    /// Makes an object of an upload's parts. The upload is gone then: a second request finds none.
    fn complete(&mut self, full: String, upload: &str, request: &Request) -> Answer {
        if let Some(refusal) = self.refusal(&full, request) {
            return refusal;
        }
        let Some((key, parts)) = self.uploads.get(upload) else { return Answer::error(404) };
        let body = String::from_utf8_lossy(&request.body);
        let (numbers, tags) = (texts(&body, "PartNumber"), texts(&body, "ETag"));
        let mut bytes = vec![];
        for (number, tag) in numbers.iter().zip(&tags) {
            match number.parse().ok().and_then(|number: u32| parts.get(&number)) {
                Some(part) if part.e_tag == *tag => bytes.extend_from_slice(&part.bytes),
                _ => return Answer::error(400),
            }
        }
        if *key != full || numbers.is_empty() || numbers.len() != tags.len() {
            return Answer::error(400);
        }
        let mut new = object(Arc::new(bytes));
        new.e_tag = format!("{}-{}\"", new.e_tag.trim_end_matches('"'), numbers.len());
        let e_tag = escaped(&new.e_tag);
        self.uploads.remove(upload);
        self.all.insert(full, new);
        let e_tag = format!("<ETag>{e_tag}</ETag>");
        Answer::xml(200, &format!("<CompleteMultipartUploadResult>{e_tag}</CompleteMultipartUploadResult>"))
    }

    fn get(&self, full: &str, request: &Request) -> Answer {
        let Some(object) = self.all.get(full) else { return Answer::error(404) };
        if request.header("if-match").is_some_and(|asked| asked != object.e_tag) {
            return Answer::error(412);
        }
        if request.header("if-none-match").is_some_and(|asked| asked == object.e_tag || asked == "*") {
            return Answer::empty(304).with("etag", object.e_tag.clone());
        }
        let size = object.bytes.len();
        let (status, part) = match request.header("range").map(|range| part_of(range, size)) {
            None => (200, 0..size),
            Some(None) => return Answer::error(416),
            Some(Some(part)) => (206, part),
        };
        let mut answer = Answer::empty(status)
            .with("etag", object.e_tag.clone())
            .with("last-modified", object.modified.format("%a, %d %b %Y %H:%M:%S GMT").to_string())
            .with("accept-ranges", "bytes");
        if status == 206 {
            answer = answer.with("content-range", format!("bytes {}-{}/{size}", part.start, part.end - 1));
        }
        answer.bytes = object.bytes.clone();
        answer.part = part;
        answer
    }

    fn delete(&mut self, request: &Request) -> Answer {
        let mut deleted = String::new();
        for key in texts(&String::from_utf8_lossy(&request.body), "Key") {
            self.all.remove(&format!("{}/{key}", request.bucket));
            let _ = write!(deleted, "<Deleted><Key>{}</Key></Deleted>", escaped(&key));
        }
        Answer::xml(200, &format!("<DeleteResult>{deleted}</DeleteResult>"))
    }

    /// Lists a page of keys in their order; those that have the delimiter behind the prefix come as one each.
    fn list(&self, request: &Request, page: usize) -> Answer {
        let parameter = |name| request.parameter(name).unwrap_or_default();
        let (prefix, delimiter) = (parameter("prefix"), parameter("delimiter"));
        let after = parameter("start-after").max(parameter("continuation-token"));
        let most = parameter("max-keys").parse().unwrap_or(usize::MAX).min(page);
        let bucket = format!("{}/", request.bucket);
        let (mut contents, mut prefixes, mut listed, mut last) = (String::new(), String::new(), 0, String::new());
        let mut next = None;
        for (full, object) in self.all.range(format!("{bucket}{}", prefix.max(after))..) {
            let Some(key) = full.strip_prefix(&bucket) else { break };
            let Some(rest) = key.strip_prefix(prefix) else { break };
            let group = (!delimiter.is_empty()).then(|| rest.find(delimiter)).flatten();
            let item = &key[..group.map_or(key.len(), |at| prefix.len() + at + delimiter.len())];
            // What is before, or in the group that was the last of the page before, or the same group once more.
            if item <= after || (group.is_some() && item == last) {
                continue;
            }
            if listed == most {
                next = Some(last.clone());
                break;
            }
            (listed, last) = (listed + 1, item.to_owned());
            if group.is_some() {
                let _ = write!(prefixes, "<CommonPrefixes><Prefix>{}</Prefix></CommonPrefixes>", escaped(item));
                continue;
            }
            let _ = write!(
                contents,
                "<Contents><Key>{}</Key><LastModified>{}</LastModified><ETag>{}</ETag><Size>{}</Size></Contents>",
                escaped(key),
                object.modified.format("%Y-%m-%dT%H:%M:%S.000Z"),
                escaped(&object.e_tag),
                object.bytes.len(),
            );
        }
        let more = next.map_or_else(
            || "<IsTruncated>false</IsTruncated>".to_owned(),
            |next| {
                let next = escaped(&next);
                format!("<IsTruncated>true</IsTruncated><NextContinuationToken>{next}</NextContinuationToken>")
            },
        );
        Answer::xml(200, &format!("<ListBucketResult>{more}{contents}{prefixes}</ListBucketResult>"))
    }
}

/// Returns the bytes that a `Range` header asks for, of so many; `None` where there are none such.
fn part_of(range: &str, size: usize) -> Option<Range<usize>> {
    let (first, last) = range.strip_prefix("bytes=")?.split_once('-')?;
    let part = match (first.parse::<usize>(), last.parse::<usize>()) {
        (Ok(first), Ok(last)) => first..last.saturating_add(1).min(size),
        (Ok(first), Err(_)) => first..size,
        (Err(_), Ok(length)) => size.saturating_sub(length)..size,
        (Err(_), Err(_)) => return None,
    };
    (part.start < part.end).then_some(part)
}

/// Returns a text as it stands in XML.
fn escaped(text: &str) -> String {
    let text = text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    text.replace('"', "&quot;")
}

/// Returns the texts of all elements of one name.
fn texts(xml: &str, name: &str) -> Vec<String> {
    let (open, close) = (format!("<{name}>"), format!("</{name}>"));
    let parts = xml.split(&open).skip(1).filter_map(|part| part.split_once(&close));
    let text = parts.map(|(text, _)| {
        let text = text.replace("&quot;", "\"").replace("&apos;", "'").replace("&lt;", "<");
        text.replace("&gt;", ">").replace("&amp;", "&")
    });
    text.collect()
}
