//! A key put into etcd as somebody by hand does: without a lease, past every engine.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

/// Puts it, by the HTTP gateway of the etcd at `place` (`host:port`).
pub(crate) fn put(place: &str, key: &str, value: &[u8]) {
    let body = format!(r#"{{"key":"{}","value":"{}"}}"#, base64(key.as_bytes()), base64(value));
    let mut stream = TcpStream::connect(place).unwrap_or_else(|e| panic!("{place}: {e}"));
    stream.set_read_timeout(Some(Duration::from_secs(10))).expect("a socket");
    let length = body.len();
    write!(stream, "POST /v3/kv/put HTTP/1.0\r\nHost: {place}\r\nContent-Length: {length}\r\n\r\n{body}")
        .expect("sent");
    let mut reply = String::new();
    stream.read_to_string(&mut reply).expect("a reply");
    assert!(reply.starts_with("HTTP/1.0 200") || reply.starts_with("HTTP/1.1 200"), "{reply}");
}

fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    fn group(three: &[u8]) -> [char; 4] {
        let all = three.iter().fold(0_u32, |all, byte| all << 8 | u32::from(*byte)) << (8 * (3 - three.len()));
        std::array::from_fn(
            |i| if i <= three.len() { DIGITS[(all >> (18 - 6 * i) & 63) as usize] as char } else { '=' },
        )
    }
    bytes.chunks(3).flat_map(group).collect()
}
