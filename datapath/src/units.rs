//! Numbers of the fabric as types, so that two of them cannot be mixed up.
//!
//! Verbs calls take a dozen bare integers; the classic bugs of the field are two of them exchanged (the peer's packet
//! sequence number for our own, an lkey for an rkey, a GID index for a LID). Each has a type here, with its range.

use std::fmt;
use std::str::FromStr;

use crate::nic::Fabric;

macro_rules! number {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name(pub $inner);
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self.0)
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

number! {
    /// Key the local NIC asks for in a scatter/gather entry (ibv_sge.lkey). Never sent to a data path of a peer.
    Lkey(u32)
}
number! {
    /// Key a peer presents to reach our memory, or we to reach its memory (ibv_send_wr.wr.rdma.rkey).
    Rkey(u32)
}
number! {
    /// Index in a port's GID table. It moves when addresses come and go: choose by [`Gid`], look the index up again.
    GidIndex(u32)
}
number! {
    /// Local identifier of an InfiniBand port; 0 on RoCE.
    Lid(u16)
}
number! {
    /// Absolute virtual address in the peer's process (ibv_send_wr.wr.rdma.remote_addr).
    RemoteAddr(u64)
}
number! {
    /// Physical port of a device, counted from 1 (ibv_query_port).
    PortNum(u8)
}
number! {
    /// A local NIC of this engine: its place in the engine's list of NICs, fixed for the engine's life.
    NicId(u16)
}
number! {
    /// A peer's NIC: its place in that peer's list, fixed by the peer's NIC *name* for as long as we know the peer.
    PeerNicId(u16)
}
impl PeerNicId {
    /// The far end of a rail over shared memory. Like [`PeerNicId::TCP`] it is no NIC of the peer's list, and has no keys.
    pub const SHM: Self = Self(u16::MAX);
    /// The far end of a rail over TCP.
    pub const TCP: Self = Self(u16::MAX - 1);

    /// What carries the bytes of a rail to it.
    pub const fn fabric(self) -> Fabric {
        match self {
            Self::SHM => Fabric::Shm,
            Self::TCP => Fabric::Tcp,
            _ => Fabric::Rdma,
        }
    }
}
number! {
    /// A peer (one segment name), as control numbers them from 0. Never used again for another peer.
    PeerId(u32)
}
number! {
    /// A rail, one (local NIC, peer NIC) pair in one life; a repaired rail keeps its number.
    RailId(u32)
}
number! {
    /// A polling core of this engine, counted from 0.
    CoreId(u16)
}

const LOW_24: u32 = 0x00ff_ffff;

