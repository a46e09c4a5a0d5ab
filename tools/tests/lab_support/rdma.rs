//! What the devices themselves count: bytes of a net device, packets of a queue pair, what processes have of them.

use std::collections::BTreeMap;

use serde_json::Value;

/// Bytes that a NIC's net device has sent and received.
pub(crate) fn netdev_bytes(nic: u32) -> u64 {
    ["tx_bytes", "rx_bytes"]
        .iter()
        .map(|counter| {
            let path = format!("/sys/class/net/eth{nic}/statistics/{counter}");
            let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path}: {e}"));
            text.trim().parse::<u64>().unwrap_or_else(|e| panic!("{path}: {e}"))
        })
        .sum()
}

/// What all processes of this node have of its devices, by the kernel's own count.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Resources {
    pub(crate) pd: i64,
    pub(crate) cq: i64,
    pub(crate) qp: i64,
    /// Of those, this process's that are ready to send.
    pub(crate) ready: i64,
    pub(crate) mr: i64,
}

impl Resources {
    /// As [`Resources::text`] has it, or `rdma resource show`, whose lines (one a device) are added up.
    pub(crate) fn parse(text: &str) -> Self {
        let sum = |what: &str| -> i64 {
            let words: Vec<&str> = text.split_whitespace().collect();
            words.windows(2).filter(|pair| pair[0] == what).filter_map(|pair| pair[1].parse::<i64>().ok()).sum()
        };
        Self { pd: sum("pd"), cq: sum("cq"), qp: sum("qp"), ready: sum("ready"), mr: sum("mr") }
    }

    pub(crate) fn text(&self) -> String {
        format!("pd {} cq {} mr {} qp {} ready {}", self.pd, self.cq, self.mr, self.qp, self.ready)
    }
}

/// What there is now.
pub(crate) fn resources() -> Resources {
    let ready = queue_pairs().len() as i64;
    Resources { ready, ..Resources::parse(&super::run("rdma", &["resource", "show"])) }
}

/// One connected queue pair of this process, as the kernel tells.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct QueuePair {
    /// `rxe0`
    pub(crate) device: String,
    /// Its number here.
    pub(crate) number: u64,
    /// Number of the next packet it sends, 24 bits: it rises by one with every packet of a WRITE or of a READ's answer.
    pub(crate) packet: u64,
    /// Number of the next packet it expects. While nothing moves, the `packet` of the other end.
    pub(crate) expects: u64,
}

/// The queue pairs of this process that are ready to send, by the kernel's own table.
pub(crate) fn queue_pairs() -> Vec<QueuePair> {
    let text = super::run("rdma", &["-j", "-d", "resource", "show", "qp"]);
    let all: Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("rdma resource show qp: {e}\n{text}"));
    // The kernel names the thread that made the queue pair.
    let ours = |id: u64| std::path::Path::new(&format!("/proc/self/task/{id}")).exists();
    let entries = all.as_array().cloned().unwrap_or_default();
    entries
        .iter()
        .filter(|qp| qp["pid"].as_u64().is_some_and(ours) && qp["type"] == "RC" && qp["state"] == "RTS")
        .map(|qp| QueuePair {
            device: qp["ifname"].as_str().unwrap_or_default().to_owned(),
            number: number(qp, "lqpn"),
            packet: number(qp, "sq-psn"),
            expects: number(qp, "rq-psn"),
        })
        .collect()
}

fn number(qp: &Value, key: &str) -> u64 {
    qp[key].as_u64().unwrap_or_else(|| panic!("the kernel tells no {key}: {qp}"))
}

/// As text for the other node: `expects=device` of each. Two devices use the same queue pair numbers; the first packet
/// numbers are drawn at random from 2^24, so they tell which end belongs to which.
pub(crate) fn devices_by_packet(all: &[QueuePair]) -> String {
    all.iter().map(|qp| format!("{}={}", qp.expects, qp.device)).collect::<Vec<_>>().join(" ")
}

/// A pair of NICs, ours and the peer's.
pub(crate) type Rail = (String, String);

/// Which rail each queue pair belongs to. Both nodes must have looked while nothing moved.
pub(crate) fn rails(ours: &[QueuePair], peers_devices: &str) -> Vec<Rail> {
    let device_of: BTreeMap<u64, &str> = peers_devices
        .split_whitespace()
        .filter_map(|pair| pair.split_once('='))
        .filter_map(|(packet, device)| Some((packet.parse().ok()?, device)))
        .collect();
    ours.iter()
        .map(|qp| {
            let peer = device_of.get(&qp.packet);
            let peer = peer.unwrap_or_else(|| panic!("{qp:?} has no other end in {peers_devices}"));
            (qp.device.clone(), (*peer).to_owned())
        })
        .collect()
}

/// Packets that each rail has sent between two looks at the table.
pub(crate) fn packets_by_rail(before: &[QueuePair], rails: &[Rail], after: &[QueuePair]) -> BTreeMap<Rail, u64> {
    let mut packets = BTreeMap::new();
    for (then, rail) in before.iter().zip(rails) {
        let now = after.iter().find(|qp| (&qp.device, qp.number) == (&then.device, then.number));
        let now = now.unwrap_or_else(|| panic!("{then:?} is gone: {after:?}"));
        // Numbers are 24 bits and wrap.
        *packets.entry(rail.clone()).or_insert(0) += now.packet.wrapping_sub(then.packet) & 0x00ff_ffff;
    }
    packets
}
