//! The overlay's control plane: who belongs ([`membership`]) and who lets in ([`issuer`], [`token`]),
//! signed messages ([`wire`]), joining ([`bootstrap`]), telling others about links ([`advertiser`]), how
//! much is heard of whom ([`gossip`]), and who serves what ([`registry`]), on whose behalf ([`delegation`]), under names that belong to whom
//! ([`pins`]), and how providers say that they are ([`heartbeat`]).

pub mod advertiser;
pub mod bootstrap;
mod checked;
pub mod delegation;
pub mod gossip;
pub mod heartbeat;
pub mod issuer;
pub mod membership;
pub mod pins;
pub mod registry;
pub mod reunion;
pub mod shares;
pub mod token;
pub mod topology;
pub mod wire;

pub use advertiser::Advertiser;
pub use bootstrap::{BootstrapPolicy, KnownPeer, NetworkBootstrapper};
pub use checked::{CheckedSignatures, OpenedLinkState};
pub use delegation::Delegation;
pub use gossip::GossipManager;
pub use heartbeat::{Heartbeat, Load};
pub use issuer::{Issuer, Ledger, NotLetIn};
pub use membership::{Author, Credential, Membership, NetworkState, NotMember, Roster};
pub use pins::Pin;
pub use registry::{Accepted, RecordError, ServiceRegistry};
pub use token::Token;
pub use wire::{
    GossipMessage, LinkStateAdvertisement, Objective, PeerAddresses, ServiceKind, ServiceRecord,
    Signed, SyncRequest, SyncResponse, WireError,
};
