//! The judgements, message by message.

use super::*;
use crate::handshake::{initiator, responder};
use moonrail_datapath::limits::QPS_PER_RAIL_MAX;
use proptest::prelude::*;

const OWN: &str = "a@x";
const PEER: &str = "b@y";

fn qpns(numbers: &[u32]) -> Vec<Qpn> {
    numbers.iter().map(|n| Qpn::new(*n).unwrap()).collect()
}

fn gid(last: u8) -> Gid {
    let mut bytes = [0; 16];
    (bytes[10], bytes[11], bytes[12], bytes[15]) = (0xff, 0xff, 10, last);
    Gid(bytes)
}

fn nic() -> OwnNic {
    OwnNic { path: OWN.into(), gid: gid(1), kind: GidKind::RoceV2, lid: Lid(0) }
}

fn end(numbers: &[u32]) -> OwnEnd {
    let psns = numbers.iter().map(|n| SqPsn::new(n + 1000).unwrap()).collect();
    OwnEnd { qpns: qpns(numbers), psns, mtu: Mtu::B4096 }
}

/// What B sends to A.
fn from_peer(numbers: &[u32], incarnation: Option<u64>) -> Hello {
    let node = NodeExtra { incarnation: incarnation.map(Incarnation), ..NodeExtra::default() };
    let nic = OwnNic { path: PEER.into(), gid: gid(2), ..nic() };
    let end = OwnEnd { mtu: Mtu::B1024, ..end(numbers) };
    let mut hello = hello(&nic, OWN, Some(&end), &node, false);
    if incarnation.is_none() {
        hello.extra = HelloExtra::default();
    }
    hello
}

fn theirs(numbers: &[u32], incarnation: Option<u64>) -> PeerEnd {
    peer_end(&from_peer(numbers, incarnation), None).unwrap()
}

fn asked(request: &Hello, progress: Progress<'_>) -> responder::Step {
    responder::judge(request, OWN, PEER, None, progress)
}

fn answered(reply: &Hello, ours: &OwnEnd, progress: Progress<'_>) -> initiator::Step {
    initiator::judge(reply, ours, OWN, PEER, None, progress)
}

#[test]
fn a_request_means_what_the_rails_progress_makes_of_it() {
    use responder::Step;
    let (ours, request) = (end(&[1, 2]), from_peer(&[11, 12], None));
    let same = theirs(&[11, 12], None);
    let before = theirs(&[7, 8], None);
    assert_eq!(asked(&request, Progress::Nothing), Step::Fresh(same.clone()));
    assert_eq!(asked(&request, Progress::Asked(&ours)), Step::Join(same.clone()));
    assert_eq!(asked(&request, Progress::Half(&ours, &same)), Step::Repeat { whole: false });
    assert_eq!(asked(&request, Progress::Whole(&ours, &same)), Step::Repeat { whole: false });
    assert_eq!(asked(&request, Progress::Whole(&ours, &before)), Step::Replace(same.clone()));
    let silent = Hello { ready_ack: None, ..request.clone() };
    assert_eq!(asked(&silent, Progress::Half(&ours, &same)), Step::Repeat { whole: true });
    let ack = Hello { ready_ack: Some(true), ..request.clone() };
    assert_eq!(asked(&ack, Progress::Half(&ours, &same)), Step::Ready);
    assert_eq!(asked(&ack, Progress::Whole(&ours, &same)), Step::Ready);
    assert_eq!(asked(&ack, Progress::Nothing), Step::Refuse(rejection::ACK_UNCONNECTED.into()));
    assert_eq!(asked(&ack, Progress::Asked(&ours)), Step::Refuse(rejection::ACK_UNCONNECTED.into()));
    assert_eq!(asked(&ack, Progress::Whole(&ours, &before)), Step::Refuse(rejection::ACK_STALE.into()));
}

#[test]
fn the_same_numbers_in_another_incarnation_are_other_queue_pairs() {
    let ours = end(&[1, 2]);
    let before = theirs(&[11, 12], Some(1));
    let step = asked(&from_peer(&[11, 12], Some(2)), Progress::Whole(&ours, &before));
    assert_eq!(step, responder::Step::Replace(theirs(&[11, 12], Some(2))));
    // We are connected to the first by its own hello, and our hello reached the second.
    let step = answered(&from_peer(&[11, 12], Some(2)), &ours, Progress::Half(&ours, &before));
    assert!(matches!(step, initiator::Step::Again(_)), "{step:?}");
}

