//! What is asked of multiaddresses.

use std::net::IpAddr;

use libp2p::multiaddr::Protocol;
use libp2p::{Multiaddr, PeerId};

/// The IP address in it.
pub(super) fn ip_of(address: &Multiaddr) -> Option<IpAddr> {
    address.iter().find_map(|part| match part {
        Protocol::Ip4(ip) => Some(ip.into()),
        Protocol::Ip6(ip) => Some(ip.into()),
        _ => None,
    })
}

/// The peer that it names.
pub(super) fn peer_of(address: &Multiaddr) -> Option<PeerId> {
    address.iter().find_map(|part| match part {
        Protocol::P2p(peer) => Some(peer),
        _ => None,
    })
}

/// Why an address cannot be dialled, in words for a person.
pub(super) fn check_dial(address: &Multiaddr) -> Result<(), &'static str> {
    match ip_of(address) {
        None => Err("it does not begin with /ip4/ or /ip6/ and names are not looked up"),
        Some(_) => Ok(()),
    }
}

/// Whether an address that a peer says of itself is of any use.
pub(super) fn is_usable(address: &Multiaddr) -> bool {
    check_dial(address).is_ok() && !ip_of(address).is_some_and(|ip| ip.is_unspecified())
}

/// The cause at the bottom of an error, which is what the system said.
pub(super) fn innermost(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(deeper) = cause.source() {
        cause = deeper;
    }
    cause.to_string()
}
