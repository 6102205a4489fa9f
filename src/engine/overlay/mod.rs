//! The overlay's control plane: signed messages ([`wire`]), joining ([`bootstrap`]), telling
//! others about links ([`advertiser`]), and who serves what ([`registry`]).

pub mod advertiser;
pub mod bootstrap;
mod checked;
pub mod registry;
pub mod wire;

pub use advertiser::Advertiser;
pub use bootstrap::{BootstrapPolicy, NetworkBootstrapper};
pub use checked::{CheckedSignatures, OpenedLinkState};
pub use registry::{Accepted, RecordError, ServiceRegistry};
pub use wire::{
    GossipMessage, LinkStateAdvertisement, Objective, PeerAddresses, ServiceKind, ServiceRecord,
    Signed, SyncResponse, WireError,
};