macro_rules! number24 {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
        pub struct $name(u32);
        impl $name {
            /// Takes the number if it fits in 24 bits.
            pub const fn new(value: u32) -> Option<Self> {
                if value <= LOW_24 { Some(Self(value)) } else { None }
            }
            /// The number, 0 to 2^24 - 1.
            pub const fn get(self) -> u32 {
                self.0
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

number24! {
    /// Queue pair number, 24 bits (IBA 3.5.1); goes into our hello as `qp_num`.
    Qpn
}
number24! {
    /// First packet sequence number our send queue will use, 24 bits: ibv_qp_attr.sq_psn and our hello's `sq_psn`.
    SqPsn
}
number24! {
    /// First packet sequence number our receive queue expects: the peer's [`SqPsn`], taken from its hello.
    /// Goes into ibv_qp_attr.rq_psn. The only ways to make one are the peer's word and the stock engine's constant 0.
    RqPsn
}

impl RqPsn {
    /// What a stock Mooncake peer sends: it starts every queue pair at 0 (handshake of that engine).
    pub const STOCK: Self = Self(0);

    /// The number the peer said that it will start with.
    pub const fn from_peer(theirs: SqPsn) -> Self {
        Self(theirs.0)
    }
}

impl SqPsn {
    /// What a stock Mooncake peer expects from us.
    pub const STOCK: Self = Self(0);
}

/// Path MTU in bytes, one of the five values of verbs (ibv_mtu).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Mtu {
    /// 256 bytes
    B256,
    /// 512 bytes
    B512,
    /// 1024 bytes
    B1024,
    /// 2048 bytes
    B2048,
    /// 4096 bytes
    B4096,
}

impl Mtu {
    /// All values, smallest first.
    pub const ALL: [Self; 5] = [Self::B256, Self::B512, Self::B1024, Self::B2048, Self::B4096];

    /// Size in bytes.
    pub const fn bytes(self) -> u32 {
        match self {
            Self::B256 => 256,
            Self::B512 => 512,
            Self::B1024 => 1024,
            Self::B2048 => 2048,
            Self::B4096 => 4096,
        }
    }

    /// From a size in bytes; `None` unless it is exactly one of the five.
    pub fn from_bytes(bytes: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|m| m.bytes() == bytes)
    }

    /// The value verbs uses (`IBV_MTU_256` = 1 to `IBV_MTU_4096` = 5).
    pub const fn verbs(self) -> u32 {
        match self {
            Self::B256 => 1,
            Self::B512 => 2,
            Self::B1024 => 3,
            Self::B2048 => 4,
            Self::B4096 => 5,
        }
    }

    /// From the value verbs uses; `None` for one this list does not know.
    pub fn from_verbs(value: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|m| m.verbs() == value)
    }

    /// The next smaller value, for a path that turned out not to carry this one.
    pub fn step_down(self) -> Option<Self> {
        Self::ALL.into_iter().rev().find(|m| *m < self)
    }
}

impl fmt::Display for Mtu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.bytes().fmt(f)
    }
}

/// Global identifier of a port: 16 bytes, an IPv6 address or an IPv4-mapped one on RoCE v2.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Gid(pub [u8; 16]);

/// Text that is not sixteen hexadecimal bytes joined by `:`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a GID: it takes 16 hexadecimal bytes joined by ':'")]
pub struct GidParseError {
    /// What was given.
    pub text: String,
}

impl Gid {
    /// The all-zero GID: an empty slot of the table, never an address.
    pub const ZERO: Self = Self([0; 16]);

    /// Whether every byte is 0.
    pub fn is_zero(self) -> bool {
        self == Self::ZERO
    }

    /// As an IPv6 address, for people.
    pub fn to_ipv6(self) -> std::net::Ipv6Addr {
        std::net::Ipv6Addr::from(self.0)
    }

    /// The IPv4 address of an IPv4-mapped GID (`::ffff:a.b.c.d`).
    pub fn to_ipv4(self) -> Option<std::net::Ipv4Addr> {
        self.to_ipv6().to_ipv4_mapped()
    }

    /// Whether it lies in fe80::/10.
    pub fn is_link_local(self) -> bool {
        self.0[0] == 0xfe && self.0[1] & 0xc0 == 0x80
    }
}

/// The wire form: 16 lower-case two-digit bytes joined by `:` (interop, handshake and segment descriptor).
impl fmt::Display for Gid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, byte) in self.0.iter().enumerate() {
            if i > 0 {
                f.write_str(":")?;
            }
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Gid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Gid({self})")
    }
}

/// Accepts what Mooncake's reader accepts: exactly 16 numbers ≤ ff, one or two digits, any case, no `::`.
impl FromStr for Gid {
    type Err = GidParseError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let refused = || GidParseError { text: text.chars().take(64).collect() };
        let mut bytes = [0u8; 16];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().ok_or_else(refused)?;
            let hex = (1..=2).contains(&part.len()) && part.bytes().all(|b| b.is_ascii_hexdigit());
            *byte = if hex { u8::from_str_radix(part, 16).map_err(|_| refused())? } else { return Err(refused()) };
        }
        if parts.next().is_some() { Err(refused()) } else { Ok(Self(bytes)) }
    }
}

/// Time in nanoseconds since a start that the process chose; monotonic. In simulation it is the virtual clock.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug)]
pub struct Nanos(pub u64);

impl Nanos {
    /// No time at all.
    pub const ZERO: Self = Self(0);
    /// Later than anything that happens.
    pub const FAR: Self = Self(u64::MAX);

