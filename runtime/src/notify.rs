//! Short messages between nodes, outside the data path.

/// A message that another node sent with [`crate::Engine::notify`] (or Mooncake's `genNotify`).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Notification {
    /// The topic the sender chose.
    pub name: String,
    /// The message.
    pub message: String,
}

impl From<moonrail_control::Notification> for Notification {
    fn from(received: moonrail_control::Notification) -> Self {
        Self { name: received.name, message: received.message }
    }
}
