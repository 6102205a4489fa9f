//! Who is reached over links that count. It is asked for with every look at a name of several providers, so
//! that the answer is kept.

use std::collections::BTreeSet;
use std::sync::{Arc, OnceLock};

use super::OverlayGraph;
use crate::engine::types::NodeId;

/// Who is reached from the node that was asked about first.
#[derive(Clone, Debug, Default)]
pub(super) struct Reached(OnceLock<(NodeId, Arc<BTreeSet<NodeId>>)>);

impl Reached {
    /// A link came or went.
    pub(super) fn outdate(&mut self) {
        self.0.take();
    }
}

impl OverlayGraph {
    /// The nodes to which links lead that count, the one where they begin included.
    pub fn reached_from(&self, node: NodeId) -> Arc<BTreeSet<NodeId>> {
        match self.reached.0.get_or_init(|| (node, Arc::new(self.walk_from(node)))) {
            (from, reached) if *from == node => reached.clone(),
            _ => Arc::new(self.walk_from(node)),
        }
    }

    pub(super) fn walk_from(&self, node: NodeId) -> BTreeSet<NodeId> {
        let mut reached = BTreeSet::from([node]);
        let mut fringe = vec![node];
        while let Some(at) = fringe.pop() {
            let Some(own) = self.adverts.get(&at) else { continue };
            for neighbour in own.links.keys() {
                if !reached.contains(neighbour) && self.is_link(at, *neighbour) {
                    reached.insert(*neighbour);
                    fringe.push(*neighbour);
                }
            }
        }
        reached
    }
}
