//! What the kernel counts on a port of an RDMA device: `counters` are the standard ones, `hw_counters` the driver's
//! (Documentation/ABI/stable/sysfs-class-infiniband).

use std::collections::BTreeMap;
use std::path::Path;

/// Counters whose names hold one of these count something bad.
const BAD: [&str; 11] = [
    "err",
    "discard",
    "drop",
    "downed",
    "recovery",
    "exceeded",
    "timeout",
    "out_of_sequence",
    "nak",
    "retry",
    "malformed",
];

/// `port_xmit_data` and `port_rcv_data` count in these (IBA 16.1.3.5).
const OCTETS: u64 = 4;

/// Counters by name.
pub type Counters = BTreeMap<String, u64>;

/// Every counter of a port; none if the driver has none.
pub fn read(sysfs: &Path, device: &str, port: u8) -> Counters {
    let folder = sysfs.join("class/infiniband").join(device).join("ports").join(port.to_string());
    let mut all = Counters::new();
    for kind in ["counters", "hw_counters"] {
        for entry in std::fs::read_dir(folder.join(kind)).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            // `lifespan` is how long the driver keeps a value, in milliseconds.
            let value = std::fs::read_to_string(entry.path()).ok().and_then(|text| text.trim().parse().ok());
            all.extend(value.filter(|_| name != "lifespan").map(|value| (name, value)));
        }
    }
    all
}

/// Whether a counter of this name counts something bad.
pub fn is_bad(name: &str) -> bool {
    BAD.iter().any(|word| name.contains(word))
}

/// Bytes sent and received, where the port counts them.
pub fn moved(counters: &Counters) -> Option<(u64, u64)> {
    let bytes = |name: &str| counters.get(name).map(|words| words.saturating_mul(OCTETS));
    bytes("port_xmit_data").zip(bytes("port_rcv_data"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_bad_is_known_by_its_name() {
        for bad in
            ["symbol_error", "port_rcv_errors", "rx_icrc_encapsulated_err", "local_ack_timeout_err", "duplicate_nak"]
        {
            assert!(is_bad(bad), "{bad}");
        }
        assert!(!is_bad("port_xmit_data") && !is_bad("sent_pkts") && !is_bad("link_up"));
    }

    #[test]
    fn both_folders_are_read_and_words_are_four_octets() {
        let root = std::env::temp_dir().join(format!("mr-port-counters-{}", std::process::id()));
        let port = root.join("class/infiniband/mlx5_0/ports/1");
        for (file, value) in [
            ("counters/port_xmit_data", "1000\n"),
            ("counters/port_rcv_data", "2000\n"),
            ("hw_counters/out_of_sequence", "3\n"),
            ("hw_counters/lifespan", "10\n"),
            ("hw_counters/odd", "N/A (no PMA)\n"),
        ] {
            std::fs::create_dir_all(port.join(file).parent().unwrap()).unwrap();
            std::fs::write(port.join(file), value).unwrap();
        }
        let counters = read(&root, "mlx5_0", 1);
        std::fs::remove_dir_all(&root).unwrap();
        assert_eq!(
            counters.keys().map(String::as_str).collect::<Vec<_>>(),
            ["out_of_sequence", "port_rcv_data", "port_xmit_data"]
        );
        assert_eq!(moved(&counters), Some((4000, 8000)));
        assert!(read(&root, "mlx5_0", 1).is_empty() && moved(&Counters::new()).is_none());
    }
}
