//! Message types 2 (an application's notification) and 3 (is anybody there).

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::json::{self, JsonError};

/// Body of a probe.
pub const PROBE: &[u8] = b"{}\n";
/// Answer to a probe. Any well-formed reply of type 3 counts as success, so a probe proves liveness and nothing else.
pub const PROBE_REPLY: &[u8] = b"{\"status\":\"success\"}\n";
/// Answer to a message this engine has no use for (type 1 while a store holds the metadata), as the stock engine's.
pub const NULL_REPLY: &[u8] = b"null\n";

/// A notification: two texts of the application's choice.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize)]
pub struct Notify {
    /// Sender's or subject's name.
    pub name: String,
    /// The message.
    #[serde(rename = "notify_msg")]
    pub message: String,
}

/// Answer to a notification.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum NotifyReply {
    /// Taken.
    Accepted,
    /// Not taken; a stock sender reports `Notify rejected by …`.
    Refused,
}

/// Bytes that are no notification.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NotifyError {
    /// Not JSON, or a member that is no text.
    #[error("the notification cannot be read: {0}")]
    Json(#[from] JsonError),
}

#[derive(Deserialize)]
struct Read<'a> {
    #[serde(borrow, default)]
    name: Option<&'a RawValue>,
    #[serde(default)]
    notify_msg: Option<&'a RawValue>,
}

impl Notify {
    /// Reads the body of a type-2 message; missing members are empty.
    ///
    /// # Errors
    /// Not an object, or an array or object where a text belongs.
    pub fn parse(body: &[u8]) -> Result<Self, NotifyError> {
        let read: Read<'_> = json::parse(body)?;
        Ok(Self { name: json::string("name", read.name)?, message: json::string("notify_msg", read.notify_msg)? })
    }

    /// The body of a type-2 message.
    pub fn encode(&self) -> Vec<u8> {
        json::line(self)
    }
}

impl NotifyReply {
    /// Reads the reply: an empty `notify_msg` is a refusal.
    ///
    /// # Errors
    /// As [`Notify::parse`].
    pub fn parse(body: &[u8]) -> Result<Self, NotifyError> {
        Ok(if Notify::parse(body)?.message.is_empty() { Self::Refused } else { Self::Accepted })
    }

    /// The body of the reply.
    pub fn encode(self) -> Vec<u8> {
        let message = match self {
            Self::Accepted => "success",
            Self::Refused => "",
        };
        Notify { name: String::new(), message: message.to_owned() }.encode()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn captured_exchange() {
        let request = b"{\"name\":\"nm\",\"notify_msg\":\"hello\"}\n";
        let notify = Notify::parse(request).unwrap();
        assert_eq!((notify.name.as_str(), notify.message.as_str()), ("nm", "hello"));
        assert_eq!(notify.encode(), request);
        assert_eq!(NotifyReply::Accepted.encode(), b"{\"name\":\"\",\"notify_msg\":\"success\"}\n");
        assert_eq!(NotifyReply::parse(&NotifyReply::Accepted.encode()), Ok(NotifyReply::Accepted));
        assert_eq!(NotifyReply::parse(&NotifyReply::Refused.encode()), Ok(NotifyReply::Refused));
    }

    #[test]
    fn missing_members_are_empty_and_arrays_are_refused() {
        assert_eq!(Notify::parse(b"{}"), Ok(Notify::default()));
        for bad in [&b"[]"[..], b"null", b"{\"name\":[]}", b"\xff", b""] {
            assert!(Notify::parse(bad).is_err());
        }
    }

    proptest! {
        #[test]
        fn any_two_texts_survive(name: String, message: String) {
            let notify = Notify { name, message };
            prop_assert_eq!(Notify::parse(&notify.encode()), Ok(notify));
        }

        #[test]
        fn no_mutation_panics(at in 0usize..40, byte: u8) {
            let mut body = b"{\"name\":\"nm\",\"notify_msg\":\"hello\"}\n".to_vec();
            let at = at % body.len();
            body[at] = byte;
            let _ = Notify::parse(&body);
        }
    }
}
