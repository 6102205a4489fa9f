//! Forward: the datagram header, the decision what to do with a datagram, and the snapshot of
//! routes that the data plane works from. No model and no state per flow.

mod decision;
mod header;
mod snapshot;
mod tag;
mod view;

pub use decision::{Drop, Verdict, decide};
pub use header::{DatagramKind, Header, HeaderError, PAYLOAD_BYTES_MAX, TUNNEL_ID_MAX};
pub use snapshot::{Backup, Binding, ForwardingSnapshot};
pub use tag::RouteKey;
pub use view::HeaderView;
