//! Registering is publishing: with a metadata server that refuses, memory is not registered, and nothing is left over.

mod pair;

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use moonrail::{RegisterError, Transfer, UnregisterError};
use moonrail_datapath::nic::sim::{SimOptions, SimWorld};
use pair::{LONG, builder, nics};

/// A metadata server of the HTTP kind that can be told to refuse.
struct Server {
    url: String,
    refusing: Arc<AtomicBool>,
    kept: Arc<Mutex<HashMap<String, Vec<u8>>>>,
}

impl Server {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/metadata", listener.local_addr().unwrap());
        let (refusing, kept) = (Arc::new(AtomicBool::new(false)), Arc::default());
        let server = Self { url, refusing: Arc::clone(&refusing), kept: Arc::clone(&kept) };
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                // A client that breaks off is its own business.
                let _ = serve(&stream, &refusing, &kept);
            }
        });
        server
    }
}

fn serve(mut stream: &TcpStream, refusing: &AtomicBool, kept: &Mutex<HashMap<String, Vec<u8>>>) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream);
    let mut first = String::new();
    reader.read_line(&mut first)?;
    let mut length = 0;
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? <= 2 {
            break;
        }
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().unwrap_or(0);
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body)?;
    let mut words = first.split(' ');
    let (method, key) = (words.next().unwrap_or_default(), words.next().unwrap_or_default().to_owned());
    let mut kept = kept.lock().unwrap();
    let (status, reply) = match method {
        _ if refusing.load(Ordering::Relaxed) => ("500 Internal Server Error", Vec::new()),
        "PUT" => {
            kept.insert(key, body);
            ("200 OK", Vec::new())
        }
        "DELETE" => {
            kept.remove(&key);
            ("200 OK", Vec::new())
        }
        _ => kept.get(&key).map_or(("404 Not Found", Vec::new()), |value| ("200 OK", value.clone())),
    };
    write!(stream, "HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", reply.len())?;
    stream.write_all(&reply)
}

#[test]
fn memory_that_cannot_be_published_is_not_registered() {
    let server = Server::start();
    let world = SimWorld::real_time(5, SimOptions::default());
    let log = Arc::default();
    let engine = |name: &str, node| {
        let (open, _) = nics(&world, node, 2);
        builder(&log).name(name).metadata(&server.url).nics_from(open).cores(1).build().unwrap()
    };
    let (a, b) = (engine("a", 1), engine("b", 2));
    let first = b.allocate(4096, "*").unwrap();
    let before = world.ledger().registrations;

    // The server refuses: neither comes the new region, nor goes the old one.
    server.refusing.store(true, Ordering::Relaxed);
    assert!(matches!(b.allocate(4096, "*"), Err(RegisterError::Publish { .. })));
    assert!(matches!(b.unregister(&first), Err(UnregisterError::Publish { .. })));
    assert_eq!((world.ledger().registrations, b.regions().len()), (before, 1));

    // It is back: peers see exactly the one region, and can use it.
    server.refusing.store(false, Ordering::Relaxed);
    let second = b.allocate(8192, "*").unwrap();
    let near = a.allocate(4096, "*").unwrap();
    let segment = a.open_segment("b").unwrap();
    let mut seen: Vec<_> = segment.buffers().iter().map(|buffer| buffer.addr).collect();
    let mut expected = vec![first.addr(), second.addr()];
    seen.sort_unstable();
    expected.sort_unstable();
    assert_eq!(seen, expected);
    a.submit(&segment, &[Transfer::read_into(&near, 0, first.addr(), 4096)]).unwrap().wait(LONG).unwrap();

    drop((a, b));
    assert!(server.kept.lock().unwrap().is_empty(), "nothing stays published");
}
