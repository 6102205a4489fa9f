//! What is asked of multiaddresses.

use std::net::IpAddr;

use libp2p::multiaddr::Protocol;
use libp2p::{Multiaddr, PeerId};

/// The IP address in it: of a relay, when it leads over one, and `None` for a connection that came
/// over one, whose address is only the peer's id.
pub(super) fn ip_of(address: &Multiaddr) -> Option<IpAddr> {
    address.iter().find_map(|part| match part {
        Protocol::Ip4(ip) => Some(ip.into()),
        Protocol::Ip6(ip) => Some(ip.into()),
        _ => None,
    })
}

/// The peer that it leads to: the last part. One named before is a relay on the way.
pub(super) fn peer_of(address: &Multiaddr) -> Option<PeerId> {
    match address.iter().last() {
        Some(Protocol::P2p(peer)) => Some(peer),
        _ => None,
    }
}

/// The address without the peer that it leads to.
pub(super) fn without_peer(mut address: Multiaddr) -> Multiaddr {
    if peer_of(&address).is_some() {
        address.pop();
    }
    address
}

/// Whether it leads over another node.
pub(super) fn is_relayed(address: &Multiaddr) -> bool {
    address.iter().any(|part| part == Protocol::P2pCircuit)
}

/// Why an address cannot be dialled, in words for a person.
pub(super) fn check_dial(address: &Multiaddr) -> Result<(), &'static str> {
    match ip_of(address) {
        None => Err("it does not begin with /ip4/ or /ip6/ and names are not looked up"),
        Some(_) => Ok(()),
    }
}

/// Whether an address that a peer says of itself is of any use. It may lead over one relay.
pub(super) fn is_usable(address: &Multiaddr) -> bool {
    let relays = address.iter().filter(|part| *part == Protocol::P2pCircuit).count();
    relays <= 1
        && check_dial(address).is_ok()
        && !ip_of(address).is_some_and(|ip| ip.is_unspecified())
}

/// The cause at the bottom of an error, which is what the system said.
pub(super) fn innermost(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(deeper) = cause.source() {
        cause = deeper;
    }
    cause.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_peer_is_meant_and_those_before_are_relays() {
        let [relay, peer] = [PeerId::random(), PeerId::random()];
        let to: Multiaddr =
            format!("/ip4/10.0.0.1/tcp/4/p2p/{relay}/p2p-circuit/p2p/{peer}").parse().unwrap();
        assert_eq!(peer_of(&to), Some(peer));
        assert!(is_relayed(&to) && is_usable(&to));
        let twice = to.clone().with(Protocol::P2pCircuit).with(Protocol::P2p(relay));
        assert!(!is_usable(&twice));
        let listening = without_peer(to);
        assert_eq!(peer_of(&listening), None, "of the relay nothing is wanted");
        assert!(is_relayed(&listening));
        let direct: Multiaddr = format!("/ip4/10.0.0.1/tcp/4/p2p/{peer}").parse().unwrap();
        assert_eq!(peer_of(&direct), Some(peer));
        assert_eq!(without_peer(direct).to_string(), "/ip4/10.0.0.1/tcp/4");
        let inbound: Multiaddr = format!("/p2p/{peer}").parse().unwrap();
        assert_eq!(ip_of(&inbound), None);
        assert!(!is_usable(&inbound));
    }
}
