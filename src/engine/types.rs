//! The vocabulary of the engine: identities, names, time, routes.
//!
//! Every type here is parsed once at the boundary and valid from then on.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// Most hops (links) that a route may have on the wire.
///
/// The header spends 8 bytes a node; 8 hops keep it below 100 bytes. Path search
/// stops earlier, at [`PathPolicy::max_hops`](crate::engine::route::PathPolicy::max_hops).
pub const MAX_ROUTE_HOPS: usize = 8;

/// A node in datagram headers, tables and logs: the first 8 bytes of the SHA-256 of its
/// Ed25519 public key. Shown as 16 lower-case hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct NodeId(pub [u8; 8]);

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", u64::from_be_bytes(self.0))
    }
}

impl fmt::Debug for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl FromStr for NodeId {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        let wrong = || ParseError::NodeId(text.to_owned());
        if text.len() != 16 || !text.is_ascii() {
            return Err(wrong());
        }
        let mut bytes = [0; 8];
        for (index, byte) in bytes.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&text[2 * index..2 * index + 2], 16).map_err(|_| wrong())?;
        }
        Ok(Self(bytes))
    }
}

/// The Ed25519 public key of a node: its full identity, from which [`NodeId`] and the
/// libp2p peer id both follow.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PublicKey(pub [u8; 32]);

impl PublicKey {
    /// The short id of this key.
    pub fn node_id(&self) -> NodeId {
        let digest = Sha256::digest(self.0);
        let mut id = [0; 8];
        id.copy_from_slice(&digest[..8]);
        NodeId(id)
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "key of {}", self.node_id())
    }
}

/// A service name: dot-separated labels as in DNS (RFC 1035: letters, digits, inner hyphens,
/// at most 63 characters a label and 253 in all), kept in lower case.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ServiceName(String);

impl ServiceName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for ServiceName {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        let name = text.to_ascii_lowercase();
        let label_is_good = |label: &str| {
            (1..=63).contains(&label.len())
                && !label.starts_with('-')
                && !label.ends_with('-')
                && label.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        };
        if name.len() <= 253 && name.split('.').all(label_is_good) {
            Ok(Self(name))
        } else {
            Err(ParseError::ServiceName(text.chars().take(80).collect()))
        }
    }
}

impl TryFrom<String> for ServiceName {
    type Error = ParseError;

    fn try_from(text: String) -> Result<Self, ParseError> {
        text.parse()
    }
}

impl From<ServiceName> for String {
    fn from(name: ServiceName) -> Self {
        name.0
    }
}

impl fmt::Display for ServiceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for ServiceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A point in time: microseconds since the Unix epoch. The engine is handed these and never
/// reads a clock.
#[derive(
    Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default, Serialize, Deserialize,
)]
pub struct Timestamp(pub u64);

impl Timestamp {
    /// Microseconds since the Unix epoch.
    pub fn as_micros(self) -> u64 {
        self.0
    }

    /// Time elapsed since `earlier`; zero when `earlier` is later.
    pub fn since(self, earlier: Timestamp) -> Duration {
        Duration::from_micros(self.0.saturating_sub(earlier.0))
    }
}

impl std::ops::Add<Duration> for Timestamp {
    type Output = Timestamp;

    fn add(self, duration: Duration) -> Timestamp {
        let micros = u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
        Timestamp(self.0.saturating_add(micros))
    }
}

/// A source route: the nodes from the sender to the receiver, both included, without a loop.
///
/// Cheap to clone. Shown as `id>id>id`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Route(Arc<[NodeId]>);

impl Route {
    /// A route over these nodes.
    ///
    /// # Errors
    /// When there are fewer than 2 or more than `MAX_ROUTE_HOPS + 1` nodes, or one occurs twice.
    pub fn new(nodes: impl Into<Vec<NodeId>>) -> Result<Self, ParseError> {
        let nodes = nodes.into();
        if nodes.len() < 2 || nodes.len() > MAX_ROUTE_HOPS + 1 {
            return Err(ParseError::RouteLength(nodes.len()));
        }
        for (index, node) in nodes.iter().enumerate() {
            if nodes[..index].contains(node) {
                return Err(ParseError::RouteLoop(*node));
            }
        }
        Ok(Self(nodes.into()))
    }

    /// All nodes, source first.
    pub fn nodes(&self) -> &[NodeId] {
        &self.0
    }

