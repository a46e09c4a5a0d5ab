//! Segments as text and as JSON.

use std::fmt::Write as _;
use std::time::Duration;

use moonrail_control::metadata::Protocol;
use serde_json::{Value, json};

use super::probe::Life;
use super::record::Record;
use crate::table::{Align, Table};
use crate::units::size;

/// Buffers shown of one segment; `--json` has all.
const BUFFERS_SHOWN: usize = 32;

/// One line a segment, and the reason of each that is not alive.
pub fn list(records: &[Record]) -> String {
    if records.is_empty() {
        return "no segment is registered\n".to_owned();
    }
    let mut table = Table::new(&[
        ("segment", Align::Left),
        ("node", Align::Left),
        ("engine", Align::Left),
        ("over", Align::Left),
        ("NICs", Align::Right),
        ("buffers", Align::Right),
        ("bytes", Align::Right),
        ("lease", Align::Right),
    ]);
    for record in records {
        let descriptor = record.descriptor();
        let number = |n: Option<usize>| n.map_or("-".to_owned(), |n| n.to_string());
        table.row([
            record.name.clone(),
            record.life.word().to_owned(),
            record.engine().to_owned(),
            over(record),
            number(descriptor.map(|d| d.devices.len())),
            number(descriptor.map(|d| d.buffers.len())),
            descriptor.map_or("-".to_owned(), |_| size(record.bytes())),
            lease(record.lease),
        ]);
    }
    let mut text = table.render(0);
    for record in records {
        let mut say = |what: &str| {
            let _ = writeln!(text, "{}: {what}", record.name);
        };
        if !matches!(record.life, Life::Answers) && record.life != Life::unprobed() {
            say(&record.life.to_string());
        }
        match &record.segment {
            None => say("an address without a segment: the node registered no memory, or did not end properly"),
            Some(Err(why)) => say(why),
            Some(Ok(_)) => {}
        }
    }
    text
}

/// Everything about one segment.
pub fn whole(record: &Record) -> String {
    let mut text = format!("{}\n", record.name);
    let mut line = |name: &str, value: &str| {
        let _ = writeln!(text, "  {name:<12}{value}");
    };
    line("node", &record.life.to_string());
    line(
        "handshake",
        &match &record.address {
            Some(Ok(meta)) => format!("{}:{}", meta.ip_or_host_name, meta.rpc_port),
            Some(Err(why)) => why.clone(),
            None => "nothing is registered".to_owned(),
        },
    );
    line(
        "lease",
        &record.lease.map_or_else(
            || "none: the keys stay until somebody deletes them".to_owned(),
            |left| format!("{} s unless renewed", left.as_secs()),
        ),
    );
    for held in &record.keys {
        line("key", &format!("{} ({})", held.key, size(held.value.len() as u64)));
    }
    let descriptor = match &record.segment {
        Some(Ok(descriptor)) => descriptor,
        Some(Err(why)) => {
            line("segment", why);
            return text;
        }
        None => {
            line("segment", "nothing is registered");
            return text;
        }
    };
    line("engine", record.engine());
    line("over", &over(record));
    line("written", &descriptor.timestamp);
    if let Some(incarnation) = descriptor.extra.incarnation {
        line("incarnation", &incarnation.to_string());
    }
    if descriptor.tcp_data_port > 0 && descriptor.protocol == Protocol::Tcp {
        line(
            "TCP data",
            &format!("port {} (protocol {})", descriptor.tcp_data_port, descriptor.tcp_proto_version.max(1)),
        );
    } else if let Some(place) = &descriptor.extra.tcp {
        line("TCP data", &format!("{}:{}", place.host, place.port));
    }
    if !descriptor.devices.is_empty() {
        let mut table =
            Table::new(&[("NIC", Align::Left), ("LID", Align::Right), ("MTU", Align::Right), ("GID", Align::Left)]);
        for device in &descriptor.devices {
            let mtu = descriptor.extra.path_mtus.get(&device.name).map_or("?".to_owned(), ToString::to_string);
            table.row([device.name.clone(), device.lid.to_string(), mtu, device.gid.to_string()]);
        }
        text.push_str(&table.render(2));
    }
    if !descriptor.buffers.is_empty() {
        let mut table = Table::new(&[
            ("buffer", Align::Right),
            ("location", Align::Left),
            ("address", Align::Right),
            ("bytes", Align::Right),
        ]);
        for (i, buffer) in descriptor.buffers.iter().take(BUFFERS_SHOWN).enumerate() {
            table.row([i.to_string(), buffer.name.clone(), format!("{:#x}", buffer.addr), size(buffer.length)]);
        }
        text.push_str(&table.render(2));
        if descriptor.buffers.len() > BUFFERS_SHOWN {
            let _ = writeln!(text, "  and {} more (--json has all)", descriptor.buffers.len() - BUFFERS_SHOWN);
        }
    }
    text
}

