//! The HTTP store's client against a server with the behaviour of Mooncake's, and against some that misbehave.

mod rig;

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use moonrail_control::metadata::http::HttpStore;
use moonrail_control::metadata::store::Fault;
use moonrail_control::metadata::{MetadataUri, StoreClient, StoreError, StoreOptions};
use moonrail_datapath::nic::sim::{SimOptions, SimWorld};

/// What a request was and what it is answered with.
struct Request {
    method: String,
    target: String,
    content_type: Option<String>,
    body: Vec<u8>,
}

type Answer = (u16, String);

/// Serves each connection on its own thread, several requests on one, until the test binary ends.
fn serve(answer: impl Fn(Request) -> Answer + Send + Sync + 'static) -> String {
    let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a loopback port");
    let base = format!("http://{}/metadata", listener.local_addr().expect("its address"));
    let answer = Arc::new(answer);
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let answer = Arc::clone(&answer);
            thread::spawn(move || while exchange(&stream, &*answer).is_some() {});
        }
    });
    base
}

fn exchange(stream: &TcpStream, answer: &dyn Fn(Request) -> Answer) -> Option<()> {
    let mut from = BufReader::new(stream);
    let mut line = String::new();
    from.read_line(&mut line).ok().filter(|n| *n > 0)?;
    let mut words = line.split_whitespace().map(str::to_owned);
    let (method, target) = (words.next()?, words.next()?);
    let (mut length, mut content_type) = (0, None);
    loop {
        let mut header = String::new();
        from.read_line(&mut header).ok()?;
        let Some((name, value)) = header.trim_end().split_once(": ") else { break };
        match name.to_ascii_lowercase().as_str() {
            "content-length" => length = value.parse().ok()?,
            "content-type" => content_type = Some(value.to_owned()),
            _ => {}
        }
    }
    let mut body = vec![0; length];
    from.read_exact(&mut body).ok()?;
    let (status, text) = answer(Request { method, target, content_type, body });
    let mut stream = stream;
    write!(stream, "HTTP/1.1 {status} Because\r\nContent-Length: {}\r\n\r\n{text}", text.len()).ok()
}

type Keys = Mutex<BTreeMap<String, Vec<u8>>>;

/// A server with the rules of the one in Mooncake's wheel.
fn mooncake() -> String {
    let keys = Keys::default();
    serve(move |request| by_the_rules(&keys, request))
}

fn by_the_rules(keys: &Keys, request: Request) -> Answer {
    let mut keys = keys.lock().unwrap();
    let Some(key) = request.target.strip_prefix("/metadata?key=").map(decoded).filter(|key| !key.is_empty()) else {
        return (400, "metadata key is required".to_owned());
    };
    match request.method.as_str() {
        "GET" => match keys.get(&key) {
            Some(value) => (200, String::from_utf8(value.clone()).unwrap()),
            None => (404, "metadata not found".to_owned()),
        },
        "PUT" if key.contains("rpc_meta") && keys.contains_key(&key) => {
            (400, "Duplicate rpc_meta key not allowed".to_owned())
        }
        "PUT" => {
            assert_eq!(request.content_type.as_deref(), Some("application/json"));
            assert!(!request.target[10..].contains(['/', ':']), "{} is not encoded", request.target);
            keys.insert(key, request.body);
            (200, "metadata updated".to_owned())
        }
        "DELETE" if keys.remove(&key).is_some() => (200, "metadata deleted".to_owned()),
        "DELETE" => (404, "metadata not found".to_owned()),
        _ => (405, "Method not allowed".to_owned()),
    }
}

/// One that goes away, and comes back at the same address.
struct Server {
    address: SocketAddr,
    keys: Arc<Keys>,
    gone: Arc<AtomicBool>,
    listening: Option<thread::JoinHandle<()>>,
}

