//! What stands in the place of [`verbs`](self) where the feature of that name is off: the same names, and no device, so that nothing
//! else has to ask whether it is there.

#[path = "verbs/report.rs"]
mod report;

use std::sync::Arc;

pub use report::{AccessProblem, DeviceSummary, LibraryMissing, ListError, OpenError, PortSummary};

use super::Nic;
use crate::units::PortNum;

/// There is none.
pub enum VerbsNic {}

impl VerbsNic {
    /// Says that there is none.
    ///
    /// # Errors
    /// [`OpenError::NotBuilt`], always.
    pub fn open(_: &str, _: PortNum) -> Result<Arc<dyn Nic>, OpenError> {
        Err(OpenError::NotBuilt)
    }
}

/// Says that there is none to list.
///
/// # Errors
/// [`ListError::NotBuilt`], always.
pub fn list() -> Result<Vec<DeviceSummary>, ListError> {
    Err(ListError::NotBuilt)
}

/// Nobody has looked.
pub fn namespaces_share_devices() -> Option<bool> {
    None
}