    /// The first node.
    pub fn source(&self) -> NodeId {
        self.0[0]
    }

    /// The last node.
    pub fn destination(&self) -> NodeId {
        self.0[self.0.len() - 1]
    }

    /// The nodes between source and destination.
    pub fn relays(&self) -> &[NodeId] {
        &self.0[1..self.0.len() - 1]
    }

    /// Number of links, 1 to [`MAX_ROUTE_HOPS`].
    pub fn hop_count(&self) -> usize {
        self.0.len() - 1
    }

    /// The directed links, in order.
    pub fn links(&self) -> impl Iterator<Item = (NodeId, NodeId)> + '_ {
        self.0.windows(2).map(|pair| (pair[0], pair[1]))
    }

    /// Whether this is the way back over another route, from any node of it to its source.
    pub fn leads_back_over(&self, route: &Route) -> bool {
        self.0.iter().rev().eq(route.0.iter().take(self.0.len()))
    }

    /// The same nodes in the other direction.
    pub fn reversed(&self) -> Route {
        Route(self.0.iter().rev().copied().collect())
    }
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, node) in self.0.iter().enumerate() {
            if index > 0 {
                f.write_str(">")?;
            }
            write!(f, "{node}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl FromStr for Route {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        let nodes: Vec<NodeId> = text.split('>').map(str::parse).collect::<Result<_, _>>()?;
        Self::new(nodes)
    }
}

/// A tunnel of the node that opened it, 1 to 32,767. With that node's id it names the tunnel
/// everywhere.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct TunnelId(pub u16);

impl fmt::Display for TunnelId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// Text that is not what it should be. The message says what was expected.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseError {
    /// Not 16 hexadecimal digits.
    #[error("'{0}' is not a node id: expected 16 hexadecimal digits")]
    NodeId(String),
    /// Not a DNS-like name.
    #[error(
        "'{0}' is not a service name: expected labels of letters, digits and hyphens separated by \
         dots, such as byronwade.local"
    )]
    ServiceName(String),
    /// Too few or too many nodes.
    #[error("a route has 2 to {max} nodes, not {0}", max = MAX_ROUTE_HOPS + 1)]
    RouteLength(usize),
    /// A node occurs twice.
    #[error("the route passes {0} twice")]
    RouteLoop(NodeId),
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(byte: u8) -> NodeId {
        NodeId([byte; 8])
    }

    #[test]
    fn node_ids_survive_text() {
        let id = NodeId([0, 1, 2, 0xab, 0xcd, 0xef, 9, 255]);
        assert_eq!(id.to_string(), "000102abcdef09ff");
        assert_eq!(id.to_string().parse::<NodeId>(), Ok(id));
        for wrong in ["", "00", "000102abcdef09fg", "000102abcdef09ff0", "ééééé123"] {
            assert!(wrong.parse::<NodeId>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn service_names_are_dns_like() {
        assert_eq!("ByronWade.local".parse::<ServiceName>().unwrap().as_str(), "byronwade.local");
        let long = "a".repeat(64);
        for wrong in ["", ".", "a..b", "-a", "a-", "a b", "a_b", "é.local", long.as_str()] {
            assert!(wrong.parse::<ServiceName>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn routes_have_no_loop_and_a_bounded_length() {
        assert!(Route::new([node(1)]).is_err());
        assert_eq!(Route::new([node(1), node(2), node(1)]), Err(ParseError::RouteLoop(node(1))));
        let many: Vec<NodeId> = (0..=9).map(node).collect();
        assert_eq!(Route::new(&many[..]), Err(ParseError::RouteLength(10)));
        let route = Route::new(&many[..4]).unwrap();
        assert_eq!(route.hop_count(), 3);
        assert_eq!(route.relays(), &many[1..3]);
        assert_eq!(route.to_string().parse::<Route>(), Ok(route.clone()));
        assert_eq!(route.reversed().reversed(), route);
        let back = |nodes: &[u8]| Route::new(nodes.iter().map(|n| node(*n)).collect::<Vec<_>>());
        assert!(back(&[2, 1, 0]).unwrap().leads_back_over(&route));
        assert!(route.reversed().leads_back_over(&route));
        for other in [&[2, 1][..], &[0, 1, 2], &[4, 3, 2, 1, 0]] {
            assert!(!back(other).unwrap().leads_back_over(&route), "{other:?}");
        }
    }
}