impl Server {
    fn start() -> Self {
        let address = TcpListener::bind(("127.0.0.1", 0)).and_then(|l| l.local_addr()).expect("a loopback port");
        let mut server = Self { address, keys: Arc::default(), gone: Arc::default(), listening: None };
        server.come();
        server
    }

    fn base(&self) -> String {
        format!("http://{}/metadata", self.address)
    }

    /// Listens, with nothing of what it had.
    fn come(&mut self) {
        let listener = TcpListener::bind(self.address).expect("the same port");
        (self.keys, self.gone) = (Arc::default(), Arc::default());
        let (keys, gone) = (self.keys.clone(), self.gone.clone());
        self.listening = Some(thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if gone.load(Ordering::Relaxed) {
                    return;
                }
                let (keys, gone) = (keys.clone(), gone.clone());
                // A connection that was kept gets one more answer, and it is no key.
                let is_gone = gone.clone();
                let answer = move |request| {
                    if is_gone.load(Ordering::Relaxed) {
                        (503, "going".to_owned())
                    } else {
                        by_the_rules(&keys, request)
                    }
                };
                thread::spawn(move || while !gone.load(Ordering::Relaxed) && exchange(&stream, &answer).is_some() {});
            }
        }));
    }

    /// Nobody listens any more, and connections that are there break off.
    fn go(&mut self) {
        self.gone.store(true, Ordering::Relaxed);
        let _ = TcpStream::connect(self.address);
        self.listening.take().expect("it is there").join().unwrap();
    }

    fn keys(&self) -> Vec<String> {
        self.keys.lock().unwrap().keys().cloned().collect()
    }
}

fn decoded(text: &str) -> String {
    let mut out = Vec::new();
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        let mut digit = || bytes.next().and_then(|d| char::from(d).to_digit(16)).expect("two digits behind %") as u8;
        out.push(if byte == b'%' { digit() << 4 | digit() } else { byte });
    }
    String::from_utf8(out).expect("text")
}

fn store(base: &str) -> HttpStore {
    HttpStore::new(base, &StoreOptions::default()).expect("a client")
}

fn free_address() -> String {
    TcpListener::bind(("127.0.0.1", 0)).and_then(|l| l.local_addr()).expect("a loopback port").to_string()
}

#[test]
fn keys_come_back_as_they_were_put_and_go() {
    let store = store(&mooncake());
    let key = "mooncake/ram/10.0.0.1:12345 \u{fc}";
    assert_eq!(store.get(key), Ok(None));
    store.put(key, b"{\"a\":1}\n").unwrap();
    assert_eq!(store.get(key).unwrap().as_deref(), Some(&b"{\"a\":1}"[..]), "bodies have no newline");
    store.put(key, b"{}").unwrap();
    assert_eq!((store.delete(key), store.delete(key)), (Ok(true), Ok(false)));
}

#[test]
fn an_address_left_behind_blocks_until_it_is_deleted() {
    let store = store(&mooncake());
    let key = "mooncake/rpc_meta/n";
    store.put(key, b"{}").unwrap();
    assert_eq!(store.put(key, b"{}"), Err(StoreError::DuplicateRpcMeta { key: key.into() }));
    store.delete(key).unwrap();
    store.put(key, b"{}").unwrap();
}

#[tokio::test]
async fn the_driver_calls_it_like_any_other_store() {
    let Ok(MetadataUri::Store(uri)) = MetadataUri::parse(&mooncake()) else { panic!("an HTTP store") };
    let store = StoreClient::open(&uri, &StoreOptions::default()).unwrap();
    store.put("k", b"{}\n").await.unwrap();
    assert_eq!(store.get("k").await.unwrap().as_deref(), Some(&b"{}"[..]));
    assert!(matches!(store.watch("").await, Err(StoreError::Unsupported { .. })));
    assert_eq!((store.keep_alive_every(), store.delete("k").await), (None, Ok(true)));
}

