//! A proxy of one TCP port that keeps what passes, both ways.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;

/// What passed on one connection.
#[derive(Clone, Default, Debug)]
pub(crate) struct Taken {
    /// From whoever connected.
    pub(crate) request: Vec<u8>,
    /// From whoever listens.
    pub(crate) reply: Vec<u8>,
}

/// The proxy: it listens on a port of its own and connects to another.
pub(crate) struct Recorder {
    pub(crate) port: u16,
    taken: Arc<Mutex<Vec<Arc<Mutex<Taken>>>>>,
}

impl Recorder {
    pub(crate) fn of(to: (&str, u16)) -> Self {
        let to = (to.0.to_owned(), to.1);
        let listener = TcpListener::bind("0.0.0.0:0").expect("a port");
        let own = listener.local_addr().expect("bound").port();
        let taken = Arc::<Mutex<Vec<_>>>::default();
        let into = Arc::clone(&taken);
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let Ok(server) = TcpStream::connect((to.0.as_str(), to.1)) else { continue };
                let one = Arc::<Mutex<Taken>>::default();
                into.lock().expect("no panic").push(Arc::clone(&one));
                pass(&client, &server, Arc::clone(&one), |taken| &mut taken.request);
                pass(&server, &client, one, |taken| &mut taken.reply);
            }
        });
        Self { port: own, taken }
    }

    /// Every connection so far, in order.
    pub(crate) fn taken(&self) -> Vec<Taken> {
        self.taken.lock().expect("no panic").iter().map(|one| one.lock().expect("no panic").clone()).collect()
    }
}

fn pass(from: &TcpStream, to: &TcpStream, taken: Arc<Mutex<Taken>>, side: fn(&mut Taken) -> &mut Vec<u8>) {
    let (mut from, mut to) = (from.try_clone().expect("a handle"), to.try_clone().expect("a handle"));
    thread::spawn(move || {
        let mut buffer = vec![0; 1 << 16];
        while let Ok(n @ 1..) = from.read(&mut buffer) {
            side(&mut taken.lock().expect("no panic")).extend_from_slice(&buffer[..n]);
            if to.write_all(&buffer[..n]).is_err() {
                break;
            }
        }
        let _ = to.shutdown(Shutdown::Write);
    });
}
