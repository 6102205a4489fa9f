//! Where a node listens.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::StreamExt;
use libp2p::core::transport::ListenerId;
use libp2p::multiaddr::Protocol;
use libp2p::swarm::SwarmEvent;
use libp2p::{Multiaddr, Swarm};

use crate::net::NetError;
use crate::net::address::{innermost, ip_of};
use crate::net::behaviour::{Behaviour, BehaviourEvent};

/// How long the listeners may take to come up.
const LISTEN_TIMEOUT: Duration = Duration::from_secs(5);

/// Where a node listens, as multiaddresses with its peer id. Changes with the interfaces.
pub type Listening = Arc<Mutex<BTreeSet<String>>>;

/// Listens on all addresses and waits until each listener is up. Returns what else happened
/// meanwhile.
pub(super) async fn listen_on(
    swarm: &mut Swarm<Behaviour>,
    addresses: Vec<Multiaddr>,
    listening: &Listening,
) -> Result<Vec<SwarmEvent<BehaviourEvent>>, NetError> {
    let failed = |address: &Multiaddr, reason: String| NetError::Listen {
        address: address.to_string(),
        reason,
    };
    let mut waiting: HashMap<ListenerId, Multiaddr> = HashMap::new();
    for address in addresses {
        check_free(&address).map_err(|error| failed(&address, error.to_string()))?;
        let id = swarm.listen_on(address.clone());
        let id = id.map_err(|error| failed(&address, innermost(&error)))?;
        waiting.insert(id, address);
    }
    let mut early = Vec::new();
    let deadline = tokio::time::Instant::now() + LISTEN_TIMEOUT;
    while !waiting.is_empty() {
        let event = tokio::time::timeout_at(deadline, swarm.select_next_some()).await;
        match event {
            Ok(SwarmEvent::NewListenAddr { listener_id, address }) => {
                waiting.remove(&listener_id);
                heard(swarm, listening, address);
            }
            Ok(SwarmEvent::ListenerClosed { listener_id, reason: Err(error), .. }) => {
                if let Some(address) = waiting.get(&listener_id) {
                    return Err(failed(address, error.to_string()));
                }
            }
            Ok(event) => early.push(event),
            Err(_) => {
                let address = waiting.values().next().expect("the loop ends when it is empty");
                return Err(failed(address, "it did not come up".into()));
            }
        }
    }
    Ok(early)
}

/// A listener has a new address. What peers are told of providers is built from these.
pub(super) fn heard(swarm: &mut Swarm<Behaviour>, listening: &Listening, address: Multiaddr) {
    swarm.add_external_address(address.clone());
    let address = named(swarm, address);
    listening.lock().unwrap_or_else(PoisonError::into_inner).insert(address);
}

/// The address with this node's peer id. One at a relay may have it already.
fn named(swarm: &Swarm<Behaviour>, address: Multiaddr) -> String {
    let me = *swarm.local_peer_id();
    address.with_p2p(me).unwrap_or_else(|address| address).to_string()
}

/// Whether a TCP port is free. libp2p shares its ports, so it would not notice another node on it.
fn check_free(address: &Multiaddr) -> std::io::Result<()> {
    let port = address.iter().find_map(|part| match part {
        Protocol::Tcp(port) => Some(port),
        _ => None,
    });
    match (ip_of(address), port) {
        (Some(ip), Some(port)) if port != 0 => std::net::TcpListener::bind((ip, port)).map(|_| ()),
        _ => Ok(()),
    }
}

/// An address is no longer one of this node's.
pub(super) fn lost(swarm: &mut Swarm<Behaviour>, listening: &Listening, address: Multiaddr) {
    swarm.remove_external_address(&address);
    let address = named(swarm, address);
    listening.lock().unwrap_or_else(PoisonError::into_inner).remove(&address);
}
