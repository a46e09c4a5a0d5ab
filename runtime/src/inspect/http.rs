//! `GET /metrics` over HTTP/1.1, for Prometheus and whatever reads its text format. One request for each connection.

use std::io;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Weak};
use std::time::Duration;

use super::desk::{Desk, Protocol};
use super::page;
use crate::engine::Shared;

/// A request's line and headers: as much as common servers take.
const HEAD_MAX: usize = 8 << 10;
/// What Prometheus waits by default.
const SERVED_WITHIN: Duration = Duration::from_secs(10);

/// The page of one engine; gone when it is dropped.
pub(crate) struct Server {
    addr: SocketAddr,
    _desk: Desk,
}

impl Server {
    /// Takes the address, before there is an engine: who asks for a page that cannot be is to know at once.
    pub(crate) fn bind(addr: SocketAddr) -> io::Result<TcpListener> {
        let listener = TcpListener::bind(addr)?;
        listener.set_nonblocking(true)?;
        Ok(listener)
    }

    pub(crate) fn start(listener: TcpListener, shared: &Arc<Shared>) -> io::Result<Self> {
        Ok(Self {
            addr: listener.local_addr()?,
            _desk: Desk::open("mr-metrics-http", Port(listener), Arc::downgrade(shared))?,
        })
    }

    /// Where it listens; the port that was found, where any was asked for.
    pub(crate) fn addr(&self) -> SocketAddr {
        self.addr
    }
}

struct Port(TcpListener);

impl AsFd for Port {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Protocol for Port {
    type Stream = TcpStream;
    const QUESTION_MAX: usize = HEAD_MAX;
    const SERVED_WITHIN: Duration = SERVED_WITHIN;

    fn accept(&self) -> io::Result<(TcpStream, Option<Vec<u8>>)> {
        let (stream, _) = self.0.accept()?;
        stream.set_nonblocking(true)?;
        Ok((stream, None))
    }

    fn answer(&self, question: &[u8], shared: &Weak<Shared>) -> Option<Vec<u8>> {
        let head = head(question)?;
        Some(match asked(head) {
            Ok(with_body) => match shared.upgrade() {
                Some(shared) => response("200 OK", page::CONTENT_TYPE, "", &page::page(&shared), with_body),
                None => plain("503 Service Unavailable", "", "the engine is shutting down"),
            },
            Err(refused) => refused,
        })
    }

    fn too_long(&self) -> Vec<u8> {
        plain("431 Request Header Fields Too Large", "", &format!("a request has at most {HEAD_MAX} bytes"))
    }

    fn answered(&self, stream: &TcpStream) -> bool {
        stream.shutdown(Shutdown::Write).is_ok()
    }
}

/// Everything up to the empty line, if that is there. A lone line feed ends a line too (RFC 9112, 2.2).
fn head(bytes: &[u8]) -> Option<&[u8]> {
    (0..bytes.len()).find_map(|at| {
        let rest = &bytes[at..];
        (rest.starts_with(b"\r\n\r\n") || rest.starts_with(b"\n\n") || rest.starts_with(b"\n\r\n"))
            .then(|| &bytes[..at])
    })
}

/// Whether the page is asked for, and with its body; if not, what to say instead.
fn asked(head: &[u8]) -> Result<bool, Vec<u8>> {
    let line = head.split(|byte| matches!(byte, b'\r' | b'\n')).next().unwrap_or_default();
    let words: Vec<&str> = std::str::from_utf8(line).unwrap_or_default().split(' ').collect();
    let [method, target, version] = words[..] else {
        return Err(plain("400 Bad Request", "", "a request is: GET /metrics HTTP/1.1"));
    };
    if !matches!(version, "HTTP/1.1" | "HTTP/1.0") {
        return Err(plain("505 HTTP Version Not Supported", "", "HTTP/1.1 is spoken here"));
    }
    // A proxy may ask with the whole address.
    let path = target.strip_prefix("http://").map_or(target, |rest| rest.find('/').map_or("/", |at| &rest[at..]));
    if path.split('?').next() != Some("/metrics") {
        return Err(plain("404 Not Found", "", "there is /metrics, and nothing else"));
    }
    match method {
        "GET" => Ok(true),
        "HEAD" => Ok(false),
        _ => Err(plain("405 Method Not Allowed", "Allow: GET, HEAD\r\n", "/metrics can only be read")),
    }
}

fn plain(status: &str, headers: &str, text: &str) -> Vec<u8> {
    response(status, "text/plain; charset=utf-8", headers, &format!("{text}\n"), true)
}

fn response(status: &str, content: &str, headers: &str, body: &str, with_body: bool) -> Vec<u8> {
    let length = body.len();
    let mut text = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {content}\r\nContent-Length: {length}\r\n{headers}Connection: close\r\n\r\n"
    );
    if with_body {
        text.push_str(body);
    }
    text.into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(request: &[u8]) -> String {
        let said = match head(request).map(asked) {
            None => return "more".to_owned(),
            Some(Ok(with_body)) => return format!("page {with_body}"),
            Some(Err(said)) => said,
        };
        String::from_utf8(said).unwrap().lines().next().unwrap()[9..12].to_owned()
    }

    #[test]
    fn only_the_page_is_given_out_and_everything_else_is_told_why() {
        for (request, expected) in [
            (&b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"[..], "page true"),
            (b"GET /metrics?a=b HTTP/1.0\r\n\r\n", "page true"),
            (b"HEAD /metrics HTTP/1.1\r\nHost: x\r\n\r\n", "page false"),
            (b"GET http://x:1/metrics HTTP/1.1\r\n\r\n", "page true"),
            (b"GET /metrics HTTP/1.1\n\n", "page true"),
            (b"GET / HTTP/1.1\r\n\r\n", "404"),
            (b"GET /metrics/ HTTP/1.1\r\n\r\n", "404"),
            (b"GET http://x HTTP/1.1\r\n\r\n", "404"),
            (b"POST /metrics HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc", "405"),
            (b"GET /metrics HTTP/2.0\r\n\r\n", "505"),
            (b"GET /metrics\r\n\r\n", "400"),
            (b"\xff\xfe \0\r\n\r\n", "400"),
            (b"GET /metrics HTTP/1.1\r\nHost: x\r\n", "more"),
            (b"", "more"),
        ] {
            assert_eq!(status(request), expected, "{}", String::from_utf8_lossy(request));
        }
        assert!(
            String::from_utf8(asked(b"PUT /metrics HTTP/1.1").unwrap_err())
                .unwrap()
                .contains("\r\nAllow: GET, HEAD\r\n")
        );
    }

    proptest::proptest! {
        #[test]
        fn no_request_panics_and_what_is_refused_is_an_answer(request in proptest::collection::vec(0u8..=255, 0..200)) {
            if let Some(Err(answer)) = head(&[&request[..], b"\r\n\r\n"].concat()).map(asked) {
                proptest::prop_assert!(answer.starts_with(b"HTTP/1.1 "));
            }
        }
    }
}
