//! Peers that are other processes than before, under the same name: whole nodes in virtual time.

mod cluster;

use moonrail_datapath::error::Cause;
use moonrail_datapath::nic::Op;
use moonrail_datapath::units::Nanos;
use moonrail_datapath::work::{Quiescence, TransferStatus};

use cluster::Cluster;

/// Once a segment of the former life was used over the rails to the new one: where keys and addresses are given out alike, a
/// WRITE would have landed in memory that had nothing to do with it. Where not, each slice failed on another rail, and took
/// that down with whatever else it carried.
#[test]
fn what_is_asked_of_a_former_life_never_reaches_its_successor() {
    for seed in 1..=10 {
        let mut cluster = Cluster::new(seed, 2, 2, 1, seed % 2 == 0);
        let former = cluster.open(0, 1).unwrap();
        let first = cluster.submit(0, &former, Op::Write, 0, 1 << 20);
        assert!(cluster.run_until(Nanos::from_secs(5), |_| first.completion().is_done()));
        cluster.restart(1);
        // It is known to be another by its own hello, or by what it publishes.
        let opened = cluster.open(1, 0).unwrap();
        let back = cluster.submit(1, &opened, Op::Read, 0, 1 << 20);
        assert!(cluster.run_until(Nanos::from_secs(5), |_| back.completion().is_done()));
        assert!(cluster.run_until(Nanos::from_secs(3), |c| c.usable_rails(0) == 4), "{:?}", cluster.nodes[0].log);

        let lines = cluster.nodes[0].log.len();
        let works = [Op::Write, Op::Read].map(|op| cluster.submit(0, &former, op, 1 << 20, 1 << 20));
        let over = |_: &mut Cluster| works.iter().all(|work| work.completion().is_done());
        assert!(cluster.run_until(Nanos::from_millis(100), over), "seed {seed}: {:?}", cluster.nodes[0].log);
        for work in &works {
            let status = work.transfers()[0].status();
            let TransferStatus::Failed(error) = status else { panic!("seed {seed}: {status:?}") };
            assert_eq!((error.cause, work.quiescence()), (Cause::Restarted, Quiescence::NeverPosted), "seed {seed}");
        }
        assert_eq!(cluster.nodes[0].log.len(), lines, "nobody is to blame: {:?}", cluster.nodes[0].log);
        assert_eq!(cluster.usable_rails(0), 4, "no rail is lost for it");

        let present = cluster.open(0, 1).unwrap();
        let again = cluster.submit(0, &present, Op::Write, 0, 1 << 20);
        assert!(cluster.run_until(Nanos::from_secs(1), |_| again.completion().is_done()));
        assert_eq!(again.transfers()[0].status(), TransferStatus::Done, "seed {seed}: {:?}", cluster.nodes[0].log);
    }
}
