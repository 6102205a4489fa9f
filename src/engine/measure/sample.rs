//! The raw material of learning: one value per observation, success or failure.
//!
//! Samples leave the engine as [`Output::Record`](crate::engine::Output::Record) and become
//! rows of the store. A time-out is a sample like any other and is always labelled: a model
//! that never sees failures predicts none.

use crate::engine::measure::service::{CheckFailure, Subject};
use crate::engine::measure::{LinkQuality, RouteReport};
use crate::engine::types::{NodeId, Route, Timestamp, TunnelId};

/// What a probe travelled over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ProbeKind {
    /// One hop, to a neighbour: measures the link.
    Link,
    /// A whole candidate route to the destination and back.
    Route,
}

impl ProbeKind {
    /// The name used in the store.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Link => "link",
            Self::Route => "route",
        }
    }
}

/// A control-plane operation whose duration is a figure of the product.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum EventKind {
    /// From the start of the node until it has the mesh's state from a first peer.
    Join,
    /// From the command until a majority of the responsible nodes stores the record.
    Registration,
    /// From the question until a record that verifies is here.
    Lookup,
}

impl EventKind {
    /// The name used in the store.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Join => "join",
            Self::Registration => "registration",
            Self::Lookup => "lookup",
        }
    }
}

/// One observation. Times are unique and strictly increasing within a node, so that "what was
/// known when" has one answer, online and offline.
#[derive(Clone, Debug, PartialEq)]
pub enum Sample {
    /// A probe that came back, or did not.
    Probe {
        /// Link or whole route.
        kind: ProbeKind,
        /// Where it went.
        route: Route,
        /// When it left.
        sent_at: Timestamp,
        /// When the answer came, or when waiting for it ended.
        done_at: Timestamp,
        /// Round-trip time in microseconds; `None` when it was lost.
        rtt_us: Option<u64>,
    },
    /// A link as an advertisement that was accepted describes it (also our own ones).
    LinkState {
        /// When it was accepted.
        at: Timestamp,
        /// The advertiser.
        origin: NodeId,
        /// The other end.
        neighbour: NodeId,
        /// The quality; `None` when the link is gone.
        quality: Option<LinkQuality>,
    },
    /// One slice (10 s) of real traffic on a link of ours.
    Slice {
        /// End of the slice.
        at: Timestamp,
        /// The neighbour.
        neighbour: NodeId,
        /// What the data plane counted.
        report: crate::engine::measure::LinkReport,
    },
    /// What the traffic of a tunnel met on its route.
    RouteSlice {
        /// End of the time that the report covers.
        at: Timestamp,
        /// The tunnel.
        tunnel: TunnelId,
        /// What the far end and this node counted.
        report: RouteReport,
    },
    /// A check of a service.
    ServiceProbe {
        /// What was checked, and from where.
        subject: Subject,
        /// When it began.
        started_at: Timestamp,
        /// When it ended, or when waiting for it did.
        done_at: Timestamp,
        /// How long the service took (µs), or why it failed.
        result: Result<u64, CheckFailure>,
    },
    /// A control-plane operation.
    Event {
        /// Which.
        kind: EventKind,
        /// What about: a service name or a node.
        subject: String,
        /// When it began.
        started_at: Timestamp,
        /// When it ended.
        done_at: Timestamp,
        /// Whether it reached its goal.
        succeeded: bool,
    },
}