#[test]
fn only_200_is_success() {
    for status in [201, 204, 302, 403, 500] {
        let store = store(&serve(move |_| (status, "why not".to_owned())));
        let error = store.put("k", b"{}").unwrap_err();
        assert!(matches!(&error, StoreError::HttpStatus { status: s, .. } if *s == status), "{error:?}");
        assert!(error.to_string().contains(&format!("http={status} body: ")), "{error}");
        assert_eq!(error.is_passing(), status == 500);
        assert!(store.get("k").is_err());
    }
}

#[test]
fn nobody_there_is_told_from_somebody_silent() {
    let address = free_address();
    let error = store(&format!("http://{address}/metadata")).get("k").unwrap_err();
    assert!(matches!(&error, StoreError::Unreachable { faults } if faults[0].1 == Fault::Refused), "{error:?}");

    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let silent = store(&format!("http://{}/metadata", listener.local_addr().unwrap()));
    let begin = Instant::now();
    let error = silent.get("k").unwrap_err();
    assert!(matches!(error, StoreError::Silent { .. }), "{error:?}");
    assert!(begin.elapsed() < HttpStore::TIMEOUT + Duration::from_secs(2), "{:?}", begin.elapsed());
}

#[test]
fn a_server_that_speaks_something_else_is_an_error() {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let _ = stream.write_all(b"220 mail.example ESMTP\r\n");
        }
    });
    assert!(store(&format!("http://{address}/metadata")).get("k").is_err());
    for bad in ["http://[bad/metadata", "http://", "http:///metadata"] {
        assert!(matches!(HttpStore::new(bad, &StoreOptions::default()), Err(StoreError::Options { .. })), "{bad}");
    }
}

#[test]
fn an_endless_value_ends() {
    let store = store(&serve(|_| (200, "x".repeat((32 << 20) + 2))));
    assert!(matches!(store.get("k"), Err(StoreError::TooLarge { .. })));
}

/// Runs the first test again in a process whose environment names a proxy that does not exist.
#[test]
fn a_proxy_in_the_environment_is_not_used() {
    let mut again = Command::new(std::env::current_exe().unwrap());
    again.args(["--exact", "keys_come_back_as_they_were_put_and_go"]);
    for variable in ["http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"] {
        again.env(variable, format!("http://{}", free_address()));
    }
    let output = again.env_remove("no_proxy").env_remove("NO_PROXY").output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
}

/// Mooncake's server keeps everything in its memory, nothing expires, and it tells nobody that it is another one.
#[test]
fn a_server_that_comes_back_with_nothing_is_filled_again() {
    let mut server = Server::start();
    let world = SimWorld::real_time(1, SimOptions::default());
    let named = |name: &str| rig::Options::new(&server.base()).named(name);
    let a = rig::node(&world, 1, named("a")).unwrap();
    let b = rig::node(&world, 2, named("b")).unwrap();
    let third = named("c");
    a.control.open_segment("b", None, rig::soon()).unwrap();
    a.wait_usable("b", 4);
    let all = server.keys();
    assert_eq!(all.len(), 4);
    server.go();
    let began = Instant::now();
    let error = a.control.open_segment("nobody", None, rig::soon()).unwrap_err().to_string();
    assert!(error.contains(&server.address.to_string()) && began.elapsed() < Duration::from_secs(8), "{error}");
    assert!(b.control.publish(vec![], rig::soon()).is_err());
    assert!(a.control.open_segment("b", None, rig::soon()).is_ok(), "from the cache");
    a.wait_usable("b", 4);
    server.come();
    let began = Instant::now();
    assert!(rig::wait(|| server.keys() == all), "{:?}", server.keys());
    println!("all keys are back after {:?}", began.elapsed());
    let c = rig::node(&world, 3, third).unwrap();
    c.control.open_segment("b", None, rig::soon()).unwrap();
    c.wait_usable("b", 4);
    assert!(a.control.rails().iter().all(|rail| rail.lives == 1), "nothing was connected anew");
    for node in [a, b, c] {
        node.stop();
    }
    assert!(server.keys().is_empty(), "{:?}", server.keys());
}
