//! Bare programs over a pair of sockets: what TCP of this host gives without an engine. One blocks and moves whole batches, one never
//! sleeps and sends 64 bytes there and back.

use std::error::Error;
use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use moonrail::Op;

use crate::bare;
use crate::host::{Load, Way};

/// Socket buffers of the bare program: the best of what was tried on loopback.
const BUFFER: usize = 4 << 20;
/// What takes longer than this has failed.
const STUCK: Duration = Duration::from_secs(20);

fn pair() -> Result<[TcpStream; 2], Box<dyn Error>> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let near = TcpStream::connect(listener.local_addr()?)?;
    let (far, _) = listener.accept()?;
    for end in [&near, &far] {
        end.set_nodelay(true)?;
    }
    Ok([near, far])
}

/// A bare pair of sockets. Its far end does as the first byte of a batch says.
pub(crate) struct Bare {
    stream: TcpStream,
    buffer: Vec<u8>,
}

const BARE_WRITE: u8 = 1;
const BARE_READ: u8 = 2;

impl Bare {
    pub(crate) fn new() -> Result<Self, Box<dyn Error>> {
        let [stream, far] = pair()?;
        for end in [&stream, &far] {
            rustix::net::sockopt::set_socket_send_buffer_size(end, BUFFER)?;
            rustix::net::sockopt::set_socket_recv_buffer_size(end, BUFFER)?;
        }
        std::thread::Builder::new().name("bare-far".into()).spawn(move || serve(far))?;
        Ok(Self { stream, buffer: vec![7; (32 << 20) + 16] })
    }
}

/// Until the other end is gone.
fn serve(mut far: TcpStream) -> Option<()> {
    let mut buffer = vec![5; 32 << 20];
    loop {
        let mut head = [0; 9];
        far.read_exact(&mut head).ok()?;
        let len = usize::try_from(u64::from_le_bytes(head[1..].try_into().ok()?)).ok()?;
        if head[0] == BARE_WRITE {
            far.read_exact(buffer.get_mut(..len)?).ok()?;
            far.write_all(&[0; 8]).ok()?;
        } else {
            far.write_all(buffer.get(..len)?).ok()?;
        }
    }
}

impl Way for Bare {
    fn once(&mut self, load: Load, _: u64) -> Result<(), Box<dyn Error>> {
        let len = load.bytes() as usize;
        self.buffer[1..9].copy_from_slice(&load.bytes().to_le_bytes());
        if load.op == Op::Write {
            self.buffer[0] = BARE_WRITE;
            self.stream.write_all(&self.buffer[..9 + len])?;
            self.stream.read_exact(&mut self.buffer[..8])?;
        } else {
            self.buffer[0] = BARE_READ;
            self.stream.write_all(&self.buffer[..9])?;
            self.stream.read_exact(&mut self.buffer[..len])?;
        }
        Ok(())
    }
}

/// A pair whose ends never sleep. While it is not measured its far end does, as it would take a processor from who is.
pub(crate) struct Polled {
    stream: TcpStream,
    awake: Arc<AtomicBool>,
    far: JoinHandle<()>,
}

/// Bytes of a message, and of its answer.
const SMALL: usize = 64;

impl Polled {
    pub(crate) fn new() -> Result<Self, Box<dyn Error>> {
        let [stream, far] = pair()?;
        stream.set_nonblocking(true)?;
        far.set_nonblocking(true)?;
        let awake = Arc::new(AtomicBool::new(false));
        let body = {
            let awake = awake.clone();
            move || answer(far, &awake)
        };
        let far = std::thread::Builder::new().name("polled-far".into()).spawn(body)?;
        Ok(Self { stream, awake, far })
    }

    /// Nanoseconds of so many messages there and back, one after the other, without the clock's own.
    pub(crate) fn round_trips(&mut self, count: u64) -> Result<Vec<f64>, Box<dyn Error>> {
        self.awake.store(true, Ordering::Relaxed);
        self.far.thread().unpark();
        let clock = bare::clock();
        let times = (0..count).map(|_| Ok(self.round_trip()? - clock)).collect();
        self.awake.store(false, Ordering::Relaxed);
        times
    }

    fn round_trip(&mut self) -> Result<f64, Box<dyn Error>> {
        let from = Instant::now();
        self.stream.write_all(&[1; SMALL])?;
        let mut came = 0;
        let mut looks = 0u32;
        while came < SMALL {
            match self.stream.read(&mut [0; SMALL]) {
                Ok(0) => return Err("the far end of the bare pair is gone".into()),
                Ok(read) => came += read,
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => return Err(error.into()),
            }
            looks += 1;
            if looks.is_multiple_of(1 << 16) && from.elapsed() > STUCK {
                return Err("the far end of the bare pair does not answer".into());
            }
        }
        Ok(from.elapsed().as_nanos() as f64)
    }
}

/// Until the other end is gone.
fn answer(mut far: TcpStream, awake: &AtomicBool) {
    loop {
        match far.read(&mut [0; SMALL]) {
            Ok(0) => return,
            Ok(read) => {
                if far.write_all(&[2; SMALL][..read]).is_err() {
                    return;
                }
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                if !awake.load(Ordering::Relaxed) {
                    std::thread::park_timeout(Duration::from_millis(100));
                }
            }
            Err(_) => return,
        }
    }
}
