//! Nodes over a real etcd that is frozen, forgets keys, and comes back.

mod rig;
mod support;

use std::time::{Duration, Instant};

use moonrail_control::metadata::{MetadataUri, StoreClient, StoreError, StoreOptions};
use moonrail_control::{OpenError, PublishError, StartError};
use moonrail_datapath::nic::sim::{SimOptions, SimWorld};

use rig::{Options, node, soon, wait};
use support::EtcdServer;

struct Keys(StoreClient, tokio::runtime::Runtime);

impl Keys {
    fn of(server: &EtcdServer) -> Self {
        let Ok(MetadataUri::Store(uri)) = MetadataUri::parse(&server.endpoint()) else { panic!() };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        Self(StoreClient::open(&uri, &StoreOptions::default()).unwrap(), runtime)
    }

    fn names(&self) -> Vec<String> {
        let listed = self.1.block_on(self.0.list("mooncake/")).unwrap();
        listed.into_iter().map(|(key, _)| key).collect()
    }

    fn delete(&self, key: &str) {
        assert!(self.1.block_on(self.0.delete(key)).unwrap());
    }
}

#[test]
fn nodes_over_etcd_survive_its_moods() {
    let server = EtcdServer::start();
    let keys = Keys::of(&server);
    let world = SimWorld::real_time(1, SimOptions::default());
    let options = || {
        let mut options = Options::new(&server.endpoint());
        options.store.deadline = Duration::from_secs(2);
        options
    };
    let a = node(&world, 1, options().named("a")).unwrap();
    let b = node(&world, 2, options().named("b")).unwrap();
    let all = ["mooncake/ram/a", "mooncake/ram/b", "mooncake/rpc_meta/a", "mooncake/rpc_meta/b"];
    assert_eq!(keys.names(), all);
    let error = a.control.open_segment("nobody", None, soon()).unwrap_err();
    assert!(matches!(error, OpenError::NotFound { .. }) && error.to_string().contains("etcd at 127.0.0.1"), "{error}");
    a.control.open_segment("b", None, soon()).unwrap();
    a.wait_usable("b", 4);

    // Keys that vanish are put again.
    keys.delete("mooncake/rpc_meta/a");
    keys.delete("mooncake/ram/a");
    assert!(wait(|| keys.names() == all), "{:?}", keys.names());

    // A store that hangs fails what needs it, in time, and stops no rail.
    server.freeze();
    let began = Instant::now();
    let error = b.control.publish(vec![], soon()).unwrap_err();
    assert!(matches!(error, PublishError::Metadata(_)) && began.elapsed() < Duration::from_secs(8), "{error}");
    assert!(a.control.open_segment("c", None, soon()).is_err());
    assert!(a.control.open_segment("b", None, soon()).is_ok(), "from the cache");
    a.wait_usable("b", 4);
    server.thaw();
    assert!(wait(|| b.logged("this node is published again") == 1), "{:#?}", b.log.lock().unwrap());
    assert!(wait(|| keys.names() == all), "{:?}", keys.names());
    a.wait_usable("b", 4);

    a.stop();
    b.stop();
    assert!(wait(|| keys.names().is_empty()), "{:?}", keys.names());
}

/// Three nodes start under one name at the same moment: one of them runs, and the others are told who it is.
#[test]
fn of_nodes_that_race_for_one_name_one_wins_and_the_others_hear_of_it() {
    let server = EtcdServer::start();
    let world = SimWorld::real_time(2, SimOptions::default());
    for round in 0..4u8 {
        let start = |number: u8| {
            let (world, endpoint) = (world.clone(), server.endpoint());
            std::thread::spawn(move || node(&world, number, Options::new(&endpoint).named("a")))
        };
        let racing: Vec<_> = (0..3).map(|n| start(10 * round + n)).collect();
        let (won, lost): (Vec<_>, Vec<_>) = racing.into_iter().map(|t| t.join().unwrap()).partition(Result::is_ok);
        assert_eq!((won.len(), lost.len()), (1, 2));
        for winner in won.into_iter().flatten() {
            let address = winner.control.rpc_addr().clone();
            for error in lost.iter().filter_map(|loser| loser.as_ref().err()) {
                let StartError::Metadata(StoreError::NameTaken { name, owner }) = error else { panic!("{error:?}") };
                assert_eq!((name.as_str(), owner), ("a", &format!("{}:{}", address.ip_or_host_name, address.rpc_port)));
            }
            winner.stop();
        }
    }
}

/// A node that died without a word left its address. Its successor, at another port, does not wait for the lease to end.
#[test]
fn a_successor_takes_the_name_of_a_dead_node_at_once() {
    let server = EtcdServer::start();
    let keys = Keys::of(&server);
    let world = SimWorld::real_time(3, SimOptions::default());
    let dead = r#"{"ip_or_host_name":"127.0.0.1","rpc_port":1}"#;
    keys.1.block_on(keys.0.put("mooncake/rpc_meta/a", dead.as_bytes())).unwrap();
    let began = Instant::now();
    let a = node(&world, 1, Options::new(&server.endpoint()).named("a")).unwrap();
    println!("started in {:?}", began.elapsed());
    assert!(began.elapsed() < Duration::from_secs(8));
    assert_eq!(a.logged("an address of an earlier life of this node, where nobody answers"), 1);
    a.stop();
}
