//! HTTP/1.1 as far as clients of S3 use it: requests read from a connection, answers written to it.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The most bytes of a request's head.
const MOST_HEAD: usize = 64 << 10;

/// One request, with its whole body.
#[derive(Debug)]
pub struct Request {
    /// The method, in capitals.
    pub method: String,
    /// The bucket, the first part of the path.
    pub bucket: String,
    /// The rest of the path, decoded; empty for requests to the bucket itself.
    pub key: String,
    /// The query's pairs, decoded.
    pub query: Vec<(String, String)>,
    /// The headers, their names in small letters.
    pub headers: Vec<(String, String)>,
    /// The bytes of the head as they came.
    pub head: Vec<u8>,
    /// The body.
    pub body: Arc<Vec<u8>>,
}

impl Request {
    /// Returns the value of a header.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(header, _)| header == name).map(|(_, value)| value.as_str())
    }

    /// Returns the value of a parameter of the query.
    pub fn parameter(&self, name: &str) -> Option<&str> {
        self.query.iter().find(|(parameter, _)| parameter == name).map(|(_, value)| value.as_str())
    }
}

/// An answer to a request.
#[derive(Debug)]
pub struct Answer {
    /// The status.
    pub status: u16,
    /// The headers, but for the length.
    pub headers: Vec<(&'static str, String)>,
    /// The bytes of which the body is a part.
    pub bytes: Arc<Vec<u8>>,
    /// The part that is the body.
    pub part: Range<usize>,
    /// Whether the body is left out, as answers to `HEAD` do, though its length is told.
    pub without_body: bool,
}

impl Answer {
    /// Returns an answer with a status alone.
    pub fn empty(status: u16) -> Self {
        Answer::of(status, vec![])
    }

    /// Returns an answer with a status and a body.
    pub fn of(status: u16, body: Vec<u8>) -> Self {
        let part = 0..body.len();
        Answer { status, headers: vec![], bytes: Arc::new(body), part, without_body: false }
    }

    /// Returns an answer with a status and an XML document.
    pub fn xml(status: u16, body: &str) -> Self {
        let body = format!("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n{body}");
        Answer::of(status, body.into_bytes()).with("content-type", "application/xml")
    }

    /// Returns S3's answer for an error with this status.
    pub fn error(status: u16) -> Self {
        let code = match status {
            400 => "InvalidRequest",
            403 => "InvalidAccessKeyId",
            404 => "NoSuchKey",
            409 => "ConditionalRequestConflict",
            412 => "PreconditionFailed",
            416 => "InvalidRange",
            429 | 503 => "SlowDown",
            500 => "InternalError",
            501 => "NotImplemented",
            _ => "Unknown",
        };
        Answer::xml(status, &format!("<Error><Code>{code}</Code><Message>{code}</Message></Error>"))
    }

    /// Returns the answer with one more header.
    pub fn with(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }
}

/// How an answer's body is written.
#[derive(Debug, Clone, Copy)]
pub enum Pace {
    /// At once.
    Whole,
    /// Only so many bytes of it; the connection is to be closed then.
    Cut(u64),
    /// So many bytes a second.
    Slow(u64),
}

/// A client's connection.
#[derive(Debug)]
pub struct Connection {
    stream: TcpStream,
    /// What was read and not used yet.
    ahead: Vec<u8>,
}

impl Connection {
    /// Returns the connection of a stream.
    pub fn new(stream: TcpStream) -> Self {
        Connection { stream, ahead: vec![] }
    }

    /// Reads more bytes, and returns whether there were any.
    fn read_more(&mut self) -> io::Result<bool> {
        let mut some = [0; 16 << 10];
        let read = self.stream.read(&mut some)?;
        self.ahead.extend_from_slice(&some[..read]);
        Ok(read > 0)
    }

    /// Takes exactly so many bytes.
    fn take(&mut self, length: usize) -> io::Result<Vec<u8>> {
        let rest = self.ahead.split_off(length.min(self.ahead.len()));
        let mut bytes = std::mem::replace(&mut self.ahead, rest);
        let have = bytes.len();
        bytes.resize(length, 0);
        self.stream.read_exact(&mut bytes[have..])?;
        Ok(bytes)
    }

