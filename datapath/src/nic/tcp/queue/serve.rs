//! Connections of peers: accepted, given to the core that serves the fewest, served, closed.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::io::Errno;
use rustix::net::SocketFlags;

use super::{Mail, SERVED, TcpQueue, change, clock_ms};
use crate::nic::tcp::served::{Fate, Served};
use crate::nic::tcp::socket;

/// Connections accepted in one poll at the most.
const ACCEPTS: usize = 16;
/// The listener is left alone for this long when there are no descriptors left.
const PAUSE_MS: u64 = 100;
impl TcpQueue {
    /// Lets a connection move.
    pub(super) fn serve(&mut self, slot: u32) {
        let Some(served) = self.served.at(slot) else { return };
        self.did += 1;
        self.uses += 1;
        served.used_at = self.uses;
        let was_ending = served.is_ending();
        let (fate, moved) = served.serve(&mut self.io, &self.view.ranges, &self.own.counters);
        self.moved += moved;
        if fate == Fate::Close {
            return self.close(slot);
        }
        if served.is_ending() && !was_ending {
            self.ending += 1;
            served.ending_since = Some(clock_ms());
        }
        let wanted = served.interest();
        if wanted != served.watched {
            let data = EventData::new_u64(SERVED | self.served.key(slot));
            let Some(served) = self.served.at(slot) else { return };
            if change(&self.epoll, served.fd(), data, wanted, &self.own.counters) {
                served.watched = wanted;
            } else {
                self.close(slot);
            }
        }
    }

    pub(super) fn close(&mut self, slot: u32) {
        if let Some(served) = self.served.remove(slot) {
            self.ending -= usize::from(served.ending_since.is_some());
            self.own.serving.fetch_sub(1, Ordering::Relaxed);
            self.nic.serving.fetch_sub(1, Ordering::Relaxed);
        }
    }

    pub(super) fn accept(&mut self) {
        for nth in 0..ACCEPTS {
            match rustix::net::accept_with(&self.nic.listener, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC) {
                Ok(fd) => self.welcome(fd),
                Err(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM) => {
                    // The system says so before it looks whether somebody waits: only the first is known to.
                    if nth == 0 && !self.evict() {
                        self.pause();
                    }
                    return;
                }
                // Nobody there any more, or one that gave up.
                Err(Errno::AGAIN) => return,
                Err(_) => {}
            }
        }
    }

    /// Without descriptors the listener would be ready for ever.
    fn pause(&mut self) {
        if self.paused_until.is_none() && epoll::delete(&self.epoll, &self.nic.listener).is_ok() {
            self.paused_until = Some(clock_ms() + PAUSE_MS);
        }
    }

    fn welcome(&mut self, fd: OwnedFd) {
        self.own.counters.accepted.add(1);
        socket::prepare_accepted(&fd, &self.nic.options);
        if self.nic.serving.fetch_add(1, Ordering::Relaxed) >= self.nic.options.connections && !self.evict() {
            self.nic.serving.fetch_sub(1, Ordering::Relaxed);
            return;
        }
        let least = self.nic.least_loaded().unwrap_or_else(|| self.own.clone());
        if Arc::ptr_eq(&least, &self.own) {
            return self.adopt_counted(fd);
        }
        match least.try_send(Mail::Serve(fd)) {
            Ok(()) => {
                least.serving.fetch_add(1, Ordering::Relaxed);
                least.ring();
            }
            Err(Mail::Serve(fd)) => self.adopt_counted(fd),
            Err(_) => {}
        }
    }

    fn adopt_counted(&mut self, fd: OwnedFd) {
        self.own.serving.fetch_add(1, Ordering::Relaxed);
        self.adopt(fd);
    }

    pub(super) fn adopt(&mut self, fd: OwnedFd) {
        let key = self.served.insert(Served::new(fd));
        let data = EventData::new_u64(SERVED | key.bits());
        let added = self.served.get(key).is_some_and(|s| epoll::add(&self.epoll, s.fd(), data, EventFlags::IN).is_ok());
        if added {
            // It usually has its first request with it.
            self.serve(key.slot());
        } else {
            self.close(key.slot());
        }
    }

    /// Closes the connection that was idle the longest; false if none is idle.
    fn evict(&mut self) -> bool {
        let idle = (0..self.served.slots()).filter_map(|slot| {
            let served = self.served.at(slot).filter(|s| s.is_idle())?;
            Some((served.used_at, slot))
        });
        let Some((_, slot)) = idle.min() else { return false };
        self.own.counters.evicted.add(1);
        self.close(slot);
        true
    }
}
