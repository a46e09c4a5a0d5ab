//! The small values around a descriptor: where a node's handshake port is, and the time of writing.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::wire::json::{self, JsonError};

/// Value under the `rpc_meta` key: the address of a node's handshake port.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Serialize)]
pub struct RpcMeta {
    /// IPv4 or IPv6 literal without brackets, or a DNS name.
    pub ip_or_host_name: String,
    /// TCP port of the handshake.
    pub rpc_port: u16,
}

#[derive(Deserialize)]
struct Read<'a> {
    #[serde(borrow, default)]
    ip_or_host_name: Option<&'a RawValue>,
    #[serde(default)]
    rpc_port: Option<&'a RawValue>,
}

impl RpcMeta {
    /// Reads the value; a port above 65535 is cut to 16 bits, as by the stock reader.
    ///
    /// # Errors
    /// Not an object, or a member of the wrong type.
    pub fn decode(text: &[u8]) -> Result<Self, JsonError> {
        let read: Read<'_> = json::parse(text)?;
        Ok(Self {
            ip_or_host_name: json::string("ip_or_host_name", read.ip_or_host_name)?,
            rpc_port: json::unsigned("rpc_port", read.rpc_port)? as u16,
        })
    }

    /// The value, compact and ended by a newline.
    pub fn encode(&self) -> Vec<u8> {
        json::line(self)
    }
}

/// `time` as descriptors carry it, in UTC (the stock engine writes local time; nobody compares it).
pub fn timestamp(time: SystemTime) -> String {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    let seconds = since.as_secs();
    let (year, month, day) = civil(seconds / 86_400);
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02}.{:06}", since.subsec_micros())
}

/// Gregorian date of a day counted from 1970-01-01 (the era arithmetic of Howard Hinnant's `civil_from_days`).
fn civil(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468; // since 0000-03-01
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 { march_month + 3 } else { march_month - 9 };
    (era * 400 + year_of_era + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_address_survives_and_no_mutation_panics(
            host in ".{0,40}", port: u16, end: prop::sample::Index,
            changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
        ) {
            let meta = RpcMeta { ip_or_host_name: host, rpc_port: port };
            let mut text = meta.encode();
            prop_assert_eq!(RpcMeta::decode(&text).unwrap(), meta);
            for (at, byte) in &changes {
                let at = at.index(text.len());
                text[at] = *byte;
            }
            text.truncate(end.index(text.len() + 1));
            let _ = RpcMeta::decode(&text);
        }
    }

    #[test]
    fn the_value_seen_in_a_store() {
        let text = b"{\"ip_or_host_name\":\"10.0.0.1\",\"rpc_port\":16009}\n";
        let meta = RpcMeta::decode(text).unwrap();
        assert_eq!(meta, RpcMeta { ip_or_host_name: "10.0.0.1".into(), rpc_port: 16009 });
        assert_eq!(meta.encode(), text);
        assert_eq!(RpcMeta::decode(b"{\"rpc_port\":65537}").unwrap().rpc_port, 1);
        assert!(RpcMeta::decode(b"{\"rpc_port\":\"1\"}").is_err());
    }

    #[test]
    fn times_are_written_as_upstream_writes_them() {
        for (seconds, text) in [
            (0, "1970-01-01 00:00:00.000000"),
            (951_782_400, "2000-02-29 00:00:00.000000"),
            (1_795_333_693, "2026-11-22 07:48:13.000000"),
        ] {
            assert_eq!(timestamp(UNIX_EPOCH + Duration::from_secs(seconds)), text);
        }
    }
}
