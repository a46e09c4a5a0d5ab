//! What a simulated device tells by itself, and the descriptor that shows it to whoever sleeps.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::event::{EventfdFlags, eventfd};

use crate::nic::AsyncEvent;

/// Events of one device that nobody has taken yet.
pub(super) struct AsyncEvents {
    waiting: VecDeque<AsyncEvent>,
    shown: Option<Arc<OwnedFd>>,
}

impl AsyncEvents {
    /// Those of a device in virtual time, where nobody sleeps.
    pub(super) fn unseen() -> Self {
        Self { waiting: VecDeque::new(), shown: None }
    }

    /// Those of a device that has a descriptor for them, as one made of hardware; none where the process has none left: then
    /// whoever waits has to ask.
    pub(super) fn shown() -> Self {
        let fd = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).ok();
        Self { waiting: VecDeque::new(), shown: fd.map(Arc::new) }
    }

    /// Readable while there are some.
    pub(super) fn fd(&self) -> Option<Arc<OwnedFd>> {
        self.shown.clone()
    }

    pub(super) fn push(&mut self, event: AsyncEvent) {
        self.waiting.push_back(event);
        if let Some(fd) = &self.shown {
            // A full counter (EAGAIN) means that it is readable already.
            let _ = rustix::io::write(fd, &1u64.to_ne_bytes());
        }
    }

    pub(super) fn next(&mut self) -> Option<AsyncEvent> {
        let event = self.waiting.pop_front();
        if let (true, Some(fd)) = (self.waiting.is_empty(), &self.shown) {
            let _ = rustix::io::read(fd, &mut [0u8; 8]);
        }
        event
    }
}