#[test]
fn what_is_connected_to_an_end_that_is_gone_is_neither_joined_nor_kept() {
    let (ours, before) = (end(&[1, 2]), theirs(&[7, 8], Some(1)));
    let mut request = from_peer(&[11, 12], Some(1));
    let same = theirs(&[11, 12], Some(1));
    request.extra.peer_qpns = qpns(&[1, 2]);
    assert_eq!(asked(&request, Progress::Asked(&ours)), responder::Step::Join(same.clone()), "our hello was answered");
    assert_eq!(asked(&request, Progress::Half(&ours, &same)), responder::Step::Repeat { whole: false });
    request.extra.peer_qpns = qpns(&[3, 4]);
    let refused = responder::Step::Refuse(rejection::END_GONE.to_owned());
    for progress in [Progress::Nothing, Progress::Asked(&ours), Progress::Half(&ours, &before)] {
        assert_eq!(asked(&request, progress), refused, "{progress:?}");
    }
    // The other end of it: it was the peer's own hello that connected us, and the peer has given that up.
    let refusal = Hello::refuse(rejection::END_GONE.to_owned());
    let step = answered(&refusal, &ours, Progress::Half(&ours, &before));
    assert!(matches!(step, initiator::Step::Again(_)), "{step:?}");
    assert_eq!(answered(&refusal, &ours, Progress::Whole(&ours, &before)), initiator::Step::Ignore);
}

#[test]
fn with_different_counts_a_stock_peer_is_followed_and_of_two_moonrails_the_smaller() {
    use responder::Step;
    let ours = end(&[1, 2]);
    assert_eq!(asked(&from_peer(&[11], None), Progress::Asked(&ours)), Step::Fresh(theirs(&[11], None)));
    let three = from_peer(&[11, 12, 13], None);
    assert_eq!(asked(&three, Progress::Asked(&ours)), Step::Fresh(theirs(&[11, 12, 13], None)));
    let three = from_peer(&[11, 12, 13], Some(1));
    assert_eq!(asked(&three, Progress::Asked(&ours)), Step::Refuse(rejection::QP_COUNT.into()));
    for count in [0, QPS_PER_RAIL_MAX + 1] {
        let numbers: Vec<u32> = (0..count as u32).collect();
        assert_eq!(asked(&from_peer(&numbers, None), Progress::Nothing), Step::Refuse(rejection::QP_COUNT.into()));
    }
}

#[test]
fn a_reply_means_what_the_rails_progress_makes_of_it() {
    use initiator::Step;
    let (ours, reply) = (end(&[1, 2]), from_peer(&[11, 12], None));
    let (same, other) = (theirs(&[11, 12], None), theirs(&[7, 8], None));
    assert_eq!(answered(&reply, &ours, Progress::Asked(&ours)), Step::Connect(same.clone()));
    assert_eq!(answered(&reply, &ours, Progress::Half(&ours, &same)), Step::Acknowledge { acks: true });
    let old = Hello { ready_ack: None, ..reply.clone() };
    assert_eq!(answered(&old, &ours, Progress::Whole(&ours, &same)), Step::Acknowledge { acks: false });
    assert!(matches!(answered(&reply, &ours, Progress::Half(&ours, &other)), Step::Again(_)));
    assert_eq!(answered(&reply, &ours, Progress::Nothing), Step::Ignore);
    assert_eq!(answered(&reply, &ours, Progress::Asked(&end(&[3, 4]))), Step::Ignore, "about queue pairs of before");
    let stranger = Hello { local_nic_path: "c@y".into(), ..reply.clone() };
    assert!(matches!(answered(&stranger, &ours, Progress::Asked(&ours)), Step::Again(_)));
}

