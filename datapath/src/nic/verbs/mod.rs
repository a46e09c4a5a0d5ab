//! Verbs: RDMA NICs through libibverbs, which is loaded at run time.
//!
//! An island of unsafe code: it calls C and hands it raw pointers. Nothing unsafe leaves the folder.
//!
//! - `library` is libibverbs there, and what do its return values mean
//! - `device` the open device and its protection domain; everything below owns one of them
//! - `mr`, `cq`, `qp` what is created on a device; `post` is the part of a queue pair that a core calls
//! - `events` what the device tells of itself
//! - `report` what can be told of a device, and what can be wrong with it
//! - `sysfs`, `inspect` what the kernel tells of every device, also of those we cannot open
//!
//! A child owns its parents by `Arc` (Context ← Pd ← Mr, Qp; Context ← Cq ← Qp), so whatever order values are dropped
//! in, verbs objects are destroyed children first, as ibv_dealloc_pd(3) and ibv_close_device(3) demand.
//!
//! Thread safety: libibverbs is documented as fully thread-safe, every call on every object (rdma-core,
//! Documentation/libibverbs.md). Each `unsafe impl Send` below leans on that.
#![allow(unsafe_code)]

mod cq;
mod device;
mod events;
mod inspect;
mod library;
mod mr;
mod post;
mod qp;
mod report;
mod sysfs;

use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use super::{
    Access, AsyncEvent, CompletionQueue, CqHandle, DeviceInfo, GidEntry, Nic, PortInfo, Qp, QpCaps, Registration,
    qp::Reset,
};
use crate::region::Memory;
use crate::units::PortNum;
use device::{Context, DeviceList, Pd};
use sysfs::Sysfs;

pub use inspect::{list, namespaces_share_devices};
pub use report::{AccessProblem, DeviceSummary, LibraryMissing, ListError, OpenError, PortSummary};

/// One port of one RDMA device, open.
pub struct VerbsNic {
    port: PortNum,
    info: DeviceInfo,
    context: Arc<Context>,
    pd: Arc<Pd>,
    /// Completion queues made so far: spreads them over the device's interrupt vectors.
    queues: AtomicU32,
}

impl VerbsNic {
    /// Opens the device called `name`, for its port `port` (from 1). Blocks for the length of a few system calls.
    ///
    /// Neither the port's state nor its GIDs are looked at: a NIC whose cable is out opens, and becomes usable later.
    pub fn open(name: &str, port: PortNum) -> Result<Arc<Self>, OpenError> {
        library::require()?;
        let devices = DeviceList::get().map_err(|source| OpenError::List { source })?;
        let sysfs = Sysfs::system();
        let Some(device) = devices.iter().find(|d| d.name() == name) else {
            let (name, present) = (name.to_owned(), sysfs.devices());
            return Err(if present.contains(&name) {
                let problem = AccessProblem::from_absence(&sysfs, &name);
                OpenError::Refused { name, problem }
            } else {
                OpenError::NoSuchDevice { name, present }
            });
        };
        let context = Context::open(&device).map_err(|error| OpenError::Refused {
            name: name.to_owned(),
            problem: AccessProblem::from_open(&sysfs, name, &error),
        })?;
        let failed = |call, source| OpenError::Query { name: name.to_owned(), call, source };
        let info = context.device_info(&sysfs).map_err(|e| failed("ibv_query_device", e))?;
        if port.0 == 0 || port.0 > info.ports {
            return Err(OpenError::PortOutOfRange { name: name.to_owned(), port, ports: info.ports });
        }
        library::set_nonblocking(context.async_fd()).map_err(|e| failed("fcntl on its event descriptor", e))?;
        let context = Arc::new(context);
        let pd = Arc::new(Pd::alloc(&context).map_err(|e| failed("ibv_alloc_pd", e))?);
        Ok(Arc::new(Self { port, info, context, pd, queues: AtomicU32::new(0) }))
    }
}

impl Nic for VerbsNic {
    fn name(&self) -> &str {
        &self.info.name
    }

    fn port_num(&self) -> PortNum {
        self.port
    }

    fn device(&self) -> &DeviceInfo {
        &self.info
    }

    fn query_port(&self) -> io::Result<PortInfo> {
        self.context.query_port(self.port)
    }

    fn gids(&self) -> io::Result<Vec<GidEntry>> {
        self.context.gids(self.port, &Sysfs::system())
    }

    fn create_cq(&self, depth: u32) -> io::Result<(Box<dyn CompletionQueue>, CqHandle)> {
        // Relaxed: only spreads the load, nothing is published by it.
        let nth = self.queues.fetch_add(1, Ordering::Relaxed);
        let (polled, object) = cq::create(&self.context, depth, nth)?;
        Ok((Box::new(polled), CqHandle(object)))
    }

    fn create_qp(&self, cq: &CqHandle, caps: QpCaps) -> io::Result<Qp<Reset>> {
        let Ok(cq) = Arc::clone(&cq.0).downcast::<cq::Cq>() else {
            return Err(library::invalid("the completion queue belongs to a NIC of another kind"));
        };
        Ok(Qp::new(Box::new(qp::VerbsQp::create(&self.pd, cq, caps)?)))
    }

    fn register(&self, memory: &Arc<Memory>, offset: u64, len: u64, access: Access) -> io::Result<Registration> {
        mr::register(&self.pd, memory, offset, len, access)
    }

    fn async_fd(&self) -> Option<RawFd> {
        Some(self.context.async_fd())
    }

    fn next_async_event(&self) -> io::Result<Option<AsyncEvent>> {
        events::next(&self.context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn opening_a_device_that_is_not_there_says_what_is() {
        // With or without libibverbs and hardware: no machine has a device of this name, and no path panics.
        let Err(error) = VerbsNic::open("moonrail-none", PortNum(1)) else { panic!("opened") };
        match error {
            OpenError::NoSuchDevice { ref name, .. } => {
                assert_eq!(name, "moonrail-none");
                assert!(error.to_string().starts_with("No matched device found: moonrail-none"), "{error}");
            }
            OpenError::LibraryMissing(_) | OpenError::List { .. } => {}
            other => panic!("{other}"),
        }
    }

    #[test]
    fn a_missing_device_is_told_with_those_present() {
        let error = OpenError::NoSuchDevice { name: "a".into(), present: vec!["b".into(), "c".into()] };
        assert_eq!(error.to_string(), "No matched device found: a; this machine has b, c");
    }
}