    /// Takes the bytes of a line, without its end.
    fn take_line(&mut self) -> io::Result<String> {
        loop {
            if let Some(end) = self.ahead.windows(2).position(|two| two == b"\r\n") {
                let line = self.take(end + 2)?;
                return String::from_utf8(line[..end].to_vec()).map_err(io::Error::other);
            }
            if !self.read_more()? {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }

    /// Reads a body that comes in chunks.
    fn chunks(&mut self) -> io::Result<Vec<u8>> {
        let mut body = vec![];
        loop {
            let line = self.take_line()?;
            let size = line.split(';').next().unwrap_or_default().trim();
            let size = usize::from_str_radix(size, 16).map_err(io::Error::other)?;
            if size == 0 {
                // Trailers end with an empty line.
                while !self.take_line()?.is_empty() {}
                return Ok(body);
            }
            body.append(&mut self.take(size)?);
            self.take_line()?;
        }
    }

    /// Reads the next request; `None` when the client has closed the connection.
    ///
    /// # Errors
    /// When the connection breaks, or what comes is no request.
    pub fn request(&mut self) -> io::Result<Option<Request>> {
        let (mut request, length) = loop {
            let mut headers = [httparse::EMPTY_HEADER; 96];
            let mut parsed = httparse::Request::new(&mut headers);
            let status = parsed.parse(&self.ahead).map_err(io::Error::other)?;
            if let httparse::Status::Complete(length) = status {
                break (request_of(&parsed), length);
            }
            if self.ahead.len() > MOST_HEAD {
                return Err(io::Error::other("the head of a request is too long"));
            }
            if !self.read_more()? {
                return if self.ahead.is_empty() { Ok(None) } else { Err(io::ErrorKind::UnexpectedEof.into()) };
            }
        };
        request.head = self.take(length)?;
        if request.header("expect").is_some() {
            self.stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n")?;
        }
        let chunked = request.header("transfer-encoding").is_some_and(|value| value.eq_ignore_ascii_case("chunked"));
        let body = if chunked {
            self.chunks()?
        } else {
            let length = request.header("content-length").unwrap_or("0").trim().parse().map_err(io::Error::other)?;
            self.take(length)?
        };
        request.body = Arc::new(body);
        Ok(Some(request))
    }

    /// Writes an answer.
    ///
    /// # Errors
    /// When the connection breaks.
    pub fn answer(&mut self, answer: &Answer, pace: Pace) -> io::Result<()> {
        let body = if answer.without_body { &[] } else { &answer.bytes[answer.part.clone()] };
        let mut out = format!("HTTP/1.1 {} Answer\r\n", answer.status);
        for (name, value) in &answer.headers {
            out.push_str(&format!("{name}: {value}\r\n"));
        }
        if answer.status != 204 && answer.status != 304 {
            out.push_str(&format!("content-length: {}\r\n", answer.part.len()));
        }
        out.push_str("\r\n");
        let mut out = out.into_bytes();
        match pace {
            Pace::Whole if body.len() <= 64 << 10 => out.extend_from_slice(body),
            Pace::Whole => {
                self.stream.write_all(&out)?;
                return self.stream.write_all(body);
            }
            Pace::Cut(bytes) => {
                out.extend_from_slice(&body[..body.len().min(usize::try_from(bytes).unwrap_or(usize::MAX))])
            }
            Pace::Slow(rate) => {
                self.stream.write_all(&out)?;
                return self.trickle(body, rate.max(1));
            }
        }
        self.stream.write_all(&out)
    }

    /// Writes bytes so that about `rate` of them go out in a second.
    fn trickle(&mut self, body: &[u8], rate: u64) -> io::Result<()> {
        let step = usize::try_from(rate / 50).unwrap_or(usize::MAX).max(1);
        let begun = Instant::now();
        let mut sent = 0_u64;
        for piece in body.chunks(step) {
            self.stream.write_all(piece)?;
            sent += piece.len() as u64;
            let due = Duration::from_secs_f64(sent as f64 / rate as f64);
            std::thread::sleep(due.saturating_sub(begun.elapsed()));
        }
        Ok(())
    }
}

/// Returns what a parsed head says.
fn request_of(parsed: &httparse::Request<'_, '_>) -> Request {
    let target = parsed.path.unwrap_or_default();
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let path = path.trim_start_matches('/');
    let (bucket, key) = path.split_once('/').unwrap_or((path, ""));
    let pairs = query.split('&').filter(|pair| !pair.is_empty()).map(|pair| {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        (decoded(&name.replace('+', " ")), decoded(&value.replace('+', " ")))
    });
    let headers = parsed
        .headers
        .iter()
        .map(|header| (header.name.to_ascii_lowercase(), String::from_utf8_lossy(header.value).into_owned()));
    Request {
        method: parsed.method.unwrap_or_default().to_ascii_uppercase(),
        bucket: decoded(bucket),
        key: decoded(key),
        query: pairs.collect(),
        headers: headers.collect(),
        head: vec![],
        body: Arc::default(),
    }
}

/// Returns a text with its percent signs decoded.
pub fn decoded(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        let code = (first == b'%').then(|| after.get(..2)).flatten();
        let code = code.and_then(|code| u8::from_str_radix(std::str::from_utf8(code).ok()?, 16).ok());
        bytes.push(code.unwrap_or(first));
        rest = if code.is_some() { &after[2..] } else { after };
    }
    String::from_utf8_lossy(&bytes).into_owned()
}