    /// `n` microseconds.
    pub const fn from_micros(n: u64) -> Self {
        Self(n * 1_000)
    }

    /// `n` milliseconds.
    pub const fn from_millis(n: u64) -> Self {
        Self(n * 1_000_000)
    }

    /// `n` seconds.
    pub const fn from_secs(n: u64) -> Self {
        Self(n * 1_000_000_000)
    }

    /// This point and `span` more, at most [`Nanos::FAR`].
    #[must_use]
    pub const fn plus(self, span: Self) -> Self {
        Self(self.0.saturating_add(span.0))
    }

    /// Span from `earlier` to this point, 0 if it is not earlier.
    #[must_use]
    pub const fn since(self, earlier: Self) -> Self {
        Self(self.0.saturating_sub(earlier.0))
    }

    /// As the standard library's span.
    pub const fn to_duration(self) -> std::time::Duration {
        std::time::Duration::from_nanos(self.0)
    }

    /// From the standard library's span; more than 584 years become [`Nanos::FAR`].
    pub fn from_duration(span: std::time::Duration) -> Self {
        Self(u64::try_from(span.as_nanos()).unwrap_or(u64::MAX))
    }
}

/// What a completion gives back: the slot of the queue pair on its core, that slot's generation, and the request's
/// number on that queue pair. After an error only this, the status and the QPN mean anything (ibv_poll_cq(3)).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct WrId {
    /// Slot of the queue pair in its core's table.
    pub slot: u16,
    /// Which queue pair of that slot: raised each time the slot is used again.
    pub generation: u16,
    /// Number of the request on that queue pair, counted from 0, wrapping.
    pub sequence: u32,
}

impl WrId {
    /// As the 64 bits that verbs carries.
    pub const fn to_bits(self) -> u64 {
        (self.slot as u64) << 48 | (self.generation as u64) << 32 | self.sequence as u64
    }

    /// From the 64 bits that verbs carried.
    pub const fn from_bits(bits: u64) -> Self {
        Self { slot: (bits >> 48) as u16, generation: (bits >> 32) as u16, sequence: bits as u32 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_gid_survives_its_text(bytes: [u8; 16]) {
            prop_assert_eq!(Gid(bytes).to_string().parse(), Ok(Gid(bytes)));
        }

        #[test]
        fn no_text_panics_the_gid_parser(text in "\\PC{0,80}") {
            let _ = text.parse::<Gid>();
        }

        #[test]
        fn a_work_request_id_survives_its_bits(slot: u16, generation: u16, sequence: u32) {
            let id = WrId { slot, generation, sequence };
            prop_assert_eq!(WrId::from_bits(id.to_bits()), id);
        }
    }

    #[test]
    fn the_gid_texts_a_stock_peer_accepts_and_refuses() {
        let loose: Gid = "0:0:0:0:0:0:0:0:0:0:FF:FF:A:0:0:1".parse().unwrap();
        assert_eq!(loose.to_string(), "00:00:00:00:00:00:00:00:00:00:ff:ff:0a:00:00:01");
        for bad in
            ["", "::1", "00:", "0:0:0:0:0:0:0:0:0:0:0:0:0:0:0:0:0", "0:0:0:0:0:0:0:0:0:0:0:0:0:0:0:100", "fe80::1"]
        {
            assert!(bad.parse::<Gid>().is_err(), "{bad}");
        }
    }

    #[test]
    fn numbers_of_24_bits_refuse_a_25th() {
        assert!(Qpn::new(0x00ff_ffff).is_some());
        assert!(Qpn::new(0x0100_0000).is_none());
    }

    #[test]
    fn mtu_steps_down_to_the_smallest_and_ends() {
        let mut seen = vec![Mtu::B4096];
        while let Some(next) = seen[seen.len() - 1].step_down() {
            seen.push(next);
        }
        assert_eq!(seen.iter().map(|m| m.bytes()).collect::<Vec<_>>(), [4096, 2048, 1024, 512, 256]);
    }
}
