//! Forward: the datagram header, the decision what to do with a datagram, the snapshot of routes
//! that the data plane works from, and what the ends of a tunnel know of its route: what arrived
//! ([`Arrivals`]) and whether it still answers ([`RouteWatch`]) and delivers ([`Starving`]), both of them
//! in [`OwnEnd`]. No model.

mod decision;
mod header;
mod own_end;
mod receipt;
mod snapshot;
mod starving;
mod tag;
mod view;
mod watch;

pub use decision::{Drop, Verdict, decide};
pub use header::{
    DatagramKind, FIXED_BYTES, Header, HeaderError, PAYLOAD_BYTES_MAX, TUNNEL_ID_MAX,
};
pub use own_end::{OwnEnd, REPORT_EVERY};
pub use receipt::{Arrivals, Heard, REPLAY_WINDOW, ROUTES_MAX, Receipt, Seen};
pub use snapshot::{Backup, Binding, ForwardingSnapshot};
pub use starving::{Delivery, STARVED_FOR, STARVED_MIN, Starving};
pub use tag::RouteKey;
pub use view::HeaderView;
pub use watch::{ASK_GAP, BEAT, Due, GRACE, IN_USE, RouteWatch, SILENT_ASKS};
