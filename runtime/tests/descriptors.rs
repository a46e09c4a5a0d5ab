//! Many small regions: one line in the log, and no end of file descriptors. In a program of its own: the limit is the process's.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use moonrail::{Engine, Fabric, Region, Transfer};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

#[test]
fn memory_beyond_its_share_of_descriptors_is_told_once_and_carries_bytes_all_the_same() {
    const LIMIT: u64 = 256;
    let maximum = getrlimit(Resource::Nofile).maximum;
    setrlimit(Resource::Nofile, Rlimit { current: Some(LIMIT), maximum }).unwrap();
    let log: Arc<Mutex<Vec<String>>> = Arc::default();
    let engine = || {
        let lines = log.clone();
        let builder = Engine::builder().environment(|_| None).name("127.0.0.1").cores(1).pin_cores(false);
        let builder = builder.log(move |level, line| lines.lock().unwrap().push(format!("{level} {line}")));
        builder.fabrics([Fabric::Shm, Fabric::Tcp]).build().unwrap()
    };
    let (near, far) = (engine(), engine());
    let allocate = |_| far.allocate(4096, "*").unwrap();
    let theirs: Vec<Region> = (0..LIMIT / 2).map(allocate).collect();
    let ours = near.allocate(4096, "*").unwrap();
    ours.write(0, &[7; 64]).unwrap();
    let segment = near.open_segment(far.name()).unwrap();
    for region in [&theirs[0], &theirs[theirs.len() - 1]] {
        let transfer = Transfer::write_from(&ours, 0, region.addr(), 64);
        near.submit(&segment, &[transfer]).unwrap().wait(Duration::from_secs(20)).unwrap();
        let mut bytes = [0; 64];
        region.read(0, &mut bytes).unwrap();
        assert_eq!(bytes, [7; 64]);
    }
    let told = log.lock().unwrap().iter().filter(|line| line.contains("is no file that peers")).count();
    assert_eq!(told, 2, "once by each engine: {:?}", log.lock().unwrap());
}
