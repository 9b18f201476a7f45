//! HTTP for object_store by reqwest 0.12, the one that the build has: object_store's own features bring a second one, and a
//! library of cryptography in C with it.

use std::pin::Pin;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures::future::{self, Either};
use http::Uri;
use http::uri::Scheme;
use hyper::body::{Body, Frame, SizeHint};
use object_store::ClientOptions;
use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpRequestBody, HttpResponse, HttpResponseBody,
    HttpService,
};
use tokio::time::{Instant, Sleep, sleep_until};

/// How long a connection may take to come about.
const CONNECT: Duration = Duration::from_secs(5);

/// How long nothing may go out or come in while a request is under way. The whole of it may take any time.
const IDLE: Duration = Duration::from_secs(20);

/// Bodies go out in pieces of this size, so that it is seen when they stop.
const PIECE: usize = 256 << 10;

/// Gives object_store its HTTP clients. Clones share their connections.
#[derive(Debug, Clone)]
pub struct Connector(Arc<Clients>);

#[derive(Debug)]
struct Clients {
    idle: Duration,
    /// For this machine and its neighbours, where no proxy leads, without TLS and with it.
    near: [OnceLock<reqwest::Client>; 2],
    /// For all other hosts: through the proxies that the environment names.
    far: OnceLock<reqwest::Client>,
}

impl Default for Connector {
    fn default() -> Self {
        Connector::with_idle(IDLE)
    }
}

impl Connector {
    /// Returns one whose requests fail where nothing goes out or comes in for this time.
    pub fn with_idle(idle: Duration) -> Self {
        Connector(Arc::new(Clients { idle, near: Default::default(), far: OnceLock::new() }))
    }
}

impl HttpConnector for Connector {
    fn connect(&self, _options: &ClientOptions) -> object_store::Result<HttpClient> {
        Ok(HttpClient::new(Service(self.0.clone())))
    }
}

impl Clients {
    /// Returns the client for an address. It is made when it is first asked for, and reads the system's certificates only where they
    /// may be called for: that takes 40 ms.
    fn client(&self, uri: &Uri) -> Result<&reqwest::Client, HttpError> {
        let (near, tls) = (is_near(uri.host().unwrap_or_default()), uri.scheme() != Some(&Scheme::HTTP));
        let cell = if near { &self.near[usize::from(tls)] } else { &self.far };
        if let Some(client) = cell.get() {
            return Ok(client);
        }
        let builder = reqwest::Client::builder()
            .user_agent(concat!(env!("CARGO_PKG_NAME"), "/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(CONNECT)
            .http1_only();
        let builder = if near { builder.no_proxy().tls_built_in_root_certs(tls) } else { builder };
        let client = builder.build().map_err(unknown)?;
        Ok(cell.get_or_init(|| client))
    }
}

/// Whether a host is this machine, or one of those that tell cloud machines of themselves.
fn is_near(host: &str) -> bool {
    match host.trim_matches(['[', ']']).parse::<std::net::IpAddr>() {
        Ok(std::net::IpAddr::V4(address)) => address.is_loopback() || address.is_link_local(),
        Ok(std::net::IpAddr::V6(address)) => address.is_loopback() || address.is_unicast_link_local(),
        Err(_) => host.eq_ignore_ascii_case("localhost"),
    }
}

#[derive(Debug)]
struct Service(Arc<Clients>);

#[async_trait::async_trait]
impl HttpService for Service {
    async fn call(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let Clients { idle, .. } = *self.0;
        let (parts, body) = request.into_parts();
        let client = self.0.client(&parts.uri)?;
        let mut out = reqwest::Request::new(parts.method, parts.uri.to_string().parse().map_err(unknown)?);
        *out.headers_mut() = parts.headers;
        let progress = Progress::default();
        *out.body_mut() = Some(reqwest::Body::wrap(Outgoing { body, piece: Bytes::new(), progress: progress.clone() }));
        let method = out.method().clone();
        let answer = answered(client.execute(out), &progress, idle).await?;
        if answer.status() == http::StatusCode::NOT_IMPLEMENTED {
            return Err(HttpError::new(HttpErrorKind::Unknown, Lacking { method }));
        }
        let (parts, body) = http::Response::<reqwest::Body>::from(answer).into_parts();
        let sleep = Box::pin(sleep_until(Instant::now()));
        Ok(HttpResponse::from_parts(parts, HttpResponseBody::new(Incoming { body, idle, sleep, waits: false })))
    }
}

/// Waits for an answer as long as the request's body goes out, and for the time `idle` from then on.
async fn answered(
    answer: impl Future<Output = reqwest::Result<reqwest::Response>>,
    progress: &Progress,
    idle: Duration,
) -> Result<reqwest::Response, HttpError> {
    let mut answer = std::pin::pin!(answer);
    loop {
        let until = progress.last() + idle;
        match future::select(&mut answer, std::pin::pin!(sleep_until(until))).await {
            Either::Left((answer, _)) => return answer.map_err(failed),
            Either::Right(_) if progress.last() + idle > until => {}
            Either::Right(_) => return Err(HttpError::new(HttpErrorKind::Timeout, Idle(idle))),
        }
    }
}

/// The error of a request of which nothing went out or came in for some time.
#[derive(Debug)]
struct Idle(Duration);

impl std::fmt::Display for Idle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "nothing was sent or received for {:?}", self.0)
    }
}

