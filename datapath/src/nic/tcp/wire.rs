//! The bytes of the TCP data protocol: a stock node's two versions, and the list that two moonrail nodes use. Pure.
//!
//! # Header, 24 bytes, little-endian
//! | Offset | Size | Field |
//! |---|---|---|
//! | 0 | 8 | `size`: bytes of payload |
//! | 8 | 8 | `addr`: virtual address in the server's process |
//! | 16 | 1 | opcode |
//! | 17 | 7 | not looked at; zeros are sent |
//!
//! Opcode: `0x00` READ and `0x01` WRITE of version 1, `0x80` and `0x81` of version 2, `0xc0` and `0xc1` of a list. A
//! stock server takes every other value for a READ of version 1 or 2, and so do we; lists go to nobody who has not
//! offered to understand them.
//!
//! # Exchanges
//! | | client | server |
//! |---|---|---|
//! | READ 1 | header | payload |
//! | WRITE 1 | header, payload | nothing |
//! | READ 2 | header | status; payload if it is OK |
//! | WRITE 2 | header, payload | status, when the last byte is in its place |
//! | READ list | header, entries | list status; payloads of the entries before the first that was refused |
//! | WRITE list | header, entries, payloads | list status, when the last byte is in its place |
//!
//! # Status, 8 bytes
//! The code (u32: 0 OK, 1 refused: not inside one registered range), then `VTCM` (0x4d435456). After a refusal the
//! server serves nothing more on this connection and ends it.
//!
//! # List header, 24 bytes
//! | Offset | Size | Field |
//! |---|---|---|
//! | 0 | 4 | count of entries, 1 to 1024 |
//! | 4 | 4 | number of this list, for its status |
//! | 8 | 8 | sum of the entries' lengths |
//! | 16 | 1 | opcode, `0xc0` READ or `0xc1` WRITE |
//! | 17 | 1 | version of the list format: 1 |
//! | 18 | 6 | zeros |
//!
//! # List entry, 16 bytes
//! | Offset | Size | Field |
//! |---|---|---|
//! | 0 | 8 | `addr` |
//! | 8 | 8 | length, at least 1 |
//!
//! # List status, 16 bytes
//! A status as above; then u32: how many entries were served from the front (all, if it is OK; else the number of
//! the one that was refused); then u32: the number of the list.

use crate::units::RemoteAddr;

/// Bytes of a header, of either kind.
pub const HEADER: usize = 24;
/// Bytes of a status.
pub const STATUS: usize = 8;
/// Bytes of an entry of a list.
pub const ENTRY: usize = 16;
/// Bytes of the status of a list.
pub const LIST_STATUS: usize = 16;
/// Entries of a list at the most.
pub const LIST_MAX: u32 = 1024;
/// Version of the list format.
const LIST_VERSION: u8 = 1;

const MAGIC: u32 = 0x4d43_5456;
const WRITE: u8 = 0x01;
const WITH_STATUS: u8 = 0x80;
const LIST: u8 = 0xc0;

/// The range was not inside one registered range.
pub const REFUSED: u32 = 1;

/// What a client asks for first.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ask {
    /// One range.
    One {
        /// Client to server.
        write: bool,
        /// Version 2.
        status: bool,
        /// Where.
        addr: u64,
        /// Bytes.
        len: u64,
    },
    /// A list of them.
    List {
        /// Client to server.
        write: bool,
        /// Entries.
        count: u32,
        /// Its number.
        number: u32,
        /// Bytes of all payloads.
        bytes: u64,
    },
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_le_bytes)
}

impl Ask {
    /// Reads a header. `None`: a list of a form that this version does not know.
    pub fn parse(header: &[u8; HEADER]) -> Option<Self> {
        let opcode = header[16];
        if opcode | WRITE != LIST | WRITE {
            return Some(Self::One {
                write: opcode & !WITH_STATUS == WRITE,
                status: opcode & WITH_STATUS != 0,
                addr: u64_at(header, 8),
                len: u64_at(header, 0),
            });
        }
        let count = u32_at(header, 0);
        let known = header[17] == LIST_VERSION && (1..=LIST_MAX).contains(&count);
        known.then(|| Self::List {
            write: opcode & WRITE != 0,
            count,
            number: u32_at(header, 4),
            bytes: u64_at(header, 8),
        })
    }

