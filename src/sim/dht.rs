//! The DHT of a world: records lie with the nodes whose ids are closest to the name, and are lost
//! with them.
//!
//! An operation takes a fixed time and finds the closest living nodes of its side of the network.
//! Left out: routing tables that name nodes long gone, look-ups that end early, and records that
//! holders pass on to newcomers by themselves; a name's records move to who is closest now only when
//! their provider publishes again.

use std::collections::BTreeMap;

use sha2::{Digest, Sha256};

use super::World;
use crate::engine::types::ServiceName;

/// Nodes that hold a record: the k of Kademlia (Maymounkov and Mazières, 2002), as in `net`.
const HOLDERS: usize = 20;

/// What a node holds for others: for each name the newest record of each provider.
pub(super) type Held = BTreeMap<ServiceName, BTreeMap<usize, Vec<u8>>>;

impl World {
    /// Stores a record of a provider.
    pub(super) fn dht_put(&mut self, provider: usize, name: &ServiceName, bytes: &[u8]) {
        for holder in self.closest(provider, name) {
            let records = self.nodes[holder].held.entry(name.clone()).or_default();
            records.insert(provider, bytes.to_vec());
        }
    }

    /// Searches the records of a name.
    pub(super) fn dht_get(&self, seeker: usize, name: &ServiceName) -> Vec<Vec<u8>> {
        let holders = self.closest(seeker, name).into_iter();
        let held = holders.filter_map(|holder| self.nodes[holder].held.get(name)).flatten();
        let found: BTreeMap<(usize, &Vec<u8>), ()> =
            held.map(|(provider, bytes)| ((*provider, bytes), ())).collect();
        found.into_keys().map(|(_, bytes)| bytes.clone()).collect()
    }

    /// The living nodes that are closest to a name (XOR), as a node sees them; itself alone when it is
    /// connected to nobody.
    fn closest(&self, from: usize, name: &ServiceName) -> Vec<usize> {
        if self.nodes[from].connected.is_empty() {
            return vec![from];
        }
        let hash = Sha256::digest(name.as_str());
        let distance = |node: usize| {
            let id = self.id(node).0;
            std::array::from_fn::<u8, 8, _>(|byte| id[byte] ^ hash[byte])
        };
        let living = |node: &usize| self.is_running(*node) && !self.is_parted(from, *node);
        let mut nodes: Vec<([u8; 8], usize)> =
            (0..self.nodes.len()).filter(living).map(|node| (distance(node), node)).collect();
        nodes.sort_unstable();
        nodes.truncate(HOLDERS);
        nodes.into_iter().map(|(_, node)| node).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::engine::Intervals;
    use crate::engine::route::PathPolicy;
    use crate::engine::types::Timestamp;
    use crate::sim::Space;

    #[test]
    fn a_record_is_lost_with_those_who_hold_it_and_not_before() {
        let mut world = World::new(1, Timestamp(1_760_000_000_000_000));
        world.lay_out(Space { nearest_ms: 2.0, side_ms: 40.0, jitter_ms: 0.0, seed: 1 });
        for node in 0..40 {
            let bootstrap: &[usize] = if node == 0 { &[] } else { &[0] };
            world.add_node(bootstrap, PathPolicy::default(), Intervals::default());
        }
        world.run_for(Duration::from_secs(5));
        let name: ServiceName = "a.local".parse().unwrap();
        world.dht_put(1, &name, b"record");
        let holders = world.closest(1, &name);
        assert_eq!(holders.len(), HOLDERS);
        let seeker = (0..40).find(|node| !holders.contains(node)).unwrap();
        world.kill(holders[0]);
        assert_eq!(world.dht_get(seeker, &name), [b"record"]);
        world.part([seeker].into());
        assert_eq!(world.dht_get(seeker, &name), [] as [Vec<u8>; 0]);
        world.heal();
        holders[1..].iter().for_each(|holder| world.vanish(*holder));
        assert_eq!(world.dht_get(seeker, &name), [] as [Vec<u8>; 0]);
        holders.iter().for_each(|holder| world.start(*holder));
        assert_eq!(world.dht_get(seeker, &name), [] as [Vec<u8>; 0], "what they held is gone");
    }
}
