//! Bytes from and to a peer's control port: pure, no socket, no clock, no thread.
//!
//! One TCP connection carries one request and one reply, each one [`frame`]. The body is JSON: a [`hello`] (connect two
//! queue pairs, or acknowledge that they are ready), a segment descriptor ([`crate::metadata::descriptor`]), a
//! [`notify`] or a probe. Everything is parsed here once, completely; what comes out is typed and bounded, and what does
//! not parse is an error value, never a panic. The layout is written down in docs/wire.md.

pub mod extra;
pub mod frame;
pub mod hello;
pub mod json;
pub mod notify;
pub mod rejection;

pub use extra::{HelloExtra, Incarnation, NodeExtra, TcpPlace, Token};
pub use frame::{Frame, FrameDecoder, FrameError, Framing, MessageType};
pub use hello::{GidText, Hello, HelloError, NicPath, NicPathError};
pub use notify::{Notify, NotifyError, NotifyReply};