/// Everything about one segment.
pub fn json(record: &Record) -> Value {
    let read = |text: &Result<Value, String>| match text {
        Ok(value) => value.clone(),
        Err(why) => json!({ "problem": why }),
    };
    let segment = record.segment.as_ref().map(|segment| {
        segment.as_ref().map_err(Clone::clone).map(|d| {
            json!({
                "protocol": d.protocol.as_str(),
                "written": d.timestamp,
                "incarnation": d.extra.incarnation.map(|i| i.to_string()),
                "nics": d.devices.iter().map(|device| json!({
                    "name": device.name, "gid": device.gid.to_string(), "lid": device.lid.0,
                    "mtu": d.extra.path_mtus.get(&device.name).map(|mtu| mtu.bytes()),
                })).collect::<Vec<_>>(),
                "buffers": d.buffers.iter().map(|b| json!({
                    "location": b.name, "addr": b.addr, "bytes": b.length,
                })).collect::<Vec<_>>(),
                "bytes": record.bytes(),
            })
        })
    });
    let address = record.address.as_ref().map(|address| {
        address
            .as_ref()
            .map_err(Clone::clone)
            .map(|meta| json!({ "host": meta.ip_or_host_name, "port": meta.rpc_port }))
    });
    json!({
        "name": record.name,
        "state": record.life.word(),
        "why": record.life.to_string(),
        "engine": record.engine(),
        "lease_s": record.lease.map(|left| left.as_secs()),
        "keys": record.keys.iter().map(|held| held.key.as_str()).collect::<Vec<_>>(),
        "handshake": address.as_ref().map(read),
        "segment": segment.as_ref().map(read),
    })
}

/// The fabrics that the descriptor offers.
fn over(record: &Record) -> String {
    let Some(descriptor) = record.descriptor() else { return "-".to_owned() };
    let mut words = vec![descriptor.protocol.as_str()];
    if descriptor.extra.tcp.is_some() {
        words.push("tcp");
    }
    if descriptor.extra.shm.is_some() {
        words.push("shm");
    }
    words.join(",")
}

fn lease(left: Option<Duration>) -> String {
    left.map_or("none".to_owned(), |left| format!("{} s", left.as_secs()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::segments::record;
    use moonrail_control::metadata::{Catalogue, KeySpace, StoreOptions, StoreUri};

    /// What the store holds is shown, damaged values too, and nothing is wider than a terminal.
    #[test]
    fn keys_become_segments_and_damage_is_told() {
        let keys = KeySpace::new("");
        let uri = StoreUri::Memory("segments-text".into());
        let catalogue = Catalogue::open(&uri, &StoreOptions::default()).unwrap();
        let client = moonrail_control::metadata::StoreClient::open(&uri, &StoreOptions::default()).unwrap();
        let put = |key: String, value: &str| block_on(client.put(&key, value.as_bytes())).unwrap();
        put(keys.rpc_meta("10.0.0.1:9"), "{\"ip_or_host_name\":\"10.0.0.1\",\"rpc_port\":9}");
        put(keys.segment("10.0.0.2:9"), "not a descriptor");
        put("elsewhere/x".to_owned(), "1");
        let records = record::group(&keys, catalogue.list("").unwrap());
        let text = list(&records);
        assert_eq!(records.iter().map(|r| r.name.as_str()).collect::<Vec<_>>(), ["10.0.0.1:9", "10.0.0.2:9"]);
        assert!(text.contains("10.0.0.1:9: an address without a segment"), "{text}");
        assert!(text.contains("10.0.0.2:9: ") && text.lines().count() == 5, "{text}");
        assert!(whole(&records[0]).contains("10.0.0.1:9"), "{}", whole(&records[0]));
        let shown = json(&records[1]);
        assert!(shown["segment"]["problem"].as_str().is_some_and(|why| !why.is_empty()), "{shown:#}");
        assert_eq!(shown["handshake"], Value::Null);
    }

    /// A store in memory never waits.
    fn block_on<T>(future: impl Future<Output = T>) -> T {
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        match std::pin::pin!(future).poll(&mut context) {
            std::task::Poll::Ready(value) => value,
            std::task::Poll::Pending => unreachable!("a store in memory never waits"),
        }
    }
}
