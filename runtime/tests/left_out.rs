//! What a build without a feature says when it is asked for what was left out, and that the rest works: run by `cargo xtask check`
//! with `--no-default-features`; with all features there is nothing in here.

#[cfg(not(feature = "etcd"))]
#[test]
fn etcd_that_was_left_out_is_an_error_that_names_the_feature() {
    let built = moonrail::Engine::builder().metadata("etcd://127.0.0.1:2379").name("127.0.0.1").build();
    let e = built.err().expect("there is no client").to_string();
    assert!(e.contains("127.0.0.1:2379") && e.contains("feature `etcd`"), "{e}");
}

#[cfg(not(feature = "verbs"))]
#[test]
fn rdma_that_was_left_out_is_an_error_that_names_the_feature_where_it_is_asked_for() {
    let built = moonrail::Engine::builder().name("127.0.0.1").nics(["mlx5_0"]).build();
    let e = built.err().expect("there are no NICs").to_string();
    assert!(e.contains("mlx5_0") && e.contains("feature `verbs`"), "{e}");
}

#[cfg(not(feature = "verbs"))]
#[test]
fn without_rdma_two_engines_of_a_host_move_bytes_all_the_same() {
    let engine = || moonrail::Engine::builder().name("127.0.0.1").build().expect("an engine");
    let (a, b) = (engine(), engine());
    let (near, far) = (a.allocate(4096, "*").expect("memory"), b.allocate(4096, "*").expect("memory"));
    near.write(0, &[7; 4096]).expect("in range");
    let segment = a.open_segment(b.name()).expect("b");
    let batch = a.submit(&segment, &[moonrail::Transfer::write_from(&near, 0, far.addr(), 4096)]).expect("in range");
    batch.wait(std::time::Duration::from_secs(10)).expect("moved");
    let mut landed = [0; 4096];
    far.read(0, &mut landed).expect("in range");
    assert_eq!(landed, [7; 4096]);
}
