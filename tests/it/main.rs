//! One integration binary: simulated worlds, the rules of the tree, and (with the default
//! features) real nodes on loopback.

mod sim;
mod tidy;
