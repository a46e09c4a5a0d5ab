//! Who is where, and what memory they offer: the segments of a cluster and the store that holds them.
//!
//! Pure parts ([`keys`], [`descriptor`], [`matrix`], [`uri`], [`peer`]) say what is written under which key; the store
//! clients ([`store`] and the three behind it) move it. A cluster without a store asks each peer itself ([`peer`]).
//! An operator's tools look at a store as a whole ([`catalogue`]).

pub mod catalogue;
pub mod descriptor;
#[cfg(feature = "etcd")]
pub mod etcd;
#[cfg(not(feature = "etcd"))]
#[path = "no_etcd.rs"]
pub mod etcd;
mod hash_order;
pub mod http;
pub mod keys;
pub mod matrix;
pub mod memory;
pub mod peer;
pub mod rpc_meta;
pub mod store;
pub mod uri;

pub use catalogue::{Catalogue, Held};
pub use descriptor::{BufferEntry, DescriptorError, DeviceEntry, Protocol, SegmentDescriptor};
pub use keys::{Entry, KeySpace};
pub use matrix::{MatrixError, NicPreference, PriorityMatrix};
pub use rpc_meta::RpcMeta;
pub use store::{Change, Lease, StoreClient, StoreError, StoreOptions, Watch};
pub use uri::{MetadataUri, StoreUri, UriError};