#[test]
fn a_refusal_comes_before_everything_else_it_says() {
    use initiator::Step;
    let ours = end(&[1, 2]);
    let refusal = Hello { reply_msg: "no".into(), ..from_peer(&[11, 12], None) };
    assert_eq!(answered(&refusal, &ours, Progress::Asked(&ours)), Step::Refused("no".into()));
    // Connected meanwhile by the peer's own hello: that one counts.
    let same = theirs(&[11, 12], None);
    assert_eq!(answered(&refusal, &ours, Progress::Half(&ours, &same)), Step::Ignore);
}

#[test]
fn both_ends_plan_the_same_path() {
    let options = RailOptions::default();
    let (a, b) = (end(&[1, 2]), theirs(&[11, 12], Some(5)));
    let plan_a = plan(&nic(), &a, &b, None, &options).unwrap();
    assert_eq!(plan_a.path_mtu, Mtu::B1024, "the smaller of the two");
    assert_eq!(plan_a.pairs[1].sq_psn.get(), 1002);
    assert_eq!(plan_a.pairs[1].rq_psn, RqPsn::from_peer(SqPsn::new(1012).unwrap()));
    let node = NodeExtra { incarnation: Some(Incarnation(1)), ..NodeExtra::default() };
    let own = hello(&nic(), PEER, Some(&a), &node, false);
    let peer_nic = OwnNic { path: PEER.into(), gid: gid(2), ..nic() };
    let peers_end = OwnEnd { mtu: Mtu::B1024, ..end(&[11, 12]) };
    let plan_b = plan(&peer_nic, &peers_end, &peer_end(&own, None).unwrap(), None, &options).unwrap();
    assert_eq!(plan_b.path_mtu, plan_a.path_mtu);
    assert_eq!(plan_b.pairs[1].rq_psn, RqPsn::from_peer(plan_a.pairs[1].sq_psn));
    assert_eq!(plan_a.pairs[1].rq_psn, RqPsn::from_peer(plan_b.pairs[1].sq_psn));
}

#[test]
fn towards_a_stock_peer_packet_numbers_are_zero_and_the_mtu_is_ours() {
    let options = RailOptions::default();
    let stock = theirs(&[11, 12], None);
    let plan_stock = plan(&nic(), &end(&[1, 2]), &stock, None, &options).unwrap();
    assert!(plan_stock.pairs.iter().all(|p| (p.rq_psn, p.sq_psn) == (RqPsn::STOCK, SqPsn::STOCK)));
    assert_eq!(plan_stock.path_mtu, Mtu::B4096);
    let tried = plan(&nic(), &end(&[1, 2]), &stock, Some(Mtu::B1024), &options).unwrap();
    assert_eq!(tried.path_mtu, Mtu::B1024);
    assert_eq!(plan(&nic(), &end(&[1]), &stock, None, &options), Err(rejection::QP_COUNT.to_owned()));
}

#[test]
fn a_gid_left_out_comes_from_the_descriptor() {
    let bare = Hello { local_gid: GidText::Absent, ..from_peer(&[11], None) };
    assert_eq!(peer_end(&bare, Some((gid(9), Lid(3)))).map(|end| (end.gid, end.lid)), Ok((gid(9), Lid(3))));
    assert_eq!(peer_end(&bare, None), Err(rejection::nic_not_in_descriptor(PEER)));
    let bad = Hello { local_gid: GidText::Malformed("zz".into()), ..bare };
    assert_eq!(peer_end(&bad, None), Err("Invalid peer GID: zz".to_owned()));
}

proptest! {
    /// Whatever two ends know of each other: a request that leads to a connection leads to one of equal lists.
    #[test]
    fn what_is_connected_has_equal_lists(
        ours in prop::collection::vec(0u32..40, 1..4), peer in prop::collection::vec(0u32..40, 0..10), moonrail: bool, ack: bool,
    ) {
        let ours = end(&ours);
        let mut request = from_peer(&peer, moonrail.then_some(1));
        request.ready_ack = Some(ack);
        match asked(&request, Progress::Asked(&ours)) {
            responder::Step::Join(theirs) => prop_assert_eq!(theirs.qpns.len(), ours.qpns.len()),
            responder::Step::Fresh(theirs) => prop_assert!((1..=QPS_PER_RAIL_MAX).contains(&theirs.qpns.len())),
            step => prop_assert!(matches!(step, responder::Step::Refuse(_)), "{:?}", step),
        }
    }
}