    /// The other way.
    pub fn encode(self) -> [u8; HEADER] {
        let mut header = [0; HEADER];
        match self {
            Self::One { write, status, addr, len } => {
                header[..8].copy_from_slice(&len.to_le_bytes());
                header[8..16].copy_from_slice(&addr.to_le_bytes());
                header[16] = u8::from(write) | if status { WITH_STATUS } else { 0 };
            }
            Self::List { write, count, number, bytes } => {
                header[..4].copy_from_slice(&count.to_le_bytes());
                header[4..8].copy_from_slice(&number.to_le_bytes());
                header[8..16].copy_from_slice(&bytes.to_le_bytes());
                header[16] = LIST | u8::from(write);
                header[17] = LIST_VERSION;
            }
        }
        header
    }
}

/// An entry of a list.
pub fn entry(addr: RemoteAddr, len: u64) -> [u8; ENTRY] {
    let mut bytes = [0; ENTRY];
    bytes[..8].copy_from_slice(&addr.0.to_le_bytes());
    bytes[8..].copy_from_slice(&len.to_le_bytes());
    bytes
}

/// Address and length of an entry.
pub fn parse_entry(bytes: &[u8; ENTRY]) -> (u64, u64) {
    (u64_at(bytes, 0), u64_at(bytes, 8))
}

/// A status.
pub fn status(code: u32) -> [u8; STATUS] {
    (u64::from(MAGIC) << 32 | u64::from(code)).to_le_bytes()
}

/// The status of a list.
pub fn list_status(code: u32, served: u32, number: u32) -> [u8; LIST_STATUS] {
    let mut bytes = [0; LIST_STATUS];
    bytes[..STATUS].copy_from_slice(&status(code));
    bytes[8..12].copy_from_slice(&served.to_le_bytes());
    bytes[12..].copy_from_slice(&number.to_le_bytes());
    bytes
}

/// The code of a status; `None` for anything else.
pub fn parse_status(bytes: &[u8]) -> Option<u32> {
    (bytes.len() >= STATUS && u32_at(bytes, 4) == MAGIC).then(|| u32_at(bytes, 0))
}

/// Entries served and the number of the list, from the status of one.
pub fn parse_list_status(bytes: &[u8; LIST_STATUS]) -> (u32, u32) {
    (u32_at(bytes, 8), u32_at(bytes, 12))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Captured between two stock engines.
    #[test]
    fn headers_are_those_of_a_stock_engine() {
        let write = Ask::One { write: true, status: true, addr: 0x7f6a_b600_0000, len: 100 };
        let bytes = [100, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xb6, 0x6a, 0x7f, 0, 0, 0x81, 0, 0, 0, 0, 0, 0, 0];
        assert_eq!((write.encode(), Ask::parse(&bytes)), (bytes, Some(write)));
        let read = Ask::One { write: false, status: true, addr: 0x7f6f_7120_0000, len: 200_000 };
        let bytes = [0x40, 0x0d, 3, 0, 0, 0, 0, 0, 0, 0, 0x20, 0x71, 0x6f, 0x7f, 0, 0, 0x80, 0, 0, 0, 0, 0, 0, 0];
        assert_eq!((read.encode(), Ask::parse(&bytes)), (bytes, Some(read)));
        assert_eq!(status(0), [0, 0, 0, 0, 0x56, 0x54, 0x43, 0x4d]);
        assert_eq!(status(1), [1, 0, 0, 0, 0x56, 0x54, 0x43, 0x4d]);
        assert_eq!((parse_status(&status(7)), parse_status(&[0; 8]), parse_status(&[])), (Some(7), None, None));
    }

    #[test]
    fn what_is_not_a_write_is_a_read_and_padding_is_not_looked_at() {
        for (opcode, expected) in [(0, (false, false)), (2, (false, false)), (0x7f, (false, false)), (1, (true, false))]
        {
            for bit in [0, 0x80] {
                let mut header = [0xff; HEADER];
                header[16] = opcode | bit;
                let Some(Ask::One { write, status, .. }) = Ask::parse(&header) else { panic!("{opcode:#x}") };
                assert_eq!((write, status), (expected.0, bit != 0), "{opcode:#x}");
            }
        }
    }

    #[test]
    fn a_list_of_an_unknown_form_is_known_as_one() {
        let list = Ask::List { write: true, count: 3, number: 9, bytes: 77 };
        let bytes = list.encode();
        assert_eq!(Ask::parse(&bytes), Some(list));
        for (at, value) in [(17, 2), (0, 0), (1, 0xff)] {
            let mut wrong = bytes;
            wrong[at] = value;
            assert_eq!(Ask::parse(&wrong), None);
        }
        assert_eq!(parse_entry(&entry(RemoteAddr(5), 6)), (5, 6));
        assert_eq!(parse_list_status(&list_status(1, 2, 3)), (2, 3));
        assert_eq!(parse_status(&list_status(1, 2, 3)), Some(1));
    }
}
