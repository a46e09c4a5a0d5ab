//! Memory leaves file descriptors to others, however much of it there is. In a program of its own: the limit is the process's.

use std::net::TcpListener;
use std::sync::Arc;

use moonrail_datapath::region::Memory;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

#[test]
fn small_regions_take_a_quarter_of_the_descriptors_and_the_rest_works_without() {
    const LIMIT: u64 = 200;
    let maximum = getrlimit(Resource::Nofile).maximum;
    setrlimit(Resource::Nofile, Rlimit { current: Some(LIMIT), maximum }).unwrap();
    let allocate = |_| Memory::allocate(4096).unwrap();
    let mut memory: Vec<Arc<Memory>> = (0..2 * LIMIT).map(allocate).collect();
    let files = |memory: &[Arc<Memory>]| memory.iter().filter(|memory| memory.shared_fd().is_some()).count() as u64;
    assert_eq!(files(&memory), LIMIT / 4);
    for (n, memory) in memory.iter().enumerate() {
        memory.write(4088, &n.to_ne_bytes()).unwrap();
    }
    let mut back = [0; 8];
    for (n, memory) in memory.iter().enumerate() {
        memory.read(4088, &mut back).unwrap();
        assert_eq!(usize::from_ne_bytes(back), n);
    }
    let sockets: Vec<_> = (0..LIMIT / 2).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
    drop(sockets);
    // Places that become free are used again.
    memory.clear();
    memory.extend((0..=LIMIT / 4).map(allocate));
    assert_eq!(files(&memory), LIMIT / 4);
}
