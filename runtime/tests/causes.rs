//! A program that wants to know what went wrong asks for the type, not for the words: each condition of the
//! troubleshooting page that needs no RDMA hardware, by `source()`. The others are in the lab.

mod pair;

use std::error::Error;
use std::net::TcpListener;
use std::sync::Arc;

use moonrail::error::below::{DialError, Fault, OpenError, StartError, StoreError, UriError};
use moonrail::{EngineBuilder, TlsFiles};
use moonrail_datapath::nic::sim::{SimOptions, SimWorld};
use pair::{builder, cluster, nics};

fn ready() -> EngineBuilder {
    let world = SimWorld::real_time(1, SimOptions::default());
    builder(&Arc::default()).nics_from(nics(&world, 1, 1).0).cores(1)
}

/// The first cause of this type in the chain of sources.
fn below<'a, T: Error + 'static>(error: &'a (dyn Error + 'static)) -> &'a T {
    let mut chain = std::iter::successors(error.source(), |cause| (*cause).source());
    chain.find_map(|cause| cause.downcast_ref::<T>()).unwrap_or_else(|| panic!("{error:?}"))
}

fn refused(builder: EngineBuilder) -> Box<dyn Error> {
    Box::new(builder.build().expect_err("it cannot start"))
}

#[test]
fn what_keeps_an_engine_from_starting_has_a_type() {
    for uri in ["redis://127.0.0.1:6379", "zookeeper://127.0.0.1"] {
        below::<UriError>(&*refused(ready().metadata(uri)));
    }
    let error = refused(ready().name("a").metadata("etcd://127.0.0.1:1"));
    let StartError::Metadata(StoreError::Unreachable { faults }) = below(&*error) else { panic!("{error}") };
    assert_eq!(faults[..], [("127.0.0.1:1".to_owned(), Fault::Refused)]);

    // Somebody who listens there, and is no etcd.
    let web = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = web.local_addr().unwrap();
    std::thread::spawn(move || {
        use std::io::{Read, Write};
        for mut stream in web.incoming().flatten() {
            let _ = stream.read(&mut [0; 1024]);
            let _ = stream.write_all(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n");
        }
    });
    let error = refused(ready().name("a").metadata(format!("etcd://{address}")));
    assert!(matches!(below(&*error), StartError::Metadata(StoreError::NotEtcd { .. })), "{error}");

    // What the store is to be reached with gets there: here, files that cannot be used.
    for (ca, words) in [(None, "give a CA file"), (Some("/no/such/file.pem".into()), "/no/such/file.pem")] {
        let tls = TlsFiles { ca, ..TlsFiles::default() };
        let error = refused(ready().name("a").metadata("etcd://127.0.0.1:1").metadata_tls(tls));
        let StartError::Metadata(StoreError::Options { why }) = below(&*error) else { panic!("{error}") };
        assert!(why.contains(words), "{why}");
    }

    let taken = TcpListener::bind("0.0.0.0:0").unwrap();
    let name = format!("127.0.0.1:{}", taken.local_addr().unwrap().port());
    let error = refused(ready().name(name).rpc_port_from_name(true).metadata("P2PHANDSHAKE"));
    assert!(matches!(below(&*error), StartError::Bind(_)), "{error}");

    let error = refused(ready().name("a").metadata(cluster()).publish_host("192.0.2.7"));
    assert!(matches!(below(&*error), StartError::Address(_)), "{error}");
    let error = refused(ready().name("a@b").metadata(cluster()));
    assert!(matches!(below(&*error), StartError::Name(_)), "{error}");
}

#[test]
fn what_keeps_a_segment_from_being_opened_has_a_type() {
    let engine = ready().name("a").metadata(cluster()).build().unwrap();
    let error = engine.open_segment("nobody").err().unwrap();
    assert!(matches!(below(&error), OpenError::NotFound { .. }), "{error}");

    let engine = ready().name("127.0.0.1").metadata("P2PHANDSHAKE").build().unwrap();
    let error = engine.open_segment("127.0.0.1:1").err().unwrap();
    assert!(matches!(below(&error), OpenError::Dial { source: DialError::Refused { .. }, .. }), "{error}");
}