impl std::error::Error for Idle {}

/// The error of a request that the server says is for something that it does not have.
#[derive(Debug)]
pub struct Lacking {
    method: http::Method,
}

impl std::fmt::Display for Lacking {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Lacking { method } = self;
        write!(
            f,
            "the server answered a {method} with 501 Not Implemented: it lacks what a store needs, as are writes under a condition "
        )?;
        write!(f, "(If-None-Match, If-Match)")
    }
}

impl std::error::Error for Lacking {}

/// When a piece of a body last went out.
#[derive(Debug, Clone)]
struct Progress(Arc<Mutex<Instant>>);

impl Default for Progress {
    fn default() -> Self {
        Progress(Arc::new(Mutex::new(Instant::now())))
    }
}

impl Progress {
    fn last(&self) -> Instant {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }
}

/// A request's body, in pieces.
struct Outgoing {
    body: HttpRequestBody,
    /// What of the last frame is still to go out.
    piece: Bytes,
    progress: Progress,
}

impl Body for Outgoing {
    type Data = Bytes;
    type Error = HttpError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, HttpError>>> {
        self.progress.note();
        if self.piece.is_empty() {
            match Pin::new(&mut self.body).poll_frame(cx) {
                Poll::Ready(Some(Ok(frame))) => match frame.into_data() {
                    Ok(data) => self.piece = data,
                    Err(frame) => return Poll::Ready(Some(Ok(frame))),
                },
                other => return other,
            }
        }
        let length = PIECE.min(self.piece.len());
        Poll::Ready(Some(Ok(Frame::data(self.piece.split_to(length)))))
    }

    fn is_end_stream(&self) -> bool {
        self.piece.is_empty() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let held = self.piece.len() as u64;
        let rest = self.body.size_hint();
        rest.exact().map_or_else(SizeHint::new, |rest| SizeHint::with_exact(held + rest))
    }
}

/// An answer's body, which fails when it stops.
struct Incoming {
    body: reqwest::Body,
    idle: Duration,
    sleep: Pin<Box<Sleep>>,
    /// Whether the time runs: while somebody waits for bytes.
    waits: bool,
}

impl Body for Incoming {
    type Data = Bytes;
    type Error = HttpError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, HttpError>>> {
        if let Poll::Ready(frame) = Pin::new(&mut self.body).poll_frame(cx) {
            self.waits = false;
            return Poll::Ready(frame.map(|frame| frame.map_err(failed)));
        }
        if !self.waits {
            let until = Instant::now() + self.idle;
            self.sleep.as_mut().reset(until);
            self.waits = true;
        }
        let idle = self.idle;
        self.sleep.as_mut().poll(cx).map(|()| Some(Err(HttpError::new(HttpErrorKind::Timeout, Idle(idle)))))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

fn unknown(e: impl std::error::Error + Send + Sync + 'static) -> HttpError {
    HttpError::new(HttpErrorKind::Unknown, e)
}

/// Returns reqwest's error by its kind, on which depends whether object_store repeats the request. The address is left out: object_store
/// adds it where it may be shown.
fn failed(e: reqwest::Error) -> HttpError {
    let kind = if e.is_connect() {
        HttpErrorKind::Connect
    } else if e.is_timeout() {
        HttpErrorKind::Timeout
    } else {
        kind_of(&e)
    };
    HttpError::new(kind, e.without_url())
}

/// Returns the kind of an error that is neither of connecting nor of time, by its causes.
fn kind_of(e: &reqwest::Error) -> HttpErrorKind {
    let mut cause = std::error::Error::source(e);
    while let Some(e) = cause {
        if let Some(e) = e.downcast_ref::<hyper::Error>() {
            if e.is_closed() || e.is_incomplete_message() || e.is_body_write_aborted() {
                return HttpErrorKind::Request;
            } else if e.is_timeout() {
                return HttpErrorKind::Timeout;
            }
        }
        match e.downcast_ref::<std::io::Error>().map(std::io::Error::kind) {
            Some(std::io::ErrorKind::TimedOut) => return HttpErrorKind::Timeout,
            Some(
                std::io::ErrorKind::ConnectionAborted
                | std::io::ErrorKind::ConnectionReset
                | std::io::ErrorKind::BrokenPipe
                | std::io::ErrorKind::UnexpectedEof,
            ) => return HttpErrorKind::Interrupted,
            _ => {}
        }
        cause = e.source();
    }
    HttpErrorKind::Unknown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_proxy_leads_to_this_machine() {
        for host in ["127.0.0.1", "127.9.9.9", "[::1]", "localhost", "LocalHost", "169.254.169.254", "[fe80::1]"] {
            assert!(is_near(host), "{host}");
        }
        for host in ["s3.eu-west-1.amazonaws.com", "10.0.0.1", "localhost.example", "[2001:db8::1]"] {
            assert!(!is_near(host), "{host}");
        }
    }
}
